"""Pictures of policies."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_qsm.envs  # noqa: F401 registers the environments
from sb3_qsm import QSM, plots
from sb3_qsm.evaluation import ModeCounts, count_modes
from tests.test_run import BOX, DummyEnv

pytest.importorskip("matplotlib")

POINT = "sb3_qsm/NGoalPoint-v0"
START = np.zeros(2, dtype=np.float32)


def make_model(env=POINT, algorithm=QSM, policy="MlpPolicy", **kwargs):
    policy_kwargs = {"net_arch": [16], **({"critic_layer_norm": False} if algorithm is QSM else {})}
    options = {"buffer_size": 200, "learning_starts": 10, "batch_size": 8} if algorithm is not PPO else {}
    if algorithm is QSM:
        options["diffusion_steps"] = 4
    return algorithm(policy, env, policy_kwargs=policy_kwargs, seed=0, device="cpu", **{**options, **kwargs})


def pixels(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def offsets(axes) -> np.ndarray:
    """Points of a scatter plot."""
    (points,) = (c for c in axes.collections if len(c.get_offsets()) > 1 and type(c).__name__ == "PathCollection")
    return np.asarray(points.get_offsets())


@pytest.mark.parametrize("algorithm", [QSM, SAC, TD3])
def test_landscape_shows_the_critic_and_samples_of_the_policy(algorithm):
    model = make_model(algorithm=algorithm)
    with th.no_grad():
        # The critics' minimum is the first action
        for network in model.critic.q_networks:
            for parameter in network.parameters():
                parameter.zero_()
            network[0].weight[0, 2] = 1.0
            network[0].bias[0] = 5.0
            network[-1].weight[0, 0] = 1.0
    figure = plots.plot_action_landscape(model, START, n_samples=50, resolution=11)
    axes, colorbar = figure.axes
    points = offsets(axes)
    assert points.shape == (50, 2)
    assert np.abs(points).max() <= 1.0
    low, high = colorbar.get_ylim()
    assert high - low == pytest.approx(2.0, rel=0.25)
    # TD3 without noise has one action
    assert (points.std(axis=0) > 0.05).all() == (algorithm is not TD3)
    left, right = (pixels(figure)[:, columns].astype(float).mean(axis=(0, 1)) for columns in (slice(80, 120), slice(230, 270)))
    assert np.abs(left - right).max() > 10


def test_landscape_is_that_of_the_given_state_and_critic():
    model = make_model()
    first = pixels(plots.plot_action_landscape(model, START, resolution=9))
    assert (first != pixels(plots.plot_action_landscape(model, START + 1.0, resolution=9))).any()
    with th.no_grad():
        model.critic_target.q_networks[0][-1].weight.mul_(-3.0)
    th.manual_seed(0)
    online = pixels(plots.plot_action_landscape(model, START, resolution=9))
    th.manual_seed(0)
    assert (online != pixels(plots.plot_action_landscape(model, START, resolution=9, critic=model.critic_target))).any()


def test_one_and_three_action_dimensions():
    one, three = (make_model(DummyEnv(BOX, spaces.Box(-2.0, 2.0, (n,)))) for n in (1, 3))
    observation = np.zeros(3, dtype=np.float32)
    for name, figure in plots.plot_policy(one, observation).items():
        assert figure.axes[0].get_xlabel() == "action", name
        assert np.ptp(pixels(figure)) > 100
    for name, figure in plots.plot_policy(three, observation, dims=(2, 0)).items():
        assert figure.axes[0].get_xlabel() == "action[2]", name
        assert figure.axes[0].get_ylabel() == "action[0]", name
    with pytest.raises(ValueError, match=r"dims must be two different action dimensions from 0 to 2, got \(1, 3\)"):
        plots.plot_policy(three, observation, dims=(1, 3))
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        plots.plot_reverse_process(three, observation, dims=(1, 1))


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_x0", "ddim"])
def test_reverse_process_goes_from_noise_to_actions(sampler):
    model = make_model(sampler=sampler, diffusion_steps=6)
    figure = plots.plot_reverse_process(model, START, n_samples=400, n_panels=4)
    clouds = [offsets(axes) for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["6 steps before", "4 steps before", "2 steps before", "actions"]
    # A standard normal distribution, and then actions as the policy draws them
    assert clouds[0].std() == pytest.approx(1.0, abs=0.1)
    assert np.abs(clouds[-1]).max() <= 1.0
    drawn = plots.sample_actions(model, START, 400)
    np.testing.assert_allclose(clouds[-1].mean(axis=0), drawn.mean(axis=0), atol=0.2)
    np.testing.assert_allclose(clouds[-1].std(axis=0), drawn.std(axis=0), atol=0.15)
    single = plots.plot_reverse_process(make_model(diffusion_steps=1), START, n_panels=5)
    assert [axes.get_title() for axes in single.axes] == ["1 step before", "actions"]


def test_score_field_is_minus_the_predicted_noise_over_sigma():
    model = make_model()
    with th.no_grad():
        # The predicted noise is (0, -2) everywhere
        network = model.actor.score_network
        for parameter in network.parameters():
            parameter.zero_()
        network.trunk[-1].bias.copy_(th.tensor([0.0, -2.0]))
    figure = plots.plot_score_field(model, START, n_panels=2, resolution=5)
    panels = [axes for axes in figure.axes if axes.get_title()]
    for axes, t in zip(panels, (3, 0), strict=True):
        (arrows,) = (c for c in axes.collections if type(c).__name__ == "Quiver")
        np.testing.assert_allclose(arrows.U, 0.0, atol=1e-6)
        np.testing.assert_allclose(arrows.V, 1.0)
        np.testing.assert_allclose(arrows.get_array(), 2.0 / model.actor.schedule.noise_rates[t], rtol=1e-5)
        assert f"t={t}" in axes.get_title()


def modes_of(env: gym.Env, angles: list[float]) -> ModeCounts:
    class Rays:
        episodes = -1

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            self.episodes += int(episode_start[0])
            angle = angles[self.episodes % len(angles)]
            return np.array([[np.cos(angle), np.sin(angle)]], dtype=np.float32), state

    return count_modes(Rays(), env, len(angles))


def test_trajectories_are_coloured_by_mode():
    env = gym.make(POINT)
    found = modes_of(env, [0.0, np.pi / 2, np.pi, 1.0, 0.0])
    assert found.counts == {0: 2, 1: 1, 2: 1}
    figure = plots.plot_trajectories(found, env)
    (axes,) = figure.axes
    lines = [line for line in axes.get_lines() if line.get_marker() == "None"]
    colors = [line.get_color() for line in lines]
    assert sorted(colors) == sorted([plots.PALETTE[0]] * 2 + [plots.PALETTE[1], plots.PALETTE[2], "#B8B8B8"])
    (green,) = (line for line in lines if line.get_color() == plots.PALETTE[2])
    np.testing.assert_allclose(green.get_xydata()[-1], [-1.0, 0.0], atol=1e-5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mode 0 (2)", "mode 1 (1)", "mode 2 (1)", "failed"]
    assert len(axes.patches) == 4
    assert not plots.plot_trajectories(found).axes[0].patches
    flipped = plots.plot_trajectories(found, env, position=lambda observation: -observation)
    (green,) = (line for line in flipped.axes[0].get_lines() if line.get_color() == plots.PALETTE[2])
    np.testing.assert_allclose(green.get_xydata()[-1], [1.0, 0.0], atol=1e-5)


def test_position_of_a_dictionary():
    assert plots.first_two({"achieved_goal": np.array([3.0, 4.0, 5.0])}).tolist() == [3.0, 4.0]


def test_which_plots_a_model_allows(monkeypatch):
    assert set(plots.plot_policy(make_model(), START)) == {"actions", "reverse_process", "score_field"}
    assert set(plots.plot_policy(make_model(algorithm=SAC), START)) == {"actions"}
    ppo = make_model(algorithm=PPO)
    assert plots.plot_policy(ppo, START) == {}
    with pytest.raises(TypeError, match="needs a model with critics, such as QSM or SAC, got PPO"):
        plots.plot_action_landscape(ppo, START)
    with pytest.raises(TypeError, match="needs a diffusion policy, such as QSM's, got PPO"):
        plots.plot_reverse_process(ppo, START)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plots need pip install "sb3-qsm\[plots\]"'):
        plots.plot_score_field(make_model(), START)


def test_dictionary_observations():
    env = DummyEnv(spaces.Dict({"a": BOX, "b": spaces.Box(0.0, 1.0, (2,))}), spaces.Box(-1.0, 1.0, (2,)))
    observation, _ = env.reset()
    figures = plots.plot_policy(make_model(env, policy="MultiInputPolicy"), observation)
    assert all(np.ptp(pixels(figure)) > 100 for figure in figures.values())


def test_plotting_leaves_the_model_alone():
    model = make_model().learn(20)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    plots.plot_policy(model, START)
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())
    model.learn(5, reset_num_timesteps=False)


def test_callback_writes_pictures_and_does_not_change_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(callback):
        model = make_model()
        model.set_logger(configure(str(tmp_path), ["tensorboard", "csv"]))
        model.learn(50, callback=callback)
        return model.policy.state_dict()

    with_pictures = train(plots.PlotPolicyCallback(gym.make(POINT), plot_freq=20, n_episodes=2))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"policy/actions", "policy/reverse_process", "policy/score_field", "policy/trajectories"}
    assert set(events.Tags()["images"]) == names
    assert all([event.step for event in events.Images(name)] == [20, 40] for name in names)
    assert "policy" not in (tmp_path / "progress.csv").read_text()
    without = train(None)
    assert all(th.equal(value, without[name]) for name, value in with_pictures.items())


def test_a_task_without_modes_is_trained_to_its_end(tmp_path):
    model = make_model("Pendulum-v1")
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    with pytest.warns(UserWarning, match="No trajectories are drawn: the info .* must have 'success'") as warned:
        model.learn(50, callback=plots.PlotPolicyCallback(env, plot_freq=20, n_episodes=1))
    assert model.num_timesteps == 50
    assert len([each for each in warned if "No trajectories" in str(each.message)]) == 1


def test_critics_of_tqc():
    """They return quantiles."""
    tqc = pytest.importorskip("sb3_contrib").TQC("MlpPolicy", POINT, policy_kwargs={"net_arch": [16]}, buffer_size=10)
    with th.no_grad():
        quantiles = tqc.critic(th.zeros(3, 2), th.zeros(3, 2))
    assert quantiles.shape[:2] == (3, 2)
    found = plots._q_values(quantiles)
    np.testing.assert_allclose(found, np.stack([np.mean(quantiles[:, i].numpy(), axis=1) for i in (0, 1)], axis=1), rtol=1e-5)
    assert set(plots.plot_policy(tqc, START)) == {"actions"}


def test_callback_with_normalised_dictionaries_and_without_trajectories(tmp_path):
    def make_env():
        space = spaces.Dict({"a": BOX, "b": spaces.Box(0.0, 1.0, (2,))})
        return VecNormalize(DummyVecEnv([lambda: Monitor(DummyEnv(space, BOX))]))

    model = make_model(make_env(), policy="MultiInputPolicy")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = plots.PlotPolicyCallback(make_env(), plot_freq=10, n_episodes=0)
    model.learn(20, callback=callback)
    assert set(callback._observations) == {"a", "b"}


def test_callback_plots_with_the_statistics_of_the_training(tmp_path, monkeypatch):
    def make_env():
        return VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(POINT, start_noise=0.3))]))

    model = make_model(make_env())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    seen = []
    monkeypatch.setattr(plots, "plot_policy", lambda model, observation: seen.append(observation) or {})
    own = make_env()
    model.learn(40, callback=plots.PlotPolicyCallback(own, plot_freq=20, n_episodes=2))
    training = model.get_vec_normalize_env()
    np.testing.assert_array_equal(own.obs_rms.mean, training.obs_rms.mean)
    assert not own.training
    first = own.get_original_obs()
    assert len(seen) == 2
    # The same state, seen with other statistics
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    assert first.shape == (1, 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_samples": 0}, "n_samples must be an integer >= 1, got 0"),
        ({"resolution": 1}, "resolution must be an integer >= 2, got 1"),
    ],
)
def test_bad_arguments_of_the_landscape(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_action_landscape(make_model(), START, **kwargs)


def test_landscape_of_a_mode(monkeypatch):
    pytest.importorskip("dtaidistance")
    from tests.ddiffpg.models import make_trained

    model = make_trained()
    called = []
    for name, critic in (("exploration", model.critic), *enumerate(model.mode_critics)):
        forward = critic.forward
        monkeypatch.setattr(critic, "forward", lambda *args, name=name, call=forward: called.append(name) or call(*args))
    for mode, expected in ((None, [0, 1]), (0, [0]), (1, [1])):
        model.set_mode(mode)
        called.clear()
        plots.plot_action_landscape(model, START, n_samples=5, resolution=5)
        assert called == expected
    assert set(plots.plot_policy(model, START)) == {"actions", "reverse_process", "score_field"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"plot_freq": 0}, "plot_freq must be an integer >= 1, got 0"),
        ({"plot_freq": 10.0}, "plot_freq must be an integer >= 1, got 10.0"),
        ({"plot_freq": 10, "n_episodes": -1}, "n_episodes must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_of_the_callback(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plots.PlotPolicyCallback(gym.make(POINT), **kwargs)
