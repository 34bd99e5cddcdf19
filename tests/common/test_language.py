"""Language models: sizes, padding, caches, new tokens in a frozen model."""
import copy
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import language, losses
from common.cache import KVCache
from common.data.tokenizer import Tokenizer
from common.language import PRESETS, LanguageConfig, LanguageModel, NewTokens
from common.training import checkpoint
from common.training.optimizer import Recipe, freeze, make_optimizer
from common.transformer import RMSNorm

V, T, PAST = 31, 11, 7


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


SMALL = LanguageConfig(vocab_size=V, context_length=19, width=24, layers=2, heads=3, kv_heads=3,
                       hidden=37)
KINDS = {
    "gpt2": replace(SMALL, kind="gpt2"),
    "opt": replace(SMALL, kind="opt"),
    "llama": replace(SMALL, kv_heads=1, tie_embeddings=False),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def model(kind="llama", **changes):
    """A small model in float64 with every parameter random."""
    torch.manual_seed(0)
    lm = LanguageModel(replace(KINDS[kind], **changes)).double().eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.4)
    return lm


def random_ids(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def same(a, b):
    # The rotary angles are float32, so that a float64 model agrees to about 1e-7.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class TestSizes:
    @pytest.mark.parametrize("preset, count", [
        ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200), ("opt-125m", 125_239_296), ("opt-1.3b", 1_315_758_080),
        ("opt-2.7b", 2_651_596_800), ("opt-6.7b", 6_658_473_984), ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320), ("vicuna-7b-v1.5", 6_738_415_616)])
    def test_a_published_size_has_exactly_its_parameters(self, preset, count):
        with torch.device("meta"):
            lm = LanguageModel(PRESETS[preset])
        assert sum(p.numel() for p in lm.parameters()) == count

    def test_a_tied_head_is_the_table_and_an_untied_one_is_not(self):
        tied, untied = model(tie_embeddings=True), model(tie_embeddings=False)
        assert sum(p.numel() for p in untied.parameters()) == V * 24 + sum(
            p.numel() for p in tied.parameters())
        tied(random_ids(1, 5)).square().sum().backward()
        used = set(random_ids(1, 5)[0].tolist())
        # The head's gradient reaches rows that no token of the text uses.
        assert all(tied.token_embed.weight.grad[i].abs().sum() > 0 for i in range(V))
        untied(random_ids(1, 5)).square().sum().backward()
        rows = untied.token_embed.weight.grad.abs().sum(dim=1) > 0
        assert set(rows.nonzero()[:, 0].tolist()) == used

    @pytest.mark.parametrize("change, message", [
        ({"kind": "bert"}, "kind=bert is not one of gpt2, opt, llama"),
        ({"layers": 0}, "layers=0: must be at least 1"),
        ({"kind": "opt", "heads": 4, "kv_heads": 2}, "kv_heads=2: opt has as many as its 4 heads"),
        ({"width": 21, "heads": 3, "kv_heads": 3}, "is odd"),
        ({"rope_scale": 0.0}, "rope_scale=0.0: must be at least 1e-09"),
        ({"eps": float("nan")}, "eps=nan: must be at least")])
    def test_an_impossible_config_is_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            LanguageConfig(**change)

    def test_it_begins_with_every_token_equally_likely(self, kind):
        torch.manual_seed(0)
        lm = LanguageModel(replace(KINDS[kind], vocab_size=211))
        ids = torch.randint(3, 211, (13, 17))
        loss = losses.next_token_loss(lm(ids), ids)
        assert loss.item() == pytest.approx(math.log(211), rel=0.02)

    def test_what_adds_to_the_residual_begins_smaller_in_deeper_models(self, kind):
        torch.manual_seed(0)
        lm = LanguageModel(replace(KINDS[kind], layers=8))
        for block in lm.blocks:
            last = block.mlp.fc2 if hasattr(block.mlp, "fc2") else block.mlp.down_proj
            for linear, std in ((block.attn.out_proj, 0.005), (last, 0.005),
                                (block.attn.q_proj, 0.02)):
                assert linear.weight.std().item() == pytest.approx(std, rel=0.2)
        assert lm.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.2)


