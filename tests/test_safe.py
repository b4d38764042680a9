"""Models in files that can be opened without trust."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.common import safe
from tests.envs import SpacesEnv
from tests.test_save_load import differences, state

safetensors_torch = pytest.importorskip("safetensors.torch", reason="safe models need pip install 'sb3-qsm[safe]'")

BOX = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
PARTS = {"b": spaces.Box(-1, 1, (2, 2)), "a": spaces.Discrete(3)}
PAPER = QSM.paper_hyperparameters(total_timesteps=100)
NOISE = NormalActionNoise(np.zeros(2), np.full(2, 0.3))
HER = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}

# policy, observation space, number of environments, arguments, arguments of the policy
VARIANTS = {
    "box": ("MlpPolicy", BOX, 1, {}, {}),
    "two_envs": ("MlpPolicy", BOX, 2, {"gradient_steps": -1, "seed": 3}, {"net_arch": {"pi": [16], "qf": [8, 8]}}),
    "dict": ("MultiInputPolicy", spaces.Dict(list(PARTS.items())), 1, {"best_of_n": 2}, {}),
    "image": ("CnnPolicy", IMAGE, 1, {}, {"features_extractor_kwargs": {"features_dim": 8}}),
    "image_shared": (
        "CnnPolicy",
        IMAGE,
        2,
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"features_extractor_kwargs": {"features_dim": 8}, "share_features_extractor": True},
    ),
    "discrete": ("MlpPolicy", spaces.Discrete(4), 1, {"n_steps": 3}, {"layer_norm": True, "activation_fn": th.nn.Tanh}),
    "multi_discrete": ("MlpPolicy", spaces.MultiDiscrete([3, 2]), 1, {"train_freq": (1, "episode")}, {}),
    "multi_binary": ("MlpPolicy", spaces.MultiBinary(3), 1, {"policy_delay": 3}, {"time_arch": (8,)}),
    "schedules": (
        "MlpPolicy",
        BOX,
        1,
        {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5), "actor_learning_rate": PAPER["actor_learning_rate"]},
        {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"betas": (0.8, 0.99), "amsgrad": True}},
    ),
    "action_noise": ("MlpPolicy", BOX, 2, {"action_noise": NOISE, "tau": 1}, {"optimizer_class": th.optim.RMSprop}),
    "correlated_noise": (
        "MlpPolicy",
        BOX,
        1,
        {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.1), dt=0.1)},
        {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    ),
    "her": ("MultiInputPolicy", None, 1, HER, {}),
    "untrained": ("MlpPolicy", BOX, 1, {"learning_starts": 1000}, {}),
}


def make_env(observation_space, n_envs=1):
    if observation_space is None:
        return DummyVecEnv([lambda: BitFlippingEnv(n_bits=3, continuous=True, max_steps=7)])
    return DummyVecEnv([lambda: Monitor(SpacesEnv(observation_space))] * n_envs)


def make_model(variant="box", steps=24):
    policy, observation_space, n_envs, kwargs, policy_kwargs = VARIANTS[variant]
    env = make_env(observation_space, n_envs)
    common = {"learning_starts": 8, "batch_size": 8, "buffer_size": 200, "diffusion_steps": 3}
    model = QSM(policy, env, policy_kwargs={"net_arch": [16], **policy_kwargs}, **{**common, **kwargs})
    return model.learn(steps) if steps else model


@pytest.fixture(scope="module")
def content():
    """A safe file of a small model."""
    file = io.BytesIO()
    make_model().save_safe(file)
    return file.getvalue()


def load(content, **kwargs):
    return QSM.load_safe(io.BytesIO(content), **kwargs)


def rewrite(content, change=lambda config: None, change_tensors=lambda tensors: None):
    """The file of somebody who knows how to compute the checksum."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["sb3_qsm"])
    tensors = safetensors_torch.load(content)
    change_tensors(tensors)
    text = change(metadata["config"])
    metadata["sha256"] = "0" * 64
    written = (
        json.dumps(metadata) if not isinstance(text, str) else json.dumps({**metadata, "config": "@"}).replace('"@"', text)
    )
    unsigned = safetensors_torch.save(tensors, {"sb3_qsm": written})
    return unsigned.replace(b"0" * 64, hashlib.sha256(unsigned).hexdigest().encode(), 1)


