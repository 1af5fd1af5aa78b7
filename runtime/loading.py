"""A data loader whose worker processes can neither hang nor interrupt the program.

    workers = choose_workers(16, batch_bytes)           # as many as /dev/shm has room for
    for batch in read_ahead(dataset, workers, device, batch_sampler=sampler):
        ...

Workers send batches as packing.py describes. Errors of a worker, including those of its sender
thread, are raised only where the next batch is requested, never during an optimizer step or while a
checkpoint is written.
"""

import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

try:
    import resource
except ImportError:  # Windows, where PyTorch does not share file descriptors or handle SIGCHLD
    resource = None

from runtime.errors import TOO_MANY_FILES, InputError
from runtime.packing import (
    PackedBatch,
    ReusedBlocks,
    is_about_files,
    is_about_shared_memory,
    kept_blocks,
)
from runtime.stopping import Stopped, stop_requested

NICENESS = 10  # of workers, relative to the main process
SHARED_MEMORY = "/dev/shm"
FILES_PER_WORKER, OTHER_FILES = 12, 32  # file descriptors, with a margin
MORE_SHARED_MEMORY = (
    "give the container more (docker run --shm-size=8g), or use fewer loader processes (--workers)"
)


# Worker processes


def choose_workers(wanted: int, batch_bytes: int, prefetch: int = 2) -> int:
    """The default number of loader processes.

    Args:
        wanted: maximum number.
        batch_bytes: size of a batch. Every worker holds up to `prefetch` batches in shared memory,
            for which half of its free space is planned. Blocks that grow with their batches can
            exceed that for a while; if there is no space left, batches go through pipes.
    """
    if not sys.platform.startswith("linux"):
        return wanted
    if not os.access(SHARED_MEMORY, os.W_OK):  # not even a lock can be shared
        return 0
    room = shutil.disk_usage(SHARED_MEMORY).free // 2
    return min(wanted, room // max(1, batch_bytes * prefetch))


def read_ahead(
    dataset: Dataset,
    workers: int,
    device: torch.device,
    stoppable: bool = False,
    batch_sampler=None,
    prefetch: int = 2,
) -> Iterator:
    """Yield the batches of a dataset: lists of items, or single items without a batch_sampler.

    Args:
        workers: loader processes; 0 loads in this process.
        stoppable: raise Stopped at the next batch after SIGINT or SIGTERM.
        prefetch: batches that each worker loads ahead.

    Raises InputError with a remedy if a worker dies or cannot be started. Errors of the dataset are
    raised unchanged.
    """
    if workers:
        check_limits(workers)
    batching = {"batch_size": None} if batch_sampler is None else {"batch_sampler": batch_sampler}
    pinned = device.type == "cuda"
    blocks = ReusedBlocks() if workers and pinned else None  # each worker has a copy of its own
    loader = DataLoader(
        dataset,
        **batching,
        num_workers=workers,
        collate_fn=partial(PackedBatch, shared=workers > 0, blocks=blocks),
        pin_memory=pinned,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch if workers else None,
    )
    death_of_child = getattr(signal, "SIGCHLD", None)
    before, batches = death_of_child and signal.getsignal(death_of_child), None
    try:
        batches = iter(loader)
        # PyTorch's handler would raise the death of a worker anywhere in the program. Without it,
        # the death is detected within five seconds when the next batch is requested.
        if death_of_child:
            signal.signal(death_of_child, before)
        while True:
            if stoppable and stop_requested():
                raise Stopped(stop_requested())
            packed = next(batches, None)
            if packed is None:
                return
            yield packed.unpack()
    except (ConnectionError, EOFError, OSError, RuntimeError, InputError) as error:
        if sentence := describe_loader_error(error, workers):
            raise InputError(sentence) from error
        raise
    finally:
        if batches is not None and workers:
            batches._shutdown_workers()  # otherwise each delays the exit by five seconds
            for worker in batches._workers:
                kept_blocks.pop(worker.pid, None)


def start_worker(_worker: int) -> None:
    """Initialise a worker."""
    # The main process comes first: a GPU waits for it, and workers load batches ahead.
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    # Signals to the process group are handled by the main process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_on_sigterm_of_parent, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = send_feeder_error


def exit_on_sigterm_of_parent() -> None:
    """Exit on SIGTERM from the main process; ignore those of other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def send_feeder_error(queue, error: Exception, item: tuple) -> None:
    """Send an error instead of the batch that could not be sent.

    Called in the sender thread of the worker's queue. By default, Python only prints the error, and
    the main process waits for the batch forever.
    """
    index, _ = item
    exc_info = type(error), error, error.__traceback__
    queue.put((index, ExceptionWrapper(exc_info, where="in a loader process")))


def check_limits(workers: int) -> None:
    """InputError if the system does not allow this many loader processes."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = OTHER_FILES + FILES_PER_WORKER * workers
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"{workers} loader processes need about {needed} open files and the limit "
            f"is {hard}: raise it (ulimit -n {needed}), or use fewer --workers"
        )
    try:
        [multiprocessing.Lock() for _ in range(8 + 4 * workers)]  # more than the queues need
    except OSError as error:
        raise InputError(
            f"loader processes need shared memory ({SHARED_MEMORY}: {error.strerror})"
            ": provide it, or load in the main process (--workers 0)"
        ) from error


# Errors


def describe_loader_error(error: Exception, workers: int) -> str:
    """One sentence with a remedy; empty if the error is not caused by loading itself."""
    if isinstance(error, InputError):  # raised by the dataset, perhaps wrapped with a traceback
        return re.sub(r"^([\w.]+\.)?InputError: ", "", str(error).strip().splitlines()[-1])
    if not workers:
        return ""
    cause = " ".join(str(error).split()) or type(error).__name__
    if is_about_files(error):
        return TOO_MANY_FILES
    if is_about_shared_memory(error):
        return f"shared memory is full ({cause}): {MORE_SHARED_MEMORY}"
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in cause:
        return (
            f"a loader process was killed ({cause}): often memory has run out, try fewer "
            "--workers; the same command continues, training with --resume"
        )
    return ""
