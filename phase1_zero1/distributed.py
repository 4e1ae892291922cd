"""
What the ranks of one run do together: start, average, gather, agree to stop, and end.

Each function is called on every rank, and each works in a single process as well.
"""

import atexit
import os
import socket
import sys
import time
import uuid
from datetime import timedelta

import errors
import torch
import torch.distributed as dist
from errors import UserError, first_line


def setup(backend, timeout_s):
    """
    Joins the process group if torchrun started several processes. Returns (rank, world_size). From then on a rank that waits
    for another one for timeout_s seconds, because its machine is gone, raises an error. Raises UserError where the environment is not torchrun's.
    """
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    environment = {k: os.environ.get(k, '') for k in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
    if rank >= world_size or (world_size > 1 and not all(environment.values())):
        found = ' '.join(f'{k}={v}' for k, v in environment.items())
        raise UserError(
            f'the environment has {found}: start the processes with torchrun, which sets all of these, or unset them'
        )
    if world_size > 1:
        timeout = timedelta(seconds=min(timeout_s, 1e9))
        # beside NCCL for the GPUs, gloo carries what lives on the CPU, so that it need not wait for the GPU
        backends = 'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend
        store = rendezvous(rank, world_size, timeout)
        try:
            dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as e:
            if 'connectFullMesh' not in str(e):
                raise
            raise UserError(
                f'rank {rank} on {socket.gethostname()} found the other ranks but cannot connect to one ({first_line(e)}). If that is not '
                'its address in the network between the machines, set GLOO_SOCKET_IFNAME, on each machine, to the network interface to use'
            ) from None
        dist.distributed_c10d.default_pg_timeout = timeout  # of further groups too, which would wait for half an hour
    return rank, world_size


def rendezvous(rank, world_size, timeout):
    """
    A key-value store for the ranks to find each other through. torchrun --max-restarts=N hosts one for all starts of the ranks,
    and in it the addresses of those that were killed still stand, which would be called. So rank 0 gives each start a
    name, and its keys are kept under that. (Ranks cannot count the starts: torchrun on each machine counts only its own.)
    """
    hosted = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'  # by torchrun; otherwise by rank 0
    store = dist.TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        world_size,
        rank == 0 and not hosted,
        timeout,
        multi_tenant=True,
    )
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f'hello/{rank}', me)
        errors.start = name = store.get(f'welcome/{me}').decode()
        store.set(f'{name}/joined/{rank}', '')
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout.total_seconds()
    for other in range(1, world_size):
        while not store.check(
            [f'{me}/joined/{other}']
        ):  # this hello may be that of a rank killed earlier, so it is asked for again
            store.set(f'welcome/{store.get(f"hello/{other}").decode()}', me)
            if time.monotonic() > deadline:
                raise RuntimeError(f'timed out waiting for rank {other} to start')
            time.sleep(0.01)
    errors.start = me
    return dist.PrefixStore(me, store)


def mean_over_ranks(x):
    """The mean of the tensor x over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def same_on_all_ranks(number, what):
    """Returns the number, which is `what`. Raises UserError, on every rank, if any has another."""
    if dist.is_initialized():
        extremes = torch.tensor([number, -number], dtype=torch.float64)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        most, least = extremes[0].item(), -extremes[1].item()
        if most != least:
            raise UserError(
                f'{what} is {least:.0f} on one rank and {most:.0f} on another: do all machines see the same files?'
            )
    return number


def gather_from_ranks(x):
    """On rank 0 the list of every rank's x (any picklable object; tensors on the CPU), on the others None."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(x, everyone)
    return everyone


def leave(graph=None):
    """
    Leaves the process group, and ends this process with status 0 if it had joined one: call it last. graph: a MicroStepGraph, which
    lets its recordings go: NCCL waits until nothing holds what it sends, for ever if need be (pytorch #115388).
    """
    if dist.is_initialized():
        if graph:
            graph.release()
        dist.destroy_process_group()
        # A thread of gloo may still be about to drop a tensor. It would need the interpreter for that, and if that is being taken
        # down already, the process is aborted (1 run of 5). So it is not taken down.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
