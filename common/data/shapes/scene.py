"""A scene of coloured shapes: drawn as a picture, told in a sentence, and the judge of truth.

`Scene` is the ground truth. `draw` renders it with Pillow, `describe` puts it into words, and
`is_true(text, scene)` reads a sentence back and checks every statement in it, so that retrieval,
captions and answers are scored exactly and never by string equality.

    scene = sample(random.Random(0), objects=2)
    draw(scene, 64).save("scene.png"); print(describe(scene, random.Random(0)))
"""
import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 220),
           "yellow": (240, 210, 40), "purple": (135, 50, 180), "orange": (245, 130, 30),
           "cyan": (60, 200, 215), "pink": (250, 140, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.16, "large": 0.26}                # radius, as a fraction of the picture's side
BACKGROUNDS = {"white": (250, 250, 250), "grey": (205, 205, 205), "cream": (250, 235, 205)}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
# Pairs that no training picture shows and no training text names (composition_accuracy).
HELD_OUT = frozenset({("red", "star"), ("green", "ring"), ("blue", "triangle"),
                      ("yellow", "circle"), ("purple", "cross"), ("orange", "square")})
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
STYLES = ("plain", "outline", "texture", "palette")
SUPERSAMPLE = 3
MARGIN = 0.12                             # how far apart two centres are before a relation is told


