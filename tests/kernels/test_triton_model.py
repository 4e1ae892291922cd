"""
Tests of the Triton model against the reference and float64: losses and gradients, alone and in everything that wraps a
model.
"""

import gc
import importlib.util
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from numerics import bf16, device, f16, f32, f64, gpu
from torch import nn

import fake_cuda_graph
import kv_cache
from kernels import available
from kernels.decode import MAX_SAMPLES
from kernels.device import answers

VOCABULARY, BLOCK, MICRO_STEPS = 65, 16 if gpu else 8, 3 if gpu else 2  # the interpreter takes half a second for one


def load_model(folder):
    spec = importlib.util.spec_from_file_location(
        f'{folder}_model', Path(__file__).resolve().parents[2] / folder / 'model.py'
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    answers.clear()  # so that the message is printed again
    return module


def small(module, bias=True, **options):
    torch.manual_seed(1337)
    config = dict(block_size=BLOCK, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=64, dropout=0.0, bias=bias)
    return module.GPT(module.GPTConfig(**{**config, **options})).to(device)


def batches(count):
    """Returns count batches of tokens and targets; some targets are to be ignored."""
    rows = torch.randint(VOCABULARY, (count, 2, BLOCK + 1), generator=torch.Generator().manual_seed(0)).to(device)
    rows[:, 0, 5] = 3
    return [(row[:, :-1], row[:, 1:].masked_fill(row[:, 1:] == 3, -1)) for row in rows]


def autocast(dtype):
    return torch.autocast(device, dtype=dtype, enabled=dtype in (bf16, f16))


def accumulated(model, dtype, micro_steps=MICRO_STEPS, scale=1.0):
    """Returns the losses of some micro-steps and {name: sum of their gradients}, in float64."""
    losses = []
    for x, y in batches(micro_steps):
        with autocast(dtype):
            loss = model(x, y)[1]
        (loss * scale / micro_steps).backward()
        losses.append(loss.item())
    return losses, {name: p.grad.to(f64) / scale for name, p in model.named_parameters() if p.requires_grad}


def assert_no_worse(ours, theirs, truth, dtype, factor=2.0):
    """
    Asserts that no gradient's error against float64 is more than `factor` times the reference's in dtype, plus float32
    sums in another order, and one unit in the last place of bfloat16 where the interpreter truncates.
    """
    assert list(ours) == list(theirs) == list(truth), 'parameter names'
    slack = 2e-6 if gpu or dtype != bf16 else 8e-3
    for name, exact in truth.items():
        error, allowed = (ours[name] - exact).norm(), factor * (theirs[name] - exact).norm() + slack * exact.norm()
        assert error <= allowed, f'{name}: error {error:.2e}, allowed {allowed:.2e} of {exact.norm():.2e}'


@pytest.mark.parametrize('dtype', [f32, bf16, pytest.param(f16, marks=[] if gpu else pytest.mark.full)])
@pytest.mark.parametrize(
    'options',
    [{}, {'bias': False}, {'activation_checkpointing': True}, {'loss_rows': 7}, {'half_residual': True}],
    ids=['plain', 'no bias', 'checkpointed', 'loss in chunks', 'half residual'],
)
def test_gradients_of_micro_steps(dtype, options, capsys):
    """The matmul itself adds each gradient to weight.grad. Both users of the shared weight do so."""
    bias, scale = options.get('bias', True), 1024.0 if dtype == f16 else 1.0  # as a gradient scaler does
    truth = accumulated(small(load_model('nanoGPT'), bias).double(), f64)
    theirs = accumulated(small(load_model('nanoGPT'), bias), dtype, scale=scale)
    ours = accumulated(small(load_model('phase2_triton'), **options), dtype, scale=scale)
    assert '\nusing Triton-accelerated LayerNorm' in capsys.readouterr().out
    # 16 bits round logits of size 1 by up to 4e-3
    assert ours[0] == pytest.approx(truth[0], rel=1e-6 if dtype == f32 else 3e-3)
    # a residual stream of 16 bits is rounded at each addition, which the reference does not do
    assert_no_worse(ours[1], theirs[1], truth[1], dtype, factor=4.0 if options.get('half_residual') else 2.0)


@pytest.mark.parametrize('frozen', ['wte', 'c_attn', 'all but ln_f'])
def test_frozen_parameters(frozen):
    """As in finetuning: a frozen weight gets no gradient, and the others do not change."""
    full = accumulated(small(load_model('phase2_triton')), f32, micro_steps=1)
    model = small(load_model('phase2_triton'))
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name if frozen != 'all but ln_f' else 'ln_f' in name)
    losses, grads = accumulated(model, f32, micro_steps=1)
    assert losses == full[0] and 0 < len(grads) < len(full[1])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for name, grad in grads.items():
        # torch.compile fuses a frozen layer's matmuls differently
        torch.testing.assert_close(grad, full[1][name], rtol=1e-5, atol=1e-8)


