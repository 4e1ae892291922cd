"""
The Triton model and its kernels where Triton cannot run: without a GPU, without Triton, on a GPU too old; and the
kernels compiled for GPUs that are not here. The kernels' numbers are tested in tests/kernels/.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import kernels
from conftest import NANOGPT, ROOT, TINY
from kernels import cross_entropy as cross_entropy_kernels
from kernels import decode as decode_kernels
from kernels import device as kernel_device
from kernels import embedding as embedding_kernels
from kernels import fp8 as fp8_kernels
from kernels import gelu as gelu_kernels
from kernels import layer_norm_gradients as gradient_kernels
from kernels.launch import Config

layer_norm_kernels = importlib.import_module('kernels.layer_norm')
has_triton = kernel_device.missing is None


def train(folder, **options):
    """
    Loss, after two forwards and a backward on the CPU, of a model of one folder; its module is loaded afresh, so it
    prints again.
    """
    spec = importlib.util.spec_from_file_location(f'model_of_{folder}', ROOT / folder / 'model.py')
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
        'import sys; sys.modules["triton"] = None; import test_triton as t; print("loss", t.train("phase2_triton"))'
    )
    env = {**os.environ, 'PYTHONPATH': f'{ROOT / "phase2_triton"}:{ROOT / "tests"}', 'CUDA_VISIBLE_DEVICES': ''}
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


def test_fp8_where_it_cannot_run(launch, work):
    """One line says why, and the run prints the losses that it prints without the flag."""
    options = [*TINY, '--max_iters=2', '--model_dir=../phase2_triton', '--dtype=bfloat16', '--fp8']
    runs = [launch(NANOGPT / 'train.py', *options, f'--out_dir={flag}', flag) for flag in ('--fp8=True', '--fp8=False')]
    assert runs[0].stdout.count('not using FP8: ') == 1 and 'FP8' not in runs[1].stdout
    losses = [[line.split(',')[0] for line in run.stdout.splitlines() if line.startswith('iter ')] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for flag, clamped in (('--fp8=True', 0), ('--fp8=False', None)):
        (log,) = (work / flag).glob('run_*.json')
        assert json.loads(log.read_text())['iterations'][-1].get('fp8_clamped') == clamped


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
    """
    Compiles a kernel as Triton would for aligned pointers and even sizes, without a GPU. Returns it and ptxas's report.
    """
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
    knobs = triton.knobs.nvidia
    ptxas = getattr(knobs, 'ptxas_blackwell', knobs.ptxas) if capability >= 100 else knobs.ptxas
    ptxas, arch = ptxas.path, f'sm_{capability}' + 'a' * (capability >= 90)  # those that Triton itself uses
    command = [ptxas, '-v', '--gpu-name', arch, '-o', os.devnull, '-']
    report = subprocess.run([*command[:-1], '/dev/stdin'], input=compiled.asm['ptx'], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return compiled, report.stderr


listed = [
    (N, *d, False)
    for N in (768, 1600, 4096, 12288)
    for d in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32))
]


# compute capability: bytes of shared memory that a program may have
shared_memory = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
every_gpu = pytest.mark.parametrize('capability', shared_memory)
with_fp8 = (89, 90, 100, 120)


def check_layer_norm(N, x, y, add, bias, backward, capability, fp8=False):
    """Compiles one LayerNorm kernel: it spills no registers, fits into shared memory, and loads 16 bytes at a time."""
    types = dict.fromkeys(('dy_ptr', 'y_ptr', 'branch_ptr', 'dbranch_ptr'), pointer[y])
    types |= dict.fromkeys(('x_ptr', 'dx_ptr', 'sum_ptr', 'dsum_ptr'), pointer[x])
    types |= dict.fromkeys(('weight_ptr', 'bias_ptr'), pointer[x] if bias else '*fp32')
    types |= dict.fromkeys(('stats_ptr', 'partial_ptr'), '*fp32')
    types |= dict.fromkeys(('x_stride', 'dy_stride', 'M'), 'i32') | {'eps': 'fp32', 'slot_ptr': '*fp32'}
    types['q_ptr'] = ('*fp8e5' if backward else '*fp8e4nv') if fp8 else '*bf16'
    kernel = layer_norm_kernels.backward_kernel if backward else layer_norm_kernels.forward_kernel
    if backward:
        c = layer_norm_kernels.backward_config(N, x.itemsize, capability >= 90)
    else:
        c = layer_norm_kernels.forward_config(N, x.itemsize, capability >= 90, fp8)
    constants = dict(N=N, ROWS=c.rows, CHUNK=c.chunk, PDL=c.pdl, ADD=add, FP8=fp8)
    if backward:
        constants |= dict(PREFETCH=c.prefetch, COPY=add and x != y, NEED_DX=True, NEED_DW=True, NEED_DB=bias)
    else:
        constants |= dict(RESIDENT=c.resident, HAS_BIAS=bias)
    compiled, report = compile_offline(kernel, constants, types, c, capability)
    assert '0 bytes spill stores, 0 bytes spill loads' in report, f'{N} {x} {add} {c}: {report}'
    assert compiled.metadata.shared <= shared_memory[capability]
    wide = [line for line in compiled.asm['ptx'].splitlines() if 'ld.global' in line and '.v4.b32' in line]
    assert wide, f'{N} {x}: no 16-byte loads'
    if fp8:  # threads would exchange values if y and its fp8 form had different layouts
        assert 'shfl.sync.idx' not in compiled.asm['ptx'], f'{N} {x} {c}'


@pytest.mark.skipif(not has_triton, reason='Triton is not installed')
@every_gpu
@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_layer_norm_compiles_without_spilling_registers(capability, backward):
    """
    For Hopper every width of the table in IMPLEMENTATION.md, and the model's with the residual added; for Ampere the
    widest; for the other GPUs the model's without biases.
    """
    added = [(N, x, torch.bfloat16, True) for N in (768, 1600) for x in (torch.float32, torch.bfloat16)]
    cases = {
        80: [c for c in listed if c[0] == 12288],
        90: [*listed, (768, torch.float32, torch.bfloat16, False), *added],
    }
    for case in cases.get(capability, added):
        check_layer_norm(*case, capability in cases, backward, capability)
    for case in added if capability in with_fp8 else ():
        if (case[:2], capability, backward) != ((768, torch.bfloat16), 100, True):  # spills 8 bytes with Triton 3.6
            check_layer_norm(*case, False, backward, capability, fp8=True)


@pytest.mark.full
@pytest.mark.skipif(not has_triton, reason='Triton is not installed')
@every_gpu
@pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])
def test_layer_norm_of_every_width_compiles_for_every_gpu(capability, backward):
    """Every width of the table, without biases and with. One case is left out: 12288 on sm_120 spills 28 bytes."""
    for case in listed:
        check_layer_norm(*case, False, backward, capability)
        if (case[0], case[1], capability, backward) != (12288, torch.bfloat16, 120, True):
            check_layer_norm(*case, True, backward, capability)


@pytest.mark.skipif(not has_triton, reason='Triton is not installed')
@every_gpu
def test_other_kernels_compile_without_spilling_registers(capability):
    """
    As launched for GPT-2, without a GPU. Two programs of the loss share a multiprocessor where it runs 2,048 threads,
    so each thread may have 32 registers there; on the other GPUs it runs 1,536 and has room for one program.
    """
    formats = (False, True) if capability in with_fp8 else (False,)
    c = cross_entropy_kernels.cross_entropy_config(50304)
    launches = [
        (
            cross_entropy_kernels.cross_entropy_kernel,
            dict(V=50304, LANES=c.rows, ITEMS=c.chunk, GRAD=True, FP8=fp8, fp8_scale=32768.0),
            {'logits_ptr': '*bf16', 'targets_ptr': '*i64', 'losses_ptr': '*fp32', 'M': 'i32', 'ignore_index': 'i32'}
            | {'q_ptr': '*fp8e5' if fp8 else '*bf16'},
            c,
        )
        for fp8 in formats
    ]
    for pointer in ('*bf16', '*fp32'):
        types = {'size': 'i32'} | dict.fromkeys(('x_ptr', 'y_ptr', 'dy_ptr', 'dx_ptr'), pointer)
        launches += [
            (kernel, dict(BLOCK=2048, EXACT=pointer == '*fp32', TANH=tanh), types, Config(1, 2048, 4))
            for kernel in (gelu_kernels.forward_kernel, gelu_kernels.backward_kernel)
            for tanh in (False, True)
        ]
    c = gradient_kernels.reduce_config(264, 768, capability >= 90)
    types = dict.fromkeys(('partial_ptr', 'dw_ptr', 'db_ptr'), '*fp32') | {'P': 'i32', 'N': 'i32'}
    launches.append((gradient_kernels.reduce_kernel, dict(FIRST=0, ROWS=c.rows, COLS=c.chunk, PDL=c.pdl), types, c))
    types = dict.fromkeys(('wte_ptr', 'wpe_ptr', 'x_ptr', 'dx_ptr', 'dwte_ptr', 'dwpe_ptr'), '*fp32')
    types |= {'idx_ptr': '*i64', 'B': 'i32', 'T': 'i32', 'V': 'i32'}
    constants, c = dict(N=768, BLOCK=1024), Config(1, 1024, 4)
    launches.append((embedding_kernels.forward_kernel, constants, types, c))
    launches.append((embedding_kernels.backward_kernel, dict(**constants, ADD=True, NEED_DWPE=True), types, c))
    types = {'x_ptr': '*bf16', 'scale_ptr': '*fp32', 'y_ptr': '*bf16', 'size': 'i32'}
    launches.append((cross_entropy_kernels.scale_kernel, dict(BLOCK=2048), types, Config(1, 2048, 4)))
    for K, x, y, bias, norm, gelu, add in (
        (768, '*fp32', '*bf16', True, True, 'none', False),
        (3072, '*bf16', '*fp32', True, False, '', True),
        (1600, '*fp32', '*bf16', False, True, 'tanh', False),
        (6400, '*bf16', '*fp32', False, False, '', True),  # of GPT-2 XL; it spills on sm_120
    )[: 3 if capability == 120 else 4]:
        constants = dict(K=K, COLS=4, CHUNK=128, NORM=norm, HAS_NORM_BIAS=norm and bias, HAS_BIAS=bias, GELU=gelu)
        types = dict.fromkeys(('norm_weight_ptr', 'norm_bias_ptr'), '*fp32')
        types |= dict.fromkeys(('weight_ptr', 'bias_ptr'), '*bf16')
        types |= {'x_ptr': x, 'y_ptr': y, 'B': 'i32', 'N': 'i32', 'eps': 'fp32'}
        c = Config(1, 128, 4, pdl=capability >= 90)
        launches.append((decode_kernels.gemv_kernel, dict(**constants, ADD=add, PDL=c.pdl), types, c))
    c = Config(1, 256, 8, pdl=capability >= 90)
    types = dict.fromkeys(('qkv_ptr', 'cache_ptr', 'y_ptr'), '*bf16')
    types |= {'position_ptr': '*i64', 'L': 'i32', 'scale': 'fp32'}
    launches.append((decode_kernels.attention_kernel, dict(H=12, D=64, BLOCK_D=64, CHUNK=256, PDL=c.pdl), types, c))
    if len(formats) > 1:
        kernels_of_gelu = (gelu_kernels.forward_fp8_kernel, '*fp8e4nv'), (gelu_kernels.backward_fp8_kernel, '*fp8e5')
        types = {'size': 'i32', 'slot_ptr': '*fp32'} | dict.fromkeys(('x_ptr', 'y_ptr', 'dy_ptr', 'dx_ptr'), '*bf16')
        launches += [
            (kernel, dict(BLOCK=2048, EXACT=False, TANH=tanh), {**types, 'q_ptr': q}, Config(1, 2048, 8))
            for kernel, q in kernels_of_gelu
            for tanh in (False, True)
        ]
        types = {'x_ptr': '*bf16', 'slot_ptr': '*fp32', 'q_ptr': '*fp8e5', 'size': 'i32'}
        launches.append((fp8_kernels.quantize_kernel, dict(BLOCK=4096), types, Config(1, 4096, 4)))
        types = dict.fromkeys(('w_ptr', 'amax_ptr', 'inverse_scale_ptr'), '*fp32') | {'OUT': 'i32', 'IN': 'i32'}
        types |= {'rows_ptr': '*fp8e4nv', 'columns_ptr': '*fp8e4nv'}
        launches.append((fp8_kernels.quantize_weight_kernel, dict(BLOCK=64), types, Config(1, 64, 4)))
        constants = dict(activation_headroom=2.0, gradient_headroom=32.0, decay=fp8_kernels.DECAY, BLOCK=128)
        constants |= dict(unmeasured_activation=1.0, unmeasured_gradient=2.0**20)
        launches.append((fp8_kernels.update_kernel, constants, {'state_ptr': '*fp32', 'slots': 'i32'}, Config(1, 0, 4)))
    for kernel, *launch in launches:
        compiled, report = compile_offline(kernel, *launch, capability)
        assert compiled.metadata.shared <= shared_memory[capability]
        assert '0 bytes spill stores, 0 bytes spill loads' in report, f'{kernel.fn.__name__} {launch}: {report}'
        if kernel is cross_entropy_kernels.cross_entropy_kernel and capability in (80, 90, 100):
            assert 'Used 32 registers' in report, report
