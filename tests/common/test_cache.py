"""The KV cache: entries grow, rows move and repeat, and neither disturbs another layer or cache."""
import pytest
import torch

from common.cache import KVCache, extend
from tests.helpers import assert_close, assert_same

ROWS, HEADS, K = 3, 2, 5
CHUNKS = [[6], [4, 1, 1], [1] * 80, [3, 60, 1, 1]]


@pytest.fixture(params=[True, False], ids=["gradients", "no gradients"])
def gradients(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


def draw(S, rows=ROWS, heads=HEADS):
    """Keys and values (B, H, S, K)."""
    return torch.randn(2, rows, heads, S, K).unbind()


def filled(chunks, k=None, v=None, cache=None, layer="self"):
    """A cache with these chunks of a text, and all its keys and values."""
    cache, (k, v) = cache or KVCache(), draw(sum(chunks)) if k is None else (k, v)
    for parts in zip(k.split(chunks, dim=2), v.split(chunks, dim=2)):
        cache.append(layer, *parts)
    return cache, k, v


def check(name, cache, k, v, layer="self"):
    """The layer's entry is k and v; shown by appending one more key and value, and returned so."""
    more = [torch.cat([x, new], dim=2) for x, new in zip((k, v), draw(1, len(k), k.shape[1]))]
    got = cache.append(layer, *(x[:, :, -1:] for x in more))
    for letter, *pair in zip("kv", got, more):
        assert_close(f"{name}, then one more: {letter} (B, H, S, K)", *pair)
    return more


class TestExtend:
    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_the_past_is_followed_by_the_new(self, gradients, chunks):
        whole, buffer = torch.zeros(ROWS, HEADS, 0, K), None
        for new in torch.randn(ROWS, HEADS, sum(chunks), K).split(chunks, dim=2):
            (past_copy, new_copy), past = (whole.clone(), new.clone()), whole
            whole, buffer = extend(past, new, buffer)
            assert_close("result (B, H, P + T, K)", whole, torch.cat([past_copy, new_copy], dim=2))
            assert_close("past and new afterwards", torch.cat([past, new], dim=2), whole)

    def test_gradients_reach_the_past_and_the_new(self):
        past, new = (torch.randn(ROWS, HEADS, n, K, requires_grad=True) for n in (3, 2))
        first, buffer = extend(past, new, None)
        got = [first.square(), extend(first, new, buffer)[0]]  # backward needs `first` as it was
        whole = torch.cat([past, new], dim=2)
        assert_same("first squared, and second (B, H, S, K)", torch.cat(got, dim=2),
                    torch.cat([whole.square(), whole, new], dim=2), past=past, new=new)


class TestKVCache:
    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_an_entry_is_all_that_was_appended(self, gradients, chunks):
        cache, k, v = filled(chunks)
        assert cache.length == sum(chunks)
        check(f"{chunks}", cache, k, v)

    def test_each_layer_has_its_own_entry(self, gradients):
        cache, *entry = filled([4])
        _, *other = filled([3, 1], *draw(4, heads=7), cache, "other")
        context = cache.get_or_compute("cross", 4, lambda: draw(4))
        check("the first layer", cache, *entry)
        check("the second layer", cache, *other, "other")
        assert cache.get_or_compute("cross", 4, lambda: draw(4)) is context, "cross-attention's"
        assert cache.length == 5

    @pytest.mark.parametrize("chunks", [[6], [4, 1, 1]])
    @pytest.mark.parametrize("rows", [[2, 0, 0, 1], [2, 0, 0]])
    def test_rows_are_reordered_repeated_and_left_out(self, gradients, chunks, rows):
        (cache, k, v), context, rows = filled(chunks), draw(9), torch.tensor(rows)
        cache.get_or_compute("cross", 9, lambda: context)
        cache.state["images"] = torch.arange(ROWS)
        cache.reorder(rows)
        for letter, *pair in zip("kv", cache.get_or_compute("cross", 9, lambda: draw(9)), context):
            assert_close(f"cross-attention's {letter} (B', H, S, K)", pair[0], pair[1][rows])
        assert_close("state (B')", cache.state["images"], rows)
        check("reordered", cache, k[rows], v[rows])

    @pytest.mark.parametrize("chunks", [[4], [6], [4, 1, 1], [4, 40, 1]])
    @pytest.mark.parametrize("selected", [True, False])
    def test_beams_of_one_prompt_exchange_what_came_after_it(self, gradients, chunks, selected):
        (k, v), rows = draw(sum(chunks)), torch.tensor([2, 0, 0])
        k[:, :, :4], v[:, :, :4] = k[:1, :, :4], v[:1, :, :4]
        given, copies, cache = (k, v), (k.clone(), v.clone()), filled(chunks, k, v)[0]
        cache.state["images"] = torch.tensor([5, 6, 7])
        if selected:
            cache = cache.select(torch.arange(ROWS))
        for times in ("once", "twice"):
            cache.reorder(rows, since=4)
            k, v = check(f"reordered {times}", cache, k[rows], v[rows])
        assert_close("state (B)", cache.state["images"], [5, 7, 7])
        assert_close("the caller's k and v afterwards", torch.stack(given), torch.stack(copies))

    def test_gradients_reach_what_was_cached(self):
        k, cache, rows = torch.randn(HEADS, 4, K).repeat(ROWS, 1, 1, 1), KVCache(), [2, 0, 0]
        k.requires_grad_()
        squared = cache.append("self", k, k)[0].square()      # backward needs the entry as it was
        cache.reorder(torch.tensor(rows), since=2)
        values = cache.append("self", k[:, :, :1], k[:, :, :1])[1]
        gradient, = torch.autograd.grad(squared.sum() + values.sum(), k)
        expected = 2 * k.sum(0) + ROWS * torch.tensor([2, 1, 1, 1])[:, None]
        assert_close("gradient of all rows' keys and values (H, S, K)", gradient.sum(0), expected)

    def test_a_selection_and_its_original_leave_each_other_alone(self, gradients):
        (cache, k, v), rows = filled([4, 1, 1]), torch.tensor([1, 1])
        cache.state["images"] = torch.tensor([5, 6, 7])
        new, third = cache.select(rows), cache.select(rows)
        assert new.length == 6, "the selection's length"
        new_k, new_v = check("selection", new, k[rows], v[rows])
        new.reorder(torch.tensor([1, 0]), since=1)
        new.state["images"], new.state["other"] = new.state["images"] + 1, torch.tensor([3, 4])
        assert_close("the selection's state (B')", new.state["images"], [7, 7])
        assert cache.length == 6 and list(cache.state) == ["images"]
        assert_close("the original's state (B)", cache.state["images"], [5, 6, 7])
        check("original", cache, k, v)
        check("a second selection", third, k[rows], v[rows])
        check("selection once more", new, new_k[[1, 0]], new_v[[1, 0]])

    def test_cross_attention_computes_its_entry_once_for_a_number_of_keys(self):
        cache, self_k, self_v = filled([2, 1])
        first, second, longer = draw(3), draw(3), draw(4)
        for name, length, computed, expected in (
                ("computed", 3, first, first), ("kept", 3, second, first),
                ("of 4 keys", 4, longer, longer), ("of 3 again", 3, second, second)):
            got = cache.get_or_compute("cross", length, lambda: computed)
            assert_close(f"{name}: k, v (2, B, H, S, K)", torch.stack(got), torch.stack(expected))
        cache.invalidate("cross")
        try:
            cache.invalidate("never stored")
        except KeyError:
            pytest.fail("invalidate needs an entry")
        assert cache.get_or_compute("cross", 3, lambda: first) is first, "kept, though invalid"
        assert cache.length == 3
        check("self-attention", cache, self_k, self_v)
