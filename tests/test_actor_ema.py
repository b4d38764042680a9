"""The moving average of the actor, which acts deterministically."""

import copy
import csv
from functools import partial

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_qsm import QSM, DDiffPG
from sb3_qsm.export import PolicyGraph
from tests.test_predict import ACTIONS, OBSERVATIONS, observations
from tests.test_run import DummyEnv


def make_model(**kwargs) -> QSM:
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 5, "batch_size": 8, "buffer_size": 100, **kwargs}
    return QSM("MlpPolicy", DummyEnv(OBSERVATIONS, ACTIONS), learning_rate=0.01, diffusion_steps=3, seed=0, **kwargs)


def _critics(policy) -> dict:
    return {name: value for name, value in policy.state_dict().items() if name.startswith("critic")}


def weights(actor) -> np.ndarray:
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in actor.parameters()])


@pytest.mark.parametrize("policy_delay", [1, 2])
def test_average_of_the_weights(policy_delay):
    model = make_model(policy_delay=policy_delay, tau=0.4)
    average = weights(model.actor).astype(np.float64)
    np.testing.assert_array_equal(average, weights(model.policy.actor_ema))
    model.learn(5)
    n = 0
    for step in range(1, 30):
        if step == 20:
            model.tau = 0.8
        model.train(1, 8)
        if step % policy_delay == 0:
            n += 1
            weight = max(model.tau, 9 / (9 + n))
            average = (1 - weight) * average + weight * weights(model.actor)
        np.testing.assert_allclose(weights(model.policy.actor_ema), average, atol=1e-5)
    assert np.abs(average - weights(model.actor)).max() > 1e-4


def test_training_is_the_same_without_it():
    models = [make_model(actor_ema=actor_ema).learn(40) for actor_ema in (True, False)]
    assert models[1].policy.actor_ema is None
    np.testing.assert_array_equal(*(weights(model.actor) for model in models))
    np.testing.assert_array_equal(*(weights(model.critic) for model in models))


@pytest.mark.parametrize("form", ["", "_safe"])
def test_switching_it_when_a_model_is_loaded(tmp_path, form):
    if form:
        pytest.importorskip("safetensors")
    load = getattr(QSM, f"load{form}")
    model = make_model().learn(40)
    getattr(model, f"save{form}")(tmp_path / "with")
    without = load(tmp_path / "with", actor_ema=False)
    assert without.policy.actor_ema is None
    np.testing.assert_array_equal(weights(without.actor), weights(model.actor))
    getattr(without, f"save{form}")(tmp_path / "without")
    again = load(tmp_path / "without", actor_ema=True)
    np.testing.assert_array_equal(weights(again.policy.actor_ema), weights(model.actor))


def test_without_it_by_hand(tmp_path):
    model = make_model().learn(40)
    complete = copy.deepcopy(model.policy)
    model.policy.actor_ema = None
    model.save(tmp_path / "by_hand")
    assert QSM.load(tmp_path / "by_hand").policy.actor_ema is None
    model.policy.save(tmp_path / "policy")
    assert type(model.policy).load(tmp_path / "policy").actor_ema is None
    model.policy.actor_ema = copy.deepcopy(complete.actor_ema)
    model.policy.load_state_dict({**complete.actor.state_dict(prefix="actor."), **_critics(complete)}, assign=True)
    np.testing.assert_array_equal(weights(model.policy.actor_ema), weights(complete.actor))
    parameters, averages = (tuple(actor.parameters()) for actor in (model.actor, model.policy.actor_ema))
    assert not {parameter.data_ptr() for parameter in parameters} & {average.data_ptr() for average in averages}
    # The rest of a state must be whole
    state = complete.state_dict()
    del state["actor_ema.score_network.trunk.1.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*actor_ema.score_network.trunk.1.bias"):
        complete.load_state_dict(state)


