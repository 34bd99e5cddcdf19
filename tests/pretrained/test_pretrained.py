"""Published weights: the format, the folders, the tables of names, and files that lie."""
import gzip
import itertools
import json
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
from clip import CLIP, PRESETS, CLIPConfig
from common.pretrained.bpe import BYTES
from common.pretrained.bpe import CLIP as STYLE
from common.pretrained import clip as pretrained
from common.pretrained import files, names, safetensors
from common.pretrained.names import Table, expand, plan, translate
from tests.fuzz import mutations, one_line
from tests.parity import openai_layout

GOLDEN = Path(__file__).parents[1] / "goldens"


def write(path, header, data=b"", length=None):
    """A safetensors file from its parts; header a dict or bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    return path


CODES = {kind: code for code, kind in safetensors.DTYPES.items()}


def write_tensors(path, weights):
    """A safetensors file of a dict of tensors."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in weights.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return write(path, header, data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class TestSafetensors:
    def test_every_type_comes_back(self, tmp_path):
        torch.manual_seed(0)
        values = {code: (torch.randn(3, 5) * 9).to(kind)
                  for code, kind in safetensors.DTYPES.items()}
        values |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7)}
        found = safetensors.read(write_tensors(tmp_path / "x.safetensors", values))
        assert list(found) == list(values)
        for name, value in values.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)

    def test_tensors_at_odd_places_are_read(self, tmp_path):
        header = {"b": entry("BOOL", [3], [0, 3]), "f": entry("F64", [1], [3, 11])}
        path = write(tmp_path / "x", header, b"\0\1\0" + struct.pack("<d", -2.5))
        found = safetensors.read(path)
        assert found["b"].tolist() == [False, True, False] and found["f"].tolist() == [-2.5]

    def test_order_in_the_header_is_free_and_a_file_without_tensors_is_empty(self, tmp_path):
        path = write(tmp_path / "x", {"b": entry("U8", [2], [1, 3]), "a": entry("U8", [1], [0, 1])},
                     b"\5\6\7")
        assert {k: v.tolist() for k, v in safetensors.read(path).items()} == {"a": [5], "b": [6, 7]}
        assert safetensors.read(write(tmp_path / "y", {})) == {}

    def test_writing_to_a_tensor_leaves_the_file_as_it_is(self, tmp_path):
        path = write_tensors(tmp_path / "x", {"a": torch.ones(4)})
        safetensors.read(path)["a"].zero_()
        assert safetensors.read(path)["a"].tolist() == [1] * 4

    @pytest.mark.parametrize("header, message", [
        ({"a": entry(offsets=[0, 20])},
         "'a' is {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 20]}, which 24 bytes do"),
        ({"a": entry(shape=[2, 4])}, "which 24 bytes do not hold: cut off, or"),
        ({"a": entry(offsets=[4, 28])}, "which 24 bytes do not hold"),
        ({"a": entry(shape=[3, 3], offsets=[0, 36])}, "which 24 bytes do not hold"),
        ({"a": entry(offsets=[24, 0])}, "which 24 bytes do not hold"),
        ({"a": entry(offsets=[0, 24, 48])}, "not a shape, two data_offsets"),
        ({"a": entry(offsets=[0, 24.0])}, "not a shape, two data_offsets"),
        ({"a": entry(shape=[-2, -3])}, "not a shape, two data_offsets"),
        ({"a": entry(shape=[2, "3"])}, "not a shape, two data_offsets"),
        ({"a": entry(shape=[2 ** 62, 2 ** 62])}, "not a shape, two data_offsets"),
        ({"a": entry(dtype="F8_E4M3")}, "two data_offsets and one of F64, F32"),
        ({"a": entry(dtype=["F32"])}, "two data_offsets and one of F64, F32"),
        ({"a": [1]}, "'a' is [1], which"),
        ({"a\nb": entry(offsets=[0, 9])}, r"'a\nb'"),
        (b"[]", "a JSON object was expected, not []"), (b"{", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"), (b"[" * 100_000, "not readable JSON"),
    ], ids=lambda x: x[:40] if isinstance(x, str) else "")
    def test_a_header_that_claims_what_is_not_there_is_one_line(self, tmp_path, header, message):
        path = write(tmp_path / "x.safetensors", header, bytes(24))
        with one_line(f"^{re.escape(str(path))}.*{re.escape(message)}"):
            safetensors.read(path)

    @pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 2 ** 63) + b"{}",
                                      struct.pack("<Q", 3) + b"{}"])
    def test_a_length_beyond_the_file_is_told(self, tmp_path, data):
        (tmp_path / "x").write_bytes(data)
        with one_line("not a safetensors file, or cut off"):
            safetensors.read(tmp_path / "x")

    def test_an_absurdly_long_header_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(safetensors, "MOST_BYTES", 10)
        with one_line("not a safetensors file"):
            safetensors.read(write(tmp_path / "x", {"a": entry()}, bytes(24)))

    def test_no_file_and_a_folder_are_told(self, tmp_path):
        for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "a folder, not a")):
            with one_line(message):
                safetensors.read(path)

    def test_mutations_of_a_file_are_tensors_or_one_line(self, tmp_path):
        path = write_tensors(tmp_path / "x", {"a": torch.ones(2, 3), "b": torch.zeros(5).half()})
        whole = path.read_bytes()
        for data in mutations(whole, 300):
            path.write_bytes(data)
            with one_line(maybe=True):
                safetensors.read(path)
        for header in mutations(whole[8:whole.rindex(b"}") + 1], 300, seed=1):
            write(path, header, whole[whole.rindex(b"}") + 1:])
            with one_line(maybe=True):
                safetensors.read(path)


