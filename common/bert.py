"""BERT's text transformer (Devlin et al., 2018) as BLIP uses it: encoder, or decoder with a head.

What it is follows from the arguments of forward: with `context` its blocks also attend to an image
or to another text; with `is_causal` each token attends to itself and to what came before.
"""
import torch
import torch.nn.functional as F
from torch import nn

from common.masks import causal, padding
from common.transformer import LayerNorm, LearnedPositions, bert_block, gelu


def starts_with(ids, first):
    """ids int64 (B, T) with their first id, the tokenizer's <bos>, replaced by `first`."""
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], dim=1)


class LMHead(nn.Module):
    """BERT's head for words: a linear layer, GELU, a norm; then the embedding table and a bias."""

    def __init__(self, *, vocab_size, width, eps=1e-12):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, table):
        """x (B, T, D), table (V, D), the token embeddings -> logits (B, T, V)."""
        return F.linear(self.norm(gelu(self.dense(x))), table, self.bias)


class Bert(nn.Module):
    """Embeddings with a norm, then blocks whose norms come last; there is no norm after them.

    context_width: D of what cross-attention attends to; None: there is no cross-attention. There
    are no token types: BLIP drops them. has_head: with an `LMHead`, for `logits`.
    """

    def __init__(self, *, vocab_size, context_length, width, layers, heads, context_width=None,
                 has_head=False):
        super().__init__()
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = LearnedPositions(count=context_length, width=width)
        self.norm = LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(
            bert_block(width=width, heads=heads, context_width=context_width)
            for _ in range(layers))
        self.head = LMHead(vocab_size=vocab_size, width=width) if has_head else None

    def block_inputs(self, ids, mask=None, context_mask=None, is_causal=False, cache=None):
        """What the blocks take: embeddings (B, T, D), and the keyword arguments of every block.

        The arguments are those of `forward`.
        """
        T, past = ids.shape[1], 0 if cache is None else cache.length
        if mask is None:
            pos, attn_mask = self.pos_embed.span(past, T), None       # (T, D)
        else:
            if mask.shape[1] > len(self.pos_embed.weight):
                raise ValueError(f"{mask.shape[1]} tokens, but the context is "
                                 f"{len(self.pos_embed.weight)}")
            pos = self.pos_embed((mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:])     # (B, T, D)
            attn_mask = padding(mask)                                 # (B, 1, 1, past + T)
        if is_causal and T > 1:          # one new token attends to all
            order = causal(T, past, ids.device)                       # (T, past + T)
            attn_mask = order if attn_mask is None else attn_mask & order
        context_mask = None if context_mask is None else padding(context_mask)
        return self.norm(self.token_embed(ids) + pos), {
            "mask": attn_mask, "context_mask": context_mask, "cache": cache}

    def forward(self, ids, context=None, *, mask=None, context_mask=None, is_causal=False,
                cache=None):
        """ids int64 (B, T) -> the last block's output (B, T, D).

        context float (B, S, C): what the blocks cross-attend to; None: they leave it out. mask bool
        (B, T), with a cache (B, past + T), context_mask bool (B, S): True at tokens; None: no
        padding. Positions count tokens, so padding on either side changes nothing. cache: a
        KVCache, for a causal text. Raises ValueError for more tokens than the context length.
        """
        x, inputs = self.block_inputs(ids, mask, context_mask, is_causal, cache)
        for block in self.blocks:
            x = block(x, context, **inputs)
        return x

    def first(self, ids, context=None, *, mask=None, context_mask=None):
        """The output at the first token: self(...)[:, 0] -> (B, D).

        The same, faster: the last block computes this one position (see `Block.forward_at`).
        """
        x, inputs = self.block_inputs(ids, mask, context_mask)
        for block in self.blocks[:-1]:
            x = block(x, context, **inputs)
        index = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        return self.blocks[-1].forward_at(x, index, inputs["mask"], context, inputs["context_mask"])

    def logits(self, ids, context, *, mask=None, context_mask=None, cache=None, last=False):
        """As a causal decoder -> logits (B, T, V), with last those of the newest token, (B, 1, V).

        The arguments are those of `forward`.
        """
        x = self(ids, context, mask=mask, context_mask=context_mask, is_causal=True, cache=cache)
        return self.head(x[:, -1:] if last else x, self.token_embed.weight)
