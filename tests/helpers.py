"""What tests share: comparisons that explain themselves, random parameters, toy models and inputs.

Models are imported where they are made, so that a file with a mistake fails its own tests alone.
"""
import contextlib
import copy
import io
import itertools
import json
import math
import re
import runpy
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.data.tokenizer import BOS, EOC, EOS, IMAGE

# Comparisons

def assert_close(name, got, expected, tolerance=None):
    """Same shape, kind and values; a failure shows the shapes, or the first wrong entry of all.

    name: the quantity in the mechanism's words with its axes, as "scores (B, H, T, S)"; got,
    expected: tensors, arrays, lists or numbers. tolerance: absolute and relative, by default 1e-9
    where both are float64 tensors, 1e-2 where one is a half, else 1e-5; bool and int are exact.
    """
    if tolerance is None:
        dtypes = {getattr(x, "dtype", torch.float32) for x in (got, expected)}
        half = dtypes & {torch.bfloat16, torch.float16}
        tolerance = 1e-2 if half else 1e-9 if dtypes == {torch.float64} else 1e-5
    got, expected = (x.detach().cpu() if isinstance(x, torch.Tensor) else
                     torch.from_numpy(np.asarray(x)) for x in (got, expected))
    assert got.shape == expected.shape, \
        f"{name}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    kinds = ["float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"
             for x in (got, expected)]
    exact = kinds[0] != "float"
    assert kinds[0] == kinds[1] or kinds == ["float", "int"], \
        f"{name}: got {got.dtype}, expected {expected.dtype}"
    wrong = got != expected if exact else ~torch.isclose(
        got.double(), expected.double(), tolerance, tolerance, equal_nan=True)
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    text = f"{name}: got {got[first].item()!r}, expected {expected[first].item()!r}"
    if first:
        text += f" at index {first}; {int(wrong.sum())} of {wrong.numel()} entries differ"
    if got.dtype == torch.bool and 1 < got.dim():
        text += f"\ngot (# is True):\n{grid(got)}\nexpected:\n{grid(expected)}"
    elif got.numel() < 31:
        text += f"\ngot:      {got.tolist()}\nexpected: {expected.tolist()}"
    raise AssertionError(text)


def assert_same(name, got, expected, module=None, tolerance=None, **inputs):
    """The same values, and the same gradients of the module's parameters and of the inputs."""
    assert_close(name, got, expected, tolerance)
    assert got.requires_grad, f"{name}: no gradient passes through it"
    variables = inputs | dict(module.named_parameters() if module else ())
    try:
        gradients = [torch.autograd.grad(y.cos().sum(), tuple(variables.values()), retain_graph=True,
                                         materialize_grads=True) for y in (got, expected)]
    except RuntimeError as error:
        raise AssertionError(f"{name}: backward fails: {error}") from error
    for key, *pair in zip(variables, *gradients):
        assert_close(f"{name}: gradient of {key}", *pair, tolerance)


@contextlib.contextmanager
def refused(values):
    """The block raises ValueError and names all the values, "3.*5", in any order."""
    with pytest.raises(Exception) as caught:
        yield
    assert isinstance(caught.value, ValueError), f"no ValueError, but {caught.value!r}"
    for value in filter(None, values.split(".*")):
        assert re.search(rf"(?<!\d){value.strip()}(?!\d)", str(caught.value)), \
            f"the message does not name {value.strip()}: {caught.value}"


def grid(mask):
    """A bool tensor (..., T, S) as text, # where True; at most three of its matrices."""
    matrices = mask.reshape(-1, *mask.shape[-2:])[:3].tolist()
    return "\n\n".join("\n".join("".join(".#"[x] for x in row) for row in matrix)
                       for matrix in matrices)


@contextlib.contextmanager
def unchanged(**tensors):
    """Inside it, these tensors of the caller stay as they are."""
    before = {name: x.clone() for name, x in tensors.items()}
    yield
    for name, x in tensors.items():
        assert_close(f"the caller's {name}", x, before[name])


# Toy models and their inputs

V, PAD, STOP = 13, 0, 2


