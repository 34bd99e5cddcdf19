"""JSON from outside: bounded, no key twice, every error one line that names the file."""
import json
import zlib
from pathlib import Path

MOST_BYTES = 100_000_000


def printable(name, most=80):
    """A name from a file as it may stand in a message: quoted, escaped, not too long."""
    text = repr(name)
    return text if len(text) <= most else text[:most] + "..."


def unique(pairs):
    """The pairs of a JSON object as a dict. Raises ValueError when a key comes twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{printable(next(k for k in keys if keys.count(k) > 1))} comes twice")
    return out


def parse(data, where):
    """Bytes of UTF-8 JSON -> their value. Raises ValueError with one line that begins `where`."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deep") from None
    except ValueError as error:          # the decoder's own messages are one line
        raise ValueError(f"{where}: not readable JSON ({error})") from None


def read(path):
    """The value in a JSON file. Raises ValueError: missing, larger than 100 MB, not JSON."""
    return parse(read_bytes(path, MOST_BYTES), path)


def read_object(path):
    """`read`, and ValueError when the value is not an object (a dict)."""
    value = read(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {printable(value)}")
    return value


def read_bytes(path, most, open=open):
    """All bytes of a file. Raises ValueError: missing, unreadable, or more than `most` bytes."""
    try:
        with open(Path(path), "rb") as file:
            data = file.read(most + 1)   # a compressed file is not unpacked any further
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable ({error})") from None
    if len(data) > most:
        raise ValueError(f"{path}: larger than {most:,} bytes")
    return data
