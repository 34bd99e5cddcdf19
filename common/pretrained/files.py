"""What lies in a folder of published weights: configs, and tensors in any of the usual files."""
import warnings
import zipfile
from pathlib import Path

import torch

from common.training import checkpoint
from common.pretrained import safetensors, strict_json
from common.pretrained.strict_json import printable

# Training checkpoints keep the weights under one of these.
WRAPPERS = ("state_dict", "model_state_dict", "model")


def is_published(path):
    """Whether the path is a file, or a folder whose config.json names a Hugging Face model."""
    if Path(path).is_file():
        return True
    config = Path(path) / "config.json"
    value = strict_json.read(config) if config.is_file() else None
    return isinstance(value, dict) and "model_type" in value


def read_config(folder):
    """config.json of a folder as a dict. Raises ValueError when it is missing or no JSON object."""
    return strict_json.read_object(Path(folder) / "config.json")


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
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    return read_script(path) if is_script(path) else read_pickle(path)


def read_shards(index):
    """All tensors of the shards that an index file names, and each where it says it is."""
    where = strict_json.read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(s, str) for s in where.values()):
        raise ValueError(f"{index}: no weight_map from names to files")
    out = {}
    for shard in sorted(set(where.values())):
        if not is_plain(shard):
            raise ValueError(f"{index}: {printable(shard)} is no plain file name, refused "
                             "(shards lie in the folder of their index)")
        reader = safetensors.read if shard.endswith(".safetensors") else read_pickle
        found = reader(index.parent / shard)
        wrong = [name for name in found if where.get(name) != shard]
        if wrong:
            place = f"in {where[wrong[0]]!r}" if wrong[0] in where else "nowhere"
            raise ValueError(f"{index}: {shard} holds {printable(wrong[0])}, which the index puts "
                             + place)
        out |= found
    absent = [name for name in where if name not in out]
    if absent:
        raise ValueError(f"{index}: {printable(absent[0])} is not in {where[absent[0]]}")
    return out


def is_plain(name):
    """Whether it is the name of a file and no path: no separator, no drive, not "..", printable."""
    return name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")


def read_pickle(path):
    """The tensors that torch.save wrote, plain or under "state_dict" -> {name: tensor}.

    Only tensors and numbers are unpickled. A "module." before every name is dropped.
    """
    state = checkpoint.unpickle(path, "file of tensors", mmap=zipfile.is_zipfile(path))
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return tensors(state, path)


def is_script(path):
    """Whether the file is a TorchScript archive; a pickle of tensors has no constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_script(path):
    """The tensors of a TorchScript archive -> {name: tensor}. Its forward is never called."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")               # torch would rather have its successor
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
            raise ValueError(f"{path}: {printable(name)} is a {type(value).__name__}, not a tensor")
        # A stride of 0 makes a tensor of any size from one number.
        if (value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized
                or value.numel() * value.element_size() > value.untyped_storage().nbytes()):
            raise ValueError(f"{path}: {printable(name)} is not a plain tensor with all its numbers")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value.detach() for name, value in state.items()}


IN_A_FOLDER = {"model.safetensors": safetensors.read, "model.safetensors.index.json": read_shards,
               "pytorch_model.bin": read_pickle, "pytorch_model.bin.index.json": read_shards}
