"""The byte-level vocabularies: CLIP's golden ids, GPT-2's bytes, and files that lie."""
import gzip
import itertools
import json
import pickle
import random
from pathlib import Path

import pytest

from common.data.tokenizer import Tokenizer
from common.pretrained.bpe import BPE, BYTES, CLIP, CLIP_FILE, CLIP_MERGES, GPT2, OPT, compiled
from tests.fuzz import damages, one_line
from tests.pretrained.writers import byte_vocabulary, write_vocabulary

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "clip_bpe.json").read_text())
MERGES = [tuple(pair) for _, *pair in GOLDEN["merges"]]
SMALL = [("t", "h"), ("th", "e</w>"), ("a", "b"), ("ab", "ab"), ("c", "ab")]


def golden():
    return BPE(GOLDEN["pieces"], MERGES, CLIP)


def small(style=CLIP, merges=SMALL):
    merges = [m for m in merges if style.end or not m[1].endswith("</w>")]
    return BPE(byte_vocabulary(style, merges), merges, style)


def write_tokenizer(folder, vocab, merges, added=()):
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": list(added), "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))


class TestCompiled:
    @pytest.mark.parametrize("pattern, text, words", [
        # CLIP splits digits and takes contractions in any case; GPT-2 keeps the blank before a word
        (CLIP.words, "two 12\u00bdx_x's we'LL", "two|1|2|\u00bd|x|_|x|'s|we|'LL"),
        (GPT2.words, "Hello  world's 123!!\n\n x ", "Hello| | world|'s| 123|!!|\n\n| x| "),
        (GPT2.words, "we'LL", "we|'|LL"), (GPT2.words, "a\u00a0b\x1cc", "a|\u00a0|b|\x1c|c"),
        (r"[\p{L}]", "a\u732b\u0301\u2167", "a|\u732b"),
        (r"[\p{N}]", "7\u2167\u00b2a\u0663", "7|\u2167|\u00b2|\u0663")])
    def test_a_text_is_split_into_words(self, pattern, text, words):
        assert compiled(pattern).findall(text) == words.split("|")


def plainly(symbols, ranks):
    """The definition another way: the leftmost of the best pairs is joined, one at a time."""
    symbols = list(symbols)
    while pairs := [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]:
        i = min(pairs)[1]
        symbols[i:i + 2] = ["".join(symbols[i:i + 2])]
    return symbols


