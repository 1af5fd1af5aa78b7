"""The processes of torchrun: joining them, and agreeing before anything is computed.

    rank, world, device = start_processes("auto")
    with errors_of_any_process():        # an InputError of one process is raised in all of them
        clips = open_clips(args)
    require_agreement({"annotations": digest, ...})

Rank 0 decides what only one process can decide, and broadcasts it. Nothing here needs a file
system that the machines share. Without torchrun, every function is the trivial one of a single
process.
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

CONNECTING = timedelta(minutes=10)
# Long enough for one process to evaluate while the others wait.
WAITING = timedelta(hours=3)


def start_processes(asked: str) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) of this process; joins the group of torchrun.

    asked: as for `choose_device`. InputError if torchrun's variables are incomplete.
    """
    rank, world = read_rank_and_world()
    device = choose_device(asked, os.environ.get("LOCAL_RANK") if world > 1 else None)
    if world == 1:
        return rank, world, device
    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=CONNECTING))
        # torchrun --max-restarts keeps the store, and in it the addresses of dead processes.
        store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}",
                                        store)
        check_world_size(store, rank, world)
        # Gloo for what processes tell one another, NCCL for gradients.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world,
                                       timeout=WAITING)
    except distributed.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"process {rank} of {world} cannot join the others at "
                         f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, "
                         f"MASTER_PORT): {reason}") from error
    return rank, world, device


def read_rank_and_world() -> tuple[int, int]:
    """RANK and WORLD_SIZE as torchrun sets them, (0, 1) without them.

    InputError if variables are missing or contradict one another.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not given:
        return 0, 1
    needed = ["RANK", "WORLD_SIZE"]
    if given.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    advice = "start the program with torchrun, or unset what is left of another job"
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise InputError(f"the environment has {' and '.join(given)} but not "
                         f"{' and '.join(missing)}: {advice}")
    for name in needed:
        if name != "MASTER_ADDR" and not os.environ[name].strip().isdecimal():
            raise InputError(f"{name} is {os.environ[name]!r} in the environment, which is no "
                             f"number: {advice}")
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world:
        raise InputError(f"RANK is {rank} in the environment and WORLD_SIZE {world}: ranks go from "
                         f"0 to WORLD_SIZE - 1; {advice}")
    return rank, world


def check_world_size(store: distributed.Store, rank: int, world: int) -> None:
    """InputError if another process was started with another WORLD_SIZE."""
    store.set_timeout(CONNECTING)
    store.set(f"world size {rank}", str(world))
    for other in range(world):
        theirs = int(store.get(f"world size {other}"))
        if theirs != world:
            raise InputError(f"WORLD_SIZE is {world} in process {rank} and {theirs} in process "
                             f"{other}: start all machines with the same numbers")


def started() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


def stop_processes() -> None:
    """Leave the group."""
    if started():
        distributed.destroy_process_group()


def gather(thing) -> list:
    """What every process passes, by rank, in every process."""
    if not started():
        return [thing]
    things = [None] * distributed.get_world_size()
    distributed.all_gather_object(things, thing)
    return things


def gather_to_first(thing) -> list:
    """What every process passes, by rank, in rank 0; an empty list in the others."""
    if not started():
        return [thing]
    first = distributed.get_rank() == 0
    things = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(thing, things)
    return things or []


def broadcast(thing):
    """What rank 0 passes, in every process."""
    if not started():
        return thing
    things = [thing]
    distributed.broadcast_object_list(things)
    return things[0]


def largest(number: int) -> int:
    """The largest number that any process passes, in every process; cheaper than `gather`."""
    if not started():
        return number
    value = torch.tensor(number)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)


@contextmanager
def errors_of_any_process() -> Iterator[None]:
    """An InputError in one process is raised in all of them at the end of the block.

    Otherwise the others would wait for it. The block must not communicate, except by `in_turn`.
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
    """The processes run the block one after another, in the order of their ranks."""
    for _ in range(rank):
        gather(None)
    try:
        yield
    finally:
        for _ in range(world - rank):
            gather(None)


def require_agreement(facts: dict[str, object]) -> None:
    """InputError, in all processes, naming what one of them sees otherwise than rank 0."""
    everyone = gather(facts)
    for rank, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise InputError(f"the processes disagree about {name}: {first!r} in process 0, "
                                 f"{other!r} in process {rank}")
