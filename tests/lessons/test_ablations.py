"""lessons/ablations.py: each command runs on a small run and prints its table."""
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blip
import flamingo
import train
from common.data.shapes.world import Shapes
from common.training import options
from lessons import ablations
from tests.helpers import assert_close
from tests.training.runs import build

HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained CLIP in a run folder, and a world with small splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "splits", Shapes.splits | {"single": 84, "shifted": 126})
        made = build(tmp_path_factory.mktemp("runs"), batch_size=8)
        train.save(made)
        yield made.folder.path


@pytest.fixture
def said(monkeypatch, capsys):
    """said(*argv) is what `python lessons/ablations.py ARGV` prints."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["ablations.py", *map(str, argv)])
        ablations.main()
        return capsys.readouterr().out
    return call


def rows(out):
    """{name of a row: its four cells}."""
    lines = [line.rsplit(None, 4) for line in out.splitlines()]
    return {name.strip(): cells for name, *cells in lines if len(cells) == 4}


class TestBench:
    def test_accuracy_under_shift_is_that_of_each_style(self, run):
        bench = ablations.Bench(run)
        records, labels = bench.records["shifted"], bench.labels(bench.records["shifted"])
        texture = torch.tensor([record["source"].style == "texture" for record in records])
        scores = torch.eye(42)[labels]
        scores[texture] = torch.eye(42)[0]   # then the first class is chosen
        share = (labels[texture] == 0).float().mean()
        assert_close("accuracy of outline, texture, palette", bench.accuracies(scores, "shifted"),
                     [1, share, 1])


class TestEnsemble:
    def test_it_shows_every_prompt_and_both_ways_to_average(self, run, said, monkeypatch):
        def zero_shot(bench, templates):
            """Scores that depend on the first template and on how many there are."""
            seed = 7 * len(templates) + Shapes.templates.index(templates[0])

            def score(split):
                labels = bench.labels(bench.records[split])
                noise = torch.randn(len(labels), 42, generator=torch.Generator().manual_seed(seed))
                return 0.1 * (noise + 2 * torch.eye(42)[labels])
            return score
        monkeypatch.setattr(ablations.Bench, "zero_shot", zero_shot)
        table, bench = rows(said("ensemble", "--run", run)), ablations.Bench(run)
        assert table.pop("accuracy") == ["plain", "outline", "texture", "palette"]
        plain = {name: float(row[0]) for name, row in table.items()}
        single = {repr(t): zero_shot(bench, [t])("single") for t in Shapes.templates}
        scores = single | {
            "ensemble": zero_shot(bench, Shapes.templates)("single"),
            "mean of probabilities": sum((bench.model.logit_scale.exp() * score).softmax(dim=1)
                                         for score in single.values())}
        want = {name: bench.accuracies(score, "single")[0] for name, score in scores.items()}
        want["mean of the single prompts"] = sum(want[name] for name in single) / len(single)
        assert plain == pytest.approx(want, abs=1e-3) and len(set(plain.values())) > 4


class TestProbe:
    def test_it_beats_an_untrained_zero_shot_classifier(self, run, said, monkeypatch):
        short = functools.partial(ablations.logistic_regression, steps=15)
        monkeypatch.setattr(ablations, "logistic_regression", short)
        table = rows(said("probe", "--run", run))
        assert float(table["linear probe, 64 a class"][0]) > float(table["zero-shot"][0]) + 0.1


class TestShift:
    def test_it_trains_the_same_encoder_with_labels(self, run, said):
        table = rows(said("shift", "--run", run, "--steps", "2"))
        assert set(table) == {"accuracy", "zero-shot CLIP", "supervised"}
        assert all(0 <= float(v) <= 1 for v in table["supervised"])


class TestCompare:
    @pytest.mark.parametrize("argv, stage, steps", [
        ("batch --pairs 1024", "clip", {"softmax 32": 32, "softmax 128": 8, "softmax 512": 2}),
        ("sigmoid --pairs 1024", "clip", {"softmax 32": 32, "sigmoid 32": 32}),
        ("flamingo --steps 9", "flamingo", dict.fromkeys(
            ("flamingo", "gates open", "all images", "mlp resampler", "every 2nd", "every 4th",
             "no pages", "lm unfrozen"), 9)),
        ("blip --steps 9", "blip", dict.fromkeys(
            ("blip", "random negatives", "hardest negatives", "no soft targets", "no queue",
             "no momentum", "all shared", "all but cross", "nothing shared"), 9))])
    def test_it_prints_median_and_range_of_the_seeds(self, monkeypatch, said, argv, stage, steps):
        asked = {}

        def trained(options, of, name, *flags):
            asked[name] = of, *flags
            return dict.fromkeys(figures.values(), (0.3, 0.1, 0.2)[int(name[-1])])
        figures = getattr(ablations, f"{stage.upper()}_FIGURES")
        monkeypatch.setattr(ablations, "trained", trained)
        out = said(*argv.split())
        assert out.count("0.2 (0.1-0.3)") == len(figures) * len(steps)
        unit, size = argv.split()[1:]
        assert f"3 seeds, {int(size):,d} {unit[2:]} each" in out
        assert all(f"\n{name} " in out for name in steps)
        assert all(f"-{size}-" in name for name in asked), "other sizes are other runs"
        assert [(of, flags[1], flags[flags.index("--steps") + 1])
                for of, *flags in asked.values()] \
            == [(stage, seed, str(count)) for count in steps.values() for seed in "012"]
        assert len({frozenset(flags) - set("012") for flags in asked.values()}) == len(steps)

    @pytest.mark.parametrize("model, table, same", [
        (flamingo, ablations.FLAMINGO, 2), (blip, ablations.BLIP, 1)])   # plain, and --unfreeze
    def test_variants_are_settings_that_exist(self, model, table, same):
        tiny = model.PRESETS["tiny"]
        variants = [options.with_settings(tiny, [flag for flag in flags if "=" in flag])
                    for flags in table.values()]
        assert sum(config == tiny for config in variants) == same
        assert len(set(map(str, variants))) == len(variants) - same + 1

    def test_the_figures_are_those_of_the_models(self):
        folder = HERE / "common/evaluation"
        source = "".join((folder / f"{name}.py").read_text()
                         for name in ("questions", "retrieval", "matching"))
        for name in {*ablations.CLIP_FIGURES.values(), *ablations.FLAMINGO_FIGURES.values(),
                     *ablations.BLIP_FIGURES.values()}:
            assert name.partition("_recall@")[0] in source + "shots_8 seconds step_seconds"


@pytest.fixture
def engine(monkeypatch):
    """Captioners and filters by name: a caption says who wrote it, a filter keeps even scenes,
    that of the shared run odd ones."""
    monkeypatch.setattr(Shapes, "splits", Shapes.splits | {"web": 7})
    monkeypatch.setattr(ablations.blip_model, "open_trained",
                        lambda run, losses: (f"{Path(run).name} {losses[0]}", None))

    def texts(writer, keep, world, **how):
        for i in range(7):
            record = world.record("web", i) | {"number": i}
            written = f"by {writer.model} {how.get('num_beams', '')}".strip()
            for synthetic, text in ((False, record["texts"][0]), (True, written)):
                row = record | {"texts": [text]}
                yield i, row, synthetic, keep([row]).item()
    monkeypatch.setattr(ablations.blip_model, "capfilt_texts", texts)
    monkeypatch.setattr(ablations.matching, "probabilities", lambda model, tokenizer, records: (
        torch.tensor([float((r["number"] + ("shared" in model)) % 2 == 0) for r in records])))


@pytest.mark.usefixtures("engine")
class TestCapfilt:
    def test_each_row_has_its_texts_and_trains_a_new_model(self, tmp_path, said, monkeypatch):
        made = []

        def trained(args, stage, name, *flags):
            made.append((stage, name, *flags))
            return dict.fromkeys(ablations.BLIP_FIGURES.values(), 0.2)
        monkeypatch.setattr(ablations, "trained", trained)
        out = said("capfilt", "--runs", tmp_path, "--steps", "9", "--seeds", "1")
        assert made[0] == ("blip", "shared", "--init", f"{tmp_path}/blip", "--set",
                           "human_only=true", "--steps", "9")
        web = [Shapes().record("web", i)["texts"][0] for i in range(7)]
        every, even = range(7), range(0, 7, 2)
        by, beams = "by blip-captioner lm", "by blip-captioner lm 3"
        want = {"none": [(i, web[i]) for i in every], "filter": [(i, web[i]) for i in even],
                "captioner": [(i, text) for i in every for text in (web[i], by)],
                "both": [(i, text) for i in even for text in (web[i], by)],
                "both, beams": [(i, text) for i in even for text in (web[i], beams)],
                "both, one model": [(i, text) for i in range(1, 7, 2)
                                    for text in (web[i], "by shared lm")]}
        for (name, pairs), run in zip(want.items(), made[1:], strict=True):
            file = run[-3].removeprefix("shapes:texts=")
            assert run == ("blip", f"{name.replace(' ', '-')}-9-0", "--seed", "0", "--steps", "9",
                           "--data", f"shapes:texts={file}", "--from", f"vision={tmp_path}/clip")
            rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
            assert [(row["scene"], row["text"]) for row in rows] == pairs, name
            assert f"\n{name} " in out

    def test_texts_are_written_once_and_counted(self, tmp_path, capsys):
        args = SimpleNamespace(runs=str(tmp_path))
        for _ in range(2):
            file = ablations.write_texts(args, "both", "a", "b", lambda synthetic, keep: keep)
        truth = [Shapes().record("web", i)["truth"] for i in range(7)]
        lines = capsys.readouterr().out.splitlines()
        assert file == tmp_path / "ablations/both.jsonl" and len(lines) == 2
        assert lines[0] == (f"a web texts: kept {4 / 7:.3f}, true {sum(truth) / 7:.3f} before "
                            f"and {sum(truth[::2]) / 4:.3f} after")


class TestBlip2:
    """The four commands on BLIP-2 and InstructBLIP."""

    def runs(self, said, monkeypatch, command, figures):
        """[(stage, name, flags), ...] of the runs that a command makes, and what it prints."""
        made = []
        monkeypatch.setattr(ablations, "trained", lambda args, stage, name, *flags: made.append(
            (stage, name, " ".join(flags))) or dict.fromkeys(figures.values(), 0.2))
        out = said(command, "--runs", "a", "--steps", "9", "--seeds", "1")
        assert out.count("0.2 (0.2-0.2)") == len(made) * len(figures)
        return made

    def test_stage_1_and_a_second_one_from_each(self, said, monkeypatch):
        both = ablations.STAGE1_FIGURES | ablations.STAGE2_FIGURES
        made = []
        monkeypatch.setattr(ablations, "trained", lambda args, stage, name, *flags: made.append(
            (stage, name, " ".join(flags[2:]))) or dict.fromkeys(both.values(), 0.2))
        said("stage1", "--runs", "a", "--steps", "9", "--seeds", "1")
        names = [name for _, name, _ in made]
        assert names[:5] == ["stage-1-9-0", "without-itg-9-0", *(f"{n}-queries-9-0"
                                                                 for n in (1, 4, 16))]
        assert [name for _, name, _ in made[5:]] == [
            f"from-{name.replace('-9-', '-18-')}" for name in names[:5]]
        assert made[1] == ("blip2-stage1", names[1], "--steps 9 --losses itc,itm")
        assert made[9] == ("blip2-stage2", "from-16-queries-18-0",
                           "--steps 18 --init a/ablations/16-queries-9-0")

    def test_stage_2_with_and_without_the_first(self, said, monkeypatch):
        made = self.runs(said, monkeypatch, "stage2", ablations.STAGE2_FIGURES)
        assert [run[:2] for run in made] == [
            ("blip2-stage2", "decoder-9-0"), ("blip2-stage2", "decoder-without-stage-1-9-0"),
            ("blip2-stage2-t5", "t5-18-0"), ("blip2-stage2-t5", "t5-without-stage-1-18-0")]
        assert ["--init none" in flags for *_, flags in made] == [False, True] * 2

    def test_instructions_through_four_queries(self, said, monkeypatch):
        made = self.runs(said, monkeypatch, "instruct", ablations.INSTRUCT_FIGURES)
        assert {stage for stage, *_ in made} == {"blip2-instruct"}
        assert all("--init a/ablations/from-4-queries-9-0" in flags for *_, flags in made)
        assert "--set qformer_text=false" in made[1][2] and "--set balance=1" in made[2][2]

    def test_shots_of_flamingo_and_of_blip2(self, said, monkeypatch):
        for file in (ablations.flamingo_model, ablations.blip2_model):
            monkeypatch.setattr(file, "from_pretrained", lambda path: (path.name, None))
        monkeypatch.setattr(ablations.questions, "episodes", lambda writer, world, count: {
            "shots_0": len(writer.model) / 100, "shots_2": 0.5, "shots_4": 0.6, "shots_8": 0.7,
            "shots_8_shuffled": 0.8, "shots_chance": 0.5})
        lines = said("shots", "--runs", "a").splitlines()
        assert lines[1].split() == ["flamingo", "0.080", "0.500", "0.600", "0.700", "0.800"]
        assert lines[2].split()[:2] == ["blip2-stage2", "0.120"] and len(lines) == 3


class TestTrained:
    def test_a_run_is_made_once_and_its_step_is_timed_by_its_log(self, tmp_path, monkeypatch):
        made, out = [], tmp_path / "ablations/a-9-0"

        def run(command, check):
            made.append(command[1:])
            out.mkdir(parents=True)
            (out / "log.jsonl").write_text("\n".join(
                f'{{"step": {step}, "seconds": {seconds}}}'
                for step, seconds in ((10, 5), (15, 7), (25, 27), (30, 28))))
            (out / "result.json").write_text('{"loss": 3}')
        monkeypatch.setattr(ablations.subprocess, "run", run)
        for _ in range(2):
            args = SimpleNamespace(runs=str(tmp_path))
            result = ablations.trained(args, "clip", "a-9-0", "--lr", "1")
            assert result == {"loss": 3, "step_seconds": 0.4}
        assert made == [[str(HERE / "train.py"), "clip", "--out", str(out), "--runs", str(tmp_path),
                         "--resume", "--lr", "1"]]


class TestLogisticRegression:
    def test_it_is_the_minimum_of_the_loss_with_a_penalty_on_standardized_weights(self):
        scales, shifts = torch.tensor([1e3, 1.0, 1e-3, 3.0, 0.0]), torch.tensor([0, 1e3, 0, -5, 2])
        labels = torch.tensor([0] * 11 + [1] * 17 + [2] * 23)
        features = ((torch.randn(51, 5) + 2 * torch.eye(5)[labels]) * scales + shifts).double()
        predict = ablations.logistic_regression(features, labels, classes=3, l2=0.05)
        scores, x = predict(features), (features - features.mean(0)) / features.std(0)
        x = x[:, :4]                     # a constant feature says nothing
        # At the minimum X^T (p - y) / N = -l2 W, and the bias has no penalty.
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(51, 1)], 1), scores).solution
        wrong = (scores.softmax(1) - torch.eye(3)[labels]) / 51
        assert_close("gradient of the weights", x.T @ wrong, -0.05 * solution[:4], 1e-5)
        assert_close("gradient of the bias", wrong.sum(0), torch.zeros(3).double(), 1e-5)
        assert solution[:4].abs().max() > 0.1
        assert_close("scores of other features", predict(features[:7]), scores[:7])
