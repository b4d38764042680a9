"""A step of an optimizer on a loss, eager or compiled."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_qsm.common.losses import Metrics
from sb3_qsm.common.performance import autocast, compile_update

Tensors = dict[str, th.Tensor]


def adam_scalars(step: th.Tensor, learning_rate: float, betas: tuple[float, float], epsilon: float) -> th.Tensor:
    r"""
    What Adam's update has in common for all parameters (arXiv 1412.6980, Algorithm 1), computed in double precision.

    :param step: Number of this step, from 1, a scalar
    :param learning_rate: Learning rate
    :param betas: :math:`\beta_1` and :math:`\beta_2`
    :param epsilon: Term added to the root for stability
    :return: Weights of the gradient and of its square in their running means, correction of the latter, step size, epsilon
    """
    on_cpu = step.device.type == "cpu"
    # On a GPU a number would have to be waited for
    count: Any = step.item() if on_cpu else step.double()
    weight1, weight2 = (1.0 - beta for beta in betas)
    correction1, correction2 = (1.0 - beta**count for beta in betas)
    scalars = [weight1, weight2, 1.0 / correction2, learning_rate / correction1, epsilon]
    if on_cpu:
        return th.tensor(scalars, dtype=th.float32)
    return th.stack([th.as_tensor(scalar, dtype=th.float32, device=step.device) for scalar in scalars])


def adam_update(
    parameter: th.Tensor, gradient: th.Tensor, mean: th.Tensor, square: th.Tensor, scalars: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    One step of Adam on one parameter (arXiv 1412.6980, Algorithm 1).

    :param parameter: The parameter
    :param gradient: Its gradient
    :param mean: Running mean of the gradient
    :param square: Running mean of its square
    :param scalars: See :func:`adam_scalars`
    :return: New parameter and running means
    """
    weight1, weight2, correction2, step_size, epsilon = scalars.unbind()
    mean = mean + weight1 * (gradient - mean)
    square = square + weight2 * (gradient * gradient - square)
    return parameter - step_size * mean / ((square * correction2).sqrt() + epsilon), mean, square


