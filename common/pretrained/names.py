"""Weights under the names of another project -> under the names of this one, by a table.

A row is (theirs, ours) or (theirs, ours, change). Both are templates: "{q,k,v}" stands for each of
these words, "{layers}" for 0 .. counts["layers"] - 1; the last braces vary fastest. Where a row has
several of our names for each of theirs, its change splits one tensor into several.
"""
import itertools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from common.data.safe_read import printable


def same(weight):
    """The change of a row that has none."""
    return weight,


def transpose(weight):
    """(A, B) -> (B, A): a matrix multiplied from the right, as in GPT-2 and in x @ proj."""
    return weight.mT,


def flatten_patches(weight):
    """The kernel of a strided convolution (D, C, P, P) -> of a Linear on patches (D, C * P * P)."""
    return weight.flatten(1, 3),


def halves(weight):
    """k and v on top of each other (2 * D, C) -> two of (D, C)."""
    return weight.chunk(2)


def thirds(weight):
    """q, k and v on top of each other (3 * D, ...) -> three of (D, ...)."""
    return weight.chunk(3)


def transposed_thirds(weight):
    """GPT-2's fused (D, 3 * D) -> q, k, v, each (D, D) as in a Linear."""
    return weight.mT.chunk(3)


@dataclass(frozen=True)
class Table:
    """rows as above; ignored: patterns ("*.position_ids") of names that hold no weights."""
    rows: tuple
    ignored: tuple = ()


def under(theirs, ours, rows):
    """The rows with a prefix before each side: the rows of one block, used in every tower."""
    return tuple((theirs + a, ours + b, *change) for a, b, *change in rows)


def expand(template, counts):
    """All names of a template, in order."""
    parts = re.split(r"\{([^{}]*)\}", template)
    choices = [[part] if i % 2 == 0 else          # every second part is what braces hold
               part.split(",") if "," in part else map(str, range(counts[part]))
               for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def plan(table, counts):
    """{their name: (our names, change)} of a table for a model of these counts."""
    out = {}
    for theirs, ours, *change in table.rows:
        names, targets = expand(theirs, counts), expand(ours, counts)
        for k, name in enumerate(names):
            share = len(targets) // len(names)
            out[name] = targets[k * share:(k + 1) * share], change[0] if change else same
    return out


def translate(weights, table, counts, where):
    """{their name: tensor} -> {our name: tensor}, in the dtypes of the file.

    A name without a row stays as it is, for `checkpoint.load_weights` to list as unexpected. Raises
    ValueError, which begins with `where`, for a tensor that a change cannot split or transpose.
    """
    planned, out = plan(table, counts), {}
    for name, weight in weights.items():
        if any(fnmatchcase(name, pattern) for pattern in table.ignored):
            continue
        targets, change = planned.get(name, ([printable(name)], same))
        try:
            out |= zip(targets, change(weight))
        except (RuntimeError, IndexError):     # what torch says of too few dimensions
            raise ValueError(f"{where}: {name} has the shape {tuple(weight.shape)}, which its "
                             "layout cannot have") from None
    return out


def count(weights, pattern):
    """How many different values the pattern's group takes in the names: the layers of a file."""
    return len({match[1] for match in map(re.compile(pattern).match, weights) if match})
