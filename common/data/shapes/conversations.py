"""Conversations on a scene: instructions by a language-only teacher, multiple choice, dialogues.

    record = instruction(sample(random.Random(0), objects=2), random.Random(0), "conversation")
    for turn in record["turns"]:
        print(turn["prompt"], turn["answer"])
"""
import itertools
from functools import partial

from common.data.shapes.questions import COUNTS, FORMS, KINDS, YES_NO, decidable, pick, wording
from common.data.shapes.scene import COLOURS, PAIRS, SHAPES, SIZES, Item, dialogue_turns, turn
from common.data.shapes.words import (MARGIN, PLURALS, a_thing, at, describe, listed, matching,
                                      nameable, number_of_objects, phrase, relations,
                                      statements, things, vague)

SURE = 0.05                               # a box's centre is less than this away from its item's
sure_relations = partial(relations, margin=MARGIN + SURE)       # those beyond doubt
# Between the widest small item, a star, and the narrowest large one, a square.
WIDE = (2.1 * SIZES["small"] + 1.6 * SIZES["large"]) / 2


def teacher_context(scene, rng):
    """What a language-only teacher gets instead of a picture (LLaVA section 3).

    {"captions": five of them, "boxes": [("red circle", (left, top, right, bottom)), ...]}, in
    fractions of the side with two decimals.
    """
    captions = []
    while len(captions) < 5:
        captions = list(dict.fromkeys(captions + [describe(scene, rng)]))
    items = rng.sample(scene.items, len(scene.items))
    return {"captions": captions,
            "boxes": [(f"{i.colour} {i.shape}", tuple(round(v, 2) for v in i.box)) for i in items]}


def items_from_boxes(context):
    """The items that the boxes describe, but for their exact centres and tints."""
    items = []
    for name, (left, top, right, bottom) in context["boxes"]:
        size = "large" if right - left > WIDE else "small"
        items.append(Item(*name.split(), size, (left + right) / 2, (top + bottom) / 2))
    return items


def is_sure_of_place(item):
    """Whether the item's cell of the grid is beyond doubt."""
    return all(abs(v - border) > SURE for v in (item.x, item.y) for border in (1 / 3, 2 / 3))


def there_are(items):
    """"there is" for one item, else "there are"."""
    return "there is" if len(items) == 1 else "there are"


def conversation(context, rng, rounds=4):
    """[(question, answer), ...], the first on all items; `is_true` can judge each answer."""
    items = items_from_boxes(context)
    present = {(i.colour, i.shape) for i in items}
    absent = rng.choice([p for p in PAIRS if p not in present])
    pairs = [("can you tell me the number of objects?",
              f"{there_are(items)} {number_of_objects(len(items))}."),
             (f"do you see {a_thing(*absent)}?", f"there is no {' '.join(absent)}.")]
    pairs += [(f"where is {phrase(i, article='the')}?", f"{phrase(i, article='the')} is {at(i)}.")
              for i in items if is_sure_of_place(i)]
    for a, b in itertools.permutations(items, 2):
        one, other = phrase(a, article="the"), phrase(b, article="the")
        pairs += [(f"where is {one}, compared to {other}?", f"{one} is {r} {other}.")
                  for r in sure_relations(a, b)]
    first = ("what can you see in the picture?",
             f"{there_are(items)} {listed([phrase(i, size=True) for i in items])}.")
    return [first, *rng.sample(pairs, min(rounds - 1, len(pairs)))]


def detail(context, rng):
    """One question and a full description, in sentences that `is_true` can judge."""
    items = items_from_boxes(context)
    found = [s[1] for c in context["captions"] for s in statements(c) if s[0] == "background"]
    background = f" on a {found[0]} background" if found else ""
    sentences = [f"{there_are(items)} {number_of_objects(len(items))}{background}."]
    sentences += [f"there is {phrase(i, size=True)}{' ' + at(i) if is_sure_of_place(i) else ''}."
                  for i in items]
    for a, b in itertools.pairwise(items):
        sentences += [f"{phrase(a, article='the')} is {r} {phrase(b, article='the')}."
                      for r in sure_relations(a, b)]
    prompt = rng.choice(("describe the picture in detail.", "tell me all that the picture shows."))
    return [(prompt, " ".join(sentences))]


def reasoning(context, rng):
    """One question that takes two steps, and an answer that gives its reason."""
    items = items_from_boxes(context)
    before, after = number_of_objects(len(items)), number_of_objects(len(items) - 1)
    gone = phrase(rng.choice(items), article="the")
    pairs = [(f"if {gone} were taken away, how many objects would be left?",
              f"{there_are(items)} {before}. without {gone}, {after} would be left.")]
    for one in items if len(items) > 1 else ():
        name, others = phrase(one, article="the"), [i for i in items if i is not one]
        for relation, way in (("left of", "from left to right"), ("above", "from top to bottom")):
            if all(relation in sure_relations(one, i) for i in others):
                pairs.append((f"which object comes first {way}, and why?",
                              f"{name} comes first, because it is {relation} all the others."))
        if one.size == "large" and all(i.size == "small" for i in others):
            pairs.append(("if all objects have the same true size, which one is nearest to you?",
                          f"{name} is nearest, because it looks larger than all the others."))
    return [rng.choice(pairs)]


TEACHERS = {"conversation": conversation, "detail": detail, "reasoning": reasoning}


