"""What models are asked: retrieval and classes, captions, questions, clips, shots.

encode_images(records) and encode_texts(texts) give unit vectors (N, E) on one device. A pupil is a
model that writes: write(samples, tokens) -> a string each, choose(samples, candidates) -> indices;
samples are `worlds/readings.py`'s, whose last text stays open.
"""
import random

import torch

from common.evaluation import retrieval as metrics
from common.prompts import OUTPUT
from common.data.files import all_records
from common.evaluation.sheet import sheet


class Pool:
    """The test records of a world with one sentence each, and what is true of what."""

    def __init__(self, world, encode_images, encode_texts):
        self.world = world
        self.records = all_records(world, "test")
        self.texts = [record["texts"][0] for record in self.records]
        self.vectors = encode_images(self.records).cpu(), encode_texts(self.texts).cpu()
        self.scores = self.vectors[0] @ self.vectors[1].T             # row a picture, column a text

    def is_true(self, text, image):
        """Whether text number `text` is true of picture number `image`."""
        return self.world.is_true(self.texts[text], self.records[image]["source"])


def retrieval(pool):
    """Recall at 1, 5, 10 both ways with the chance of a random guess -> {name: number}."""
    figures = metrics.retrieval(*pool.vectors, pool.is_true)
    chance = metrics.chance(pool.is_true, len(pool.records))
    return figures | {f"{name}_chance": chance for name in figures if name.endswith("@1")}


def zero_shot(world, encode_images, classifier):
    """Accuracy over the world's classes, and over pairs never seen -> {name: number}.

    classifier: float (E, all_classes); the unseen pairs come last.
    """
    figures = {}
    for name, split, classes in (("zero_shot_accuracy", world.zero_shot, world.classes),
                                 ("composition_accuracy", "composition", world.all_classes)):
        records = [world.record(split, i) for i in range(world.size(split))]
        labels = torch.tensor([world.label(record["source"]) for record in records])
        scores = encode_images(records) @ classifier[:, :len(classes)]
        figures[name] = metrics.accuracy(scores.cpu(), labels)
        figures[f"{name}_chance"] = 1 / len(classes)
    return figures


