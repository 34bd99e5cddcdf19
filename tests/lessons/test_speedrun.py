"""lessons/speedrun.py: what it trains, what it measures, what its clock counts, its plot."""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.data.shapes import texts
from common.data.shapes.world import Shapes
from lessons import speedrun


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    """A small world, the tests' own folder, and a clock one second later each time it is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Shapes, "splits", Shapes.splits | {"single": 42, "composition": 6})
    monkeypatch.setattr(Shapes, "corpus", lambda self: itertools.islice(texts.corpus(), 150))
    monkeypatch.setattr(speedrun, "EVERY", 2)
    monkeypatch.setattr(speedrun, "BEGAN", 0.0)

    def read():
        clock.now += 1
        return clock.now
    clock = SimpleNamespace(now=0.0, time=read)
    monkeypatch.setattr(speedrun, "time", clock)
    return clock


@pytest.fixture
def measured(monkeypatch, clock):
    """measured(figures or None, flags, cost=seconds of a measurement) -> (curves, model's modes).

    The figures are what it measures; of None it measures the model.
    """
    def command(figures, flags, cost=0):
        modes, rest = [], iter(figures or [])

        def zero_shot(model, data):
            modes.append(model.training)
            clock.now += cost
            return {"zero_shot_accuracy": next(rest)}
        if figures:
            monkeypatch.setattr(speedrun.retrieval, "zero_shot", zero_shot)
        monkeypatch.setattr(sys, "argv", ["speedrun.py", *flags.split()])
        speedrun.main()
        return json.loads(Path("runs/speedrun/curves.json").read_text()), modes
    return command


class TestMain:
    def test_a_run_is_measured_every_few_steps_and_at_the_end(self, measured, capsys):
        curves, _ = measured(None, "--steps 3 --batch_size 4")
        [rows] = curves.values()
        assert [row[0] for row in rows] == [2, 3] and all(0 <= row[2] <= 1 for row in rows)
        assert "was not reached" in capsys.readouterr().out

    @pytest.mark.parametrize("cost", [0, 1000])
    def test_the_first_at_the_goal_counts_without_measuring_time(self, measured, capsys, cost):
        curves, modes = measured([0.94, 0.2, 0.95, 0.99], "--steps 7 --batch_size 2", cost)
        assert capsys.readouterr().out.endswith("95% after 6 steps and 3.0 seconds\n")
        [rows] = curves.values()
        assert [row[1] for row in rows] == [1, 2, 3, 4] and modes == [False] * 4

    def test_it_trains_what_train_py_does(self, measured, monkeypatch):
        updates, update = [], speedrun.train.update

        def watched(run, forward, batches):
            updates.append((run.step, run.model.training, str(run.optimizer).split()[0],
                            run.recipe.lr, len(batches)))
            return update(run, forward, batches)
        monkeypatch.setattr(speedrun.train, "update", watched)
        measured([0.5, 0.6], "--steps 3 --batch_size 4 --optimizer adamw --lr 0.25 --accumulate 2")
        assert updates == [(step, True, "AdamW", 0.25, 2) for step in range(3)]

    def test_curves_of_other_flags_stay(self, measured):
        for seed, figure in (("1", 0.1), ("2", 0.2), ("1", 0.3)):
            curves, _ = measured([figure], f"--steps 1 --batch_size 2 --seed {seed}")
        assert {name: rows[0][2] for name, rows in curves.items()} == {
            "--seed 1 --steps 1 --batch_size 2": 0.3, "--seed 2 --steps 1 --batch_size 2": 0.2}
        assert Image.open("runs/speedrun/curves.png").size == (640, 400 + 2 * 16)


class TestPlot:
    def test_a_higher_curve_stands_higher_and_a_later_one_more_to_the_right(self):
        pages = [np.asarray(speedrun.plot({"": [(20, 4.0, low), (40, last, low)], " ": [
            (20, 8.0, 0.5), (40, 8.0, 0.5)]})) for low, last in ((0.3, 6.0), (0.9, 7.0))]
        places = [np.argwhere((page == speedrun.COLOURS[0]).all(axis=2)) for page in pages]
        assert places[0][:, 0].max() > 100 + places[1][:, 0].max()
        assert places[0][:, 1].max() < places[1][:, 1].max() - 30
