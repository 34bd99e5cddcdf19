"""Byte-level BPE, the vocabularies of CLIP, GPT-2 and OPT.

    tokenizer = BPE.load(FOLDER, CLIP)         # or GPT2, OPT
    tokenizer.encode("a diagram")              # [320, 22697], no special tokens
    tokenizer.batch(["a diagram"], 77)         # int64 (1, T): begin, ids, end, then padding

A text is cut into words, a word into bytes, each byte is written as one visible character, and then
neighbours are joined, the pair that stands first in the list of merges first (Neural Machine
Translation of Rare Words with Subword Units, 3.2; GPT-2, 2.2). No text is out of vocabulary.
"""
import functools
import gzip
import heapq
import html
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from common.pretrained import strict_json
from common.pretrained.strict_json import printable

MOST_BYTES, MOST_CACHED = 64_000_000, 100_000
CLIP_FILE, CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz", 49152 - 256 - 2
# White space of Unicode. Python's own \s counts four control characters more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


# ------------------------------------------------------------------ words

@functools.cache
def characters(kind):
    """All characters of a Unicode category, "L" letters or "N" numbers, as the body of [...]."""
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c))[0] == kind]
    firsts = [c for c, before in zip(codes, [-2, *codes]) if c != before + 1]
    lasts = [c for c, after in zip(codes, [*codes[1:], -2]) if c != after - 1]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(firsts, lasts))


@functools.cache
def compiled(pattern):
    """A pattern with \\p{L}, \\p{N} and \\s, all three inside of [...] only."""
    for name, body in ((r"\p{L}", characters("L")), (r"\p{N}", characters("N")), (r"\s", SPACE)):
        pattern = pattern.replace(name, body)
    return re.compile(pattern)


def unchanged(text):
    """Nothing is cleaned: the text comes back byte for byte."""
    return text


def clip_clean(text):
    """CLIP's cleaning: NFC, HTML entities read twice, white space to single blanks, lower case.

    OpenAI's code runs ftfy first. Of it this does the Unicode normal form and nothing else: no
    repair of wrongly decoded text, no straight quotes for curly ones, no single letters for
    ligatures or full-width forms, no removal of control characters.
    """
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return re.sub(f"[{SPACE}]+", " ", text.strip()).strip().lower()


@dataclass(frozen=True)
class Style:
    """How a family of vocabularies reads text.

    words: pattern of one word (see `compiled`). end: what the last character of a word carries.
    bos, eos, pad, others: special pieces; a text that spells one gets ordinary pieces. padding: the
    id of padding, where no piece is meant for it.
    """
    words: str
    clean: Callable = unchanged
    end: str = ""
    bos: str = "<|endoftext|>"
    eos: str = "<|endoftext|>"
    pad: str = "<|endoftext|>"
    others: tuple = ()
    padding: int | None = None


CLIP = Style(
    words=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", clean=clip_clean,
    end="</w>", bos="<|startoftext|>", padding=0)      # OpenAI pads with 0, which is also a "!"
GPT2 = Style(words=r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+"
                   r"|[\s]+(?![^\s])|[\s]+")
OPT = Style(words=GPT2.words, bos="</s>", eos="</s>", pad="<pad>", others=("<s>", "<unk>"))


# ------------------------------------------------------------------ bytes

