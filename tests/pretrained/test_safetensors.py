"""The safetensors format, and headers that lie."""
import re
import struct

import pytest
import torch

from common.pretrained import safetensors
from tests.fuzz import mutations, one_line
from tests.helpers import assert_close
from tests.pretrained.writers import CODES, write_header, write_safetensors


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class TestRead:
    def test_every_type_comes_back_wherever_it_stands(self, tmp_path):
        values = {code: (torch.randn(3, 5) * 9).to(kind) for kind, code in CODES.items()}
        values |= {"at an odd place": torch.tensor(-2.5), "empty": torch.zeros(0, 7)}
        found = safetensors.read(write_safetensors(tmp_path / "x.safetensors", values))
        assert list(found) == list(values)
        for name, value in values.items():
            assert found[name].dtype == value.dtype, name
            assert_close(name, found[name].float(), value.float(), 0)

    def test_order_in_the_header_is_free_and_a_file_without_tensors_is_empty(self, tmp_path):
        path = write_header(tmp_path / "x", {"b": entry("U8", [2], [1, 3]),
                                             "a": entry("U8", [1], [0, 1])}, b"\5\6\7")
        assert {k: v.tolist() for k, v in safetensors.read(path).items()} == {"a": [5], "b": [6, 7]}
        assert safetensors.read(write_header(tmp_path / "y", {})) == {}

    def test_writing_to_a_tensor_leaves_the_file_as_it_is(self, tmp_path):
        path = write_safetensors(tmp_path / "x", {"a": torch.ones(4)})
        safetensors.read(path)["a"].zero_()
        assert safetensors.read(path)["a"].tolist() == [1] * 4

    @pytest.mark.parametrize("data", [
        b"", b"1234567", struct.pack("<Q", 2 ** 63) + b"{}", struct.pack("<Q", 3) + b"{}",
        *(struct.pack("<Q", len(head)) + head
          for head in (b"[]", b"{", b"\xff\xfe{}", b"[" * 100_000))], ids=lambda data: data[:12])
    def test_a_file_without_a_header_is_named(self, tmp_path, data):
        (tmp_path / "x").write_bytes(data)
        with one_line(f"^{tmp_path / 'x'}: "):
            safetensors.read(tmp_path / "x")

    @pytest.mark.parametrize("part", ["file", "header"])
    def test_damaged_files_are_tensors_or_one_line(self, tmp_path, part):
        path = write_safetensors(tmp_path / "x", {"a": torch.ones(2, 3), "b": torch.zeros(5)})
        whole = path.read_bytes()
        end = whole.rindex(b"}") + 1
        for data in mutations(whole if part == "file" else whole[8:end], 300):
            path.write_bytes(data)
            if part == "header":
                write_header(path, data, whole[end:])
            with one_line(maybe=True):
                safetensors.read(path)


class TestView:
    @pytest.mark.parametrize("changes", [
        {"offsets": (0, 20)}, {"shape": (2, 4)}, {"offsets": (4, 28)}, {"offsets": (24, 0)},
        {"shape": (3, 3), "offsets": (0, 36)}, {"offsets": (0, 24, 48)}, {"offsets": (0, 24.0)},
        {"shape": (-2, -3)}, {"shape": (2, "3")}, {"shape": (2 ** 62, 2 ** 62)},
        {"dtype": "F8_E4M3"}, {"dtype": ["F32"]}, None], ids=str)
    def test_an_entry_that_claims_what_is_not_there_is_one_line(self, changes):
        claim = [1] if changes is None else entry(**changes)
        with one_line(re.escape(f"here: 'a' is {claim}") + ".*24 bytes"):
            safetensors.view(torch.zeros(24, dtype=torch.uint8), claim, "here: 'a'")

    def test_of_a_file_it_names_the_tensor(self, tmp_path):
        path = write_header(tmp_path / "x", {"a\nb": entry(offsets=(0, 9))}, bytes(24))
        with one_line(re.escape(rf"{path}: 'a\nb'")):
            safetensors.read(path)
