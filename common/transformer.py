"""A transformer from parts: attention, norms, MLPs, positions, Block, Transformer.

Every model of the project is built from these few pieces by composition; `vit_block`, `gpt2_block`,
`opt_block`, `llama_block`, `bert_block` and `t5_block` at the end show how. Letters: B batch,
T query length, S key length, D width, H heads, K head width. Masks: boolean, True = may attend.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# What is read is what runs: `attention` and `fused_attention` are the same function, by hand and by
# torch's kernel. "hand" and "fused" force one (--attention); "auto" takes the faster: by hand for
# short sequences on a CPU (there the kernel is up to 10 times slower in bf16), else the kernel.
ATTENTION = "auto"
SHORT = {torch.bfloat16: 160 * 160, torch.float32: 64 * 80}    # queries * keys


def to_float32(x):
    """x in float32 when it is a half type, else unchanged: long sums need the digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ------------------------------------------------------------------ attention

def attention(q, k, v, mask=None, bias=None, scale=None):
    """Scaled dot-product attention, by hand (Attention Is All You Need, 3.2.1).

    q (B, H, T, K), k (B, H, S, K), v (B, H, S, V), float. mask: bool, broadcastable to
    (B, H, T, S). bias: float, broadcastable likewise, added to the scores. scale: default
    K ** -0.5.
    Returns (B, H, T, V). A query that may attend to nothing gets zeros, and so do its gradients.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)                        # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores.softmax(dim=-1) @ v
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    some = mask.any(dim=-1, keepdim=True)              # a row with no True would be an average
    return scores.softmax(dim=-1) @ v * some


def fused_attention(q, k, v, mask=None, bias=None, scale=None):
    """The same function as `attention`, by torch's fused kernel."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    some = mask.any(dim=-1, keepdim=True)
    allowed = mask | ~some           # kernels differ on an empty row: open it, then zero it
    if bias is not None:
        allowed = bias.masked_fill(~allowed, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale) * some


def attend(q, k, v, mask=None, bias=None, scale=None):
    """`attention` or `fused_attention`, as the module constant ATTENTION says."""
    by_hand = q.device.type == "cpu" and q.shape[2] * k.shape[2] <= SHORT.get(q.dtype, 0)
    if ATTENTION == "hand" or ATTENTION == "auto" and by_hand:
        return attention(q, k, v, mask, bias, scale)
    return fused_attention(q, k, v, mask, bias, scale)


# ------------------------------------------------------------------ positions

class LearnedPositions(nn.Module):
    """One learned vector a position. offset: OPT's tables start at row 2.

    Raises ValueError past the end of the table.
    """

    def __init__(self, *, count, width, offset=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count + offset, width).normal_(std=0.02))
        self.offset = offset

    def forward(self, positions):
        """positions int64, any shape (...) -> (..., D)."""
        return F.embedding(positions + self.offset, self.weight)

    def span(self, past, T):
        """Rows past .. past + T - 1, (T, D): the positions of an unpadded text."""
        count = self.weight.shape[0] - self.offset
        if past + T > count:
            raise ValueError(f"{past + T} positions, but the context is {count}")
        return self.weight[self.offset + past:self.offset + past + T]


