"""Small Flamingos with random weights, their inputs, and the paper's layers as loops of vectors."""
import math
from dataclasses import replace

import torch
from torch import nn

import train
from clip import CLIPConfig
from common.data.tokenizer import IMAGE
from common.language import LanguageConfig
from flamingo import Flamingo, FlamingoConfig

# An image has S = 9 features, 22 wide, and becomes Q = 7 visual tokens; the language model is 20
# wide. The attentions are 5 x 3 and 3 x 4 wide inside.
CONFIG = FlamingoConfig(
    vision=CLIPConfig(
        image_size=15, patch_size=5, vision_width=22, vision_layers=3, vision_heads=2, text_width=6,
        text_layers=1, text_heads=1, context_length=5, vocab_size=17, embed_dim=2),
    language=LanguageConfig(
        vocab_size=43, context_length=37, width=20, layers=3, heads=2, kv_heads=2, hidden=26),
    num_latents=7, resampler_layers=2, resampler_heads=5, resampler_head_width=3, max_frames=4,
    heads=3, head_width=4)


def make(gate=None, **changes):
    """A Flamingo in float64 with random weights, norms and gates (gate: the value of all gates)."""
    model = Flamingo(replace(CONFIG, **changes)).double()
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


def make_features(B=2, N=3, frames=1):
    """Random features of the vision encoder, float64 (B, N, F, S, D)."""
    return torch.randn(B, N, frames, 9, 22).double()


def make_visual(B=2, N=3):
    """Random visual tokens, as of the resampler: float64 (B, N, Q, D)."""
    return torch.randn(B, N, 7, 22).double()


def make_images(B=2, N=3, frames=1):
    """Random images, uint8 (B, N, F, 3, H, W)."""
    return torch.randint(256, (B, N, frames, 3, 15, 15), dtype=torch.uint8)


def make_batch(*rows, N=3, attend_next=None):
    """A batch as of InterleavedCollator, in which every token but <image> has a label."""
    ids = make_ids(*rows)
    return {"images": make_images(len(rows), N), "ids": ids,
            "labels": ids.where(ids != IMAGE, -100),
            "attend_next": torch.tensor(attend_next or [False] * len(rows))}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ the paper in loops

def loop_norm(x, norm):
    """x (D,), one vector."""
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * norm.weight + norm.bias


def loop_attention(layer, query, keys, heads):
    """One vector attends to a list of vectors; to none: 0."""
    if not keys:
        return torch.zeros(layer.out_proj.weight.shape[0]).double()
    width, outputs = layer.q_proj.weight.shape[0] // heads, []
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        q = layer.q_proj.weight[rows] @ query
        scores = torch.stack([q @ (layer.k_proj.weight[rows] @ k) for k in keys]) / width ** 0.5
        shares = scores.exp() / scores.exp().sum()
        outputs.append(sum(s * (layer.v_proj.weight[rows] @ k) for s, k in zip(shares, keys)))
    return layer.out_proj.weight @ torch.cat(outputs)


def loop_mlp(mlp, x):
    return mlp.fc2.weight @ (mlp.fc1.weight @ x).clamp(min=0) ** 2


def loop_resampler(resampler, features):
    """features (F, S, D) of one image, or of a clip of max_frames frames."""
    media = [v + resampler.frames.weight[f] for f, frame in enumerate(features) for v in frame]
    latents = list(resampler.latents)
    for layer in resampler.layers:
        queries = [loop_norm(v, layer.latents_norm) for v in latents]
        keys = [loop_norm(v, layer.media_norm) for v in media] + queries
        latents = [v + loop_attention(layer.attn, q, keys, 5) for v, q in zip(latents, queries)]
        latents = [v + loop_mlp(layer.mlp, loop_norm(v, layer.mlp_norm)) for v in latents]
    return torch.stack([loop_norm(v, resampler.norm) for v in latents])


def loop_gated_block(block, x, visual, ids):
    """x (T, D), visual (N, Q, C), ids (T,) of one row."""
    out = []
    for t in range(len(x)):
        image = sum(i == IMAGE for i in ids[:t + 1].tolist())
        keys = list(visual[image - 1]) if image else []
        y = x[t] + math.tanh(block.attn_gate.item()) * loop_attention(
            block.attn, loop_norm(x[t], block.attn_norm), keys, 3)
        out.append(y + math.tanh(block.mlp_gate.item()) * loop_mlp(
            block.mlp, loop_norm(y, block.mlp_norm)))
    return torch.stack(out)


# Small runs

SETTINGS = {
    "clip": ["vision_width=22", "vision_layers=2", "vision_heads=2", "text_width=6",
             "text_layers=1", "text_heads=1", "embed_dim=3", "context_length=9"],
    "lm": ["width=20", "layers=3", "heads=2", "kv_heads=2", "hidden=26"],
    "flamingo": ["num_latents=7", "resampler_layers=1", "resampler_heads=5",
                 "resampler_head_width=3", "cross_attn_every=2", "heads=3", "head_width=4",
                 "max_frames=4", "gate_init=0.5"]}


def options(**more):
    """Options of a two-step run on the toy world."""
    return train.Options(**{"data": "toy", "batch_size": 16, "steps": 2, "precision": "fp32",
                            "device": "cpu"} | more)
