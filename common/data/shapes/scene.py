"""Scenes of coloured shapes: sampling and drawing.

A Scene is the ground truth of a record: `draw` renders it with Pillow, `words.describe` puts it
into a sentence and `words.is_true` checks any sentence against it.
"""
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 220),
           "yellow": (240, 210, 40), "purple": (135, 50, 180), "orange": (245, 130, 30),
           "cyan": (60, 200, 215), "pink": (250, 140, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.16, "large": 0.26}      # the radius, as a fraction of the image's side
BACKGROUNDS = {"white": (250, 250, 250), "grey": (205, 205, 205), "cream": (250, 235, 205)}
# Pairs that no training image shows and no training text names (composition_accuracy).
HELD_OUT = frozenset({("red", "star"), ("green", "ring"), ("blue", "triangle"),
                      ("yellow", "circle"), ("purple", "cross"), ("orange", "square")})
PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
STYLES = ("plain", "outline", "texture", "palette")
SUPERSAMPLE = 3


@dataclass(frozen=True)
class Item:
    """One object. x, y: its centre, fractions of the side from the top left. tint: RGB jitter."""
    colour: str
    shape: str
    size: str
    x: float
    y: float
    tint: tuple = (0, 0, 0)

    @property
    def name(self):
        """"red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self):
        """(left, top, right, bottom) of what the image shows of it, fractions of the side."""
        xs, ys = zip(*outline(self.shape, self.x, self.y, SIZES[self.size]))
        return max(0.0, min(xs)), max(0.0, min(ys)), min(1.0, max(xs)), min(1.0, max(ys))


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background.

    clutter: grey strokes (x0, y0, x1, y1) behind the objects. noise: standard deviation of the
    pixel noise, where 1 is the range of a pixel; grain: its seed. style: one of STYLES.
    """
    items: tuple
    background: str = "white"
    clutter: tuple = ()
    noise: float = 0.0
    grain: int = 0
    style: str = "plain"


def sample_centres(rng, radii):
    """[(x, y), ...] of circles inside the image that do not touch; None if one finds no room."""
    centres = []
    for radius in radii:
        for _ in range(60):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            if all(math.hypot(x - a, y - b) > radius + r + 0.02
                   for (a, b), r in zip(centres, radii)):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def sample(rng, objects=(1, 2), pairs=PAIRS, noise=0.0, clutter=0, style="plain"):
    """A random Scene. objects: a count, or (least, most). pairs: the allowed (colour, shape).

    No two objects have the same colour and shape, so "the red circle" is one object.
    """
    least, most = (objects, objects) if isinstance(objects, int) else objects
    count, centres = rng.randint(least, most), None
    while not centres:
        drawn = rng.sample(pairs, count)
        sizes = [rng.choice(("small", "large") if count <= 4 else ("small",)) for _ in drawn]
        centres = sample_centres(rng, [SIZES[s] for s in sizes])
    items = tuple(Item(c, s, size, x, y, tuple(rng.randint(-12, 12) for _ in range(3)))
                  for (c, s), size, (x, y) in zip(drawn, sizes, centres))
    strokes = tuple(tuple(rng.random() for _ in range(4)) for _ in range(clutter))
    return Scene(items, rng.choice(tuple(BACKGROUNDS)), strokes, noise, rng.getrandbits(32), style)


def polygon(x, y, radii):
    """Corners around (x, y), the first on top, at these distances from it."""
    angles = [-math.pi / 2 + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in zip(radii, angles)]


def outline(shape, x, y, r):
    """The corners of a shape of radius r around (x, y); of a round shape, those of its box."""
    if shape == "triangle":
        return polygon(x, y + 0.15 * r, [1.1 * r] * 3)
    if shape == "star":
        return polygon(x, y, [1.1 * r, 0.45 * r] * 5)
    if shape == "cross":
        a = 0.32 * r
        return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a),
                (x + a, y + a), (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a),
                (x - r, y - a), (x - a, y - a)]
    a = 0.8 * r if shape == "square" else r
    return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]


def paint(canvas, item, side, style, back):
    """Draw one object on an ImageDraw canvas of side pixels; back: the background's RGB."""
    x, y, r = item.x * side, item.y * side, SIZES[item.size] * side
    base = COLOURS[item.colour]
    if style == "palette":                # duller and darker, of the same hue
        base = [0.55 * v + 0.25 * (sum(base) / 3) for v in base]
    colour = tuple(int(min(255, max(0, v + t))) for v, t in zip(base, item.tint))
    line = max(2, int(0.22 * r))
    if item.shape in ("circle", "ring"):
        # A ring is a circle with a smaller one of the background's colour on it.
        for radius, fill in ((r, colour), (r / 2, back))[:1 + (item.shape == "ring")]:
            look = {"outline": colour, "width": line} if style == "outline" else {"fill": fill}
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), **look)
    elif style == "outline":
        corners = outline(item.shape, x, y, r)
        canvas.line(corners + corners[:2], fill=colour, width=line)
    else:
        canvas.polygon(outline(item.shape, x, y, r), fill=colour)
    if style == "texture":
        for k in range(-3, 4):            # stripes of the background's colour across the object
            level = y + k * r / 3
            canvas.line((x - r, level, x + r, level), fill=back, width=max(1, line // 3))


def draw(scene, size=32):
    """The scene as an RGB image of size x size pixels, drawn larger and averaged down."""
    side, back = size * SUPERSAMPLE, BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (side, side), back)
    canvas = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in scene.clutter:
        canvas.line((x0 * side, y0 * side, x1 * side, y1 * side), fill=(110, 110, 110), width=2)
    for item in scene.items:
        paint(canvas, item, side, scene.style, back)
    picture = picture.reduce(SUPERSAMPLE)
    if scene.noise:
        noise = np.random.default_rng(scene.grain).normal(0, 255 * scene.noise, (size, size, 3))
        picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    return picture


def pictures(scenes, side):
    """The scenes drawn with `side` pixels a side; [] when side is None (texts alone are fast)."""
    return [draw(scene, side) for scene in scenes] if side else []


def turn(prompt, answer, scenes=(), side=None):
    """One turn of a record. The scenes become its still pictures, each a clip of one frame."""
    return {"images": [[p] for p in pictures(scenes, side)], "prompt": prompt, "answer": answer}


def dialogue_turns(pairs, scene, side):
    """[(prompt, answer), ...] as turns, of which the first shows the scene."""
    return [turn(*pair, () if n else (scene,), side) for n, pair in enumerate(pairs)]
