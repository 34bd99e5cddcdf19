"""BLIP's published weights: their names, their sizes, and what is refused."""
import json
import re
from dataclasses import replace

import pytest
import torch

import blip
import train
from blip import PRESETS, BLIPConfig, make_model
from common.pretrained import blip as pretrained
from tests.fuzz import damages, one_line
from tests.helpers import assert_close, listed, randomize
from tests.parity import blip_layout
from tests.pretrained.writers import check_weights, write_run, write_safetensors

PIECES = ["[UNK]", "[PAD]", "a", "[CLS]", "[SEP]", *"bcdefghijklmnopqrstuvwxyz"]
CONFIG = {"model_type": "blip", "image_text_hidden_size": 17, "text_config": {
    "hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 11}, "vision_config": {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 15,
    "patch_size": 5, "layer_norm_eps": 1e-5}}
IDS = dict(pad_id=1, cls_id=3, eos_id=4, dec_id=30, enc_id=31, vocab_size=32, context_length=11,
           queue_size=0, momentum=0.0)
FIELDS = IDS | dict(image_size=15, patch_size=5, vision_width=24, vision_layers=2, vision_heads=3,
                    vision_eps=1e-5, text_width=28, text_layers=3, text_heads=2, embed_dim=17)
WIDE = FIELDS | dict(vision_width=128, vision_heads=2, vision_eps=1e-6, text_width=192,
                     text_heads=3)       # Salesforce's heads are 64 wide
PRETRAINED = {"losses": "itc,itm,lm", "sharing": "all-but-sa"}
KINDS = {losses: {"losses": losses, "sharing": "none"} for losses in ("lm", "vqa", "itc,itm")}


def part(tower, **changes):
    """Changes of CONFIG within the config of a tower, text or vision."""
    return {f"{tower}_config": CONFIG[f"{tower}_config"] | changes}


def random_weights(fields, **changes):
    """The state dict of a model of these fields with random parameters."""
    return randomize(make_model(BLIPConfig(**fields | changes))).state_dict()


def write_pieces(folder):
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")


