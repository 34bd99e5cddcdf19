"""Writing: captions, answers and ranked candidates of any model that writes.

A model that writes has
    prepare(records, tokenizer) -> (ids or embeddings, mask, state): prompts, padded left, whose
        last answer is to be written; mask bool (B, T); state: tensors (B, ...)
    logits(x, mask, cache, last, **state) -> float (B, T, V)
    stop_ids, banned_ids: the ids that end a text (the first one ends an answer), and those that
        are never written; stop_string, if it has one: the text that ends an answer
A record is {"images", "texts"} (a caption is to be written) or {"turns"}, see common/data.
"""
import sys
from pathlib import Path

import torch

from common.data.images import open_frames
from common.data.safe_read import parse_json, read_bytes
from common.evaluation.questions import describes, draw_tasks, exact, in_words
from common.evaluation.sheet import sheet
from common.generation import generate, score_candidates
from common.training import options


class Writer:
    """A model with its tokenizer: records in, texts or log-probabilities out."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def logits(self, x, **inputs):
        """The model's logits without the banned ids, for writing and for ranking alike."""
        logits = self.model.logits(x, **inputs)
        logits[..., list(self.model.banned_ids)] = -torch.inf
        return logits

    @torch.no_grad()
    def generate(self, records, max_new_tokens=24, batch_size=256, **options):
        """Write the last answer of each record -> a list of texts.

        options: those of `generation.generate`, such as num_beams or temperature.
        """
        texts, end = [], getattr(self.model, "stop_string", "")
        for k in range(0, len(records), batch_size):
            prompt, mask, state = self.model.prepare(records[k:k + batch_size], self.tokenizer)
            ids = generate(self.logits, prompt, mask, max_new_tokens=max_new_tokens, state=state,
                           stop=self.model.stop_ids, stop_strings=(end,) if end else (),
                           decode=self.tokenizer.decode,
                           context_length=self.model.config.context_length, **options)
            # A frozen language model may go on with another question, as its own texts do.
            texts += [self.tokenizer.decode(row).partition(end or ". question")[0].strip()
                      for row in ids.tolist()]
        return texts

    @torch.no_grad()
    def score_candidates(self, records, candidates, batch_size=256):
        """log p(candidate and its end | prompt), in nats -> a list of float tensors (C,).

        candidates: a list of texts for each record; all lists have the same length C.
        """
        scores, end = [], self.model.stop_ids[0]
        for k in range(0, len(records), batch_size):
            prompt, mask, state = self.model.prepare(records[k:k + batch_size], self.tokenizer)
            ids = [[self.tokenizer.encode(f" {text}") + [end] for text in texts]
                   for texts in candidates[k:k + batch_size]]
            L = max(len(row) for texts in ids for row in texts)
            ids = torch.tensor([[row + [-100] * (L - len(row)) for row in texts] for texts in ids])
            scores += score_candidates(self.logits, prompt, ids.to(prompt.device), mask,
                                       state=state,
                                       context_length=self.model.config.context_length)  # (B, C)
        return scores

    def choose(self, records, candidates):
        """The most probable candidate of each record -> a list of texts."""
        scores = self.score_candidates(records, candidates)
        return [texts[int(s.argmax())] for texts, s in zip(candidates, scores)]


def samples(writer, data, count=6, shots=True):
    """An image for people: captions of unseen images; with shots, labels learned from a few."""
    world, records = data.world, data.records("test")[:count]
    rows = [("", r["images"][0], [(None, text, describes(world, text, r["source"]))])
            for r, text in zip(records, writer.generate(records))]
    title = f"Unseen {world.name}: a picture and the caption written for it"
    if shots and "episode" in world.tasks:
        title += "; then a picture, the label chosen for it, and the shots that define the labels"
        episodes = draw_tasks(world, "episode", count, shots=4)
        labels = writer.choose(episodes, [e["candidates"] for e in episodes])
        for episode, label in zip(episodes, labels):
            *shots, query = episode["turns"]
            rows.append(("", query["images"][0][0], [(None, label, label == query["answer"])] + [
                (shot["images"][0][0], shot["answer"], None) for shot in shots]))
    return sheet(f"{title}.", rows)


def page_samples(writer, data, count=8):
    """An image for people: the first picture of unseen pages and the text written behind it."""
    turns = [next(turn for turn in record["turns"] if turn["images"])
             for record in data.records("test")[:count]]
    texts = writer.generate([{"turns": [turn]} for turn in turns])
    return sheet(f"Unseen {data.world.name}: a picture and the text written behind it.",
                 [("", turn["images"][-1][0], [(None, text, None)])
                  for turn, text in zip(turns, texts)])


def answers(writer, data, count=8, template="{}"):
    """An image for people: questions on unseen images, and the written answers."""
    records, rows = draw_tasks(data.world, "question", count), []
    texts = writer.generate(in_words(records, template), max_new_tokens=6)
    for record, text in zip(records, texts):
        turn, right = record["turns"][0], exact([text], [record]) == 1
        rows.append(("", turn["images"][0][0], [(None, f"{turn['prompt']} {text}", right)]))
    return sheet(f"Unseen {data.world.name}: questions in new wordings, and the model's answers.",
                 rows)


# ------------------------------------------------------------------ commands

SHOT = ("PICTURE", "QUESTION", "ANSWER")             # the values of a --shot


def read_support(path):
    """A file of shots, a JSON object in each line: {"image", "question", "answer"} -> records.

    Images are looked for beside the file. Raises ValueError in one line.
    """
    records = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        shot = parse_json(line, f"{path}: line {number}", dict)
        if not all(isinstance(shot.get(key), str) for key in ("image", "question", "answer")):
            raise ValueError(f"{path}: line {number}: image, question and answer were expected")
        records.append({"turns": [{"images": [open_frames(Path(path).parent / shot["image"])],
                                   "prompt": shot["question"], "answer": shot["answer"]}]})
    return records


def main(description, from_pretrained):
    """The command line of a model that writes: caption and answer."""
    def caption(run, picture):
        """write a caption of a picture or clip (an animation, or a folder of frames)"""
        turn = {"images": [open_frames(picture)], "prompt": "", "answer": "", "caption": True}
        if Path(picture).is_dir():
            print(f"{picture}: taken as a clip of {len(turn['images'][0])} frames", file=sys.stderr)
        print(from_pretrained(run).generate([{"turns": [turn]}], num_beams=3)[0])

    def answer(run, picture, question, *, shot: SHOT = (),
               support=None, shots=4):
        """answer a question about a picture or clip, after examples: --shot for each of them, or
        --support FILE, JSON lines with image, question and answer, of which the --shots most
        similar ones are taken"""
        writer, frames = from_pretrained(run), open_frames(picture)
        turns = [{"images": [open_frames(path)], "prompt": text, "answer": said}
                 for path, text, said in shot]
        if support:
            chosen, = writer.model.select_shots([frames], read_support(support), shots)
            turns += [record["turns"][0] for record in chosen]
        turns.append({"images": [frames], "prompt": question, "answer": ""})
        print(writer.generate([{"turns": turns}], num_beams=3)[0])

    return options.run_command(description, caption, answer)
