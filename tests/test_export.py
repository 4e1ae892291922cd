"""
export_hf.py and import_hf.py: checkpoints to Hugging Face transformers and back, with the GELU of the weights.
"""

import json
import os
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import hf_format
from conftest import NANOGPT, ROOT, TINY, load
from encoding import ByteEncoding, CharEncoding
from errors import UserError
from message_commands import commands_in, run_command
from model import GELU, GPT, GPTConfig

transformers = pytest.importorskip('transformers', reason='the test extra brings it')
TRAIN, SAMPLE, EXPORT, IMPORT = (NANOGPT / f'{name}.py' for name in ('train', 'sample', 'export_hf', 'import_hf'))


def make_dataset(name, vocab_size, meta):
    os.makedirs(f'data/{name}')
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(vocab_size, size=2000).astype(np.uint16).tofile(f'data/{name}/{split}.bin')
    if meta:
        with open(f'data/{name}/meta.pkl', 'wb') as f:
            pickle.dump(meta, f)


def write_random_checkpoint(dataset, vocab_size, bias, gelu, out_dir='out'):
    """Writes a checkpoint of random weights, all large enough to matter, biases included. Returns its model."""
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, bias=bias, vocab_size=vocab_size, dropout=0.0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**args, gelu=gelu)).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    os.makedirs(out_dir, exist_ok=True)
    rest = dict(model_args=args, iter_num=7, best_val_loss=1.5, config={'dataset': dataset, 'gelu': gelu})
    torch.save({'model': model.state_dict(), **rest}, f'{out_dir}/ckpt.pt')
    return model


ALPHABET = '\n !aé🙂"\\中|<>e\u0301'  # WordLevel has no trouble with blanks, quotes, combining characters or planes
CASES = {
    'characters': (len(ALPHABET), False, 'erf', {'stoi': {c: i for i, c in enumerate(ALPHABET)}}),
    'bytes': (256, True, 'tanh', {'encoding': 'byte'}),
    'gpt2': (50304, True, 'erf', None),
}
FLAGS = {'characters': ['--shard_bytes=1000'], 'bytes': [], 'gpt2': ['--dtype=bfloat16']}


