"""The resampler, its ablation and the frame embeddings, against loops over single vectors."""
import pytest
import torch

from flamingo import FrameEmbed, MLPResampler, Resampler, ResamplerLayer
from tests.helpers import (ACTS, assert_close, layer_norm, loop_resampler, loop_resampler_layer,
                           mlp_by_hand, randomize, unchanged)

ATTENTION = {"heads": 5, "head_width": 3}             # 15 inside, for features 22 wide


def make(kind, act="squared_relu", **more):
    """A module of this file in float64 with random weights."""
    return randomize(kind(width=22, act=ACTS[act], **more), 0.3).double()


def make_features(B=2, N=3, frames=1):
    """Random features of the vision encoder, float64 (B, N, F, S, D)."""
    return torch.randn(B, N, frames, 9, 22).double()


def count(module):
    return sum(p.numel() for p in module.parameters())


LAYER = 4 * 22 * 15 + 2 * 22 * 88 + 6 * 22            # attention, MLP, and three norms with biases


class TestResamplerLayer:
    @pytest.mark.parametrize("act", ["squared_relu", "gelu"])
    def test_it_is_the_papers_loop(self, act):
        layer = make(ResamplerLayer, act, **ATTENTION)
        latents, media = torch.randn(2, 7, 22).double(), torch.randn(2, 11, 22).double()
        expected = loop_resampler_layer(layer, latents, media, act=act)
        with unchanged(latents=latents, media=media):
            assert_close("latents (B, Q, D)", layer(latents, media), expected)

    def test_its_parts_have_weights_of_their_own_and_no_biases_but_the_norms(self):
        layer = make(ResamplerLayer, **ATTENTION)
        assert count(layer) == LAYER, f"{count(layer)} parameters, expected {LAYER}"


class TestFrameEmbed:
    @pytest.mark.parametrize("frames", [1, 2, 5, 8, 30])
    def test_frames_get_the_table_interpolated_from_end_to_end_and_an_image_its_first_row(
            self, frames):
        embed, features = FrameEmbed(8, 22).double(), make_features(frames=frames)
        place = torch.arange(frames).double() * 7 / max(1, frames - 1)
        low = place.long().clamp(max=6)
        expected = embed.weight[low].lerp(embed.weight[low + 1], (place - low)[:, None])
        added = expected[:, None].expand_as(features)
        with unchanged(features=features):
            assert_close("added (B, N, F, S, D)", embed(features) - features, added)

    def test_frames_differ_from_the_start(self):
        assert FrameEmbed(8, 22).weight.std(dim=0).min() > 0.05, "rows of the table are alike"

    def test_features_keep_their_type(self):
        features = FrameEmbed(8, 22)(torch.randn(1, 1, 3, 9, 22).bfloat16())
        assert features.dtype == torch.bfloat16, f"{features.dtype}"

    def test_without_frames_nothing_is_added_or_learned(self):
        embed, features = FrameEmbed(0, 22), make_features(frames=3)
        assert_close("features (B, N, F, S, D)", embed(features), features)
        assert not list(embed.parameters()), "parameters"


class TestResampler:
    def make(self, act="squared_relu"):
        return make(Resampler, act, num_latents=7, layers=3, max_frames=4, **ATTENTION)

    @pytest.mark.parametrize("frames, act", [(1, "squared_relu"), (4, "gelu")])
    def test_it_is_the_papers_loop_for_each_image_or_clip(self, frames, act):
        resampler, features = self.make(act), make_features(frames=frames)
        expected = loop_resampler(resampler, features, act)
        assert_close("visual tokens (B, N, Q, D)", resampler(features), expected)

    def test_its_parts_have_weights_of_their_own(self):
        expected = 3 * LAYER + 7 * 22 + 4 * 22 + 2 * 22      # latents, frames, the last norm
        assert count(self.make()) == expected, f"{count(self.make())} parameters, not {expected}"

    def test_different_images_have_different_tokens_from_the_start(self):
        resampler = Resampler(width=22, num_latents=7, layers=2, max_frames=4, act=torch.relu,
                              **ATTENTION)
        visual = resampler(torch.randn(200, 1, 1, 9, 22))
        share = (visual - visual.mean(dim=0)).square().sum() / visual.square().sum()
        assert share > 0.05, f"{share:.4f} of the outputs' power differs (0.005 from N(0, 1))"


class TestMLPResampler:
    @pytest.mark.parametrize("act", ["squared_relu", "gelu"])
    def test_every_feature_becomes_a_token_by_itself(self, act):
        resampler, features = make(MLPResampler, act, max_frames=4), make_features(frames=4)
        x = (features + resampler.frames.weight[:, None]).flatten(2, 3)
        x = x + mlp_by_hand(resampler.mlp, layer_norm(resampler.mlp_norm, x), ACTS[act])
        assert_close("visual tokens (B, N, F * S, D)", resampler(features),
                     layer_norm(resampler.norm, x))
        expected = 2 * 22 * 88 + 4 * 22 + 4 * 22      # MLP, two norms with biases, frames
        assert count(resampler) == expected, f"{count(resampler)} parameters, not {expected}"
