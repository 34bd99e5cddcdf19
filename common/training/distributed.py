"""One process or many: the few calls that differ, each harmless when there is only one."""
import os

import torch
import torch.distributed as dist

from common.losses import no_gather


def start(device):
    """Join the process group that torchrun announces, if it does. Returns this process's device.

    NCCL for CUDA devices, gloo for the CPU. One group serves all stages of a list: a group that was
    left cannot be joined again.
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
    """Go on when every process is here."""
    if dist.is_initialized():
        dist.barrier()


class _Gather(torch.autograd.Function):
    """All processes' rows; the gradient of a row is summed over all who used it."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        """grad (B * world, D), of what this process made of all rows -> (B, D), of its own."""
        grad = grad.clone(memory_format=torch.contiguous_format)     # another may read it still
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """x (B, D) -> (all processes' rows (B * world, D), the row where this process's begin).

    Differentiable: with the losses averaged over the processes, as DDP averages their gradients,
    the result is exactly the gradient of one process with the whole batch.
    """
    if world_size() == 1:
        return no_gather(x)
    return _Gather.apply(x), rank() * len(x)


def any_rank(flag, device):
    """True on every process as soon as it is True on one."""
    if world_size() == 1:
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def mean(values, device):
    """A dict of numbers, each averaged over the processes."""
    if world_size() == 1:
        return values
    shared = torch.tensor(list(values.values()), device=device, dtype=torch.float64)
    dist.all_reduce(shared)
    return dict(zip(values, (shared / world_size()).tolist()))


def all_gather_objects(items):
    """The lists of all processes as one, in their order, on every process."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])
