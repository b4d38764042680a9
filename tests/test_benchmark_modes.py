"""The benchmark of modes goes on after a kill and writes what it counted."""

import csv
import json

import numpy as np
import pytest

pytest.importorskip("dtaidistance")
pytest.importorskip("filelock")
modes = pytest.importorskip("modes")


@pytest.mark.parametrize("algo", ["ddiffpg", "td3"])
def test_a_run_goes_on_and_is_done_once(tmp_path, monkeypatch, capsys, algo):
    monkeypatch.setattr(modes, "EPISODES", 3)
    monkeypatch.setattr(modes, "MODE_EPISODES", 2)
    evaluate = modes.evaluate

    def killed(model, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(modes, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        modes.run("point", algo, 0, tmp_path, 40)
    assert list(tmp_path.glob("*.csv")) == []
    monkeypatch.setattr(modes, "evaluate", evaluate)
    modes.run("point", algo, 0, tmp_path, 50)
    assert f"point_{algo}_0.csv: from step 40 to 50" in capsys.readouterr().out
    path = tmp_path / f"point_{algo}_0.csv"
    rows = list(csv.DictReader(path.open()))
    assert [row["evaluation"] for row in rows[:2]] == ["any", "any, deterministic"]
    assert {row["timesteps"] for row in rows} == {"50"}
    for row in rows:
        assert sum(json.loads(row["counts"]).values()) == round(float(row["success_rate"]) * int(row["episodes"]))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        f"point_{algo}_0.csv",
        f"point_{algo}_0.zip",
        f"point_{algo}_0_curve.csv",
        f"point_{algo}_0_paths.csv",
    ]
    # Rows every 50 // 40 steps; those before the kill are still there, and each step is in one row
    curve = list(csv.DictReader((tmp_path / f"point_{algo}_0_curve.csv").open()))
    assert [int(row["timesteps"]) for row in curve] == list(range(1, 51))
    # An episode has 15 steps at most; the one that the kill broke off is lost
    assert 2 <= sum(int(row["episodes"]) for row in curve) < 50
    modes.run("point", algo, 0, tmp_path, 50)
    assert capsys.readouterr().out == ""
    assert f"| point | {algo} | 0 | 50 | any | 3 |" in modes.report(tmp_path)
    counts = modes.read_paths(tmp_path / f"point_{algo}_0_paths.csv")
    assert len(counts.episodes) == 3
    assert {str(mode): count for mode, count in counts.counts.items()} == json.loads(rows[0]["counts"])
    np.testing.assert_array_equal([episode.observations[0] for episode in counts.episodes], np.zeros((3, 2)))
    monkeypatch.setattr("sys.argv", ["modes.py", "report", "--out", str(tmp_path)])
    modes.main()
    assert (tmp_path / "point.png").stat().st_size > 10_000
    assert (tmp_path / "point_curves.png").stat().st_size > 5_000
    text = (tmp_path / "README.md").read_text()
    assert "![Paths of sampled episodes](point.png)" in text
    assert "![Ways of the episodes collected](point_curves.png)" in text


def test_a_shorter_run_is_not_taken_for_a_finished_one(tmp_path):
    path = tmp_path / "point_td3_0.csv"
    path.write_text("task,algo,seed,timesteps\npoint,td3,0,30\n")
    with pytest.raises(SystemExit, match="is of a run of 30 steps, not 20000: delete it, or choose another --out"):
        modes.run("point", "td3", 0, tmp_path, None)
    assert "30" in path.read_text()


def test_tasks_can_be_made():
    for task in modes.TASKS.values():
        assert (task.routes is False) or task.n_modes == 2
        for algo in modes.ALGORITHMS:
            if "Maze" not in task.env:
                assert modes.make_model(task, algo, 0).policy is not None


def test_blocked_routes_are_counted():
    pytest.importorskip("gymnasium_robotics")
    task = modes.TASKS["two-routes"]
    model = modes.make_model(task, "sac", 0)
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "EPISODES", 1)
        patch.setattr(modes, "MODE_EPISODES", 1)
        names = [name for name, _ in modes.evaluate(model, task)]
    assert names == ["any", "any, deterministic", "any, route 0 blocked", "any, route 1 blocked"]
