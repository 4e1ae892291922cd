"""
Reads the environment variables by which torchrun, or another launcher, tells a process its rank.

An empty variable counts as unset. So does a malformed one, so that every message can still be printed;
check_environment() in distributed.py reports it before the ranks meet.
"""

import os

# Identifies this launch of the ranks. rendezvous() in distributed.py replaces it with a name that all ranks know.
# error_reporter.py reads it, because each launch decides again which rank reports an error.
launch_id = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')


def first_on_machine() -> bool:
    """Returns whether this process does what one process of each machine must do, such as reading a whole file."""
    return number('WORLD_SIZE', 1) <= 1 or number('LOCAL_RANK', 0) == 0  # a single process may inherit a LOCAL_RANK


def number(name: str, default: int) -> int:
    """Returns the environment variable as an int of at least 0, or default if it is unset, empty or malformed."""
    text = os.environ.get(name, '')
    return int(text) if text.isdecimal() else default
