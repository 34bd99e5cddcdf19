"""CLIP's published weights: their names, their sizes, what is refused, and a search with them."""
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import clip
from clip import CLIP, PRESETS, CLIPConfig
from common.pretrained import clip as pretrained
from common.pretrained.bpe import CLIP as STYLE
from tests.fuzz import damages, one_line
from tests.helpers import assert_close, command
from tests.parity import hugging_face_layout, openai_layout
from tests.pretrained.writers import (byte_vocabulary, check_weights, write_run, write_safetensors,
                                      write_vocabulary)

MERGES = [tuple(pair.split()) for pair in (
    "a b", "t h", "th e</w>", "r e", "re d</w>", "c ab", "d o", "do g</w>", "cab s</w>")]
CONFIG = {"model_type": "clip", "projection_dim": 17, "text_config": {
    "hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 523,
    "max_position_embeddings": 11, "eos_token_id": 2}, "vision_config": {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 15,
    "patch_size": 5}}
FIELDS = dict(image_size=15, patch_size=5, vision_width=24, vision_layers=2, vision_heads=3,
              text_width=28, text_layers=3, text_heads=2, context_length=11, vocab_size=523,
              eos_id=522, embed_dim=17, act="quick_gelu")


def part(tower, **changes):
    """Changes of CONFIG within the config of a tower, text or vision."""
    return {f"{tower}_config": CONFIG[f"{tower}_config"] | changes}


def hugging_face(folder, **changes):
    """Write a folder of random weights -> the weights under our names."""
    write_vocabulary(folder, byte_vocabulary(STYLE, MERGES), MERGES)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    model = CLIP(CLIPConfig(**FIELDS))
    ours = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", hugging_face_layout.clip(ours, FIELDS))
    return ours


def openai(folder, make=openai_layout.vit, **changes):
    """Write a published file in fp16 with its vocabulary -> (path, the model as it is stored)."""
    write_vocabulary(folder, byte_vocabulary(STYLE, MERGES), MERGES)
    model = make(**changes).half().float()
    openai_layout.save_script(model, folder / "model.pt")
    return folder / "model.pt", model


class TestRead:
    def test_a_vocabulary_that_is_too_large_is_told(self, tmp_path):
        path, _ = openai(tmp_path)
        write_vocabulary(tmp_path, byte_vocabulary(STYLE, MERGES) | {"more": 523}, MERGES)
        with one_line(f"^{tmp_path}: .*524 pieces.* 523"):
            pretrained.read(path)

    def test_a_smaller_vocabulary_has_the_end_whatever_the_config_says(self, tmp_path):
        hugging_face(tmp_path)
        write_vocabulary(tmp_path, byte_vocabulary(STYLE, MERGES[:-1]), MERGES[:-1])
        for path in (tmp_path, tmp_path / "model.safetensors"):
            assert pretrained.read(path, "gelu")[0] == FIELDS | {"act": "gelu", "eos_id": 521}

    def test_damaged_configs_are_a_model_or_one_line(self, tmp_path):
        hugging_face(tmp_path)
        for _ in damages(tmp_path / "config.json", 200):
            with one_line(maybe=True):
                pretrained.read(tmp_path)