def test_hooks_see_each_gradient_once_and_complete():
    """
    DDP and FSDP rely on this: a hook runs once per backward, and for the shared weight after both of its users have
    added to it.
    """
    model, seen = small(load_model('phase2_triton')), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
    for k, (x, y) in enumerate(batches(2)):
        seen.clear()
        with autocast(bf16):
            model(x, y)[1].backward()
        assert sorted(name for name, _ in seen) == sorted(name for name, _ in model.named_parameters())
        for name, grad in seen:
            assert torch.equal(grad, model.get_parameter(name).grad), f'{name} in backward {k}'


def as_on_a_gpu(monkeypatch):
    """Makes Linear's backward on a CPU work as on a GPU: it takes weight.grad, adds to it, and returns it."""
    import kernels.cross_entropy
    import kernels.linear

    def weight_gradient(weight, dy, x):
        grad, new = kernels.linear.take_gradient(weight), dy.t().float() @ x.float()
        return new if grad is None else grad.add_(new)

    for module in () if gpu else (kernels.linear, kernels.cross_entropy):
        monkeypatch.setattr(module, 'weight_gradient', weight_gradient)


@pytest.mark.parametrize(
    'asked',
    ['grad of wpe', 'grad of c_fc and wte', 'grad of ln_f', 'backward to wpe', 'backward to c_fc', 'hooks', 'untied'],
)
def test_gradients_where_not_all_are_wanted(asked, monkeypatch):
    """
    autograd.grad returns the gradients of its loss alone and does not touch weight.grad; backward(inputs=...) adds to
    those alone; a hook sees each backward's gradient before it is added. Compared with the reference; bfloat16's
    rounding moves a gradient by 1%.
    """
    as_on_a_gpu(monkeypatch)
    results = []
    for use_triton in (True, False):
        model = small(load_model('phase2_triton'), use_triton=use_triton, n_layer=1)
        wte, wpe, ln_f = model.transformer.wte.weight, model.transformer.wpe.weight, model.transformer.ln_f.weight
        c_fc = model.transformer.h[0].mlp.c_fc.weight
        if asked == 'untied':
            model.lm_head.weight = nn.Parameter(wte.detach().clone())
        if asked == 'hooks':
            for p in (wte, c_fc):
                p.register_hook(lambda grad: grad * 0.5)
        returned = []
        for k, (x, y) in enumerate(batches(3)):
            with autocast(bf16):
                loss = model(x, y)[1]
            if k != 1 or asked == 'hooks':
                loss.backward()
            elif asked.startswith('backward'):
                loss.backward(inputs=[wpe if 'wpe' in asked else c_fc])
            else:
                of = {'grad of wpe': [wpe], 'grad of ln_f': [ln_f], 'untied': [model.lm_head.weight, wte]}.get(
                    asked, [c_fc, wte]
                )
                returned = torch.autograd.grad(loss, of)
        results.append([*returned, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm() + 1e-6


def test_gradients_stay_where_they_are():
    """
    An existing gradient is added to in place, so a CUDA graph or DDP's bucket that holds its memory still sees it.
    """
    model = small(load_model('phase2_triton'))
    accumulated(model, bf16, micro_steps=1)
    before = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    accumulated(model, bf16, micro_steps=1)
    assert {name: p.grad.data_ptr() for name, p in model.named_parameters()} == before


def test_evaluation_and_sampling():
    """Evaluation returns logits, and sampling draws the reference's tokens."""
    results = []
    for folder in ('nanoGPT', 'phase2_triton'):
        model = small(load_model(folder)).eval()
        (x, y), *_ = batches(1)
        with torch.no_grad():
            logits, loss = model(x, y)
            torch.manual_seed(1)
            results.append((logits, loss, model.generate(x[:, :3], BLOCK + 4, top_k=5)))
    assert results[1][0].shape == (2, BLOCK, VOCABULARY)
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][2], results[1][2])


