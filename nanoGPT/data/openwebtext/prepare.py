"""
OpenWebText in GPT-2 tokens, each document followed by <|endoftext|>: about 9 billion tokens, with upstream's split.

    pip install datasets                         # or this project's extra `data`
    python data/openwebtext/prepare.py [--num_proc 8]
    python data/openwebtext/prepare.py --source FOLDER    # its .parquet or .jsonl files, downloaded elsewhere

Writes train.bin (about 18 GB) and val.bin beside this file. Hugging Face's cache takes about 54 GB for the text and 18 GB for the
tokens besides (HF_HOME moves it); an interrupted run goes on from that cache. Memory stays bounded.
"""

import argparse
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from errors import UserError, first_line
from prepare_common import ENDOFTEXT, DatasetWriter, gpt2_encode, gpt2_encoding
from shell import pip_install, python_command


def load(source, revision=None):
    """The one split of documents, with a column 'text', of a data set of the Hugging Face Hub or of a folder."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'OpenWebText needs the package datasets: {pip_install("datasets")}') from None
    try:
        dataset = datasets.load_dataset(source, revision=revision, split='train')
    except Exception as error:  # of very many kinds: no network, no such data set, a disk that is full, ...
        script = os.path.abspath(__file__)
        raise UserError(
            f'cannot load {source}: {first_line(error)}\n'
            f'If datasets refuses the script of a data set:\n  {python_command(script, "--revision", "refs/convert/parquet")}\n'
            'Without a network: get the .parquet files of https://huggingface.co/datasets/Skylion007/openwebtext and pass their\n'
            f'folder:\n  {python_command(script, "--source", "FOLDER")}'
        ) from error
    if 'text' not in dataset.column_names:
        raise UserError(f'{source} has no column text, but {", ".join(dataset.column_names)}')
    if getattr(dataset.features['text'], 'dtype', None) not in ('string', 'large_string'):
        raise UserError(f'{source}: the column text is of type {dataset.features["text"]}, not text')
    return dataset


def tokenize(batch):
    return {'ids': [np.append(gpt2_encode(text or ''), ENDOFTEXT).astype(np.uint16) for text in batch['text']]}


def prepare(dataset, out_dir, num_proc):
    """Tokenizes a datasets.Dataset with a column 'text' in num_proc processes and writes it into out_dir."""
    import datasets
    from tqdm import tqdm

    gpt2_encoding()  # its errors first, and its files in the cache before many processes want them
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    features = datasets.Features(
        {'ids': datasets.Sequence(datasets.Value('uint16'))}
    )  # a quarter of the default's disk space
    tokenized = splits.map(
        tokenize,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        desc='tokenizing',
    )
    with DatasetWriter(out_dir) as out:
        for split, rows in (('train', tokenized['train']), ('val', tokenized['test'])):
            for table in tqdm(
                rows.with_format('arrow').iter(batch_size=10_000), f'writing {split}', len(rows) // 10_000 + 1
            ):
                for chunk in table.column('ids').chunks:
                    out.write(split, chunk.flatten().to_numpy())
        out.commit()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--num_proc', type=int, default=max((os.cpu_count() or 1) // 2, 1), help='processes (default: half the cores)'
    )
    parser.add_argument(
        '--source', default='Skylion007/openwebtext', help='a data set of the Hugging Face Hub, or a folder'
    )
    parser.add_argument('--revision', help='its revision on the Hub')
    args = parser.parse_args()
    prepare(load(args.source, args.revision), HERE, args.num_proc)
