"""Runs a script that cannot start the thread of a save, as at a limit of processes: `no_threads.py SCRIPT ...`."""

from concurrent.futures import ThreadPoolExecutor

from script import run_script


def submit(*args):
    raise RuntimeError("can't start new thread")


ThreadPoolExecutor.submit = submit
run_script()
