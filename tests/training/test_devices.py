"""Any device without having one: tensor factories, graph breaks, device "meta"; and --device."""
import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip import CLIP, CLIPConfig
from common.data.tokenizer import IMAGE
from common.language import LanguageConfig
from common.training.devices import (autocast, default_workers, find_device, half_precision,
                                     peak_memory, to_device)
from common.training.optimizer import freeze
from flamingo import TRAINS, Flamingo, FlamingoConfig

HERE = Path(__file__).parents[2]
FILES = [HERE / "clip.py", HERE / "flamingo.py", *sorted((HERE / "common").glob("*.py"))]
FACTORIES = set("arange as_tensor empty eye from_numpy full linspace logspace normal ones rand "
                "randint randn randperm scalar_tensor tensor tril_indices triu_indices "
                "zeros".split())
# Lists of ids become a batch, which the loop moves with `to_device`.
ON_THE_CPU = {("prompts.py", "collate")}


def module_classes(trees):
    """Names of the classes that are nn.Modules."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    modules, before = {"Module"}, 0
    while len(modules) > before:
        before = len(modules)
        modules |= {c.name for c in classes if modules & {ast.unparse(base).split(".")[-1]
                                                          for base in c.bases}}
    return modules


def device_places(trees):
    """{function: the place of its parameter `device`} of the functions that have one."""
    return {node.name: [a.arg for a in node.args.args].index("device")
            for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
            and "device" in [a.arg for a in node.args.args]}


def names_a_device(call, place=None):
    """Whether a call has an argument `device` that is no constant, by name or at its place."""
    given = [word.value for word in call.keywords if word.arg == "device"]
    if place is not None:                # f(*arguments) passes on what its caller has named
        given += call.args[place:place + 1] + [a for a in call.args if isinstance(a, ast.Starred)]
    return bool(given) and not isinstance(given[0], ast.Constant)


def without_device(sources):
    """{file name: source} -> [(file, function, call)] of the tensors that are made on the CPU."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    modules, places = module_classes(trees.values()), device_places(trees.values())
    found = []

    def walk(node, name, function, is_init):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                walk(child, name, function, child.name in modules)
            elif isinstance(child, ast.FunctionDef):
                # The parameters and buffers of a module are moved by .to().
                inside = is_init and child.name in ("__init__", "init_weights")
                walk(child, name, child.name, inside)
            else:
                if isinstance(child, ast.Call):
                    owner, _, called = ast.unparse(child.func).rpartition(".")
                    factory = owner == "torch" and called in FACTORIES
                    if not is_init and (factory or called in places) \
                            and not names_a_device(child, None if factory else places[called]):
                        found.append((name, function, ast.unparse(child)))
                walk(child, name, function, is_init)

    for name, tree in trees.items():
        walk(tree, name, None, False)
    return found


class TestFactories:
    def test_every_tensor_is_made_on_a_device_that_is_named(self):
        found = without_device({path.name: path.read_text() for path in FILES})
        assert [place for place in found if place[:2] not in ON_THE_CPU] == []
        assert {place[:2] for place in found} == ON_THE_CPU

    @pytest.mark.parametrize("line, is_right", [
        ("torch.arange(3)", False), ("torch.arange(3, device=x.device)", True),
        ("torch.zeros(2, device='cpu')", False), ("torch.full((2,), 1.0, device=None)", False),
        ("x.new_zeros(2) + torch.ones_like(x)", True), ("x[torch.arange(len(x))]", False),
        ("causal(3)", False), ("masks.causal(3)", False), ("causal(3, x.device)", True),
        ("causal(3, device=device)", True), ("x + [torch.randn(2) for _ in x][0]", False)])
    def test_the_walk_finds_what_it_should(self, line, is_right):
        causal = "def causal(T, device=None):\n    return torch.arange(T, device=device)\n"
        for head in ("def f(x):\n    ", "class A(nn.Module):\n  def forward(self, x):\n    ",
                     "class A:\n  def __init__(self, x):\n    "):
            assert bool(without_device({"a.py": head + line, "b.py": causal})) != is_right
        init = "class A(nn.Module):\n  pass\nclass B(A):\n  def __init__(self, x):\n    "
        assert without_device({"a.py": init + line, "b.py": causal}) == []


# The training steps of tiny models

VIT = CLIPConfig(image_size=15, patch_size=5, vision_width=12, vision_layers=2, vision_heads=3,
                 text_width=14, text_layers=2, text_heads=2, context_length=11, vocab_size=37,
                 embed_dim=7)
RESNET = replace(VIT, image_size=32, stages=(1, 1, 1, 1), vision_width=4, vision_heads=2)
CLIPS = {"ViT": VIT, "ResNet sigmoid": replace(RESNET, loss="sigmoid")}


def language(kind):
    return LanguageConfig(kind=kind, vocab_size=37, context_length=23, width=24, layers=2, heads=3,
                          hidden=37, kv_heads=1 if kind == "llama" else 3)


FLAMINGOS = {
    "ViT": FlamingoConfig(vision=VIT, language=language("gpt2"), num_latents=3, resampler_heads=2,
                          resampler_head_width=5, heads=2, head_width=5, max_frames=3)}
