"""What one scene can be asked: questions, probes, swapped and noisy captions, boxes, letters.

A record is {"images": [...], "texts": [...]} or {"images": [...], "turns": [...]}, a turn being
{"role": "user" or "assistant", "text": ...}, with the Scene as "source" and, where something is
asked, the exact "answer". Every record is a function of the scene and of an rng, a random.Random;
side is the picture's side in pixels, and side=None leaves the pictures out (texts only, fast).

    scene = sample(random.Random(0), objects=2)
    for record in questions(scene, random.Random(0)):
        print([turn["text"] for turn in record["turns"]])

In training texts no held-out colour-shape pair is named. Records of several scenes are in
`stories.py`.
"""
import itertools
import re
from collections import Counter, defaultdict
from dataclasses import replace

from PIL import Image

from common.data.shapes.scene import (BACKGROUNDS, COLOURS, HELD_OUT, NUMBERS, PAIRS, SHAPES, SIZES,
                                 describe, draw, is_true, listed, matching, phrase, relations,
                                 sample, where)

YES_NO = ("yes", "no")
COUNTS = ("zero",) + NUMBERS[1:]
PLURALS = {s: "crosses" if s == "cross" else s + "s" for s in SHAPES}

# kind -> form -> (answers, training wordings, test wordings). A form is what is drawn first, so
# that within each form every answer is equally likely and the words of a question betray nothing.
_HOW_MANY = (COUNTS, ("how many {x} are there?", "how many {x} does the picture show?"),
             ("what is the number of {x}?", "can you see how many {x} there are?"))
_IS = (YES_NO, ("is the {x} {r} the {y}?", "does the picture show the {x} {r} the {y}?"),
       ("is it true that the {x} is {r} the {y}?", "can you see the {x} {r} the {y}?"))
_EITHER = (("is the {x} {a} or {b} the {y}?", "where is the {x}, {a} or {b} the {y}?"),
           ("what is true of the {x}, is it {a} or {b} the {y}?",))
_IS_THERE = (YES_NO, ("is there {x}?", "does the picture show {x}?"),
             ("can you see {x}?", "is it true that there is {x}?"))
_MORE = (YES_NO, ("are there {c} {x} than {y}?", "does the picture show {c} {x} than {y}?"),
         ("is it true that there are {c} {x} than {y}?", "can you see {c} {x} than {y}?"))
FORMS = {
    "colour": {"colour": (tuple(COLOURS),
                          ("what colour is the {x}?", "which colour does the {x} have?"),
                          ("what is the colour of the {x}?", "of which colour is the {x}?"))},
    "shape": {"shape": (SHAPES, ("what shape is the {x}?", "which shape does the {x} have?"),
                        ("what is the shape of the {x}?", "of which shape is the {x}?"))},
    "count": {"colours": _HOW_MANY, "shapes": _HOW_MANY},
    "relation": {"is beside": _IS, "is above": _IS,
                 "beside": (("left", "right"), *_EITHER), "above": (("above", "below"), *_EITHER)},
    "existence": {"pair": _IS_THERE, "colour": _IS_THERE, "shape": _IS_THERE},
    "comparison": {"larger": (YES_NO, ("is the {x} {c} than the {y}?",
                                       "does the {x} look {c} than the {y}?"),
                              ("is it true that the {x} is {c} than the {y}?",)),
                   "colours": _MORE, "shapes": _MORE},
    # Never asked in training: the answers are known from captions, the question is not.
    "size": {"size": (tuple(SIZES), (), ("is the {x} small or large?", "what size is the {x}?"))},
}
UNSEEN_KIND = "size"
KINDS = {"train": tuple(k for k in FORMS if k != UNSEEN_KIND), "test": tuple(FORMS)}


# ------------------------------------------------------------------ helpers

def pictures(scenes, side):
    """The scenes drawn with side pixels a side; [] when side is None."""
    return [draw(scene, side) for scene in scenes] if side else []


def turns(*texts):
    """Texts spoken in turn by user and assistant: turns("what?", "a star")."""
    return [{"role": ("user", "assistant")[i % 2], "text": t} for i, t in enumerate(texts)]


def pairs_of(scene):
    """The (colour, shape) of every object, as a set."""
    return {(i.colour, i.shape) for i in scene.items}


def nameable(scene):
    """The pairs that may be named about a scene: held-out ones only where it shows one itself."""
    return PAIRS if pairs_of(scene) <= set(PAIRS) else PAIRS + tuple(sorted(HELD_OUT))


