"""A point that is moved directly."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sb3_qsm.common.checks import check_integer, check_number
from sb3_qsm.envs.plane import Box, FloatArray, PlaneEnv, inside

Observation = npt.NDArray[np.float32]


class PointEnv(PlaneEnv):
    """
    A point that moves by ``step_size`` times the action; actions longer than one are shortened to one, so that no direction is
    faster than another. The observation is its position.

    :param goals: Centres of the goals, shape ``(n_goals, 2)``
    :param start: Where episodes begin
    :param bounds: The point stays in this box
    :param obstacles: Boxes that it cannot enter, wider than ``step_size``
    :param gates: One box for each route
    :param step_size: Length of a step
    :param goal_radius: Distance at which a goal is reached
    :param reward_type: ``"dense"``, minus the length of the way to the nearest goal, or ``"sparse"``, 1 at a goal and else 0
    :param start_noise: Standard deviation of the start
    :param blocked: Indices of routes whose gate is closed
    :param render_mode: ``"rgb_array"`` or None
    :raises ValueError: if an argument is out of its range
    """

    def __init__(
        self,
        goals: Sequence[Sequence[float]],
        start: tuple[float, float],
        bounds: Box,
        obstacles: Sequence[Box] = (),
        gates: Sequence[Box] = (),
        step_size: float = 0.1,
        goal_radius: float = 0.15,
        reward_type: str = "dense",
        start_noise: float = 0.0,
        blocked: Sequence[int] = (),
        render_mode: str | None = None,
    ) -> None:
        super().__init__(goals, goal_radius, bounds, obstacles, gates, blocked, render_mode)
        if reward_type not in ("dense", "sparse"):
            raise ValueError(f"reward_type must be 'dense' or 'sparse', got {reward_type!r}")
        check_number("step_size", step_size, 0.0, strict=True)
        check_number("goal_radius", goal_radius, 0.0, strict=True)
        check_number("start_noise", start_noise, 0.0)
        self.start = np.asarray(start, dtype=np.float64)
        if (self._within(self.start) != self.start).any():
            raise ValueError(f"start must be inside of the bounds {tuple(bounds)}, got {start!r}")
        if any(inside(self.start, obstacle) for obstacle in self.obstacles):
            raise ValueError(f"start must be outside of the obstacles, got {start!r}")
        self.step_size = step_size
        self.reward_type = reward_type
        self.start_noise = start_noise
        low, high = np.array(bounds[:2], dtype=np.float32), np.array(bounds[2:], dtype=np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._position = self.start

    @property
    def position(self) -> FloatArray:
        """Where the point is, shape ``(2,)``."""
        return self._position

    def distance(self, position: FloatArray) -> float:
        """
        :param position: Point, shape ``(2,)``
        :return: Length of the way from there to the nearest goal
        """
        return float(np.linalg.norm(self.goals - position, axis=1).min())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """
        :param seed: Seed of the starts
        :param options: Not used
        :return: First observation and info
        """
        super().reset(seed=seed, options=options)
        while True:
            self._position = self._within(self.start + self.start_noise * self.np_random.standard_normal(2))
            if not any(inside(self._position, obstacle) for obstacle in self.obstacles):
                break
        return self._observation(), self._start_path()

    def step(self, action: npt.NDArray[Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """
        :param action: Direction, shape ``(2,)``
        :return: Observation, reward, whether a goal is reached, False, info
        """
        action = np.asarray(action, dtype=np.float64)
        move = self.step_size * action / max(1.0, float(np.linalg.norm(action)))
        # Along an obstacle the point slides
        for step in (move, move * (1.0, 0.0), move * (0.0, 1.0)):
            position = self._within(self._position + step)
            if not any(inside(position, obstacle) for obstacle in self.obstacles):
                self._position = position
                break
        info = self._follow_path()
        reward = float(info["success"]) if self.reward_type == "sparse" else -self.distance(self._position)
        return self._observation(), reward, info["success"], False, info

    def _within(self, position: FloatArray) -> FloatArray:
        return np.clip(position, self.bounds[:2], self.bounds[2:])

    def _observation(self) -> Observation:
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        # Rounding to float32 may leave the bounds
        return np.clip(self._position.astype(np.float32), space.low, space.high)


class NGoalPointEnv(PointEnv):
    """
    A point in the middle of n goals on the unit circle, the first to the right of it. In the middle n actions are equally
    good, and their mean, standing still, is the worst.

    :param n_goals: Number of goals
    :param step_size: Length of a step
    :param kwargs: Further arguments of :class:`PointEnv`
    :raises ValueError: if there are no goals
    """

    def __init__(self, n_goals: int = 4, step_size: float = 0.25, **kwargs: Any) -> None:
        check_integer("n_goals", n_goals, 1)
        angles = [2.0 * math.pi * i / n_goals for i in range(n_goals)]
        goals = [(math.cos(angle), math.sin(angle)) for angle in angles]
        super().__init__(goals, (0.0, 0.0), (-1.5, -1.5, 1.5, 1.5), step_size=step_size, **kwargs)


class CorridorEnv(PointEnv):
    """
    A point at the left end of a corridor, a goal at the right end, and an obstacle between them: the ways above it (route 0)
    and below it (route 1) are equally long.

    :param kwargs: Further arguments of :class:`PointEnv`
    """

    obstacle: Box = (-0.4, -0.25, 0.4, 0.25)

    def __init__(self, **kwargs: Any) -> None:
        left, bottom, right, top = self.obstacle
        bounds = (-1.2, -0.6, 1.2, 0.6)
        gates = ((left, top, right, bounds[3]), (left, bounds[1], right, bottom))
        super().__init__([(1.0, 0.0)], (-1.0, 0.0), bounds, [self.obstacle], gates, **kwargs)

    def distance(self, position: FloatArray) -> float:
        """
        :param position: Point, shape ``(2,)``
        :return: Length of the shortest way round the obstacle to the goal; closed gates are not considered
        """
        left, bottom, right, top = self.obstacle
        ways = []
        for side, edge in ((1.0, top), (-1.0, bottom)):
            corners = [np.array([left, edge])] if position[0] <= left else []
            corners += [np.array([right, edge])] if position[0] < right else []
            # Where the straight line to the goal passes a corner on the outside, the corner is not on the way
            path = [position]
            for corner in corners:
                along = (corner[0] - path[-1][0]) / (self.goals[0][0] - path[-1][0])
                line = path[-1][1] + along * (self.goals[0][1] - path[-1][1])
                if side * line < side * edge:
                    path.append(corner)
            path.append(self.goals[0])
            ways.append(sum(float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(path)))
        return min(ways)
