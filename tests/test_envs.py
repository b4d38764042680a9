"""The environments with several ways to succeed."""

import itertools
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_qsm.envs import MAZES, CorridorEnv, MazeEnv, NGoalPointEnv, PlaneEnv, PointEnv, register_envs

ALL = sorted(name for name in gym.registry if name.startswith("sb3_qsm/"))
POINTS = [name for name in ALL if "Maze" not in name]


def make(name: str, **kwargs) -> gym.Env:
    if "Maze" in name:
        pytest.importorskip("gymnasium_robotics")
    return gym.make(name, **kwargs)


def follow(env: gym.Env, waypoints: list[tuple[float, float]], max_steps: int = 200) -> tuple[float, dict]:
    """Steer to one point after the other; returns the sum of the rewards and the last info."""
    plane: PlaneEnv = env.unwrapped
    total, info = 0.0, {}
    for waypoint in waypoints:
        for _ in range(max_steps):
            offset = np.array(waypoint) - plane.position
            if np.linalg.norm(offset) < 0.1:
                break
            if isinstance(plane, MazeEnv):
                offset = 3.0 * (offset - 0.2 * plane._agent.data.qvel[:2])
            else:
                offset = offset / plane.step_size
            action = (offset / max(1.0, np.linalg.norm(offset))).astype(np.float32)
            _, reward, terminated, truncated, info = env.step(action)
            total += reward
            if terminated or truncated:
                return total, info
    return total, info


