"""
Linear layers that take the faster of PyTorch's two matrix libraries, and under autocast the faster precision.

PyTorch multiplies float32 matrices with Intel's MKL, which computes with half of the width of AMD's Zen 5; oneDNN, which
PyTorch ships beside it, takes all of it (``benchmarks/results/speed/techniques.md``). Its operator is the one that
``torch.compile`` inserts when it freezes a network. Where it is not there, or not faster, the layers are ordinary ones.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

#: Below these sizes the call costs more than the product
MIN_ROWS = 16
MIN_WEIGHTS = 1024
#: Rows, inputs or outputs below which a product with bfloat16 operands takes longer than in float32, conversions included
MIN_BF16 = 32
#: AMD's number of the Zen 5 processors
ZEN5_FAMILY = 26
#: Rows from which on a whole network is faster in bfloat16
MIN_BF16_ROWS = 128


@cache
def prefers_onednn() -> bool:
    """
    Whether oneDNN multiplies float32 matrices faster than MKL on this machine.

    :return: True on AMD processors that have AVX-512 in its full width
    """
    if not (th._C._has_mkldnn and hasattr(th.ops.mkldnn, "_linear_pointwise")):
        return False
    if th.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and has_wide_units(cpuinfo.read_text())


def has_wide_units(cpuinfo: str) -> bool:
    """
    :param cpuinfo: What ``/proc/cpuinfo`` holds, of a processor with AVX-512
    :return: Whether it is AMD's and computes 512 bits at once. Before Zen 5, family 26, it takes them in two halves, as fast
        as MKL does
    """
    family = re.search(r"^cpu family\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return "AuthenticAMD" in cpuinfo and family is not None and int(family[1]) >= ZEN5_FAMILY


def _matmul(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """x @ weight.T + bias by oneDNN; the matrices may be transposed."""
    if weight.shape[0] * weight.shape[1] < MIN_WEIGHTS or x.shape[0] < MIN_ROWS:
        return F.linear(x, weight, bias)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # a part of a matrix would take oneDNN's slow general path
    product: th.Tensor = th.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _OneDnnLinear(th.autograd.Function):
    """Linear layer and its gradient by oneDNN, for float32 matrices on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _matmul(x, weight, bias)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _matmul(grad, weight.t()) if needs_x else None,
            _matmul(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias and ctx.has_bias else None,
        )


def _too_small_for_bf16(x: th.Tensor, weight: th.Tensor) -> bool:
    """Whether autocast is on and would make the product slower."""
    return (
        x.device.type == "cpu"
        and th.is_autocast_enabled("cpu")
        and weight.dtype == th.float32
        and min(x.shape[0], *weight.shape) < MIN_BF16
    )


def addmm(shift: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    The same function as :func:`torch.addmm`; under autocast in float32 where the product is small.

    :param shift: What is added, shape ``(batch, out)``
    :param x: Input, shape ``(batch, in)``
    :param weight: Transposed weight, shape ``(in, out)``
    :return: ``shift + x @ weight``
    """
    if _too_small_for_bf16(x, weight):
        with th.autocast("cpu", enabled=False):
            return th.addmm(shift.float(), x.float(), weight)
    return th.addmm(shift, x, weight)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """
    The same function as :func:`torch.nn.functional.linear`; under autocast in float32 where the product is small.

    :param x: Input, shape ``(batch, in)``
    :param weight: Weight, shape ``(out, in)``
    :param bias: Bias, shape ``(out,)``, or None
    :return: Output, shape ``(batch, out)``
    """
    if (
        # First: the number of rows may be a symbol while a graph is made
        not th.compiler.is_compiling()
        and x.dim() == 2
        and x.shape[0] >= MIN_ROWS
        and x.device.type == "cpu"
        and x.dtype == th.float32
        and weight.dtype == th.float32
        and not th.is_autocast_enabled("cpu")
        and prefers_onednn()
    ):
        if th.is_grad_enabled():
            return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        return _matmul(x, weight, bias)
    if _too_small_for_bf16(x, weight):
        with th.autocast("cpu", enabled=False):
            return linear(x.float(), weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` with :func:`linear`."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return linear(input, self.weight, self.bias)

    def bind(self, rows: int) -> Callable[[th.Tensor], th.Tensor]:
        """
        :param rows: Size of the batches to come
        :return: The layer as a function that does not choose a library again at every call
        """
        # The number of rows is asked for last: it may be a symbol while a graph is made
        plain = not th.is_autocast_enabled("cpu") and (th.compiler.is_compiling() or rows < MIN_ROWS)
        function = F.linear if plain else linear
        return partial(function, weight=self.weight, bias=self.bias)

    def in_bf16(self) -> Callable[[th.Tensor], th.Tensor]:
        """
        Round the parameters once for many calls.

        :return: The layer as a function of bfloat16 tensors
        """
        bias = self.bias.bfloat16() if self.bias is not None else None
        return partial(F.linear, weight=self.weight.bfloat16(), bias=bias)
