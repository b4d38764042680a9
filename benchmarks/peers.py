"""
Speed beside other implementations on one core: the official QSM (JAX), FlowRL's QSM (JAX), SBX's SAC (JAX), SB3's SAC and this
package, in one process. In every round each subject of a task is timed once.

    git clone https://github.com/Alescontrela/score_matching_rl
    git clone https://github.com/typoverflow/flow-rl
    pip install -r benchmarks/results/speed/peers-requirements.txt
    python benchmarks/peers.py --official score_matching_rl --flowrl flow-rl --out benchmarks/results/speed

``replay + update`` draws a batch from the subject's own replay buffer and does a whole gradient step of critics, actor and
targets, as SB3's ``train(1, 256)``; ``act, training`` is the call of the subject's training loop from one observation to a
NumPy action, ``act, evaluation`` that of its evaluation, and ``act, 1000 observations`` the former for a batch. Processor time
far below the wall time means that the core was not free.
"""

import argparse
import csv
import functools
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
OBS, ACT, BATCH, CAPACITY, WIDTH = 17, 6, 256, 20_000, (256, 256)


def package_without_init(name: str, root: Path) -> None:
    """
    Let the modules of a package be imported without its ``__init__``, which may import much more than is measured.

    :param name: Name of the package
    :param root: Folder that it is in
    """
    module = types.ModuleType(name)
    module.__path__ = [str(root.joinpath(*name.split(".")))]
    sys.modules[name] = module


def random_transitions(number: int) -> dict[str, Any]:
    """
    :param number: Number of transitions
    :return: Random numbers of HalfCheetah-v5's shapes
    """
    import numpy as np

    rng = np.random.default_rng(0)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "observations": normal((number, OBS)),
        "actions": rng.uniform(-1, 1, (number, ACT)).astype(np.float32),
        "rewards": normal(number),
        "next_observations": normal((number, OBS)),
    }


def commit(checkout: Path) -> str:
    """
    :param checkout: A git checkout
    :return: Its commit
    """
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


class Official:
    """
    The official QSM with its own replay buffer and the values of its configuration, but for the widths, which are 512 there.

    :param root: Checkout of github.com/Alescontrela/score_matching_rl
    :param steps: Diffusion steps T
    """

    def __init__(self, root: Path, steps: int) -> None:
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
            package_without_init("jaxrl5.agents", root)
        import gym.spaces
        import numpy as np
        from jaxrl5.agents.score_matching.score_matching_learner import ScoreMatchingLearner
        from jaxrl5.data import ReplayBuffer

        observations = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
        actions = gym.spaces.Box(-1.0, 1.0, (ACT,), np.float32)
        self.agent = ScoreMatchingLearner.create(
            0, observations, actions, T=steps, M_q=50, critic_hidden_dims=WIDTH, actor_hidden_dims=WIDTH
        )
        self.buffer = ReplayBuffer(observations, actions, CAPACITY)
        for name, values in random_transitions(CAPACITY).items():
            self.buffer.dataset_dict[name][:] = values
        self.buffer.dataset_dict["masks"][:] = 1.0
        self.buffer.dataset_dict["dones"][:] = False
        self.buffer._size = CAPACITY
        self.buffer.seed(0)
        self.observation = random_transitions(1)["observations"][0]
        self.version = commit(root)

    def _update(self) -> None:
        import jax

        self.agent, info = self.agent.update(self.buffer.sample(BATCH))
        jax.block_until_ready((self.agent, info))

    def _act(self, method: str) -> Any:
        import numpy as np

        action, self.agent = getattr(self.agent, method)(self.observation)
        return np.asarray(action)

    def tasks(self) -> dict[str, Any]:
        """What is measured."""
        return {
            "replay + update": self._update,
            "act, training": lambda: self._act("sample_actions"),
            "act, evaluation": lambda: self._act("eval_actions"),
        }


class FlowRL:
    """
    FlowRL's QSM with its own replay buffer and the values of its configuration, but for T, 20 there, and the actor's widths,
    three layers of 256 there.

    :param root: Checkout of github.com/typoverflow/flow-rl
    :param steps: Diffusion steps T
    """

    def __init__(self, root: Path, steps: int) -> None:
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
            package_without_init("flowrl.agent.online", root)
            package_without_init("flowrl.config.online", root)
        from flowrl.agent.online.qsm import QSMAgent
        from flowrl.config.online.algo.qsm import QSMConfig, QSMDiffusionConfig
        from flowrl.dataset.buffer.state import ReplayBuffer

        diffusion = QSMDiffusionConfig(
            backbone_cls="mlp",
            activation="mish",
            time_dim=64,
            hidden_dims=WIDTH,
            lr=3e-4,
            end_lr=None,
            lr_decay_steps=None,
            lr_decay_begin=None,
            steps=steps,
            clip_sampler=True,
            x_min=-1.0,
            x_max=1.0,
            solver="ddpm",
        )
        config = QSMConfig(
            name="qsm",
            backbone_cls="mlp",
            critic_hidden_dims=WIDTH,
            critic_activation="relu",
            critic_lr=3e-4,
            discount=0.99,
            num_samples=10,
            ema=0.005,
            temp=0.1,
            diffusion=diffusion,
        )
        self.agent = QSMAgent(OBS, ACT, config, seed=0)
        self.buffer = ReplayBuffer(OBS, ACT, CAPACITY)
        data = random_transitions(CAPACITY)
        self.buffer.state[:], self.buffer.action[:] = data["observations"], data["actions"]
        self.buffer.next_state[:], self.buffer.reward[:] = data["next_observations"], data["rewards"][:, None]
        self.buffer.size = CAPACITY
        # HalfCheetah-v5's observations are float64, and FlowRL's environments do not convert them
        self.observations = random_transitions(1000)["observations"].astype(float)
        self.version = commit(root)

    def _update(self) -> None:
        import jax

        info = self.agent.train_step(self.buffer.sample(BATCH)[0], step=0)
        jax.block_until_ready((self.agent.rng, self.agent.actor, self.agent.critic, self.agent.critic_target, info))

    def _act(self, number: int, deterministic: bool) -> Any:
        import numpy as np

        observations = self.observations[:number]
        return np.asarray(self.agent.sample_actions(observations, deterministic=deterministic, num_samples=1)[0])

    def tasks(self) -> dict[str, Any]:
        """What is measured."""
        return {
            "replay + update": self._update,
            "act, training": lambda: self._act(1, False),
            "act, evaluation": lambda: self._act(1, True),  # the best of ten samples
            "act, 1000 observations": lambda: self._act(1000, False),
        }


