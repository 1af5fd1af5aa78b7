"""Distributed processes of torchrun: start, error handling and agreement.

    rank, world, device = start_processes("auto")
    with errors_of_any_process():        # an InputError in one process is raised in all
        clips = open_clips(args)
    require_agreement({"annotations": digest, ...})

No shared file system is needed. Without torchrun, every function works for a single process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous

from runtime.device import choose_device
from runtime.errors import InputError

CONNECT_TIMEOUT = timedelta(minutes=10)
# Long enough for one process to evaluate while the others wait.
WAIT_TIMEOUT = timedelta(hours=3)


def start_processes(device_name: str) -> tuple[int, int, torch.device]:
    """Join the process group of torchrun; returns (rank, number of processes, device).

    device_name: see `choose_device`. Raises InputError if torchrun's variables are incomplete.
    """
    rank, world = read_rank_and_world()
    device = choose_device(device_name, os.environ.get("LOCAL_RANK") if world > 1 else None)
    if world == 1:
        return rank, world, device
    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=CONNECT_TIMEOUT))
        # With torchrun --max-restarts, the store still contains addresses of dead processes.
        store = distributed.PrefixStore(
            f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        check_world_size(store, rank, world)
        # Gloo for objects, NCCL for gradients.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=WAIT_TIMEOUT
        )
    except distributed.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"process {rank} of {world} cannot join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}"
        ) from error
    return rank, world, device


def read_rank_and_world() -> tuple[int, int]:
    """RANK and WORLD_SIZE of torchrun; (0, 1) without it.

    Raises InputError if variables are missing or contradict each other.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not given:
        return 0, 1
    needed = ["RANK", "WORLD_SIZE"]
    if given.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    advice = "start the program with torchrun, or unset what is left of another job"
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise InputError(
            f"the environment has {' and '.join(given)} but not {' and '.join(missing)}: {advice}"
        )
    for name in needed:
        if name != "MASTER_ADDR" and not os.environ[name].strip().isdecimal():
            raise InputError(
                f"{name} is {os.environ[name]!r} in the environment, which is no number: {advice}"
            )
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world:
        raise InputError(
            f"RANK is {rank} in the environment and WORLD_SIZE {world}: ranks go from "
            f"0 to WORLD_SIZE - 1; {advice}"
        )
    return rank, world


def check_world_size(store: distributed.Store, rank: int, world: int) -> None:
    """InputError if WORLD_SIZE differs between processes."""
    store.set_timeout(CONNECT_TIMEOUT)
    store.set(f"world size {rank}", str(world))
    for other in range(world):
        theirs = int(store.get(f"world size {other}"))
        if theirs != world:
            raise InputError(
                f"WORLD_SIZE is {world} in process {rank} and {theirs} in process "
                f"{other}: start all machines with the same numbers"
            )


def started() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


def stop_processes() -> None:
    """Leave the process group."""
    if started():
        distributed.destroy_process_group()


def gather(thing) -> list:
    """The arguments of all processes, in rank order, in every process."""
    if not started():
        return [thing]
    things = [None] * distributed.get_world_size()
    distributed.all_gather_object(things, thing)
    return things


def gather_to_first(thing) -> list:
    """The arguments of all processes, in rank order, in rank 0; [] in the others."""
    if not started():
        return [thing]
    first = distributed.get_rank() == 0
    things = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(thing, things)
    return things or []


def broadcast(thing):
    """The argument of rank 0, in every process."""
    if not started():
        return thing
    things = [thing]
    distributed.broadcast_object_list(things)
    return things[0]


def largest(number: int) -> int:
    """The maximum of an integer over all processes; cheaper than `gather`."""
    if not started():
        return number
    value = torch.tensor(number)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)


@contextmanager
def errors_of_any_process() -> Iterator[None]:
    """Raise an InputError of one process in all of them, at the end of the block.

    Otherwise the others would wait forever. The block must not communicate, except by `in_turn`.
    """
    problem = None
    try:
        yield
    except InputError as error:
        problem = error
    problems = gather(None if problem is None else str(problem))
    if problem:
        raise problem
    for rank, sentence in enumerate(problems):
        if sentence is not None:
            raise InputError(f"process {rank} cannot go on: {sentence}")


@contextmanager
def in_turn(rank: int, world: int) -> Iterator[None]:
    """Run the block in one process after the other, in rank order."""
    for _ in range(rank):
        gather(None)
    try:
        yield
    finally:
        for _ in range(world - rank):
            gather(None)


def require_agreement(facts: dict[str, object]) -> None:
    """InputError in all processes if any value differs from that of rank 0."""
    everyone = gather(facts)
    for rank, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise InputError(
                    f"the processes disagree about {name}: {first!r} in process 0, "
                    f"{other!r} in process {rank}"
                )
