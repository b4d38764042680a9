"""Losses and targets of the critic and of the score network, as pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_qsm.common.policies import DiffusionActor, QCritic

Metrics = dict[str, th.Tensor]


class UpdateNoise(NamedTuple):
    """
    Every random number of one gradient step besides the choice of the batch.

    :param latent: Latent a_T of the next action, shape ``(batch, action_dim)``
    :param chain: Noise of its reverse process, shape ``(T, batch, action_dim)``; None where that has none
    :param target: Target-policy noise, standard normal, shape ``(batch, action_dim)``
    :param eps: Noise of the forward process, shape ``(batch, action_dim)``
    :param t: Diffusion steps in 0..T-1, int64, shape ``(batch,)``
    """

    latent: th.Tensor
    chain: th.Tensor | None
    target: th.Tensor
    eps: th.Tensor
    t: th.Tensor


class Transitions(NamedTuple):
    """
    A replayed batch; the observations have gone through the features extractors.

    :param actions: Scaled actions, shape ``(batch, action_dim)``
    :param rewards: Rewards, shape ``(batch, 1)``
    :param dones: Terminations, shape ``(batch, 1)``
    :param discounts: gamma, or gamma to the n, shape ``(batch, 1)``
    """

    actions: th.Tensor
    rewards: th.Tensor
    dones: th.Tensor
    discounts: th.Tensor | float


def td_target(rewards: th.Tensor, dones: th.Tensor, discounts: th.Tensor | float, next_q_values: th.Tensor) -> th.Tensor:
    r"""
    One-step target of clipped double Q-learning, :math:`y = r + \gamma (1 - d) \min_i \bar Q_i(s', a')` (arXiv 2312.11752,
    Algorithm 1). ``dones`` is 1 at terminations only: SB3's replay buffers clear it at time-outs, which bootstrap.

    :param rewards: Rewards, shape ``(batch, 1)``
    :param dones: Terminations, shape ``(batch, 1)``
    :param discounts: Discount, a number or shape ``(batch, 1)`` (gamma to the n for n-step returns)
    :param next_q_values: Target critics at the next action, shape ``(n_critics, batch)``
    :return: Targets, shape ``(batch,)``
    """
    next_values = next_q_values.amin(dim=0).unsqueeze(-1)
    return (rewards + (1.0 - dones) * discounts * next_values).squeeze(-1)


def critic_loss(q_values: th.Tensor, target_q_values: th.Tensor) -> th.Tensor:
    """
    Mean squared error of each critic, summed over the critics.

    :param q_values: Critics at the replayed action, shape ``(n_critics, batch)``
    :param target_q_values: Their common target, shape ``(batch,)``
    :return: Scalar loss
    """
    return (q_values - target_q_values).square().mean(dim=1).sum()


def noise_prediction_loss(eps: th.Tensor, eps_target: th.Tensor) -> th.Tensor:
    """
    Mean squared error of the noise prediction over the batch and the action dimensions.

    :param eps: Predicted noise, shape ``(batch, action_dim)``
    :param eps_target: Its target, same shape
    :return: Scalar loss
    """
    return (eps - eps_target).square().mean()


def action_gradient(q_fn: Callable[[th.Tensor], th.Tensor], actions: th.Tensor) -> th.Tensor:
    """
    Gradient of a Q-function in the action.

    :param q_fn: From actions of shape ``(batch, action_dim)`` to Q-values of shape ``(batch,)``, row by row
    :param actions: Where to take the gradient
    :return: The gradient, without a graph, shape ``(batch, action_dim)``
    """
    if th.compiler.is_compiling():
        compiled: th.Tensor = th.func.grad(lambda a: q_fn(a).sum())(actions.detach())
        return compiled
    with th.enable_grad():
        actions = actions.detach().requires_grad_(True)
        (gradient,) = th.autograd.grad(q_fn(actions).sum(), actions)
    return gradient


class CriticLoss(nn.Module):
    r"""
    Regression of the critics on :math:`y = r + \gamma (1 - d) \min_i \bar Q_i(s', a')` with :math:`a' \sim \pi(s')`.

    :param actor: Diffusion actor
    :param critic: Critics
    :param critic_target: Target critics
    :param sampling_steps: Number of DDIM steps in which a' is drawn, at most T; None for the actor's whole chain
    """

    def __init__(
        self, actor: DiffusionActor, critic: QCritic, critic_target: QCritic, sampling_steps: int | None = None
    ) -> None:
        super().__init__()
        self.actor, self.critic, self.critic_target = actor, critic, critic_target
        self.sampling_steps = sampling_steps

    @th.no_grad()
    def next_actions(
        self, next_features: th.Tensor, noise: UpdateNoise, target_policy_noise: th.Tensor | float | None = None
    ) -> th.Tensor:
        """
        a' ~ pi(s') plus target-policy noise, clipped to [-1, 1].

        :param next_features: The actor's features of s', shape ``(batch, features_dim)``
        :param noise: Random numbers of the update
        :param target_policy_noise: Standard deviation of the noise on the action, None for no noise
        :return: Scaled actions, shape ``(batch, action_dim)``
        """
        next_actions = self.actor.sample(next_features, noise.latent, noise.chain, self.sampling_steps)
        if target_policy_noise is not None:
            next_actions = (next_actions + target_policy_noise * noise.target).clamp(-1.0, 1.0)
        return next_actions

    @th.no_grad()
    def targets(self, next_features: th.Tensor, next_actions: th.Tensor, batch: Transitions) -> th.Tensor:
        """
        :param next_features: The target critics' features of s', shape ``(batch, features_dim)``
        :param next_actions: a', shape ``(batch, action_dim)``
        :param batch: Replayed batch
        :return: y, shape ``(batch,)``
        """
        next_q_values = self.critic_target.q_values(next_features, next_actions)
        return td_target(batch.rewards, batch.dones, batch.discounts, next_q_values)

    def forward(
        self,
        features: th.Tensor,
        actor_next_features: th.Tensor,
        critic_next_features: th.Tensor,
        batch: Transitions,
        noise: UpdateNoise,
        target_policy_noise: th.Tensor | float | None = None,
    ) -> tuple[th.Tensor, Metrics]:
        """
        :param features: The critics' features of s, shape ``(batch, features_dim)``
        :param actor_next_features: The actor's features of s'
        :param critic_next_features: The target critics' features of s'
        :param batch: Replayed batch
        :param noise: Random numbers of the update
        :param target_policy_noise: Standard deviation of the noise on the next action
        :return: Loss summed over the critics, and metrics with a' as ``next_actions``
        """
        next_actions = self.next_actions(actor_next_features, noise, target_policy_noise)
        target_q_values = self.targets(critic_next_features, next_actions, batch)
        q_values = self.critic.q_values(features, batch.actions)
        loss = critic_loss(q_values, target_q_values)
        return loss, {
            "critic_loss": loss.detach(),
            "next_actions": next_actions,
            "q_mean": q_values.detach().mean(),
            "action_saturation": (next_actions.abs() > 0.999).float().mean(),
        }
