"""From records to the batches of a run, with any number of workers and processes.

A record is {"images": [picture], "texts": [captions]}, or {"turns": [{"images", "prompt",
"answer"}, ...], "candidates"}: "images" are pictures or clips, each a list of frames; "candidates"
are possible answers to the last turn; the loss does not count a turn with "learn": False. A prompt
or an answer is a text, or a tuple of texts and ids of special tokens. "source" is what the world's
is_true judges by. A world, or `files.Files`, has `size(split)` and `record(split, index, rng)`.
Every random draw is a function of (seed, epoch, index), so step s has the same batch for any number
of workers and processes, and a run can resume at any step.
"""
import inspect
import os
import random
import signal
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from common.data.emoji.world import Emoji
from common.data.files import FORMATS, Files, all_records
from common.data.safe_read import printable
from common.data.shapes.world import Shapes
from common.data.tokenizer import Tokenizer
from common.prompts import CAPTION_PROMPT, QUESTION_PROMPT

WORLDS = {"shapes": Shapes, "emoji": Emoji}
REPLACEMENTS = 20                        # tries to replace a record that cannot be read
MEGABATCH = 8                            # batches of records that are sorted by length together


def open_world(spec, image_size, images=None, skip=0.05, shuffle=10_000, whole=False):
    """The data that --data names: "shapes", "shapes:objects=3,noise=0.1", "emoji" or "coco:FILE".

    images, skip, shuffle, whole: of the user's own files, see `files.Files`. Raises ValueError in
    one line for a world, a dial or a value that does not exist, and for files that cannot be used.
    """
    name, _, dials = spec.partition(":")
    try:
        if name in FORMATS:
            return Files(name, dials, image_size=image_size, images=images, skip=skip,
                         shuffle=shuffle, whole=whole)
        if name not in WORLDS:
            raise ValueError(f"no world {name!r}; there are {', '.join(WORLDS)}, and "
                             + ", ".join(f"{kind}:FILE" for kind in FORMATS))
        if images is not None:
            raise ValueError(f"--images {printable(images)}: {name} draws its own pictures")
        world = WORLDS[name](image_size=image_size, **read_dials(name, dials))
        world.record("train", 0, draw_rng(0, 0, 0))          # impossible dials fail here
        return world
    except ValueError as error:
        raise ValueError(f"--data {printable(spec)}: {error}") from None


