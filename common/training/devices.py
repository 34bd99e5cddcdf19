"""The device of a run, its precision and its memory."""
import contextlib
import os
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:                      # Windows
    resource = None


def find_device(name):
    """The torch device of --device. Raises ValueError when this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: use auto, cpu, cuda or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         "devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine has none; use --device cpu")
    return device


def half_precision(precision, device):
    """Whether to train in bf16; auto: on GPUs that have it and on CPUs with bf16 instructions."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if precision == "auto":
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return device.type == "cpu" and fast()
    return precision == "bf16"


def autocast(device, half):
    """A context: bf16 autocast when half, else nothing; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


def peak_memory(device):
    """Peak megabytes of the GPU, else of the process (0 where the system does not count)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    status = Path("/proc/self/status")
    if status.exists():                  # on Linux rusage starts with the parent's peak
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2 ** 10
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def to_device(batch, device):
    """A batch with every tensor on the device; other values as they are."""
    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()}


def default_workers(workers, device):
    """The number of data-loading processes: on a CPU none, for they take cores from training."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, (os.cpu_count() or 2) - 1)