def hugging_face(folder, kind=KINDS["itc,itm"], **changes):
    """Write a folder of random weights -> the weights under our names."""
    write_pieces(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    ours = random_weights(FIELDS, **kind)
    write_safetensors(folder / "model.safetensors", blip_layout.hugging_face(ours, 5))
    return ours


def salesforce(folder, change=None, kind=PRETRAINED):
    """Write a .pth file, changed by change(weights) -> (its path, the weights under our names)."""
    write_pieces(folder)
    ours = random_weights(WIDE, **kind)
    theirs = blip_layout.salesforce(ours, 5)
    if change:
        change(theirs)
    torch.save({"model": theirs, "epoch": 19}, folder / "model.pth")
    return folder / "model.pth", ours


class TestRead:
    def test_a_vocabulary_of_another_size_is_told(self, tmp_path):
        hugging_face(tmp_path)
        (tmp_path / "vocab.txt").write_text("\n".join(PIECES[:-1]))
        with one_line(f"^{tmp_path}: .*31 pieces.* 32"):
            pretrained.read(tmp_path)

    def test_damaged_configs_are_a_model_or_one_line(self, tmp_path):
        hugging_face(tmp_path)
        for _ in damages(tmp_path / "config.json", 200):
            with one_line(maybe=True):
                pretrained.read(tmp_path)


class TestCheckTied:
    @pytest.mark.parametrize("name, message", [
        ("text_decoder.cls.predictions.decoder.weight", "embeddings.word_embeddings.weight differ"),
        ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias differ"),
        *((f"text_encoder.{name}", f"text_decoder.bert.{name} differ") for name in (
            "embeddings.LayerNorm.bias", "embeddings.position_embeddings.weight",
            "encoder.layer.2.crossattention.self.key.weight",
            "encoder.layer.0.intermediate.dense.bias"))])
    def test_what_training_ties_must_be_equal(self, tmp_path, name, message):
        def change(theirs):
            theirs[name] = theirs[name] + 1
        path, _ = salesforce(tmp_path, change)
        with one_line(f"^{path}: {name} and .*{message}"):
            pretrained.read(path)

    def test_a_file_may_leave_the_copies_out_and_tune_both_transformers(self, tmp_path):
        def change(theirs):
            for name in ("weight", "bias"):
                del theirs[f"text_decoder.cls.predictions.decoder.{name}"]
        path, ours = salesforce(tmp_path, change, KINDS["vqa"])
        check_weights(blip.from_pretrained(path)[0], ours)


class TestHuggingFace:
    def test_sizes_left_out_are_those_of_base_with_twelve_heads_and_its_eps(self):
        fields, _ = pretrained.hugging_face({}, {"model_type": "blip"}, "here")
        assert replace(PRESETS["base"], **fields) == replace(PRESETS["base"], image_size=384)
        assert fields["text_heads"] == 12 and fields["vision_eps"] == 1e-6

    @pytest.mark.parametrize("change, message", [
        ({"model_type": "clip"}, "model_type is 'clip'"),
        ({"image_text_hidden_size": 19}, r"weight is \(17, 24\), the model's \(19, 24\)"),
        (part("text", hidden_act="relu"), "text_config: hidden_act is 'relu'"),
        (part("vision", hidden_act="quick_gelu"), "vision_config: hidden_act is 'quick_gelu'"),
        (part("text", layer_norm_eps=1e-6), "text_config: layer_norm_eps is 1e-06"),
        (part("vision", layer_norm_eps=0), "layer_norm_eps is 0, not"),
        (part("text", num_attention_heads=None), "text_config: num_attention_heads is 0"),
        (part("text", num_hidden_layers=4), "missing encoder.blocks.3.attn"),
        (part("vision", num_hidden_layers=1), "unexpected vision_model.encoder.layers.1"),
        (part("vision", patch_size=3), r"patch_embed.weight is \(24, 75\), the model's \(24, 27\)"),
        (part("vision", image_size=[15, 15]), r"vision_config: image_size is \[15, 15\]")], ids=str)
    def test_a_config_at_odds_with_the_weights_is_one_line(self, tmp_path, change, message):
        hugging_face(tmp_path, **change)
        with one_line(message):
            blip.from_pretrained(tmp_path)

    def test_other_pictures_than_ours_are_refused(self, tmp_path):
        hugging_face(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5]}')
        with one_line(re.escape("image_std is [0.5, 0.5, 0.5]")):
            pretrained.read(tmp_path)


class TestSalesforce:
    @pytest.mark.parametrize("losses", ["lm", "vqa", "itc,itm", "itc,itm,lm"])
    @pytest.mark.parametrize("preset", ["base", "large"])
    def test_published_sizes(self, preset, losses):
        c = replace(PRESETS[preset], losses=losses, momentum=0.0, queue_size=0)
        with torch.device("meta"):
            own = make_model(c).state_dict()
        fields, weights = pretrained.salesforce(blip_layout.salesforce(own, 16), "here")
        assert replace(c, **fields) == c
        assert {n: w.shape for n, w in weights.items()} == {
            n: w.shape for n, w in own.items() if not n.endswith(("_queue", "queue_next"))}

    def test_names_that_the_published_files_have(self):
        """From the specification of the layout, not from our own writer of it."""
        D, names = 128, {
            "visual_encoder.blocks.1.attn.qkv.weight": (384, 128),
            "text_encoder.encoder.layer.2.crossattention.output.LayerNorm.bias": (192,)}
        theirs = blip_layout.salesforce(random_weights(WIDE, **PRETRAINED), 5)
        assert all(theirs[name].shape == shape for name, shape in names.items())
        ours = pretrained.salesforce(theirs, "here")[1]
        for k, name in enumerate("qkv"):
            assert_close(f"{name}_proj.weight (D, D)",
                         ours[f"vision.transformer.blocks.1.attn.{name}_proj.weight"],
                         theirs["visual_encoder.blocks.1.attn.qkv.weight"][k * D:(k + 1) * D])

    @pytest.mark.parametrize("name, shape, message", [
        ("text_", None, "not the weights of a BLIP for"), ("itm_head", None, "unexpected temp"),
        ("vision_proj.weight", None, "no matrix image_projection.weight"),
        ("visual_encoder.patch_embed.proj.weight", (128, 3, 25, 1), r"\(128, 3, 25, 1\), which"),
        ("visual_encoder.patch_embed.proj.weight", (), r"\(\), which"),
        ("visual_encoder.pos_embed", (1, 11, 128), r"\(11, 128\), the model's \(10, 128\)"),
        ("visual_encoder.cls_token", (2, 1, 128), r"\(2, 1, 128\), which"),
        ("visual_encoder.blocks.0.attn.qkv.weight", (383, 128), r"k_proj.*|v_proj.*the model's"),
        ("visual_encoder.blocks", None, "vision_layers=0"), ("extra", (1,), "unexpected extra"),
        ("text_encoder.embeddings.word_embeddings.weight", (32, 100), "differ"),
        ("itm_head.weight", (3, 192), r"itm_head.weight is \(3, 192\)")], ids=str)
    def test_a_file_of_other_weights_is_one_line(self, tmp_path, name, shape, message):
        def change(theirs):
            for key in [key for key in theirs if key.startswith(name) and not shape]:
                del theirs[key]
            if shape is not None:
                theirs[name] = torch.ones(shape)
        path, _ = salesforce(tmp_path, change)
        with one_line(message):
            blip.from_pretrained(path)


