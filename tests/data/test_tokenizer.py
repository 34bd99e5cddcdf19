"""The vocabulary: fixed special ids, text that can say anything but them, batches."""
import pickle
import random
import unicodedata

import pytest

from common.data import tokenizer as module
from common.data.shapes.world import Shapes
from common.data.tokenizer import BOS, BOX, CHARACTERS, EOS, IMAGE, PAD, SPECIAL, UNK, Tokenizer
from tests.fuzz import one_line
from tests.helpers import assert_close

STRANGE = ["猫 кот", "naïve café", "🙂👩🏽‍🚀🇫🇷", "\u202eabc", "a\u0301", "x̱̂",
           "{}[]\\|~^_<>@#$%&*+=/", "ß ſ ﬁ ½"]


def corpus():
    """A small fixed corpus of the shapes world's words."""
    rng, world = random.Random(7), Shapes()
    return [world.record("train", i, rng)["texts"][0] for i in range(211)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(corpus(), 400)


class TestTokenizer:
    def test_the_first_ids_are_the_special_tokens(self, tokenizer):
        constants = ("PAD BOS EOS UNK IMAGE EOC CLS ENC DEC SEP SYSTEM USER ASSISTANT IMG IMG_END "
                     "REF REF_END BOX BOX_END CONTROL_IDS").split()
        assert [getattr(module, name) for name in constants] == [*range(19), 32]
        names = ("pad bos eos unk image eoc cls enc dec sep system user assistant img /img "
                 "ref /ref box /box").split() + [f"spare{i}" for i in range(13)]
        wanted = tuple(f"<{name}>" for name in names)
        assert SPECIAL == tuple(tokenizer.pieces.id_to_piece(i) for i in range(32)) == wanted
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS, EOS, PAD)

    def test_an_interrupt_is_not_blamed_on_the_texts(self):
        def texts():
            yield "a red circle"
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train(texts())

    @pytest.mark.parametrize("text", [
        *SPECIAL, "".join(SPECIAL), " ".join(SPECIAL), "red<eos>circle", "<EOS>", "＜eos＞",
        "<s> </s> <0x41>", "▁<eos>", "<image>" * 50])
    def test_no_text_spells_a_special_token(self, tokenizer, text):
        assert min(tokenizer.encode(text)) >= 32
        assert min(tokenizer.batch([text], 500)[0, 1:-1]) >= 32

    def test_special_tokens_leave_no_trace_in_text(self, tokenizer):
        ids = [BOS, *tokenizer.encode("a <eos> <0x41> circle"), EOS, PAD, UNK, IMAGE, BOX, 31]
        assert tokenizer.decode(ids) == "a <eos> <0x41> circle"
        assert tokenizer.decode(range(32)) == ""

    @pytest.mark.parametrize("text", ["a red circle", "Two  LARGE\tblue stars,\nand", "", " \n",
                                      *STRANGE[:2], STRANGE[6], CHARACTERS])
    def test_text_comes_back_lower_case_with_single_spaces(self, tokenizer, text):
        want = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        assert tokenizer.decode(tokenizer.encode(text)) == want
        assert want or tokenizer.encode(text) == []

    @pytest.mark.parametrize("text", STRANGE)
    def test_any_unicode_comes_back_and_then_stays(self, tokenizer, text):
        once = tokenizer.decode(tokenizer.encode(text))
        assert once and tokenizer.decode(tokenizer.encode(once)) == once
        assert UNK not in tokenizer.encode(text) and "\ufffd" not in once

    def test_letters_of_the_alphabet_never_fall_back_to_bytes(self, tokenizer):
        fallen = [character for character in CHARACTERS
                  if any(tokenizer.pieces.is_byte(i) for i in tokenizer.encode(character))]
        assert fallen == []

    def test_rows_are_bos_text_eos_and_then_pad_and_a_longer_text_is_cut(self, tokenizer):
        text, star = "a red circle, " * 9, tokenizer.encode("star")
        assert_close("ids (B, T)", tokenizer.batch(["star", ""], 7),
                     [[BOS, *star, EOS], [BOS, EOS, *[PAD] * len(star)]])
        assert_close("ids (B, T) of a longer text", tokenizer.batch([text, "star"], 7), [
            [BOS, *tokenizer.encode(text)[:5], EOS], [BOS, *star, EOS, *[PAD] * (5 - len(star))]])

    def test_training_is_a_function_of_the_sentences_and_the_size_the_most(self, tokenizer):
        assert Tokenizer.train(corpus(), 400).model == tokenizer.model
        assert Tokenizer.train(corpus()[:-1] + ["an extra word"] * 40, 400).model != tokenizer.model
        assert len(tokenizer) == 400 and 32 + 256 < len(Tokenizer.train(["a red circle"])) < 512

    def test_it_survives_pickling_and_the_disk(self, tokenizer, tmp_path):
        (tmp_path / "a.model").write_bytes(tokenizer.model)
        for again in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path / "a.model")):
            assert again.encode("a red circle") == tokenizer.encode("a red circle")
            assert len(again) == len(tokenizer)

    @pytest.mark.parametrize("damage, value", [
        (lambda model: b"", ""), (lambda model: b"garbage", ""), (lambda model: b"\0" * 100, ""),
        (lambda model: model[:1000], ""), (lambda model: model[:-1], ""),
        (lambda model: model.replace(b"<image>", b"<other>"), "4 .*<other>.*<image>"),
        (lambda model: model.replace(b"<spare12>", b"<spare13>"), "31 .*<spare13>.*<spare12>")])
    def test_other_bytes_are_refused_in_one_line(self, tokenizer, damage, value, tmp_path):
        (tmp_path / "a.model").write_bytes(damage(tokenizer.model))
        with one_line(value):
            Tokenizer((tmp_path / "a.model").read_bytes())
        for name, why in (("a.model", value), ("none.model", "")):
            with one_line(f"{name}: .*{why}"):
                Tokenizer.load(tmp_path / name)
