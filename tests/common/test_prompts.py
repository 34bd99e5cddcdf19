"""Ids and labels of segments and dialogues: what the loss counts, in every position."""
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from common.prompts import (ASSISTANT, BOS, EOS, HOUSE, IMAGES, PAD, SYSTEM, TEMPLATES,
                            USER, Segment, Template, collate, find_template, labels_of,
                            merge_texts, render)
from tests.helpers import IMAGE, Words, assert_close, refused, unchanged


class Spaces(Words):
    """A vocabulary of words in which a space before nothing is a token too, "_"."""
    words = [*Words.words, "_", "{}", "{0}", "<eos>", "USER:", "ASSISTANT:", "brief"]
    special = {**Words.special, SYSTEM: "<system>", USER: "<user>", ASSISTANT: "<assistant>",
               -200: "<picture>"}

    def encode(self, text):
        return [16 + self.words.index(word or "_") for word in text.split(" ") if text]


class Toy(Spaces):
    """Spaces without a token for a new line."""
    eos_id = EOS

    def encode(self, text):
        return super().encode(text.replace("\n", ""))


class Letters:
    """A vocabulary of characters; as in SentencePiece every text begins with a mark, "|"."""
    image_id = IMAGE

    def __init__(self, bos_id=1, eos_id=2):
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text):
        return [1000 + ord(letter) for letter in "|" + text]

    def spell(self, ids):
        special = {self.bos_id: "<S>", self.eos_id: "</S>", IMAGE: "<IMAGE>", -100: "-"}
        return [special.get(i) or chr(i - 1000) for i in ids]


GOLDEN = {        # what is read and what is learned, in turns; capital <S>, </S>, <IMAGE> are ids
    "v0": ["<S>|SYS\n\n### Human: <IMAGE>|\nQ1\n### Assistant:", "|A1\n###",
           "|Human: Q2\n### Assistant:", "|A2\n###"],
    "v1": ["<S>|SYS USER: <IMAGE>|\nQ1 ASSISTANT:", "|A1</S>", "|USER: Q2 ASSISTANT:", "|A2</S>"],
    "plain": ["<S><IMAGE>", "|A1\n", "", "A2\n"],                        # answers are neighbours
    "bare": ["<S><IMAGE>|Q1", "|A1</S>", "|Q2", "|A2</S>"],
    "llama-2": ["<S>|[INST] <<SYS>>\nSYS\n<</SYS>>\n\n<IMAGE>|\nQ1 [/INST]", "|A1 </S>",
                "<S>|[INST] Q2 [/INST]", "|A2 </S>"],
    "chatml": ["|<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\n<IMAGE>|\nQ1<|im_end|>\n"
               "<|im_start|>assistant\n", "|A1<|im_end|>\n",
               "|<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", "|A2<|im_end|>\n"]}
VOCABULARIES = [(1, 2), (2, 50256)]                  # the house's and LLaMA's; others


def spelled(name, *texts, images=0, ids=(1, 2), **how):
    """A dialogue as text: all of it, and of its labels those that count."""
    segments = find_template(name).segments(turns(*texts, images=images), **how)
    letters = Letters(*ids)
    return tuple("".join(letters.spell([i for i in row if i != -100]))
                 for row in render(segments, letters))


def assert_spells(rendered, ids, labels):
    """Ids and labels as text; "-" is an ignored label."""
    for name, got, expected in zip(("ids", "labels"), rendered, (ids, labels)):
        got = Spaces().spell(got)
        assert got == expected, f"{name}:\n{got}\nexpected:\n{expected}"


def turns(*texts, images=0):
    """(prompt, answer, prompt, answer, ...) as turns; the images belong to the first one."""
    made = [{"prompt": a, "answer": b} for a, b in zip(texts[::2], texts[1::2])]
    made[0]["images"] = ["picture"] * images
    return made


def dialogue(template, *texts, images=0, **how):
    """(ids, labels) of a dialogue."""
    return render(template.segments(turns(*texts, images=images), **how), Spaces())


class TestSegment:
    def test_it_is_not_learned_unless_it_says_so_and_never_changes(self):
        segment = Segment("a")
        assert segment == Segment("a", False) != Segment("a", True), segment
        with pytest.raises(dataclasses.FrozenInstanceError):
            segment.learn = True


class TestMergeTexts:
    def test_neighbouring_texts_are_one_where_both_are_learned_or_neither(self):
        segments = [Segment("a"), Segment("b "), Segment((1, 2)), Segment((3,)), Segment("c"),
                    Segment("d", True), Segment("e", True), Segment("f", True), Segment("g")]
        before, merged = list(segments), merge_texts(segments)
        assert merged == [Segment("ab "), Segment((1, 2)), Segment((3,)), Segment("c"),
                          Segment("def", True), Segment("g")], merged
        assert segments == before, "the caller's list has changed"


