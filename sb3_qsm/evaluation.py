"""Which of several ways to succeed a policy takes."""

import contextlib
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

#: Names of the flag in ``info`` that says whether an episode succeeded
SUCCESS_KEYS = ("success", "is_success")
#: Names of the entry in ``info`` that says which of several ways was taken
MODE_KEYS = ("route", "goal")

Observation = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Episode:
    """
    One episode.

    :param observations: Observations from the first to the last one, also at a time limit; not normalised
    :param mode: Mode that was reached, None if the episode failed
    :param success: Whether the episode succeeded
    :param total_reward: Sum of the rewards
    """

    observations: list[Observation]
    mode: Hashable | None
    success: bool
    total_reward: float


@dataclass(frozen=True)
class ModeCounts:
    """
    What :func:`count_modes` found.

    :param episodes: The episodes
    """

    episodes: list[Episode] = field(repr=False)

    @property
    def counts(self) -> dict[Hashable, int]:
        """Successful episodes by mode, most frequent first."""
        modes = [episode.mode for episode in self.episodes if episode.success]
        return dict(sorted(((mode, modes.count(mode)) for mode in dict.fromkeys(modes)), key=lambda item: -item[1]))

    @property
    def success_rate(self) -> float:
        """Share of the episodes that succeeded."""
        return sum(episode.success for episode in self.episodes) / len(self.episodes)

    @property
    def mean_returns(self) -> dict[Hashable, float]:
        """Mean return of the successful episodes by mode."""
        return {
            mode: float(np.mean([episode.total_reward for episode in self.episodes if episode.mode == mode]))
            for mode in self.counts
        }

    @property
    def mean_return(self) -> float:
        """Mean return of all episodes."""
        return float(np.mean([episode.total_reward for episode in self.episodes]))

    @property
    def entropy(self) -> float:
        """Entropy of the distribution over modes of the successful episodes, in nats; at most ln(number of modes)."""
        total = sum(self.counts.values())
        return sum(count / total * math.log(total / count) for count in self.counts.values())

    def relative_entropy(self, n_modes: int) -> float:
        """
        Entropy as a share of the largest one.

        :param n_modes: Number of modes that there are
        :return: 1 if all are equally frequent, 0 if there is only one
        :raises ValueError: if there are fewer modes than were found
        """
        if n_modes < max(1, len(self.counts)):
            raise ValueError(f"n_modes must be at least the {len(self.counts)} modes that were found, got {n_modes}")
        return self.entropy / math.log(n_modes) if n_modes > 1 else 1.0

    def __str__(self) -> str:
        returns = self.mean_returns
        lines = [f"  mode {mode}: {count} episodes, return {returns[mode]:.3g}" for mode, count in self.counts.items()]
        heading = f"{len(self.episodes)} episodes, success rate {self.success_rate:.2f}, entropy {self.entropy:.2f} nats"
        return "\n".join([heading, *lines])


def count_modes(
    model: PolicyPredictor,
    env: gym.Env[Any, Any] | VecEnv,
    n_episodes: int = 100,
    deterministic: bool = False,
    mode_key: str | Callable[[dict[str, Any]], Hashable] | None = None,
    seed: int | None = None,
) -> ModeCounts:
    """
    Let a policy act and count which of several ways to succeed it takes. It works for every model of Stable-Baselines3.

    :param model: Model or policy
    :param env: Environment, also vectorised; its info has ``"success"`` or ``"is_success"`` at the end of every episode
    :param n_episodes: Number of episodes
    :param deterministic: Whether to act deterministically
    :param mode_key: Entry of the last info that tells the mode, or a function of that info; by default ``"route"``, and
        ``"goal"`` where there is none
    :param seed: Seed of the environment and of sampled actions; the global generator of torch keeps its state
    :return: The episodes, and what they add up to
    :raises ValueError: if ``n_episodes`` is not positive, or the info lacks the success or the mode
    """
    if isinstance(n_episodes, bool) or not isinstance(n_episodes, int) or n_episodes < 1:
        raise ValueError(f"n_episodes must be an integer >= 1, got {n_episodes!r}")
    vec_env = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    recorder = _Recorder(vec_env, mode_key)
    with contextlib.ExitStack() as stack:
        if recorder.normalize is not None:
            # Looking must not change the statistics
            stack.callback(setattr, recorder.normalize, "training", recorder.normalize.training)
            recorder.normalize.training = False
        if seed is not None:
            vec_env.seed(seed)
            stack.enter_context(th.random.fork_rng())
            th.manual_seed(seed)
        evaluate_policy(model, vec_env, n_episodes, deterministic, callback=recorder, warn=False)
    return ModeCounts(recorder.episodes)


class _Recorder:
    """Callback of SB3's ``evaluate_policy``: called at every step of every environment that still plays."""

    def __init__(self, env: VecEnv, mode_key: str | Callable[[dict[str, Any]], Hashable] | None) -> None:
        self.normalize = unwrap_vec_normalize(env)
        self.mode_key = mode_key
        self.episodes: list[Episode] = []
        self.observations: dict[int, list[Observation]] = {}
        self.returns: dict[int, float] = {}

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> None:
        i, info = local["i"], local["info"]
        observations = self.observations.setdefault(i, [])
        observations.append(self._observation(local["observations"], i))
        reward = local["reward"] if self.normalize is None else self.normalize.get_original_reward()[i]
        self.returns[i] = self.returns.get(i, 0.0) + float(reward)
        if not local["done"]:
            return
        terminal = info.get("terminal_observation")
        if terminal is not None:
            observations.append(self._observation(terminal))
        success = success_of(info)
        self.episodes.append(Episode(observations, self._mode(info) if success else None, success, self.returns[i]))
        self.observations[i], self.returns[i] = [], 0.0

    def _observation(self, observation: Observation, index: int | None = None) -> Observation:
        if self.normalize is not None:
            observation = self.normalize.unnormalize_obs(observation)
        if index is None:
            return observation
        return {k: v[index] for k, v in observation.items()} if isinstance(observation, dict) else observation[index]

    def _mode(self, info: dict[str, Any]) -> Hashable:
        if callable(self.mode_key):
            return self.mode_key(info)
        keys = MODE_KEYS if self.mode_key is None else (self.mode_key,)
        for key in keys:
            if key in info:
                found = info[key]
                single = isinstance(found, np.generic) or (isinstance(found, np.ndarray) and found.size == 1)
                mode: Hashable = found.item() if single else found
                try:
                    hash(mode)
                except TypeError as error:
                    raise ValueError(
                        f"count_modes needs a name or a number as mode, got {mode!r} in {key!r}: pass as mode_key a function "
                        "of the info that returns one"
                    ) from error
                return mode
        raise ValueError(
            f"count_modes needs {' or '.join(map(repr, keys))} in the info at the end of an episode, to tell which way was "
            f"taken; there: {', '.join(map(repr, info))}. Pass mode_key, a name or a function of the info."
        )


def success_of(info: dict[str, Any]) -> bool:
    """
    Whether an episode succeeded.

    :param info: The last info of an episode
    :return: The flag in it
    :raises ValueError: if it has none
    """
    for key in SUCCESS_KEYS:
        if info.get(key) is not None:
            success = info[key]
            if success != success:
                raise ValueError(f"{key} in the info at the end of an episode must be True or False, got {success!r}")
            return bool(success)
    raise ValueError(
        f"the info at the end of an episode must have {' or '.join(map(repr, SUCCESS_KEYS))}, True if the episode succeeded; "
        f"there: {', '.join(map(repr, info)) or 'nothing'}. A wrapper can add it."
    )
