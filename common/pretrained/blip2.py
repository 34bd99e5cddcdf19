"""BLIP-2's and InstructBLIP's published weights: Hugging Face's folders, and LAVIS's first stage.

The tables have their names on the left and ours on the right. The frozen language model has the
tables of language.py or t5.py. What LAVIS's files leave out: heads of the image encoder are 88
wide, those of the Q-Former 64, and every second of its layers has cross-attention.
"""
import math
from pathlib import Path

import torch

from common.data.safe_read import read_json
from common.pretrained import language, t5
from common.pretrained.blip import HUGGING_FACE_VIT, SALESFORCE_VIT, check_equal, positions
from common.pretrained.clip import heads, preprocessing
from common.pretrained.files import known_sizes, positive, read_weights, section, whole
from common.pretrained.names import Table, count, translate, under
from common.pretrained.wordpiece import WordPiece


def query_and_key(weight):
    """The bias of the queries -> and of the keys, which is zero (EVA)."""
    return weight, torch.zeros_like(weight)


def qformer(attention):
    """The rows of the Q-Former's layers; attention: the name of what holds q, k and v."""
    return under("encoder.layer.{qformer}.", "qformer.blocks.{qformer}.", (
        (f"{{attention,crossattention}}.{attention}.{{query,key,value}}.{{weight,bias}}",
         "{attn,cross}.{q,k,v}_proj.{weight,bias}"),
        ("{attention,crossattention}.output.{dense,LayerNorm}.{weight,bias}",
         "{attn.out_proj,attn_norm,cross.out_proj,cross_norm}.{weight,bias}"),
        ("{intermediate,output}{_query,}.dense.{weight,bias}",
         "{mlp.fc1,text_mlp.fc1,mlp.fc2,text_mlp.fc2}.{weight,bias}"),
        ("output{_query,}.LayerNorm.{weight,bias}", "{mlp,text_mlp}_norm.{weight,bias}")))


EMBEDDINGS = ("{word,position}_embeddings.weight", "qformer.{token,pos}_embed.weight")
PREDICTIONS = "Qformer.cls.predictions."
LM = "language_model."
HUGGING_FACE = Table((
    *under("vision_model.", "vision.vit.", HUGGING_FACE_VIT),
    ("vision_model.post_layernorm.{weight,bias}", "vision.norm.{weight,bias}"),
    ("query_tokens", "qformer.query_tokens", positions),
    *under("embeddings.", "", (EMBEDDINGS,)),                    # of BLIP-2, then of InstructBLIP
    ("qformer.layernorm.{weight,bias}", "qformer.norm.{weight,bias}"),
    *under("qformer.embeddings.", "", (EMBEDDINGS,)),
    ("qformer.embeddings.layernorm.{weight,bias}", "qformer.norm.{weight,bias}"),
    *under("qformer.", "", qformer("attention")),
    ("language_projection.{weight,bias}", "projection.{weight,bias}"),
    ("{vision,text}_projection.{weight,bias}", "{image,text}_projection.{weight,bias}"),
    ("itm_head.{weight,bias}", "itm_head.{weight,bias}"),
), ignored=("*.position_ids",))
LAVIS = Table((
    *under("visual_encoder.", "vision.vit.", (
        *SALESFORCE_VIT,
        ("blocks.{vision}.attn.q_bias", "transformer.blocks.{vision}.attn.{q,k}_proj.bias",
         query_and_key),
        ("blocks.{vision}.attn.v_bias", "transformer.blocks.{vision}.attn.v_proj.bias"))),
    ("ln_vision.{weight,bias}", "vision.norm.{weight,bias}"),
    ("query_tokens", "qformer.query_tokens", positions),
    *under("Qformer.bert.", "", qformer("self")),
    *under("Qformer.bert.embeddings.", "", (
        EMBEDDINGS, ("LayerNorm.{weight,bias}", "qformer.norm.{weight,bias}"))),
    *under(PREDICTIONS, "qformer.head.", (
        ("transform.{dense,LayerNorm}.{weight,bias}", "{dense,norm}.{weight,bias}"),
        ("bias", "bias"))),
    ("{vision,text}_proj.{weight,bias}", "{image,text}_projection.{weight,bias}"),
    ("itm_head.{weight,bias}", "itm_head.{weight,bias}"), ("temp", "temp"),
), ignored=("*.position_ids", PREDICTIONS + "decoder.*"))    # the output matrix is the token table
EVA = "eva_vit_g.pth"                    # LAVIS's file of the frozen image encoder
EVA_NAMES = ("cls_token", "pos_embed", "patch_embed.", "blocks.")

