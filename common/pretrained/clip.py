"""CLIP's published weights: Hugging Face's folders, OpenAI's .pt files, open_clip's.

The tables are data: their names left, ours right. What the files do not say is said here: heads are
64 wide (80 in a vision tower of width 1280), and OpenAI's weights need quick_gelu. open_clip's own
weights need gelu except where the model's name ends in -quickgelu; see `read`.
"""
import math
import sys
from pathlib import Path

from common.pretrained.bpe import BPE, CLIP
from common.data.images import MEAN, STD
from common.pretrained import files, strict_json
from common.pretrained.names import (Table, count, flatten_patches, thirds, translate, transpose,
                                     under)
from common.pretrained.strict_json import printable

HF_BLOCK = (
    (".self_attn.{q,k,v,out}_proj.{weight,bias}", ".attn.{q,k,v,out}_proj.{weight,bias}"),
    (".layer_norm{1,2}.{weight,bias}", ".{attn,mlp}_norm.{weight,bias}"),
    (".mlp.{fc1,fc2}.{weight,bias}", ".mlp.{fc1,fc2}.{weight,bias}"),
)
HUGGING_FACE = Table((
    ("logit_scale", "logit_scale"),
    ("vision_model.embeddings.class_embedding", "vision.cls_token"),
    ("vision_model.embeddings.position_embedding.weight", "vision.pos_embed"),
    ("vision_model.embeddings.patch_embedding.weight", "vision.patch_embed.weight",
     flatten_patches),
    ("vision_model.{pre_layrnorm,post_layernorm}.{weight,bias}",      # layrnorm: it is their word
     "vision.ln_{pre,post}.{weight,bias}"),
    *under("vision_model.encoder.layers.{vision}", "vision.transformer.blocks.{vision}", HF_BLOCK),
    ("visual_projection.weight", "image_projection.weight"),
    ("text_model.embeddings.token_embedding.weight", "text.token_embed.weight"),
    ("text_model.embeddings.position_embedding.weight", "text.pos_embed"),
    *under("text_model.encoder.layers.{text}", "text.transformer.blocks.{text}", HF_BLOCK),
    ("text_model.final_layer_norm.{weight,bias}", "text.transformer.norm.{weight,bias}"),
    ("text_projection.weight", "text_projection.weight"),
), ignored=("*.embeddings.position_ids",))

OPENAI_BLOCK = (
    (".attn.in_proj_weight", ".attn.{q,k,v}_proj.weight", thirds),
    (".attn.in_proj_bias", ".attn.{q,k,v}_proj.bias", thirds),
    (".attn.out_proj.{weight,bias}", ".attn.out_proj.{weight,bias}"),
    (".ln_{1,2}.{weight,bias}", ".{attn,mlp}_norm.{weight,bias}"),
    (".mlp.{c_fc,c_proj}.{weight,bias}", ".mlp.{fc1,fc2}.{weight,bias}"),
)
OPENAI_TEXT = (
    ("logit_scale", "logit_scale"),
    ("token_embedding.weight", "text.token_embed.weight"),
    ("positional_embedding", "text.pos_embed"),
    *under("transformer.resblocks.{text}", "text.transformer.blocks.{text}", OPENAI_BLOCK),
    ("ln_final.{weight,bias}", "text.transformer.norm.{weight,bias}"),
    ("text_projection", "text_projection.weight", transpose),
)
OPENAI_VIT = (
    ("visual.class_embedding", "vision.cls_token"),
    ("visual.positional_embedding", "vision.pos_embed"),
    ("visual.conv1.weight", "vision.patch_embed.weight", flatten_patches),
    ("visual.ln_{pre,post}.{weight,bias}", "vision.ln_{pre,post}.{weight,bias}"),
    *under("visual.transformer.resblocks.{vision}", "vision.transformer.blocks.{vision}",
           OPENAI_BLOCK),
    ("visual.proj", "image_projection.weight", transpose),
)
BATCH_NORM = ".{weight,bias,running_mean,running_var,num_batches_tracked}"
CONVOLUTIONS = (
    (".conv{1,2,3}.weight", ".conv{1,2,3}.weight"),
    (".bn{1,2,3}" + BATCH_NORM, ".bn{1,2,3}" + BATCH_NORM),
)
SHORTCUT = (
    (".downsample.0.weight", ".shortcut.conv.weight"),
    (".downsample.1" + BATCH_NORM, ".shortcut.bn" + BATCH_NORM),
)
STAGES = ("layer1", "layer2", "layer3", "layer4")
OPENAI_RESNET = (
    *under("visual", "vision", CONVOLUTIONS),
    *(row for stage in STAGES for row in (
        *under(f"visual.{stage}.{{{stage}}}", f"vision.{stage}.{{{stage}}}", CONVOLUTIONS),
        *under(f"visual.{stage}.0", f"vision.{stage}.0", SHORTCUT))),
    ("visual.attnpool.positional_embedding", "vision.pool.pos_embed"),
    ("visual.attnpool.{q,k,v,c}_proj.{weight,bias}", "vision.pool.{q,k,v,out}_proj.{weight,bias}"),
)
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
OPENAI = {"vit": Table(OPENAI_TEXT + OPENAI_VIT, NO_WEIGHTS),
          "resnet": Table(OPENAI_TEXT + OPENAI_RESNET, NO_WEIGHTS)}

