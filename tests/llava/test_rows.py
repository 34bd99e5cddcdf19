"""Pictures as views, visual tokens at their places in the text, the wordings of a turn."""
import copy
import random
from types import SimpleNamespace

import pytest
from PIL import Image

from common import prompts
from llava import (REQUESTS, ConversationBatch, instruction_turns, make_batch, make_views,
                   merge_image_tokens, template_of)
from tests.helpers import (BOS, EOS, IMAGE, AnyWords, assert_close, drawing, llava_config, page,
                           refused)

RED, GREEN, BLUE, GREY, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (122, 116, 104), (0, 0, 0)
P, SHORT = 9, "Answer the question using a single word or phrase."


def bands(upright=False, width=10, height=10):
    """A picture of a red, a green and a blue square, side by side or one upon the other."""
    picture = Image.new("RGB", (3 * width, height))
    for k, colour in enumerate((RED, GREEN, BLUE)):
        picture.paste(colour, (k * width, 0, (k + 1) * width, height))
    return picture.transpose(Image.Transpose.TRANSPOSE) if upright else picture


def seen(view, upright=False):
    """Nine pixels of a view, three in each of its rows (columns, of an upright picture)."""
    places = [[(x, y) for x in (2, 7, 12)] for y in (2, 7, 12)]
    return [[view.getpixel(place[::-1] if upright else place) for place in row] for row in places]


class TestMakeViews:
    @pytest.mark.parametrize("upright", [False, True])
    @pytest.mark.parametrize("views, rows", [
        ("crop", [[GREEN] * 3] * 3), ("squash", [[RED, GREEN, BLUE]] * 3),
        ("pad", [[GREY] * 3, [RED, GREEN, BLUE], [GREY] * 3])])
    def test_a_picture_is_cropped_padded_or_squashed_to_a_square(self, views, rows, upright):
        (view,), order = make_views(bands(upright), llava_config(views=views))
        assert view.size == (15, 15) and order == [*range(P)]
        assert seen(view, upright) == rows

    @pytest.mark.parametrize("views", ["crop", "pad", "squash"])
    def test_a_picture_of_the_size_of_a_view_stays(self, views):
        picture = Image.effect_noise((15, 15), 99).convert("RGB")
        (view,), order = make_views(picture, llava_config(views=views, projector="adapter"))
        assert view.tobytes() == picture.tobytes() and order == [*range(4)], "4 queries"

    @pytest.mark.parametrize("upright", [False, True])
    def test_the_squashed_whole_stands_before_the_tiles_row_by_row(self, upright):
        views, order = make_views(bands(upright, 15, 15), llava_config(views="tiles"))
        assert seen(views[0], upright) == [[RED, GREEN, BLUE]] * 3
        assert [view.getpixel((7, 7)) for view in views[1:]] == [RED, GREEN, BLUE]
        tiles = [[P * (1 + t) + 3 * r + c for c in range(3)] for r in range(3) for t in range(3)]
        rows = [sum(tiles[k:k + 3], []) for k in (0, 3, 6)]           # three tiles side by side
        if upright:
            rows = [[P * (1 + t) + 3 * r + c for c in range(3)]
                    for t in range(3) for r in range(3)]
        assert order == [*range(P), *(k for row in rows for k in [*row, -1])]

    @pytest.mark.parametrize("size, count, views", [
        ((16, 8), 52, 3), ((8, 16), 56, 3), ((10, 10), 88, 5), ((12, 5), 52, 3), ((32, 8), 34, 3)])
    def test_the_released_codes_number_of_tokens(self, size, count, views):
        vision = llava_config().vision.__class__(image_size=8, patch_size=2)
        config = llava_config(vision=vision, views="tiles", grids=((1, 2), (2, 1), (2, 2)),
                              context_length=199)
        found, order = make_views(Image.new("RGB", size, RED), config)
        assert (len(order), len(found)) == (count, views)
        assert all(k < 16 * views for k in order) and order[-1] == -1
        assert found[-1].getpixel((7, 7)) == (BLACK if size in ((12, 5), (32, 8)) else RED)


