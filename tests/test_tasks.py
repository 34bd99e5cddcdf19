"""Every record of the shapes world is right: its answers are worked out again, from the objects.

`resolve` below reads a question by its words alone and looks the answer up in the scene; it shares
nothing with tasks.py but the vocabulary, and fails when a question has no answer or several.
"""
import inspect
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from common.data.shapes import scene as scenes
from common.data.shapes import stories, questions as tasks
from common.data.shapes.scene import (BACKGROUNDS, COLOURS, HELD_OUT, PAIRS, SHAPES, SIZES, Item,
                                      Scene, draw, sample)
from common.data.shapes.words import NUMBERS, is_true

KINDS = ("colour", "shape", "count", "relation", "existence", "comparison", "size")
NOUNS = {**{s: s for s in SHAPES}, **{s + "s": s for s in SHAPES}, "crosses": "cross",
         "object": None, "objects": None}
TWO = Scene((Item("red", "circle", "large", 0.3, 0.3), Item("blue", "square", "small", 0.75, 0.7)))
ODD = Scene((Item("red", "star", "large", 0.5, 0.5),))         # a held-out pair


def many(n, objects=(1, 3), **dial):
    """n pairs of a scene and an rng."""
    for i in range(n):
        rng = random.Random(f"tasks/{i}")
        yield sample(rng, objects, **dial), rng


def thirds(item):
    """The words for the place of an object: {"top", "left"}, {"bottom"}, {"centre"}."""
    words = {"left"} if item.x < 1 / 3 else {"right"} if item.x > 2 / 3 else set()
    words |= {"top"} if item.y < 1 / 3 else {"bottom"} if item.y > 2 / 3 else set()
    return words or {"centre"}


def fitting(said, scene):
    """The objects that fit words such as "the small red circle", "objects at the top left"."""
    said, _, place = re.sub(r"^(an?|the) ", "", said).partition(" the ")
    *adjectives, noun = re.sub(r" (at|in)$", "", said).split()
    assert noun in NOUNS and set(adjectives) <= set(COLOURS) | set(SIZES), said
    return [i for i in scene.items if NOUNS[noun] in (None, i.shape)
            and set(adjectives) <= {i.colour, i.size} and set(place.split()) <= thirds(i)]


def one(said, scene):
    """The only object that fits."""
    found = fitting(said, scene)
    assert len(found) == 1, f"{said!r} fits {len(found)} objects"
    return found[0]


def beside(a, relation, b):
    """Whether the relation holds; the distance must be clear."""
    far = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    distance = far[relation.split()[0]]
    assert abs(distance) > 0.12, "too near to tell"
    return distance > 0


def larger(a, b):
    assert a.size != b.size, "equal sizes"
    return a.size == "large"


def more(n, m):
    assert n != m, "equal numbers"
    return n > m


def yes(fact):
    return "yes" if fact else "no"


ASK = (r"(?:is it true that|does the picture show|can you see|is|are there|does|is there)"
       r"(?: there is| there are)?")
READERS = [                               # the more special first
    (r"(?:what|which) (colour|shape) (?:is|does) the (.+?)(?: have)?\?",
     lambda s, what, x: getattr(one(x, s), what)),
    (r"what is the (colour|shape) of the (.+)\?", lambda s, what, x: getattr(one(x, s), what)),
    (r"of which (colour|shape) is the (.+)\?", lambda s, what, x: getattr(one(x, s), what)),
    (r"what size is the (.+)\?", lambda s, x: one(x, s).size),
    (r"is the (.+) small or large\?", lambda s, x: one(x, s).size),
    (r"(?:can you see )?how many (.+?) (?:are there|there are|does the picture show)\?",
     lambda s, x: ("zero", *NUMBERS[1:])[len(fitting(x, s))]),
    (r"what is the number of (.+)\?", lambda s, x: ("zero", *NUMBERS[1:])[len(fitting(x, s))]),
    (r"(?:is|where is|what is true of) (the .+?)(?:,(?: is it)?)? (left or right of|above or below)"
     r" (the .+)\?",
     lambda s, x, r, y: r.split()[0] if beside(one(x, s), r, one(y, s)) else r.split()[2]),
    (ASK + r" (the .+?) (?:is |look )?(larger|smaller) than (the .+)\?", lambda s, x, c, y: yes(
        larger(one(x, s), one(y, s)) == (c == "larger"))),
    (ASK + r" (more|fewer) (.+) than (.+)\?", lambda s, c, x, y: yes(
        more(len(fitting(x, s)), len(fitting(y, s))) == (c == "more"))),
    (ASK + r" (the .+?) (?:is )?(left of|right of|above|below) (the .+)\?",
     lambda s, x, r, y: yes(beside(one(x, s), r, one(y, s)))),
    (ASK + r" (an? .+?)(?: in the picture)?\?", lambda s, x: yes(fitting(x, s)))]


def resolve(question, scene):
    """The answer to a question, from the objects of the scene."""
    for pattern, answer in READERS:
        found = re.fullmatch(pattern, question)
        if found:
            return answer(scene, *found.groups())
    raise AssertionError(f"not a question of the world: {question!r}")


def said(record):
    """The question and the answer of a record of two turns."""
    assert [t["role"] for t in record["turns"]] == ["user", "assistant"]
    return [t["text"] for t in record["turns"]]


def held_out(text):
    """The held-out pairs that a text names, in singular or plural."""
    words = [NOUNS.get(w) or w for w in re.findall(r"\w+", text)]
    return HELD_OUT & set(zip(words, words[1:]))


