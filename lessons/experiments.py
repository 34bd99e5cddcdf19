"""What the ablations need beside train.py: other objectives for CLIP's encoder, probes, web texts.

    python lessons/experiments.py words --out runs/words               trains
    python lessons/experiments.py prompts runs/clip --out runs/prompts     measures a run
    python lessons/experiments.py written CAPTIONER FILTER --out runs/texts    writes texts, too

The figures, fractions of unseen pictures, are in OUT/result.json. lessons/ablations.py says which
of these commands the papers' claims need.
"""
import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                         # noqa: E402,F401  first
import torch                                                          # noqa: E402
import torch.nn.functional as F                                       # noqa: E402
from torch import nn                                                  # noqa: E402
from tqdm import tqdm                                                 # noqa: E402

import blip                                                           # noqa: E402
import blip2                                                          # noqa: E402
import clip                                                           # noqa: E402
from common.data.batches import Batches, DataSource, EvalData, world_tokenizer        # noqa: E402
from common.data.collators import ImageTextBatch                      # noqa: E402
from common.data.images import normalize_pixels                       # noqa: E402
from common.data.shapes.scene import STYLES                           # noqa: E402
from common.data.shapes.world import Shapes                           # noqa: E402
from common.data.tokenizer import CONTROL_IDS, EOS, PAD               # noqa: E402
from common.evaluation import capfilt, matching, questions, retrieval    # noqa: E402
from common.evaluation.writing import Writer                          # noqa: E402
from common.generation import score_candidates                        # noqa: E402
from common.language import PRESETS as LANGUAGE_PRESETS, LanguageModel    # noqa: E402
from common.losses import next_token_loss                             # noqa: E402
from common.prompts import IGNORED, labels_of                        # noqa: E402
from common.training.checkpoint import write_json                     # noqa: E402
from common.training.devices import autocast, half_precision          # noqa: E402
from common.training.optimizer import find_recipe, make_optimizer, set_learning_rate  # noqa: E402
from common.training.options import parser, run_main                  # noqa: E402

CLIP_STEPS = 200                         # a third of clip.py's recipe


# ------------------------------------------------------------------ CLIP's encoder

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
    """The splits on which CLIP's image encoder is measured, with a tokenizer and a collator."""

    def __init__(self, tokenizer, config):
        self.world, self.tokenizer = Shapes(image_size=config.image_size), tokenizer
        self.collate = ImageTextBatch(tokenizer, config.context_length, config.image_size)
        self.data = EvalData(self.world, tokenizer, self.collate, "cpu")
        self.records = {split: self.data.records(split) for split in ("single", "shifted")}
        self.phrases = self.collate.ids(self.world.classes)           # (classes, T)

    def labels(self, records):
        """int64 (N,): the class of the object in each record."""
        return torch.tensor([self.world.label(record["source"]) for record in records])

    def pixels(self, records):
        """Normalized images, float (N, 3, H, W)."""
        return normalize_pixels(self.data.images(records))

    def accuracy(self, score, split="single"):
        """Of score(records) -> (N, classes); of "shifted" the mean over its styles."""
        records = self.records[split]
        is_right = (score(records).argmax(dim=1) == self.labels(records)).float()
        styles = [record["source"].style for record in records]
        groups = STYLES[1:] if split == "shifted" else ("plain",)
        return statistics.mean(is_right[[s == style for s in styles]].mean().item()
                               for style in groups)

    def kept_under_shift(self, score):
        """Accuracy on shifted renderings / on plain ones."""
        return self.accuracy(score, "shifted") / self.accuracy(score)


