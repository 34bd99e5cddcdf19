"""OpenFlamingo's layout of weights, written independently here and read by ours; Flamingo's runs."""
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import clip
import flamingo
from common.data.tokenizer import EOC, IMAGE
from common.language import LanguageConfig
from common.pretrained.flamingo import OPENFLAMINGO, load_openflamingo
from flamingo import Flamingo, FlamingoConfig
from tests.fuzz import one_line
from tests.helpers import assert_close, drawing, flamingo_config, toy_flamingo
from tests.pretrained.writers import write_run

VISION = dict(image_size=15, patch_size=5, vision_width=22, vision_layers=2, vision_heads=2,
              text_width=6, text_layers=1, text_heads=1, context_length=5, vocab_size=17,
              embed_dim=2)
LANGUAGE = dict(vocab_size=43, context_length=37, width=20, layers=5, heads=2, kv_heads=2,
                hidden=26, tie_embeddings=False)
TAGS = (45, 44)                             # <image>, <|endofchunk|>: added behind a table of 44
LAYERS = "lang_encoder.model.layers"


def make(language=LANGUAGE, **changes):
    return Flamingo(FlamingoConfig(
        vision=VISION, language=language, **({"cross_attn_every": 2} | OPENFLAMINGO
                                             | {"num_latents": 7, "resampler_layers": 3} | changes)))


# OpenFlamingo's modules: its names, and its mathematics in its own order

def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                         nn.Linear(4 * width, width, bias=False))


class Attention(nn.Module):
    def __init__(self, width, media, heads=8):
        super().__init__()
        self.to_q = nn.Linear(width, heads * 64, bias=False)
        self.to_kv = nn.Linear(media, 2 * heads * 64, bias=False)
        self.to_out = nn.Linear(heads * 64, width, bias=False)

    def attend(self, x, media, mask):
        """x (B, T, D), media (B, S, C), mask bool (B, T, S); where it is empty the output is 0."""
        q, k, v = (y.unflatten(-1, (8, 64)) for y in (
            self.to_q(x), *self.to_kv(media).chunk(2, dim=-1)))
        scores = torch.einsum("bthd,bshd->bhts", q / 8, k).masked_fill(~mask[:, None], -1e30)
        shares = scores.softmax(-1) * mask.any(-1)[:, None, :, None]
        return self.to_out(torch.einsum("bhts,bshd->bthd", shares, v).flatten(2))


class PerceiverAttention(Attention):
    def __init__(self, width):
        super().__init__(width, width)
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        x = torch.cat((x, latents), dim=1)
        return self.attend(latents, x, torch.ones(*latents.shape[:2], x.shape[1]).bool())


class Perceiver(nn.Module):
    def __init__(self, width, latents=7, layers=3):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(width), feed_forward(width)])
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, feed in self.layers:
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(Attention):
    def __init__(self, width, media):
        super().__init__(width, media)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, media, text_time):
        media_time = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        return self.attend(self.norm(x), media.flatten(1, 2), text_time[:, :, None] == media_time)


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, width, media):
        super().__init__()
        self.attn, self.ff = MaskedCrossAttention(width, media), feed_forward(width)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, text_time):
        x = self.attn(x, media, text_time) * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class Layer(nn.Module):
    def __init__(self, gated, decoder):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated, decoder


class OpenFlamingo(nn.Module):
    """Around the frozen blocks of one of our own models."""

    def __init__(self, ours):
        super().__init__()
        self.perceiver = Perceiver(22)
        gated = [GatedCrossAttentionBlock(20, 22) if i % 2 else None for i in range(5)]
        self.lang_encoder = nn.Module()
        self.lang_encoder.model = nn.Module()
        self.lang_encoder.model.layers = nn.ModuleList(map(Layer, gated, ours.lm.blocks))
        self.lang_encoder.model.embed_tokens = nn.Embedding(46, 20)
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


def without(weights, part):
    return {name: w for name, w in weights.items() if part not in name}


