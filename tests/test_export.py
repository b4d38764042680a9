"""Policies as graphs: the same actions without this package."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_qsm import QSM
from sb3_qsm.diffusion import SAMPLERS
from sb3_qsm.export import PolicyGraph, to_onnx, to_torch_export
from tests.envs import SpacesEnv

STEPS = 4
BOX = spaces.Box(-1, 1, (3,))
# What the environment returns lies far from zero
FAR = spaces.Box(900.0, 1000.0, (2, 2), np.float64)
DICT = spaces.Dict({"b": spaces.Discrete(3), "a": FAR, "c": spaces.MultiDiscrete([2, 3]), "d": spaces.MultiBinary(2)})
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
ACTION = spaces.Box(np.array([[-1.0], [2.0]]), np.array([[3.0], [2.5]]))

# observation space, arguments, whether VecNormalize is around the environment
VARIANTS = {
    "ddpm_x0": (BOX, {}, False),
    "ddpm": (FAR, {"sampler": "ddpm", "sampling_temperature": 0.5}, True),
    "ddim": (DICT, {"sampler": "ddim"}, True),
    "few_steps": (spaces.Discrete(4), {"sampling_steps": 2}, False),
    "best_of_n": (DICT, {"best_of_n": 3, "noise_schedule": "cosine"}, True),
    "image": (
        IMAGE,
        {"policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}, "share_features_extractor": True}},
        False,
    ),
    "image_and_vector": (spaces.Dict({"a": FAR, "image": IMAGE}), {}, True),
    "layer_norm": (spaces.MultiDiscrete([3, 2]), {"policy_kwargs": {"layer_norm": True, "net_arch": []}}, False),
}


def make_model(variant="ddpm_x0", **changes):
    space, kwargs, normalize = VARIANTS[variant]
    # With little noise, else an untrained chain ends at the bounds wherever it starts
    kwargs = {"policy_kwargs": {}, "noise_schedule": "linear", **kwargs, **changes}
    kwargs["policy_kwargs"] = {"net_arch": [16], **kwargs["policy_kwargs"]}
    env = DummyVecEnv([lambda: SpacesEnv(space, ACTION)])
    if normalize:
        env = VecNormalize(env, norm_obs_keys=["a"] if isinstance(space, spaces.Dict) else None, clip_obs=1.5)
    policy = {spaces.Dict: "MultiInputPolicy", spaces.Box: "CnnPolicy" if space is IMAGE else "MlpPolicy"}
    model = QSM(policy.get(type(space), "MlpPolicy"), env, buffer_size=50, learning_starts=50, diffusion_steps=STEPS, **kwargs)
    # For the statistics
    return model.learn(10) if normalize else model


def observations(space, n):
    space.seed(0)
    found = [space.sample() for _ in range(n)]
    return (
        {key: np.stack([obs[key] for obs in found]) for key in found[0]} if isinstance(space, spaces.Dict) else np.stack(found)
    )


def expected(model, obs, deterministic):
    """What ``predict`` returns, and the noise that it drew."""
    vec_normalize = model.get_vec_normalize_env()
    obs = obs if vec_normalize is None else vec_normalize.normalize_obs(obs)
    th.manual_seed(3)
    actions, _ = model.predict(obs, deterministic=deterministic)
    n, dim = len(actions), model.actor.action_dim
    shape = (n, dim) if model.best_of_n == 1 else (model.best_of_n, n, dim)
    th.manual_seed(3)
    if deterministic:
        return actions, []
    if model.actor.sampling_steps is not None:
        return actions, [th.randn(shape)]
    noise = th.randn(STEPS + 1, *shape)
    return actions, [noise[0]] if model.sampler == "ddim" else [noise[0], noise[1:]]


def tensors(obs):
    return {key: th.as_tensor(value) for key, value in obs.items()} if isinstance(obs, dict) else th.as_tensor(obs)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_is_predict(variant, deterministic):
    model = make_model(variant)
    graph = PolicyGraph(model.policy, model.get_vec_normalize_env())
    obs = observations(VARIANTS[variant][0], 5)
    actions, noise = expected(model, obs, deterministic)
    with th.no_grad():
        found = graph(tensors(obs), *noise)
        other = graph(tensors(obs), *(th.randn_like(tensor) for tensor in noise))
    assert found.shape == (5, 2, 1)
    np.testing.assert_allclose(found.numpy(), actions, atol=1e-5)
    assert (th.equal(found, other)) == deterministic
    assert np.ptp(actions, axis=0).max() > 1e-4  # they depend on the observation


@pytest.mark.parametrize(
    ("variant", "deterministic"),
    [("ddpm_x0", True), ("ddpm", False), ("ddim", False), ("few_steps", False), ("best_of_n", True), ("image", True)],
)
def test_onnx_is_predict(tmp_path, variant, deterministic, recwarn, caplog):
    ort = pytest.importorskip("onnxruntime", reason="needs pip install 'sb3-qsm[export]'")
    model = make_model(variant)
    to_onnx(model, tmp_path / "new" / "policy.onnx", deterministic)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["policy.onnx"]
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    session = ort.InferenceSession(tmp_path / "new" / "policy.onnx")
    assert [output.name for output in session.get_outputs()] == ["action"]
    for n in (1, 5):
        obs = observations(VARIANTS[variant][0], n)
        actions, noise = expected(model, obs, deterministic)
        feed = {f"observation.{key}": value for key, value in obs.items()} if isinstance(obs, dict) else {"observation": obs}
        feed.update({name: tensor.numpy() for name, tensor in zip(("latent", "chain"), noise, strict=False)})
        assert {item.name for item in session.get_inputs()} == feed.keys()
        np.testing.assert_allclose(session.run(None, feed)[0], actions, atol=1e-5)


@pytest.mark.parametrize(("variant", "deterministic"), [("ddim", True), ("ddpm_x0", False), ("best_of_n", False)])
def test_torch_export_is_predict(tmp_path, variant, deterministic):
    model = make_model(variant)
    to_torch_export(model, tmp_path / "policy.pt2", deterministic)
    program = th.export.load(tmp_path / "policy.pt2").module()
    for n in (1, 5):
        obs = observations(VARIANTS[variant][0], n)
        actions, noise = expected(model, obs, deterministic)
        np.testing.assert_allclose(program(tensors(obs), *noise).numpy(), actions, atol=1e-5)


def test_actions_in_double_precision_stay_within_their_bounds(tmp_path):
    space = spaces.Box(np.array([-0.1, -0.7]), np.array([0.1, 0.7]), dtype=np.float64)
    env = DummyVecEnv([lambda: SpacesEnv(BOX, space)])
    model = QSM("MlpPolicy", env, buffer_size=10, policy_kwargs={"net_arch": [4]}, seed=0)
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter.mul_(30.0)
    to_torch_export(model, tmp_path / "policy.pt2")
    obs = observations(BOX, 100)
    found = th.export.load(tmp_path / "policy.pt2").module()(tensors(obs)).numpy()
    actions = model.predict(obs, deterministic=True)[0]
    assert (np.abs(actions) == space.high).any()  # else the test shows nothing
    assert found.dtype == actions.dtype == np.float64
    assert all(map(space.contains, found))
    np.testing.assert_allclose(found, actions, atol=1e-5)


def test_statistics_of_rewards_alone_are_no_part_of_a_policy(tmp_path):
    """Images with channels last, which SB3 puts in order outside of VecNormalize, go in as they are in the model."""
    env = VecNormalize(DummyVecEnv([lambda: SpacesEnv(spaces.Box(0, 255, (36, 38, 3), np.uint8), ACTION)]), norm_obs=False)
    features = {"features_extractor_kwargs": {"features_dim": 4}, "net_arch": [4]}
    model = QSM("CnnPolicy", env, buffer_size=10, learning_starts=50, policy_kwargs=features)
    to_torch_export(model, tmp_path / "policy.pt2")
    obs = observations(IMAGE, 3)[:, :, :, :36]
    obs = np.concatenate([obs, obs[..., :2]], axis=-1)  # (3, 36, 38), as SB3 keeps it
    found = th.export.load(tmp_path / "policy.pt2").module()(tensors(obs)).numpy()
    np.testing.assert_allclose(found, model.predict(obs, deterministic=True)[0], atol=1e-5)


def test_graphs_are_float32(tmp_path):
    """A model trained in bfloat16 chooses the precision by the number of observations; a graph is for any number."""
    model = make_model()
    obs = observations(BOX, 20)
    actions, _ = expected(model, obs, True)
    model.actor.precision = "bf16"
    to_torch_export(model, tmp_path / "policy.pt2")
    assert model.actor.precision == "bf16"
    found = th.export.load(tmp_path / "policy.pt2").module()(tensors(obs)).numpy()
    np.testing.assert_allclose(found, actions, atol=1e-5)


def test_runs_where_only_onnxruntime_is(tmp_path):
    pytest.importorskip("onnxruntime")
    model = make_model()
    to_onnx(model, tmp_path / "policy.onnx")
    code = f"""
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession({str(tmp_path / "policy.onnx")!r})
print(session.run(None, {{"observation": np.full((1, 3), 0.5, np.float32)}})[0].ravel().tolist())
assert not {{"torch", "stable_baselines3", "sb3_qsm"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    action, _ = model.predict(np.full(3, 0.5, np.float32), deterministic=True)
    np.testing.assert_allclose(np.array(eval(done.stdout)), action.ravel(), atol=1e-5)


def test_the_model_goes_on_as_it_was(tmp_path):
    model = make_model(sampling_steps=3)
    model.policy.set_training_mode(True)
    to_torch_export(model.policy, tmp_path / "policy.pt2", sampling_steps=1)
    assert model.actor.sampling_steps == 3
    assert model.policy.training
    assert all(parameter.requires_grad for parameter in model.actor.parameters())
    obs = observations(BOX, 3)
    program = th.export.load(tmp_path / "policy.pt2").module()
    assert np.abs(program(th.as_tensor(obs)).numpy() - model.predict(obs, deterministic=True)[0]).max() > 1e-3
    model.actor.sampling_steps = 1
    np.testing.assert_allclose(program(th.as_tensor(obs)).numpy(), model.predict(obs, deterministic=True)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling_steps": 5}, "sampling_steps must be None or an integer from 1 to diffusion_steps=4, got 5"),
        ({"sampling_steps": 0}, "got 0"),
        ({"opset_version": "9"}, "opset_version must be an integer >= 1, got '9'"),
        ({"opset_version": 99}, "opset_version=99 is not possible here: PyTorch wrote version"),
        ({"vec_normalize": BOX}, "vec_normalize must be a VecNormalize, got Box"),
        ({"vec_normalize": "other"}, "vec_normalize does not fit: it has observations of Box(900.0"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    if kwargs.get("vec_normalize") == "other":
        kwargs = {"vec_normalize": make_model("ddpm").get_vec_normalize_env()}
    for function in (to_onnx,) if "opset_version" in kwargs else (to_onnx, to_torch_export):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            function(make_model(), tmp_path / "new" / "policy", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_other_models(tmp_path):
    sac = SAC("MlpPolicy", SpacesEnv(BOX), buffer_size=10, policy_kwargs={"net_arch": [4]})
    for model in (sac, sac.policy, "model.zip"):
        with pytest.raises(TypeError, match=f"Only models with a DiffusionPolicy can be exported, got {type(model).__name__}"):
            to_onnx(model, tmp_path / "policy.onnx")


def test_statistics_that_came_with_a_file(tmp_path):
    pytest.importorskip("safetensors")
    env = VecNormalize(DummyVecEnv([lambda: SpacesEnv(FAR)]))
    model = QSM("MlpPolicy", env, buffer_size=10, policy_kwargs={"net_arch": [4]})
    model.save_safe(tmp_path / "model")
    loaded = QSM.load_safe(tmp_path / "model")
    with pytest.raises(ValueError, match=r"vec_normalize is needed: .* pass load_vec_normalize\(file, venv\)"):
        to_torch_export(loaded, tmp_path / "policy.pt2")
    to_torch_export(loaded, tmp_path / "policy.pt2", vec_normalize=env)
    to_torch_export(loaded.policy, tmp_path / "without.pt2")
    env.norm_obs = False
    model.save_safe(tmp_path / "rewards")
    to_torch_export(QSM.load_safe(tmp_path / "rewards"), tmp_path / "rewards.pt2")


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=re.escape('pip install "sb3-qsm[export]"')):
        to_onnx(make_model(), tmp_path / "policy.onnx")
    assert list(tmp_path.iterdir()) == []


# Acting in fewer steps


def test_all_steps_are_the_ddim_sampler():
    model = make_model(sampler="ddim")
    obs = observations(BOX, 4)
    th.manual_seed(0)
    whole = model.actor.sample(th.as_tensor(obs), th.ones(4, 2), None)
    assert th.equal(model.actor.sample(th.as_tensor(obs), th.ones(4, 2), None, STEPS), whole)
    assert not th.equal(model.actor.sample(th.as_tensor(obs), th.ones(4, 2), None, STEPS - 1), whole)
    # Another sampler's chain without noise is not DDIM's
    assert not th.allclose(make_same(model, "ddpm_x0").actor.sample(th.as_tensor(obs), th.ones(4, 2), None), whole)


def make_same(model, sampler):
    other = make_model(sampler=sampler)
    other.policy.load_state_dict(model.policy.state_dict())
    return other


@pytest.mark.parametrize(
    ("n", "visited"), [(1, [8]), (2, [8, 0]), (3, [8, 4, 0]), (5, [8, 6, 4, 2, 0]), (10, [*range(9, -1, -1)])]
)
def test_steps_that_are_visited(n, visited):
    from sb3_qsm.diffusion import NoiseSchedule

    seen = []

    def predict_noise(x, t):
        seen.append(t)
        # The noise of a sample whose clean action is 0.3
        return (x - schedule.signal_rates[t] * 0.3) / schedule.noise_rates[t]

    schedule = NoiseSchedule("vp", 10)
    action = SAMPLERS["ddim"](predict_noise, schedule, th.tensor([[1.0, -2.0]]), None, 1.0, sampling_steps=n)
    assert seen == visited
    # A network that knows the action finds it in any number of steps
    np.testing.assert_allclose(action.numpy(), 0.3, atol=1e-5)


def test_sampling_steps_belong_to_acting_and_are_saved(tmp_path):
    model = QSM("MlpPolicy", SpacesEnv(BOX), buffer_size=50, noise_schedule="linear", sampling_steps=2)
    model.save(tmp_path / "model.zip")
    obs = observations(BOX, 4)
    loaded = QSM.load(tmp_path / "model.zip")
    assert loaded.actor.sampling_steps == 2
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    whole = QSM.load(tmp_path / "model.zip", sampling_steps=None)
    assert whole.actor.sampling_steps is None
    assert np.abs(whole.predict(obs, deterministic=True)[0] - model.predict(obs, deterministic=True)[0]).max() > 1e-4
    model.policy.save(tmp_path / "policy.pt")
    assert type(model.policy).load(tmp_path / "policy.pt").actor.sampling_steps == 2
    # Also those that were changed since
    whole.actor.sampling_steps = 3
    whole.save(tmp_path / "changed.zip")
    assert QSM.load(tmp_path / "changed.zip").actor.sampling_steps == 3
    whole.actor.sampling_steps = 4
    whole.save_safe(tmp_path / "changed")
    assert QSM.load_safe(tmp_path / "changed").actor.sampling_steps == 4
    for value in (0, 11, 2.0, True):
        for name in ("sampling_steps", "target_sampling_steps"):
            with pytest.raises(ValueError, match=f"^{name} must be None or an integer from 1 to diffusion_steps=10, got"):
                QSM.load(tmp_path / "model.zip", **{name: value})
        with pytest.raises(ValueError, match="sampling_steps must be"):
            model.actor.sampling_steps = value


def test_the_target_has_steps_of_its_own(tmp_path):
    losses, targets = [], []
    for steps in ({}, {"sampling_steps": 1}, {"target_sampling_steps": 2}):
        model = QSM("MlpPolicy", SpacesEnv(BOX), buffer_size=50, learning_starts=50, noise_schedule="linear", seed=0, **steps)
        model.learn(20)
        model.save(tmp_path / "model")
        model = QSM.load(tmp_path / "model", env=model.env)
        model.learn(20)
        th.manual_seed(0)
        np.random.seed(0)
        batch = model.replay_buffer.sample(16)
        noise = model._draw_noise(batch)
        expected = by_ddim(model.actor, batch.next_observations, noise.latent, [8, 0])
        metrics, next_actions = model._update_critic(batch, noise)
        losses.append(metrics["critic_loss"].item())
        targets.append((next_actions - expected).abs().max().item())
    assert losses[0] == losses[1] != losses[2]
    # The whole chain goes elsewhere
    assert targets[0] == targets[1] > 0.1 and targets[2] < 1e-5


def by_ddim(actor, observations, x, steps):
    """Reverse process without noise (arXiv 2010.02502, equation 12 with sigma = 0) over some of the steps."""
    bars = actor.schedule.alphas_cumprod.double().numpy()
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        with th.no_grad():
            eps = actor.score_network(actor.features(observations), x, th.full((len(x),), t))
        clean = ((x - (1 - bars[t]) ** 0.5 * eps) / bars[t] ** 0.5).clamp(-1, 1)
        direction = (x - bars[t] ** 0.5 * clean) / (1 - bars[t]) ** 0.5
        x = clean if s is None else (bars[s] ** 0.5 * clean + (1 - bars[s]) ** 0.5 * direction).float()
    return x
