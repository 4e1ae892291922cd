"""
Converts GPT-2 to and from the format of Hugging Face transformers: weights, config.json and tokenizer files.

The two formats differ in four points. transformers stores c_attn, c_fc and c_proj as (in, out), ours as nn.Linear's
(out, in). It has no GPT-2 without biases, so absent biases become zeros. It stores the tied token embedding and output
layer once. Its activation_function 'gelu' is the erf form, 'gelu_new' the tanh form.
"""

import hashlib
import json
import os

import torch

from encoding import GPT2_FILES, ByteEncoding, GPT2Encoding, gpt2_encoding
from errors import UserError
from regular_file import check_regular

# transformers' names -> GPTConfig's gelu
ACTIVATIONS = {'gelu': 'erf', 'gelu_python': 'erf', 'gelu_new': 'tanh', 'gelu_fast': 'tanh', 'gelu_accurate': 'tanh'}
ACTIVATIONS |= {'gelu_pytorch_tanh': 'tanh', 'gelu_python_tanh': 'tanh'}
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
BUFFERS = ('.attn.bias', '.attn.masked_bias')  # the causal mask, which old exports contain
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SURROGATES = ''.join(map(chr, range(0xD800, 0xE000)))  # undecodable bytes as characters, which UTF-8 lacks
CHECKSUMS = 'SHA256SUMS'
OWN = 'nanogpt'  # key in config.json for fields that transformers does not know


def to_hf(weights: dict, vocab_size: int, dtype: torch.dtype) -> dict:
    """
    Converts a GPT's state_dict to {name: tensor} for transformers, in dtype and with vocab_size rows of embeddings.
    """
    tensors = {}
    for name, weight in weights.items():
        if name == 'lm_head.weight':
            continue  # tied to the embedding
        if name == 'transformer.wte.weight':
            weight = weight[:vocab_size]
        tensors[name] = (weight.t() if name.endswith(TRANSPOSED) else weight).to(dtype).contiguous()
        bias = name.removesuffix('weight') + 'bias'
        if name.endswith('weight') and bias not in weights and '.wte.' not in name and '.wpe.' not in name:
            tensors[bias] = torch.zeros(len(weight), dtype=dtype)
    return tensors


def check_weights(tensors: dict, n_layer: int) -> dict:
    """
    Returns transformers' tensors without the prefix of their names and without buffers. Raises UserError unless they
    are floats of n_layer blocks that are finite in float32.
    """
    tensors = {name.removeprefix('transformer.'): t for name, t in tensors.items() if not name.endswith(BUFFERS)}
    blocks = {name.split('.')[1] for name in tensors if name.startswith('h.')}
    if len(blocks) != n_layer:
        raise UserError(f'its config.json has n_layer={n_layer}, but its weights have {len(blocks)} blocks')
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f'{name} is quantized ({tensor.dtype}), and our model is not')
        if not tensor.float().isfinite().all():
            raise UserError(f'{name} contains numbers that are not finite in float32: its training diverged')
    return tensors


def from_hf(tensors: dict, expected: dict) -> dict:
    """
    Returns tensors from check_weights in float32 under the names of `expected`, a GPT's state_dict. Raises UserError if
    they are not exactly its weights.
    """
    weights, unknown = {}, set(tensors) - {name.removeprefix('transformer.') for name in expected}
    # absent biases were exported as zeros
    unknown = sorted(name for name in unknown if not name.endswith('.bias') or tensors[name].any())
    if unknown:
        raise UserError(f'the weights include {unknown[0]}, which our model lacks')
    for name, own in expected.items():
        theirs = 'wte.weight' if name == 'lm_head.weight' else name.removeprefix('transformer.')
        if theirs not in tensors:
            raise UserError(f'the weights lack {theirs}: they are not those of a GPT-2 with the sizes in config.json')
        weight, shape = tensors[theirs], own.shape[::-1] if name.endswith(TRANSPOSED) else own.shape
        if weight.shape != shape:
            raise UserError(f'{theirs} is {tuple(weight.shape)}, but by config.json it should be {tuple(shape)}')
        weights[name] = (weight.t() if name.endswith(TRANSPOSED) else weight).float().contiguous()
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    head = tensors.get('lm_head.weight')
    if head is not None and not torch.equal(head.float(), weights['lm_head.weight']):
        raise UserError(
            'its output layer differs from its token embedding (untied), but in our model they are one tensor'
        )
    return weights


