"""Collators: from records and their random generators to the batch that a model's forward takes.

Each is called as collate(records, rngs), with one random.Random for each record.
"""
import torch

from common.data.images import center_crop, to_tensor
from common.data.tokenizer import BOS, EOS, PAD
from common.prompts import CAPTION_PROMPT, IGNORED, QUESTION_PROMPT, collate, labels_of


class ImageTextBatch:
    """Images with one of their captions each, drawn by the record's rng."""

    def __init__(self, tokenizer, context_length, image_size):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.image_size = image_size

    def ids(self, texts):
        """Texts -> int64 (N, T)."""
        return self.tokenizer.batch(texts, self.context_length)

    def images(self, records):
        """The first image of each record: uint8 (B, 3, H, W).

        A training image of the user's files is square already: files.Files crops at random.
        """
        return to_tensor([center_crop(as_turns(r)[0]["images"][0][0], self.image_size)
                          for r in records])

    def __call__(self, records, rngs):
        """-> {"images": uint8 (B, 3, H, W), "ids": int64 (B, T)}."""
        texts = [rng.choice(r["texts"]) for r, rng in zip(records, rngs)]
        return {"images": self.images(records), "ids": self.ids(texts)}


class CaptionBatch(ImageTextBatch):
    """The same for a model that also writes, and that samples wrong pairs (BLIP).

    prompt: stands before every caption; the loss does not count it.
    """

    def __init__(self, tokenizer, config, prompt=""):
        super().__init__(tokenizer, config.context_length, config.image_size)
        self.config, self.prompt = config, prompt

    def __call__(self, records, rngs):
        """-> {"images", "ids", "labels": int64 (B, T), "draws": float (B, 2), uniform in [0, 1)}.

        The draws decide which wrong text and image an image and a text get.
        """
        texts = [self.prompt + rng.choice(r["texts"]) for r, rng in zip(records, rngs)]
        ids = self.ids(texts)
        labels = labels_of(ids, self.config)
        labels[:, :1 + len(self.tokenizer.encode(self.prompt))] = IGNORED
        return {"images": self.images(records), "ids": ids, "labels": labels,
                "draws": torch.tensor([[rng.random(), rng.random()] for rng in rngs])}


class PromptBatch(ImageTextBatch):
    """Images, prompts and the texts that a language model is to write (BLIP-2's second stage).

    training_rows(turn, tokenizer, rng, config) -> {name: (ids, labels)} is the model's own wording;
    the labels of the last name count. A text "question_ids" is for the Q-Former.
    """

    def __init__(self, tokenizer, config, training_rows):
        super().__init__(tokenizer, config.qformer_context_length, config.image_size)
        self.config, self.training_rows = config, training_rows

    def __call__(self, records, rngs):
        """One turn of each record -> {"images": uint8 (B, 3, H, W), "ids", "labels": int64 (B, T),
        "mask": bool (B, T)}. Of an encoder-decoder "answer_ids" and "labels" are one (B, T') beside
        "ids"; where the Q-Former gets the question, there are "question_ids" int64 (B, T'')."""
        batch = {"images": self.images(records)}
        turns = [rng.choice(as_turns(record, rng)) for record, rng in zip(records, rngs)]
        rows = [self.training_rows(turn, self.tokenizer, rng, self.config)
                for turn, rng in zip(turns, rngs)]
        for name in rows[0]:
            if name == "question_ids":
                batch[name] = self.ids([row[name] for row in rows])
                continue
            found = collate([row[name] for row in rows])
            batch |= {name: found["ids"], "labels": found["labels"]}
            batch.setdefault("mask", found["mask"])
        return batch


class QuestionBatch(ImageTextBatch):
    """Questions with their answers: a turn has "answers" {text: weight}, or one "answer"."""

    def __call__(self, records, rngs):
        """-> {"images", "ids": int64 (B, T), "answer_ids": int64 (A, T), "question_index": int64
        (A,), "weights": float (A,)}: A answers to B questions, one of each record."""
        turns = [rng.choice(record["turns"]) for record, rng in zip(records, rngs)]
        answers = [(row, text, weight) for row, turn in enumerate(turns)
                   for text, weight in turn.get("answers", {turn["answer"]: 1.0}).items()]
        index, texts, weights = zip(*answers)
        return {"images": self.images(records), "ids": self.ids([t["prompt"] for t in turns]),
                "answer_ids": self.ids(texts), "question_index": torch.tensor(index),
                "weights": torch.tensor(weights)}


