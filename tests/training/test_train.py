"""train.py and run.py: steps, runs, and that neither kill nor stop changes what a run ends with."""
import functools
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import train
from common.data.batches import open_world
from common.training import checkpoint
from common.training.optimizer import learning_rate
from tests.helpers import assert_close, listed, names, shards
from tests.training.runs import (STEPS, TOY, Bigram, Command, assert_same, assert_same_run,
                                 at_step, build, in_threads, killing_its_workers, log, own,
                                 ragged_rows, result, share_of_batch, split, step_gradients,
                                 weights, while_measuring)

# A step

LOSSES = ("softmax", "sigmoid", "lm")


class TestUpdate:
    @pytest.mark.parametrize("ranks, sizes", [(1, (3, 5, 4)), (2, (6,)), (2, (1, 3, 2))])
    @pytest.mark.parametrize("loss", LOSSES)
    def test_parts_of_all_processes_give_the_gradient_of_the_whole_batch(self, loss, ranks, sizes):
        expected = step_gradients(*share_of_batch(loss, 12))
        shares = [share_of_batch(loss, *sizes, rank=rank, ranks=ranks) for rank in range(ranks)]
        found = in_threads(ranks, lambda rank: step_gradients(*shares[rank]))
        for name, gradient in expected.items():       # DDP averages over the processes
            mean = torch.stack([of_rank[name] for of_rank in found]).mean(dim=0)
            assert_close(f"gradient of {name}", mean, gradient, 1e-8)
            assert gradient.abs().max() > 1e-9 or "k_proj.bias" in name, name

    @pytest.mark.parametrize("loss", LOSSES)
    def test_in_bf16_micro_batches_give_the_gradient_of_the_whole_batch_too(self, loss):
        def step(*sizes, half=True):
            model, batches = share_of_batch(loss, *sizes)
            found = step_gradients(model.float(), batches, half=half)
            assert {p.dtype for p in [*model.parameters(), *found.values()]} == {torch.float32}
            return found.pop("loss"), torch.cat([found[name].flatten() for name in sorted(found)])
        (loss_of_parts, parts), (loss_of_whole, whole) = step(3, 5, 4), step(12)
        exact = step(12, half=False)[1]
        assert (parts - whole).norm() < 0.02 * whole.norm(), "micro-batches against the whole batch"
        assert (whole - exact).norm() < 0.05 * exact.norm(), "bf16 against float32"
        assert_close("loss", loss_of_parts, loss_of_whole, 2e-3)

    def test_every_data_set_counts_its_own_labels_and_has_its_weight(self):
        model, whole = Bigram(), ragged_rows()
        first, second, third = split(whole, 1, 2, 3)
        found = step_gradients(model, [second | {"source": 1, "weight": 0.5},
                                       first | {"source": 1, "weight": 0.5},
                                       third | {"source": 0, "weight": 3.0}])
        # Row i has labels for i + 1 tokens, of which the first is predicted from nothing.
        logits, labels = model.table(whole["ids"])[:, :-1], whole["labels"][:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 4)
        loss = 0.5 * nll[:3].sum() / 3 + 3.0 * nll[3:].sum() / 11
        assert_close("loss, the weighted sum of the data sets' means", found["loss"], loss)
        gradient, = torch.autograd.grad(loss, model.table.weight)
        assert_close("gradient of table.weight", found["table.weight"], gradient)

    def test_all_losses_of_a_model_are_added_and_without_labels_nothing_is_counted(self):
        model = Bigram()
        model.forward = lambda batch, gather: model.seen.append(batch) or {
            "a": model.table.weight.sum(), "b": model.table.weight.square().sum()}
        found = step_gradients(model, [{"ids": torch.ones(2, 3)}] * 2)
        assert not any("label_count" in batch for batch in model.seen)
        w = model.table.weight.detach()
        assert_close("loss", found["loss"], 2 * (w.sum() + w.square().sum()))
        assert_close("gradient of table.weight", found["table.weight"], 2 * (1 + 2 * w))

    def test_hooks_get_the_step_before_and_after_it(self):
        model = Bigram()
        step_gradients(model, [ragged_rows()])             # it needs none
        model.seen = called = []
        for name in ("before_step", "after_step"):
            setattr(model, name, lambda *given, name=name: called.append((name, *given)))
        step_gradients(model, split(ragged_rows(), 3, 3))
        assert called[0] == ("before_step", 0, 9) and called[3:] == [("after_step", 0)]

    def test_the_model_has_the_last_word_on_its_weights(self, tmp_path):
        run = build(tmp_path)
        run.model.logit_scale.data.fill_(7.0)
        train.update(run, run.model, run.batches[0])
        assert_close("logit_scale", run.model.logit_scale, math.log(100))

    @pytest.mark.parametrize("most, norm", [(1.0, 1.0), (0.5, 0.5), (None, 1e6)])
    def test_the_gradient_is_clipped_and_the_rate_is_the_schedules(self, tmp_path, most, norm):
        run, norms = build(tmp_path, optimizer="adamw"), []
        run.recipe = replace(run.recipe, grad_clip=most)
        run.step, weight, step = 3, run.model.text_projection.weight, run.optimizer.step

        def watched():
            norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm())
            step()
        run.optimizer.step = watched
        weight.register_hook(lambda grad: 1e6 * grad / grad.norm())
        run.optimizer.param_groups[1]["lr_multiplier"] = 10.0
        train.update(run, run.model, run.batches[3])
        assert_close("norm of the gradient", norms[0], norm, 1e-3 * norm)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        assert_close("learning rates of two groups", rates, [4e-4, 4e-3])
        assert all(p.grad is None for p in run.model.parameters()), "gradients of the step are left"

    @pytest.mark.parametrize("size", [math.inf, math.nan])
    def test_a_gradient_that_is_not_finite_shows_in_the_loss(self, size):
        model = Bigram()
        assert step_gradients(model, [ragged_rows()])["loss"].isfinite()
        model.table.weight.register_hook(lambda grad: grad * size)
        assert not step_gradients(model, [ragged_rows()])["loss"].isfinite()


