"""Train any stage: python train.py STAGE [flags]. One process, or torchrun for several.

    python train.py clip                                       about 2 minutes on 2 CPU cores
    python train.py clip --data emoji                          real pictures and names
    python train.py lm && python train.py flamingo             what Flamingo freezes, then Flamingo
    python train.py clip --data jsonl:captions.jsonl           your own; see common/formats.py
    python train.py clip --resume                              go on after a stop or a kill
    torchrun --nproc_per_node=2 train.py clip --out runs/two   the same run on two processes
    python train.py clip --set loss=sigmoid --batch_size 64    any field of the model's config
    python train.py --list                                     the stages

A run folder holds config.json, tokenizer.model, log.jsonl, last.pt and previous.pt, result.json and
samples.png; the last line printed is the result.
"""
import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import common                            # noqa: F401  first: it sets how torch's threads wait
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import clip
import flamingo
from common.training import checkpoint, distributed, lm, options as cli
from common import transformer
from common.training.options import option
from common.data.batches import (STAND_INS, Batches, Drawn, Mixture, ImageTextBatch, PackedTexts, EvalData, open_world,
                         world_tokenizer)
from common.training.devices import autocast, find_device, half_precision, peak_memory, to_device
from common.data.files import FORMATS, Files, Refusals
from common.data.safe_read import printable
from common.training.run_folder import RunFolder
from common.data.tokenizer import EOS, PAD

BEGAN = time.time()


# ------------------------------------------------------------------ stages

@dataclass
class Recipe:
    """How a stage is optimised: AdamW, linear warm-up, then a cosine to zero."""
    steps: int
    batch_size: int
    lr: float
    warmup: int = 100                    # steps
    decay: float = 0.2                   # on matrices alone, not on gains, biases and scalars
    betas: tuple = (0.9, 0.98)
    eps: float = 1e-6
    clip: float = 1.0                    # norm of the gradient
    undecayed: tuple = ()                # patterns of matrices that do not decay either
    fast: tuple = ()                     # patterns of what learns 10 times as fast


@dataclass
class Stage:
    """A row of the table: a model, the file it stands in, its recipes by preset and data."""
    about: str
    file: object                         # the module: PRESETS, TRAINS
    model: type
    recipes: dict                        # "preset data", "preset" -> Recipe
    feeds: object                        # (world, tokenizer, config) -> [(source, collate, share)]
    parts: dict = dataclasses.field(default_factory=dict)    # frozen: field -> (stage, module)


def pairs(world, tokenizer, config):
    """Pictures with a text each."""
    return [(world, ImageTextBatch(tokenizer, config.context_length, config.image_size), 1)]


def texts(world, tokenizer, config):
    """What the world gives to read, else its captions; rows of 80 tokens."""
    source = Drawn(world, functools.partial(reading, world)) if hasattr(world, "reading") else world
    return [(source, PackedTexts(tokenizer, config.context_length, 80), 1)]


def reading(world, split, rng):
    """A record to read; a function that can be sent to the processes that make batches."""
    return {"texts": [world.reading(rng)]}


# The paper's own: 32 epochs of 400M pairs (its appendix F), of a ResNet with Adam's usual numbers.
PAPER = Recipe(steps=390000, batch_size=32768, lr=5e-4, warmup=2000)
RESNET = {"betas": (0.9, 0.999), "eps": 1e-8}

STAGES = {
    "clip": Stage("picture and text towers, contrastive (CLIP; --set loss=sigmoid: SigLIP)",
                  clip, clip.CLIP, {
                      "tiny": Recipe(steps=1100, batch_size=256, lr=1e-3),
                      "tiny emoji": Recipe(steps=900, batch_size=256, lr=1e-3, decay=2.0),
                      "small": Recipe(steps=6000, batch_size=1024, lr=5e-4, warmup=500),
                      "RN-tiny": Recipe(steps=700, batch_size=256, lr=1e-3, **RESNET),
                      **{name: dataclasses.replace(PAPER, **RESNET)
                         for name in clip.PRESETS if name.startswith("RN") and "-" not in name},
                      "": PAPER}, pairs),
    "lm": Stage("a language model on the world's texts, for the stages that freeze one",
                lm, lm.Pretraining, {
                    "": Recipe(steps=4000, batch_size=64, lr=3e-3, decay=0.1, betas=(0.9, 0.95),
                               eps=1e-8)}, texts),
    "flamingo": Stage("a resampler and gated blocks between a frozen CLIP and a frozen LM",
                      flamingo, flamingo.Flamingo, {
                          "": Recipe(steps=750, batch_size=160, lr=1.5e-3, decay=0.1, eps=1e-8,
                                     undecayed=("resampler.*",), fast=("*_gate",))},
                      flamingo.feeds, {"vision": ("clip", "vision"), "language": ("lm", "lm")}),
}
LISTS = {"all": ["clip", "lm", "flamingo"]}


