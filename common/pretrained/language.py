"""Published language models in Hugging Face's folders: GPT-2, OPT, LLaMA and Vicuna.

The tables have their names on the left and ours on the right. What our decoder lacks is refused:
another activation, biases, another scaling of positions.
"""
from pathlib import Path

from common.data.safe_read import read_json
from common.data.tokenizer import Pieces, T5Pieces
from common.pretrained.bpe import BPE, GPT2, OPT
from common.pretrained.files import given, known_sizes, positive, read_weights, section, whole
from common.pretrained.names import Table, thirds, transpose, transposed_thirds, translate

TABLES = {
    "gpt2": Table((
        ("wte.weight", "token_embed.weight"),
        ("wpe.weight", "pos_embed.weight"),
        ("h.{layers}.ln_{1,2}.{weight,bias}", "blocks.{layers}.{attn,mlp}_norm.{weight,bias}"),
        ("h.{layers}.attn.c_attn.weight", "blocks.{layers}.attn.{q,k,v}_proj.weight",
         transposed_thirds),
        ("h.{layers}.attn.c_attn.bias", "blocks.{layers}.attn.{q,k,v}_proj.bias", thirds),
        ("h.{layers}.attn.c_proj.weight", "blocks.{layers}.attn.out_proj.weight", transpose),
        ("h.{layers}.attn.c_proj.bias", "blocks.{layers}.attn.out_proj.bias"),
        ("h.{layers}.mlp.{c_fc,c_proj}.weight", "blocks.{layers}.mlp.{fc1,fc2}.weight", transpose),
        ("h.{layers}.mlp.{c_fc,c_proj}.bias", "blocks.{layers}.mlp.{fc1,fc2}.bias"),
        ("ln_f.{weight,bias}", "norm.{weight,bias}"),
    ), ignored=("h.*.attn.bias", "h.*.attn.masked_bias")),             # their masks
    "opt": Table((
        ("decoder.embed_tokens.weight", "token_embed.weight"),
        ("decoder.embed_positions.weight", "pos_embed.weight"),
        ("decoder.layers.{layers}.self_attn.{q,k,v,out}_proj.{weight,bias}",
         "blocks.{layers}.attn.{q,k,v,out}_proj.{weight,bias}"),
        # The "final" norm of a layer is the one before its MLP.
        ("decoder.layers.{layers}.{self_attn,final}_layer_norm.{weight,bias}",
         "blocks.{layers}.{attn,mlp}_norm.{weight,bias}"),
        ("decoder.layers.{layers}.{fc1,fc2}.{weight,bias}",
         "blocks.{layers}.mlp.{fc1,fc2}.{weight,bias}"),
        ("decoder.final_layer_norm.{weight,bias}", "norm.{weight,bias}"),
    )),
    "llama": Table((
        ("embed_tokens.weight", "token_embed.weight"),
        ("layers.{layers}.self_attn.{q,k,v,o}_proj.weight",
         "blocks.{layers}.attn.{q,k,v,out}_proj.weight"),
        # The norm "post" attention is the one before the MLP.
        ("layers.{layers}.{input,post_attention}_layernorm.weight",
         "blocks.{layers}.{attn,mlp}_norm.weight"),
        ("layers.{layers}.mlp.{gate,up,down}_proj.weight",
         "blocks.{layers}.mlp.{gate,up,down}_proj.weight"),
        ("norm.weight", "norm.weight"),
    ), ignored=("*.rotary_emb.inv_freq",)),
}
PREFIXES = {"gpt2": "transformer.", "opt": "model.", "llama": "model."}
HEAD = ("lm_head.weight", "output.weight")               # where it is not the embedding table

# Sizes in a config.json: (ours, theirs, their default).
SIZES = {
    "gpt2": (("vocab_size", "vocab_size", 50257), ("context_length", "n_positions", 1024),
             ("width", "n_embd", 768), ("layers", "n_layer", 12), ("heads", "n_head", 12)),
    "opt": (("vocab_size", "vocab_size", 50272),
            ("context_length", "max_position_embeddings", 2048), ("width", "hidden_size", 768),
            ("layers", "num_hidden_layers", 12), ("heads", "num_attention_heads", 12),
            ("hidden", "ffn_dim", 3072)),
    "llama": (("vocab_size", "vocab_size", 32000),
              ("context_length", "max_position_embeddings", 2048), ("width", "hidden_size", 4096),
              ("layers", "num_hidden_layers", 32), ("heads", "num_attention_heads", 32),
              ("hidden", "intermediate_size", 11008)),
}
# Fields that must have one of these values, the first being their default; and those read below.
REQUIRED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "tie_word_embeddings": (True, False),
             "reorder_and_upcast_attn": (False, True)},
    "opt": {"activation_function": ("relu",), "do_layer_norm_before": (True,),    # 350m: False
            "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,), "tie_word_embeddings": (True, False)},
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
              "tie_word_embeddings": (False, True), "partial_rotary_factor": (1.0,)},
}
READ = {"gpt2": ("n_inner", "layer_norm_epsilon", "n_ctx"), "opt": (),
        "llama": ("head_dim", "num_key_value_heads", "pretraining_tp", "rms_norm_eps",
                  "rope_parameters", "rope_scaling", "rope_theta")}