FLAMINGOS |= {
    "ResNet": replace(FLAMINGOS["ViT"], vision=RESNET, language=language("llama")),
    "mlp": replace(FLAMINGOS["ViT"], resampler="mlp", language=language("opt"),
                   use_class_token=False, only_latest_image=False)}
CASES = [(kind, name) for kind, configs in ((CLIP, CLIPS), (Flamingo, FLAMINGOS))
         for name in configs]


def model_and_batch(kind, name, device="cpu"):
    """A tiny model in training, and a batch for it."""
    torch.manual_seed(0)
    ids = torch.randint(32, 37, (5, 6))
    ids[:, -1] = 2
    batch = {"ids": ids}
    if kind is CLIP:
        size, model = CLIPS[name].image_size, CLIP(CLIPS[name])
        batch["images"] = torch.randint(256, (5, 3, size, size), dtype=torch.uint8)
    else:
        size, model = FLAMINGOS[name].image_size, Flamingo(FLAMINGOS[name])
        freeze(model, TRAINS["flamingo"])
        ids[:, [1, 3]] = IMAGE
        batch["images"] = torch.randint(256, (5, 2, 2, 3, size, size), dtype=torch.uint8)
        batch["attend_next"] = torch.tensor([True, False, True, False, False])
        batch |= {"labels": ids.clone(), "label_count": torch.tensor(25.0)}
    return model.to(device), to_device(batch, torch.device(device))


def step(model, batch):
    return sum(model(batch).values())


@pytest.mark.parametrize("kind, name", CASES)
class TestTrainingStep:
    def test_it_has_no_graph_break(self, kind, name):
        torch._dynamo.reset()
        found = torch._dynamo.explain(step)(*model_and_batch(kind, name))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons

    def test_it_runs_on_a_device_without_the_cpu(self, kind, name):
        model, batch = model_and_batch(kind, name, "meta")
        loss = step(model, batch)
        loss.backward()
        assert loss.is_meta and loss.shape == ()
        for key in ("ids", "images"):    # "meta" stands for a GPU: it refuses tensors of the CPU
            here = batch | {key: torch.zeros_like(batch[key], device="cpu")}
            with pytest.raises(RuntimeError, match="device"):
                step(model, here)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_it_runs_on_a_gpu_in_bf16(self, kind, name):
        model, batch = model_and_batch(kind, name, "cuda")
        with autocast(torch.device("cuda"), True):
            loss = step(model, batch)
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32


@pytest.mark.parametrize("name", CLIPS)
def test_features_are_cached_without_the_cpu(name):
    model, batch = model_and_batch(CLIP, name, "meta")
    share = model.cache_features([batch, batch])[0]
    step(model, batch | {"feature_gradients": share}).backward()
    assert model.logit_scale.grad.is_meta


# --device and --precision

class TestDevices:
    @pytest.mark.parametrize("name", ["toaster", "meta", "cuda:-1", ""])
    def test_other_names_are_refused(self, name):
        with pytest.raises(ValueError, match="use auto, cpu, cuda or mps"):
            find_device(name)

    def test_a_missing_device_is_told(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert find_device("cuda") == torch.device("cuda")
        with pytest.raises(ValueError, match="cuda:1: this machine has 1 CUDA devices; use"):
            find_device("cuda:1")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ValueError, match="mps: this machine has none; use --device cpu"):
            find_device("mps")

    def test_auto_is_a_gpu_where_there_is_one(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for there, kind in ((True, "cuda"), (False, "cpu")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
            assert find_device("auto").type == kind

    def test_half_precision_is_asked_for_or_fast(self, monkeypatch):
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        for fast in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
            for device in (cpu, cuda):
                assert half_precision("auto", device) is fast
                assert half_precision("bf16", device) and not half_precision("fp32", device)

    def test_autocast_is_bf16_when_asked_for(self):
        x = torch.ones(2, 2)
        for half, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            with autocast(torch.device("cpu"), half):
                assert (x @ x).dtype == dtype

    def test_a_cpu_has_no_workers_unless_they_are_asked_for(self, monkeypatch):
        cpu, cuda = torch.device("cpu"), torch.device("cuda")
        for cores, workers in ((None, 1), (4, 3), (64, 8)):
            monkeypatch.setattr("os.cpu_count", lambda: cores)
            assert (default_workers(None, cpu), default_workers(None, cuda)) == (0, workers)
            assert default_workers(5, cpu) == default_workers(5, cuda) == 5
            assert default_workers(0, cuda) == 0

    def test_to_device_moves_tensors_alone(self):
        batch = to_device({"x": torch.ones(2), "n": 3, "text": "a"}, torch.device("meta"))
        assert batch["x"].is_meta and (batch["n"], batch["text"]) == (3, "a")

    def test_the_peak_of_memory_is_that_of_the_process(self):
        # In a process of its own: what other tests have freed would hide the growth.
        code = ("import torch; from common.training.devices import peak_memory as peak; "
                "cpu = torch.device('cpu'); before = peak(cpu); held = torch.ones(2 ** 25); "
                "print(before, peak(cpu))")          # 128 MB
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             check=True, cwd=Path(__file__).parents[2]).stdout
        before, after = map(float, out.split())
        assert before > 10 and 100 < after - before < 200