def byte_characters():
    """A visible character for each byte, in the order of OpenAI's vocabularies: {byte: character}.

    Visible bytes of Latin-1 stand for themselves and come first; the others follow from U+0100 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + n) for n, byte in enumerate(others)}


BYTES = byte_characters()
BYTE_OF = {character: byte for byte, character in BYTES.items()}


# ------------------------------------------------------------------ the vocabulary

class BPE:
    """A vocabulary and its merges under a style; interface and batches as of tokenizers.Tokenizer.

    bos, eos, pad: ids. vocab {piece: id}, merges [(left, right)], the first joined first. Raises
    ValueError when a byte, a special piece or a merge's piece is not in the vocabulary.
    """

    def __init__(self, vocab, merges, style):
        self.vocab, self.style = vocab, style
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        names = {style.bos, style.eos, *(() if style.padding is not None else (style.pad,))}
        self.check(names)
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.bos_id, self.eos_id = vocab[style.bos], vocab[style.eos]
        self.pad_id = vocab[style.pad] if style.padding is None else style.padding
        self.special = {vocab[name] for name in (*names, *style.others) if name in vocab}
        self.cache = {}

    def check(self, special):
        """Raise ValueError when a text could meet a piece without an id, or spell a special one."""
        bytes_ = [character + end for character in BYTES.values() for end in {"", self.style.end}]
        joined = [piece for a, b in self.ranks for piece in (a, b, a + b)]
        absent = [piece for piece in (*special, *bytes_, *joined) if piece not in self.vocab]
        if absent:
            raise ValueError(f"a vocabulary without {printable(absent[0])}, which its merges or every "
                             "vocabulary of this kind need")
        spelled = [a + b for a, b in self.ranks if a + b in {*special, *self.style.others}]
        if spelled:
            raise ValueError(f"merges that spell the special piece {printable(spelled[0])}")

    @classmethod
    def load(cls, folder, style):
        """Read vocab.json and merges.txt, or tokenizer.json, or OpenAI's file for CLIP.

        Raises ValueError in one line when there is none, or what is there is no such vocabulary.
        """
        folder = Path(folder)
        readers = {("vocab.json", "merges.txt"): read_pair, ("tokenizer.json",): read_tokenizer}
        if style == CLIP:
            readers[CLIP_FILE,] = read_clip
        for names, reader in readers.items():
            if all((folder / name).is_file() for name in names):
                vocab, merges = reader(*(folder / name for name in names))
                where = folder / names[0]
                try:
                    return cls(check_ids(vocab), merges, style)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
        wanted = ", or ".join(" and ".join(names) for names in readers)
        raise ValueError(f"{folder}: no vocabulary; put {wanted} there")

    def __len__(self):
        return len(self.vocab)

    def encode(self, text):
        """Text -> ids (list of int), without special tokens. Half of a surrogate pair is a "?"."""
        words = compiled(self.style.words).findall(self.style.clean(text))
        return [i for word in words for i in self.word(word)]

    def word(self, word):
        """The ids of one word, remembered."""
        if word in self.cache:
            return self.cache[word]
        symbols = [BYTES[byte] for byte in word.encode("utf-8", "replace")]
        symbols[-1] += self.style.end
        ids = [self.vocab[piece] for piece in self.join(symbols)]
        if len(self.cache) < MOST_CACHED and len(word) < 100:
            self.cache[word] = ids
        return ids

    def join(self, symbols):
        """Join neighbours, the pair of the lowest rank first and the leftmost of equals.

        A heap of pairs and links to neighbours, so that a long word takes n log n steps.
        """
        symbols, end = list(symbols), len(symbols)
        left, right = list(range(-1, end - 1)), list(range(1, end + 1))
        pairs = [(self.ranks[pair], i, *pair) for i, pair in enumerate(zip(symbols, symbols[1:]))
                 if pair in self.ranks]
        heapq.heapify(pairs)
        while pairs:
            _, i, a, b = heapq.heappop(pairs)
            j = right[i]
            if symbols[i] != a or j == end or symbols[j] != b:
                continue                 # one of the two has been joined meanwhile
            symbols[i], symbols[j], right[i] = a + b, None, right[j]
            if right[j] < end:
                left[right[j]] = i
            for k in (left[i], i):
                if k >= 0 and right[k] < end:
                    pair = symbols[k], symbols[right[k]]
                    if pair in self.ranks:
                        heapq.heappush(pairs, (self.ranks[pair], k, *pair))
        return [symbol for symbol in symbols if symbol is not None]

    def decode(self, ids):
        """Ids -> text. Special tokens and ids without a piece leave no trace."""
        out = bytearray()
        for i in map(int, ids):
            if i in self.pieces and i not in self.special:
                piece = self.pieces[i]
                ends = self.style.end and piece.endswith(self.style.end)
                body = piece.removesuffix(self.style.end) + (BYTES[32] if ends else "")
                out += b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in body)
        text = out.decode("utf-8", "replace")
        return text.strip() if self.style.end else text

    def batch(self, texts, context_length):
        """begin, ids, end of each text, padded right: int64 (B, T), T <= context.

        A longer text is cut so that its last id is still the end.
        """
        rows = [[self.bos_id, *self.encode(text)[:context_length - 2], self.eos_id] for text in texts]
        out = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        for row, ids in zip(out, rows):
            row[:len(ids)] = torch.tensor(ids)
        return out


# ------------------------------------------------------------------ files

def read_pair(vocab, merges):
    """vocab.json, {piece: id}, and merges.txt, "left right" in each line -> (vocab, merges)."""
    lines = text_lines(strict_json.read_bytes(merges, MOST_BYTES), merges)
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return strict_json.read_object(vocab), [pair(line, merges) for line in lines if line]


def read_tokenizer(path):
    """tokenizer.json: vocabulary, merges and special tokens in one -> (vocab, merges)."""
    said = strict_json.read_object(path)
    model, added = said.get("model"), said.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) \
            or not isinstance(model.get("merges"), list) or not isinstance(added, list):
        raise ValueError(f"{path}: no byte-level BPE (model with vocab and merges)")
    vocab = dict(model["vocab"])
    for token in added:
        content, number = (token.get("content"), token.get("id")) if isinstance(token, dict) \
            else (None, None)
        if not isinstance(content, str) or vocab.setdefault(content, number) != number:
            raise ValueError(f"{path}: {printable(token)} in added_tokens is at odds with its vocab")
    return vocab, [pair(merge, path) for merge in model["merges"]]


def read_clip(path):
    """OpenAI's list of merges; ids follow from the order -> (vocab, merges).

    256 bytes, the same at the end of a word, the pieces of the first 48,894 merges, 2 special ones.
    """
    lines = text_lines(strict_json.read_bytes(path, MOST_BYTES, gzip.open), path)
    merges = [pair(line, path) for line in lines[1:1 + CLIP_MERGES] if line]
    if len(merges) < CLIP_MERGES:
        raise ValueError(f"{path}: {len(merges)} merges, but CLIP's vocabulary has {CLIP_MERGES}")
    bytes_ = list(BYTES.values())
    pieces = [*bytes_, *(character + CLIP.end for character in bytes_),
              *(a + b for a, b in merges), CLIP.bos, CLIP.eos]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def text_lines(data, path):
    """The lines of UTF-8 bytes. Python's splitlines would also break at characters of pieces."""
    try:
        return [line.removesuffix("\r") for line in data.decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def pair(merge, path):
    """ "left right" or ["left", "right"] -> (left, right), or ValueError."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(
            isinstance(part, str) and part for part in parts):
        raise ValueError(f"{path}: {printable(merge)} is no merge of two pieces")
    return tuple(parts)


def check_ids(vocab):
    """The vocabulary itself; ValueError unless its ids are 0, 1, 2, ... each of them once."""
    wrong = [piece for piece, i in vocab.items() if type(i) is not int]
    if wrong:
        raise ValueError(f"the id of {printable(wrong[0])} is {printable(vocab[wrong[0]])}, not a number")
    if set(vocab.values()) != set(range(len(vocab))):
        raise ValueError(f"{len(vocab)} pieces whose ids are not 0 to {len(vocab) - 1}, "
                         "each of them once")
    return vocab
