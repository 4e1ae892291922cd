"""plan.py agrees with the code it plans for, with the measured rows, and with train.py's messages."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hardware
from configurator import model_options
from conftest import NANOGPT, ROOT
from model import GPT, GPTConfig

sys.path += [str(ROOT), str(ROOT / 'benchmarks')]
from planner import measured, memory, options, plan, presets, report, speed
from planner.gpus import GPUS
from planner.run import Run

import bench_planner
from plan_command import plan_command
from startup import INIT_FROM

ROWS = measured.all_rows()
COMPONENTS = {*memory.COMPONENTS, 'total'}


def run_plan(*args, **more):
    return subprocess.run([sys.executable, ROOT / 'plan.py', *args], capture_output=True, text=True, **more)


def as_json(*args, **more):
    run = run_plan(*args, '--json', **more)
    assert run.returncode in (0, 1), run.stderr
    return json.loads(run.stdout)


def test_needs_no_torch(tmp_path):
    (tmp_path / 'torch.py').write_text("raise ImportError('plan.py imports torch')")
    run = run_plan('config/train_gpt2.py', '--gpu=h100', '--gpus=8', cwd=tmp_path, env={'PYTHONPATH': str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert 'Recommended: ' in run.stdout and 'torchrun --standalone --nproc_per_node=8' in run.stdout


def test_json_has_the_contracts_keys():
    found = as_json('--gpu=h200', '--gpus=4')
    assert (found['gpu'], found['gpus']) == ('h200', 4)
    assert list(found['trainers']) == list(options.NAMES)
    for trainer in found['trainers'].values():
        parts = dict(trainer['memory_bytes'])
        assert parts.keys() == COMPONENTS
        assert abs(parts.pop('total') - sum(parts.values())) < 10  # each is rounded to a byte
        assert trainer['low'] <= trainer['tokens_per_sec'] <= trainer['high']
        assert trainer['basis'] in ('measured', 'interpolated', 'extrapolated')
        assert trainer['fits'] is True


def small_run(**fields):
    return Run(
        GPUS['h100'],
        1,
        **{'n_layer': 3, 'n_head': 2, 'n_embd': 64, 'batch_size': 2, 'block_size': 32, 'micro_steps': 2, **fields},
    )


@pytest.mark.parametrize('bias', [False, True])
def test_parameters_are_the_models(bias):
    run = small_run(bias=bias, vocab_size=320)
    config = dict(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=320, bias=bias)
    with torch.device('meta'):
        model = GPT(GPTConfig(**config))
    assert run.parameters == sum(p.numel() for p in model.parameters())
    flops = run.flops_per_token * 1024 / 0.5 / 1e15  # as a fraction of 1 PFLOP/s, for 1024 tokens in half a second
    assert model.estimate_mfu(32, 0.5, 1e15) == pytest.approx(flops)


def test_state_is_exact():
    """
    Per parameter: 4 bytes of weights, 8 of AdamW, 4 of gradients, and another 4 of DDP's buckets; sharded trainers hold
    shares.
    """
    n = small_run().parameters
    states = {'ddp': (4 * n, 8 * n, 8 * n), 'zero1': (4 * n, 2 * n, 8 * n), 'fsdp': (n, 2 * n, n)}
    for trainer, expected in states.items():
        found = memory.at_loss(small_run().change(gpus=4, trainer=trainer, reshard=True))
        assert (found['parameters'], found['optimizer'], found['gradients']) == expected, trainer


@pytest.mark.parametrize('row', [row for row in ROWS if row.allocated], ids=lambda row: row.source)
def test_tensors_are_those_that_torch_counted(row):
    """Nothing here is fitted. 5.1%: the largest difference is 5.0%, in FSDP's units on two GPUs."""
    assert sum(memory.tensors(row.run).values()) == pytest.approx(row.allocated, rel=0.051)


def test_efficiencies_are_those_of_the_rows():
    """
    planner/efficiencies.json is what --fit writes; 1%: it may stop one step of Gauss-Newton earlier on another machine.
    """
    fitted = bench_planner.fit_all(ROWS)
    saved = json.loads(speed.FITTED.read_text())
    for key, values in fitted.items():
        assert saved[key] == pytest.approx(values, rel=0.01), 'python benchmarks/bench_planner.py --fit'


