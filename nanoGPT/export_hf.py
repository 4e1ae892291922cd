"""
Exports a checkpoint as a folder for Hugging Face transformers: weights, config, tokenizer and model card.

$ python export_hf.py --out_dir=out --hf_dir=my-model
$ python export_hf.py --out_dir=out --ckpt=ckpt_best.pt --hf_dir=my-model --dtype=bfloat16

Before the folder appears, a fresh process loads it with AutoModelForCausalLM and AutoTokenizer, and their outputs are
compared with those of our model and encoding.
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import torch

import hf_format
from checkpoint import find_checkpoint, load_checkpoint, load_model, saved_options
from configurator import configure
from dataset import meta_of_model
from encoding import CharEncoding, encoding_fingerprint, get_encoding
from model import GPT, GPTConfig
from out_dir import alone_in
from output import protect_output
from shell import pip_install

# -----------------------------------------------------------------------------
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # ckpt.pt: the latest; ckpt_best.pt: the one with the lowest validation loss
hf_dir = ''  # folder to write; it must not exist yet
dtype = 'float32'  # dtype of the exported weights: float32 or bfloat16
crop_vocab = True  # drop the tokens that pad the vocabulary (50304 to GPT-2's 50257)
dataset = ''  # data set whose encoding to use; empty: the one that the model was trained on
shard_bytes = 5_000_000_000  # size above which the weights are split into several files
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------

TOLERANCE = 1e-4  # for logits; a tenth of it, times the largest logit, is added, because float32 errors scale with size

# runs in a separate process: loads the folder, writes logits (1, T, vocab_size) and the tokens of each text to stdout
RELOAD = """
import json, os, sys, torch
stdout = os.fdopen(os.dup(1), 'wb')
os.dup2(2, 1)  # sends what transformers prints to stderr, because stdout carries the result
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, idx, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.tensor(idx)).logits
ids = []
if texts:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids.append(tokenizer(text)['input_ids'])
        assert tokenizer.decode(ids[-1]) == text, f'the tokenizer decodes {text!r} as {tokenizer.decode(ids[-1])!r}'
