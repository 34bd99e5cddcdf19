"""The folder of a run: its name, what it holds, and continuing what is in it."""
import errno
import hashlib
import json
from pathlib import Path

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

from common.data.files import FORMATS
from common.data.safe_read import printable, read_json
from common.training import checkpoint, distributed

FILES = ("config.json", *(kind.file for kind in checkpoint.TOKENIZERS), "log.jsonl",
         *checkpoint.NAMES, "result.json", "samples.png", "search.png")
FINE_TUNED = {"lm": "captioner", "itc,itm": "filter"}      # by --losses (BLIP, 3.3)


def default_folder(stage, options, losses=None):
    """RUNS/STAGE; losses, data and preset are added where they are not the default ones."""
    stage = f"{stage}-{FINE_TUNED.get(losses, losses)}" if losses else stage
    data, (kind, _, where) = options.data, options.data.partition(":")
    if kind in FORMATS:      # the name of the file, of shards that of their folder, and their place
        where = Path(where).absolute()
        place = hashlib.sha256(str(where).encode(errors="replace")).hexdigest()[:4]
        data = f"{kind}-{where.parent.name if kind == 'tar' else where.stem}-{place}"
    parts = [stage] + ([data] if data != "shapes" else []) \
        + ([options.preset] if options.preset != "tiny" else [])
    safe = ["".join(c if c.isalnum() or c in ".=@" else "-" for c in part) for part in parts]
    return Path(options.runs) / "-".join(safe)


def missing_run(stage, presets, options, where):
    """The command that makes the run of a stage that was looked for in the folder `where`; that
    there is none, for a preset that the stage does not have."""
    if options.preset not in presets:
        return f"no preset {options.preset} of {stage}"
    flags = [f"--data {options.data}"] if options.data != "shapes" else []
    if options.preset != "tiny":
        flags.append(f"--preset {options.preset}")
    return " ".join(["python train.py", stage, *flags, f"--out {where}"])


class RunFolder:
    """config.json, the tokenizer, log.jsonl and checkpoints; rank 0 alone writes."""

    def __init__(self, path):
        self.path = Path(path)

    def claim(self, resume, overwrite):
        """The checkpoint to continue from, or None to begin at step 0.

        Raises ValueError for a file, and for a run when neither resume nor overwrite is set.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path}: a file; a run needs a folder")
        there = (self.path / "config.json").exists() or self.has_checkpoint()
        if there and not resume and not overwrite:
            done = (self.path / "result.json").exists()
            raise ValueError(f"{self.path}: holds {'a finished' if done else 'an unfinished'} run; "
                             "--resume continues it, --overwrite deletes it")
        return checkpoint.newest(self.path) if resume else None

    def has_checkpoint(self):
        """Whether the run in the folder has come as far as its first checkpoint."""
        return any((self.path / name).exists() for name in checkpoint.NAMES)

    def described(self):
        """config.json of the run in the folder; None when there is none."""
        path = self.path / "config.json"
        return read_json(path) if path.exists() else None

    def check_same(self, described, without=None):
        """Raise ValueError when the run in the folder differs in a part of config.json."""
        before = read_json(self.path / "config.json")
        for part, now in described.items():
            old = before.get(part)
            if part != without and old != now:
                if isinstance(old, dict):
                    old = ", ".join(f"{key}={old.get(key)} (now {now.get(key)})"
                                    for key in old | now if old.get(key) != now.get(key))
                else:
                    old = f"{old}, not {now}"
                raise ValueError(f"{self.path}: began with {part} {printable(old, 1000)}; it goes "
                                 "on as it began, another --out begins another run")

    def begin(self, described, tokenizer, step, overwrite):
        """Write what describes the run; drop lines of the log that no checkpoint has kept.
        Raises ValueError while another process trains in the folder."""
        busy = distributed.rank() == 0 and not self.lock()
        if any(distributed.all_gather_objects([busy])):      # every process has read its files now
            raise ValueError(f"{self.path}: another process trains here; wait until it ends, or "
                             "choose another --out")
        if distributed.rank() > 0:
            return
        if overwrite:                    # a run's own files, nothing else in the folder
            for name in (*FILES, *(f"{name}.part" for name in FILES)):
                (self.path / name).unlink(missing_ok=True)
        checkpoint.write(self.path / tokenizer.file,
                         lambda part: part.write_bytes(tokenizer.model))
        checkpoint.write_json(self.path / "config.json", described)    # last: it makes it a run
        log = self.path / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [f"{line}\n" for line in lines                # a kill may have cut the last line
                if line.endswith("}") and json.loads(line)["step"] <= step]
        checkpoint.write(log, lambda part: part.write_text("".join(kept)))

    def lock(self):
        """Take the folder until this process ends, however it ends -> False: another has it.
        On Linux and macOS; on Windows, and on a disk that knows no locks, nothing is locked."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.locked = open(self.path / ".lock", "w")         # closing it would end the lock
        try:
            if fcntl:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def log(self, line):
        """Append a dict to log.jsonl."""
        if distributed.rank() == 0:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, state):
        """Make state the folder's last checkpoint."""
        if distributed.rank() == 0:
            checkpoint.save(self.path, state)
