"""Flamingo: an independent loop for what it adds, and its classic mistakes one by one."""
import json
import math
import pickle
import random
import re
import shutil
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip
import flamingo
import train
from common.training import options as cli
from common.evaluation import writing as evaluation
from common import transformer
from common.prompts import ANSWER, OUTPUT, render
from common.data.batches import Drawn, EvalData, open_world, world_tokenizer
from common.evaluation.writing import asked
from common.generation import generate, score_candidates
from common.data.images import normalize_pixels
from common.language import LanguageConfig
from common.training.lm import Pretraining
from common.data.collators import InterleavedCollator
from common.data.interleaved import segments
from common.data.tokenizer import BOS, EOC, EOS, IMAGE, Tokenizer
from common.cache import KVCache
from flamingo import PRESETS, TRAINS, Flamingo, FlamingoConfig, Pupil, add_frames, prompt, rices
from tests.test_distributed import pair
from tests.test_files import listed, names
from tests.test_pages import (A, ASK, CAT, DOCUMENT, DOG, IS, MARK, OUT, RED, TELL, THIS, WHAT,
                              Words, drawing, pages)
from tests.test_train import Toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")

# S = 9 features of a picture 22 wide, Q = 7 latents, a language model 20 wide; the attentions are
# 5 x 3 and 3 x 4 wide inside.
VISION = asdict(clip.CLIPConfig(
    image_size=15, patch_size=5, vision_width=22, vision_layers=3, vision_heads=2, text_width=6,
    text_layers=1, text_heads=1, context_length=5, vocab_size=17, embed_dim=2))
LANGUAGE = asdict(LanguageConfig(
    vocab_size=43, context_length=37, width=20, layers=3, heads=2, kv_heads=2, hidden=26))
CONFIG = FlamingoConfig(
    vision=VISION, language=LANGUAGE, num_latents=7, resampler_layers=2, resampler_heads=5,
    resampler_head_width=3, max_frames=4, heads=3, head_width=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(gate=None, **changes):
    """A model with random weights, norms and gates (gate: both at this value)."""
    model = Flamingo(replace(CONFIG, **changes)).double()
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(p, mean=1.0, std=0.3)
        elif name.endswith("_gate"):
            nn.init.uniform_(p, 0.4, 0.9) if gate is None else nn.init.constant_(p, gate)
        else:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def text(*rows):
    """Ids from pictures of texts: I is <image>, P padding, anything else a random word."""
    ids = torch.randint(6, 43, (len(rows), max(map(len, rows))))
    for row, drawn in zip(ids, rows):
        for place, letter in enumerate(drawn):
            row[place] = {"I": IMAGE, "P": 0}.get(letter, row[place])
    return ids


def seen(B=2, N=3):
    """What the resampler might have made: (B, N, Q, D)."""
    return torch.randn(B, N, 7, 22).double()


def pictures(B=2, N=3, frames=1):
    return torch.randint(256, (B, N, frames, 3, 15, 15), dtype=torch.uint8)


def batch(*rows, N=3, weight=1.0, dataset=0, following=None):
    ids = text(*rows)
    labels = torch.where(ids == IMAGE, -100, ids)
    return {"images": pictures(len(rows), N), "ids": ids, "labels": labels,
            "following": torch.tensor(following or [False] * len(rows)),
            "weight": torch.tensor(weight), "dataset": torch.tensor(dataset)}


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def changed(model, ids, visual, picture, **more):
    """Per position of row 0: whether other latents of that picture change the logits there."""
    other = visual.clone()
    other[:, picture] += torch.randn_like(other[:, picture])
    before, after = (model.read(ids, visual=v, **more) for v in (visual, other))
    return "".join(".#"[bool(c)] for c in (before != after).any(-1)[0])


# The reference: the paper's sentences in loops, none of the house's functions

def by_hand_norm(x, norm):
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / (variance + 1e-5) ** 0.5 * norm.weight + norm.bias


def by_hand_attention(layer, asking, read, heads):
    """One vector asks a list of vectors."""
    if not read:
        return torch.zeros(layer.out_proj.weight.shape[0]).double()
    width, found = layer.q_proj.weight.shape[0] // heads, []
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        q = layer.q_proj.weight[rows] @ asking
        scores = torch.stack([q @ (layer.k_proj.weight[rows] @ r) for r in read]) / width ** 0.5
        shares = scores.exp() / scores.exp().sum()
        found.append(sum(s * (layer.v_proj.weight[rows] @ r) for s, r in zip(shares, read)))
    return layer.out_proj.weight @ torch.cat(found)


def by_hand_mlp(mlp, x):
    return mlp.fc2.weight @ (mlp.fc1.weight @ x).clamp(min=0) ** 2


def by_hand_resampler(resampler, features):
    """features (F, S, D) of one picture or clip, as many frames as were learned or one."""
    media = [v + resampler.frames[f] for f, frame in enumerate(features) for v in frame]
    latents = list(resampler.latents)
    for layer in resampler.layers:
        own = [by_hand_norm(v, layer.latents_norm) for v in latents]
        read = [by_hand_norm(v, layer.media_norm) for v in media] + own
        latents = [v + by_hand_attention(layer.attn, o, read, 5) for v, o in zip(latents, own)]
        latents = [v + by_hand_mlp(layer.mlp, by_hand_norm(v, layer.mlp_norm)) for v in latents]
    return torch.stack([by_hand_norm(v, resampler.norm) for v in latents])


def by_hand_gated(block, x, visual, ids):
    """x (T, D), visual (N, Q, C), ids (T,) of one row."""
    out = []
    for t in range(len(x)):
        number = sum(i == IMAGE for i in ids[:t + 1].tolist())
        read = list(visual[number - 1]) if number else []
        y = x[t] + math.tanh(block.attn_gate.item()) * by_hand_attention(
            block.attn, by_hand_norm(x[t], block.attn_norm), read, 3)
        out.append(y + math.tanh(block.mlp_gate.item()) * by_hand_mlp(
            block.mlp, by_hand_norm(y, block.mlp_norm)))
    return torch.stack(out)


class TestResampler:
    @pytest.mark.parametrize("frames", [1, 4])
    def test_it_is_the_papers_loop_for_each_picture_or_clip(self, frames):
        resampler, features = make().resampler, torch.randn(2, 3, frames, 9, 22).double()
        made = resampler(features)
        assert made.shape == (2, 3, 7, 22)
        for b in range(2):
            for n in range(3):
                close(made[b, n], by_hand_resampler(resampler, features[b, n]))

    def test_each_picture_is_resampled_alone(self):
        resampler, features = make().resampler, torch.randn(2, 3, 1, 9, 22).double()
        made, other = resampler(features), features.clone()
        other[1, 0] += 1
        same = (resampler(other) == made).all(-1).all(-1)
        assert same.tolist() == [[True] * 3, [False, True, True]]

    def test_unlike_pictures_come_out_unlike_from_the_start(self):
        resampler, features = Flamingo(CONFIG).resampler, torch.randn(200, 1, 1, 9, 22)
        made = resampler(features)
        own = (made - made.mean(dim=0)).square().sum() / made.square().sum()
        assert own > 0.05                            # 0.005 when the latents start at N(0, 1)

    def test_keys_are_the_features_and_the_latents(self):
        model, keys = make(), []
        for layer in model.resampler.layers:
            layer.attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out.shape[1]))
        model.resampler(torch.randn(2, 3, 4, 9, 22).double())
        assert keys == [4 * 9 + 7] * 2

    def test_media_and_latents_have_norms_of_their_own_and_the_end_has_one(self):
        resampler, (media, own) = make(resampler_layers=3).resampler, (set(), set())
        norms = [m for m in resampler.modules() if isinstance(m, transformer.LayerNorm)]
        assert len(norms) == 3 * 3 + 1
        for layer in resampler.layers:
            media.add(layer.media_norm), own.add(layer.latents_norm)
        assert len(media | own) == 6

    def test_it_has_no_bias_but_those_of_the_norms(self):
        for name, _ in [*make().resampler.named_parameters(), *make().gated.named_parameters()]:
            assert not name.endswith("bias") or "norm" in name

    def test_features_have_no_order_but_that_of_time(self):
        resampler, features = make().resampler, torch.randn(2, 1, 4, 9, 22).double()
        close(resampler(features[:, :, :, torch.randperm(9)]), resampler(features))
        assert not torch.allclose(resampler(features.flip(2)), resampler(features))
        without = make(max_frames=0).resampler
        assert without.frames is None
        close(without(features.flip(2)), without(features))

    def test_squared_relu_and_gelu(self):
        values = torch.tensor([-1.0, 0.0, 0.5, 2.0]).double()
        close(flamingo.ACTIVATIONS["squared_relu"](values),
              torch.tensor([0.0, 0.0, 0.25, 4.0]).double())
        close(flamingo.ACTIVATIONS["gelu"](values),
              torch.tensor([-0.158655, 0.0, 0.345731, 1.954500]).double(), 1e-6)
        for act in ("squared_relu", "gelu"):
            model = make(act=act)
            for mlp in (model.resampler.layers[1].mlp, model.gated["2"].mlp):
                assert mlp.act is flamingo.ACTIVATIONS[act] and mlp.fc1.weight.shape[0] in (88, 80)

    def test_the_mlp_of_the_ablation_keeps_every_feature_apart(self):
        resampler, features = make(resampler="mlp").resampler, torch.randn(2, 3, 4, 9, 22).double()
        made = resampler(features)
        assert made.shape == (2, 3, 36, 22)
        x = features[1, 2, 3, 5] + resampler.frames[3]
        x = x + by_hand_mlp(resampler.mlp, by_hand_norm(x, resampler.mlp_norm))
        close(made[1, 2, 3 * 9 + 5], by_hand_norm(x, resampler.norm))
        model = make(resampler="mlp")
        assert model(batch("I....", ".I..I"))["lm"].isfinite()


