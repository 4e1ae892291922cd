"""
Runs scripts in processes forked from one that has already imported torch, so that a run of train.py, even with several
ranks, starts in a fraction of a second. It does torchrun's work for the ranks: it hosts their key-value store, sets
their environment, and ends the others when one fails. (The real torchrun: programs/torchrun.py.)

As a program this file is that parent process; it reads one JSON request per line and answers with one JSON line.
"""

import gc
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
        """
        env: variables that torch and Triton read on import, such as TRITON_INTERPRET='1'; a single run can only set
        others.
        """
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', **env)
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.parent = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env)
        self.answers = self.socket.makefile()

    def ask(self, fds=(), **request):
        """Sends a request, with open files, to the parent process, and returns its answer."""
        socket.send_fds(self.socket, [json.dumps(request).encode() + b'\n'], fds)
        return json.loads(self.answers.readline())

    def __call__(self, script, *args, nproc=1, cwd=None, env=None, timeout=120, kill_after=None, check=True):
        """
        Runs `script args...` on nproc ranks in folder cwd. Returns .returncode (of the first rank to fail, or 0),
        .stdout and .stderr of all ranks. kill_after: seconds until each rank gets SIGKILL. With check a failure raises.
        """
        result = SimpleNamespace(
            **self.ask(
                kind='run', nproc=nproc, timeout=timeout, kill_after=kill_after, **_script(script, args, cwd, env)
            )
        )
        assert not result.timed_out, f'{script} {args} did not end within {timeout} s\n{result.stdout}\n{result.stderr}'
        if check and result.returncode != 0:
            raise AssertionError(f'{script} {args} ended with {result.returncode}\n{result.stdout}\n{result.stderr}')
        return result

    def start(self, script, *args, cwd=None, env=None, stdout=None):
        """
        Starts `python script args...`, which runs in parallel, and returns its Process. stdout: an open file, also for
        its stderr; None: a pipe for stdout, whose other end is .stdout, and stderr is discarded.
        """
        request = dict(kind='start', **_script(script, args, cwd, env))
        if stdout is not None:
            return Process(self, self.ask([stdout.fileno()] * 2, **request), None)
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, 'w') as stdout, open(os.devnull, 'w') as stderr:
            pid = self.ask([stdout.fileno(), stderr.fileno()], **request)
        return Process(self, pid, os.fdopen(read_end))

    def close(self):
        self.answers.close()
        self.socket.close()
        self.parent.wait()


def _script(script, args, cwd, env):
    return dict(script=str(script), args=[str(a) for a in args], cwd=str(cwd or os.getcwd()), env=env or {})


class Process:
    """A script that Launcher.start has started; the methods are those of subprocess.Popen."""

    def __init__(self, launcher, pid, stdout):
        self.launcher, self.pid, self.stdout, self.returncode = launcher, pid, stdout, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.launcher.ask(kind='poll', pid=self.pid)
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def become(script, args, cwd, env, out, err):
    """
    Makes a forked child run `python script args...` in folder cwd, with the file descriptors out and err as stdout and
    stderr.
    """
    import atexit
    import runpy

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.update(env)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin = open(os.devnull)
    sys.stdout = os.fdopen(1, 'w', buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(os.path.realpath(script))
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def import_what_scripts_import():
    import torch
    import torch._dynamo
    import torch.distributed
    import torch.distributed.checkpoint
    import torch.distributed.fsdp.sharded_grad_scaler
    import torch.distributed.optim
    import torch.nn.parallel

    torch.set_num_threads(1)
    if os.environ.get('TRITON_INTERPRET') == '1':
        from interpreter import look_up_language_once, round_to_fp8

        look_up_language_once()
        round_to_fp8()
    gc.collect()
    gc.freeze()  # a child's garbage collection would write to, and so copy, memory that it shares with the parent


def _run(request, requests):
    """Runs all ranks of a request to their end, and returns the result of Launcher.__call__."""
    import torch.distributed as dist

    nproc, timeout, kill_after = (request.pop(key) for key in ('nproc', 'timeout', 'kill_after'))
    env = request.pop('env')
    # kept open, because another process could take a port that is merely free
    listening = socket.create_server(('127.0.0.1', 0))
    port = listening.getsockname()[1]
    children = set()
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        for rank in range(nproc):
            if nproc > 1:
                env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
                env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                env |= dict(TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT='0')
            pid = os.fork()
            if pid == 0:
                requests.close()
                become(**request, env=env, out=out.fileno(), err=err.fileno())
            children.add(pid)
        store = None
        if nproc > 1:
            store = dist.TCPStore(
                '127.0.0.1', port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        listening.close()
        started, failed, timed_out = time.time(), 0, False
        while children:
            ended = [(pid, status) for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in children) if pid]
            children -= {pid for pid, _ in ended}
            for _, status in ended:
                code = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed = code
                    for other in children:
                        os.kill(other, signal.SIGTERM)
                    started = time.time() - timeout + min(30, timeout)  # like torchrun, allow 30 s to end
            elapsed = time.time() - started
            if elapsed > timeout or (kill_after is not None and elapsed > kill_after):
                timed_out = timed_out or elapsed > timeout
                for other in children:
                    os.kill(other, signal.SIGKILL)
            if not ended:
                time.sleep(0.005)
        del store
        out.seek(0)
        err.seek(0)
        return dict(returncode=failed, stdout=out.read(), stderr=err.read(), timed_out=timed_out)


def _start(request, requests, out, err):
    """Starts a script, and returns its process id."""
    pid = os.fork()
    if pid == 0:
        requests.close()
        become(**request, out=out, err=err)
    return pid


def _poll(pid):
    """Returns the exit code of a started script, or None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _serve(requests):
    import_what_scripts_import()
    sys.dont_write_bytecode = False  # if PYTHONDONTWRITEBYTECODE is set, each child would compile every module again
    running, text, fds = set(), b'', []
    while received := socket.recv_fds(requests, 65536, 2):
        text += received[0]
        fds += received[1]
        if not received[0]:
            break
        if not text.endswith(b'\n'):
            continue
        request = json.loads(text)
        kind = request.pop('kind')
        if kind == 'run':
            answer = _run(request, requests)
        elif kind == 'start':
            answer = _start(request, requests, *fds)
            running.add(answer)
        else:
            answer = _poll(**request)
            if answer is not None:
                running.remove(request['pid'])
        for fd in fds:
            os.close(fd)
        requests.sendall(json.dumps(answer).encode() + b'\n')
        text, fds = b'', []
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == '__main__':
    _serve(socket.socket(fileno=int(sys.argv[1])))