def hf_config(model_args: dict, dtype: str, end_token: int | None, data: dict) -> dict:
    """
    Returns config.json as a dict for a model with these fields of GPTConfig. end_token: the id of <|endoftext|>, or
    None. data: {'dataset': name, 'encoding': its fingerprint}, '' if unknown.
    """
    return {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'activation_function': {'erf': 'gelu', 'tanh': 'gelu_new'}[model_args['gelu']],
        'n_layer': model_args['n_layer'],
        'n_head': model_args['n_head'],
        'n_embd': model_args['n_embd'],
        'n_inner': None,
        'n_positions': model_args['block_size'],
        'vocab_size': model_args['vocab_size'],
        'layer_norm_epsilon': 1e-5,
        **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), model_args['dropout']),
        'bos_token_id': end_token,
        'eos_token_id': end_token,
        'tie_word_embeddings': True,
        'torch_dtype': dtype,
        OWN: {'bias': model_args['bias'], **data},
    }


def model_args_of(config: dict) -> tuple[dict, str, dict]:
    """
    Returns (model_args, gelu, data) for the model that this config.json, a dict, describes. data: see hf_config. Raises
    UserError if it is not a GPT-2, or has a feature that our model lacks.
    """
    kind = config.get('model_type')
    if kind != 'gpt2':
        raise UserError(
            f'its config.json describes a model of type {kind!r}, but only gpt2 has the architecture of our model'
        )
    sizes = {k: config.get(k) for k in ('n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size')}
    wrong = [f'{k}={v!r}' for k, v in sizes.items() if type(v) is not int or not 0 < v < 2**24]
    if wrong or sizes['n_embd'] % sizes['n_head']:
        raise UserError(f'its config.json is invalid: {", ".join(wrong) or "n_embd is not a multiple of n_head"}')
    supported = {
        'activation_function': tuple(ACTIVATIONS),
        'n_inner': (None, 4 * sizes['n_embd']),
        'layer_norm_epsilon': (1e-5,),
        'tie_word_embeddings': (True,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'add_cross_attention': (False,),
    }
    defaults = {'activation_function': 'gelu_new'}  # transformers' own
    for key, values in supported.items():
        value = config.get(key, defaults.get(key, values[0]))
        if value not in values:
            raise UserError(
                f'its config.json has {key}={value!r}, which our model lacks (it has {" or ".join(map(repr, values))})'
            )
    own = config.get(OWN, {})
    bias = own.get('bias', True) if isinstance(own, dict) else None
    data = {key: own.get(key, '') for key in ('dataset', 'encoding')} if isinstance(bias, bool) else {'': None}
    if not all(isinstance(text, str) and len(text) <= 4096 and '\0' not in text for text in data.values()):
        raise UserError(f'its config.json is invalid: {OWN}={own!r:.100}')
    model_args = dict(
        n_layer=sizes['n_layer'],
        n_head=sizes['n_head'],
        n_embd=sizes['n_embd'],
        block_size=sizes['n_positions'],
        bias=bias,
        vocab_size=sizes['vocab_size'],
        dropout=0.0,
    )
    return model_args, ACTIVATIONS[config.get('activation_function', 'gelu_new')], data


def write_tokenizer(folder: str, encoding, block_size: int) -> int | None:
    """
    Writes the tokenizer files of an encoding (see encoding.py) and returns the id of <|endoftext|>, or None if there is
    none. Raises UserError for an encoding that has no tokenizer here.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    config, end_token = {'tokenizer_class': 'PreTrainedTokenizerFast'}, None
    if isinstance(encoding, GPT2Encoding):
        vocab_file, merges_file = gpt2_files()
        for path, name in ((vocab_file, 'vocab.json'), (merges_file, 'merges.txt')):
            with open(path, 'rb') as source, open(os.path.join(folder, name), 'wb') as target:
                target.write(source.read())
        tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merges_file))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        end = '<|endoftext|>'
        tokenizer.add_special_tokens([end])
        end_token = tokenizer.token_to_id(end)
        config = {'tokenizer_class': 'GPT2Tokenizer', 'bos_token': end, 'eos_token': end, 'unk_token': end}
        config['add_prefix_space'] = False
    elif isinstance(encoding, ByteEncoding):
        tokenizer = Tokenizer(models.BPE(byte_characters(), []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif all(len(c) == 1 and c not in SURROGATES and encoding.itos.get(i) == c for c, i in encoding.stoi.items()):
        tokenizer = Tokenizer(models.WordLevel(encoding.stoi))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
    else:
        raise UserError('no tokenizer can be made of an alphabet without one id for each character, or not in UTF-8')
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8') as f:
        f.write(tokenizer.to_str(pretty=True))
    config |= {'model_max_length': block_size, 'clean_up_tokenization_spaces': False}
    write_json(os.path.join(folder, 'tokenizer_config.json'), config)
    return end_token


def gpt2_files():
    """
    Returns the paths of GPT-2's encoder.json and vocab.bpe in tiktoken's cache. Downloads them if they are missing.
    """
    gpt2_encoding()
    cached = lambda name: hashlib.sha1(GPT2_FILES[name][0].encode()).hexdigest()
    return tuple(os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], cached(name)) for name in ('encoder.json', 'vocab.bpe'))


def byte_characters():
    """Returns {character: byte}: the printable characters that stand for the 256 bytes in GPT-2's vocabulary."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def write_json(path, content):
    with open(path, 'w', encoding='utf-8', errors='backslashreplace') as f:  # escapes bytes of a name, as in JSON
        json.dump(content, f, indent=2, ensure_ascii=False)
        f.write('\n')


def read_json(path):
    """Returns the dict in the JSON file at path. Raises UserError if there is none."""
    try:
        check_regular(path)
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
    except FileNotFoundError:
        raise UserError(f'{path} does not exist, so its folder holds no exported model') from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read ({e})') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__} instead of an object')
    return content


