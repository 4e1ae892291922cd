"""
Evaluates a checkpoint: loss, perplexity and bits per byte on a data set, and HellaSwag.

$ python evaluate.py --out_dir=out                          # the validation split of the training data
$ python evaluate.py --out_dir=out --dataset=fineweb --val_tokens=10_485_760
$ python evaluate.py --out_dir=out --hellaswag=True         # downloads the 10,042 questions (12 MB)
$ torchrun --standalone --nproc_per_node=4 evaluate.py --out_dir=out --hellaswag=True --input=hellaswag_val.jsonl

The results are printed and written to OUT/ckpt_evaluation.json. For other benchmarks, see docs/huggingface.md.
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import hashlib
import json
import math
import os
import re
import sys
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F

import hardware
from checkpoint import find_checkpoint, load_checkpoint, load_model, saved_options
from checkpoint_crc import fingerprint
from configurator import configure
from dataset import meta_of_model, open_dataset
from distributed import check_environment, join_ranks, leave_ranks, mean_over_ranks, same_on_all_ranks
from encoding import download, get_encoding, has_sha256
from evaluation import bits_per_byte, mean_bytes_per_token, mean_loss
from output import protect_output
from progress import show_progress
from regular_file import check_regular
from replaced import replaced

# -----------------------------------------------------------------------------
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # ckpt.pt: the latest; ckpt_best.pt: the one with the lowest validation loss
dataset = ''  # data set to evaluate on; empty: the one that the model was trained on
val_tokens = 0  # evaluate on this many tokens from the start of the validation split; 0: on all
hellaswag = False  # also answer the HellaSwag questions
input = ''  # path of hellaswag_val.jsonl, for machines without a network; empty: download it; needs hellaswag
hellaswag_style = 'harness'  # score as lm-evaluation-harness (harness) or as llm.c (llm.c); needs hellaswag
limit = 0  # answer only this many questions; 0: all; needs hellaswag
batch_size = 16  # sequences computed at a time, on each rank
model_dir = ''  # folder of the model.py to use, such as ../phase2_triton; empty: the folder of evaluate.py
backend = 'auto'  # nccl or gloo; auto: nccl on CUDA GPUs
dist_timeout = 600  # seconds that a rank waits for the others before it ends the run
device = 'auto'  # cpu, cuda, cuda:1 or mps; auto: the best on this machine
dtype = 'auto'  # float32, bfloat16 or float16; auto: the best on this machine
config, flags_set = configure(globals())  # overrides from the command line and config files; see --help
# -----------------------------------------------------------------------------

# Zellers et al. 2019, arxiv.org/abs/1905.07830
HELLASWAG_URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
HELLASWAG_SHA256 = '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'


def read_questions():
    """
    Returns up to limit HellaSwag questions as a list of dicts. Raises UserError if the file is missing or malformed.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    path = input or os.path.join(here, 'data', 'downloads', 'hellaswag_val.jsonl')
    if not input and not has_sha256(path, HELLASWAG_SHA256):
        print(f'downloading {HELLASWAG_URL}')
        advice = f'Get this file on any machine:\n  {HELLASWAG_URL}\nand name it: --input=hellaswag_val.jsonl'
        download(HELLASWAG_URL, path, HELLASWAG_SHA256, advice)
    try:
        check_regular(path)
        with open(path, 'rb') as f:
            content = f.read()
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    if hashlib.sha256(content).hexdigest() != HELLASWAG_SHA256:
        print(f"note: {path} is not HellaSwag's validation split (its SHA-256 differs), but is used anyway")
    questions = []
    for i, line in enumerate(content.splitlines(), 1):
        if limit and len(questions) == limit:
            break
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            if not isinstance(question, dict):
                raise TypeError(f'not an object, but a {type(question).__name__}')
            texts = [question[key] for key in ('ctx', 'ctx_a', 'ctx_b', 'activity_label')] + question['endings']
            label = str(question['label'])
            if not all(isinstance(text, str) for text in texts):
                raise TypeError('a text is not a string')
            if label not in map(str, range(len(texts) - 4)):
                raise ValueError(f'its label is {label:.20}, but it has {len(texts) - 4} endings')
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise UserError(f'{path}, line {i}, is not a HellaSwag question: {type(e).__name__}: {e}') from None
        questions.append(question)
    if not questions:
        raise UserError(f'{path} holds no questions')
    return questions


def on_rank_0(function):
    """Calls function on rank 0 and returns its result, or raises its UserError, on every rank. Collective."""
    answer = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [('result', function())]
        except UserError as e:
            answer = [('error', str(e))]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    kind, value = answer[0]
    if kind == 'error':
        raise UserError(value)
    return value


