"""
Reports the error that ends a script, from one rank, and exits. end_of_run.py calls it.

A UserError becomes one message and exit status 2, and so do known failures of the machine (out of memory, a missing
compiler, a file that cannot be read or written). A lost rank becomes one message and exit status 1. Any other error is
a bug: one traceback and exit status 1.
Under torchrun the first rank to fail claims the right to report through torchrun's key-value store, so a mistake that
every rank notices is reported once. torchrun then ends the remaining ranks.
"""

import errno
import json
import os
import re
import select
import socket
import sys
import time
import traceback
from contextlib import suppress

import torchrun_env
from end_of_run import report_with
from errors import OUT_OF_MEMORY, UserError, causes, first_line, out_of_memory
from output import print_error
from plan_command import plan_command
from shell import pip_install

NEEDED_PACKAGES = ('torch', 'numpy', 'matplotlib')
OPTIONAL_PACKAGES = (
    'wandb',
    'trackio',
    'tensorboard',
    'transformers',
    'datasets',
    'tqdm',
    'pyarrow',
    'safetensors',
    'tokenizers',
    'huggingface_hub',
)

# messages of gloo, NCCL and the key-value store about a rank that is gone or out of reach
LOST_RANK = re.compile(
    r'closed by peer|reset by peer|remote process exited|broken pipe|no route to host|unreachable|refused'
    r'|(?<!launch )time[d-]? ?out',
    re.I,
)

# messages of Python, torch and the system about a limit on threads, processes or open files
LIMIT = re.compile(r"can't start new thread|Resource temporarily unavailable|Too many open files")

# messages of Python about a model.py without a suitable GPT and GPTConfig
WRONG_MODEL = re.compile(
    r"from 'model' \(|GPTConfig\.__init__\(\)|'GPTConfig' has no attribute '__dataclass_fields__'|^GPTConfig\(\) takes"
)

# messages of torch.compile's backend and of Triton about a missing or broken compiler, or its header Python.h
MISSING_TOOL = re.compile(r'C(\+\+)? compiler|C\+\+ compile error|ptxas|Python\.h')


def report(kind, error, trace):
    """
    Reports an error and ends this process, except after Ctrl-C in a single process, which Python then ends as that
    signal does. Arguments: see sys.excepthook.
    """
    alone = torchrun_env.number('WORLD_SIZE', 1) <= 1
    if issubclass(kind, KeyboardInterrupt):
        if alone:
            frames = traceback.extract_tb(trace)
            print_error('interrupted' + (f' in line {frames[-1].lineno} of {frames[-1].filename}' if frames else ''))
            return
        os._exit(130)  # skip the interpreter's teardown, as below; torchrun reports the interrupt
    if issubclass(kind, BrokenPipeError) and _stdout_has_no_reader():  # as in `train.py --help | head`
        os._exit(141)

    rank = os.environ.get('RANK')
    place = f'rank {rank} on {socket.gethostname()}' if rank else 'this process'
    may_report, message = _claim_report(), _explain(error, trace, place, alone)
    # without the C++ source line and the advice in torch's messages
    line = re.sub(r'^\[.*?\] |\. This is typically caused by.*', '', first_line(error))
    if message:
        if may_report:
            print_error(f'error: {message}')
            _tell_torchrun(message)
    elif may_report and not alone and isinstance(error, RuntimeError) and LOST_RANK.search(str(error)):
        again = '' if os.path.basename(sys.argv[0]) in ('evaluate.py', 'bench.py') else ' with --init_from=auto'
        print_error(
            f'error: {place} lost another rank ({line}): its process has died or was paused, or its machine is gone '
            f'or cannot be reached. All checkpoints are intact: start all ranks again{again}'
        )
    elif may_report:
        print_error(''.join(traceback.format_exception(kind, error, trace)).rstrip())
    else:  # usually because another rank failed in the middle of a collective
        print_error(f'rank {rank} ends too: {kind.__name__}: {line}')
    with suppress(OSError, AttributeError):  # a full disk, or no stdout at all
        sys.stdout.flush()
    # skip the interpreter's teardown, which would wait for collectives and threads that can never finish
    os._exit(2 if message else 1)


