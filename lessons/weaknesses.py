"""What all these models are known to be weak at, in figures; each stands beside its chance level.

    python lessons/weaknesses.py                           the trained runs in runs
    python lessons/weaknesses.py --runs elsewhere

- counting, relations: questions whose answers are drawn evenly (LLaVA-1.5 and many others).
- attribute_binding, word_order: the true caption is more probable than the same words, with the
  colours, sizes or places of two objects exchanged, or the objects of a relation reversed ("When
  and why vision-language models behave like bags-of-words", Yuksekgonul et al., 2023).
- hallucination_accuracy: objects of which half are not there (POPE); a model that always says yes
  has a hallucination_yes_rate of 1.
- same_answer: the prompt is ignored. Smaller is better, unlike the others.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                         # noqa: E402,F401  first
from common.data.instruct import SHORT_ANSWER                         # noqa: E402
from common.data.shapes.captions import swapped_attributes, swapped_order       # noqa: E402
from common.data.shapes.questions import FORMS, balanced_question, one_question    # noqa: E402
from common.data.shapes.world import Shapes                           # noqa: E402
from common.evaluation import assistant                               # noqa: E402
from common.evaluation.questions import exact, in_words               # noqa: E402
from common.training.options import parser, run_main                  # noqa: E402
from lessons import overview                                          # noqa: E402

ASKED = ("colour", "shape")              # of one object; no word is the answer to both
PAIRS = {"reversed": "word_order",       # kind of a false caption: the figure
         **{kind: f"attribute_binding/{kind}" for kind in ("colour", "size", "place")}}


def even_questions(writer, world, count, template="{}"):
    """Counting and relations, in wordings that training never uses; see `balanced_question`.

    A model that knows the possible answers to a question, but not the picture, has chance level.
    """
    figures = {}
    most = min(3, world.objects)         # the largest number that is asked for
    for name, kind, chance in (("counting", "count", 1 / (most + 1)),
                               ("relations", "relation", 0.5)):
        records = in_words([balanced_question(
            random.Random(f"even/{kind}/{i}"), kind, "test", world.image_size, (1, world.objects))
            for i in range(count)], template)
        texts = writer.generate(records, max_new_tokens=6)
        figures |= {name: exact(texts, records), f"{name}_chance": chance}
    return figures


def true_is_likelier(writer, records):
    """The fraction of records whose first text has a larger log-probability than their second."""
    scores = writer.score_candidates(records, [record["texts"] for record in records])
    return sum(float(true) > float(false) for true, false in scores) / len(records)


def caption_pairs(writer, world, count):
    """Attribute binding and word order: of each kind the first `count` test scenes that allow it.

    attribute_binding: the mean of its three kinds.
    """
    pairs, index = {name: [] for name in PAIRS.values()}, 0
    while min(map(len, pairs.values())) < count:
        scene, rng = world.scene("test", index), random.Random(f"pairs/{index}")
        index += 1
        for pair in (swapped_attributes(scene, rng), swapped_order(scene, rng, "reversed")):
            if pair:
                pairs[PAIRS[pair["kind"]]].append(pair)
    found = {name: true_is_likelier(writer, own[:count]) for name, own in pairs.items()}
    bound = [fraction for name, fraction in found.items() if name != "word_order"]
    found = {"attribute_binding": sum(bound) / len(bound)} | found
    return found | {f"{name}_chance": 0.5 for name in found}


def same_answer(writer, world, count, template="{}"):
    """How often the colour and the shape of a single object get the same answer, right or wrong.

    No colour is a shape, so such a model has not read the prompt. chance: of a model that says any
    of the colours and shapes at random.
    """
    answers = []
    for kind in ASKED:
        records = []
        for i in range(count):
            scene, rng = world.scene("single", i), random.Random(f"same/{kind}/{i}")
            option = kind, getattr(scene.items[0], kind), {"x": "object"}
            records.append(one_question(scene, kind, option, rng, "test", world.image_size))
        answers.append(writer.generate(in_words(records, template), max_new_tokens=6))
    words = sum(len(FORMS[kind][kind][0]) for kind in ASKED)
    return {"same_answer": sum(a == b for a, b in zip(*answers)) / count,
            "same_answer_chance": 1 / words}


def of_questions(writer, world, count, template="{}"):
    """The weaknesses that show in written answers; template: what a question stands in."""
    return even_questions(writer, world, count, template) \
        | assistant.hallucination(writer, world, count, template) \
        | same_answer(writer, world, count, template)


def weaknesses(writer, world, count, template="{}"):
    """All of them, of a model that writes captions and answers -> {name: fraction in [0, 1]}.

    writer: an evaluation.writing.Writer; count: test records of a kind. Beside each NAME stands
    NAME_chance.
    """
    return of_questions(writer, world, count, template) | caption_pairs(writer, world, count)


def main():
    """Read the command line and print a Markdown table of the models that have their runs."""
    options = parser(__doc__)
    options.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are")
    options.add_argument("--count", type=int, default=240, help="records of a kind (default 240)")
    args, world, rows = options.parse_args(), Shapes(), {}
    for name, model in overview.MODELS.items():
        measures = {"questions": of_questions, "captions": caption_pairs}
        for ability, measure in measures.items():
            path = args.runs / model.get(ability, "-")
            if (path / "result.json").exists():
                writer = overview.open_model(name, path)
                # LLaVA answers in sentences, unless a word is asked for.
                words = (f"{{}}\n{SHORT_ANSWER}",) * (name == "LLaVA" and ability == "questions")
                found = measure(writer, world, args.count, *words)
                rows[name] = rows.get(name, {}) | found
    if not rows:
        raise ValueError(f"{args.runs}: no finished run of a model that writes")
    figures = [key for key in dict.fromkeys(sum(map(list, rows.values()), []))
               if not key.endswith("_chance") and not key.startswith("hallucination_accuracy/")]
    chances = {key: row.get(f"{key}_chance") for row in rows.values() for key in figures
               if f"{key}_chance" in row}
    lines = [["model", *figures], ["---"] + ["---:"] * len(figures)]
    lines += [[name] + [f"{row[key]:.3f}" if key in row else "-" for key in figures]
              for name, row in (rows | {"chance": chances}).items()]
    print("".join(f"| {' | '.join(line)} |\n" for line in lines), end="")


if __name__ == "__main__":
    run_main(main)
