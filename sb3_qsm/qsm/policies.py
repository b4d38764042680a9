"""Policies of QSM."""

from sb3_qsm.common.policies import DiffusionCnnPolicy, DiffusionMultiInputPolicy, DiffusionPolicy

MlpPolicy = DiffusionPolicy
CnnPolicy = DiffusionCnnPolicy
MultiInputPolicy = DiffusionMultiInputPolicy
