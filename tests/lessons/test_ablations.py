"""lessons/ablations.py: settings, runs, verdicts, tables and pictures of the papers' claims."""
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from common.training.optimizer import find_recipe
from common.training.options import with_settings
from lessons import ablations, experiments
from lessons.ablations import Claim, folder

ROOT = Path(__file__).parents[2]
SMALL = {"a": "train.py clip --steps 3", "b": "train.py blip --init {a} --steps 4",
         "c": "lessons/experiments.py written {a} {b}", "d": "lessons/bridges.py gated {runs}/x"}
# The figures of each stage's and experiment's result.json that claims may name.
RECALL = r"text_to_image_recall@1(_reranked)?"
FIGURES = {
    "clip": "zero_shot_accuracy", "blip": rf"caption_accuracy|{RECALL}", "blip2-stage1": RECALL,
    "flamingo": r"(vqa|document)_accuracy|vqa_accuracy_4_(random|retrieved)_shots|shots_[08]"
                "|-perplexity_lm",
    "blip2-stage2": "vqa_accuracy", "blip2-stage2-t5": "vqa_accuracy",
    "blip2-instruct": "vqa_accuracy(/dialogue)?", "llava-tiles": "reading_accuracy",
    "llava-stage2": "(vqa|caption)_accuracy|relative_score|one_word_(un)?asked",
    "prompts": r"accuracy_(ensemble|single_prompts|probe_\d+)|kept_under_shift",
    **dict.fromkeys(("words", "captions", "supervised"), "zero_shot_accuracy|kept_under_shift"),
    "shots": "shots_[08]",
    **dict.fromkeys(("gated", "mixture", "qformer", "projector"), "vqa_accuracy|shots_[08]")}


def claims():
    return [claim for own in ablations.read_claims().values() for claim in own]


def put(runs, setting, seed, **figures):
    """A finished run with these figures."""
    out, command = folder(runs, setting, seed), ablations.SETTINGS[setting]
    out.mkdir(parents=True, exist_ok=True)
    steps = re.search(r"--steps (\d+)", command)
    figures |= {"steps": int(steps[1])} if steps else {}
    (out / "output.txt").write_text(f"{command}\nand what it printed\n")
    (out / "result.json").write_text(json.dumps(figures))


@pytest.fixture
def small(monkeypatch):
    """Four settings and no claims."""
    monkeypatch.setattr(ablations, "SETTINGS", SMALL)
    monkeypatch.setattr(ablations, "read_claims", lambda: {})


class TestSettings:
    def test_train_py_accepts_each_command(self, monkeypatch):
        asked = []
        monkeypatch.setattr(train, "train", lambda *given: asked.append(given[:3]))
        kinds = {name: command.split()[1] for name, command in ablations.SETTINGS.items()}
        for name, command in ablations.SETTINGS.items():
            if not command.startswith("train.py"):
                continue
            monkeypatch.setattr(sys, "argv", [*command.split(), "--runs", "r", "--resume",
                                              "--seed", "1", "--out", "o"])
            assert not train.main(), name
            stage, options, settings = asked.pop()
            row = train.STAGES[stage]
            losses = options.losses or row.losses
            config = with_settings(row.file.PRESETS["tiny"], [
                *[f"losses={losses}"] * bool(losses), *row.settings, *settings])
            find_recipe(row.file.RECIPES, "tiny", (stage, "shapes", losses), {
                key: getattr(options, key) for key in ("steps", "batch_size", "lr", "optimizer")})
            assert options.steps and config != row.file.PRESETS["tiny"] or not settings, name
            for start in ablations.needs(name):      # its weights are of the same model
                file = train.STAGES.get(kinds[start], row).file
                assert file is row.file or start.startswith("written"), name

    def test_the_other_scripts_do_so_too(self, monkeypatch, tmp_path):
        counts = {}
        for name, (count, _) in experiments.EXPERIMENTS.items():
            monkeypatch.setitem(experiments.EXPERIMENTS, name, (
                count, lambda args, *runs: {"x": counts.setdefault(args.experiment, len(runs))}))
        for name, command in ablations.SETTINGS.items():
            script, *words = command.split()
            if script == "lessons/experiments.py":
                monkeypatch.setattr(sys, "argv", [script, *words, "--seed", "1", "--out",
                                                  str(tmp_path / name)])
                experiments.main()
            elif script != "train.py":
                assert script == "lessons/bridges.py" and name == f"bridge-{words[0]}"
                path = ROOT / script
                assert not path.exists() or words[0] in path.read_text()
        assert counts == {"prompts": 1, "words": 0, "captions": 0, "supervised": 0, "shots": 1,
                          "written": 2, "written_beams": 2}

    def test_no_two_are_the_same_run(self):
        assert len(set(ablations.SETTINGS.values())) == len(ablations.SETTINGS)
        assert len(ablations.needs("texts-both")) == 1
        assert ablations.needs("written") == ["captioner", "filter"]


