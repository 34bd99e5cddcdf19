"""Captions that are not true of a scene: swapped attributes, swapped order, noise from the web.

A record is {"images": [picture], "texts": [...], "kind" or "truth", "source": Scene}. Of two texts
the first is true and the second is false. side=None leaves the pictures out.
"""
import itertools
from dataclasses import replace

from common.data.shapes.scene import PAIRS, pictures, sample
from common.data.shapes.words import (at, describe, is_true, listed, nameable, names_held_out,
                                      pairs_of, phrase, relations)

HARDNESSES = ("random", "shares", "differs")


def naming(items, attribute):
    """The items in their order, with the attribute "size" or "place" if it is that one."""
    names = [phrase(i, size=attribute == "size") for i in items]
    return listed([f"{n} {at(i)}" for n, i in zip(names, items)] if attribute == "place" else names)


def swapped_attributes(scene, rng, side=32):
    """A true caption, and a false one in which two items exchange their colour, size or place.

    {"texts": ["a red circle and a blue square", "a blue circle and a red square"], "kind":
    "colour"}; None when no such exchange gives a false caption, as with one item.
    """
    options = []
    for a, b in itertools.permutations(scene.items, 2):
        swaps = {"colour": (replace(a, colour=b.colour), replace(b, colour=a.colour)),
                 "size": (replace(a, size=b.size), replace(b, size=a.size)),
                 "place": (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))}
        for kind, swapped in swaps.items():
            true, false = naming((a, b), kind), naming(swapped, kind)
            if {(i.colour, i.shape) for i in swapped} <= set(nameable(scene)) \
                    and not is_true(false, scene):
                options.append((kind, true, false))
    if not options:
        return None
    kind = rng.choice(sorted({o[0] for o in options}))
    _, *texts = rng.choice([o for o in options if o[0] == kind])
    return {"images": pictures((scene,), side), "texts": texts, "kind": kind, "source": scene}


def swapped_order(scene, rng, kind=None, side=32):
    """A true caption and the same words in another order, which is false of the scene.

    kind "reversed": "a red circle left of a blue square" -> "a blue square left of a red circle";
    None when the scene has no such relation. "shuffled": the words of any caption in random order.
    """
    reversible = [[f"{phrase(a)} {r} {phrase(b)}", f"{phrase(b)} {r} {phrase(a)}"]
                  for a, b in itertools.permutations(scene.items, 2) for r in relations(a, b)]
    reversible = [texts for texts in reversible if not is_true(texts[1], scene)]
    kind = kind or rng.choice(("reversed", "shuffled") if reversible else ("shuffled",))
    if kind == "reversed":
        if not reversible:
            return None
        texts = rng.choice(reversible)
    else:
        texts = [describe(scene, rng)] * 2
        while is_true(texts[1], scene) or names_held_out(texts[1]):
            words = texts[0].split()
            texts = [texts[0], " ".join(rng.sample(words, len(words)))]
    return {"images": pictures((scene,), side), "texts": texts, "kind": kind, "source": scene}


def other_scene(scene, rng, hardness):
    """Another scene, whose captions are wrong captions of this one.

    random: any. shares: one of its items has its colour or its shape from this scene, nothing else
    does. differs: one item has another colour or another shape, nothing else differs.
    """
    present, n = pairs_of(scene), len(scene.items)
    if hardness == "random":
        return sample(rng, n)
    if hardness == "shares":
        colours, shapes = ({p[i] for p in present} for i in (0, 1))
        near = [p for p in PAIRS if (p[0] in colours) != (p[1] in shapes)]
        far = [p for p in PAIRS if p[0] not in colours and p[1] not in shapes]
        chosen = [rng.choice(near)] + rng.sample(far, min(n - 1, len(far)))
        return sample(rng, len(chosen), pairs=chosen)
    if hardness != "differs":
        raise ValueError(f"hardness {hardness!r} is not one of {', '.join(HARDNESSES)}")
    which = rng.randrange(n)
    item = scene.items[which]
    changed = rng.choice([replace(item, colour=c, shape=s) for c, s in nameable(scene)
                          if (c, s) not in present and (c == item.colour) != (s == item.shape)])
    return replace(scene, items=scene.items[:which] + (changed,) + scene.items[which + 1:])


def noisy_caption(scene, rng, rate=0.5, hardness=None, side=32):
    """A caption from the web: with probability `rate` it is the true caption of another scene.

    {"texts": [caption], "truth": bool, "hardness": one of HARDNESSES, None if true, "described":
    the scene that the caption is true of}. hardness None draws one.
    """
    described, kind = scene, None
    if rng.random() < rate:
        kind = hardness or rng.choice(HARDNESSES)
        described = other_scene(scene, rng, kind)
    text = describe(described, rng)
    while kind and is_true(text, scene):
        described = other_scene(scene, rng, kind)
        text = describe(described, rng)
    return {"images": pictures((scene,), side), "texts": [text], "truth": kind is None,
            "hardness": kind, "described": described, "source": scene}
