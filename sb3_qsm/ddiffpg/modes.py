"""Modes: clusters of successful trajectories, how they are found and what becomes of them."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_qsm.ddiffpg.buffers import Trajectory
from sb3_qsm.ddiffpg.distance import check_dtaidistance, dtw_distance

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mode:
    """
    One of the ways to succeed that are known.

    :param size: Number of successful trajectories of this mode in the replay buffer
    :param success_rate: Share of successes among the last episodes that were collected with this mode; nan before the first
    :param mean_return: Mean return of its successful trajectories
    :param trajectory: Positions of the trajectory that is nearest to all others of the mode, shape ``(n, position_dim)``
    """

    size: int
    success_rate: float
    mean_return: float
    trajectory: FloatArray = field(repr=False)


class Inheritance(NamedTuple):
    """
    Where a mode comes from.

    :param parent: Old mode that it shares most trajectories with, None if it shares none
    :param continues: Whether it is that mode, which goes on, or a copy of it
    """

    parent: int | None
    continues: bool


class TrajectoryDistances:
    """
    Distances between trajectories, each computed once: dynamic time warping by ``dtaidistance``, divided by the square root of
    the number of points of the longer one, so that it is in units of position and does not grow with the length.

    :raises ImportError: if ``dtaidistance`` is not installed, or without its compiled part
    """

    def __init__(self) -> None:
        check_dtaidistance()
        self.known: dict[tuple[int, int], float] = {}
        self._trajectories: dict[int, Trajectory] = {}

    def __call__(self, first: Trajectory, second: Trajectory) -> float:
        """
        :param first: Trajectory
        :param second: Trajectory
        :return: Their distance
        """
        key = (min(first.id, second.id), max(first.id, second.id))
        if key not in self.known:
            self.known[key] = dtw_distance(first.positions, second.positions)
        return self.known[key]

    def condensed(self, trajectories: Sequence[Trajectory]) -> FloatArray:
        """
        All distances between trajectories, as SciPy's clustering wants them.

        :param trajectories: n trajectories
        :return: Distances, shape ``(n * (n - 1) / 2,)``
        """
        n = len(trajectories)
        return np.array([self(trajectories[i], trajectories[j]) for i in range(n) for j in range(i + 1, n)])

    def keep(self, trajectories: Mapping[int, Trajectory]) -> None:
        """
        Forget the trajectories that are gone. In another replay buffer others may have their numbers.

        :param trajectories: Those that there are, by their ids
        """
        same = {number for number, trajectory in trajectories.items() if self._trajectories.get(number) is trajectory}
        self.known = {key: value for key, value in self.known.items() if key[0] in same and key[1] in same}
        self._trajectories = dict(trajectories)


def cluster(
    condensed: FloatArray, threshold: float | None = None, min_silhouette: float = 0.45, min_size: int = 3
) -> npt.NDArray[np.int64]:
    """
    Clusters by average linkage. With a threshold the tree is cut at that distance. Without one it is cut where the mean
    silhouette (Rousseeuw 1987) is largest: the clusters then are far apart compared with their own width. If it stays below
    ``min_silhouette`` there is one cluster. Clusters smaller than ``min_size`` are no modes yet: joined to others they would
    spoil them. If all are small, all are one.

    :param condensed: Distances, shape ``(n * (n - 1) / 2,)``
    :param threshold: Distance between clusters, or None
    :param min_silhouette: Smallest mean silhouette of more than one cluster
    :param min_size: Smallest size of more than one cluster
    :return: Cluster of each trajectory, from 0, or -1, shape ``(n,)``
    """
    hierarchy: Any = importlib.import_module("scipy.cluster.hierarchy")
    square = squareform(condensed)
    one_cluster = np.zeros(len(square), dtype=np.int64)
    if len(square) == 1:
        return one_cluster
    tree = hierarchy.linkage(condensed, method="average")
    if threshold is not None:
        labels = np.asarray(hierarchy.fcluster(tree, threshold, criterion="distance"), dtype=np.int64) - 1
        return _leave_small_out(labels, min_size)
    best, best_silhouette = one_cluster, min_silhouette
    # Two trajectories are the smallest cluster with a width
    for n_clusters in range(2, len(square) // 2 + 1):
        labels = np.asarray(hierarchy.fcluster(tree, n_clusters, criterion="maxclust"), dtype=np.int64) - 1
        if labels.max() == 0:
            continue  # identical ones cannot be told apart
        value = silhouette(square, labels)
        if value > best_silhouette:
            best, best_silhouette = labels, value
    return _leave_small_out(best, min_size)


def _leave_small_out(labels: npt.NDArray[np.int64], min_size: int) -> npt.NDArray[np.int64]:
    """Number the large clusters from 0; the members of the others get -1."""
    sizes = np.bincount(labels)
    if sizes.max() < min_size:
        return np.zeros_like(labels)
    numbers = np.where(sizes >= min_size, np.cumsum(sizes >= min_size) - 1, -1)
    large: npt.NDArray[np.int64] = numbers[labels]
    return large


def squareform(condensed: FloatArray) -> FloatArray:
    """
    :param condensed: Distances, shape ``(n * (n - 1) / 2,)``
    :return: The same as a symmetric matrix, shape ``(n, n)``
    """
    distance: Any = importlib.import_module("scipy.spatial.distance")
    # SciPy makes an empty matrix of the distances of one point
    return np.asarray(distance.squareform(condensed)) if len(condensed) else np.zeros((1, 1))


def silhouette(distances: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """
    Mean silhouette (Rousseeuw 1987): (b - a) / max(a, b), with the mean distance a to the own cluster and b to the nearest
    other one; zero in a cluster of one.

    :param distances: Distances, shape ``(n, n)``
    :param labels: Cluster of each, from 0; at least two clusters
    :return: From -1 to 1
    """
    member = np.eye(int(labels.max()) + 1)[labels]
    sums, sizes = distances @ member, member.sum(axis=0)
    rows = np.arange(len(labels))
    own_size = sizes[labels]
    own = sums[rows, labels] / np.maximum(own_size - 1, 1)
    others = sums / sizes
    others[rows, labels] = np.inf
    nearest = others.min(axis=1)
    scale = np.maximum(np.maximum(own, nearest), 1e-12)
    return float(np.where(own_size > 1, (nearest - own) / scale, 0.0).mean())


def medoid(distances: FloatArray) -> int:
    """
    The trajectory that is nearest to all others.

    :param distances: Distances of a cluster, shape ``(n, n)``
    :return: Its index
    """
    return int(distances.sum(axis=1).argmin())


def modes_passing(positions: th.Tensor, trajectories: Sequence[th.Tensor]) -> th.Tensor:
    """
    Which modes pass by a position: those whose trajectory comes as near to it as any other one does, up to half a step.

    :param positions: Positions, shape ``(batch, position_dim)``
    :param trajectories: Trajectory of each mode, at least two points, shape ``(n, position_dim)``
    :return: Whether a mode passes by, bool, shape ``(batch, n_modes)``
    """
    distances, steps = [], []
    for path in trajectories:
        start, way = path[:-1], path.diff(dim=0)
        squared_length = way.square().sum(dim=1)
        # The nearest point of each piece of the way
        share = ((positions.unsqueeze(1) - start) * way).sum(dim=2) / squared_length.clamp_min(1e-12)
        nearest = start + share.clamp(0.0, 1.0).unsqueeze(2) * way
        distances.append(th.linalg.vector_norm(positions.unsqueeze(1) - nearest, dim=2).amin(dim=1))
        steps.append(squared_length.sqrt().mean())
    distance = th.stack(distances, dim=1)
    return distance <= distance.amin(dim=1, keepdim=True) + th.stack(steps) / 2


def inherit(new: Sequence[set[int]], old: Sequence[set[int]]) -> list[Inheritance]:
    """
    Match new clusters with old ones by the trajectories that they share. Of several that share most with the same old one, the
    one with the most goes on as it and the others are copies.

    :param new: Ids of the trajectories of each new cluster
    :param old: Ids of the trajectories of each old cluster
    :return: Where each new cluster comes from
    """
    overlaps = [[len(ids & before) for before in old] for ids in new]
    parents = [row.index(max(row)) if any(row) else None for row in overlaps]
    result = []
    for i, parent in enumerate(parents):
        rivals = [j for j, other in enumerate(parents) if parent is not None and other == parent]
        heir = max(rivals, key=lambda j: (overlaps[j][parents[j] or 0], -j), default=None)
        result.append(Inheritance(parent, i == heir))
    return result
