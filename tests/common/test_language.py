"""Language models against the papers' in loops: padding, caches, new tokens."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.language import (PRESETS, LanguageConfig, LanguageModel, NewTokens, cached_rope_table,
                             gpt2_size, llama_size, make_block, opt_size, rope_of)
from tests.helpers import (ToyCache, assert_close, block_by_hand, gated_mlp, layer_norm,
                           mlp_by_hand, randomize, refused, rms_norm, unchanged)

V, T = 31, 11
KINDS = ("gpt2", "opt", "llama")


def config(kind="llama", **changes):
    return replace(LanguageConfig(
        kind=kind, vocab_size=V, context_length=19, width=24, layers=2, heads=3, hidden=37,
        kv_heads=1 if kind == "llama" else 3, eps=0.1, rope_theta=50.0, rope_scale=1.7), **changes)


def model(kind="llama", **changes):
    """A small model in float64 with every parameter random."""
    torch.manual_seed(0)
    return randomize(LanguageModel(config(kind, **changes)).double(), std=0.4)


def random_ids(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


PARTS = {"gpt2": (layer_norm, mlp_by_hand, partial(F.gelu, approximate="tanh")),
         "opt": (layer_norm, mlp_by_hand, F.relu), "llama": (rms_norm, gated_mlp, F.silu)}


def reference_block(block, x, c, rope=True):
    """A causal block, x (B, T, D)."""
    T, K, (norm, mlp, act) = x.shape[1], c.width // c.heads, PARTS[c.kind]
    angles = torch.arange(T).double()[:, None] / c.rope_scale * \
        c.rope_theta ** (-torch.arange(0, K, 2).double() / K)
    return block_by_hand(
        block, x, norm=partial(norm, eps=c.eps), mlp=partial(mlp, act=act), heads=c.heads,
        kv_heads=c.kv_heads, mask=torch.ones(T, T).tril().bool(),
        angles=angles if rope and c.kind == "llama" else None)


def reference(lm, ids, table=None, head=None):
    """Logits (B, T, V) of ids (B, T); table, head: float (V, D), others than the model's."""
    c = lm.config
    table = lm.token_embed.weight if table is None else table
    head = head if head is not None else table if c.tie_embeddings else lm.output.weight
    x = table[ids]
    if c.kind != "llama":                # OPT's first position is row 2 of its table
        x = x + lm.pos_embed.weight[2 if c.kind == "opt" else 0:][:ids.shape[1]]
    for block in lm.blocks:
        x = reference_block(block, x, c)
    return PARTS[c.kind][0](lm.norm, x, c.eps) @ head.T


@pytest.fixture
def assert_published(monkeypatch):
    """Compares a config with its preset and with what the paper says."""
    def compare(c, preset, **expected):
        monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: self)    # takes time
        with torch.device("meta"):
            parameters = sum(p.numel() for p in LanguageModel(c).parameters())
        found = {"kind": c.kind, "parameters": parameters, "heads": c.heads, "kv_heads": c.kv_heads,
                 "context": c.context_length, "eps": c.eps, "ends": (c.eos_id, c.pad_id)}
        assert found == expected, f"{found}\nexpected:\n{expected}"
        assert PRESETS[preset] == c, f"{PRESETS[preset]}\n{c}"
    return compare


class TestLanguageConfig:
    @pytest.mark.parametrize("change, values", [
        ({"kind": "bert"}, "bert.*gpt2, opt, llama"), ({"layers": 0}, "layers=0"),
        ({"kind": "opt", "heads": 4, "kv_heads": 2}, "kv_heads=2.* 4 "),
        ({"width": 21, "heads": 3, "kv_heads": 3}, "21 / 3"), ({"rope_theta": 0.0}, "theta=0.0"),
        ({"rope_scale": 0.0}, "rope_scale=0.0"), ({"eps": 0.0}, "eps=0.0"),
        ({"pad_id": -1}, "pad_id=-1"), ({"eos_id": -1}, "eos_id=-1")])
    def test_what_cannot_be_is_refused(self, change, values):
        with refused(values):
            LanguageConfig(**change)

    def test_only_llama_groups_its_heads_and_only_llama_needs_even_ones(self):
        LanguageConfig(kind="llama", heads=4, kv_heads=2)
        LanguageConfig(kind="gpt2", width=21, heads=3, kv_heads=3)


