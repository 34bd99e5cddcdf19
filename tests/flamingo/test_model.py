"""Flamingo as a whole: its config and sizes, which image a token attends to, images, the cache."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from common.cache import KVCache
from common.data.images import normalize_pixels
from common.data.tokenizer import EOC
from common.evaluation.writing import Writer
from common.generation import generate
from flamingo import PRESETS, Flamingo, FlamingoConfig
from tests.helpers import (assert_close, flamingo_config, make_ids, make_images, make_visual, toy_flamingo)

def count(module):
    return sum(p.numel() for p in module.parameters())


class TestConfig:
    def test_it_comes_back_from_json(self):
        assert FlamingoConfig(**json.loads(json.dumps(asdict(flamingo_config())))) == flamingo_config()
        assert (flamingo_config().image_size, flamingo_config().context_length) == (15, 37)

    @pytest.mark.parametrize("changes, message", [
        ({"placement": "after"}, "placement=after is not one of paper, openflamingo"),
        ({"resampler": "cnn"}, "resampler=cnn is not one of perceiver, mlp"),
        ({"act": "relu"}, "act=relu is not one of squared_relu, gelu"),
        ({"num_latents": 0}, "num_latents=0: must be at least 1"),
        ({"cross_attn_every": 0}, "cross_attn_every=0: must be at least 1"),
        ({"max_frames": -1}, "max_frames=-1: must be at least 0"),
        ({"p_next_image": -0.1}, "p_next_image=-0.1: must be at least 0"),
        ({"p_next_image": 1.5}, "p_next_image=1.5: a probability is at most 1"),
        ({"placement": "openflamingo", "cross_attn_every": 4},
         "cross_attn_every=4: no gated block among 3 blocks")])
    def test_an_impossible_config_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            replace(flamingo_config(), **changes)

    @pytest.mark.parametrize("name", ["vision", "language"])
    def test_a_part_of_another_version_is_refused(self, name):
        fields = asdict(getattr(flamingo_config(), name)) | {"unheard": 1}
        with pytest.raises(ValueError, match=f"{name}: a config of another version .*unheard"):
            replace(flamingo_config(), **{name: fields})


class TestSizes:
    @pytest.mark.parametrize("name, layers, D, every, table", [
        ("3B", 24, 2048, 1, 1.2e9), ("9B", 40, 4096, 4, 1.6e9), ("80B", 80, 8192, 7, 10e9)])
    def test_the_papers_sizes_have_the_parameters_of_the_formula(
            self, name, layers, D, every, table):
        with torch.device("meta"):
            model = Flamingo(PRESETS[name])
        C, Q, heads = 1536, 64, D // 128
        # q and out, k and v, the MLP, two norms, two gates
        block = 2 * D * (128 * heads) + 2 * C * (128 * heads) + 8 * D * D + 4 * D + 2
        assert count(model.gated) == -(-layers // every) * block
        assert count(model.gated) == pytest.approx(table, rel=0.2)
        layer = 4 * C * C + 8 * C * C + 6 * C
        assert count(model.resampler) == 6 * layer + Q * C + 8 * C + 2 * C
        assert count(model.resampler) == pytest.approx(194e6, rel=0.2)

    def test_the_papers_heads_are_96_and_128_wide(self):
        for name in ("3B", "9B", "80B"):
            c = PRESETS[name]
            assert (c.resampler_heads * c.resampler_head_width, c.num_latents) == (1536, 64)
            assert (c.resampler_head_width, c.head_width, c.max_frames) == (96, 128, 8)
            assert (c.act, c.attn_init_scale, c.placement) == ("squared_relu", 1.0, "paper")

    @pytest.mark.parametrize("name, D, layers, C, Q", [("tiny", 128, 4, 128, 8),
                                                       ("small", 512, 8, 384, 32)])
    def test_our_sizes_have_the_parameters_of_the_formula(self, name, D, layers, C, Q):
        c = PRESETS[name]
        with torch.device("meta"):
            model = Flamingo(c)
        inner, resampler_inner = c.heads * c.head_width, c.resampler_heads * c.resampler_head_width
        assert count(model.gated) == layers // c.cross_attn_every * (
            2 * D * inner + 2 * C * inner + 8 * D * D + 4 * D + 2)
        assert count(model.resampler) == c.resampler_layers * (
            4 * C * resampler_inner + 8 * C * C + 6 * C) + Q * C + 8 * C + 2 * C
        assert count(model.lm.new) == 2 * D


class Identity(nn.Module):
    """A block of the language model that passes nothing from token to token."""

    def forward(self, x, mask, rope, cache):
        if cache is not None:            # the language model reads the past's length from it
            cache.append(self, x[:, None, :, :1], x[:, None, :, :1])
        return x


def make_without_self_attention(**changes):
    """A model whose tokens are connected by the gated blocks alone."""
    model = toy_flamingo(**changes)
    model.lm.blocks = nn.ModuleList(Identity() for _ in range(3))
    return model


def affected(model, ids, visual, image, **more):
    """A letter for each token of row 0: # where other visual tokens of the image change logits."""
    other = visual.clone()
    other[:, image] += torch.randn_like(other[:, image])
    before, after = (model.logits(ids, visual=v, **more) for v in (visual, other))
    return "".join(".#"[int(c)] for c in (before != after).any(-1)[0])


