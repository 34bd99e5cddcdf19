"""The controlled comparison of bridges: all but the bridge is the same.

    python train.py clip && python train.py lm             the two frozen models
    python lessons/bridges.py gated --seed 0               train one bridge and measure it
    python lessons/bridges.py report                       the table and the picture of all

NAME is one of
    gated            Flamingo: a resampler, and gated cross-attention before each block of the LM
    mixture          BLIP: an encoder of the question and a decoder of the answer, both new
    qformer          BLIP-2's second stage: a Q-Former's queries are a prompt of the LM
    projector        LLaVA: patches through an MLP are words of the LM
    projector-tuned  the same, and the language model is trained along, as LLaVA does

What is the same: the CLIP and the language model, both frozen; the records and their order, single
pictures with one caption or one question each; the number of samples; the recipe. What is not: the
mixture cannot use the frozen language model, so that its text transformer starts from random
weights; the Q-Former does without its first stage, which would be more samples. Each bridge takes
the features of CLIP that its paper takes.

A run stands in RUNS/claims/bridge-NAME-SEED; a finished one is not trained again. The report covers
all seeds that it finds, and writes captions of all bridges to RUNS/claims/bridges.png.
"""
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

BEGAN = time.time()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train                                                          # noqa: E402  first
import blip2                                                          # noqa: E402
import flamingo                                                       # noqa: E402
import llava                                                          # noqa: E402
from common.data.batches import DataSource                            # noqa: E402
from common.data.collators import as_turns                            # noqa: E402
from common.data.files import all_records                             # noqa: E402
from common.data.safe_read import read_json                           # noqa: E402
from common.data.shapes.world import Shapes                           # noqa: E402
from common.evaluation import questions, writing                      # noqa: E402
from common.evaluation.sheet import sheet                             # noqa: E402
from common.prompts import CAPTION_PROMPT, QUESTION_PROMPT            # noqa: E402
from common.training.options import add_options, parser, run_main     # noqa: E402
from common.training.run import Options                               # noqa: E402
from lessons import overview                                          # noqa: E402
from lessons.weaknesses import weaknesses                             # noqa: E402


@dataclass(frozen=True)
class Bridge:
    """A row of the table.

    stage: of train.py, for its model and the runs of its parts. trains: patterns of parameters.
    settings: as of --set. question: what a question stands in, and a caption behind CAPTION_PROMPT;
    None: the model has these words itself. takes_shots: whether it takes several pictures.
    """
    stage: str
    trains: tuple
    settings: tuple = ()
    question: str | None = None
    takes_shots: bool = True


PROJECTOR = Bridge("llava-stage2", (llava.PROJECTOR,), ("template=bare",), QUESTION_PROMPT)
BRIDGES = {
    "gated": Bridge("flamingo", flamingo.TRAINS["flamingo"], ("p_next_image=0",)),
    # Without label smoothing all bridges have the same loss, up to a factor.
    "mixture": Bridge("blip", ("encoder.*", "decoder.*"), ("losses=vqa", "label_smoothing=0"),
                      "{}", takes_shots=False),
    "qformer": Bridge("blip2-stage2", blip2.TRAINS["blip2-stage2"], (f"prompt={CAPTION_PROMPT}",)),
    "projector": PROJECTOR,
    "projector-tuned": replace(PROJECTOR, trains=llava.TRAINS["llava-stage2"]),
}
# Gates are numbers and need a larger rate than matrices (flamingo.py); no other bridge has them.
RECIPE = replace(llava.TUNE, steps=400, lr_multipliers={"*_gate": 10.0})
COUNT = 400                              # test records of a kind
FLAGS = ("seed", "steps", "batch_size", "device", "precision", "runs", "out", "eval_only")
Flags = dataclasses.make_dataclass("Flags", [
    (f.name, f.type, f) for f in dataclasses.fields(Options) if f.name in FLAGS])

FIGURES = {                              # column of the report: its name in result.json
    "captions": "caption_accuracy", "of one": "caption_accuracy_single",
    "questions": "vqa_accuracy", "wrong image": "vqa_accuracy_blind",
    **{kind: f"vqa_accuracy/{kind}" for kind in ("colour", "shape", "existence", "comparison")},
    "counting": "counting", "relations": "relations",
    **{f"{kind} bound": f"attribute_binding/{kind}" for kind in ("colour", "size", "place")},
    "word order": "word_order", "hallucination": "hallucination_accuracy",
    "same answer": "same_answer", "8 shots": "shots_8", "shuffled": "shots_8_shuffled",
    "trained": "trainable_parameters", "seconds": "training", "MB": "peak_memory_mb"}
LEGEND = """
Median (least-most) of the seeds; unseen pictures of shapes. Captions of one and two objects, and of
one alone (chance 0.024): every statement is true. Questions: in wordings that training never uses,
and with a wrong image; training never asks for comparisons (chance 0.5). Counting (0.333),
relations (0.5), bound, word order (0.5), hallucination (0.5) and same answer (best 0, chance
0.071): see lessons/weaknesses.py. 8 shots: labels that only the shots define (0.5), and with
shuffled shots; shots are not trained. Seconds are of training alone.
"""


def worded(bridge, record, rng=None):
    """The record as turns alone, with the prompts that the model gets."""
    turns = as_turns(record, rng)
    if bridge.question:
        turns = [turn | {"caption": False, "prompt": bridge.question.format(turn["prompt"])
                         if turn["prompt"] else CAPTION_PROMPT} for turn in turns]
    return {"turns": turns}


