"""How far trajectories are from one another."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def check_dtaidistance() -> None:
    """
    See whether distances can be computed.

    :raises ImportError: if ``dtaidistance`` is not installed, or without its compiled part
    """
    try:
        importlib.import_module("dtaidistance")
        importlib.import_module("scipy.cluster")
        dtw_distance(np.zeros((2, 1)), np.zeros((2, 1)))
    # Without the compiled part it raises an exception of its own
    except Exception as error:
        raise ImportError(f'DDiffPG needs pip install "sb3-qsm[ddiffpg]": {error}') from error


def dtw_distance(first: FloatArray, second: FloatArray) -> float:
    """
    Distance by dynamic time warping, in units of position.

    :param first: Positions, shape ``(n, position_dim)``
    :param second: Positions, shape ``(m, position_dim)``
    :return: Root of the mean squared distance between the points that are matched, over the longer one's number of points
    """
    dtw_ndim: Any = importlib.import_module("dtaidistance.dtw_ndim")
    return float(dtw_ndim.distance_fast(first, second)) / math.sqrt(max(len(first), len(second)))


def half_way(representatives: Sequence[FloatArray]) -> float:
    """
    Distance from the trajectory that stands for a mode at which a success may as well be of a mode that is not known.

    :param representatives: Positions of the trajectories that stand for the modes, shapes ``(n, position_dim)``
    :return: Half the distance between the two modes that are nearest to one another; infinite with one mode
    """
    between = [dtw_distance(one, other) for i, one in enumerate(representatives) for other in representatives[:i]]
    return min(between, default=math.inf) / 2
