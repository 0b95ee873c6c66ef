"""LSTM, GRU, RNN and their cells: drop-ins for torch.nn's, on the fused scans.

They derive from torch.nn.RNNBase and RNNCellBase, so construction, parameters, initial values,
state_dict and most errors are torch.nn's own. (Not from torch.nn.LSTM and its siblings: Dynamo
refuses those and their subclasses.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import models
from fused_rnn.autograd import LayerInputs
from fused_rnn.functional import TAPES, check_lengths, check_reset, make_flags, run_layer
from fused_rnn.packing import Packing
from fused_rnn.wavefront import WaveLayer


class _FusedRNNBase(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share: the layers, one after another.

    Weights are read from the module's attributes at each call, so parametrizations, weight drop,
    functional_call and replicas need no care.
    """

    _cell: str  # lstm, gru or rnn
    tape = "keep"  # the default also for modules made from torch.nn's or unpickled from before

    def __init__(self, mode: str, *args, tape: str = "keep", **kwargs):
        super().__init__(mode, *args, **kwargs)
        if tape not in TAPES:
            raise ValueError(f"tape must be one of {TAPES}, got {tape!r}")
        self.tape = tape

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.tape == "keep" else f", tape={self.tape!r}")

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        name = self._flat_weights_names[0]
        if "parametrizations" in self._modules and name in self.parametrizations:
            weight = next(self.parametrizations[name].parameters())  # reading it computes it
        else:
            weight = getattr(self, name)
        expected = (2 if batch_sizes is not None else 3, self.input_size, weight.dtype)
        if (input.dim(), input.size(-1), input.dtype) != expected:
            self._update_flat_weights()
            super().check_input(input, batch_sizes)  # names what is wrong, unless autocast casts

    def _layer_weights(self, layer: int) -> list[Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh, w_hr of one layer, with a stack axis where it goes both ways."""
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        weights: list[Tensor | None] = []
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            if (name.startswith("bias") and not self.bias) or (
                name == "weight_hr" and not self.proj_size
            ):
                weights.append(None)
                continue
            parts = [getattr(self, f"{name}_l{layer}{suffix}") for suffix in suffixes]
            weights.append(parts[0] if len(parts) == 1 else torch.stack(parts))
        return weights

    def _run_model(self, x: Tensor, hx, flags):
        """Every layer on x by as few calls as can be: y and the final states. On a CPU by an
        operator for all of them, or for each where there are gradients; elsewhere by torch.nn's own
        path, where it is the one to take. None where neither can be."""
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        if not models.is_plain(x):
            directions = 2 if self.bidirectional else 1
            sizes = (self.num_layers, directions, self.hidden_size, self.proj_size)
            waves = self.tape == "keep" and directions == 1 and not self.proj_size
            if (
                dropout
                or flags is not None
                or not models.library_takes(self._cell, x, *sizes, waves)
            ):
                return None
            options = (self.bias, *sizes, self.mode == "RNN_RELU")
            return models.run_library(self._cell, x, hx, self._weights(), *options)
        grad = torch.is_grad_enabled()
        if (dropout and not grad) or (grad and (flags is not None or self.proj_size)):
            return None
        if grad and self.tape != "keep" and self._cell != "rnn":
            return None
        weights, relu = self._weights(), self.mode == "RNN_RELU"
        if dropout or (grad and any(t.requires_grad for t in (x, *weights, *(hx or ())))):
            options = (self.bias, self.bidirectional, relu, dropout)
            return models.train(self._cell, x, hx, weights, *options)
        options = (self.bias, self.proj_size > 0, self.bidirectional, relu)
        return models.infer(self._cell, x, hx, weights, flags, *options)

    def _weights(self) -> list[Tensor]:
        """All weights and biases in torch.nn's order."""
        held = self._parameters
        names = self._flat_weights_names
        return [held[name] if name in held else getattr(self, name) for name in names]

    def _scan_wave(self, x: Tensor, hx: tuple[Tensor, ...], chunk: int):
        """Every layer on x, a chunk of steps beside another: y and the final states."""
        layers = []
        for layer in range(self.num_layers):
            weights = [None if w is None else w.unsqueeze(0) for w in self._layer_weights(layer)]
            states = [s if s.shape[0] == 1 else s[layer : layer + 1] for s in hx]
            layers.append(WaveLayer(*weights[:4], *states, *(None,) * (2 - len(states))))
        dropout = self.dropout if self.training else 0.0
        return models.run_wave(self._cell, x, layers, chunk, dropout, self.mode == "RNN_RELU")

    def _scan_layers(self, x, hx, flags, ragged: bool, packing, return_cells: bool, asked=False):
        """Every layer on x [T, B, I] with hx a tuple of states [L*D, B, ...] or None. asked:
        ``_run_model`` has refused them already.

        Returns y [T, B, D*P], the final states [L*D, B, ...] and the layers' cells [T, B, D*H].
        """
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        directions = 2 if self.bidirectional else 1
        if not return_cells and not asked:
            found = self._run_model(x, hx, flags)
            if found is not None:
                return *found, ()
        reverse = (False, True)[:directions]
        if hx is None:
            sizes = (directions, self.hidden_size, self.proj_size)
            zeros = models.zero_states(self._cell, x, *sizes)
        if self.num_layers > 1 and directions == 1 and self.tape == "keep":
            plain = flags is None and packing is None and not return_cells and not self.proj_size
            sizes = (self.num_layers, self.hidden_size)
            if plain and (chunk := models.wave_chunk(self._cell, x, *sizes)) is not None:
                return *self._scan_wave(x, zeros if hx is None else hx, chunk), ()
        finals, cells = [], []
        for layer in range(self.num_layers):
            at = slice(layer * directions, (layer + 1) * directions)
            states = zeros if hx is None else tuple(state[at] for state in hx)
            h0, c0 = states if len(states) == 2 else (states[0], None)
            x, h_n, c_n, layer_cells = run_layer(
                self._cell,
                LayerInputs(x, *self._layer_weights(layer), h0, c0, flags),
                reverse,
                ragged=ragged,
                tape=self.tape,
                return_cells=return_cells,
                relu=self.mode == "RNN_RELU",
                plain_path=packing is not None,
            )
            finals.append((h_n,) if c_n is None else (h_n, c_n))
            if return_cells:
                cells.append(layer_cells.flatten(2))
            if self.dropout and self.training and layer < self.num_layers - 1:
                if packing is None:
                    x = F.dropout(x, self.dropout)
                else:  # draws random numbers for the elements there are, as torch.nn does
                    x = packing.pad(F.dropout(packing.pack(x), self.dropout))
        parts = zip(*finals, strict=True)
        return x, tuple(p[0] if len(p) == 1 else torch.cat(p) for p in parts), tuple(cells)

    def _run(self, input, hx, lengths, reset, return_cells: bool = False):
        """forward() of the three modules; hx is a tuple of states or None, and so it returns."""
        found = None
        if lengths is None and reset is None and not return_cells and type(input) is Tensor:
            found = self._run_plain(input, hx)  # single steps are made of little else than checks
            if found:
                return *found, ()
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, reset, return_cells)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._cell.upper()}: Expected input to be 2D or 3D, got {input.dim()}D"
                + (" tensor instead" if self._cell == "rnn" else " instead")
            )
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            lengths = lengths.unsqueeze(0) if isinstance(lengths, Tensor) else lengths
            reset = reset.unsqueeze(batch_dim) if isinstance(reset, Tensor) else reset
        if hx is None:
            self.check_input(input, None)
        else:
            self._check_state_ranks(hx, batched)
            hx = hx if batched else tuple(state.unsqueeze(1) for state in hx)
            self.check_forward_args(input, self._hidden(hx), None)
        x = input.transpose(0, 1) if self.batch_first else input
        steps, rows = x.shape[:2]
        flags = None
        if lengths is not None or reset is not None:
            if lengths is not None:
                check_lengths(lengths, steps, rows)
            if reset is not None:
                layout = "[B, T]" if self.batch_first else "[T, B]"
                check_reset(reset, tuple(input.shape[:2]), layout)
                reset = reset.t() if self.batch_first else reset
            flags = make_flags(steps, x.device, lengths, reset)
        options = (lengths is not None, None, return_cells, found is False)
        y, finals, cells = self._scan_layers(x, hx, flags, *options)
        if self.batch_first:
            y, cells = y.transpose(0, 1), tuple(c.transpose(0, 1) for c in cells)
        if not batched:
            y, cells = y.squeeze(batch_dim), tuple(c.squeeze(batch_dim) for c in cells)
            finals = tuple(state.squeeze(1) for state in finals)
        return y, finals, cells

    def _run_plain(self, input: Tensor, hx):
        """A batch without lengths or reset by ``_run_model``; False where that cannot be, None
        where an argument may be wrong, which is then said elsewhere."""
        if torch.compiler.is_compiling() or input.dim() != 3 or input.shape[2] != self.input_size:
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        steps, rows, _ = x.shape
        if hx is not None:
            entries = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            for state, size in zip(hx, sizes):
                if type(state) is not Tensor or state.shape != (entries, rows, size):
                    return None
        if steps == 0:
            return None
        found = self._run_model(x, hx, None)
        if found is not None and self.batch_first:
            return found[0].transpose(0, 1), found[1]
        return found or False

    def _run_packed(self, packed, hx, lengths, reset, return_cells: bool):
        if lengths is not None:
            raise ValueError("lengths must be None with a PackedSequence, which has its own")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self.check_input(data, batch_sizes)
        if hx is not None:
            if sorted_indices is not None:
                hx = tuple(state.index_select(1, sorted_indices) for state in hx)
            self.check_forward_args(data, self._hidden(hx), batch_sizes)
        packing = Packing(batch_sizes, data.device)
        if reset is not None:
            shape = (packing.steps, packing.rows)
            layout = "[B, T]" if self.batch_first else "[T, B]"
            check_reset(reset, shape[::-1] if self.batch_first else shape, layout)
            reset = reset.t() if self.batch_first else reset
            reset = reset if sorted_indices is None else reset.index_select(1, sorted_indices)
        flags = make_flags(packing.steps, data.device, packing.lengths, reset)
        y, finals, cells = self._scan_layers(
            packing.pad(data), hx, flags, packing.lengths is not None, packing, return_cells
        )
        if unsorted_indices is not None:
            finals = tuple(state.index_select(1, unsorted_indices) for state in finals)
        y, *cells = (
            PackedSequence(packing.pack(t), batch_sizes, sorted_indices, unsorted_indices)
            for t in (y, *cells)
        )
        return y, finals, tuple(cells)

    def _hidden(self, hx: tuple[Tensor, ...]):
        """The states as torch.nn's own checks take them."""
        return hx if self._cell == "lstm" else hx[0]

    def _check_state_ranks(self, hx: tuple[Tensor, ...], batched: bool) -> None:
        rank = 3 if batched else 2
        if all(state.dim() == rank for state in hx):
            return
        kind = "batched 3-D" if batched else "unbatched 2-D"
        if self._cell == "lstm":
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D but got"
                f" ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        raise RuntimeError(
            f"For {kind} input, hx should also be {rank}-D but got {hx[0].dim()}-D tensor"
        )


