"""Tables of names; each change of a tensor is shown by the published layouts that need it."""
import re

import pytest
import torch

from common.pretrained import names
from common.pretrained.names import Table, translate
from tests.fuzz import one_line
from tests.helpers import assert_close


@pytest.fixture
def table():
    return Table(names.under("h.{layers}", "blocks.{layers}", (
        (".ln_{1,2}.bias", ".{attn,mlp}_norm.bias"), (".out", ".out.weight", names.transpose),
        (".kv", ".{k,v}_proj.weight", names.halves), (".conv", ".conv", names.flatten_patches))),
        ignored=("*.mask", "head.weight"))


class TestTranslate:
    def test_tensors_are_renamed_taken_apart_and_ignored(self, table):
        theirs = {"h.1.ln_2.bias": torch.randn(3).half(), "h.1.ln_1.bias": torch.randn(5),
                  "h.0.kv": torch.randn(4, 5), "h.1.out": torch.randn(3, 7),
                  "h.0.mask": torch.ones(1), "head.weight": None}
        ours = translate(theirs, table, {"layers": 2}, "here")
        want = {"blocks.1.attn_norm.bias": theirs["h.1.ln_1.bias"],
                "blocks.1.mlp_norm.bias": theirs["h.1.ln_2.bias"],
                "blocks.0.k_proj.weight": theirs["h.0.kv"][:2],
                "blocks.0.v_proj.weight": theirs["h.0.kv"][2:],
                "blocks.1.out.weight": theirs["h.1.out"].T}
        assert set(ours) == set(want)
        for name, weight in want.items():
            assert_close(name, ours[name], weight, 0)

    @pytest.mark.parametrize("name, shape", [
        ("h.0.out", (5,)), ("h.1.kv", ()), ("h.0.conv", (7, 3))])
    def test_a_tensor_of_too_few_dimensions_is_named_with_its_shape(self, table, name, shape):
        with one_line(f"^here: {name} .*{re.escape(str(shape))}"):
            translate({name: torch.zeros(shape)}, table, {"layers": 2}, "here")
