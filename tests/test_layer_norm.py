"""
Phase 2's LayerNorm. The numbers are tested in layer_norm_cases.py: here, on the GPU at full sizes, where there is one; elsewhere
in a process of its own under Triton's interpreter, which must be switched on before the kernels are imported and may not leak
into other tests. What needs neither is below: fallbacks, and compiling for GPUs that are not here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from conftest import NANOGPT, TINY

root = Path(__file__).resolve().parent.parent
phase2 = root / 'phase2_triton'
if str(phase2) not in sys.path:
    sys.path.append(str(phase2))
import kernels
from kernels import device as kernel_device

ours = importlib.import_module('kernels.layer_norm')
has_triton = kernel_device.missing is None

if torch.cuda.is_available():
    from layer_norm_cases import *  # noqa: F403
else:

    @pytest.mark.skipif(not has_triton, reason='Triton is not installed')
    def test_cases_in_the_interpreter():
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'layer_norm_cases.py']
        env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root / 'tests')
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def train(folder, **options):
    """Loss, after two forwards and a backward on the CPU, of a model of one folder; its module is loaded afresh, so it prints anew."""
    spec = importlib.util.spec_from_file_location(f'model_of_{folder}', root / folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(1337)
    model = module.GPT(
        module.GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=16, dropout=0.0, bias=True, **options)
    )
    idx = torch.arange(16).view(2, 8)
    for _ in range(2):
        loss = model(idx, idx)[1]
    loss.backward()
    return loss.item()


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if 'LayerNorm' in line]


def test_without_triton_training_runs():
    """As on a machine where `import triton` fails, which only a fresh process can show."""
    program = (
        'import sys; sys.modules["triton"] = None; import test_layer_norm as t; print("loss", t.train("phase2_triton"))'
    )
    env = {**os.environ, 'PYTHONPATH': str(root / 'tests'), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert 'not using Triton-accelerated LayerNorm: Triton is not installed (' in done.stdout
    assert f'loss {train("nanoGPT")}' in done.stdout, 'the same bits as the reference'


def test_without_a_gpu_training_runs(capsys):
    assert train('phase2_triton') == train('nanoGPT'), 'the same bits as the reference'
    (line,) = said(capsys)
    assert line.startswith('not using Triton-accelerated LayerNorm: Triton ')


def test_switched_off(capsys):
    assert train('phase2_triton', use_triton=False) == train('nanoGPT')
    assert said(capsys) == ['not using Triton-accelerated LayerNorm: use_triton is off']


def test_only_rank_0_speaks(launch, work):
    run = launch(NANOGPT / 'train.py', *TINY, '--max_iters=0', '--model_dir=../phase2_triton', nproc=2)
    assert run.stdout.count('Triton-accelerated') == 1


@pytest.mark.skipif(not has_triton, reason='Triton is not installed')
def test_a_gpu_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'Tesla T4')
    reason = kernel_device._unavailable_reason.__wrapped__('cuda', 0)
    assert reason == 'Tesla T4 has compute capability 7.5, the kernels need 8.0'


def test_availability_is_told_in_words():
    assert not kernels.available('meta')
    assert kernels.unavailable_reason('meta')
    assert kernels.available('cuda') == (kernels.unavailable_reason('cuda') is None)


def test_cpu_tensors_take_pytorchs_own():
    x, w, b = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    assert torch.equal(kernels.layer_norm(x, w, b), F.layer_norm(x, (8,), w, b))
    assert torch.equal(kernels.layer_norm(x, w), F.layer_norm(x, (8,), w))
    half = kernels.layer_norm(x.bfloat16(), w)
    assert half.dtype == torch.bfloat16, 'a wider weight does not widen the result'
    with pytest.raises(ValueError, match='weight has shape'):
        kernels.layer_norm(x, w[:4])


pointer = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}


def compile_offline(kernel, constants, types, config, capability):
    """A kernel as Triton would launch it on aligned pointers and even sizes; no GPU needed. Returns it and ptxas's report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: 'constexpr' if name in constants else types[name] for name in kernel.arg_names}
    divisible = {
        (i,): [['tt.divisibility', 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name != 'eps'
    }
    options = {
        'num_warps': config.warps,
        'launch_pdl': config.pdl,
        **({'maxnreg': config.registers} if config.registers else {}),
    }
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, divisible
    )
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    ptxas = triton.knobs.nvidia.ptxas.path  # the one that Triton itself runs
    arch = 'sm_90a' if capability == 90 else f'sm_{capability}'
    command = [ptxas, '-v', '--gpu-name', arch, '-o', os.devnull, '-']
    report = subprocess.run([*command[:-1], '/dev/stdin'], input=compiled.asm['ptx'], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return compiled, report.stderr


listed = [
    (N, *d, False)
    for N in (768, 1600, 4096, 12288)
    for d in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
]


@pytest.mark.skipif(not has_triton, reason='Triton is not installed')
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_compiles_without_spilling_registers(capability, backward):
    """For Hopper every width of the table in IMPLEMENTATION.md, and the model's with the residual added; for Ampere the widest."""
    added = [(N, x, torch.bfloat16, True) for N in (768, 1600) for x in (torch.float32, torch.bfloat16)]
    cases = (
        [*listed, (768, torch.float32, torch.bfloat16, False), *added]
        if capability == 90
        else [c for c in listed if c[0] == 12288]
    )
    shared_limit = {80: 163 * 1024, 90: 227 * 1024}[capability]
    pdl = capability >= 90
    for N, x, y, add in cases:
        size = x.itemsize
        types = dict.fromkeys(('dy_ptr', 'y_ptr', 'branch_ptr', 'dbranch_ptr'), pointer[y])
        types |= dict.fromkeys(('x_ptr', 'dx_ptr', 'sum_ptr', 'dsum_ptr', 'weight_ptr', 'bias_ptr'), pointer[x])
        types |= (
            dict.fromkeys(('stats_ptr', 'partial_ptr'), '*fp32')
            | dict.fromkeys(('x_stride', 'dy_stride', 'M'), 'i32')
            | {'eps': 'fp32'}
        )
        c = (ours.backward_config if backward else ours.forward_config)(N, size, pdl)
        constants = dict(N=N, ROWS=c.rows, CHUNK=c.chunk, PDL=c.pdl, ADD=add)
        constants |= (
            dict(PREFETCH=c.prefetch, COPY=add and x != y, NEED_DX=True, NEED_DW=True, NEED_DB=True)
            if backward
            else dict(RESIDENT=c.resident, HAS_BIAS=True)
        )
        compiled, report = compile_offline(
            ours.backward_kernel if backward else ours.forward_kernel, constants, types, c, capability
        )
        assert '0 bytes spill stores, 0 bytes spill loads' in report, f'{N} {x} {add} {c}: {report}'
        assert compiled.metadata.shared <= shared_limit
        wide = [line for line in compiled.asm['ptx'].splitlines() if 'ld.global' in line and '.v4.b32' in line]
        assert wide, f'{N} {x}: no 16-byte loads'
