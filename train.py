"""Train any stage: python train.py STAGE [flags]. One process, or torchrun for several.

    python train.py clip                                       about 90 seconds on 2 CPU cores
    python train.py lm && python train.py flamingo             what Flamingo freezes, then Flamingo
    python train.py blip                                       from the image encoder of that CLIP
    python train.py blip2-stage1 && python train.py blip2-stage2      a Q-Former between both
    python train.py clip --data jsonl:captions.jsonl           your own; see common/data/files.py
    python train.py clip --init CLIP --data jsonl:mine.jsonl   from a run or published weights
    python train.py clip --resume                              continue after a stop or a kill
    python train.py all --resume                               every model, then all compared
    torchrun --nproc_per_node=2 train.py clip --out runs/two   the same run on two processes
    python train.py clip --set loss=sigmoid --batch_size 64    any field of the model's config
    python train.py flamingo --from language=runs/my-lm        a part from another run

A run folder holds config.json, tokenizer.model (of published weights their own kind), log.jsonl,
last.pt and previous.pt, result.json and samples.png; the last line printed is the result.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common                            # noqa: F401  first: it sets how torch's threads wait
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import blip
import blip2
import clip
import flamingo
import llava
from common import transformer
from common.data.batches import Batches, EvalData, open_world, world_tokenizer
from common.data.files import Files, Refusals
from common.data.safe_read import read_json
from common.data.tokenizer import IMAGE
from common.losses import count_labels
from common.training import checkpoint, distributed, lm
from common.training.devices import (autocast, default_workers, find_device, half_precision,
                                     peak_memory, to_device)
from common.training.optimizer import (Recipe, find_recipe, freeze, learning_rate,
                                       make_optimizer, set_learning_rate, store_frozen)
from common.training.options import add_options, parser, run_main, with_settings
from common.training.run import (Options, Run, check, count_cut, open_parts, open_start, restore,
                                 save, stop_on_signals, take_up)
from common.training.run_folder import RunFolder, default_folder

BEGAN, ROOT = time.time(), Path(__file__).parent
VOCABULARY = ("vocab_size", "pad_id", "eos_id", "cls_id", "enc_id", "dec_id")      # the tokenizer's


@dataclass(frozen=True)
class Stage:
    """A row of the table. file has PRESETS, RECIPES, TRAINS and data_sources.

    parts: {field of the config: (the stage whose run it comes from, the module of the model, and
    perhaps the kind of language model)}; optional: those that the stage can do without. losses: as
    of --losses; settings: as of --set; init: the stage whose run is that of --init.
    """
    about: str
    file: object
    model: object
    parts: dict = dataclasses.field(default_factory=dict)
    optional: tuple = ()
    losses: str | None = None
    init: str | None = None
    settings: tuple = ()


BLIP2_PARTS = {"vision": ("clip", "vision.vit")}
LLAVA = {"file": llava, "model": llava.LLaVA, "optional": ("vision", "language"),
         "parts": {"vision": ("clip", "vision"), "language": ("lm", "lm")}}
STAGES = {
    "clip": Stage("image and text encoders, contrastive (CLIP; --set loss=sigmoid: SigLIP's loss)",
                  clip, clip.CLIP),
    "lm": Stage("a language model on the world's texts, for the stages that freeze one",
                lm, lm.Pretraining),
    "flamingo": Stage("a resampler and gated blocks between a frozen CLIP and a frozen LM",
                      flamingo, flamingo.Flamingo,
                      {"vision": ("clip", "vision"), "language": ("lm", "lm")}),
    "blip": Stage("a ViT and a text transformer that match, judge and write (BLIP)",
                  blip, blip.make_model, {"vision": ("clip", "vision")}, optional=("vision",)),
    "blip-vqa": Stage("BLIP fine-tuned on questions", blip, blip.make_model, losses="vqa",
                      init="blip"),
    "blip-two-images": Stage("BLIP fine-tuned on statements about two images", blip,
                             blip.make_model, losses="two-images", init="blip"),
    "blip-dialogue": Stage("BLIP fine-tuned on dialogues", blip, blip.make_model, losses="dialogue",
                           init="blip"),
    "blip2-stage1": Stage("a Q-Former on a frozen CLIP, which matches and writes (BLIP-2)",
                          blip2, blip2.make_model, BLIP2_PARTS),
    "blip2-stage2": Stage("its queries as the prompt of a frozen language model", blip2,
                          blip2.make_model, BLIP2_PARTS | {"language": ("lm", "lm")},
                          optional=("vision",), losses="lm", init="blip2-stage1"),
    "blip2-stage2-t5": Stage("the same with a T5, of lm --preset t5-tiny", blip2,
                             blip2.make_model, BLIP2_PARTS | {"language": ("lm", "lm", "t5")},
                             optional=("vision",), losses="lm", init="blip2-stage1"),
    "blip2-retrieval": Stage("stage 1 fine-tuned with the image encoder", blip2, blip2.make_model,
                             losses=blip2.ALL_LOSSES, init="blip2-stage1"),
    "blip2-captions": Stage("stage 2 fine-tuned on captions with the image encoder", blip2,
                            blip2.make_model, losses="captions", init="blip2-stage2"),
    "blip2-vqa": Stage("the same on questions, which the Q-Former gets, too", blip2,
                       blip2.make_model, losses="vqa", init="blip2-stage2"),
    "blip2-instruct": Stage("stage 2 tuned on instructions (InstructBLIP)", blip2,
                            blip2.make_model, losses="instruct", init="blip2-stage2"),
    "llava-stage1": Stage("a projector from CLIP's patches to a language model's words (LLaVA)",
                          **LLAVA, losses="captions"),
    "llava-stage2": Stage("projector and language model on instructions (LLaVA-1.5)", **LLAVA,
                          losses="instruct", init="llava-stage1"),
    "llava-tiles": Stage("the same with tiles, to read small letters (LLaVA-NeXT)", **LLAVA,
                         losses="instruct", init="llava-stage2", settings=(
                             "views=tiles", "draw_size=64", "mix=reading=1")),
    "qwen-stage1": Stage("image encoder and adapter on captions (Qwen-VL)", **LLAVA,
                         losses="captions", settings=("projector=adapter", "views=squash")),
    "qwen-stage2": Stage("all parts on captions, questions and boxes, larger pictures", **LLAVA,
                         losses="instruct", init="qwen-stage1", settings=(
                             "draw_size=64", "resize_to=64",
                             "mix=grounding=4,question=1,caption=1")),
    "qwen-stage3": Stage("adapter and language model on instructions (Qwen-VL-Chat)", **LLAVA,
                         losses="instruct", init="qwen-stage2", settings=(
                             f"mix={llava.MIX},grounding=4",)),
}
# The command lines of a list; {runs} is --runs. One that begins with a file runs that script.
LISTS = {
    "all": ["lm", "clip", "flamingo", "blip", "blip-vqa", "blip2-stage1", "blip2-stage2",
            "llava-stage1", "llava-stage2", "lessons/overview.py --runs {runs}"],
    "bootstrap": ["clip", "blip", "blip --losses lm --init {runs}/blip",
                  "blip --losses itc,itm --init {runs}/blip",
                  "blip.py {runs}/blip-captioner bootstrap {runs}/blip-filter {runs}/texts.jsonl",
                  "blip --data shapes:texts={runs}/texts.jsonl --from vision={runs}/clip "
                  "--out {runs}/blip-bootstrap"],
}


# ------------------------------------------------------------------ building a run

def with_vocabulary(config, tokenizer):
    """A config dataclass with the size and the ids of a tokenizer, as far as it has such fields."""
    ids = {name: getattr(tokenizer, name, None) for name in VOCABULARY}
    ids["vocab_size"] = len(tokenizer)
    return dataclasses.replace(config, **{k: v for k, v in ids.items()
                                          if v is not None and hasattr(config, k)})


def check_fit(name, options, config, world, tokenizer):
    """Raise ValueError for data or a vocabulary that the stage cannot learn from."""
    file = STAGES[name].file
    if getattr(world, "learner", None) not in (None, file.__name__):
        what = {"llava": "conversations are for the stages of LLaVA",
                "flamingo": "pages are for flamingo"}[world.learner]
        raise ValueError(f"--data {options.data}: {what}; {name} learns from captions")
    if hasattr(tokenizer, "qformer"):
        raise ValueError(f"--init {options.init}: an InstructBLIP; its two vocabularies can be "
                         "used, but not trained")
    if tokenizer.image_id != IMAGE and (
            file in (flamingo, lm) or getattr(config, "template", "") == "house"):
        raise ValueError(f"{name}: a published vocabulary without <image>, <user> and other tokens "
                         + ("of ours; take a run of lm" if file is not llava else
                            "of the house template; --set template=v1"))


def recipe_of(name, options, config, recipes, world):
    """The recipe of a stage with the user's changes, fitted to data of one's own; a run that is
    resumed has it (world: None)."""
    kinds = name, options.data.partition(":")[0], getattr(config, "losses", "")
    changes = {key: getattr(options, key) for key in ("steps", "batch_size", "lr", "optimizer")}
    records = world.size("train") if isinstance(world, Files) else None
    return find_recipe(recipes, options.preset, kinds, changes, records,
                       tune=bool(options.init) and not STAGES[name].init)


def build(name, options, settings, began):
    """A Run at step 0, or at the folder's checkpoint.

    Raises ValueError for every mistake of the user's, before anything is written.
    """
    stage, device = STAGES[name], distributed.start(find_device(options.device))
    folder = RunFolder(options.out or default_folder(name, options, options.losses))
    options, own = take_up(name, stage, options, folder)
    half = half_precision(options.precision, device)
    transformer.ATTENTION = options.attention
    options.check_counts()
    if options.preset not in stage.file.PRESETS:
        raise ValueError(f"--preset {options.preset}: {name} has {', '.join(stage.file.PRESETS)}")
    config, tokenizer = open_start(stage, name, options, folder, own)
    if options.losses and not hasattr(config, "losses"):
        raise ValueError(f"--losses {options.losses}: {name} has no choice of losses")
    losses = options.losses or not own and stage.losses
    settings = [f"losses={losses}"] * bool(losses) + [*(() if own else stage.settings), *settings]
    for setting in settings:
        if setting.partition("=")[0] in VOCABULARY:
            raise ValueError(f"--set {setting}: it belongs to the tokenizer")
    config = with_settings(config, settings)
    config, frozen, tokenizer = open_parts(STAGES, name, options, config, folder, own, tokenizer)
    world = open_world(options.data, getattr(config, "image_size", 32), options.images,
                       options.skip, options.shuffle, getattr(config, "views", "crop") != "crop")
    tokenizer = tokenizer or world_tokenizer(world)
    check_fit(name, options, config, world, tokenizer)
    if not own and not options.init:     # a start keeps its vocabulary, and tables larger than it
        config = with_vocabulary(config, tokenizer)
        if "lm" not in frozen and getattr(config, "language", None):  # of random weights
            new = with_vocabulary(config.language, tokenizer)
            config = dataclasses.replace(config, language=new)
    recipes = {"": checkpoint.config_of(Recipe, own.get("recipe"), folder.path)} if own else \
        stage.file.RECIPES
    recipe = recipe_of(name, options, config, recipes, None if own else world)
    batches = Batches(stage.file.data_sources(world, tokenizer, config), seed=options.seed,
                      batch_size=recipe.batch_size, accumulate=options.accumulate,
                      rank=distributed.rank(), world_size=distributed.world_size())
    torch.manual_seed(options.seed)
    try:
        model = stage.model(config).to(device)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--preset {options.preset} {' '.join(settings)}: {error}") from None
    if hasattr(model, "check_batch"):
        model.check_batch(recipe.batch_size, options.accumulate)
    for module, (weights, where) in frozen.items():
        checkpoint.load_part(model, module, weights, where)
    if frozen and hasattr(model, "momentum"):
        model.move_momentum()
    unfrozen = tuple(filter(None, options.unfreeze.split(",")))
    table = freeze(model, stage.file.TRAINS[name] + unfrozen)
    if half and device.type == "cuda":
        store_frozen(model, getattr(model, "towers", ()), torch.bfloat16)
    run = Run(name, stage, options, folder, device, half, world, tokenizer, config, recipe, batches,
              model, make_optimizer(model, recipe, half), table, began, tuple(frozen))
    if isinstance(world, Files):
        run.refused = Refusals(options.skip)
        world.check_pictures()
    restore(run)
    return run


# ------------------------------------------------------------------ training

def update(run, forward, batches):
    """One optimizer step over the micro-batches -> their loss, a tensor on the device."""
    set_learning_rate(run.optimizer, run.recipe, run.step)
    if hasattr(run.model, "before_step"):
        run.model.before_step(run.step, run.recipe.steps)
    batches = [to_device(batch, run.device) for batch in batches]
    for source in sorted({batch["source"] for batch in batches}):
        # Losses over tokens are means over the whole step: all micro-batches and processes.
        own = [batch for batch in batches if batch["source"] == source and "labels" in batch]
        if own:
            count = count_labels([batch["labels"] for batch in own], distributed.gather)
            for batch in own:
                batch["label_count"] = count
    if len(batches) > 1 and hasattr(run.model, "cache_features"):     # contrastive: see clip.py
        with autocast(run.device, run.half):
            for batch, grads in zip(batches, run.model.cache_features(batches, distributed.gather)):
                batch["feature_gradients"] = grads
    total = 0.0                          # losses are summed: each is its share of the step's loss
    for number, batch in enumerate(batches):
        weight = batch.pop("weight")
        # DDP averages gradients over processes in the last backward only; no_sync skips the rest.
        last = number + 1 == len(batches) or not hasattr(forward, "no_sync")
        with contextlib.nullcontext() if last else forward.no_sync():
            with autocast(run.device, run.half):
                losses = forward(batch, gather=distributed.gather)
            loss = weight * sum(losses.values())
            loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.grad_clip or math.inf)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if hasattr(run.model, "after_step"):
        run.model.after_step(run.step)
    return total + 0 * norm              # NaN, too, when the loss is finite but its gradient is not


def fit(run):
    """Train to the last step, or until a signal stops the run; save at the end either way."""
    forward = torch.compile(run.model) if run.options.compile else run.model
    if run.options.compile and distributed.rank() == 0:
        print("compiling the model: the first step takes minutes", flush=True)
    if distributed.world_size() > 1:
        forward = DistributedDataParallel(
            forward, device_ids=[run.device] if run.device.type == "cuda" else None,
            find_unused_parameters=bool(run.options.unfreeze))   # a pattern may match unused ones
    steps = run.recipe.steps
    every = 1 if run.device.type == "cpu" else 10    # reading a loss makes the CPU wait for a GPU
    bar = tqdm(total=steps, initial=run.step, desc=run.name, unit="step",
               disable=distributed.rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 20)
    losses, refused, waited, mark = [], [], 0.0, time.time()
    with bar:
        for batches in run.batches.loader(run.step, steps, default_workers(run.options.workers,
                                                                           run.device)):
            waited += time.time() - mark             # seconds for data
            refused += sum((batch.pop("refused") for batch in batches), [])
            losses.append(update(run, forward, batches))
            run.step += 1
            bar.update()
            saving = run.step == steps or run.step % run.options.save_every == 0
            if run.step % every == 0 or saving:
                stop = check(run, losses, refused)
                losses, refused = [], []
                bar.set_postfix(loss=f"{run.loss:.3f}", refresh=False)
                if run.step % 10 == 0 or run.step == steps:
                    run.folder.log({"step": run.step, "loss": round(run.loss, 5),
                                    "lr": learning_rate(run.recipe, run.step - 1),
                                    "seconds": round(run.elapsed(), 2), "waited": round(waited, 2)})
                if saving or stop:
                    save(run)
                if stop:                 # all processes stop, whichever got the signal
                    run.stopped = run.stopped or signal.SIGTERM
                    break
            mark = time.time()


def measure(run):
    """Evaluate the trained model: write result.json and samples.png, print the result."""
    if distributed.rank() > 0:
        return
    run.model.eval()
    data = EvalData(run.world, run.tokenizer, run.batches.sources[0].collate, run.device)
    with autocast(run.device, run.half):
        figures = run.model.evaluate(data)
    parameters = list(run.model.parameters())
    result = {"stage": run.name, "seconds": round(run.elapsed(), 1),
              "peak_memory_mb": round(peak_memory(run.device)),
              "parameters": sum(p.numel() for p in parameters),
              "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
              "steps": run.step, "loss": round(run.loss, 4), "test_size": run.world.size("test")}
    if run.refused:
        result["refused"] = run.world.refused.count + run.refused.count
    result |= {name: round(value, 4) for name, value in figures.items()}
    checkpoint.write_json(run.folder.path / "result.json", result)
    with autocast(run.device, run.half):
        picture = run.model.samples(data)
    checkpoint.write(run.folder.path / "samples.png", lambda half: picture.save(half, "PNG"))
    print(f"pictures: {run.folder.path / 'samples.png'}")
    print("result:", json.dumps(result))


def finished(run):
    """The result.json of the run's last step; None when there is more to train or to measure."""
    path = run.folder.path / "result.json"
    if run.step < run.recipe.steps or not path.exists():
        return None
    result = read_json(path)             # --eval_only may have measured an earlier step
    return result if result.get("steps") == run.step else None


