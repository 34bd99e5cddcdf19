"""Flamingo's data sets, its loss over several of them, and runs of train.py."""
import json
import math
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

import flamingo
import train
from common.data.batches import open_world
from common.data.tokenizer import IMAGE, Tokenizer
from common.losses import count_labels
from common.training.optimizer import freeze, parameter_groups
from flamingo import RECIPES, TRAINS, Flamingo, FlamingoConfig
from tests.flamingo.toys import CONFIG, SETTINGS, options, seeded_flamingo
from tests.helpers import Words, drawing, listed, names
from tests.runs import Toy, pair, weights


def batch(*rows, N=3, weight=1.0, source=0, attend_next=None):
    """A batch from pictures of texts: I is <image>, anything else a random word."""
    ids = torch.randint(6, 43, (len(rows), max(map(len, rows))))
    for row, text in zip(ids, rows):
        for place, letter in enumerate(text):
            row[place] = IMAGE if letter == "I" else row[place]
    return {"images": torch.randint(256, (len(rows), N, 1, 3, 15, 15), dtype=torch.uint8),
            "ids": ids, "labels": torch.where(ids == IMAGE, -100, ids), "weight": weight,
            "source": source, "attend_next": torch.tensor(attend_next or [False] * len(rows))}


def data_sets():
    """Batches of three data sets with weights and lengths of their own, always the same."""
    torch.manual_seed(2)
    return [batch("..I...I", "I......", "...I..I", "I.I....", weight=1.0, source=0),
            batch(".I..", "I...", "..I.", "I..I", weight=0.2, source=1),
            batch("I.........", "I........I", ".........I", "I..I.....I", weight=0.03, source=2,
                  attend_next=[True, False, True, True])]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestLoss:
    def test_it_starts_at_log_of_the_vocabulary(self):
        torch.manual_seed(0)
        loss = Flamingo(CONFIG)(batch("..I...I" * 5, "I......" * 5, N=10))["lm"].item()
        assert loss == pytest.approx(math.log(43), rel=0.1)

    def want(self, model):
        """The weighted sum of the gradients of each data set's mean over its tokens."""
        total = {}
        for given in data_sets():
            logs = model.logits(given["ids"], visual=model.encode_images(given["images"]),
                                attend_next=given["attend_next"]).log_softmax(-1)
            own = [-logs[b, t - 1, label] for b, row in enumerate(given["labels"].tolist())
                   for t, label in enumerate(row) if t and label != -100]
            for name, grad in gradients(model, sum(own) / len(own)).items():
                total[name] = total.get(name, 0) + given["weight"] * grad
        return total

    @pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
    def test_a_step_sums_the_weighted_means_of_all_data_sets(self, sizes, monkeypatch):
        model, found = seeded_flamingo(), {}
        want = self.want(model)
        micro = [{k: v.split(sizes)[i] if isinstance(v, torch.Tensor) else v
                  for k, v in given.items()} for given in data_sets() for i in range(len(sizes))]

        def clipped(parameters, norm):
            found.update({n: p.grad.clone() for n, p in model.named_parameters()
                          if p.grad is not None})
            return torch.tensor(0.0)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
        run = train.Run("flamingo", train.STAGES["flamingo"], options(), None, torch.device("cpu"),
                        False, None, None, CONFIG, RECIPES[""], None, model,
                        train.make_optimizer(model, RECIPES[""]), "", 0.0)
        model.zero_grad()
        train.update(run, model, micro)
        for name in want:
            torch.testing.assert_close(found[name], want[name], atol=1e-6, rtol=1e-6)

    def test_the_label_count_is_that_of_the_step(self):
        model, (given, *_) = seeded_flamingo(), data_sets()
        count = count_labels([given["labels"]])
        whole = model(given)["lm"]
        torch.testing.assert_close(model(given | {"label_count": 2 * count})["lm"], whole / 2)


class TestDataSources:
    def test_those_of_a_world_with_tasks(self):
        sources = flamingo.data_sources(Toy(image_size=15), Words(), CONFIG)
        assert [s.share for s in sources] == [2, 3, 5, 9, 1]
        assert [s.weight for s in sources] == [1.0, 2.0, 1.0, 2.5, 1.0]
        assert [s.collate.p_next_image for s in sources] == [0.5, 0, 0, 0, 0]    # pages alone
        assert [set(s.kinds) for s in sources] == [
            {"document", "album"}, {"names", "episode"}, {"glossary"}, {"caption", "question"},
            {"clip"}]

    def test_interleaved_pages_can_be_left_out(self):
        sources = flamingo.data_sources(Toy(image_size=15), Words(),
                                        replace(CONFIG, interleaved=False))
        assert [s.share for s in sources] == [9, 1]

    def test_a_world_without_tasks_has_its_captions(self):
        world = Toy(image_size=15)
        world.tasks = ()
        source, = flamingo.data_sources(world, Words(), CONFIG)
        assert (source.world, source.kinds, source.weight) == (world, None, 1.0)
        assert source.collate.p_next_image == 0


