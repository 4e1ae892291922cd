"""
The cases of test_zero1.py, one function each: `zero1_cases.py CASE [ARGUMENT ...]`, started on every rank. Cases
compare Zero1Optimizer with AdamW under DDP in the same processes, and rank 0 prints the result as JSON.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'phase1_zero1'))
from model import GPT, GPTConfig
from step_guard import StepGuard
from zero1 import Zero1Optimizer

rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
device = 'cpu'


def start(backend='gloo'):
    store = dist.TCPStore('127.0.0.1', 0, is_master=True) if world_size == 1 else None  # torchrun's, otherwise
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def make_model(**changes):
    torch.manual_seed(1)
    # 67 and 48 leave remainders
    config = dict(n_layer=1, n_head=2, n_embd=48, block_size=16, vocab_size=67, bias=True) | changes
    with redirect_stdout(None):
        return GPT(GPTConfig(**config)).to(device)


def make_optimizer(model, sharded, fused=None):
    with redirect_stdout(None):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device.split(':')[0])
    if fused is not None:
        groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused)
    return Zero1Optimizer(optimizer) if sharded else optimizer


def equal(a, b):
    """Returns whether nested containers of tensors and numbers are equal in every bit; NaN equals NaN."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        a, b = a.detach().cpu(), b.detach().cpu()
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(torch.nan_to_num(a, nan=-1.5e30), torch.nan_to_num(b, nan=-1.5e30))
        )
    return a == b


def train(sharded, steps, state=None, first=0, fused=None, fp16=False, ruin=(), **changes):
    """
    Trains under DDP with weight decay, clipping, two micro-steps and a new learning rate every step. state: (model,
    optimizer) state_dicts to continue from. ruin: steps with a NaN gradient. Returns the numbers, the model and the
    optimizer.
    """
    model = make_model(**changes)
    optimizer = make_optimizer(model, sharded, fused)
    if state:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    ddp = DDP(model, gradient_as_bucket_view=True)
    device_type = device.split(':')[0]
    scaler = torch.amp.GradScaler(device_type, init_scale=2.0**10, growth_interval=7, enabled=fp16)
    step_guard = StepGuard(device, scaler)
    losses, norms = [], []
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 / (1 + step % 17)
        for micro_step in range(2):
            generator = torch.Generator().manual_seed(step * 1000 + rank * 10 + micro_step)
            x = ((torch.randint(67, (2, 1), generator=generator) + torch.arange(17)) % 67).to(device)  # easy to learn
            ddp.require_backward_grad_sync = micro_step == 1
            with torch.autocast(device_type, torch.float16, enabled=fp16):
                loss = ddp(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1] / 2
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        if step in ruin:
            model.lm_head.weight.grad.view(-1)[5] = torch.nan
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.3))
        step_guard.step(optimizer, norms[-1])
        optimizer.zero_grad(set_to_none=True)
    return (
        {'losses': losses, 'norms': norms, 'scale': scaler.get_scale(), 'params': list(model.parameters())},
        model,
        optimizer,
    )


def parity(steps, first, out, resume='', **options):
    """
    Compares AdamW under DDP with Zero1Optimizer over `steps` steps. resume: continue from the state that an earlier
    call, at any world size, left in out.
    """
    start()
    results = []
    for sharded in (False, True):
        state = None
        if resume:
            saved = torch.load(f'{resume}.{sharded}', weights_only=True, mmap=True)
            before = {i: dict(s) for i, s in saved[1]['state'].items()}
            state = saved
        numbers, model, optimizer = train(sharded, int(steps), state, int(first), **options)
        saved_optimizer = optimizer.state_dict()
        if rank == 0:
            torch.save((model.state_dict(), saved_optimizer), f'{out}.{sharded}')
        else:
            saved_optimizer = None if sharded else saved_optimizer
        untouched = not resume or all(saved[1]['state'][i][k] is v for i, s in before.items() for k, v in s.items())
        results.append((numbers, saved_optimizer, untouched))
    (ddp, ddp_state, _), (zero, zero_state, untouched) = results
    # on every rank, not only on the one that prints
    same = torch.tensor(
        [equal(ddp[k], zero[k]) for k in ddp] + [untouched, all(s.grad is None for s in optimizer.zero._all_params)]
    ).int()
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    kept = torch.tensor([sum(v.numel() for s in optimizer.zero.optim.state.values() for v in s.values() if v.dim())])
    kept_by = [torch.zeros_like(kept) for _ in range(world_size)]
    dist.all_gather(kept_by, kept)
    found = dict(zip((*ddp, 'untouched', 'grads_freed'), map(bool, same.tolist())))
    if rank == 0:
        found |= {'state': equal(ddp_state, zero_state), 'kept_by': [int(k) for k in kept_by]}
        found |= {
            'n': sum(p.numel() for p in zero['params']),
            'finite_norms': int(sum(map(torch.isfinite, zero['norms']))),
        }
        found |= {
            'first_and_last_loss': [2 * zero['losses'][i].item() for i in (0, -1)],
            'steps_counted': zero_state['state'][0]['step'].item(),
        }
        found |= {'state_bytes': optimizer.state_bytes()}
        print(json.dumps(found))
    dist.destroy_process_group()


