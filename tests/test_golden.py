"""
The paper preset reproduces a whole update of the official QSM code, array by array.

Each file holds parameters before and after, a batch, every random draw and every intermediate result of one update:
``config/*``, ``init/*``, ``batch/*``, ``noise/*``, ``schedule/*``, ``out/*``, ``after/*``. The test is generic over the
numbers in ``config/``, the sizes and the numbers of layers and critics. Other files: ``pytest tests/test_golden.py --golden
FILE.npz``.

Mapping of the weights (flax kernels are [in, out], torch's are [out, in]):

- ``score/FourierFeatures_0/kernel [n, 1]`` -> ``score_network.fourier.weight [n]``
- ``score/MLP_0/Dense_i`` -> the i-th linear layer of ``score_network.time_mlp``
- ``score/MLP_1/Dense_0`` -> ``score_network.input_layer`` (rows in the order action, observation, time in both)
- ``score/MLP_1/Dense_i``, i > 0 -> the (i-1)-th linear layer of ``score_network.trunk``
- ``critic_k/MLP_0/Dense_i`` -> the i-th linear layer of ``qf{k-1}``, and ``critic_k/Dense_0`` its last one
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.common.losses import UpdateNoise
from sb3_qsm.qsm.losses import ActorLoss

Arrays = dict[str, npt.NDArray[Any]]
KNOWN_CONFIG = {"M_q", "T", "discount", "lr", "schedule", "target_noise_std", "tau", "temperature"}


class Spaces(gym.Env[Any, Any]):
    """An environment that only has spaces."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,))


