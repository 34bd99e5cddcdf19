"""OpenFlamingo's weights, read into ours; Flamingo's runs."""
from dataclasses import replace

import pytest
import torch

import flamingo
from common.data.tokenizer import EOC, IMAGE
from common.pretrained.flamingo import OPENFLAMINGO, load_openflamingo
from flamingo import Flamingo, FlamingoConfig
from tests.fuzz import one_line
from tests.helpers import assert_close, drawing, flamingo_config, toy_flamingo
from tests.parity.openflamingo_layout import OpenFlamingo
from tests.pretrained.writers import check_weights, write_run

VISION = dict(image_size=15, patch_size=5, vision_width=22, vision_layers=2, vision_heads=2,
              text_width=6, text_layers=1, text_heads=1, context_length=5, vocab_size=17,
              embed_dim=2)
LANGUAGE = dict(vocab_size=43, context_length=37, width=20, layers=5, heads=2, kv_heads=2,
                hidden=26, tie_embeddings=False)
TAGS = (45, 44)                             # <image>, <|endofchunk|>: added behind a table of 44
LAYERS = "lang_encoder.model.layers"


def make(**changes):
    return Flamingo(FlamingoConfig(**OPENFLAMINGO | {
        "vision": VISION, "language": LANGUAGE, "cross_attn_every": 2, "num_latents": 7,
        "resampler_layers": 3} | changes))


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
        assert_close("visual tokens (Q, D)", visual[1, 2],
                     theirs.perceiver(features[1, 2, 0][None])[0])
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

    @pytest.mark.parametrize("tied, head", [(False, True), (True, False), (True, True)])
    def test_new_tokens_take_their_rows_of_the_heads_there_are(self, both, tied, head):
        _, theirs, write = both
        ours = make(language=LANGUAGE | {"tie_embeddings": tied})
        other = {"vision_encoder.embed_tokens.weight": torch.zeros(46, 20)}
        load_openflamingo(ours, write(
            lambda w: other | (w if head else without(w, "lm_head"))), TAGS)
        assert ours.lm.new.ids.tolist() == [IMAGE, EOC]
        assert_close("rows (2, D)", ours.lm.new.rows,
                     theirs.lang_encoder.model.embed_tokens.weight[[45, 44]], 0)
        if not tied:
            assert_close("rows of the head (2, D)", ours.lm.new.output,
                         theirs.lang_encoder.lm_head.weight[[45, 44]], 0)

    def test_other_language_models_have_other_names(self, both):
        ours, theirs, write = both
        load_openflamingo(ours, write(lambda w: {
            name.replace("model.layers", "transformer.blocks").replace(
                "model.embed_tokens", "transformer.wte"): x for name, x in w.items()}), TAGS)
        assert_close("rows (2, D)", ours.lm.new.rows,
                     theirs.lang_encoder.model.embed_tokens.weight[[45, 44]], 0)

    @pytest.mark.parametrize("change, words", [
        (lambda w: without(w, "perceiver.norm.bias"), "missing resampler.norm.bias$"),
        (lambda w: without(w, "gated_cross"), "missing gated.1.attn_gate; .* and 20 more$"),
        (lambda w: w | {f"{LAYERS}.2.gated_cross_attn_layer.ff_gate": torch.zeros(1)},
         "unexpected gated.2.ff_gate$"),
        (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.zeros(1023, 22)},
         r"resampler.layers.0.attn.v_proj.weight is \(511, 22\), the model's \(512, 22\)$"),
        (lambda w: w | {"perceiver.layers.0.0.to_kv.weight": torch.tensor(1.0)},
         r"layers.0.0.to_kv.weight .*\(\)"),
        (lambda w: without(w, "embed_tokens"), r"rows \[45, 44\]$"),
        (lambda w: without(w, "lm_head"), r"no head with rows \[45, 44\], which an untied"),
        (lambda w: w | {"lang_encoder.lm_head.weight": torch.zeros(45, 20)}, r"rows \[45, 44\]$")])
    def test_what_does_not_fit_is_told_and_changes_nothing(self, both, change, words):
        ours, _, write = both
        before = {name: w.clone() for name, w in ours.state_dict().items()}
        path = write(change)
        with one_line(f"^{path}.*{words}"):
            load_openflamingo(ours, path, TAGS)
        check_weights(ours, before)

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

    def test_the_published_resampler_has_64_latents_and_6_layers(self):
        assert (OPENFLAMINGO["num_latents"], OPENFLAMINGO["resampler_layers"]) == (64, 6)


class TestFromPretrained:
    def test_a_run_folder(self, tmp_path):
        model = toy_flamingo(language=replace(flamingo_config().language, vocab_size=400)).float()
        write_run(tmp_path, "flamingo", model.config, model.state_dict())
        writer = flamingo.from_pretrained(tmp_path)
        assert writer.model.config == model.config and not writer.model.training
        check_weights(writer.model, model.state_dict())
        assert len(writer.generate([{"images": drawing("red"), "texts": [""]}])) == 1
