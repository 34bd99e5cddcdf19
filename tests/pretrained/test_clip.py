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
from common.data.images import MEAN, STD, center_crop, normalize_pixels, to_tensor
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

    def test_a_smaller_vocabulary_is_told_too(self, tmp_path):
        hugging_face(tmp_path)
        assert pretrained.read(tmp_path / "model.safetensors", "gelu")[0] == FIELDS | {
            "act": "gelu"}
        write_vocabulary(tmp_path, byte_vocabulary(STYLE, MERGES[:-1]), MERGES[:-1])
        with one_line(f"^{tmp_path}: .*522 pieces.* 523"):
            pretrained.read(tmp_path)

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
        ({"model_type": "blip"}, "model_type is 'blip'"), ({"model_type": "siglip"}, "'siglip'"),
        ({"frames": 8}, "config.json: frames is 8"), (part("vision", qk_norm=1), "qk_norm is 1"),
        (part("vision", num_channels=4), "vision_config: num_channels is 4, ours 3"),
        ({"projection_dim": 19}, r"projection.weight is \(17, 24\), the model's \(19, 24\)"),
        (part("text", hidden_act="gelu"), "hidden_act is 'gelu' .*'quick_gelu'"),
        (part("text", hidden_act="relu") | part("vision", hidden_act="relu"), "'relu'"),
        (part("text", layer_norm_eps=1e-6), "text_config: layer_norm_eps is 1e-06, ours 1e-05"),
        (part("text", num_hidden_layers=4), "missing text.transformer.blocks.3.attn"),
        (part("text", num_hidden_layers=2), "unexpected text_model.encoder.layers.2"),
        (part("vision", image_size=0), "vision_config: image_size is 0")], ids=str)
    def test_a_config_at_odds_with_the_weights_is_one_line(self, tmp_path, change, message):
        hugging_face(tmp_path, **change)
        with one_line(message):
            clip.from_pretrained(tmp_path)


