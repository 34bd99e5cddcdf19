"""Conversations on a scene: instructions by a language-only teacher, multiple choice, dialogues."""
import itertools

from common.data.shapes.questions import (COUNTS, FORMS, KINDS, YES_NO, decidable, pick, wording,
                                          yes_no)
from common.data.shapes.scene import (COLOURS, PAIRS, SHAPES, Item, Scene, dialogue_turns,
                                      turn)
from common.data.shapes.words import (MARGIN, PLURALS, a_thing, at, describe, listed, matching,
                                      nameable, number_of_objects, pairs_of, phrase, relations,
                                      statements, things, vague)

SURE = 0.05             # a box's centre is less than this away from its item's
FAR = MARGIN + SURE     # two centres further apart have a relation beyond doubt
WIDE = 0.376            # between the widest small item and the narrowest large one


def teacher_context(scene, rng):
    """What a language-only teacher gets instead of a picture (LLaVA section 3).

    {"captions": five of them, "boxes": [("red circle", (left, top, right, bottom)), ...]}, in
    fractions of the side with two decimals.
    """
    captions = []
    while len(captions) < 5:
        captions = list(dict.fromkeys(captions + [describe(scene, rng)]))
    return {"captions": captions, "boxes": [(i.name, tuple(round(v, 2) for v in i.box))
                                            for i in rng.sample(scene.items, len(scene.items))]}


def items_from_boxes(context):
    """The items that the boxes describe, but for their exact centres and tints."""
    return [Item(*name.split(), "large" if right - left > WIDE else "small",
                 (left + right) / 2, (top + bottom) / 2)
            for name, (left, top, right, bottom) in context["boxes"]]


def is_sure_of_place(item):
    """Whether the item's cell of the grid is beyond doubt."""
    return all(abs(v - border) > SURE for v in (item.x, item.y) for border in (1 / 3, 2 / 3))


def there_are(items, what=None):
    """"there is one object", "there are two objects", or `what` there is."""
    what = what or number_of_objects(len(items))
    return f"there {'is' if len(items) == 1 else 'are'} {what}"


def in_a_sentence(kind, option):
    """The answer to an option of `questions.decidable`, of existence or count, as a sentence."""
    _, answer, slots = option
    if kind == "existence":
        return f"there is {slots['x'] if answer == 'yes' else 'no ' + slots['x'].split(' ', 1)[1]}."
    *colour, plural = slots["x"].split()
    one = {many: shape for shape, many in PLURALS.items()}.get(plural, plural.removesuffix("s"))
    things = " ".join([answer.replace("zero", "no"), *colour, one if answer == "one" else plural])
    return f"there {'is' if answer == 'one' else 'are'} {things}."


def conversation(context, rng):
    """[(question, answer), ...], the first on all items; `is_true` can judge each answer.

    Existence and count are also asked in the words of `questions`, without its request for a word.
    """
    items = items_from_boxes(context)
    absent = rng.choice([p for p in PAIRS if p not in pairs_of(items)])
    pairs = [("can you tell me the number of objects?", f"{there_are(items)}."),
             (f"do you see {a_thing(' '.join(absent))}?", f"there is no {' '.join(absent)}.")]
    pairs += [(f"where is the {i.name}?", f"the {i.name} is {at(i)}.")
              for i in items if is_sure_of_place(i)]
    pairs += [(f"where is the {a.name}, compared to the {b.name}?",
               f"the {a.name} is {r} the {b.name}.")
              for a, b in itertools.permutations(items, 2) for r in relations(a, b, FAR)]
    for kind in ("existence", "count"):
        option = pick(decidable(Scene(tuple(items), ""), kind), rng)
        pairs.append((wording(option, rng, kind, "train"), in_a_sentence(kind, option)))
    first = ("what can you see in the picture?",
             f"{there_are(items, listed([phrase(i, size=True) for i in items]))}.")
    return [first, *rng.sample(pairs, min(3, len(pairs)))]


def detail(context, rng):
    """One question and a full description, in sentences that `is_true` can judge."""
    items = items_from_boxes(context)
    found = [s[1] for c in context["captions"] for s in statements(c) if s[0] == "background"]
    background = f" on a {found[0]} background" if found else ""
    sentences = [f"{there_are(items)}{background}."]
    sentences += [f"there is {phrase(i, size=True)}{' ' + at(i) if is_sure_of_place(i) else ''}."
                  for i in items]
    sentences += [f"the {a.name} is {r} the {b.name}."
                  for a, b in itertools.pairwise(items) for r in relations(a, b, FAR)]
    prompt = rng.choice(("describe the picture in detail.", "tell me all that the picture shows."))
    return [(prompt, " ".join(sentences))]


def reasoning(context, rng):
    """One question that takes two steps, and an answer that gives its reason."""
    items = items_from_boxes(context)
    gone, after = rng.choice(items).name, number_of_objects(len(items) - 1)
    pairs = [(f"if the {gone} were taken away, how many objects would be left?",
              f"{there_are(items)}. without the {gone}, {after} would be left.")]
    for one in items if len(items) > 1 else ():
        others = [i for i in items if i is not one]
        for relation, way in (("left of", "from left to right"), ("above", "from top to bottom")):
            if all(relation in relations(one, i, FAR) for i in others):
                pairs.append((f"which object comes first {way}, and why?", f"the {one.name} comes "
                              f"first, because it is {relation} all the others."))
        if one.size == "large" and all(i.size == "small" for i in others):
            pairs.append(("if all objects have the same true size, which one is nearest to you?",
                          f"the {one.name} is nearest, because it looks larger than all the "
                          "others."))
    return [rng.choice(pairs)]


