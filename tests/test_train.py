"""train.py: the pieces of a run, and that neither a kill nor a stop changes what it ends with.

Runs are processes forked from one that has imported torch already. Their world is `Toy`.
"""
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo                      # the first optimizer asks for it; once for all forks
from torch import nn

import clip
import train
from common.training import checkpoint, options as cli
from common.data import batches as data
from common.data.shapes.world import Shapes
from tests.test_files import listed, names, shards

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["vision_width=12", "vision_layers=1", "vision_heads=3", "text_width=10", "text_layers=1",
         "text_heads=2", "embed_dim=7"]
TOY = ["clip", "--data", "toy", "--batch_size", "6", "--save_every", "6",
       *itertools.chain.from_iterable(("--set", size) for size in SIZES)]
STEPS = 23


class Toy(Shapes):
    """The shapes world with small splits and few words."""
    name = "toy"
    splits = {"train": 61, "test": 13, "single": 42, "composition": 6, "shifted": 42}

    def corpus(self):
        return itertools.islice(super().corpus(), 150)


data.WORLDS["toy"] = Toy


# Processes

def child(argv, output, moment, environment):
    """Be `python train.py ARGV` in this process; moment() may lay a trap first."""
    os.setpgrp()
    multiprocessing.set_start_method(None, force=True)       # workers start as they do by default
    os.environ |= environment
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    update = train.Run.update

    def drawing(self, *arguments):
        torch.rand(1)                    # as dropout would
        return update(self, *arguments)
    train.Run.update = drawing
    sys.argv, train.BEGAN = ["train.py", *argv], time.time()
    moment()
    cli.run(train.main)


