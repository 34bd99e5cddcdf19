"""A small Flamingo with random weights, and small runs of its stages."""
from dataclasses import replace

import torch
from torch import nn

import clip
import train
from common.language import LanguageConfig
from flamingo import Flamingo, FlamingoConfig

# S = 9 patches and a class token 22 wide, Q = 7 latents, a language model 20 wide; the attentions
# are 5 x 3 and 3 x 4 wide inside.
CONFIG = FlamingoConfig(
    vision=clip.CLIPConfig(image_size=15, patch_size=5, vision_width=22, vision_layers=3,
                           vision_heads=2, text_width=6, text_layers=1, text_heads=1,
                           context_length=5, vocab_size=17, embed_dim=2),
    language=LanguageConfig(vocab_size=43, context_length=37, width=20, layers=3, heads=2,
                            kv_heads=2, hidden=26),
    num_latents=7, resampler_layers=2, resampler_heads=5, resampler_head_width=3, max_frames=4,
    heads=3, head_width=4)


def random_flamingo(**changes):
    """A Flamingo in float64 with random weights, norms and open gates."""
    torch.manual_seed(0)
    model = Flamingo(replace(CONFIG, **changes)).double()
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(p, mean=1.0, std=0.3)
        elif name.endswith("_gate"):
            nn.init.uniform_(p, 0.4, 0.9)
        else:
            nn.init.normal_(p, std=0.3)
    return model.eval()


SETTINGS = {
    "clip": ["vision_width=22", "vision_layers=2", "vision_heads=2", "text_width=6",
             "text_layers=1", "text_heads=1", "embed_dim=3", "context_length=9"],
    "lm": ["width=20", "layers=3", "heads=2", "kv_heads=2", "hidden=26"],
    "flamingo": ["num_latents=7", "resampler_layers=1", "resampler_heads=5",
                 "resampler_head_width=3", "cross_attn_every=2", "heads=3", "head_width=4",
                 "max_frames=4", "gate_init=0.5"]}


def options(**more):
    """Options of a two-step run on the toy world."""
    return train.Options(**{"data": "toy", "batch_size": 20, "steps": 2, "precision": "fp32",
                            "device": "cpu"} | more)
