"""Byte-level BPE, the vocabularies of CLIP, GPT-2 and OPT.

    tokenizer = BPE.load(FOLDER, CLIP)         # or GPT2, OPT
    tokenizer.encode("a diagram")              # [320, 22697], no special tokens

A text is split into words, a word into bytes, and each byte is written as one visible character.
Then neighbours are joined, the pair that is first in the list of merges first (Neural Machine
Translation of Rare Words with Subword Units, 3.2; GPT-2, 2.2). No text is out of vocabulary.
"""
import functools
import gzip
import html
import itertools
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from common.data.safe_read import read_bytes, read_json
from common.data.tokenizer import NO_IMAGE, Tokenizer

CLIP_FILE, CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz", 49152 - 256 - 2
# Curly quotes and apostrophes -> straight ones, as ftfy does before CLIP's tokenizer.
STRAIGHT = str.maketrans(dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
                         | dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))
# White space of Unicode. Python's own \s has four control characters more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def characters(kind):
    """All characters of a Unicode category, "L" letters or "N" numbers, as the body of [...]."""
    runs = [list(run) for inside, run in itertools.groupby(
        range(0x110000), lambda code: unicodedata.category(chr(code))[0] == kind) if inside]
    return "".join(f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs)


@functools.cache
def compiled(pattern):
    """A pattern with \\p{L}, \\p{N} (which Python's re lacks) and \\s, all inside of [...] only."""
    for name, body in ((r"\p{L}", characters("L")), (r"\p{N}", characters("N")), (r"\s", SPACE)):
        pattern = pattern.replace(name, body)
    return re.compile(pattern)


def clip_clean(text):
    """CLIP's cleaning: NFC, HTML entities read twice, straight quotes, single blanks, lower case.

    OpenAI's code runs ftfy, which also repairs wrongly decoded text and ligatures; Hugging Face's
    tokenizer leaves quotes curly.
    """
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).translate(STRAIGHT)
    return re.sub(f"[{SPACE}]+", " ", text.strip()).strip().lower()


@dataclass(frozen=True)
class Style:
    """How a family of vocabularies reads text. Special pieces are never parsed out of a text."""
    words: str                           # pattern of one word, see `compiled`
    clean: object = str                  # what is done to a text first
    end: str = ""                        # the suffix of a word's last character
    bos: str = "<|endoftext|>"           # special pieces
    eos: str = "<|endoftext|>"
    pad: str = "<|endoftext|>"
    others: tuple = ()
    pad_id: int | None = None            # of padding, where no piece is meant for it


CLIP = Style(
    words=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", clean=clip_clean,
    end="</w>", bos="<|startoftext|>", pad_id=0)       # OpenAI pads with 0, which is also a "!"
GPT2 = Style(words=r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+"
                   r"|[\s]+(?![^\s])|[\s]+")
OPT = Style(words=GPT2.words, bos="</s>", eos="</s>", pad="<pad>", others=("<s>", "<unk>"))
STYLES = {"clip": CLIP, "gpt2": GPT2, "opt": OPT}


# A visible character for each byte, in the order of OpenAI's vocabularies: the visible ones of
# Latin-1 stand for themselves and come first, U+0100 and on for the others.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
BYTE_OF = {character: byte for byte, character in BYTES.items()}


