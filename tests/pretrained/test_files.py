"""The files in a published folder: weights in every usual format, and files that lie."""
import json
import math
import os
import zipfile

import pytest
import torch

from common.pretrained import files
from tests.fuzz import damages, one_line
from tests.helpers import assert_close
from tests.pretrained.writers import write_safetensors

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int64)}
INDEX = "model.safetensors.index.json"


def check(found):
    """Weights as read are WEIGHTS."""
    assert set(found) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert_close(name, found[name], value)


def write_index(folder, where, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


class TestFields:
    @pytest.mark.parametrize("name, more, absent, good, bad", [
        ("given", ["some"], "some", [0, False, "", []], []),
        ("whole", [7, "here"], 7, [1, 10 ** 6], [0, -3, 10 ** 6 + 1, 2.0, "2", True]),
        ("positive", [0.5, "here"], 0.5, [5, 1e-9], [0, -1.5, math.inf, math.nan, "2", True]),
        ("section", ["here"], {}, [{"a": 1}, {}], [3, "a", True])])
    def test_a_field_is_read_or_named_and_has_a_default(self, name, more, absent, good, bad):
        read = getattr(files, name)
        assert read({}, "x", *more) == read({"x": None}, "x", *more) == absent
        for value in good:
            assert read({"x": value}, "x", *more) == value
        for value in bad:
            with one_line(f"here: x is {value!r}"):
                read({"x": value}, "x", *more)


class TestReadWeights:
    def test_safetensors_come_before_a_pickle(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
        write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
        check(files.read_weights(tmp_path))
        check(files.read_weights(tmp_path / "model.safetensors"))

    def test_nothing_found_names_what_was_looked_for(self, tmp_path):
        with one_line(f"{tmp_path}: .*model.safetensors, {INDEX}, pytorch_model.bin, "
                      "pytorch_model.bin.index.json"):
            files.read_weights(tmp_path)
        with one_line("none.pt: no such file"):
            files.read_weights(tmp_path / "none.pt")


class TestReadShards:
    def test_shards_are_put_together_safetensors_before_pickles(self, tmp_path):
        for name, value in WEIGHTS.items():
            torch.save({name: value}, tmp_path / f"{name}.bin")
            write_safetensors(tmp_path / f"{name}.safetensors", {name: value})
        write_index(tmp_path, {"a": "a.bin", "b": "b.bin"}, "pytorch_model.bin.index.json")
        check(files.read_weights(tmp_path))
        write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
        (tmp_path / "b.bin").unlink()
        check(files.read_weights(tmp_path))

    @pytest.mark.parametrize("where, message", [
        *(({"a": shard}, "not in the folder of its index") for shard in (
            "../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\nb")),
        ({"a": "x.safetensors", "b": "none.safetensors"}, "none.safetensors: no such file"),
        ({"a": 3}, INDEX), ([], INDEX), (None, INDEX)], ids=str)
    def test_an_index_that_lies_is_told(self, tmp_path, where, message):
        (tmp_path / "in").mkdir()
        for folder in (tmp_path, tmp_path / "in"):
            write_safetensors(folder / "x.safetensors", WEIGHTS)
        write_index(tmp_path / "in", where)
        with one_line(message):
            files.read_weights(tmp_path / "in")

    def test_damaged_indexes_are_weights_or_one_line(self, tmp_path):
        write_safetensors(tmp_path / "x.safetensors", WEIGHTS)
        write_index(tmp_path, dict.fromkeys(WEIGHTS, "x.safetensors"))
        for _ in damages(tmp_path / INDEX, 300):
            with one_line(maybe=True):
                files.read_weights(tmp_path)


class TestReadPickle:
    @pytest.mark.parametrize("wrap", [
        dict, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model_state_dict": w},
        lambda w: {"model": w}, lambda w: {f"module.{name}": value for name, value in w.items()}])
    def test_tensors_are_found_plain_and_wrapped(self, tmp_path, wrap):
        torch.save(wrap(WEIGHTS), tmp_path / "pytorch_model.bin")
        check(files.read_weights(tmp_path))
        check(files.read_weights(tmp_path / "pytorch_model.bin"))

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'harm'}",)
        torch.save({"a": Harm()}, tmp_path / "x.pt")
        with one_line("x.pt: .*refused"):
            files.read_weights(tmp_path / "x.pt")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("cut", [0, 1, 100, -30])
    def test_a_cut_file_is_told(self, tmp_path, cut):
        torch.save(WEIGHTS, tmp_path / "x.pt")
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:cut])
        with one_line("x.pt: .*cut off"):
            files.read_weights(tmp_path / "x.pt")

    @pytest.mark.parametrize("state, message", [
        ({"a": 3}, "x.pt: 'a' is a int"), ([1], "x.pt: no tensors"), ({}, "x.pt: no tensors"),
        ({1: WEIGHTS["a"]}, "x.pt: 1 is a Tensor")])
    def test_anything_but_tensors_is_told(self, tmp_path, state, message):
        torch.save(state, tmp_path / "x.pt")
        with one_line(message):
            files.read_weights(tmp_path / "x.pt")


class TestReadScript:                    # whole archives are read in test_clip.py
    def test_a_damaged_archive_is_told(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/constants.pkl", b"nothing")
        with one_line("x.pt: .*TorchScript"):
            files.read_weights(tmp_path / "x.pt")