class TestHuggingFace:
    def test_sizes_left_out_are_those_of_vit_b_32(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        fields, _ = pretrained.hugging_face({}, tmp_path / "config.json")
        assert CLIPConfig(**fields, eos_id=49407) == PRESETS["ViT-B/32"]

    @pytest.mark.parametrize("changes, act", [
        ({"text_config": None, "text_config_dict": CONFIG["text_config"]}, "quick_gelu"),    # old
        (part("text", hidden_act="gelu") | part("vision", hidden_act="gelu"), "gelu")], ids=str)
    def test_old_names_and_gelu_are_read(self, tmp_path, changes, act):
        hugging_face(tmp_path, **changes)
        assert pretrained.read(tmp_path)[0] == FIELDS | {"act": act}

    @pytest.mark.parametrize("change, message", [
        ({"model_type": "blip"}, "model_type is 'blip'"),
        ({"projection_dim": 19}, r"projection.weight is \(17, 24\), the model's \(19, 24\)"),
        (part("text", hidden_act="gelu"), "hidden_act is 'gelu' .*'quick_gelu'"),
        (part("text", hidden_act="relu") | part("vision", hidden_act="relu"), "'relu'"),
        (part("text", layer_norm_eps=1e-6), "text layer_norm_eps is 1e-06"),
        (part("text", num_hidden_layers=4), "missing text.transformer.blocks.3.attn"),
        (part("text", num_hidden_layers=2), "unexpected text_model.encoder.layers.2"),
        (part("vision", image_size=0), "vision_config: image_size is 0")], ids=str)
    def test_a_config_at_odds_with_the_weights_is_one_line(self, tmp_path, change, message):
        hugging_face(tmp_path, **change)
        with one_line(message):
            clip.from_pretrained(tmp_path)


class TestCheckPreprocessing:
    def read(self, folder, config):
        hugging_face(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
        return pretrained.read(folder)

    @pytest.mark.parametrize("config", [
        {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": 1}, {"size": 224}, {"resample": 2},
        {"size": {"shortest_edge": 224}}, {"crop_size": {"height": 15, "width": 16}}])
    def test_other_pictures_than_ours_are_refused(self, tmp_path, config):
        (name, value), = config.items()
        with one_line(re.escape(f"{name} is {value}")):
            self.read(tmp_path, config)

    def test_our_pictures_are_accepted(self, tmp_path):
        self.read(tmp_path, {
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "resample": 3,
            "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 15},
            "crop_size": {"height": 15, "width": 15}})


class TestOpenai:
    @pytest.mark.parametrize("c", [
        PRESETS["ViT-B/32"], PRESETS["ViT-L/14@336"],          # open_clip's H/14 has heads of 80:
        replace(PRESETS["ViT-L/14"], vision_width=1280, vision_heads=16, vision_layers=2)])
    def test_published_names_and_sizes(self, c):
        with torch.device("meta"):
            theirs = openai_layout.OpenAI(
                openai_layout.Vit(c.image_size, c.patch_size, c.vision_width, c.vision_layers,
                                  c.embed_dim), vocab_size=49408, context_length=77,
                width=c.text_width, layers=c.text_layers, embed_dim=c.embed_dim, eos_id=0)
            own = CLIP(c).state_dict()
        fields, weights = pretrained.openai(theirs.state_dict(), "here")
        assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in own.items()}
        assert CLIPConfig(**fields, act="quick_gelu", eos_id=49407) == c

    @pytest.mark.parametrize("name, shape, message", [
        ("visual.proj", None, "no matrix vision.pool.pos_em"),
        ("text_projection", None, "no matrix text_projection.weight"),
        ("text_projection", (191, 67), r"\(67, 191\), the model's \(67, 192\)"),
        ("transformer.resblocks", None, "text_layers=0"), ("extra", (1,), "unexpected extra"),
        ("visual.positional_embedding", (18, 128), r"\(18, 128\), the model's \(17, 128\)"),
        ("visual.positional_embedding", (128,), "no matrix"),
        ("visual.conv1.weight", (128, 3), r"visual.conv1.weight .*\(128, 3\)"),
        ("visual.conv1.weight", (128, 1, 1, 1), "vision.patch_embed.weight is"),
        ("token_embedding.weight", (523, 100), "width 100")], ids=str)
    def test_a_file_of_other_weights_is_one_line(self, tmp_path, name, shape, message):
        write_vocabulary(tmp_path, byte_vocabulary(STYLE, MERGES), MERGES)
        state = openai_layout.vit().state_dict()
        state = {n: w for n, w in state.items() if not n.startswith(name) or shape}
        torch.save(state | ({name: torch.ones(shape)} if shape else {}), tmp_path / "model.pt")
        with one_line(message):
            clip.from_pretrained(tmp_path / "model.pt")


class TestOpenClipAct:
    def test_a_published_archive_has_quick_gelu_if_no_config_says_otherwise(self, tmp_path, capsys):
        path, _ = openai(tmp_path)
        assert [pretrained.read(path, act)[0]["act"] for act in (None, "gelu")] == [
            "quick_gelu", "gelu"]
        for said, act in ((None, "gelu"), ({}, "gelu"), ({"quick_gelu": False}, "gelu"),
                          ({"quick_gelu": True}, "quick_gelu")):
            (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
            assert pretrained.open_clip_act(tmp_path, path) == act, said
        assert not capsys.readouterr().err

    def test_a_file_that_does_not_say_is_taken_for_quick_gelu_loudly(self, tmp_path, capsys):
        torch.save({}, tmp_path / "x.pt")
        assert pretrained.open_clip_act(tmp_path, tmp_path / "x.pt") == "quick_gelu"
        assert "x.pt: taken for weights with quick_gelu" in capsys.readouterr().err


class TestFromPretrained:
    def test_a_hugging_face_folder(self, tmp_path):
        ours = hugging_face(tmp_path)
        use = clip.from_pretrained(tmp_path)
        assert use.model.config == CLIPConfig(**FIELDS) and use.tokenizer.eos_id == 522
        check_weights(use.model, ours)

    @pytest.mark.parametrize("make, changes", [
        (openai_layout.vit, {}), (openai_layout.resnet, {}),
        (openai_layout.vit, {"embed_dim": 192}), (openai_layout.vit, {"embed_dim": 128}),
        (openai_layout.resnet, {"embed_dim": 192})],
        ids=["vit", "resnet", "square text", "square vision", "resnet, square text"])
    def test_openais_file(self, tmp_path, make, changes):
        path, model = openai(tmp_path, make, **changes)
        use = clip.from_pretrained(path).model
        size = {openai_layout.vit: 28, openai_layout.resnet: 64}[make]
        images = torch.randn(3, 3, size, size)
        texts = torch.randint(500, (3, 7)).fill_diagonal_(522)
        want = model(images, texts)
        assert_close("image features (B, E)", use.encode_image(images), want[0], 2e-5)
        assert_close("text features (B, E)", use.encode_text(texts), want[1], 2e-5)
        sizes = dict(image_size=28, patch_size=7, vision_width=128, vision_layers=2,
                     vision_heads=2) if make == openai_layout.vit else dict(
                     stages=(1, 2, 1, 3), image_size=64, vision_width=4, vision_heads=2)
        assert use.config == CLIPConfig(
            **sizes, text_width=192, text_layers=3, text_heads=3, context_length=11,
            vocab_size=523, eos_id=522, embed_dim=changes.get("embed_dim", 67), act="quick_gelu")
        assert {p.dtype for p in use.parameters()} == {torch.float32}
        assert_close("logit_scale", use.logit_scale, 1.7, 1e-3)

    def test_a_plain_state_dict_with_open_clips_prefixes(self, tmp_path, capsys):
        model = openai_layout.vit()
        write_vocabulary(tmp_path, byte_vocabulary(STYLE, MERGES), MERGES)
        text = ("transformer", "token_", "positional_embedding", "ln_final", "text_projection")
        state = {f"module.{'text.' * name.startswith(text)}{name}": value
                 for name, value in model.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": state}, tmp_path / "model.pt")
        texts = torch.randint(500, (3, 7)).fill_diagonal_(522)
        assert clip.from_pretrained(tmp_path / "model.pt", act="gelu").model.config.act == "gelu"
        assert not capsys.readouterr().err
        use = clip.from_pretrained(tmp_path / "model.pt").model
        assert_close("text features (B, E)", use.encode_text(texts),
                     model(torch.randn(3, 3, 28, 28), texts)[1], 2e-5)

    def test_a_run_folder(self, tmp_path):
        model = CLIP(replace(PRESETS["tiny"], act="quick_gelu"))
        tokenizer = write_run(tmp_path, "clip", model.config, model.state_dict())
        use = clip.from_pretrained(tmp_path)
        assert use.model.config == model.config and use.tokenizer.model == tokenizer.model
        check_weights(use.model, model.state_dict())

    def test_a_search_is_drawn_here_and_not_beside_the_weights(self, tmp_path, monkeypatch):
        for name in ("published", "pictures", "here"):
            (tmp_path / name).mkdir()
        hugging_face(tmp_path / "published")
        before = {*os.listdir(tmp_path / "published")}
        for i in range(7):
            Image.new("RGB", (21, 17), (30 * i, 9, 0)).save(tmp_path / f"pictures/{i}.png")
        monkeypatch.chdir(tmp_path / "here")
        status, out, err = command("clip.py", "../published", "search", "a dog", "../pictures")
        assert (status, len(out.splitlines())) == (0, 8) and "drawn in search.png" in out, err
        colours = {colour for _, colour in Image.open("search.png").getcolors(100_000)}
        assert colours >= {(30 * i, 9, 0) for i in range(7)}
        assert {*os.listdir(tmp_path / "published")} == before