class TestMediaMask:
    IDS = "..I...I.I.."

    @pytest.mark.parametrize("image, where", [
        (0, "..####....."), (1, "......##..."), (2, "........###")])
    def test_a_token_attends_to_its_own_image_alone_from_the_image_token_on(self, image, where):
        model = make_without_self_attention()
        assert affected(model, make_ids(self.IDS), make_visual(1), image) == where

    @pytest.mark.parametrize("image, where", [
        (0, "..#########"), (1, "......#####"), (2, "........###")])
    def test_or_to_all_images_up_to_it(self, image, where):
        model = make_without_self_attention(only_latest_image=False)
        assert affected(model, make_ids(self.IDS), make_visual(1), image) == where

    @pytest.mark.parametrize("only_latest_image, wheres", [
        (True, ("###........", "...####....", ".......##..")),
        (False, ("#########..", "...######..", ".......##.."))])
    def test_rows_with_attend_next_attend_to_the_next_image_and_after_the_last_to_none(
            self, only_latest_image, wheres):
        model = make_without_self_attention(only_latest_image=only_latest_image)
        for image, where in enumerate(wheres):
            ids = make_ids(self.IDS, self.IDS)
            assert affected(model, ids[:1], make_visual(1), image,
                            attend_next=torch.tensor([True])) == where
            assert affected(model, ids, make_visual(), image,
                            attend_next=torch.tensor([False, True])) \
                == affected(model, ids[:1], make_visual(1), image)

    @pytest.mark.parametrize("only_latest_image", [True, False])
    @pytest.mark.parametrize("image, tag", [(0, 2), (1, 6), (2, 8)])
    def test_an_image_changes_nothing_before_its_image_token(self, only_latest_image, image, tag):
        model = toy_flamingo(only_latest_image=only_latest_image)
        where = affected(model, make_ids(self.IDS), make_visual(1), image)
        assert where == "." * tag + "#" * (11 - tag)    # later tokens attend to those in between

    def test_a_row_of_a_ragged_batch_is_that_row_alone(self):
        model, visual = toy_flamingo(), make_visual(3)
        rows, lengths, images = ("..I...I.I..", "I...PPPPPPP", ".....I.PPPP"), (11, 4, 7), (3, 1, 1)
        ids = make_ids(*rows)
        right = model.logits(ids, visual=visual)
        rolled = torch.stack([row.roll(11 - n) for row, n in zip(ids, lengths)])
        mask = torch.arange(11) >= 11 - torch.tensor(lengths)[:, None]
        left = model.logits(rolled, mask, visual=visual)
        for b, (n, N) in enumerate(zip(lengths, images)):
            alone = model.logits(ids[b:b + 1, :n], visual=visual[b:b + 1, :N])[0]
            assert_close("outputs", right[b, :n], alone)
            assert_close("outputs", left[b, 11 - n:], alone)

    @pytest.mark.parametrize("only_latest_image", [True, False])
    def test_images_that_pad_a_row_change_nothing(self, only_latest_image):
        model, ids = toy_flamingo(only_latest_image=only_latest_image), make_ids("..I...I.", "I.......")
        visual = make_visual(2, 2)
        padded = torch.cat([visual, make_visual(2, 3)], dim=1)
        assert_close("outputs", model.logits(ids, visual=padded), model.logits(ids, visual=visual))

    def test_last_gives_the_newest_logits_alone(self):
        model, ids, visual = toy_flamingo(), make_ids(self.IDS, self.IDS), make_visual()
        newest = model.logits(ids, visual=visual, last=True)
        assert_close("outputs", newest, model.logits(ids, visual=visual)[:, -1:])


class TestEncodeImages:
    @pytest.mark.parametrize("class_token", [False, True])
    def test_features_are_the_tokens_before_the_last_norm(self, class_token):
        model = toy_flamingo(use_class_token=class_token)
        images, features = make_images(2, 3, frames=4), []
        model.resampler.register_forward_hook(lambda m, x, out: features.append(x[0]))
        model.encode_images(images)
        assert features[0].shape == (2, 3, 4, 9 + class_token, 22)
        for b, n, f in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
            x = model.vision.embed(normalize_pixels(images[b, n, f][None]))
            for block in model.vision.transformer.blocks:
                x = block(x)
            assert_close("outputs", features[0][b, n, f], x[0, 0 if class_token else 1:])

    def test_features_of_a_resnet_are_the_grid_cells_before_its_pool(self):
        model, features = toy_flamingo(vision=replace(flamingo_config().vision, stages=(1, 1, 1, 1), image_size=64,
                                              vision_width=2, vision_heads=4)), []
        images = torch.randint(256, (2, 1, 1, 3, 64, 64), dtype=torch.uint8)
        model.resampler.register_forward_hook(lambda m, x, out: features.append(x[0]))
        assert model.encode_images(images).shape == (2, 1, 7, 64)
        pixels = normalize_pixels(images[:, 0, 0]).double()
        assert_close("outputs", features[0][:, 0, 0], model.vision.patches(pixels))

    def test_rows_and_images_keep_their_order(self):
        model, images = toy_flamingo(), make_images()
        visual = model.encode_images(images)
        for b in range(2):
            for n in range(3):
                assert_close("outputs", visual[b, n], model.encode_images(images[b:b + 1, n:n + 1])[0, 0])


