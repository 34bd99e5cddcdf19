"""lessons/experiments.py: other objectives for CLIP's encoder, probes, and CapFilt's texts."""
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clip
import train
from common.data.batches import world_tokenizer
from common.data.shapes import texts
from common.data.shapes.world import Shapes
from common.data.tokenizer import CONTROL_IDS, EOS, PAD
from lessons import experiments
from tests.helpers import assert_close
from tests.training.runs import SIZES, build


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """A world with small splits and few words."""
    monkeypatch.setattr(Shapes, "splits", Shapes.splits | {"single": 84, "shifted": 126, "web": 7})
    monkeypatch.setattr(Shapes, "corpus", lambda self: itertools.islice(texts.corpus(), 300))


@pytest.fixture
def config():
    """A CLIP's sizes; the vocabulary is that of the small world."""
    return train.with_settings(clip.PRESETS["tiny"], [
        *SIZES, f"vocab_size={len(world_tokenizer(Shapes()))}", f"eos_id={EOS}"])


@pytest.fixture
def bench(config):
    return experiments.Bench(world_tokenizer(Shapes()), config)


class TestBench:
    def test_accuracy_under_shift_is_the_mean_of_its_styles(self, bench):
        labels = {split: bench.labels(bench.records[split]) for split in bench.records}

        def score(records):              # right, but on textures it always says the first class
            right = bench.labels(records)
            is_texture = [record["source"].style == "texture" for record in records]
            right[torch.tensor(is_texture)] = 0
            return torch.eye(42)[right]
        texture = torch.tensor([r["source"].style == "texture" for r in bench.records["shifted"]])
        share = (labels["shifted"][texture] == 0).float().mean().item()
        assert 0 < share < 0.5 and texture.sum() == 42
        assert bench.accuracy(score) == 1
        assert bench.accuracy(score, "shifted") == pytest.approx((2 + share) / 3)
        assert bench.kept_under_shift(score) == pytest.approx((2 + share) / 3)
        half = lambda records: score(records).roll(len(records) // 2, 0) * 0         # noqa: E731
        assert bench.accuracy(half) == pytest.approx(1 / 42)


class TestPrompts:
    def test_a_probe_has_as_many_pictures_of_each_class_and_others_to_choose(
            self, tmp_path, monkeypatch):
        made = build(tmp_path, batch_size=8)
        train.save(made)
        seen = []

        def regression(features, labels, classes, l2):
            seen.append((len(features), Counter(labels.tolist()), l2))
            return lambda other: torch.full((len(other), classes), -abs(math.log10(l2) + 1))
        monkeypatch.setattr(experiments, "logistic_regression", regression)
        monkeypatch.setattr(experiments.retrieval, "accuracy", lambda scores, y: scores[0, 0])
        figures = experiments.prompts(None, made.folder.path)
        assert all(0 <= figures[f"accuracy_probe_{shots}"] <= 1 for shots in (1, 4, 16))
        whole = [own for own in seen if own[0] in (42, 4 * 42, 16 * 42)]
        assert [{*counts.values()} for _, counts, _ in whole] == [{1}, {4}, {16}]
        assert [l2 for *_, l2 in whole] == [0.1] * 3, "the best of those tried"
        tried = [own for own in seen if own not in whole]
        assert len(tried) == 3 * 8 and {count for count, *_ in tried} == {34, 135, 538}
        assert all(len(counts) == 42 for count, counts, _ in tried if count > 34)

    def test_single_prompts_are_averaged_and_the_ensemble_has_all(self, tmp_path, monkeypatch):
        made = build(tmp_path, batch_size=8)
        train.save(made)

        def classifier(model, ids, names, templates):
            """Right for the first class and from class 6, 12, ... on; with all prompts from 3."""
            number = 0.5 if len(templates) > 1 else Shapes.templates.index(templates[0]) + 1
            return torch.diag((torch.arange(42) >= 6 * number).float())
        monkeypatch.setattr(experiments.retrieval, "zero_shot_classifier", classifier)
        monkeypatch.setattr(experiments.retrieval, "encode_records", lambda model, data, records: (
            torch.eye(42)[[data.world.label(record["source"]) for record in records]]))
        monkeypatch.setattr(experiments, "logistic_regression", lambda x, y, classes, l2: (
            lambda other: torch.zeros(len(other), classes)))
        figures = experiments.prompts(None, made.folder.path)
        assert figures["accuracy_ensemble"] == pytest.approx(40 / 42)
        assert figures["accuracy_single_prompts"] == pytest.approx((43 - 18) / 42)
        assert figures["kept_under_shift"] == pytest.approx(1)
        assert figures["accuracy_probe_4"] == pytest.approx(1 / 42)
        assert figures["accuracy_ensemble_chance"] == 1 / 42


class TestLogisticRegression:
    def test_it_is_the_minimum_of_the_loss_with_a_penalty_on_standardized_weights(self):
        scales, shifts = torch.tensor([1e3, 1.0, 1e-3, 3.0, 0.0]), torch.tensor([0, 1e3, 0, -5, 2])
        labels = torch.tensor([0] * 11 + [1] * 17 + [2] * 23)
        features = ((torch.randn(51, 5) + 2 * torch.eye(5)[labels]) * scales + shifts).double()
        predict = experiments.logistic_regression(features, labels, classes=3, l2=0.05)
        scores, x = predict(features), (features - features.mean(0)) / features.std(0)
        x = x[:, :4]                     # a constant feature says nothing
        # At the minimum X^T (p - y) / N = -l2 W, and the bias has no penalty.
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(51, 1)], 1), scores).solution
        wrong = (scores.softmax(1) - torch.eye(3)[labels]) / 51
        assert_close("gradient of the weights", x.T @ wrong, -0.05 * solution[:4], 1e-5)
        assert_close("gradient of the bias", wrong.sum(0), torch.zeros(3).double(), 1e-5)
        assert solution[:4].abs().max() > 0.1
        assert_close("scores of other features", predict(features[:7]), scores[:7])