# A run in this process

class TestBuild:
    def test_the_seed_is_of_the_weights_and_of_the_order(self, tmp_path):
        runs = [build(tmp_path / str(number), seed=seed) for number, seed in enumerate((3, 3, 4))]
        one, same, other = (run.model.text_projection.weight for run in runs)
        assert torch.equal(one, same) and not torch.equal(one, other)
        one, same, other = (run.batches.keys(0, 0) for run in runs)
        assert one == same != other

    @pytest.mark.parametrize("changes, words", [
        ({"seed": 1}, r"options seed=0 \(now 1\)"), ({"lr": 0.01}, r"recipe lr=0.001 \(now 0.01\)"),
        ({"steps": 24}, r"recipe steps=50 \(now 24\)"), ({"batch_size": 8}, "batch_size=6"),
        ({"accumulate": 2}, r"options accumulate=1 \(now 2\)"), ({"shuffle": 9}, "shuffle=10000"),
        ({"precision": "bf16"}, "precision=fp32"), ({"unfreeze": "text.*"}, "unfreeze="),
        ({"images": "data"}, r"options images=None \(now .*data\)"),
        ({"more": 1}, "options records=")])
    def test_another_run_is_not_resumed(self, tmp_path, changes, words):
        spec = listed(tmp_path / "data", 40)
        train.save(build(tmp_path, data=spec))
        if "images" in changes:
            changes["images"] = str(tmp_path / "data")
        if changes.pop("more", 0):
            listed(tmp_path / "data", 90)
        with pytest.raises(ValueError, match=words):
            build(tmp_path, data=spec, resume=True, **changes)

    def test_unfreeze_trains_more_and_the_table_says_what(self, tmp_path, monkeypatch):
        monkeypatch.setitem(clip.TRAINS, "clip", ("text.*",))
        run = build(tmp_path, unfreeze="logit_scale,vision.ln_post.*")
        trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
        assert {name for name in trained if not name.startswith("text.")} \
            == {"logit_scale", "vision.ln_post.weight", "vision.ln_post.bias"}
        assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(trained)
        assert re.search(r"^  logit_scale +1  trained$", run.table, re.M)

    def test_flags_choose_optimizer_attention_and_micro_batches(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train.transformer, "ATTENTION", "auto")
        muon = build(tmp_path / "a", precision="bf16")
        assert not build(tmp_path / "b").optimizer.param_groups[0]["half"]
        adamw = build(tmp_path / "c", optimizer="adamw", attention="hand", accumulate=3)
        assert str(muon.optimizer).startswith("Muon (") and muon.optimizer.param_groups[0]["half"]
        assert str(adamw.optimizer).startswith("AdamW (") and adamw.recipe.optimizer == "adamw"
        assert [len(batch["ids"]) for batch in adamw.batches[0]] == [2, 2, 2]
        assert train.transformer.ATTENTION == "hand"

    def test_the_vocabulary_is_the_tokenizers(self, tmp_path):
        run = build(tmp_path)
        assert run.config.vocab_size == len(run.tokenizer) and run.config.eos_id == 2
        assert run.model.text.token_embed.weight.shape[0] == len(run.tokenizer)