class TestFrames:
    def table(self, frames):
        """What is added to each of so many frames, by a table of 8."""
        table = torch.randn(8, 22).double()
        made = add_frames(torch.zeros(1, 1, frames, 9, 22).double(), table)[0, 0]
        assert (made == made[:, :1]).all()              # one vector for all places of a frame
        return table, made[:, 0]

    def test_as_many_as_were_learned_take_the_table_as_it_is(self):
        table, made = self.table(8)
        assert torch.equal(made, table)

    def test_thirty_are_on_the_straight_lines_between_the_eight(self):
        table, made = self.table(30)
        close(made[0], table[0]), close(made[-1], table[-1])
        for i in range(30):
            place = i * 7 / 29
            low = min(int(place), 6)
            close(made[i], table[low] + (place - low) * (table[low + 1] - table[low]))

    def test_fewer_keep_both_ends(self):
        table, made = self.table(2)
        close(made, table[[0, -1]])

    def test_a_picture_takes_the_first_row(self):
        table, made = self.table(1)
        assert torch.equal(made, table[:1])

    def test_features_keep_their_type(self):
        features = torch.randn(1, 1, 3, 9, 22).bfloat16()
        assert add_frames(features, torch.randn(8, 22)).dtype == torch.bfloat16
        assert add_frames(features, None) is features


@pytest.mark.parametrize("attention", ["hand", "fused"])
class TestGatedBlock:
    def test_it_is_the_papers_loop(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)
        model, ids, visual = make(), text("..I...I.I..", "I..........", "..........."), seen(3)
        x = torch.randn(3, 11, 20).double()
        mask = flamingo.masks.media(flamingo.masks.image_index(ids == IMAGE), 3, 7)
        made = model.gated["1"](x, visual.flatten(1, 2), mask)
        for b in range(3):
            close(made[b], by_hand_gated(model.gated["1"], x[b], visual[b], ids[b]))

    def test_the_whole_model_is_gated_block_then_frozen_block(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)
        model, ids, visual = make(), text("..I...I.I..", "I.........."), seen()
        x, places = model.lm.place(model.lm.embed(ids))
        for i, block in enumerate(model.lm.blocks):
            x = torch.stack([by_hand_gated(model.gated[str(i)], x[b], visual[b], ids[b])
                             for b in range(2)])
            x = block(x, **places)
        close(model.read(ids, visual=visual), model.lm.head(x))

    def test_without_a_picture_the_attention_adds_exactly_nothing(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)
        for only_latest_image in (True, False):
            model, out = make(only_latest_image=only_latest_image), []
            model.gated["0"].attn.register_forward_hook(lambda m, i, o: out.append(o))
            model.read(text("...I.", "....."), visual=seen())
            assert ((out[0] == 0).all(-1) == torch.tensor(
                [[True] * 3 + [False] * 2, [True] * 5])).all()

    def test_in_bf16_it_and_its_gradients_are_finite(self, attention, monkeypatch):
        monkeypatch.setattr(transformer, "ATTENTION", attention)
        model = make().float()
        for rows in (["....", "...."], ["..I.I", "....."]):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch(*rows))["lm"]
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class TestGates:
    def test_at_zero_the_model_is_the_language_model_bit_for_bit(self):
        model, ids, visual = make(gate=0.0), text("..I...I", "I......"), seen()
        assert torch.equal(model.read(ids, visual=visual), model.lm(ids))
        model, visual = model.float(), visual.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.read(ids, visual=visual), model.lm(ids))

    def test_they_start_at_zero_and_there_are_two_of_a_block(self):
        gates = {n: p for n, p in Flamingo(CONFIG).named_parameters() if n.endswith("_gate")}
        assert sorted(gates) == [f"gated.{i}.{part}_gate" for i in range(3)
                                 for part in ("attn", "mlp")]
        assert all(p.shape == (1,) and p == 0 for p in gates.values())
        started = Flamingo(replace(CONFIG, gate_init=0.5)).gated["1"]
        assert started.attn_gate == started.mlp_gate == 0.5

    def test_attention_behind_the_first_block_starts_loud_and_all_else_as_usual(self):
        gated = Flamingo(replace(CONFIG, attn_init_scale=7.0)).gated
        for name, part, size in (("0", "attn.out_proj", 1), ("1", "attn.out_proj", 7),
                                 ("2", "attn.out_proj", 7), ("1", "attn.v_proj", 1),
                                 ("1", "mlp.fc1", 1), ("1", "mlp.fc2", 1)):
            weight = gated[name].get_submodule(part).weight
            most = size * weight.shape[1] ** -0.5
            assert 0.9 * most < weight.abs().max() <= most, (name, part)

    @pytest.mark.parametrize("own, other", [("attn_gate", "mlp_gate"), ("mlp_gate", "attn_gate")])
    def test_each_bounds_its_own_part_by_its_tanh(self, own, other):
        block, ids, x = make().gated["1"], text("I...."), torch.randn(1, 5, 20).double()
        visual = seen(1).flatten(1, 2)
        mask = flamingo.masks.media(flamingo.masks.image_index(ids == IMAGE), 3, 7)

        def moved(value):
            getattr(block, own).data.fill_(value), getattr(block, other).data.fill_(0.0)
            return block(x, visual, mask) - x
        close(moved(2.0), moved(1e9) * math.tanh(2))
        assert moved(0.0).abs().max() == 0 < moved(2.0).abs().max()

    def test_text_alone_is_the_language_models_while_the_mlps_gate_is_zero(self):
        model, ids = make(), text(".....")
        assert not torch.allclose(model.read(ids, visual=seen(1)), model.lm(ids))
        for block in model.gated.values():
            block.mlp_gate.data.zero_()
        assert torch.equal(model.read(ids, visual=seen(1)), model.lm(ids))


class Still(nn.Module):
    """A frozen block that leaves everything as it is."""

    def forward(self, x, mask, rope, cache):
        if cache is not None:            # its length is what the language model knows of the past
            cache.append(self, x[:, None, :, :1], x[:, None, :, :1])
        return x


def still(**changes):
    """A model whose language model passes nothing from token to token."""
    model = make(**changes)
    model.lm.blocks = nn.ModuleList(Still() for _ in range(3))
    return model


