"""OpenFlamingo's layout of weights: written independently here, read by the house."""
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import clip
from common.language import LanguageConfig
from common.pretrained import flamingo as layout
from common.pretrained.flamingo import OPENFLAMINGO, load_openflamingo
from common.pretrained.names import Table, plan
from common.data.tokenizer import EOC, IMAGE
from flamingo import Flamingo, FlamingoConfig

VISION = asdict(clip.CLIPConfig(
    image_size=15, patch_size=5, vision_width=22, vision_layers=2, vision_heads=2, text_width=6,
    text_layers=1, text_heads=1, context_length=5, vocab_size=17, embed_dim=2))
LANGUAGE = asdict(LanguageConfig(
    vocab_size=43, context_length=37, width=20, layers=5, heads=2, kv_heads=2, hidden=26,
    tie_embeddings=False))
CONFIG = FlamingoConfig(vision=VISION, language=LANGUAGE, cross_attn_every=2,
                        **(OPENFLAMINGO | {"num_latents": 7, "resampler_layers": 3}))
TAGS = (45, 44)                             # <image>, <|endofchunk|>: added behind a table of 44


# OpenFlamingo's modules: its names, and its mathematics in its own order

def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                         nn.Linear(4 * width, width, bias=False))


def heads(x):
    """(B, T, 512) -> (B, 8, T, 64)."""
    return x.reshape(*x.shape[:2], 8, 64).permute(0, 2, 1, 3)


def merged(x):
    return x.permute(0, 2, 1, 3).flatten(2)


class PerceiverAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, 512, bias=False)
        self.to_kv = nn.Linear(width, 1024, bias=False)
        self.to_out = nn.Linear(512, width, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=1)).chunk(2, dim=-1)
        scores = torch.einsum("bhqd,bhkd->bhqk", heads(self.to_q(latents)) / 8, heads(k))
        return self.to_out(merged(torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), heads(v))))


class Perceiver(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(7, width))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(width), feed_forward(width)])
                                    for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed in self.layers:
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    def __init__(self, width, media):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, 512, bias=False)
        self.to_kv = nn.Linear(media, 1024, bias=False)
        self.to_out = nn.Linear(512, width, bias=False)

    def forward(self, x, media, text_time):
        B, N, Q, _ = media.shape
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        scores = torch.einsum("bhtd,bhkd->bhtk", heads(self.to_q(self.norm(x))) / 8, heads(k))
        media_time = torch.arange(1, N + 1).repeat_interleave(Q)
        scores = scores.masked_fill((text_time[:, :, None] != media_time)[:, None], -1e30)
        shares = scores.softmax(-1) * (text_time > 0)[:, None, :, None]
        return self.to_out(merged(torch.einsum("bhtk,bhkd->bhtd", shares, heads(v))))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, width, media):
        super().__init__()
        self.attn = MaskedCrossAttention(width, media)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, text_time):
        x = self.attn(x, media, text_time) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class Layer(nn.Module):
    """gated_cross_attn_layer, if there is one, then decoder_layer."""

    def __init__(self, gated, decoder):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated, decoder


class OpenFlamingo(nn.Module):
    """Around the frozen blocks of one of our own models."""

    def __init__(self, ours):
        super().__init__()
        self.perceiver = Perceiver(22)
        gated = [GatedCrossAttentionBlock(20, 22) if (i + 1) % 2 == 0 else None for i in range(5)]
        inner = nn.Module()
        inner.layers = nn.ModuleList(map(Layer, gated, ours.lm.blocks))
        inner.embed_tokens = nn.Embedding(46, 20)
        self.lang_encoder = nn.Module()
        self.lang_encoder.model = inner
        self.lang_encoder.lm_head = nn.Linear(20, 46, bias=False)
        self.lang_encoder.old_decoder_blocks = nn.ModuleList(ours.lm.blocks)     # second names
        self.lang_encoder.gated_cross_attn_layers = nn.ModuleList(g for g in gated if g)
        for name, p in self.named_parameters():
            if "decoder" not in name:
                nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3)

    def forward(self, ours, features, ids):
        B, N = features.shape[:2]
        media = self.perceiver(features.flatten(2, 3).flatten(0, 1)).unflatten(0, (B, N))
        text_time = (ids == IMAGE).cumsum(dim=1)
        x, inputs = ours.lm.block_inputs(ours.lm.embed(ids))
        for layer in self.lang_encoder.model.layers:
            if layer.gated_cross_attn_layer is not None:
                x = layer.gated_cross_attn_layer(x, media, text_time)
            x = layer.decoder_layer(x, **inputs)
        return ours.lm.head(x)


