"""Beam search against all texts there are, its rules of stopping, what follows the beams."""
import itertools
import math

import pytest
import torch
from torch import nn

from common.beam_search import BeamSearch
from common.cache import KVCache
from common.generation import DecodingState, generate, pad_left
from tests.helpers import PAD, STOP, Table, V, prompts, toy_lm


def alone(lm, texts, tokens, **options):
    """Each prompt continued by itself, the rest filled with PAD: (B, longest)."""
    rows = [generate(lm, text, max_new_tokens=tokens, pad_id=PAD, **options)[0] for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def every_text(lm, text, tokens, stop):
    """(log p, new ids) of every text of at most `tokens` tokens that ends with stop or is full."""
    found = []
    for length in range(1, tokens + 1):
        middle = [i for i in range(lm.config.vocab_size) if i != stop]
        last = range(lm.config.vocab_size) if length == tokens else [stop]
        for ids in itertools.product(*[middle] * (length - 1), last):
            found.append(ids)
    scores = []
    for length in range(1, tokens + 1):
        group = [ids for ids in found if len(ids) == length]
        new = torch.tensor(group)
        logs = lm(torch.cat([text.expand(len(new), -1), new], dim=1)).log_softmax(dim=-1)
        logs = logs[:, text.shape[1] - 1:-1].gather(2, new[..., None])[..., 0].sum(dim=1)
        scores += [(log, ids) for log, ids in zip(logs.tolist(), group)]
    return scores


class TestBeamSearch:
    @pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
    def test_wide_enough_it_finds_the_best_of_all_texts(self, length_penalty):
        lm, texts = toy_lm(vocab_size=5), [torch.tensor([[3, 4]]), torch.tensor([[4]])]
        ids, mask = torch.tensor([[3, 4], [0, 4]]), torch.tensor([[True, True], [False, True]])
        new = generate(lm, ids, mask, max_new_tokens=4, stop=(STOP,), num_beams=70, pad_id=PAD,
                       length_penalty=length_penalty)
        found = [max((log / len(ids) ** length_penalty, ids)
                     for log, ids in every_text(lm, text, 4, STOP))[1] for text in texts]
        assert new.shape[1] == max(map(len, found))            # not as long as what was worse
        for row, best in zip(new, found):
            assert row.tolist() == list(best) + [PAD] * (new.shape[1] - len(best))

    @pytest.mark.parametrize("early_stopping", [True, False])
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_ragged_batch_is_its_rows_alone(self, kind, early_stopping):
        lm, (ids, mask, texts) = toy_lm(kind), prompts(5, 1, 3, 7)
        options = {"num_beams": 3, "stop": (STOP, 7), "early_stopping": early_stopping}
        new = generate(lm, ids, mask, max_new_tokens=8, pad_id=PAD, **options)
        assert torch.equal(new, alone(lm, texts, 8, **options))
        greedy = generate(lm, ids, mask, max_new_tokens=8, pad_id=PAD, stop=(STOP, 7))
        assert not torch.equal(new, greedy)

    @pytest.mark.parametrize("penalty", [1.5, 4.0])
    def test_with_a_repetition_penalty_it_finds_the_best_of_all_texts(self, penalty):
        # The penalty is on log p, and every beam knows its own tokens (transformers' rule).
        lm, texts = toy_lm(vocab_size=5), [torch.tensor([[3, 4]]), torch.tensor([[4, 4]])]
        new = generate(lm, torch.cat(texts), max_new_tokens=4, stop=(STOP,), num_beams=70, pad_id=PAD,
                       repetition_penalty=penalty)
        plain = generate(lm, torch.cat(texts), max_new_tokens=4, stop=(STOP,), num_beams=70,
                         pad_id=PAD)
        assert not torch.equal(new, plain)
        for row, text in zip(new, texts):
            best, score = None, -math.inf
            for ids in every_text(lm, text, 4, STOP):
                ids, total, seen = list(ids[1]), 0.0, set(text[0].tolist())
                logs = lm(torch.cat([text, torch.tensor([ids])], dim=1))[0].log_softmax(dim=-1)
                for t, token in enumerate(ids):
                    log = logs[text.shape[1] - 1 + t, token].item()
                    total += log * penalty if token in seen else log
                    seen.add(token)
                if total / len(ids) > score:
                    best, score = ids, total / len(ids)
            assert row.tolist() == best + [PAD] * (new.shape[1] - len(best))

    def test_as_many_beginnings_as_beams_go_on_when_the_likeliest_tokens_all_end(self):
        stops, logs = torch.tensor([4, 5, 6]), torch.full((2, 7), -9.0)
        logs[:, 4:] = -1.0
        decoding = DecodingState(Table(torch.zeros(7, 7)), torch.tensor([[3]]), None, 5, {})
        beams = BeamSearch(decoding, 2, 5, stops, PAD, 1.0, False)
        beams.scores = torch.zeros(1, 2)
        beams.step(logs[None], 0)
        assert beams.scores.tolist() == [[-9.0, -9.0]]

    def test_one_beam_is_greedy(self):
        lm, (ids, mask, _) = toy_lm(), prompts(5, 1, 3, 7)
        decoding = DecodingState(lm, *pad_left(ids, mask), 9, {})
        beams = BeamSearch(decoding, 1, 9, torch.tensor([STOP]), PAD, 1.0, False)
        with torch.no_grad():
            greedy = generate(lm, ids, mask, max_new_tokens=9, stop=(STOP,), pad_id=PAD)
            assert torch.equal(beams.search(), greedy)

    @pytest.mark.parametrize("length_penalty, best", [(0.0, [8, STOP]), (1.0, [9, 10, STOP])])
    def test_above_zero_the_length_penalty_favours_longer_texts(self, length_penalty, best):
        # 8 STOP has log p -2.0 in two tokens; 9 10 STOP has -2.7 in three: -1.00 against -0.90.
        logits = torch.full((V, V), -50.0)
        for a, b, log in ((3, 8, -1.0), (3, 9, -0.9), (8, STOP, -1.0), (9, 10, -0.9),
                          (10, STOP, -0.9)):
            logits[a, b] = log
        for a in (3, 8, 9, 10):                 # the rest of each row's probability
            left = 1 - logits[a].exp().sum()
            logits[a, 11] = left.log()
        logits[11] = torch.full((V,), -math.log(V))
        new = generate(Table(logits), torch.tensor([[3]]), max_new_tokens=4, stop=(STOP,), num_beams=4, pad_id=PAD,
                       length_penalty=length_penalty)
        assert [i for i in new[0].tolist() if i != PAD] == best

    def test_beams_are_different_texts(self):
        lm = toy_lm()
        with torch.no_grad():
            decoding = DecodingState(lm, prompts(4)[0], None, 5, {})
            beams = BeamSearch(decoding, 3, 5, torch.tensor([]), PAD, 1.0, False)
            for n in range(4):
                logs = beams.decoding.logits.log_softmax(dim=-1).unflatten(0, (-1, 3))
                rows, token = beams.step(logs, n)
                beams.decoding.reorder(rows)
                beams.decoding.feed(token)
                texts = {tuple(text) for text in beams.ids[0, :, :n + 1].tolist()}
                assert len(texts) == 3

    @pytest.mark.parametrize("early_stopping, calls", [(True, 2), (False, 3)])
    def test_early_stopping_ends_with_as_many_texts_as_beams(self, early_stopping, calls):
        # STOP and 5 STOP are finished after two tokens. 5 5 is likelier than the worse of them, so
        # only early stopping ends here; 5 5 5 is not.
        probabilities = torch.full((V, V), 0.35 / (V - 2))
        probabilities[:, 5], probabilities[:, STOP] = 0.35, 0.3
        table = Table(probabilities.log())
        generate(table, torch.tensor([[3]]), max_new_tokens=20, stop=(STOP,), num_beams=2, length_penalty=0.0,
                 early_stopping=early_stopping)
        assert len(table.calls) == calls

    def test_a_row_ends_when_its_best_beginning_is_worse_at_its_present_length(self):
        # After 5 STOP nothing is likely at the present length; divided by 20 it might be.
        probabilities = torch.full((V, V), 1 / V)
        probabilities[3], probabilities[5] = 0.05 / (V - 2), 0.1 / (V - 1)
        probabilities[3, 5], probabilities[3, STOP], probabilities[5, STOP] = 0.5, 0.45, 0.9
        probabilities[7:] = 1e-9
        probabilities[6], probabilities[4] = 1e-9, 1e-9
        probabilities[[4, 6, *range(7, V)], 4] = 1.0
        table = Table(probabilities.log())
        generate(table, torch.tensor([[3]]), max_new_tokens=20, stop=(STOP,), num_beams=2)
        assert len(table.calls) == 2

    def test_state_and_cache_follow_the_beams(self):
        # The model's choice depends on a state of each row and on what the cache remembers.
        lm = toy_lm()

        def stateful(x, mask=None, cache=None, last=False, tint=None):
            before = cache.state.get("sum", torch.zeros(len(x), dtype=torch.float64))
            cache.state["sum"] = before + x.sum(dim=1)
            shift = torch.sin(cache.state["sum"][:, None] * torch.arange(1, V + 1)) + tint
            return lm(x, mask=mask, cache=cache, last=last) + shift[:, None]
        ids = torch.tensor([[3, 4], [5, 6], [7, 8]])
        tint = torch.randn(3, V, dtype=torch.float64)
        options = {"max_new_tokens": 6, "num_beams": 3, "stop": (STOP,), "pad_id": PAD}
        new = generate(stateful, ids, state={"tint": tint}, **options)
        rows = [generate(stateful, ids[r:r + 1], state={"tint": tint[r:r + 1]}, **options)[0]
                for r in range(3)]
        assert torch.equal(new, nn.utils.rnn.pad_sequence(rows, batch_first=True))
        # A reorder forgotten gives worse texts than greedy writes; their scores by themselves:
        greedy = generate(stateful, ids, state={"tint": tint}, **options | {"num_beams": 1})
        for r in range(3):
            found, likeliest = (self.score(stateful, ids[r], rows[r], tint[r])
                                for rows in (new.tolist(), greedy.tolist()))
            assert found >= likeliest

    def score(self, model_, prompt, text, tint):
        """The mean log p of a text up to its STOP, fed token by token without beams."""
        cache, total, x = KVCache(), 0.0, prompt[None]
        for n, token in enumerate(text):
            logs = model_(x, cache=cache, last=True, tint=tint[None])[0, -1].log_softmax(dim=-1)
            total, x = total + logs[token].item(), torch.tensor([[token]])
            if token == STOP:
                break
        return total / (n + 1)
