"""
Trains a GPT on one CPU or GPU, or on many with DistributedDataParallel (DDP).

One process:
$ python train.py config/train_python_char.py --batch_size=32

4 GPUs of one machine:
$ torchrun --standalone --nproc_per_node=4 train.py

2 machines of 4 GPUs; run this on both, with the host name of the first:
$ torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_id=gpt --rdzv_endpoint=HOST:29500 train.py
"""

from errors import UserError  # isort: skip  first: it also reports a missing package
import math
import sys

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import hardware
from checkpoint import find_checkpoint, write_from_rank_0
from configurator import configure
from cuda_graph import MicroStep
from data_order import training_order
from data_scan import scan_in_background
from dataset import open_dataset
from distributed import gather_from_ranks, leave_ranks, mean_over_ranks
from encoding import check_encoding
from evaluation import FirstTokens
from out_dir import make_out_dir
from progress import show_progress
from resume import Resume, rank_state
from run_facts import run_facts
from run_report import RunReport
from startup import setup
from step_guard import StepGuard
from step_timer import StepTimer
from stop_signal import StopSignal
from token_files import inputs_and_targets

# -----------------------------------------------------------------------------
# default config values designed to train a GPT-2 (124M) on OpenWebText; each is a flag
# I/O
out_dir = 'out'  # folder for checkpoints and logs
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between printed lines and log records
eval_iters = 200  # batches per split in an evaluation, on each rank
val_tokens = 0  # validation loss over exactly the first N tokens; 0: over eval_iters random batches
eval_only = False  # evaluate once, then stop
always_save_checkpoint = True  # save after every evaluation; False: only if the validation loss is the lowest so far
init_from = 'scratch'  # scratch, resume, auto (resume if there is a checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl
json_log = True  # write out_dir/run_*.json, for visualize_training.py
# trackers
tracker = ''  # also log to wandb, trackio or tensorboard
wandb_log = False  # same as tracker=wandb
wandb_project = 'owt'  # project name in the tracker; needs wandb_log or tracker
wandb_run_name = 'gpt2'  # run name in the tracker; needs wandb_log or tracker
# data
dataset = 'openwebtext'  # name in data/, path of a folder, or quoted glob pattern of token shards
data_order = 'random'  # random windows, or sequential: every token once per epoch
gradient_accumulation_steps = 5 * 8  # micro-steps (forward and backward of a batch) per iteration, on all ranks
batch_size = 12  # sequences per micro-step
block_size = 1024  # tokens per sequence
# model
model_dir = ''  # folder of the model.py to train, such as ../phase2_triton; empty: the folder of train.py
n_layer = 12  # transformer blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the residual stream
dropout = 0.0  # probability; 0 for pretraining, 0.1 or more for finetuning
bias = False  # biases in Linear and LayerNorm layers
# adamw optimizer
learning_rate = 6e-4  # the highest, at the end of the warmup
max_iters = 600000  # number of the last iteration, counted from 0
weight_decay = 1e-1  # for matrices and embeddings; biases and LayerNorms have none
beta1 = 0.9  # decay rate of the mean of gradients
beta2 = 0.95  # decay rate of the mean of squared gradients
grad_clip = 1.0  # highest gradient norm; 0.0: no clipping
# learning rate decay settings
decay_lr = True  # linear warmup, then cosine decay; False: constant learning rate
warmup_iters = 2000  # iterations of warmup; needs decay_lr
lr_decay_iters = 600000  # iteration at which the decay ends; about max_iters (Hoffmann et al. 2022); needs decay_lr
min_lr = 6e-5  # learning rate after the decay; about learning_rate / 10; needs decay_lr
# system
backend = 'auto'  # nccl or gloo; auto: nccl on CUDA GPUs
dist_timeout = 600  # seconds that a rank waits for the others before it ends the run
device = 'auto'  # cpu, cuda, cuda:1 or mps; auto: the best on this machine
dtype = 'auto'  # float32, bfloat16 or float16 (with a gradient scaler); auto: the best on this machine
compile = 'auto'  # use torch.compile; auto: on CUDA GPUs
cuda_graph = 'auto'  # replay forward and backward as CUDA graphs; auto: where possible
peak_tflops = 0.0  # peak TFLOP/s of the device, for mfu; 0: from the table in hardware.py
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------

