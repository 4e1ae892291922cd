"""
Prepares OpenWebText in GPT-2 tokens, <|endoftext|> after each document: about 9 billion tokens, with nanoGPT's split.

    pip install datasets                         # or this project's extra `data`
    python data/openwebtext/prepare.py [--num_proc 8]
    python data/openwebtext/prepare.py --source FOLDER    # its .parquet or .jsonl files, downloaded elsewhere

Writes train.bin (about 18 GB) and val.bin next to this file. Hugging Face's cache takes another 54 GB for the text and
18 GB for the tokens (HF_HOME moves it). An interrupted run continues from that cache. Memory stays bounded.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from errors import UserError, first_line  # isort: skip  first: it also reports a missing package

import numpy as np

from prepare_common import ENDOFTEXT, DatasetWriter, gpt2_encode, gpt2_encoding
from shell import pip_install, python_command


def load(source, revision=None):
    """Returns the documents, with a column 'text', of a data set on the Hugging Face Hub or in a folder."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'OpenWebText needs the package datasets: {pip_install("datasets")}') from None
    try:
        dataset = datasets.load_dataset(source, revision=revision, split='train')
    except Exception as error:  # many classes: no network, no such data set, a full disk, ...
        script = os.path.abspath(__file__)
        raise UserError(
            f'cannot load {source}: {first_line(error)}\n'
            'If datasets refuses the script of a data set:\n'
            f'  {python_command(script, "--revision", "refs/convert/parquet")}\n'
            'Without a network: get the .parquet files of https://huggingface.co/datasets/Skylion007/openwebtext and '
            f'pass their\nfolder:\n  {python_command(script, "--source", "FOLDER")}'
        ) from error
    if 'text' not in dataset.column_names:
        raise UserError(f'{source} has no column text, but {", ".join(dataset.column_names)}')
    if getattr(dataset.features['text'], 'dtype', None) not in ('string', 'large_string'):
        raise UserError(f'{source}: the column text is of type {dataset.features["text"]}, not text')
    if len(dataset) < 2:
        raise UserError(f'{source} has too few documents ({len(dataset)}): train and val need one each')
    return dataset


def tokenize(batch):
    texts = [text or '' for text in batch['text']]
    return {
        'ids': [np.append(gpt2_encode(text), ENDOFTEXT).astype(np.uint16) for text in texts],
        'characters': list(map(len, texts)),
    }


def prepare(dataset, out_dir, num_proc):
    """Tokenizes a datasets.Dataset with a column 'text' in num_proc processes and writes it into out_dir."""
    import datasets
    from tqdm import tqdm

    gpt2_encoding()  # cache its files before many processes need them
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ids = datasets.Sequence(datasets.Value('uint16'))  # a quarter of the default's disk space
    features = datasets.Features({'ids': ids, 'characters': datasets.Value('int64')})
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
                out.documents += len(table)
                out.characters += sum(table.column('characters').to_pylist())
                for chunk in table.column('ids').chunks:
                    out.write(split, chunk.flatten().to_numpy())
        out.commit()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--num_proc', type=int, default=max((os.cpu_count() or 1) // 2, 1), help='processes (default: half the cores)'
    )
    parser.add_argument(
        '--source', default='Skylion007/openwebtext', help='a data set on the Hugging Face Hub, or a folder'
    )
    parser.add_argument('--revision', help='revision of the data set on the Hub')
    args = parser.parse_args()
    if args.num_proc < 1:
        raise UserError(f'--num_proc {args.num_proc} is not a positive number')
    gpt2_encoding()  # reports its errors before the download
    if not os.path.exists(args.source):
        print('OpenWebText takes hours and about 90 GB of disk. data/python_char needs no download.', flush=True)
    prepare(load(args.source, args.revision), HERE, args.num_proc)
