"""
Trains a GPT on one CPU or GPU, or on many with DistributedDataParallel (DDP).

One process:
$ python train.py config/train_python_char.py --batch_size=32

4 GPUs of one machine:
$ torchrun --standalone --nproc_per_node=4 train.py

2 machines of 4 GPUs; run this on both, with the host name of the first:
$ torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_id=gpt --rdzv_endpoint=HOST:29500 train.py
"""

import math
import os
import sys
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import hardware
from checkpoint import find_checkpoint, load_checkpoint, load_model, saved_options, write_checkpoint
from configurator import configure
from cuda_graph import MicroStepGraph, use_cuda_graph
from dataset import check_tokens, find_data_dir, load_meta, open_tokens
from distributed import gather_from_ranks, leave, mean_over_ranks, same_on_all_ranks, setup
from encoding import check_encoding
from errors import UserError
from out_dir import make_out_dir
from resume import load_optimizer, rank_state, restore_rank_state, resume_model_args
from run_facts import run_facts
from step_guard import StepGuard
from stop_signal import StopSignal
from training_logger import TrainingLogger

# under torchrun every rank (process) runs this file; rank 0 speaks for all
if int(os.environ.get('RANK', 0)) != 0:
    sys.stdout = open(os.devnull, 'w')

# -----------------------------------------------------------------------------
# default config values designed to train a GPT-2 (124M) on OpenWebText; each is a flag
# I/O
out_dir = 'out'  # folder of checkpoints and logs
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between printed lines and log records
eval_iters = 200  # batches of each split in an evaluation, on every rank
eval_only = False  # evaluate once and end
always_save_checkpoint = True  # save after each evaluation, not only after the best so far
init_from = 'scratch'  # scratch, resume, auto (resume if there is a checkpoint, else scratch), or a pretrained gpt2, gpt2-medium, gpt2-large, gpt2-xl
json_log = True  # write out_dir/run_*.json, for visualize_training.py
# wandb logging
wandb_log = False  # log to Weights & Biases too
wandb_project = 'owt'  # its project
wandb_run_name = 'gpt2'  # its name for this run
# data
dataset = 'openwebtext'  # folder in data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-steps of one iteration, shared out among the ranks
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens in a sequence
# model
model_dir = ''  # folder of the model.py to train, such as ../phase2_triton; empty: this one
n_layer = 12  # blocks
n_head = 12  # attention heads in each
n_embd = 768  # width of the residual stream
dropout = 0.0  # 0 is good for pretraining; for finetuning try 0.1 and more
bias = False  # biases in Linear and LayerNorm layers?
# adamw optimizer
learning_rate = 6e-4  # after the warmup, before it decays
max_iters = 600000  # number of the last iteration
weight_decay = 1e-1  # of matrices
beta1 = 0.9  # decay of the gradient's mean
beta2 = 0.95  # decay of the gradient's square
grad_clip = 1.0  # clip gradients at this norm; 0.0: do not
# learning rate decay settings
decay_lr = True  # warmup, then a cosine; False: learning_rate throughout
warmup_iters = 2000  # iterations of linear warmup
lr_decay_iters = 600000  # iteration at which the cosine ends; about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # learning rate from there on; about learning_rate / 10
# system; auto is the best that this machine has
backend = 'auto'  # nccl or gloo
dist_timeout = 600  # seconds that a rank waits for the others, which may be saving or on a machine that is gone, before the run ends
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype = 'auto'  # float32, bfloat16 or float16; the last with a gradient scaler
compile = 'auto'  # use torch.compile?
cuda_graph = 'auto'  # record forward and backward as CUDA graphs and replay them? auto: on GPUs, where possible
peak_tflops = 0.0  # peak TFLOP/s of the device, for mfu; 0: what hardware.py knows of it
config, given = configure(globals())  # overrides from the command line and config files; --help lists the flags
# -----------------------------------------------------------------------------