@dataclass(frozen=True)
class Item:
    """One object. x, y: centre, fractions of the side, origin top left. tint: RGB jitter."""
    colour: str
    shape: str
    size: str
    x: float
    y: float
    tint: tuple = (0, 0, 0)

    @property
    def radius(self):
        """Fraction of the side."""
        return SIZES[self.size]

    @property
    def box(self):
        """(left, top, right, bottom) of what is drawn inside the picture, fractions of the side."""
        x, y, r = self.x, self.y, self.radius
        round_ = self.shape in ("circle", "ring")
        corners = [(x - r, y - r), (x + r, y + r)] if round_ else outline_of(self.shape, x, y, r)
        xs, ys = zip(*corners)
        return max(0.0, min(xs)), max(0.0, min(ys)), min(1.0, max(xs)), min(1.0, max(ys))


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background; clutter and noise are the dial's extra difficulty.

    clutter: grey strokes (x0, y0, x1, y1) behind the objects. noise: standard deviation of the
    pixel noise, of 1, drawn from grain. style: one of STYLES.
    """
    items: tuple
    background: str = "white"
    clutter: tuple = ()
    noise: float = 0.0
    grain: int = 0
    style: str = "plain"


# ------------------------------------------------------------------ sampling

def place(rng, radii, gap=0.02, tries=60):
    """Centres for circles of these radii that lie inside the picture and do not touch.

    Returns a list of (x, y), or None when they did not fit.
    """
    centres = []
    for radius in radii:
        for _ in range(tries):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            if all(math.hypot(x - a, y - b) > radius + r + gap
                   for (a, b), r in zip(centres, radii)):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def sample(rng, objects=(1, 2), pairs=PAIRS, noise=0.0, clutter=0, distinct=True):
    """A random scene. objects: a count, or (least, most). pairs: allowed (colour, shape).

    distinct: no two objects of a scene share both colour and shape, so "the red circle" is one.
    """
    least, most = (objects, objects) if isinstance(objects, int) else objects
    count = rng.randint(least, most)
    while True:
        kinds = rng.sample(pairs, count) if distinct else [rng.choice(pairs) for _ in range(count)]
        sizes = [rng.choice(("small", "large") if count <= 4 else ("small",)) for _ in kinds]
        centres = place(rng, [SIZES[s] for s in sizes])
        if centres:
            break
    items = tuple(Item(c, s, size, x, y, tuple(rng.randint(-12, 12) for _ in range(3)))
                  for (c, s), size, (x, y) in zip(kinds, sizes, centres))
    strokes = tuple(tuple(rng.random() for _ in range(4)) for _ in range(clutter))
    return Scene(items, rng.choice(tuple(BACKGROUNDS)), strokes, noise, rng.getrandbits(32))


# ------------------------------------------------------------------ drawing

def regular(x, y, radii, points, turn=-math.pi / 2):
    """Corners of a polygon whose distances from the centre cycle through radii."""
    return [(x + radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / points),
             y + radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / points))
            for i in range(points)]


def outline_of(shape, x, y, r):
    """The corners of a polygonal shape of radius r around (x, y)."""
    if shape == "square":
        a = 0.8 * r
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return regular(x, y + 0.15 * r, (1.1 * r,), 3)
    if shape == "star":
        return regular(x, y, (1.1 * r, 0.45 * r), 10)
    a = 0.32 * r                          # cross
    return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a),
            (x + a, y + a), (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a),
            (x - r, y - a), (x - a, y - a)]


def paint(canvas, item, side, style, background):
    """Draw one object on an ImageDraw canvas of side pixels."""
    x, y, r = item.x * side, item.y * side, item.radius * side
    base = COLOURS[item.colour]
    if style == "palette":                # muted, darker relatives of the training colours
        grey = sum(base) / 3
        base = tuple(0.55 * v + 0.25 * grey for v in base)
    colour = tuple(int(min(255, max(0, v + t))) for v, t in zip(base, item.tint))
    back = BACKGROUNDS[background]
    line = max(2, int(0.22 * r))
    if item.shape in ("circle", "ring"):
        box = (x - r, y - r, x + r, y + r)
        hollow = item.shape == "ring"
        if style == "outline":
            canvas.ellipse(box, outline=colour, width=line)
            if hollow:
                canvas.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2),
                               outline=colour, width=line)
        else:
            canvas.ellipse(box, fill=colour)
            if hollow:
                canvas.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=back)
    else:
        corners = outline_of(item.shape, x, y, r)
        if style == "outline":
            canvas.line(corners + corners[:2], fill=colour, width=line)
        else:
            canvas.polygon(corners, fill=colour)
    if style == "texture":
        for k in range(-3, 4):            # stripes of the background's colour across the object
            level = y + k * r / 3
            canvas.line((x - r, level, x + r, level), fill=back, width=max(1, line // 3))


def draw(scene, size=32):
    """The scene as an RGB picture of size x size pixels, drawn larger and averaged down."""
    side = size * SUPERSAMPLE
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in scene.clutter:
        canvas.line((x0 * side, y0 * side, x1 * side, y1 * side), fill=(110, 110, 110), width=2)
    for item in scene.items:
        paint(canvas, item, side, scene.style, scene.background)
    picture = picture.reduce(SUPERSAMPLE)
    if scene.noise:
        rough = np.random.default_rng(scene.grain).normal(0, 255 * scene.noise, (size, size, 3))
        picture = Image.fromarray((np.asarray(picture) + rough).clip(0, 255).astype(np.uint8))
    return picture


# ------------------------------------------------------------------ words

def where(item):
    """The cell of a 3 x 3 grid in words: "top left", "top", ..., "centre"; thirds of the side."""
    column = "left" if item.x < 1 / 3 else "right" if item.x > 2 / 3 else ""
    row = "top" if item.y < 1 / 3 else "bottom" if item.y > 2 / 3 else ""
    return f"{row} {column}".strip() or "centre"


def relations(a, b):
    """The relations that hold between two objects: of left of, right of, above, below."""
    found = []
    if abs(a.x - b.x) > MARGIN:
        found.append("left of" if a.x < b.x else "right of")
    if abs(a.y - b.y) > MARGIN:
        found.append("above" if a.y < b.y else "below")
    return found


def phrase(item, size=False, article="a"):
    """"a red circle", or with size "a small red circle"."""
    words = [article] if article else []
    words += [item.size] if size else []
    words += [item.colour, item.shape]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def listed(parts):
    """"x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


OPENINGS = ("", "", "", "a picture of ", "a photo of ", "there is ", "an image with ")


def describe(scene, rng, length=None):
    """One true sentence. length: "short" names objects; "long" adds sizes, places or a relation,
    and at times the background; "full" says of every object its size and place. None: any but full.

    Every sentence names every object by colour and shape.
    """
    length = length or rng.choice(("short", "short", "long"))
    items = list(scene.items)
    rng.shuffle(items)
    opening = rng.choice(OPENINGS)
    detail = rng.choice(("size", "place", "relation")) if length == "long" else length
    held = relations(items[0], items[1]) if len(items) == 2 and detail == "relation" else []
    names = [phrase(item, size=detail in ("size", "full")) for item in items]
    if detail in ("place", "full"):
        names = [f"{name} {'in' if where(item) == 'centre' else 'at'} the {where(item)}"
                 for name, item in zip(names, items)]
    text = f"{names[0]} {rng.choice(held)} {names[1]}" if held else listed(names)
    if length == "full" or detail in ("size", "relation") and rng.random() < 0.3:
        text += f" on a {scene.background} background"
    return opening + text


