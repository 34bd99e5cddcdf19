"""The papers' ablations at small size, one command each; every figure is of unseen scenes.

    python lessons/ablations.py ensemble     many prompts against one (CLIP, 3.1.4)
    python lessons/ablations.py probe        a linear probe against zero-shot (CLIP, 3.2)
    python lessons/ablations.py shift        zero-shot against a supervised classifier with the same
                                             encoder, under shifted renderings (CLIP, 3.3)
    python lessons/ablations.py batch        batch 32, 128, 512 at the same number of pairs
    python lessons/ablations.py sigmoid      softmax against SigLIP's sigmoid at a small batch
    python lessons/ablations.py flamingo     Flamingo without each of its parts (its Table 3)
    python lessons/ablations.py blip         BLIP without each of its parts; sharing (its Table 3)
    python lessons/ablations.py capfilt      web texts as they are, filtered, with written ones,
                                             both (BLIP, Table 1); written by beams (Table 2);
                                             one model as captioner and filter (Table 4)
    python lessons/ablations.py stage1       BLIP-2's first stage without ITG (its Table 6), and with
                                             1, 4 or 16 queries
    python lessons/ablations.py stage2       its second stage with and without the first (Figure 5)
    python lessons/ablations.py instruct     InstructBLIP with a Q-Former that gets no instruction,
                                             and with plain sampling (its Table 2), with 4 queries
    python lessons/ablations.py shots        shots in the prompt: Flamingo gains, BLIP-2 does not
    python lessons/ablations.py alignment    LLaVA with and without its first stage, at equal steps
    python lessons/ablations.py projectors   a linear one, an MLP (LLaVA-1.5), Qwen-VL's adapter
    python lessons/ablations.py instructions the kinds of instructions (LLaVA, Table 4), and a loss
                                             on all text
    python lessons/ablations.py tiles        letters in a large picture, with tiles and without

The first three measure a trained run (--run, default runs/clip). The others train short runs under
RUNS/ablations, three seeds each, and continue where they were stopped.
"""
import functools
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                         # noqa: E402,F401  first
import torch                                                          # noqa: E402
import torch.nn.functional as F                                       # noqa: E402
from torch import nn                                                  # noqa: E402
from tqdm import tqdm                                                 # noqa: E402

import blip as blip_model                                             # noqa: E402
import blip2 as blip2_model                                           # noqa: E402
import clip                                                           # noqa: E402
import flamingo as flamingo_model                                     # noqa: E402
from common.data.batches import Batches, DataSource, EvalData         # noqa: E402
from common.data.collators import ImageTextBatch                      # noqa: E402
from common.data.images import normalize_pixels                       # noqa: E402
from common.data.safe_read import read_json                           # noqa: E402
from common.data.shapes.scene import STYLES                           # noqa: E402
from common.data.shapes.world import Shapes                           # noqa: E402
from common.evaluation import capfilt as capfilt_files                # noqa: E402
from common.evaluation import matching, questions, retrieval          # noqa: E402
from common.evaluation.writing import Writer                          # noqa: E402
from common.training.devices import autocast, half_precision          # noqa: E402
from common.training.optimizer import Recipe, make_optimizer, set_learning_rate    # noqa: E402
from common.training.options import parser, run_main                  # noqa: E402

SHIFTED_STYLES = STYLES[1:]              # of the split "shifted"


def table(head, rows):
    """Print rows of a name and numbers (or words) under a head."""
    rows = [[c if isinstance(c, str) else f"{c:.3f}" for c in row] for row in [head, *rows]]
    wide = [max(len(row[k]) for row in rows) + 2 for k in range(len(head))]
    for name, *cells in rows:
        print(name.ljust(wide[0]) + "".join(c.rjust(w) for c, w in zip(cells, wide[1:])))