# Round trips


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_save_and_load(tmp_path, variant):
    model = make_model(variant)
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    _, observation_space, n_envs, *_ = VARIANTS[variant]

    loaded = []
    for name, function in (("model.zip", QSM.load), ("model", QSM.load_safe)):
        th.manual_seed(0)
        np.random.seed(0)
        env = make_env(observation_space, n_envs)
        env.seed(5)
        loaded.append(function(tmp_path / name, env))
    ours, theirs = loaded[1], loaded[0]
    assert differences(state(ours), state(theirs)) == differences(state(ours), state(model)) == []
    assert ours._n_updates == theirs._n_updates == model._n_updates
    assert (variant == "untrained") == (ours._n_updates == 0)
    assert repr(ours.observation_space) == repr(theirs.observation_space)
    assert ours.ep_info_buffer == theirs.ep_info_buffer
    assert (ours.action_space._np_random is None) == (theirs.action_space._np_random is None)
    np.testing.assert_array_equal(ours.action_space.sample(), theirs.action_space.sample())
    assert ours.replay_buffer_class is theirs.replay_buffer_class
    assert type(ours.replay_buffer) is type(theirs.replay_buffer)

    def go_on(model):
        th.manual_seed(1)
        np.random.seed(1)
        model.load_replay_buffer(tmp_path / "buffer.pkl")
        model.learn(16, reset_num_timesteps=False)
        obs = model._last_obs
        return [model.predict(obs)[0], model.predict(obs, deterministic=True)[0]]

    model.save_replay_buffer(tmp_path / "buffer.pkl")
    before = state(ours)
    np.testing.assert_array_equal(go_on(ours), go_on(theirs))
    assert differences(state(ours), state(theirs)) == []
    assert variant == "untrained" or differences(state(ours), before) != []
    assert ours.num_timesteps == theirs.num_timesteps > model.num_timesteps
    assert [info["r"] for info in ours.ep_info_buffer] == [info["r"] for info in theirs.ep_info_buffer]


def test_predicts_without_an_environment(content):
    model = load(content)
    assert model.env is None
    action, _ = model.predict(np.zeros(3, np.float32))
    assert model.action_space.contains(action)
    # As a stream, the file is written again as it was
    again = io.BytesIO()
    model.save_safe(again)
    assert safe._read(io.BytesIO(content))[1].keys() == safe._read(io.BytesIO(again.getvalue()))[1].keys()
    assert differences(state(load(again.getvalue())), state(model)) == []


def test_arguments_that_replace_those_of_the_file(content, tmp_path):
    model = load(content, buffer_size=1, tensorboard_log=str(tmp_path), learning_rate=lambda progress: 1e-3 * progress)
    assert model.buffer_size == 1
    assert model.tensorboard_log == str(tmp_path)
    with pytest.raises(TypeError, match="QSM has no argument 'temprature'"):
        load(content, temprature=1.0)
    with pytest.raises(ValueError, match="gamma must be a number"):
        load(content, gamma=2.0)


def test_statistics_of_vec_normalize(tmp_path):
    space = spaces.Dict(PARTS)
    env = VecNormalize(make_env(space, 2), norm_obs_keys=["b"], clip_obs=3.0)
    model = QSM("MultiInputPolicy", env, learning_starts=100, buffer_size=100, policy_kwargs={"net_arch": [8]}).learn(20)
    model.save_safe(tmp_path / "model.safetensors")
    loaded = safe.load_vec_normalize(tmp_path / "model.safetensors", make_env(space))
    assert safe.has_vec_normalize(tmp_path / "model.safetensors")
    assert loaded.clip_obs == 3.0
    assert loaded.obs_rms.keys() == {"b"}
    for mine, theirs in ((loaded.obs_rms["b"], env.obs_rms["b"]), (loaded.ret_rms, env.ret_rms)):
        np.testing.assert_array_equal(mine.mean, theirs.mean)
        np.testing.assert_array_equal(mine.var, theirs.var)
        assert mine.count == theirs.count > 20
    with pytest.raises(ValueError, match="do not fit"):
        safe.load_vec_normalize(tmp_path / "model.safetensors", make_env(spaces.Dict({"b": BOX, "a": BOX})))
    # As VecNormalize takes them
    odd = VecNormalize(make_env(space), norm_obs_keys=("b",), epsilon=0.0)
    QSM("MultiInputPolicy", odd, learning_starts=100, buffer_size=100).learn(8).save_safe(tmp_path / "odd")
    loaded = safe.load_vec_normalize(tmp_path / "odd", make_env(space))
    assert loaded.norm_obs_keys == ["b"]
    assert loaded.epsilon == 0.0
    only_reward = VecNormalize(make_env(BOX), norm_obs=False)
    QSM("MlpPolicy", only_reward, learning_starts=100, buffer_size=100).learn(8).save_safe(tmp_path / "reward")
    assert safe.load_vec_normalize(tmp_path / "reward", make_env(BOX)).ret_rms.count == only_reward.ret_rms.count


