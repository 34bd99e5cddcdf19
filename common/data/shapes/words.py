"""The language of the shapes world: sentences about a scene, and whether a sentence is true.

`describe` writes a sentence. `is_true` reads a sentence into statements and checks each of them
against the scene, so retrieval, captions and answers are scored exactly, never by string equality.
"""
import itertools
import re

from common.data.shapes.scene import COLOURS, HELD_OUT, PAIRS, SHAPES, SIZES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MARGIN = 0.12                             # two centres must be further apart to have a relation
PLURALS = {s: "crosses" if s == "cross" else s + "s" for s in (*SHAPES, "shape", "object")}
SINGULARS = {plural: singular for singular, plural in PLURALS.items()}
OPENINGS = ("", "", "", "a picture of ", "a photo of ", "there is ", "an image with ")


def where(item):
    """The item's cell of a 3 x 3 grid: "top left", "top", ..., "centre"."""
    column = "left" if item.x < 1 / 3 else "right" if item.x > 2 / 3 else ""
    row = "top" if item.y < 1 / 3 else "bottom" if item.y > 2 / 3 else ""
    return f"{row} {column}".strip() or "centre"


def at(item):
    """The cell with its preposition: "at the top left", "in the centre"."""
    return f"{'in' if where(item) == 'centre' else 'at'} the {where(item)}"


def relations(a, b, margin=MARGIN):
    """The relations that hold between two items: of left of, right of, above, below."""
    axes = (("left of", "right of", b.x - a.x), ("above", "below", b.y - a.y))
    return [one if gap > 0 else other for one, other, gap in axes if abs(gap) > margin]


def a_thing(words):
    """Words with their article: "a red circle", "an orange object"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase(item, size=False):
    """"a red circle"; with size "a small red circle"."""
    return a_thing(f"{item.size} " * size + item.name)


def listed(parts):
    """"x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def number_of_objects(n):
    """"no objects", "one object", "two objects"."""
    return f"{NUMBERS[n]} object{'' if n == 1 else 's'}"


def matching(scene, size=None, colour=None, shape=None):
    """The items of the scene that have the given attributes."""
    return [i for i in scene.items if size in (None, i.size) and colour in (None, i.colour)
            and shape in (None, i.shape)]


def things(pairs):
    """[(form, phrase, attributes), ...] of these pairs and of every colour and shape.

    ("pair", "a red ring", {"colour": "red", "shape": "ring"}), ("shape", "a ring", ...), ...
    """
    found = [("pair", a_thing(f"{c} {s}"), {"colour": c, "shape": s}) for c, s in pairs]
    found += [("colour", a_thing(f"{c} object"), {"colour": c}) for c in COLOURS]
    return found + [("shape", a_thing(s), {"shape": s}) for s in SHAPES]


def references(scene, item, hide=None):
    """Every phrase that fits this item alone, without article and without the attribute `hide`.

    references(scene, circle, hide="colour") -> ["circle", "small circle", "object at the top"]
    """
    found = []
    allowed = [a for a in ("size", "colour", "shape") if a != hide]
    for n in range(len(allowed) + 1):
        for names in itertools.combinations(allowed, n):
            given = {name: getattr(item, name) for name in names}
            if len(matching(scene, **given)) == 1:
                found.append(" ".join({**given, "shape": given.get("shape", "object")}.values()))
    if sum(where(item) in (where(i), *where(i).split()) for i in scene.items) == 1:
        found.append(f"object {at(item)}")
    return found


def pairs_of(items):
    """The (colour, shape) of every item, as a set."""
    return {(i.colour, i.shape) for i in items}


def nameable(scene):
    """The pairs that a text on the scene may name: held-out ones only where it shows one."""
    return PAIRS if pairs_of(scene.items) <= set(PAIRS) else PAIRS + tuple(sorted(HELD_OUT))


def names_held_out(text):
    """Whether the text names a held-out pair: names_held_out("two red stars") -> True."""
    words = [SINGULARS.get(word, word) for word in re.findall(r"\w+", text.lower())]
    return any(pair in HELD_OUT for pair in zip(words, words[1:]))


