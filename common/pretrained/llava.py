"""LLaVA's published weights in Hugging Face's folders: LLaVA-1.5 and LLaVA-NeXT on Vicuna.

The table has their names on the left and ours on the right; image encoder and language model have
the tables of clip.py and language.py. Our image encoder ends before CLIP's last block, so that
block and the norm after it are left out.
"""
import re
from pathlib import Path

from common.data.safe_read import read_json
from common.pretrained import clip, language
from common.pretrained.files import given, known_sizes, read_weights, section
from common.pretrained.names import Table, translate

# transformers has written three layouts: (prefix of any of them, the name used here).
PREFIXES = ((r"model\.(?=language_model|vision_tower|multi_modal|image_newline)", ""),
            (r"lm_head\.", "lm.lm_head."), (r"language_model\.(model\.)?", "lm."),
            (r"vision_tower\.(vision_model\.)?", "vision_model."))
ROWS = (*clip.HUGGING_FACE.rows,
        ("multi_modal_projector.linear_{1,2}.{weight,bias}", "projector.{0,2}.{weight,bias}"),
        ("image_newline", "row_end"))
# Fields of a config.json and its parts: (the values that ours can have, their default first).
REQUIRED = {
    "": {"vision_feature_layer": (-2,), "vision_feature_select_strategy": ("default",),
         "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
         "use_image_newline_parameter": (True,)},
    "vision_config": {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu", "gelu"),
                      **clip.REQUIRED},
}
READ = {"": ("ignore_index", "image_grid_pinpoints", "image_seq_length", "text_config",
             "vision_config", "vocab_size"), "vision_config": (*clip.READ, "vocab_size")}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
VIEWS = {"llava": "pad", "llava_next": "tiles"}


def read(path):
    """A published LLaVA's folder -> (fields of its config, weights under our names, tokenizer).

    Raises ValueError in one line for whatever is missing, damaged or of another model.
    """
    folder = Path(path)
    where = folder / "config.json"
    config = read_json(where, dict)
    fields = config_fields(config, where)
    weights = translated(read_weights(folder), fields, folder)
    clip.preprocessing(folder, fields["vision"]["image_size"])
    tokenizer = language.load_tokenizer(folder, fields["language"])
    fields["language"] |= {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return fields, weights, tokenizer


def config_fields(config, where):
    """A config.json's dict -> fields of a LLaVAConfig; ValueError for what ours cannot be."""
    kind = config.get("model_type")
    if "mm_vision_tower" in config:
        raise ValueError(f"{where}: the layout of LLaVA's authors, whose files leave the image "
                         "encoder out; take the folder that Hugging Face's llava-hf publishes")
    if kind not in [*VIEWS]:             # not a dict's "in": the file may hold a list
        raise ValueError(f"{where}: model_type is {kind!r:.80}, not 'llava' or 'llava_next'")
    vision, text = (section(config, f"{part}_config", where) for part in ("vision", "text"))
    known_sizes(config, (), REQUIRED[""], READ[""], where)
    sizes = known_sizes(vision, clip.HF_SIZES["vision"], REQUIRED["vision_config"],
                        READ["vision_config"], f"{where}: vision_config")
    if given(text, "model_type", "llama") != "llama":
        raise ValueError(f"{where}: text_config: model_type is {text['model_type']!r:.80}, ours "
                         "llama")
    sizes["act"] = given(vision, "hidden_act", "quick_gelu")
    fields = {"vision": sizes, "projector": "mlp", "views": VIEWS[kind], "template": "v1",
              "losses": "instruct",
              "language": language.config_fields({"model_type": "llama"} | text,
                                                 f"{where}: text_config")}
    if kind == "llava_next":
        pinpoints = given(config, "image_grid_pinpoints", PINPOINTS)
        fields["grids"] = grids_of(pinpoints, sizes["image_size"], where)
    return fields


def grids_of(pinpoints, side, where):
    """[height, width] in pixels of each grid -> its (columns, rows) in tiles of side x side."""
    pairs = pinpoints if isinstance(pinpoints, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 and all(
            type(n) is int and n > 0 and n % side == 0 for n in pair) for pair in pairs):
        raise ValueError(f"{where}: image_grid_pinpoints is {pinpoints!r:.80}, not a list of "
                         f"[height, width] that divide into tiles of {side} pixels")
    return [(width // side, height // side) for height, width in pairs]


def translated(weights, fields, path):
    """Weights under Hugging Face's names, of any layout -> under ours."""
    renamed = {}
    for name, weight in weights.items():
        for prefix, other in PREFIXES:
            name = re.sub(f"^{prefix}", other, name)
        renamed[name] = weight
    last = fields["vision"]["vision_layers"] - 1
    table = Table(ROWS, ignored=(*clip.HUGGING_FACE.ignored, "vision_model.post_layernorm.*",
                                 f"vision_model.encoder.layers.{last}.*"))
    lm = {name.removeprefix("lm."): weight for name, weight in renamed.items()
          if name.startswith("lm.")}
    other = {name: weight for name, weight in renamed.items() if not name.startswith("lm.")}
    lm = language.translated(lm, fields["language"], path)
    return translate(other, table, {"vision": last, "text": 0}, path) | {
        f"lm.{name}": weight for name, weight in lm.items()}
