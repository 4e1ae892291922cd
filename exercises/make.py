"""
Makes the folder of an exercise: a copy of the repository in which the core of one technique is blank. The repository's
tests grade your solution, and the repository itself is a solution.

    python exercises/make.py             # lists the exercises
    python exercises/make.py zero1       # writes out-exercises/zero1, and says what to edit and how to grade it
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    '.*', 'out', 'out-*', 'build', '__pycache__', '*.egg-info', '*.bin', 'downloads', 'input.txt'
)


@dataclass(frozen=True)
class Blank:
    """Lines of a file, from one that starts (after indentation) with `first` to the next that starts with `last`."""

    first: str
    last: str
    task: str  # the comment that replaces them


@dataclass(frozen=True)
class Exercise:
    title: str
    file: str  # to edit
    blanks: tuple[Blank, ...]
    grade: str  # arguments of pytest that grade it


EXERCISES = {
    'zero1': Exercise(
        'ZeRO-1: cut the parameters into even pieces, update your own, gather the others',
        'phase1_zero1/zero1.py',
        (
            Blank(
                'flat = param.detach().view(-1)',
                'return [Piece(',
                'Return the pieces of param in order: world_size equal ones, whose size is a multiple of ALIGN, and\n'
                'one more for the remaining elements. A parameter with fewer than 2 dimensions is one piece. A shard\n'
                "must be a view of the parameter's memory.",
            ),
            Blank(
                'if self.in_place:',
                '_copy(*self.received)',
                'AdamW has updated the pieces of this rank. First all-gather each (whole, own) of self.in_place, in\n'
                'place. Then the rest: _copy() the sent tensors into the buffer, all-gather its rows, and _copy() the\n'
                'received tensors.',
            ),
            Blank(
                'grad = piece.param.grad',
                'piece.shard.grad = None if grad is None',
                "AdamW reads piece.shard.grad. Make it this piece's part of the gradient of piece.param, without a\n"
                'copy, or None if there is no gradient.',
            ),
        ),
        'tests/test_zero1.py',
    ),
    'fsdp': Exercise(
        'FSDP: make the units, cast to the compute dtype, clip by the norm of all shards',
        'phase3_fsdp/sharding.py',
        (
            Blank(
                'rows = -(-p.shape[0]',
                'return full[start',
                'Return the rows of `full` that this rank keeps of p, as torch.chunk would cut them along dimension\n'
                '0. The last dimension of p.device_mesh counts the ranks that share one copy. Some ranks may have\n'
                'fewer rows, or none.',
            ),
            Blank(
                'options = dict(',
                'model.lm_head.register_forward_hook(',
                'Make `options`, the keyword arguments of fully_shard: the mesh; parameters gathered in the dtype\n'
                '`half`, but gradients reduced in float32 (`half` is None for float32); shards on the CPU if\n'
                'cpu_offload. The loss needs the logits in float32: cast the output of model.lm_head.',
            ),
            Blank(
                'for unit in units:',
                'fully_shard(model, **options)',
                'Call fully_shard on each unit, with reshard_after_forward. Then call it on the module that has the\n'
                'embeddings, the last norm and the head: which one is it, and why must these be one unit?',
            ),
            Blank(
                'square = torch.nn.utils.get_total_norm(',
                'torch.nn.utils.clip_grads_with_norm_(',
                'Compute `norm`, a 0-dim tensor: the norm of all gradients, of which this rank has the shards\n'
                '[shard.grad for shard in self.shards]. Scale the shards so that the norm becomes at most max_norm.',
            ),
        ),
        'tests/test_fsdp.py -k "same_losses or weights_at_the_start or loss_is_in_float32"',
    ),
    'gelu': Exercise(
        'Triton: the GELU kernel',
        'phase2_triton/kernels/gelu.py',
        (
            Blank(
                'bell = tl.exp2(',
                'cdf = tl.where(x < 0',
                'Compute `cdf`, the normal distribution function of x, and `bell` = exp(-x**2 / 2), in float32. If\n'
                "EXACT, use tl.math.erf. Otherwise use the formula in this file's docstring, with z = |x| / sqrt(2):\n"
                'a1 to a5 are 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429, and p is 0.3275911.\n'
                'For x < 0, cdf(x) = 1 - cdf(-x).',
            ),
            Blank(
                'at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64',
                'tl.store(y_ptr + at, (x * cdf)',
                'Each program computes BLOCK elements. Compute their offsets as a vector (in int64: size may exceed\n'
                '2**31). Load x as float32, with a mask for offsets of size or more. Multiply it by Phi(x), which is\n'
                'the first result of cdf_and_pdf(). Store the product in the dtype of y.',
            ),
            Blank(
                'tl.store(dx_ptr + at, (dy * (cdf',
                'tl.store(dx_ptr + at, (dy * (cdf',
                'Store dy times the derivative of x * Phi(x). `pdf` is the derivative of `cdf`.',
            ),
        ),
        'tests/kernels/test_gelu.py',
    ),
}


def blanked(text: str, blank: Blank) -> str:
    """Returns the text of a file without the lines of blank. Raises ValueError if they are not found exactly once."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith(blank.first)]
    ends = [i for i in range(starts[0] if starts else 0, len(lines)) if lines[i].lstrip().startswith(blank.last)]
    if len(starts) != 1 or not ends:
        raise ValueError(f'{len(starts)} lines start with {blank.first!r}, {len(ends)} after it with {blank.last!r}')
    indent = lines[starts[0]][: -len(lines[starts[0]].lstrip())]
    task = [f'# {line}' for line in f'EXERCISE: {blank.task}'.splitlines()]
    lines[starts[0] : ends[0] + 1] = [indent + line for line in [*task, "raise NotImplementedError('exercise')"]]
    return '\n'.join(lines) + '\n'


def make(name: str, folder: Path) -> Exercise:
    """Writes the exercise into a new folder. Raises FileExistsError if it exists: it may hold somebody's solution."""
    exercise = EXERCISES[name]
    shutil.copytree(ROOT, folder, symlinks=True, ignore=NOT_COPIED)
    text = (ROOT / exercise.file).read_text()
    for blank in exercise.blanks:
        text = blanked(text, blank)
    (folder / exercise.file).write_text(text)
    return exercise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', choices=EXERCISES, help='the exercise; without it, all are listed')
    name = parser.parse_args().name
    if name is None:
        print('\n'.join(f'{name:10} {exercise.title}' for name, exercise in EXERCISES.items()))
        return
    folder = Path('out-exercises') / name
    try:
        exercise = make(name, folder)
    except FileExistsError:
        parser.error(f'{folder} exists already, perhaps with your solution: delete or rename it first')
    print(f'edit {folder / exercise.file}, at each EXERCISE, then grade it:')
    print(f'  cd {folder} && python -m pytest {exercise.grade}')


if __name__ == '__main__':
    main()
