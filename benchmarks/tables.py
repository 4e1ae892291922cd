"""
Registers the tables and numbers of the documents, and helps to format them.

A benchmark defines each of its tables once, as a function that takes the content of a result file and returns Markdown.
The script prints the table at its end, and report.py puts it into the documents, below a line that says where the
numbers come from:

    @table('zero1_h*')
    def zero1_speed(report): ...                 # <!-- table: zero1_speed --> in a document

A number inside a sentence has a function, too, which takes the words after its name as arguments:

    @number
    def zero1_saved(size): ...                   # <!-- number: zero1_saved 124M -->0.69<!-- end -->

A ratio is the quotient of two medians. In parentheses: the smallest and the largest measurement, over the same median.
Percentages have tenths only if there were several runs.
"""

import json
import os
import re
import statistics
from functools import cache

from common import GIB, RESULTS, ROOT

TABLES, NUMBERS = {}, {}
SHAPES = {'124M': (12, 768), '350M': (24, 1024), '1.5B': (48, 1600)}  # n_layer, n_embd
NAMES = {
    'ddp': 'DDP',
    'zero1': 'ZeRO-1',
    'triton': 'Triton',
    'fsdp': 'FSDP',
    'zero1+triton': 'ZeRO-1 + Triton',
    'fsdp+triton': 'FSDP + Triton',
    'triton+half_residual': 'Triton, half_residual',
    'zero1+triton+half_residual': 'ZeRO-1 + Triton, half_residual',
    'triton+fp8': 'Triton, half_residual, fp8',
    'zero1+triton+fp8': 'ZeRO-1 + Triton, half_residual, fp8',
    'fsdp+triton+fp8': 'FSDP + Triton, fp8',
    'hybrid': 'FSDP, hybrid sharding',
    'fsdp+one_unit': 'FSDP as one unit',
}
NAMES |= {f'{key}+launched': f'{name}, without CUDA graphs' for key, name in NAMES.items()}


def table(*patterns, together=False):
    """
    Registers a function as the table of its name. patterns: match names of result files, without .json. The function is
    called with one report at a time or, if together, once with {name: report}; without patterns, it takes no argument.
    """

    def register(function):
        TABLES[function.__name__] = function, patterns, together
        return function

    return register


def number(function):
    NUMBERS[function.__name__] = function
    return function


@cache
def load(name):
    """Returns a result file's content, or None if there is no such file."""
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def files(*patterns):
    """Returns the sorted names of the result files that match any of the patterns."""
    return sorted({path.stem for pattern in patterns for path in RESULTS.glob(f'{pattern}.json')})


def render(name, document):
    """
    Returns the table with links relative to the document, which is given by its path from the repository's root; '' if
    there is no result file.
    """
    function, patterns, together = TABLES[name]
    reports = {file: load(file) for file in files(*patterns)}
    if not patterns:
        text = function()
    elif together:
        text = function(reports) if reports else ''
    else:
        bodies = {file: function(report) for file, report in reports.items()}
        text = '\n\n'.join(f'{origin(reports[file], file)}:\n\n{body}' for file, body in bodies.items() if body)
    here = (ROOT / document).parent
    return re.sub(r'\]\(root:([^)]*)\)', lambda link: f']({os.path.relpath(ROOT / link[1], here)})', text)


def printed(text):
    """Returns a table for the terminal, with each link replaced by its text."""
    return re.sub(r'\[([^]]*)\]\(root:[^)]*\)', r'\1', text)


def cite(name):
    """Returns a link to the result file, whose address render() makes relative to the document."""
    return f'[{name}.json](root:benchmarks/results/{name}.json)'


def sessions_of(report):
    """Returns a list of the runs that the file holds: for each a dict of device, versions, commit, command and date."""
    return report.get('sessions') or [report.get('facts', report)]


def commit_of(report):
    """Returns 'commit 2970e35', or a text if the code was not committed or the commit not recorded."""
    commits = [session.get('commit') for session in sessions_of(report)]
    if not all(commits):
        return 'no commit recorded'
    changed = [' and changes' in commit for commit in commits]
    if any(changed):
        return 'uncommitted code' if all(changed) else 'partly uncommitted code'
    return f'commit {", ".join(dict.fromkeys(commit[:7] for commit in commits))}'


def machine_of(report):
    """Returns '4 × NVIDIA H200', or 'AMD EPYC'."""
    device = sessions_of(report)[0].get('device', '')
    counts = {row['processes'] for row in report.get('rows', []) if isinstance(row, dict) and 'processes' in row}
    count = report.get('processes') or report.get('gpus') or (max(counts) if counts else 1)
    return f'{count} × {device}' if 'NVIDIA' in device else device


def origin(report, name):
    """Returns a line that names machine, versions, date, commit and command of a result file."""
    session = sessions_of(report)[0]
    versions = session.get('versions', session)
    parts = [machine_of(report), f'torch {versions["torch"]}']
    parts += [f'Triton {versions["triton"]}'] if versions.get('triton') and 'NVIDIA' in machine_of(report) else []
    parts += [(session.get('date') or 'no date')[:10], commit_of(report)]
    command = session.get('command') if len(sessions_of(report)) == 1 else None
    by = f', by `{command}`' if command else ''
    note = f'. {report["note"].rstrip(".")}' if report.get('note') else ''
    return f'{", ".join(parts)} ({cite(name)}{by}){note}'


def short(report):
    """Returns 'H100' for 'NVIDIA H100 80GB HBM3'."""
    return sessions_of(report)[0]['device'].removeprefix('NVIDIA ').split()[0]


def markdown(header, rows):
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in [header, ['---'] * len(header), *rows])


def gib(n, digits=2):
    return f'{n / GIB:,.{digits}f}'


def summary(values):
    """Returns (median, smallest, largest) of a list of numbers or of a dict that spread() in common.py returned."""
    if isinstance(values, dict):
        return values['median'], values.get('min', values.get('p10')), values.get('max', values.get('p90'))
    return statistics.median(values), min(values), max(values)


def with_spread(values, digits=0):
    """Returns '1,494 (1,471 to 1,502)'."""
    median, least, most = summary(values)
    return f'{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})'


def percent(values, base, runs=1):
    """
    Returns '98% (97 to 99)': the quotient of the medians of values and base, with tenths if there were several runs.
    """
    parts, digits = [100 * x / summary(base)[0] for x in summary(values)], int(runs > 1)
    return '{:.{d}f}% ({:.{d}f} to {:.{d}f})'.format(*parts, d=digits)


def times(values, base, digits=2):
    """Returns '1.17 (1.16 to 1.18)', the quotient of the medians of values and base."""
    return '{:.{d}f} ({:.{d}f} to {:.{d}f})'.format(*(x / summary(base)[0] for x in summary(values)), d=digits)


def parameters_of(size):
    """Returns the number of parameters of GPT-2 without biases, with 50304 tokens and 1024 positions."""
    layers, width = SHAPES[size]
    return 50304 * width + 1024 * width + layers * (12 * width**2 + 2 * width) + width