device, dtype, compile, backend = hardware.choose(device, dtype, compile, backend)
config.update(device=device, dtype=dtype, compile=compile, backend=backend)
device_type = device.split(':')[0]
rank, world_size = setup(backend, dist_timeout)
cuda_graph = config['cuda_graph'] = use_cuda_graph(config, world_size)
ddp = world_size > 1
master_process = rank == 0
stop_signal = StopSignal()  # from here on SIGTERM and Ctrl-C save a checkpoint first

if gradient_accumulation_steps % world_size != 0:
    raise UserError(
        f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world_size} processes'
    )
gradient_accumulation_steps //= world_size
tokens_per_iter = gradient_accumulation_steps * world_size * batch_size * block_size
print(
    f'device {hardware.device_name(device)}, dtype {dtype}, compile {compile}, processes {world_size}'
    + f' over {backend}' * (world_size > 1)
)
print(f'tokens per iteration will be: {tokens_per_iter:,}')

torch.manual_seed(1337 + rank)
ctx = hardware.autocast(device, dtype)  # matmuls in dtype; the weights stay float32

# data: files of token ids, of which each batch takes pieces at random positions
data_dir = find_data_dir(dataset)
meta = load_meta(data_dir)
tokens = {split: open_tokens(data_dir, split, block_size, meta) for split in ('train', 'val')}


def get_batch(split):
    data = tokens[split]
    ix = torch.randint(len(data) - block_size, (batch_size,))
    rows = torch.stack([torch.from_numpy(data[i : i + block_size + 1].astype(np.int64)) for i in ix])
    check_tokens(rows, model_args['vocab_size'], data_dir)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # y is x, one token later
    if device_type == 'cuda':
        # from pinned memory the copy to the GPU runs while the CPU goes on
        x, y = x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    else:
        x, y = x.to(device), y.to(device)
    return x, y


# model
iter_num = 0
best_val_loss = 1e9
checkpoint_path = find_checkpoint(out_dir)
if init_from == 'auto':
    found = mean_over_ranks(
        torch.tensor(float(os.path.exists(checkpoint_path)))
    )  # all ranks do the same, even if not all of them see it
    init_from = 'resume' if found else 'scratch'
if model_dir:
    sys.path.insert(0, model_dir)
from model import GPT, GPTConfig

model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
model_args['vocab_size'] = meta.get('vocab_size', 50304)  # GPT-2's 50257, padded for speed
model_options = {k: config[k] for k in GPTConfig.__dataclass_fields__ if k not in model_args}
if init_from == 'scratch':
    print('Initializing a new model from scratch')
    model = GPT(GPTConfig(**model_args, **model_options))
elif init_from == 'resume':
    print(f'Resuming training from {checkpoint_path}')
    checkpoint = load_checkpoint(checkpoint_path)
    model_args = resume_model_args(checkpoint, model_args, given)
    model_options = saved_options(checkpoint, model_options, given)
    model = GPT(GPTConfig(**model_args, **model_options))
    load_model(model, checkpoint)
    iter_num = same_on_all_ranks(checkpoint['iter_num'], f'the iteration of {checkpoint_path}')
    best_val_loss = checkpoint['best_val_loss']
    if iter_num > max_iters:
        print(f'nothing is left to do: iteration {iter_num} comes next, and max_iters={max_iters} is the last')
elif init_from in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
    print(f'Initializing from OpenAI GPT-2 weights: {init_from}')
    check_encoding(meta, data_dir)
    model = GPT.from_pretrained(init_from, dict(dropout=dropout, **model_options))
    model_args.update({k: getattr(model.config, k) for k in model_args})
else:
    raise UserError(
        f"init_from is '{init_from}', but it can be scratch, resume, auto, gpt2, gpt2-medium, gpt2-large or gpt2-xl"
    )
