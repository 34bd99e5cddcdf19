"""Published folders of GPT-2, OPT and LLaMA: names, configs, vocabularies, and what is refused."""
import json
from dataclasses import asdict

import pytest
import torch

from common.language import PRESETS, LanguageConfig, LanguageModel, from_pretrained
from common.pretrained.bpe import GPT2, OPT
from common.pretrained.language import (Pieces, T5Pieces, config_fields, load_tokenizer,
                                        read_model, translated)
from tests.fuzz import one_line
from tests.helpers import assert_close, randomize
from tests.parity import hugging_face_layout
from tests.pretrained.writers import (byte_vocabulary, check_weights, sentencepieces, write_run,
                                      write_vocabulary)

WIDTH, VOCAB = 24, 263
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2,
         "num_attention_heads": 3, "max_position_embeddings": 19}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 3,
             "n_positions": 19, "n_inner": 37},
    "opt": SIZES | {"model_type": "opt", "ffn_dim": 37, "word_embed_proj_dim": WIDTH},
    "llama": SIZES | {"model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 37}}
FIELDS = dict(vocab_size=VOCAB, context_length=19, width=WIDTH, layers=2, heads=3, hidden=37)


def fields(kind, **changes):
    return config_fields(CONFIGS[kind] | changes, "F: config.json")


def both(kind, vocab_size=VOCAB):
    """Random weights under our names and under theirs."""
    lm = LanguageModel(LanguageConfig(**fields(kind, vocab_size=vocab_size)))
    ours = randomize(lm).state_dict()
    return ours, hugging_face_layout.language(ours, kind)


def write_folder(path, kind, weights, **changes):
    (path / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    torch.save(weights, path / "pytorch_model.bin")
    write_vocabulary(path, byte_vocabulary(GPT2 if kind == "gpt2" else OPT, []), [])
    return path


class TestReadModel:
    def test_it_needs_no_vocabulary(self, tmp_path):
        ours, theirs = both("gpt2")
        write_folder(tmp_path, "gpt2", theirs)
        (tmp_path / "vocab.json").unlink()
        found, weights = read_model(tmp_path)
        assert found == fields("gpt2") and set(weights) == set(ours)


class TestConfigFields:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_all_sizes_are_read(self, kind):
        assert fields(kind).items() >= FIELDS.items()
        assert fields(kind)["kv_heads"] == (1 if kind == "llama" else 3)
        assert fields(kind)["tie_embeddings"] == (kind != "llama")
        for tied in (True, False):
            assert fields(kind, tie_word_embeddings=tied)["tie_embeddings"] == tied
        eps = {"gpt2": "layer_norm_epsilon", "llama": "rms_norm_eps"}.get(kind)
        assert not eps or fields(kind, **{eps: 0.25})["eps"] == 0.25
        assert fields("llama", hidden_act="swish") == fields("llama", hidden_act="silu")

    @pytest.mark.parametrize("kind, name", [("gpt2", "gpt2"), ("opt", "opt-125m"),
                                            ("llama", "llama-7b")])
    def test_sizes_left_out_are_those_of_the_first_published_model(self, kind, name):
        assert config_fields({"model_type": kind}, "F").items() <= asdict(PRESETS[name]).items()

    @pytest.mark.parametrize("kind, change", [
        ("llama", {"model_type": "mamba"}), ("llama", {"model_type": []}),
        ("llama", {"attention_bias": True}), ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}), ("llama", {"vocab_size": "many"}),
        ("gpt2", {"n_layer": 10 ** 9}), ("llama", {"tie_word_embeddings": "yes"}),
        ("gpt2", {"activation_function": "gelu"}), ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("gpt2", {"layer_norm_epsilon": 0}),
        ("gpt2", {"scale_attn_weights": False}), ("opt", {"do_layer_norm_before": False}),
        ("opt", {"activation_function": "gelu"}), ("opt", {"enable_bias": False}),
        ("llama", {"head_dim": 16}), ("llama", {"rope_scaling": [1]}),
        ("llama", {"rope_theta": float("nan")})], ids=str)
    def test_what_ours_cannot_be_is_refused_in_one_line(self, kind, change):
        (name, value), = change.items()
        value = repr(value).replace("[", r"\[")
        with one_line(rf"^F: config.json.*(type|{name} is) {value}"):
            fields(kind, **change)

    @pytest.mark.parametrize("kind, change, message", [
        ("opt", {"vocab_size": 264}, "token_embed.weight is .263, 24., the model's .264, 24."),
        ("opt", {"max_position_embeddings": 20}, "pos_embed.weight is .21, 24., .* .22, 24."),
        ("gpt2", {"n_layer": 3}, "missing blocks.2.attn.q_proj.weight"),
        ("gpt2", {"n_layer": 1}, "unexpected h.1.attn.c_attn.weight")])
    def test_other_sizes_than_the_weights_are_told(self, tmp_path, kind, change, message):
        with one_line(message):
            from_pretrained(write_folder(tmp_path, kind, both(kind)[1], **change))


