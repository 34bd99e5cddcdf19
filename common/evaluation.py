"""What contrastive models are asked: retrieval, zero-shot classes, a sheet to look at.

encode_images(records) and encode_texts(texts) give unit vectors (N, E) on one device.
"""
import random

import torch

from common import metrics
from common.formats import all_records
from common.images import sheet


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
