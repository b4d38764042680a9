"""Q-score matching on Stable-Baselines3."""

import io
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
)
from stable_baselines3.common.utils import (
    FloatSchedule,
    get_parameters_by_name,
    polyak_update,
    update_learning_rate,
)
from torch import nn

from sb3_qsm.common.checkpoint import resume
from sb3_qsm.common.performance import check_compiler, check_precision
from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy, QCritic, check_sampling_steps
from sb3_qsm.common.safe import OBJECTS, load_safe, save_safe
from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS
from sb3_qsm.qsm.losses import ActorLoss, CriticLoss, Gradients, Metrics, Transitions, UpdateNoise
from sb3_qsm.qsm.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.qsm.targets import CRITIC_REDUCTIONS, SCORE_TARGETS

SelfQSM = TypeVar("SelfQSM", bound="QSM")


class CosineDecay:
    """
    Cosine decay of a learning rate over a number of gradient steps, one for each environment step after the first ones
    (the official QSM code's schedule of the actor), as SB3's function of the remaining progress.

    :param initial_value: Learning rate at the start
    :param total_timesteps: Environment steps of the whole training
    :param decay_steps: Gradient steps after which the rate is zero
    :param learning_starts: Environment steps before the first gradient step
    """

    def __init__(self, initial_value: float, total_timesteps: int, decay_steps: int, learning_starts: int = 0) -> None:
        self.initial_value = initial_value
        self.total_timesteps = total_timesteps
        self.decay_steps = decay_steps
        self.learning_starts = learning_starts

    def __call__(self, progress_remaining: float) -> float:
        updates = max((1.0 - progress_remaining) * self.total_timesteps - self.learning_starts, 0.0)
        return self.initial_value * 0.5 * (1.0 + math.cos(math.pi * min(updates / self.decay_steps, 1.0)))

    def __repr__(self) -> str:
        return f"CosineDecay({self.initial_value}, {self.total_timesteps}, {self.decay_steps}, {self.learning_starts})"


OBJECTS["CosineDecay"] = (
    CosineDecay,
    {
        "initial_value": ("initial_value", float),
        **{name: (name, int) for name in ("total_timesteps", "decay_steps", "learning_starts")},
    },
)