class TestWords:
    def test_loss_and_score_are_those_of_a_loop(self, config, bench):
        model = experiments.Words(config, bench)
        images = torch.randn(5, 3, 32, 32)
        captions = ["a red circle", "a red red square and a blue square", "a star",
                    "a small green cross on the left", "red"]
        ids = bench.collate.ids(captions)
        log_probs = model.head(model.image_features(images)).log_softmax(dim=1)

        def words(row):                  # each once, without <bos>, <eos> and padding
            return {token for token in row.tolist() if token >= CONTROL_IDS}
        loss = 0
        for row, own in zip(log_probs, ids):
            loss -= sum(row[token] for token in words(own)) / len(words(own)) / 5
        assert_close("loss", model.loss(images, None, ids), loss)
        score = torch.stack([torch.stack([sum(row[token] for token in words(phrase))
                                          for phrase in bench.phrases]) for row in log_probs])
        assert_close("score", model.score(images, bench.phrases), score)
        assert score.shape == (5, 42) and len(words(ids[1])) < (ids[1] >= CONTROL_IDS).sum()


class TestCaptions:
    def test_the_score_is_the_sum_of_the_log_probabilities_of_all_tokens(self, config, bench):
        model = experiments.Captions(config, bench).eval()
        images, phrases = torch.randn(3, 3, 32, 32), bench.phrases[::9]
        score = model.score(images, phrases)
        patches = model.projector(model.vision.patches(images))       # (N, P, D)
        assert patches.shape[:2] == (3, 16)
        for i in range(3):
            for k, phrase in enumerate(phrases):
                ids = phrase[phrase != PAD]
                assert ids[-1] == EOS
                x = torch.cat([patches[i], model.lm.embed(ids[:-1])])[None]
                log_probs = model.lm(x)[0, -len(ids) + 1:].log_softmax(dim=1)
                want = log_probs.gather(1, ids[1:, None]).sum()
                assert_close(f"image {i}, phrase {k}", score[i, k], want, 1e-4)
        rows = phrases[[0, 1, 3]]
        count = (rows[:, 1:] != PAD).sum()
        assert_close("loss", model.loss(images, None, rows),
                     -score[range(3), [0, 1, 3]].sum() / count, 1e-4)