def randomize(module, std=0.5):
    """Every parameter random, so that no norm, bias or gate hides at its starting value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def toy_lm(kind="gpt2", vocab_size=V):
    """A small random model in float64, so that no two texts tie."""
    from common.language import LanguageConfig, LanguageModel
    torch.manual_seed(3)
    lm = LanguageModel(LanguageConfig(
        kind=kind, vocab_size=vocab_size, context_length=23, width=24, layers=2, heads=3, hidden=37,
        kv_heads=1 if kind == "llama" else 3, tie_embeddings=False)).double().eval()
    randomize(lm)
    if kind != "llama":                     # else one token is the likeliest after every text
        nn.init.zeros_(lm.norm.bias)
    return lm


def prompts(*lengths, side="left", seed=1):
    """Ragged prompts -> (ids, mask) padded on one side, and the prompts alone (1, T)."""
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, V, (1, n), generator=draw) for n in lengths]
    pads = [(max(lengths) - n, 0) if side == "left" else (0, max(lengths) - n) for n in lengths]
    ids = torch.cat([F.pad(text, pad_id, value=PAD) for text, pad_id in zip(texts, pads)])
    mask = torch.cat([F.pad(torch.ones_like(text), pad_id) for text, pad_id in zip(texts, pads)]).bool()
    return ids, mask, texts


class Words:
    """A vocabulary of whole words, with Flamingo's special tokens."""
    words = "output: question: answer: a red blue cat dog what is this ?".split()
    special = {BOS: "<bos>", EOS: "<eos>", IMAGE: "<image>", EOC: "<eoc>", PAD: "<pad>", -100: "-"}
    bos_id, image_id = BOS, IMAGE

    def batch(self, texts, context_length):
        """<bos> ids <eos> of each text, padded right."""
        rows = [torch.tensor([BOS, *self.encode(text), EOS]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def encode(self, text):
        return [16 + self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i - 16] for i in ids if 16 <= i < 16 + len(self.words))

    def spell(self, ids):
        """Ids or labels as text, special tokens included; "-" is an ignored label."""
        return " ".join(self.special.get(i) or self.decode([i]) for i in ids)


def drawing(*colours, size=15):
    """A clip of frames in these colours; of one colour an image."""
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def page(*turns):
    """A record of (images, prompt, answer) each; images: names of colours."""
    return {"turns": [{"images": [drawing(colour) for colour in images.split()], "prompt": prompt,
                       "answer": answer} for images, prompt, answer in turns]}


class Numbers:
    """A world of red tones and words 0 .. 12; word w is true of the images w and w + 1."""
    name, zero_shot, templates, tasks = "numbers", "single", ("{}", "{}"), ()
    classes, all_classes = ["0", "1", "2"], ["0", "1", "2", "3"]
    sizes = {"test": 13, "single": 5, "composition": 2}

    def size(self, split):
        return self.sizes[split]

    def record(self, split, index):
        number = {"test": index, "single": index % 3, "composition": 3}[split]
        return {"images": drawing((20 * number, 0, 0), size=8), "texts": [str(number), "0"],
                "source": number}

    def is_true(self, text, source):
        return int(text) in (source, source - 1)

    def label(self, source):
        return source


class NumbersData:
    """What figures need of an EvalData of Numbers, changed as `changes` says; and its tokenizer."""

    def __init__(self, world=None, **changes):
        self.world, self.tokenizer = world or Numbers(), self
        vars(self.world).update(changes)

    def records(self, split):
        return [self.world.record(split, i) for i in range(self.world.size(split))]

    def images(self, records):
        from common.data.images import to_tensor
        return to_tensor([record["images"][0] for record in records])

    def ids(self, texts):
        return torch.tensor([[int(text)] for text in texts])

    def batch(self, texts, context_length):          # as a tokenizer
        assert context_length == 5
        return self.ids(texts)


class Table:
    """A model that knows one step: logits of the next token given the last, (V, V)."""

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def __call__(self, x, mask=None, cache=None, last=False):
        self.calls.append(tuple(x.shape))
        return self.logits[x[:, -1:] if last else x]


def chain(*follows, vocab_size=V):
    """A Table in which token a is followed by b for each (a, b), and STOP by itself."""
    logits = torch.zeros(vocab_size, vocab_size)
    for a, b in follows:
        logits[a, b] = 9.0
    return Table(logits)


# Toy CLIP, Flamingo and BLIP

CLIP_EOS = 5                             # not the largest id


def toy_clip(**changes):
    """A CLIP in float64 with random weights: 9 patches of images of 15 pixels, texts of 11 ids."""
    from clip import CLIP, CLIPConfig
    model = CLIP(replace(CLIPConfig(
        image_size=15, patch_size=5, vision_width=12, vision_layers=2, vision_heads=3,
        text_width=14, text_layers=3, text_heads=2, context_length=11, vocab_size=29,
        eos_id=CLIP_EOS, embed_dim=7), **changes)).double()
    randomize(model, 0.3)
    model.logit_scale.data.fill_(1.7)
    if model.logit_bias is not None:
        model.logit_bias.data.fill_(-1.3)
    return model


def texts(rows=3, length=6):
    """Ids that end in CLIP_EOS and have no other."""
    ids = torch.randint(CLIP_EOS + 1, 29, (rows, length))
    ids[:, -1] = CLIP_EOS
    return ids


def clip_batch(rows=5, size=15):
    """A batch as of ImageTextBatch."""
    return {"images": torch.randint(256, (rows, 3, size, size), dtype=torch.uint8),
            "ids": texts(rows)}


def flamingo_config(**changes):
    """An image has S = 9 features, 22 wide, and becomes Q = 7 visual tokens; the language model is
    20 wide. The attentions are 5 x 3 and 3 x 4 wide inside."""
    from clip import CLIPConfig
    from common.language import LanguageConfig
    from flamingo import FlamingoConfig
    return replace(FlamingoConfig(
        vision=CLIPConfig(
            image_size=15, patch_size=5, vision_width=22, vision_layers=3, vision_heads=2,
            text_width=6, text_layers=1, text_heads=1, context_length=5, vocab_size=17,
            embed_dim=2),
        language=LanguageConfig(
            vocab_size=43, context_length=37, width=20, layers=3, heads=2, kv_heads=2, hidden=26),
        num_latents=7, resampler_layers=2, resampler_heads=5, resampler_head_width=3, max_frames=4,
        heads=3, head_width=4), **changes)


def toy_flamingo(gate=None, **changes):
    """A Flamingo in float64 with random weights, norms and gates (gate: the value of all gates)."""
    from flamingo import Flamingo
    model = Flamingo(flamingo_config(**changes)).double()
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(p, mean=1.0, std=0.3)
        elif name.endswith("_gate"):
            nn.init.uniform_(p, 0.4, 0.9) if gate is None else nn.init.constant_(p, gate)
        else:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def make_ids(*rows):
    """Ids of rows of letters: I is <image>, P is padding, any other letter a random word."""
    ids = torch.randint(6, 43, (len(rows), max(map(len, rows))))
    for row, letters in zip(ids, rows):
        for t, letter in enumerate(letters):
            row[t] = {"I": IMAGE, "P": 0}.get(letter, row[t])
    return ids


def make_visual(B=2, N=3):
    """Random visual tokens, as of the resampler: float64 (B, N, Q, D)."""
    return torch.randn(B, N, 7, 22).double()


def make_cache():
    """An empty cache of keys and values."""
    from common.cache import KVCache
    return KVCache()


def make_images(B=2, N=3, frames=1):
    """Random images, uint8 (B, N, F, 3, H, W)."""
    return torch.randint(256, (B, N, frames, 3, 15, 15), dtype=torch.uint8)


def make_batch(*rows, N=3, attend_next=None):
    """A batch as of InterleavedCollator, in which every token but <image> has a label."""
    ids = make_ids(*rows)
    return {"images": make_images(len(rows), N), "ids": ids,
            "labels": ids.where(ids != IMAGE, -100),
            "attend_next": torch.tensor(attend_next or [False] * len(rows))}


BLIP_BOS, BLIP_PAD, BLIP_EOS, BLIP_CLS, BLIP_ENC, BLIP_DEC = 1, 3, 5, 7, 11, 13


def toy_blip(**changes):
    """A model of blip.py in float64 with random weights, those of the momentum encoders too.

    An image of 15 pixels becomes 10 tokens, 12 wide; texts are 10 wide, features 7, the queue 10.
    """
    from blip import BLIPConfig, make_model
    model = make_model(BLIPConfig(**{
        "image_size": 15, "patch_size": 5, "vision_width": 12, "vision_layers": 2,
        "vision_heads": 3, "text_width": 10, "text_layers": 2, "text_heads": 2,
        "context_length": 11, "vocab_size": 29, "embed_dim": 7, "queue_size": 10, "momentum": 0.9,
        "pad_id": BLIP_PAD, "eos_id": BLIP_EOS, "cls_id": BLIP_CLS, "enc_id": BLIP_ENC,
        "dec_id": BLIP_DEC} | changes)).double()
    randomize(model, 0.4)
    if "itc" in model.losses:
        model.temp.data.fill_(0.3)
        model.alpha.fill_(0.35)
    return model


def blip_ids(*lengths):
    """Texts of these lengths, padded right."""
    ids = torch.full((len(lengths), max(lengths)), BLIP_PAD)
    for row, n in zip(ids, lengths):
        row[:n] = torch.randint(14, 29, (n,))
        row[0], row[n - 1] = BLIP_BOS, BLIP_EOS
    return ids


def blip_batch(*lengths):
    """A batch as of CaptionBatch, in which every token but padding has a label."""
    ids, B = blip_ids(*lengths), len(lengths)
    return {"images": torch.randint(256, (B, 3, 15, 15), dtype=torch.uint8), "ids": ids,
            "labels": ids.where(ids != BLIP_PAD, -100), "draws": torch.rand(B, 2)}


def toy_blip2(kind=None, **changes):
    """A model of blip2.py in float64 with random weights, of stage 2 for kind "gpt2" or "t5".

    Images of 15 pixels become 10 tokens, 12 wide; Q = 3 queries, 10 wide, with 3 layers; features
    7 wide; the language model is 14 wide with 43 words.
    """
    from blip2 import BLIP2Config, make_model
    from clip import CLIPConfig
    from common.language import LanguageConfig
    from common.t5 import T5Config
    language = {None: None, "gpt2": LanguageConfig(
        kind="gpt2", vocab_size=43, context_length=31, width=14, layers=2, heads=2, kv_heads=2,
        hidden=19, eos_id=BLIP_EOS, pad_id=BLIP_PAD), "t5": T5Config(
        vocab_size=43, context_length=31, width=14, layers=2, heads=2, head_width=5, hidden=19,
        buckets=6, max_distance=11, eos_id=BLIP_EOS, pad_id=BLIP_PAD)}[kind]
    model = make_model(BLIP2Config(**{
        "vision": CLIPConfig(image_size=15, patch_size=5, vision_width=12, vision_layers=3,
                             vision_heads=3, text_width=6, text_layers=1, text_heads=1,
                             context_length=5, vocab_size=17, embed_dim=2),
        "language": language, "losses": "lm" if kind else "itc,itm,itg", "num_queries": 3,
        "qformer_width": 10, "qformer_layers": 3, "qformer_heads": 2, "vocab_size": 29,
        "qformer_context_length": 11, "embed_dim": 7, "pad_id": BLIP_PAD, "eos_id": BLIP_EOS,
        "cls_id": BLIP_CLS, "dec_id": BLIP_DEC} | changes)).double()
    randomize(model, 0.4)
    if kind is None:
        model.temp.data.fill_(0.3)
    return model.eval()


class AnyWords(Words):
    """A vocabulary in which each new word gets the next id; a blank at the end is a word, "_"."""
    eos_id = EOS

    def __init__(self):
        self.words = []

    def encode(self, text):
        found = text.split() + ["_"] * text.endswith(" ") + ["\\n"] * text.endswith("\n")
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return super().encode(" ".join(found))


def llava_config(**changes):
    """Views of 15 pixels become 9 patches, 14 wide, behind the first 2 of 3 blocks; the language
    model is 20 wide with 61 words and a context of 53. Also kind and context_length, its own."""
    from clip import CLIPConfig
    from common.language import LanguageConfig
    from llava import LLaVAConfig
    kind, length = changes.pop("kind", "gpt2"), changes.pop("context_length", 53)
    return LLaVAConfig(**{
        "vision": CLIPConfig(image_size=15, patch_size=5, vision_width=14, vision_layers=3,
                             vision_heads=2, text_width=6, text_layers=1, text_heads=1,
                             context_length=5, vocab_size=17, embed_dim=3),
        "language": LanguageConfig(kind=kind, vocab_size=61, context_length=length, width=20,
                                   layers=2, heads=2, kv_heads=2, hidden=26, tie_embeddings=False),
        "num_queries": 4, "losses": "instruct"} | changes)


def toy_llava(**changes):
    """A LLaVA in float64 with random weights; changes: fields of its config, or the language
    model's kind."""
    from llava import LLaVA
    return randomize(LLaVA(llava_config(**changes)).double(), 0.4).eval()


def loop_qformer_block(block, x, Q, image=None, mask=None):
    """x (B, Q + T, D); image (B, S, C), None where the queries do not see it."""
    assert image is None or block.cross is not None, "cross-attention is missing"
    norm = partial(layer_norm, eps=1e-12)
    x = norm(block.attn_norm, x + attend_by_hand(block.attn, x, heads=2, mask=mask))
    queries, text = x[:, :Q], x[:, Q:]
    if image is not None:
        queries = norm(block.cross_norm, queries + attend_by_hand(block.cross, queries, image,
                                                                  heads=2))
    if Q:
        queries = norm(block.mlp_norm, queries + mlp_by_hand(block.mlp, queries))
    if text.shape[1]:
        text = norm(block.text_mlp_norm, text + mlp_by_hand(block.text_mlp, text))
    return torch.cat([queries, text], dim=1)


def loop_qformer(qformer, image=None, ids=None, may_attend=lambda query, key: True):
    """Queries of image tokens (S, C), text ids (T,), or both -> (Q + T, D).

    may_attend(query, key): whether a position of the sequence attends to another.
    """
    norm, parts = partial(layer_norm, eps=1e-12), []
    if image is not None:
        parts.append(qformer.query_tokens)
    Q = len(parts) and len(parts[0])
    if ids is not None:
        parts.append(qformer.token_embed.weight[ids] + qformer.pos_embed.weight[:len(ids)])
    x = norm(qformer.norm, torch.cat(parts))[None]
    size = range(x.shape[1])
    mask = torch.tensor([[bool(may_attend(q, k)) for k in size] for q in size])
    for number, block in enumerate(qformer.blocks):
        seen = None if image is None or number % 2 else image[None]
        x = loop_qformer_block(block, x, Q, seen, mask)
    return x[0]


def loop_hidden(vit, images, heads):
    """All tokens of a CLIP ViT behind the blocks that it has: (B, 3, H, W) -> (B, 1 + N, D)."""
    embed = vit.patch_embed.weight.unflatten(1, (3, 5, 5))
    patches = F.conv2d(images, embed, stride=5).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(len(images), 1, -1), patches], dim=1) + vit.pos_embed
    x = layer_norm(vit.ln_pre, x)
    for block in vit.transformer.blocks:
        x = block_by_hand(block, x, heads=heads)
    return x


