"""Retrieval and zero-shot classification, on a world and a model small enough to check by hand."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data.images import MEAN, STD
from common.evaluation.retrieval import (Pool, Retriever, encode_records, evaluate, make_pool,
                                         recalls, rerank, zero_shot, zero_shot_classifier)
from tests.helpers import NumbersData, assert_close, drawing

GREEN, RED = (20, 150, 60), (210, 40, 40)
WAYS = ("image_to_text", "text_to_image")


class Model(nn.Module):
    """Row i of `texts` is the vector of text i, row i of `images` that of an image numbered i."""

    def __init__(self, images=None, texts=None):
        super().__init__()
        self.texts = torch.eye(13) if texts is None else texts
        self.images = self.texts if images is None else images
        self.config = SimpleNamespace(image_size=8, context_length=5)

    def encode_image(self, images):
        """Float (B, 3, 8, 8), normalized once, of a red tone -> (B, E)."""
        assert images.shape[1:] == (3, 8, 8)
        rgb = images.mean(dim=(2, 3)) * torch.tensor(STD) + torch.tensor(MEAN)
        assert_close("green and blue", rgb[:, 1:], torch.zeros(len(images), 2))
        return self.images[(rgb[:, 0] * 255 / 20).round().long()]

    def encode_text(self, ids):
        return self.texts[ids[:, 0]]

    def class_probabilities(self, image, classifier):
        return (9 * image @ classifier).softmax(dim=1)


def own(query, item):
    return query == item


def several():
    """Three vectors for each image (13, 3, 13): its own, and twice the other way."""
    return torch.stack([torch.eye(13), -torch.eye(13), -torch.eye(13)], dim=1)


class TestEncodeRecords:
    def test_all_records_are_encoded_in_order_whatever_the_chunk(self):
        vectors, data = torch.randn(13, 5), NumbersData()
        for chunk in (9, 4, 1, 256):
            found = encode_records(Model(vectors), data, data.records("test")[:9], chunk=chunk)
            assert_close(f"vectors (N, E) in chunks of {chunk}", found, vectors[:9])


class TestZeroShotClassifier:
    @pytest.mark.parametrize("names, templates, numbers", [
        (["7", "2", "11"], ["{}"], [[7], [2], [11]]),
        (["0", "2"], ["{}", "1{}"], [[0, 10], [2, 12]]),
        (["0", "2"], ["{}", "1{}", "0{}"], [[0, 10, 0], [2, 12, 2]])])
    def test_unit_vectors_are_averaged_and_normalized_again(self, names, templates, numbers):
        vectors = F.normalize(torch.randn(13, 5), dim=-1)
        means = torch.stack([sum(vectors[n] for n in own) / len(own) for own in numbers])
        for chunk in (256, 4, 2, 1):             # a chunk may end within a name
            found = zero_shot_classifier(Model(texts=vectors), NumbersData().ids, names, templates,
                                         chunk)
            assert_close("classifier (E, C)", found, (means / means.norm(dim=1)[:, None]).T)


class TestRecalls:
    @pytest.mark.parametrize("right, expected", [
        (own, {1: 1 / 3, 2: 2 / 3, 3: 2 / 3, 4: 1, 50: 1}),          # 50: all there are
        (lambda query, item: (query, item) in {(0, 0), (1, 1), (2, 2), (2, 0)},
         {1: 2 / 3, 2: 1, 50: 1}),                                   # every right item counts
        (lambda query, item: False, {1: 0, 50: 0})])
    def test_of_a_matrix_by_hand(self, right, expected):
        scores = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.0],            # finds its own first,
                               [0.8, 0.7, 0.1, 0.2, 0.3],            # second,
                               [0.9, 0.8, 0.4, 0.6, 0.1]])           # fourth
        assert recalls(scores, right, ks=tuple(expected)) == pytest.approx(expected)

    def test_equal_scores_are_no_better_than_guessing_and_a_perfect_ranking_finds_all(self):
        assert recalls(torch.zeros(40, 40), own, ks=(1,))[1] == pytest.approx(1 / 40)
        assert recalls(torch.eye(11), own) == {1: 1, 5: 1, 10: 1}


class TestRerank:
    cosines = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.4, 0.7], [0.3, 0.2, 0.1, 0.0]])
    logits = torch.tensor([[-3.0, 9, 2, 1], [5, -1, 4, 3], [0, 1, 2, 3]])

    def match(self, queries, items):
        assert queries.dtype == items.dtype == torch.int64 and queries.shape == items.shape
        return self.logits[queries, items]

    @pytest.mark.parametrize("k, scores", [
        (1, [[-2.1, -100, -100, -100], [-100, -0.2, -100, -100], [0.3, -100, -100, -100]]),
        (2, [[-2.1, -100, 2.5, -100], [-100, -0.2, -100, 3.7], [0.3, 1.2, -100, -100]])])
    def test_the_k_best_cosines_gain_their_logits_by_hand(self, k, scores):
        assert_close("scores (Q, N)", rerank(self.cosines, self.match, k), scores)

    @pytest.mark.parametrize("k", [4, 9])
    def test_with_all_items_it_is_the_ranking_by_logit_and_cosine(self, k):
        assert_close("scores (Q, N)", rerank(self.cosines, self.match, k),
                     self.cosines + self.logits)


class TestPool:
    def pool(self, images, texts, is_true):
        data = NumbersData(is_true=is_true)
        return Pool(data.world, data.records("test")[:len(images)], images, texts)

    @pytest.mark.parametrize("is_true, expected", [
        (lambda text, source: text == "0", (1 / 3, 1 / 3)),      # image 2 finds it, it finds any
        (lambda text, source: source == 0 and text != "1", (0, 0)),
        (lambda text, source: int(text) == (source + 1) % 3, (1, 1))])
    def test_truth_is_of_a_text_and_an_image(self, is_true, expected):
        # Image i is nearest to text i + 1.
        found = self.pool(torch.eye(3), torch.eye(3).roll(1, dims=0), is_true).figures()
        assert [found[f"{name}_recall@1"] for name in WAYS] == pytest.approx(expected)

    def test_recalls_take_other_scores_and_a_suffix(self):
        pool = self.pool(torch.eye(3), torch.eye(3), lambda text, source: int(text) == source)
        found = pool.recalls(torch.eye(3), torch.tensor([[0, 2, 1], [2, 0, 1], [2, 1, 0]]), "_x")
        assert found == {f"{name}_recall@{k}_x": name == "image_to_text" or k > 1
                         for name in WAYS for k in (1, 5, 10)}

    def test_each_direction_ranks_what_its_name_says(self):
        # Both images point at text 0, image 0 more so; text 1 points at image 1.
        images, texts = torch.tensor([[1, 0], [0.8, 0.6]]), torch.tensor([[1, 0.1], [0, 1]])
        found = self.pool(images, texts, lambda text, source: int(text) == source).figures()
        assert [found[f"{name}_recall@1"] for name in WAYS] == [0.5, 1.0]

    def test_figures_are_recall_of_1_5_and_10_both_ways_and_the_chance_of_recall_at_1(self):
        # Image i finds word i - 1, which is true of it, too; word i finds image i + 1.
        model = Model(torch.eye(13).roll(-1, dims=1))
        found = make_pool(model, NumbersData()).figures()
        assert set(found) == {f"{name}_recall@{k}{suffix}" for name in WAYS for k in (1, 5, 10)
                              for suffix in ("", "_chance")}
        assert found == make_pool(model, NumbersData()).figures()   # always the same random pairs
        for name in WAYS:
            assert found[f"{name}_recall@1"] == pytest.approx(12 / 13)
            assert found[f"{name}_recall@1_chance"] == pytest.approx(25 / 169, abs=0.01)

    @pytest.mark.parametrize("count", [3, 7, 13])
    def test_the_chance_of_one_right_item_is_k_in_n(self, count):
        found = self.pool(torch.eye(count), torch.eye(count),
                          lambda text, source: int(text) == source).figures()
        for k in (1, 5, 10):
            assert found[f"text_to_image_recall@{k}_chance"] \
                == pytest.approx(min(1, k / count))

    def test_of_several_vectors_of_an_image_the_nearest_to_a_text_counts(self):
        images = torch.stack([torch.eye(3), -torch.eye(3).roll(1, dims=0)], dim=1)   # (N, Q, E)
        pool = self.pool(images, torch.eye(3), lambda text, source: int(text) == source)
        assert_close("cosines (images, texts)", pool.scores, torch.eye(3))

    @pytest.mark.parametrize("right, marks", [
        (("0", 2), {GREEN, RED}), (("4", 1), {GREEN, RED}),    # an image found, a text found
        (("4", 2), {RED}), (("3", 0), {RED})])
    def test_the_sheet_searches_images_and_sentences_and_frames_the_right_green(self, right, marks):
        scores = torch.tensor([[0, 1, 0, 2, 0],          # text 0 finds image 2; image 1 finds
                               [0, 0, 1, 1, 1],          # texts 2, 3 and 4
                               [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).float()
        page = self.pool(scores, torch.eye(5), lambda *pair: pair == right).sheet(count=1)
        assert {colour for _, colour in page.getcolors(1 << 20)} & {GREEN, RED} == marks


class TestZeroShot:
    # Images of class 3 and the unseen pairs; a model that finds class 3 in every image must not
    # choose it among the seen classes; two are swapped (records 0 1 2 0 1: the 2); always class 0.
    @pytest.mark.parametrize("images, seen, unseen", [
        (lambda: torch.eye(13), 1, 1), (lambda: torch.eye(13) + 2 * torch.eye(13)[3], 1, 1),
        (lambda: torch.eye(13)[[1, 0, *range(2, 13)]], 1 / 5, 1),
        (lambda: torch.eye(13)[[0] * 13], 2 / 5, 0)])
    def test_unseen_pairs_are_candidates_of_unseen_ones_alone(self, images, seen, unseen):
        assert zero_shot(Model(images(), torch.eye(13)), NumbersData()) == pytest.approx({
            "zero_shot_accuracy": seen, "zero_shot_accuracy_chance": 1 / 3,
            "composition_accuracy": unseen, "composition_accuracy_chance": 1 / 4})


    def test_of_several_vectors_of_an_image_the_nearest_to_a_class_counts(self):
        found = zero_shot(Model(several(), torch.eye(13)), NumbersData())
        assert found["zero_shot_accuracy"] == found["composition_accuracy"] == 1


class TestEvaluate:
    def test_a_world_without_classes_has_retrieval_alone(self):
        whole, retrieval = (evaluate(Model(), NumbersData(zero_shot=split))
                            for split in ("single", None))
        assert retrieval == make_pool(Model(), NumbersData()).figures()
        assert whole == retrieval | zero_shot(Model(), NumbersData())


class TestRetriever:
    def retriever(self):
        """Cosines of number 0 with 0 .. 12 fall from 1 to about -1."""
        angles = torch.arange(13) * math.pi / 13
        vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
        return Retriever(Model(texts=vectors).train(), NumbersData())

    def picture(self, number, size=(8, 8)):
        return drawing((20 * number, 0, 0))[0].resize(size)

    def test_pictures_of_any_size_are_cropped_and_normalized(self):
        use = self.retriever()
        found = use.encode_images([self.picture(3), self.picture(9, (31, 17))])
        assert_close("vectors (N, E)", found, use.model.images[[3, 9]])
        assert not use.model.training

    def test_classify_ranks_probabilities(self):
        ranked = self.retriever().classify(self.picture(4), ["9", "5", "2"])
        cosines = torch.tensor([math.cos(math.pi * k / 13) for k in (1, 2, 5)])
        assert [name for name, _ in ranked] == ["5", "2", "9"]
        assert_close("probabilities", [p for _, p in ranked], (9 * cosines).softmax(dim=0))

    def test_classify_ensembles_templates(self):
        one, two = (dict(self.retriever().classify(self.picture(4), ["1", "2"], how))
                    for how in (["{}"], ["{}", "1{}"]))              # of 1 and 11, 2 and 12
        assert one["2"] > one["1"] and two["1"] > one["1"]

    def test_search_returns_the_highest_cosines_in_order(self):
        use = self.retriever()
        pictures = [self.picture(n) for n in (9, 2, 5, 0, 12)]
        places, cosines = zip(*use.search("3", pictures, count=3))
        assert places == (1, 2, 3) and len(use.search("3", pictures)) == 5
        assert_close("cosines", cosines, [math.cos(math.pi * k / 13) for k in (1, 2, 3)])

    def test_search_takes_the_nearest_of_several_vectors_of_a_picture(self):
        use = Retriever(Model(several(), torch.eye(13)), NumbersData())
        best = use.search("3", [self.picture(n) for n in (9, 2, 3)], count=1)
        assert best == [(2, 1.0)], f"{best}"

    def test_search_finds_the_last_of_257_pictures(self):
        many = [self.picture(5)] * 256 + [self.picture(0)]
        assert self.retriever().search("0", many, count=1)[0][0] == 256

    def test_search_ranks_the_best_cosines_again_where_the_model_matches(self):
        use, asked = self.retriever(), []

        def match(tokens, ids):          # the darkest picture matches best
            asked.append((len(tokens), ids.flatten().tolist()))
            return torch.stack([torch.zeros(len(ids)), -9 * tokens.mean(dim=(1, 2, 3))], dim=1)
        use.model.itm_head, use.model.vision, use.model.match = nn.Identity(), nn.Identity(), match
        pictures = [self.picture(n) for n in (9, 2, 5, 0, 12, 4)]
        # The four best cosines with 3 are those of 2, 4, 5 and 0.
        places, scores = zip(*use.search("3", pictures, count=1))
        assert places == (3,) and asked == [(4, [3] * 4)]
        places, _ = zip(*use.search("3", pictures, count=6))
        assert places == (3, 1, 5, 2, 0, 4)
        black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
        assert_close("score", scores[0], math.cos(math.pi * 3 / 13) - 9 * black.mean(), 1e-4)
