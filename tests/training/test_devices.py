"""Any device without having one: tensor factories, device "meta", graph breaks; and --device."""
import ast
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import blip
import blip2
import llava
from blip2 import VISUAL
from clip import CLIP
from common.data.batches import EvalData, world_tokenizer
from common.training.devices import (autocast, default_workers, find_device, half_precision,
                                     to_device)
from common.training.optimizer import freeze
from flamingo import TRAINS, Flamingo
from tests.helpers import (BLIP_EOS, BLIP_PAD, AnyWords, assert_close, blip_batch, blip_ids,
                           flamingo_config, make_batch, page, toy_blip, toy_blip2, toy_llava)
from tests.training.runs import Toy

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / f"{name}.py" for name in ("clip", "flamingo", "blip", "blip2", "llava")),
         *sorted((ROOT / "common").glob("*.py"))]
FACTORIES = ("arange as_tensor empty eye from_numpy full linspace logspace normal ones rand "
             "randint randn randperm scalar_tensor tensor tril_indices triu_indices zeros").split()


def without_device(source):
    """The calls that make tensors on the CPU: factories without a device that is no constant.

    Those of an nn.Module's __init__ and of what it calls may: .to() moves parameters and buffers.
    """
    nodes = [*ast.walk(ast.parse(source))]
    free = {call for node in nodes if isinstance(node, ast.ClassDef) and node.bases
            for f in node.body
            if getattr(f, "name", "") in ("__init__", "init_weights", "make_momentum")
            for call in ast.walk(f)}
    return [ast.unparse(call) for call in nodes if isinstance(call, ast.Call) and call not in free
            and ast.unparse(call.func) in [f"torch.{name}" for name in FACTORIES]
            and not any(word.arg == "device" and not isinstance(word.value, ast.Constant)
                        for word in call.keywords)]


class TestFactories:
    def test_every_tensor_is_made_on_a_device_that_is_named(self):
        found = {path.name: without_device(path.read_text()) for path in FILES}
        assert found.pop("prompts.py")       # the loop moves what `collate` makes
        assert len(found.pop("llava.py")) == 4       # and what becomes of rows and pictures
        assert not any(found.values()), found


# The training steps of tiny models

BLIP = {"blip": {"text_layers": 1}, "blip vqa": {"text_layers": 1, "losses": "vqa"},
        "blip two images": {"losses": "two-images"},
        "blip dialogue": {"text_layers": 1, "losses": "dialogue", "text_width": 12}}
BLIP2 = {"blip2-stage1": (None, "itc,itm,itg"), "blip2-retrieval": (None, "itc,itm"),
         "blip2-stage2": ("gpt2", "lm"),
         "blip2-stage2-t5": ("t5", "lm"), "blip2-vqa": ("gpt2", "vqa"),
         "blip2-instruct": ("t5", "instruct")}        # the stage: kind and losses
LLAVA = {"llava-stage1": {"kind": "llama", "losses": "captions"},
         "llava-tiles": {"views": "tiles", "projector": "adapter", "mix": "reading=1,grounding=1"}}
MODELS = ["clip", "flamingo resnet llama", "flamingo mlp opt", *BLIP, *BLIP2, *LLAVA]


def blip_and_batch(name):
    batch = blip_batch(4, 7, 5) | {
        "label_count": torch.tensor(13.0), "truth": torch.tensor([1, 0, 1]),
        "caption_ids": blip_ids(3, 6, 4), "answer_ids": blip_ids(3, 4, 6, 5),
        "question_index": torch.tensor([0, 1, 1, 2]), "weights": torch.tensor([1, 0.3, 0.7, 1])}
    if name == "blip two images":
        batch["images"] = torch.stack([batch["images"]] * 2, dim=1)
    return toy_blip(vision_layers=1, **BLIP[name]).float(), batch


def blip2_and_batch(name):
    (kind, losses), batch = BLIP2[name], blip_batch(4, 7, 5)
    model = toy_blip2(kind, losses=losses, qformer_layers=1).float()
    if kind:
        ids = torch.cat([torch.full((3, 3), VISUAL), batch["ids"]], dim=1)
        batch |= {"ids": ids, "mask": ids != BLIP_PAD, "labels": ids}
        if kind == "t5":
            batch |= {"answer_ids": blip_ids(3, 6, 4), "labels": blip_ids(3, 6, 4)}
        if model.config.asks_qformer:
            batch["question_ids"] = blip_ids(6, 3, 5)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] < BLIP_EOS, -100)
    freeze(model, blip2.TRAINS[name])
    return model.train(), batch | {"label_count": torch.tensor(13.0)}


def llava_and_batch(name):
    model = toy_llava(**LLAVA[name]).float()
    turns = [page(("red", "what", "a b"))["turns"], page(("", "x", "c"))["turns"]]
    batch = llava.make_batch(turns, AnyWords(), model.config, [Random(0)] * 2)
    freeze(model, llava.TRAINS[name])
    return model.train(), batch | {"label_count": torch.tensor(13.0)}


