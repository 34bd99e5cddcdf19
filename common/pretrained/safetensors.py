"""The safetensors format: 8 bytes of header length, a JSON header, one buffer of numbers.

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

The header is a claim, not a fact: each entry is held against the file before a tensor is made.
"""
import math
import os
from pathlib import Path

import torch

from common.pretrained import strict_json
from common.pretrained.strict_json import printable

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MOST_HEADER, MOST_DIMS = 100_000_000, 32


def read(path):
    """The tensors of a file -> {name: tensor}, mapped from the disk until they are copied.

    Raises ValueError in one line, with the file and the tensor, for whatever the header claims and
    the file does not hold: lengths, types, shapes, offsets that overlap, leave holes or point out.
    """
    header, start, size = read_header(Path(path))
    header.pop("__metadata__", None)
    spans = [(*check_entry(f"{path}: {printable(name)}", entry, size - start), name)
             for name, entry in header.items()]
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves a hole at {end}"
            raise ValueError(f"{path}: {printable(name)} {what}")
        end = stop
    if end != size - start:
        raise ValueError(f"{path}: {size - start - end} bytes at the end belong to no tensor")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[start:]
    return {name: view(data[begin:stop], **header[name]) for begin, stop, name in spans}


def read_header(path):
    """(the header's dict, where the buffer starts, the file's size). Raises ValueError."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise ValueError(f"{path}: not a safetensors file, or cut off (a header of "
                                 f"{length:,} bytes in a file of {size:,})")
            data = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    header = strict_json.parse(data, path)
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is no JSON object")
    return header, 8 + length, size


def check_entry(where, entry, size):
    """(first byte, last byte + 1) of an entry in a buffer of `size` bytes, or ValueError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: dtype, shape and data_offsets were expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype {printable(dtype)} is none of {', '.join(DTYPES)}")
    if not whole_numbers(shape) or len(shape) > MOST_DIMS:
        raise ValueError(f"{where}: {printable(shape)} is no shape")
    if not whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets {printable(offsets)} are not two numbers")
    begin, stop = offsets
    if not begin <= stop <= size:
        raise ValueError(f"{where}: bytes {begin} to {stop}, but the buffer has {size}")
    # Zeros hide a huge side from the product, and strides of a tensor must fit 64 bits.
    if math.prod(max(side, 1) for side in shape) >= 2 ** 60:
        raise ValueError(f"{where}: {printable(shape)} is no shape")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - begin != need:
        raise ValueError(f"{where}: {dtype} {printable(shape)} takes {need} bytes, "
                         f"but its data_offsets give {stop - begin}")
    return begin, stop


def whole_numbers(value):
    """Whether it is a list of ints (True is none), each of them 0 or more."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def view(data, dtype, shape, data_offsets):
    """Bytes uint8 (n,) as a tensor of the type and shape."""
    kind = DTYPES[dtype]
    if kind is torch.bool:
        return (data != 0).view(shape)   # a byte of 7 is not a truth value that torch knows
    if data.data_ptr() % kind.itemsize:
        data = data.clone()              # a tensor must start at a multiple of its item size
    return data.view(kind).view(shape)