class SB3Model:
    """
    A model with SB3's methods: SBX's SAC, SB3's SAC or QSM.

    :param model: The model, with a full replay buffer
    :param version: Its version
    """

    def __init__(self, model: Any, version: str) -> None:
        self.model, self.version = model, version
        self.observations = random_transitions(1000)["observations"].astype(float)

    def _update(self) -> None:
        self.model.train(1, BATCH)
        if hasattr(self.model.policy, "qf_state"):
            import jax

            jax.block_until_ready((self.model.policy.qf_state, self.model.policy.actor_state))

    def tasks(self) -> dict[str, Any]:
        """What is measured."""
        return {
            "replay + update": self._update,
            "act, training": lambda: self.model.predict(self.observations[0]),
            "act, evaluation": lambda: self.model.predict(self.observations[0], deterministic=True),
            "act, 1000 observations": lambda: self.model.predict(self.observations),
        }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of the official QSM")
    parser.add_argument("--flowrl", type=Path, help="checkout of FlowRL")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repetitions", type=int, default=15, help="updates in a round; four times as many actions")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10], help="diffusion steps T")
    parser.add_argument("--core", type=int, default=0, help="core to stay on, where the system can pin a process")
    parser.add_argument("--out", type=Path, required=True, help="folder of peers.csv")
    args = parser.parse_args()

    # Before JAX and PyTorch are imported: their thread pools are sized by it
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})
    os.environ.update(XLA_FLAGS=XLA_FLAGS, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", JAX_PLATFORMS="cpu")
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    import speed
    import torch as th

    th.set_num_threads(1)
    subjects: dict[str, Any] = {"SB3 SAC": SB3Model(speed.make_model(speed.SAC), _version("stable_baselines3"))}
    if importlib.util.find_spec("sbx") is not None:
        import sbx

        subjects["SBX SAC"] = SB3Model(speed.make_model(sbx.SAC), sbx.__version__)
    for steps in args.steps:
        if args.official:
            subjects[f"official QSM T={steps}"] = Official(args.official.resolve(), steps)
        if args.flowrl:
            subjects[f"FlowRL QSM T={steps}"] = FlowRL(args.flowrl.resolve(), steps)
    for name, kwargs in speed.qsm_variants(tuple(args.steps)).items():
        subjects[f"sb3-qsm {name}"] = SB3Model(speed.make_model(speed.QSM, **kwargs), speed._commit())

    tasks = {name: subject.tasks() for name, subject in subjects.items()}
    rows = []
    for task in dict.fromkeys(task for calls in tasks.values() for task in calls):
        calls = {name: calls[task] for name, calls in tasks.items() if task in calls}
        for call in calls.values():
            for _ in range(5):  # JAX compiles again at the second call where the first one's results have other types
                call()
        repetitions = args.repetitions * (4 if task.startswith("act") and "1000" not in task else 1)
        times: dict[str, list[float]] = {name: [] for name in calls}
        processor: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start, processor_start = time.perf_counter(), time.process_time()
                for _ in range(repetitions):
                    call()
                processor[name].append((time.process_time() - processor_start) / repetitions * 1e3)
                times[name].append((time.perf_counter() - start) / repetitions * 1e3)
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            print(f"{task:24} {name:36} {median:9.3f} ms", flush=True)
            rows.append(
                {
                    "task": task,
                    "subject": name,
                    "median_ms": round(median, 4),
                    "quartile_1_ms": round(low, 4),
                    "quartile_3_ms": round(high, 4),
                    "processor_ms": round(statistics.median(processor[name]), 4),
                    "speed_over_sac": round(statistics.median(times["SB3 SAC"]) / median, 3),
                    "version": subjects[name].version,
                    **{package: _version(package) for package in ("jax", "flax", "torch", "numpy")},
                    "python": platform.python_version(),
                    "cpu": th.cpu.get_capabilities().get("cpu_name", platform.machine()),
                }
            )
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


if __name__ == "__main__":
    main()
