"""The commands of flamingo.py: caption and answer."""
import json
import re
import sys

import pytest

import flamingo
from common.evaluation.writing import Writer
from common.training.options import run_main
from tests.helpers import drawing

def output(monkeypatch, capsys, *argv, status=None):
    """What `python flamingo.py ARGV` prints; on a mistake the one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["flamingo.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        run_main(flamingo.main)
    printed = capsys.readouterr()
    assert caught.value.code == status, printed
    if status:
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        return printed.err
    return printed.out


@pytest.fixture
def files(tmp_path):
    red, blue = drawing("red", "blue", size=20)
    red.save(tmp_path / "red.png"), blue.save(tmp_path / "blue.png")
    red.save(tmp_path / "film.gif", save_all=True, append_images=[blue, red, blue])
    (tmp_path / "frames").mkdir()
    red.save(tmp_path / "frames/1.png"), blue.save(tmp_path / "frames/2.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    shots = [{"image": "blue.png", "question": "is it blue?", "answer": "yes"},
             {"image": "red.png", "question": "is it red?", "answer": "no"}]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    (tmp_path / "broken.jsonl").write_text('{"image": "red.png"}\n')
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The records that were given to the Writer, which answers yes."""
    records = []
    monkeypatch.setattr(Writer, "generate", lambda self, given, **how: records.append(
        (given, how)) or ["yes"])
    return records


@pytest.mark.parametrize("name", ["red.png", "film.gif", "frames"])
def test_captions_and_answers_are_printed(runs, files, monkeypatch, capsys, name):
    for argv in (["caption", files / name], ["answer", files / name, "what colour?"]):
        assert output(monkeypatch, capsys, runs / "one", *argv).count("\n") == 1


def test_a_caption_is_of_all_frames(runs, files, monkeypatch, capsys, asked):
    assert output(monkeypatch, capsys, runs / "one", "caption", files / "film.gif") == "yes\n"
    ([record], how), = asked
    turn, = record["turns"]
    assert [len(clip) for clip in turn["images"]] == [4] and turn["caption"]
    assert how == {"num_beams": 3}


def test_an_answer_follows_its_shots(runs, files, monkeypatch, capsys, asked):
    output(monkeypatch, capsys, runs / "one", "answer", files / "red.png", "is it red?",
           "--shot", files / "blue.png", "is it blue?", "yes")
    ([record], _), = asked
    assert [(turn["prompt"], turn["answer"], turn["images"][0][0].getpixel((0, 0)))
            for turn in record["turns"]] == [("is it blue?", "yes", (0, 0, 255)),
                                             ("is it red?", "", (255, 0, 0))]


@pytest.mark.parametrize("shots, answers", [(1, ["no"]), (2, ["yes", "no"]), (9, ["yes", "no"])])
def test_shots_are_retrieved_from_a_file(runs, files, monkeypatch, capsys, asked, shots, answers):
    output(monkeypatch, capsys, runs / "one", "answer", files / "red.png", "what?", "--support",
           files / "shots.jsonl", "--shots", shots)
    ([record], _), = asked
    assert [turn["answer"] for turn in record["turns"]] == [*answers, ""]


@pytest.mark.parametrize("argv, words", [
    (["caption", "notes.txt"], "notes.txt: not a readable picture"),
    (["caption", "absent.gif"], "absent.gif: no such picture"),
    (["answer", "red.png", "what?", "--shot", "film.gif", "what?", "red"],
     "clips of 1 and 4 frames"),
    (["answer", "red.png", "what?", "--support", "absent.jsonl"], "absent.jsonl: no such file"),
    (["answer", "red.png", "what?", "--support", "broken.jsonl"], "line 1: image, question and"),
    (["answer", "red.png", "what colour is it? " * 40], "but the context is 256")])
def test_mistakes_are_one_line(runs, files, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(files)
    assert words in output(monkeypatch, capsys, runs / "one", *argv, status=2)


def test_a_folder_without_a_run_is_one_line(runs, files, monkeypatch, capsys):
    line = output(monkeypatch, capsys, files, "caption", files / "red.png", status=2)
    assert re.fullmatch(f"error: .*: no run here .*; python train.py flamingo --out "
                        f"{re.escape(str(files))} makes one\n", line)
    line = output(monkeypatch, capsys, runs / "lm-toy", "caption", files / "red.png", status=2)
    assert "a run of 'common.training.lm', not of 'flamingo'" in line
