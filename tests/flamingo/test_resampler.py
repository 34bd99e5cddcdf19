"""The resampler, its ablation and the frame embeddings, against loops over single vectors."""
import pytest
import torch

import flamingo
from common.transformer import LayerNorm
from flamingo import Flamingo, FrameEmbed
from tests.helpers import (assert_close, flamingo_config, loop_mlp, loop_norm, loop_resampler, make_batch, make_features,
    toy_flamingo)

class TestResampler:
    @pytest.mark.parametrize("frames", [1, 4])
    def test_it_is_the_papers_loop_for_each_image_or_clip(self, frames):
        resampler, features = toy_flamingo().resampler, make_features(frames=frames)
        visual = resampler(features)
        assert visual.shape == (2, 3, 7, 22)
        for b in range(2):
            for n in range(3):
                assert_close("outputs", visual[b, n], loop_resampler(resampler, features[b, n]))

    def test_each_image_is_resampled_alone(self):
        resampler, features = toy_flamingo().resampler, make_features()
        visual, other = resampler(features), features.clone()
        other[1, 0] += 1
        same = (resampler(other) == visual).flatten(2).all(-1)
        assert same.tolist() == [[True] * 3, [False, True, True]]

    def test_different_images_have_different_tokens_from_the_start(self):
        visual = Flamingo(flamingo_config()).resampler(torch.randn(200, 1, 1, 9, 22))
        share = (visual - visual.mean(dim=0)).square().sum() / visual.square().sum()
        assert share > 0.05                          # 0.005 when the latents start at N(0, 1)

    def test_keys_are_the_features_and_the_latents(self):
        model, lengths = toy_flamingo(), []
        for layer in model.resampler.layers:
            layer.attn.k_proj.register_forward_hook(lambda m, i, out: lengths.append(out.shape[1]))
        model.resampler(make_features(frames=4))
        assert lengths == [4 * 9 + 7] * 2

    def test_media_and_latents_have_separate_norms_and_the_output_has_one(self):
        resampler = toy_flamingo(resampler_layers=3).resampler
        assert sum(isinstance(m, LayerNorm) for m in resampler.modules()) == 3 * 3 + 1
        assert len({norm for layer in resampler.layers
                    for norm in (layer.media_norm, layer.latents_norm)}) == 6

    def test_only_norms_have_biases(self):
        for name, _ in [*toy_flamingo().resampler.named_parameters(), *toy_flamingo().gated.named_parameters()]:
            assert not name.endswith("bias") or "norm" in name

    def test_features_of_a_frame_have_no_order_and_frames_have(self):
        resampler, features = toy_flamingo().resampler, make_features(2, 1, frames=4)
        assert_close("outputs", resampler(features[:, :, :, torch.randperm(9)]), resampler(features))
        assert not torch.allclose(resampler(features.flip(2)), resampler(features))
        without = toy_flamingo(max_frames=0).resampler
        assert not list(without.frames.parameters())
        assert_close("outputs", without(features.flip(2)), without(features))

    def test_squared_relu_and_gelu(self):
        x = torch.tensor([-1.0, 0.0, 0.5, 2.0]).double()
        assert_close("outputs", flamingo.ACTIVATIONS["squared_relu"](x), torch.tensor([0.0, 0.0, 0.25, 4.0]).double())
        assert_close("outputs", flamingo.ACTIVATIONS["gelu"](x),
              torch.tensor([-0.158655, 0.0, 0.345731, 1.954500]).double(), 1e-6)
        for act in ("squared_relu", "gelu"):
            for resampler in ("perceiver", "mlp"):
                model = toy_flamingo(act=act, resampler=resampler)
                own = model.resampler if resampler == "mlp" else model.resampler.layers[1]
                for mlp, hidden in ((own.mlp, 4 * 22), (model.gated[2].mlp, 4 * 20)):
                    assert mlp.act is flamingo.ACTIVATIONS[act]
                    assert mlp.fc1.weight.shape[0] == hidden


class TestMLPResampler:
    def test_every_feature_becomes_a_token_by_itself(self):
        model, features = toy_flamingo(resampler="mlp"), make_features(frames=4)
        visual, resampler = model.resampler(features), model.resampler
        assert visual.shape == (2, 3, 36, 22)
        x = features[1, 2, 3, 5] + resampler.frames.weight[3]
        x = x + loop_mlp(resampler.mlp, loop_norm(x, resampler.mlp_norm))
        assert_close("outputs", visual[1, 2, 3 * 9 + 5], loop_norm(x, resampler.norm))
        assert model(make_batch("I....", ".I..I"))["lm"].isfinite()


class TestFrameEmbed:
    def added(self, frames):
        """A table of 8 rows, and what it adds to each frame of a clip: (8, D) and (F, D)."""
        embed = FrameEmbed(8, 22).double()
        out = embed(torch.zeros(1, 1, frames, 9, 22).double())[0, 0]
        assert (out == out[:, :1]).all()                # one vector for all features of a frame
        return embed.weight, out[:, 0]

    def test_a_clip_of_the_trained_length_gets_the_table(self):
        table, added = self.added(8)
        assert torch.equal(added, table)

    def test_a_longer_clip_gets_the_table_interpolated_linearly(self):
        table, added = self.added(30)
        assert_close("outputs", added[0], table[0])
        assert_close("outputs", added[-1], table[-1])
        for i in range(30):
            place = i * 7 / 29
            low = min(int(place), 6)
            assert_close("outputs", added[i], table[low] + (place - low) * (table[low + 1] - table[low]))

    def test_a_shorter_clip_gets_both_ends(self):
        table, added = self.added(2)
        assert_close("outputs", added, table[[0, -1]])

    def test_an_image_gets_the_first_row(self):
        table, added = self.added(1)
        assert torch.equal(added, table[:1])

    def test_features_keep_their_type(self):
        features = torch.randn(1, 1, 3, 9, 22).bfloat16()
        assert FrameEmbed(8, 22)(features).dtype == torch.bfloat16

    def test_without_frames_nothing_is_added(self):
        features = make_features(frames=3)
        assert FrameEmbed(0, 22)(features) is features
