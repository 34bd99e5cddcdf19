"""Their names of weights to ours, by a table.

A row is (theirs, ours) or (theirs, ours, change). Both are templates: "{q,k,v}" stands for each of
the words, "{layers}" for 0 .. counts["layers"] - 1, and the two sides are expanded in parallel, the
last braces fastest. A row with several of ours for each of theirs cuts one tensor into several:

    ("h.{layers}.ln_{1,2}.{weight,bias}", "blocks.{layers}.{attn,mlp}_norm.{weight,bias}"),
    ("h.{layers}.attn.c_attn.bias", "blocks.{layers}.attn.{q,k,v}_proj.bias", thirds),
"""
import itertools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from common.pretrained.strict_json import printable


def same(weight):
    """The change of a row that names none."""
    return weight


def transpose(weight):
    """(A, B) -> (B, A): a matrix that is multiplied from the right, as GPT-2's and x @ proj."""
    return needs(weight, weight.ndim == 2, "a matrix").T


def flatten_patches(weight):
    """A strided convolution (D, C, P, P) -> the Linear over flattened patches (D, C * P * P)."""
    return needs(weight, weight.ndim == 4, "a convolution (D, C, P, P)").flatten(1)


def thirds(weight):
    """Rows of q, k, v on top of each other (3 * D, ...) -> three of (D, ...)."""
    return needs(weight, weight.ndim and len(weight) % 3 == 0, "three equal parts").chunk(3)


def transposed_thirds(weight):
    """GPT-2's fused (D, 3 * D) -> q, k, v, each (D, D) as a Linear keeps it."""
    return thirds(transpose(weight))


def needs(weight, condition, what):
    """The weight itself; ValueError with its shape when the condition does not hold."""
    if not condition:
        raise ValueError(f"{what} was expected, not a tensor of {tuple(weight.shape)}")
    return weight


@dataclass(frozen=True)
class Table:
    """rows as above; ignored: patterns ("*.position_ids") of names that hold no weights."""
    rows: tuple
    ignored: tuple = ()


def under(theirs, ours, rows):
    """The rows with both sides put under a prefix: one block's rows for each tower."""
    return tuple((theirs + a, ours + b, *change) for a, b, *change in rows)


def expand(template, counts):
    """All names of a template, in order."""
    parts = re.split(r"\{([^{}]*)\}", template)
    choices = [[part] if position % 2 == 0 else
               part.split(",") if "," in part else map(str, range(counts[part]))
               for position, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def plan(table, counts):
    """{their name: (our names, change)} of a table for a model of these counts."""
    out = {}
    for theirs, ours, *change in table.rows:
        names, targets = expand(theirs, counts), expand(ours, counts)
        share = len(targets) // max(1, len(names))
        for k, name in enumerate(names):
            out[name] = targets[k * share:(k + 1) * share], change[0] if change else same
    return out


def translate(weights, table, counts, where):
    """{their name: tensor} -> {our name: tensor}, in the dtypes of the file.

    Raises ValueError in one line that begins `where` and lists what is missing and what unexpected
    (up to 8 names each), or names a tensor whose shape does not suit its row.
    """
    planned = plan(table, counts)
    missing = [name for name in planned if name not in weights]
    unexpected = [name for name in weights if name not in planned
                  and not any(fnmatchcase(name, pattern) for pattern in table.ignored)]
    if missing or unexpected:
        raise ValueError(f"{where}: not the names of this model: " + "; ".join(
            f"{kind} {listed(found)}" for kind, found in
            (("missing", missing), ("unexpected", unexpected)) if found))
    out = {}
    for name, (targets, change) in planned.items():
        try:
            parts = change(weights[name])
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
        out.update(zip(targets, parts if isinstance(parts, tuple) else (parts,), strict=True))
    return out


def listed(names, most=8):
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if name.isprintable() and len(name) < 120 else printable(name)
                     for name in names[:most]) + more


def count(weights, pattern):
    """How many different numbers the pattern's group takes in the names: the layers of a file."""
    found = (re.match(pattern, name) for name in weights)
    return len({match.group(1) for match in found if match})
