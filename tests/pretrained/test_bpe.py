"""The byte-level vocabularies: CLIP's golden ids, GPT-2's bytes, and files that lie."""
import gzip
import itertools
import json
import pickle
import random
import time
from pathlib import Path

import pytest

from common.pretrained.bpe import BPE, BYTES, CLIP, CLIP_FILE, CLIP_MERGES, GPT2, OPT, compiled
from common.data.tokenizer import Tokenizer
from tests.fuzz import mutations, one_line

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "clip_bpe.json").read_text())
MERGES = [tuple(pair) for _, *pair in GOLDEN["merges"]]
SMALL = [("t", "h"), ("th", "e</w>"), ("a", "b"), ("ab", "ab"), ("c", "ab")]


def golden():
    return BPE(GOLDEN["pieces"], MERGES, CLIP)


def small(style=CLIP, merges=SMALL):
    """A vocabulary of the bytes, the merges and the style's special pieces: (vocab, merges)."""
    merges = [m for m in merges if style.end or not m[1].endswith("</w>")]
    ends = [""] + [style.end] * bool(style.end)
    pieces = [c + end for end in ends for c in BYTES.values()] + [a + b for a, b in merges]
    pieces += [p for p in (style.bos, style.eos, style.pad, *style.others)]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges


def write_pair(folder, vocab, merges):
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
                                       encoding="utf-8")


def write_tokenizer(folder, vocab, merges, added=(), **model):
    model = {"type": "BPE", "vocab": vocab, "merges": merges} | model
    value = {"added_tokens": list(added), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(value))


class TestClip:
    @pytest.mark.parametrize("text, ids", [
        ("a diagram", "320 22697"), ("a dog", "320 1929"),
        ("A Photo  of 2024 CATS!", "320 1125 539 273 271 273 275 3989 256"),
        ("it's &amp;amp; café", "585 568 261 15304"),
        ("a photo of car with wet look", "320 1125 539 1615 593 6682 1012")])
    def test_the_published_ids_of_known_texts(self, text, ids):
        assert golden().encode(text) == [int(i) for i in ids.split()]

    def test_all_texts_of_the_golden_file(self):
        for text, ids in GOLDEN["texts"].items():
            assert golden().encode(text) == ids

    def test_bytes_come_in_the_published_order_and_again_as_ends_of_words(self):
        for i, character in enumerate(BYTES[b] for b in (*range(33, 127), *range(161, 173),
                                                         *range(174, 256))):
            assert GOLDEN["pieces"][character] == i
            assert GOLDEN["pieces"][character + "</w>"] == 256 + i
        assert golden().encode("!")[0] == 256 and golden().encode("!a")[0] == 256

    def test_a_batch_begins_ends_and_is_padded_with_zeros(self):
        ids = golden().batch(["a dog", "a photo of car"], 77)
        assert ids.tolist() == [[49406, 320, 1929, 49407, 0, 0],
                                [49406, 320, 1125, 539, 1615, 49407]]
        assert str(ids.dtype) == "torch.int64"

    def test_a_long_text_is_cut_so_that_its_last_id_is_still_the_end(self):
        ids = golden().batch(["a dog " * 100], 77)
        assert ids.shape == (1, 77) and ids[0, -1] == 49407
        assert ids[0, :4].tolist() == [49406, 320, 1929, 320]
        assert (ids == 49407).sum() == 1

    def test_text_that_spells_a_special_piece_gets_ordinary_ids(self):
        ids = golden().encode("a dog<|endoftext|>a<|startoftext|>")
        assert not {49406, 49407} & set(ids)
        assert golden().decode(ids) == "a dog <| endoftext |> a <| startoftext |>"

    def test_decoding_gives_the_cleaned_words(self):
        use = golden()
        assert use.decode(use.batch(["It's a  DOG!"], 20)[0]) == "it 's a dog !"
        assert use.decode([49406, 320, 1929, 49407]) == "a dog"

    def test_composed_and_decomposed_letters_are_the_same(self):
        assert golden().encode("cafe\u0301") == golden().encode("café") == [15304]

    def test_digits_stand_alone_and_white_space_is_one_blank(self):
        split = compiled(CLIP.words).findall
        assert split(CLIP.clean(" Two\u00a0\n 12½x_x's ")) == [
            "two", "1", "2", "½", "x", "_", "x", "'s"]

    def test_an_empty_text_has_no_ids(self):
        assert golden().encode("") == golden().encode(" \n") == []
        assert golden().batch([""], 77).tolist() == [[49406, 49407]]

    def test_it_has_the_interface_of_the_projects_own_tokenizer(self):
        public = {name for name in dir(Tokenizer) if not name.startswith("_")} - {"train"}
        assert public <= set(dir(golden())) and len(golden()) == len(GOLDEN["pieces"])

    def test_it_travels_to_worker_processes(self):
        again = pickle.loads(pickle.dumps(golden()))
        assert again.encode("a dog") == [320, 1929] and again.eos_id == 49407