torch.save((logits, ids), stdout)
"""


def write_weights(folder, tensors):
    """
    Writes model.safetensors, or several such files and their index if the tensors exceed shard_bytes bytes. The folder
    already holds config.json. Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    names = ['model.safetensors'] if len(parts) == 1 else []
    names = names or [f'model-{i:05d}-of-{len(parts):05d}.safetensors' for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        try:
            save_file(part, os.path.join(folder, name), metadata={'format': 'pt'})
        except SafetensorError as e:  # a full disk
            raise OSError(str(e)) from None
        # safetensors makes a file that only its owner can read, whatever the umask
        shutil.copymode(os.path.join(folder, 'config.json'), os.path.join(folder, name))
    if len(parts) > 1:
        index = {'metadata': {'total_size': sum(t.nbytes for t in tensors.values())}}
        index['weight_map'] = {tensor: name for name, part in zip(names, parts) for tensor in part}
        hf_format.write_json(os.path.join(folder, 'model.safetensors.index.json'), index)


def model_card(checkpoint, path, args, encoding):
    """
    Returns the text of README.md: facts about the run and how to use the model. args: the fields of GPTConfig.
    encoding: that of the exported tokenizer, or None.
    """
    flags, steps, loss = checkpoint.get('config', {}), checkpoint['iter_num'], checkpoint['best_val_loss']
    facts = [('data set', flags.get('dataset') or 'unknown'), ('iterations', f'{steps:,}')]
    batch = [flags.get(name) for name in ('gradient_accumulation_steps', 'batch_size', 'block_size')]
    if all(isinstance(size, int) for size in batch):
        per_step = math.prod(batch)
        facts.append(('tokens', f'{steps * per_step:,} ({per_step:,} per iteration)'))
    if loss < 1e9:
        facts.append(('lowest validation loss so far', f'{loss:.4f} nats per token'))
    facts += [(name, args[name]) for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')]
    facts += [('vocabulary', args['vocab_size']), ('GELU', args['gelu']), ('weights', dtype)]
    facts += [(name, flags[name]) for name in ('learning_rate', 'weight_decay', 'dropout', 'dtype') if name in flags]
    table = '\n'.join(f'| {name} | {value} |' for name, value in facts)
    start = next(iter(encoding.stoi)) if isinstance(encoding, CharEncoding) else 'Once'
    prompt = f'tokenizer({start!r}, return_tensors="pt").input_ids' if encoding else 'torch.zeros(1, 1).long()'
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained(folder)\n' if encoding else ''
    imports = 'from transformers import AutoModelForCausalLM' + (', AutoTokenizer' if encoding else '')
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {os.path.basename(os.path.abspath(hf_dir))}

A GPT with GPT-2's architecture, exported from `{os.path.basename(path)}`.

| | |
|---|---|
{table}

```python
{'' if encoding else 'import torch' + chr(10)}{imports}

folder = {os.path.basename(os.path.abspath(hf_dir))!r}
model = AutoModelForCausalLM.from_pretrained(folder)
{tokenizer}tokens = model.generate({prompt}, max_new_tokens=50)
print({'tokenizer.decode(tokens[0])' if encoding else 'tokens[0]'})
```
"""


@torch.no_grad()
def check(folder, model, encoding):
    """
    Loads the folder in a fresh process and returns the largest difference between its logits and the model's. Raises
    UserError if the difference is too large, if its tokenizer disagrees with `encoding` (None: there is no tokenizer),
    or if the folder cannot be loaded.
    """
    idx = torch.randint(model.config.vocab_size, (1, min(model.config.block_size, 128)), generator=torch.Generator())
    texts = [] if encoding is None else sample_texts(encoding)
    command = [sys.executable, '-c', RELOAD, folder, json.dumps(idx.tolist()), json.dumps(texts)]
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    run = subprocess.run(command, capture_output=True, env=env)
    if run.returncode:
        lines = run.stderr.decode(errors='replace').strip().splitlines()
        raise UserError(f'transformers cannot use the export: {lines[-1] if lines else "no reason given"}')
    theirs, ids = torch.load(io.BytesIO(run.stdout))
    for text, got in zip(texts, ids):
        if got != encoding.encode(text):
            raise UserError(
                f'the exported tokenizer does not fit: it encodes {text!r} as {got[:10]}, '
                f'not as {encoding.encode(text)[:10]}'
            )
    ours, _ = model(idx, idx)
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE + TOLERANCE / 10 * ours.abs().max().item():
        raise UserError(
            f"the logits of the exported model differ from the checkpoint's by {difference:.1e}, more than "
            f'{TOLERANCE:g}: this version of transformers computes a different model. Nothing was exported'
        )
    return difference


def sample_texts(encoding):
    """Returns texts that tell tokenizers apart: every character of an alphabet, or a few characters of many kinds."""
    if isinstance(encoding, CharEncoding):
        return [''.join(encoding.stoi), ''.join(reversed(encoding.stoi))]
    return ["Hello, world! It's  1,234 tokens;\n\n\tdef f(x): return x<|endoftext|>", 'naïve café – 東京 🙂   ']


if not hf_dir:
    raise UserError('hf_dir is empty: name the folder to write, such as --hf_dir=my-model')
hf_format.check_name(hf_dir)
target = os.path.realpath(hf_dir)  # the folder that a link refers to
if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
    raise UserError(f'hf_dir={hf_dir} exists already: delete it, or name another folder')
if dtype not in ('float32', 'bfloat16'):
    raise UserError(f"dtype is '{dtype}', but it can be float32 or bfloat16")
missing = [name for name in ('safetensors', 'transformers', 'tokenizers') if importlib.util.find_spec(name) is None]
if missing:
    raise UserError(f'export_hf.py needs {", ".join(missing)}: {pip_install(*missing)}')

protect_output()
path = find_checkpoint(out_dir) if ckpt == 'ckpt.pt' else os.path.join(out_dir, ckpt)
checkpoint = load_checkpoint(path)
args = {k: v for k, v in checkpoint['model_args'].items() if k in GPTConfig.__dataclass_fields__}
options = saved_options(checkpoint, {k: v for k, v in config.items() if k in GPTConfig.__dataclass_fields__}, flags_set)
model = GPT(GPTConfig(**{**args, **options})).eval()
load_model(model, checkpoint)
args = dict(vars(model.config))  # with defaults for what an old checkpoint lacks
dataset = dataset or checkpoint.get('config', {}).get('dataset', '')
manifest = checkpoint.get('resume', {}).get('data') or {}
try:
    meta = meta_of_model(dataset, args['vocab_size'], 'dataset' in flags_set, manifest or None)
    no_tokenizer, encoding_name = '', encoding_fingerprint(meta)
except UserError as error:
    if 'dataset' in flags_set:
        raise
    meta, no_tokenizer = {'vocab_size': args['vocab_size']}, str(error)
    encoding_name = manifest.get('encoding', '')
if crop_vocab:
    args['vocab_size'] = min(args['vocab_size'], meta.get('vocab_size', 50257))
padding = model.config.vocab_size - args['vocab_size']

weights = model.state_dict()
torch_dtype = {'float32': torch.float32, 'bfloat16': torch.bfloat16}[dtype]
tensors = hf_format.to_hf(weights, args['vocab_size'], torch_dtype)
folder = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.unfinished-export')
for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # through `finally` below
try:
    os.makedirs(folder, exist_ok=True)
    if alone_in(folder) is False:
        raise UserError(f'another export is writing hf_dir={hf_dir}: wait for it, or name another folder')
except OSError as error:
    raise UserError(f'{hf_dir} could not be written: {error}') from None
try:
    for name in os.listdir(folder):  # left by a killed export
        os.remove(os.path.join(folder, name))
    end_token = encoding = None
    if not no_tokenizer:
        try:
            encoding = get_encoding(meta)
            end_token = hf_format.write_tokenizer(folder, encoding, args['block_size'])
        except UserError as error:
            encoding, no_tokenizer = None, str(error)
    data = {'dataset': dataset, 'encoding': encoding_name}
    hf_format.write_json(os.path.join(folder, 'config.json'), hf_format.hf_config(args, dtype, end_token, data))
    write_weights(folder, tensors)
    ids = {'bos_token_id': end_token, 'eos_token_id': end_token}
    hf_format.write_json(
        os.path.join(folder, 'generation_config.json'), {**ids, 'do_sample': True, 'temperature': 0.8, 'top_k': 200}
    )
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(model_card(checkpoint, path, args, encoding))
    hf_format.write_checksums(folder)
    # the exported model is ours with rounded weights and the cropped vocabulary
    for weight in weights.values():
        weight.copy_(weight.to(torch_dtype))
    model.config.vocab_size = args['vocab_size']
    model.lm_head.weight.data = model.lm_head.weight.data[: args['vocab_size']]
    difference = check(folder, model, encoding)
    os.rename(folder, target)  # which may be an empty folder
except OSError as error:
    raise UserError(f'{hf_dir} could not be written: {error}') from None
finally:
    shutil.rmtree(folder, ignore_errors=True)
if no_tokenizer:
    print(f'without tokenizer files: {no_tokenizer}')
if padding:
    print(f'left out the last {padding:,} tokens, which the encoding lacks (--crop_vocab=False keeps them)')
print(f'exported {path} to {hf_dir}: {len(tensors)} tensors in {dtype}, vocabulary of {args["vocab_size"]:,}')
print(f'reloaded in a fresh process: the logits differ by at most {difference:.1e}')
