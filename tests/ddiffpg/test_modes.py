"""Distances between trajectories, clusters of them, and what becomes of the modes."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch as th

pytest.importorskip("dtaidistance")

from dtaidistance import dtw_ndim

from sb3_qsm.ddiffpg.buffers import Trajectory
from sb3_qsm.ddiffpg.distance import dtw_distance
from sb3_qsm.ddiffpg.modes import (
    Inheritance,
    TrajectoryDistances,
    cluster,
    inherit,
    medoid,
    modes_passing,
    silhouette,
    squareform,
)


def trajectory(number: int, positions: np.ndarray) -> Trajectory:
    return Trajectory(number, np.zeros(1, dtype=np.int64), np.ascontiguousarray(positions, dtype=np.float64), True, 1.0)


def ways(n_modes: int, n: int, noise: float, rng: np.random.Generator) -> list[Trajectory]:
    """Noisy ways of different lengths from the middle of a circle to n_modes points on it, in turn."""
    found = []
    for i in range(n):
        angle = 2 * np.pi * (i % n_modes) / n_modes
        n_points = rng.integers(12, 20)
        walk = np.cumsum(rng.normal(size=(n_points, 2)) * noise, axis=0)
        share = np.linspace(0.0, 1.0, n_points)[:, None]
        found.append(trajectory(i, share * [np.cos(angle), np.sin(angle)] + walk - share * walk[-1]))
    return found


def dtw_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """The textbook's table."""
    table = np.full((len(first) + 1, len(second) + 1), np.inf)
    table[0, 0] = 0.0
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = ((a - b) ** 2).sum() + min(table[i, j], table[i, j + 1], table[i + 1, j])
    return float(np.sqrt(table[-1, -1] / max(len(first), len(second))))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_distance_is_dynamic_time_warping(dim):
    rng = np.random.default_rng(dim)
    first, second = rng.normal(size=(9, dim)), rng.normal(size=(14, dim))
    assert dtw_distance(first, second) == pytest.approx(dtw_by_hand(first, second), rel=1e-9)
    assert dtw_distance(first, second) == pytest.approx(dtw_distance(second, first), rel=1e-12)
    assert dtw_distance(first, first) == 0.0


def test_distance_does_not_depend_on_speed_or_length():
    line = np.linspace([0.0, 0.0], [1.0, 0.0], 50)
    slow = np.linspace([0.0, 0.0], [1.0, 0.0], 100)
    assert dtw_distance(line, slow) < 0.01
    for n in (20, 200):
        parallel = np.linspace([0.0, 0.0], [1.0, 0.0], n)
        assert dtw_distance(parallel, parallel + np.array([0.0, 0.5])) == pytest.approx(0.5)


@pytest.mark.parametrize("n_modes", [1, 2, 4, 15])
@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_clusters_are_the_modes(n_modes, noise):
    rng = np.random.default_rng(n_modes)
    found = ways(n_modes, max(6 * n_modes, 20), noise, rng)
    labels = cluster(TrajectoryDistances().condensed(found))
    assert labels.min() == 0
    assert labels.max() == n_modes - 1
    # The same partition: the n-th way of each mode is where the first one is
    np.testing.assert_array_equal(labels, labels[np.arange(len(found)) % n_modes])
    assert len(set(labels[:n_modes])) == n_modes


def test_threshold_is_a_distance():
    """Three parallel lines, 0.3 and 1 apart."""
    line = np.linspace([0.0, 0.0], [1.0, 0.0], 10)
    found = [trajectory(i, line + np.array([0.0, y + 0.01 * i])) for i, y in enumerate([0.0, 0.0, 0.3, 0.3, 1.3, 1.3])]
    condensed = TrajectoryDistances().condensed(found)
    for threshold, expected in ((0.1, [0, 0, 1, 1, 2, 2]), (0.5, [0, 0, 0, 0, 1, 1]), (5.0, [0] * 6)):
        labels = cluster(condensed, threshold, min_size=2)
        assert len(set(labels)) == len(set(expected))
        for i in range(6):
            for j in range(6):
                assert (labels[i] == labels[j]) == (expected[i] == expected[j])


def test_few_trajectories():
    line = np.linspace([0.0, 0.0], [1.0, 0.0], 10)
    distances = TrajectoryDistances()
    for n in (1, 2, 3):
        condensed = distances.condensed([trajectory(i, line * (-1) ** i) for i in range(n)])
        assert len(condensed) == n * (n - 1) // 2
        # Whether they are far apart cannot be told without knowing how wide a mode is
        assert cluster(condensed).tolist() == [0] * n
        assert squareform(condensed).shape == (n, n)
    condensed = distances.condensed([trajectory(i, line * (-1) ** i) for i in range(4)])
    assert cluster(condensed, min_size=2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert cluster(condensed, min_size=3).tolist() == [0] * 4
    assert cluster(condensed, threshold=3.0, min_size=2).tolist() == [0] * 4


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_stray_trajectories_are_no_modes(threshold):
    """Two ways, a detour on the way to the first goal and another to the second."""
    found = ways(2, 20, 0.01, np.random.default_rng(0))
    detours = [np.array([[0.0, 0.0], [x / 2, 2.0], [x, 2.0], [x, 0.0]]) for x in (1.0, -1.0)]
    found += [
        trajectory(20 + i, np.concatenate([np.linspace(a, b, 6) for a, b in itertools.pairwise(d)]))
        for i, d in enumerate(detours)
    ]
    labels = cluster(TrajectoryDistances().condensed(found), threshold)
    assert set(labels) == {0, 1, -1}
    assert labels[20] == labels[21] == -1
    assert labels[:20].tolist() in ([0, 1] * 10, [1, 0] * 10)
    assert len(set(cluster(TrajectoryDistances().condensed(found), threshold, min_size=1))) == 4


def test_identical_trajectories_are_one_mode():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(cluster(np.zeros(15)), np.zeros(6))


def test_silhouette_by_its_definition():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(12, 3)), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    labels[-3:] = [3, 2, 2]  # a cluster of one
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    values = []
    for i, label in enumerate(labels):
        own = [j for j in range(12) if labels[j] == label and j != i]
        if not own:
            values.append(0.0)
            continue
        a = distances[i, own].mean()
        b = min(distances[i, labels == other].mean() for other in set(labels) - {label})
        values.append((b - a) / max(a, b))
    assert silhouette(distances, labels) == pytest.approx(np.mean(values))


