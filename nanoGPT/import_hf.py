"""
Imports a GPT-2 in the format of Hugging Face transformers as OUT/ckpt.pt, which train.py and sample.py read.

$ python import_hf.py --hf_dir=my-model --out_dir=out-mine
$ python import_hf.py --hf_dir=gpt2 --out_dir=out-gpt2                  # a name: downloaded from the Hugging Face Hub
$ python train.py --init_from=resume --out_dir=out-gpt2 --bias=True --dataset=... --learning_rate=3e-5 --decay_lr=False
"""

from errors import UserError, first_line  # isort: skip  first: it also reports a missing package

import glob
import os
import re
from contextlib import redirect_stdout

import torch

import hf_format
from checkpoint import write_checkpoint
from configurator import configure
from model import GPT, GPTConfig
from out_dir import make_out_dir
from output import protect_output
from regular_file import check_regular
from shell import pip_install, python, quote, quote_path

# -----------------------------------------------------------------------------
hf_dir = ''  # folder with config.json and model.safetensors, or a model's name on the Hugging Face Hub
out_dir = 'out'  # folder for the checkpoint
gelu = 'auto'  # erf or tanh; auto: as in config.json
check_tokenizer = True  # refuse a model with GPT-2's vocabulary size but another tokenizer
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------


def find_folder(hf_dir):
    """
    Returns the local folder of hf_dir, a folder or a model's name on the Hub, which it downloads. Raises UserError.
    """
    hf_format.check_name(hf_dir)
    if os.path.isdir(hf_dir):
        return hf_dir
    if os.path.isfile(hf_dir):
        raise UserError(f'hf_dir={hf_dir} is a file: name the folder that holds config.json and the weights')
    if os.path.exists(hf_dir) or not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?', hf_dir):
        raise UserError(f'hf_dir={hf_dir}: there is no such folder')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f'hf_dir={hf_dir} is not a folder; to download a model of that name: {pip_install("huggingface_hub")}'
        ) from None
    try:
        return snapshot_download(hf_dir, allow_patterns=['*.json', '*.safetensors', '*.txt', hf_format.CHECKSUMS])
    except Exception as e:  # no network, no such model, no permission, a full disk: all different classes
        raise UserError(
            f'hf_dir={hf_dir} is not a folder, and no model of that name could be downloaded: {first_line(e)}'
        ) from None