@pytest.mark.parametrize("kwargs", [{}, {"best_of_n": 3}, {"sampling_steps": 2}], ids=str)
def test_it_acts_deterministically_and_the_actor_does_not(kwargs, tmp_path):
    model = make_model(**kwargs).learn(40)
    obs = observations(6)
    other = make_model(**kwargs, actor_ema=False)
    other.critic.load_state_dict(model.critic.state_dict())
    for deterministic, actor in ((True, model.policy.actor_ema), (False, model.actor)):
        other.actor.load_state_dict(actor.state_dict())
        actions = []
        for each in (model, other):
            th.manual_seed(0)
            actions.append(each.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)
    expected = model.predict(obs, deterministic=True)[0]
    assert np.abs(expected - other.predict(obs, deterministic=True)[0]).max() > 1e-5
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    model.save_safe(tmp_path / "safe")
    for loaded in (
        QSM.load(tmp_path / "model"),
        QSM.load_safe(tmp_path / "safe"),
        type(model.policy).load(tmp_path / "policy"),
    ):
        np.testing.assert_array_equal(expected, loaded.predict(obs, deterministic=True)[0])


def test_settings_of_the_actor_are_those_of_its_average():
    model = make_model().learn(20)
    obs = observations(6)
    before = model.predict(obs, deterministic=True)[0]
    model.actor.sampling_steps = 1
    assert not np.array_equal(before, model.predict(obs, deterministic=True)[0])
    model.actor.sampling_steps = None
    model.actor.precision = "bf16"
    assert model.policy.acting(deterministic=True).precision == "bf16"
    model.actor.precision = "float32"
    np.testing.assert_array_equal(before, model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("best_of_n", [1, 3])
def test_what_is_exported_acts_by_it(best_of_n):
    model = make_model(best_of_n=best_of_n).learn(40)
    obs = observations(6)
    graph = PolicyGraph(model.policy)
    with th.no_grad():
        np.testing.assert_allclose(graph(th.as_tensor(obs)), model.predict(obs, deterministic=True)[0], atol=1e-6)
        average, model.policy.actor_ema = model.policy.actor_ema, None
        other, _ = model.predict(obs, deterministic=True)
        model.policy.actor_ema = average
    assert np.abs(other - model.predict(obs, deterministic=True)[0]).max() > 1e-5


def test_only_qsm_has_one():
    assert QSM.paper_hyperparameters()["actor_ema"] is False
    with pytest.raises(ValueError, match="Pass actor_ema to QSM itself"):
        make_model(policy_kwargs={"actor_ema": True})
    env = DummyEnv(OBSERVATIONS, ACTIONS)
    with pytest.raises(ValueError, match="actor_ema must be False, got True"):
        DDiffPG("MlpPolicy", env, policy_kwargs={"actor_ema": True})
    assert DDiffPG("MlpPolicy", env).policy.actor_ema is None


def test_the_benchmark_of_averages_agrees_with_the_model(tmp_path, capsys):
    pytest.importorskip("filelock")
    actor_average = pytest.importorskip("actor_average")
    command = ["--env", "Pendulum-v1", "--timesteps", "200", "--eval-freq", "200", "--taus", "0.005", "--out", str(tmp_path)]
    actor_average.main(command)
    (row,) = csv.DictReader((tmp_path / "Pendulum-v1-seed0.csv").open())
    # It evaluates before the update of its last step
    model = QSM("MlpPolicy", actor_average.make_env("Pendulum-v1"), seed=0, device="cpu").learn(199)
    env = make_vec_env(partial(actor_average.make_env, "Pendulum-v1"), 10, seed=10_000)
    for column, average in (("0.005", model.policy.actor_ema), ("actor", model.actor)):
        model.policy.actor_ema = average
        env.seed(10_000)
        mean, std = evaluate_policy(model, env, 10)
        assert (row[f"{column}_mean"], row[f"{column}_std"]) == (f"{mean:.1f}", f"{std:.1f}")
    assert row["actor_mean"] != row["0.005_mean"]
    with pytest.raises(SystemExit):
        actor_average.main(command)
    assert "Pendulum-v1-seed0.csv exists" in capsys.readouterr().err