class TestLlamaFields:
    @pytest.mark.parametrize("config, theta, scale", [
        ({}, 10000.0, 1.0), ({"rope_theta": 5e5}, 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10000.0, 4.0),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, 1.0),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2}}, 9.0, 2.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}}, 9.0, 1.0),
        ({"num_key_value_heads": None}, 10000.0, 1.0)])
    def test_rotary_positions_in_all_their_forms(self, config, theta, scale):
        found = fields("llama", **config)
        assert (found["rope_theta"], found["rope_scale"]) == (theta, scale)
        assert found["kv_heads"] == (3 if "num_key_value_heads" in config else 1)

    @pytest.mark.parametrize("scaling, message", [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "'llama3'"),
        ({"type": "linear"}, "rope_scaling: factor is None")])
    def test_positions_scaled_otherwise_are_refused(self, scaling, message):
        with one_line(f"^F: config.json.*{message}"):
            fields("llama", rope_scaling=scaling)


class TestTranslated:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_names_without_their_first_word_are_read_too(self, kind):
        ours, theirs = both(kind)
        bare = {name.removeprefix("transformer.").removeprefix("model."): weight
                for name, weight in theirs.items()}
        for name, weight in translated(bare, fields(kind), "F").items():
            assert_close(name, weight, ours.pop(name), 0)
        assert not ours

    def test_a_tied_head_is_the_table_whatever_the_file_holds(self):
        theirs = both("gpt2")[1] | {"lm_head.weight": torch.ones(VOCAB, WIDTH)}
        assert "output.weight" not in translated(theirs, fields("gpt2"), "F")


class TestPieces:
    def test_a_text_that_spells_a_special_token_is_only_text(self):
        vocabulary = Pieces(sentencepieces())
        ids = vocabulary.encode("</s><s>a red")
        assert min(ids) > 2 and vocabulary.decode(ids) == "</s><s>a red"

    def test_padding_and_rows_of_the_table_without_a_piece_leave_no_trace(self):
        vocabulary = Pieces(sentencepieces())
        ids = vocabulary.encode("a red")
        extra = [vocabulary.pad_id, len(vocabulary), len(vocabulary) + 63]
        assert vocabulary.decode(extra + ids + extra) == vocabulary.decode(ids) == "a red"

    def test_a_vocabulary_without_an_end_is_told(self):
        with one_line("</s>"):
            Pieces(sentencepieces(eos_id=-1))


class TestT5Pieces:
    def test_padding_begins_a_text_and_special_tokens_leave_no_trace(self, tmp_path):
        (tmp_path / "spiece.model").write_bytes(
            sentencepieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
        vocabulary = load_tokenizer(tmp_path, {"kind": "t5", "vocab_size": 400})
        assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, 1, 0)
        ids = vocabulary.encode("a red")
        assert vocabulary.decode([0, *ids, 1, 0, 399]) == "a red"

    def test_a_vocabulary_without_padding_is_told(self):
        with one_line("<pad>"):
            T5Pieces(sentencepieces())


class TestFromPretrained:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind, pad_id", [("gpt2", 256), ("opt", 257)])
    def test_a_published_folder(self, kind, pad_id, dtype, tmp_path):
        ours, theirs = both(kind)
        lm, tokenizer = from_pretrained(write_folder(tmp_path, kind, theirs), dtype)
        assert lm.config == LanguageConfig(**fields(kind), eos_id=256, pad_id=pad_id)
        assert tokenizer.batch(["ab"], 9).tolist() == [[256, *tokenizer.encode("ab"), 256]]
        assert not lm.training
        check_weights(lm, {name: weight.to(dtype) for name, weight in ours.items()})

    def test_a_vocabulary_larger_than_the_table_is_told(self, tmp_path):
        write_folder(tmp_path, "opt", both("opt", 259)[1], vocab_size=259)
        with one_line("260 pieces, .* 259"):
            from_pretrained(tmp_path)

    def test_llama_comes_with_a_sentencepiece_vocabulary(self, tmp_path):
        size = len(Pieces(sentencepieces()))
        ours, theirs = both("llama", size)
        write_folder(tmp_path, "llama", theirs, vocab_size=size)
        with one_line("tokenizer.model: no such file"):
            from_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(sentencepieces())
        lm, tokenizer = from_pretrained(tmp_path)
        assert (lm.config.eos_id, lm.config.pad_id) == (2, 0)
        assert tokenizer.batch(["a red"], 99).tolist() == [[1, *tokenizer.encode("a red"), 2]]
        check_weights(lm, ours)
        (tmp_path / "tokenizer.model").write_bytes(sentencepieces()[:40])
        with one_line("tokenizer.model: not a SentencePiece model"):
            from_pretrained(tmp_path)

    def test_a_run_folder_and_nothing_else(self, tmp_path):
        with one_line(f"{tmp_path}: no run here .*python train.py lm --out {tmp_path}"):
            from_pretrained(tmp_path)
        lm = randomize(LanguageModel(PRESETS["tiny"]))
        tokenizer = write_run(tmp_path, "common.training.lm", lm.config,
                              {f"lm.{name}": weight for name, weight in lm.state_dict().items()})
        found, known = from_pretrained(tmp_path)
        assert found.config == lm.config and known.model == tokenizer.model
        check_weights(found, lm.state_dict())