def guesser(pairs):
    """A naive Bayes guesser of answers from the words of a text: what the words alone give away."""
    words, seen = defaultdict(Counter), Counter()
    for text, answer in pairs:
        seen[answer] += 1
        words[answer].update(set(text.split()))

    def guess(text):
        return max(sorted(seen), key=lambda a: math.log(seen[a]) + sum(
            math.log((words[a][w] + 0.5) / (seen[a] + 1)) for w in set(text.split())))
    return guess


def blind(pairs):
    """The accuracy of a guesser that learns from half of (text, answer) and is asked the rest."""
    half = len(pairs) // 2
    guess = guesser(pairs[:half])
    return sum(guess(text) == answer for text, answer in pairs[half:]) / (len(pairs) - half)


# ---------------------------------------------------------------- questions

@pytest.mark.parametrize("split", ("train", "test"))
def test_answers_are_right_and_unique(split):
    kinds = Counter()
    for distinct in (True, False):
        for scene, rng in many(500, (1, 5), distinct=distinct):
            for record in tasks.questions(scene, rng, split, side=None):
                question, answer = said(record)
                assert resolve(question, scene) == answer == record["answer"], (question, scene)
                assert len(answer.split()) == 1 and record["source"] == scene
                assert not held_out(question), question
                kinds[record["kind"]] += 1
    assert set(kinds) == set(KINDS if split == "test" else KINDS[:-1])
    assert min(kinds.values()) > 300, kinds


def test_the_resolver_tells_wrong_answers():
    """The judge of these tests is itself judged, on a scene worked out by hand."""
    for question, answer in (
            ("what colour is the circle?", "red"), ("what shape is the small object?", "square"),
            ("which shape does the object at the top left have?", "circle"),
            ("how many circles are there?", "one"), ("how many green objects are there?", "zero"),
            ("is the red circle left of the blue square?", "yes"),
            ("is the red circle below the blue square?", "no"),
            ("is the blue square above or below the red circle?", "below"),
            ("is there a blue circle?", "no"), ("is there a blue object?", "yes"),
            ("is the blue square larger than the red circle?", "no"),
            ("are there fewer stars than squares?", "yes"), ("what size is the circle?", "large")):
        assert resolve(question, TWO) == answer
    for bad in ("what colour is the object?", "what colour is the star?", "how are you?",
                "are there more circles than squares?"):
        with pytest.raises(AssertionError):
            resolve(bad, TWO)


def test_test_wordings_and_one_kind_are_disjoint_from_training():
    assert tasks.UNSEEN_KIND == "size" and set(tasks.FORMS) == set(KINDS)
    train, test = ({w for forms in tasks.FORMS.values() for form in forms.values()
                    for w in form[n]} for n in (1, 2))
    assert not train & test
    heard = {split: Counter() for split in ("train", "test")}
    for scene, rng in many(400, (1, 3)):
        for split in heard:
            heard[split].update(said(r)[0] for r in tasks.questions(scene, rng, split, side=None))
    assert not set(heard["train"]) & set(heard["test"])
    assert not any(re.search("what size|small or large", q) for q in heard["train"])
    for kind, forms in tasks.FORMS.items():
        for _, *wordings in forms.values():
            for split, group in zip(heard, wordings):
                for wording in group:
                    pattern = re.sub(r"\\{\w\\}", ".+", re.escape(wording))
                    assert any(re.fullmatch(pattern, q) for q in heard[split]), wording
    with pytest.raises(ValueError, match="size.*train"):
        tasks.question(random.Random(0), "size", "train")


def test_training_never_asks_about_held_out_pairs():
    for ask in (lambda: tasks.questions(ODD, random.Random(0), "train"),
                lambda: tasks.question(random.Random(0), "existence", pairs=sorted(HELD_OUT)),
                lambda: stories.dialogue(ODD, random.Random(0))):
        with pytest.raises(ValueError, match="held-out"):
            ask()
    for seed in range(40):                # they are for the test of composition
        for record in tasks.questions(ODD, random.Random(seed), "test", side=None):
            assert resolve(said(record)[0], ODD) == record["answer"]
    assert tasks.names_held_out("two red stars") and tasks.names_held_out("A red star.")
    assert not tasks.names_held_out("a red circle and a blue star")


def test_in_composition_a_held_out_name_is_no_sign_of_yes():
    answers = Counter()
    for seed in range(1500):
        for record in tasks.questions(ODD, random.Random(seed), "test", side=None):
            if record["form"] == "pair" and held_out(said(record)[0]):
                answers[record["answer"]] += 1
    assert answers["no"] > 15, answers


@pytest.mark.parametrize("split", ("train", "test"))
def test_blind_guessing_is_near_chance(split):
    """Of questions drawn for balance: by their exact words and by any of their words."""
    chance = {"colour": 1 / 7, "shape": 1 / 5, "count": 1 / 3}
    for kind in tasks.KINDS[split]:
        rng = random.Random(kind)
        found = [tasks.question(rng, kind, split, side=None) for _ in range(900)]
        assert all(resolve(*said(r)[:1], r["source"]) == r["answer"] for r in found)
        assert {r["kind"] for r in found} == {kind}
        limit = chance.get(kind, 1 / 2) + 0.08
        assert tasks.blind_baseline(found[:450], found[450:]) < limit, kind
        if kind != "relation":            # left, right, above, below are told apart by the form
            assert blind([said(r) for r in found]) < limit, kind
        for form, (answers, *_) in tasks.FORMS[kind].items():
            counts = Counter(r["answer"] for r in found if r["form"] == form)
            assert set(counts) <= set(answers)
            assert max(counts.values()) < 1.5 * sum(counts.values()) / len(counts), counts
            assert len(counts) == (3 if kind == "count" else len(answers))


