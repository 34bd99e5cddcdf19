"""A second judge of the shapes world: it answers questions by their words, from the objects alone.

It shares the vocabulary with the world and nothing else. It fails when a question has no answer or
several.
"""
import math
import random
import re
from collections import Counter, defaultdict

from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, Item, Scene, sample
from common.data.shapes.words import NUMBERS

NOUNS = {**{s: s for s in SHAPES}, **{s + "s": s for s in SHAPES}, "crosses": "cross",
         "object": None, "objects": None}
TWO = Scene((Item("red", "circle", "large", 0.3, 0.3), Item("blue", "square", "small", 0.75, 0.7)))
ODD = Scene((Item("red", "star", "large", 0.5, 0.5),))         # a held-out pair


def many(n, objects=(1, 3), **dial):
    """n pairs of a scene and an rng."""
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
    assert noun in NOUNS and set(adjectives) <= set(COLOURS) | set(SIZES), said
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


def larger(a, b):
    assert a.size != b.size, "equal sizes"
    return a.size == "large"


def more(n, m):
    assert n != m, "equal numbers"
    return n > m


def yes(fact):
    return "yes" if fact else "no"


ASK = (r"(?:is it true that|does the picture show|can you see|is|are there|does|is there)"
       r"(?: there is| there are)?")
READERS = [                               # the more special first
    (r"(?:what|which) (colour|shape) (?:is|does) the (.+?)(?: have)?\?",
     lambda s, what, x: getattr(one(x, s), what)),
    (r"what is the (colour|shape) of the (.+)\?", lambda s, what, x: getattr(one(x, s), what)),
    (r"of which (colour|shape) is the (.+)\?", lambda s, what, x: getattr(one(x, s), what)),
    (r"what size is the (.+)\?", lambda s, x: one(x, s).size),
    (r"is the (.+) small or large\?", lambda s, x: one(x, s).size),
    (r"(?:can you see )?how many (.+?) (?:are there|there are|does the picture show)\?",
     lambda s, x: ("zero", *NUMBERS[1:])[len(fitting(x, s))]),
    (r"what is the number of (.+)\?", lambda s, x: ("zero", *NUMBERS[1:])[len(fitting(x, s))]),
    (r"(?:is|where is|what is true of) (the .+?)(?:,(?: is it)?)? (left or right of|above or below)"
     r" (the .+)\?",
     lambda s, x, r, y: r.split()[0] if beside(one(x, s), r, one(y, s)) else r.split()[2]),
    (ASK + r" (the .+?) (?:is |look )?(larger|smaller) than (the .+)\?", lambda s, x, c, y: yes(
        larger(one(x, s), one(y, s)) == (c == "larger"))),
    (ASK + r" (more|fewer) (.+) than (.+)\?", lambda s, c, x, y: yes(
        more(len(fitting(x, s)), len(fitting(y, s))) == (c == "more"))),
    (ASK + r" (the .+?) (?:is )?(left of|right of|above|below) (the .+)\?",
     lambda s, x, r, y: yes(beside(one(x, s), r, one(y, s)))),
    (ASK + r" (an? .+?)(?: in the picture)?\?", lambda s, x: yes(fitting(x, s)))]


def resolve(question, scene):
    """The answer to a question, from the objects of the scene."""
    for pattern, answer in READERS:
        found = re.fullmatch(pattern, question)
        if found:
            return answer(scene, *found.groups())
    raise AssertionError(f"not a question of the world: {question!r}")


def ask_and_answer(record):
    """The prompt and the answer of a record of one turn."""
    turn, = record["turns"]
    return [turn["prompt"], turn["answer"]]


def picture_of(record):
    """The one picture of a record of one turn."""
    (picture,), = record["turns"][0]["images"]
    return picture


def held_out(text):
    """The held-out pairs that a text names, in singular or plural."""
    words = [NOUNS.get(w) or w for w in re.findall(r"\w+", text)]
    return HELD_OUT & set(zip(words, words[1:]))


def guesser(pairs):
    """A naive Bayes guesser of answers from the words of a text: what the words alone give away."""
    words, seen = defaultdict(Counter), Counter()
    for text, answer in pairs:
        seen[answer] += 1
        words[answer].update(set(text.split()))

    def guess(text):
        return max(sorted(seen), key=lambda a: math.log(seen[a]) + sum(
            math.log((words[a][w] + 0.5) / (seen[a] + 1)) for w in set(text.split())))
    return guess


def blind(pairs):
    """The accuracy of a guesser that learns from half of (text, answer) and is asked the rest."""
    half = len(pairs) // 2
    guess = guesser(pairs[:half])
    return sum(guess(text) == answer for text, answer in pairs[half:]) / (len(pairs) - half)
