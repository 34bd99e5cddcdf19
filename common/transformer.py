"""A transformer from parts: attention, positions, norms, MLPs, Block, Transformer.

Every model here is composed of these pieces; `vit_block`, `gpt2_block`, `opt_block`, `llama_block`,
`bert_block` and `t5_block` show how. The last section holds faster ways to the same results.

Letters: B batch, T query length, S key length, D width, H heads, K head width.
Masks are boolean, True = may attend, broadcastable to (B, H, T, S).
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def to_float32(x):
    """x as float32 when it is float16 or bfloat16, else x itself: long sums need the digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ------------------------------------------------------------------ attention, by hand

def attention(q, k, v, mask=None, bias=None, scale=None):
    """Scaled dot-product attention (Attention Is All You Need, 3.2.1).

    q float (B, H, T, K), k float (B, H, S, K), v float (B, H, S, V) -> (B, H, T, V).
    mask bool and bias float, broadcastable to (B, H, T, S); the bias is added to the scores.
    scale: None means K ** -0.5. A query that may attend to no key gets zeros and zero gradients.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)                        # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores.softmax(dim=-1) @ v
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    attended = mask.any(dim=-1, keepdim=True)                         # (..., T, 1)
    # Where a row has no True, all its scores are equal: softmax would average every value.
    return scores.softmax(dim=-1) @ v * attended


# ------------------------------------------------------------------ positions

class LearnedPositions(nn.Module):
    """One learned vector for each of `count` positions, at first of deviation 0.02.

    OPT's tables begin at row offset = 2.
    """

    def __init__(self, *, count, width, offset=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count + offset, width).normal_(std=0.02))
        self.offset = offset

    def forward(self, positions):
        """positions int64 (...) -> (..., D): position p has row offset + p."""
        return F.embedding(positions + self.offset, self.weight)

    def span(self, past, T):
        """The vectors of positions past .. past + T - 1: (T, D). ValueError past the last one."""
        count = self.weight.shape[0] - self.offset
        if past + T > count:
            raise ValueError(f"{past + T} positions, but the context is {count}")
        return self.weight[self.offset + past:self.offset + past + T]


def rope_table(positions, head_width, theta=10000.0, scale=1.0):
    """The (cos, sin) of rotary positions (RoFormer, 3.2), for `apply_rope`.

    positions (T,) or (B, T), int64 or float -> two float32 tensors, (T, K) or (B, 1, T, K). Pair i
    of K/2 turns by angle i = position * theta ** (-2i / K) / scale (1; linear scaling: more). The
    tensors are cos(angles) twice, and -sin(angles) followed by sin(angles).
    """
    # float32 even under bf16, where an angle at position 4,000 is off by several radians.
    steps = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    # In the order of Hugging Face's LLaMA; in another a cosine at position 1,500 is off by 1e-4.
    frequencies = 1 / theta ** (steps / head_width) / scale           # (K/2,)
    angles = positions[..., None].float() * frequencies               # (..., T, K/2)
    angles = angles if positions.dim() == 1 else angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, rope):
    """Rotate the pairs (i, i + K/2) of x (B, H, T, K), as Hugging Face's LLaMA -> x's dtype.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos), computed in float32 or float64.
    Meta's rotates the pairs (2i, 2i + 1): the same after permuting the rows of q_proj and k_proj.
    """
    cos, sin = rope
    partner = to_float32(x).roll(x.shape[-1] // 2, dims=-1)           # i and i + K/2 swapped
    return (to_float32(x) * cos + partner * sin).to(x.dtype)


# ------------------------------------------------------------------ the attention layer

class Attention(nn.Module):
    """Multi-head attention: self-attention, or cross-attention when forward gets a context.

    kv_heads < heads is grouped-query attention: neighbouring query heads share keys and values.
    head_width: K, by default width // heads. context_width: D of the context, if other than width.
    scale: of the scores, see `attention`. ValueError for heads that do not divide.
    """

    def __init__(self, *, width, heads, kv_heads=None, head_width=None, context_width=None,
                 bias=True, scale=None):
        super().__init__()
        kv_heads = kv_heads or heads
        if head_width is None and width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        if heads % kv_heads:
            raise ValueError(f"{heads} heads do not divide into {kv_heads} key-value heads")
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale
        self.head_width = head_width or width // heads
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=bias)
        self.k_proj = nn.Linear(context_width or width, kv_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(context_width or width, kv_heads * self.head_width, bias=bias)
        self.out_proj = nn.Linear(heads * self.head_width, width, bias=bias)

    def keys_values(self, x, rope=None):
        """x (B, S, D) -> k and v, each (B, kv_heads, S, K); k is rotated to its positions."""
        B, S, _ = x.shape
        k = self.k_proj(x).view(B, S, self.kv_heads, self.head_width).transpose(1, 2)
        v = self.v_proj(x).view(B, S, self.kv_heads, self.head_width).transpose(1, 2)
        return (k if rope is None else apply_rope(k, rope)), v

    def forward(self, x, context=None, *, mask=None, bias=None, rope=None, cache=None):
        """x (B, T, D), and for cross-attention context (B, S, C) -> (B, T, D).

        mask bool and bias float, broadcastable to (B, H, T, S): as in `attention`, in each head.
        rope: the (cos, sin) of `rope_table` for the T positions; q and k are rotated, the keys of
        a context are not. cache: a KVCache. Self-attention appends its k and v to it, and S counts
        all keys; the k and v of a context are computed once.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_width).transpose(1, 2)   # (B, H, T, K)
        q = q if rope is None else apply_rope(q, rope)
        if context is None:
            k, v = self.keys_values(x, rope)                          # (B, kv_heads, S, K)
            if cache is not None:
                # A key is rotated before it is stored: its position never changes, and a later
                # call has the angles of its own tokens only.
                k, v = cache.append(self, k, v)
        elif cache is None:
            k, v = self.keys_values(context)
        else:
            k, v = cache.get_or_compute(self, context.shape[1], lambda: self.keys_values(context))
        if self.kv_heads != self.heads:  # query head j uses key-value head j // group
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = attend(q, k, v, mask, bias, self.scale)                 # (B, H, T, K)
        return self.out_proj(out.transpose(1, 2).reshape(B, T, -1))   # (B, T, D)


