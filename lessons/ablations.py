"""The paper's questions at small size, one command each; every figure on unseen scenes.

    python lessons/ablations.py ensemble     many prompts against one (paper, 3.1.4)
    python lessons/ablations.py probe        linear probe against zero-shot (3.2)
    python lessons/ablations.py shift        zero-shot against a supervised classifier of the same
                                               tower, under shifted renderings (3.3)
    python lessons/ablations.py batch        batch 32, 128, 512 at the same number of pairs
    python lessons/ablations.py sigmoid      softmax against SigLIP's sigmoid at a small batch
    python lessons/ablations.py flamingo     Flamingo without each of its parts (its Table 3)

The first three read a trained run (--run, default runs/clip); the others train short runs under
RUNS/ablations, three seeds each, and take up where they were stopped.
"""
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                             # noqa: E402,F401  before torch
import clip                                               # noqa: E402
from common.training import checkpoint, options as cli
from common.evaluation import retrieval as metrics  # noqa: E402
from common.data.batches import Batches, EvalData
from common.data.collators import ImageTextBatch
from common.training.devices import autocast, half_precision       # noqa: E402
from common.data.images import normalize_pixels                       # noqa: E402
from common.data.safe_read import read_json                           # noqa: E402
from common.data.shapes.scene import STYLES                    # noqa: E402
from common.data.shapes.world import Shapes                   # noqa: E402

import torch                                              # noqa: E402
import torch.nn.functional as F                           # noqa: E402
from torch import nn                                      # noqa: E402
from tqdm import tqdm                                     # noqa: E402

STYLED = STYLES[1:]                                       # what the split "shifted" is drawn in


def table(head, rows):
    """Print rows of a name and numbers (or words) under a head."""
    rows = [[c if isinstance(c, str) else f"{c:.3f}" for c in row] for row in [head, *rows]]
    wide = [max(len(row[k]) for row in rows) + 2 for k in range(len(head))]
    for name, *cells in rows:
        print(name.ljust(wide[0]) + "".join(c.rjust(w) for c, w in zip(cells, wide[1:])))


class Bench:
    """A trained run and the splits that experiments ask it about."""

    def __init__(self, path):
        self.trained = clip.from_pretrained(path)
        self.model, size = self.trained.model, self.trained.model.config.image_size
        self.world = Shapes(image_size=size)
        self.collate = ImageTextBatch(self.trained.tokenizer, self.model.config.context_length, size)
        self.view = EvalData(self.world, self.trained.tokenizer, self.collate, "cpu")
        self.records = {split: self.view.records(split) for split in ("single", "shifted")}

    def labels(self, split):
        """int64 (N,): the class of each picture of a split."""
        return torch.tensor([self.world.label(record["source"]) for record in self.records[split]])

    def by_style(self, scores, split):
        """Accuracy on a split, for shifted by the style of the rendering: list of numbers."""
        right = (scores.argmax(dim=1) == self.labels(split)).float()
        if split == "single":
            return [right.mean().item()]
        styles = [record["source"].style for record in self.records[split]]
        return [right[[s == style for s in styles]].mean().item() for style in STYLED]

    def row(self, name, score):
        """A table row: score(split) -> (N, classes), on single and on each shifted style."""
        return [name, *(x for split in ("single", "shifted")
                        for x in self.by_style(score(split), split))]

    @torch.no_grad()
    def zero_shot(self, templates):
        """score(split) of the zero-shot classifier with these templates."""
        columns = self.model.classifier(self.trained.ids, self.world.classes, templates)
        return lambda split: self.model.encode_records(self.view, self.records[split]) @ columns


HEAD = ["accuracy", "plain", *STYLED]


def ensemble(options):
    """Each prompt alone, their ensemble in embedding space, and the mean of their probabilities."""
    bench = Bench(options.run)
    templates, scale = bench.world.templates, bench.model.logit_scale.exp()
    with torch.no_grad():
        rows = [bench.row(repr(t), bench.zero_shot([t])) for t in templates]
        columns = list(zip(*rows))[1:]
        rows.append(["mean of the single prompts", *map(statistics.mean, columns)])
        rows.append(bench.row("ensemble", bench.zero_shot(templates)))
        alone = [bench.zero_shot([t]) for t in templates]
        rows.append(bench.row("mean of probabilities", lambda split: sum(
            (scale * score(split)).softmax(1) for score in alone)))
    table(HEAD, rows)