def names_held_out(text):
    """True when a held-out pair stands in the text: names_held_out("two red stars") -> True."""
    words = [{v: k for k, v in PLURALS.items()}.get(w, w) for w in re.findall(r"\w+", text.lower())]
    return any(pair in HELD_OUT for pair in zip(words, words[1:]))


def at(item):
    """The place in words: "at the top left", "in the centre"."""
    return f"{'in' if where(item) == 'centre' else 'at'} the {where(item)}"


def references(scene, item, hide=()):
    """Every phrase without article that fits this object and no other one of the scene.

    hide: attributes ("size", "colour", "shape") that the phrase must not tell.
    references(scene, circle, hide=("colour",)) -> ["circle", "small circle", "object at the top"]
    """
    found = []
    tellable = [a for a in ("size", "colour", "shape") if a not in hide]
    for n in range(len(tellable) + 1):
        for told in itertools.combinations(tellable, n):
            said = {attribute: getattr(item, attribute) for attribute in told}
            if len(matching(scene, **said)) == 1:
                found.append(" ".join({**said, "shape": said.get("shape", "object")}.values()))
    place = where(item)
    if sum(place == where(i) or place in where(i).split() for i in scene.items) == 1:
        found.append(f"object {at(item)}")
    return found


def pick(options, rng, form=None, answer=None):
    """One of options, (form, answer, slots): first a form evenly, then an answer evenly, then any.

    Returns None when nothing has the form and answer asked for.
    """
    options = [o for o in options if form in (None, o[0]) and answer in (None, o[1])]
    if not options:
        return None
    form = rng.choice(sorted({o[0] for o in options}))
    answer = rng.choice(sorted({o[1] for o in options if o[0] == form}))
    return rng.choice([o for o in options if o[:2] == (form, answer)])


# ------------------------------------------------------------------ questions

def about_objects(scene, kind):
    """Options for colour, shape and size: each object by each phrase that does not tell it."""
    return [(kind, getattr(item, kind), {"x": x})
            for item in scene.items for x in references(scene, item, hide=(kind,))]


def counted(scene):
    """{"colours": {"red objects": 1, ...}, "shapes": {"circles": 0, ...}} of a scene."""
    return {"colours": {f"{c} objects": len(matching(scene, colour=c)) for c in COLOURS},
            "shapes": {PLURALS[s]: len(matching(scene, shape=s)) for s in SHAPES}}


def about_counts(scene):
    """Options for count; objects of one colour or of one shape."""
    return [(form, COUNTS[n], {"x": x}) for form, group in counted(scene).items()
            for x, n in group.items()]


def named_pairs(scene):
    """(a, name, b, other) for each two objects in both orders whose colour and shape name them."""
    named = [(i, f"{i.colour} {i.shape}") for i in scene.items
             if len(matching(scene, colour=i.colour, shape=i.shape)) == 1]
    return [(a, x, b, y) for (a, x), (b, y) in itertools.permutations(named, 2)]


def about_relations(scene):
    """Options for relation: yes or no, and which of the two; only where the distance is clear."""
    options = []
    for a, x, b, y in named_pairs(scene):
        for form, one, other in (("beside", "left of", "right of"), ("above", "above", "below")):
            held = [r for r in relations(a, b) if r in (one, other)]
            for r in held and (one, other):
                options.append(("is " + form, "yes" if r in held else "no",
                                {"x": x, "r": r, "y": y}))
            if held:
                slots = {"x": x, "a": one.split()[0], "b": other, "y": y}
                options.append((form, held[0].split()[0], slots))
    return options


def about_existence(scene):
    """Options for existence: pairs, colours and shapes, those that are there and all others."""
    said = [("pair", {"colour": c, "shape": s}) for c, s in nameable(scene)]
    said += [("colour", {"colour": c}) for c in COLOURS] + [("shape", {"shape": s}) for s in SHAPES]
    return [(form, "yes" if matching(scene, **which) else "no", {"x": a_thing(**which)})
            for form, which in said]


