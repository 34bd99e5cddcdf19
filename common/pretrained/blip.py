"""BLIP's published weights: Hugging Face's folders, and Salesforce's .pth files.

The tables have their names on the left and ours on the right. The parts of a file say what it was
trained for: captions, questions, retrieval, or pre-training. What Salesforce's files leave out:
heads are 64 wide. Their momentum encoders and queues are not read.
"""
import math
from pathlib import Path

import torch

from common.data.safe_read import read_json
from common.pretrained.clip import heads, preprocessing
from common.pretrained.files import known_sizes, positive, read_weights, section, whole
from common.pretrained.names import Table, count, thirds, translate, under
from common.pretrained.wordpiece import WordPiece


def class_token(weight):
    """(1, 1, D) -> (D,)."""
    return weight.view(weight.shape[-1]),


def positions(weight):
    """(1, 1 + N, D) -> (1 + N, D)."""
    return weight.flatten(0, 1),


def flatten_kernel(weight):
    """The kernel of a strided convolution (D, 3, P, P) -> of a Linear on patches (D, 3 * P * P)."""
    D, P = weight.shape[0], weight.shape[-1]
    return weight.view(D, 3, P, P).flatten(1, 3),


BERT = (
    ("embeddings.{word,position}_embeddings.weight", "{token,pos}_embed.weight"),
    ("embeddings.LayerNorm.{weight,bias}", "norm.{weight,bias}"),
    *under("encoder.layer.{text}.", "blocks.{text}.", (
        ("{attention,crossattention}.self.{query,key,value}.{weight,bias}",
         "{attn,cross}.{q,k,v}_proj.{weight,bias}"),
        ("{attention,crossattention}.output.{dense,LayerNorm}.{weight,bias}",
         "{attn.out_proj,attn_norm,cross.out_proj,cross_norm}.{weight,bias}"),
        ("{intermediate,output}.dense.{weight,bias}", "mlp.{fc1,fc2}.{weight,bias}"),
        ("output.LayerNorm.{weight,bias}", "mlp_norm.{weight,bias}"))),
)
PREDICTIONS = "text_decoder.cls.predictions."
TEXT = (                                 # the same in both layouts
    *under("text_encoder.", "encoder.", BERT),
    *under("text_decoder.bert.", "decoder.", BERT),
    *under(PREDICTIONS, "decoder.head.", (
        ("transform.{dense,LayerNorm}.{weight,bias}", "{dense,norm}.{weight,bias}"),
        ("bias", "bias"))),
    ("{vision,text}_proj.{weight,bias}", "{image,text}_projection.{weight,bias}"),
    ("itm_head.{weight,bias}", "itm_head.{weight,bias}"),
    ("temp", "temp"),
)
HUGGING_FACE_VIT = (
    *under("embeddings.", "", (
        ("class_embedding", "cls_token", class_token),
        ("position_embedding", "pos_embed", positions),
        ("patch_embedding.weight", "patch_embed.weight", flatten_kernel),
        ("patch_embedding.bias", "patch_embed.bias"))),
    *under("encoder.layers.{vision}.", "transformer.blocks.{vision}.", (
        ("self_attn.qkv.weight", "attn.{q,k,v}_proj.weight", thirds),
        ("self_attn.qkv.bias", "attn.{q,k,v}_proj.bias", thirds),
        ("self_attn.projection.{weight,bias}", "attn.out_proj.{weight,bias}"),
        ("layer_norm{1,2}.{weight,bias}", "{attn,mlp}_norm.{weight,bias}"),
        ("mlp.{fc1,fc2}.{weight,bias}", "mlp.{fc1,fc2}.{weight,bias}"))),
)
HUGGING_FACE = (
    *under("vision_model.", "vision.", HUGGING_FACE_VIT),
    ("vision_model.post_layernorm.{weight,bias}", "vision.ln_post.{weight,bias}"),
)
SALESFORCE_VIT = (
    ("cls_token", "cls_token", class_token),
    ("pos_embed", "pos_embed", positions),
    ("patch_embed.proj.weight", "patch_embed.weight", flatten_kernel),
    ("patch_embed.proj.bias", "patch_embed.bias"),
    *under("blocks.{vision}.", "transformer.blocks.{vision}.", (
        ("attn.qkv.weight", "attn.{q,k,v}_proj.weight", thirds),
        ("attn.qkv.bias", "attn.{q,k,v}_proj.bias", thirds),
        ("attn.proj.{weight,bias}", "attn.out_proj.{weight,bias}"),
        ("norm{1,2}.{weight,bias}", "{attn,mlp}_norm.{weight,bias}"),
        ("mlp.{fc1,fc2}.{weight,bias}", "mlp.{fc1,fc2}.{weight,bias}"))),
)
SALESFORCE = (
    *under("visual_encoder.", "vision.", SALESFORCE_VIT),
    ("visual_encoder.norm.{weight,bias}", "vision.ln_post.{weight,bias}"),
)
# The output matrix is the token table, see `check_tied`.
NOT_READ = (PREDICTIONS + "decoder.*", "*.position_ids", "visual_encoder_m.*", "text_encoder_m.*",
            "vision_proj_m.*", "text_proj_m.*", "*queue", "queue_ptr")

