"""The folder of a run: its name, whose it is, what is kept when it is taken up or overwritten."""
import contextlib
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.training.run import Options
from common.training.run_folder import RunFolder, default_folder, missing_run
from tests.training.runs import log

VOCABULARY = SimpleNamespace(file="tokenizer.model", model=b"pieces")
DESCRIBED = {"model": "clip", "stage": "clip", "options": {"seed": 0, "data": "toy"},
             "config": {"embed_dim": 7}, "recipe": {"lr": 0.1, "steps": 9}}


@pytest.fixture
def folder(tmp_path):
    """A run that has just begun."""
    folder = RunFolder(tmp_path / "runs/one")
    folder.begin(DESCRIBED, VOCABULARY, 0, False)
    return folder


class TestDefaultFolder:
    @pytest.mark.parametrize("data, preset, name", [
        ("shapes", "tiny", "clip"), ("emoji", "tiny", "clip-emoji"),
        ("shapes:objects=3,noise=0.1", "ViT-B/32", "clip-shapes-objects=3-noise=0.1-ViT-B-32"),
        ("jsonl:/a/long/path/my data.jsonl", "small", "clip-jsonl-my-data-9dcf-small"),
        ("tar:/sets/cc3m/{0..31}.tar", "tiny", "clip-tar-cc3m-9e1e")])
    def test_it_hides_no_other_run(self, data, preset, name):
        found = default_folder("clip", Options(runs="some", data=data, preset=preset))
        assert found == Path("some") / name

    @pytest.mark.parametrize("losses, name", [
        (None, "blip-emoji"), ("lm", "blip-captioner-emoji"), ("itc,itm", "blip-filter-emoji"),
        ("itc", "blip-itc-emoji"), ("itc,lm", "blip-itc-lm-emoji")])
    def test_other_losses_are_other_runs(self, losses, name):
        assert default_folder("blip", Options(data="emoji"), losses) == Path("runs") / name


    def test_files_of_one_name_in_two_places_are_two_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        here, there, again = (default_folder("clip", Options(data=f"jsonl:{where}")) for where in (
            "a/data.jsonl", "b/data.jsonl", tmp_path / "a/data.jsonl"))
        assert here == again != there


class TestMissingRun:
    @pytest.mark.parametrize("options, flags", [
        ({}, ""), ({"data": "emoji", "preset": "small"}, "--data emoji --preset small ")])
    def test_it_is_the_command_that_makes_the_run(self, options, flags):
        assert missing_run("lm", ("tiny", "small"), Options(**options), "x") \
            == f"python train.py lm {flags}--out x"

    def test_there_is_none_for_a_preset_of_the_stage_that_needs_the_run_alone(self):
        assert missing_run("lm", ("tiny",), Options(preset="3B"), "x") == "no preset 3B of lm"


class TestRunFolder:
    def test_an_empty_folder_begins_at_0(self, tmp_path):
        for path in (tmp_path, tmp_path / "none"):
            for resume, overwrite in ((False, False), (True, False), (False, True)):
                assert RunFolder(path).claim(resume, overwrite) is None
        assert RunFolder(tmp_path).described() is None

    @pytest.mark.parametrize("name", ["config.json", "last.pt", "previous.pt"])
    def test_a_run_in_the_folder_is_refused_unless_a_flag_says_what_to_do(self, tmp_path, name):
        torch.save({"model": {}, "step": 4}, tmp_path / name)
        for holds in ("an unfinished", "a finished"):
            with pytest.raises(ValueError, match=f"holds {holds} run; --resume .*--overwrite"):
                RunFolder(tmp_path).claim(False, False)
            (tmp_path / "result.json").write_text("{}")
        state = RunFolder(tmp_path).claim(True, False)
        assert state is None if name == "config.json" else state["step"] == 4
        assert RunFolder(tmp_path).claim(False, True) is None

    @pytest.mark.parametrize("part, now, words", [
        ("options", {"seed": 1, "data": "toy"}, r"began with options seed=0 \(now 1\);"),
        ("config", {"embed_dim": 9, "more": 1}, r"embed_dim=7 \(now 9\), more=None \(now 1\);"),
        ("stage", "lm", "began with stage clip, not lm; it goes on as it began")])
    def test_another_run_is_told_with_what_differs(self, folder, part, now, words):
        folder.check_same(DESCRIBED)
        with pytest.raises(ValueError, match=words):
            folder.check_same(DESCRIBED | {part: now})
        folder.check_same(DESCRIBED | {part: now}, without=part)

    def test_the_log_keeps_the_lines_of_the_checkpoint_alone(self, folder):
        for step in (10, 20, 30):
            folder.log({"step": step})
        with open(folder.path / "log.jsonl", "a") as file:
            file.write('{"step": 2')                         # a kill has cut it
        folder.begin(DESCRIBED, VOCABULARY, 20, False)
        folder.log({"step": 21})
        assert log(folder.path) == [{"step": 10}, {"step": 20}, {"step": 21}]

    def test_overwriting_deletes_a_runs_files_and_nothing_else(self, folder):
        for name in ("result.json", "last.pt", "previous.pt", "last.pt.part", "samples.png",
                     "search.png", "novel.txt"):
            (folder.path / name).write_text("years of work")
        folder.log({"step": 0})
        folder.begin(DESCRIBED | {"stage": "new"}, VOCABULARY, 0, True)
        left = {p.name: p.read_text() for p in folder.path.iterdir()}
        assert json.loads(left.pop("config.json")) == DESCRIBED | {"stage": "new"}
        assert left == {"log.jsonl": "", "tokenizer.model": "pieces", "novel.txt": "years of work",
                        ".lock": ""}

    def test_a_second_process_is_refused_until_the_first_ends(self, folder):
        def second():
            """The exit status of a process that begins in the folder."""
            pid = os.fork()
            if not pid:
                with contextlib.suppress(BaseException):
                    RunFolder(folder.path).begin(DESCRIBED | {"stage": "new"}, VOCABULARY, 0, True)
                    os._exit(0)
                os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        folder.log({"step": 0})
        assert second() == 7
        assert folder.described() == DESCRIBED and log(folder.path) == [{"step": 0}]
        RunFolder(folder.path).begin(DESCRIBED, VOCABULARY, 0, False)      # it may begin again
        folder.locked.close()            # as when it ends
        assert second() == 0

    @pytest.mark.parametrize("number, is_free", [
        (errno.EAGAIN, False), (errno.EACCES, False), (errno.ENOLCK, True)])
    def test_a_disk_without_locks_locks_nothing(self, folder, monkeypatch, number, is_free):
        def refuse(*_):
            raise OSError(number, "no")
        monkeypatch.setattr("common.training.run_folder.fcntl.lockf", refuse)
        with contextlib.nullcontext() if is_free else pytest.raises(
                ValueError, match="one: another process trains here; wait until it ends, or"):
            folder.begin(DESCRIBED, VOCABULARY, 0, False)

    def test_a_file_in_its_place_is_told(self, tmp_path):
        (tmp_path / "notes").write_text("")
        with pytest.raises(ValueError, match="--out .*notes: a file; a run needs a folder"):
            RunFolder(tmp_path / "notes").claim(False, False)

    def test_only_the_first_process_writes(self, tmp_path, monkeypatch):
        monkeypatch.setattr("common.training.distributed.rank", lambda: 1)
        folder = RunFolder(tmp_path / "second")
        folder.begin(DESCRIBED, VOCABULARY, 0, True)
        folder.log({"step": 1}), folder.save({"model": {"w": torch.ones(1)}})
        assert not folder.path.exists()