def test_the_published_error_is_that_of_the_rows():
    saved = json.loads((ROOT / 'benchmarks' / 'results' / 'planner_error.json').read_text())
    assert len(saved['memory']) == len([row for row in ROWS if row.reserved])
    assert len(saved['speed']) == len([row for row in ROWS if row.tokens_per_sec])
    assert saved['memory_summary']['one GPU']['mean'] < 0.03
    assert saved['speed_summary']['CUDA graphs']['p90'] < 0.05
    document = (ROOT / 'docs' / 'planner.md').read_text()
    for name, lines in bench_planner.tables(saved).items():
        assert f'<!-- planner: {name} -->\n\n' + '\n'.join(lines) + '\n' in document, (
            'python benchmarks/bench_planner.py'
        )


def test_a_measured_configuration_gives_the_measurement():
    """Speed is that of the latest file, reserved memory that of the file whose runs began with five micro-steps."""

    def row_of(name):
        rows = measured.read(name)['rows']
        return next(r for r in rows if (r['trainer'], r['size'], r['micro_steps']) == ('ddp', '1.5B', 5))

    shape = ('--n_layer=48', '--n_head=25', '--n_embd=1600', '--batch_size=8', '--gradient_accumulation_steps=20')
    found = as_json(*shape, '--gpu=h200', '--gpus=4')['trainers']
    assert found['ddp']['basis'] == 'measured'
    assert found['ddp']['tokens_per_sec'] == round(row_of('trainers_h200x4.json')['tokens_per_sec']['median'])
    peak = row_of('trainers_h200x4_peaks.json')['memory_bytes']['peak_reserved']
    assert found['ddp']['memory_bytes']['total'] == peak
    assert found['fsdp+checkpointing']['basis'] == 'extrapolated'  # its speed was not measured at this size


def test_beyond_the_measured_is_extrapolated():
    assert as_json('--gpu=h200', '--gpus=8')['trainers']['ddp']['basis'] == 'extrapolated'
    assert as_json('--gpu=h200', '--gpus=4', '--batch_size=16')['trainers']['ddp']['basis'] == 'interpolated'
    assert as_json('--gpu=a100', '--gpus=4')['trainers']['ddp']['basis'] == 'extrapolated'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--gpu=h300'], "gpu is 'h300', but it can be h100, h200"),
        (['--batchsize=3'], '--batchsize=3: there is no flag batchsize; did you mean batch_size?'),
        (['--n_head=7'], 'n_embd=768 cannot be divided among n_head=7 heads'),
        (['--gpus=8', '--fsdp_shard_size=3'], 'fsdp_shard_size=3, but it must divide the 8 processes and be 2 or more'),
        (['--gpus=0'], 'gpus=0, but it must be at least 1'),
        (['--cuda_graph=True', '--fsdp_cpu_offload=True'], 'cuda_graph=True with fsdp_cpu_offload'),
        (['--ckpt_format=sharded'], 'ckpt_format=sharded needs FSDP: several processes under torchrun'),
        (['--ckpt_format=parts'], "ckpt_format is 'parts', but it can be full or sharded"),
        (['--backend=mpi'], "backend is 'mpi', but it can be nccl or gloo"),
        (['--gelu=relu'], "gelu is 'relu', but it can be erf or tanh"),
        (['--tracker=mlflow'], "tracker is 'mlflow', but it can be wandb"),
        (['--data_order=sorted'], "data_order is 'sorted', but it can be random or sequential"),
        (['--trainer=phase1'], "trainer is 'phase1', but it can be ddp"),
        (['--trainer=hybrid', '--gpus=2'], 'trainer=hybrid needs 4 GPUs or more'),
        (['none.py'], 'none.py: no such config file'),
        (['--tokens=inf'], 'tokens=inf, but it must be a number from 0 to 1e+15'),
        (['--price=1e300'], 'price=1e+300, but it must be a number from 0 to 1e+15'),
        (['--gpu_memory=-1'], 'gpu_memory=-1.0, but it must be a number from 0 to 1e+15'),
        (['--vocab_size=0'], 'vocab_size=0, but it must be at least 1'),
        (['--network=1e-320'], 'network=1e-320, but it must be at least 1e-15'),
        (['--loss_rows=-1'], 'loss_rows=-1, but it must be at least 0'),
        (['--init_from=gpt3'], f"init_from is 'gpt3', but it can be auto, {', '.join(INIT_FROM)}\n"),
        (['--use_zero1=True', '--use_fsdp=True'], 'use_zero1=True and use_fsdp=True select two trainers'),
        (
            ['--use_zero1=True', '--fsdp_cpu_offload=True'],
            'use_zero1=True and fsdp_cpu_offload=True select two trainers',
        ),
        (['--use_fsdp=False', '--fsdp_cpu_offload=True'], 'fsdp_cpu_offload=True and use_fsdp=False contradict each'),
        (['--gpus=2', '--trainer=ddp', '--ckpt_format=sharded'], 'ckpt_format=sharded needs FSDP'),
        (['--trainer=fsdp+offload', '--fsdp_cpu_offload=False'], 'trainer=fsdp+offload and fsdp_cpu_offload=False'),
        (['--trainer=ddp', '--use_fsdp=True'], 'trainer=ddp and use_fsdp=True contradict each other: leave out one'),
        (['--trainer=fsdp', '--use_zero1=True'], 'trainer=fsdp and use_zero1=True contradict each other'),
        (['--trainer=zero1', '--use_zero1=False'], 'trainer=zero1 and use_zero1=False contradict each other'),
        (['--trainer=triton', '--use_triton=False'], 'trainer=triton and use_triton=False contradict each other'),
        (['--trainer=phase1_zero1', '--fsdp_cpu_offload=True'], 'trainer=phase1_zero1 and fsdp_cpu_offload=True'),
        (['--picture=no/such/folder/plan.png'], '--picture=no/such/folder/plan.png: '),
        (['--picture=no/'], '--picture=no/ is a folder: name a file in it'),
    ],
)
def test_impossible_flags(args, message):
    run = run_plan(*args)
    assert run.returncode == 2 and run.stdout == ''
    assert run.stderr.startswith(f'error: {message}') and run.stderr.count('\n') == 1


