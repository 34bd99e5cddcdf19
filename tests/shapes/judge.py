"""A second judge of the shapes world: it answers a question by its words, from the objects alone.

It shares the vocabulary with the world and nothing else. It fails when a question has no answer or
several. Beside it: scenes to ask about, and a guesser who sees no picture.
"""
import math
import random
import re
from collections import Counter, defaultdict

from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, Item, Scene, draw, sample

NOUNS = {**{s: s for s in SHAPES}, **{s + "s": s for s in SHAPES}, "crosses": "cross",
         "object": None, "objects": None}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def pair(**changes):
    """A large red circle at the top left and a small blue square at the right, on grey."""
    items = Item("red", "circle", "large", 0.25, 0.3), Item("blue", "square", "small", 0.75, 0.5)
    return Scene(**{"items": items, "background": "grey", **changes})


def odd():
    """A scene with a held-out pair."""
    return Scene((Item("red", "star", "large", 0.5, 0.5),))


def many(n, objects=(1, 3), **dial):
    """n pairs of a scene and an rng, always the same."""
    for i in range(n):
        rng = random.Random(f"tasks/{i}")
        yield sample(rng, objects, **dial), rng


def thirds(item):
    """The words for the place of an object: {"top", "left"}, {"bottom"}, {"centre"}."""
    words = {"left"} if item.x < 1 / 3 else {"right"} if item.x > 2 / 3 else set()
    words |= {"top"} if item.y < 1 / 3 else {"bottom"} if item.y > 2 / 3 else set()
    return words or {"centre"}


def fitting(said, scene):
    """The objects that fit words such as "the small red circle", "objects at the top left"."""
    said, _, place = re.sub(r"^(an?|the) ", "", said).partition(" the ")
    *adjectives, noun = re.sub(r" (at|in)$", "", said).split()
    assert noun in NOUNS and set(adjectives) <= {*COLOURS, *SIZES}, f"no object: {said!r}"
    return [i for i in scene.items if NOUNS[noun] in (None, i.shape)
            and set(adjectives) <= {i.colour, i.size} and set(place.split()) <= thirds(i)]


def one(said, scene):
    """The only object that fits."""
    found = fitting(said, scene)
    assert len(found) == 1, f"{said!r} fits {len(found)} objects"
    return found[0]


def beside(a, relation, b):
    """Whether the relation holds; the distance must be clear."""
    far = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    distance = far[relation.split()[0]]
    assert abs(distance) > 0.12, "too near to tell"
    return distance > 0


def exceeds(a, b):
    assert a != b, f"both are {a}"
    return a > b


ASK = (r"(?:is it true that|does the picture show|can you see|is|are there|does|is there)"
       r"(?: there is| there are)?")


def readers(scene):
    """[(pattern of a question, its answer), ...], the more special first; True is "yes"."""
    def said(x):
        return one(x, scene)

    def count(x):
        return len(fitting(x, scene))
    return [
        (r"(?:what|which) (colour|shape|size) (?:is|does) the (.+?)(?: have)?\?",
         lambda what, x: getattr(said(x), what)),
        (r"(?:what is the|of which) (colour|shape) (?:of|is) the (.+)\?",
         lambda what, x: getattr(said(x), what)),
        (r"is the (.+) small or large\?", lambda x: said(x).size),
        (r"(?:can you see )?(?:how many|what is the number of) (.+?)"
         r"(?: are there| there are| does the picture show)?\?", lambda x: NUMBERS[count(x)]),
        (r"(?:is|where is|what is true of) (the .+?)(?:,(?: is it)?)? (left|above) or (right|below)"
         r"(?: of)? (the .+)\?", lambda x, a, b, y: a if beside(said(x), a, said(y)) else b),
        (ASK + r" (the .+?) (?:is |look )?(larger|smaller) than (the .+)\?", lambda x, c, y:
         exceeds(SIZES[said(x).size], SIZES[said(y).size]) == (c == "larger")),
        (ASK + r" (more|fewer) (.+) than (.+)\?",
         lambda c, x, y: exceeds(count(x), count(y)) == (c == "more")),
        (ASK + r" (the .+?) (?:is )?(left of|right of|above|below) (the .+)\?",
         lambda x, relation, y: beside(said(x), relation, said(y))),
        (ASK + r" (an? .+?)(?: in the picture)?\?", lambda x: count(x) > 0)]


def resolve(question, scene):
    """The answer to a question, from the objects of the scene."""
    for pattern, answer in readers(scene):
        if found := re.fullmatch(pattern, question):
            value = answer(*found.groups())
            return {True: "yes", False: "no"}.get(value, value)
    raise AssertionError(f"not a question of the world: {question!r}")


def ask_and_answer(record):
    """The prompt and the answer of a record of one turn."""
    turn, = record["turns"]
    return turn["prompt"], turn["answer"]


def scenes_of(record):
    """The scenes of a record's pictures, in order; () of a record without a scene."""
    source = record.get("source", ())
    return source if isinstance(source, tuple) else (source,)


def shows(record, scenes, side):
    """Whether the record's pictures, or the frames of its clips, are exactly these scenes."""
    pictures = record["images"] if "images" in record else [
        picture for turn in record["turns"] for frames in turn["images"] for picture in frames]
    return [p.tobytes() for p in pictures] == [draw(scene, side).tobytes() for scene in scenes]


def pairs_in(*scenes):
    """The (colour, shape) of every object."""
    return {(item.colour, item.shape) for scene in scenes for item in scene.items}


def held_out(text):
    """The held-out pairs that a text names, in singular or plural."""
    words = [NOUNS.get(w) or w for w in re.findall(r"\w+", text)]
    return HELD_OUT & set(zip(words, words[1:]))


def blind(pairs):
    """The accuracy of naive Bayes on words, which learns from half of (text, answer) pairs.

    It is what the words alone give away of the answers to the other half.
    """
    half = len(pairs) // 2
    seen, words = Counter(answer for _, answer in pairs[:half]), defaultdict(Counter)
    for text, answer in pairs[:half]:
        words[answer].update(set(text.split()))

    def guess(text):
        return max(sorted(seen), key=lambda a: math.log(seen[a]) + sum(
            math.log((words[a][w] + 0.5) / (seen[a] + 1)) for w in set(text.split())))
    return sum(guess(text) == answer for text, answer in pairs[half:]) / (len(pairs) - half)