class TestWhatTextSees:
    IDS = "..I...I.I.."

    @pytest.mark.parametrize("picture, where", [
        (0, "..####....."), (1, "......##..."), (2, "........###")])
    def test_its_own_picture_alone_the_tag_included(self, picture, where):
        assert changed(still(), text(self.IDS), seen(1), picture) == where

    @pytest.mark.parametrize("picture, where", [
        (0, "..#########"), (1, "......#####"), (2, "........###")])
    def test_all_pictures_up_to_it_when_asked_to(self, picture, where):
        assert changed(still(only_latest_image=False), text(self.IDS), seen(1), picture) == where

    @pytest.mark.parametrize("only_latest_image, wheres", [
        (True, ("###........", "...####....", ".......##..")),
        (False, ("#########..", "...######..", ".......##.."))])
    def test_the_next_picture_where_a_row_says_so_and_none_after_the_last(self, only_latest_image, wheres):
        for picture, where in enumerate(wheres):
            assert changed(still(only_latest_image=only_latest_image), text(self.IDS), seen(1), picture,
                           following=torch.tensor([True])) == where
            assert changed(still(only_latest_image=only_latest_image), text(self.IDS, self.IDS), seen(), picture,
                           following=torch.tensor([False, True])) \
                == changed(still(only_latest_image=only_latest_image), text(self.IDS), seen(1), picture)

    @pytest.mark.parametrize("only_latest_image", [True, False])
    @pytest.mark.parametrize("picture, tag", [(0, 2), (1, 6), (2, 8)])
    def test_a_picture_changes_nothing_before_its_tag(self, only_latest_image, picture, tag):
        where = changed(make(only_latest_image=only_latest_image), text(self.IDS), seen(1), picture)
        assert where == "." * tag + "#" * (11 - tag)      # all later text reads what came before

    def test_a_ragged_batch_is_its_rows_alone(self):
        model, visual = make(), seen(3)
        rows = ("..I...I.I..", "I...PPPPPPP", ".....I.PPPP")
        ids, lengths, counts = text(*rows), (11, 4, 7), (3, 1, 1)
        together = model.read(ids, visual=visual)
        left = torch.stack([row.roll(11 - n) for row, n in zip(ids, lengths)])
        mask = torch.arange(11) >= 11 - torch.tensor(lengths)[:, None]
        padded_left = model.read(left, mask, visual=visual)
        for b, (n, count) in enumerate(zip(lengths, counts)):
            alone = model.read(ids[b:b + 1, :n], visual=visual[b:b + 1, :count])[0]
            close(together[b, :n], alone)
            close(padded_left[b, 11 - n:], alone)

    def test_pictures_at_the_end_without_a_tag_change_nothing(self):
        for only_latest_image in (True, False):
            model, ids, visual = make(only_latest_image=only_latest_image), text("..I...I.", "I......."), seen(2, 2)
            more = torch.cat([visual, seen(2, 3)], dim=1)
            close(model.read(ids, visual=more), model.read(ids, visual=visual))

    def test_more_tags_than_pictures_are_told(self):
        with pytest.raises(ValueError, match="a text with 3 <image> tags, but 2 pictures"):
            make().read(text("I.I.I", "....."), visual=seen(2, 2))
        cache, model = KVCache(), make()
        model.read(text("I.I."), cache=cache, visual=seen(1, 2))
        with pytest.raises(ValueError, match="a text with 3 <image> tags, but 2 pictures"):
            model.read(text("I"), cache=cache, visual=seen(1, 2))


class TestPlacement:
    @pytest.mark.parametrize("layers, every, paper, openflamingo", [
        (24, 1, list(range(24)), list(range(24))),
        (40, 4, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36], [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]),
        (80, 7, [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77],
         [6, 13, 20, 27, 34, 41, 48, 55, 62, 69, 76])])
    def test_gated_blocks_stand_before_these_blocks(self, layers, every, paper, openflamingo):
        for placement, want in (("paper", paper), ("openflamingo", openflamingo)):
            language = LANGUAGE | {"layers": layers}
            with torch.device("meta"):
                model = Flamingo(replace(CONFIG, language=language, cross_attn_every=every,
                                         placement=placement))
            assert list(map(int, model.gated)) == want

    def test_a_gated_block_runs_before_its_frozen_block(self):
        model, order = make(cross_attn_every=2), []
        for i, block in enumerate(model.lm.blocks):
            block.register_forward_pre_hook(lambda m, x, i=i: order.append(f"frozen {i}"))
        for i, block in model.gated.items():
            block.register_forward_pre_hook(lambda m, x, i=i: order.append(f"gated {i}"))
        model.read(text("I.."), visual=seen(1))
        assert order == ["gated 0", "frozen 0", "frozen 1", "gated 2", "frozen 2"]

    @pytest.mark.parametrize("changes, words", [
        ({"placement": "after"}, "placement=after is not one of paper, openflamingo"),
        ({"resampler": "cnn"}, "resampler=cnn is not one of perceiver, mlp"),
        ({"act": "relu"}, "act=relu is not one of squared_relu, gelu"),
        ({"num_latents": 0}, "num_latents=0: must be at least 1"), ({"cross_attn_every": 0}, "cross_attn_every=0: must be"),
        ({"max_frames": -1}, "max_frames=-1: must be at least 0"),
        ({"p_next_image": 1.5}, r"p_next_image=1.5: a probability is in \[0, 1\]"),
        ({"vision_skip_blocks": 3}, "vision_skip_blocks=3 leaves nothing of a vision tower of 3 blocks"),
        ({"placement": "openflamingo", "cross_attn_every": 4}, "cross_attn_every=4: no gated block among 3 blocks")])
    def test_what_cannot_be_is_told(self, changes, words):
        with pytest.raises(ValueError, match=words):
            Flamingo(replace(CONFIG, **changes))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


class TestSizes:
    @pytest.mark.parametrize("name, layers, D, every, table", [
        ("3B", 24, 2048, 1, 1.2e9), ("9B", 40, 4096, 4, 1.6e9), ("80B", 80, 8192, 7, 10e9)])
    def test_the_papers_sizes_count_what_the_formula_says(self, name, layers, D, every, table):
        with torch.device("meta"):
            model = Flamingo(PRESETS[name])
        C, Q, heads = 1536, 64, D // 128
        # q and out, k and v, the MLP, two norms, two gates
        block = 2 * D * (128 * heads) + 2 * C * (128 * heads) + 8 * D * D + 4 * D + 2
        assert parameters(model.gated) == -(-layers // every) * block
        assert parameters(model.gated) == pytest.approx(table, rel=0.2)
        layer = 4 * C * C + 8 * C * C + 6 * C
        assert parameters(model.resampler) == 6 * layer + Q * C + 8 * C + 2 * C
        assert parameters(model.resampler) == pytest.approx(194e6, rel=0.2)

    def test_the_papers_heads_are_96_and_128_wide(self):
        for name in ("3B", "9B", "80B"):
            c = PRESETS[name]
            assert (c.resampler_heads * c.resampler_head_width, c.num_latents) == (1536, 64)
            assert c.head_width == 128 and c.max_frames == 8 and c.act == "squared_relu"

    @pytest.mark.parametrize("name, D, layers, C, Q", [("tiny", 128, 4, 128, 8),
                                                       ("small", 512, 8, 384, 32)])
    def test_the_houses_sizes_count_what_the_formula_says(self, name, D, layers, C, Q):
        c = PRESETS[name]
        with torch.device("meta"):
            model = Flamingo(c)
        inner, read = c.heads * c.head_width, c.resampler_heads * c.resampler_head_width
        assert parameters(model.gated) == layers // c.cross_attn_every * (
            2 * D * inner + 2 * C * inner + 8 * D * D + 4 * D + 2)
        assert parameters(model.resampler) == c.resampler_layers * (
            4 * C * read + 8 * C * C + 6 * C) + Q * C + 8 * C + 2 * C
        assert parameters(model.lm.new) == 2 * D


class TestFreezing:
    def frozen(self, **changes):
        model = make(**changes)
        train.freeze(model, TRAINS["flamingo"])
        return model

    def gradients(self, model):
        model(batch("..I...I", "I......"))["lm"].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def test_at_gate_zero_the_gates_and_new_tokens_alone_get_a_gradient(self):
        for name, grad in self.gradients(self.frozen(gate=0.0)).items():
            if name.startswith(("vision", "lm")) and not name.startswith("lm.new"):
                assert grad is None, name
            else:
                assert (grad.abs().max() > 0) == (name.endswith("_gate") or "lm.new" in name), name

    def test_from_other_gates_on_all_that_is_trained_does(self):
        model = self.frozen()
        for name, grad in self.gradients(model).items():
            trained = name.startswith(("resampler", "gated", "lm.new"))
            assert (grad is not None) == trained, name
            if name == "resampler.frames":               # these are pictures, not clips
                assert grad[0].abs().min() > 0 == grad[1:].abs().max()
            elif trained:
                assert grad.abs().max() > 0, name

    def test_steps_with_decay_move_what_is_trained_and_nothing_else(self):
        model = self.frozen()
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.1, ("resampler.*",)), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            self.gradients(model)
            optimizer.step()
        for name, p in model.named_parameters():
            moved = name.startswith(("resampler", "gated", "lm.new"))
            assert (not torch.equal(p, before[name])) == moved, name

    def test_the_resampler_does_not_decay_and_the_gated_blocks_do(self):
        model = self.frozen()
        undecayed = train.STAGES["flamingo"].recipes[""].undecayed
        decayed, plain = ({id(p) for p in group["params"]}
                          for group in train.parameter_groups(model, 0.1, undecayed))
        assert {id(p) for p in model.resampler.parameters()} <= plain
        assert id(model.gated["1"].attn.q_proj.weight) in decayed
        assert id(model.gated["1"].attn_gate) in plain

    def test_features_of_the_frozen_tower_have_no_graph(self):
        model, features = self.frozen(), []
        model.resampler.register_forward_hook(lambda m, given, out: features.append(given[0]))
        made = model.look(pictures())
        assert features[0].grad_fn is None and made.grad_fn is not None
        assert not any(m.training for m in (*model.vision.modules(), *model.lm.blocks.modules()))
        assert model.resampler.training and model.gated.training
        train.freeze(model, (*TRAINS["flamingo"], "vision.*"))
        model.look(pictures()).sum().backward()
        assert model.vision.patch_embed.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("skip", [0, 1])
    @pytest.mark.parametrize("class_token", [False, True])
    def test_features_are_the_tokens_before_the_last_norm(self, skip, class_token):
        model, features = make(vision_skip_blocks=skip, use_class_token=class_token), []
        images = pictures(2, 3, 4)
        model.resampler.register_forward_hook(lambda m, given, out: features.append(given[0]))
        model.look(images)
        assert features[0].shape == (2, 3, 4, 9 + class_token, 22)
        for b, n, f in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
            x = model.vision.embed(normalize_pixels(images[b, n, f][None]))
            for block in model.vision.transformer.blocks[:3 - skip]:
                x = block(x)
            close(features[0][b, n, f], x[0, 0 if class_token else 1:])

    def test_of_a_resnet_they_are_the_cells_before_its_pool(self):
        tower = VISION | {"stages": (1, 1, 1, 1), "image_size": 64, "vision_width": 2}
        model, features = make(vision=tower | {"vision_heads": 4}), []
        images = torch.randint(256, (2, 1, 1, 3, 64, 64), dtype=torch.uint8)
        model.resampler.register_forward_hook(lambda m, given, out: features.append(given[0]))
        assert model.look(images).shape == (2, 1, 7, 64)
        close(features[0][:, 0, 0], model.vision.patches(normalize_pixels(images[:, 0, 0]).double()))
        with pytest.raises(ValueError, match="vision_skip_blocks=1 leaves nothing of a vision tower of 1 blocks"):
            Flamingo(replace(model.config, vision_skip_blocks=1))

    def test_a_rows_pictures_are_its_own_and_in_their_order(self):
        model, images = make(), pictures()
        made = model.look(images)
        for b in range(2):
            for n in range(3):
                close(made[b, n], model.look(images[b:b + 1, n:n + 1])[0, 0])