def describe(scene, rng, length=None):
    """One true sentence that names every item by colour and shape.

    length: "short" names the items; "long" adds sizes, places or a relation, and sometimes the
    background; "full" gives each item's size and place, and the background. None: short or long.
    """
    length = length or rng.choice(("short", "short", "long"))
    items = list(scene.items)
    rng.shuffle(items)
    opening = rng.choice(OPENINGS)
    detail = rng.choice(("size", "place", "relation")) if length == "long" else length
    held = relations(*items) if len(items) == 2 and detail == "relation" else []
    names = [phrase(item, size=detail in ("size", "full")) for item in items]
    if detail in ("place", "full"):
        names = [f"{name} {at(item)}" for name, item in zip(names, items)]
    text = f"{names[0]} {rng.choice(held)} {names[1]}" if held else listed(names)
    if length == "full" or detail in ("size", "relation") and rng.random() < 0.3:
        text += f" on a {scene.background} background"
    return opening + text


def vague(scene):
    """A caption that names no item: "two objects on a white background"."""
    return f"{number_of_objects(len(scene.items))} on a {scene.background} background"


_OPENING = re.compile(r"^(?:(?:a|an|the) (?:\w+ )?(?:photo|picture|image|drawing|painting) "
                      r"(?:of|with)|there (?:is|are)|this is|it shows|we see|i see) ")
_BACKGROUND = re.compile(r" on (?:a|the) (\w+) background$")
_RELATION = re.compile(r"^(.+?) (?:is |are )?(?:to the )?(left of|right of|above|below) (.+)$")
_PLACE = re.compile(r" (?:is )?(?:at|in|on) the "
                    r"(?:(top|bottom)(?: (left|right))?|(left|right)|(centre))$")
_PHRASE = re.compile(r"(?:(?:an?|the|({})) )?(?:({}) )?(?:({}) )?(\w+)".format(
    *map("|".join, (NUMBERS, SIZES, COLOURS))))


def parse_phrase(text):
    """"two small red circles" -> (2, "small", "red", "circle"), None for each that is not given.

    Any other text -> None.
    """
    found = _PHRASE.fullmatch(text)
    noun = found and SINGULARS.get(found[4], found[4])
    if noun not in (*SHAPES, "shape", "object", "thing"):
        return None
    count = NUMBERS.index(found[1]) if found[1] else None
    return count, found[2], found[3], noun if noun in SHAPES else None


def statements(text):
    """A sentence as a list of statements, or None when it is not of the world's language.

    A statement is ("background", name), ("exists", phrase, place or None) or
    ("relation", phrase, relation, phrase), with phrases as `parse_phrase` returns them.
    """
    text = " ".join(re.sub(r"[.!?]", " ", text.lower()).replace(",", " , ").split())
    text, found = _OPENING.sub("", text), []
    if background := _BACKGROUND.search(text):
        found.append(("background", background[1]))
        text = text[:background.start()]
    related = _RELATION.match(text)
    if related and "," not in text and " and " not in text:
        one, other = parse_phrase(related[1]), parse_phrase(related[3])
        # A relation joins two single objects: "no circle" and "two circles" do not fit it.
        joined = one and other and one[0] is other[0] is None
        return found + [("relation", one, related[2], other)] if joined else None
    for part in re.split(r" , and | , | and ", text):
        place = _PLACE.search(part)
        named = parse_phrase(part[:place.start()] if place else part)
        if named is None:
            return None
        found.append(("exists", named, " ".join(filter(None, place.groups())) if place else None))
    return found


def holds(statement, scene):
    """Whether one statement of `statements` is true of the scene."""
    if statement[0] == "background":
        return statement[1] == scene.background
    if statement[0] == "relation":
        _, one, relation, other = statement
        return any(relation in relations(a, b) for a in matching(scene, *one[1:])
                   for b in matching(scene, *other[1:]))
    count, fitting = statement[1][0], items_of(statement, scene)
    return bool(fitting) if count is None else len(fitting) == count


def items_of(statement, scene):
    """The items that fit a statement that something exists."""
    _, (_, *attributes), place = statement
    return [i for i in matching(scene, *attributes)
            if place in (None, where(i), *where(i).split())]


def is_true(text, scene):
    """Whether the text reads as statements and each of them is true of the scene.

    "a red star and a red star" says that there are two.
    """
    found = statements(text)
    return bool(found) and all(holds(s, scene) for s in found) and all(
        len(items_of(s, scene)) >= found.count(s) for s in found
        if s[0] == "exists" and s[1][0] is None and found.count(s) > 1)


def names_an_object(text):
    """Whether a statement names an object by colour and shape ("no red star" does not)."""
    phrases = [p for s in statements(text) or [] for p in s[1:] if isinstance(p, tuple)]
    return any(count != 0 and colour and shape for count, _, colour, shape in phrases)
