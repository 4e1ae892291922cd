"""
Changes every field of a real checkpoint, one at a time, and runs a script with each result.

As a program: python checkpoint_changes.py CHECKPOINT CHANGED RESULTS NUMBERS SCRIPT [FLAGS ...] writes each changed
checkpoint to the path CHANGED and runs the script in a forked process, which has imported torch already. NUMBERS: a
JSON list of changes, by their number in changes(). RESULTS gets a JSON list of [what was changed, exit status, stderr].
"""

import copy
import json
import math
import os
import runpy
import signal
import sys
import tempfile

import torch

MISSING = object()


def replacements(value):
    """Yields (name, value to put in the place of value; MISSING: none)."""
    yield 'missing', MISSING
    yield 'None', None
    yield 'a string' if not isinstance(value, str) else 'a number', 'odd' if not isinstance(value, str) else 7
    if isinstance(value, torch.Tensor):
        yield 'another shape', torch.cat([value.reshape(-1), value.reshape(-1)])
        yield 'one more dimension', value[None]
        yield 'no elements', value.reshape(-1)[:0]
        yield 'another dtype', value.to(torch.int32 if value.is_floating_point() else torch.float64)
        yield 'a number', 7
        yield 'negative', (-1 - value.abs() if value.dtype != torch.uint8 else value ^ 255)
        kind = torch.finfo if value.is_floating_point() else torch.iinfo
        yield 'huge', torch.full_like(value, kind(value.dtype).max)
        if value.is_floating_point():
            changed = value.clone()
            changed.reshape(-1)[-1] = math.nan
            yield 'NaN', changed
    elif isinstance(value, dict):
        yield 'empty', {}
        yield 'a list', [value]
        yield 'other keys', {str(k) + '_': v for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        yield 'empty', []
        yield 'a dict', dict(enumerate(value))
        yield 'twice', [*value, *value]
        yield 'of None', [None for _ in value]
    elif isinstance(value, str):
        yield 'empty', ''
        yield 'with a zero byte', 'a\0b'
        yield 'long', 'a' * 100_000
    elif value is not None:
        for number in (-1, 0, 10**18, 1.5, math.nan, math.inf):
            yield str(number), number
        yield 'a tensor', torch.tensor(float(value))
        yield 'a list', [value]


def changes(checkpoint):
    """Returns [(path of keys, name of the change, new value)] for every field at every depth."""
    found = []

    def visit(value, path):
        if path:
            found.extend((path, name, new) for name, new in replacements(value))
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            visit(child, (*path, key))

    visit(checkpoint, ())
    return found


def representatives(found, source):
    """
    Returns the numbers of one change for each kind of field and of change: the members of a list, and of a dict with 8
    or more, are of one kind, unless source, the text of the scripts that read the checkpoint, looks up their name.
    """
    members = {}
    for path, _, _ in found:
        members.setdefault(path[:-1], set()).add(path[-1])
    kinds = {}
    for number, (path, name, _) in enumerate(found):
        kind = [name]
        for i, key in enumerate(path):
            named = isinstance(key, str) and len(members[path[:i]]) < 8
            kind.append(key if named or f"['{key}']" in source or f"get('{key}'" in source else '')
        kinds.setdefault(tuple(kind), []).append(number)
    # another member for each change, so that the members take turns
    return [numbers[i % len(numbers)] for i, numbers in enumerate(kinds.values())]


def changed(checkpoint, path, new):
    """Returns a copy of the checkpoint in which the field at path is new, or missing."""
    result = copy.copy(checkpoint)
    inner = result
    for key in path[:-1]:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return result


def described(path, name):
    return f'{".".join(map(str, path))}: {name}'


def run(script, flags):
    """Runs the script in a forked process. Returns its exit status, negative after a signal, and its stderr."""
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [script, *flags]
            sys.path[0] = os.path.dirname(script)
            try:
                runpy.run_path(script, run_name='__main__')
                sys.stdout.flush()
            except SystemExit as e:
                os._exit(e.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        return status, err.read()


if __name__ == '__main__':
    source, target, results, numbers, script, *flags = sys.argv[1:]
    checkpoint = torch.load(source, weights_only=True)
    found, ended = changes(checkpoint), []
    for number in json.loads(numbers):
        path, name, new = found[number]
        torch.save(changed(checkpoint, path, new), target)
        ended.append([described(path, name), *run(script, flags)])
    with open(results, 'w') as f:
        json.dump(ended, f)
