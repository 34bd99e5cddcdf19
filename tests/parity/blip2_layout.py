"""Weights of a BLIP-2 of ours under the names of the published files, by patterns."""
import torch

from tests.parity import blip_layout, hugging_face_layout
from tests.parity.hugging_face_layout import renamed

QFORMER = {
    r"^qformer\.query_tokens": "query_tokens", r"\.blocks": ".encoder.layer",
    "attn_norm": "attention.output.LayerNorm", "cross_norm": "crossattention.output.LayerNorm",
    "text_mlp_norm": "output.LayerNorm", r"\.mlp_norm": ".output_query.LayerNorm",
    r"text_mlp\.fc1": "intermediate.dense", r"text_mlp\.fc2": "output.dense",
    r"\.mlp\.fc1": ".intermediate_query.dense", r"\.mlp\.fc2": ".output_query.dense",
    r"\.attn\.": ".attention.", r"\.cross\.": ".crossattention.", "out_proj": "output.dense",
    "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
TEXT = {r"^qformer\.token_embed": "embeddings.word_embeddings",
        r"^qformer\.pos_embed": "embeddings.position_embeddings",
        r"^qformer\.norm": "qformer.layernorm"}
INSTRUCT = {r"^qformer\.token_embed": "qformer.embeddings.word_embeddings",
            r"^qformer\.pos_embed": "qformer.embeddings.position_embeddings",
            r"^qformer\.norm": "qformer.embeddings.layernorm"}
OTHERS = {"^projection": "language_projection", "^image_projection": "vision_projection"}
LAVIS = {
    r"^qformer\.head\.": "Qformer.cls.predictions.",
    r"predictions\.dense": "predictions.transform.dense",
    r"predictions\.norm": "predictions.transform.LayerNorm",
    r"^qformer\.(token_embed|pos_embed|norm)": r"Qformer.bert.embeddings.\1",
    r"embeddings\.token_embed": "embeddings.word_embeddings",
    r"embeddings\.pos_embed": "embeddings.position_embeddings",
    r"embeddings\.norm": "embeddings.LayerNorm", r"^qformer\.blocks": "Qformer.bert.blocks",
    **QFORMER, r"attention\.attention\.": "attention.self.",
    "^image_projection": "vision_proj", "^text_projection": "text_proj"}
T5 = {r"^(encoder|decoder)_bias": r"\1.block.0.layer.0.SelfAttention.relative_attention_bias",
      r"^(encoder|decoder)\.norm": r"\1.final_layer_norm",
      r"encoder\.(.*)mlp": r"encoder.\1layer.1", r"decoder\.(.*)mlp": r"decoder.\1layer.2",
      r"(layer\..)_norm": r"\1.layer_norm",
      r"(layer\..)\.(gate|up|down)_proj": r"\1.DenseReluDense.\2", r"\.gate\.": ".wi_0.",
      r"\.up\.": ".wi_1.", r"\.down\.": ".wo.", "attn_norm": "layer.0.layer_norm",
      "cross_norm": "layer.1.layer_norm", r"\.attn\.": ".layer.0.SelfAttention.",
      r"\.cross\.": ".layer.1.EncDecAttention.", "out_proj": "o", "([qkv])_proj": r"\1",
      "blocks": "block", "^token_embed": "shared", "^output": "lm_head"}


def image_encoder(ours, names, patch_size):
    """The image encoder and its norm, as a BLIP's."""
    part = {name.replace("vision.vit.", "vision.").replace("vision.norm", "vision.ln_post"): weight
            for name, weight in ours.items() if name.startswith("vision.")}
    return blip_layout.write(part, names, patch_size)


def language(ours, kind):
    """A language model as transformers saves it, with the copies that a pickle of it has."""
    if kind != "t5":
        theirs = hugging_face_layout.language(ours, kind)
        copies = {"lm_head.weight": ours["token_embed.weight"]} if kind == "opt" else {}
    else:
        theirs = {renamed(name, T5): weight for name, weight in ours.items()}
        copies = {f"{part}.embed_tokens.weight": ours["token_embed.weight"]
                  for part in ("encoder", "decoder")}
    return theirs | copies


def hugging_face(ours, patch_size, kind=None, instruct=False):
    """As transformers saves it; kind: of the language model, None for retrieval."""
    theirs = image_encoder(ours, blip_layout.HUGGING_FACE, patch_size)
    words = (INSTRUCT if instruct else TEXT) | QFORMER | OTHERS
    for name, weight in ours.items():
        if not name.startswith(("vision.", "lm.", "temp")):
            theirs[renamed(name, words)] = weight[None] if "query_tokens" in name else weight
    lm = {name.removeprefix("lm."): weight for name, weight in ours.items() if name[:3] == "lm."}
    return theirs | {f"language_model.{name}": weight
                     for name, weight in (language(lm, kind) if kind else {}).items()}


def lavis(ours, patch_size):
    """As LAVIS's first stage saves it with its image encoder, whose keys have no bias."""
    theirs, head = {}, "Qformer.cls.predictions."
    for name, weight in image_encoder(ours, blip_layout.SALESFORCE, patch_size).items():
        if name.endswith("qkv.bias"):
            q, _, v = weight.chunk(3)
            theirs |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            theirs[name.replace("visual_encoder.norm.", "ln_vision.")] = weight
    for name, weight in ours.items():
        if not name.startswith("vision."):
            theirs[renamed(name, LAVIS)] = weight[None] if "query_tokens" in name else weight
    return theirs | {"Qformer.bert.embeddings.position_ids": torch.arange(11)[None],
                     head + "decoder.bias": ours["qformer.head.bias"],
                     head + "decoder.weight": ours["qformer.token_embed.weight"]}
