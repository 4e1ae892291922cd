"""
Times the training step of train.py without the rest: a quick answer to "how fast is this model here, and does it fit?"

$ python bench.py --batch_size=12 --compile=True
$ python bench.py --real_data=False --profile=True
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import os
import statistics
import sys

import torch

import hardware
from configurator import configure
from cuda_graph import MicroStep, resolve_cuda_graph, use_side_stream
from dataset import open_dataset
from token_files import inputs_and_targets

# -----------------------------------------------------------------------------
batch_size = 12  # sequences per micro-step
block_size = 1024  # tokens per sequence
n_layer = 12  # transformer blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the residual stream
bias = False  # biases in Linear and LayerNorm layers
dropout = 0.0  # probability; 0 for determinism
gradient_accumulation_steps = 1  # micro-steps (forward and backward of a batch) per iteration
real_data = True  # batches of a data set; False: the same random tokens each time
dataset = 'openwebtext'  # name in data/, path of a folder, or quoted glob pattern of token shards; needs real_data
seed = 1337  # seed of the random numbers
model_dir = ''  # folder of the model.py to time, such as ../phase2_triton; empty: the folder of bench.py
device = 'auto'  # cpu, cuda, cuda:1 or mps; auto: the best on this machine
dtype = 'auto'  # float32, bfloat16 or float16; auto: the best on this machine
compile = 'auto'  # use torch.compile; auto: on CUDA GPUs
cuda_graph = 'auto'  # replay forward and backward as CUDA graphs; auto: where possible
peak_tflops = 0.0  # peak TFLOP/s of the device, for mfu; 0: from the table in hardware.py
warmup = 10  # iterations before the timed ones
steps = 20  # timed iterations
profile = False  # write a trace of 5 iterations to ./bench_log, for TensorBoard or chrome://tracing
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------

device, dtype, compile, _ = hardware.resolve_auto(device, dtype, compile, backend='auto')
device_type = device.split(':')[0]
cuda_graph = resolve_cuda_graph(config | {'device': device, 'backend': ''}, world_size=1)
if cuda_graph:
    use_side_stream(device)
torch.manual_seed(seed)
ctx = hardware.autocast(device, dtype)

# data
if real_data:
    try:
        data = open_dataset(dataset, block_size, splits=('train',))
    except UserError as e:
        raise UserError(f'{e}\nTo time random tokens instead of a data set, use --real_data=False') from None
    vocab_size = data.meta.get('vocab_size', 50304)

    def get_batch():
        x, y = inputs_and_targets(data.train.sample(batch_size, vocab_size))
        data.raise_problem()
        if device_type == 'cuda':
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)
else:
    vocab_size = 50304
    x = torch.randint(50257, (batch_size, block_size), device=device)
    y = torch.randint(50257, (batch_size, block_size), device=device)

    def get_batch():
        return x, y


# model
if model_dir:
    sys.path.insert(0, model_dir)
from model import GPT, GPTConfig

model_options = {k: v for k, v in config.items() if k in GPTConfig.__dataclass_fields__}
model = GPT(GPTConfig(vocab_size=vocab_size, **model_options)).to(device)
optimizer = model.configure_optimizers(
    weight_decay=1e-1, learning_rate=1e-4, betas=(0.9, 0.95), device_type=device_type
)
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == 'float16'))
if compile:
    print('compiling the model... (takes a ~minute)')
    model.compile()


def forward_backward(X, Y):
    with ctx:
        loss = model(X, Y)[1] / gradient_accumulation_steps
    scaler.scale(loss).backward()
    return loss.detach()


micro_step = MicroStep(forward_backward, model, capture=cuda_graph)
X, Y = get_batch()


def step():
    global X, Y
    for _ in range(gradient_accumulation_steps):
        loss = micro_step(X, Y)
        X, Y = get_batch()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss * gradient_accumulation_steps


for k in range(warmup):
    lossf = step().item()
    print(f'{k}/{warmup} loss: {lossf:.4f}')

if profile:
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        device_type == 'cuda'
    )
    with torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        profile_memory=True,
        with_flops=True,
        on_trace_ready=torch.profiler.tensorboard_trace_handler('bench_log'),
    ) as prof:
        for k in range(5):
            step()
        hardware.now(device)
    print(
        prof.key_averages().table(
            sort_by=f'self_{device_type if device_type == "cuda" else "cpu"}_time_total', row_limit=20
        )
    )
    print(f'trace written to {os.path.abspath("bench_log")}')

times = []
t0 = hardware.now(device)
for k in range(steps):
    step()
    t1 = hardware.now(device)
    times.append(t1 - t0)
    t0 = t1
dt = statistics.median(times)
peak_flops = hardware.peak_flops(device, dtype, peak_tflops)
mfu = hardware.estimate_mfu(model, batch_size * gradient_accumulation_steps, dt, peak_flops)
print(
    f'{hardware.device_name(device)}, {dtype}, compile {compile}, cuda_graph {cuda_graph}, '
    f'{batch_size} x {block_size} tokens x {gradient_accumulation_steps} micro-steps, '
    f'{"data set " + dataset if real_data else "random tokens"}'
)
print(
    f'time per iteration: {dt * 1000:.4f}ms (median of {steps}, {min(times) * 1000:.2f} to {max(times) * 1000:.2f}), '
    f'{batch_size * block_size * gradient_accumulation_steps / dt:,.0f} tokens/s, '
    f'mfu {"n/a" if mfu is None else f"{mfu * 100:.2f}%"}, '
    f'peak memory {hardware.peak_memory_bytes(device) / 2**30:.2f} GiB'
)
