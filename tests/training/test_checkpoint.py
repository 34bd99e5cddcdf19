"""Runs on disk: what a kill leaves behind, and which files are refused."""
import os
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from common.data.safe_read import read_json
from common.data.tokenizer import Tokenizer
from common.training import checkpoint


class Stop(BaseException):
    """A kill: nothing catches it."""


class Evil:
    """Pickles into a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state(step):
    return {"model": {"weight": torch.full((3, 5), float(step))}, "step": step}


def write_damaged(path, damage):
    """A whole checkpoint, then damaged: bytes -> bytes."""
    torch.save(state(7), path)
    path.write_bytes(damage(path.read_bytes()))


DAMAGES = {
    "empty": lambda b: b"", "zeros": lambda b: b"\0" * len(b), "text": lambda b: b"some text\n",
    "half": lambda b: b[:len(b) // 2], "first bytes": lambda b: b[:10],
    "all but one": lambda b: b[:-1], "gzip": lambda b: b"\x1f\x8b\x08" + b,
    "picture": lambda b: b"\x89PNG\r\n\x1a\n" + bytes(range(256))}


class TestWrite:
    def test_it_replaces_the_file_and_leaves_no_other(self, tmp_path):
        for text in ("one", "two"):
            checkpoint.write(tmp_path / "a.txt", lambda half: half.write_text(text))
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
        assert (tmp_path / "a.txt").read_text() == "two"

    def test_a_kill_while_writing_leaves_the_old_file(self, tmp_path):
        def killed(half):
            half.write_text("tw")
            raise Stop
        checkpoint.write(tmp_path / "a.txt", lambda half: half.write_text("one"))
        with pytest.raises(Stop):
            checkpoint.write(tmp_path / "a.txt", killed)
        assert (tmp_path / "a.txt").read_text() == "one"
        checkpoint.write(tmp_path / "a.txt", lambda half: half.write_text("three"))
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

    def test_json_comes_back(self, tmp_path):
        value = {"a": [1, 2.5, None], "é": True}
        checkpoint.write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json") == value


class TestSave:
    def test_the_last_and_the_one_before_are_kept(self, tmp_path):
        for step in (1, 2, 3):
            checkpoint.save(tmp_path, state(step))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
        assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
        assert checkpoint.newest(tmp_path)["step"] == 3

    @pytest.mark.parametrize("damage", [None, "empty", "zeros", "half", "all but one"])
    def test_a_kill_at_any_call_leaves_a_whole_checkpoint(self, tmp_path, monkeypatch, damage):
        """Stopped before its n-th call to the disk, for every n; with last.pt whole or damaged."""
        calls = [(os, "replace"), (os, "fsync"), (torch, "save")]
        real = {name: getattr(place, name) for place, name in calls}

        def counted(name):
            def call(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    if name == "save":           # half a file is what a kill leaves
                        arguments[1].write_bytes(b"half")
                    raise Stop
                return real[name](*arguments)
            return call
        for place, name in calls:
            monkeypatch.setattr(place, name, counted(name))

        finished = moment = 0
        while not finished:
            folder, left = tmp_path / str(moment), 99
            folder.mkdir()
            checkpoint.save(folder, state(1))
            checkpoint.save(folder, state(2))
            if damage:
                write_damaged(folder / "last.pt", DAMAGES[damage])
            before, left = checkpoint.newest(folder)["step"], moment
            try:
                checkpoint.save(folder, state(3))
                finished = 1
            except Stop:
                assert checkpoint.newest(folder)["step"] in (before, 3), moment
            left = 99
            checkpoint.save(folder, state(4))
            assert checkpoint.newest(folder)["step"] == 4
            moment += 1
        assert moment >= 3


class TestLoad:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_a_damaged_file_is_refused_in_one_line(self, tmp_path, name):
        write_damaged(tmp_path / "last.pt", DAMAGES[name])
        with pytest.raises(ValueError, match="last.pt: not a checkpoint, or cut off$"):
            checkpoint.load(tmp_path / "last.pt")

    def test_every_length_of_a_cut_off_file_is_refused(self, tmp_path):
        torch.save(state(7), tmp_path / "whole.pt")
        whole, cut = (tmp_path / "whole.pt").read_bytes(), tmp_path / "cut.pt"
        for length in range(0, len(whole), 97):
            cut.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="cut off"):
                checkpoint.load(cut)

    @pytest.mark.parametrize("save", [
        torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)),
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)])
    @pytest.mark.parametrize("place", [lambda evil: {"model": {"weight": evil}}, lambda evil: evil])
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_code_in_a_file_is_refused_and_does_not_run(self, tmp_path, save, place):
        save(place(Evil(tmp_path / "ran")), tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt: (holds more than tensors|not a checkpoint)"):
            checkpoint.load(tmp_path / "last.pt")
        assert not (tmp_path / "ran").exists()

    def test_it_is_said_that_a_file_could_run_code(self, tmp_path):
        torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="refused .it could run code"):
            checkpoint.load(tmp_path / "last.pt")

    @pytest.mark.parametrize("value", [torch.zeros(3), {"weight": torch.zeros(3)}, [1, 2],
                                       {"model": 3}])
    def test_other_tensors_are_no_checkpoint(self, tmp_path, value):
        torch.save(value, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="not a checkpoint of this project"):
            checkpoint.load(tmp_path / "last.pt")

    def test_a_missing_file_and_a_folder_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            checkpoint.load(tmp_path / "last.pt")
        with pytest.raises(ValueError, match="not a checkpoint"):
            checkpoint.load(tmp_path)


class TestNewest:
    def test_an_empty_or_missing_folder_has_none(self, tmp_path):
        assert checkpoint.newest(tmp_path) is None
        assert checkpoint.newest(tmp_path / "nothing") is None

    @pytest.mark.parametrize("name", DAMAGES)
    def test_behind_a_damaged_last_one_stands_the_previous(self, tmp_path, name, capsys):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        write_damaged(tmp_path / "last.pt", DAMAGES[name])
        assert checkpoint.newest(tmp_path)["step"] == 1
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "last.pt" in out and "taking previous.pt" in out

    def test_a_missing_last_one_is_no_hindrance(self, tmp_path):
        checkpoint.save(tmp_path, state(1))
        os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
        assert checkpoint.newest(tmp_path)["step"] == 1

    def test_two_damaged_ones_are_an_error(self, tmp_path):
        for name in checkpoint.NAMES:
            (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="previous.pt: not a checkpoint"):
            checkpoint.newest(tmp_path)


class TestLoadWeights:
    def test_every_tensor_is_copied(self):
        one, other = nn.Linear(3, 5), nn.Linear(3, 5)
        checkpoint.load_weights(one, other.state_dict(), "there")
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)

    @pytest.mark.parametrize("odd", ["text", None, torch.ones(5, 3).to_sparse(),
                                     torch.ones(5, 3, device="meta")])
    def test_what_is_no_plain_tensor_is_refused(self, odd):
        module = nn.Linear(3, 5)
        before = module.weight.clone()
        with pytest.raises(ValueError, match="there: weights that are no plain tensors"):
            checkpoint.load_weights(module, module.state_dict() | {"weight": odd}, "there")
        assert torch.equal(module.weight, before)

    def test_what_does_not_fit_is_listed_and_nothing_is_copied(self):
        module = nn.Linear(3, 5)
        before = module.weight.clone()
        others = {"weight": torch.zeros(5, 7), "other\nname": torch.zeros(2)}
        with pytest.raises(ValueError) as caught:
            checkpoint.load_weights(module, others, "there")
        assert torch.equal(module.weight, before)
        for words in ("there: ", "missing bias", "unexpected other?name",
                      "weight is (5, 7), the model's (5, 3)"):
            assert words in str(caught.value)

    def test_of_a_long_list_four_of_each_kind_are_named(self):
        module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
        others = {f"w{i}": torch.zeros(1) for i in range(11)}
        with pytest.raises(ValueError, match=(
                "config: missing 0.weight; missing 0.bias; missing 1.weight; missing 1.bias; "
                "and 2 more; unexpected w0; unexpected w1; unexpected w2; unexpected w3; "
                "and 7 more$")):
            checkpoint.load_weights(module, others, "there")


class TestLoadPart:
    def test_a_module_is_copied_by_its_name_and_its_new_parameters_stay(self):
        ours, theirs = nn.Module(), nn.ModuleDict({"lm": nn.Linear(3, 5), "other": nn.Linear(2, 2)})
        ours.lm = nn.Linear(3, 5)
        ours.lm.new = nn.Linear(2, 2)
        before = ours.lm.new.weight.clone()
        checkpoint.load_part(ours, "lm", theirs.state_dict(), "there")
        assert torch.equal(ours.lm.weight, theirs["lm"].weight)
        assert torch.equal(ours.lm.new.weight, before)
        with pytest.raises(ValueError, match="there: weights of another .*missing weight"):
            checkpoint.load_part(ours, "lm", {}, "there")


class TestOpenRun:
    @pytest.fixture
    def run(self, tmp_path):
        checkpoint.write_json(tmp_path / "config.json", {"model": "clip", "config": {"width": 7}})
        (tmp_path / "tokenizer.model").write_bytes(Tokenizer.train(["a red circle"]).model)
        checkpoint.save(tmp_path, state(3))
        return tmp_path

    def test_a_run_is_its_config_tokenizer_and_weights(self, run):
        config, tokenizer, weights = checkpoint.open_run(run, "clip")
        assert config == {"width": 7} and torch.equal(weights["weight"], torch.full((3, 5), 3.0))
        assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"

    @pytest.mark.parametrize("harm, words", [
        (lambda run: (run / "config.json").unlink(), "no run here"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not readable JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "a run of 'another program', not of 'clip'"),
        (lambda run: (run / "config.json").write_text('{"model": "blip"}'), "a run of 'blip', not"),
        (lambda run: (run / "last.pt").unlink(), "no checkpoint yet"),
        (lambda run: (run / "last.pt").write_bytes(b"half"), "last.pt: not a checkpoint, or cut"),
        (lambda run: (run / "tokenizer.model").unlink(), "tokenizer.model"),
        (lambda run: (run / "tokenizer.model").write_bytes(b"cut"), "tokenizer.model: not a Sent")])
    def test_what_is_missing_or_damaged_is_said_in_one_line(self, run, harm, words):
        harm(run)
        with pytest.raises(ValueError, match=words) as caught:
            checkpoint.open_run(run, "clip")
        assert "\n" not in str(caught.value) and str(run) in str(caught.value)


@dataclass
class Stub:
    legs: int = 4


def test_a_config_of_another_version_is_told_with_its_field():
    with pytest.raises(ValueError, match="runs/x: a config of another version .*'wings'"):
        checkpoint.config_of(Stub, {"wings": 2}, "runs/x")
    assert checkpoint.config_of(Stub, {"legs": 2}, "runs/x").legs == 2