def fork(target, *arguments):
    """A process that calls target(*arguments), started from one that has imported all this."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    process = forks.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:          # for the server that forks
        patch.setenv("PYTHONPATH", str(Path(train.__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


class Command:
    """A `python train.py ARGV` that runs beside the test."""

    def __init__(self, argv, output, moment=int, **environment):
        self.output = output
        self.process = fork(child, argv, output, moment, environment)

    def end(self, status=0):
        """Its output, when it has ended with this status; -9 is killed by signal 9."""
        self.process.join(60)
        text = self.output.read_text()
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running:\n{text}")
        assert self.process.exitcode == status, text
        assert "Traceback" not in text, text
        return text


def at_step(step, number, group=False):
    """A trap: the process, or its whole group, gets a signal as it begins a step."""
    update = train.Run.update

    def struck(self, *arguments):
        if self.step == step:
            os.kill(0 if group else os.getpid(), number)
        return update(self, *arguments)
    train.Run.update = struck


def writing(count):
    """A trap: killed when half of the count-th checkpoint is written."""
    save = torch.save

    def struck(state, path):
        nonlocal count
        count -= 1
        save(state, path)
        if count == 0:
            path.write_bytes(path.read_bytes()[:5000])
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = struck


def naming(name, count):
    """A trap: killed before a file is given this name for the count-th time."""
    replace = os.replace

    def struck(old, new):
        nonlocal count
        count -= new.name == name
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    os.replace = struck


def while_measuring(number):
    """A trap: the process gets a signal when all steps are done."""
    def struck(self, view):
        os.kill(os.getpid(), number)
        return {}
    clip.CLIP.evaluate = struck


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder, reference):
    """Both ended with the same weights, optimizer, random numbers, figures and log."""
    one, other = (checkpoint.load(f / "last.pt") for f in (folder, reference))
    assert one["step"] == other["step"] == STEPS and torch.equal(one["rng"], other["rng"])
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    for key, moments in other["optimizer"]["state"].items():
        assert all(torch.equal(one["optimizer"]["state"][key][m], moments[m]) for m in moments)
    figures = [json.loads((f / "result.json").read_text()) for f in (folder, reference)]
    for figure in figures:
        figure.pop("seconds"), figure.pop("peak_memory_mb")
    assert figures[0] == figures[1]
    assert [(line["step"], line["loss"], line["lr"]) for line in log(folder)] \
        == [(line["step"], line["loss"], line["lr"]) for line in log(reference)]
    assert not list(folder.glob("*.part"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """toy(name, *flags, moment=...) starts a run of the toy world in the folder toy.runs / name."""
    runs = tmp_path_factory.mktemp("runs")

    def start(name, *flags, **more):
        argv = [*TOY, "--steps", str(STEPS), "--out", str(runs / name), *flags]
        return Command(argv, runs / f"{name}.txt", **more)
    start.runs = runs
    return start


@pytest.fixture(scope="module")
def reference(toy):
    """The folder of a run that nothing disturbed."""
    toy("reference").end()
    return toy.runs / "reference"


class TestARun:
    def test_its_folder_holds_what_the_head_of_the_file_says(self, reference):
        assert sorted(p.name for p in reference.iterdir()) == [
            "config.json", "last.pt", "log.jsonl", "previous.pt", "result.json", "samples.png",
            "tokenizer.model"]
        assert [line["step"] for line in log(reference)] == [10, 20, 23]
        assert checkpoint.load(reference / "previous.pt")["step"] == 18

    def test_a_checkpoint_has_its_six_parts(self, reference):
        state = checkpoint.load(reference / "last.pt")
        assert sorted(state) == ["data", "model", "optimizer", "rng", "schedule", "step"]

    def test_the_last_line_is_the_result(self, toy, reference):
        last = toy("again", "--steps", "2").end().splitlines()[-1]
        assert last.startswith("result: {")
        result = json.loads(last.removeprefix("result: "))
        assert result == json.loads((toy.runs / "again/result.json").read_text())
        assert result["steps"] == 2 and result["parameters"] == result["trainable_parameters"] \
            == sum(w.numel() for w in weights(reference).values())
        assert 0 < result["seconds"] < 60 and result["peak_memory_mb"] > 1
        for name in ("zero_shot_accuracy", "composition_accuracy", "image_to_text_recall@1"):
            assert 0 <= result[name] <= 1 and 0 < result[f"{name}_chance"] < 1

    def test_training_changed_every_weight(self, toy, reference):
        first = weights(toy.runs / "again")
        assert all(not torch.equal(first[name], w) for name, w in weights(reference).items())

    def test_a_finished_folder_is_refused(self, toy, reference):
        before = {p: p.stat().st_mtime_ns for p in reference.iterdir()}
        text = toy("reference").end(2)
        words = "^error: .*reference: holds a finished run; --resume .*--overwrite"
        assert re.search(words, text, re.M)
        assert before == {p: p.stat().st_mtime_ns for p in reference.iterdir()}

    def test_a_finished_run_is_measured_again_by_resume_and_eval_only(self, toy, reference):
        first = json.loads((reference / "result.json").read_text())
        for flag in ("--resume", "--eval_only"):
            (reference / "result.json").unlink()
            text = toy("reference", flag).end()
            again = json.loads((reference / "result.json").read_text())
            assert "resumed from step 23\n" in text
            assert {**again, "seconds": 0, "peak_memory_mb": 0} \
                == {**first, "seconds": 0, "peak_memory_mb": 0}
        assert len(log(reference)) == 3

    def test_overwrite_begins_anew(self, toy, reference):
        toy("anew", "--steps", "30").end()
        assert "resumed" not in toy("anew", "--overwrite").end()
        assert_same_run(toy.runs / "anew", reference)

    def test_resume_of_nothing_begins_at_0(self, toy, reference):
        assert "resumed" not in toy("nothing", "--resume").end()
        assert_same_run(toy.runs / "nothing", reference)

    def test_workers_change_nothing(self, toy, reference):
        toy("workers", "--workers", "1").end()
        assert_same_run(toy.runs / "workers", reference)

    def test_exact_accumulation_ends_with_the_same_weights(self, toy):
        toy("whole", "--precision", "fp32", "--steps", "5").end()
        toy("parts", "--precision", "fp32", "--steps", "5", "--accumulate", "3").end()
        whole, parts = weights(toy.runs / "whole"), weights(toy.runs / "parts")
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0)
        losses = [log(toy.runs / name)[-1]["loss"] for name in ("whole", "parts")]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)

    def test_init_starts_from_the_weights_of_a_run(self, toy, reference):
        toy("init", "--init", str(reference), "--steps", "1", "--lr", "1e-12").end()
        for name, w in weights(toy.runs / "init").items():
            torch.testing.assert_close(w, weights(reference)[name], atol=1e-9, rtol=0)

    def test_a_run_that_is_overwritten_can_be_its_own_start(self, toy, reference):
        toy("own", "--steps", "2").end()
        first = weights(toy.runs / "own")
        own = str(toy.runs / "own")
        toy("own", "--steps", "1", "--lr", "1e-12", "--overwrite", "--init", own).end()
        for name, w in weights(toy.runs / "own").items():
            torch.testing.assert_close(w, first[name], atol=1e-9, rtol=0)

    def test_a_loss_that_is_not_finite_ends_it_and_leaves_the_checkpoint(self, toy):
        text = toy("burst", "--lr", "1e30", "--save_every", "1").end(2)
        assert re.search("^error: the loss or its gradient is nan at step 2; the checkpoint of "
                         "step 1 stays in .*burst; try a smaller --lr$", text, re.M)
        assert not (toy.runs / "burst/result.json").exists()
        state = checkpoint.load(toy.runs / "burst/last.pt")
        assert state["step"] == 1 and all(w.isfinite().all() for w in state["model"].values())

    def test_it_is_said_when_there_is_no_checkpoint_yet(self, toy):
        assert "there is no checkpoint yet" in toy("burst2", "--lr", "1e30").end(2)
        assert not (toy.runs / "burst2/last.pt").exists()


KILLS = {
    "before the first checkpoint": (functools.partial(at_step, 4, signal.SIGKILL), None),
    "in a step": (functools.partial(at_step, 21, signal.SIGKILL), 18),
    "in the middle of a checkpoint":
        (functools.partial(writing, 3), 12),
    "between the two names": (functools.partial(naming, "last.pt", 3), 12),
    "before the earlier one has its name": (functools.partial(naming, "previous.pt", 2), 12),
    "while measuring": (functools.partial(while_measuring, signal.SIGKILL), 23),
}


class TestStops:
    @pytest.mark.parametrize("name", KILLS)
    def test_a_killed_run_ends_as_if_it_had_not_been(self, toy, reference, name):
        moment, step = KILLS[name]
        toy(name, moment=moment).end(-signal.SIGKILL)
        resumed = [line for line in toy(name, "--resume").end().splitlines() if "resumed" in line]
        assert resumed == ([] if step is None else [f"resumed from step {step}"])
        assert_same_run(toy.runs / name, reference)

    def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(self, toy, reference):
        toy("damaged", moment=functools.partial(at_step, 21, signal.SIGKILL)).end(-signal.SIGKILL)
        last = toy.runs / "damaged/last.pt"
        last.write_bytes(last.read_bytes()[:20000])
        assert log(toy.runs / "damaged")[-1]["step"] == 20       # later than both checkpoints
        with open(toy.runs / "damaged/log.jsonl", "a") as file:
            file.write('{"step": 21, "lo')
        text = toy("damaged", "--resume").end()
        assert "last.pt: not a checkpoint, or cut off; taking previous.pt\n" \
            "resumed from step 12\n" in text
        assert_same_run(toy.runs / "damaged", reference)

    def test_killed_twice_with_a_worker_and_resumed_without(self, toy, reference):
        for step in (9, 16):
            toy("twice", "--workers", "1", "--resume",
                moment=functools.partial(at_step, step, signal.SIGKILL)).end(-signal.SIGKILL)
        assert "resumed from step 12\n" in toy("twice", "--resume").end()
        assert_same_run(toy.runs / "twice", reference)

    @pytest.mark.parametrize("number, flags, group", [
        (signal.SIGINT, [], False), (signal.SIGTERM, [], False),
        (signal.SIGINT, ["--workers", "1"], True), (signal.SIGTERM, ["--workers", "1"], True)])
    def test_a_signal_saves_and_resume_goes_on_to_the_same_end(
            self, toy, reference, number, flags, group):
        name, moment = f"{number.name}{len(flags)}", functools.partial(at_step, 7, number, group)
        text = toy(name, *flags, moment=moment).end(128 + number)
        assert text.splitlines()[-1] == f"stopped by {number.name} at step 8, saved; " \
            "the same command with --resume goes on"
        assert not (toy.runs / name / "result.json").exists()
        assert "resumed from step 8\n" in toy(name, *flags, "--resume").end()
        assert_same_run(toy.runs / name, reference)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_while_measuring_ends_at_once(self, toy, reference, number):
        name, moment = f"late {number.name}", functools.partial(while_measuring, number)
        text = toy(name, moment=moment).end(128 + number)
        assert text.splitlines()[-1].startswith(f"stopped by {number.name} at step 23, saved")
        assert "result:" not in text and not (toy.runs / name / "result.json").exists()
        toy(name, "--resume").end()
        assert_same_run(toy.runs / name, reference)

    @pytest.mark.parametrize("flags, words", [
        (["--seed", "1"], "options seed=0 (now 1)"),
        (["--lr", "0.01"], "recipe lr=0.001 (now 0.01)"),
        (["--steps", "24"], "recipe steps=23 (now 24)"),
        (["--batch_size", "8"], "recipe batch_size=6 (now 8)"),
        (["--set", "embed_dim=9"], "config embed_dim=7 (now 9)"),
        (["--accumulate", "2"], "options accumulate=1 (now 2)")])
    def test_another_run_is_not_resumed(self, reference, flags, words, capsys, monkeypatch):
        argv = [*TOY, "--steps", str(STEPS), "--out", str(reference), "--resume", *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit, match="2"):
            cli.run(train.main)
        assert words in capsys.readouterr().err


# The user's own data

def own(spec, *flags):
    """The command line of a small run on files of one's own."""
    return ["clip", "--data", spec, *TOY[3:], "--set", "context_length=5", "--steps", str(STEPS), *flags]


