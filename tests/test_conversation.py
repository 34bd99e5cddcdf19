"""Ids and labels of segments and dialogues: exactly what is learned, in every position."""
import pytest
import torch

from common.prompts import HOUSE, IMAGES, Segment, Template, collate, render, render_dialogue
from common.data.tokenizer import (ASSISTANT, BOS, EOC, EOS, IMAGE, PAD, SYSTEM, USER, Tokenizer)

WORDS = ["what colour is it?", "a red circle", "is there a star?", "yes", "be brief",
         "how many objects?", "two"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(WORDS, 400)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "text": t} for i, t in enumerate(texts)]


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
        said = "<image> <eos></s><assistant> <|endoftext|>"
        ids, _ = render([Segment(said)], tokenizer)
        assert min(ids) >= 32 and tokenizer.decode(ids) == said
        ids, labels = render_dialogue(turns(said, said), tokenizer)
        assert [i for i in ids if i < 32] == [BOS, USER, ASSISTANT, EOS]
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
        for context_length in range(len(tokenizer.encode(WORDS[0])) + 1, len(ids) + 3):
            assert render(segments, tokenizer, context_length) == (ids[:context_length], labels[:context_length])

    def test_a_row_of_which_nothing_is_left_to_learn_is_told(self, tokenizer):
        segments = [Segment(tuple(range(20, 27))), Segment((30, 31), learn=True)]
        with pytest.raises(ValueError, match="a text of 9 tokens: what is to be learned begins at "
                                             "token 8, behind the context of 7"):
            render(segments, tokenizer, 7)
        assert learned(*render(segments, tokenizer, 8)) == [7]
        assert render(segments[:1], tokenizer, 5)[1] == [-100] * 5    # nothing was to be learned