class LSTM(_FusedRNNBase):
    """Drop-in for :class:`torch.nn.LSTM`: same arguments, parameters, state_dict and results.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as torch.nn.LSTM.
        tape (keyword only): "keep" the gates for the backward pass, or "recompute" them there,
            which needs about a third of the memory.

    Equations: Hochreiter and Schmidhuber 1997, Gers et al. 2000; proj_size: Sak et al. 2014.

    >>> import torch
    >>> lstm = LSTM(10, 20, num_layers=2)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=torch.tensor([5, 0, 2]))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _cell = "lstm"
    # torch.nn.LSTM's own checks, which say hidden[0] and hidden[1].
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, input, hx=None, *, lengths=None, reset=None, return_cells=False):
        """Run the layers.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B if unbatched; None for zeros.
            lengths: integer [B] (scalar if unbatched) on any device, unsorted, zeros allowed:
                padded steps output zeros and leave the state alone; the reversed direction starts
                at each row's own end.
            reset: bool [T, B] ([B, T] with batch_first, [T] unbatched): the state is zeroed before
                the step; in the reversed direction after it.
            return_cells: also return every layer's cell states.

        Returns:
            output [T, B, D*P] laid out as input, (h_n [L*D, B, P], c_n [L*D, B, H]), and with
            return_cells a tuple of every layer's c_t for all t, [T, B, D*H] laid out as output.

        Raises:
            What torch.nn.LSTM raises, and TypeError or ValueError for lengths and reset.
        """
        if hx is not None:
            hx = tuple(hx)
            if len(hx) != 2:
                raise ValueError(f"hx must be a pair (h0, c0), got {len(hx)} values")
        y, states, cells = self._run(input, hx, lengths, reset, return_cells)
        return (y, states, cells) if return_cells else (y, states)


class GRU(_FusedRNNBase):
    """Drop-in for :class:`torch.nn.GRU`: same arguments, parameters, state_dict and results.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as torch.nn.GRU.
        tape (keyword only): "keep" the gates for the backward pass, or "recompute" them there,
            which needs about a fifth of the memory.

    Equations: Cho et al. 2014, with the reset gate after the recurrent product.

    >>> import torch
    >>> output, h_n = GRU(10, 20)(torch.randn(5, 3, 10), reset=torch.zeros(5, 3).bool())
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "gru"

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def forward(self, input, hx=None, *, lengths=None, reset=None):
        """Run the layers: as :meth:`LSTM.forward`, with hx and h_n single tensors [L*D, B, H]."""
        y, (h_n,), _ = self._run(input, None if hx is None else (hx,), lengths, reset)
        return y, h_n