class TestGpt2:
    def test_words_keep_the_blank_before_them(self):
        split = compiled(GPT2.words).findall
        assert split("Hello  world's 123!!\n\n x ") == \
            ["Hello", " ", " world", "'s", " 123", "!!", "\n\n", " x", " "]
        assert split("we'LL") == ["we", "'", "LL"]              # contractions in small letters only
        assert split("a\u00a0b\x1cc") == ["a", "\u00a0", "b", "\x1c", "c"]

    def test_any_text_comes_back_byte_for_byte(self):
        use, draw = BPE(*small(GPT2), GPT2), random.Random(0)
        for _ in range(300):
            text = "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0xd800),
                                            draw.randrange(0xe000, 0x110000), 32, 10, 0]))
                           for _ in range(draw.randrange(30)))
            assert use.decode(use.encode(text)) == text

    def test_half_of_a_surrogate_pair_is_a_question_mark(self):
        use = BPE(*small(GPT2), GPT2)
        assert use.decode(use.encode("a\ud83db")) == "a?b"

    def test_ids_without_a_piece_and_broken_characters_do_no_harm(self):
        use = BPE(*small(GPT2), GPT2)
        assert use.decode([*use.encode("é")[:1], 10_000, use.eos_id]) == "\ufffd"

    def test_opts_begin_is_its_end_and_padding_is_a_piece(self):
        use = BPE(*small(OPT), OPT)
        assert use.bos_id == use.eos_id == use.vocab["</s>"] and use.pad_id == use.vocab["<pad>"]
        row = use.batch(["ab", ""], 9)
        assert row.tolist() == [[use.eos_id, use.vocab["ab"], use.eos_id],
                                [use.eos_id, use.eos_id, use.pad_id]]
        assert use.decode(row[0]) == "ab"
        assert use.vocab["</s>"] not in use.encode("</s>")


def plainly(symbols, ranks):
    """The definition another way: the leftmost of the best pairs is joined, one at a time."""
    symbols = list(symbols)
    while pairs := [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]:
        i = min(pairs)[1]
        symbols[i:i + 2] = ["".join(symbols[i:i + 2])]
    return symbols


class TestJoining:
    def test_it_does_what_the_definition_says(self):
        draw = random.Random(1)
        for _ in range(300):
            pieces, merges = list("abc"), []
            for _ in range(draw.randrange(12)):
                merge = draw.choice(pieces), draw.choice(pieces)
                if "".join(merge) not in pieces:
                    merges.append(merge)
                    pieces.append("".join(merge))
            use = BPE(*small(GPT2, merges), GPT2)
            word = [draw.choice("abc") for _ in range(draw.randrange(1, 25))]
            assert use.join(word) == plainly(word, use.ranks)

    def test_the_first_merge_of_the_list_goes_first(self):
        assert BPE(*small(GPT2, [("b", "c"), ("a", "b")]), GPT2).join("abc") == ["a", "bc"]
        assert BPE(*small(GPT2, [("a", "b"), ("b", "c")]), GPT2).join("abc") == ["ab", "c"]
        assert BPE(*small(GPT2, [("a", "a")]), GPT2).join("aaa") == ["aa", "a"]

    def test_a_word_of_ten_thousand_letters_takes_seconds(self):
        doubling = [("a" * 2 ** n,) * 2 for n in range(8)]
        use = BPE(*small(GPT2, doubling), GPT2)
        start = time.perf_counter()
        assert use.join(list("a" * 10_000)) == ["a" * 256] * 39 + ["a" * 16]
        assert time.perf_counter() - start < 10

    def test_what_is_remembered_is_what_was_made(self):
        use = BPE(*small(), CLIP)
        assert use.encode("the cab the") == use.encode("the cab the")
        other = BPE(*small(merges=SMALL[:1]), CLIP)                # remembers words of its own
        assert other.encode("the") != use.encode("the")
        assert [use.pieces[i] for i in use.encode("the abab")] == ["the</w>", "ab", "a", "b</w>"]


