"""A training run: its command line, what it is made of, and taking it up from its folder."""
import contextlib
import dataclasses
import json
import math
import signal
import time
import traceback
import typing
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.data.batches import Batches
from common.data.collators import CaptionBatch, ImageTextBatch, PackedTexts, SplitTexts
from common.data.files import Refusals
from common.data.safe_read import printable
from common.data.tokenizer import Tokenizer
from common.pretrained.files import open_weights
from common.training import checkpoint, distributed
from common.training.options import option
from common.training.run_folder import RunFolder, default_folder, missing_run


@dataclass
class Options:
    """The command line, a flag for each field. None: the stage's recipe decides."""
    preset: str = option("tiny", "size of the model; see the model's file")
    data: str = option("shapes", "a world and its dial: shapes, emoji, shapes:objects=3,noise=0.1; "
                       "or your own: coco:FILE, flickr:FILE, jsonl:FILE, llava:FILE, "
                       "interleaved:FILE, tar:GLOB")
    images: str | None = option(None, "folder of the pictures of --data (default: the file's own)")
    skip: float = option(0.05, "fraction of your records that may be refused before the run stops")
    shuffle: int = option(10_000, "window in which the samples of tar shards are shuffled")
    seed: int = option(0, "of weights, order and draws; never of the test splits")
    steps: int | None = option(None, "optimizer steps")
    batch_size: int | None = option(None, "samples of a step, over all processes and micro-batches")
    lr: float | None = option(None, "peak learning rate")
    optimizer: str | None = option(None, "muon: for the matrices of attention and MLPs, adamw for "
                                   "the rest; or adamw alone", choices=("muon", "adamw"))
    accumulate: int = option(1, "micro-batches of a step; contrastive losses stay exact")
    workers: int | None = option(None, "processes that make batches (default: up to 8 for a GPU, "
                                 "0 for a CPU, the training process itself)")
    save_every: int = option(200, "steps between checkpoints")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "auto: bf16 where the processor multiplies it fast",
                            choices=("auto", "bf16", "fp32"))
    attention: str = option("auto", "the definition by hand, torch's kernel, or the faster of both",
                            choices=("auto", "hand", "fused"))
    compile: bool = option(False, "torch.compile the model")
    losses: str | None = option(None, "what blip learns: itc,itm,lm; lm alone is a captioner, "
                                "itc,itm a filter")
    init: str | None = option(None, "start from this run or these published weights: their sizes, "
                              "vocabulary, context and picture size are kept")
    parts: tuple = option((), "the run of a part, such as vision=RUN or language=RUN (default "
                          "RUNS/clip, RUNS/lm), vision=none for blip; may be given again",
                          flag="from", append=True, metavar="PART=RUN")
    unfreeze: str = option("", "also train the parameters of these patterns, such as lm.*")
    runs: str = option("runs", "where stages find each other")
    out: str | None = option(None, "the run's folder (default RUNS/STAGE, -DATA and -PRESET added)")
    resume: bool = option(False, "continue from the folder's last checkpoint, with the flags that "
                          "the run began with; a larger --steps lengthens it")
    overwrite: bool = option(False, "delete an earlier run in the folder")
    eval_only: bool = option(False, "measure the folder's checkpoint again, train nothing")

    def __post_init__(self):
        self.parts = tuple(self.parts)
        # The flags of the command line; train.py adds those that repeat a default.
        self.given = {field.name for field in dataclasses.fields(self)
                      if getattr(self, field.name) != field.default}

    def check_counts(self):
        """Raise ValueError for a number that no run can have."""
        for key, least in (("accumulate", 1), ("save_every", 1), ("workers", 0)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"--{key} {getattr(self, key)}: must be at least {least}")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"--seed {self.seed}: a number from 0 to {2 ** 63 - 1}")


@dataclass
class Run:
    """Everything a run is made of, and where it stands."""
    name: str
    stage: object                        # its row of train.py's table
    options: Options
    folder: RunFolder
    device: torch.device
    half: bool                           # bf16 autocast
    world: object
    tokenizer: object
    config: object
    recipe: object
    batches: Batches
    model: torch.nn.Module
    optimizer: object
    table: str                           # what is trained and what is frozen
    began: float
    given: tuple = ()                    # modules that have the weights of another run already
    step: int = 0
    seconds: float = 0.0                 # of earlier sittings
    saved: int | None = None             # the step of the last checkpoint
    loss: float = math.nan
    refused: Refusals | None = None      # records of the user's own that could not be read
    stopped: int | None = None           # the signal that stops the run
    measuring: bool = False

    def elapsed(self):
        """Wall seconds, earlier sittings included."""
        return self.seconds + time.time() - self.began


