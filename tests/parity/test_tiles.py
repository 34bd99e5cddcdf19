"""The tiles of LLaVA-NeXT as transformers makes them: the grid, the views, the sequence."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.images import best_grid, count_tokens, pack_tiles, tiles, unpad

pytest.importorskip("transformers",
                    reason="needs transformers: pip install -r tests/requirements.txt")

GRIDS = (2, 1), (1, 2), (2, 2), (1, 3), (3, 1)       # columns, rows, in the order of transformers


def pinpoints(side):
    """The grids as transformers has them: [height, width] in pixels."""
    return [[rows * side, columns * side] for columns, rows in GRIDS]


def sizes(count, most=1500):
    """Sizes (W, H) of pictures; a third of them squares, or nearly."""
    draw = random.Random(0)
    for i in range(count):
        W = draw.randint(1, most)
        yield W, max(1, W + draw.randint(-2, 2)) if i % 3 == 0 else draw.randint(1, most)


def test_the_grid_is_the_same():
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape, image_size_to_num_patches)
    for side in (7, 224, 336):
        for W, H in sizes(2000):
            best = select_best_resolution((H, W), pinpoints(side))
            if best is None:             # a sliver of which no whole pixel would be shown
                assert max(W, H) > side * min(W, H)
                continue
            columns, rows = best_grid((W, H), GRIDS, side)
            assert best == (rows * side, columns * side), (W, H, side)
            assert (rows, columns) == get_anyres_image_grid_shape((H, W), pinpoints(side), side)
            assert 1 + rows * columns == image_size_to_num_patches((H, W), pinpoints(side), side)


def test_unpadding_cuts_the_same():
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    draw = random.Random(1)
    for size in [(47, 47), *sizes(5000)]:
        for h, w in ((6, 9), (9, 6), (24, 48), (draw.randint(1, 72), draw.randint(1, 72))):
            features = torch.arange(h * w * 1.0).view(h, w, 1)
            want = unpad_image(features.permute(2, 0, 1), size[::-1]).permute(1, 2, 0)
            assert torch.equal(unpad(features, size), want), (size, h, w)


@pytest.mark.parametrize("side", [14, 23])
def test_the_views_are_the_same(side):
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil)
    theirs, rng = LlavaNextImageProcessorPil(), np.random.default_rng(0)
    for W, H in [(25, 4), (4, 25), (20, 9), *sizes(100, most=100)]:
        if max(W, H) > side * min(W, H):
            continue
        pixels = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
        want = theirs.get_image_patches(
            pixels.transpose(2, 0, 1), pinpoints(side), size=(side, side), patch_size=side,
            resample=Image.Resampling.BICUBIC)
        got = tiles(Image.fromarray(pixels), GRIDS, side)
        assert len(got) == len(want)
        for k, view in enumerate(got):
            assert np.array_equal(np.array(view).transpose(2, 0, 1), want[k]), (W, H, k)


@pytest.mark.parametrize("side, patch", [(8, 2), (35, 7)])
def test_the_sequence_and_its_length_are_the_same(side, patch):
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    p, D = side // patch, 3
    model = SimpleNamespace(config=SimpleNamespace(
        image_grid_pinpoints=pinpoints(side),
        vision_config=SimpleNamespace(image_size=side, patch_size=patch)))
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints(side)), patch_size=patch,
        num_additional_image_tokens=0, _get_unpadded_features=(
            lambda *numbers: LlavaNextProcessor._get_unpadded_features(None, *numbers)))
    row_end = torch.randn(D)
    for W, H in sizes(200, most=8 * side):
        if max(W, H) > side * min(W, H):
            continue
        grid = best_grid((W, H), GRIDS, side)
        for chosen, views in ((grid, 1 + grid[0] * grid[1]), (None, 1)):
            features = torch.randn(views, p * p, D)
            (want,), _ = LlavaNextModel.pack_image_features(
                model, [features], [(H, W)], "default", image_newline=row_end)
            assert torch.equal(pack_tiles(features, (W, H), chosen, row_end), want), (W, H)
            assert count_tokens((W, H), chosen, p) == len(want)
        length = LlavaNextProcessor._get_number_of_features(processor, H, W, side, side)
        assert count_tokens((W, H), grid, p) == length, (W, H)
