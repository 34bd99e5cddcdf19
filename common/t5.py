"""T5: a transformer that reads a text, and one that writes another (BLIP-2's FLAN-T5).

    t5 = T5(PRESETS["t5-tiny"])
    logits = t5(prompt_ids, ids)         # (B, S) and (B, T) -> (B, T, V); ids begin with <pad>
    new = t5.generate(prompt_ids)

Exploring the Limits of Transfer Learning (Raffel et al., 2020) as version 1.1 and FLAN-T5 changed
it: gated MLPs, and a head of its own whose input is not scaled.
"""
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.generation import generate
from common.language import LanguageConfig, LanguageModel
from common.masks import causal, padding
from common.training import checkpoint, options
from common.transformer import GatedMLP, RMSNorm, Transformer, gelu, gelu_tanh, t5_block

ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu}


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. vocab_size, eos_id and pad_id belong to the tokenizer."""
    kind: str = "t5"
    vocab_size: int = 1024
    context_length: int = 256            # of either text here; T5 itself has no limit
    width: int = 128
    layers: int = 3                      # of the encoder, and as many of the decoder
    heads: int = 4
    head_width: int = 32                 # heads * head_width need not be the width
    hidden: int = 352                    # of the MLPs
    act: str = "gelu_tanh"               # "gelu", the exact one: FLAN-T5 in BLIP-2's released code
    eps: float = 1e-6                    # of the norms
    buckets: int = 32                    # of distances, see RelativeBias
    max_distance: int = 128
    eos_id: int = 2
    pad_id: int = 0                      # also the first token that the decoder reads

    def __post_init__(self):
        options.check_fields(self, {"kind": ("t5",), "act": ACTIVATIONS}, {
            "eps": 1e-12, "buckets": 4, "max_distance": self.buckets // 2 + 1, "eos_id": 0,
            "pad_id": 0})


FLAN_T5_XL = T5Config(vocab_size=32128, context_length=512, width=2048, layers=24, heads=32,
                      head_width=64, hidden=5120, eos_id=1)
PRESETS = {
    "t5-tiny": T5Config(),
    "t5-small": T5Config(context_length=512, width=512, layers=6, heads=8, head_width=64,
                         hidden=1408),
    "flan-t5-xl": FLAN_T5_XL,
    "flan-t5-xxl": replace(FLAN_T5_XL, width=4096, heads=64, hidden=10240),
}


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number per head for each bucket of distances.

    bidirectional: half the buckets are for keys after the query (encoders); else none (decoders).
    """

    def __init__(self, *, heads, buckets=32, max_distance=128, bidirectional=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads).normal_(std=0.02))
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional

    def bucket(self, distance):
        """distance int64 = key position - query position -> bucket numbers of the same shape.

        Of n buckets, the first e = n // 2 are for the distances 0 .. e - 1. Distance d >= e is in
        bucket min(e + floor(log(d / e) / log(max_distance / e) * (n - e)), n - 1). Bidirectional:
        n = buckets // 2, and keys after the query are in buckets n .. 2n - 1. Else n = buckets, and
        a key after the query has distance 0.
        """
        buckets, side = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            side, distance = (distance > 0) * buckets, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2             # one bucket per distance below this, then log-spaced ones
        far = exact + (torch.log(distance.clamp(min=1).float() / exact)
                       / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return side + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, T, S):
        """The bias (1, H, T, S) of S keys and of queries at the last T of their positions."""
        positions = torch.arange(S, device=self.weight.device)
        distance = positions[None, :] - positions[S - T:, None]       # (T, S)
        return self.weight[self.bucket(distance)].permute(2, 0, 1)[None]


