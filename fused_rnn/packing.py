"""PackedSequence in and out of padded form, differentiable any number of times."""

import torch
from torch import Tensor


class Packing:
    """Where the elements of a PackedSequence lie in the padded [T, B] grid.

    batch_sizes: int64 [T] on the CPU, non-increasing, as in torch.nn.utils.rnn.PackedSequence.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device):
        self.steps, self.rows = batch_sizes.shape[0], int(batch_sizes[0])
        taken = torch.arange(self.rows).unsqueeze(0) < batch_sizes.unsqueeze(1)  # [T, B]
        self._full = bool(taken.all())
        self._index = taken.flatten().nonzero().squeeze(1).to(device)
        # The rows' lengths [B], sorted; None where no row ends early.
        self.lengths = None if self._full else taken.sum(0).to(device)

    def pad(self, data: Tensor) -> Tensor:
        """[sum of lengths, ...] -> [T, B, ...], zero in the padding."""
        shape = (self.steps, self.rows, *data.shape[1:])
        if self._full:
            return data.reshape(shape)
        grid = data.new_zeros((self.steps * self.rows, *data.shape[1:]))
        return grid.index_copy(0, self._index, data).view(shape)

    def pack(self, padded: Tensor) -> Tensor:
        """[T, B, ...] -> [sum of lengths, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self._full else flat.index_select(0, self._index)
