"""Shows the progress of a long loop on a terminal; prints nothing in pipes, in logs, and for the first seconds."""

import sys
import time

from run_report import duration

SILENT_S, INTERVAL_S = 3.0, 0.5


def show_progress(items, name: str):
    """Yields the items of a sized iterable. After 3 s, shows on a terminal how many are done and the time left."""
    started = shown = time.monotonic()
    terminal, drawn = sys.stdout.isatty(), False
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if terminal and done and now - started > SILENT_S and now - shown > INTERVAL_S:
                left = duration((now - started) / done * (len(items) - done))
                print(f'\r{name}: {done}/{len(items)}, {left} left ', end='', flush=True)
                shown, drawn = now, True
            yield item
    finally:
        if drawn:
            print('\r\033[K', end='', flush=True)  # clears the line