# (a text encoder, a text decoder, a head for matching) -> the losses that need them.
LOSSES = {(False, True, False): "lm", (True, True, False): "vqa", (True, False, True): "itc,itm",
          (True, True, True): "itc,itm,lm"}
# Sizes in a config.json: (ours, theirs, the default where it is left out).
HF_SIZES = {
    "text": (("text_width", "hidden_size", 768), ("text_layers", "num_hidden_layers", 12),
             ("context_length", "max_position_embeddings", 512),
             ("vocab_size", "vocab_size", 30524)),
    "vision": (("vision_width", "hidden_size", 768), ("vision_layers", "num_hidden_layers", 12),
               ("vision_heads", "num_attention_heads", 12), ("image_size", "image_size", 384),
               ("patch_size", "patch_size", 16)),
}
REQUIRED = {"text": {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,),
                     "position_embedding_type": ("absolute",)},
            "vision": {"hidden_act": ("gelu",), "num_channels": (3,)}}
READ = ("encoder_hidden_size", "intermediate_size", "layer_norm_eps", "num_attention_heads",
        "projection_dim")                # of each tower; shapes say most of them
TOP = ("image_text_hidden_size", "projection_dim", "text_config", "vision_config")


def read(path):
    """A published BLIP -> (fields of its config, weights under our names, its tokenizer).

    path: a Hugging Face folder, or a file of Salesforce's with vocab.txt beside it. Raises
    ValueError in one line for whatever is missing, damaged or of another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = read_weights(path)
    parts = tuple(any(name.startswith(part) for name in weights)
                  for part in ("text_encoder.", "text_decoder.", "itm_head."))
    if parts not in LOSSES:
        raise ValueError(f"{path}: not the weights of a BLIP for captions, questions, retrieval or "
                         "pre-training")
    losses, is_pretrained = LOSSES[parts], all(parts)
    check_tied(weights, is_pretrained, path)
    if path.is_dir() or any(name.startswith("vision_model.") for name in weights):
        where = folder / "config.json"
        fields, weights = hugging_face(weights, read_json(where, dict), where)
    else:
        fields, weights = salesforce(weights, path)
    if "itc" in losses:                  # Hugging Face leaves temp out; the queues are empty
        queue = torch.zeros(0, fields["embed_dim"])
        weights = {"temp": torch.tensor(0.07), "image_queue": queue, "text_queue": queue,
                   "queue_next": torch.tensor(0)} | weights
    tokenizer = WordPiece.load(folder)
    if len(tokenizer) != fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, [DEC] and [ENC] "
                         f"included, but the weights have rows for {fields['vocab_size']}")
    preprocessing(folder, fields["image_size"])
    fields |= {"losses": losses, "sharing": "all-but-sa" if is_pretrained else "none",
               "momentum": 0.0, "queue_size": 0, "pad_id": tokenizer.pad_id,
               "eos_id": tokenizer.eos_id, "cls_id": tokenizer.bos_id, "enc_id": tokenizer.enc_id,
               "dec_id": tokenizer.dec_id}
    return fields, weights, tokenizer


def check_tied(weights, shared, where):
    """ValueError unless the tensors are equal that a file may hold twice and our model has once.

    They are the token table and the output matrix, the two names of its bias, and, if shared, all
    that text encoder and decoder have beside self-attention.
    """
    decoder = "text_decoder.bert."
    twins = {PREDICTIONS + "decoder.weight": decoder + "embeddings.word_embeddings.weight",
             PREDICTIONS + "decoder.bias": PREDICTIONS + "bias"}
    twins |= {name: decoder + name.removeprefix("text_encoder.") for name in weights
              if shared and name.startswith("text_encoder.") and ".attention." not in name}
    check_equal(weights, twins, where)


def check_equal(weights, twins, where):
    """ValueError unless for each name: twin the tensors are equal, where the file has both."""
    for name, twin in twins.items():
        if name in weights and twin in weights and not torch.equal(weights[name], weights[twin]):
            raise ValueError(f"{where}: {name} and {twin} differ, which its training ties")


def hugging_face(weights, config, path):
    """Weights under Hugging Face's names, a config.json's dict -> (fields, weights of ours)."""
    if config.get("model_type") != "blip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r:.80}, not 'blip'")
    towers = {part: section(config, f"{part}_config", path) for part in HF_SIZES}
    fields = known_sizes(config, (), {}, TOP, path)
    for part, tower in towers.items():
        fields |= known_sizes(tower, HF_SIZES[part], REQUIRED[part], READ, f"{path}: {part}_config")
    # Their defaults are 8 heads and an eps of 1e-5; the weights were trained with 12 and 1e-6.
    fields["text_heads"] = whole(towers["text"], "num_attention_heads",
                                 fields["text_width"] // 64, f"{path}: text_config")
    fields["vision_eps"] = positive(towers["vision"], "layer_norm_eps", 1e-6, path)
    fields["embed_dim"] = whole(config, "image_text_hidden_size", 256, path)
    counts = {"text": fields["text_layers"], "vision": fields["vision_layers"]}
    return fields, translate(weights, Table(HUGGING_FACE + TEXT, NOT_READ), counts, path)


def salesforce(weights, path):
    """Weights under Salesforce's names -> (fields read off the shapes, weights of ours).

    A size that is no whole number is rounded, and refused later by `checkpoint.load_weights`.
    """
    counts = {"text": count(weights, r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\."),
              "vision": count(weights, r"visual_encoder\.blocks\.(\d+)\.")}
    weights = translate(weights, Table(SALESFORCE + TEXT, NOT_READ), counts, path)

    def shape(name):
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(f"{path}: not the weights of a BLIP (no matrix {name}, our name)")
        return tuple(weights[name].shape)
    part = "encoder" if "encoder.token_embed.weight" in weights else "decoder"
    vocab_size, text_width = shape(f"{part}.token_embed.weight")
    vision_width, inputs = shape("vision.patch_embed.weight")                    # inputs: 3 * P * P
    patch_size = max(1, math.isqrt(inputs // 3))
    grid_size = math.isqrt(max(0, shape("vision.pos_embed")[0] - 1))
    return {"vocab_size": vocab_size, "text_width": text_width, "text_layers": counts["text"],
            "text_heads": heads(text_width, path), "vision_eps": 1e-6,
            "context_length": shape(f"{part}.pos_embed.weight")[0],
            "embed_dim": shape("image_projection.weight")[0] if "itm_head.weight" in weights
            else 256,
            "vision_width": vision_width, "vision_layers": counts["vision"],
            "vision_heads": heads(vision_width, path), "patch_size": patch_size,
            "image_size": patch_size * grid_size}, weights
