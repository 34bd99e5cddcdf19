"""Longer records of the shapes world: instructions, dialogues, documents, clips, few-shot episodes.

Records are as in `tasks.py`. A text with pictures inside it is a list of "segments", {"image": i}
or {"text": "..."}, where i counts "images"; segments["answer_at"] holds the answer, so a prompt is
segments[:answer_at]. What needs several scenes samples them itself: dial goes to `sample`.

    record = document(random.Random(0), images=3, objects=2)
    print(record["segments"], record["answer"], record["image"])
"""
import itertools
import random
import sys
import textwrap
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from common.data.shapes.scene import (BACKGROUNDS, COLOURS, MARGIN, NUMBERS, PAIRS, SHAPES, SIZES,
                                 STYLES, Item, Scene, describe, listed, matching, phrase,
                                 relations, restyled, sample, statements)
from common.data.shapes.questions import (COUNTS, FORMS, KINDS, PLURALS, YES_NO, a_thing, at, candidates,
                                 glyphs, nameable, noisy_caption, pick, pictures, probes,
                                 questions, referring, swapped_attributes, swapped_order, turns,
                                 worded)


def objects(n):
    """"no objects", "one object", "two objects"."""
    return f"{NUMBERS[n]} object{'' if n == 1 else 's'}"


# ------------------------------------------------------------------ instructions by a blind teacher

SURE = 0.05                               # a box's centre is less than this away from its object's
# Between the widest small object, a star, and the narrowest large one, a square.
WIDE = (2.1 * SIZES["small"] + 1.6 * SIZES["large"]) / 2


def context(scene, rng):
    """All that a language-only teacher gets of a picture: five captions, and names with boxes.

    {"captions": [...], "boxes": [("red circle", (left, top, right, bottom)), ...]}, in fractions of
    the side with two decimals (LLaVA section 3).
    """
    captions = []
    while len(captions) < 5:
        captions = list(dict.fromkeys(captions + [describe(scene, rng)]))
    items = rng.sample(scene.items, len(scene.items))
    return {"captions": captions,
            "boxes": [(f"{i.colour} {i.shape}", tuple(round(v, 2) for v in i.box)) for i in items]}


def context_text(known):
    """The context as the teacher reads it: a caption a line, then "star: [0.1, 0.3, 0.35, 0.5]"."""
    return "\n".join(known["captions"] + [f"{name}: {list(box)}" for name, box in known["boxes"]])


def read_boxes(known):
    """The objects as their boxes tell them: Items, but for the exact centre and the tint."""
    items = []
    for name, (left, top, right, bottom) in known["boxes"]:
        size = "large" if right - left > WIDE else "small"
        items.append(Item(*name.split(), size, (left + right) / 2, (top + bottom) / 2))
    return items


def placed(item):
    """True when the item's cell of the grid is beyond doubt."""
    return all(abs(v - border) > SURE for v in (item.x, item.y) for border in (1 / 3, 2 / 3))


def sure_relations(a, b):
    """The `relations` that are beyond doubt."""
    gap = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return [r for r in relations(a, b) if gap[r] > MARGIN + SURE]


def conversation(known, rng, rounds=4):
    """Question and answer in turn, the first on all there is: [user, assistant, user, ...].

    Each answer is a sentence that `is_true` can judge.
    """
    items = read_boxes(known)
    there = {(i.colour, i.shape) for i in items}
    missing = rng.choice([p for p in PAIRS if p not in there])
    said = [("can you tell me the number of objects?", f"there {be(items)} {objects(len(items))}."),
            (f"do you see {a_thing(*missing)}?", f"there is no {' '.join(missing)}.")]
    said += [(f"where is {phrase(i, article='the')}?", f"{phrase(i, article='the')} is {at(i)}.")
             for i in items if placed(i)]
    for a, b in itertools.permutations(items, 2):
        one, other = phrase(a, article="the"), phrase(b, article="the")
        said += [(f"where is {one}, compared to {other}?", f"{one} is {r} {other}.")
                 for r in sure_relations(a, b)]
    chosen = rng.sample(said, min(rounds - 1, len(said)))
    first = ("what can you see in the picture?",
             f"there {be(items)} {listed([phrase(i, size=True) for i in items])}.")
    return turns(*itertools.chain(first, *chosen))


