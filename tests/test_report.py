"""
The documents' tables, numbers and pictures are what the result files say, and the benchmarks train as train.py does.
"""

import json
import shutil
import subprocess
import sys

import pytest

from conftest import PROGRAMS, ROOT, TINY, log_of

sys.path.append(str(ROOT / 'benchmarks'))
import bench_trainers
import report
import tables
from common import write_json


@pytest.fixture
def results(tmp_path, monkeypatch):
    """
    A copy of the result files, which the test may change; it clears the cache after a change of a file that was read.
    """
    shutil.copytree(tables.RESULTS, tmp_path / 'results')
    monkeypatch.setattr(tables, 'RESULTS', tmp_path / 'results')
    tables.load.cache_clear()
    yield tmp_path / 'results'
    tables.load.cache_clear()


def test_documents_are_as_the_result_files_say():
    assert report.stale() == [], 'python benchmarks/report.py'


def test_every_table_and_number_is_in_a_document():
    text = ''.join(path.read_text() for path in report.documents())
    assert [name for name in tables.TABLES if f'<!-- table: {name} -->' not in text] == []
    assert [name for name in tables.NUMBERS if f'<!-- number: {name}' not in text] == []


def test_every_result_file_is_listed_with_what_it_measures(results):
    lines = tables.render('result_files', 'README.md').splitlines()[2:]
    assert len(lines) == len([path for path in results.iterdir() if path.suffix in ('.json', '.txt')])
    assert [line for line in lines if line.split(' | ')[1] == ''] == []


@pytest.mark.parametrize(
    ('commits', 'text'),
    [
        (['1234567890 and changes'], 'uncommitted code'),
        (['1234567890', '2345678901 and changes'], 'partly uncommitted code'),
        ([None], 'no commit recorded'),
        (['1234567890', '1234567890'], 'commit 1234567'),
    ],
)
def test_a_table_says_which_code_was_measured(results, commits, text):
    trainers = json.loads((results / 'trainers_h100x1.json').read_text())
    trainers['sessions'] = [trainers['sessions'][0] | dict(commit=commit) for commit in commits]
    write_json(results / 'trainers_h100x1.json', trainers)
    for name in ('trainers_speed', 'trainers_on_1', 'result_files'):
        lines = [line for line in tables.render(name, 'README.md').splitlines() if 'trainers_h100x1.json' in line]
        assert len(lines) == 1 and text in lines[0]


def test_a_changed_number_is_noticed(results):
    path = results / 'zero1_h200x4.json'
    text = path.read_text()
    assert '1494863.4824710821' in text  # tokens/s of DDP, 124M, 1 micro-step
    path.write_text(text.replace('1494863.4824710821', '1594863.4824710821'))
    assert 'phase1_zero1/IMPLEMENTATION.md' in report.stale()


def test_a_picture_of_other_numbers_is_noticed(results):
    path = results / 'trainers_h200x4_peaks.json'
    trainers = json.loads(path.read_text())
    row = next(
        row for row in trainers['rows'] if (row['trainer'], row['size'], row['micro_steps']) == ('zero1', '1.5B', 5)
    )
    row['memory_bytes']['activations'] += 2**30
    path.write_text(json.dumps(trainers))
    assert 'benchmarks/results/overview.png' in report.stale()


def test_a_table_by_hand_is_noticed():
    text = (ROOT / 'README.md').read_text()
    assert report.rewrite(text, 'README.md') == text
    changed = text.replace('tokens/s', 'tokens a second', 1)
    assert report.rewrite(changed, 'README.md') == text


def test_results_that_are_not_there_promise_nothing(results):
    """Nothing is measured for trainers on GPUs: no table, and no row."""
    for path in results.glob('trainers_*.json'):
        path.unlink()
    assert (
        report.rewrite('<!-- table: trainers_speed --><!-- end -->', 'README.md')
        == '<!-- table: trainers_speed --><!-- end -->'
    )