def a_thing(colour="", shape="object"):
    """"a red circle", "an orange object", "a star"."""
    name = f"{colour} {shape}".strip()
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def about_comparison(scene):
    """Options for comparison: sizes of two objects that differ, numbers that differ."""
    options = []
    for a, x, b, y in named_pairs(scene):
        for c in ("larger", "smaller") if a.size != b.size else ():
            options.append(("larger", "yes" if (a.size == "large") == (c == "larger") else "no",
                            {"x": x, "c": c, "y": y}))
    for form, group in counted(scene).items():
        for (x, n), (y, m) in itertools.permutations(group.items(), 2):
            for c in ("more", "fewer") if n != m else ():
                options.append((form, "yes" if (n > m) == (c == "more") else "no",
                                {"x": x, "c": c, "y": y}))
    return options


def candidates(scene, kind):
    """Every decidable question of a kind about a scene: a list of (form, answer, slots)."""
    if kind in ("colour", "shape", "size"):
        return about_objects(scene, kind)
    return {"count": about_counts, "relation": about_relations, "existence": about_existence,
            "comparison": about_comparison}[kind](scene)


def worded(option, rng, kind, split, scene):
    """The question of an option about a scene, in one of the split's wordings.

    Raises ValueError for a kind or a scene that the split must not ask about.
    """
    form, _, slots = option
    if split not in KINDS or kind not in KINDS[split]:
        raise ValueError(f"{kind!r} is not asked in split {split!r}, only {KINDS.get(split)}")
    if split == "train" and pairs_of(scene) & HELD_OUT:
        raise ValueError(f"a training question about held-out {pairs_of(scene) & HELD_OUT}")
    return rng.choice(FORMS[kind][form][1 if split == "train" else 2]).format(**slots)


def asked(scene, question, answer, side, **more):
    """The record of one question about one scene."""
    return {"images": pictures((scene,), side), "turns": turns(question, answer),
            "answer": answer, "source": scene, **more}


def questions(scene, rng, split="train", side=32):
    """One record for each kind that the scene allows; "kind" and "form" say which it is.

    split "train" has the training wordings. "test" has other wordings of the same kinds and the
    kind UNSEEN_KIND besides. Each answer is one word.

    questions(scene, rng)[0]["turns"] -> "what colour is the circle?", "red"
    """
    records = []
    for kind in KINDS["train" if split == "train" else "test"]:
        option = pick(candidates(scene, kind), rng)
        if option:
            text = worded(option, rng, kind, split, scene)
            records.append(asked(scene, text, option[1], side, kind=kind, form=option[0]))
    return records


def question(rng, kind, split="train", side=32, objects=(1, 2), **dial):
    """One question of a kind whose answer is drawn first, evenly, and its scene to fit it.

    So the answers are as balanced as they can be, counts too, which a given scene does not allow.
    objects and dial go to `sample`. Raises ValueError when such scenes have no such question.

    question(random.Random(0), "count")["answer"] -> "two"
    """
    form = rng.choice(tuple(FORMS[kind]))
    answers = FORMS[kind][form][0]
    if kind == "count":                   # four of one colour are too rare to wait for
        answers = answers[:min(3, objects if isinstance(objects, int) else objects[1]) + 1]
    answer = rng.choice(answers)
    for _ in range(5000):
        scene = sample(rng, objects, **dial)
        option = pick(candidates(scene, kind), rng, form, answer)
        if option:
            text = worded(option, rng, kind, split, scene)
            return asked(scene, text, answer, side, kind=kind, form=form)
    raise ValueError(f"no scene of {objects} objects allows a {kind} ({form}) question: {answer}")


def blind_baseline(seen, records):
    """The accuracy on records of one who never looks and gives each question its usual answer.

    The usual answer to the same words in seen, else to the same form, else "no".
    """
    usual = defaultdict(Counter)
    for record in seen:
        for key in (record["turns"][0]["text"], (record["kind"], record["form"])):
            usual[key][record["answer"]] += 1

    def guess(record):
        text, form = record["turns"][0]["text"], (record["kind"], record["form"])
        counts = usual.get(text) or usual.get(form) or Counter(no=1)
        return max(sorted(counts), key=counts.get)
    return sum(guess(r) == r["answer"] for r in records) / len(records)


# ------------------------------------------------------------------ hallucination

SETTINGS = ("random", "popular", "adversarial")
POPULAR = ("cyan", "pink")                # no pair of theirs is held out: the commonest colours


