"""
Figures and tables of a sweep, from its CSVs alone.

A score is normalised so that a random policy has 0 and SAC, by the mean of its seeds after the whole training, 1. Aggregates
and their confidence intervals (percentiles of a bootstrap over the seeds, stratified by task) are those of rliable (Agarwal et
al., arXiv 2108.13264). Only finished runs count; an algorithm is aggregated over the tasks that all its seeds have finished.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cells import GOAL_EVALUATIONS, GOAL_FACTOR, RANDOM, Cell, CellError, Row, read_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rliable.library import get_interval_estimates
from scipy.stats import trim_mean

Array = np.ndarray[Any, Any]

BASELINE = "sac"
LABELS = {"qsm": "QSM", "qsm-paper": "QSM, paper's settings", "sac": "SAC", "td3": "TD3", "tqc": "TQC"}
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
BOOTSTRAPS = 2000
BEGIN, END = "<!-- sweep results: begin -->", "<!-- sweep results: end -->"
# Marks on lines of their own: a text may speak of them
BLOCK = re.compile(f"^{BEGIN}$.*?^{END}$", re.DOTALL | re.MULTILINE)


class Results:
    """
    What is known of the cells of a comparison.

    :param runs: Evaluations by cell
    :raises CellError: if the runs are of different lengths
    """

    def __init__(self, runs: dict[Cell, list[Row]]) -> None:
        self.runs = {cell: rows for cell, rows in runs.items() if cell.goal is None and cell.algo != RANDOM}
        lengths = sorted({cell.timesteps for cell in self.runs})
        if len(lengths) > 1:
            raise CellError(f"the runs to compare have different lengths ({lengths}): name --groups with one length")
        self.timesteps = lengths[0] if lengths else 0
        self.algos = list(dict.fromkeys(cell.name for cell in self.runs))
        self.envs = list(dict.fromkeys(cell.env for cell in self.runs))
        found = [{int(row["timesteps"]) for row in rows} for cell, rows in self.runs.items() if cell.finished(rows)]
        #: Steps at which all finished runs were evaluated
        self.steps = np.array(sorted(set.intersection(*found)) if found else [], dtype=int)
        #: Seeds of the algorithm and task that have the most
        self.n_seeds = max((len(self.finished(algo, env)) for algo in self.algos for env in self.envs), default=0)
        random: dict[str, list[float]] = {}
        for cell, rows in runs.items():
            if cell.algo == RANDOM and rows:
                random.setdefault(cell.env, []).append(returns(cell, rows)[-1])
        self.random = {env: float(np.mean(values)) for env, values in random.items()}
        sac = {env: self.finished(BASELINE, env) for env in self.envs}
        #: Return of a random policy and of SAC, by task
        self.scale = {
            env: (self.random[env], float(np.mean([values[-1] for values in sac[env].values()])))
            for env in self.envs
            if env in self.random and self.complete(BASELINE, env)
        }
        for env, (low, high) in list(self.scale.items()):
            if high <= low:
                # Nothing to measure by
                del self.scale[env]

    def cells(self, algo: str, env: str) -> dict[Cell, list[Row]]:
        """
        The seeds of a task.

        :param algo: Algorithm and setting
        :param env: Environment
        :return: Evaluations by cell
        """
        return {cell: rows for cell, rows in self.runs.items() if (cell.name, cell.env) == (algo, env)}

    def finished(self, algo: str, env: str) -> dict[int, Array]:
        """
        Returns of the finished seeds of a task.

        :param algo: Algorithm and setting
        :param env: Environment
        :return: Returns at the steps at which all runs were evaluated, by seed
        """
        return {
            cell.seed: returns(cell, rows)[np.isin(steps(rows), self.steps)]
            for cell, rows in self.cells(algo, env).items()
            if cell.finished(rows)
        }

    def complete(self, algo: str, env: str) -> bool:
        """
        Whether all seeds of a task are there and finished.

        :param algo: Algorithm and setting
        :param env: Environment
        :return: Whether they are
        """
        return 0 < len(self.cells(algo, env)) == len(self.finished(algo, env))

    def tasks(self, algo: str) -> list[str]:
        """
        Tasks over which an algorithm is aggregated.

        :param algo: Algorithm and setting
        :return: Environments
        """
        return [env for env in self.scale if self.complete(algo, env)]

    def scores(self, algo: str, envs: Sequence[str]) -> Array:
        """
        Normalised scores.

        :param algo: Algorithm and setting
        :param envs: Environments on which it is complete
        :return: Scores, of shape (seeds, tasks, evaluations); of the seeds that all the tasks have
        """
        finished = {env: self.finished(algo, env) for env in envs}
        seeds = sorted(set.intersection(*(set(values) for values in finished.values())))
        if not seeds:
            raise CellError(f"{algo} has no seed that is finished on all of {', '.join(envs)}")
        scores = []
        for env in envs:
            low, high = self.scale[env]
            scores.append([(finished[env][seed] - low) / (high - low) for seed in seeds])
        return np.array(scores).transpose(1, 0, 2)


def returns(cell: Cell, rows: list[Row]) -> Array:
    """
    Mean returns of the evaluations that count.

    :param cell: The run
    :param rows: Its evaluations
    :return: Returns
    """
    return np.array([float(row[f"{cell.acting}_mean"]) for row in rows])


def steps(rows: list[Row]) -> Array:
    """
    Environment steps of evaluations.

    :param rows: Evaluations
    :return: Steps
    """
    return np.array([int(row["timesteps"]) for row in rows])


def iqm(scores: Array) -> Array:
    """
    Interquartile mean over seeds and tasks: rliable's ``aggregate_iqm``, for all evaluations at once.

    :param scores: Scores, of shape (seeds, tasks, evaluations)
    :return: Means, of shape (evaluations,)
    """
    return np.asarray(trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25, axis=0))


def probability_of_improvement(first: Array, second: Array) -> Array:
    """
    Probability that a run of one algorithm beats a run of another on the same task, averaged over tasks: rliable's function of
    that name, which is slow to bootstrap since it computes p-values too.

    :param first: Scores, of shape (seeds, tasks)
    :param second: Scores, of shape (seeds, tasks)
    :return: Probability, of shape (1,)
    """
    return np.mean((np.sign(first[:, None] - second[None]) + 1) / 2, keepdims=True).reshape(1)


def interval(function: Callable[..., Array], *scores: Array) -> tuple[Array, Array | None]:
    """
    Statistic with its 95 % confidence interval.

    :param function: Statistic
    :param scores: Its arguments, the first axis of each being the seeds
    :return: Statistic, and its lower and upper bounds, or None where there is but one seed
    """
    if min(len(values) for values in scores) == 1:
        return function(*scores), None
    # rliable draws from the global generator; the same CSVs shall give the same figures
    state = np.random.get_state()
    np.random.seed(0)
    points, bounds = get_interval_estimates({"": scores[0] if len(scores) == 1 else list(scores)}, function, reps=BOOTSTRAPS)
    np.random.set_state(state)
    return points[""], bounds[""]


# --- Figures


def _style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "label": LABELS.get(name, name)}
        for i, name in enumerate(names)
    }


def _grid(n: int) -> tuple[Figure, list[Axes]]:
    columns = min(n, 3)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.8 * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[n:]:
        unused.set_visible(False)
    return figure, axes[:n]


def _decorate(axis: Axes, xlabel: str, ylabel: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)


def _steps_axis(axis: Axes, timesteps: int, ylabel: str) -> None:
    _decorate(axis, "environment steps", ylabel)
    axis.set_xlim(0, timesteps)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def draw_curves(results: Results, path: Path) -> Path:
    """
    Draw the learning curves of the tasks that were begun: mean and 95 % confidence band over the finished seeds, the others
    as thin lines.

    :param results: Results
    :param path: Picture
    :return: The picture
    """
    begun = {cell.env for cell, rows in results.runs.items() if rows}
    envs = [env for env in results.envs if env in begun]
    figure, axes = _grid(len(envs))
    for env, axis in zip(envs, axes, strict=True):
        for algo, style in _style(results.algos).items():
            for cell, rows in results.cells(algo, env).items():
                if rows and not cell.finished(rows):
                    thin = {"color": style["color"], "linewidth": 0.8, "marker": "o", "markersize": 3, "markevery": [-1]}
                    axis.plot(steps(rows), returns(cell, rows), **thin)
            finished = results.finished(algo, env)
            if finished:
                mean, band = interval(lambda x: x.mean(axis=(0, 1)), np.array(list(finished.values()))[:, None])
                axis.plot(results.steps, mean, **style)
                if band is not None:
                    axis.fill_between(results.steps, *band, color=style["color"], alpha=0.2, linewidth=0)
        if env in results.random:
            axis.axhline(results.random[env], color="0.6", linewidth=0.8, label="random policy")
        axis.set_title(env, fontsize="medium")
        _steps_axis(axis, results.timesteps, "return")
    _legend(figure, axes)
    return _save(figure, path)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6), frameon=False)


def draw_aggregate(results: Results, path: Path) -> Path:
    """
    Draw the interquartile mean of the normalised score over the steps, and the probabilities of improvement over SAC.

    :param results: Results
    :param path: Picture
    :return: The picture
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = []
    for algo, style in _style(results.algos).items():
        tasks = results.tasks(algo)
        if not tasks:
            continue
        scores = results.scores(algo, tasks)
        mean, band = interval(iqm, scores)
        left.plot(results.steps, mean, **{**style, "label": style["label"] + _of_tasks(results, tasks)})
        if band is not None:
            left.fill_between(results.steps, *band, color=style["color"], alpha=0.2, linewidth=0)
        if algo != BASELINE:
            point, bounds = improvement(results, algo)
            if bounds is not None:
                right.barh(len(labels), np.ptp(bounds), 0.25, left=bounds.min(), color=style["color"], alpha=0.4)
            right.plot(point, [len(labels)], "o", color=style["color"], clip_on=False)
            labels.append(style["label"] + _of_tasks(results, tasks))
    for value in (0, 1):
        left.axhline(value, color="0.6", linewidth=0.8)
    _steps_axis(left, results.timesteps, "IQM of score (random 0, SAC 1)")
    left.legend(frameon=False, fontsize="small")
    _decorate(right, "P(a run beats one of SAC)", "")
    right.axvline(0.5, color="0.6", linewidth=0.8)
    right.set_xlim(0, 1)
    right.set_ylim(len(labels) - 0.5, -0.5)
    right.set_yticks(range(len(labels)), labels)
    return _save(figure, path)


