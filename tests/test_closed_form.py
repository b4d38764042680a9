"""Score targets and samplers against distributions whose score is known in closed form."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_qsm.common.losses import UpdateNoise, action_gradient
from sb3_qsm.common.policies import DiffusionActor
from sb3_qsm.diffusion import SAMPLERS, NoiseSchedule, ScoreNetwork, predict_clean_sample
from sb3_qsm.qsm.losses import ActorLoss
from sb3_qsm.qsm.targets import (
    SCORE_TARGETS,
    DiffusedActions,
    clip_gradient,
    prior_eps_target,
    running_gradient_norm,
)

# Whole trainings, which the tracer slows; the lines are covered elsewhere
pytestmark = pytest.mark.no_cover

Array = npt.NDArray[np.float64]
TEMPERATURE = 0.05
MEAN = np.array([0.2, -0.3])
PRECISION = np.array([[1.5, 0.4], [0.4, 1.0]])
COVARIANCE = TEMPERATURE * np.linalg.inv(PRECISION)
#: Two modes of a scalar action
WEIGHTS, CENTRES, WIDTH = np.array([0.7, 0.3]), np.array([-0.45, 0.45]), 0.15


class QuadraticCritic(th.nn.Module):
    """Q(a) = -(a - m)' P (a - m) / 2, whose Boltzmann policy is a Gaussian."""

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        difference = actions - th.as_tensor(MEAN, dtype=th.float32)
        return -0.5 * ((difference @ th.as_tensor(PRECISION, dtype=th.float32)) * difference).sum(-1).unsqueeze(0)


class TwoModeCritic(th.nn.Module):
    """Q(a) = lambda log p(a) of a mixture, so that the Boltzmann policy is the mixture."""

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        distance = (actions - th.as_tensor(CENTRES, dtype=th.float32)) / WIDTH
        log_density = th.logsumexp(-0.5 * distance**2 + th.as_tensor(WEIGHTS, dtype=th.float32).log(), dim=-1)
        return TEMPERATURE * log_density.unsqueeze(0)


def q_gradient(critic: th.nn.Module, actions: Array) -> th.Tensor:
    return action_gradient(lambda a: critic.q_values(th.empty(0), a)[0], th.as_tensor(actions, dtype=th.float32))


def exact_eps(noisy: Array, schedule: NoiseSchedule, t: int) -> Array:
    """-sigma_t grad log p_t of the noised Gaussian, from linear algebra in NumPy."""
    signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
    noised_covariance = signal**2 * COVARIANCE + sigma**2 * np.eye(2)
    return sigma * np.linalg.solve(noised_covariance, (noisy - signal * MEAN).T).T


def target_eps(name: str, schedule: NoiseSchedule, t: int, actions: Array, noisy: Array) -> Array:
    column = th.full((len(noisy), 1), 1.0)
    batch = DiffusedActions(
        th.as_tensor(actions, dtype=th.float32),
        th.as_tensor(noisy, dtype=th.float32),
        th.as_tensor(exact_eps(noisy, schedule, t), dtype=th.float32),
        schedule.signal_rates[t] * column,
        schedule.noise_rates[t] * column,
    )
    query, weight = SCORE_TARGETS[name](batch)
    return (-weight / TEMPERATURE * q_gradient(QuadraticCritic(), query.numpy())).numpy().astype(np.float64)


def test_clipped_gradient() -> None:
    """Mean magnitudes 0.5, 2 and 0 against a limit of 1: only the second row is scaled, to a mean magnitude of 1."""
    gradient = th.tensor([[0.5, -0.5], [-3.0, 1.0], [0.0, 0.0]])
    clipped = clip_gradient(gradient, th.tensor(1.0))
    th.testing.assert_close(clipped, th.tensor([[0.5, -0.5], [-1.5, 0.5], [0.0, 0.0]]))


def test_actor_loss_clips_at_the_running_mean() -> None:
    """A gradient of mean magnitude 3 at a running mean of 1 (its own share is 0.5 %) counts as one of 1."""
    space = spaces.Box(-1, 1, (1,))
    th.manual_seed(0)
    actor = DiffusionActor(space, spaces.Box(-1, 1, (2,)), [8], FlattenExtractor(space), 1)

    class Linear(th.nn.Module):
        def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
            return (3.0 * actions).sum(-1).unsqueeze(0)

    features, actions = th.zeros(64, 1), th.rand(64, 2) * 2 - 1
    noise = UpdateNoise(th.empty(0), th.empty(0), th.empty(0), th.randn(64, 2), th.randint(10, (64,)))
    targets = {}
    for clip in (None, 1.0, 100.0):
        loss = ActorLoss(actor, [Linear()], "noised", "mean")
        limit = None if clip is None else th.tensor(clip)
        _, metrics = loss(features, [features], actions, noise, th.tensor(1.0), th.tensor(0.1), None, limit)
        targets[clip] = metrics["score_target"].item()
    sigma = actor.schedule.sigmas[noise.t].mean().item()
    assert targets[1.0] == pytest.approx(sigma / 0.1, rel=1e-4)
    assert targets[None] == pytest.approx(sigma / 0.1 * 3.0 / 1.01, rel=1e-4)
    assert targets[100.0] == targets[None]