class TestForward:
    def test_no_token_sees_what_comes_after_it(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        before = lm(ids)
        changed = ids.clone()
        changed[:, 6] = (changed[:, 6] + 1) % V
        after = lm(changed)
        assert torch.equal(before[:, :6], after[:, :6]) and before.isfinite().all()
        assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()       # and it sees itself

    def test_embeddings_go_in_as_ids_do(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        assert torch.equal(lm(ids), lm(lm.embed(ids)))

    def test_its_parts_in_a_loop_are_its_forward(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        x, inputs = lm.block_inputs(lm.embed(ids))
        for block in lm.blocks:
            x = block(x, **inputs)
        assert torch.equal(lm.head(x), lm(ids))

    def test_last_gives_the_newest_logits_alone(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        same(lm(ids, last=True), lm(ids)[:, -1:])

    def test_a_mask_of_ones_is_no_mask(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        same(lm(ids, torch.ones(2, T, dtype=torch.bool)), lm(ids))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_padded_row_is_what_it_is_alone(self, kind, side):
        lm, lengths = model(kind), (T, 4, 1)
        texts = [random_ids(1, n) for n in lengths]
        padding = [(T - n, 0) if side == "left" else (0, T - n) for n in lengths]
        ids = torch.cat([F.pad(text, pad, value=9) for text, pad in zip(texts, padding)])
        mask = torch.cat([F.pad(torch.ones_like(text), pad) for text, pad in zip(texts, padding)])
        logits = lm(ids, mask.bool())
        assert logits.isfinite().all()
        for row, real, text in zip(logits, mask.bool(), texts):
            same(row[real], lm(text)[0])
        ids[~mask.bool()] = 10                  # whatever stands in the padding
        same(lm(ids, mask.bool())[mask.bool()], logits[mask.bool()])

    def test_positions_differ(self, kind):
        # A model without positions gives a text of one token in a row the same logits throughout.
        lm, ids = model(kind), torch.full((1, T), 5)
        logits = lm(ids)[0] if kind != "llama" else lm(
            torch.tensor([[4, 6, 5, 5, 5]]))[0, 2:] - lm(torch.tensor([[6, 4, 5, 5, 5]]))[0, 2:]
        assert (logits[1:] - logits[:-1]).abs().amax(dim=-1).min() > 1e-3

    def test_opts_first_token_stands_in_row_two_of_its_table(self):
        lm, ids = model("opt"), random_ids(1, T)
        before = lm(ids)
        with torch.no_grad():
            lm.pos_embed.weight[:2] = torch.nan
            assert torch.equal(lm(ids), before)
            lm.pos_embed.weight[2] = torch.nan
        assert lm(ids)[0, 0].isnan().all()

    def test_stretched_rotary_positions_lie_closer(self):
        # Every second token of a text at half the distances is the text at whole distances.
        lm, slow = model(layers=1), model(layers=1, rope_scale=2.0)
        ids = random_ids(2, 5)
        doubled = ids.repeat_interleave(2, dim=1)
        mask = torch.tensor([True, False] * 5).expand(2, 10)
        x, inputs = slow.block_inputs(slow.embed(doubled))
        inputs["mask"] = inputs["mask"] & mask[:, None, None]
        same(slow.head(slow.blocks[0](x, **inputs))[:, ::2], lm(ids))
        assert (slow(ids) - lm(ids)).abs().max() > 1e-3

    def test_a_model_can_be_trained_after_it_has_written(self):
        lm, ids = model(rope_theta=1234.5), random_ids(2, 5)
        language.cached_rope_table.cache_clear()
        lm.generate(ids, max_new_tokens=2)
        lm(ids).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())

    def test_a_larger_base_turns_slower(self):
        lm, slow, ids = model(), model(rope_theta=5e5), random_ids(1, T)
        assert (slow(ids) - lm(ids)).abs().max() > 1e-3

    def test_the_gate_and_the_norm_are_where_llama_has_them(self):
        # One token, one layer: attention is its own value, so all of it fits in six lines.
        lm = model(layers=1)
        block, x = lm.blocks[0], lm.embed(torch.tensor([[5]]))
        h = rms_norm(x, block.attn_norm.weight, 1e-5)
        value = block.attn.v_proj(h).repeat(1, 1, 3)
        x = x + block.attn.out_proj(value)
        h = rms_norm(x, block.mlp_norm.weight, 1e-5)
        gate, up = block.mlp.gate_proj(h), block.mlp.up_proj(h)
        x = x + block.mlp.down_proj(gate * gate.sigmoid() * up)
        same(lm(torch.tensor([[5]])), lm.output(rms_norm(x, lm.norm.weight, 1e-5)))

    @pytest.mark.parametrize("kind, act", [("gpt2", "tanh"), ("opt", None)])
    def test_gpt2_uses_the_tanh_gelu_and_opt_relu(self, kind, act):
        x = torch.linspace(-3, 3, 13)
        want = F.gelu(x, approximate="tanh") if act else F.relu(x)
        assert torch.equal(model(kind).blocks[0].mlp.act(x), want)

    def test_too_many_tokens_are_refused_and_padding_does_not_count(self, kind):
        lm = model(kind)
        with pytest.raises(ValueError, match="20 tokens, but the context is 19"):
            lm(random_ids(1, 20))
        mask = torch.ones(2, 23, dtype=torch.bool)
        mask[:, :4] = False
        ids = random_ids(2, 23)
        same(lm(ids, mask)[:, 4:], lm(ids[:, 4:]))
        mask[1, 3] = True
        with pytest.raises(ValueError, match="20 tokens, but the context is 19"):
            lm(ids, mask)

    def test_too_many_tokens_are_refused_when_a_cache_holds_most_of_them(self, kind):
        lm, cache = model(kind), KVCache()
        lm(random_ids(1, 17), cache=cache)
        lm(random_ids(1, 2), cache=cache)
        with pytest.raises(ValueError, match="20 tokens, but the context is 19"):
            lm(random_ids(1, 1), cache=cache)

    def test_rotary_angles_are_float32_and_exact_far_out_in_half_precision_too(self):
        config = replace(KINDS["llama"], context_length=5000)
        lm, cache = LanguageModel(config).bfloat16(), KVCache()
        cache.length = 4700
        for mask in (None, torch.ones(1, 4703, dtype=torch.bool)):
            x = torch.zeros(1, 3, 24, dtype=torch.bfloat16)
            cos, sin = lm.block_inputs(x, mask, cache)[1]["rope"]
            angles = torch.arange(4700, 4703).double()[:, None] * 10000.0 ** (
                -torch.arange(0, 8, 2).double() / 8)
            assert cos.dtype == sin.dtype == torch.float32
            torch.testing.assert_close(cos.double().view(3, 8)[:, :4], angles.cos(), atol=1e-3,
                                       rtol=0)
            torch.testing.assert_close(sin.double().view(3, 8)[:, 4:], angles.sin(), atol=1e-3,
                                       rtol=0)

    def test_a_context_larger_than_any_memory_costs_nothing_until_it_is_used(self):
        lm = LanguageModel(replace(KINDS["llama"], context_length=10 ** 12))
        assert lm(random_ids(2, T)).isfinite().all()

    def test_in_half_precision_a_norm_rounds_before_its_weight(self):
        # LLaMA's order, which torch's own norm turns round.
        norm = RMSNorm(64).bfloat16()
        nn.init.normal_(norm.weight)
        x = torch.randn(50, 64).bfloat16()
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + 1e-6)
        assert torch.equal(norm(x), (x.float() * scale).bfloat16() * norm.weight)

    def test_a_mask_of_numbers_or_of_another_length_is_refused(self, kind):
        for mask in (torch.ones(2, T, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)):
            words = (f"a mask of {mask.dtype} {tuple(mask.shape)} for 0 tokens in the cache and 11 "
                     "new ones: it must be bool (B, 11)")
            with pytest.raises(ValueError, match=re.escape(words)):
                model(kind)(random_ids(2, T), mask)


class TestCache:
    @pytest.mark.parametrize("gradients", ["on", "off", "by turns"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("chunks", [[1] * T, [10, 1], [7, 4], [3, 1, 5, 2], [2, 9]], ids=str)
    def test_in_chunks_it_is_what_it_is_in_one(self, kind, padded, chunks, gradients):
        lm, ids = model(kind), random_ids(3, T)
        mask = torch.ones(3, T, dtype=torch.bool)
        if padded:
            mask[1, :2], mask[2, :5] = False, False
        whole, cache, parts, past = lm(ids, mask if padded else None), KVCache(), [], 0
        for number, n in enumerate(chunks):
            so_far = mask[:, :past + n] if padded else None
            on = gradients == "on" or gradients == "by turns" and number % 4 > 1
            with torch.set_grad_enabled(on):
                parts.append(lm(ids[:, past:past + n], so_far, cache))
            past += n
        same(torch.cat(parts, dim=1)[mask], whole[mask])

    @pytest.mark.parametrize("gradients", [True, False])
    def test_rows_may_be_chosen_repeated_and_leave_the_old_cache_alone(self, kind, gradients):
        lm, ids = model(kind), random_ids(3, T)
        cache, rows = KVCache(), torch.tensor([2, 0, 0, 1])
        with torch.set_grad_enabled(gradients):
            lm(ids[:, :3], cache=cache)
            lm(ids[:, 3:PAST], cache=cache)
            cache.state["seen"] = torch.tensor([5, 6, 7])
            chosen = cache.select(rows)
            for k in range(PAST, T):
                same(lm(ids[rows, k:k + 1], cache=chosen), lm(ids[rows])[:, k:k + 1])
            assert chosen.state["seen"].tolist() == [7, 5, 5, 6]
            same(lm(ids[:, PAST:], cache=cache), lm(ids)[:, PAST:])

    @pytest.mark.parametrize("gradients", [True, False])
    def test_beams_of_one_prompt_exchange_what_came_after_it(self, kind, gradients):
        lm, cache, text = model(kind), KVCache(), random_ids(2, T).repeat_interleave(3, dim=0)
        text[:, 5:] = random_ids(6, T)[:, 5:]
        with torch.set_grad_enabled(gradients):
            lm(text[:, :5], cache=cache)
            for k in range(5, 9):
                lm(text[:, k:k + 1], cache=cache)
            cache.state["seen"] = torch.arange(6)
            rows = torch.tensor([2, 0, 0, 4, 3, 5])
            cache.reorder(rows, since=5)
            same(lm(text[rows, 9:], cache=cache), lm(text[rows])[:, 9:])
        assert torch.equal(cache.state["seen"], rows)

    def test_gradients_reach_what_was_cached(self, kind):
        lm, ids = model(kind), random_ids(2, T)
        cache, grads = KVCache(), []
        for logits in (lm(ids)[:, -1], [lm(ids[:, k:k + 1], cache=cache) for k in range(T)][-1]):
            lm.zero_grad()
            logits.sum().backward()
            grads.append([p.grad.clone() for p in lm.parameters()])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class TestNewTokens:
    def added(self, kind, ids, **changes):
        lm = model(kind, **changes)
        old = copy.deepcopy(lm)
        lm.add_tokens(ids)
        return old, lm.double()

    @pytest.mark.parametrize("ids", [(4, 17), (V, V + 1), (4, V)])
    def test_old_tokens_are_as_before_and_new_ones_have_their_rows(self, kind, ids):
        old, lm = self.added(kind, ids)
        text = random_ids(2, T)
        text[(text == 4) | (text == 17)] = 3
        size, kept = max(V, max(ids) + 1), [i for i in range(V) if i not in ids]
        logits = lm(text)
        assert logits.shape == (2, T, size)
        assert torch.equal(logits[..., kept], old(text)[..., kept])
        assert torch.equal(lm.embed(torch.tensor([ids])), lm.new.rows[None])
        rows = lm.new.rows if lm.output is None else lm.new.output
        x = torch.randn(1, 3, 24, dtype=torch.float64)
        same(lm.head(x)[..., list(ids)], lm.norm(x) @ rows.T)

    @pytest.mark.parametrize("tied", [True, False])
    def test_only_the_new_rows_learn_and_the_frozen_table_stays_to_the_bit(self, tied):
        old, lm = self.added("llama", (4, V), tie_embeddings=tied)
        freeze(lm, ("new.*",))
        optimizer = make_optimizer(lm, Recipe(steps=3, batch_size=3, lr=0.1, weight_decay=0.5))
        start = [p.clone() for p in lm.new.parameters()]
        text = random_ids(3, T)
        text[:, 5], text[:, 7] = 4, V
        loss = [losses.next_token_loss(lm(text), text)]
        for _ in range(3):
            loss[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.append(losses.next_token_loss(lm(text), text))
        assert loss[-1] < loss[0]
        assert len(start) == (1 if tied else 2)
        assert all((a != b).all() for a, b in zip(start, lm.new.parameters()))
        frozen = {n: p for n, p in lm.named_parameters() if not n.startswith("new.")}
        assert all(torch.equal(p, frozen[n]) for n, p in old.named_parameters())
        assert all(p.grad is None for p in frozen.values())
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(start)

    def test_a_new_token_is_not_favoured_at_the_start(self, kind):
        _, lm = self.added(kind, (V, V + 1))
        x = torch.randn(5, 7, 24, dtype=torch.float64)
        logits = lm.head(x)
        assert (logits[..., V:].amax(dim=-1) < logits[..., :V].amax(dim=-1)).float().mean() > 0.9
        assert (lm.new.rows[0] != lm.new.rows[1]).any()

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_new_row_begins_like_any_embedding_whatever_the_table_has_become(self, tied):
        table = torch.full((V, 400), 9.0)                  # of tokens that no text has
        new = NewTokens(ids=(4, V), table=table, output=None if tied else table)
        for rows in (new.rows,) if tied else (new.rows, new.output):
            assert rows.shape == (2, 400) and abs(rows.mean()) < 0.003
            assert rows.std().item() == pytest.approx(0.02, rel=0.1)
        assert tied or not torch.equal(new.rows, new.output)

    def test_its_ids_are_where_the_table_is(self):
        assert NewTokens(ids=(4,), table=torch.zeros(V, 5, device="meta")).ids.is_meta

    def test_an_id_beyond_the_new_ones_is_no_token(self, kind):
        _, lm = self.added(kind, (V,))
        with pytest.raises(IndexError):
            lm.embed(torch.tensor([[V + 1]]))

    @pytest.mark.parametrize("ids", [(4, 4), (V + 1,), (3, V + 1), (V, V + 2)])
    def test_impossible_ids_are_refused(self, ids):
        with pytest.raises(ValueError, match="new tokens"):
            NewTokens(ids=ids, table=torch.zeros(V, 5))


def test_from_pretrained_reads_a_run_of_the_lm_stage(tmp_path):
    tokenizer = Tokenizer.train(["a red circle"], 400)
    lm = model(vocab_size=len(tokenizer)).float()
    checkpoint.write_json(tmp_path / "config.json", {"model": "common.training.lm",
                                                     "config": asdict(lm.config)})
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    checkpoint.save(tmp_path, {"model": {f"lm.{k}": v for k, v in lm.state_dict().items()}})
    found, known = language.from_pretrained(tmp_path)
    ids = tokenizer.batch(["a red circle"], 19)
    assert torch.equal(found(ids), lm(ids)) and not found.training
    assert known.model == tokenizer.model
