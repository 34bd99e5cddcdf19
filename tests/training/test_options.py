"""Command lines: what they offer, what they do, and mistakes in one line."""
import dataclasses
import functools
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from common.training import checkpoint, options
from tests.helpers import command, listed, mistake
from tests.training.runs import TOY, build, own


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Everything happens in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of TOY at step 0."""
    made = build(tmp_path_factory.mktemp("runs"))
    train.save(made)
    return made.folder.path


class TestAddOptions:
    def parser(self):
        @dataclass
        class Made:
            words: str = options.option("some", "words to say")
            count: int | None = options.option(None, "how many")
            share: float = options.option(0.5, "what part")
            kind: str = options.option("one", "what kind", choices=("one", "two"))
            switch: bool = options.option(False, "whether")
            parts: tuple = options.option((), "from where", flag="from", append=True, metavar="A=B")
        parser = options.parser("first line\n    second line")
        options.add_options(parser, Made)
        return parser

    @pytest.mark.parametrize("argv, changes", [
        ("", {}), ("--words 7 --count 7 --share 7", {"words": "7", "count": 7, "share": 7.0}),
        ("--kind two --switch --from a=b", {"kind": "two", "switch": True, "parts": ["a=b"]}),
        ("--from a=1 --from b=2", {"parts": ["a=1", "b=2"]}), ("--switch --no-switch", {})])
    def test_every_field_is_a_flag_of_its_own_type(self, argv, changes):
        want = {"words": "some", "count": None, "share": 0.5, "kind": "one", "switch": False,
                "parts": []} | changes
        got = vars(self.parser().parse_args(argv.split()))
        assert got == want and list(map(type, got.values())) == list(map(type, want.values()))

    def test_the_help_has_a_line_for_each_flag(self):
        text = self.parser().format_help()
        assert "first line\n    second line\n" in text
        for line in ("--words STR words to say (default some)", "--count INT how many",
                     "--share FLOAT what part (default 0.5)", "--switch, --no-switch whether",
                     "--kind {one,two} what kind (default one)", "--from A=B from where"):
            assert f" {line} " in f" {' '.join(text.split())} "
        assert text.count("(default ") == 3, "a default that is nothing is not printed"


class TestWithSettings:
    @dataclass
    class Config:
        width: int = 7
        share: float = 0.5
        name: str = "x"
        on: bool = True
        stages: tuple[int, ...] = (5, 5)

    @pytest.mark.parametrize("settings, changes", [
        ("", {}), ("width=11 share=2", {"width": 11, "share": 2.0}), ("name=a=b", {"name": "a=b"}),
        ("on=False", {"on": False}), ("on=false", {"on": False}), ("width=2 width=3", {"width": 3}),
        ("stages=1,2,11", {"stages": (1, 2, 11)}), ("stages=7", {"stages": (7,)}),
        ("stages=", {"stages": ()})])
    def test_values_are_read_as_the_fields_type(self, settings, changes):
        before = self.Config(name="before")
        made = options.with_settings(before, settings.split())
        assert vars(made) == vars(self.Config()) | {"name": "before"} | changes
        assert type(made.share) is float and before == self.Config(name="before")

    @pytest.mark.parametrize("setting, words", [
        ("width=wide", "width .*'wide'"), ("width=2.5", "'2.5'"), ("on=1", "on .*bool.*'1'"),
        ("stages=1,x", "1,2,3.*'1,x'"), ("stages=1,,2", "1,,2"), ("stages=(1, 2)", "stages"),
        ("depth=3", "depth=3.* width, share, name"), ("width", "width, share, name, on, stages")])
    def test_what_no_field_takes_is_refused(self, setting, words):
        with pytest.raises(ValueError, match=words):
            options.with_settings(self.Config(), [setting])


class TestCheckFields:
    @dataclass
    class Config:                        # the least that a model can have
        width: int = 1
        skip: int = 0
        share: float = 0.25
        other: float = -0.5
        kind: str = "one"
        on: bool = False

    def check(self, **changes):
        options.check_fields(self.Config(**changes), {"kind": ("one", "two")},
                             {"skip": 0, "share": 0.25}, {"share": 0.75})

    @pytest.mark.parametrize("changes, words", [
        ({"width": 0}, "width=0.* 1$"), ({"skip": -1}, "skip=-1.* 0$"),
        ({"share": 0.2}, "share=0.2.* least 0.25"), ({"share": math.nan}, "share=nan"),
        ({"share": 0.8}, "share=0.8.* most 0.75"),
        ({"kind": "three"}, "kind=three.* one, two")])
    def test_what_no_model_can_have_is_refused(self, changes, words):
        self.check()
        with pytest.raises(ValueError, match=words):
            self.check(**changes)


class TestRunCommand:
    def call(self, monkeypatch, argv):
        """What `python model.py ARGV` calls, of three commands."""
        def one(run, picture, *names):
            """about one"""
            return "one", run, picture, names

        def two(run, text, *, count=3, note=None):
            """about two"""
            return "two", run, text, count, note

        def three(run, *, shot: ("PICTURE", "TEXT")):
            """about three"""
            return "three", run, shot
        monkeypatch.setattr(sys, "argv", ["model.py", *argv.split()])
        return options.run_command("about the model", one, two, three)

    @pytest.mark.parametrize("argv, want", [
        ("runs/x one a.png red blue", ("one", "runs/x", "a.png", ("red", "blue"))),
        ("runs/x two word", ("two", "runs/x", "word", 3, None)),
        ("runs/x two word --count 5 --note 7", ("two", "runs/x", "word", 5, "7")),
        ("runs/x three", ("three", "runs/x", [])),
        ("runs/x three --shot a b --shot c d", ("three", "runs/x", [["a", "b"], ["c", "d"]]))])
    def test_a_signature_is_a_command_line(self, monkeypatch, argv, want):
        assert self.call(monkeypatch, argv) == want

    @pytest.mark.parametrize("argv", ["", "runs/x", "runs/x four", "runs/x one a.png", "runs/x two",
                                      "runs/x two w --count many", "runs/x three --shot a",
                                      "runs/x two w --picture x"])
    def test_another_one_is_refused(self, monkeypatch, argv):
        with pytest.raises(SystemExit, match="2"):
            self.call(monkeypatch, argv)

    @pytest.mark.parametrize("argv, words", [
        ("--help", ["about the model", "about one", "about two", "about three"]),
        ("x one --help", ["about one", "PICTURE NAME [NAME ...]"]),
        ("x three --help", ["about three", "--shot PICTURE TEXT"])])
    def test_docstrings_and_signatures_are_the_help(self, monkeypatch, capsys, argv, words):
        with pytest.raises(SystemExit):
            self.call(monkeypatch, argv)
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


class TestRunMain:
    def status(self, outcome):
        """The exit status of a main that returns or raises this."""
        def main():
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        with pytest.raises(SystemExit) as caught:
            options.run_main(main)
        return caught.value.code or 0

    @pytest.mark.parametrize("outcome, status, line", [
        (0, 0, ""), (None, 0, ""), (143, 143, ""), (KeyboardInterrupt(), 130, ""),
        (ValueError("a mistake"), 2, "error: a mistake\n"),
        (ValueError("Traceback of a worker\n  its lines\nValueError: a.png: no picture"), 2,
         "error: a.png: no picture\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2,
         "error: [Errno 2] No such file or directory: 'x.txt'\n")])
    def test_a_mistake_is_one_line_on_stderr_and_status_2(self, outcome, status, line, capsys):
        assert self.status(outcome) == status
        assert capsys.readouterr() == ("", line)

    def test_a_reader_that_has_closed_the_pipe_is_no_mistake(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert self.status(BrokenPipeError()) == 0

    def test_torchrun_has_the_time_to_end_the_others_before_they_tell_it_again(
            self, monkeypatch, capsys):
        waited = []
        monkeypatch.setattr(options.time, "sleep", waited.append)
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            assert self.status(ValueError("a mistake")) == 2
        assert waited == [3] and capsys.readouterr().err == 2 * "error: a mistake\n"

    def test_an_interrupt_is_an_exception_again(self):
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)      # as common leaves it
        try:
            with pytest.raises(SystemExit, match="130"):
                options.run_main(lambda: os.kill(os.getpid(), signal.SIGINT))
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="it looks into /proc")
    def test_an_interrupt_while_torch_is_imported_leaves_no_traceback(self):
        script = Path(train.__file__)
        process = subprocess.Popen(
            [sys.executable, script, "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler))
        while process.poll() is None and "libtorch" not in Path(
                f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"")
        assert process.returncode == -signal.SIGINT

    def test_other_errors_keep_their_traceback_and_with_x_dev_all(self, monkeypatch):
        with pytest.raises(ZeroDivisionError):
            self.status(ZeroDivisionError())
        monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
        with pytest.raises(ValueError, match="a mistake"):
            self.status(ValueError("a mistake"))


class TestOptions:
    def test_the_help_explains_train_and_every_flag(self):
        status, out, _ = command("train.py", "--help")
        head, rows = out.split("\noptions:\n")
        assert status == 0 and all(line in head for line in train.__doc__.splitlines())
        for field in dataclasses.fields(train.Options):
            assert re.search(rf"^  --{field.metadata.get('flag', field.name)}\b", rows, re.M)
            assert field.metadata["help"] in " ".join(rows.split())
        flags = re.findall(r"--\w+", train.__doc__.replace("--nproc_per_node", "--set"))
        assert len(flags) > 5 and all(re.search(rf"^  {flag}\b", rows, re.M) for flag in flags)

    def test_the_list_has_the_stages_and_their_presets(self):
        status, out, _ = command("train.py", "--list")
        assert status == 0
        for name, stage in train.STAGES.items():
            assert re.search(f"^{name} .*{re.escape(stage.about)}$", out, re.M)
            assert ", ".join(stage.file.PRESETS) in out


class TestHelp:
    @pytest.mark.parametrize("file", [
        "common/data/__main__.py", "common/data/emoji/build.py", "train.py", "clip.py",
        "flamingo.py", "blip.py", "blip2.py", "llava.py", "lessons/ablations.py",
        "lessons/bridges.py", "lessons/experiments.py", "lessons/overview.py",
        "lessons/speedrun.py", "lessons/weaknesses.py"])
    def test_help_of_every_script_is_help(self, file):
        status, out, err = command(file, "--help")
        assert (status, err, os.listdir()) == (0, "", []) and out.startswith("usage: ")

    def test_help_behind_a_world_is_no_folder(self):
        assert command("common/data/__main__.py", "shapes", "--help")[0] == 0 and not os.listdir()


class TestMistakes:
    @pytest.mark.parametrize("argv, words", [
        *((flag, flag) for flag in (
            "--steps 0", "--lr inf", "--batch_size 0", "--accumulate 0", "--save_every 0",
            "--workers -1", "--init nowhere", "--set vocab_size=9", "--set eos_id=3",
            "--device meta", "--device cuda:97")),
        ("--steps many", "--steps: invalid int value: 'many'"), ("--stepz 3", "--stepz 3"),
        ("--precision fp16", "'fp16'"), ("--attention flash", "'flash'"), ("--seed 1 more", "more"),
        ("--batch_size 62", "62 is larger than the data (61 train records in toy)"),
        ("--preset huge", "--preset huge: clip has tiny, small"),
        ("--data moon", "--data moon: no world 'moon'; there are shapes, emoji"),
        ("--data toy:objects=0", "--data toy:objects=0: objects=0: a scene has 1 to 6"),
        ("--set depth=3", "--set depth=3: write key=value with one of image_size"),
        ("--set loss=hinge", "loss=hinge is not one of softmax, sigmoid"),
        ("--set vision_heads=5", "width 12 does not divide into 5 heads"),
        ("--device toaster", "--device toaster: use auto, cpu, cuda or mps"),
        ("--from vision=x", "--from vision=x: write PART=RUN with one of no parts"),
        ("--seed -1", "--seed -1: a number from 0"), ("--seed 9223372036854775808", "--seed 92"),
        ("--batch_size 1", "--batch_size 1: a contrastive loss needs at least two"),
        ("--data toy:noise=nan", "--data toy:noise=nan: noise=nan: a deviation, from 0 to 1"),
        ("--set vision_width=12 embed_dim=0", "embed_dim=0: must be at least 1"),
        ("--unfreeze text.*,lm.towr.*", "'lm.towr.*'"), ("--eval_only", "no checkpoint"),
        ("", "which stage?; there are clip, lm, flamingo"), ("all --out x", "--out is one run's"),
        ("sing", "no stage sing; there are clip, lm, flamingo"),
        ("flamingo --data emoji", "--from vision=runs/clip-emoji: runs/clip-emoji: no run here (no "
         "config.json); python train.py clip --data emoji --out runs/clip-emoji makes one"),
        ("flamingo --from nose=x", "--from nose=x: write PART=RUN with one of vision, language"),
        ("flamingo --from vision", "--from vision=: write PART=RUN with one of vision, language"),
        ("flamingo --set vision=x", "--set vision=x: vision is the config of another run; --from"),
        ("flamingo --from vision={run} --from language={run}",
         "{run}: a run of 'clip', not of 'common.training.lm'"),
        ("flamingo --out {run} --resume", "{run}: a run of 'clip', not of 'flamingo'"),
        ("--init {run} --set embed_dim=9", "{run}: weights of another model or config: "
         "image_projection.weight is (7, 12), the model's (9, 12)"),
        ("--out {run}", "{run}: holds an unfinished run"),
        ("--out {run}/config.json/x", "config.json"),
        ("--out {run}/config.json", "config.json: a file; a run needs a folder"),
        ("--out {run} --overwrite --init nowhere", "nowhere"),
        ("--out {run} --overwrite --set vision_heads=5", "5 heads"),
        ("--out {run} --overwrite --eval_only", "--overwrite deletes"),
        ("--out {run} --overwrite --resume", "--overwrite deletes")])
    def test_it_is_told_in_one_line_before_anything_is_written(self, run, argv, words):
        before = {path: path.read_bytes() for path in run.iterdir()}
        toy = TOY if argv.startswith("-") else []
        line = mistake("train.py", *toy, *argv.format(run=run).split())
        assert words.format(run=run) in line and os.listdir() == []
        assert before == {path: path.read_bytes() for path in run.iterdir()}

    def test_a_wrong_folder_of_pictures_is_told_after_the_first_records(self, tmp_path):
        spec = listed(tmp_path / "data", 40)
        (tmp_path / "other").mkdir()
        line = mistake("train.py", *own(spec, "--images", tmp_path / "other"))
        assert re.search(r"the first 20 of 20 records refused, e.g. data.jsonl: .*other/\d+.png: "
                         "no such picture; is --images their folder", line) and not os.listdir()

    @pytest.mark.parametrize("harm, words", [
        (lambda c: {"model": {**c["model"], "logit_bias": torch.tensor(1.0)}}, "unexpected logit"),
        (lambda c: {"model": {k: w[:1] if w.ndim else w for k, w in c["model"].items()}},
         r"is \(1, ?\d*\), the model's"),
        (lambda c: {"optimizer": {}}, "cannot be resumed"),
        (lambda c: {"step": None, "schedule": {}}, "cannot be resumed")])
    def test_a_checkpoint_that_does_not_fit_is_told(self, run, harm, words):
        state = checkpoint.load(run / "last.pt")
        for name in ("config.json", "tokenizer.model"):
            shutil.copy(run / name, ".")
        checkpoint.save(".", state | harm(state))
        line = mistake("train.py", *TOY, "--steps", 50, "--precision", "fp32", "--out", ".",
                       "--resume")
        assert re.search(words, line)
        assert sorted(os.listdir()) == ["config.json", "last.pt", "tokenizer.model"]
