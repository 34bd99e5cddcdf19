"""Pictures and texts in turn: pages, questions, few-shot episodes and clips.

A record of TASKS is {"turns": [{"images", "prompt", "answer"}, ...], "source": the Scene of each
picture or frame}; the last turn's answer is the answer. "caption" and "noisy" are {"images",
"texts", "source": Scene}; the source of "dialogue" is one Scene, too. Split "test" asks in wordings
that training never uses; side=None leaves the pictures out; dial: arguments of `sample`.
"""
import re
from dataclasses import replace
from functools import partial

from common.data.shapes import captions, conversations
from common.data.shapes.grounding import READ_PROMPTS, glyphs, grounded
from common.data.shapes.questions import (SETTINGS, YES_NO, decidable, pick, probes, wording,
                                          yes_no)
from common.data.shapes.scene import (BACKGROUNDS, COLOURS, PAIRS, SHAPES, SIZES, Item, Scene,
                                      dialogue_turns, pictures, sample, turn)
from common.data.shapes.words import describe, listed, phrase, vague

QUESTION_KINDS = ("colour", "shape", "count", "existence", "relation")
DOCUMENT_KINDS = QUESTION_KINDS[:-1]
NOT_TOLD = "small|large|top|bottom|centre|left|right|above|below"   # by a plain list of objects
LABELS = ("dax", "wug", "blick", "fep", "toma", "zup", "kiv", "gorp", "mell", "sanu", "pif", "lorn")


def page(scenes, texts, side, **more):
    """A record with one picture and one text a turn, and no prompts."""
    return {"turns": [turn("", text, (scene,), side) for scene, text in zip(scenes, texts)],
            "source": tuple(scenes), **more}


def caption(rng, split="train", side=32, **dial):
    """One picture and its caption."""
    scene = sample(rng, **dial)
    return {"images": pictures((scene,), side), "texts": [describe(scene, rng)], "source": scene}


def noisy(rng, split="train", side=32, rate=0.5, hardness=None, **dial):
    """One picture and a caption from the web, see `captions.noisy_caption`."""
    return captions.noisy_caption(sample(rng, **dial), rng, rate, hardness, side)


def statement(rng, split="train", side=32, **dial):
    """One picture and a caption from the web: is it true of the picture?"""
    record = noisy(rng, split, side, **dial)
    prompt = f"is it true that the picture shows {record['texts'][0]}?"
    return {"turns": [turn(prompt, yes_no(record["truth"]), (record["source"],), side)],
            "candidates": list(YES_NO), "source": (record["source"],)}


def instruction(rng, split="train", side=32, kind=None, **dial):
    """One picture and what a language-only teacher wrote on it, see `conversations`."""
    return conversations.instruction(sample(rng, **dial), rng, kind, side)


def asked(scene, rng, split, kinds):
    """[(kind, (question, answer)), ...]: a question of each of the kinds that the scene allows."""
    return [(kind, (wording(option, rng, kind, split), option[1])) for kind in kinds
            if (option := pick(decidable(scene, kind), rng))]


def chat(rng, split="train", side=32, **dial):
    """One picture and three turns in any order: questions, probes, what a teacher wrote on it."""
    scene = sample(rng, **dial)
    context = conversations.teacher_context(scene, rng)
    pairs = [pair for teach in conversations.TEACHERS.values() for pair in teach(context, rng)]
    pairs += [pair for _, pair in asked(scene, rng, split, rng.sample(QUESTION_KINDS, 3))]
    pairs += [(t["prompt"], t["answer"]) for record in rng.sample(probes(scene, rng, None), 2)
              for t in record["turns"]]
    return {"turns": dialogue_turns(rng.sample(pairs, 3), scene, side), "kind": "chat",
            "source": scene}


def choice(rng, split="train", side=32, **dial):
    """A question that needs a text, too, with its choices, see `conversations.multiple_choice`.

    {"context": that text, "question": without it and the choices, for a model's own wording}
    """
    record = conversations.multiple_choice(sample(rng, **dial), rng, side)
    turns = [record["turns"][0] | {
        "prompt": f"{record['context']} {record['turns'][0]['prompt']} "
                  f"{', '.join(record['choices'])}?"}]
    return {"turns": turns, "candidates": record["choices"], "source": record["source"],
            "context": record["context"], "question": record["turns"][0]["prompt"]}


def album(rng, split="train", side=32, **dial):
    """Two or three pictures, each with its caption."""
    scenes = [sample(rng, **dial) for _ in range(rng.randint(2, 3))]
    return page(scenes, [describe(scene, rng) for scene in scenes], side)


def names(rng, split="train", side=32):
    """Single objects, each with the name of its colour, or each with that of its shape.

    The first name is not learned: nothing before it decides between colour and shape.
    """
    by = rng.choice(("colour", "shape"))
    scenes = [sample(rng, 1, pairs=(rng.choice(PAIRS),)) for _ in range(rng.randint(4, 8))]
    record = page(scenes, [getattr(scene.items[0], by) for scene in scenes], side)
    record["turns"][0]["learn"] = False
    return record


