"""What benchmarks against another implementation share: options, steps, works timed in turns."""
import statistics
import time
from dataclasses import dataclass

import torch

from common.training.devices import autocast
from common.training.options import add_options, option, parser


@dataclass
class Options:
    """The command line."""
    preset: str = option("tiny", "one of the model's")
    batch: int = option(64, "images with a text each")
    length: int = option(16, "tokens of a text")
    repeats: int = option(9, "timed turns of each side")
    precision: str = option("fp32", "bf16: autocast on both sides", choices=("fp32", "bf16"))
    device: str = option("auto", "auto, cpu, cuda")

    @property
    def half(self):
        """Whether both sides run under bf16 autocast."""
        return self.precision == "bf16"


def read_options(doc, presets):
    """The command line's Options. Raises ValueError for a preset that is none of `presets`."""
    args = parser(doc)
    add_options(args, Options)
    options = Options(**vars(args.parse_args()))
    if options.preset not in presets:
        raise ValueError(f"--preset {options.preset}: there are {', '.join(presets)}")
    return options


def train_step(model, loss, device, half):
    """A function of no arguments: a step of AdamW on what is trained in the model -> the loss.

    loss: a function of no arguments.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step():
        with autocast(device, half):
            value = loss()
        value.backward()
        optimizer.step(), optimizer.zero_grad()
        return value.item()              # waits for the device
    return step


def writer(generate, device, half):
    """A function of no arguments: the ids that `generate` writes, a list."""
    @torch.no_grad()
    def write():
        with autocast(device, half):
            return generate().tolist()
    return write


def medians(works, repeats):
    """{side: function of no arguments} -> {side: median seconds}, in turns; two turns warm up."""
    times = {name: [] for name in works}
    for turn in range(repeats + 2):
        for name in [*works][::1 if turn % 2 else -1]:
            began = time.perf_counter()
            works[name]()
            times[name] += [time.perf_counter() - began] if turn > 1 else []
    return {name: statistics.median(each) for name, each in times.items()}


def compare(title, works, options):
    """Print one line: the medians of {"ours", another} and their ratio (below 1: ours is faster).

    Raises ValueError where the two return other ids, or losses that differ by more than 0.001.
    """
    (mine, other), names = (works[name]() for name in works), [*works]
    same = abs(mine - other) < 1e-3 if isinstance(mine, float) else mine == other
    if not (same or options.half):
        raise ValueError(f"{title}: the two do not compute the same")
    first, second = medians(works, options.repeats).values()
    print(f"{options.preset} {title:16s} batch {options.batch} {options.precision}: {names[0]} "
          f"{first * 1000:,.1f} ms, {names[1]} {second * 1000:,.1f} ms, ratio "
          f"{first / second:.2f}", flush=True)
