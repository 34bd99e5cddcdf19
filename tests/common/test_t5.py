"""T5's relative position bias: buckets of distances, and one number per head for each."""
import math

import pytest
import torch

from common.t5 import RelativeBias
from tests.helpers import assert_close, assert_same


def bucket(distance, buckets, max_distance, bidirectional):
    """One number of the formula (Mesh TensorFlow's), in Python."""
    side, distance = 0, distance if bidirectional else min(distance, 0)
    if bidirectional:
        buckets //= 2
        side = buckets if distance > 0 else 0
    distance, exact = abs(distance), buckets // 2
    if distance < exact:
        return side + distance
    log = math.log(distance / exact) / math.log(max_distance / exact)
    return side + min(exact + int(log * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
class TestRelativeBias:
    @pytest.mark.parametrize("sizes", [{}, dict(buckets=12, max_distance=50)])
    def test_a_bucket_is_one_near_distance_or_log_spaced_far_ones(self, bidirectional, sizes):
        # Not 16, 32, 64: at an exact power the rounding of a logarithm decides.
        distances = [-9999, -200, -51, -31, -12, -6, -3, -2, -1, 0, 1, 2, 3, 6, 9, 13, 45, 100, 300]
        bias = RelativeBias(heads=3, bidirectional=bidirectional, **sizes)
        sizes = {"buckets": 32, "max_distance": 128} | sizes
        assert_close(f"buckets of {distances}", bias.bucket(torch.tensor([distances])),
                     [[bucket(d, bidirectional=bidirectional, **sizes) for d in distances]])

    @pytest.mark.parametrize("T, S", [(5, 7), (7, 7), (1, 11)])
    def test_the_queries_stand_at_the_last_of_the_positions(self, bidirectional, T, S):
        bias = RelativeBias(heads=3, buckets=12, max_distance=50, bidirectional=bidirectional)
        rows = torch.tensor([[bucket(s - t, 12, 50, bidirectional) for s in range(S)]
                             for t in range(S - T, S)])
        expected = torch.stack([bias.weight[:, head][rows] for head in range(3)])[None]
        assert_same("bias (1, H, T, S)", bias(T, S), expected, bias)

    def test_it_has_a_number_per_bucket_and_head_and_starts_small(self, bidirectional):
        weight = RelativeBias(heads=50, bidirectional=bidirectional).weight
        assert weight.shape == (32, 50)
        assert_close("deviation", weight.std(), 0.02, 2e-3)
