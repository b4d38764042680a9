"""Networks that predict the noise in a noised action."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from sb3_qsm.diffusion.activations import Mish
from sb3_qsm.diffusion.linear import MIN_BF16, MIN_BF16_ROWS, MIN_ROWS, Linear, addmm, linear


def xavier_init(module: nn.Module) -> None:
    """
    Xavier-uniform kernels and zero biases for every linear layer of a module, the initialisation of the official QSM code.

    :param module: The module, changed in place
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mlp(widths: Sequence[int], activation_fn: type[nn.Module], layer_norm: bool = False) -> nn.Sequential:
    """
    Fully connected network, with an activation after every layer but the last.

    :param widths: Sizes of the input, of the hidden layers and of the output
    :param activation_fn: Activation of the hidden layers
    :param layer_norm: Whether to normalise every hidden layer before its activation
    :return: The network
    """
    if activation_fn is nn.Mish:
        activation_fn = Mish
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(itertools.pairwise(widths)):
        if i > 0:
            layers += [nn.LayerNorm(size_in)] if layer_norm else []
            layers += [activation_fn()]
        layers += [Linear(size_in, size_out)]
    return nn.Sequential(*layers)


class FourierFeatures(nn.Module):
    r"""
    Learnable Fourier features :math:`[\cos(2\pi w t), \sin(2\pi w t)]` of the diffusion step (arXiv 2006.10739).

    :param output_dim: Number of features, even
    :param std: Standard deviation of the initial frequencies
    """

    def __init__(self, output_dim: int = 64, std: float = 0.2) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.randn(output_dim // 2) * std)

    def forward(self, t: th.Tensor) -> th.Tensor:
        """
        :param t: Diffusion steps, shape ``(batch,)``
        :return: Features, shape ``(batch, output_dim)``
        """
        phase = th.outer(t.to(self.weight.dtype), (2.0 * math.pi) * self.weight)
        return th.cat([phase.cos(), phase.sin()], dim=-1)


class ScoreNetwork(nn.Module):
    """
    Predicts the noise in a noised action, from ``[a_t, features, time]``: Fourier features of t go through a small MLP and
    join the noised action and the features of the observation at the input of the trunk (the official QSM network).

    The shares of the observation and of the time in the trunk's first layer do not depend on the noised action, so that a
    sampler computes the first once per call and reads the second from a table of T rows (:meth:`denoiser`).

    :param features_dim: Size of the features of the observation
    :param action_dim: Size of the action
    :param net_arch: Hidden layers of the trunk; may be empty
    :param activation_fn: Activation of the trunk and of the time embedding
    :param layer_norm: Whether to normalise every hidden layer of the trunk before its activation
    :param fourier_dim: Number of Fourier features of t
    :param time_arch: Layers of the embedding of t
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        net_arch: Sequence[int] = (256, 256),
        activation_fn: type[nn.Module] = nn.SiLU,
        layer_norm: bool = False,
        fourier_dim: int = 64,
        time_arch: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        self.features_dim = features_dim
        self.action_dim = action_dim
        self.fourier = FourierFeatures(fourier_dim)
        self.time_mlp = mlp([fourier_dim, *time_arch], activation_fn)
        width = [fourier_dim, *time_arch][-1]

        layers = mlp([action_dim + features_dim + width, *net_arch, action_dim], activation_fn, layer_norm)
        first, *others = layers
        assert isinstance(first, Linear)
        self.input_layer = first
        self.trunk = nn.Sequential(*others)
        self._time_cache: tuple[list[tuple[int, int]], list[th.Tensor], th.Tensor] | None = None

    def time_table(self, t: th.Tensor, weight: th.Tensor) -> th.Tensor:
        """
        :param t: Diffusion steps, shape ``(n,)``
        :param weight: The time's part of the first layer's weight
        :return: Their share in the first layer, shape ``(n, width)``
        """
        return linear(self.time_mlp(self.fourier(t)), weight)

    def _caches(self, features: th.Tensor) -> bool:
        """Whether the table is worth keeping, and a plain tensor of parameters that count their changes."""
        return (
            not (th.compiler.is_compiling() or th.is_grad_enabled() or features.is_cuda)
            and len(features) < MIN_ROWS
            and not th.is_autocast_enabled("cpu")
            and not self.input_layer.weight.is_inference()
        )

    def _cached_time_table(self, steps: th.Tensor, weight: th.Tensor) -> th.Tensor:
        """:meth:`time_table`, from the last call if nothing in it has changed since."""
        layer = self.input_layer
        parameters = [steps, self.fourier.weight, *self.time_mlp.parameters(), layer.weight, layer.bias]
        key = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        # The counters see neither the fused optimizers nor what is done to ``parameter.data``. Both usually change all
        # parameters, so that the values of the vectors among them give them away; the layer's bias is one even if there is no
        # other. A single matrix that is changed through its ``data`` is not seen
        vectors = [parameter for parameter in parameters if parameter.dim() == 1]
        if self._time_cache is None or key != self._time_cache[0] or not all(map(th.equal, vectors, self._time_cache[1])):
            self._time_cache = key, [vector.clone() for vector in vectors], self.time_table(steps, weight)
        return self._time_cache[2]

    def forget_time_table(self) -> None:
        """After a step of an optimizer on these parameters: a fused one on matrices alone would not be seen."""
        self._time_cache = None

    def factored(self, features: th.Tensor, actions: th.Tensor, t: th.Tensor, steps: th.Tensor) -> th.Tensor:
        """
        The same function as :meth:`forward`, with the embedding of time computed for the steps there are, not for every
        element of the batch.

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Noised actions, shape ``(batch, action_dim)``
        :param t: Diffusion steps, int64, shape ``(batch,)``
        :param steps: All diffusion steps 0..T-1, int64
        :return: Predicted noise, shape ``(batch, action_dim)``
        """
        # One split: the gradients of slices would each be filled up with zeros and added
        sizes = [self.action_dim, self.features_dim, self.input_layer.in_features - self.action_dim - self.features_dim]
        action_weight, features_weight, time_weight = th.split(self.input_layer.weight, sizes, dim=1)
        context = linear(features, features_weight, self.input_layer.bias)
        shift = context + nn.functional.embedding(t, self.time_table(steps, time_weight))
        predicted: th.Tensor = self.trunk(addmm(shift, actions, action_weight.t()))
        return predicted

    def denoiser(self, features: th.Tensor, steps: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        The noise prediction as a sampler needs it, with all that is the same at every step computed once.

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param steps: All diffusion steps 0..T-1, int64
        :return: Function from noised actions and the step, a Python integer, to the predicted noise
        """
        if self._computes_in_bf16(features):
            return self._bf16_denoiser(features, steps)
        # For a few observations the table is a sixth of the work of acting
        # Slices: exporters do not fold a split
        first, start, end = self.input_layer.weight, self.action_dim, self.action_dim + self.features_dim
        action_weight, features_weight, time_weight = first[:, :start], first[:, start:end], first[:, end:]
        make_table = self._cached_time_table if self._caches(features) else self.time_table
        table = make_table(steps, time_weight)
        context = linear(features, features_weight, self.input_layer.bias)
        # For a few observations one operation for all steps; for many that would be a large matrix to write and to read again
        few = not th.compiler.is_compiling() and features.shape[0] < MIN_ROWS
        shifts = (table.unsqueeze(1) + context).unbind() if few else table.unbind()
        weight = action_weight.t()
        layers = self._calls(lambda layer: layer.bind(features.shape[0]))

        def predict_noise(x: th.Tensor, t: int) -> th.Tensor:
            hidden = th.addmm(shifts[t], x, weight) if few else addmm(context, x, weight).add_(shifts[t])
            for layer in layers:
                hidden = layer(hidden)
            return hidden

        return predict_noise

    def _calls(self, fast: Callable[[Linear], Callable[[th.Tensor], th.Tensor]]) -> list[Callable[[th.Tensor], th.Tensor]]:
        """
        The layers of the trunk as functions, without the look for hooks that a module does at every call: it costs as much as
        a small product.
        """
        return [
            layer
            if layer._forward_hooks or layer._forward_pre_hooks
            else (fast(layer) if isinstance(layer, Linear) else layer.forward)
            for layer in self.trunk
        ]

    @staticmethod
    def _computes_in_bf16(features: th.Tensor) -> bool:
        """Whether a sampler is faster with all products in bfloat16, the small ones too; a compiled one is not."""
        return (
            not (th.compiler.is_compiling() or th.is_grad_enabled())
            and th.is_autocast_enabled("cpu")
            and features.device.type == "cpu"
            and features.shape[0] >= MIN_BF16_ROWS
        )

    def _bf16_denoiser(self, features: th.Tensor, steps: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        :meth:`denoiser` with all products in bfloat16, between which nothing is converted. An action alone has too few entries
        for a fast product: a one joins it, for which the matrix of each step has the share of time, a few features, where
        adding their share would take longer, and zeros.
        """
        start, end = self.action_dim, self.action_dim + self.features_dim
        first, bias, few = self.input_layer.weight, self.input_layer.bias, end < 2 * MIN_BF16
        table = self.time_table(steps, first[:, end:])
        if few:
            table, context, joined = table + bias, None, features
        else:
            context, joined = linear(features, first[:, start:end], bias).bfloat16(), features[:, :0]
        shares = first[:, : start + joined.shape[1]].t().expand(len(steps), -1, -1)
        fill = -(shares.shape[1] + 1) % MIN_BF16
        weights = nn.functional.pad(th.cat([shares, table.unsqueeze(1)], dim=1), (0, 0, 0, fill)).bfloat16().unbind()
        others = nn.functional.pad(nn.functional.pad(joined, (0, 1), value=1.0), (0, fill)).bfloat16()
        layers = self._calls(Linear.in_bf16)

        def predict_noise(x: th.Tensor, t: int) -> th.Tensor:
            inputs = th.cat([x.bfloat16(), others], dim=1)
            hidden = inputs @ weights[t] if context is None else th.addmm(context, inputs, weights[t])
            for layer in layers:
                hidden = layer(hidden)
            return hidden.float()

        return predict_noise

    def forward(self, features: th.Tensor, actions: th.Tensor, t: th.Tensor) -> th.Tensor:
        """
        Noise prediction eps(s, a_t, t).

        :param features: Features of the observation, shape ``(batch, features_dim)``
        :param actions: Noised actions, shape ``(batch, action_dim)``
        :param t: Diffusion steps, int64, shape ``(batch,)``
        :return: Predicted noise, shape ``(batch, action_dim)``
        """
        x = th.cat([actions, features, self.time_mlp(self.fourier(t))], dim=-1)
        out: th.Tensor = self.trunk(self.input_layer(x))
        return out