class TestCache:
    ROWS = ("PPP..I....I..I...", "....I............", "PPPPPPPPP........")

    def given(self):
        ids = text(*self.ROWS)
        return ids, torch.tensor([[letter != "P" for letter in row] for row in self.ROWS]), seen(3)

    def read(self, model, ids, mask, visual, chunks):
        cache, out, done = KVCache(), [], 0
        for size in chunks:
            done += size
            out.append(model.read(ids[:, done - size:done], mask[:, :done], cache, visual=visual))
        return torch.cat(out, dim=1)

    @pytest.mark.parametrize("only_latest_image", [True, False])
    @pytest.mark.parametrize("chunks", [[1] * 17, [13, 1, 1, 1, 1], [6, 5, 6], [10, 7], [16, 1]])
    def test_any_chunks_give_the_logits_of_one_forward(self, chunks, only_latest_image):
        (ids, mask, visual), model = self.given(), make(only_latest_image=only_latest_image)
        want = model.read(ids, mask, visual=visual)
        with torch.no_grad():
            made = self.read(model, ids, mask, visual, chunks)
        close(made[mask], want[mask])

    def test_a_late_step_still_sees_the_picture(self):
        (ids, mask, visual), model = self.given(), still()
        other = visual.clone()
        other[:, 2] += 1
        with torch.no_grad():
            one, two = (self.read(model, ids, mask, v, [12, 1, 1, 1, 1, 1])
                        for v in (visual, other))
        different = (one != two).any(-1)
        assert different[0].tolist() == [False] * 13 + [True] * 4
        assert not different[1:].any()

    def test_a_picture_may_come_in_the_middle_of_writing(self):
        (ids, mask, visual), model, cache = self.given(), make(), KVCache()
        want = model.read(ids, mask, visual=visual)
        with torch.no_grad():
            made = torch.cat([
                model.read(ids[:, done - size:done], mask[:, :done], cache, visual=visual[:, :n])
                for done, size, n in ((9, 9, 1), (10, 1, 1), (12, 2, 2), (13, 1, 2), (17, 4, 3))],
                dim=1)
        close(made[mask], want[mask])

    def test_a_picture_may_come_where_a_row_had_padding(self):
        # N stays 2: the second row's black padding becomes its second picture.
        ids = text("I.I......", "I.....I..")
        model, visual, cache = make(), seen(2)[:2], KVCache()
        want, padded = model.read(ids, visual=visual), visual.clone()
        padded[1, 1] = 0
        with torch.no_grad():
            made = [model.read(ids[:, :5], cache=cache, visual=padded)]
            made += [model.read(ids[:, t:t + 1], cache=cache, visual=visual) for t in range(5, 9)]
        close(torch.cat(made, dim=1), want)

    def test_after_too_many_tags_the_same_cache_goes_on(self):
        ids, model, visual, cache = text("I...I.."), make(), seen(2)[:1], KVCache()
        with torch.no_grad():
            model.read(ids[:, :3], cache=cache, visual=visual[:, :1])
            with pytest.raises(ValueError, match="2 <image> tags, but 1 pictures"):
                model.read(ids[:, 3:], cache=cache, visual=visual[:, :1])
            close(model.read(ids[:, 3:], cache=cache, visual=visual),
                  model.read(ids, visual=visual)[:, 3:])

    def test_keys_of_pictures_are_made_once(self):
        (ids, mask, visual), model, calls = self.given(), make(), []
        model.gated["1"].attn.k_proj.register_forward_hook(lambda *a: calls.append(1))
        with torch.no_grad():
            self.read(model, ids, mask, visual, [14, 1, 1, 1])
            assert len(calls) == 1
            self.read(model, ids, mask, visual, [13, 1, 1, 1, 1])          # token 13 is a tag
        assert len(calls) == 1 + 2

    @pytest.mark.parametrize("beams", [1, 3])
    def test_each_row_keeps_its_pictures_in_a_search(self, beams):
        (ids, mask, visual), model = self.given(), make()
        how = {"max_new_tokens": 9, "num_beams": beams, "stop": (EOC,)}
        say = Pupil(model, SimpleNamespace(tokenizer=None)).say
        together = generate(say, ids, mask, state={"visual": visual}, **how)
        assert len({tuple(row) for row in together.tolist()}) == 3
        for b in range(3):
            own = generate(say, ids[b:b + 1][:, mask[b]], state={"visual": visual[b:b + 1]},
                           **how)[0].tolist()
            assert together[b].tolist() == own + [0] * (together.shape[1] - len(own))
        other = generate(say, ids, mask, state={"visual": visual.roll(1, 0)}, **how)
        assert other[:2].tolist() != together[:2].tolist()


class TestLoss:
    def test_the_next_token_is_learned_from_the_one_before(self):
        model, given = make(), batch("..I...I", "I......")
        logs = model.read(given["ids"], visual=model.look(given["images"])).log_softmax(-1)
        want = [logs[b, t - 1, given["ids"][b, t]] for b in range(2) for t in range(1, 7)
                if given["labels"][b, t] != -100]
        close(model(given)["lm"].item(), -sum(want).item() / len(want), 1e-5)

    def test_it_starts_at_log_of_the_vocabulary(self):
        loss = Flamingo(CONFIG)(batch("..I...I" * 5, "I......" * 5, N=10))["lm"].item()
        assert loss == pytest.approx(math.log(43), rel=0.1)

    def gradients(self, model, losses):
        model.zero_grad()
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def sets(self):
        """Batches of three data sets with lambdas and lengths of their own, always the same."""
        torch.manual_seed(2)
        return [batch("..I...I", "I......", "...I..I", "I.I....", weight=1.0, dataset=0),
                batch(".I..", "I...", "..I.", "I..I", weight=0.2, dataset=1),
                batch("I.........", "I........I", ".........I", "I..I.....I", weight=0.03,
                      dataset=2, following=[True, False, True, True])]

    def split(self, given, sizes):
        return [{k: v.split(sizes)[i] if v.dim() else v for k, v in given.items()}
                for i in range(len(sizes))]

    def means(self, model):
        """The weighted sum of the gradients of each data set's own mean over its tokens."""
        total = {}
        for given in self.sets():
            logs = model.read(given["ids"], visual=model.look(given["images"]),
                              following=given["following"]).log_softmax(-1)
            own = [-logs[b, t - 1, label] for b, row in enumerate(given["labels"].tolist())
                   for t, label in enumerate(row) if t and label != -100]
            found = self.gradients(model, [sum(own) / len(own)])
            for name, grad in found.items():
                total[name] = total.get(name, 0) + given["weight"] * grad
        return total

    @pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
    def test_a_step_sums_the_weighted_means_of_all_data_sets(self, sizes):
        model = make()
        want = self.means(model)
        micro = [part for given in self.sets() for part in self.split(given, sizes)]
        cached = model.accumulate(micro)
        assert len(cached) == len(micro)
        got = self.gradients(model, [model(p, cached=c)["lm"] for p, c in zip(micro, cached)])
        for name in want:
            close(got[name], want[name], 1e-6)

    def test_two_processes_average_to_the_same(self):
        model = make()
        want = self.means(model)
        halves = list(zip(*(self.split(given, [1, 3]) for given in self.sets())))
        counts = [[(part["labels"][:, 1:] != -100).sum().float() for part in half]
                  for half in halves]

        def step(rank):
            asked_for = iter(zip(*counts))   # the data sets come in one order everywhere

            def gather(x):
                both = next(asked_for)
                assert x.item() == both[rank]
                return torch.stack(both)[:, None], rank
            cached = model.accumulate(halves[rank], gather)
            return self.gradients(model, [
                model(p, cached=c)["lm"] for p, c in zip(halves[rank], cached)])
        one, two = step(0), step(1)
        for name in want:
            close((one[name] + two[name]) / 2, want[name], 1e-6)


