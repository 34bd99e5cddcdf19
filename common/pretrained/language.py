"""Published language models in Hugging Face's folders: GPT-2, OPT, LLaMA and Vicuna.

The tables are data: their names left, ours right. What a config.json asks for and our decoder does
not have is refused in one line: another activation, biases, a scaling of positions not ours.
"""
import math
from pathlib import Path

import sentencepiece
import torch

from common.pretrained.bpe import BPE, GPT2, OPT
from common.pretrained import files, strict_json
from common.pretrained.names import Table, thirds, transpose, transposed_thirds, translate
from common.pretrained.strict_json import printable

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
        # A layer's "final" norm is the one before its MLP.
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
        # What is "post" attention is the norm before the MLP.
        ("layers.{layers}.{input,post_attention}_layernorm.weight",
         "blocks.{layers}.{attn,mlp}_norm.weight"),
        ("layers.{layers}.mlp.{gate,up,down}_proj.weight",
         "blocks.{layers}.mlp.{gate,up,down}_proj.weight"),
        ("norm.weight", "norm.weight"),
    ), ignored=("*.rotary_emb.inv_freq",)),
}
PREFIXES = {"gpt2": "transformer.", "opt": "model.", "llama": "model."}
HEAD = ("lm_head.weight", "output.weight")

# What a config.json says: (ours, theirs, their default; None: it must be there).
SIZES = {
    "gpt2": (("vocab_size", "vocab_size", 50257), ("context_length", "n_positions", 1024),
             ("width", "n_embd", 768), ("layers", "n_layer", 12), ("heads", "n_head", 12)),
    "opt": (("vocab_size", "vocab_size", 50272), ("context_length", "max_position_embeddings", 2048),
            ("width", "hidden_size", 768), ("layers", "num_hidden_layers", 12),
            ("heads", "num_attention_heads", 12), ("hidden", "ffn_dim", 3072)),
    "llama": (("vocab_size", "vocab_size", 32000), ("context_length", "max_position_embeddings", 2048),
              ("width", "hidden_size", 4096), ("layers", "num_hidden_layers", 32),
              ("heads", "num_attention_heads", 32), ("hidden", "intermediate_size", 11008)),
}
# Fields that must have these values, the first being their default: ours has no others.
REQUIRED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,)},
    "opt": {"activation_function": ("relu",), "do_layer_norm_before": (True,),
            "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,)},
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
}
ENDS = {"gpt2": (50256, 50256), "opt": (2, 1), "llama": (2, 0)}       # eos and padding
MOST_LAYERS = 1000


def read(folder):
    """A published model's folder -> (fields of a LanguageConfig, weights of ours, tokenizer).

    Raises ValueError in one line for whatever is missing, damaged or of another model.
    """
    folder = Path(folder)
    fields, weights = read_model(folder)
    tokenizer = read_tokenizer(folder, fields["kind"])
    if len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    return fields | {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}, weights, tokenizer


def read_model(folder):
    """config.json and weights of a folder -> (fields of a LanguageConfig, weights of ours)."""
    said = files.read_config(folder)
    fields = config_fields(said, f"{folder}: config.json")
    return fields, translated(files.read_weights(folder), fields, folder)


def read_tokenizer(folder, kind):
    """The vocabulary of a folder: byte-level BPE, or LLaMA's SentencePiece model."""
    if kind == "llama":
        return Pieces.load(Path(folder) / "tokenizer.model")
    return BPE.load(folder, GPT2 if kind == "gpt2" else OPT)