# ------------------------------------------------------------------ norms

class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

    Halves are computed in float32.
    """

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        """x (..., D) -> (..., D), in x's dtype."""
        if ATTENTION != "hand":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        centered = to_float32(x) - to_float32(x).mean(dim=-1, keepdim=True)
        variance = centered.square().mean(dim=-1, keepdim=True)       # biased: divided by D
        return (centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight over the last axis (LLaMA, T5).

    Halves are computed in float32 and rounded before the weight is multiplied.
    """

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        """x (..., D) -> (..., D)."""
        # In half precision torch's own would multiply by the weight before it rounds.
        if ATTENTION != "hand" and x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = torch.rsqrt(to_float32(x).square().mean(dim=-1, keepdim=True) + self.eps)
        return (to_float32(x) * scale).to(x.dtype) * self.weight


# ------------------------------------------------------------------ MLPs

gelu = F.gelu                                          # exact: x * Phi(x)
gelu_tanh = partial(F.gelu, approximate="tanh")        # GPT-2's


def quick_gelu(x):
    """x * sigmoid(1.702 x): the activation of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x):
    """max(x, 0) ** 2: Flamingo's resampler and gated blocks."""
    return F.relu(x).square()


class MLP(nn.Module):
    """fc2(act(fc1(x))) with `hidden` units between, 4 * width unless given."""

    def __init__(self, *, width, hidden=None, act=gelu, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden or 4 * width, bias=bias)
        self.fc2 = nn.Linear(hidden or 4 * width, width, bias=bias)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)): LLaMA's with silu, Flan-T5's with gelu_tanh."""

    def __init__(self, *, width, hidden, act=F.silu, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


# ------------------------------------------------------------------ block and stack

class Block(nn.Module):
    """Self-attention, optional cross-attention, MLP, each with a norm and a residual connection.

    attn, cross, mlp: modules. norm: a function without arguments that returns a new norm layer.
    norm_first: the norm comes before each part, x + f(norm(x)); False: norm(x + f(x)), as in BERT.
    """

    def __init__(self, attn, mlp, norm, cross=None, norm_first=True):
        super().__init__()
        self.attn, self.cross, self.mlp, self.norm_first = attn, cross, mlp, norm_first
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.cross_norm = None if cross is None else norm()

    def add(self, x, norm, part, *args, **kwargs):
        """The residual rule: x plus what a part makes of x, with the norm before or after."""
        if self.norm_first:
            return x + part(norm(x), *args, **kwargs)
        return norm(x + part(x, *args, **kwargs))

    def forward(self, x, context=None, *, mask=None, context_mask=None, bias=None, rope=None,
                cache=None):
        """x (B, T, D) -> (B, T, D). Without `cross` or a context (B, S, C) there is no
        cross-attention.

        mask, bias, rope: for self-attention, as in `Attention`; context_mask: for cross-attention;
        cache: for both.
        """
        x = self.add(x, self.attn_norm, self.attn, mask=mask, bias=bias, rope=rope, cache=cache)
        if self.cross is not None and context is not None:
            x = self.add(x, self.cross_norm, self.cross, context, mask=context_mask, cache=cache)
        return self.add(x, self.mlp_norm, self.mlp)

    def forward_at(self, x, index, mask=None, context=None, context_mask=None):
        """The same as self(x, context, ...)[arange(B), index], faster (see the last section).

        x (B, T, D), index int64 (B,), mask bool (T, T), or (B, 1, 1, T) -> (B, D).
        """
        query = x[torch.arange(len(x), device=x.device), index][:, None]              # (B, 1, D)
        if mask is not None and mask.dim() == 2:
            mask = mask[index][:, None, None]                                         # (B, 1, 1, T)
        keys = self.attn_norm(x) if self.norm_first else x                            # (B, T, D)
        query = self.add(query, self.attn_norm, self.attn, keys, mask=mask)
        if self.cross is not None and context is not None:
            query = self.add(query, self.cross_norm, self.cross, context, mask=context_mask)
        return self.add(query, self.mlp_norm, self.mlp)[:, 0]


class Transformer(nn.Module):
    """A stack of blocks and a last norm (None: no last norm)."""

    def __init__(self, blocks, norm=None):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), norm

    def forward(self, x, context=None, **arguments):
        """x (B, T, D) -> (B, T, D). The arguments are those of Block.forward."""
        for block in self.blocks:
            x = block(x, context, **arguments)
        return x if self.norm is None else self.norm(x)

    def forward_at(self, x, index, mask=None):
        """The same as self(x, mask=mask)[arange(B), index] -> (B, D), faster."""
        for block in self.blocks[:-1]:
            x = block(x, mask=mask)
        x = self.blocks[-1].forward_at(x, index, mask)
        return x if self.norm is None else self.norm(x)


# ------------------------------------------------------------------ the papers' blocks

def vit_block(*, width, heads, hidden=None, act=gelu, eps=1e-5):
    """ViT's and CLIP's block: norm first, biases everywhere."""
    return Block(Attention(width=width, heads=heads), MLP(width=width, hidden=hidden, act=act),
                 partial(LayerNorm, width, eps))


gpt2_block = partial(vit_block, act=gelu_tanh)
opt_block = partial(vit_block, act=F.relu)


def llama_block(*, width, heads, hidden, kv_heads=None, eps=1e-5):
    """LLaMA's block: RMSNorm, no biases, gated SiLU; rotary positions by forward's rope."""
    return Block(Attention(width=width, heads=heads, kv_heads=kv_heads, bias=False),
                 GatedMLP(width=width, hidden=hidden), partial(RMSNorm, width, eps))


def bert_block(*, width, heads, hidden=None, context_width=None, eps=1e-12):
    """BERT's block: norm last; cross-attention when context_width is given."""
    cross = context_width and Attention(width=width, heads=heads, context_width=context_width)
    return Block(Attention(width=width, heads=heads), MLP(width=width, hidden=hidden),
                 partial(LayerNorm, width, eps), cross, norm_first=False)