def logistic_regression(features, labels, classes, l2, steps=100):
    """Multinomial logistic regression by L-BFGS, as CLIP's linear probe (paper, A.3).

    features float (N, D), labels int64 (N,); l2: strength of the squared penalty on the weights.
    Returns predict(features (M, D)) -> scores (M, classes). Features are standardized inside.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    weight = x.new_zeros(x.shape[1], classes).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + l2 * weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(closure)
    return lambda other: ((other - mean) / std @ weight + bias).detach()


class Bench:
    """A trained CLIP and the splits that it is measured on."""

    def __init__(self, path):
        self.retriever = clip.from_pretrained(path)
        self.model, tokenizer = self.retriever.model, self.retriever.tokenizer
        config = self.model.config
        self.world = Shapes(image_size=config.image_size)
        self.collate = ImageTextBatch(tokenizer, config.context_length, config.image_size)
        self.data = EvalData(self.world, tokenizer, self.collate, "cpu")
        self.records = {split: self.data.records(split) for split in ("single", "shifted")}

    def labels(self, records):
        """int64 (N,): the class of the object in each record."""
        return torch.tensor([self.world.label(record["source"]) for record in records])

    def accuracies(self, scores, split):
        """Accuracy on a split, of shifted for each style: a list of numbers."""
        records = self.records[split]
        is_right = (scores.argmax(dim=1) == self.labels(records)).float()
        if split == "single":
            return [is_right.mean().item()]
        styles = [record["source"].style for record in records]
        return [is_right[[s == style for s in styles]].mean().item() for style in SHIFTED_STYLES]

    def row(self, name, score):
        """A table row: score(split) -> (N, classes), on single and on each shifted style."""
        return [name, *(x for split in ("single", "shifted")
                        for x in self.accuracies(score(split), split))]

    @torch.no_grad()
    def zero_shot(self, templates):
        """score(split) of the zero-shot classifier with these templates."""
        classifier = retrieval.zero_shot_classifier(self.model, self.retriever.ids,
                                                    self.world.classes, templates)
        return lambda split: retrieval.encode_records(self.model, self.data,
                                                      self.records[split]) @ classifier


HEAD = ["accuracy", "plain", *SHIFTED_STYLES]


def ensemble(args):
    """Each prompt alone, their ensemble in embedding space, and the mean of their probabilities."""
    bench = Bench(args.run)
    templates, scale = bench.world.templates, bench.model.logit_scale.exp()
    with torch.no_grad():
        single = [bench.zero_shot([template]) for template in templates]
        rows = [bench.row(repr(template), score) for template, score in zip(templates, single)]
        columns = list(zip(*rows))[1:]
        rows.append(["mean of the single prompts", *map(statistics.mean, columns)])
        rows.append(bench.row("ensemble", bench.zero_shot(templates)))
        rows.append(bench.row("mean of probabilities", lambda split: sum(
            (scale * score(split)).softmax(dim=1) for score in single)))
    table(HEAD, rows)


def probe(args):
    """Logistic regression on the image features before the projection, by labels a class.

    The strength of the penalty is chosen on a fifth of the labelled images (paper, A.3).
    """
    bench = Bench(args.run)
    classes = len(bench.world.classes)

    @torch.no_grad()
    def features(records):
        chunks = [bench.data.images(records[k:k + 256]) for k in range(0, len(records), 256)]
        return torch.cat([bench.model.image_features(normalize_pixels(x)) for x in chunks])

    world = Shapes(objects=1, image_size=bench.world.image_size)
    pool = [world.record("train", i) for i in range(64 * classes)]
    x, y = features(pool), bench.labels(pool)
    test = {split: features(records) for split, records in bench.records.items()}
    rows = [bench.row("zero-shot", bench.zero_shot(bench.world.templates))]
    for shots in (1, 4, 16, 64):
        count = shots * classes
        fit, held_out = slice(0, max(1, count * 4 // 5)), slice(count * 4 // 5, count)
        best = max((10.0 ** k for k in range(-6, 2)), key=lambda l2: retrieval.accuracy(
            logistic_regression(x[fit], y[fit], classes, l2)(x[held_out]), y[held_out]))
        predict = logistic_regression(x[:count], y[:count], classes, best)
        rows.append(bench.row(f"linear probe, {shots} a class",
                              lambda split: predict(test[split])))
    table(HEAD, rows)


def shift(args):
    """The same image encoder trained with labels on as many images, against zero-shot."""
    bench = Bench(args.run)
    recipe = Recipe(**read_json(Path(args.run) / "config.json")["recipe"])
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    torch.manual_seed(0)
    encoder = clip.CLIP(bench.model.config)
    width = bench.model.image_features(torch.zeros(1, 3, *[bench.world.image_size] * 2)).shape[1]
    head = nn.Linear(width, len(bench.world.classes))
    world = Shapes(objects=1, image_size=bench.world.image_size)

    def collate(records, rngs):
        return {"images": bench.collate.images(records), "labels": bench.labels(records)}

    batches = Batches([DataSource(world, collate)], batch_size=recipe.batch_size)
    cpu = torch.device("cpu")
    half = half_precision("auto", cpu)
    optimizer = make_optimizer(nn.ModuleList([encoder.vision, head]), recipe, half)
    loader = batches.loader(0, recipe.steps, 0)
    for step, [batch] in enumerate(tqdm(loader, total=recipe.steps, desc="supervised")):
        set_learning_rate(optimizer, recipe, step)
        with autocast(cpu, half):
            logits = head(encoder.image_features(normalize_pixels(batch["images"])))
        loss = F.cross_entropy(logits.float(), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        table(HEAD, [
            bench.row("zero-shot CLIP", bench.zero_shot(bench.world.templates)),
            bench.row("supervised", lambda split: head(encoder.image_features(
                normalize_pixels(bench.data.images(bench.records[split])))))])


def trained(args, stage, name, *flags):
    """result.json of a run of train.py under RUNS/ablations, made unless it is there.

    It also has "step_seconds", the median time of a step by its log.
    """
    out = Path(args.runs) / "ablations" / name
    if not (out / "result.json").exists():
        subprocess.run([sys.executable, str(ROOT / "train.py"), stage, "--out", str(out),
                        "--runs", args.runs, "--resume", *flags], check=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(log)]
    return read_json(out / "result.json") | {"step_seconds": statistics.median(times)}


CLIP_FIGURES = {"zero-shot": "zero_shot_accuracy", "image to text": "image_to_text_recall@1",
                "text to image": "text_to_image_recall@1", "seconds": "seconds"}


def compare(args, variants, size, stage="clip", figures=CLIP_FIGURES):
    """Train each variant with each seed and print the median and the range of its figures.

    variants: {name: list of flags}. size: pairs or steps of a run, a part of its folder's name.
    figures: {head of a column: name in result.json}.
    """
    rows = []
    for name, flags in variants.items():
        results = [trained(args, stage, f"{name.replace(' ', '-')}-{size}-{seed}",
                           "--seed", str(seed), *flags) for seed in range(args.seeds)]
        cells = []
        for figure in figures.values():
            values = sorted(result[figure] for result in results)
            low, middle, high = values[0], statistics.median(values), values[-1]
            cells.append(f"{middle:.3g} ({low:.3g}-{high:.3g})")
        rows.append([name, *cells])
    unit = "pairs" if stage == "clip" else "steps"
    print(f"median (range) of {args.seeds} seeds, {size:,d} {unit} each")
    table(["variant", *figures], rows)


def batch(args):
    """Batch 32, 128 and 512, as many pairs each; lr grows with the square root of the batch."""
    compare(args, {f"softmax {size}": [
        "--batch_size", str(size), "--steps", str(args.pairs // size),
        "--lr", str(1e-3 * (size / 128) ** 0.5)] for size in (32, 128, 512)},
        args.pairs)


def sigmoid(args):
    """Softmax and sigmoid at batch 32."""
    flags = ["--batch_size", "32", "--steps", str(args.pairs // 32),
             "--lr", str(1e-3 / 4 ** 0.5)]
    compare(args, {"softmax 32": flags, "sigmoid 32": [*flags, "--set", "loss=sigmoid"]},
            args.pairs)


FLAMINGO_FIGURES = {"captions": "caption_accuracy_single", "and of two": "caption_accuracy",
                    "questions": "vqa_accuracy", "pages": "document_accuracy",
                    "clips": "video_accuracy", "8 shots": "shots_8", "text": "perplexity_lm",
                    "s a step": "step_seconds"}
FLAMINGO = {
    "flamingo": [],
    "gates open": ["--set", "gate_init=3"],
    "all images": ["--set", "only_latest_image=false"],
    "mlp resampler": ["--set", "resampler=mlp"],
    "every 2nd": ["--set", "cross_attn_every=2"],
    "every 4th": ["--set", "cross_attn_every=4"],
    "no pages": ["--set", "interleaved=false"],
    "lm unfrozen": ["--unfreeze", "lm.*"],
}


def flamingo(args):
    """Figures of Flamingo without each of its parts. Needs RUNS/clip and RUNS/lm."""
    steps = args.steps or 250
    compare(args, {name: ["--steps", str(steps), *flags] for name, flags in FLAMINGO.items()},
            steps, "flamingo", FLAMINGO_FIGURES)


BLIP_FIGURES = {"image to text": "image_to_text_recall@1",
                "text to image": "text_to_image_recall@1",
                "re-ranked": "image_to_text_recall@1_reranked",
                "and": "text_to_image_recall@1_reranked", "matching": "itm_accuracy",
                "captions": "caption_accuracy_single", "and of two": "caption_accuracy"}
BLIP = {
    "blip": [],
    "random negatives": ["--set", "hardness=0"],
    "hardest negatives": ["--set", "hardness=1"],
    "no soft targets": ["--set", "alpha=0"],
    "no queue": ["--set", "queue_size=0"],
    "no momentum": ["--set", "momentum=0"],
    "all shared": ["--set", "sharing=all"],
    "all but cross": ["--set", "sharing=all-but-ca"],
    "nothing shared": ["--set", "sharing=none"],
}


def blip(args):
    """Figures of BLIP without each of its parts, from noisy web texts."""
    steps = args.steps or 300
    compare(args, {name: ["--steps", str(steps), *flags] for name, flags in BLIP.items()},
            steps, "blip", BLIP_FIGURES)


@functools.cache
def judged_texts(captioner, filter, how):
    """[(line of a file, is synthetic, is kept by the filter), ...] of shapes' web part.

    captioner, filter: runs; how: options of generation, as pairs. Prints the fractions of texts
    that the filter keeps and that are true.
    """
    writer = Writer(*blip_model.open_trained(captioner, ("lm",)))
    judge, world = blip_model.open_trained(filter, ("itm",)), Shapes()
    lines, judged = [], {False: [], True: []}
    rows = blip_model.capfilt_texts(writer, lambda r: matching.probabilities(*judge, r) > 0.5,
                                    world, **dict(how))
    for index, record, synthetic, keep in tqdm(rows, "texts", 2 * world.size("web")):
        lines.append((capfilt_files.line(world, index, record), synthetic, keep))
        judged[synthetic].append((keep, world.is_true(record["texts"][0], record["source"])))
    for synthetic, pairs in judged.items():
        kept = [true for keep, true in pairs if keep]
        print(f"{Path(captioner).name} {'written' if synthetic else 'web'} texts: kept "
              f"{len(kept) / len(pairs):.3f}, true {statistics.mean(t for _, t in pairs):.3f} "
              f"before and {statistics.mean(kept or [0]):.3f} after")
    return lines


def write_texts(args, name, captioner, filter, kept, **how):
    """A file of texts for --data shapes:texts=FILE, made unless it is there -> its name.

    kept(is synthetic, is kept): whether a text of `judged_texts` is written.
    """
    out = Path(args.runs) / "ablations" / f"{name}.jsonl"
    if not out.exists():
        rows = judged_texts(captioner, filter, tuple(how.items()))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line) + "\n" for line, synthetic, keep in rows
                               if kept(synthetic, keep)))
    return out


def capfilt(args):
    """A new BLIP from each of several sets of texts. Needs RUNS/blip, its captioner and filter."""
    runs, steps = Path(args.runs), args.steps or 300
    parts = runs / "blip-captioner", runs / "blip-filter"
    trained(args, "blip", "shared", "--init", str(runs / "blip"), "--set", "human_only=true",
            "--steps", str(steps))
    shared = [runs / "ablations" / "shared"] * 2

    def both(synthetic, keep):
        return keep
    texts = {"none": write_texts(args, "none", *parts, lambda synthetic, keep: not synthetic),
             "filter": write_texts(args, "filter", *parts,
                                   lambda synthetic, keep: keep and not synthetic),
             "captioner": write_texts(args, "captioner", *parts, lambda synthetic, keep: True),
             "both": write_texts(args, "both", *parts, both),
             "both, beams": write_texts(args, "beams", *parts, both, temperature=0.0, top_p=1.0,
                                        num_beams=3, generator=None),
             "both, one model": write_texts(args, "one", *shared, both)}
    compare(args, {name: ["--steps", str(steps), "--data", f"shapes:texts={file}",
                          "--from", f"vision={runs / 'clip'}"]
                   for name, file in texts.items()}, steps, "blip", BLIP_FIGURES)


STAGE1_FIGURES = {"image to text": "image_to_text_recall@1",
                  "text to image": "text_to_image_recall@1",
                  "re-ranked": "image_to_text_recall@1_reranked",
                  "and": "text_to_image_recall@1_reranked", "matching": "itm_accuracy"}
STAGE1 = {"stage 1": [], "without itg": ["--losses", "itc,itm"],
          **{f"{n} queries": ["--set", f"num_queries={n}"] for n in (1, 4, 16)}}
STAGE2_FIGURES = {"captions": "caption_accuracy_single", "and of two": "caption_accuracy",
                  "questions": "vqa_accuracy", "wrong image": "vqa_accuracy_blind"}


def stage1(args):
    """Figures of BLIP-2's first stage; below, of a second stage of twice the steps from each."""
    first = args.steps or 200
    second = 2 * first
    compare(args, {name: ["--steps", str(first), *flags] for name, flags in STAGE1.items()},
            first, "blip2-stage1", STAGE1_FIGURES)
    compare(args, {f"from {name}": ["--steps", str(second), "--init", short_run(args, name, first)]
                   for name in STAGE1}, second, "blip2-stage2", STAGE2_FIGURES)


