"""Judging: statements about two images, and candidate answers of a dialogue.

For a model with predict(batch) -> logits (B, 2), class 1: it is right.
"""
import torch

from common.evaluation.questions import draw_tasks
from common.evaluation.sheet import sheet
from common.training.devices import to_device


def probabilities(model, batch, device, chunk=256):
    """The probability that each row of a batch is right: float (B,), on the CPU."""
    batch, found = to_device(batch, device), []
    for k in range(0, len(batch["ids"]), chunk):
        part = {name: rows[k:k + chunk] for name, rows in batch.items()}
        found.append(model.predict(part).float().softmax(dim=1)[:, 1].cpu())
    return torch.cat(found)


def two_images(model, data, count):
    """Accuracy on statements about two unseen images; data.collate is a PairBatch."""
    batch = data.collate(draw_tasks(data.world, "two_pictures", count))
    right = (probabilities(model, batch, data.device) > 0.5) == (batch["truth"] == 1)
    return {"two_images_accuracy": right.float().mean().item(),
            "two_images_accuracy_chance": 0.5}


def rank_candidates(model, data, records):
    """The probability of each candidate of each dialogue: float (N, C)."""
    pairs = [(record, text) for record in records for text in record["candidates"]]
    return probabilities(model, data.collate.rows(pairs), data.device).view(len(records), -1)


def dialogue(model, data, count):
    """Ranked candidates for the last answer: is the first right, and its mean reciprocal rank."""
    records = draw_tasks(data.world, "dialogue", count)
    p = rank_candidates(model, data, records)                         # (N, C)
    right = torch.tensor([r["candidates"].index(r["turns"][-1]["answer"]) for r in records])
    ranks = (p >= p.gather(1, right[:, None])).sum(dim=1)             # (N,), from 1; ties lose
    return {"dialogue_accuracy": (ranks == 1).float().mean().item(),
            "dialogue_accuracy_chance": 1 / p.shape[1],
            "dialogue_mrr": (1 / ranks).mean().item()}


def samples(model, data, kind, count=6):
    """An image for people: statements about two images, or dialogues, and what the model says."""
    records, rows = draw_tasks(data.world, kind, count), []
    if kind == "two_pictures":
        p = probabilities(model, data.collate(records), data.device).tolist()
        for record, q in zip(records, p):
            turn, said = record["turns"][0], "true" if q > 0.5 else "false"
            rows.append(("", None, [(frames[0], "", None) for frames in turn["images"]]
                         + [(None, f"{turn['prompt']} {said}", said == turn["answer"])]))
    else:
        for record, p in zip(records, rank_candidates(model, data, records)):
            *past, last = record["turns"]
            said = record["candidates"][int(p.argmax())]
            words = " ".join(f"{turn['prompt']} {turn['answer']}." for turn in past)
            rows.append(("", past[0]["images"][0][0], [
                (None, f"{words} {last['prompt']} {said}", said == last["answer"])]))
    return sheet(f"Unseen {data.world.name}: what the model takes for true.", rows)