class TestBPE:
    def test_published_ids_of_clip(self):
        known = {"a diagram": [320, 22697], "a dog": [320, 1929], "cafe\u0301": [15304], " \n": [],
                 "A Photo  of 2024 CATS!": [320, 1125, 539, 273, 271, 273, 275, 3989, 256],
                 "it's &amp;amp; caf\u00e9": [585, 568, 261, 15304], "": []}
        for text, ids in (GOLDEN["texts"] | known).items():
            assert golden().encode(text) == ids, text

    def test_clip_reads_entities_twice_white_space_as_one_blank_letters_composed_and_small(self):
        assert CLIP.clean(" It&amp;#39;s\u2003 \n CAFE\u0301\u200a\x1c!\u3000") \
            == "it's caf\u00e9 \x1c!"

    def test_clip_reads_curly_quotes_as_straight_ones(self):
        assert CLIP.clean("it\u2019s &rsquo;\u02bc\u2018\u201a\u201b \u00b4`") \
            == "it's ''''' \u00b4`"
        assert CLIP.clean("\u201c\u201d\u201e\u201f") == 4 * '"'
        assert golden().encode("a dog\u2019s") == golden().encode("a dog's")

    def test_a_batch_begins_ends_is_padded_with_zeros_and_cut_before_its_end(self):
        assert golden().batch(["a dog", "a photo of car", ""], 77).tolist() == [
            [49406, 320, 1929, 49407, 0, 0], [49406, 320, 1125, 539, 1615, 49407],
            [49406, 49407, 0, 0, 0, 0]]
        assert golden().batch(["a dog " * 100], 5).tolist() == [[49406, 320, 1929, 320, 49407]]

    def test_text_that_spells_a_special_piece_gets_ordinary_ids(self):
        ids = golden().encode("a dog<|endoftext|>a<|startoftext|>")
        assert not {49406, 49407} & set(ids)
        assert golden().decode([49406, *ids, 49407]) == "a dog <| endoftext |> a <| startoftext |>"
        assert small(OPT).eos_id not in small(OPT).encode("</s>")

    def test_any_text_comes_back_byte_for_byte(self):
        use, draw = small(GPT2), random.Random(0)
        for _ in range(300):
            codes = [draw.choice([draw.randrange(128), draw.randrange(0xd800), 32, 10, 0,
                                  draw.randrange(0xe000, 0x110000)]) for _ in range(20)]
            text = "".join(map(chr, codes))
            assert use.decode(use.encode(text)) == text
        assert use.decode(use.encode("a\ud83db")) == "a?b"       # half of a surrogate pair

    def test_ids_without_a_piece_and_broken_characters_do_no_harm(self):
        use = small(GPT2)
        assert use.decode([*use.encode("\u00e9")[:1], 10_000, use.eos_id]) == "\ufffd"

    def test_opts_begin_is_its_end_and_padding_is_a_piece(self):
        use = small(OPT)
        end, pad, ab = (use.vocab[piece] for piece in ("</s>", "<pad>", "ab"))
        rows = use.batch(["ab", ""], 9)
        assert rows.tolist() == [[end, ab, end], [end, end, pad]]
        assert use.decode([*rows[0], use.vocab["<unk>"], pad]) == "ab"

    def test_the_pair_that_is_first_in_the_list_is_joined_first(self):
        draw = random.Random(1)
        for _ in range(300):
            pieces, merges = list("abc"), []
            for _ in range(draw.randrange(12)):
                merge = draw.choice(pieces), draw.choice(pieces)
                if "".join(merge) not in pieces:
                    merges.append(merge)
                    pieces.append("".join(merge))
            use, word = small(GPT2, merges), draw.choices("abc", k=draw.randrange(1, 25))
            assert [use.pieces[i] for i in use.encode("".join(word))] == plainly(word, use.ranks)

    def test_each_vocabulary_remembers_its_own_words(self):
        use, other = small(), small(merges=SMALL[:1])
        assert [use.pieces[i] for i in use.encode("the abab")] == ["the</w>", "ab", "a", "b</w>"]
        assert other.encode("the") != use.encode("the")

    def test_it_has_the_interface_of_the_projects_own_tokenizer_and_travels_to_workers(self):
        use = pickle.loads(pickle.dumps(golden()))
        public = {name for name in dir(Tokenizer) if not name.startswith("_")} - {"train"}
        assert public <= {*dir(use)} and len(use) == len(GOLDEN["pieces"]) and use.eos_id == 49407
        assert use.encode("a dog") == [320, 1929]

    @pytest.mark.parametrize("damage, message", [
        *((lambda v, m, x=x: v.update(th=x), "5.. pieces") for x in ("7", True, [], 0, 9999, -1)),
        (lambda v, m: m.append(("q", "z")), "'qz'"),
        (lambda v, m: v.update(other=v.pop("\u0100</w>")), "'\u0100</w>'"),
        (lambda v, m: v.update(other=v.pop("<|endoftext|>")), "'<.endoftext.>'"),
        (lambda v, m: m.append(("a", "b", "c")), "'a b c'"),
        (lambda v, m: m.append(("a", "")), "'a '")])
    def test_a_vocabulary_that_lies_is_one_line(self, tmp_path, damage, message):
        vocab, merges = byte_vocabulary(CLIP, SMALL), list(SMALL)
        damage(vocab, merges)
        write_vocabulary(tmp_path, vocab, merges)
        with one_line(f"^{tmp_path}.*{message}"):
            BPE.load(tmp_path, CLIP)

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
    def test_damaged_files_are_vocabularies_or_one_line(self, tmp_path, name):
        write = write_tokenizer if name == "tokenizer.json" else write_vocabulary
        write(tmp_path, byte_vocabulary(GPT2, SMALL[2:]), SMALL[2:])
        for _ in damages(tmp_path / name, 150):
            with one_line(maybe=True):
                BPE.load(tmp_path, GPT2).encode("the cab")


