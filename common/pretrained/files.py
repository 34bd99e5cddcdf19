"""The files in a folder of published weights: configs, and tensors in any of the usual formats."""
import math
import warnings
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from common.data.safe_read import printable, read_json
from common.pretrained import safetensors
from common.training import checkpoint

# Fields of any config.json that change no feature: of training, generation, labels, the file.
HARMLESS = """
    *_penalty *drop* *dtype *ngram_size *token_id *token_index _* architectures
    chunk_size_feed_forward do_sample early_stopping finetuning_task gradient_checkpointing
    id2label init_std initializer_* is_decoder is_encoder_decoder label2id label_smoothing
    logit_scale_init_value max_length max_new_tokens max_sequence_length min_length model_type
    num_beam* num_labels num_return_sequences output_* prefix problem_type return_dict* summary_*
    task_specific_params temperature tie_word_embeddings tokenizer_class top_* torchscript
    transformers_version typical_p use_cache""".split()


def known_sizes(config, sizes, required, read, where):
    """The sizes of a config.json, or of a part, as {our name: whole number}.

    sizes: (ours, theirs, the default); required: {name: the values that ours can have, the default
    first}; read: other names that the caller reads. ValueError for another value and for a field
    that nobody reads, unless it is null, false, 0 or empty.
    """
    for name, allowed in required.items():
        if given(config, name, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {name} is {config[name]!r:.80}, ours "
                             f"{' or '.join(map(str, allowed))}")
    known = [*required, *read, *(theirs for _, theirs, _ in sizes)]
    for name, value in config.items():
        if value and name not in known and not any(fnmatchcase(name, h) for h in HARMLESS):
            raise ValueError(f"{where}: {printable(name)} is {value!r:.80}, which ours does not "
                             "know; supported is a file without it")
    return {ours: whole(config, theirs, default, where) for ours, theirs, default in sizes}


def is_published(path):
    """Whether the path is a file, or a folder whose config.json names a Hugging Face model.

    ValueError for a folder with open_clip's files alone.
    """
    path, config = Path(path), Path(path) / "config.json"
    if (path / "open_clip_config.json").is_file() and not config.is_file():
        found = sorted(path.glob("open_clip_*model*")) or [path / "open_clip_model.safetensors"]
        raise ValueError(f"{path}: open_clip's files alone; pass the file of weights, such as "
                         f"{printable(found[0])}")
    value = read_json(config) if config.is_file() else None
    return path.is_file() or isinstance(value, dict) and "model_type" in value


def open_weights(path, model, read, *messages):
    """Published weights, or a run of `model` -> (config dict, tokenizer, weights).

    read: the reader of published ones, or None; messages: as of `checkpoint.open_run`.
    """
    if read is None or not is_published(path):
        return checkpoint.open_run(path, model, *messages)
    config, weights, tokenizer = read(path)
    return config, tokenizer, weights


def given(config, name, default):
    """The value of a field, its default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def whole(config, name, default, where):
    """A field's whole number from 1 to a million, or ValueError."""
    value = given(config, name, default)
    if type(value) is not int or not 1 <= value <= 1_000_000:
        raise ValueError(f"{where}: {name} is {value!r:.80}, not a whole number to 1,000,000")
    return value


def positive(config, name, default, where):
    """A field's finite number above 0, or ValueError."""
    value = given(config, name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} is {value!r:.80}, not a number above 0")
    return float(value)


def section(config, name, where):
    """A field's JSON object, {} where it is absent or null, or ValueError."""
    value = given(config, name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is {value!r:.80}, not an object")
    return value


def read_weights(path):
    """The tensors of a folder or a file -> {name: tensor} on the CPU, in the file's dtypes.

    A folder: model.safetensors or pytorch_model.bin, whole or in shards with their index. A file:
    .safetensors, a pickle of tensors (no code in it is run), or a TorchScript archive, as OpenAI's.
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
    """The tensors that torch.save wrote, plain or in a training checkpoint -> {name: tensor}."""
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
            return tensors(torch.jit.load(str(path), map_location="cpu").state_dict(), path)
    except Exception:
        raise ValueError(f"{path}: not a TorchScript archive that can be read") from None


def tensors(state, path):
    """A state dict as {name: tensor} without DDP's "module.", or ValueError."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: no tensors in it")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name!r:.80} is a {type(value).__name__}, not a tensor")
    return {name.removeprefix("module."): value.detach() for name, value in state.items()}


IN_A_FOLDER = {"model.safetensors": safetensors.read, "model.safetensors.index.json": read_shards,
               "pytorch_model.bin": read_pickle, "pytorch_model.bin.index.json": read_shards}
