"""Activations that PyTorch computes slowly on a CPU."""

import torch as th
from torch import nn

# With fewer elements the one kernel of PyTorch is faster than several operations
MIN_ELEMENTS = 8192
# exp(20)^2 is far below the largest number in float32, and beyond it mish(x) is x
_LARGEST = 20.0


class Mish(nn.Mish):
    r"""
    :math:`x \tanh(\log(1 + e^x))` (arXiv 1908.08681, equation 1), of which :math:`\tanh(\log(1 + e^x)) = n / (n + 2)` with
    :math:`n = e^x (e^x + 2)`, so that it takes one exponential. PyTorch's takes an exponential, a logarithm and a hyperbolic
    tangent, for which a CPU needs two to three times as long.
    """

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        :param input: Any shape
        :return: The same shape
        """
        slow = input.device.type == "cpu" and input.dtype == th.float32 and input.numel() >= MIN_ELEMENTS
        # Compiled it is one kernel; eager operations would each keep a tensor for the gradient
        faster = th.compiler.is_compiling() or (slow and not th.is_grad_enabled())
        if th.compiler.is_exporting() or not faster:
            return super().forward(input)
        exponential = input.clamp(max=_LARGEST).exp()
        n = exponential * (exponential + 2.0)
        return input * (n / (n + 2.0))
