"""Target actions and categorical critics."""

import numpy as np
import pytest
import torch as th

from sb3_qsm.ddiffpg.losses import ascend_actions, categorical_loss, categorical_projection
from sb3_qsm.ddiffpg.policies import CategoricalCritic, MlpPolicy, StackedCritics
from tests.test_run import BOX


def test_target_actions_climb_within_their_bounds():
    th.manual_seed(0)
    policy = MlpPolicy(BOX, BOX, lambda _: 3e-4, net_arch=[32])
    with th.no_grad():
        for parameter in policy.critic.parameters():
            parameter.mul_(3.0)
    features, actions = th.randn(64, 3), th.rand(64, 3) * 2 - 1

    def min_q(a: th.Tensor) -> th.Tensor:
        return policy.critic.q_values(features, a).amin(dim=0)

    found = [ascend_actions(min_q, actions, steps) for steps in (0, 1, 5, 20)]
    assert th.equal(found[0], actions)
    with th.no_grad():
        values = [min_q(a).mean().item() for a in found]
        assert values == sorted(values)
        # For each state, but for a step over a ridge
        assert (min_q(found[-1]) >= min_q(actions) - 1e-3).float().mean() > 0.95
    assert all(a.abs().max() <= 1.0 for a in found)
    # Adam moves by about its learning rate
    assert (found[1] - actions).abs().max() <= 0.03 + 1e-6
    assert (found[-1] - actions).abs().max() <= 1.1 * 20 * 0.03
    assert all(parameter.grad is None for parameter in policy.critic.parameters())


def test_ascent_stops_at_a_maximum_and_at_the_bounds():
    best = th.tensor([[0.3, -0.2], [0.0, 0.5]])
    actions = ascend_actions(lambda a: -(a - best).square().sum(dim=1), th.zeros(2, 2), steps=300)
    th.testing.assert_close(actions, best, atol=0.02, rtol=0.0)
    th.testing.assert_close(ascend_actions(lambda a: a.sum(dim=1), th.zeros(2, 2), steps=60), th.ones(2, 2))
    # Stored actions may lie a rounding outside
    assert ascend_actions(lambda a: a.sum(dim=1), th.full((1, 1), 1.0001), steps=1).item() == 1.0


def test_gradient_is_clipped():
    """Without a limit a gradient of 1e12 would be Adam's whole memory."""
    steps = []

    def steep_once(a: th.Tensor) -> th.Tensor:
        steps.append(0)
        return a.sum(dim=1) * (1e12 if len(steps) == 1 else -1.0)

    clipped = ascend_actions(steep_once, th.zeros(1, 1), steps=20)
    assert clipped.item() < 0.0


def project_by_hand(support, probabilities, reward, done, discount):
    """The loop of the paper's Algorithm 1."""
    n, spacing = len(support), support[1] - support[0]
    out = np.zeros(n)
    for atom, p in zip(support, probabilities, strict=True):
        b = (np.clip(reward + (1 - done) * discount * atom, support[0], support[-1]) - support[0]) / spacing
        low, high = int(np.floor(b + 1e-9)), int(np.ceil(b - 1e-9))
        if low == high:
            out[low] += p
        else:
            out[low] += p * (high - b)
            out[high] += p * (b - low)
    return out


def test_projection_of_the_distribution():
    rng = np.random.default_rng(0)
    support = np.linspace(-1.0, 4.0, 11)
    probabilities = rng.dirichlet(np.ones(11), size=20)
    rewards, dones = rng.uniform(-2.0, 5.0, 20), rng.integers(0, 2, 20).astype(float)
    found = categorical_projection(
        *(th.as_tensor(x, dtype=th.float64) for x in (support, probabilities, rewards[:, None], dones[:, None])), 0.9
    )
    expected = [project_by_hand(support, *row, 0.9) for row in zip(probabilities, rewards, dones, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-8)
    np.testing.assert_allclose(found.sum(dim=1), 1.0)
    # Where nothing is cut off, the mean is r + gamma z
    inside = categorical_projection(
        th.as_tensor(support), th.as_tensor(probabilities[:1]), th.full((1, 1), 0.1), th.zeros(1, 1), 0.5
    )
    assert (inside @ th.as_tensor(support)).item() == pytest.approx(0.1 + 0.5 * (probabilities[0] @ support))


def test_categorical_critic_learns_a_mean():
    th.manual_seed(0)
    kwargs = {"n_atoms": 21, "v_min": -2.0, "v_max": 2.0}
    policy = MlpPolicy(BOX, BOX, lambda _: 1e-2, net_arch=[16], categorical=kwargs, n_critics=3)
    critic = policy.critic
    assert isinstance(critic, CategoricalCritic)
    features, actions = th.randn(8, 3), th.rand(8, 3)
    assert critic.logits(features, actions).shape == (3, 8, 21)
    assert critic.q_values(features, actions).shape == (3, 8)
    assert [value.shape for value in critic(features, actions)] == [(8, 1)] * 3
    support = th.linspace(-2.0, 2.0, 21)
    target = categorical_projection(support, th.ones(8, 21) / 21, th.linspace(-1.5, 1.5, 8).unsqueeze(1), th.ones(8, 1), 0.9)
    first = categorical_loss(critic.logits(features, actions), target).item()
    for _ in range(200):
        critic.optimizer.zero_grad()
        loss = categorical_loss(critic.logits(features, actions), target)
        loss.backward()
        critic.optimizer.step()
    entropy = 3 * -(target * target.clamp_min(1e-12).log()).sum(dim=1).mean().item()
    assert entropy - 1e-4 <= loss.item() < first
    with th.no_grad():
        th.testing.assert_close(critic.q_values(features, actions), th.linspace(-1.5, 1.5, 8).expand(3, 8), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("categorical", [None, {"n_atoms": 11, "v_min": -1.0, "v_max": 2.0}])
@pytest.mark.parametrize("policy_kwargs", [{"critic_layer_norm": True, "n_critics": 3}, {"critic_layer_norm": False}])
def test_stacked_critics_are_the_critics(categorical, policy_kwargs):
    th.manual_seed(0)
    policy = MlpPolicy(BOX, BOX, lambda _: 1e-3, net_arch=[16, 8], n_modes=2, categorical=categorical, **policy_kwargs)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    critics, sizes = [pair[0] for pair in policy.group_critics()], [5, 3, 4]
    features, actions = th.randn(12, 3).split(sizes), (th.rand(12, 3) * 2 - 1).requires_grad_()
    stacked = StackedCritics(critics, features)(actions)
    parts = zip(critics, features, actions.split(sizes), strict=True)
    expected = th.cat([critic.q_values(*part).amin(dim=0) for critic, *part in parts])
    th.testing.assert_close(stacked, expected)
    assert expected.unique().numel() == 12
    (gradient,), (expected_gradient,) = (th.autograd.grad(values.sum(), actions) for values in (stacked, expected))
    th.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().min() > 0
