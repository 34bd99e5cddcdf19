"""Small runs of train.py for tests: a toy world, own data, processes that are killed on purpose.

A run is a process forked from one that has imported torch already.
"""
import functools
import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo                      # noqa: F401  AdamW imports it; once for all forks
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed import multi_threaded_pg as threaded

import clip
import train
from common.data import batches
from common.data.shapes.world import Shapes
from common.losses import next_token_loss
from common.training import checkpoint, options
from common.training.optimizer import Recipe
from tests.helpers import assert_close

SIZES = ["vision_width=12", "vision_layers=1", "vision_heads=3", "text_width=10", "text_layers=1",
         "text_heads=2", "embed_dim=7"]
TOY = ["clip", "--data", "toy", "--batch_size", "6", "--save_every", "6",
       *itertools.chain.from_iterable(("--set", size) for size in SIZES)]
STEPS = 23


class Toy(Shapes):
    """The shapes world with small splits and few words."""
    name = "toy"
    splits = {"train": 61, "test": 13, "single": 42, "composition": 6, "shifted": 42,
              "human": 31, "web": 59}
    is_true = staticmethod(functools.cache(Shapes.is_true))      # asked 20,000 times in a test

    def corpus(self):
        return itertools.islice(super().corpus(), 150)


batches.WORLDS["toy"] = Toy


def build(tmp_path, *settings, stage="clip", **more):
    """A Run of the toy world at step 0, in a folder that stays unwritten when it is not trained."""
    values = {"data": "toy", "batch_size": 6, "steps": 50, "precision": "fp32",
              "out": str(tmp_path / "run")} | more
    return train.build(stage, train.Options(**values), [*SIZES, *settings], time.time())


# The user's own data

def own(spec, *flags):
    """The command line of a small run on files of one's own."""
    return ["clip", "--data", spec, *TOY[3:], "--set", "context_length=5", "--steps", str(STEPS),
            *flags]


# Processes

def child(argv, output, trap, environment):
    """Be `python train.py ARGV` in this process; trap() is called first."""
    os.setpgrp()
    multiprocessing.set_start_method(None, force=True)       # workers start as they do by default
    os.environ |= environment
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    update = train.update

    def drawing(*arguments):
        torch.rand(1)                    # as dropout would
        return update(*arguments)
    train.update = drawing
    sys.argv, train.BEGAN = ["train.py", *argv], time.time()
    trap()
    options.run_main(train.main)


class Command:
    """A `python train.py ARGV` that runs beside the test."""

    def __init__(self, argv, output, trap=int, **environment):
        self.output, forks = output, multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload([__name__])
        self.process = forks.Process(target=child, args=(argv, output, trap, environment))
        with pytest.MonkeyPatch.context() as patch:      # for the server that forks
            patch.setenv("PYTHONPATH", str(Path(train.__file__).parent))
            patch.setenv("OMP_NUM_THREADS", "1")
            self.process.start()

    def end(self, status=0):
        """Its output, when it has ended with this status; -9 is killed by signal 9."""
        self.process.join(60)
        text = self.output.read_text()
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running:\n{text}")
        assert self.process.exitcode == status, text
        assert "Traceback" not in text, text
        return text


def pair(argv, folder, traps=(int, int)):
    """Both processes of `torchrun --nproc_per_node=2 train.py ARGV`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return [Command(argv, folder.with_name(f"{folder.name}{rank}.txt"), trap, RANK=rank,
                    LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank, trap in zip("01", traps)]


# Traps

def at_step(step, number, group=False):
    """The process, or its whole group, gets a signal as it begins a step."""
    update = train.update

    def struck(run, *arguments):
        if run.step == step:
            os.kill(0 if group else os.getpid(), number)
        return update(run, *arguments)
    train.update = struck


def killing_its_workers(step):
    """The workers are killed as the process begins a step."""
    update = train.update

    def struck(run, *arguments):
        if run.step == step:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
        return update(run, *arguments)
    train.update = struck


def while_measuring(number):
    """A signal when all steps are done."""
    def struck(self, data):
        os.kill(os.getpid(), number)
        return {}
    clip.CLIP.evaluate = struck


# Run folders

def weights(folder):
    """The weights of a run's last checkpoint."""
    return checkpoint.load(folder / "last.pt")["model"]


