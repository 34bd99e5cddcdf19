"""train.py: what a run does, and that neither a kill nor a stop changes what it ends with."""
import functools
import json
import math
import re
import signal
import sys
import time
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F

import clip
import train
from common.data.batches import open_world
from common.training import checkpoint, options
from common.training.optimizer import find_recipe
from tests.helpers import listed, names, shards
from tests.training.runs import (SIZES, STEPS, TOY, Bigram, Command, assert_same_run, assert_same_weights,
                        at_step, build, log, naming, own, ragged_rows, result, step_gradients,
                        weights, while_measuring, writing)


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
            "config.json", "last.pt", "log.jsonl", "previous.pt", "result.json", "samples.png",
            "tokenizer.model"]
        assert [line["step"] for line in log(reference)] == [10, 20, 23]
        assert checkpoint.load(reference / "previous.pt")["step"] == 18

    def test_a_checkpoint_has_its_six_parts(self, reference):
        state = checkpoint.load(reference / "last.pt")
        assert sorted(state) == ["data", "model", "optimizer", "rng", "schedule", "step"]

    def test_the_last_line_is_the_result(self, toy, reference):
        figures = result(toy("again", "--steps", "2").end())
        assert figures == json.loads((toy.runs / "again/result.json").read_text())
        assert figures["steps"] == 2 and figures["parameters"] == figures["trainable_parameters"] \
            == sum(w.numel() for w in weights(reference).values())
        assert 0 < figures["seconds"] < 60 and figures["peak_memory_mb"] > 1
        for name in ("zero_shot_accuracy", "composition_accuracy", "image_to_text_recall@1"):
            assert 0 <= figures[name] <= 1 and 0 < figures[f"{name}_chance"] < 1

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
        assert_same_weights(toy.runs / "parts", toy.runs / "whole")
        losses = [log(toy.runs / name)[-1]["loss"] for name in ("whole", "parts")]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)

    def test_init_starts_from_the_weights_of_a_run(self, toy, reference):
        toy("init", "--init", str(reference), "--steps", "1", "--lr", "1e-12").end()
        assert_same_weights(toy.runs / "init", reference, atol=1e-9)

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

    def test_the_message_says_when_there_is_no_checkpoint_yet(self, toy):
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
        trap, step = KILLS[name]
        toy(name, trap=trap).end(-signal.SIGKILL)
        resumed = [line for line in toy(name, "--resume").end().splitlines() if "resumed" in line]
        assert resumed == ([] if step is None else [f"resumed from step {step}"])
        assert_same_run(toy.runs / name, reference)

    def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(self, toy, reference):
        toy("damaged", trap=functools.partial(at_step, 21, signal.SIGKILL)).end(-signal.SIGKILL)
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
                trap=functools.partial(at_step, step, signal.SIGKILL)).end(-signal.SIGKILL)
        assert "resumed from step 12\n" in toy("twice", "--resume").end()
        assert_same_run(toy.runs / "twice", reference)

    @pytest.mark.parametrize("number, flags, group", [
        (signal.SIGINT, [], False), (signal.SIGTERM, [], False),
        (signal.SIGINT, ["--workers", "1"], True), (signal.SIGTERM, ["--workers", "1"], True)])
    def test_a_signal_saves_and_resume_ends_the_same(
            self, toy, reference, number, flags, group):
        name, trap = f"{number.name}{len(flags)}", functools.partial(at_step, 7, number, group)
        text = toy(name, *flags, trap=trap).end(128 + number)
        assert text.splitlines()[-1] == f"stopped by {number.name} at step 8, saved; " \
            "the same command with --resume continues"
        assert not (toy.runs / name / "result.json").exists()
        assert "resumed from step 8\n" in toy(name, *flags, "--resume").end()
        assert_same_run(toy.runs / name, reference)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_while_measuring_ends_at_once(self, toy, reference, number):
        name, trap = f"late {number.name}", functools.partial(while_measuring, number)
        text = toy(name, trap=trap).end(128 + number)
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
            options.run_main(train.main)
        assert words in capsys.readouterr().err


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
        figures = result(Command(argv, tmp_path / "said.txt").end())
        assert figures["refused"] == 0 and 0 < figures["image_to_text_recall@1_chance"] < 1
        assert not any("zero_shot" in name or "composition" in name for name in figures)
        assert sorted(p.name for p in (tmp_path / "runs/clip-tar-shards").iterdir()) == [
            "config.json", "last.pt", "log.jsonl", "result.json", "samples.png", "tokenizer.model"]

    def test_what_is_refused_is_told_three_times_and_counted(self, patchy):
        folder, argv, missing = patchy
        said = (folder / "reference.txt").read_text().replace("\r", "\n")
        assert re.search("^data.jsonl: 2 of 42 records refused, e.g. .*line 41: ", said, re.M)
        told = re.findall("^refused: .*/(.*): no such picture$", said, re.M)
        assert len(told) == 3 and set(told) <= set(missing)
        run = train.build("clip", train.Options(data=argv[2], batch_size=6, steps=STEPS, skip=0.3,
                                                out=str(folder / "recount")), SIZES, 0)
        drawn = [reason for step in range(STEPS) for batch in run.batches[step]
                 for reason in batch["refused"]]
        assert len(drawn) > 3 and result(said)["refused"] == 2 + len(drawn)
        assert checkpoint.load(folder / "reference/last.pt")["data"]["refused"] == len(drawn)
        assert "refused" not in log(folder / "reference")[-1]

    def test_a_killed_run_ends_with_the_same_weights_and_refusals(self, patchy):
        folder, argv, _ = patchy
        trap = functools.partial(at_step, 16, signal.SIGKILL)
        argv = [*argv, str(folder / "killed")]
        Command(argv, folder / "killed.txt", trap).end(-signal.SIGKILL)
        # A higher --skip may be what the run needs to continue.
        Command([*argv, "--resume", "--skip", "0.5"], folder / "killed.txt").end()
        assert_same_run(folder / "killed", folder / "reference")

    def test_workers_change_nothing(self, patchy):
        folder, argv, _ = patchy
        Command([*argv, str(folder / "workers"), "--workers", "1"], folder / "workers.txt").end()
        assert_same_run(folder / "workers", folder / "reference")

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
                options.run_main(train.main)
            assert words in capsys.readouterr().err
        (folder / "data/data.jsonl").write_text(rows)

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_a_run_stops_when_the_pictures_are_gone(self, tmp_path, workers):
        argv = own(listed(tmp_path / "data", 40, bad=range(40)), "--out", str(tmp_path / "run"))
        text = Command([*argv, "--workers", workers], tmp_path / "said.txt").end(2)
        assert re.fullmatch("error: 126 of 132 records refused, e.g. .*png: no such picture: more "
                            "than --skip 0.05 allows", text.splitlines()[-1])
        assert not (tmp_path / "run/last.pt").exists()

    def own_run(self, tmp_path):
        return build(tmp_path, data=listed(tmp_path / "data", 40))

    def test_it_stops_past_the_fraction_and_not_before(self, tmp_path, capsys):
        run, loss = self.own_run(tmp_path), [torch.tensor(1.0)]
        run.step = 30                    # 180 samples: nine of 189 draws are fewer than one in 20
        train.check(run, loss, ["one", *"abcdefgh"])
        assert run.refused.count == 9 and run.loss == 1.0
        with pytest.raises(ValueError, match="10 of 190 records refused, e.g. one: more than"):
            train.check(run, loss, ["last"])
        assert capsys.readouterr().out == "refused: one\nrefused: a\nrefused: b\n"

    def test_unreadable_test_pictures_are_counted_in_the_result(self, tmp_path, capsys):
        run = self.own_run(tmp_path)
        for name in names(run.world, "test")[2:]:    # two are left, fewer than a sheet has room for
            (tmp_path / "data" / name).write_bytes(b"")
        train.measure(run)
        assert result(capsys.readouterr().out)["refused"] == 3