def test_statistics_are_not_lost(tmp_path):
    """Neither by a model that is loaded to act and saved again, nor without a word where an environment lacks them."""
    env = VecNormalize(make_env(BOX), clip_reward=np.inf)
    QSM("MlpPolicy", env, learning_starts=100, buffer_size=100, policy_kwargs={"net_arch": [8]}).learn(20).save_safe(
        tmp_path / "a"
    )
    model = QSM.load_safe(tmp_path / "a")
    model.save_safe(tmp_path / "b")
    found = safe.load_vec_normalize(tmp_path / "b", make_env(BOX))
    assert found.clip_reward == np.inf
    np.testing.assert_array_equal(found.obs_rms.mean, env.obs_rms.mean)
    model.save(tmp_path / "pickled")
    assert "_loaded_statistics" not in vars(QSM.load(tmp_path / "pickled"))
    for other in (make_env(BOX), VecNormalize(make_env(BOX))):
        with pytest.warns(UserWarning, match="holds statistics of VecNormalize, which the environment lacks"):
            QSM.load_safe(tmp_path / "a", other)
    new = QSM("MlpPolicy", VecNormalize(make_env(BOX)), buffer_size=100, policy_kwargs={"net_arch": [8]})
    new.save_safe(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QSM.load_safe(tmp_path / "b", found)
        QSM.load_safe(tmp_path / "new", safe.load_vec_normalize(tmp_path / "new", make_env(BOX)))
    model.set_env(make_env(BOX))
    model.save_safe(tmp_path / "c")
    assert safe.has_vec_normalize(tmp_path / "c")


def test_steps_as_a_float(content):
    model = QSM.load_safe(io.BytesIO(content), make_env(BOX)).learn(1e1)
    file = io.BytesIO()
    model.save_safe(file)
    assert load(file.getvalue())._total_timesteps == 10
    model._total_timesteps = float("inf")
    with pytest.raises(ValueError, match="counters._total_timesteps=inf cannot be saved safely"):
        model.save_safe(file)
    model = QSM.load_safe(io.BytesIO(content), learning_starts=1e1, exploration_decay_steps=2e1)
    file = io.BytesIO()
    model.save_safe(file)
    loaded = load(file.getvalue())
    assert (loaded.learning_starts, loaded.exploration_decay_steps) == (10, 20)


def test_no_statistics(content):
    with pytest.raises(ValueError, match="without VecNormalize"):
        safe.load_vec_normalize(io.BytesIO(content), make_env(BOX))


# Refused when saving


class Own(FlattenExtractor):
    pass


@pytest.mark.parametrize(
    ("kwargs", "change", "named"),
    [
        ({"learning_rate": lambda progress: 1e-3}, None, "arguments.learning_rate=<function"),
        ({"action_noise": NormalActionNoise(0.0, 0.1)}, None, "mean must be of type <class 'numpy.ndarray'>"),
        ({"replay_buffer_kwargs": {"own": object()}}, "later", "arguments.replay_buffer_kwargs.own=<object"),
        ({"policy_kwargs": {"features_extractor_class": Own}}, None, "features_extractor_class=<class"),
        ({}, lambda model: setattr(model, "gamma", float("nan")), "arguments.gamma=nan"),
        ({}, lambda model: setattr(model, "gamma", "0.9"), "gamma must be of type <class 'float'>"),
        ({}, lambda model: setattr(model, "policy_class", FlattenExtractor), "policy must be one of MlpPolicy"),
        ({}, lambda model: model.actor.optimizer.param_groups[0].update(weight_decay=0.1), "actor.optimizer: weight_decay"),
        ({}, lambda model: model.actor.add_module("own", th.nn.Linear(1, 1)), "policy.actor.own"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, kwargs, change, named):
    later = kwargs if change == "later" else {}
    model = QSM("MlpPolicy", make_env(BOX), buffer_size=10, **({} if later else kwargs))
    for name, value in later.items():
        setattr(model, name, value)
    if callable(change):
        change(model)
    (tmp_path / "model.safetensors").write_text("of the user")
    with pytest.raises(ValueError, match=re.escape(named)):
        model.save_safe(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "of the user"


def test_a_class_of_ones_own_can_be_allowed(tmp_path, monkeypatch):
    model = QSM("MlpPolicy", make_env(BOX), buffer_size=10, policy_kwargs={"features_extractor_class": Own})
    monkeypatch.setitem(safe.CLASSES, "Own", Own)
    model.save_safe(tmp_path / "model")
    assert isinstance(QSM.load_safe(tmp_path / "model").actor.features_extractor, Own)
    monkeypatch.delitem(safe.CLASSES, "Own")
    with pytest.raises(ValueError, match=r"features_extractor_class must be something that `save_safe` writes, got .*'Own'"):
        QSM.load_safe(tmp_path / "model")


def test_a_full_disk_leaves_the_old_file(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    code = f"""
import resource, signal
from sb3_qsm import QSM
model = QSM.load_safe({str(path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
model.save_safe({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content


# Refused when loading


class Bomb:
    """What unpickling this runs leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_never_opened(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        archive.writestr("data", bomb)
        archive.writestr("../../policy.pth", bomb)
        archive.writestr("/etc/passwd", bomb)
    make_model(steps=0).save(tmp_path / "model.zip")
    (tmp_path / "bomb.pkl").write_bytes(bomb)
    th.save(Bomb(tmp_path / "exploded"), tmp_path / "bomb.pth")
    for name, message in [
        ("bomb.zip", "is a zip file"),
        ("model.zip", "as `save` writes"),
        ("bomb.pkl", "was not written by"),
    ]:
        with pytest.raises(ValueError, match=message):
            QSM.load_safe(tmp_path / name)
    with pytest.raises(ValueError, match="is a zip file"):
        QSM.load_safe(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # else the test could not fail


def test_missing_file_and_missing_package(content, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        QSM.load_safe(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=re.escape('pip install "sb3-qsm[safe]"')):
        load(content)


def test_another_missing_package_is_no_fault_of_the_file(content, monkeypatch):
    def missing(*_):
        raise ImportError("DDiffPG needs dtaidistance")

    monkeypatch.setattr(QSM, "_setup_model", missing)
    with pytest.raises(ImportError, match="needs dtaidistance"):
        load(content)


def test_file_of_another_kind(content):
    plain = safetensors_torch.save({"weight": th.zeros(3)})
    for data in (b"", b"\0" * 8, b"text", plain, safetensors_torch.save({}, {"sb3_qsm": "{}"})):
        with pytest.raises(ValueError, match="was not written by `save_safe`, or is truncated or damaged"):
            load(data)
    with pytest.raises(ValueError, match="its format is 2, this release reads 1 only"):
        load(content.replace(b'\\"format\\": 1', b'\\"format\\": 2'))
    with pytest.raises(ValueError, match="holds no model of Other: it is one of 'QSM'"):
        type("Other", (QSM,), {}).load_safe(io.BytesIO(content))
    with pytest.raises(ValueError, match="does not fit: Observation spaces do not match"):
        load(content, env=make_env(spaces.Box(-1, 1, (5,))))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated(content, data):
    length = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(ValueError, match="truncated or damaged"):
        load(content[:length])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged(content, data):
    # As often in the header as in the tensors behind it
    header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, header) | st.integers(header, len(content) - 1))
    bits = data.draw(st.integers(1, 255))
    damaged = bytearray(content)
    damaged[position] ^= bits
    with pytest.raises(ValueError, match="truncated or damaged"):
        load(bytes(damaged))


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100_000_001, 3])
def test_huge_header(length):
    with pytest.raises(ValueError, match="was not written by"):
        load(struct.pack("<Q", length) + b'{"__metadata__":{}}')


def test_untouched_rewriting_is_accepted(content):
    assert differences(state(load(rewrite(content))), state(load(content))) == []
    # As in a file that is older than the argument
    older = load(rewrite(content, lambda config: config["arguments"].pop("best_of_n") and None))
    assert differences(state(older), state(load(content))) == []
    assert older.best_of_n == 1


def put(path, value):
    """A change of the configuration."""

    def change(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value

    return change


def deep(depth):
    return lambda config: "[" * depth + "]" * depth


def object_(name, **arguments):
    return {"@object": name, **arguments}


HOSTILE = {
    "imported class": (put("arguments.replay_buffer_class", {"@class": "os.system"}), "replay_buffer_class must be something"),
    "class for another argument": (put("arguments.replay_buffer_class", {"@class": "ReLU"}), "must be of type type[stable_"),
    "object of a class": (put("arguments.action_noise", object_("ReLU")), "action_noise must be something"),
    "object as number": (
        put("arguments.gamma", object_("ConstantSchedule", val=1)),
        "gamma must be of type <class 'float'>, got ConstantSchedule",
    ),
    "argument too many": (put("arguments.__class__", 1), "'__class__' is not known"),
    "entry too many": (put("os", 1), "config.'os' is not known"),
    "object's argument too many": (
        put("arguments.learning_rate", object_("ConstantSchedule", val=1, x=1)),
        "learning_rate.'x' is not known",
    ),
    "object's argument missing": (put("arguments.learning_rate", object_("LinearSchedule", start=1)), "is missing"),
    "counter missing": (lambda config: config["counters"].pop("_n_updates") and None, "'_n_updates' is missing"),
    "policy": (put("policy", "/tmp/policy.py"), "policy must be one of MlpPolicy"),
    "policy_kwargs": (put("arguments.policy_kwargs.__init__", 1), "policy_kwargs.'__init__' is not known"),
    "no list of layers": (put("arguments.policy_kwargs.net_arch", "os"), "policy_kwargs.net_arch must be of type"),
    "list of lists": (put("arguments.policy_kwargs.net_arch", [[1]]), "policy_kwargs.net_arch must be of type"),
    "negative layer": (put("arguments.policy_kwargs.net_arch", [-1]), "holds no model of QSM"),
    "huge layer": (put("arguments.policy_kwargs.net_arch", [2**50, 2**50]), "holds no model of QSM"),
    "large layer": (put("arguments.policy_kwargs.net_arch", [10**6, 10**6]), "must be (1000000, "),
    "layers too many": (put("arguments.policy_kwargs.net_arch", [1] * 65), "a list of at most 64"),
    "critics too many": (put("arguments.policy_kwargs.n_critics", 10**6), "n_critics must be at most 100"),
    "bits too many": (
        put("observation_space", object_("MultiBinary", n={"@tuple": [2**11, 2**10]})),
        "observation_space must be of at most 1,048,576 bits",
    ),
    "negative counter": (put("counters.num_timesteps", -5), "counters.num_timesteps must be an integer >= 0, got -5"),
    "negative rate": (
        put("learning_rates", {"actor.optimizer": [-1.0], "critic.optimizer": [1e-3]}),
        "learning_rates.'actor.optimizer' must be a number >= 0, got -1.0",
    ),
    "progress": (put("progress_remaining", 1e300), "progress_remaining must be a number >= -9.0072e+15 and <= 1"),
    "terminal codes": (put("arguments.\x1b[2J", 1), r"QSM: '\x1b[2J' is not known"),
    "third critic": (put("arguments.policy_kwargs.n_critics", 3), "'policy.critic.qf2.0.weight' is missing"),
    "steps too many": (put("arguments.diffusion_steps", 10**9), "diffusion_steps must be at most 10,000"),
    "buffer too large": (put("arguments.buffer_size", 2**50), "buffer_size must be at most"),
    "environments too many": (put("n_envs", 2**30), "n_envs must be at most"),
    "out of range": (put("arguments.gamma", 1.5), "gamma must be a number >= 0 and <= 1, got 1.5"),
    "integer for truth": (put("arguments.optimize_memory_usage", 1), "must be of type <class 'bool'>"),
    "truth for integer": (put("counters.num_timesteps", True), "config.counters must be of type dict[str, int]"),
    "text for seed": (put("arguments.seed", "1"), "seed must be of type int | None, got '1'"),
    "huge number": (put("arguments.gamma", 10**100), "gamma must be at most"),
    "infinite": (lambda config: json.dumps(config).replace('"gamma": 0.99', '"gamma": 1e999'), "gamma must be finite"),
    "no number": (lambda config: json.dumps(config).replace('"gamma": 0.99', '"gamma": NaN'), "gamma must be finite"),
    "digits": (lambda config: json.dumps(config).replace('"gamma": 0.99', '"gamma": ' + "9" * 10_000), "was not written"),
    "nested": (deep(100_000), "was not written by"),
    "no dictionary": (lambda config: "[1]", "config must be a dictionary"),
    "array outside": (
        put("observation_space.low", {"@array": "policy.actor.score_network.fourier.weight"}),
        "low must be some",
    ),
    "array twice": (put("observation_space.low", {"@array": "arrays.71"}), "must be something that"),
    "no space": (put("observation_space", 3), "config.observation_space must be of type"),
    "action space": (put("action_space", object_("Discrete", n=3, start=0, dtype="int64")), "config.action_space must be"),
    "huge space": (
        put("observation_space", object_("Discrete", n=2**52, start=0, dtype="int64")),
        "must be (16, 4503599627370626)",
    ),
    "type of a space": (put("observation_space.dtype", "O"), "was not written by"),
    "generator": (put("action_space.@random", {"@generator": [-1, 0, 0, 0]}), "the state of a generator"),
    "no generator": (put("action_space.@random", 1), "a space with a generator"),
    "learning rates": (put("learning_rates", {}), "learning_rates must be as many as"),
    "episodes": (put("episodes", [1]), "config.episodes must be of type"),
    "train_freq": (put("arguments.train_freq", {"@tuple": [1, "os"]}), "holds no model of QSM"),
    "buffer arguments": (
        put("arguments.replay_buffer_kwargs", {"device": "cpu"}),
        "does not fit: stable_baselines3.common.buffers.NStepReplayBuffer",
    ),
    "statistics": (put("vec_normalize", 1), "config.vec_normalize must be of type"),
    "state of another algorithm": (put("state.sizes", [1]), "state.'sizes' is not known"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configuration(content, name):
    change, message = HOSTILE[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        load(rewrite(content, change))


WEIGHT = "policy.actor.score_network.input_layer.weight"


def transpose(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].t().contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transpose, f"the tensor '{WEIGHT}' must be (16, "),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].double()}), "torch.float32, got"),
        (lambda tensors: tensors[WEIGHT].view(-1)[-1:].fill_(np.nan), f"the tensor '{WEIGHT}' must be finite"),
        (lambda tensors: tensors["critic.optimizer.0.exp_avg"].fill_(np.inf), "exp_avg' must be finite"),
        (lambda tensors: tensors.pop(WEIGHT) is None, f"the tensor '{WEIGHT}' is missing"),
        (
            lambda tensors: tensors.update({"../../etc/passwd": th.zeros(1)}),
            "the tensor '../../etc/passwd' belongs to nothing",
        ),
        (
            lambda tensors: tensors.update({"policy.__class__": th.zeros(1)}),
            "the tensor 'policy.__class__' belongs to nothing",
        ),
        (lambda tensors: tensors.update({"arrays.9999": th.zeros(1)}), "the tensor 'arrays.9999' belongs to nothing"),
        (lambda tensors: tensors.update({"x" * 10**6: th.zeros(1)}), "belongs to nothing"),
        (lambda tensors: tensors.pop("q_grad_norm") is None, "the tensor 'q_grad_norm' is missing"),
        (lambda tensors: tensors.pop("actor.optimizer.0.exp_avg") is None, "'actor.optimizer.0.exp_avg' is missing"),
        (lambda tensors: tensors.update({"actor.optimizer.99.step": th.zeros(())}), "actor.optimizer.99.step' belongs"),
        (lambda tensors: tensors.update({"actor.optimizer.0.hook": th.zeros(())}), "actor.optimizer.0.hook' belongs"),
    ],
)
def test_hostile_tensors(content, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(rewrite(content, change_tensors=change))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tensors_of_any_other_shape_or_type(content, data):
    names = sorted(name for name in safetensors_torch.load(content) if not name.startswith("arrays."))
    shape = tuple(data.draw(st.lists(st.integers(0, 20), max_size=3)))
    dtype = data.draw(st.sampled_from([th.float32, th.float64, th.bfloat16, th.int64, th.uint8, th.bool]))
    name = data.draw(st.sampled_from(names))

    def change(tensors):
        assume((tensors[name].shape, tensors[name].dtype) != (shape, dtype))
        tensors[name] = th.zeros(shape, dtype=dtype)

    with pytest.raises(ValueError, match=re.escape(f"the tensor '{name}' must be")):
        load(rewrite(content, change_tensors=change))


def test_unbounded_actions(content):
    found = {}
    rewrite(content, lambda config: found.update(config["action_space"]["low"]))
    low = found["@array"]
    with pytest.raises(ValueError, match="action_space must be bounded, got Box"):
        load(rewrite(content, change_tensors=lambda tensors: tensors[low].fill_(-np.inf)))


@pytest.fixture(scope="module")
def normalized():
    """A safe file of a model with statistics."""
    file = io.BytesIO()
    env = VecNormalize(make_env(BOX))
    QSM("MlpPolicy", env, learning_starts=100, buffer_size=100, policy_kwargs={"net_arch": [8]}).learn(20).save_safe(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("vec_normalize.arguments.clip_obs", -1.0), "clip_obs must be a number > 0, got -1.0"),
        (put("vec_normalize.arguments.clip_reward", 0), "clip_reward must be a number > 0, got 0"),
        (put("vec_normalize.arguments.epsilon", -1e-3), "epsilon must be a number >= 0, got -0.001"),
        (put("vec_normalize.arguments.gamma", 2.0), "gamma must be a number >= 0 and <= 1, got 2.0"),
        (put("vec_normalize.arguments.training", 1), "training must be of type"),
        (put("vec_normalize.obs_rms.count", -4.0), "obs_rms.count must be a number >= 0, got -4.0"),
        (put("vec_normalize.ret_rms", None), "ret_rms must be a dictionary"),
    ],
)
def test_hostile_statistics(normalized, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        safe.load_vec_normalize(io.BytesIO(rewrite(normalized, change)), make_env(BOX))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("var", th.full((3,), -1.0, dtype=th.float64), "obs_rms.var must be finite and not negative"),
        ("mean", th.full((3,), np.nan, dtype=th.float64), "obs_rms.mean must be finite"),
        ("mean", th.zeros(3, dtype=th.int64), "of float64"),
        ("var", th.ones(4, dtype=th.float64), "obs_rms must be of shape (3,)"),
    ],
)
def test_hostile_arrays_of_statistics(normalized, part, value, message):
    names = {}

    def find(config):
        names[part] = config["vec_normalize"]["obs_rms"][part]["@array"]

    rewrite(normalized, find)
    data = rewrite(normalized, change_tensors=lambda tensors: tensors.update({names[part]: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        safe.load_vec_normalize(io.BytesIO(data), make_env(BOX))


def test_loading_unpickles_nothing(content, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this may run code")

    for module in (pickle, cloudpickle, th):
        for name in {"load", "loads", "Unpickler"} & set(dir(module)):
            monkeypatch.setattr(module, name, refuse)
    assert load(content).num_timesteps > 0


def positions(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from positions(value[key], (*path, key))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([*safe.OBJECTS, "arrays.70"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["@object", "@class", "@tuple", "@array", "n", "low", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_configuration_is_refused_or_is_a_whole_model(content, data):
    def change(config):
        # With a trailing entry the root itself would be replaced
        *parents, last = data.draw(st.sampled_from([path for path in positions(config) if path]))
        for parent in parents:
            config = config[parent]
        config[last] = data.draw(JSON)

    try:
        model = load(rewrite(content, change))
    except ValueError:
        return
    assert model.predict(np.zeros(3, np.float32))[0].shape == model.action_space.shape


def test_laying_out_takes_no_memory_and_no_random_numbers(content):
    th.manual_seed(0)
    before = th.get_rng_state()
    with pytest.raises(ValueError, match=re.escape("must be (30000, ")):
        load(rewrite(content, put("arguments.policy_kwargs.net_arch", [30_000, 10**6, 10**6])))
    assert th.equal(th.get_rng_state(), before)