def _explain(error, trace, place, alone):
    """Returns the message about a user's mistake or a known failure of the machine, None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in NEEDED_PACKAGES:
        return (
            f'{sys.executable} lacks the package {error.name}. Activate the environment that has it, as with '
            f'". .venv/bin/activate" in the repository, or install it: {pip_install(error.name)}'
        )
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
        return f'this needs the package {error.name}, which is not installed: {pip_install(error.name)}'
    frames = traceback.extract_tb(trace)
    imported = [f for f in frames if f.name == '<module>' and os.path.basename(f.filename) == 'model.py']
    if imported:  # the user's own, through --model_dir
        return f'{imported[-1].filename}, line {imported[-1].lineno}: {type(error).__name__}: {first_line(error)}'
    if WRONG_MODEL.search(str(error)):
        return f"model.py lacks the interface of nanoGPT's: {first_line(error)}"
    if isinstance(error, OSError) and 'huggingface.co' in str(error):  # transformers could not fetch a model
        return f'the pretrained model could not be fetched: {first_line(error)}'
    if isinstance(error, (OSError, RuntimeError)) and LIMIT.search(str(error)):
        return (
            f'{place} has reached a limit of the system ({first_line(error)}): raise it with ulimit -u (threads and '
            'processes) or ulimit -n (open files), or in the settings of the container, or end other programs'
        )
    if isinstance(error, FileNotFoundError) and 'temporary directory' in str(error):  # from tempfile
        return f'{error.strerror}: set TMPDIR to a folder that can be written, on a disk with free space'
    if isinstance(error, OSError) and error.filename:  # a folder without permission, a disk that fails
        return f'{error.filename}: {error.strerror} (in line {frames[-1].lineno} of {frames[-1].filename})'
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f'an output, probably stdout, could not be written: {error.strerror}'
    if isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error):
        return f'{place} {_out_of_memory_message(out_of_memory(error), trace)}'
    if _is_compile_error(error):
        for cause in causes(error):
            lines = [line for line in str(cause).splitlines() if MISSING_TOOL.search(line)]
            if isinstance(cause, OSError) or (lines and not _is_compile_error(cause)):
                # the compiler's own lines, if there are any, with its errors first
                output = [line for line in str(cause).partition('\nOutput:\n')[2].splitlines() if line.strip()]
                output.sort(key=lambda line: 'error' not in line)
                return (
                    f'torch.compile cannot run its compiler ({[*output, *lines, first_line(cause)][0]}): '
                    '--compile=False works without it; '
                    '--compile=True needs a C++ compiler, such as g++, and the headers of Python'
                )
    if isinstance(error, RuntimeError) and 'CUDA driver error: operation not supported' in str(error):
        # seen elsewhere with expandable_segments, which hardware.py sets
        return (
            f'{first_line(error)}: if this GPU has no virtual memory, as is the case for some vGPUs, '
            'set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False'
        )
    return None


def _is_compile_error(error):
    """Returns whether torch.compile raised the error. Compares names, because torch._dynamo is slow to import."""
    return any(base.__name__ == 'BackendCompilerFailed' for base in type(error).__mro__)


def _out_of_memory_message(error, trace):
    """Returns the message: where memory ran out, the error's own numbers, and advice."""
    script = sys.argv[0]
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(trace)
        if os.path.basename(frame.filename) == os.path.basename(script)
    ]
    place = f' in line {lines[-1]} of {script}' if lines else ''
    reasons = [line for line in str(error).splitlines() if OUT_OF_MEMORY.search(line)]
    reason = reasons[0] if reasons else 'no CPU memory is left'  # Python's own MemoryError has no message
    reason = re.sub(r'^\[.*?\] (err == 0. )?', '', reason).split(' Of the allocated')[0].rstrip('.')
    torch, plan = sys.modules.get('torch'), ''
    if torch and torch.cuda.is_available():
        command = plan_command(sys.argv, torchrun_env.number('WORLD_SIZE', 1), torch.cuda.get_device_name())
        plan = f'. To see which of these fit, run: {command}' if command else ''
    advice = {
        'sample.py': 'Sampling needs less with a smaller num_samples or max_new_tokens',
        'evaluate.py': 'Evaluation needs less with a smaller batch_size',
    }.get(
        os.path.basename(script),
        'Training needs less with a smaller batch_size and more gradient_accumulation_steps, with '
        'activation_checkpointing, with the Triton kernels and their loss_rows, and sharded with ZeRO-1 or FSDP',
    )
    return f'ran out of memory{place}: {reason}. {advice}{plan}'


def _claim_report():
    """
    Returns True on the first rank that asks torchrun's store, and on every rank if there is no such store. If torchrun
    no longer answers, returns True on one rank of each machine.
    """
    if torchrun_env.number('WORLD_SIZE', 1) <= 1 or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return True
    try:
        from datetime import timedelta

        from torch.distributed import TCPStore

        host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        # TCPStore by itself would retry for a long time and print every attempt
        socket.create_connection((host, port), timeout=5).close()
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f'speaker/{torchrun_env.launch_id}', 1) == 1
    except Exception:
        return torchrun_env.number('LOCAL_RANK', 0) == 0


def _tell_torchrun(message):
    """Writes the message where torchrun's own report of the failure, which comes last, shows it as the cause."""
    timestamp = int(time.time()) - 1  # earlier than the failures that follow
    with suppress(OSError, KeyError), open(os.environ['TORCHELASTIC_ERROR_FILE'], 'x') as f:
        json.dump({'message': {'message': message, 'extraInfo': {'timestamp': timestamp}}}, f)


def _stdout_has_no_reader():
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


report_with(report)