@pytest.mark.parametrize("name", ALL)
def test_checkers_of_gymnasium_and_sb3(name):
    env = make(name, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        gymnasium_check_env(env.unwrapped)
        check_env(env)
    # Velocities have no bounds
    assert all("is -infinity" in str(w.message) or "is infinity" in str(w.message) for w in messages)
    assert env.spec.max_episode_steps > 0
    env.close()


def test_all_are_registered_once():
    assert len(ALL) == 8
    before = dict(gym.registry)
    register_envs()
    assert gym.registry == before


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.envs.maze.maze_v4", None)
    with pytest.raises(ImportError, match=r'the mazes need pip install "sb3-qsm\[modes\]"'):
        MazeEnv(**MAZES["TwoRoutes"])


@pytest.mark.parametrize("n_goals", [1, 2, 4, 15])
def test_goals_are_equal_and_each_is_reported(n_goals):
    env = gym.make("sb3_qsm/NGoalPoint-v0", n_goals=n_goals)
    returns = []
    for goal, target in enumerate(env.unwrapped.goals):
        observation, info = env.reset(seed=goal)
        np.testing.assert_array_equal(observation, [0.0, 0.0])
        assert info == {"success": False, "is_success": False, "goal": -1}
        total, info = follow(env, [tuple(target)])
        assert info["success"]
        assert info["goal"] == goal
        returns.append(total)
    np.testing.assert_allclose(returns, returns[0], rtol=1e-5)
    # On the way to a goal it is the sum of the distances
    assert returns[0] == pytest.approx(-(0.75 + 0.5 + 0.25), abs=1e-5)


def test_standing_still_is_the_worst_and_no_direction_is_faster():
    env = NGoalPointEnv()
    rewards = {}
    for action in itertools.product((-1.0, 0.0, 1.0), repeat=2):
        env.reset()
        rewards[action] = env.step(np.array(action, dtype=np.float32))[1]
        assert np.linalg.norm(env.position) <= env.step_size + 1e-9
    assert min(rewards.values()) == rewards[0.0, 0.0] == -1.0
    assert max(rewards.values()) == pytest.approx(-0.75)


def test_point_stays_within_its_bounds_and_sparse_reward_is_paid_at_goals_only():
    env = NGoalPointEnv(reward_type="sparse", start_noise=0.3)
    starts = [env.reset(seed=seed)[0] for seed in range(50)]
    assert np.std(starts) == pytest.approx(0.3, rel=0.3)
    rewards = []
    for _ in range(40):
        observation, reward, terminated, _, info = env.step(np.array([1.0, 1.0], dtype=np.float32))
        assert env.observation_space.contains(observation)
        assert reward == float(info["success"]) == float(terminated)
        rewards.append(reward)
    np.testing.assert_allclose(observation, [1.5, 1.5])


CORRIDOR_WAYS = [[(-0.4, 0.4), (0.4, 0.4), (1.0, 0.0)], [(-0.4, -0.4), (0.4, -0.4), (1.0, 0.0)]]


@pytest.mark.parametrize("reward_type", ["dense", "sparse"])
def test_corridor_has_two_equal_routes(reward_type):
    env = gym.make("sb3_qsm/Corridor-v0", reward_type=reward_type)
    returns = []
    for route, way in enumerate(CORRIDOR_WAYS):
        _, info = env.reset()
        assert info["route"] == -1
        total, info = follow(env, way)
        assert info == {"success": True, "is_success": True, "goal": 0, "route": route}
        returns.append(total)
    assert returns[0] == pytest.approx(returns[1], abs=1e-6)
    # Straight on is the obstacle, along which the point slides
    env.reset()
    for _ in range(20):
        env.step(np.array([1.0, 0.0], dtype=np.float32))
    assert env.unwrapped.position[0] < -0.4
    env.step(np.array([1.0, 1.0], dtype=np.float32))
    assert env.unwrapped.position[1] > 0.05


def test_corridor_distance_is_the_shortest_way():
    """Against Dijkstra's algorithm on a fine grid, which is longer by its eight directions at most."""
    scipy_sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.csgraph import dijkstra

    env = CorridorEnv()
    left, bottom, right, top = env.obstacle
    step = 0.05
    xs, ys = np.arange(-24, 25) * step, np.arange(-12, 13) * step

    def is_free(x: float, y: float) -> bool:
        return not (left + 1e-6 < x < right - 1e-6 and bottom + 1e-6 < y < top - 1e-6)

    cells = [(i, j) for i, x in enumerate(xs) for j, y in enumerate(ys) if is_free(x, y)]
    free = {cell: k for k, cell in enumerate(cells)}
    graph = scipy_sparse.lil_matrix((len(free), len(free)))
    for (i, j), k in free.items():
        for di, dj in itertools.product((-1, 0, 1), repeat=2):
            neighbour = free.get((i + di, j + dj))
            if neighbour is not None and (di or dj) and is_free(xs[i] + di * step / 2, ys[j] + dj * step / 2):
                graph[k, neighbour] = step * np.hypot(di, dj)
    goal = free[int(np.argmin(np.abs(xs - 1.0))), int(np.argmin(np.abs(ys)))]
    lengths = dijkstra(graph.tocsr(), indices=goal)
    for (i, j), k in free.items():
        distance = env.distance(np.array([xs[i], ys[j]]))
        assert distance - 1e-6 <= lengths[k] <= 1.09 * distance + 1e-6


MAZE_WAYS = {
    "TwoRoutes": [[(1, 1), (0, 1), (-1, 1), (-1, 0)], [(1, -1), (0, -1), (-1, -1), (-1, 0)]],
    "TwoGoals": [[(0, 0.5), (-2, 0.5)], [(0, 0.5), (2, 0.5)]],
    "FourGoals": [[(0, 2)], [(-2, 0)], [(2, 0)], [(0, -2)]],
}


@pytest.mark.parametrize("maze", MAZES)
def test_ways_through_the_mazes(maze):
    env = make(f"sb3_qsm/PointMaze_{maze}-v0")
    found = []
    for way in MAZE_WAYS[maze]:
        observation, _ = env.reset(seed=1)
        np.testing.assert_allclose(observation[:2], env.unwrapped.position, atol=1e-6)
        total, info = follow(env, way)
        assert total == 1.0
        found.append(info["route" if maze == "TwoRoutes" else "goal"])
    assert sorted(found) == list(range(len(found)))


@pytest.mark.parametrize("name", ["sb3_qsm/Corridor-v0", "sb3_qsm/PointMaze_TwoRoutes-v0"])
def test_blocked_route(name):
    ways = CORRIDOR_WAYS if "Corridor" in name else MAZE_WAYS["TwoRoutes"]
    for blocked in (0, 1):
        env = make(name, blocked=[blocked])
        for route, way in enumerate(ways):
            env.reset(seed=0)
            _, info = follow(env, way, max_steps=20)
            assert info["success"] == (route != blocked)


def test_ant_starts_where_the_map_says_and_walks():
    env = make("sb3_qsm/AntMaze_TwoGoals-v0")
    observation, _ = env.reset(seed=0)
    assert observation.shape == (29,)
    assert np.abs(observation[:2] - [0.0, -2.0]).max() <= 0.4
    for _ in range(20):
        moved, reward, *_ = env.step(env.action_space.sample())
        assert reward == 0.0
    assert not np.allclose(observation[2:15], moved[2:15])
    assert {tuple(goal) for goal in env.unwrapped.goals} == {(-8.0, 2.0), (8.0, 2.0)}


def test_no_file_is_left_behind():
    folder = Path("/tmp")
    before = set(folder.glob("ant_maze*.xml"))
    make("sb3_qsm/PointMaze_TwoGoals-v0").close()
    assert set(folder.glob("ant_maze*.xml")) <= before


@pytest.mark.parametrize("name", [*POINTS, "sb3_qsm/PointMaze_FourGoals-v0"])
def test_picture(name):
    env = make(name, render_mode="rgb_array")
    env.reset(seed=0)
    plane: PlaneEnv = env.unwrapped
    before = env.render()
    for _ in range(8):
        env.step(np.array([0.0, 1.0], dtype=np.float32))
    picture = env.render()
    assert picture.dtype == np.uint8
    x_min, y_min, x_max, y_max = plane.bounds
    assert picture.shape == (256, round(256 * (x_max - x_min) / (y_max - y_min)), 3)

    def color_at(x: float, y: float) -> tuple[int, ...]:
        scale = 256 / (y_max - y_min)
        return tuple(picture[int((y_max - y) * scale), int((x - x_min) * scale)])

    assert len({color_at(*goal) for goal in plane.goals}) == len(plane.goals)
    assert color_at(*plane.position) == (0, 0, 0)
    for left, bottom, right, top in plane.obstacles:
        assert color_at((left + right) / 2, (bottom + top) / 2) == (112, 112, 112)
    assert (picture != before).any()


def test_vectorised_environments_report_the_goal():
    env = make_vec_env("sb3_qsm/NGoalPoint-v0", n_envs=3, seed=0)
    env.reset()
    goals = set()
    for _ in range(12):
        *_, dones, infos = env.step(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.1]], dtype=np.float32))
        goals |= {(i, info["goal"]) for i, info in enumerate(infos) if dones[i]}
    assert goals == {(0, 0), (1, 1)}