class Harm:
    """A pickle that would run a command."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def index(folder, where, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


class TestFiles:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int64)}

    def same(self, found):
        assert set(found) == set(self.weights)
        assert all(torch.equal(found[name], value) for name, value in self.weights.items())

    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3},
                                      lambda s: {"model_state_dict": s, "epoch": 1},
                                      lambda s: {"model": s},
                                      lambda s: {"module." + k: v for k, v in s.items()}])
    def test_pickled_tensors_are_found_plain_and_wrapped(self, tmp_path, wrap):
        torch.save(wrap(self.weights), tmp_path / "pytorch_model.bin")
        self.same(files.read_weights(tmp_path))
        self.same(files.read_weights(tmp_path / "pytorch_model.bin"))

    def test_safetensors_come_before_a_pickle(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
        write_tensors(tmp_path / "model.safetensors", self.weights)
        self.same(files.read_weights(tmp_path))

    def test_shards_are_put_together(self, tmp_path):
        for name, value in self.weights.items():
            write_tensors(tmp_path / f"{name}.safetensors", {name: value})
            torch.save({name: value}, tmp_path / f"{name}.bin")
        index(tmp_path, {"a": "a.bin", "b": "b.bin"}, "pytorch_model.bin.index.json")
        self.same(files.read_weights(tmp_path))
        (tmp_path / "a.bin").unlink()
        index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
        self.same(files.read_weights(tmp_path))

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b",
                                       "a\nb"])
    def test_a_shard_outside_of_the_folder_is_refused(self, tmp_path, shard):
        (tmp_path / "in").mkdir()
        write_tensors(tmp_path / "x.safetensors", self.weights)
        index(tmp_path / "in", {"a": shard})
        with one_line("is not in the folder of its index, refused"):
            files.read_weights(tmp_path / "in")

    @pytest.mark.parametrize("where, message", [
        ({"a": "x.safetensors", "b": "none.safetensors"}, "none.safetensors: no such file"),
        ({"a": "none.bin"}, "none.bin: no such file"),
        ({"a": 3}, "no weight_map"), ([], "no weight_map"), (None, "no weight_map")])
    def test_an_index_that_lies_is_told(self, tmp_path, where, message):
        write_tensors(tmp_path / "x.safetensors", self.weights)
        index(tmp_path, where)
        with one_line(message):
            files.read_weights(tmp_path)

    def test_mutations_of_an_index_are_weights_or_one_line(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", self.weights)
        index(tmp_path, dict.fromkeys(self.weights, "x.safetensors"))
        path = tmp_path / "model.safetensors.index.json"
        for data in mutations(path.read_bytes(), 300):
            path.write_bytes(data)
            with one_line(maybe=True):
                files.read_weights(tmp_path)

    def test_nothing_found_names_what_was_looked_for(self, tmp_path):
        with one_line("no weights here; looked for model.safetensors, "
                      "model.safetensors.index.json, pytorch_model.bin, "
                      "pytorch_model.bin.index.json"):
            files.read_weights(tmp_path)
        with one_line("none.pt: no such file"):
            files.read_weights(tmp_path / "none.pt")

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path):
        torch.save({"a": Harm(tmp_path / "harm")}, tmp_path / "x.pt")
        with one_line("holds more than tensors and numbers, refused"):
            files.read_weights(tmp_path / "x.pt")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("state, message", [
        ({"a": 3}, "'a' is a int, not a tensor"), ([1], "no tensors in it"),
        ({}, "no tensors in it"), ({1: torch.ones(2)}, "1 is a Tensor")])
    def test_anything_but_tensors_is_told(self, tmp_path, state, message):
        torch.save(state, tmp_path / "x.pt")
        with one_line(message):
            files.read_weights(tmp_path / "x.pt")

    @pytest.mark.parametrize("cut", [0, 1, 100, -30])
    def test_a_cut_file_is_told(self, tmp_path, cut):
        torch.save(self.weights, tmp_path / "x.pt")
        (tmp_path / "y.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:cut])
        with one_line("y.pt: not a file of tensors, or cut off"):
            files.read_weights(tmp_path / "y.pt")

    def test_a_damaged_torchscript_archive_is_told(self, tmp_path):
        import zipfile
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/constants.pkl", b"nothing")
        with one_line("not a TorchScript archive that can be read"):
            files.read_weights(tmp_path / "x.pt")

    def test_published_is_a_file_or_a_folder_with_a_model_type(self, tmp_path):
        assert not files.is_published(tmp_path) and not files.is_published(tmp_path / "none")
        (tmp_path / "config.json").write_text('{"model": "clip", "config": {}}')
        assert not files.is_published(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        assert files.is_published(tmp_path) and files.is_published(tmp_path / "config.json")


class TestNames:
    gpt2 = Table((
        ("wte.weight", "token_embed.weight"),
        ("h.{layers}.ln_{1,2}.{weight,bias}", "blocks.{layers}.{attn,mlp}_norm.{weight,bias}"),
        ("h.{layers}.attn.c_attn.weight", "blocks.{layers}.attn.{q,k,v}_proj.weight",
         names.transposed_thirds),
        ("h.{layers}.attn.c_attn.bias", "blocks.{layers}.attn.{q,k,v}_proj.bias", names.thirds),
        ("h.{layers}.attn.c_proj.weight", "blocks.{layers}.attn.out_proj.weight", names.transpose),
    ), ignored=("*.attn.bias", "lm_head.weight"))

    def weights(self, D=5, layers=2):
        shapes = {"wte.weight": (11, D)}
        for i in range(layers):
            shapes |= {f"h.{i}.ln_{n}.{k}": (D,) for n in (1, 2) for k in ("weight", "bias")}
            shapes |= {f"h.{i}.attn.c_attn.weight": (D, 3 * D), f"h.{i}.attn.c_attn.bias": (3 * D,),
                       f"h.{i}.attn.c_proj.weight": (D, D), f"h.{i}.attn.bias": (1, 1)}
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    def test_braces_are_expanded_in_order(self):
        assert expand("a.{n}.{x,y}", {"n": 2}) == ["a.0.x", "a.0.y", "a.1.x", "a.1.y"]
        assert expand("plain", {}) == ["plain"] and expand("a.{n}", {"n": 0}) == []

    def test_fused_and_transposed_matrices_are_taken_apart(self):
        given, x = self.weights(), torch.randn(3, 5)
        ours = translate(given, self.gpt2, {"layers": 2}, "here")
        assert len(ours) == 1 + 2 * (4 + 3 + 3 + 1)
        for i in range(2):
            fused = x @ given[f"h.{i}.attn.c_attn.weight"] + given[f"h.{i}.attn.c_attn.bias"]
            for name, want in zip("qkv", fused.split(5, dim=1)):
                got = torch.nn.functional.linear(x, ours[f"blocks.{i}.attn.{name}_proj.weight"],
                                                 ours[f"blocks.{i}.attn.{name}_proj.bias"])
                torch.testing.assert_close(got, want)
            torch.testing.assert_close(x @ ours[f"blocks.{i}.attn.out_proj.weight"].T,
                                       x @ given[f"h.{i}.attn.c_proj.weight"])
            assert ours[f"blocks.{i}.mlp_norm.bias"] is given[f"h.{i}.ln_2.bias"]

    def test_names_without_a_row_are_left_for_load_weights_on_one_line(self):
        given = self.weights() | {"h.2.ln_1.bias": torch.ones(5), "odd\nname": torch.ones(1)}
        del given["h.1.ln_2.bias"]
        ours = translate(given, self.gpt2, {"layers": 2}, "here")
        assert list(ours)[-2:] == ["h.2.ln_1.bias", "odd?name"]
        assert "blocks.1.mlp_norm.weight" in ours and "blocks.1.mlp_norm.bias" not in ours
        assert not any("attn.bias" in name for name in ours)              # ignored

    @pytest.mark.parametrize("name, shape", [
        ("h.0.attn.c_proj.weight", (5,)), ("h.1.attn.c_attn.weight", (15,)),
        ("h.1.attn.c_attn.bias", ())])
    def test_a_tensor_of_too_few_dimensions_is_named_with_its_shape(self, name, shape):
        with one_line(rf"^here: {name} has the shape {re.escape(str(shape))}, which its layout"):
            translate(self.weights() | {name: torch.zeros(shape)}, self.gpt2, {"layers": 2}, "here")

    @pytest.mark.parametrize("name, shape", [
        ("h.0.attn.c_attn.bias", (7,)), ("h.1.attn.c_attn.weight", (5, 7)),
        ("h.1.attn.c_attn.bias", (2,))])
    def test_parts_that_are_not_equal_have_another_shape_or_are_missing(self, name, shape):
        whole = translate(self.weights(), self.gpt2, {"layers": 2}, "here")
        ours = translate(self.weights() | {name: torch.zeros(shape)}, self.gpt2, {"layers": 2},
                         "here")
        assert any(n not in ours or ours[n].shape != w.shape for n, w in whole.items())

    def test_layers_are_counted_from_the_names(self):
        assert names.count(self.weights(layers=3), r"h\.(\d+)\.") == 3
        assert names.count({}, r"h\.(\d+)\.") == 0


def vocabulary(folder):
    """A vocabulary of 523 pieces whose last two are CLIP's special ones, as vocab and merges."""
    pieces = [c + end for end in ("", STYLE.end) for c in BYTES.values()]
    merges = [("a", "b"), ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("c", "ab"),
              ("d", "o"), ("do", "g</w>"), ("cab", "s</w>")]
    pieces += ["".join(m) for m in merges] + [STYLE.bos, STYLE.eos]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    assert len(pieces) == 523


