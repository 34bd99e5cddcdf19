"""From turns to token ids and labels, made together: the labels say what the loss counts.

    ids, labels = render([Segment((BOS, IMAGE)), Segment("a red circle", learn=True),
                          Segment((EOC,), learn=True)], tokenizer)
    ids, labels = render(HOUSE.segments(record["turns"]), tokenizer)  # the answers are learned
    segments = find_template("v1").segments(record["turns"], image_first="random", rng=rng)
    batch = collate([(ids, labels), ...])                             # tensors with padding

Special tokens are ids that code inserts; a text that spells one becomes ordinary pieces.
"""
from dataclasses import dataclass

import torch

from common.data.tokenizer import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER

IGNORED = -100                           # the label of a token that the loss does not count
IMAGES = object()                        # in a Template: the place of a turn's images
# In a Template: <s>, </s> and the place of an image, ids of the vocabulary.
START, STOP, PICTURE = ("bos_id",), ("eos_id",), ("image_id",)
CAPTION_PROMPT = "output:"               # Flamingo's prompts (its A.2); the language model reads
QUESTION_PROMPT = "question: {} answer:"      # texts of this form, too


@dataclass(frozen=True)
class Segment:
    """A part of a sample: a text, or ids; learn: whether the loss counts it.

    In place of an id stands the name of one of the tokenizer's, ("eos_id",).
    """
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
        new = tokenizer.encode(segment.content) if text else [
            getattr(tokenizer, part) if isinstance(part, str) else part for part in segment.content]
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

    image: what stands for each image, at IMAGES, which precedes "{}". The answer follows
    `assistant`; the loss counts the answer and `end`. An answer is encoded by itself, so what marks
    the beginning of a text (SentencePiece's "\u2581") is the space before it. A turn's prompt or
    answer may be a tuple of texts and ids, too.
    """
    begin: tuple = (BOS,)
    system: tuple = (SYSTEM, "{}")
    user: tuple = (USER, IMAGES, "{}")
    assistant: tuple = (ASSISTANT,)
    answer: tuple = ("{}",)
    end: tuple = (EOS,)
    image: tuple = (PICTURE,)
    default_system: str = ""             # used when no system text is given
    later_user: tuple | None = None      # `user` of the turns after the first, where it differs

    @property
    def stop_string(self):
        """The text that ends an answer; "" where an id ends it."""
        if not all(isinstance(part, str) for part in self.end):
            return ""
        text = "".join(self.end)
        return text.strip() or text

    def fill(self, field, text="", images=0, learn=False, image_first=True):
        """The segments of a field with a turn's text and number of images."""
        parts, image, filled = list(getattr(self, field)), self.image, []
        if not image_first and IMAGES in parts:
            place, image = parts.index(IMAGES), image[::-1]      # "text\n<image>"
            parts[place:place + 2] = parts[place:place + 2][::-1]
        for part in parts:
            if part is IMAGES:
                filled += list(image) * images
            elif isinstance(part, str) and "{}" in part:
                before, _, behind = part.partition("{}")
                filled += [before, *(text if isinstance(text, tuple) else (text,)), behind]
            else:
                filled.append(part)
        return [Segment(part if isinstance(part, (str, tuple)) else (part,), learn)
                for part in filled]

    def segments(self, turns, system=None, is_prompt=False, image_first=True, rng=None):
        """Turns [{"prompt", "answer", "images"}, ...] -> segments; every answer is learned.

        is_prompt: leave out the last answer, which the model is to write. image_first: whether
        images precede their turn's text (LLaVA's code since 1.0), or "random": rng.random() decides
        for the dialogue (LLaVA, 4.1), and without an rng they do. Raises ValueError for no turns
        and for an empty answer.
        """
        if not turns:
            raise ValueError("a dialogue of 0 turns")
        if image_first == "random":
            image_first = rng is None or rng.random() < 0.5
        system = self.default_system if system is None else system
        segments = self.fill("begin") + (self.fill("system", system) if system else [])
        for number, turn in enumerate(turns):
            field = "later_user" if number and self.later_user is not None else "user"
            segments += self.fill(field, turn["prompt"], len(turn.get("images", ())),
                                  image_first=image_first)
            segments += self.fill("assistant")
            if not is_prompt or number + 1 < len(turns):
                if not turn["answer"]:
                    raise ValueError(f"turn {number + 1} of {len(turns)} has no answer")
                segments += self.fill("answer", turn["answer"], learn=True)
                segments += self.fill("end", learn=True)
        return segments


HOUSE = Template()
CHAT = ("A chat between a curious {0} and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the {0}'s questions.")
# The strings of LLaVA's llava/conversation.py (v0: of train.py), ChatML as Qwen-VL writes it; all
# its markers are texts here. In v0 the loss counts "\n###", which stops an answer, and not the role
# behind it (the released code does); in ChatML nothing of the other turns (there: their markers).
# A world's own vocabulary has no new line (common/data/tokenizer.py): there "plain" ends unmarked.
# "bare" is ours, for a frozen language model that knows no markers: prompts stand as they are.
TEMPLATES = {
    "house": HOUSE,
    "v0": Template(begin=(START,), system=("{}\n\n",), user=("### Human: ", IMAGES, "{}", "\n"),
                   later_user=("Human: ", IMAGES, "{}", "\n"), assistant=("### Assistant:",),
                   end=("\n###",), image=(PICTURE, "\n"), default_system=CHAT.format("human")),
    "v1": Template(begin=(START,), system=("{} ",), user=("USER: ", IMAGES, "{}", " "),
                   assistant=("ASSISTANT:",), end=(STOP,), image=(PICTURE, "\n"),
                   default_system=CHAT.format("user")),
    "plain": Template(begin=(START,), system=(), user=(IMAGES,), assistant=(), end=("\n",)),
    "bare": Template(begin=(START,), system=(), user=(IMAGES, "{}"), assistant=(), end=(STOP,)),
    "llama-2": Template(begin=(START, "[INST] "), system=("<<SYS>>\n{}\n<</SYS>>\n\n",),
                        user=(IMAGES, "{}"), later_user=(START, "[INST] ", IMAGES, "{}"),
                        assistant=(" [/INST]",), end=(" ", STOP), image=(PICTURE, "\n"),
                        default_system="You are a helpful language and vision assistant. You are "
                        "able to understand the visual content that the user provides, and assist "
                        "the user with a variety of tasks using natural language."),
    "chatml": Template(begin=(), system=("<|im_start|>system\n{}<|im_end|>\n",),
                       user=("<|im_start|>user\n", IMAGES, "{}", "<|im_end|>\n"),
                       assistant=("<|im_start|>assistant\n",), end=("<|im_end|>\n",),
                       image=(PICTURE, "\n"), default_system="You are a helpful assistant."),
}


def find_template(name):
    """One of TEMPLATES. Raises ValueError for another name."""
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


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
