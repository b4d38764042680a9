"""DDiffPG."""

from sb3_qsm.ddiffpg.ddiffpg import DDiffPG
from sb3_qsm.ddiffpg.modes import Mode
from sb3_qsm.ddiffpg.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DDiffPG", "MlpPolicy", "Mode", "MultiInputPolicy"]
