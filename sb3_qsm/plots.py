"""
Pictures of what a policy does, by matplotlib (``pip install "sb3-qsm[plots]"``), which is imported when the first one is
drawn. None of them needs a display.

All actions are Stable-Baselines3's scaled ones in [-1, 1]. Every function returns a ``matplotlib.figure.Figure``:
``figure.savefig("name.png")`` writes it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization, unwrap_vec_normalize

from sb3_qsm.common.checks import check_integer
from sb3_qsm.common.policies import DiffusionActor
from sb3_qsm.diffusion import SAMPLERS
from sb3_qsm.envs.plane import PALETTE
from sb3_qsm.evaluation import ModeCounts, Observation, count_modes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float32]
_SAMPLE_STYLE: dict[str, Any] = {"s": 12, "color": "#D55E00", "edgecolors": "white", "linewidths": 0.4}


def _new_figure(n_panels: int = 1, size: tuple[float, float] = (4.6, 4.0)) -> tuple[Figure, list[Axes]]:
    try:
        # Without pyplot there is neither a window nor a global list of figures
        matplotlib_figure = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(f'plots need pip install "sb3-qsm[plots]": {error}') from error
    figure: Figure = matplotlib_figure.Figure(figsize=(size[0] * n_panels, size[1]), layout="compressed")
    axes = figure.subplots(1, n_panels, squeeze=False, sharex=True, sharey=True)[0]
    return figure, list(axes)


def _diffusion_actor(model: BaseAlgorithm) -> DiffusionActor:
    actor = getattr(model.policy, "actor", None)
    if not isinstance(actor, DiffusionActor):
        raise TypeError(f"this plot needs a diffusion policy, such as QSM's, got {type(model).__name__}")
    return actor


def _check_dims(dims: tuple[int, int], action_dim: int) -> tuple[int, int]:
    if action_dim == 1:
        return (0, 0)
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= dim < action_dim for dim in dims):
        raise ValueError(f"dims must be two different action dimensions from 0 to {action_dim - 1}, got {dims!r}")
    return dims


def _repeat(observation: PyTorchObs, n: int) -> PyTorchObs:
    if isinstance(observation, dict):
        return {key: value.expand(n, *value.shape[1:]) for key, value in observation.items()}
    return observation.expand(n, *observation.shape[1:])


def _grid(center: FloatArray, dims: tuple[int, int], resolution: int, limit: float = 1.0) -> tuple[FloatArray, FloatArray]:
    """Points of a line or a plane through ``center``: the coordinates along an axis, and the points, in rows."""
    line = np.linspace(-limit, limit, resolution, dtype=np.float32)
    if len(center) == 1:
        return line, line[:, None]
    points = np.tile(center, (resolution * resolution, 1))
    points[:, dims[0]], points[:, dims[1]] = (values.ravel() for values in np.meshgrid(line, line))
    return line, points


def _label(axes: Axes, dims: tuple[int, int], first: bool = True) -> None:
    axes.set_xlabel(f"action[{dims[0]}]")
    if first:
        axes.set_ylabel(f"action[{dims[1]}]")


def sample_actions(model: BaseAlgorithm, observation: Observation, n_samples: int) -> FloatArray:
    """
    Actions that a policy draws at one state.

    :param model: Model
    :param observation: One observation, as the model gets it
    :param n_samples: Number of actions
    :return: Scaled actions, shape ``(n_samples, action_dim)``
    """
    if isinstance(observation, dict):
        batch: Observation = {key: np.repeat(value[None], n_samples, axis=0) for key, value in observation.items()}
    else:
        batch = np.repeat(np.asarray(observation)[None], n_samples, axis=0)
    actions, _ = model.predict(batch, deterministic=False)
    scaled: FloatArray = model.policy.scale_action(actions).reshape(n_samples, -1)
    return scaled


def _critics(model: BaseAlgorithm) -> list[th.nn.Module]:
    """The critics by which a model acts."""
    modes, chosen = getattr(model, "mode_critics", None), getattr(model, "mode", None)
    if modes:
        return list(modes) if chosen is None else [modes[chosen]]
    critic = getattr(model, "critic", None)
    if critic is None:
        raise TypeError(f"this plot needs a model with critics, such as QSM or SAC, got {type(model).__name__}")
    return [critic]


def _q_values(output: th.Tensor | tuple[th.Tensor, ...]) -> th.Tensor:
    """Values of critics, shape ``(batch, n_critics)``; of TQC's, which return their quantiles in one tensor, the means."""
    return output.mean(dim=2) if isinstance(output, th.Tensor) else th.cat(output, dim=1)