# resolve every 'auto' for this machine and out_dir, and join the ranks
rank, world_size = setup(config)
globals().update(config)
master_process = rank == 0
device_type = device.split(':')[0]
if gradient_accumulation_steps % world_size != 0:
    raise UserError(
        f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world_size} processes'
    )
gradient_accumulation_steps //= world_size
tokens_per_iter = gradient_accumulation_steps * world_size * batch_size * block_size
print(f'tokens per iteration will be: {tokens_per_iter:,}')
torch.manual_seed(1337 + rank)
ctx = hardware.autocast(device, dtype)  # matmuls in dtype; the weights stay float32

# data: the token files, and the order in which windows of them are drawn
data = open_dataset(dataset, block_size)
resume = Resume(find_checkpoint(out_dir) if init_from == 'resume' else None, data, config)  # None: start anew
iter_num = resume.iter_num
best_val_loss = previous_best = resume.best_val_loss  # after and before the latest evaluation
order = training_order(data.train, config, rank, world_size, resume.order)
first_tokens = FirstTokens(data, config)  # for val_tokens
stop_signal = StopSignal(data)  # from here on, SIGTERM, Ctrl-C or a fault in the data saves a checkpoint first

# model
if model_dir:
    sys.path.insert(0, model_dir)
from model import GPT, GPTConfig

model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
model_args['vocab_size'] = data.meta.get('vocab_size', 50304)  # GPT-2's 50257, padded for speed
model_options = {k: config[k] for k in GPTConfig.__dataclass_fields__ if k not in model_args}
if init_from.startswith('gpt2'):
    print(f'Initializing from OpenAI GPT-2 weights: {init_from}')
    check_encoding(data.meta, data.name)
    model = GPT.from_pretrained(init_from, dict(dropout=dropout, **model_options))
    model_args = {k: getattr(model.config, k) for k in model_args}
else:
    print(f'Resuming training from {resume.path}' if resume.path else 'Initializing a new model from scratch')
    model_args = resume.model_args(model_args, flags_set)
    model_options = resume.model_options(model_options, flags_set)
    model = GPT(GPTConfig(**model_args, **model_options))
if block_size > model.config.block_size:
    raise UserError(f'block_size={block_size}, but the model from {init_from} takes at most {model.config.block_size}')
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
    model_args['block_size'] = block_size
model_facts = model_args | model_options  # record the loaded model, not the flags
config.update({k: v for k, v in model_facts.items() if k in config})
vocab_size = model_args['vocab_size']
scan_in_background(data, vocab_size)  # finds tokens outside the vocabulary early
model.to(device)
raw_model = model  # without the wrappers below

# in float16 small gradients would vanish, so the loss is scaled up; in other dtypes the scaler does nothing
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == 'float16'))

# optimizer
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
step_guard = StepGuard(device, scaler)  # skips steps whose gradient is not finite
resume.load(model, optimizer, scaler)

if compile:
    print('compiling the model... (takes a ~minute)')
    model.compile()  # in place

