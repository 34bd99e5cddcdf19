"""Flamingo in train.py: its data sets, what is frozen, runs, and the commands of flamingo.py."""
import functools
import json
import pickle
import random
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train
from common.data.batches import open_world, world_tokenizer
from common.data.tokenizer import Tokenizer
from common.language import LanguageConfig
from common.training.lm import Pretraining
from common.training.optimizer import freeze, make_optimizer, parameter_groups
from flamingo import RECIPES, TRAINS, Flamingo, data_sources
from tests.helpers import (Words, command, drawing, flamingo_config, listed, make_batch,
                           make_images, mistake, names, toy_flamingo)
from tests.training.runs import SETTINGS, Toy, assert_same, pair, toy_options, weights

TRAINED = ("resampler.", "gated.", "lm.new.")


@pytest.fixture(scope="module", autouse=True)
def short_evaluation():
    """Evaluate Flamingo on 4 records instead of 400, the language model on none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flamingo, "evaluate", functools.partialmethod(Flamingo.evaluate, count=4))
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two-step runs of clip (clip-toy), lm (lm-toy) and flamingo (one)."""
    folder = tmp_path_factory.mktemp("flamingo")
    for stage, out in (("clip", "clip-toy"), ("lm", "lm-toy"), ("flamingo", "one")):
        assert start(stage, runs=str(folder), out=str(folder / out)) == 0
    return folder


def start(stage="flamingo", **options):
    """A two-step run of a stage -> its exit status."""
    return train.train(stage, toy_options(**options), SETTINGS[stage])


def result(folder):
    return json.loads((folder / "result.json").read_text())


class TestFrozen:
    def frozen(self):
        model = toy_flamingo()
        freeze(model, TRAINS["flamingo"])
        return model

    @pytest.mark.parametrize("preset", ["tiny", ""])
    def test_steps_with_weight_decay_change_what_is_trained_and_nothing_else(self, preset):
        model = self.frozen()
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(model, replace(RECIPES[preset], lr=0.01))
        for _ in range(3):
            optimizer.zero_grad()
            model(make_batch("..I...I", "I......"))["lm"].backward()
            optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith(TRAINED), name

    def test_gates_learn_faster_and_the_resampler_does_not_decay(self):
        model = self.frozen()
        assert RECIPES[""].optimizer == "adamw", "the paper's"
        found = {id(p): (group["lr_multiplier"], group["weight_decay"])
                 for group in parameter_groups(model, RECIPES[""]) for p in group["params"]}
        for name, p in model.named_parameters():
            if name.startswith(TRAINED):
                rate = 10.0 if name.endswith("_gate") else 1.0
                decays = p.ndim > 1 and not name.startswith("resampler")
                assert found[id(p)] == (rate, 0.1 if decays else 0.0), name

    def test_training_puts_the_trained_parts_alone_into_train_mode(self):
        model = self.frozen().eval().train()
        assert not any(m.training for m in (*model.vision.modules(), *model.lm.blocks.modules()))
        assert model.resampler.training and model.gated.training

    def test_features_have_a_graph_only_while_the_vision_encoder_is_trained(self):
        model, features = self.frozen(), []
        model.resampler.register_forward_hook(lambda m, x, out: features.append(x[0]))
        assert model.encode_images(make_images()).requires_grad and not features[0].requires_grad
        freeze(model, (*TRAINS["flamingo"], "vision.*"))
        model.encode_images(make_images()).sum().backward()
        assert model.vision.patch_embed.weight.grad.abs().max() > 0


class TestDataSources:
    def table(self, **changes):
        return [(s.share, s.weight, s.kinds, s.collate.p_next_image) for s in data_sources(
            Toy(image_size=15), Words(), replace(flamingo_config(), **changes))]

    def test_those_of_a_world_with_tasks_and_of_one_without(self, monkeypatch):
        table = self.table()
        assert table == [(2, 1.0, {"document": 3, "album": 1}, 0.5),
                         (2, 2.0, {"names": 2, "episode": 1}, 0.0),
                         (2, 1.0, {"glossary": 1}, 0.0),
                         (8, 2.5, {"caption": 1, "question": 1}, 0.0), (2, 2.0, {"clip": 1}, 0.0)]
        assert {kind for _, _, kinds, _ in table for kind in kinds} == \
            {*Toy.tasks} - {"noisy", "dialogue", "two_pictures", "statement", "instruction", "chat",
                            "choice", "text_question", "probe", "grounding", "reading", "questions",
                            "conversation", "detail", "reasoning"}
        assert self.table(p_next_image=0.25)[0][3] == 0.25
        assert self.table(interleaved=False) == table[3:]

        monkeypatch.setattr(Toy, "tasks", ())                  # only captions
        assert self.table() == [(1, 1.0, None, 0.0)]

    @pytest.mark.parametrize("stage", ["lm", "flamingo"])
    def test_they_can_be_sent_to_workers(self, stage):
        world = Toy(image_size=15)
        sources = train.STAGES[stage].file.data_sources(
            world, world_tokenizer(world), flamingo_config(language=LanguageConfig()))
        for both in zip(sources, pickle.loads(pickle.dumps(sources)), strict=True):
            one, other = (s.collate([s.record(3, random.Random(7))], [random.Random(8)])
                          for s in both)
            assert_same("batch", other, one)


def quick_end():
    """A trap: the run ends without figures."""
    train.measure = lambda run: None


