"""generate and score_candidates against slow loops, on toy models whose answers are known."""
import pytest
import torch
import torch.nn.functional as F

from common.generation import (DecodingState, check_options, check_prompt, contains_any, generate,
                               keep_top_k, keep_top_p, later_log_p, pad_left, sample,
                               score_candidates, stream, tokens_in)
from tests.helpers import (PAD, STOP, V, Table, assert_close, chain, prompts, refused, toy_lm,
                           unchanged)


def tinted(lm):
    """The model with a state: a tint (B, V), which is added to all logits of a row."""
    def model(x, mask=None, cache=None, last=False, *, tint):
        return lm(x, mask=mask, cache=cache, last=last) + tint[:, None]
    return model


def tints(B):
    return torch.randn(B, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def slow_logits(lm, text, tint=0):
    """What the next token of a text (T,) is scored by, without cache, mask or batch: (V,)."""
    return (lm(text[None])[0, -1] + tint).detach()


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def padded(rows):
    longest = max(map(len, rows))
    return [row + [PAD] * (longest - len(row)) for row in rows]


class TestKeepTopK:
    @pytest.mark.parametrize("k, kept", [
        (1, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]), (2, [[0, 1, 1, 1, 0], [1, 0, 0, 0, 1]]),
        (4, [[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]), (99, [[1] * 5] * 2)])
    def test_it_keeps_the_k_largest_of_each_row_and_ties(self, k, kept):
        logits = torch.tensor([[1.0, 4.0, 3.0, 3.0, 2.0], [-1.0, -7.0, -8.0, -6.0, -5.0]])
        expected = logits.masked_fill(~torch.tensor(kept).bool(), -torch.inf)
        with unchanged(logits=logits):
            assert_close("logits (B, V)", keep_top_k(logits, k), expected)


class TestKeepTopP:
    @pytest.mark.parametrize("p, kept", [
        (0.01, [[0, 1, 0], [0, 0, 1]]), (0.5, [[0, 1, 0], [0, 0, 1]]),
        (0.6, [[0, 1, 1], [0, 0, 1]]), (0.81, [[1, 1, 1], [0, 1, 1]]), (1.0, [[1] * 3] * 2)])
    def test_it_keeps_the_token_that_reaches_p_and_at_least_one(self, p, kept):
        logits = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]).log() - torch.tensor([[0], [9]])
        expected = logits.masked_fill(~torch.tensor(kept).bool(), -torch.inf)
        with unchanged(logits=logits):
            assert_close("logits (B, V)", keep_top_p(logits, p), expected)


class TestSample:
    @pytest.mark.parametrize("temperature, top_k, top_p, expected", [
        (1.0, None, 0.6, {0, 1}), (0.25, None, 0.6, {0}),       # at 0.25 the first alone has 0.87
        (1.0, 2, 0.6, {0}),             # of the two that top-k leaves the first alone has 0.62
        (1.0, 2, 1.0, {0, 1}), (9.0, None, 1.0, {0, 1, 2}), (0, None, 1.0, {0})])
    def test_temperature_is_before_top_k_before_top_p(self, temperature, top_k, top_p, expected):
        logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(400, 1)
        found = set(sample(logits, temperature, top_k, top_p, draws()).tolist())
        assert found == expected, f"drew {found}, expected {expected}"

    def test_draws_follow_the_probabilities(self):
        p = torch.tensor([0.5, 0.3, 0.15, 0.05])
        logits = (p.log() / 2).repeat(40_000, 1)        # at temperature 0.5: p
        with unchanged(logits=logits):
            token = sample(logits, 0.5, generator=draws())
        assert token.dtype == torch.int64, f"token is {token.dtype}"
        assert_close("frequency of each token (V,)", token.bincount() / 40_000, p, 0.01)

    def test_temperature_zero_takes_the_likeliest_of_each_row(self):
        logits = torch.tensor([[1.0, 1.0 + 1e-6, -2.0], [-1.0, -3.0, -2.0], [0.0, 1.0, 1e38]])
        assert_close("token (B,)", sample(logits, 0), [1, 0, 2])

    def test_the_generator_decides_and_rows_differ(self):
        first, again, other = (sample(torch.zeros(3, 9973), generator=draws(seed)).tolist()
                               for seed in (0, 0, 1))
        assert first == again != other and len(set(first)) == 3, (first, again, other)

    def test_with_a_generator_each_a_row_draws_what_it_draws_alone(self):
        together = sample(torch.zeros(3, 9973), generator=[draws(k) for k in (5, 6, 7)])
        alone = [sample(torch.zeros(1, 9973), generator=[draws(k)]) for k in (5, 6, 7)]
        assert_close("token (B,)", together, torch.cat(alone))
        with refused("3.* 2"):
            sample(torch.zeros(2, 5), generator=[draws()] * 3)


