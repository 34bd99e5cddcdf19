"""Runs on disk: atomic writes, checkpoints of tensors and plain numbers, clear errors."""
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from common.data.safe_read import printable, read_json
from common.data.tokenizer import Tokenizer

NAMES = ("last.pt", "previous.pt")


def write(path, save):
    """Write a file so that a kill at any moment leaves the old one or the new one, never half.

    save(temporary_path) does the writing.
    """
    half = Path(f"{path}.part")
    save(half)
    with open(half, "rb+") as file:      # on the disk before the name points at it
        os.fsync(file.fileno())
    os.replace(half, path)


def write_json(path, value):
    """`write` of a JSON file."""
    write(path, lambda half: half.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def save(folder, state):
    """Make `state` the folder's last.pt; the one before stays as previous.pt.

    At every moment one of the two is a whole checkpoint.
    """
    last, previous = (Path(folder) / name for name in NAMES)
    if zipfile.is_zipfile(last):         # one that was cut off must not replace a whole previous.pt
        spare = Path(f"{previous}.part")
        spare.unlink(missing_ok=True)
        try:
            os.link(last, spare)         # a second name: last.pt never goes missing meanwhile
        except OSError:                  # a disk without links
            shutil.copyfile(last, spare)
        os.replace(spare, previous)
    write(last, lambda half: torch.save(state, half))


def unpickle(path, what, mmap=False):
    """What torch.save wrote to a file, on the CPU. It runs no code from the file.

    Raises ValueError in one line for a missing file, for one that is no `what`, and for one that
    holds anything but tensors and plain values.
    """
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
    raise ValueError(f"{path}: {why}")


def load(path):
    """The dict of one checkpoint file, on the CPU. Raises ValueError as `unpickle`."""
    state = unpickle(path, "checkpoint")
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path}: a file of tensors, but not a checkpoint of this project")
    return state


def newest(folder):
    """The run's last whole checkpoint, or None when it has none yet.

    When last.pt is damaged, a line is printed and previous.pt is loaded. Raises ValueError when
    both are damaged.
    """
    last, previous = (Path(folder) / name for name in NAMES)
    if last.exists():
        try:
            return load(last)
        except ValueError as error:
            if not previous.exists():
                raise
            print(f"{error}; taking {previous.name}")
    return load(previous) if previous.exists() else None


def load_weights(module, weights, where):
    """Copy a state dict into a module: every name and every shape must agree.

    Raises ValueError that lists what is missing, unexpected or of another shape (up to 8 names).
    """
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in weights]
    wrong += [f"unexpected {printable(name)}" for name in weights if name not in own]
    wrong += [f"{name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
              for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        wrong[8:] = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ValueError(f"{where}: weights of another model or config: {'; '.join(wrong)}")
    module.load_state_dict(weights)


def load_part(model, name, weights, where):
    """Copy the weights of another model's module of the same name into `model`.

    The parameters named new.* are the model's own and stay. Raises ValueError as `load_weights`.
    """
    part, head = getattr(model, name), f"{name}."
    own = {key: value for key, value in part.state_dict().items() if key.startswith("new.")}
    load_weights(part, own | {key.removeprefix(head): value for key, value in weights.items()
                              if key.startswith(head)}, where)


def config_of(kind, fields, where):
    """The dataclass `kind` with the fields of a config.json; ValueError for unknown fields."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: a config of another version ({error})") from None


def of_model(described, model, folder):
    """Return the value of a run's config.json. Raises ValueError unless it is a run of `model`."""
    found = described.get("model") if isinstance(described, dict) else None
    if found is None:
        raise ValueError(f"{folder}: its config.json is not that of a run of train.py")
    if found != model:
        raise ValueError(f"{folder}: a run of {printable(found)!r}, not of {model!r}")
    return described


def open_run(folder, model, flag="", command=None):
    """A finished or unfinished run of `model` -> (config dict, Tokenizer, weights).

    flag: the option that named the folder. command: what makes such a run, for the message
    (default: the stage named as the model). Raises ValueError in one line: no such folder, no run
    in it, a run of another model, no checkpoint yet, a damaged one.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        command = command or f"python train.py {model} --out {folder}"
        raise ValueError(f"{flag} {folder}: no run here (no config.json); ".lstrip()
                         + f"{command} makes one")
    described, state = of_model(read_json(folder / "config.json"), model, folder), newest(folder)
    if state is None or "config" not in described:
        what = "checkpoint yet" if state is None else "config"
        raise ValueError(f"{folder}: the run has no {what}")
    return described["config"], Tokenizer.load(folder / "tokenizer.model"), state["model"]