@pytest.mark.parametrize("t", [0, 4, 9])
def test_clean_target_is_the_score_in_expectation(t: int) -> None:
    """E[clean target | a_t] over the posterior of a_0 is the exact noise prediction, at every t."""
    schedule, rng = NoiseSchedule("cosine", 10), np.random.default_rng(t)
    signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
    noisy = np.array([0.4, 0.1])
    posterior_covariance = np.linalg.inv(np.linalg.inv(COVARIANCE) + signal**2 / sigma**2 * np.eye(2))
    posterior_mean = posterior_covariance @ (np.linalg.solve(COVARIANCE, MEAN) + signal / sigma**2 * noisy)
    clean = rng.multivariate_normal(posterior_mean, posterior_covariance, 100_000)
    samples = target_eps("clean", schedule, t, clean, np.tile(noisy, (len(clean), 1)))
    standard_error = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - exact_eps(noisy[None], schedule, t)[0]) < 5 * standard_error + 1e-3)


def product_with_prior(prior_std: float) -> tuple[Array, Array]:
    """Mean and covariance of the Gaussian policy times the prior N(0, prior_std^2), by adding precisions."""
    covariance = np.linalg.inv(np.linalg.inv(COVARIANCE) + np.eye(2) / prior_std**2)
    return covariance @ np.linalg.solve(COVARIANCE, MEAN), covariance


@pytest.mark.parametrize("prior_std", [0.2, 0.6, 3.0])
@pytest.mark.parametrize("t", [0, 4, 9])
def test_target_with_prior_is_the_score(t: int, prior_std: float) -> None:
    """
    Exact at the mean of p(a_0 | a_t) for a quadratic Q, and in expectation over p(a_0 | a_t); noise prediction and posterior
    are computed here by Gaussian conditioning.
    """
    schedule, rng = NoiseSchedule("cosine", 10), np.random.default_rng(t)
    signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
    mean, covariance = product_with_prior(prior_std)
    noisy = np.array([0.4, 0.1])
    exact = sigma * np.linalg.solve(signal**2 * covariance + sigma**2 * np.eye(2), noisy - signal * mean)
    posterior_covariance = np.linalg.inv(np.linalg.inv(covariance) + signal**2 / sigma**2 * np.eye(2))
    posterior_mean = posterior_covariance @ (np.linalg.solve(covariance, mean) + signal / sigma**2 * noisy)

    def target(query: Array) -> Array:
        score = q_gradient(QuadraticCritic(), query) / TEMPERATURE
        rates = th.tensor(signal), th.tensor(sigma)
        noisy_actions = th.as_tensor(noisy, dtype=th.float32).expand(len(query), 2)
        return prior_eps_target(noisy_actions, score, *rates, prior_std).numpy().astype(np.float64)

    np.testing.assert_allclose(target(posterior_mean[None])[0], exact, rtol=1e-3, atol=1e-4)
    samples = target(rng.multivariate_normal(posterior_mean, posterior_covariance, 100_000))
    standard_error = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * standard_error + 1e-3)


def test_noised_target_is_the_score_where_there_is_little_noise() -> None:
    """The noised target takes a_t for a_0: exact as sigma_t -> 0, wrong at the end of the chain."""
    schedule, rng = NoiseSchedule("cosine", 1000), np.random.default_rng(0)
    noisy = rng.multivariate_normal(MEAN, COVARIANCE, 256)
    for t, agrees in ((0, True), (900, False)):
        exact = exact_eps(noisy, schedule, t)
        error = np.abs(target_eps("noised", schedule, t, noisy, noisy) - exact).mean() / np.abs(exact).mean()
        assert bool(error < 0.05) is agrees, (t, error)


