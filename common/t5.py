"""T5's relative position bias (Exploring the Limits of Transfer Learning, 2.1), for `t5_block`."""
import math

import torch
from torch import nn


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number per head for each bucket of distances.

    bidirectional: half the buckets are for keys after the query (encoders); else none (decoders).
    """

    def __init__(self, *, heads, buckets=32, max_distance=128, bidirectional=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads).normal_(std=0.02))
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional

    def bucket(self, distance):
        """distance int64 = key position - query position -> bucket numbers of the same shape.

        Of n buckets, the first e = n // 2 are for the distances 0 .. e - 1. Distance d >= e is in
        bucket min(e + floor(log(d / e) / log(max_distance / e) * (n - e)), n - 1). Bidirectional:
        n = buckets // 2, and keys after the query are in buckets n .. 2n - 1. Else n = buckets, and
        a key after the query has distance 0.
        """
        buckets, side = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            side, distance = (distance > 0) * buckets, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2             # one bucket per distance below this, then log-spaced ones
        far = exact + (torch.log(distance.clamp(min=1).float() / exact)
                       / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return side + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, T, S):
        """The bias (1, H, T, S) of S keys and of queries at the last T of their positions."""
        positions = torch.arange(S, device=self.weight.device)
        distance = positions[None, :] - positions[S - T:, None]       # (T, S)
        return self.weight[self.bucket(distance)].permute(2, 0, 1)[None]
