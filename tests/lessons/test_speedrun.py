"""lessons/speedrun.py: what it trains, what it measures, what its clock counts, its plot."""
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.shapes import texts
from common.data.shapes.world import Shapes

HERE = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("speedrun", HERE / "lessons" / "speedrun.py")
speedrun = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(speedrun)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A world with small splits, the tests' own folder, and a clock that ticks when it is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Shapes, "splits", Shapes.splits | {"single": 42, "composition": 6})
    monkeypatch.setattr(Shapes, "corpus", lambda self: itertools.islice(texts.corpus(), 150))
    monkeypatch.setattr(speedrun, "EVERY", 2)
    monkeypatch.setattr(speedrun, "BEGAN", 0.0)
    monkeypatch.setattr(speedrun, "time", Clock())


class Clock:
    """time.time() that is one second later with each call."""
    now = 0.0

    def time(self):
        self.now += 1
        return self.now


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *flags])
    speedrun.main()
    return json.loads(Path("runs/speedrun/curves.json").read_text())


def scored(monkeypatch, figures, cost=0):
    """Measurements that give these figures and take `cost` seconds; returns the models' modes."""
    figures, modes = iter(figures), []

    def zero_shot(model, data):
        modes.append(model.training)
        speedrun.time.now += cost
        return {"zero_shot_accuracy": next(figures)}
    monkeypatch.setattr(speedrun.retrieval, "zero_shot", zero_shot)
    return modes


class TestMain:
    def test_a_run_is_measured_every_few_steps_and_at_the_end(self, monkeypatch, capsys):
        curves = command(monkeypatch, "--steps", "3", "--batch_size", "4")
        [rows] = curves.values()
        assert list(curves) == ["--steps 3 --batch_size 4"]
        assert [row[0] for row in rows] == [2, 3] and all(0 <= row[2] <= 1 for row in rows)
        assert "was not reached" in capsys.readouterr().out

    def test_the_first_measurement_at_the_goal_counts(self, monkeypatch, capsys):
        scored(monkeypatch, [0.9, 0.94, 0.95, 0.2, 0.99])
        command(monkeypatch, "--steps", "10", "--batch_size", "2")
        assert capsys.readouterr().out.endswith("95% after 6 steps and 3.0 seconds\n")

    def test_the_clock_stands_while_it_measures(self, monkeypatch):
        seconds = []
        for cost in (0, 1000):
            speedrun.time.now = 0.0
            modes = scored(monkeypatch, [0.1, 0.2, 0.3], cost)
            [rows] = command(monkeypatch, "--steps", "5", "--batch_size",
                             "2").values()
            seconds.append([row[1] for row in rows])
            assert modes == [False] * 3
        assert seconds[0] == seconds[1] == [1, 2, 3]

    def test_it_trains_what_train_py_does(self, monkeypatch):
        updates, update = [], speedrun.train.update

        def watched(run, forward, batches):
            updates.append((run.step, run.model.training, str(run.optimizer).split()[0],
                            run.recipe.lr, len(batches)))
            return update(run, forward, batches)
        monkeypatch.setattr(speedrun.train, "update", watched)
        scored(monkeypatch, [0.5, 0.6])
        command(monkeypatch, "--steps", "3", "--batch_size", "4", "--optimizer", "adamw",
                "--lr", "0.25", "--accumulate", "2")
        assert updates == [(step, True, "AdamW", 0.25, 2) for step in range(3)]

    def test_curves_of_other_flags_stay(self, monkeypatch):
        scored(monkeypatch, [0.1, 0.2, 0.3])
        for seed in ("1", "2", "1"):
            curves = command(monkeypatch, "--steps", "1", "--batch_size", "2", "--seed", seed)
        figures = {name: rows[0][2] for name, rows in curves.items()}
        assert figures == {"--seed 1 --steps 1 --batch_size 2": 0.3,
                           "--seed 2 --steps 1 --batch_size 2": 0.2}
        assert Image.open("runs/speedrun/curves.png").size == (640, 400 + 2 * 16)


class TestPlot:
    def test_a_higher_curve_stands_higher_and_a_later_one_more_to_the_right(self):
        pages = [np.asarray(speedrun.plot({"": [(20, 4.0, low), (40, last, low)], " ": [
            (20, 8.0, 0.5), (40, 8.0, 0.5)]})) for low, last in ((0.3, 6.0), (0.9, 7.0))]
        places = [np.argwhere((page == speedrun.COLOURS[0]).all(axis=2)) for page in pages]
        assert places[0][:, 0].max() > 100 + places[1][:, 0].max()
        assert places[0][:, 1].max() < places[1][:, 1].max() - 30
