"""
The loss of the actor in Algorithm 1 (arXiv 2312.11752), from parameters, batch and noise to a scalar; the critics' is
:class:`sb3_qsm.common.losses.CriticLoss`.

They are modules so that the networks are found by name: ordinary autograd differentiates them as they are, and
``torch.func.functional_call`` as functions of their parameters, which is what gets compiled.
"""

from collections.abc import Sequence

import torch as th
from torch import nn

from sb3_qsm.common.losses import Metrics, UpdateNoise, action_gradient, noise_prediction_loss
from sb3_qsm.common.policies import DiffusionActor, QCritic
from sb3_qsm.qsm.targets import (
    CRITIC_REDUCTIONS,
    SCORE_TARGETS,
    DiffusedActions,
    clip_gradient,
    prior_eps_target,
    running_gradient_norm,
)


class ActorLoss(nn.Module):
    r"""
    Q-score matching, :math:`\| \epsilon_\theta(s, a_t, t) - \epsilon^* \|^2` with
    :math:`\epsilon^* = -w_t c \nabla_a Q(s, q)`: neither the critics nor the sampler receive a gradient.

    :param actor: Diffusion actor
    :param critics: Critics whose action gradient is followed; several are combined as if they were one with more heads
    :param score_target: One of :data:`SCORE_TARGETS`, which gives q and w_t
    :param critic_reduction: One of :data:`CRITIC_REDUCTIONS`
    :param prior_std: Standard deviation of the Gaussian prior over actions, None for none; not used with the paper's target,
        which is no score
    """

    def __init__(
        self,
        actor: DiffusionActor,
        critics: Sequence[QCritic],
        score_target: str,
        critic_reduction: str,
        prior_std: float | None = None,
    ) -> None:
        super().__init__()
        self.actor, self.critics = actor, nn.ModuleList(critics)
        self.score_target = SCORE_TARGETS[score_target]
        self.reduce = CRITIC_REDUCTIONS[critic_reduction]
        self.in_turns = critic_reduction == "split"
        self.prior_std = None if score_target == "paper" else prior_std

    def q_gradient(self, features: Sequence[th.Tensor], actions: th.Tensor) -> th.Tensor:
        """
        :param features: Features of s for each of the critics, shape ``(batch, features_dim)``
        :param actions: Where to take the gradient, shape ``(batch, action_dim)``
        :return: Gradient of the combined critics in the action, without a graph
        """
        evaluate = "q_values_in_turns" if self.in_turns else "q_values"

        def q_fn(a: th.Tensor) -> th.Tensor:
            values = [getattr(critic, evaluate)(f, a) for critic, f in zip(self.critics, features, strict=True)]
            return self.reduce(th.cat(values))

        return action_gradient(q_fn, actions)

    def forward(
        self,
        features: th.Tensor,
        critic_features: Sequence[th.Tensor],
        actions: th.Tensor,
        noise: UpdateNoise,
        q_grad_norm: th.Tensor,
        temperature: th.Tensor,
        q_grad_coef: th.Tensor | None,
        q_grad_clip: th.Tensor | None = None,
        behaviour: th.Tensor | None = None,
    ) -> tuple[th.Tensor, Metrics]:
        """
        :param features: The actor's features of s, shape ``(batch, features_dim)``
        :param critic_features: Features of s for each of the critics, shape ``(batch, features_dim)``
        :param actions: Replayed actions, shape ``(batch, action_dim)``
        :param noise: Random numbers of the update
        :param q_grad_norm: Running mean of the gradient's magnitude, a scalar
        :param temperature: Temperature on the scale-free form, a scalar
        :param q_grad_coef: Fixed factor (the paper's M_q) in place of the scale-free form, a scalar
        :param q_grad_clip: Largest magnitude of a state's gradient in units of the running mean, a scalar; None for no limit
        :param behaviour: Weight of cloning the replayed actions against the score target, a scalar in [0, 1]; None for 0
        :return: Loss, and metrics with the new running mean
        """
        schedule = self.actor.schedule
        noisy_actions = schedule.add_noise(actions, noise.eps, noise.t)
        eps = self.actor.predict_noise(features, noisy_actions, noise.t)

        signal, sigma = schedule.sqrt_alphas_cumprod[noise.t].unsqueeze(-1), schedule.sigmas[noise.t].unsqueeze(-1)
        query_actions, weight = self.score_target(DiffusedActions(actions, noisy_actions, eps.detach(), signal, sigma))
        q_gradient = self.q_gradient(critic_features, query_actions)
        q_grad_norm = running_gradient_norm(q_grad_norm, q_gradient)
        scale = 1.0 / (temperature * q_grad_norm) if q_grad_coef is None else q_grad_coef
        clipped = q_gradient if q_grad_clip is None else clip_gradient(q_gradient, q_grad_clip * q_grad_norm)
        if self.prior_std is None:
            eps_target = -weight * scale * clipped
        else:
            eps_target = prior_eps_target(noisy_actions, scale * clipped, signal, sigma, self.prior_std)

        if behaviour is not None:
            # Of the weighted sum of both losses this is the part that depends on the parameters
            eps_target = behaviour * noise.eps + (1.0 - behaviour) * eps_target

        loss = noise_prediction_loss(eps, eps_target)
        return loss, {
            "actor_loss": loss.detach(),
            "q_grad": q_gradient.abs().mean(),
            "score_target": eps_target.abs().mean(),
            "q_grad_norm": q_grad_norm,
        }
