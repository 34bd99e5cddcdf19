"""WordPiece, the vocabulary of BERT-uncased: of BLIP, and of BLIP-2's Q-Former.

    tokenizer = WordPiece.load(FOLDER)         # where vocab.txt lies
    tokenizer.encode("a red apple")            # [1037, 2417, 6207], no special tokens

A text is split into words of small letters without accents, a word into the longest pieces that
the vocabulary has, from left to right; "##" marks a piece that continues a word (BERT, 3).
"""
import functools
import re
import unicodedata
from pathlib import Path

from common.data.safe_read import read_bytes
from common.data.tokenizer import NO_IMAGE, Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED = ("[DEC]", "[ENC]")               # BLIP's, in this order: 30522 and 30523; BLIP-2: [DEC]
MOST_BYTES = 10_000_000                  # BERT's file has 232 thousand
LONGEST = 100                            # characters of a word; a longer one is unknown
IDEOGRAPHS = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df"
                        "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")
# What is written without the blank that decoding puts there.
TIGHT = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"))


def words(text):
    """A text -> its words in small letters, without accents; punctuation and ideographs alone."""
    kept = "".join(c for c in text if c in "\t\n\r" or
                   unicodedata.category(c)[0] != "C" and c != "\ufffd")      # C: control characters
    letters = "".join(c for c in unicodedata.normalize("NFD", kept.lower())
                      if unicodedata.category(c) != "Mn")                    # Mn: accents
    return "".join(f" {c} " if stands_alone(c) else c for c in letters).split()


def stands_alone(c):
    """Whether a character is a word: punctuation of Unicode, signs of ASCII, ideographs."""
    return (unicodedata.category(c)[0] == "P" or c.isascii() and not c.isalnum()
            or IDEOGRAPHS.match(c) is not None)


class WordPiece:
    """A list of pieces, of which the place is the id, with the interface of tokenizer.Tokenizer.

    `added`, such as BLIP's [DEC] and [ENC], follow the pieces. No user's text can spell a special
    token: "[SEP]" becomes the three words [ sep ], where transformers' tokenizers would read the
    token. Raises ValueError for a piece that is missing or there twice.
    """

    file = "vocab.txt"                   # its name in a run folder; `model` is its bytes
    image_id = NO_IMAGE

    def __init__(self, pieces, added=ADDED):
        self.pieces = [*pieces, *(piece for piece in added if piece not in pieces)]
        self.vocab = {piece: i for i, piece in enumerate(self.pieces)}
        missing = [piece for piece in SPECIAL[:4] if piece not in self.vocab]
        twice = [piece for i, piece in enumerate(self.pieces) if self.vocab[piece] != i]
        if missing or twice:
            raise ValueError("not BERT's vocabulary: " + (f"no piece {missing[0]}" if missing else
                                                          f"{twice[0]!r:.80} is there twice"))
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = map(self.vocab.get, SPECIAL[:4])
        self.dec_id, self.enc_id = map(self.vocab.get, ADDED)
        self.cls_id, self.model = self.bos_id, "\n".join([*self.pieces, ""]).encode()

    @classmethod
    def load(cls, folder, added=ADDED):
        """Read vocab.txt, one piece a line."""
        path = Path(folder) / "vocab.txt"
        data = read_bytes(path, most=MOST_BYTES)
        try:
            return cls(data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n"),
                       added)
        except ValueError as error:      # of decode too: not UTF-8
            raise ValueError(f"{path}: {error}") from None

    def __len__(self):
        return len(self.pieces)

    def encode(self, text):
        """Text -> ids (list of int), without special tokens but [UNK]."""
        return [i for word in words(text) for i in self.encode_word(word)]

    @functools.lru_cache(100_000)        # most words come again
    def encode_word(self, word):
        """The ids of one word: the longest piece that it begins with, then of its rest."""
        ids, start = [], 0
        while start < len(word) <= LONGEST:
            for end in range(len(word), start, -1):
                piece = "##" * (start > 0) + word[start:end]
                if piece in self.vocab:
                    break
            else:
                break
            ids.append(self.vocab[piece])
            start = end
        return ids if start == len(word) else [self.unk_id]

    def decode(self, ids):
        """Ids -> text. Special tokens and ids without a piece are left out."""
        pieces = [self.pieces[i] for i in map(int, ids) if 0 <= i < len(self)]
        text = " ".join(p for p in pieces if p not in SPECIAL + ADDED).replace(" ##", "")
        for spaced, tight in TIGHT:
            text = text.replace(spaced, tight)
        return text

    batch = Tokenizer.batch