def test_medoid():
    points = np.array([0.0, 1.0, 1.1, 5.0])
    assert medoid(np.abs(points[:, None] - points[None])) == 2 - 1


def test_modes_that_pass_by():
    """Against the distances to very many points of each way."""
    rng = np.random.default_rng(0)
    ways = [np.cumsum(rng.normal(size=(n, 3)), axis=0) for n in (2, 5, 20)]
    # A step without a length, as where the agent stood still
    ways[1] = np.insert(ways[1], 2, ways[1][2], axis=0)
    positions = rng.normal(size=(40, 3)) * 3
    distances = []
    for way in ways:
        points = np.concatenate([np.linspace(a, b, 2001) for a, b in itertools.pairwise(way)])
        distances.append(np.linalg.norm(positions[:, None] - points, axis=2).min(axis=1))
    tolerance = [np.linalg.norm(np.diff(way, axis=0), axis=1).mean() / 2 for way in ways]
    margin = np.stack(distances, axis=1) - np.min(distances, axis=0)[:, None] - np.array(tolerance)
    assert (np.abs(margin) > 1e-3).all()  # nothing hangs on rounding
    found = modes_passing(th.as_tensor(positions), [th.as_tensor(way) for way in ways])
    assert found.tolist() == (margin <= 0).tolist()
    assert set(found.sum(dim=1).tolist()) == {1, 2, 3}


def test_every_distance_is_computed_once(monkeypatch):
    distances = TrajectoryDistances()
    calls = []
    real = dtw_ndim.distance_fast
    monkeypatch.setattr(dtw_ndim, "distance_fast", lambda *args: calls.append(0) or real(*args))
    found = ways(2, 10, 0.02, np.random.default_rng(0))
    distances.keep({one.id: one for one in found})
    first = distances.condensed(found[:8])
    assert len(calls) == 28
    np.testing.assert_array_equal(distances.condensed(found[:8]), first)
    assert distances(found[3], found[1]) == distances(found[1], found[3])
    assert len(calls) == 28
    distances.condensed(found)
    assert len(calls) == 45
    distances.keep({one.id: one for one in found[:3]})
    assert len(distances.known) == 3
    distances.condensed(found[:3])
    assert len(calls) == 45
    # Another one of the same number
    distances.keep({0: found[0], 1: found[1], 2: dataclasses.replace(found[5], id=2)})
    assert set(distances.known) == {(0, 1)}


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dtaidistance", None)
    with pytest.raises(ImportError, match=r'DDiffPG needs pip install "sb3-qsm\[ddiffpg\]"'):
        TrajectoryDistances()


ABCD = [{1, 2, 3, 4}, {5, 6, 7}]


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (ABCD, ABCD, [(0, True), (1, True)]),
        (ABCD[::-1], ABCD, [(1, True), (0, True)]),
        # Grown and shrunk: newer trajectories have come, older ones are gone
        ([{3, 4, 8, 9, 10}, {7, 11}], ABCD, [(0, True), (1, True)]),
        # One splits: the larger part goes on, the other is a copy
        ([{1}, {2, 3, 4}, {5, 6, 7}], ABCD, [(0, False), (0, True), (1, True)]),
        ([{1, 2}, {3, 4}, {5, 6, 7}], ABCD, [(0, True), (0, False), (1, True)]),
        # Two merge: the one with more goes on
        ([{1, 2, 3, 4, 5, 6, 7}], ABCD, [(0, True)]),
        ([{1, 2, 5, 6, 7}], ABCD, [(1, True)]),
        # One appears, one vanishes
        ([*ABCD, {8, 9}], ABCD, [(0, True), (1, True), (None, False)]),
        ([{5, 6, 7}], ABCD, [(1, True)]),
        ([{8, 9}], ABCD, [(None, False)]),
        (ABCD, [], [(None, False), (None, False)]),
        ([], ABCD, []),
        # One vanishes as another splits
        ([{5, 6}, {7}], ABCD, [(1, True), (1, False)]),
    ],
)
def test_inheritance(new: Sequence[set[int]], old: Sequence[set[int]], expected: list[tuple[int | None, bool]]):
    assert inherit(new, old) == [Inheritance(*pair) for pair in expected]
