"""Two processes on one machine do what one process with the whole batch does."""
import dataclasses
import functools
import os
import signal

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import clip
import train
from common.data.batches import open_world
from common.training import checkpoint, distributed
from tests.helpers import listed, names
from tests.training.runs import (STEPS, TOY, Bigram, Command, assert_same_run, assert_same_weights, at_step,
                        environments, fork, log, own, pair, ragged_rows, result, step_gradients)

FLAGS = [*TOY, "--precision", "fp32", "--save_every", "4"]


# One process and two compute the same gradients

SIZES = dict(image_size=8, patch_size=4, vision_width=6, vision_layers=1, vision_heads=2,
             text_width=10, text_layers=1, text_heads=2, embed_dim=7, vocab_size=31,
             context_length=5)
BATCH = 12


def model_and_batch(loss):
    torch.manual_seed(0)
    if loss == "lm":
        return Bigram().double(), ragged_rows(BATCH)
    model = clip.CLIP(clip.CLIPConfig(loss=loss, **SIZES)).double()
    with torch.no_grad():                # off their symmetric starting points
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    ids = torch.randint(3, 31, (BATCH, 5))
    ids[:, -1] = 2
    return model, {"images": torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8), "ids": ids}


def gradients(loss, parts, rank=0, ranks=1):
    """{name: gradient} of this process's share, in so many micro-batches; the loss as "loss"."""
    model, batch = model_and_batch(loss)
    mine = BATCH // ranks // parts
    micro = [{name: v[rank * BATCH // ranks + k * mine:][:mine] for name, v in batch.items()}
             for k in range(parts)]
    found = step_gradients(model, micro, DistributedDataParallel(model) if ranks > 1 else model)
    mean = distributed.mean({"loss": found["loss"].item()}, "cpu")["loss"]
    return found | {"loss": torch.tensor(mean)}


def both_ranks(environment, path):
    """In one of two processes: the gradients of every case, and the small functions."""
    os.environ |= environment
    torch.set_num_threads(1)
    distributed.start("cpu")
    rank = distributed.rank()
    found = {(loss, parts): gradients(loss, parts, rank, 2)
             for loss in ("softmax", "sigmoid", "lm") for parts in (1, 2, 3)}
    rows, first = distributed.gather(torch.full((2, 3), float(rank)))
    found["gather"] = rows, torch.tensor(first)
    found["any"] = torch.tensor([distributed.mean({"stopped": rank == one}, "cpu")["stopped"] > 0
                                 for one in (0, 1, 7)])
    found["mean"] = torch.tensor(distributed.mean({"a": rank + 1.0, "b": 4.0}, "cpu")["a"])
    found["objects"] = distributed.all_gather_objects(["a"] * rank + [str(rank)])
    found["size"] = torch.tensor(distributed.world_size())
    distributed.barrier()
    torch.save(found, path)
    distributed.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What `both_ranks` found in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    for process in [fork(both_ranks, e, folder / e["RANK"]) for e in environments()]:
        process.join(60)
        process.kill()
        assert process.exitcode == 0
    return [torch.load(folder / rank) for rank in ("0", "1")]


class TestGradients:
    @pytest.mark.parametrize("parts", [1, 2, 3])
    @pytest.mark.parametrize("loss", ["softmax", "sigmoid", "lm"])
    def test_of_two_processes_are_those_of_one_with_the_whole_batch(self, two, loss, parts):
        want = gradients(loss, 1)
        assert ("logit_bias" in want) == (loss == "sigmoid")
        assert all(g.abs().max() > 1e-9 for name, g in want.items() if "k_proj.bias" not in name)
        for found in two:
            assert found[loss, parts].keys() == want.keys()
            for name, gradient in want.items():
                torch.testing.assert_close(found[loss, parts][name], gradient,
                                           atol=1e-9, rtol=1e-7, msg=name)

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid", "lm"])
    def test_of_micro_batches_are_those_of_the_whole_batch(self, loss):
        want, found = gradients(loss, 1), gradients(loss, 4)
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-7, msg=name)


class TestFunctions:
    def test_gather_puts_the_rows_in_the_order_of_the_processes(self, two):
        for rank, found in enumerate(two):
            rows, first = found["gather"]
            assert rows[:, 0].tolist() == [0, 0, 1, 1] and first == 2 * rank

    def test_a_flag_of_one_is_a_flag_of_all(self, two):
        assert all(found["any"].tolist() == [True, True, False] for found in two)

    def test_numbers_are_averaged(self, two):
        assert all(found["mean"] == 1.5 and found["size"] == 2 for found in two)

    def test_lists_are_joined_in_the_order_of_the_processes(self, two):
        assert all(found["objects"] == ["0", "a", "1"] for found in two)

    def test_alone_they_are_harmless(self):
        assert distributed.all_gather_objects(["a", "b"]) == ["a", "b"]
        x = torch.randn(3, 5)
        rows, first = distributed.gather(x)
        assert torch.equal(rows, x) and first == 0
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert distributed.mean({"a": 2.0}, "cpu") == {"a": 2.0}
        distributed.barrier()
        distributed.stop()
        assert distributed.start("cpu") == torch.device("cpu") and distributed.world_size() == 1


# Whole runs

def two_stages():
    """A trap: `all` is two stages, the second in micro-batches."""
    build = train.build

    def in_parts(name, options, *more):
        options = dataclasses.replace(options, accumulate=3 if name == "parts" else 1)
        return build(name, options, *more)
    train.build = in_parts
    train.STAGES["parts"], clip.TRAINS["parts"] = train.STAGES["clip"], ("*",)
    train.LISTS["all"] = ["clip", "parts"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one process, and `all` of two: two stages, one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    Command([*FLAGS, "--steps", "7", "--out", str(folder / "one")], folder / "one.txt").end()
    argv = ["all", *FLAGS[1:], "--steps", "7", "--runs", str(folder)]
    both = pair(argv, folder / "two", (two_stages, two_stages))
    return folder, [process.end() for process in both]


class TestRuns:
    @pytest.mark.parametrize("name", ["clip-toy", "parts-toy"])
    def test_two_processes_end_with_the_weights_of_one(self, runs, name):
        folder, _ = runs
        assert_same_weights(folder / name, folder / "one")
        losses = [log(folder / run)[-1]["loss"] for run in ("one", name)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)

    def test_the_first_alone_speaks_saves_and_measures(self, runs):
        folder, (first, second) = runs
        assert [line.split(":")[0] for line in first.splitlines()].count("result") == 2
        assert second == ""
        for name in ("clip-toy", "parts-toy"):
            assert sorted(p.name for p in (folder / name).iterdir()) == [
                "config.json", "last.pt", "log.jsonl", "previous.pt", "result.json",
                "samples.png", "tokenizer.model"]
            assert [line["step"] for line in log(folder / name)] == [7]

    def test_a_signal_to_one_stops_both_and_one_goes_on_alone(self, tmp_path):
        moment = functools.partial(at_step, 5, signal.SIGTERM)
        argv = [*FLAGS, "--steps", "7", "--out", str(tmp_path / "stopped")]
        both = pair(argv, tmp_path / "stopped", (int, moment))
        first, second = (process.end(128 + signal.SIGTERM) for process in both)
        assert first.splitlines()[-1].startswith("stopped by SIGTERM at step 6, saved")
        assert second == ""
        assert not (tmp_path / "stopped/result.json").exists()
        assert checkpoint.load(tmp_path / "stopped/last.pt")["step"] == 6
        assert "resumed from step 6" in Command([*argv, "--resume"], tmp_path / "alone.txt").end()

    def test_a_mistake_of_both_ends_both(self, tmp_path):
        argv = [*FLAGS, "--batch_size", "9", "--out", str(tmp_path / "odd")]
        for process in pair(argv, tmp_path / "odd"):
            assert "batch_size 9 does not divide into 1 shares of data sets x 2 processes x 1" \
                in process.end(2)
        assert not (tmp_path / "odd").exists()

    def test_two_killed_processes_go_on_to_the_same_end(self, tmp_path):
        argv = [*TOY, "--steps", str(STEPS), "--out"]
        kill = functools.partial(at_step, 21, signal.SIGKILL)
        for process in pair([*argv, str(tmp_path / "whole")], tmp_path / "whole"):
            process.end()
        for process in pair([*argv, str(tmp_path / "killed")], tmp_path / "killed", (kill, kill)):
            process.end(-signal.SIGKILL)
        for process in pair([*argv, str(tmp_path / "killed"), "--resume"], tmp_path / "killed"):
            process.end()
        assert_same_run(tmp_path / "killed", tmp_path / "whole")


class TestOwnData:
    def test_two_processes_refuse_what_one_does(self, tmp_path):
        spec = listed(tmp_path / "data", 40)
        for name in names(open_world(spec, 8), "train")[3:6]:
            (tmp_path / "data" / name).unlink()
        argv = own(spec, "--skip", "0.5", "--precision", "fp32", "--out")
        alone = Command([*argv, str(tmp_path / "one")], tmp_path / "one.txt").end()
        both = pair([*argv, str(tmp_path / "two")], tmp_path / "two")
        first, second = (process.end() for process in both)
        assert second == "" and result(first)["refused"] == result(alone)["refused"] > 3
        assert first.count("refused: /") == 3
        assert_same_weights(tmp_path / "two", tmp_path / "one")
        one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "two"))
        assert one["data"] == two["data"]

    def test_both_stop_alike_when_one_reads_too_little(self, tmp_path):
        spec = listed(tmp_path / "data", 40)
        for name in names(open_world(spec, 8), "train")[:13]:
            (tmp_path / "data" / name).unlink()
        argv = own(spec, "--out", str(tmp_path / "run"))
        said = [process.end(2).splitlines()[-1] for process in pair(argv, tmp_path / "run")]
        assert said[0] == said[1] and "more than --skip 0.05 allows" in said[0]
