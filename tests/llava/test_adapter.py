"""Qwen-VL's adapter against torch's own attention layer, with positions written anew."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava import Adapter
from tests.helpers import assert_same, randomize, refused

N, C, D, H = 2, 14, 24, 3


def toy(num_queries=9):
    torch.manual_seed(4)
    return randomize(Adapter(context_width=C, width=D, heads=H, num_queries=num_queries).double())


def mae_positions(side, width):
    """Masked Autoencoders' table, cell by cell, of 0 .. 16 in both axes: float64 (side * side, D)."""
    table = np.empty((side, side, width))
    for row in range(side):
        for column in range(side):
            for k in range(width // 4):
                step = 10000 ** (-4 * k / width)
                for half, place in enumerate((column * 16 / side, row * 16 / side)):
                    table[row, column, half * width // 2 + k] = np.sin(place * step)
                    table[row, column, half * width // 2 + width // 4 + k] = np.cos(place * step)
    return torch.from_numpy(table).flatten(0, 1)


def norm(layer, x):
    return F.layer_norm(x, (D,), layer.weight, layer.bias, 1e-6)


def by_torch(adapter, patches):
    """Qwen-VL's released order of steps: patches (N, S, C) -> (N, Q, D)."""
    own, G, side = adapter.attn, round(len(adapter.queries) ** 0.5), round(patches.shape[1] ** 0.5)
    values = norm(adapter.ln_kv, patches @ adapter.kv_proj.weight.T)
    table = mae_positions(G, D)
    keys = F.interpolate(table.T.unflatten(1, (G, G))[None], size=(side, side), mode="bicubic",
                         align_corners=False)[0].flatten(1).T         # (S, D)
    queries = (norm(adapter.ln_q, adapter.queries) + table).expand(len(patches), -1, -1)
    parts = [own.q_proj, own.k_proj, own.v_proj]
    out, _ = F.multi_head_attention_forward(
        *(x.transpose(0, 1) for x in (queries, values + keys, values)), D, H,
        torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]),
        None, None, False, 0.0, own.out_proj.weight, own.out_proj.bias)
    return norm(adapter.ln_post, out.transpose(0, 1)) @ adapter.out.weight.T


class TestAdapter:
    @pytest.mark.parametrize("side", [3, 5, 2], ids=["same", "finer", "coarser"])
    def test_it_is_torchs_attention_with_positions_on_queries_and_keys(self, side):
        adapter, patches = toy(), torch.randn(N, side * side, C).double().requires_grad_()
        assert_same("features (N, Q, D)", adapter(patches), by_torch(adapter, patches), adapter,
                    1e-5, patches=patches)

    def test_columns_and_rows_are_told_apart(self):
        adapter, patches = toy(), torch.randn(1, 25, C).double()
        mirrored = patches.unflatten(1, (5, 5)).transpose(1, 2).flatten(1, 2)
        assert (adapter(patches) - adapter(mirrored)).abs().max() > 1e-2

    def test_the_papers_size(self):
        """The matrices of attention, the last one, the projection of ViT-bigG's features."""
        with torch.device("meta"):
            adapter = Adapter(context_width=1664, width=4096, heads=32, num_queries=256)
        attention, norms = 4 * (4096 * 4096 + 4096), 3 * 2 * 4096
        expected = attention + norms + 4096 * 4096 + 1664 * 4096 + 256 * 4096
        assert sum(p.numel() for p in adapter.parameters()) == expected == 91_791_360

    def test_queries_that_form_no_square_are_refused(self):
        with refused("num_queries=8"):
            toy(num_queries=8)
