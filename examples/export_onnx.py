"""
Train a policy and write it as an ONNX file, which acts without PyTorch.

    pip install "sb3-qsm[export]"
    python examples/export_onnx.py
    python examples/act_onnx.py runs/export/policy.onnx
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime

from sb3_qsm import QSM
from sb3_qsm.export import to_onnx


def main() -> None:
    """Train, export, and compare the actions of the file with the model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=5_000)
    parser.add_argument("--out", type=Path, default=Path("runs/export"))
    args = parser.parse_args()

    env = gym.make("Pendulum-v1")
    model = QSM("MlpPolicy", env, seed=0)
    model.learn(args.timesteps)
    model.save(args.out / "model")
    to_onnx(model, args.out / "policy.onnx")

    observations = np.stack([env.reset(seed=seed)[0] for seed in range(100)])
    session = onnxruntime.InferenceSession(args.out / "policy.onnx")
    (actions,) = session.run(["action"], {"observation": observations})
    difference = np.abs(actions - model.predict(observations, deterministic=True)[0]).max()
    print(f"{args.out / 'policy.onnx'}: 100 actions, at most {difference:.1e} from the model's")


if __name__ == "__main__":
    main()