@torch.no_grad()
def prompts(args, run):
    """Prompts, linear probes and robustness of a CLIP.

    The penalty of a probe is chosen on a fifth of its labelled images (paper, A.3).
    """
    retriever = clip.from_pretrained(run)
    model, bench = retriever.model, Bench(retriever.tokenizer, retriever.model.config)
    templates, classes = bench.world.templates, len(bench.world.classes)

    def zero_shot(templates):
        classifier = retrieval.zero_shot_classifier(model, retriever.ids, bench.world.classes,
                                                    templates)
        return lambda records: retrieval.encode_records(model, bench.data, records) @ classifier
    figures = {
        "accuracy_ensemble": bench.accuracy(zero_shot(templates)),
        "accuracy_single_prompts": statistics.mean(
            bench.accuracy(zero_shot([template])) for template in templates),
        "kept_under_shift": bench.kept_under_shift(zero_shot(templates)),
        "accuracy_ensemble_chance": 1 / classes}

    def features(records):
        return torch.cat([model.image_features(bench.pixels(records[k:k + 256]))
                          for k in range(0, len(records), 256)])
    world = Shapes(objects=1, image_size=bench.world.image_size)
    labels = [world.label(world.scene("train", i)) for i in range(100 * classes)]
    of_class = [[i for i, own in enumerate(labels) if own == label] for label in range(classes)]
    for shots in (1, 4, 16):
        pool = [world.record("train", i) for own in of_class for i in own[:shots]]
        x, y, fit = features(pool), bench.labels(pool), torch.arange(len(pool)) % 5 < 4
        with torch.enable_grad():
            best = max((10.0 ** k for k in range(-6, 2)), key=lambda l2: retrieval.accuracy(
                logistic_regression(x[fit], y[fit], classes, l2)(x[~fit]), y[~fit]))
            predict = logistic_regression(x, y, classes, best)
        figures[f"accuracy_probe_{shots}"] = bench.accuracy(lambda r: predict(features(r)))
    return figures


class Objective(nn.Module):
    """CLIP's image encoder, trained for something else: its subclasses have loss and score."""

    def __init__(self, config, bench):
        super().__init__()
        clip_model = clip.CLIP(config)
        self.vision, self.width = clip_model.vision, config.vision_width
        self.image_features = clip_model.image_features


class Supervised(Objective):
    """It predicts the class of the one object."""

    def __init__(self, config, bench):
        super().__init__(config, bench)
        self.head, self.labels = nn.Linear(self.width, len(bench.world.classes)), bench.labels

    def loss(self, images, records, ids):
        return F.cross_entropy(self.head(self.image_features(images)).float(), self.labels(records))

    def score(self, images, phrases):
        """Images (N, 3, H, W) -> scores (N, classes)."""
        return self.head(self.image_features(images))


class Words(Objective):
    """It predicts the bag of words of the caption (paper, 2.3; Joulin et al., 2016)."""

    def __init__(self, config, bench):
        super().__init__(config, bench)
        self.head, self.vocab_size = nn.Linear(self.width, config.vocab_size), config.vocab_size

    def log_probs(self, images):
        return self.head(self.image_features(images)).float().log_softmax(dim=1)      # (N, V)

    def bags(self, ids):
        """ids int64 (N, T) -> float (N, V): 1 at each token that occurs, special ones left out."""
        bags = F.one_hot(ids, self.vocab_size).amax(dim=1).float()
        return bags.index_fill(1, torch.arange(CONTROL_IDS), 0)

    def loss(self, images, records, ids):
        bags = self.bags(ids)
        return -(self.log_probs(images) * bags / bags.sum(dim=1, keepdim=True)).sum(dim=1).mean()

    def score(self, images, phrases):
        """A class scores the sum of the log-probabilities of its words."""
        return self.log_probs(images) @ self.bags(phrases).T


class Captions(Objective):
    """A language model writes the caption behind the image's patches (paper, 2.3)."""

    def __init__(self, config, bench):
        super().__init__(config, bench)
        self.lm = LanguageModel(replace(LANGUAGE_PRESETS["tiny"], vocab_size=config.vocab_size))
        self.projector = nn.Linear(self.width, self.lm.config.width)

    def embed(self, images, ids):
        """(N, 3, H, W), (N, T) -> the patches and then the tokens, (N, P + T, D)."""
        patches = self.projector(self.vision.patches(images))         # (N, P, D)
        return torch.cat([patches, self.lm.embed(ids).to(patches.dtype)], dim=1)

    def loss(self, images, records, ids):
        logits = self.lm(self.embed(images, ids))[:, -ids.shape[1]:]
        return next_token_loss(logits, labels_of(ids, self.lm.config))

    def score(self, images, phrases):
        """The log-probability of the class's phrase as the caption."""
        begin, rest = phrases[:1, :1].expand(len(images), 1), phrases[:, 1:]      # <bos>, (C, T)
        return score_candidates(self.lm, self.embed(images, begin),
                                rest.masked_fill(rest == PAD, IGNORED))


