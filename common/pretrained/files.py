"""The files in a folder of published weights: configs, and tensors in any of the usual formats."""
import math
import warnings
import zipfile
from pathlib import Path

import torch

from common.data.safe_read import read_json
from common.pretrained import safetensors
from common.training import checkpoint


def is_published(path):
    """Whether the path is a file, or a folder whose config.json names a Hugging Face model."""
    if Path(path).is_file():
        return True
    config = Path(path) / "config.json"
    value = read_json(config) if config.is_file() else None
    return isinstance(value, dict) and "model_type" in value


def given(config, name, default):
    """The value of a field, its default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def whole(value, where):
    """A whole number of at least 1, or ValueError."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is {value!r:.80}, not a whole number")
    return value


def positive(value, where):
    """A finite number above 0, or ValueError."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where} is {value!r:.80}, not a number above 0")
    return float(value)


def check_size(needed, weights, where):
    """Raise ValueError when a model is far larger than its weights, before it takes the memory.

    needed: how many parameters it has at least. The factor leaves smaller differences to
    `checkpoint.load_weights`, which names the tensors.
    """
    found = sum(weight.numel() for weight in weights.values())
    if needed > 2 * found:
        raise ValueError(f"{where}: its sizes ask for at least {needed:,} parameters, but the "
                         f"weights have {found:,}")


def read_weights(path):
    """The tensors of a folder or a file -> {name: tensor} on the CPU, in the file's dtypes.

    A folder: model.safetensors or pytorch_model.bin, whole or in shards with their index. A file:
    .safetensors, a pickle of tensors (no code in it is run), or a TorchScript archive, as OpenAI's.
    Raises ValueError in one line: nothing found, cut off, anything but tensors.
    """
    path = Path(path)
    if path.is_dir():
        for name, reader in IN_A_FOLDER.items():
            if (path / name).is_file():
                return reader(path / name)
        raise ValueError(f"{path}: no weights here; looked for {', '.join(IN_A_FOLDER)}")
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    return read_script(path) if is_script(path) else read_pickle(path)


def read_shards(index):
    """All tensors of the shards that an index file names."""
    shards = read_json(index, dict).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{index}: no weight_map from names to files")
    out = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or shard in ("", "..") or not shard.isprintable():
            raise ValueError(f"{index}: {shard!r:.80} is not in the folder of its index, refused")
        reader = safetensors.read if shard.endswith(".safetensors") else read_pickle
        out |= reader(index.parent / shard)
    return out


def read_pickle(path):
    """The tensors that torch.save wrote, plain or in a training checkpoint -> {name: tensor}.

    Only tensors and numbers are unpickled. A "module." before every name is dropped.
    """
    state = checkpoint.unpickle(path, "file of tensors", mmap=zipfile.is_zipfile(path))
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return tensors(state, path)


def is_script(path):
    """Whether the file is a TorchScript archive; a pickle of tensors has no constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):   # no zip, or damaged
        return False


def read_script(path):
    """The tensors of a TorchScript archive -> {name: tensor}. Its forward is never called."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                       # torch.jit.load is deprecated
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except Exception:
        raise ValueError(f"{path}: not a TorchScript archive that can be read") from None
    return tensors(state, path)


def tensors(state, path):
    """A state dict as {name: tensor}, or ValueError for anything that is not a plain tensor."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: no tensors in it")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name!r:.80} is a {type(value).__name__}, not a tensor")
        # A stride of 0 makes a tensor of any size from one number.
        if (value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized
                or value.numel() * value.element_size() > value.untyped_storage().nbytes()):
            raise ValueError(f"{path}: {name!r:.80} is not a plain tensor with all its numbers")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value.detach() for name, value in state.items()}


IN_A_FOLDER = {"model.safetensors": safetensors.read, "model.safetensors.index.json": read_shards,
               "pytorch_model.bin": read_pickle, "pytorch_model.bin.index.json": read_shards}
