"""Where the tuned hyperparameters are, and the spaces that Optuna searches."""

from importlib import resources
from pathlib import Path
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_offpolicy_params, sample_her_params

from sb3_qsm.diffusion import NOISE_SCHEDULES, SAMPLERS
from sb3_qsm.qsm.targets import SCORE_TARGETS

# Names that rl_zoo3's converter for off-policy algorithms gives a meaning
_NET_ARCHS = ("small", "medium", "big", "verybig")


def hyperparams_file(name: str) -> Path:
    """
    Path of a shipped file of hyperparameters.

    :param name: Name with or without ``.yml``, for instance ``"qsm"`` or ``"qsm_paper"``
    :return: The file, in the installed package, or beside it in a checkout or an editable install
    :raises FileNotFoundError: if there is no such file
    """
    package = Path(str(resources.files("sb3_qsm")))
    folders = (package / "hyperparams", package.parent / "hyperparams")
    for folder in folders:
        file = folder / (name if name.endswith(".yml") else f"{name}.yml")
        if file.is_file():
            return file
    raise FileNotFoundError(f"no hyperparameters {name!r} in {' or '.join(map(str, folders))}")


def _sample_common_params(trial: optuna.Trial) -> dict[str, Any]:
    """What all algorithms with a diffusion policy have in common."""
    return {
        "diffusion_steps": trial.suggest_int("diffusion_steps", 2, 20),
        "noise_schedule": trial.suggest_categorical("noise_schedule", sorted(NOISE_SCHEDULES)),
        "sampler": trial.suggest_categorical("sampler", sorted(SAMPLERS)),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True),
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        # From 2**5=32 to 2**10=1024
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "net_arch": trial.suggest_categorical("net_arch", _NET_ARCHS),
        "exploration_noise": trial.suggest_float("exploration_noise", 0.0, 0.3),
        "target_policy_noise": trial.suggest_float("target_policy_noise", 0.0, 0.3),
    }


def sample_qsm_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for QSM hyperparams.

    :param trial: Optuna's trial
    :param n_actions: Number of action dimensions (not used)
    :param n_envs: Number of parallel environments (not used)
    :param additional_args: rl_zoo3's ``using_her_replay_buffer`` and ``her_kwargs``
    :return: Arguments of :class:`sb3_qsm.QSM`
    """
    sampled: dict[str, Any] = {
        # One strength for both forms of the target, so that the space is the same in every trial, as TPE needs it:
        # with the scale-free form it is 1 / temperature, else M_q itself
        "gradient_scale": trial.suggest_categorical("gradient_scale", ["temperature", "q_grad_coef"]),
        "gradient_strength": trial.suggest_float("gradient_strength", 1.0, 200.0, log=True),
        "score_target": trial.suggest_categorical("score_target", sorted(SCORE_TARGETS)),
        "prior_std": trial.suggest_float("prior_std", 0.3, 3.0, log=True),
        **_sample_common_params(trial),
    }
    if additional_args["using_her_replay_buffer"]:
        # It has no n-step returns
        sampled = sample_her_params(trial, sampled, additional_args["her_kwargs"])
    else:
        sampled["n_steps"] = trial.suggest_categorical("n_steps", [1, 2, 3, 5])

    hyperparams = convert_qsm_params(sampled)
    # Display true values
    for name in ("temperature", "q_grad_coef", "gamma", "batch_size"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_qsm_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    From what was sampled (a trial's ``params``) to arguments of :class:`sb3_qsm.QSM`.

    :param sampled_params: Names and values as in :func:`sample_qsm_params`
    :return: Keyword arguments
    """
    hyperparams: dict[str, Any] = convert_offpolicy_params(sampled_params)
    strength, scale = hyperparams.pop("gradient_strength"), hyperparams.pop("gradient_scale")
    scale_free = scale == "temperature"
    # Both are set, so that neither is left over from the configuration file; QSM reads temperature only without q_grad_coef
    hyperparams["temperature"] = 1.0 / strength
    hyperparams["q_grad_coef"] = None if scale_free else strength
    # A stored trial has HER's parameters one by one, a fresh one has them in replay_buffer_kwargs
    her = {name: hyperparams.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in hyperparams}
    if her:
        hyperparams["replay_buffer_kwargs"] = {**hyperparams.get("replay_buffer_kwargs", {}), **her}
    return hyperparams


def sample_ddiffpg_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for DDiffPG hyperparams.

    :param trial: Optuna's trial
    :param n_actions: Number of action dimensions (not used)
    :param n_envs: Number of parallel environments (not used)
    :param additional_args: rl_zoo3's; DDiffPG has a replay buffer of its own, so there is no hindsight replay
    :return: Arguments of :class:`sb3_qsm.DDiffPG`
    """
    sampled: dict[str, Any] = {
        **_sample_common_params(trial),
        "target_action_steps": trial.suggest_categorical("target_action_steps", [5, 10, 20]),
        "target_action_lr": trial.suggest_float("target_action_lr", 0.005, 0.1, log=True),
        "intrinsic_reward_scale": trial.suggest_float("intrinsic_reward_scale", 0.001, 0.1, log=True),
        "novelty_learning_rate": trial.suggest_float("novelty_learning_rate", 1e-5, 1e-3, log=True),
        "mode_dropout": trial.suggest_float("mode_dropout", 0.2, 0.8),
    }
    hyperparams = convert_ddiffpg_params(sampled)
    # Display true values
    for name in ("gamma", "batch_size"):
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def convert_ddiffpg_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    From what was sampled (a trial's ``params``) to arguments of :class:`sb3_qsm.DDiffPG`.

    :param sampled_params: Names and values as in :func:`sample_ddiffpg_params`
    :return: Keyword arguments
    """
    hyperparams: dict[str, Any] = convert_offpolicy_params(sampled_params)
    return hyperparams
