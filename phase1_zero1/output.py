"""stdout and stderr of a run."""

from contextlib import suppress


class Output:
    """
    stdout or stderr, of which no failure ends a run: what cannot be printed (a full disk, under nohup a closed terminal) is lost. Where nobody reads
    a pipe any more, the run saves and stops: a Ctrl-C ends the `tee` of `| tee` too.
    """

    def __init__(self, stream, stop_signal):
        self.stream, self.stop_signal = stream, stop_signal
        with suppress(
            AttributeError, OSError
        ):  # a stream of a notebook's, or one with something to write to a full disk first
            stream.reconfigure(errors='backslashreplace')  # what the terminal's encoding has no character for

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args):
        try:
            function(*args)
        except BrokenPipeError:
            self.stop_signal.unread = True
        except OSError:
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)
