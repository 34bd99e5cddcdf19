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
from common.pretrained.files import (given, is_script, known_sizes, read_weights, section,
                                      whole)
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
TOP = ("projection_dim", "text_config", "text_config_dict", "vision_config", "vision_config_dict")
REQUIRED = {"layer_norm_eps": (1e-5,), "num_channels": (3,)}          # of each tower
READ = ("hidden_act", "intermediate_size", "projection_dim")
# Of a preprocessor_config.json. CROP: CLIP's square. OWN: of a model that has a way of its own.
STEPS = {"do_resize": (True,), "do_rescale": (True,), "rescale_factor": (1 / 255,),
         "do_normalize": (True,), "do_convert_rgb": (True, False)}
CROP = {"do_center_crop": (True,), "resample": (3, 2)}
OWN = {"do_center_crop": (True, False), "do_pad": (True, False), "resample": (3,),
       "image_mean": (list(MEAN),), "image_std": (list(STD),)}
OTHERS = ("aspect_ratio_setting", "crop_size", "data_format", "default_to_square",
          "feature_extractor_type", "image_grid_pinpoints", "image_mean", "image_processor_type",
          "image_std", "processor_class", "size")
FILTERS = {"bicubic": 3, "bilinear": 2}              # Pillow's numbers, as in the files
# Parts of an open_clip_config.json: (their `required` and `read` of `known_sizes`).
OPEN_CLIP = {
    "model_cfg": ({}, ("custom_text", "embed_dim", "init_logit_scale", "quick_gelu", "text_cfg",
                       "vision_cfg")),
    "vision_cfg": ({"mlp_ratio": (4.0,), "pool_type": ("tok",), "pos_embed_type": ("learnable",)},
                   ("head_width", "image_size", "layers", "patch_size", "width")),
    "text_cfg": ({"mlp_ratio": (4.0,), "pool_type": ("argmax", "eos"), "proj_type": ("linear",)},
                 ("context_length", "eos_id", "heads", "layers", "pad_id", "vocab_size", "width")),
}
PREPROCESS = ({"interpolation": (*FILTERS,), "resize_mode": ("shortest",), "mode": ("RGB",)},
              ("mean", "size", "std"))   # of its preprocess_cfg
# Beginnings of names in open_clip's files of other towers than ours.
FAMILIES = {"visual.trunk.": "a timm image encoder, such as SigLIP's", "visual.blocks.": "EVA-CLIP",
            "visual.attn_pool.": "CoCa", "text_decoder.": "CoCa",
            "text.transformer.e": "a Hugging Face text encoder"}


def read(path, act=None):
    """A published CLIP -> (fields of its config, weights under our names, its tokenizer).

    path: a Hugging Face folder, or a file of OpenAI's or open_clip's with its vocabulary beside it.
    act: "gelu" or "quick_gelu", for files that do not say which; None: see `open_clip`. Raises
    ValueError in one line for whatever is missing, damaged or of another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = read_weights(path)
    if path.is_dir() or any(name.startswith("vision_model.") for name in weights):
        fields, weights = hugging_face(weights, folder / "config.json")
    else:
        fields, weights = openai(weights, path)
        fields |= open_clip(path, fields, loud=act is None)
    tokenizer = BPE.load(folder, CLIP)
    if len(tokenizer) != fields["vocab_size"]:
        raise ValueError(f"{folder}: a vocabulary of {len(tokenizer)} pieces, but the weights have "
                         f"rows for {fields['vocab_size']}")
    # The vocabulary's eos_id: many a config.json says 2, wrongly.
    return fields | {"act": act or fields["act"], "eos_id": tokenizer.eos_id}, weights, tokenizer


def hugging_face(weights, path):
    """Weights under Hugging Face's names and their config.json -> (fields, weights of ours)."""
    config = read_json(path, dict)
    if config.get("model_type") != "clip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r:.80}, not 'clip'")
    towers = {part: section(config, f"{part}_config", path)            # old files have both
              | section(config, f"{part}_config_dict", path) for part in HF_SIZES}
    fields = known_sizes(config, (), {}, TOP, path)
    for part, tower in towers.items():
        fields |= known_sizes(tower, HF_SIZES[part], REQUIRED, READ, f"{path}: {part}_config")
    fields["embed_dim"] = whole(config, "projection_dim", 512, path)
    acts = [given(tower, "hidden_act", "quick_gelu") for tower in towers.values()]
    if acts[0] != acts[1] or acts[0] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act is {acts[0]!r:.80} for texts and {acts[1]!r:.80} for "
                         "images; ours is gelu or quick_gelu for both")
    fields["act"] = acts[0]
    counts = {"text": fields["text_layers"], "vision": fields["vision_layers"]}
    return fields, translate(weights, HUGGING_FACE, counts, path)