def be(items):
    """"is" for one object, else "are"."""
    return "is" if len(items) == 1 else "are"


def detail(known, rng):
    """One question and a description of all there is, in sentences that `is_true` can judge."""
    items = read_boxes(known)
    backgrounds = [s[1] for c in known["captions"] for s in statements(c) if s[0] == "background"]
    behind = f" on a {backgrounds[0]} background" if backgrounds else ""
    said = [f"there {be(items)} {objects(len(items))}{behind}."]
    said += [f"there is {phrase(i, size=True)}{' ' + at(i) if placed(i) else ''}." for i in items]
    for a, b in itertools.pairwise(items):
        said += [f"{phrase(a, article='the')} is {r} {phrase(b, article='the')}."
                 for r in sure_relations(a, b)]
    wording = rng.choice(("describe the picture in detail.", "tell me all that the picture shows."))
    return turns(wording, " ".join(said))


def reasoning(known, rng):
    """One question that takes two steps, and an answer that gives its reason."""
    items = read_boxes(known)
    gone = phrase(rng.choice(items), article="the")
    said = [(f"if {gone} were taken away, how many objects would be left?",
             f"there {be(items)} {objects(len(items))}. without {gone}, {objects(len(items) - 1)} "
             "would be left.")]
    for one in items if len(items) > 1 else ():
        name, others = phrase(one, article="the"), [i for i in items if i is not one]
        for relation, way in (("left of", "from left to right"), ("above", "from top to bottom")):
            if all(relation in sure_relations(one, i) for i in others):
                said.append((f"which object comes first {way}, and why?",
                             f"{name} comes first, because it is {relation} all the others."))
        if one.size == "large" and all(i.size == "small" for i in others):
            said.append(("if all objects have the same true size, which one is nearest to you?",
                         f"{name} is nearest, because it looks larger than all the others."))
    return turns(*rng.choice(said))


TEACHERS = {"conversation": conversation, "detail": detail, "reasoning": reasoning}


def instruction(scene, rng, kind=None, side=32):
    """A picture and what a language-only teacher wrote of it, as LLaVA-Instruct was made.

    kind: one of TEACHERS. {"turns": [...], "context": what the teacher read, "kind": kind}

    instruction(scene, rng, "reasoning")["turns"] -> "which object comes first from left to right,
    and why?", "the red circle comes first, because it is left of all the others."
    """
    kind = kind or rng.choice(tuple(TEACHERS))
    known = context(scene, rng)
    return {"images": pictures((scene,), side), "turns": TEACHERS[kind](known, rng), "kind": kind,
            "context": context_text(known), "source": scene}


def multiple_choice(scene, rng, side=32):
    """A question that needs both the picture and a text, in ScienceQA's form.

    The text gives shapes a worth, drawn anew each time; asked is the worth of the picture. The
    other choices are what as many other shapes of the text would be worth.

    {"context", "question", "choices": ["7", "12", "9", "10"], "answer": "C", "explanation",
    "turns": [all of it as a prompt, explanation and letter]}
    """
    there = {i.shape for i in scene.items}
    missing = [s for s in SHAPES if s not in there]
    shapes = sorted(there) + rng.sample(missing, max(0, 5 - len(there)))
    worth = dict(zip(rng.sample(shapes, len(shapes)), rng.sample(range(1, 10), len(shapes))))
    listing = listed([f"{a_thing('', shape)} is worth {n}" for shape, n in worth.items()])
    known = f"in this game {listing}."
    total = sum(worth[i.shape] for i in scene.items)
    sums = {total}
    while len(sums) < 4:
        sums.add(sum(worth[s] for s in rng.choices(shapes, k=len(scene.items))))
    choices = rng.sample(sorted(sums), 4)
    letter = "ABCD"[choices.index(total)]
    reason = listed([f"{phrase(i)} is worth {worth[i.shape]}" for i in scene.items])
    if len(scene.items) > 1:
        reason += f", and {' + '.join(str(worth[i.shape]) for i in scene.items)} = {total}"
    asks = "how much is the picture worth?"
    shown = " ".join(f"({a}) {c}" for a, c in zip("ABCD", choices))
    return {"images": pictures((scene,), side), "context": known, "question": asks,
            "choices": [str(c) for c in choices], "answer": letter, "explanation": f"{reason}.",
            "source": scene,
            "turns": turns(f"context: {known}\nquestion: {asks}\nchoices: {shown}",
                           f"{reason}. the answer is ({letter}).")}


