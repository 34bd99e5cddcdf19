"""From what is said to ids and labels, made together: what is learned is known segment by segment.

    ids, labels = render([Segment((BOS, IMAGE)), Segment("a red circle", learn=True),
                          Segment((EOC,), learn=True)], tokenizer)
    ids, labels = render_dialogue(record["turns"], tokenizer, images=1)      # answers are learned
    batch = collate([(ids, labels), ...])                # tensors, padding is not learned

Special tokens are ids that code puts in; a text, whatever it spells, becomes ordinary pieces.
"""
from dataclasses import dataclass, replace

import torch

from common.data.tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, SYSTEM, USER

IGNORED = -100                           # the label of what is not learned
IMAGES = object()                        # in a Template: where a turn's pictures stand
OUTPUT, ANSWER = "output:", "question: {} answer:"      # Flamingo's prompts (its A.2), and what
                                                        # the worlds' pages are written like


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample: a text, or ids as they are; learn: whether the loss counts it."""
    content: str | tuple
    learn: bool = False


def joined(segments):
    """The segments with neighbouring texts made one where the loss treats them alike.

    A vocabulary cuts "USER: what" as it learned to cut it, which need not be "USER: " and "what".
    """
    out = []
    for segment in segments:
        last = out[-1] if out else None
        if last is not None and last.learn == segment.learn and all(
                isinstance(s.content, str) for s in (last, segment)):
            out[-1] = replace(last, content=last.content + segment.content)
        else:
            out.append(segment)
    return out


def render(segments, tokenizer, context_length=None):
    """Segments -> (ids, labels), two lists of int of one length; labels are the ids or -100.

    What exceeds the context is cut off at the end. Raises ValueError when nothing that was to be
    learned is left of it, or ever was behind the first token: such a row would train nothing, in
    silence.
    """
    ids, labels = [], []
    for segment in joined(segments):
        text = isinstance(segment.content, str)
        new = tokenizer.encode(segment.content) if text else list(segment.content)
        ids += new
        labels += new if segment.learn else [IGNORED] * len(new)
    first = next((i for i, label in enumerate(labels) if i and label != IGNORED), None)
    if first is None and any(segment.learn for segment in segments):
        raise ValueError(f"a text of {len(ids)} tokens, and nothing to be learned behind the first")
    if context_length is not None and first is not None and first >= context_length:
        raise ValueError(f"a text of {len(ids)} tokens: what is to be learned begins at token "
                         f"{first + 1}, behind the context of {context_length}")
    return ids[:context_length], labels[:context_length]


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. Each field is a tuple of texts and ids.

    In a text of system and user, {} is where theirs stands. The answer follows `assistant`; it is
    learned, and with it `end`. image: what each picture is written as, where IMAGES stands.
    """
    begin: tuple = (BOS,)
    system: tuple = (SYSTEM, "{}")
    user: tuple = (USER, IMAGES, "{}")
    assistant: tuple = (ASSISTANT,)
    end: tuple = (EOS,)
    image: tuple = (IMAGE,)
    default_system: str = ""             # said when the dialogue has no system turn

    def parts(self, field, text="", images=0):
        """The segments, not learned, of a field filled with a turn's text and pictures."""
        filled = []
        for part in getattr(self, field):
            filled += list(self.image) * images if part is IMAGES else [part]
        return [Segment(part.replace("{}", text) if isinstance(part, str) else (part,))
                for part in filled]


HOUSE = Template()


def render_dialogue(turns, tokenizer, context_length=None, *, images=0, prompt=False, template=HOUSE):
    """Turns -> (ids, labels) in which every answer and its end are learned, and nothing else.

    turns: [{"role": "system" | "user" | "assistant", "text": str}, ...]: a system turn or none,
    then user and assistant in turn. images: pictures shown in the first user's turn. prompt: the
    user speaks last, and the ids end where the answer is to begin; such a prompt is never cut.
    Raises ValueError for other turns, a prompt beyond the context, and as `render`.
    """
    turns, segments = list(turns), template.parts("begin")
    for number, turn in enumerate(turns):
        if not all(isinstance(turn.get(key), str) for key in ("role", "text")):
            raise ValueError(f"turn {number}: {turn}: it needs a role and a text, both strings")
    if images and IMAGES not in template.user:
        raise ValueError(f"{images} pictures, but the template's user has no place for them "
                         "(IMAGES)")
    system = turns.pop(0)["text"] if turns and turns[0]["role"] == "system" else \
        template.default_system
    roles = [turn["role"] for turn in turns]
    order = (["user", "assistant"] * len(turns))[:len(turns)]
    if not turns or roles != order or len(turns) % 2 != prompt:
        raise ValueError(f"turns of {', '.join(roles) or 'nobody'}: user and assistant speak in "
                         f"turn, the {'user' if prompt else 'assistant'} last")
    segments += template.parts("system", system) if system else []
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            shown = images if number == 0 else 0
            segments += template.parts("user", turn["text"], shown) + template.parts("assistant")
        else:
            segments.append(Segment(turn["text"], learn=True))
            segments += [replace(part, learn=True) for part in template.parts("end")]
    ids, labels = render(segments, tokenizer, None if prompt else context_length)
    if context_length is not None and len(ids) > context_length:
        raise ValueError(f"a prompt of {len(ids)} tokens, but the context is {context_length}")
    return ids, labels


def collate(rows, pad_id=PAD, side="right"):
    """[(ids, labels), ...] -> {"ids", "labels": int64 (B, T), "mask": bool (B, T)}.

    Padded with `pad`, which is never learned, on the right for training, on the left for writing;
    mask: True at real tokens. Behind padding a row's first token is not learned either: padding
    would have to tell it. Raises ValueError for no row, an empty row, or ids and labels that differ
    in length.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side}: left or right")
    if not rows:
        raise ValueError("no rows")
    longest = max(len(ids) for ids, _ in rows)
    out = {"ids": torch.full((len(rows), longest), pad_id),
           "labels": torch.full((len(rows), longest), IGNORED),
           "mask": torch.zeros(len(rows), longest, dtype=torch.bool)}
    for row, (ids, labels) in enumerate(rows):
        if not ids or len(ids) != len(labels):
            raise ValueError(f"row {row}: {len(ids)} ids and {len(labels)} labels")
        here = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        out["ids"][row, here] = torch.tensor(ids)
        out["labels"][row, here] = torch.tensor(labels)
        out["mask"][row, here] = True
        if here.start > 0:
            out["labels"][row, here.start] = IGNORED
    return out
