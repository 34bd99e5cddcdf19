"""The gated block: a loop over single vectors, its gates, its start, and where it stands."""
import math
from dataclasses import replace

import pytest
import torch

from common import masks, transformer
from common.data.tokenizer import IMAGE
from flamingo import Flamingo
from tests.helpers import (assert_close, flamingo_config, loop_gated_block, make_batch, make_ids, make_visual, toy_flamingo)

def media_mask(ids):
    return masks.media(masks.image_index(ids == IMAGE), 3, 7)


@pytest.mark.parametrize("attention", ["hand", "fused"])
class TestGatedBlock:
    @pytest.fixture(autouse=True)
    def attention_function(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)

    def test_it_is_the_papers_loop(self):
        block, visual = toy_flamingo().gated[1], make_visual(3)
        ids = make_ids("..I...I.I..", "I..........", "...........")
        x = torch.randn(3, 11, 20).double()
        out = block(x, visual.flatten(1, 2), media_mask(ids))
        for b in range(3):
            assert_close("outputs", out[b], loop_gated_block(block, x[b], visual[b], ids[b]))

    def test_the_model_is_a_gated_block_before_every_frozen_block(self):
        model, ids, visual = toy_flamingo(), make_ids("..I...I.I..", "I.........."), make_visual()
        x, inputs = model.lm.block_inputs(model.lm.embed(ids))
        for gated, block in zip(model.gated, model.lm.blocks):
            x = torch.stack([loop_gated_block(gated, x[b], visual[b], ids[b]) for b in range(2)])
            x = block(x, **inputs)
        assert_close("outputs", model.logits(ids, visual=visual), model.lm.head(x))

    def test_without_an_image_the_attention_adds_exactly_0(self):
        for only_latest_image in (True, False):
            model, outputs = toy_flamingo(only_latest_image=only_latest_image), []
            model.gated[0].attn.register_forward_hook(lambda m, i, out: outputs.append(out))
            model.logits(make_ids("...I.", "....."), visual=make_visual())
            assert ((outputs[0] == 0).all(-1) == torch.tensor(
                [[True] * 3 + [False] * 2, [True] * 5])).all()

    def test_in_bf16_the_loss_and_its_gradients_are_finite(self):
        model = toy_flamingo().float()
        for rows in (["....", "...."], ["..I.I", "....."]):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(make_batch(*rows))["lm"]
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class TestGates:
    def test_at_0_the_model_is_the_language_model_bit_for_bit(self):
        model, ids, visual = toy_flamingo(gate=0.0), make_ids("..I...I", "I......"), make_visual()
        assert torch.equal(model.logits(ids, visual=visual), model.lm(ids))
        model, visual = model.float(), visual.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.logits(ids, visual=visual), model.lm(ids))

    def test_every_block_has_two_that_start_at_0(self):
        gates = {n: p for n, p in Flamingo(flamingo_config()).named_parameters() if n.endswith("_gate")}
        assert sorted(gates) == [f"gated.{i}.{part}_gate" for i in range(3)
                                 for part in ("attn", "mlp")]
        assert all(p.shape == (1,) and p == 0 for p in gates.values())
        block = Flamingo(replace(flamingo_config(), gate_init=0.5)).gated[1]
        assert block.attn_gate == block.mlp_gate == 0.5

    @pytest.mark.parametrize("gate, other", [("attn_gate", "mlp_gate"), ("mlp_gate", "attn_gate")])
    def test_each_multiplies_its_own_part_by_its_tanh(self, gate, other):
        block, ids, x = toy_flamingo().gated[1], make_ids("I...."), torch.randn(1, 5, 20).double()
        visual, mask = make_visual(1).flatten(1, 2), media_mask(ids)

        def added(value):
            getattr(block, gate).data.fill_(value)
            getattr(block, other).data.fill_(0.0)
            return block(x, visual, mask) - x
        assert_close("outputs", added(2.0), added(1e9) * math.tanh(2))
        assert added(0.0).abs().max() == 0 < added(2.0).abs().max()

    def test_text_alone_is_the_language_models_while_the_mlps_gate_is_0(self):
        model, ids, visual = toy_flamingo(), make_ids("....."), make_visual(1)
        assert not torch.allclose(model.logits(ids, visual=visual), model.lm(ids))
        for block in model.gated:
            block.mlp_gate.data.zero_()
        assert torch.equal(model.logits(ids, visual=visual), model.lm(ids))


def test_attn_init_scale_multiplies_attention_outputs_of_all_but_the_first_block():
    gated = Flamingo(replace(flamingo_config(), attn_init_scale=7.0)).gated
    for i, part, scale in ((0, "attn.out_proj", 1), (1, "attn.out_proj", 7),
                           (2, "attn.out_proj", 7), (1, "attn.v_proj", 1),
                           (1, "mlp.fc1", 1), (1, "mlp.fc2", 1)):
        weight = gated[i].get_submodule(part).weight
        most = scale * weight.shape[1] ** -0.5
        assert 0.9 * most < weight.abs().max() <= most, (i, part)


class TestPlacement:
    @pytest.mark.parametrize("layers, every, paper, openflamingo", [
        (24, 1, list(range(24)), list(range(24))),
        (40, 4, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36], [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]),
        (80, 7, [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77],
         [6, 13, 20, 27, 34, 41, 48, 55, 62, 69, 76])])
    def test_gated_blocks_stand_before_these_blocks(self, layers, every, paper, openflamingo):
        for placement, want in (("paper", paper), ("openflamingo", openflamingo)):
            language = replace(flamingo_config().language, layers=layers)
            with torch.device("meta"):
                model = Flamingo(replace(flamingo_config(), language=language, cross_attn_every=every,
                                         placement=placement))
            assert len(model.gated) == layers
            assert [i for i, block in enumerate(model.gated) if block is not None] == want

    def test_a_gated_block_runs_before_its_frozen_block(self):
        model, order = toy_flamingo(cross_attn_every=2), []
        for kind, blocks in (("frozen", model.lm.blocks), ("gated", model.gated)):
            for i, block in enumerate(blocks):
                if block is not None:
                    block.register_forward_pre_hook(
                        lambda m, x, name=f"{kind} {i}": order.append(name))
        model.logits(make_ids("I.."), visual=make_visual(1))
        assert order == ["gated 0", "frozen 0", "frozen 1", "gated 2", "frozen 2"]