class TestGpt2Size:
    @pytest.mark.parametrize("preset, size, parameters", [
        ("gpt2", (12, 768, 12), 124_439_808), ("gpt2-medium", (24, 1024, 16), 354_823_168),
        ("gpt2-large", (36, 1280, 20), 774_030_080), ("gpt2-xl", (48, 1600, 25), 1_557_611_200)])
    def test_it_is_the_published_model(self, preset, size, parameters, assert_published):
        assert_published(gpt2_size(*size), preset, kind="gpt2", parameters=parameters,
                         heads=size[2], kv_heads=size[2], context=1024, eps=1e-5,
                         ends=(50256, 50256))


class TestOptSize:
    @pytest.mark.parametrize("preset, size, parameters", [
        ("opt-125m", (12, 768, 12), 125_239_296), ("opt-1.3b", (24, 2048, 32), 1_315_758_080),
        ("opt-2.7b", (32, 2560, 32), 2_651_596_800), ("opt-6.7b", (32, 4096, 32), 6_658_473_984)])
    def test_it_is_the_published_model(self, preset, size, parameters, assert_published):
        assert_published(opt_size(*size), preset, kind="opt", parameters=parameters, heads=size[2],
                         kv_heads=size[2], context=2048, eps=1e-5, ends=(2, 1))


class TestLlamaSize:
    @pytest.mark.parametrize("preset, size, parameters", [
        ("llama-7b", (32, 4096, 32, 11008), 6_738_415_616),
        ("llama-13b", (40, 5120, 40, 13824), 13_015_864_320)])
    def test_it_is_the_published_model(self, preset, size, parameters, assert_published):
        c = llama_size(*size)
        assert_published(c, preset, kind="llama", parameters=parameters, heads=size[2],
                         kv_heads=size[2], context=2048, eps=1e-6, ends=(2, 0))
        vicuna = PRESETS[preset.replace("llama", "vicuna") + "-v1.5"]
        assert vicuna == replace(c, context_length=4096, eps=1e-5), vicuna


class TestMakeBlock:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_the_papers_block(self, kind):
        c = config(kind)
        block, x = randomize(make_block(c).double()), torch.randn(1, T, 24, dtype=torch.float64)
        assert_close("x (B, T, D)", block(x, mask=torch.ones(T, T).tril().bool()),
                     reference_block(block, x, c, rope=False))
        hidden = (block.mlp.up_proj if kind == "llama" else block.mlp.fc1).weight.shape[0]
        assert_close("hidden units and key features", [hidden, block.attn.k_proj.weight.shape[0]],
                     [37, 8 * c.kv_heads])


class TestNewTokens:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("ids", [(4, 17), (17, 4), (V, V + 1), (V + 1, 4, V)], ids=str)
    def test_row_i_is_the_token_of_the_ith_id_and_old_tokens_are_as_before(self, ids, tied):
        table, output = torch.randn(2, V, 5, dtype=torch.float64).requires_grad_()
        new = randomize(NewTokens(ids=ids, table=table, output=None if tied else output))
        head = new.rows if tied else new.output
        size = max(V, max(ids) + 1)
        text = torch.arange(size).view(1, -1)
        with unchanged(ids=text, table=table):
            found = new.embed(text, table)
        expected = [new.rows[ids.index(i)] if i in ids else table[i] for i in range(size)]
        assert_close("embeddings (B, T, D)", found, torch.stack(expected)[None])
        upstream = torch.randn(size, 5, dtype=torch.float64)
        gradient, = torch.autograd.grad((found[0] * upstream).sum(), new.rows)
        assert_close("gradient of the rows (n, D)", gradient, upstream[list(ids)])
        x, logits = torch.randn(1, 3, 5).double(), torch.randn(1, 3, V)     # of two dtypes
        expected = [x @ head[ids.index(i)] if i in ids else logits[..., i] for i in range(size)]
        expected = torch.stack([column.float() for column in expected], dim=-1)
        assert_close("logits (B, T, V)", new.logits(x, logits), expected)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_row_begins_like_any_embedding_whatever_the_table_has_become(self, tied):
        table = torch.full((V, 400), 9.0, dtype=torch.float64)
        new = NewTokens(ids=(4, V), table=table, output=None if tied else table)
        rows = torch.cat(list(new.parameters()))
        assert rows.shape == (2 if tied else 4, 400) and rows.dtype == torch.float64, rows.shape
        assert len(rows.unique()) == rows.numel(), "rows repeat each other"
        assert_close("mean of each row", rows.mean(dim=1), torch.zeros(len(rows)), 0.006)
        assert_close("std of each row", rows.std(dim=1), torch.full((len(rows),), 0.02), 0.003)

    def test_its_ids_are_where_the_table_is(self, monkeypatch):
        monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.zeros(1))   # slow on "meta"
        new = NewTokens(ids=(4,), table=torch.zeros(V, 5, device="meta"))
        assert new.ids.is_meta, f"ids are on {new.ids.device}"

    def test_an_id_beyond_the_new_ones_is_no_token(self):
        table = torch.zeros(V, 5)
        with pytest.raises(IndexError):
            NewTokens(ids=(V,), table=table).embed(torch.tensor([[V + 1]]), table)

    @pytest.mark.parametrize("ids", [(4, 4), (V + 1,), (3, V + 1), (V, V + 2)], ids=str)
    def test_ids_that_repeat_or_leave_a_gap_are_refused(self, ids):
        with refused(f"{ids[0]}.*{V}"):
            NewTokens(ids=ids, table=torch.zeros(V, 5))