def retrieval_sheet(pool, count=6):
    """Sentences with the pictures found for them; below, pictures with the sentences found."""
    pictures = [record["images"][0] for record in pool.records]
    count, told_of_each = min(count, len(pictures) // 2), min(3, len(pictures))
    found = [(pool.texts[t], None, [(pictures[i], "", pool.is_true(t, i))
                                    for i in pool.scores[:, t].topk(count).indices.tolist()])
             for t in range(count)]
    told = [("", pictures[i], [(None, pool.texts[t], pool.is_true(t, i))
                               for t in pool.scores[i].topk(told_of_each).indices.tolist()])
            for i in range(count, 2 * count)]
    return sheet(f"Unseen {pool.world.name}: a sentence, then the pictures found for it; below, a "
                 "picture, then the sentences found. Green is right, red is wrong.", found + told)


# ------------------------------------------------------------------ models that write

def describes(world, text, source):
    """Whether a caption is true, and says enough where the world has a say in that."""
    return (world.describes if hasattr(world, "describes") else world.is_true)(text, source)


def captions(world, write, count=500):
    """Accuracy of written captions, of scenes and of single objects -> {name: number}.

    write(records) -> a text for each. Of single objects also with the pictures of others, which
    must not do better than a guess among the classes.
    """
    def right(split, mixed=False):
        records = all_records(world, split)[:count]
        shown = random.Random(0).sample(records, len(records)) if mixed else records
        return sum(describes(world, text, r["source"])
                   for text, r in zip(write(shown), records)) / len(records)
    figures = {"caption_accuracy": right("test")}
    if world.zero_shot not in (None, "test"):
        figures |= {"caption_accuracy_single": right(world.zero_shot),
                    "caption_accuracy_single_wrong_picture": right(world.zero_shot, mixed=True),
                    "caption_accuracy_single_chance": 1 / len(world.classes)}
    return figures


def draws(world, kind, count, split="test", **more):
    """Samples of a kind that are the same in every evaluation."""
    return [world.interleaved(kind, random.Random(f"asked/{kind}/{i}"), split, **more)
            for i in range(count)]


def asked(samples, upto=None):
    """The samples as prompts: their texts up to number `upto` (None: the last), that one open."""
    cut = []
    for sample in samples:
        texts = sample["texts"] if upto is None else sample["texts"][:sample[upto] + 1]
        shown = sample.get("shown", [True] * len(texts))[:len(texts)]
        cut.append(sample | {"images": sample["images"][:sum(shown)], "texts": texts,
                             "shown": shown})
    return cut


def exact(said, samples):
    """The fraction of answers that are the sample's, word for word."""
    return sum(text == sample["answer"] for text, sample in zip(said, samples)) / len(samples)


def about_questions(pupil, world, count):
    """Questions on one picture, with the right one and a wrong one, and on one of several.

    In wordings that training never uses, and on the same pictures in those that it does.
    """
    samples = draws(world, "question", count)
    known = draws(world, "question", count, "train", asks=1)
    said = pupil.write(asked(samples), max_new_tokens=6)
    others = [s | {"images": o["images"]} for s, o in zip(samples, samples[1:] + samples[:1])]
    figures = {"vqa_accuracy": exact(said, samples),
               "vqa_accuracy_trained_wordings": exact(pupil.write(asked(known), max_new_tokens=6), known),
               "vqa_accuracy_blind": exact(pupil.write(asked(others), max_new_tokens=6), samples)}
    for kind in sorted({s["kind"] for s in samples}):
        own = [(text, s) for text, s in zip(said, samples) if s["kind"] == kind]
        figures[f"vqa_accuracy/{kind}"] = exact(*zip(*own))
    pages = draws(world, "document", count, images=3)
    return figures | {"document_accuracy": exact(pupil.write(asked(pages, "at"), max_new_tokens=6), pages)}


def about_clips(pupil, world, count):
    """Questions that the order of a clip's frames decides; the same with the frames shuffled."""
    samples, longer = draws(world, "clip", count), draws(world, "clip", count, frames=16)
    mixed = [s | {"images": [random.Random(i).sample(s["images"][0], len(s["images"][0]))]}
             for i, s in enumerate(samples)]
    named = {"clip_accuracy": samples, "clip_accuracy_16_frames": longer,
             "clip_accuracy_shuffled": mixed}
    figures = {name: exact(pupil.write(asked(own), max_new_tokens=6), own) for name, own in named.items()}
    return figures | {"clip_accuracy_chance": 0.5}


def about_shots(pupil, world, count, shots=(0, 2, 4, 8)):
    """Episodes whose labels only the shots tell, ranked; with shuffled shots it must be chance."""
    def share(**how):
        samples = draws(world, "episode", count, **how)
        chosen = pupil.choose(asked(samples), [s["candidates"] for s in samples])
        return sum(s["candidates"][c] == s["answer"] for s, c in zip(samples, chosen)) / count
    figures = {f"shots_{k}": share(shots=k) for k in shots}
    return figures | {f"shots_{shots[-1]}_shuffled": share(shots=shots[-1], shuffled=True),
                      "shots_chance": 0.5}


def about_two(pupil, world, count):
    """Of two pictures before it, whose caption is written: the nearer one's or the first's?"""
    records = [world.record(world.zero_shot, i) for i in range(count)]
    pairs = list(zip(records, random.Random(0).sample(records, count)))
    said = pupil.write([{"images": [a["images"], b["images"]],
                         "texts": [(OUTPUT, f" {a['texts'][0]}"), (OUTPUT, "")]} for a, b in pairs])
    fits = [[world.describes(text, record["source"]) for record in pair]
            for text, pair in zip(said, pairs)]
    return {"two_pictures_first": sum(first for first, _ in fits) / count,
            "two_pictures_nearest": sum(nearest for _, nearest in fits) / count}
