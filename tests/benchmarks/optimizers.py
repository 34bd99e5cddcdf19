"""A training step with the recipe's Muon and with AdamW alone, in turns in one process.

    python tests/benchmarks/optimizers.py clip        also: emoji, lm, flamingo (needs runs/)

Prints the median seconds of a step (its batch included), and of the optimizer's part; then what the
recipe's steps take, what those of the recipe with AdamW took that reaches the same figures, and
their ratio. The last lines are a step of Muon alone, this project's and torch's, in turns; with
ONEDNN_MAX_CPU_ISA=AVX2 as on a processor without bf16 instructions.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train                                                          # noqa: E402  first
import torch                                                          # noqa: E402

from common.training.optimizer import Muon                            # noqa: E402
from common.training.run import Options                               # noqa: E402

ADAMW = {"clip": {"steps": 1100, "batch_size": 256},                  # the recipes before Muon
         "emoji": {"steps": 900, "batch_size": 256, "data": "emoji"},
         "lm": {"steps": 4000}, "flamingo": {"steps": 750, "batch_size": 160}}


class Side:
    """A run, what its steps took and what its optimizer took of them, in seconds."""

    def __init__(self, stage, runs, **flags):
        options = Options(out=tempfile.mkdtemp(), runs=runs, **flags)
        self.run = train.build(stage, options, [], time.time())
        self.loader = iter(self.run.batches.loader(0, self.run.recipe.steps, 0))
        self.steps, self.parts = [], []
        self.optimize, self.run.optimizer.step = self.run.optimizer.step, self.timed

    def timed(self):
        began = time.perf_counter()
        self.optimize()
        self.parts.append(time.perf_counter() - began)

    def step(self):
        began = time.perf_counter()
        batches = next(self.loader)
        for batch in batches:
            batch.pop("refused")
        train.update(self.run, self.run.model, batches).item()
        self.run.step += 1
        self.steps.append(time.perf_counter() - began)


def compare_muons(matrices, count):
    """Print the median milliseconds of a step of each Muon over matrices with random gradients."""
    for p in matrices:
        p.grad = torch.randn_like(p)

    def group():                         # an optimizer writes its options into it
        return [{"params": matrices, "weight_decay": 0.05}]
    sides = {"Muon in bf16": Muon(group(), lr=1e-3, half=True),
             "Muon in fp32": Muon(group(), lr=1e-3, half=False),
             "torch.optim.Muon": torch.optim.Muon(group(), adjust_lr_fn="match_rms_adamw")}
    times = {name: [] for name in sides}
    for _ in range(count + 2):
        for name, optimizer in sides.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - began))
    for name, own in times.items():
        print(f"{name:17s} {statistics.median(own[2:]):7.1f} ms for {len(matrices)} matrices")


def main():
    """Read the command line and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=ADAMW)
    parser.add_argument("--runs", default="runs", help="where flamingo finds its parts")
    parser.add_argument("--count", type=int, default=20, help="steps of each")
    args = parser.parse_args()
    stage = "clip" if args.stage == "emoji" else args.stage
    data = {"data": "emoji"} if args.stage == "emoji" else {}
    sides = {"AdamW": Side(stage, args.runs, optimizer="adamw", **ADAMW[args.stage]),
             "Muon": Side(stage, args.runs, **data)}
    for _ in range(args.count + 2):
        for side in sides.values():
            side.step()
    totals = {}
    for name, side in sides.items():
        recipe = side.run.recipe
        step, part = statistics.median(side.steps[2:]), statistics.median(side.parts[2:])
        totals[name] = recipe.steps * step
        print(f"{name:6s} {step:.3f} s a step of {recipe.batch_size}, of which the optimizer "
              f"{part:.4f} s; {recipe.steps} steps: {totals[name]:.0f} s")
    print(f"ratio {totals['Muon'] / totals['AdamW']:.2f}")

    muon = sides["Muon"].run.optimizer.parts[0]
    compare_muons([p for group in muon.param_groups for p in group["params"]], args.count)


if __name__ == "__main__":
    main()
