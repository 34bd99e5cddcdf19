"""The Vision Transformer: patches, positions, norms, and the image in one vector."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.vision import (ViT, adapt_weights, check_image_size, patchify,
                           resize_positions)
from tests.helpers import assert_close, assert_same, randomize, refused

WIDTH = 11


class Mixer(nn.Module):
    """A block: each token becomes a mixture of itself and the mean of all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *unused, **arguments):
        return self.fc(x).tanh() + x.mean(dim=1, keepdim=True)

    def forward_at(self, x, index, mask=None):
        return self(x)[torch.arange(len(x)), index]


def make(norms=True, **changes):
    ln_pre, ln_post = (nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)) if norms else (None, None)
    return randomize(ViT(**dict(
        image_size=15, patch_size=5, width=WIDTH, blocks=[Mixer(), Mixer(), Mixer()], ln_pre=ln_pre,
        ln_post=ln_post, patch_bias=norms) | changes)).double()


def draw(B=2, size=15):
    """Images, float32, for a tower of float64."""
    return torch.randn(B, 3, size, size)


def hidden(vit, images, blocks):
    """Patches by a strided convolution, the class token, positions, ln_pre; then the blocks."""
    weight = vit.patch_embed.weight.view(WIDTH, 3, 5, 5)
    x = F.conv2d(images.double(), weight, vit.patch_embed.bias, stride=5).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(x), 1, WIDTH), x], dim=1) + vit.pos_embed
    x = vit.ln_pre(x) if vit.ln_pre else x
    for block in vit.transformer.blocks[:blocks]:
        x = block(x)
    return x


class TestCheckImageSize:
    @pytest.mark.parametrize("shape", [(3, 15, 20), (3, 20, 15), (3, 10, 10), (1, 15, 15)])
    def test_images_of_another_shape_raise_and_both_shapes_are_named(self, shape):
        check_image_size(torch.zeros(2, 3, 15, 15), 15)
        with refused(f"{shape[0]}, {shape[1]}, {shape[2]}.*3, 15, 15"):
            check_image_size(torch.zeros(2, *shape), 15)


class TestPatchify:
    def test_patches_are_cut_row_by_row_and_flattened_channel_first(self):
        images = torch.arange(2 * 5 * 6 * 9.0).view(2, 5, 6, 9)
        expected = [images[:, :, y:y + 3, x:x + 3].flatten(1) for y in (0, 3) for x in (0, 3, 6)]
        assert_close("patches (B, N, C * P * P)", patchify(images, 3), torch.stack(expected, dim=1))

    @pytest.mark.parametrize("H, W", [(14, 20), (20, 14)])
    def test_a_size_that_does_not_divide_raises(self, H, W):
        with refused(f"{H}.*{W}.*5"):
            patchify(torch.zeros(1, 3, H, W), 5)


class TestResizePositions:
    @pytest.mark.parametrize("old, new", [(4, 8), (5, 3), (3, 7), (3, 3)])
    def test_the_grid_is_interpolated_and_the_first_row_stays(self, old, new):
        table = torch.randn(1 + old * old, 11).double().requires_grad_()
        grid = F.interpolate(table[1:].T.view(1, 11, old, old), (new, new), mode="bicubic")[0]
        assert_same("positions (1 + G * G, D)", resize_positions(table, new),
                    torch.cat([table[:1], grid.flatten(1).T]), table=table)


class TestAdaptWeights:
    def test_names_of_the_model_positions_of_its_grid_and_what_is_new_as_it_is(self):
        model, other = nn.Module(), {"old": torch.ones(1), "shared": torch.randn(3),
                                     "tower": torch.randn(1 + 9, 5)}
        for name, shape in (("new", (2,)), ("shared", (3,)), ("tower", (1 + 16, 5))):
            setattr(model, name, nn.Parameter(torch.randn(shape)))
        found = adapt_weights(model, other, "tower")
        assert found.keys() == {"new", "shared", "tower"}
        for name, expected in (("new", model.new), ("shared", other["shared"]),
                               ("tower", resize_positions(other["tower"], 4))):
            assert_close(name, found[name], expected)
        found = adapt_weights(model, {"shared": other["shared"]}, "tower")
        assert_close("positions that the run does not have", found["tower"], model.tower)


@pytest.mark.parametrize("norms", [True, False])
class TestViT:
    @pytest.mark.parametrize("blocks", [0, 2, 3])
    def test_hidden_tokens_are_those_before_the_last_norm(self, norms, blocks):
        vit, images = make(norms), draw()
        del vit.transformer.blocks[blocks:]
        tokens = hidden(vit, images, blocks)
        assert_same("hidden (B, 1 + N, D)", vit.hidden(images), tokens, vit)
        assert_same("patches (B, N, D)", vit.patches(images), tokens[:, 1:], vit)
        if not blocks:
            assert_same("first block's input (B, 1 + N, D)", vit.embed(images), tokens, vit)

    def test_forward_norms_all_tokens_and_pooled_takes_the_class_token(self, norms):
        vit, images = make(norms), draw()
        tokens = hidden(vit, images, 3)
        tokens = vit.ln_post(tokens) if norms else tokens
        assert_same("tokens after the norm (B, 1 + N, D)", vit(images), tokens, vit)
        assert_same("class token (B, D)", vit.pooled(images), tokens[:, 0], vit)

    def test_tokens_and_positions_start_with_the_deviation_of_the_width(self, norms):
        bias = {"patch_bias": True} if norms else {}
        vit = ViT(image_size=80, patch_size=5, width=400, blocks=[], **bias)
        assert vit.pos_embed.shape == (257, 400) and (vit.patch_embed.bias is not None) == norms
        for name in ("cls_token", "pos_embed"):
            assert_close(f"deviation of {name}", getattr(vit, name).std(), 400 ** -0.5, 8e-3)

    def test_a_patch_size_that_does_not_divide_and_other_images_raise(self, norms):
        with refused("15.*4"):
            make(norms, patch_size=4)
        for of in (make(norms), make(norms).hidden, make(norms).pooled):
            with refused("20, 20.*15, 15"):
                of(draw(size=20))
