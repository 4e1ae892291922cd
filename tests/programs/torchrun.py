"""
`torchrun.py [OPTION ...] TRAIN.PY [FLAG ...]` is torchrun, except for how ranks start: it forks them from its own process, which has
imported torch, instead of starting Python anew. NETWORK_NAMESPACE: the one to run in (see ip-netns(8)), as a machine of its own.
"""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import launcher

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
CLONE_NEWNET = 0x40000000


class Rank:
    """`python -u script args...` in a forked process, with as much of subprocess.Popen as torchrun uses."""

    def __init__(self, command, env, stdout, stderr):
        _, _, script, *args = command
        self.returncode = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # or the child could run torchrun's handlers
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for file, fd in ((stdout, 1), (stderr, 2)):
                if file is not None:
                    os.dup2(file.fileno(), fd)
            os.closerange(3, 1024)  # torchrun's sockets, as subprocess.Popen does
            atexit._clear()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            launcher.become(script, args, os.getcwd(), env, out=1, err=2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f'rank {self.pid}', timeout)
            time.sleep(0.01)
        return self.returncode


if __name__ == '__main__':
    if 'NETWORK_NAMESPACE' in os.environ:
        with open(f'/run/netns/{os.environ["NETWORK_NAMESPACE"]}') as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), 'setns')
    SubprocessHandler._popen = lambda self, command, env: Rank(command, env, self._stdout, self._stderr)
    launcher.import_what_scripts_import()
    torch.distributed.run.main()