class TestRuns:
    def test_the_frozen_parts_are_those_of_their_runs(self, runs):
        one, vision, lm = (weights(runs / name) for name in ("one", "clip-toy", "lm-toy"))
        for parts, head in ((vision, "vision."), (lm, "lm.")):
            own = {name: w for name, w in parts.items() if name.startswith(head)}
            assert own
            assert_same(f"{head}*", {name: one[name] for name in own}, own)
        assert (one["gated.2.attn_gate"] != 0.5).all() and one["lm.new.rows"].shape == (2, 20)

    def test_every_figure_has_a_name(self, runs):
        found = result(runs / "one")
        for name in ("caption_accuracy two_images_latest document_accuracy vqa_accuracy_blind "
                     "vqa_accuracy_4_retrieved_shots video_accuracy_16_frames shots_8 shots_0 "
                     "caption_accuracy_single vqa_accuracy shots_8_shuffled").split():
            assert 0 <= found[name] <= 1, name
        assert found["perplexity"] > 1 < found["perplexity_lm"]
        assert 0 < found["trainable_parameters"] < found["parameters"]

    def test_resuming_and_measuring_need_no_other_run(self, runs, tmp_path, monkeypatch, capsys):
        begin = functools.partial(start, runs=str(runs), out=str(tmp_path / "two"), save_every=1)
        update = train.update
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", lambda run, *given: setattr(
                run, "stopped", signal.SIGTERM) or update(run, *given))
            assert begin() == 143
        for flag, step in (("resume", 1), ("eval_only", 2)):
            assert begin(**{flag: True}, runs=str(tmp_path / "nowhere")) == 0
            assert f"resumed from step {step}" in capsys.readouterr().out
        assert_same("weights", weights(tmp_path / "two"), weights(runs / "one"))

    def test_ones_own_pictures_train_it_and_missing_ones_are_refused(self, runs, tmp_path):
        spec = listed(tmp_path / "data", 40)
        (tmp_path / "data" / names(open_world(spec, 32), "test")[0]).unlink()
        assert start(data=spec, skip=0.5, out=str(tmp_path / "own"), parts=[
            f"vision={runs / 'clip-toy'}", f"language={runs / 'lm-toy'}"]) == 0
        found = result(tmp_path / "own")
        assert found["refused"] == 1 and 0 <= found["caption_accuracy"] <= 1
        assert not any(name.startswith(("vqa", "shots", "two")) for name in found)

    def test_the_tokenizer_is_the_language_models(self, runs, tmp_path):
        shutil.copytree(runs / "clip-toy", tmp_path / "clip")
        other = Tokenizer.train(["wholly other words", "than those of the toys"], 380)
        (tmp_path / "clip" / "tokenizer.model").write_bytes(other.model)
        run = train.build("flamingo", toy_options(runs=str(runs), out=str(tmp_path / "new"), parts=[
            f"vision={tmp_path / 'clip'}"]), SETTINGS["flamingo"], 0.0)
        assert run.tokenizer.model == Tokenizer.load(runs / "lm-toy" / "tokenizer.model").model

    def two(self, runs, folder, *flags):
        """Run two processes to their end."""
        argv = ["flamingo", "--data", "toy", "--steps", "2", "--precision", "fp32", "--runs",
                str(runs), "--out", str(folder), *(f"--set={s}" for s in SETTINGS["flamingo"])]
        for process in pair([*argv, *flags], folder, (quick_end, quick_end)):
            process.end()

    def test_two_processes_end_with_the_weights_of_one(self, runs, tmp_path, monkeypatch):
        # At least one sample a process, data set and micro-batch.
        self.two(runs, tmp_path / "two", "--batch_size", "64", "--accumulate", "2")
        monkeypatch.setattr(train, "measure", lambda run: None)
        assert start(runs=str(runs), batch_size=64, out=str(tmp_path / "one")) == 0
        assert_same("weights", weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-5)

    def test_two_processes_train_what_is_unfrozen_too(self, runs, tmp_path):
        # The last norm of the unfrozen encoder is not used: no process has a gradient of it.
        self.two(runs, tmp_path / "two", "--batch_size", "32", "--unfreeze", "vision.*")
        old, new = weights(runs / "clip-toy"), weights(tmp_path / "two")
        assert not torch.equal(old["vision.cls_token"], new["vision.cls_token"])


class TestMain:
    @pytest.fixture(autouse=True)
    def pictures(self, tmp_path, monkeypatch):
        """The current folder: a picture, a film of 4 frames, a folder of 2, examples."""
        red, blue = drawing("red", "blue", size=20)
        (tmp_path / "frames").mkdir()
        for name, picture in (("red", red), ("frames/1", red), ("frames/2", blue)):
            picture.save(tmp_path / f"{name}.png")
        red.save(tmp_path / "film.gif", save_all=True, append_images=[blue, red, blue])
        (tmp_path / "shots.jsonl").write_text(
            '{"image": "red.png", "question": "is it blue?", "answer": "no"}\n' * 3)
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("argv", [
        "caption red.png", "caption film.gif", "caption frames", "answer frames colour?",
        "answer red.png blue? --shot red.png blue? no --support shots.jsonl --shots 2"])
    def test_captions_and_answers_are_one_line(self, runs, argv):
        status, out, err = command("flamingo.py", runs / "one", *argv.split())
        told = "frames: taken as a clip of 2 frames\n" if argv == "caption frames" else ""
        assert (status, out.count("\n"), err) == (0, 1, told)

    @pytest.mark.parametrize("argv, run, words", [
        ("answer red.png blue? --shot film.gif what? red", "one", "clips of 1 and 4 frames"),
        ("answer red.png " + "what,colour,is,it?," * 40, "one", "but the context is 256"),
        ("caption absent.png", "one", "absent.png: no such picture"),
        ("caption red.png", "none", "no run here .*; python train.py flamingo --out .*none makes"),
        ("caption red.png", "lm-toy", "a run of 'common.training.lm', not of 'flamingo'")])
    def test_mistakes_are_one_line(self, runs, argv, run, words):
        assert re.search(words, mistake("flamingo.py", runs / run, *argv.split()))
