"""
What is done at the end of a run, however it ends, in this order:

1. save: the save in the background is finished, and recorded in the log
2. log: the log is closed
3. tracker: the tracker is finished
4. the error that ended the run, if one did, is reported

Importing this installs the excepthook that does so. A kill -9 ends a run without any of this.
"""

import atexit
import sys

ORDER = ('save', 'log', 'tracker')
_actions = []  # (place in ORDER, function)
_report = sys.excepthook


def at_end(name, action):
    """Registers action(error), to be called once at the place of `name` in ORDER; error is the exception that ends the run, or None."""
    _actions.append((ORDER.index(name), action))


def end_run(error: BaseException | None = None) -> bool:
    """Calls the registered actions, whatever each of them raises. Returns False if one raised; it has reported that itself."""
    succeeded = True
    while _actions:
        action = min(_actions, key=lambda entry: entry[0])
        _actions.remove(action)
        try:
            action[1](error)
        except BaseException:  # a Ctrl-C too: it ends the waiting, and the next action follows
            succeeded = False
    return succeeded


def report_with(function):
    """Registers function(kind, error, trace), in place of Python's own, to report the error that ends the run."""
    global _report
    _report = function


def _excepthook(kind, error, trace):
    end_run(error)
    _report(kind, error, trace)


sys.excepthook = _excepthook
atexit.register(end_run)  # after sys.exit() too
