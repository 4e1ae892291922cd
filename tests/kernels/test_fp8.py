"""FP8: the quantization against PyTorch's conversions, the scales from step to step, and a model that trains in FP8."""

import contextlib

import pytest
import torch
from numerics import bf16, device, f16, f32, gpu
from test_triton_model import accumulated, autocast, batches, load_model, process_group, small
from torch import nn

import fake_cuda_graph
from kernels import fp8, fp8_linear
from kernels.add_layer_norm import add_layer_norm
from kernels.cross_entropy import GRADIENT_SCALE, launch_cross_entropy
from kernels.fp8 import DECAY, E4M3, E5M2, HEADROOM, Scales, Slot, quantize, quantize_weight
from kernels.gelu import gelu

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
GPU_WITHOUT_FP8 = gpu and torch.cuda.get_device_capability() < fp8.MIN_CAPABILITY
pytestmark = pytest.mark.skipif(GPU_WITHOUT_FP8, reason='needs compute capability 8.9')


def bits(t):
    return t.view(torch.uint8)


def scales_of(*peaks):
    """Scales in the middle of a run in which each slot's largest value so far was its peak, and the row of each."""
    scales = Scales(len(peaks))
    scales.begin(torch.device(device), True)
    for slot, peak in enumerate(peaks):
        quantize(torch.tensor([0.0, -peak], device=device, dtype=bf16), Slot(scales, slot))
    scales.begin(torch.device(device), True)
    return scales


def measured(scales):
    return scales.state[:-1, 2].tolist()


