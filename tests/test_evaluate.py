"""evaluate.py: loss, perplexity, bits per byte and HellaSwag, the same with any number of ranks."""

import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import NANOGPT, PROGRAMS, TINY, load, log_of
from encoding import ByteEncoding
from model import GPT, GPTConfig

TRAIN, EVALUATE = NANOGPT / 'train.py', NANOGPT / 'evaluate.py'


def results(name='out/ckpt'):
    with open(f'{name}_evaluation.json') as f:
        return json.load(f)


def model_of(path):
    checkpoint = load(path)
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval()
    model.load_state_dict(checkpoint['model'])
    return model


def texts_of(out_dir):
    """Returns all texts in the picture of the newest run."""
    from run_logs import load_runs
    from visualize_training import draw

    return ' '.join(text.get_text() for ax in draw(load_runs([out_dir])).axes for text in ax.texts)


def test_ranks_that_see_different_checkpoints(launch, work):
    """The mean over two models would be no one's loss."""
    launch(TRAIN, *TINY, '--max_iters=1')
    launch(TRAIN, *TINY, '--max_iters=1', '--learning_rate=1e-3', '--min_lr=1e-4', '--out_dir=own')
    env = {'EXTRA': '--out_dir=own'}
    run = launch(PROGRAMS / 'other_flags.py', EVALUATE, '--device=cpu', nproc=2, env=env, check=False)
    assert run.returncode == 2 and run.stderr.count('error: ') == 1 and 'ckpt.pt is ' in run.stderr
    assert not os.path.exists('out/ckpt_evaluation.json')


@torch.no_grad()
def test_loss(launch, work):
    """
    The mean over the first tokens of the validation split, in float32 to 1e-6, with any number of ranks and batch size.
    One character is one byte here, so bits per byte is the loss by ln 2.
    """
    launch(TRAIN, *TINY)
    model, tokens = (
        model_of('out/ckpt.pt'),
        torch.from_numpy(np.fromfile('data/letters/val.bin', np.uint16).astype(np.int64)),
    )
    rows = [(tokens[i : i + 16], tokens[i + 1 : i + 17]) for i in range(0, 200, 16)]
    rows[-1] = tuple(part[: 200 % 16] for part in rows[-1])
    expected = sum(model(x[None], y[None])[1].item() * len(y) for x, y in rows) / 200
    for nproc, flags in ((1, []), (1, ['--batch_size=3']), (2, ['--batch_size=5'])):
        out = launch(EVALUATE, '--val_tokens=200', '--device=cpu', *flags, nproc=nproc).stdout
        found = results()
        assert found['val_loss'] == pytest.approx(expected, rel=1e-6)
        assert f'letters, first 200 tokens: loss {expected:.4f}, perplexity {math.exp(expected):.2f}' in out
        assert found['perplexity'] == pytest.approx(math.exp(expected)) and found['iter'] == 21
        assert found['bits_per_byte'] == pytest.approx(expected / math.log(2))
    log = log_of('out')
    assert [record['val_loss'] for record in log['results']] == pytest.approx(3 * [expected]) and log['iterations']
    assert f'{expected / math.log(2):.3f} bits/byte' in texts_of('out')
    shutil.copytree('data/letters', 'data/short')
    tokens[:5].numpy().astype(np.uint16).tofile('data/short/val.bin')
    launch(EVALUATE, '--dataset=short', '--device=cpu')  # shorter than block_size
    assert results()['val_loss'] == pytest.approx(model(tokens[None, :4], tokens[None, 1:5])[1].item(), rel=1e-6)
    launch(EVALUATE, '--ckpt=ckpt_best.pt', '--device=cpu')
    assert results('out/ckpt_best')['val_tokens'] == 400  # all there are
    for flags, message in (
        (['--val_tokens=401'], 'only 400 tokens'),
        (['--dataset=nowhere'], "no data set 'nowhere'"),
        (['--out_dir=nowhere'], 'no checkpoint nowhere/ckpt.pt'),
        (['--hellaswag_style=mine'], 'it can be harness or llm.c'),
    ):
        run = launch(EVALUATE, '--device=cpu', *flags, check=False)
        assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr


