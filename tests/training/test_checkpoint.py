"""Runs on disk: what a kill leaves behind, and which files are refused."""
import contextlib
import copy
import os
import pickle

import pytest
import torch
from torch import nn

from clip import CLIPConfig
from common.data.tokenizer import Tokenizer
from common.training import checkpoint
from common.training.optimizer import Recipe
from flamingo import FlamingoConfig
from tests.fuzz import one_line
from tests.helpers import assert_close, full_disk
from tests.training.runs import assert_same


class Stop(BaseException):
    """A kill: nothing catches it."""


def state(step):
    return {"model": {"weight": torch.full((3, 5), float(step))}, "step": step}


def newest_step(folder):
    return (checkpoint.newest(folder) or {"step": 0})["step"]


DAMAGES = {
    "empty": lambda b: b"", "zeros": lambda b: b"\0" * len(b), "text": lambda b: b"some text\n",
    "half": lambda b: b[:len(b) // 2], "all but one": lambda b: b[:-1],
    "gzip": lambda b: b"\x1f\x8b\x08" + b}


def write_damaged(path, damage):
    """A whole checkpoint of step 7, then damaged."""
    torch.save(state(7), path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))


class TestSave:
    def test_the_last_and_the_one_before_are_kept(self, tmp_path):
        for step in (1, 2, 3):
            checkpoint.save(tmp_path, state(step))
        assert {p.name: torch.load(p, weights_only=True)["step"] for p in tmp_path.iterdir()} \
            == {"last.pt": 3, "previous.pt": 2}

    @pytest.mark.parametrize("damage", ["nothing yet", None, "empty", "half", "all but one"])
    def test_a_kill_at_any_call_to_the_disk_leaves_a_whole_checkpoint(
            self, tmp_path, monkeypatch, damage):
        def counted(call, name):
            def counting(*arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    if name == "save":
                        arguments[1].write_bytes(b"half")
                    raise Stop
                return call(*arguments)
            return counting
        left = 0                         # the call that is killed; 0: none
        for place, name in ((os, "replace"), (os, "fsync"), (torch, "save")):
            monkeypatch.setattr(place, name, counted(getattr(place, name), name))
        for moment in range(1, 7):       # more than there are
            folder = tmp_path / str(moment)
            folder.mkdir()
            for step in (1, 2) if damage != "nothing yet" else ():
                checkpoint.save(folder, state(step))
            if damage in DAMAGES:
                write_damaged(folder / "last.pt", damage)
            before, left = newest_step(folder), moment
            with contextlib.suppress(Stop):
                checkpoint.save(folder, state(3))
            left = 0
            assert newest_step(folder) in (before, 3), f"stopped at call {moment}"
            checkpoint.save(folder, state(4))
            assert newest_step(folder) == 4


    def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(self, tmp_path):
        for step in (1, 2):
            checkpoint.save(tmp_path, state(step))
        large = {"model": {"weight": torch.zeros(9999)}, "step": 3}
        for _ in range(2):
            with full_disk(5000), one_line("last.pt: cannot be written .is the disk full"):
                checkpoint.save(tmp_path, large)
            assert newest_step(tmp_path) == 2 and not list(tmp_path.glob("*.part"))
        checkpoint.save(tmp_path, large)
        assert newest_step(tmp_path) == 3

    def test_a_full_disk_leaves_the_old_file_of_json(self, tmp_path):
        checkpoint.write_json(tmp_path / "config.json", {"old": 1})
        with full_disk(50), one_line("config.json: cannot be written .File too large"):
            checkpoint.write_json(tmp_path / "config.json", {"new": "x" * 99})
        assert [path.read_text() for path in tmp_path.iterdir()] == ['{\n  "old": 1\n}\n']

    def test_another_mistake_of_torch_is_not_blamed_on_the_disk(self, tmp_path):
        def broken(path):
            raise RuntimeError("CUDA error")
        with pytest.raises(RuntimeError, match="CUDA error"):
            checkpoint.write(tmp_path / "last.pt", broken)


class TestUnpickle:
    @pytest.mark.parametrize("save", [
        torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)),
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)])
    def test_code_in_a_file_is_refused_and_does_not_run(self, tmp_path, save):
        call = os.mkdir, (str(tmp_path / "ran"),)
        evil = type("Evil", (), {"__reduce__": lambda self: call})()
        save({"model": {"weight": evil}}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt") as caught:
            checkpoint.unpickle(tmp_path / "last.pt", "thing")
        assert not (tmp_path / "ran").exists()
        assert save is not torch.save or "it could run code" in str(caught.value)


class TestLoad:
    @pytest.mark.parametrize("value", [torch.zeros(3), {"weight": torch.zeros(3)}, {"model": 3}])
    def test_other_tensors_are_no_checkpoint(self, tmp_path, value):
        torch.save(value, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt: .* not a checkpoint of this project"):
            checkpoint.load(tmp_path / "last.pt")


class TestNewest:

    @pytest.mark.parametrize("damage", [None, *DAMAGES])
    def test_behind_a_lost_or_damaged_last_one_stands_the_previous(self, tmp_path, damage, capsys):
        torch.save(state(1), tmp_path / "previous.pt")
        if damage:
            write_damaged(tmp_path / "last.pt", damage)
        assert checkpoint.newest(tmp_path)["step"] == 1
        why = "not a checkpoint, or cut off" if damage else "no such file"
        assert capsys.readouterr().out == f"{tmp_path / 'last.pt'}: {why}; taking previous.pt\n"

    def test_two_damaged_ones_are_an_error(self, tmp_path):
        for name in checkpoint.NAMES:
            (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="previous.pt"):
            checkpoint.newest(tmp_path)


class TestLoadWeights:
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_every_tensor_is_copied(self, device):
        module, weights = nn.Linear(3, 5, device=device), nn.Linear(3, 5).state_dict()
        want = copy.deepcopy(weights)
        checkpoint.load_weights(module, weights, "there")
        weights["weight"].zero_()        # a copy does not follow
        assert_same("module", dict(module.state_dict()), want)

    @pytest.mark.parametrize("odd", [
        {"weight": "text"}, {"weight": None}, {"weight": torch.ones(5, 3).to_sparse()},
        {"weight": torch.ones(5, 3, device="meta")}, {"weight": torch.zeros(5, 7)},
        {"other": torch.zeros(2)}])
    def test_of_what_does_not_fit_nothing_is_copied(self, odd):
        module = nn.Linear(3, 5)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match="there: weights "):
            checkpoint.load_weights(module, nn.Linear(3, 5).state_dict() | odd, "there")
        assert_same("module", module.state_dict(), before)

    @pytest.mark.parametrize("count, more", [(4, ""), (11, "and 7 more; ")])
    def test_four_names_of_each_kind_are_listed(self, count, more):
        module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
        others = {"0.weight": torch.zeros(7, 1)} | {f"w\n{i}": torch.ones(1) for i in range(count)}
        with pytest.raises(ValueError) as caught:
            checkpoint.load_weights(module, others, "there")
        assert str(caught.value).endswith(
            "missing 0.bias; missing 1.weight; missing 1.bias; missing 2.weight; and 1 more; "
            f"unexpected w?0; unexpected w?1; unexpected w?2; unexpected w?3; {more}"
            "0.weight is (7, 1), the model's (1, 1)")


class TestLoadPart:
    def test_a_module_is_copied_by_its_name_and_its_new_parameters_stay(self):
        ours = nn.ModuleDict({"lm": nn.Linear(3, 5)})
        theirs = nn.ModuleDict({"lm": nn.Linear(3, 5), "lm_head": nn.Linear(2, 2)})
        ours["lm"].new = nn.Linear(2, 2)
        ours.lm, before = ours["lm"], ours["lm"].new.weight.clone()
        checkpoint.load_part(ours, "lm", theirs.state_dict(), "there")
        assert_close("lm.weight", ours.lm.weight, theirs["lm"].weight, tolerance=0)
        assert_close("lm.new.weight", ours.lm.new.weight, before, tolerance=0)


class TestConfigOf:
    def test_a_config_of_another_version_is_told_with_its_field(self):
        fields = {"steps": 2, "batch_size": 3, "lr": 0.5}
        assert checkpoint.config_of(Recipe, fields, "runs/x") == Recipe(2, 3, 0.5)
        with pytest.raises(ValueError, match="runs/x: .*'wings'"):
            checkpoint.config_of(Recipe, fields | {"wings": 2}, "runs/x")

    @pytest.mark.parametrize("change, words", [
        ({"embed_dim": "7"}, "embed_dim is '7', not int"), ({"act": 3}, "act is 3, not str"),
        ({"embed_dim": 7.0}, "embed_dim is 7.0, not int"), ({"stages": 3}, "stages is 3, not tup"),
        ({"vision_layers": True}, "vision_layers is True, not int"),
        ({"embed_dim": None}, "embed_dim is None"), ({"embed_dim": 0}, "embed_dim=0: must be at"),
        ({"loss": "hinge"}, "loss=hinge is not one of")])
    def test_a_value_that_was_typed_wrong_is_told_with_its_file(self, tmp_path, change, words):
        (tmp_path / "config.json").write_text("{}")
        assert checkpoint.config_of(CLIPConfig, {"stages": [1, 2]}, tmp_path).stages == (1, 2)
        with one_line(f"^{tmp_path}/config.json: .*{words}"):
            checkpoint.config_of(CLIPConfig, change, tmp_path)
        with one_line(f"^{tmp_path}/config.json: .*vision: .*{words}"):
            checkpoint.config_of(FlamingoConfig, {"vision": change}, tmp_path)

    def test_a_fraction_may_be_a_whole_number(self):
        assert checkpoint.config_of(FlamingoConfig, {"gate_init": 1}, "x").gate_init == 1


class TestOpenRun:
    @pytest.fixture
    def run(self, tmp_path):
        checkpoint.write_json(tmp_path / "config.json", {"model": "clip", "config": {"width": 7}})
        (tmp_path / "tokenizer.model").write_bytes(Tokenizer.train(["a red circle"]).model)
        checkpoint.save(tmp_path, state(3))
        return tmp_path

    def test_a_run_is_its_config_tokenizer_and_weights(self, run):
        config, tokenizer, weights = checkpoint.open_run(run, "clip")
        assert config == {"width": 7} and weights.keys() == {"weight"}
        assert_close("weight", weights["weight"], torch.full((3, 5), 3.0))
        assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"

    @pytest.mark.parametrize("name, content, words", [
        ("config.json", None, "no run here"), ("config.json", b"{", "config.json: "),
        ("config.json", b"[]", "'another program', not of 'clip'"),
        ("config.json", b'{"model": "bl\\nip"}', "'bl\\?ip', not of 'clip'"),
        ("last.pt", None, "no checkpoint yet"), ("last.pt", b"half", "last.pt: not a checkpoint"),
        ("tokenizer.model", None, "tokenizer.model"),
        ("tokenizer.model", b"cut", "tokenizer.model: not a Sent")])
    def test_what_is_missing_or_damaged_is_said_in_one_line(self, run, name, content, words):
        (run / name).unlink()
        if content:
            (run / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            checkpoint.open_run(run, "clip")
        assert "\n" not in str(caught.value) and str(run) in str(caught.value)
