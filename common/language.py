"""Decoder language models: GPT-2, OPT and LLaMA are one class with three kinds of block.

    lm = LanguageModel(PRESETS["tiny"])
    logits = lm(ids)                                          # (B, T) -> (B, T, V)

    x, inputs = lm.block_inputs(lm.embed(ids), mask, cache)   # the same in parts, for a paper that
    for block in lm.blocks:                                   # puts its own layers between blocks
        x = block(x, **inputs)
    logits = lm.head(x)

Language Models are Unsupervised Multitask Learners (Radford et al., 2019), OPT (Zhang et al.,
2022), LLaMA (Touvron et al., 2023).
"""
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from common.generation import generate
from common.masks import causal, padding
from common.pretrained import language as pretrained
from common.pretrained.files import is_published
from common.training import checkpoint, options
from common.transformer import (LayerNorm, LearnedPositions, RMSNorm, gpt2_block, llama_block,
                                opt_block, rope_table)

KINDS = ("gpt2", "opt", "llama")


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a decoder. vocab_size, eos_id and pad_id belong to the tokenizer."""
    kind: str = "llama"                  # or gpt2, opt
    vocab_size: int = 1024
    context_length: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4                    # fewer than heads: groups of queries share keys (llama)
    hidden: int = 352                    # of the MLP
    tie_embeddings: bool = True          # the head is the embedding table
    eps: float = 1e-5                    # of the norms
    rope_theta: float = 10000.0
    rope_scale: float = 1.0              # positions are divided by it (linear scaling)
    eos_id: int = 2
    pad_id: int = 0

    def __post_init__(self):
        options.check_fields(self, {"kind": KINDS}, {
            "eps": 1e-12, "rope_theta": 1e-9, "rope_scale": 1e-9, "eos_id": 0, "pad_id": 0})
        if self.kind != "llama" and self.kv_heads != self.heads:
            raise ValueError(f"kv_heads={self.kv_heads}: {self.kind} has as many as its "
                             f"{self.heads} heads")
        if self.kind == "llama" and self.width // self.heads % 2:
            raise ValueError(f"width {self.width} / {self.heads} heads is odd: rotary positions "
                             "rotate pairs")


def gpt2_size(layers, width, heads):
    """One of GPT-2's sizes."""
    return LanguageConfig(kind="gpt2", vocab_size=50257, context_length=1024, width=width,
                          layers=layers, heads=heads, kv_heads=heads, hidden=4 * width,
                          eos_id=50256, pad_id=50256)


def opt_size(layers, width, heads):
    """One of OPT's sizes (its Table 1); OPT-350m is built differently and not here."""
    return LanguageConfig(kind="opt", vocab_size=50272, context_length=2048, width=width,
                          layers=layers, heads=heads, kv_heads=heads, hidden=4 * width,
                          eos_id=2, pad_id=1)


def llama_size(layers, width, heads, hidden):
    """One of LLaMA's sizes (its Table 2)."""
    return LanguageConfig(vocab_size=32000, context_length=2048, width=width, layers=layers,
                          heads=heads, kv_heads=heads, hidden=hidden, tie_embeddings=False,
                          eps=1e-6)


PRESETS = {
    "tiny": LanguageConfig(),
    "small": LanguageConfig(context_length=512, width=512, layers=8, heads=8, kv_heads=8,
                            hidden=1408),
    "gpt2": gpt2_size(12, 768, 12),
    "gpt2-medium": gpt2_size(24, 1024, 16),
    "gpt2-large": gpt2_size(36, 1280, 20),
    "gpt2-xl": gpt2_size(48, 1600, 25),
    "opt-125m": opt_size(12, 768, 12),
    "opt-1.3b": opt_size(24, 2048, 32),
    "opt-2.7b": opt_size(32, 2560, 32),
    "opt-6.7b": opt_size(32, 4096, 32),
    "llama-7b": llama_size(32, 4096, 32, 11008),
    "llama-13b": llama_size(40, 5120, 40, 13824),
    "vicuna-7b-v1.5": replace(llama_size(32, 4096, 32, 11008), context_length=4096, eps=1e-5),
    "vicuna-13b-v1.5": replace(llama_size(40, 5120, 40, 13824), context_length=4096, eps=1e-5),
}


