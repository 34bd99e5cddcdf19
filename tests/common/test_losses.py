"""Losses against their formulas and closed forms."""
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from common.losses import (best_cosine, count_labels, matching, next_token_loss, no_autocast,
                           no_gather, sample_negatives, sigmoid_contrastive, softmax_contrastive)
from tests.helpers import assert_close, assert_same, in_processes, loss_by_hand, unchanged


def unit(*shape, seed=0):
    draws = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(draws, dim=-1).requires_grad_()


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def over_processes(loss, image, text, *numbers, processes):
    """The mean of the losses of processes that have an equal share of the rows each."""
    def gather(x):
        return next(all for all in (image, text) if torch.equal(all[first:first + n], x)), first
    n, losses = len(image) // processes, []
    for first in range(0, len(image), n):
        own = slice(first, first + n)
        losses.append(loss(image[own], text[own], *numbers, gather))
    return sum(losses) / processes


def neighbours():
    """Two unit images (2, 2) and texts (2, 2) in float32 whose cosines are about 0.001 apart.

    Times 100, neighbouring cosines round to one bfloat16 number.
    """
    angles = torch.tensor([0.0, 0.4]), torch.tensor([0.450, 0.4530])
    return tuple(torch.stack([a.cos(), a.sin()], dim=1) for a in angles)


class TestNoGather:
    def test_it_gives_the_features_themselves_and_row_zero(self):
        x = torch.randn(3, 5, requires_grad=True)
        features, first = no_gather(x)
        assert_close("first row", first, 0)
        assert_same("features (B, D)", features, x, x=x)


