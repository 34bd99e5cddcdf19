"""A CLIP training step and inference, ours against transformers': python tests/benchmarks/step.py

Both sides have the same config, weights, inputs and optimizer, and take turns in one process; what
is printed is the ratio of the medians (below 1: ours is faster), and what fraction of the machine's
own matrix rate each reaches, measured in the same run. Peak memory is each side's own, in a process
(on a GPU: an allocator's count) of its own.

    python tests/benchmarks/step.py                                    tiny and ViT-B/32, fp32
    python tests/benchmarks/step.py --preset ViT-B/16 --batch 1024 --precision bf16 --compile
    python tests/benchmarks/step.py --preset tiny --attention hand     the definition alone

Needs transformers: pip install -r tests/requirements.txt
"""
import dataclasses
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                            # noqa: E402,F401  first: how torch's threads wait
import torch                                                                      # noqa: E402
from torch.utils.flop_counter import FlopCounterMode                              # noqa: E402

from clip import CLIP, PRESETS                                                    # noqa: E402
from common import transformer                                                    # noqa: E402
from common.data.images import normalize_pixels                                   # noqa: E402
from common.pretrained.clip import HUGGING_FACE                                   # noqa: E402
from common.pretrained.names import translate                                     # noqa: E402
from common.training.checkpoint import load_weights                               # noqa: E402
from common.training.devices import autocast, find_device, peak_memory, to_device # noqa: E402
from common.training.options import add_options, option, parser, run_main         # noqa: E402

BATCH = {"tiny": 256, "ViT-B/32": 8}                      # on a CPU; --batch for others
SIDES = ("ours", "transformers")


@dataclass
class Options:
    """The command line."""
    preset: str = option("", "one of clip.py's ViT presets (default: tiny, then ViT-B/32)")
    batch: int = option(0, "pairs of a step (default: 256 at tiny, else 8)")
    repeats: int = option(9, "timed turns of each side")
    precision: str = option("fp32", "bf16: autocast on both sides", choices=("fp32", "bf16"))
    device: str = option("auto", "auto, cpu, cuda")
    attention: str = option("auto", "ours; the reference has its own",
                            choices=("auto", "hand", "fused"))
    reference: str = option("sdpa", "the reference's attention", choices=("sdpa", "eager"))
    compile: bool = option(False, "torch.compile both")
    memory: str = option("", "only run this side twice and print its peak memory",
                         choices=("", *SIDES))


def reference_model(config, attention):
    """transformers' CLIPModel of our config."""
    from transformers import CLIPConfig, CLIPModel
    c = config
    act = c.act                                           # both call them alike
    return CLIPModel(CLIPConfig(
        projection_dim=c.embed_dim, attn_implementation=attention,
        text_config=dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width,
                         num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads,
                         max_position_embeddings=c.context_length, vocab_size=c.vocab_size,
                         eos_token_id=c.eos_id, bos_token_id=1, pad_token_id=0, hidden_act=act,
                         projection_dim=c.embed_dim),
        vision_config=dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width,
                           num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_heads,
                           image_size=c.image_size, patch_size=c.patch_size, hidden_act=act,
                           projection_dim=c.embed_dim)))


class Side:
    """One of the two models with its optimizer: what is timed."""

    def __init__(self, name, model, batch, options, device):
        self.name, self.model, self.batch = name, model.to(device), batch
        self.half = options.precision == "bf16"
        self.call = torch.compile(model) if options.compile else model
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def loss(self):
        """The contrastive loss of the batch."""
        if self.name == "ours":
            return self.call(self.batch)["contrastive"]
        return self.call(**self.batch, return_loss=True).loss

    def step(self):
        """One training step."""
        with autocast(self.device, self.half):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(self):
        """The loss alone: both towers, no gradients."""
        with autocast(self.device, self.half):
            return self.loss()

    def timed(self, work):
        """Seconds of one call of `step` or `infer`."""
        synchronize(self.device)
        began = time.perf_counter()
        work(self)
        synchronize(self.device)
        return time.perf_counter() - began


