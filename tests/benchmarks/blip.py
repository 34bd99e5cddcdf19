"""A captioner's training step and its captions, ours against transformers' BLIP.

The same weights, inputs and optimizer, in turns in one process; printed are the medians and their
ratio (below 1: ours is faster). Captions are greedy, and their ids must agree.

    python tests/benchmarks/blip.py                        tiny, batch 64
    python tests/benchmarks/blip.py --preset base --batch 2 --precision bf16

Needs transformers: pip install -r tests/requirements.txt
"""
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                            # noqa: E402,F401  first: how torch's threads wait
import torch                                                                      # noqa: E402

from blip import BLIP, PRESETS                                                    # noqa: E402
from common.data.images import normalize_pixels                                   # noqa: E402
from common.generation import generate                                            # noqa: E402
from common.pretrained.blip import hugging_face                                   # noqa: E402
from common.prompts import labels_of                                              # noqa: E402
from common.training.checkpoint import load_weights                               # noqa: E402
from common.training.devices import find_device, to_device                        # noqa: E402
from common.training.options import run_main                                      # noqa: E402
from tests.benchmarks.turns import compare, read_options, train_step, writer      # noqa: E402


def reference_model(c):
    """transformers' captioner of our config, and the dict of its config."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    config = {
        "model_type": "blip", "text_config": dict(
            hidden_size=c.text_width, encoder_hidden_size=c.vision_width,
            intermediate_size=4 * c.text_width, num_hidden_layers=c.text_layers,
            num_attention_heads=c.text_heads, vocab_size=c.vocab_size, bos_token_id=c.dec_id,
            max_position_embeddings=c.context_length, sep_token_id=c.eos_id,
            pad_token_id=c.pad_id, label_smoothing=c.label_smoothing, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0),
        "vision_config": dict(
            hidden_size=c.vision_width, intermediate_size=4 * c.vision_width,
            num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_heads,
            image_size=c.image_size, patch_size=c.patch_size, layer_norm_eps=c.vision_eps)}
    return BlipForConditionalGeneration(BlipConfig(**config)), config


def main():
    """Read the command line and run."""
    options = read_options(__doc__, PRESETS)
    device, half = find_device(options.device), options.half
    c = dataclasses.replace(PRESETS[options.preset], losses="lm", sharing="none")
    torch.manual_seed(0)
    theirs, config = reference_model(c)
    ours = BLIP(c)
    load_weights(ours, hugging_face(theirs.state_dict(), config, "the reference")[1], "it")
    images = torch.randint(256, (options.batch, 3, c.image_size, c.image_size), dtype=torch.uint8)
    ids = torch.randint(32, c.vocab_size - 2, (options.batch, options.length))
    ids[:, 0] = c.dec_id
    batch = to_device({"images": images, "ids": ids, "labels": labels_of(ids, c)}, device)
    pixels, ids = normalize_pixels(batch["images"]), batch["ids"]
    models = {"ours": ours.to(device), "transformers": theirs.to(device)}
    losses = {"ours": lambda: ours(batch)["lm"],
              "transformers": lambda: theirs(pixel_values=pixels, input_ids=ids, labels=ids).loss}
    never = c.vocab_size + 1             # no end: both write all the tokens
    writers = {
        "ours": lambda: generate(ours.logits, ids[:, :1], max_new_tokens=options.length,
                                 stop=(never,), state={"context": ours.vision(pixels)}),
        "transformers": lambda: theirs.text_decoder.generate(
            input_ids=ids[:, :1], encoder_hidden_states=theirs.vision_model(pixels)[0],
            max_new_tokens=options.length, do_sample=False, eos_token_id=never,
            pad_token_id=c.pad_id)[:, 1:]}
    for model in models.values():
        model.eval()                     # no dropout
    compare("captions", {name: writer(writers[name], device, half) for name in models}, options)
    compare("step", {name: train_step(model, losses[name], device, half)
                     for name, model in models.items()}, options)


if __name__ == "__main__":
    run_main(main)
