"""One table and one picture of all five models: what `python train.py all` ends with.

    python lessons/overview.py
    python lessons/overview.py --runs elsewhere

It writes the table to RUNS/overview.md, its numbers to RUNS/overview.json, and to RUNS/overview.png
captions of the same unseen pictures by every model. The figures are those in result.json of the
runs; a model that answers questions is asked here for hallucination and for kinds of questions that
training never asks, unless its run has measured them.
A missing run leaves dashes, and a line on stderr names the command that makes it.
"""
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                         # noqa: E402,F401  first
import torch                                                          # noqa: E402

from common.data.files import all_records                             # noqa: E402
from common.data.safe_read import read_json                           # noqa: E402
from common.data.shapes.questions import KINDS                        # noqa: E402
from common.data.shapes.world import Shapes                           # noqa: E402
from common.evaluation import assistant, questions                    # noqa: E402
from common.evaluation.questions import describes                     # noqa: E402
from common.evaluation.sheet import sheet                             # noqa: E402
from common.evaluation.writing import Writer                          # noqa: E402
from common.training import checkpoint                                # noqa: E402
from common.training.options import parser, run_main                  # noqa: E402

# {model: {what is measured: by which run}}, in the order in which the runs are trained.
MODELS = {
    "CLIP": {"retrieval": "clip"},
    "Flamingo": {"captions": "flamingo", "questions": "flamingo"},
    "BLIP": {"retrieval": "blip", "captions": "blip", "questions": "blip-vqa"},
    "BLIP-2": {"retrieval": "blip2-stage1", "captions": "blip2-stage2",
               "questions": "blip2-stage2"},
    "LLaVA": {"alignment": "llava-stage1", "captions": "llava-stage2", "questions": "llava-stage2"},
}
UNITS = {"parameters": "{:,}", "trained": "{:,}", "seconds": "{:.0f}", "memory": "{:.0f} MB"}
FIGURES = {                              # column: what it is of, its name in result.json
    "image to text": ("retrieval", "image_to_text_recall@1"),
    "text to image": ("retrieval", "text_to_image_recall@1"),
    "captions": ("captions", "caption_accuracy"),
    "questions": ("questions", "vqa_accuracy"),
    **{kind: ("questions", f"vqa_accuracy/{kind}") for kind in KINDS["test"]},
    "wrong image": ("questions", "vqa_accuracy_blind"),
    "hallucination": ("questions", "hallucination_accuracy"),
    "8 shots": ("questions", "shots_8"),
}
LEGEND = """
Unseen pictures of shapes. Retrieval: recall@1 of 1,000, re-ranked where a model can (chance 0.015).
Captions of one and two objects: every statement is true. Questions: in wordings that training never
uses, by kind, and with a wrong image; training never asks for comparisons and sizes. Hallucination:
right answers when asked for objects of which half are not there (chance 0.5). 8 shots: labels that
only the shots define (chance 0.5). Parameters are those of the last run; seconds and memory are of
all runs but those of a frozen CLIP or LM. Memory is the peak of a process; where one process
trained several runs, it counts earlier ones too.
"""


def open_model(name, path):
    """The Writer of a model's run folder, of CLIP its Retriever."""
    opened = importlib.import_module(name.lower().replace("-", "")).from_pretrained(path)
    return Writer(*opened) if isinstance(opened, tuple) else opened


def read_results(runs):
    """{run: its result.json, {} without one}; a missing run is a line on stderr."""
    results = {run: {} for model in MODELS.values() for run in model.values()}
    for run in results:
        if (runs / run / "result.json").exists():
            results[run] = read_json(runs / run / "result.json")
        else:
            print(f"{runs / run}: no finished run; python train.py {run} --runs {runs} --resume "
                  "makes it", file=sys.stderr)
    return results


def figures(model, results):
    """{column: number, or None where there is none} of a row of MODELS."""
    parts = [results[run] for run in dict.fromkeys(model.values())]
    row = {"parameters": parts[-1].get("parameters"),
           "trained": parts[-1].get("trainable_parameters"),
           "seconds": sum(part["seconds"] for part in parts) if all(parts) else None,
           "memory": max(part["peak_memory_mb"] for part in parts) if all(parts) else None}
    for column, (ability, name) in FIGURES.items():
        found = results.get(model.get(ability), {})
        row[column] = found.get(f"{name}_reranked", found.get(name))
    return row


def table(rows):
    """Markdown of {model: {column: number or None}}, without columns that no model has."""
    columns = [c for c in [*UNITS, *FIGURES] if any(row[c] is not None for row in rows.values())]
    lines = [["model", *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[name] + ["-" if row[c] is None else UNITS.get(c, "{:.3f}").format(row[c])
                        for c in columns] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@torch.no_grad()
def nearest(retriever, records, texts):
    """For the image of each record the text that a CLIP finds among `texts`."""
    images = retriever.encode_images([record["images"][0] for record in records])
    scores = images @ retriever.model.encode_text(retriever.ids(texts)).T        # (N, texts)
    return [texts[i] for i in scores.argmax(dim=1).tolist()]


def picture(runs, world, results):
    """A sheet with a column for each model: its captions of six test images."""
    pool, columns = all_records(world, "test"), []
    records = [record for count in (1, 2) for record in [
        r for r in pool if len(r["source"].items) == count][:3]]
    for name, model in MODELS.items():
        writes, cells = "captions" in model, [(None, "-", None)] * len(records)
        run = model["captions" if writes else "retrieval"]
        if results[run]:
            opened = open_model(name, runs / run)
            texts = opened.generate(records) if writes else \
                nearest(opened, records, [record["texts"][0] for record in pool])
            cells = [(None, text, describes(world, text, record["source"]))
                     for text, record in zip(texts, records)]
        columns.append([(None, name if writes else f"{name} finds", None), *cells])
    images = [None] + [record["images"][0] for record in records]
    return sheet(f"Unseen {world.name}: the captions that the models write. CLIP cannot write: it "
                 f"finds the nearest of the captions of {len(pool):,} pictures.",
                 [("", image, cells) for image, cells in zip(images, zip(*columns))], cell=64)


def main():
    """Read the command line, measure what is missing, write the table and the picture."""
    options = parser(__doc__)
    options.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are")
    runs, world = options.parse_args().runs, Shapes()
    results = read_results(runs)
    if not any(results.values()):
        raise ValueError(f"{runs}: no finished run of any model")
    for name, model in MODELS.items():
        found = results.get(model.get("questions"))
        if found and "hallucination_accuracy" not in found:
            writer = open_model(name, runs / model["questions"])
            found |= assistant.hallucination(writer, world, 240)
            found |= questions.unseen_kinds(writer, world, 240)
    rows = {name: figures(model, results) for name, model in MODELS.items()}
    page = table(rows) + LEGEND
    checkpoint.write_json(runs / "overview.json", rows)
    (runs / "overview.md").write_text(page, encoding="utf-8")
    picture(runs, world, results).save(runs / "overview.png")
    print(f"{page}\nwritten: overview.md, overview.json and overview.png in {runs}")


if __name__ == "__main__":
    run_main(main)
