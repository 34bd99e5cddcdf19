"""What a model that writes is asked: captions, questions, few-shot episodes, clips, plain text.

The figures are fractions in [0, 1]. `writer` is an evaluation.writing.Writer, `world` has the tasks
of common/data/shapes.
"""
import random

import torch

from common.data.collators import as_text, as_turns
from common.data.files import all_records
from common.losses import next_token_loss
from common.prompts import labels_of


def evaluate(writer, data, count=400, select_shots=None):
    """Captions, and in a world with tasks all the others -> {name: number}."""
    world, figures = data.world, captions(writer, data.world, count)
    if world.tasks:
        for figure in (latest_image, visual_questions, documents, clips, episodes):
            figures |= figure(writer, world, count)
        if select_shots:
            figures |= retrieved_shots(writer, world, count // 4, select_shots)
    return figures


def draw_tasks(world, kind, count, /, split="test", **more):
    """Records of a task, the same in every evaluation."""
    return [world.task(kind, random.Random(f"asked/{kind}/{i}"), split, **more)
            for i in range(count)]


def exact(texts, records):
    """The fraction of texts that equal the last answer of their record, but for a full stop."""
    return sum(text.removesuffix(".") == r["turns"][-1]["answer"].removesuffix(".")
               for text, r in zip(texts, records)) / len(records)


def describes(world, text, source):
    """Whether a caption is true and, where the world can tell, names an object."""
    return (world.describes if hasattr(world, "describes") else world.is_true)(text, source)


def captions(writer, world, count):
    """Accuracy of written captions; for single objects also with the images of other records,
    which must not exceed a guess among the classes."""
    def accuracy(split, shuffled=False):
        records = all_records(world, split)[:count]
        images = random.Random(0).sample(records, len(records)) if shuffled else records
        return sum(describes(world, text, r["source"])
                   for text, r in zip(writer.generate(images), records)) / len(records)
    figures = {"caption_accuracy": accuracy("test")}
    if world.zero_shot not in (None, "test"):
        figures |= {"caption_accuracy_single": accuracy(world.zero_shot),
                    "caption_accuracy_single_wrong_image": accuracy(world.zero_shot, shuffled=True),
                    "caption_accuracy_single_chance": 1 / len(world.classes)}
    return figures


def latest_image(writer, world, count):
    """A page of two images with captions: is the second caption of the latest or the first one?"""
    records = [world.record(world.zero_shot, i) for i in range(count)]
    pairs = list(zip(records, random.Random(0).sample(records, count)))
    texts = writer.generate([{"turns": as_turns(a) + as_turns(b)} for a, b in pairs])
    fits = [[world.describes(text, record["source"]) for record in pair]
            for text, pair in zip(texts, pairs)]
    return {"two_images_first": sum(first for first, _ in fits) / count,
            "two_images_latest": sum(latest for _, latest in fits) / count}


def in_words(records, template):
    """The records, their last prompt in a template."""
    found = []
    for record in records:
        *before, last = record["turns"]
        last = last | {"prompt": template.format(last["prompt"])}
        found.append(record | {"turns": [*before, last]})
    return found


def visual_questions(writer, world, count, template="{}"):
    """Questions in wordings that training never uses, with the right and with a wrong image, and in
    training's wordings."""
    records = in_words(draw_tasks(world, "question", count), template)
    texts = writer.generate(records, max_new_tokens=6)
    blind = [{"turns": [r["turns"][0] | {"images": other["turns"][0]["images"]}]}
             for r, other in zip(records, records[1:] + records[:1])]
    known = in_words(draw_tasks(world, "question", count, "train", asks=1), template)
    figures = {"vqa_accuracy": exact(texts, records)}
    for name, own in (("vqa_accuracy_blind", blind), ("vqa_accuracy_trained_wordings", known)):
        figures[name] = exact(writer.generate(own, max_new_tokens=6), own)
    for kind in sorted({r["kind"] for r in records}):
        own = [(text, r) for text, r in zip(texts, records) if r["kind"] == kind]
        figures[f"vqa_accuracy/{kind}"] = exact(*zip(*own))
    return figures


def unseen_kinds(writer, world, count, template="{}"):
    """Questions of kinds that no training question is of; each has two answers."""
    figures = {}
    for kind in ("comparison", "size"):
        records = in_words(draw_tasks(world, "question", count, kinds=(kind,)), template)
        texts = writer.generate(records, max_new_tokens=6)
        figures |= {f"vqa_accuracy/{kind}": exact(texts, records),
                    f"vqa_accuracy/{kind}_chance": 0.5}
    return figures


def documents(writer, world, count):
    """Questions about one of several images of a document."""
    records = [r | {"turns": r["turns"][:r["asked"] + 1]}
               for r in draw_tasks(world, "document", count, images=3)]
    return {"document_accuracy": exact(writer.generate(records, max_new_tokens=6), records)}


def ranked_answers(writer, world, count):
    """The same questions, with the answers of all of them as candidates."""
    records = draw_tasks(world, "question", count)
    answers = sorted({record["turns"][-1]["answer"] for record in records})
    return {"vqa_accuracy_ranked": exact(writer.choose(records, [answers] * count), records),
            "vqa_accuracy_ranked_chance": 1 / len(answers)}


def ranked_tasks(writer, world, count, kinds, template="{}"):
    """Tasks with candidates: that of the largest log-probability is the answer (InstructBLIP,
    2.5)."""
    figures = {}
    for kind in kinds:
        records = in_words(draw_tasks(world, kind, count), template)
        candidates = [record["candidates"] for record in records]
        figures |= {f"vqa_accuracy/{kind}": exact(writer.choose(records, candidates), records),
                    f"vqa_accuracy/{kind}_chance": 1 / len(candidates[0])}
    return figures


def retrieved_shots(writer, world, count, select_shots, shots=4):
    """Questions after shots drawn at random, and after those that select_shots retrieves."""
    queries = draw_tasks(world, "question", count)
    support = draw_tasks(world, "question", 2 * count + shots, "train", asks=1)
    rng = random.Random(0)
    chosen = {"random": [rng.sample(support, shots) for _ in queries],
              "retrieved": select_shots([q["turns"][0]["images"][0] for q in queries], support,
                                        shots)}
    figures = {}
    for name, examples in chosen.items():
        records = [{"turns": [e["turns"][0] for e in own] + q["turns"]}
                   for own, q in zip(examples, queries)]
        texts = writer.generate(records, max_new_tokens=6)
        figures[f"vqa_accuracy_{shots}_{name}_shots"] = exact(texts, records)
    return figures


def clips(writer, world, count):
    """Questions about the order of a clip's frames; with shuffled frames it must be chance."""
    def shuffled(number, record):
        turn = record["turns"][0]
        frames = random.Random(number).sample(turn["images"][0], len(turn["images"][0]))
        return {"turns": [turn | {"images": [frames]}]}
    records = draw_tasks(world, "clip", count)
    named = {"video_accuracy": records,
             "video_accuracy_16_frames": draw_tasks(world, "clip", count, frames=16),
             "video_accuracy_shuffled": [shuffled(i, r) for i, r in enumerate(records)]}
    return {name: exact(writer.generate(own, max_new_tokens=6), own)
            for name, own in named.items()} | {"video_accuracy_chance": 0.5}


def episodes(writer, world, count, shots=(0, 2, 4, 8)):
    """Labels that only the shots define, ranked; with shuffled shots it must be chance."""
    def accuracy(**how):
        records = draw_tasks(world, "episode", count, **how)
        return exact(writer.choose(records, [r["candidates"] for r in records]), records)
    return {f"shots_{k}": accuracy(shots=k) for k in shots} | {
        f"shots_{shots[-1]}_shuffled": accuracy(shots=shots[-1], shuffled=True),
        "shots_chance": 0.5}


def text_perplexity(model, data, count):
    """Perplexity of text without images: of the whole model, and of its language model alone."""
    if not hasattr(data.world, "text"):
        return {}
    ids = data.ids([as_text(data.world.text(random.Random(f"text/{i}"))) for i in range(count)])
    labels = labels_of(ids, model.lm.config)
    visual = torch.zeros(len(ids), 1, 1, model.vision.width, device=ids.device)
    whole, alone = (next_token_loss(logits, labels).exp().item()
                    for logits in (model.logits(ids, visual=visual), model.lm(ids)))
    return {"perplexity": whole, "perplexity_lm": alone}
