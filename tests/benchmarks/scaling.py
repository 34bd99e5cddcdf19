"""The cost of a CLIP step as batch, processes and image size grow.

    python tests/benchmarks/scaling.py

Short runs of train.py, one after another, two points of each; a step's time is the mean of the last
20 steps, peak memory is that of process 0. Two processes get half of the batch and of the machine's
threads each.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM = 30, 10
RUNS = {                                 # a row of the table: processes, flags
    "batch 256, 32 pixels, 1 process": (1, ["--batch_size=256"]),
    "batch 1024": (1, ["--batch_size=1024"]),
    "batch 1024 in 4 micro-batches": (1, ["--batch_size=1024", "--accumulate=4"]),
    "64 pixels": (1, ["--batch_size=256", "--set=image_size=64"]),
    "2 processes": (2, ["--batch_size=256"]),
}


def measure(processes, flags, folder):
    """Run train.py -> (seconds a step, peak megabytes)."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"] \
        if processes > 1 else [sys.executable]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    done = subprocess.run([*launch, str(ROOT / "train.py"), "clip", f"--steps={STEPS}",
                           f"--out={folder}", *flags],
                          env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["step"] == WARM)
    result = json.loads((Path(folder) / "result.json").read_text())
    return (lines[-1]["seconds"] - first["seconds"]) / (STEPS - WARM), result["peak_memory_mb"]


def main():
    """Print the table."""
    print(f"{'':34s}{'s a step':>10s}{'pairs/s':>10s}{'peak MB':>10s}")
    for name, (processes, flags) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, memory = measure(processes, flags, f"{folder}/run")
        batch = int(flags[0].rpartition("=")[2])
        print(f"{name:34s}{seconds:10.3f}{batch / seconds:10.0f}{memory:10.0f}", flush=True)


if __name__ == "__main__":
    main()
