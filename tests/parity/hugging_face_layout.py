"""Weights of ours under Hugging Face's names, by patterns that are replaced one after the other."""
import re

import torch

CLIP = {
    "vision.transformer.blocks": "vision_model.encoder.layers",
    "text.transformer.blocks": "text_model.encoder.layers", ".attn_norm": ".layer_norm1",
    ".mlp_norm": ".layer_norm2", ".attn.": ".self_attn.",
    "text.transformer.norm": "text_model.final_layer_norm",
    "vision.cls_token": "vision_model.embeddings.class_embedding",
    "vision.patch_embed": "vision_model.embeddings.patch_embedding",
    "vision.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "text.pos_embed": "text_model.embeddings.position_embedding.weight",
    "text.token_embed": "text_model.embeddings.token_embedding",
    "vision.ln_pre": "vision_model.pre_layrnorm",
   "vision.ln_post": "vision_model.post_layernorm", "image_projection": "visual_projection"}
# A norm's name misleads in OPT ("final", of a layer) and LLaMA ("post" attention).
LANGUAGE = {
    "gpt2": {"token_embed": "transformer.wte", "pos_embed": "transformer.wpe",
             "blocks": "transformer.h", "^norm": "transformer.ln_f", "attn_norm": "ln_1",
             "mlp_norm": "ln_2", "attn.out_proj": "attn.c_proj", "fc1": "c_fc", "fc2": "c_proj"},
    "opt": {"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "[.]mlp": "",
            "[.]attn": ".self_attn", "blocks": "model.decoder.layers",
            "^norm": "model.decoder.final_layer_norm", "pos_embed": "model.decoder.embed_positions",
            "token_embed": "model.decoder.embed_tokens"},
    "llama": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
              "[.]attn": ".self_attn", "out_proj": "o_proj", "blocks": "model.layers",
              "^norm": "model.norm", "token_embed": "model.embed_tokens", "^output": "lm_head"}}


def renamed(name, words):
    for word, other in words.items():
        name = re.sub(word, other, name)
    return name


def clip(ours, config):
    """A CLIP's state dict -> the one that transformers saves."""
    theirs = {"text_model.embeddings.position_ids": torch.arange(config["context_length"])[None]}
    for name, weight in ours.items():
        if "patch_embed" in name:                        # a strided convolution
            weight = weight.view(len(weight), 3, config["patch_size"], config["patch_size"])
        theirs[renamed(name, CLIP)] = weight
    return theirs


def language(ours, kind):
    """A LanguageModel's state dict -> the one that transformers saves, masks included."""
    theirs = {"gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 5, 5),
                       "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
              "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
              }.get(kind, {})
    for name, weight in ours.items():
        if kind == "gpt2" and "q_proj" in name:          # three in one
            weight = torch.cat([ours[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("q_proj", "c_attn")
        name = renamed(name, LANGUAGE[kind])
        if kind != "gpt2" or "k_proj" not in name and "v_proj" not in name:
            turned = kind == "gpt2" and ".c_" in name    # it is multiplied from the right
            theirs[name] = weight.mT if turned and weight.ndim == 2 else weight
    return theirs


# What is before the language model's layers, its head, the image encoder's parts, and all others.
LLAVA = {"old": ("language_model.model", "language_model.lm_head", "vision_tower.vision_model", ""),
         "memory": ("model.language_model", "lm_head", "model.vision_tower", "model."),
         "written": ("language_model.model", "language_model.lm_head", "vision_tower", "")}


def llava(ours, config, layout):
    """A LLaVA's state dict -> as transformers has it, with the block that ours leaves out."""
    text, head, vision, other = LLAVA[layout]
    parts = {part: {name: weight for name, weight in ours.items() if name.startswith(f"{part}.")}
             for part in ("vision", "lm")}
    first, last = (f"vision.transformer.blocks.{i}." for i in (0, config["vision_layers"] - 1))
    tower = parts["vision"] | {name.replace(first, last): weight + 1 for name, weight
                               in parts["vision"].items() if name.startswith(first)}
    tower |= {f"vision.ln_post.{kind}": torch.ones(config["vision_width"])
              for kind in ("weight", "bias")}
    lm = language({name[3:]: weight for name, weight in parts["lm"].items()}, "llama")
    words = {"model.": f"{text}.", "lm_head": head, "vision_model": vision,
             "row_end": f"{other}image_newline",
             "projector.0": f"{other}multi_modal_projector.linear_1",
             "projector.2": f"{other}multi_modal_projector.linear_2"}
    theirs = clip(tower, config | {"context_length": 1}) | lm | {
        name: weight for name, weight in ours.items() if name.startswith(("projector", "row_end"))}
    return {re.sub(f"^({'|'.join(words)})", lambda match: words[match[0]], name): weight
            for name, weight in theirs.items() if not name.startswith("text_model")}
