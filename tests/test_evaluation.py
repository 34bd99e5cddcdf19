"""Evaluation shared by contrastive models, on a world small enough to check by hand."""
import pytest
import torch
from PIL import Image

from common.evaluation.writing import retrieval
from common.evaluation.questions import captions
from common.evaluation.retrieval import Pool, zero_shot
from common.evaluation.writing import retrieval_sheet


class Letters:
    """Pictures and words 0 .. 12; word w is true of the pictures w and w + 1."""
    name, zero_shot = "letters", "single"
    classes = ["a", "b", "c"]
    all_classes = ["a", "b", "c", "d"]
    sizes = {"test": 13, "single": 5, "composition": 2}

    def size(self, split):
        return self.sizes[split]

    def record(self, split, index):
        number = {"test": index, "single": index % 3, "composition": 3}[split]
        return {"images": [Image.new("RGB", (8, 8), (20 * number, 0, 0))], "texts": [str(number)],
                "source": number}

    def is_true(self, text, source):
        return int(text) in (source, source - 1)

    def label(self, source):
        return source


def one_hot(numbers, size=13):
    return torch.eye(size)[torch.tensor(numbers)]


def pool(shift=0):
    """An encoder that takes picture i for word i + shift."""
    return Pool(Letters(), lambda records: one_hot([(r["source"] + shift) % 13 for r in records]),
                lambda texts: one_hot([int(t) for t in texts]))


def test_truth_counts_and_not_position():
    assert retrieval(pool())["image_to_text_recall@1"] == 1
    # Picture i finds word i - 1, which is true of it too; word i finds picture i + 1.
    found = retrieval(pool(shift=-1))
    assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == pytest.approx(12 / 13)
    assert retrieval(pool(shift=5))["image_to_text_recall@1"] == 0


def test_the_chance_is_that_of_a_random_pair():
    assert retrieval(pool())["image_to_text_recall@1_chance"] == pytest.approx(25 / 169, abs=0.01)


def test_zero_shot_leaves_unseen_pairs_out_and_composition_lets_all_in():
    def encode(records):
        return one_hot([r["source"] for r in records], 4)
    figures = zero_shot(Letters(), encode, torch.eye(4))
    assert figures["zero_shot_accuracy"] == figures["composition_accuracy"] == 1
    assert figures["zero_shot_accuracy_chance"] == pytest.approx(1 / 3)
    assert figures["composition_accuracy_chance"] == pytest.approx(1 / 4)
    # A classifier that says "d" of everything is never asked for "d" among the seen classes.
    towards_d = torch.eye(4) + 2 * torch.eye(4)[:, [3]] @ torch.ones(1, 4)
    towards_d[:, 3] += 5
    figures = zero_shot(Letters(), encode, towards_d)
    assert figures["zero_shot_accuracy"] == 1 and figures["composition_accuracy"] == 1


def test_a_wrong_classifier_scores_what_it_deserves():
    def encode(records):
        return one_hot([r["source"] for r in records], 4)
    swapped = torch.eye(4)[:, [1, 0, 2, 3]]
    figures = zero_shot(Letters(), encode, swapped)
    assert figures["zero_shot_accuracy"] == pytest.approx(1 / 5)      # records 0 1 2 0 1: the 2 alone


def colours(page):
    return {colour for _, colour in page.getcolors(1 << 20)}


def test_the_sheet_frames_what_is_true_green_and_what_is_false_red():
    green, red = (20, 150, 60), (210, 40, 40)
    assert {green, red} <= colours(retrieval_sheet(pool(), count=3))
    always = pool()
    always.is_true = lambda text, image: True
    assert red not in colours(retrieval_sheet(always, count=3))


def test_the_sheet_searches_pictures_by_column_and_sentences_by_row():
    tall = pool(shift=-1)
    asked = []
    tall.is_true = lambda text, image: asked.append((text, image)) or True
    retrieval_sheet(tall, count=1)
    # Word 0 finds picture 1 first; picture 1 finds word 0 first.
    assert asked == [(0, 1), (0, 1), *asked[2:]]


class Told(Letters):
    """Letters whose captions must also be long enough to say something."""

    def describes(self, text, source):
        return len(text) > 1 and self.is_true(text, source)


def write(records):
    """The picture's own number, in two digits."""
    return [f"{record['images'][0].getpixel((0, 0))[0] // 20:02d}" for record in records]


def test_captions_are_right_when_they_describe_their_picture():
    figures = captions(Told(), write)
    assert figures == {"caption_accuracy": 1, "caption_accuracy_single": 1,
                       # Single pictures are 0 1 2 0 1; shown in their place are 0 1 0 1 2, and
                       # only the first two words are true.
                       "caption_accuracy_single_wrong_picture": 2 / 5,
                       "caption_accuracy_single_chance": 1 / 3}
    assert captions(Told(), lambda records: ["4"] * len(records))["caption_accuracy"] == 0


def test_of_a_world_without_a_say_in_that_truth_counts():
    def four(records):
        return ["4"] * len(records)
    assert captions(Letters(), four)["caption_accuracy"] == pytest.approx(2 / 13)
    assert captions(Told(), four)["caption_accuracy"] == 0


def test_captions_are_asked_of_both_splits_and_of_other_pictures():
    asked = []

    def noted(records):
        asked.append([record["source"] for record in records])
        return write(records)
    captions(Told(), noted)
    assert asked == [list(range(13)), [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    captions(Told(), noted, count=3)
    assert asked[3:] == [[0, 1, 2], [0, 1, 2], [1, 2, 0]]


@pytest.mark.parametrize("split", [None, "test"])
def test_a_world_without_single_objects_has_one_figure(split):
    world = Told()
    world.zero_shot = split
    assert set(captions(world, write)) == {"caption_accuracy"}
