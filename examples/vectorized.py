"""
Collect from several environments at once and normalise observations and rewards; save the statistics with the model.

    python examples/vectorized.py
    python examples/vectorized.py --timesteps 20000 --out runs/vectorized

make_vec_env(..., vec_env_cls=SubprocVecEnv) gives each environment a process of its own, for those that are slow.
"""

import argparse
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_qsm import QSM


def main() -> None:
    """Train, save, load and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=8_000)
    parser.add_argument("--out", type=Path, default=Path("runs/vectorized"))
    args = parser.parse_args()

    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=0))
    # As many gradient steps as environment steps: four after each step of the four environments
    model = QSM("MlpPolicy", env, train_freq=1, gradient_steps=-1, seed=0)
    model.learn(args.timesteps)
    model.save(args.out / "model")
    env.save(str(args.out / "vecnormalize.pkl"))

    env = VecNormalize.load(str(args.out / "vecnormalize.pkl"), make_vec_env("Pendulum-v1", seed=1))
    env.training = env.norm_reward = False  # the statistics stay, and returns are those of the task
    model = QSM.load(args.out / "model", env=env)
    mean, std = evaluate_policy(model, env, n_eval_episodes=5)
    print(f"return {mean:.0f} ± {std:.0f} after {model.num_timesteps} steps")


if __name__ == "__main__":
    main()