def rope_table(positions, head_width, theta=10000.0):
    """cos and sin of every position's angles (RoFormer, 3.2), for the two functions below.

    positions int64 (T,) or (B, T) -> two float32 tensors (T, K) or (B, 1, T, K): cos | cos and
    -sin | sin. float32 also under bf16: at position 4,000 a bf16 angle is off by several radians.
    """
    steps = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-steps / head_width)
    angles = angles if positions.dim() == 1 else angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rope_half(x, rope):
    """Turn the pairs (i, i + K/2) of x (B, H, T, K): the layout of Hugging Face's LLaMA."""
    cos, sin = rope
    partner = to_float32(x).roll(x.shape[-1] // 2, dims=-1)
    return (to_float32(x) * cos + partner * sin).to(x.dtype)


def rope_interleaved(x, rope):
    """Turn the pairs (2i, 2i + 1) of x (B, H, T, K): the layout of Meta's LLaMA."""
    (cos, _), (_, sin) = (half.chunk(2, dim=-1) for half in rope)
    a, b = to_float32(x)[..., 0::2], to_float32(x)[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number a head for each bucket of distances.

    bidirectional: encoders tell past from future; decoders put the whole future in one bucket.
    """

    def __init__(self, *, heads, buckets=32, max_distance=128, bidirectional=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads).normal_(std=0.02))
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional

    def bucket(self, distance):
        """distance int64 = key position - query position -> bucket ids of the same shape."""
        buckets, side = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            side, distance = (distance > 0) * buckets, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2             # half are one distance each, the others grow in log
        far = exact + (torch.log(distance.clamp(min=1).float() / exact)
                       / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return side + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, T, S):
        """Bias (1, H, T, S) of T queries that end where the S keys end."""
        positions = torch.arange(S, device=self.weight.device)
        distance = positions[None, :] - positions[S - T:, None]       # (T, S)
        return self.weight[self.bucket(distance)].permute(2, 0, 1)[None]


# ------------------------------------------------------------------ multi-head attention

class Attention(nn.Module):
    """Multi-head attention: self, cross (context given) or with grouped queries (kv_heads < heads).

    heads must divide width unless head_width is given; kv_heads must divide heads, else ValueError.
    context_width: width of the context. apply_rope: rope_half or rope_interleaved.
    """

    def __init__(self, *, width, heads, kv_heads=None, head_width=None, context_width=None,
                 bias=True, scale=None, apply_rope=rope_half):
        super().__init__()
        kv_heads = kv_heads or heads
        if head_width is None and width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        if heads % kv_heads:
            raise ValueError(f"{heads} heads do not divide into {kv_heads} key-value heads")
        self.heads, self.kv_heads, self.scale = heads, kv_heads, scale
        self.head_width = head_width or width // heads
        self.apply_rope = apply_rope
        inner, outer = heads * self.head_width, kv_heads * self.head_width
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(context_width or width, outer, bias=bias)
        self.v_proj = nn.Linear(context_width or width, outer, bias=bias)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def split(self, x, heads):
        """(B, T, H * K) -> (B, H, T, K)."""
        B, T, _ = x.shape
        return x.view(B, T, heads, self.head_width).transpose(1, 2)

    def keys_values(self, x, rope):
        """x (B, S, D) -> k, v, each (B, kv_heads, S, K), k turned by its positions."""
        k, v = self.split(self.k_proj(x), self.kv_heads), self.split(self.v_proj(x), self.kv_heads)
        return (k if rope is None else self.apply_rope(k, rope)), v

    def forward(self, x, context=None, *, mask=None, bias=None, rope=None, cache=None):
        """x (B, T, D), context (B, S, C) or None for self-attention -> (B, T, D).

        mask bool, bias float: broadcastable to (B, H, T, S). rope: (cos, sin) of `rope_table` for
        the T positions. cache: KVCache; S then counts the cached keys too.
        """
        B, T, _ = x.shape
        q = self.split(self.q_proj(x), self.heads)                    # (B, H, T, K)
        q = q if rope is None else self.apply_rope(q, rope)
        if context is None:
            k, v = self.keys_values(x, rope)
            # Turned before it is stored: a cached key keeps the position it was written at.
            k, v = (k, v) if cache is None else cache.append(self, k, v)
        elif cache is None:
            k, v = self.keys_values(context, None)
        else:
            k, v = cache.get_or_compute(self, context.shape[1], lambda: self.keys_values(context, None))
        if self.kv_heads != self.heads:  # query head j reads key-value head j // group
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = attend(q, k, v, mask, bias, self.scale)                 # (B, H, T, K)
        return self.out_proj(out.transpose(1, 2).reshape(B, T, -1))


# ------------------------------------------------------------------ norms

def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, computed in float32."""
    centred = to_float32(x) - to_float32(x).mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)            # biased: divided by D
    scaled = centred * torch.rsqrt(variance + eps) * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x ** 2) + eps), back in x's dtype, then * weight: LLaMA's and T5's order."""
    scale = torch.rsqrt(to_float32(x).square().mean(dim=-1, keepdim=True) + eps)
    return (to_float32(x) * scale).to(x.dtype) * weight


