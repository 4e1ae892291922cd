"""
Samples from a trained model, or from a pretrained GPT-2.

$ python sample.py --out_dir=out-python-char --start="def "
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import os
import sys
from contextlib import suppress

import torch

import hardware
from checkpoint import find_checkpoint, load_checkpoint, load_model, saved_options
from configurator import configure
from dataset import meta_of_model
from encoding import get_encoding
from kv_cache import cache_supports, generate
from regular_file import check_regular

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (from out_dir), or a pretrained gpt2, gpt2-medium, gpt2-large, gpt2-xl
out_dir = 'out'  # folder of the checkpoint; needs init_from=resume
ckpt = 'ckpt.pt'  # ckpt.pt: the latest; ckpt_best.pt: the one with the lowest validation loss; needs init_from=resume
dataset = ''  # data set whose encoding to use; empty: the one that the model was trained on
start = '\n'  # text to continue, such as "<|endoftext|>"; FILE:prompt.txt reads it from a file
num_samples = 10  # samples to draw
max_new_tokens = 500  # tokens per sample
temperature = 0.8  # 1.0: as trained; lower: more predictable; higher: more varied; 0.0: always the likeliest token
top_k = 200  # draw only from this many of the likeliest tokens; needs temperature
seed = 1337  # seed of the random numbers; needs temperature
model_dir = ''  # folder of the model.py to use, such as ../phase2_triton; empty: the folder of sample.py
device = 'auto'  # cpu, cuda, cuda:1 or mps; auto: the best on this machine
dtype = 'auto'  # float32, bfloat16 or float16; auto: the best on this machine
compile = False  # use torch.compile; unused with kv_cache
kv_cache = True  # draw all samples as a batch, with a key-value cache; False: one after another, slowly
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------

device, dtype, compile, _ = hardware.resolve_auto(device, dtype, compile, backend='auto')
torch.manual_seed(seed)
ctx = hardware.autocast(device, dtype)

# model
if model_dir:
    sys.path.insert(0, model_dir)
from model import GPT, GPTConfig

data_manifest = None
model_options = {k: v for k, v in config.items() if k in GPTConfig.__dataclass_fields__}
if init_from == 'resume':
    checkpoint = load_checkpoint(find_checkpoint(out_dir) if ckpt == 'ckpt.pt' else os.path.join(out_dir, ckpt))
    model_options = saved_options(checkpoint, model_options, flags_set)
    known = {k: v for k, v in checkpoint['model_args'].items() if k in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**{**known, 'dropout': 0.0, **model_options}))
    load_model(model, checkpoint)
    dataset = dataset or checkpoint.get('config', {}).get('dataset', '')
    data_manifest = checkpoint.get('resume', {}).get('data')
elif init_from in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
    model = GPT.from_pretrained(init_from, dict(dropout=0.0, **model_options))
else:
    raise UserError(f"init_from is '{init_from}', but it can be resume, gpt2, gpt2-medium, gpt2-large or gpt2-xl")
model.eval()
model.to(device)
if compile and not kv_cache:
    model.compile()

# text to tokens and back, as in the data set that the model was trained on
meta = meta_of_model(dataset, model.config.vocab_size, 'dataset' in flags_set, data_manifest)
encoding = get_encoding(meta)
if start.startswith('FILE:'):
    try:
        check_regular(start[5:])
        with open(start[5:], encoding='utf-8-sig') as f:
            start = f.read()
    except (OSError, ValueError) as e:  # ValueError: not UTF-8
        raise UserError(f'--start={start} cannot be read: {getattr(e, "strerror", e)}') from None
if not start:
    raise UserError('start is empty: give at least one character to continue, such as --start=A')
if num_samples * max_new_tokens > 10**12:
    raise UserError(f'num_samples={num_samples} times max_new_tokens={max_new_tokens} is more than 10**12 tokens')
try:
    prompt = encoding.encode(start)
except UserError:
    if 'start' in flags_set:
        raise
    prompt = [0]
    print(f'the alphabet has no newline to start from, so samples start with {encoding.decode(prompt)!r} (see --start)')
x = torch.tensor(prompt, dtype=torch.long, device=device)[None, :]  # (1, T)

# generation
with suppress(AttributeError):  # stdout may be closed
    sys.stdout.reconfigure(errors='backslashreplace')  # for characters that a terminal cannot show
with torch.no_grad(), ctx:
    if not model(x[:, -model.config.block_size :])[0].isfinite().all():
        raise UserError(
            'the model computes numbers that are not finite: its weights do not come from a training that converged'
        )
    if kv_cache and not cache_supports(model):
        print('note: sampling without the key-value cache, because this model.py computes attention in another way')
        kv_cache = False
    started = hardware.now(device)
    samples = (model.generate(x, max_new_tokens, temperature=temperature, top_k=top_k) for k in range(num_samples))
    if kv_cache:
        samples = generate(model, x, num_samples, max_new_tokens, temperature, top_k).split(1)
    for y in samples:
        print(encoding.decode(y[0].tolist()))
        print('---------------', flush=True)
    seconds = hardware.now(device) - started
tokens = num_samples * max_new_tokens
# to stderr: stdout stays the same from run to run
print(f'{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s', file=sys.stderr)