def refusals(folder):
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def patchy(tmp_path_factory):
    """40 pictures of which two of training are missing, two cut captions, and a run on them."""
    folder = tmp_path_factory.mktemp("patchy")
    training = names(data.open_world(listed(folder / "data", 40), 8), "train")
    spec = listed(folder / "data", 40)
    for name in training[3:5]:
        (folder / "data" / name).unlink()
    with open(folder / "data/data.jsonl", "a") as file:
        file.write('{"image": "0.png"\n{"image": "0.png", "text": " "}\n')
    argv = own(spec, "--skip", "0.3", "--out")
    Command([*argv, str(folder / "reference")], folder / "reference.txt").end()
    return folder, argv, training[3:5]


class TestOwnData:
    def test_tar_shards_train_from_end_to_end(self, tmp_path):
        spec = shards(tmp_path / "shards", (17, 11, 13))
        argv = own(spec, "--steps", "3", "--shuffle", "5", "--runs", str(tmp_path / "runs"))
        last = Command(argv, tmp_path / "said.txt").end().splitlines()[-1]
        result = json.loads(last.removeprefix("result: "))
        assert result["refused"] == 0 and 0 < result["image_to_text_recall@1_chance"] < 1
        assert not any("zero_shot" in name or "composition" in name for name in result)
        assert sorted(p.name for p in (tmp_path / "runs/clip-tar-shards").iterdir()) == [
            "config.json", "last.pt", "log.jsonl", "result.json", "samples.png", "tokenizer.model"]

    def test_what_is_refused_is_told_counted_and_listed_once(self, patchy):
        folder, _, missing = patchy
        said, lines = (folder / "reference.txt").read_text(), refusals(folder / "reference")
        assert [line["step"] for line in lines[:2]] == [0, 0] and len(lines) == 4
        assert "line 41: not readable JSON" in lines[0]["reason"] and "empty caption" in lines[1]["reason"]
        assert {line["reason"].split("/")[-1] for line in lines[2:]} \
            == {f"{name}: no such picture" for name in missing}
        assert all(0 < line["step"] <= STEPS for line in lines[2:])
        assert len(re.findall("^refused: .*no such picture", said.replace("\r", "\n"), re.M)) == 3
        assert "data.jsonl: 2 of 42 records refused, e.g. " in said
        result = json.loads(said.splitlines()[-1].removeprefix("result: "))
        assert result["refused"] == log(folder / "reference")[-1]["refused"] > 6
        assert f"refused: {result['refused']} in all; " in said

    def test_a_killed_run_ends_with_the_same_weights_and_refusals(self, patchy):
        folder, argv, _ = patchy
        moment = functools.partial(at_step, 16, signal.SIGKILL)
        argv = [*argv, str(folder / "killed")]
        Command(argv, folder / "killed.txt", moment).end(-signal.SIGKILL)
        with open(folder / "killed/refused.jsonl", "a") as file:
            file.write('{"step": 16, "rea')
        # A higher --skip may be what the run needs to go on.
        Command([*argv, "--resume", "--skip", "0.5"], folder / "killed.txt").end()
        assert_same_run(folder / "killed", folder / "reference")
        assert refusals(folder / "killed") == refusals(folder / "reference")

    def test_workers_change_nothing(self, patchy):
        folder, argv, _ = patchy
        Command([*argv, str(folder / "workers"), "--workers", "1"], folder / "workers.txt").end()
        assert_same_run(folder / "workers", folder / "reference")
        assert refusals(folder / "workers") == refusals(folder / "reference")

    def test_other_data_is_not_resumed(self, patchy, tmp_path, capsys, monkeypatch):
        folder, argv, _ = patchy
        rows = (folder / "data/data.jsonl").read_text()
        changes = [(rows + '{"image": "more.png", "text": "more"}\n', [], "options records="),
                   (rows, ["--shuffle", "9"], "options shuffle=10000 (now 9)"),
                   (rows, ["--images", str(tmp_path)], "options images=None (now ")]
        for text, flags, words in changes:
            (folder / "data/data.jsonl").write_text(text)
            monkeypatch.setattr(sys, "argv", [
                "train.py", *argv, str(folder / "reference"), "--resume", *flags])
            with pytest.raises(SystemExit, match="2"):
                cli.run(train.main)
            assert words in capsys.readouterr().err
        (folder / "data/data.jsonl").write_text(rows)

    def test_a_run_stops_when_the_pictures_are_gone(self, tmp_path):
        spec = listed(tmp_path / "data", 40, bad=range(40))
        text = Command(own(spec, "--out", str(tmp_path / "run")), tmp_path / "said.txt").end(2)
        last = text.splitlines()[-1]
        assert re.fullmatch("error: 126 of 132 records refused, e.g. .*png: no such picture: more "
                            "than --skip 0.05 allows; .*run/refused.jsonl lists them", last)
        assert len(refusals(tmp_path / "run")) > 30
        assert not (tmp_path / "run/last.pt").exists()

    def run(self, tmp_path, **options):
        run = train.Run("clip", train.Options(
            data=listed(tmp_path / "data", 40), batch_size=6, steps=50, skip=0.05,
            out=str(tmp_path / "run"), **options), SIZES)
        run.folder.path.mkdir()
        return run

    def test_it_stops_past_the_fraction_and_not_before(self, tmp_path, capsys):
        run, loss = self.run(tmp_path), [torch.tensor(1.0)]
        run.step = 30                    # 180 samples: nine of 189 draws are fewer than one in 20
        run.check(loss, [(["one"], False), ([], False), (list("abcdefgh"), False)])
        assert run.refused.count == 9 and run.passed_over() == {"refused": 9}
        with pytest.raises(ValueError, match="10 of 190 records refused, e.g. one: more than --skip"):
            run.check(loss, [(["last"], False)])
        assert [line["reason"] for line in refusals(tmp_path / "run")] == ["one", *"abcdefgh", "last"]
        assert capsys.readouterr().out == "refused: one\nrefused: a\nrefused: b\n"

    def test_a_search_without_end_stops_it_at_once(self, tmp_path):
        run = self.run(tmp_path)
        run.step = 10 ** 6
        with pytest.raises(ValueError, match="no readable record among 20 drawn in a row, the last: "
                                             "gone; .*refused.jsonl lists them"):
            run.check([torch.tensor(1.0)], [([], False), (["gone"], True)])

    def test_the_list_of_refusals_has_an_end(self, tmp_path):
        folder = self.run(tmp_path).folder
        for start in range(0, 3000, 600):
            folder.refuse(start, [f"{number}\n" for number in range(start, start + 600)])
        assert [line["reason"] for line in refusals(tmp_path / "run")] \
            == [f"{number}?" for number in range(1000)]

    def test_unreadable_test_pictures_are_counted_in_the_result(self, tmp_path, capsys):
        run = self.run(tmp_path)
        gone = names(run.world, "test")[2:]
        for name in gone:                # two are left, fewer than a sheet has room for
            (tmp_path / "data" / name).write_bytes(b"")
        run.finish()
        result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result: "))
        assert result["refused"] == 3
        assert all(n in line["reason"] for n, line in zip(gone, refusals(tmp_path / "run")))