class TestRender:
    def test_each_segment_gives_ids_and_either_all_or_none_of_their_labels(self):
        assert_spells(render([Segment((BOS, IMAGE)), Segment("what is this ?"),
                              Segment("a red cat", learn=True), Segment((IMAGE, EOS), learn=True)],
                             Spaces()),
                      "<bos> <image> what is this ? a red cat <image> <eos>",
                      "- - - - - - a red cat <image> <eos>")

    def test_a_named_id_is_the_tokenizers(self):
        segments = [Segment(("bos_id", 5)), Segment(("eos_id",), learn=True)]
        assert render(segments, Letters(7, 9)) == ([7, 5, 9], [-100, -100, 9])

    def test_neighbouring_texts_are_encoded_as_one(self):
        assert_spells(render([Segment("what "), Segment("is")], Spaces()), "what is", "- -")

    def test_a_text_that_spells_a_special_token_is_only_text(self):
        assert EOS not in render([Segment("a <eos>", learn=True)], Spaces())[0], "EOS was parsed"

    @pytest.mark.parametrize("length, expected", [(4, [5]), (5, [5, 6]), (9, [5, 6, 7])])
    def test_too_long_a_text_loses_its_end_and_its_labels_with_it(self, length, expected):
        ids, labels = render([Segment((2, 3, 4)), Segment((5, 6, 7), learn=True)], None, length)
        assert_close("ids", ids, [2, 3, 4] + expected)
        assert_close("labels", labels, [-100] * 3 + expected)

    @pytest.mark.parametrize("segments, length, values", [
        ([((20,) * 7,), ((30, 31), True)], 7, "9.* 8.* 7"), ([((5,), True), ((6,),)], None, "2"),
        ([((5, 6),), ("", True)], 9, "2")])
    def test_a_row_that_would_train_nothing_is_refused(self, segments, length, values):
        with refused(values):
            render([Segment(*segment) for segment in segments], Spaces(), length)

    def test_a_row_in_which_nothing_is_to_be_learned_is_cut_too(self):
        assert_close("labels", render([Segment((5, 6, 7))], None, 2)[1], [-100] * 2)