# Sizes in a config.json: (ours, theirs, the default where it is left out).
HF_SIZES = {
    "vision": (("vision_width", "hidden_size", 1408), ("vision_layers", "num_hidden_layers", 39),
               ("vision_heads", "num_attention_heads", 16),
               ("vision_hidden", "intermediate_size", 6144), ("image_size", "image_size", 224),
               ("patch_size", "patch_size", 14)),
    "qformer": (("qformer_width", "hidden_size", 768), ("qformer_layers", "num_hidden_layers", 12),
                ("qformer_heads", "num_attention_heads", 12),
                ("cross_attn_every", "cross_attention_frequency", 2),
                ("qformer_context_length", "max_position_embeddings", 512)),
}
REQUIRED = {"vision": {"hidden_act": ("gelu",), "qkv_bias": (True,), "num_channels": (3,)},
            "qformer": {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,),
                        "position_embedding_type": ("absolute",)}}
READ = ("encoder_hidden_size", "intermediate_size", "layer_norm_eps", "projection_dim",
        "use_qformer_text_input", "vocab_size")      # of each part; shapes say most of them
TOP = ("image_text_hidden_size", "num_query_tokens", "qformer_config", "text_config",
       "use_decoder_only_language_model", "vision_config")
# A question (BLIP-2, 4.1); before a caption, by the task (BLIP-2, 4.2, and InstructBLIP, App. E).
QUESTIONS = {"decoder": "Question: {} Answer:", "t5": "Question: {} Short answer:"}
PROMPTS = {"lm": "a photo of", "instruct": "A short image description."}