def test_a_world_size_that_does_not_divide_has_train_pys_message(launch, work):
    flags = ['--gradient_accumulation_steps=3', '--dataset=letters', '--device=cpu']
    theirs = launch(NANOGPT / 'train.py', *flags, nproc=2, check=False).stderr
    ours = run_plan(flags[0], '--gpus=2').stderr
    assert ours in theirs and 'must be a multiple of the 2 processes' in ours


@pytest.mark.parametrize('folder', ['nanoGPT', 'phase1_zero1', 'phase3_fsdp'])
def test_takes_the_flags_of_train_py_with_their_defaults(launch, folder, tmp_path):
    text = launch(ROOT / folder / 'train.py', '--help', cwd=tmp_path).stdout
    listed = dict(re.findall(r'^  --(\w+)=(.*?)(?: {2,}.*| )?$', text, re.M))
    script = ROOT / folder / 'train.py'
    known = options.flags_of(script) | model_options('', str(script))
    assert {k: str(v) for k, v in known.items()} == {k: v.strip() for k, v in listed.items()}
    assert known.items() <= (options.train_flags() | options.kernel_flags()).items()


def test_what_does_not_fit_is_said_with_a_way_out():
    big = ['--n_layer=48', '--n_head=25', '--n_embd=1600', '--batch_size=64', '--gradient_accumulation_steps=8']
    run = run_plan(*big, '--gpu=a100-40gb', '--gpus=4', '--trainer=ddp')
    assert run.returncode == 1 and 'ddp does not fit on 4 × a100-40gb' in run.stdout
    command = run.stdout.strip().splitlines()[-1].split()
    flags = [word for word in command if word.startswith('--') and not word.startswith(('--nproc', '--standalone'))]
    folder = Path(next(word for word in command if word.endswith('train.py'))).parent.name
    trainer = next(name for name, its_folder in options.FOLDERS.items() if its_folder == folder)
    again = run_plan(*flags, '--gpu=a100-40gb', f'--gpus={command[2].split("=")[1]}', f'--trainer={trainer}')
    assert again.returncode == 0, again.stdout


FLAGS = (
    '--half_residual=True',
    '--fsdp_reshard=True',
    '--fsdp_shard_size=2',
    '--ckpt_format=sharded',
    '--use_zero1=False',
)


@pytest.mark.parametrize('name', options.NAMES)
def test_each_trainers_command_runs(name, launch, tmp_path):
    """--help ends the run after train.py has accepted the flags before it."""
    trainers = as_json('--gpus=4', *FLAGS, '--model_dir=../phase2_triton', '--out_dir=my out', cwd=tmp_path)['trainers']
    words = shlex.split(trainers[name]['command'])
    script = next(i for i, word in enumerate(words) if word.endswith('train.py'))
    assert words[:script] == ['torchrun', '--standalone', '--nproc_per_node=4'] and '--out_dir=my out' in words
    assert ('--fsdp_shard_size=2' in words) == (name == 'hybrid')
    launch(words[script], *words[script + 1 :], '--help', cwd=tmp_path)