class TestTemplate:
    def test_every_answer_and_its_end_are_learned_and_nothing_else(self):
        spoken = turns("what is this ?", "a red cat", "is", "dog", "this", "a cat", images=2)
        spoken[1]["images"] = ["picture"]        # a turn without images may leave them out
        assert_spells(
            render(HOUSE.segments(spoken), Spaces()),
            "<bos> <user> <image> <image> what is this ? <assistant> a red cat <eos> "
            "<user> <image> is <assistant> dog <eos> <user> this <assistant> a cat <eos>",
            "- - - - - - - - - a red cat <eos> - - - - dog <eos> - - - a cat <eos>")

    @pytest.mark.parametrize("default, system, begin", [
        ("", "brief", "<system> brief "), ("a", "brief", "<system> brief "),
        ("a", None, "<system> a "), ("a", "", ""), ("", None, "")])
    def test_a_system_text_goes_first_and_is_not_learned(self, default, system, begin):
        rendered = dialogue(Template(default_system=default), "is", "red", system=system)
        assert_spells(rendered, f"<bos> {begin}<user> is <assistant> red <eos>",
                      f"- {'- ' * len(begin.split())}- - - red <eos>")

    def test_a_prompt_ends_where_the_last_answer_begins(self):
        assert_spells(dialogue(HOUSE, "is", "red", "what", "", images=1, is_prompt=True),
                      "<bos> <user> <image> is <assistant> red <eos> <user> what <assistant>",
                      "- - - - - red <eos> - - -")

    def test_another_template_of_texts_and_of_ids(self):
        # LLaVA's second one: SYS USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>
        vicuna = Template(system=("{} ",), user=("USER: ", IMAGES, "{} "), image=(-200, "? "),
                          assistant=("ASSISTANT:",), default_system="brief")
        assert_spells(dialogue(vicuna, "what", "a cat", "is", "red", images=1),
                      "<bos> brief USER: _ <picture> ? what ASSISTANT: a cat <eos> "
                      "USER: is ASSISTANT: red <eos>",
                      "- - - - - - - - a cat <eos> - - - red <eos>")

    @pytest.mark.parametrize("end, string", [
        ((EOS,), ""), ((("eos_id",),), ""), (("\n###",), "###"), ((" ", ("eos_id",)), ""),
        (("\n",), "\n"), (("<|im_end|>", "\n"), "<|im_end|>"), ((" . ", " x "), ".  x")])
    def test_a_text_that_ends_answers_is_its_stop_string(self, end, string):
        assert Template(end=end).stop_string == string

    def test_a_caption_alone_with_an_end_of_its_own(self):
        plain = Template(user=(IMAGES,), assistant=(), end=(IMAGE, EOS))
        assert_spells(dialogue(plain, "left out", "a cat", images=1),
                      "<bos> <image> a cat <image> <eos>", "- - a cat <image> <eos>")

    def test_braces_in_a_turn_are_only_braces(self):
        rendered = dialogue(Template(user=("{0} {} _",)), "{} {0}", "{}")
        assert_spells(rendered, "<bos> {0} {} {0} _ <assistant> {} <eos>", "- - - - - - {} <eos>")

    def test_ids_inside_a_turn(self):
        spoken = [{"prompt": ("is", 5, "this"), "answer": (6, "a cat", 7), "images": ["one"]}]
        segments = Template(begin=(3,), user=(4, "{}"), assistant=(8,), end=()).segments(spoken)
        verb, this, a, cat = Spaces().encode("is this a cat")
        assert render(segments, Spaces()) == ([3, 4, verb, 5, this, 8, 6, a, cat, 7],
                                              [-100] * 6 + [6, a, cat, 7])

    @pytest.mark.parametrize("ids", VOCABULARIES)
    @pytest.mark.parametrize("name", GOLDEN)
    def test_the_released_strings_and_their_labels(self, name, ids):
        spoken, letters = turns("Q1", "A1", "Q2", "A2", images=1), Letters(*ids)
        got = render(find_template(name).segments(spoken, "SYS"), letters)
        assert "".join(letters.spell(got[0])) == "".join(GOLDEN[name])
        sizes = [len(part) - 2 * part.count("<S>") - 3 * part.count("</S>")
                 - 6 * part.count("<IMAGE>") for part in GOLDEN[name]]
        learned = [part % 2 for part, size in enumerate(sizes) for _ in range(size)]
        expected = [i if learn else -100 for i, learn in zip(got[0], learned, strict=True)]
        assert letters.spell(got[1]) == letters.spell(expected)

    @pytest.mark.parametrize("name", GOLDEN)
    def test_an_open_turn_is_the_begin_of_the_whole(self, name):
        for texts, parts in ((("Q1", "A1"), 1), (("Q1", "A1", "Q2", "A2"), 3)):
            got = spelled(name, *texts, images=1, system="SYS", is_prompt=True)
            expected = "".join(GOLDEN[name][:parts]), "".join(GOLDEN[name][1:parts:2])
            assert got == expected, name

    def test_the_labels_of_llavas_second_template(self):
        for texts, expected in ((("what", "a cat", "is", "red"), {7, 8, 9, 13, 14}),
                                (("what", "a cat", "is", "red", "this ?", "dog"),
                                 {7, 8, 9, 13, 14, 19, 20})):
            segments = TEMPLATES["v1"].segments(turns(*texts, images=1), "brief")
            labels = render(segments, Toy())[1]
            got = {i for i, label in enumerate(labels) if label != -100}
            assert got == expected, labels
            assert len(labels) == max(expected) + 1, labels

    def test_the_labels_of_a_caption(self):
        labels = render(TEMPLATES["plain"].segments(turns("Q", "red", images=1)), Letters())[1]
        assert [i for i, label in enumerate(labels) if label != -100] == [2, 3, 4, 5, 6], labels

    @pytest.mark.parametrize("name, system", [
        ("house", ""), ("plain", ""), ("bare", ""), ("chatml", "You are a helpful assistant."),
        ("v0", "A chat between a curious human and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the human's questions."),
        ("v1", "A chat between a curious user and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the user's questions."),
        ("llama-2", "You are a helpful language and vision assistant. You are able to understand "
                    "the visual content that the user provides, and assist the user with a variety "
                    "of tasks using natural language.")])
    def test_the_released_system_texts(self, name, system):
        assert find_template(name).default_system == system

    @pytest.mark.parametrize("images, image_first, expected", [
        (0, True, "|USER: Q1 ASSISTANT:"), (1, True, "|USER: <IMAGE>|\nQ1 ASSISTANT:"),
        (2, True, "|USER: <IMAGE>|\n<IMAGE>|\nQ1 ASSISTANT:"), (0, False, "|USER: Q1 ASSISTANT:"),
        (1, False, "|USER: Q1\n<IMAGE>| ASSISTANT:"),
        (2, False, "|USER: Q1\n<IMAGE>|\n<IMAGE>| ASSISTANT:")])
    def test_images_stand_before_or_behind_their_turns_text(self, images, image_first, expected):
        got = spelled("v1", "Q1", "A1", "Q2", "A2", images=images, image_first=image_first,
                      system="")
        assert got == (f"<S>{expected}|A1</S>|USER: Q2 ASSISTANT:|A2</S>", "|A1</S>|A2</S>")

    @pytest.mark.parametrize("name", [name for name in GOLDEN if name != "plain"])
    def test_images_stand_at_random(self, name):
        both = [spelled(name, "Q1", "A1", images=1, image_first=first) for first in (True, False)]
        drawn = [spelled(name, "Q1", "A1", images=1, image_first="random", rng=random.Random(seed))
                 for seed in range(40)]
        assert set(drawn) == set(both) and 8 < drawn.count(both[0]) < 32, "one order prevails"
        assert drawn[:9] == [spelled(name, "Q1", "A1", images=1, image_first="random",
                                     rng=random.Random(seed)) for seed in range(9)]

    @pytest.mark.parametrize("text", ["</s>", "<s>", "<image>", "###", "{}", "<|im_end|>"])
    @pytest.mark.parametrize("name", GOLDEN)
    def test_a_users_text_is_only_text(self, name, text):
        got = spelled(name, "Q1", "A1", text, "A2", images=1, system="SYS")
        expected = "".join(GOLDEN[name]).replace("Q2", text), "".join(GOLDEN[name][1::2])
        assert got == expected, text

    @pytest.mark.parametrize("texts, is_prompt, values", [
        ((), False, "0"), ((), True, "0"), (("Q", "", "Q", "A"), True, "1.*2"),
        (("Q", "A", "Q", ""), False, "2.*2")])
    def test_a_dialogue_without_turns_or_answers_is_refused(self, texts, is_prompt, values):
        with refused(values):
            TEMPLATES["v1"].segments(turns(*texts) if texts else [], is_prompt=is_prompt)