class TestPadLeft:
    def test_padding_moves_left_and_the_order_of_the_tokens_stays(self):
        ids = torch.tensor([[9, 8, 7, 6], [5, 0, 6, 0], [0, 7, 0, 0], [0, 0, 4, 3]])
        with unchanged(ids=ids, mask=(mask := ids > 0)):
            found, real = pad_left(ids, mask)
        expected = torch.tensor([[9, 8, 7, 6], [0, 0, 5, 6], [0, 0, 0, 7], [0, 0, 4, 3]])
        assert_close("ids (B, T)", found, expected)
        assert_close("mask (B, T)", real, expected > 0)
        embeddings, _ = pad_left(ids[..., None] * torch.ones(5), mask)
        assert_close("embeddings (B, T, D)", embeddings, expected[..., None] * torch.ones(5))

    def test_without_padding_there_is_no_mask(self):
        for mask in (None, torch.ones(2, 3).bool()):
            ids, real = pad_left(torch.tensor([[1, 2, 3], [4, 5, 6]]), mask)
            assert real is None, f"mask {real}"
            assert_close("ids (B, T)", ids, [[1, 2, 3], [4, 5, 6]])


class TestCheckPrompt:
    @pytest.mark.parametrize("prompt, mask, values", [
        (torch.tensor([3, 4]), None, r"\(2,\)"), (torch.zeros(2, 3), None, r"\(2, 3\)"),
        (torch.ones(2, 3, 5, dtype=torch.int64), None, "2, 3, 5"),
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 4) > 0, r"3, 4\).*3, 5\)"),
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(1, 5) > 0, r"1, 5\).*3, 5\)"),
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5, 2) > 0, "3, 5, 2"),
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5), "float32.*bool"),
        (torch.ones(2, 0, dtype=torch.int64), None, ""),
        (torch.ones(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [False] * 3]), "")])
    def test_ids_embeddings_and_masks_of_other_shapes_and_empty_rows_are_refused(self, prompt, mask,
                                                                                 values):
        with refused(values):
            check_prompt(prompt, mask, 1, None)

    def test_the_longest_row_and_the_new_tokens_fit_the_context_and_padding_does_not_count(self):
        ids, mask, _ = prompts(5, 3)
        ids, mask = F.pad(ids, (4, 0)), F.pad(mask, (4, 0))
        for given, real, longest in ((ids, mask, 5), (ids, None, 9)):
            check_prompt(given, real, 18, None)
            check_prompt(given, real, 18, longest + 18)
            with refused(f"{longest} .* 18 .*{longest + 18}"):
                check_prompt(given, real, 18, longest + 17)


