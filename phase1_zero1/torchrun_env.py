"""
The environment variables by which torchrun, or another launcher, tells a process which rank of the run it is.

An empty variable counts as unset. A malformed one does too, so that every message can still be printed; distributed.py's
check_environment() reports it before the ranks meet.
"""

import os

# Names this start of the ranks; rendezvous() in distributed.py replaces it by a name that all ranks know. error_reporter.py
# reads it, because each start decides anew which rank reports an error.
launch_id = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')


def number(name, default):
    """Returns the environment variable as an int of at least 0, or default if it is unset, empty or malformed."""
    text = os.environ.get(name, '')
    return int(text) if text.isdecimal() else default
