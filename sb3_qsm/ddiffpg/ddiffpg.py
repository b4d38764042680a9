"""DDiffPG on Stable-Baselines3."""

import dataclasses
import io
import pathlib
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import (
    DictReplayBufferSamples,
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
    TensorDict,
)
from stable_baselines3.common.utils import update_learning_rate
from torch import nn

from sb3_qsm.common.checks import check_integer, whole
from sb3_qsm.common.gradient_step import PolyakUpdate
from sb3_qsm.common.losses import CriticLoss, Metrics, Transitions, UpdateNoise, critic_loss, noise_prediction_loss
from sb3_qsm.common.off_policy import DiffusionOffPolicyAlgorithm
from sb3_qsm.common.safe import CLASSES
from sb3_qsm.common.signals import uninterrupted
from sb3_qsm.ddiffpg.buffers import (
    UNASSIGNED,
    DictTrajectoryReplayBuffer,
    ModeBatch,
    PositionFunction,
    TrajectoryReplayBuffer,
    position_function,
    rows_of,
)
from sb3_qsm.ddiffpg.distance import dtw_distance, half_way
from sb3_qsm.ddiffpg.losses import ascend_actions, categorical_loss, categorical_projection
from sb3_qsm.ddiffpg.modes import Mode, TrajectoryDistances, cluster, inherit, medoid, modes_passing, squareform
from sb3_qsm.ddiffpg.novelty import RandomNetworkDistillation, noveld_reward
from sb3_qsm.ddiffpg.policies import (
    CategoricalCritic,
    CnnPolicy,
    MlpPolicy,
    ModeActor,
    ModePolicy,
    MultiInputPolicy,
    StackedCritics,
)
from sb3_qsm.evaluation import success_of

SelfDDiffPG = TypeVar("SelfDDiffPG", bound="DDiffPG")

CLASSES.update({kind.__name__: kind for kind in (TrajectoryReplayBuffer, DictTrajectoryReplayBuffer)})

#: Number of positions from which the scales of the novelty are taken
MIN_POSITIONS = 100