# ------------------------------------------------------------------ dialogue, two pictures

def dialogue(scene, rng, rounds=4, shown=6, split="train", side=32):
    """A caption, rounds of question and answer, and a last question with candidates (VisDial).

    In half of the dialogues the second question says "it" and means what the first asked about.

    {"texts": [caption], "turns": [user, assistant, ..., user], "candidates": [one-word answers,
    as many as shown, one of them right], "answer": "red", "right": its index}
    """
    caption = f"{objects(len(scene.items))} on a {scene.background} background"
    options = {kind: candidates(scene, kind) for kind in KINDS["train"]}
    alone = [i for i in scene.items if len(matching(scene, shape=i.shape)) == 1]
    missing = [s for s in SHAPES if not matching(scene, shape=s)]
    item = rng.choice(alone) if alone and (not missing or rng.random() < 0.5) else None
    shape, answer = (item.shape, "yes") if item else (rng.choice(missing), "no")
    first = ("shape", answer, {"x": a_thing("", shape)})
    options["existence"].remove(first)
    said = [(f"is there {first[2]['x']}?", answer, YES_NO)]
    if item:
        said.append(("what colour is it?", item.colour, tuple(COLOURS)))
        options["colour"] = [o for o in options["colour"] if o[1] != item.colour]
    while len(said) < rounds:
        kind = rng.choice([k for k, left in options.items() if left])
        option = pick(options[kind], rng)
        # No question comes twice, in whatever wording, nor any colour or shape.
        options[kind] = [o for o in options[kind] if o != option
                         and not (kind in ("colour", "shape") and o[1] == option[1])]
        text = worded(option, rng, kind, split, scene)
        said.append((text, option[1], FORMS[kind][option[0]][0]))
    *before, (last, answer, likely) = said[:rounds]
    rest = [w for w in (*YES_NO, *COLOURS, *SHAPES, *COUNTS) if w not in likely]
    wrong = [w for w in likely if w != answer]
    wrong = rng.sample(wrong, len(wrong)) + rng.sample(rest, len(rest))
    words = rng.sample([answer] + wrong[:shown - 1], shown)
    return {"images": pictures((scene,), side), "texts": [caption],
            "turns": turns(*itertools.chain(*[pair[:2] for pair in before]), last),
            "candidates": words, "answer": answer, "right": words.index(answer), "source": scene}


def two_scene_statements(left, right):
    """Options (form, "true" or "false", statement) on two scenes, for `pick`."""
    options, pairs = [], sorted({*nameable(left), *nameable(right)})
    named = [("pair", a_thing(c, s), {"colour": c, "shape": s}) for c, s in pairs]
    named += [("colour", a_thing(c), {"colour": c}) for c in COLOURS]
    named += [("shape", a_thing("", s), {"shape": s}) for s in SHAPES]
    for group, x, which in named:
        a, b = (len(matching(scene, **which)) for scene in (left, right))
        plural = PLURALS.get(which.get("shape"), "objects")
        many = f"{which['colour']} {plural}" if "colour" in which else plural
        for form, text, fact in (
                ("left", f"the left picture shows {x}.", a > 0),
                ("right", f"the right picture shows {x}.", b > 0),
                ("both", f"both pictures show {x}.", a > 0 and b > 0),
                ("one", f"only one of the pictures shows {x}.", (a > 0) != (b > 0)),
                ("neither", f"neither picture shows {x}.", a == b == 0),
                ("two", f"the two pictures show two {many} in all.", a + b == 2),
                ("three", f"the two pictures show three {many} in all.", a + b == 3)):
            options.append((f"{form} {group}", ("false", "true")[fact], text))
    a, b = len(left.items), len(right.items)
    for one, other, fact in (("left", "right", a > b), ("right", "left", b > a)) if a != b else ():
        text = f"there are more objects in the {one} picture than in the {other} one."
        options.append(("more", ("false", "true")[fact], text))
    return options