def short_run(args, name, size, seed=0):
    """The folder of a run that `compare` has made."""
    return str(Path(args.runs) / "ablations" / f"{name.replace(' ', '-')}-{size}-{seed}")


def stage2(args):
    """The second stage from RUNS/blip2-stage1 and from nothing, with both language models."""
    first = args.steps or 400
    for stage, name, steps in (("blip2-stage2", "decoder", first),
                               ("blip2-stage2-t5", "t5", 2 * first)):        # in smaller batches
        compare(args, {f"{name}{more}": ["--steps", str(steps), *flags] for more, flags in (
            ("", []), (" without stage 1", ["--init", "none"]))}, steps, stage, STAGE2_FIGURES)


INSTRUCT_FIGURES = {"captions": "caption_accuracy", "questions": "vqa_accuracy",
                    "wrong image": "vqa_accuracy_blind",
                    "statements": "vqa_accuracy/statement", "dialogues": "vqa_accuracy/dialogue",
                    "choices": "vqa_accuracy/choice"}
INSTRUCT = {"instructed": [], "blind q-former": ["--set", "qformer_text=false"],
            "plain sampling": ["--set", "balance=1"], "uniform sampling": ["--set", "balance=0"]}


def instruct(args):
    """InstructBLIP through 4 queries. Statements, dialogues and choices are tasks held out."""
    steps = args.steps or 400
    start = short_run(args, "from 4 queries", steps)
    compare(args, {name: ["--steps", str(steps), "--init", start, *flags]
                   for name, flags in INSTRUCT.items()}, steps, "blip2-instruct", INSTRUCT_FIGURES)


