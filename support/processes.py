"""Several processes that train together, as torchrun starts them."""
import os
import sys
from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor

from support.errors import InputError, device_named


def join_processes(args: Namespace) -> None:
    """Under torchrun, become one of its processes, on a device of its own."""
    if not dist.is_torchelastic_launched():
        return
    if args.device not in (None, "cpu", "cuda"):
        raise InputError("under torchrun --device must be cpu or cuda")
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_named(args.device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.process, args.processes = dist.get_rank(), dist.get_world_size()
    if args.batch % args.processes:
        raise InputError(f"{args.processes} processes cannot share {args.batch} texts evenly")


def average(*tensors: Tensor) -> None:
    """Make each tensor its mean over all processes, in place. Nothing else is exchanged."""
    if dist.is_initialized():
        for mean in tensors:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()


def leave_processes() -> None:
    """End this process when all have done their work: the first measures and writes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # or gloo's threads abort, in one run of 40 on a busy machine
