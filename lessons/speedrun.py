"""How soon does CLIP name 95% of unseen shapes? The table of records is in lessons/RESULTS.md.

    python lessons/speedrun.py                                    the present recipe
    python lessons/speedrun.py --optimizer adamw --steps 1100     the recipe of the first record
    python lessons/speedrun.py --seed 1 --lr 2e-3                 --help lists the flags

Rules of the board
- Data: the training split of shapes, as it is. Test: its split of single objects, all 42 classes.
- Model: the preset tiny, as it is. Optimizer, schedule, batch size and order of the data are free.
- Zero-shot accuracy is measured every 20 steps; the first measurement of 0.95 or more counts.
- Seconds run from the start of the command; the time of the measurements is taken off.
- A record is the median of the seeds 0, 1 and 2, with nothing else running.

Each run adds its curve to RUNS/speedrun/curves.json; curves.png beside it shows all of them.
"""
import dataclasses
import sys
import time
from pathlib import Path

BEGAN = time.time()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train                                                          # noqa: E402  first
import torch                                                          # noqa: E402
from PIL import Image, ImageDraw                                      # noqa: E402
from tqdm import tqdm                                                 # noqa: E402

from common.data.batches import EvalData                              # noqa: E402
from common.data.safe_read import read_json                           # noqa: E402
from common.evaluation import retrieval, sheet                        # noqa: E402
from common.training import checkpoint                                # noqa: E402
from common.training.devices import autocast, default_workers         # noqa: E402
from common.training.options import add_options, parser, run_main     # noqa: E402
from common.training.run import Options                               # noqa: E402

GOAL, EVERY = 0.95, 20
FLAGS = ("seed", "steps", "batch_size", "lr", "optimizer", "accumulate", "device", "precision",
         "compile", "runs")
Flags = dataclasses.make_dataclass("Flags", [
    (f.name, f.type, f) for f in dataclasses.fields(Options) if f.name in FLAGS])
COLOURS = ((30, 90, 200), (210, 40, 40), (20, 150, 60), (150, 60, 170), (220, 130, 0), (90, 90, 90))


@torch.no_grad()
def zero_shot_accuracy(run, data):
    """Of the model as it is: a fraction of the test split of single objects."""
    run.model.eval()
    with autocast(run.device, run.half):
        accuracy = retrieval.zero_shot(run.model, data)["zero_shot_accuracy"]
    run.model.train()
    return accuracy


def measured(run, began):
    """Train the run -> [(step, seconds, zero-shot accuracy)], a row every EVERY steps."""
    data = EvalData(run.world, run.tokenizer, run.batches.sources[0].collate, run.device)
    rows, steps = [], run.recipe.steps
    model = torch.compile(run.model) if run.options.compile else run.model
    with tqdm(total=steps, unit="step") as bar:
        for batches in run.batches.loader(0, steps, default_workers(None, run.device)):
            for batch in batches:
                batch.pop("refused")
            loss = train.update(run, model, batches)
            run.step += 1
            bar.update()
            if run.step % EVERY == 0 or run.step == steps:
                loss.item()              # waits for a GPU
                now = time.time()
                rows.append((run.step, now - began, zero_shot_accuracy(run, data)))
                began += time.time() - now
                tqdm.write(f"step {rows[-1][0]:5d} {rows[-1][1]:8.1f} s   {rows[-1][2]:.3f}")
    return rows


def plot(curves, width=640, height=400, left=48, bottom=40):
    """Accuracy against seconds as an RGB picture; curves: {name: [(step, seconds, accuracy)]}."""
    page = Image.new("RGB", (width, height + 16 * len(curves)), "white")
    canvas = ImageDraw.Draw(page)
    last = max(seconds for rows in curves.values() for _, seconds, _ in rows)

    def place(seconds, accuracy):
        return (left + seconds / last * (width - left - 24),
                height - bottom - accuracy * (height - bottom - 16))

    for accuracy in (0, 0.25, 0.5, 0.75, GOAL):
        canvas.line([place(0, accuracy), place(last, accuracy)], fill=sheet.GREY)
        canvas.text((8, place(0, accuracy)[1] - 8), f"{accuracy}", fill=sheet.INK, font=sheet.FONT)
    for seconds in (last * part / 4 for part in range(5)):
        canvas.text((place(seconds, 0)[0], height - bottom + 4), f"{seconds:.0f} s",
                    fill=sheet.INK, font=sheet.FONT, anchor="ma")
    for number, (name, rows) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(seconds, accuracy) for _, seconds, accuracy in rows]
        canvas.line(points, fill=colour, width=2)
        canvas.text((left, height - 16 + 16 * number), name, fill=colour, font=sheet.FONT)
    return page


def main():
    """Read the command line, train once, print the curve and when it passed the goal."""
    args = parser(__doc__)
    add_options(args, Flags)
    flags = vars(args.parse_args())
    folder = Path(flags["runs"]) / "speedrun"
    run = train.build("clip", Options(**flags, out=str(folder), overwrite=True), [], BEGAN)
    rows = measured(run, BEGAN)
    curves = read_json(folder / "curves.json") if (folder / "curves.json").exists() else {}
    name = " ".join(f"--{key} {flags[key]}" for key in flags
                    if key != "runs" and flags[key] != getattr(Options, key))
    curves[name or "no flags"] = rows
    checkpoint.write_json(folder / "curves.json", curves)
    plot(curves).save(folder / "curves.png")
    print(f"curves: {folder / 'curves.png'}")
    passed = next((row for row in rows if row[2] >= GOAL), None)
    print(f"{GOAL:.0%} after {passed[0]} steps and {passed[1]:.1f} seconds" if passed else
          f"{GOAL:.0%} was not reached; the last figure is {rows[-1][2]:.3f}")


if __name__ == "__main__":
    run_main(main)
