"""Losses against their formulas and closed forms."""
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from common.losses import (count_labels, next_token_loss, no_autocast, no_gather,
                           sigmoid_contrastive, softmax_contrastive)
from tests.helpers import assert_close, assert_same, loss_by_hand, unchanged


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
