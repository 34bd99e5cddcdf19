"""From records to batches: any world or file of records, any number of workers and processes.

A source of records has `size(split)`, `record(split, index, rng)` and `is_true(text, source)`, as
`worlds/shapes.py` shows; it may have an `order` of its own, and `formats.Files` may refuse records.
Every draw is a function of (seed, epoch, index): batch s is the same for any number of workers and
processes, and a run can go on at any step.
"""
import inspect
import os
import random
import signal

import torch
from torch.utils.data import DataLoader

from common.prompts import IGNORED, collate
from common.data.files import FORMATS, Files, all_records
from common.data.images import center_crop, to_tensor
from common.data.safe_read import printable
from common.data.tokenizer import BOS, EOS, Tokenizer
from common.data.emoji.world import Emoji
from common.data.shapes.world import Shapes

WORLDS = {"shapes": Shapes, "emoji": Emoji}
STAND_INS = 20                           # tries to replace a record that cannot be read


def open_world(spec, image_size, images=None, skip=0.05, shuffle=10_000):
    """The world that --data names: "shapes", "emoji", or with a dial, "shapes:objects=3,noise=0.1".

    Or files of the user's own, "coco:FILE"; images, skip and shuffle are theirs: see formats.Files.
    Raises ValueError for a world or a dial that does not exist, naming those that do, for a value
    of another type than the dial's own, or with which nothing can be drawn, and for bad files.
    """
    name, _, dials = spec.partition(":")
    if name in FORMATS:
        try:
            return Files(name, dials, image_size=image_size, images=images, skip=skip,
                         shuffle=shuffle)
        except ValueError as error:
            raise ValueError(f"--data {printable(spec)}: {error}") from None
    if name not in WORLDS:
        raise ValueError(f"--data {spec}: no world {name!r}; there are {', '.join(WORLDS)}, and "
                         + ", ".join(f"{kind}:FILE" for kind in FORMATS))
    if images is not None:
        raise ValueError(f"--images {printable(images)}: {name} draws its own pictures")
    signature = inspect.signature(WORLDS[name]).parameters
    kinds = {key: type(p.default) for key, p in signature.items() if key != "image_size"}
    values = {}
    for dial in filter(None, dials.split(",")):
        key, _, value = dial.partition("=")
        if key not in kinds:
            raise ValueError(f"--data {spec}: {name} has no dial {key!r}; "
                             f"it has {', '.join(kinds) or 'none'}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"--data {spec}: {key} takes {kinds[key].__name__}, "
                             f"not {value!r}") from None
    try:
        world = WORLDS[name](image_size=image_size, **values)
        world.record("train", 0, draw_rng(0, 0, 0))
    except ValueError as error:
        raise ValueError(f"--data {spec}: {error}") from None
    return world


def draw_rng(seed, epoch, index):
    """The random.Random of one sample: the same whoever draws it."""
    return random.Random(f"{seed}/{epoch}/{index}")


class ImageTextBatch:
    """Collate records into a batch of pictures and texts: one text of each record, by its rng."""

    def __init__(self, tokenizer, context_length, image_size):
        self.tokenizer, self.context_length, self.image_size = tokenizer, context_length, image_size

    def images(self, records):
        """The first picture of each record: uint8 (B, 3, image_size, image_size)."""
        return to_tensor([center_crop(r["images"][0], self.image_size) for r in records])

    def __call__(self, records, rngs):
        """Records and their rngs -> {"images": uint8 (B, 3, H, W), "ids": int64 (B, T)}."""
        texts = [rng.choice(r["texts"]) for r, rng in zip(records, rngs)]
        return {"images": self.images(records), "ids": self.tokenizer.batch(texts, self.context_length)}


class PackedTexts:
    """Collate records into rows of texts, each <bos> ... <eos>, as many as fit one after another.

    length: tokens of a row; a longer text is cut. Several texts share a row so that little is
    padding; what a row ends with is.
    """

    def __init__(self, tokenizer, context_length, length):
        self.tokenizer, self.context_length, self.length = tokenizer, context_length, min(length, context_length)

    def __call__(self, records, rngs):
        """Records and their rngs -> {"ids", "labels": int64 (B', T)}, all texts in B' rows."""
        rows = [[]]
        for record, rng in zip(records, rngs):
            ids = self.tokenizer.encode(rng.choice(record["texts"]))[:self.length - 2]
            if len(rows[-1]) + len(ids) + 2 > self.length:
                rows.append([])
            rows[-1] += [BOS, *ids, EOS]
        # What follows an end is not to be learned: another text begins.
        batch = collate([(row, [IGNORED if i == BOS else i for i in row]) for row in rows if row])
        return {"ids": batch["ids"], "labels": batch["labels"]}


class Drawn:
    """Records of another sort than a world's own, as many: make(split, rng) at every index."""

    def __init__(self, world, make):
        self.world, self.make, self.name = world, make, world.name

    def size(self, split):
        """The number of records in a split."""
        return self.world.size(split)

    def record(self, split, index, rng=None):
        """The record that rng draws; without one it never changes."""
        return self.make(split, rng or random.Random(f"{split}/{index}"))


