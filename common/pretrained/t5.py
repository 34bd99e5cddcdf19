"""T5 as Hugging Face's folders hold it, such as the FLAN-T5 in BLIP-2 and InstructBLIP.

The tables have their names on the left and ours on the right. The original T5, whose output is
scaled and whose MLPs have no gate, is refused: FLAN-T5 and T5 version 1.1 are what ours is.
"""
from common.pretrained.files import given, known_sizes, positive
from common.pretrained.names import Table, translate, under


def stack(part, mlp):
    """The rows of a stack, encoder or decoder; mlp: the number of its MLP in each block."""
    return (
        *under(f"{part}.block.{{layers}}.layer.", f"{part}.blocks.{{layers}}.", (
            ("0.SelfAttention.{q,k,v,o}.weight", "attn.{q,k,v,out}_proj.weight"),
            ("0.layer_norm.weight", "attn_norm.weight"),
            (f"{mlp}.DenseReluDense.{{wi_0,wi_1,wo}}.weight", "mlp.{gate,up,down}_proj.weight"),
            (f"{mlp}.layer_norm.weight", "mlp_norm.weight"))),
        # The first block has the bias of all.
        (f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
         f"{part}_bias.weight"),
        (f"{part}.final_layer_norm.weight", f"{part}.norm.weight"))


TABLE = Table((
    *stack("encoder", mlp=1), *stack("decoder", mlp=2),
    *under("decoder.block.{layers}.layer.1.", "decoder.blocks.{layers}.", (
        ("EncDecAttention.{q,k,v,o}.weight", "cross.{q,k,v,out}_proj.weight"),
        ("layer_norm.weight", "cross_norm.weight"))),
    ("shared.weight", "token_embed.weight"), ("lm_head.weight", "output.weight")))
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")      # of shared.weight
ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SIZES = (("vocab_size", "vocab_size", 32128), ("context_length", "n_positions", 512),
         ("width", "d_model", 512), ("layers", "num_layers", 6), ("heads", "num_heads", 8),
         ("head_width", "d_kv", 64), ("hidden", "d_ff", 2048),
         ("buckets", "relative_attention_num_buckets", 32),
         ("max_distance", "relative_attention_max_distance", 128))
READ = ("dense_act_fn", "feed_forward_proj", "is_gated_act", "layer_norm_epsilon",
        "num_decoder_layers", "scale_decoder_outputs")


def config_fields(config, where):
    """A config.json's dict -> fields of a T5Config; ValueError for what ours cannot be."""
    fields = known_sizes(config, SIZES, {}, READ, where)
    # Newer files say whether the output is scaled, older ones that it is where the head is tied.
    scaled = given(config, "scale_decoder_outputs", given(config, "tie_word_embeddings", True))
    mlp = given(config, "feed_forward_proj", "relu")
    if scaled is not False or mlp != "gated-gelu":
        raise ValueError(f"{where}: a T5 with the MLPs {mlp!r:.80} and the output scaled: "
                         f"{scaled!r:.80}; ours is FLAN-T5, 'gated-gelu' and False")
    act = given(config, "dense_act_fn", "gelu_new")
    if act not in [*ACTS]:               # not a dict's "in": the file may hold a list
        raise ValueError(f"{where}: dense_act_fn is {act!r:.80}, ours is one of {', '.join(ACTS)}")
    if given(config, "num_decoder_layers", fields["layers"]) != fields["layers"]:
        raise ValueError(f"{where}: num_decoder_layers is {config['num_decoder_layers']!r:.80}, "
                         f"ours num_layers, {fields['layers']}")
    return fields | {"kind": "t5", "act": ACTS[act],
                     "eps": positive(config, "layer_norm_epsilon", 1e-6, where)}


def translated(weights, fields, path):
    """Weights under their names -> under ours. The head is the token table where it is left out."""
    table = next((weights[name] for name in ("shared.weight", *COPIES) if name in weights), None)
    if table is not None:
        weights = {"lm_head.weight": table} | weights | {"shared.weight": table}
    return translate(weights, Table(TABLE.rows, COPIES), {"layers": fields["layers"]}, path)