class TestDialogue:
    def test_every_answer_and_its_end_are_learned_and_nothing_else(self, tokenizer):
        q1, a1, q2, a2, q3, a3 = (tokenizer.encode(w) for w in
                                  (WORDS[0], WORDS[1], WORDS[2], WORDS[3], WORDS[5], WORDS[6]))
        ids, labels = render_dialogue(
            turns(WORDS[0], WORDS[1], WORDS[2], WORDS[3], WORDS[5], WORDS[6]), tokenizer, images=2)
        assert ids == [BOS, USER, IMAGE, IMAGE, *q1, ASSISTANT, *a1, EOS, USER, *q2, ASSISTANT, *a2,
                       EOS, USER, *q3, ASSISTANT, *a3, EOS]
        want = [-100] * (5 + len(q1)) + [*a1, EOS] + [-100] * (2 + len(q2)) + [*a2, EOS]
        assert labels == want + [-100] * (2 + len(q3)) + [*a3, EOS]
        assert labels.count(EOS) == 3           # the end of every turn, not of the last alone

    def test_the_loss_does_not_change_with_the_question_of_another_length(self, tokenizer):
        for question in ("yes", "how many objects?"):
            ids, labels = render_dialogue(turns(question, "two"), tokenizer)
            assert [i for i in labels if i != -100] == [*tokenizer.encode("two"), EOS]

    def test_a_system_turn_is_read_and_not_learned(self, tokenizer):
        spoken = [{"role": "system", "text": "be brief"}, *turns(WORDS[0], "yes")]
        ids, labels = render_dialogue(spoken, tokenizer)
        brief = tokenizer.encode("be brief")
        assert ids[:3 + len(brief)] == [BOS, SYSTEM, *brief, USER]
        assert learned(ids, labels) == list(range(ids.index(ASSISTANT) + 1, len(ids)))
        assert len(spoken) == 3                 # the caller's list stays whole

    def test_a_prompt_is_a_samples_beginning_and_ends_where_the_answer_begins(self, tokenizer):
        whole, _ = render_dialogue(turns(WORDS[0], "yes", WORDS[2], "two"), tokenizer, images=1)
        ids, labels = render_dialogue(turns(WORDS[0], "yes", WORDS[2]), tokenizer, images=1,
                                      prompt=True)
        assert ids == whole[:len(ids)] and ids[-1] == ASSISTANT
        assert whole[len(ids):] == [*tokenizer.encode("two"), EOS]

    def test_a_prompt_is_never_cut(self, tokenizer):
        ids, _ = render_dialogue(turns(WORDS[0]), tokenizer, prompt=True)
        assert render_dialogue(turns(WORDS[0]), tokenizer, len(ids), prompt=True)[0] == ids
        with pytest.raises(ValueError, match=f"prompt of {len(ids)} tokens, but the context is 4"):
            render_dialogue(turns(WORDS[0]), tokenizer, 4, prompt=True)

    @pytest.mark.parametrize("roles, prompt", [
        ("", False), ("u", False), ("ua", True), ("au", True), ("uu", False), ("uaa", True),
        ("usa", False), ("ux", False)])
    def test_turns_out_of_order_are_told(self, tokenizer, roles, prompt):
        names = {"u": "user", "a": "assistant", "s": "system", "x": "robot"}
        spoken = [{"role": names[role], "text": "yes"} for role in roles]
        with pytest.raises(ValueError, match=f"the {'user' if prompt else 'assistant'} last"):
            render_dialogue(spoken, tokenizer, prompt=prompt)

    def test_another_template_of_texts_and_of_ids(self):
        # LLaVA's second template: SYS USER: <image>\nQ1 ASSISTANT: A1 a1</s>USER: Q2 ...
        words = Words()
        ids, labels = render_dialogue(turns("Q1", "A1 a1", "Q2", "A2"), words, images=1,
                                      template=VICUNA)
        names = {value: key for key, value in words.ids.items()}
        names |= {BOS: "BOS", EOS: "EOS", -200: "IMG"}
        assert [names[i] for i in ids] == [
            "BOS", "SYS", "USER:", "_", "IMG", "Q1", "ASSISTANT:", "A1", "a1", "EOS", "USER:", "Q2",
            "ASSISTANT:", "A2", "EOS"]
        assert learned(ids, labels) == [7, 8, 9, 13, 14]

    def test_a_caption_alone_with_the_end_of_a_line_learned(self):
        plain = Template(user=(IMAGES,), assistant=(), end=(13,), default_system="")
        ids, labels = render_dialogue(turns("describe it", "c1 c2"), Words(), images=1,
                                      template=plain)
        assert ids == [BOS, IMAGE, 10, 11, 13] and learned(ids, labels) == [2, 3, 4]

    def test_braces_in_what_is_said_are_only_braces(self, tokenizer):
        ids, _ = render_dialogue(turns("{} {0} {x}", "{}"), tokenizer)
        assert tokenizer.decode(ids) == "{} {0} {x} {}"
        ids, _ = render_dialogue(turns("a", "b"), tokenizer, template=Template(user=("{x} {} {0}",)))
        assert tokenizer.decode(ids) == "{x} a {0} b"

    @pytest.mark.parametrize("turn", [{}, {"role": "user"}, {"from": "human", "value": "hi"},
                                      {"role": "user", "text": None}])
    def test_a_turn_without_role_or_text_is_told(self, tokenizer, turn):
        with pytest.raises(ValueError, match="turn 1: .*it needs a role and a text"):
            render_dialogue([{"role": "user", "text": "a"}, turn], tokenizer)

    def test_pictures_without_a_place_are_told(self, tokenizer):
        plain = Template(user=(USER, "{}"))
        with pytest.raises(ValueError, match="2 pictures, but the template's user has no place"):
            render_dialogue(turns("a", "b"), tokenizer, images=2, template=plain)
        assert render_dialogue(turns("a", "b"), tokenizer, template=plain)

    def test_an_answer_of_nothing_is_told(self, tokenizer):
        with pytest.raises(ValueError, match="nothing to be learned behind the first"):
            render_dialogue(turns("a", ""), tokenizer, template=Template(end=()))
        with pytest.raises(ValueError, match="a text of 2 tokens, and nothing to be learned"):
            render([Segment((5,), learn=True), Segment((6,))], tokenizer)


class TestCollate:
    rows = [([5, 6, 7], [-100, 6, 7]), ([8], [-100]), ([PAD, 9], [PAD, 9])]

    def test_padding_is_never_learned_nor_seen(self):
        batch = collate(self.rows)
        assert batch["ids"].tolist() == [[5, 6, 7], [8, PAD, PAD], [PAD, 9, PAD]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3, [PAD, 9, -100]]
        assert batch["mask"].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64

    def test_it_pads_left_for_writing(self):
        batch = collate(self.rows, pad_id=3, side="left")
        assert batch["ids"].tolist() == [[5, 6, 7], [3, 3, 8], [3, PAD, 9]]
        # What stands behind padding is not learned: nothing real comes before it.
        assert batch["labels"].tolist() == [[-100, 6, 7], [-100] * 3, [-100, -100, 9]]
        assert batch["mask"].tolist() == [[True] * 3, [False, False, True], [False, True, True]]

    @pytest.mark.parametrize("row", [([], []), ([5, 6], [5])])
    def test_a_row_without_ids_or_with_labels_of_another_length_is_told(self, row):
        with pytest.raises(ValueError, match="row 1: . ids and . labels"):
            collate([([5], [5]), row])

    def test_no_rows_are_told(self):
        with pytest.raises(ValueError, match="no rows"):
            collate([])

    def test_an_unknown_side_is_told(self):
        with pytest.raises(ValueError, match="side=top: left or right"):
            collate(self.rows, side="top")


def test_the_house_writes_roles_by_their_ids():
    assert (HOUSE.begin, HOUSE.system, HOUSE.assistant) == ((BOS,), (SYSTEM, "{}"), (ASSISTANT,))