def make_block(c):
    """One block of the config's kind."""
    if c.kind == "llama":
        return llama_block(width=c.width, heads=c.heads, kv_heads=c.kv_heads, hidden=c.hidden,
                           eps=c.eps)
    block = {"gpt2": gpt2_block, "opt": opt_block}[c.kind]
    return block(width=c.width, heads=c.heads, hidden=c.hidden, eps=c.eps)


class NewTokens(nn.Module):
    """Learned rows for a few token ids, laid over a frozen embedding table and an untied head.

    The frozen tables never change, so the gradient needs no mask and weight decay no exception.
    ids: ids of the table, or the next ones after its end.
    """

    def __init__(self, *, ids, table, output=None):
        """table, output: the frozen float (V, D); output None: the head is tied to the table."""
        super().__init__()
        added = sorted(i for i in ids if i >= len(table))
        if len(set(ids)) != len(ids) or added != list(range(len(table), len(table) + len(added))):
            raise ValueError(f"new tokens {list(ids)}: they must be different ids of the table's "
                             f"{len(table)}, or the next ones, {len(table)} and on")
        self.register_buffer("ids", torch.tensor(ids, device=table.device), persistent=False)
        self.added = len(added)

        def rows(like):                  # N(0, 0.02), as other embeddings start
            noise = torch.randn(len(ids), like.shape[1], dtype=like.dtype, device=like.device)
            return nn.Parameter(0.02 * noise)
        self.rows = rows(table)
        self.output = None if output is None else rows(output)

    def embed(self, ids, table):
        """ids int64 (B, T) -> (B, T, D): the learned rows for new tokens, else the table's.

        Row i belongs to the i-th of the ids given, in any order. IndexError for an id of neither.
        """
        one_hot = ids[..., None] == self.ids                          # (B, T, n)
        is_new = one_hot.any(dim=-1)                                  # (B, T)
        frozen = F.embedding(ids.masked_fill(is_new, 0), table)
        return torch.where(is_new[..., None], one_hot.to(frozen.dtype) @ self.rows, frozen)

    def logits(self, x, logits):
        """x (B, T, D) and the frozen head's logits (B, T, V) -> with the new tokens' columns."""
        new = F.linear(x, self.rows if self.output is None else self.output)     # (B, T, n)
        return F.pad(logits, (0, self.added)).index_copy(-1, self.ids, new.to(logits.dtype))


def rope_of(count, head_width, theta, scale, device):
    """cos and sin (count, K) of positions 0 .. count - 1, divided by scale."""
    return rope_table(torch.arange(count, device=device), head_width, theta, scale)


@functools.lru_cache(maxsize=8)
def cached_rope_table(*arguments):
    """`rope_of`, computed once."""
    with torch.inference_mode(False):    # a tensor made in inference mode cannot be trained with
        return rope_of(*arguments)


