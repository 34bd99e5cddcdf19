"""Runs on disk: atomic writes, checkpoints of tensors and plain numbers, clear errors."""
import dataclasses
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from common.data.safe_read import printable, read_json
from common.data.tokenizer import Pieces, T5Pieces, Tokenizer
from common.pretrained.bpe import BPE
from common.pretrained.wordpiece import WordPiece

NAMES = ("last.pt", "previous.pt")
TOKENIZERS = (BPE, WordPiece, Pieces, T5Pieces, Tokenizer)


def write(path, save):
    """Write a file by save(temporary_path). A kill leaves the old or the new one, never half.

    Raises ValueError when the disk is full or read-only; no half file is left then, either.
    """
    half = Path(f"{path}.part")
    try:
        save(half)
        with open(half, "rb+") as file:  # on the disk before the name points at it
            os.fsync(file.fileno())
        os.replace(half, path)
    except (OSError, RuntimeError) as error:         # torch's writer has a RuntimeError for it
        half.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise ValueError(f"{path}: cannot be written ({why}); what was saved before is kept") \
            from None


def write_json(path, value):
    """`write` of a JSON file."""
    write(path, lambda half: half.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def save(folder, state):
    """Make `state` last.pt, and what it was previous.pt. One of the two is always whole."""
    last, previous = (Path(folder) / name for name in NAMES)
    if zipfile.is_zipfile(last):         # one that was cut off must not replace a whole previous.pt
        os.replace(last, previous)
    write(last, lambda half: torch.save(state, half))


def unpickle(path, what, mmap=False):
    """What torch.save wrote to a file, on the CPU. Code in it is not run: ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        why = "no such file"
    except Exception as error:           # a hostile file can make the unpickler raise anything
        why = f"not a {what}, or cut off"
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            why = "holds more than tensors and numbers, refused (it could run code)"
    raise ValueError(f"{printable(path)}: {why}")


def load(path):
    """The dict of one checkpoint file, on the CPU. Raises ValueError as `unpickle`."""
    state = unpickle(path, "checkpoint")
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path}: a file of tensors, but not a checkpoint of this project")
    return state


def newest(folder):
    """The run's last whole checkpoint, or None. Raises ValueError when all are damaged."""
    last, previous = (Path(folder) / name for name in NAMES)
    if not previous.exists():
        return load(last) if last.exists() else None
    try:
        return load(last)
    except ValueError as error:
        print(f"{error}; taking {previous.name}")
        return load(previous)


def load_weights(module, weights, where):
    """Copy a state dict into a module: every name and every shape must agree.

    A module on device meta gets memory after that, so a config of absurd sizes takes none.
    Raises ValueError that lists four names each that are missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    if not all(isinstance(w, torch.Tensor) and w.layout is torch.strided and not w.is_meta
               for w in weights.values()):
        raise ValueError(f"{where}: weights that are no plain tensors")
    wrong = ([f"missing {name}" for name in own if name not in weights],
             [f"unexpected {printable(name)}" for name in weights if name not in own],
             [f"{name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
              for name in own if name in weights and weights[name].shape != own[name].shape])
    if any(wrong):
        listed = [part for parts in wrong
                  for part in parts[:4] + [f"and {len(parts) - 4} more"] * (len(parts) > 4)]
        raise ValueError(f"{where}: weights of another model or config: {'; '.join(listed)}")
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device="cpu")
    module.load_state_dict(weights)


def load_part(model, name, weights, where):
    """`load_weights` of a run's module into that of `model`, whose own new.* stay.

    name: "lm", or "vision.vit" for the run's "vision". Layers that `model` leaves out are dropped.
    """
    part, head = model.get_submodule(name), f"{name.partition('.')[0]}."
    own = part.state_dict()
    new = {key: value for key, value in own.items() if key.startswith("new.")}
    given = {key.removeprefix(head): value for key, value in weights.items()
             if key.startswith(head)}
    load_weights(part, new | {key: value for key, value in given.items() if key in own}, where)


JSON_TYPES = {int: (int,), float: (float, int), bool: (bool,), str: (str,),
              tuple[int, ...]: (list, tuple)}


def config_of(kind, fields, where):
    """The dataclass `kind` with the fields of a config.json, which may be edited by hand.

    Raises ValueError that names the file for an unknown field, or a value of another type or size.
    """
    try:
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        for name, value in fields.items():
            if type(value) not in JSON_TYPES.get(types.get(name), [type(value)]):
                raise TypeError(f"{name} is {value!r:.80}, not {types[name].__name__}")
        return kind(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        if Path(where, "config.json").exists():
            where = Path(where, "config.json")
        raise ValueError(f"{where}: a config of another version, or a typing mistake ({error})") \
            from None


def of_model(described, model, folder):
    """Return the value of a run's config.json. Raises ValueError unless it is a run of `model`."""
    found = described.get("model") if isinstance(described, dict) else None
    if found != model:
        found = printable(found or "another program")
        raise ValueError(f"{folder}: a run of {found!r}, not of {model!r}")
    return described


def open_tokenizer(folder):
    """The tokenizer of a run: its kind is that of the file that is there."""
    kind = next((k for k in TOKENIZERS if (Path(folder) / k.file).exists()), Tokenizer)
    if issubclass(kind, Tokenizer):
        return kind.load(Path(folder) / kind.file)
    return BPE.load(folder) if kind is BPE else WordPiece.load(folder, added=())


def open_run(folder, model, flag="", command=None):
    """A finished or unfinished run of `model` -> (config dict, tokenizer, weights).

    flag: the option that named the folder; command: what makes such a run; both for messages.
    Raises ValueError: no run in the folder, one of another model, without a whole checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        command = command or f"python train.py {model} --out {folder}"
        raise ValueError(f"{flag} {folder}: no run here (no config.json); ".lstrip()
                         + f"{command} makes one")
    described, state = of_model(read_json(folder / "config.json"), model, folder), newest(folder)
    if state is None:
        raise ValueError(f"{folder}: the run has no checkpoint yet")
    return described.get("config", {}), open_tokenizer(folder), state["model"]
