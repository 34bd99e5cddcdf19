"""OpenFlamingo's checkpoints: what it learned between its two frozen models, and nothing of those.

    config = FlamingoConfig(vision=..., language=..., cross_attn_every=4, **OPENFLAMINGO)
    model = Flamingo(config)
    load_openflamingo(model, "checkpoint.pt", tokens=(32001, 32000))

The table is data: their names left, ours right. Where their code differs from the paper's text it
is by the fields of OPENFLAMINGO: gelu, no embeddings of frames, heads of 64 everywhere, the first
gated block before block cross_attn_every - 1.
"""
import re

from common.training import checkpoint
from common.pretrained import files
from common.pretrained.names import Table, listed, needs, translate, under
from common.pretrained.strict_json import printable

OPENFLAMINGO = {"resampler": "perceiver", "num_latents": 64, "resampler_layers": 6,
                "resampler_heads": 8, "resampler_head_width": 64, "max_frames": 0, "heads": 8,
                "head_width": 64, "placement": "openflamingo", "act": "gelu", "vision_skip_blocks": 0,
                "use_class_token": False, "only_latest_image": True}
TOLD_BY_SHAPES = ("num_latents", "resampler_layers")


def halves(weight):
    """Rows of k, v on top of each other (2 * D, C) -> two of (D, C)."""
    return needs(weight, weight.ndim == 2 and len(weight) % 2 == 0, "two equal parts").chunk(2)


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
LAYER = r"(lang_encoder\.[\w.]+?)\.[0-9]+\.gated_cross_attn_layer\."
TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")     # OPT and LLaMA, MPT, NeoX
HEADS = ("lm_head.weight", "embed_out.weight")


def load_openflamingo(model, path, tokens=None):
    """Fill a Flamingo's resampler and gated blocks, in place, from a checkpoint file.

    The frozen models are loaded from files of their own; what the checkpoint holds of them, and
    its second names of the same tensors, is passed over. tokens: the ids of <image> and of
    <|endofchunk|> in its table of embeddings, whose rows become the model's own (OpenFlamingo adds
    <|endofchunk|> first); None: those stay. Raises ValueError in one line: a config other than
    OPENFLAMINGO, names missing or unexpected, other shapes, no such rows. Then nothing is changed.
    """
    wrong = [f"{name}={getattr(model.config, name)}, not {value}"
             for name, value in OPENFLAMINGO.items()
             if name not in TOLD_BY_SHAPES and getattr(model.config, name) != value]
    if wrong:
        raise ValueError(f"{path}: OpenFlamingo's weights need another config: "
                         + "; ".join(wrong))
    weights = files.read_weights(path)
    learned = {name: weight for name, weight in weights.items() if not is_frozen(name)}
    blocks = {match.group(1) for match in (re.match(LAYER, name) for name in learned) if match}
    if len(blocks) != 1:
        raise ValueError(f"{path}: no checkpoint of OpenFlamingo: gated blocks in "
                         + (listed(sorted(blocks)) or "no layers of a lang_encoder"))
    rows = [row for i in model.gated
            for row in under(f"{min(blocks)}.{i}.gated_cross_attn_layer", f"gated.{i}", GATED)]
    out = translate(learned, Table((*RESAMPLER, *rows)),
                    {"layers": model.config.resampler_layers}, path)
    if tokens is not None:
        out |= new_rows(model.lm.new, weights, tokens, path)
    checkpoint.load_weights(model, model.state_dict() | out, path)


def is_frozen(name):
    """Whether a tensor is of the frozen models, or a second name of one that is not."""
    return name.startswith(("lang_encoder.", "vision_encoder.")) \
        and ".gated_cross_attn_layer." not in name


def new_rows(new, weights, tokens, path):
    """The rows of the new tokens in the resized table, and in its head if both have one."""
    def find(ends):
        return next((name for name in weights
                     if name.startswith("lang_encoder.") and name.endswith(ends)), None)
    name, head = find(TABLES), find(HEADS)
    if name is None:
        raise ValueError(f"{path}: no table of embeddings with rows {list(tokens)}")
    if len(tokens) != len(new.ids):
        raise ValueError(f"{path}: tokens={list(tokens)}: the ids of <image> and <|endofchunk|>")
    found = {"lm.new.rows": name} | (
        {"lm.new.output": head} if head and new.output is not None else {})
    for ours, theirs in found.items():
        if weights[theirs].ndim != 2 or not all(0 <= i < len(weights[theirs]) for i in tokens):
            raise ValueError(f"{path}: {printable(theirs)} is {tuple(weights[theirs].shape)}, without "
                             f"rows {list(tokens)}")
    return {ours: weights[theirs][list(tokens)] for ours, theirs in found.items()}
