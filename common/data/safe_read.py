"""Reading what nobody checked: every problem is one ValueError of one line that names the file."""
import io
import json
import os
import stat
import tarfile
import zlib

MOST_BYTES = 100_000_000                 # of a file that is read as a whole


def printable(name, most=300):
    """A name from outside as a part of one printable line: no control characters, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in str(name)[:most + 1])
    return name if len(name) <= most else name[:most] + "..."


def open_regular(path, kind="file"):
    """The file at a path, open for reading bytes. Raises ValueError when it cannot be read."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):       # reading a pipe or a device may never end
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise ValueError(f"{what}, not a {kind}")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        why = f"no such {kind}" if missing else getattr(error, "strerror", None) or error
        raise ValueError(f"{printable(path)}: {why}") from None


def open_text(path):
    """The UTF-8 file at a path, open for reading lines. Other bytes become lone surrogates."""
    return io.TextIOWrapper(open_regular(path), "utf-8-sig", errors="surrogateescape")


def read_bytes(path, start=0, size=None, *, most=MOST_BYTES, kind="file", unpack=None):
    """All bytes of a file, or `size` of them from `start` on; unpack: gzip.open, or None.

    Raises ValueError: missing, unreadable, or more than `most` bytes, unpacked ones included.
    """
    try:
        with open_regular(path, kind) as file:
            file = unpack(file) if unpack else file
            file.seek(start)
            data = file.read(most + 1 if size is None else min(size, most + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{printable(path)}: not readable ({error})") from None
    if len(data) > most:
        raise ValueError(f"{printable(path)}: larger than {most:,} bytes")
    return data


def tar_members(path, refuse):
    """(name, place) of the plain files in a tar, from its headers; read_bytes(*place) reads one.

    refuse(reason) is called for damage, and what precedes it is kept.
    """
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = os.fstat(file.fileno()).st_size
            for member in archive:
                # A negative size would lead tarfile back to the same header for ever.
                if not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if member.isreg():
                    yield member.name, (path, member.offset_data, member.size)
            file.seek(archive.offset)    # tarfile takes a damaged header for the tar's end
            if file.read(512).strip(b"\0"):
                raise tarfile.ReadError("no header")
    except Exception as error:           # tarfile raises many kinds on hostile input
        refuse(f"{path}: not a tar file, damaged or compressed ({error})")


def parse_json(data, where="", kind=object):
    """The value, of any kind or a dict, of a JSON text (str or UTF-8). ValueErrors name `where`."""
    where = f"{printable(where)}: " if where else ""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:      # the decoder's messages are one line
        raise ValueError(f"{where}not readable JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}a JSON object was expected, not {printable(repr(value), 80)}")
    return value


def read_json(path, kind=object, most=MOST_BYTES):
    """The value in a JSON file. Raises ValueError as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most=most), path, kind)
