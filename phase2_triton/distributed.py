"""
Collectives for the ranks (processes) of one run: join, average, compare, gather and leave.

Every rank must call each of these functions. All of them also work in a single process.
"""

import atexit
import os
import re
import socket
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

import torchrun_env
from end_of_run import end_run
from errors import UserError, first_line

MAY_DIFFER = re.compile('out_dir|dataset|model_dir|device|compile|cuda_graph|peak_tflops|json_log|tracker|wandb_.*')


def check_environment():
    """Raises UserError if the variables of torchrun are incomplete, malformed or contradict each other."""
    names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
    environment = {name: os.environ.get(name, '') for name in names}
    rank, world_size = torchrun_env.number('RANK', 0), torchrun_env.number('WORLD_SIZE', 1)
    numbers = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'] + ['MASTER_PORT'] * (world_size > 1)
    needed = names[:4] if world_size > 1 else ()
    local_rank, local_world_size = environment['LOCAL_RANK'], environment['LOCAL_WORLD_SIZE']
    if (
        any(environment[name] and not environment[name].isdecimal() for name in numbers)
        or not all(environment[name] for name in needed)
        or rank >= world_size
        or (world_size > 1 and not 0 < int(environment['MASTER_PORT']) < 2**16)
        or (local_world_size and not int(local_rank or 0) < int(local_world_size) <= world_size)
        or (local_world_size not in ('', '1') and not local_rank)
    ):
        found = ' '.join(f'{k}={v}' for k, v in environment.items() if v or not k.startswith('LOCAL'))
        raise UserError(
            f'the environment has {found}: start the processes with torchrun, which sets all of these, or unset them'
        )


def join_ranks(backend: str, timeout_s: float) -> tuple[int, int]:
    """
    Joins the process group if torchrun started several processes. Returns (rank, world_size). From then on, a rank that
    waits longer than timeout_s seconds for another raises an error. Raises UserError if torchrun did not set the
    environment, or if this rank cannot connect to the others.
    """
    check_environment()
    rank, world_size = torchrun_env.number('RANK', 0), torchrun_env.number('WORLD_SIZE', 1)
    if world_size > 1:
        timeout = timedelta(seconds=min(timeout_s, 1e9))
        # NCCL for GPU tensors; gloo for CPU tensors, so that they need not wait for the GPU
        backends = 'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend
        store = rendezvous(rank, world_size, timeout)
        try:
            dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as e:
            if 'connectFullMesh' not in str(e):
                raise
            raise UserError(
                f'rank {rank} on {socket.gethostname()} found the other ranks but cannot connect to one '
                f'({first_line(e)}). If that is not its address in the network between the machines, set '
                'GLOO_SOCKET_IFNAME on each machine to the network interface to use'
            ) from None
        dist.distributed_c10d.default_pg_timeout = timeout  # for further groups too, whose default is half an hour
    return rank, world_size


def rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """
    Returns a key-value store through which the ranks find each other. With --max-restarts, torchrun hosts one store for
    all launches of the ranks, and it still holds the addresses of ranks that were killed. Rank 0 therefore names each
    launch, and the name prefixes the launch's keys. (Ranks cannot count launches: torchrun on each machine counts only
    its own.)
    """
    hosted = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'  # torchrun hosts the store; otherwise rank 0 does
    host, port, hosts = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), rank == 0 and not hosted
    if not hosts:
        wait_for_port(host, port, timeout.total_seconds())
    store = dist.TCPStore(host, port, world_size, hosts, timeout, multi_tenant=True)
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f'hello/{rank}', me)
        torchrun_env.launch_id = name = store.get(f'welcome/{me}').decode()
        store.set(f'{name}/joined/{rank}', '')
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout.total_seconds()
    for other in range(1, world_size):
        while not store.check([f'{me}/joined/{other}']):
            # the hello may come from a rank that was killed earlier, so read it again in each round
            store.set(f'welcome/{store.get(f"hello/{other}").decode()}', me)
            if time.monotonic() > deadline:
                raise RuntimeError(f'timed out waiting for rank {other} to start')
            time.sleep(0.01)
    torchrun_env.launch_id = me
    return dist.PrefixStore(me, store)


def wait_for_port(host: str, port: int, timeout_s: float) -> None:
    """
    Returns once a process listens there. Raises UserError after timeout_s. TCPStore would wait too, but prints a stack
    trace for each failed attempt.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=min(timeout_s, 10)).close()
        except (OSError, UnicodeError) as e:  # UnicodeError: no host has such a name
            if time.monotonic() > deadline:
                raise UserError(
                    f'nothing answered at {host}:{port} (MASTER_ADDR and MASTER_PORT) within '
                    f'dist_timeout={timeout_s:g} s ({first_line(e)}): rank 0 is not running, or its machine cannot be '
                    'reached'
                ) from None
        time.sleep(0.1)


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Averages the tensor x over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def sum_over_ranks(counts: dict[str, int], device: str) -> dict[str, int]:
    """
    Returns the sum of each count over all ranks, for counts with the same keys on every rank. They are added on the
    device, where a collective takes less time than on the CPU.
    """
    if not counts or not dist.is_initialized():
        return counts
    sums = torch.tensor(list(counts.values()), device=device)
    dist.all_reduce(sums)
    return dict(zip(counts, sums.tolist()))


def max_over_ranks(number: float) -> float:
    """Returns the largest of all ranks' numbers. It uses the CPU, so it does not wait for the GPU."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def same_on_all_ranks(number: int, name: str) -> int:
    """Returns the number. Raises UserError on every rank if it differs between ranks; the message says `name`."""
    most, least = max_over_ranks(number), -max_over_ranks(-number)
    if most != least:
        raise UserError(
            f'{name} is {least:.0f} on one rank and {most:.0f} on another: do all machines see the same files?'
        )
    return number


def check_same_flags(config: dict) -> None:
    """
    Raises UserError on every rank if the flags in config differ between ranks, as when machines are started with
    different commands. Otherwise the ranks would wait for each other in different places, or train different models.
    Some flags may differ: paths, which can be a machine's own, and what concerns one rank alone.
    """
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {k: v for k, v in config.items() if not MAY_DIFFER.fullmatch(k)})
    for rank, other in enumerate(everyone):
        for key in (everyone[0] | other).keys():
            ours, theirs = everyone[0].get(key), other.get(key)
            if ours != theirs:
                raise UserError(
                    f'{key} is {ours} on rank 0 and {theirs} on rank {rank}, but all ranks need the same flags: start '
                    f'each with the same --{key}'
                )


def gather_from_ranks(x):
    """Returns all ranks' x (any picklable object; tensors on the CPU) as a list on rank 0, None on the others."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(x, everyone)
    return everyone


def leave_ranks(micro_step=None) -> None:
    """
    Ends the run: runs the actions registered with end_of_run.py, then destroys the process group. Call it last: if
    there was a process group, it exits this process with status 0. micro_step: a MicroStep, whose CUDA graphs are
    released first, because NCCL would wait for them (pytorch #115388).
    """
    succeeded = end_run()
    several = dist.is_initialized()
    if several:
        if micro_step:
            micro_step.release()
        dist.destroy_process_group()
    if several or not succeeded:
        # skip the interpreter's teardown: a thread of gloo may still free a tensor there, which aborts the process (1
        # run in 5), and a tracker that does not answer would block its own exit function too
        if succeeded:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