def test_results_of_bench_trainers_become_tables(results):
    """Two trainers, one of which ran out of memory."""
    row = dict(
        trainer='ddp',
        size='124M',
        processes=4,
        micro_steps=1,
        batch_size=12,
        block_size=1024,
        parameters=124373760,
        rounds=2,
        mfu=0.5,
    )
    row.update(
        tokens_per_sec=dict(median=1e6, min=9e5, max=1.1e6, n=8),
        time_ms=dict(median=49.2, min=45.0, max=54.0, n=8),
        first_step_seconds=[60.0, 9.0],
    )
    parts = dict(parameters=497495040, gradients=497495040, optimizer=994990080)
    row['memory_bytes'] = parts | dict(
        rest=2 * 2**30, peak=10 * 2**30, peak_reserved=11 * 2**30, not_accounted_for=1, activations=8 * 2**30
    )
    row['checkpoint'] = dict(
        bytes=2**30,
        save_seconds=[2.0],
        write_seconds=[1.0],
        ready_seconds_resumed=[3.0],
        first_step_seconds_resumed=[9.0],
    )
    faster = row | dict(trainer='zero1', tokens_per_sec=dict(median=1.25e6, min=1.2e6, max=1.3e6, n=8))
    failed = dict(
        trainer='fsdp',
        size='124M',
        processes=4,
        micro_steps=None,
        batch_size=12,
        block_size=1024,
        error='OutOfMemoryError: of 80 GiB',
    )
    versions = dict(python='3.12', torch='2.11', cuda='13.0', triton='3.6', nccl='2.28')
    session = dict(
        device='NVIDIA H200',
        device_type='cuda',
        driver='580',
        versions=versions,
        commit=None,
        command='x',
        date='2036-01-01 00:00:00 UTC',
    )
    (results / 'trainers_h200x4_peaks.json').unlink()
    write_json(results / 'trainers_h200x4.json', dict(sessions=[session], runs=[], rows=[failed, faster, row]))
    speed = tables.render('trainers_speed', 'README.md')
    assert (
        '| 4 | 124M × 1 | ZeRO-1 | 2 | 1,250,000 (1,200,000 to 1,300,000) | 312,500 | 125.0% (120.0 to 130.0) |'
        in speed
    )
    assert '| 4 | 124M | FSDP | OutOfMemoryError |' in speed
    memory = tables.render('trainers_memory', 'README.md')
    assert '| 4 | 124M × 1 | DDP | 0.46 | 0.46 | 0.93 | 0.00 | 2.00 | 8.00 | 10.00 |' in memory
    assert '| 4 | 124M | ZeRO-1 | 1.00 | 2.0 | 3.0 |' in tables.render('trainers_checkpoint', 'README.md')
    short = tables.render('trainers_on_4', 'README.md')
    assert '| DDP | 1,000,000 | 2.0, 10.0 |' in short and '| ZeRO-1 | 125.0% (120.0 to 130.0) | 2.0, 10.0 |' in short
    write_json(results / 'trainers_h200x4.json', dict(sessions=[session], rows=[row, faster | dict(rounds=1)]))
    tables.load.cache_clear()
    assert '| ZeRO-1 | 125% (120 to 130) | 2.0, 10.0 |' in tables.render('trainers_on_4', 'README.md')  # a single run


def test_memory_and_checkpoints_have_one_row_of_each_trainer(results):
    """One trainer has run with 1 and 5, the other with 5 alone."""
    memory = dict.fromkeys(
        ('parameters', 'gradients', 'optimizer', 'not_accounted_for', 'rest', 'activations', 'peak'), 2**30
    )
    checkpoint = dict(bytes=2**30, save_seconds=[2.0], ready_seconds_resumed=[3.0])
    row = dict(trainer='ddp', size='124M', processes=4, micro_steps=1, memory_bytes=memory, checkpoint=checkpoint)
    rows = [row, row | dict(micro_steps=5), row | dict(trainer='zero1', micro_steps=5)]
    session = dict(
        device='NVIDIA H200',
        device_type='cuda',
        driver='580',
        versions=dict(torch='2.11'),
        date='2026-01-01 00:00:00 UTC',
    )
    for path in results.glob('trainers_*.json'):
        path.unlink()
    write_json(results / 'trainers_h200x4.json', dict(sessions=[session], rows=rows))
    for name in ('trainers_memory', 'trainers_checkpoint'):
        lines = tables.render(name, 'README.md').splitlines()
        assert [line.split(' | ')[2] for line in lines if line.startswith('| 4 |')] == ['DDP', 'ZeRO-1']


def test_a_failure_is_a_row_only_where_nothing_was_measured():
    block = dict(micro_steps=1, tokens_per_sec=[1.0], time_ms=[1.0], mfu=[None], parameters=4)
    run = dict(trainer='ddp', size='tiny', processes=2, batch_size=8, block_size=64, resume=False)
    done = run | dict(parameters=1, first_step_seconds=1.0, ready_seconds=1.0, blocks=[block])
    failed = run | dict(error='OutOfMemoryError')
    rows = bench_trainers.rows_of([done, failed, failed | dict(trainer='fsdp')])
    assert [(row['trainer'], row.get('error')) for row in rows] == [('ddp', None), ('fsdp', 'OutOfMemoryError')]


