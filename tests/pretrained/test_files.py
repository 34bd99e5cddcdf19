"""The files in a published folder: weights in every usual format, and files that lie."""
import json
import math
import os
import re
import zipfile

import pytest
import torch

from common.pretrained import blip, blip2, files, language, llava, t5
from tests.fuzz import damages, one_line
from tests.helpers import assert_close
from tests.pretrained.writers import write_safetensors

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int64)}
INDEX = "model.safetensors.index.json"


def check(found):
    """Weights as read are WEIGHTS."""
    assert set(found) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert_close(name, found[name], value)


def write_index(folder, where, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


class TestFields:
    @pytest.mark.parametrize("name, more, absent, good, bad", [
        ("given", ["some"], "some", [0, False, "", []], []),
        ("whole", [7, "here"], 7, [1, 10 ** 6], [0, -3, 10 ** 6 + 1, 2.0, "2", True]),
        ("positive", [0.5, "here"], 0.5, [5, 1e-9], [0, -1.5, math.inf, math.nan, "2", True]),
        ("section", ["here"], {}, [{"a": 1}, {}], [3, "a", True])])
    def test_a_field_is_read_or_named_and_has_a_default(self, name, more, absent, good, bad):
        read = getattr(files, name)
        assert read({}, "x", *more) == read({"x": None}, "x", *more) == absent
        for value in good:
            assert read({"x": value}, "x", *more) == value
        for value in bad:
            with one_line(f"here: x is {value!r}"):
                read({"x": value}, "x", *more)


def read_config(kind, config):
    """Read a config.json's dict of a family, with what it must hold besides."""
    if kind == "t5":
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        return t5.config_fields(config | gated, "F")
    if kind in ("gpt2", "opt", "llama"):
        return language.config_fields(config, "F")
    if kind in ("llava", "llava_next"):
        return llava.config_fields(config, "F")
    if kind == "blip":
        return blip.hugging_face({}, config, "F")
    return blip2.hugging_face({}, config | {"text_config": {"model_type": "opt"}}, "F")


class TestKnownSizes:
    SIZES = (("width", "hidden_size", 7),)
    NAMES = {"act": ("gelu", "relu"), "norm_first": (True,)}

    def test_what_is_known_left_out_off_or_harmless_is_accepted(self):
        for config in ({}, {"hidden_size": 9}, {"act": "relu", "norm_first": None},
                       {"act": None, "norm_first": True, "head": [3]},
                       dict.fromkeys("abcde", 0) | {"f": None, "g": False, "h": "", "i": []},
                       {"attention_dropout": 0.1, "eos_token_id": 2, "_name_or_path": "x",
                        "torch_dtype": "float16", "top_k": 50, "id2label": {"0": "x"}}):
            want = {"width": config.get("hidden_size", 7)}
            assert files.known_sizes(config, self.SIZES, self.NAMES, ("head",), "F") == want

    @pytest.mark.parametrize("config, message", [
        ({"act": "silu"}, "F: act is 'silu', ours gelu or relu"),
        ({"norm_first": False}, "F: norm_first is False, ours True"),
        ({"act": ["gelu"]}, r"F: act is \['gelu'\]"), ({"heads": 3}, "F: heads is 3, which ours"),
        ({"new": {"eps": 1}}, "F: new is {'eps': 1}, which ours"),
        ({"hidden_size": "7"}, "F: hidden_size is '7'"), ({"a\nb": 1}, "F: a.*b is 1")], ids=str)
    def test_another_value_and_a_field_nobody_reads_are_named(self, config, message):
        with one_line(f"^{message}"):
            files.known_sizes(config, self.SIZES, self.NAMES, ("head",), "F")

    @pytest.mark.parametrize("kind, part, name, value", [
        ("gpt2", None, "scale_attn_by_inverse_layer_idx", True), ("gpt2", None, "rotary", True),
        ("opt", None, "word_embed_proj_dim", 512), ("opt", None, "qk_norm", True),
        ("llama", None, "partial_rotary_factor", 0.5), ("llama", None, "sliding_window", 4096),
        ("llama", None, "quantization_config", {"bits": 4}), ("llama", None, "clip_qkv", 8.0),
        ("llama", "rope_parameters", "partial_rotary_factor", 0.5),
        ("llama", "rope_scaling", "long_factor", [1.5]),
        ("t5", None, "relative_attention_bidirectional", True), ("t5", None, "rms_scale", 2),
        ("llava", None, "use_image_newline_parameter", False), ("llava", None, "mm_scale", 2),
        ("llava_next", "vision_config", "num_channels", 4),
        ("llava", "vision_config", "num_registers", 4), ("llava", "text_config", "qk_norm", True),
        ("blip", None, "queue", 1), ("blip", "text_config", "position_embedding_type", "rotary"),
        ("blip", "vision_config", "num_channels", 4), ("blip", "vision_config", "use_rope", True),
        ("blip-2", "qformer_config", "position_embedding_type", "relative_key"),
        ("blip-2", "qformer_config", "num_experts", 2), ("blip-2", None, "use_temporal", True),
        ("blip-2", "vision_config", "qkv_bias", False),
        ("blip-2", "vision_config", "num_channels", 1)])
    def test_each_family_refuses_by_name(self, kind, part, name, value):
        config = {"model_type": kind} | ({part: {name: value}} if part else {name: value})
        with one_line(re.escape(f"{name} is {value!r}")):
            read_config(kind, config)


class TestReadWeights:
    def test_safetensors_come_before_a_pickle(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
        write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
        check(files.read_weights(tmp_path))
        check(files.read_weights(tmp_path / "model.safetensors"))

    def test_nothing_found_names_what_was_looked_for(self, tmp_path):
        with one_line(f"{tmp_path}: .*model.safetensors, {INDEX}, pytorch_model.bin, "
                      "pytorch_model.bin.index.json"):
            files.read_weights(tmp_path)
        with one_line("none.pt: no such file"):
            files.read_weights(tmp_path / "none.pt")


class TestReadShards:
    def test_shards_are_put_together_safetensors_before_pickles(self, tmp_path):
        for name, value in WEIGHTS.items():
            torch.save({name: value}, tmp_path / f"{name}.bin")
            write_safetensors(tmp_path / f"{name}.safetensors", {name: value})
        write_index(tmp_path, {"a": "a.bin", "b": "b.bin"}, "pytorch_model.bin.index.json")
        check(files.read_weights(tmp_path))
        write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
        (tmp_path / "b.bin").unlink()
        check(files.read_weights(tmp_path))

    @pytest.mark.parametrize("where, message", [
        *(({"a": shard}, "not in the folder of its index") for shard in (
            "../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\nb")),
        ({"a": "x.safetensors", "b": "none.safetensors"}, "none.safetensors: no such file"),
        ({"a": 3}, INDEX), ([], INDEX), (None, INDEX)], ids=str)
    def test_an_index_that_lies_is_told(self, tmp_path, where, message):
        (tmp_path / "in").mkdir()
        for folder in (tmp_path, tmp_path / "in"):
            write_safetensors(folder / "x.safetensors", WEIGHTS)
        write_index(tmp_path / "in", where)
        with one_line(message):
            files.read_weights(tmp_path / "in")

    def test_damaged_indexes_are_weights_or_one_line(self, tmp_path):
        write_safetensors(tmp_path / "x.safetensors", WEIGHTS)
        write_index(tmp_path, dict.fromkeys(WEIGHTS, "x.safetensors"))
        for _ in damages(tmp_path / INDEX, 300):
            with one_line(maybe=True):
                files.read_weights(tmp_path)


class TestReadPickle:
    @pytest.mark.parametrize("wrap", [
        dict, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model_state_dict": w},
        lambda w: {"model": w}, lambda w: {f"module.{name}": value for name, value in w.items()}])
    def test_tensors_are_found_plain_and_wrapped(self, tmp_path, wrap):
        torch.save(wrap(WEIGHTS), tmp_path / "pytorch_model.bin")
        check(files.read_weights(tmp_path))
        check(files.read_weights(tmp_path / "pytorch_model.bin"))

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'harm'}",)
        torch.save({"a": Harm()}, tmp_path / "x.pt")
        with one_line("x.pt: .*refused"):
            files.read_weights(tmp_path / "x.pt")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("cut", [0, 1, 100, -30])
    def test_a_cut_file_is_told(self, tmp_path, cut):
        torch.save(WEIGHTS, tmp_path / "x.pt")
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:cut])
        with one_line("x.pt: .*cut off"):
            files.read_weights(tmp_path / "x.pt")

    @pytest.mark.parametrize("state, message", [
        ({"a": 3}, "x.pt: 'a' is a int"), ([1], "x.pt: no tensors"), ({}, "x.pt: no tensors"),
        ({1: WEIGHTS["a"]}, "x.pt: 1 is a Tensor")])
    def test_anything_but_tensors_is_told(self, tmp_path, state, message):
        torch.save(state, tmp_path / "x.pt")
        with one_line(message):
            files.read_weights(tmp_path / "x.pt")


class TestReadScript:                    # whole archives are read in test_clip.py
    def test_a_damaged_archive_is_told(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/constants.pkl", b"nothing")
        with one_line("x.pt: .*TorchScript"):
            files.read_weights(tmp_path / "x.pt")