def test_learns_like_the_reference():
    """
    Losses of some steps of AdamW on one batch, with clipping. As they fall from 4.2, they may drift apart by bfloat16's
    rounding.
    """
    curves = []
    for folder, options in (('nanoGPT', {}), ('phase2_triton', {}), ('phase2_triton', {'half_residual': True})):
        model = small(load_model(folder), **options)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device)
        curve = []
        for _ in range(30 if gpu else 6):
            (loss,), _ = accumulated(model, bf16, micro_steps=1)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append(loss)
        curves.append(curve)
    reference, *others = curves
    assert reference[0] > 4 and reference[-1] < (1.2 if gpu else 2.8)
    for curve in others:
        assert curve == pytest.approx(reference, abs=0.1)


@contextmanager
def process_group():
    import torch.distributed as dist

    dist.init_process_group('nccl' if gpu else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('dtype', [f32, bf16])
def test_wrapped(dtype, monkeypatch):
    """torch.compile with fullgraph, DDP and FSDP2 (one process) give the plain model's loss and gradients."""
    from torch.distributed.fsdp import fully_shard

    as_on_a_gpu(monkeypatch)
    module = load_model('phase2_triton')
    expected = accumulated(small(module), dtype, micro_steps=2)
    compiled = torch.compile(small(module), fullgraph=True, backend='inductor' if gpu else 'aot_eager')
    results = {'compiled': accumulated(compiled, dtype, micro_steps=2)}
    with process_group() as dist:
        results['DDP'] = accumulated(
            nn.parallel.DistributedDataParallel(small(module), gradient_as_bucket_view=True), dtype, micro_steps=2
        )
        sharded = small(module)
        mesh = dist.device_mesh.init_device_mesh(device, (1,))
        for block in sharded.transformer.h:
            fully_shard(block, mesh=mesh)
        results['FSDP2'] = accumulated(fully_shard(sharded, mesh=mesh), dtype, micro_steps=2)
        results['FSDP2'][1].update((name, grad.full_tensor()) for name, grad in results['FSDP2'][1].items())
    for wrapper, (losses, grads) in results.items():
        # 16 bits round logits of size 1 by up to 4e-3
        assert losses == pytest.approx(expected[0], rel=1e-5 if dtype == f32 else 3e-3), wrapper
        grads = {name.removeprefix('_orig_mod.').removeprefix('module.'): grad for name, grad in grads.items()}
        for name, grad in expected[1].items():
            error = (grads[name] - grad).norm() / grad.norm()
            # bfloat16's rounding moves them by 1%
            assert error < (1e-4 if dtype == f32 else 0.05), f'{wrapper}: {name}: {error:.1e}'


def test_compiling_in_place_is_declined(capsys):
    """train.py calls model.compile(), which does nothing where the kernels run."""
    module = load_model('phase2_triton')
    model, plain = small(module), small(module, use_triton=False)
    for each in (model, plain):
        each.compile(backend='aot_eager')
    assert 'not compiled after all: ' in capsys.readouterr().out
    assert model._compiled_call_impl is None and plain._compiled_call_impl is not None


@pytest.mark.parametrize(
    'folder, losses_of_one_backward',
    [('nanoGPT', 1), ('phase2_triton', 1), pytest.param('phase2_triton', 2, marks=[] if gpu else pytest.mark.full)],
)
def test_captured_micro_steps(folder, losses_of_one_backward, monkeypatch):
    """
    Replayed CUDA graphs create gradients and add to them as plain micro-steps would, with weights that the optimizer
    has changed since. So does a plain micro-step after them, like the last one under DDP. Without a GPU, the graphs are
    fakes.
    """
    import cuda_graph
    import kernels.cross_entropy
    import kernels.linear

    as_on_a_gpu(monkeypatch)
    if not gpu:
        fake_cuda_graph.install(monkeypatch)
        monkeypatch.setattr(cuda_graph, 'WARMUP', 1)
    results = []
    for captured in (True, False):
        model = small(load_model(folder), n_layer=1)
        optimizer, losses = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device), []

        def micro_step(x, y):
            with autocast(bf16):
                loss = sum(model(x, y)[1] for _ in range(losses_of_one_backward))
            loss.backward()
            return loss.detach()

        step = cuda_graph.MicroStep(micro_step, model, capture=captured)
        with torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext():
            for i, count in enumerate((2, 2, 2, 2, 3, 1) if gpu else (2, 2, 2, 3)):
                if captured and i == 2:
                    step.release()  # as for an evaluation
                    assert not any(hasattr(p, 'rounded') for p in model.parameters())
                losses += [(micro_step if k == 2 else step)(x, y).item() for k, (x, y) in enumerate(batches(count))]
                grads = [p.grad.clone() for p in model.parameters()]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        results.append((losses, grads))
        assert not captured or len(step.graphs) == 2
        # without graphs, no rounded weights are kept
        for module in (kernels.linear, kernels.cross_entropy):
            monkeypatch.setattr(module, 'rounded', lambda weight, dtype: weight.to(dtype))
    if gpu:
        torch.cuda.synchronize()
        # the embedding's backward adds up with atomics, in any order
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        for a, b in zip(results[0][1], results[1][1]):
            assert (a - b).norm() <= 1e-2 * a.norm()
    else:
        assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1], results[1][1]))