def published_runs(runs: dict[Cell, list[Row]]) -> dict[Cell, list[Row]]:
    """
    The runs against published returns: the cell's own, or, while that has not clearly passed it, the run of the comparison
    that is the same but for its length, up to where it has. While nothing passed, the cell's own if it was begun.

    :param runs: Evaluations by cell
    :return: Evaluations by cell, of the cells with a goal
    """
    shown = {}
    for cell in (cell for cell in runs if cell.goal is not None):
        identity = {**cell.identity(), "total_timesteps": ""}
        others = [
            rows
            for other, rows in runs.items()
            if other.goal is None and {**other.identity(), "total_timesteps": ""} == identity
        ]
        passed = [rows[:n] for rows in others for n in range(len(rows) + 1) if cell.passed(rows[:n])]
        if passed and not cell.passed(runs[cell]):
            shown[cell] = passed[0]
        else:
            shown[cell] = runs[cell] or max(others, key=len, default=[])
    return shown


def draw_published(runs: dict[Cell, list[Row]], path: Path) -> Path:
    """
    Draw the runs against the returns that others published.

    :param runs: What :func:`published_runs` returns
    :param path: Picture
    :return: The picture
    """
    envs = list(dict.fromkeys(cell.env for cell, rows in runs.items() if rows))
    names = _style(list(dict.fromkeys(cell.name for cell in runs)))
    figure, axes = _grid(len(envs))
    for env, axis in zip(envs, axes, strict=True):
        for cell, rows in runs.items():
            if cell.env == env and rows:
                axis.plot(steps(rows), returns(cell, rows), **names[cell.name], marker="o", markevery=[-1])
                axis.axhline(cell.goal, color="0.4", linewidth=1, linestyle="--", label="published")
        axis.set_title(env, fontsize="medium")
        _decorate(axis, "environment steps", "return")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g}k" if x else "0")
    _legend(figure, axes)
    return _save(figure, path)


