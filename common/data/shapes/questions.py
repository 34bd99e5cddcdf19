"""Questions on one scene, and yes-no probes for hallucination.

A record is {"turns": [{"images": [[picture]], "prompt": question, "answer": one word}], "kind",
"source": Scene}. It is a function of the scene and of rng, a random.Random. side=None leaves the
pictures out.
"""
import itertools

from common.data.shapes.scene import COLOURS, SHAPES, SIZES, sample, turn
from common.data.shapes.words import (NUMBERS, PLURALS, a_thing, matching, nameable, pairs_of,
                                      references, relations, things)

YES_NO = ("yes", "no")
SETTINGS = ("random", "popular", "adversarial")      # of a probe (POPE)
COUNTS = ("zero",) + NUMBERS[1:]

# kind -> form -> (answers, training wordings, test wordings). A form is drawn first and then one of
# its answers, evenly, so the words of a question do not give its answer away.
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
    # Tests alone ask for sizes: captions give the answers, no training question asks for them.
    "size": {"size": (tuple(SIZES), (), ("is the {x} small or large?", "what size is the {x}?"))},
}
KINDS = {"train": tuple(FORMS)[:-1], "test": tuple(FORMS)}


def yes_no(fact):
    """The answer to a yes-no question."""
    return "yes" if fact else "no"


def count_groups(scene):
    """{"colours": {"red objects": 1, ...}, "shapes": {"circles": 0, ...}} of a scene."""
    return {"colours": {f"{c} objects": len(matching(scene, colour=c)) for c in COLOURS},
            "shapes": {PLURALS[s]: len(matching(scene, shape=s)) for s in SHAPES}}


def on_relations(scene):
    """Options for relation: yes or no, and either-or; only where the distance is clear."""
    options = []
    for a, b in itertools.permutations(scene.items, 2):
        for held in relations(a, b):
            form, *both = ("above", "above", "below") if held in ("above", "below") else \
                ("beside", "left of", "right of")
            slots = {"x": a.name, "y": b.name, "a": both[0].split()[0], "b": both[1]}
            options += [(f"is {form}", yes_no(r == held), {**slots, "r": r}) for r in both]
            options.append((form, held.split()[0], slots))
    return options


def on_comparisons(scene):
    """Options for comparison: two items of different size, two different counts."""
    options = [("larger", yes_no((a.size == "large") == (c == "larger")),
                {"x": a.name, "c": c, "y": b.name})
               for a, b in itertools.permutations(scene.items, 2) if a.size != b.size
               for c in ("larger", "smaller")]
    return options + [(form, yes_no((n > m) == (c == "more")), {"x": x, "c": c, "y": y})
                      for form, group in count_groups(scene).items()
                      for (x, n), (y, m) in itertools.permutations(group.items(), 2) if n != m
                      for c in ("more", "fewer")]


def decidable(scene, kind):
    """Every question of a kind that the scene decides: a list of options (form, answer, slots)."""
    if kind == "count":
        return [(form, COUNTS[n], {"x": x}) for form, group in count_groups(scene).items()
                for x, n in group.items()]
    if kind == "existence":
        return [(form, yes_no(matching(scene, **attributes)), {"x": x})
                for form, x, attributes in things(nameable(scene))]
    if kind in ("relation", "comparison"):
        return on_relations(scene) if kind == "relation" else on_comparisons(scene)
    return [(kind, getattr(item, kind), {"x": x})                # colour, shape, size
            for item in scene.items for x in references(scene, item, hide=kind)]


def pick(options, rng, form=None, answer=None):
    """One option (form, answer, slots), or None: a form evenly, then an answer evenly, then any."""
    options = [o for o in options if form in (None, o[0]) and answer in (None, o[1])]
    if not options:
        return None
    form = rng.choice(sorted({o[0] for o in options}))
    answer = rng.choice(sorted({o[1] for o in options if o[0] == form}))
    return rng.choice([o for o in options if o[:2] == (form, answer)])


def wording(option, rng, kind, split):
    """The question of an option in one of the split's wordings."""
    form, _, slots = option
    return rng.choice(FORMS[kind][form][1 if split == "train" else 2]).format(**slots)


def one_question(scene, kind, option, rng, split, side):
    """The record of one question of a kind on one scene."""
    question = turn(wording(option, rng, kind, split), option[1], (scene,), side)
    return {"turns": [question], "kind": kind, "form": option[0], "source": scene}


def questions(scene, rng, split="train", side=32):
    """One record for each kind that the scene allows, with its "kind" and "form".

    Split "test" has other wordings than "train", and asks for sizes besides.
    """
    drawn = ((kind, pick(decidable(scene, kind), rng)) for kind in KINDS[split])
    return [one_question(scene, kind, option, rng, split, side) for kind, option in drawn if option]


def balanced_question(rng, kind, split="train", side=32, objects=(1, 2), **dial):
    """A question of a kind: its form and its answer are drawn evenly, then a scene that fits them.

    So all answers are equally frequent, which the scenes of `questions` do not allow for counts.
    objects, dial: arguments of `sample`. Raises ValueError when no such scene allows the question.
    """
    form = rng.choice(tuple(FORMS[kind]))
    answers = FORMS[kind][form][0]
    if kind == "count":                   # four of one colour are too rare to wait for
        answers = answers[:min(3, objects if isinstance(objects, int) else objects[1]) + 1]
    answer = rng.choice(answers)
    for _ in range(5000):
        scene = sample(rng, objects, **dial)
        option = pick(decidable(scene, kind), rng, form, answer)
        if option:
            return one_question(scene, kind, option, rng, split, side)
    raise ValueError(f"no scene of {objects} objects allows a {kind} ({form}) question: {answer}")


def absent(scene, rng, setting):
    """A (colour, shape) that the scene lacks, in one of POPE's settings.

    random: any. popular: of the most frequent colours, cyan and pink, of which no pair is held out.
    adversarial: the scene has the colour and the shape, on different items, or else one of the two.
    """
    present = pairs_of(scene.items)
    colours, shapes = map(set, zip(*present))
    score = {"random": lambda p: 0, "popular": lambda p: p[0] in ("cyan", "pink"),
             "adversarial": lambda p: (p[0] in colours) + (p[1] in shapes)}[setting]
    lacking = [p for p in nameable(scene) if p not in present]
    return rng.choice([p for p in lacking if score(p) == max(map(score, lacking))])


def probes(scene, rng, side=32):
    """Six yes-no questions after POPE: in each of its settings one yes and one no.

    probes(scene, rng)[1]["turns"] -> "is there a red square in the picture?", "no"
    """
    records = []
    for setting in SETTINGS:
        present = rng.choice(sorted(pairs_of(scene.items)))
        for pair, answer in ((present, "yes"), (absent(scene, rng, setting), "no")):
            question = f"is there {a_thing(' '.join(pair))} in the picture?"
            records.append({"turns": [turn(question, answer, (scene,), side)], "kind": "probe",
                            "setting": setting, "source": scene})
    return records
