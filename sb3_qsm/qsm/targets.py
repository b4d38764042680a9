r"""
Score targets: what the noise prediction is regressed onto.

With the Boltzmann policy :math:`p(a|s) \propto \exp(Q(s,a)/\lambda)`, the exact noise prediction is
:math:`\epsilon^* = -\sigma_t \nabla \log p_t(a_t)`. Every target has the form
:math:`\epsilon^* = -w_t \, c \, \nabla_a Q(s, q)` with a query action q, a weight w_t and a scale c. A target is a function
from the batch to (q, w_t) and a line in :data:`SCORE_TARGETS`. With a prior over actions, the weight gives way to
:func:`prior_eps_target`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_qsm.diffusion import predict_clean_sample


class DiffusedActions(NamedTuple):
    """
    A batch of noised replay actions.

    :param actions: Replayed actions a_0, shape ``(batch, action_dim)``
    :param noisy_actions: Noised actions a_t, same shape
    :param eps: Noise that the network predicts in them, without gradient, same shape
    :param signal: Square root of alpha_bar_t, shape ``(batch, 1)``
    :param sigma: Noise level sigma_t, shape ``(batch, 1)``
    """

    actions: th.Tensor
    noisy_actions: th.Tensor
    eps: th.Tensor
    signal: th.Tensor
    sigma: th.Tensor


ScoreTarget = Callable[[DiffusedActions], tuple[th.Tensor, th.Tensor]]


def paper(batch: DiffusedActions) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradient at the noised action, without sigma_t (arXiv 2312.11752, equation 12 as in the official code).

    :param batch: Replayed actions and their noised versions
    :return: Actions at which to take the gradient, shape ``(batch, dim)``; weights of the gradients, shape ``(batch, 1)``
    """
    return batch.noisy_actions, th.ones_like(batch.sigma)


def noised(batch: DiffusedActions) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradient at the noised action, weighted by sigma_t: a_t stands for the clean action (FlowRL's QSM, arXiv 2603.27450).

    :param batch: Replayed actions and their noised versions
    :return: Actions at which to take the gradient, shape ``(batch, dim)``; weights of the gradients, shape ``(batch, 1)``
    """
    return batch.noisy_actions, batch.sigma


def clean(batch: DiffusedActions) -> tuple[th.Tensor, th.Tensor]:
    """
    Target score matching (arXiv 2402.08667, equation 8): unbiased when the noised actions were drawn from the policy.

    :param batch: Replayed actions and their noised versions
    :return: Actions at which to take the gradient, shape ``(batch, dim)``; weights of the gradients, shape ``(batch, 1)``
    """
    return batch.actions, batch.sigma / batch.signal


def denoised(batch: DiffusedActions) -> tuple[th.Tensor, th.Tensor]:
    """
    Gradient at the clipped estimate of the clean action, which lies among the actions the critic was trained on.

    :param batch: Replayed actions and their noised versions
    :return: Actions at which to take the gradient, shape ``(batch, dim)``; weights of the gradients, shape ``(batch, 1)``
    """
    return predict_clean_sample(batch.noisy_actions, batch.eps, batch.signal, batch.sigma), batch.sigma


def prior_eps_target(
    noisy_actions: th.Tensor, score: th.Tensor, signal: th.Tensor, sigma: th.Tensor, prior_std: float
) -> th.Tensor:
    r"""
    Noise prediction of the Boltzmann policy with a Gaussian prior, :math:`p(a|s) \propto N(a; 0, s^2 I) \exp(Q(s,a)/\lambda)`:

    .. math:: \epsilon^* = \frac{\sigma_t}{\bar\alpha_t s^2 + \sigma_t^2}
        \left(a_t - \sqrt{\bar\alpha_t} s^2 \, \nabla_a Q(s, q) / \lambda\right)

    It is the convex combination of the target score identity (arXiv 2402.08667, equation 8) and Tweedie's formula in which
    the clean action cancels: exact in expectation when q is drawn from :math:`p(a_0|a_t)`, and exact for a quadratic Q at the
    mean of that distribution. Without the prior a flat Q would mean a flat density over all of space, which the clipping of
    the sampler turns into actions at the bounds; with it the chain starts from where the forward process ends.

    :param noisy_actions: Noised actions a_t, shape ``(batch, action_dim)``
    :param score: Gradient of Q over lambda at the query action, same shape
    :param signal: Square root of alpha_bar_t, broadcastable to the actions
    :param sigma: Noise level sigma_t, broadcastable to the actions
    :param prior_std: Standard deviation s of the prior
    :return: The target, shape ``(batch, action_dim)``
    """
    variance = prior_std**2
    return sigma / (signal.square() * variance + sigma.square()) * (noisy_actions - signal * variance * score)


#: Known score targets
SCORE_TARGETS: dict[str, ScoreTarget] = {"paper": paper, "noised": noised, "clean": clean, "denoised": denoised}


def mean_critic(q_values: th.Tensor) -> th.Tensor:
    """
    :param q_values: Q-values, shape ``(n_critics, batch)``
    :return: Their means over the critics, shape ``(batch,)``
    """
    return q_values.mean(dim=0)


def min_critic(q_values: th.Tensor) -> th.Tensor:
    """
    :param q_values: Q-values, shape ``(n_critics, batch)``
    :return: The smallest of the critics, shape ``(batch,)``
    """
    return q_values.amin(dim=0)


#: How the gradients of the critics are combined. For "split" each row has one of the critics to begin with
#: (:meth:`sb3_qsm.common.policies.QCritic.q_values_in_turns`). Named functions: a model can be pickled with them
CRITIC_REDUCTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "mean": mean_critic,
    "min": min_critic,
    "split": mean_critic,
}


def running_gradient_norm(previous: th.Tensor, gradient: th.Tensor, rate: float = 0.005) -> th.Tensor:
    """
    Exponential running mean of the mean absolute component of the critic's action gradient. The scale-free targets divide
    by it, so that a temperature means the same on every task and reward scale. The first call takes the batch's value.

    :param previous: Running mean, a scalar; 0 if there is none yet
    :param gradient: Action gradient, shape ``(batch, action_dim)``
    :param rate: Weight of the new value
    :return: New running mean, a positive scalar
    """
    current = gradient.abs().mean()
    return th.where(previous > 0, th.lerp(previous, current, rate), current).clamp_min(1e-8)


def clip_gradient(gradient: th.Tensor, max_magnitude: th.Tensor) -> th.Tensor:
    """
    Scale down the gradients whose mean absolute component is larger than a limit; their direction stays. Few states have by
    far the steepest critics, and without a limit they rule the regression.

    :param gradient: Action gradient, shape ``(batch, action_dim)``
    :param max_magnitude: The limit, a scalar
    :return: Gradient of the same shape
    """
    magnitude = gradient.abs().mean(dim=1, keepdim=True)
    return gradient * (max_magnitude / magnitude.clamp_min(1e-12)).clamp_max(1.0)