class PairBatch(ImageTextBatch):
    """Two images and a statement about them that is true or false."""

    def __call__(self, records, rngs=None):
        """-> {"images": uint8 (B, 2, 3, H, W), "ids": int64 (B, T), "truth": int64 (B,)}."""
        turns = [record["turns"][0] for record in records]
        pairs = [to_tensor([center_crop(frames[0], self.image_size) for frames in turn["images"]])
                 for turn in turns]
        return {"images": torch.stack(pairs), "ids": self.ids([t["prompt"] for t in turns]),
                "truth": torch.tensor([int(t["answer"] == "true") for t in turns])}


class DialogueBatch(ImageTextBatch):
    """Dialogues with one candidate for the last answer each, the right one or a wrong one."""

    def text(self, record, candidate):
        """History, question and candidate; without the first turns where the context is short."""
        *past, last = record["turns"]
        words = [f"{turn['prompt']} {turn['answer']}" for turn in past]
        words.append(f"{last['prompt']} {candidate}")
        while len(words) > 1 and len(self.tokenizer.encode(" ".join(words))) > \
                self.context_length - 2:
            del words[0]
        return " ".join(words)

    def rows(self, pairs):
        """[(record, candidate), ...] -> the batch, see __call__."""
        records = [record for record, _ in pairs]
        return {"images": self.images(records),
                "ids": self.ids([self.text(*pair) for pair in pairs]),
                "caption_ids": self.ids([record["caption"] for record in records]),
                "truth": torch.tensor([int(c == r["turns"][-1]["answer"]) for r, c in pairs])}

    def __call__(self, records, rngs):
        """-> {"images", "ids": history, question and candidate, "caption_ids", "truth": int64
        (B,)}. In half of the rows the candidate is right."""
        def candidate(record, rng):
            right = record["turns"][-1]["answer"]
            wrong = [text for text in record["candidates"] if text != right]
            return right if rng.random() < 0.5 else rng.choice(wrong)
        return self.rows([(r, candidate(r, rng)) for r, rng in zip(records, rngs)])


class PackedTexts:
    """Texts packed into rows of about `length` tokens, each text as <bos> ... <eos>.

    A longer text is cut. Packing keeps padding small: a row ends where the next text does not fit.
    """

    def __init__(self, tokenizer, context_length, length):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.length = min(length, context_length)

    def __call__(self, records, rngs):
        """-> {"ids", "labels": int64 (B', T)}: all texts in B' rows."""
        rows = [[]]
        for record, rng in zip(records, rngs):
            ids = self.tokenizer.encode(as_text(record, rng))[:self.length - 2]
            if len(rows[-1]) + len(ids) + 2 > self.length:
                rows.append([])
            rows[-1] += [BOS, *ids, EOS]
        # <bos> is no label: which text follows an <eos> cannot be predicted.
        batch = collate([(row, [IGNORED if i == BOS else i for i in row]) for row in rows if row])
        return {"ids": batch["ids"], "labels": batch["labels"]}


