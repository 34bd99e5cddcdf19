"""Published folders of GPT-2, OPT and LLaMA: names, shapes, vocabularies, and what is refused."""
import io
import json
from dataclasses import replace

import pytest
import sentencepiece
import torch

from common.training import checkpoint
from common.pretrained.bpe import BYTES
from common.language import LanguageConfig, LanguageModel, from_pretrained
from common.pretrained.language import Pieces, config_fields, read, read_model, translated

WIDTH, LAYERS, HIDDEN, CONTEXT = 24, 2, 37, 19
VOCAB = 259
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS,
             "n_head": 3, "n_positions": CONTEXT, "n_inner": HIDDEN},
    "opt": {"model_type": "opt", "vocab_size": VOCAB, "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS, "num_attention_heads": 3, "ffn_dim": HIDDEN,
            "max_position_embeddings": CONTEXT, "word_embed_proj_dim": WIDTH},
    "llama": {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
              "num_hidden_layers": LAYERS, "num_attention_heads": 3, "num_key_value_heads": 1,
              "intermediate_size": HIDDEN, "max_position_embeddings": CONTEXT},
}


def square(*names, side=WIDTH, bias=True):
    """Matrices of one shape, with their biases."""
    out = {f"{name}.weight": (side, WIDTH) for name in names}
    return out | ({f"{name}.bias": (side,) for name in names} if bias else {})


def norms(*names, bias=True):
    return {f"{name}.{kind}": (WIDTH,) for name in names for kind in ("weight", "bias")[:1 + bias]}


def shapes(kind):
    """The names and shapes in the published files, from the models' descriptions."""
    out = {}
    for i in range(LAYERS):
        if kind == "gpt2":
            h = f"transformer.h.{i}"
            out |= norms(f"{h}.ln_1", f"{h}.ln_2")
            for name, a, b in (("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH),
                               ("mlp.c_fc", WIDTH, HIDDEN), ("mlp.c_proj", HIDDEN, WIDTH)):
                out |= {f"{h}.{name}.weight": (a, b), f"{h}.{name}.bias": (b,)}
            out |= {f"{h}.attn.bias": (1, 1, 5, 5), f"{h}.attn.masked_bias": ()}
        if kind == "opt":
            h = f"model.decoder.layers.{i}"
            out |= square(*(f"{h}.self_attn.{p}_proj" for p in ("q", "k", "v", "out")))
            out |= norms(f"{h}.self_attn_layer_norm", f"{h}.final_layer_norm")
            out |= square(f"{h}.fc1", side=HIDDEN)
            out |= {f"{h}.fc2.weight": (WIDTH, HIDDEN), f"{h}.fc2.bias": (WIDTH,)}
        if kind == "llama":
            h = f"model.layers.{i}"
            out |= square(f"{h}.self_attn.q_proj", f"{h}.self_attn.o_proj", bias=False)
            out |= square(f"{h}.self_attn.k_proj", f"{h}.self_attn.v_proj", side=8, bias=False)
            out |= square(f"{h}.mlp.gate_proj", f"{h}.mlp.up_proj", side=HIDDEN, bias=False)
            out |= {f"{h}.mlp.down_proj.weight": (WIDTH, HIDDEN),
                    f"{h}.self_attn.rotary_emb.inv_freq": (4,)}
            out |= norms(f"{h}.input_layernorm", f"{h}.post_attention_layernorm", bias=False)
    table = (VOCAB, WIDTH)
    return out | {
        "gpt2": {"transformer.wte.weight": table, "transformer.wpe.weight": (CONTEXT, WIDTH)}
        | norms("transformer.ln_f"),
        "opt": {"model.decoder.embed_tokens.weight": table,
                "model.decoder.embed_positions.weight": (CONTEXT + 2, WIDTH)}
        | norms("model.decoder.final_layer_norm"),
        "llama": {"model.embed_tokens.weight": table, "lm_head.weight": table}
        | norms("model.norm", bias=False)}[kind]


def weights_of(kind):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes(kind).items()}