def train(name, options, settings=(), began=None):
    """Run one stage; returns the exit status: 0, or 128 + the signal that stopped it."""
    run = build(name, options, list(settings), began or time.time())
    if options.resume and not options.eval_only and (result := finished(run)):
        if distributed.rank() == 0:
            print(f"{name}: finished; --eval_only measures it again")
            print("result:", json.dumps(result))
        return 0
    with stop_on_signals(run):
        if distributed.rank() == 0:
            print(f"{name}: {run.recipe.steps} steps of {run.recipe.batch_size} on {run.device} "
                  f"in {'bf16' if run.half else 'fp32'} by {run.optimizer}, in {run.folder.path}\n"
                  f"{run.table}")
            if run.refused:
                count, seen = run.world.size("train"), run.recipe.steps * run.recipe.batch_size
                print(f"{run.world.name}: {count:,} records to learn from, {seen / count:.1f} "
                      f"times each, at a rate of {run.recipe.lr:g}, pictures of "
                      f"{run.world.image_size} pixels")
            if run.refused and run.world.refused.count:
                print(f"{run.world.name}: {run.world.refused.summary(run.world.tried)}")
            if run.refused and (cut := count_cut(run)):
                print(f"{run.world.name}: {cut}")
        if not options.eval_only:
            fit(run)
        if run.stopped is None:
            run.measuring = True
            measure(run)
    if run.stopped is None:
        return 0
    if distributed.rank() == 0:
        print(f"stopped by {signal.Signals(run.stopped).name} at step {run.step}, saved; "
              "the same command with --resume continues")
    return 128 + run.stopped


