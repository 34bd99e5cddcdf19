"""Command lines: what they offer, what they do, and mistakes in one line."""
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
import train
from common.data.safe_read import read_json
from common.training import checkpoint, options
from tests.training.runs import SIZES, TOY

HERE = Path(train.__file__).parent


def command(main, *argv):
    """Be `python FILE.py ARGV` -> (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        patch.setenv("COLUMNS", "100")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                pytest.raises(SystemExit) as caught:
            options.run_main(main)
    return caught.value.code or 0, out.getvalue(), err.getvalue()


def mistake(main, *argv):
    """The one line on stderr with which a command ends with status 2."""
    status, out, err = command(main, *argv)
    assert status == 2 and "Traceback" not in err, err
    lines = err.splitlines()
    if not re.match(rf"{main.__module__}\.py.*: error: ", lines[-1]):     # argparse: usage, error
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20, err
    return lines[-1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Everything happens in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    status, out, err = command(train.main, *TOY, "--steps", 3, "--out", folder)
    torch.set_num_threads(before)
    assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three pictures, a file that is none, and a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", "red"), ("blue", "blue"), ("a long name of a picture", "green")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "inner").mkdir()
    return folder


class TestOptions:
    @dataclass
    class Made:
        words: str = options.option("some", "words")
        count: int | None = options.option(None, "a number")
        share: float = options.option(0.5, "a share")
        kind: str = options.option("one", "a kind", choices=("one", "two"))
        switch: bool = options.option(False, "a switch")
        parts: tuple = options.option((), "parts", flag="from", append=True, metavar="PART=RUN")

    def parse(self, *argv):
        parser = options.parser("about")
        options.add_options(parser, self.Made)
        return vars(parser.parse_args(argv))

    def test_every_field_is_a_flag_of_its_own_type(self):
        assert self.parse() == {"words": "some", "count": None, "share": 0.5, "kind": "one",
                                "switch": False, "parts": []}
        given = self.parse("--words", "7", "--count", "7", "--share", "7", "--kind", "two",
                           "--switch", "--from", "a=b")
        assert given == {"words": "7", "count": 7, "share": 7.0, "kind": "two", "switch": True,
                         "parts": ["a=b"]}
        assert [type(v) for v in given.values()] == [str, int, float, str, bool, list]

    def test_a_list_grows_and_no_call_leaves_anything_behind(self):
        assert self.parse("--from", "a=1", "--from", "b=2")["parts"] == ["a=1", "b=2"]
        assert self.parse()["parts"] == []

    def test_a_switch_takes_no_value_and_can_be_turned_off(self):
        assert self.parse("--switch", "--no-switch")["switch"] is False
        for wrong in (["--switch", "False"], ["--switch=False"]):
            with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                self.parse(*wrong)

    @pytest.mark.parametrize("wrong", [["--count", "2.5"], ["--share", "much"], ["--kind", "three"],
                                       ["--other", "1"], ["--count"]])
    def test_other_flags_and_values_are_refused(self, wrong):
        with pytest.raises(SystemExit, match="2"), contextlib.redirect_stderr(io.StringIO()):
            self.parse(*wrong)


class TestWithSettings:
    @dataclass
    class Config:
        width: int = 7
        share: float = 0.5
        name: str = "x"
        on: bool = True
        stages: tuple[int, ...] = ()

    def test_values_are_read_as_the_fields_type(self):
        made = options.with_settings(self.Config(), ["width=11", "share=2", "name=a=b", "on=False"])
        assert dataclasses.astuple(made) == (11, 2.0, "a=b", False, ())
        assert type(made.share) is float and made.on is False
        assert options.with_settings(self.Config(), []) == self.Config()
        assert options.with_settings(self.Config(), ["width=2", "width=3"]).width == 3

    @pytest.mark.parametrize("text, value", [("1,2,11,3", (1, 2, 11, 3)), ("7", (7,)), ("", ())])
    def test_a_row_of_numbers_is_written_with_commas(self, text, value):
        assert options.with_settings(self.Config(), [f"stages={text}"]).stages == value
        assert options.with_settings(self.Config(stages=(5, 5)), [f"stages={text}"]).stages == value

    @pytest.mark.parametrize("setting, words", [
        ("width=wide", "width takes int, not 'wide'"), ("width=2.5", "width takes int"),
        ("on=1", "on takes bool"), ("stages=1,x", "stages takes numbers like 1,2,3, not '1,x'"),
        ("stages=1,,2", "stages takes numbers"), ("stages=(1, 2)", "stages takes"),
        ("depth=3", "one of width, share, name"),
        ("width", "write key=value with one of width, share, name, on, stages")])
    def test_what_no_field_takes_is_refused(self, setting, words):
        with pytest.raises(ValueError, match=words):
            options.with_settings(self.Config(), [setting])


class TestCheckFields:
    @dataclass
    class Config:
        width: int = 7
        skip: int = 0
        share: float = 0.5
        kind: str = "one"
        on: bool = False

    def check(self, **changes):
        options.check_fields(self.Config(**changes), {"kind": ("one", "two")},
                             {"skip": 0, "share": 0.25})

    def test_fields_that_a_model_can_have_pass(self):
        self.check()
        self.check(width=1, share=0.25, kind="two", on=True)

    @pytest.mark.parametrize("changes, words", [
        ({"width": 0}, "width=0: must be at least 1"),
        ({"skip": -1}, "skip=-1: must be at least 0"),
        ({"share": 0.2}, "share=0.2: must be at least 0.25"), ({"share": math.nan}, "share=nan"),
        ({"kind": "three"}, "kind=three is not one of one, two")])
    def test_others_are_refused(self, changes, words):
        with pytest.raises(ValueError, match=words):
            self.check(**changes)


class TestRunCommand:
    def call(self, *argv):
        """Be `python model.py ARGV` with three commands -> what was called."""
        called = []

        def one(run, picture, *names):
            """about one"""
            called.append(("one", run, picture, names))

        def two(run, text, *, count=3, note=None):
            """about two"""
            called.append(("two", run, text, count, note))

        def three(run, *, shot: ("PICTURE", "TEXT")):
            """about three"""
            called.append(("three", run, shot))

        def main():
            return options.run_command("about the model", one, two, three)
        status, out, err = command(main, *argv)
        return called[0] if called else (status, out + err)

    @pytest.mark.parametrize("argv, want", [
        ("runs/x one a.png red blue", ("one", "runs/x", "a.png", ("red", "blue"))),
        ("runs/x two word", ("two", "runs/x", "word", 3, None)),
        ("runs/x two word --count 5 --note 7", ("two", "runs/x", "word", 5, "7")),
        ("runs/x three", ("three", "runs/x", [])),
        ("runs/x three --shot a b --shot c d", ("three", "runs/x", [["a", "b"], ["c", "d"]]))])
    def test_a_signature_is_a_command_line(self, argv, want):
        assert self.call(*argv.split()) == want

    @pytest.mark.parametrize("argv", ["runs/x one a.png", "runs/x two", "runs/x two w --count many",
                                      "runs/x three --shot a", "runs/x two w --picture x",
                                      "runs/x four"])
    def test_another_one_is_refused(self, argv):
        status, text = self.call(*argv.split())
        assert status == 2 and "error: " in text

    def test_docstrings_are_the_help(self):
        status, text = self.call("--help")
        assert status == 0
        assert all(f"about {name}" in text for name in ("the model", "one", "two", "three"))
        assert "about two" in self.call("x", "two", "--help")[1]


class TestRunMain:
    @pytest.mark.parametrize("returned, status", [(0, 0), (None, 0), (130, 130), (143, 143)])
    def test_the_exit_status_is_mains(self, returned, status):
        with pytest.raises(SystemExit) as caught:
            options.run_main(lambda: returned)
        assert (caught.value.code or 0) == status

    @pytest.mark.parametrize("error, line", [
        (ValueError("a mistake"), "error: a mistake\n"),
        (ValueError("Traceback of a worker\n  its lines\nValueError: a.png: no picture"),
         "error: a.png: no picture\n"), (ValueError(), "error: ValueError()\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"),
         "error: [Errno 2] No such file or directory: 'x.txt'\n")])
    def test_a_mistake_is_one_line_and_status_2(self, error, line, capsys):
        def main():
            raise error
        with pytest.raises(SystemExit, match="2"):
            options.run_main(main)
        assert capsys.readouterr() == ("", line)

    def test_a_reader_that_has_closed_the_pipe_is_no_mistake(self, monkeypatch):
        def main():
            raise BrokenPipeError
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with pytest.raises(SystemExit) as caught:
            options.run_main(main)
        assert not caught.value.code

    def test_other_errors_keep_their_traceback(self):
        with pytest.raises(ZeroDivisionError):
            options.run_main(lambda: 1 // 0)

    def test_ctrl_c_is_status_130(self):
        def main():
            raise KeyboardInterrupt
        with pytest.raises(SystemExit, match="130"):
            options.run_main(main)


class TestHelp:
    def test_train_explains_itself_and_every_flag(self):
        status, out, _ = command(train.main, "--help")
        assert status == 0
        for line in train.__doc__.splitlines():
            assert line in out
        words = " ".join(out.split())
        for field in dataclasses.fields(train.Options):
            assert f"--{field.metadata.get('flag', field.name)} " in out
            assert len(field.metadata["help"]) > 10 and field.metadata["help"] in words
        assert "(default 200)" in out and "(default None)" not in out and "{auto,bf16,fp32}" in out
        assert max(map(len, out.splitlines())) <= 100

    def test_train_lists_its_stages(self):
        status, out, _ = command(train.main, "--list")
        assert status == 0
        for name, stage in train.STAGES.items():
            assert re.search(f"^{name} .*{re.escape(stage.about)}$", out, re.M)
            assert ", ".join(stage.file.PRESETS) in out

    def test_a_model_explains_its_commands(self):
        status, out, _ = command(clip.main, "--help")
        assert status == 0 and clip.__doc__.splitlines()[0] in out
        for words in ("classify", "search", "print the probability of each NAME", "RUN"):
            assert words in out
        _, out, _ = command(clip.main, "runs/clip", "classify", "--help")
        assert "PICTURE NAME [NAME ...]" in out and "print the probability of each NAME" in out

    @pytest.mark.parametrize("argv", [[], ["runs/clip"], ["runs/clip", "sing"],
                                      ["runs/clip", "classify", "x.png"]])
    def test_a_model_names_what_is_missing(self, argv):
        assert re.search("required|invalid choice", mistake(clip.main, *argv))

    def test_the_head_of_train_names_only_flags_that_exist(self):
        options = command(train.main, "--help")[1].split("\noptions:\n")[1]
        flags = re.findall(r"--\w+", train.__doc__.replace("--nproc_per_node", "--set"))
        assert len(flags) > 5 and all(re.search(rf"^  {flag}\b", options, re.M) for flag in flags)


class TestMistakes:
    @pytest.mark.parametrize("flags, words", [
        (["--steps", "0"], "--steps 0: must be more than 0"), (["--steps", "-3"], "--steps -3"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--lr", "-0.1"], "--lr -0.1: must be more than 0"), (["--lr", "0"], "--lr 0"),
        (["--lr", "nan"], "--lr nan"), (["--lr", "inf"], "--lr inf"),
        (["--batch_size", "0"], "--batch_size 0"), (["--accumulate", "0"], "--accumulate 0"),
        (["--accumulate", "-1"], "--accumulate -1"), (["--save_every", "0"], "--save_every 0"),
        (["--workers", "-1"], "--workers -1: must be at least 0"),
        (["--batch_size", "62"], r"batch_size 62 is larger than the data \(61 records in toy\)"),
        (["--accumulate", "4"],
         "batch_size 6 does not divide into 1 shares of data sets x 1 processes x 4 micro-batches"),
        (["--preset", "huge"], "--preset huge: clip has tiny, small"),
        (["--data", "moon"], "--data moon: no world 'moon'; there are shapes, emoji"),
        (["--data", "toy:sides=3"], "toy has no dial 'sides'; it has objects"),
        (["--data", "toy:objects=many"], "objects takes int, not 'many'"),
        (["--data", "toy:style=baroque"], "toy:style=baroque: style 'baroque' is not one of plain"),
        (["--data", "toy:objects=0"], "--data toy:objects=0: "),
        (["--set", "depth=3"], "--set depth=3: write key=value with one of image_size"),
        (["--set", "embed_dim"], "--set embed_dim: write key=value"),
        (["--set", "vocab_size=9"], "--set vocab_size=9: it belongs to the world's tokenizer"),
        (["--set", "context_length=2"], "context_length=2: must be at least 3"),
        (["--set", "vision_width=-12"], "vision_width=-12: must be at least 1"),
        (["--data", "shapes:objects=50"], "objects=50: a scene has 1 to 6"),
        (["--set", "embed_dim=wide"], "embed_dim takes int, not 'wide'"),
        (["--set", "loss=hinge"], "loss=hinge is not one of softmax, sigmoid"),
        (["--set", "vision_heads=5"], "width 12 does not divide into 5 heads"),
        (["--set", "vision_heads=0"], "vision_heads"), (["--set", "text_width=0"], "text_width"),
        (["--set", "patch_size=7"], "image_size 32 does not divide into patches of 7"),
        (["--set", "patch_size=0"], "patch_size"),
        (["--set", "stages=1,1"], r"stages \(1, 1\) of width 12: a ResNet has four stages"),
        (["--set", "stages=1,1,1,1", "--set", "image_size=48"], "takes a multiple of 32"),
        (["--device", "toaster"], "--device toaster: use auto, cpu, cuda or mps"),
        (["--device", "meta"], "--device meta: use auto, cpu, cuda or mps"),
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--attention", "flash"], "invalid choice: 'flash'"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["more"], "unrecognized arguments: more"),
        (["--init", "nowhere"], "--init nowhere: no run here"),
        (["--from", "vision=x"], "--from vision=x: write PART=RUN with one of no parts"),
        (["--eval_only"], "no checkpoint to measure"),
        (["--overwrite", "--resume"], "--overwrite deletes the run")])
    def test_of_train_are_told_before_anything_is_written(self, flags, words):
        assert re.search(words, mistake(train.main, *TOY, *flags))
        assert os.listdir() == []

    @pytest.mark.parametrize("flags, words", [
        ([], "error: --from vision=runs/clip: runs/clip: no run here (no config.json); "
             "python train.py clip --out runs/clip makes one"),
        (["--from", "vision=x", "--preset", "small", "--data", "emoji"],
         "error: --from vision=x: x: no run here (no config.json); "
         "python train.py clip --data emoji --preset small --out x makes one"),
        (["--from", "nose=x"], "error: --from nose=x: write PART=RUN with one of vision, language"),
        (["--from", "vision"],
         "error: --from vision=: write PART=RUN with one of vision, language"),
        (["--set", "vision=x"], "error: --set vision=x: vision is the config of another run; "
                                "--from vision=RUN names it")])
    def test_of_parts_are_told_before_anything_is_written(self, flags, words):
        assert mistake(train.main, "flamingo", *flags) == words
        assert os.listdir() == []

    def test_a_part_of_another_model_is_told(self, run):
        parts = ["--from", f"vision={run}", "--from", f"language={run}"]
        line = mistake(train.main, "flamingo", *parts)
        assert line == f"error: {run}: a run of 'clip', not of 'common.training.lm'"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
    def test_a_missing_gpu_is_told_before_anything_is_written(self):
        assert "use --device cpu" in mistake(train.main, *TOY, "--device", "cuda")
        assert os.listdir() == []

    def test_an_unknown_stage_is_told_with_those_there_are(self):
        there = ", ".join([*train.STAGES, *train.LISTS])
        assert mistake(train.main, "sing") == f"error: no stage sing; there are {there}"
        assert mistake(train.main) == f"error: which stage?; there are {there}"

    def test_a_list_of_stages_has_no_one_folder(self):
        assert "--out is one run's folder" in mistake(train.main, "all", "--out", "x")

    def test_a_folder_that_cannot_be_made_is_told(self):
        Path("file").write_text("in the way")
        assert "file" in mistake(train.main, *TOY, "--out", "file/run")

    def test_a_run_is_not_thrown_away_for_a_mistake(self, run):
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        for flags in (["--init", "nowhere"], ["--set", "vision_heads=5"], ["--eval_only"],
                      ["--resume"]):
            mistake(train.main, *TOY, "--steps", "3", "--out", run, "--overwrite", *flags)
        assert before == {p.name: p.read_bytes() for p in run.iterdir()}

    @pytest.mark.parametrize("harm, words", [
        (lambda c: {"model": {**c["model"], "logit_bias": torch.tensor(1.0)}}, "unexpected logit"),
        (lambda c: {"model": {k: w[:1] if w.ndim else w for k, w in c["model"].items()}},
         r"is \(1, ?\d*\), the model's"),
        (lambda c: {"optimizer": {}}, "cannot be resumed"),
        (lambda c: {"schedule": 3}, "cannot be resumed"),
        (lambda c: {"step": None, "schedule": {}}, "cannot be resumed")])
    def test_a_checkpoint_that_does_not_fit_is_told(self, run, harm, words):
        state = checkpoint.load(run / "last.pt")
        checkpoint.write_json("config.json", read_json(run / "config.json"))
        checkpoint.save(".", state | harm(state))
        line = mistake(train.main, *TOY, "--steps", "3", "--out", ".", "--resume")
        assert re.search(words, line)
        assert sorted(os.listdir()) == ["config.json", "last.pt"]

    def test_overwriting_throws_away_the_run_and_nothing_else(self, run):
        Path("mine").mkdir()
        Path("mine/config.json").write_text("{}")             # another program's, perhaps
        Path("mine/novel.txt").write_text("years of work")
        status, _, err = command(train.main, *TOY, "--steps", "2", "--out", "mine", "--overwrite")
        assert status == 0 and "of work" in Path("mine/novel.txt").read_text()
        assert checkpoint.load("mine/last.pt")["step"] == 2

    def test_a_checkpoint_without_its_config_is_no_empty_folder(self, run):
        checkpoint.save(".", checkpoint.load(run / "last.pt"))
        assert "holds an unfinished run" in mistake(train.main, *TOY, "--out", ".")
        assert "config.json: no such file" in mistake(train.main, *TOY, "--out", ".", "--resume")

    def test_init_of_another_config_is_told(self, run):
        line = mistake(train.main, *TOY, "--init", run, "--set", "embed_dim=9")
        assert "weights of another model or config" in line
        assert "image_projection.weight is (7, 12)" in line
        assert os.listdir() == []

    @pytest.mark.parametrize("harm, words", [
        (lambda here: (here / "config.json").unlink(), "no run here"),
        (lambda here: (here / "last.pt").unlink(), "no checkpoint yet"),
        (lambda here: os.truncate(here / "last.pt", 9999), "cut off"),
        (lambda here: (here / "tokenizer.model").write_bytes(b"x"), "tokenizer.model: not a Sent"),
        (lambda here: rewrite(here, model="blip"), "a run of 'blip', not of 'clip'"),
        (lambda here: rewrite(here, config={}), "weights of another model or config")])
    def test_of_a_model_are_told(self, run, pictures, harm, words):
        for name in ("config.json", "last.pt", "tokenizer.model"):
            Path(name).write_bytes((run / name).read_bytes())
        harm(Path("."))
        assert words in mistake(clip.main, ".", "classify", pictures / "red.png", "a red circle")

    @pytest.mark.parametrize("name, words", [
        ("nothing.png", "nothing.png: no such picture"),
        ("notes.txt", "notes.txt: not a readable picture"),
        ("inner", "inner: a folder, not a picture")])
    def test_of_a_picture_are_told(self, run, pictures, name, words):
        assert words in mistake(clip.main, run, "classify", pictures / name, "a red circle")

    def test_of_a_folder_are_told(self, run, pictures):
        for name, words in (("inner", "inner: no pictures in it"),
                            ("nothing", "nothing: no such folder")):
            assert words in mistake(clip.main, run, "search", "red", pictures / name)
        assert not (run / "search.png").exists()


def rewrite(folder, **parts):
    """Change parts of a run's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