class BridgeWriter(writing.Writer):
    """A Writer that puts each record in the words of a bridge first."""

    def __init__(self, bridge, model, tokenizer):
        super().__init__(model, tokenizer)
        self.word = partial(worded, bridge)

    def generate(self, records, **how):
        """As of every Writer."""
        return super().generate([self.word(record) for record in records], **how)

    def score_candidates(self, records, candidates, **how):
        """As of every Writer."""
        return super().score_candidates([self.word(r) for r in records], candidates, **how)


def first_turns(bridge, collate, records, rngs):
    """The model's batch of the first turn of each record, which has the picture."""
    pages = [worded(bridge, record, rng)["turns"][:1] for record, rng in zip(records, rngs)]
    return collate([{"turns": turns} for turns in pages], rngs)


def data_sources(bridge, world, tokenizer, config):
    """As many captions as questions. Which ones is drawn by (seed, epoch, index) alone."""
    own = train.STAGES[bridge.stage].file.data_sources(world, tokenizer, config)
    return [DataSource(world, partial(first_turns, bridge, own[0].collate),
                       kinds={"caption": 1, "question": 1})]


def figures(bridge, writer, world):
    """What every bridge is asked -> {name: number}; shots only where the model takes them."""
    found = questions.captions(writer, world, COUNT)
    found |= questions.visual_questions(writer, world, COUNT)
    found |= questions.unseen_kinds(writer, world, COUNT // 2)
    found |= weaknesses(writer, world, COUNT // 2)
    if bridge.takes_shots:
        found |= questions.episodes(writer, world, COUNT, shots=(0, 8))
    return found


def make_model(bridge, config):
    """The stage's model; the run measures `figures` and not what the model's paper asks."""
    model = train.STAGES[bridge.stage].model(config)
    writer = partial(BridgeWriter, bridge, model)
    model.evaluate = lambda data: figures(bridge, writer(data.tokenizer), data.world)
    model.samples = lambda data: writing.samples(writer(data.tokenizer), data, shots=False)
    return model


def stage_of(name):
    """The row of train.py's table that trains a bridge, under the name "bridge-NAME"."""
    bridge = BRIDGES[name]
    stage = train.STAGES[bridge.stage]
    file = SimpleNamespace(
        __name__=stage.file.__name__, PRESETS=stage.file.PRESETS, RECIPES={"": RECIPE},
        TRAINS={f"bridge-{name}": bridge.trains}, data_sources=partial(data_sources, bridge))
    return replace(stage, about=f"the bridge {name}", file=file, model=partial(make_model, bridge),
                   init=None, settings=bridge.settings)


def read_results(runs):
    """{bridge: {its finished run of each seed: its result}}. Raises ValueError for no run at all,
    and for runs of different numbers of steps, which are no comparison."""
    found = {name: {} for name in BRIDGES}
    for name, own in found.items():
        for path in sorted((runs / "claims").glob(f"bridge-{name}-[0-9]*/result.json")):
            *_, last = path.with_name("log.jsonl").read_text().splitlines()
            own[path.parent] = read_json(path) | {"training": json.loads(last)["seconds"]}
    steps = sorted({result["steps"] for own in found.values() for result in own.values()})
    if len(steps) != 1:
        raise ValueError(f"{runs / 'claims'}: " + (
            f"runs of {' and '.join(map(str, steps))} steps" if steps else "no finished run"))
    return found


def cell(values):
    """Fractions or counts as "median (least-most)"; a single one as it is; none as a dash."""
    if not values:
        return "-"
    form = "{:.3f}" if max(values) <= 1 else "{:,.0f}"
    middle, least, most = (form.format(pick(values)) for pick in (statistics.median, min, max))
    return middle if len(values) == 1 else f"{middle} ({least}-{most})"


def table(found):
    """Markdown of `read_results`: a row for each bridge."""
    lines = [["bridge", "seeds", *FIGURES], ["---"] + ["---:"] * (1 + len(FIGURES))]
    for name, own in found.items():
        lines.append([name, str(len(own))] + [
            cell([result[key] for result in own.values() if key in result])
            for key in FIGURES.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(found, world):
    """A sheet with captions of four test pictures, a column for the first run of each bridge."""
    pool, columns = all_records(world, "test"), []
    records = [record for count in (1, 2) for record in [
        r for r in pool if len(r["source"].items) == count][:2]]
    for name, own in found.items():
        cells = [(None, "-", None)] * len(records)
        for path in [*own][:1]:
            opened = overview.open_model(read_json(path / "config.json")["model"], path)
            writer = BridgeWriter(BRIDGES[name], opened.model, opened.tokenizer)
            cells = [(None, text, questions.describes(world, text, record["source"]))
                     for text, record in zip(writer.generate(records), records)]
        columns.append([(None, name, None), *cells])
    images = [None] + [record["images"][0] for record in records]
    return sheet(f"Unseen {world.name}: the captions that are written through each bridge.",
                 [("", image, cells) for image, cells in zip(images, zip(*columns))], cell=64)


def report(runs):
    """Print the table and write the picture."""
    found = read_results(runs)
    picture(found, Shapes()).save(runs / "claims" / "bridges.png")
    print(table(found) + LEGEND)
    print(f"picture: {runs / 'claims' / 'bridges.png'}")


def main():
    """Read the command line; train a bridge, or report on all."""
    args, names = parser(__doc__), [*BRIDGES, "report"]
    args.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    add_options(args, Flags)
    flags = vars(args.parse_args())
    name, runs = flags.pop("name"), Path(flags["runs"])
    if name == "report":
        return report(runs)
    train.STAGES[f"bridge-{name}"] = stage_of(name)
    flags["out"] = flags["out"] or str(runs / "claims" / f"bridge-{name}-{flags['seed']}")
    return train.train(f"bridge-{name}", Options(**flags, resume=True), began=BEGAN)


if __name__ == "__main__":
    run_main(main)
