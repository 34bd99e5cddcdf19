"""The gated block: a loop over single vectors, its two gates, and its start."""
import math

import pytest
import torch

from flamingo import GatedBlock
from tests.helpers import (ACTS, assert_close, loop_gated_block, make_cache, make_visual,
                           media_mask_of, randomize, unchanged)

ROWS = ("..I...I.I..", "I..........", "...........")


def make(act="squared_relu", gate_init=0.6, attn_init_scale=1.0):
    """A block in float64 that attends from 20 to 22 with 3 heads of 4."""
    return GatedBlock(width=20, context_width=22, heads=3, head_width=4, act=ACTS[act],
                      gate_init=gate_init, attn_init_scale=attn_init_scale).double()


def inputs(*rows):
    """x (B, T, D), visual (B, N, Q, C), and the media mask (B, 1, T, N * Q) of rows of letters."""
    x = torch.randn(len(rows), len(rows[0]), 20).double()
    return x, make_visual(len(rows)), media_mask_of(rows)


class TestGatedBlock:
    @pytest.mark.parametrize("act", ["squared_relu", "gelu"])
    def test_it_is_the_papers_loop(self, act):
        block, (x, visual, mask) = randomize(make(act)), inputs(*ROWS)
        expected = loop_gated_block(block, x, visual, mask, act)
        with unchanged(x=x, visual=visual, mask=mask):
            assert_close("outputs (B, T, D)", block(x, visual.flatten(1, 2), mask), expected)

    @pytest.mark.parametrize("gate, other", [("attn_gate", "mlp_gate"), ("mlp_gate", "attn_gate")])
    def test_each_gate_multiplies_its_own_part_by_its_tanh(self, gate, other):
        block, (x, visual, mask) = randomize(make()), inputs("I....")

        def added(value):
            getattr(block, gate).data.fill_(value)
            getattr(block, other).data.fill_(0.0)
            return block(x, visual.flatten(1, 2), mask) - x
        assert_close("added with both gates at 0", added(0.0), torch.zeros_like(x))
        assert_close(f"added with {gate} at -2", added(-2.0), added(1e9) * math.tanh(-2))
        assert added(-2.0).abs().max() > 1e-3, f"{gate} opens nothing"

    def test_text_without_an_image_gets_exactly_0_from_the_attention(self):
        block, (x, visual, mask) = randomize(make()), inputs(*ROWS)
        block.mlp_gate.data.zero_()
        visual = visual.flatten(1, 2).requires_grad_()
        same = (block(x, visual, mask) == x).all(dim=-1)
        expected = ~mask.any(dim=3)[:, 0]
        assert_close("tokens that stay as they are (B, T)", same, expected)
        block(x, visual, mask)[expected].sum().backward()
        assert_close("their gradient of the visual tokens", visual.grad, torch.zeros_like(visual))

    def test_with_a_cache_later_text_attends_to_the_same_images(self):
        block, (x, visual, mask), cache = randomize(make()), inputs(*ROWS), make_cache()
        visual, parts = visual.flatten(1, 2), (slice(0, 8), slice(8, 9), slice(9, 11))
        got = [block(x[:, part], visual, mask[:, :, part], cache) for part in parts]
        assert_close("outputs (B, T, D)", torch.cat(got, dim=1), block(x, visual, mask))
        assert_close("outputs with kept keys and values (B, T, D)",
                     block(x, 0 * visual, mask, cache), block(x, visual, mask))

    def test_gates_start_at_their_value_and_at_0_they_alone_have_a_gradient(self):
        for value in (0.0, -0.3):
            block, (x, visual, mask) = make(gate_init=value), inputs(*ROWS)
            for gate in (block.attn_gate, block.mlp_gate):
                assert_close("gate (1,)", gate, [value])
            block(x, visual.flatten(1, 2), mask).square().sum().backward()
            for name, p in block.named_parameters():
                learns = value != 0 or name.endswith("_gate")
                assert (p.grad.abs().max() > 0) == learns, f"gates at {value}: gradient of {name}"

    def test_the_init_scale_multiplies_the_attentions_output_alone(self):
        block = make(attn_init_scale=7.0)
        for name, scale in (("attn.out_proj", 7), ("attn.v_proj", 1), ("attn.q_proj", 1),
                            ("mlp.fc1", 1), ("mlp.fc2", 1)):
            weight = block.get_submodule(name).weight
            bound = scale * weight.shape[1] ** -0.5              # torch's Linear is uniform
            assert 0.9 * bound < weight.abs().max() <= bound, f"{name}: {weight.abs().max():.3f}"

    def test_only_norms_have_biases(self):
        expected = 2 * 20 * 12 + 2 * 22 * 12 + 2 * 20 * 80 + 4 * 20 + 2      # two norms, two gates
        found = sum(p.numel() for p in make().parameters())
        assert found == expected, f"{found} parameters, expected {expected}"
