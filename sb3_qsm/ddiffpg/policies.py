"""Policies with modes: an embedding tells the actor which one to follow, and each has critics of its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_qsm.common.policies import DiffusionActor, DiffusionPolicy, QCritic, set_mode
from sb3_qsm.ddiffpg.modes import Inheritance


class ModeActor(DiffusionActor):
    """
    Diffusion actor whose score network gets the embedding of a mode with the features. The embeddings are random and fixed;
    zero stands for any mode.

    :param args: Arguments of :class:`DiffusionActor`
    :param features_dim: Number of features of the observation
    :param n_modes: Number of modes
    :param mode_embedding_dim: Size of the embeddings
    :param mode: Mode to act in, None for any
    :param kwargs: Arguments of :class:`DiffusionActor`
    """

    mode_embeddings: th.Tensor

    def __init__(
        self,
        *args: Any,
        features_dim: int,
        n_modes: int = 0,
        mode_embedding_dim: int = 5,
        mode: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **(kwargs | {"features_dim": features_dim + mode_embedding_dim}))
        self.features_dim = features_dim
        self.mode_embedding_dim = mode_embedding_dim
        # The first row is the exploration's
        self.register_buffer("mode_embeddings", th.randn(n_modes + 1, mode_embedding_dim))
        #: Mode to act in, None for any
        self.mode = mode
        self._context: th.Tensor | None = None

    @property
    def n_modes(self) -> int:
        """Number of modes."""
        return len(self.mode_embeddings) - 1

    def mode_context(self, mode: int | None) -> th.Tensor:
        """
        :param mode: Index of a mode, None for any
        :return: Its embedding, shape ``(1, mode_embedding_dim)``; as long as there are no modes, the exploration's
        """
        if mode is None and self.n_modes > 0:
            return th.zeros_like(self.mode_embeddings[:1])
        return self.mode_embeddings[[0 if mode is None else mode + 1]]

    @contextlib.contextmanager
    def following(self, context: th.Tensor) -> Iterator[None]:
        """
        Act by the given embeddings instead of :attr:`mode`'s.

        :param context: Embeddings, shape ``(1 or batch, mode_embedding_dim)``
        """
        self._context = context
        try:
            yield
        finally:
            self._context = None

    def features(self, obs: PyTorchObs, context: th.Tensor | None = None) -> th.Tensor:
        """
        :param obs: Observation
        :param context: Embeddings, shape ``(1 or batch, mode_embedding_dim)``; by default those to act by
        :return: Features with the embedding, shape ``(batch, features_dim + mode_embedding_dim)``
        """
        features = super().features(obs)
        if context is None:
            context = self.mode_context(self.mode) if self._context is None else self._context
        return th.cat([features, context.expand(features.shape[0], -1)], dim=1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(n_modes=self.n_modes, mode_embedding_dim=self.mode_embedding_dim, mode=self.mode)
        return data


class CategoricalCritic(QCritic):
    """
    Critics that predict a distribution of the return over fixed atoms (C51, arXiv 1707.06887).

    :param args: Arguments of :class:`QCritic`
    :param n_atoms: Number of atoms
    :param v_min: Smallest return
    :param v_max: Largest return
    :param kwargs: Arguments of :class:`QCritic`
    """

    support: th.Tensor

    def __init__(self, *args: Any, n_atoms: int, v_min: float, v_max: float, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"output_dim": n_atoms}))
        self.register_buffer("support", th.linspace(v_min, v_max, n_atoms), persistent=False)

    def logits(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Scaled actions, shape ``(batch, action_dim)``
        :return: Logits of the atoms, shape ``(n_critics, batch, n_atoms)``
        """
        x = th.cat([features, actions], dim=1)
        return th.stack([network(x) for network in self.q_networks]).float()

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Scaled actions, shape ``(batch, action_dim)``
        :return: Expected returns of all critics, shape ``(n_critics, batch)``
        """
        return self.logits(features, actions).softmax(dim=-1) @ self.support


class StackedCritics:
    """
    The smallest Q-values of several critics, each at its own states: for every layer one product of stacks of matrices, which
    is several times faster than one product for each of many small networks. The weights are copied, without gradient.

    :param critics: Critics of the same architecture
    :param features: Features of the states of each, shape ``(size, features_dim)``
    """

    def __init__(self, critics: Sequence[QCritic], features: Sequence[th.Tensor]) -> None:
        self.shape = (len(critics), critics[0].n_critics)
        self.sizes = [len(part) for part in features]
        self.features = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
        self.support = critics[0].support if isinstance(critics[0], CategoricalCritic) else None
        networks: list[Any] = [network for critic in critics for network in critic.q_networks]
        with th.no_grad():
            self.layers = [
                (
                    layers[0],
                    [
                        th.stack([getattr(layer, name) for layer in layers]).unsqueeze(1 if name == "bias" else -1)
                        for name, _ in layers[0].named_parameters()
                    ],
                )
                for layers in zip(*networks, strict=True)
            ]

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: Scaled actions, one group after the other, shape ``(batch, action_dim)``
        :return: min_i Q_i of the group's critics, shape ``(batch,)``
        """
        parts = nn.utils.rnn.pad_sequence(list(th.split(actions, self.sizes)), batch_first=True)
        x = th.cat([self.features, parts], dim=-1).repeat_interleave(self.shape[1], dim=0)
        for layer, parameters in self.layers:
            if isinstance(layer, nn.Linear):
                x = th.baddbmm(parameters[1], x, parameters[0].squeeze(-1).transpose(1, 2))
            elif isinstance(layer, nn.LayerNorm):
                x = nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
                x = x * parameters[0].transpose(1, 2) + parameters[1]
            else:
                x = layer(x)
        x = x.squeeze(-1) if self.support is None else x.softmax(dim=-1) @ self.support
        q_values = x.view(*self.shape, -1).amin(dim=1)
        return th.cat([part[:size] for part, size in zip(q_values, self.sizes, strict=True)])