def config(**changes):
    return {"model_type": "clip", "projection_dim": 17, "text_config": {
        "hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 523,
        "max_position_embeddings": 11, "eos_token_id": 2}, "vision_config": {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 15,
        "patch_size": 5}} | changes


OURS = CLIPConfig(image_size=15, patch_size=5, vision_width=24, vision_layers=2, vision_heads=3,
                  text_width=28, text_layers=3, text_heads=2, context_length=11, vocab_size=523,
                  eos_id=522, embed_dim=17, act="quick_gelu")


def text_config(**changes):
    return {"text_config": config()["text_config"] | changes}


def vision_config(**changes):
    return {"vision_config": config()["vision_config"] | changes}


def folder(path, **changes):
    """A Hugging Face folder of random weights -> the weights under their names."""
    torch.manual_seed(0)
    vocabulary(path)
    (path / "config.json").write_text(json.dumps(config(**changes)))
    own = {name: torch.randn(value.shape) for name, value in CLIP(OURS).state_dict().items()}
    own["vision.patch_embed.weight"] = torch.randn(24, 3, 5, 5)
    theirs = {name: own[ours[0]] for name, (ours, _) in
              plan(pretrained.HUGGING_FACE, {"text": 3, "vision": 2}).items()}
    write_tensors(path / "model.safetensors",
                  theirs | {"text_model.embeddings.position_ids": torch.arange(11)[None]})
    return theirs


