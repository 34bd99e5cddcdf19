"""Write tests/goldens/clip_bpe.json from OpenAI's whole vocabulary.

    python tests/parity/make_bpe_golden.py FOLDER      where bpe_simple_vocab_16e6.txt.gz lies

It keeps the pieces of single bytes, the special ones, and every merge whose piece occurs inside of
a word of the texts below: those are all that can take part, so the ids are those of the whole.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.pretrained.bpe import BPE, BYTES, CLIP, compiled   # noqa: E402  the path comes first

TEXTS = ("a diagram", "a dog", "A Photo  of 2024 CATS!", "it's &amp;amp; café",
         "a photo of car with wet look", "<|endoftext|>", "ÜBER  \t naïve 東京 ½ 🙂 don't")


def main():
    """Reads the whole file, writes the part, and encodes the texts with both."""
    whole = BPE.load(sys.argv[1], CLIP)
    words = {"".join(BYTES[b] for b in word.encode()) + CLIP.end for text in TEXTS
             for word in compiled(CLIP.words).findall(CLIP.clean(text))}
    merges = {pair: rank for pair, rank in whole.ranks.items()
              if any("".join(pair) in word for word in words)}
    kept = {*BYTES.values(), *(c + CLIP.end for c in BYTES.values()), CLIP.bos, CLIP.eos,
            *map("".join, merges)}
    golden = {"texts": {text: whole.encode(text) for text in TEXTS},
              "pieces": {piece: i for piece, i in whole.vocab.items() if piece in kept},
              "merges": sorted([rank, *pair] for pair, rank in merges.items())}
    part = BPE(golden["pieces"], [(a, b) for _, a, b in golden["merges"]], CLIP)
    assert {text: part.encode(text) for text in TEXTS} == golden["texts"]
    path = Path(__file__).parents[1] / "goldens" / "clip_bpe.json"
    path.write_text(json.dumps(golden, ensure_ascii=True) + "\n")
    print(len(whole), "pieces, kept", len(kept), "and", len(merges), "merges")
    print(golden["texts"])


if __name__ == "__main__":
    main()