@pytest.mark.parametrize('number, dtype', [(0, E4M3), (1, E5M2)])
@pytest.mark.parametrize('peak', [1.0, 3.0, 1e-6, 1e6])
def test_quantization(number, dtype, peak):
    """
    Equal bits: a scale of 2^k changes no digit, and then both round to the nearest. Values that are too large are
    clamped, and NaN stays.
    """
    scales = scales_of(peak, peak)
    _, scale, *_ = scales.state[number].tolist()
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item()), 'a power of two'
    assert LARGEST[dtype] / 2 < scale * peak * HEADROOM[number] <= LARGEST[dtype], (
        'no more headroom than asked for, but for the rounding'
    )
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * peak / 4
    tiny = torch.logspace(-12, 0, 500) * peak
    special = torch.tensor([float('nan'), float('inf'), -float('inf'), 0.0, -0.0, peak, 5 * peak, -100 * peak])
    x = torch.cat((x, tiny, -tiny, special)).to(device, bf16)
    q, inverse_scale, _ = quantize(x, Slot(scales, number))
    assert q.dtype == dtype and inverse_scale.item() * scale == 1.0
    expected = (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    assert torch.equal(bits(q), bits(expected))
    assert measured(scales)[number] != measured(scales)[number], 'NaN is the largest of all'


def test_a_weight_is_quantized_with_its_own_largest_value():
    for shape in ((48, 80), (1040, 16), (16, 16)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
        rows, columns, inverse_scale = quantize_weight(weight)
        assert torch.equal(bits(rows.t()), bits(columns)) and columns.is_contiguous()
        assert 224 < (weight.abs().max() / inverse_scale).item() <= 448
        assert torch.equal(bits(rows), bits((weight / inverse_scale).to(E4M3)))
    assert quantize_weight(torch.zeros(16, 16, device=device)).inverse_scale == 1.0


def assert_is_fp8_of(ready, x, scales, number):
    """
    Asserts that ready is x in fp8, where x has been rounded to bfloat16 and ready has not, and that x was measured.
    """
    # half a unit in the last place of e4m3 is 1/16, of e5m2 1/8; bfloat16 has rounded by 1/256, in the
    # interpreter 1/128
    rtol = 0.13 if number % 2 else 0.07
    largest = LARGEST[ready.q.dtype] * ready.inverse_scale.item()
    torch.testing.assert_close(
        ready.q.float() * ready.inverse_scale, x.float().clamp(-largest, largest), rtol=rtol, atol=2**-17 * largest
    )
    assert measured(scales)[number] == pytest.approx(x.abs().max().item(), rel=2**-7)


@pytest.mark.parametrize('N', [64, 768, 1000, *([1024, 1280, 1600] if gpu else [1600])])
@pytest.mark.parametrize('residual', [f32, bf16])
def test_layer_norm_writes_fp8_too(N, residual):
    """Forward for the matmul that follows, backward for the one before. The other results do not change."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for with_fp8 in (True, False):
        generator.manual_seed(0)
        x, branch = (torch.randn(7, N, generator=generator).to(device, dtype) for dtype in (residual, bf16))
        weight, bias = (torch.randn(N, generator=generator).to(device).requires_grad_() for _ in range(2))
        scales = scales_of(2.0, 0.5)  # some of y and of dx is clamped
        x.requires_grad_()
        branch.requires_grad_()
        seen = {}
        branch_before = branch * 1
        branch_before.register_hook(lambda grad: seen.update(dy=grad))
        slots = (Slot(scales, 0), Slot(scales, 1)) if with_fp8 else ()
        total, y = add_layer_norm(x, branch_before, weight, bias, 1e-5, bf16, *slots)
        torch.autograd.backward((total, y), (torch.ones_like(total), torch.ones_like(y) * 0.1))
        if with_fp8:
            for number, tensor in enumerate((y, seen['dy'])):
                assert_is_fp8_of(vars(tensor).pop('fp8'), tensor.detach(), scales, number)
        results.append([t.detach() for t in (total, y, seen['dy'], x.grad, weight.grad, bias.grad)])
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results):
        # the kernel that also writes fp8 may sum a row in another order, which rounds a few results to their neighbours
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == bf16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize('approximate', ['none', 'tanh'])
def test_gelu_writes_fp8_too(approximate):
    results = []
    for with_fp8 in (True, False):
        x = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3).to(device, bf16).requires_grad_()
        scales, seen = scales_of(1.0, 0.25), {}
        before = x * 1
        before.register_hook(lambda grad: seen.update(dx=grad))
        y = gelu(before, approximate, *((Slot(scales, 0), Slot(scales, 1)) if with_fp8 else ()))
        y.backward(torch.ones_like(y))
        if with_fp8:
            for number, tensor in enumerate((y, seen['dx'])):
                assert_is_fp8_of(vars(tensor).pop('fp8'), tensor.detach(), scales, number)
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize('V', [80, 50304 if gpu else 1040])
def test_loss_writes_fp8_too(V):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, V, generator=generator) * 4).to(device, bf16)
    targets = torch.randint(V, (9,), generator=generator).to(device)
    targets[4] = -1
    alone, q = logits.clone(), torch.empty(logits.shape, dtype=E5M2, device=device)
    losses = launch_cross_entropy(logits, targets, -1, True, q=q)
    assert torch.equal(losses, launch_cross_entropy(alone, targets, -1, True)) and torch.equal(logits, alone)
    # e5m2 has 2 bits after the first: half a unit in the last place is an eighth, and bfloat16 has rounded before
    torch.testing.assert_close(q.float() / GRADIENT_SCALE, logits.float(), rtol=0.13, atol=2**-17 / GRADIENT_SCALE)


def test_scales_follow_the_values():
    """
    The scale of a step comes from the steps before. A larger value is clamped once and counted; a smaller one
    lowers the peak slowly.
    """
    scales = scales_of(1.0)
    slot = Slot(scales, 0)

    def step(*values):
        q, inverse_scale, _ = quantize(torch.tensor(values, device=device, dtype=bf16), slot)
        result = (q.float() * inverse_scale).tolist()
        scales.begin(torch.device(device), True)
        return result

    assert step(1.0, -1.5) == [1.0, -1.5] and scales.log()['fp8_clamped'] == 0, 'within the headroom'
    assert step(100.0) == [3.5] and scales.log()['fp8_clamped'] == 1, 'clamped to the largest number, 448 / 128'
    assert step(100.0, 120.0) == [96.0, 120.0] and scales.log()['fp8_clamped'] == 1, (
        'the next step has the new scale; 100 rounds to 96'
    )
    for _ in range(3):
        step(1.0)
    assert scales.state[0, 3].item() == pytest.approx(120 * DECAY**3)
    before = scales.state[0].tolist()
    scales.begin(torch.device(device), True)
    assert scales.state[0].tolist() == before, 'a tensor that was not there keeps its scale'
    for bad in (float('nan'), float('inf')):
        step(1.0, bad)
        assert scales.state[0].tolist() == before, 'keeps its scale, too'
    assert scales.log()['fp8_clamped'] == 3
    assert step(1.0) == [1.0]
    assert scales.log()['fp8_clamped'] == 3


def test_all_zeros():
    """They tell nothing about the scale, and stay zeros. The first other values are quantized with UNMEASURED."""
    scales = scales_of(0.0, 0.0)
    for slot, (scale, values) in enumerate(((1.0, [448.0, 1.0]), (2.0**20, [2.0**-5, 2.0**-36]))):
        assert quantize(torch.zeros(5, device=device, dtype=bf16), Slot(scales, slot)).q.float().tolist() == [0.0] * 5
        assert scales.state[slot].tolist() == [1 / scale, scale, 0.0, 0.0]
        q, inverse_scale, _ = quantize(torch.tensor(values, device=device, dtype=bf16), Slot(scales, slot))
        assert (q.float() * inverse_scale).tolist() == values
    quantize(torch.tensor([0.125], device=device, dtype=bf16), Slot(scales, 1))
    scales.begin(torch.device(device), True)
    assert scales.log() == {'fp8_clamped': 1}, '0.125 is too large for it'


def test_scales_saved_before_there_are_any():
    """After the micro-step that only measures, a resumed run continues with its measurements."""
    scales, resumed = Scales(2), Scales(2)
    scales.begin(torch.device(device), True)
    quantize(torch.tensor([3.0], device=device, dtype=bf16), Slot(scales, 0))
    resumed.load(scales.save())
    for each in (scales, resumed):
        each.begin(torch.device(device), True)
        assert not each.measuring and each.state[0].tolist() == [1 / 64, 64.0, 0.0, 3.0]
    assert torch.equal(scales.state, resumed.state)


OPTIONS = [
    {},
    {'half_residual': True, 'bias': False, 'activation_checkpointing': True},
    pytest.param({'loss_rows': 7}, marks=[] if gpu else pytest.mark.full),
    pytest.param({'dropout': 0.1}, marks=[] if gpu else pytest.mark.full),
]


def eight_bits(**options):
    return small(load_model('phase2_triton'), **{'vocab_size': 80, 'fp8': True, **options})


def train(model, steps, first=0, micro_step=None):
    """Losses of some optimizer steps of two micro-steps each, and the last gradients."""
    optimizer, losses = model.optimizer, []

    def forward_backward(x, y):
        with autocast(bf16):
            loss = model(x, y)[1]
        loss.backward()
        return loss.detach()

    for data in batches(2 * (first + steps))[2 * first :]:
        losses.append((micro_step or forward_backward)(*data).item())
        if len(losses) % 2 == 0:
            grads = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses, grads


def with_optimizer(model):
    model.optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    return model


@pytest.mark.parametrize('options', OPTIONS)
def test_a_model_in_fp8(options, capsys):
    """
    The first micro-step is bfloat16's, bit for bit; later gradients are as near to bfloat16's as 2 or 3 bits allow.
    """
    (first, *later), grads = train(with_optimizer(eight_bits(**options)), 2)
    assert 'using FP8 in forward and for input gradients\n' in capsys.readouterr().out
    (expected, *others), bf16_grads = train(with_optimizer(eight_bits(**options, fp8=False)), 2)
    assert first == expected and later != others
    assert later == pytest.approx(others, rel=5e-3)  # each product is off by up to 6%, in either direction
    for (name, _), a, b in zip(eight_bits(**options).named_parameters(), grads, bf16_grads):
        assert (a - b).norm() <= 0.2 * b.norm(), name  # e5m2 rounds by up to 12%


def test_layers_whose_quantization_does_not_pay_stay_in_bfloat16(monkeypatch):
    """Each matmul in FP8 is counted, by its formats."""
    calls, original = [], torch._scaled_mm

    def counted(a, b, *args, **kwargs):
        calls.append((a.dtype, kwargs['use_fast_accum']))
        return original(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, '_scaled_mm', counted)
    for min_width, vocabulary, each_block in ((1024, 80, (3, 3)), (64, 80, (4, 4)), (1024, 65, (3, 3))):
        monkeypatch.setattr(fp8_linear, 'OWN_KERNEL_MIN_WIDTH', min_width)
        calls.clear()
        model = eight_bits(vocab_size=vocabulary)
        accumulated(model, bf16, micro_steps=1)
        assert not calls, 'it only measures'
        accumulated(model, bf16, micro_steps=1)
        head = vocabulary % 16 == 0
        assert calls.count((E4M3, True)) == 2 * each_block[0] + head
        assert calls.count((E5M2, False)) == 2 * each_block[1] + head
        model.eval()
        with torch.no_grad(), autocast(bf16):
            calls.clear()
            model(*batches(1)[0])
        assert not calls, 'evaluation is in bfloat16'


@pytest.mark.parametrize('unmeasured', ['no targets', 'frozen'])
def test_gradients_that_the_first_micro_step_does_not_measure(unmeasured):
    """They are quantized nevertheless in the second, where they are as small as in a large batch."""
    results = []
    for in_fp8 in (True, False):
        model = eight_bits(n_layer=1, fp8=in_fp8)
        for k, (x, y) in enumerate(batches(2)):
            for name, p in model.named_parameters():
                p.requires_grad_(k == 1 or unmeasured == 'no targets' or 'ln_f' in name)
            with autocast(bf16):
                loss = model(x, torch.full_like(y, -1) if k == 0 and unmeasured == 'no targets' else y)[1]
            model.zero_grad()
            (loss / 4096).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in results[1].items():
        assert (results[0][name] - grad).norm() <= 0.2 * grad.norm(), name  # e5m2 rounds by up to 12%


@contextlib.contextmanager
def launches_of_quantize(monkeypatch):
    """A list of the kernels that only quantize an activation or gradient, or a weight, as they are launched."""
    launched, original = [], fp8.launch

    def noting_launch(kernel, *args):
        if kernel is not fp8.update_kernel:
            launched.append(kernel)
        original(kernel, *args)

    with monkeypatch.context() as patch:
        patch.setattr(fp8, 'launch', noting_launch)
        yield launched


@pytest.mark.parametrize(
    'options, per_block',
    [
        ({}, 0),
        ({'half_residual': True, 'bias': False, 'activation_checkpointing': True}, 0),
        ({'min_width': 64}, 2),  # attention's output and its packed gradient
        ({'dropout': 0.1}, 2),  # between both projections and the residual LayerNorms, which write the gradients
    ],
    ids=['narrow', 'checkpointed', 'wide', 'dropout'],
)
def test_producers_leave_little_to_quantize(monkeypatch, options, per_block):
    """
    The kernels that write activations and gradients write their fp8 forms too, and the matmuls take those. If one did
    not, training would slow down without another sign.
    """
    monkeypatch.setattr(fp8_linear, 'OWN_KERNEL_MIN_WIDTH', options.pop('min_width', 1024))
    model = eight_bits(n_layer=2, **options)
    for _ in range(2):  # the first only measures
        with launches_of_quantize(monkeypatch) as launched:
            accumulated(model, bf16, micro_steps=1)
        assert launched.count(fp8.quantize_kernel) == 2 * per_block
    recomputed = 2 if options.get('activation_checkpointing') else 1
    assert launched.count(fp8.quantize_weight_kernel) == 2 * 4 * recomputed + 1  # and the head


def test_recorded_micro_steps(monkeypatch):
    """
    CUDA graphs hold the updates of the scales, and quantize weights once an iteration. Without a GPU, the graphs
    are faked.
    """
    import cuda_graph

    if not gpu:
        fake_cuda_graph.install(monkeypatch)
        monkeypatch.setattr(cuda_graph, 'WARMUP', 1)
    results = []
    for recorded in (True, False):
        model = with_optimizer(eight_bits(n_layer=1))

        def micro_step(x, y, model=model):
            with autocast(bf16):
                loss = model(x, y)[1]
            loss.backward()
            return loss.detach()

        step = cuda_graph.MicroStep(micro_step, model, capture=recorded)
        with (
            torch.cuda.stream(torch.cuda.Stream()) if gpu else contextlib.nullcontext(),
            launches_of_quantize(monkeypatch) as launched,
        ):
            losses = train(model, 2, micro_step=step)[0] + train(model, 2, 2, micro_step=step)[0]
            state = model.rank_state.save()['model'].clone()
            step.release()
            assert fp8.quantize_kernel not in launched
            assert not any(hasattr(p, 'quantized') or hasattr(p, 'rounded') for p in model.parameters())
        results.append((losses, state))
    if gpu:  # the embedding's backward adds up with atomics, in any order
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    else:
        assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_resuming_is_exact(tmp_path, capsys):
    """
    Through a checkpoint's extra key, with its checks. A checkpoint without scales, or with those of another model,
    measures again.
    """
    from checkpoint_fields import check_fields
    from resume import load_rank_state, rank_state

    model = with_optimizer(eight_bits(n_layer=1))
    train(model, 2)
    tokens = batches(1)[0][0].cpu()
    state = {k: v.cpu() for k, v in rank_state(device, tokens, tokens, model).items()}
    sizes = {k: getattr(model.config, k) for k in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')}
    saved = dict(model=model.state_dict(), model_args=sizes, iter_num=2, optimizer=model.optimizer.state_dict())
    torch.save({**saved, 'resume': {'ranks': [state]}}, tmp_path / 'ckpt.pt')
    expected = train(model, 2, 2)
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True, map_location='cpu')
    checkpoint = check_fields(checkpoint, 'ckpt.pt', to_resume=True)

    def resumed(checkpoint):
        model = with_optimizer(eight_bits(n_layer=1))
        model.load_state_dict(checkpoint['model'])
        model.optimizer.load_state_dict(checkpoint['optimizer'])
        load_rank_state(model, checkpoint)
        return model

    again = train(resumed(checkpoint), 2, 2)
    if not gpu:  # the embedding's backward adds up with atomics, in any order
        assert again[0] == expected[0] and all(map(torch.equal, again[1], expected[1]))
    assert again[0] == pytest.approx(expected[0], rel=1e-3)
    assert 'measured again' not in capsys.readouterr().out
    scales = checkpoint['resume']['ranks'][0]['model']
    message = 'the checkpoint has no FP8 scales for this model and number of ranks: they are measured again\n'
    for wrong in (None, scales[1:], scales * float('nan'), scales.double()):
        checkpoint['resume']['ranks'][0]['model'] = wrong
        model = resumed(checkpoint)
        assert model.rank_state.save() == {}
        with autocast(bf16):
            model(*batches(1)[0])
        assert capsys.readouterr().out.count(message) == 1
    checkpoint['resume']['ranks'] *= 2  # another world size
    assert resumed(checkpoint).rank_state.save() == {}


@pytest.mark.parametrize('dtype, why', [(f32, 'this run is in float32'), (f16, 'this run is in float16')])
def test_without_bfloat16(dtype, why, capsys):
    model = eight_bits()
    losses, grads = accumulated(model, dtype)
    assert f'not using FP8: it takes the place of bfloat16, and {why}\n' in capsys.readouterr().out
    expected, expected_grads = accumulated(eight_bits(fp8=False), dtype)
    assert losses == expected and (gpu or all(torch.equal(grads[k], expected_grads[k]) for k in grads))
    assert model.rank_state.save() == {} and model.rank_state.log() == {'fp8_clamped': 0}


def test_an_older_gpu(monkeypatch):
    monkeypatch.setattr(fp8, 'unavailable_reason', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'A100')
    reason = fp8.unsupported_reason.__wrapped__(torch.device('cuda', 0), bf16)
    assert reason == 'A100 has compute capability 8.0, FP8 needs 8.9'


def test_wrapped_in_fp8(monkeypatch):
    """DDP, and FSDP2 that gathers weights in bfloat16 as phase3_fsdp does, compute as the plain model does."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = {}
    with process_group() as dist:
        mesh = dist.device_mesh.init_device_mesh(device, (1,))
        policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=f32)
        for wrapper in ('none', 'DDP', 'FSDP2'):
            model = wrapped = eight_bits(n_layer=2)
            if wrapper == 'DDP':
                wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            if wrapper == 'FSDP2':
                for block in model.transformer.h:
                    fully_shard(block, mesh=mesh, mp_policy=policy)
                fully_shard(model, mesh=mesh, mp_policy=policy)
            losses = []
            with launches_of_quantize(monkeypatch) as launched:
                for x, y in batches(3):
                    with autocast(bf16) if wrapper != 'FSDP2' else contextlib.nullcontext():
                        loss = wrapped(x, y)[1]
                    loss.backward()
                    losses.append(loss.item())
            assert fp8.quantize_kernel not in launched
            grads = [p.grad.full_tensor() if wrapper == 'FSDP2' else p.grad for p in model.parameters()]
            assert model.rank_state.save()['model'][0, 3] > 0, 'measured'
            results[wrapper] = losses, grads
    for wrapper, (losses, grads) in results.items():
        assert losses == pytest.approx(results['none'][0], rel=3e-3), wrapper
        for a, b in zip(grads, results['none'][1]):  # FSDP2 rounds gradients and the residual stream to bfloat16
            assert (a - b).norm() <= 0.1 * b.norm(), wrapper


def test_hooks_that_change_a_tensor_in_place():
    """The fp8 form that a kernel has attached to the tensor is out of date then."""

    def halve(t):
        t.mul_(0.5)

    results = []
    for change in (halve, lambda t: t * 0.5):
        model = eight_bits(n_layer=1)
        mlp = model.transformer.h[0].mlp
        mlp.gelu.register_forward_hook(lambda module, x, y, change=change: change(y))
        mlp.c_fc.register_forward_hook(lambda module, x, y, change=change: y.register_hook(change) and None)
        losses, grads = accumulated(model, bf16)
        results.append((losses, grads['transformer.h.0.mlp.c_fc.weight'], model.rank_state.state))
    assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1:], results[1][1:]))


def test_compiled_it_is_bfloat16(capsys):
    """torch.compile cannot see into the kernels, so it gets the model without FP8."""
    model = eight_bits(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    results = [accumulated(m, bf16, micro_steps=2)[0] for m in (compiled, eight_bits(n_layer=1, fp8=False))]
    assert results[0] == pytest.approx(results[1], rel=3e-3) and model.rank_state.save() == {}
    assert capsys.readouterr().out.count('not using FP8: torch.compile cannot see into its kernels\n') == 1