def question(rng, split="train", side=32, asks=None, kinds=QUESTION_KINDS, **dial):
    """One picture and `asks` questions of different kinds: one to three in training, else one.

    "kind": that of the last question.
    """
    asks, found = asks or (rng.randint(1, 3) if split == "train" else 1), []
    while not found:
        scene = sample(rng, **dial)
        found = asked(scene, rng, split, rng.sample(kinds, asks))
    return {"turns": dialogue_turns([pair for _, pair in found], scene, side), "source": (scene,),
            "kind": found[-1][0]}


def text_question(rng, split="train", side=32, **dial):
    """A `question` without a picture: the first prompt names the objects (the text-only part of
    LLaVA-1.5's data).

    "there is a red circle and a blue star. what colour is the star?" -> "blue". The words decide
    every question, so none is about sizes or places. "source": the Scene in words.
    """
    record = None
    while not record or any(re.search(NOT_TOLD, t["prompt"]) for t in record["turns"]):
        record = question(rng, split, None, **dial)
    (scene,), (first, *later) = record["source"], record["turns"]
    words = listed([phrase(item) for item in rng.sample(scene.items, len(scene.items))])
    first = first | {"prompt": f"there is {words}. {first['prompt']}"}
    return record | {"turns": [first, *later]}


def probe(rng, split="train", side=32, setting=None, answer=None, **dial):
    """One of `questions.probes`; setting: one of SETTINGS, answer: one of YES_NO, else drawn."""
    scene, setting = sample(rng, **dial), setting or rng.choice(SETTINGS)
    answer = answer or rng.choice(YES_NO)
    record, = (r for r in probes(scene, rng, None)
               if (r["setting"], r["turns"][0]["answer"]) == (setting, answer))
    return record | {"turns": [turn(record["turns"][0]["prompt"], answer, (scene,), side)]}


def grounding(rng, split="train", side=32, kind=None, **dial):
    """A box is wanted, or given, or all of them with their objects, see `grounding.grounded`."""
    return grounded(sample(rng, **dial), rng, kind, side)


def reading(rng, split="train", side=32, length=2, dot=1, alphabet="ACFHKLMSTZ"):
    """Random letters of the alphabet, 7 * dot pixels high, "k s": see `grounding.glyphs`.

    In training one to four of them, of 1 to 3 pixels a dot, as they fit in: large ones teach to
    read. With spaces no two letters of the answer become one token.
    """
    prompt = rng.choice(READ_PROMPTS)    # before `glyphs`, whose draws depend on the side
    if split == "train":
        length, dot = rng.choice([(n, d) for n in range(1, 5) for d in range(1, 4)
                                  if max(6 * n - 1, 7) * d <= (side or 224)])
    record = glyphs(rng, length, side or 224, dot, alphabet)
    found = record["turns"][0]
    letters = turn(prompt, " ".join(found["answer"].lower()))
    return record | {"turns": [letters | ({"images": found["images"]} if side else {})]}


def dialogue(rng, split="train", side=32, **dial):
    """One picture and four questions on it, see `conversations.dialogue`."""
    return conversations.dialogue(sample(rng, **dial), rng, split, side)


def two_pictures(rng, split="train", side=32, **dial):
    """A statement on two pictures, see `conversations.two_scenes`."""
    return conversations.two_scenes(sample(rng, **dial), sample(rng, **dial), rng, side)


def document(rng, split="train", side=32, images=None, **dial):
    """Two to four pictures: one with a question on it, the others with a vague true caption.

    "asked": the index of the question's turn. The same question on any other picture has another
    answer. The captions are vague because a "yes" could be read off exact ones.
    """
    images = images or rng.randint(2, 4)
    kind, option = rng.choice(DOCUMENT_KINDS), None
    while not option:
        scene = sample(rng, **dial)
        option = pick(decidable(scene, kind), rng)
    form, answer, slots = option
    asked, scenes = rng.randrange(images), []
    while len(scenes) < images:
        other = scene if len(scenes) == asked else sample(rng, **dial)
        if other is scene or any((f, s) == (form, slots) and a != answer
                                 for f, a, s in decidable(other, kind)):
            scenes.append(other)
    record = page(scenes, map(vague, scenes), side, kind=kind, asked=asked)
    record["turns"][asked] |= {"prompt": wording(option, rng, kind, split), "answer": answer}
    return record