def clean(text):
    """Returns the text without WikiHow's markup, cleaned as in lm-evaluation-harness (its hellaswag/utils.py)."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def endings_of(question, encoding):
    """
    Returns [(tokens, n, length)], one per ending. tokens: context and ending, whose last n tokens are the ending.
    length: divisor of the normalized score, in characters for lm-evaluation-harness and in tokens for llm.c.
    """
    if hellaswag_style == 'llm.c':
        context = encoding.encode(question['ctx'])
        endings = [encoding.encode(' ' + ending) for ending in question['endings']]
        return [(context + ending, len(ending), len(ending)) for ending in endings]
    context = clean(f'{question["activity_label"]}: {question["ctx_a"]} {question["ctx_b"].capitalize()}')
    start = len(encoding.encode(context.rstrip()))
    rows = []
    for ending in map(clean, question['endings']):
        tokens = encoding.encode(f'{context} {ending}')
        rows.append((tokens, len(tokens) - start, max(len(ending), 1)))
    return rows


@torch.no_grad()
def log_likelihoods(model, rows):
    """
    Returns, for each (tokens, n) of rows in order, the log-likelihood in nats of its last n tokens given the others.
    """
    block_size, found = model.config.block_size, [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # batches of similar lengths need little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in show_progress(batches, 'HellaSwag'):
        width = min(max(len(rows[batch[0]][0]) - 1, 1), block_size)
        X, Y = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -1)
        for x, y, i in zip(X, Y, batch):
            tokens, n = rows[i]
            tokens = torch.tensor(tokens[-block_size - 1 :])
            last = len(tokens) - 1
            x[:last] = tokens[:-1]
            y[max(last - n, 0) : last] = tokens[1:][-n:]
        X, Y = X.to(device), Y.to(device)
        with ctx:
            logits, _ = model(X, Y)
        losses = F.cross_entropy(logits.float().transpose(1, 2), Y, ignore_index=-1, reduction='none').sum(1)
        for i, loss in zip(batch, losses.tolist()):
            found[i] = -loss
    return found


def hellaswag_accuracy(model, questions, endings):
    """
    Returns {'acc', 'acc_norm', 'stderr_norm', 'questions'}: accuracy by the highest likelihood, accuracy by the highest
    likelihood per length, the standard error of the latter, and the number of questions. endings: those of this rank's
    questions, see endings_of. Collective.
    """
    scores = iter(log_likelihoods(model, [(tokens, n) for rows in endings for tokens, n, _ in rows]))
    right = torch.zeros(2, dtype=torch.float64)
    for question, rows in zip(questions[rank::world_size], endings):
        score = torch.tensor([next(scores) for _ in rows], dtype=torch.float64)
        if not score.isfinite().all():
            raise UserError(f'the loss of {path} on HellaSwag is not finite: it may be finite in another --dtype')
        normalized = score / torch.tensor([length for _, _, length in rows], dtype=torch.float64)
        right += torch.tensor([score.argmax() == int(question['label']), normalized.argmax() == int(question['label'])])
    acc, acc_norm = (mean_over_ranks(right) * world_size / len(questions)).tolist()
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / len(questions))
    return {'acc': acc, 'acc_norm': acc_norm, 'stderr_norm': stderr, 'questions': len(questions)}


def read_json(path):
    """Returns the content of a strict JSON file. Raises OSError or ValueError."""
    check_regular(path)
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        json.dumps(content, allow_nan=False)  # NaN and Infinity are not JSON
        return content
    except RecursionError as e:
        raise ValueError(str(e)) from None


def write_results(path, results):
    """Writes the results as JSON, together with earlier results of other kinds for the same checkpoint."""
    try:
        earlier = read_json(path)
    except (OSError, ValueError):
        earlier = {}
    if isinstance(earlier, dict) and earlier.get('fingerprint') == results['fingerprint']:
        results = earlier | results
    write_json(path, results)


def add_to_log(path, results):
    """
    Adds the results to the list `results` in the log, unless its run has not ended or the file is unusable. Prints
    which.
    """
    try:
        log = read_json(path)
        if log['run']['status'] == 'running':
            return print(f'not added to {path}: its run has not ended, or it was killed')
        log.setdefault('results', []).append(results)
        write_json(path, log)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        return print(f'not added to {path}: {type(e).__name__}: {e}')
    print(f'added to {path}')


def write_json(path, content):
    with replaced(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=2, allow_nan=False)
        f.write('\n')


if hellaswag_style not in ('harness', 'llm.c'):
    raise UserError(f"hellaswag_style is '{hellaswag_style}', but it can be harness or llm.c")
protect_output()  # the results are in a file, so a full disk or a closed pipe behind stdout does not cost them
check_environment()
device, dtype, _, backend = hardware.resolve_auto(device, dtype, False, backend)
rank, world_size = join_ranks(backend, dist_timeout)
ctx = hardware.autocast(device, dtype)

# model
if model_dir:
    sys.path.insert(0, model_dir)
from model import GPT, GPTConfig

path = find_checkpoint(out_dir) if ckpt == 'ckpt.pt' else os.path.join(out_dir, ckpt)
checkpoint = load_checkpoint(path)
# a machine may have a copy of its own, or a run may have replaced the file meanwhile
same_on_all_ranks(int(fingerprint(path), 16), f'the fingerprint of {path}')
args = {k: v for k, v in checkpoint['model_args'].items() if k in GPTConfig.__dataclass_fields__}
options = saved_options(checkpoint, {k: v for k, v in config.items() if k in GPTConfig.__dataclass_fields__}, flags_set)
model = GPT(GPTConfig(**{**args, 'dropout': 0.0, **options})).eval()
load_model(model, checkpoint)
model.to(device)
dataset = dataset or checkpoint.get('config', {}).get('dataset', '')
manifest = checkpoint.get('resume', {}).get('data')
meta = meta_of_model(dataset, args['vocab_size'], 'dataset' in flags_set, manifest)
if not dataset and not hellaswag:
    raise UserError(f'{path} does not record its training data: name a data set with --dataset')

# encode before anything is computed: an alphabet may lack a character
questions = on_rank_0(read_questions) if hellaswag else []
endings = [endings_of(question, get_encoding(meta)) for question in questions[rank::world_size]]
cut = sum(n > args['block_size'] for rows in endings for _, n, _ in rows)
cut = round(mean_over_ranks(torch.tensor(float(cut))).item() * world_size) if hellaswag else 0
if cut:
    which, part = ('1 ending is', 'its end is') if cut == 1 else (f'{cut:,} endings are', 'their ends are')
    print(f'note: {which} longer than block_size={args["block_size"]}, so only {part} scored')
results = {'checkpoint': os.path.basename(path), 'fingerprint': fingerprint(path), 'iter': checkpoint['iter_num']}
results['dtype'] = dtype
data = None
try:
    data = open_dataset(dataset, 1, splits=('val',)) if dataset else None  # it may be shorter than block_size
except UserError as error:
    if not hellaswag or 'dataset' in flags_set:
        raise
    print(f'note: HellaSwag only, because {error}')
if data:
    num_tokens = val_tokens or len(data.val)
    loss = mean_loss(model, data.val, num_tokens, args['block_size'], batch_size, device, ctx)
    data.raise_problem()
    if not math.isfinite(loss):
        raise UserError(f'the loss of {path} on {dataset} is {loss}: it may be finite in another --dtype')
    bits = bits_per_byte(loss, mean_bytes_per_token(data, num_tokens))
    results |= {'dataset': dataset, 'val_tokens': num_tokens, 'val_loss': loss, 'perplexity': math.exp(min(loss, 700))}
    results |= {'bits_per_byte': bits}
    text = 'n/a' if bits is None else f'{bits:.4f}'
    print(
        f'{dataset}, first {num_tokens:,} tokens: loss {loss:.4f}, perplexity {results["perplexity"]:.2f}, '
        f'bits per byte {text}'
    )
if hellaswag:
    started = time.perf_counter()
    found = hellaswag_accuracy(model, questions, endings)
    results['hellaswag' if hellaswag_style == 'harness' else 'hellaswag_llmc'] = found
    print(
        f'HellaSwag ({hellaswag_style}), {found["questions"]:,} questions: acc_norm {found["acc_norm"]:.4f} '
        f'(standard error {found["stderr_norm"]:.4f}), acc {found["acc"]:.4f}, {time.perf_counter() - started:.0f} s'
    )
if rank == 0:
    file = os.path.splitext(path)[0] + '_evaluation.json'
    try:
        write_results(file, results)
    except OSError as e:
        raise UserError(f'{e}. The results are above') from None
    print(f'written to {file}')
    log = checkpoint.get('resume', {}).get('log')
    if log:
        add_to_log(os.path.join(os.path.dirname(path), os.path.basename(log)), results)
leave_ranks()
