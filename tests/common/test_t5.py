"""T5 against the paper in loops: buckets of distances, both stacks, padding, caches."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.t5 import PRESETS, RelativeBias, T5, T5Config, language_config, make_language
from tests.helpers import (ToyCache, assert_close, assert_same, block_by_hand, gated_mlp, linear,
                           make_cache, randomize, refused, rms_norm)

V, S, T, PAD, EOS = 31, 13, 11, 4, 9


def bucket(distance, buckets, max_distance, bidirectional):
    """One number of the formula (Mesh TensorFlow's), in Python."""
    side, distance = 0, distance if bidirectional else min(distance, 0)
    if bidirectional:
        buckets //= 2
        side = buckets if distance > 0 else 0
    distance, exact = abs(distance), buckets // 2
    if distance < exact:
        return side + distance
    log = math.log(distance / exact) / math.log(max_distance / exact)
    return side + min(exact + int(log * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
class TestRelativeBias:
    @pytest.mark.parametrize("sizes", [{}, dict(buckets=12, max_distance=50)])
    def test_a_bucket_is_one_near_distance_or_log_spaced_far_ones(self, bidirectional, sizes):
        # Not 16, 32, 64: at an exact power the rounding of a logarithm decides.
        distances = [-9999, -200, -51, -31, -12, -6, -3, -2, -1, 0, 1, 2, 3, 6, 9, 13, 45, 100, 300]
        bias = RelativeBias(heads=3, bidirectional=bidirectional, **sizes)
        sizes = {"buckets": 32, "max_distance": 128} | sizes
        assert_close(f"buckets of {distances}", bias.bucket(torch.tensor([distances])),
                     [[bucket(d, bidirectional=bidirectional, **sizes) for d in distances]])

    @pytest.mark.parametrize("T, S", [(5, 7), (7, 7), (1, 11)])
    def test_the_queries_stand_at_the_last_of_the_positions(self, bidirectional, T, S):
        bias = RelativeBias(heads=3, buckets=12, max_distance=50, bidirectional=bidirectional)
        rows = torch.tensor([[bucket(s - t, 12, 50, bidirectional) for s in range(S)]
                             for t in range(S - T, S)])
        expected = torch.stack([bias.weight[:, head][rows] for head in range(3)])[None]
        assert_same("bias (1, H, T, S)", bias(T, S), expected, bias)

    def test_it_has_a_number_per_bucket_and_head_and_starts_small(self, bidirectional):
        weight = RelativeBias(heads=50, bidirectional=bidirectional).weight
        assert weight.shape == (32, 50)
        assert_close("deviation", weight.std(), 0.02, 2e-3)


def model(**changes):
    """A small model in float64 with every parameter random."""
    torch.manual_seed(0)
    return randomize(T5(T5Config(**{
        "vocab_size": V, "context_length": 17, "width": 14, "layers": 2, "heads": 3,
        "head_width": 5, "hidden": 23, "eps": 0.1, "buckets": 8, "max_distance": 7, "eos_id": EOS,
        "pad_id": PAD} | changes)).double())


def texts():
    """(encoder's ids (B, S) padded right, their mask, decoder's ids (B, T))."""
    ids, mask = torch.randint(V, (3, S)), torch.ones(3, S).bool()
    mask[1, 5:], mask[2, 1:] = False, False
    return ids, mask, torch.cat([torch.full((3, 1), PAD), torch.randint(V, (3, T - 1))], dim=1)


def stack(t5, x, context=None, act=partial(F.gelu, approximate="tanh")):
    """The encoder, or given a context the decoder: x (1, T, D) without padding -> (1, T, D)."""
    c, T, is_causal = t5.config, x.shape[1], context is not None
    weight = (t5.decoder_bias if is_causal else t5.encoder_bias).weight
    rows = [[bucket(s - t, c.buckets, c.max_distance, not is_causal) for s in range(T)]
            for t in range(T)]
    transformer = t5.decoder if is_causal else t5.encoder
    assert transformer.norm is not None and len(transformer.blocks) == c.layers, transformer
    for block in transformer.blocks:
        x = block_by_hand(block, x, context, norm=partial(rms_norm, eps=c.eps), heads=c.heads,
                          mlp=partial(gated_mlp, act=act), scale=1.0,
                          bias=weight[torch.tensor(rows)].permute(2, 0, 1)[None],
                          mask=torch.ones(T, T).tril().bool() if is_causal else None)
    return rms_norm(transformer.norm, x, c.eps)


def states_by_hand(t5, ids, **options):
    return stack(t5, t5.token_embed.weight[ids], **options)


def logits_by_hand(t5, prompt, ids, **options):
    """prompt (1, S) and ids (1, T) without padding -> (1, T, V)."""
    states = states_by_hand(t5, prompt, **options)
    return linear(t5.output, stack(t5, t5.token_embed.weight[ids], states, **options))


def rows_by_hand(t5, prompts, mask, ids):
    return torch.cat([logits_by_hand(t5, prompt[real][None], row[None])
                      for prompt, real, row in zip(prompts, mask, ids)])


class TestT5Config:
    @pytest.mark.parametrize("change, values", [
        ({"kind": "llama"}, "llama.*t5"), ({"act": "relu"}, "relu.*gelu_tanh, gelu"),
        ({"layers": 0}, "layers=0"), ({"buckets": 3}, "buckets=3"), ({"eps": 0.0}, "eps=0.0"),
        ({"max_distance": 16}, "max_distance=16.*17"), ({"pad_id": -1}, "pad_id=-1")])
    def test_what_cannot_be_is_refused(self, change, values):
        with refused(values):
            T5Config(**change)

    @pytest.mark.parametrize("name, width, heads, hidden, parameters", [
        ("flan-t5-xl", 2048, 32, 5120, 2_849_757_184),
        ("flan-t5-xxl", 4096, 64, 10240, 11_135_332_352)])
    def test_the_published_sizes(self, name, width, heads, hidden, parameters, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: self)    # takes time
        c = PRESETS[name]
        with torch.device("meta"):
            found = sum(p.numel() for p in T5(c).parameters())
        assert found == parameters, found
        assert (c.width, c.heads, c.hidden, c.eos_id, c.pad_id, c.buckets, c.max_distance, c.act,
                c.eps) == (width, heads, hidden, 1, 0, 32, 128, "gelu_tanh", 1e-6), c


class TestT5:
    def test_a_new_model_gives_all_tokens_about_the_same_probability(self):
        t5, ids = T5(T5Config()), torch.randint(1024, (2, 3, 29))
        assert_close("mean log p", t5(*ids).log_softmax(dim=-1).mean(), -math.log(1024), 0.01)

    def test_a_new_models_weights_have_the_papers_deviations(self):
        torch.manual_seed(0)
        t5 = T5(T5Config(layers=1, width=96, heads=5, head_width=32, hidden=200, buckets=64))
        stds = {"token_embed": 1, "output": 1 / 96, "q_proj": (96 * 32) ** -0.5,
                "out_proj": 160 ** -0.5, "down_proj": 200 ** -0.5}
        for name, p in t5.named_parameters():
            std = stds.get(name.split(".")[-2], 96 ** -0.5)
            if "norm" not in name:
                assert_close(f"deviation of {name} in {std}", p.std() / std, 1.0, 0.07)

    @pytest.mark.parametrize("act", ["gelu_tanh", "gelu"])
    def test_it_is_the_papers_model(self, act):
        t5, (prompts, _, ids) = model(act=act), texts()
        act = F.gelu if act == "gelu" else partial(F.gelu, approximate="tanh")
        states = torch.cat([states_by_hand(t5, row[None], act=act) for row in prompts])
        expected = torch.cat([logits_by_hand(t5, p[None], row[None], act=act)
                              for p, row in zip(prompts, ids)])
        assert_close("states (B, S, D)", t5.encode(prompts), states, 1e-6)
        assert_close("states of embeddings", t5.encode(t5.embed(prompts)), states, 1e-6)
        assert_close("logits (B, T, V)", t5(prompts, ids), expected, 1e-6)
        assert_close("logits of embeddings", t5(t5.embed(prompts), ids), expected, 1e-6)
        last = t5.logits(ids, context=states, last=True)
        assert_close("the newest logits (B, 1, V)", last, expected[:, -1:], 1e-6)

    def test_a_padded_prompt_is_what_it_is_alone(self):
        t5, (prompts, mask, ids) = model(), texts()
        expected = rows_by_hand(t5, prompts, mask, ids)
        for _ in range(2):
            assert_close("states", t5.encode(prompts, mask)[1, :5],
                         states_by_hand(t5, prompts[1:2, :5])[0], 1e-6)
            assert_close("logits", t5(prompts, ids, mask), expected, 1e-6)
            prompts[~mask] = PAD               # whatever stands in the padding

    def test_texts_of_one_row_are_what_they_are_alone(self):
        t5, (prompts, _, ids) = model(), texts()
        first, second = torch.arange(S) < 5, torch.arange(T) < 4
        states = t5.encode(prompts, (first[:, None] == first).expand(3, S, S))
        found = t5.logits(ids, (second[:, None] == second).expand(3, T, T), context=states,
                          context_mask=(second[:, None] == first).expand(3, T, S))
        for place, prompt in ((second, first), (~second, ~first)):
            expected = torch.cat([logits_by_hand(t5, p[prompt][None], row[place][None])
                                  for p, row in zip(prompts, ids)])
            assert_close("logits of a text", found[:, place], expected, 1e-6)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_of_the_decoder_changes_nothing(self, side):
        t5, (prompts, _, ids) = model(), texts()
        states, n = t5.encode(prompts), T - 4
        own = slice(4, T) if side == "left" else slice(0, n)
        mask = torch.zeros(3, T).bool()
        mask[0], mask[1:, own] = True, True
        ids[:, own] = ids[:, :n].clone()
        found = t5.logits(ids, mask, context=states)
        assert found.isfinite().all(), "logits of padding are not finite"
        expected = torch.cat([logits_by_hand(t5, p[None], row[None])
                              for p, row in zip(prompts[1:], ids[1:, own])])
        assert_close("logits of the real tokens", found[1:, own], expected, 1e-6)

    @pytest.mark.parametrize("chunks", [[1] * T, [10, 1], [3, 1, 5, 2]], ids=str)
    def test_in_chunks_it_is_what_it_is_in_one(self, chunks):
        t5, (prompts, mask, ids) = model(), texts()
        states, cache = t5.encode(prompts, mask), ToyCache()
        parts = [t5.logits(part, cache=cache, context=states, context_mask=mask)
                 for part in ids.split(chunks, dim=1)]
        assert cache.length == T, "the cache has another number of tokens"
        assert_close("logits", torch.cat(parts, 1), rows_by_hand(t5, prompts, mask, ids), 1e-6)

    def test_masks_of_another_shape_and_more_tokens_than_the_context_are_refused(self):
        t5, (prompts, mask, ids) = model(), texts()
        states, long = t5.encode(prompts), torch.zeros(2, 18).long()
        cache = make_cache()
        t5.logits(ids, context=states, cache=cache)
        t5.encode(long, torch.arange(18) > torch.tensor([[0], [5]]))       # padding does not count
        for values, call in (
                (f"{T}.*{S}", lambda: t5.encode(prompts, mask[:, :T])),
                (f"int64.*{S}", lambda: t5.encode(prompts, mask.long())),
                (f"{S}.*{T}", lambda: t5.logits(ids, mask, context=states)),
                ("18.*17", lambda: t5.encode(long)), ("18.*17", lambda: t5(prompts[:2], long)),
                ("18.*17", lambda: t5.logits(ids[:, :7], context=states, cache=cache))):
            with refused(values):
                call()

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
    def test_it_writes_what_it_would_write_without_a_cache_or_padding(self, options):
        t5, (prompts, mask, _) = model(eos_id=3), texts()
        t5.token_embed.weight.data *= 9  # so that texts differ, and the first ends early
        found = t5.generate(prompts, mask, max_new_tokens=7, **options)
        for new, prompt, real in zip(found, prompts, mask):
            alone = t5.generate(prompt[real][None], max_new_tokens=7, **options)[0]
            assert_close("new ids", new, F.pad(alone, (0, found.shape[1] - len(alone)), value=PAD))
            if not options:
                ids = [PAD]              # what the decoder reads first
                while len(ids) < 8 and 3 not in ids:
                    logits = logits_by_hand(t5, prompt[real][None], torch.tensor([ids]))
                    ids.append(int(logits[0, -1].argmax()))
                assert_close("the likeliest ids", alone, ids[1:])
        assert options or found[0, 2:].tolist() == [3] + [PAD] * 4, f"no early end: {found}"

    def test_generate_knows_its_end_and_its_context(self):
        t5, (prompts, *_) = model(), texts()
        t5.output.weight.data.zero_()          # then all are as likely, and id 0 comes first
        assert_close("new ids", t5.generate(prompts, max_new_tokens=3), [[0, 0, 0]] * 3)
        assert_close("ended", t5.generate(prompts, max_new_tokens=3, stop=0), [[0]] * 3)
        with refused("1.* 17.* 18.* 17"):
            t5.generate(prompts, max_new_tokens=17)


class TestLanguageConfig:
    def test_the_kind_decides(self):
        assert language_config({"kind": "t5", "width": 7}) == T5Config(width=7)
        for fields in ({"kind": "opt", "width": 8}, {"width": 8}):
            found = language_config(fields)
            assert (type(found).__name__, found.kind, found.width) == (
                "LanguageConfig", fields.get("kind", "llama"), 8), found
        with refused("language.*wings"):
            language_config({"kind": "t5", "wings": 2})


class TestMakeLanguage:
    @pytest.mark.parametrize("kind, name", [("t5", "T5"), ("gpt2", "LanguageModel")])
    def test_it_is_the_model_of_the_config(self, kind, name):
        config = language_config({"kind": kind, "width": 12, "layers": 1, "vocab_size": V})
        lm = make_language(config)
        assert type(lm).__name__ == name and lm.config == config, lm