def test_earlier_results(launch, work):
    """
    Results of other kinds stay in the file for the same checkpoint only, whatever else the file holds. A full disk
    behind stdout does not cost the results.
    """
    launch(TRAIN, *TINY)
    flags = ['--val_tokens=50', '--device=cpu']
    launch(EVALUATE, *flags)
    first = results()
    with open('out/ckpt_evaluation.json', 'w') as f:
        json.dump(first | {'hellaswag': {'acc': 0.5}}, f)
    with open('/dev/full', 'w') as full:
        assert launch.start(EVALUATE, *flags, stdout=full).wait() == 0
    assert results() == first | {'hellaswag': {'acc': 0.5}}
    checkpoint = load('out/ckpt.pt')
    checkpoint['model']['transformer.ln_f.weight'] *= 1.01
    torch.save(checkpoint, 'out/ckpt.pt')  # of the same iteration and size
    launch(EVALUATE, *flags)
    second = results()
    assert second['iter'] == first['iter'] and second['fingerprint'] != first['fingerprint']
    assert 'hellaswag' not in second
    for content in ('{"fingerprint": NaN}', f'{{"fingerprint": "{second["fingerprint"]}", "x": 1e999}}', '[' * 100_000):
        with open('out/ckpt_evaluation.json', 'w') as f:
            f.write(content)
        launch(EVALUATE, *flags)
        assert results() == second
    os.remove('out/ckpt_evaluation.json')
    os.mkfifo('out/ckpt_evaluation.json')
    launch(EVALUATE, *flags, timeout=30)
    assert results() == second and not [name for name in os.listdir('out') if 'tmp' in name]


def test_no_token_in_the_vocabulary(launch, work):
    launch(TRAIN, *TINY)
    np.full(400, 999, np.uint16).tofile('data/letters/val.bin')
    run = launch(EVALUATE, '--device=cpu', '--batch_size=1_000_000_000_000', check=False)
    assert run.returncode == 2 and 'token 999 at position 0' in run.stderr and run.stderr.count('error:') == 1


WORDS = 'A man [header] a [title] the dog runs, jumps over it and. then stops  while they watch'.split(' ')


@pytest.fixture
def questions(work):
    """A model of bytes with random weights, and a file of 13 questions of random words in HellaSwag's format."""
    os.makedirs('data/bytes')
    with open('data/bytes/meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 256, 'encoding': 'byte'}, f)
    np.random.default_rng(0).integers(256, size=500).astype(np.uint16).tofile('data/bytes/val.bin')
    args = dict(n_layer=1, n_head=2, n_embd=16, block_size=64, bias=False, vocab_size=256, dropout=0.0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**args))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    os.makedirs('out')
    rest = dict(model_args=args, iter_num=5, best_val_loss=1.0, config={'dataset': 'bytes'})
    torch.save({'model': model.state_dict(), **rest}, 'out/ckpt.pt')
    rng = np.random.default_rng(1)
    words = lambda: ' '.join(rng.choice(WORDS, rng.integers(2, 9)))
    questions = []
    for _ in range(13):
        a, b = words(), words().lower()
        question = dict(activity_label='Running', ctx_a=a, ctx_b=b, ctx=f'{a} {b}', endings=[words() for _ in range(4)])
        questions.append(question | {'label': int(rng.integers(4))})
    questions[0]['endings'][2] *= 4
    with open('hellaswag.jsonl', 'w') as f:
        f.writelines(json.dumps(question) + '\n' for question in questions)
    return questions


