"""Ids and labels of segments and dialogues: what the loss counts, in every position."""
import pytest
import torch

from common.data.tokenizer import (ASSISTANT, BOS, EOC, EOS, IMAGE, PAD, SPECIAL, SYSTEM, USER,
                                   Tokenizer)
from common.language import LanguageConfig
from common.prompts import (CAPTION_PROMPT, HOUSE, IMAGES, QUESTION_PROMPT, Segment, Template,
                            collate, labels_of, render)

WORDS = ["what colour is it?", "a red circle", "is there a star?", "yes", "be brief",
         "how many objects?", "two"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(WORDS, 400)


def turns(*texts, images=0):
    """(prompt, answer, prompt, answer, ...) as turns; the images belong to the first one."""
    made = [{"prompt": a, "answer": b, "images": []} for a, b in zip(texts[::2], texts[1::2])]
    made[0]["images"] = ["picture"] * images
    return made


def dialogue(tokenizer, *texts, images=0, template=HOUSE, **how):
    """(ids, labels) of a dialogue."""
    return render(template.segments(turns(*texts, images=images), **how), tokenizer)


def learned(ids, labels):
    """Where labels are; everywhere else they are -100, and where they are they equal the ids."""
    assert len(ids) == len(labels)
    assert all(label in (-100, i) for i, label in zip(ids, labels))
    return [k for k, label in enumerate(labels) if label != -100]


class Words:
    """A toy vocabulary: a number from 10 up for each word; a space before nothing is a token."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        pieces = text.replace("\n", " ").split(" ")
        pieces = pieces[1:] if text.startswith("\n") else pieces
        return [self.ids.setdefault(piece or "_", 10 + len(self.ids)) for piece in pieces]


VICUNA = Template(system=("{} ",), user=("USER: ", IMAGES, "{} "), assistant=("ASSISTANT:",),
                  image=(-200, "\n"), default_system="SYS")


class TestRender:
    def test_ids_and_labels_segment_by_segment(self, tokenizer):
        a, b = tokenizer.encode("what colour is it?"), tokenizer.encode("a red circle")
        ids, labels = render([Segment((BOS, IMAGE)), Segment("what colour is it?"),
                              Segment("a red circle", learn=True), Segment((EOC, EOS), learn=True)],
                             tokenizer)
        assert ids == [BOS, IMAGE, *a, *b, EOC, EOS]
        assert labels == [-100] * (2 + len(a)) + [*b, EOC, EOS]

    def test_a_text_that_spells_a_special_token_is_only_text(self, tokenizer):
        text = "<image> <eos></s><assistant> <|endoftext|>"
        ids, _ = render([Segment(text)], tokenizer)
        assert min(ids) >= len(SPECIAL) and tokenizer.decode(ids) == text
        ids, labels = dialogue(tokenizer, text, text)
        assert [i for i in ids if i < len(SPECIAL)] == [BOS, USER, ASSISTANT, EOS]
        assert learned(ids, labels) == list(range(ids.index(ASSISTANT) + 1, len(ids)))

    def test_neighbouring_texts_are_cut_as_one_where_both_are_learned_or_neither(self, tokenizer):
        whole, _ = render([Segment("what colour is it?")], tokenizer)
        assert render([Segment("what co"), Segment("lour is it?")], tokenizer)[0] == whole
        ids, labels = render([Segment("what co"), Segment("lour is it?", learn=True)], tokenizer)
        assert ids == tokenizer.encode("what co") + tokenizer.encode("lour is it?")
        assert learned(ids, labels) == list(range(len(tokenizer.encode("what co")), len(ids)))

    def test_too_long_a_text_loses_its_end_and_its_labels_with_it(self, tokenizer):
        segments = [Segment("what colour is it?"), Segment("a red circle", learn=True)]
        ids, labels = render(segments, tokenizer)
        for length in range(len(tokenizer.encode(WORDS[0])) + 1, len(ids) + 3):
            assert render(segments, tokenizer, length) == (ids[:length], labels[:length])

    def test_a_row_without_labels_is_refused_where_there_should_be_some(self, tokenizer):
        segments = [Segment(tuple(range(20, 27))), Segment((30, 31), learn=True)]
        with pytest.raises(ValueError, match="a text of 9 tokens: its first label is token 8, "
                                             "beyond the context of 7"):
            render(segments, tokenizer, 7)
        assert learned(*render(segments, tokenizer, 8)) == [7]
        assert render(segments[:1], tokenizer, 5)[1] == [-100] * 5    # nothing was to be learned

    def test_a_label_at_the_first_token_alone_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="a text of 2 tokens has no label after its first"):
            render([Segment((5,), learn=True), Segment((6,))], tokenizer)


class TestTemplate:
    def test_every_answer_and_its_end_are_learned_and_nothing_else(self, tokenizer):
        q1, a1, q2, a2, q3, a3 = (tokenizer.encode(w) for w in
                                  (WORDS[0], WORDS[1], WORDS[2], WORDS[3], WORDS[5], WORDS[6]))
        ids, labels = dialogue(tokenizer, *WORDS[:4], *WORDS[5:], images=2)
        assert ids == [BOS, USER, IMAGE, IMAGE, *q1, ASSISTANT, *a1, EOS, USER, *q2, ASSISTANT, *a2,
                       EOS, USER, *q3, ASSISTANT, *a3, EOS]
        want = [-100] * (5 + len(q1)) + [*a1, EOS] + [-100] * (2 + len(q2)) + [*a2, EOS]
        assert labels == want + [-100] * (2 + len(q3)) + [*a3, EOS]
        assert labels.count(EOS) == 3           # the end of every turn, not of the last alone

    def test_a_later_turn_may_have_images_too(self, tokenizer):
        spoken = turns("a", "b", "a", "b")
        spoken[1]["images"] = ["picture"] * 2
        del spoken[0]["images"]                 # a text-only turn may leave them out
        a, b = tokenizer.encode("a"), tokenizer.encode("b")
        assert render(HOUSE.segments(spoken), tokenizer)[0] == [
            BOS, USER, *a, ASSISTANT, *b, EOS, USER, IMAGE, IMAGE, *a, ASSISTANT, *b, EOS]

    @pytest.mark.parametrize("question", ["yes", "how many objects?"])
    def test_the_labels_do_not_depend_on_the_length_of_the_question(self, tokenizer, question):
        _, labels = dialogue(tokenizer, question, "two")
        assert [i for i in labels if i != -100] == [*tokenizer.encode("two"), EOS]

    def test_a_system_text_is_not_learned(self, tokenizer):
        ids, labels = dialogue(tokenizer, WORDS[0], "yes", system="be brief")
        brief = tokenizer.encode("be brief")
        assert ids[:3 + len(brief)] == [BOS, SYSTEM, *brief, USER]
        assert learned(ids, labels) == list(range(ids.index(ASSISTANT) + 1, len(ids)))

    def test_a_prompt_is_the_beginning_of_the_dialogue_and_ends_where_the_answer_begins(
            self, tokenizer):
        whole, _ = dialogue(tokenizer, WORDS[0], "yes", WORDS[2], "two", images=1)
        ids, labels = dialogue(tokenizer, WORDS[0], "yes", WORDS[2], "", images=1, is_prompt=True)
        assert ids == whole[:len(ids)] and ids[-1] == ASSISTANT
        assert whole[len(ids):] == [*tokenizer.encode("two"), EOS]
        assert dialogue(tokenizer, WORDS[0], "yes", is_prompt=True)[0] == [
            BOS, USER, *tokenizer.encode(WORDS[0]), ASSISTANT]

    def test_another_template_of_texts_and_of_ids(self):
        # LLaVA's second template: SYS USER: <image>\nQ1 ASSISTANT: A1 a1</s>USER: Q2 ...
        words = Words()
        ids, labels = dialogue(words, "Q1", "A1 a1", "Q2", "A2", images=1, template=VICUNA)
        names = {value: key for key, value in words.ids.items()}
        names |= {BOS: "BOS", EOS: "EOS", -200: "IMG"}
        assert [names[i] for i in ids] == [
            "BOS", "SYS", "USER:", "_", "IMG", "Q1", "ASSISTANT:", "A1", "a1", "EOS", "USER:", "Q2",
            "ASSISTANT:", "A2", "EOS"]
        assert learned(ids, labels) == [7, 8, 9, 13, 14]
        assert "SYS" not in [names.get(i) for i in dialogue(
            words, "Q1", "A1 a1", template=VICUNA, system="")[0]]

    def test_a_caption_alone_with_the_end_of_a_line_learned(self):
        plain = Template(user=(IMAGES,), assistant=(), end=(13,), default_system="")
        ids, labels = dialogue(Words(), "describe it", "c1 c2", images=1, template=plain)
        assert ids == [BOS, IMAGE, 10, 11, 13] and learned(ids, labels) == [2, 3, 4]

    def test_braces_in_a_turn_are_only_braces(self, tokenizer):
        ids, _ = dialogue(tokenizer, "{} {0} {x}", "{}")
        assert tokenizer.decode(ids) == "{} {0} {x} {}"
        ids, _ = dialogue(tokenizer, "a", "b", template=Template(user=("{x} {} {0}",)))
        assert tokenizer.decode(ids) == "{x} a {0} b"

    def test_an_empty_answer_without_an_end_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="has no label after its first token"):
            dialogue(tokenizer, "a", "", template=Template(end=()))

    def test_the_house_writes_roles_by_their_ids(self):
        assert (HOUSE.begin, HOUSE.system, HOUSE.assistant) == (
            (BOS,), (SYSTEM, "{}"), (ASSISTANT,))


class TestCollate:
    rows = [([5, 6, 7], [-100, 6, 7]), ([8], [-100]), ([PAD, 9], [PAD, 9])]

    def test_padding_has_no_label_and_is_masked(self):
        batch = collate(self.rows)
        assert batch["ids"].tolist() == [[5, 6, 7], [8, PAD, PAD], [PAD, 9, PAD]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3, [PAD, 9, -100]]
        assert batch["mask"].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64

    def test_it_pads_left_for_generation(self):
        batch = collate(self.rows, pad_id=3, side="left")
        assert batch["ids"].tolist() == [[5, 6, 7], [3, 3, 8], [3, PAD, 9]]
        # The first token after padding has no label: padding would have to predict it.
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3, [-100, -100, 9]]
        assert batch["mask"].tolist() == [[True] * 3, [False, False, True], [False, True, True]]

    @pytest.mark.parametrize("row", [([], []), ([5, 6], [5])])
    def test_a_row_without_ids_or_with_labels_of_another_length_is_refused(self, row):
        with pytest.raises(ValueError, match="row 1: . ids and . labels"):
            collate([([5], [5]), row])

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="no rows"):
            collate([])


class TestLabelsOf:
    def test_padding_is_no_label_but_the_same_id_within_a_text_is(self):
        ids = torch.tensor([[1, 5, 0, 7, 0, 0], [1, 2, 3, 4, 5, 6]])
        assert labels_of(ids, LanguageConfig()).tolist() == [
            [1, 5, 0, 7, -100, -100], [1, 2, 3, 4, 5, 6]]

    def test_where_the_end_pads_too_the_first_of_them_is_a_label(self):
        ids = torch.tensor([[9, 5, 9, 7, 9, 9, 9], [9, 2, 3, 4, 5, 6, 9], [9, 2, 3, 4, 5, 6, 7]])
        assert labels_of(ids, LanguageConfig(eos_id=9, pad_id=9)).tolist() == [
            [9, 5, 9, 7, 9, -100, -100], *ids[1:].tolist()]


def test_no_space_stands_at_the_end_of_flamingos_prompts():
    # The answer begins with its space, as a vocabulary has it.
    assert CAPTION_PROMPT == CAPTION_PROMPT.rstrip() == "output:"
    assert QUESTION_PROMPT.format("what?") == "question: what? answer:"