def absent(scene, rng, setting):
    """A (colour, shape) that the scene lacks, in one of the SETTINGS of POPE.

    random: any. popular: of the commonest colours of the world. adversarial: its colour and its
    shape are both there, on different objects, or else one of them is.
    """
    there = pairs_of(scene)
    lacking = [p for p in nameable(scene) if p not in there]
    if setting == "popular":
        lacking = [p for p in lacking if p[0] in POPULAR]
    elif setting == "adversarial":
        colours, shapes = ({p[i] for p in there} for i in (0, 1))
        shared = {p: (p[0] in colours) + (p[1] in shapes) for p in lacking}
        lacking = [p for p in lacking if shared[p] == max(shared.values())]
    elif setting != "random":
        raise ValueError(f"setting {setting!r} is not one of {', '.join(SETTINGS)}")
    return rng.choice(lacking)


def probes(scene, rng, side=32):
    """Six yes-no records in the manner of POPE: in each of the SETTINGS one yes and one no.

    probes(scene, rng)[1]["turns"] -> "is there a red square in the picture?", "no"
    """
    records = []
    for setting in SETTINGS:
        there = rng.choice(sorted(pairs_of(scene)))
        for pair, answer in ((there, "yes"), (absent(scene, rng, setting), "no")):
            text = f"is there {a_thing(*pair)} in the picture?"
            records.append(asked(scene, text, answer, side, kind="probe", setting=setting))
    return records


# ------------------------------------------------------------------ captions that are not true

def naming(items, attribute):
    """The objects in their order, with what the attribute needs: "a red circle and a blue star"."""
    places = [f" {at(i)}" if attribute == "place" else "" for i in items]
    return listed([phrase(i, size=attribute == "size") + p for i, p in zip(items, places)])


def swapped_attributes(scene, rng, side=32):
    """A true caption, and a false one in which two objects exchanged their colour, size or place.

    {"texts": ["a red circle and a blue square", "a blue circle and a red square"], "kind":
    "colour"}; None when no such exchange gives a false caption, as with one object.
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
    None when the scene has no such relation. "shuffled": the words of any caption in disorder.
    """
    told = [[f"{phrase(a)} {r} {phrase(b)}", f"{phrase(b)} {r} {phrase(a)}"]
            for a, b in itertools.permutations(scene.items, 2) for r in relations(a, b)]
    told = [texts for texts in told if not is_true(texts[1], scene)]
    kind = kind or rng.choice(("reversed", "shuffled") if told else ("shuffled",))
    if kind == "reversed":
        if not told:
            return None
        texts = rng.choice(told)
    else:
        texts = [describe(scene, rng)] * 2
        while is_true(texts[1], scene) or names_held_out(texts[1]):
            words = texts[0].split()
            texts = [texts[0], " ".join(rng.sample(words, len(words)))]
    return {"images": pictures((scene,), side), "texts": texts, "kind": kind, "source": scene}


HARDNESSES = ("random", "shares", "differs")


def other_scene(scene, rng, hardness):
    """Another scene, from which a wrong caption is taken.

    random: any. shares: one object has its colour or its shape from this scene, nothing else does.
    differs: one object has another colour or another shape, nothing else differs.
    """
    there, n = pairs_of(scene), len(scene.items)
    if hardness == "random":
        return sample(rng, n)
    if hardness == "shares":
        colours, shapes = ({p[i] for p in there} for i in (0, 1))
        near = [p for p in PAIRS if (p[0] in colours) != (p[1] in shapes)]
        far = [p for p in PAIRS if p[0] not in colours and p[1] not in shapes]
        chosen = [rng.choice(near)] + rng.sample(far, min(n - 1, len(far)))
        return sample(rng, len(chosen), pairs=chosen)
    if hardness != "differs":
        raise ValueError(f"hardness {hardness!r} is not one of {', '.join(HARDNESSES)}")
    which = rng.randrange(n)
    item = scene.items[which]
    changed = rng.choice([replace(item, colour=c, shape=s) for c, s in nameable(scene)
                          if (c, s) not in there and (c == item.colour) != (s == item.shape)])
    return replace(scene, items=scene.items[:which] + (changed,) + scene.items[which + 1:])


def noisy_caption(scene, rng, rate=0.5, hardness=None, side=32):
    """A caption from the web: with probability rate it is the true caption of another scene.

    {"texts": [caption], "truth": True or False, "hardness": one of HARDNESSES or None if true,
    "told": the scene that the caption is true of}. hardness None draws one.
    """
    told, kind = scene, None
    if rng.random() < rate:
        kind = hardness or rng.choice(HARDNESSES)
        told = other_scene(scene, rng, kind)
    text = describe(told, rng)
    while kind and is_true(text, scene):
        told = other_scene(scene, rng, kind)
        text = describe(told, rng)
    return {"images": pictures((scene,), side), "texts": [text], "truth": kind is None,
            "hardness": kind, "told": told, "source": scene}