# ------------------------------------------------------------------ truth

_OPENING = re.compile(r"^(?:(?:a|an|the) (?:\w+ )?(?:photo|picture|image|drawing|painting) "
                      r"(?:of|with)|there (?:is|are)|this is|it shows|we see|i see) ")
_BACKGROUND = re.compile(r" on (?:a|the) (\w+) background$")
_RELATION = re.compile(r"^(.+?) (?:is |are )?(?:to the )?(left of|right of|above|below) (.+)$")
_PLACE = re.compile(r" (?:is )?(?:at|in|on) the "
                    r"(?:(top|bottom)(?: (left|right))?|(left|right)|(centre))$")
_PLURALS = {"crosses": "cross", "shapes": "shape", "objects": "object",
            **{s + "s": s for s in SHAPES if s != "cross"}}
_GENERIC = {"shape", "object", "thing"}


def parse_phrase(text):
    """"two small red circles" -> (2, "small", "red", "circle"); None parts are unsaid.

    Returns None when the text is not such a phrase. The count is None for a, an, the.
    """
    words = text.split()
    count = None
    if words and words[0] in ("a", "an", "the"):
        words = words[1:]
    elif words and words[0] in NUMBERS:
        count, words = NUMBERS.index(words[0]), words[1:]
    size = words.pop(0) if words and words[0] in SIZES else None
    colour = words.pop(0) if words and words[0] in COLOURS else None
    if len(words) != 1:
        return None
    noun = _PLURALS.get(words[0], words[0])
    if noun not in SHAPES and noun not in _GENERIC:
        return None
    return count, size, colour, None if noun in _GENERIC else noun


def matching(scene, size=None, colour=None, shape=None):
    """The objects of the scene that fit what is said of them."""
    return [i for i in scene.items if size in (None, i.size) and colour in (None, i.colour)
            and shape in (None, i.shape)]


def statements(text):
    """Read a sentence into statements, or None when it is not of the world's language.

    A statement is ("background", name), ("exists", phrase, place or None) or
    ("relation", phrase, relation, phrase), with a phrase as `parse_phrase` returns it.
    """
    text = " ".join(re.sub(r"[.!?]", " ", text.lower()).replace(",", " , ").split())
    text = _OPENING.sub("", text)
    found = []
    background = _BACKGROUND.search(text)
    if background:
        found.append(("background", background[1]))
        text = text[:background.start()]
    related = _RELATION.match(text)
    if related and "," not in text and " and " not in text:
        one, other = parse_phrase(related[1]), parse_phrase(related[3])
        if not one or not other or one[0] is not None or other[0] is not None:
            return None                   # a relation joins two objects: "no", "two" do not fit it
        return found + [("relation", one, related[2], other)]
    for part in re.split(r" , and | , | and ", text):
        spot = _PLACE.search(part)
        named = parse_phrase(part[:spot.start()] if spot else part)
        if named is None:
            return None
        words = " ".join(w for w in spot.groups() if w) if spot else None
        found.append(("exists", named, words))
    return found


def holds(statement, scene):
    """Whether one statement of `statements` is true of the scene."""
    kind = statement[0]
    if kind == "background":
        return statement[1] == scene.background
    if kind == "relation":
        _, one, relation, other = statement
        return any(relation in relations(a, b) for a in matching(scene, *one[1:])
                   for b in matching(scene, *other[1:]) if a is not b)
    _, (count, *said), place = statement
    fitting = [i for i in matching(scene, *said)
               if place is None or place == where(i) or place in where(i).split()]
    return bool(fitting) if count is None else len(fitting) == count


def is_true(text, scene):
    """True when the text reads as statements and each of them holds; else False."""
    said = statements(text)
    return bool(said) and all(holds(s, scene) for s in said)


def names_an_object(text):
    """True when a statement names an object by both colour and shape ("no red star" does not)."""
    phrases = [p for s in statements(text) or [] for p in s[1:] if isinstance(p, tuple)]
    return any(count != 0 and colour and shape for count, _, colour, shape in phrases)


def restyled(scene, style):
    """The same scene in a shifted rendering: one of STYLES."""
    if style not in STYLES:
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
    return replace(scene, style=style)
