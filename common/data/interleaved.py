"""Interleaved pages: samples of pictures and texts in turn, as ids, labels and tensors.

A sample is {"images": [[frame, ...], ...], "texts": [(told, learned), ...]}: each picture or clip a
list of frames, each text what is told and what is learned of it. "shown", a bool for each text,
says before which of them a picture stands; without it before all.

    ids, labels = Pages(tokenizer, config).row({"images": [[picture]],
                                                "texts": [("output:", " a red circle")]})
"""
import torch

from common.prompts import IGNORED, OUTPUT, Segment, collate, render
from common.data.images import center_crop, to_tensor
from common.data.tokenizer import BOS, EOC, EOS, IMAGE


def segments(texts, shown=None, end=True, behind=False):
    """An interleaved text: for each picture <image>, what is told, what is learned, <eoc>.

    texts: [(told, learned), ...]; shown: whether a picture stands before each (None: before all).
    behind: each picture stands behind its text, for rows in which text sees the next picture.
    With end the whole is closed by <eos>; without, it is a prompt: the last text's `learned` is
    left out. Nothing is learned of <image>; <eoc> is (paper, Figure 7), but neither before the
    first picture, which a text could not see.
    """
    parts, seen = [Segment((BOS,))], behind
    for number, (told, learned) in enumerate(texts):
        picture = [Segment((IMAGE,))] if shown is None or shown[number] else []
        seen = seen or bool(picture)
        words = [Segment(told)]
        if end or number + 1 < len(texts):
            words += [Segment(learned, learn=seen), Segment((EOC,), learn=seen)]
        parts += words + picture if behind else picture + words
    return parts + [Segment((EOS,))] if end else parts


class InterleavedCollator:
    """Collate samples, {"images": [[frame, ...], ...], "texts": [(told, learned), ...]}.

    Records with "texts" of plain strings are pictures with a caption. number, weight: of the data
    set, for `Flamingo.accumulate`. next_image: how often a page has its pictures behind their
    texts, which then see the next one (paper, A.3.2).
    """

    def __init__(self, tokenizer, config, number=0, weight=1.0, next_image=0.0):
        self.tokenizer, self.context_length, self.image_size = tokenizer, config.context_length, config.image_size
        self.number, self.weight, self.next_image = number, weight, next_image

    def images(self, samples):
        """uint8 (B, N, F, 3, H, W), rows with fewer pictures than N filled up with black; N >= 1.

        Raises ValueError for pictures or clips of different numbers of frames.
        """
        lengths = {len(frames) for sample in samples for frames in sample["images"]} or {1}
        if len(lengths) > 1:
            raise ValueError(f"clips of {' and '.join(map(str, sorted(lengths)))} frames together: "
                             "pictures and clips of one prompt or batch need equally many")
        rows = [[to_tensor([center_crop(frame, self.image_size) for frame in frames])
                 for frames in sample["images"]] for sample in samples]
        most = max(1, *map(len, rows))
        blank = torch.zeros(*lengths, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack([torch.stack(row + [blank] * (most - len(row))) for row in rows])

    def row(self, sample, behind=False, end=True):
        """A sample -> (ids, labels), `segments` rendered; without end, a prompt, it is never cut.

        Raises ValueError for more <image> tags than the sample has pictures: what is padding for
        its row may be a picture of another.
        """
        parts = segments(sample["texts"], sample.get("shown"), end, behind)
        ids, labels = render(parts, self.tokenizer, self.context_length if end else None)
        if ids.count(IMAGE) > len(sample["images"]):
            raise ValueError(f"a text with {ids.count(IMAGE)} <image> tags, but "
                             f"{len(sample['images'])} pictures")
        if behind:                       # the context may have cut off the tag behind the last text
            seen = max((i for i, token in enumerate(ids) if token == IMAGE), default=0)
            labels = labels[:seen] + [IGNORED] * (len(labels) - seen)
        return ids, labels

    def __call__(self, records, rngs):
        """Samples and their rngs -> the batch of `Flamingo.forward`."""
        samples = [as_sample(record, rng) for record, rng in zip(records, rngs)]
        following = [rng.random() < self.next_image for rng in rngs]
        batch = collate([self.row(s, behind) for s, behind in zip(samples, following)])
        return {"images": self.images(samples), "ids": batch["ids"], "labels": batch["labels"],
                "following": torch.tensor(following), "weight": torch.tensor(self.weight),
                "dataset": torch.tensor(self.number)}


def as_sample(record, rng):
    """A picture with captions as a sample with one of them; a sample as it is."""
    if isinstance(record["texts"][0], tuple):
        return record
    text = rng.choice(record["texts"])
    return {"images": [record["images"][:1]], "texts": [(OUTPUT, f" {text}")]}