def test_a_config_file_decides_who_can_be_recommended(tmp_path):
    (tmp_path / 'sharded.py').write_text("ckpt_format = 'sharded'\nbatch_size = 4\n")
    found = as_json('sharded.py', '--gpus=4', cwd=tmp_path)
    assert found['recommended'].startswith('fsdp') and found['trainers']['triton']['command'] is None
    (tmp_path / 'own.py').write_text("gpu = 'h200'\n")
    run = run_plan('own.py', cwd=tmp_path)
    assert run.returncode == 2 and 'own.py sets gpu, which train.py does not know: write --gpu=h200' in run.stderr


def test_a_full_gpu_is_slow_unless_a_graph_replays():
    """
    FSDP at 42 blocks of 6144 on four H100s reached 42% of the speed that its computation allows, because torch gave
    memory back and allocated it again. 0.7: far from both.
    """
    wide = ('--n_embd=6144', '--n_head=96', '--batch_size=1', '--compile=False', '--gpu=h100', '--gpus=4')
    wide += ('--gradient_accumulation_steps=4', '--fsdp_reshard=True')

    def plan_of(layers, *more):
        return as_json(*wide, f'--n_layer={layers}', *more)['trainers']['fsdp']

    full, roomy = (plan_of(layers, '--cuda_graph=False') for layers in (42, 30))
    assert full['fits'] and full['tight'] and not roomy['tight']
    assert full['tokens_per_sec'] * 42 < 0.7 * roomy['tokens_per_sec'] * 30  # the time of a block
    assert full['high'] > roomy['tokens_per_sec'] * 30 / 42  # torch may do with less
    assert plan_of(42)['tokens_per_sec'] > 1.4 * full['tokens_per_sec']


def test_fp8_changes_the_triton_model_alone():
    """
    At 11 x 1024 tokens, which were not measured: the gradient of the logits in 8 bits takes one more byte per logit, as
    measured with 12 in fp8_ladder_h200.json (7,858 MB against 7,184). Speed on one H200: 1.08 x
    (phase2_ladder_h200.json).
    """
    flags = ('--gpu=h200', '--gpus=4', '--half_residual=True', '--batch_size=11')
    without, with_fp8 = as_json(*flags)['trainers'], as_json(*flags, '--fp8')['trainers']
    for name in options.NAMES:
        before, after = without[name], with_fp8[name]
        if 'triton' not in name:
            assert before == after, name
            continue
        assert after['basis'] == after['memory_basis'] == 'interpolated'
        assert 1.03 < after['tokens_per_sec'] / before['tokens_per_sec'] < 1.15, name
        logits = after['memory_bytes']['logits'] - before['memory_bytes']['logits']
        assert logits == 11 * 1024 * 50304, name
        assert '--fp8' in after['command'] and '--fp8' not in with_fp8['ddp']['command']


def test_the_width_from_which_fp8_computes_everything_is_the_kernels():
    code = (ROOT / 'phase2_triton' / 'kernels' / 'fp8_linear.py').read_text()
    width = int(re.search(r'^OWN_KERNEL_MIN_WIDTH = (\d+)$', code, re.M)[1])
    run = Run(GPUS['h200'], 1, 12, 16, width, 12, 1024, 1, kernels=True, fp8=True)
    assert run.fp8_everywhere and not run.change(n_embd=width - 16).fp8_everywhere


def test_fp8_on_graphs_costs_what_was_measured():
    run = small_run(n_layer=12, n_head=12, n_embd=768, batch_size=12, block_size=1024, micro_steps=8)
    run = run.change(kernels=True, half_residual=True)
    difference = sum(memory.tensors(run.change(fp8=True)).values()) - sum(memory.tensors(run).values())
    measured_bytes = {row['name']: row['peak_memory_bytes'] for row in measured.read('fp8_ladder_h200.json')['rows']}
    # 1%: tensors of a few numbers per layer
    assert difference == pytest.approx(measured_bytes['fp8'] - measured_bytes['+ half_residual'], rel=0.01)