class TestReadPair:
    @pytest.mark.parametrize("first", ["#version: 0.2\r\n", ""])
    def test_the_version_and_empty_lines_are_there_or_not(self, tmp_path, first):
        write_vocabulary(tmp_path, byte_vocabulary(CLIP, SMALL), SMALL)
        (tmp_path / "merges.txt").write_text(first + "\r\n\n".join(map(" ".join, SMALL)))
        assert list(BPE.load(tmp_path, CLIP).ranks) == SMALL
        (tmp_path / "vocab.json").unlink()
        with one_line(f"{tmp_path}: .*vocab.json and merges.txt, .*tokenizer.json, .*{CLIP_FILE}"):
            BPE.load(tmp_path, CLIP)


class TestReadTokenizer:
    @pytest.mark.parametrize("write", [" ".join, list])
    def test_tokenizer_json_alone_is_enough(self, tmp_path, write):
        vocab = byte_vocabulary(OPT, SMALL[2:])
        added = [{"id": vocab.pop(piece), "content": piece, "special": True}
                 for piece in ("</s>", "<pad>", "<s>", "<unk>")]
        write_tokenizer(tmp_path, vocab, [write(m) for m in SMALL[2:]], added)
        use = BPE.load(tmp_path, OPT)
        assert (use.eos_id, use.pad_id) == (added[0]["id"], added[1]["id"])
        assert use.encode("abab") == [vocab["abab"]]

    def test_added_tokens_that_contradict_the_vocabulary_and_other_kinds_are_told(self, tmp_path):
        write_tokenizer(tmp_path, byte_vocabulary(OPT, []), [], [{"id": 0, "content": "</s>"}])
        with one_line(f"{tmp_path / 'tokenizer.json'}: .*260 pieces"):
            BPE.load(tmp_path, OPT)
        for text in ('{"model": {"type": "WordPiece", "vocab": {}}}', '{"model": null}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with one_line(f"{tmp_path / 'tokenizer.json'}: no byte-level BPE"):
                BPE.load(tmp_path, OPT)


class TestReadClip:
    def test_openais_file_gives_ids_by_position(self, tmp_path):
        """48,894 merges are read and no more, then the two special pieces follow."""
        pairs = list(itertools.islice(itertools.product(BYTES.values(), BYTES.values()), 48_899))
        (tmp_path / CLIP_FILE).write_bytes(gzip.compress(
            "\n".join(['"#version: 0.2', *map(" ".join, pairs), ""]).encode(), 1))
        use = BPE.load(tmp_path, CLIP)
        assert len(use) == 49408 and (use.bos_id, use.eos_id) == (49406, 49407)
        assert (use.vocab["!"], use.vocab["!</w>"], use.vocab["!!"]) == (0, 256, 512)
        last, beyond = map("".join, pairs[48_893:48_895])
        assert use.vocab[last] == 49405 and beyond not in use.vocab
        with one_line(f"{tmp_path}: "):
            BPE.load(tmp_path, GPT2)

    @pytest.mark.parametrize("data, message", [
        (gzip.compress(b"#version\na b\nb c\n"), f"2 merges, .* {CLIP_MERGES}"), (b"x", "")])
    def test_a_file_that_lies_is_one_line(self, tmp_path, data, message):
        (tmp_path / CLIP_FILE).write_bytes(data)
        with one_line(f"^{tmp_path / CLIP_FILE}: .*{message}"):
            BPE.load(tmp_path, CLIP)