def train_objective(kind, seed, **world):
    """Train an Objective on CLIP's pairs by CLIP's recipe -> its Bench figures."""
    config, shapes = clip.PRESETS["tiny"], Shapes(**world)
    tokenizer = world_tokenizer(shapes)
    config = replace(config, vocab_size=len(tokenizer), eos_id=EOS)
    bench = Bench(tokenizer, config)
    recipe = find_recipe(clip.RECIPES, "tiny", ("shapes",), {"steps": CLIP_STEPS})
    torch.manual_seed(seed)
    model, cpu = kind(config, bench), torch.device("cpu")
    half = half_precision("auto", cpu)
    optimizer = make_optimizer(model, recipe, half)

    def collate(records, rngs):
        return {"records": records, **bench.collate(records, rngs)}
    batches = Batches([DataSource(shapes, collate)], seed=seed, batch_size=recipe.batch_size)
    for step, [batch] in enumerate(tqdm(batches.loader(0, recipe.steps, 0), total=recipe.steps,
                                        mininterval=20)):
        set_learning_rate(optimizer, recipe, step)
        with autocast(cpu, half):
            loss = model.loss(normalize_pixels(batch["images"]), batch["records"], batch["ids"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
    model.eval()

    @torch.no_grad()
    def score(records):
        return torch.cat([model.score(bench.pixels(records[k:k + 256]), bench.phrases)
                          for k in range(0, len(records), 256)])
    return {"zero_shot_accuracy": bench.accuracy(score),
            "zero_shot_accuracy_chance": 1 / len(bench.world.classes),
            "kept_under_shift": bench.kept_under_shift(score)}


# ------------------------------------------------------------------ models that write

def shots(args, run):
    """Labels that only the shots define, by a BLIP-2."""
    return questions.episodes(Writer(*blip2.from_pretrained(run)), Shapes(), 400)


def written(args, captioner, filter_run, **how):
    """CapFilt's texts: web texts and those of a captioner, each judged by a filter.

    Writes filtered.jsonl (kept web texts), captioned.jsonl (all texts) and both.jsonl (kept ones),
    for --data shapes:texts=FILE. how: options of generation.
    """
    world, writer = Shapes(), Writer(*blip.open_trained(captioner, ("lm",)))
    judge = blip.open_trained(filter_run, ("itm",))
    rows = blip.capfilt_texts(writer, lambda r: matching.probabilities(*judge, r) > 0.5, world,
                              **how)
    rows = [(json.dumps(capfilt.line(world, index, record)), synthetic, bool(keep),
             world.is_true(record["texts"][0], record["source"]))
            for index, record, synthetic, keep in tqdm(rows, "texts", 2 * world.size("web"))]
    for name, chosen in (("filtered", lambda synthetic, keep: keep and not synthetic),
                         ("captioned", lambda synthetic, keep: True),
                         ("both", lambda synthetic, keep: keep)):
        lines = [line for line, synthetic, keep, _ in rows if chosen(synthetic, keep)]
        (args.out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    figures = {}
    for name, own in (("web", False), ("written", True)):
        truth = [(keep, true) for _, synthetic, keep, true in rows if synthetic == own]
        kept = [true for keep, true in truth if keep]
        figures |= {f"{name}_kept": len(kept) / len(truth),
                    f"{name}_true": statistics.mean(true for _, true in truth),
                    f"{name}_kept_true": statistics.mean(kept or [0])}
    return figures


EXPERIMENTS = {                          # {name: (how many runs it measures, function)}
    "prompts": (1, prompts), "shots": (1, shots), "written": (2, written),
    # Beam search writes safer texts than nucleus sampling (BLIP, Table 2).
    "written_beams": (2, partial(written, temperature=0.0, top_p=1.0, num_beams=3, generator=None)),
    # The same encoder on as many pairs; supervised on labelled pictures of one object.
    "supervised": (0, lambda args: train_objective(Supervised, args.seed, objects=1)),
    "words": (0, lambda args: train_objective(Words, args.seed)),
    "captions": (0, lambda args: train_objective(Captions, args.seed))}


def main():
    """Read the command line, run one experiment and write its figures."""
    options = parser(__doc__)
    options.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT",
                         help=", ".join(EXPERIMENTS))
    options.add_argument("run", nargs="*", help="the folders of the runs that it measures")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True, help="the folder of result.json")
    args = options.parse_intermixed_args()
    count, experiment = EXPERIMENTS[args.experiment]
    if len(args.run) != count:
        raise ValueError(f"{args.experiment} measures {count} runs, {len(args.run)} are given")
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {name: round(value, 4)                 # as train.py's: ties stay ties
               for name, value in experiment(args, *args.run).items()}
    write_json(args.out / "result.json", figures)
    print("result:", json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