def test_blind_baseline_finds_a_bias():
    def asked(text, answer):
        return {"turns": tasks.turns(text, answer), "answer": answer, "kind": "k", "form": "f"}
    seen = [asked("a?", "yes")] * 3 + [asked("a?", "no")] + [asked("b?", "no")] * 5
    assert tasks.blind_baseline(seen, [asked("a?", "yes"), asked("b?", "no")]) == 1
    assert tasks.blind_baseline(seen, [asked("a?", "no"), asked("c?", "no")]) == 0.5
    assert tasks.blind_baseline([], [asked("a?", "no"), asked("a?", "yes")]) == 0.5


def test_yes_and_no_are_even_in_any_scenes():
    for objects in (1, 2, 3):
        answers = defaultdict(Counter)
        for scene, rng in many(300, objects):
            for record in tasks.questions(scene, rng, side=None):
                if record["answer"] in ("yes", "no"):
                    answers[record["form"]][record["answer"]] += 1
        for form, counts in answers.items():
            total = sum(counts.values())
            assert abs(counts["yes"] / total - 0.5) < 2 / math.sqrt(total), (objects, form)


def test_counts_of_larger_scenes():
    rng = random.Random(0)
    counts = Counter(tasks.question(rng, "count", side=None, objects=3)["answer"]
                     for _ in range(200))
    assert set(counts) == {"zero", "one", "two", "three"} and min(counts.values()) > 30
    with pytest.raises(ValueError, match="1 objects"):
        tasks.question(random.Random(0), "relation", objects=1)


def test_references_fit_one_object():
    for scene, _ in many(400, (1, 5), distinct=False):
        for item in scene.items:
            for hide in ((), ("colour",), ("shape", "size")):
                for x in tasks.references(scene, item, hide):
                    assert one(x, scene) == item
                    assert not {getattr(item, a) for a in hide} & set(x.split())
    assert tasks.references(TWO, TWO.items[0], ("colour",)) == [
        "large object", "circle", "large circle", "object at the top left"]
    assert "object" in tasks.references(ODD, ODD.items[0])
    near = Scene((TWO.items[0], replace(TWO.items[1], x=0.5, y=0.1)))       # "top" fits both
    assert "object at the top" not in tasks.references(near, near.items[1])


# ---------------------------------------------------------------- probes and false captions

def test_probes():
    hard = Counter()
    for scene, rng in many(400, (1, 4)):
        there = {(i.colour, i.shape) for i in scene.items}
        colours, shapes = ({p[i] for p in there} for i in (0, 1))
        records = tasks.probes(scene, rng, side=None)
        assert [r["answer"] for r in records] == ["yes", "no"] * 3
        assert [r["setting"] for r in records[::2]] == ["random", "popular", "adversarial"]
        for record in records:
            question, answer = said(record)
            assert resolve(question, scene) == answer and not held_out(question)
            pair = re.fullmatch(r"is there an? (\w+) (\w+) in the picture\?", question).groups()
            if answer == "no" and record["setting"] == "popular":
                assert pair[0] in ("cyan", "pink")
            if answer == "no" and record["setting"] == "adversarial":
                both = [(c, s) for c in colours for s in shapes if (c, s) not in there | HELD_OUT]
                assert pair in both or (not both and (pair[0] in colours or pair[1] in shapes))
                hard[bool(both)] += 1
    assert min(hard[True], hard[False]) > 50
    assert all((c, s) in PAIRS for c in ("cyan", "pink") for s in SHAPES)
    with pytest.raises(ValueError, match="easy"):
        tasks.absent(TWO, random.Random(0), "easy")


def test_swapped_attributes_are_false():
    kinds = Counter()
    for scene, rng in many(600, (2, 4)):
        record = tasks.swapped_attributes(scene, rng, side=None)
        if record is None:
            continue
        true, false = record["texts"]
        assert is_true(true, scene) and not is_true(false, scene)
        assert not held_out(false), false
        assert scenes.statements(false)       # a sentence of the world, not gibberish
        bare = [sorted(re.sub(r"\b(an?|at|in) ", "", text).split()) for text in (true, false)]
        assert bare[0] == bare[1] and true != false
        kinds[record["kind"]] += 1
    assert set(kinds) == {"colour", "size", "place"} and min(kinds.values()) > 100
    assert tasks.swapped_attributes(ODD, random.Random(0)) is None
    swapped = {tuple(tasks.swapped_attributes(TWO, random.Random(n), side=None)["texts"])
               for n in range(40)}
    assert ("a red circle and a blue square", "a blue circle and a red square") in swapped
    # exchanging colours would name a red star here
    awkward = Scene((replace(TWO.items[0], x=0.4, y=0.5, size="small"),
                     replace(TWO.items[1], shape="star", x=0.6, y=0.5)))
    assert tasks.swapped_attributes(awkward, random.Random(0)) is None


