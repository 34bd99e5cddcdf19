"""Flamingo as a Writer writes with it: prompts, cached images, candidates, retrieved shots."""
import math

import pytest
import torch
import torch.nn.functional as F

from common.data.collators import InterleavedCollator
from common.data.images import normalize_pixels
from common.data.tokenizer import EOC, EOS, IMAGE
from common.evaluation.writing import Writer
from flamingo import render_page
from tests.helpers import Words, assert_close, drawing, page, toy_flamingo

ASK = "what is this ?"
RECORDS = [                                                   # of 2, 1, 3, 1 and 0 images
    page(("red", "", "a red cat"), ("blue", ASK, "")),
    {"images": drawing("green"), "texts": [""]},
    page(("blue", "", "cat"), ("white", "", "dog"), ("red", "what ?", "")),
    page(("", ASK, "cat"), ("", ASK, "dog"), ("red", ASK, "")),
    page(("", "", "a cat"), ("", ASK, ""))]
CANDIDATES = [["cat", "a red dog", "blue"], ["blue cat", "dog", "a a cat"],
              ["red", "a blue blue dog", "cat dog"], ["cat", "dog dog", "a"],
              ["dog cat red", "what", "a dog"]]


@pytest.fixture
def writer():
    return Writer(toy_flamingo(), Words())


def prepared(model, record):
    """The ids of one record's prompt, and its visual tokens."""
    ids, mask, state = model.prepare([record], Words())
    assert mask.all()
    return ids[0].tolist(), state["visual"]


def next_logits(model, ids, visual):
    """Logits (T, V) of one text without a cache, <image> banned."""
    logits = model.logits(torch.tensor([ids]), visual=visual)[0]
    logits[:, IMAGE] = -math.inf
    return logits


class TestPrepare:
    @pytest.mark.parametrize("record, prompt", [
        (RECORDS[0], "<bos> <image> a red cat <eoc> <image> question: what is this ? answer:"),
        (RECORDS[1], "<bos> <image> output:"),
        (RECORDS[3], "<bos> question: what is this ? answer: cat <eoc> question: what is this ? "
                     "answer: dog <eoc> <image> question: what is this ? answer:"),
        (RECORDS[4], "<bos> a cat <eoc> question: what is this ? answer:")])
    def test_the_last_answer_is_open_and_shots_in_words_have_no_image(self, writer, record, prompt):
        assert Words().spell(prepared(writer.model, record)[0]) == prompt

    def test_rows_are_padded_left_and_images_right(self, writer):
        ids, mask, state = writer.model.prepare(RECORDS, Words())
        assert state["visual"].shape == (5, 3, 7, 22) and mask[:, -1].all()
        for row, record in enumerate(RECORDS):
            alone, visual = prepared(writer.model, record)
            assert ids[row][mask[row]].tolist() == alone
            N = alone.count(IMAGE)
            assert_close("outputs", state["visual"][row, :N], visual[0, :N])

    def test_a_prompt_is_never_cut(self, writer):
        assert len(prepared(writer.model, page(("red", "", "a " * 60), ("", "", "")))[0]) > 60


class TestGenerate:
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_records_together_are_written_as_alone(self, writer, num_beams):
        how = {"max_new_tokens": 7, "num_beams": num_beams}
        together = writer.generate(RECORDS, **how)
        assert len(set(together)) > 3
        assert together == [writer.generate([record], **how)[0] for record in RECORDS]
        assert together == writer.generate(RECORDS, batch_size=2, **how)

    def test_it_is_the_likeliest_text_without_a_cache_up_to_eoc_or_eos(self, writer):
        assert writer.model.stop_ids == (EOC, EOS)
        for record in RECORDS:
            ids, visual = prepared(writer.model, record)
            written = []
            for _ in range(7):
                token = next_logits(writer.model, ids + written, visual)[-1].argmax().item()
                if token in (EOC, EOS):
                    break
                written.append(token)
            assert writer.generate([record], max_new_tokens=7) == [Words().decode(written)]

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_no_image_is_ever_written(self, writer, num_beams):
        writer.model.lm.new.rows.data[0] += 100 * torch.randn(20)
        writer.model.lm.norm.weight.data *= 9
        writer.tokenizer.decode = Words().spell          # of special tokens too
        texts = writer.generate(RECORDS * 2, max_new_tokens=9, num_beams=num_beams)
        assert "<image>" not in " ".join(texts)


class TestScoreCandidates:
    @pytest.mark.parametrize("only_latest_image", [True, False])
    def test_every_token_of_a_candidate_attends_to_the_image(self, only_latest_image):
        # The cache of the candidates must know how many images the prompt has had.
        writer, want = Writer(toy_flamingo(only_latest_image=only_latest_image), Words()), []
        for record, texts in zip(RECORDS, CANDIDATES, strict=True):
            ids, visual = prepared(writer.model, record)
            for text in texts:
                new = Words().encode(text) + [EOC]
                log_p = next_logits(writer.model, ids + new, visual).log_softmax(-1)
                want.append(sum(log_p[len(ids) + i - 1, t].item() for i, t in enumerate(new)))
        for batch_size in (256, 2, 1):                   # together, in parts, alone
            scores = writer.score_candidates(RECORDS, CANDIDATES, batch_size=batch_size)
            assert_close("outputs", torch.cat(scores), torch.tensor(want, dtype=torch.float64))

    def test_the_image_changes_them(self, writer):
        other = page(("red", "", "a red cat"), ("white", ASK, ""))
        one, two = (writer.score_candidates([record], CANDIDATES[:1])[0]
                    for record in (RECORDS[0], other))
        assert (one - two).abs().min() > 1e-3


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