def shots(args):
    """Labels that only shots define, ranked by RUNS/flamingo and by RUNS/blip2-stage2."""
    world, rows = Shapes(), []
    for name, file in (("flamingo", flamingo_model), ("blip2-stage2", blip2_model)):
        opened = file.from_pretrained(Path(args.runs) / name)
        writer = opened if isinstance(opened, Writer) else Writer(*opened)
        found = questions.episodes(writer, world, 400)
        rows.append([name, *(value for key, value in found.items() if key != "shots_chance")])
    table(["labels, chance 0.5", "0 shots", "2", "4", "8", "8 shuffled"], rows)


LLAVA_FIGURES = {"captions": "caption_accuracy", "questions": "vqa_accuracy",
                 "wrong image": "vqa_accuracy_blind", "probes": "hallucination_accuracy",
                 "true": "true_statements", "score": "relative_score"}


def llava_start(args, name, steps, *flags):
    """The folder of a run of LLaVA's first stage."""
    trained(args, "llava-stage1", f"{name}-{steps}", "--steps", str(steps), *flags)
    return str(Path(args.runs) / "ablations" / f"{name}-{steps}")


def alignment(args):
    """Two stages against the second alone, which gets the steps of both."""
    second = args.steps or 300
    first = second // 2
    start = llava_start(args, "mlp", first)
    compare(args, {"two stages": ["--init", start, "--steps", str(second)],
                   "stage 2 alone": ["--init", "none", "--steps", str(first + second)]},
            first + second, "llava-stage2", LLAVA_FIGURES)


