"""Accuracy, recalls, chance and the linear probe on cases small enough to count by hand."""
import math

import pytest
import torch

from common.evaluation.retrieval import accuracy, chance, logistic_regression, recalls, retrieval

pytestmark = pytest.mark.usefixtures("one_thread")


def own(query, item):
    return query == item


class TestAccuracy:
    def test_it_is_the_share_of_highest_scores_at_the_label(self):
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

    def test_items_below_the_largest_k_are_not_asked_for(self):
        asked = []
        recalls(self.SCORES, lambda query, item: asked.append((query, item)), ks=(1, 2))
        assert sorted(asked) == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1)]

    def test_ties_find_no_more_items_than_k(self):
        asked = []
        found = recalls(torch.zeros(3, 7), lambda query, item: asked.append(item), ks=(2,))
        assert len(asked) == 6 and found == {2: 0.0}

    def test_equal_scores_are_no_better_than_guessing(self):
        assert recalls(torch.zeros(40, 40), own, ks=(1,))[1] == pytest.approx(1 / 40)

    def test_a_perfect_ranking_finds_all_at_once(self):
        assert recalls(torch.eye(11), own) == {1: 1.0, 5: 1.0, 10: 1.0}


class TestRetrieval:
    def test_each_direction_ranks_what_its_name_says(self):
        # Images 0 and 1 both point at text 0; text 1 points at image 1, text 0 at image 0.
        images = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        texts = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
        found = retrieval(images, texts, own, ks=(1, 2))
        assert found == {"image_to_text_recall@1": 0.5, "image_to_text_recall@2": 1.0,
                         "text_to_image_recall@1": 1.0, "text_to_image_recall@2": 1.0}

    def test_truth_is_asked_as_text_then_image(self):
        # Text 0 is true of every image; image i is nearest to text i + 1.
        images, texts = torch.eye(3), torch.eye(3).roll(1, dims=0)
        found = retrieval(images, texts, lambda text, image: text == 0, ks=(1,))
        assert found["image_to_text_recall@1"] == pytest.approx(1 / 3)     # image 2 finds text 0
        assert found["text_to_image_recall@1"] == pytest.approx(1 / 3)     # text 0 finds whatever
        found = retrieval(images, texts, lambda text, image: image == 0 and text != 1, ks=(1,))
        assert set(found.values()) == {0.0}

    def test_unequal_numbers_of_images_and_texts_are_fine(self):
        found = retrieval(torch.eye(5)[:3], torch.eye(5), own, ks=(1, 10))
        assert found["image_to_text_recall@1"] == 1.0
        assert found["text_to_image_recall@1"] == pytest.approx(3 / 5)


class TestChance:
    def test_one_right_item_of_n_is_one_in_n(self):
        assert chance(own, 10) == pytest.approx(0.1, abs=0.01)

    def test_what_is_always_or_never_right(self):
        assert chance(lambda text, image: True, 7) == 1.0
        assert chance(lambda text, image: False, 7) == 0.0

    def test_it_is_the_share_of_right_pairs_and_never_changes(self):
        # Texts 0..2 of 12 are true of all images, the rest of none.
        first = chance(lambda text, image: text < 3, 12)
        assert first == pytest.approx(0.25, abs=0.02)
        assert chance(lambda text, image: text < 3, 12) == first


class TestLogisticRegression:
    @staticmethod
    def clouds(spread, seed=0, each=61):
        centres = torch.tensor([[5.0, 0.0, 1.0, 0.0, 0.0],
                                [0.0, 5.0, 0.0, 0.0, 2.0],
                                [0.0, 0.0, 9.0, 1.0, 0.0]])
        labels = torch.arange(3).repeat_interleave(each)
        noise = torch.randn(3 * each, 5, generator=torch.Generator().manual_seed(seed))
        return centres[labels] + spread * noise, labels

    def test_separate_clouds_are_told_apart(self):
        predict = logistic_regression(*self.clouds(0.5, 0), classes=3, l2=1e-4)
        features, labels = self.clouds(0.5, 1)
        assert predict(features).shape == (183, 3)
        assert accuracy(predict(features), labels) == 1.0

    def test_features_are_standardised_inside(self):
        features, labels = self.clouds(2.0)
        scaled = features * torch.tensor([1e4, 1.0, 1e-4, 1.0, 10.0])
        scaled += torch.tensor([0.0, 1e3, 0.0, -5.0, 0.0])
        plain = logistic_regression(features, labels, 3, l2=0.1)(features)
        other = logistic_regression(scaled, labels, 3, l2=0.1)(scaled)
        torch.testing.assert_close(plain, other, atol=2e-2, rtol=1e-2)

    def test_a_constant_feature_does_no_harm(self):
        features, labels = self.clouds(0.5)
        features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        assert logistic_regression(features, labels, 3, l2=0.1)(features).isfinite().all()

    def test_the_penalty_shrinks_the_scores_to_the_class_shares(self):
        features, labels = self.clouds(0.5)
        keep = torch.cat([torch.arange(20), torch.arange(61, 183)])      # 20, 61, 61 of the classes
        features, labels = features[keep], labels[keep]
        loose, tight = (logistic_regression(features, labels, 3, l2)(features)
                        for l2 in (1e-4, 1e5))
        assert loose.std(dim=0).min() > 1 > 1e-3 > tight.std(dim=0).max()
        shares = torch.tensor([20, 61, 61]) / 142                        # the bias is not penalised
        torch.testing.assert_close(tight.softmax(dim=1).mean(dim=0), shares, atol=1e-3, rtol=0)

    def test_it_is_the_minimum_of_the_penalised_loss(self):
        features, labels = self.clouds(3.0, each=17)
        features = features.double()
        x = (features - features.mean(0)) / features.std(0)
        scores = logistic_regression(features, labels, 3, l2=0.05)(features)
        # At the minimum the gradient of the fit balances the penalty: X^T (p - y) / N = -l2 W.
        weight = torch.linalg.lstsq(torch.cat([x, torch.ones(51, 1)], 1), scores).solution[:5]
        wrong = scores.softmax(1) - torch.eye(3)[labels]
        torch.testing.assert_close(x.T @ wrong / 51, -0.05 * weight, atol=1e-5, rtol=0)
        assert not math.isclose(weight.abs().max(), 0, abs_tol=0.1)
