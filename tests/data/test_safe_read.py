"""Reading files from outside: every problem is one ValueError of one line that names the file."""
import gzip
import os
import tarfile

import pytest

from common.data.safe_read import (open_regular, open_text, parse_json, printable, read_bytes,
                                   read_json, tar_members)
from tests.fuzz import limit, one_line
from tests.helpers import shard


class TestPrintable:
    @pytest.mark.parametrize("name, most, want", [
        ("a\nb\x1b\ud800", [], "a?b??"), (7, [], "7"), ("猫", [1], "猫"), ("abc", [2], "ab..."),
        ("n" * 300, [], "n" * 300), ("n" * 9999, [], "n" * 300 + "...")])
    def test_a_name_becomes_a_part_of_one_line(self, name, most, want):
        assert printable(name, *most) == want


class TestOpenRegular:
    def test_a_file_is_open_for_reading_bytes(self, tmp_path):
        (tmp_path / "a").write_bytes(b"\xff\n")
        with open_regular(tmp_path / "a") as file:
            assert file.read() == b"\xff\n"

    def test_nothing_else_is_opened_or_waited_for(self, tmp_path):
        (tmp_path / "a").write_bytes(b"")
        os.mkfifo(tmp_path / "pipe")
        for name in (".", "/dev/zero", "pipe", "none", "a/b"):
            with limit(5), one_line(f"{name.strip('.')}: .*picture"):
                open_regular(tmp_path / name, "picture")
        for name in ("a\0b", "n" * 999):
            with one_line("a.b: |nnn"):
                open_regular(tmp_path / name)


class TestOpenText:
    @pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
    def test_it_is_utf8_and_other_bytes_are_lone_surrogates(self, tmp_path, start):
        (tmp_path / "a").write_bytes(start + "ü\nb".encode() + b"\xff")
        with open_text(tmp_path / "a") as file:
            assert list(file) == ["ü\n", "b\udcff"]


class TestReadBytes:
    def test_it_reads_a_file_or_a_part_of_it_up_to_the_limit(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(b"12345")
        assert [read_bytes(path), read_bytes(path, most=5), read_bytes(path, 1, 3, most=3),
                read_bytes(path, 2)] == [b"12345", b"12345", b"234", b"345"]
        for most, arguments in ((2, (1, 3)), (4, ()), (4, (0, 5))):
            with one_line(f"a: .*{most}"):
                read_bytes(path, *arguments, most=most)

    def test_a_compressed_file_is_unpacked_no_further(self, tmp_path):
        path = tmp_path / "a.gz"
        for data, want in ((b"12345", b"12345"), (bytes(10_000_000), None)):
            path.write_bytes(gzip.compress(data))
            with one_line("a.gz: .*1,000", maybe=want is not None):
                assert read_bytes(path, most=1000, unpack=gzip.open) == want

    @pytest.mark.parametrize("damage", [
        lambda data: b"not gzip", lambda data: data[:-9], lambda data: data[:4] + b"x" * 99])
    def test_damage_of_a_compressed_file_is_one_line(self, tmp_path, damage):
        (tmp_path / "a.gz").write_bytes(damage(gzip.compress(b"12345")))
        for name in ("a.gz", "none.gz"):
            with one_line(name):
                read_bytes(tmp_path / name, unpack=gzip.open)


def header(size, kind=tarfile.REGTYPE):
    """The header of a member that claims this size, its sum right."""
    member = tarfile.TarInfo("x")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


MEMBERS = [("a/1.txt", b"one"), ("n" * 150, b"two"), ("l", tarfile.SYMTYPE),
           ("../l", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE), ("p", tarfile.FIFOTYPE),
           ("3", b"three" * 200), ("4", b"four")]
DAMAGE = {                               # of the members from "3" on
    "cut in a header": lambda rest: rest[:100], "cut in a member": lambda rest: rest[:515],
    "a header of noise": lambda rest: b"x" * 512 + rest[512:],
    "a huge member": lambda rest: header(2 ** 60) + rest[512:],
    "a member that ends before it starts": lambda rest: header(-512) + rest[512:],
    "a huge extension": lambda rest: header(2 ** 60, tarfile.XHDTYPE) + b"x" * 2048,
    "a negative extension": lambda rest: header(-512, tarfile.XHDTYPE) + b"x" * 2048,
    "headers in headers": lambda rest: (header(512, tarfile.GNUTYPE_LONGNAME) + b"a" * 512) * 3000}


class TestTarMembers:
    def found(self, path):
        """([(name, bytes)], refusals)"""
        refused = []
        with limit(5):
            members = list(tar_members(str(path), refused.append))
        return [(name, read_bytes(*place)) for name, place in members], refused

    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_plain_files_are_found_where_they_lie(self, tmp_path, form):
        shard(tmp_path / "s.tar", MEMBERS, form)
        plain = [member for member in MEMBERS if len(member[1]) > 1]
        assert self.found(tmp_path / "s.tar") == (plain, [])

    @pytest.mark.parametrize("what", DAMAGE)
    def test_what_precedes_damage_is_kept(self, tmp_path, what):
        shard(tmp_path / "s.tar", MEMBERS)
        whole = (tmp_path / "s.tar").read_bytes()
        with tarfile.open(tmp_path / "s.tar") as archive:
            at = archive.getmember("3").offset
        (tmp_path / "s.tar").write_bytes(whole[:at] + DAMAGE[what](whole[at:]))
        members, refused = self.found(tmp_path / "s.tar")
        assert members == MEMBERS[:2], what
        assert len(refused) == 1 and "s.tar" in refused[0], (what, refused)
        (tmp_path / "s.tar").write_bytes(whole[:at])     # without an end, but nothing is missing
        assert self.found(tmp_path / "s.tar") == (MEMBERS[:2], [])

    def test_what_is_no_tar_is_refused(self, tmp_path):
        shard(tmp_path / "s.tar", MEMBERS)
        (tmp_path / "gzip").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes(), 0))
        (tmp_path / "folder").mkdir()
        for name in ("gzip", "folder", "none"):
            members, refused = self.found(tmp_path / name)
            assert members == [] and len(refused) == 1 and name in refused[0]


class TestParseJson:
    def test_it_is_the_value_of_text_or_bytes(self):
        assert parse_json('{"ü": [1, null]}'.encode()) == {"ü": [1, None]}
        assert parse_json('{"ü": [1, null]}', "a", dict) == {"ü": [1, None]}

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1', b"1" * 5000, b"a\nb",
                                         b"[" * 100_000])
    def test_damage_is_one_line_that_names_where(self, content):
        with one_line("^a.b: "):
            parse_json(content, "a\nb")
        with one_line("^[^:]"):
            parse_json(content)

    @pytest.mark.parametrize("value", ["[]", "3", "null", '"a\\nb"', f'"{"x" * 999}"'])
    def test_a_value_of_another_kind_is_refused_and_shown(self, value):
        with one_line("^there: .*(3|None|a|x)") as said:
            parse_json(value, "there", dict)
        assert len(said[0]) < 200


class TestReadJson:
    @pytest.mark.parametrize("content", [
        '{"a": 3}', '\ufeff{"a": 3}', "{", "[]", '{"a": 12345678}', ""])
    def test_a_file_is_its_value_or_refused_by_name(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with one_line("a.json: ", maybe="3}" in content):
            assert read_json(tmp_path / "a.json", dict, most=11) == {"a": 3}
        with one_line("none.json: "):
            read_json(tmp_path / "none.json")
