"""BERT's vocabulary as transformers reads it: the same ids and the same texts."""
import random
import string

import pytest

from common.pretrained.wordpiece import WordPiece

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r tests/requirements.txt")

WORDS = ("a an the two of on in with and dog cat red circle bench man wear hat is do not don isn t "
         "caf e play ing un believ able s 東 京 ü ß σ σα ж 한 ९ € ° → 🙂").split()
SENTENCES = """a dog sitting on a wooden bench|Two dogs, playing.|It's a dog's hat, isn't it?
a man wearing a hat!|what is the man wearing?|Don't|don ' t do n't|"quoted" (text) - dash—long…
CAFÉ café cafe\u0301 naïve Ångström|über Straße ẞ ﬁ ½ ² ℃ Ⅷ|東京タワー a東b京 豈|한국어 텍스트|देवनागरी ९
ΣΑ ЖЖ şı İ ǅ|dog🙂 🙂 👩‍🚀 ❤️ 🇩🇪|€5.00 + 3°C → 50% #tag @name a_b
http://a.b/c?d=e&f=g|a\u00adb\u200bc\u2060
tab\there\u00a0nbsp\u3000wide\u2028line|nul\0bell\x07esc\x1b[0m\x85|bad\ufffdchar
'''|''|. . .|a  b   c
x{y}[z]<w>|1,000,000.5|U.S.A.|mother-in-law|rock 'n' roll|o'clock|``latex''|~`^|\\back|$$|a/b|9¾"""


def vocabulary(folder):
    """Every letter and sign as a piece and as a rest, and some words -> the folder."""
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]",
              *string.punctuation, *letters, *("##" + c for c in letters), *"—…،。्", *WORDS,
              *("##" + word for word in WORDS)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return folder


def sentences():
    """The sentences above, words of 99 to 101 letters, and mixtures of all their characters."""
    found = [text for line in SENTENCES.split("\n") for text in line.split("|")]
    # Without capital sigma: at a word's end Python and BERT's own code make it ς, theirs σ.
    draw, characters = random.Random(0), "".join(found).replace("Σ", "") + " " * 50
    return [*found, *("x" * n for n in (99, 100, 101)),
            *("".join(draw.choices(characters, k=30)) for _ in range(300))]


def test_our_ids_and_texts_are_those_of_transformers(tmp_path):
    theirs = transformers.BertTokenizer.from_pretrained(vocabulary(tmp_path))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    ours = WordPiece.load(tmp_path)
    assert (len(theirs), *theirs.convert_tokens_to_ids(["[DEC]", "[ENC]"])) == (
        len(ours), ours.dec_id, ours.enc_id)
    for text in sentences():
        want = theirs(text).input_ids
        assert ours.batch([text], 512)[0].tolist() == want, repr(text)
        # The default of the versions that BLIP was published with.
        assert ours.decode(want) == theirs.decode(
            want, skip_special_tokens=True, clean_up_tokenization_spaces=True), repr(text)