# --- Tables


def improvement(results: Results, algo: str) -> tuple[Array, Array | None]:
    """
    Probability of improvement over SAC after the whole training.

    :param results: Results
    :param algo: Algorithm and setting
    :return: Probability and its confidence interval
    """
    tasks = results.tasks(algo)
    final = (results.scores(name, tasks)[..., -1] for name in (algo, BASELINE))
    return interval(probability_of_improvement, *final)


def _of_tasks(results: Results, tasks: list[str]) -> str:
    return "" if len(tasks) == len(results.envs) else f" ({len(tasks)} of {len(results.envs)} tasks)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _with_bounds(point: Array, bounds: Array | None) -> str:
    text = f"{point.item():.2f}"
    return text if bounds is None else f"{text} [{bounds[0].item():.2f}, {bounds[1].item():.2f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _final_returns(cells: dict[Cell, list[Row]]) -> str:
    """Mean and standard deviation over the finished seeds, and how far the others are."""
    finished = [returns(cell, rows)[-1] for cell, rows in cells.items() if cell.finished(rows)]
    parts = []
    if finished:
        spread = f" ± {_number(float(np.std(finished, ddof=1)))}" if len(finished) > 1 else ""
        count = f" ({len(finished)} of {len(cells)} seeds)" if len(finished) < len(cells) else ""
        parts.append(_number(float(np.mean(finished))) + spread + count)
    parts += [
        f"seed {cell.seed} at {steps(rows)[-1]:,} steps: {_number(returns(cell, rows)[-1])}"
        for cell, rows in cells.items()
        if rows and not cell.finished(rows)
    ]
    missing = [str(cell.seed) for cell, rows in cells.items() if not rows]
    if missing and parts:
        parts.append(f"seed {', '.join(missing)} not begun")
    return "; ".join(parts) or "not begun" if cells else ""