# every rank computes the gradients of its own batches; DDP averages them
if world_size > 1:
    model = DDP(model, device_ids=[device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)


# turns windows of tokens, int64 (batch_size, block_size + 1), into a batch on the device
def get_batch(windows):
    x, y = inputs_and_targets(windows)  # y is x, one token later
    if device_type == 'cuda':
        # pinned memory lets the copy to the GPU overlap with computation
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def forward_backward(X, Y):
    with ctx:
        loss = model(X, Y)[1]  # do not bind the logits: a reference would keep them alive
        loss = loss / gradient_accumulation_steps
    scaler.scale(loss).backward()
    return loss.detach()


micro_step = MicroStep(forward_backward, model, capture=cuda_graph)  # replays CUDA graphs, or just calls


# mean losses over eval_iters batches of each split on every rank; None if a stop was requested meanwhile
@torch.no_grad()
def estimate_loss():
    out = {}
    micro_step.release()  # evaluation, which is not captured, needs memory too
    model.eval()
    for split in ['train'] if val_tokens else ['train', 'val']:
        losses = torch.zeros(eval_iters, device=device)
        for k in show_progress(range(eval_iters), f'evaluating {split}'):
            if stop_signal.requested():
                return None
            X, Y = get_batch(data.splits[split].sample(batch_size, vocab_size))
            with ctx:
                losses[k] = model(X, Y)[1]
        out[split] = mean_over_ranks(losses.mean()).item()
    if val_tokens:
        exact = first_tokens.loss(model, ctx, stop_signal)
        out = None if exact is None else out | exact
    model.train()
    return None if stop_signal.requested() else out  # the last batch may have met a fault in the data


# learning rate: linear warmup, then half a cosine down to min_lr
def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # from 0 to 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (learning_rate - min_lr)


# reporting: the printed lines, the JSON log and the tracker
if master_process:
    make_out_dir(out_dir, init_from)
facts = run_facts(__file__, config, world_size, raw_model, optimizer, tokens_per_iter)
report = RunReport(config, facts, raw_model, master_process, iter_num, resume.log)


# returns False if the best checkpoint could not be written; if a required one cannot, the run ends
def save_checkpoint(resume_point, best, required):
    checkpoint = {
        'model': raw_model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'model_args': model_args,
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'config': config,
        # nanoGPT ends here; this makes resuming exact
        'resume': {
            'ranks': gather_from_ranks({k: v.cpu() for k, v in resume_point.items()}),
            'scaler': scaler.state_dict(),
            'log': report.log_name,
            'data': data.manifest(),
            'order': order.state(),
        },
    }
    print(f'saving checkpoint to {out_dir}')
    written = write_from_rank_0(checkpoint, out_dir, best, required)
    report.checkpoint(iter_num, **written)
    return written['best']


# training loop
X, Y = resume.next_batch(rank, world_size, config) or get_batch(order.next(vocab_size))
peak_flops = hardware.peak_flops(device, dtype, peak_tflops)
first_iter = iter_num  # where this process starts
timer = StepTimer(device, iter_num)
while True:
    resume_point = rank_state(device, X, Y, raw_model)  # a checkpoint of this iteration continues from here
    done = iter_num > max_iters or stop_signal.requested()

    lr = get_lr(iter_num) if decay_lr else learning_rate
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr

    # evaluate the loss and save a checkpoint
    if eval_only or (iter_num % eval_interval == 0 and not done):
        with timer.pause():
            losses = estimate_loss()
            done = losses is None
            if not done:
                report.evaluation(iter_num, losses, lr)
                previous_best, best_val_loss = best_val_loss, min(best_val_loss, losses['val'])
                best = best_val_loss < previous_best
                # a resumed state is already on the disk, but perhaps not as the best
                save_now = best or (always_save_checkpoint and iter_num > first_iter)
                if save_now and iter_num > 0 and not eval_only and math.isfinite(losses['val']):
                    if not save_checkpoint(resume_point, best, required=False):
                        best_val_loss = previous_best  # ckpt_best.pt is still the previous one
    if done and iter_num > first_iter and step_guard.worth_saving(model, lambda: micro_step(X, Y)):
        save_checkpoint(resume_point, best=False, required=True)  # the last state
    if done or eval_only:
        break

    # forward and backward, with gradient accumulation to simulate a larger batch
    loss_sum = torch.zeros((), device=device)
    for step in range(gradient_accumulation_steps):
        if world_size > 1:
            # average the ranks' gradients once, in the last backward
            model.require_backward_grad_sync = step == gradient_accumulation_steps - 1
        loss_sum += micro_step(X, Y)
        X, Y = get_batch(order.next(vocab_size))  # the next batch, while the GPU is busy
    report.flush()
    # clip the gradient and step the optimizer
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    step_guard.step(optimizer, grad_norm)
    optimizer.zero_grad(set_to_none=True)  # frees the memory, except for DDP's buckets and CUDA graphs
    loss_sum = mean_over_ranks(loss_sum)  # doubles as the watchdog: if a rank is lost, this all-reduce times out

    # timing and logging
    if iter_num % log_interval == 0:
        # here the CPU waits for the GPU
        loss, norm, skipped_steps = step_guard.measure(loss_sum, grad_norm)
        dt = timer.lap(iter_num)
        report.iteration(
            iter_num,
            loss=loss,
            lr=lr,
            time_ms=dt * 1000,
            tokens_per_sec=tokens_per_iter / dt,
            mfu=hardware.estimate_mfu(raw_model, batch_size * gradient_accumulation_steps, dt, peak_flops),
            grad_norm=norm,
            peak_memory_bytes=hardware.peak_memory_bytes(device),
            skipped_steps=skipped_steps,
        )
        step_guard.check(iter_num, lr, skipped_steps, model)  # ends a run that diverges
    iter_num += 1

data.raise_problem()
report.close('completed' if iter_num > max_iters or (eval_only and not done) else 'stopped', step_guard.unsaved)
leave_ranks(micro_step)
