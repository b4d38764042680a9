"""``sb3-qsm plot_policy``: pictures of a trained agent."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
from rl_zoo3 import ALGOS, create_test_env, get_saved_hyperparams
from rl_zoo3.utils import StoreDict, get_model_path
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_qsm.zoo.errors import UserError


def plot_policy() -> None:
    """Draw a trained agent at the first state of an episode, and its episodes, and write the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", help="environment ID", type=EnvironmentName, required=True)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--algo", help="RL Algorithm", default="qsm", choices=list(ALGOS))
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest, -1: no exp folder)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load best model instead of last model if available")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="folder of the pictures (default: the run's, plots/)")
    parser.add_argument("-n", "--n-episodes", type=int, default=50, help="episodes to draw; 0 for none")
    parser.add_argument("--mode-key", help="entry of info that tells the way an episode took (default: route, goal)")
    parser.add_argument("--dims", type=int, nargs=2, default=(0, 1), metavar="DIM", help="two action dimensions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes and of the samples")
    parser.add_argument("--device", default="auto", help="PyTorch device")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that bring environments")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, help="keyword arguments of the environment")
    args = parser.parse_args()
    if args.n_episodes < 0:
        raise UserError(f"argument -n/--n-episodes: must be an integer >= 0, got {args.n_episodes}")

    # Imported here: the other subcommands need no plots
    from sb3_qsm.evaluation import count_modes
    from sb3_qsm.plots import plot_policy as plot_state
    from sb3_qsm.plots import plot_trajectories

    _, model_path, log_path = get_model_path(args.exp_id, args.folder, args.algo, args.env, args.load_best)
    set_random_seed(args.seed)
    env = _make_env(args.env, Path(log_path), args.env_kwargs, args.seed)
    algorithm = ALGOS[args.algo]
    # Nothing is collected, so there need not be memory for it
    empty: dict[str, Any] = {"buffer_size": 1, "replay_buffer_class": None, "replay_buffer_kwargs": {}}
    empty["optimize_memory_usage"] = False
    kwargs: dict[str, Any] = empty if issubclass(algorithm, OffPolicyAlgorithm) else {}
    model = algorithm.load(model_path, device=args.device, **kwargs)
    print(f"Loaded {model_path}")

    observations = env.reset()
    first = {k: v[0] for k, v in observations.items()} if isinstance(observations, dict) else np.asarray(observations)[0]
    figures = plot_state(model, first, tuple(args.dims))
    if args.n_episodes > 0:
        try:
            modes = count_modes(model, env, args.n_episodes, mode_key=args.mode_key, seed=args.seed)
        except ValueError as error:
            # Most tasks have no such thing
            print(f"No trajectories: {error}")
        else:
            print(modes)
            figures["trajectories"] = plot_trajectories(modes, env)
    if not figures:
        raise UserError(
            f"argument --algo: nothing of {args.algo} can be drawn but its episodes (-n), in tasks that report modes"
        )
    folder = Path(args.output) if args.output else Path(log_path) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        print(f"Saved {folder / f'{name}.png'}")


def _make_env(name: EnvironmentName, log_path: Path, env_kwargs: dict[str, Any] | None, seed: int) -> VecEnv:
    """The environment that the agent was trained on, as rl_zoo3's enjoy makes it."""
    hyperparams, stats_path = get_saved_hyperparams(str(log_path / name), test_mode=True)
    kwargs = dict(hyperparams.pop("env_kwargs", {}))
    saved = log_path / name / "args.yml"
    if saved.is_file():
        # As rl_zoo3 reads it
        kwargs = yaml.load(saved.read_text(), Loader=yaml.UnsafeLoader)["env_kwargs"] or kwargs
    return create_test_env(
        name.gym_id,
        n_envs=1,
        stats_path=stats_path,
        seed=seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs={**kwargs, **(env_kwargs or {})},
        vec_env_cls=DummyVecEnv,
    )