@dataclass
class Options:
    """The command line; a flag each. None: the stage's recipe decides."""
    preset: str = option("tiny", "size of the model; see the model's file")
    data: str = option("shapes", "a world and its dial: shapes, emoji, shapes:objects=3,noise=0.1; "
                       "or your own: coco:FILE, flickr:FILE, jsonl:FILE, tar:GLOB")
    images: str | None = option(None, "folder of the pictures of --data (default: the file's own)")
    skip: float = option(0.05, "fraction of your records that may be refused before the run stops")
    shuffle: int = option(10_000, "window in which the samples of tar shards change places")
    seed: int = option(0, "of weights, order and draws; never of the test splits")
    steps: int | None = option(None, "optimizer steps")
    batch_size: int | None = option(None, "samples of a step, over all processes and micro-batches")
    lr: float | None = option(None, "peak learning rate")
    accumulate: int = option(1, "micro-batches of a step; contrastive losses stay exact")
    workers: int | None = option(None, "processes that make batches (default: on a GPU up to 8, on "
                                 "a CPU 0, the training process itself)")
    save_every: int = option(200, "steps between checkpoints")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "auto: bf16 where the processor multiplies it fast",
                            choices=("auto", "bf16", "fp32"))
    attention: str = option("auto", "the definition by hand, torch's kernel, or the faster of both",
                            choices=("auto", "hand", "fused"))
    compile: bool = option(False, "torch.compile the model")
    init: str | None = option(None, "start from the weights of this run")
    vision: str | None = option(None, "the run whose vision tower is used (default RUNS/clip)")
    language: str | None = option(None, "the run whose language model is used (default RUNS/lm)")
    unfreeze: str = option("", "also train the parameters of these patterns, such as lm.*")
    runs: str = option("runs", "where stages find each other")
    out: str | None = option(None, "the run's folder (default RUNS/STAGE, -DATA and -PRESET added)")
    resume: bool = option(False, "go on from the folder's last checkpoint")
    overwrite: bool = option(False, "throw an earlier run in the folder away")
    eval_only: bool = option(False, "measure the folder's checkpoint again, train nothing")


# ------------------------------------------------------------------ pieces of a run

def freeze(model, patterns):
    """Train the parameters that match a pattern, freeze the rest; returns a table to print.

    A module without a trained parameter is put into eval mode, else into train mode: BatchNorm's
    statistics, too, stay as they are where its gains do.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    rows = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(name.split(".")[0], [0, 0])
        row[not parameter.requires_grad] += parameter.numel()
    for module in model.modules():       # from the outside in: the inner ones have the last word
        parameters = list(module.parameters())
        if parameters:
            module.train(any(p.requires_grad for p in parameters))
    return "\n".join(f"  {name:18s} {trained + frozen:>12,d}  "
                     + ("trained" if not frozen else "frozen" if not trained else
                        f"{trained:,d} trained") for name, (trained, frozen) in rows.items())


def parameter_groups(model, decay, undecayed=(), fast=()):
    """AdamW groups of what is trained: matrices decay; gains, biases and scalars do not.

    undecayed: patterns of names of matrices that do not either. fast: patterns of names whose
    learning rate is 10 times the others' ("times" of their group).
    """
    def fits(name, patterns):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = p.ndim >= 2 and not fits(name, undecayed), fits(name, fast)
            groups.setdefault(key, []).append(p)
    return [{"params": groups[key], "weight_decay": decay if key[0] else 0.0,
             "times": 10.0 if key[1] else 1.0} for key in sorted(groups, reverse=True)]


def learning_rate(recipe, step):
    """Linear from 0 to lr over warmup steps, then half a cosine down to 0 at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (1 + math.cos(math.pi * done)) / 2


# ------------------------------------------------------------------ a run