# What Hugging Face leaves out of a config.json: (ours, theirs, their default).
HF_TEXT = (("text_width", "hidden_size", 512), ("text_layers", "num_hidden_layers", 12),
           ("text_heads", "num_attention_heads", 8), ("context_length", "max_position_embeddings", 77),
           ("vocab_size", "vocab_size", 49408))
HF_VISION = (("vision_width", "hidden_size", 768), ("vision_layers", "num_hidden_layers", 12),
             ("vision_heads", "num_attention_heads", 12), ("image_size", "image_size", 224),
             ("patch_size", "patch_size", 32))
MOST_LAYERS = 1000


def read(path, act=None):
    """A published CLIP -> (fields of its config, weights under our names, its tokenizer).

    path: a Hugging Face folder, or a file of OpenAI's or open_clip's with its vocabulary beside it.
    act: "gelu" or "quick_gelu", for files that cannot say it; without it an open_clip_config.json
    beside the file decides, and where there is none it is quick_gelu, OpenAI's; that is said on
    stderr when the file is no TorchScript archive as OpenAI's are.
    Raises ValueError in one line for whatever is missing, damaged or of another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    said = hugging_face_config(folder) if path.is_dir() else None
    tokenizer = BPE.load(folder, CLIP)
    weights = files.read_weights(path)
    if said is None and any(name.startswith("vision_model.") for name in weights):
        said = hugging_face_config(folder)
    if said is None:
        fields, weights = openai(weights, path)
        fields["act"] = act or open_clip_act(folder, path)
    else:
        fields, weights = hugging_face(weights, said, path)
        fields["act"] = act or fields["act"]
    if len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    check_end(said, tokenizer.eos_id, folder)
    check_pictures(folder, fields["image_size"])
    return fields | {"eos_id": tokenizer.eos_id}, weights, tokenizer


def hugging_face(weights, said, path):
    """Weights under Hugging Face's names, and their config.json -> (fields, weights of ours)."""
    where = f"{path}: config.json"
    fields = {}
    for part, names in (("text", HF_TEXT), ("vision", HF_VISION)):
        fields |= {ours: number(said[part].get(theirs, default), f"{where}: {part} {theirs}")
                   for ours, theirs, default in names}
    fields["embed_dim"] = number(said.get("projection_dim", 512), f"{where}: projection_dim")
    for part in ("text", "vision"):
        if fields[f"{part}_layers"] > MOST_LAYERS or fields[f"{part}_width"] % fields[
                f"{part}_heads"]:
            raise ValueError(f"{where}: no {part} tower has {fields[f'{part}_layers']} layers and "
                             f"{fields[f'{part}_heads']} heads at width {fields[f'{part}_width']}")
    counts = {"text": fields["text_layers"], "vision": fields["vision_layers"]}
    weights = translate(weights, HUGGING_FACE, counts, path)
    for name, size in (text_sizes(weights, path) | vit_sizes(weights, path)).items():
        if fields[name] != size:
            raise ValueError(f"{where}: {name} would be {fields[name]}, the weights say {size}")
    return fields | {"act": hugging_face_act(said, where)}, weights