@pytest.fixture
def both(tmp_path):
    """Our model, theirs, and theirs in a file: what it learns and the tables of embeddings."""
    torch.manual_seed(0)
    ours = Flamingo(CONFIG)
    theirs = OpenFlamingo(ours)
    return ours, theirs, tmp_path / "checkpoint.pt"


def learned(theirs):
    return {name: w.clone() for name, w in theirs.state_dict().items()
            if "decoder" not in name and "gated_cross_attn_layers" not in name}


def test_the_outputs_are_openflamingos(both):
    ours, theirs, path = both
    torch.save(learned(theirs), path)
    load_openflamingo(ours, path, TAGS)
    features, ids = torch.randn(2, 3, 1, 9, 22), torch.randint(6, 43, (2, 11))
    ids[0, [2, 5, 9]], ids[1, 0] = IMAGE, IMAGE
    visual = ours.resampler(features)
    want = theirs.perceiver(features[1, 2, 0][None])[0]
    torch.testing.assert_close(visual[1, 2], want, atol=1e-5, rtol=1e-5)
    want = theirs(ours, features, ids)
    torch.testing.assert_close(ours.logits(ids, visual=visual), want, atol=1e-5, rtol=1e-5)
    assert (want - ours.lm(ids)).abs().max() > 0.1


def test_whole_files_with_frozen_parts_and_second_names_load_alike(both):
    ours, theirs, path = both
    frozen = {f"vision_encoder.{name}": w for name, w in ours.vision.state_dict().items()}
    torch.save({"module." + name: w for name, w in (theirs.state_dict() | frozen).items()}, path)
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    load_openflamingo(ours, path)
    for name, w in ours.state_dict().items():
        same = name.startswith(("vision", "lm"))
        assert torch.equal(w, before[name]) == same, name


def test_new_tokens_take_their_rows(both):
    ours, theirs, path = both
    torch.save(learned(theirs), path)
    load_openflamingo(ours, path, TAGS)
    assert ours.lm.new.ids.tolist() == [IMAGE, EOC]
    table, head = theirs.lang_encoder.model.embed_tokens.weight, theirs.lang_encoder.lm_head.weight
    assert torch.equal(ours.lm.new.rows, table[[45, 44]])
    assert torch.equal(ours.lm.new.output, head[[45, 44]])


def test_a_tied_head_needs_no_rows_of_its_own(both):
    _, theirs, path = both
    ours = Flamingo(replace(CONFIG, language=LANGUAGE | {"tie_embeddings": True}))
    torch.save(learned(theirs), path)
    load_openflamingo(ours, path, TAGS)
    assert torch.equal(ours.lm.new.rows, theirs.lang_encoder.model.embed_tokens.weight[[45, 44]])


def test_rows_of_a_head_that_the_file_leaves_out_stay(both):
    ours, theirs, path = both
    torch.save(without(learned(theirs), "lm_head"), path)
    before = ours.lm.new.output.clone()
    load_openflamingo(ours, path, TAGS)
    assert torch.equal(ours.lm.new.output, before)
    assert torch.equal(ours.lm.new.rows, theirs.lang_encoder.model.embed_tokens.weight[[45, 44]])


def test_other_language_models_have_other_names(both):
    ours, theirs, path = both
    torch.save({name.replace("model.layers", "transformer.blocks").replace(
        "model.embed_tokens", "transformer.wte"): w for name, w in learned(theirs).items()}, path)
    load_openflamingo(ours, path, TAGS)
    gates = theirs.lang_encoder.model.layers[3].gated_cross_attn_layer
    assert torch.equal(ours.gated[3].mlp_gate, gates.ff_gate)
    assert torch.equal(ours.gated[3].attn_gate, gates.attn_gate)
    assert not torch.equal(gates.ff_gate, gates.attn_gate)


def without(weights, part):
    return {name: w for name, w in weights.items() if part not in name}


