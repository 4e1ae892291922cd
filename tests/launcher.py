"""
Runs scripts in processes that are forked from one that has imported torch already: a run of train.py then starts in a
fraction of a second, and one with several ranks as well. For its ranks it is what torchrun is: it hosts their key-value
store, sets their environment, and ends the others when one fails.

As a program this file is that parent process; it reads one JSON request per line and answers with one JSON line.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace


class Launcher:
    def __init__(self, **env):
        """env: variables that count when torch and Triton are imported, such as TRITON_INTERPRET='1'; a run can only set others."""
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', **env)
        self.parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __call__(self, script, *args, nproc=1, cwd=None, env=None, timeout=120, kill_after=None, check=True):
        """
        Runs `script args...` on nproc ranks in folder cwd. Returns .returncode (of the first rank to fail, or 0), .stdout
        and .stderr of all ranks. kill_after: seconds until each rank gets SIGKILL. With check a failure raises.
        """
        request = dict(
            script=str(script),
            args=[str(a) for a in args],
            nproc=nproc,
            cwd=str(cwd or os.getcwd()),
            env=env or {},
            timeout=timeout,
        )
        self.parent.stdin.write(json.dumps(request | {'kill_after': kill_after}) + '\n')
        self.parent.stdin.flush()
        result = SimpleNamespace(**json.loads(self.parent.stdout.readline()))
        assert not result.timed_out, f'{script} {args} did not end within {timeout} s\n{result.stdout}\n{result.stderr}'
        if check and result.returncode != 0:
            raise AssertionError(f'{script} {args} ended with {result.returncode}\n{result.stdout}\n{result.stderr}')
        return result

    def close(self):
        self.parent.stdin.close()
        self.parent.wait()


def _run_rank(request, env, out, err):
    """In the forked child: becomes `python script args...`."""
    import atexit
    import runpy

    os.chdir(request['cwd'])
    os.environ.update(request['env'] | env)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdin = open(os.devnull)
    sys.stdout = os.fdopen(1, 'w', buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)
    sys.argv = [request['script'], *request['args']]
    sys.path[0] = os.path.dirname(request['script'])
    code = 0
    try:
        runpy.run_path(request['script'], run_name='__main__')
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _serve():
    import torch
    import torch._dynamo
    import torch.distributed as dist
    import torch.nn.parallel

    torch.set_num_threads(1)
    answers = open(
        1, 'w', closefd=False
    )  # buffered: without, a write that a signal cuts short would not be gone on with
    for line in sys.stdin:
        request = json.loads(line)
        listening = socket.create_server(
            ('127.0.0.1', 0)
        )  # kept open: another process could take a port that is only known to be free
        port = listening.getsockname()[1]
        children = {}
        with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
            for rank in range(request['nproc']):
                env = {}
                if request['nproc'] > 1:
                    env = dict(
                        RANK=rank,
                        LOCAL_RANK=rank,
                        WORLD_SIZE=request['nproc'],
                        LOCAL_WORLD_SIZE=request['nproc'],
                        MASTER_ADDR='127.0.0.1',
                        MASTER_PORT=port,
                        TORCHELASTIC_USE_AGENT_STORE='True',
                        TORCHELASTIC_RESTART_COUNT=0,
                    )
                pid = os.fork()
                if pid == 0:
                    _run_rank(request, {k: str(v) for k, v in env.items()}, out, err)
                children[pid] = rank
            store = None
            if request['nproc'] > 1:
                store = dist.TCPStore(
                    '127.0.0.1', port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
                )
            listening.close()
            started, failed, timed_out = time.time(), 0, False
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid:
                    children.pop(pid)
                    code = os.waitstatus_to_exitcode(status)
                    if code and not failed:
                        failed = code
                        for other in children:
                            os.kill(other, signal.SIGTERM)
                        started = (
                            time.time() - request['timeout'] + min(30, request['timeout'])
                        )  # as torchrun: 30 s to end
                    continue
                elapsed = time.time() - started
                if elapsed > request['timeout'] or (
                    request['kill_after'] is not None and elapsed > request['kill_after']
                ):
                    timed_out = elapsed > request['timeout']
                    for other in children:
                        os.kill(other, signal.SIGKILL)
                time.sleep(0.005)
            del store
            out.seek(0)
            err.seek(0)
            print(
                json.dumps(dict(returncode=failed, stdout=out.read(), stderr=err.read(), timed_out=timed_out)),
                file=answers,
                flush=True,
            )


if __name__ == '__main__':
    _serve()