class TestNoAutocast:
    def test_inside_it_products_are_float32(self):
        x = torch.ones(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            with no_autocast(x):
                assert (x @ x).dtype == torch.float32, "autocast is on inside"
            assert (x @ x).dtype == torch.bfloat16, "autocast is off after it"

    def test_a_device_without_autocast_is_no_error(self):
        with no_autocast(torch.ones(2, device="meta")):
            pass


class TestSoftmaxContrastive:
    def test_identical_features_cost_log_n_at_any_scale(self):
        same = unit(1, 5).expand(7, 5)
        for scale in 0.5, 100.0:
            loss = softmax_contrastive(same, same, scale)
            assert_close(f"loss at scale {scale}", loss, math.log(7))

    @pytest.mark.parametrize("processes", [1, 3])
    def test_it_is_the_mean_of_two_directions_and_of_the_processes(self, processes):
        inputs = {"image": unit(6, 5), "text": unit(6, 5, seed=1), "scale": number(4.0)}
        loss = over_processes(softmax_contrastive, *inputs.values(), processes=processes)
        expected = loss_by_hand(*inputs.values())
        assert_same("loss of two directions", loss, expected, **inputs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_under_bf16_autocast_it_is_exact_and_float32(self, dtype):
        image, text = (x.to(dtype) for x in neighbours())
        with torch.autocast("cpu", torch.bfloat16):
            loss = softmax_contrastive(image, text, torch.tensor(100.0))
        assert loss.dtype == torch.float32, f"loss is {loss.dtype}"
        assert_close("loss", loss, loss_by_hand(image.double(), text.double(), 100.0))


class TestSigmoidContrastive:
    def test_orthogonal_features_at_the_paper_start_cost_almost_ten(self):
        image = torch.eye(64, 128).double()
        loss = sigmoid_contrastive(image, image.roll(64, dims=1), 10.0, -10.0)
        assert_close("loss", loss, math.log(1 + math.exp(10)) + 63 * math.log(1 + math.exp(-10)))

    @pytest.mark.parametrize("processes", [1, 3])
    def test_every_pair_is_its_own_question(self, processes):
        inputs = {"image": unit(6, 5), "text": unit(6, 5, seed=1), "scale": number(4.0),
                  "bias": number(-1.5)}
        loss = over_processes(sigmoid_contrastive, *inputs.values(), processes=processes)
        expected = loss_by_hand(*inputs.values())
        assert_same("loss of all pairs", loss, expected, **inputs)

    def test_large_logits_do_not_overflow(self):
        eye = torch.eye(2, dtype=torch.float64)
        assert_close("loss of wrong pairs", sigmoid_contrastive(eye, 1 - eye, 1000.0, 0.0),
                     1000 + math.log(2))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_under_bf16_autocast_it_is_exact_and_float32(self, dtype):
        image, text = (x.to(dtype) for x in neighbours())
        with torch.autocast("cpu", torch.bfloat16):
            loss = sigmoid_contrastive(image, text, torch.tensor(100.0), torch.tensor(-90.05))
        assert loss.dtype == torch.float32, f"loss is {loss.dtype}"
        assert_close("loss", loss, loss_by_hand(image.double(), text.double(), 100.0, -90.05), 4e-5)


LAST = 1 - 2 ** -24                      # the largest that torch.rand draws


class TestSampleNegatives:
    @pytest.mark.parametrize("own", [0, 2, 4])
    def test_a_column_has_its_share_of_softmax_plus_a_little_and_its_own_has_none(self, own):
        scores, draws = 2 * torch.randn(1, 5).double(), (torch.arange(20_000) + 0.5) / 20_000
        found = sample_negatives(scores.expand(20_000, 5), torch.full((20_000,), own), draws)
        weights = [x.exp() / scores.exp().sum() + 1e-4 for x in scores[0]]
        weights[own] = torch.tensor(0.0)
        shares = torch.stack([w.double() for w in weights]) / sum(weights)
        counts = torch.bincount(found, minlength=5)
        assert counts[own] == 0, f"its own pair was drawn {counts[own]} times"
        assert_close("share of each column", counts / 20_000, shares, 1e-4)

    def test_columns_follow_the_draws_in_order(self):
        scores = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(4, 3)
        draws = torch.tensor([0.0, 0.45, 0.55, LAST])
        found = sample_negatives(scores, torch.tensor([1] * 4), draws)
        assert_close("columns", found, [0, 0, 0, 2])         # two thirds, then one third
        found = sample_negatives(scores, torch.tensor([0] * 4), draws)
        assert_close("columns", found, [1, 1, 2, 2])

    @pytest.mark.parametrize("gap", [0.0, 14.0, 90.0])
    def test_every_other_item_can_be_drawn_however_unlike_it_is(self, gap):
        scores = torch.zeros(1, 4)
        scores[0, 1] = gap
        draws = torch.linspace(0, LAST, 40_001)
        found = sample_negatives(scores.expand(40_001, 4), torch.full((40_001,), 2), draws)
        assert set(found.tolist()) == {0, 1, 3}, f"drawn: {set(found.tolist())}"

    @pytest.mark.parametrize("own", [0, 1])
    @pytest.mark.parametrize("draw", [0.0, 0.5, LAST])
    def test_of_two_the_other_is_drawn(self, own, draw):
        for scores in torch.tensor([[0.0, 0.0], [80.0, -80.0], [-80.0, 80.0]]):
            found = sample_negatives(scores[None], torch.tensor([own]), torch.tensor([draw]))
            assert_close(f"column for scores {scores}", found, [1 - own])

    @pytest.mark.parametrize("draw", [0.0, LAST])
    @pytest.mark.parametrize("columns", [3, 97, 1013])
    def test_at_the_ends_of_the_draws_it_stays_among_the_others(self, columns, draw):
        scores, own = 9 * torch.randn(columns, columns), torch.arange(columns)
        found = sample_negatives(scores, own, torch.full((columns,), draw))
        assert found.max() < columns and not (found == own).any(), f"columns {found}"

    def test_of_several_processes_the_own_column_is_behind_those_of_the_others(self):
        scores = torch.zeros(2, 6)
        scores[0, 4] = scores[1, 5] = 50.0               # a process of rows 4 and 5
        found = sample_negatives(scores, torch.tensor([4, 5]), torch.tensor([LAST, 0.3]))
        assert_close("columns", found, [5, 1])


class TestBestCosine:
    def test_of_several_vectors_of_an_image_the_nearest_to_the_text_counts(self):
        images, texts = torch.randn(3, 4, 5), torch.randn(2, 5)
        assert_close("(N, M)", best_cosine(images, texts), [
            [max(float(query @ text) for query in queries) for text in texts]
            for queries in images])
        assert_close("one vector each (N, M)", best_cosine(images[:, 0], texts),
                     images[:, 0] @ texts.T)


class TestMatching:
    def test_labels_are_one_for_pairs_and_zero_for_sampled_texts_and_images(self):
        B, seen, draws = 4, [], torch.rand(4, 2)
        image = torch.arange(B).double()[:, None, None].expand(B, 2, 3)
        ids = torch.arange(B)[:, None].expand(B, 5)
        scores = torch.randn(2, B, B).double()

        def match(images, texts):
            seen.append((images[:, 0, 0].long(), texts[:, 0]))
            return torch.stack([images[:, 0, 0], 0.3 * texts[:, 0]], dim=1)
        loss = matching(match, image, ids, *scores, draws)
        (images, texts), own = seen[0], torch.arange(B)
        text, other = (sample_negatives(part, own, draws[:, side])
                       for side, part in enumerate(scores))
        assert_close("images (3B,)", images, torch.cat([own, own, other]))
        assert_close("texts (3B,)", texts, torch.cat([own, text, own]))
        logits = match(images[:, None, None].double(), texts[:, None]).log_softmax(dim=1)
        assert_close("loss", loss, -(logits[:B, 1].sum() + logits[B:, 0].sum()) / (3 * B))

    def test_texts_of_several_processes_get_one_length(self):
        ids, lengths = torch.full((2, 3), 7), []

        def gather(x):                   # two processes with the same pairs
            lengths.append(x.shape[1])
            return torch.cat([x, x]), 2

        def match(images, texts):
            assert (texts[:, 3:] == 9).all(), "padding"
            return torch.zeros(len(texts), 2)
        matching(match, torch.randn(2, 6, 3), ids, torch.zeros(2, 4), torch.zeros(2, 4),
                 torch.rand(2, 2), gather, context_length=5, pad_id=9)
        assert lengths == [6, 5], "lengths of images and texts"

    def test_two_processes_have_the_loss_and_gradients_of_one(self):
        image, weight = torch.randn(6, 4, 3).double().requires_grad_(), torch.randn(3, 2).double()
        ids, draws = torch.randint(1, 9, (6, 5)), torch.rand(6, 2)
        ids[:3, 3:] = 9                  # padding: the first process has shorter texts
        scores = torch.randn(2, 6, 6).double()

        def match(images, texts):
            return images.mean(dim=1) @ weight * texts.where(texts != 9, 0).sum(dim=1)[:, None]

        def own(rank, gather):
            rows = slice(3 * rank, 3 * rank + 3)
            return matching(match, image[rows], ids[rows, :(3, 5)[rank]], *scores[:, rows],
                            draws[rows], gather, context_length=7, pad_id=9)
        text, other = (sample_negatives(part, torch.arange(6), draws[:, side])
                       for side, part in enumerate(scores))
        logits = match(torch.cat([image, image, image[other]]), torch.cat([ids, ids[text], ids]))
        log_p = logits.log_softmax(dim=1)
        expected = -(log_p[:6, 1].sum() + log_p[6:, 0].sum()) / 18
        assert_same("mean loss", sum(in_processes(2, own)) / 2, expected, image=image)

    def test_half_precision_logits_are_compared_in_float32(self):
        image, ids, scores = torch.zeros(2, 3, 5), torch.ones(2, 4).long(), torch.zeros(2, 2)
        row = torch.tensor([3.01, -2.0]).bfloat16()
        loss = matching(lambda images, texts: row.expand(6, 2), image, ids, scores, scores,
                        torch.rand(2, 2))
        assert loss.dtype == torch.float32, f"loss is {loss.dtype}"
        log_p = row.double().log_softmax(dim=0)
        assert_close("loss", loss, -(log_p[1] + 2 * log_p[0]) / 3)


class TestNextTokenLoss:
    def test_the_logits_at_t_predict_the_token_at_t_plus_one(self):
        labels = torch.tensor([[3, 1, 4, 1, 5]])
        logits = 99.0 * F.one_hot(labels.roll(-1), 7)   # the last position's do not count
        assert_close("loss of perfect logits", next_token_loss(logits, labels), 0.0)

    @pytest.mark.parametrize("label_count", [None, 17.0])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_it_is_the_mean_over_the_labels_that_count(self, smoothing, label_count):
        logits = torch.randn(2, 6, 7, dtype=torch.float64).requires_grad_()
        labels = torch.tensor([[5, 0, 3, -100, -100, -100], [2, -100, 6, 6, 1, 4]])
        terms = []
        for b in range(2):
            for t in range(5):
                if (target := labels[b, t + 1]) >= 0:
                    log_p = logits[b, t] - logits[b, t].exp().sum().log()
                    terms.append((1 - smoothing) * -log_p[target] + smoothing * -log_p.mean())
        expected = sum(terms) / (label_count or len(terms))
        with unchanged(logits=logits, labels=labels):
            loss = next_token_loss(logits, labels, label_count, label_smoothing=smoothing)
        assert_same("loss", loss, expected, logits=logits)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_with_weights_it_is_the_sum_of_the_rows_sums_times_their_weights(self, smoothing):
        logits = torch.randn(2, 6, 7, dtype=torch.float64).requires_grad_()
        labels = torch.tensor([[6, 4, -100, -100, -100, -100], [6, 1, 0, 3, 5, 2]])
        log_p, sums = logits.log_softmax(dim=-1), []         # answers of 1 and of 5 tokens
        for b, n in enumerate((1, 5)):
            sums.append(sum((smoothing - 1) * log_p[b, t, labels[b, t + 1]]
                            - smoothing * log_p[b, t].mean() for t in range(n)))
        weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
        loss = next_token_loss(logits, labels, 3, smoothing, weights)
        assert_same("loss", loss, (0.7 * sums[0] + 0.3 * sums[1]) / 3, logits=logits)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_half_precision_logits_are_summed_in_float32(self, autocast):
        logits, labels = 9 * torch.randn(3, 5, 7).bfloat16(), torch.randint(7, (3, 5))
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = next_token_loss(logits, labels)
        assert loss.dtype == torch.float32, f"loss is {loss.dtype}"
        log_p = logits[:, :-1].double().log_softmax(dim=-1)
        assert_close("loss", loss, -log_p.gather(2, labels[:, 1:, None]).mean())

    def test_nothing_to_predict_costs_nothing(self):
        labels = torch.tensor([[5, -100, -100]])        # nothing predicts the first token
        logits = torch.randn(1, 3, 7, requires_grad=True)
        assert_same("loss", next_token_loss(logits, labels), 0 * logits.sum(), logits=logits)


class TestCountLabels:
    def test_the_first_label_of_a_row_is_predicted_from_nothing_and_not_counted(self):
        labels = torch.tensor([[3, 0, -100, 4], [-100, 5, -100, -100]])
        count = count_labels([labels, labels[:1]])      # two micro-batches
        assert count.dtype == torch.float32, f"count is {count.dtype}"
        assert_close("labels that are predicted", count, 5.0)

    @pytest.mark.parametrize("own, others, expected", [
        ([7, 3, 5, -100], [8, 9], 19 / 3), ([7, 3, 5, -100], [0, 0], 2 / 3), ([7], [4, 0], 4 / 3)])
    def test_it_is_the_sum_over_processes_divided_by_their_number(self, own, others, expected):
        def gather(x):
            return torch.cat([torch.tensor(others).view(-1, 1).to(x), x]), len(others)
        count = count_labels([torch.tensor([own])], gather)
        assert_close("labels of 3 processes / 3", count, expected)

    def test_a_step_without_labels_counts_one(self):
        assert_close("count", count_labels([torch.full((2, 3), -100)]), 1.0)
