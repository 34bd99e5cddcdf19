"""Damage done to files on purpose, and what may come of it: nothing, or one line."""
import contextlib
import json
import random
import re
import signal

import pytest

NASTY = [None, True, -1, 0, 1.5, 2 ** 63, 10 ** 30, "", " \t\n", "x", "../x", "/x", "C:\\x.png",
         "a\nb\x1b[2J", "a\0b", "n" * 5000, [], {}, [[]], [1, "x"], float("nan"), "\ud800"]


def mutations(data, count, seed=0):
    """Damaged copies of a file's bytes: flipped bits, cuts, repeats; for JSON also wrong values."""
    draw = random.Random(seed)
    for k in range(count):
        kind, at = k % 4, draw.randrange(len(data))
        if kind == 0:
            yield data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
        elif kind == 1:
            yield data[:at]
        elif kind == 2:
            yield data[:at] + data[draw.randrange(len(data)):]
        else:
            yield edited(data, draw)


def damages(path, count):
    """Write damaged copies of the file at `path` over it, one after the other."""
    for number, data in enumerate(mutations(path.read_bytes(), count)):
        path.write_bytes(data)
        yield number


def edited(data, draw):
    """JSON or JSON lines with one value replaced or dropped, else some bytes overwritten."""
    with contextlib.suppress(ValueError):
        return json.dumps(change(json.loads(data), draw)).encode()
    lines, at = data.split(b"\n"), draw.randrange(len(data))
    with contextlib.suppress(ValueError):
        k = draw.randrange(len(lines))
        lines[k] = json.dumps(change(json.loads(lines[k]), draw)).encode()
        return b"\n".join(lines)
    return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at + 5:]


def change(value, draw):
    """A JSON value of which one place is made nasty or left out."""
    if not value or not isinstance(value, (dict, list)) or draw.random() < 0.15:
        return draw.choice(NASTY)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value = value.copy()
    if draw.random() < 0.2:
        del value[key]
    else:
        value[key] = change(value[key], draw)
    return value


@contextlib.contextmanager
def one_line(message=None, maybe=False):
    """The block raises ValueError with one line that holds the pattern; maybe: or nothing.

    Yields a list, to which the line is added.
    """
    said = []
    try:
        yield said
    except ValueError as error:
        said.append(str(error))
        assert type(error) is ValueError and said[0].isprintable() and 0 < len(said[0]) < 2000, \
            f"not one line: {error!r:.3000}"
        assert message is None or re.search(message, said[0]), f"{message!r} is not in {said[0]!r}"
    assert said or maybe, f"no ValueError, {message!r} was expected"


@contextlib.contextmanager
def limit(seconds):
    """A test that takes longer fails; it must not hang the suite."""
    def late(number, frame):
        pytest.fail(f"no end after {seconds} s")         # not an Exception: no code catches it
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