class TestPreprocessing:
    def found(self, folder, config, name="preprocessor_config.json", **changes):
        (folder / name).write_text(json.dumps(config))
        return pretrained.preprocessing(folder / "x.pt", 15, **changes)

    @pytest.mark.parametrize("config", [
        {"size": 224}, {"resample": 1}, {"image_std": 1}, {"image_std": [0.5, 0, 0.5]},
        {"size": {"shortest_edge": 224}}, {"size": {"height": 15, "width": 15}},
        {"crop_size": {"height": 15, "width": 16}}, {"do_normalize": False}, {"do_resize": False},
        {"do_center_crop": False}, {"do_rescale": False}, {"rescale_factor": 1.0},
        {"do_pad": True}, {"do_flip": True}], ids=str)
    def test_other_steps_than_clips_are_refused(self, tmp_path, config):
        (name, value), = config.items()
        for file in ("preprocessor_config.json", "processor_config.json"):
            for head in (config, {"image_processor": config}):
                if head is not config or file.startswith("pre"):
                    with one_line(re.escape(f"{file}: {name} is {value}")):
                        self.found(tmp_path, head, file, square=pretrained.CROP)
                    (tmp_path / file).unlink()

    @pytest.mark.parametrize("config", [
        {"size": 17}, {"interpolation": "nearest"}, {"resize_mode": "squash"}, {"mean": 0.5},
        {"std": [0, 1, 1]}, {"mode": "L"}, {"fill_color": 255}, {"rotate": 90}], ids=str)
    def test_other_steps_of_open_clip_are_refused(self, tmp_path, config):
        (name, value), = config.items()
        name = {"mean": "image_mean", "std": "image_std"}.get(name, name)
        with one_line(re.escape(f"open_clip_config.json: {name} is {value!r}")):
            self.found(tmp_path, {"preprocess_cfg": config}, "open_clip_config.json",
                       square=pretrained.CROP)

    @pytest.mark.parametrize("change", [{"image_mean": [0.5, 0.5, 0.5]}, {"resample": 2},
                                        {"image_std": [0.5, 0.5, 0.5]}], ids=str)
    def test_means_deviations_and_bilinear_pictures_are_honoured_of_clip_alone(self, tmp_path,
                                                                               change):
        assert pretrained.preprocessing(tmp_path, 15) == {"mean": MEAN, "std": STD, "resample": 3}
        (name, value), = change.items()
        want = {"mean": MEAN, "std": STD, "resample": 3} | {
            name.removeprefix("image_"): tuple(value) if name != "resample" else value}
        assert self.found(tmp_path, change, square=pretrained.CROP) == want
        with one_line(re.escape(f"{name} is {value}, ours")):
            self.found(tmp_path, change)
        other = {name.removeprefix("image_"): value, "size": [15, 15]} if name != "resample" else {
            "interpolation": "bilinear", "size": 15, "resize_mode": "shortest"}
        (tmp_path / "preprocessor_config.json").unlink()
        assert self.found(tmp_path, {"preprocess_cfg": other}, "open_clip_config.json",
                          square=pretrained.CROP) == want

    def test_our_pictures_and_older_words_for_them_are_accepted(self, tmp_path):
        sizes = ({"size": {"shortest_edge": 15}, "crop_size": {"height": 15, "width": 15}},
                 {"size": 15, "crop_size": 15, "feature_extractor_type": "CLIPFeatureExtractor"})
        for size in sizes:
            self.found(tmp_path, size | {
                "image_mean": [0.48145466, 0.4578275, 0.40821073], "do_center_crop": True,
                "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                "do_normalize": True, "do_resize": True, "rescale_factor": 0.00392156862745098},
                square=pretrained.CROP)
        self.found(tmp_path, {"size": {"height": 15, "width": 15}, "do_pad": True})

    @pytest.mark.parametrize("name, config", [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "size": {"shortest_edge": 15},
                                      "do_normalize": True, "resample": 2}),
        ("open_clip_config.json", {"model_cfg": {"text_cfg": {"heads": 3}, "vision_cfg": {}},
                                   "preprocess_cfg": {"std": [1, 1, 1], "size": [15, 15],
                                                      "interpolation": "bicubic"}})])
    def test_damaged_files_are_pictures_or_one_line(self, tmp_path, name, config):
        self.found(tmp_path, config, name, square=pretrained.CROP)
        for _ in damages(tmp_path / name, 300):
            with one_line(maybe=True):
                found = pretrained.preprocessing(tmp_path, 15, pretrained.CROP)
                assert len(found["mean"]) == len(found["std"]) == 3 and found["resample"] in (2, 3)
            with one_line(maybe=True):
                pretrained.open_clip(tmp_path / "x.pt", {"text_heads": 3, "vision_width": 192})

    def test_a_retriever_shows_pictures_as_the_folder_says(self, tmp_path):
        hugging_face(tmp_path)
        picture = Image.new("RGB", (15, 15), (51, 102, 204))
        self.found(tmp_path, {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.25, 0.1]},
                   square=pretrained.CROP)
        pixels = clip.from_pretrained(tmp_path).pixels([picture])
        assert_close("pixels", pixels[0, :, 3, 4], [0.0, 0.4, 4.0], 1e-5)
        noise = Image.effect_noise((40, 31), 90).convert("RGB")
        self.found(tmp_path, {"resample": 2}, square=pretrained.CROP)
        want = normalize_pixels(to_tensor([center_crop(noise, 15, Image.Resampling.BILINEAR)]))
        assert_close("pixels", clip.from_pretrained(tmp_path).pixels([noise]), want)


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


