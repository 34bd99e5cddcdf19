"""Retrieval and zero-shot classification, on a world and a model small enough to check by hand."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.data.images import MEAN, STD, to_tensor
from common.evaluation.retrieval import (Pool, Retriever, accuracy, encode_records, evaluate,
                                         make_pool, recalls, samples, zero_shot,
                                         zero_shot_classifier)


def own(query, item):
    return query == item


class TestAccuracy:
    def test_it_is_the_fraction_of_largest_scores_at_the_label(self):
        scores = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.3, 0.9], [5.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
        assert accuracy(scores, torch.tensor([1, 2, 0, 0])) == 0.75


class TestRecalls:
    # Row 0 finds its own first, row 1 second, row 2 fourth.
    SCORES = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.0],
                           [0.8, 0.7, 0.1, 0.2, 0.3],
                           [0.9, 0.8, 0.4, 0.6, 0.1]])

    def test_of_a_matrix_by_hand(self):
        third = pytest.approx(1 / 3)
        assert recalls(self.SCORES, own, ks=(1, 2, 3, 4)) == {1: third, 2: pytest.approx(2 / 3),
                                                              3: pytest.approx(2 / 3), 4: 1.0}

    def test_every_right_item_counts(self):
        # Item 0 stands first in every row, and is right for row 2 as well.
        right = {(0, 0), (1, 1), (2, 2), (2, 0)}
        found = recalls(self.SCORES, lambda query, item: (query, item) in right, ks=(1, 2))
        assert found == {1: pytest.approx(2 / 3), 2: 1.0}

    def test_a_k_above_the_number_of_items_means_all_of_them(self):
        assert recalls(self.SCORES, own, ks=(1, 50)) == {1: pytest.approx(1 / 3), 50: 1.0}
        assert recalls(self.SCORES, lambda query, item: False, ks=(1, 50)) == {1: 0.0, 50: 0.0}

    def test_items_below_the_largest_k_are_not_judged(self):
        judged = []
        recalls(self.SCORES, lambda query, item: judged.append((query, item)), ks=(1, 2))
        assert sorted(judged) == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1)]

    def test_ties_find_no_more_items_than_k(self):
        judged = []
        found = recalls(torch.zeros(3, 7), lambda query, item: judged.append(item), ks=(2,))
        assert len(judged) == 6 and found == {2: 0.0}

    def test_equal_scores_are_no_better_than_guessing(self):
        assert recalls(torch.zeros(40, 40), own, ks=(1,))[1] == pytest.approx(1 / 40)

    def test_a_perfect_ranking_finds_all_at_once(self):
        assert recalls(torch.eye(11), own) == {1: 1.0, 5: 1.0, 10: 1.0}


# A world of numbers and a model that reads them

class Numbers:
    """Images and words 0 .. 12; word w is true of the images w and w + 1."""
    name, zero_shot, templates = "numbers", "single", ("{}", "{}")
    classes = ["0", "1", "2"]
    all_classes = ["0", "1", "2", "3"]
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


class Data:
    """What the figures need of an EvalData."""

    def __init__(self, world=None):
        self.world, self.lengths = world or Numbers(), []

    def records(self, split):
        return [self.world.record(split, i) for i in range(self.world.size(split))]

    def images(self, records):
        self.lengths.append(len(records))
        return to_tensor([record["images"][0] for record in records])

    def ids(self, texts):
        return torch.tensor([[int(text)] for text in texts])


class Model(nn.Module):
    """The unit vector of number i is axis i; of an image numbered i it is axis i + shift."""

    def __init__(self, shift=0, vectors=None):
        super().__init__()
        self.shift, self.vectors = shift, torch.eye(13) if vectors is None else vectors
        self.config = SimpleNamespace(image_size=8)

    def encode_image(self, images):
        """Float (B, 3, 8, 8), normalized -> (B, 13)."""
        red = images[:, 0].mean(dim=(1, 2)) * STD[0] + MEAN[0]
        number = (red * 255 / 20).round().long()
        assert torch.allclose(images[:, 1].mean(dim=(1, 2)) * STD[1] + MEAN[1], torch.zeros(()),
                              atol=1e-6)             # normalized, and normalized once
        return self.vectors[(number + self.shift) % len(self.vectors)]

    def encode_text(self, ids):
        return self.vectors[ids[:, 0]]

    def class_probabilities(self, image, classifier):
        return (9 * image @ classifier).softmax(dim=1)


class TestPool:
    def figures(self, shift=0):
        return make_pool(Model(shift), Data()).figures()

    def test_truth_counts_and_not_position(self):
        found = self.figures()
        assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == 1
        # Image i finds word i - 1, which is true of it too; word i finds image i + 1.
        found = self.figures(shift=-1)
        twelve = pytest.approx(12 / 13)
        assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == twelve
        assert self.figures(shift=5)["image_to_text_recall@1"] == 0

    def test_each_direction_ranks_what_its_name_says(self):
        # Both images point at text 0, image 0 more so; text 1 points at image 1.
        images = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        texts = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
        world = Numbers()
        world.is_true = lambda text, source: int(text) == source
        found = Pool(world, Data().records("test")[:2], images, texts).figures()
        assert (found["image_to_text_recall@1"], found["text_to_image_recall@1"]) == (0.5, 1.0)

    def test_truth_is_of_a_text_and_an_image(self):
        # Text 0 is true of every image; image i is nearest to text i + 1.
        world = Numbers()
        pool = Pool(world, Data().records("test")[:3], torch.eye(3), torch.eye(3).roll(1, dims=0))
        world.is_true = lambda text, source: text == "0"
        found = pool.figures()
        assert found["image_to_text_recall@1"] == pytest.approx(1 / 3)     # image 2 finds text 0
        assert found["text_to_image_recall@1"] == pytest.approx(1 / 3)     # text 0 finds whatever
        world.is_true = lambda text, source: source == 0 and text != "1"
        found = pool.figures()
        assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == 0

    def test_recall_is_of_1_5_and_10_both_ways_with_the_chance_of_recall_at_1(self):
        assert set(self.figures()) == {
            *(f"{a}_recall@{k}" for a in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
            "image_to_text_recall@1_chance", "text_to_image_recall@1_chance"}

    def test_the_chance_is_that_of_a_random_pair_and_never_changes(self):
        found = self.figures()
        assert found["image_to_text_recall@1_chance"] == pytest.approx(25 / 169, abs=0.01)
        assert found["text_to_image_recall@1_chance"] == found["image_to_text_recall@1_chance"]
        assert found == self.figures()
        pool = make_pool(Model(), Data())
        for answer in (True, False):
            pool.world.is_true = lambda text, source: answer
            assert pool.figures()["image_to_text_recall@1_chance"] == answer


def colours(page):
    return {colour for _, colour in page.getcolors(1 << 20)}


class TestSheet:
    def test_it_frames_what_is_true_green_and_what_is_false_red(self):
        green, red = (20, 150, 60), (210, 40, 40)
        assert {green, red} <= colours(make_pool(Model(), Data()).sheet(count=3))
        pool = make_pool(Model(), Data())
        pool.is_true = lambda text, image: True
        assert red not in colours(pool.sheet(count=3)) and green in colours(pool.sheet(count=3))

    def test_it_searches_images_by_column_and_sentences_by_row(self):
        pool, judged = make_pool(Model(shift=-1), Data()), []
        pool.is_true = lambda text, image: judged.append((text, image)) or True
        pool.sheet(count=1)
        # Word 0 finds image 1 first; image 1 finds word 0 first.
        assert judged == [(0, 1), (0, 1), *judged[2:]]

    def test_samples_are_the_sheet_of_the_test_split(self):
        want = make_pool(Model(), Data()).sheet()
        assert samples(Model(), Data()).tobytes() == want.tobytes()


class TestEncodeRecords:
    def test_chunks_are_encoded_in_order(self):
        data = Data()
        records = data.records("test")
        assert torch.equal(encode_records(Model(), data, records, chunk=5), torch.eye(13))
        assert data.lengths == [5, 5, 3]


class TestZeroShotClassifier:
    VECTORS = F.normalize(torch.randn(13, 5, generator=torch.Generator().manual_seed(0)), dim=-1)

    def columns(self, names, templates, **more):
        model = Model(vectors=self.VECTORS)
        return zero_shot_classifier(model, Data().ids, names, templates, **more)

    def test_each_name_gets_its_own_column(self):
        columns = self.columns(["7", "2", "11"], ["{}"])
        torch.testing.assert_close(columns, self.VECTORS[[7, 2, 11]].T)
        assert torch.equal(self.columns(["7", "2", "11"], ["{}"], chunk=2), columns)

    def test_the_unit_vectors_of_all_templates_are_averaged_and_normalized_again(self):
        columns = self.columns(["0", "2"], ["{}", "1{}", "0{}"])          # 0 10 00, 2 12 02
        for column, numbers in zip(columns.T, ([0, 10, 0], [2, 12, 2])):
            mean = sum(self.VECTORS[n] for n in numbers) / 3
            torch.testing.assert_close(column, mean / mean.norm())
        # A chunk may end within a name.
        assert torch.equal(self.columns(["0", "2"], ["{}", "1{}", "0{}"], chunk=4), columns)


class TestZeroShot:
    def test_unseen_pairs_are_no_candidates_of_seen_ones_but_all_are_of_unseen_ones(self):
        figures = zero_shot(Model(), Data())
        assert figures == {"zero_shot_accuracy": 1, "zero_shot_accuracy_chance": 1 / 3,
                           "composition_accuracy": 1, "composition_accuracy_chance": 1 / 4}
        # A model that finds class 3 in every image can never choose it among the seen classes.
        towards = torch.eye(13)
        towards[:3, 3] = 2.0
        model = Model()
        model.encode_image = lambda images: towards[Model().encode_image(images).argmax(dim=1)]
        assert zero_shot(model, Data())["zero_shot_accuracy"] == 1

    def test_a_wrong_model_gets_what_it_deserves(self):
        swapped = torch.eye(13)[[1, 0, *range(2, 13)]]
        model = Model()
        model.encode_image = lambda images: Model().encode_image(images) @ swapped
        figures = zero_shot(model, Data())
        assert figures["zero_shot_accuracy"] == pytest.approx(1 / 5)   # records 0 1 2 0 1: the 2
        assert figures["composition_accuracy"] == 1
        model.encode_image = lambda images: torch.eye(13)[[0] * len(images)]
        assert zero_shot(model, Data())["composition_accuracy"] == 0

    def test_a_world_without_classes_has_retrieval_alone(self):
        data = Data()
        names = set(evaluate(Model(), data))
        assert "zero_shot_accuracy" in names and "composition_accuracy" in names
        data.world.zero_shot = None
        assert set(evaluate(Model(), data)) == {n for n in names if "recall" in n}


class Digits:
    """A tokenizer of one number a text."""

    def batch(self, texts, context_length):
        assert context_length == 5
        return Data().ids(texts)


class TestRetriever:
    # Cosines of number 0 with 0 .. 12 fall from 1 to about -1.
    ANGLES = torch.arange(13) * math.pi / 13
    VECTORS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)

    def make(self):
        model = Model(vectors=self.VECTORS).train()
        model.config.context_length = 5
        return Retriever(model, Digits())

    def picture(self, number, size=(8, 8)):
        return Image.new("RGB", size, (20 * number, 0, 0))

    def test_the_model_is_in_eval_mode(self):
        assert not self.make().model.training

    def test_pictures_of_any_size_are_cropped_and_normalized(self):
        found = self.make().encode_images([self.picture(3), self.picture(9, (31, 17))])
        torch.testing.assert_close(found, self.VECTORS[[3, 9]])

    def test_classify_ranks_probabilities(self):
        ranked = self.make().classify(self.picture(4), ["9", "5", "2"])
        cosines = [math.cos(math.pi * k / 13) for k in (1, 2, 5)]
        total = sum(math.exp(9 * c) for c in cosines)
        assert [name for name, _ in ranked] == ["5", "2", "9"]
        assert [p for _, p in ranked] == pytest.approx([math.exp(9 * c) / total for c in cosines],
                                                       rel=1e-4)

    def test_classify_ensembles_templates(self):
        one, two = (dict(self.make().classify(self.picture(4), ["1", "2"], templates))
                    for templates in (["{}"], ["{}", "1{}"]))         # two: of 1 and 11, 2 and 12
        assert one["2"] > one["1"] and two["1"] > one["1"]

    def test_search_returns_the_highest_cosines_in_order(self):
        pictures = [self.picture(n) for n in (9, 2, 5, 0, 12)]
        found = self.make().search("3", pictures, count=3)
        assert [i for i, _ in found] == [1, 2, 3]
        cosines = [math.cos(math.pi * k / 13) for k in (1, 2, 3)]
        assert [c for _, c in found] == pytest.approx(cosines)
        assert len(self.make().search("3", pictures)) == 5
        many = self.make().search("0", [self.picture(5)] * 300 + [self.picture(0)], count=1)
        assert many[0][0] == 300                                      # more than one chunk
