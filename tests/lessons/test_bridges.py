"""lessons/bridges.py: what is the same for all bridges, what each one trains, and the report."""
import itertools
import json
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from common.data.batches import draw_rng
from common.data.shapes import texts
from common.data.shapes.interleaved import QUESTION_KINDS
from common.data.shapes.world import Shapes
from common.evaluation import retrieval
from common.evaluation.questions import draw_tasks
from common.training.lm import Pretraining
from lessons import bridges
from tests.training.runs import SETTINGS, weights

FIRST_SPECIAL_FREE = 32                  # ids below are special tokens
SOURCES = {"gated": {"vision": "vision", "lm": "lm"}, "mixture": {"vision": "vision"},
           "qformer": {"vision.vit": "vision", "lm": "lm"},
           "projector": {"vision": "vision", "lm": "lm"},
           "projector-tuned": {"vision": "vision", "lm": "lm"}}
NAMES = pytest.mark.parametrize("name", SOURCES)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A folder with small runs of CLIP and the LM; the world has few words and test pictures."""
    folder = tmp_path_factory.mktemp("bridges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "splits", Shapes.splits | {"test": 24, "single": 42,
                                                         "composition": 6, "shifted": 6})
        patch.setattr(Shapes, "corpus", lambda self: itertools.islice(texts.corpus(), 150))
        patch.setattr(bridges, "COUNT", 3)
        patch.setattr(retrieval, "zero_shot", lambda model, data: {})
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        patch.setattr(train, "STAGES", train.STAGES | {
            f"bridge-{name}": bridges.stage_of(name) for name in bridges.BRIDGES})
        for stage in ("clip", "lm"):
            train.train(stage, options(folder, folder / stage), SETTINGS[stage])
        yield folder


def options(runs, out, **more):
    return train.Options(**{"runs": str(runs), "out": str(out), "batch_size": 6, "steps": 2,
                            "precision": "fp32", "device": "cpu"} | more)


@pytest.fixture
def built(runs, tmp_path):
    """built(name of a bridge) -> its Run at step 0."""
    def build(name):
        torch.manual_seed(0)
        return train.build(f"bridge-{name}", options(runs, tmp_path / name), [], 0.0)
    return build


@pytest.fixture
def command(runs, monkeypatch, capsys):
    """command(*argv) is what `python lessons/bridges.py ARGV` prints."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["bridges.py", *argv, "--runs", str(runs)])
        assert not bridges.main()
        return capsys.readouterr().out
    return call


def answers(run, batch):
    """The texts that the loss counts, of each row."""
    rows = batch["answer_ids"] if "answer_ids" in batch else batch["labels"]
    return [run.tokenizer.decode([i for i in row if i >= FIRST_SPECIAL_FREE])
            for row in rows.tolist()]


class TestDataSources:
    def test_all_bridges_get_the_same_pictures_and_answers_in_every_step(self, built):
        made, seen = [built(name) for name in SOURCES], set()
        for step in (0, 1, 7):
            batches = [run.batches[step] for run in made]
            first, = batches[0]
            expected = answers(made[0], first)
            for run, [batch] in zip(made, batches):
                assert answers(run, batch) == expected, run.name
                assert torch.equal(batch["images"].flatten(), first["images"].flatten()), run.name
            assert not first["attend_next"].any(), "texts behind their pictures"
            seen |= {*expected}
        assert {" " in text for text in seen} == {True, False}, "captions and answers of a word"

    def test_each_record_has_one_turn_and_half_of_them_are_captions(self, built):
        run, seen = built("qformer"), []
        source, = run.batches.sources
        source.collate = lambda records, rngs: bridges.first_turns(
            bridges.BRIDGES["qformer"], lambda own, _: seen.extend(own) or {}, records, rngs)
        for step in range(20):
            run.batches[step]
        assert {len(record["turns"]) for record in seen} == {1}
        captions = sum(bool(record["turns"][0].get("caption")) for record in seen)
        assert 40 < captions < 80 and len(seen) == 120


class TestWorded:
    @pytest.mark.parametrize("name, prompts", [
        ("mixture", ["output:", "is it red?"]),
        ("projector", ["output:", "question: is it red? answer:"])])
    def test_a_model_without_these_words_gets_them_as_its_prompt(self, name, prompts):
        caption = {"images": ["picture"], "texts": ["a red ring"], "source": 1, "kind": "caption"}
        turn = {"images": [["picture"]], "prompt": "is it red?", "answer": "yes"}
        words = [bridges.worded(bridges.BRIDGES[name], record)
                 for record in (caption, {"turns": [turn], "kind": "colour"})]
        assert [record["turns"][0]["prompt"] for record in words] == prompts
        assert not any("kind" in r or r["turns"][0].get("caption") for r in words), "its own words"

    @NAMES
    def test_a_question_is_written_and_ranked_as_it_was_trained(self, built, name, monkeypatch):
        """The prompt is the longest text that is encoded."""
        run, prompts, encoded = built(name), [], []
        source, = run.batches.sources
        record, = draw_tasks(run.world, "question", 1)
        encode = run.tokenizer.encode
        monkeypatch.setattr(run.tokenizer, "encode", lambda text: encoded.append(text)
                            or encode(text))
        writer = bridges.BridgeWriter(bridges.BRIDGES[name], run.model, run.tokenizer)
        for use in (lambda: source.collate([record], [draw_rng(0, 0, 0)]),
                    lambda: writer.generate([record], max_new_tokens=1),
                    lambda: writer.score_candidates([record], [["red"]])):
            encoded.clear()
            use()
            prompts.append(max(encoded, key=len))
        assert prompts == prompts[:1] * 3 and record["turns"][0]["prompt"] in prompts[0]
        assert prompts[0].startswith("question: ") == (name != "mixture")