class TestFindTemplate:
    def test_each_name_has_its_template(self):
        assert list(TEMPLATES) == ["house", "v0", "v1", "plain", "bare", "llama-2",
                                   "chatml"]
        for name, template in TEMPLATES.items():
            assert find_template(name) is template, name

    def test_another_name_is_refused_with_those_that_there_are(self):
        with refused("v2.*house.*v0.*v1.*plain.*bare.*llama-2.*chatml"):
            find_template("v2")


class TestCollate:
    @pytest.mark.parametrize("options, ids, labels, mask", [
        ({}, [[5, 6, 7], [8, PAD, PAD], [PAD, 9, PAD]],
         [[5, 6, 7], [8, -100, -100], [PAD, 9, -100]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        ({"side": "left", "pad_id": 3}, [[5, 6, 7], [3, 3, 8], [3, PAD, 9]],   # none after padding
         [[5, 6, 7], [-100] * 3, [-100, -100, 9]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]])])
    def test_padding_has_no_label_and_is_masked(self, options, ids, labels, mask):
        rows = [([5, 6, 7], [5, 6, 7]), ([8], [8]), ([PAD, 9], [PAD, 9])]
        batch = collate(rows, **options)
        assert_close("ids (B, T)", batch["ids"], ids)
        assert_close("labels (B, T)", batch["labels"], labels)
        assert_close("mask (B, T)", batch["mask"], torch.tensor(mask).bool())
        assert rows[1:] == [([8], [8]), ([PAD, 9], [PAD, 9])], f"the caller's rows became {rows}"

    @pytest.mark.parametrize("rows, values", [
        ([], ""), ([([5], [5]), ([], [])], "1.*0"),
        ([([5], [5]), ([5, 6], [5])], "1.*2"), ([([], [5])], "0.*1")])
    def test_nothing_and_rows_without_ids_or_labels_are_refused(self, rows, values):
        with refused(values):
            collate(rows)


class TestLabelsOf:
    @pytest.mark.parametrize("pad_id, eos_id, ids, labels", [
        (0, 2, [[1, 5, 0, 7, 0, 0], [1, 2, 2, 4, 5, 2]],
         [[1, 5, 0, 7, -100, -100], [1, 2, 2, 4, 5, 2]]),
        (9, 2, [[9, 5, 0, 0, 9, 9]], [[9, 5, 0, 0, -100, -100]]),
        # Where the end pads too, the first of them is the end of the text.
        (9, 9, [[9, 5, 9, 7, 9, 9], [2, 3, 4, 5, 6, 9], [2, 3, 4, 5, 6, 7]],
         [[9, 5, 9, 7, 9, -100], [2, 3, 4, 5, 6, 9], [2, 3, 4, 5, 6, 7]])])
    def test_padding_alone_has_no_label(self, pad_id, eos_id, ids, labels):
        given = torch.tensor(ids)
        with unchanged(ids=given):
            found = labels_of(given, SimpleNamespace(pad_id=pad_id, eos_id=eos_id))
        assert_close("labels (B, T)", found, labels)
