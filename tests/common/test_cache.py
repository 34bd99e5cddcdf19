"""The KV cache: in a block any chunking equals one forward; rows move, repeat and are left alone."""
from functools import partial

import pytest
import torch

from common.cache import KVCache
from common.masks import causal, padding
from common.transformer import (MLP, Attention, Block, LayerNorm, llama_block, rope_table, vit_block)
from tests.helpers import randomize

B, S = 2, 7


def step_by_step(block, x, chunks, **arguments):
    cache, outs, start = KVCache(), [], 0
    for size in chunks:
        part, past = x[:, start:start + size], start
        rope = rope_table(torch.arange(past, past + size), block.attn.head_width)
        outs.append(block(part, mask=causal(size, past), rope=rope, cache=cache, **arguments))
        start += size
        assert cache.length == start
    return torch.cat(outs, dim=1), cache


class TestInABlock:
    @pytest.mark.parametrize("chunks", [[7], [1] * 7, [4, 1, 2], [1, 6], [6, 1]])
    def test_every_chunking_equals_one_full_forward(self, chunks):
        block = randomize(llama_block(width=12, heads=6, kv_heads=2, hidden=17).double())
        x = torch.randn(B, 7, 12).double()
        full = block(x, mask=causal(7), rope=rope_table(torch.arange(7), 2))
        torch.testing.assert_close(step_by_step(block, x, chunks)[0], full)

    def test_cross_attention_is_filled_once(self):
        cross = Attention(width=12, heads=3, context_width=5)
        block = randomize(Block(Attention(width=12, heads=3), MLP(width=12), partial(LayerNorm, 12), cross))
        x, context = torch.randn(B, 7, 12), torch.randn(B, S, 5)
        full = block(x, context, mask=causal(7), rope=rope_table(torch.arange(7), 4))
        cached, cache = step_by_step(block, x, [3, 1, 3], context=context)
        torch.testing.assert_close(cached, full)
        assert cache.entries[cross][0].shape[2] == S
        assert cache.entries[block.attn][0].shape[2] == 7

    def test_left_padding_changes_nothing(self):
        block = randomize(llama_block(width=12, heads=3, hidden=17).double())
        x = torch.randn(1, 4, 12).double()
        padded = torch.cat([torch.randn(1, 3, 12).double(), x], dim=1)
        real = torch.tensor([[False] * 3 + [True] * 4])
        positions = (real.cumsum(1) - 1).clamp(min=0)
        want = block(x, mask=causal(4), rope=rope_table(torch.arange(4), 4))
        got = block(padded, mask=causal(7) & padding(real), rope=rope_table(positions, 4))
        torch.testing.assert_close(got[:, 3:], want)
        assert got.isfinite().all()

    def test_reordering_follows_the_beams(self):
        block = randomize(vit_block(width=12, heads=3))
        x, cache, rows = torch.randn(3, 4, 12), KVCache(), torch.tensor([2, 0, 0])
        block(x[:, :3], mask=causal(3), cache=cache)
        cache.reorder(rows)
        got = block(x[:, 3:], mask=causal(1, 3), cache=cache)
        again = torch.cat([x[rows, :3], x[:, 3:]], dim=1)
        torch.testing.assert_close(got, block(again, mask=causal(4))[:, 3:])


def filled(chunks, rows=3):
    """A cache of one layer "self" after these chunks, and all its keys and values."""
    cache = KVCache()
    k, v = torch.randn(2, rows, 2, sum(chunks), 5).unbind()
    for k_part, v_part in zip(k.split(chunks, dim=2), v.split(chunks, dim=2)):
        cache.append("self", k_part, v_part)
    return cache, k, v