@pytest.mark.parametrize("change, words", [
    (lambda w: without(w, "perceiver.norm.bias"), "missing resampler.norm.bias$"),
    (lambda w: without(w, "layers.3.gated"), "missing gated.3.attn_gate; .* and 8 more$"),
    (lambda w: w | {"perceiver.frame_embs": torch.zeros(4, 22)},
     "unexpected perceiver.frame_embs$"),
    (lambda w: w | {"perceiver.layers.3.0.to_q.weight": torch.zeros(512, 22)},
     "unexpected perceiver.layers.3.0.to_q.weight$"),
    (lambda w: w | {"lang_encoder.model.layers.2.gated_cross_attn_layer.ff_gate": torch.zeros(1)},
     "unexpected gated.2.ff_gate$"),
    (lambda w: w | {"perceiver.latents": torch.zeros(5, 22)},
     r"resampler.latents is \(5, 22\), the model's \(7, 22\)$"),
    (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.zeros(1023, 22)},
     r"resampler.layers.0.attn.v_proj.weight is \(511, 22\), the model's \(512, 22\)$"),
    (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.tensor(1.0)},
     r"layers.0.0.to_kv.weight has the shape \(\), which its layout cannot have$"),
    (lambda w: without(w, "gated_cross"), "missing gated.1.attn_gate; .* and 20 more$"),
    (lambda w: w | {"lang_encoder.other.0.gated_cross_attn_layer.x": torch.zeros(1)},
     "unexpected gated.0.x$"),
    (lambda w: without(w, "embed_tokens"), r"no embeddings with rows \[45, 44\]$"),
    (lambda w: w | {"lang_encoder.lm_head.weight": torch.zeros(45, 20)},
     r"no embeddings with rows \[45, 44\]$"),
    (lambda w: w | {"lang_encoder.model.embed_tokens.weight": torch.zeros(46, 19)},
     r"lm.new.rows is \(2, 19\), the model's \(2, 20\)$")])
def test_what_does_not_fit_is_told_and_changes_nothing(both, change, words):
    ours, theirs, path = both
    torch.save(change(learned(theirs)), path)
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        load_openflamingo(ours, path, TAGS)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())


@pytest.mark.parametrize("changes, words", [
    ({"act": "squared_relu"}, "act=squared_relu, not gelu"),
    ({"max_frames": 4}, "max_frames=4, not 0"),
    ({"placement": "paper"}, "placement=paper, not openflamingo"),
    ({"heads": 4, "head_width": 128}, "heads=4, not 8; head_width=128, not 64"),
    ({"resampler_heads": 16, "resampler_head_width": 32}, "resampler_heads=16, not 8"),
    ({"only_latest_image": False}, "only_latest_image=False, not True"),
    ({"use_class_token": True}, "use_class_token=True, not False")])
def test_another_config_is_told(both, changes, words):
    _, theirs, path = both
    torch.save(learned(theirs), path)
    with pytest.raises(ValueError, match=f"OpenFlamingo's weights need another config: {words}"):
        load_openflamingo(Flamingo(replace(CONFIG, **changes)), path)


def test_two_ids_are_asked_for(both):
    ours, theirs, path = both
    torch.save(learned(theirs), path)
    with pytest.raises(ValueError, match=r"lm.new.rows is \(1, 20\), the model's \(2, 20\)"):
        load_openflamingo(ours, path, [45])


def test_the_published_shapes_are_those_of_the_specification():
    """9B: LLaMA's width 4096, a gated block before every fourth of 32, CLIP's 1024."""
    language = asdict(LanguageConfig(
        vocab_size=32000, context_length=2048, width=4096, layers=32, heads=32, kv_heads=32,
        hidden=11008, tie_embeddings=False))
    vision = asdict(clip.PRESETS["ViT-L/14"])
    with torch.device("meta"):
        model = Flamingo(FlamingoConfig(vision=vision, language=language, cross_attn_every=4,
                                        **OPENFLAMINGO))
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    blocks = [i for i, block in enumerate(model.gated) if block is not None]
    assert blocks == [3, 7, 11, 15, 19, 23, 27, 31]
    rows = [row for i in blocks for row in layout.under(f"g.{i}", f"gated.{i}", layout.GATED)]
    found = {theirs: [shapes[name] for name in ours] for theirs, (ours, _) in plan(
        Table((*layout.RESAMPLER, *rows)), {"layers": 6}).items()}
    for name, want in {
            "perceiver.latents": [(64, 1024)], "perceiver.layers.5.0.to_q.weight": [(512, 1024)],
            "perceiver.layers.5.0.to_kv.weight": [(512, 1024)] * 2,
            "perceiver.layers.5.0.to_out.weight": [(1024, 512)],
            "perceiver.layers.0.1.1.weight": [(4096, 1024)],
            "perceiver.layers.0.1.3.weight": [(1024, 4096)], "g.31.attn_gate": [(1,)],
            "g.3.attn.to_q.weight": [(512, 4096)], "g.3.attn.to_kv.weight": [(512, 1024)] * 2,
            "g.3.attn.to_out.weight": [(4096, 512)], "g.7.ff.1.weight": [(16384, 4096)],
            "g.7.ff.3.weight": [(4096, 16384)], "g.31.ff_gate": [(1,)]}.items():
        assert found[name] == want, name
    ours = [name for names, _ in plan(Table((*layout.RESAMPLER, *rows)), {"layers": 6}).values()
            for name in names]
    assert sorted(ours) == sorted(n for n in shapes if n.startswith(("resampler.", "gated.")))