class Run:
    """One training run: what it is made of, where it stands, its folder."""

    def __init__(self, name, options, settings, began=None):
        """name: a stage of STAGES. settings: key=value fields of the model's config.

        began: when the run's clock started (default now). Raises ValueError, before anything is
        written, for whatever the user got wrong.
        """
        self.name, self.options, self.stage = name, options, STAGES[name]
        self.began = began or time.time()
        self.device = distributed.start(find_device(options.device))
        self.half = half_precision(options.precision, self.device)
        transformer.ATTENTION = options.attention
        if options.preset not in self.stage.file.PRESETS:
            raise ValueError(f"--preset {options.preset}: {name} has "
                             + ", ".join(self.stage.file.PRESETS))
        for setting in settings:
            if setting.partition("=")[0] in ("vocab_size", "eos_id"):
                raise ValueError(f"--set {setting}: it belongs to the world's tokenizer")
        config = cli.changed(self.stage.file.PRESETS[options.preset], settings)
        self.folder = RunFolder(options.out or self.default_folder())
        config, self.frozen, self.tokenizer = self.open_parts(config)
        self.world = open_world(options.data, getattr(config, "image_size", 32), options.images,
                                options.skip, options.shuffle)
        self.tokenizer = self.tokenizer or world_tokenizer(self.world)
        own = {"vocab_size": len(self.tokenizer), "eos_id": EOS, "pad_id": PAD}
        self.config = dataclasses.replace(
            config, **{key: own[key] for key in own if hasattr(config, key)})
        self.recipe = self.find_recipe()
        self.batches, self.collate = self.open_feeds()
        self.workers = options.workers
        if self.workers is None:         # on a CPU a worker takes the core that training waits for
            self.workers = 0 if self.device.type == "cpu" else min(8, (os.cpu_count() or 2) - 1)
        self.model, self.optimizer, self.table = self.open_model(" ".join(settings))
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.kept, self.stopped, self.measuring = None, None, False
        self.refused = Refusals(options.skip) if isinstance(self.world, Files) else None

    def open_parts(self, config):
        """The config with those of the frozen parts, their weights, and the tokenizer they know.

        A run that goes on has all of this itself. Returns (config, {module: (weights, folder)},
        Tokenizer or None); a missing run is a ValueError that names the command that makes it.
        """
        weights, tokenizer = {}, None
        goes_on = (self.options.resume or self.options.eval_only) and self.folder.described()
        if goes_on:
            checkpoint.of_model(goes_on, self.stage.file.__name__, self.folder.path)
        for field, (stage, module) in self.stage.parts.items():
            if goes_on:
                own, known = goes_on["config"][field], self.folder.tokenizer()
            else:
                where = getattr(self.options, field) or self.default_folder(stage)
                own, known, part = checkpoint.open_run(
                    where, STAGES[stage].file.__name__, f"--{field}", self.command(stage, where))
                weights[module] = part, where
            tokenizer = known if field == "language" else tokenizer or known
            config = dataclasses.replace(config, **{field: own})
        return config, weights, tokenizer

    def command(self, stage, where):
        """What makes the run of another stage that was looked for in a folder."""
        preset = self.options.preset
        flags = [f"--data {self.options.data}"] if self.options.data != "shapes" else []
        if preset != "tiny" and preset in STAGES[stage].file.PRESETS:
            flags.append(f"--preset {preset}")
        return " ".join(["python train.py", stage, *flags, f"--out {where}"])

    def open_model(self, settings):
        """The model on its device, its optimizer, and the table of what is trained and frozen."""
        options, recipe = self.options, self.recipe
        torch.manual_seed(options.seed)
        try:
            model = self.stage.model(self.config).to(self.device)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"--preset {options.preset} {settings}: {error}") from None
        for module, (weights, where) in self.frozen.items():
            checkpoint.load_part(model, module, weights, where)
        more = tuple(filter(None, options.unfreeze.split(",")))
        table = freeze(model, self.stage.file.TRAINS[self.name] + more)
        groups = parameter_groups(model, recipe.decay, recipe.undecayed, recipe.fast)
        return model, torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps,
                                        fused=True), table

    def open_feeds(self):
        """The batches of every step, of one data set or of several, and the first one's collate.

        A step's samples are shared out among the data sets as the stage says.
        """
        feeds = self.stage.feeds(self.world, self.tokenizer, self.config)
        whole, size = sum(share for _, _, share in feeds), self.recipe.batch_size
        pieces = self.options.accumulate * distributed.world_size()
        if len(feeds) > 1 and size % (whole * pieces):
            raise ValueError(f"batch_size {size} does not divide into the {whole} parts of "
                             f"{self.name}'s data sets x {self.options.accumulate} micro-batches x "
                             f"{distributed.world_size()} processes")
        parts = [Batches(source, collate, batch_size=size * share // whole, seed=self.options.seed,
                         rank=distributed.rank(), world_size=distributed.world_size(),
                         accumulate=self.options.accumulate) for source, collate, share in feeds]
        return parts[0] if len(parts) == 1 else Mixture(parts), feeds[0][1]

    def find_recipe(self):
        """The recipe of preset and data, or of the preset, or the paper's; flags go before it.

        Raises ValueError for a number, of the recipe or beside it, that no run can have.
        """
        options, recipes = self.options, self.stage.recipes
        for name in ("steps", "batch_size", "accumulate", "save_every", "workers"):
            value, least = getattr(options, name), 0 if name == "workers" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: must be at least {least}")
        if options.lr is not None and not 0 < options.lr < math.inf:
            raise ValueError(f"--lr {options.lr}: must be more than 0")
        keys = (f"{options.preset} {options.data.partition(':')[0]}", options.preset, "")
        recipe = next(recipes[key] for key in keys if key in recipes)
        given = {name: getattr(options, name) for name in ("steps", "batch_size", "lr")}
        recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
        return dataclasses.replace(recipe, warmup=min(recipe.warmup, recipe.steps // 5))

    def default_folder(self, stage=None):
        """RUNS/STAGE, with what is not the default added, so that no run hides another."""
        parts = [stage or self.name]
        data, (kind, _, where) = self.options.data, self.options.data.partition(":")
        if kind in FORMATS:              # of a long path the file, of shards the folder
            where = Path(where).absolute()
            data = f"{kind}-{where.parent.name if kind == 'tar' else where.stem}"
        parts += [] if data == "shapes" else [data]
        parts += [] if self.options.preset == "tiny" else [self.options.preset]
        safe = ["".join(c if c.isalnum() or c in ".=@" else "-" for c in part) for part in parts]
        return Path(self.options.runs) / "-".join(safe)

    # -------------------------------------------------------------- the folder

    def described(self):
        """What config.json says: all that a resumed run must share with the one that began."""
        keep = ("preset", "data", "seed", "accumulate", "precision", "init", "unfreeze")
        own = {}
        if self.refused:
            own = {"images": self.options.images, "shuffle": self.options.shuffle,
                   "records": {split: self.world.size(split) for split in ("train", "test")}}
        return {"model": self.stage.file.__name__, "stage": self.name,
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
                "recipe": json.loads(json.dumps(dataclasses.asdict(self.recipe))),
                "options": {name: getattr(self.options, name) for name in keep} | own | {
                    "precision": "bf16" if self.half else "fp32"}}

    def open_folder(self):
        """Begin in an empty folder or take up the run in it, as --resume and --overwrite say."""
        options = self.options
        if options.overwrite and (options.resume or options.eval_only):
            raise ValueError("--overwrite throws the run away that --resume and --eval_only need")
        state = self.folder.claim(options.resume or options.eval_only, options.overwrite)
        if options.eval_only and state is None:
            raise ValueError(f"{self.folder.path}: no checkpoint to measure")
        if state is not None:
            self.restore(state)
        elif options.init:
            _, _, weights = checkpoint.open_run(options.init, self.stage.file.__name__, "--init",
                                                self.command(self.name, options.init))
            checkpoint.load_weights(self.model, weights, options.init)
        if not options.eval_only:
            self.folder.begin(self.described(), self.tokenizer, self.step, options.overwrite)
            if self.refused and self.step == 0:
                self.folder.refuse(0, self.world.refused.reasons)

    def restore(self, state):
        """Take up a checkpoint. Raises ValueError when this command describes another run."""
        parts = ["model", "stage", "options", "config"]
        parts += [] if self.options.eval_only else ["recipe"]
        self.folder.agree(self.described(), parts)
        checkpoint.load_weights(self.model, state["model"], self.folder.path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step = self.kept = state["step"]
            self.seconds, self.loss = (state["schedule"][name] for name in ("seconds", "loss"))
            if self.refused:
                self.refused.count = state["data"]["refused"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder.path}: a checkpoint that cannot be resumed "
                             f"({error})") from None
        if distributed.rank() == 0:
            print(f"resumed from step {self.step}")

    def save(self):
        """Keep weights, optimizer and step: there is no more, every draw follows from them."""
        self.kept = self.step
        self.folder.save({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": {"seconds": self.elapsed(), "loss": self.loss}, "step": self.step,
            "rng": torch.get_rng_state(), "data": {"seed": self.options.seed} | (
                {"refused": self.refused.count} if self.refused else {})})

    def elapsed(self):
        """Wall seconds of the run, earlier sittings included."""
        return self.seconds + time.time() - self.began

    # -------------------------------------------------------------- the loop

    def update(self, forward, batches):
        """One optimizer step over the micro-batches -> the loss, a tensor on the device."""
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        batches = [to_device(batch, self.device) for batch in batches]
        parts = [None]
        if len(batches) > 1:
            with autocast(self.device, self.half):
                parts = self.model.accumulate(batches, distributed.gather)
        total = 0.0
        for number, (batch, part) in enumerate(zip(batches, parts)):
            # DDP adds up the gradients of all processes in the last backward of a step alone.
            quiet = forward.no_sync if number + 1 < len(batches) and hasattr(forward, "no_sync") \
                else contextlib.nullcontext
            with quiet():
                with autocast(self.device, self.half):
                    loss = sum(forward(batch, gather=distributed.gather, cached=part).values())
                loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.after_step(self.step)
        return total + 0 * norm          # NaN, too, when the loss is finite but its gradient is not

    def fit(self):
        """Train to the last step, or until a signal stops it; saves at the end either way."""
        forward = torch.compile(self.model) if self.options.compile else self.model
        if distributed.world_size() > 1:
            # What is unfrozen by name may hold a parameter that this model never reads.
            forward = DistributedDataParallel(
                forward, device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=bool(self.options.unfreeze))
        every = 1 if self.device.type == "cpu" else 10     # reading a number waits for the GPU
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.name, unit="step",
                   disable=distributed.rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 20)
        losses, refused, waited, mark = [], [], 0.0, time.time()
        with bar:
            for batches in self.batches.loader(self.step, self.recipe.steps, self.workers):
                waited += time.time() - mark
                refused += [(b.pop("refused", []), b.pop("lost", False)) for b in batches]
                losses.append(self.update(forward, batches))
                self.step += 1
                bar.update()
                last = self.step == self.recipe.steps
                saving = last or self.step % self.options.save_every == 0
                if self.step % every == 0 or saving:
                    stop = distributed.any_rank(self.stopped is not None, self.device)
                    self.check(losses, refused)
                    losses, refused = [], []
                    bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
                    if self.step % 10 == 0 or last:
                        self.folder.log({"step": self.step, "loss": round(self.loss, 5),
                                         "lr": self.optimizer.param_groups[0]["lr"],
                                         "seconds": round(self.elapsed(), 2),
                                         "waited": round(waited, 2), **self.passed_over()})
                    if saving or stop:
                        self.save()
                    if stop:             # all end alike, whichever process was told to
                        self.stopped = self.stopped or signal.SIGTERM
                        break
                mark = time.time()

    def check(self, losses, refused=()):
        """self.loss becomes the mean since the last look; ValueError when it is not finite.

        refused: since then, for each micro-batch (reasons, lost), as `Batches` says; also a
        ValueError when too many records are. Every process learns the same and raises the same.
        """
        mean = torch.stack(losses).mean().item()
        reasons, lost = sum((part[0] for part in refused), []), any(part[1] for part in refused)
        shared = distributed.mean({"loss": mean, "refused": len(reasons), "lost": lost},
                                  self.device)
        self.loss = shared["loss"]
        if shared["refused"]:
            self.pass_over(distributed.all_gather_objects(reasons), shared["lost"])
        if not math.isfinite(self.loss):
            kept = "there is no checkpoint yet" if self.kept is None else \
                f"the checkpoint of step {self.kept} stays in {self.folder.path}"
            raise ValueError(f"the loss or its gradient is {self.loss} at step {self.step}; "
                             f"{kept}; try a smaller --lr")

    def pass_over(self, reasons, lost):
        """Count refused records, write them down; ValueError when they are too many."""
        for reason in reasons:
            self.refused.add(reason)
            if self.refused.count <= 3 and distributed.rank() == 0:
                tqdm.write(f"refused: {printable(reason)}")
        self.folder.refuse(self.step, reasons)
        there = f"; {self.folder.path / 'refused.jsonl'} lists them"
        try:
            self.refused.check(self.step * self.recipe.batch_size + self.refused.count)
        except ValueError as error:
            raise ValueError(f"{error}{there}") from None
        if lost:
            raise ValueError(f"no readable record among {STAND_INS} drawn in a row, the last: "
                             f"{self.refused.reasons[-1]}{there}")

    def passed_over(self):
        """{"refused": how often a record was, at the start, in training and in the test split}."""
        if not self.refused:
            return {}
        return {"refused": self.world.refused.count + self.refused.count
                + self.world.unreadable("test").count}

    def finish(self):
        """Measure the trained model; writes result.json and samples.png, prints the result."""
        if distributed.rank() > 0:
            return
        self.model.eval()
        view = EvalData(self.world, self.tokenizer, self.collate, self.device)
        with autocast(self.device, self.half):
            figures = self.model.evaluate(view)
            self.model.samples(view).save(self.folder.path / "samples.png")
        parameters = list(self.model.parameters())
        result = {"stage": self.name, "seconds": round(self.elapsed(), 1),
                  "peak_memory_mb": round(peak_memory(self.device)),
                  "parameters": sum(p.numel() for p in parameters),
                  "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
                  "steps": self.step, "loss": round(self.loss, 4), **self.passed_over()}
        result |= {name: round(value, 4) for name, value in figures.items()}
        checkpoint.write_json(self.folder.path / "result.json", result)
        if result.get("refused"):
            self.folder.refuse(self.step, self.world.unreadable("test").reasons)
            print(f"refused: {result['refused']:,} in all; {self.folder.path / 'refused.jsonl'} "
                  "lists them")
        print(f"pictures: {self.folder.path / 'samples.png'}")
        print("result:", json.dumps(result))


def train(name, options, settings=(), began=None):
    """Run one stage; returns the exit status: 0, or 128 + the signal that stopped it."""
    run = Run(name, options, list(settings), began)
    run.open_folder()

    def stop(number, frame):
        run.stopped = number
        if run.measuring:                # nothing is left to save
            raise KeyboardInterrupt
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if distributed.rank() == 0:
            print(f"{name}: {run.recipe.steps} steps of {run.recipe.batch_size} on {run.device} "
                  f"in {'bf16' if run.half else 'fp32'}, in {run.folder.path}\n{run.table}")
            if run.refused and run.world.refused.count:
                print(f"{run.world.name}: {run.world.refused.summary(run.world.tried)}")
        if not options.eval_only:
            run.fit()
        if run.stopped is None:
            run.measuring = True
            run.finish()
    except KeyboardInterrupt:
        pass
    except ValueError as error:          # its frames hold the model that DDP wrapped, which would
        traceback.clear_frames(error.__traceback__)        # wait for a group that is gone already
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if run.stopped is not None and distributed.rank() == 0:
        print(f"stopped by {signal.Signals(run.stopped).name} at step {run.step}, saved; "
              "the same command with --resume goes on")
    return 128 + run.stopped if run.stopped else 0


def main():
    """Read the command line and run a stage, or a list of them in a row."""
    parser = cli.parser(__doc__)
    parser.add_argument("stage", nargs="?", metavar="STAGE",
                        help="one of " + ", ".join([*STAGES, *LISTS]))
    parser.add_argument("--list", action="store_true", help="show the stages and end")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="any field of the model's config; may be given again")
    cli.add_options(parser, Options)
    values = vars(parser.parse_args())
    name, listing, settings = (values.pop(key) for key in ("stage", "list", "settings"))
    if listing:
        for key, stage in STAGES.items():
            print(f"{key:16s} {stage.about}\n{'':16s} presets: {', '.join(stage.file.PRESETS)}")
        return 0
    if name not in STAGES and name not in LISTS:
        raise ValueError(f"{f'no stage {name}' if name else 'which stage?'}; there are "
                         + ", ".join([*STAGES, *LISTS]))
    if name in LISTS and values["out"]:
        raise ValueError("--out is one run's folder; the stages of a list go to --runs")
    began = BEGAN
    try:
        for stage in LISTS.get(name, [name]):
            status = train(stage, Options(**values), settings, began)
            if status:
                return status
            began = time.time()
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    cli.run(main)