def two_scenes(left, right, rng, side=32):
    """Two pictures and a statement that is true or false of them (NLVR2), half and half.

    {"images": [left, right], "texts": ["both pictures show a circle."], "answer": "true"}. Only
    forms that have true and false statements of these scenes, so that the words betray nothing.
    """
    options = two_scene_statements(left, right)
    true, false = ({form for form, answer, _ in options if answer == a} for a in ("true", "false"))
    form, answer, text = pick([o for o in options if o[0] in true & false], rng)
    return {"images": pictures((left, right), side), "texts": [text], "answer": answer,
            "form": form, "source": (left, right)}


# ------------------------------------------------------------------ several pictures in a text

DOCUMENT_KINDS = ("colour", "shape", "count", "existence")


def document(rng, images=3, kind=None, split="train", side=32, **dial):
    """Pictures and texts in turn with a question on one picture: the last one before it.

    Asked of any of the other pictures, the same question has another answer. Each other picture is
    followed by a true caption, which is vague: what the others show would give a "yes" away.

    document(rng)["segments"] -> [{"image": 0}, {"text": "one object on a white background"},
    {"image": 1}, {"text": "what colour is the circle?"}, {"text": "blue"}, {"image": 2}, ...];
    {"answer": "blue", "answer_at": 4, "image": 1, "source": the scenes}
    """
    kind = kind or rng.choice(DOCUMENT_KINDS)
    option = None
    while not option:
        scene = sample(rng, **dial)
        option = pick(candidates(scene, kind), rng)
    form, answer, slots = option
    where = rng.randrange(images)
    scenes = []
    while len(scenes) < images:
        other = scene if len(scenes) == where else sample(rng, **dial)
        if other is scene or any((f, s) == (form, slots) and a != answer
                                 for f, a, s in candidates(other, kind)):
            scenes.append(other)
    segments = []
    for i, other in enumerate(scenes):
        segments.append({"image": i})
        if i == where:
            text = worded(option, rng, kind, split, scene)
            segments += [{"text": text}, {"text": answer}]
        else:
            caption = f"{objects(len(other.items))} on a {other.background} background"
            segments.append({"text": caption})
    return {"images": pictures(scenes, side), "segments": segments, "answer": answer,
            "answer_at": 2 * where + 2, "image": where, "kind": kind, "source": tuple(scenes)}


LABELS = ("dax", "wug", "blick", "fep", "toma", "zup", "kiv", "gorp", "mell", "sanu", "pif", "lorn")


