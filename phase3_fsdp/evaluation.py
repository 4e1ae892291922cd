"""
Computes the loss over exactly the first N tokens of a split (--val_tokens=N), which does not depend on the world size
or the batch size.

The tokens are read in rows of block_size, without overlap and without random numbers; the last row may be shorter. A
prediction needs a token before it in the same file, so the first token of each file is only an input.
"""

import math

import numpy as np
import torch

from distributed import mean_over_ranks
from encoding import get_encoding
from errors import UserError
from progress import show_progress
from token_files import TokenFiles, inputs_and_targets


def count_predictions(tokens: TokenFiles, num_tokens: int) -> int:
    """
    Returns the number of predictions that num_tokens + 1 tokens allow: num_tokens, or fewer where files end, because
    the first token of a file is not predicted. Raises UserError if the split has fewer than num_tokens tokens.
    """
    if num_tokens > len(tokens):
        raise UserError(
            f'--val_tokens={num_tokens}, but the validation split has only {len(tokens):,} tokens: use at most '
            'that many'
        )
    return min(num_tokens, sum(file.tokens - 1 for file in tokens.files))


@torch.no_grad()
def mean_loss(
    model,
    tokens: TokenFiles,
    num_tokens: int,
    block_size: int,
    batch_size: int,
    device: str,
    context,
    stop_requested=None,
) -> float | None:
    """
    Returns the mean loss in nats over the first num_tokens tokens, or NaN if all of them are outside the vocabulary:
    such tokens are not counted, and become a problem of the data set. Collective: every rank returns the same number
    and runs the same number of forward passes of shape (batch_size, block_size), or of fewer rows if a rank's share of
    the split has fewer. context: the autocast context of the forward pass. stop_requested: a collective function; once
    it returns True, mean_loss ends early and returns None. Raises UserError if there are fewer tokens.
    """
    if tokens.block_size != block_size:
        tokens = TokenFiles(tokens.files, block_size, tokens.problems)
    predictions = count_predictions(tokens, num_tokens)
    distributed = torch.distributed.is_initialized()
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    vocab_size = getattr(model, 'module', model).config.vocab_size
    batch_size = min(batch_size, -(-tokens.rows // world_size))  # more rows would only be padding
    training = model.training
    model.eval()
    losses, counts = [], []
    batches = range(0, tokens.rows, batch_size * world_size)  # the first row over all ranks
    batches = [row for row in batches if _predictions_before(tokens, row) < predictions]
    for batch in show_progress(batches, 'evaluating val'):
        if stop_requested and stop_requested():
            model.train(training)
            return None
        first = batch + rank * batch_size
        X, Y = inputs_and_targets(tokens.consecutive(first, batch_size, vocab_size))
        left = [predictions - _predictions_before(tokens, row) for row in range(first, first + batch_size)]
        Y[torch.arange(block_size) >= torch.tensor(left)[:, None]] = -1
        counts.append(int((Y >= 0).sum()))
        if counts[-1] == 0:
            Y[:] = 0  # FSDP requires ranks without work to take part in the forward pass
        with context:
            losses.append(model(X.to(device), Y.to(device))[1].float())
    model.train(training)
    sums = torch.stack(losses).cpu().double() * torch.tensor(counts)  # sums in float64
    total, count = mean_over_ranks(torch.tensor([sums.sum(), sum(counts)], dtype=torch.float64)).tolist()
    return total / count if count else math.nan


def _predictions_before(tokens, row):
    """Returns the number of predictions in the rows before this one; for a row after the last, all of them."""
    k, position = tokens.place(row) if row < tokens.rows else (len(tokens.files), 0)
    return sum(file.tokens - 1 for file in tokens.files[:k]) + position


def mean_bytes_per_token(data, num_tokens: int) -> float | None:
    """
    Returns the mean number of bytes of UTF-8 text per prediction of mean_loss(model, data.val, num_tokens, ...), or
    None if the encoding is unknown. <|endoftext|> counts as 0 bytes.
    """
    try:
        lengths = np.array(get_encoding(data.meta).byte_lengths())
    except UserError:  # unknown, or the files of GPT-2's are not on this machine
        return None
    left = predictions = count_predictions(data.val, num_tokens)
    total = 0
    for k, file in enumerate(data.val.files):
        end = min(file.tokens, left + 1)
        for start in range(1, end, 1 << 20):
            ids = data.val.read(k, start, min(1 << 20, end - start))
            total += int(lengths[ids[ids < len(lengths)]].sum())
        left -= end - 1
    return total / predictions


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """
    Converts a loss in nats per token to bits per byte of text, which is comparable between encodings; None if unknown.
    """
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


class FirstTokens:
    """Computes the validation loss over the first config['val_tokens'] tokens. Raises UserError if there are fewer."""

    def __init__(self, data, config: dict):
        self.data, self.config, self.bytes_per_token = data, config, None
        if config['val_tokens']:
            count_predictions(data.val, config['val_tokens'])
            self.bytes_per_token = mean_bytes_per_token(data, config['val_tokens'])

    def loss(self, model, context, stop_signal) -> dict | None:
        """Returns {'val': nats, 'val_bits_per_byte': bits or None}, or None if a stop was requested. Collective."""
        names = ('val_tokens', 'block_size', 'batch_size', 'device')
        loss = mean_loss(model, self.data.val, *(self.config[k] for k in names), context, stop_signal.requested)
        return None if loss is None else {'val': loss, 'val_bits_per_byte': bits_per_byte(loss, self.bytes_per_token)}
