"""Decoder language models: GPT-2, OPT and LLaMA are one class, three kinds of block and position.

    lm = LanguageModel(PRESETS["tiny"])
    logits = lm(ids)                                   # (B, T) -> (B, T, V)

    x, places = lm.place(lm.embed(ids), mask, cache)   # the same by its parts, for a paper that
    for block in lm.blocks:                            # puts layers of its own in between
        x = block(x, **places)
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

from common.training import checkpoint
from common.data.images import printable
from common.prompts import collate
from common.training.devices import to_device
from common.generation import generate
from common.losses import next_token_loss
from common.masks import causal, padding
from common.pretrained import language as pretrained
from common.pretrained.files import is_published
from common.transformer import (LayerNorm, LearnedPositions, RMSNorm, gpt2_block, llama_block,
                                opt_block, rope_table)


def llama(c):
    """A block of LLaMA's kind."""
    return llama_block(width=c.width, heads=c.heads, kv_heads=c.kv_heads, hidden=c.hidden,
                       eps=c.eps)


def gpt2(c):
    """A block of GPT-2's kind."""
    return gpt2_block(width=c.width, heads=c.heads, hidden=c.hidden, eps=c.eps)


def opt(c):
    """A block of OPT's kind."""
    return opt_block(width=c.width, heads=c.heads, hidden=c.hidden, eps=c.eps)


# kind: its block, its norm, the first row of its table of positions (None: rotary, no table)
KINDS = {"gpt2": (gpt2, LayerNorm, 0), "opt": (opt, LayerNorm, 2), "llama": (llama, RMSNorm, None)}