def test_denoised_target_is_evaluated_at_the_posterior_mean() -> None:
    """With the exact noise prediction, the query is E[a_0 | a_t] (Tweedie), computed here by Gaussian conditioning."""
    schedule, t, noisy = NoiseSchedule("cosine", 10), 5, np.array([[0.4, 0.1], [-0.2, -0.6]])
    signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
    noised_covariance = signal**2 * COVARIANCE + sigma**2 * np.eye(2)
    posterior_mean = MEAN + (signal * COVARIANCE @ np.linalg.solve(noised_covariance, (noisy - signal * MEAN).T)).T
    expected = sigma / TEMPERATURE * (posterior_mean - MEAN) @ PRECISION
    np.testing.assert_allclose(target_eps("denoised", schedule, t, noisy, noisy), expected, rtol=1e-4, atol=1e-4)


def test_paper_target_has_no_sigma() -> None:
    schedule, noisy = NoiseSchedule("vp", 5), np.array([[0.4, 0.1], [1.7, -2.0]])
    for t in range(5):
        expected = (noisy - MEAN) @ PRECISION / TEMPERATURE
        np.testing.assert_allclose(target_eps("paper", schedule, t, noisy, noisy), expected, rtol=1e-4)


def train_actor(
    critic: th.nn.Module,
    target: str,
    draw: Callable[[int], Array],
    sign: float = 1.0,
    prior_std: float | None = None,
    steps: int = 2000,
    batch_size: int = 512,
) -> DiffusionActor:
    """Train a diffusion actor for one state on replayed actions, with the fixed scale 1 / lambda."""
    th.manual_seed(0)
    dim = draw(1).shape[1]
    space = spaces.Box(-1, 1, (1,))
    actor = DiffusionActor(
        space,
        spaces.Box(-1, 1, (dim,)),
        [64, 64],
        FlattenExtractor(space),
        1,
        diffusion_steps=20,
        noise_schedule="vp",
        sampler="ddpm",
    )
    loss_module = ActorLoss(actor, [critic], target, "mean", prior_std)
    optimizer = th.optim.Adam(actor.parameters(), lr=2e-3, fused=True)
    # The clean target is noisy where little of the signal is left: average the parameters, as is usual for diffusion models
    averaged = th.optim.swa_utils.AveragedModel(actor.score_network)
    # ... and draw its steps less often; at every step the minimum of the loss is the same
    frequency = actor.schedule.sqrt_alphas_cumprod / actor.schedule.sigmas
    features, empty = th.zeros(batch_size, 1), th.empty(0)
    for step in range(steps):
        actions = th.as_tensor(draw(batch_size), dtype=th.float32)
        noise = UpdateNoise(empty, empty, empty, th.randn_like(actions), th.multinomial(frequency, batch_size, True))
        loss, _ = loss_module(
            features, [features], actions, noise, th.zeros(()), th.tensor(1.0), th.tensor(sign / TEMPERATURE)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0.35 * steps:
            averaged.update_parameters(actor.score_network)
    actor.score_network.load_state_dict(averaged.module.state_dict())
    return actor


@th.no_grad()
def samples_of(actor: DiffusionActor, n: int = 20_000) -> Array:
    th.manual_seed(1)
    return actor.sample(th.zeros(n, 1), *actor.draw_latents(n)).numpy().astype(np.float64)


def test_trained_actor_samples_the_gaussian() -> None:
    rng = np.random.default_rng(0)
    actor = train_actor(QuadraticCritic(), "clean", lambda n: rng.multivariate_normal(MEAN, COVARIANCE, n), batch_size=2048)
    samples = samples_of(actor)
    np.testing.assert_allclose(samples.mean(0), MEAN, atol=0.06)
    np.testing.assert_allclose(np.cov(samples.T), COVARIANCE, atol=0.3 * COVARIANCE.max())


def test_trained_actor_with_prior_samples_the_product() -> None:
    """The default target, at the actor's own estimate, on uniformly random replayed actions."""
    rng = np.random.default_rng(0)
    actor = train_actor(QuadraticCritic(), "denoised", lambda n: rng.uniform(-1, 1, (n, 2)), prior_std=0.3, steps=1000)
    mean, covariance = product_with_prior(0.3)
    samples = samples_of(actor)
    # A prior that is a quarter wider is out by 0.024 and 0.17
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.1 * covariance.max())
    assert np.abs(mean - MEAN).max() > 0.05  # the prior shows


@pytest.mark.parametrize("prior_std", [None, 0.4])
def test_where_the_critic_is_indifferent(prior_std: float | None) -> None:
    """Without a prior a flat Q is sampled far out and clipped to the bounds, with one as the prior."""

    class Flat(th.nn.Module):
        def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
            return (0.0 * actions).sum(-1).unsqueeze(0)

    rng = np.random.default_rng(0)
    actor = train_actor(Flat(), "denoised", lambda n: rng.uniform(-1, 1, (n, 1)), prior_std=prior_std, steps=1000)
    samples = samples_of(actor)
    at_the_bounds = (np.abs(samples) > 0.99).mean()
    if prior_std is None:
        assert at_the_bounds > 0.15
        assert samples.std() > 0.6
    else:
        assert at_the_bounds < 0.01
        assert abs(samples.mean()) < 0.05
        assert abs(samples.std() - prior_std) < 0.03  # 0.375; with a prior a quarter wider 0.438