@pytest.mark.parametrize('change', [dict(device='NVIDIA H200'), dict(flag=['--bias=True']), dict(init='cpu')])
def test_runs_of_another_kind_get_a_file_of_their_own(launch, tmp_path, change):
    session = bench_trainers.facts(cpu=True) | dict(init='gpu', flag=[]) | change
    write_json(tmp_path / 'of_another.json', dict(sessions=[session], runs=[], rows=[]))
    flags = ['--device=cpu', '--plan', f'--onto={tmp_path / "of_another.json"}']
    done = launch(ROOT / 'benchmarks' / 'bench_trainers.py', *flags, check=False)
    assert done.returncode == 1 and not done.stdout
    assert f'has runs with {next(iter(change))} ' in done.stderr


def test_peaks_count_only_where_more_micro_steps_ran_first(launch):
    block = dict(tokens_per_sec=[1.0], time_ms=[1.0], mfu=[None], parameters=4, gradients=4, optimizer=8, rest=16)
    blocks = [block | dict(micro_steps=n, peak=20, peak_reserved=24) for n in (1, 5)]
    run = dict(trainer='ddp', size='tiny', processes=2, batch_size=8, block_size=64, resume=False, parameters=1)
    for order, peaks in ((blocks, [20, None]), (blocks[::-1], [20, 20])):
        rows = bench_trainers.rows_of([run | dict(first_step_seconds=1.0, ready_seconds=1.0, blocks=order)])
        assert [row['memory_bytes'].get('peak') for row in rows] == peaks
    flags = ['--device=cpu', '--plan', '--micro_steps=1,5']
    done = launch(ROOT / 'benchmarks' / 'bench_trainers.py', *flags, check=False)
    assert done.returncode == 2 and 'name larger numbers first' in done.stderr


def test_a_ladder_of_other_work_is_not_in_the_readme_and_says_what_it_is(results):
    ladder = tables.load('phase2_ladder_h100')
    write_json(results / 'phase2_ladder_h200.json', ladder | dict(size='350M', batch_size=4, micro_steps=2))
    tables.load.cache_clear()
    assert 'phase2_ladder_h200' not in tables.render('measured', 'README.md')
    assert '| 350M, 2 micro-steps of 4 × 1024 | ms of an iteration |' in tables.render('phase2_ladder', 'README.md')


def test_a_ratio_is_the_quotient_of_the_two_numbers_next_to_it():
    """The largest difference that rounding both numbers and the ratio can make is below 0.006."""
    lines = tables.render('measured', 'README.md').splitlines()[2:]
    rows = [line.strip('| ').split(' | ') for line in lines if '× ' not in line and '(' in line.split(' | ')[4]]
    assert len(rows) >= 4
    for row in rows:
        ours, reference = (float(cell.replace(',', '')) for cell in row[2:4])
        assert abs(ours / reference - float(row[4].split()[0])) < 0.006


def test_a_part_of_a_ladder_is_enough(results):
    ladder = tables.load('phase2_ladder_h200')
    rows = [row for row in ladder['rows'] if row['name'] in ('reference, compiled', '+ half_residual')]
    write_json(results / 'phase2_ladder_h200.json', ladder | dict(rows=rows))
    (results / 'phase2_ladder_h100.json').unlink()
    tables.load.cache_clear()
    lines = tables.render('measured', 'README.md').splitlines()[2:]
    assert [line.split(' | ')[0] for line in lines] == ['| reference, compiled', '| Triton, 16-bit residual']