class TestFromPretrained:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_hugging_face_folder(self, tmp_path, kind):
        ours = hugging_face(tmp_path, KINDS[kind])
        if kind == "itc,itm":
            ours["temp"].fill_(0.07)     # their files have none
        model, tokenizer = blip.from_pretrained(tmp_path)
        embed_dim = {} if kind == "itc,itm" else {"embed_dim": 17}
        assert model.config == BLIPConfig(**FIELDS | KINDS[kind] | embed_dim)
        check_weights(model, ours)
        assert tokenizer.batch(["a b"], 9).tolist() == [[3, 2, 5, 4]] and not model.training

    @pytest.mark.parametrize("kind", [PRETRAINED, *KINDS.values()], ids=str)
    def test_salesforces_file(self, tmp_path, kind):
        path, ours = salesforce(tmp_path, kind=kind)
        model, _ = blip.from_pretrained(path)
        embed_dim = 17 if "itc" in kind["losses"] else 256
        assert model.config == BLIPConfig(**WIDE | kind | {"embed_dim": embed_dim})
        check_weights(model, ours)

    def test_it_is_trained_further_and_keeps_its_pieces(self, tmp_path):
        salesforce(tmp_path, kind=KINDS["lm"])
        run = train.build("blip", train.Options(
            init=str(tmp_path / "model.pth"), data=listed(tmp_path / "data", 40), batch_size=6,
            precision="fp32", out=str(tmp_path / "run")), [], 0.0)
        assert run.config == BLIPConfig(**WIDE | KINDS["lm"] | {"embed_dim": 256})
        assert (run.batches[0][0]["ids"][:, 0] == 3).all(), "[CLS]"
        assert train.update(run, run.model, run.batches[0]).isfinite()
        train.save(run)
        model, tokenizer = blip.from_pretrained(tmp_path / "run")
        assert tokenizer.pieces == [*PIECES, "[DEC]", "[ENC]"] and len(tokenizer) == 32
        check_weights(model, run.model.state_dict())
        (tmp_path / "run/vocab.txt").write_text("[PAD]\n[PAD]\n")
        with one_line("vocab.txt: not BERT's vocabulary: "):
            blip.from_pretrained(tmp_path / "run")

    def test_a_run_folder(self, tmp_path):
        config = replace(PRESETS["tiny"], losses="lm")
        ours = randomize(make_model(config)).state_dict()
        tokenizer = write_run(tmp_path, "blip", config, ours)
        model, found = blip.from_pretrained(tmp_path)
        assert model.config == config and found.model == tokenizer.model
        check_weights(model, ours)