def test_too_little_memory_for_a_capture(monkeypatch):
    """The error says that memory ran out, not that an operation cannot be captured."""
    import cuda_graph

    as_on_a_gpu(monkeypatch)
    if not gpu:
        fake_cuda_graph.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, 'WARMUP', 0)
    raised = (
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.'),
        RuntimeError('CUBLAS_STATUS_ALLOC_FAILED'),
    )
    for error, expected in (
        *((e, type(e)) for e in raised),
        (RuntimeError('operation not permitted'), cuda_graph.UserError),
    ):

        def micro_step(x, y, error=error):
            raise error

        step = cuda_graph.MicroStep(micro_step, small(load_model('nanoGPT'), n_layer=1), capture=True)
        with torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext(), pytest.raises(expected) as caught:
            step(*batches(1)[0])
        assert type(caught.value) is expected


def test_garbage_does_not_spoil_a_capture(monkeypatch):
    """
    Python's garbage collector may run during a capture. A CUDA graph that it destroys then would make the capture fail,
    so no garbage may be left from before.
    """
    import cuda_graph

    as_on_a_gpu(monkeypatch)
    capturing, destroyed = torch.cuda.is_current_stream_capturing, []
    if not gpu:
        fake_cuda_graph.install(monkeypatch)
        capturing = lambda: fake_cuda_graph.recording is not None
    monkeypatch.setattr(cuda_graph, 'WARMUP', 0)

    class Cycle:
        def __init__(self, old):
            self.old, self.itself = old, self

        def __del__(self):
            destroyed.append(capturing())

    def micro_step(x, y):
        gc.collect()  # as it may at any time
        loss = model(x, y)[1]
        loss.backward()
        return loss.detach()

    with torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext():
        model = small(load_model('nanoGPT'), n_layer=1)
        (batch,) = batches(1)
        micro_step(*batch)
        model.zero_grad()
        old, new = (cuda_graph.MicroStep(micro_step, model, capture=True) for _ in range(2))
        old(*batch)
        model.zero_grad()
        gc.disable()
        try:
            Cycle(old)
            del old
            new(*batch)
        finally:
            gc.enable()
    assert destroyed == [False]


class OneOfTwoRanks(torch.distributed.ProcessGroup):
    """Plays the other rank for DDP: its gradients are zeros, so the mean is half of this rank's."""

    def __init__(self):
        super().__init__(0, 2)

    def done(self, tensors, *_):
        future = torch.futures.Future()
        future.set_result(tensors)
        return torch._C._distributed_c10d._create_work_from_future(future)

    allreduce = broadcast = done

    def allgather(self, outputs, inputs, options):
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self.done(outputs)

    def size(self):
        return 2

    getSize = size

    def rank(self):
        return 0

    getRank = rank

    def getBackendName(self):
        return 'one of two'