class LayerNorm(nn.Module):
    """`layer_norm` with a learned weight and bias, each (D,)."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        if ATTENTION == "hand":
            return layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight (D,)."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        # In a half type torch multiplies by the weight before it rounds.
        if ATTENTION == "hand" or x.dtype != self.weight.dtype or to_float32(x) is not x:
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
    """fc2(act(fc1(x))), hidden wide in the middle (4 * width unless given)."""

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
    """Attention, optional cross-attention, MLP, each with a norm and a residual.

    norm: a function without arguments that makes a norm layer. norm_first: x + f(norm(x)); False:
    norm(x + f(x)), as in BERT.
    """

    def __init__(self, attn, mlp, norm, cross=None, norm_first=True):
        super().__init__()
        self.attn, self.cross, self.mlp, self.norm_first = attn, cross, mlp, norm_first
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.cross_norm = norm() if cross is not None else None

    def add(self, x, norm, sublayer):
        """The one residual rule."""
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))

    def forward(self, x, context=None, *, mask=None, context_mask=None, bias=None, rope=None,
                cache=None):
        """x (B, T, D) -> (B, T, D); context (B, S, C) and context_mask go to cross-attention."""
        x = self.add(x, self.attn_norm,
                     lambda h: self.attn(h, mask=mask, bias=bias, rope=rope, cache=cache))
        if self.cross is not None and context is not None:
            x = self.add(x, self.cross_norm,
                         lambda h: self.cross(h, context, mask=context_mask, cache=cache))
        return self.add(x, self.mlp_norm, self.mlp)

    def forward_at(self, x, index, mask=None):
        """What `forward` gives at one position of each text or picture, without the rest.

        x (B, T, D), index int64 (B,), mask bool (T, T) -> (B, D). Only keys and values are needed
        of the other positions: a sixth of the block's work.
        """
        own = x[torch.arange(len(x), device=x.device), index][:, None]         # (B, 1, D)
        seen = None if mask is None else mask[index][:, None, None]            # (B, 1, 1, T)
        whole = self.attn_norm(x) if self.norm_first else x
        own = self.add(own, self.attn_norm, lambda h: self.attn(h, whole, mask=seen))
        return self.add(own, self.mlp_norm, self.mlp)[:, 0]


class Transformer(nn.Module):
    """Blocks in a row and a last norm (None: no last norm)."""

    def __init__(self, blocks, norm=None):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), norm

    def forward(self, x, context=None, **arguments):
        """x (B, T, D) -> (B, T, D). The arguments are those of Block.forward."""
        for block in self.blocks:
            x = block(x, context, **arguments)
        return x if self.norm is None else self.norm(x)

    def forward_at(self, x, index, mask=None):
        """`forward` at one position of each row, x (B, T, D) -> (B, D); see `Block.forward_at`."""
        *first, last = self.blocks
        for block in first:
            x = block(x, mask=mask)
        x = last.forward_at(x, index, mask)
        return x if self.norm is None else self.norm(x)


# ------------------------------------------------------------------ the papers' blocks

def vit_block(*, width, heads, hidden=None, act=gelu, eps=1e-5):
    """ViT's and CLIP's block: pre-norm, biases everywhere."""
    return Block(Attention(width=width, heads=heads), MLP(width=width, hidden=hidden, act=act),
                 partial(LayerNorm, width, eps))


gpt2_block = partial(vit_block, act=gelu_tanh)
opt_block = partial(vit_block, act=F.relu)


def llama_block(*, width, heads, hidden, kv_heads=None, eps=1e-5):
    """LLaMA's block: RMSNorm, no biases, gated SiLU, rotary positions by forward's table."""
    return Block(Attention(width=width, heads=heads, kv_heads=kv_heads, bias=False),
                 GatedMLP(width=width, hidden=hidden), partial(RMSNorm, width, eps))


def bert_block(*, width, heads, hidden=None, context_width=None, eps=1e-12):
    """BERT's post-norm block, with cross-attention when context_width is given."""
    cross = context_width and Attention(width=width, heads=heads, context_width=context_width)
    return Block(Attention(width=width, heads=heads), MLP(width=width, hidden=hidden),
                 partial(LayerNorm, width, eps), cross or None, norm_first=False)


def t5_block(*, width, heads, head_width, mlp, decoder=False, eps=1e-6):
    """T5's block: RMSNorm, no biases, unscaled scores, positions by forward's bias."""
    def part():
        return Attention(width=width, heads=heads, head_width=head_width, bias=False, scale=1.0)
    return Block(part(), mlp, partial(RMSNorm, width, eps), part() if decoder else None)