class T5(nn.Module):
    """An encoder, and a decoder that attends to the encoder's states."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config

        def stack(decoder):
            blocks = [t5_block(width=c.width, heads=c.heads, head_width=c.head_width,
                               mlp=GatedMLP(width=c.width, hidden=c.hidden,
                                            act=ACTIVATIONS[c.act]),
                               decoder=decoder, eps=c.eps) for _ in range(c.layers)]
            bias = RelativeBias(heads=c.heads, buckets=c.buckets, max_distance=c.max_distance,
                                bidirectional=not decoder)
            return Transformer(blocks, RMSNorm(c.width, c.eps)), bias
        self.token_embed = nn.Embedding(c.vocab_size, c.width)
        self.encoder, self.encoder_bias = stack(decoder=False)
        self.decoder, self.decoder_bias = stack(decoder=True)
        self.output = nn.Linear(c.width, c.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """T5's: by each layer's inputs, queries smaller because scores are not scaled.

        The head is ours: N(0, 1 / width), so that a new model's loss is ln V.
        """
        c = self.config
        stds = {"token_embed": 1, "output": 1 / c.width, "q_proj": (c.width * c.head_width) ** -0.5,
                "out_proj": (c.heads * c.head_width) ** -0.5, "down_proj": c.hidden ** -0.5}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:      # also k_proj, v_proj, gate_proj, up_proj and the biases
                std = stds.get(name.split(".")[-2], c.width ** -0.5)
                nn.init.normal_(parameter, std=std)

    def embed(self, ids):
        """ids int64 (B, T) -> (B, T, D)."""
        return self.token_embed(ids)

    def attn_mask(self, mask, S):
        """mask bool (B, S) or (B, T, S), True = may attend -> for the blocks; None stays None.

        Raises ValueError for a mask of another kind, and for S tokens beyond the context.
        """
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-1] != S):
            raise ValueError(f"a mask of {mask.dtype} {tuple(mask.shape)} for {S} tokens: it must "
                             f"be bool (B, {S})")
        if S > self.config.context_length:           # padding does not count
            longest = S if mask is None else int(mask.sum(dim=-1).max())
            if longest > self.config.context_length:
                raise ValueError(f"{longest} tokens, but the context is "
                                 f"{self.config.context_length}")
        if mask is None:
            return None
        return padding(mask) if mask.dim() == 2 else mask[:, None]    # (B, 1, 1 or T, S)

    def encode(self, x, mask=None):
        """x: ids int64 (B, S) or embeddings float (B, S, D) -> states (B, S, D).

        mask: bool (B, S), True at tokens and False at padding; None: no padding. Where a row has
        several texts: bool (B, S, S), True where two tokens are of one text.
        """
        x, S = x if x.is_floating_point() else self.embed(x), x.shape[1]
        return self.encoder(x, mask=self.attn_mask(mask, S), bias=self.encoder_bias(S, S))

    def logits(self, ids, mask=None, cache=None, last=False, *, context, context_mask=None):
        """The decoder: ids int64 (B, T) -> logits (B, T, V). Its texts begin with pad_id.

        context float (B, S, D): the encoder's states; context_mask bool (B, S): its tokens. mask:
        bool (B, past + T), False at padding, on either side because only distances count. Both may
        be (B, T, ...), as in `encode`. cache: a KVCache. last: the logits of the newest position
        alone, (B, 1, V).
        """
        T, past = ids.shape[1], 0 if cache is None else cache.length
        mask, order = self.attn_mask(mask, past + T), causal(T, past, ids.device)
        x = self.decoder(self.embed(ids), context, mask=order if mask is None else order & mask,
                         context_mask=self.attn_mask(context_mask, context.shape[1]),
                         bias=self.decoder_bias(T, past + T), cache=cache)
        return self.output(x[:, -1:] if last else x)

    def forward(self, x, ids, mask=None):
        """Logits (B, T, V) of ids (B, T), given x and its mask as for `encode`."""
        return self.logits(ids, context=self.encode(x, mask), context_mask=mask)

    def generate(self, x, mask=None, **options):
        """`generation.generate` after the encoder has read x; x and mask as for `encode`."""
        c, states = self.config, self.encode(x, mask)
        state = {"context": states} | ({} if mask is None else {"context_mask": mask})
        start = torch.full((len(states), 1), c.pad_id, device=states.device)
        defaults = {"context_length": c.context_length, "stop": (c.eos_id,), "pad_id": c.pad_id}
        return generate(self.logits, start, state=state, **defaults | options)


def language_config(fields):
    """The LanguageConfig or T5Config of a dict, such as a run's; ValueError for unknown fields."""
    kind = T5Config if fields.get("kind") == "t5" else LanguageConfig
    return checkpoint.config_of(kind, fields, "language")


def make_language(config):
    """The LanguageModel or T5 of a config."""
    return (T5 if isinstance(config, T5Config) else LanguageModel)(config)
