"""From turns to token ids and labels, made together: the labels say what the loss counts.

    ids, labels = render([Segment((BOS, IMAGE)), Segment("a red circle", learn=True),
                          Segment((EOC,), learn=True)], tokenizer)
    ids, labels = render(HOUSE.segments(record["turns"]), tokenizer)  # the answers are learned
    batch = collate([(ids, labels), ...])                             # tensors with padding

Special tokens are ids that code inserts; a text that spells one becomes ordinary pieces.
"""
from dataclasses import dataclass

import torch

from common.data.tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, SYSTEM, USER

IGNORED = -100                           # the label of a token that the loss does not count
IMAGES = object()                        # in a Template: the place of a turn's images
CAPTION_PROMPT = "output:"               # Flamingo's prompts (its A.2); the language model reads
QUESTION_PROMPT = "question: {} answer:"      # texts of this form, too


@dataclass(frozen=True)
class Segment:
    """A part of a sample: a text, or ids; learn: whether the loss counts it."""
    content: str | tuple
    learn: bool = False


def merge_texts(segments):
    """Neighbouring texts with the same `learn` become one segment.

    A vocabulary splits "USER: what" otherwise than "USER: " and "what".
    """
    merged = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and last.learn == segment.learn and isinstance(last.content, str) \
                and isinstance(segment.content, str):
            merged[-1] = Segment(last.content + segment.content, segment.learn)
        else:
            merged.append(segment)
    return merged


def render(segments, tokenizer, context_length=None):
    """Segments -> (ids, labels), two lists of int of one length; labels are ids or -100.

    Texts are encoded after `merge_texts`. What exceeds context_length is cut off at the end. Raises
    ValueError when segments are to be learned and none is left after the first token, which nothing
    predicts: such a row would train nothing.
    """
    ids, labels = [], []
    for segment in merge_texts(segments):
        text = isinstance(segment.content, str)
        new = tokenizer.encode(segment.content) if text else list(segment.content)
        ids += new
        labels += new if segment.learn else [IGNORED] * len(new)
    # The first token is predicted from nothing, so its label never counts.
    first = next((i for i, label in enumerate(labels) if i and label != IGNORED), None)
    if first is None and any(segment.learn for segment in segments):
        raise ValueError(f"a text of {len(ids)} tokens has no label after its first token")
    if context_length is not None and first is not None and first >= context_length:
        raise ValueError(f"a text of {len(ids)} tokens: its first label is token {first + 1}, "
                         f"beyond the context of {context_length}")
    return ids[:context_length], labels[:context_length]


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. Each field is a tuple of texts and ids; {} is the turn's text.

    image: what replaces each image at IMAGES. The answer follows `assistant`; the loss counts the
    answer and `end`.
    """
    begin: tuple = (BOS,)
    system: tuple = (SYSTEM, "{}")
    user: tuple = (USER, IMAGES, "{}")
    assistant: tuple = (ASSISTANT,)
    end: tuple = (EOS,)
    image: tuple = (IMAGE,)
    default_system: str = ""             # used when no system text is given

    def fill(self, field, text="", images=0, learn=False):
        """The segments of a field with a turn's text and number of images."""
        parts = []
        for part in getattr(self, field):
            parts += list(self.image) * images if part is IMAGES else [part]
        return [Segment(part.replace("{}", text) if isinstance(part, str) else (part,), learn)
                for part in parts]

    def segments(self, turns, system=None, is_prompt=False):
        """Turns [{"prompt", "answer", "images"}, ...] -> segments; every answer is learned.

        is_prompt: leave out the last answer, which the model is to write.
        """
        system = self.default_system if system is None else system
        segments = self.fill("begin") + (self.fill("system", system) if system else [])
        for number, turn in enumerate(turns):
            segments += self.fill("user", turn["prompt"], len(turn.get("images", ())))
            segments += self.fill("assistant")
            if not is_prompt or number + 1 < len(turns):
                segments += [Segment(turn["answer"], learn=True), *self.fill("end", learn=True)]
        return segments


HOUSE = Template()


def collate(rows, pad_id=PAD, side="right"):
    """[(ids, labels), ...] -> {"ids", "labels": int64 (B, T), "mask": bool (B, T)}.

    side: of the padding, "right" for training, "left" for generation. mask: True at tokens, False
    at padding. Behind padding on the left the label of a row's first token is dropped: padding
    would have to predict it. Raises ValueError for no rows, and for an empty row or lists of
    different lengths with the row's number and both lengths.
    """
    if not rows:
        raise ValueError("no rows")
    T = max(len(ids) for ids, _ in rows)
    batch = {"ids": torch.full((len(rows), T), pad_id),
             "labels": torch.full((len(rows), T), IGNORED),
             "mask": torch.zeros(len(rows), T, dtype=torch.bool)}
    for row, (ids, labels) in enumerate(rows):
        if not ids or len(ids) != len(labels):
            raise ValueError(f"row {row}: {len(ids)} ids and {len(labels)} labels")
        start = T - len(ids) if side == "left" else 0
        batch["ids"][row, start:start + len(ids)] = torch.tensor(ids)
        batch["labels"][row, start:start + len(ids)] = torch.tensor(labels)
        batch["mask"][row, start:start + len(ids)] = True
        if start > 0:
            batch["labels"][row, start] = IGNORED
    return batch


def labels_of(ids, config):
    """ids int64 (B, T), padded right -> labels int64 (B, T): the ids, -100 at the padding.

    config has pad_id and eos_id. Where a vocabulary pads with its end token (GPT-2's), the first of
    them is the end of the text.
    """
    is_padding = (ids != config.pad_id).flip(1).cumsum(dim=1).flip(1) == 0       # nothing follows
    if config.pad_id == config.eos_id:
        is_padding[:, 1:] &= is_padding[:, :-1].clone()
    return ids.masked_fill(is_padding, IGNORED)