class TestCache:
    ROWS = ("PPP..I....I..I...", "....I............", "PPPPPPPPP........")

    def inputs(self):
        """Ragged rows with 3, 1 and 0 images -> (ids, mask, visual)."""
        mask = torch.tensor([[letter != "P" for letter in row] for row in self.ROWS])
        return make_ids(*self.ROWS), mask, make_visual(3)

    def cached(self, model, ids, mask, visual, chunks):
        """The logits of chunks of these sizes, one after another in one cache."""
        cache, logits, end = KVCache(), [], 0
        with torch.no_grad():
            for size in chunks:
                start, end = end, end + size
                logits.append(model.logits(ids[:, start:end], mask[:, :end], cache, visual=visual))
        return torch.cat(logits, dim=1)

    @pytest.mark.parametrize("only_latest_image", [True, False])
    @pytest.mark.parametrize("chunks", [[1] * 17, [13, 1, 1, 1, 1], [6, 5, 6], [10, 7], [16, 1]])
    def test_any_chunks_give_the_logits_of_one_forward(self, chunks, only_latest_image):
        (ids, mask, visual), model = self.inputs(), toy_flamingo(only_latest_image=only_latest_image)
        want = model.logits(ids, mask, visual=visual)
        assert_close("outputs", self.cached(model, ids, mask, visual, chunks)[mask], want[mask])

    def test_a_late_step_still_attends_to_the_image(self):
        (ids, mask, visual), model = self.inputs(), make_without_self_attention()
        other = visual.clone()
        other[:, 2] += 1
        one, two = (self.cached(model, ids, mask, v, [12, 1, 1, 1, 1, 1]) for v in (visual, other))
        different = (one != two).any(-1)
        assert different[0].tolist() == [False] * 13 + [True] * 4
        assert not different[1:].any()

    def test_a_new_image_may_come_during_generation(self):
        (ids, mask, visual), model, cache = self.inputs(), toy_flamingo(), KVCache()
        want, logits = model.logits(ids, mask, visual=visual), []
        with torch.no_grad():
            for start, end, N in ((0, 9, 1), (9, 10, 1), (10, 12, 2), (12, 13, 2), (13, 17, 3)):
                logits.append(model.logits(ids[:, start:end], mask[:, :end], cache,
                                           visual=visual[:, :N]))
        assert_close("outputs", torch.cat(logits, dim=1)[mask], want[mask])

    def test_a_new_image_may_take_the_place_of_padding(self):
        # N stays 2: the padding of the second row is replaced by its second image.
        ids, visual = make_ids("I.I......", "I.....I.."), make_visual(2, 2)
        model, cache = toy_flamingo(), KVCache()
        want, padded = model.logits(ids, visual=visual), visual.clone()
        padded[1, 1] = 0
        with torch.no_grad():
            logits = [model.logits(ids[:, :5], cache=cache, visual=padded)]
            logits += [model.logits(ids[:, t:t + 1], cache=cache, visual=visual)
                       for t in range(5, 9)]
        assert_close("outputs", torch.cat(logits, dim=1), want)

    def test_keys_of_images_are_computed_once_for_each_visual_tensor(self):
        (ids, mask, visual), model, calls = self.inputs(), toy_flamingo(), []
        model.gated[1].attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
        self.cached(model, ids, mask, visual, [4, 10, 1, 1, 1])
        assert len(calls) == 1
        for num_beams, most in ((1, 1), (3, 2)):         # beams are other rows of visual
            calls.clear()
            generate(model.logits, ids, mask, max_new_tokens=9, num_beams=num_beams,
                     state={"visual": visual})
            assert len(calls) <= most

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_each_row_keeps_its_images_in_a_search(self, num_beams):
        (ids, mask, visual), model = self.inputs(), toy_flamingo()

        def write(ids, mask, visual):
            return generate(Writer(model, None).logits, ids, mask, state={"visual": visual},
                            max_new_tokens=9, num_beams=num_beams, stop=(EOC,))
        together = write(ids, mask, visual)
        assert len({tuple(row) for row in together.tolist()}) == 3
        for b in range(3):
            alone = write(ids[b:b + 1][:, mask[b]], None, visual[b:b + 1])[0].tolist()
            assert together[b].tolist() == alone + [0] * (together.shape[1] - len(alone))
        assert write(ids, mask, visual.roll(1, 0))[:2].tolist() != together[:2].tolist()