def assert_angles(rope, positions, head_width, theta):
    """rope: cos | cos and -sin | sin of position * theta ** (-2i / K), each (T, K)."""
    steps = torch.arange(0, head_width, 2).double() / head_width
    angles = positions.double()[:, None] * theta ** -steps
    sin, rope = angles.sin(), torch.stack(rope)
    assert rope.dtype == torch.float32, f"cos and sin are {rope.dtype}"
    expected = torch.stack([angles.cos().repeat(1, 2), torch.cat([-sin, sin], dim=1)])
    assert_close("cos and sin (2, T, K)", rope, expected, 1e-3)


class TestRopeOf:
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_angles_are_of_positions_divided_by_the_scale(self, scale):
        assert_angles(rope_of(7, 6, 50.0, scale, "cpu"), torch.arange(7) / scale, 6, 50.0)


class TestCachedRopeTable:
    def test_it_is_computed_once(self):
        arguments = 7, 6, 51.0, 1.7, torch.device("cpu")
        first = cached_rope_table(*arguments)
        assert first is cached_rope_table(*arguments), "it has been computed again"
        assert_angles(first, torch.arange(7) / 1.7, 6, 51.0)

    def test_a_table_made_in_inference_mode_can_be_trained_with(self):
        with torch.inference_mode():
            cos, _ = cached_rope_table(7, 6, 52.0, 1.0, torch.device("cpu"))
        (cos * torch.ones(7, 6, requires_grad=True)).sum().backward()