class TestFiles:
    def test_vocab_and_merges_give_the_whole_published_vocabulary(self, tmp_path):
        free = set(range(49408)) - set(GOLDEN["pieces"].values())
        vocab = GOLDEN["pieces"] | {f"filler {i}": i for i in free}
        write_pair(tmp_path, vocab, MERGES)
        use = BPE.load(tmp_path, CLIP)
        assert len(use) == 49408 and (use.bos_id, use.eos_id, use.pad_id) == (49406, 49407, 0)
        assert use.encode("a diagram") == [320, 22697]

    @pytest.mark.parametrize("first", ["#version: 0.2\n", ""])
    def test_the_line_of_the_version_is_there_or_not(self, tmp_path, first):
        vocab, merges = small()
        write_pair(tmp_path, vocab, merges)
        (tmp_path / "merges.txt").write_text(first + "\r\n".join(map(" ".join, merges)))
        assert list(BPE.load(tmp_path, CLIP).ranks) == merges

    @pytest.mark.parametrize("joined", [True, False])
    def test_tokenizer_json_alone_is_enough(self, tmp_path, joined):
        vocab, merges = small(OPT)
        special = {p: vocab.pop(p) for p in ("</s>", "<pad>", "<s>", "<unk>")}
        merges = [" ".join(m) for m in merges] if joined else [list(m) for m in merges]
        write_tokenizer(tmp_path, vocab, merges,
                        [{"id": i, "content": p, "special": True} for p, i in special.items()])
        use = BPE.load(tmp_path, OPT)
        assert (use.eos_id, use.pad_id) == (special["</s>"], special["<pad>"])
        assert use.encode("abab") == [vocab["abab"]]

    def test_openais_file_gives_ids_by_position(self, tmp_path):
        """48,894 merges are read and no more, then the two special pieces follow."""
        pairs = list(itertools.islice(itertools.product(BYTES.values(), BYTES.values()),
                                      CLIP_MERGES + 5))
        lines = ['"#version: 0.2', *map(" ".join, pairs), ""]
        with gzip.open(tmp_path / CLIP_FILE, "wb") as file:
            file.write("\n".join(lines).encode())
        use = BPE.load(tmp_path, CLIP)
        assert len(use) == 49408 and (use.bos_id, use.eos_id) == (49406, 49407)
        assert use.vocab["!!"] == 512 and use.vocab["".join(pairs[CLIP_MERGES - 1])] == 49405
        assert "".join(pairs[CLIP_MERGES]) not in use.vocab
        with pytest.raises(ValueError, match="put vocab.json and merges.txt, or tok.*json there"):
            BPE.load(tmp_path, GPT2)

    def test_a_shorter_file_of_openais_kind_is_refused(self, tmp_path):
        with gzip.open(tmp_path / CLIP_FILE, "wb") as file:
            file.write(b"#version\na b\nb c\n")
        with pytest.raises(ValueError, match="2 merges, but CLIP's vocabulary has 48894"):
            BPE.load(tmp_path, CLIP)

    def test_a_gzip_bomb_is_not_unpacked(self, tmp_path):
        (tmp_path / CLIP_FILE).write_bytes(gzip.compress(bytes(10_000_000)) * 20)
        with pytest.raises(ValueError, match="larger than 100,000,000 bytes"):
            BPE.load(tmp_path, CLIP)

    @pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b[:5], lambda b: b"not gzip",
                                        lambda b: b[:10] + b"\xff" * 20 + b[30:]])
    def test_a_damaged_gzip_is_told(self, tmp_path, change):
        data = gzip.compress(random.Random(0).randbytes(999))
        (tmp_path / CLIP_FILE).write_bytes(change(data))
        with one_line(str(tmp_path)):
            BPE.load(tmp_path, CLIP)

    @pytest.mark.parametrize("damage, message", [
        (lambda v, m: v.update(th="7"), "the ids of its 5.. pieces are not 0 to 5.., each of"),
        (lambda v, m: v.update(th=True), "pieces are not 0 to"),
        (lambda v, m: v.update(th=[]), "pieces are not 0 to"),
        (lambda v, m: v.update(th=0), "pieces are not 0 to"),
        (lambda v, m: v.update(th=9999), "pieces are not 0 to"),
        (lambda v, m: v.update(th=-1), "pieces are not 0 to"),
        (lambda v, m: m.append(("q", "z")), "without the piece 'qz'"),
        (lambda v, m: v.update(other=v.pop("Ā</w>")), "without the piece 'Ā</w>'"),
        (lambda v, m: v.update(other=v.pop("<|endoftext|>")), "the piece '<.endoftext.>'"),
        (lambda v, m: m.append(("a", "b", "c")), "'a b c' is no merge of two pieces"),
        (lambda v, m: m.append(("a", "")), "'a ' is no merge of two pieces"),
    ], ids=lambda x: x if isinstance(x, str) else "")
    def test_a_hostile_vocabulary_is_one_line(self, tmp_path, damage, message):
        vocab, merges = small()
        merges = list(merges)
        damage(vocab, merges)
        write_pair(tmp_path, vocab, merges)
        with one_line(message):
            BPE.load(tmp_path, CLIP)

    def test_added_tokens_may_not_contradict_the_vocabulary(self, tmp_path):
        vocab, merges = small(OPT)
        write_tokenizer(tmp_path, vocab, merges, [{"id": 0, "content": "</s>"}])
        with one_line("pieces are not 0 to"):
            BPE.load(tmp_path, OPT)

    def test_a_vocabulary_of_another_kind_is_told(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
        with one_line("no byte-level BPE"):
            BPE.load(tmp_path, OPT)

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
    def test_mutations_of_the_files_are_vocabularies_or_one_line(self, tmp_path, name):
        vocab, merges = small(GPT2)
        if name == "tokenizer.json":
            write_tokenizer(tmp_path, vocab, [list(m) for m in merges])
        else:
            write_pair(tmp_path, vocab, merges)
        whole = (tmp_path / name).read_bytes()
        for data in mutations(whole, 150):
            (tmp_path / name).write_bytes(data)
            with one_line(maybe=True):
                BPE.load(tmp_path, GPT2).encode("the cab")
