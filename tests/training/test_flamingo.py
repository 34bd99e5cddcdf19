"""The loss, a step over several data sets, frozen parts, data sets, and runs of train.py."""
import json
import math
import pickle
import random
import shutil
from dataclasses import replace

import pytest
import torch

import flamingo
import train
from common.data.batches import open_world, world_tokenizer
from common.data.tokenizer import Tokenizer
from common.training.optimizer import freeze, make_optimizer, parameter_groups
from flamingo import RECIPES, TRAINS, Flamingo, FlamingoConfig, data_sources
from tests.helpers import (Words, assert_close, drawing, flamingo_config, listed, make_batch, make_images, names,
    toy_flamingo)
from tests.training.runs import SETTINGS, Toy, toy_options, pair, step_gradients, weights

TRAINED = ("resampler.", "gated.", "lm.new.")


def nll(model, batch):
    """-log p of every label given the tokens before it, one by one."""
    logs = model.logits(batch["ids"], visual=model.encode_images(batch["images"]),
                        attend_next=batch["attend_next"]).log_softmax(-1)
    return [-logs[b, t - 1, label] for b, row in enumerate(batch["labels"].tolist())
            for t, label in enumerate(row) if t and label != -100]


class TestLoss:
    def test_it_is_the_mean_over_labels_each_predicted_from_the_token_before(self):
        model, batch = toy_flamingo(), make_batch("..I...I", "I......", attend_next=[False, True])
        want = nll(model, batch)
        assert_close("outputs", model(batch)["lm"].item(), sum(want).item() / len(want), 1e-5)
        assert_close("outputs", model(batch | {"label_count": torch.tensor(40.0)})["lm"].item(),
              sum(want).item() / 40, 1e-5)

    def test_it_starts_at_log_of_the_vocabulary(self):
        batch = make_batch("..I...I" * 5, "I......" * 5, N=10)
        assert Flamingo(flamingo_config())(batch)["lm"].item() == pytest.approx(math.log(43), rel=0.1)

    def test_a_batch_without_labels_gives_0(self):
        batch = make_batch("..I", "I..")
        assert toy_flamingo()(batch | {"labels": torch.full((2, 3), -100)})["lm"] == 0


class TestStep:
    """The gradient of a step is of the weighted sum of each data set's mean over its labels."""

    def batches(self):
        return [make_batch("..I...I", "I......", "...I..I", "I.I....")
                | {"source": 0, "weight": 1.0},
                make_batch(".I..", "I...", "..I.", "I..I") | {"source": 1, "weight": 0.2},
                make_batch("I.........", "I........I", ".........I", "I..I.....I",
                           attend_next=[True, False, True, True]) | {"source": 2, "weight": 0.03}]

    def gradients(self, model, batches):
        """By the definition: {name: gradient}."""
        model.zero_grad()
        for batch in batches:
            losses = nll(model, batch)
            (batch["weight"] * sum(losses) / len(losses)).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    def split(self, batch, sizes):
        """A batch as micro-batches."""
        return [{k: v.split(sizes)[i] if isinstance(v, torch.Tensor) else v
                 for k, v in batch.items()} for i in range(len(sizes))]

    @pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
    def test_of_micro_batches(self, sizes):
        model, batches = toy_flamingo(), self.batches()
        want = self.gradients(model, batches)
        found = step_gradients(model, [part for b in batches for part in self.split(b, sizes)])
        for name in want:
            assert_close("outputs", found[name], want[name], 1e-6)

    def test_of_two_processes_the_mean_is_that_of_one(self, monkeypatch):
        model, batches = toy_flamingo(), self.batches()
        want = self.gradients(model, batches)
        shares = list(zip(*(self.split(batch, [1, 3]) for batch in batches)))
        counts = [[(part["labels"][:, 1:] != -100).sum().float() for part in share]
                  for share in shares]

        def step(rank):
            expected = iter(zip(*counts))    # the data sets come in one order everywhere

            def gather(x):
                both = next(expected)
                assert x.item() == both[rank]
                return torch.stack(both)[:, None], rank
            monkeypatch.setattr(train.distributed, "gather", gather)
            return step_gradients(model, shares[rank])
        one, two = step(0), step(1)
        for name in want:
            assert_close("outputs", (one[name] + two[name]) / 2, want[name], 1e-6)


class TestFrozen:
    def frozen(self, **changes):
        model = toy_flamingo(**changes)
        freeze(model, TRAINS["flamingo"])
        return model

    def gradients(self, model):
        model(make_batch("..I...I", "I......"))["lm"].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def test_with_gates_at_0_only_they_and_the_new_tokens_have_a_gradient(self):
        for name, grad in self.gradients(self.frozen(gate=0.0)).items():
            if not name.startswith(TRAINED):
                assert grad is None, name
            else:
                assert grad is not None, name
                assert (grad.abs().max() > 0) == (name.endswith("_gate") or "lm.new" in name), name

    def test_with_other_gates_all_trained_parameters_have_one(self):
        for name, grad in self.gradients(self.frozen()).items():
            trained = name.startswith(TRAINED)
            assert (grad is not None) == trained, name
            if name == "resampler.frames.weight":        # these are images, not clips
                assert grad[0].abs().min() > 0 == grad[1:].abs().max()
            elif trained:
                assert grad.abs().max() > 0, name

    @pytest.mark.parametrize("preset", ["tiny", ""])
    def test_steps_with_weight_decay_change_what_is_trained_and_nothing_else(self, preset):
        model = self.frozen()
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = make_optimizer(model, replace(RECIPES[preset], lr=0.01))
        for _ in range(3):
            optimizer.zero_grad()
            self.gradients(model)
            optimizer.step()
        for name, p in model.named_parameters():
            trained = name.startswith(TRAINED)
            assert torch.equal(p, before[name]) != trained, name

    def test_gates_learn_faster_and_the_resampler_does_not_decay(self):
        model = self.frozen()
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
        visual = model.encode_images(make_images())
        assert features[0].grad_fn is None and visual.grad_fn is not None
        freeze(model, (*TRAINS["flamingo"], "vision.*"))
        model.encode_images(make_images()).sum().backward()
        assert model.vision.patch_embed.weight.grad.abs().max() > 0


