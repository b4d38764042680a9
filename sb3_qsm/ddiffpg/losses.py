"""Target actions, and the loss of categorical critics, as pure functions."""

from collections.abc import Callable

import torch as th
from torch import nn

from sb3_qsm.common.losses import action_gradient


def ascend_actions(
    q_fn: Callable[[th.Tensor], th.Tensor],
    actions: th.Tensor,
    steps: int = 20,
    learning_rate: float = 0.03,
    max_grad_norm: float = 1.0,
) -> th.Tensor:
    """
    Move actions uphill on a Q-function with Adam, within their bounds (arXiv 2406.00681, section 4.1).

    :param q_fn: From actions of shape ``(batch, action_dim)`` to Q-values of shape ``(batch,)``, row by row
    :param actions: Where to start, scaled
    :param steps: Number of steps
    :param learning_rate: Learning rate of Adam
    :param max_grad_norm: Largest norm of the gradient of the mean over the batch
    :return: Scaled actions in [-1, 1], same shape
    """
    targets = nn.Parameter(actions.detach().clamp(-1.0, 1.0).clone())
    optimizer = th.optim.Adam([targets], lr=learning_rate, eps=1e-5)
    for _ in range(steps):
        gradient = action_gradient(q_fn, targets) / len(targets)
        # Downhill on -Q
        targets.grad = -gradient * (max_grad_norm / gradient.norm().clamp_min(max_grad_norm))
        optimizer.step()
        with th.no_grad():
            targets.clamp_(-1.0, 1.0)
    return targets.detach()


def categorical_projection(
    support: th.Tensor, probabilities: th.Tensor, rewards: th.Tensor, dones: th.Tensor, discount: float
) -> th.Tensor:
    r"""
    Distribution of :math:`r + \gamma (1 - d) Z'` on the atoms of Z (C51, arXiv 1707.06887, equation 7).

    :param support: Atoms z, evenly spaced, shape ``(n_atoms,)``
    :param probabilities: Distribution of Z', shape ``(batch, n_atoms)``
    :param rewards: Rewards, shape ``(batch, 1)``
    :param dones: Terminations, shape ``(batch, 1)``
    :param discount: Discount
    :return: Probabilities, shape ``(batch, n_atoms)``
    """
    low, high = support[0], support[-1]
    spacing = (high - low) / (len(support) - 1)
    atoms = (rewards + (1.0 - dones) * discount * support).clamp(low, high)
    # An atom's mass goes to its two neighbours by nearness
    share = (1.0 - (atoms.unsqueeze(1) - support.view(1, -1, 1)).abs() / spacing).clamp_min(0.0)
    return (share @ probabilities.unsqueeze(-1)).squeeze(-1)


def categorical_loss(logits: th.Tensor, target_probabilities: th.Tensor) -> th.Tensor:
    """
    Cross-entropy of each critic, summed over the critics.

    :param logits: Logits of the critics at the replayed action, shape ``(n_critics, batch, n_atoms)``
    :param target_probabilities: Their common target, shape ``(batch, n_atoms)``
    :return: Scalar loss
    """
    return -(target_probabilities * logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=1).sum()