class TestCheckOptions:
    usual = {"max_new_tokens": 5, "num_beams": 1, "early_stopping": False, "pad_id": 0,
             "temperature": 0.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0}

    @pytest.mark.parametrize("options, values", [
        ({"temperature": -1.0}, "temperature=-1.0"), ({"top_k": 0, "temperature": 1.0}, "top_k=0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"), ({"pad_id": -1}, "pad_id=-1"),
        ({"top_p": 1.5}, "top_p=1.5"), ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": 0}, "num_beams=0"), ({"early_stopping": "never"}, "early_stopping=never"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams=2.*temperature=0.5"),
        ({"top_k": 5}, "top_k=5.*temperature"), ({"top_p": 0.9}, "top_p=0.9.*temperature")])
    def test_what_is_out_of_range_or_contradicts_itself_is_refused(self, options, values):
        with refused(values):
            check_options(**self.usual | options)

    @pytest.mark.parametrize("options", [
        {}, {"num_beams": 3, "early_stopping": True}, {"temperature": 1, "top_k": 1, "top_p": 0.1},
        {"max_new_tokens": 1, "repetition_penalty": 0.1}])
    def test_all_else_is_allowed(self, options):
        check_options(**self.usual | options)


class TestDecodingState:
    def test_rows_that_are_repeated_and_reordered_take_all_they_have_along(self):
        lm, (ids, mask, texts), tint = toy_lm(), prompts(5, 1, 3), tints(3)
        decoding = DecodingState(tinted(lm), ids, mask, 4, {"tint": tint}, repetition_penalty=2.0)
        texts, rows, since = [text[0] for text in texts], torch.tensor([1, 1, 3, 2, 5, 4]), 6

        def check(after):
            expected = [slow_logits(lm, *row) for row in zip(texts, tint, strict=True)]
            assert_close(f"logits (B, V): {after}", decoding.logits, torch.stack(expected), 1e-5)

        def feed(*tokens):
            decoding.feed(torch.tensor(tokens)[:, None])
            return [torch.cat([text, torch.tensor([i])]) for text, i in zip(texts, tokens)]
        check("ragged prompts")
        texts = feed(4, 9, 6)
        check("a token each")
        decoding.repeat(2)
        texts, tint = [text for text in texts for _ in range(2)], tint.repeat_interleave(2, dim=0)
        check("every row twice")
        texts = feed(3, 4, 5, 6, 7, 8)
        decoding.reorder(rows, since)
        texts = [texts[r] for r in rows]
        texts = feed(8, 7, 6, 5, 4, 3)
        check("rows in another order")
        seen = [[token in text for token in range(V)] for text in texts]
        assert_close("is penalized (B, V)", decoding.penalize(-torch.ones(6, V)) == -2,
                     torch.tensor(seen))

    def test_the_penalty_lowers_the_scores_of_what_occurred(self):
        prompt, mask = torch.tensor([[0, 0, 1]]), torch.tensor([[False, True, True]])
        decoding = DecodingState(Table(torch.zeros(4, 4)), prompt, mask, 5, {}, 2.0)
        scores = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
        assert_close("scores (B, V)", decoding.penalize(scores), [[1.0, -4.0, 2.0, -2.0]])
        decoding.feed(torch.tensor([[3]]))
        assert_close("scores (B, V)", decoding.penalize(scores), [[1.0, -4.0, 2.0, -4.0]])

    @pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32),
                                                 (torch.float64, torch.float64)])
    def test_logits_are_at_least_float32(self, dtype, expected):
        model = Table(torch.zeros(V, V, dtype=dtype))
        found = DecodingState(model, torch.tensor([[3]]), None, 4, {}).logits.dtype
        assert found == expected, f"logits are {found}"


class TestTokensIn:
    def test_padding_and_ids_outside_the_vocabulary_do_not_count(self):
        ids = torch.tensor([[-200, 3, 3, 0], [500, 1, 5, 3], [0, -200, 0, 2]])
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]]).bool()
        seen = torch.zeros(3, 5).bool()
        for row, token in ((0, 3), (1, 1), (1, 3), (2, 0), (2, 2)):
            seen[row, token] = True
        with unchanged(ids=ids, mask=mask):
            assert_close("tokens (B, V)", tokens_in(ids, mask, 5), seen)
        seen[0, 0] = True
        assert_close("tokens (B, V) without a mask", tokens_in(ids, None, 5), seen)
        assert_close("tokens (B, V) of embeddings", tokens_in(torch.ones(2, 3, 7), None, 5),
                     torch.zeros(2, 5).bool())