@pytest.mark.parametrize(
    ('args', 'note'),
    [
        (['--gpu=a100'], 'not using FP8: NVIDIA A100-SXM4-80GB has compute capability 8.0, FP8 needs 8.9'),
        (['--dtype=float16'], 'not using FP8: it takes the place of bfloat16, and this run is in float16'),
        (['--use_triton=False'], 'not using FP8: use_triton is off'),
        (['--n_embd=776', '--n_head=8'], 'not using FP8: n_embd=776 is not a multiple of 16'),
        (['--gpu=l4'], 'fp8=True: only in the rows with triton'),
    ],
)
def test_fp8_falls_back_with_train_pys_reason(args, note):
    flags = ['--gpus=2', '--json', *args]
    run = run_plan('--fp8', *flags)
    assert run.stderr == f'note: {note}\n' and run.returncode == 0
    same = (
        json.loads(run.stdout)['trainers']['triton']['tokens_per_sec']
        == as_json(*flags)['trainers']['triton']['tokens_per_sec']
    )
    assert same == note.startswith('not using')


def test_exponentials_run_where_the_kernels_use_them():
    """exp_cross_entropy.supports(): compute capability 9.0, bfloat16, 1024 rows or more, no loss_rows, no FP8 head."""
    config = options.train_flags() | options.kernel_flags() | {'vocab_size': 50304}

    def uses(gpu='h200', **changes):
        return options.make_run('triton', config | changes, GPUS[gpu], 1, 1).exponentials

    assert uses() and uses(batch_size=1) and uses(fp8=True, vocab_size=50264)
    assert not any((uses('a100'), uses('b200'), uses(dtype='float16'), uses(dtype='float32'), uses(loss_rows=512)))
    assert not any((uses(fp8=True), uses(batch_size=1, block_size=512), uses(vocab_size=50257)))


def test_offload_is_offered_before_more_gpus():
    big = ('--n_layer=40', '--n_head=40', '--n_embd=5120', '--batch_size=2', '--gpu=h100', '--gpus=2')
    run = run_plan(*big, '--trainer=ddp')
    assert run.returncode == 1 and 'The smallest change that fits: fsdp+offload' in run.stdout
    assert re.search(r"it takes \d+ GiB of each machine's memory", run.stdout)


def test_largest_says_if_not_even_one_fits():
    run = run_plan('--n_layer=48', '--n_embd=16384', '--n_head=128', '--gpu=l4', '--largest=model')
    assert run.returncode == 1 and re.search('^ddp +none$', run.stdout, re.M)


def test_machines_are_filled_evenly():
    args = ('--gpus=12', '--gradient_accumulation_steps=12')
    command = as_json(*args)['trainers']['ddp']['command']
    assert command.startswith('torchrun --nnodes=2 --nproc_per_node=6 ')


def test_one_gpu_shards_nothing():
    text = run_plan('--trainer=zero1').stdout
    assert 'One GPU shards nothing, so these run alike: zero1, fsdp, fsdp+offload like ddp; ' in text
    assert 'zero1+triton, fsdp+triton like triton; fsdp+checkpointing like ddp with --activation' in text
    assert not re.search('^fsdp  ', text, re.M)


def test_a_tight_run_is_called_that():
    run = run_plan('--batch_size=178', '--gpu=h100', '--trainer=triton')
    assert run.returncode == 0 and re.search('^triton .* tight ', run.stdout, re.M)
    assert 'Recommended: fsdp+checkpointing, the fastest that fits with room to spare' in run.stdout
    run = run_plan('--batch_size=300', '--gpu=h100', '--activation_checkpointing=True')
    assert 'Recommended: triton, the fastest that fits; it fits only because torch gives unused memory' in run.stdout
    run = run_plan('--batch_size=32', '--gpu=h200', '--gpu_memory=10')  # else 10.22 GiB in 10 would look like a mistake
    assert re.search(r'The smallest change that fits: triton, .* \(10\.\d\d GiB reserved, tight, ', run.stdout)


def test_the_reason_for_a_tight_recommendation():
    """If every trainer is tight, a simpler one within 2% of the fastest has no room to spare either."""
    config = {**options.train_flags(), **options.kernel_flags(), 'vocab_size': 50304}
    found = plan.make_plan(config, GPUS['h200'], 2, 50e9)
    for number, name in enumerate(('ddp', 'triton')):
        tight = {'memory_bytes': {'total': 1e13}, 'memory_low': 1e9, 'tokens_per_sec': 1000.0 + number}
        found[name] = replace(found[name], **tight)
    found = {name: found[name] for name in ('ddp', 'triton')}
    best = plan.recommend(found)
    text = report.advice(found, config, GPUS['h200'], 2, '', best, [], {}, None)
    assert text.startswith('Recommended: ddp, within 2% of the fastest that fits, and simpler; it fits only because')
    found['ddp'] = replace(found['ddp'], memory_bytes={'total': 1e9})
    text = report.advice(found, config, GPUS['h200'], 2, '', plan.recommend(found), [], {}, None)
    assert text.startswith('Recommended: ddp, the fastest that fits with room to spare')