MAP = MAZES["TwoRoutes"]["maze_map"]


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: NGoalPointEnv(n_goals=0), "n_goals must be an integer >= 1, got 0"),
        (lambda: NGoalPointEnv(n_goals=2.0), "n_goals must be an integer >= 1, got 2.0"),
        (lambda: NGoalPointEnv(reward_type="big"), "reward_type must be 'dense' or 'sparse', got 'big'"),
        (lambda: NGoalPointEnv(step_size=0), "step_size must be a number > 0, got 0"),
        (lambda: NGoalPointEnv(start_noise=-1), "start_noise must be a number >= 0, got -1"),
        (lambda: NGoalPointEnv(blocked=[0]), "blocked must hold indices of routes, got 0; this environment has no routes"),
        (lambda: NGoalPointEnv(render_mode="human"), "render_mode must be 'rgb_array' or None, got 'human'"),
        (lambda: CorridorEnv(blocked=[2]), "blocked must hold indices of routes, got 2; routes are 0 to 1"),
        (lambda: MazeEnv(MAP, agent="car"), "agent must be 'point' or 'ant', got 'car'"),
        (lambda: NGoalPointEnv(step_size="a"), "step_size must be a number > 0, got 'a'"),
        (
            lambda: PointEnv([(0, 0)], (0.5, 0), (-1, -1, 1, 1), [(0.4, -1, 0.6, 1)]),
            r"start must be outside .* got \(0.5, 0\)",
        ),
        (
            lambda: PointEnv([(1, 0)], (-2, 0), (-1, -1, 1.5, 1), [(-1.2, -0.2, -0.8, 0.2)]),
            r"start must be inside of the bounds \(-1, -1, 1.5, 1\), got \(-2, 0\)",
        ),
        (lambda: CorridorEnv(blocked=0), r"blocked must hold indices of routes, such as \[0\], got 0"),
        (lambda: CorridorEnv(blocked=[0.0]), "blocked must hold indices of routes, got 0.0; routes are 0 to 1"),
        (lambda: MazeEnv(MAP, goal_radius=-1.0), "goal_radius must be a number > 0, got -1.0"),
        (lambda: MazeEnv(MAP, start_noise=-1), "start_noise must be a number >= 0 and <= 0.4, got -1"),
        (lambda: MazeEnv(MAP, start_noise=5), "start_noise must be a number >= 0 and <= 0.4, got 5"),
        (lambda: MazeEnv(MAP, action_repeat=True), "action_repeat must be an integer >= 1, got True"),
        (lambda: MazeEnv(MAP, action_repeat=0), "action_repeat must be an integer >= 1, got 0"),
        (lambda: MazeEnv([[1, 1], [1]]), r"maze_map must be rows of one length, got lengths \[2, 1\]"),
        (lambda: MazeEnv([["r", "x", "g"]]), "got 'x'"),
        (lambda: MazeEnv([["r", 0]]), "maze_map has no goal, a cell 'g'"),
        (lambda: MazeEnv([["g", 0]]), "maze_map has no start, a cell 'r'"),
        (lambda: MazeEnv(MAP, gates=[(0, 0)]), r"gates must be free cells .* got \(0, 0\)"),
        (lambda: MazeEnv(MAP, gates=[(9, 0)]), r"gates must be free cells .* got \(9, 0\)"),
        (lambda: PointEnv([(0, 0)], (0, 0), (-1, -1, 1, 1), goal_radius=-1), "goal_radius must be a number > 0, got -1"),
    ],
)
def test_bad_input(make_env, message):
    with pytest.raises(ValueError, match=message):
        make_env()


def test_no_start_is_inside_an_obstacle():
    env = CorridorEnv(start_noise=0.5)
    left, bottom, right, top = env.obstacle
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])
    inside = (starts[:, 0] > left) & (starts[:, 0] < right) & (starts[:, 1] > bottom) & (starts[:, 1] < top)
    assert not inside.any()


def test_render_without_a_mode():
    env = NGoalPointEnv()
    env.reset()
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None
