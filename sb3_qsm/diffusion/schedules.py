"""Variance schedules of the forward process."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn

FloatArray = npt.NDArray[np.float64]


def vp_betas(diffusion_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> FloatArray:
    """
    Discretised variance-preserving SDE (Song et al., arXiv 2011.13456), the schedule of the official QSM code.

    :param diffusion_steps: Number of diffusion steps T
    :param beta_min: Rate of the SDE at time 0
    :param beta_max: Rate of the SDE at time 1
    :return: beta_t, shape ``(T,)``
    """
    step = np.arange(1, diffusion_steps + 1)
    exponent = beta_min / diffusion_steps + 0.5 * (beta_max - beta_min) * (2 * step - 1) / diffusion_steps**2
    return np.asarray(1.0 - np.exp(-exponent), dtype=np.float64)


def cosine_betas(diffusion_steps: int, s: float = 0.008) -> FloatArray:
    """
    Cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, equation 17), with beta clipped to [0, 0.999].

    :param diffusion_steps: Number of diffusion steps T
    :param s: Offset that keeps beta from vanishing near t = 0
    :return: beta_t, shape ``(T,)``
    """
    time = np.arange(diffusion_steps + 1) / diffusion_steps
    alphas_cumprod = np.cos((time + s) / (1 + s) * np.pi / 2) ** 2
    return np.asarray(np.clip(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.0, 0.999), dtype=np.float64)


def linear_betas(diffusion_steps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> FloatArray:
    """
    Linear schedule (Ho et al., arXiv 2006.11239, section 4).

    :param diffusion_steps: Number of diffusion steps T
    :param beta_start: First variance
    :param beta_end: Last variance
    :return: beta_t, shape ``(T,)``
    """
    return np.linspace(beta_start, beta_end, diffusion_steps, dtype=np.float64)


#: Known schedules. A new one is a function of the number of steps and a line here.
NOISE_SCHEDULES: dict[str, Callable[[int], FloatArray]] = {
    "vp": vp_betas,
    "cosine": cosine_betas,
    "linear": linear_betas,
}


class NoiseSchedule(nn.Module):
    r"""
    The numbers of the forward process :math:`a_t = \sqrt{\bar\alpha_t} a_0 + \sqrt{1 - \bar\alpha_t} \epsilon` and of its
    reversal (DDPM, arXiv 2006.11239, equations 4, 7 and 11), for t in 0..T-1.

    The tensors (float32, shape ``(T,)``) serve batches of different t. The tuples hold the same coefficients as Python
    floats for the samplers, where every element of a batch is at the same t: a multiplication by a scalar is cheaper.

    :param name: One of :data:`NOISE_SCHEDULES`
    :param diffusion_steps: Number of diffusion steps T, at least 1
    :raises ValueError: if the schedule is unknown or T < 1
    """

    betas: th.Tensor
    alphas: th.Tensor
    alphas_cumprod: th.Tensor
    #: Signal rate, the square root of alpha_bar_t
    sqrt_alphas_cumprod: th.Tensor
    #: Standard deviation sigma_t of the noise in a_t given a_0
    sigmas: th.Tensor

    def __init__(self, name: str, diffusion_steps: int) -> None:
        super().__init__()
        if name not in NOISE_SCHEDULES:
            raise ValueError(f"Unknown noise_schedule {name!r}; known ones: {', '.join(sorted(NOISE_SCHEDULES))}")
        if isinstance(diffusion_steps, bool) or not isinstance(diffusion_steps, (int, np.integer)) or diffusion_steps < 1:
            raise ValueError(f"diffusion_steps must be an integer >= 1, got {diffusion_steps!r}")
        self.name = name
        self.diffusion_steps = int(diffusion_steps)

        betas = NOISE_SCHEDULES[name](self.diffusion_steps)
        alphas = 1.0 - betas
        alphas_cumprod = np.cumprod(alphas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        for key, value in {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": alphas_cumprod,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sigmas": np.sqrt(1.0 - alphas_cumprod),
        }.items():
            # Not persistent: the schedule follows from its name and T, which the policy stores
            self.register_buffer(key, th.as_tensor(value, dtype=th.float32), persistent=False)

        def floats(values: FloatArray) -> tuple[float, ...]:
            return tuple(float(value) for value in values)

        self.signal_rates = floats(np.sqrt(alphas_cumprod))
        self.noise_rates = floats(np.sqrt(1.0 - alphas_cumprod))
        #: Reverse step on the sample: (a - eps_coef * eps) * recip_sqrt_alpha + sqrt_beta * z
        self.eps_coefs = floats(betas / np.sqrt(1.0 - alphas_cumprod))
        self.recip_sqrt_alphas = floats(1.0 / np.sqrt(alphas))
        self.sqrt_betas = floats(np.sqrt(betas))
        #: Reverse step on the estimate: posterior mean and standard deviation of a_{t-1} given a_t and a_0
        self.posterior_clean_coefs = floats(betas * np.sqrt(previous) / (1.0 - alphas_cumprod))
        self.posterior_noisy_coefs = floats((1.0 - previous) * np.sqrt(alphas) / (1.0 - alphas_cumprod))
        self.posterior_stds = floats(np.sqrt(betas * (1.0 - previous) / (1.0 - alphas_cumprod)))

    def add_noise(self, actions: th.Tensor, noise: th.Tensor, t: th.Tensor) -> th.Tensor:
        r"""
        Forward process, :math:`a_t = \sqrt{\bar\alpha_t} a_0 + \sqrt{1 - \bar\alpha_t} \epsilon` (DDPM, equation 4).

        :param actions: Clean actions a_0, shape ``(batch, action_dim)``
        :param noise: Standard normal noise of the same shape
        :param t: Diffusion steps in 0..T-1, int64, shape ``(batch,)``
        :return: Noised actions a_t, not clipped
        """
        return self.sqrt_alphas_cumprod[t].unsqueeze(-1) * actions + self.sigmas[t].unsqueeze(-1) * noise
