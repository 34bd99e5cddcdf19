"""CLIP's ResNet against a second statement of it in plain operations."""
import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.resnet import AttentionPool, Bottleneck, ModifiedResNet, freeze_bn_stats
from tests.helpers import assert_close, assert_same, attend_by_hand, refused


def randomize_all(module):
    """Every number random, running statistics too, so that none is neutral."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.3, 2.0)
        elif tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 4
            nn.init.normal_(tensor.data, std=fan ** -0.5)
    return module.double()


SIZES = dict(image_size=64, stages=(1, 2, 3, 1), width=6, heads=3, embed_dim=7)


def resnet():
    return randomize_all(ModifiedResNet(**SIZES))


def draw(*shape):
    return torch.randn(shape).double().requires_grad_()


def normed(x, bn):
    return F.batch_norm(x, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias,
                        bn.training)


def bottleneck_by_hand(block, x, stride):
    h = normed(F.conv2d(x, block.conv1.weight), block.bn1).clamp(min=0)
    h = normed(F.conv2d(h, block.conv2.weight, padding=1), block.bn2).clamp(min=0)
    h = normed(F.conv2d(F.avg_pool2d(h, stride), block.conv3.weight), block.bn3)
    if stride > 1 or x.shape[1] != h.shape[1]:
        x = normed(F.conv2d(F.avg_pool2d(x, stride), block.shortcut.conv.weight), block.shortcut.bn)
    return (h + x).clamp(min=0)


def grid_by_hand(model, x):
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        conv, bn = getattr(model, f"conv{number}"), getattr(model, f"bn{number}")
        x = normed(F.conv2d(x, conv.weight, stride=stride, padding=1), bn).clamp(min=0)
    x = F.avg_pool2d(x, 2)
    for stage, blocks in enumerate(SIZES["stages"]):
        layer = getattr(model, f"layer{stage + 1}")
        assert len(layer) == blocks, f"stage {stage + 1} has {len(layer)} blocks, not {blocks}"
        for place, block in enumerate(layer):
            x = bottleneck_by_hand(block, x, 2 if stage and not place else 1)
    return torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)


def pool_by_hand(pool, cells, heads):
    """The mean attends to the mean and all cells."""
    x = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + pool.pos_embed
    return attend_by_hand(pool, x[:, :1], x, heads=heads)[:, 0]


class TestBottleneck:
    @pytest.mark.parametrize("channels, stride", [(20, 1), (7, 1), (7, 2), (20, 2)])
    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_its_formula(self, channels, stride, training):
        block, x = Bottleneck(channels=channels, planes=5, stride=stride), draw(3, channels, 6, 8)
        block = randomize_all(block).train(training)
        assert_same("block (B, C, H / stride, W / stride)", block(x),
                    bottleneck_by_hand(block, x, stride), block, x=x)
        changed = stride > 1 or channels != 20
        assert sum(p.numel() for p in block.parameters()) == (
            5 * channels + 25 * 9 + 5 * 20 + 2 * (5 + 5 + 20) + changed * (channels * 20 + 40))

    @pytest.mark.parametrize("stride", [1, 2])
    def test_it_starts_as_its_shortcut_and_learns(self, stride):
        block, x = Bottleneck(channels=20, planes=5, stride=stride).double(), draw(3, 20, 6, 8)
        if stride == 1:
            assert_close("block (B, C, H, W)", block(x), x.clamp(min=0))
        assert_close("block (B, C, H, W)", block(x), block.shortcut(x).clamp(min=0))
        block(x).square().sum().backward()
        assert block.bn3.weight.grad.abs().max() > 0, "the branch can never start"


class TestAttentionPool:
    def test_the_mean_attends_to_the_mean_and_all_cells(self):
        pool = randomize_all(AttentionPool(grid_size=3, width=12, heads=2, embed_dim=7))
        x = draw(5, 9, 12)
        assert_same("pooled (B, E)", pool(x), pool_by_hand(pool, x, heads=2), pool, x=x)

    def test_it_starts_as_the_released_code(self):
        pool = AttentionPool(grid_size=7, width=192, heads=3, embed_dim=97)
        assert pool.pos_embed.shape == (50, 192) and pool.out_proj.weight.shape == (97, 192)
        assert pool.out_proj.bias is not None
        for name, parameter in pool.named_parameters():
            if parameter.dim() == 2:
                assert_close(f"deviation of {name}", parameter.std(), 192 ** -0.5, 2e-3)


class TestModifiedResNet:
    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_its_formula(self, training):
        model, images = resnet().train(training), torch.randn(3, 3, 64, 64)
        cells = grid_by_hand(model, images.double())
        pooled = pool_by_hand(model.pool, cells, heads=3)
        assert_same("cells (B, N, C)", model.hidden(images), cells, model)
        assert_close("patches (B, N, C)", model.patches(images), cells)
        assert_close("pooled (B, E)", model.pooled(images), pooled)
        assert_same("forward (B, E)", model(images), pooled, model)
        assert not any("conv" in name and "bias" in name for name, _ in model.named_parameters())

    @pytest.mark.parametrize("shape", [(3, 64, 96), (3, 32, 32), (1, 64, 64)])
    def test_images_of_another_size_raise(self, shape):
        with refused(f"{shape[1]}, {shape[2]}.*3, 64, 64"):
            resnet().eval()(torch.zeros(1, *shape))

    @pytest.mark.parametrize("changes, words", [
        (dict(image_size=80), "80.*32"), (dict(image_size=0), "0.*32"), (dict(width=1), "width.*1"),
        (dict(stages=(1, 1, 1)), r"\(1, 1, 1\)"), (dict(stages=(1, 0, 1, 1)), r"\(1, 0, 1, 1\)"),
        (dict(heads=5), "192.*5")])
    def test_sizes_that_no_such_network_has_raise(self, changes, words):
        with refused(words):
            ModifiedResNet(**SIZES | changes)


class TestFreezeBnStats:
    @pytest.mark.parametrize("training", [True, False])
    def test_inside_it_outputs_are_the_same_and_no_statistic_moves(self, training):
        model, images = resnet().train(training), torch.randn(3, 3, 64, 64)
        before = {name: x.clone() for name, x in model.named_buffers()}
        with torch.no_grad(), freeze_bn_stats(model):
            frozen = model(images)
        for name, x in model.named_buffers():
            assert_close(name, x, before[name])
        assert_close("forward (B, E)", frozen, model(images))

    @pytest.mark.parametrize("error", [False, True])
    def test_behind_it_the_statistics_move_by_a_tenth_again(self, error):
        model, images = resnet().train(), torch.randn(3, 3, 64, 64)
        with contextlib.suppress(KeyError), freeze_bn_stats(model):
            if error:
                raise KeyError
        stem = F.conv2d(images.double(), model.conv1.weight, stride=2, padding=1)
        expected = 0.9 * model.bn1.running_mean + 0.1 * stem.mean((0, 2, 3))
        model(images)
        assert_close("running mean (C)", model.bn1.running_mean, expected)
        assert model.bn1.num_batches_tracked == 1