class TestFeeds:
    def test_the_feeds_of_a_world_with_pages(self):
        world = Toy(image_size=15)
        feeds = flamingo.feeds(world, Words(), CONFIG)
        assert list(flamingo.DATASETS) == ["pages", "labels", "glossaries", "pictures", "clips"]
        assert [share for _, _, share in feeds] == [2, 3, 5, 9, 1]
        assert [c.weight for _, c, _ in feeds] == [1.0, 2.0, 1.0, 2.5, 1.0]
        assert [c.number for _, c, _ in feeds] == list(range(5))
        assert [c.next_image for _, c, _ in feeds] == [0.5] + 4 * [0]       # pages alone
        for (source, _, _), (_, _, kinds) in zip(feeds, flamingo.DATASETS.values()):
            assert isinstance(source, Drawn)
            self.draws(source, kinds)

    def draws(self, source, kinds):
        """Every kind comes as often as it is said to, and is the world's."""
        found = dict.fromkeys(kinds, 0)
        for i in range(300):
            rng = random.Random(i)
            kind, = rng.choices(list(kinds), weights=kinds.values())
            assert source.record("train", 3, random.Random(i))["texts"] == \
                Toy(image_size=15).interleaved(kind, rng)["texts"]
            found[kind] += 1
        for kind, weight in kinds.items():
            assert found[kind] / 300 == pytest.approx(weight / sum(kinds.values()), abs=0.1)

    def test_the_pages_can_be_left_out(self):
        feeds = flamingo.feeds(Toy(image_size=15), Words(), replace(CONFIG, interleaved=False))
        assert [share for _, _, share in feeds] == [9, 1]
        assert [c.number for _, c, _ in feeds] == [0, 1]
        for (source, _, _), name in zip(feeds, ("pictures", "clips"), strict=True):
            self.draws(source, flamingo.DATASETS[name][2])

    @pytest.mark.parametrize("stage", ["lm", "flamingo"])
    def test_the_feeds_can_be_sent_to_other_processes(self, stage):
        feeds = train.STAGES[stage].feeds(Toy(image_size=15), Words(), CONFIG)
        for one, other in zip(feeds, pickle.loads(pickle.dumps(feeds)), strict=True):
            records = [source.record("train", 3, random.Random(7))["texts"]
                       for source, _, _ in (one, other)]
            assert records[0] == records[1]

    def test_a_world_without_pages_is_its_captions(self):
        world = SimpleNamespace(name="plain")
        (source, collate, share), = flamingo.feeds(world, Words(), CONFIG)
        assert (source, share, collate.weight, collate.next_image) == (world, 1, 1.0, 0.0)


class TestPrompts:
    def ids(self, told, shots):
        sample = prompt(drawing("white"), told, shots)
        assert len(sample["images"]) == sum(sample["shown"])
        return pages().row(sample, end=False)[0]

    def test_shots_are_whole_and_the_query_is_open(self):
        shots = [(drawing("red"), OUTPUT, "a cat"), (drawing("blue"), OUTPUT, "a dog")]
        assert self.ids(OUTPUT, shots) == [
            BOS, IMAGE, OUT, A, CAT, EOC, IMAGE, OUT, A, DOG, EOC, IMAGE, OUT]
        assert self.ids(OUTPUT, []) == [BOS, IMAGE, OUT]

    def test_questions_end_where_the_answer_begins(self):
        asks = ANSWER.format("what is this ?")
        assert asks == "question: what is this ? answer:"
        assert self.ids(asks, [(drawing("red"), asks, "dog")]) == [
            BOS, IMAGE, ASK, WHAT, IS, THIS, MARK, TELL, DOG, EOC,
            IMAGE, ASK, WHAT, IS, THIS, MARK, TELL]

    def test_zero_shots_are_two_in_words_and_one_picture(self):
        ids = self.ids(OUTPUT, [(None, OUTPUT, "a cat"), (None, OUTPUT, "a dog")])
        assert ids == [BOS, OUT, A, CAT, EOC, OUT, A, DOG, EOC, IMAGE, OUT]
        assert ids.count(IMAGE) == 1

    def test_no_space_stands_between_the_prompt_and_the_answer(self):
        assert OUTPUT == OUTPUT.rstrip() and ANSWER == ANSWER.rstrip()
        tokenizer = world_tokenizer(Toy())
        told = render(segments([(OUTPUT, " a red circle")], end=False), tokenizer)[0]
        whole = render(segments([(OUTPUT, " a red circle")]), tokenizer)[0]
        assert whole[:len(told)] == told
        assert whole[len(told):] == tokenizer.encode("a red circle") + [EOC, EOS]

    def test_the_most_similar_shots_come_last(self):
        query = torch.tensor([2.0, 0.0])
        support = torch.tensor([[0.0, 9.0], [5.0, 5.0], [-3.0, 0.0], [1.0, 0.1], [0.2, 0.1]])
        assert rices(query, support, 3).tolist() == [1, 4, 3]
        assert rices(query, support, 9).tolist() == [2, 0, 1, 4, 3]


@pytest.fixture
def pupil():
    return Pupil(make(), pages())


SAMPLES = [DOCUMENT, {"images": [drawing("green")], "texts": [(OUTPUT, "")]},
           {"images": [drawing("blue"), drawing("white"), drawing("red")],
            "texts": [(OUTPUT, " cat"), (OUTPUT, " dog"), (ANSWER.format("what ?"), "")]}]


class Follows:
    """A model that says after each word the one of a table, else dog."""
    config = SimpleNamespace(context_length=37)

    def __init__(self, table):
        self.table = table

    def look(self, images):
        return torch.zeros(len(images), 1, 1, 1)

    def read(self, ids, last=False, **given):
        said = torch.tensor([[self.table.get(i, DOG) for i in row] for row in ids.tolist()])
        return 50 * F.one_hot(said[:, -1:] if last else said, 40).float()