class RNN(_FusedRNNBase):
    """Drop-in for :class:`torch.nn.RNN`: same arguments, parameters, state_dict and results.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device, dtype: as torch.nn.RNN.
        tape (keyword only): "keep" or "recompute", the same for this cell, whose output is all
            its backward pass needs.

    Equations: Elman 1990.

    >>> import torch
    >>> output, h_n = RNN(10, 20, nonlinearity="relu")(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "rnn"

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if self.nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(modes[self.nonlinearity], *args, **kwargs)

    forward = GRU.forward


class _FusedCell(torch.nn.RNNCellBase):
    """What the cells share: checks and one step of the scan."""

    _cell: str

    def _step(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One step from input [B, I] or [I]; hx a tuple of states [B, H] or [H], or None."""
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = (input.new_zeros((input.shape[0], self.hidden_size)),) * (
                2 if self._cell == "lstm" else 1
            )
        elif not batched:
            hx = tuple(state.unsqueeze(0) for state in hx)
        if input.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[1]} expected"
                f" {self.input_size}"
            )
        for k, state in enumerate(hx):
            if state.dim() != 2 or state.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size"
                    f" {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected"
                    f" {self.hidden_size}"
                )
        h0, c0 = (
            (state.unsqueeze(0) for state in hx) if len(hx) == 2 else (hx[0].unsqueeze(0), None)
        )
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        _, h_n, c_n, _ = run_layer(
            self._cell,
            LayerInputs(input.unsqueeze(0), *weights, None, h0, c0, None),
            (False,),
            relu=getattr(self, "nonlinearity", None) == "relu",
            plain_path=True,
            # A cell of no units is legal in torch.nn; there is nothing for a kernel to do.
            backend=None if self.hidden_size else "reference",
        )
        states = (h_n[0],) if c_n is None else (h_n[0], c_n[0])
        return states if batched else tuple(state.squeeze(0) for state in states)

    def _check_ranks(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> None:
        name = f"{self._cell.upper()}Cell"
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for k, state in enumerate(hx or ()):
            if state.dim() not in (1, 2):
                which = f"hx[{k}]" if self._cell == "lstm" else "hidden"
                raise ValueError(
                    f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead"
                )


class LSTMCell(_FusedCell):
    """Drop-in for :class:`torch.nn.LSTMCell`: same arguments, parameters and results."""

    _cell = "lstm"

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None):
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input, hx=None):
        """input [B, I] or [I], hx (h, c) [B, H] or [H] or None -> the next (h, c)."""
        hx = None if hx is None else tuple(hx)
        self._check_ranks(input, hx)
        return self._step(input, hx)


class GRUCell(_FusedCell):
    """Drop-in for :class:`torch.nn.GRUCell`: same arguments, parameters and results."""

    _cell = "gru"

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None):
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input, hx=None):
        """input [B, I] or [I], hx [B, H] or [H] or None -> the next h."""
        hx = None if hx is None else (hx,)
        self._check_ranks(input, hx)
        return self._step(input, hx)[0]


class RNNCell(_FusedCell):
    """Drop-in for :class:`torch.nn.RNNCell`: same arguments, parameters and results."""

    _cell = "rnn"
    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012

    def __init__(
        self, input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None
    ):
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input, hx=None):
        """input [B, I] or [I], hx [B, H] or [H] or None -> the next h."""
        hx = None if hx is None else (hx,)
        self._check_ranks(input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(input, hx)[0]