def config_fields(said, where):
    """A config.json's dict -> fields of a LanguageConfig; ValueError for what ours cannot be."""
    kind = said.get("model_type")
    if kind not in TABLES:
        raise ValueError(f"{where} is of a model of type {printable(kind)}, not of "
                         + ", ".join(TABLES))
    fields = {ours: whole(given(said, theirs, default), f"{where}: {theirs}")
              for ours, theirs, default in SIZES[kind]}
    for name, allowed in REQUIRED[kind].items():
        if given(said, name, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {name} is {printable(said[name])}, ours is {allowed[0]}")
    if fields["layers"] > MOST_LAYERS or fields["width"] % fields["heads"]:
        raise ValueError(f"{where}: no model has {fields['layers']} layers and {fields['heads']} "
                         f"heads at width {fields['width']}")
    fields["kv_heads"] = fields["heads"]
    more = {"gpt2": gpt2_fields, "opt": opt_fields, "llama": llama_fields}[kind]
    eos, pad = ENDS[kind]
    ends = given(said, "eos_token_id", eos)
    eos = ends[0] if isinstance(ends, list) and ends else ends
    tied = given(said, "tie_word_embeddings", kind != "llama")
    if type(tied) is not bool or type(eos) is not int:
        raise ValueError(f"{where}: tie_word_embeddings is {printable(tied)}, eos_token_id "
                         f"{printable(eos)}")
    return fields | more(said, fields, where) | {
        "kind": kind, "tie_embeddings": tied, "eos_id": eos, "pad_id": eos if kind == "gpt2" else pad}


def gpt2_fields(said, fields, where):
    """What GPT-2 alone says."""
    hidden = given(said, "n_inner", 4 * fields["width"])
    eps = given(said, "layer_norm_epsilon", 1e-5)
    return {"hidden": whole(hidden, f"{where}: n_inner"),
            "eps": positive(eps, f"{where}: layer_norm_epsilon")}


def opt_fields(said, fields, where):
    """What OPT alone says; OPT-350m alone has narrower embeddings, and norms after the residual."""
    narrow = given(said, "word_embed_proj_dim", fields["width"])
    if narrow != fields["width"]:
        raise ValueError(f"{where}: word_embed_proj_dim is {printable(narrow)}, not the width "
                         f"{fields['width']} (OPT-350m is built differently from all others)")
    return {"eps": 1e-5}


def llama_fields(said, fields, where):
    """What LLaMA alone says: grouped queries, rotary base and scaling, eps."""
    groups = whole(given(said, "num_key_value_heads", fields["heads"]),
                   f"{where}: num_key_value_heads")
    if fields["heads"] % groups:
        raise ValueError(f"{where}: {fields['heads']} heads do not divide into {groups} "
                         "key-value heads")
    head_width = given(said, "head_dim", fields["width"] // fields["heads"])
    if head_width != fields["width"] // fields["heads"]:
        raise ValueError(f"{where}: head_dim is {printable(head_width)}, ours width / heads, "
                         f"{fields['width'] // fields['heads']}")
    theta, stretch = rotary(said, where)
    return {"kv_heads": groups, "rope_theta": theta, "rope_scale": stretch,
            "eps": positive(given(said, "rms_norm_eps", 1e-6), f"{where}: rms_norm_eps")}


def rotary(said, where):
    """(base, stretch) of the rotary positions, in either of the forms configs have had.

    Raises ValueError for a scaling other than "linear": ours would read long texts wrongly.
    """
    scaling = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = given(said, name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {name} is {printable(value)}, not an object")
        scaling |= value
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = positive(given(scaling, "rope_theta", given(said, "rope_theta", 10000.0)),
                     f"{where}: rope_theta")
    if kind == "default":
        return theta, 1.0
    if kind != "linear":
        raise ValueError(f"{where}: rotary positions scaled by {printable(kind)}; ours are plain or "
                         "linear")
    return theta, positive(scaling.get("factor"), f"{where}: the factor of rope_scaling")


def translated(weights, fields, path):
    """Weights under their names -> under ours, every shape as the fields say."""
    kind, prefix = fields["kind"], PREFIXES[fields["kind"]]
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    table = TABLES[kind]
    if not fields["tie_embeddings"]:
        table = Table(table.rows + (HEAD,), table.ignored)
    elif HEAD[0] in weights:
        table = Table(table.rows, table.ignored + HEAD[:1])
        own = weights.get(table.rows[0][0])
        if own is not None and not torch.equal(own, weights[HEAD[0]]):
            raise ValueError(f"{path}: config.json ties the head to the embeddings, but "
                             f"{HEAD[0]} differs from {table.rows[0][0]}")
    out = translate(weights, table, {"layers": fields["layers"]}, path)
    width, first = fields["width"], "blocks.0."
    shapes = {"token_embed.weight": (fields["vocab_size"], width),
              first + ("mlp.up_proj.weight" if kind == "llama" else "mlp.fc1.weight"):
              (fields["hidden"], width),
              first + "attn.k_proj.weight": (width // fields["heads"] * fields["kv_heads"], width)}
    if kind != "llama":
        shapes["pos_embed.weight"] = (fields["context_length"] + (2 if kind == "opt" else 0), width)
    for name, shape in shapes.items():   # before a model of these sizes is made
        if tuple(out[name].shape) != shape:
            raise ValueError(f"{path}: {name} (our name) is {tuple(out[name].shape)}, config.json "
                             f"says {shape}")
    return out


def given(said, name, default):
    """The value of a field, its default where it is absent or null."""
    value = said.get(name)
    return default if value is None else value


def whole(value, where):
    """A whole number of at least 1, or ValueError."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is {printable(value)}, not a whole number")
    return value


def positive(value, where):
    """A finite number above 0, or ValueError."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where} is {printable(value)}, not a number above 0")
    return float(value)


class Pieces:
    """LLaMA's SentencePiece vocabulary; interface and batches as of tokenizers.Tokenizer.

    A text that spells <s> gets ordinary pieces. bos, eos, pad: ids; padding is <unk>.
    """

    def __init__(self, model):
        """model: the bytes of a SentencePiece model. Raises ValueError for any other bytes."""
        try:
            self.pieces = sentencepiece.SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(model)
        except Exception:                # its parser's own words help nobody
            raise ValueError("not a SentencePiece model, or cut off") from None
        self.bos_id, self.eos_id, self.pad_id = (self.pieces.bos_id(), self.pieces.eos_id(),
                                        self.pieces.unk_id())
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise ValueError("a vocabulary without <s>, </s> or <unk>")

    @classmethod
    def load(cls, path):
        """Read a tokenizer.model file. Raises ValueError when it is missing or none."""
        model = strict_json.read_bytes(path, 64_000_000)
        try:
            return cls(model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text):
        """Text -> ids (list of int), without special tokens."""
        return self.pieces.encode(text)

    def decode(self, ids):
        """Ids -> text; special tokens and ids without a piece leave no trace."""
        return self.pieces.decode([int(i) for i in ids if i != self.pad_id and i < len(self)])

    def batch(self, texts, context_length):
        """<s> ids </s> of each text, padded right: int64 (B, T), T <= context; cut before </s>."""
        rows = [torch.tensor([self.bos_id, *self.encode(t)[:context_length - 2], self.eos_id]) for t in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