def comparison_tables(results: Results) -> str:
    """
    Tables of the comparison.

    :param results: Results
    :return: Markdown
    """
    seeds = {algo: {cell.seed for cell in results.runs if cell.name == algo} for algo in results.algos}
    header = [f"{LABELS.get(algo, algo)}, {len(seeds[algo])} seed{'s' * (len(seeds[algo]) > 1)}" for algo in results.algos]
    rows = []
    for env in results.envs:
        low = results.random.get(env)
        finals = [_final_returns(results.cells(algo, env)) for algo in results.algos]
        rows.append([env, *finals, "" if low is None else _number(low)])
    several = results.n_seeds > 1
    text = f"Return after {results.timesteps:,} steps{', mean ± standard deviation over seeds' if several else ''}:\n\n"
    text += _table(["task", *header, "random policy"], rows)
    scored = [algo for algo in results.algos if results.tasks(algo)]
    if not scored:
        return text + (
            "\n\nNo task has a normalised score yet: that needs the random policy and all seeds of SAC, which must be better "
            "than it.\n"
        )
    rows = []
    for algo in scored:
        tasks = results.tasks(algo)
        scores = results.scores(algo, tasks)[..., -1]
        means = dict(zip(tasks, scores.mean(axis=0), strict=True))
        worst = min(means, key=lambda env: means[env])
        rows.append(
            [
                LABELS.get(algo, algo),
                _with_bounds(*interval(iqm, scores[..., None])),
                "" if algo == BASELINE else f"{means[worst]:.2f} ({worst})",
                "" if algo == BASELINE else _with_bounds(*improvement(results, algo)),
                f"{len(tasks)} of {len(results.envs)}",
                str(len(scores)),
            ]
        )
    columns = ["IQM of score", "lowest task", "probability of improvement over SAC", "tasks", "seeds"]
    text += "\n\nScore, normalised so that a random policy has 0 and SAC's mean has 1"
    text += (
        ", with 95 % confidence intervals:\n\n"
        if several
        else ". One seed gives no confidence intervals, and of fewer than four runs the interquartile mean is the mean:\n\n"
    )
    return text + _table(["", *columns], rows) + "\n"