# A step

def calls(*names):
    """A Bigram that has these hooks; .called lists the calls of them and of forward."""
    model = Bigram()
    model.called = []
    for name in names:
        setattr(model, name, lambda *given, name=name: model.called.append((name, *given)))
    model.register_forward_hook(lambda *_: model.called.append("forward"))
    return model


def split(batch, *sizes):
    """A batch as micro-batches."""
    parts = [dict(zip(batch, rows)) for rows in zip(*(v.split(sizes) for v in batch.values()))]
    return [{name: rows.clone() for name, rows in part.items()} for part in parts]


class TestUpdate:
    def test_micro_batches_give_the_gradient_of_the_whole_batch(self):
        model, whole = Bigram(), ragged_rows()
        want = step_gradients(model, [dict(whole)])
        assert want["loss"] == model(whole, None)["lm"] and want["table.weight"].abs().max() > 0.01
        for sizes in ((2, 4), (1, 2, 3)):
            found = step_gradients(model, split(whole, *sizes))
            for name, gradient in want.items():
                torch.testing.assert_close(found[name], gradient, msg=name)

    def test_every_data_set_counts_its_own_labels_and_has_its_weight(self):
        model, whole = Bigram(), ragged_rows()
        first, second, third = split(whole, 1, 2, 3)
        found = step_gradients(model, [second | {"source": 1, "weight": 0.5},
                                       first | {"source": 1, "weight": 0.5},
                                       third | {"source": 0, "weight": 3.0}])
        # Row i has labels for i + 1 tokens, of which the first is predicted from nothing.
        assert [float(batch["label_count"]) for batch in model.seen] == [3.0, 3.0, 3 + 4 + 4]
        logits, labels = model.table(whole["ids"])[:, :-1], whole["labels"][:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 4)
        want = 0.5 * nll[:3].sum() / 3 + 3.0 * nll[3:].sum() / 11
        torch.testing.assert_close(found["loss"], want.detach())
        gradient, = torch.autograd.grad(want, model.table.weight)
        torch.testing.assert_close(found["table.weight"], gradient)

    def test_labels_are_counted_over_the_processes(self, monkeypatch):
        monkeypatch.setattr(train.distributed, "gather", lambda x: (torch.cat([x, x + 5]), 0))
        model = Bigram()
        step_gradients(model, split(ragged_rows(), 3, 3))
        assert [float(batch["label_count"]) for batch in model.seen] == [(14 + 19) / 2] * 2

    def test_a_batch_without_labels_has_no_count_and_is_not_cached(self):
        model = Bigram()
        model.forward = lambda batch, gather: model.seen.append(batch) or {
            "a": model.table.weight.sum(), "b": model.table.weight.square().sum()}
        found = step_gradients(model, [{"ids": torch.ones(2, 3)}] * 2)
        assert all(batch.keys() == {"ids", "source"} for batch in model.seen)
        w = model.table.weight.detach()
        torch.testing.assert_close(found["loss"], 2 * (w.sum() + w.square().sum()))
        torch.testing.assert_close(found["table.weight"], 2 * (1 + 2 * w))

    def test_features_are_cached_for_several_micro_batches_of_a_model_that_can(self):
        model = calls()
        model.cache_features = lambda batches, gather: [f"part {len(b['ids'])}" for b in batches]
        step_gradients(model, split(ragged_rows(), 6))
        assert "feature_gradients" not in model.seen[0]
        step_gradients(model, split(ragged_rows(), 2, 4))
        assert [b["feature_gradients"] for b in model.seen[1:]] == ["part 2", "part 4"]

    def test_hooks_are_called_before_and_after_a_step(self):
        model = calls("before_step", "after_step")
        step_gradients(model, split(ragged_rows(), 3, 3))
        assert model.called == [("before_step", 0, 9), "forward", "forward", ("after_step", 0)]
        model = calls()                  # neither is needed
        step_gradients(model, [ragged_rows()])
        assert model.called == ["forward"]

    def test_the_model_has_the_last_word_on_its_weights(self, tmp_path):
        run = build(tmp_path)
        run.model.logit_scale.data.fill_(7.0)
        train.update(run, run.model, run.batches[0])
        assert run.model.logit_scale.item() == pytest.approx(math.log(100))

    @pytest.mark.parametrize("most, want", [(1.0, 1.0), (0.5, 0.5), (None, 1e6)])
    def test_the_gradient_is_clipped_and_the_rate_is_the_schedules(self, tmp_path, most, want):
        run, norms = build(tmp_path, optimizer="adamw"), []
        run.recipe = replace(run.recipe, grad_clip=most)
        run.step, weight = 3, run.model.text_projection.weight
        step = run.optimizer.step

        def watched():
            norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item())
            step()
        run.optimizer.step = watched
        weight.register_hook(lambda grad: 1e6 * grad / grad.norm())
        train.update(run, run.model, run.batches[3])
        assert norms == [pytest.approx(want, rel=1e-3)]
        assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3 * 4 / 10}
        assert all(p.grad is None for p in run.model.parameters())
        run.optimizer.param_groups[1]["lr_multiplier"] = 10.0
        train.update(run, run.model, run.batches[3])
        slow, fast = (group["lr"] for group in run.optimizer.param_groups)
        assert fast == pytest.approx(10 * slow)

    @pytest.mark.parametrize("size", [math.inf, math.nan])
    def test_a_gradient_that_is_not_finite_shows_in_the_loss(self, size):
        model = Bigram()
        assert step_gradients(model, [ragged_rows()])["loss"].isfinite()
        model.table.weight.register_hook(lambda grad: grad * size)
        assert not step_gradients(model, [ragged_rows()])["loss"].isfinite()

    def test_frozen_parameters_stay_bit_equal(self, tmp_path, monkeypatch):
        monkeypatch.setitem(clip.TRAINS, "clip", ("text.*", "text_projection.*"))
        run = build(tmp_path)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        train.update(run, run.model, run.batches[0])
        for name, p in run.model.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith("text"), name

    def test_bf16_is_for_the_products_alone(self, tmp_path):
        losses = []
        for precision in ("fp32", "bf16"):
            run = build(tmp_path / precision, precision=precision)
            losses.append(train.update(run, run.model, run.batches[0]).item())
            assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


