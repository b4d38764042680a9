"""Diffusion-policy reinforcement learning for Stable-Baselines3."""

from sb3_qsm.ddiffpg import DDiffPG
from sb3_qsm.qsm import QSM

__version__ = "0.1.0"

__all__ = ["QSM", "DDiffPG", "__version__"]