class TestClipTables:
    def test_the_published_files_have_302_and_398_tensors(self):
        counts = {"text": 12, "vision": 12}
        assert len(plan(pretrained.OPENAI["vit"], counts)) == 302
        assert len(plan(pretrained.HUGGING_FACE, counts)) == 398

    @pytest.mark.parametrize("name, layout", [("ViT-B/32", "vit"), ("ViT-B/32", None),
                                              ("RN50", "resnet"), ("RN50x4", "resnet")])
    def test_each_table_gives_exactly_the_models_names(self, name, layout):
        c = PRESETS[name]
        counts = {"text": c.text_layers, "vision": c.vision_layers}
        counts |= dict(zip(pretrained.STAGES, c.stages))
        table = pretrained.OPENAI[layout] if layout else pretrained.HUGGING_FACE
        with torch.device("meta"):
            own = CLIP(c).state_dict()
        made = [ours for targets, _ in plan(table, counts).values() for ours in targets]
        assert sorted(made) == sorted(own)


class TestHuggingFace:
    def test_a_folder_gives_the_config_the_weights_and_the_vocabulary(self, tmp_path):
        theirs = folder(tmp_path)
        use = clip.from_pretrained(tmp_path)
        assert use.model.config == OURS and use.model.text.eos_id == use.tokenizer.eos_id == 522
        assert not use.model.training
        own = use.model.state_dict()
        assert torch.equal(own["vision.patch_embed.weight"],
                           theirs["vision_model.embeddings.patch_embedding.weight"].flatten(1))
        assert torch.equal(own["text.transformer.blocks.2.attn.k_proj.weight"],
                           theirs["text_model.encoder.layers.2.self_attn.k_proj.weight"])
        for n, norm in ((1, "attn_norm"), (2, "mlp_norm")):
            assert torch.equal(own[f"vision.transformer.blocks.1.{norm}.bias"],
                               theirs[f"vision_model.encoder.layers.1.layer_norm{n}.bias"])
        assert use.classify(Image.new("RGB", (20, 17), "red"), ["the red dog", "cabs"])

    def test_defaults_that_a_config_leaves_out_are_filled_in(self, tmp_path):
        said = config()
        said["text_config"].pop("num_attention_heads")
        folder(tmp_path, text_config=said["text_config"])
        with one_line("width 28 does not divide into 8 heads"):
            clip.from_pretrained(tmp_path)

    def test_old_configs_with_two_dicts_of_one_tower_are_read(self, tmp_path):
        said = config()
        folder(tmp_path, text_config=None, text_config_dict=said["text_config"])
        assert clip.from_pretrained(tmp_path).model.config == OURS

    def test_gelu_is_taken_from_the_config(self, tmp_path):
        said = config()
        for part in ("text_config", "vision_config"):
            said[part]["hidden_act"] = "gelu"
        folder(tmp_path, **said)
        assert clip.from_pretrained(tmp_path).model.config.act == "gelu"

    @pytest.mark.parametrize("change, message", [
        ({"model_type": "blip"}, "model_type is 'blip', not 'clip'"),
        ({"projection_dim": 19}, r"projection.weight is \(17, 24\), the model's \(19, 24\)"),
        ({"projection_dim": "x"}, "projection_dim is 'x', not a whole number"),
        ({"text_config": [1]}, r"text_config is \[1\], not an object"),
        (text_config(hidden_act="gelu"), "hidden_act is 'gelu' for"),
        (text_config(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
        (text_config(num_hidden_layers=4), "missing text.transformer.blocks.3.attn"),
        (text_config(num_hidden_layers=2), "unexpected text_model.encoder.layers.2"),
        (text_config(vocab_size=524), r"embed.weight is \(523, 28\), the model's \(524, 28\)"),
        (text_config(num_hidden_layers=10 ** 9), "num_hidden_layers is 1000000000, not a whole"),
        (vision_config(image_size=0), "vision_config: image_size is 0, not a whole number"),
        (vision_config(patch_size=3), r"patch_embed.weight is \(24, 75\), the model's \(24, 27\)"),
        (vision_config(num_attention_heads=5), "width 24 does not divide into 5 heads"),
    ], ids=lambda x: x[:30] if isinstance(x, str) else "")
    def test_a_config_at_odds_with_the_weights_is_one_line(self, tmp_path, change, message):
        folder(tmp_path, **change)
        with one_line(message):
            clip.from_pretrained(tmp_path)

    @pytest.mark.parametrize("said, message", [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"), ({"image_std": 1}, "image_std is"),
        ({"size": 224}, "size is 224, ours 15"), ({"resample": 2}, "resample is 2"),
        ({"size": {"shortest_edge": 224}}, "size is {'shortest_edge': 224}"),
        ({"crop_size": {"height": 15, "width": 16}}, "crop_size is")])
    def test_other_pictures_than_ours_are_refused(self, tmp_path, said, message):
        folder(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        with one_line(re.escape(message)):
            clip.from_pretrained(tmp_path)

    def test_our_pictures_are_accepted(self, tmp_path):
        folder(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "resample": 3,
            "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 15},
            "crop_size": {"height": 15, "width": 15}}))
        assert clip.from_pretrained(tmp_path)

    def test_a_folder_without_a_vocabulary_says_what_to_put_there(self, tmp_path):
        folder(tmp_path)
        (tmp_path / "merges.txt").unlink()
        with one_line("no vocabulary; put vocab.json and merges.txt, or tokenizer.json, or "
                      "bpe_simple_vocab_16e6.txt.gz there"):
            clip.from_pretrained(tmp_path)

    def test_a_vocabulary_larger_than_the_table_is_told(self, tmp_path):
        folder(tmp_path)
        vocab = json.loads((tmp_path / "vocab.json").read_text())
        (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"more": 523}))
        with one_line("a vocabulary of 524 pieces, but the weights have rows for 523"):
            clip.from_pretrained(tmp_path)

    def test_mutations_of_the_config_are_a_model_or_one_line(self, tmp_path):
        folder(tmp_path)
        path = tmp_path / "config.json"
        for data in mutations(path.read_bytes(), 200):
            path.write_bytes(data)
            with one_line(maybe=True):
                pretrained.read(tmp_path)


