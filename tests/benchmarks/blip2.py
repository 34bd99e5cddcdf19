"""BLIP-2's training steps and its captions, ours against transformers'.

The same weights, inputs and optimizer, in turns in one process; printed are the medians and their
ratio (below 1: ours is faster). Captions are greedy, and their ids must agree. The image encoder
is of EVA's kind, the only one of transformers', with the preset's sizes. It is frozen, and so is
the language model. Of the first stage transformers can train matching alone.

    python tests/benchmarks/blip2.py                       tiny, batch 64
    python tests/benchmarks/blip2.py --preset small --batch 8 --precision bf16

Needs transformers: pip install -r tests/requirements.txt
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                            # noqa: E402,F401  first: how torch's threads wait
import torch                                                                      # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402

from blip2 import PRESETS, VISUAL, BLIP2Config, make_model                        # noqa: E402
from common.data.images import normalize_pixels                                   # noqa: E402
from common.generation import generate                                            # noqa: E402
from common.language import PRESETS as DECODERS                                   # noqa: E402
from common.pretrained.blip2 import hugging_face                                  # noqa: E402
from common.t5 import PRESETS as T5S                                              # noqa: E402
from common.training.checkpoint import load_weights                               # noqa: E402
from common.training.devices import find_device                                   # noqa: E402
from common.training.options import run_main                                      # noqa: E402
from tests.benchmarks.turns import compare, read_options, train_step, writer      # noqa: E402

FROZEN = ("vision.", "vision_model.", "lm.", "language_model.")
IMAGE, START, END = 30, 1, 2             # ids; those of texts begin at 32


def language_config(preset, kind):
    """The config.json of an OPT or a T5 of a preset's sizes."""
    if kind == "opt":
        c = DECODERS[preset]
        sizes = dict(hidden_size=c.width, word_embed_proj_dim=c.width, ffn_dim=4 * c.width,
                     num_hidden_layers=c.layers, num_attention_heads=c.heads,
                     max_position_embeddings=c.context_length)
    else:
        c = T5S[f"t5-{preset}"]
        sizes = dict(d_model=c.width, d_kv=c.head_width, d_ff=c.hidden, num_layers=c.layers,
                     num_heads=c.heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                     decoder_start_token_id=0, dropout_rate=0.0)
    return sizes | dict(model_type=kind, vocab_size=c.vocab_size, pad_token_id=0,
                        bos_token_id=START, eos_token_id=END)


