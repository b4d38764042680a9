"""What the environments have in common: an agent in the plane, goals, obstacles, routes, and a picture of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
"""``(x_min, y_min, x_max, y_max)``"""

#: Okabe and Ito's colours, which the colour-blind can tell apart; one for each goal or mode
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


class PlaneEnv(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """
    Base of the environments: an agent in the plane that succeeds when it reaches any one of several equal goals, where the
    episode ends. After every step ``info`` has

    - ``"success"``, and ``"is_success"`` for SB3's evaluations: whether a goal is reached
    - ``"goal"``: index of the goal that is reached, -1 if none is
    - ``"route"``, where there are routes: index of the gate that was crossed last, -1 before the first

    :param goals: Centres of the goals, shape ``(n_goals, 2)``
    :param goal_radius: Distance at which a goal is reached
    :param bounds: The part of the plane that is drawn
    :param obstacles: Boxes that the agent cannot enter
    :param gates: One box for each route
    :param blocked: Indices of routes whose gate is closed
    :param render_mode: ``"rgb_array"`` or None
    :raises ValueError: if a blocked route or the render mode does not exist
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 as gymnasium declares it
    #: Height of a picture in pixels, and the radius of the agent in the plane
    picture_height = 256
    agent_radius = 0.05

    def __init__(
        self,
        goals: npt.ArrayLike,
        goal_radius: float,
        bounds: Box,
        obstacles: Sequence[Box] = (),
        gates: Sequence[Box] = (),
        blocked: Sequence[int] = (),
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be 'rgb_array' or None, got {render_mode!r}")
        self.goals = np.asarray(goals, dtype=np.float64).reshape(-1, 2)
        self.goal_radius = goal_radius
        self.bounds = bounds
        self.gates = tuple(gates)
        self.blocked = check_routes(blocked, len(self.gates))
        self.obstacles = (*obstacles, *(self.gates[route] for route in self.blocked))
        self.render_mode = render_mode
        self._path: list[FloatArray] = []
        self._route = -1

    @property
    def position(self) -> FloatArray:
        """Where the agent is, shape ``(2,)``."""
        raise NotImplementedError

    def _start_path(self) -> dict[str, Any]:
        """Begin an episode at the present position; returns the first info."""
        self._path, self._route = [], -1
        return self._follow_path()

    def _follow_path(self) -> dict[str, Any]:
        """Take note of the present position; returns the info."""
        position = self.position.copy()
        self._path.append(position)
        distances = np.linalg.norm(self.goals - position, axis=1)
        goal = int(distances.argmin()) if distances.min() <= self.goal_radius else -1
        info: dict[str, Any] = {"success": goal >= 0, "is_success": goal >= 0, "goal": goal}
        if self.gates:
            crossed = [route for route, gate in enumerate(self.gates) if inside(position, gate)]
            self._route = crossed[-1] if crossed else self._route
            info["route"] = self._route
        return info

    def render(self) -> npt.NDArray[np.uint8] | None:
        """
        Draw the plane from above.

        :return: RGB, shape ``(height, width, 3)``, or None without a render mode
        """
        if self.render_mode is None:
            gym.logger.warn("render() was called without a render_mode; pass render_mode='rgb_array' to gymnasium.make()")
            return None
        x_min, y_min, x_max, y_max = self.bounds
        scale = self.picture_height / (y_max - y_min)
        columns = np.arange(round((x_max - x_min) * scale)) + 0.5
        rows = np.arange(self.picture_height) + 0.5
        x, y = np.meshgrid(x_min + columns / scale, y_max - rows / scale)
        picture = np.full((*x.shape, 3), 255, dtype=np.uint8)

        def disc(center: FloatArray, radius: float, color: str) -> None:
            picture[(x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2] = rgb(color)

        for left, bottom, right, top in self.obstacles:
            picture[(x >= left) & (x <= right) & (y >= bottom) & (y <= top)] = rgb("#707070")
        for index, goal in enumerate(self.goals):
            disc(goal, self.goal_radius, PALETTE[index % len(PALETTE)])
        for here, there in itertools.pairwise(self._path):
            line = np.linspace(here, there, 16)
            line_columns = ((line[:, 0] - x_min) * scale).astype(int).clip(0, len(columns) - 1)
            line_rows = ((y_max - line[:, 1]) * scale).astype(int).clip(0, len(rows) - 1)
            picture[line_rows, line_columns] = rgb("#A0A0A0")
        if self._path:
            disc(self._path[-1], self.agent_radius, "#000000")
        return picture


def inside(position: FloatArray, box: Box) -> bool:
    """
    :param position: Point, shape ``(2,)``
    :param box: Box
    :return: Whether the point is in the box or on its edge
    """
    return bool(box[0] <= position[0] <= box[2] and box[1] <= position[1] <= box[3])


def check_routes(blocked: Sequence[int], n_routes: int) -> tuple[int, ...]:
    """
    :param blocked: Indices of routes
    :param n_routes: How many routes there are
    :return: The indices
    :raises ValueError: if one of them is no route
    """
    if not isinstance(blocked, Sequence) or isinstance(blocked, str):
        raise ValueError(f"blocked must hold indices of routes, such as [0], got {blocked!r}")
    for route in blocked:
        if isinstance(route, bool) or not isinstance(route, (int, np.integer)) or route not in range(n_routes):
            allowed = f"routes are 0 to {n_routes - 1}" if n_routes else "this environment has no routes"
            raise ValueError(f"blocked must hold indices of routes, got {route!r}; {allowed}")
    return tuple(blocked)


def rgb(color: str) -> tuple[int, int, int]:
    """
    :param color: ``"#RRGGBB"``
    :return: Red, green and blue from 0 to 255
    """
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