def published(path, make=openai_layout.vit, half=True, **changes):
    """An OpenAI file with its vocabulary beside it -> (path, the model as it is stored)."""
    vocabulary(path)
    model = make(**changes)
    if half:
        for value in model.state_dict().values():
            value.copy_(value.half() if value.is_floating_point() else value)
    openai_layout.save_script(model, path / "model.pt", half)
    return path / "model.pt", model


def ids():
    """Ids int64 (3, 7) with an end in each row."""
    out = torch.randint(500, (3, 7), generator=torch.Generator().manual_seed(1))
    for row, end in zip(out, (2, 4, 6)):
        row[end] = 522
    return out


class TestOpenAI:
    @pytest.mark.parametrize("make, changes", [
        (openai_layout.vit, {}), (openai_layout.resnet, {}),
        (openai_layout.vit, {"embed_dim": 192}), (openai_layout.vit, {"embed_dim": 128}),
        (openai_layout.resnet, {"embed_dim": 192})],
        ids=["vit", "resnet", "square text", "square vision", "resnet, square text"])
    def test_features_equal_those_of_the_file(self, tmp_path, make, changes):
        path, model = published(tmp_path, make, **changes)
        use = clip.from_pretrained(path).model
        torch.manual_seed(2)
        size = use.config.image_size
        pictures = torch.randn(3, 3, size, size)
        with torch.no_grad():
            want = model(pictures, ids())
            got = use.encode_image(pictures), use.encode_text(ids())
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert use.text.token_embed.weight.dtype == torch.float32
        assert use.logit_scale.item() == pytest.approx(1.7, abs=1e-3)

    def test_all_sizes_are_read_off_the_shapes(self, tmp_path):
        found = clip.from_pretrained(published(tmp_path)[0]).model.config
        assert found == CLIPConfig(
            image_size=28, patch_size=7, vision_width=128, vision_layers=2, vision_heads=2,
            text_width=192, text_layers=3, text_heads=3, context_length=11, vocab_size=523,
            eos_id=522, embed_dim=67, act="quick_gelu")

    def test_a_resnet_has_stages_and_heads_of_its_pool(self, tmp_path):
        found = clip.from_pretrained(published(tmp_path, openai_layout.resnet)[0]).model.config
        assert found.stages == (1, 2, 1, 3) and found.embed_dim == 67
        assert (found.vision_width, found.vision_heads, found.image_size) == (4, 2, 64)

    def test_published_presets_follow_from_their_own_shapes(self):
        huge = replace(PRESETS["ViT-L/14"], vision_width=1280, vision_heads=16, vision_layers=2)
        for c in (PRESETS["ViT-B/32"], PRESETS["ViT-L/14@336"], PRESETS["RN50"], huge):
            counts = {"text": c.text_layers, "vision": c.vision_layers}
            counts |= dict(zip(pretrained.STAGES, c.stages))
            with torch.device("meta"):
                own = CLIP(c).state_dict()
            back = {names.thirds: torch.cat, names.transpose: lambda parts: parts[0].T,
                    names.same: lambda parts: parts[0], names.flatten_patches:
                    lambda parts: parts[0].view(-1, 3, c.patch_size, c.patch_size)}
            table = pretrained.OPENAI["resnet" if c.stages else "vit"]
            theirs = {name: back[change]([own[ours] for ours in targets])
                      for name, (targets, change) in plan(table, counts).items()}
            fields, weights = pretrained.openai(theirs, "here")
            assert CLIPConfig(**fields, act="quick_gelu", eos_id=49407) == (
                replace(c, patch_size=8, vision_layers=4) if c.stages else c)
            assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in own.items()}

    def test_a_plain_state_dict_and_open_clips_prefixes_are_the_same(self, tmp_path, capsys):
        model = openai_layout.vit()
        vocabulary(tmp_path)
        text = ("transformer", "token_", "positional_embedding", "ln_final", "text_projection")
        state = {f"module.{'text.' * name.startswith(text)}{name}": value
                 for name, value in model.state_dict().items()}
        assert sum(".text." in name for name in state) > 30
        torch.save({"epoch": 1, "state_dict": state}, tmp_path / "model.pt")
        use = clip.from_pretrained(tmp_path / "model.pt").model
        want = model(torch.randn(3, 3, 28, 28), ids())[1]
        torch.testing.assert_close(use.encode_text(ids()), want, atol=2e-5, rtol=0)
        assert "taken for weights with quick_gelu" in capsys.readouterr().err
        assert clip.from_pretrained(tmp_path / "model.pt", act="gelu").model.config.act == "gelu"
        assert capsys.readouterr().err == ""

    def test_which_gelu_is_said_by_the_caller_or_open_clips_config(self, tmp_path, capsys):
        path, _ = published(tmp_path)
        assert pretrained.read(path)[0]["act"] == "quick_gelu" and not capsys.readouterr().err
        assert pretrained.read(path, "gelu")[0]["act"] == "gelu"
        for said, act in (({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
            (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
            assert pretrained.read(path)[0]["act"] == act

    @pytest.mark.parametrize("change, message", [
        (lambda s: s.pop("visual.proj"), "not the weights of a CLIP .no matrix vision.pool.pos_em"),
        (lambda s: s.pop("text_projection"), "no matrix text_projection.weight, our name"),
        (lambda s: s.pop("ln_final.bias"), "missing text.transformer.norm.bias$"),
        (lambda s: [s.pop(n) for n in list(s) if "resblocks" in n], "_layers=0: must be at"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(18, 128)}),
         r"vision.pos_embed is \(18, 128\), the model's \(17, 128\)"),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(128)}), "no matrix"),
        (lambda s: s.update({"visual.positional_embedding": torch.ones(0, 128)}), "image_size=0"),
        (lambda s: s.update({"visual.conv1.weight": torch.ones(128, 3)}),
         r"visual.conv1.weight has the shape \(128, 3\), which its layout cannot have"),
        (lambda s: s.update({"visual.conv1.weight": torch.ones(128, 1, 1, 1)}),
         "vision.patch_embed.weight is"),
        (lambda s: s.update({"token_embedding.weight": torch.ones(523, 100)}), "of width 100, but"),
        (lambda s: s.update({"transformer.resblocks.0.mlp.c_fc.weight": torch.ones(769, 192)}),
         r"mlp.fc1.weight is \(769, 192\), the model's \(768, 192\)"),
        (lambda s: s.update({"ln_final.weight": torch.ones(191)}), "norm.weight is .191"),
        (lambda s: s.update({"text_projection": torch.ones(191, 67)}), "weight is .67, 191"),
    ])
    def test_a_file_of_other_weights_is_one_line(self, tmp_path, change, message):
        vocabulary(tmp_path)
        state = openai_layout.vit().state_dict()
        change(state)
        torch.save(dict(state), tmp_path / "model.pt")
        with one_line(message):
            clip.from_pretrained(tmp_path / "model.pt")

    def test_nothing_but_a_vocabulary_beside_the_file_is_needed(self, tmp_path):
        path, _ = published(tmp_path)
        with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wb") as file:
            pairs = itertools.islice(itertools.product(BYTES.values(), BYTES.values()), 48894)
            file.write("\n".join(["v", *map(" ".join, pairs)]).encode())
        (tmp_path / "vocab.json").unlink()
        with one_line("a vocabulary of 49408 pieces, but the weights have rows for 523"):
            clip.from_pretrained(path)
        (tmp_path / "bpe_simple_vocab_16e6.txt.gz").unlink()
        with one_line("no vocabulary; put"):
            clip.from_pretrained(path)


class TestCommands:
    def test_classify_and_search_work_with_published_weights(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "weights").mkdir()
        (tmp_path / "pictures").mkdir()
        (tmp_path / "here").mkdir()
        folder(tmp_path / "weights")
        before = sorted(os.listdir(tmp_path / "weights"))
        for colour in ("red", "blue", "green"):
            Image.new("RGB", (21, 17), colour).save(tmp_path / "pictures" / f"{colour}.png")
        monkeypatch.chdir(tmp_path / "here")
        for words in (["classify", tmp_path / "pictures/red.png", "a dog", "cabs"],
                      ["search", "the red dog", tmp_path / "pictures"]):
            monkeypatch.setattr(sys, "argv", ["clip.py", *map(str, [tmp_path / "weights", *words])])
            clip.main()
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2 + 3 + 1 and said[-1] == "drawn in search.png"
        assert Image.open("search.png").width > 200
        assert sorted(os.listdir(tmp_path / "weights")) == before      # nothing beside the user's

    def test_a_path_that_is_nothing_is_told(self, tmp_path):
        with one_line("no run here"):
            clip.from_pretrained(tmp_path / "none")