class DDiffPG(DiffusionOffPolicyAlgorithm):
    r"""
    Deep Diffusion Policy Gradient (DDiffPG): finds several ways to succeed, keeps them all, and lets the user choose.

    Paper: https://arxiv.org/abs/2406.00681

    Successful trajectories are clustered into modes. Each mode has critics of its own, and so has the exploration, which is
    paid for novelty alone. Batches have all modes in equal parts. The actor learns, by the ordinary loss of a diffusion model,
    actions that were moved uphill on the critics of their mode. It is told the mode by an embedding, which is left out half of
    the time in states that the mode passes by, so that it can also act without.

    The environment's info must have ``"success"`` or ``"is_success"`` at the end of every episode.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critics, and of the actor unless ``actor_learning_rate`` is given; it can be a
        function of the current progress remaining (from 1 to 0)
    :param buffer_size: Largest number of transitions in the replay buffer
    :param learning_starts: How many steps of uniformly random actions to collect before learning starts
    :param batch_size: Minibatch size for each gradient update, over all modes together
    :param tau: Soft update coefficient ("Polyak update", between 0 and 1) of the target critics
    :param gamma: Discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit like
        ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` means as many as steps done in the
        environment during the rollout
    :param action_noise: Action noise added while collecting, in place of ``exploration_noise``
    :param replay_buffer_class: A subclass of :class:`sb3_qsm.ddiffpg.buffers.TrajectoryReplayBuffer`; by default the one
        that fits the observations
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation, such as ``max_successes``
    :param position: Where an observation is, by which trajectories are compared and novelty is measured: indices of the
        observation, or a function from a batch of observations to an array of shape ``(batch, n)``; by default the whole
        observation, or ``"achieved_goal"`` of a dictionary
    :param clustering_freq: Environment steps between two clusterings
    :param cluster_threshold: Distance between modes, in units of position; by default the clustering with the largest
        silhouette is taken, see :func:`sb3_qsm.ddiffpg.modes.cluster`
    :param min_silhouette: Smallest silhouette of a clustering into several modes; below it all successes are one mode
    :param min_mode_size: Smallest number of successes of a mode, unless it is the only one; others are replayed for the
        exploration alone
    :param target_action_steps: Steps uphill of a target action each time it is replayed
    :param target_action_lr: Their learning rate
    :param mode_embedding_dim: Size of the embeddings of the modes
    :param mode_dropout: Probability that the embedding is left out in training, in states that the mode passes by
    :param intrinsic_reward_scale: Factor on the intrinsic reward
    :param novelty_learning_rate: Learning rate of the novelty's predictor
    :param n_atoms: Number of atoms of categorical critics (C51); 0 for plain ones
    :param v_min: Smallest return of categorical critics, at most 0
    :param v_max: Largest return of categorical critics; after time-outs it must also hold the value that goes on from there
    :param actor_learning_rate: Learning rate of the actor, a number or a schedule; by default ``learning_rate``
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: ``"cosine"``, ``"vp"`` or ``"linear"``
    :param sampler: Reverse process: ``"ddpm_x0"`` clips the estimate of the clean action, ``"ddpm"`` the sample, ``"ddim"`` is
        deterministic given the latent
    :param sampling_temperature: Factor on the noise of the reverse process
    :param target_policy_noise: Standard deviation of the Gaussian noise added to the next action in the critic's target
    :param exploration_noise: Standard deviation of the Gaussian noise added to the scaled actions while collecting; as SB3
        does with ``action_noise``, it is added to the random ones until ``learning_starts`` too
    :param exploration_initial_eps: Probability that an action is uniformly random instead, at step 0; it falls linearly to
        zero. Until ``learning_starts`` all actions are random anyway
    :param exploration_decay_steps: Environment step at which that probability is zero
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; ``"auto"`` uses the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ImportError: if ``dtaidistance`` or SciPy is not installed
    :raises ValueError: if an argument is out of its range; the message names it, its value and what is allowed
    :raises AssertionError: if the actions are no bounded ``Box`` (by Stable-Baselines3)
    """

    own_argument = "clustering_freq"
    #: Types of what :meth:`save_safe` writes beside arguments and tensors
    safe_state: ClassVar[dict[str, Any]] = {
        "sizes": list[int],
        "mean_returns": list[float],
        "trajectories": list[np.ndarray],
        "outcomes": list[list[bool]],
        "mode": int | None,
        "clustered_at": int,
    }
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: ModePolicy
    actor: ModeActor
    replay_buffer: TrajectoryReplayBuffer

    def __init__(
        self,
        policy: str | type[ModePolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1_000,
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        position: PositionFunction | Sequence[int] | None = None,
        clustering_freq: int = 2_000,
        cluster_threshold: float | None = None,
        min_silhouette: float = 0.45,
        min_mode_size: int = 3,
        target_action_steps: int = 20,
        target_action_lr: float = 0.03,
        mode_embedding_dim: int = 5,
        mode_dropout: float = 0.5,
        intrinsic_reward_scale: float = 0.01,
        novelty_learning_rate: float = 1e-4,
        n_atoms: int = 0,
        v_min: float = 0.0,
        v_max: float = 1.0,
        actor_learning_rate: float | Schedule | None = None,
        diffusion_steps: int = 5,
        noise_schedule: str = "cosine",
        sampler: str = "ddpm_x0",
        sampling_temperature: float = 1.0,
        target_policy_noise: float = 0.1,
        exploration_noise: float = 0.1,
        exploration_initial_eps: float = 0.5,
        exploration_decay_steps: int = 10_000,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            actor_learning_rate=actor_learning_rate,
            diffusion_steps=diffusion_steps,
            noise_schedule=noise_schedule,
            sampler=sampler,
            sampling_temperature=sampling_temperature,
            target_policy_noise=target_policy_noise,
            exploration_noise=exploration_noise,
            exploration_initial_eps=exploration_initial_eps,
            exploration_decay_steps=exploration_decay_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
        )
        self.position = position
        self.clustering_freq = clustering_freq
        self.cluster_threshold = cluster_threshold
        self.min_silhouette = min_silhouette
        self.min_mode_size = min_mode_size
        self.target_action_steps = target_action_steps
        self.target_action_lr = target_action_lr
        self.mode_embedding_dim = mode_embedding_dim
        self.mode_dropout = mode_dropout
        self.intrinsic_reward_scale = intrinsic_reward_scale
        self.novelty_learning_rate = novelty_learning_rate
        self.n_atoms = n_atoms
        self.v_min = v_min
        self.v_max = v_max
        self._mode: int | None = None
        self._modes: list[Mode] = []
        # Successes of the last episodes collected with each mode
        self._outcomes: list[deque[bool]] = []
        self._clustered_at = 0
        # What each environment follows in its episode: 0 the exploration, k + 1 the mode k
        self._env_groups: list[int] = []
        if _init_setup_model:
            self._setup_model()

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        # Stable-Baselines3 takes 1e4 for a number of steps
        check_integer("clustering_freq", whole(self.clustering_freq), 1)
        for name in ("min_mode_size", "target_action_steps", "mode_embedding_dim"):
            self._check_integer(name, 1)
        if self.cluster_threshold is not None:
            self._check_number("cluster_threshold", 0.0, strict=True)
        self._check_number("min_silhouette", -1.0, high=1.0)
        self._check_number("mode_dropout", 0.0, high=1.0)
        self._check_number("target_action_lr", 0.0, strict=True)
        self._check_number("intrinsic_reward_scale", 0.0)
        self._check_number("novelty_learning_rate", 0.0, strict=True)
        self._check_integer("n_atoms", 0)
        if self.n_atoms == 1:
            raise ValueError("n_atoms must be 0 for plain critics, or an integer >= 2, got 1")
        self._check_number("v_min", -np.inf)
        # The exploration's returns, sums of what is new, are 0 at first and then positive
        self._check_number("v_max", max(self.v_min, 0.0) if self.n_atoms else self.v_min, strict=True)
        if self.n_atoms and self.v_min > 0.0:
            raise ValueError(f"v_min must be a number <= 0, where the exploration's returns begin, got {self.v_min!r}")
        given: Any = self.replay_buffer_class
        if given is not None and not (isinstance(given, type) and issubclass(given, TrajectoryReplayBuffer)):
            got = getattr(given, "__name__", repr(given))
            raise ValueError(f"replay_buffer_class must be a subclass of TrajectoryReplayBuffer, got {got}")
        if self.replay_buffer_class is not None and isinstance(self.observation_space, spaces.Dict) != issubclass(
            self.replay_buffer_class, DictTrajectoryReplayBuffer
        ):
            kind = (
                "DictTrajectoryReplayBuffer" if isinstance(self.observation_space, spaces.Dict) else "TrajectoryReplayBuffer"
            )
            raise ValueError(
                f"replay_buffer_class must be {kind} for {type(self.observation_space).__name__} observations, got "
                f"{self.replay_buffer_class.__name__}"
            )
        if self.policy_kwargs.get("best_of_n", 1) != 1:
            raise ValueError(f"best_of_n must be 1, got {self.policy_kwargs['best_of_n']!r}: each mode has critics of its own")
        if self.policy_kwargs.get("actor_ema"):
            raise ValueError(f"actor_ema must be False, got {self.policy_kwargs['actor_ema']!r}: only QSM averages its actor")

    def _diffusion_kwargs(self) -> dict[str, Any]:
        categorical = {"n_atoms": self.n_atoms, "v_min": self.v_min, "v_max": self.v_max} if self.n_atoms else None
        return {
            **super()._diffusion_kwargs(),
            "n_modes": len(self._modes),
            "mode_embedding_dim": self.mode_embedding_dim,
            "mode": self._mode,
            "categorical": categorical,
        }

    def _setup_model(self) -> None:
        # Before anything is built: is there what the clustering needs?
        self._distances = TrajectoryDistances()
        replay_buffer_class, replay_buffer_kwargs = self.replay_buffer_class, self.replay_buffer_kwargs
        self.replay_buffer_class = self._buffer_class()
        self.replay_buffer_kwargs = {"position": self.position, **replay_buffer_kwargs}
        try:
            super()._setup_model()
        finally:
            # The user's arguments are stored as they were given
            self.replay_buffer_class, self.replay_buffer_kwargs = replay_buffer_class, replay_buffer_kwargs
        for layer in self.critic.q_networks[0].children():
            if not isinstance(layer, (nn.Linear, nn.LayerNorm)) and any(True for _ in layer.parameters()):
                raise ValueError(f"critic_activation_fn must be one without parameters, got {type(layer).__name__}")
        # A buffer that is assigned has other episodes
        self._known_buffer = self.replay_buffer
        position_dim = self.replay_buffer.positions.shape[1]
        for mode in self._modes:
            if mode.trajectory.shape[1] != position_dim:
                raise ValueError(f"trajectories of modes must have {position_dim} columns, got {mode.trajectory.shape[1]}")
        self.novelty = RandomNetworkDistillation(position_dim).to(self.device)
        self.novelty_optimizer = self.policy._make_optimizer(
            self.novelty.predictor.parameters(), lambda _: self.novelty_learning_rate
        )

    def _buffer_class(self) -> type[TrajectoryReplayBuffer]:
        given: Any = self.replay_buffer_class
        if given is None:
            dictionary = isinstance(self.observation_space, spaces.Dict)
            return DictTrajectoryReplayBuffer if dictionary else TrajectoryReplayBuffer
        kind: type[TrajectoryReplayBuffer] = given
        return kind

    # --- What the user asks for

    @property
    def modes(self) -> list[Mode]:
        """The modes that are known, as of the last clustering."""
        return [
            dataclasses.replace(mode, success_rate=float(np.mean(outcomes)) if outcomes else float("nan"))
            for mode, outcomes in zip(self._modes, self._outcomes, strict=True)
        ]

    @property
    def mode(self) -> int | None:
        """Mode to act in, None for any; see :meth:`set_mode`."""
        return self._mode

    @mode.setter
    def mode(self, mode: int | None) -> None:
        self.set_mode(mode)

    def set_mode(self, mode: int | None) -> None:
        """
        Choose the mode to act in. It goes on as the same one when the modes change their numbers in training, and as the one
        that has most of its trajectories when it is merged with others.

        :param mode: Index into :attr:`modes`; None for any
        :raises ValueError: if there is no such mode
        """
        self._mode = self.actor.mode = self._check_mode(mode)

    def _check_mode(self, mode: int | None) -> int | None:
        if mode is None:
            return None
        if isinstance(mode, bool) or not isinstance(mode, (int, np.integer)) or not 0 <= mode < len(self._modes):
            if not self._modes:
                waiting = self.replay_buffer is not None and self.replay_buffer.successes()
                reason = (
                    f"successes are clustered every clustering_freq={self.clustering_freq} steps, or by update_modes()"
                    if waiting
                    else "no episode has succeeded so far"
                )
                raise ValueError(f"mode must be None, got {mode!r}: no mode is known yet, since {reason}")
            raise ValueError(f"mode must be None or an integer from 0 to {len(self._modes) - 1}, got {mode!r}")
        return int(mode)

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
        mode: int | None = None,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """
        Get the policy's action.

        :param observation: Observation
        :param state: Not used
        :param episode_start: Not used
        :param deterministic: Whether the action shall depend on the observation alone
        :param mode: Index into :attr:`modes`; None for the one chosen by :meth:`set_mode`, or any if there is none
        :return: Action, and the state as it was given
        :raises ValueError: if there is no such mode
        """
        if mode is None:
            return super().predict(observation, state, episode_start, deterministic)
        with self.actor.following(self.actor.mode_context(self._check_mode(mode))):
            return super().predict(observation, state, episode_start, deterministic)

    # --- Collecting

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._check_kind_of_buffer()
        if self._recognise_modes() or self.replay_buffer is not self._known_buffer:
            # The environments are in the midst of episodes that the buffer does not know
            self._last_obs = None
        self._known_buffer = self.replay_buffer
        new_episodes = reset_num_timesteps or self._last_obs is None or self._step_is_open
        if self._modes and not self.replay_buffer.successes():
            warnings.warn(
                f"{len(self._modes)} modes are known, but the replay buffer has no success to recognise them by: they will be "
                "replaced by modes of the next successes. Load the replay buffer to go on with them.",
                stacklevel=3,
            )
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if new_episodes:
            self._env_groups = [self._draw_group() for _ in range(self.n_envs)]
        return result

    def _draw_group(self) -> int:
        """What to follow in an episode: the exploration or one of the modes, so that none is forgotten."""
        return int(np.random.randint(len(self._modes) + 1))

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with self.actor.following(self.actor.mode_embeddings[self._env_groups]):
            return super()._sample_action(learning_starts, action_noise, n_envs)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: npt.NDArray[Any],
        new_obs: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        reward: npt.NDArray[Any],
        dones: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        # Before anything is stored
        successes = {i: success_of(infos[i]) for i in np.flatnonzero(dones)}
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        for i, success in successes.items():
            if "is_success" not in infos[i] and self.ep_success_buffer is not None:
                self.ep_success_buffer.append(success)  # SB3 logs their mean as rollout/success_rate
            # Not those of uniformly random actions
            if self._env_groups[i] > 0 and self.num_timesteps > self.learning_starts:
                self._outcomes[self._env_groups[i] - 1].append(success)
            self._env_groups[i] = self._draw_group()
        if self.n_atoms and successes:
            self._check_returns(len(successes))

    def _check_returns(self, n_episodes: int) -> None:
        """Refuse returns that the atoms of the critics do not contain."""
        for trajectory in list(self.replay_buffer.trajectories.values())[-n_episodes:]:
            rewards = self.replay_buffer._normalize_reward(
                self.replay_buffer.rewards[trajectory.rows, 0], self._vec_normalize_env
            )
            discounted = 0.0
            # Rewards and what they add up to are rounded
            slack = 1e-5 * max(abs(self.v_min), abs(self.v_max))
            for reward in rewards[::-1]:
                discounted = float(reward) + self.gamma * discounted
                if not self.v_min - slack <= discounted <= self.v_max + slack:
                    raise ValueError(
                        f"v_min={self.v_min:g} and v_max={self.v_max:g} must contain all discounted returns, got "
                        f"{discounted:g} at environment step {self.num_timesteps}. Model and replay buffer can still be saved."
                    )

    # --- Learning

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Cluster the successes if it is time, sample all modes in equal parts and do the updates (arXiv 2406.00681, Algorithm
        1).

        :param gradient_steps: Number of gradient steps
        :param batch_size: Size of each minibatch
        """
        if not 0 <= self.num_timesteps - self._clustered_at < self.clustering_freq:
            self.update_modes()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        if not self.novelty.fitted and len(visited := self.replay_buffer.visited_positions()) >= MIN_POSITIONS:
            self.novelty.fit(self.replay_buffer.to_torch(visited))
        metrics: list[Metrics] = []

        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self.replay_buffer.sample_groups(batch_size, len(self._modes), self._vec_normalize_env)
            noise = self._draw_noise(batch.transitions)

            metrics.append(self._update_critics(batch, noise))
            metrics.append(self._update_actor(batch, self._ascend_target_actions(batch), noise))
            if self.novelty.fitted:
                metrics.append(self._update_novelty(batch))
            for critic, critic_target in self.policy.group_critics():
                PolyakUpdate(critic, critic_target)(self.tau)

        self._log(metrics)

    def _contexts(self, batch: ModeBatch, dropout: float = 0.0) -> th.Tensor:
        """
        Embeddings of a batch. Where a mode passes by, they are left out with some probability, which stands for any mode. On
        the way of another mode they are kept: the actor would be told to leave it.
        """
        groups = th.repeat_interleave(th.tensor(batch.sizes)).to(self.device)
        embeddings = self.actor.mode_embeddings[groups]
        if dropout > 0 and self._modes:
            paths = [th.as_tensor(mode.trajectory, dtype=th.float32, device=self.device) for mode in self._modes]
            # The exploration, group 0, passes nowhere
            passing = nn.functional.pad(modes_passing(batch.positions, paths), (1, 0))[th.arange(len(groups)), groups]
            dropped = (th.rand(len(groups), device=self.device) < dropout) & passing
            embeddings = embeddings * ~dropped.unsqueeze(1)
        return embeddings

    def _update_critics(self, batch: ModeBatch, noise: UpdateNoise) -> Metrics:
        """
        One step of the critics of each group on y = r + gamma (1 - d) min_i Q_target_i(s', a'), a' ~ pi(s', mode). The
        exploration gets the intrinsic reward alone, the modes get both.
        """
        data = batch.transitions
        losses = [CriticLoss(self.actor, *pair) for pair in self.policy.group_critics()]
        with th.no_grad():
            novelty, next_novelty = self.novelty(batch.positions), self.novelty(batch.next_positions)
            # Without scales there is no saying what is new
            scale = self.intrinsic_reward_scale if self.novelty.fitted else 0.0
            intrinsic = noveld_reward(novelty, next_novelty, scale).unsqueeze(1)
            features = self.actor.features(data.next_observations, self._contexts(batch))
            next_actions = losses[0].next_actions(features, noise, self.target_policy_noise or None)
        values, q_values = [], []
        for group, (part, loss) in enumerate(zip(_parts(batch.sizes), losses, strict=True)):
            if part.stop == part.start:
                continue
            rewards = intrinsic[part] if group == 0 else intrinsic[part] + data.rewards[part]
            transitions = Transitions(data.actions[part], rewards, data.dones[part], self.gamma)
            value, q_value = self._critic_loss(loss, data, part, next_actions[part], transitions)
            optimizer = loss.critic.optimizer
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            self._check_finite("critic_loss", {"critic_loss": value.detach()})
            optimizer.step()
            values.append(value.detach())
            q_values.append(q_value.detach().mean())
        metrics = {
            "exploration_critic_loss": values[0],
            "intrinsic_reward": intrinsic.mean(),
            "exploration_q_mean": q_values[0],
        }
        if len(values) > 1:
            metrics |= {"critic_loss": th.stack(values[1:]).mean(), "q_mean": th.stack(q_values[1:]).mean()}
        return metrics

    def _critic_loss(
        self,
        loss: CriticLoss,
        data: ReplayBufferSamples | DictReplayBufferSamples,
        part: slice,
        next_actions: th.Tensor,
        transitions: Transitions,
    ) -> tuple[th.Tensor, th.Tensor]:
        """Loss of one group's critics, and their values at the replayed actions."""
        features = loss.critic.features(rows_of(data.observations, part))
        with th.no_grad():
            next_features = loss.critic_target.features(rows_of(data.next_observations, part))
        if not isinstance(loss.critic, CategoricalCritic):
            q_values = loss.critic.q_values(features, transitions.actions)
            return critic_loss(q_values, loss.targets(next_features, next_actions, transitions)), q_values
        assert isinstance(loss.critic_target, CategoricalCritic)
        support = loss.critic.support
        with th.no_grad():
            probabilities = loss.critic_target.logits(next_features, next_actions).softmax(dim=-1)
            # Clipped double Q-learning: of each pair the distribution with the smaller mean
            least = (probabilities @ support).argmin(dim=0)
            chosen = probabilities[least, th.arange(len(least), device=self.device)]
            target = categorical_projection(support, chosen, transitions.rewards, transitions.dones, self.gamma)
        logits = loss.critic.logits(features, transitions.actions)
        return categorical_loss(logits, target), logits.softmax(dim=-1) @ support

    def _ascend_target_actions(self, batch: ModeBatch) -> th.Tensor:
        """Move the batch's target actions uphill on the critics of their group and store them."""
        parts = [part for part in _parts(batch.sizes) if part.stop > part.start]
        critics = [pair[0] for pair, size in zip(self.policy.group_critics(), batch.sizes, strict=True) if size]
        observations = batch.transitions.observations
        with th.no_grad():
            features = [critic.features(rows_of(observations, part)) for critic, part in zip(critics, parts, strict=True)]
        min_q = StackedCritics(critics, features)
        actions = ascend_actions(min_q, batch.target_actions, self.target_action_steps, self.target_action_lr)
        # What is stored is what later trainings begin with
        self._check_finite("target_actions", {"target_actions": actions.sum()})
        self.replay_buffer.set_target_actions(batch, actions.cpu().numpy())
        return actions

    def _update_actor(self, batch: ModeBatch, target_actions: th.Tensor, noise: UpdateNoise) -> Metrics:
        """One step on the ordinary loss of a diffusion model, || eps(s, mode, a_t, t) - eps ||^2, at the target actions."""
        features = self.actor.features(batch.transitions.observations, self._contexts(batch, self.mode_dropout))
        noisy_actions = self.actor.schedule.add_noise(target_actions, noise.eps, noise.t)
        loss = noise_prediction_loss(self.actor.predict_noise(features, noisy_actions, noise.t), noise.eps)
        self.actor.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._check_finite("actor_loss", {"actor_loss": loss.detach()})
        self.actor.optimizer.step()
        self.actor.score_network.forget_time_table()
        return {
            "actor_loss": loss.detach(),
            "target_action_shift": (target_actions - batch.transitions.actions).abs().mean(),
            "action_saturation": (target_actions.abs() > 0.999).float().mean(),
        }

    def _update_learning_rates(self) -> None:
        super()._update_learning_rates()
        update_learning_rate(self.novelty_optimizer, self.novelty_learning_rate)

    def _update_novelty(self, batch: ModeBatch) -> Metrics:
        """One step of the novelty's predictor on the positions of the batch."""
        loss = self.novelty.error(th.cat([batch.positions, batch.next_positions])).square().mean()
        self.novelty_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.novelty_optimizer.step()
        return {"novelty_loss": loss.detach()}

    # --- Modes

    def update_modes(self) -> None:
        """
        Cluster the successful trajectories and carry the modes over. Failed trajectories join the mode whose representative
        they are nearest to. It is done every ``clustering_freq`` steps of the training.
        """
        self._check_kind_of_buffer()
        self._clustered_at = self.num_timesteps
        buffer = self.replay_buffer
        self._recognise_modes()
        successes = buffer.successes()
        if not successes:
            return
        self._distances.keep(buffer.trajectories)
        distances = self._distances.condensed(successes)
        labels = cluster(distances, self.cluster_threshold, self.min_silhouette, self.min_mode_size)
        square = squareform(distances)
        # Those of small clusters have no mode
        new = [{successes[i].id for i in np.flatnonzero(labels == label)} for label in range(labels.max() + 1)]
        old = [{other.id for other in successes if other.mode == mode} for mode in range(len(self._modes))]
        parents = inherit(new, old)
        # What goes on comes first, in the order that it had
        order = sorted(range(len(new)), key=lambda i: (not parents[i].continues, parents[i].parent or 0, i))
        parents = [parents[i] for i in order]
        members = [np.flatnonzero(labels == label) for label in order]
        representatives = [successes[rows[medoid(square[np.ix_(rows, rows)])]] for rows in members]

        if self.batch_size < len(members) + 1:
            warnings.warn(
                f"batch_size={self.batch_size} has no part for each of {len(members)} modes and the exploration: some learn "
                "nothing",
                stacklevel=2,
            )

        modes = {successes[i].id: mode for mode, rows in enumerate(members) for i in rows}
        for trajectory in buffer.trajectories.values():
            if not trajectory.success:
                modes[trajectory.id] = int(np.argmin([self._distances(trajectory, other) for other in representatives]))
        outcomes = [
            self._outcomes[parent] if parent is not None and continues else deque(maxlen=100) for parent, continues in parents
        ]
        known = [
            Mode(len(rows), float("nan"), float(np.mean([successes[i].total_reward for i in rows])), representative.positions)
            for rows, representative in zip(members, representatives, strict=True)
        ]
        heirs = {parent: mode for mode, (parent, continues) in enumerate(parents) if parent is not None and continues}
        chosen = self._mode
        if chosen is not None and chosen not in heirs:
            # Merged with another one, whose heir the new one is
            shared = [len(new[i] & old[chosen]) for i in order]
            if any(shared):
                heirs[chosen] = shared.index(max(shared))
            else:
                warnings.warn(f"The mode that was chosen, {chosen}, is gone: any may act now", stacklevel=2)
        # A model with some of this could not be saved
        with uninterrupted():
            self.policy.inherit(parents)
            self._create_aliases()
            buffer.assign(modes, [parent for parent, _ in parents])
            buffer.representatives = [mode.trajectory for mode in known]
            self._modes, self._outcomes = known, outcomes
            # Numbers of modes have changed: the user's choice, and what the environments follow
            self.set_mode(None if chosen is None else heirs.get(chosen))
            self._env_groups = [heirs[group - 1] + 1 if group - 1 in heirs else 0 for group in self._env_groups]

    # --- Logging, saving and loading

    def _create_aliases(self) -> None:
        super()._create_aliases()
        self.mode_critics = self.policy.mode_critics

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, *(critic.optimizer for critic, _ in self.policy.group_critics())]

    def dump_logs(self) -> None:
        """Write log data, with the number of modes and the share of successes in each."""
        self.logger.record("modes/n_modes", len(self._modes))
        for index, mode in enumerate(self.modes):
            self.logger.record(f"modes/success_rate_{index}", mode.success_rate)
        super().dump_logs()

    def learn(
        self: SelfDDiffPG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DDiffPG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDDiffPG:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, without the episodes that were not finished. The environments begin new ones. In a buffer of
        another moment than the model the modes may have other numbers, so its trajectories take the mode that they are near.

        :param path: Path to the file, or the file
        :param truncate_last_traj: Not used: an episode that was not finished cannot go on
        :raises ValueError: if it is none of DDiffPG, or has other positions than the model; the one that was there stays
        """
        super().load_replay_buffer(path, truncate_last_traj)
        # The environments are in the midst of episodes that the buffer does not know
        self._last_obs = None
        self._known_buffer = self.replay_buffer
        self._recognise_modes()

    def _recognise_modes(self) -> bool:
        """
        Give the trajectories of a replay buffer that is not the model's the modes that are known.

        :return: Whether it was one
        """
        known = [mode.trajectory for mode in self._modes]
        theirs = getattr(self.replay_buffer, "representatives", [])  # one that was saved before it had them
        if not known or (len(known) == len(theirs) and all(map(np.array_equal, known, theirs))):
            return False
        if not self.replay_buffer.trajectories:
            # One that was just made
            self.replay_buffer.representatives = known
            return False
        warnings.warn(
            "The modes of the replay buffer are not those of the model: it is of another moment or another training. Its "
            "trajectories were given the modes of the model that they are near.",
            stacklevel=3,
        )
        # A success half way to another mode, or farther, may be of a mode that is not known
        limit = half_way(known)
        modes = {}
        for trajectory in self.replay_buffer.trajectories.values():
            distances = [dtw_distance(trajectory.positions, positions) for positions in known]
            if not trajectory.success or min(distances) <= limit:
                modes[trajectory.id] = int(np.argmin(distances))
            # Its target actions are another mode's: the executed ones take their place
            trajectory.mode = UNASSIGNED
        self.replay_buffer.assign(modes, range(len(known)))
        self.replay_buffer.representatives = known
        return True

    def _check_replay_buffer(self, own: ReplayBuffer | None) -> None:
        self._check_kind_of_buffer()
        super()._check_replay_buffer(own)

    def _check_kind_of_buffer(self) -> None:
        """Refuse a replay buffer that is not like the one the model was made with."""
        found: Any = self.replay_buffer
        kind = self._buffer_class()
        if not isinstance(found, kind):
            raise ValueError(f"The replay buffer must be a {kind.__name__}, got a {type(found).__name__}")
        size, own_size = found.positions.shape[1], len(self.novelty.mean)
        if size != own_size:
            raise ValueError(
                f"The replay buffer's positions must have {own_size} entries, got {size}: see the argument position"
            )
        position = {"position": self.position, **self.replay_buffer_kwargs}["position"]
        functions = [found.position, position_function(position, self.observation_space)]
        theirs, own = (getattr(function, "indices", None) for function in functions)
        if None not in (theirs, own) and theirs != own:
            raise ValueError(f"The replay buffer's position must be the model's, {own}, got {theirs}")

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "mode_critics",
            "novelty",
            "novelty_optimizer",
            "_distances",
            "_known_buffer",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modes = [f"mode_critics.{index}.optimizer" for index in range(len(self._modes))]
        return ["policy", "actor.optimizer", "critic.optimizer", "novelty", "novelty_optimizer", *modes], []

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters, see :meth:`BaseAlgorithm.set_parameters`. They are those of as many modes; which modes these are,
        :attr:`modes`, is not among them, so that of another training :meth:`load` is to be used.

        :param load_path_or_dict: File, or parameters as :meth:`get_parameters` gives them
        :param exact_match: Whether all parameters must be there
        :param device: Device on which the code should run
        :raises ValueError: if they are of another number of modes; those that were there stay
        """
        parameters: Any = load_path_or_dict
        if not isinstance(parameters, dict):
            _, parameters, _ = load_from_zip_file(parameters, device=device, load_data=False)
        embeddings = parameters.get("policy", {}).get("actor.mode_embeddings")
        if embeddings is not None and len(embeddings) != len(self._modes) + 1:
            raise ValueError(
                f"The parameters must be of a model with as many modes ({len(self._modes)}), got {len(embeddings) - 1}: load "
                "takes over the modes too"
            )
        super().set_parameters(parameters, exact_match, device)

    def _safe_state(self) -> dict[str, Any]:
        """What :meth:`save_safe` writes beside arguments and tensors."""
        return {
            "sizes": [mode.size for mode in self._modes],
            "mean_returns": [mode.mean_return for mode in self._modes],
            "trajectories": [mode.trajectory for mode in self._modes],
            "outcomes": [list(outcomes) for outcomes in self._outcomes],
            "mode": self._mode,
            "clustered_at": self._clustered_at,
        }

    def _set_safe_state(
        self,
        sizes: list[int],
        mean_returns: list[float],
        trajectories: list[npt.NDArray[np.float64]],
        outcomes: list[list[bool]],
        mode: int | None,
        clustered_at: int,
    ) -> None:
        if not len(sizes) == len(mean_returns) == len(trajectories) == len(outcomes):
            raise ValueError(
                f"state must have a size, a mean return, a trajectory and a list of outcomes for each mode, got {sizes}"
            )
        for size in sizes:
            check_integer("state.sizes", size, 1)
        check_integer("state.clustered_at", clustered_at, 0)
        for trajectory in trajectories:
            if trajectory.ndim != 2 or len(trajectory) < 2 or not np.isfinite(trajectory).all():
                raise ValueError(f"state.trajectories must be finite, of shape (n, position_dim), got {trajectory!r}")
        self._modes = [
            Mode(size, float("nan"), mean_return, trajectory)
            for size, mean_return, trajectory in zip(sizes, mean_returns, trajectories, strict=True)
        ]
        self._outcomes = [deque(found, maxlen=100) for _, found in zip(sizes, outcomes, strict=True)]
        self._mode = self._check_mode(mode)
        self._clustered_at = clustered_at


def _parts(sizes: list[int]) -> list[slice]:
    """Where the groups of a batch are."""
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