def model_and_batch(name, device="cpu"):
    """A tiny model in training, and a batch for it."""
    torch.manual_seed(0)
    if name in LLAVA:
        model, batch = llava_and_batch(name)
        return model.to(device), to_device(batch, torch.device(device))
    if name in BLIP2:
        model, batch = blip2_and_batch(name)
        return model.to(device), to_device(batch, torch.device(device))
    if name in BLIP:
        model, batch = blip_and_batch(name)
        return model.to(device), to_device(batch, torch.device(device))
    config = flamingo_config(resampler_layers=1)
    config = replace(config, vision=replace(config.vision, vision_layers=2),
                     language=replace(config.language, layers=1))
    resnet = replace(config.vision, image_size=32, stages=(1, 1, 1, 1), vision_width=4)
    model = {
        "clip": lambda: CLIP(config.vision),
        "flamingo resnet llama": lambda: Flamingo(replace(config, vision=resnet)),
        "flamingo mlp opt": lambda: Flamingo(replace(
            config, resampler="mlp", language=replace(config.language, kind="opt"),
            use_class_token=False, only_latest_image=False))}[name]()
    batch = make_batch("..I.I.", "I.....", "...I.I", attend_next=[True, False, True])
    shape = (3, 3, 2) if name.startswith("flamingo") else (3,)
    size = model.config.image_size
    batch["images"] = torch.randint(256, (*shape, 3, size, size), dtype=torch.uint8)
    if name.startswith("flamingo"):
        batch["label_count"] = torch.tensor(25.0)
        freeze(model, TRAINS["flamingo"])
    else:
        batch["ids"] = torch.tensor([[5, 2, 0], [3, 4, 2], [4, 4, 2]])
    return model.to(device), to_device(batch, torch.device(device))


def step(model, batch):
    return sum(model(batch).values())


@pytest.mark.parametrize("name", MODELS)
class TestTrainingStep:
    def test_it_has_no_graph_break(self, name):
        torch._dynamo.reset()
        found = torch._dynamo.explain(step)(*model_and_batch(name))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons

    def test_it_runs_on_a_device_without_the_cpu(self, name):
        model, batch = model_and_batch(name, "meta")
        loss = step(model, batch)
        loss.backward()
        assert loss.is_meta and loss.shape == ()
        # "meta" stands for a GPU: it refuses tensors of the CPU, but as indices and masks alone.
        for key in ("labels" if "mask" in batch else "ids", "images"):
            here = batch | {key: torch.zeros_like(batch[key], device="cpu")}
            with pytest.raises(RuntimeError, match="device"):
                step(model, here)
        if hasattr(model, "cache_features"):
            model.zero_grad()
            share = model.cache_features([batch, batch])[0]
            step(model, batch | {"feature_gradients": share}).backward()
            assert model.logit_scale.grad.is_meta

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_it_runs_on_a_gpu_in_bf16(self, name):
        model, batch = model_and_batch(name, "cuda")
        with autocast(torch.device("cuda"), True):
            loss = step(model, batch)
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
@pytest.mark.parametrize("name", [*BLIP, *BLIP2, *LLAVA])
def test_it_is_measured_and_writes_in_bf16(name, device):
    world = Toy(image_size=15)
    tokenizer = world_tokenizer(world)
    sizes = {"vocab_size": len(tokenizer), "pad_id": 0, "eos_id": 2}
    if name in LLAVA:
        language = replace(toy_llava(**LLAVA[name]).config.language, **sizes, context_length=256)
        model = toy_llava(**LLAVA[name], language=language)
    elif name in BLIP:
        model = toy_blip(**BLIP[name], **sizes, context_length=37)
    else:
        kind, losses = BLIP2[name]
        language = toy_blip2(kind).config.language if kind else None
        language = replace(language, **sizes, context_length=99) if kind else None
        model = toy_blip2(kind, losses=losses, language=language, qformer_context_length=37,
                          **sizes)
    file = blip if name in BLIP else llava if name in LLAVA else blip2
    source, *_ = file.data_sources(world, tokenizer, model.config)
    data = EvalData(world, tokenizer, source.collate, torch.device(device))
    model = model.float().to(device).eval()
    with autocast(torch.device(device), True):
        figures = model.evaluate(data, count=3)
        assert model.samples(data).width > 400
    assert figures and all(0 <= value <= 1 for key, value in figures.items() if key[:3] != "itg")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", [*BLIP, *BLIP2, *LLAVA])
def test_it_is_compiled_on_a_gpu(name):
    model, batch = model_and_batch(name, "cuda")
    before = {key: b.clone() for key, b in model.named_buffers()}
    plain = step(model, batch)
    for key, b in model.named_buffers():             # the queues of the first step
        b.copy_(before[key])
    assert_close("loss", torch.compile(step)(model, batch), plain, 1e-3)


# --device and --precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestFindDevice:
    @pytest.mark.parametrize("name, words", [
        *((name, "use auto, cpu, cuda or mps") for name in ("toaster", "meta", "cuda:-1", "")),
        ("cuda:1", "cuda:1: this machine has 1 CUDA devices; use --device cpu"),
        ("mps", "mps: this machine has none; use --device cpu")])
    def test_another_name_or_a_missing_device_is_told(self, name, words, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert find_device("cuda") == CUDA and find_device("cpu") == CPU
        with pytest.raises(ValueError, match=words):
            find_device(name)

    @pytest.mark.parametrize("count, device", [(1, CUDA), (0, CPU)])
    def test_auto_is_a_gpu_where_there_is_one(self, monkeypatch, count, device):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        assert find_device("auto") == device


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_asked_for_or_fast(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
    for device, auto in ((CPU, fast), (CUDA, fast), (torch.device("mps"), False)):
        found = [half_precision(asked, device) for asked in ("auto", "bf16", "fp32")]
        assert found == [auto, True, False], device


@pytest.mark.parametrize("cores, workers", [(None, 1), (4, 3), (64, 8)])
def test_a_cpu_has_no_workers_unless_they_are_asked_for(monkeypatch, cores, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    found = [default_workers(asked, device) for asked in (None, 5, 0) for device in (CPU, CUDA)]
    assert found == [0, workers, 5, 5, 0, 0]
