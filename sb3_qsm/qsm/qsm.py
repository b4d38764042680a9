"""Q-score matching on Stable-Baselines3."""

import itertools
import math
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
)
from torch import nn

from sb3_qsm.common.buffers import replay_buffer_for
from sb3_qsm.common.gradient_step import GradientStep, PolyakUpdate, are_the_same, average_weight, members_of
from sb3_qsm.common.losses import CriticLoss, Metrics, Transitions, UpdateNoise
from sb3_qsm.common.performance import check_compiler, check_precision
from sb3_qsm.common.policies import DiffusionPolicy, QCritic, check_sampling_steps
from sb3_qsm.common.safe import OBJECTS
from sb3_qsm.offline import OfflineTraining
from sb3_qsm.qsm.losses import ActorLoss
from sb3_qsm.qsm.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_qsm.qsm.targets import CRITIC_REDUCTIONS, SCORE_TARGETS

SelfQSM = TypeVar("SelfQSM", bound="QSM")

#: Arguments that the losses and their steps are made with
_UPDATE_ARGUMENTS = (
    "score_target",
    "prior_std",
    "gradient_critic",
    "critic_reduction",
    "target_sampling_steps",
    "compile",
    "precision",
)


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


class QSM(OfflineTraining):
    r"""
    Q-Score Matching (QSM): the noise prediction of a diffusion actor is regressed onto the action gradient of the critic.

    Paper: https://arxiv.org/abs/2312.11752

    The defaults are not the paper's: they weight the gradient by the noise level, take it at the denoised action, scale it by
    its running magnitude, and train the actor half at its own actions. :meth:`paper_hyperparameters` has the paper's.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critics, and of the actor unless ``actor_learning_rate`` is given; it can be a
        function of the current progress remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer
    :param learning_starts: How many steps of uniformly random actions to collect before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: Soft update coefficient ("Polyak update", between 0 and 1) of the target critics and of ``actor_ema``
    :param gamma: Discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit like
        ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` means as many as steps done in the
        environment during the rollout
    :param action_noise: Action noise added while collecting, in place of ``exploration_noise``
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity
    :param n_steps: Steps of the n-step return. By default 3 with the replay buffers made here, 1 with another
        ``replay_buffer_class`` (which takes it in ``replay_buffer_kwargs``, if at all) and with ``optimize_memory_usage``
    :param actor_learning_rate: Learning rate of the actor, a number or a schedule; by default ``learning_rate``
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: ``"cosine"``, ``"vp"`` or ``"linear"``
    :param sampler: Reverse process: ``"ddpm_x0"`` clips the estimate of the clean action, ``"ddpm"`` the sample (the paper's),
        ``"ddim"`` is deterministic given the latent
    :param sampling_temperature: Factor on the noise of the reverse process
    :param score_target: Where the critic's gradient is taken and how it is weighted: ``"denoised"`` at the clipped estimate of
        the clean action, ``"noised"`` at the noised action, ``"clean"`` at the replayed action; ``"paper"`` at the noised
        action without sigma_t. The others have sigma_t as weight, and with ``prior_std`` that of its equation
    :param policy_samples: Share of the actor's batch that is taken at the next states, with the actions that the policy drew
        there for the critics' target; the rest are replayed states and actions, which is all of it in the paper (0), and where
        data is cloned (:meth:`load_offline`)
    :param temperature: Temperature lambda of the Boltzmann policy, on the scale where the mean absolute component of the
        critic's action gradient is one
    :param prior_std: Standard deviation of a Gaussian prior over the scaled actions, p(a|s) ~ N(0, prior_std^2) exp(Q/lambda):
        what the policy does where the critic is indifferent. 0.58 is that of uniformly random actions. ``None`` for no prior;
        not used with ``score_target="paper"``
    :param q_grad_coef: Fixed factor on the critic's gradient (the paper's M_q) in place of the scale-free ``temperature``
    :param q_grad_clip: Largest mean absolute component of a state's action gradient, in units of its running mean; larger
        gradients are scaled down. ``None`` for no limit; not used with ``q_grad_coef``
    :param target_policy_noise: Standard deviation of the Gaussian noise added to the next action in the critic's target
    :param gradient_critic: Critics whose gradient the actor follows: ``"online"`` (after their update), ``"target"`` or
        ``"both"``
    :param critic_reduction: How the critics are combined for that gradient: ``"mean"``, ``"min"``, or ``"split"``, where each
        state follows one of them: the gradient of the mean on average, for the cost of one critic
    :param policy_delay: Update the actor once every ``policy_delay`` gradient steps
    :param target_update_interval: Update the target critics once every ``target_update_interval`` gradient steps
    :param best_of_n: Number of actions to draw when acting; the one with the highest minimum over the critics is taken
    :param actor_ema: Whether to act deterministically by a moving average of the actor's weights, which follows them by
        ``tau``, faster at first. What is collected are actions of the actor itself
    :param sampling_steps: Number of steps to act in, at most T, by DDIM on evenly spaced ones of the T; by default the whole
        chain of ``sampler``
    :param target_sampling_steps: The same for the next actions of the critics' target, from which ``policy_samples`` are taken
        too: each step that is left out makes every gradient step cheaper
    :param exploration_noise: Standard deviation of the Gaussian noise added to the scaled actions while collecting; as SB3
        does with ``action_noise``, it is added to the random ones until ``learning_starts`` too
    :param exploration_initial_eps: Probability that an action is uniformly random instead, at step 0; it falls linearly to
        zero. Until ``learning_starts`` all actions are random anyway
    :param exploration_decay_steps: Environment step at which that probability is zero
    :param compile: Compile losses, gradients and the steps of Adam with ``torch.compile``, which needs a C++ compiler, a
        minute or two at the first gradient step, less when the same update was compiled before, and a features extractor
        without parameters. Gradients are not kept in ``parameter.grad`` then
    :param precision: ``"float32"``, or ``"bf16"`` for matrix products with bfloat16 operands: parameters, optimizers and the
        critics' targets stay in float32. Applies to acting too where there are 128 observations or more
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; ``"auto"`` uses the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range; the message names it, its value and what is allowed
    :raises AssertionError: if the actions are no bounded ``Box`` (by Stable-Baselines3)
    """

    own_argument = "score_target"
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

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
        n_steps: int | None = None,
        actor_learning_rate: float | Schedule | None = None,
        diffusion_steps: int = 10,
        noise_schedule: str = "cosine",
        sampler: str = "ddpm_x0",
        sampling_temperature: float = 1.0,
        score_target: str = "denoised",
        policy_samples: float = 0.5,
        temperature: float = 0.1,
        prior_std: float | None = 0.6,
        q_grad_coef: float | None = None,
        q_grad_clip: float | None = 1.0,
        target_policy_noise: float = 0.0,
        gradient_critic: str = "online",
        critic_reduction: str = "mean",
        policy_delay: int = 1,
        target_update_interval: int = 1,
        best_of_n: int = 1,
        actor_ema: bool = True,
        sampling_steps: int | None = None,
        target_sampling_steps: int | None = None,
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
            actor_learning_rate=actor_learning_rate,
            diffusion_steps=diffusion_steps,
            noise_schedule=noise_schedule,
            sampler=sampler,
            sampling_temperature=sampling_temperature,
            target_policy_noise=target_policy_noise,
            exploration_noise=exploration_noise,
            exploration_initial_eps=exploration_initial_eps,
            exploration_decay_steps=exploration_decay_steps,
        )
        self.score_target = score_target
        self.policy_samples = policy_samples
        self.temperature = temperature
        self.prior_std = prior_std
        self.q_grad_coef = q_grad_coef
        self.q_grad_clip = q_grad_clip
        self.gradient_critic = gradient_critic
        self.critic_reduction = critic_reduction
        self.policy_delay = policy_delay
        self.target_update_interval = target_update_interval
        self.best_of_n = best_of_n
        self.actor_ema = actor_ema
        self.sampling_steps = sampling_steps
        self.target_sampling_steps = target_sampling_steps
        self.compile = compile
        self.precision = precision

        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def paper_hyperparameters(total_timesteps: int = 1_000_000) -> dict[str, Any]:
        """
        Constructor arguments of the official QSM code (arXiv 2312.11752, https://github.com/Alescontrela/score_matching_rl at
        2e77893), for ``QSM("MlpPolicy", env, **...)``. The paper uses ``q_grad_coef=120`` for quadruped and humanoid walk.

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
            "n_steps": 1,
            "score_target": "paper",
            "policy_samples": 0.0,
            "prior_std": None,
            "q_grad_coef": 50.0,
            "target_policy_noise": 0.1,
            "gradient_critic": "online",
            "critic_reduction": "mean",
            "exploration_noise": 0.1,
            "exploration_initial_eps": 0.0,
            "actor_ema": False,
            "policy_kwargs": {
                "net_arch": [512, 512],
                "activation_fn": nn.Mish,
                "critic_activation_fn": nn.ReLU,
                "critic_layer_norm": False,
                "xavier": True,
            },
        }

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        for name in ("actor_ema", "compile"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_choice("score_target", SCORE_TARGETS)
        self._check_choice("critic_reduction", CRITIC_REDUCTIONS)
        self._check_choice("gradient_critic", ("both", "online", "target"))
        check_precision(self.device, self.precision)
        if self.compile:
            check_compiler(self.device)
        for name in ("best_of_n", "policy_delay", "target_update_interval"):
            self._check_integer(name, 1)
        if self.n_steps is not None:
            self._check_integer("n_steps", 1)
        if self.replay_buffer_class is None:
            twice = sorted({"n_steps", "gamma"} & set(self.replay_buffer_kwargs))
            if twice:
                raise ValueError(f"Pass {' and '.join(twice)} to QSM itself, not in replay_buffer_kwargs")
        for name in ("sampling_steps", "target_sampling_steps"):
            check_sampling_steps(getattr(self, name), self.diffusion_steps, name)
        self._check_number("temperature", 0.0, strict=True)
        self._check_number("policy_samples", 0.0, high=1.0)
        for name in ("prior_std", "q_grad_coef", "q_grad_clip"):
            if getattr(self, name) is not None:
                self._check_number(name, 0.0, strict=True)

    def _diffusion_kwargs(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("best_of_n", "actor_ema", "sampling_steps")}
        return {**super()._diffusion_kwargs(), **own}

    def _resolve_n_steps(self) -> int:
        """``n_steps``, or its default where there is none."""
        if self.n_steps is not None:
            return self.n_steps
        return 3 if self.replay_buffer_class is None and not self.optimize_memory_usage else 1

    def _setup_model(self) -> None:
        self._check_hyperparameters()
        given = self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs
        self.n_steps = self._resolve_n_steps()
        if self.replay_buffer_class is None:
            self.replay_buffer_class, own = replay_buffer_for(self.observation_space, self.n_steps, self.gamma)
            self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, **own}
            self.n_steps = 1  # nothing is left to SB3, which would warn that it ignores it
        try:
            super()._setup_model()
        finally:
            # The user's arguments are stored as they were given
            self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs = given
        # Running mean of |grad_a Q|; 0 until the first actor update
        self.q_grad_norm = th.zeros((), device=self.device)
        self.actor.precision = self.precision
        self._make_updates()

    def _networks(self) -> list[nn.Module | None]:
        """The networks of the updates."""
        return [self.actor, self.critic, self.critic_target, self.policy.actor_ema]

    def _trained(self) -> list[Any]:
        """The networks, layers and parameters that :meth:`_make_updates` looks up."""
        groups = [*self.actor.optimizer.param_groups, *self.critic.optimizer.param_groups]
        members = map(dict.values, self._members)
        return [*self._networks(), *itertools.chain(*members, *(group["params"] for group in groups))]

    def _update_arguments(self) -> list[Any]:
        """The arguments that :meth:`_make_updates` looks up."""
        return [getattr(self, name) for name in _UPDATE_ARGUMENTS]

    def _make_updates(self) -> None:
        """The steps of the optimizers and of the averages on the networks as they are."""
        if self.compile and any(True for _ in self.actor.features_extractor.parameters()):
            raise ValueError(
                "compile=True needs a features extractor without parameters, like MlpPolicy's, got "
                f"{type(self.actor.features_extractor).__name__}"
            )
        self._members = members_of(network for network in self._networks() if network is not None)
        self._updated, self._updated_by = self._trained(), self._update_arguments()
        self._critic_step = GradientStep(
            CriticLoss(self.actor, self.critic, self.critic_target, self.target_sampling_steps),
            "critic_loss",
            self.critic,
            self.compile,
            self.precision,
        )
        self._actor_step = GradientStep(
            ActorLoss(self.actor, self._gradient_critics(), self.score_target, self.critic_reduction, self.prior_std),
            "actor_loss",
            self.actor,
            self.compile,
            self.precision,
        )
        self._target_update = PolyakUpdate(self.critic, self.critic_target)
        average = self.policy.actor_ema
        self._actor_average = None if average is None else PolyakUpdate(self.actor, average)

    def _gradient_critics(self) -> list[QCritic]:
        """The critics whose action gradient the actor follows."""
        return {
            "online": [self.critic],
            "target": [self.critic_target],
            "both": [self.critic, self.critic_target],
        }[self.gradient_critic]

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates (arXiv 2312.11752, Algorithm 1).

        :param gradient_steps: Number of gradient steps
        :param batch_size: Size of each minibatch
        """
        self._follow_changes()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        metrics: list[Metrics] = []

        for _ in range(gradient_steps):
            self._n_updates += 1
            batch = self._sample_batch(batch_size)
            noise = self._draw_noise(batch)

            critic_metrics, next_actions = self._update_critic(batch, noise)
            metrics.append(critic_metrics)
            if self._n_updates % self.policy_delay == 0:
                metrics.append(self._update_actor(self._actor_batch(batch, next_actions), noise))
                self._update_actor_ema()
            if self._n_updates % self.target_update_interval == 0:
                self._target_update(self.tau)

        self._log(metrics)

    def _follow_changes(self) -> None:
        """Networks, layers, optimizers and arguments may be replaced between two calls of :meth:`train`, as in SB3."""
        trained, other_arguments = self._trained(), self._update_arguments() != self._updated_by
        if other_arguments:
            self._check_hyperparameters()
        if other_arguments or not are_the_same(trained, self._updated):
            if other_arguments or self.actor is not self._updated[0]:
                self.actor.precision = self.precision
            self._make_updates()

    def _target_has_chain_noise(self) -> bool:
        # Fewer steps are DDIM's
        return self.target_sampling_steps is None

    def _transitions(self, batch: ReplayBufferSamples) -> Transitions:
        """The batch with its discounts: for n-step replay gamma**n, less at an earlier termination."""
        discounts = th.tensor(self.gamma, device=self.device) if batch.discounts is None else batch.discounts
        return Transitions(batch.actions, batch.rewards, batch.dones, discounts)

    def _actor_batch(self, batch: ReplayBufferSamples, next_actions: th.Tensor) -> ReplayBufferSamples:
        """The batch with the states and actions that the actor learns from; what it shall clone are the replayed ones."""
        n = 0 if self._behaviour() else round(self.policy_samples * len(next_actions))
        return batch._replace(
            observations=_first_of(n, batch.next_observations, batch.observations),
            actions=_first_of(n, next_actions, batch.actions),
        )

    def _update_critic(self, batch: ReplayBufferSamples, noise: UpdateNoise) -> tuple[Metrics, th.Tensor]:
        """One step on sum_i mean (Q_i(s, a) - y)^2 with y = r + gamma (1 - d) min_i Q_target_i(s', a'); also a'."""
        features = self.critic.features(batch.observations)
        with th.no_grad():
            actor_next_features = self.actor.features(batch.next_observations)
            critic_next_features = self.critic_target.features(batch.next_observations)
        metrics = self._critic_step(
            features,
            actor_next_features,
            critic_next_features,
            self._transitions(batch),
            noise,
            # A number would be compiled into the graph
            th.tensor(float(self.target_policy_noise), device=self.device) if self.target_policy_noise else None,
        )
        self._check_finite("critic_loss", metrics)
        next_actions = metrics.pop("next_actions")
        return metrics, next_actions

    def _update_actor(self, batch: ReplayBufferSamples, noise: UpdateNoise) -> Metrics:
        """One step on mean || eps(s, a_t, t) - eps* ||^2, where eps* is the scaled action gradient of the critics."""
        features = self.actor.features(batch.observations)
        with th.no_grad():
            critic_features = [critic.features(batch.observations) for critic in self._gradient_critics()]
        clip = self.q_grad_clip if self.q_grad_coef is None else None
        behaviour = self._behaviour()
        metrics = self._actor_step(
            features,
            critic_features,
            batch.actions,
            noise,
            self.q_grad_norm,
            th.tensor(float(self.temperature), device=self.device),
            None if self.q_grad_coef is None else th.tensor(float(self.q_grad_coef), device=self.device),
            None if clip is None else th.tensor(float(clip), device=self.device),
            None if behaviour is None else th.tensor(behaviour, device=self.device),
        )
        self.actor.score_network.forget_time_table()
        self._check_finite("actor_loss", metrics)
        self.q_grad_norm.copy_(metrics.pop("q_grad_norm"))
        return metrics

    def _update_actor_ema(self) -> None:
        """One step of the actor's moving average."""
        if self._actor_average is not None:
            self._actor_average(average_weight(self.tau, self._n_updates // self.policy_delay))

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

    def _before_save(self) -> None:
        # What acts is saved; these can be changed on the policy at any time
        self.sampling_steps, self.best_of_n = self.actor.sampling_steps, self.policy.best_of_n
        self.actor_ema = self.policy.actor_ema is not None

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_members",
            "_updated",
            "_updated_by",
            "_critic_step",
            "_actor_step",
            "_target_update",
            "_actor_average",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], ["q_grad_norm"]


def _first_of(n: int, first: Any, rest: Any) -> Any:
    """Tensor, or dictionary of tensors, with the first n rows of one and the other rows of the other."""
    if isinstance(rest, dict):
        return {key: _first_of(n, first[key], value) for key, value in rest.items()}
    return th.cat([first[:n], rest[n:]]) if n else rest