ROPE = ("factor", "original_max_position_embeddings", "rope_theta", "rope_type", "type")


def read(folder):
    """A published model's folder -> (fields of a LanguageConfig, weights of ours, tokenizer)."""
    fields, weights = read_model(folder)
    tokenizer = load_tokenizer(folder, fields)
    return fields | {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}, weights, tokenizer


def load_tokenizer(folder, fields):
    """The vocabulary beside a model of these fields. ValueError for more pieces than rows."""
    kind = fields["kind"]
    if kind in ("gpt2", "opt"):
        tokenizer = BPE.load(folder, GPT2 if kind == "gpt2" else OPT)
    elif kind == "llama":
        tokenizer = Pieces.load(Path(folder) / "tokenizer.model")
    else:
        tokenizer = T5Pieces.load(Path(folder) / "spiece.model")
    if len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    return tokenizer


def read_model(folder):
    """`read` without the tokenizer, and without eos_id and pad_id, which the tokenizer knows."""
    path = Path(folder) / "config.json"
    fields = config_fields(read_json(path, dict), path)
    return fields, translated(read_weights(folder), fields, folder)


def config_fields(config, where):
    """A config.json's dict -> fields of a LanguageConfig; ValueError for what ours cannot be."""
    kind = config.get("model_type")
    if kind not in [*TABLES]:            # not a dict's "in": the file may hold a list
        raise ValueError(f"{where} is of a model of type {kind!r:.80}, not of {', '.join(TABLES)}")
    required = REQUIRED[kind] | {"word_embed_proj_dim": (given(config, "hidden_size", 768),)}
    fields = known_sizes(config, SIZES[kind], required, READ[kind], where)
    fields |= {"kind": kind, "kv_heads": fields["heads"],
               "tie_embeddings": given(config, "tie_word_embeddings", kind != "llama")}
    if kind == "gpt2":
        fields |= {"hidden": whole(config, "n_inner", 4 * fields["width"], where),
                   "eps": positive(config, "layer_norm_epsilon", 1e-5, where)}
    return fields | (llama_fields(config, fields, where) if kind == "llama" else {})


def llama_fields(config, fields, where):
    """The fields of LLaMA alone. ValueError for what would load, and be wrong."""
    head_width = fields["width"] // fields["heads"]
    if given(config, "head_dim", head_width) != head_width:
        raise ValueError(f"{where}: head_dim is {config['head_dim']!r:.80}, ours width / heads, "
                         f"{head_width}")
    rope = {"rope_theta": config.get("rope_theta")}           # below: an older and a newer name
    rope |= section(config, "rope_scaling", where) | section(config, "rope_parameters", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"{where}: rotary positions scaled by {kind!r:.80}; ours are plain or "
                         "linear")
    known_sizes(rope, (), {"partial_rotary_factor": (1.0,)}, ROPE, f"{where}: rope_parameters")
    scale = positive(rope, "factor", None, f"{where}: rope_scaling") if kind == "linear" else 1.0
    return {"kv_heads": whole(config, "num_key_value_heads", fields["heads"], where),
            "eps": positive(config, "rms_norm_eps", 1e-6, where),
            "rope_theta": positive(rope, "rope_theta", 10000.0, where), "rope_scale": scale}


def translated(weights, fields, path):
    """Weights under their names -> under ours, without a head that is the embedding table."""
    kind, table = fields["kind"], TABLES[fields["kind"]]
    weights = {name.removeprefix(PREFIXES[kind]): weight for name, weight in weights.items()}
    ignored = (*table.ignored, HEAD[0]) if fields["tie_embeddings"] else table.ignored
    return translate(weights, Table((*table.rows, HEAD), ignored), {"layers": fields["layers"]},
                     path)
