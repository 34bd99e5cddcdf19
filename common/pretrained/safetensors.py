"""The safetensors format: 8 bytes of header length, a JSON header, one buffer of numbers.

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Each entry of the header is compared with the file before a tensor is made.
"""
import math
import os

import torch

from common.data.safe_read import MOST_BYTES, open_regular, parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read(path):
    """The tensors of a file -> {name: tensor}, mapped from the disk until they are copied.

    Raises ValueError in one line, with the file and the tensor, where header and file disagree:
    lengths, types, shapes, offsets that overlap, leave holes or lie beyond the end.
    """
    header, start, size = read_header(path)
    header.pop("__metadata__", None)
    spans = {name: check_entry(f"{path}: {name!r:.80}", entry) for name, entry in header.items()}
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise ValueError(f"{path}: {name!r:.80} begins at byte {begin}, but the tensors before "
                             f"it end at {end}")
        end = stop
    if end != size - start:
        raise ValueError(f"{path}: tensors of {end} bytes in a buffer of {size - start}")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[start:]
    return {name: view(data[begin:stop], DTYPES[header[name]["dtype"]], header[name]["shape"])
            for name, (begin, stop) in spans.items()}


def read_header(path):
    """(the header's dict, the byte at which the buffer begins, the file's size) or ValueError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_BYTES):
            raise ValueError(f"{path}: not a safetensors file, or cut off (a header of {length:,} "
                             f"bytes in a file of {size:,})")
        return parse_json(file.read(length), path, dict), 8 + length, size


def check_entry(where, entry):
    """(first byte, last byte + 1) of a header's entry, or ValueError."""
    try:
        kind, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        known = all(type(n) is int and n >= 0 for n in [*shape, begin, stop])
    except (TypeError, KeyError, ValueError):
        known = False
    # A side of 0 hides a huge one from the product, but torch's strides must fit 64 bits.
    if not known or math.prod(max(side, 1) for side in shape) >= 2 ** 60:
        raise ValueError(f"{where} is {entry!r:.120}, not a shape, two data_offsets and a dtype of "
                         + ", ".join(DTYPES))
    if stop - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{where}: {entry['dtype']} {shape!r:.80} does not take the bytes {begin} "
                         f"to {stop}")
    return begin, stop


def view(data, kind, shape):
    """Bytes uint8 (n,) as a tensor of the type and shape."""
    if data.data_ptr() % kind.itemsize:
        data = data.clone()              # a tensor must start at a multiple of its item size
    return data.view(kind).view(shape)
