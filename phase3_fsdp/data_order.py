"""
Reads a split in order, epoch after epoch: --data_order=sequential.

The rows of TokenFiles.consecutive are numbered through all files. Each batch takes the next batch_size * world_size
rows, and each rank takes batch_size of them, in the order of the ranks. The last row is followed by row 0 of the next
epoch, so a batch may hold the end of one epoch and the start of the next. Each epoch reads every row exactly once.

The position counts rows over all ranks and epochs, so it stays valid at any world size and batch size.
"""

from errors import UserError
from token_files import TokenFiles


def training_order(tokens: TokenFiles, config: dict, rank: int, world_size: int, state: dict | None):
    """
    Returns an object that yields the training batches in order: .next(vocab_size) -> rows, .state() -> dict or None.
    state: from a checkpoint, or None to start. Raises UserError for an unknown data_order.
    """
    if config['data_order'] not in ('random', 'sequential'):
        raise UserError(f'data_order={config["data_order"]}, but it can be random or sequential')
    if config['data_order'] == 'random':
        return RandomOrder(tokens, config['batch_size'])
    return SequentialOrder(tokens, config['batch_size'], rank, world_size, state)


class RandomOrder:
    """Draws random windows with replacement. Its state is that of torch's generator, which every checkpoint has."""

    def __init__(self, tokens: TokenFiles, batch_size: int):
        self.tokens, self.batch_size = tokens, batch_size

    def next(self, vocab_size: int):
        return self.tokens.sample(self.batch_size, vocab_size)

    def state(self) -> None:
        return None


class SequentialOrder:
    """
    Draws the rows of a split in order:

        order = SequentialOrder(data.train, batch_size, rank, world_size, state)  # state from a checkpoint, or None
        rows = order.next(vocab_size)                                             # this rank's next batch
        checkpoint['resume']['order'] = order.state()                             # the same on every rank

    Batches are drawn one ahead: when a checkpoint is written, the latest batch has not been trained on. state() is
    therefore the position of that batch, and the first next() after a resume returns it again.
    """

    def __init__(
        self, tokens: TokenFiles, batch_size: int, rank: int = 0, world_size: int = 1, state: dict | None = None
    ):
        self.tokens, self.batch_size, self.rank, self.world_size = tokens, batch_size, rank, world_size
        self.drawn = self.upcoming = self._position(state) if state else 0

    def next(self, vocab_size: int):
        """Returns int64 (batch_size, block_size + 1); -1 pads rows that are shorter, as at the end of a file."""
        self.drawn = self.upcoming
        self.upcoming += self.batch_size * self.world_size
        return self.tokens.consecutive(self.drawn + self.rank * self.batch_size, self.batch_size, vocab_size)

    def state(self) -> dict:
        """Returns the position of the latest batch as {'row', 'block_size'}."""
        return {'row': self.drawn, 'block_size': self.tokens.block_size}

    def _position(self, state):
        fields = [state.get(name) if isinstance(state, dict) else None for name in ('row', 'block_size')]
        if any(type(field) is not int for field in fields) or fields[0] < 0 or fields[1] < 1:
            raise UserError(f'the checkpoint is damaged: its position in the data is {state!r}')
        row, block_size = fields
        if block_size == self.tokens.block_size:
            return row
        # the model was cropped: start at the row that contains the position, repeating at most one row
        before = TokenFiles(self.tokens.files, min(block_size, len(self.tokens)))
        epoch, row = divmod(row, before.rows)
        k, position = before.place(row)
        return epoch * self.tokens.rows + self.tokens.first_row[k] + position // self.tokens.block_size
