"""BLIP in train.py: recipes, data, captioner and filter, new texts; and the commands of blip.py."""
import functools
import json
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blip
import train
from blip import BLIPConfig, Judge
from common.data.batches import world_tokenizer
from common.evaluation import retrieval
from common.training import checkpoint
from common.training.optimizer import find_recipe
from tests.fuzz import one_line
from tests.helpers import command, drawing, listed, mistake, picture
from tests.training.runs import SETTINGS, Toy, assert_same, pair, toy_options, weights

SIZES = ["vision_width=12", "vision_layers=1", "vision_heads=3", "text_width=12", "text_layers=2",
         "text_heads=2", "embed_dim=7", "queue_size=12"]
# Run of a stage: its flags; each starts from the first.
RUNS = {"blip-toy": ("blip", {}), "blip-captioner-toy": ("blip", {"losses": "lm"}),
        "blip-filter-toy": ("blip", {"losses": "itc,itm"}), "blip-vqa-toy": ("blip-vqa", {}),
        "blip-two-images-toy": ("blip-two-images", {}), "blip-dialogue-toy": ("blip-dialogue", {})}


@pytest.fixture(scope="module", autouse=True)
def short_evaluation():
    """Evaluate on 3 records instead of 400, and retrieval on few classes."""
    with pytest.MonkeyPatch.context() as patch:
        for model in (blip.BLIP, blip.VQA, Judge):
            patch.setattr(model, "evaluate", functools.partialmethod(model.evaluate, count=3))
        patch.setattr(retrieval, "zero_shot", lambda model, data: {})
        yield


def flags_of(stage, options):
    """Options of a two-step run, by default from random weights."""
    parts = {"parts": ["vision=none"]} if stage == "blip" else {}
    return toy_options(**{"batch_size": 6} | parts | options)