@pytest.mark.parametrize('case', CASES)
def test_there_and_back(launch, work, case):
    """
    transformers loads the folder, its tokenizer encodes as we do, and its greedy text is ours. The import has the same
    bits, except for padding, which is dropped, and for bfloat16's rounding, if requested.
    """
    vocab_size, bias, gelu, meta = CASES[case]
    if meta:
        meta |= {'vocab_size': vocab_size} | (
            {'itos': {i: c for c, i in meta['stoi'].items()}} if 'stoi' in meta else {}
        )
    make_dataset(case, min(vocab_size, 50257), meta)
    model = write_random_checkpoint(case, vocab_size, bias, gelu)
    out = launch(EXPORT, '--hf_dir=hf', *FLAGS[case]).stdout
    assert re.search(r'^exported out/ckpt.pt to hf: 28 tensors', out, re.M) and 'logits differ by at most' in out
    kept = min(vocab_size, 50257)
    assert ('left out the last 47 tokens, which the encoding lacks' in out) == (case == 'gpt2')
    if case == 'gpt2':
        model.lm_head.weight.data = model.lm_head.weight.data[:kept]
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
    shards = [name for name in os.listdir('hf') if name.endswith('.safetensors')]
    assert (len(shards) > 5) == (case == 'characters')
    assert len({os.stat(f'hf/{name}').st_mode for name in os.listdir('hf')}) == 1  # the umask's

    hf = transformers.AutoModelForCausalLM.from_pretrained('hf', dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained('hf')
    assert hf.config.activation_function == {'erf': 'gelu', 'tanh': 'gelu_new'}[gelu] and len(tokenizer) == kept
    assert hf.config.n_positions == 32 and hf.config.vocab_size == kept
    idx = torch.randint(kept, (2, 32))
    assert (hf(idx).logits - model(idx, idx)[0]).abs().max() < 1e-4  # float32, logits of about 10
    text = {'characters': 'e\u0301 🙂"\n\n!', 'bytes': 'é \n 🙂', 'gpt2': "def f(x):\n    return '🙂'"}[case]
    from encoding import get_encoding

    ids = tokenizer(text)['input_ids']
    assert ids == get_encoding(meta or {}).encode(text) and tokenizer.decode(ids) == text

    prompt = torch.tensor([ids])
    ours = model.generate(prompt, 32 - len(ids), temperature=0)
    theirs = hf.generate(prompt, max_length=32, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs)
    assert re.search(r'\| iterations \| 7 \|', open('hf/README.md').read())

    out = launch(IMPORT, '--hf_dir=hf', '--out_dir=back').stdout
    before, after = load('out/ckpt.pt'), load('back/ckpt.pt')
    assert after['config']['gelu'] == gelu and after['config']['dataset'] == case and f'GELU {gelu}' in out
    assert after['model_args'] == before['model_args'] | {'vocab_size': kept}
    assert after['model'].keys() == before['model'].keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(after['model'][name], weight), name
    flags = ['--start=a', '--num_samples=1', '--max_new_tokens=40', '--temperature=0', '--device=cpu']
    samples = [launch(SAMPLE, *flags, f'--out_dir={folder}').stdout for folder in ('out', 'back')]
    assert samples[0] == samples[1] or case == 'gpt2'  # whose weights are rounded


@pytest.fixture
def random_gpt2(work):
    """A transformers GPT-2 with the tanh GELU and weights so large that the two GELUs differ, in the folder hf."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, vocab_size=40, n_embd=32, n_layer=3, n_head=4)
    hf = transformers.GPT2LMHeadModel(config).eval()
    for p in hf.parameters():
        p.data += 0.5 * torch.randn_like(p)
    hf.save_pretrained('hf', max_shard_size='40KB')
    return hf


def logits_of(out_dir, idx, **options):
    checkpoint = load(f'{out_dir}/ckpt.pt')
    model = GPT(GPTConfig(**checkpoint['model_args'], **options)).eval()
    model.load_state_dict(checkpoint['model'])
    return model(idx, idx)[0]


def test_import_of_a_transformers_model(launch, launch_interpreted, random_gpt2):
    """
    The logits are transformers' with the tanh GELU only. sample.py takes the GELU from the checkpoint, also for the
    Triton kernels, and training continues with it, on one rank or sharded over two.
    """
    assert len([name for name in os.listdir('hf') if name.endswith('.safetensors')]) > 1
    out = launch(IMPORT, '--hf_dir=hf').stdout
    assert 'GELU tanh, bias True' in out
    idx = torch.randint(40, (2, 32))
    expected = random_gpt2(idx).logits
    assert (logits_of('out', idx, gelu='tanh') - expected).abs().max() < 1e-4  # roundings of logits of about 5
    assert (logits_of('out', idx, gelu='erf') - expected).abs().max() > 1e-3

    flags = [
        '--start=0',
        '--dataset=letters',
        '--num_samples=1',
        '--max_new_tokens=20',
        '--temperature=0',
        '--device=cpu',
    ]
    theirs = random_gpt2.generate(torch.zeros(1, 1).long(), max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    text = ''.join(chr(ord('0') + i) for i in theirs)
    assert text in launch(SAMPLE, *flags).stdout
    assert text in launch_interpreted(ROOT / 'phase2_triton' / 'sample.py', *flags).stdout

    tiny = [flag for flag in TINY if not flag.startswith(('--n_', '--block_size'))]
    resume = [*tiny, '--init_from=resume', '--block_size=32', '--bias=True', '--max_iters=3', '--eval_interval=2']
    shutil.copytree('out', 'sharded')
    assert 'iter 3:' in launch(TRAIN, *resume).stdout
    assert load('out/ckpt.pt')['config']['gelu'] == 'tanh'
    fsdp = [*resume, '--out_dir=sharded', '--ckpt_format=sharded']
    launch(ROOT / 'phase3_fsdp' / 'train.py', *fsdp, nproc=2)
    os.remove('sharded/ckpt.pt')
    launch(ROOT / 'phase3_fsdp' / 'train.py', *fsdp, '--max_iters=5', nproc=2)
    run = launch(EXPORT, '--out_dir=sharded', '--hf_dir=again', check=False)
    assert run.returncode == 2 and 'sharded_checkpoint.py full' in run.stderr
    launch(ROOT / 'phase3_fsdp' / 'sharded_checkpoint.py', 'full', 'sharded')
    assert 'exported sharded/ckpt.pt' in launch(EXPORT, '--out_dir=sharded', '--hf_dir=again').stdout
    with open('again/config.json') as f:
        assert json.load(f)['activation_function'] == 'gelu_new'


def test_gelu_of_a_run(launch, work):
    """
    Without the flag, a resume keeps the GELU, and it refuses the other form, as sample.py does. nanoGPT's checkpoints
    have the erf form.
    """
    launch(TRAIN, *TINY, '--gelu=tanh', '--max_iters=6')
    checkpoint = load('out/ckpt.pt')
    assert checkpoint['config']['gelu'] == 'tanh' and 'gelu' not in checkpoint['model_args']
    launch(TRAIN, *TINY, '--init_from=resume', '--max_iters=8')
    launch(TRAIN, *TINY, '--gelu=tanh', '--max_iters=8', '--out_dir=whole')
    launch(TRAIN, *TINY, '--max_iters=8', '--out_dir=erf')
    resumed, whole, erf = (load(f'{folder}/ckpt.pt') for folder in ('out', 'whole', 'erf'))
    assert resumed['config']['gelu'] == 'tanh' and erf['config']['gelu'] == 'erf'
    weight = 'transformer.h.1.mlp.c_fc.weight'
    assert torch.equal(resumed['model'][weight], whole['model'][weight])
    assert not torch.equal(resumed['model'][weight], erf['model'][weight])
    for script in (TRAIN, SAMPLE):
        flags = [*TINY, '--init_from=resume'] if script == TRAIN else ['--start=0']
        run = launch(script, *flags, '--gelu=erf', check=False)
        assert run.returncode == 2 and 'was trained with gelu=tanh, but the command asks for gelu=erf' in run.stderr
    run = launch(TRAIN, *TINY, '--gelu=sigmoid', check=False)
    assert run.returncode == 2 and "gelu is 'sigmoid', but it can be erf or tanh" in run.stderr
    del checkpoint['config']['gelu']
    torch.save(checkpoint, 'out/ckpt.pt')
    run = launch(SAMPLE, '--start=0', '--gelu=tanh', '--device=cpu', check=False)
    assert run.returncode == 2 and 'was trained with gelu=erf' in run.stderr


def edit_json(path, **changes):
    with open(path) as f:
        content = json.load(f)
    with open(path, 'w') as f:
        json.dump(content | changes, f)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(model_type='llama'), "of type 'llama', but only gpt2"),
        (dict(activation_function='relu'), "activation_function='relu'"),
        (dict(n_inner=100), 'n_inner=100'),
        (dict(layer_norm_epsilon=1e-6), 'layer_norm_epsilon=1e-06'),
        (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
        (dict(n_layer=4), 'its weights have 3 blocks'),
        (dict(nanogpt={'bias': 'no'}), "invalid: nanogpt={'bias': 'no'}"),
        (dict(n_embd=64), 'by config.json it should be'),
        (dict(n_head=None), 'n_head=None'),
        (dict(n_embd=10**18), 'n_embd=1000000000000000000'),
        (dict(vocab_size=10**19), 'vocab_size=10000000000000000000'),
        (dict(nanogpt={'dataset': 'x' * 5000}), "invalid: nanogpt={'dataset': 'xxx"),
    ],
)
def test_models_that_are_not_ours(launch, random_gpt2, changes, message):
    edit_json('hf/config.json', **changes)
    run = launch(IMPORT, '--hf_dir=hf', check=False)
    assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr
    assert not os.path.exists('out/ckpt.pt')


def test_weights_that_are_not_ours(launch, random_gpt2):
    """Quantized, not finite, or more than our model has. The mask that old exports contain is left out."""
    from safetensors.torch import load_file, save_file

    path = f'hf/{sorted(name for name in os.listdir("hf") if name.endswith(".safetensors"))[0]}'
    weights = load_file(path)
    name = next(iter(weights))
    for change, message in (
        ({name: weights[name].to(torch.int8)}, 'is quantized (torch.int8)'),
        ({name: weights[name] * float('nan')}, 'contains numbers that are not finite'),
        ({'transformer.h.3.ln_1.weight': torch.ones(32)}, 'n_layer=3, but its weights have 4 blocks'),
        ({'score.weight': torch.ones(2, 32)}, 'the weights include score.weight'),
        ({name: weights[name].double() * 1e200}, 'not finite in float32'),
        ({'transformer.wte.bias': torch.ones(40)}, 'the weights include wte.bias'),
        ({name: weights[name][None]}, 'but by config.json it should be'),
        ({'transformer.h.0.attn.bias': torch.ones(1, 1, 32, 32)}, None),
    ):
        save_file(weights | change, path)
        run = launch(IMPORT, '--hf_dir=hf', check=False)
        assert (run.returncode, os.path.exists('out/ckpt.pt')) == ((2, False) if message else (0, True)), run.stderr
        assert (message or '') in run.stderr and 'Traceback' not in run.stderr
    os.remove(path)
    run = launch(IMPORT, '--hf_dir=hf', '--out_dir=back', check=False)
    assert run.returncode == 2 and f'{path} does not exist: copy or download it again' in run.stderr
    os.mkfifo(path)
    run = launch(IMPORT, '--hf_dir=hf', '--out_dir=back', check=False)
    assert run.returncode == 2 and 'not a regular file' in run.stderr
    edit_json('hf/model.safetensors.index.json', weight_map={name: 'a\0b'})
    run = launch(IMPORT, '--hf_dir=hf', '--out_dir=back', check=False)
    assert run.returncode == 2 and 'not a valid name' in run.stderr
    edit_json('hf/model.safetensors.index.json', weight_map=None)
    run = launch(IMPORT, '--hf_dir=hf', check=False)
    assert run.returncode == 2 and 'has no weight_map' in run.stderr


def test_weights_in_another_format(launch, random_gpt2):
    """The command in the message converts them."""
    from safetensors.torch import load_file

    os.rename('hf', "my hf's")
    weights = {}
    for name in [name for name in os.listdir("my hf's") if 'safetensors' in name]:
        weights |= load_file(f"my hf's/{name}") if not name.endswith('.json') else {}
        os.remove(f"my hf's/{name}")
    torch.save(weights, "my hf's/pytorch_model.bin")
    run = launch(IMPORT, "--hf_dir=my hf's", '--out_dir=o u t', check=False)
    assert run.returncode == 2 and 'model.safetensors does not exist. Weights in other files' in run.stderr
    run_command(*commands_in(run.stderr))
    out = launch(IMPORT, "--hf_dir=my hf's-safetensors", '--out_dir=o u t').stdout
    assert "continue with --init_from=resume --out_dir='o u t' --block_size=32" in out
    idx = torch.randint(40, (1, 32))
    assert (logits_of('o u t', idx, gelu='tanh') - random_gpt2(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize('name', hf_format.ACTIVATIONS)
def test_names_of_activations(name):
    """transformers' function of this name is the form of GELU that the import records."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-5, 5, 1001)
    ours = torch.nn.functional.gelu(x, approximate=GELU[hf_format.ACTIVATIONS[name]])
    assert (ACT2FN[name](x) - ours).abs().max() < 1e-6  # float32; the two forms differ by 5e-4


def test_damaged_and_missing_files(launch, work):
    """If the data set is gone, the export has weights without a tokenizer, and a line says so."""

    def fails(*flags):
        run = launch(IMPORT, *flags, check=False, env={'HF_HUB_OFFLINE': '1'})
        assert run.returncode == 2 and 'Traceback' not in run.stderr and run.stderr.count('error:') == 1
        return run.stderr

    write_random_checkpoint('elsewhere', 40, True, 'erf')
    out = launch(EXPORT, '--hf_dir=hf').stdout
    assert re.search(r"^without tokenizer files: there is no data set 'elsewhere'", out, re.M)
    assert 'tokenizer.json' not in os.listdir('hf') and 'model.safetensors' in os.listdir('hf')
    weights = open('hf/model.safetensors', 'rb').read()
    for damaged in (weights[:-40] + bytes([weights[-40] ^ 1]) + weights[-39:], weights[:-40], b'\xff' * 40):
        with open('hf/model.safetensors', 'wb') as f:
            f.write(damaged)
        assert 'hf/model.safetensors is not the exported file' in fails('--hf_dir=hf')
    os.remove('hf/SHA256SUMS')
    for damaged in (weights[:-40], b'\xff' * 40, b''):
        with open('hf/model.safetensors', 'wb') as f:
            f.write(damaged)
        assert 'hf/model.safetensors is damaged or not a safetensors file' in fails('--hf_dir=hf')
    assert 'is a file: name the folder that holds config.json' in fails('--hf_dir=hf/model.safetensors')
    os.remove('hf/model.safetensors')
    assert 'hf/model.safetensors does not exist' in fails('--hf_dir=hf')
    assert 'no model of that name could be downloaded' in fails('--hf_dir=no-such/model')
    assert 'there is no such folder' in fails('--hf_dir=./no/such/folder')
    assert 'out/config.json does not exist' in fails('--hf_dir=out')
    assert 'hf_dir is empty' in fails()


def test_tokenizers_that_do_not_fit(launch, work):
    def import_error(vocab, *flags):
        json.dump({'model': {'vocab': vocab}}, open('hf/tokenizer.json', 'w'))
        run = launch(IMPORT, '--hf_dir=hf', '--out_dir=back', *flags, check=False)
        assert run.returncode == 2 and 'Traceback' not in run.stderr
        return run.stdout + run.stderr

    os.makedirs('hf')
    sizes = dict(n_layer=1, n_head=1, n_embd=8, n_positions=8)
    json.dump(dict(model_type='gpt2', vocab_size=40, **sizes), open('hf/config.json', 'w'))
    assert 'has ids up to 40, but the model has 40 tokens' in import_error({'a': 0, 'b': 40})
    edit_json('hf/config.json', vocab_size=50257)
    assert 'is not GPT-2' in import_error({'a': 0, 'b': 40})
    assert 'model.safetensors does not exist' in import_error({'a': 0}, '--check_tokenizer=False')
    assert 'has no table of tokens and ids' in import_error([['a', -1.0]])
    edit_json('hf/config.json', vocab_size=50259)
    gpt2 = json.load(open(hf_format.gpt2_files()[0]))
    assert 'note: hf/tokenizer.json adds' not in import_error(gpt2)
    note = import_error(gpt2 | {'<pad>': 50258, '<user>': 50257})
    assert (
        "note: hf/tokenizer.json adds '<user>', '<pad>' to GPT-2's tokens; train.py and sample.py read them as" in note
    )

    write_random_checkpoint('letters', 40, False, 'erf')
    make_dataset('bytes', 256, {'vocab_size': 256, 'encoding': 'byte'})
    run = launch(EXPORT, '--hf_dir=other', '--dataset=bytes', check=False)
    assert run.returncode == 2 and 'the model has 40 tokens, but the encoding of bytes has 256' in run.stderr
    run = launch(EXPORT, '--hf_dir=hf', check=False)
    assert run.returncode == 2 and 'hf_dir=hf exists already' in run.stderr


def test_the_alphabet_of_an_imported_model_is_compared(launch, work):
    """An alphabet of the same size and name, but with other characters, would sample other text."""
    write_random_checkpoint('letters', 40, False, 'erf')
    launch(EXPORT, '--hf_dir=hf')
    launch(IMPORT, '--hf_dir=hf')
    tiny = [flag for flag in TINY if not flag.startswith(('--n_', '--block_size'))]
    resume = [*tiny, '--init_from=resume', '--block_size=32', '--max_iters=1', '--eval_interval=5']
    shutil.copytree('data/letters', 'data/more')
    np.random.default_rng(0).integers(40, size=500).astype(np.uint16).tofile('data/more/train.bin')
    launch(SAMPLE, '--start=0', '--num_samples=1', '--max_new_tokens=2')
    launch(TRAIN, *resume, '--dataset=more', '--out_dir=out')  # other data in the same encoding
    launch(IMPORT, '--hf_dir=hf')
    with open('data/letters/meta.pkl', 'rb') as f:
        meta = pickle.load(f)
    letters = [chr(ord('A') + i) for i in range(40)]
    meta |= {'itos': dict(enumerate(letters)), 'stoi': {c: i for i, c in enumerate(letters)}}
    with open('data/letters/meta.pkl', 'wb') as f:
        pickle.dump(meta, f)
    for script, flags in ((SAMPLE, ['--start=A']), (TRAIN, resume)):
        run = launch(script, *flags, check=False)
        assert run.returncode == 2 and 'but the checkpoint was trained with 40 tokens of its own' in run.stderr


@pytest.mark.parametrize('stoi', [{'a': 0, '\udcff': 1}, {'a': 0, 'b': 0}, {'a': 0, 'bc': 1}])
def test_alphabets_without_a_tokenizer(tmp_path, stoi):
    with pytest.raises(UserError, match='no tokenizer can be made of an alphabet'):
        hf_format.write_tokenizer(tmp_path, CharEncoding(stoi, {i: c for c, i in stoi.items()}), 8)


def test_a_full_disk_under_the_tokenizer(tmp_path):
    (tmp_path / 'tokenizer.json').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left'):
        hf_format.write_tokenizer(tmp_path, ByteEncoding(), 8)


def test_an_odd_checkpoint_is_exported(launch, work):
    """
    An alphabet and a name with an undecodable byte, flags of wrong types, no dropout, a link to an empty folder, and a
    vocabulary larger than the encoding's. The user's hidden folder stays.
    """
    alphabet = '\n ab\udcff'
    name = 'data\udcff'
    meta = {'vocab_size': 5, 'stoi': {c: i for i, c in enumerate(alphabet)}, 'itos': list(alphabet)}
    make_dataset(name, 5, meta)
    write_random_checkpoint(name, 5, False, 'erf')
    checkpoint = load('out/ckpt.pt')
    del checkpoint['model_args']['dropout']
    checkpoint['config'] |= {'gradient_accumulation_steps': 'x', 'batch_size': None, 'block_size': 32}
    torch.save(checkpoint, 'out/ckpt.pt')
    os.makedirs('.folder.tmp/mine')
    os.makedirs('folder')
    os.symlink('folder', 'hf')
    out = launch(EXPORT, '--hf_dir=hf').stdout
    assert 'without tokenizer files: no tokenizer can be made' in out
    assert sorted(os.listdir('.')) == ['.folder.tmp', 'data', 'folder', 'hf', 'out'] and os.listdir('.folder.tmp')
    assert '| data set | data\\udcff |' in open('folder/README.md').read()
    launch(IMPORT, '--hf_dir=hf', '--out_dir=back')
    assert load('back/ckpt.pt')['config']['dataset'] == name
    run = launch(EXPORT, '--hf_dir=hf\udcff', check=False)
    assert run.returncode == 2 and 'is not a name in UTF-8' in run.stderr


def test_a_full_disk_behind_stdout(launch, work):
    """It costs neither an export nor an import."""
    write_random_checkpoint('elsewhere', 40, False, 'erf')
    with open('/dev/full', 'w') as full:
        assert launch.start(EXPORT, '--hf_dir=hf', stdout=full).wait() == 0
    with open('/dev/full', 'w') as full:
        assert launch.start(IMPORT, '--hf_dir=hf', '--out_dir=back', stdout=full).wait() == 0
    assert os.path.exists('back/ckpt.pt')


FAKE = """
import torch
from types import SimpleNamespace
class AutoModelForCausalLM:
    def from_pretrained(folder, dtype):
        return AutoModelForCausalLM()
    def eval(self):
        return lambda idx: SimpleNamespace(logits=torch.zeros(*idx.shape, 40))
class AutoTokenizer:
    pass
"""


WAIT_FOR_GO = """
import os, sys, time
open('loading', 'w').close()
while not os.path.exists('go'):
    time.sleep(0.01)
sys.path.remove(os.path.dirname(__file__))
del sys.modules['transformers']
import transformers
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_a_signal_ends_leaves_nothing(launch, work, number):
    write_random_checkpoint('elsewhere', 40, False, 'erf')
    os.makedirs('fake')
    with open('fake/transformers.py', 'w') as f:
        f.write('import time; open("loading", "w").close(); time.sleep(600)')
    process = launch.start(EXPORT, '--hf_dir=hf', env={'PYTHONPATH': os.path.abspath('fake')})
    while not os.path.exists('loading') and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) not in (0, None) and sorted(os.listdir('.')) == ['data', 'fake', 'loading', 'out']


def test_two_exports_to_one_folder(launch, work):
    """The second one says so and leaves the first one's files alone."""
    write_random_checkpoint('letters', 40, False, 'erf')
    os.makedirs('fake')
    with open('fake/transformers.py', 'w') as f:
        f.write(WAIT_FOR_GO)
    first = launch.start(EXPORT, '--hf_dir=hf', env={'PYTHONPATH': os.path.abspath('fake')})
    while not os.path.exists('loading') and first.poll() is None:
        time.sleep(0.01)
    second = launch(EXPORT, '--hf_dir=hf', check=False)
    assert second.returncode == 2 and second.stderr.startswith('error: another export is writing hf_dir=hf')
    open('go', 'w').close()
    assert first.wait() == 0
    assert launch(IMPORT, '--hf_dir=hf', '--out_dir=back').stderr == ''
    os.rename('hf', '.hf2.unfinished-export')  # as if left by a killed export
    launch(EXPORT, '--hf_dir=hf2')
    assert sorted(os.listdir('.')) == ['back', 'data', 'fake', 'go', 'hf2', 'loading', 'out']


@pytest.mark.parametrize(
    'fake, message', [(FAKE, 'differ from the checkpoint'), ('raise OSError("old")', 'OSError: old')]
)
def test_an_export_that_computes_something_else_leaves_nothing(launch, work, fake, message):
    write_random_checkpoint('elsewhere', 40, False, 'erf')
    os.makedirs('fake')
    with open('fake/transformers.py', 'w') as f:
        f.write(fake)
    run = launch(EXPORT, '--hf_dir=hf', env={'PYTHONPATH': os.path.abspath('fake')}, check=False)
    assert run.returncode == 2 and message in run.stderr and not [n for n in os.listdir('.') if n.startswith('hf')]