def plot_action_landscape(
    model: BaseAlgorithm,
    observation: Observation,
    n_samples: int = 300,
    dims: tuple[int, int] = (0, 1),
    resolution: int = 61,
    critic: th.nn.Module | None = None,
) -> Figure:
    """
    Actions drawn at a state, over the minimum of the critics: for one action dimension as a curve and a histogram, for more as
    a map of two of them, where the others have their mean over the samples.

    :param model: Off-policy model with critics: QSM, SAC, TD3, ...
    :param observation: One observation, as the model gets it
    :param n_samples: Number of actions to draw
    :param dims: The two action dimensions
    :param resolution: Points of the map along each axis
    :param critic: Critics; by default the model's: of :class:`sb3_qsm.DDiffPG` those of the mode that is chosen, or at each
        action those of the mode that values it most
    :return: The figure
    :raises TypeError: if the model has no critics
    :raises ValueError: if ``dims`` are not two action dimensions, or another argument is out of its range
    :raises ImportError: if matplotlib is not installed
    """
    check_integer("n_samples", n_samples, 1)
    check_integer("resolution", resolution, 2)
    critics = [critic] if critic is not None else _critics(model)
    dims = _check_dims(dims, get_action_dim(model.action_space))
    samples = sample_actions(model, observation, n_samples)
    line, points = _grid(samples.mean(axis=0), dims, resolution)
    with th.no_grad():
        obs_tensor, _ = model.policy.obs_to_tensor(observation)
        batch = _repeat(obs_tensor, len(points)), th.as_tensor(points, device=model.device)
        values = [_q_values(found(*batch)).amin(dim=1) for found in critics]
    q_values = th.stack(values).amax(dim=0).cpu().numpy()

    figure, (axes,) = _new_figure()
    if samples.shape[1] == 1:
        axes.plot(line, q_values, color=PALETTE[0])
        ticks = (-1.0, -0.5, 0.0, 0.5, 1.0)
        axes.set(xlabel="action", ylabel="min Q", xlim=(-1, 1), xticks=ticks, title="Actions and the critic")
        histogram = axes.twinx()
        histogram.hist(samples[:, 0], bins=40, range=(-1, 1), color=_SAMPLE_STYLE["color"], alpha=0.5)
        histogram.set_ylabel("samples")
        return figure
    levels = axes.contourf(line, line, q_values.reshape(resolution, resolution), levels=30, cmap="viridis")
    figure.colorbar(levels, ax=axes, label="min Q")
    axes.scatter(samples[:, dims[0]], samples[:, dims[1]], **_SAMPLE_STYLE)
    axes.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal", title="Actions and the critic")
    _label(axes, dims)
    return figure


