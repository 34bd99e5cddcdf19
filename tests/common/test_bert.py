"""BERT as BLIP uses it against its loops: padding, cross-attention, causal order, the cache."""
import pytest
import torch

from common.bert import Bert, LMHead, starts_with
from tests.helpers import (ToyCache, assert_close, assert_same, loop_bert, loop_head, randomize,
                           refused, unchanged)

V, D, C, S, CONTEXT = 29, 10, 13, 7, 11


def bert(context_width=C, has_head=False):
    """Two layers of two heads in float64 with every parameter random."""
    return randomize(Bert(vocab_size=V, context_length=CONTEXT, width=D, layers=2, heads=2,
                          context_width=context_width, has_head=has_head).double(), 0.4)


def inputs(T=6):
    """Three texts, padded right, padded left and whole; a context with a padded row."""
    mask = torch.ones(3, T).bool()
    mask[0, 4:], mask[1, :2] = False, False
    context_mask = torch.rand(3, S) < 0.7
    context_mask[:, 0] = True
    return {"ids": torch.randint(V, (3, T)), "context": torch.randn(3, S, C).double(),
            "mask": mask, "context_mask": context_mask}


class TestStartsWith:
    def test_the_first_id_alone_is_another(self):
        ids = torch.randint(V, (3, 5))
        with unchanged(ids=ids):
            assert_close("ids (B, T)", starts_with(ids, 17), [[17, *row[1:]] for row in ids.tolist()])


class TestLMHead:
    def test_it_is_a_layer_gelu_and_norm_and_then_the_table_and_a_bias(self):
        head, x = LMHead(vocab_size=V, width=D).double(), torch.randn(2, 3, D).double()
        assert_close("the new bias (V,)", head.bias, torch.zeros(V))
        table, head = torch.randn(V, D).double().requires_grad_(), randomize(head)
        assert_same("logits (B, T, V)", head(x, table), loop_head(head, x, table), head,
                    table=table)


class TestBert:
    def test_its_blocks_have_their_norms_last_and_there_is_one_after_the_embeddings(self):
        model, ids = bert(None), torch.randint(V, (2, CONTEXT))
        with unchanged(ids=ids):
            assert_same("states (B, T, D)", model(ids), loop_bert(model, ids), model)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_a_padded_text_and_context_are_what_they_are_alone(self, is_causal):
        model, given = bert(), inputs()
        mask = given["mask"]
        for _ in range(2):
            got = model(**given, is_causal=is_causal)
            assert_same("states of real tokens (N, D)", got[mask],
                        loop_bert(model, **given, is_causal=is_causal)[mask], model)
            given["ids"][~mask] = 3      # whatever stands in the padding
            given["context"][~given["context_mask"]] = 9.0

    def test_without_a_context_it_leaves_cross_attention_out(self):
        model, ids = bert(), torch.randint(V, (2, 5))
        assert_close("states (B, T, D)", model(ids), loop_bert(model, ids))
        plain = bert(None)
        assert all(block.cross is None for block in plain.blocks), "cross-attention"
        assert_close("states (B, T, D)", plain(ids, torch.randn(2, S, C).double()),
                     loop_bert(plain, ids))

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("chunks", [[6], [1] * 6, [4, 1, 1], [1, 5], [2, 3, 1]], ids=str)
    def test_in_chunks_it_is_what_it_is_in_one(self, chunks, padded):
        model, given, cache, past, parts = bert(has_head=True), inputs(), ToyCache(), 0, []
        given["mask"][0] = torch.tensor([False] * 3 + [True] * 3)      # both padded left
        if not padded:
            given["mask"][:], given["context_mask"][:] = True, True
        mask, whole = given["mask"], loop_bert(model, **given, is_causal=True)
        for n in chunks:
            now = given | {"ids": given["ids"][:, past:past + n], "mask": mask[:, :past + n]}
            if not padded:
                now["mask"] = now["context_mask"] = None
            parts.append(model.logits(**now, cache=cache))
            past += n
        expected = loop_head(model.head, whole, model.token_embed.weight)
        assert_close("logits (N, V)", torch.cat(parts, dim=1)[mask], expected[mask])

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_first_state_is_that_of_forward(self, padded):
        model, given = bert(), inputs()
        given["mask"][:, 0] = True
        if not padded:
            given["mask"] = given["context_mask"] = None
        given["context"].requires_grad_()
        assert_same("first state (B, D)", model.first(**given), loop_bert(model, **given)[:, 0],
                    model, context=given["context"])
        ids = given["ids"]
        assert_close("first state of a text (B, D)", model.first(ids, mask=given["mask"]),
                     loop_bert(model, ids, mask=given["mask"])[:, 0])

    def test_its_logits_are_of_the_causal_states_with_the_table_of_the_embeddings(self):
        model, given = bert(has_head=True), inputs()
        expected = loop_head(model.head, loop_bert(model, **given, is_causal=True),
                             model.token_embed.weight)
        mask = given["mask"]
        assert_same("logits (N, V)", model.logits(**given)[mask], expected[mask], model)
        given["ids"][0, 4:], mask[0, 4:] = given["ids"][0, :2], True
        expected = loop_head(model.head, loop_bert(model, **given, is_causal=True)[:, -1:],
                             model.token_embed.weight)
        assert_close("the newest logits (B, 1, V)", model.logits(**given, last=True), expected)

    def test_more_tokens_than_the_context_are_refused(self):
        model, cache = bert(None), ToyCache()
        model(torch.zeros(1, 11).long(), cache=cache)
        for ids, more in ((12, {}), (12, {"mask": torch.ones(1, 12).bool()}), (1, {"cache": cache}),
                          (1, {"cache": cache, "mask": torch.ones(1, 12).bool()})):
            with refused("12.* 11"):
                model(torch.zeros(1, ids).long(), **more)