def pair_of_models(preset, device, kind=None):
    """{side: model} with equal weights. kind: opt, t5, or None: the model for matching."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
    c, v = PRESETS[preset], PRESETS[preset].vision
    config = {
        "model_type": "blip-2", "num_query_tokens": c.num_queries,
        "image_text_hidden_size": c.embed_dim, "image_token_index": IMAGE if kind else None,
        "vision_config": dict(
            hidden_size=v.vision_width, intermediate_size=4 * v.vision_width,
            num_hidden_layers=v.vision_layers - 1, num_attention_heads=v.vision_heads,
            image_size=v.image_size, patch_size=v.patch_size),
        "qformer_config": dict(
            hidden_size=c.qformer_width, intermediate_size=4 * c.qformer_width,
            num_hidden_layers=c.qformer_layers, num_attention_heads=c.qformer_heads,
            cross_attention_frequency=c.cross_attn_every, vocab_size=c.vocab_size,
            max_position_embeddings=c.qformer_context_length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, use_qformer_text_input=kind is None)}
    if kind:
        config["text_config"] = language_config(preset, kind)
    model = Blip2ForConditionalGeneration if kind else Blip2ForImageTextRetrieval
    theirs = model(Blip2Config(**config))
    torch.nn.init.normal_(theirs.query_tokens, std=0.05)              # theirs are zero
    if kind == "t5":                     # transformers ties what FLAN-T5 does not
        head = theirs.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) / len(head.weight.T))
    fields, weights = hugging_face(theirs.state_dict(), config, "the reference")
    if kind:
        fields["language"] |= {"pad_id": 0, "eos_id": END}
    ours = make_model(BLIP2Config(**fields, pad_id=0, cls_id=START))
    load_weights(ours, weights, "it")
    models = {"ours": ours.to(device).eval(), "transformers": theirs.to(device).eval()}
    for each in models.values():         # eval: no dropout
        for name, parameter in each.named_parameters():
            parameter.requires_grad = not name.startswith(FROZEN)
    return models


def matching(options, device, images, ids):
    """A training step of image-text matching."""
    models = pair_of_models(options.preset, device)
    ours, theirs = models.values()
    pixels, mask = normalize_pixels(images), torch.ones_like(ids)
    labels = torch.arange(len(ids), device=device) % 2
    logits = {"ours": lambda: ours.match(ours.vision(pixels), ids),
              "transformers": lambda: theirs(pixel_values=pixels, input_ids=ids,
                                             attention_mask=mask, return_dict=True,
                                             use_image_text_matching_head=True).logits_per_image}
    compare("matching", {name: train_step(
        model, lambda name=name: F.cross_entropy(logits[name]().float(), labels), device,
        options.half) for name, model in models.items()}, options)


def writing(options, device, images, ids, kind):
    """Captions, and a training step; a T5 reads the first half of a text and writes the other."""
    models = pair_of_models(options.preset, device, kind)
    ours, theirs = models.values()
    pixels, is_t5, never = normalize_pixels(images), kind == "t5", 1 << 30
    Q = ours.config.num_queries

    def with_image(ids):
        """Our ids, and the arguments of theirs: Q places for the image, then the ids."""
        theirs = F.pad(ids, (Q, 0), value=IMAGE)
        return F.pad(ids, (Q, 0), value=VISUAL), {
            "pixel_values": pixels, "input_ids": theirs, "attention_mask": torch.ones_like(theirs)}

    prompt = ids[:, :1] * 0 + (END if is_t5 else START)
    our_prompt, their_prompt = with_image(prompt)

    def write():
        x, state = ours.embed(our_prompt, ours.visual_prompt(pixels)), {}
        if is_t5:
            x, state = torch.zeros_like(prompt), {"context": ours.lm.encode(x)}
        return generate(ours.logits, x, max_new_tokens=options.length, stop=(never,), state=state)

    def their_write():
        new = theirs.generate(**their_prompt, max_new_tokens=options.length, do_sample=False,
                              eos_token_id=never, pad_token_id=0)
        return new[:, -options.length:]
    compare(f"{kind} captions", {"ours": writer(write, device, options.half),
                                 "transformers": writer(their_write, device, options.half)},
            options)
    half = options.length // 2 if is_t5 else options.length
    our_ids, inputs = with_image(ids[:, :half])
    batch = {"images": images, "ids": our_ids, "labels": our_ids.where(our_ids != VISUAL, -100)}
    inputs["labels"] = batch["labels"]
    if is_t5:
        inputs["labels"] = ids[:, half:].contiguous()
        answers = F.pad(ids[:, half:], (1, 0))                        # they begin with <pad>
        batch |= {"mask": torch.ones_like(our_ids, dtype=torch.bool), "answer_ids": answers,
                  "labels": answers}
    losses = {"ours": lambda: ours(batch)["lm"], "transformers": lambda: theirs(**inputs).loss}
    compare(f"{kind} step", {name: train_step(model, losses[name], device, options.half)
                             for name, model in models.items()}, options)


def main():
    """Read the command line and run."""
    options = read_options(__doc__, ("tiny", "small"))
    device, c = find_device(options.device), PRESETS[options.preset]
    torch.manual_seed(0)
    shape = (options.batch, 3, c.image_size, c.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8).to(device)
    ids = torch.randint(32, c.vocab_size, (options.batch, options.length)).to(device)
    ids[:, 0] = START
    matching(options, device, images, ids)
    for kind in ("opt", "t5"):
        writing(options, device, images, ids, kind)


if __name__ == "__main__":
    run_main(main)