# Pieces

@pytest.fixture
def model():
    return clip.CLIP(clip.CLIPConfig(
        vision_width=12, vision_heads=3, vision_layers=2, text_width=10, text_heads=2,
        text_layers=1, embed_dim=7, vocab_size=31, loss="sigmoid"))


class TestOptimiser:
    def test_gains_biases_and_scalars_are_not_decayed(self, model):
        train.freeze(model, ("*",))
        decayed, plain = train.parameter_groups(model, 0.2)
        names = {id(p): name for name, p in model.named_parameters()}
        plain_names = {names[id(p)] for p in plain["params"]}
        assert {"logit_scale", "logit_bias", "vision.cls_token"} <= plain_names
        assert all(name.endswith((".bias", "norm.weight", "ln_pre.weight", "ln_post.weight")) for name in
                   plain_names - {"logit_scale", "logit_bias", "vision.cls_token"})
        assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - plain_names
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
        assert any(name.endswith("bias") for name in plain_names) \
            and not any("norm" in names[id(p)] for p in decayed["params"])

    def test_what_is_fast_or_undecayed_is_a_group_of_its_own(self, model):
        train.freeze(model, ("*",))
        names = {id(p): name for name, p in model.named_parameters()}
        groups = train.parameter_groups(model, 0.2, ("vision.*",), ("logit_*", "*_projection.*"))
        found = {(g["weight_decay"], g["times"]): {names[id(p)] for p in g["params"]}
                 for g in groups}
        assert found[0.2, 10.0] == {"image_projection.weight", "text_projection.weight"}
        assert found[0.0, 10.0] == {"logit_scale", "logit_bias"}
        assert "vision.patch_embed.weight" in found[0.0, 1.0]
        assert "text.token_embed.weight" in found[0.2, 1.0]
        assert sum(map(len, found.values())) == len(names)

    def test_a_step_without_gradient_decays_matrices_alone(self, model):
        train.freeze(model, ("*",))
        optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.2), lr=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                torch.testing.assert_close(p, before[name] * 0.9)
            else:
                assert torch.equal(p, before[name]), name

    def test_the_rate_rises_over_the_warm_up_and_falls_as_a_cosine(self):
        recipe = train.Recipe(steps=110, batch_size=1, lr=0.8, warmup=10)
        rate = functools.partial(train.learning_rate, recipe)
        assert [rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.08, 0.4, 0.8, 0.8])
        assert rate(35) == pytest.approx(0.8 * (2 + 2 ** 0.5) / 4)
        assert rate(60) == pytest.approx(0.4)
        assert rate(85) == pytest.approx(0.8 * (2 - 2 ** 0.5) / 4)
        assert 0 < rate(109) < 0.001 and rate(110) == pytest.approx(0)

    def test_without_a_warm_up_the_first_rate_is_the_peak(self):
        assert train.learning_rate(train.Recipe(steps=4, batch_size=1, lr=0.8, warmup=0), 0) == 0.8

    def test_the_gradient_is_clipped_and_the_rate_is_the_schedules(self, tmp_path, monkeypatch):
        run = train.Run("clip", train.Options(data="toy", batch_size=6, steps=50, precision="fp32",
                                              out=str(tmp_path / "run")), SIZES)
        norms, clip_norm = [], nn.utils.clip_grad_norm_

        def watched(parameters, most):
            parameters = list(parameters)
            for p in parameters:
                p.grad *= 1e6
            clip_norm(parameters, most)
            norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
            return torch.tensor(1.0)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
        run.step = 3
        run.update(run.model, run.batches[3])
        assert norms == [pytest.approx(1.0, abs=1e-3)]
        assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3 * 4 / 10}
        run.optimizer.param_groups[1]["times"] = 10.0
        run.update(run.model, run.batches[3])
        slow, fast = (group["lr"] for group in run.optimizer.param_groups)
        assert fast == pytest.approx(10 * slow)
        assert not (tmp_path / "run").exists()

    def test_the_model_has_the_last_word_on_its_weights(self):
        run = train.Run("clip", train.Options(data="toy", batch_size=6, steps=50), SIZES)
        run.model.logit_scale.data.fill_(7.0)
        run.update(run.model, run.batches[0])
        assert run.model.logit_scale.item() == pytest.approx(math.log(100))

    def test_the_seed_is_of_the_weights_and_of_the_order(self):
        runs = [train.Run("clip", train.Options(data="toy", batch_size=6, seed=seed), SIZES)
                for seed in (3, 3, 4)]
        one, same, other = (run.model.text_projection.weight for run in runs)
        assert torch.equal(one, same) and not torch.equal(one, other)
        assert runs[0].batches.keys(0) == runs[1].batches.keys(0) != runs[2].batches.keys(0)

    @pytest.mark.parametrize("size", [math.inf, math.nan])
    def test_a_gradient_that_is_not_finite_shows_in_the_loss(self, tmp_path, monkeypatch, size):
        run = train.Run("clip", train.Options(data="toy", batch_size=6, steps=50), SIZES)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                            lambda *arguments: torch.tensor(size))
        assert not run.update(run.model, run.batches[0]).isfinite()


