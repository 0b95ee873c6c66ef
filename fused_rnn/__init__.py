"""LSTM, GRU and RNN for PyTorch with the recurrence in fused kernels.

Drop-ins for torch.nn's modules (``LSTM``, ``GRU``, ``RNN`` and their cells), functions on tensors
(``lstm``, ``gru``, ``rnn``), and ``replace_rnn`` to switch a model over.
"""

from importlib import metadata as _metadata

from fused_rnn.backends import available_backends, current_backend, use_backend
from fused_rnn.explain import explain
from fused_rnn.functional import gru, lstm, rnn
from fused_rnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fused_rnn.precision import fp32_precision
from fused_rnn.replace import replace_rnn, restore_rnn

try:
    __version__ = _metadata.version("fused_rnn")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "available_backends",
    "current_backend",
    "explain",
    "fp32_precision",
    "gru",
    "lstm",
    "replace_rnn",
    "restore_rnn",
    "rnn",
    "use_backend",
]