def test_numbers_do_not_overflow():
    largest = ['--tokens=1e15', '--price=1e15', '--gpu_memory=1e15', '--network=1e-15', '--gpus=16']
    found = as_json(*largest, '--gradient_accumulation_steps=16')
    assert all(trainer['cost'] > 1e15 for trainer in found['trainers'].values())


def test_trainers_that_run_alike_appear_once():
    text = run_plan('--gpus=4', '--activation_checkpointing=True').stdout
    assert '\nThese run alike: fsdp+checkpointing like fsdp.\n' in text
    assert not re.search(r'^fsdp\+checkpointing  ', text, re.M)


def test_a_gpu_may_have_less_memory():
    half = as_json('--gpu=h100', '--gpu_memory=6', '--gpus=2')
    assert half['gpu_memory_bytes'] == 6 * 2**30
    assert not half['trainers']['ddp']['fits'] and half['trainers']['fsdp+checkpointing']['fits']


def test_openais_weights_bring_their_sizes():
    """gpt2-xl has 1,557.6 million parameters, biases included (Hugging Face)."""
    run = run_plan('config/finetune_shakespeare.py', '--gpu=h200')
    assert run.stdout.startswith('1,558M parameters')


def test_notes_say_what_plan_py_cannot_know():
    run = run_plan(
        'config/train_shakespeare_char.py', '--init_from=resume', '--model_dir=../tests/plain_model', '--json'
    )
    json.loads(run.stdout)
    for note in ('dropout=0.2: planned as 0', 'init_from=resume: the', 'model_dir=/'):
        assert f'note: {note}' in run.stderr
    assert "vocab_size=50304 is GPT-2's" in run_plan('config/train_shakespeare_char.py').stderr


def test_flags_ask_for_a_trainer():
    """The 1.5B model with 40 sequences fits on an H100 only in shards and with recomputation."""
    big = ['--n_layer=48', '--n_head=25', '--n_embd=1600', '--batch_size=40', '--gpu=h100', '--gpus=8']
    assert run_plan(*big).returncode == 0  # some trainer does
    assert run_plan(*big, '--use_zero1=True').returncode == 1
    assert run_plan(*big, '--use_fsdp=True', '--activation_checkpointing=True').returncode == 0
    config = {'model_dir': '', 'use_fsdp': True, 'fsdp_shard_size': 2, 'trainer': ''}
    kernels = config | {'model_dir': '../phase2_triton'}
    assert options.asked_for(kernels, {'use_fsdp'}) == 'fsdp+triton'
    assert options.asked_for(kernels | {'trainer': 'nanoGPT'}, set()) == 'triton'
    assert options.asked_for(config | {'trainer': 'phase1_zero1'}, set()) == 'zero1'
    assert options.asked_for(config | {'trainer': 'phase3_fsdp'}, {'fsdp_shard_size'}) == 'hybrid'
    assert options.asked_for(config | {'trainer': 'fsdp'}, {'fsdp_shard_size'}) == 'hybrid'
    assert options.asked_for(kernels | {'trainer': 'ddp'}, set()) == 'triton'
    preset = {'use_fsdp': True}  # planned with another trainer
    assert options.asked_for(config | preset | {'trainer': 'ddp'}, {'use_fsdp'}, preset) == 'ddp'


@pytest.mark.parametrize('what', ['model', 'batch'])
def test_largest_is_the_last_that_fits(what):
    found = as_json('--gpu=l4', '--gpus=2', f'--largest={what}')['largest']
    key = {'model': 'n_layer', 'batch': 'batch_size'}[what]
    for name in ('ddp', 'fsdp+checkpointing'):
        for number, fits in ((found[name][key], True), (found[name][key] + 1, False)):
            trainer = as_json('--gpu=l4', '--gpus=2', f'--{key}={number}')['trainers'][name]
            assert trainer['fits'] is fits, (name, number)


def test_the_largest_models_and_batches_that_trained():
    for check in bench_planner.largest_checks():
        assert abs(check['error']) <= 0.05, check


