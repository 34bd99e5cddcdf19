"""Reading files from outside: every problem is one ValueError of one line that names the file."""
import gzip
import os

import pytest

from common.data.safe_read import open_regular, parse_json, printable, read_bytes, read_json
from tests.fuzz import one_line


class TestPrintable:
    def test_a_name_becomes_a_part_of_one_line(self):
        assert printable("a\nb\x1b\ud800") == "a?b??" and printable(7) == "7"
        assert printable("n" * 300) == "n" * 300 and printable("n" * 9999) == "n" * 300 + "..."
        assert printable("猫", 1) == "猫"


class TestOpenRegular:
    def test_a_file_is_open_for_reading_bytes(self, tmp_path):
        (tmp_path / "a").write_bytes(b"\xff\n")
        with open_regular(tmp_path / "a") as file:
            assert file.read() == b"\xff\n"

    def test_nothing_else_is_opened_or_waited_for(self, tmp_path):
        (tmp_path / "a").write_bytes(b"")
        os.mkfifo(tmp_path / "pipe")
        for path, words in ((tmp_path, "a folder, not a picture"), ("/dev/zero", "or a device, "),
                            (tmp_path / "pipe", "a pipe or a device, not a picture"),
                            (tmp_path / "none", "no such picture"),
                            (tmp_path / "a/b", "no such picture"), ("a\0b", "null"),
                            ("n" * 999, "too long")):
            with one_line(words):
                open_regular(path, "picture")


class TestReadBytes:
    def test_up_to_the_limit(self, tmp_path):
        (tmp_path / "a").write_bytes(b"12345")
        assert read_bytes(tmp_path / "a", most=5) == b"12345"
        assert read_bytes(tmp_path / "a", 1, 3, most=3) == b"234"
        with one_line("a: larger than 2 bytes"):
            read_bytes(tmp_path / "a", 1, 3, most=2)
        with one_line("a: larger than 4 bytes"):
            read_bytes(tmp_path / "a", most=4)

    def test_a_compressed_file_is_unpacked_no_further(self, tmp_path):
        (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(10_000_000)))
        with one_line("larger than 1,000 bytes"):
            read_bytes(tmp_path / "a.gz", most=1000, unpack=gzip.open)
        (tmp_path / "b.gz").write_bytes(gzip.compress(b"12345"))
        assert read_bytes(tmp_path / "b.gz", most=1000, unpack=gzip.open) == b"12345"
        for damaged in (b"not gzip", gzip.compress(b"12345")[:-9], b"\x1f\x8b\x08\0" + b"x" * 99):
            (tmp_path / "a.gz").write_bytes(damaged)
            with one_line("a.gz: not readable"):
                read_bytes(tmp_path / "a.gz", most=1000, unpack=gzip.open)
        with one_line("none.gz: no such file"):
            read_bytes(tmp_path / "none.gz", unpack=gzip.open)


class TestJson:
    def test_a_file_is_its_value(self, tmp_path):
        for data in (b'{"a": [1, null]}', b'\xef\xbb\xbf{"a": [1, null]}'):
            (tmp_path / "a.json").write_bytes(data)
            assert read_json(tmp_path / "a.json", dict) == {"a": [1, None]}
        with one_line("a.json: larger than 7 bytes"):
            read_json(tmp_path / "a.json", most=7)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1', b"1" * 5000, b"a\nb",
                                         b"[" * 100_000])
    def test_damaged_json_is_refused_by_name(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with one_line("a.json: not readable JSON"):
            read_json(tmp_path / "a.json")
        with one_line("^not readable JSON"):
            parse_json(content)

    def test_missing_json_is_refused_by_name(self, tmp_path):
        with one_line("a.json: no such file"):
            read_json(tmp_path / "a.json")

    @pytest.mark.parametrize("value", ["[]", "3", "null", '"a\\nb"', '"' + "x" * 999 + '"'])
    def test_a_value_of_another_kind_is_refused(self, value):
        with one_line("^there: a JSON object was expected, not "):
            parse_json(value, "there", dict)
