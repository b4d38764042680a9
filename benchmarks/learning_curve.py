"""
Train one agent and write its evaluations to a CSV, without the sweep: for trying a setting.

    python benchmarks/learning_curve.py --env HalfCheetah-v5 --timesteps 60000 --seed 0 --out benchmarks/results/learning

The row of an evaluation is written when it is made. The same command goes on with a killed run from its checkpoint, which is
beside the CSV; a finished curve is not run again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from cells import ALGORITHMS, PRESETS, Cell, CellError, register, train


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=sorted(ALGORITHMS), default="qsm")
    parser.add_argument("--env", required=True)
    parser.add_argument("--timesteps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    presets = sorted(name.removeprefix("qsm-") for name in PRESETS if name.startswith("qsm-"))
    parser.add_argument("--preset", choices=["default", *presets], default="default", help="named setting of QSM")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="further constructor arguments, as JSON")
    parser.add_argument("--label", help="name of the setting in the CSV; by default the preset")
    parser.add_argument("--eval-freq", type=int, default=5000)
    parser.add_argument("--eval-episodes", type=int, default=5)
    parser.add_argument("--checkpoint-freq", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    parser.add_argument("--save", action="store_true", help="save the trained model beside the CSV")
    args = parser.parse_args()
    if args.preset != "default" and args.algo != "qsm":
        parser.error(f"--preset is for --algo qsm, not {args.algo}")

    try:
        register(args.env)
        cell = Cell(
            env=args.env,
            seed=args.seed,
            timesteps=args.timesteps,
            preset=args.algo if args.preset == "default" else f"qsm-{args.preset}",
            setting=args.label or args.preset,
            kwargs=args.kwargs,
            eval_freq=args.eval_freq,
            eval_episodes=args.eval_episodes,
            checkpoint_freq=args.checkpoint_freq,
        )
        train(cell, cell.path(args.out), f"python {shlex.join(sys.argv)}", args.save)
    except CellError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