TEACHERS = {"conversation": conversation, "detail": detail, "reasoning": reasoning}


def instruction(scene, rng, kind=None, side=32):
    """A picture and what a language-only teacher wrote on it (LLaVA-Instruct).

    "which object comes first from left to right, and why?" -> "the red circle comes first, because
    it is left of all the others." {"kind": one of TEACHERS, "context": the teacher's input, a
    caption or "red star: [0.1, 0.3, 0.35, 0.5]" a line}
    """
    kind = kind or rng.choice(tuple(TEACHERS))
    context = teacher_context(scene, rng)
    lines = context["captions"] + [f"{name}: {list(box)}" for name, box in context["boxes"]]
    return {"turns": dialogue_turns(TEACHERS[kind](context, rng), scene, side), "kind": kind,
            "context": "\n".join(lines), "source": scene}


def multiple_choice(scene, rng, side=32):
    """A question that needs both the picture and a text, in the form of ScienceQA.

    The text ("context") gives each shape a random worth; the question asks for the worth of the
    picture. The wrong "choices" are the worths of as many other shapes. "explanation": the sum.
    """
    present = {i.shape for i in scene.items}
    absent = [s for s in SHAPES if s not in present]
    shapes = sorted(present) + rng.sample(absent, max(0, 5 - len(present)))
    worth = dict(zip(rng.sample(shapes, len(shapes)), rng.sample(range(1, 10), len(shapes))))
    values = [worth[i.shape] for i in scene.items]
    sums = {sum(values)}
    while len(sums) < 4:
        sums.add(sum(worth[s] for s in rng.choices(shapes, k=len(values))))
    choices = [str(n) for n in rng.sample(sorted(sums), 4)]
    reason = listed([f"{phrase(i)} is worth {n}" for i, n in zip(scene.items, values)])
    if len(values) > 1:
        reason += f", and {' + '.join(map(str, values))} = {sum(values)}"
    listing = listed([f"{a_thing(shape)} is worth {n}" for shape, n in worth.items()])
    question = turn("how much is the picture worth?", str(sum(values)), (scene,), side)
    return {"turns": [question], "context": f"in this game {listing}.", "choices": choices,
            "explanation": f"{reason}.", "source": scene}


def dialogue(scene, rng, split="train", side=32):
    """A caption, four questions and answers, and six candidates for the last answer (VisDial).

    In half of the dialogues the second question has an "it": the object of the first one.
    """
    options = {kind: decidable(scene, kind) for kind in KINDS["train"]}
    alone = [i for i in scene.items if len(matching(scene, shape=i.shape)) == 1]
    absent = [s for s in SHAPES if not matching(scene, shape=s)]
    item = rng.choice(alone) if alone and (not absent or rng.random() < 0.5) else None
    thing, answer = a_thing(item.shape if item else rng.choice(absent)), yes_no(item)
    options["existence"].remove(("shape", answer, {"x": thing}))
    asked = [(f"is there {thing}?", answer, YES_NO)]
    if item:
        asked.append(("what colour is it?", item.colour, tuple(COLOURS)))
        options["colour"] = [o for o in options["colour"] if o[1] != item.colour]
    while len(asked) < 4:
        kind = rng.choice([k for k, left in options.items() if left])
        option = pick(options[kind], rng)
        # No question comes twice, in any wording, and no colour or shape is asked for twice.
        options[kind] = [o for o in options[kind] if o != option
                         and not (kind in ("colour", "shape") and o[1] == option[1])]
        asked.append((wording(option, rng, kind, split), option[1], FORMS[kind][option[0]][0]))
    *_, (_, answer, likely) = asked
    # Wrong candidates are other answers to such a question, and then any other answers.
    rest = [w for w in (*YES_NO, *COLOURS, *SHAPES, *COUNTS) if w not in likely]
    wrong = rng.sample([w for w in likely if w != answer], len(likely) - 1)
    wrong += rng.sample(rest, len(rest))
    return {"turns": dialogue_turns([pair[:2] for pair in asked], scene, side),
            "caption": vague(scene), "candidates": rng.sample([answer, *wrong[:5]], 6),
            "source": scene}


def statements_on_two(left, right):
    """Options (form, "true" or "false", statement) on two scenes, for `pick`."""
    facts = []
    for group, x, attributes in things(sorted({*nameable(left), *nameable(right)})):
        a, b = (len(matching(scene, **attributes)) for scene in (left, right))
        *colour, shape = x.split()[1:]
        many = " ".join([*colour, PLURALS[shape]])
        facts += [(f"left {group}", a > 0, f"the left picture shows {x}."),
                  (f"right {group}", b > 0, f"the right picture shows {x}."),
                  (f"both {group}", a > 0 and b > 0, f"both pictures show {x}."),
                  (f"one {group}", (a > 0) != (b > 0), f"only one of the pictures shows {x}."),
                  (f"neither {group}", a == b == 0, f"neither picture shows {x}."),
                  (f"two {group}", a + b == 2, f"the two pictures show two {many} in all."),
                  (f"three {group}", a + b == 3, f"the two pictures show three {many} in all.")]
    a, b = len(left.items), len(right.items)
    if a != b:
        more = "there are more objects in the {} picture than in the {} one."
        facts += [("more", a > b, more.format("left", "right")),
                  ("more", b > a, more.format("right", "left"))]
    return [(form, str(fact).lower(), text) for form, fact, text in facts]


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