class TestOpenClip:
    def said(self, folder, config, make=openai_layout.vit):
        path, _ = openai(folder, make)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return pretrained.read(path)[0]

    def test_a_published_archive_has_quick_gelu_if_no_config_says_otherwise(self, tmp_path, capsys):
        path, _ = openai(tmp_path)
        assert [pretrained.read(path, act)[0]["act"] for act in (None, "gelu")] == [
            "quick_gelu", "gelu"]
        for config, act in ((None, "gelu"), ({}, "gelu"), ({"quick_gelu": False}, "gelu"),
                            ({"quick_gelu": True}, "quick_gelu")):
            assert self.said(tmp_path, config)["act"] == act, config
        assert not capsys.readouterr().err

    def test_a_file_that_does_not_say_is_taken_for_quick_gelu_loudly(self, tmp_path, capsys):
        torch.save({}, tmp_path / "x.pt")
        assert pretrained.open_clip(tmp_path / "x.pt", {}) == {"act": "quick_gelu"}
        assert "x.pt: taken for weights with quick_gelu" in capsys.readouterr().err

    def test_heads_are_the_configs(self, tmp_path):
        found = self.said(tmp_path, {"vision_cfg": {"head_width": 32, "width": 128, "layers": 2},
                                     "text_cfg": {"heads": 6, "vocab_size": 523}})
        assert (found["vision_heads"], found["text_heads"]) == (4, 6)
        assert self.said(tmp_path, {"text_cfg": {"heads": 2}}, openai_layout.resnet)[
            "vision_heads"] == 2

    @pytest.mark.parametrize("part, name, value", [
        ("vision_cfg", "pool_type", "avg"), ("vision_cfg", "mlp_ratio", 4.9231),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}), ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "attentional_pool", True), ("vision_cfg", "ls_init_value", 1e-5),
        ("vision_cfg", "timm_model_name", "vit_base_patch16_siglip_224"),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"), ("vision_cfg", "head_width", 0),
        ("text_cfg", "pool_type", "last"), ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "hf_model_name", "roberta-base"), ("text_cfg", "hf_tokenizer_name", "x"),
        ("text_cfg", "norm_kwargs", {"eps": 1e-6}), ("text_cfg", "embed_cls", True),
        (None, "multimodal_cfg", {"layers": 12}), (None, "init_logit_bias", -10)])
    def test_what_ours_cannot_be_is_refused_by_name(self, tmp_path, part, name, value):
        with one_line(re.escape(f"{name} is {value!r}")):
            self.said(tmp_path, {part: {name: value}} if part else {name: value})

    @pytest.mark.parametrize("name, family", [
        ("visual.trunk.blocks.0.norm1.weight", "SigLIP"), ("visual.blocks.0.norm1", "EVA-CLIP"),
        ("visual.attn_pool.query", "CoCa"),
        ("text.transformer.embeddings.x", "Hugging Face text")])
    def test_another_family_is_named(self, tmp_path, name, family):
        torch.save({name: torch.ones(1)}, tmp_path / "x.pt")
        (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"init_logit_bias": -10}}')
        with one_line(f"x.pt: .*{family}"):
            pretrained.read(tmp_path / "x.pt")

    def test_a_folder_of_open_clips_files_alone_says_pass_the_file(self, tmp_path):
        for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
            (tmp_path / name).write_text("{}")
        with one_line("pass the file .*/open_clip_pytorch_model.bin$"):
            clip.from_pretrained(tmp_path)


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
        assert clip.from_pretrained(tmp_path, "gelu").model.config.act == "gelu"
        with one_line("act=relu is not one of gelu, quick_gelu"):
            clip.from_pretrained(tmp_path, "relu")
        check_weights(use.model, model.state_dict())

    @pytest.mark.parametrize("words", [("classify", "x.png", "a dog"), ("search", "a dog", "x")])
    def test_the_activation_can_be_said_on_the_command_line(self, monkeypatch, words):
        def stop(path, act=None):
            raise ValueError(f"{path} with {act}")
        monkeypatch.setattr(clip, "from_pretrained", stop)
        for more, act in (((), None), (("--act", "gelu"), "gelu")):
            monkeypatch.setattr("sys.argv", ["clip.py", "model.bin", *words, *more])
            with one_line(f"model.bin with {act}"):
                clip.main()

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