def episode(rng, split="train", side=32, shots=None, classes=2, shuffled=False):
    """Few-shot learning: labelled pictures, the shots, and one more whose label is asked.

    The classes are colours or shapes ("by"). The labels ("candidates") are nonsense words, drawn
    anew for each episode, so only the shots give them. shots: of all classes together, equally many
    of each. shuffled: the shots' labels are permuted; then accuracy must fall to 1 / classes.
    """
    shots = rng.choice((2, 4, 6, 8)) if shots is None else shots
    by = rng.choice(("colour", "shape"))
    same = rng.choice(SHAPES if by == "colour" else tuple(COLOURS))
    pairs = rng.sample([p for p in PAIRS if same in p], classes)
    labels = dict(zip(pairs, rng.sample(LABELS, classes)))
    order = rng.sample(pairs * (shots // classes), shots) + [rng.choice(pairs)]
    scenes, texts = [sample(rng, 1, (pair,)) for pair in order], [labels[pair] for pair in order]
    if shuffled:
        texts[:-1] = rng.sample(texts[:-1], shots)
    return page(scenes, texts, side, by=by, candidates=rng.sample(list(labels.values()), classes))


def class_names(record):
    """The colours of an episode's pictures if these are its classes, else the shapes."""
    return [getattr(scene.items[0], record["by"]) for scene in record["source"]]


def glossary(rng, split="train", side=32):
    """An episode whose shots are words, "circle dax", and whose last turn alone has a picture.

    Two to four classes, each given once; the words are not learned. A model must match a picture
    with a word here; in an episode it has to learn both sides of the match at once.
    """
    classes = rng.randint(2, 4)
    record = episode(rng, split, None, classes, classes)
    *shots, last = record["turns"]
    words = [turn("", f"{name} {shot['answer']}") | {"learn": False}
             for name, shot in zip(class_names(record), shots)]
    scenes = record["source"][-1:]
    return record | {"turns": [*words, turn("", last["answer"], scenes, side)], "source": scenes}


def moving(rng, pairs, frames):
    """Two objects cross the picture, each in its lane and direction; the question is on one."""
    axis, back, forth = rng.choice((("x", "left", "right"), ("y", "up", "down")))
    lanes, forward = rng.sample((0.25, 0.75), 2), [rng.random() < 0.5 for _ in pairs]
    tracks = []
    for (colour, shape), lane, ahead in zip(pairs, lanes, forward):
        start, end = rng.uniform(0.24, 0.34), rng.uniform(0.66, 0.76)
        steps = [start + (end - start) * t / (frames - 1) for t in range(frames)]
        tracks.append([Item(colour, shape, "small", *((v, lane) if axis == "x" else (lane, v)))
                       for v in steps[::1 if ahead else -1]])
    prompt = f"did the {tracks[0][0].name} move {back} or {forth}?"
    return list(zip(*tracks)), prompt, forth if forward[0] else back


def appearing(rng, pairs, frames):
    """One object in the first half of the frames, another in the second half."""
    one, other = (sample(rng, 1, pairs=(pair,)).items for pair in pairs)
    first, second = rng.sample([pair[0] for pair in pairs], 2)
    prompt = f"which colour did the picture show first, {first} or {second}?"
    return [one] * (frames // 2) + [other] * (frames - frames // 2), prompt, pairs[0][0]


def growing(rng, pairs, frames):
    """One object that changes its size at a random frame."""
    before, after = rng.sample(tuple(SIZES), 2)
    item = sample(rng, 1, pairs=pairs[:1]).items[0]
    item = replace(item, size=before, x=0.25 + item.x / 2, y=0.25 + item.y / 2)   # room to grow
    moment = rng.randint(1, frames - 1)
    prompt = f"did the {item.name} grow or shrink?"
    items = [(item,)] * moment + [(replace(item, size=after),)] * (frames - moment)
    return items, prompt, "shrank" if before == "large" else "grew"


CLIPS = {"direction": moving, "first": appearing, "growth": growing}


def clip(rng, split="train", side=32, frames=8, kind=None):
    """Frames of moving shapes and a question, of a kind of CLIPS, that only their order decides.

    The same frames backwards have the other answer, so without the order the chance is 1/2.
    "did the red circle move left or right?" -> "left". {"kind", "source": a Scene a frame}
    """
    kind = kind or rng.choice(tuple(CLIPS))
    background = rng.choice(tuple(BACKGROUNDS))
    pairs = rng.sample(PAIRS, 2)
    while pairs[0][0] == pairs[1][0]:
        pairs = rng.sample(PAIRS, 2)
    items, prompt, answer = CLIPS[kind](rng, pairs, frames)
    scenes = tuple(Scene(tuple(own), background) for own in items)
    images = [pictures(scenes, side)] if side else []
    return {"turns": [turn(prompt, answer) | {"images": images}], "kind": kind, "source": scenes}


TASKS = {f.__name__: f for f in
         (caption, noisy, statement, instruction, chat, choice, album, names, question,
          text_question, probe, grounding, reading, dialogue, two_pictures, document, episode,
          glossary, clip)}
TASKS |= {"questions": partial(question, asks=len(QUESTION_KINDS))}   # of one picture, as LLaVA-1.5
TASKS |= {kind: partial(instruction, kind=kind) for kind in conversations.TEACHERS}
