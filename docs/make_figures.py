"""
Draw what too small, right and too large temperatures do: three policies, each trained from the same seed.

    python docs/make_figures.py

The task is the point between four goals, whose first state has four equally good actions. Each picture shows actions that
the policy draws there, over the minimum of its critics; what is logged is printed.
"""

import argparse
from pathlib import Path

import gymnasium as gym

import sb3_qsm.envs  # noqa: F401  registers the environments
from sb3_qsm import QSM
from sb3_qsm.plots import plot_action_landscape, sample_actions

TEMPERATURES = {"small": 0.003, "default": 0.1, "large": 3.0}


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=3_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)

    env = gym.make("sb3_qsm/NGoalPoint-v0")
    observation, _ = env.reset(seed=0)
    for name, temperature in TEMPERATURES.items():
        model = QSM(
            "MlpPolicy",
            env,
            temperature=temperature,
            batch_size=128,
            exploration_decay_steps=args.timesteps // 2,
            policy_kwargs={"net_arch": [64, 64]},
            seed=0,
            device="cpu",
        ).learn(args.timesteps)
        actions = sample_actions(model, observation, 300)
        figure = plot_action_landscape(model, observation)
        figure.axes[0].set_title(f"temperature {temperature:g}")
        figure.savefig(args.out / f"temperature_{name}.png", dpi=90)
        at_bounds = (abs(actions) > 0.999).mean()
        print(f"temperature {temperature:g}: spread {actions.std(axis=0).mean():.2f}, {at_bounds:.0%} at a bound", flush=True)


if __name__ == "__main__":
    main()