class QSM(OffPolicyAlgorithm):
    r"""
    Q-Score Matching (QSM): the noise prediction of a diffusion actor is regressed onto the action gradient of the critic.

    Paper: https://arxiv.org/abs/2312.11752

    The defaults are not the paper's: they weight the gradient by the noise level, take it at the denoised action and scale it
    by its running magnitude. :meth:`paper_hyperparameters` has the paper's.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critics, and of the actor unless ``actor_learning_rate`` is given; it can be a
        function of the current progress remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer
    :param learning_starts: How many steps of uniformly random actions to collect before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: Soft update coefficient ("Polyak update", between 0 and 1) of the target critics
    :param gamma: Discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit like
        ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` means as many as steps done in the
        environment during the rollout
    :param action_noise: Action noise added while collecting, in place of ``exploration_noise``
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity
    :param n_steps: Steps of the n-step return when no replay buffer class is given
    :param actor_learning_rate: Learning rate of the actor, a number or a schedule; by default ``learning_rate``
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: ``"cosine"``, ``"vp"`` or ``"linear"``
    :param sampler: Reverse process: ``"ddpm_x0"`` clips the estimate of the clean action, ``"ddpm"`` the sample (the paper's),
        ``"ddim"`` is deterministic given the latent
    :param sampling_temperature: Factor on the noise of the reverse process
    :param score_target: Where the critic's gradient is taken and how it is weighted: ``"denoised"`` at the clipped estimate of
        the clean action, ``"noised"`` at the noised action, ``"clean"`` at the replayed action, all with sigma_t; ``"paper"``
        at the noised action without sigma_t
    :param temperature: Temperature lambda of the Boltzmann policy, on the scale where the mean absolute component of the
        critic's action gradient is one
    :param q_grad_coef: Fixed factor on the critic's gradient (the paper's M_q) in place of the scale-free ``temperature``
    :param q_grad_clip: Largest mean absolute component of a state's action gradient, in units of its running mean; larger
        gradients are scaled down. ``None`` for no limit; not used with ``q_grad_coef``
    :param target_policy_noise: Standard deviation of the Gaussian noise added to the next action in the critic's target
    :param gradient_critic: Critics whose gradient the actor follows: ``"online"`` (after their update), ``"target"`` or
        ``"both"``
    :param critic_reduction: How the critics are combined for that gradient: ``"mean"`` or ``"min"``
    :param policy_delay: Update the actor once every ``policy_delay`` gradient steps
    :param target_update_interval: Update the target critics once every ``target_update_interval`` gradient steps
    :param best_of_n: Number of actions to draw when acting; the one with the highest minimum over the critics is taken
    :param sampling_steps: Number of steps to act in, at most T, by DDIM on evenly spaced ones of the T; by default the whole
        chain of ``sampler``. The critic's target always takes the whole chain
    :param exploration_noise: Standard deviation of the Gaussian noise added to the scaled actions while collecting
    :param exploration_initial_eps: Probability that an action is uniformly random instead, at the first step after
        ``learning_starts``; it falls linearly to zero
    :param exploration_decay_steps: Environment step at which that probability is zero
    :param compile: Compile the losses and their gradients with ``torch.compile``, which needs a C++ compiler and about half a
        minute at the first gradient step, less when the same update was compiled before
    :param precision: ``"float32"``, or ``"bf16"`` for matrix products with bfloat16 operands: parameters, optimizers and the
        critics' targets stay in float32. Applies to acting too where there are 16 observations or more
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; ``"auto"`` uses the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiffusionPolicy
    actor: DiffusionActor
    critic: QCritic
    critic_target: QCritic

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        actor_learning_rate: float | Schedule | None = None,
        diffusion_steps: int = 10,
        noise_schedule: str = "cosine",
        sampler: str = "ddpm_x0",
        sampling_temperature: float = 1.0,
        score_target: str = "denoised",
        temperature: float = 0.2,
        q_grad_coef: float | None = None,
        q_grad_clip: float | None = 1.0,
        target_policy_noise: float = 0.0,
        gradient_critic: str = "both",
        critic_reduction: str = "mean",
        policy_delay: int = 1,
        target_update_interval: int = 1,
        best_of_n: int = 1,
        sampling_steps: int | None = None,
        exploration_noise: float = 0.1,
        exploration_initial_eps: float = 0.5,
        exploration_decay_steps: int = 10_000,
        compile: bool = False,
        precision: str = "float32",
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
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.actor_learning_rate = actor_learning_rate
        self.diffusion_steps = diffusion_steps
        self.noise_schedule = noise_schedule
        self.sampler = sampler
        self.sampling_temperature = sampling_temperature
        self.score_target = score_target
        self.temperature = temperature
        self.q_grad_coef = q_grad_coef
        self.q_grad_clip = q_grad_clip
        self.target_policy_noise = target_policy_noise
        self.gradient_critic = gradient_critic
        self.critic_reduction = critic_reduction
        self.policy_delay = policy_delay
        self.target_update_interval = target_update_interval
        self.best_of_n = best_of_n
        self.sampling_steps = sampling_steps
        self.exploration_noise = exploration_noise
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_decay_steps = exploration_decay_steps
        self.compile = compile
        self.precision = precision

        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def paper_hyperparameters(total_timesteps: int = 1_000_000) -> dict[str, Any]:
        """
        Constructor arguments of the official QSM code (arXiv 2312.11752), for ``QSM("MlpPolicy", env, **...)``. The paper uses
        ``q_grad_coef=120`` for quadruped and humanoid walk.

        :param total_timesteps: Environment steps of the training, which the decay of the actor's learning rate needs
        :return: Keyword arguments
        """
        return {
            "learning_rate": 3e-4,
            "actor_learning_rate": CosineDecay(3e-4, total_timesteps, decay_steps=2_000_000, learning_starts=10_000),
            "learning_starts": 10_000,
            "batch_size": 256,
            "tau": 0.005,
            "gamma": 0.99,
            "diffusion_steps": 5,
            "noise_schedule": "vp",
            "sampler": "ddpm",
            "sampling_temperature": 1.0,
            "score_target": "paper",
            "q_grad_coef": 50.0,
            "target_policy_noise": 0.1,
            "gradient_critic": "online",
            "critic_reduction": "mean",
            "exploration_noise": 0.1,
            "exploration_initial_eps": 0.0,
            "policy_kwargs": {
                "net_arch": [512, 512],
                "activation_fn": nn.Mish,
                "critic_activation_fn": nn.ReLU,
                "critic_layer_norm": False,
                "xavier": True,
            },
        }

    def _check_hyperparameters(self) -> None:
        """Refuse arguments out of their range, before anything is built."""

        def choose(name: str, known: Iterable[str]) -> None:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}; known ones: {', '.join(sorted(known))}")

        def number(name: str, low: float, strict: bool = False, high: float = math.inf) -> None:
            value = getattr(self, name)
            ok = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
            if not ok or value < low or (strict and value == low) or value > high:
                upper = "" if high == math.inf else f" and <= {high:g}"
                raise ValueError(f"{name} must be a number {'>' if strict else '>='} {low:g}{upper}, got {value!r}")

        def integer(name: str, low: int) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")

        choose("noise_schedule", NOISE_SCHEDULES)
        choose("sampler", SAMPLERS)
        choose("score_target", SCORE_TARGETS)
        choose("critic_reduction", CRITIC_REDUCTIONS)
        choose("gradient_critic", ("both", "online", "target"))
        check_precision(self.device, self.precision)
        if self.compile:
            check_compiler(self.device)
        for name in ("diffusion_steps", "best_of_n", "policy_delay", "target_update_interval", "batch_size", "buffer_size"):
            integer(name, 1)
        check_sampling_steps(self.sampling_steps, self.diffusion_steps)
        integer("exploration_decay_steps", 0)
        integer("n_steps", 1)
        number("temperature", 0.0, strict=True)
        if self.q_grad_coef is not None:
            number("q_grad_coef", 0.0, strict=True)
        if self.q_grad_clip is not None:
            number("q_grad_clip", 0.0, strict=True)
        for name in ("sampling_temperature", "target_policy_noise", "exploration_noise"):
            number(name, 0.0)
        number("exploration_initial_eps", 0.0, high=1.0)
        number("tau", 0.0, high=1.0)
        number("gamma", 0.0, high=1.0)
        twice = sorted(set(self._diffusion_kwargs()) & set(self.policy_kwargs))
        if twice:
            raise ValueError(f"Pass {', '.join(twice)} to {type(self).__name__} itself, not in policy_kwargs")

    def _diffusion_kwargs(self) -> dict[str, Any]:
        """Arguments of the algorithm that the policy needs to act, also when it is saved alone."""
        return {
            "diffusion_steps": self.diffusion_steps,
            "noise_schedule": self.noise_schedule,
            "sampler": self.sampler,
            "sampling_temperature": self.sampling_temperature,
            "best_of_n": self.best_of_n,
            "sampling_steps": self.sampling_steps,
        }

    def _setup_model(self) -> None:
        self._check_hyperparameters()
        n_step = {"n_steps": self.n_steps, "gamma": self.gamma}
        if (
            self.n_steps > 1
            and self.replay_buffer_class is NStepReplayBuffer
            and n_step.items() <= self.replay_buffer_kwargs.items()
        ):
            # SB3's own choice, stored with the model: at loading it would warn that the user's class ignores `n_steps`
            self.replay_buffer_class = None
        policy_kwargs = self.policy_kwargs
        self.policy_kwargs = {**self._diffusion_kwargs(), **policy_kwargs}
        try:
            super()._setup_model()
        finally:
            # The user's argument is stored as it was given
            self.policy_kwargs = policy_kwargs
        self._create_aliases()
        if self.actor_learning_rate is not None:
            self.actor_lr_schedule: Schedule | None = FloatSchedule(self.actor_learning_rate)
            update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(1))
        else:
            self.actor_lr_schedule = None
        # Running statistics of the features extractors follow the critics at once, see SB3 issue #996
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        if self.compile and any(True for _ in self.actor.features_extractor.parameters()):
            raise ValueError(
                "compile=True needs a features extractor without parameters, like MlpPolicy's, got "
                f"{type(self.actor.features_extractor).__name__}"
            )
        self.actor.precision = self.precision
        # Running mean of |grad_a Q|; 0 until the first actor update
        self.q_grad_norm = th.zeros((), device=self.device)
        self._critic_gradients = Gradients(
            CriticLoss(self.actor, self.critic, self.critic_target), self.critic.optimizer, self.compile, self.precision
        )
        self._actor_gradients = Gradients(
            ActorLoss(self.actor, self._gradient_critics(), self.score_target, self.critic_reduction),
            self.actor.optimizer,
            self.compile,
            self.precision,
        )

    def _gradient_critics(self) -> list[QCritic]:
        """The critics whose action gradient the actor follows."""
        return {
            "online": [self.critic],
            "target": [self.critic_target],
            "both": [self.critic, self.critic_target],
        }[self.gradient_critic]

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _update_learning_rates(self) -> None:
        """Set the learning rates of both optimizers to their schedules and log them."""
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        if self.actor_lr_schedule is not None:
            actor_learning_rate = self.actor_lr_schedule(self._current_progress_remaining)
            update_learning_rate(self.actor.optimizer, actor_learning_rate)
            self.logger.record("train/actor_learning_rate", actor_learning_rate)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates (arXiv 2312.11752, Algorithm 1).

        :param gradient_steps: Number of gradient steps
        :param batch_size: Size of each minibatch
        """
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        metrics: list[Metrics] = []

        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            noise = self._draw_noise(batch)

            metrics.append(self._update_critic(batch, noise))
            if self._n_updates % self.policy_delay == 0:
                metrics.append(self._update_actor(batch, noise))
            if self._n_updates % self.target_update_interval == 0:
                self._update_target()

        self._log(metrics)

    def _draw_noise(self, batch: ReplayBufferSamples) -> UpdateNoise:
        """All random numbers of a gradient step, in two calls of the global generator."""
        steps, shape = self.diffusion_steps, batch.actions.shape
        normal = th.randn(steps + 3, *shape, device=self.device)
        t = th.randint(steps, shape[:1], device=self.device)
        return UpdateNoise(latent=normal[0], chain=normal[1 : steps + 1], target=normal[-2], eps=normal[-1], t=t)

    def _transitions(self, batch: ReplayBufferSamples) -> Transitions:
        """The batch with its discounts: for n-step replay gamma**n, less at an earlier termination."""
        discounts = th.tensor(self.gamma, device=self.device) if batch.discounts is None else batch.discounts
        return Transitions(batch.actions, batch.rewards, batch.dones, discounts)

    def _update_critic(self, batch: ReplayBufferSamples, noise: UpdateNoise) -> Metrics:
        """One step on sum_i mean (Q_i(s, a) - y)^2 with y = r + gamma (1 - d) min_i Q_target_i(s', a'), a' ~ pi(s')."""
        features = self.critic.features(batch.observations)
        with th.no_grad():
            actor_next_features = self.actor.features(batch.next_observations)
            critic_next_features = self.critic_target.features(batch.next_observations)
        metrics = self._critic_gradients(
            features,
            actor_next_features,
            critic_next_features,
            self._transitions(batch),
            noise,
            self.target_policy_noise,
        )
        self._check_finite("critic_loss", metrics)
        self.critic.optimizer.step()
        return metrics

    def _update_actor(self, batch: ReplayBufferSamples, noise: UpdateNoise) -> Metrics:
        """One step on mean || eps(s, a_t, t) - eps* ||^2, where eps* is the scaled action gradient of the critics."""
        features = self.actor.features(batch.observations)
        with th.no_grad():
            critic_features = [critic.features(batch.observations) for critic in self._gradient_critics()]
        clip = self.q_grad_clip if self.q_grad_coef is None else None
        metrics = self._actor_gradients(
            features,
            critic_features,
            batch.actions,
            noise,
            self.q_grad_norm,
            th.tensor(float(self.temperature), device=self.device),
            None if self.q_grad_coef is None else th.tensor(float(self.q_grad_coef), device=self.device),
            None if clip is None else th.tensor(float(clip), device=self.device),
        )
        self._check_finite("actor_loss", metrics)
        self.actor.optimizer.step()
        self.q_grad_norm.copy_(metrics.pop("q_grad_norm"))
        return metrics

    def _update_target(self) -> None:
        """Polyak update of the target critics; running statistics are copied."""
        with th.no_grad():
            th._foreach_lerp_(tuple(self.critic_target.parameters()), tuple(self.critic.parameters()), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _check_finite(self, name: str, metrics: Metrics) -> None:
        """
        Stop before a step would destroy the parameters. On a GPU the look would wait for the device, so there it is left to
        :meth:`_log`, once for each call of ``train``.
        """
        if metrics[name].device.type == "cpu":
            self._require_finite(name, metrics[name].item())

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value} at environment step {self.num_timesteps}, gradient step {self._n_updates}: check the "
                "scale of rewards and observations and the learning rate. Model and replay buffer can still be saved."
            )

    def _log(self, metrics: list[Metrics]) -> None:
        """Average the metrics over the gradient steps and move them off the device in one piece."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        names = list(dict.fromkeys(name for step in metrics for name in step))
        if not names:
            return
        means = th.stack([th.stack([step[name] for step in metrics if name in step]).mean() for name in names]).tolist()
        for name, mean in zip(names, means, strict=True):
            if name.endswith("loss"):
                self._require_finite(name, mean)
            self.logger.record(f"train/{name}", mean)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if action_noise is None and self.exploration_noise > 0:
            shape = (n_envs, *self.action_space.shape)  # type: ignore[misc]
            action_noise = NormalActionNoise(np.zeros(shape), np.full(shape, self.exploration_noise))
        actions, buffer_actions = super()._sample_action(learning_starts, action_noise, n_envs)
        eps = self._exploration_eps()
        if eps > 0 and self.num_timesteps >= learning_starts:
            random = np.random.rand(n_envs) < eps
            buffer_actions[random] = np.random.uniform(-1.0, 1.0, buffer_actions[random].shape)
            actions = self.policy.unscale_action(buffer_actions)
        return actions, buffer_actions

    def _exploration_eps(self) -> float:
        """Probability of a random action at the present step."""
        decay = max(self.exploration_decay_steps, 1)
        return self.exploration_initial_eps * max(0.0, 1.0 - self.num_timesteps / decay)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._require_finite_from_env("observation", self._last_obs)
        return result

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray[Any, Any],
        new_obs: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]],
        reward: np.ndarray[Any, Any],
        dones: np.ndarray[Any, Any],
        infos: list[dict[str, Any]],
    ) -> None:
        # Before anything is stored: the buffer stays good and can be saved
        self._require_finite_from_env("reward", reward)
        self._require_finite_from_env("observation", new_obs)
        if self._vec_normalize_env is not None:
            # What the buffer gets; VecNormalize clips an infinity out of what it returns
            self._require_finite_from_env("reward", self._vec_normalize_env.get_original_reward())
            self._require_finite_from_env("observation", self._vec_normalize_env.get_original_obs())
        for info in infos:
            if "terminal_observation" in info:
                self._require_finite_from_env("terminal observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _require_finite_from_env(self, name: str, value: Any) -> None:
        """Stop at the first NaN or infinity that the environment returns."""
        if isinstance(value, dict):
            for key, entry in value.items():
                self._require_finite_from_env(f"{name}[{key!r}]", entry)
        elif not np.isfinite(value).all():
            raise ValueError(
                f"The environment returned a non-finite {name} at environment step {self.num_timesteps}: "
                f"{np.asarray(value).tolist()}. Nothing of this step was stored; model and replay buffer can still be saved."
            )

    def dump_logs(self) -> None:
        """Write log data, with the spread of the policy: the standard deviation of its samples at the current state."""
        if self._n_updates > 0 and self._last_obs is not None:
            self.logger.record("train/action_std", self._action_std())
        super().dump_logs()

    @th.no_grad()
    def _action_std(self, n_samples: int = 32) -> float:
        """Standard deviation of samples at the last observation, averaged over action dimensions and environments."""
        self.policy.set_training_mode(False)
        devices = [self.device] if self.device.type == "cuda" else []
        # Looking must not change the training that goes on
        with th.random.fork_rng(devices=devices):
            observation, _ = self.policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
            features = self.actor.features(observation)
            latents = self.actor.draw_latents(len(features), n=n_samples)
            actions = self.actor.sample(features.repeat(n_samples, 1), *latents, self.actor.sampling_steps)
        return actions.view(n_samples, len(features), -1).std(dim=0).mean().item()

    def learn(
        self: SelfQSM,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "QSM",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfQSM:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    @classmethod
    def resume(
        cls: type[SelfQSM], path: str | os.PathLike[str], env: GymEnv, device: th.device | str = "auto", **kwargs: Any
    ) -> SelfQSM:
        """
        Go on with a run from its checkpoint, see :func:`sb3_qsm.common.checkpoint.resume`:
        ``model.learn(total_timesteps - model.num_timesteps, reset_num_timesteps=False)``.

        :param path: A run's folder or the checkpoint itself
        :param env: Environment like the one of the interrupted run, with ``VecNormalize`` around it if it had that
        :param device: Device of the networks
        :param kwargs: Further arguments of ``load``, such as ``tensorboard_log``
        :return: The model, with its replay buffer, random number generators and counters
        """
        return resume(cls, path, env, device, **kwargs)

    @classmethod
    def load(
        cls: type[SelfQSM],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfQSM:
        """
        Load the model from a zip-file, see :meth:`BaseAlgorithm.load`.

        :param path: Path to the file (or a file-like) where to load the agent from
        :param env: The new environment to run the loaded model on
        :param device: Device on which the code should run
        :param custom_objects: Dictionary of objects to replace upon loading
        :param print_system_info: Whether to print system info of the saved model and of the current system
        :param force_reset: Force call to ``reset()`` before training
        :param kwargs: Extra arguments to change the model when loading
        :return: New model instance with loaded parameters
        :raises ValueError: if the file is no saved model, is damaged, or was saved by another algorithm
        """
        cls._check_saved_file(path)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save_safe(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """
        Write the model to a file that can be opened without trust, see :func:`sb3_qsm.common.safe.save_safe`.

        :param path: File to write (``.safetensors`` is added to a name without suffix) or a binary stream
        :raises ValueError: if something of the model cannot be expressed, such as a function as schedule; nothing is written
        """
        save_safe(self, path)

    @classmethod
    def load_safe(
        cls: type[SelfQSM],
        path: str | os.PathLike[str] | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfQSM:
        """
        Read a model that :meth:`save_safe` wrote, running no code of the file, see :func:`sb3_qsm.common.safe.load_safe`.

        :param path: File or a binary stream
        :param env: Environment to go on with; it is reset before training. None to predict only
        :param device: Device of the networks
        :param kwargs: Arguments of the constructor that replace those in the file, such as ``buffer_size``
        :return: The model
        :raises ValueError: if the file is no safe model, is damaged, says anything that is not allowed or does not fit ``env``
        """
        return load_safe(cls, path, env, device, **kwargs)

    @classmethod
    def _check_saved_file(cls, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """Refuse a file that is no model of this algorithm, before anything in it is unpickled."""
        file = open_path(path, "r", verbose=0, suffix="zip")
        start = file.tell()
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                data = json.loads(archive.read("data"))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a saved model, or it is truncated or damaged: {error}") from error
        finally:
            if file is path:
                file.seek(start)
            else:
                file.close()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: {damaged} in it does not match its checksum")
        if not isinstance(data, dict) or "score_target" not in data:
            policy = data.get("policy_class", {}) if isinstance(data, dict) else {}
            saved_by = policy.get("__module__", "another algorithm") if isinstance(policy, dict) else "another algorithm"
            raise ValueError(f"{path} was not saved by {cls.__name__} but by {saved_by}")

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "actor",
            "critic",
            "critic_target",
            "batch_norm_stats",
            "batch_norm_stats_target",
            "_critic_gradients",
            "_actor_gradients",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], ["q_grad_norm"]