def loop_image_tokens(encoder, images, heads=3):
    """BLIP-2's image tokens: a CLIP ViT's without its last block, then a norm of its own."""
    return layer_norm(encoder.norm, loop_hidden(encoder.vit, images, heads))


def in_processes(count, function):
    """[function(rank, gather), ...] of processes that are threads; gather joins their tensors."""
    barrier, parts = threading.Barrier(count, timeout=30), [None] * count

    def process(rank):
        def gather(x):
            parts[rank] = x
            barrier.wait()
            joined, first = torch.cat(parts), sum(map(len, parts[:rank]))
            barrier.wait()
            return joined, first
        try:
            return function(rank, gather)
        except Exception as error:       # the others stop waiting for this one
            barrier.abort()
            raise AssertionError(f"process {rank} fails: {error!r}") from error
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(process, range(count)))


def assert_two_equal_one(whole, batch):
    """Two processes with half of the batch each have the mean losses and the gradients of one.

    The first half's texts are cut to 6 tokens, as long as its longest. Returns the two models.
    """
    both = [copy.deepcopy(whole) for _ in range(2)]
    shares = [{name: x[rows] for name, x in batch.items()} for rows in (slice(3), slice(3, 6))]
    for name in ("ids", "labels"):
        shares[0][name] = shares[0][name][:, :6]
    count = (batch["labels"][:, 1:] != -100).sum()
    found = in_processes(2, lambda rank, gather: both[rank](
        shares[rank] | {"label_count": count / 2}, gather))
    expected = whole(batch | {"label_count": count})
    for name, loss in expected.items():
        assert_close(f"mean {name}", sum(losses[name] for losses in found) / 2, loss, 1e-6)
    sum(loss / 2 for losses in found for loss in losses.values()).backward()
    sum(expected.values()).backward()
    for name, p in whole.named_parameters():
        if p.requires_grad:
            grads = [dict(model.named_parameters())[name].grad for model in both]
            assert_close(f"gradient of {name}", sum(grads), p.grad, 1e-6)
    return both