@dataclass
class LanguageConfig:
    """Sizes of a decoder. vocab, eos and pad belong to the tokenizer."""
    kind: str = "llama"                  # or gpt2, opt
    vocab_size: int = 1024
    context_length: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4                    # fewer than heads: queries share keys (llama alone)
    hidden: int = 352                    # of the MLP
    tie_embeddings: bool = True          # the head is the table of embeddings
    eps: float = 1e-5                    # of the norms
    rope_theta: float = 10000.0          # the rotary base
    rope_scale: float = 1.0              # rotary positions are divided by it (linear scaling)
    eos_id: int = 2
    pad_id: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is not one of {', '.join(KINDS)}")
        for name in ("vocab_size", "context_length", "width", "layers", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not (self.eps > 0 and self.rope_theta > 0 and self.rope_scale > 0):
            raise ValueError(f"eps={self.eps}, rope_theta={self.rope_theta}, rope_scale={self.rope_scale}: "
                             "must be more than 0")
        if self.kind != "llama" and self.kv_heads != self.heads:
            raise ValueError(f"kv_heads={self.kv_heads}: {self.kind} has as many as its "
                             f"{self.heads} heads")
        if self.kind == "llama" and self.width % self.heads == 0 and self.width // self.heads % 2:
            raise ValueError(f"width {self.width} / {self.heads} heads is odd: rotary positions "
                             "turn pairs")


def gpt2_size(layers, width, heads):
    """One of GPT-2's sizes."""
    return LanguageConfig(kind="gpt2", vocab_size=50257, context_length=1024, width=width, layers=layers,
                          heads=heads, kv_heads=heads, hidden=4 * width, eos_id=50256, pad_id=50256)


def opt_size(layers, width, heads):
    """One of OPT's sizes (its Table 1), but for 350m, which is built differently."""
    return LanguageConfig(kind="opt", vocab_size=50272, context_length=2048, width=width, layers=layers,
                          heads=heads, kv_heads=heads, hidden=4 * width, eos_id=2, pad_id=1)


def llama_size(layers, width, heads, hidden):
    """One of LLaMA's sizes (its Table 2)."""
    return LanguageConfig(vocab_size=32000, context_length=2048, width=width, layers=layers, heads=heads,
                          kv_heads=heads, hidden=hidden, tie_embeddings=False, eps=1e-6)


PRESETS = {
    "tiny": LanguageConfig(),
    "small": LanguageConfig(context_length=512, width=512, layers=8, heads=8, kv_heads=8, hidden=1408),
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

TRAINS = {"lm": ("*",)}                  # by stage: patterns of the parameters that learn


class NewTokens(nn.Module):
    """A few learned rows laid over a frozen table of embeddings, and over an untied head.

    The frozen tables themselves never change, so neither a mask on gradients nor an exception from
    weight decay is needed. ids: those of the table, or the ones right after its end.
    """

    def __init__(self, *, ids, table, output=None):
        """table, output: the frozen float (V, D); output None: the head is tied to the table."""
        super().__init__()
        beyond = sorted(i for i in ids if i >= len(table))
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or \
                beyond != list(range(len(table), len(table) + len(beyond))):
            raise ValueError(f"new tokens {list(ids)}: they must be different ids of the table's "
                             f"{len(table)}, or the next ones, {len(table)} and on")
        self.register_buffer("ids", torch.tensor(ids, device=table.device), persistent=False)
        self.beyond = len(beyond)
        # As every embedding begins. Not the table's mean: where few tokens of a vocabulary are ever
        # read, that is a token which all others were taught to be unlike, and it upsets the model.
        self.rows, self.output = (
            None if own is None else nn.Parameter(
                0.02 * torch.randn(len(ids), own.shape[1], dtype=own.dtype, device=own.device))
            for own in (table, output))

    def embed(self, ids, table):
        """ids int64 (..., T) -> (..., T, D): the new tokens' own rows, else the table's."""
        new = ids[..., None] == self.ids                              # (..., T, n)
        own = new.any(dim=-1)
        old = F.embedding(ids.masked_fill(own, 0), table)
        return torch.where(own[..., None], new.to(old.dtype) @ self.rows, old)

    def logits(self, x, logits):
        """x (B, T, D) and the frozen head's logits (B, T, V) -> with the new tokens' columns."""
        own = F.linear(x, self.rows if self.output is None else self.output)
        return F.pad(logits, (0, self.beyond)).index_copy(-1, self.ids, own.to(logits.dtype))


@functools.lru_cache(maxsize=8)
def cached_rope_table(count, head_width, theta, stretch, device):
    """`rope_table` of the first `count` positions, made once."""
    with torch.inference_mode(False):    # what is made in that mode could not be trained with
        positions = torch.arange(count, device=device)
        return rope_table(positions if stretch == 1 else positions / stretch, head_width, theta)


class LanguageModel(nn.Module):
    """A causal transformer over tokens: embeddings, blocks, a last norm, a head."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        block, norm, offset = KINDS[c.kind]
        self.token_embed = nn.Embedding(c.vocab_size, c.width)
        self.pos_embed = None if offset is None else LearnedPositions(
            count=c.context_length, width=c.width, offset=offset)
        self.blocks = nn.ModuleList(block(c) for _ in range(c.layers))
        self.norm = norm(c.width, c.eps)
        self.output = None if c.tie_embeddings else nn.Linear(c.width, c.vocab_size, bias=False)
        self.new = None                  # NewTokens, for a model that needs tokens of its own
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: N(0, 0.02), biases 0; what adds to the residual is smaller the deeper it is."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            last = block.mlp.down_proj if hasattr(block.mlp, "down_proj") else block.mlp.fc2
            for linear in (block.attn.out_proj, last):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def add_tokens(self, ids):
        """Learned rows for these ids, over tables that may stay frozen; the parameters new.*"""
        self.new = NewTokens(ids=ids, table=self.token_embed.weight,
                             output=None if self.output is None else self.output.weight)

    def embed(self, ids):
        """ids int64 (B, T) -> (B, T, D), without positions."""
        if self.new is not None:
            return self.new.embed(ids, self.token_embed.weight)
        return self.token_embed(ids)

    def place(self, x, mask=None, cache=None):
        """What every forward needs: x with its positions, and the arguments of every block.

        x: float (B, T, D), the newest T tokens. mask: bool (B, S), True at the real ones of all
        tokens, those in the cache included; None when there is no padding. Positions count real
        tokens, so padding on either side changes nothing. Returns (B, T, D) and the dict of
        mask, table and cache. Raises ValueError for more tokens than the context.
        """
        T, past = x.shape[1], 0 if cache is None else cache.length
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"a mask of {mask.dtype}: it must be bool, True at real tokens")
        if mask is not None and mask.shape[1] != past + T:
            raise ValueError(f"a mask of {mask.shape[1]} tokens for {past} in the cache and "
                             f"{T} new")
        if past + T > self.config.context_length:
            longest = past + T if mask is None else int(mask.sum(dim=1).max())
            if longest > self.config.context_length:
                raise ValueError(f"{longest} tokens, but the context is {self.config.context_length}")
        if mask is None:
            positions = slice(past, past + T)
        else:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]               # (B, T)
        seen = causal(T, past, x.device) if T > 1 else None    # one new token sees all there is
        if mask is not None:
            seen = padding(mask) if seen is None else seen & padding(mask)
        if self.pos_embed is not None:
            own = self.pos_embed.first(T, past) if mask is None else self.pos_embed(positions)
            return x + own, {"mask": seen, "table": None, "cache": cache}
        c, count = self.config, 1 << max(8, (past + T - 1).bit_length())      # 256, 512, ...
        table = cached_rope_table(count, c.width // c.heads, c.rope_theta, c.rope_scale, x.device)
        table = [values[positions] if mask is None else values[positions][:, None]
                 for values in table]
        return x, {"mask": seen, "table": table, "cache": cache}

    def head(self, x):
        """The last block's output (B, T, D) -> logits (B, T, V)."""
        x = self.norm(x)
        logits = F.linear(x, self.token_embed.weight) if self.output is None else self.output(x)
        return logits if self.new is None else self.new.logits(x, logits)

    def forward(self, x, mask=None, cache=None, last=False):
        """x: ids int64 (B, T) or embeddings float (B, T, D) -> logits (B, T, V).

        mask, cache: as for `place`. last: logits of the newest token alone, (B, 1, V); with padding
        on the right that is not each row's last real one.
        """
        x = x if x.is_floating_point() else self.embed(x)
        x, places = self.place(x, mask, cache)
        for block in self.blocks:
            x = block(x, **places)
        return self.head(x[:, -1:] if last else x)

    def generate(self, prompt, mask=None, **options):
        """`generation.generate` with this model's context, end and padding."""
        own = {"context_length": self.config.context_length, "stop": (self.config.eos_id,), "pad_id": self.config.pad_id}
        return generate(self, prompt, mask, **own | options)


@torch.no_grad()
def perplexity(lm, ids, labels=None, mask=None, rows=64):
    """exp of the mean negative log-likelihood of a token, over all tokens of all texts.

    ids int64 (N, T), each row beginning with <bos>: every later token counts, the first and <eos>
    too. mask bool (N, T): the real ones; None: there is padding at the rows' ends alone. labels
    int64 (N, T), -100 = not counted; None: all real ids.
    """
    if labels is None and mask is None:
        labels = unpadded(ids, lm.config)
    elif labels is None:
        labels = ids.masked_fill(~mask, -100)
        labels[:, 1:].masked_fill_(~mask[:, :-1], -100)        # padding tells nothing
    total, count = 0.0, int((labels[:, 1:] != -100).sum())
    for k in range(0, len(ids), rows):
        logits = lm(ids[k:k + rows], None if mask is None else mask[k:k + rows])
        total += next_token_loss(logits, labels[k:k + rows], count=1).item()
    return torch.tensor(total / max(1, count)).exp().item()    # inf, where math.exp raises


def unpadded(ids, config):
    """ids int64 (B, T), padded right -> labels int64 (B, T): the ids, -100 at the padding.

    Where a vocabulary pads with its end, as GPT-2's, the first of them is the end of the text.
    """
    padding = (ids != config.pad_id).flip(1).cumsum(dim=1).flip(1) == 0      # no real token from here
    if config.pad_id == config.eos_id:
        padding[:, 1:] &= padding[:, :-1].clone()
    return ids.masked_fill(padding, -100)


# ------------------------------------------------------------------ using a trained model

class Trained:
    """A language model with its tokenizer, ready for texts."""

    def __init__(self, lm, tokenizer):
        self.lm, self.tokenizer = lm.eval(), tokenizer

    def ids(self, texts):
        """Texts -> int64 (N, T): the beginning, the text, the end; padded right."""
        ids = self.tokenizer.batch(several(texts), self.lm.config.context_length)
        return ids.to(self.lm.token_embed.weight.device)

    def write(self, texts, **options):
        """How the model goes on from each text; options: those of `generation.generate`."""
        batch = self.batch([self.begun(text) for text in several(texts)], side="left")
        new = self.lm.generate(batch["ids"], batch["mask"], decode=self.tokenizer.decode, **options)
        return [self.tokenizer.decode(cut(row, self.lm.config.eos_id)) for row in new.tolist()]

    def begun(self, text):
        """<bos> and the ids of a text that is to be continued."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def perplexity(self, texts):
        """`perplexity` of texts, their ends included."""
        batch = self.batch([self.begun(text) + [self.tokenizer.eos_id] for text in several(texts)])
        return perplexity(self.lm, batch["ids"], batch["labels"])

    def batch(self, rows, side="right"):
        """`collate` of rows of ids, all of them labels, on the model's device."""
        batch = collate([(row, row) for row in rows], pad_id=self.lm.config.pad_id, side=side)
        return to_device(batch, self.lm.token_embed.weight.device)


def several(texts):
    """The texts. Raises ValueError for a single string, which is a list of letters to Python."""
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {printable(texts)!r}: give a list of texts")
    return texts


def cut(ids, end):
    """The ids before the first end."""
    return ids[:ids.index(end)] if end in ids else ids


def from_pretrained(path, dtype=torch.float32):
    """A Trained language model from a run folder, or a Hugging Face folder of GPT-2, OPT or LLaMA.

    dtype: of its weights; torch.bfloat16 halves the memory. Raises ValueError in one line when the
    folder is neither, damaged, or of another model.
    """
    if is_published(path):
        config, weights, tokenizer = pretrained.read(path)
    else:
        config, tokenizer, weights = checkpoint.open_run(
            path, "common.training.lm", command=f"python train.py lm --out {path}")
        weights = {name.removeprefix("lm."): value for name, value in weights.items()}
    config = checkpoint.config_of(LanguageConfig, config, path)
    with torch.device("meta"):           # no minutes spent on random weights
        lm = LanguageModel(config)
    lm = lm.to(dtype).to_empty(device="cpu")
    checkpoint.load_weights(lm, weights, path)
    return Trained(lm, tokenizer)