class TestPupil:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_an_answer_ends_with_the_first_eoc(self, beams):
        pupil = Pupil(Follows({OUT: CAT, CAT: EOC}), pages())
        assert pupil.write(SAMPLES[1:2], num_beams=beams) == ["cat"]

    def test_an_answer_that_would_go_on_is_not_the_likeliest(self):
        pupil = Pupil(Follows({OUT: CAT, CAT: DOG, DOG: EOC}), pages())
        assert pupil.choose(SAMPLES[1:2], [["cat", "cat dog"]]) == [1]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_writing_together_is_writing_alone(self, pupil, beams):
        together = pupil.write(SAMPLES, max_new_tokens=7, num_beams=beams)
        assert together == [pupil.write([s], max_new_tokens=7, num_beams=beams)[0] for s in SAMPLES]
        assert together == pupil.write(SAMPLES, max_new_tokens=7, num_beams=beams, rows=2)

    def test_what_is_written_is_the_likeliest_up_to_the_first_eoc(self, pupil):
        ids, mask, state = pupil.read(SAMPLES[2:])
        model, said = pupil.model, []
        visual = model.look(pages().images(SAMPLES[2:]))
        for _ in range(7):
            logits = model.read(ids, visual=visual)[0, -1]
            logits[IMAGE] = -math.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            if ids[0, -1] in (EOC, EOS):
                break
            said.append(ids[0, -1].item())
        assert pupil.write(SAMPLES[2:], max_new_tokens=7) == [Words().decode(said).strip()]

    def test_no_picture_is_ever_written(self, pupil):
        pupil.model.lm.new.rows.data[0] += 100 * torch.randn(20)
        pupil.model.lm.norm.weight.data *= 9
        for beams in (1, 2):
            assert len(pupil.write(SAMPLES * 2, max_new_tokens=9, num_beams=beams)) == 6

    def test_the_last_text_is_open_and_shots_in_words_have_no_tag(self, pupil):
        ids, mask, state = pupil.read(SAMPLES[:1])
        assert ids[0].tolist() == [BOS, IMAGE, OUT, A, RED, CAT, EOC, IMAGE, ASK, WHAT, IS, THIS,
                                   MARK, TELL]
        words = SAMPLES[1] | {"texts": [(OUTPUT, " cat"), (OUTPUT, "")], "shown": [False, True]}
        ids, mask, state = pupil.read([words])
        assert ids[0].tolist() == [BOS, OUT, CAT, EOC, IMAGE, OUT]
        assert state["visual"].shape == (1, 1, 7, 22)

    def test_a_row_with_more_tags_than_pictures_is_told_whatever_the_others_have(self, pupil):
        short = DOCUMENT | {"images": DOCUMENT["images"][:1]}
        for work in (lambda: pupil.write([SAMPLES[2], short]),
                     lambda: pages()([SAMPLES[2], short], [random.Random(0)] * 2)):
            with pytest.raises(ValueError, match="a text with 2 <image> tags, but 1 pictures"):
                work()

    def test_choosing_is_by_the_log_likelihood_with_the_eoc(self, pupil):
        candidates = [["cat", "a red dog"], ["blue cat", "dog"], ["red", "a blue blue dog"]]
        chosen = pupil.choose(SAMPLES, candidates)
        assert chosen == pupil.choose(SAMPLES, candidates, rows=2)
        for sample, answers, choice in zip(SAMPLES, candidates, chosen):
            assert pupil.choose([sample], [answers]) == [choice]
            ids, _, state = pupil.read([sample])
            scores = []
            for answer in answers:
                new = Words().encode(answer) + [EOC]
                whole = torch.cat([ids, torch.tensor([new])], dim=1)
                logs = pupil.model.read(whole, **state)[0].log_softmax(-1)
                scores.append(sum(logs[ids.shape[1] + i - 1, t].item() for i, t in enumerate(new)))
            assert choice == scores.index(max(scores))

    def test_scores_are_those_of_each_prompt_alone(self, pupil, monkeypatch):
        candidates, found = [["cat", "a red dog"], ["blue cat", "dog"], ["red", "a blue dog"]], []

        def kept(*args, **how):
            found.append(score_candidates(*args, **how))
            return found[-1]
        monkeypatch.setattr(flamingo, "score_candidates", kept)
        pupil.choose(SAMPLES, candidates)
        for sample, own in zip(SAMPLES, candidates):
            pupil.choose([sample], [own])
        close(found[0], torch.cat(found[1:]))

    def test_shots_in_words_can_be_ranked_and_written_in_parts(self, pupil):
        shots = [(None, OUTPUT, "a cat"), (drawing("red"), OUTPUT, "a dog"), (None, OUTPUT, "cat")]
        asks = [prompt(drawing("green"), OUTPUT, shots[:k]) for k in range(4)]
        said = pupil.write(asks, max_new_tokens=5, rows=3)
        assert said == [pupil.write([a], max_new_tokens=5)[0] for a in asks]
        answers = [["cat", "dog"]] * 4
        assert pupil.choose(asks, answers, rows=3) == [
            pupil.choose([a], [["cat", "dog"]])[0] for a in asks]

    def test_a_prompt_may_have_no_picture_at_all(self, pupil):
        words = {"images": [], "texts": [(OUTPUT, "")], "shown": [False]}
        both = pupil.write([words, SAMPLES[0]], max_new_tokens=5)
        assert both == pupil.write([words], max_new_tokens=5) + pupil.write([SAMPLES[0]], max_new_tokens=5)
        with pytest.raises(ValueError, match="1 <image> tags, but 0 pictures"):
            pupil.write([words | {"shown": [True]}])

    def test_the_most_similar_shots_are_found_by_the_frozen_towers_features(self, pupil):
        shots = [([drawing(colour)[0]] * n, OUTPUT, colour) for colour, n in (
            ("red", 1), ("blue", 3), ("white", 2), ("green", 1))]
        for colour in ("red", "blue", "white"):
            chosen = pupil.most_alike(drawing(colour), shots, 2)
            assert len(chosen) == 2 and chosen[-1][2] == colour
        tower = pupil.model.vision

        def feature(frames):
            return tower.pooled(normalize_pixels(pages().images([{"images": [frames]}])[0, 0])).mean(0)
        mostly = drawing("red") + drawing("green") * 6
        assert pupil.most_alike(mostly, shots, 1)[0][2] == "green"
        mixed = [drawing("red")[0], drawing("blue")[0], drawing("green")[0]]
        cosines = [F.cosine_similarity(feature(mixed), feature(s[0]), dim=0).item() for s in shots]
        best = sorted(range(4), key=lambda i: cosines[i])
        assert [s[2] for s in pupil.most_alike(mixed, shots, 4)] == [shots[i][2] for i in best]

    def test_candidates_beyond_the_context_are_told_with_the_limit(self, pupil):
        long = SAMPLES[1] | {"texts": [(OUTPUT + " a cat" * 16, "")]}
        with pytest.raises(ValueError, match="a prompt of 35 tokens and 3 of a candidate are 38, "
                                             "but the context is 37"):
            pupil.choose([long], [["cat", "a dog"]])

    def test_a_prompt_is_never_cut(self, pupil):
        long = SAMPLES[1] | {"texts": [(OUTPUT + " a cat" * 30, "")]}
        assert pupil.read([long])[0].shape == (1, 63)

    def test_a_prompt_beyond_the_context_is_told_with_the_limit(self, pupil):
        long = SAMPLES[1] | {"texts": [(OUTPUT + " a cat" * 16, "")]}
        with pytest.raises(ValueError, match="a prompt of 35 tokens and 7 new ones are 42, but the "
                                             "context is 37"):
            pupil.write([long], max_new_tokens=7)


def key(frames):
    return tuple(frame.tobytes() for frame in frames)


class Knows:
    """A pupil that has learned the answer to each picture by heart; "?" to any other."""

    def __init__(self, answers):
        self.answers = answers

    def write(self, samples, **how):
        return [self.answers.get(key(sample["images"][-1]), "?") for sample in samples]


class Cards:
    """Pictures 0 .. 12 whose caption is their number."""
    name, zero_shot = "cards", "single"

    def record(self, split, index):
        return {"images": drawing((index, 0, 0)), "texts": [str(index)], "source": index}

    def describes(self, text, source):
        return text == str(source)


