"""Novelty of positions."""

import pytest
import torch as th

from sb3_qsm.ddiffpg.novelty import MAX_NOVELTY, RandomNetworkDistillation, noveld_reward


def train(novelty: RandomNetworkDistillation, positions: th.Tensor, steps: int) -> None:
    optimizer = th.optim.Adam(novelty.predictor.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        novelty.error(positions).square().mean().backward()
        optimizer.step()


def test_novelty_falls_with_visits_and_stays_elsewhere():
    th.manual_seed(0)
    everywhere = th.rand(500, 2) * 10 - 5
    novelty = RandomNetworkDistillation(2)
    novelty.fit(everywhere)
    visited, other = everywhere[everywhere[:, 0] < 0], everywhere[everywhere[:, 0] > 1]
    with th.no_grad():
        before, before_other = novelty(visited).mean(), novelty(other).mean()
    values = [before.item()]
    for _ in range(3):
        train(novelty, visited, 60)
        with th.no_grad():
            values.append(novelty(visited).mean().item())
    assert values == sorted(values, reverse=True)
    with th.no_grad():
        assert values[-1] < 0.3 * before
        assert novelty(other).mean() > 2 * values[-1]
        assert novelty(other).mean() > 0.4 * before_other


def test_near_positions_can_be_told_apart():
    """Between two visited bands a tenth of the space wide there is something new."""
    th.manual_seed(0)
    x = th.linspace(-1, 1, 400).unsqueeze(1)
    novelty = RandomNetworkDistillation(1)
    novelty.fit(x)
    gap = x[:, 0].abs() < 0.05
    train(novelty, x[~gap], 300)
    with th.no_grad():
        assert novelty(x[gap]).mean() > 2 * novelty(x[~gap]).mean()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_scales_of_positions_and_novelty(scale):
    th.manual_seed(0)
    positions = scale * (th.randn(300, 3) + 2)
    novelty = RandomNetworkDistillation(3)
    assert not novelty.fitted
    novelty.fit(positions)
    assert novelty.fitted
    with th.no_grad():
        assert novelty(positions).mean() == pytest.approx(1.0, rel=1e-4)
    # Training moves the predictor alone
    target = [parameter.clone() for parameter in novelty.target.parameters()]
    train(novelty, positions, 2)
    assert all(th.equal(old, new) for old, new in zip(target, novelty.target.parameters(), strict=True))


def test_one_position_only():
    novelty = RandomNetworkDistillation(2)
    novelty.fit(th.ones(10, 2))
    assert novelty(th.ones(1, 2)).isfinite().all()


def test_novelty_is_bounded():
    """A coordinate that never changed at first, and then does."""
    th.manual_seed(0)
    positions = th.cat([th.rand(200, 1), th.zeros(200, 1)], dim=1)
    novelty = RandomNetworkDistillation(2)
    novelty.fit(positions)
    with th.no_grad():
        far = novelty(positions + th.tensor([0.0, 1.0]))
    assert novelty(positions).mean() < 2.0 < far.min() <= far.max() <= MAX_NOVELTY


def test_noveld():
    reward = noveld_reward(th.tensor([1.0, 1.0, 4.0]), th.tensor([3.0, 0.4, 2.0]))
    th.testing.assert_close(reward, th.tensor([0.025, 0.0, 0.0]))
    th.testing.assert_close(noveld_reward(th.ones(1), th.ones(1), scale=2.0, alpha=0.25), th.tensor([1.5]))
