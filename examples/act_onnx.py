"""
Act with an exported policy. Only numpy, onnxruntime and gymnasium are needed: neither PyTorch nor this package.

    pip install numpy onnxruntime "gymnasium[classic-control]"
    python examples/act_onnx.py runs/export/policy.onnx

examples/export_onnx.py makes the file.
"""

import argparse

import gymnasium as gym
import numpy as np
import onnxruntime


def main() -> None:
    """Play episodes and print their returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="an ONNX file")
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--episodes", type=int, default=5)
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(args.policy)
    env = gym.make(args.env)
    returns = []
    for episode in range(args.episodes):
        observation, _ = env.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            # The file takes and gives batches; scaling and clipping are in it
            (actions,) = session.run(["action"], {"observation": observation[None].astype(np.float32)})
            observation, reward, terminated, truncated, _ = env.step(actions[0])
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    print(f"return {np.mean(returns):.0f} ± {np.std(returns):.0f} over {args.episodes} episodes")


if __name__ == "__main__":
    main()