def draw_two_modes(rng: np.random.Generator) -> Callable[[int], Array]:
    return lambda n: rng.normal(CENTRES[(rng.random((n, 1)) > WEIGHTS[0]).astype(int)], WIDTH)


def wasserstein_to_two_modes(actor: DiffusionActor) -> float:
    """W1 between samples of the actor and of the mixture: mean distance of the sorted samples."""
    reference = draw_two_modes(np.random.default_rng(2))(20_000)
    return float(np.abs(np.sort(samples_of(actor)[:, 0]) - np.sort(reference[:, 0])).mean())


@pytest.mark.parametrize(("target", "sign", "good"), [("clean", 1.0, True), ("clean", -1.0, False), ("paper", 1.0, False)])
def test_trained_actor_covers_both_modes_with_their_weights(target: str, sign: float, good: bool) -> None:
    actor = train_actor(TwoModeCritic(), target, draw_two_modes(np.random.default_rng(0)), sign)
    distance = wasserstein_to_two_modes(actor)
    assert (distance < 0.17) is good, distance  # the exact score gives 0.03, a uniform policy 0.26
    if good:
        samples = samples_of(actor)
        assert abs((samples < 0).mean() - WEIGHTS[0]) < 0.1


@pytest.mark.parametrize(("sampler", "tolerance"), [("ddpm", 0.02), ("ddpm_x0", 0.02), ("ddim", 0.03)])
def test_samplers_reproduce_a_mixture_from_its_true_score(sampler: str, tolerance: float) -> None:
    """With the exact noise prediction of a Gaussian mixture, mean, standard deviation and weights come out right."""
    schedule = NoiseSchedule("cosine", 200)

    def predict_noise(x: th.Tensor, t: int) -> th.Tensor:
        signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
        variance = signal**2 * WIDTH**2 + sigma**2
        centres = signal * th.as_tensor(CENTRES)
        responsibility = th.softmax(-0.5 * (x - centres) ** 2 / variance + th.as_tensor(WEIGHTS).log(), dim=-1)
        return sigma * (responsibility * (x - centres)).sum(-1, keepdim=True) / variance

    th.manual_seed(0)
    noise = th.randn(201, 40_000, 1, dtype=th.float64)
    # Clipping every sample of the chain is exact only where the chain stays inside, so that sampler gets no outliers here
    x_last = noise[0].clamp(-1, 1) if sampler == "ddpm" else noise[0]
    samples = SAMPLERS[sampler](predict_noise, schedule, x_last, noise[1:], 1.0).numpy()[:, 0]
    mean = WEIGHTS @ CENTRES
    std = np.sqrt(WEIGHTS @ (CENTRES**2 + WIDTH**2) - mean**2)
    low = samples[samples < 0]
    if sampler == "ddpm":
        # The clipped chain keeps the modes' places and widths; their weights follow the clipped latents
        assert abs(low.mean() - CENTRES[0]) < tolerance and abs(low.std() - WIDTH) < tolerance
    else:
        assert abs(samples.mean() - mean) < tolerance
        assert abs(samples.std() - std) < tolerance
        assert abs(len(low) / len(samples) - WEIGHTS[0]) < tolerance
        assert abs(low.std() - WIDTH) < tolerance


