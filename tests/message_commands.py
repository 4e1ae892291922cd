"""
Finds the commands in messages, so that tests can run them as a user would: by copying them into a shell. A message puts
a command on its own line or after a colon, and the command ends the line.
"""

import os
import re
import subprocess

TOOLS = r'(?:python[\d.]*|pip|uv|torchrun|iconv|tr|gzip|bzip2|xz|zstd|mv|cp|rm|git|hf)'
COMMAND = re.compile(rf"(?:^|: )\s*((?:'[^']*/{TOOLS}'|\"[^\"]*/{TOOLS}\"|(?:[^\s'\"]*/)?{TOOLS})\s+\S.*)$")


def commands_in(message) -> list[str]:
    """Returns the commands in a message (a str or an exception), in order."""
    return [match[1] for line in str(message).splitlines() if (match := COMMAND.search(line))]


def run_command(command: str, cwd=None, **env) -> subprocess.CompletedProcess:
    """Runs a command in bash as it was printed; raises AssertionError with its output if it fails."""
    run = subprocess.run(
        ['bash', '-c', command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, errors='replace'
    )
    assert run.returncode == 0, f'{command}\n{run.stdout}\n{run.stderr}'
    return run
