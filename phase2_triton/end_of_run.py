"""
Runs the registered actions at the end of a run, however it ends, in this order:

1. save: finishes the save in the background and records it in the log
2. log: closes the log
3. tracker: finishes the tracker
4. reports the error that ended the run, if there was one

Importing this module installs the excepthook that does so. A kill -9 ends a run without any of this.
"""

import atexit
import sys

ORDER = ('save', 'log', 'tracker')
_actions = []  # (place in ORDER, function)
_report = sys.excepthook


def at_end(name: str, action) -> None:
    """Registers action(error) under a name in ORDER. error: the exception that ended the run, or None. It runs once."""
    _actions.append((ORDER.index(name), action))


def end_run(error: BaseException | None = None) -> bool:
    """Calls every registered action, even if some raise. Returns False if one raised; it has reported that itself."""
    succeeded = True
    while _actions:
        action = min(_actions, key=lambda entry: entry[0])
        _actions.remove(action)
        try:
            action[1](error)
        except BaseException:  # Ctrl-C too: it interrupts this action only
            succeeded = False
    return succeeded


def report_with(function) -> None:
    """Registers function(kind, error, trace), which then reports the error that ends the run instead of Python."""
    global _report
    _report = function


def _excepthook(kind, error, trace):
    end_run(error)
    _report(kind, error, trace)


sys.excepthook = _excepthook
atexit.register(end_run)  # after sys.exit() too
