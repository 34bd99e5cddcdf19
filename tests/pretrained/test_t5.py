"""T5 in Hugging Face's folders: sizes, names, the head, and what is refused."""
from dataclasses import asdict

import pytest
import torch

from common.pretrained.t5 import config_fields, translated
from common.t5 import PRESETS, T5, T5Config
from tests.fuzz import one_line
from tests.helpers import assert_close, randomize
from tests.parity import blip2_layout

FLAN = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIZES = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}


class TestConfigFields:
    def test_flan_t5_xl(self):
        assert config_fields(FLAN | SIZES, "F").items() <= asdict(PRESETS["flan-t5-xl"]).items()
        newer = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
        assert config_fields(FLAN | newer, "F") == config_fields(FLAN, "F")

    @pytest.mark.parametrize("theirs, ours", [
        (None, "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
    def test_the_activation_of_blip_2_is_the_exact_one(self, theirs, ours):
        assert config_fields(FLAN | {"dense_act_fn": theirs}, "F")["act"] == ours

    @pytest.mark.parametrize("change, message", [
        ({"feed_forward_proj": "relu"}, "MLPs 'relu'"), ({"feed_forward_proj": None}, "'relu'"),
        ({"tie_word_embeddings": None}, "scaled: True"), ({"scale_decoder_outputs": True}, "True"),
        ({"dense_act_fn": ["gelu"]}, r"dense_act_fn is \['gelu'\]"),
        ({"num_decoder_layers": 7}, "num_decoder_layers is 7, ours num_layers, 6"),
        ({"num_heads": 0}, "num_heads is 0"), ({"layer_norm_epsilon": "x"}, "epsilon is 'x'")],
        ids=str)
    def test_what_ours_cannot_be_is_refused_in_one_line(self, change, message):
        with one_line(f"^F: .*{message}"):
            config_fields(FLAN | change, "F")


class TestTranslated:
    @pytest.mark.parametrize("left_out", [(), ("shared.weight", "decoder.embed_tokens.weight"),
                                          ("encoder.embed_tokens.weight", "lm_head.weight")])
    def test_the_table_by_any_of_its_names_and_a_head_that_is_the_table(self, left_out):
        ours = randomize(T5(T5Config(vocab_size=13, width=16, heads=3, head_width=5, hidden=37,
                                     layers=2))).state_dict()
        theirs = blip2_layout.language(ours, "t5")
        theirs = {name: weight for name, weight in theirs.items() if name not in left_out}
        found = translated(theirs, {"layers": 2}, "F")
        if "lm_head.weight" in left_out:
            ours["output.weight"] = ours["token_embed.weight"]
        assert set(found) == set(ours)
        for name, weight in ours.items():
            assert_close(name, found[name], weight, 0)

    def test_names_that_the_published_files_have(self):
        """From transformers' own, not from our writer of them."""
        names = {"decoder.block.1.layer.1.EncDecAttention.o.weight":
                 "decoder.blocks.1.cross.out_proj.weight",
                 "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
                 "encoder_bias.weight",
                 "encoder.block.1.layer.1.DenseReluDense.wi_0.weight":
                 "encoder.blocks.1.mlp.gate_proj.weight",
                 "decoder.block.0.layer.2.layer_norm.weight": "decoder.blocks.0.mlp_norm.weight",
                 "decoder.final_layer_norm.weight": "decoder.norm.weight"}
        assert list(translated(dict.fromkeys(names, torch.ones(1)), {"layers": 2}, "F")) \
            == list(names.values())