def t5_block(*, width, heads, head_width, mlp, decoder=False, eps=1e-6):
    """T5's block: RMSNorm, no biases, unscaled scores; positions by forward's bias."""
    attention_layer = partial(Attention, width=width, heads=heads, head_width=head_width,
                              bias=False, scale=1.0)
    return Block(attention_layer(), mlp, partial(RMSNorm, width, eps),
                 attention_layer() if decoder else None)


# ------------------------------------------------------------------ the same, faster
#
# Here and in the norms, ATTENTION chooses between the definition by hand and torch's fused kernel
# (--attention). "hand" and "fused" force one; "auto" takes the faster.
#
# `forward_at` computes the last block at one position of each row, such as CLIP's class token or
# end of text, and nothing else of it: of all other positions that block needs keys and values only.

ATTENTION = "auto"
# The kernel has a start-up cost on a CPU (in bf16 up to 10 times): by hand up to so many T * S.
FASTER_BY_HAND = {torch.bfloat16: 160 * 160, torch.float32: 64 * 80}


def fused_attention(q, k, v, mask=None, bias=None, scale=None):
    """The same as `attention`, by torch's fused kernel."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    attended = mask.any(dim=-1, keepdim=True)
    mask = mask | ~attended              # kernels disagree on an empty row: open it, then zero it
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) * attended


def attend(q, k, v, mask=None, bias=None, scale=None):
    """`attention` or `fused_attention`, as ATTENTION says; "auto": by hand where it is faster."""
    small = q.device.type == "cpu" and q.shape[2] * k.shape[2] <= FASTER_BY_HAND.get(q.dtype, 0)
    by_hand = ATTENTION == "hand" or ATTENTION == "auto" and small
    return (attention if by_hand else fused_attention)(q, k, v, mask, bias, scale)