class LanguageModel(nn.Module):
    """A causal transformer over tokens: embeddings, blocks, a last norm, a head."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.token_embed = nn.Embedding(c.vocab_size, c.width)
        self.pos_embed = None if c.kind == "llama" else LearnedPositions(
            count=c.context_length, width=c.width, offset=2 if c.kind == "opt" else 0)
        self.blocks = nn.ModuleList(make_block(c) for _ in range(c.layers))
        self.norm = (RMSNorm if c.kind == "llama" else LayerNorm)(c.width, c.eps)
        self.output = None if c.tie_embeddings else nn.Linear(c.width, c.vocab_size, bias=False)
        self.new = None                  # NewTokens, see add_tokens
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: N(0, 0.02), biases 0; layers that write to the residual stream start smaller."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            last = block.mlp.down_proj if self.config.kind == "llama" else block.mlp.fc2
            for linear in (block.attn.out_proj, last):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def add_tokens(self, ids):
        """Learned rows for these ids over tables that may stay frozen: the parameters new.*"""
        self.new = NewTokens(ids=ids, table=self.token_embed.weight,
                             output=None if self.output is None else self.output.weight)

    def embed(self, ids):
        """ids int64 (B, T) -> (B, T, D), without positions."""
        if self.new is not None:
            return self.new.embed(ids, self.token_embed.weight)
        return self.token_embed(ids)

    def block_inputs(self, x, mask=None, cache=None):
        """What the blocks take: x with its positions, and the keyword arguments of every block.

        x: float (B, T, D), the newest T tokens. mask: bool (B, S), True at tokens and False at
        padding, cached tokens included; None: no padding. Positions count tokens, so padding on
        either side changes nothing. Returns (B, T, D) and {"mask", "rope", "cache"}. Raises
        ValueError for a mask of another shape and for more tokens than the context.
        """
        c, T, past = self.config, x.shape[1], 0 if cache is None else cache.length
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != past + T):
            raise ValueError(f"a mask of {mask.dtype} {tuple(mask.shape)} for {past} tokens in the "
                             f"cache and {T} new ones: it must be bool (B, {past + T})")
        if past + T > c.context_length:              # padding does not count
            longest = past + T if mask is None else int(mask.sum(dim=1).max())
            if longest > c.context_length:
                raise ValueError(f"{longest} tokens, but the context is {c.context_length}")
        attn_mask = causal(T, past, x.device) if T > 1 else None      # one new token attends to all
        if mask is not None:
            attn_mask = padding(mask) if attn_mask is None else attn_mask & padding(mask)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]          # (B, T)
        if self.pos_embed is not None:
            pos = self.pos_embed.span(past, T) if mask is None else self.pos_embed(positions)
            return x + pos, {"mask": attn_mask, "rope": None, "cache": cache}
        # Table lengths are powers of two from 256, so few are cached; a compiler folds its own.
        table = rope_of if torch.compiler.is_compiling() else cached_rope_table
        rope = table(1 << max(8, (past + T - 1).bit_length()), c.width // c.heads, c.rope_theta,
                     c.rope_scale, x.device)
        index = slice(past, past + T) if mask is None else positions[:, None]    # (B, 1, T)
        rope = [part[index] for part in rope]                         # (T, K) or (B, 1, T, K)
        return x, {"mask": attn_mask, "rope": rope, "cache": cache}

    def head(self, x):
        """The last block's output (B, T, D) -> logits (B, T, V)."""
        x = self.norm(x)
        logits = F.linear(x, self.token_embed.weight) if self.output is None else self.output(x)
        return logits if self.new is None else self.new.logits(x, logits)

    def forward(self, x, mask=None, cache=None, last=False):
        """x: ids int64 (B, T) or embeddings float (B, T, D) -> logits (B, T, V).

        mask, cache: as in `block_inputs`. last: the logits of the newest position alone, (B, 1, V);
        with padding on the right that is not every row's last token.
        """
        x = x if x.is_floating_point() else self.embed(x)
        x, inputs = self.block_inputs(x, mask, cache)
        for block in self.blocks:
            x = block(x, **inputs)
        return self.head(x[:, -1:] if last else x)

    def generate(self, prompt, mask=None, **options):
        """`generation.generate` with the context, end and padding of this model."""
        defaults = {"context_length": self.config.context_length, "stop": (self.config.eos_id,),
                    "pad_id": self.config.pad_id}
        return generate(self, prompt, mask, **defaults | options)


def from_pretrained(path, dtype=torch.float32):
    """(LanguageModel in eval mode, tokenizer) of a run folder, or of a Hugging Face folder of
    GPT-2, OPT or LLaMA.

    dtype: of the weights; torch.bfloat16 halves the memory. Raises ValueError in one line when the
    folder is neither, damaged, or of another model.
    """
    if is_published(path):
        config, weights, tokenizer = pretrained.read(path)
    else:
        config, tokenizer, weights = checkpoint.open_run(
            path, "common.training.lm", command=f"python train.py lm --out {path}")
        weights = {name.removeprefix("lm."): value for name, value in weights.items()}
    config = checkpoint.config_of(LanguageConfig, config, path)
    with torch.device("meta"):           # no time spent on random weights
        lm = LanguageModel(config).to(dtype)
    checkpoint.load_weights(lm, weights, path)
    return lm.eval(), tokenizer
