"""Text to ids and back: one SentencePiece vocabulary for a world, special tokens by id.

Text is case-folded and normalized (SentencePiece's nmt_nfkc_cf: Unicode NFKC, single spaces) before
it becomes ids, so "A  RED circle" comes back as "a red circle".

    tokenizer = Tokenizer.train(world.corpus())
    tokenizer.encode("a red circle")            # [32 or more, ...], no special tokens
    tokenizer.batch(["a red circle"], 16)       # int64 (1, T): <bos> ... <eos>, then <pad>
"""
import io

import sentencepiece
import torch

from common.data.safe_read import printable, read_bytes

CONTROL_IDS = 32                         # ids 0 .. 31 mean the same in every vocabulary
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<eoc>", "<cls>", "<enc>", "<dec>",
           "<sep>", "<system>", "<user>", "<assistant>", "<img>", "</img>", "<ref>", "</ref>",
           "<box>", "</box>", *(f"<spare{i}>" for i in range(CONTROL_IDS - 19)))
(PAD, BOS, EOS, UNK, IMAGE, EOC, CLS, ENC, DEC, SEP, SYSTEM, USER, ASSISTANT, IMG, IMG_END, REF,
 REF_END, BOX, BOX_END) = range(19)
NO_IMAGE = -200          # the place of an image in a vocabulary without <image> (as in LLaVA)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"-()"      # never fall back to bytes


class Tokenizer:
    """A SentencePiece model whose ids 0 .. 31 are SPECIAL, the same in every vocabulary.

    Special tokens are control symbols: no user's text can spell one; code inserts them by id.
    """

    file = "tokenizer.model"             # its name in a run folder; `model` is its bytes
    bos_id, eos_id, pad_id, image_id = BOS, EOS, PAD, IMAGE
    cls_id, enc_id, dec_id = CLS, ENC, DEC

    def __init__(self, model):
        """model: the bytes of a SentencePiece model. Raises ValueError for any other bytes."""
        self.model = model
        try:
            self.pieces = sentencepiece.SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(model)
        except Exception:                # its parser's own words help nobody
            raise ValueError("not a SentencePiece model, or cut off") from None
        self._check()

    def _check(self):
        """Raise ValueError unless the special tokens are ours."""
        for i, name in enumerate(SPECIAL):
            piece = self.pieces.id_to_piece(i) if i < len(self) else None
            if piece != name:
                raise ValueError(f"a vocabulary of another project or version: piece {i} is "
                                 f"{printable(piece)}, not {name}")

    def __getstate__(self):
        return self.model

    def __setstate__(self, model):
        self.__init__(model)

    @classmethod
    def train(cls, sentences, size=512):
        """A vocabulary of at most `size` pieces, a function of the sentences alone.

        Bytes are pieces too, so that normalized text of any language has ids and comes back.
        """
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            # A list: SentencePiece turns a Ctrl-C in a generator into an error of its own.
            sentence_iterator=iter([*sentences]), model_writer=out, model_type="bpe",
            vocab_size=size, hard_vocab_limit=False, byte_fallback=True, num_threads=1,
            minloglevel=2, character_coverage=1.0, required_chars=CHARACTERS,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, pad_piece="<pad>", bos_piece="<bos>",
            eos_piece="<eos>", unk_piece="<unk>", control_symbols=list(SPECIAL[4:]))
        return cls(out.getvalue())

    @classmethod
    def load(cls, path):
        """Read a tokenizer.model file. Raises ValueError when it is missing or another file."""
        model = read_bytes(path)
        try:
            return cls(model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text):
        """Text -> ids (list of int), without special tokens."""
        return self.pieces.encode(text)

    def decode(self, ids):
        """Ids -> text; special tokens leave no trace."""
        return self.pieces.decode([int(i) for i in ids if i != self.pieces.unk_id()])

    def batch(self, texts, context_length):
        """<bos> ids <eos> of each text, padded right with <pad>: int64 (B, T), T <= context_length.

        A longer text is cut so that its last id is still <eos>.
        """
        rows = [[self.bos_id, *self.encode(text)[:context_length - 2], self.eos_id]
                for text in texts]
        out = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        for row, ids in zip(out, rows):
            row[:len(ids)] = torch.tensor(ids)
        return out


class Pieces(Tokenizer):
    """LLaMA's SentencePiece vocabulary. It has no piece for padding: <unk> stands for it. The place
    of an image is no piece either."""

    file, image_id = "llama.model", NO_IMAGE
    cls_id = enc_id = dec_id = None

    def _check(self):
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.pad_id = self.pieces.unk_id()
        if min(self.bos_id, self.eos_id, self.pad_id) < 0:
            raise ValueError("a vocabulary without <s>, </s> or <unk>")

    def decode(self, ids):
        """Ids -> text, without special tokens and without ids that have no piece."""
        return super().decode([i for i in ids if i < len(self)])


class T5Pieces(Pieces):
    """T5's SentencePiece vocabulary. It has no piece for a start: <pad> stands for it."""

    file = "spiece.model"

    def _check(self):
        self.eos_id, self.pad_id = self.pieces.eos_id(), self.pieces.pad_id()
        self.bos_id = self.pad_id
        if min(self.eos_id, self.pad_id) < 0:
            raise ValueError("a vocabulary without </s> or <pad>")