class Steps(torch.utils.data.Dataset):
    """The micro-batches of every step of a run: item s is a list of them."""

    def loader(self, start, stop, workers):
        """Iterate over the batches of steps start .. stop - 1, made by `workers` processes."""
        return DataLoader(self, batch_size=None, sampler=range(start, stop), num_workers=workers,
                          prefetch_factor=4 if workers else None,
                          worker_init_fn=_begin_worker if workers else None,
                          generator=torch.Generator())    # else it draws from the model's


class Mixture(Steps):
    """Several data sets in every step, their micro-batches one after another."""

    def __init__(self, parts):
        """parts: Batches, one a data set."""
        self.parts = parts

    def __getitem__(self, step):
        return [batch for part in self.parts for batch in part[step]]


class Batches(Steps):
    """Batch number s of a run, as one process sees it.

    batch_size counts the samples of a step over all processes and micro-batches; it must divide by
    both and be no larger than the data, else ValueError. An epoch is a fresh permutation; what does
    not fill a batch is left out, because a contrastive loss depends on the batch's size.
    Item s is a list of `accumulate` micro-batches.

    Of `Files`, a record that raises ValueError is replaced by another, and the first micro-batch
    also has "refused", the reasons, and "lost", whether the search for one that can be read was
    given up: then the batch is no good for training.
    """

    def __init__(self, world, collate, *, batch_size, seed=0, rank=0, world_size=1, accumulate=1):
        share = world_size * accumulate
        if batch_size % share:
            raise ValueError(f"batch_size {batch_size} does not divide into {world_size} processes "
                             f"x {accumulate} micro-batches")
        self.world, self.collate, self.seed = world, collate, seed
        self.total, self.rank, self.micro = batch_size, rank, batch_size // share
        self.accumulate, self.steps_per_epoch = accumulate, world.size("train") // batch_size
        self.permuted = None, None       # an epoch and its order
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size {batch_size} is larger than the data "
                             f"({world.size('train')} records in {world.name}); "
                             "--batch_size sets another")

    def keys(self, step):
        """(epoch, record indices) of this process in a step, all micro-batches in a row."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.total + self.rank * self.micro * self.accumulate
        return epoch, self.order(epoch)[first:first + self.micro * self.accumulate].tolist()

    def order(self, epoch):
        """The order of an epoch, int64 (size of train,); the last one asked for is kept."""
        if self.permuted[0] != epoch:
            drawn = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2 ** 63)
            own = getattr(self.world, "order", None)
            self.permuted = epoch, own(drawn) if own else \
                torch.randperm(self.world.size("train"), generator=drawn)
        return self.permuted[1]

    def __getitem__(self, step):
        epoch, indices = self.keys(step)
        draw = self.draw_or_replace if isinstance(self.world, Files) else self.draw
        records, rngs, refused, lost = zip(*[draw(epoch, index) for index in indices])
        parts = [self.collate(records[k:k + self.micro], rngs[k:k + self.micro])
                 for k in range(0, len(records), self.micro)]
        if isinstance(self.world, Files):
            parts[0] |= {"refused": sum(refused, []), "lost": any(lost)}
        return parts

    def draw(self, epoch, index):
        """(record, its rng, reasons of refusals, whether they were too many)."""
        rng = draw_rng(self.seed, epoch, index)
        return self.world.record("train", index, rng), rng, [], False

    def draw_or_replace(self, epoch, index):
        """`draw`, or in the place of a record that cannot be read another of the same epoch.

        Which one is a function of (seed, epoch, index) too. A search that finds none gives the
        record without its pictures, so that all processes can come to the end of the step.
        """
        refused, place, rng = [], index, draw_rng(self.seed, epoch, index)
        for attempt in range(1 + STAND_INS):
            try:
                return self.world.record("train", place, rng), rng, refused, False
            except ValueError as error:
                refused.append(str(error))
            rng = draw_rng(self.seed, epoch, f"{index}/{attempt}")
            place = rng.randrange(self.world.size("train"))
        return self.world.blank("train", index), rng, refused, True


def _begin_worker(worker):
    """One thread. A Ctrl-C asks the training process alone to save and stop; it ends its workers.

    A worker is a copy of that process, so it would also keep its handler and outlive terminate().
    """
    torch.set_num_threads(1)
    if hasattr(os, "setsid"):            # out of the group that a terminal sends its signals to
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EvalData:
    """A world as an evaluation sees it: whole splits of records, batched the model's way."""

    def __init__(self, world, tokenizer, collate, device):
        self.world, self.tokenizer, self.collate, self.device = world, tokenizer, collate, device

    def records(self, split):
        """Every record of a split that can be read."""
        return all_records(self.world, split)

    def ids(self, texts):
        """Texts -> int64 (N, T) on the device."""
        return self.tokenizer.batch(texts, self.collate.context_length).to(self.device)

    def images(self, records):
        """Records -> uint8 (N, 3, H, W) on the device."""
        return self.collate.images(records).to(self.device)


def world_tokenizer(world):
    """The world's own vocabulary, the same in every run. Raises ValueError when it has no words."""
    try:
        return Tokenizer.train(world.corpus(), world.vocab_size)
    except RuntimeError as error:
        raise ValueError(f"{world.name}: no vocabulary can be made of its texts ({printable(error)})") \
            from None
