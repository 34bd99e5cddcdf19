"""OpenFlamingo's modules: its parameter names, and its mathematics in its own order.

It shares no code with ours but the frozen language model. Its <image> is ours, by id.
"""
import torch
from torch import nn

from common.data.tokenizer import IMAGE


def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                         nn.Linear(4 * width, width, bias=False))


class Attention(nn.Module):
    def __init__(self, width, media, heads=8):
        super().__init__()
        self.to_q = nn.Linear(width, heads * 64, bias=False)
        self.to_kv = nn.Linear(media, 2 * heads * 64, bias=False)
        self.to_out = nn.Linear(heads * 64, width, bias=False)

    def attend(self, x, media, mask):
        """x (B, T, D), media (B, S, C), mask bool (B, T, S); where it is empty the output is 0."""
        q, k, v = (y.unflatten(-1, (8, 64)) for y in (
            self.to_q(x), *self.to_kv(media).chunk(2, dim=-1)))
        scores = torch.einsum("bthd,bshd->bhts", q / 8, k).masked_fill(~mask[:, None], -1e30)
        shares = scores.softmax(-1) * mask.any(-1)[:, None, :, None]
        return self.to_out(torch.einsum("bhts,bshd->bthd", shares, v).flatten(2))


class PerceiverAttention(Attention):
    def __init__(self, width):
        super().__init__(width, width)
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        x = torch.cat((x, latents), dim=1)
        return self.attend(latents, x, torch.ones(*latents.shape[:2], x.shape[1]).bool())


class Perceiver(nn.Module):
    def __init__(self, width, latents=7, layers=3):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(width), feed_forward(width)])
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed in self.layers:
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(Attention):
    def __init__(self, width, media):
        super().__init__(width, media)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, media, text_time):
        media_time = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        return self.attend(self.norm(x), media.flatten(1, 2), text_time[:, :, None] == media_time)


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, width, media):
        super().__init__()
        self.attn, self.ff = MaskedCrossAttention(width, media), feed_forward(width)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, text_time):
        x = self.attn(x, media, text_time) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class Layer(nn.Module):
    def __init__(self, gated, decoder):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated, decoder


class OpenFlamingo(nn.Module):
    """Around the frozen blocks of one of our own models."""

    def __init__(self, ours):
        super().__init__()
        self.perceiver = Perceiver(22)
        gated = [GatedCrossAttentionBlock(20, 22) if i % 2 else None for i in range(5)]
        self.lang_encoder = nn.Module()
        self.lang_encoder.model = nn.Module()
        self.lang_encoder.model.layers = nn.ModuleList(map(Layer, gated, ours.lm.blocks))
        self.lang_encoder.model.embed_tokens = nn.Embedding(46, 20)
        self.lang_encoder.lm_head = nn.Linear(20, 46, bias=False)
        self.lang_encoder.old_decoder_blocks = nn.ModuleList(ours.lm.blocks)     # second names
        self.lang_encoder.gated_cross_attn_layers = nn.ModuleList(g for g in gated if g)
        for name, p in self.named_parameters():
            if "decoder" not in name:
                nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3)

    def forward(self, ours, features, ids):
        B, N = features.shape[:2]
        media = self.perceiver(features.flatten(2, 3).flatten(0, 1)).unflatten(0, (B, N))
        text_time = (ids == IMAGE).cumsum(dim=1)
        x, inputs = ours.lm.block_inputs(ours.lm.embed(ids))
        for layer in self.lang_encoder.model.layers:
            if layer.gated_cross_attn_layer is not None:
                x = layer.gated_cross_attn_layer(x, media, text_time)
            x = layer.decoder_layer(x, **inputs)
        return ours.lm.head(x)
