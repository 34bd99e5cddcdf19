"""lessons/ablations.py: each command runs on a small run and prints its table."""
import importlib.util
import json
import math
import sys
from types import SimpleNamespace
from pathlib import Path

import pytest
import torch

import clip
import flamingo
from common.data.batches import world_tokenizer
from common.data.shapes.world import Shapes
from common.evaluation.retrieval import accuracy
from common.training import checkpoint, options

HERE = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("ablations", HERE / "lessons" / "ablations.py")
ablations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablations)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained CLIP in a run folder, and a world with small splits."""
    folder, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    patch.setattr(Shapes, "splits", Shapes.splits | {"single": 84, "shifted": 126})
    torch.manual_seed(0)
    tokenizer = world_tokenizer(Shapes())
    config = clip.CLIPConfig(vision_width=12, vision_layers=1, vision_heads=2, text_width=12,
                             text_layers=1, text_heads=2, embed_dim=7, vocab_size=len(tokenizer))
    checkpoint.write_json(folder / "config.json", {
        "model": "clip", "config": vars(config),
        "recipe": {"steps": 3, "batch_size": 8, "lr": 1e-3, "betas": [0.9, 0.98]}})
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    checkpoint.save(folder, {"model": clip.CLIP(config).state_dict()})
    yield folder
    patch.undo()


def rows(monkeypatch, capsys, *argv):
    """Run one ablation -> {name of the row: its cells}."""
    monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, argv)])
    ablations.main()
    lines = [line.rsplit(None, 4) for line in capsys.readouterr().out.splitlines()]
    return {line[0].strip(): line[1:] for line in lines if len(line) == 5}


def test_ensemble_shows_every_prompt_and_both_ways_to_average(run, monkeypatch, capsys):
    table = rows(monkeypatch, capsys, "ensemble", "--run", run)
    assert set(table) == {"accuracy", *map(repr, Shapes.templates), "mean of the single prompts",
                          "ensemble", "mean of probabilities"}
    assert table["accuracy"] == ["plain", "outline", "texture", "palette"]
    alone = [float(table[repr(t)][0]) for t in Shapes.templates]
    mean = float(table["mean of the single prompts"][0])
    assert mean == pytest.approx(sum(alone) / len(alone), abs=1e-3)


def test_accuracy_under_shift_is_that_of_each_style(run):
    bench = ablations.Bench(run)
    records, labels = bench.records["shifted"], bench.labels(bench.records["shifted"])
    scores = torch.eye(len(bench.world.classes))[labels]
    for row, record in zip(scores, records):
        if record["source"].style == "texture":
            row.zero_()                      # then the first class is chosen
    zeros = [label for label, record in zip(labels, records) if record["source"].style == "texture"]
    share = sum(label == 0 for label in zeros).item() / len(zeros)
    assert bench.accuracies(scores, "shifted") == pytest.approx([1, share, 1])
    assert bench.accuracies(torch.eye(len(bench.world.classes))[bench.labels(
        bench.records["single"])], "single") == [1]


def test_probe_beats_an_untrained_zero_shot_classifier(run, monkeypatch, capsys):
    table = rows(monkeypatch, capsys, "probe", "--run", run)
    assert float(table["linear probe, 64 a class"][0]) > float(table["zero-shot"][0]) + 0.1


def test_shift_trains_the_same_encoder_with_labels(run, monkeypatch, capsys):
    table = rows(monkeypatch, capsys, "shift", "--run", run, "--steps", "2")
    assert set(table) == {"accuracy", "zero-shot CLIP", "supervised"}
    assert all(0 <= float(v) <= 1 for v in table["supervised"])


@pytest.mark.parametrize("name, variants", [("batch", ["softmax 32", "softmax 128", "softmax 512"]),
                                            ("sigmoid", ["softmax 32", "sigmoid 32"])])
def test_a_comparison_prints_median_and_range_of_its_seeds(name, variants, monkeypatch, capsys):
    asked = []

    def trained(options, stage, name, *flags):
        assert stage == "clip"
        asked.append((name, flags))
        return dict.fromkeys(("zero_shot_accuracy", "image_to_text_recall@1",
                              "text_to_image_recall@1"), 0.1 * int(flags[1])) | {"seconds": 7}
    monkeypatch.setattr(ablations, "trained", trained)
    monkeypatch.setattr(sys, "argv", ["ablations.py", name, "--pairs", "1024"])
    ablations.main()
    out = capsys.readouterr().out
    assert out.count("0.1 (0-0.2)") == 3 * len(variants) and all(v in out for v in variants)
    assert len({n for n, _ in asked}) == 3 * len(variants)
    steps = {flags[flags.index("--steps") + 1] for _, flags in asked}
    assert steps == ({"32", "8", "2"} if name == "batch" else {"32"})


def test_flamingos_parts_are_left_out_one_by_one(monkeypatch, capsys):
    asked = []

    def trained(options, stage, name, *flags):
        assert stage == "flamingo" and flags[2:4] == ("--steps", "9")
        asked.append(flags[4:])
        return dict.fromkeys(ablations.FLAMINGO_FIGURES.values(), 0.1 * int(flags[1]))
    monkeypatch.setattr(ablations, "trained", trained)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "flamingo", "--steps", "9"])
    ablations.main()
    out = capsys.readouterr().out
    assert out.count("0.1 (0-0.2)") == 8 * 8 and "3 seeds, 9 steps each" in out
    assert len(set(asked)) == 8 and asked[0] == ()


def test_a_run_is_made_once_and_its_step_is_timed_by_its_log(tmp_path, monkeypatch):
    made = []

    def run(command, check):
        out = Path(command[command.index("--out") + 1])
        made.append(command)
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text("".join(json.dumps({"step": s, "seconds": t}) + "\n"
                                               for s, t in ((10, 5), (20, 7), (30, 27), (35, 28))))
        (out / "result.json").write_text('{"loss": 3}')
    monkeypatch.setattr(ablations.subprocess, "run", run)
    for _ in range(2):
        args = SimpleNamespace(runs=str(tmp_path))
        result = ablations.trained(args, "clip", "a-9-0", "--lr", "1")
        assert result == {"loss": 3, "step_seconds": 0.2}
    (command,) = made
    assert command[1:] == [str(HERE / "train.py"), "clip", "--out",
                           str(tmp_path / "ablations/a-9-0"), "--runs", str(tmp_path), "--resume",
                           "--lr", "1"]


@pytest.mark.parametrize("flags", ablations.FLAMINGO.values(), ids=str)
def test_flamingos_variants_are_settings_that_exist(flags):
    settings = [flag for flag in flags if "=" in flag]
    config = options.with_settings(flamingo.PRESETS["tiny"], settings)
    assert (config != flamingo.PRESETS["tiny"]) == bool(settings)


def test_the_figures_are_those_of_the_models():
    shown = {*ablations.CLIP_FIGURES.values(), *ablations.FLAMINGO_FIGURES.values()}
    source = "".join((HERE / "common/evaluation" / name).read_text()
                     for name in ("questions.py", "retrieval.py"))
    for name in shown - {"seconds", "step_seconds", "shots_8"}:
        assert name.partition("_recall@")[0] in source


class TestLogisticRegression:
    @staticmethod
    def clouds(spread, seed=0, each=61):
        centres = torch.tensor([[5.0, 0.0, 1.0, 0.0, 0.0],
                                [0.0, 5.0, 0.0, 0.0, 2.0],
                                [0.0, 0.0, 9.0, 1.0, 0.0]])
        labels = torch.arange(3).repeat_interleave(each)
        noise = torch.randn(3 * each, 5, generator=torch.Generator().manual_seed(seed))
        return centres[labels] + spread * noise, labels

    def test_separate_clouds_are_classified(self):
        predict = ablations.logistic_regression(*self.clouds(0.5, 0), classes=3, l2=1e-4)
        features, labels = self.clouds(0.5, 1)
        assert predict(features).shape == (183, 3)
        assert accuracy(predict(features), labels) == 1.0

    def test_features_are_standardized_inside(self):
        features, labels = self.clouds(2.0)
        scaled = features * torch.tensor([1e4, 1.0, 1e-4, 1.0, 10.0])
        scaled += torch.tensor([0.0, 1e3, 0.0, -5.0, 0.0])
        plain = ablations.logistic_regression(features, labels, 3, l2=0.1)(features)
        other = ablations.logistic_regression(scaled, labels, 3, l2=0.1)(scaled)
        torch.testing.assert_close(plain, other, atol=2e-2, rtol=1e-2)

    def test_a_constant_feature_does_no_harm(self):
        features, labels = self.clouds(0.5)
        features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        assert ablations.logistic_regression(features, labels, 3, l2=0.1)(features).isfinite().all()

    def test_the_penalty_shrinks_the_scores_to_the_class_shares(self):
        features, labels = self.clouds(0.5)
        keep = torch.cat([torch.arange(20), torch.arange(61, 183)])      # 20, 61, 61 of the classes
        features, labels = features[keep], labels[keep]
        loose, tight = (ablations.logistic_regression(features, labels, 3, l2)(features)
                        for l2 in (1e-4, 1e5))
        assert loose.std(dim=0).min() > 1 > 1e-3 > tight.std(dim=0).max()
        shares = torch.tensor([20, 61, 61]) / 142                        # the bias is not penalized
        torch.testing.assert_close(tight.softmax(dim=1).mean(dim=0), shares, atol=1e-3, rtol=0)

    def test_it_is_the_minimum_of_the_penalized_loss(self):
        features, labels = self.clouds(3.0, each=17)
        features = features.double()
        x = (features - features.mean(0)) / features.std(0)
        scores = ablations.logistic_regression(features, labels, 3, l2=0.05)(features)
        # At the minimum the gradient of the fit balances the penalty: X^T (p - y) / N = -l2 W.
        weight = torch.linalg.lstsq(torch.cat([x, torch.ones(51, 1)], 1), scores).solution[:5]
        wrong = scores.softmax(1) - torch.eye(3)[labels]
        torch.testing.assert_close(x.T @ wrong / 51, -0.05 * weight, atol=1e-5, rtol=0)
        assert not math.isclose(weight.abs().max(), 0, abs_tol=0.1)