def check_name(hf_dir: str) -> None:
    """Raises UserError if the name of the folder is not UTF-8, which safetensors and tokenizers require."""
    try:
        hf_dir.encode()
    except UnicodeEncodeError:
        raise UserError(f'hf_dir={hf_dir} is not a name in UTF-8: rename the folder') from None


def write_checksums(folder):
    """Writes the SHA-256 of every file in the folder to SHA256SUMS, for `sha256sum -c SHA256SUMS`."""
    lines = [f'{sha256_of(os.path.join(folder, name))}  {name}\n' for name in sorted(os.listdir(folder))]
    with open(os.path.join(folder, CHECKSUMS), 'w') as f:
        f.writelines(lines)


def check_checksum(folder, name):
    """Raises UserError if the file's SHA-256 differs from the one in SHA256SUMS. Checks nothing without that file."""
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.isfile(path):
        return
    with open(path, errors='replace') as f:
        expected = {line[66:].strip(): line[:64].lower() for line in f}
    if name in expected and sha256_of(os.path.join(folder, name)) != expected[name]:
        raise UserError(
            f'{os.path.join(folder, name)} is not the exported file: its SHA-256 differs from the one in {path}. Copy '
            f'it again, or delete {CHECKSUMS} if you changed the model yourself'
        )


def sha256_of(path):
    check_regular(path)
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
