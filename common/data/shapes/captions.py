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


def swapped_attributes(scene, rng, side=32):
    """A true caption, and a false one in which two items exchange their colour, size or place.

    {"texts": ["a red circle and a blue square", "a blue circle and a red square"], "kind":
    "colour"}; None when no such exchange gives a false caption, as with one item.
    """
    options = {}
    for a, b in itertools.permutations(scene.items, 2):
        for kind, names in (("colour", ["colour"]), ("size", ["size"]), ("place", ["x", "y"])):
            swapped = [replace(one, **{name: getattr(other, name) for name in names})
                       for one, other in ((a, b), (b, a))]
            true, false = (listed([phrase(i, kind == "size") + f" {at(i)}" * (kind == "place")
                                   for i in items]) for items in ((a, b), swapped))
            if pairs_of(swapped) <= set(nameable(scene)) and not is_true(false, scene):
                options.setdefault(kind, []).append([true, false])
    if not options:
        return None
    kind = rng.choice(sorted(options))
    return {"images": pictures((scene,), side), "texts": rng.choice(options[kind]), "kind": kind,
            "source": scene}


def swapped_order(scene, rng, kind=None, side=32):
    """A true caption and the same words in another order, which is false of the scene.

    kind "reversed": "a red circle left of a blue square" -> "a blue square left of a red circle";
    None when the scene has no such relation. "shuffled": the words of any caption in random order.
    """
    reversible = [[f"{phrase(a)} {r} {phrase(b)}", f"{phrase(b)} {r} {phrase(a)}"]
                  for a, b in itertools.permutations(scene.items, 2) for r in relations(a, b)]
    kind = kind or rng.choice(("reversed", "shuffled") if reversible else ("shuffled",))
    if kind == "reversed" and not reversible:
        return None
    texts = rng.choice(reversible) if kind == "reversed" else [describe(scene, rng)] * 2
    while is_true(texts[1], scene) or names_held_out(texts[1]):
        words = texts[0].split()
        texts = [texts[0], " ".join(rng.sample(words, len(words)))]
    return {"images": pictures((scene,), side), "texts": texts, "kind": kind, "source": scene}


def other_scene(scene, rng, hardness):
    """Another scene, whose captions are wrong captions of this one.

    random: any. shares: one of its items has its colour or its shape from this scene, nothing else
    does. differs: one item has another colour or another shape, nothing else differs.
    """
    present, n = pairs_of(scene.items), len(scene.items)
    if hardness == "random":
        return sample(rng, n)
    if hardness == "shares":
        colours, shapes = map(set, zip(*present))
        near = [p for p in PAIRS if (p[0] in colours) != (p[1] in shapes)]
        far = [p for p in PAIRS if p[0] not in colours and p[1] not in shapes]
        chosen = [rng.choice(near)] + rng.sample(far, min(n - 1, len(far)))
        return sample(rng, len(chosen), pairs=chosen)
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
    truth = rng.random() >= rate
    kind = None if truth else hardness or rng.choice(HARDNESSES)
    while True:
        described = scene if truth else other_scene(scene, rng, kind)
        text = describe(described, rng)
        if is_true(text, scene) == truth:
            return {"images": pictures((scene,), side), "texts": [text], "truth": truth,
                    "hardness": kind, "described": described, "source": scene}
