"""Attention, norms, MLPs, positions and blocks against torch's own layers and slow loops."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import transformer
from common.masks import causal, draw, padding
from common.t5 import RelativeBias
from common.transformer import (MLP, Attention, Block, GatedMLP, LayerNorm, LearnedPositions,
                                Transformer, attention, fused_attention, gelu, RMSNorm, bert_block,
                                gelu_tanh, gpt2_block, llama_block, opt_block, quick_gelu,
                                apply_rope, rope_table, squared_relu, t5_block,
                                vit_block)
from tests.helpers import randomize

B, H, T, S, K, V = 2, 3, 5, 7, 11, 13       # distinct primes: a transposed axis cannot pass


def qkv(dtype=torch.float64):
    shapes = (B, H, T, K), (B, H, S, K), (B, H, S, V)
    return [(3 * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


def slow_attention(q, k, v, mask, bias, scale):
    """Three loops over what the definition says of one query."""
    out = torch.zeros(B, H, T, V, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(S) if mask[b, h, t, s]]
                if seen:
                    score = [(q[b, h, t] @ k[b, h, s]).item() * scale + float(bias[b, h, t, s])
                             for s in seen]
                    weight = [math.exp(x - max(score)) for x in score]
                    for w, s in zip(weight, seen):
                        out[b, h, t] += w / sum(weight) * v[b, h, s].detach()
    return out


def masks():
    some = torch.rand(B, H, T, S) < 0.5
    some[0, 1, 2] = False                   # a query that may attend to nothing
    some[1, 0, 3] = False
    return {"full": torch.ones(B, H, T, S, dtype=torch.bool), "some": some}


@pytest.mark.parametrize("attend", [attention, fused_attention])
class TestAttention:
    @pytest.mark.parametrize("kind", ["full", "some"])
    @pytest.mark.parametrize("scale", [None, 1.0])
    def test_it_equals_the_definition_written_as_loops(self, attend, kind, scale):
        q, k, v = qkv()
        mask, bias = masks()[kind], torch.randn(B, H, T, S, dtype=torch.float64)
        want = slow_attention(q, k, v, mask, bias, scale or K ** -0.5)
        torch.testing.assert_close(attend(q, k, v, mask, bias, scale), want, msg=lambda m: (
            f"attention under this mask is wrong:\n{draw(mask[0, 0])}\n{m}"))

    def test_no_mask_equals_an_open_mask(self, attend):
        q, k, v = qkv()
        torch.testing.assert_close(attend(q, k, v), attend(q, k, v, masks()["full"]))

    def test_two_tokens_by_hand(self, attend):
        # Scores 0 and 4 * ln 3 / sqrt(16) = ln 3: weights 1/4 and 3/4.
        q = torch.zeros(1, 1, 1, 16)
        q[..., 0] = 4 * math.log(3)
        k = torch.zeros(1, 1, 2, 16)
        k[..., 1, 0] = 1
        v = torch.tensor([[[[0.0], [1.0]]]])
        assert attend(q, k, v).item() == pytest.approx(0.75)

    def test_an_empty_row_gives_zeros_and_no_gradient(self, attend):
        q, k, v = qkv()
        mask = masks()["some"]
        out = attend(q, k, v, mask)
        assert (out[0, 1, 2] == 0).all() and (out[1, 0, 3] == 0).all()
        out.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))
        assert (q.grad[0, 1, 2] == 0).all()
        k.grad = v.grad = None
        attend(q, k, v, mask)[0, 1, 2].sum().backward()
        assert (k.grad == 0).all() and (v.grad == 0).all()

    def test_a_mask_broadcasts_over_batch_and_heads(self, attend):
        q, k, v = qkv()
        wide = causal(T, past=S - T).expand(B, H, T, S)
        torch.testing.assert_close(attend(q, k, v, causal(T, past=S - T)), attend(q, k, v, wide))

    def test_bfloat16_stays_bfloat16(self, attend):
        q, k, v = qkv(torch.bfloat16)
        assert attend(q, k, v, masks()["some"]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["full", "some"])
def test_by_hand_and_fused_agree_in_values_and_gradients(kind):
    bias = torch.randn(1, H, T, S, dtype=torch.float64)
    results = []
    for attend in (attention, fused_attention):
        torch.manual_seed(1)
        inputs = qkv()
        out = attend(*inputs, masks()[kind], bias)
        out.cos().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for hand, fused in zip(*results):
        torch.testing.assert_close(hand, fused)


def test_the_kernel_is_never_given_an_empty_row(monkeypatch):
    given, kernel = [], F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        given.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for bias in (None, torch.randn(1, H, T, S, dtype=torch.float64)):
        fused_attention(*qkv(), masks()["some"], bias)
    assert given[0].any(dim=-1).all() and given[1].isfinite().any(dim=-1).all()


def test_the_switch_chooses_the_implementation(monkeypatch):
    called = []
    monkeypatch.setattr(transformer, "attention", lambda *a: called.append("hand"))
    monkeypatch.setattr(transformer, "fused_attention", lambda *a: called.append("fused"))
    short, long = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 300, 2)
    for switch in ("hand", "fused", "auto"):
        monkeypatch.setattr(transformer, "ATTENTION", switch)
        transformer.attend(short, short, short)
        transformer.attend(long, long, long)
    assert called == ["hand", "hand", "fused", "fused", "hand", "fused"]


class TestMultiHead:
    def reference(self, ours, width, heads):
        theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat(
                [ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
            theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias,
                                                 ours.v_proj.bias]))
            theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        return theirs

    def test_self_attention_equals_torch(self):
        ours = randomize(Attention(width=12, heads=3).double())
        x, real = torch.randn(B, T, 12).double(), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
        want, _ = self.reference(ours, 12, 3)(x, x, x, key_padding_mask=~real, attn_mask=~causal(T))
        torch.testing.assert_close(ours(x, mask=causal(T) & padding(real)), want)

    def test_cross_attention_reads_keys_and_values_from_the_context(self):
        ours = randomize(Attention(width=12, heads=3).double())
        x, context = torch.randn(B, T, 12).double(), torch.randn(B, S, 12).double()
        want, _ = self.reference(ours, 12, 3)(x, context, context)
        torch.testing.assert_close(ours(x, context), want)

    def test_a_context_of_another_width(self):
        ours = Attention(width=12, heads=3, context_width=17)
        assert ours(torch.randn(B, T, 12), torch.randn(B, S, 17)).shape == (B, T, 12)

    def test_grouped_queries_share_keys_in_neighbouring_heads(self):
        grouped = randomize(Attention(width=24, heads=6, kv_heads=2).double())
        full = Attention(width=24, heads=6).double()
        full.load_state_dict(grouped.state_dict() | {
            f"{name}.{part}": getattr(getattr(grouped, name), part).unflatten(0, (2, 4))
            .repeat_interleave(3, dim=0).flatten(0, 1)
            for name in ("k_proj", "v_proj") for part in ("weight", "bias")})
        x = torch.randn(B, T, 24).double()
        torch.testing.assert_close(grouped(x), full(x))

    def test_sizes_that_do_not_divide_are_told(self):
        with pytest.raises(ValueError, match="width 10 does not divide into 3 heads"):
            Attention(width=10, heads=3)
        with pytest.raises(ValueError, match="6 heads do not divide into 4 key-value heads"):
            Attention(width=12, heads=6, kv_heads=4)


class TestNorms:
    @pytest.fixture
    def by_hand(self, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", "hand")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_layer_norm_by_hand_equals_torch(self, dtype, by_hand):
        norm, x = randomize(LayerNorm(7, eps=0.3)).to(dtype), (5 * torch.randn(B, T, 7) + 3).to(dtype)
        want = F.layer_norm(x, (7,), norm.weight, norm.bias, 0.3)
        torch.testing.assert_close(norm(x), want)

    def test_rms_norm_equals_torch_and_keeps_the_mean(self, by_hand):
        norm, x = randomize(RMSNorm(7, eps=0.3)).double(), torch.randn(B, T, 7).double() + 3
        torch.testing.assert_close(norm(x), F.rms_norm(x, (7,), norm.weight, 0.3))
        assert not torch.allclose(norm(x), norm(x - 3))

    @pytest.mark.parametrize("attention", ["hand", "auto"])
    def test_rms_norm_rounds_before_the_weight(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)
        norm, x = randomize(RMSNorm(7, eps=0.1)).bfloat16(), torch.randn(50, 7).bfloat16()
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 0.1)
        assert torch.equal(norm(x), scaled.bfloat16() * norm.weight)

    @pytest.mark.parametrize("layer", [LayerNorm, RMSNorm])
    def test_the_layer_is_the_same_by_hand_and_fused(self, layer, monkeypatch):
        norm, x = randomize(layer(7, eps=0.2)), torch.randn(B, T, 7)
        fused, halves = norm(x), norm(x.bfloat16())
        monkeypatch.setattr(transformer, "ATTENTION", "hand")
        torch.testing.assert_close(norm(x), fused)
        torch.testing.assert_close(norm(x.bfloat16()), halves)


class TestActivationsAndMLPs:
    x = torch.tensor([-30.0, -1.7, -0.1, 0.0, 0.4, 2.3, 30.0])

    @pytest.mark.parametrize("act, want", [
        (gelu, lambda x: x * (1 + torch.erf(x / 2 ** 0.5)) / 2),
        (gelu_tanh, lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))),
        (quick_gelu, lambda x: x / (1 + torch.exp(-1.702 * x))),
        (squared_relu, lambda x: torch.where(x > 0, x * x, 0))])
    def test_an_activation_is_its_formula(self, act, want):
        torch.testing.assert_close(act(self.x), want(self.x))

    def test_the_gelus_differ_as_published(self):
        x = torch.linspace(-6, 6, 10001)
        assert (gelu(x) - quick_gelu(x)).abs().max().item() == pytest.approx(0.0203, abs=1e-4)
        assert 0 < (gelu(x) - gelu_tanh(x)).abs().max() < 1e-3

    def test_mlp_is_two_layers_with_four_times_the_width(self):
        mlp, x = randomize(MLP(width=3, act=F.relu)), torch.randn(B, T, 3)
        assert mlp.fc1.out_features == 12
        want = F.relu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
        torch.testing.assert_close(mlp(x), want)

    def test_gated_mlp_puts_the_activation_on_the_gate(self):
        mlp, x = randomize(GatedMLP(width=3, hidden=5)), torch.randn(B, T, 3)
        gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
        torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T)
        assert mlp.gate_proj.bias is None


class TestPositions:
    def test_learned_positions_with_an_offset_start_at_that_row(self):
        table = LearnedPositions(count=5, width=3, offset=2)
        assert torch.equal(table(torch.tensor([[0, 4]])), table.weight[None, [2, 6]])
        assert torch.equal(table.span(1, 2), table.weight[3:5])

    def test_past_the_end_of_the_table_is_told(self):
        with pytest.raises(ValueError, match="6 positions, but the context is 5"):
            LearnedPositions(count=5, width=3, offset=2).span(2, 4)

    def test_rope_turns_the_pair_i_by_its_angle(self):
        x = torch.randn(1, 1, 4, 6)
        positions = torch.tensor([0, 1, 5, 9])
        got = apply_rope(x, rope_table(positions, 6, theta=100.0))
        for t, position in enumerate(positions.tolist()):
            for i in range(3):
                turn = torch.polar(torch.tensor(1.0), torch.tensor(position * 100.0 ** (-2 * i / 6)))
                want = torch.complex(x[0, 0, t, i], x[0, 0, t, i + 3]) * turn
                torch.testing.assert_close(
                    torch.complex(got[0, 0, t, i], got[0, 0, t, i + 3]), want)

    def test_attention_with_rope_sees_relative_positions_alone(self):
        layer, x = randomize(Attention(width=12, heads=2).double()), torch.randn(B, T, 12).double()
        near, far = (layer(x, mask=causal(T), rope=rope_table(torch.arange(T) + start, 6))
                     for start in (0, 31))
        torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)   # the angles are float32
        assert not torch.allclose(near, layer(x, mask=causal(T)))

    def test_positions_of_each_row_give_a_table_of_each_row(self):
        layer, x = randomize(Attention(width=12, heads=2)), torch.randn(B, T, 12)
        positions = torch.stack([torch.arange(T), 2 * torch.arange(T)])
        both = layer(x, rope=rope_table(positions, 6))
        for b in range(B):
            torch.testing.assert_close(both[b], layer(x[b:b + 1], rope=rope_table(positions[b], 6))[0])

    def test_angles_keep_float32_at_far_positions(self):
        cos, _ = rope_table(torch.tensor([4096]), 8)
        want = [math.cos(4096 * 10000 ** (-2 * i / 8)) for i in range(4)]
        assert cos.dtype == torch.float32
        torch.testing.assert_close(cos[0].double(), torch.tensor(want + want).double(), atol=2e-4, rtol=0)

    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_t5_buckets_split_near_and_far(self, bidirectional):
        bias = RelativeBias(heads=3, buckets=8, max_distance=20, bidirectional=bidirectional)
        distances = torch.tensor([-50, -20, -6, -3, -1, 0, 1, 3, 6, 20, 50])
        want = ([3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7] if bidirectional
                else [7, 7, 5, 3, 1, 0, 0, 0, 0, 0, 0])
        assert bias.bucket(distances).tolist() == want
        assert bias(T, S).shape == (1, 3, T, S)
        torch.testing.assert_close(bias(S, S)[:, :, S - T:], bias(T, S))


class TestBlocks:
    """Each paper's block from parts, against torch's own layer of it."""

    def torch_layer(self, block, width, heads, hidden, activation, norm_first):
        theirs = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0, activation=activation,
                                            batch_first=True, norm_first=norm_first,
                                            layer_norm_eps=block.attn_norm.eps).double()
        pairs = {"self_attn.out_proj": block.attn.out_proj, "linear1": block.mlp.fc1,
                 "linear2": block.mlp.fc2, "norm1": block.attn_norm, "norm2": block.mlp_norm}
        state = {f"{name}.{k}": v for name, part in pairs.items() for k, v in part.state_dict().items()}
        parts = block.attn.q_proj, block.attn.k_proj, block.attn.v_proj
        state["self_attn.in_proj_weight"] = torch.cat([p.weight for p in parts])
        state["self_attn.in_proj_bias"] = torch.cat([p.bias for p in parts])
        theirs.load_state_dict(state)
        return theirs

    @pytest.mark.parametrize("make, activation, norm_first", [
        (vit_block, F.gelu, True), (partial(vit_block, act=quick_gelu), quick_gelu, True),
        (gpt2_block, gelu_tanh, True), (opt_block, F.relu, True),
        (bert_block, F.gelu, False)])
    def test_a_block_equals_torch_with_the_same_weights(self, make, activation, norm_first):
        block = randomize(make(width=12, heads=3, hidden=17).double())
        theirs = self.torch_layer(block, 12, 3, 17, activation, norm_first)
        x, mask = torch.randn(B, T, 12).double(), causal(T)
        torch.testing.assert_close(block(x, mask=mask), theirs(x, src_mask=~mask))

    @pytest.mark.parametrize("make", [vit_block, bert_block])
    @pytest.mark.parametrize("mask", [None, causal(T)])
    def test_reading_one_position_gives_what_forward_gives_there(self, make, mask):
        blocks = [randomize(make(width=12, heads=3, hidden=17).double()) for _ in range(2)]
        stack = Transformer(blocks, randomize(LayerNorm(12).double()))
        x, rows = torch.randn(B, T, 12).double(), torch.tensor([1, T - 2])
        torch.testing.assert_close(stack.forward_at(x, rows, mask), stack(x, mask=mask)[range(B), rows])

    def test_a_decoder_block_equals_torch(self):
        block = randomize(Block(Attention(width=12, heads=3), MLP(width=12, hidden=17, act=F.relu),
                                partial(LayerNorm, 12), Attention(width=12, heads=3)).double())
        theirs = nn.TransformerDecoderLayer(12, 3, 17, dropout=0, batch_first=True,
                                            norm_first=True).double()
        state = {"linear1": block.mlp.fc1, "linear2": block.mlp.fc2, "norm1": block.attn_norm,
                 "norm2": block.cross_norm, "norm3": block.mlp_norm}
        state = {f"{name}.{k}": v for name, part in state.items() for k, v in part.state_dict().items()}
        for name, attn in (("self_attn", block.attn), ("multihead_attn", block.cross)):
            parts = attn.q_proj, attn.k_proj, attn.v_proj
            state[f"{name}.in_proj_weight"] = torch.cat([p.weight for p in parts])
            state[f"{name}.in_proj_bias"] = torch.cat([p.bias for p in parts])
            state |= {f"{name}.out_proj.{k}": v for k, v in attn.out_proj.state_dict().items()}
        theirs.load_state_dict(state)
        x, context = torch.randn(B, T, 12).double(), torch.randn(B, S, 12).double()
        seen = torch.rand(B, S) < 0.7
        want = theirs(x, context, tgt_mask=~causal(T), memory_key_padding_mask=~seen)
        torch.testing.assert_close(
            block(x, context, mask=causal(T), context_mask=padding(seen)), want)

    def test_cross_attention_rests_without_a_context(self):
        block = randomize(bert_block(width=12, heads=3, context_width=5))
        plain = bert_block(width=12, heads=3)
        plain.load_state_dict({k: v for k, v in block.state_dict().items() if "cross" not in k})
        x = torch.randn(B, T, 12)
        assert torch.equal(block(x), plain(x))

    def test_the_stack_applies_its_blocks_in_order_and_its_norm_last(self):
        blocks = [randomize(vit_block(width=12, heads=3)) for _ in range(2)]
        norm, x = randomize(LayerNorm(12)), torch.randn(B, T, 12)
        torch.testing.assert_close(Transformer(blocks, norm)(x), norm(blocks[1](blocks[0](x))))
        torch.testing.assert_close(Transformer(blocks)(x), blocks[1](blocks[0](x)))


def stacks():
    """name -> (a stack of two blocks, what its forward gets besides x) for each kind of block."""
    rope, context = rope_table(torch.arange(T), 2), torch.randn(B, S, 12)
    kinds = {"vit": (vit_block(width=12, heads=3), {}),
             "bert": (bert_block(width=12, heads=3, context_width=12), {"context": context}),
             "llama": (llama_block(width=12, heads=6, kv_heads=2, hidden=17), {"rope": rope}),
             "t5": (t5_block(width=12, heads=3, head_width=5, mlp=MLP(width=12)),
                    {"bias": torch.randn(1, 3, T, T)})}
    return {name: (Transformer([block, block], LayerNorm(12)), inputs)
            for name, (block, inputs) in kinds.items()}


@pytest.mark.parametrize("name", stacks())
class TestDevices:
    def test_compiling_finds_no_graph_break(self, name):
        stack, inputs = stacks()[name]
        x = torch.randn(B, T, 12)
        found = [torch._dynamo.explain(stack)(x, mask=causal(T), **inputs)]
        if name in ("vit", "bert"):
            index = torch.tensor([1, T - 2])
            found.append(torch._dynamo.explain(stack.forward_at)(x, index, causal(T)))
        for report in found:
            assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons

    def test_it_runs_on_the_meta_device(self, name):
        stack, inputs = stacks()[name]
        stack, x = stack.to("meta"), torch.empty(B, T, 12, device="meta")
        inputs = {key: tuple(t.to("meta") for t in value) if key == "rope" else value.to("meta")
                  for key, value in inputs.items()}
        assert stack(x, mask=causal(T, device="meta"), **inputs).shape == (B, T, 12)
        index = torch.zeros(B, dtype=torch.int64, device="meta")
        assert stack.forward_at(x, index, causal(T, device="meta")).shape == (B, 12)
        assert RelativeBias(heads=3).to("meta")(T, S).shape == (1, 3, T, S)