def test_swapped_order_is_false():
    kinds = Counter()
    for scene, rng in many(600, (1, 3)):
        for kind in ("reversed", "shuffled", None):
            record = tasks.swapped_order(scene, rng, kind, side=None)
            if record is None:
                assert kind == "reversed"
                continue
            true, false = record["texts"]
            assert is_true(true, scene) and not is_true(false, scene) and not held_out(false)
            bare = [sorted({"an": "a"}.get(w, w) for w in t.split()) for t in (true, false)]
            assert bare[0] == bare[1]
            if record["kind"] == "reversed":
                relation = r"left of|right of|above|below"
                assert re.split(f" ({relation}) ", true) == re.split(f" ({relation}) ", false)[::-1]
            kinds[record["kind"], kind] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 100


def test_noisy_captions():
    for rate in (0.0, 0.3, 1.0):
        noisy = 0
        for scene, rng in many(500, (1, 3)):
            record = tasks.noisy_caption(scene, rng, rate, side=None)
            caption, = record["texts"]
            assert is_true(caption, scene) is record["truth"]
            assert is_true(caption, record["told"]) and not held_out(caption)
            assert (record["hardness"] is None) is record["truth"]
            noisy += not record["truth"]
        assert abs(noisy / 500 - rate) < 0.07


def test_hardnesses_of_noise():
    for hardness in tasks.HARDNESSES:
        changed = Counter()
        for scene, rng in many(300, (1, 3)):
            record = tasks.noisy_caption(scene, rng, 1.0, hardness, side=None)
            here, there = ([(i.colour, i.shape) for i in s.items] for s in (scene, record["told"]))
            assert record["hardness"] == hardness and not set(there) & HELD_OUT
            shared = [set(a) & set(b) for a, b in zip(zip(*here), zip(*there))]
            if hardness == "shares":
                assert len(shared[0]) + len(shared[1]) == 1
                changed["colour" if shared[0] else "shape"] += 1
            if hardness == "differs":
                pairs = [(a, b) for a, b in zip(scene.items, record["told"].items) if a != b]
                (a, b), = pairs
                assert (a.colour == b.colour) != (a.shape == b.shape)
                assert replace(b, colour=a.colour, shape=a.shape) == a
                assert record["told"].background == scene.background
                changed["colour" if a.colour != b.colour else "shape"] += 1
        assert hardness == "random" or min(changed["colour"], changed["shape"]) > 60
    with pytest.raises(ValueError, match="mild"):
        tasks.noisy_caption(TWO, random.Random(0), 1.0, "mild")


# ---------------------------------------------------------------- boxes and letters

def test_referring():
    for scene, rng in many(60, (1, 4)):
        for kind in ("ground", "name"):
            record = tasks.referring(scene, rng, kind)
            question, answer = said(record)
            item = one(record["phrase"], scene)
            alone = Scene((replace(item, tint=(0, 0, 0)),))
            drawn = np.abs(np.asarray(draw(alone, 250)).astype(int) - 250).sum(-1) > 60
            rows, columns = np.nonzero(drawn)
            extent = 4 * np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            (box,), text = record["boxes"], answer if kind == "ground" else question
            assert all(type(v) is int and 0 <= v < 1000 for v in box)
            assert box[0] < box[2] and box[1] < box[3]
            assert np.abs(extent - box).max() < 16, (item, extent, box)
            assert tasks.read_box(text) == box
            assert tuple(int(v) for v in re.findall(r"\d+", text)) == box
            if kind == "ground":
                assert question == f"give the box of the {record['phrase']}."
            else:
                assert answer.split()[1:] == [item.colour, item.shape]
    assert tasks.box_of(Item("red", "circle", "small", 0.5, 0.5)) == tuple(
        int(1000 * v) for v in (0.5 - SIZES["small"],) * 2 + (0.5 + SIZES["small"],) * 2)
    assert max(tasks.box_of(Item("red", "circle", "large", 1 - SIZES["large"], 0.5))) == 999
    assert tasks.read_box("no box") is None and tasks.read_box("(1,2),(3,4444)") is None
    twins = Scene((TWO.items[0], replace(TWO.items[0], x=0.29)))
    assert tasks.referring(twins, random.Random(0)) is None