def pieces():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "two blue stars"]), model_writer=out,
        vocab_size=VOCAB + 40, hard_vocab_limit=False, byte_fallback=True, model_type="bpe",
        minloglevel=2)
    return out.getvalue()


def write_folder(path, kind, config=None, weights=None):
    (path / "config.json").write_text(json.dumps(config or CONFIGS[kind]))
    torch.save(weights or weights_of(kind), path / "pytorch_model.bin")
    vocab = {character: i + 3 for i, character in enumerate(BYTES.values())}
    special = ["<|endoftext|>", "x1", "x2"] if kind == "gpt2" else ["<s>", "<pad>", "</s>"]
    (path / "vocab.json").write_text(json.dumps(vocab | {s: i for i, s in enumerate(special)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return path


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def fields(kind, **changes):
    return config_fields(CONFIGS[kind] | changes, "F: config.json")


class TestNames:
    def test_every_parameter_is_filled(self, kind):
        lm = LanguageModel(LanguageConfig(**fields(kind)))
        checkpoint.load_weights(lm, translated(weights_of(kind), fields(kind), "F"), "F")

    def test_gpt2s_matrices_are_turned_round_and_its_fused_one_cut(self):
        theirs = weights_of("gpt2")
        ours = translated(theirs, fields("gpt2"), "F")
        x, h = torch.randn(5, WIDTH), "transformer.h.1."
        fused = x @ theirs[h + "attn.c_attn.weight"] + theirs[h + "attn.c_attn.bias"]
        for part, want in zip("qkv", fused.split(WIDTH, dim=1)):
            name = f"blocks.1.attn.{part}_proj."
            torch.testing.assert_close(x @ ours[name + "weight"].T + ours[name + "bias"], want)
        # The square one passes every check of shapes; only its values tell.
        torch.testing.assert_close(x @ ours["blocks.1.attn.out_proj.weight"].T,
                                   x @ theirs[h + "attn.c_proj.weight"])
        torch.testing.assert_close(x @ ours["blocks.1.mlp.fc1.weight"].T,
                                   x @ theirs[h + "mlp.c_fc.weight"])

    def test_the_norm_before_the_mlp_has_a_misleading_name(self):
        theirs = weights_of("opt")
        ours = translated(theirs, fields("opt"), "F")
        assert torch.equal(ours["blocks.0.mlp_norm.weight"],
                           theirs["model.decoder.layers.0.final_layer_norm.weight"])
        assert torch.equal(ours["norm.bias"], theirs["model.decoder.final_layer_norm.bias"])
        theirs = weights_of("llama")
        ours = translated(theirs, fields("llama"), "F")
        assert torch.equal(ours["blocks.1.mlp_norm.weight"],
                           theirs["model.layers.1.post_attention_layernorm.weight"])
        assert torch.equal(ours["blocks.1.mlp.gate_proj.weight"],
                           theirs["model.layers.1.mlp.gate_proj.weight"])
        assert torch.equal(ours["output.weight"], theirs["lm_head.weight"])

    def test_names_without_their_first_word_are_those_of_the_bare_model(self, kind):
        theirs, first = weights_of(kind), {"gpt2": "transformer."}.get(kind, "model.")
        bare = {name.removeprefix(first): weight for name, weight in theirs.items()}
        for name, weight in translated(bare, fields(kind), "F").items():
            assert torch.equal(weight, translated(theirs, fields(kind), "F")[name])

    def test_a_tied_head_is_the_table_whatever_the_file_holds(self):
        theirs = weights_of("gpt2") | {"lm_head.weight": torch.ones(VOCAB, WIDTH)}
        assert "output.weight" not in translated(theirs, fields("gpt2"), "F")

    @pytest.mark.parametrize("break_, message", [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "missing blocks.1.mlp.up_proj"),
        (lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(WIDTH)}),
         "unexpected layers.1.self_attn.q_proj.bias"),
        (lambda w: w.pop("lm_head.weight"), "missing output.weight"),
        (lambda w: w.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(24, WIDTH)}),
         r"blocks.1.attn.k_proj.weight is \(24, 24\), the model's \(8, 24\)"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.ones(7, WIDTH)}),
         r"token_embed.weight is \(7, 24\), the model's \(259, 24\)")])
    def test_missing_extra_and_other_weights_are_told(self, break_, message, tmp_path):
        theirs = weights_of("llama")
        break_(theirs)
        lm = LanguageModel(LanguageConfig(**fields("llama")))
        with pytest.raises(ValueError, match="F: .*" + message):
            checkpoint.load_weights(lm, translated(theirs, fields("llama"), "F"), "F")