class TestSupervised:
    def test_it_learns_the_classes_of_a_batch(self, config, bench):
        model, records = experiments.Supervised(config, bench), bench.records["single"][:6]
        images, optimizer = bench.pixels(records), torch.optim.Adam(model.parameters(), lr=0.01)
        first = model.loss(images, records, None).item()
        assert first == pytest.approx(math.log(42), abs=1)
        for _ in range(80):
            loss = model.loss(images, records, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5
        assert_close("classes", model.score(images, bench.phrases).argmax(1), torch.arange(6))


class TestTrainObjective:
    @pytest.mark.parametrize("kind", ["Words", "Captions", "Supervised"])
    def test_it_starts_as_clip_and_sees_the_same_batches(self, kind, tmp_path, monkeypatch):
        seen = []

        class Watched(getattr(experiments, kind)):
            def __init__(self, config, bench):
                super().__init__(config, bench)
                seen.append({name: x.clone() for name, x in self.vision.state_dict().items()})

            def loss(self, images, records, ids):
                seen.append((images, ids))
                if kind == "Supervised":             # of its first object
                    self.labels = lambda records: torch.zeros(len(records), dtype=torch.int64)
                return super().loss(images, records, ids)
        small = dict(vision_width=12, vision_layers=1, vision_heads=3, text_width=10,
                     text_layers=1, text_heads=2, embed_dim=7)
        tiny = experiments.replace(clip.PRESETS["tiny"], **small)
        monkeypatch.setitem(clip.PRESETS, "tiny", tiny)
        monkeypatch.setattr(experiments, "CLIP_STEPS", 2)
        figures = experiments.train_objective(Watched, 3)
        assert set(figures) == {"zero_shot_accuracy", "zero_shot_accuracy_chance",
                                "kept_under_shift"} and 0 <= figures["zero_shot_accuracy"] <= 1
        run = train.build("clip", train.Options(seed=3, out=str(tmp_path / "c"), precision="fp32"),
                          [], time.time())
        weights, *batches = seen
        for name, value in run.model.vision.state_dict().items():
            assert_close(name, weights[name], value)
        assert len(batches) == 2 and len(batches[0][0]) == run.recipe.batch_size == 128
        for step, (images, ids) in enumerate(batches):
            [batch] = run.batches[step]
            assert_close("ids", ids, batch["ids"])
            assert_close("images", images, experiments.normalize_pixels(batch["images"]))


@pytest.fixture
def engine(monkeypatch):
    """Captioners and filters by name: a caption says who wrote it, a filter keeps even scenes."""
    monkeypatch.setattr(experiments.blip, "open_trained",
                        lambda run, losses: (f"{Path(run).name} {losses[0]}", None))

    def capfilt_texts(writer, keep, world, **how):
        for i in range(7):
            record = world.record("web", i) | {"number": i}
            written = f"by {writer.model} {how.get('num_beams', '')}".strip()
            for synthetic, text in ((False, record["texts"][0]), (True, written)):
                row = record | {"texts": [text]}
                yield i, row, synthetic, keep([row]).item()
    monkeypatch.setattr(experiments.blip, "capfilt_texts", capfilt_texts)
    monkeypatch.setattr(experiments.matching, "probabilities", lambda model, tokenizer, records: (
        torch.tensor([float(r["number"] % 2 == 0 and model == "f itm") for r in records])))


@pytest.mark.usefixtures("engine")
class TestWritten:
    @pytest.mark.parametrize("name, by", [("written", "by c lm"), ("written_beams", "by c lm 3")])
    def test_three_files_and_what_is_true_and_kept(self, tmp_path, name, by):
        count, experiment = experiments.EXPERIMENTS[name]
        figures = experiment(SimpleNamespace(out=tmp_path), *["runs/c", "runs/f"][:count])
        web = [Shapes().record("web", i) for i in range(7)]
        even, text = range(0, 7, 2), [record["texts"][0] for record in web]
        want = {"filtered": [(i, text[i]) for i in even],
                "captioned": [(i, t) for i in range(7) for t in (text[i], by)],
                "both": [(i, t) for i in even for t in (text[i], by)]}
        for file, pairs in want.items():
            rows = [json.loads(line) for line in (tmp_path / f"{file}.jsonl").read_text().split(
                "\n")[:-1]]
            assert [(row["scene"], row["text"]) for row in rows] == pairs, file
        true = [record["truth"] for record in web]
        assert 0 < sum(true) < 7
        assert figures == {
            "web_kept": 4 / 7, "web_true": pytest.approx(sum(true) / 7),
            "web_kept_true": pytest.approx(sum(true[::2]) / 4), "written_kept": 4 / 7,
            "written_true": 0, "written_kept_true": 0}

    def test_a_filter_that_keeps_nothing(self, tmp_path):
        figures = experiments.written(SimpleNamespace(out=tmp_path), "c", "other")
        assert figures["web_kept"] == figures["web_kept_true"] == 0
        assert (tmp_path / "both.jsonl").read_text() == ""


class TestMain:
    def test_figures_are_written_to_the_folder(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(experiments.EXPERIMENTS, "words", (1, lambda args, run: {
            "seed": args.seed, "x": len(run) / 3}))
        monkeypatch.setattr(sys, "argv", ["experiments.py", "words", "--seed", "2", "--out",
                                          str(tmp_path / "a/b"), "r"])
        experiments.main()
        assert json.loads((tmp_path / "a/b/result.json").read_text()) == {"seed": 2, "x": 0.3333}
        assert capsys.readouterr().out == 'result: {"seed": 2, "x": 0.3333}\n'

    @pytest.mark.parametrize("name, given", [("shots", 0), ("prompts", 2), ("written", 1)])
    def test_too_few_or_many_runs_are_a_users_mistake(self, tmp_path, monkeypatch, name, given):
        monkeypatch.setattr(sys, "argv", ["experiments.py", name, *["x"] * given, "--out",
                                          str(tmp_path)])
        with pytest.raises(ValueError, match=f"{name} measures . runs, {given} are given"):
            experiments.main()
        assert not (tmp_path / "result.json").exists()

    def test_the_supervised_one_sees_single_objects(self, monkeypatch):
        asked = []
        monkeypatch.setattr(experiments, "train_objective",
                            lambda kind, seed, **world: asked.append((kind, seed, world)))
        for name in ("supervised", "words", "captions"):
            experiments.EXPERIMENTS[name][1](SimpleNamespace(seed=4))
        assert asked == [(experiments.Supervised, 4, {"objects": 1}), (experiments.Words, 4, {}),
                         (experiments.Captions, 4, {})]