@pytest.mark.parametrize("gradients", [True, False])
class TestKVCache:
    @pytest.fixture(autouse=True)
    def with_or_without_gradients(self, gradients):
        with torch.set_grad_enabled(gradients):
            yield

    def test_an_entry_is_all_that_was_appended(self):
        for chunks in ([4], [4, 1, 1], [1] * 80, [3, 60, 1, 1]):
            cache, k, v = filled(chunks)
            assert torch.equal(cache.entries["self"][0], k)
            assert torch.equal(cache.entries["self"][1], v)
            assert cache.length == sum(chunks)

    def test_the_past_is_not_copied_for_each_token(self, gradients):
        cache, _, _ = filled([4, 1, 1])
        before = cache.entries["self"][0].data_ptr()
        cache.append("self", *torch.zeros(2, 3, 2, 1, 5))
        assert (cache.entries["self"][0].data_ptr() == before) != gradients

    def test_rows_are_reordered_repeated_and_left_out(self):
        for chunks in ([4], [4, 1, 1]):
            cache, k, v = filled(chunks)
            cache.get_or_compute("cross", 9, lambda: (torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 9, 5),) * 2)
            cache.state["name"] = torch.tensor([5, 6, 7])
            rows = torch.tensor([2, 0, 0, 1])
            cache.reorder(rows)
            assert torch.equal(cache.entries["self"][0], k[rows])
            assert torch.equal(cache.entries["self"][1], v[rows])
            assert cache.entries["cross"][0][:, 0, 0, 0].tolist() == rows.tolist()
            assert cache.state["name"].tolist() == [7, 5, 5, 6]
            added = cache.append("self", *torch.ones(2, 4, 2, 1, 5))
            assert torch.equal(added[0][:, :, :-1], k[rows])

    def test_rows_alike_before_a_position_exchange_what_came_later(self):
        cache, k, v = filled([4, 1, 1])
        k[:, :, :4], v[:, :, :4] = k[:1, :, :4], v[:1, :, :4]
        for kept, whole in zip(cache.entries["self"], (k, v)):
            kept.copy_(whole)
        cache.state["name"], rows = torch.tensor([5, 6, 7]), torch.tensor([2, 0, 0])
        cache.reorder(rows, since=4)
        assert torch.equal(cache.entries["self"][0], k[rows])
        assert torch.equal(cache.entries["self"][1], v[rows])
        assert cache.state["name"].tolist() == [7, 5, 5]
        added = cache.append("self", *torch.ones(2, 3, 2, 1, 5))
        assert torch.equal(added[1][:, :, :-1], v[rows])

    def test_a_selection_leaves_the_old_cache_alone(self):
        cache, k, v = filled([4, 1, 1])
        cache.state["name"] = torch.tensor([5, 6, 7])
        new = cache.select(torch.tensor([1, 1]))
        assert new.state["name"].tolist() == [6, 6]      # such as Flamingo's count of images
        new.append("self", *torch.ones(2, 2, 2, 1, 5))
        new.reorder(torch.tensor([1, 0]), since=1)
        new.state["name"], new.state["other"] = torch.tensor([1, 2]), torch.tensor([3, 4])
        assert new.length == 7 and cache.length == 6
        assert cache.state.keys() == {"name"} and cache.state["name"].tolist() == [5, 6, 7]
        assert torch.equal(new.entries["self"][0][:, :, :6], k[[1, 1]])
        cache.append("self", *torch.zeros(2, 3, 2, 1, 5))
        assert torch.equal(cache.entries["self"][0][:, :, :6], k)
        assert (new.entries["self"][0][:, :, 6] == 1).all()

    def test_cross_attention_computes_its_entry_once_for_a_length(self):
        cache, calls = KVCache(), []

        def compute():
            calls.append(1)
            return torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 3, 5)
        entry = cache.get_or_compute("cross", 3, compute)
        assert cache.get_or_compute("cross", 3, compute) is entry and len(calls) == 1
        cache.invalidate("cross"), cache.invalidate("never stored")
        assert cache.get_or_compute("cross", 3, compute) is not entry and len(calls) == 2
        cache.get_or_compute("cross", 4, compute)                    # another context
        assert len(calls) == 3 and cache.length == 0