class TestEvaluation:
    world = Toy(image_size=16)

    def drawn(self, kind, count=13, **more):
        return evaluation.draws(self.world, kind, count, **more)

    def test_samples_are_always_the_same_and_different_from_one_another(self):
        texts = [[s["texts"] for s in self.drawn("question")] for _ in range(2)]
        assert texts[0] == texts[1] and len({str(t) for t in texts[0]}) > 9

    def test_questions_in_trained_wordings_are_asked_of_the_same_pictures(self):
        for known, other in zip(self.drawn("question", split="train", asks=1),
                                self.drawn("question")):
            assert known["source"] == other["source"] and known["answer"] == other["answer"]
            assert known["texts"][0][0] != other["texts"][0][0]

    def test_questions_are_asked_in_both_wordings(self):
        asked_for = []

        class Notes:
            def write(self, samples, max_new_tokens):
                asked_for.append([s["texts"][-1][0] for s in samples])
                return [""] * len(samples)
        evaluation.about_questions(Notes(), self.world, 13)
        for split in ("test", "train"):
            want = [s["texts"][0][0] for s in self.drawn("question", split=split, asks=1)]
            assert want in asked_for

    def test_a_prompt_ends_with_the_text_that_is_asked(self):
        for sample, cut in zip(s := self.drawn("document", images=3), asked(s, "at")):
            assert len(cut["images"]) == len(cut["texts"]) == sample["at"] + 1
            assert cut["texts"][-1][0].startswith("question:")
            assert cut["texts"][-1][1] == f" {sample['answer']}"
        assert [s["texts"] for s in asked(s)] == [x["texts"] for x in s]
        words = {"images": ["a", "b"], "texts": ["1", "2", "3", "4"], "at": 2,
                 "shown": [False, True, False, True]}
        cut, = asked([words], "at")
        assert (cut["images"], cut["texts"], cut["shown"]) == (
            ["a"], ["1", "2", "3"], [False, True, False])

    def test_questions_with_the_right_picture_and_with_anothers(self):
        samples, documents = self.drawn("question"), self.drawn("document", images=3)
        answers = {key(s["images"][0]): s["answer"] for s in samples}
        figures = evaluation.about_questions(Knows(answers), self.world, 13)
        blind = sum(s["answer"] == o["answer"] for s, o in zip(samples, samples[1:] + samples[:1]))
        assert figures.pop("vqa_accuracy") == 1 and figures.pop("document_accuracy") == 0
        assert figures.pop("vqa_accuracy_blind") == pytest.approx(blind / 13) != 1
        assert figures.pop("vqa_accuracy_trained_wordings") == 1
        assert figures == {f"vqa_accuracy/{s['kind']}": 1 for s in samples}
        answers = {key(s["images"][s["at"]]): s["answer"] for s in documents}
        figures = evaluation.about_questions(Knows(answers), self.world, 13)
        assert figures["document_accuracy"] == 1 and figures["vqa_accuracy"] == 0

    def test_clips_forwards_longer_and_shuffled(self):
        for frames in (8, 16):
            answers = {key(s["images"][0]): s["answer"] for s in self.drawn("clip", frames=frames)}
            figures = evaluation.about_clips(Knows(answers), self.world, 13)
            assert figures.pop("clip_accuracy_shuffled") < 0.5
            assert figures == {"clip_accuracy": frames == 8,
                               "clip_accuracy_16_frames": frames == 16,
                               "clip_accuracy_chance": 0.5}

    def test_shots_tell_the_labels_unless_they_are_shuffled(self):
        class Reads:
            """Takes the label of the first shot that shows the same as the query."""

            def choose(self, samples, candidates):
                chosen = []
                for sample, own in zip(samples, candidates):
                    assert len(sample["texts"]) == len(sample["images"])
                    said = [label.strip() for _, label in sample["texts"]]
                    what = [(s.items[0].colour, s.items[0].shape) for s in sample["source"]]
                    chosen.append(own.index(said[what.index(what[-1])]) if len(what) > 1 else 0)
                return chosen
        figures = evaluation.about_shots(Reads(), self.world, 40)
        assert [figures[f"shots_{k}"] for k in (2, 4, 8)] == [1, 1, 1]
        assert 0.25 < figures["shots_0"] < 0.75 and 0.2 < figures["shots_8_shuffled"] < 0.8
        assert figures["shots_chance"] == 0.5

    @pytest.mark.parametrize("place, figures", [
        (0, {"two_pictures_first": 1, "two_pictures_nearest": 0}),
        (-1, {"two_pictures_first": 0, "two_pictures_nearest": 1})])
    def test_of_two_pictures_it_is_told_whose_caption_was_written(self, place, figures):
        class Writes:
            def write(self, samples):
                assert all(s["texts"][0] == (OUTPUT, f" {s['images'][0][0].getpixel((0, 0))[0]}")
                           and s["texts"][1] == (OUTPUT, "") for s in samples)
                return [str(s["images"][place][0].getpixel((0, 0))[0]) for s in samples]
        assert evaluation.about_two(Writes(), Cards(), 13) == figures

    def test_text_alone_is_measured_with_and_without_the_gates(self):
        tokenizer = world_tokenizer(self.world)
        language = LANGUAGE | {"vocab_size": len(tokenizer)}
        for gate, same in ((0.0, True), (None, False)):
            model = make(gate=gate, language=language)
            view = EvalData(self.world, tokenizer, InterleavedCollator(tokenizer, model.config), "cpu")
            with torch.no_grad():
                found = model.float().text_perplexity(view, ["a red circle", "a star. a ring."])
                ids = view.ids(["a red circle", "a star. a ring."])
                logs = model.lm(ids).log_softmax(-1)
            own = [-logs[b, t - 1, ids[b, t]] for b, t in (ids != 0).nonzero().tolist() if t]
            assert found["perplexity_lm"] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-4)
            assert (found["perplexity"] == found["perplexity_lm"]) == same

    def test_a_world_of_captions_alone_is_measured_by_them(self):
        class Plain(Cards):
            zero_shot = "test"

            def size(self, split):
                return 5
        tokenizer = world_tokenizer(self.world)
        model = make(language=LANGUAGE | {"vocab_size": len(tokenizer)}).float()
        view = EvalData(Plain(), tokenizer, InterleavedCollator(tokenizer, model.config), "cpu")
        assert set(model.evaluate(view, count=4)) == {"caption_accuracy"}
        assert model.samples(view, count=2).width > 100


# Runs of the training script

def brief():
    """Figures of two samples each."""
    evaluate, samples = Flamingo.evaluate, Flamingo.samples
    Flamingo.evaluate = lambda self, data: evaluate(self, data, count=2)
    Flamingo.samples = lambda self, data: samples(self, data, count=2)


SETTINGS = {
    "clip": ["vision_width=22", "vision_layers=2", "vision_heads=2", "text_width=6",
             "text_layers=1", "text_heads=1", "embed_dim=3", "context_length=9"],
    "lm": ["width=20", "layers=3", "heads=2", "kv_heads=2", "hidden=26"],
    "flamingo": ["num_latents=7", "resampler_layers=1", "resampler_heads=5", "resampler_head_width=3",
                 "cross_attn_every=2", "heads=3", "head_width=4", "max_frames=4", "gate_init=0.5"]}


