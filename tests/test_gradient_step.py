"""Steps of the optimizers and of the target networks."""

from copy import deepcopy
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sb3_qsm.common.gradient_step import (
    GradientStep,
    PolyakUpdate,
    adam_moments,
    adam_scalars,
    adam_state,
    adam_update,
    is_plain_adam,
    takes_fused_step,
)


class Quadratic(nn.Module):
    """Loss |w x - 1|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.tensor([0.5, -2.0, 3.0]))
        self.frozen = nn.Parameter(th.ones(1))

    def forward(self, x: th.Tensor) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        loss = (self.weight * x - self.frozen).square().sum()
        return loss, {"quadratic_loss": loss.detach()}


def make_step(compiled: bool, **kwargs: Any) -> tuple[Quadratic, GradientStep]:
    loss = Quadratic()
    loss.optimizer = th.optim.Adam([loss.weight], **{"lr": 0.1, **kwargs})
    return loss, GradientStep(loss, "quadratic_loss", loss, compiled)


def test_adam_is_the_one_of_pytorch() -> None:
    """Over a changing learning rate, for gradients of very different magnitude, and for a zero one."""
    generator = th.Generator().manual_seed(0)
    expected = nn.Parameter(th.randn(4, 5, generator=generator))
    optimizer = th.optim.Adam([expected], lr=3e-4, betas=(0.8, 0.99), eps=1e-6)
    parameter, mean, square = expected.detach().clone(), th.zeros(4, 5), th.zeros(4, 5)
    for step in range(1, 20):
        gradient = th.randn(4, 5, generator=generator) * th.tensor([1e-8, 1e-3, 1.0, 1e3, 0.0])
        optimizer.param_groups[0]["lr"] = rate = 3e-4 * step
        expected.grad = gradient
        optimizer.step()
        scalars = adam_scalars(th.tensor(float(step)), rate, (0.8, 0.99), 1e-6)
        parameter, mean, square = adam_update(parameter, gradient, mean, square, scalars)
        th.testing.assert_close(parameter, expected.detach(), rtol=1e-5, atol=1e-6)
    th.testing.assert_close(mean, optimizer.state[expected]["exp_avg"])
    th.testing.assert_close(square, optimizer.state[expected]["exp_avg_sq"])


@pytest.mark.parametrize("fused", [False, True])
def test_first_state_is_the_one_of_pytorch(fused: bool) -> None:
    parameters = [nn.Parameter(th.ones(2, 3)) for _ in range(2)]
    optimizers = [th.optim.Adam([parameter], fused=fused) for parameter in parameters]
    ours = adam_state(optimizers[0], parameters[0])
    parameters[1].grad = th.zeros(2, 3)
    optimizers[1].step()
    theirs = optimizers[1].state[parameters[1]]
    assert ours.keys() == theirs.keys()
    for key in ("exp_avg", "exp_avg_sq"):
        th.testing.assert_close(ours[key], theirs[key])
    assert ours["step"] == 0
    assert (ours["step"].dtype, ours["step"].shape) == (theirs["step"].dtype, theirs["step"].shape)
    assert adam_state(optimizers[1], parameters[1]) is theirs


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_step_is_the_eager_one(fused: bool) -> None:
    (eager_loss, eager), (loss, step) = (make_step(compiled, fused=fused) for compiled in (False, True))
    for rate in (0.1, 0.1, 0.01):
        for each in (eager, step):
            each.optimizer.param_groups[0]["lr"] = rate
            metrics = each(th.tensor([1.0, 2.0, 3.0]))
        assert metrics["quadratic_loss"] > 0
        th.testing.assert_close(loss.weight, eager_loss.weight)
    th.testing.assert_close(step.optimizer.state_dict()["state"], eager.optimizer.state_dict()["state"])
    # The state is that of the optimizer: it goes on after a saved and loaded one
    step.optimizer.load_state_dict(deepcopy(eager.optimizer.state_dict()))
    for each in (eager, step):
        each(th.tensor([1.0, 2.0, 3.0]))
    th.testing.assert_close(loss.weight, eager_loss.weight)
    assert loss.frozen == 1.0


def test_every_step_is_compiled_for_itself() -> None:
    """PyTorch compiles a few versions of one function and then stops: the models of a process must not share them."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(3):
            (eager_loss, eager), (loss, step) = (make_step(compiled) for compiled in (False, True))
            for each in (eager, step):
                each(th.tensor([1.0, 2.0, 3.0]))
            th.testing.assert_close(loss.weight, eager_loss.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_trains_its_own_parameters(compiled: bool) -> None:
    loss, step = make_step(compiled)
    step(th.tensor([1.0, 2.0, 3.0]))
    loss_copy, copied = deepcopy((loss, step))
    weight = loss.weight.detach().clone()
    copied(th.tensor([1.0, 2.0, 3.0]))
    assert th.equal(loss.weight, weight)
    # The running means were copied too
    step(th.tensor([1.0, 2.0, 3.0]))
    assert not th.equal(loss.weight, weight)
    th.testing.assert_close(loss_copy.weight, loss.weight)


def test_another_batch_size_is_compiled_anew() -> None:
    (eager_loss, eager), (loss, step) = (make_step(compiled) for compiled in (False, True))
    for rows in (4, 2, 4):
        for each in (eager, step):
            each(th.arange(3.0 * rows).reshape(rows, 3))
        th.testing.assert_close(loss.weight, eager_loss.weight)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_finite_changes_nothing(compiled: bool) -> None:
    loss, step = make_step(compiled)
    step(th.ones(3))
    before = {key: value.clone() for key, value in adam_state(step.optimizer, loss.weight).items()}
    weight = loss.weight.detach().clone()
    metrics = step(th.tensor([1.0, th.nan, 1.0]))
    assert metrics["quadratic_loss"].isnan()
    th.testing.assert_close(loss.weight.detach(), weight)
    th.testing.assert_close(adam_state(step.optimizer, loss.weight), before)


class TwoWeights(nn.Module):
    """Loss |a x - b|^2 of two weights."""

    def __init__(self, fused: bool | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(th.tensor([0.5, -2.0, 3.0])), nn.Parameter(th.ones(3))
        self.optimizer = th.optim.Adam([self.a, self.b], lr=0.1, fused=fused)

    def forward(self, x: th.Tensor) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        loss = (self.a * x - self.b).square().sum()
        return loss, {"quadratic_loss": loss.detach()}


@pytest.mark.parametrize(("compiled", "fused"), [(False, False), (True, False), (False, True)])
def test_parameters_without_gradient_stay(compiled: bool, fused: bool) -> None:
    """As PyTorch does it, also when they are let go again: Adam has done fewer steps with them then."""
    ours, theirs = TwoWeights(fused), TwoWeights(fused)
    step = GradientStep(ours, "quadratic_loss", ours, compiled)
    x = th.tensor([1.0, 2.0, 3.0])
    for frozen in ("", "a", "ab", "b", ""):
        before = [ours.a.detach().clone(), ours.b.detach().clone()]
        for network in (ours, theirs):
            for name in "ab":
                getattr(network, name).requires_grad_(name not in frozen)
        for _ in range(3):
            metrics = step(x)
            theirs.optimizer.zero_grad()
            loss = theirs(x)[0]
            th.testing.assert_close(metrics["quadratic_loss"], loss.detach())
            if loss.requires_grad:
                loss.backward()
                theirs.optimizer.step()
        for name, old in zip("ab", before, strict=True):
            th.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
            assert th.equal(getattr(ours, name), old) == (name in frozen)


def test_fused_step_is_the_one_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, over a changing rate, after a saved and loaded state, and where the optimizer does a step of its own."""
    ours, theirs = TwoWeights(fused=True), TwoWeights(fused=True)
    step = GradientStep(ours, "quadratic_loss", ours)
    own_steps = []
    own_step = th.optim.Adam.step
    monkeypatch.setattr(th.optim.Adam, "step", lambda self, *args: own_steps.append(self) or own_step(self, *args))

    def both(x: th.Tensor) -> None:
        step(x)
        theirs.optimizer.zero_grad()
        theirs(x)[0].backward()
        theirs.optimizer.step()
        for key in ("a", "b"):
            assert th.equal(getattr(ours, key), getattr(theirs, key))
        states = [network.optimizer.state_dict()["state"] for network in (ours, theirs)]
        th.testing.assert_close(*states, rtol=0.0, atol=0.0)
        assert [value["step"].shape for value in states[0].values()] == [(), ()]

    for rate in (0.1, 0.1, 0.01):
        for network in (ours, theirs):
            network.optimizer.param_groups[0]["lr"] = rate
        both(th.tensor([1.0, 2.0, 3.0]))
    for network in (ours, theirs):
        network.optimizer.load_state_dict(deepcopy(ours.optimizer.state_dict()))
    both(th.tensor([3.0, 1.0, 2.0]))
    for network in (ours, theirs):
        network.optimizer.state[network.a]["exp_avg"] = th.ones(3)
    both(th.tensor([3.0, 1.0, 2.0]))
    for network in (ours, theirs):
        network.optimizer.state.clear()
    both(th.tensor([3.0, 1.0, 2.0]))
    assert ours.optimizer not in own_steps

    hooks = [network.optimizer.register_step_post_hook(lambda *_: None) for network in (ours, theirs)]
    both(th.tensor([1.0, 3.0, 2.0]))
    assert own_steps[-2:] == [ours.optimizer, theirs.optimizer]
    for hook in hooks:
        hook.remove()
    both(th.tensor([1.0, 3.0, 2.0]))
    assert own_steps[-2:] == [theirs.optimizer, theirs.optimizer]


def test_a_parameter_that_the_loss_does_not_use() -> None:
    class Unused(TwoWeights):
        def forward(self, x: th.Tensor) -> tuple[th.Tensor, dict[str, th.Tensor]]:
            loss = (self.a * x).square().sum()
            return loss, {"quadratic_loss": loss.detach()}

    loss = Unused(fused=True)
    GradientStep(loss, "quadratic_loss", loss)(th.ones(3))
    assert not th.equal(loss.a.detach(), TwoWeights().a)
    assert th.equal(loss.b.detach(), TwoWeights().b)
    assert loss.b not in loss.optimizer.state


def test_one_operation_counts_the_steps() -> None:
    network = TwoWeights()
    network.optimizer.state[network.b] = {**adam_state(network.optimizer, network.b), "step": th.tensor(4.0)}
    moments = adam_moments(network.optimizer, {"a": network.a, "b": network.b})
    moments.steps.add_(1)
    assert [network.optimizer.state[parameter]["step"].item() for parameter in (network.a, network.b)] == [1.0, 5.0]
    assert list(map(id, moments.counters)) == [id(network.optimizer.state[p]["step"]) for p in (network.a, network.b)]


def test_what_the_fused_step_is_for() -> None:
    weight, cpu = nn.Parameter(th.ones(2)), th.device("cpu")
    assert takes_fused_step(th.optim.Adam([weight], fused=True), cpu)
    assert not takes_fused_step(th.optim.Adam([weight]), cpu)
    assert not takes_fused_step(th.optim.Adam([weight], fused=True, lr=th.tensor(0.1)), cpu)
    assert not takes_fused_step(th.optim.Adam([weight], fused=True, weight_decay=0.1), cpu)
    assert not takes_fused_step(th.optim.Adam([weight], fused=True), th.device("cuda"))


def test_other_optimizers_do_their_own_step() -> None:
    weight = nn.Parameter(th.ones(2))
    assert is_plain_adam(th.optim.Adam([weight]))
    assert is_plain_adam(th.optim.Adam([weight], fused=True, betas=(0.5, 0.9), eps=1e-5))
    others = [
        *(th.optim.Adam([weight], **{name: True}) for name in ("amsgrad", "maximize", "differentiable")),
        *(th.optim.Adam([weight], weight_decay=0.1), th.optim.AdamW([weight]), th.optim.SGD([weight], lr=0.1)),
        th.optim.Adam([{"params": [weight]}, {"params": [nn.Parameter(th.ones(1))]}]),
    ]
    hooked = th.optim.Adam([weight])
    hooked.register_step_post_hook(lambda *_: None)
    scheduled = th.optim.Adam([weight])
    th.optim.lr_scheduler.ConstantLR(scheduled)  # counts the steps
    assert not any(map(is_plain_adam, [*others, hooked, scheduled]))
    everywhere = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert not is_plain_adam(th.optim.Adam([weight]))
    finally:
        everywhere.remove()
    assert is_plain_adam(th.optim.Adam([weight]))


def test_compiled_step_of_another_optimizer() -> None:
    losses = [Quadratic(), Quadratic()]
    for loss, compiled in zip(losses, (False, True), strict=True):
        loss.optimizer = th.optim.SGD([loss.weight], lr=0.01, momentum=0.9)
        step = GradientStep(loss, "quadratic_loss", loss, compiled)
        step(th.tensor([1.0, 2.0, 3.0]))
        step(th.tensor([1.0, 2.0, 3.0]))
    th.testing.assert_close(losses[0].weight, losses[1].weight)
    assert not th.allclose(losses[1].weight, Quadratic().weight)


def test_polyak_update() -> None:
    network, target = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    network(th.randn(8, 3))  # changes the running statistics
    old = [parameter.detach().clone() for parameter in target.parameters()]
    PolyakUpdate(network, target)(0.25)
    for before, new, now in zip(old, network.parameters(), target.parameters(), strict=True):
        th.testing.assert_close(now.detach(), 0.75 * before + 0.25 * new.detach())
    for new, now in zip(network.buffers(), target.buffers(), strict=True):
        assert th.equal(new, now)


def test_polyak_update_of_a_replaced_buffer() -> None:
    networks = [nn.BatchNorm1d(4) for _ in range(2)]
    update = PolyakUpdate(*networks)
    networks[0].running_mean = th.full((4,), 3.0)
    update(0.5)
    assert th.equal(networks[1].running_mean, th.full((4,), 3.0))


def test_polyak_update_of_a_constant() -> None:
    """What is not saved with a network does not change; to copy it took longer than the parameters."""
    networks = [nn.Linear(2, 2) for _ in range(2)]
    for i, network in enumerate(networks):
        network.register_buffer("constant", th.full((2,), float(i)), persistent=False)
        network.register_buffer("state", th.full((2,), float(i)))
    PolyakUpdate(*networks)(1.0)
    assert th.equal(networks[1].constant, th.ones(2))
    assert th.equal(networks[1].state, th.zeros(2))
    assert th.equal(networks[0].weight, networks[1].weight)
