"""Weights of a BLIP of ours under the names of the published files, by patterns."""
import torch

from tests.parity.hugging_face_layout import renamed

TEXT = {
    r"^encoder\.": "text_encoder.", r"^decoder\.head\.": "text_decoder.cls.predictions.",
    r"^decoder\.": "text_decoder.bert.", r"predictions\.dense": "predictions.transform.dense",
    r"predictions\.norm": "predictions.transform.LayerNorm",
    "token_embed": "embeddings.word_embeddings", "pos_embed": "embeddings.position_embeddings",
    r"(encoder|bert)\.norm": r"\1.embeddings.LayerNorm", r"\.blocks": ".encoder.layer",
    "attn_norm": "attention.output.LayerNorm", "cross_norm": "crossattention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm", r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense",
    r"\.attn\.": ".attention.", r"\.cross\.": ".crossattention.", "out_proj": "output.dense",
    "q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value",
    "^image_projection": "vision_proj", "^text_projection": "text_proj"}
HUGGING_FACE = {
    "vision.cls_token": "vision_model.embeddings.class_embedding",
    "vision.pos_embed": "vision_model.embeddings.position_embedding",
    "vision.patch_embed": "vision_model.embeddings.patch_embedding",
    "vision.ln_post": "vision_model.post_layernorm",
    "vision.transformer.blocks": "vision_model.encoder.layers", "attn_norm": "layer_norm1",
    "mlp_norm": "layer_norm2", r"attn\.out_proj": "self_attn.projection",
    r"attn\.q_proj": "self_attn.qkv"}
SALESFORCE = {
    "vision.ln_post": "visual_encoder.norm",
    "vision.patch_embed": "visual_encoder.patch_embed.proj",
    "vision.transformer": "visual_encoder", "^vision": "visual_encoder", "attn_norm": "norm1",
    "mlp_norm": "norm2", r"attn\.out_proj": "attn.proj", r"attn\.q_proj": "attn.qkv"}


def write(ours, vision, patch_size):
    """A state dict of ours -> the published one; vision: HUGGING_FACE or SALESFORCE."""
    theirs = {}
    for name, weight in ours.items():
        if not name.startswith("vision."):
            theirs[renamed(name, TEXT)] = weight
            continue
        if "q_proj" in name:                             # three in one
            weight = torch.cat([ours[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif "k_proj" in name or "v_proj" in name:
            continue
        if name == "vision.patch_embed.weight":          # a strided convolution
            weight = weight.view(len(weight), 3, patch_size, patch_size)
        if name in ("vision.cls_token", "vision.pos_embed"):
            weight = weight.expand(1, -1, -1) if weight.ndim == 2 else weight[None, None]
        theirs[renamed(name, vision)] = weight
    for part in ("text_encoder.", "text_decoder.bert."):         # what files hold besides
        if part + "embeddings.position_embeddings.weight" in theirs:
            theirs[part + "embeddings.position_ids"] = torch.arange(11)[None]
    if "decoder.head.bias" in ours:
        head = "text_decoder.cls.predictions."
        theirs |= {head + "decoder.bias": ours["decoder.head.bias"],
                   head + "decoder.weight": ours["decoder.token_embed.weight"]}
    return theirs


def hugging_face(ours, patch_size):
    """As transformers saves it."""
    theirs = write(ours, HUGGING_FACE, patch_size)
    return {name: weight for name, weight in theirs.items()
            if name not in ("temp", "image_queue", "text_queue", "queue_next")}


def salesforce(ours, patch_size):
    """As Salesforce's training saved it, with momentum encoders and queues."""
    theirs = write(ours, SALESFORCE, patch_size)
    theirs.pop("queue_next", None)
    if "temp" in theirs:
        momentum = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        for name in [*theirs]:
            head, _, rest = name.partition(".")
            if head in momentum:
                theirs[f"{head}_m.{rest}"] = torch.zeros_like(theirs[name])
        queue = torch.ones(len(ours["image_projection.bias"]), 7)
        theirs |= {"image_queue": queue, "text_queue": queue, "idx_queue": torch.ones(1, 7),
                   "queue_ptr": torch.zeros(1).long(), "ptr_queue": torch.zeros(1).long()}
    return theirs