class TestFreeze:
    def test_patterns_choose_what_is_trained(self, model):
        table = train.freeze(model, ("text.*", "vision.transformer.blocks.1.*", "logit_scale"))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        chosen = ("text.", "vision.transformer.blocks.1.", "logit_scale")
        assert trained == {name for name, p in model.named_parameters() if name.startswith(chosen)}
        kept = {id(p) for group in train.parameter_groups(model, 0.1) for p in group["params"]}
        assert kept == {id(p) for p in model.parameters() if p.requires_grad}
        rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
        assert rows["logit_bias"] == ["1", "frozen"] and rows["logit_scale"] == ["1", "trained"]
        assert rows["text"][1:] == ["trained"] and rows["image_projection"] == ["84", "frozen"]
        assert rows["vision"][-1] == "trained" and len(rows["vision"]) == 3

    def test_frozen_modules_are_in_eval_mode(self, model):
        train.freeze(model, ("text.*", "logit_scale"))
        assert not model.vision.training and not model.image_projection.training
        assert not any(m.training for m in model.vision.modules())
        assert model.text.training and all(m.training for m in model.text.modules())

    def test_frozen_parameters_stay_bit_equal_over_a_step(self, tmp_path, monkeypatch):
        monkeypatch.setitem(clip.TRAINS, "clip", ("text.*", "text_projection.*"))
        run = train.Run("clip", train.Options(data="toy", batch_size=6, steps=50), SIZES)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.update(run.model, run.batches[0])
        for name, p in run.model.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith("text"), name