class TestReadClaims:
    def test_names_are_unique_and_figures_those_of_the_setting(self):
        found = claims()
        assert len({claim.name for claim in found}) == len(found) > 40
        for claim in found:
            assert claim.better != claim.than
            for side in (claim.better, claim.than):
                setting, _, figure = side.partition(":")
                kind = ablations.SETTINGS[setting].split()[1]
                assert re.fullmatch(FIGURES[kind], figure), (claim.name, side)

    @pytest.mark.parametrize("line, message", [
        ("| a | 1 | says | blip:x | clip:y |", "line 2: six cells"),
        ("| a | 1 | says | blip:x | blip:y | much |", "line 2: six cells"),
        ("| a | 1 | says | blip:x | blap:y | 0.1 |", "line 2: no setting blap")])
    def test_a_line_that_is_none(self, tmp_path, line, message):
        path = tmp_path / "c.md"
        path.write_text(f"## A\n{line}\n")
        with pytest.raises(ValueError, match=message):
            ablations.read_claims(path)


class TestWanted:
    def test_what_a_run_needs_comes_first(self):
        order = ablations.wanted([])
        assert order == list(ablations.SETTINGS)
        for place, setting in enumerate(order):
            assert {*ablations.needs(setting)} <= {*order[:place]}, setting
        assert ablations.wanted(["texts-both"]) == [
            "blip", "captioner", "filter", "written", "texts-both"]

    def test_of_a_claim_both_sides_even_if_a_setting_has_its_name(self):
        for claim in claims():
            assert {*claim.settings} <= {*ablations.wanted([claim.name])}, claim.name
        assert ablations.wanted(["llava-tiles"]) == ["llava-aligned", "llava-tiles", "llava-whole"]
        with pytest.raises(ValueError, match="flamingo-x: no claim"):
            ablations.wanted(["flamingo-x"])


