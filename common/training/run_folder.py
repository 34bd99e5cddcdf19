"""The folder of a run: whose it is, what it holds, and taking it up again."""
import json
from pathlib import Path

from common.training import checkpoint, distributed
from common.data.safe_read import printable, read_json
from common.data.tokenizer import Tokenizer

FILES = ("config.json", "tokenizer.model", "log.jsonl", "refused.jsonl", *checkpoint.NAMES,
         "result.json", "samples.png", "search.png")
MOST_REFUSED = 1000                      # lines of refused.jsonl


class RunFolder:
    """config.json, tokenizer.model, log.jsonl, checkpoints. Of all processes rank 0 writes."""

    def __init__(self, path):
        self.path = Path(path)

    def claim(self, resume, overwrite):
        """The checkpoint to go on from, or None to begin at step 0.

        Raises ValueError when a run is in the folder and neither resume nor overwrite is set.
        """
        there = any((self.path / name).exists() for name in ("config.json", *checkpoint.NAMES))
        if there and not resume and not overwrite:
            done = (self.path / "result.json").exists()
            raise ValueError(f"{self.path}: holds {'a finished' if done else 'an unfinished'} run; "
                             "--resume goes on with it, --overwrite throws it away")
        return checkpoint.newest(self.path) if resume else None

    def described(self):
        """config.json of the run in the folder; None when there is none."""
        path = self.path / "config.json"
        return read_json(path) if path.exists() else None

    def tokenizer(self):
        """The run's vocabulary."""
        return Tokenizer.load(self.path / "tokenizer.model")

    def agree(self, described, parts):
        """Raise ValueError when the run in the folder differs in a part of config.json."""
        before = read_json(self.path / "config.json")
        for part in parts:
            if before.get(part) != described[part]:
                differs = differing(before.get(part), described[part])
                raise ValueError(f"{self.path}: began with {part} {differs}; "
                                 "repeat its flags, or choose another --out")

    def begin(self, described, tokenizer, step, overwrite):
        """Write what describes the run, and drop log lines of steps that no checkpoint kept."""
        distributed.barrier()               # all have read what is about to be written
        if distributed.rank() > 0:
            return
        if overwrite:                    # what a run wrote, not what else lies in the folder
            for name in (*FILES, *(f"{name}.part" for name in FILES)):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.path / "config.json", described)
        checkpoint.write(self.path / "tokenizer.model",
                         lambda half: half.write_bytes(tokenizer.model))
        keep_lines(self.path / "log.jsonl", step)
        if (self.path / "refused.jsonl").exists():
            keep_lines(self.path / "refused.jsonl", step)

    def log(self, line):
        """Append a dict to log.jsonl."""
        if distributed.rank() == 0:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def refuse(self, step, reasons):
        """Append to refused.jsonl what was passed over up to a step: once each, with an end."""
        path = self.path / "refused.jsonl"
        if distributed.rank() > 0 or not reasons:
            return
        lines = path.read_text().splitlines() if path.exists() else []
        known = {json.loads(line)["reason"] for line in lines if line.endswith("}")}
        new = [reason for reason in dict.fromkeys(printable(r, 500) for r in reasons)
               if reason not in known]
        with open(path, "a") as file:
            for reason in new[:max(0, MOST_REFUSED - len(known))]:
                file.write(json.dumps({"step": step, "reason": reason}) + "\n")

    def save(self, state):
        """Make state the folder's last checkpoint."""
        if distributed.rank() == 0:
            checkpoint.save(self.path, state)


def keep_lines(path, step):
    """Drop the lines of a log that are of later steps, or cut off."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [f"{line}\n" for line in lines
            if line.endswith("}") and json.loads(line)["step"] <= step]
    checkpoint.write(path, lambda half: half.write_text("".join(kept)))


def differing(before, now):
    """What two descriptions disagree on, in words."""
    if not isinstance(before, dict):
        return f"{before}, not {now}"
    return ", ".join(f"{key}={before.get(key)} (now {value})" for key, value in now.items()
                     if before.get(key) != value)
