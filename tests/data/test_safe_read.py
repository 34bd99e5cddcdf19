"""Reading files from outside: every problem is one ValueError of one line that names the file."""
import gzip
import os
import tarfile

import pytest

from common.data.safe_read import printable, read_bytes, read_json, tar_members
from tests.fuzz import limit, one_line
from tests.helpers import shard


class TestPrintable:
    def test_a_name_becomes_a_part_of_one_line(self):
        names = "a\nb\x1b\ud800", 7, "n" * 300, "n" * 9999
        assert [*map(printable, names)] == ["a?b??", "7", "n" * 300, "n" * 300 + "..."]
        assert (printable("猫", 1), printable("abc", 2)) == ("猫", "ab...")


class TestReadBytes:
    def test_it_reads_a_file_or_a_part_of_it_up_to_the_limit(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(b"12345")
        assert [read_bytes(path), read_bytes(path, most=5), read_bytes(path, 1, 3, most=3),
                read_bytes(path, 2)] == [b"12345", b"12345", b"234", b"345"]
        for most, arguments in ((2, (1, 3)), (4, ()), (4, (0, 5))):
            with one_line(f"a: .*{most}"):
                read_bytes(path, *arguments, most=most)

    def test_what_is_no_file_is_refused_and_not_waited_for(self, tmp_path):
        (tmp_path / "a").write_bytes(b"")
        os.mkfifo(tmp_path / "pipe")
        for name in (".", "/dev/zero", "pipe", "none", "a/b", "a\0b", "n" * 999):
            with limit(5), one_line(f"{name.strip('.')[:99]}: |a.b: |nnn"):
                read_bytes(tmp_path / name)

    def test_a_compressed_file_is_unpacked_up_to_the_limit_and_damage_is_one_line(self, tmp_path):
        path, data = tmp_path / "a.gz", gzip.compress(b"12345")
        path.write_bytes(data)
        assert read_bytes(path, most=1000, unpack=gzip.open) == b"12345"
        for damaged, value in ((gzip.compress(bytes(10_000_000)), "1,000"), (b"not gzip", ""),
                               (data[:-9], ""), (data[:4] + b"x" * 99, "")):
            path.write_bytes(damaged)
            with one_line(f"a.gz: .*{value}"):
                read_bytes(path, most=1000, unpack=gzip.open)


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


class TestReadJson:
    @pytest.mark.parametrize("start", ["", "\ufeff"])
    def test_it_is_the_value_in_a_file_of_utf8(self, tmp_path, start):
        (tmp_path / "a.json").write_text(start + '{"ü": [1, null]}')
        assert read_json(tmp_path / "a.json", dict) == {"ü": [1, None]}

    @pytest.mark.parametrize("content", [
        b"", b"{", b"\xff\xfe", b'{"a": 1', b"1" * 5000, b"a\nb", b"[" * 100_000, b" " * 200_000])
    def test_damage_is_one_line_that_names_the_file(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        for name in ("a.json", "none.json"):
            with one_line(f"{name}: "):
                read_json(tmp_path / name, most=150_000)

    @pytest.mark.parametrize("value", ["[]", "3", "null", '"a\\nb"', f'"{"x" * 999}"'])
    def test_a_value_of_another_kind_is_refused_and_shown(self, tmp_path, value):
        (tmp_path / "a.json").write_text(value)
        with one_line(r"a.json: .*(\[\]|3|None|a\\nb|xxx)") as said:
            read_json(tmp_path / "a.json", dict)
        assert len(said[0]) < 200 + len(str(tmp_path))
