"""CLIP's ResNet against a second statement of it in plain operations."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.resnet import AttentionPool, Bottleneck, ModifiedResNet, freeze_bn_stats
from common.vision import resize_positions


def randomize_all(module):
    """Every number of it drawn, running statistics too, so that none is a neutral one."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.3, 2.0)
        elif tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 4
            nn.init.normal_(tensor.data, std=fan ** -0.5)
    return module.double()


def resnet(**changes):
    sizes = dict(image_size=64, stages=(1, 2, 1, 1), width=6, heads=3, embed_dim=7) | changes
    return randomize_all(ModifiedResNet(**sizes))


def squares(side=64, rows=3):
    return torch.randn(rows, 3, side, side).double()


def normed(x, bn, training):
    mean, variance = bn.running_mean, bn.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    mean, variance, gain, bias = (v[:, None, None] for v in (mean, variance, bn.weight, bn.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * gain + bias


def averaged(x, side):
    B, C, H, W = x.shape
    return x.view(B, C, H // side, side, W // side, side).mean((3, 5))


def pixelwise(x, conv):
    return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x)


def bottleneck_again(x, block, stride):
    on = block.training
    h = normed(pixelwise(x, block.conv1), block.bn1, on).clamp(min=0)
    h = normed(F.conv2d(h, block.conv2.weight, padding=1), block.bn2, on).clamp(min=0)
    h = normed(pixelwise(averaged(h, stride), block.conv3), block.bn3, on)
    if stride > 1 or x.shape[1] != h.shape[1]:
        x = normed(pixelwise(averaged(x, stride), block.shortcut.conv), block.shortcut.bn, on)
    return (h + x).clamp(min=0)


def grid_again(model, x):
    on = model.training
    for conv, bn, stride in ((model.conv1, model.bn1, 2), (model.conv2, model.bn2, 1),
                             (model.conv3, model.bn3, 1)):
        x = F.conv2d(x, conv.weight, stride=stride, padding=1)
        x = normed(x, bn, on).clamp(min=0)
    x = averaged(x, 2)
    for number, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        for place, block in enumerate(layer):
            x = bottleneck_again(x, block, 2 if number and not place else 1)
    return torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)


def pool_again(pool, cells, heads):
    x = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + pool.pos_embed
    x, C = x.transpose(0, 1), x.shape[2]
    biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    out, _ = F.multi_head_attention_forward(
        x[:1], x, x, C, heads, None, biases, None, None, False, 0.0,
        pool.out_proj.weight, pool.out_proj.bias, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight, need_weights=False)
    return out[0]


class TestBottleneck:
    @pytest.mark.parametrize("channels, stride", [(20, 1), (7, 1), (7, 2), (20, 2)])
    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_its_formula(self, channels, stride, training):
        block = randomize_all(Bottleneck(channels=channels, planes=5, stride=stride)).train(training)
        x = torch.randn(3, channels, 6, 8).double()
        got = block(x)
        assert got.shape == (3, 20, 6 // stride, 8 // stride)
        torch.testing.assert_close(got, bottleneck_again(x, block, stride))

    def test_no_pixel_falls_through_a_stride(self):
        block = randomize_all(Bottleneck(channels=20, planes=5, stride=2)).eval()
        for dead in ("shortcut.bn", "bn3"):         # one way in alone
            x = torch.randn(3, 20, 6, 8).double().requires_grad_()
            weight = block.get_submodule(dead).weight
            kept, weight.data = weight.data, torch.zeros_like(weight)
            block.get_submodule("bn3").bias.data.fill_(50)    # the last ReLU lets all pass
            block(x).sum().backward()
            weight.data = kept
            assert (x.grad.abs().sum((0, 1)) > 1e-6).all(), dead

    def test_it_starts_as_its_shortcut(self):
        x = torch.randn(3, 20, 6, 8).double()
        plain = Bottleneck(channels=20, planes=5).double()
        torch.testing.assert_close(plain(x), x.relu())
        block = Bottleneck(channels=20, planes=5, stride=2).double()
        torch.testing.assert_close(block(x), block.shortcut(x).relu())


class TestAttentionPool:
    def make(self):
        return randomize_all(AttentionPool(grid_size=3, width=12, heads=2, embed_dim=7))

    def test_it_is_torchs_attention_of_the_mean_over_mean_and_cells(self):
        pool, cells = self.make(), 2 * torch.randn(5, 9, 12).double()
        assert pool(cells).shape == (5, 7)
        torch.testing.assert_close(pool(cells), pool_again(pool, cells, heads=2))

    @pytest.mark.parametrize("row", [0, 1, 9])
    def test_every_position_has_a_say(self, row):
        pool, cells = self.make(), torch.randn(1, 9, 12).double()
        before = pool(cells)
        pool.pos_embed.data[row] += 1
        assert (pool(cells) - before).abs().max() > 1e-3

    def test_without_positions_the_order_of_the_cells_says_nothing(self):
        pool, cells = self.make(), torch.randn(2, 9, 12).double()
        moved = cells.flip(1)
        assert not torch.allclose(pool(cells), pool(moved))
        pool.pos_embed.data.zero_()
        torch.testing.assert_close(pool(cells), pool(moved))

    def test_its_initialisation_is_the_released_codes(self):
        pool = AttentionPool(grid_size=7, width=192, heads=3, embed_dim=97)
        for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.out_proj):
            assert linear.weight.std().item() == pytest.approx(192 ** -0.5, rel=0.05)
            assert linear.bias is not None
        assert pool.pos_embed.std().item() == pytest.approx(192 ** -0.5, rel=0.05)
        assert pool.pos_embed.shape == (50, 192) and pool.out_proj.weight.shape == (97, 192)

    def test_heads_that_do_not_divide_are_told(self):
        with pytest.raises(ValueError, match="width 12 does not divide into 5 heads"):
            AttentionPool(grid_size=3, width=12, heads=5, embed_dim=7)

    def test_its_positions_stretch_to_a_finer_grid(self):
        pool, fine = self.make(), AttentionPool(grid_size=5, width=12, heads=2, embed_dim=7).double()
        stretched = resize_positions(pool.pos_embed.detach(), 5)
        assert stretched.shape == fine.pos_embed.shape
        assert torch.equal(stretched[0], pool.pos_embed[0])


class TestResNet:
    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_its_formula(self, training):
        model, images = resnet().train(training), squares()
        cells = grid_again(model, images)
        assert cells.shape == (3, 4, 192)
        torch.testing.assert_close(model.hidden(images), cells)
        torch.testing.assert_close(model.patches(images), cells)
        torch.testing.assert_close(model(images), pool_again(model.pool, cells, heads=3))
        torch.testing.assert_close(model.pooled(images), model(images))

    def test_the_stages_double_channels_and_halve_sides(self):
        model, sizes = resnet(stages=(2, 1, 3, 1)).eval(), []
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            layer.register_forward_hook(lambda m, i, out: sizes.append((len(m), *out.shape[1:])))
        model(squares(rows=1))
        assert sizes == [(2, 24, 16, 16), (1, 48, 8, 8), (3, 96, 4, 4), (1, 192, 2, 2)]

    def test_the_parameter_names_are_the_released_ones_but_for_shortcut_and_pool(self):
        names = {name.rsplit(".", 1)[0] for name, _ in resnet().named_parameters()}
        assert {"conv1", "bn1", "conv3", "bn3", "layer1.0.shortcut.conv", "layer1.0.shortcut.bn",
                "layer2.1.conv3", "layer2.1.bn3", "pool.q_proj", "pool.out_proj", "pool"} <= names
        assert not any("shortcut" in name for name in names if name.startswith("layer2.1."))

    def test_every_block_starts_as_its_shortcut(self):
        model = ModifiedResNet(image_size=64, stages=(1, 2, 1, 1), width=6, heads=3, embed_dim=7)
        gains = [m.bn3.weight for m in model.modules() if isinstance(m, Bottleneck)]
        assert len(gains) == 5 and all((gain == 0).all() for gain in gains)
        assert (model.bn3.weight == 1).all()            # the stem's is no residual's
        model(torch.randn(3, 3, 64, 64)).square().sum().backward()
        assert all(gain.grad.abs().max() > 0 for gain in gains), "a block that never wakes"

    def test_the_gradient_reaches_every_parameter(self):
        model = resnet(embed_dim=1)
        model(squares()).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name != "pool.k_proj.bias":              # adds one number to all scores of a row
                assert parameter.grad.abs().max() > 1e-8, name

    def test_in_eval_mode_pictures_are_read_alone_and_no_statistic_moves(self):
        model, images = resnet().eval(), squares()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(model(images[1:2]), model(images)[1:2])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_in_train_mode_the_statistics_of_the_batch_are_kept_for_later(self):
        model, images = resnet().train(), squares()
        stem = F.conv2d(images, model.conv1.weight, stride=2, padding=1)
        want = 0.9 * model.bn1.running_mean + 0.1 * stem.mean((0, 2, 3))
        model(images)
        torch.testing.assert_close(model.bn1.running_mean, want)

    def test_statistics_at_rest_change_no_output_and_do_not_move(self):
        model, images = resnet().train(), squares()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with freeze_bn_stats(model):
            resting = model(images)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(model(images), resting)
        assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
        assert model.bn1.num_batches_tracked == before["bn1.num_batches_tracked"] + 1

    @pytest.mark.parametrize("shape", [(3, 64, 96), (3, 32, 32), (1, 64, 64)])
    def test_pictures_of_another_size_are_told(self, shape):
        with pytest.raises(ValueError, match=r"this tower takes \(3, 64, 64\)"):
            resnet().eval()(torch.zeros(1, *shape).double())

    def test_it_runs_on_the_meta_device(self):
        assert resnet().to("meta").pooled(squares().to("meta")).shape == (3, 7)

    @pytest.mark.parametrize("changes, words", [
        (dict(image_size=80), "image_size 80: a ResNet takes a multiple of 32"),
        (dict(image_size=0), "image_size 0"), (dict(stages=(1, 1, 1)), "four stages"),
        (dict(stages=(1, 0, 1, 1)), "at least 1 block"), (dict(width=1), "of at least 2"),
        (dict(heads=5), "width 192 does not divide into 5 heads")])
    def test_sizes_that_no_such_network_has_are_told(self, changes, words):
        with pytest.raises(ValueError, match=words):
            resnet(**changes)