def test_gates_learn_faster_and_the_resampler_does_not_decay():
    model = seeded_flamingo()
    freeze(model, TRAINS["flamingo"])
    groups = parameter_groups(model, RECIPES[""])
    fast = {id(p) for g in groups if g["lr_multiplier"] == 10 for p in g["params"]}
    still = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    gates = {id(p) for name, p in model.named_parameters() if name.endswith("_gate")}
    assert fast == gates and len(gates) == 6
    assert {id(p) for p in model.resampler.parameters()} | gates <= still


def test_frozen_parts_stay_in_eval_mode_and_get_no_gradient():
    model = seeded_flamingo()
    freeze(model, TRAINS["flamingo"])
    model.train()
    assert model.resampler.training and model.gated[0].training
    assert not any(m.training for part in (model.vision, model.lm.blocks) for m in part.modules())
    model(batch("..I...I", "I......"))["lm"].backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("vision.", "lm.blocks")) for name in got)


def result(folder):
    return json.loads((folder / "result.json").read_text())


class TestRuns:
    def test_the_frozen_parts_are_those_of_their_runs(self, runs):
        one, vision, lm = (weights(runs / name) for name in ("one", "clip-toy", "lm-toy"))
        for parts, head in ((vision, "vision."), (lm, "lm.")):
            own = {name: w for name, w in parts.items() if name.startswith(head)}
            assert own and all(torch.equal(one[name], w) for name, w in own.items())
        assert (one["gated.2.attn_gate"] != 0.5).all() and one["lm.new.rows"].shape == (2, 20)

    def test_every_figure_has_a_name(self, runs):
        found = result(runs / "one")
        for name in ("caption_accuracy", "caption_accuracy_single", "two_images_latest",
                     "vqa_accuracy", "vqa_accuracy_trained_wordings", "vqa_accuracy_blind",
                     "vqa_accuracy_4_random_shots", "vqa_accuracy_4_retrieved_shots",
                     "document_accuracy", "video_accuracy", "video_accuracy_16_frames", "shots_0",
                     "shots_8", "shots_8_shuffled"):
            assert 0 <= found[name] <= 1
        assert found["perplexity"] > 1 < found["perplexity_lm"]
        assert 0 < found["trainable_parameters"] < found["parameters"]

    def test_it_comes_back_as_it_was_saved(self, runs):
        writer = flamingo.from_pretrained(runs / "one")
        config = json.loads((runs / "one/config.json").read_text())
        assert writer.model.config == FlamingoConfig(**config["config"])
        assert config["stage"] == "flamingo"
        assert not writer.model.training
        assert [g is not None for g in writer.model.gated] == [True, False, True]
        for name, w in weights(runs / "one").items():
            assert torch.equal(writer.model.state_dict()[name], w)
        assert len(writer.generate([{"images": drawing("red", size=50), "texts": [""]}])) == 1

    def test_resuming_and_measuring_again_need_no_other_run(
            self, runs, tmp_path, monkeypatch, capsys):
        where = options(runs=str(runs), out=str(tmp_path / "two"), steps=2, save_every=1)
        update = train.update

        def power_cut(run, *arguments):
            if run.step == 1:
                raise ValueError("power cut")
            return update(run, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", power_cut)
            with pytest.raises(ValueError, match="power cut"):
                train.train("flamingo", where, SETTINGS["flamingo"])
        for flag in ("resume", "eval_only"):
            there = replace(where, **{flag: True}, parts=["vision=nowhere", "language=nowhere"])
            assert train.train("flamingo", there, SETTINGS["flamingo"]) == 0
            assert f"resumed from step {1 if flag == 'resume' else 2}" in capsys.readouterr().out
        one, two = weights(runs / "one"), weights(tmp_path / "two")
        assert all(torch.equal(two[name], w) for name, w in one.items())

    def test_ones_own_pictures_train_it_and_missing_ones_are_refused(self, runs, tmp_path):
        spec = listed(tmp_path / "data", 40)
        (tmp_path / "data" / names(open_world(spec, 32), "test")[0]).unlink()
        assert train.train("flamingo", options(
            data=spec, skip=0.5, out=str(tmp_path / "own"), parts=[
                f"vision={runs / 'clip-toy'}", f"language={runs / 'lm-toy'}"]),
            SETTINGS["flamingo"]) == 0
        found = result(tmp_path / "own")
        assert found["refused"] == 1 and 0 <= found["caption_accuracy"] <= 1
        assert not any(name.startswith(("vqa", "shots", "two")) for name in found)

    @pytest.mark.parametrize("part, stage", [("vision", "clip"), ("language", "lm")])
    def test_a_missing_run_names_the_command_that_makes_it(self, runs, part, stage):
        with pytest.raises(ValueError, match=f"--from {part}=nowhere: nowhere: no run here .*; "
                                             f"python train.py {stage} --data toy --out nowhere "
                                             "makes one"):
            train.train("flamingo", options(runs=str(runs), parts=[f"{part}=nowhere"]), [])

    @pytest.mark.parametrize("preset, flags", [("small", " --preset small"), ("3B", "")])
    def test_the_command_has_the_preset_and_data_that_the_stage_has(self, preset, flags, tmp_path):
        out = tmp_path / f"clip-emoji-{preset}"
        with pytest.raises(ValueError, match=f"; python train.py clip --data emoji{flags} --out "
                                             f"{re.escape(str(out))} makes one"):
            train.train("flamingo", train.Options(runs=str(tmp_path), data="emoji", preset=preset),
                        [])

    def test_a_run_of_another_model_is_refused(self, runs):
        with pytest.raises(ValueError, match="lm-toy: a run of 'common.training.lm', not of 'clip'"):
            train.train("flamingo", options(runs=str(runs), parts=[f"vision={runs / 'lm-toy'}"]),
                        [])
        for flag in ("resume", "eval_only"):
            with pytest.raises(ValueError, match="clip-toy: a run of 'clip', not of 'flamingo'"):
                train.train("flamingo", options(runs=str(runs), out=str(runs / "clip-toy"),
                                                **{flag: True}), [])

    @pytest.mark.parametrize("size, accumulate", [(12, 1), (20, 2)])
    def test_a_batch_that_cannot_be_shared_is_refused(self, runs, size, accumulate):
        with pytest.raises(ValueError, match=f"batch_size {size} does not divide into 20 shares"):
            train.train("flamingo", options(runs=str(runs), batch_size=size,
                                            accumulate=accumulate), [])

    def test_the_tokenizer_is_the_language_models(self, runs, tmp_path):
        shutil.copytree(runs / "clip-toy", tmp_path / "clip")
        other = Tokenizer.train(["wholly other words", "than those of the toys"], 380)
        (tmp_path / "clip" / "tokenizer.model").write_bytes(other.model)
        run = train.build("flamingo", options(runs=str(runs), out=str(tmp_path / "new"), parts=[
            f"vision={tmp_path / 'clip'}"]), SETTINGS["flamingo"], 0.0)
        assert run.tokenizer.model == Tokenizer.load(runs / "lm-toy" / "tokenizer.model").model

    @pytest.mark.parametrize("name", ["vision", "language"])
    def test_a_config_of_another_version_is_refused(self, name):
        fields = asdict(getattr(CONFIG, name)) | {"unheard": 1}
        with pytest.raises(ValueError, match=f"{name}: a config of another version .*unheard"):
            replace(CONFIG, **{name: fields})

    def test_a_part_is_not_set_but_comes_from_a_run(self, runs):
        with pytest.raises(ValueError, match="vision is the config of another run; --from vision="):
            train.train("flamingo", options(runs=str(runs)), ["vision=runs/clip"])

    def argv(self, runs, *flags):
        argv = ["flamingo", "--data", "toy", "--runs", str(runs), "--steps", "2", "--precision",
                "fp32", "--device", "cpu", *flags]
        for setting in SETTINGS["flamingo"]:
            argv += ["--set", setting]
        return argv

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_two_processes_end_with_the_weights_of_one(self, runs, tmp_path, accumulate):
        size = 40 * accumulate           # at least one sample a process, data set and micro-batch
        both = pair(self.argv(runs, "--batch_size", str(size), "--accumulate", str(accumulate),
                              "--out", str(tmp_path / "two")), tmp_path / "two",
                    (quick_end, quick_end))
        assert train.train("flamingo", options(runs=str(runs), batch_size=size,
                                               out=str(tmp_path / "one")),
                           SETTINGS["flamingo"]) == 0
        for process in both:
            process.end()
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0, msg=name)

    def test_two_processes_train_what_is_unfrozen_too(self, runs, tmp_path):
        # The last norm of the unfrozen encoder is not used: no process has a gradient of it.
        argv = self.argv(runs, "--batch_size", "40", "--unfreeze", "vision.*", "--out",
                         str(tmp_path / "two"))
        for process in pair(argv, tmp_path / "two", (quick_end, quick_end)):
            process.end()
        old, new = weights(runs / "clip-toy"), weights(tmp_path / "two")
        assert not torch.equal(old["vision.cls_token"], new["vision.cls_token"])


def quick_end():
    """No evaluation in a forked process."""
    from PIL import Image
    Flamingo.evaluate = lambda self, data: {}
    Flamingo.samples = lambda self, data: Image.new("RGB", (2, 2))
