"""Questions on one scene, yes-no probes, and the accuracy of guessing blindly.

A record is {"turns": [{"images": [[picture]], "prompt": question, "answer": one word}], "kind",
"source": Scene}. Each record is a function of the scene and of rng, a random.Random; side=None
leaves the pictures out. No training question names a held-out pair.

    scene = sample(random.Random(0), objects=2)
    for record in questions(scene, random.Random(0)):
        print(record["turns"][0]["prompt"], record["turns"][0]["answer"])
"""
import itertools
from collections import Counter, defaultdict

from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, dialogue_turns, sample
from common.data.shapes.words import (NUMBERS, PLURALS, a_thing, matching, nameable, pairs_of,
                                      references, relations, things)

YES_NO = ("yes", "no")
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
UNSEEN_KIND = "size"
KINDS = {"train": tuple(k for k in FORMS if k != UNSEEN_KIND), "test": tuple(FORMS)}


def yes_no(fact):
    """The answer to a yes-no question."""
    return "yes" if fact else "no"


def count_groups(scene):
    """{"colours": {"red objects": 1, ...}, "shapes": {"circles": 0, ...}} of a scene."""
    return {"colours": {f"{c} objects": len(matching(scene, colour=c)) for c in COLOURS},
            "shapes": {PLURALS[s]: len(matching(scene, shape=s)) for s in SHAPES}}


def named_pairs(scene):
    """(a, name, b, name) of each two items, in both orders, that have a colour and shape alone."""
    named = [(i, f"{i.colour} {i.shape}") for i in scene.items
             if len(matching(scene, colour=i.colour, shape=i.shape)) == 1]
    return [(a, x, b, y) for (a, x), (b, y) in itertools.permutations(named, 2)]


def on_relations(scene):
    """Options for relation: yes or no, and either-or; only where the distance is clear."""
    options = []
    for a, x, b, y in named_pairs(scene):
        for form, one, other in (("beside", "left of", "right of"), ("above", "above", "below")):
            held = [r for r in relations(a, b) if r in (one, other)]
            for r in held and (one, other):
                options.append((f"is {form}", yes_no(r in held), {"x": x, "r": r, "y": y}))
            if held:
                slots = {"x": x, "a": one.split()[0], "b": other, "y": y}
                options.append((form, held[0].split()[0], slots))
    return options


def on_comparisons(scene):
    """Options for comparison: two items of different size, two different counts."""
    options = []
    for a, x, b, y in named_pairs(scene):
        for c in ("larger", "smaller") if a.size != b.size else ():
            answer = yes_no((a.size == "large") == (c == "larger"))
            options.append(("larger", answer, {"x": x, "c": c, "y": y}))
    for form, group in count_groups(scene).items():
        for (x, n), (y, m) in itertools.permutations(group.items(), 2):
            for c in ("more", "fewer") if n != m else ():
                answer = yes_no((n > m) == (c == "more"))
                options.append((form, answer, {"x": x, "c": c, "y": y}))
    return options


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
            for item in scene.items for x in references(scene, item, hide=(kind,))]


def pick(options, rng, form=None, answer=None):
    """One of the options (form, answer, slots): a form evenly, then an answer evenly, then any.

    Returns None when no option has the given form and answer.
    """
    options = [o for o in options if form in (None, o[0]) and answer in (None, o[1])]
    if not options:
        return None
    form = rng.choice(sorted({o[0] for o in options}))
    answer = rng.choice(sorted({o[1] for o in options if o[0] == form}))
    return rng.choice([o for o in options if o[:2] == (form, answer)])


def wording(option, rng, kind, split, scene):
    """The question of an option about a scene, in one of the split's wordings.

    Raises ValueError for a kind or a scene that the split must not ask about.
    """
    form, _, slots = option
    if kind not in KINDS[split]:
        raise ValueError(f"{kind!r} is not asked in split {split!r}, only {KINDS[split]}")
    if split == "train" and pairs_of(scene) & HELD_OUT:
        raise ValueError(f"a training question about held-out {pairs_of(scene) & HELD_OUT}")
    return rng.choice(FORMS[kind][form][1 if split == "train" else 2]).format(**slots)


# ------------------------------------------------------------------ records

def one_question(scene, question, answer, side, **more):
    """The record of one question on one scene."""
    return {"turns": dialogue_turns([(question, answer)], scene, side), "source": scene, **more}


def questions(scene, rng, split="train", side=32):
    """One record for each kind that the scene allows, with its "kind" and "form".

    Split "test" has other wordings than "train", and UNSEEN_KIND besides.
    """
    records = []
    for kind in KINDS[split]:
        option = pick(decidable(scene, kind), rng)
        if option:
            text = wording(option, rng, kind, split, scene)
            records.append(one_question(scene, text, option[1], side, kind=kind, form=option[0]))
    return records


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
            text = wording(option, rng, kind, split, scene)
            return one_question(scene, text, answer, side, kind=kind, form=form)
    raise ValueError(f"no scene of {objects} objects allows a {kind} ({form}) question: {answer}")


def blind_baseline(train, test):
    """The accuracy on `test` of the most frequent answer in `train`, without the pictures.

    The most frequent answer to the same question, else to the same form, else "no".
    """
    counts = defaultdict(Counter)
    for record in train:
        question, = record["turns"]
        for key in (question["prompt"], (record["kind"], record["form"])):
            counts[key][question["answer"]] += 1

    def right(record):
        question, = record["turns"]
        usual = counts.get(question["prompt"]) or counts.get((record["kind"], record["form"])) \
            or Counter(no=1)
        return max(sorted(usual), key=usual.get) == question["answer"]
    return sum(map(right, test)) / len(test)


# ------------------------------------------------------------------ probes for hallucination

SETTINGS = ("random", "popular", "adversarial")
POPULAR = ("cyan", "pink")                # the most frequent colours: no pair of theirs is held out


def absent(scene, rng, setting):
    """A (colour, shape) that the scene lacks, in one of the SETTINGS of POPE.

    random: any. popular: of the most frequent colours. adversarial: the scene has the colour and
    the shape, on different items, or else one of the two.
    """
    present = pairs_of(scene)
    lacking = [p for p in nameable(scene) if p not in present]
    if setting == "popular":
        lacking = [p for p in lacking if p[0] in POPULAR]
    if setting == "adversarial":
        colours, shapes = ({p[i] for p in present} for i in (0, 1))
        shared = {p: (p[0] in colours) + (p[1] in shapes) for p in lacking}
        lacking = [p for p in lacking if shared[p] == max(shared.values())]
    return rng.choice(lacking)


def probes(scene, rng, side=32):
    """Six yes-no questions after POPE: in each of the SETTINGS one yes and one no.

    probes(scene, rng)[1]["turns"] -> "is there a red square in the picture?", "no"
    """
    records = []
    for setting in SETTINGS:
        present = rng.choice(sorted(pairs_of(scene)))
        for pair, answer in ((present, "yes"), (absent(scene, rng, setting), "no")):
            text = f"is there {a_thing(*pair)} in the picture?"
            records.append(one_question(scene, text, answer, side, kind="probe", setting=setting))
    return records