class TestMergeImageTokens:
    def test_each_row_has_its_own_images_at_their_places(self):
        rows = [([21, IMAGE, 22, 23, IMAGE], [-100, -100, -100, 23, -100]), ([24, 25], [-100, 25]),
                ([IMAGE, 26], [-100, 26])]
        images, before = [[[1, 2, 3], [4, 0]], [], [[5, 6]]], copy.deepcopy(rows)
        batch = merge_image_tokens(rows, images, IMAGE)
        assert rows == before and images == [[[1, 2, 3], [4, 0]], [], [[5, 6]]], "they change"
        assert_close("feature_index (B, T)", batch["feature_index"], [
            [-1, 1, 2, 3, -1, -1, 4, 0], [-1] * 8, [5, 6] + [-1] * 6])
        assert_close("ids (B, T)", batch["ids"], [
            [21, 0, 0, 0, 22, 23, 0, 0], [24, 25] + [0] * 6, [0, 0, 26] + [0] * 5])
        assert_close("labels (B, T)", batch["labels"], [
            [-100] * 5 + [23, -100, -100], [-100, 25] + [-100] * 6, [-100, -100, 26] + [-100] * 5])
        real = [[1] * 8, [1, 1] + [0] * 6, [1, 1, 1] + [0] * 5]
        assert_close("mask (B, T)", batch["mask"].int(), real)

    def test_padding_on_the_left(self):
        rows = [([21, IMAGE], [21, IMAGE]), ([22, 23], [22, 23]), ([IMAGE, 24], [-100, 24])]
        batch = merge_image_tokens(rows, [[[7, 8, 9]], [], [[5]]], IMAGE, side="left")
        assert_close("ids (B, T)", batch["ids"], [[21, 0, 0, 0], [0, 0, 22, 23], [0, 0, 0, 24]])
        assert_close("feature_index (B, T)", batch["feature_index"], [
            [-1, 7, 8, 9], [-1] * 4, [-1, -1, 5, -1]])
        assert_close("mask (B, T)", batch["mask"].int(), [[1] * 4] + [[0, 0, 1, 1]] * 2)
        assert_close("labels (B, T)", batch["labels"], [
            [21] + [-100] * 3, [-100] * 3 + [23], [-100] * 3 + [24]])

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 99])
    def test_a_row_is_cut_behind_its_images_and_the_next_row_keeps_its_own(self, length):
        rows = [([21, IMAGE, 22, IMAGE, 23], [21, -100, 22, -100, 23]), ([IMAGE, 24], [-100, 24])]
        batch = merge_image_tokens(rows, [[[1, 2], [3, 4]], [[5, 6]]], IMAGE, context_length=length)
        expected = [[-1, 1, 2, -1, 3, 4, -1], [5, 6, -1] + [-1] * 4]
        assert_close("feature_index (B, T)", batch["feature_index"],
                     [row[:length] for row in expected])
        labels = [[21, -100, -100, 22, -100, -100, 23], [-100, -100, 24] + [-100] * 4]
        assert_close("labels (B, T)", batch["labels"], [row[:length] for row in labels])
        assert batch["mask"].sum() == min(7, length) + min(3, length), f"mask {batch['mask']}"

    @pytest.mark.parametrize("places, images", [(2, 1), (0, 1), (1, 0), (2, 3)])
    def test_another_number_of_images_than_of_places_is_refused(self, places, images):
        rows = [([21], [21]), ([21] + [IMAGE] * places, [21] + [IMAGE] * places)]
        with refused(f"row 1 .*{places} places .*{images} images"):
            merge_image_tokens(rows, [[], [[1]] * images], IMAGE)

    @pytest.mark.parametrize("N", [1, 7])
    def test_the_labels_of_two_turns_in_llavas_second_template(self, N):
        turns = [{"images": [0], "prompt": "Q1", "answer": "A1 a1"},
                 {"images": [], "prompt": "Q2", "answer": "A2"}]
        tokenizer = AnyWords()
        segments = prompts.find_template("v1").segments(turns, system="SYS")
        rows = [prompts.render(segments, tokenizer)]
        assert rows[0][0] == [BOS, *tokenizer.encode("SYS USER: "), IMAGE,
                              *tokenizer.encode("Q1 ASSISTANT: A1 a1"), EOS,
                              *tokenizer.encode("USER: Q2 ASSISTANT: A2"), EOS]
        assert [t for t, label in enumerate(rows[0][1]) if label >= 0] == [7, 8, 9, 13, 14]
        labels = merge_image_tokens(rows, [[[*range(1, 1 + N)]]], IMAGE)["labels"][0]
        assert labels.shape == (14 + N,), f"{labels.shape} for {N} visual tokens"
        assert (labels >= 0).nonzero().flatten().tolist() == [
            6 + N, 7 + N, 8 + N, 12 + N, 13 + N]
        assert_close("labels", labels[labels >= 0],
                     [*tokenizer.encode("A1 a1"), EOS, *tokenizer.encode("A2"), EOS])