@pytest.fixture
def both(tmp_path):
    """Our model, theirs, and a function that writes what theirs learned, changed, to a file."""
    ours = make()
    theirs = OpenFlamingo(ours)
    learned = without(without(theirs.state_dict(), "decoder"), "gated_cross_attn_layers")

    def write(change=dict):
        torch.save(change(learned), tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"
    return ours, theirs, write


class TestLoadOpenflamingo:
    def test_the_outputs_are_openflamingos(self, both):
        ours, theirs, write = both
        load_openflamingo(ours, write(), TAGS)
        features, ids = torch.randn(2, 3, 1, 9, 22), torch.randint(6, 43, (2, 11))
        ids[0, [2, 5, 9]], ids[1, 0] = IMAGE, IMAGE
        visual = ours.resampler(features)
        assert_close("visual tokens (Q, D)", visual[1, 2], theirs.perceiver(features[1, 2, 0][None])[0])
        want = theirs(ours, features, ids)
        assert_close("logits (B, T, V)", ours.logits(ids, visual=visual), want)
        assert (want - ours.lm(ids)).abs().max() > 0.1

    def test_whole_files_with_frozen_parts_and_second_names_load_alike(self, both):
        ours, theirs, write = both
        frozen = {f"vision_encoder.{name}": w + 1 for name, w in ours.vision.state_dict().items()}
        before = {name: w.clone() for name, w in ours.state_dict().items()}
        load_openflamingo(ours, write(lambda _: {
            f"module.{name}": w for name, w in (theirs.state_dict() | frozen).items()}))
        for name, w in ours.state_dict().items():
            assert torch.equal(w, before[name]) == name.startswith(("vision", "lm")), name
        assert_close("a gate", ours.gated[3].mlp_gate, theirs.lang_encoder.model.layers[3]
                     .gated_cross_attn_layer.ff_gate)

    @pytest.mark.parametrize("tied, head", [(False, True), (False, False), (True, True)])
    def test_new_tokens_take_their_rows_of_the_heads_there_are(self, both, tied, head):
        _, theirs, write = both
        ours = make(LANGUAGE | {"tie_embeddings": tied})
        before = None if tied else ours.lm.new.output.clone()
        load_openflamingo(ours, write(lambda w: w if head else without(w, "lm_head")), TAGS)
        assert ours.lm.new.ids.tolist() == [IMAGE, EOC]
        assert_close("rows (2, D)", ours.lm.new.rows,
                     theirs.lang_encoder.model.embed_tokens.weight[[45, 44]], 0)
        if not tied:
            assert_close("rows of the head (2, D)", ours.lm.new.output,
                         theirs.lang_encoder.lm_head.weight[[45, 44]] if head else before, 0)

    def test_other_language_models_have_other_names(self, both):
        ours, theirs, write = both
        load_openflamingo(ours, write(lambda w: {
            name.replace("model.layers", "transformer.blocks").replace(
                "model.embed_tokens", "transformer.wte"): value for name, value in w.items()}), TAGS)
        gates = theirs.lang_encoder.model.layers[3].gated_cross_attn_layer
        assert_close("attn_gate", ours.gated[3].attn_gate, gates.attn_gate, 0)
        assert_close("mlp_gate", ours.gated[3].mlp_gate, gates.ff_gate, 0)
        assert_close("rows (2, D)", ours.lm.new.rows,
                     theirs.lang_encoder.model.embed_tokens.weight[[45, 44]], 0)

    @pytest.mark.parametrize("change, words", [
        (lambda w: without(w, "perceiver.norm.bias"), "missing resampler.norm.bias$"),
        (lambda w: without(w, "layers.3.gated"), "missing gated.3.attn_gate; .* and 8 more$"),
        (lambda w: without(w, "gated_cross"), "missing gated.1.attn_gate; .* and 20 more$"),
        (lambda w: w | {"perceiver.frame_embs": torch.zeros(4, 22)},
         "unexpected perceiver.frame_embs$"),
        (lambda w: w | {f"{LAYERS}.2.gated_cross_attn_layer.ff_gate": torch.zeros(1)},
         "unexpected gated.2.ff_gate$"),
        (lambda w: w | {"perceiver.latents": torch.zeros(5, 22)},
         r"resampler.latents is \(5, 22\), the model's \(7, 22\)$"),
        (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.zeros(1023, 22)},
         r"resampler.layers.0.attn.v_proj.weight is \(511, 22\), the model's \(512, 22\)$"),
        (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.tensor(1.0)},
         r"layers.0.0.to_kv.weight .*\(\)"),
        (lambda w: without(w, "embed_tokens"), r"rows \[45, 44\]$"),
        (lambda w: w | {"lang_encoder.lm_head.weight": torch.zeros(45, 20)}, r"rows \[45, 44\]$"),
        (lambda w: w | {"lang_encoder.model.embed_tokens.weight": torch.zeros(46, 19)},
         r"lm.new.rows is \(2, 19\), the model's \(2, 20\)$")])
    def test_what_does_not_fit_is_told_and_changes_nothing(self, both, change, words):
        ours, _, write = both
        before = {name: w.clone() for name, w in ours.state_dict().items()}
        path = write(change)
        with one_line(f"^{path}.*{words}"):
            load_openflamingo(ours, path, TAGS)
        for name, w in ours.state_dict().items():
            assert_close(name, w, before[name], 0)

    @pytest.mark.parametrize("changes, words", [
        ({"act": "squared_relu"}, "act=squared_relu, not gelu"),
        ({"max_frames": 4}, "max_frames=4, not 0"),
        ({"placement": "paper"}, "placement=paper, not openflamingo"),
        ({"heads": 4, "head_width": 128}, "heads=4, not 8; head_width=128, not 64"),
        ({"resampler_heads": 16, "resampler_head_width": 32}, "resampler_heads=16, not 8"),
        ({"only_latest_image": False}, "only_latest_image=False, not True"),
        ({"use_class_token": True}, "use_class_token=True, not False")], ids=str)
    def test_another_config_is_told(self, both, changes, words):
        with one_line(words):
            load_openflamingo(make(**changes), both[2]())

    def test_two_ids_are_asked_for(self, both):
        with one_line(r"lm.new.rows is \(1, 20\), the model's \(2, 20\)"):
            load_openflamingo(both[0], both[2](), [45])

    def test_the_published_shapes_are_those_of_the_specification(self):
        """9B: LLaMA's width 4096, a gated block before every fourth of 32, CLIP's 1024."""
        language = asdict(LanguageConfig(
            vocab_size=32000, context_length=2048, width=4096, layers=32, heads=32, kv_heads=32,
            hidden=11008, tie_embeddings=False))
        with torch.device("meta"):
            model = Flamingo(FlamingoConfig(vision=asdict(clip.PRESETS["ViT-L/14"]),
                                            language=language, cross_attn_every=4, **OPENFLAMINGO))
            theirs = {"resampler": Perceiver(1024, 64, 6),
                      **{f"gated.{i}": GatedCrossAttentionBlock(4096, 1024) for i in range(3, 32, 4)}}
        for name, part in theirs.items():        # both split or join only q, k and v
            own = sum(p.numel() for p in model.get_submodule(name).parameters())
            assert own == sum(p.numel() for p in part.parameters()), name
        assert [f"gated.{i}" for i, block in enumerate(model.gated) if block] == [*theirs][1:]
        assert model.resampler.latents.shape == (64, 1024)


class TestFromPretrained:
    def test_a_run_folder(self, tmp_path):
        model = toy_flamingo(language=replace(flamingo_config().language, vocab_size=400)).float()
        write_run(tmp_path, "flamingo", model.config, model.state_dict())
        writer = flamingo.from_pretrained(tmp_path)
        assert writer.model.config == model.config and not writer.model.training
        for name, weight in writer.model.state_dict().items():
            assert_close(name, weight, model.state_dict()[name], 0)
        assert len(writer.generate([{"images": drawing("red"), "texts": [""]}])) == 1

    def test_anything_else_is_one_line(self, tmp_path):
        with one_line("none: no run here"):
            flamingo.from_pretrained(tmp_path / "none")
        write_run(tmp_path, "clip", flamingo_config(), {})
        with one_line("'clip', not of 'flamingo'"):
            flamingo.from_pretrained(tmp_path)
