"""Numbers that are within their bounds, or an error that says so."""

import math
from typing import Any

import numpy as np


def check_number(name: str, value: Any, low: float, strict: bool = False, high: float = math.inf) -> None:
    """
    :param name: Name of an argument
    :param value: Its value
    :param low: Its lower bound
    :param strict: Whether the lower bound itself is not allowed
    :param high: Its upper bound
    :raises ValueError: if the value is not a finite number within the bounds
    """
    ok = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < low or (strict and value == low) or value > high:
        lower = "" if low == -math.inf else f" {'>' if strict else '>='} {low:g}"
        upper = "" if high == math.inf else f" and <= {high:g}"
        kind = "a finite number" if isinstance(value, (float, np.floating)) and not math.isfinite(value) else "a number"
        raise ValueError(f"{name} must be {kind}{lower}{upper}, got {value!r}")


def whole(value: Any) -> Any:
    """
    :param value: Number of steps, which users also write as ``1e4``
    :return: The integer for a whole float, anything else as it is
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_integer(name: str, value: Any, low: int) -> None:
    """
    :param name: Name of an argument
    :param value: Its value
    :param low: Its lower bound
    :raises ValueError: if the value is not an integer, or is below the bound
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
