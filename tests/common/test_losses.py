"""Losses against closed forms and hand-computed values."""
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from common.losses import (count_labels, next_token_loss, sigmoid_contrastive,
                           softmax_contrastive)


def unit(*shape):
    return F.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)


def neighbours():
    """Two unit images and two unit texts in float32 whose cosines are about 0.001 apart.

    Times 100, neighbouring cosines round to one bfloat16 number.
    """
    angles = torch.tensor([0.0, 0.4]), torch.tensor([0.450, 0.4530])
    image, text = (torch.stack([a.cos(), a.sin()], dim=1) for a in angles)
    logits = 100 * image @ text.T
    assert ((logits[:, 0] - logits[:, 1]).abs() > 0.01).all()
    assert torch.equal(logits[:, 0].bfloat16(), logits[:, 1].bfloat16())
    return image, text


class TestSoftmaxContrastive:
    @pytest.mark.parametrize("scale", [0.5, 14.3, 100.0])
    def test_identical_features_cost_log_n_at_any_scale(self, scale):
        same = unit(1, 5).expand(7, 5)
        assert softmax_contrastive(same, same, scale).item() == pytest.approx(math.log(7))

    def test_orthonormal_pairs_have_a_closed_form(self):
        eye, s = torch.eye(7, dtype=torch.float64), 3.1
        want = math.log(math.exp(s) + 6) - s
        assert softmax_contrastive(eye, eye, s).item() == pytest.approx(want)

    def test_both_directions_count_by_half(self):
        image, text = unit(3, 5), unit(3, 5)
        logits = 4.0 * image @ text.T
        rows = -sum(logits[i].log_softmax(0)[i] for i in range(3)) / 3
        columns = -sum(logits[:, i].log_softmax(0)[i] for i in range(3)) / 3
        assert not torch.isclose(rows, columns)
        torch.testing.assert_close(softmax_contrastive(image, text, 4.0), (rows + columns) / 2)

    def test_labels_stand_where_the_own_rows_begin(self):
        image, text = unit(6, 5), unit(6, 5)
        losses = []
        for start in (0, 2, 4):
            everything = iter([(image, start), (text, start)])
            own = slice(start, start + 2)
            losses.append(softmax_contrastive(image[own], text[own], 4.0,
                                              lambda x: next(everything)))
        torch.testing.assert_close(sum(losses) / 3, softmax_contrastive(image, text, 4.0))

    def test_under_bf16_autocast_it_is_exact_and_float32(self):
        image, text = neighbours()
        want = softmax_contrastive(image.double(), text.double(), 100.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = softmax_contrastive(image, text, torch.tensor(100.0))
            of_bf16_features = softmax_contrastive(image.bfloat16(), text.bfloat16(), 100.0)
        assert found.dtype == of_bf16_features.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=0)
        rounded = (x.bfloat16().double() for x in (image, text))
        torch.testing.assert_close(of_bf16_features.double(), softmax_contrastive(*rounded, 100.0),
                                   atol=2e-5, rtol=0)


class TestSigmoidContrastive:
    @pytest.mark.parametrize("n, want", [(2, 10.00009), (64, 10.0029), (1024, 10.0465)])
    def test_orthogonal_features_at_the_paper_start(self, n, want):
        image = torch.cat([torch.eye(n), torch.zeros(n, n)], dim=1).double()
        loss = sigmoid_contrastive(image, image.roll(n, dims=1), 10.0, -10.0)
        assert loss.item() == pytest.approx(want, abs=5e-5)

    def test_without_bias_it_starts_at_n_log_2(self):
        zeros = torch.zeros(5, 3)
        assert sigmoid_contrastive(zeros, zeros, 10.0, 0.0).item() == pytest.approx(5 * math.log(2))

    def test_every_pair_is_its_own_question(self):
        image, text, scale, bias = unit(3, 5), unit(3, 5), 4.0, -1.5
        total = 0.0
        for i in range(3):
            for j in range(3):
                logit = scale * float(image[i] @ text[j]) + bias
                total += math.log(1 + math.exp(-logit if i == j else logit))
        assert sigmoid_contrastive(image, text, scale, bias).item() == pytest.approx(total / 3)

    def test_the_gradient_of_the_bias_at_the_start(self):
        n, bias = 7, torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
        zeros = torch.zeros(n, 3, dtype=torch.float64)
        sigmoid_contrastive(zeros, zeros, 10.0, bias).backward()
        sigma = 1 / (1 + math.exp(10))
        assert bias.grad.item() == pytest.approx(-(1 - sigma) + (n - 1) * sigma)

    def test_positives_stand_where_the_own_rows_begin(self):
        image, text = unit(6, 5), unit(6, 5)
        parts = [sigmoid_contrastive(image[k:k + 2], text[k:k + 2], 4.0, -1.5, lambda x: (text, k))
                 for k in (0, 2, 4)]
        torch.testing.assert_close(sum(parts) / 3, sigmoid_contrastive(image, text, 4.0, -1.5))

    def test_under_bf16_autocast_it_is_exact_and_float32(self):
        image, text = neighbours()
        want = sigmoid_contrastive(image.double(), text.double(), 100.0, -90.05)
        with torch.autocast("cpu", torch.bfloat16):
            found = sigmoid_contrastive(image, text, torch.tensor(100.0), torch.tensor(-90.05))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, atol=2e-4, rtol=0)


