"""
The verification commands, which show on any machine that the trainers agree. `python benchmarks/report.py --run` runs
them and stores their output.
"""

import os
import subprocess
import sys

from common import RESULTS, ROOT, facts, write_json
from tables import table

FLAGS = '--max_iters=20 --eval_interval=20 --eval_iters=2 --log_interval=20 --always_save_checkpoint=True'
TRY = f'nanoGPT/config/train_python_char.py {FLAGS}'
TRY_2 = 'torchrun --standalone --nproc_per_node=2'
CHECKS = [
    f"{TRY_2} nanoGPT/train.py {TRY} --out_dir=out-ddp | grep -E '^(step|iter) 20'",
    f"{TRY_2} phase1_zero1/train.py {TRY} --out_dir=out-zero1 | grep -E '^(Using|step 20|iter 20)'",
    f"{TRY_2} phase3_fsdp/train.py {TRY} --out_dir=out-fsdp | grep -E '^(each|step 20|iter 20)'",
    f'{TRY_2} phase3_fsdp/train.py {TRY} --out_dir=out-zero1 --init_from=resume --max_iters=40 '
    "| grep -E '^(Resuming|step|iter) '",
    'python -m pytest -q tests/test_layout.py tests/test_zero1.py | tail -n 1',
    'python -m pytest -q tests/test_parity.py tests/test_interchange.py | tail -n 1',
]


@table('checks_cpu')
def checks(report):
    return '```\n' + '\n'.join(f'$ {c["command"]}\n{c["output"]}' for c in report['checks']) + '\n```'


def run_checks():
    """
    Runs the commands and writes their output to results/checks_cpu.json. Ends this process if a command prints nothing.
    """
    results, path = [], f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    env = dict(os.environ, PATH=path, OMP_NUM_THREADS='1')
    for command in CHECKS:
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, env=env)
        output = done.stdout.strip().replace(str(ROOT), '.')
        print(f'$ {command}\n{output}', flush=True)
        if not output:
            sys.exit(done.stderr)
        results.append({'command': command, 'output': output})
    write_json(RESULTS / 'checks_cpu.json', facts(cpu=True) | {'checks': results})