def close(name: str, actual: th.Tensor | npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> None:
    """The largest absolute error is within the tolerance, relative to the largest entry of the expected array."""
    got = actual.detach().numpy() if isinstance(actual, th.Tensor) else actual
    assert got.shape == expected.shape, f"{name}: shape {got.shape} instead of {expected.shape}"
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def children(arrays: Arrays, prefix: str, kind: str) -> list[str]:
    """Names like prefix/Dense_0, prefix/Dense_1, ..., in the order of their numbers."""
    names = {key[len(prefix) + 1 :].split("/")[0] for key in arrays if key.startswith(prefix + "/")}
    return [
        f"{prefix}/{name}" for name in sorted((n for n in names if n.startswith(kind)), key=lambda n: int(n.split("_")[-1]))
    ]


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def score_parameters(actor: nn.Module, arrays: Arrays, prefix: str) -> dict[str, tuple[nn.Parameter, npt.NDArray[Any]]]:
    """Pairs of a parameter of the score network and the array that belongs to it, by the array's name."""
    network = actor.score_network
    pairs = {"FourierFeatures_0/kernel": (network.fourier.weight, arrays[f"{prefix}/FourierFeatures_0/kernel"][:, 0])}
    for mlp, layers in (
        ("MLP_0", linear_layers(network.time_mlp)),
        ("MLP_1", [network.input_layer, *linear_layers(network.trunk)]),
    ):
        names = children(arrays, f"{prefix}/{mlp}", "Dense_")
        for name, layer in zip(names, layers, strict=True):
            pairs[f"{name}/kernel"] = (layer.weight, arrays[f"{name}/kernel"].T)
            pairs[f"{name}/bias"] = (layer.bias, arrays[f"{name}/bias"])
    return pairs


def critic_parameters(critic: nn.Module, arrays: Arrays, prefix: str) -> dict[str, tuple[nn.Parameter, npt.NDArray[Any]]]:
    pairs = {}
    for root, network in zip(children(arrays, *prefix.rsplit("/", 1)), critic.q_networks, strict=True):
        names = [*children(arrays, f"{root}/MLP_0", "Dense_"), f"{root}/Dense_0"]
        for name, layer in zip(names, linear_layers(network), strict=True):
            pairs[f"{name}/kernel"] = (layer.weight, arrays[f"{name}/kernel"].T)
            pairs[f"{name}/bias"] = (layer.bias, arrays[f"{name}/bias"])
    return pairs


def load(pairs: dict[str, tuple[nn.Parameter, npt.NDArray[Any]]]) -> None:
    with th.no_grad():
        for parameter, array in pairs.values():
            parameter.copy_(th.from_numpy(np.ascontiguousarray(array)))


def make_model(arrays: Arrays, **kwargs: Any) -> QSM:
    config = {key.split("/")[1]: value.item() for key, value in arrays.items() if key.startswith("config/")}
    assert set(config) <= KNOWN_CONFIG, f"configuration that this test does not know: {set(config) - KNOWN_CONFIG}"
    obs_dim, action_dim = arrays["batch/observations"].shape[1], arrays["batch/actions"].shape[1]
    widths = {
        name: arrays[f"{name}/bias"].shape[0]
        for mlp in ("MLP_0", "MLP_1")
        for name in children(arrays, f"init/score/{mlp}", "Dense_")
    }
    hyperparameters = QSM.paper_hyperparameters()
    hyperparameters.update(
        q_grad_coef=config["M_q"],
        diffusion_steps=config["T"],
        gamma=config["discount"],
        learning_rate=config["lr"],
        actor_learning_rate=config["lr"],
        noise_schedule=config["schedule"],
        target_policy_noise=config["target_noise_std"],
        tau=config["tau"],
        sampling_temperature=config["temperature"],
    )
    hyperparameters["policy_kwargs"].update(
        net_arch={
            "pi": [width for name, width in widths.items() if "MLP_1" in name][:-1],
            "qf": [arrays[f"{name}/bias"].shape[0] for name in children(arrays, "init/critic_1/MLP_0", "Dense_")],
        },
        n_critics=len(children(arrays, "init", "critic_")),
        fourier_dim=2 * arrays["init/score/FourierFeatures_0/kernel"].shape[0],
        time_arch=[width for name, width in widths.items() if "MLP_0" in name],
    )
    model = QSM("MlpPolicy", Spaces(obs_dim, action_dim), buffer_size=1, device="cpu", **hyperparameters, **kwargs)
    model.set_logger(Logger(None, []))
    load(score_parameters(model.actor, arrays, "init/score"))
    load(critic_parameters(model.critic, arrays, "init/critic_"))
    load(critic_parameters(model.critic_target, arrays, "init/target_critic_"))
    return model


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_golden_update(golden_path: Path, compiled: bool) -> None:
    arrays: Arrays = dict(np.load(golden_path))
    model = make_model(arrays, compile=compiled)
    tensors = {key: th.from_numpy(value) for key, value in arrays.items() if key.startswith(("batch/", "noise/"))}
    batch = ReplayBufferSamples(
        observations=tensors["batch/observations"],
        actions=tensors["batch/actions"],
        next_observations=tensors["batch/next_observations"],
        dones=1.0 - tensors["batch/masks"].unsqueeze(-1),
        rewards=tensors["batch/rewards"].unsqueeze(-1),
    )
    noise = UpdateNoise(
        latent=tensors["noise/x_T"],
        chain=tensors["noise/z"],
        target=tensors["noise/target"],
        eps=tensors["noise/actor_eps"],
        t=tensors["noise/actor_t"].long(),
    )
    model.policy.set_training_mode(True)
    schedule = model.actor.schedule
    close("betas", schedule.betas, arrays["schedule/betas"], 1e-5)
    close("alphas", schedule.alphas, arrays["schedule/alphas"], 1e-5)
    close("alphas_cumprod", schedule.alphas_cumprod, arrays["schedule/alpha_hats"], 1e-5)

    # The file's noise prediction is that of the replayed actions at the last step
    expected_eps = arrays["out/eps_at_last_t"]
    with th.no_grad():
        last = th.full((len(batch.actions),), model.diffusion_steps - 1)
        features = model.actor.features(batch.observations)
        close("noise prediction", model.actor.score_network(features, batch.actions, last), expected_eps, 1e-4)
        # The factored first layer, which training and sampling use, is the same function
        close("factored noise prediction", model.actor.predict_noise(features, batch.actions, last), expected_eps, 1e-4)

    # In the order of train()
    # The file holds the sampled actions before the target-policy noise
    loss = model._critic_step.loss
    sampled = loss.next_actions(batch.next_observations, noise, target_policy_noise=0.0)
    close("sampled next actions", sampled, arrays["out/sampled_next_actions"], 1e-5)
    next_actions = loss.next_actions(batch.next_observations, noise, model.target_policy_noise)
    target_q_values = loss.targets(batch.next_observations, next_actions, model._transitions(batch))
    close("TD targets", target_q_values, arrays["out/target_q"], 1e-4)

    for i, q_values in enumerate(model.critic.q_values(batch.observations, batch.actions)):
        critic_loss = (q_values - target_q_values).square().mean()
        close(f"loss of critic {i + 1}", critic_loss, arrays[f"out/c_loss_{i + 1}"], 1e-5)
    losses = sum(value for key, value in arrays.items() if key.startswith("out/c_loss_"))
    metrics, _ = model._update_critic(batch, noise)
    close("critic loss", metrics["critic_loss"], np.asarray(losses), 1e-5)
    for name, (parameter, expected) in critic_parameters(model.critic, arrays, "after/critic_").items():
        close(name, parameter, expected, 1e-4)

    noisy_actions = schedule.add_noise(batch.actions, noise.eps, noise.t)
    close("noised actions", noisy_actions, arrays["out/noisy_actions"], 1e-5)
    q_gradient = model._actor_step.loss.q_gradient([batch.observations], noisy_actions)
    close("critic gradient", q_gradient, arrays["out/critic_jacobian"], 1e-4)
    metrics = model._update_actor(batch, noise)
    close("actor loss", metrics["actor_loss"], arrays["out/actor_loss"], 1e-5)
    for name, (parameter, expected) in score_parameters(model.actor, arrays, "out/score_grad").items():
        # Adam's running mean after one step; the compiled step keeps no other gradient
        gradient = 10.0 * model.actor.optimizer.state[parameter]["exp_avg"] if compiled else parameter.grad
        assert gradient is not None
        close(f"gradient of {name}", gradient, expected, 1e-4)
    for name, (parameter, expected) in score_parameters(model.actor, arrays, "after/score").items():
        close(name, parameter, expected, 1e-4)

    model._target_update(model.tau)
    for name, (parameter, expected) in critic_parameters(model.critic_target, arrays, "after/target_critic_").items():
        close(name, parameter, expected, 1e-4)


def test_golden_notices_a_wrong_sign(golden_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is not vacuous: a flipped score target fails it."""
    q_gradient = ActorLoss.q_gradient
    monkeypatch.setattr(ActorLoss, "q_gradient", lambda self, *args: -q_gradient(self, *args))
    with pytest.raises(AssertionError, match="critic gradient"):
        test_golden_update(golden_path, compiled=False)