def hugging_face_config(folder):
    """config.json of a CLIP with the parts "text" and "vision" as dicts. Raises ValueError."""
    said = files.read_config(folder)
    if said.get("model_type") != "clip":
        raise ValueError(f"{folder}: config.json is of a model of type "
                         f"{printable(said.get('model_type'))}, not of 'clip'")
    for part in ("text", "vision"):
        said[part] = {}
        for key in (f"{part}_config", f"{part}_config_dict"):         # old files have both
            value = said.get(key)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{folder}: config.json: {key} is no JSON object")
            said[part] |= value or {}
    return said


def hugging_face_act(said, where):
    """The activation of both towers, "gelu" or "quick_gelu"; ValueError if it is none of ours."""
    acts = {part: said[part].get("hidden_act", "quick_gelu") for part in ("text", "vision")}
    if acts["text"] != acts["vision"] or acts["text"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{where}: hidden_act is {printable(acts['text'])} for texts and "
                         f"{printable(acts['vision'])} for pictures; gelu or quick_gelu for both is "
                         "what we have")
    for part in ("text", "vision"):
        eps = said[part].get("layer_norm_eps", 1e-5)
        if eps != 1e-5:
            raise ValueError(f"{where}: {part} layer_norm_eps is {printable(eps)}, ours 1e-05")
    return acts["text"]


def check_end(said, eos, folder):
    """The config's end-of-text id must be the vocabulary's; 2, in many old files, is a mistake."""
    given = (said or {}).get("text", {}).get("eos_token_id", 2)
    if given not in (2, eos):
        raise ValueError(f"{folder}: config.json: eos_token_id is {printable(given)}, but the "
                         f"vocabulary's {CLIP.eos} is {eos}")


def openai(weights, path):
    """Weights under OpenAI's or open_clip's names -> (fields of a config, weights under ours).

    All sizes are read off the shapes, as OpenAI's build_model does; heads follow from the widths.
    """
    weights = {name.removeprefix("text."): weight for name, weight in weights.items()}
    tower = "vit" if "visual.proj" in weights else "resnet"
    counts = {"text": count(weights, r"transformer\.resblocks\.(\d+)\."),
              "vision": count(weights, r"visual\.transformer\.resblocks\.(\d+)\.")}
    counts |= {stage: count(weights, rf"visual\.{stage}\.(\d+)\.") for stage in STAGES}
    weights = translate(weights, OPENAI[tower], counts, path)
    fields = text_sizes(weights, path) | {"text_layers": counts["text"]}
    if tower == "vit":
        fields |= vit_sizes(weights, path) | {"vision_layers": counts["vision"]}
        fields["vision_heads"] = heads(fields["vision_width"], path, {1280: 80})
    else:
        fields |= resnet_sizes(weights, path) | {"stages": tuple(counts[s] for s in STAGES)}
        fields["vision_heads"] = heads(32 * fields["vision_width"], path)
    return fields | {"text_heads": heads(fields["text_width"], path)}, weights


def open_clip_act(folder, weights):
    """The activation that an open_clip_config.json names, else quick_gelu."""
    path = folder / "open_clip_config.json"
    if not path.is_file():
        if not files.is_script(weights):
            print(f"{weights}: taken for weights with quick_gelu; for open_clip's own put their "
                  "open_clip_config.json beside it, or say act=\"gelu\"", file=sys.stderr)
        return "quick_gelu"
    said = strict_json.read_object(path).get("model_cfg")
    if not isinstance(said, dict):
        raise ValueError(f"{path}: no model_cfg in it")
    return "quick_gelu" if said.get("quick_gelu") is True else "gelu"