def probe(options):
    """Logistic regression on the image features before the projection, by labels a class.

    The strength of the penalty is chosen on a fifth of the labelled pictures (paper, A.3).
    """
    bench = Bench(options.run)
    view, world = bench.view, bench.world

    @torch.no_grad()
    def features(records):
        parts = [records[k:k + 256] for k in range(0, len(records), 256)]
        return torch.cat([bench.model.image_features(normalize_pixels(view.images(p))) for p in parts])

    one = Shapes(objects=1, image_size=world.image_size)
    pool = [one.record("train", i) for i in range(64 * len(world.classes))]
    x, y = features(pool), torch.tensor([world.label(r["source"]) for r in pool])
    known = {split: features(bench.records[split]) for split in bench.records}
    rows = [bench.row("zero-shot", bench.zero_shot(world.templates))]
    for shots in (1, 4, 16, 64):
        count = shots * len(world.classes)
        fit, held = slice(0, max(1, count * 4 // 5)), slice(count * 4 // 5, count)
        best = max((10.0 ** k for k in range(-6, 2)), key=lambda l2: metrics.accuracy(
            metrics.logistic_regression(x[fit], y[fit], len(world.classes), l2)(x[held]), y[held]))
        predict = metrics.logistic_regression(x[:count], y[:count], len(world.classes), best)
        rows.append(bench.row(f"linear probe, {shots} a class",
                              lambda split: predict(known[split])))
    table(HEAD, rows)


def shift(options):
    """The same vision tower trained with labels on as many pictures, against zero-shot."""
    bench = Bench(options.run)
    recipe = read_json(Path(options.run) / "config.json")["recipe"]
    steps = options.steps or recipe["steps"]
    torch.manual_seed(0)
    tower = clip.CLIP(bench.model.config)
    width = bench.model.image_features(torch.zeros(1, 3, *[bench.world.image_size] * 2)).shape[1]
    head = nn.Linear(width, len(bench.world.classes))
    world = Shapes(objects=1, image_size=bench.world.image_size)
    batches = Batches(world, lambda records, rngs: (
        bench.collate.images(records), torch.tensor([world.label(r["source"]) for r in records])),
        batch_size=recipe["batch_size"])
    parameters = [*tower.vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["lr"], betas=recipe["betas"], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps)
    for [(images, labels)] in tqdm(batches.loader(0, steps, 0), total=steps, desc="supervised"):
        with autocast(images.device, half_precision("auto", images.device)):
            loss = F.cross_entropy(head(tower.image_features(normalize_pixels(images))).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tower.eval()
    with torch.no_grad():
        table(HEAD, [
            bench.row("zero-shot CLIP", bench.zero_shot(bench.world.templates)),
            bench.row("supervised", lambda split: head(tower.image_features(
                normalize_pixels(bench.view.images(bench.records[split])))))])


def trained(options, stage, name, *flags):
    """result.json of a run of train.py under RUNS/ablations, made unless it is there.

    With "step_seconds", the median of a step's time by its log.
    """
    out = Path(options.runs) / "ablations" / name
    if not (out / "result.json").exists():
        subprocess.run([sys.executable, str(ROOT / "train.py"), stage, "--out", str(out),
                        "--runs", options.runs, "--resume", *flags], check=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(log)]
    return read_json(out / "result.json") | {"step_seconds": statistics.median(times)}


CLIP_FIGURES = {"zero-shot": "zero_shot_accuracy", "image to text": "image_to_text_recall@1",
                "text to image": "text_to_image_recall@1", "seconds": "seconds"}


def compare(options, variants, size, stage="clip", shown=CLIP_FIGURES):
    """Train each variant with each seed and print the median and the range of its figures.

    variants: {name: list of flags}; size: what tells runs of another length apart.
    """
    rows = []
    for name, flags in variants.items():
        results = [trained(options, stage, f"{name.replace(' ', '-')}-{size}-{seed}",
                           "--seed", str(seed), *flags) for seed in range(options.seeds)]
        cells = []
        for figure in shown.values():
            values = sorted(result[figure] for result in results)
            low, middle, high = values[0], statistics.median(values), values[-1]
            cells.append(f"{middle:.3g} ({low:.3g}-{high:.3g})")
        rows.append([name, *cells])
    unit = "pairs" if stage == "clip" else "steps"
    print(f"median (range) of {options.seeds} seeds, {size:,d} {unit} each")
    table(["variant", *shown], rows)


def batch(options):
    """Batch 32, 128 and 512, as many pairs each; the rate grows with the root of the batch."""
    compare(options, {f"softmax {size}": [
        "--batch_size", str(size), "--steps", str(options.pairs // size),
        "--lr", str(1e-3 * (size / 256) ** 0.5)] for size in (32, 128, 512)},
        options.pairs)


def sigmoid(options):
    """Softmax and sigmoid at batch 32."""
    flags = ["--batch_size", "32", "--steps", str(options.pairs // 32),
             "--lr", str(1e-3 / 8 ** 0.5)]
    compare(options, {"softmax 32": flags, "sigmoid 32": [*flags, "--set", "loss=sigmoid"]},
            options.pairs)


FLAMINGO_FIGURES = {"captions": "caption_accuracy_single", "questions": "vqa_accuracy",
                    "pages": "document_accuracy", "clips": "clip_accuracy", "8 shots": "shots_8",
                    "text": "perplexity_lm", "s a step": "step_seconds"}
FLAMINGO = {
    "flamingo": [],
    "gates open": ["--set", "gate_init=3"],
    "all pictures": ["--set", "only_latest_image=false"],
    "mlp resampler": ["--set", "resampler=mlp"],
    "every 2nd": ["--set", "cross_attn_every=2"],
    "every 4th": ["--set", "cross_attn_every=4"],
    "no pages": ["--set", "interleaved=false"],
    "lm unfrozen": ["--unfreeze", "lm.*"],
}


def flamingo(options):
    """What each part of Flamingo is for: figures without it. Needs runs/clip and runs/lm."""
    steps = options.steps or 400
    compare(options, {name: ["--steps", str(steps), "--batch_size", "120", *flags]
                      for name, flags in FLAMINGO.items()},
            steps, "flamingo", FLAMINGO_FIGURES)


EXPERIMENTS = {f.__name__: f for f in (ensemble, probe, shift, batch, sigmoid, flamingo)}


def main():
    """Read the command line and run one experiment."""
    parser = cli.parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT",
                        help=", ".join(EXPERIMENTS))
    parser.add_argument("--run", default="runs/clip", help="a CLIP trained on shapes")
    parser.add_argument("--runs", default="runs", help="where short runs are kept")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default 3)")
    parser.add_argument("--pairs", type=int, default=128000,
                        help="pairs each run sees (default 128000)")
    parser.add_argument("--steps", type=int,
                        help="shift: of the supervised classifier; flamingo: of a run")
    options = parser.parse_args()
    EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    cli.run(main)
