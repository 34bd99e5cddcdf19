"""OpenFlamingo's checkpoints: the weights that it trained between its two frozen models.

    config = FlamingoConfig(vision=..., language=..., cross_attn_every=4, **OPENFLAMINGO)
    model = Flamingo(config)
    load_openflamingo(model, "checkpoint.pt", tokens=(32001, 32000))

The tables have their names on the left and ours on the right. FIXED has the fields in which their
code differs from the paper's text: gelu, no embeddings of frames, heads of 64 everywhere, the first
gated block before block cross_attn_every - 1.
"""
import re

from common.pretrained.files import read_weights
from common.pretrained.names import Table, halves, translate, under
from common.training import checkpoint

FIXED = {
    "resampler": "perceiver", "resampler_heads": 8, "resampler_head_width": 64, "max_frames": 0,
    "heads": 8, "head_width": 64, "placement": "openflamingo", "act": "gelu",
    "use_class_token": False, "only_latest_image": True}
OPENFLAMINGO = FIXED | {"num_latents": 64, "resampler_layers": 6}

PROJECTIONS = (
    (".to_q.weight", ".q_proj.weight"),
    (".to_kv.weight", ".{k,v}_proj.weight", halves),
    (".to_out.weight", ".out_proj.weight"),
)
FEED_FORWARD = (
    (".0.{weight,bias}", ".mlp_norm.{weight,bias}"),
    (".{1,3}.weight", ".mlp.{fc1,fc2}.weight"),
)
RESAMPLER = (
    ("perceiver.latents", "resampler.latents"),
    ("perceiver.norm.{weight,bias}", "resampler.norm.{weight,bias}"),
    ("perceiver.layers.{layers}.0.norm_{media,latents}.{weight,bias}",
     "resampler.layers.{layers}.{media,latents}_norm.{weight,bias}"),
    *under("perceiver.layers.{layers}.0", "resampler.layers.{layers}.attn", PROJECTIONS),
    *under("perceiver.layers.{layers}.1", "resampler.layers.{layers}", FEED_FORWARD),
)
GATED = (
    (".attn.norm.{weight,bias}", ".attn_norm.{weight,bias}"),
    *under(".attn", ".attn", PROJECTIONS),
    *under(".ff", "", FEED_FORWARD),
    ("{.attn,.ff}_gate", "{.attn,.mlp}_gate"),
)
# A gated block's first words; what comes between differs with the language model.
GATED_BLOCK = r"lang_encoder\.[\w.]+?\.(\d+)\.gated_cross_attn_layer\."
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")   # OPT and LLaMA, MPT, NeoX
HEADS = ("lm_head.weight", "embed_out.weight")


def load_openflamingo(model, path, tokens=None):
    """Fill a Flamingo's resampler and gated blocks, in place, from a checkpoint file.

    What it holds of the frozen models is ignored: they have files of their own. tokens: the ids of
    <image> and <|endofchunk|> in its embeddings, whose rows become the model's own (OpenFlamingo
    adds <|endofchunk|> first); None: the model's rows stay. Raises ValueError in one line, and
    changes nothing, when config, names, shapes or rows do not fit.
    """
    wrong = [f"{name}={getattr(model.config, name)}, not {value}"
             for name, value in FIXED.items() if getattr(model.config, name) != value]
    if wrong:
        raise ValueError(f"{path}: OpenFlamingo's weights need another config: {'; '.join(wrong)}")
    weights = read_weights(path)
    trained = {re.sub(GATED_BLOCK, r"gated.\1.", name): weight for name, weight in weights.items()}
    rows = [row for i, block in enumerate(model.gated) if block is not None
            for row in under(f"gated.{i}", f"gated.{i}", GATED)]
    table = Table((*RESAMPLER, *rows), ignored=("lang_encoder.*", "vision_encoder.*"))
    ours = translate(trained, table, {"layers": model.config.resampler_layers}, path)
    if tokens is not None:
        ours |= new_rows(model.lm.new, weights, tokens, path)
    frozen = {name: weight for name, weight in model.state_dict().items()
              if name.startswith(("vision.", "lm."))}
    checkpoint.load_weights(model, frozen | ours, path)


def new_rows(new, weights, tokens, path):
    """The rows of the new tokens in the embeddings, and in the head where the model has one.

    ValueError where the file is without them.
    """
    found = {}
    for ours, ends in (("rows", EMBEDDINGS), ("output", HEADS)):
        name = next((name for name in weights
                     if name.startswith("lang_encoder.") and name.endswith(ends)), None)
        if getattr(new, ours) is None:
            continue                     # the head is tied
        if name is None and ours == "output":
            raise ValueError(f"{path}: no head with rows {list(tokens)}, which an untied language "
                             "model needs")
        try:
            found[f"lm.new.{ours}"] = weights[name][list(tokens)]
        except (KeyError, IndexError):
            raise ValueError(f"{path}: no embeddings with rows {list(tokens)}") from None
    return found
