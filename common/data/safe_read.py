"""Reading what nobody checked: every problem is one ValueError of one line that names the file."""
import json
import os
import stat
import zlib

MOST_BYTES = 100_000_000                 # of a JSON file


def printable(name, most=300):
    """A name from outside as a part of one printable line: no control characters, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in str(name)[:most + 1])
    return name if len(name) <= most else name[:most] + "..."


def open_regular(path, kind="file"):
    """The file at a path, open for reading bytes.

    Raises ValueError when there is none, or when it is a folder, a pipe or a device: reading those
    may wait or go on for ever.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"a folder, not a {kind}")
        if not stat.S_ISREG(mode):
            raise ValueError(f"a pipe or a device, not a {kind}")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{printable(path)}: no such {kind}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{printable(path)}: {why}") from None


def read_bytes(path, most=MOST_BYTES, open=open_regular):
    """All bytes of a file. Raises ValueError: missing, unreadable, or more than `most` bytes.

    open: gzip.open for a compressed file, which is unpacked no further than `most` bytes.
    """
    try:
        with open(path) as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ValueError(f"{printable(path)}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{printable(path)}: not readable ({error})") from None
    if len(data) > most:
        raise ValueError(f"{printable(path)}: larger than {most:,} bytes")
    return data


def parse_json(data, where="", kind=object):
    """The value of a JSON text (str or bytes of UTF-8), which must be of a kind: dict, list ...

    Raises ValueError with one line, which begins with `where` if it is given.
    """
    where = f"{printable(where)}: " if where else ""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"{where}JSON nested too deeply") from None
    except ValueError as error:          # the decoder's own messages are one line
        raise ValueError(f"{where}not readable JSON ({error})") from None
    if not isinstance(value, kind):
        name = {dict: "object", list: "list"}.get(kind, kind.__name__)
        raise ValueError(f"{where}a JSON {name} was expected, not {printable(repr(value), 80)}")
    return value


def read_json(path, kind=object, most=MOST_BYTES):
    """The value in a JSON file, see `parse_json`. Raises ValueError also as `read_bytes`."""
    return parse_json(read_bytes(path, most), path, kind)
