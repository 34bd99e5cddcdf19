"""The vocabulary: fixed special ids, text that can say anything but them, batches."""
import io
import pickle
import random
import unicodedata

import pytest
import sentencepiece
import torch

from common.data.batches import world_tokenizer
from common.data.shapes.world import Shapes
from common.data.tokenizer import (ASSISTANT, BOS, BOX, BOX_END, CHARACTERS, CLS, CONTROL_IDS, DEC,
                                   ENC, EOC, EOS, IMAGE, IMG, IMG_END, PAD, REF, REF_END, SEP,
                                   SPECIAL, SYSTEM, UNK, USER, Tokenizer)
from tests.fuzz import one_line

STRANGE = ["猫 кот", "naïve café", "🙂👩🏽‍🚀🇫🇷", "\u202eabc", "a\u0301", "x̱̂",
           "{}[]\\|~^_<>@#$%&*+=/", "ß ſ ﬁ ½"]


def corpus():
    """A small fixed corpus of the shapes world's words."""
    rng, world = random.Random(7), Shapes()
    return [world.record("train", i, rng)["texts"][0] for i in range(211)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(corpus(), 400)


def normal(text):
    """What a text is after the vocabulary's normalisation, for texts without rare marks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class TestSpecial:
    def test_the_first_ids_are_the_special_tokens(self, tokenizer):
        assert len(SPECIAL) == len(set(SPECIAL)) == CONTROL_IDS == 32
        assert tuple(tokenizer.pieces.id_to_piece(i) for i in range(32)) == SPECIAL
        assert all(tokenizer.pieces.is_control(i) or i == UNK for i in range(32))

    def test_the_names_are_the_ids(self):
        named = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNK, "<image>": IMAGE,
                 "<eoc>": EOC, "<cls>": CLS, "<enc>": ENC, "<dec>": DEC, "<sep>": SEP,
                 "<system>": SYSTEM, "<user>": USER, "<assistant>": ASSISTANT, "<img>": IMG,
                 "</img>": IMG_END, "<ref>": REF, "</ref>": REF_END, "<box>": BOX,
                 "</box>": BOX_END}
        assert named == {name: SPECIAL.index(name) for name in SPECIAL[:19]}
        assert set(SPECIAL[19:]) == {f"<spare{i}>" for i in range(13)}

    @pytest.mark.parametrize("text", [
        *SPECIAL, "".join(SPECIAL), " ".join(SPECIAL), "red<eos>circle", "<EOS>", "＜eos＞",
        "<s> </s> <0x41>", "▁<eos>", "<image>" * 50])
    def test_no_text_spells_a_special_token(self, tokenizer, text):
        assert min(tokenizer.encode(text)) >= 32
        assert min(tokenizer.batch([text], 500)[0, 1:-1]) >= 32

    def test_a_spelled_special_token_comes_back_as_text(self, tokenizer):
        assert tokenizer.decode(tokenizer.encode("a <eos> <0x41> b")) == "a <eos> <0x41> b"

    def test_special_tokens_leave_no_trace_in_text(self, tokenizer):
        ids = [BOS, *tokenizer.encode("a red circle"), EOS, PAD, UNK, IMAGE, BOX, 31]
        assert tokenizer.decode(ids) == "a red circle"
        assert tokenizer.decode(range(32)) == ""


class TestText:
    @pytest.mark.parametrize("text", ["a red circle", "Two  LARGE\tblue stars,\nand a ring!",
                                      *STRANGE[:2], STRANGE[6], CHARACTERS])
    def test_text_comes_back_lower_case_with_single_spaces(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == normal(text)

    @pytest.mark.parametrize("text", STRANGE)
    def test_any_unicode_comes_back_and_then_stays(self, tokenizer, text):
        once = tokenizer.decode(tokenizer.encode(text))
        assert once and tokenizer.decode(tokenizer.encode(once)) == once
        assert UNK not in tokenizer.encode(text) and "\ufffd" not in once

    def test_random_unicode_comes_back_and_then_stays(self, tokenizer):
        rng = random.Random(11)
        for _ in range(200):
            points = [rng.choice((rng.randrange(32, 0x300), rng.randrange(0xE000, 0x20000)))
                      for _ in range(rng.randrange(30))]
            once = tokenizer.decode(tokenizer.encode("".join(map(chr, points))))
            assert tokenizer.decode(tokenizer.encode(once)) == once

    def test_letters_of_the_alphabet_never_fall_back_to_bytes(self, tokenizer):
        for character in CHARACTERS:
            ids = tokenizer.encode(character)
            assert not any(tokenizer.pieces.is_byte(i) for i in ids), character

    def test_words_of_the_world_are_single_pieces(self):
        world = world_tokenizer(Shapes())
        assert len(world) == Shapes.vocab_size
        for word in ("red", "circle", "triangle", "purple"):
            assert len(world.encode(word)) == 1, word

    def test_no_text_is_no_ids(self, tokenizer):
        assert tokenizer.encode("") == tokenizer.encode(" \n") == []


class TestBatch:
    def test_rows_are_bos_text_eos_and_then_pad(self, tokenizer):
        texts = ["a red circle", "a large blue star at the top"]
        (one, two), made = map(tokenizer.encode, texts), tokenizer.batch(texts, 23)
        assert made.dtype == torch.int64 and made.shape == (2, len(two) + 2)
        assert made[1].tolist() == [BOS, *two, EOS]
        assert made[0].tolist() == [BOS, *one, EOS, *[PAD] * (len(two) - len(one))]

    def test_a_longer_text_is_cut_and_still_ends_in_eos(self, tokenizer):
        text = "a red circle, " * 9
        made = tokenizer.batch([text, "star"], 7)
        assert made.shape == (2, 7)
        assert made[0].tolist() == [BOS, *tokenizer.encode(text)[:5], EOS]
        assert made[1, :3].tolist() == [BOS, *tokenizer.encode("star"), EOS]

    def test_no_text_is_bos_eos(self, tokenizer):
        assert tokenizer.batch([""], 7).tolist() == [[BOS, EOS]]


class TestModel:
    def test_training_is_a_function_of_the_sentences(self, tokenizer):
        assert Tokenizer.train(corpus(), 400).model == tokenizer.model
        assert Tokenizer.train(corpus()[:-1] + ["an extra word"] * 40, 400).model != tokenizer.model

    def test_a_small_corpus_gives_a_small_vocabulary(self):
        assert 32 + 256 < len(Tokenizer.train(["a red circle"], 512)) < 512

    def test_it_survives_pickling_and_the_disk(self, tokenizer, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
        for again in (pickle.loads(pickle.dumps(tokenizer)),
                      Tokenizer.load(tmp_path / "tokenizer.model")):
            assert again.encode("a red circle") == tokenizer.encode("a red circle")
            assert len(again) == len(tokenizer)

    def test_a_vocabulary_of_sixteen_control_ids_is_refused(self):
        out = io.BytesIO()
        older = [*SPECIAL[4:13], "<spare0>", "<spare1>", "<spare2>"]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=out, vocab_size=400, model_type="bpe",
            byte_fallback=True, minloglevel=2, pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK,
            pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>", unk_piece="<unk>",
            control_symbols=older)
        with one_line("another project or version: piece 13 is <spare0>, not <img>$"):
            Tokenizer(out.getvalue())

    @pytest.mark.parametrize("damage", [
        lambda model: b"", lambda model: b"garbage", lambda model: b"\0" * 100,
        lambda model: model[:1000], lambda model: model[:-1],
        lambda model: model.replace(b"<image>", b"<other>"),
        lambda model: model.replace(b"<spare12>", b"<spare13>")])
    def test_other_bytes_are_refused_in_one_line(self, tokenizer, damage, tmp_path, capfd):
        with pytest.raises(ValueError, match="not a SentencePiece model|another project") as caught:
            Tokenizer(damage(tokenizer.model))
        assert "\n" not in str(caught.value)
        (tmp_path / "tokenizer.model").write_bytes(damage(tokenizer.model))
        with pytest.raises(ValueError, match="tokenizer.model: "):
            Tokenizer.load(tmp_path / "tokenizer.model")

    def test_a_missing_file_is_refused_in_one_line(self, tmp_path):
        with pytest.raises(ValueError, match="nothing.model"):
            Tokenizer.load(tmp_path / "nothing.model")
