"""generate and score_candidates against slow loops, on toy models whose answers are known."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common import generation
from common.generation import (DecodingState, generate, keep_top_k, keep_top_p, pad_left, sample,
                               score_candidates)
from tests.helpers import PAD, STOP, Table, V, chain, prompts, toy_lm


def slow_greedy(lm, text, tokens, stop):
    """Without cache, mask or batch."""
    for n in range(tokens):
        text = torch.cat([text, lm(text)[:, -1:].argmax(dim=-1)], dim=1)
        if text[0, -1] in stop:
            break
    return text


class TestChoosing:
    def test_top_k_keeps_k_and_ties(self):
        logits = torch.tensor([[1.0, 4.0, 3.0, 3.0, 2.0]])
        assert keep_top_k(logits, 1).isfinite().tolist() == [[False, True, False, False, False]]
        assert keep_top_k(logits, 2).isfinite().sum() == 3
        assert keep_top_k(logits, 4).isfinite().sum() == 4
        assert torch.equal(keep_top_k(logits, 99), logits)

    @pytest.mark.parametrize("p, kept", [(0.01, 1), (0.5, 1), (0.6, 2), (0.81, 3), (0.999, 3)])
    def test_top_p_keeps_the_token_that_crosses_and_at_least_one(self, p, kept):
        logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        want = [[kept > 2, True, kept > 1]]
        assert keep_top_p(logits, p).isfinite().tolist() == want

    def test_temperature_comes_before_top_p(self):
        # At temperature 1 top_p 0.6 keeps two of [.5 .3 .2]; at 0.25 the first alone has 0.87.
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(400, 3)
        draws = torch.Generator().manual_seed(0)
        assert set(sample(logits, 1.0, top_p=0.6, generator=draws).tolist()) == {0, 1}
        assert set(sample(logits, 0.25, top_p=0.6, generator=draws).tolist()) == {0}

    def test_top_k_comes_before_top_p(self):
        # Of the two that top-k leaves, .5 and .3, the first alone holds 0.62 of what is left.
        logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(400, 3)
        draws = torch.Generator().manual_seed(0)
        assert set(sample(logits, 1.0, 2, 0.6, draws).tolist()) == {0}

    def test_draws_follow_the_probabilities(self):
        probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
        logits = (probabilities.log() / 2).expand(40_000, 4)          # at temperature 0.5: these
        token = sample(logits, 0.5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(token.bincount() / 40_000, probabilities, atol=0.01, rtol=0)

    def test_temperature_zero_is_the_likeliest(self):
        logits = torch.randn(5, V)
        assert torch.equal(sample(logits, 0), logits.argmax(dim=1))

    def test_the_penalty_makes_what_occurred_less_likely(self):
        prompt = torch.tensor([[0, 1]])
        decoding = DecodingState(Table(torch.zeros(4, 4)), prompt, None, 5, {}, 2.0)
        scores = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
        assert decoding.penalize(scores).tolist() == [[1.0, -4.0, 2.0, -2.0]]
        decoding.feed(torch.tensor([[3]]))
        assert decoding.penalize(scores).tolist() == [[1.0, -4.0, 2.0, -4.0]]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
class TestGreedy:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_ragged_batch_writes_what_a_slow_loop_writes(self, kind, side):
        lm = toy_lm(kind)
        ids, mask, texts = prompts(5, 1, 3, 7, side=side)
        new, lengths = generate(lm, ids, mask, max_new_tokens=11, stop=(STOP, 3, 7, 9), pad_id=PAD), set()
        for row, text in zip(new, texts):
            whole = slow_greedy(lm, text, 11, torch.tensor([STOP, 3, 7, 9]))
            want = whole[0, text.shape[1]:].tolist()
            assert row.tolist() == want + [PAD] * (new.shape[1] - len(want))
            lengths.add(len(want))
        assert new.dtype == torch.int64 and len(lengths) > 1          # rows end at different steps

    def test_it_goes_on_from_embeddings(self, kind):
        lm, (ids, mask, _) = toy_lm(kind), prompts(5, 1, 3)
        assert torch.equal(generate(lm, lm.embed(ids), mask, max_new_tokens=7),
                           generate(lm, ids, mask, max_new_tokens=7))

    def test_each_token_is_fed_once(self, kind):
        lm, calls = toy_lm(kind), []

        def counted(x, **arguments):
            calls.append(x.shape[1])
            assert not torch.is_grad_enabled()
            return lm(x, **arguments)
        generate(counted, prompts(5)[0], max_new_tokens=6)
        assert calls == [5, 1, 1, 1, 1, 1]      # the last token is never fed

    def test_a_model_in_training_mode_writes_the_same(self, kind):
        lm, (ids, mask, _) = toy_lm(kind), prompts(5, 1, 3)
        want = generate(lm, ids, mask, max_new_tokens=7)
        assert torch.equal(generate(lm.train(), ids, mask, max_new_tokens=7), want) and lm.training

    def test_a_second_prompt_knows_nothing_of_the_first(self, kind):
        lm, (ids, _, _), (other, _, _) = toy_lm(kind), prompts(5, seed=1), prompts(4, seed=2)
        want = generate(lm, other, max_new_tokens=6)
        generate(lm, ids, max_new_tokens=6)
        assert torch.equal(generate(lm, other, max_new_tokens=6), want)


class TestStopping:
    def test_a_row_that_ends_pads_and_the_others_go_on(self):
        lm = chain((3, STOP), (4, 5), (5, 6), (6, STOP), (7, 7), (STOP, 8))
        new = generate(lm, torch.tensor([[3], [4], [7]]), max_new_tokens=5, stop=(STOP,), pad_id=12)
        assert new.tolist() == [[STOP, 12, 12, 12, 12], [5, 6, STOP, 12, 12], [7] * 5]

    def test_it_ends_when_all_rows_have_ended(self):
        lm = chain((3, STOP), (4, 5), (5, 9))
        new = generate(lm, torch.tensor([[3], [4]]), max_new_tokens=50, stop=(STOP, 9), pad_id=PAD)
        assert new.tolist() == [[STOP, PAD], [5, 9]] and len(lm.calls) == 2

    def test_asked_seldom_whether_all_have_ended_it_writes_the_same(self, monkeypatch):
        monkeypatch.setattr(generation, "CHECK_EVERY", {"cpu": 8})
        lm = chain((3, STOP), (4, 5), (5, 9))
        new = generate(lm, torch.tensor([[3], [4]]), max_new_tokens=50, stop=(STOP, 9), pad_id=PAD)
        assert new.tolist() == [[STOP, PAD], [5, 9]] and len(lm.calls) == 8

    def test_without_a_stop_it_writes_all_its_tokens(self):
        new = generate(chain((3, STOP), (STOP, 5), (5, 3)), torch.tensor([[3]]), max_new_tokens=4)
        assert new.tolist() == [[STOP, 5, 3, STOP]]

    def test_stop_strings_are_looked_for_in_each_rows_text(self):
        lm = chain((3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10))
        calls = []

        def decode(ids):
            calls.append(list(ids))
            return " ".join(map(str, ids))
        new = generate(lm, torch.tensor([[3], [5]]), max_new_tokens=5, pad_id=PAD,
                       stop_strings=("5 6", "8 9"), decode=decode)
        # Two tokens long; the prompt's own 5 in the second row is no part of it.
        assert new.tolist() == [[4, 5, 6, PAD], [6, 7, 8, 9]]
        assert [4, 5, 6, PAD] not in calls      # a finished row is not read again

    def test_one_stop_may_be_given_without_a_list(self):
        lm, ids = chain((3, 4), (4, 5), (5, 6)), torch.tensor([[3]])
        assert generate(lm, ids, max_new_tokens=3, stop=5).tolist() == [[4, 5]]
        decode = " ".join
        new = generate(lm, ids, max_new_tokens=3, stop_strings="4 5", decode=lambda ids: decode(
            map(str, ids)))
        assert new.tolist() == [[4, 5]]

    def test_the_end_may_be_the_padding_too(self):
        lm = chain((3, PAD), (4, 5), (5, 6))
        new = generate(lm, torch.tensor([[3], [4]]), max_new_tokens=3, stop=(PAD,), pad_id=PAD)
        assert new.tolist() == [[PAD, PAD, PAD], [5, 6, PAD]]


class TestSampling:
    def test_the_generator_decides(self):
        lm, (ids, mask, _) = toy_lm(), prompts(5, 1, 3)
        draws = [generate(lm, ids, mask, max_new_tokens=9, temperature=1.3,
                          generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    def test_with_a_generator_each_a_row_is_what_it_is_alone(self):
        lm, (ids, mask, texts) = toy_lm(), prompts(5, 1, 3)

        def draw(row):
            return torch.Generator().manual_seed(40 + row)
        options = {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "max_new_tokens": 9, "stop": (STOP,)}
        new = generate(lm, ids, mask, generator=[draw(r) for r in range(3)], **options)
        for r, text in enumerate(texts):
            own = generate(lm, text, generator=[draw(r)], **options)[0].tolist()
            assert new[r].tolist() == own + [PAD] * (new.shape[1] - len(own))

    def test_the_penalty_counts_prompt_and_new_tokens_but_no_padding(self):
        logits = torch.zeros(V, V)
        logits[:, 3:8] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
        ids = torch.tensor([[PAD, PAD, 4], [4, 3, 6]])
        mask = torch.tensor([[False, False, True], [True, True, True]])
        new = generate(Table(logits), ids, mask, max_new_tokens=3, repetition_penalty=100.0)
        assert new.tolist() == [[3, 5, 6], [5, 7, 3]]
        free = logits.clone()
        free[:, PAD] = 6.0
        assert generate(Table(free), ids, mask, max_new_tokens=1, repetition_penalty=100.0)[0] == PAD


    def test_an_id_that_stands_for_a_picture_is_no_token_that_occurred(self):
        logits = torch.zeros(V, V)
        logits[5, 0], logits[5, V - 1] = 2.0, 3.0
        for outside in (-200, 500):
            prompt = torch.tensor([[outside, 5]])
            assert generate(Table(logits), prompt, max_new_tokens=1, repetition_penalty=9.0) == V - 1
        assert generate(Table(logits), torch.tensor([[V - 1, 5]]), max_new_tokens=1,
                        repetition_penalty=9.0) == 0

    def test_after_embeddings_only_what_was_written_is_penalised(self):
        lm, (ids, _, _) = toy_lm(), prompts(4)
        new = generate(lm, lm.embed(ids), max_new_tokens=9, repetition_penalty=50.0, pad_id=PAD)
        text, seen = ids, set()
        for _ in range(9):                      # a slow loop
            logits = lm(text)[0, -1].clone()
            for i in seen:
                logits[i] = logits[i] / 50 if logits[i] > 0 else logits[i] * 50
            seen.add(int(logits.argmax()))
            text = torch.cat([text, logits.argmax()[None, None]], dim=1)
        assert new.tolist() == text[:, 4:].tolist() and 4 < len(seen)


class TestWhatIsReturned:
    def test_it_may_be_changed_and_trained_on(self):
        lm, (ids, _, _) = toy_lm(), prompts(4)
        for options in ({}, {"num_beams": 2}):
            new = generate(lm, ids, max_new_tokens=5, **options)
            new[new == 3] = -100
            lm(new.clamp(min=0)).sum().backward()
        scores = score_candidates(lm, ids, torch.tensor([[3, 4]]))
        assert not scores.requires_grad
        (scores * torch.ones(1, requires_grad=True)).sum().backward()

    def test_half_precision_logits_are_compared_in_float32(self):
        logits = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).bfloat16()
        writing = DecodingState(Table(logits), torch.tensor([[3, 5]]), None, 4, {})
        assert writing.logits.dtype == torch.float32
        candidates = torch.tensor([[4, 7, 9]])
        want = sum(logits[a].float().log_softmax(dim=-1)[b] for a, b in ((5, 4), (4, 7), (7, 9)))
        assert score_candidates(Table(logits), torch.tensor([[3, 5]]), candidates).item() == \
            pytest.approx(want.item(), abs=1e-6)


class TestClearErrors:
    @pytest.mark.parametrize("options, message", [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"top_k": 0}, "top_k=0: must be at least 1"), ({"top_p": 0.0}, r"top_p=0.0: must be in"),
        ({"top_p": 1.5}, "top_p=1.5"), ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"num_beams": 0}, "num_beams=0"), ({"num_beams": 2, "temperature": 1.0}, "choose one"),
        ({"stop_strings": ("x",)}, "stop_strings need decode"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0: must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"), ({"pad_id": -1}, "pad_id=-1"),
        ({"num_beams": 2, "early_stopping": "never"}, "early_stopping=never: must be True or"),
        ({"top_k": 5}, "top_k=5, top_p=1.0: sampling needs a temperature above 0"),
        ({"top_p": 0.9}, "top_p=0.9: sampling needs"),
        ({"temperature": 1.0, "generator": [torch.Generator()] * 3},
         "3 generators for 1 rows"),
        ({"context_length": 9, "max_new_tokens": 5},
         "prompt of 5 tokens and 5 new ones are 10, but the context is 9")])
    def test_what_cannot_be_is_told(self, options, message):
        with pytest.raises(ValueError, match=message):
            generate(toy_lm(), prompts(5)[0], **options)

    def test_padding_does_not_count_towards_the_context(self):
        lm, (ids, mask, _) = toy_lm(), prompts(5, 3)
        ids, mask = F.pad(ids, (4, 0)), F.pad(mask, (4, 0))
        assert generate(lm, ids, mask, max_new_tokens=18, context_length=23).shape[0] == 2
        with pytest.raises(ValueError, match="prompt of 5 tokens and 19 new ones are 24"):
            generate(lm, ids, mask, max_new_tokens=19, context_length=23)

    def test_an_empty_prompt_is_told(self):
        with pytest.raises(ValueError, match="an empty prompt"):
            generate(toy_lm(), torch.zeros(2, 0, dtype=torch.int64))
        with pytest.raises(ValueError, match="an empty prompt"):
            generate(toy_lm(), *prompts(3, 2)[:1], torch.tensor([[True] * 3, [False] * 3]))

    @pytest.mark.parametrize("shape", [(3, 4), (1, 5), (3,), (3, 5, 2)])
    def test_a_mask_of_another_shape_or_of_numbers_is_told(self, shape):
        ids, candidates = prompts(5, 5, 5)[0], torch.tensor([[3]])
        for mask in (torch.ones(shape).bool(), torch.ones(3, 5)):
            for work in (lambda: generate(toy_lm(), ids, mask),
                         lambda: score_candidates(toy_lm(), ids, candidates, mask)):
                with pytest.raises(ValueError, match=r"for a prompt of \(3, 5\): it must be bool"):
                    work()

    @pytest.mark.parametrize("prompt", [torch.tensor([3, 4]), torch.zeros(2, 3)])
    def test_a_prompt_without_rows_is_told(self, prompt):
        with pytest.raises(ValueError, match=r"ids are \(B, T\), embeddings \(B, T, D\)"):
            generate(toy_lm(), prompt)

    def test_the_models_own_method_knows_its_context_end_and_padding(self):
        lm = toy_lm()
        lm.config = replace(lm.config, pad_id=11)
        with pytest.raises(ValueError, match="but the context is 23"):
            lm.generate(prompts(5)[0], max_new_tokens=30)
        ids, mask, texts = prompts(5, 1, 3, 7)
        said = lm.generate(texts[2], max_new_tokens=9, stop=())[0].tolist()
        at = next(i for i, token in enumerate(said) if token not in said[:i] + [11] and i)
        lm.config = replace(lm.config, eos_id=said[at])
        new = lm.generate(ids, mask, max_new_tokens=11)
        assert torch.equal(new, generate(lm, ids, mask, max_new_tokens=11, stop=(said[at],), pad_id=11))
        assert new[2].tolist() == said[:at + 1] + [11] * (new.shape[1] - at - 1)
        assert new.shape[1] > at + 1


def test_padding_moves_left_and_the_order_stays():
    ids = torch.tensor([[1, 2, 3, 4], [5, 0, 6, 0], [0, 7, 0, 0]])
    mask = ids > 0
    left, real = pad_left(ids, mask)
    assert left.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6], [0, 0, 0, 7]]
    assert torch.equal(real, left > 0)
    embeddings, _ = pad_left(ids[..., None] * torch.ones(5), mask)
    assert torch.equal(embeddings[..., 4], left.float())
    assert pad_left(ids, torch.ones_like(mask))[1] is None


class TestRankOfToys:
    def test_each_prompt_keeps_its_state(self):
        draw = torch.Generator().manual_seed(0)
        table, state = torch.randn(V, V, generator=draw), torch.randn(3, V, generator=draw)

        def leaning(x, mask=None, cache=None, last=False, *, towards):
            logits = table[x] + towards[:, None]
            return logits[:, -1:] if last else logits
        ids = prompts(4, 4, 4)[0]
        scores = score_candidates(leaning, ids, TestRank.candidates, rows=4, state={"towards": state})
        for row, text, own in zip(scores, ids, state):
            alone = score_candidates(leaning, text[None], TestRank.candidates, state={"towards": own[None]})
            assert row.tolist() == pytest.approx(alone[0].tolist(), abs=1e-5)

    @pytest.mark.parametrize("candidates, message", [
        (torch.tensor([3, 4]), r"of shape \(2,\) for 1 prompts"),
        (torch.tensor([[[3, 4]]] * 2), r"of shape \(2, 1, 2\) for 1 prompts"),
        (torch.tensor([[-100, 5]]), "padding before a token"),
        (torch.tensor([[4, -100, 5]]), "padding before a token")])
    def test_candidates_of_another_shape_or_padded_left_are_told(self, candidates, message):
        with pytest.raises(ValueError, match=message):
            score_candidates(toy_lm(), prompts(3)[0], candidates)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
class TestRank:
    candidates = torch.tensor([[3, 5, 7], [4, -100, -100], [8, 2, -100], [3, 5, -100], [3, 6, 7]])

    def slow(self, lm, text, candidate, mean):
        ids = candidate[candidate >= 0]
        logs = lm(torch.cat([text, ids[None]], dim=1))[0].log_softmax(dim=-1)
        picked = [logs[text.shape[1] - 1 + i, token].item() for i, token in enumerate(ids)]
        return sum(picked) / (len(picked) if mean else 1)

    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("rows", [256, 4])
    def test_it_is_the_likelihood_of_each_candidate_after_each_prompt(self, kind, mean, rows):
        lm, (ids, mask, texts) = toy_lm(kind), prompts(5, 1, 3)
        scores = score_candidates(lm, ids, self.candidates, mask, mean=mean, rows=rows)
        for row, text in zip(scores, texts):
            want = [self.slow(lm, text, c, mean) for c in self.candidates]
            assert row.tolist() == pytest.approx(want, abs=1e-5)

    def test_prompts_may_have_candidates_of_their_own(self, kind):
        lm, (ids, mask, texts) = toy_lm(kind), prompts(5, 1)
        own = torch.stack([self.candidates[:2], self.candidates[2:4]])
        scores = score_candidates(lm, ids, own, mask)
        for row, text, candidates in zip(scores, texts, own):
            want = [self.slow(lm, text, c, False) for c in candidates]
            assert row.tolist() == pytest.approx(want, abs=1e-5)

    def test_the_prompt_is_read_once(self, kind):
        lm, calls = toy_lm(kind), []

        def counted(x, **arguments):
            calls.append(tuple(x.shape))
            return lm(x, **arguments)
        score_candidates(counted, prompts(5, 4)[0], self.candidates)
        assert calls == [(2, 5), (10, 2)]
        calls.clear()
        score_candidates(counted, prompts(5, 4)[0], self.candidates[:, :1])
        assert calls == [(2, 5)]                # candidates of one token need no more

    def test_padding_of_a_prompt_does_not_count_towards_the_context(self, kind):
        lm, (ids, mask, _) = toy_lm(kind), prompts(7, 5)
        ids, mask = F.pad(ids, (4, 0)), F.pad(mask, (4, 0))
        assert score_candidates(lm, ids, self.candidates, mask, context_length=10).shape == (2, 5)
        with pytest.raises(ValueError, match="7 tokens and 3 of a candidate are 10"):
            score_candidates(lm, ids, self.candidates, mask, context_length=9)

    def test_what_cannot_be_ranked_is_told(self, kind):
        with pytest.raises(ValueError, match="a candidate without a token"):
            score_candidates(toy_lm(kind), prompts(3)[0], torch.tensor([[3], [-100]]))
        with pytest.raises(ValueError, match="prompt of 7 tokens and 3 of a candidate are 10"):
            score_candidates(toy_lm(kind), prompts(7)[0], self.candidates, context_length=9)