class TestOptions:
    def test_the_recipe_is_the_presets_unless_a_flag_says_otherwise(self):
        def recipe(**options):
            run = train.Run.__new__(train.Run)
            run.options, run.stage = train.Options(**options), train.STAGES["clip"]
            return run.find_recipe()
        recipes = train.STAGES["clip"].recipes
        assert recipe() == recipes["tiny"] and recipe(data="shapes:objects=3") == recipes["tiny"]
        assert recipe(data="emoji") == recipes["tiny emoji"]
        assert recipe(data="coco:captions.json") == recipes["tiny"]
        assert recipe(preset="ViT-B/32") == recipes[""]
        changed = recipe(steps=50, batch_size=8, lr=0.5)
        assert (changed.steps, changed.batch_size, changed.lr, changed.warmup) == (50, 8, 0.5, 10)

    @pytest.mark.parametrize("options, name", [
        ({}, "clip"), ({"data": "emoji"}, "clip-emoji"), ({"preset": "ViT-B/32"}, "clip-ViT-B-32"),
        ({"data": "shapes:objects=3,noise=0.1", "preset": "small"},
         "clip-shapes-objects=3-noise=0.1-small"),
        ({"data": "coco:/a/long/path/captions_val2014.json"}, "clip-coco-captions-val2014"),
        ({"data": "jsonl:my data.jsonl", "preset": "small"}, "clip-jsonl-my-data-small"),
        ({"data": "tar:/sets/cc3m/{00000..00331}.tar"}, "clip-tar-cc3m")])
    def test_the_default_folder_hides_no_other_run(self, options, name):
        run = train.Run.__new__(train.Run)
        run.name, run.options = "clip", train.Options(runs="some", **options)
        assert run.default_folder() == Path("some") / name

    def test_the_clock_starts_with_the_program_or_with_the_stage(self, monkeypatch):
        options = train.Options(data="toy", batch_size=6)
        run = train.Run("clip", options, SIZES, began=time.time() - 100)
        assert 100 <= run.elapsed() < 160
        run.seconds = 50                 # of an earlier sitting
        assert 150 <= run.elapsed() < 210
        began = []
        monkeypatch.setitem(train.LISTS, "all", ["clip", "clip"])
        monkeypatch.setattr(train, "train", lambda *arguments: began.append(arguments[-1]))
        monkeypatch.setattr(sys, "argv", ["train.py", "all"])
        assert train.main() == 0
        assert began[0] == train.BEGAN < began[1] <= time.time()

    def test_a_list_ends_with_the_stage_that_was_stopped(self, monkeypatch):
        statuses = iter([0, 143])
        monkeypatch.setitem(train.LISTS, "all", ["clip", "clip", "clip"])
        monkeypatch.setattr(train, "train", lambda *arguments: next(statuses))
        monkeypatch.setattr(sys, "argv", ["train.py", "all"])
        assert train.main() == 143

    def test_half_precision_is_asked_for_or_fast(self, monkeypatch):
        cpu = torch.device("cpu")
        for fast in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
            assert train.half_precision("auto", cpu) is fast
            assert train.half_precision("bf16", cpu) and not train.half_precision("fp32", cpu)

    def test_every_stage_has_a_recipe_for_every_preset(self):
        for name, stage in train.STAGES.items():
            assert name in stage.file.TRAINS
            for preset in stage.file.PRESETS:
                assert preset in stage.recipes or "" in stage.recipes, (name, preset)
        assert {stage for stages in train.LISTS.values() for stage in stages} <= set(train.STAGES)
