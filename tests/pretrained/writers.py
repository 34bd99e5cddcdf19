"""Published files and run folders, written without the code that reads them."""
import functools
import io
import json
import struct
from dataclasses import asdict

import sentencepiece
import torch

from common.data.tokenizer import Tokenizer
from common.pretrained.bpe import BYTES
from common.training import checkpoint
from tests.helpers import assert_close

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
         torch.uint8: "U8", torch.bool: "BOOL"}


def write_header(path, header, data=b""):
    """A safetensors file of a header (dict or bytes) and its numbers -> path."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def write_safetensors(path, weights):
    """A safetensors file of a dict of tensors -> path."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in weights.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return write_header(path, header, data)


def byte_vocabulary(style, merges):
    """{piece: id}: the bytes, also as ends of words, the merges, and the special pieces."""
    pieces = [c + end for end in ("", style.end) for c in BYTES.values()] + [*map("".join, merges)]
    pieces += [style.bos, style.eos, style.pad, *style.others]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def write_vocabulary(folder, vocab, merges):
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
                                       encoding="utf-8")


@functools.cache
def sentencepieces(**more):
    """A small SentencePiece model, LLaMA's kind: its bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "two blue stars"]), model_writer=out,
        vocab_size=299, hard_vocab_limit=False, byte_fallback=True, model_type="bpe",
        minloglevel=2, **more)
    return out.getvalue()


def write_run(folder, name, config, weights):
    """A run folder as training leaves it -> its tokenizer."""
    tokenizer = Tokenizer.train(["a red circle"], 400)
    checkpoint.write_json(folder / "config.json", {"model": name, "config": asdict(config)})
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    checkpoint.save(folder, {"model": weights})
    return tokenizer


def check_weights(model, expected):
    """The parameters and buffers of a model are these, in these dtypes."""
    assert set(model.state_dict()) == set(expected)
    for name, weight in model.state_dict().items():
        assert_close(name, weight, expected[name], 0)
        assert weight.dtype == expected[name].dtype, name
