"""
Builds commands for messages and reports. Each command runs as printed, from the folder and with the Python that printed
it.

    python_command('data/text/prepare.py', 'my file.txt')     # python data/text/prepare.py 'my file.txt'
"""

import importlib.util
import os
import shlex
import shutil
import sys


def quote(word: str) -> str:
    """
    Returns word quoted for a shell if necessary: in single quotes, or as $'...' with escapes (bash, zsh) if a character
    cannot be displayed.
    """
    if word.isprintable():
        return shlex.quote(word)
    escaped = (
        char if char.isprintable() and char not in "\\'" else ''.join(f'\\x{byte:02x}' for byte in os.fsencode(char))
        for char in word
    )
    return f"$'{''.join(escaped)}'"


def quote_path(path: str) -> str:
    """Returns path quoted for a shell, as ./-name if a program would read it as a flag."""
    return quote(os.path.join('.', path) if path.startswith('-') else path)


def shortest_path(path: str) -> str:
    """
    Returns path relative to the working directory if it is near, else the absolute path. Keeps links, because the
    python of a virtual environment is a link to another python.
    """
    path, here = os.path.abspath(path), os.getcwd()
    near = os.path.dirname(os.path.dirname(here))
    near = os.path.join(here if near == os.sep else near, '')  # not the whole disk
    return os.path.relpath(path) if path.startswith(near) else path


def python() -> str:
    """Returns the shell word that starts this Python: `python` if the shell finds it under that name, else its path."""
    found = shutil.which('python')
    if not sys.executable or (found and os.path.abspath(found) == os.path.abspath(sys.executable)):
        return 'python'
    return quote(shortest_path(sys.executable))


def python_command(script: str | os.PathLike, *arguments: str | os.PathLike) -> str:
    """Returns the command that runs script with these arguments, which are flags (--name=value) or paths."""
    words = [python(), quote_path(shortest_path(script))]
    for argument in map(str, arguments):
        name, equals, value = argument.partition('=')
        words.append(name + equals + (quote(value) if value else '') if name.startswith('--') else quote_path(argument))
    return ' '.join(words)


def pip_install(*packages: str) -> str:
    """Returns the command that installs packages for this Python: with pip, or with uv if there is no pip."""
    if importlib.util.find_spec('pip') is None and shutil.which('uv'):
        return f'uv pip install --python {quote(shortest_path(sys.executable))} {" ".join(packages)}'
    return f'{python()} -m pip install {" ".join(packages)}'