def plot_reverse_process(
    model: BaseAlgorithm, observation: Observation, n_samples: int = 300, dims: tuple[int, int] = (0, 1), n_panels: int = 5
) -> Figure:
    """
    The way from noise to actions, step by step: for one action dimension as histograms, for more as points.

    :param model: Model with a diffusion policy
    :param observation: One observation, as the model gets it
    :param n_samples: Number of chains
    :param dims: The two action dimensions
    :param n_panels: Number of steps to show, evenly spaced, the first and the last among them
    :return: The figure
    :raises TypeError: if the policy is no diffusion policy
    :raises ValueError: if ``dims`` are not two action dimensions
    :raises ImportError: if matplotlib is not installed
    """
    actor = _diffusion_actor(model)
    dims = _check_dims(dims, actor.action_dim)
    chain: list[th.Tensor] = []
    with th.no_grad():
        actor.set_training_mode(False)
        obs_tensor, _ = model.policy.obs_to_tensor(observation)
        features = actor.features(_repeat(obs_tensor, n_samples))
        predict_noise = actor.score_network.denoiser(features, actor.steps)

        def record(x: th.Tensor, t: int) -> th.Tensor:
            chain.append(x.clone())  # the samplers change it in place
            return predict_noise(x, t)

        latents = actor.draw_latents(n_samples)
        chain.append(SAMPLERS[actor.sampler](record, actor.schedule, *latents, actor.sampling_temperature))

    shown = np.unique(np.linspace(0, len(chain) - 1, max(n_panels, 2)).round().astype(int))
    figure, panels = _new_figure(len(shown), (2.4, 3.0))
    for axes, i in zip(panels, shown, strict=True):
        x = chain[i].cpu().numpy()
        t = len(chain) - 1 - i
        title = "actions" if t == 0 else f"{t} step{'' if t == 1 else 's'} before"
        if x.shape[1] == 1:
            axes.hist(x[:, 0], bins=40, range=(-3, 3), color=_SAMPLE_STYLE["color"])
            axes.set(title=title, xlabel="action")
            continue
        axes.scatter(x[:, dims[0]], x[:, dims[1]], **_SAMPLE_STYLE)
        _box_of_actions(axes)
        axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=title)
        _label(axes, dims, first=i == 0)
    return figure


def plot_score_field(
    model: BaseAlgorithm,
    observation: Observation,
    dims: tuple[int, int] = (0, 1),
    n_panels: int = 3,
    resolution: int = 17,
) -> Figure:
    r"""
    The score :math:`-\epsilon_\theta / \sigma_t`, the direction in which noised actions become more likely, at several noise
    levels. Arrows have one length; their colour is the magnitude. Action dimensions that are not shown are zero.

    :param model: Model with a diffusion policy
    :param observation: One observation, as the model gets it
    :param dims: The two action dimensions
    :param n_panels: Number of noise levels, evenly spaced over the diffusion steps
    :param resolution: Arrows along each axis
    :return: The figure
    :raises TypeError: if the policy is no diffusion policy
    :raises ValueError: if ``dims`` are not two action dimensions
    :raises ImportError: if matplotlib is not installed
    """
    actor = _diffusion_actor(model)
    dims = _check_dims(dims, actor.action_dim)
    schedule = actor.schedule
    shown = np.unique(np.linspace(schedule.diffusion_steps - 1, 0, max(n_panels, 1)).round().astype(int))[::-1]
    line, points = _grid(np.zeros(actor.action_dim, dtype=np.float32), dims, resolution, limit=1.6)
    figure, panels = _new_figure(len(shown), (3.2, 3.0))
    with th.no_grad():
        obs_tensor, _ = model.policy.obs_to_tensor(observation)
        features = actor.features(_repeat(obs_tensor, len(points)))
        noised = th.as_tensor(points, device=model.device)
        for axes, t in zip(panels, shown, strict=True):
            steps = th.full((len(points),), int(t), device=model.device)
            score = (-actor.predict_noise(features, noised, steps) / schedule.noise_rates[t]).cpu().numpy()
            title = rf"$t={t}$, $\sigma={schedule.noise_rates[t]:.2f}$"
            if actor.action_dim == 1:
                axes.plot(line, score[:, 0], color=PALETTE[0])
                axes.axhline(0.0, color="#A0A0A0", linewidth=0.8)
                axes.set(title=title, xlabel="action", ylabel="score" if t == shown[0] else None)
                continue
            u, v = score[:, dims[0]], score[:, dims[1]]
            magnitude = np.hypot(u, v)
            length = np.maximum(magnitude, 1e-12)
            arrows = axes.quiver(
                points[:, dims[0]],
                points[:, dims[1]],
                u / length,
                v / length,
                magnitude,
                cmap="viridis",
                scale=24,
                width=0.006,
            )
            figure.colorbar(arrows, ax=axes, shrink=0.8, label="magnitude" if t == shown[-1] else None)
            _box_of_actions(axes)
            axes.set(title=title, aspect="equal")
            _label(axes, dims, first=t == shown[0])
    return figure