class SplitTexts:
    """Texts cut in two at a random token (prefix language modelling; T5, 3.2.3): the encoder reads
    the first part, the decoder writes the rest, at least one token.

    Rows of both have several texts, up to about `length` tokens; a longer text is cut off.
    """

    def __init__(self, tokenizer, context_length, length):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.length = min(length, context_length)

    @staticmethod
    def split(texts, length=0):
        """[(ids, labels, place), ...] -> {"prompt_ids": int64 (B, P), "ids", "labels": int64
        (B, T)}: the ids before the place and <eos>, <pad> and those after it, text after text."""
        rows = []
        for ids, labels, place in texts:
            new = [*ids[:place], EOS], [PAD, *ids[place:]], [IGNORED, *labels[place:]]
            if not rows or any(len(a) + len(b) > length for a, b in zip(rows[-1], new)):
                rows.append(([], [], []))
            for row, part in zip(rows[-1], new):
                row += part
        prompts, batch = collate([row[:1] * 2 for row in rows]), collate([row[1:] for row in rows])
        return {"prompt_ids": prompts["ids"], "ids": batch["ids"], "labels": batch["labels"]}

    def __call__(self, records, rngs):
        """-> the batch, see `split`."""
        texts = [self.tokenizer.encode(as_text(record, rng))[:self.length - 2]
                 for record, rng in zip(records, rngs)]
        return self.split([([*ids, EOS], [*ids, EOS], int(rng.random() * len(ids)))
                           for ids, rng in zip(texts, rngs)], self.length)


def as_text(record, rng=None):
    """A record as one plain text, for a language model.

    Captions: one of them, drawn by the rng (None: the first). Turns: each image described in words,
    then "output:" or the question, then the answer.
    """
    if "texts" in record:
        return rng.choice(record["texts"]) if rng else record["texts"][0]
    texts = []
    for turn in record["turns"]:
        described = f"{turn['description']}. " if turn["description"] else ""
        prompt = QUESTION_PROMPT.format(turn["prompt"]) if turn["prompt"] else CAPTION_PROMPT
        texts.append(f"{described}{prompt} {turn['answer']}{record.get('end', '.')}")
    return " ".join(texts)


class InterleavedCollator:
    """Pages in which images and texts alternate, as ids, labels and images (Flamingo).

    render_page(turns, tokenizer, context_length, attend_next, is_prompt) -> (ids, labels) is the
    model's own wording. p_next_image: the probability that a page's texts attend to the next image
    (paper, A.3.2).
    """

    def __init__(self, tokenizer, config, render_page, p_next_image=0.0):
        self.tokenizer, self.render_page, self.p_next_image = tokenizer, render_page, p_next_image
        self.context_length, self.image_size = config.context_length, config.image_size

    def images(self, pages):
        """Lists of turns -> uint8 (B, N, F, 3, H, W), N the most images of a page, at least 1.

        Pages with fewer images are padded with black ones. Raises ValueError for images and clips
        of different numbers of frames.
        """
        pages = [[clip for turn in turns for clip in turn["images"]] for turns in pages]
        lengths = sorted({len(frames) for page in pages for frames in page} or {1})
        if len(lengths) > 1:
            raise ValueError(f"clips of {' and '.join(map(str, lengths))} frames: all images and "
                             "clips of a batch or prompt need the same number of frames")
        rows = [[to_tensor([center_crop(frame, self.image_size) for frame in frames])
                 for frames in page] for page in pages]               # (F, 3, H, W) each
        N = max(1, *map(len, rows))
        black = torch.zeros(lengths[0], 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack([torch.stack(row + [black] * (N - len(row))) for row in rows])

    def prompts(self, pages):
        """Pages whose last answer is to be written -> the batch, padded left."""
        rows = [self.render_page(turns, self.tokenizer, None, is_prompt=True) for turns in pages]
        return collate(rows, side="left") | {"images": self.images(pages)}

    def __call__(self, records, rngs):
        """-> {"images": uint8 (B, N, F, 3, H, W), "ids", "labels": int64 (B, T),
        "attend_next": bool (B,)}."""
        pages = [as_turns(record, rng) for record, rng in zip(records, rngs)]
        attend_next = [rng.random() < self.p_next_image for rng in rngs]
        batch = collate([self.render_page(turns, self.tokenizer, self.context_length, flag)
                         for turns, flag in zip(pages, attend_next)])
        return {"images": self.images(pages), "ids": batch["ids"], "labels": batch["labels"],
                "attend_next": torch.tensor(attend_next)}


def as_turns(record, rng=None):
    """The turns of a record. Captions: one turn with one of them, marked "caption": True."""
    if "turns" in record:
        return record["turns"]
    text = rng.choice(record["texts"]) if rng else record["texts"][0]
    return [{"images": [record["images"][:1]], "prompt": "", "answer": text, "caption": True}]