def with_start(stage, options):
    """The options with the run that the stage starts from; --init none: from its parts alone."""
    if not stage.init:
        return options
    init = options.init or str(default_folder(stage.init, options))
    return dataclasses.replace(options, init=None if init == "none" else init)


def take_up(name, stage, options, folder):
    """(options, config.json of the run in the folder, or None where none is continued).

    What the command line leaves out is as the run began. Raises ValueError for another stage's run.
    """
    given, options = options.given, with_start(stage, options)
    own = folder.described() if options.resume or options.eval_only else None
    if own is None:
        return options, None
    checkpoint.of_model(own, stage.file.__name__, folder.path)
    folder.check_same({"stage": name})
    began, kinds = own.get("options"), typing.get_type_hints(Options)
    began = {key: tuple(value) if isinstance(value, list) else value
             for key, value in (began if isinstance(began, dict) else {}).items()}
    return dataclasses.replace(options, **{
        key: value for key, value in began.items()
        if key in kinds and key not in given and isinstance(value, kinds[key])}), own


def open_any(file, path, *messages):
    """A run of a stage's file, or published weights -> (config dict, tokenizer, weights)."""
    readers = (getattr(place, name, None) for place in (file, getattr(file, "pretrained", None))
               for name in ("read_part", "read"))
    return open_weights(path, file.__name__, next(filter(None, readers), None), *messages)


def open_start(stage, name, options, folder, own):
    """The config that a run starts from, and its tokenizer or None: the preset's, or --init's.

    own: config.json of a run that is continued; it has a copy of all that it began with.
    """
    file, preset = stage.file, stage.file.PRESETS[options.preset]
    if own:
        fields, tokenizer = own.get("config"), checkpoint.open_tokenizer(folder.path)
    elif options.init:
        fields, tokenizer, _ = open_any(
            file, options.init, "--init",
            missing_run(stage.init or name, file.PRESETS, options, options.init))
    else:
        return preset, None
    return checkpoint.config_of(type(preset), fields, options.init or folder.path), tokenizer


def open_parts(stages, name, options, config, folder, own, tokenizer=None):
    """The config with its parts' configs, {module: (weights, folder)}, and their tokenizer or None.

    A run that is continued (own: its config.json) has all of them itself, but no weights before its
    first checkpoint. `--from PART=none` leaves out a part that the stage can do without; so does
    --init. A missing run is a ValueError that names the command that makes it.
    """
    stage = stages[name]
    given = dict(part.partition("=")[::2] for part in options.parts)
    for part, run in given.items():
        if part not in stage.parts or not run:
            raise ValueError(f"--from {part}={run}: write PART=RUN with one of "
                             f"{', '.join(stage.parts) or 'no parts'}")
    frozen = {}
    for part, (source, module, *prefix) in stage.parts.items():
        if own and folder.has_checkpoint() or part in stage.optional and (
                given.get(part) == "none" or options.init and part not in given):
            continue
        file, wanted = stages[source].file, dataclasses.replace(
            options, preset="-".join([*prefix, options.preset]))
        where = given.get(part) or default_folder(source, wanted)
        fields, known, weights = open_any(
            file, where, f"--from {part}={where}:",
            missing_run(source, file.PRESETS, wanted, where))
        if prefix and fields.get("kind") not in prefix:
            raise ValueError(f"--from {part}={where}: a {fields.get('kind')}; {name} needs a "
                             f"{prefix[0]}")
        frozen[module] = weights, where
        if tokenizer and part == "language" and tokenizer.model != known.model and \
                getattr(config, "asks_qformer", False):
            raise ValueError(f"--from language={where}: another vocabulary than that of "
                             f"{options.init}, with which the Q-Former reads questions")
        if not own:                      # a published image encoder's vocabulary is for its texts
            if part == "language" or tokenizer is None and type(known) is Tokenizer:
                tokenizer = known
            config = dataclasses.replace(config, **{part: fields})
    return config, frozen, tokenizer


def describe(run):
    """What config.json says: all that a resumed run must share with the one that began."""
    keys = ["preset", "data", "seed", "accumulate", "init", "unfreeze"]
    keys += ["images", "shuffle"] * bool(run.refused) + ["parts"] * bool(run.options.parts)
    options = {key: getattr(run.options, key) for key in keys}
    options["precision"] = "bf16" if run.half else "fp32"
    if run.refused:
        options["records"] = {split: run.world.size(split) for split in ("train", "test")}
    return json.loads(json.dumps({
        "model": run.stage.file.__name__, "stage": run.name, "options": options,
        "config": dataclasses.asdict(run.config), "recipe": dataclasses.asdict(run.recipe)}))