@torch.no_grad()
def accuracy(model, questions, contexts, endings, lengths):
    """Returns (acc, acc_norm), computed one ending after the other."""
    right = [0, 0]
    for question, context, choices in zip(questions, contexts, endings):
        scores = []
        for ending in choices:
            tokens = torch.tensor(ByteEncoding().encode(context + ending))[-65:]
            n = min(len(ending.encode()), 64)
            logits = model(tokens[None, :-1], tokens[None, 1:])[0][0, -n:]
            scores.append(F.log_softmax(logits, -1).gather(1, tokens[-n:, None]).sum().item())
        normalized = [score / lengths(ending) for score, ending in zip(scores, choices)]
        right[0] += int(np.argmax(scores)) == question['label']
        right[1] += int(np.argmax(normalized)) == question['label']
    return [count / len(questions) for count in right]


def test_hellaswag(launch, questions):
    """
    Equal to the computation above, in batches and on several ranks. Some contexts and endings are longer than
    block_size.
    """
    import re

    def clean(text):
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    model = model_of('out/ckpt.pt')
    contexts = [clean(f'Running: {q["ctx_a"]} {q["ctx_b"].capitalize()}') for q in questions]
    endings = [[' ' + clean(ending) for ending in q['endings']] for q in questions]
    harness = accuracy(model, questions, contexts, endings, lambda ending: len(ending) - 1)
    endings = [[' ' + ending for ending in q['endings']] for q in questions]
    llmc = accuracy(model, questions, [q['ctx'] for q in questions], endings, len)
    assert 0 < harness[0] < 1 and harness[0] != harness[1]
    assert sum(len(ending) > 64 for rows in endings for ending in rows) == 1
    flags = ['--hellaswag=True', '--input=hellaswag.jsonl', '--device=cpu']
    for nproc, more in ((1, ['--batch_size=3']), (2, ['--batch_size=5'])):
        run = launch(EVALUATE, *flags, *more, nproc=nproc)
        found = results()['hellaswag']
        assert [found['acc'], found['acc_norm']] == pytest.approx(harness) and found['questions'] == 13
        assert f'13 questions: acc_norm {harness[1]:.4f}' in run.stdout and 'SHA-256 differs' in run.stdout
        assert 'note: 1 ending is longer than block_size=64, so only its end is scored' in run.stdout
    launch(EVALUATE, *flags, '--hellaswag_style=llm.c')
    found = results()['hellaswag_llmc']
    assert [found['acc'], found['acc_norm']] == pytest.approx(llmc)
    assert results()['hellaswag']['acc'] == pytest.approx(harness[0])  # stays in the file
    launch(EVALUATE, *flags, '--limit=2', nproc=3)  # more ranks than questions
    assert results()['hellaswag']['questions'] == 2


@pytest.mark.parametrize('nproc', [1, 2])
def test_mistakes_with_hellaswag(launch, questions, nproc):
    def fails(*flags, env=None):
        run = launch(EVALUATE, '--hellaswag=True', '--device=cpu', *flags, nproc=nproc, check=False, env=env)
        assert run.returncode == 2 and 'Traceback' not in run.stderr and run.stderr.count('error:') == 1, run.stderr
        assert not os.path.exists('out/ckpt_evaluation.json')
        return run.stderr

    assert 'nowhere.jsonl cannot be read' in fails('--input=nowhere.jsonl')
    for label in ('1e999', '4', '-1', '1.5', 'true', 'null'):
        with open('label.jsonl', 'w') as f:
            f.write(json.dumps(questions[0] | {'label': 0}).replace('"label": 0', f'"label": {label}'))
        message = fails('--input=label.jsonl')
        assert 'label.jsonl, line 1, is not a HellaSwag question: ValueError: its label is' in message
    os.mkfifo('pipe')
    assert 'pipe cannot be read: not a regular file' in fails('--input=pipe')
    with open('hellaswag.jsonl', 'a') as f:
        f.write('\n{"ctx": "A"}\n')  # an empty line is skipped
    assert 'hellaswag.jsonl, line 15, is not a HellaSwag question' in fails('--input=hellaswag.jsonl')
    open('empty.jsonl', 'w').close()
    assert 'empty.jsonl holds no questions' in fails('--input=empty.jsonl')
    refused = {'HTTPS_PROXY': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'}
    assert 'name it: --input=hellaswag_val.jsonl' in fails(env=refused)
