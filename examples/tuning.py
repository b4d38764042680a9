"""
Search hyperparameters with Optuna in Python; `sb3-qsm train -optimize` does it without a script.

    pip install "sb3-qsm[zoo]"
    python examples/tuning.py
    python examples/tuning.py --timesteps 10000 --trials 50
"""

import argparse

import gymnasium as gym
import optuna
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_qsm import QSM
from sb3_qsm.zoo import convert_qsm_params, sample_qsm_params


def main() -> None:
    """Run a study and print what won, as arguments of QSM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=3_000, help="of each trial")
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()

    def objective(trial: optuna.Trial) -> float:
        env = Monitor(gym.make("Pendulum-v1"))
        hyperparams = sample_qsm_params(trial, n_actions=1, n_envs=1, additional_args={"using_her_replay_buffer": False})
        model = QSM("MlpPolicy", env, **hyperparams, seed=0)
        try:
            model.learn(args.timesteps)
        except ValueError as error:  # the losses are no longer finite
            raise optuna.TrialPruned(str(error)) from error
        mean, _ = evaluate_policy(model, env, n_eval_episodes=5)
        return float(mean)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    # The defaults first: the search begins with something that works
    study.enqueue_trial(
        {
            "gradient_scale": "temperature",
            "gradient_strength": 10.0,  # 1 / temperature
            "score_target": "denoised",
            "prior_std": 0.6,
            "diffusion_steps": 10,
            "noise_schedule": "cosine",
            "sampler": "ddpm_x0",
            "net_arch": "medium",
            "batch_size_pow": 8,  # 2**8
            "learning_rate": 3e-4,
            "tau": 0.005,
            "one_minus_gamma": 0.01,
            "exploration_noise": 0.1,
            "target_policy_noise": 0.0,
            "n_steps": 3,
        }
    )
    study.optimize(objective, n_trials=args.trials)
    print(f"best return {study.best_value:.0f} in trial {study.best_trial.number}")
    print(f"QSM arguments: {convert_qsm_params(study.best_params)}")


if __name__ == "__main__":
    main()
