"""Published language models in Hugging Face's folders: GPT-2, OPT, LLaMA and Vicuna.

The tables have their names on the left and ours on the right. What a config.json asks for and our
decoder lacks is refused in one line: another activation, biases, another scaling of positions.
"""
from pathlib import Path

import torch

from common.data.safe_read import read_json
from common.data.tokenizer import Tokenizer
from common.pretrained.bpe import BPE, GPT2, OPT
from common.pretrained.files import check_size, given, positive, read_weights, whole
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
# Fields that must have one of these values, the first being their default: ours has no others.
REQUIRED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "tie_word_embeddings": (True, False)},
    "opt": {"activation_function": ("relu",), "do_layer_norm_before": (True,),    # 350m: False
            "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,), "tie_word_embeddings": (True, False)},
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
              "tie_word_embeddings": (False, True)},
}


def read(folder):
    """A published model's folder -> (fields of a LanguageConfig, weights of ours, tokenizer).

    Raises ValueError in one line for whatever is missing, damaged or of another model.
    """
    fields, weights = read_model(folder)
    if fields["kind"] == "llama":
        tokenizer = Pieces.load(Path(folder) / "tokenizer.model")
    else:
        tokenizer = BPE.load(folder, GPT2 if fields["kind"] == "gpt2" else OPT)
    if len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    return fields | {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}, weights, tokenizer


def read_model(folder):
    """config.json and weights of a folder -> (fields of a LanguageConfig, weights of ours).

    Without eos_id and pad_id, which the tokenizer knows.
    """
    path = Path(folder) / "config.json"
    fields = config_fields(read_json(path, dict), path)
    return fields, translated(read_weights(folder), fields, folder)


def config_fields(config, where):
    """A config.json's dict -> fields of a LanguageConfig; ValueError for what ours cannot be."""
    kind = config.get("model_type")
    if kind not in [*TABLES]:            # not a dict's "in": the file may hold a list
        raise ValueError(f"{where} is of a model of type {kind!r:.80}, not of {', '.join(TABLES)}")
    for name, allowed in REQUIRED[kind].items():
        if given(config, name, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {name} is {config[name]!r:.80}, ours is {allowed[0]}")
    fields = {ours: whole(given(config, theirs, default), f"{where}: {theirs}")
              for ours, theirs, default in SIZES[kind]}
    fields |= {"kind": kind, "kv_heads": fields["heads"],
               "tie_embeddings": given(config, "tie_word_embeddings", kind != "llama")}
    if kind == "gpt2":
        fields["hidden"] = whole(given(config, "n_inner", 4 * fields["width"]), f"{where}: n_inner")
        fields["eps"] = positive(given(config, "layer_norm_epsilon", 1e-5),
                                 f"{where}: layer_norm_epsilon")
    return fields | (llama_fields(config, fields, where) if kind == "llama" else {})


def llama_fields(config, fields, where):
    """The fields of LLaMA alone: grouped queries, eps, rotary base and scaling.

    Raises ValueError for another width of a head, and for rotary positions that are scaled other
    than linearly: the weights would load, and be wrong.
    """
    groups = whole(given(config, "num_key_value_heads", fields["heads"]),
                   f"{where}: num_key_value_heads")
    head_width = given(config, "head_dim", fields["width"] // fields["heads"])
    if head_width != fields["width"] // fields["heads"]:
        raise ValueError(f"{where}: head_dim is {head_width!r:.80}, ours width / heads, "
                         f"{fields['width'] // fields['heads']}")
    rope = {"rope_theta": given(config, "rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):          # its older and its newer name
        value = given(config, name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {name} is {value!r:.80}, not an object")
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"{where}: rotary positions scaled by {kind!r:.80}; ours are plain or "
                         "linear")
    scale = rope.get("factor") if kind == "linear" else 1.0
    return {"kv_heads": groups,
            "eps": positive(given(config, "rms_norm_eps", 1e-6), f"{where}: rms_norm_eps"),
            "rope_theta": positive(rope["rope_theta"], f"{where}: rope_theta"),
            "rope_scale": positive(scale, f"{where}: the factor of rope_scaling")}


def translated(weights, fields, path):
    """Weights under their names -> under ours; ValueError where the fields ask for far more."""
    kind, width = fields["kind"], fields["width"]
    rows = fields["vocab_size"] + (0 if kind == "llama" else fields["context_length"])
    check_size(width * (rows + 2 * fields["layers"] * (width + fields["hidden"])), weights, path)
    weights = {name.removeprefix(PREFIXES[kind]): weight for name, weight in weights.items()}
    table = Table((*TABLES[kind].rows, HEAD), TABLES[kind].ignored)
    out = translate(weights, table, {"layers": fields["layers"]}, path)
    head, embed = (out.get(name) for name in ("output.weight", "token_embed.weight"))
    if fields["tie_embeddings"] and head is not None and embed is not None:
        if not torch.equal(head, embed):
            raise ValueError(f"{path}: config.json ties the head to the embeddings, but "
                             f"{HEAD[0]} differs from them")
        del out["output.weight"]
    return out


class Pieces(Tokenizer):
    """LLaMA's SentencePiece vocabulary. It has no piece for padding: <unk> stands for it."""

    def _check(self):
        """Set the ids of the special tokens; ValueError for a vocabulary without them."""
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.pad_id = self.pieces.unk_id()
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise ValueError("a vocabulary without <s>, </s> or <unk>")

    def decode(self, ids):
        """Ids -> text, without special tokens and without ids that have no piece."""
        return super().decode([i for i in ids if i < len(self)])