def synchronize(device):
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_side(name, options, device):
    """A side with the weights and the inputs that both share."""
    # The reference reads the largest id where the end is 2, so both get an end that is the largest.
    config = PRESETS[options.preset]
    config = dataclasses.replace(config, eos_id=config.vocab_size - 1)
    batch = options.batch or BATCH.get(options.preset, 8)
    torch.manual_seed(0)
    reference = reference_model(config, options.reference)
    images = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size),
                           dtype=torch.uint8)
    ids = torch.randint(3, config.vocab_size - 1, (batch, config.context_length))
    ids[:, -1] = config.eos_id
    if name == "ours":
        model = CLIP(config)
        counts = {"text": config.text_layers, "vision": config.vision_layers}
        weights = translate(reference.state_dict(), HUGGING_FACE, counts, "the reference")
        load_weights(model, weights, "the reference")
        inputs = {"images": images, "ids": ids}
    else:
        model, inputs = reference, {"pixel_values": normalize_pixels(images), "input_ids": ids}
    return Side(name, model, to_device(inputs, device), options, device)


def matrix_rate(device, half):
    """FLOP/s of a large square matrix product: the machine's own rate."""
    n = 2048 if device.type == "cpu" else 8192
    kind = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * n ** 3 / statistics.median(times)


def flops(side, work):
    """Multiplications and additions of matrix products in one call, of what the paper's model
    needs when nothing is left out: counted on the reference."""
    with FlopCounterMode(display=False) as counter:
        work(side)
    return counter.get_total_flops()


def compare(options, device):
    """Print one preset's table."""
    sides = [make_side(name, options, device) for name in SIDES]
    losses = [side.infer().item() for side in sides]
    if abs(losses[0] - losses[1]) > (2e-2 if options.precision == "bf16" else 1e-3):
        raise ValueError(f"the two do not compute the same: losses {losses}")
    batch = len(next(iter(sides[0].batch.values())))
    print(f"{options.preset}, batch {batch}, {options.precision} on {device}, "
          f"{torch.get_num_threads()} threads; both start at a loss of {losses[0]:.3f}")
    print(f"{'':12s}{'ours':>10s}{'reference':>11s}{'ratio':>8s}{'pairs/s':>9s}"
          f"{'of matrix rate: ours':>22s}{'reference':>11s}")
    for title, work in (("step", Side.step), ("inference", Side.infer)):
        times = {name: [] for name in SIDES}
        for turn in range(options.repeats + 2):
            for side in sides if turn % 2 else sides[::-1]:
                seconds = side.timed(work)
                times[side.name] += [seconds] if turn > 1 else []       # the first two warm up
        ours, theirs = (statistics.median(times[name]) for name in SIDES)
        rate = matrix_rate(device, options.precision == "bf16")
        done = flops(sides[1], work) / rate
        print(f"{title:12s}{ours * 1000:7.1f} ms{theirs * 1000:8.1f} ms{ours / theirs:8.3f}"
              f"{batch / ours:9.1f}{done / ours:22.1%}{done / theirs:11.1%}")
    for name in SIDES:
        print(f"peak memory of {name}: {memory_of(name, options, device):,.0f} MB")


def memory_of(name, options, device):
    """Megabytes at the highest of a process that runs only this side."""
    flags = [f"--{key}={getattr(options, key)}"
             for key in ("preset", "batch", "precision", "attention", "reference", "device")]
    out = subprocess.run([sys.executable, __file__, *flags, f"--memory={name}",
                          *(["--compile"] if options.compile else [])],
                         capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def main():
    """Read the command line and run."""
    args = parser(__doc__)
    add_options(args, Options)
    options = Options(**vars(args.parse_args()))
    device = find_device(options.device)
    transformer.ATTENTION = options.attention
    if options.memory:
        side = make_side(options.memory, options, device)
        side.step(), side.step()
        print(peak_memory(device))
        return
    for preset in [options.preset] if options.preset else ["tiny", "ViT-B/32"]:
        if preset not in PRESETS or PRESETS[preset].stages:
            raise ValueError(f"--preset {preset}: the reference has no such tower")
        compare(dataclasses.replace(options, preset=preset), device)


if __name__ == "__main__":
    run_main(main)