def test_curves_and_profiles_become_tables(results):
    versions = dict(torch='2.11', triton='3.6')
    facts = dict(device='NVIDIA H100', versions=versions, command='x', date='2026-01-01 00:00:00 UTC')
    for path in results.glob('phase2_curves_*.json'):
        path.unlink()
    assert tables.render('phase2_curves', 'README.md') == ''
    rows = [dict(kind='reference', seed=0, losses=[2.0, 1.0])]
    write_json(
        results / 'phase2_curves_h100.json', facts | dict(rows=rows, summary=['between seeds: 0.1', 'phase 2: 0.01'])
    )
    tables.load.cache_clear()
    curves = tables.render('phase2_curves', 'README.md')
    assert curves.startswith('1 × NVIDIA H100, torch 2.11') and curves.endswith(
        ':\n\n```\nbetween seeds: 0.1\nTriton: 0.01\n```'
    )
    kernels = [[1500.0, 12.0, 'k' * 70], [90.0, 1.0, 'short']]
    write_json(
        results / 'phase2_profile_h100.json', facts | dict(rows=[dict(name='a', ms=1.6, span_ms=2.0, kernels=kernels)])
    )
    profile = tables.render('phase2_profile', 'README.md')
    assert (
        'a: 1.60 ms of kernels in a micro-step of 2.00 ms' in profile
        and f'| 1.50 | 12.0 | `{"k" * 60}` |' in profile
        and 'short' not in profile
    )


def test_first_line_of_an_error_without_text():
    assert bench_trainers.first_line(ValueError()) == ''


@pytest.mark.full
def test_bench_trainers_measures_what_the_arithmetic_says(tmp_path):
    """
    FSDP's real train.py on 2 processes: 8 of 16 bytes per parameter on each; two numbers of micro-steps, and a resume.
    """
    out = tmp_path / 'trainers.json'
    flags = [
        '--device=cpu',
        '--nproc=2',
        '--rounds=1',
        '--trainers=fsdp',
        '--micro_steps=1,2',
        '--save',
        f'--out={out}',
    ]
    subprocess.run([sys.executable, ROOT / 'benchmarks' / 'bench_trainers.py', *flags], check=True, timeout=300)
    rows = json.loads(out.read_text())['rows']
    assert [row['micro_steps'] for row in rows] == [1, 2]
    for row in rows:
        memory, n = row['memory_bytes'], row['parameters']
        assert memory['parameters'] == memory['gradients'] == 2 * n
        assert 4 * n <= memory['optimizer'] < 4.01 * n  # and a step count for each tensor
        assert row['checkpoint']['bytes'] > 12 * n and len(row['checkpoint']['ready_seconds_resumed']) == 1


@pytest.mark.parametrize(('kind', 'folder'), [('ddp', 'nanoGPT'), ('zero1', 'phase1_zero1'), ('fsdp', 'phase3_fsdp')])
def test_the_step_of_the_benchmarks_is_that_of_train_py(kind, folder, launch, work):
    """Equal to the last bit: the same operations in the same order on the same CPU."""
    flags = [*TINY, '--max_iters=4', '--gradient_accumulation_steps=4', '--learning_rate=6e-4', '--decay_lr=False']
    launch(ROOT / folder / 'train.py', *flags, '--eval_interval=1000', '--eval_iters=1', '--out_dir=out', nproc=2)
    expected = [record['loss'] for record in log_of('out')['iterations']]
    own = [f'--kind={kind}', '--dataset=data/letters', '--steps=5', '--micro_steps=2']
    assert [float(line) for line in launch(PROGRAMS / 'shared_step.py', *own, nproc=2).stdout.split()] == expected


def test_curves_of_two_gpus_become_one_report(launch, tmp_path):
    facts = dict(device='NVIDIA H100', versions={}, size='124M', batch_size=12, micro_steps=1)
    curve = lambda kind, seed, loss: dict(kind=kind, seed=seed, losses=[loss] * 100)
    write_json(
        tmp_path / 'a.json', facts | dict(command='a', rows=[curve('reference', 0, 2.0), curve('reference', 1, 2.5)])
    )
    write_json(tmp_path / 'b.json', facts | dict(command='b', rows=[curve('phase 2', 1, 2.4)]))
    write_json(tmp_path / 'c.json', facts | dict(command='c', rows=[], device='NVIDIA H200'))

    def join(*names):
        files = ','.join(str(tmp_path / f'{name}.json') for name in names)
        flags = ['curves', f'--join={files}', f'--out={tmp_path / "out.json"}']
        return launch(ROOT / 'benchmarks' / 'bench_phase2.py', *flags, check=False)

    done = join('a', 'b')
    assert 'between seeds of the reference: mean 0.5000, largest 0.5000' in done.stdout
    assert 'phase 2 - reference at the same seed: mean -0.1000, mean size 0.1000' in done.stdout
    assert json.loads((tmp_path / 'out.json').read_text())['command'] == 'a & b'
    assert 'the files differ in device' in join('a', 'c').stderr