def test_glyphs_can_be_read():
    for seed in range(60):
        rng = random.Random(seed)
        length, dot = rng.randint(1, 6), rng.randint(1, 3)
        record = tasks.glyphs(rng, length, 200, dot)
        picture = np.asarray(record["images"][0].convert("L")).astype(int)
        assert picture.shape == (200, 200)
        paper = np.bincount(picture.ravel()).argmax()
        dots = np.abs(picture - paper) > 60
        x1, y1, x2, y2 = (-(-v * 200 // 1000) for v in record["boxes"][0])
        read = ""
        for n in range(length):
            left = x1 + 6 * n * dot
            cell = dots[y1:y1 + 7 * dot:dot, left:left + 5 * dot:dot]
            bits = bytes(int(sum(1 << r for r in range(7) if cell[r, c])) for c in range(5))
            read += {v: k for k, v in tasks.GLYPHS.items()}[bits]
        assert read == record["answer"] == said(record)[1] and len(read) == length
        dots[y1:y2 + 1, x1:x2 + 1] = False
        assert not dots.any()                 # nothing but the letters, and inside the box
    with pytest.raises(ValueError, match="40 letters"):
        tasks.glyphs(random.Random(0), 40)


def test_glyphs_are_distinct_and_small():
    assert len(tasks.GLYPHS) == 36 and len(set(tasks.GLYPHS.values())) == 36
    assert all(len(dots) == 5 and max(dots) < 128 for dots in tasks.GLYPHS.values())
    record = tasks.glyphs(random.Random(0))
    ink = np.asarray(record["images"][0].convert("L")).astype(int)
    assert record["images"][0].size == (224, 224)
    assert 0 < (ink != np.bincount(ink.ravel()).argmax()).mean() < 0.01
    # "T" has a bar on top and a stem; an upside-down or mirrored font would not
    assert [tasks.GLYPHS["T"][0], tasks.GLYPHS["T"][2]] == [1, 127]
    assert tasks.GLYPHS["L"] == bytes((127, 64, 64, 64, 64))
    assert all(tasks.GLYPHS[c] == tasks.GLYPHS[c][::-1] for c in "AHIMOTUVWXY8")  # mirrored
    assert all(tuple(tasks.GLYPHS[c]) == tuple(int(f"{dots:07b}"[::-1], 2)
                                               for dots in tasks.GLYPHS[c][::-1]) for c in "NHIOX")


# ---------------------------------------------------------------- instructions

def sentences(text):
    return [s for s in re.split(r"\. ?", text) if s]


def test_the_teacher_sees_captions_and_boxes_only():
    for scene, rng in many(300, (1, 4)):
        known = stories.context(scene, rng)
        assert len(set(known["captions"])) == 5
        assert all(is_true(c, scene) for c in known["captions"])
        assert len(known["boxes"]) == len(scene.items)
        for name, box in known["boxes"]:
            item = one(name, scene)
            assert np.abs(np.subtract(box, item.box)).max() <= 0.0051
            assert f"\n{name}: [{', '.join(map(str, box))}]" in stories.context_text(known)
        read = {(i.colour, i.shape): i for i in stories.read_boxes(known)}
        for item in scene.items:
            seen = read[item.colour, item.shape]
            assert seen.size == item.size
            assert max(abs(seen.x - item.x), abs(seen.y - item.y)) < stories.SURE
    for teacher in stories.TEACHERS.values():
        assert list(inspect.signature(teacher).parameters)[:2] == ["known", "rng"]


def test_conversations_and_details_are_true():
    kinds = Counter()
    for scene, rng in many(500, (1, 4)):
        for kind in ("conversation", "detail"):
            record = stories.instruction(scene, rng, kind, side=None)
            spoken = [t["text"] for t in record["turns"]]
            roles = [t["role"] for t in record["turns"]]
            assert roles == ["user", "assistant"] * (len(spoken) // 2)
            for text in spoken[1::2]:
                for sentence in sentences(text):
                    assert is_true(sentence, scene), (sentence, scene)
                    kinds[kind, sentence.split()[0]] += 1
            assert len(set(spoken[::2])) > 1 or kind == "detail"
            for item in scene.items:
                name = f"{item.size} {item.colour} {item.shape}"
                assert name in spoken[1], spoken
            for question, answer in zip(spoken[::2], spoken[1::2]):
                for name in re.findall(r"the (\w+ \w+)(?=,? compared|\?)", question):
                    assert name in answer or name.split()[0] not in COLOURS
            assert not any(map(held_out, spoken)) and not held_out(record["context"])
    assert min(kinds.values()) > 100, kinds


def test_reasoning_is_right():
    kinds = Counter()
    for scene, rng in many(600, (1, 4)):
        question, answer = said(stories.instruction(scene, rng, "reasoning", side=None))
        name = re.search(rf"the (\w+ (?:{'|'.join(SHAPES)}))", question + answer)[1]
        item, n = one(name, scene), len(scene.items)
        others = [i for i in scene.items if i != item]
        if "taken away" in question:
            verb, s = ("is", "") if n == 1 else ("are", "s")
            assert answer == (f"there {verb} {NUMBERS[n]} object{s}. without the {name}, "
                              f"{NUMBERS[n - 1]} object{'' if n == 2 else 's'} would be left.")
        elif "left to right" in question:
            assert all(item.x < i.x - 0.12 for i in others) and "left of all" in answer
        elif "top to bottom" in question:
            assert all(item.y < i.y - 0.12 for i in others) and "above all" in answer
        else:
            assert item.size == "large" and all(i.size == "small" for i in others) and others
            assert "nearest" in question and answer.startswith(f"the {name} is nearest")
        kinds[question.split()[1]] += 1
    assert min(kinds.values()) > 60, kinds


def test_multiple_choice():
    letters, ranks = Counter(), Counter()
    for scene, rng in many(800, (1, 4)):
        record = stories.multiple_choice(scene, rng, side=None)
        worth = {s: int(n) for s, n in re.findall(r"an? (\w+) is worth (\d+)", record["context"])}
        assert len(set(worth.values())) == len(worth) == 5
        values = [worth[i.shape] for i in scene.items]
        choices = record["choices"]
        assert len(set(choices)) == 4
        assert choices["ABCD".index(record["answer"])] == str(sum(values))
        prompt, reply = said(record)
        assert all(part in prompt for part in (record["context"], record["question"]))
        assert "choices: " + " ".join(f"({a}) {c}" for a, c in zip("ABCD", choices)) in prompt
        assert reply == f"{record['explanation']} the answer is ({record['answer']})."
        reasons = re.findall(r"an? (\w+) (\w+) is worth (\d+)", record["explanation"])
        assert [int(n) for *_, n in reasons] == values
        assert [(c, s) for c, s, _ in reasons] == [(i.colour, i.shape) for i in scene.items]
        if len(values) > 1:
            assert f"{' + '.join(map(str, values))} = {sum(values)}." in record["explanation"]
        letters[record["answer"]] += 1
        ranks[sorted(map(int, choices)).index(sum(values))] += 1
    for counts in (letters, ranks):       # neither letter nor size betrays the right one
        assert max(counts.values()) < 800 * 0.33 and len(counts) == 4, counts


# ---------------------------------------------------------------- dialogue and two scenes

@pytest.mark.parametrize("split", ("train", "test"))
def test_dialogues(split):
    its, last = Counter(), Counter()
    for scene, rng in many(500, (1, 3)):
        record = stories.dialogue(scene, rng, split=split, side=None)
        assert is_true(record["texts"][0], scene)
        spoken = [t["text"] for t in record["turns"]]
        assert [t["role"] for t in record["turns"]] == ["user", "assistant"] * 3 + ["user"]
        asked, answers = spoken[::2], spoken[1::2] + [record["answer"]]
        assert len(set(asked)) == 4
        for n, (question, answer) in enumerate(zip(asked, answers)):
            if question == "what colour is it?":
                assert n == 1 and answers[0] == "yes"
                question = re.sub(r"^is there an? (.+)\?$", r"what colour is the \1?", asked[0])
            assert resolve(question, scene) == answer
            assert not held_out(question)
        open_ended = [a for q, a in zip(asked, answers) if "many" not in q and "number" not in q
                      and a in (*COLOURS, *SHAPES)]
        assert len(set(open_ended)) == len(open_ended)      # nothing is asked of twice
        its[answers[0], asked[1] == "what colour is it?"] += 1
        shown = record["candidates"]
        assert len(set(shown)) == len(shown) == 6
        assert shown.count(record["answer"]) == 1 and shown[record["right"]] == record["answer"]
        last[record["right"]] += 1
    assert 0.4 < its["yes", True] / 500 < 0.6 and set(its) == {("yes", True), ("no", False)}
    assert set(last) == set(range(6)) and min(last.values()) > 50
    full = Scene(tuple(replace(TWO.items[0], shape=s) for s in SHAPES if s != "star"))
    full = replace(full, items=full.items + (Item("blue", "star", "small", 0.9, 0.9),))
    assert stories.dialogue(full, random.Random(0), side=None)["turns"][1]["text"] == "yes"
    short = stories.dialogue(TWO, random.Random(1), rounds=2, shown=3, side=None)
    assert len(short["turns"]) == 3 and len(short["candidates"]) == 3


def test_wrong_candidates_are_of_the_kind_that_is_asked():
    for scene, rng in many(200, 2):
        record = stories.dialogue(scene, rng, rounds=1, shown=2, side=None)
        assert set(record["candidates"]) == {"yes", "no"}
        record = stories.dialogue(scene, rng, rounds=2, shown=6, side=None)
        if record["turns"][-1]["text"] == "what colour is it?":
            assert set(record["candidates"]) <= set(COLOURS)


def judge(text, left, right):
    """Whether a statement on two scenes is true, worked out from their objects."""
    found = re.fullmatch(r"there are more objects in the (\w+) picture than in the \w+ one\.", text)
    if found:
        assert len(left.items) != len(right.items)
        return (len(left.items) > len(right.items)) == (found[1] == "left")
    found = re.fullmatch(r"the two pictures show (\w+) (.+) in all\.", text)
    if found:
        a, b = (len(fitting(found[2], s)) for s in (left, right))
        return a + b == NUMBERS.index(found[1])
    who, x = re.fullmatch(r"(.+) (?:shows?) (an? .+)\.", text).groups()
    a, b = (bool(fitting(x, s)) for s in (left, right))
    return {"the left picture": a, "the right picture": b, "both pictures": a and b,
            "neither picture": not a and not b, "only one of the pictures": a != b}[who]


def test_two_scenes():
    forms, pairs = defaultdict(Counter), []
    for left, rng in many(1200, (1, 3)):
        right = sample(rng, (1, 3))
        record = stories.two_scenes(left, right, rng, side=None)
        text, = record["texts"]
        assert record["answer"] == str(judge(text, left, right)).lower(), text
        assert record["source"] == (left, right) and not held_out(text)
        forms[record["form"]][record["answer"]] += 1
        pairs.append((text, record["answer"]))
    for form, counts in forms.items():
        total = sum(counts.values())
        assert abs(counts["true"] / total - 0.5) < 2 / math.sqrt(total), (form, counts)
    assert len(forms) > 15 and "more" in forms
    assert 0.45 < sum(a == "true" for _, a in pairs) / 1200 < 0.55
    assert blind(pairs) < 0.57
    images = stories.two_scenes(TWO, ODD, random.Random(0))["images"]
    assert [i.tobytes() for i in images] == [draw(s, 32).tobytes() for s in (TWO, ODD)]


# ---------------------------------------------------------------- documents, episodes, clips

def test_documents():
    kinds, where, pairs = Counter(), Counter(), []
    for seed in range(600):
        record = stories.document(random.Random(seed), images=3, side=None)
        segments, k, spot = record["segments"], record["image"], record["answer_at"]
        assert all(len(s) == 1 and set(s) <= {"image", "text"} for s in segments)
        assert [s["image"] for s in segments if "image" in s] == [0, 1, 2]
        question = segments[spot - 1]["text"]
        assert segments[spot]["text"] == record["answer"] and not held_out(question)
        before = [s["image"] for s in segments[:spot] if "image" in s]
        assert before[-1] == k            # the last picture before the question decides it
        for i, scene in enumerate(record["source"]):
            assert (resolve(question, scene) == record["answer"]) == (i == k)
            if i != k:
                caption = segments[segments.index({"image": i}) + 1]["text"]
                assert is_true(caption, scene)
                assert not set(caption.split()) & {*COLOURS, *SHAPES}     # they would tell a no
            assert not {(o.colour, o.shape) for o in scene.items} & HELD_OUT
        kinds[record["kind"]] += 1
        where[k] += 1
        if record["kind"] == "existence":
            pairs.append((" ".join(s["text"] for n, s in enumerate(segments)
                                   if "text" in s and n != spot), record["answer"]))
    assert set(kinds) == set(stories.DOCUMENT_KINDS) and min(kinds.values()) > 100
    assert set(where) == {0, 1, 2} and min(where.values()) > 150
    assert blind(pairs) < 0.7                # no text says what the other pictures show
    record = stories.document(random.Random(3), images=4, kind="shape", split="test")
    assert [i.tobytes() for i in record["images"]] == [draw(s, 32).tobytes()
                                                       for s in record["source"]]
    assert re.search("what is the shape of|of which shape is", record["segments"][
        record["answer_at"] - 1]["text"])


def labels_of(record):
    """The attribute that tells the classes, and [(its value, label)] of every picture."""
    items = [s.items[0] for s in record["source"]]
    by = next(a for a in ("colour", "shape") if getattr(items[0], a) in record["labels"])
    texts = [s["text"] for s in record["segments"] if "text" in s]
    return by, [(getattr(i, by), t) for i, t in zip(items, texts)]


@pytest.mark.parametrize("shots", (0, 2, 4, 8))
def test_episodes(shots):
    meanings = defaultdict(set)
    answers = Counter()
    for seed in range(200):
        record = stories.episode(random.Random(seed), shots, side=None)
        by, told = labels_of(record) if shots else (None, [])
        segments = record["segments"]
        assert [list(s)[0] for s in segments] == ["image", "text"] * (shots + 1)
        assert record["image"] == shots and record["answer_at"] == len(segments) - 1
        assert segments[-1]["text"] == record["answer"] in record["candidates"]
        assert set(record["candidates"]) == set(record["labels"].values())
        query = record["source"][-1].items[0]
        values = {query.colour, query.shape} & set(record["labels"])
        assert record["labels"][values.pop()] == record["answer"]
        for value, label in told:
            assert record["labels"][value] == label
            meanings[label].add(value)
        if shots:
            assert set(Counter(told[:-1]).values()) == {shots // 2}       # as many of each class
            other = "shape" if by == "colour" else "colour"
            assert len({getattr(s.items[0], other) for s in record["source"]}) == 1
        answers[record["candidates"].index(record["answer"])] += 1
        assert not any((i.colour, i.shape) in HELD_OUT for s in record["source"] for i in s.items)
        assert all(len(s.items) == 1 for s in record["source"])
    assert abs(answers[0] - 100) < 30
    assert not shots or min(map(len, meanings.values())) > 5      # a label means nothing by itself


def test_shuffled_shots_say_nothing():
    """Someone who believes the shots is always right, and with shuffled labels at chance."""
    for shots in (2, 4, 8):
        right = Counter()
        for seed in range(400):
            for shuffled in (False, True):
                record = stories.episode(random.Random(seed), shots, shuffled=shuffled, side=None)
                by, told = labels_of(record)
                asked = getattr(record["source"][-1].items[0], by)
                votes = Counter(label for value, label in told[:-1] if value == asked)
                best = max(votes.values())
                liked = sorted(label for label in votes if votes[label] == best)
                right[shuffled] += (record["answer"] in liked) / len(liked)
                assert record["answer"] == record["labels"][asked]        # the truth stays
        assert right[False] == 400 and abs(right[True] - 200) < 40, right


def test_episodes_with_other_classes():
    record = stories.episode(random.Random(0), 6, classes=3, by="shape", side=None)
    assert len(record["labels"]) == len(record["candidates"]) == 3
    assert set(record["labels"]) <= set(SHAPES)
    with pytest.raises(ValueError, match="3 shots.*2 classes"):
        stories.episode(random.Random(0), 3)


def watch(question, frames):
    """The answer to a question on a clip, from the objects of its frames; None if there is none."""
    if question.startswith("which colour"):
        named = re.search(r"first, (\w+) or (\w+)\?", question).groups()
        seen = [[n for n, frame in enumerate(frames) if any(i.colour == c for i in frame.items)]
                for c in named]
        return named[seen[0][0] > seen[1][0]] if seen[0][0] != seen[1][0] else None
    name = re.search(r"did the (\w+ \w+)", question)[1]
    track = [one(name, f) for f in frames]
    if "grow or shrink" in question:
        radii = [SIZES[i.size] for i in track]
        steps = [b - a for a, b in zip(radii, radii[1:]) if a != b]
        return None if len(steps) != 1 else "grew" if steps[0] > 0 else "shrank"
    axis = "x" if "left or right" in question else "y"
    steps = [getattr(b, axis) - getattr(a, axis) for a, b in zip(track, track[1:])]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        return None
    return {"x": ("left", "right"), "y": ("up", "down")}[axis][steps[0] > 0]


@pytest.mark.parametrize("kind", stories.CLIP_KINDS)
def test_clips_are_decided_by_the_order_of_frames(kind):
    pairs = []
    for seed in range(300):
        frames = 8 if seed % 2 else 5
        record = stories.clip(random.Random(seed), frames, kind, side=None)
        question, answer = said(record)
        assert len(record["source"]) == frames and record["kind"] == kind
        assert watch(question, record["source"]) == answer == record["answer"]
        other = watch(question, record["source"][::-1])
        assert other is not None and other != answer      # the same frames, the other answer
        assert other in question or kind == "growth"
        assert len({s.background for s in record["source"]}) == 1
        for scene in record["source"]:
            assert not {(i.colour, i.shape) for i in scene.items} & HELD_OUT
            for item in scene.items:
                x1, y1, x2, y2 = item.box
                assert min(x1, y1) > 0 or item.shape == "star" and kind == "first"
                assert max(x2, y2) < 1 or kind == "first"
            for a, b in zip(scene.items, scene.items[1:]):
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        pairs.append((question, answer))
    counts = Counter(a for _, a in pairs)
    if kind == "first":
        assert 110 < sum(q.split()[-3].rstrip(",") == a for q, a in pairs) < 190
    else:
        assert max(counts.values()) < 1.35 * 300 / len(counts), counts
        assert len(counts) == (4 if kind == "direction" else 2)


def test_clips_are_drawn():
    record = stories.clip(random.Random(0), side=40)
    assert len(record["images"]) == 8 and record["images"][0].size == (40, 40)
    assert [i.tobytes() for i in record["images"]] == [draw(s, 40).tobytes()
                                                       for s in record["source"]]
    with pytest.raises(ValueError, match="1 have no order"):
        stories.clip(random.Random(0), frames=1)


# ---------------------------------------------------------------- all of them

def test_every_record_has_the_common_form():
    for seed in range(12):
        found = stories.examples(random.Random(seed))
        for name, record in found.items():
            assert record["images"] and all(i.mode == "RGB" for i in record["images"]), name
            assert "texts" in record or "turns" in record or "segments" in record, name
            for turn in record.get("turns", ()):
                assert set(turn) == {"role", "text"} and turn["role"] in ("user", "assistant")
            drawn = record.get("source", ())
            drawn = (drawn,) if isinstance(drawn, Scene) else drawn
            for picture, scene in zip(record["images"], drawn):
                assert picture.tobytes() == draw(scene, 32).tobytes(), name
            assert not any(held_out(text) for text in stories.texts_of(record)), name
            assert not any("<image>" in text for text in stories.texts_of(record)), name
    assert len(found) >= 24
    quick = stories.examples(random.Random(5), side=None)
    assert [stories.texts_of(r) for r in quick.values()] == [
        stories.texts_of(r) for r in stories.examples(random.Random(5)).values()]


@pytest.fixture(scope="module")
def heard():
    return list(stories.corpus())


def test_the_corpus_has_every_training_wording_and_no_test_wording(heard):
    def pattern(wording):
        return re.sub(r"\\{\w\\}", r"[\\w ]+", re.escape(wording)) + "( .*)?"
    heard = sorted(set(heard))
    train, test = ({w for forms in tasks.FORMS.values() for form in forms.values()
                    for w in form[n]} for n in (1, 2))
    for wording in train:
        assert sum(bool(re.fullmatch(pattern(wording), t)) for t in heard) >= 3, wording
    for wording in test:
        assert not any(re.fullmatch(pattern(wording), t) for t in heard), wording
    for part in ("is there", "give the box of", "which object is in the box", "what colour is it?",
                 "did the .* move", "did the .* grow", "which colour did", "both pictures show",
                 "describe the picture in detail", "nearest to you", "context: ",
                 "read the letters"):
        assert sum(bool(re.search(part, t)) for t in heard) >= 3, part
    assert set(stories.LABELS) <= set(heard)


def test_the_corpus_names_no_held_out_pair_and_is_always_the_same(heard):
    assert not any(map(held_out, heard))
    assert heard[:2000] == list(itertools.islice(stories.corpus(), 2000)) and len(heard) > 5000
    for n in range(50):                   # nor any disordered words
        record = stories.examples(random.Random(f"stories/{n}"), side=None)["swapped order"]
        assert record["texts"][1] not in heard
    # every word of the tests is in it, so that one vocabulary does for all
    words = {w for t in heard for w in re.findall(r"\w+", t)}
    for scene, rng in many(400, (1, 3)):
        for record in tasks.questions(scene, rng, "test", side=None):
            assert set(re.findall(r"\w+", " ".join(said(record)))) <= words, said(record)
    assert set(COLOURS) | set(SHAPES) | set(BACKGROUNDS) | set(SIZES) <= words
    assert {c for t in heard for c in t} >= set(tasks.GLYPHS)


def test_records_depend_on_the_rng_alone():
    state = random.getstate(), np.random.get_state()[1].tolist()
    code = ("import random, hashlib\nfrom common.data.shapes import stories\n"
            "print(hashlib.md5(repr([stories.texts_of(r) for n in range(20) for r in "
            "stories.examples(random.Random(n), side=None).values()]).encode()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")}
    assert len(runs) == 1 and len(runs.pop()) == 33
    one, two = (stories.examples(random.Random(4)) for _ in range(2))
    assert [[i.tobytes() for i in r["images"]] for r in one.values()] == [
        [i.tobytes() for i in r["images"]] for r in two.values()]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state


def test_the_gallery(tmp_path):
    stories.sheet(tmp_path / "sheet.png")
    page = stories.gallery()
    assert page.width > 1000 and page.height > 800
    assert (tmp_path / "sheet.png").stat().st_size > 9000
    assert page.tobytes() == stories.gallery(random.Random(0)).tobytes()