def read_weights(folder):
    """Returns {name: tensor} from model.safetensors, or the files in its index. Raises UserError for a damaged file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f'import_hf.py needs the package safetensors: {pip_install("safetensors")}') from None
    index = os.path.join(folder, 'model.safetensors.index.json')
    names = ['model.safetensors']
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        weight_map = hf_format.read_json(index).get('weight_map')
        if not isinstance(weight_map, dict):
            raise UserError(f'{index} has no weight_map, so it does not say which files hold the weights')
        names = sorted({os.path.basename(str(name)) for name in weight_map.values()})
    tensors = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            check_regular(path)
            hf_format.check_checksum(folder, name)
            tensors |= load_file(path)
        except FileNotFoundError:
            raise UserError(f'{path} does not exist{other_formats()}') from None
        except (SafetensorError, OSError) as e:
            raise UserError(
                f'{path} is damaged or not a safetensors file ({first_line(e)}): copy or download it again'
            ) from None
    return tensors


def other_formats():
    """Returns the end of the message about missing weights: how to get them, or to convert those in another format."""
    if os.path.isdir(hf_dir) and not glob.glob(os.path.join(glob.escape(hf_dir), 'pytorch_model*.bin')):
        return ': copy or download it again'
    code = 'import sys, transformers as t; a, b = sys.argv[1:]; t.GPT2LMHeadModel.from_pretrained(a).save_pretrained(b)'
    converted = quote_path(f'{os.path.basename(os.path.normpath(hf_dir))}-safetensors')
    return (
        '. Weights in other files, such as pytorch_model.bin, are not read, because they can run code. Convert them, '
        f'then import {converted}:\n  {python()} -c {quote(code)} {quote_path(hf_dir)} {converted}'
    )


def check_vocabulary(folder, vocab_size):
    """
    Raises UserError if the tokenizer in the folder does not fit: if it has more tokens than the model, or differs from
    GPT-2's where sample.py would use GPT-2's. Accepts a folder without a tokenizer. Prints a note on tokens that were
    added to GPT-2's.
    """
    paths = [os.path.join(folder, name) for name in ('tokenizer.json', 'vocab.json')]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        return
    vocab = hf_format.read_json(path)
    if path == paths[0]:
        try:
            added = {token['content']: token['id'] for token in vocab.get('added_tokens') or []}
            vocab = vocab['model']['vocab'] | added
        except (KeyError, TypeError):
            vocab = None
    if vocab is None or not all(type(i) is int for i in vocab.values()):
        if check_tokenizer:
            raise UserError(
                f"the tokenizer does not fit: {path} has no table of tokens and ids, as GPT-2's has; "
                '--check_tokenizer=False imports the weights anyway'
            )
        return
    largest = max(vocab.values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f'the tokenizer does not fit the model: {path} has ids up to {largest:,}, but the model has '
            f'{vocab_size:,} tokens'
        )
    if vocab_size >= 50257 and check_tokenizer:
        gpt2 = hf_format.read_json(hf_format.gpt2_files()[0])
        if any(vocab.get(token) != i for token, i in gpt2.items()):
            raise UserError(
                f"the tokenizer does not fit: {path} is not GPT-2's, which train.py and sample.py use for a model with "
                f'{vocab_size:,} tokens; --check_tokenizer=False imports the weights anyway'
            )
        added = sorted(vocab.keys() - gpt2.keys(), key=vocab.get)
        if added:
            names = ', '.join(map(repr, added[:5])) + ', ...' * (len(added) > 5)
            print(f"note: {path} adds {names} to GPT-2's tokens; train.py and sample.py read them as plain text")


protect_output()
if not hf_dir:
    raise UserError('hf_dir is empty: name a folder or a model, such as --hf_dir=gpt2')
if gelu not in ('auto', 'erf', 'tanh'):
    raise UserError(f"gelu is '{gelu}', but it can be auto, erf or tanh")
folder = find_folder(hf_dir)
hf_format.check_checksum(folder, 'config.json')
model_args, own_gelu, data = hf_format.model_args_of(hf_format.read_json(os.path.join(folder, 'config.json')))
dataset, gelu = data['dataset'], own_gelu if gelu == 'auto' else gelu
check_vocabulary(folder, model_args['vocab_size'])
tensors = read_weights(folder)
tensors = hf_format.check_weights(tensors, model_args['n_layer'])
if not model_args['bias'] and any(tensor.any() for name, tensor in tensors.items() if name.endswith('.bias')):
    model_args['bias'] = True  # it has been trained further, with biases, elsewhere
with torch.device('meta'):  # shapes without memory
    model = GPT(GPTConfig(**model_args, gelu=gelu))
weights = hf_format.from_hf(tensors, model.state_dict())
with redirect_stdout(None):
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu').state_dict()
# AdamW starts from zero: all its moments are views of one zero tensor, which the file stores once
params = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # the optimizer's order: matrices, vectors
zeros = torch.zeros(max(p.numel() for p in params))
moments = [zeros[: p.numel()].view(p.shape) for p in params]
state = {i: {'step': torch.tensor(0.0), 'exp_avg': m, 'exp_avg_sq': m} for i, m in enumerate(moments)}
checkpoint = {
    'model': weights,
    'optimizer': {**optimizer, 'state': state},
    'model_args': model_args,
    'iter_num': 0,
    'best_val_loss': 1e9,
    'config': {**model_args, 'gelu': gelu, 'init_from': hf_dir} | ({'dataset': dataset} if dataset else {}),
}
if data['encoding']:
    checkpoint['resume'] = {'data': {'encoding': data['encoding']}}  # sampling and training compare it
make_out_dir(out_dir, 'import')
path = write_checkpoint(checkpoint, out_dir, best=False, required=True)['path']
print(
    f'imported {hf_dir} to {path}: GELU {gelu}, bias {model_args["bias"]}, vocabulary of {model_args["vocab_size"]:,}'
)
flags = f'--out_dir={quote(out_dir)} --block_size={model_args["block_size"]}'
print(f'continue with --init_from=resume {flags}' + (f' --dataset={quote(dataset)}' if dataset else ''))