def test_more_of_anything_takes_more_memory_and_sharding_less():
    run = small_run(n_embd=768, n_head=12, n_layer=12, block_size=1024).change(gpus=4)
    total = lambda **fields: memory.memory(run.change(**fields))['total']
    assert total(batch_size=3) > total() > total(checkpointing=True)
    assert total() > total(trainer='zero1') > total(trainer='fsdp', reshard=True)
    assert total(kernels=True) < total() < total(compiled=False, graphs=False)


def test_several_ranks_may_reserve_another_set_of_gradients():
    run = small_run(n_layer=24, n_head=16, n_embd=1024).change(gpus=4)
    one_step, several = (plan.estimate('ddp', run.change(micro_steps=n), 50e9) for n in (1, 2))
    assert one_step.memory_high < 1.11 * one_step.memory_bytes['total']
    assert several.memory_high > several.memory_bytes['total'] + 4 * run.parameters


def test_one_micro_step_keeps_the_first_bucket():
    """In the second iteration of DDP and ZeRO-1, where there is room for it. With more micro-steps most runs do not."""
    run = small_run(n_layer=24, n_head=16, n_embd=1024, micro_steps=1).change(gpus=4)
    for trainer, more in (('ddp', 4), ('zero1', 4), ('fsdp', 0)):
        for steps in (1, 2):
            changed = run.change(trainer=trainer, micro_steps=steps)
            without = sum(memory.settled(changed, memory.ALLOCATOR).values())
            assert memory.memory(changed)['total'] == without + (steps == 1) * more * run.parameters
    full = replace(run.gpu, memory_bytes=memory.needed(run) + memory.outside_torch(run) + run.parameters)
    assert memory.memory(run.change(gpu=full))['gradients'] == memory.at_loss(run)['gradients']
    assert not memory.tight(run.change(gpu=full))


def test_recomputation_loses_one_blocks_activations():
    """
    FSDP with checkpointing, as traced: when torch last reserved memory for logits with launched kernels, it had
    32 bytes per token and column, one recomputed block, more than its tensors. 3%: the small tensors of a block.
    """
    rows = [row for row in measured.read('memory_peaks_h200.json')['rows'] if row['trainer'] == 'fsdp']
    for row in rows:
        run = measured.memory_run(row, GPUS['h200'])
        last = max(row['growth'], key=lambda step: step['reserved'])
        on_this_stream = last['reserved'] + last['bytes'] - row['reserved_by_stream'][1]
        lost = on_this_stream - last['live'] - 2 * run.tokens * run.vocab_size
        assert memory.stale_logits(run) == pytest.approx(lost, rel=0.03)
        assert 32 * run.tokens * run.n_embd == pytest.approx(lost, rel=0.03)
    assert len(rows) == 3


def test_ranges_without_cuda_graphs_cover_the_runs_that_the_cpu_slowed_down():
    """FSDP in units of a block, and the Triton model: their hooks and autograd functions run in Python."""
    rows = [row for row in ROWS if row.kind == 'trainers' and not row.run.graphs]
    rows = [row for row in rows if row.run.kernels or (row.run.sharded and row.run.min_num_params == 1_000_000)]
    for row in rows:
        found = plan.estimate('', row.run, 50e9)
        assert found.low < row.low and row.high < found.high, row.source
    assert len(rows) > 15


def test_peaks_are_hardware_pys():
    for gpu in GPUS.values():
        known = [half for pattern, half, _ in hardware.PEAK_TFLOPS if re.fullmatch(pattern, gpu.device_name)]
        assert known == [gpu.peak_flops / 1e12], gpu.name


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_say_what_plan_py_says(name):
    path = presets.CONFIGS / f'{name}.py'
    assert path.read_text() == presets.rewrite(path), 'python -m planner.presets'
    config = presets.config_of(path)
    tokens = config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
    assert f'= {tokens:,} tokens an iteration' in path.read_text()
    billions = re.search(r'_([\d.]+)(M|B)$', name)
    said = float(billions[1]) * {'M': 1e6, 'B': 1e9}[billions[2]]
    n = plan.make_plan(config, GPUS['h100'], 8, network=50e9)['ddp'].run.parameters
    assert n == pytest.approx(said, rel=0.05)  # GPT-2's and GPT-3's names are rounded


