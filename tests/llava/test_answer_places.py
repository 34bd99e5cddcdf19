"""Where the language model's head is computed: the loss and its gradients stay the same."""
import pytest
import torch

from common import losses
from llava import answer_places
from tests.helpers import assert_close

N = -100


class TestAnswerPlaces:
    @pytest.mark.parametrize("labels, places", [
        ([N, N, 5, 6, N, N, 7, N], [1, 2, 3, 5, 6]), ([N, 5, N, 5, N, N, N, N], [0, 1, 2, 3, 0]),
        ([9, N, N, N, N, N, N, 5], [6, 7, 0, 0, 0]), ([9, 8, 7, 6, 5, N, N, N], [0, 1, 2, 3, 4]),
        ([N] * 8, [0] * 5)])
    def test_labels_and_what_stands_before_them(self, labels, places):
        others = [[N, N, 5, 6, N, N, 7, N], labels]            # the first has 5 of them
        assert answer_places(torch.tensor(others))[1].tolist() == places

    def test_without_any_label_there_is_one_place(self):
        assert answer_places(torch.full((3, 7), N)).tolist() == [[0]] * 3

    def test_the_loss_and_its_gradient_are_those_of_all_places(self):
        labels = torch.where(torch.rand(13, 17) < 0.3, torch.randint(11, (13, 17)), N)
        labels[:3, 0] = 4                                      # nothing predicts the first
        logits = torch.randn(13, 17, 11, dtype=torch.float64, requires_grad=True)
        places = answer_places(labels)
        found = logits.gather(1, places[..., None].expand(-1, -1, 11))
        own = labels.gather(1, places).masked_fill(places == 0, N)
        whole, kept = (losses.next_token_loss(*pair) for pair in ((logits, labels), (found, own)))
        assert places.shape[1] < 17 and whole > 1
        assert_close("loss", kept, whole)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (whole, kept)]
        assert_close("gradient of the logits (B, T, V)", grads[1], grads[0])