def members_of(networks: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """
    For a look whether any part was replaced, before every update: the values of these are listed in a fraction of the time
    that the recursion of :meth:`torch.nn.Module.parameters` takes.

    :param networks: Modules
    :return: The dictionaries in which they and all modules in them have their parameters and modules, without the empty ones
    """
    modules = itertools.chain.from_iterable(network.modules() for network in networks)
    return [members for module in modules for members in (module._parameters, module._modules) if members]


def are_the_same(objects: list[Any], others: list[Any]) -> bool:
    """
    :param objects: Some objects
    :param others: Others
    :return: Whether they are the same objects in the same order
    """
    return len(objects) == len(others) and all(map(operator.is_, objects, others))


class Moments(NamedTuple):
    """
    State of Adam for some parameters.

    :param means: Running means of the gradients, by the parameters' names
    :param squares: Running means of their squares
    :param steps: Numbers of steps, shape ``(n_parameters,)``
    :param counters: The same numbers as views of ``steps``, which are what the optimizer has
    """

    means: Tensors
    squares: Tensors
    steps: th.Tensor
    counters: list[th.Tensor]


class GradientStep:
    """
    A loss, its gradient in the parameters of an optimizer and the step of the optimizer. A loss that is not finite leaves the
    parameters as they are, on the CPU and where Adam's step is compiled. Parameters without ``requires_grad`` stay too.

    Compiled, loss and gradient are one graph, and with Adam the step is in it too; another optimizer does its own. The
    features must not carry a gradient then.

    :param loss: Module that returns the loss and metrics
    :param name: Name of the loss in the metrics
    :param network: Module whose ``optimizer`` holds the parameters; it may be replaced by another optimizer of them
    :param compiled: Whether to compile
    :param precision: One of :data:`sb3_qsm.common.performance.PRECISIONS`
    """

    def __init__(
        self, loss: nn.Module, name: str, network: nn.Module, compiled: bool = False, precision: str = "float32"
    ) -> None:
        self.loss, self.name, self.network = loss, name, network
        self.compiled, self.precision = compiled, precision
        wanted = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        self.parameters = {name: parameter for name, parameter in loss.named_parameters() if id(parameter) in wanted}
        self.device = next(iter(self.parameters.values())).device
        #: Names of the parameters that the functions below were made for
        self.trained: set[str] = set()
        self.gradients: Callable[..., tuple[Tensors, Metrics]] = self._autograd
        self.adam: Callable[..., Metrics] | None = None
        self._moments: Moments | None = None
        self._moments_of: list[Any] = []

    @property
    def optimizer(self) -> th.optim.Optimizer:
        """Optimizer of the parameters."""
        return self.network.optimizer  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied or pickled it is made anew: what is compiled is a function of the networks that it was compiled for
        return type(self), (self.loss, self.name, self.network, self.compiled, self.precision)

    def _autograd(self, parameters: Tensors, *args: Any) -> tuple[Tensors, Metrics]:
        with autocast(self.device, self.precision):
            loss, metrics = self.loss(*args)
        if not parameters:
            return {}, metrics
        gradients = th.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, gradients, strict=True)), metrics

    def _functional(self, parameters: Tensors, *args: Any) -> tuple[Tensors, Metrics]:
        def loss(parameters: Tensors) -> Any:
            with autocast(self.device, self.precision):
                return th.func.functional_call(self.loss, parameters, args)

        # One graph with the backward pass in it: nothing is saved between the two passes
        gradients, metrics = th.func.grad(loss, has_aux=True)(parameters)
        return gradients, metrics

    def _adam(self, parameters: Tensors, means: Tensors, squares: Tensors, scalars: th.Tensor, *args: Any) -> Metrics:
        gradients, metrics = self._functional(parameters, *args)
        finite = metrics[self.name].isfinite()
        for name, parameter in parameters.items():
            old = (parameter, means[name], squares[name])
            new = adam_update(parameter, gradients[name], means[name], squares[name], scalars)
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(th.where(finite, value, tensor))
        return metrics

    def __call__(self, *args: Any) -> Metrics:
        """
        Do the step.

        :param args: Arguments of the loss
        :return: Metrics of the loss
        """
        trained: Tensors = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        if trained.keys() != self.trained:
            self._prepare(trained)
        if self.adam is not None and is_plain_adam(self.optimizer):
            moments = self._adam_moments(trained)
            (group,) = self.optimizer.param_groups
            scalars = adam_scalars(moments.steps[0] + 1, group["lr"], group["betas"], group["eps"])
            metrics = self.adam(trained, moments.means, moments.squares, scalars, *args)
            if self._finite(metrics):
                moments.steps.add_(1)
            return metrics
        gradients, metrics = self.gradients(trained, *args)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        if self._finite(metrics):
            complete = len(gradients) > 0 and all(gradient is not None for gradient in gradients.values())
            if complete and takes_fused_step(self.optimizer, self.device):
                fused_adam_step(self.optimizer, trained, gradients, self._adam_moments(trained))
            else:
                self.optimizer.step()
        return metrics

    def _adam_moments(self, trained: Tensors) -> Moments:
        """State of Adam for these parameters, looked up again where it is another than at the last step."""
        state = self.optimizer.state
        found = list(itertools.chain.from_iterable(map(dict.values, map(state.__getitem__, trained.values()))))
        if self._moments is None or not are_the_same(found, self._moments_of):
            self._moments = adam_moments(self.optimizer, trained)
            self._moments_of = [value for parameter in trained.values() for value in state[parameter].values()]
        return self._moments

    def _prepare(self, trained: Tensors) -> None:
        """Compile for these parameters: what is compiled does not look whether they are others than before."""
        self.trained, self.gradients, self.adam, self._moments = set(trained), self._autograd, None, None
        if not self.compiled or not trained:
            return
        self.gradients = compile_update(self._functional, self.device)
        # One number of steps for all: not if some parameters were left out for a while
        if len({float(self.optimizer.state.get(parameter, {}).get("step", 0)) for parameter in trained.values()}) == 1:
            self.adam = compile_update(self._adam, self.device)

    def _finite(self, metrics: Metrics) -> bool:
        """Whether the loss is finite. On a GPU the look would wait for the device, so there it counts as such."""
        return self.device.type != "cpu" or math.isfinite(metrics[self.name].item())


