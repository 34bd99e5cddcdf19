"""The experiments of lessons/: each command runs on a small run and prints its table."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import clip
from common.training import checkpoint
from common.data.batches import world_tokenizer
from common.data.shapes.world import Shapes

HERE = Path(__file__).parents[1]
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
    """Run one experiment -> {name of the row: its cells}."""
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


def test_probe_beats_an_untrained_zero_shot_classifier(run, monkeypatch, capsys):
    table = rows(monkeypatch, capsys, "probe", "--run", run)
    assert float(table["linear probe, 64 a class"][0]) > float(table["zero-shot"][0]) + 0.1


def test_shift_trains_the_same_tower_with_labels(run, monkeypatch, capsys):
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


def test_flamingos_parts_are_taken_away_one_by_one(monkeypatch, capsys):
    asked = []

    def trained(options, stage, name, *flags):
        assert stage == "flamingo" and flags[2:6] == (
            "--steps", "9", "--batch_size", "120")
        asked.append(flags[6:])
        return dict.fromkeys(ablations.FLAMINGO_FIGURES.values(), 0.1 * int(flags[1]))
    monkeypatch.setattr(ablations, "trained", trained)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "flamingo", "--steps", "9"])
    ablations.main()
    out = capsys.readouterr().out
    assert out.count("0.1 (0-0.2)") == 7 * 8 and "3 seeds, 9 steps each" in out
    assert len(set(asked)) == 8 and asked[0] == ()