def preprocessing(path, image_size, square=OWN):
    """What published files say of pictures -> {"mean", "std", "resample"}, by default CLIP's.

    path: a folder, or a file in it. square: as `required` of `known_sizes`, the ways to a square
    picture, CROP or OWN. Raises ValueError for other steps or sizes than ours.
    """
    found, folder = {"mean": MEAN, "std": STD, "resample": 3}, Path(path)
    folder = folder if folder.is_dir() else folder.parent
    for name in ("preprocessor_config.json", "processor_config.json", "open_clip_config.json"):
        path = folder / name
        config = read_json(path, dict) if path.is_file() else {}
        if name.startswith("open_clip"):
            part = section(config, "preprocess_cfg", path)
            known_sizes(part, (), *PREPROCESS, path)
            config = {"image_mean": part.get("mean"), "image_std": part.get("std"),
                      "size": part.get("size"), "resample": FILTERS.get(part.get("interpolation"))}
        elif "image_processor" in config or name.startswith("processor"):        # the newer one
            config = section(config, "image_processor", path)
        known_sizes(config, (), STEPS | square, OTHERS, path)
        for size in ("size", "crop_size"):
            theirs = given(config, size, image_size)
            sides = [*theirs.values()] if isinstance(theirs, dict) else theirs
            squashed = square is CROP and theirs is not sides and {*theirs} != {"shortest_edge"}
            if sides not in (image_size, [image_size], [image_size] * 2) or (
                    squashed and size == "size"):
                raise ValueError(f"{path}: {size} is {theirs!r:.80}, ours {image_size}"
                                 f"{' of the shortest_edge' if squashed else ''}")
        found = {"mean": three(config, "image_mean", found["mean"], path),
                 "std": three(config, "image_std", found["std"], path),
                 "resample": given(config, "resample", found["resample"])}
    return found


def read_part(path):
    """`read` for training, whose pictures are normalized by CLIP's own numbers, else ValueError."""
    fields, weights, tokenizer = read(path)
    found = preprocessing(path, fields["image_size"], CROP)
    if found != {"mean": MEAN, "std": STD, "resample": 3}:
        raise ValueError(f"{path}: pictures with the mean {found['mean']}, the deviation "
                         f"{found['std']} and the filter {found['resample']} can be searched, but "
                         "not trained on: ours are CLIP's own")
    return fields, weights, tokenizer


def three(config, name, default, where):
    """A field's three numbers, one for each channel, or ValueError."""
    value = given(config, name, default)
    least = 1e-6 if name.endswith("std") else 0
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(
            type(number) in (int, float) and least <= number < math.inf for number in value):
        raise ValueError(f"{where}: {name} is {value!r:.80}, not three numbers from {least}")
    return tuple(value)


def openai(weights, path):
    """Weights under OpenAI's or open_clip's names -> (fields read off the shapes, weights of ours).

    A size that is no whole number is rounded, and refused later by `checkpoint.load_weights`.
    """
    for start, family in FAMILIES.items():
        if any(name.startswith(start) for name in weights):
            raise ValueError(f"{path}: weights with {family}; ours are CLIP's own two towers")
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


def open_clip(path, fields, loud=True):
    """What no shape says, the activation and the heads, by the open_clip_config.json beside a file.

    Without one the activation is quick_gelu, OpenAI's; loud: stderr says so where the file is not
    in OpenAI's own format. ValueError for a config of what ours cannot be.
    """
    where = path.parent / "open_clip_config.json"
    if not where.is_file():
        if loud and not is_script(path):
            print(f"{path}: taken for weights with quick_gelu; for open_clip's own put their "
                  "open_clip_config.json beside it, or say --act gelu", file=sys.stderr)
        return {"act": "quick_gelu"}
    parts = {"": read_json(where, dict)}
    for part, (required, read) in OPEN_CLIP.items():
        parts[part] = section(parts["model_cfg" if "model_cfg" in parts else ""], part, where)
        known_sizes(parts[part], (), required, read, f"{where}: {part}")
    out = {"act": "quick_gelu" if parts["model_cfg"].get("quick_gelu") else "gelu",
           "text_heads": whole(parts["text_cfg"], "heads", fields["text_heads"], where)}
    if "stages" not in fields and parts["vision_cfg"]:
        head_width = whole(parts["vision_cfg"], "head_width", 64, where)
        out["vision_heads"] = heads(fields["vision_width"], where, head_width)
    return out