@pytest.mark.parametrize(
    'folder, micro_steps',
    [
        ('nanoGPT', 1),
        ('nanoGPT', 2),
        ('nanoGPT', 5),
        pytest.param('phase2_triton', 3, marks=[] if gpu else pytest.mark.full),
    ],
)
def test_captured_under_ddp(folder, micro_steps, monkeypatch):
    """
    All micro-steps are captured, even the last, in which DDP communicates. Gradients are then in DDP's buckets, as
    without graphs. After the first iteration, DDP reorders its buckets, which communicates and waits for the GPU: no
    graph may contain that, and nothing may keep the old buckets.
    """
    import cuda_graph

    as_on_a_gpu(monkeypatch)
    ranks = 1 if gpu else 2
    capturing, ordered = torch.cuda.is_current_stream_capturing, []
    if not gpu:
        fake_cuda_graph.install(monkeypatch)
        capturing = lambda: fake_cuda_graph.recording is not None
        monkeypatch.setattr(cuda_graph, 'WARMUP_DDP', 2)
    monkeypatch.setattr(
        torch.nn.parallel.distributed.logger, 'info', lambda message, *_: ordered.append((message, capturing()))
    )
    with process_group(), torch.cuda.stream(torch.cuda.Stream()) if gpu else nullcontext():
        model, plain = (small(load_model(folder), n_layer=1) for _ in range(2))
        ddp = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, process_group=None if gpu else OneOfTwoRanks()
        )
        ddp_calls = []
        ddp.register_forward_pre_hook(lambda *_: ddp_calls.append(capturing()))

        def micro_step(x, y, model=ddp):
            with autocast(bf16) if folder == 'phase2_triton' else nullcontext():
                loss = model(x, y)[1]
            loss.backward()
            return loss.detach()

        graph, buckets = cuda_graph.MicroStep(micro_step, ddp, capture=True), set()
        for i in range(cuda_graph.WARMUP_DDP + 4):
            if i == cuda_graph.WARMUP_DDP + 2:
                graph.release()  # as for an evaluation
            for k, (x, y) in enumerate(batches(micro_steps)):
                ddp.require_backward_grad_sync = k == micro_steps - 1
                torch.testing.assert_close(graph(x, y), micro_step(x, y, plain), rtol=1e-3, atol=0)
            for ours, theirs in zip(model.parameters(), plain.parameters()):
                # on a GPU the embedding adds up with atomics
                torch.testing.assert_close(
                    ours.grad * ranks, theirs.grad, rtol=1e-3, atol=1e-5 if folder == 'nanoGPT' else 1e-3
                )
            assert i > 0 or not graph.gradients
            if i > 0:
                buckets.add(tuple(p.grad.data_ptr() for p in model.parameters()))
            for p in (*model.parameters(), *plain.parameters()):
                p.grad = None
    assert [during for message, during in ordered if 'rebuilt' in message] == [False]
    assert len(buckets) == 1
    assert len(graph.graphs) == min(3, micro_steps)
    # launched before the recordings only, of which there were two; all else is replayed
    assert ddp_calls == [False] * (cuda_graph.WARMUP_DDP * micro_steps) + [True] * (2 * min(3, micro_steps))


def test_kernels_run_here():
    assert available(device)


@pytest.mark.parametrize('samples, options', [(1, dict()), (3, dict(bias=False, gelu='tanh'))])
def test_sampling_with_a_cache(samples, options, monkeypatch):
    """
    The greedy text is model.generate's. Kernels compute the steps, unless there are too many samples for them.
    """
    model = small(load_model('phase2_triton'), block_size=16, **options).eval()
    for p in model.parameters():  # large enough that the text depends on all earlier tokens
        p.data += 0.3 * torch.randn_like(p)
    prompt = torch.randint(VOCABULARY, (1, 5), device=device)
    expected = model.generate(prompt, 14, temperature=0)
    decode, steps = kv_cache.KVCache.decode, []
    monkeypatch.setattr(kv_cache.KVCache, 'decode', lambda self, token: steps.append(0) or decode(self, token))
    assert torch.equal(kv_cache.generate(model, prompt, samples, 14, temperature=0), expected.expand(samples, -1))
    assert not steps
    kv_cache.generate(model, prompt, MAX_SAMPLES + 1, 3, cuda_graph=False)
    assert len(steps) == 2