def main():
    """Read the command line and run a stage, or the stages of a list in a row."""
    args = parser(__doc__)
    args.add_argument("stage", nargs="?", metavar="STAGE",
                      help="one of " + ", ".join([*STAGES, *LISTS]))
    args.add_argument("--list", action="store_true", help="show the stages and exit")
    args.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
                      dest="settings", help="any fields of the model's config")
    add_options(args, Options)
    blank = dict.fromkeys(field.name for field in dataclasses.fields(Options))   # None: not given
    values = vars(args.parse_args(namespace=argparse.Namespace(**blank)))
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
        for line in LISTS.get(name, [name]):
            runs = values["runs"] or Options.runs
            stage, *flags = (word.format(runs=runs) for word in line.split())
            if stage.endswith(".py"):
                sys.stdout.flush()       # a file gets the script's lines behind ours
                status = 0 if distributed.rank() else \
                    subprocess.run([sys.executable, ROOT / stage, *flags]).returncode
                distributed.barrier()    # the next line may need what the script writes
            else:                        # the line's own flags stand above the user's
                own = vars(args.parse_args([stage, *flags], argparse.Namespace(**values)))
                own = {key: own[key] for key in values if own[key] is not None}
                options = Options(**own)
                options.given |= {*own}
                status = train(stage, options, settings, began)
            if status:
                return status
            began = time.time()
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    run_main(main)
