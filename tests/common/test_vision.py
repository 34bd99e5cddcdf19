"""The Vision Transformer: patches, positions, norms, and the image in one vector."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import LayerNorm, vit_block
from common.vision import ViT, patchify, resize_positions


def make(ln_pre=True, ln_post=True):
    width = 12
    vit = ViT(image_size=15, patch_size=5, width=width, blocks=[vit_block(width=width, heads=3)],
              ln_pre=LayerNorm(width) if ln_pre else None,
              ln_post=LayerNorm(width) if ln_post else None, patch_bias=True).double()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.5)
    return vit


def test_patches_are_cut_row_by_row_channel_first():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            want = images[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2].flatten(1)
            assert torch.equal(patches[:, 3 * row + column], want), f"patch at {row}, {column}"


def test_the_patch_embedding_is_the_strided_convolution():
    vit, images = make(ln_pre=False), torch.randn(2, 3, 15, 15).double()
    weight = vit.patch_embed.weight.view(12, 3, 5, 5)
    want = F.conv2d(images, weight, vit.patch_embed.bias, stride=5).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.embed(images)[:, 1:], want + vit.pos_embed[1:])


def test_a_change_in_one_patch_changes_one_token_of_the_embedding():
    vit, images = make(), torch.randn(1, 3, 15, 15).double()
    other = images.clone()
    other[:, :, 5:10, 10:] += 1             # row 1, column 2: patch 5
    changed = (vit.embed(images) != vit.embed(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 5]


def test_the_class_token_comes_first_with_the_first_position():
    vit = make(ln_pre=False)
    token = vit.embed(torch.randn(1, 3, 15, 15).double())[0, 0]
    torch.testing.assert_close(token, vit.cls_token + vit.pos_embed[0])


def test_the_pre_norm_takes_the_scale_of_the_patches_away():
    vit, images = make(), torch.randn(1, 3, 15, 15).double()
    nn.init.zeros_(vit.pos_embed)
    nn.init.zeros_(vit.patch_embed.bias)
    torch.testing.assert_close(vit.embed(images)[:, 1:], vit.embed(10 * images)[:, 1:],
                               atol=1e-3, rtol=1e-3)


def test_forward_norms_every_token_and_hidden_none():
    vit, images = make(), torch.randn(2, 3, 15, 15).double()
    torch.testing.assert_close(vit(images), vit.ln_post(vit.hidden(images)))
    plain = make(ln_post=False)
    assert torch.equal(plain(images), plain.hidden(images))


def test_positions_tell_patches_apart():
    vit, images = make(), torch.randn(1, 3, 15, 15).double()
    moved = images.roll(5, dims=3)
    assert not torch.allclose(vit(images)[:, 0], vit(moved)[:, 0])


def test_resizing_keeps_the_class_row_and_the_layout():
    table = torch.randn(1 + 9, 7)
    assert torch.equal(resize_positions(table, 3)[0], table[0])
    torch.testing.assert_close(resize_positions(table, 3), table)
    ramp = torch.zeros(1 + 16, 2)
    ramp[1:, 0], ramp[1:, 1] = torch.arange(16) // 4, torch.arange(16) % 4    # row, column
    large = resize_positions(ramp, 8)[1:].view(8, 8, 2)
    torch.testing.assert_close(large[..., 0], large[..., 1].T)
    assert (large[2:6, 4, 0].diff() > 0.3).all() and large[4, 3, 0] == pytest.approx(large[4, 5, 0])


@pytest.mark.parametrize("shape", [(3, 15, 20), (3, 10, 10), (1, 15, 15)])
def test_pictures_of_another_size_are_told(shape):
    with pytest.raises(ValueError, match=r"this tower takes \(3, 15, 15\)"):
        make()(torch.zeros(1, *shape).double())


def test_a_size_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match="an image of 21x14 pixels does not divide into patches of 5"):
        patchify(torch.zeros(1, 3, 14, 21), 5)


def test_pooled_is_the_class_token_after_the_last_norm():
    vit, images = make(), torch.randn(2, 3, 15, 15).double()
    torch.testing.assert_close(vit.pooled(images), vit(images)[:, 0])
    plain = make(ln_post=False)
    torch.testing.assert_close(plain.pooled(images), plain.hidden(images)[:, 0])


def test_patches_are_the_hidden_tokens_without_the_class_token():
    vit, images = make(), torch.randn(2, 3, 15, 15).double()
    assert torch.equal(vit.patches(images), vit.hidden(images)[:, 1:])
    assert torch.equal(vit.hidden(images, skip_blocks=1), vit.embed(images))
    assert torch.equal(vit.patches(images, skip_blocks=1), vit.embed(images)[:, 1:])


def test_a_tower_runs_on_the_meta_device():
    vit = make().to("meta")
    assert vit.pooled(torch.empty(2, 3, 15, 15, device="meta")).shape == (2, 12)