def projectors(args):
    """Each projector through both stages."""
    second = args.steps or 300
    compare(args, {name: ["--steps", str(second), "--init", llava_start(
        args, name, second // 2, "--set", f"projector={name}")]
        for name in ("linear", "mlp", "adapter")}, second, "llava-stage2", LLAVA_FIGURES)


INSTRUCTIONS = {"full data": "conversation=58,detail=23,reasoning=77",
                "detail and reasoning": "detail=23,reasoning=77",
                "conversation and little": "conversation=58,detail=1.15,reasoning=7.7",
                "conversation": "conversation=1"}


def instructions(args):
    """The paper's rows of data; the last has 20 steps at almost no rate."""
    steps = args.steps or 300
    start = ["--init", llava_start(args, "mlp", steps // 2)]
    variants = {name: [*start, "--steps", str(steps), "--set", f"mix={mix}"]
                for name, mix in INSTRUCTIONS.items()}
    variants["loss on all text"] = [*variants["full data"], "--set", "loss_on=all"]
    variants["no instructions"] = [*start, "--steps", "20", "--lr", "1e-12"]
    compare(args, variants, steps, "llava-stage2", LLAVA_FIGURES)


def tiles(args):
    """Letters in a large picture: the tiles and the whole picture, and the whole picture alone."""
    steps = args.steps or 600
    start = ["--init", llava_start(args, "mlp", 150), "--steps", str(steps)]
    compare(args, {"tiles": start, "whole picture": [*start, "--set", "views=pad"]}, steps,
            "llava-tiles", {"strings": "reading_accuracy", "letters": "reading_accuracy/letters"})


ABLATIONS = {f.__name__: f for f in (ensemble, probe, shift, batch, sigmoid, flamingo, blip,
                                     capfilt, stage1, stage2, instruct, shots, alignment,
                                     projectors, instructions, tiles)}


def main():
    """Read the command line and run one ablation."""
    options = parser(__doc__)
    options.add_argument("ablation", choices=ABLATIONS, metavar="ABLATION",
                         help=", ".join(ABLATIONS))
    options.add_argument("--run", default="runs/clip", help="a CLIP trained on shapes")
    options.add_argument("--runs", default="runs", help="where short runs are kept")
    options.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default 3)")
    options.add_argument("--pairs", type=int, default=128000,
                         help="pairs that each run sees (default 128000)")
    options.add_argument("--steps", type=int,
                         help="shift: of the supervised classifier; flamingo and what follows: "
                         "of a run")
    args = options.parse_args()
    ABLATIONS[args.ablation](args)


if __name__ == "__main__":
    run_main(main)
