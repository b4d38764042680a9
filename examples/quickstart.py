"""
Train QSM with its default arguments on a MuJoCo task, evaluate it, draw its learning curve and film it.

    python examples/quickstart.py
    python examples/quickstart.py --env Hopper-v5 --timesteps 100000 --seed 1 --out runs/hopper

Everything is written to one new folder (see ``--out``): ``model.zip``, ``learning_curve.png``, ``video.mp4``,
``monitor.csv`` (every training episode), ``evaluations.npz`` (the points of the curve) and ``results.json``.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.base_class import BaseAlgorithm

CURVE_POINTS = 20
CURVE_EPISODES = 5
FINAL_EPISODES = 20
VIDEO_SECONDS = 15

# Runs in a process of its own: MuJoCo chooses its renderer when it is imported, once, and a broken graphics driver may
# end the process.
RENDER_PROBE = """
import importlib.util, sys, gymnasium
try:
    if importlib.util.find_spec("mujoco") is not None:
        import mujoco
        # Else it writes warnings to a file in the current folder
        mujoco.set_mju_user_warning(lambda text: None)
    env = gymnasium.make(sys.argv[1], render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
else:
    print("rendered" if frame is not None else "no frame", flush=True)
"""


class UserError(Exception):
    """Something the user can put right; shown without a traceback."""


class RandomPolicy:
    """Uniform actions, in the form that ``evaluate_policy`` takes."""

    def __init__(self, action_space: "gym.Space[Any]") -> None:
        self.action_space = action_space

    def predict(self, observation: "np.ndarray", state: Any = None, *_: Any, **__: Any) -> tuple["np.ndarray", Any]:
        """Return one random action per environment."""
        import numpy as np

        return np.stack([self.action_space.sample() for _ in range(len(observation))]), state


def positive_int(text: str) -> int:
    """Parse an integer above 0."""
    value = int(text.replace("_", ""))
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {value}")
    return value


def seed_int(text: str) -> int:
    """Parse a seed that NumPy and torch both take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, not {value}")
    return value


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train QSM on one task, evaluate it, draw its learning curve and film it.")
    parser.add_argument("--env", default="HalfCheetah-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--timesteps", type=positive_int, default=15_000, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=seed_int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder to write to; if it is there already, -2, -3, ... is appended (default: %(default)s)",
    )
    return parser.parse_args()


def new_folder(path: Path) -> Path:
    """Create ``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise UserError(f"cannot create the folder {candidate}: {error.strerror}") from error
        else:
            return candidate


def find_renderer(env_id: str) -> str | None:
    """
    Find a way to draw the task without a display, and select it for this process.

    :param env_id: Gymnasium id
    :return: None, or why there is none
    """
    if "MUJOCO_GL" in os.environ:
        backends = [os.environ["MUJOCO_GL"]]
    elif sys.platform == "linux":
        # A graphics card's driver or Mesa, Mesa in software, the window system if one is running.
        backends = ["egl", "osmesa"] + ["glfw"] * ("DISPLAY" in os.environ)
    else:
        backends = [""]
    failures = []
    for backend in backends:
        variables = {**os.environ, **({"MUJOCO_GL": backend} if backend else {})}
        try:
            probe = subprocess.run(
                [sys.executable, "-c", RENDER_PROBE, env_id],
                env=variables,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{backend or 'default'}: no frame after 120 s")
            continue
        answer = probe.stdout.strip().splitlines() or [f"exit status {probe.returncode}"]
        if answer[-1] == "rendered":
            os.environ.update(variables)
            return None
        failures.append(f"{backend or 'default'}: {answer[0]}")
    # MuJoCo cannot even be imported with a renderer that is not there.
    os.environ["MUJOCO_GL"] = "disable"
    return "; ".join(failures)


def show_warnings_once() -> None:
    """Let MuJoCo say a warning once, not for each copy of the task, and not in a file of the current folder."""
    if find_spec("mujoco") is None:
        return
    import mujoco

    show = functools.cache(lambda text: print(f"MuJoCo warns: {text}", file=sys.stderr))
    # Some end with the time in the simulation
    mujoco.set_mju_user_warning(lambda text: show(text.partition(" Time = ")[0]))


def check_id(env_id: str) -> None:
    """Refuse an id that Gymnasium does not know."""
    import gymnasium as gym

    try:
        gym.spec(env_id)
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise UserError(f"{env_id} is not an environment that Gymnasium knows: {error}") from error


def make_env(env_id: str) -> "gym.Env[Any, Any]":
    """Create the task, with errors that say what to do."""
    import gymnasium as gym

    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"cannot create {env_id}: {error}") from error
    if not isinstance(env.action_space, gym.spaces.Box):
        raise UserError(f"QSM needs continuous actions (a Box), and those of {env_id} are {env.action_space}")
    return env


def draw_learning_curve(path: Path, folder: Path, env_id: str, random_return: float) -> None:
    """
    Plot training episodes and the evaluations along the way.

    :param path: PNG to write
    :param folder: Folder with ``monitor.csv`` and ``evaluations.npz``
    :param env_id: Gymnasium id, for the title
    :param random_return: Mean return of a random policy, drawn as a line
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    # Two header lines, then return, length and seconds of every training episode.
    episodes = np.loadtxt(folder / "monitor.csv", delimiter=",", skiprows=2, ndmin=2)
    if episodes.size:
        axes.plot(episodes[:, 1].cumsum(), episodes[:, 0], ".", markersize=3, color="0.7", label="training episodes (noisy)")
    if (folder / "evaluations.npz").exists():
        evaluations = np.load(folder / "evaluations.npz")
        steps, returns = evaluations["timesteps"], evaluations["results"]
        axes.fill_between(steps, returns.min(axis=1), returns.max(axis=1), alpha=0.25, color="C0", linewidth=0)
        label = f"evaluation, mean and range of {CURVE_EPISODES} episodes"
        axes.plot(steps, returns.mean(axis=1), "o-", markersize=4, color="C0", label=label)
    axes.axhline(random_return, linestyle="--", color="C3", label="random policy")
    axes.set(title=f"QSM on {env_id}", xlabel="environment steps", ylabel="return of an episode")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def film(path: Path, model: "BaseAlgorithm", env_id: str, seed: int) -> str:
    """
    Film the trained policy.

    :param path: MP4 to write
    :param model: Trained model
    :param env_id: Gymnasium id
    :param seed: Seed of the first episode
    :return: What was filmed, in words
    """
    import gymnasium as gym
    import imageio.v2 as imageio
    import numpy as np

    env = gym.make(env_id, render_mode="rgb_array")
    fps = int(env.metadata.get("render_fps", 30))
    frames, episodes = 0, 1
    # macro_block_size: pad nothing, but ask for even sides, as H.264 does.
    with imageio.get_writer(path, fps=fps, macro_block_size=2) as video:
        observation, _ = env.reset(seed=seed)
        while frames < VIDEO_SECONDS * fps:
            video.append_data(np.asarray(env.render()))
            frames += 1
            action, _ = model.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                observation, _ = env.reset()
                episodes += 1
    env.close()
    return f"{frames} frames, {episodes} episode{'s' if episodes > 1 else ''}"


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, draw and film."""
    missing = [name for name in ("imageio", "imageio_ffmpeg", "matplotlib", "rich", "tqdm") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; this script needs pip install 'sb3-qsm[extra,mujoco,plots]'")
    check_id(args.env)
    # Before anything imports MuJoCo.
    no_renderer = find_renderer(args.env)
    show_warnings_once()

    import torch as th
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    from sb3_qsm import QSM

    # The networks are small: one core is about as fast as several, and leaves the others free.
    th.set_num_threads(1)

    env = make_env(args.env)
    folder = new_folder(args.out)
    print(f"Writing to {folder}/")

    eval_env = make_vec_env(args.env, n_envs=CURVE_EPISODES, seed=args.seed + 1000)

    random_policy = RandomPolicy(env.action_space)
    env.action_space.seed(args.seed)
    random_mean, random_std = evaluate_policy(random_policy, eval_env, n_eval_episodes=FINAL_EPISODES)

    model = QSM("MlpPolicy", Monitor(env, str(folder / "monitor.csv")), seed=args.seed, device="cpu")
    callback = EvalCallback(
        eval_env,
        n_eval_episodes=CURVE_EPISODES,
        eval_freq=max(args.timesteps // CURVE_POINTS, 1),
        log_path=str(folder),
        verbose=0,
    )
    print(f"A random policy returns {random_mean:.1f} ± {random_std:.1f}")
    print(f"Training QSM on {args.env} for {args.timesteps:,} steps")
    start = time.perf_counter()
    model.learn(args.timesteps, callback=callback, progress_bar=True)
    seconds = time.perf_counter() - start
    model.save(folder / "model.zip")

    mean, std = evaluate_policy(model, eval_env, n_eval_episodes=FINAL_EPISODES)
    eval_env.close()
    env.close()
    results = {
        "env": args.env,
        "timesteps": args.timesteps,
        "seed": args.seed,
        "training_seconds": round(seconds, 1),
        "evaluation_episodes": FINAL_EPISODES,
        "mean_return": float(mean),
        "std_return": float(std),
        "random_mean_return": float(random_mean),
        "random_std_return": float(random_std),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw_learning_curve(folder / "learning_curve.png", folder, args.env, float(random_mean))

    print(f"\n{args.env} after {args.timesteps:,} steps, trained in {seconds:.0f} s; {FINAL_EPISODES} episodes each:")
    print(f"  QSM            {mean:10.1f} ± {std:.1f}")
    print(f"  random policy  {random_mean:10.1f} ± {random_std:.1f}")
    print(f"Model:          {folder / 'model.zip'}")
    print(f"Learning curve: {folder / 'learning_curve.png'}")
    if no_renderer is None:
        print(f"Video:          {folder / 'video.mp4'} ({film(folder / 'video.mp4', model, args.env, args.seed)})")
    else:
        print(f"Video:          none, because nothing here can render {args.env} ({no_renderer})")


def main() -> None:
    """Run the script; errors of the user's are one line and exit status 2."""
    args = parse_args()
    try:
        run(args)
    except UserError as error:
        print(f"quickstart.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