class TestFit:
    @pytest.mark.parametrize("device, losses", [("cpu", [10, 20, 23]), ("cuda", [5.5, 18, 22])])
    def test_the_log_has_the_rate_of_its_step_and_the_mean_loss_since_it_was_last_read(
            self, tmp_path, monkeypatch, device, losses):
        run = build(tmp_path, steps=23, save_every=15, workers=0)
        run.device = torch.device(device)    # of a GPU it is read every 10 steps and when saving
        monkeypatch.setattr(train, "update", lambda run, *_: torch.tensor(run.step + 1.0))
        train.fit(run)
        lines, state = log(run.folder.path), checkpoint.load(run.folder.path / "last.pt")
        assert [line["step"] for line in lines] == [10, 20, 23]
        assert_close("loss of steps 10, 20, 23", [line["loss"] for line in lines], losses)
        assert (state["step"], state["schedule"]["loss"]) == (23, losses[-1])
        rates = [learning_rate(run.recipe, step) / 1e-3 for step in (9, 19, 22)]
        assert_close("rate of steps 10, 20, 23", [line["lr"] / 1e-3 for line in lines], rates)

    def test_batches_are_made_by_the_workers(self, tmp_path, monkeypatch):
        run, makers = build(tmp_path, steps=2, workers=1), []
        source, collate = run.batches.sources[0], run.batches.sources[0].collate
        source.collate = lambda *given: collate(*given) | {"maker": os.getpid()}
        monkeypatch.setattr(train, "update", lambda run, forward, batches: makers.extend(
            batch["maker"] for batch in batches) or torch.tensor(1.0))
        train.fit(run)
        assert len(makers) == 2 and os.getpid() not in makers

    def test_a_resumed_run_has_the_seconds_and_the_loss_of_all_sittings(
            self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(clip.CLIP, "evaluate", lambda self, data: {})
        monkeypatch.setattr(clip.CLIP, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        for sitting in (1, 2, 3):
            run = build(tmp_path, steps=3, resume=True)
            assert 1000 * (sitting - 1) <= run.elapsed() < 1000 * (sitting - 1) + 60
            assert (run.step, run.saved) == (sitting - 1, sitting - 1 or None)
            assert sitting == 1 or run.loss == loss
            run.began, run.stopped = run.began - 1000, signal.SIGTERM      # a step a sitting
            train.fit(run)
            loss = run.loss
        train.measure(run)
        line, = log(run.folder.path)
        figures = result(capsys.readouterr().out)
        assert 3000 <= line["seconds"] < 3060 and 3000 <= figures["seconds"] < 3060
        assert figures["loss"] == round(loss, 4) and line["loss"] == round(loss, 5)

    def test_a_compile_is_announced(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(torch, "compile", lambda model: model)
        for flag in (True, False):
            train.fit(build(tmp_path / str(flag), steps=1, compile=flag))
            assert ("compiling the model: the first" in capsys.readouterr().out) == flag

    @pytest.mark.parametrize("save_every, words", [
        (1, "the checkpoint of step 1 stays in .*run"), (9, "there is no checkpoint yet")])
    def test_a_loss_that_is_not_finite_ends_it_and_leaves_the_checkpoint(
            self, tmp_path, save_every, words):
        run = build(tmp_path, lr=1e30, save_every=save_every)
        with pytest.raises(ValueError, match=f"is nan at step 2; {words}; try a smaller --lr$"):
            train.fit(run)
        last = run.folder.path / "last.pt"
        assert last.exists() == (save_every == 1) and not log(run.folder.path)
        assert save_every > 1 or all(w.isfinite().all() for w in weights(run.folder.path).values())


class TestCheck:
    def test_loss_refusals_and_stops_of_all_processes_count(self, tmp_path, capsys):
        spec = listed(tmp_path / "data", 40)
        runs = [build(tmp_path / name, data=spec) for name in "ab"]
        runs[0].step, runs[1].step, runs[1].stopped = 30, 30, signal.SIGTERM
        losses = [[torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(4.0), torch.tensor(7.0)]]
        stops = in_threads(2, lambda rank: train.check(runs[rank], losses[rank], ["a"] * rank))
        assert stops == [True, True]
        assert [(run.loss, run.refused.count) for run in runs] == [(3.5, 1)] * 2
        assert capsys.readouterr().out == "refused: a\n"
        assert not train.check(runs[0], losses[0], [])

    def test_it_stops_past_the_fraction_and_not_before(self, tmp_path, capsys):
        run, loss = build(tmp_path, data=listed(tmp_path / "data", 40)), [torch.tensor(1.0)]
        run.step = 30                    # 180 samples: nine of 189 draws are fewer than one in 20
        train.check(run, loss, ["one", *"abcdefgh"])
        with pytest.raises(ValueError, match="10 of 190 records refused, e.g. one: more than"):
            train.check(run, loss, ["last"])
        assert capsys.readouterr().out == "refused: one\nrefused: a\nrefused: b\n"


class TestMeasure:
    def test_unreadable_test_pictures_are_counted(self, tmp_path, capsys):
        run = build(tmp_path, data=listed(tmp_path / "data", 40))
        for name in names(run.world, "test")[2:]:    # two are left, fewer than a sheet has room for
            (tmp_path / "data" / name).write_bytes(b"")
        train.measure(run)
        figures = result(capsys.readouterr().out)
        assert (figures["refused"], figures["test_size"]) == (3, 5)

    def test_it_is_in_eval_mode_and_the_runs_precision(self, tmp_path, monkeypatch, capsys):
        def evaluate(self, data):
            return {"training": self.training, "bf16": (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
                    == torch.bfloat16}
        monkeypatch.setattr(clip.CLIP, "evaluate", evaluate)
        train.measure(build(tmp_path, precision="bf16"))
        assert result(capsys.readouterr().out).items() > {"training": False, "bf16": True}.items()


class TestFinished:
    @pytest.mark.parametrize("step, measured, is_finished", [
        (50, 50, True), (50, 18, False), (18, 18, False), (50, None, False)])
    def test_the_figures_of_the_last_step_are_there(self, tmp_path, step, measured, is_finished):
        run = build(tmp_path)
        run.step, result = step, {"steps": measured, "loss": 3.0}
        if measured:
            (run.folder.path / "result.json").write_text(json.dumps(result))
        assert train.finished(run) == (result if is_finished else None)


class TestMain:
    def test_all_trains_stages_and_ends_with_their_overview(self, monkeypatch):
        lines = []
        monkeypatch.setattr(train, "train", lambda name, *more: lines.append(name) or 0)
        monkeypatch.setattr(train.subprocess, "run", lambda words: lines.append(words)
                            or SimpleNamespace(returncode=3))
        monkeypatch.setattr(sys, "argv", ["train.py", "all", "--runs", "my runs"])
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=lambda: lines.append("flushed")))
        assert train.main() == 3
        *stages, flushed, script = lines
        assert flushed == "flushed", "else a file has the script's lines first"
        assert stages[:3] == ["lm", "clip", "flamingo"] and {*stages} <= {*train.STAGES}
        assert script[1:] == [train.ROOT / "lessons/overview.py", "--runs", "my runs"]
        assert script[1].exists()

    def test_a_list_runs_its_stages_each_with_its_own_clock_until_one_is_stopped(self, monkeypatch):
        began, statuses = [], iter([0, 143, 0])
        monkeypatch.setitem(train.LISTS, "all", ["clip", "lm", "flamingo"])
        monkeypatch.setattr(
            train, "train", lambda *given: began.append(given[::3]) or next(statuses))
        monkeypatch.setattr(sys, "argv", ["train.py", "all"])
        assert train.main() == 143
        assert [name for name, _ in began] == ["clip", "lm"]
        assert began[0][1] == train.BEGAN < began[1][1] <= time.time()


# A run as a process

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """toy(name, *flags, trap=...) starts a run of the toy world in the folder toy.runs / name."""
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
            ".lock", "config.json", "last.pt", "log.jsonl", "previous.pt", "result.json",
            "samples.png", "tokenizer.model"]
        assert [line["step"] for line in log(reference)] == [10, 20, 23]
        assert checkpoint.load(reference / "previous.pt")["step"] == 18
        assert sorted(checkpoint.load(reference / "last.pt")) == [
            "data", "model", "optimizer", "rng", "schedule", "step"]

    def test_the_last_line_is_the_result(self, toy, reference):
        figures = result((toy.runs / "reference.txt").read_text())
        assert figures == json.loads((reference / "result.json").read_text())
        assert figures["parameters"] == figures["trainable_parameters"] \
            == sum(w.numel() for w in weights(reference).values()) and figures["steps"] == STEPS
        assert figures["loss"] == pytest.approx(log(reference)[-1]["loss"], abs=1e-4)
        assert 0 < figures["seconds"] < 60 and 100 < figures["peak_memory_mb"] < 3000
        for name in ("zero_shot_accuracy", "composition_accuracy", "image_to_text_recall@1"):
            assert 0 <= figures[name] <= 1 and 0 < figures[f"{name}_chance"] < 1

    def test_training_changed_every_weight(self, reference, tmp_path):
        first, last = build(tmp_path).model.state_dict(), weights(reference)
        assert not [name for name, w in first.items() if torch.equal(w, last[name])]

    def test_eval_only_measures_a_finished_run_again(self, toy, reference):
        first = json.loads((reference / "result.json").read_text())
        (reference / "result.json").unlink()
        assert "resumed from step 23\n" in toy("reference", "--eval_only", "--lr", "0.01").end()
        again = json.loads((reference / "result.json").read_text())
        timeless = {"seconds": 0, "peak_memory_mb": 0}
        assert_same("result", again | timeless, first | timeless)
        assert len(log(reference)) == 3

    def test_resume_leaves_a_finished_run_as_it_is_and_prints_its_result(self, toy, reference):
        before = {path: path.read_bytes() for path in reference.iterdir()}
        trap = functools.partial(while_measuring, signal.SIGTERM)
        text = toy("reference", "--resume", trap=trap).end()
        assert "clip: finished; --eval_only measures it again\n" in text
        assert result(text) == json.loads(before[reference / "result.json"])
        assert {path: path.read_bytes() for path in reference.iterdir()} == before

    def test_a_run_that_is_overwritten_can_be_its_own_start_and_leaves_nothing_behind(self, toy):
        toy("own", "--steps", "11").end()
        first, folder = weights(toy.runs / "own"), toy.runs / "own"
        again = ["--steps", "1", "--lr", "1e-12", "--overwrite", "--init", str(folder)]
        assert "resumed" not in toy("own", *again).end()
        assert_same("weights", weights(folder), first, 1e-9)
        assert len(log(folder)) == 1 and not (folder / "previous.pt").exists()


class TestStops:
    def test_killed_twice_and_resumed_without_a_worker(self, toy, reference):
        for step in (4, 21):             # before the first checkpoint, too
            toy("twice", "--workers", "1", "--resume",
                trap=functools.partial(at_step, step, signal.SIGKILL)).end(-signal.SIGKILL)
            assert "resumed" not in (toy.runs / "twice.txt").read_text()
        assert result(toy("twice", "--eval_only").end())["steps"] == 18
        assert "resumed from step 18\n" in toy("twice", "--resume").end()
        assert_same_run(toy.runs / "twice", reference)

    @pytest.mark.parametrize("step, trap, number, flags", [
        (8, (at_step, 7), signal.SIGINT, []),
        (8, (at_step, 7), signal.SIGTERM, ["--workers", "1"]),
        (STEPS, (while_measuring,), signal.SIGTERM, [])])
    def test_a_signal_saves_and_resume_ends_alike(self, toy, reference, step, trap, number, flags):
        name, group = f"{number.name}{step}", {"group": True} if flags else {}
        text = toy(name, *flags, trap=functools.partial(*trap, number, **group)).end(128 + number)
        assert text.splitlines()[-1] == f"stopped by {number.name} at step {step}, saved; " \
            "the same command with --resume continues"
        assert "result:" not in text and not (toy.runs / name / "result.json").exists()
        assert f"resumed from step {step}\n" in toy(name, *flags, "--resume").end()
        assert_same_run(toy.runs / name, reference)


    def test_a_killed_worker_is_one_line_and_resume_ends_alike(self, toy, reference):
        trap = functools.partial(killing_its_workers, 8)
        text = toy("worker", "--workers", "1", trap=trap).end(2)
        assert re.fullmatch("error: a worker process was killed at step [89], .*; --resume "
                            "continues from the last checkpoint, .*", text.splitlines()[-1])
        assert "resumed from step 6\n" in toy("worker", "--resume").end()
        assert_same_run(toy.runs / "worker", reference)


# The user's own data

@pytest.fixture(scope="module")
def patchy(tmp_path_factory):
    """40 pictures of which two of training are missing, two cut captions, and a run on them."""
    folder = tmp_path_factory.mktemp("patchy")
    spec = listed(folder / "data", 40)
    missing = names(open_world(spec, 8), "train")[3:5]
    for name in missing:
        (folder / "data" / name).unlink()
    with open(folder / "data/data.jsonl", "a") as file:
        file.write('{"image": "0.png"\n{"image": "0.png", "text": " "}\n')
    argv = own(spec, "--skip", "0.3", "--out")
    Command([*argv, str(folder / "reference")], folder / "reference.txt").end()
    return folder, argv, missing


class TestOwnData:
    def test_tar_shards_train_from_end_to_end(self, tmp_path):
        spec = shards(tmp_path / "shards", (17, 11, 13))
        argv = own(spec, "--steps", "3", "--shuffle", "5", "--runs", str(tmp_path / "runs"))
        said = Command([*argv, "--set", "context_length=3"], tmp_path / "said.txt").end()
        figures = result(said)
        assert "\n*.tar: 36 of 36 captions are cut after 1 tokens\n" in said
        assert figures["refused"] == 0 and 0 < figures["image_to_text_recall@1_chance"] < 1
        assert not any("zero_shot" in name or "composition" in name for name in figures)
        assert len([*tmp_path.glob("runs/clip-tar-shards-????/samples.png")]) == 1

    def test_captions_that_fit_the_context_are_not_counted(self, tmp_path):
        assert train.count_cut(build(tmp_path, data=listed(tmp_path / "data", 40))) is None

    def test_what_is_refused_is_told_three_times_and_counted(self, patchy):
        folder, argv, missing = patchy
        said = (folder / "reference.txt").read_text().replace("\r", "\n")
        assert re.search("^data.jsonl: 2 of 42 records refused, e.g. .*line 41: ", said, re.M)
        told = re.findall("^refused: .*/(.*): no such picture$", said, re.M)
        assert len(told) == 3 and set(told) <= set(missing)
        run = build(folder, data=argv[2], steps=STEPS, skip=0.3)
        drawn = sum(len(batch["refused"]) for step in range(STEPS) for batch in run.batches[step])
        assert drawn > 3 and result(said)["refused"] == 2 + drawn
        assert checkpoint.load(folder / "reference/last.pt")["data"]["refused"] == drawn

    def test_killed_with_a_worker_and_resumed_without_it_refuses_the_same(self, patchy):
        folder, argv, _ = patchy
        trap = functools.partial(at_step, 16, signal.SIGKILL)
        argv = [*argv, str(folder / "killed")]
        Command([*argv, "--workers", "1"], folder / "killed.txt", trap).end(-signal.SIGKILL)
        # A higher --skip may be what the run needs to continue.
        Command([*argv, "--resume", "--skip", "0.5"], folder / "killed.txt").end()
        assert_same_run(folder / "killed", folder / "reference")