class TestStageOf:
    @NAMES
    def test_what_is_frozen_stays_as_it_was_and_the_rest_learns(self, runs, built, name):
        run, patterns = built(name), bridges.BRIDGES[name].trains
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        for module, part in SOURCES[name].items():
            stage = "lm" if part == "lm" else "clip"
            for key, value in weights(runs / stage).items():
                own = key.replace(f"{part}.", f"{module}.", 1)
                if key.startswith(f"{part}.") and own in before:
                    assert torch.equal(before[own], value), f"{own}: not that of the run {stage}"
        for step in range(3):
            train.update(run, run.model, [{k: v for k, v in batch.items() if k != "refused"}
                                          for batch in run.batches[step]])
            run.step += 1
        changed = {key for key, p in run.model.named_parameters()
                   if not torch.equal(p, before[key])}
        allowed = {key for key, _ in run.model.named_parameters()
                   if any(fnmatch(key, pattern) for pattern in patterns)}
        assert changed <= allowed and len(changed) > 0.9 * len(allowed)
        assert not any(key.startswith("vision.") and "norm" not in key for key in allowed)
        assert any(key.startswith("lm.blocks") for key in allowed) == (name == "projector-tuned")

    def test_the_recipe_is_the_same_for_all(self, built):
        first, *others = [built(name).recipe for name in SOURCES]
        assert others == [first] * 4 and (first.lr, first.optimizer) == (1e-3, "muon")
        assert bridges.RECIPE.steps == 400 and bridges.RECIPE.batch_size == 32

    def test_the_table_of_train_py_is_left_as_it_is(self):
        assert train.STAGES["blip2-stage2"].init == "blip2-stage1"
        assert bridges.stage_of("qformer").init is None


class TestMain:
    @pytest.mark.parametrize("name", ["mixture", "projector"])
    def test_a_bridge_is_trained_once_and_measured(self, runs, command, name):
        argv = name, "--seed", "3", "--steps", "2", "--batch_size", "6"
        out, path = command(*argv), runs / "claims" / f"bridge-{name}-3" / "result.json"
        result, before = json.loads(path.read_text()), path.stat().st_mtime_ns
        assert out.splitlines()[-1] == f"result: {json.dumps(result)}"
        few = {f"vqa_accuracy/{kind}" for kind in QUESTION_KINDS}     # too few to have all kinds
        shots = {"shots_8", "shots_8_shuffled"} if name == "mixture" else set()
        assert {*bridges.FIGURES.values()} - few - shots - {"training"} <= {*result}
        assert ("shots_8" in result) == (name == "projector") and result["steps"] == 2
        assert "finished" in command(*argv) and path.stat().st_mtime_ns == before


def write(runs, name, seed, log='{"step": 2, "seconds": 9.5}\n', **result):
    folder = runs / "claims" / f"bridge-{name}-{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"steps": 2} | result))
    (folder / "config.json").write_text(json.dumps({"model": name}))
    (folder / "log.jsonl").write_text('{"step": 1, "seconds": 1}\n' + log)


class TestReport:
    def test_the_median_and_the_range_of_the_seeds(self, tmp_path, monkeypatch, capsys):
        for seed, accuracy in enumerate((0.75, 0.25, 0.5)):
            write(tmp_path, "projector", seed, vqa_accuracy=accuracy, trainable_parameters=33024)
        write(tmp_path, "projector-tuned", 1, vqa_accuracy=1.0, shots_8=0.125)
        texts = {"projector": "a lie", "projector-tuned": "true"}
        monkeypatch.setattr(bridges.BridgeWriter, "generate", lambda self, records: [
            r["texts"][0] if texts[self.model] == "true" else "a lie" for r in records])
        monkeypatch.setattr(bridges.overview, "open_model", lambda model, path: SimpleNamespace(
            model=model, tokenizer=None))
        sheets, sheet = [], bridges.sheet
        monkeypatch.setattr(bridges, "sheet", lambda *given, **more: sheets.append(given)
                            or sheet(*given, **more))
        bridges.report(tmp_path)
        head, _, *rows = [line.strip("| ").split(" | ")
                          for line in capsys.readouterr().out.splitlines()[:7]]
        rows = {row[0]: dict(zip(head, row)) for row in rows}
        assert [*rows] == [*bridges.BRIDGES] and {len(row) for row in rows.values()} == {len(head)}
        shown = rows["projector"]
        assert [shown[key] for key in ("seeds", "questions", "trained", "seconds", "captions")] == [
            "3", "0.500 (0.250-0.750)", "33,024 (33,024-33,024)", "10 (10-10)", "-"]
        assert (rows["projector-tuned"]["questions"], rows["projector-tuned"]["8 shots"]) == (
            "1.000", "0.125")
        [(_, (names, *lines))] = sheets
        assert [text for _, text, _ in names[2]] == [*bridges.BRIDGES] and len(lines) == 4
        for _, image, cells in lines:
            assert [right for _, _, right in cells] == [None, None, None, False, True]
        assert Image.open(tmp_path / "claims" / "bridges.png").width > 5 * 64

    def test_runs_of_different_steps_are_no_comparison(self, tmp_path):
        with pytest.raises(ValueError, match="claims: no finished run$"):
            bridges.read_results(tmp_path)
        write(tmp_path, "gated", 0)
        write(tmp_path, "qformer", 0, steps=30)
        with pytest.raises(ValueError, match="runs of 2 and 30 steps$"):
            bridges.read_results(tmp_path)
