"""LLaVA's published weights: layouts of names, sizes, what is refused; the command line on them."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import llava
import train
from common.data.images import open_image
from common.evaluation.writing import Writer
from common.pretrained import llava as pretrained
from llava import LLaVA, LLaVAConfig
from tests.fuzz import damages, one_line
from tests.helpers import command, listed, mistake, randomize
from tests.parity import hugging_face_layout
from tests.pretrained.writers import check_weights, sentencepieces, write_run, write_safetensors

VISION = dict(image_size=15, patch_size=5, vision_width=21, vision_layers=3, vision_heads=3)
FIELDS = dict(vision=VISION | {"act": "quick_gelu"}, template="v1", losses="instruct",
              language=dict(vocab_size=307, context_length=512, width=24, layers=2, heads=4,
                            kv_heads=2, hidden=37, tie_embeddings=False, pad_id=0))
GRIDS = (2, 1), (1, 2), (3, 2)           # (columns, rows)
PARTS = {
    "vision": {"model_type": "clip_vision_model", "hidden_size": 21, "num_hidden_layers": 3,
               "num_attention_heads": 3, "image_size": 15, "patch_size": 5},
    "text": {"model_type": "llama", "hidden_size": 24, "intermediate_size": 37,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 307, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}}
KINDS = {"llava": {"views": "pad"}, "llava_next": {"views": "tiles", "grids": GRIDS}}


def part(name, **changes):
    """Changes of a config.json within one of its parts."""
    return {f"{name}_config": PARTS[name] | changes}


def write(folder, kind="llava", layout="old", change=None, **changes):
    """Write a folder of random weights -> the weights under our names."""
    config = {"model_type": kind, **part("vision"), **part("text"), "image_token_index": 305,
              "image_grid_pinpoints": [[15, 30], [30, 15], [30, 45]]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(sentencepieces())
    torch.manual_seed(1)
    ours = randomize(LLaVA(LLaVAConfig(**FIELDS, **KINDS[kind]))).state_dict()
    ours["lm.output.weight"][:259] = 0   # bytes, of which an answer would be no text
    theirs = hugging_face_layout.llava(ours, VISION, layout)
    if change:
        change(theirs)
    write_safetensors(folder / "model.safetensors", theirs)
    return ours


class TestRead:
    def test_a_vocabulary_larger_than_the_table_is_told(self, tmp_path):
        write(tmp_path, **part("text", vocab_size=298))
        with one_line("299 pieces, .* 298"):
            pretrained.read(tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    def test_damaged_configs_are_a_model_or_one_line(self, tmp_path, kind):
        write(tmp_path, kind)
        for _ in damages(tmp_path / "config.json", 150):
            with one_line(maybe=True):
                LLaVAConfig(**pretrained.read(tmp_path)[0])

    @pytest.mark.parametrize("name, head", [("preprocessor_config.json", "{}"),
                                            ("processor_config.json", '{{"image_processor": {}}}')])
    def test_other_pictures_than_ours_are_refused(self, tmp_path, name, head):
        write(tmp_path)
        (tmp_path / name).write_text(head.format('{"size": {"shortest_edge": 15}}'))
        assert pretrained.read(tmp_path)
        (tmp_path / name).write_text(head.format('{"size": {"shortest_edge": 16}}'))
        with one_line(f"{name}: size is .*16.*, ours 15"):
            pretrained.read(tmp_path)


class TestConfigFields:
    @pytest.mark.parametrize("kind, change, message", [
        ("llava", {"model_type": "llava_onevision"}, "model_type is 'llava_onevision', not"),
        ("llava", {"mm_vision_tower": "openai/clip"}, "layout of LLaVA's authors"),
        ("llava", {"vision_feature_layer": -1}, "vision_feature_layer is -1, ours -2"),
        ("llava", {"vision_feature_layer": [-2, -5]}, r"feature_layer is \[-2, -5\], ours -2"),
        ("llava", {"vision_feature_select_strategy": "full"}, "strategy is 'full', ours default"),
        ("llava", {"projector_hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', ours gelu"),
        ("llava", {"multimodal_projector_bias": False}, "projector_bias is False, ours True"),
        ("llava", part("text", model_type="mistral"), "text_config: model_type is 'mistral'"),
        ("llava", part("text", attention_bias=True), "text_config: attention_bias is True"),
        ("llava", part("text", vocab_size=308), r"\(307, 24\), the model's \(308, 24\)"),
        ("llava", part("vision", model_type="siglip_vision_model"), "'siglip_vision_model', ours"),
        ("llava", part("vision", hidden_act="relu"), "'relu', ours quick_gelu or gelu"),
        ("llava", part("vision", layer_norm_eps=1e-6), "vision_config: layer_norm_eps is 1e-06"),
        ("llava", part("vision", num_hidden_layers=5), "missing vision.transformer.blocks.3"),
        ("llava", part("vision", num_hidden_layers=2), "unexpected vision_model.*layers.2"),
        ("llava", {"vision_config": [1]}, r"vision_config is \[1\]"),
        ("llava_next", {"model_type": "llava"}, "unexpected row_end"),
        ("llava", {"model_type": "llava_next"}, "missing row_end")], ids=str)
    def test_what_ours_is_not_is_one_line(self, tmp_path, kind, change, message):
        write(tmp_path, kind, **change)
        with one_line(message):
            llava.from_pretrained(tmp_path)

    def test_gelu_in_the_image_encoder_and_the_default_grids(self):
        config = {"model_type": "llava_next", **part("vision", hidden_act="gelu", image_size=336)}
        fields = pretrained.config_fields(config, "here")
        assert fields["vision"]["act"] == "gelu"
        assert fields["grids"] == [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]


class TestGridsOf:
    @pytest.mark.parametrize("pinpoints", [
        [[15, 31]], [[30, 0]], [[30]], [30, 15], [], "x", [[30.0, 15]], {"30": 15}], ids=str)
    def test_what_is_no_grid_of_tiles_is_refused(self, pinpoints):
        with one_line("here: image_grid_pinpoints is .* tiles of 15 pixels"):
            pretrained.grids_of(pinpoints, 15, "here")


class TestFromPretrained:
    @pytest.mark.parametrize("layout", hugging_face_layout.LLAVA)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_hugging_face_folder(self, tmp_path, kind, layout):
        ours = write(tmp_path, kind, layout)
        model, tokenizer = llava.from_pretrained(tmp_path)
        assert model.config == LLaVAConfig(**FIELDS, **KINDS[kind]) and not model.training
        assert len(tokenizer) == 299 and model.stop_ids == (tokenizer.eos_id,)
        check_weights(model, ours)

    @pytest.mark.parametrize("name, message", [
        ("multi_modal_projector.linear_2.bias", "missing projector.2.bias"),
        ("language_model.lm_head.weight", "missing lm.output.weight")])
    def test_missing_weights_are_one_line(self, tmp_path, name, message):
        write(tmp_path, change=lambda theirs: theirs.pop(name))
        with one_line(message):
            llava.from_pretrained(tmp_path)

    @pytest.mark.parametrize("stage", ["llava-stage1", "llava-stage2"])
    def test_it_is_trained_further_and_keeps_its_pieces(self, tmp_path, stage):
        write(tmp_path)
        run = train.build(stage, train.Options(
            init=str(tmp_path), data=listed(tmp_path / "data", 40), batch_size=6,
            precision="fp32", out=str(tmp_path / "run")), [], 0.0)
        losses = {"losses": "captions"} if stage == "llava-stage1" else {}
        assert run.config == LLaVAConfig(**FIELDS | KINDS["llava"] | losses)
        assert train.update(run, run.model, run.batches[0]).isfinite()
        train.save(run)
        model, tokenizer = llava.from_pretrained(tmp_path / "run")
        assert tokenizer.model == sentencepieces() and (tmp_path / "run/llama.model").exists()
        check_weights(model, run.model.state_dict())

    def test_a_run_folder(self, tmp_path):
        config = replace(llava.PRESETS["tiny"], projector="adapter", views="squash")
        ours = randomize(LLaVA(config)).state_dict()
        tokenizer = write_run(tmp_path, "llava", config, ours)
        model, found = llava.from_pretrained(tmp_path)
        assert model.config == config and found.model == tokenizer.model
        check_weights(model, ours)

    @pytest.mark.parametrize("kind", KINDS)
    def test_asking_about_a_picture_in_the_terminal(self, tmp_path, kind):
        write(tmp_path, kind)
        Image.effect_noise((40, 13), 99).save(tmp_path / "x.png")
        record = {"turns": [{"images": [[open_image(tmp_path / "x.png")]],
                             "prompt": "what is red ?", "answer": ""}]}
        model, tokenizer = llava.from_pretrained(tmp_path)
        expected, = Writer(model, tokenizer).generate([record], max_new_tokens=128)
        status, out, err = command("llava.py", tmp_path, "ask", tmp_path / "x.png", "what is red ?")
        assert (status, out.strip(), err) == (0, expected, "") and expected.strip()
        (tmp_path / "tokenizer.model").unlink()
        assert "tokenizer.model: no such file" in mistake(
            "llava.py", tmp_path, "ask", tmp_path / "x.png", "what is red ?")


def encoder(pixels):
    """ViT-L/14 without its last block and norm, at a size of pictures."""
    block = 4 * (1024 + 1) * 1024 + (1024 + 1) * 4096 + (4096 + 1) * 1024 + 2 * 2 * 1024
    return 3 * 14 * 14 * 1024 + 1024 + (1 + (pixels // 14) ** 2) * 1024 + 2 * 1024 + 23 * block


def decoder(width, layers, hidden):
    """A LLaMA with 32,000 pieces: tables, attention, gated MLPs and norms."""
    return 2 * 32000 * width + layers * (4 * width ** 2 + 3 * width * hidden + 2 * width) + width


class TestPublishedSizes:
    """On device meta, against sums by hand."""

    @pytest.mark.parametrize("preset, projector, others", [
        ("v1-7b", 4_198_400, encoder(224) + decoder(4096, 32, 11008)),
        ("v1.5-7b", 20_979_712, encoder(336) + decoder(4096, 32, 11008)),
        ("v1.5-13b", 31_467_520, encoder(336) + decoder(5120, 40, 13824)),
        ("next-7b", 20_979_712, encoder(336) + decoder(4096, 32, 11008) + 4096)])
    def test_presets(self, preset, projector, others):
        with torch.device("meta"):
            model = LLaVA(llava.PRESETS[preset])
        assert sum(p.numel() for p in model.projector.parameters()) == projector
        assert sum(p.numel() for p in model.parameters()) == projector + others