def few_tensors():
    """More ranks than tensors, and none of them large enough for all ranks: some ranks own nothing."""
    start()
    params = []
    for sharded in (False, True):
        torch.manual_seed(2)
        p = [
            torch.nn.Parameter(torch.randn(5, 7)),
            torch.nn.Parameter(torch.randn(3)),
            torch.nn.Parameter(torch.randn(2, 2)),
        ]
        optimizer = torch.optim.AdamW(
            [{'params': [p[2], p[0]], 'weight_decay': 0.1}, {'params': p[1:2], 'weight_decay': 0.0}], lr=0.1
        )
        optimizer = Zero1Optimizer(optimizer) if sharded else optimizer
        empty = optimizer.state_dict()
        for _ in range(5):
            p[0].grad, p[1].grad = torch.randn(5, 7), torch.randn(3)  # never one for p[2]
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()
        optimizer.load_state_dict(state if not sharded else broadcast(state))
        again = optimizer.state_dict()
        params.append([empty, p, state, again])
    if rank == 0:
        print(json.dumps({'equal': equal(*params), 'owners': [piece.owner for piece in optimizer.zero.pieces]}))
    dist.destroy_process_group()


def broadcast(x):
    x = [x]
    dist.broadcast_object_list(x, src=0)
    return x[0]


SIZES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '1.5B': (48, 25, 1600)}


def table():
    """
    Computes the largest optimizer state of a rank relative to an equal share, from ZeroRedundancyOptimizer's own
    assignment, without allocating memory.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.testing._internal.distributed.fake_pg import FakeStore

    models = {}
    for name, (n_layer, n_head, n_embd) in SIZES.items():
        with torch.device('meta'), redirect_stdout(None):
            models[name] = GPT(
                GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, vocab_size=50304, bias=False)
            )
    rows = {}
    for ranks in (2, 3, 4, 6, 8, 16):
        dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
        for name, model in models.items():
            optimizer = make_optimizer(model, sharded=True)
            fullest, unsharded = optimizer.state_bytes()
            assert unsharded == 8 * sum(p.numel() for p in model.parameters())
            plain = ZeroRedundancyOptimizer(list(model.parameters()), torch.optim.AdamW, lr=1e-3)
            whole = max(sum(p.numel() for g in groups for p in g['params']) for groups in plain._partition_parameters())
            in_place = sum(whole_param.numel() for whole_param, _ in optimizer.zero.in_place) / sum(
                p.numel() for p in model.parameters()
            )
            rows[f'{name} {ranks}'] = (fullest / (unsharded / ranks), whole / (unsharded / 8 / ranks), in_place)
        dist.destroy_process_group()
    print(json.dumps(rows))


def graphs():
    """
    Counts the graphs into which torch.compile splits the model under DDP with 4 ranks: DDP, ZeroRedundancyOptimizer as
    in this project, and with parameters_as_bucket_view.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
    counts = {}
    for kind in ('ddp', 'zero1', 'bucket_view'):
        torch._dynamo.reset()
        model = make_model(n_layer=2, n_embd=192, vocab_size=256)
        make_optimizer(model, sharded=kind == 'zero1')
        if kind == 'bucket_view':
            ZeroRedundancyOptimizer(
                list(model.parameters()), torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-3
            )
        seen = []
        compiled = torch.compile(
            model, backend=partial(lambda seen, graph, inputs: seen.append(graph) or graph.forward, seen)
        )
        x = torch.zeros(1, 16, dtype=torch.long)
        DDP(compiled, bucket_cap_mb=1.1)(x, x)  # one block has 1.7 MB
        counts[kind] = len(seen)
    print(json.dumps(counts))


def gpu(out):
    """On GPUs: parity over 20 fused steps, a resume with fused AdamW, and the memory that a save takes."""
    global device
    device = f'cuda:{rank}'
    torch.cuda.set_device(rank)
    start('cpu:gloo,cuda:nccl')
    # nondeterministic operations would differ between two DDP runs too
    torch.use_deterministic_algorithms(True, warn_only=True)
    for kernel in ('flash', 'mem_efficient', 'cudnn'):
        getattr(torch.backends.cuda, f'enable_{kernel}_sdp')(False)
    shape = dict(n_layer=4, n_head=4, n_embd=512, vocab_size=50304)
    found, runs = {}, []
    for sharded in (False, True):
        numbers, model, optimizer = train(sharded, 20, **shape)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state = optimizer.state_dict()
        found[f'save_bytes {sharded}'] = torch.cuda.max_memory_allocated() - before
        if rank == 0:
            torch.save((model.state_dict(), state), f'{out}.{sharded}')
        del state
        dist.all_reduce(torch.zeros(1))  # the file exists now
        saved = torch.load(f'{out}.{sharded}', map_location='cpu', weights_only=True, mmap=True)
        del model, optimizer
        more, model, optimizer = train(sharded, 10, saved, first=20, **shape)
        runs.append((numbers, more, torch.load(f'{out}.{sharded}', map_location='cpu', weights_only=True)[1]))
        inner = optimizer.zero.optim if sharded else optimizer
        found[f'step_devices {sharded}'] = sorted({str(s['step'].device) for s in inner.state.values()})
        del model, optimizer, inner
    (ddp, ddp_more, ddp_state), (zero, zero_more, zero_state) = runs
    found |= {
        'equal': equal(ddp, zero),
        'equal after resume': equal(ddp_more, zero_more),
        'state': equal(ddp_state, zero_state),
    }
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


CASES = {
    'parity': parity,
    'fused': partial(parity, fused=True, ruin=(5, 8)),
    'plain_ruined': partial(parity, ruin=(5, 8)),
    'fp16': partial(parity, fp16=True, ruin=(5, 8)),
    'fp16_fused': partial(parity, fp16=True, fused=True, ruin=(5, 8)),
    'few_tensors': few_tensors,
    'table': table,
    'graphs': graphs,
    'gpu': gpu,
}

if __name__ == '__main__':
    CASES[sys.argv[1]](*sys.argv[2:])