class TestConfigs:
    def test_the_usual_configs_are_read(self):
        assert LanguageConfig(**config_fields({"model_type": "gpt2"}, "F")) == LanguageConfig(
            kind="gpt2", vocab_size=50257, context_length=1024, width=768, layers=12, heads=12,
            kv_heads=12, hidden=3072)
        llama = config_fields({"model_type": "llama", "rms_norm_eps": 1e-5,
                               "num_key_value_heads": None}, "F")
        assert llama["kv_heads"] == 32 and llama["eps"] == 1e-5 and not llama["tie_embeddings"]

    @pytest.mark.parametrize("config, theta, scale", [
        ({}, 10000.0, 1.0), ({"rope_theta": 5e5}, 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10000.0, 4.0),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, 1.0),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2}}, 9.0, 2.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}}, 9.0, 1.0)])
    def test_rotary_positions_in_all_their_forms(self, config, theta, scale):
        found = fields("llama", **config)
        assert (found["rope_theta"], found["rope_scale"]) == (theta, scale)

    def test_swish_is_another_name_of_silu(self):
        assert fields("llama", hidden_act="swish") == fields("llama", hidden_act="silu")

    @pytest.mark.parametrize("kind, change, message", [
        ("llama", {"model_type": "mamba"}, "type 'mamba', not of gpt2, opt, llama"),
        ("llama", {"model_type": []}, r"type \[\], not of gpt2, opt, llama"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         "rotary positions scaled by 'llama3'; ours are plain or linear"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling is"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta is nan"),
        ("llama", {"attention_bias": True}, "attention_bias is True, ours is False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', ours is silu"),
        ("llama", {"head_dim": 16}, "head_dim is 16, ours width / heads, 8"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1, not a whole number"),
        ("llama", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("gpt2", {"n_layer": 10 ** 9}, "n_layer is 1000000000, not a whole number to 1,000,000"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ("gpt2", {"activation_function": "gelu"}, "_function is 'gelu', ours is gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "ours is False"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, ours is True")])
    def test_what_ours_cannot_be_is_refused_in_one_line(self, kind, change, message):
        with pytest.raises(ValueError, match=message) as error:
            fields(kind, **change)
        assert "\n" not in str(error.value) and str(error.value).startswith("F: config.json")

    @pytest.mark.parametrize("kind, change, message", [
        ("llama", {"num_key_value_heads": 2}, "3 heads do not divide into 2 key-value heads"),
        ("llama", {"hidden_size": 25}, "width 25 does not divide into 3 heads"),
        ("opt", {"vocab_size": VOCAB + 1}, "embed.weight is .259, 24., the model's .260, 24."),
        ("gpt2", {"n_positions": 20}, "pos_embed.weight is .19, 24., the model's .20, 24."),
        ("llama", {"num_hidden_layers": 3}, "missing blocks.2.attn.q_proj.weight"),
        ("llama", {"num_hidden_layers": 1}, "unexpected layers.1.self_attn.q_proj.weight")])
    def test_a_config_of_other_sizes_is_told_when_the_model_is_made(self, kind, change, message):
        with pytest.raises(ValueError, match=message):
            lm = LanguageModel(LanguageConfig(**fields(kind, **change)))
            weights = translated(weights_of(kind), fields(kind, **change), "F")
            checkpoint.load_weights(lm, weights, "F")


class TestFolders:
    @pytest.mark.parametrize("kind", ["gpt2", "opt"])
    def test_a_folder_becomes_a_model_that_writes(self, kind, tmp_path):
        lm, tokenizer = from_pretrained(write_folder(tmp_path, kind))
        assert (lm.config.eos_id, lm.config.pad_id) == ((0, 0) if kind == "gpt2" else (2, 1))
        ids, weights = tokenizer.batch(["abcdefg"], 9)[:, :-1], weights_of(kind)
        again = LanguageModel(LanguageConfig(**fields(kind)))
        again.load_state_dict(translated(weights, fields(kind), "F"))
        assert torch.equal(lm(ids), again(ids)) and not lm.training
        full = lm.generate(ids, max_new_tokens=6, stop=())[0]
        lm.config = replace(lm.config, eos_id=full[3].item())
        length = full.tolist().index(full[3]) + 1                  # its end included
        assert torch.equal(lm.generate(ids, max_new_tokens=6)[0][:length], full[:length])
        assert lm.generate(ids, max_new_tokens=6).shape[1] == length

    def test_in_half_precision_it_writes_nearly_the_same_logits(self, tmp_path):
        folder, ids = write_folder(tmp_path, "opt"), torch.tensor([[7, 9, 11]])
        whole, half = from_pretrained(folder)[0], from_pretrained(folder, torch.bfloat16)[0]
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        near = torch.cosine_similarity(whole(ids).flatten(), half(ids).float().flatten(), dim=0)
        assert near > 0.99 and half.generate(ids, max_new_tokens=3).shape[0] == 1

    def test_llama_comes_with_a_sentencepiece_vocabulary(self, tmp_path):
        model = pieces()
        size = len(Pieces(model))
        weights = weights_of("llama")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.randn(size, WIDTH)
        folder = write_folder(tmp_path, "llama", CONFIGS["llama"] | {"vocab_size": size}, weights)
        with pytest.raises(ValueError, match="tokenizer.model: no such file"):
            read(folder)
        (folder / "tokenizer.model").write_bytes(model)
        lm, tokenizer = from_pretrained(folder)
        assert (lm.config.eos_id, lm.config.pad_id) == (2, 0)
        assert tokenizer.batch(["a red circle"], 9)[0, 0] == 1
        (folder / "tokenizer.model").write_bytes(model[:40])
        with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
            read(folder)

    def test_a_vocabulary_larger_than_the_table_is_told(self, tmp_path):
        weights = weights_of("opt")
        weights["model.decoder.embed_tokens.weight"] = torch.randn(VOCAB - 1, WIDTH)
        write_folder(tmp_path, "opt", CONFIGS["opt"] | {"vocab_size": VOCAB - 1}, weights)
        with pytest.raises(ValueError, match="a vocabulary of 259 pieces, but the weights have "
                                             "rows for 258"):
            read(tmp_path)

    def test_a_folder_without_weights_is_told(self, tmp_path):
        write_folder(tmp_path, "gpt2")
        (tmp_path / "pytorch_model.bin").unlink()
        with pytest.raises(ValueError, match="no weights here"):
            read_model(tmp_path)


class TestPieces:
    def test_a_text_that_spells_a_special_token_is_only_text(self):
        vocabulary = Pieces(pieces())
        ids = vocabulary.encode("</s><s>a red")
        assert min(ids) > 2 and vocabulary.decode(ids) == "</s><s>a red"

    def test_padding_and_rows_of_the_table_without_a_piece_leave_no_trace(self):
        vocabulary = Pieces(pieces())
        ids = vocabulary.encode("a red")
        extra = [vocabulary.pad_id, len(vocabulary), len(vocabulary) + 63]
        assert vocabulary.decode(extra + ids + extra) == vocabulary.decode(ids) == "a red"

    def test_a_batch_is_cut_before_its_end(self):
        vocabulary = Pieces(pieces())
        ids = vocabulary.encode("a red circle a red circle")
        assert vocabulary.batch(["a red circle a red circle"], 5).tolist() == [[1, *ids[:3], 2]]

    def test_a_batch_begins_ends_and_pads(self):
        vocabulary = Pieces(pieces())
        batch = vocabulary.batch(["a red circle", "a"], 5)
        short = vocabulary.encode("a")
        assert batch[0, [0, -1]].tolist() == [1, 2] and batch.shape[1] <= 5
        assert batch[1].tolist() == [1, *short, 2] + [0] * (batch.shape[1] - 2 - len(short))
