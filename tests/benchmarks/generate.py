"""Tokens per second of our generate against transformers': python tests/benchmarks/generate.py

The same weights and prompts, greedy, in turns in one process; the ids must agree. Printed are the
medians and their ratio (above 1: ours is faster).

    python tests/benchmarks/generate.py                    tiny (LLaMA's kind) and GPT-2's 124M
    python tests/benchmarks/generate.py --preset gpt2 --batch 8 --tokens 64

Needs transformers: pip install -r tests/requirements.txt
"""
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                            # noqa: E402,F401  first: how torch's threads wait
import torch                                                                      # noqa: E402

from common.language import PRESETS, LanguageModel                                # noqa: E402
from common.pretrained.language import translated                                 # noqa: E402
from common.training.checkpoint import load_weights                               # noqa: E402
from common.training.devices import find_device                                   # noqa: E402
from common.training.options import add_options, option, parser, run_main         # noqa: E402


@dataclass
class Options:
    """The command line."""
    preset: str = option("", "one of common/language.py's (default: tiny, then gpt2)")
    batch: int = option(4, "prompts at a time")
    prompt: int = option(16, "tokens of a prompt")
    tokens: int = option(48, "new tokens")
    repeats: int = option(7, "timed turns of each side")
    device: str = option("auto", "auto, cpu, cuda")


def reference_model(c):
    """transformers' model of our config."""
    import transformers
    if c.kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.width,
            n_layer=c.layers, n_head=c.heads, n_inner=c.hidden, bos_token_id=1,
            eos_token_id=c.eos_id))
    sizes = dict(vocab_size=c.vocab_size, max_position_embeddings=c.context_length,
                 hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads)
    if c.kind == "opt":
        return transformers.OPTForCausalLM(transformers.OPTConfig(
            **sizes, ffn_dim=c.hidden, word_embed_proj_dim=c.width))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **sizes, num_key_value_heads=c.kv_heads, intermediate_size=c.hidden, rms_norm_eps=c.eps,
        tie_word_embeddings=c.tie_embeddings))


def compare(options, device):
    """Print one preset's line."""
    config = PRESETS[options.preset]
    torch.manual_seed(0)
    reference = reference_model(config).eval()
    ours = LanguageModel(config).eval()
    load_weights(ours, translated(reference.state_dict(), dataclasses.asdict(config), "it"), "it")
    ours, reference = ours.to(device), reference.to(device)
    prompt = torch.randint(3, config.vocab_size - 1, (options.batch, options.prompt), device=device)
    never = config.vocab_size + 1        # no end: both write all the tokens

    def by_ours():
        return ours.generate(prompt, max_new_tokens=options.tokens, stop=(never,))

    def by_reference():
        return reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                  max_new_tokens=options.tokens, eos_token_id=never,
                                  pad_token_id=0)[:, options.prompt:]
    if not torch.equal(by_ours(), by_reference()):
        raise ValueError("the two do not write the same")
    times = {by_ours: [], by_reference: []}
    for turn in range(options.repeats):
        for work in (by_ours, by_reference) if turn % 2 else (by_reference, by_ours):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            work().tolist()              # waits for the device
            times[work].append(time.perf_counter() - began)
    count = options.batch * options.tokens
    mine, theirs = (count / statistics.median(times[work]) for work in (by_ours, by_reference))
    print(f"{options.preset:12s} batch {options.batch}: ours {mine:,.0f} tokens/s, transformers "
          f"{theirs:,.0f}, ratio {mine / theirs:.2f}")


def main():
    """Read the command line and run."""
    args = parser(__doc__)
    add_options(args, Options)
    options = Options(**vars(args.parse_args()))
    for preset in [options.preset] if options.preset else ["tiny", "gpt2"]:
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset}: there are {', '.join(PRESETS)}")
        compare(dataclasses.replace(options, preset=preset), find_device(options.device))


if __name__ == "__main__":
    run_main(main)
