"""Precision and compilation of the updates."""

import contextlib
import platform
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch as th

#: Known precisions: all in float32, or matrix products with bfloat16 operands
PRECISIONS = ("float32", "bf16")


def autocast(device: th.device, precision: str) -> AbstractContextManager[Any]:
    """
    :param device: Device of the networks
    :param precision: One of :data:`PRECISIONS`
    :return: Context in which the networks compute in that precision; the parameters stay in float32
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return th.autocast(device.type, dtype=th.bfloat16)


def check_precision(device: th.device, precision: str) -> None:
    """
    Refuse a precision that the device would only emulate.

    :param device: Device of the networks
    :param precision: One of :data:`PRECISIONS`
    :raises ValueError: if it is not known, or bfloat16 on a device without instructions for it
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; known ones: {', '.join(PRECISIONS)}")
    if precision == "bf16" and not has_bf16(device):
        raise ValueError(
            "precision='bf16' needs a processor with bfloat16 instructions (AVX512-BF16 or AMX on x86, BF16 on Arm, Ampere "
            f"or newer on NVIDIA); {device.type} ({platform.machine()}) would emulate it. Use precision='float32'"
        )


def has_bf16(device: th.device) -> bool:
    """
    :param device: A device
    :return: Whether it multiplies bfloat16 matrices in hardware
    """
    if device.type == "cuda":
        return bool(th.cuda.is_bf16_supported(including_emulation=False))
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.exists():
        return False
    flags = set(cpuinfo.read_text().split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def check_compiler(device: th.device) -> None:
    """
    Refuse to compile where that would fail at the first gradient step.

    :param device: Device of the networks
    :raises ValueError: if no C++ compiler is found
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type != "cpu":
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compile=True needs a C++ compiler; none was found. Install one (g++ or clang), name it in the environment "
            "variable CXX, or use compile=False"
        ) from error


def compile_update(function: Callable[..., Any], device: th.device) -> Callable[..., Any]:
    """
    :param function: A method that is a function of tensors on one device, of fixed shapes; it may change them in place
    :param device: That device
    :return: The function, compiled at its first call into one graph without the backward pass of a further derivative
    """
    from sb3_qsm.diffusion.inductor import options

    # What is compiled belongs to a code object. One for each model, or else PyTorch would take them for versions of one
    # function, of which it compiles only a few
    method: Any = function
    code = types.FunctionType(method.__func__.__code__.replace(), method.__func__.__globals__)
    compiled = th.compile(types.MethodType(code, method.__self__), fullgraph=True, dynamic=False, options=options(device))

    def call(*args: Any) -> Any:
        # Else the parameters would make the graph one to differentiate again, with all that takes kept in memory
        with th.no_grad():
            return compiled(*args)

    return call