class TestDataSources:
    def table(self, **changes):
        return [(s.share, s.weight, s.kinds, s.collate.p_next_image) for s in data_sources(
            Toy(image_size=15), Words(), replace(flamingo_config(), **changes))]

    def test_those_of_a_world_with_tasks(self):
        table = self.table()
        assert table == [(2, 1.0, {"document": 3, "album": 1}, 0.5),
                         (2, 2.0, {"names": 2, "episode": 1}, 0.0),
                         (2, 1.0, {"glossary": 1}, 0.0),
                         (8, 2.5, {"caption": 1, "question": 1}, 0.0), (2, 2.0, {"clip": 1}, 0.0)]
        assert {kind for _, _, kinds, _ in table for kind in kinds} == set(Toy.tasks)
        assert self.table(p_next_image=0.25)[0][3] == 0.25

    def test_interleaved_pages_can_be_left_out(self):
        assert self.table(interleaved=False) == self.table()[3:]

    def test_a_world_without_tasks_has_its_captions(self):
        world = Toy(image_size=15)
        world.tasks = ()
        source, = data_sources(world, Words(), flamingo_config())
        assert (source.world, source.kinds, source.weight) == (world, None, 1.0)
        assert source.collate.p_next_image == 0

    @pytest.mark.parametrize("stage", ["lm", "flamingo"])
    def test_they_can_be_sent_to_workers(self, stage):
        world = Toy(image_size=15)
        config = replace(flamingo_config(), language=replace(flamingo_config().language, context_length=256))
        sources = train.STAGES[stage].file.data_sources(world, world_tokenizer(world), config)
        for both in zip(sources, pickle.loads(pickle.dumps(sources)), strict=True):
            one, other = (s.collate([s.record(3, random.Random(7))], [random.Random(8)])
                          for s in both)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


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
        where = toy_options(runs=str(runs), out=str(tmp_path / "two"), steps=2, save_every=1)
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
        assert train.train("flamingo", toy_options(
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
            train.train("flamingo", toy_options(runs=str(runs), parts=[f"{part}=nowhere"]), [])

    def test_a_run_of_another_model_is_refused(self, runs):
        with pytest.raises(ValueError, match="lm-toy: a run of 'common.training.lm', not of "
                                             "'clip'"):
            train.train("flamingo", toy_options(runs=str(runs), parts=[f"vision={runs / 'lm-toy'}"]),
                        [])
        for flag in ("resume", "eval_only"):
            with pytest.raises(ValueError, match="clip-toy: a run of 'clip', not of 'flamingo'"):
                train.train("flamingo", toy_options(runs=str(runs), out=str(runs / "clip-toy"),
                                                **{flag: True}), [])

    def test_the_tokenizer_is_the_language_models(self, runs, tmp_path):
        shutil.copytree(runs / "clip-toy", tmp_path / "clip")
        other = Tokenizer.train(["wholly other words", "than those of the toys"], 380)
        (tmp_path / "clip" / "tokenizer.model").write_bytes(other.model)
        run = train.build("flamingo", toy_options(runs=str(runs), out=str(tmp_path / "new"), parts=[
            f"vision={tmp_path / 'clip'}"]), SETTINGS["flamingo"], 0.0)
        assert run.tokenizer.model == Tokenizer.load(runs / "lm-toy" / "tokenizer.model").model

    def argv(self, runs, *flags):
        argv = ["flamingo", "--data", "toy", "--runs", str(runs), "--steps", "2", "--precision",
                "fp32", "--device", "cpu", *flags]
        for setting in SETTINGS["flamingo"]:
            argv += ["--set", setting]
        return argv

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_two_processes_end_with_the_weights_of_one(self, runs, tmp_path, accumulate):
        size = 32 * accumulate           # at least one sample a process, data set and micro-batch
        both = pair(self.argv(runs, "--batch_size", str(size), "--accumulate", str(accumulate),
                              "--out", str(tmp_path / "two")), tmp_path / "two",
                    (quick_end, quick_end))
        assert train.train("flamingo", toy_options(runs=str(runs), batch_size=size,
                                               out=str(tmp_path / "one")),
                           SETTINGS["flamingo"]) == 0
        for process in both:
            process.end()
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0, msg=name)

    def test_two_processes_train_what_is_unfrozen_too(self, runs, tmp_path):
        # The last norm of the unfrozen encoder is not used: no process has a gradient of it.
        argv = self.argv(runs, "--batch_size", "32", "--unfreeze", "vision.*", "--out",
                         str(tmp_path / "two"))
        for process in pair(argv, tmp_path / "two", (quick_end, quick_end)):
            process.end()
        old, new = weights(runs / "clip-toy"), weights(tmp_path / "two")
        assert not torch.equal(old["vision.cls_token"], new["vision.cls_token"])


def quick_end():
    """A trap: the run ends without figures."""
    train.measure = lambda run: None
