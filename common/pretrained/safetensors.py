"""The safetensors format: 8 bytes of header length, a JSON header, one buffer of numbers.

    {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
"""
import os

import torch

from common.data.safe_read import MOST_BYTES, open_regular, parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read(path):
    """The tensors of a file -> {name: tensor}, mapped from the disk until they are copied.

    Raises ValueError with the file and the tensor where header and buffer disagree.
    """
    with open_regular(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_BYTES):
            raise ValueError(f"{path}: not a safetensors file, or cut off (a header of {length:,} "
                             f"bytes in a file of {size:,})")
        header = parse_json(file.read(length), path, dict)
    header.pop("__metadata__", None)
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    return {name: view(data, entry, f"{path}: {name!r:.80}") for name, entry in header.items()}


def view(data, entry, where):
    """The tensor of a header's entry in the buffer uint8 (n,), or ValueError."""
    try:
        kind, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        part = data[begin:end]           # shorter where the file is cut off: its shape then fails
        if part.storage_offset() % kind.itemsize:
            part = part.clone()          # a tensor must start at a multiple of its item size
        return part.view(kind).view(shape)
    except (TypeError, KeyError, ValueError, RuntimeError, IndexError):
        raise ValueError(f"{where} is {entry!r:.120}, which {len(data):,} bytes do not hold: cut "
                         f"off, or not a shape, two data_offsets and one of {', '.join(DTYPES)}"
                         ) from None
