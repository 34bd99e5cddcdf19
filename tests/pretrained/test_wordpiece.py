"""BERT's vocabulary: words, the longest pieces, special tokens, and files that lie."""
import pickle

import pytest

from common.data.tokenizer import Tokenizer
from common.pretrained.wordpiece import MOST_BYTES, WordPiece, words
from tests.fuzz import damages, one_line

PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "re", "red", "##d",
          "##dish", "##di", "dog", "##s", "s", "sep", "n", "t", "do", "[", "]", ".", ",", "'", "!",
          "?", "caf", "##e", "東", "x"]


def ids(pieces):
    return [PIECES.index(piece) for piece in pieces.split()]


class TestWords:
    @pytest.mark.parametrize("text, expected", [
        ("A Red DOG", "a|red|dog"), (" a\t\n\u00a0\u2028b\u3000", "a|b"), ("", ""),
        ("it's 3.5$!", "it|'|s|3|.|5|$|!"), ("a\u2014b\u3001c\u20ac", "a|\u2014|b|\u3001|c\u20ac"),
        ("Caf\u00e9 cafe\u0301 \u00c5\u0130", "cafe|cafe|ai"),
        ("x東京y\uf900\U00020001", "x|東|京|y|\u8c48|\U00020001"),
        ("a\0b\x1cc\u200bd\ufffde\ud83df", "abcdef"),             # control characters vanish
        ("dog🙂", "dog🙂")])
    def test_a_text_is_split(self, text, expected):
        assert words(text) == (expected.split("|") if expected else [])


class TestWordPiece:
    @pytest.mark.parametrize("text, pieces", [
        ("a Red dog", "a red dog"), ("reddish", "red ##dish"), ("redd", "red ##d"),
        ("redid dogs", "[UNK] dog ##s"),             # one piece missing, the whole word unknown
        ("dish xs", "[UNK] x ##s"), ("café東x", "caf ##e 東 x"),
        ("x" + "s" * 99, "x " + "##s " * 99), ("x" + "s" * 100, "[UNK]"),
        ("a [SEP] [unused0]", "a [ sep ] [ [UNK] ]")])
    def test_a_word_is_its_longest_pieces_from_the_left(self, text, pieces):
        assert WordPiece(PIECES).encode(text) == ids(pieces)

    def test_a_batch_begins_ends_is_padded_and_cut_before_its_end(self):
        cls, sep, dog = ids("[CLS] [SEP] dog")
        assert WordPiece(PIECES).batch(["dog dog", "", "dog dog dog"], 4).tolist() == [
            [cls, dog, dog, sep], [cls, sep, 0, 0], [cls, dog, dog, sep]]

    def test_dec_and_enc_follow_the_pieces_unless_the_file_has_them(self):
        for pieces in (PIECES, [*PIECES, "[DEC]"], [*PIECES, "[DEC]", "[ENC]"]):
            use = WordPiece(pieces)
            assert (use.dec_id, use.enc_id, len(use)) == (30, 31, 32)
        assert not {30, 31} & {*use.encode("[DEC] [ENC]")}

    def test_blip_2_adds_dec_alone(self):
        use = WordPiece(PIECES, added=("[DEC]",))
        assert (use.dec_id, use.enc_id, len(use)) == (30, None, 31)

    def test_decoding_joins_pieces_and_leaves_special_tokens_and_unknown_ids_out(self):
        use = WordPiece(PIECES)
        assert use.decode([30, *ids("[CLS] red ##dish dog ##s [UNK] [MASK] . [SEP] [PAD]"), 31, 32,
                           -5]) == "reddish dogs."
        for text, expected in (("A dog's , x!", "a dog's, x!"), ("do n't? ", "don't?"),
                               ("[a] x.", "[ a ] x.")):
            assert use.decode(use.encode(text)) == expected

    def test_it_has_the_interface_of_the_projects_own_tokenizer_and_travels_to_workers(self):
        use = pickle.loads(pickle.dumps(WordPiece(PIECES)))
        public = {name for name in dir(Tokenizer) if not name.startswith("_")} - {"train"}
        assert public <= {*dir(use)} and (use.bos_id, use.eos_id, use.pad_id) == (3, 4, 0)
        assert use.encode("reddish") == ids("red ##dish")

    @pytest.mark.parametrize("end", ["\n", "", "\r\n"])
    def test_a_piece_a_line(self, tmp_path, end):
        (tmp_path / "vocab.txt").write_bytes((end or "\n").join(PIECES).encode() + end.encode())
        assert WordPiece.load(tmp_path).pieces == [*PIECES, "[DEC]", "[ENC]"]

    @pytest.mark.parametrize("data, message", [
        (None, "no such file"), (b"[PAD]\n\xff", "utf-8"), (b"a\nb", r"no piece \[PAD\]"),
        ("\n".join(PIECES).replace("[SEP]", "{}").encode(), r"no piece \[SEP\]"),
        ("\n".join([*PIECES, "dog"]).encode(), "'dog' is there twice"),
        (b"[PAD]\n" * (MOST_BYTES // 6 + 1), "larger than 10,000,000")])
    def test_a_file_that_lies_is_one_line(self, tmp_path, data, message):
        if data is not None:
            (tmp_path / "vocab.txt").write_bytes(data)
        with one_line(f"^{tmp_path}/vocab.txt: .*{message}"):
            WordPiece.load(tmp_path)

    def test_damaged_files_are_vocabularies_or_one_line(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
        for _ in damages(tmp_path / "vocab.txt", 150):
            with one_line(maybe=True):
                WordPiece.load(tmp_path).encode("reddish dog")