def published_table(runs: dict[Cell, list[Row]]) -> str:
    """
    Table of the runs against the returns that others published.

    :param runs: What :func:`published_runs` returns
    :return: Markdown
    """
    rows = []
    for cell, evaluations in runs.items():
        # What is not the algorithm's default belongs beside the number; compiled updates are the same updates
        settings = [f"`{name}={value!r}`" for name, value in cell.kwargs.items() if name != "compile"]
        line = [", ".join([cell.env, *settings]), f"{cell.goal:,g}"]
        if evaluations:
            values = returns(cell, evaluations)
            best = int(values.argmax())
            above = np.flatnonzero(values > cell.goal)
            length = evaluations[-1]["total_timesteps"]
            state = "not clearly passed" if evaluations[-1]["timesteps"] == length else "unfinished"
            state = "clearly passed" if cell.passed(evaluations) else state
            if length != str(cell.timesteps):
                state += f" (the run of {int(length):,} steps)"
            line += [
                f"{_number(values[best])} at {steps(evaluations)[best]:,}",
                f"{steps(evaluations)[above[0]]:,}" if len(above) else "not yet",
                f"{_number(values[-1])} at {steps(evaluations)[-1]:,}, {state}",
            ]
        else:
            line += ["", "", "not begun"]
        rows.append(line)
    text = (
        f"Returns that others published for QSM, and ours. A run stops when {GOAL_EVALUATIONS} evaluations in a row are above "
        f"{GOAL_FACTOR:g} times the published return.\n\n"
    )
    header = ["task", "published", "best evaluation, steps", "first above, steps", "last evaluation, steps"]
    return text + _table(header, rows) + "\n"


def provenance(runs: dict[Cell, list[Row]]) -> str:
    """
    What made the numbers.

    :param runs: Evaluations by cell
    :return: Markdown
    """
    finished = sum(cell.finished(rows) for cell, rows in runs.items())
    rows = [row for evaluations in runs.values() for row in evaluations]
    text = f"{finished} of the {len(runs)} runs covered here are finished."
    if not rows:
        return text + "\n"

    def values(column: str) -> str:
        return ", ".join(sorted({row[column] for row in rows} - {""}))

    continued = sum(any(row["resumed_from"] != "0" for row in evaluations) for evaluations in runs.values())
    packages = ("stable_baselines3", "sb3_contrib", "torch", "gymnasium", "mujoco", "dm_control")
    versions = ", ".join(f"{name} {values(name)}" for name in packages if values(name))
    return (
        f"{text} {continued} went on from a checkpoint after a stop. Commit of sb3-qsm: {values('commit')}; {versions}; "
        f"Python {values('python')}; one thread of {values('cpu')}.\n"
    )


def write_report(cells: Sequence[Cell], raw: Path, out: Path, include: Sequence[Path]) -> None:
    """
    Draw the figures and write the tables.

    :param cells: Cells
    :param raw: Folder of the CSVs
    :param out: Folder of the report
    :param include: Markdown files in which the block between the two marks is renewed
    :raises CellError: if a file has no such marks, or the runs cannot be compared
    """
    texts = {path: path.read_text(encoding="utf-8") for path in include}
    for path, text in texts.items():
        if not BLOCK.search(text):
            raise CellError(f"{path} lacks the marks {BEGIN} and {END}")
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    runs = {cell: read_rows(cell.path(raw), cell) for cell in cells}
    results = Results(runs)
    published = published_runs(runs)
    out.mkdir(parents=True, exist_ok=True)

    parts: list[str | tuple[str, Path]] = []
    if results.runs:
        if any(results.runs.values()):
            picture = draw_curves(results, out / "curves.png")
            band = ": mean and its 95 % confidence interval over finished seeds" if results.n_seeds > 1 else ", one seed"
            parts.append((f"Learning curves{band}", picture))
        parts.append(comparison_tables(results))
        if any(results.tasks(algo) for algo in results.algos):
            picture = draw_aggregate(results, out / "aggregate.png")
            parts.append(("Interquartile mean of the normalised score, and probability of improvement over SAC", picture))
    if published:
        parts.append(published_table(published))
        if any(published.values()):
            parts.append(("Runs against published returns", draw_published(published, out / "published.png")))
    parts.append(provenance(runs))

    def body(folder: Path) -> str:
        """The report with its pictures as seen from a folder."""
        return "\n".join(
            part if isinstance(part, str) else f"![{part[0]}]({Path(os.path.relpath(part[1], folder)).as_posix()})\n"
            for part in parts
        )

    (out / "README.md").write_text(f"# Results of the sweep\n\n{body(out)}", encoding="utf-8")
    for path, text in texts.items():
        block = f"{BEGIN}\n{body(path.parent)}{END}"
        path.write_text(BLOCK.sub(lambda _, block=block: block, text), encoding="utf-8")
    print(f"wrote {out / 'README.md'}" + "".join(f" and {path}" for path in include))
