"""One run on several GPUs: Lightning's DDP environment with one process a GPU, and gradients summed by the step itself.

`DistributedDataParallel` hides the all-reduce of a large model behind its backward pass. What is trained here is a few
million parameters: one all-reduce after the backward pass costs less than the hooks, and is captured with the step.
Rank 0 is the process that the user started, and the only one that writes.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import distributed_c10d

from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.processes import end_with_parent

PATIENCE_S = 20.0  # for a rank to end by itself


class SummedGradients(DDPStrategy):
    """Lightning's DDP without its wrapper, for modules that sum their gradients themselves (`sum_over_ranks`)."""

    def configure_ddp(self) -> None:
        pass  # the module stays as it is

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        pass  # only rank 0 saves; every step is a meeting


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sums each tensor over all ranks, in place; one all-reduce for each dtype among them."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = _flatten_dense_tensors(group)
        dist.all_reduce(flat)
        for tensor, total in zip(group, _unflatten_dense_tensors(flat, group)):
            tensor.copy_(total)


def device_of_rank(name: str, count: int, rank: int = 0) -> torch.device:
    """The device of one rank of a run.

    Args:
        name: the run's device, as `resolve_device` takes it; rank 0 takes it, rank i the i-th GPU.
        count: number of ranks. On a CPU any number goes, for tests.

    Raises: UserError unless there are that many GPUs, and where a GPU is named that is not the first of several.
    """
    first = resolve_device(name)
    if first.type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"trainer.devices={count}, but PyTorch sees {torch.cuda.device_count()} GPUs; lower it")
    if first.type == "cuda" and count > 1 and first.index:
        raise UserError(f"trainer.devices={count} takes the first {count} GPUs; leave trainer.device={name} out")
    return torch.device("cuda", rank) if rank and first.type == "cuda" else first


@contextmanager
def other_ranks(count: int, work: Callable[[int], None]) -> Iterator[None]:
    """Makes this process rank 0, and runs `work(rank)` in a process for each other rank meanwhile.

    If one of them dies, this process ends too, because it would wait for ever.

    Args:
        count: number of all ranks; with 1 nothing happens.
        work: must be picklable.
    """
    if count == 1:
        yield
        return
    port = _free_port()
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    others = [context.Process(target=_rank, args=(rank, count, port, work), daemon=True) for rank in range(1, count)]
    for process in others:
        process.start()
    done = threading.Event()
    threading.Thread(target=_watch, args=(others, done), daemon=True).start()
    try:
        with _environment(0, count, port):
            yield
    except BaseException:
        done.set()
        for process in others:
            process.kill()
        _leave(broken=True)
        raise
    _leave()  # before joining the others: NCCL shuts down together with all ranks
    done.set()
    for process in others:
        process.join(PATIENCE_S)
        process.kill()


def _leave(broken: bool = False) -> None:
    """Ends the process group; a broken one is not waited for."""
    if not dist.is_initialized():
        return
    if broken and dist.get_backend() == "nccl" and hasattr(distributed_c10d, "_abort_process_group"):
        distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _rank(rank: int, count: int, port: int, work: Callable[[int], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0's to handle
    end_with_parent()
    with _environment(rank, count, port):
        work(rank)
    _leave()


def _watch(processes: list[BaseProcess], done: threading.Event) -> None:
    running = dict(enumerate(processes, start=1))
    while running:
        wait([process.sentinel for process in running.values()])
        for rank, process in list(running.items()):
            process.join(0.1)
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode and not done.is_set():
                print(f"error: rank {rank} ended with {process.exitcode}", file=sys.stderr, flush=True)
                os._exit(1)


@contextmanager
def _environment(rank: int, count: int, port: int) -> Iterator[None]:
    """The variables by which Lightning and PyTorch find the other ranks."""
    wanted = {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
