"""Diffusion actor and critics."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_qsm.common.checks import check_integer
from sb3_qsm.common.performance import autocast
from sb3_qsm.diffusion import SAMPLERS, NoiseSchedule, ScoreNetwork, ddim
from sb3_qsm.diffusion.linear import MIN_BF16, MIN_BF16_ROWS
from sb3_qsm.diffusion.networks import mlp, xavier_init

SelfDiffusionPolicy = TypeVar("SelfDiffusionPolicy", bound="DiffusionPolicy")


def check_sampling_steps(value: Any, diffusion_steps: int, name: str = "sampling_steps") -> None:
    """
    :param value: Number of DDIM steps, or None
    :param diffusion_steps: Number of diffusion steps T
    :param name: Name of the argument
    :raises ValueError: if it is neither None nor an integer from 1 to T
    """
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (integer and 1 <= value <= diffusion_steps):
        raise ValueError(f"{name} must be None or an integer from 1 to diffusion_steps={diffusion_steps}, got {value!r}")


def set_mode(module: nn.Module, training: bool) -> None:
    """
    The same as :meth:`torch.nn.Module.train`, which takes a sixth of the time of acting, in a seventh of its time.

    :param module: A module
    :param training: Whether it and all in it shall be in training mode
    """
    if type(module).train is not nn.Module.train:
        module.train(training)
        return
    module.__dict__["training"] = training
    for child in module._modules.values():
        if child is not None:
            set_mode(child, training)


def are_features(obs: PyTorchObs, network: BaseModel) -> TypeGuard[th.Tensor]:
    """
    :param obs: Observation
    :param network: Actor or critics
    :return: Whether its features are its numbers as they are: SB3's look at the observation and its space and the call of the
        extractor take longer than the conversion to float32, and an update has five of them
    """
    extractor = network.features_extractor
    return (
        type(extractor) is FlattenExtractor
        and type(network).extract_features is BaseModel.extract_features
        and isinstance(network.observation_space, spaces.Box)
        # Images, and tables to be flattened, have more dimensions
        and isinstance(obs, th.Tensor)
        and obs.dim() == 2
        and not (obs.requires_grad or extractor._forward_hooks or extractor._forward_pre_hooks)
    )


class DiffusionActor(BasePolicy):
    """
    Actor that draws its action by the reverse process of a diffusion model over SB3's scaled actions in [-1, 1].

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Hidden layers of the score network
    :param features_extractor: Network to extract features (a CNN for images, a Flatten layer otherwise)
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param layer_norm: Whether to use layer normalisation in the hidden layers
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: ``"vp"``, ``"cosine"`` or ``"linear"``
    :param sampler: ``"ddpm"`` (clips the sample), ``"ddpm_x0"`` (clips the estimate) or ``"ddim"``
    :param sampling_temperature: Factor on the noise of the reverse process
    :param sampling_steps: Number of DDIM steps to act in, at most T; by default the whole chain of ``sampler``
    :param normalize_images: Whether to divide images by 255.0
    :param fourier_dim: Number of Fourier features of the diffusion step
    :param time_arch: Layers of the embedding of the diffusion step
    :param xavier: Whether to start from Xavier-uniform kernels and zero biases, as the official QSM code does, instead of
        PyTorch's initialisation
    :raises ValueError: if the sampler or the schedule is unknown, or a number is out of its range
    """

    action_space: spaces.Box
    features_extractor: BaseFeaturesExtractor
    #: Precision of :meth:`sample`, see :mod:`sb3_qsm.common.performance`; not part of a saved policy
    precision: str = "float32"

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.SiLU,
        layer_norm: bool = False,
        diffusion_steps: int = 10,
        noise_schedule: str = "cosine",
        sampler: str = "ddpm_x0",
        sampling_temperature: float = 1.0,
        sampling_steps: int | None = None,
        normalize_images: bool = True,
        fourier_dim: int = 64,
        time_arch: Sequence[int] = (128, 128),
        xavier: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        if sampler not in SAMPLERS:
            raise ValueError(f"Unknown sampler {sampler!r}; known ones: {', '.join(sorted(SAMPLERS))}")
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.layer_norm = layer_norm
        self.diffusion_steps = diffusion_steps
        self.noise_schedule = noise_schedule
        self.sampler = sampler
        self.sampling_temperature = sampling_temperature
        self.sampling_steps = sampling_steps
        self.fourier_dim = fourier_dim
        self.time_arch = time_arch
        self.xavier = xavier
        self.action_dim = get_action_dim(action_space)

        self.schedule = NoiseSchedule(noise_schedule, diffusion_steps)
        self.score_network = ScoreNetwork(
            features_dim, self.action_dim, net_arch, activation_fn, layer_norm, fourier_dim, time_arch
        )
        if xavier:
            xavier_init(self.score_network)
        self.register_buffer("steps", th.arange(diffusion_steps), persistent=False)
        self.steps: th.Tensor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            features_dim=self.features_dim,
            activation_fn=self.activation_fn,
            features_extractor=self.features_extractor,
            layer_norm=self.layer_norm,
            diffusion_steps=self.diffusion_steps,
            noise_schedule=self.noise_schedule,
            sampler=self.sampler,
            sampling_temperature=self.sampling_temperature,
            sampling_steps=self.sampling_steps,
            fourier_dim=self.fourier_dim,
            time_arch=self.time_arch,
            xavier=self.xavier,
        )
        return data

    @property
    def sampling_steps(self) -> int | None:
        """Number of DDIM steps to act in; None for the whole chain of ``sampler``. It can be changed at any time."""
        return self._sampling_steps

    @sampling_steps.setter
    def sampling_steps(self, value: int | None) -> None:
        check_sampling_steps(value, self.diffusion_steps)
        self._sampling_steps = value

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observation
        :return: Its features, shape ``(batch, features_dim)``
        """
        return obs.float() if are_features(obs, self) else self.extract_features(obs, self.features_extractor)

    def predict_noise(self, features: th.Tensor, actions: th.Tensor, t: th.Tensor) -> th.Tensor:
        """
        Noise prediction eps(s, a_t, t) for a batch of different t.

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Noised actions a_t, shape ``(batch, action_dim)``
        :param t: Diffusion steps in 0..T-1, int64, shape ``(batch,)``
        :return: Predicted noise, shape ``(batch, action_dim)``
        """
        return self.score_network.factored(features, actions, t, self.steps).float()

    def sample(
        self, features: th.Tensor, x_last: th.Tensor, noise: th.Tensor | None, sampling_steps: int | None = None
    ) -> th.Tensor:
        """
        Run the reverse process with the given noise. Meant to be called without gradient.

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param x_last: Latent a_T, shape ``(batch, action_dim)``
        :param noise: Noise of the chain, shape ``(T, batch, action_dim)``; None for a chain without noise
        :param sampling_steps: Number of DDIM steps to take, without the noise, in place of the whole chain of ``sampler``
        :return: Scaled actions in [-1, 1], shape ``(batch, action_dim)``
        """
        # With fewer rows float32 is faster. They are asked for last: a symbol, maybe, while a graph is made
        fewest = MIN_BF16 if x_last.is_cuda or th.compiler.is_compiling() else MIN_BF16_ROWS
        precision = "float32" if self.precision == "float32" or x_last.shape[0] < fewest else self.precision
        with autocast(x_last.device, precision):
            predict_noise = self.score_network.denoiser(features, self.steps)
            if sampling_steps is not None:
                return ddim(predict_noise, self.schedule, x_last, sampling_steps=sampling_steps)
            return SAMPLERS[self.sampler](predict_noise, self.schedule, x_last, noise, self.sampling_temperature)

    def draw_latents(self, batch_size: int, deterministic: bool = False, n: int = 1) -> tuple[th.Tensor, th.Tensor | None]:
        """
        What :meth:`sample` needs for n actions in each observation: latents and the noise of the chain.

        Deterministic acting starts every observation from the same n latents, of which the first is the mean latent, zero,
        and leaves the chain's noise out, so that the action depends on the observation alone.

        :param batch_size: Number of observations
        :param deterministic: Whether to use the fixed latents
        :param n: Number of actions for each observation
        :return: Latents of shape ``(n * batch, action_dim)``, all observations for the first latent first, and noise of shape
            ``(T, n * batch, action_dim)`` or None
        """
        if deterministic and n == 1:
            return th.zeros(batch_size, self.action_dim, device=self.device), None
        if deterministic:
            # A constant, drawn by a generator of its own: acting must not touch the global ones
            latents = th.randn(n, 1, self.action_dim, generator=th.Generator().manual_seed(0))
            latents[0] = 0.0
            return latents.to(self.device).expand(n, batch_size, self.action_dim).reshape(n * batch_size, -1), None
        if self.sampling_steps is not None:
            return th.randn(n * batch_size, self.action_dim, device=self.device), None
        noise = th.randn(self.diffusion_steps + 1, n * batch_size, self.action_dim, device=self.device)
        return noise[0], noise[1:]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: Observation
        :param deterministic: Whether the action shall depend on the observation alone
        :return: Scaled actions in [-1, 1], shape ``(batch, action_dim)``
        """
        return self.act(self.features(obs), deterministic)

    def act(self, features: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """
        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param deterministic: Whether the action shall depend on the observation alone
        :return: Scaled actions in [-1, 1], shape ``(batch, action_dim)``
        """
        return self.sample(features, *self.draw_latents(features.shape[0], deterministic), self.sampling_steps)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.forward(observation, deterministic)


class QCritic(ContinuousCritic):
    """
    SB3's critics, with optional layer normalisation, the initialisation of the official QSM code and an entry that takes
    features instead of observations.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to divide images by 255.0
    :param n_critics: Number of critics
    :param share_features_extractor: Whether the features extractor belongs to the actor, which then alone trains it
    :param layer_norm: Whether to use layer normalisation in the hidden layers
    :param xavier: Whether to start from Xavier-uniform kernels and zero biases
    :param output_dim: Number of outputs of each critic
    :raises ValueError: if there are no critics
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.SiLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        layer_norm: bool = False,
        xavier: bool = True,
        output_dim: int = 1,
    ) -> None:
        check_integer("n_critics", n_critics, 1)
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images,
            0,  # the networks are made below
            share_features_extractor,
        )
        self.n_critics = n_critics
        input_dim = features_dim + get_action_dim(action_space)
        for i in range(n_critics):
            network = mlp([input_dim, *net_arch, output_dim], activation_fn, layer_norm)
            if xavier:
                xavier_init(network)
            self.add_module(f"qf{i}", network)
            self.q_networks.append(network)

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observation
        :return: Its features, shape ``(batch, features_dim)``; without gradient when the extractor is the actor's
        """
        if are_features(obs, self):
            return obs.float()
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Scaled actions, shape ``(batch, action_dim)``
        :return: Q-values of all critics, shape ``(n_critics, batch)``
        """
        x = th.cat([features, actions], dim=1)
        # Values and what is computed from them are float32 also when the networks are not
        return th.stack([network(x).squeeze(-1) for network in self.q_networks]).float()

    def q_values_in_turns(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Each row by one of the n critics: rows 0, n, 2n, ... by the first, rows 1, n + 1, ... by the second.

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Scaled actions, shape ``(batch, action_dim)``
        :return: Q-values, those of the first critic first, shape ``(1, batch)``
        """
        x, n = th.cat([features, actions], dim=1), self.n_critics
        return th.cat([network(x[i::n]).squeeze(-1) for i, network in enumerate(self.q_networks)]).unsqueeze(0).float()

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: Observation
        :param actions: Scaled actions, shape ``(batch, action_dim)``
        :return: One tensor of Q-values a critic, shape ``(batch, 1)``
        """
        return tuple(self.q_values(self.features(obs), actions).unsqueeze(-1))


class DiffusionPolicy(BasePolicy):
    """
    Policy with a diffusion actor, critics and target critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule of the critics, and of the actor unless it has its own
    :param net_arch: Hidden layers, a list for both or ``dict(pi=[...], qf=[...])``; two layers of 256 by default
    :param activation_fn: Activation of the score network
    :param critic_activation_fn: Activation of the critics
    :param layer_norm: Whether to use layer normalisation in the hidden layers of the score network
    :param critic_layer_norm: Whether to use layer normalisation in the hidden layers of the critics, which keeps their
        regression on their own values from oscillating
    :param features_extractor_class: Features extractor; by default the one that fits the policy
    :param features_extractor_kwargs: Keyword arguments of the features extractor
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: Optimizer, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Keyword arguments of the optimizers except the learning rate
    :param n_critics: Number of critics
    :param share_features_extractor: Whether the critics use the actor's features extractor, trained by the actor's loss only
    :param diffusion_steps: Number of diffusion steps T
    :param noise_schedule: ``"vp"``, ``"cosine"`` or ``"linear"``
    :param sampler: ``"ddpm"`` (clips the sample), ``"ddpm_x0"`` (clips the estimate) or ``"ddim"``
    :param sampling_temperature: Factor on the noise of the reverse process
    :param sampling_steps: Number of DDIM steps to act in, at most T; by default the whole chain of ``sampler``
    :param best_of_n: Number of actions to draw; the one with the highest minimum over the critics is taken
    :param actor_ema: Whether there is a moving average of the actor, which then acts deterministically
    :param fourier_dim: Number of Fourier features of the diffusion step
    :param time_arch: Layers of the embedding of the diffusion step
    :param xavier: Whether to start from Xavier-uniform kernels and zero biases, as the official QSM code does, instead of
        PyTorch's initialisation
    :raises ValueError: if the sampler or the schedule is unknown, or a number is out of its range
    """

    #: Features extractor when none is given
    default_features_extractor_class: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    actor: DiffusionActor
    #: Moving average of the actor, or None
    actor_ema: DiffusionActor | None
    critic: QCritic
    critic_target: QCritic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        critic_activation_fn: type[nn.Module] = nn.SiLU,
        layer_norm: bool = False,
        critic_layer_norm: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        diffusion_steps: int = 10,
        noise_schedule: str = "cosine",
        sampler: str = "ddpm_x0",
        sampling_temperature: float = 1.0,
        sampling_steps: int | None = None,
        best_of_n: int = 1,
        actor_ema: bool = False,
        fourier_dim: int = 64,
        time_arch: Sequence[int] = (128, 128),
        xavier: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        for name, activation in (("activation_fn", activation_fn), ("critic_activation_fn", critic_activation_fn)):
            if isinstance(activation, (nn.Module, str)):
                example = type(activation).__name__ if isinstance(activation, nn.Module) else "SiLU"
                raise ValueError(f"{name} must be a class, such as nn.{example}, got {activation!r}")
        if net_arch is None:
            net_arch = [256, 256]
        actor_arch, critic_arch = get_actor_critic_arch(net_arch)
        for size in (*actor_arch, *critic_arch, *time_arch):
            check_integer("A layer in net_arch or time_arch", size, 1)
        check_integer("fourier_dim", fourier_dim, 2)
        if fourier_dim % 2:
            raise ValueError(f"fourier_dim must be even, for a sine and a cosine of each frequency, got {fourier_dim}")
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.critic_activation_fn = critic_activation_fn
        self.layer_norm = layer_norm
        self.critic_layer_norm = critic_layer_norm
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.best_of_n = best_of_n
        self.has_actor_ema = actor_ema
        self.xavier = xavier
        shared = {
            "observation_space": observation_space,
            "action_space": action_space,
            "normalize_images": normalize_images,
            "xavier": xavier,
        }
        self.diffusion_kwargs = {
            "diffusion_steps": diffusion_steps,
            "noise_schedule": noise_schedule,
            "sampler": sampler,
            "sampling_temperature": sampling_temperature,
            "sampling_steps": sampling_steps,
            "fourier_dim": fourier_dim,
            "time_arch": time_arch,
        }
        self.actor_kwargs = {
            **shared,
            "net_arch": actor_arch,
            "activation_fn": activation_fn,
            "layer_norm": layer_norm,
            **self.diffusion_kwargs,
        }
        self.critic_kwargs = {
            **shared,
            "net_arch": critic_arch,
            "activation_fn": critic_activation_fn,
            "layer_norm": critic_layer_norm,
            "n_critics": n_critics,
            "share_features_extractor": share_features_extractor,
        }
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in self.actor.parameters()):
            raise ValueError(
                f"features_extractor_class {type(self.actor.features_extractor).__name__} has lazy layers, whose parameters "
                "are not made yet and cannot be copied to target networks: give them their sizes"
            )
        self.actor_ema = copy.deepcopy(self.actor).requires_grad_(False).eval() if self.has_actor_ema else None
        self.actor.optimizer = self._make_optimizer(self.actor.parameters(), lr_schedule)

        self.critic, self.critic_target = self.make_critics(lr_schedule)

    def _make_optimizer(self, parameters: Iterable[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and "foreach" not in kwargs:
            kwargs.setdefault("fused", True)  # one kernel for all parameters, also on CPU
        optimizer_class: Callable[..., th.optim.Optimizer] = self.optimizer_class
        return optimizer_class(parameters, lr=lr_schedule(1), **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # not needed to load the policy alone
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            critic_activation_fn=self.critic_activation_fn,
            layer_norm=self.layer_norm,
            critic_layer_norm=self.critic_layer_norm,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            n_critics=self.n_critics,
            share_features_extractor=self.share_features_extractor,
            best_of_n=self.best_of_n,
            actor_ema=self.actor_ema is not None,
            xavier=self.xavier,
            **(self.diffusion_kwargs | {"sampling_steps": self.actor.sampling_steps}),
        )
        return data

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Copy parameters and buffers, see :meth:`torch.nn.Module.load_state_dict`. The moving average of the actor is left out
        where this policy has none; where the state has none, it begins at the actor.

        :param state_dict: Parameters and buffers by their names
        :param strict: Whether all others must be there, and no more
        :param assign: Whether to take over the tensors instead of copying them
        :return: Names that are missing and that are not expected
        """
        own = {name for name in state_dict if name.startswith("actor_ema.")}
        left_out = own if self.actor_ema is None else set()
        state = OrderedDict((name, value) for name, value in state_dict.items() if name not in left_out)
        whole = all(f"actor.{name}" in state for name in self.actor.state_dict())
        if self.actor_ema is not None and not own and whole:
            # Copied: taken over, they would be one network
            state.update((f"actor_ema.{name}", state[f"actor.{name}"].clone()) for name in self.actor.state_dict())
        if hasattr(state_dict, "_metadata"):
            state._metadata = state_dict._metadata  # type: ignore[attr-defined]
        return super().load_state_dict(state, strict, assign)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> DiffusionActor:
        """
        :param features_extractor: Features extractor; a new one by default
        :return: A new actor
        """
        return DiffusionActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> QCritic:
        """
        :param features_extractor: Features extractor; a new one by default
        :return: New critics
        """
        return QCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def make_critics(self, lr_schedule: Schedule) -> tuple[QCritic, QCritic]:
        """
        :param lr_schedule: Learning rate schedule
        :return: New critics with their optimizer, and target critics that are equal to them
        """
        critic = self.make_critic(self.actor.features_extractor if self.share_features_extractor else None)
        critic.optimizer = self._make_optimizer(
            # A shared extractor is trained by the actor's loss
            [
                param
                for name, param in critic.named_parameters()
                if not (self.share_features_extractor and name.startswith("features_extractor."))
            ],
            lr_schedule,
        )
        # The target never shares its extractor, it follows the critic's
        critic_target = self.make_critic(None)
        critic_target.load_state_dict(critic.state_dict())
        critic_target.requires_grad_(False)
        critic_target.set_training_mode(False)
        return critic, critic_target

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: Observation
        :param deterministic: Whether the action shall depend on the observation alone
        :return: Scaled actions in [-1, 1], shape ``(batch, action_dim)``
        """
        return self._predict(obs, deterministic)

    def acting(self, deterministic: bool) -> DiffusionActor:
        """
        :param deterministic: Whether to act deterministically
        :return: The actor that does
        """
        if not deterministic or self.actor_ema is None:
            return self.actor
        for name in ("sampling_steps", "precision"):
            # They may be changed on the actor at any time
            if getattr(self.actor_ema, name) != getattr(self.actor, name):
                setattr(self.actor_ema, name, getattr(self.actor, name))
        return self.actor_ema

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        actor = self.acting(deterministic)
        if self.best_of_n > 1:
            features = actor.features(observation)
            latents = actor.draw_latents(features.shape[0], deterministic, self.best_of_n)
            return self._best_of_n(actor, observation, features, *latents)
        own = type(actor).forward is not DiffusionActor.forward or actor._forward_hooks or actor._forward_pre_hooks
        if th.is_grad_enabled() or own:
            actions: th.Tensor = actor(observation, deterministic)
            return actions
        features = actor.features(observation)
        # Operations cost less without autograd's bookkeeping; the copy is an ordinary tensor again. The features extractor may
        # keep tensors of its own for the updates, so it is left out
        with th.inference_mode():
            actions = actor.act(features, deterministic)
        return actions.clone()

    def _best_of_n(
        self, actor: DiffusionActor, observation: PyTorchObs, features: th.Tensor, x_last: th.Tensor, noise: th.Tensor | None
    ) -> th.Tensor:
        """Of ``best_of_n`` actions for each observation, made of the given noise, the one with the highest min_i Q_i(s, a)."""
        n, batch_size = self.best_of_n, features.shape[0]
        candidates = actor.sample(features.repeat(n, 1), x_last, noise, actor.sampling_steps)
        q_values = self.critic.q_values(self.critic.features(observation).repeat(n, 1), candidates).amin(dim=0)
        best = q_values.view(n, batch_size).argmax(dim=0)
        return candidates.view(n, batch_size, -1)[best, th.arange(batch_size, device=best.device)]

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the actor and the critics in training or evaluation mode; the target critics stay in evaluation mode.

        :param mode: True for training mode
        """
        set_mode(self.actor, mode)
        set_mode(self.critic, mode)
        self.training = mode

    def train(self: SelfDiffusionPolicy, mode: bool = True) -> SelfDiffusionPolicy:
        """
        Put all networks in training or evaluation mode, but what follows others by averages, which stays in evaluation mode.

        :param mode: True for training mode
        :return: The policy
        """
        super().train(mode)
        for network in self._averages():
            network.eval()
        return self

    def _averages(self) -> list[nn.Module]:
        """Networks that are averages of others, and are not trained."""
        return [network for network in (self.actor_ema, self.critic_target) if network is not None]

    def unscale_action(self, scaled_action: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """
        Rescale actions from [-1, 1] to the bounds of the action space, which rounding does not leave.

        :param scaled_action: Actions
        :return: Actions in the action space
        """
        space = self.action_space
        assert isinstance(space, spaces.Box)
        actions: np.ndarray[Any, Any] = np.minimum(np.maximum(super().unscale_action(scaled_action), space.low), space.high)
        return actions


class DiffusionCnnPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for images: the features extractor is :class:`NatureCNN` by default."""

    default_features_extractor_class = NatureCNN


class DiffusionMultiInputPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for dictionaries: the features extractor is :class:`CombinedExtractor` by default."""

    default_features_extractor_class = CombinedExtractor