def is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: An optimizer
    :return: Whether it is Adam of one group with none of PyTorch's additions, and nothing else happens at its steps
    """
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    additions = ("amsgrad", "maximize", "weight_decay", "differentiable")
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    # PyTorch's learning rate schedulers, among others, put a step of their own in the optimizer
    return not any(group[name] for name in additions) and not any(hooks) and "step" not in vars(optimizer)


def adam_state(optimizer: th.optim.Optimizer, parameter: th.Tensor) -> dict[str, Any]:
    """
    :param optimizer: Adam
    :param parameter: One of its parameters
    :return: Its state, made as Adam's first step makes it
    """
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        group = optimizer.param_groups[0]
        device = parameter.device if group["fused"] or group["capturable"] else th.device("cpu")
        state["step"] = th.zeros((), dtype=th.float32, device=device)
        state["exp_avg"] = th.zeros_like(parameter, memory_format=th.preserve_format)
        state["exp_avg_sq"] = th.zeros_like(parameter, memory_format=th.preserve_format)
    return state


def adam_moments(optimizer: th.optim.Optimizer, parameters: Tensors) -> Moments:
    """
    :param optimizer: Adam
    :param parameters: Some of its parameters by name, changed in place: their numbers of steps become views of one tensor, so
        that one operation advances all of them
    :return: Their state
    """
    states = {name: adam_state(optimizer, parameter) for name, parameter in parameters.items()}
    steps = th.stack([state["step"] for state in states.values()])
    counters = list(steps.unbind())
    for state, counter in zip(states.values(), counters, strict=True):
        state["step"] = counter
    means, squares = ({name: state[key] for name, state in states.items()} for key in ("exp_avg", "exp_avg_sq"))
    return Moments(means, squares, steps, counters)


def takes_fused_step(optimizer: th.optim.Optimizer, device: th.device) -> bool:
    """
    :param optimizer: An optimizer
    :param device: Device of its parameters
    :return: Whether :func:`fused_adam_step` does what its step does
    """
    if not is_plain_adam(optimizer):
        return False
    (group,) = optimizer.param_groups
    return bool(group["fused"]) and device.type == "cpu" and isinstance(group["lr"], float)


@th.no_grad()
def fused_adam_step(optimizer: th.optim.Optimizer, parameters: Tensors, gradients: Tensors, moments: Moments) -> None:
    """
    The step of PyTorch's fused Adam, without what :meth:`torch.optim.Adam.step` looks up before it, which takes longer.

    :param optimizer: Adam, see :func:`takes_fused_step`
    :param parameters: Parameters by name, changed in place
    :param gradients: Their gradients
    :param moments: Their state, changed in place
    """
    (group,) = optimizer.param_groups
    moments.steps.add_(1)
    th._fused_adam_(
        list(parameters.values()),
        [gradients[name] for name in parameters],
        list(moments.means.values()),
        list(moments.squares.values()),
        [],
        moments.counters,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def average_weight(tau: float, n_updates: int) -> float:
    """
    Weight of the newest parameters in a moving average. At first the average covers the last tenth of the updates that there
    were, so that it does not lag behind a network that has just begun to learn.

    :param tau: The weight in the long run, between 0 and 1
    :param n_updates: Updates so far
    :return: Weight, 1 without any update
    """
    return max(tau, 9.0 / (9.0 + n_updates))


class PolyakUpdate:
    """
    Polyak update of a target network; running statistics follow at once, see SB3 issue #996.

    :param network: The network
    :param target: Its target network
    """

    def __init__(self, network: nn.Module, target: nn.Module) -> None:
        # Looked up once: that takes longer than the update
        self.parameters, self.targets = tuple(network.parameters()), tuple(target.parameters())
        # What is not saved is no state of a network but a constant, such as a noise schedule's
        saved = network.state_dict().keys()
        self.buffers = [name for name, _ in network.named_buffers() if name in saved]
        self.network, self.target = network, target

    @th.no_grad()
    def __call__(self, tau: float) -> None:
        """
        Do it.

        :param tau: Weight of the network's parameters, between 0 and 1
        """
        th._foreach_lerp_(self.targets, self.parameters, tau)
        for name in self.buffers:
            # Anew each time: running statistics may be other tensors after each forward pass
            self.target.get_buffer(name).copy_(self.network.get_buffer(name))
