"""Damage done to files on purpose, and what may come of it: nothing, or one line."""
import contextlib
import json
import random
import signal

import pytest

NASTY = [None, True, -1, 0, 1.5, 2 ** 63, 10 ** 30, "", "x", "../x", "a\nb", [], {}, [[]], [1, "x"],
         float("nan"), "\ud800"]


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


def edited(data, draw):
    """JSON with one value replaced or dropped, anything else with some bytes overwritten."""
    try:
        value = json.loads(data)
    except ValueError:
        at = draw.randrange(len(data))
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at + 5:]
    return json.dumps(change(value, draw)).encode()


def change(value, draw):
    """The value with one place of it made nasty."""
    if not value or not isinstance(value, (dict, list)) or draw.random() < 0.15:
        return draw.choice(NASTY)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    if draw.random() < 0.2:
        return ({k: v for k, v in value.items() if k != key} if isinstance(value, dict)
                else value[:key] + value[key + 1:])
    if isinstance(value, dict):
        return value | {key: change(value[key], draw)}
    return value[:key] + [change(value[key], draw)] + value[key + 1:]


@contextlib.contextmanager
def one_line(message=None, maybe=False):
    """The block raises ValueError with one line that holds the pattern; maybe: or nothing."""
    if not maybe:
        with pytest.raises(ValueError, match=message) as caught:
            yield
        assert "\n" not in str(caught.value)
        return
    try:
        yield
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and str(error)


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
