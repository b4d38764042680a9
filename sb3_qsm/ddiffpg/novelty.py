"""Intrinsic reward for reaching what is new."""

from collections.abc import Sequence

import torch as th
from torch import nn

from sb3_qsm.diffusion.networks import mlp

#: Largest novelty, where that of the first positions is one on average
MAX_NOVELTY = 10.0


class RandomNetworkDistillation(nn.Module):
    """
    Novelty of a position: the error of a network that learns to predict a fixed random one (Burda et al., arXiv 1810.12894).
    It falls where positions are visited again. Positions enter with sines and cosines of several frequencies, so that the
    network can tell near ones apart.

    :param position_dim: Size of a position
    :param n_frequencies: Number of frequencies, each twice the one before
    :param net_arch: Hidden layers
    :param output_dim: Size of what is predicted
    """

    def __init__(
        self, position_dim: int, n_frequencies: int = 6, net_arch: Sequence[int] = (128, 128), output_dim: int = 64
    ) -> None:
        super().__init__()
        widths = [position_dim * (1 + 2 * n_frequencies), *net_arch, output_dim]
        self.target = mlp(widths, nn.SiLU).requires_grad_(False)
        self.predictor = mlp(widths, nn.SiLU)
        self.register_buffer("frequencies", 2.0 ** th.arange(n_frequencies), persistent=False)
        self.register_buffer("mean", th.zeros(position_dim))
        self.register_buffer("std", th.ones(position_dim))
        self.register_buffer("scale", th.ones(()))
        self.register_buffer("fitted", th.zeros((), dtype=th.bool))
        self.frequencies: th.Tensor
        self.mean: th.Tensor
        self.std: th.Tensor
        self.scale: th.Tensor
        self.fitted: th.Tensor

    @th.no_grad()
    def fit(self, positions: th.Tensor) -> None:
        """
        Choose the scales of positions and of the novelty, once and for all: the novelty of these positions is one on average.

        :param positions: Positions, shape ``(n, position_dim)``
        """
        self.mean.copy_(positions.mean(dim=0))
        self.std.copy_(positions.std(dim=0, correction=0).clamp_min(1e-3))
        self.scale.copy_(self(positions).mean() * self.scale)
        self.fitted.fill_(True)

    def error(self, positions: th.Tensor) -> th.Tensor:
        """
        :param positions: Positions, shape ``(batch, position_dim)``
        :return: Error of the prediction, shape ``(batch, output_dim)``
        """
        x = (positions - self.mean) / self.std
        phase = (x.unsqueeze(-1) * self.frequencies).flatten(1)
        features = th.cat([x, phase.sin(), phase.cos()], dim=1)
        prediction: th.Tensor = self.predictor(features)
        target: th.Tensor = self.target(features)
        return prediction - target

    def forward(self, positions: th.Tensor) -> th.Tensor:
        """
        :param positions: Positions, shape ``(batch, position_dim)``
        :return: Their novelty, at most :data:`MAX_NOVELTY`, shape ``(batch,)``
        """
        novelty: th.Tensor = th.linalg.vector_norm(self.error(positions), dim=1) / self.scale
        # What is far from all that the scales were taken from must not outweigh the task's own reward
        return novelty.clamp_max(MAX_NOVELTY)


def noveld_reward(novelty: th.Tensor, next_novelty: th.Tensor, scale: float = 0.01, alpha: float = 0.5) -> th.Tensor:
    """
    Intrinsic reward for a step into something newer (NovelD, Zhang et al., NeurIPS 2021, equation 2).

    :param novelty: Novelty n(s), shape ``(batch,)``
    :param next_novelty: Novelty n(s'), same shape
    :param scale: Factor
    :param alpha: Share of the novelty of the state that is left
    :return: scale * max(n(s') - alpha n(s), 0)
    """
    return scale * (next_novelty - alpha * novelty).clamp_min(0.0)
