"""Beam search against a slow loop over lists."""
import functools

import pytest
import torch

from common.beam_search import BeamSearch
from tests.helpers import assert_close

V, PAD, STOP = 5, 9, 2
PROMPTS = [(3, 4), (0, 4), (1, 1)]


@functools.cache
def random_logits(text):
    """Logits float64 (V,) after a text (a tuple of ids), of which every token and place counts."""
    seed = sum((i + 1) * 7 ** k for k, i in enumerate(text))
    return 2 * torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def log_p_after(logits, text):
    """What `Texts` scores each next token by: log p with its penalty, a list."""
    return [(1 + 0.1 * token) * x for token, x in enumerate(logits(text).log_softmax(0).tolist())]


class Texts:
    """A DecodingState in its simplest form: the whole texts, and logits of what follows them."""

    def __init__(self, logits, prompts):
        self.logits_of, self.texts, self.steps = logits, list(prompts), 0
        self.length = len(prompts[0])
        self.logits = torch.stack([logits(text) for text in self.texts])

    def feed(self, x):
        self.texts = [text + tuple(new) for text, new in zip(self.texts, x.tolist(), strict=True)]
        self.length, self.steps = self.length + 1, self.steps + 1
        self.logits = torch.stack([self.logits_of(text) for text in self.texts])

    def penalize(self, scores):
        return scores * (1 + 0.1 * torch.arange(scores.shape[1]))

    def repeat(self, times):
        self.texts = [text for text in self.texts for _ in range(times)]
        self.logits = self.logits.repeat_interleave(times, dim=0)

    def reorder(self, rows, since=0):
        self.texts = [own[:since] + self.texts[row][since:]
                      for own, row in zip(self.texts, rows.tolist(), strict=True)]


def search(texts, num_beams, tokens, stop=(STOP,), length_penalty=1.0, early_stopping=False):
    return BeamSearch(texts, num_beams, tokens, torch.tensor(stop, dtype=torch.int64), PAD,
                      length_penalty, early_stopping).search()


def slow_search(logits, prompt, num_beams, tokens, stop, length_penalty, early_stopping):
    """The class's docstring, one prompt at a time."""
    beams, finished = [(0.0, ())], []
    for n in range(1, tokens + 1):
        options = sorted(((score + log_p, text + (token,)) for score, text in beams
                          for token, log_p in enumerate(log_p_after(logits, prompt + text))),
                         reverse=True)
        ended = [option[1][-1] in stop or n == tokens for option in options]
        finished += [(option[0] / n ** length_penalty, option[1])
                     for option, end in zip(options[:num_beams], ended) if end]
        finished = sorted(finished, reverse=True)[:num_beams]
        beams = [option for option, end in zip(options, ended) if not end][:num_beams]
        if len(finished) == num_beams and (early_stopping or not beams or
                                           beams[0][0] / n ** length_penalty <= finished[-1][0]):
            break
    return finished[0][1]


def padded(rows):
    longest = max(map(len, rows))
    return [[*row] + [PAD] * (longest - len(row)) for row in rows]


class TestBeamSearch:
    @pytest.mark.parametrize("early_stopping", [True, False])
    @pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.5])
    @pytest.mark.parametrize("stop", [(), (STOP,), (1, STOP, 4), (0, 1, STOP, 3, 4)], ids=str)
    @pytest.mark.parametrize("num_beams", [1, 2, 3])
    def test_a_few_beams_find_what_a_slow_loop_finds(self, num_beams, stop, length_penalty,
                                                     early_stopping):
        rest = num_beams, 7, stop, length_penalty, early_stopping
        expected = [slow_search(random_logits, prompt, *rest) for prompt in PROMPTS]
        assert_close("ids (B, N)", search(Texts(random_logits, PROMPTS), *rest), padded(expected))

    def test_it_ends_when_every_prompt_is_done(self):
        texts = Texts(random_logits, PROMPTS)
        search(texts, 2, 50, early_stopping=True)
        assert texts.steps < 25, f"{texts.steps} tokens of each beam went to the model"

    def test_step_keeps_as_many_beams_when_the_likeliest_tokens_all_end(self):
        texts = Texts(random_logits, [(0,), (1,)])
        beams = BeamSearch(texts, 2, 5, torch.tensor([2, 3, 4]), PAD, 1.0, False)
        log_p = torch.tensor([-7.0, -8.0, -1.0, -2.0, -3.0]).repeat(2, 2, 1)
        rows, token = beams.step(log_p, 0)
        assert_close("log p of the beams (B, W)", beams.scores, [[-7.0, -8.0]] * 2)
        assert_close("token (B * W, 1)", token, [[0], [1], [0], [1]])
        assert_close("prompts of the rows (B * W,)", rows // 2, [0, 0, 1, 1])