def read_dials(name, text):
    """"objects=3,noise=0.1" -> {"objects": 3, "noise": 0.1}, typed as the world's defaults."""
    signature = inspect.signature(WORLDS[name]).parameters
    kinds = {key: type(p.default) for key, p in signature.items() if key != "image_size"}
    values = {}
    for dial in filter(None, text.split(",")):
        key, _, value = dial.partition("=")
        if key not in kinds:
            raise ValueError(f"{name} has no dial {key!r}; it has {', '.join(kinds) or 'none'}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"{key} takes {kinds[key].__name__}, not {value!r}") from None
    return values


def draw_rng(seed, epoch, index):
    """The random.Random of one sample: the same in every process and worker."""
    return random.Random(f"{seed}/{epoch}/{index}")


@dataclass
class DataSource:
    """One data set of a run: where its records come from and what becomes of them.

    share: its parts of a step's samples. weight: the factor of its mean loss in the step's loss.
    kinds: {task: how often}: records are drawn from the world's tasks instead of its captions.
    sizes: {task: how many records it has}, those of the tasks' seeds 0, 1, ...; None: no end.
    split: the split of the world that is read; "web+human" joins two.
    """
    world: object
    collate: object
    share: int = 1
    weight: float = 1.0
    kinds: dict | None = None
    sizes: dict | None = None
    split: str = "train"

    def record(self, index, rng):
        """A training record. Raises ValueError for one of the user's that cannot be read."""
        if self.kinds is None:
            return self.world.record(*self.locate(index), rng)
        kind, = rng.choices(list(self.kinds), weights=self.kinds.values())
        if self.sizes:
            rng = random.Random(f"{kind}/{rng.randrange(self.sizes[kind])}")
        return self.world.task(kind, rng) if kind != "text" else self.world.text(rng)

    def size(self):
        """The number of records in an epoch."""
        return sum(map(self.world.size, self.split.split("+")))

    def locate(self, index):
        """Record number `index` as (split, index in it)."""
        for split in self.split.split("+"):
            if index < self.world.size(split):
                return split, index
            index -= self.world.size(split)


def modality_length_order(lengths, batch_size, generator):
    """LLaVA-1.5's group_by_modality_length: an order of records, int64 (N,), a permutation.

    lengths: N of int, the words of each record, negative for one without pictures. The records with
    pictures and those without are shuffled; of each MEGABATCH batches the longest records come
    first; the batches of both kinds are shuffled together. The few records of each kind that fill
    no batch come last, shuffled together. Raises ValueError for a length of 0.
    """
    lengths = torch.tensor(lengths)
    if not lengths.all():
        raise ValueError(f"record {lengths.tolist().index(0)} has length 0")
    batches, rest = [], []
    for kind in (lengths > 0, lengths < 0):
        group = kind.nonzero().flatten()
        group = group[torch.randperm(len(group), generator=generator)]
        full = len(group) // batch_size * batch_size
        for part in group[:full].split(MEGABATCH * batch_size):
            longest_first = lengths[part].abs().argsort(descending=True, stable=True)
            batches += part[longest_first].split(batch_size)
        rest.append(group[full:])
    rest = torch.cat(rest)
    order = torch.randperm(len(batches), generator=generator)
    return torch.cat([*(batches[place] for place in order),
                      rest[torch.randperm(len(rest), generator=generator)]])


class Batches(torch.utils.data.Dataset):
    """Item s: the micro-batches of step s for this process, `accumulate` of each data set.

    batch_size counts the samples of a step over all data sets, processes and micro-batches; raises
    ValueError when it does not divide, or exceeds the data. An epoch is a fresh permutation; its
    last, incomplete batch is left out, since a contrastive loss depends on the batch's size. Every
    micro-batch has "source", the number of its data set, and "weight".

    A record of the user's that cannot be read is replaced by another one of the epoch; the reasons
    are in the micro-batch's "refused".
    """

    def __init__(self, sources, *, batch_size, seed=0, rank=0, world_size=1, accumulate=1):
        shares = sum(source.share for source in sources)
        if batch_size % (shares * world_size * accumulate):
            raise ValueError(f"batch_size {batch_size} does not divide into {shares} shares of "
                             f"data sets x {world_size} processes x {accumulate} micro-batches")
        self.sources, self.seed, self.rank, self.world_size = sources, seed, rank, world_size
        self.accumulate, self.part = accumulate, batch_size // shares
        for source in sources:
            if source.size() < self.part * source.share:
                raise ValueError(f"batch_size {batch_size} is larger than the data "
                                 f"({source.size()} {source.split} records in "
                                 f"{source.world.name}); --batch_size sets another")
        self.orders = {}                 # {number of a data set: (epoch, its order)}

    def keys(self, number, step):
        """(epoch, record indices) of this process in a step, for data set `number`."""
        source = self.sources[number]
        total = self.part * source.share             # samples of a step, over all processes
        epoch, batch = divmod(step, source.size() // total)
        own = total // self.world_size
        first = batch * total + self.rank * own
        return epoch, self.order(number, epoch)[first:first + own].tolist()

    def order(self, number, epoch):
        """The order of an epoch of data set `number`, int64 (its size,); the last one is kept."""
        source = self.sources[number]
        if self.orders.get(number, (None,))[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2 ** 63)
            world = source.world if source.split == "train" else None
            if getattr(world, "lengths", None):
                total = self.part * source.share
                order = modality_length_order(world.lengths, total, generator)
            elif hasattr(world, "order"):
                order = world.order(generator)
            else:
                order = torch.randperm(source.size(), generator=generator)
            self.orders[number] = epoch, order
        return self.orders[number][1]

    def __getitem__(self, step):
        batches = []
        for number, source in enumerate(self.sources):
            epoch, indices = self.keys(number, step)
            records, rngs, refused = zip(*[self.draw(source, epoch, i) for i in indices])
            size = len(records) // self.accumulate
            for k in range(0, len(records), size):
                batch = source.collate(records[k:k + size], rngs[k:k + size])
                batches.append(batch | {"source": number, "weight": source.weight,
                                        "refused": sum(refused[k:k + size], [])})
        return batches

    def draw(self, source, epoch, index):
        """(record, its rng, reasons why others were refused before it).

        The replacement is a function of (seed, epoch, index), too. After REPLACEMENTS refused ones
        the record comes without its images: the run then stops for too many refused records, at the
        same step in every process.
        """
        refused, place, rng = [], index, draw_rng(self.seed, epoch, index)
        for attempt in range(1 + REPLACEMENTS):
            try:
                return source.record(place, rng), rng, refused
            except ValueError as error:
                if not isinstance(source.world, Files):
                    raise                # a mistake in a world
                refused.append(str(error))
            rng = draw_rng(self.seed, epoch, f"{index}/{attempt}")
            place = rng.randrange(source.size())
        return source.world.blank(*source.locate(index)), rng, refused

    def loader(self, start, stop, workers):
        """Iterate over the steps start .. stop - 1, made by `workers` processes."""
        return DataLoader(self, batch_size=None, sampler=range(start, stop), num_workers=workers,
                          prefetch_factor=4 if workers else None,
                          worker_init_fn=start_worker if workers else None,
                          generator=torch.Generator())    # the default one is the model's


def start_worker(worker):
    """One thread; only the training process gets the terminal's signals and ends its workers.

    A worker is a copy of that process: with its signal handler it would outlive terminate().
    """
    torch.set_num_threads(1)
    if hasattr(os, "setsid"):            # leaves the group that a terminal sends its signals to
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EvalData:
    """A world for model.evaluate: its records, and their texts and images as tensors."""

    def __init__(self, world, tokenizer, collate, device):
        self.world, self.tokenizer, self.collate, self.device = world, tokenizer, collate, device

    def records(self, split):
        """Every readable record of a split."""
        return all_records(self.world, split)

    def ids(self, texts):
        """Texts -> int64 (N, T) on the device."""
        return self.tokenizer.batch(texts, self.collate.context_length).to(self.device)

    def images(self, records):
        """Records -> uint8 (N, 3, H, W) on the device."""
        return self.collate.images(records).to(self.device)


def world_tokenizer(world):
    """The world's vocabulary, the same in every run. Raises ValueError when it has no words."""
    def corpus():
        yield from world.corpus()
        for _ in range(500 if world.name in WORLDS else 0):  # so often that they become pieces
            yield f"{CAPTION_PROMPT} {QUESTION_PROMPT.format('what is it?')}"
    try:
        return Tokenizer.train(corpus(), world.vocab_size)
    except RuntimeError as error:
        raise ValueError(f"{world.name}: no vocabulary can be made of its texts "
                         f"({printable(error)})") from None
