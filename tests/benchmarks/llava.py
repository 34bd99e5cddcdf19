"""LLaVA's second stage, its prefill and its answers, ours against transformers'.

The same weights, inputs and optimizer, in turns in one process; printed are the medians and their
ratio (below 1: ours is faster). A step trains projector and language model. Prefill is an answer of
one token, an answer has --length tokens; both are greedy, and their ids must agree.

    python tests/benchmarks/llava.py                       tiny, batch 32
    python tests/benchmarks/llava.py --preset small --batch 8 --precision bf16

Needs transformers: pip install -r tests/requirements.txt
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                            # noqa: E402,F401  first: how torch's threads wait
import torch                                                                      # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402

from common.data.images import normalize_pixels                                   # noqa: E402
from common.generation import generate                                            # noqa: E402
from common.pretrained.llava import config_fields, translated                     # noqa: E402
from common.training.checkpoint import load_weights                               # noqa: E402
from common.training.devices import find_device                                   # noqa: E402
from common.training.options import run_main                                      # noqa: E402
from llava import PRESETS, LLaVA, LLaVAConfig                                     # noqa: E402
from llava import answer_places, merge_image_tokens                               # noqa: E402
from tests.benchmarks.turns import compare, read_options, train_step, writer      # noqa: E402

IMAGE, START = 30, 1                     # ids; those of texts begin at 32
NEVER = 1 << 30                          # no end: both write all the tokens


def pair_of_models(preset, device):
    """{side: model} with equal weights, the image encoder frozen."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    v, c = PRESETS[preset].vision, PRESETS[preset].language
    config = {
        "model_type": "llava", "image_token_index": IMAGE, "tie_word_embeddings": c.tie_embeddings,
        "vision_config": dict(model_type="clip_vision_model", hidden_size=v.vision_width,
                              intermediate_size=4 * v.vision_width, hidden_act="quick_gelu",
                              num_hidden_layers=v.vision_layers, image_size=v.image_size,
                              num_attention_heads=v.vision_heads, patch_size=v.patch_size),
        "text_config": dict(model_type="llama", vocab_size=c.vocab_size, hidden_size=c.width,
                            intermediate_size=c.hidden, num_hidden_layers=c.layers,
                            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
                            max_position_embeddings=c.context_length, rms_norm_eps=c.eps,
                            tie_word_embeddings=c.tie_embeddings)}
    theirs = LlavaForConditionalGeneration(LlavaConfig(**config))
    fields = config_fields(config, "the reference")
    ours = LLaVA(LLaVAConfig(**fields))
    load_weights(ours, translated(theirs.state_dict(), fields, "the reference"), "it")
    models = {"ours": ours.to(device).eval(), "transformers": theirs.to(device).eval()}
    for each in models.values():
        for name, parameter in each.named_parameters():
            parameter.requires_grad = "vision" not in name
    return models


def main():
    """Read the command line and run."""
    options = read_options(__doc__, ("tiny", "small"))
    device, c = find_device(options.device), PRESETS[options.preset]
    torch.manual_seed(0)
    models = pair_of_models(options.preset, device)
    ours, theirs = models.values()
    shape = (options.batch, 3, c.image_size, c.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    pixels = normalize_pixels(images).to(device)
    texts = torch.randint(32, c.language.vocab_size, (options.batch, options.length))
    texts[:, 0], texts[:, 1] = START, IMAGE
    P = c.tokens_per_view
    batch = merge_image_tokens(
        [(row, row) for row in texts.tolist()],
        [[list(range(1 + k * P, 1 + (k + 1) * P))] for k in range(options.batch)], IMAGE)
    # Answers are the last third of a text; in stage 2 of the shapes world it is less.
    batch["labels"][:, :-(options.length // 3)] = -100
    batch |= {"images": images, "places": answer_places(batch["labels"])}
    batch = {name: value.to(device) for name, value in batch.items()}
    expanded = torch.cat([texts[:, :1], F.pad(texts[:, 1:], (P - 1, 0), value=IMAGE)], 1).to(device)
    inputs = {"pixel_values": pixels, "input_ids": expanded,
              "attention_mask": torch.ones_like(expanded)}
    labels = batch["labels"]

    for title, count in (("prefill", 1), ("answers", options.length)):
        def write(count=count):
            x = ours.embed(batch["ids"], batch["feature_index"],
                           ours.encode_images(batch["images"]))
            return generate(ours.logits, x, max_new_tokens=count, stop=(NEVER,))

        def their_write(count=count):
            new = theirs.generate(**inputs, max_new_tokens=count, do_sample=False,
                                  eos_token_id=NEVER, pad_token_id=0)
            return new[:, -count:]
        compare(title, {"ours": writer(write, device, options.half),
                        "transformers": writer(their_write, device, options.half)}, options)
    losses = {"ours": lambda: ours(batch)["lm"],
              "transformers": lambda: theirs(**inputs, labels=labels).loss}
    compare("step", {name: train_step(model, losses[name], device, options.half)
                     for name, model in models.items()}, options)


if __name__ == "__main__":
    run_main(main)