# ------------------------------------------------------------------ boxes

def box_of(item):
    """The box around an object in integers, 0 to 999 of the side: (x1, y1, x2, y2)."""
    return tuple(min(999, int(1000 * v)) for v in item.box)


def box_text(box):
    """A box in words, Qwen-VL's way: "(120,340),(355,575)"."""
    return "({},{}),({},{})".format(*box)


def read_box(text):
    """The first box in a text as four integers, or None: the inverse of `box_text`."""
    found = re.search(r"\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)", text)
    return tuple(int(v) for v in found.groups()) if found else None


def referring(scene, rng, kind=None, side=32):
    """A phrase that fits one object and its box. kind "ground" asks for the box, "name" for it.

    "give the box of the red circle." -> "(120,340),(355,575)";
    "which object is in the box (120,340),(355,575)?" -> "a red circle".
    {"boxes": [box], "phrase": "red circle", "item": Item}; None if no object can be told apart.
    """
    kind = kind or rng.choice(("ground", "name"))
    options = [(item, x) for item in scene.items for x in references(scene, item)]
    if not options:
        return None
    item, said = rng.choice(options)
    box = box_of(item)
    if kind == "ground":
        text, answer = f"give the box of the {said}.", box_text(box)
    else:
        text, answer = f"which object is in the box {box_text(box)}?", phrase(item)
    return asked(scene, text, answer, side, kind=kind, boxes=[box], phrase=said, item=item)


# ------------------------------------------------------------------ letters and digits

# Five columns of seven dots each, one byte a column, lowest bit on top.
_DOTS = """
0 3e5149453e  1 00427f4000  2 4261514946  3 2141454b31  4 1814127f10  5 2745454539  6 3c4a494930
7 0171090503  8 3649494936  9 064949291e  A 7e1111117e  B 7f49494936  C 3e41414122  D 7f4141221c
E 7f49494941  F 7f09090901  G 3e4149497a  H 7f0808087f  I 00417f4100  J 2040413f01  K 7f08142241
L 7f40404040  M 7f020c027f  N 7f0408107f  O 3e4141413e  P 7f09090906  Q 3e4151215e  R 7f09192946
S 4649494931  T 01017f0101  U 3f4040403f  V 1f2040201f  W 3f4038403f  X 6314081463  Y 0708700807
Z 6151494543"""
GLYPHS = {c: bytes.fromhex(dots) for c, dots in zip(*[iter(_DOTS.split())] * 2)}


def write(picture, text, x, y, dot, ink):
    """Write the text into the picture with its top left at pixel (x, y), dots of dot pixels."""
    for n, letter in enumerate(text):
        for column, bits in enumerate(GLYPHS[letter]):
            for row in range(7):
                if bits >> row & 1:
                    left, top = x + (6 * n + column) * dot, y + row * dot
                    picture.paste(ink, (left, top, left + dot, top + dot))


def glyphs(rng, length=4, side=224, dot=2):
    """Letters and digits to be read, 7 * dot pixels high somewhere in a large empty picture.

    {"answer": "K7PD", "boxes": [box]}; the same pixels with any version of Pillow. Raises
    ValueError when the text does not fit.

    glyphs(rng)["turns"] -> "read the letters in the picture.", "K7PD"
    """
    text = "".join(rng.choice(sorted(GLYPHS)) for _ in range(length))
    width, height = (6 * length - 1) * dot, 7 * dot
    if width > side or height > side:
        raise ValueError(f"{length} letters are {width} x {height} pixels, more than {side}")
    x, y = rng.randint(0, side - width), rng.randint(0, side - height)
    picture = Image.new("RGB", (side, side), rng.choice(tuple(BACKGROUNDS.values())))
    write(picture, text, x, y, dot, ink=(20, 20, 20))
    wording = rng.choice(("read the letters in the picture.", "which letters are in the picture?"))
    box = tuple(min(999, 1000 * v // side) for v in (x, y, x + width, y + height))
    return {"images": [picture], "turns": turns(wording, text), "answer": text, "boxes": [box]}