def log(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result(text):
    """The result in what a run printed, its last line."""
    last = text.splitlines()[-1]
    assert last.startswith("result: {"), text
    return json.loads(last.removeprefix("result: "))


def assert_same(name, got, expected, tolerance=0):
    """The same tensors in both dicts, by default bit for bit, and the same other values."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), f"{name}: got {[*got]}, expected {[*expected]}"
        for key in expected:
            assert_same(f"{name}, {key}", got[key], expected[key], tolerance)
    elif isinstance(expected, torch.Tensor):
        assert_close(name, got, expected, tolerance)
    else:
        assert got == expected, f"{name}: got {got}, expected {expected}"


def ending(folder):
    """All that a run ended with, but for its seconds and memory."""
    state = checkpoint.load(folder / "last.pt")
    figures = json.loads((folder / "result.json").read_text())
    del state["schedule"]["seconds"], figures["seconds"], figures["peak_memory_mb"]
    assert state["step"] == STEPS and not list(folder.glob("*.part"))
    return {"last.pt": state, "result.json": figures,
            "log.jsonl": [(line["step"], line["loss"], line["lr"]) for line in log(folder)]}


def assert_same_run(folder, reference):
    """Both ended with the same bits: weights, optimizer, random numbers, figures and log."""
    assert_same(folder.name, ending(folder), ending(reference))


# The loop's own step, without a folder

def step_gradients(model, batches, forward=None, half=False):
    """{name: gradient, "loss": the loss} of one `train.update` over micro-batches."""
    found = {}
    optimizer = SimpleNamespace(
        param_groups=(), zero_grad=model.zero_grad, step=lambda: found.update(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    run = SimpleNamespace(model=model, optimizer=optimizer, device=torch.device("cpu"), half=half,
                          step=0, recipe=Recipe(steps=9, batch_size=1, lr=0.0, grad_clip=None))
    loss = train.update(run, forward or model, [{"source": 0, "weight": 1.0} | b for b in batches])
    return found | {"loss": loss}


class Bigram(nn.Module):
    """A toy that predicts each token from the last one; it keeps the batches that it is given."""

    def __init__(self, vocab_size=7):
        super().__init__()
        self.table, self.seen = nn.Embedding(vocab_size, vocab_size), []

    def forward(self, batch, gather):
        self.seen.append(batch)
        return {"lm": next_token_loss(self.table(batch["ids"]), batch["labels"],
                                      batch.get("label_count"))}


def ragged_rows(rows=6, length=5, vocab_size=7):
    """ids int64 (rows, length); row i has labels for its first i + 1 tokens alone."""
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
    counted = torch.arange(length) <= torch.arange(rows)[:, None]
    return {"ids": ids, "labels": ids.where(counted, -100)}


def split(batch, *sizes):
    """A batch as micro-batches of these sizes."""
    return [{name: rows[sum(sizes[:k]):][:size].clone() if isinstance(rows, torch.Tensor) else rows
             for name, rows in batch.items()} for k, size in enumerate(sizes)]


def share_of_batch(loss, *sizes, rank=0, ranks=1):
    """A model and a process's share of 12 rows, as micro-batches of these sizes."""
    torch.manual_seed(0)
    batch, model = ragged_rows(12), Bigram()
    if loss != "lm":
        model = clip.CLIP(clip.CLIPConfig(
            loss=loss, image_size=8, patch_size=4, vision_width=6, vision_layers=1, vision_heads=2,
            text_width=10, text_layers=1, text_heads=2, embed_dim=7, vocab_size=31,
            context_length=5))
        for p in model.parameters():     # off their symmetric starting points
            p.data += 0.1 * torch.randn_like(p)
        ids = torch.cat([torch.randint(3, 31, (12, 4)), torch.full((12, 1), 2)], dim=1)
        batch = {"images": torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8), "ids": ids}
    return model.double(), split(split(batch, *[12 // ranks] * ranks)[rank], *sizes)


def in_threads(count, function):
    """[function(rank), ...] of `count` processes that are threads of this one."""
    store, alone = dist.HashStore(), torch._C._distributed_c10d._set_thread_isolation_mode

    def process(rank):
        dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
        try:
            return function(rank)
        except BaseException as error:   # the others stop waiting for this one
            threaded.ProcessLocalGroup.exception_handle(error)
            raise
        finally:
            dist.destroy_process_group()
    threaded._install_threaded_pg(), alone(True)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(process, range(count)))
    finally:
        alone(False), threaded._uninstall_threaded_pg()


# Two-step runs of Flamingo and its parts

SETTINGS = {
    "clip": ["vision_width=22", "vision_layers=2", "vision_heads=2", "text_width=6",
             "text_layers=1", "text_heads=1", "embed_dim=3", "context_length=9"],
    "lm": ["width=20", "layers=3", "heads=2", "kv_heads=2", "hidden=26"],
    "flamingo": ["num_latents=7", "resampler_layers=1", "resampler_heads=5",
                 "resampler_head_width=3", "cross_attn_every=2", "heads=3", "head_width=4",
                 "max_frames=4", "gate_init=0.5"]}


def toy_options(**more):
    """Options of a two-step run on the toy world."""
    return train.Options(**{"data": "toy", "batch_size": 16, "steps": 2, "precision": "fp32",
                            "device": "cpu"} | more)


def start(stage, settings=(), **more):
    """A two-step run of 6 samples a step -> its exit status; more: as of `toy_options`."""
    return train.train(stage, toy_options(**{"batch_size": 6} | more), settings)


def built(stage, settings=(), **more):
    """The same Run at step 0."""
    return train.build(stage, toy_options(**{"batch_size": 6} | more), list(settings), 0.0)