def episode(rng, shots=4, classes=2, by=None, shuffled=False, side=32):
    """Labelled example pictures and one more picture whose label is asked: few-shot learning.

    The classes are colours or shapes (by); the labels are nonsense words, drawn anew for each
    episode, so that only the shots tell them. All else that could tell the classes apart is the
    same in all pictures. shots: of all classes together, equally many of each. shuffled: the labels
    of the shots are dealt out at random, and accuracy must fall to chance, 1 / classes.

    episode(rng, shots=2)["segments"] -> [{"image": 0}, {"text": "wug"}, {"image": 1}, {"text":
    "dax"}, {"image": 2}, {"text": "dax"}]; {"answer": "dax", "answer_at": 5, "image": 2,
    "candidates": ["wug", "dax"], "labels": {"circle": "dax", "square": "wug"}}
    """
    if shots % classes:
        raise ValueError(f"{shots} shots cannot be shared evenly by {classes} classes")
    by = by or rng.choice(("colour", "shape"))
    same = rng.choice(SHAPES if by == "colour" else tuple(COLOURS))
    pairs = rng.sample([p for p in PAIRS if same in p], classes)
    labels = dict(zip(pairs, rng.sample(LABELS, classes)))
    shown = rng.sample(pairs * (shots // classes), shots) + [rng.choice(pairs)]
    scenes = [sample(rng, 1, pairs=(pair,)) for pair in shown]
    said = [labels[pair] for pair in shown]
    if shuffled:
        said[:-1] = rng.sample(said[:-1], shots)
    segments = [part for i, label in enumerate(said) for part in ({"image": i}, {"text": label})]
    which = ("colour", "shape").index(by)
    return {"images": pictures(scenes, side), "segments": segments, "answer": said[-1],
            "answer_at": 2 * shots + 1, "image": shots,
            "candidates": rng.sample(list(labels.values()), classes),
            "labels": {pair[which]: label for pair, label in labels.items()},
            "source": tuple(scenes)}


CLIP_KINDS = ("direction", "first", "growth")
_MOVES = {"beside": ("left", "right"), "above": ("up", "down")}


def moving(rng, pairs, frames):
    """Two objects cross the picture, each in its lane and its direction; the first is asked of."""
    axis = rng.choice(tuple(_MOVES))
    lanes, ways = rng.sample((0.25, 0.75), 2), [rng.random() < 0.5 for _ in pairs]
    tracks = []
    for (colour, shape), lane, forward in zip(pairs, lanes, ways):
        near, far = rng.uniform(0.24, 0.34), rng.uniform(0.66, 0.76)
        steps = [near + (far - near) * t / (frames - 1) for t in range(frames)]
        across = [(v, lane) if axis == "beside" else (lane, v) for v in steps]
        tracks.append([Item(colour, shape, "small", x, y)
                       for x, y in across[::1 if forward else -1]])
    back, forth = _MOVES[axis]
    question = f"did {phrase(tracks[0][0], article='the')} move {back} or {forth}?"
    return [tuple(items) for items in zip(*tracks)], question, forth if ways[0] else back


def appearing(rng, pairs, frames):
    """One object in the first half of the frames, another in the second half."""
    one, other = (sample(rng, 1, pairs=(pair,)).items for pair in pairs)
    named = rng.sample([pair[0] for pair in pairs], 2)
    question = f"which colour did the picture show first, {named[0]} or {named[1]}?"
    return [one] * (frames // 2) + [other] * (frames - frames // 2), question, pairs[0][0]


def growing(rng, pairs, frames):
    """One object that changes its size at some moment."""
    before, after = rng.sample(tuple(SIZES), 2)
    item = replace(sample(rng, 1, pairs=pairs[:1]).items[0], size=before)
    item = replace(item, x=0.25 + item.x / 2, y=0.25 + item.y / 2)    # room for both sizes
    moment = rng.randint(1, frames - 1)
    question = f"did {phrase(item, article='the')} grow or shrink?"
    shown = [(item,)] * moment + [(replace(item, size=after),)] * (frames - moment)
    return shown, question, "shrank" if before == "large" else "grew"


def clip(rng, frames=8, kind=None, side=32):
    """Frames of moving shapes and a question that only their order decides.

    kind: one of CLIP_KINDS. The same frames backwards have the other answer, so who does not know
    the order can only guess between two words. {"images": [frame, ...], "turns", "answer", "kind",
    "source": a Scene for each frame}

    clip(rng, kind="direction")["turns"] -> "did the red circle move left or right?", "left"
    """
    if frames < 2:
        raise ValueError(f"frames {frames} have no order; at least 2 are needed")
    kind = kind or rng.choice(CLIP_KINDS)
    background = rng.choice(tuple(BACKGROUNDS))
    pairs = rng.sample(PAIRS, 2)
    while pairs[0][0] == pairs[1][0]:
        pairs = rng.sample(PAIRS, 2)
    play = {"direction": moving, "first": appearing, "growth": growing}[kind]
    shown, question, answer = play(rng, pairs, frames)
    scenes = tuple(Scene(items, background) for items in shown)
    return {"images": pictures(scenes, side), "turns": turns(question, answer), "answer": answer,
            "kind": kind, "source": scenes}


# ------------------------------------------------------------------ all of them together

def examples(rng, side=32):
    """One record of every sort: {"question: colour": record, ..., "episode": record}."""
    one, two, three = (sample(rng, n) for n in (1, 2, (2, 4)))
    styles = pictures([restyled(two, style) for style in STYLES], side)
    found = {"caption, shifted renderings": {"images": styles, "texts": [describe(two, rng)]}}
    found.update({f"question: {r['kind']}": r for r in questions(two, rng, side=side)})
    found.update({f"probe: {r['setting']}": r for r in probes(two, rng, side)[1::2]})
    found["swapped attributes"] = swapped_attributes(three, rng, side)
    found["swapped order"] = swapped_order(two, rng, "shuffled", side)
    found["noisy caption"] = noisy_caption(one, rng, 1.0, side=side)
    found["referring"] = referring(two, rng, side=side)
    found["glyphs"] = glyphs(rng)
    for kind in TEACHERS:
        found[f"instruction: {kind}"] = instruction(three, rng, kind, side)
    found["multiple choice"] = multiple_choice(three, rng, side)
    found["dialogue"] = dialogue(two, rng, side=side)
    found["two scenes"] = two_scenes(two, three, rng, side)
    found["document"] = document(rng, side=side)
    found["episode"] = episode(rng, side=side)
    for kind in CLIP_KINDS:
        found[f"clip: {kind}"] = clip(rng, kind=kind, side=side)
    return {name: record for name, record in found.items() if record}


def texts_of(record):
    """Every text that a record says or shows, question and answer in one line, without repeats."""
    spoken = [turn["text"] for turn in record.get("turns", ())]
    said = list(record.get("texts", ()))
    said += [" ".join(spoken[i:i + 2]) for i in range(0, len(spoken), 2)]
    said += [s["text"] for s in record.get("segments", ()) if "text" in s]
    said += [record[key] for key in ("context", "answer") if key in record]
    return list(dict.fromkeys(said + list(record.get("candidates", ()))))


def corpus(rounds=200):
    """Training texts of every sort of record, always the same, for the tokenizer and the LM.

    No test wording and no held-out pair is in it, and no disordered words. About 60 texts a round.
    """
    for index in range(rounds):
        for name, record in examples(random.Random(f"stories/{index}"), side=None).items():
            if name != "swapped order":
                yield from texts_of(record)


# ------------------------------------------------------------------ to look at

def card(name, record, width=320, tall=96):
    """A record as a picture of fixed width: its pictures in a row, its texts below."""
    said = [name.upper()] + [f"- {text}" for text in record.get("texts", ())]
    said += record.get("context", "").splitlines()
    said += [f"{turn['role']}: {line}" for turn in record.get("turns", ())
             for line in turn["text"].splitlines()]
    said += [s.get("text") or f"[picture {s['image']}]" for s in record.get("segments", ())]
    said += [f"{key}: {record[key]}" for key in ("candidates", "answer", "truth", "hardness")
             if key in record]
    lines = [line for text in said for line in textwrap.wrap(text, 52, subsequent_indent="    ")]
    tile = min(tall, (width - 8) // len(record["images"]) - 4)
    page = Image.new("RGB", (width, tile + 18 + 13 * len(lines)), "white")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(record["images"]):
        left = 6 + i * (tile + 4)
        page.paste(picture.resize((tile, tile)), (left, 6))
        pen.rectangle((left - 1, 5, left + tile, 6 + tile), outline="grey")
    for i, line in enumerate(lines):
        pen.text((6, tile + 10 + 13 * i), line, fill="black", font=ImageFont.load_default())
    pen.rectangle((0, 0, width - 1, page.height - 1), outline="lightgrey")
    return page


def gallery(rng=None, columns=4):
    """One example of every sort of record with its texts, as one picture for people to look at."""
    cards = [card(n, r) for n, r in examples(rng or random.Random(0), side=96).items()]
    tops, places = [0] * columns, []
    for one in cards:                     # each card goes to the column that is shortest so far
        column = tops.index(min(tops))
        places.append((column * one.width, tops[column]))
        tops[column] += one.height
    page = Image.new("RGB", (columns * cards[0].width, max(tops)), "white")
    for one, place in zip(cards, places):
        page.paste(one, place)
    return page


def sheet(path):
    """Write the gallery to an image file."""
    gallery().save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m common.data.shapes.stories PICTURE.png")
    try:
        sheet(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"cannot write {sys.argv[1]}: {error}")
