"""
Reverse processes. All are pure functions of the noise that is handed in: ``sampler(predict_noise, schedule, x_last, noise,
temperature)`` with the latent ``x_last`` ~ N(0, I) of shape ``(batch, action_dim)`` and the chain's noise of shape
``(T, batch, action_dim)``, where ``noise[i]`` is used at step t = T - 1 - i and none at t = 0. ``predict_noise(a_t, t)``
gets t as a Python integer.
"""

import itertools
from collections.abc import Callable

import torch as th

from sb3_qsm.diffusion.schedules import NoiseSchedule

NoisePredictor = Callable[[th.Tensor, int], th.Tensor]
Sampler = Callable[[NoisePredictor, NoiseSchedule, th.Tensor, th.Tensor | None, float], th.Tensor]


def predict_clean_sample(x: th.Tensor, eps: th.Tensor, signal: th.Tensor | float, sigma: th.Tensor | float) -> th.Tensor:
    r"""
    Clipped estimate of the clean sample, :math:`\hat a_0 = \mathrm{clip}((a_t - \sigma_t \epsilon)/\sqrt{\bar\alpha_t})`.

    :param x: Noised sample a_t, shape ``(batch, action_dim)``
    :param eps: Predicted noise of the same shape
    :param signal: Square root of alpha_bar_t, broadcastable to the sample
    :param sigma: Noise level sigma_t, broadcastable to the sample
    :return: The estimate, within [-1, 1]
    """
    return ((x - sigma * eps) / signal).clamp(-1.0, 1.0)


def _clean_sample(x: th.Tensor, eps: th.Tensor, schedule: NoiseSchedule, t: int) -> th.Tensor:
    """:func:`predict_clean_sample` where the whole batch is at step t, in three cheap operations."""
    signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
    return (x / signal).sub_(eps, alpha=sigma / signal).clamp_(-1.0, 1.0)


def ddpm(
    predict_noise: NoisePredictor,
    schedule: NoiseSchedule,
    x_last: th.Tensor,
    noise: th.Tensor | None,
    temperature: float = 1.0,
) -> th.Tensor:
    """
    DDPM with the *sample* clipped to [-1, 1] after every step, as in the official QSM code (Algorithm 2 of arXiv
    2006.11239 with variance beta_t).

    :param predict_noise: The noise prediction of the network
    :param schedule: Noise schedule with T steps
    :param x_last: Latent a_T, shape ``(batch, action_dim)``
    :param noise: Standard normal noise, shape ``(T, batch, action_dim)``; None for a chain without noise
    :param temperature: Factor on the noise of the chain
    :return: Actions in [-1, 1], shape ``(batch, action_dim)``
    """
    x = x_last
    last = schedule.diffusion_steps - 1
    draws = None if noise is None else noise.unbind()
    for t in range(last, -1, -1):
        x = th.sub(x, predict_noise(x, t), alpha=schedule.eps_coefs[t]).mul_(schedule.recip_sqrt_alphas[t])
        if t > 0 and draws is not None:
            x = x.add_(draws[last - t], alpha=schedule.sqrt_betas[t] * temperature)
        x = x.clamp_(-1.0, 1.0)
    return x


def ddpm_x0(
    predict_noise: NoisePredictor,
    schedule: NoiseSchedule,
    x_last: th.Tensor,
    noise: th.Tensor | None,
    temperature: float = 1.0,
) -> th.Tensor:
    """
    DDPM with the *estimate* of the clean sample clipped to [-1, 1]; the next sample is drawn from the posterior given that
    estimate (arXiv 2006.11239, equations 6 and 7).

    :param predict_noise: The noise prediction of the network
    :param schedule: Noise schedule with T steps
    :param x_last: Latent a_T, shape ``(batch, action_dim)``
    :param noise: Standard normal noise, shape ``(T, batch, action_dim)``; None for a chain without noise
    :param temperature: Factor on the noise of the chain
    :return: Actions in [-1, 1], shape ``(batch, action_dim)``
    """
    x = x_last
    last = schedule.diffusion_steps - 1
    draws = None if noise is None else noise.unbind()
    for t in range(last, -1, -1):
        # The clipped estimate comes out already weighted: one operation less for each step
        signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
        weight = schedule.posterior_clean_coefs[t]
        eps = predict_noise(x, t)
        clean = (x * (weight / signal)).sub_(eps, alpha=weight * sigma / signal).clamp_(-weight, weight)
        if t == 0:
            # The weight of the last estimate is one
            return clean
        x = clean.add_(x, alpha=schedule.posterior_noisy_coefs[t])
        if draws is not None:
            x = x.add_(draws[last - t], alpha=schedule.posterior_stds[t] * temperature)
    raise AssertionError("a schedule has at least one step")  # pragma: no cover


def ddim(
    predict_noise: NoisePredictor,
    schedule: NoiseSchedule,
    x_last: th.Tensor,
    noise: th.Tensor | None = None,
    temperature: float = 1.0,
    sampling_steps: int | None = None,
) -> th.Tensor:
    """
    DDIM with eta = 0 (arXiv 2010.02502, equation 12): deterministic given the latent. The direction towards a_t is computed
    from the clipped estimate, so that the chain stays consistent with it. It may skip steps, see :func:`spaced_steps`.

    :param predict_noise: The noise prediction of the network
    :param schedule: Noise schedule with T steps
    :param x_last: Latent a_T, shape ``(batch, action_dim)``
    :param noise: Not used
    :param temperature: Not used
    :param sampling_steps: Number of steps to take, at most T; all by default
    :return: Actions in [-1, 1], shape ``(batch, action_dim)``
    """
    steps = spaced_steps(schedule.diffusion_steps, sampling_steps or schedule.diffusion_steps)
    x = x_last
    for t, s in itertools.pairwise(steps):
        clean = _clean_sample(x, predict_noise(x, t), schedule, t)
        ratio = schedule.noise_rates[s] / schedule.noise_rates[t]
        x = (schedule.signal_rates[s] - ratio * schedule.signal_rates[t]) * clean + ratio * x
    return _clean_sample(x, predict_noise(x, steps[-1]), schedule, steps[-1])


def spaced_steps(diffusion_steps: int, n: int) -> list[int]:
    """
    The steps of a reverse process that skips some: evenly spaced, from T - 2 to 0. A chain that ended before 0 would return
    the mean of the actions that its last sample may come from, with less spread. T - 1 is skipped first, since next to nothing
    of the clean sample is left there: the ``cosine`` schedule keeps 0.005 of it at T = 10, so that in the estimate an error of
    the predicted noise is 200 times as large.

    :param diffusion_steps: T
    :param n: How many to take, from 1 to T
    :return: Their indices, falling
    """
    first = diffusion_steps - (1 if n == diffusion_steps else 2)
    return [first] if n == 1 else [round(first * k / (n - 1)) for k in range(n - 1, -1, -1)]


#: Known samplers. A new one is a function and a line here.
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddpm_x0": ddpm_x0, "ddim": ddim}