class TestGenerate:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    @pytest.mark.parametrize("penalty", [1.0, 3.0])
    @pytest.mark.parametrize("embedded", [False, True])
    def test_a_ragged_batch_writes_what_a_slow_loop_writes(self, kind, side, penalty, embedded):
        lm, (ids, mask, texts) = toy_lm(kind), prompts(5, 1, 3, 7, side=side)
        tint, stop, expected = tints(4), (7, 9), []
        for text, own in zip(texts, tint):
            text, new, seen = text[0], [], set() if embedded else set(text[0].tolist())
            while len(new) < 11 and not set(new) & set(stop):
                logits = slow_logits(lm, text, own)
                for i in seen if penalty != 1 else ():
                    logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
                new.append(int(logits.argmax()))
                seen.add(new[-1])
                text = torch.cat([text, torch.tensor(new[-1:])])
            expected.append(new)
        prompt = lm.embed(ids).detach() if embedded else ids
        with unchanged(prompt=prompt, mask=mask, tint=tint):
            new = generate(tinted(lm), prompt, mask, max_new_tokens=11, stop=stop, pad_id=PAD,
                           repetition_penalty=penalty, state={"tint": tint})
        assert_close("new ids (B, N)", new, padded(expected))

    @pytest.mark.parametrize("options, expected", [
        ({"stop": 5}, [[4, 5, 12, 12, 12], [6, 7, 8, 9, 10]]),
        ({"stop": (5, 8)}, [[4, 5, 12], [6, 7, 8]]), ({"stop": [8, 5]}, [[4, 5, 12], [6, 7, 8]]),
        ({"stop": ()}, [[4, 5, 6, 7, 8], [6, 7, 8, 9, 10]]),
        ({"stop": (7, 12), "pad_id": 7}, [[4, 5, 6, 7], [6, 7, 7, 7]]),  # the end may pad too
        ({"stop_strings": ("5 6", "8 9")}, [[4, 5, 6, 12], [6, 7, 8, 9]]),
        ({"stop_strings": "5 6"}, [[4, 5, 6, 12, 12], [6, 7, 8, 9, 10]])])
    @pytest.mark.parametrize("steps", [1, 4])    # between two looks whether all have ended
    def test_a_row_ends_with_its_first_stop_and_padding_follows(self, options, expected, steps,
                                                                monkeypatch):
        monkeypatch.setattr("common.generation.CHECK_EVERY", {"cpu": steps}, raising=False)
        lm, usual = chain(*((k, k + 1) for k in range(3, 11))), {"max_new_tokens": 5, "pad_id": 12}
        new = generate(lm, torch.tensor([[3], [5]]), **usual | options,
                       decode=lambda ids: " ".join(map(str, ids)))
        assert_close("new ids (B, N)", new, expected)

    def test_it_asks_the_model_no_more_soon_after_all_rows_have_ended(self):
        lm = chain((3, STOP), (4, 5), (5, 9))
        new = generate(lm, torch.tensor([[3], [4]]), max_new_tokens=50, stop=(STOP, 9), pad_id=PAD)
        assert_close("new ids (B, N)", new, [[STOP, PAD], [5, 9]])
        assert len(lm.calls) < 20, f"{len(lm.calls)} calls for 2 tokens"

    def test_with_a_generator_each_a_row_is_drawn_as_it_is_alone(self):
        lm, (ids, mask, texts), rows = toy_lm(), prompts(5, 1, 3), []
        options = {"temperature": 1.5, "top_k": 5, "top_p": 0.7, "max_new_tokens": 9}
        for r, text in enumerate(texts):
            text, generator = text[0], draws(40 + r)
            for _ in range(9):
                token = sample(slow_logits(lm, text)[None], 1.5, 5, 0.7, [generator])
                text = torch.cat([text, token])
            rows.append(text[-9:].tolist())
        new = generate(lm, ids, mask, generator=[draws(40 + r) for r in range(3)], **options)
        assert_close("new ids (B, N)", new, rows)

    @pytest.mark.parametrize("num_beams, length_penalty, early_stopping, stop, expected", [
        (1, 1.0, False, STOP, [[STOP, 12], [1, STOP]]),
        (2, 0.0, False, STOP, [[STOP, 12], [1, STOP]]),
        (2, 1.0, False, STOP, [[4, 1, STOP], [1, STOP, 12]]),
        (2, 1.0, True, STOP, [[1, STOP], [1, STOP]]),
        (3, 1.0, False, STOP, [[4, 4, 4, 1, STOP], [1, STOP, 12, 12, 12]]),
        (2, 1.0, False, (), [[4, 1, 3, 4, 1, 2], [1, 3, 4, 1, 3, 2]])])
    def test_beams_follow_their_options(self, num_beams, length_penalty, early_stopping, stop,
                                        expected):
        # p(b | a); after anything else than 1, 3 and 4 all tokens are equally likely.
        p = torch.full((5, 5), 0.2)
        p[1] = torch.tensor([0, 0, 0.51, 0.49, 0])
        p[3] = torch.tensor([0, 0.28, 0.3, 0.13, 0.29])
        p[4] = torch.tensor([0, 0.41, 0.19, 0, 0.4])
        new = generate(Table(p.log().clamp(min=-50)), torch.tensor([[3], [4]]), max_new_tokens=6,
                       stop=stop, pad_id=12, num_beams=num_beams, length_penalty=length_penalty,
                       early_stopping=early_stopping)
        assert_close("new ids (B, N)", new, expected)

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_it_runs_without_gradients_and_its_result_may_be_trained_on(self, num_beams):
        def model(x, **arguments):
            assert not torch.is_grad_enabled(), "gradients are on"
            return lm(x, **arguments)
        lm = toy_lm().train()
        new = generate(model, prompts(4)[0], max_new_tokens=5, num_beams=num_beams)
        assert lm.training, "the model has left training mode"
        new[new == 3] = 4
        lm(new).sum().backward()

    @pytest.mark.parametrize("options, values", [
        ({"temperature": -1.0}, "temperature=-1.0"), ({"stop_strings": ("x",)}, "decode"),
        ({"stop_strings": "x", "decode": str, "num_beams": 2}, "num_beams"),
        ({"mask": torch.ones(1, 3).bool()}, r"1, 3\).*1, 5"),
        ({"context_length": 9, "max_new_tokens": 5}, "5.* 5 .*10.* 9")])
    def test_what_cannot_be_is_refused(self, options, values):
        with refused(values):
            generate(chain(), prompts(5)[0], **options)