def test_out_of_memory_ends_with_a_command_that_runs(tmp_path):
    argv = [
        str(ROOT / 'phase3_fsdp' / 'train.py'),
        'config/train_gpt2.py',
        '--batch_size=640',
        '--model_dir=../phase2_triton',
    ]
    command = plan_command(argv, 8, 'NVIDIA H100 80GB HBM3')
    assert '--trainer=phase3_fsdp' in command and '--gpus=8' in command
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.returncode == 1 and 'fsdp+triton does not fit on 8 × h100' in run.stdout, run.stderr
    assert plan_command(argv, 8, 'NVIDIA TITAN V') is None
    (tmp_path / 'alone').mkdir()
    assert plan_command([str(tmp_path / 'alone' / 'train.py')], 1, 'NVIDIA H200') is None


def test_the_predictions_for_8_gpus_cover_every_trainer():
    report = measured.read('planner_8gpus.json')
    kinds = {(p['gpu'], p['size'], p['micro_steps']) for p in report['predictions']}
    assert kinds == {(gpu, size, n) for gpu in ('h100', 'h200') for size in ('124M', '1.5B') for n in (1, 5)}
    for prediction in report['predictions']:
        assert list(prediction['trainers']) == list(options.NAMES)
        for trainer in prediction['trainers'].values():
            assert trainer['memory_bytes'].keys() == COMPONENTS and trainer['low'] < trainer['high']


def test_picture(tmp_path):
    run = run_plan('--gpu=h200', '--gpus=4', f'--picture={tmp_path}/plan.png')
    assert run.returncode == 0 and (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_without_matplotlib(tmp_path):
    (tmp_path / 'matplotlib.py').write_text("raise ModuleNotFoundError(name='matplotlib')")
    run = run_plan('--gpu=h200', f'--picture={tmp_path}/plan.png', env={'PYTHONPATH': str(tmp_path)})
    assert run.returncode == 2 and run.stderr.startswith('error: --picture needs the package matplotlib')


def test_eleutherai_formula():
    """
    By hand: 2 bytes of weights, 4 of gradients and 12 of Adam, and 34 + 5 a T / h bytes of activations, for a model of
    one block.
    """
    run = SimpleNamespace(**asdict(small_run(n_layer=1, vocab_size=100)), tokens=64)
    n = 2 * 100 * 64 + 32 * 64 + 8 * 64 + 12 * 64 * 64 + 2 * 64
    assert bench_planner.eleuther(run) == 18 * n + 64 * 64 * (34 + 5 * 2 * 32 / 64)


def test_growth_says_why_torch_reserved_memory():
    """bench_memory.py --history: the second logits need new memory, because gradients sit where the first ones were."""
    import bench_memory

    gib = 2**30
    forward = [{'filename': '/nanoGPT/model.py', 'line': 9, 'name': 'forward'}]
    events = [
        ['segment_map', 0, gib, 7, None],
        ['alloc', 0, gib, 7, forward],
        ['free_requested', 0, gib, 7, []],
        ['free_completed', 0, gib, 7, []],
        ['alloc', 0, 2**20, 7, []],
        ['segment_map', gib, gib, 7, []],
        ['alloc', gib, gib, 7, forward],
        ['segment_map', 9 * gib, 2**21, 8, []],
        ['segment_unmap', 0, 2**21, 7, []],
    ]
    found = bench_memory.growth(events)
    assert found['reserved_by_stream'] == [2 * gib - 2**21, 2**21]
    step = {'bytes': gib, 'functions': ['model:9 forward']}
    assert found['growth'] == [step | {'reserved': 0, 'live': 0}, step | {'reserved': gib, 'live': 2**20}]


def test_history_of_several_ranks_is_that_of_the_rank_that_reserved_most():
    """bench_memory.py --history --ranks=2: numbers are the largest of any rank, the history belongs to one rank."""
    import bench_memory

    one = dict(reserved=5, allocated=4, alloc_retries=0, growth=['a'], reserved_by_stream=[5], history_complete=True)
    other = dict(reserved=7, allocated=3, alloc_retries=2, growth=['b'], reserved_by_stream=[7], history_complete=False)
    found = bench_memory.most_of_ranks([one, other])
    assert found == other | dict(allocated=4, history_of_rank=1)
    on_cpus = dict.fromkeys(('reserved', 'allocated')) | bench_memory.growth(bench_memory.history())
    assert bench_memory.most_of_ranks([on_cpus, on_cpus]) == on_cpus | dict(history_of_rank=0)
    assert 'history_of_rank' not in bench_memory.most_of_ranks([dict(reserved=1), dict(reserved=2)])
