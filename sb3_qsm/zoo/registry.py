"""The algorithms that the command line adds to rl_zoo3."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_qsm import QSM, DDiffPG
from sb3_qsm.zoo.hyperparams import (
    convert_ddiffpg_params,
    convert_qsm_params,
    sample_ddiffpg_params,
    sample_qsm_params,
)


@dataclass(frozen=True)
class ZooAlgorithm:
    """
    What rl_zoo3 has to know of an algorithm.

    :param algorithm: Class
    :param sample_params: Sampler of hyperparameters for Optuna
    :param convert_params: From sampled values to arguments of the class
    """

    algorithm: type[OffPolicyAlgorithm]
    sample_params: Callable[..., dict[str, Any]]
    convert_params: Callable[[dict[str, Any]], dict[str, Any]]


ALGORITHMS: dict[str, ZooAlgorithm] = {
    "qsm": ZooAlgorithm(QSM, sample_qsm_params, convert_qsm_params),
    "ddiffpg": ZooAlgorithm(DDiffPG, sample_ddiffpg_params, convert_ddiffpg_params),
}


def register() -> None:
    """
    Make this package's algorithms known to rl_zoo3.

    rl_zoo3's modules import its dictionaries by name, so they are changed in place: it does not matter which of the modules
    were imported before.
    """
    for name, entry in ALGORITHMS.items():
        ALGOS[name] = entry.algorithm
        HYPERPARAMS_SAMPLER[name] = entry.sample_params
        HYPERPARAMS_CONVERTER[name] = entry.convert_params  # type: ignore[assignment]