class TestProcess:
    """The few things that only a process of its own can show."""

    @staticmethod
    def python(file, *argv):
        return subprocess.run([sys.executable, HERE / file, *map(str, argv)],
                              capture_output=True, text=True, timeout=60)

    def test_classify_prints_the_likeliest_first(self, run, pictures):
        texts = ["a red circle", "a <eos> star", "猫"]
        done = self.python("clip.py", run, "classify", pictures / "red.png", *texts)
        assert (done.returncode, done.stderr) == (0, "")
        shares = [float(line.split("%")[0]) for line in done.stdout.splitlines()]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.1)
        assert {line.split("%  ")[1] for line in done.stdout.splitlines()} == set(texts)

    def test_a_mistake_ends_with_status_2_and_one_line(self):
        done = self.python("train.py", "clip", "--steps", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: --steps 0: must be more than 0\n"
        assert os.listdir() == []


def test_a_resnet_is_trained_resumed_measured_and_used(pictures):
    flags = [*TOY, "--out", "resnet", "--set", "stages=1,1,2,1", "--set", "vision_width=4",
             "--set", "vision_heads=2"]
    assert command(train.main, *flags, "--steps", 2)[0] == 0
    config = read_json("resnet/config.json")["config"]
    assert config["stages"] == [1, 1, 2, 1]
    for flag in ("--resume", "--eval_only"):
        status, out, err = command(train.main, *flags, "--steps", 2, flag)
        assert status == 0 and "resumed from step 2\n" in out, err
    line = mistake(train.main, *TOY, "--out", "resnet", "--steps", 2, "--resume")
    assert "stages=[1, 1, 2, 1] (now [])" in line
    assert clip.from_pretrained("resnet").model.config == clip.CLIPConfig(**config)
    assert command(clip.main, "resnet", "classify", pictures / "red.png", "a red ring", "x")[0] == 0


class TestUse:
    def test_search_prints_and_draws_the_best(self, run, pictures):
        status, out, err = command(clip.main, run, "search", "a red circle", pictures)
        assert status == 0 and err.startswith("passed over 1 of 4 files")
        lines = out.splitlines()
        assert lines[-1] == f"drawn in {run / 'search.png'}"
        cosines = [float(line.split()[0]) for line in lines[:-1]]
        assert len(cosines) == 3 and 1 >= cosines[0] >= cosines[1] >= cosines[2] >= -1
        colours = {colour for _, colour in Image.open(run / "search.png").getcolors(100000)}
        assert colours >= {(255, 0, 0), (0, 0, 255), (0, 128, 0)}
        (run / "search.png").unlink()

    def test_classify_agrees_with_the_model(self, run, pictures):
        trained = clip.from_pretrained(run)
        texts = ["a red circle", "a blue star"]
        image = trained.encode_images([Image.open(pictures / "red.png")])
        words = trained.model.encode_text(trained.ids(texts))
        logits = trained.model.logit_scale.exp() * image @ words.T
        want = dict(zip(texts, logits[0].softmax(0).tolist()))
        got = trained.classify(Image.open(pictures / "red.png"), texts)
        assert dict(got) == pytest.approx(want, abs=1e-5) and got[0][1] >= got[1][1]
        assert trained.model.config.embed_dim == 7 and not trained.model.training
        assert len(SIZES) == 7