def options(**more):
    return train.Options(**{"data": "toy", "batch_size": 20, "steps": 2, "precision": "fp32",
                            "device": "cpu"} | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two-step runs of clip, lm and flamingo."""
    folder = tmp_path_factory.mktemp("flamingo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flamingo, "evaluate", Flamingo.evaluate)
        patch.setattr(Flamingo, "samples", Flamingo.samples)
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        brief()
        for stage, out in (("clip", "clip-toy"), ("lm", "lm-toy"), ("flamingo", "one")):
            assert train.train(stage, options(runs=str(folder), out=str(folder / out)),
                               SETTINGS[stage]) == 0
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


class TestRuns:
    def test_the_frozen_parts_are_those_of_their_runs(self, runs):
        one, vision, lm = (weights(runs / name) for name in ("one", "clip-toy", "lm-toy"))
        for parts, head in ((vision, "vision."), (lm, "lm.")):
            own = {name: w for name, w in parts.items() if name.startswith(head)}
            assert own and all(torch.equal(one[name], w) for name, w in own.items())
        assert (one["gated.2.attn_gate"] != 0.5).all() and one["lm.new.rows"].shape == (2, 20)

    def test_every_figure_has_a_name(self, runs):
        found = result(runs / "one")
        for name in ("caption_accuracy", "caption_accuracy_single", "two_pictures_nearest",
                     "vqa_accuracy", "vqa_accuracy_trained_wordings", "vqa_accuracy_blind",
                     "document_accuracy", "clip_accuracy", "clip_accuracy_16_frames", "shots_0",
                     "shots_8", "shots_8_shuffled"):
            assert 0 <= found[name] <= 1
        assert found["perplexity"] > 1 < found["perplexity_lm"]
        assert 0 < found["trainable_parameters"] < found["parameters"]

    def test_it_comes_back_as_it_was_saved(self, runs):
        pupil = flamingo.from_pretrained(runs / "one")
        assert pupil.model.config == FlamingoConfig(**json.loads(
            (runs / "one/config.json").read_text())["config"])
        assert not pupil.model.training and set(pupil.model.gated) == {"0", "2"}
        for name, w in weights(runs / "one").items():
            assert torch.equal(pupil.model.state_dict()[name], w)
        one = {"images": [drawing("red", size=50)], "texts": [(OUTPUT, "")]}
        assert len(pupil.write([one])) == 1

    def test_going_on_and_measuring_again_need_no_other_run(
            self, runs, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(Flamingo, "evaluate", lambda self, data: {})
        monkeypatch.setattr(Flamingo, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        where = options(runs=str(runs), out=str(tmp_path / "two"), steps=2, save_every=1)

        def stop(step):
            update = train.Run.update

            def struck(self, *arguments):
                if self.step == step:
                    raise ValueError("power cut")
                return update(self, *arguments)
            return struck
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "update", stop(1))
            with pytest.raises(ValueError, match="power cut"):
                train.train("flamingo", where, SETTINGS["flamingo"])
        for flag in ("resume", "eval_only"):
            there = replace(where, **{flag: True}, vision="nowhere", language="nowhere")
            assert train.train("flamingo", there, SETTINGS["flamingo"]) == 0
            assert f"resumed from step {1 if flag == 'resume' else 2}" in capsys.readouterr().out
        one, two = weights(runs / "one"), weights(tmp_path / "two")
        assert all(torch.equal(two[name], w) for name, w in one.items())

    def test_ones_own_pictures_train_it_and_those_that_are_missing_are_passed_over(
            self, runs, tmp_path, monkeypatch):
        brief = Flamingo.samples
        monkeypatch.setattr(Flamingo, "samples", lambda self, data: brief(self, data, count=2))
        spec = listed(tmp_path / "data", 40)
        (tmp_path / "data" / names(open_world(spec, 32), "test")[0]).unlink()
        assert train.train("flamingo", options(
            data=spec, skip=0.5, vision=str(runs / "clip-toy"), language=str(runs / "lm-toy"),
            out=str(tmp_path / "own")), SETTINGS["flamingo"]) == 0
        found = result(tmp_path / "own")
        assert found["refused"] == 1 and 0 <= found["caption_accuracy"] <= 1
        assert not any(name.startswith(("vqa", "shots", "two")) for name in found)

    @pytest.mark.parametrize("flag, stage", [("vision", "clip"), ("language", "lm")])
    def test_a_missing_run_names_the_command_that_makes_it(self, runs, flag, stage):
        with pytest.raises(ValueError, match=f"--{flag} nowhere: no run here .*; "
                                             f"python train.py {stage} --data toy --out nowhere "
                                             "makes one"):
            train.train("flamingo", options(runs=str(runs), **{flag: "nowhere"}), [])

    @pytest.mark.parametrize("preset, flags", [("small", " --preset small"), ("3B", "")])
    def test_the_command_has_the_presets_and_data_that_the_stage_has(self, preset, flags, tmp_path):
        out = tmp_path / f"clip-emoji-{preset}"
        with pytest.raises(ValueError, match=f"; python train.py clip --data emoji{flags} --out "
                                             f"{re.escape(str(out))} makes one"):
            train.train("flamingo", train.Options(runs=str(tmp_path), data="emoji", preset=preset),
                        [])

    def test_a_run_of_another_model_and_a_batch_that_cannot_be_shared_are_told(self, runs):
        with pytest.raises(ValueError, match="lm-toy: a run of 'common.training.lm', not of 'clip'"):
            train.train("flamingo", options(runs=str(runs), vision=str(runs / "lm-toy")), [])
        for flag in ("resume", "eval_only"):
            with pytest.raises(ValueError, match="clip-toy: a run of 'clip', not of 'flamingo'"):
                train.train("flamingo", options(runs=str(runs), out=str(runs / "clip-toy"),
                                                **{flag: True}), [])
        for size, accumulate in ((12, 1), (20, 2)):
            with pytest.raises(ValueError, match=f"batch_size {size} does not divide into the 20 "
                                                 f"parts of flamingo's data sets x {accumulate} "):
                train.train("flamingo", options(runs=str(runs), batch_size=size,
                                                accumulate=accumulate), [])

    def test_the_tokenizer_is_the_language_models(self, runs, tmp_path):
        shutil.copytree(runs / "clip-toy", tmp_path / "clip")
        other = Tokenizer.train(["wholly other words", "than those of the toys"], 340)
        (tmp_path / "clip" / "tokenizer.model").write_bytes(other.model)
        run = train.Run("flamingo", options(runs=str(runs), vision=str(tmp_path / "clip"),
                                            out=str(tmp_path / "new")), SETTINGS["flamingo"])
        assert run.tokenizer.model == Tokenizer.load(runs / "lm-toy" / "tokenizer.model").model

    def test_a_config_of_another_version_is_told(self, runs):
        for name in ("vision", "language"):
            fields = getattr(CONFIG, name) | {"unheard": 1}
            with pytest.raises(ValueError, match=f"{name}: a config of another version .*unheard"):
                replace(CONFIG, **{name: fields})

    def test_a_tower_is_not_set_but_named(self, runs):
        with pytest.raises(ValueError, match="vision is a config of its own.*--vision names"):
            train.train("flamingo", options(runs=str(runs)), ["vision=runs/clip"])

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_two_processes_end_with_the_weights_of_one(self, runs, tmp_path, accumulate):
        size = 40 * accumulate           # at least one sample a process, data set and micro-batch
        argv = ["flamingo", "--data", "toy", "--runs", str(runs), "--batch_size", str(size),
                "--steps", "2", "--precision", "fp32", "--device", "cpu"]
        for setting in SETTINGS["flamingo"]:
            argv += ["--set", setting]
        both = pair([*argv, "--accumulate", str(accumulate), "--out", str(tmp_path / "two")],
                    tmp_path / "two", (brief, brief))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Flamingo, "evaluate", lambda self, data: {})
            patch.setattr(Flamingo, "samples", lambda self, data: Image.new("RGB", (2, 2)))
            train.train("flamingo", options(runs=str(runs), batch_size=size,
                                            out=str(tmp_path / "one")), SETTINGS["flamingo"])
        for process in both:
            process.end()
        one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0, msg=name)


    def test_two_processes_train_what_is_unfrozen_too(self, runs, tmp_path):
        # The last norm of the unfrozen tower is not read: no process has a gradient of it.
        argv = ["flamingo", "--data", "toy", "--runs", str(runs), "--batch_size", "40", "--steps",
                "2", "--precision", "fp32", "--device", "cpu", "--unfreeze", "vision.*"]
        for setting in SETTINGS["flamingo"]:
            argv += ["--set", setting]
        for process in pair([*argv, "--out", str(tmp_path / "two")], tmp_path / "two",
                            (brief, brief)):
            process.end()
        assert (tmp_path / "two" / "last.pt").exists()

    def test_its_recipe_has_fast_gates_and_an_undecayed_resampler(self):
        recipe, model = train.STAGES["flamingo"].recipes[""], make()
        train.freeze(model, TRAINS["flamingo"])
        groups = train.parameter_groups(model, recipe.decay, recipe.undecayed, recipe.fast)
        fast = {id(p) for group in groups if group["times"] == 10 for p in group["params"]}
        still = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        gates = {id(p) for name, p in model.named_parameters() if name.endswith("_gate")}
        assert fast == gates and len(gates) == 2 * len(model.gated)
        assert {id(p) for p in model.resampler.parameters()} | gates <= still


class TestCommands:
    def says(self, monkeypatch, capsys, *argv, status=None):
        monkeypatch.setattr(sys, "argv", ["flamingo.py", *map(str, argv)])
        with pytest.raises(SystemExit) as caught:
            cli.run(flamingo.main)
        said = capsys.readouterr()
        assert caught.value.code == status, said
        if status:
            assert said.out == "" and len(said.err.splitlines()) == 1
            return said.err
        return said.out

    @pytest.fixture
    def files(self, tmp_path):
        red, blue = drawing("red", "blue", size=20)
        red.save(tmp_path / "red.png"), blue.save(tmp_path / "blue.png")
        red.save(tmp_path / "film.gif", save_all=True, append_images=[blue, red, blue])
        (tmp_path / "frames").mkdir()
        red.save(tmp_path / "frames/1.png"), blue.save(tmp_path / "frames/2.png")
        (tmp_path / "notes.txt").write_text("not a picture")
        return tmp_path

    @pytest.mark.parametrize("name", ["red.png", "film.gif", "frames"])
    def test_captions_and_answers_are_printed(self, runs, files, monkeypatch, capsys, name):
        said = self.says(monkeypatch, capsys, runs / "one", "caption", files / name)
        assert said.count("\n") == 1
        said = self.says(monkeypatch, capsys, runs / "one", "answer", files / name, "what colour?")
        assert said.count("\n") == 1

    def test_what_is_asked_is_the_prompt_with_its_shots(self, runs, files, monkeypatch, capsys):
        asked_for = []
        monkeypatch.setattr(Pupil, "write",
                            lambda self, *a, **how: asked_for.append((a, how)) or ["yes"])
        argv = ["answer", files / "red.png", "is it red?",
                "--shot", files / "blue.png", "is it blue?", "yes"]
        assert self.says(monkeypatch, capsys, runs / "one", *argv) == "yes\n"
        ((sample,),), how = asked_for[0]
        assert [frames[0].getpixel((0, 0)) for frames in sample["images"]] \
            == [(0, 0, 255), (255, 0, 0)]
        assert sample["texts"] == [("question: is it blue? answer:", " yes"),
                                   ("question: is it red? answer:", "")]
        assert sample["shown"] == [True, True] and how == {"num_beams": 3}
        self.says(monkeypatch, capsys, runs / "one", "caption", files / "film.gif")
        ((sample,),), how = asked_for[1]
        assert sample["texts"] == [("output:", "")] and [len(c) for c in sample["images"]] == [4]

    @pytest.mark.parametrize("argv, words", [
        (["caption", "notes.txt"], "notes.txt: not a readable picture"),
        (["caption", "absent.gif"], "absent.gif: no such picture"),
        (["answer", "red.png", "what?", "--shot", "film.gif", "what?", "red"],
         "clips of 1 and 4 frames together: pictures and clips of one prompt"),
        (["answer", "red.png", "what colour is it? " * 40], "but the context is 256")])
    def test_mistakes_are_told_in_one_line(self, runs, files, monkeypatch, capsys, argv, words):
        monkeypatch.chdir(files)
        assert words in self.says(monkeypatch, capsys, runs / "one", *argv, status=2)

    def test_a_folder_without_a_run_is_told(self, runs, files, monkeypatch, capsys):
        said = self.says(monkeypatch, capsys, files, "caption", files / "red.png", status=2)
        assert re.fullmatch(f"error: .*: no run here .*; python train.py flamingo --out "
                            f"{re.escape(str(files))} makes one\n", said)
        said = self.says(monkeypatch, capsys, runs / "lm-toy", "caption", files / "red.png",
                         status=2)
        assert "a run of 'common.training.lm', not of 'flamingo'" in said
