"""CLIP's published weights: Hugging Face's folders, OpenAI's .pt files, open_clip's.

The tables have their names on the left and ours on the right. What OpenAI's files leave out: heads
are 64 wide, and the activation is quick_gelu. open_clip's own weights need gelu except where the
model's name ends in -quickgelu.
"""
import math
import sys
from pathlib import Path

from common.data.images import MEAN, STD
from common.data.safe_read import read_json
from common.pretrained.bpe import BPE, CLIP
from common.pretrained.files import given, is_script, read_weights, section, whole
from common.pretrained.names import Table, count, flatten_patches, thirds, translate, transpose
from common.pretrained.names import under

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
    ("vision_model.{pre_layrnorm,post_layernorm}.{weight,bias}",      # layrnorm: their spelling
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

# Sizes in a config.json: (ours, theirs, the default where it is left out).
HF_SIZES = {
    "text": (("text_width", "hidden_size", 512), ("text_layers", "num_hidden_layers", 12),
             ("text_heads", "num_attention_heads", 8),
             ("context_length", "max_position_embeddings", 77),
             ("vocab_size", "vocab_size", 49408)),
    "vision": (("vision_width", "hidden_size", 768), ("vision_layers", "num_hidden_layers", 12),
               ("vision_heads", "num_attention_heads", 12), ("image_size", "image_size", 224),
               ("patch_size", "patch_size", 32)),
}


def read(path, act=None):
    """A published CLIP -> (fields of its config, weights under our names, its tokenizer).

    path: a Hugging Face folder, or a file of OpenAI's or open_clip's with its vocabulary beside it.
    act: "gelu" or "quick_gelu", for files that do not say which; None: see `open_clip_act`. Raises
    ValueError in one line for whatever is missing, damaged or of another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = read_weights(path)
    if path.is_dir() or any(name.startswith("vision_model.") for name in weights):
        fields, weights = hugging_face(weights, folder / "config.json")
    else:
        fields, weights = openai(weights, path)
        fields["act"] = act or open_clip_act(folder, path)
    tokenizer = BPE.load(folder, CLIP)
    if len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    check_preprocessing(folder / "preprocessor_config.json", fields["image_size"])
    # The vocabulary's eos_id: many a config.json says 2, wrongly.
    return fields | {"act": act or fields["act"], "eos_id": tokenizer.eos_id}, weights, tokenizer


def hugging_face(weights, path):
    """Weights under Hugging Face's names and their config.json -> (fields, weights of ours)."""
    config = read_json(path, dict)
    if config.get("model_type") != "clip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r:.80}, not 'clip'")
    towers = {part: section(config, f"{part}_config", path)            # old files have both
              | section(config, f"{part}_config_dict", path) for part in HF_SIZES}
    for part, tower in towers.items():
        if given(tower, "layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{path}: {part} layer_norm_eps is {tower['layer_norm_eps']!r:.80}, "
                             "ours 1e-05")
    fields = {ours: whole(towers[part], theirs, default, f"{path}: {part}_config")
              for part, sizes in HF_SIZES.items() for ours, theirs, default in sizes}
    fields["embed_dim"] = whole(config, "projection_dim", 512, path)
    acts = [given(tower, "hidden_act", "quick_gelu") for tower in towers.values()]
    if acts[0] != acts[1] or acts[0] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act is {acts[0]!r:.80} for texts and {acts[1]!r:.80} for "
                         "images; ours is gelu or quick_gelu for both")
    fields["act"] = acts[0]
    counts = {"text": fields["text_layers"], "vision": fields["vision_layers"]}
    return fields, translate(weights, HUGGING_FACE, counts, path)


def check_preprocessing(path, image_size):
    """ValueError when the file describes another preprocessing than ours, where there is one.

    path: of a preprocessor_config.json, or of a processor_config.json, which may hold one.
    """
    config = read_json(path, dict) if path.is_file() else {}
    config = section(config, "image_processor", path) or config       # in a processor_config.json
    for name, ours in (("image_mean", list(MEAN)), ("image_std", list(STD)), ("resample", 3),
                       ("size", image_size), ("crop_size", image_size)):
        theirs = given(config, name, ours)
        sides = list(theirs.values()) if isinstance(theirs, dict) else [theirs]
        if sides != [ours] * len(sides):           # {"shortest_edge": 224}, or height and width
            raise ValueError(f"{path}: {name} is {theirs!r:.80}, ours {ours}")


def openai(weights, path):
    """Weights under OpenAI's or open_clip's names -> (fields read off the shapes, weights of ours).

    A size that is no whole number is rounded, and refused later by `checkpoint.load_weights`.
    """
    weights = {name.removeprefix("text."): weight for name, weight in weights.items()}
    counts = {"text": count(weights, r"transformer\.resblocks\.(\d+)\."),
              "vision": count(weights, r"visual\.transformer\.resblocks\.(\d+)\.")}
    counts |= {stage: count(weights, rf"visual\.{stage}\.(\d+)\.") for stage in STAGES}
    is_vit = "visual.proj" in weights
    weights = translate(weights, OPENAI["vit" if is_vit else "resnet"], counts, path)

    def shape(name):
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(f"{path}: not the weights of a CLIP (no matrix {name}, our name)")
        return tuple(weights[name].shape)
    vocab_size, text_width = shape("text.token_embed.weight")
    fields = {"vocab_size": vocab_size, "text_width": text_width, "text_layers": counts["text"],
              "text_heads": heads(text_width, path), "context_length": shape("text.pos_embed")[0],
              "embed_dim": shape("text_projection.weight")[0]}
    if is_vit:
        vision_width, inputs = shape("vision.patch_embed.weight")                # inputs: 3 * P * P
        patch_size = max(1, math.isqrt(inputs // 3))
        grid_size = math.isqrt(max(0, shape("vision.pos_embed")[0] - 1))
        head_width = 80 if vision_width == 1280 else 64                      # 80: open_clip's H/14
        fields |= {"vision_width": vision_width, "vision_layers": counts["vision"],
                   "vision_heads": heads(vision_width, path, head_width), "patch_size": patch_size,
                   "image_size": patch_size * grid_size}
    else:
        cells, pool_width = shape("vision.pool.pos_embed")
        fields |= {"vision_width": pool_width // 32, "vision_heads": heads(pool_width, path),
                   "stages": tuple(counts[stage] for stage in STAGES),
                   "image_size": 32 * math.isqrt(max(0, cells - 1))}
    return fields, weights


def heads(width, path, head_width=64):
    """How many heads a tower has. All of OpenAI's are 64 wide, which no shape says."""
    if width % head_width:
        raise ValueError(f"{path}: a tower of width {width}, but published heads are {head_width} "
                         "wide")
    return width // head_width


def open_clip_act(folder, weights):
    """The activation that an open_clip_config.json names, else quick_gelu, OpenAI's."""
    path = folder / "open_clip_config.json"
    if path.is_file():
        config = read_json(path, dict).get("model_cfg")
        return "quick_gelu" if isinstance(config, dict) and config.get("quick_gelu") else "gelu"
    if not is_script(weights):
        print(f"{weights}: taken for weights with quick_gelu; for open_clip's own put their "
              "open_clip_config.json beside it, or say act=\"gelu\"", file=sys.stderr)
    return "quick_gelu"
