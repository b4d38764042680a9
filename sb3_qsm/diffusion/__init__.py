"""The generative model: noise schedules, reverse processes and score networks. Knows tensors, not reinforcement learning."""

from sb3_qsm.diffusion.networks import FourierFeatures, ScoreNetwork
from sb3_qsm.diffusion.samplers import SAMPLERS, ddim, predict_clean_sample
from sb3_qsm.diffusion.schedules import NOISE_SCHEDULES, NoiseSchedule

__all__ = [
    "NOISE_SCHEDULES",
    "SAMPLERS",
    "FourierFeatures",
    "NoiseSchedule",
    "ScoreNetwork",
    "ddim",
    "predict_clean_sample",
]
