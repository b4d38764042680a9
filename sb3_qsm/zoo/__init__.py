"""
The command line: rl_zoo3 with this package's algorithms.

``register()`` is all that a script of your own needs before it calls rl_zoo3.
"""

from sb3_qsm.zoo.hyperparams import (
    convert_ddiffpg_params,
    convert_qsm_params,
    hyperparams_file,
    sample_ddiffpg_params,
    sample_qsm_params,
)
from sb3_qsm.zoo.registry import ALGORITHMS, ZooAlgorithm, register

__all__ = [
    "ALGORITHMS",
    "ZooAlgorithm",
    "convert_ddiffpg_params",
    "convert_qsm_params",
    "hyperparams_file",
    "register",
    "sample_ddiffpg_params",
    "sample_qsm_params",
]