class ModePolicy(DiffusionPolicy):
    """
    :class:`DiffusionPolicy` with modes. ``critic`` and ``critic_target`` are those of the exploration; ``mode_critics`` and
    ``mode_critic_targets`` have one of each for every mode.

    :param args: Arguments of :class:`DiffusionPolicy`
    :param n_modes: Number of modes
    :param mode_embedding_dim: Size of the embeddings of the modes
    :param mode: Mode to act in, None for any
    :param categorical: Atoms of categorical critics, ``dict(n_atoms=..., v_min=..., v_max=...)``; None for plain ones
    :param kwargs: Arguments of :class:`DiffusionPolicy`
    """

    actor: ModeActor

    def __init__(
        self,
        *args: Any,
        n_modes: int = 0,
        mode_embedding_dim: int = 5,
        mode: int | None = None,
        categorical: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.n_initial_modes = n_modes
        self.mode_embedding_dim = mode_embedding_dim
        self.initial_mode = mode
        self.categorical = categorical
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        pairs = [self.make_critics(lr_schedule) for _ in range(self.n_initial_modes)]
        self.mode_critics = nn.ModuleList(pair[0] for pair in pairs)
        self.mode_critic_targets = nn.ModuleList(pair[1] for pair in pairs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        own = {"n_modes": self.n_modes, "mode": self.actor.mode}
        data.update(**own, mode_embedding_dim=self.mode_embedding_dim, categorical=self.categorical)
        return data

    @property
    def n_modes(self) -> int:
        """Number of modes."""
        return self.actor.n_modes

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> ModeActor:
        """
        :param features_extractor: Features extractor; a new one by default
        :return: A new actor
        """
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        own: dict[str, Any] = {"n_modes": self.n_initial_modes, "mode": self.initial_mode}
        return ModeActor(**kwargs, **own, mode_embedding_dim=self.mode_embedding_dim).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> QCritic:
        """
        :param features_extractor: Features extractor; a new one by default
        :return: New critics
        """
        if self.categorical is None:
            return super().make_critic(features_extractor)
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return CategoricalCritic(**kwargs, **self.categorical).to(self.device)

    def group_critics(self) -> list[tuple[QCritic, QCritic]]:
        """Critics and target critics of the exploration, and of each mode."""
        modes = zip(self.mode_critics, self.mode_critic_targets, strict=True)
        return [(self.critic, self.critic_target), *modes]  # type: ignore[list-item]

    def inherit(self, parents: Sequence[Inheritance]) -> None:
        """
        Replace the modes. One that continues an old mode keeps its critics, their optimizer and its embedding; others get
        copies of the critics of their parent, or of the exploration's, and an embedding of their own.

        :param parents: Where each new mode comes from
        """
        old = self.group_critics()
        pairs, embeddings = [], [self.actor.mode_embeddings[0]]
        learning_rate = self.critic.optimizer.param_groups[0]["lr"]
        for parent, continues in parents:
            group = 0 if parent is None else parent + 1
            if parent is not None and continues:
                pairs.append(old[group])
                embeddings.append(self.actor.mode_embeddings[group])
                continue
            copies = self.make_critics(lambda _: learning_rate)
            for copy, original in zip(copies, old[group], strict=True):
                copy.load_state_dict(original.state_dict())
            pairs.append(copies)
            embeddings.append(th.randn_like(embeddings[0]))
        self.mode_critics = nn.ModuleList(pair[0] for pair in pairs)
        self.mode_critic_targets = nn.ModuleList(pair[1] for pair in pairs)
        self.actor.mode_embeddings = th.stack(embeddings)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the actor and the critics in training or evaluation mode; the target critics stay in evaluation mode.

        :param mode: True for training mode
        """
        super().set_training_mode(mode)
        set_mode(self.mode_critics, mode)

    def _averages(self) -> list[nn.Module]:
        return [*super()._averages(), self.mode_critic_targets]


class ModeCnnPolicy(ModePolicy):
    """:class:`ModePolicy` for images: the features extractor is :class:`NatureCNN` by default."""

    default_features_extractor_class = NatureCNN


class ModeMultiInputPolicy(ModePolicy):
    """:class:`ModePolicy` for dictionaries: the features extractor is :class:`CombinedExtractor` by default."""

    default_features_extractor_class = CombinedExtractor


MlpPolicy = ModePolicy
CnnPolicy = ModeCnnPolicy
MultiInputPolicy = ModeMultiInputPolicy
