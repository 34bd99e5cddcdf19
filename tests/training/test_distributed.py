"""The calls that differ for several processes, and that two train as one with the whole batch."""
import functools
import signal

import torch

import clip
import train
from common.data.batches import open_world
from common.training import checkpoint, distributed
from tests.helpers import assert_close, listed, names
from tests.training.runs import (STEPS, TOY, Command, assert_same, assert_same_run, at_step,
                                 in_threads, log, own, pair, result, weights)

FLAGS = [*TOY, "--precision", "fp32", "--save_every", "4", "--steps", "7"]


class TestGather:
    def test_it_joins_the_rows_of_all_and_says_where_ones_own_begin(self):
        x = torch.randn(3, 2, 5)
        found = in_threads(3, lambda rank: distributed.gather(x[rank]))
        for rank, (rows, first) in enumerate(found):
            assert_close("rows of all processes (B * world, D)", rows, x.flatten(0, 1))
            assert first == 2 * rank, f"process {rank} of 2 rows each: its first row is {first}"

    def test_the_gradient_of_a_row_is_of_the_losses_of_all_processes(self):
        x, weights = torch.randn(3, 2, 5), torch.randn(3, 6, 5)
        before = weights.clone()

        def gradient(rank):
            row = x[rank].clone().requires_grad_()
            return torch.autograd.grad(distributed.gather(row)[0], row, weights[rank])[0]
        found = torch.cat(in_threads(3, gradient))
        assert_close("gradient of the rows (B * world, D)", found, before.sum(dim=0))
        assert_close("the gradients that came in", weights, before)


def test_numbers_are_averaged_and_lists_joined_over_the_processes():
    values = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": True}, {"a": 6.0, "b": 1}]
    assert in_threads(3, lambda rank: distributed.mean(values[rank], "cpu")) \
        == [{"a": 3.0, "b": 2.0}] * 3
    assert in_threads(3, lambda rank: distributed.all_gather_objects(["a", rank] * rank)) \
        == [["a", 1, "a", 2, "a", 2]] * 3


# Two processes

def two_stages(script):
    """A trap: `all` is two stages with a script between them."""
    train.STAGES["again"], clip.TRAINS["again"] = train.STAGES["clip"], ("*",)
    train.LISTS["all"] = ["clip", str(script), "again"]


class TestRuns:
    def test_two_end_with_the_weights_of_one_and_the_first_alone_speaks(self, tmp_path):
        Command([*FLAGS, "--out", str(tmp_path / "one")], tmp_path / "one.txt").end()
        argv = ["all", *FLAGS[1:], "--accumulate", "3", "--runs", str(tmp_path)]
        (tmp_path / "script.py").write_text("print('script: ran')")
        trap = functools.partial(two_stages, tmp_path / "script.py")
        both = pair(argv, tmp_path / "two", (trap, trap))
        first, second = (process.end() for process in both)
        kinds = [line.split(":")[0] for line in first.splitlines()]
        assert [kind for kind in kinds if kind in ("result", "script")] \
            == ["result", "script", "result"]
        assert second == ""
        for folder in (tmp_path / "clip-toy", tmp_path / "again-toy"):
            assert_same("weights", weights(folder), weights(tmp_path / "one"), 1e-5)
            (line,), (expected,) = log(folder), log(tmp_path / "one")
            assert_close("loss of step 7", line["loss"], expected["loss"], 2e-5)
            assert {p.name for p in folder.iterdir()} \
                == {p.name for p in (tmp_path / "one").iterdir()}

    def test_a_signal_to_one_stops_both_and_one_goes_on_alone(self, tmp_path):
        moment = functools.partial(at_step, 5, signal.SIGTERM)
        argv = [*FLAGS, "--out", str(tmp_path / "stopped")]
        both = pair(argv, tmp_path / "stopped", (int, moment))
        first, second = (process.end(128 + signal.SIGTERM) for process in both)
        assert first.splitlines()[-1].startswith("stopped by SIGTERM at step 6, saved")
        assert second == "" and not (tmp_path / "stopped/result.json").exists()
        assert "resumed from step 6" in Command([*argv, "--resume"], tmp_path / "alone.txt").end()

    def test_two_killed_processes_go_on_to_the_same_end(self, tmp_path):
        argv = [*TOY, "--steps", str(STEPS), "--out"]
        kill = functools.partial(at_step, 21, signal.SIGKILL)
        for process in pair([*argv, str(tmp_path / "whole")], tmp_path / "whole"):
            process.end()
        for process in pair([*argv, str(tmp_path / "killed")], tmp_path / "killed", (kill, kill)):
            process.end(-signal.SIGKILL)
        resumed = pair([*argv, str(tmp_path / "killed"), "--resume"], tmp_path / "killed")
        assert ["resumed from step 18" in process.end() for process in resumed] == [True, False]
        assert_same_run(tmp_path / "killed", tmp_path / "whole")

    def test_they_refuse_what_one_does(self, tmp_path):
        spec = listed(tmp_path / "data", 40)
        for name in names(open_world(spec, 8), "train")[3:6]:
            (tmp_path / "data" / name).unlink()
        argv = own(spec, "--skip", "0.5", "--precision", "fp32", "--out")
        alone = Command([*argv, str(tmp_path / "one")], tmp_path / "one.txt").end()
        both = pair([*argv, str(tmp_path / "two")], tmp_path / "two")
        first, second = (process.end() for process in both)
        assert second == "" and result(first)["refused"] == result(alone)["refused"] > 3
        assert first.count("refused: /") == 3
        assert_same("weights", weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
        one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "two"))
        assert one["data"] == two["data"]