class TestNextTokenLoss:
    def test_uniform_logits_cost_log_v(self):
        labels = torch.randint(11, (2, 5))
        assert next_token_loss(torch.zeros(2, 5, 11), labels).item() == pytest.approx(math.log(11))

    def test_position_t_predicts_token_t_plus_one(self):
        labels = torch.tensor([[3, 1, 4, 1, 5]])
        logits = torch.full((1, 5, 7), -50.0)
        for t in range(4):
            logits[0, t, labels[0, t + 1]] = 50.0
        assert next_token_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)
        logits[0, 4] = torch.randn(7)       # nothing follows the last position
        assert next_token_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_ignored_labels_leave_numerator_and_denominator(self, smoothing):
        logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
        labels[0, 3:] = -100
        labels[1, 1] = -100
        total, count = 0.0, 0
        for b in range(2):
            for t in range(4):
                target = int(labels[b, t + 1])
                if target >= 0:
                    logp = logits[b, t].log_softmax(0)
                    total += (1 - smoothing) * -logp[target] + smoothing * -logp.mean()
                    count += 1
        torch.testing.assert_close(next_token_loss(logits, labels, label_smoothing=smoothing),
                                   total / count)
        longer = torch.cat([logits, torch.randn(2, 3, 7)], dim=1)
        padded = F.pad(labels, (0, 3), value=-100)
        torch.testing.assert_close(next_token_loss(longer, padded, label_smoothing=smoothing),
                                   total / count)

    def test_a_common_count_makes_micro_batches_add_up(self):
        logits, labels = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
        labels[0, 2:] = -100
        count = (labels[:, 1:] != -100).sum()
        parts = [next_token_loss(logits[k:k + 2], labels[k:k + 2], count) for k in (0, 2)]
        torch.testing.assert_close(sum(parts), next_token_loss(logits, labels))

    def test_half_precision_logits_are_summed_in_float32_and_float64_stays(self):
        logits, labels = torch.randn(3, 5, 7).bfloat16(), torch.randint(7, (3, 5))
        want = next_token_loss(logits.double(), labels)
        assert want.dtype == torch.float64
        for context in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
            with context:
                found = next_token_loss(logits, labels, label_smoothing=0.0)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=0)

    def test_nothing_to_predict_costs_nothing(self):
        assert next_token_loss(torch.randn(1, 3, 7), torch.full((1, 3), -100)).item() == 0


class TestCountLabels:
    def test_the_first_label_of_a_row_is_predicted_from_nothing_and_not_counted(self):
        labels = torch.tensor([[3, 1, -100, 4], [-100, 5, -100, -100]])
        count = count_labels([labels, labels[:1]])
        assert count.item() == 5 and count.dtype == torch.float32 and count.dim() == 0

    def test_a_step_without_labels_counts_one(self):
        assert count_labels([torch.full((2, 3), -100)]).item() == 1

    def test_losses_of_processes_average_to_that_of_the_whole_batch(self):
        logits, labels = torch.randn(6, 5, 7), torch.randint(7, (6, 5))
        labels[0, 2:] = labels[1, 1:] = -100            # the processes have 1, 8 and 8 labels
        parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
        counts = torch.tensor([[(labels[own, 1:] != -100).sum().item()] for own in parts]).float()

        def gather(x):
            assert x.shape == (1, 1)
            return counts, 0
        losses = [next_token_loss(logits[own], labels[own], count_labels([labels[own]], gather))
                  for own in parts]
        torch.testing.assert_close(sum(losses) / 3, next_token_loss(logits, labels))