class TestLanguageModel:
    def test_a_new_model_gives_all_tokens_about_the_same_probability(self):
        log_p = LanguageModel(LanguageConfig())(torch.randint(1024, (3, 29))).log_softmax(dim=-1)
        assert_close("mean log p", log_p.mean(), -math.log(1024), 0.01)

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_the_papers_model(self, kind, tied):
        lm, ids = model(kind, tie_embeddings=tied), random_ids(2, T)
        expected = reference(lm, ids)
        assert_close("logits (B, T, V)", lm(ids), expected, 1e-5)
        assert_close("the newest logits (B, 1, V)", lm(ids, last=True), expected[:, -1:], 1e-5)
        assert_close("logits of embeddings (B, T, V)", lm(lm.embed(ids)), expected, 1e-5)
        x, inputs = lm.block_inputs(lm.embed(ids))
        for block in lm.blocks:
            x = block(x, **inputs)
        assert_close("logits of the parts in a loop (B, T, V)", lm.head(x), expected, 1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_padded_row_is_what_it_is_alone(self, kind, side):
        lm, texts = model(kind), [random_ids(1, n) for n in (T, 4, 1)]
        ids, mask = torch.full((4, T), 9), torch.zeros(4, T, dtype=torch.bool)    # one row is empty
        for row, text in enumerate(texts):
            n = text.shape[1]
            own = slice(T - n, T) if side == "left" else slice(0, n)
            ids[row, own], mask[row, own] = text[0], True
        expected = torch.cat([reference(lm, text)[0] for text in texts])
        for _ in range(2):
            found = lm(ids, mask)
            assert found.isfinite().all(), "logits of padding are not finite"
            assert_close("logits of all real tokens", found[mask], expected, 1e-5)
            ids[~mask] = 10                     # whatever stands in the padding

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_chunks_it_is_what_it_is_in_one(self, kind, padded):
        lm, ids, mask = model(kind), random_ids(3, T), torch.ones(3, T).bool()
        if padded:
            mask[1, :2], mask[2, :5] = False, False
        expected = torch.cat([reference(lm, text[real][None])[0] for text, real in zip(ids, mask)])
        for chunks in [1] * T, [10, 1], [3, 1, 5, 2]:
            cache, parts, past = ToyCache(), [], 0
            for n in chunks:
                real = mask[:, :past + n] if padded else None
                parts.append(lm(ids[:, past:past + n], real, cache))
                past += n
            assert_close(f"logits of chunks of {chunks}", torch.cat(parts, 1)[mask], expected, 1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_more_tokens_than_the_context_are_refused_and_padding_does_not_count(self, kind):
        lm, cache, mask = model(kind), ToyCache(), torch.ones(2, 23).bool()
        mask[:, :4] = False
        lm(random_ids(2, 23), mask)
        lm(random_ids(1, 19), cache=cache)
        mask[1, 3] = True
        for arguments in ({"x": random_ids(1, 20)}, {"x": random_ids(2, 23), "mask": mask},
                          {"x": random_ids(1, 1), "cache": cache}):
            with refused("20.* 19"):
                lm(**arguments)

    @pytest.mark.parametrize("mask", [torch.ones(2, T, dtype=torch.int64), torch.ones(2, 3) > 0])
    def test_a_mask_of_numbers_or_of_another_length_is_refused(self, mask):
        with refused(f"{mask.shape[1]}.* 0 .*{T}"):
            model()(random_ids(2, T), mask)

    @pytest.mark.parametrize("masked", [True, False])
    def test_rotary_angles_are_exact_far_out_in_half_precision_and_in_any_context(self, masked):
        lm, cache = LanguageModel(config(context_length=10 ** 12)).bfloat16(), ToyCache()
        cache.length = 4700
        mask = torch.ones(1, 4703).bool() if masked else None
        _, inputs = lm.block_inputs(torch.zeros(1, 3, 24).bfloat16(), mask, cache)
        rope = [x.view(3, 8) for x in inputs["rope"]]
        assert_angles(rope, torch.arange(4700, 4703) / 1.7, 8, 50.0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_adds_to_the_residual_begins_smaller_in_deeper_models(self, kind):
        torch.manual_seed(0)
        lm = LanguageModel(config(kind, layers=8, width=48, hidden=96))
        for name, p in lm.named_parameters():
            if name.endswith("bias"):
                assert_close(name, p, torch.zeros_like(p))
            elif "norm" not in name:
                last = name.split(".")[-2] in ("out_proj", "fc2", "down_proj")
                assert_close(f"std of {name}", p.std(), 0.005 if last else 0.02, 0.0015)

    @pytest.mark.parametrize("tied", [True, False])
    def test_new_tokens_are_laid_over_tables_that_stay_frozen(self, tied):
        lm, ids = model(tie_embeddings=tied), random_ids(3, T)
        ids[:, 5], ids[:, 7] = 4, V
        lm.add_tokens((V, 4))
        randomize(lm.double())
        tables = [torch.cat([old.detach(), torch.zeros(1, 24)]) for old in (
            lm.token_embed.weight, lm.token_embed.weight if tied else lm.output.weight)]
        for table, rows in zip(tables, (lm.new.rows, lm.new.rows if tied else lm.new.output)):
            table[[V, 4]] = rows.detach()
        assert_close("logits (B, T, V)", lm(ids), reference(lm, ids, *tables), 1e-5)
        lm.requires_grad_(False).new.requires_grad_()
        lm(ids).square().sum().backward()
        learned = {name for name, p in lm.named_parameters() if p.grad is not None and p.grad.any()}
        assert learned == ({"new.rows"} if tied else {"new.rows", "new.output"}), learned

    def test_generate_knows_its_context_end_and_padding(self):
        # The blocks add nothing, and the head moves on by one: token a is followed by a + 1.
        lm = LanguageModel(config(width=36, tie_embeddings=False, eos_id=9, pad_id=1)).double()
        with torch.no_grad():
            for parameter in lm.blocks.parameters():
                parameter.zero_()
            lm.token_embed.weight.copy_(torch.eye(V, 36))
            lm.output.weight.copy_(torch.eye(V, 36).roll(1, dims=0))
        ids, mask = torch.tensor([[3, 1], [4, 7]]), torch.tensor([[True, False], [True, True]])
        for options, expected in (({}, [[4, 5, 6, 7, 8, 9], [8, 9, 1, 1, 1, 1]]),
                                  ({"stop": 8, "pad_id": 2}, [[4, 5, 6, 7, 8], [8, 2, 2, 2, 2]])):
            new = lm.generate(ids, mask, max_new_tokens=17, **options)
            assert_close("new ids (B, N)", new, expected)
        with refused("18.* 20.* 19"):
            lm.generate(ids, max_new_tokens=18)