# The papers in loops and plain products

ACTS = {"gelu": lambda x: x * (1 + torch.erf(x / 2 ** 0.5)) / 2,
        "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
        "squared_relu": lambda x: x.clamp(min=0) ** 2}


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def rms_norm(norm, x, eps=1e-6):
    return x / (x ** 2).mean(-1, keepdim=True).add(eps).sqrt() * norm.weight


def layer_norm(norm, x, eps=1e-5):
    assert norm is not None, "a norm is missing"
    centered = x - x.mean(-1, keepdim=True)
    return rms_norm(norm, centered, eps) + norm.bias               # the variance divides by D


def mlp_by_hand(mlp, x, act=F.gelu):
    return linear(mlp.fc2, act(linear(mlp.fc1, x)))


def gated_mlp(mlp, x, act=F.silu):
    return linear(mlp.down_proj, act(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))


def slow_attention(q, k, v, mask=None, bias=None, scale=None):
    """For one query after the other: a softmax over the keys it may attend to."""
    (B, H, T, K), S, rows = q.shape, k.shape[2], []
    mask = (torch.tensor(True) if mask is None else mask).expand(B, H, T, S)
    bias = (torch.tensor(0.0) if bias is None else bias).expand(B, H, T, S)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        keys = mask[b, h, t].nonzero().flatten()
        scores = k[b, h, keys] @ q[b, h, t] * (K ** -0.5 if scale is None else scale)
        scores = scores + bias[b, h, t, keys]
        shares = (scores - scores.max()).exp() if len(keys) else scores
        rows.append(shares / shares.sum() @ v[b, h, keys])        # of no keys: zeros
    return torch.stack(rows).view(B, H, T, -1)


