"""Where something is in a picture: referring phrases with boxes, and letters to be read.

A record is one question as in `questions.py`, with "boxes": integers (x1, y1, x2, y2), 0 to 999 of
the side. side=None leaves the picture out.
"""
from PIL import Image

from common.data.shapes.scene import BACKGROUNDS, turn
from common.data.shapes.words import phrase, references
from common.data.tokenizer import BOX, BOX_END, REF, REF_END

GROUNDING_KINDS = ("ground", "name", "caption")
READ_PROMPTS = ("read the letters in the picture.", "which letters are in the picture?")


def box_of(item):
    """The box around an item in integers, 0 to 999 of the side: (x1, y1, x2, y2)."""
    return tuple(min(999, int(1000 * v)) for v in item.box)


def box_text(box):
    """A box as Qwen-VL writes it: "(120,340),(355,575)"."""
    return "({},{}),({},{})".format(*box)


def referring(scene, rng, kind=None, side=32):
    """A phrase that fits one item, and the item's box. "ground" asks for the box, "name" for it.

    "give the box of the red circle." -> "(120,340),(355,575)";
    "which object is in the box (120,340),(355,575)?" -> "a red circle".
    {"boxes": [box], "phrase": "red circle", "item": Item}
    """
    kind = kind or rng.choice(("ground", "name"))
    item, name = rng.choice([(i, x) for i in scene.items for x in references(scene, i)])
    box = box_of(item)
    if kind == "ground":
        question, answer = f"give the box of the {name}.", box_text(box)
    else:
        question, answer = f"which object is in the box {box_text(box)}?", phrase(item)
    return {"turns": [turn(question, answer, (scene,), side)], "kind": kind, "boxes": [box],
            "phrase": name, "item": item, "source": scene}


def coarse_text(box):
    """`box_text` in steps of 10: a digit finer than a percent of the side would be chance."""
    return box_text([min(990, 10 * round(v / 10)) for v in box])


def grounded(scene, rng, kind=None, side=32):
    """`referring` as Qwen-VL writes it, with ids of special tokens as parts of prompt and answer.

    "ground": ("give the box of ", REF, "the red circle", REF_END, ".") -> (BOX, "(1,2),(3,4)",
    BOX_END). "name": ("which object is in the box ", BOX, "(1,2),(3,4)", BOX_END, "?") -> "a red
    circle". "caption" names every object from left to right: (REF, "a red circle", REF_END, BOX,
    "(1,2),(3,4)", BOX_END, ...). {"boxes", "kind", "source": Scene} and, but for captions, "phrase"
    """
    kind = kind or rng.choice(GROUNDING_KINDS)
    if kind == "caption":
        items = sorted(scene.items, key=lambda item: item.x)
        answer = tuple(part for item in items for part in (
            REF, phrase(item), REF_END, BOX, coarse_text(box_of(item)), BOX_END))
        return {"turns": [turn("describe the picture with boxes.", answer, (scene,), side)],
                "kind": kind, "boxes": [box_of(item) for item in items], "source": scene}
    record = referring(scene, rng, kind, side)
    question, box = record["turns"][0], (BOX, coarse_text(record["boxes"][0]), BOX_END)
    if kind == "ground":
        name = (REF, f"the {record['phrase']}", REF_END)
        question |= {"prompt": ("give the box of ", *name, "."), "answer": box}
    else:
        question["prompt"] = ("which object is in the box ", *box, "?")
        record["phrase"] = question["answer"]
    return record


# Five columns of seven dots each, one byte a column, lowest bit on top. A font of Pillow's would
# have other pixels in another version.
_DOTS = """
0 3e5149453e  1 00427f4000  2 4261514946  3 2141454b31  4 1814127f10  5 2745454539  6 3c4a494930
7 0171090503  8 3649494936  9 064949291e  A 7e1111117e  B 7f49494936  C 3e41414122  D 7f4141221c
E 7f49494941  F 7f09090901  G 3e4149497a  H 7f0808087f  I 00417f4100  J 2040413f01  K 7f08142241
L 7f40404040  M 7f020c027f  N 7f0408107f  O 3e4141413e  P 7f09090906  Q 3e4151215e  R 7f09192946
S 4649494931  T 01017f0101  U 3f4040403f  V 1f2040201f  W 3f4038403f  X 6314081463  Y 0708700807
Z 6151494543""".split()
GLYPHS = {c: bytes.fromhex(dots) for c, dots in zip(_DOTS[::2], _DOTS[1::2])}


def glyphs(rng, length=4, side=224, dot=2, alphabet=tuple(sorted(GLYPHS))):
    """Random letters of the alphabet, "K7PD", 7 * dot pixels high, in a large empty picture.

    Raises ValueError where they do not fit in.
    """
    text = "".join(rng.choice(alphabet) for _ in range(length))
    width, height = (6 * length - 1) * dot, 7 * dot
    if max(width, height) > side:
        raise ValueError(f"{length} letters are {width} x {height} pixels; the side is {side}")
    x, y = rng.randint(0, side - width), rng.randint(0, side - height)
    picture = Image.new("RGB", (side, side), rng.choice(tuple(BACKGROUNDS.values())))
    for n, letter in enumerate(text):
        for column, bits in enumerate(GLYPHS[letter]):
            for row in range(7):
                if bits >> row & 1:
                    left, top = x + (6 * n + column) * dot, y + row * dot
                    picture.paste((20, 20, 20), (left, top, left + dot, top + dot))
    prompt = rng.choice(READ_PROMPTS)
    box = tuple(min(999, 1000 * v // side) for v in (x, y, x + width, y + height))
    return {"turns": [turn(prompt, text) | {"images": [[picture]]}], "boxes": [box]}