def heads(width, path, exceptions={}):
    """Heads are 64 wide in all that OpenAI published; no shape says it."""
    if width % 64:
        raise ValueError(f"{path}: a tower of width {width}, but published heads are 64 wide")
    return width // exceptions.get(width, 64)


def text_sizes(weights, path):
    """What the shapes of the text tower say, and the width of the joint space."""
    vocab, width = matrix(weights, "text.token_embed.weight", path)
    sizes = {"vocab_size": vocab, "text_width": width,
             "context_length": matrix(weights, "text.pos_embed", path)[0],
             "embed_dim": matrix(weights, "text_projection.weight", path)[0]}
    check_hidden(weights, "text", width, path)
    return sizes


def vit_sizes(weights, path):
    """What the shapes of a ViT say."""
    width, inputs = matrix(weights, "vision.patch_embed.weight", path)
    patch_size = root(inputs // 3, "pixels of a patch", path)
    cells = matrix(weights, "vision.pos_embed", path)[0] - 1
    check_hidden(weights, "vision", width, path)
    return {"vision_width": width, "patch_size": patch_size,
            "image_size": patch_size * root(cells, "patches of a picture", path)}


def resnet_sizes(weights, path):
    """What the shapes of a ResNet say."""
    cells, width = matrix(weights, "vision.pool.pos_embed", path)
    if width % 32 or matrix(weights, "vision.pool.q_proj.weight", path) != (width, width):
        raise ValueError(f"{path}: a pool of width {width}, but positions and projections of a "
                         "ResNet's pool have 32 times the width of its stem")
    return {"vision_width": width // 32,
            "image_size": 32 * root(cells - 1, "cells of a picture", path)}


def check_hidden(weights, tower, width, path):
    """The MLPs of our CLIP are 4 times as wide as their tower; larger ones were published too."""
    shape = matrix(weights, f"{tower}.transformer.blocks.0.mlp.fc1.weight", path)
    if shape != (4 * width, width):
        raise ValueError(f"{path}: an MLP of {shape} in a {tower} tower of width {width}; ours is "
                         f"{(4 * width, width)}")


def matrix(weights, name, path):
    """The two sides of a matrix, or ValueError."""
    if name not in weights:
        raise ValueError(f"{path}: no layers in it ({name}, our name, is missing)")
    if weights[name].ndim != 2 or 0 in weights[name].shape:
        raise ValueError(f"{path}: {name} (our name) is {tuple(weights[name].shape)}, no matrix")
    return tuple(weights[name].shape)


def root(number, what, path):
    """The side of a square, or ValueError."""
    side = math.isqrt(max(number, 0))
    if side < 1 or side * side != number:
        raise ValueError(f"{path}: {number} {what} are no square")
    return side


def number(value, where):
    """A whole number of at least 1, or ValueError."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is {printable(value)}, not a whole number")
    return value


def check_pictures(folder, image_size):
    """preprocessor_config.json, where there is one, must ask for what our pictures get.

    That is: the shorter side to image_size, bicubic, the middle, CLIP's mean and deviation.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    said = strict_json.read_object(path)
    for key, ours in (("image_mean", MEAN), ("image_std", STD)):
        theirs = said.get(key, list(ours))
        if not isinstance(theirs, list) or len(theirs) != 3 or not all(
                type(a) in (int, float) and abs(a - b) < 1e-4 for a, b in zip(theirs, ours)):
            raise ValueError(f"{path}: {key} is {printable(theirs)}, ours {list(ours)}")
    for key in ("size", "crop_size"):
        sides = said.get(key, image_size)
        for side in sides.values() if isinstance(sides, dict) else [sides]:
            if side != image_size:
                raise ValueError(f"{path}: {key} is {printable(sides)}, the weights' {image_size}")
    if said.get("resample", 3) != 3:
        raise ValueError(f"{path}: resample is {printable(said['resample'])}, ours 3 (bicubic)")