def read(path):
    """A published BLIP-2 -> (fields of its config, weights under our names, its tokenizer).

    path: a Hugging Face folder, or LAVIS's .pth file of stage 1 with vocab.txt and eva_vit_g.pth
    beside it. InstructBLIP's tokenizer is the language model's; its attribute `qformer` is the
    Q-Former's. Raises ValueError in one line for whatever is missing, damaged or of another model.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    weights = read_weights(path)
    check_tied(weights, path)
    if path.is_dir() or any(name.startswith("vision_model.") for name in weights):
        where = folder / "config.json"
        fields, weights = hugging_face(weights, read_json(where, dict), where)
    else:
        fields, weights = lavis(with_image_encoder(weights, folder), path)
    preprocessing(folder, fields["vision"]["image_size"])
    ids, tokenizer = load_tokenizers(fields, folder)
    return fields | ids, weights, tokenizer


def load_tokenizers(fields, folder):
    """The vocabularies of a model of these fields -> (fields with their ids, tokenizer)."""
    words, out, task = None, {}, fields["losses"]
    if fields["qformer_text"]:
        words = WordPiece.load(folder / "qformer_tokenizer" if task == "instruct" else folder,
                               added=("[DEC]",))
        if len(words) > fields["vocab_size"]:
            raise ValueError(f"{folder}: a vocabulary of {len(words)} pieces, [DEC] included, "
                             f"but the weights have rows for {fields['vocab_size']}")
        out = {"pad_id": words.pad_id, "eos_id": words.eos_id, "cls_id": words.bos_id,
               "dec_id": words.dec_id}
    if "language" not in fields:
        return out, words
    lm = fields["language"]
    tokenizer = language.load_tokenizer(folder, lm)
    # BLIP-2's OPT was trained to end a text with a line break.
    eos_id = tokenizer.encode("\n")[0] if lm["kind"] == "opt" else tokenizer.eos_id
    if task == "instruct":
        tokenizer.qformer = words
        if lm["kind"] == "llama":
            tokenizer.bos_id = tokenizer.eos_id      # its Vicuna reads </s> first (released code)
    return out | {"language": lm | {"eos_id": eos_id, "pad_id": tokenizer.pad_id}}, tokenizer


def check_tied(weights, where):
    """ValueError unless the tensors are equal that a file may hold twice and our model has once."""
    check_equal(weights, {
        PREDICTIONS + "decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
        PREDICTIONS + "decoder.bias": PREDICTIONS + "bias",
        LM + "lm_head.weight": LM + "model.decoder.embed_tokens.weight",         # of OPT
        **{LM + name: LM + "shared.weight" for name in t5.COPIES}}, where)


def with_image_encoder(weights, folder):
    """LAVIS's weights, with the frozen image encoder from its own file if they are without.

    That file has one block more, the last, which BLIP-2 leaves out.
    """
    if any(name.startswith("visual_encoder.") for name in weights):
        return weights
    eva = read_weights(folder / EVA)
    last = f"blocks.{count(eva, r'blocks[.]([0-9]+)[.]') - 1}."
    return weights | {f"visual_encoder.{name}": weight for name, weight in eva.items()
                      if name.startswith(EVA_NAMES) and not name.startswith(last)}


def hugging_face(weights, config, path):
    """Weights under Hugging Face's names, a config.json's dict -> (fields, weights of ours)."""
    kind = config.get("model_type")
    if kind not in ("blip-2", "instructblip"):
        raise ValueError(f"{path}: model_type is {kind!r:.80}, not 'blip-2' or 'instructblip'")
    known_sizes(config, (), {}, TOP, path)
    parts, sizes = {}, {}
    for part in HF_SIZES:
        parts[part] = section(config, f"{part}_config", path)
        sizes[part] = known_sizes(parts[part], HF_SIZES[part], REQUIRED[part], READ,
                                  f"{path}: {part}_config")
    eps = positive(parts["vision"], "layer_norm_eps", 1e-6, path)
    task = ("instruct" if kind == "instructblip" else
            "itc,itm" if "itm_head.weight" in weights else "lm")
    fields = sizes["qformer"] | {
        "vision": sizes["vision"] | {"vision_eps": eps, "norm_eps": eps}, "losses": task,
        "num_queries": whole(config, "num_query_tokens", 32, path), "qformer_text": task != "lm",
        "prompt": PROMPTS.get(task, "")}
    lm = {name.removeprefix(LM): weight for name, weight in weights.items() if name.startswith(LM)}
    weights = {name: weight for name, weight in weights.items() if not name.startswith(LM)}
    weights = translate(weights, HUGGING_FACE, {
        "vision": fields["vision"]["vision_layers"], "qformer": fields["qformer_layers"]}, path)
    if task != "lm":                     # the configs' number of pieces is wrong
        fields["vocab_size"] = matrix(weights, "qformer.token_embed.weight", path)[0]
    if task == "itc,itm":                # Hugging Face leaves temp out
        fields["embed_dim"] = whole(config, "image_text_hidden_size", 256, path)
        return fields, {"temp": torch.tensor(0.07)} | weights
    part, where = section(config, "text_config", path), f"{path}: text_config"
    kind = "t5" if part.get("model_type") == "t5" else "decoder"
    reader, fields["question_prompt"] = {"t5": t5, "decoder": language}[kind], QUESTIONS[kind]
    fields["language"] = reader.config_fields(part, where)
    lm = reader.translated(lm, fields["language"], path)
    return fields, weights | {f"lm.{name}": weight for name, weight in lm.items()}


def matrix(weights, name, path):
    """The shape of a matrix of ours, or ValueError."""
    if name not in weights or weights[name].ndim != 2:
        raise ValueError(f"{path}: not the weights of a BLIP-2 (no matrix {name}, our name)")
    return tuple(weights[name].shape)


def lavis(weights, path):
    """Weights under LAVIS's names -> (fields read off the shapes, weights of ours).

    A size that is no whole number is rounded, and refused later by `checkpoint.load_weights`.
    """
    if "itm_head.weight" not in weights:
        raise ValueError(f"{path}: not LAVIS's weights of BLIP-2's first stage; the others are "
                         "read from Hugging Face's folders")
    counts = {"vision": count(weights, r"visual_encoder\.blocks\.(\d+)\."),
              "qformer": count(weights, r"Qformer\.bert\.encoder\.layer\.(\d+)\.")}
    weights = translate(weights, LAVIS, counts, path)

    def shape(name):
        return matrix(weights, name, path)
    vision_width, inputs = shape("vision.vit.patch_embed.weight")                # inputs: 3 * P * P
    patch_size = max(1, math.isqrt(inputs // 3))
    grid_size = math.isqrt(max(0, shape("vision.vit.pos_embed")[0] - 1))
    num_queries, qformer_width = shape("qformer.query_tokens")
    vision = {"vision_width": vision_width, "vision_layers": counts["vision"],
              "vision_heads": heads(vision_width, path, 88),
              "vision_hidden": shape("vision.vit.transformer.blocks.0.mlp.fc1.weight")[0],
              "patch_size": patch_size, "image_size": patch_size * grid_size,
              "vision_eps": 1e-6, "norm_eps": 1e-5}
    return {"vision": vision, "losses": "itc,itm,itg", "qformer_text": True,
            "num_queries": num_queries, "qformer_width": qformer_width,
            "qformer_layers": counts["qformer"], "qformer_heads": heads(qformer_width, path),
            "cross_attn_every": 2, "vocab_size": shape("qformer.token_embed.weight")[0],
            "qformer_context_length": shape("qformer.pos_embed.weight")[0],
            "embed_dim": shape("image_projection.weight")[0]}, weights