def start(stage="blip", settings=(), **options):
    """A two-step run -> its exit status."""
    return train.train(stage, flags_of(stage, options), settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with RUNS and clip-toy; a captioner and a filter start from blip-toy."""
    folder = tmp_path_factory.mktemp("blip")
    for name, (stage, flags) in RUNS.items():
        init = {"init": str(folder / "blip-toy")} if flags else {}
        settings = [] if name != "blip-toy" else SIZES
        assert start(stage, settings, runs=str(folder), **init, **flags) == 0
        assert (folder / name / "result.json").exists()
    train.save(built("clip", SETTINGS["clip"], out=str(folder / "clip-toy")))
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def built(stage="blip", settings=(), **options):
    return train.build(stage, flags_of(stage, options), list(settings), 0.0)


def quick_end():
    """A trap: the run ends without figures."""
    train.measure = lambda run: None


class TestRecipes:
    @pytest.mark.parametrize("preset, lr, batch", [("base", 3e-4, 2880), ("large", 2e-4, 2400)])
    def test_the_papers_numbers(self, preset, lr, batch):
        recipe = find_recipe(blip.RECIPES, preset, ("shapes", ""), {})
        assert (recipe.lr, recipe.batch_size, recipe.weight_decay) == (lr, batch, 0.05)
        assert (recipe.warmup, recipe.optimizer, recipe.grad_clip) == (3000, "adamw", None)
        if preset == "base":
            assert recipe.steps * batch / 14e6 == pytest.approx(20, rel=0.01), "epochs"
        assert not blip.PRESETS[preset].queue_size % batch


class TestDataSources:
    @pytest.mark.parametrize("losses, kind, keys", [
        ("itc,itm,lm", None, "images ids labels draws"), ("lm", None, "images ids labels draws"),
        ("vqa", "question", "images ids answer_ids question_index weights"),
        ("two-images", "two_pictures", "images ids truth"),
        ("dialogue", "dialogue", "images ids caption_ids truth")])
    def test_batches_are_of_the_tasks_records_and_the_configs_sizes(self, losses, kind, keys):
        world = Toy(image_size=32)
        config = BLIPConfig(losses=losses, image_size=15, context_length=11)
        source, = blip.data_sources(world, world_tokenizer(world), config)
        batch = source.collate([source.record(i, random.Random(i)) for i in range(3)],
                               [random.Random(i) for i in range(3)])
        assert [*batch] == keys.split() and batch["images"].shape[-3:] == (3, 15, 15)
        assert batch["ids"].shape == (3, 11) or losses in ("vqa", "two-images"), batch["ids"].shape
        assert source.kinds == (kind and {kind: 1})

    @pytest.mark.parametrize("changes, has_web, split", [
        ({}, True, "web+human"), ({"human_only": True}, True, "human"), ({}, False, "train"),
        ({"losses": "itc,itm"}, True, "human"), ({"losses": "lm"}, True, "human"),
        ({"losses": "lm"}, False, "train")], ids=str)
    def test_all_losses_learn_from_all_pairs_captioner_and_filter_from_human_ones(
            self, changes, has_web, split):
        world = SimpleNamespace(has_web=has_web, size={"human": 9}.get)
        source, = blip.data_sources(world, None, BLIPConfig(prompt="a ", **changes))
        assert (source.world, source.split, source.kinds) == (world, split, None)
        assert source.collate.prompt == ("a " if changes == {"losses": "lm"} else "")


class TestRuns:
    def test_every_figure_has_a_name(self, runs):
        whole, captioner, judge, vqa, two, dialogue = (result(runs / name) for name in RUNS)
        for found, others, figures in (
                (whole, {}, "image_to_text_recall@1 text_to_image_recall@10_reranked itm_accuracy "
                 "filter_precision/shares caption_accuracy caption_accuracy_single"),
                (captioner, judge, "caption_accuracy caption_accuracy_single"),
                (judge, captioner, "itm_accuracy filter_precision filter_recall "
                 "image_to_text_recall@1_reranked"),
                (vqa, whole, "vqa_accuracy vqa_accuracy_blind vqa_accuracy_ranked"),
                (two, vqa, "two_images_accuracy"),
                (dialogue, two, "dialogue_accuracy dialogue_mrr")):
            for name in figures.split():
                assert 0 <= found[name] <= 1 and name not in others, name
            frozen = found["parameters"] - found["trainable_parameters"]
            assert bool(frozen) == ("itm_accuracy" in found), "the momentum encoders alone"

    def test_captioner_and_filter_start_from_the_run_and_share_nothing_after_it(
            self, runs, tmp_path):
        before = weights(runs / "blip-toy")
        for losses in ("lm", "itc,itm"):
            own = built(init=str(runs / "blip-toy"), losses=losses,
                        out=str(tmp_path / losses)).model.state_dict()
            assert_same(losses, own, {name: before[name] for name in own})
        captioner, judge = (weights(runs / f"blip-{name}-toy") for name in ("captioner", "filter"))
        shared = {*captioner} & {*judge}
        assert {name.split(".")[0] for name in shared} == {"vision"}
        assert not any(torch.equal(captioner[name], judge[name]) for name in shared
                       if "k_proj.bias" not in name), "a tensor of both"

    def test_a_start_has_the_sizes_and_words_of_its_run_whatever_the_preset(self, runs, tmp_path):
        run = built(init=str(runs / "blip-toy"), preset="small", out=str(tmp_path / "new"),
                    data="shapes")
        first = built(settings=SIZES, out=str(tmp_path / "first"))
        assert run.config == first.config
        assert run.tokenizer.model == (runs / "blip-toy" / "tokenizer.model").read_bytes()

    def test_a_start_is_resumed_without_its_run_and_ends_with_the_same_bits(
            self, runs, tmp_path, monkeypatch, capsys):
        shutil.copytree(runs / "blip-toy", tmp_path / "blip-toy")
        begin = functools.partial(start, "blip-vqa", runs=str(tmp_path), save_every=1)
        update = train.update
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", lambda run, *given: setattr(
                run, "stopped", signal.SIGTERM) or update(run, *given))
            assert begin() == 143
        shutil.rmtree(tmp_path / "blip-toy")
        for flag, step in (("resume", 1), ("eval_only", 2)):
            assert begin(**{flag: True}) == 0
            assert f"resumed from step {step}" in capsys.readouterr().out
        assert_same("weights", weights(tmp_path / "blip-vqa-toy"), weights(runs / "blip-vqa-toy"))

    def test_the_image_encoder_is_that_of_a_clip_run_unless_there_is_none(self, runs, tmp_path):
        clip, flags = weights(runs / "clip-toy"), {"out": str(tmp_path / "new")}
        text = SIZES[3:]
        assert start(settings=text, parts=[f"vision={runs / 'clip-toy'}"], **flags) == 0
        fresh = built(settings=text, parts=[], runs=str(runs), out=str(tmp_path / "fresh"))
        own = fresh.model.state_dict()
        for name in (name for name in clip if name.startswith("vision.")):
            assert_same(name, own[name], clip[name])
            assert_same(name, own[f"momentum.{name}"], clip[name])
        assert not torch.equal(weights(tmp_path / "new")["vision.cls_token"],
                               clip["vision.cls_token"]), "it is trained"
        again = built(settings=text, resume=True, parts=[], **flags)  # a run has its parts itself
        assert (again.step, again.config.vision_width) == (2, 22)
        again = built(settings=SIZES, resume=True, parts=[], out=str(runs / "blip-toy"))
        assert (again.step, again.config.vision) == (2, None)
        for folder in (tmp_path / "new", runs / "blip-toy"):
            with one_line(r"began with options parts=.* \(now \['vision=nowhere'\]\)"):
                built(settings=[], resume=True, parts=["vision=nowhere"], out=str(folder))

    def test_two_processes_end_with_the_weights_and_queues_of_one(self, tmp_path, monkeypatch):
        argv = ["blip", "--data", "toy", "--from", "vision=none", "--steps", "2", "--precision",
                "fp32", "--batch_size", "6", "--out", str(tmp_path / "two"),
                *(f"--set={size}" for size in SIZES)]
        for process in pair(argv, tmp_path / "two", (quick_end, quick_end)):
            process.end()
        monkeypatch.setattr(train, "measure", lambda run: None)
        assert start(settings=SIZES, out=str(tmp_path / "one")) == 0
        one = weights(tmp_path / "one")
        assert {"image_queue", "text_queue", "queue_next"} < {*one}
        assert_same("weights", weights(tmp_path / "two"), one, 2e-5)


class TestMistakes:
    @pytest.mark.parametrize("stage, flags, words", [
        ("blip", {"batch_size": 5}, "queue_size=12 .* batch of 5, .*--set queue_size=0"),
        ("blip", {"accumulate": 2}, "--accumulate 2.*only --losses lm"),
        ("blip", {"losses": "itm"}, "losses=itm is not one of itc,itm,lm"),
        ("clip", {"losses": "lm"}, "--losses lm: clip has no choice of losses"),
        ("blip", {"init": "clip-toy"}, "a run of 'clip', not of 'blip'"),
        ("blip", {"init": "none"}, "train.py blip --data toy --out none"),
        ("blip", {"init": "blip-captioner-toy", "losses": "itc,itm"}, "missing"),
        ("blip", {"runs": "none", "parts": []}, "train.py clip --data toy --out none/clip-toy"),
        ("blip-vqa", {"runs": "none"}, "train.py blip --data toy --out none/blip-toy"),
        ("blip-vqa", {"data": "emoji", "init": "blip-toy"}, "emoji has no question"),
        ("blip-vqa", {"parts": ["vision=clip-toy"], "init": "blip-toy"}, "--from vision.*no part")])
    def test_they_are_one_line_before_anything_is_written(self, runs, tmp_path, monkeypatch, stage,
                                                          flags, words):
        monkeypatch.chdir(runs)
        sizes = SIZES if "init" not in flags and stage == "blip" else []
        with one_line(words):
            start(stage, sizes, **{"out": str(tmp_path / "new")} | flags)
        assert not (tmp_path / "new").exists()

    def test_a_captioner_learns_from_no_web_file(self, runs, tmp_path):
        spec = listed(tmp_path, 40)
        file = tmp_path / "data.jsonl"
        file.write_text(file.read_text().replace("}", ', "web": true}'))
        with one_line("data.jsonl: all its pairs are marked"):
            start(data=spec, losses="lm", init=str(runs / "blip-toy"), out=str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
        assert built(data=spec, settings=SIZES, out=str(tmp_path / "new")).step == 0


class TestBootstrap:
    """The data engine: its list of commands, and the texts that a captioner and a filter make."""

    def call(self, monkeypatch, status, *argv):
        """The lines that `train.py ARGV` runs, while each ends with the status."""
        lines = []

        def run(words):
            lines.append([str(word) for word in words[1:]])
            return SimpleNamespace(returncode=status)
        monkeypatch.setattr(train, "train", lambda stage, options, settings, began: lines.append(
            [stage, options.losses, options.init, options.data, options.out, options.steps]) or 0)
        monkeypatch.setattr(train.subprocess, "run", run)
        monkeypatch.setattr(train.sys, "argv", ["train.py", *argv])
        assert train.main() == status
        return lines

    def test_the_list_runs_in_order_with_the_users_flags(self, monkeypatch):
        lines = self.call(monkeypatch, 0, "bootstrap", "--runs", "a", "--steps", "7")
        assert lines == [
            ["clip", None, None, "shapes", None, 7], ["blip", None, None, "shapes", None, 7],
            ["blip", "lm", "a/blip", "shapes", None, 7],
            ["blip", "itc,itm", "a/blip", "shapes", None, 7],
            [str(Path(train.__file__).with_name("blip.py")), "a/blip-captioner", "bootstrap",
             "a/blip-filter", "a/texts.jsonl"],
            ["blip", None, None, "shapes:texts=a/texts.jsonl", "a/blip-bootstrap", 7]]
        assert self.call(monkeypatch, 3, "bootstrap", "--runs", "a") == [
            [*line[:5], None] if line[0] in ("clip", "blip") else line for line in lines[:5]]

    @pytest.mark.parametrize("bias", [9.0, -9.0])
    def test_kept_texts_train_a_new_model(self, runs, tmp_path, bias):
        judge, out = tmp_path / "filter", tmp_path / "out.jsonl"
        shutil.copytree(runs / "blip-filter-toy", judge)
        state = checkpoint.load(judge / "last.pt")
        state["model"]["itm_head.bias"] = torch.tensor([-bias, bias])
        checkpoint.save(judge, state)
        status, said, err = command("blip.py", runs / "blip-captioner-toy", "bootstrap", judge, out,
                                    "--data", "toy")
        assert status == 0, err
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        if bias < 0:
            assert not lines and "web: 0 of 59 texts kept" in said
            with one_line("no texts in it"):
                start(data=f"toy:texts={out}", settings=SIZES, out=str(tmp_path / "new"))
            return
        web = {(i, Toy().record("web", i)["texts"][0]) for i in range(59)}
        assert web <= {(line["scene"], line["text"]) for line in lines} and len(lines) <= 2 * 59
        assert "web: 59 of 59 texts kept, true" in said and f"{len(lines)} lines" in said
        assert out.with_suffix(".png").exists()
        assert start(data=f"toy:texts={out}", settings=SIZES, out=str(tmp_path / "new")) == 0


class TestMain:
    @pytest.fixture(autouse=True)
    def pictures(self, tmp_path, monkeypatch):
        """The current folder: a folder of three pictures, a file that is none, own records."""
        (tmp_path / "many").mkdir()
        for name in ("red", "blue", "green"):
            drawing(name, size=40)[0].save(tmp_path / "many" / f"{name}.png")
        (tmp_path / "red.png").write_bytes(picture(3))
        (tmp_path / "notes.txt").write_text("not a picture")
        listed(tmp_path / "own", 40)
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("argv", [
        "blip-toy caption red.png", "blip-captioner-toy caption red.png",
        "blip-vqa-toy answer red.png what?"])
    def test_a_caption_or_an_answer_is_one_line(self, runs, argv):
        status, out, err = command("blip.py", *f"{runs}/{argv}".split())
        assert (status, out.count("\n"), err) == (0, 1, "")

    @pytest.mark.parametrize("run", ["blip-toy", "blip-filter-toy"])
    def test_match_prints_the_probability_of_each_text_by_itself(self, runs, run):
        texts = ["a red circle", "a blue star", "a red circle"]
        status, out, err = command("blip.py", runs / run, "match", "red.png", *texts)
        assert (status, err) == (0, "")
        shares, printed = zip(*(line.split("%  ") for line in out.splitlines()))
        assert list(printed) == texts and shares[0] == shares[2]
        assert all(0 <= float(share) <= 100 for share in shares)

    def test_search_prints_and_draws_the_best(self, runs):
        status, out, err = command("blip.py", runs / "blip-toy", "search", "a red circle", "many")
        *lines, last = out.splitlines()
        assert (status, len(lines)) == (0, 3), err
        assert last == f"drawn in {runs / 'blip-toy' / 'search.png'}"

    @pytest.mark.parametrize("argv, words", [
        ("blip-vqa-toy caption red.png", "its losses are vqa; this needs one with lm"),
        ("blip-captioner-toy match red.png star", "its losses are lm; .* itm"),
        ("blip-captioner-toy search star many", "its losses are lm; .* itc"),
        ("blip-toy answer red.png what?", "its losses are itc,itm,lm; .* vqa"),
        ("blip-filter-toy caption red.png", "its losses are itc,itm; .* lm"),
        ("blip-toy match red.png", "TEXT"), ("blip-toy caption none.png", "none.png: no such"),
        ("blip-toy caption notes.txt", "notes.txt: not a readable picture"),
        ("clip-toy caption red.png", "a run of 'clip', not of 'blip'"),
        ("none caption red.png", "no run here"),
        ("blip-filter-toy bootstrap {runs}/blip-filter-toy o", "its losses are itc,itm; .* lm"),
        ("blip-captioner-toy bootstrap {runs}/blip-captioner-toy o", "its losses are lm; .* itm"),
        ("blip-captioner-toy bootstrap {runs}/blip-filter-toy o --data jsonl:own/data.jsonl",
         "no web pairs in it, nothing to bootstrap")])
    def test_a_mistake_is_told_in_one_line_and_nothing_is_written(self, runs, argv, words):
        assert re.search(words, mistake("blip.py", *f"{runs}/{argv}".format(runs=runs).split()))
        assert not Path("o").exists() and not Path("search.png").exists()
