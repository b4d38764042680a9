"""Losses and targets of the critic and of the score network, as pure functions."""

import torch as th


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
