"""An environment with any spaces."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class SpacesEnv(gym.Env):
    """
    Random observations, a reward for small actions, episodes of seven steps; all of it follows from the seeds of the resets.

    :param observation_space: Observation space
    :param action_space: Action space
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Box(-2.0, 2.0, (2,)) if action_space is None else action_space
        # Apart from the space that the agent sees: its generator is not the environment's
        self._source = gym.vector.utils.batch_space(observation_space, 1)
        self.steps = 0

    def _observe(self):
        sample = self._source.sample()
        return {key: value[0] for key, value in sample.items()} if isinstance(sample, dict) else sample[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._source.seed(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        return self._observe(), -float(np.square(action).mean()), False, self.steps == 7, {}