def count_cut(run):
    """What the context cuts of the user's captions, in one line; None where nothing is cut."""
    collate = run.batches.sources[0].collate
    if type(collate) not in (ImageTextBatch, CaptionBatch, PackedTexts, SplitTexts):
        return None                      # a model's own wording decides what fits
    texts, most = [*run.world.corpus()], getattr(collate, "length", collate.context_length) - 2
    count = sum(len(run.tokenizer.encode(text)) > most for text in texts)
    return f"{count:,} of {len(texts):,} captions are cut after {most} tokens" if count else None


def restore(run):
    """Begin in an empty folder, or restore its checkpoint, as --resume and --overwrite say."""
    options, folder = run.options, run.folder
    if options.overwrite and (options.resume or options.eval_only):
        raise ValueError("--overwrite deletes the run that --resume and --eval_only need")
    state = folder.claim(options.resume or options.eval_only, options.overwrite)
    if options.eval_only and state is None:
        raise ValueError(f"{folder.path}: no checkpoint to measure")
    if state is not None:
        lengthened = describe(run)
        before, steps = folder.described().get("recipe", {}).get("steps", 0), run.recipe.steps
        if steps > before and not options.eval_only:
            if state["step"] >= before:
                raise ValueError(f"--steps {steps}: the run in {folder.path} has ended after "
                                 f"{before}; --init {folder.path} starts another from it")
            lengthened["recipe"]["steps"] = before
        folder.check_same(lengthened, without="recipe" if options.eval_only else None)
        checkpoint.load_weights(run.model, state["model"], folder.path)
        try:
            run.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            run.step = run.saved = state["step"]
            run.seconds = state["schedule"]["seconds"]
            run.loss = state["schedule"]["loss"]
            if run.refused:
                run.refused.count = state["data"]["refused"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder.path}: a checkpoint that cannot be resumed ({error})") \
                from None
        if distributed.rank() == 0:
            print(f"resumed from step {run.step}")
    elif options.init:
        weights = open_any(run.stage.file, options.init)[2]
        weights = run.model.adapt(weights) if hasattr(run.model, "adapt") else weights
        weights |= {name: value for name, value in run.model.state_dict().items()
                    if name.startswith(tuple(f"{part}." for part in run.given))}
        checkpoint.load_weights(run.model, weights, options.init)
    if not options.eval_only:
        folder.begin(describe(run), run.tokenizer, run.step, options.overwrite)


def save(run):
    """Write a checkpoint. Batches and crops need no state: they follow from seed and step."""
    run.saved = run.step
    run.folder.save({
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "step": run.step,
        "schedule": {"seconds": run.elapsed(), "loss": run.loss}, "rng": torch.get_rng_state(),
        "data": {"seed": run.options.seed, "refused": run.refused.count if run.refused else 0}})


def check(run, losses, refused):
    """Set run.loss to the mean of recent losses -> whether a process was told to stop.

    Raises ValueError when the loss is not finite, or when too many records were refused. Every
    process computes and raises the same.
    """
    shared = distributed.mean({"loss": torch.stack(losses).mean().item(), "refused": len(refused),
                               "stopped": run.stopped is not None}, run.device)
    run.loss = shared["loss"]
    if run.refused:
        for reason in distributed.all_gather_objects(refused) if shared["refused"] else []:
            run.refused.add(reason)
            if run.refused.count <= 3 and distributed.rank() == 0:
                tqdm.write(f"refused: {printable(reason)}")
        run.refused.check(run.step * run.recipe.batch_size + run.refused.count)
    if not math.isfinite(run.loss):
        kept = "there is no checkpoint yet" if run.saved is None else \
            f"the checkpoint of step {run.saved} stays in {run.folder.path}"
        raise ValueError(f"the loss or its gradient is {run.loss} at step {run.step}; {kept}; try "
                         "a smaller --lr")
    return shared["stopped"] > 0


@contextlib.contextmanager
def stop_on_signals(run):
    """Within it SIGINT and SIGTERM set run.stopped; while measuring they end the block at once.
    A killed worker process is a ValueError."""
    def stop(number, frame):
        run.stopped = number
        if run.measuring:                # nothing is left to save
            raise KeyboardInterrupt
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    except (ValueError, RuntimeError) as error:        # its frames hold the DDP model, which would
        traceback.clear_frames(error.__traceback__)    # wait for a process group that is gone
        if str(error).startswith("DataLoader worker (pid"):
            raise ValueError(f"a worker process was killed at step {run.step}, perhaps for want of "
                             "memory; --resume continues from the last checkpoint, --workers 0 "
                             "needs no worker") from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