if block_size > model.config.block_size:
    raise UserError(
        f'block_size={block_size}, but the model from {init_from} takes at most {model.config.block_size} tokens'
    )
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
    model_args['block_size'] = block_size
config.update(
    {k: v for k, v in (model_args | model_options).items() if k in config}
)  # a loaded model is what it is, whatever the flags say
model.to(device)
raw_model = model  # without the wrappers below

# in float16 small gradients would vanish, so the loss is scaled up; in other dtypes the scaler does nothing
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == 'float16'))

# optimizer
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
if init_from == 'resume':
    load_optimizer(optimizer, scaler, checkpoint)
step_guard = StepGuard(device, scaler)  # leaves out steps whose gradient is not finite

if compile:
    print('compiling the model... (takes a ~minute)')
    model.compile()  # in place

# every rank computes the gradients of its own batches; DDP averages them
if ddp:
    model = DDP(model, device_ids=[device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)


def forward_backward(X, Y):
    with ctx:
        loss = model(X, Y)[1]  # a name for the logits would keep them in memory
        loss = loss / gradient_accumulation_steps
    scaler.scale(loss).backward()
    return loss.detach()


graph = MicroStepGraph(forward_backward, model) if cuda_graph else None


# mean losses over eval_iters batches of either split on every rank; None if a stop was requested meanwhile
@torch.no_grad()
def estimate_loss():
    out = {}
    if graph:
        graph.release()  # evaluation, which is not recorded, needs memory, too
    model.eval()
    for split in ['train', 'val']:
        losses = torch.zeros(eval_iters, device=device)
        for k in range(eval_iters):
            if stop_signal.requested():
                return None
            X, Y = get_batch(split)
            with ctx:
                loss = model(X, Y)[1]
            losses[k] = loss
        out[split] = mean_over_ranks(losses.mean()).item()
    model.train()
    return out


# learning rate: linear warmup, then half a cosine down to min_lr
def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # from 0 to 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (learning_rate - min_lr)


def save_checkpoint(best):
    checkpoint = {
        'model': raw_model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'model_args': model_args,
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'config': config,
        # nanoGPT ends here; this makes resuming exact
        'resume': {
            'ranks': gather_from_ranks({k: v.cpu() for k, v in here.items()}),
            'scaler': scaler.state_dict(),
            'log': os.path.basename(
                log.path or (resumed_from or {}).get('log') or ''
            ),  # without a log, its predecessor
        },
    }
    print(f'saving checkpoint to {out_dir}')
    if master_process:
        written = write_checkpoint(checkpoint, out_dir, best, required=done)
        log.checkpoint(iter_num, **written)


# logging
if master_process:
    make_out_dir(out_dir, init_from)
resumed_from = {'log': checkpoint.get('resume', {}).get('log'), 'iter': iter_num} if init_from == 'resume' else None
facts = run_facts(
    __file__, model_dir, device, world_size, parameters=raw_model.get_num_params(), tokens_per_iter=tokens_per_iter
)
log = TrainingLogger(out_dir, config, facts, json_log and master_process, resumed_from)
if wandb_log and master_process:
    import wandb

    wandb.init(project=wandb_project, name=wandb_run_name, config=config)

# training loop
X, Y = get_batch('train')  # the very first batch
if init_from == 'resume':
    X, Y = restore_rank_state(checkpoint, rank, world_size, device, dataset, X.shape) or get_batch('train')
    X, Y, checkpoint = X.to(device), Y.to(device), None  # frees the checkpoint's memory
t0 = hardware.now(device)
local_iter_num = 0  # iterations in this process
timed_iters = 0  # of them, those since t0
peak_flops = hardware.peak_flops(device, dtype, peak_tflops)
running_mfu = None
loss_sum = None  # of the last iteration, over its micro-steps
while True:
    # a checkpoint saved in this iteration goes on from here
    here = rank_state(device, X, Y)
    done = iter_num > max_iters or stop_signal.requested()

    lr = get_lr(iter_num) if decay_lr else learning_rate
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr

    # evaluate and save checkpoints
    paused = hardware.now(device) if iter_num % eval_interval == 0 or done else None
    if eval_only or (iter_num % eval_interval == 0 and not done):
        losses = estimate_loss()
        done = losses is None
        if not done:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
            log.evaluation(iter_num, train_loss=losses['train'], val_loss=losses['val'], lr=lr)
            if wandb_log and master_process:
                wandb.log(
                    {
                        'iter': iter_num,
                        'train/loss': losses['train'],
                        'val/loss': losses['val'],
                        'lr': lr,
                        'mfu': (running_mfu or 0) * 100,
                    }
                )
            best = losses['val'] < best_val_loss
            best_val_loss = min(best_val_loss, losses['val'])
            worth_it = best or (
                always_save_checkpoint and local_iter_num > 0
            )  # what was just resumed is on the disk, but perhaps not as the best
            if worth_it and iter_num > 0 and not eval_only and math.isfinite(losses['val']):
                save_checkpoint(best)
    if done and local_iter_num > 0:
        # the last state is always saved, unless it is worthless
        if math.isfinite(loss_sum.item()):
            save_checkpoint(best=False)
        else:
            print(f'not saving: the loss of iteration {iter_num - 1} is not finite')
    if done or eval_only:
        break
    if paused is not None:
        t0 += hardware.now(device) - paused

    # forward and backward, with gradient accumulation to simulate a larger batch
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(gradient_accumulation_steps):
        last = micro_step == gradient_accumulation_steps - 1
        if ddp:
            # the ranks' gradients are averaged once, in the last backward
            model.require_backward_grad_sync = last
        loss_sum += (graph or forward_backward)(X, Y)
        # draw the next batch while the GPU is busy
        X, Y = get_batch('train')
    log.flush()  # the last record is written while the GPU works
    # measure and clip the gradient
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    step_guard.step(optimizer, grad_norm)
    optimizer.zero_grad(set_to_none=True)  # frees their memory, except DDP's buckets and what CUDA graphs keep
    loss_sum = mean_over_ranks(
        loss_sum
    )  # a rank whose partner is gone ends here, after dist_timeout; in CUDA graphs nothing would end it

    # timing and logging
    timed_iters += 1
    if iter_num % log_interval == 0:
        # the CPU waits for the GPU here, else only to evaluate and to save
        lossf, normf, skipped_steps = step_guard.read(loss_sum, grad_norm)
        t1 = time.perf_counter()
        dt = (t1 - t0) / timed_iters
        t0, timed_iters = t1, 0
        mfu = raw_model.estimate_mfu(batch_size * gradient_accumulation_steps, dt, peak_flops)
        if mfu is not None and local_iter_num >= 5:  # let the training loop settle first
            running_mfu = mfu if running_mfu is None else 0.9 * running_mfu + 0.1 * mfu
        mfu_text = 'n/a' if running_mfu is None else f'{running_mfu * 100:.2f}%'
        skipped_text = f', {skipped_steps} steps skipped' if skipped_steps else ''
        tokens_per_sec = tokens_per_iter / dt
        print(
            f'iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, mfu {mfu_text}, {tokens_per_sec:,.0f} tokens/s{skipped_text}'
        )
        log.iteration(
            iter_num,
            loss=lossf,
            lr=lr,
            time_ms=dt * 1000,
            tokens_per_sec=tokens_per_sec,
            mfu=mfu,
            grad_norm=normf,
            peak_memory_bytes=hardware.peak_memory_bytes(device),
            skipped_steps=skipped_steps,
        )
        step_guard.check(iter_num, lr, skipped_steps)  # may end the run, so it comes after the step's record
    iter_num += 1
    local_iter_num += 1

log.close('completed' if iter_num > max_iters or (eval_only and not done) else 'stopped')
leave(graph)
