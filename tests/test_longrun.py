"""benchmarks/bench_longrun.py joins the logs of a run that was stopped and continued."""

import json
import subprocess
import sys

from conftest import NANOGPT, ROOT, TINY

sys.path.append(str(ROOT / 'benchmarks'))
import bench_longrun


def test_the_parts_of_a_run_are_joined(launch, work):
    for name, ends in (('reference', [20]), ('Triton', [7, 20])):
        for end in ends:
            flags = [f'--max_iters={end}', f'--out_dir={bench_longrun.folder_of(work, name)}', '--init_from=auto']
            launch(NANOGPT / 'train.py', *TINY, *flags)
    whole, joined = bench_longrun.collected(work)
    assert (whole['parts'], joined['parts']) == (1, 2)
    for kind in ('iterations', 'evaluations'):
        losses = [[(r['iter'], r.get('loss'), r.get('val_loss')) for r in row['log'][kind]] for row in (whole, joined)]
        assert losses[0] == losses[1], 'a resumed run has the same losses'
    assert [record['iter'] for record in joined['log']['iterations']] == list(range(21))
    table = bench_longrun.longrun({'rows': [whole, joined]})
    assert '| Triton | ' in table and table.count('(+0.0000)') == 1  # of the second row
    out = work / 'longrun_test.json'
    out.write_text(json.dumps({'rows': [whole, joined]}))
    subprocess.run([sys.executable, ROOT / 'benchmarks/bench_longrun.py', '--draw', f'--out={out}'], check=True)
    assert (work / 'longrun_test.png').stat().st_size > 10_000


def test_a_complete_run_is_left_alone(launch, work, capsys):
    launch(NANOGPT / 'train.py', *TINY, '--max_iters=1', f'--out_dir={bench_longrun.folder_of(work, "Triton")}')
    before = sorted(path.name for path in (work / 'Triton').iterdir())
    args = type('Args', (), dict(work=work, data=work / 'data/letters', seconds=0, dry_run=True))
    bench_longrun.train('Triton', args)
    assert 'Triton is complete' in capsys.readouterr().out
    assert sorted(path.name for path in (work / 'Triton').iterdir()) == before