class TestStream:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    @pytest.mark.parametrize("embedded", [True, False])
    def test_it_yields_what_generate_returns(self, kind, embedded):
        lm = toy_lm(kind)
        for prompt in prompts(7, 3)[2]:
            prompt = lm.embed(prompt) if embedded else prompt
            with unchanged(prompt=prompt):
                found = [*stream(lm, prompt, max_new_tokens=9, context_length=23)]
            expected = generate(lm, prompt, max_new_tokens=9)[0].tolist()
            assert found == expected and all(type(token) is int for token in found), found

    def test_the_state_goes_to_every_call_and_options_to_the_draws(self):
        lm, prompt, tint = toy_lm(), prompts(5)[2][0], tints(1)
        found = [*stream(tinted(lm), prompt, max_new_tokens=6, state={"tint": tint})]
        assert found == generate(tinted(lm), prompt, max_new_tokens=6,
                                 state={"tint": tint})[0].tolist()
        drawn = [[*stream(lm, prompt, max_new_tokens=9, temperature=2.0, top_k=5,
                          generator=draws(k))] for k in (4, 4, 5)]
        assert drawn[0] == drawn[1] != drawn[2], f"{drawn}"
        assert drawn[0] == generate(lm, prompt, max_new_tokens=9, temperature=2.0, top_k=5,
                                    generator=draws(4))[0].tolist()

    def test_a_stop_is_its_last_token_and_the_model_is_asked_no_more(self):
        lm = chain((5, 7), (7, 9), (9, STOP))
        assert [*stream(lm, torch.tensor([[3, 5]]), stop=(11, STOP))] == [7, 9, STOP]
        assert lm.calls == [(1, 2), (1, 1), (1, 1)], f"{lm.calls}"

    def test_each_token_comes_before_the_next_is_computed(self):
        lm = chain((5, 7), (7, 9))
        tokens = stream(lm, torch.tensor([[5]]), max_new_tokens=8)
        assert (next(tokens), len(lm.calls), next(tokens), len(lm.calls)) == (7, 1, 9, 2)

    @pytest.mark.parametrize("context_length, count", [(None, 8), (9, 6), (4, 1), (11, 8), (40, 8)])
    def test_it_ends_with_the_context(self, context_length, count):
        lm, prompt = chain((5, 6), (6, 5)), torch.tensor([[3, 4, 5]])
        found = [*stream(lm, prompt, max_new_tokens=8, context_length=context_length)]
        assert found == [6, 5] * (count // 2) + [6] * (count % 2), f"{found}"
        assert len(lm.calls) == count, "the last token is fed, too"

    @pytest.mark.parametrize("prompt, values", [
        (torch.tensor([[3, 4, 5, 6]]), "4 tokens.*5.*context is 4"),
        (torch.zeros(1, 0, dtype=torch.int64), "empty"), (torch.tensor([3, 4]), "2")])
    def test_what_cannot_be_is_refused(self, prompt, values):
        with refused(values):
            next(stream(toy_lm(), prompt, context_length=4))

    def test_no_gradients_are_kept_for_it(self):
        x = toy_lm().embed(prompts(3)[2][0])
        list(stream(toy_lm(), x, max_new_tokens=2))
        assert x.requires_grad and torch.is_grad_enabled()
        seen = []

        def model(x, mask=None, cache=None, last=False):
            seen.append(torch.is_grad_enabled())
            return torch.zeros(1, 1, V)
        list(stream(model, x, max_new_tokens=2))
        assert seen == [False, False], "gradients are on"


class TestContainsAny:
    def test_it_says_which_unfinished_rows_have_one_of_the_strings(self):
        ids = torch.tensor([[1, 2, 3], [3, 1, 2], [3, 2, 1], [1, 2, 3], [1, 3, 2]])
        finished = torch.tensor([False, False, False, True, False])
        found = contains_any(("12", "132"), lambda row: "".join(map(str, row)), ids, finished)
        assert_close("has a string (B,)", found, torch.tensor([True, True, False, False, True]))


CANDIDATES = torch.tensor([[3, 5, 7], [4, -100, -100], [8, 2, -100], [3, 5, -100], [3, 6, 7]])


def slow_log_p(lm, text, tint, candidate):
    """log p of each token of a candidate after a text, one forward each."""
    found, text = [], text[0]
    for token in candidate[candidate >= 0]:
        found.append(slow_logits(lm, text, tint).log_softmax(dim=-1)[token].item())
        text = torch.cat([text, token[None]])
    return found


class TestScoreCandidates:
    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("rows", [256, 4])
    @pytest.mark.parametrize("own, length", [(False, 3), (True, 3), (False, 1)])
    def test_it_is_the_likelihood_of_a_candidate_after_a_prompt(self, mean, rows, own, length):
        lm, (ids, mask, texts), tint = toy_lm(), prompts(5, 1, 3, side="right"), tints(3)
        candidates = CANDIDATES[:, :length]
        if own:
            candidates = torch.stack([candidates.roll(k, dims=0) for k in range(3)])
        with unchanged(ids=ids, mask=mask, candidates=candidates, tint=tint):
            found = score_candidates(tinted(lm), ids, candidates, mask, mean=mean, rows=rows,
                                     state={"tint": tint})
        expected = [[sum(log_p) / (len(log_p) if mean else 1) for log_p in
                     (slow_log_p(lm, text, tint[b], c) for c in candidates.expand(3, -1, -1)[b])]
                    for b, text in enumerate(texts)]
        assert_close("log p (B, C)", found, expected)
        assert not found.requires_grad, "the scores keep the model's graph"

    def test_the_prompt_goes_through_the_model_once(self):
        table = Table(torch.zeros(V, V))
        score_candidates(table, prompts(7, 7)[0], CANDIDATES)
        tokens = sum(B * T for B, T in table.calls)
        assert tokens <= 2 * 7 + 2 * 5 * 3, f"{tokens} tokens: 2 prompts of 7, 10 candidates of 3"

    def test_half_precision_logits_are_compared_in_float32_and_scores_may_be_trained_on(self):
        logits = torch.randn(V, V, generator=draws()).bfloat16()
        scores = score_candidates(Table(logits), torch.tensor([[3, 5]]), torch.tensor([[4, 7, 9]]))
        log_p = logits.double().log_softmax(dim=-1)
        assert_close("log p (B, C)", scores, (log_p[5, 4] + log_p[4, 7] + log_p[7, 9]).view(1, 1))
        (scores * torch.ones(1, requires_grad=True)).sum().backward()

    @pytest.mark.parametrize("candidates, values", [
        (torch.tensor([3, 4]), r"\(2,\).* 1 "), (torch.tensor([[[3, 4]]] * 2), r"2, 1, 2.* 1 "),
        (torch.tensor([[-100, 5]]), ""), (torch.tensor([[4, -100, 5]]), ""),
        (torch.tensor([[3], [-100]]), ""), (CANDIDATES, "7 .* 3 .*10.* 9")])
    def test_what_cannot_be_scored_is_refused(self, candidates, values):
        with refused(values):
            score_candidates(chain(), prompts(7)[0], candidates, context_length=9)


class TestLaterLogP:
    def test_it_scores_all_tokens_but_the_first_after_the_prompts_of(self):
        lm, (ids, mask, texts), tint = toy_lm(), prompts(5, 1, 3), tints(3)
        of, candidates = [2, 0, 0, 1, 2], CANDIDATES[[0, 0, 2, 4, 1]]
        with torch.no_grad(), unchanged(candidates=candidates):
            decoding = DecodingState(tinted(lm), ids, mask, 3, {"tint": tint})
            found = later_log_p(decoding, candidates, torch.tensor(of))
        expected = [slow_log_p(lm, texts[b], tint[b], c)[1:] for b, c in zip(of, candidates)]
        real = candidates[:, 1:] >= 0
        assert_close("log p of real tokens", found[real], sum(expected, []))
        assert found.shape == (5, 2), f"log p (R, L - 1) of shape {tuple(found.shape)}"

    def test_half_precision_logits_are_compared_in_float32(self):
        logits = torch.randn(V, V, generator=draws()).bfloat16()
        decoding = DecodingState(Table(logits), torch.tensor([[3]]), None, 2, {})
        found = later_log_p(decoding, torch.tensor([[4, 7]]), torch.tensor([0]))
        expected = logits[4].double().log_softmax(dim=-1)[7].view(1, 1)
        assert_close("log p (R, L - 1)", found, expected, 1e-5)
