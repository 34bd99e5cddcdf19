"""Flamingo as a Writer writes with it: prompts, cached images, candidates, retrieved shots."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.data.collators import InterleavedCollator
from common.data.images import normalize_pixels
from common.data.tokenizer import BOS, EOC, EOS, IMAGE
from common.evaluation.writing import Writer
from flamingo import render_page
from tests.flamingo.toys import seeded_flamingo
from tests.helpers import Words, drawing, page

ASK = "what is this ?"
RECORDS = [page(("red", "", "a red cat"), ("blue", ASK, "")),
           {"images": drawing("green"), "texts": [""]},
           page(("blue", "", "cat"), ("white", "", "dog"), ("red", "what ?", ""))]
CANDIDATES = [["cat", "a red dog"], ["blue cat", "dog"], ["red", "a blue blue dog"]]


@pytest.fixture
def writer():
    return Writer(seeded_flamingo(), Words())


def prompt(record):
    """The ids of one record's prompt, spelled."""
    ids, _, _ = seeded_flamingo().prepare([record], Words())
    return Words().spell(ids[0].tolist())


class TestPrepare:
    def test_the_last_answer_is_open(self):
        assert prompt(RECORDS[0]) == ("<bos> <image> a red cat <eoc> <image> question: what is this "
                                      "? answer:")
        assert prompt(RECORDS[1]) == "<bos> <image> output:"

    def test_shots_in_words_have_no_image(self):
        record = page(("", ASK, "cat"), ("", ASK, "dog"), ("red", ASK, ""))
        words = "question: what is this ? answer:"
        assert prompt(record) == f"<bos> {words} cat <eoc> {words} dog <eoc> <image> {words}"

    def test_rows_are_padded_left_and_images_right(self, writer):
        ids, mask, state = writer.model.prepare(RECORDS, Words())
        assert state["visual"].shape == (3, 3, 7, 22) and mask[:, -1].all()
        alone = [writer.model.prepare([record], Words()) for record in RECORDS]
        for row, (own, _, one) in enumerate(alone):
            assert ids[row][mask[row]].tolist() == own[0].tolist()
            N = one["visual"].shape[1]
            torch.testing.assert_close(state["visual"][row, :N], one["visual"][0])

    def test_a_prompt_is_never_cut(self, writer):
        ids, _, _ = writer.model.prepare([page(("red", "a " * 60, ""))], Words())
        assert ids.shape[1] > 60

    def test_a_prompt_may_have_no_image_at_all(self, writer):
        words = page(("", "what ?", ""))
        both = writer.generate([words, RECORDS[0]], max_new_tokens=5)
        assert both == [*writer.generate([words], max_new_tokens=5),
                        *writer.generate([RECORDS[0]], max_new_tokens=5)]


class TestWriting:
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_records_together_are_written_as_alone(self, writer, num_beams):
        together = writer.generate(RECORDS, max_new_tokens=7, num_beams=num_beams)
        assert together == [writer.generate([r], max_new_tokens=7, num_beams=num_beams)[0]
                            for r in RECORDS]

    def test_it_is_the_likeliest_text_without_a_cache(self, writer):
        for record in RECORDS:
            ids, _, state = writer.model.prepare([record], Words())
            written = []
            for _ in range(7):
                logits = writer.model.logits(ids, **state)[0, -1]
                logits[IMAGE] = -math.inf
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
                if ids[0, -1] in (EOC, EOS):
                    break
                written.append(ids[0, -1].item())
            assert writer.generate([record], max_new_tokens=7) == [Words().decode(written).strip()]

    def test_no_image_is_ever_written(self, writer):
        writer.model.lm.new.rows.data[0] += 100 * torch.randn(20)
        writer.model.lm.norm.weight.data *= 9
        for num_beams in (1, 2):
            assert len(writer.generate(RECORDS * 2, max_new_tokens=9, num_beams=num_beams)) == 6

    def test_every_token_of_a_candidate_attends_to_the_image(self, writer):
        # The cache of the candidates must know how many images the prompt has had.
        for p in (g for g in writer.model.gated):
            p.attn_gate.data.fill_(1.0)
        scores = writer.score_candidates(RECORDS, CANDIDATES)
        for record, texts, own in zip(RECORDS, CANDIDATES, scores, strict=True):
            ids, _, state = writer.model.prepare([record], Words())
            for text, score in zip(texts, own.tolist()):
                new = Words().encode(text) + [EOC]
                logits = writer.model.logits(torch.cat([ids, torch.tensor([new])], 1), **state)[0]
                logits[:, IMAGE] = -math.inf
                log_p = logits.log_softmax(-1)
                want = sum(log_p[ids.shape[1] + i - 1, t].item() for i, t in enumerate(new))
                assert score == pytest.approx(want)


class TestSelectShots:
    def support(self, *clips):
        return [{"turns": [{"images": [drawing(*colours)], "prompt": ASK, "answer": colours[0]}]}
                for colours in clips]

    def test_the_most_similar_ones_come_last(self, writer):
        support = self.support(("red",), ("blue",), ("white",), ("green",))
        for colour in ("red", "blue", "white"):
            chosen, = writer.model.select_shots([drawing(colour)], support, 2)
            assert len(chosen) == 2 and chosen[-1]["turns"][0]["answer"] == colour

    def test_similarity_is_the_cosine_of_the_mean_over_frames(self, writer):
        tower = writer.model.vision
        collator = InterleavedCollator(None, writer.model.config, render_page)

        def feature(frames):
            images = collator.images([[{"images": [frames]}]])[0, 0]
            return tower.pooled(normalize_pixels(images)).mean(0)
        support = self.support(("red",), ("blue",) * 3, ("white", "blue"), ("green",))
        mixed = drawing("red", "blue", "green")
        cosines = [F.cosine_similarity(feature(mixed), feature(s["turns"][0]["images"][0]),
                                       dim=0).item() for s in support]
        for count in (4, 9):
            chosen, = writer.model.select_shots([mixed], support, count)
            assert chosen == [support[i] for i in sorted(range(4), key=lambda i: cosines[i])]

    def test_each_query_has_its_own(self, writer):
        support = self.support(("red",), ("blue",))
        one, two = writer.model.select_shots([drawing("red"), drawing("blue")], support, 1)
        assert one == support[:1] and two == support[1:]


def test_a_page_of_a_record_is_rendered_alike_for_training_and_prompts():
    turns = page(("red", "", "a cat"), ("blue", ASK, "dog"))["turns"]
    whole, _ = render_page(turns, Words())
    start, _ = render_page(turns, Words(), is_prompt=True)
    assert whole[:len(start)] == start
    assert whole[len(start):] == [*Words().encode("dog"), EOC, EOS] and whole[0] == BOS