@pytest.fixture
def runs(tmp_path, monkeypatch, small):
    """A folder with the parts, and a made-up subprocess that writes result.json.

    runs.made: the command lines. A setting in runs.broken fails.
    """
    state = SimpleNamespace(path=tmp_path / "my runs", made=[], broken=set(), seconds=0.0)
    for part in ("clip", "lm", "lm-t5-tiny"):
        (state.path / part).mkdir(parents=True)
        (state.path / part / "result.json").write_text("{}")

    def run(command, env, stdout, stderr):
        assert env["OMP_NUM_THREADS"] == "1"
        out = Path(command[command.index("--out") + 1])
        assert not (out / "result.json").exists()
        setting, _, seed = out.name.rpartition("-")
        for name in re.findall("{([abc])}", SMALL[setting]):
            assert (folder(state.path, name, seed) / "result.json").exists(), "it did not wait"
        time.sleep(state.seconds)
        state.made.append(command[1:])
        if out.name in state.broken:
            return SimpleNamespace(returncode=2)
        steps = re.search(r"--steps (\d+)", SMALL[setting])
        result = {"steps": int(steps[1])} if steps else {"x": 1}
        (out / "result.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(run=run))
    state.names = lambda: sorted(Path(c[c.index("--out") + 1]).name for c in state.made)
    return state


class TestRun:
    def test_each_is_made_once_with_what_it_needs(self, runs, capsys):
        runs.seconds = 0.02
        assert ablations.run([], runs.path, seeds=2, jobs=3) == 0
        assert runs.names() == [f"{name}-{seed}" for name in "abcd" for seed in (0, 1)]
        at = {name: str(folder(runs.path, name, 1)) for name in "abcd"}
        own = {command[-1]: command for command in runs.made}
        home, train_py = ["--runs", str(runs.path)], str(ROOT / "train.py")
        assert own[at["a"]] == [train_py, "clip", "--steps", "3", *home, "--resume", "--seed", "1",
                                "--out", at["a"]]
        assert own[at["b"]][1:4] == ["blip", "--init", at["a"]]
        assert own[at["c"]][1:] == ["written", at["a"], at["b"], "--seed", "1", "--out", at["c"]]
        assert own[at["d"]][1:] == ["gated", f"{runs.path}/x", *home, "--seed", "1", "--out",
                                    at["d"]]
        assert ablations.run([], runs.path, seeds=2, jobs=3) == 0 and len(runs.made) == 8
        assert "8 of 8 runs are there" in capsys.readouterr().out

    @pytest.mark.parametrize("damage", [
        lambda out: (out / "result.json").unlink(),
        lambda out: (out / "result.json").write_text('{"steps": 2}'),
        lambda out: (out / "output.txt").write_text("train.py clip --steps 3 --lr 1\n")])
    def test_broken_earlier_and_other_ones_are_made_again(self, runs, damage):
        ablations.run(["b"], runs.path, seeds=1, jobs=1)
        damage(folder(runs.path, "a", 0))
        assert ablations.result_of(runs.path, "a", 0) is None
        assert ablations.run(["b"], runs.path, seeds=1, jobs=1) == 0
        assert runs.names() == ["a-0", "a-0", "b-0"]
        assert ablations.result_of(runs.path, "a", 0) == {"steps": 3}

    def test_a_failed_one_stops_those_that_need_it_alone(self, runs, capsys):
        runs.broken.add("b-0")
        assert ablations.run([], runs.path, seeds=2, jobs=2) == 1
        assert runs.names() == ["a-0", "a-1", "b-0", "b-1", "c-1", "d-0", "d-1"]
        said = capsys.readouterr().out
        assert f"b, seed 0: failed, see {folder(runs.path, 'b', 0)}/output.txt\n" in said
        assert said.endswith("6 of 8 runs are there; missing: b-0, c-0\n")

    def test_nothing_else_starts_after_ctrl_c(self, runs, monkeypatch):
        runs.seconds, seeds = 0.2, iter([["a", "b", "d"]])

        def wanted(names):
            for settings in seeds:
                return settings
            raise KeyboardInterrupt
        monkeypatch.setattr(ablations, "wanted", wanted)
        with pytest.raises(KeyboardInterrupt):
            ablations.run([], runs.path, seeds=2, jobs=1)
        assert runs.names() in ([], ["a-0"])

    def test_a_missing_part_is_named_with_its_command(self, runs):
        (runs.path / "lm-t5-tiny/result.json").unlink()
        with pytest.raises(ValueError, match="train.py lm --preset t5-tiny --runs .*my runs"):
            ablations.run([], runs.path, seeds=1, jobs=1)


@pytest.mark.usefixtures("small")
class TestValues:
    def test_they_are_of_finished_runs_sorted_and_perhaps_negative(self, tmp_path):
        for seed, x in enumerate((0.3, 0.1, 0.2)):
            put(tmp_path, "a", seed, x=x)
        (folder(tmp_path, "a", 2) / "result.json").write_text('{"x": 9, "steps": 1}')
        assert ablations.values(tmp_path, "a:x", 3) == [0.1, 0.3]
        assert ablations.values(tmp_path, "a:-x", 3) == [-0.3, -0.1]
        assert ablations.values(tmp_path, "a:x", 1) == [0.3]
        assert ablations.values(tmp_path, "a:y", 3, optional=True) == []
        with pytest.raises(ValueError, match="a:y: a run of a has no y"):
            ablations.values(tmp_path, "a:y", 3)

    def test_levels_of_shots_and_of_reranked_figures_have_shorter_names(self, tmp_path):
        for seed in range(2):
            put(tmp_path, "a", seed, shots_chance=0.5, vqa_blind=0.2 + 0.2 * seed, vqa_chance=0.1,
                **{"recall@1_chance": 0.01})
        names = ("shots_8", "recall@1_reranked", "recall@1", "vqa", "vqa_4_retrieved_shots")
        assert [ablations.levels(tmp_path, f"a:{name}", 3) for name in names] == [
            {"chance": 0.5}, {"chance": 0.01}, {"chance": 0.01},
            {"chance": 0.1, "wrong image": pytest.approx(0.3)}, {}]


class TestJudge:
    @pytest.mark.parametrize("better, than, by, verdict, difference", [
        ([0.5, 0.6], [0.3, 0.4], 0.1, "reproduced", "+0.100 to +0.300"),
        ([0.57], [0.55], 0.02, "reproduced", "+0.020 to +0.020"),          # 0.0199999 in floats
        ([0.5, 0.6], [0.3, 0.4], 0.11, "undecided", "+0.100 to +0.300"),
        ([0.5, 0.6], [0.3, 0.4], 0.3, "undecided", "+0.100 to +0.300"),
        ([0.5, 0.6], [0.3, 0.4], 0.31, "not reproduced", "+0.100 to +0.300"),
        ([0.5], [0.5], 0.0, "reproduced", "+0.000 to +0.000"),
        ([0.5], [0.5], 0.001, "not reproduced", "+0.000 to +0.000"),
        ([0.49, 0.7], [0.3, 0.5], -0.01, "reproduced", "-0.010 to +0.400"),
        ([0.48, 0.7], [0.3, 0.5], -0.01, "undecided", "-0.020 to +0.400"),
        ([0.3], [0.4, 0.5], -0.05, "not reproduced", "-0.200 to -0.100"),
        ([-2.0], [-40.0, -30.0], 0.5, "reproduced", "+28.000 to +38.000"),
        ([], [0.5], 0.0, "no runs", "-"), ([0.5], [], 0.0, "no runs", "-")])
    def test_verdicts(self, better, than, by, verdict, difference):
        assert ablations.judge(better, than, by) == (verdict, difference)


@pytest.fixture
def page(tmp_path, monkeypatch, small):
    """A RESULTS.md with the marks, and two claims of which one has runs of two seeds of three."""
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(ablations, "read_claims", lambda: {"BLIP-2 (Li et al.)": [
        Claim("first", "Table 1", "one is better", "a:x", "b:x", 0.06),
        Claim("second", "2", "less is better", "c:-y", "d:-y", 0.5)]})
    for seed in range(3):
        put(tmp_path, "a", seed, x=0.5 + 0.1 * seed, x_chance=0.25)
        put(tmp_path, "b", seed, x=0.45)
        if seed < 2:
            put(tmp_path, "c", seed, y=3.0)
    (tmp_path / "pictures").mkdir()
    text = f"before\n\n{ablations.BEGIN}old\n{ablations.END}\nafter\n"
    (tmp_path / "RESULTS.md").write_text(text)
    return tmp_path / "RESULTS.md"


class TestWriteReport:
    def test_tables_stand_between_the_marks_and_the_rest_stays(self, page, capsys):
        ablations.write_report(page.parent, 3)
        text = page.read_text()
        assert text.startswith(f"before\n\n{ablations.BEGIN}### BLIP-2 (Li et al.)\n\n| claim |")
        assert text.endswith(f"(pictures/claims-blip-2.png)\n\n{ablations.END}\nafter\n")
        rows = [line for line in text.splitlines() if line[:1] == "|"]
        assert rows[2:] == [
            "| first (Table 1): one is better | `a:x` 0.600 (0.500 to 0.700) | `b:x` 0.450 (0.450 "
            "to 0.450) | chance 0.250 | +0.050 to +0.250 | +0.060 | **undecided** |",
            "| second (2): less is better | `c:-y` -3.000 (-3.000 to -3.000) | `d:-y` - | - | - | "
            "+0.500 | **no runs** (seeds: 2, 0) |"]
        assert {row.count("|") for row in rows} == {8}
        assert all(row in capsys.readouterr().out for row in rows[2:3])
        picture = Image.open(page.parent / "pictures/claims-blip-2.png")
        assert picture.height == ablations.TOP + 2 * ablations.HEIGHT
        ablations.write_report(page.parent, 3)
        assert page.read_text() == text

    @pytest.mark.parametrize("text", ["", ablations.BEGIN, f"{ablations.END}{ablations.BEGIN}"])
    def test_a_page_without_the_marks_stays(self, page, text):
        page.write_text(text)
        with pytest.raises(ValueError, match="no marks"):
            ablations.write_report(page.parent, 3)
        assert page.read_text() == text

    def test_the_real_page_has_the_marks(self):
        text = (ROOT / "lessons/RESULTS.md").read_text()
        assert 0 < text.index(ablations.BEGIN) < text.index(ablations.END)


class TestPlot:
    def drawn(self, better, than, verdict="reproduced", **marks):
        """The pixels of a plot of one claim, (height, width, 3)."""
        claim = Claim("name", "1", "says", "a:x", "b:x", 0.02)
        return np.asarray(ablations.plot("Title", [(claim, better, than, verdict, "-", marks)]))

    def at(self, page, value, low, high, y):
        """The colour where a value stands, `y` pixels below the top of the claim."""
        share = (value - low) / (high - low)
        x = round(ablations.LEFT + share * (ablations.WIDTH - ablations.RIGHT - ablations.LEFT))
        return tuple(page[ablations.TOP + y, x])

    @pytest.mark.parametrize("low, better, than, high", [
        (0, [0.3, 0.4, 0.8], [0.1, 0.55, 0.6], 1), (-30, [-2.0], [-30.0, -20.0], 0),
        (0, [1.5, 2.0], [0.2], 2), (0, [0.5, 0.5], [0.5], 1)])
    def test_dots_stand_at_their_values(self, low, better, than, high):
        page = self.drawn(better, than, chance=0.0 if low == 0 else -10.0)
        for value in better:
            assert self.at(page, value, low, high, 30) == ablations.GREEN, "filled"
        for value in than:
            assert self.at(page, value, low, high, 50) == (255, 255, 255), "open"
            assert self.at(page, value, low, high, 45) == ablations.GREEN, "its outline"
        middle = [(own[0] + own[1]) / 2 for own in (better, than) if len(own) > 2]
        for value, y in zip(middle, (30, 50)):
            assert self.at(page, value, low, high, y) == ablations.GREEN, "the range"

    def test_levels_are_strokes_with_names(self):
        plain, page = self.drawn([0.9], [0.7]), self.drawn([0.9], [0.7], **{"wrong image": 0.25})
        assert self.at(page, 0.25, 0, 1, 23) == ablations.INK
        changed = np.argwhere((plain != page).any(axis=2)) - (ablations.TOP, 0)
        assert changed[:, 0].min() >= 22 and 60 < changed[:, 0].max() < 76, "its name below"

    @pytest.mark.parametrize("better, than, names, axis", [
        ("a:x", "b:x", ["a", "b"], "x"), ("a:x", "a:y", ["x", "y"], "a"),
        ("a:x", "b:y", ["a:x", "b:y"], "")])
    def test_sides_are_named_by_what_differs(self, monkeypatch, better, than, names, axis):
        written, text = [], ablations.ImageDraw.ImageDraw.text
        monkeypatch.setattr(ablations.ImageDraw.ImageDraw, "text", lambda self, at, words, **how: (
            written.append((how.get("anchor"), words)), text(self, at, words, **how)))
        claim = Claim("name", "1", "says", better, than, 0.02)
        ablations.plot("Title", [(claim, [0.9], [0.1], "undecided", "-", {"chance": 0.5})])
        assert [words for anchor, words in written if anchor == "rm"] == names
        assert [words for anchor, words in written if anchor == "ma"] == ["chance", axis]
        assert {"name", "undecided"} <= {words for _, words in written}

    def test_claims_without_runs_or_one_value(self):
        for better, than in (([], []), ([0.0], []), ([], [-3.0])):
            self.drawn(better, than, "no runs")