class TestBuild:
    def test_the_seed_is_of_the_weights_and_of_the_order(self, tmp_path):
        runs = [build(tmp_path / str(number), seed=seed) for number, seed in enumerate((3, 3, 4))]
        one, same, other = (run.model.text_projection.weight for run in runs)
        assert torch.equal(one, same) and not torch.equal(one, other)
        one, same, other = (run.batches.keys(0, 0) for run in runs)
        assert one == same != other

    def test_a_resumed_run_has_the_time_and_the_loss_of_its_checkpoint(self, tmp_path):
        run = build(tmp_path)
        run.began, run.loss, run.step = run.began - 1000, 0.25, 7
        train.save(run)
        again = build(tmp_path, resume=True)
        assert 1000 <= again.elapsed() < 1060
        assert (again.loss, again.step, again.saved) == (0.25, 7, 7)

    def test_unfreeze_trains_more_and_the_table_says_what(self, tmp_path, monkeypatch):
        monkeypatch.setitem(clip.TRAINS, "clip", ("text.*",))
        run = build(tmp_path, unfreeze="logit_scale,vision.ln_post.*")
        trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
        assert {name for name in trained if not name.startswith("text.")} \
            == {"logit_scale", "vision.ln_post.weight", "vision.ln_post.bias"}
        assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(trained)
        assert re.search(r"^  logit_scale +1  trained$", run.table, re.M)

    def test_the_optimizer_is_the_recipes_or_that_of_the_flag(self, tmp_path):
        assert str(build(tmp_path / "a").optimizer).startswith("Muon (")
        assert str(build(tmp_path / "b", optimizer="adamw").optimizer).startswith("AdamW (")
        assert build(tmp_path / "c", optimizer="adamw").recipe.optimizer == "adamw"
        for precision, half in (("bf16", True), ("fp32", False)):
            run = build(tmp_path / precision, precision=precision)
            assert run.optimizer.param_groups[0]["half"] is half

    def test_the_vocabulary_is_the_tokenizers(self, tmp_path):
        run = build(tmp_path)
        assert run.config.vocab_size == len(run.tokenizer) and run.config.eos_id == 2
        assert run.model.text.token_embed.weight.shape[0] == len(run.tokenizer)

    def test_the_attention_is_that_of_the_flag(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train.transformer, "ATTENTION", "auto")
        build(tmp_path, attention="hand")
        assert train.transformer.ATTENTION == "hand"


class TestTrain:
    def test_the_clock_starts_with_the_program_or_with_the_stage(self, tmp_path, monkeypatch):
        run = build(tmp_path)
        run.began -= 100
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

    def test_every_stage_has_a_recipe_for_every_preset(self):
        for name, stage in train.STAGES.items():
            assert name in stage.file.TRAINS
            for preset, config in stage.file.PRESETS.items():
                find_recipe(stage.file.RECIPES, preset, "shapes", {})
                with pytest.raises(FrozenInstanceError):     # stages share them
                    config.vocab_size = 3
        assert {stage for stages in train.LISTS.values() for stage in stages} <= set(train.STAGES)
