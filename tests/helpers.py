"""What several tests share: random parameters, toy language models, ragged prompts, own data."""
import io
import itertools
import json
import tarfile

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.data.tokenizer import BOS, EOC, EOS, IMAGE
from common.language import LanguageConfig, LanguageModel

V, PAD, STOP = 13, 0, 2


def randomize(module, std=0.5):
    """Every parameter random, so that no norm, bias or gate hides at its starting value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def toy_lm(kind="gpt2", vocab_size=V):
    """A small random model in float64, so that no two texts tie."""
    torch.manual_seed(3)
    lm = LanguageModel(LanguageConfig(
        kind=kind, vocab_size=vocab_size, context_length=23, width=24, layers=2, heads=3, hidden=37,
        kv_heads=1 if kind == "llama" else 3, tie_embeddings=False)).double().eval()
    randomize(lm)
    if kind != "llama":                     # else one token is the likeliest after every text
        nn.init.zeros_(lm.norm.bias)
    return lm


def prompts(*lengths, side="left", seed=1):
    """Ragged prompts -> (ids, mask) padded on one side, and the prompts alone (1, T)."""
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, V, (1, n), generator=draw) for n in lengths]
    pads = [(max(lengths) - n, 0) if side == "left" else (0, max(lengths) - n) for n in lengths]
    ids = torch.cat([F.pad(text, pad_id, value=PAD) for text, pad_id in zip(texts, pads)])
    mask = torch.cat([F.pad(torch.ones_like(text), pad_id) for text, pad_id in zip(texts, pads)]).bool()
    return ids, mask, texts


class Words:
    """A vocabulary of whole words, with Flamingo's special tokens."""
    words = "output: question: answer: a red blue cat dog what is this ?".split()
    special = {BOS: "<bos>", EOS: "<eos>", IMAGE: "<image>", EOC: "<eoc>", PAD: "<pad>", -100: "-"}

    def encode(self, text):
        return [16 + self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i - 16] for i in ids if 16 <= i < 16 + len(self.words))

    def spell(self, ids):
        """Ids or labels as text, special tokens included; "-" is an ignored label."""
        return " ".join(self.special.get(i) or self.decode([i]) for i in ids)


def drawing(*colours, size=15):
    """A clip of frames in these colours; of one colour an image."""
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def page(*turns):
    """A record of (images, prompt, answer) each; images: names of colours."""
    return {"turns": [{"images": [drawing(colour) for colour in images.split()], "prompt": prompt,
                       "answer": answer} for images, prompt, answer in turns]}


class Table:
    """A model that knows one step: logits of the next token given the last, (V, V)."""

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def __call__(self, x, mask=None, cache=None, last=False):
        self.calls.append(tuple(x.shape))
        return self.logits[x[:, -1:] if last else x]


def chain(*follows, vocab_size=V):
    """A Table in which token a is followed by b for each (a, b), and STOP by itself."""
    logits = torch.zeros(vocab_size, vocab_size)
    for a, b in follows:
        logits[a, b] = 9.0
    return Table(logits)


# The user's own data

def colour(number):
    """The colour of picture number so and so."""
    return (5 * number % 256, 90, 200 - number % 190)


def picture(number):
    """The bytes of a PNG."""
    out = io.BytesIO()
    Image.new("RGB", (9, 11), colour(number)).save(out, "PNG")
    return out.getvalue()


def shard(path, members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes or a type of member)."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes) and len(data) > 1:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = data, "/etc/passwd"
                archive.addfile(member)


def shards(folder, sizes, start=0):
    """Shards of records numbered through from `start`, named 00.tar, 01.tar."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count(start)
    for place, size in enumerate(sizes):
        members = [(f"{number:05d}.{suffix}", data) for number in itertools.islice(numbers, size)
                   for suffix, data in (("jpg", picture(number)),
                                        ("txt", f"number {number}".encode()))]
        shard(folder / f"{place:02d}.tar", members)
    return f"tar:{folder}/*.tar"


def listed(folder, count, bad=()):
    """A JSON lines file of `count` pictures in a folder, of which some are missing."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        if number not in bad:
            (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(json.dumps({"image": f"{number}.png", "text": f"number {number}"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/data.jsonl"


def names(world, split):
    """The names of the pictures of a split of `Files`."""
    return [world.blank(split, index)["source"]["source"] for index in range(world.size(split))]