class BPE:
    """A vocabulary and its merges, with the interface of tokenizer.Tokenizer.

    vocab {piece: id}, merges [(left, right)], the first joined first. Raises ValueError when a
    piece is missing that texts need: a byte, a special piece, a part or the result of a merge.
    """

    file = "tokenizer.json"              # its name in a run folder; `model` is its bytes
    image_id, cls_id, enc_id, dec_id = NO_IMAGE, None, None, None

    def __init__(self, vocab, merges, style, where="vocab"):
        self.vocab, self.style = vocab, style
        special = {style.bos, style.eos} | ({style.pad} if style.pad_id is None else set())
        needed = [*special, *(c + end for c in BYTES.values() for end in ("", style.end)),
                  *(piece for a, b in merges for piece in (a, b, a + b))]
        missing = next((piece for piece in needed if piece not in vocab), None)
        if missing is not None:
            raise ValueError(f"{where}: a vocabulary without the piece {missing!r:.80}")
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.bos_id, self.eos_id = vocab[style.bos], vocab[style.eos]
        self.pad_id = vocab[style.pad] if style.pad_id is None else style.pad_id
        self.special = {vocab[piece] for piece in (*special, *style.others) if piece in vocab}

    @classmethod
    def load(cls, folder, style=None):
        """Read vocab.json and merges.txt, or tokenizer.json, or OpenAI's file for CLIP.

        style None: of a run folder, whose tokenizer.json names its style.
        """
        readers = {("vocab.json", "merges.txt"): read_pair, ("tokenizer.json",): read_tokenizer}
        if style is None:
            name = read_json(Path(folder) / cls.file, dict).get("style")
            if name not in [*STYLES]:    # not a dict's "in": the file may hold a list
                raise ValueError(f"{Path(folder) / cls.file}: its style is {name!r:.80}, not one "
                                 f"of {', '.join(STYLES)}")
            style = STYLES[name]
        if style == CLIP:
            readers[CLIP_FILE,] = read_clip
        for names, reader in readers.items():
            paths = [Path(folder) / name for name in names]
            if all(path.is_file() for path in paths):
                vocab, merges = reader(*paths)
                if {i for i in vocab.values() if type(i) is int} != set(range(len(vocab))):
                    raise ValueError(f"{paths[0]}: the ids of its {len(vocab)} pieces are not 0 to "
                                     f"{len(vocab) - 1}, each of them once")
                return cls(vocab, merges, style, paths[0])
        wanted = ", or ".join(" and ".join(names) for names in readers)
        raise ValueError(f"{folder}: no vocabulary; put {wanted} there")

    @property
    def model(self):
        """The bytes of a tokenizer.json with its style."""
        style = next(name for name, style in STYLES.items() if style == self.style)
        parts = {"vocab": self.vocab, "merges": [*self.ranks]}
        return json.dumps({"style": style, "model": parts}).encode()

    def __len__(self):
        return len(self.vocab)

    def encode(self, text):
        """Text -> ids (list of int), without special tokens. Half of a surrogate pair is a "?"."""
        words = compiled(self.style.words).findall(self.style.clean(text))
        return [i for word in words for i in self.encode_word(word)]

    @functools.lru_cache(100_000)        # most words come again
    def encode_word(self, word):
        """The ids of one word."""
        symbols = [BYTES[byte] for byte in word.encode("utf-8", "replace")]
        symbols[-1] += self.style.end
        return [self.vocab[piece] for piece in self.join(symbols)]

    def join(self, symbols):
        """Find the pair of neighbours with the lowest rank, join it everywhere, repeat."""
        while len(symbols) > 1:
            pairs = set(zip(symbols, symbols[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            joined = []
            for symbol in symbols:
                if joined and (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            symbols = joined
        return symbols

    def decode(self, ids):
        """Ids -> text. Special tokens and ids without a piece are left out."""
        pieces = "".join(self.pieces[i] for i in map(int, ids)
                         if i in self.pieces and i not in self.special)
        data = b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in pieces)
        text = data.decode("utf-8", "replace")
        return text.replace(self.style.end, " ").strip() if self.style.end else text

    batch = Tokenizer.batch


def read_pair(vocab, merges):
    """vocab.json, {piece: id}, and merges.txt, "left right" in each line -> (vocab, merges)."""
    lines = read_bytes(merges).decode("utf-8", "replace").splitlines()
    return read_json(vocab, dict), [pair(line, merges) for line in lines
                                    if line and not line.startswith("#version")]


def read_tokenizer(path):
    """tokenizer.json: vocabulary, merges and special tokens in one -> (vocab, merges)."""
    value = read_json(path, dict)
    try:
        vocab, merges = dict(value["model"]["vocab"]), list(value["model"]["merges"])
        vocab |= {token["content"]: token["id"] for token in value.get("added_tokens", [])}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: no byte-level BPE (a model with vocab and merges)") from None
    return vocab, [pair(merge, path) for merge in merges]


def read_clip(path):
    """OpenAI's list of merges, of which the ids follow -> (vocab, merges)."""
    lines = read_bytes(path, unpack=gzip.open).decode("utf-8", "replace").splitlines()
    merges = [pair(line, path) for line in lines[1:1 + CLIP_MERGES]]
    if len(merges) < CLIP_MERGES:
        raise ValueError(f"{path}: {len(merges)} merges, but CLIP's vocabulary has {CLIP_MERGES}")
    pieces = [*BYTES.values(), *(c + CLIP.end for c in BYTES.values()), *map("".join, merges),
              CLIP.bos, CLIP.eos]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def pair(merge, path):
    """ "left right" or ["left", "right"] -> (left, right), or ValueError."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or [type(part) for part in parts] != [str, str] or "" in parts:
        raise ValueError(f"{path}: {merge!r:.80} is no merge of two pieces")
    return tuple(parts)
