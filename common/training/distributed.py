"""One process or many: the calls that differ. With one process each does nothing."""
import os

import torch
import torch.distributed as dist

from common.losses import no_gather


def start(device):
    """Join torchrun's process group, if there is one; returns the device of this process.

    NCCL for CUDA devices, gloo for the CPU. All stages of a list share one group: a group cannot be
    joined again after it was left.
    """
    if "RANK" not in os.environ:
        return torch.device(device)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device(device)


def stop():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient of a row is the sum over the processes."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        """grad (B * world, D) of this process's loss -> (B, D), its rows, of all losses."""
        grad = grad.clone(memory_format=torch.contiguous_format)     # autograd may still read it
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """x (B, D) -> (the rows of all processes (B * world, D), the first row of this process).

    Differentiable: with losses averaged over the processes, as DDP averages gradients, the result
    is exactly the gradient of one process with the whole batch.
    """
    if world_size() == 1:
        return no_gather(x)
    return _Gather.apply(x), rank() * len(x)


def mean(values, device):
    """A dict of numbers, each averaged over the processes."""
    if world_size() == 1:
        return values
    shared = torch.tensor(list(values.values()), device=device, dtype=torch.float64)
    dist.all_reduce(shared)
    return dict(zip(values, (shared / world_size()).tolist()))


def all_gather_objects(items):
    """The lists of all processes joined in the order of their ranks, on every process."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])