def _box_of_actions(axes: Axes) -> None:
    """The square within which actions lie."""
    axes.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], color="#A0A0A0", linewidth=0.8)


def first_two(observation: Observation) -> FloatArray:
    """
    Where the agent is, by the conventions of this package and of gymnasium-robotics.

    :param observation: Observation
    :return: Its first two entries, or its ``"achieved_goal"``
    """
    array = observation["achieved_goal"] if isinstance(observation, dict) else observation
    return np.asarray(array)[:2]


def plot_trajectories(
    modes: ModeCounts,
    env: gym.Env[Any, Any] | VecEnv | None = None,
    position: Callable[[Observation], npt.ArrayLike] = first_two,
    axes: Axes | None = None,
) -> Figure:
    """
    Episodes in the plane, coloured by the mode that they reached; failed ones are grey.

    :param modes: What :func:`sb3_qsm.evaluation.count_modes` found
    :param env: Environment of :mod:`sb3_qsm.envs`, whose goals and obstacles are drawn; None to leave them out
    :param position: Function from an observation to the position, shape ``(2,)``
    :param axes: Where to draw, in a figure of the caller's; by default in a new one
    :return: The figure
    :raises ImportError: if matplotlib is not installed
    """
    if axes is None:
        _, (axes,) = _new_figure(size=(5.0, 3.6))
    plane = _unwrapped(env)
    patches = importlib.import_module("matplotlib.patches")
    if hasattr(plane, "goals") and hasattr(plane, "obstacles"):
        for left, bottom, right, top in plane.obstacles:
            axes.add_patch(patches.Rectangle((left, bottom), right - left, top - bottom, color="#707070", linewidth=0))
        for goal in plane.goals:
            axes.add_patch(patches.Circle(tuple(goal), plane.goal_radius, facecolor="#E4E4E4", edgecolor="#707070"))
        axes.set(xlim=plane.bounds[::2], ylim=plane.bounds[1::2])
    # A numbered mode keeps its colour from one picture to the next
    numbers = {mode: mode if isinstance(mode, int) else i for i, mode in enumerate(sorted(modes.counts, key=str))}
    colors = {mode: PALETTE[number % len(PALETTE)] for mode, number in numbers.items()}
    labelled = set()
    for episode in sorted(modes.episodes, key=lambda episode: episode.success):
        path = np.array([position(observation) for observation in episode.observations])
        color = colors[episode.mode] if episode.mode is not None else "#B8B8B8"
        name = f"mode {episode.mode} ({modes.counts[episode.mode]})" if episode.mode is not None else "failed"
        label = None if name in labelled else name
        labelled.add(name)
        axes.plot(
            path[:, 0], path[:, 1], color=color, linewidth=1.0, alpha=0.6, label=label, zorder=3 if episode.success else 2
        )
        axes.plot(*path[0], "o", color="black", markersize=3, zorder=4)
    axes.set(xlabel="x", ylabel="y", aspect="equal", title=f"{len(modes.episodes)} episodes, success {modes.success_rate:.2f}")
    legend = axes.legend(*_sorted_legend(axes), loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
    for handle in legend.get_lines():
        handle.set(linewidth=2.5, alpha=1.0)
    figure: Figure = axes.figure  # type: ignore[assignment]
    return figure


def _sorted_legend(axes: Axes) -> tuple[list[Any], list[str]]:
    pairs = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: (pair[1] == "failed", pair[1]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _unwrapped(env: gym.Env[Any, Any] | VecEnv | None) -> Any:
    if isinstance(env, VecEnv):
        try:
            return env.get_attr("unwrapped", 0)[0]
        except AttributeError:
            return None
    return None if env is None else env.unwrapped


def plot_policy(model: BaseAlgorithm, observation: Observation, dims: tuple[int, int] = (0, 1)) -> dict[str, Figure]:
    """
    The pictures of a policy at one state that the model allows.

    :param model: Model
    :param observation: One observation, as the model gets it
    :param dims: The two action dimensions
    :return: Figures by name: ``"actions"`` for a model with critics, ``"reverse_process"`` and ``"score_field"`` for a
        diffusion policy
    :raises ValueError: if ``dims`` are not two action dimensions
    :raises ImportError: if matplotlib is not installed
    """
    figures = {}
    if getattr(model, "critic", None) is not None:
        figures["actions"] = plot_action_landscape(model, observation, dims=dims)
    if isinstance(getattr(model.policy, "actor", None), DiffusionActor):
        figures["reverse_process"] = plot_reverse_process(model, observation, dims=dims)
        figures["score_field"] = plot_score_field(model, observation, dims=dims)
    return figures


class PlotPolicyCallback(BaseCallback):
    """
    Write pictures of the policy to TensorBoard while it trains, without changing the training: the actions over the critic,
    the reverse process and the score field at the first state of an episode, and trajectories coloured by mode.

    :param env: Environment of its own, not that of the training; wrapped like it
    :param plot_freq: Environment steps between two sets of pictures
    :param n_episodes: Episodes for the trajectories; 0 for none, and none are drawn, with a warning, where ``count_modes``
        finds no modes
    :param mode_key: As in :func:`sb3_qsm.evaluation.count_modes`
    :param position: As in :func:`plot_trajectories`
    :param seed: Seed of the episodes
    :param verbose: Verbosity level
    :raises ValueError: if ``plot_freq`` is not positive or ``n_episodes`` is negative
    """

    def __init__(
        self,
        env: gym.Env[Any, Any] | VecEnv,
        plot_freq: int,
        n_episodes: int = 20,
        mode_key: str | Callable[[dict[str, Any]], Any] | None = None,
        position: Callable[[Observation], npt.ArrayLike] = first_two,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for name, value, lowest in (("plot_freq", plot_freq, 1), ("n_episodes", n_episodes, 0)):
            check_integer(name, value, lowest)
        self.env = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
        self.plot_freq = plot_freq
        self.n_episodes = n_episodes
        self.mode_key = mode_key
        self.position = position
        self.seed = seed
        self._last_plot = 0
        self._with_trajectories = n_episodes > 0
        self._normalize = unwrap_vec_normalize(self.env)

    def _on_training_start(self) -> None:
        self._last_plot = self.num_timesteps // self.plot_freq
        if self._normalize is not None:
            self._normalize.training = False
        self.env.seed(self.seed)
        observations = self.env.reset()
        self._observations = observations if self._normalize is None else self._normalize.get_original_obs()

    def _on_step(self) -> bool:
        if self.num_timesteps // self.plot_freq > self._last_plot:
            self._last_plot = self.num_timesteps // self.plot_freq
            self._plot()
        return True

    def _plot(self) -> None:
        observations: Any = self._observations
        if self._normalize is not None:
            sync_envs_normalization(self.training_env, self.env)
            observations = self._normalize.normalize_obs(observations)
        first = {k: v[0] for k, v in observations.items()} if isinstance(observations, dict) else np.asarray(observations)[0]
        with th.random.fork_rng():
            th.manual_seed(self.seed)
            figures = plot_policy(self.model, first)
        if self._with_trajectories:
            try:
                modes = count_modes(self.model, self.env, self.n_episodes, mode_key=self.mode_key, seed=self.seed)
                figures["trajectories"] = plot_trajectories(modes, self.env, self.position)
            except ValueError as error:
                # Most tasks have no modes, and the training must not end for a picture
                warnings.warn(f"No trajectories are drawn: {error}", stacklevel=2)
                self._with_trajectories = False
        for name, figure in figures.items():
            # Of SB3's formats only TensorBoard can hold pictures
            self.logger.record(f"policy/{name}", LoggedFigure(figure, close=True), exclude=("stdout", "log", "json", "csv"))
        self.logger.dump(self.num_timesteps)


__all__: Sequence[str] = [
    "PlotPolicyCallback",
    "plot_action_landscape",
    "plot_policy",
    "plot_reverse_process",
    "plot_score_field",
    "plot_trajectories",
    "sample_actions",
]
