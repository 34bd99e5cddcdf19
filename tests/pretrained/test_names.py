"""Tables of names: templates, tensors taken apart, names without a row."""
import re

import pytest
import torch

from common.pretrained import names
from common.pretrained.names import Table, expand, translate
from tests.fuzz import one_line
from tests.helpers import assert_close


@pytest.mark.parametrize("change, pieces", [
    ("same", lambda w: [w]), ("transpose", lambda w: [w.T]),
    ("halves", lambda w: [w[:6], w[6:]]), ("thirds", lambda w: [w[:4], w[4:8], w[8:]]),
    ("transposed_thirds", lambda w: [w[:, :5].T, w[:, 5:10].T, w[:, 10:].T])])
def test_changes_of_a_matrix(change, pieces):
    weight = torch.randn(12, 15)
    for i, (got, want) in enumerate(zip(getattr(names, change)(weight), pieces(weight),
                                        strict=True)):
        assert_close(f"part {i} of {change}", got, want)


def test_flatten_patches_makes_a_linear_of_a_strided_convolution():
    kernel, image = torch.randn(7, 3, 5, 5), torch.randn(3, 10, 15)
    flat, = names.flatten_patches(kernel)
    patches = [image[:, y:y + 5, x:x + 5].flatten() for y in (0, 5) for x in (0, 5, 10)]
    conv = torch.nn.functional.conv2d(image[None], kernel, stride=5)[0].flatten(1).T
    assert_close("patches (6, D)", torch.stack(patches) @ flat.T, conv)


class TestExpand:
    def test_braces_are_expanded_in_order(self):
        assert expand("a.{n}.{x,y}", {"n": 2}) == ["a.0.x", "a.0.y", "a.1.x", "a.1.y"]
        assert expand("plain", {}) == ["plain"] and expand("a.{n}", {"n": 0}) == []


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

    def test_names_without_a_row_stay_on_one_line(self, table):
        theirs = dict.fromkeys(("h.2.ln_1.bias", "odd\nname"), torch.ones(5))
        ours = translate(theirs, table, {"layers": 2}, "here")
        assert list(ours) == ["h.2.ln_1.bias", "odd?name"]

    @pytest.mark.parametrize("name, shape", [
        ("h.0.out", (5,)), ("h.1.kv", ()), ("h.0.conv", (7, 3))])
    def test_a_tensor_of_too_few_dimensions_is_named_with_its_shape(self, table, name, shape):
        with one_line(f"^here: {name} .*{re.escape(str(shape))}"):
            translate({name: torch.zeros(shape)}, table, {"layers": 2}, "here")


class TestCount:
    def test_layers_are_counted_from_the_names(self):
        found = [f"h.{i}.{name}" for i in range(3) for name in "ab"] + ["x.h.7.a"]
        assert names.count(dict.fromkeys(found), r"h\.(\d+)\.") == 3
        assert names.count({}, r"h\.(\d+)\.") == 0