def batch_of(*pages, rngs=True, **changes):
    """(batch, vocabulary) of pages of (images, prompt, answer) turns."""
    tokenizer, turns = AnyWords(), [page(*turns)["turns"] for turns in pages]
    rngs = [random.Random(k) for k in range(len(pages))] if rngs else None
    return make_batch(turns, tokenizer, llava_config(**changes), rngs), tokenizer


def colours(batch, row, per_view=P):
    """What a row is made of: a colour for each image's tokens, a word's id for the others."""
    views, found = batch["images"][:, :, 7, 7].tolist(), []
    for token, index in zip(batch["ids"][row].tolist(), batch["feature_index"][row].tolist()):
        new = token if index < 0 else tuple(views[(index - 1) // per_view])
        found += [new] if index < 0 or (index - 1) % per_view == 0 else []
    return found


class TestMakeBatch:
    def test_images_of_all_turns_and_rows_stand_at_their_places(self):
        batch, words = batch_of([("red", "what", "a"), ("", "who", "b"), ("blue green", "", "c")],
                                [("", "none", "d")], [("blue", "what", "e")], template="v1",
                                language=llava_config().language.__class__(context_length=200))
        assert batch["images"].shape == (4, 3, 15, 15), f"{batch['images'].shape}"
        encode, found = words.encode, [colours(batch, row) for row in range(3)]
        places = [[x for x in row if isinstance(x, tuple)] for row in found]
        assert places == [[RED, BLUE, GREEN], [], [BLUE]]
        answer = [*encode("ASSISTANT: a"), EOS]
        at = found[0].index(RED)
        assert found[0][at - 1:at + 4] == [*encode("USER: ")[1:], RED, *encode("what"), *answer[:2]]
        assert found[0][at + 4:at + 9] == [EOS, *encode("USER: who ASSISTANT: b")]
        assert found[0][at + 10:at + 15] == [*encode("USER: "), BLUE, *encode("\n"), GREEN]
        real = batch["mask"].sum(dim=1).tolist()
        index = batch["feature_index"]
        assert [(row >= 0).sum().item() for row in index] == [3 * P, 0, P], f"{index}"
        assert real[0] > real[2] > real[1] and bool(batch["mask"][:, 0].all()), "padded right"

    def test_rows_without_an_image_have_a_black_one_that_stands_nowhere(self):
        batch, _ = batch_of([("", "what", "a")], [("", "who", "b c")])
        assert_close("images", batch["images"], [[[[0] * 15] * 15] * 3])
        assert_close("feature_index", batch["feature_index"].unique(), [-1])
        assert str(batch["images"].dtype) == "torch.uint8"

    def test_rows_of_tiles_end_with_row_0_and_each_image_follows_the_views_before(self):
        clips = [[bands(width=15, height=15), *drawing("blue")], drawing("red")]
        turns = [[{"images": [clip], "prompt": "what", "answer": "a"}] for clip in clips]
        batch = make_batch(turns, AnyWords(), llava_config(views="tiles", grids=((3, 1), (1, 1)),
                           language=llava_config().language.__class__(context_length=99)),
                           [random.Random(0)] * 2)
        assert len(batch["images"]) == (1 + 3) + (1 + 1) + (1 + 1), f"{len(batch['images'])} views"
        index = [[k for k in row if k >= 0] for row in batch["feature_index"].tolist()]
        one = [*range(P), 9, 10, 11, -1, 12, 13, 14, -1, 15, 16, 17, -1]
        assert index[1] == [0 if k < 0 else 1 + 6 * P + k for k in one]
        first, second = index[0][:-len(one)], index[0][-len(one):]
        assert second == [0 if k < 0 else 1 + 4 * P + k for k in one]
        assert first[:P] == [*range(1, 1 + P)] and first[P:P + 10] == [
            10, 11, 12, 19, 20, 21, 28, 29, 30, 0]
        assert colours(batch, 1).count(RED) >= 2, "the whole and its tile"

    def test_a_prompt_is_open_padded_left_and_never_cut(self):
        turns = [("red", "what", "a"), ("", "who", "b")]
        batch, words = batch_of(turns, turns[:1], rngs=False)
        ids = batch["ids"].tolist()
        assert bool(batch["mask"][:, -1].all()) and not batch["mask"][1, 0], "padded left"
        assert ids[0][-3:] == [11, *words.encode("who"), 12] and words.encode("b")[0] not in ids[0]
        assert ids[1][-3:] == [0, *words.encode("what"), 12]
        assert batch_of(turns, rngs=False, image_place="random")[0]["ids"].tolist() == ids[:1]
        long = [("red " * 7, "what", "a")]
        sizes = [batch_of(long, rngs=rngs)[0]["ids"].shape[1] for rngs in (True, False)]
        assert sizes[0] == 53 and sizes[1] > 7 * P, f"{sizes} for a context of 53"

    @pytest.mark.parametrize("place, expected", [
        ("first", {True}), ("last", {False}), ("random", {True, False})])
    def test_images_stand_before_or_behind_the_text(self, place, expected):
        found = set()
        for seed in range(9):
            batch = make_batch([page(("red", "what", "a"))["turns"]], AnyWords(),
                               llava_config(image_place=place), [random.Random(seed)])
            found.add(batch["feature_index"][0, 2].item() == 1)      # <bos> <user>, the image
        assert found == expected, f"before the text: {found}"
        last = batch_of([("red", "what", "a")], rngs=False, image_place=place)[0]
        assert (last["feature_index"][0, 2].item() == 1) == (place != "last"), "in a prompt"

    def test_in_stage_1_the_question_goes_and_the_caption_and_its_end_are_learned(self):
        for template, end in (("house", [EOS]), ("v1", ["\n"])):
            batch, words = batch_of([("red", "what is this", "a red dog")], losses="captions",
                                    template=template)
            end = [words.encode("\n")[0] if k == "\n" else k for k in end]
            ids = [*words.encode("a red dog"), *end]
            assert_close("ids", batch["ids"], [[BOS] + [0] * P + ids])
            assert_close("labels", batch["labels"], [[-100] * (1 + P) + ids])
            assert "what" not in words.words, f"{words.words}"

    def test_of_three_turns_the_answers_and_their_ends_alone_are_learned(self):
        batch, words = batch_of([("red", "x y", "a b"), ("", "z", "c"), ("blue", "x", "d")])
        labels = batch["labels"][0].tolist()
        expected = [*words.encode("a b"), EOS, *words.encode("c"), EOS, *words.encode("d"), EOS]
        assert [label for label in labels if label >= 0] == expected
        assert all(label in (-100, token) for label, token in zip(labels, batch["ids"][0].tolist()))


    def test_with_a_loss_on_all_text_visual_tokens_alone_have_no_label(self):
        batch, _ = batch_of([("red", "x y", "a"), ("", "z", "c")], [("", "x", "d")], loss_on="all")
        expected = batch["ids"].where(batch["mask"] & (batch["feature_index"] < 0), -100)
        assert_close("labels (B, T)", batch["labels"], expected)


class TestTemplateOf:
    def test_captions_have_a_template_of_their_own(self):
        def parts(**changes):
            template = template_of(llava_config(**changes))
            return template.user, template.assistant, template.end
        images = (prompts.IMAGES,)
        assert parts(losses="captions") == (images, (), (("eos_id",),))
        assert parts(losses="captions", template="v1") == (images, (), ("\n",))
        for name in ("house", "v0", "v1", "llama-2", "chatml"):
            assert template_of(llava_config(template=name)) == prompts.find_template(name)

    def test_another_name_is_refused(self):
        with refused("v7.*chatml"):
            template_of(SimpleNamespace(template="v7", losses="instruct"))


class TestConversationBatch:
    def test_it_is_the_batch_of_the_records_turns(self):
        config, words = llava_config(image_place="random"), AnyWords()
        caption = {"images": drawing("blue"), "texts": ["a b", "c d"]}
        records = [page(("red", "what", "dog")), caption]
        collate = ConversationBatch(words, config)
        seen = set()
        for seed in range(9):
            rngs, again = ([random.Random(seed + k) for k in range(2)] for _ in range(2))
            batch = collate(records, rngs)
            turns = [instruction_turns(r, config, rng) for r, rng in zip(records, again)]
            for name, expected in make_batch(turns, words, config, again).items():
                assert_close(name, batch[name], expected)
            seen.add(words.decode(batch["labels"][1].tolist()))
        assert seen == {"a b", "c d"}, "captions are drawn by the record's own rng"
        assert bool(batch["mask"][:, 0].all()) and collate.context_length == 53


class TestInstructionTurns:
    def test_a_caption_gets_a_request_in_stage_2_alone(self):
        record = {"images": drawing("red", "blue"), "texts": ["a dog", "a cat"]}
        turn, = instruction_turns(record, llava_config())
        assert (turn["prompt"], turn["answer"], len(turn["images"][0])) == (REQUESTS[0], "a dog", 1)
        turns = [instruction_turns(record, llava_config(), random.Random(k))[0] for k in range(60)]
        assert {turn["prompt"] for turn in turns} == {*REQUESTS}
        assert {turn["answer"] for turn in turns} == {"a dog", "a cat"}
        turn, = instruction_turns(record, llava_config(losses="captions"), random.Random(0))
        assert turn["prompt"] == ""

    @pytest.mark.parametrize("answer, asks, more", [
        ("dog", True, {"kind": "shape"}), ("a dog", False, {"kind": "shape"}),
        (("dog",), False, {"kind": "ground"}), ("dog", False, {})])   # {}: the user's
    def test_what_has_one_word_for_an_answer_says_so_in_training(self, answer, asks, more):
        record = page(("red", "what", answer), ("", "who", "a b")) | more
        before = [turn["prompt"] for turn in record["turns"]]
        turns = instruction_turns(record, llava_config(), random.Random(0))
        assert [turn["prompt"] for turn in turns] == [f"what\n{SHORT}" if asks else "what", "who"]
        assert instruction_turns(record, llava_config()) == record["turns"]
        assert [turn["prompt"] for turn in record["turns"]] == before, "the record changes"

    def test_a_choice_is_answered_by_its_letter(self):
        record = page(("red", "old", "a cat")) | {
            "context": "It barks.", "question": "What is it?",
            "candidates": ["dog", "a cat", "cow"]}
        turn, = instruction_turns(record, llava_config(), random.Random(0))
        assert turn["answer"] == "B" and len(turn["images"]) == 1
        assert turn["prompt"] == (
            "It barks.\nWhat is it?\nA. dog\nB. a cat\nC. cow\n"
            "Answer with the option's letter from the given choices directly.")
