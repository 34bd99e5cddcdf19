"""Attention, positions, norms, MLPs and blocks: each equals its formula, written as plain loops."""
import math
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import transformer
from common.transformer import (MLP, Attention, Block, GatedMLP, LayerNorm, LearnedPositions,
                                RMSNorm, Transformer, apply_rope, attend, attention, bert_block,
                                fused_attention, llama_block, quick_gelu, rope_table,
                                squared_relu, t5_block, to_float32, vit_block)
from tests.helpers import (ToyCache, assert_close, assert_same, attend_by_hand, block_by_hand,
                           gated_mlp, layer_norm, mlp_by_hand, randomize, refused, rms_norm,
                           rotated, slow_attention)

B, H, T, S, K, V, C = 2, 3, 5, 7, 11, 13, 17    # distinct primes: a transposed axis cannot pass
WIDTH, HIDDEN = 12, 19
gelu_tanh = partial(F.gelu, approximate="tanh")


def draw(*shape, scale=1.0):
    return (scale * torch.randn(shape).double()).requires_grad_()


def rope_of(angles):
    """What `rope_table` gives for angles (..., T, K/2)."""
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def inputs_of_a_block(heads=3, head_width=4, context_width=C):
    """What a block gets besides x; and the same by hand."""
    given = {"context": draw(B, S, context_width), "mask": torch.rand(B, 1, T, T) < 0.7,
             "context_mask": torch.rand(B, 1, 1, S) < 0.7, "bias": draw(1, heads, T, T)}
    angles = torch.randn(T, head_width // 2).double()
    return given | {"rope": rope_of(angles)}, given | {"angles": angles}


def check_block(block, count, inputs=None, crosses=False, **by_hand):
    """It has so many parameters, and gives what its parts by hand give."""
    x, (given, same) = draw(B, T, WIDTH), inputs or inputs_of_a_block()
    same["context"] = given["context"] if crosses else None
    assert sum(parameter.numel() for parameter in block.parameters()) == count, "parameters"
    assert_same("block (B, T, D)", randomize(block).double()(x, **given),
                block_by_hand(block, x, **same, **by_hand), block, x=x)


CHUNKS = [[7], [1] * 7, [4, 1, 2], [1, 6]]


def in_chunks(forward, sizes, *contexts):
    """Two texts, the first padded left, in calls with one cache; the first call has the context.

    -> outputs (B, T, D), x, and for the whole text mask (B, 1, T, T), angles (B, 1, T, K/2).
    """
    x, outs, cache = draw(2, 7, WIDTH), [], ToyCache()
    real = torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
    mask = torch.ones(7, 7).tril().bool() & real[:, None, None]
    angles = (real.cumsum(1) - 1).clamp(min=0)[:, None, :, None] * torch.tensor([0.3, 2.0]).double()
    for size, end in zip(sizes, accumulate(sizes)):
        now = slice(end - size, end)
        outs.append(forward(x[:, now], *contexts, mask=mask[..., now, :end], cache=cache,
                            rope=rope_of(angles[..., now, :])))
        contexts = [0 * context for context in contexts]
    return torch.cat(outs, dim=1), x, {"mask": mask, "angles": angles}


class TestToFloat32:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_a_half_becomes_float32_and_any_other_tensor_stays_itself(self, dtype):
        x, half = torch.randn(3, 5).to(dtype), dtype in (torch.bfloat16, torch.float16)
        got = to_float32(x)
        assert got.dtype == torch.float32 if half else got is x
        assert_close("values", got, x.double())


def masks():
    """One of each shape; in the last two some queries may attend to nothing."""
    padding, some = torch.ones(B, 1, 1, S).bool(), torch.rand(B, H, T, S) < 0.5
    padding[0, ..., 4:], padding[1] = False, False
    some[0, 1, 2] = some[1, 0, 3] = False
    return {"none": None, "causal": torch.ones(T, S).tril(S - T).bool(), "padding": padding,
            "some": some}


class Definition:
    """What `attention` and `fused_attention` promise."""

    @pytest.mark.parametrize("mask, biased, scale", [
        ("none", False, None), ("none", True, 0.3), ("causal", True, None), ("padding", False, 1.0),
        ("some", False, None), ("some", True, 0.3), ("some", False, 0.0)])
    def test_it_equals_the_definition_written_as_loops(self, mask, biased, scale):
        inputs = {"q": draw(B, H, T, K, scale=3), "k": draw(B, H, S, K, scale=3),
                  "v": draw(B, H, S, V, scale=3)} | ({"bias": draw(1, H, T, S)} if biased else {})
        given = *list(inputs.values())[:3], masks()[mask], inputs.get("bias"), scale
        assert_same("attention (B, H, T, V)", self.attend(*given), slow_attention(*given), **inputs)

    @pytest.mark.parametrize("scores, expected", [
        ([0, math.log(3)], 0.75), ([5000, 5000], 0.5), ([-5000, 0], 1.0), ([0, -5000], 0.0)])
    def test_two_keys_by_hand(self, scores, expected):
        q, v = torch.full((1, 1, 1, 16), 0.25), torch.tensor([[[[0.0], [1.0]]]])
        k = torch.tensor(scores).float().view(1, 1, 2, 1).repeat(1, 1, 1, 16)
        assert_close("mean of the values 0 and 1", self.attend(q, k, v).item(), expected)

    def test_a_key_that_is_masked_does_not_count_however_large_its_score(self):
        k = torch.tensor([0.0, 200.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
        got = self.attend(torch.ones(1, 1, 1, 4), k, torch.tensor([[[[1.0], [7.0]]]]),
                          torch.tensor([[[[True, False]]]]))
        assert_close("the value of the only key", got.item(), 1.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_query_without_a_key_gives_zeros_and_no_gradient(self, dtype):
        q, k, v = inputs = [draw(B, H, n, m).detach().to(dtype).requires_grad_()
                            for n, m in ((T, K), (S, K), (S, V))]
        mask = masks()["some"]
        alone = self.attend(q, k, v, mask)[~mask.any(dim=-1)]
        assert alone.dtype == dtype, f"{dtype} became {alone.dtype}"
        assert_close("its output", alone, torch.zeros_like(alone), 0)
        for name, grad in zip("qkv", torch.autograd.grad(alone.sum(), inputs)):
            assert_close(f"its gradient of {name}", grad, torch.zeros_like(grad), 0)


class TestAttentionFunction(Definition):
    def attend(self, *inputs):
        return attention(*inputs)


class TestAttention:
    @pytest.mark.parametrize("sizes, layer", [
        (dict(heads=3), {}), (dict(heads=6, kv_heads=2), dict(bias=False)),
        (dict(heads=5, kv_heads=1, scale=0.3), dict(head_width=4))])
    def test_self_attention_equals_its_loops(self, sizes, layer):
        layer = randomize(Attention(width=WIDTH, **sizes, **layer)).double()
        x, bias = draw(B, T, WIDTH), draw(1, sizes["heads"], T, T)
        mask = torch.rand(B, 1, T, T) < 0.7
        angles, mask[1, :, 2] = torch.randn(T, layer.head_width // 2).double(), False
        got = layer(x, mask=mask, bias=bias, rope=rope_of(angles))
        assert_same("self-attention (B, T, D)", got, attend_by_hand(
            layer, x, mask=mask, bias=bias, angles=angles, **sizes), layer, x=x)

    @pytest.mark.parametrize("context_width", [None, C])
    def test_cross_attention_has_its_keys_and_values_from_the_context(self, context_width):
        layer = randomize(Attention(width=WIDTH, heads=3, context_width=context_width)).double()
        x, context, mask = draw(B, T, WIDTH), draw(B, S, context_width or WIDTH), masks()["some"]
        assert_same("cross-attention (B, T, D)", layer(x, context, mask=mask), attend_by_hand(
            layer, x, context, mask=mask), layer, x=x, context=context)

    @pytest.mark.parametrize("bias", [True, False])
    def test_its_parameters(self, bias):
        layer = Attention(width=10, heads=6, kv_heads=2, head_width=4, context_width=C, bias=bias)
        shapes = {"q_proj": (24, 10), "k_proj": (8, C), "v_proj": (8, C), "out_proj": (10, 24)}
        expected = {f"{name}.weight": shape for name, shape in shapes.items()}
        expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items() if bias}
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected

    def test_with_a_cache_and_no_mask_a_token_attends_to_all_so_far(self):
        layer, cache = randomize(Attention(width=WIDTH, heads=3)).double(), ToyCache()
        x = draw(B, T, WIDTH)
        layer(x[:, :3], cache=cache)
        assert_close("self-attention (B, 2, D)", layer(x[:, 3:], cache=cache),
                     attend_by_hand(layer, x)[:, 3:])

    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_with_a_cache_every_chunking_equals_the_whole_text(self, chunks):
        layer = randomize(Attention(width=WIDTH, heads=3, kv_heads=1)).double()
        got, x, given = in_chunks(layer, chunks)
        assert_same("self-attention in chunks (B, T, D)", got,
                    attend_by_hand(layer, x, kv_heads=1, **given), layer, x=x)

    def test_with_a_cache_the_keys_of_a_context_are_computed_once(self):
        layer, cache = randomize(Attention(width=WIDTH, heads=3)).double(), ToyCache()
        x, context = draw(B, T, WIDTH), draw(B, S, WIDTH)
        got = [layer(x[:, :3], context, cache=cache), layer(x[:, 3:], 0 * context, cache=cache)]
        assert_close("cross-attention in chunks (B, T, D)", torch.cat(got, dim=1),
                     attend_by_hand(layer, x, context))

    def test_sizes_that_do_not_divide_raise(self):
        with refused("10.*3"):
            Attention(width=10, heads=3)
        with refused("6.*4"):
            Attention(width=12, heads=6, kv_heads=4)


class TestLearnedPositions:
    @pytest.mark.parametrize("offset", [0, 2])
    def test_position_p_has_row_offset_plus_p(self, offset):
        table, positions = LearnedPositions(count=5, width=3, offset=offset), [[0, 4], [3, 3]]
        positions, rows = torch.tensor(positions), table.weight[offset:]
        assert_same("positions (B, T, D)", table(positions), rows[positions], table)
        assert_same("span of 1 and 2 (T, D)", table.span(1, 2), rows[1:3], table)
        assert_close("span of all (T, D)", table.span(0, 5), rows)
        with refused("6.*5"):
            table.span(2, 4)

    def test_it_has_a_row_for_each_position_and_starts_small(self):
        weight = LearnedPositions(count=500, width=30, offset=2).weight
        assert weight.shape == (502, 30)
        assert_close("deviation", weight.std(), 0.02, 1e-3)


class TestRopeTable:
    @pytest.mark.parametrize("positions, changes, theta, tolerance", [
        ([0, 1, 5, 9], {}, 10000.0, 1e-6), ([0.5, 2.25, 0.0], {"theta": 100.0}, 100.0, 1e-6),
        ([0, 1, 5, 9], {"scale": 4.0}, 10000.0, 1e-6),
        ([[0, 1, 5], [7, 3, 2]], {}, 10000.0, 1e-6), ([4099], {}, 10000.0, 5e-4)])
    def test_pair_i_turns_by_its_angle(self, positions, changes, theta, tolerance):
        positions, steps = torch.tensor(positions), torch.tensor([0.0, -2 / 6, -4 / 6]).double()
        angles = positions[..., None] * theta ** steps / changes.get("scale", 1)
        angles = angles[:, None] if positions.dim() == 2 else angles          # (B, 1, T, K / 2)
        got = torch.stack(rope_table(positions, 6, **changes))
        assert got.dtype == torch.float32
        assert_close("cos and sin (2, ..., T, K)", got, torch.stack(rope_of(angles)), tolerance)


class TestApplyRope:
    @pytest.mark.parametrize("shape", [(T, 3), (B, 1, T, 3)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_pairs_i_and_i_plus_half_are_rotated(self, shape, dtype):
        x, angles = draw(B, H, T, 6).detach().to(dtype), 3 * torch.randn(shape).double()
        got = apply_rope(x.requires_grad_(), rope_of(angles))
        assert got.dtype == dtype
        assert_same("rotated (B, H, T, K)", got, rotated(x.double(), angles), x=x)


class Norm:
    """What both norms promise, by hand and by torch's kernel."""

    @pytest.fixture(autouse=True, params=["hand", "auto"])
    def switch(self, request, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", request.param)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_equals_its_formula(self, dtype):
        norm, x = randomize(self.make(7, eps=0.3)).to(dtype), 3 + 2 * torch.randn(B, T, 7)
        x = x.to(dtype).requires_grad_()
        assert_same("norm (B, T, D)", norm(x), self.formula(norm, x, 0.3), norm, x=x)

    def test_it_starts_with_weight_one_bias_zero_and_its_epsilon(self):
        x, start = 1e-3 * torch.randn(B, T, 7), SimpleNamespace(weight=1, bias=0)
        assert_close("norm (B, T, D)", self.make(7)(x), self.formula(start, x))


class TestLayerNorm(Norm):
    make, formula = LayerNorm, staticmethod(layer_norm)

    def test_the_mean_of_halves_is_taken_in_float32(self):
        norm, x = randomize(LayerNorm(7)).bfloat16(), (300 + 5 * torch.randn(B, T, 7)).bfloat16()
        assert norm(x).dtype == torch.bfloat16
        assert_close("norm (B, T, D)", norm(x), layer_norm(norm.double(), x.double()))


class TestRMSNorm(Norm):
    make, formula = RMSNorm, staticmethod(rms_norm)

    def test_halves_are_scaled_in_float32_and_rounded_before_the_weight(self):
        norm, x = randomize(RMSNorm(7, eps=0.1)).bfloat16(), torch.randn(5, 7).bfloat16()
        scaled = x.float() / (x.float() ** 2).mean(-1, keepdim=True).add(0.1).sqrt()
        assert_close("norm (T, D)", norm(x), scaled.bfloat16() * norm.weight, 0)


POINTS = [-30.0, -1.7, -0.1, 0.0, 0.4, 2.3, 30.0]


class TestQuickGelu:
    def test_it_is_x_times_sigmoid_of_1_702_x(self):
        assert_close(f"quick_gelu at {POINTS}", quick_gelu(torch.tensor(POINTS)),
                     [x / (1 + math.exp(-1.702 * x)) for x in POINTS])


class TestSquaredRelu:
    def test_it_squares_what_is_positive(self):
        assert_close(f"squared_relu at {POINTS}", squared_relu(torch.tensor(POINTS)),
                     [max(x, 0) ** 2 for x in POINTS])


class TestMLP:
    @pytest.mark.parametrize("arguments, act, shapes", [
        ({}, F.gelu, [(12, 3), (12,), (3, 12), (3,)]),
        (dict(act=F.relu, hidden=5), F.relu, [(5, 3), (5,), (3, 5), (3,)]),
        (dict(act=torch.tanh, bias=False), torch.tanh, [(12, 3), (3, 12)])])
    def test_it_is_two_layers_with_four_times_the_width_unless_given(self, arguments, act, shapes):
        mlp, x = randomize(MLP(width=3, **arguments)).double(), draw(B, T, 3)
        assert [tuple(parameter.shape) for parameter in mlp.parameters()] == shapes
        assert_same("MLP (B, T, D)", mlp(x), mlp_by_hand(mlp, x, act), mlp, x=x)


class TestGatedMLP:
    @pytest.mark.parametrize("arguments, act, biases", [
        ({}, F.silu, []), (dict(act=gelu_tanh, bias=True), gelu_tanh, [(5,), (5,), (3,)])])
    def test_the_activation_is_on_the_gate(self, arguments, act, biases):
        mlp, x = randomize(GatedMLP(width=3, hidden=5, **arguments)).double(), draw(B, T, 3)
        assert [tuple(p.shape) for p in mlp.parameters() if p.dim() == 1] == biases
        assert_same("gated MLP (B, T, D)", mlp(x), gated_mlp(mlp, x, act), mlp, x=x)


def make_block(cross=True, norm_first=True):
    return randomize(Block(
        Attention(width=WIDTH, heads=3), MLP(width=WIDTH, hidden=HIDDEN), partial(LayerNorm, WIDTH),
        Attention(width=WIDTH, heads=3, context_width=C) if cross else None, norm_first)).double()


@pytest.mark.parametrize("norm_first", [True, False])
class TestBlock:
    @pytest.mark.parametrize("cross", [True, False])
    @pytest.mark.parametrize("with_context", [True, False])
    def test_each_part_has_a_residual_and_a_norm_of_its_own(self, norm_first, cross, with_context):
        given, by_hand = inputs_of_a_block()
        given["context"] = given["context"] if with_context else None
        count = 4 * WIDTH ** 2 + 2 * HIDDEN * WIDTH + HIDDEN + 9 * WIDTH
        count += cross * (2 * WIDTH + 2 * C + 6) * WIDTH
        check_block(make_block(cross, norm_first), count, (given, by_hand), cross and with_context,
                    norm_first=norm_first)

    @pytest.mark.parametrize("masked", [True, False])
    def test_at_one_position_it_gives_what_forward_gives_there(self, norm_first, masked):
        block, x, index = make_block(False, norm_first), draw(3, T, WIDTH), torch.tensor([1, 4, 0])
        mask = torch.rand(T, T) < 0.5 if masked else None
        whole = block_by_hand(block, x, norm_first=norm_first, mask=mask)
        assert_same("block at an index (B, D)", block.forward_at(x, index, mask),
                    whole[range(3), index], block, x=x)

    @pytest.mark.parametrize("with_context", [True, False])
    def test_at_one_position_it_attends_to_a_context_too(self, norm_first, with_context):
        block, x, index = make_block(True, norm_first), draw(3, T, WIDTH), torch.tensor([1, 4, 0])
        mask = torch.rand(3, 1, 1, T) < 0.6                # of padding
        context, context_mask = draw(3, S, C), torch.rand(3, 1, 1, S) < 0.6
        context = context if with_context else None
        whole = block_by_hand(block, x, context, norm_first=norm_first, mask=mask,
                              context_mask=context_mask)
        assert_same("block at an index (B, D)",
                    block.forward_at(x, index, mask, context, context_mask),
                    whole[range(3), index], block, x=x)

    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_with_a_cache_every_chunking_equals_the_whole_text(self, norm_first, chunks):
        block, context = make_block(True, norm_first), draw(B, S, C)
        got, x, given = in_chunks(block, chunks, context)
        assert_close("block in chunks (B, T, D)", got,
                     block_by_hand(block, x, context, norm_first=norm_first, **given))


class TestTransformer:
    def make(self, cross, norm):
        blocks = [make_block(cross) for _ in range(3)]
        return Transformer(blocks, randomize(LayerNorm(WIDTH)).double() if norm else None)

    def by_hand(self, stack, x, **given):
        for block in stack.blocks:
            x = block_by_hand(block, x, **given)
        return x if stack.norm is None else layer_norm(stack.norm, x)

    @pytest.mark.parametrize("norm", [True, False])
    def test_it_applies_its_blocks_in_order_and_its_norm_last(self, norm):
        stack, x, (given, by_hand) = self.make(True, norm), draw(B, T, WIDTH), inputs_of_a_block()
        expected = self.by_hand(stack, x, **by_hand)
        assert_same("stack (B, T, D)", stack(x, **given), expected, stack, x=x)

    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("masked", [True, False])
    def test_at_one_position_it_gives_what_forward_gives_there(self, norm, masked):
        stack, x, index = self.make(False, norm), draw(3, T, WIDTH), torch.tensor([1, 4, 0])
        mask = torch.rand(T, T) < 0.5 if masked else None
        assert_same("stack at an index (B, D)", stack.forward_at(x, index, mask),
                    self.by_hand(stack, x, mask=mask)[range(3), index], stack, x=x)


class TestVitBlock:
    @pytest.mark.parametrize("name, changes, act, eps", [
        ("vit_block", {}, F.gelu, 1e-5), ("gpt2_block", {}, gelu_tanh, 1e-5),
        ("opt_block", {}, F.relu, 1e-5), ("vit_block", dict(act=F.silu, eps=0.3), F.silu, 0.3)])
    @pytest.mark.parametrize("hidden", [None, HIDDEN])
    def test_each_paper_has_its_activation(self, name, changes, act, eps, hidden):
        make, size = getattr(transformer, name), hidden or 4 * WIDTH
        check_block(make(width=WIDTH, heads=3, hidden=hidden, **changes),
                    4 * WIDTH ** 2 + 2 * size * WIDTH + size + 9 * WIDTH,
                    norm=partial(layer_norm, eps=eps), mlp=partial(mlp_by_hand, act=act))


class TestLlamaBlock:
    @pytest.mark.parametrize("changes, eps", [({}, 1e-5), ({"eps": 0.3}, 0.3)])
    def test_it_has_grouped_queries_rms_norms_a_gated_silu_and_no_biases(self, changes, eps):
        block = llama_block(width=WIDTH, heads=6, kv_heads=2, hidden=HIDDEN, **changes)
        count = 2 * WIDTH * (WIDTH + 4) + 3 * WIDTH * HIDDEN + 2 * WIDTH
        check_block(block, count, inputs_of_a_block(6, 2), norm=partial(rms_norm, eps=eps),
                    mlp=gated_mlp, heads=6, kv_heads=2)


class TestBertBlock:
    @pytest.mark.parametrize("changes, eps", [({}, 1e-12), ({"eps": 0.3}, 0.3)])
    @pytest.mark.parametrize("cross", [True, False])
    def test_its_norms_come_last_and_a_context_has_a_cross_attention(self, cross, changes, eps):
        block = bert_block(width=WIDTH, heads=3, context_width=C if cross else None, **changes)
        count = (12 * WIDTH + 13 + cross * (2 * WIDTH + 2 * C + 6)) * WIDTH
        norm = partial(layer_norm, eps=eps)
        check_block(block, count, crosses=cross, norm=norm, norm_first=False)


class TestT5Block:
    @pytest.mark.parametrize("changes, eps", [({}, 1e-6), ({"eps": 0.3}, 0.3)])
    @pytest.mark.parametrize("decoder", [True, False])
    def test_its_scores_are_not_scaled_and_a_decoder_has_a_context(self, decoder, changes, eps):
        mlp = GatedMLP(width=WIDTH, hidden=HIDDEN)
        block = t5_block(width=WIDTH, heads=3, head_width=6, decoder=decoder, mlp=mlp, **changes)
        count = (1 + decoder) * (4 * 18 + 1) * WIDTH + 3 * WIDTH * HIDDEN + WIDTH
        check_block(block, count, inputs_of_a_block(3, 6, WIDTH), decoder, scale=1.0,
                    mlp=gated_mlp, norm=partial(rms_norm, eps=eps))


class TestFusedAttention(Definition):
    def attend(self, *inputs):
        return fused_attention(*inputs)

    @pytest.mark.parametrize("biased", [True, False])
    def test_it_holds_with_a_kernel_that_gives_nan_without_a_key(self, biased, monkeypatch):
        def kernel(q, k, v, attn_mask=None, scale=None):
            scores = q @ k.mT * (K ** -0.5 if scale is None else scale)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(scores).masked_fill(~attn_mask, -torch.inf)
            return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ v
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        self.test_it_equals_the_definition_written_as_loops("some", biased, 0.3)


class TestAttend:
    @pytest.mark.parametrize("switch", ["hand", "fused", "auto"])
    def test_every_switch_gives_attention(self, switch, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", switch)
        given = *(draw(B, H, *shape) for shape in ((T, K), (S, K), (S, V))), masks()["some"], \
            draw(B, H, T, S), 0.3
        assert_close("attention (B, H, T, V)", attend(*given), slow_attention(*given))

    @pytest.mark.parametrize("T, S, device, dtype, auto", [
        (5, 3, "cpu", "float32", "hand"), (4, 4, "cpu", "float32", "fused"),
        (5, 3, "meta", "float32", "fused"), (5, 3, "cpu", "float64", "fused")])
    def test_auto_is_by_hand_where_small(self, T, S, device, dtype, auto, monkeypatch):
        monkeypatch.setattr(transformer, "FASTER_BY_HAND", {torch.float32: 15})
        monkeypatch.setattr(transformer, "attention", lambda *a, **k: "hand")
        monkeypatch.setattr(transformer, "fused_attention", lambda *a, **k: "fused")
        q, k = (torch.zeros(1, 1, n, 2, device=device, dtype=getattr(torch, dtype)) for n in (T, S))
        for switch, expected in (("hand", "hand"), ("fused", "fused"), ("auto", auto)):
            monkeypatch.setattr(transformer, "ATTENTION", switch)
            assert attend(q, k, k) == expected, switch