def rotated(x, angles):
    """The pairs (i, i + K/2) of x (B, H, T, K) as complex numbers; angles (..., T, K/2)."""
    turn = torch.complex(*(part.float().to(x.dtype) for part in (angles.cos(), angles.sin())))
    pairs = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def attend_by_hand(layer, x, context=None, *, heads=3, kv_heads=None, scale=None, mask=None,
                   bias=None, angles=None):
    """The attention layer; every head has its own slice of the features."""
    kv_heads, context = kv_heads or heads, x if context is None else context
    q = torch.stack(linear(layer.q_proj, x).chunk(heads, dim=-1), dim=1)
    k, v = (torch.stack(linear(part, context).chunk(kv_heads, dim=-1), dim=1)
            for part in (layer.k_proj, layer.v_proj))
    if angles is not None:
        q, k = rotated(q, angles), rotated(k, angles)
    shared = [h * kv_heads // heads for h in range(heads)]     # neighbours share keys and values
    out = slow_attention(q, k[:, shared], v[:, shared], mask, bias, scale)
    return linear(layer.out_proj, torch.cat(out.unbind(dim=1), dim=-1))


def block_by_hand(block, x, context=None, *, norm=layer_norm, mlp=mlp_by_hand, norm_first=True,
                  context_mask=None, mask=None, bias=None, angles=None, **sizes):
    attn = partial(attend_by_hand, mask=mask, bias=bias, angles=angles, **sizes)
    cross = partial(attend_by_hand, context=context, mask=context_mask, **sizes)
    parts = [(block.attn_norm, attn, block.attn), (block.cross_norm, cross, block.cross),
             (block.mlp_norm, mlp, block.mlp)]
    assert context is None or block.cross is not None, "cross-attention is missing"
    for layer, part, weights in parts[::2] if context is None else parts:
        x = x + part(weights, norm(layer, x)) if norm_first else norm(layer, x + part(weights, x))
    return x


class ToyCache:
    """The KV cache in its simplest form."""

    def __init__(self):
        self.length, self.entries = 0, {}

    def append(self, layer, *new):
        old = self.entries.get(layer, [x[:, :, :0] for x in new])
        self.entries[layer] = [torch.cat(pair, dim=2) for pair in zip(old, new)]
        self.length = self.entries[layer][0].shape[2]
        return self.entries[layer]

    def get_or_compute(self, layer, length, compute):
        if layer not in self.entries or self.entries[layer][0].shape[2] != length:
            self.entries[layer] = compute()
        return self.entries[layer]


def loss_by_hand(image, text, scale, bias=None):
    """The loss of all pairs by CLIP's Figure 3 and, with a bias, by SigLIP's Algorithm 1."""
    logits = scale * image @ text.T
    if bias is None:
        log_sums = logits.exp().sum(dim=0).log() + logits.exp().sum(dim=1).log()
        return (log_sums / 2 - logits.diagonal()).mean()
    sign = 2 * torch.eye(len(image)) - 1
    return (1 + (-sign * (logits + bias)).exp()).log().sum() / len(image)


def loop_pixels(images):
    """uint8 (..., 3, H, W) -> float64, by CLIP's mean and deviation of each channel."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    return (images.double() / 255 - mean) / std


def loop_text(tower, ids, heads, act="gelu"):
    """CLIP's text features: ids (B, T) -> (B, D), the first end token's, after the last norm."""
    x, causal = tower.token_embed.weight[ids], torch.ones(2 * ids.shape[1:]).tril().bool()
    x = x + tower.pos_embed[:ids.shape[1]]
    mlp = partial(mlp_by_hand, act=ACTS[act])
    for block in tower.transformer.blocks:
        x = block_by_hand(block, x, mlp=mlp, heads=heads, mask=causal)
    ends = [row.index(CLIP_EOS) for row in ids.tolist()]
    return layer_norm(tower.transformer.norm, x[range(len(x)), ends])


def loop_vit(vit, images, heads=3, eps=1e-6):
    """BLIP's image tokens: float (B, 3, H, W) -> (B, 1 + N, D)."""
    kernel = vit.patch_embed.weight.unflatten(1, (3, vit.patch_size, vit.patch_size))
    patches = F.conv2d(images, kernel, vit.patch_embed.bias, stride=vit.patch_size)
    x = torch.cat([vit.cls_token.expand(len(images), 1, -1), patches.flatten(2).mT], dim=1)
    x = x + vit.pos_embed
    for block in vit.transformer.blocks:
        x = block_by_hand(block, x, heads=heads, norm=partial(layer_norm, eps=eps))
    return layer_norm(vit.ln_post, x, eps)


def loop_bert(bert, ids, context=None, mask=None, context_mask=None, is_causal=False, heads=2):
    """BLIP's text states: each text alone, without its padding -> (B, T, D), 0 at padding."""
    norm, rows = partial(layer_norm, eps=1e-12), []
    mask = torch.ones(ids.shape).bool() if mask is None else mask
    for b, real in enumerate(mask):
        x = bert.token_embed.weight[ids[b, real]] + bert.pos_embed.weight[:int(real.sum())]
        x, order = norm(bert.norm, x)[None], torch.ones(2 * x.shape[:1]).tril().bool()
        seen = context if context is None else context[b:b + 1]
        for block in bert.blocks:
            x = block_by_hand(block, x, seen if context_mask is None else seen[:, context_mask[b]],
                              norm=norm, norm_first=False, heads=heads,
                              mask=order if is_causal else None)
        rows.append(torch.zeros(len(real), x.shape[2]).to(x).masked_scatter(real[:, None], x[0]))
    return torch.stack(rows)


def loop_head(head, x, table):
    """BERT's head for words: x (B, T, D), table (V, D) -> logits (B, T, V)."""
    return layer_norm(head.norm, F.gelu(linear(head.dense, x)), 1e-12) @ table.T + head.bias


def loop_resampler_layer(layer, latents, media, heads=5, act="squared_relu"):
    """latents (B, Q, D), media (B, S, D)."""
    queries = layer_norm(layer.latents_norm, latents)
    keys = torch.cat([queries, layer_norm(layer.media_norm, media)], dim=1)
    latents = latents + attend_by_hand(layer.attn, queries, keys, heads=heads)
    return latents + mlp_by_hand(layer.mlp, layer_norm(layer.mlp_norm, latents), ACTS[act])


def loop_resampler(resampler, features, act="squared_relu"):
    """features (..., F, S, D) of images, or of clips of max_frames frames -> (..., Q, D)."""
    media = features + resampler.frames.weight[:features.shape[-3], None]
    media = media.flatten(-3, -2).flatten(0, -3)                      # (B, F * S, D)
    latents = resampler.latents.expand(len(media), -1, -1)
    for layer in resampler.layers:
        latents = loop_resampler_layer(layer, latents, media, act=act)
    return layer_norm(resampler.norm, latents).unflatten(0, features.shape[:-3])


def media_mask_of(rows, N=3, Q=7, only_latest_image=True, attend_next=False):
    """The media mask (B, 1, T, N * Q) of rows of letters, of which I is an image."""
    mask = torch.zeros(len(rows), len(rows[0]), N, dtype=torch.bool)
    for b, row in enumerate(rows):
        for t in range(len(row)):
            last = row[:t + 1].count("I") - 1
            if attend_next:              # the image at or after t
                last = row[:t].count("I") if "I" in row[t:] else -1
            mask[b, t, max(last, 0) if only_latest_image else 0:last + 1] = True
    return mask.repeat_interleave(Q, dim=2)[:, None]


def loop_gated_block(block, x, visual, mask, act="squared_relu"):
    """x (B, T, D), visual (B, N, Q, C), mask (B, 1, T, N * Q)."""
    attended = attend_by_hand(block.attn, layer_norm(block.attn_norm, x), visual.flatten(1, 2),
                              mask=mask)
    x = x + math.tanh(block.attn_gate.item()) * attended
    hidden = mlp_by_hand(block.mlp, layer_norm(block.mlp_norm, x), ACTS[act])
    return x + math.tanh(block.mlp_gate.item()) * hidden


# Command lines

def command(file, *argv):
    """Do what `python FILE ARGV` does, in this process -> (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", [file, *map(str, argv)])
        patch.setenv("COLUMNS", "100")
        runpy.run_path(str(Path(__file__).parents[1] / file), run_name="__main__")
    return caught.value.code or 0, out.getvalue(), err.getvalue()


def mistake(file, *argv):
    """The one line on stderr with which a command ends with status 2, perhaps after its usage."""
    status, out, err = command(file, *argv)
    assert status == 2 and "Traceback" not in err, err
    *usage, line = err.splitlines()
    assert re.match(rf"{file}.*: error: " if usage else "error: ", line), err
    return line


@contextlib.contextmanager
def full_disk(size):
    """Inside it no file grows beyond `size` bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The user's own data

def colour(number):
    """The colour of picture number so and so."""
    return (5 * number % 256, 90, 200 - number % 190)


def picture(number):
    """The bytes of a PNG."""
    out = io.BytesIO()
    Image.new("RGB", (9, 11), colour(number)).save(out, "PNG")
    return out.getvalue()


def shard(path, members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes or a type of member)."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes) and len(data) > 1:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = data, "/etc/passwd"
                archive.addfile(member)


def shards(folder, sizes, start=0):
    """Shards of records numbered through from `start`, named 00.tar, 01.tar."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count(start)
    for place, size in enumerate(sizes):
        members = [(f"{number:05d}.{suffix}", data) for number in itertools.islice(numbers, size)
                   for suffix, data in (("jpg", picture(number)),
                                        ("txt", f"number {number}".encode()))]
        shard(folder / f"{place:02d}.tar", members)
    return f"tar:{folder}/*.tar"


def listed(folder, count, bad=()):
    """A JSON lines file of `count` pictures in a folder, of which some are missing."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        if number not in bad:
            (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"image": f"{number}.png", "text": f"number {number}"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/data.jsonl"


def names(world, split):
    """The names of the pictures of a split of `Files`."""
    return [world.blank(split, index)["source"]["source"] for index in range(world.size(split))]