def instruction(scene, rng, kind=None, side=32):
    """A picture and what a language-only teacher wrote on it (LLaVA-Instruct).

    {"turns", "context": the teacher's input, a caption or "red star: [0.1, 0.3, 0.35, 0.5]" a line,
    "kind": one of TEACHERS}

    instruction(scene, rng, "reasoning")["turns"] -> "which object comes first from left to right,
    and why?", "the red circle comes first, because it is left of all the others."
    """
    kind = kind or rng.choice(tuple(TEACHERS))
    context = teacher_context(scene, rng)
    lines = context["captions"] + [f"{name}: {list(box)}" for name, box in context["boxes"]]
    return {"turns": dialogue_turns(TEACHERS[kind](context, rng), scene, side), "kind": kind,
            "context": "\n".join(lines), "source": scene}


def multiple_choice(scene, rng, side=32):
    """A question that needs both the picture and a text, in the form of ScienceQA.

    The text gives each shape a random worth; the question asks for the worth of the picture. The
    other choices are the worths of as many other shapes of the text.

    {"turns": [question and right choice], "context", "question", "choices": ["7", "12", "9", "10"],
    "explanation"}
    """
    present = {i.shape for i in scene.items}
    absent = [s for s in SHAPES if s not in present]
    shapes = sorted(present) + rng.sample(absent, max(0, 5 - len(present)))
    worth = dict(zip(rng.sample(shapes, len(shapes)), rng.sample(range(1, 10), len(shapes))))
    total = sum(worth[i.shape] for i in scene.items)
    sums = {total}
    while len(sums) < 4:
        sums.add(sum(worth[s] for s in rng.choices(shapes, k=len(scene.items))))
    choices = [str(n) for n in rng.sample(sorted(sums), 4)]
    reason = listed([f"{phrase(i)} is worth {worth[i.shape]}" for i in scene.items])
    if len(scene.items) > 1:
        reason += f", and {' + '.join(str(worth[i.shape]) for i in scene.items)} = {total}"
    question = "how much is the picture worth?"
    listing = listed([f"{a_thing(shape)} is worth {n}" for shape, n in worth.items()])
    return {"turns": [turn(question, str(total), (scene,), side)], "question": question,
            "context": f"in this game {listing}.", "choices": choices,
            "explanation": f"{reason}.", "source": scene}


# ------------------------------------------------------------------ dialogues, two pictures

def dialogue(scene, rng, rounds=4, choices=6, split="train", side=32):
    """A caption, questions and answers, and for the last question candidates (VisDial).

    In half of the dialogues the second question has an "it": the object of the first one.
    {"turns": `rounds` of them, "caption", "candidates": `choices` answers of one word}
    """
    options = {kind: decidable(scene, kind) for kind in KINDS["train"]}
    alone = [i for i in scene.items if len(matching(scene, shape=i.shape)) == 1]
    absent = [s for s in SHAPES if not matching(scene, shape=s)]
    item = rng.choice(alone) if alone and (not absent or rng.random() < 0.5) else None
    shape, answer = (item.shape, "yes") if item else (rng.choice(absent), "no")
    first = ("shape", answer, {"x": a_thing(shape)})
    options["existence"].remove(first)
    asked = [(f"is there {first[2]['x']}?", answer, YES_NO)]
    if item:
        asked.append(("what colour is it?", item.colour, tuple(COLOURS)))
        options["colour"] = [o for o in options["colour"] if o[1] != item.colour]
    while len(asked) < rounds:
        kind = rng.choice([k for k, left in options.items() if left])
        option = pick(options[kind], rng)
        # No question comes twice, in any wording, and no colour or shape is asked for twice.
        options[kind] = [o for o in options[kind] if o != option
                         and not (kind in ("colour", "shape") and o[1] == option[1])]
        text = wording(option, rng, kind, split, scene)
        asked.append((text, option[1], FORMS[kind][option[0]][0]))
    *_, (_, answer, likely) = asked = asked[:rounds]
    # Wrong candidates are other answers to such a question, and then any other answers.
    rest = [w for w in (*YES_NO, *COLOURS, *SHAPES, *COUNTS) if w not in likely]
    wrong = [w for w in likely if w != answer]
    wrong = rng.sample(wrong, len(wrong)) + rng.sample(rest, len(rest))
    candidates = rng.sample([answer] + wrong[:choices - 1], choices)
    return {"turns": dialogue_turns([pair[:2] for pair in asked], scene, side),
            "caption": vague(scene), "candidates": candidates, "source": scene}


def statements_on_two(left, right):
    """Options (form, "true" or "false", statement) on two scenes, for `pick`."""
    options = []
    for group, x, attributes in things(sorted({*nameable(left), *nameable(right)})):
        a, b = (len(matching(scene, **attributes)) for scene in (left, right))
        *colour, shape = x.split()[1:]
        many = " ".join([*colour, PLURALS[shape]])
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
    """One turn of two pictures: a statement as its prompt, "true" or "false" as its answer (NLVR2).

    Half of the statements are true. Each "form" has true and false statements on these scenes, so
    the words do not give the answer away.
    """
    options = statements_on_two(left, right)
    true, false = ({form for form, answer, _ in options if answer == a} for a in ("true", "false"))
    form, answer, text = pick([o for o in options if o[0] in true & false], rng)
    return {"turns": [turn(text, answer, (left, right), side)], "form": form,
            "source": (left, right)}
