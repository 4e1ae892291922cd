"""
UserError: a mistake of the user's, reported as one message from one rank and exit status 2, without a traceback.

Raise it anywhere, on any rank. Importing this module installs the excepthook that reports it. Under torchrun the first
rank to fail claims the right to speak through torchrun's key-value store, so that a mistake that every rank notices is
said once; torchrun then ends the remaining ranks.
"""

import os
import re
import select
import socket
import sys
import traceback
from contextlib import suppress

from shell import pip_install

OPTIONAL_PACKAGES = ('wandb', 'transformers', 'datasets', 'tqdm', 'pyarrow')


# what gloo, NCCL and the key-value store say where another rank is gone or cannot be reached
LOST = re.compile(
    r'closed by peer|reset by peer|remote process exited|broken pipe|no route to host|unreachable|refused|(?<!launch )time[d-]? ?out',
    re.I,
)

# what CUDA, cuBLAS, PyTorch and NumPy say where memory has run out
MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory|cannot allocate memory|unable to allocate", re.I)


start = os.environ.get(
    'TORCHELASTIC_RESTART_COUNT', '0'
)  # which start of the ranks this is; from rendezvous() on a name that all know it by


class UserError(Exception):
    """What was wrong, where, and what to do about it."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__


def _first_to_fail():
    """True on the first rank that asks torchrun; where there is none to ask on every rank, and where it no longer answers on one of each machine."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1 or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return True
    host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    try:
        from datetime import timedelta
        from torch.distributed import TCPStore

        socket.create_connection(
            (host, port), timeout=5
        ).close()  # TCPStore would try for long, and print every attempt
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f'speaker/{start}', 1) == 1
    except Exception:
        return os.environ.get('LOCAL_RANK') == '0'


def out_of_memory(error):
    """The error, or one that it comes from, that says that memory has run out; else None."""
    while error and not (
        isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and MEMORY.search(str(error)))
    ):
        error = error.__cause__ or error.__context__
    return error


def _too_little_memory(error, trace):
    """What happened where, by the error's own numbers, and what helps."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(trace)
        if os.path.basename(frame.filename) == os.path.basename(sys.argv[0])
    ]
    place = f' in line {lines[-1]} of {sys.argv[0]}' if lines else ''
    reason = next(
        (line for line in str(error).splitlines() if MEMORY.search(line)), "no more of the CPU's"
    )  # Python's own MemoryError is mute
    reason = re.sub(r'^\[.*?\] (err == 0. )?', '', reason).split(' Of the allocated')[0].rstrip('.')
    return (
        f'ran out of memory{place}: {reason}. Training needs less with a smaller batch_size and more gradient_accumulation_steps, '
        'with activation_checkpointing, with the kernels of phase 2 and its loss_rows, and sharded, as in phases 1 and 3'
    )


def _say(text):
    # to sys.__stderr__, because init_process_group puts a hook around ours that holds sys.stderr back until it returns
    with suppress(OSError):  # a full disk
        print(text, file=sys.__stderr__, flush=True)


def _excepthook(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            os._exit(130)  # as at the end of this function
        return
    if issubclass(kind, BrokenPipeError):
        poll = select.poll()
        poll.register(1, 0)
        if poll.poll(0):  # who reads what is printed has gone, as in `train.py --help | head`
            os._exit(141)
    if issubclass(kind, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
        kind, error = (
            UserError,
            UserError(f'this needs the package {error.name}, which is not installed: {pip_install(error.name)}'),
        )
    if issubclass(kind, OSError) and 'huggingface.co' in str(
        error
    ):  # transformers, about a model that it neither has nor can fetch
        kind, error = UserError, UserError(f'the pretrained model could not be fetched: {first_line(error)}')
    rank = os.environ.get('RANK')
    here = f'rank {rank} on {socket.gethostname()}' if rank else 'this process'
    if issubclass(kind, (RuntimeError, MemoryError)) and out_of_memory(error):
        kind, error = UserError, UserError(f'{here} {_too_little_memory(out_of_memory(error), trace)}')
    if issubclass(kind, RuntimeError) and 'CUDA driver error: operation not supported' in str(
        error
    ):  # as others report; see hardware.py
        advice = (
            'if this GPU has no virtual memory, as some vGPUs, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False'
        )
        kind, error = UserError, UserError(f'{first_line(error)}: {advice}')
    speaks = _first_to_fail()
    if issubclass(kind, UserError):
        if speaks:
            _say(f'error: {error}')
    elif (
        speaks
        and int(os.environ.get('WORLD_SIZE', 1)) > 1
        and issubclass(kind, RuntimeError)
        and LOST.search(str(error))
    ):
        reason = re.sub(r'^\[.*?\] ', '', first_line(error))  # without the line of C++
        _say(
            f'error: {here} lost another rank ({reason}): its process has died, or its machine is gone or cannot be '
            'reached. What was saved is whole: start all ranks again with --init_from=auto'
        )
    elif speaks:
        _say(''.join(traceback.format_exception(kind, error, trace)).rstrip())
    else:  # most often the echo of another rank's failure: a collective whose partner is gone
        _say(f'rank {rank} ends too: {kind.__name__}: {first_line(error)}')
    with suppress(OSError, AttributeError):  # a full disk, or no stdout at all
        sys.stdout.flush()
    # skip the interpreter's own teardown: it would wait for collectives and threads that can never finish
    os._exit(2 if issubclass(kind, UserError) else 1)


sys.excepthook = _excepthook
