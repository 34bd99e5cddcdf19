"""The user's own data, damaged: what a person sees is one line, exit status 2 and no run folder."""
import os
import re
import sys

import pytest

import train
from common.training import options
from tests.fuzz import limit
from tests.helpers import listed
from tests.training.runs import own


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command("clip", ...) is `python train.py clip ...` in a folder of data -> the exit status."""
    listed(tmp_path, 40, bad=(3, 4))
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as ended:
            options.run_main(train.main)
        return ended.value.code
    return run


@pytest.mark.parametrize("spec, value", [
    ("jsonl:none", "none: "), ("jsonl:pipe", "pipe: "), ("jsonl:/dev/zero", "/dev/zero: "),
    ("jsonl:empty", "empty: 0 .* 20 "), ("coco:data.jsonl", "data.jsonl: "), ("tar:*.tgz", "[*].tgz: "),
    ("tar:{00000..99999}{0..9}.tar", "000000.tar: "), ("tar:empty", "empty: 0 "),
    ("jsonl:data.jsonl --images none", "--images none: "), ("jsonl:data.jsonl --shuffle 0", "--shuffle 0: "),
    ("jsonl:data.jsonl --skip 1", "--skip 1.0: ")])
def test_a_mistake_in_the_data_is_one_line(command, tmp_path, capsys, spec, value):
    os.mkfifo(tmp_path / "pipe"), (tmp_path / "empty").write_bytes(b"")
    with limit(10):
        status = command("clip", "--data", *spec.split(), "--steps", "1", "--runs", "made")
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(value, err) and not (tmp_path / "made").exists(), err


def test_a_run_writes_into_its_own_folder_alone(command, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert command(*own("jsonl:data.jsonl", "--steps", "2", "--out", "run")) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
             if tmp_path / "run" not in [path, *path.parents]}
    assert after == before and (tmp_path / "run/result.json").exists()