def test_samplers_by_an_independent_loop() -> None:
    """One chain of each sampler against plain NumPy written from the equations."""
    rng = np.random.default_rng(3)
    for name in ("vp", "cosine", "linear"):
        schedule = NoiseSchedule(name, 7)
        betas = schedule.betas.double().numpy()
        alphas, bars = 1 - betas, np.cumprod(1 - betas)
        x_last, noise = rng.normal(size=(5, 3)), rng.normal(size=(7, 5, 3))

        def eps(x: Array, t: int) -> Array:
            return np.tanh(x * (t + 1)) + 0.1 * t

        expected = {"ddpm": x_last, "ddpm_x0": x_last, "ddim": x_last}
        for i, t in enumerate(reversed(range(7))):
            z = noise[i] if t > 0 else np.zeros((5, 3))
            previous = bars[t - 1] if t > 0 else 1.0
            x = expected["ddpm"]
            mean = (x - (1 - alphas[t]) / np.sqrt(1 - bars[t]) * eps(x, t)) / np.sqrt(alphas[t])
            expected["ddpm"] = np.clip(mean + np.sqrt(betas[t]) * 0.5 * z, -1, 1)
            x = expected["ddpm_x0"]
            x0 = np.clip((x - np.sqrt(1 - bars[t]) * eps(x, t)) / np.sqrt(bars[t]), -1, 1)
            mean = (betas[t] * np.sqrt(previous) * x0 + (1 - previous) * np.sqrt(alphas[t]) * x) / (1 - bars[t])
            expected["ddpm_x0"] = mean + np.sqrt(betas[t] * (1 - previous) / (1 - bars[t])) * 0.5 * z
            x = expected["ddim"]
            x0 = np.clip((x - np.sqrt(1 - bars[t]) * eps(x, t)) / np.sqrt(bars[t]), -1, 1)
            direction = (x - np.sqrt(bars[t]) * x0) / np.sqrt(1 - bars[t])
            expected["ddim"] = np.sqrt(previous) * x0 + np.sqrt(1 - previous) * direction
        for sampler, value in expected.items():
            actual = SAMPLERS[sampler](
                lambda x, t: th.as_tensor(eps(x.numpy(), t)), schedule, th.as_tensor(x_last), th.as_tensor(noise), 0.5
            )
            np.testing.assert_allclose(actual.numpy(), value, atol=1e-5, err_msg=f"{name} {sampler}")


def test_schedules_by_their_definitions() -> None:
    """The three schedules at T = 4, from the formulas evaluated by hand."""
    vp = NoiseSchedule("vp", 4).alphas.numpy()
    np.testing.assert_allclose(vp, np.exp([-(0.1 / 4 + 0.5 * 9.9 * (2 * i - 1) / 16) for i in (1, 2, 3, 4)]), rtol=1e-6)
    np.testing.assert_allclose(NoiseSchedule("linear", 4).betas.numpy(), [1e-4, 0.00673333, 0.01336667, 0.02], rtol=1e-5)
    cosine = NoiseSchedule("cosine", 4)
    bars = np.cos((np.arange(5) / 4 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alphas_cumprod.numpy()[:3], (bars[1:] / bars[0])[:3], rtol=1e-5)
    assert cosine.betas[-1] == pytest.approx(0.999)


def test_factored_network_is_the_plain_one_and_t_matters() -> None:
    th.manual_seed(0)
    for net_arch in ([32, 16], [8], []):
        network = ScoreNetwork(5, 3, net_arch, layer_norm=bool(net_arch))
        features, actions, t = th.randn(64, 5), th.randn(64, 3), th.randint(10, (64,))
        factored = network.factored(features, actions, t, th.arange(10))
        th.testing.assert_close(factored, network(features, actions, t), rtol=1e-4, atol=1e-5)
        assert not th.allclose(factored, network(features, actions, (t + 1) % 10), atol=1e-3)


def test_running_gradient_norm() -> None:
    gradient = th.tensor([[1.0, -3.0], [2.0, -2.0]])
    assert running_gradient_norm(th.zeros(()), gradient).item() == pytest.approx(2.0)
    assert running_gradient_norm(th.tensor(4.0), gradient, rate=0.25).item() == pytest.approx(3.5)
    assert running_gradient_norm(th.zeros(()), th.zeros(2, 2)).item() > 0


def test_clean_estimate_is_clipped() -> None:
    estimate = predict_clean_sample(th.tensor([[5.0, 0.1]]), th.zeros(1, 2), 0.5, 0.5)
    th.testing.assert_close(estimate, th.tensor([[1.0, 0.2]]))


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_fewer_steps_keep_the_spread(n: int, width: float) -> None:
    """A chain that ends before t = 0 returns a mean: at steps 9, 6 and 2 of ten it has a third to a half of the spread."""
    schedule = NoiseSchedule("cosine", 10)

    def predict_noise(x: th.Tensor, t: int) -> th.Tensor:
        signal, sigma = schedule.signal_rates[t], schedule.noise_rates[t]
        return sigma * (x - signal * 0.1) / (signal**2 * width**2 + sigma**2)

    th.manual_seed(0)
    latent, noise = th.randn(10_000, 1), th.randn(10, 10_000, 1)
    whole = SAMPLERS["ddpm_x0"](predict_noise, schedule, latent, noise, 1.0)
    fewer = SAMPLERS["ddim"](predict_noise, schedule, latent, None, 1.0, sampling_steps=n)
    assert 0.85 < fewer.std() / whole.std() < 1.15
    assert abs(fewer.mean() - 0.1) < 0.01
