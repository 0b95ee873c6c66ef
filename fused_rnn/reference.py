"""The truth: one layer's scan as a plain PyTorch loop, for any dtype, device and derivative.

Every kernel is tested against these functions in float64, and the second derivatives of every
backend are taken by differentiating them. Shapes and the meaning of ``flags`` and ``reverse`` are
those of docs/design.md; equations are derived in docs/math.md.
"""

import torch
from torch import Tensor

ENDED, RESET = 1, 2  # bits of flags


def lstm_activate(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates i, f, g, o from pre-activations a [..., 4H] (Hochreiter and Schmidhuber 1997;
    forget gate: Gers et al. 2000)."""
    a_i, a_f, a_g, a_o = a.chunk(4, -1)
    return torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)


def gru_activate(gates_x: Tensor, gates_h: Tensor, hn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates r, z, n of a reset-after GRU from x parts [..., 3H], h parts of r and z [..., 2H]
    and hn = W_hn h + b_hn [..., H] (Cho et al. 2014, in cuDNN's variant)."""
    x_r, x_z, x_n = gates_x.chunk(3, -1)
    h_r, h_z = gates_h.chunk(2, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return r, z, torch.tanh(x_n + r * hn)


def lstm_step(gates_x: Tensor, w_hh: Tensor, w_hr: Tensor | None, h: Tensor, c: Tensor):
    """One step of one stack entry: gates_x [B, 4H], w_hh [4H, P], w_hr [P, H] or None,
    h [B, P], c [B, H] -> new h, c."""
    i, f, g, o = lstm_activate(gates_x + h @ w_hh.mT)
    c = f * c + i * g
    h = o * torch.tanh(c)
    return (h if w_hr is None else h @ w_hr.mT), c


def gru_step(
    gates_x: Tensor, w_hh: Tensor, b_hn: Tensor | None, h: Tensor, reset_after: bool
) -> Tensor:
    """One step of one stack entry: gates_x [B, 3H], w_hh [3H, H], b_hn [H] or None, h [B, H]."""
    hidden = h.shape[-1]
    w_rz, w_n = w_hh[: 2 * hidden], w_hh[2 * hidden :]
    gates_h = h @ w_rz.mT
    if reset_after:
        hn = h @ w_n.mT
        if b_hn is not None:
            hn = hn + b_hn
        _, z, n = gru_activate(gates_x, gates_h, hn)
    else:
        r, z = torch.sigmoid(gates_x[..., : 2 * hidden] + gates_h).chunk(2, -1)
        n = torch.tanh(gates_x[..., 2 * hidden :] + (r * h) @ w_n.mT)
    return (1 - z) * n + z * h


def rnn_step(gates_x: Tensor, w_hh: Tensor, h: Tensor, relu: bool) -> Tensor:
    """One step of one stack entry (Elman 1990): gates_x [B, H], w_hh [H, H], h [B, H]."""
    a = gates_x + h @ w_hh.mT
    return torch.relu(a) if relu else torch.tanh(a)


def _scan(step, gates_x: Tensor, states: tuple[Tensor, ...], flags: Tensor | None, reverse: bool):
    """Run ``step(gates_x[t], *states) -> states`` over one stack entry.

    gates_x [T, B, G*H], states each [B, ...]. Returns the states' sequences [T, B, ...], zero
    where a row has ended, and the final states.
    """
    steps = gates_x.shape[0]
    sequences: list = [None] * steps
    if flags is not None:
        ended = (flags & ENDED).bool().unsqueeze(-1)
        reset = (flags & RESET).bool().unsqueeze(-1) & ~ended
    cut = None  # rows of a reversed entry whose segment began at the step just processed
    for t in reversed(range(steps)) if reverse else range(steps):
        if flags is not None:
            cut = cut if reverse else reset[t]
            if cut is not None:
                states = tuple(torch.where(cut, 0, s) for s in states)
        new = step(gates_x[t], *states)
        if flags is None:
            states = new
            sequences[t] = new
        else:
            states = tuple(torch.where(ended[t], s, n) for s, n in zip(states, new, strict=True))
            sequences[t] = tuple(torch.where(ended[t], 0, n) for n in new)
            cut = reset[t]
    return tuple(torch.stack(parts) for parts in zip(*sequences, strict=True)), states


def _scan_stack(steps, gates_x, states, flags, reverse):
    """``_scan`` for every stack entry: states each [S, B, ...]; sequences [T, B, S, ...]."""
    parts = [
        _scan(steps[s], gates_x[:, :, s], tuple(x[s] for x in states), flags, reverse[s])
        for s in range(gates_x.shape[2])
    ]
    sequences = tuple(torch.stack(x, 2) for x in zip(*(p[0] for p in parts), strict=True))
    finals = tuple(torch.stack(x) for x in zip(*(p[1] for p in parts), strict=True))
    return sequences, finals


def lstm_scan(
    gates_x: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    w_hr: Tensor | None = None,
    flags: Tensor | None = None,
    reverse=(False,),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LSTM scan: gates_x [T, B, S, 4H], w_hh [S, 4H, P], h0 [S, B, P], c0 [S, B, H],
    w_hr [S, P, H] or None, flags uint8 [T, B] or None
    -> y [T, B, S, P], h_n [S, B, P], c_n [S, B, H], cells [T, B, S, H]."""

    def entry(s):
        return lambda g, h, c: lstm_step(g, w_hh[s], None if w_hr is None else w_hr[s], h, c)

    (y, cells), (h_n, c_n) = _scan_stack(
        [entry(s) for s in range(gates_x.shape[2])], gates_x, (h0, c0), flags, reverse
    )
    return y, h_n, c_n, cells


def gru_scan(
    gates_x: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    *,
    b_hn: Tensor | None = None,
    flags: Tensor | None = None,
    reverse=(False,),
    reset_after: bool = True,
) -> tuple[Tensor, Tensor]:
    """GRU scan: gates_x [T, B, S, 3H], w_hh [S, 3H, H], h0 [S, B, H], b_hn [S, H] or None,
    flags uint8 [T, B] or None -> y [T, B, S, H], h_n [S, B, H]."""

    def entry(s):
        bias = None if b_hn is None else b_hn[s]
        return lambda g, h: (gru_step(g, w_hh[s], bias, h, reset_after),)

    (y,), (h_n,) = _scan_stack(
        [entry(s) for s in range(gates_x.shape[2])], gates_x, (h0,), flags, reverse
    )
    return y, h_n


def rnn_scan(
    gates_x: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    *,
    flags: Tensor | None = None,
    reverse=(False,),
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """RNN scan: gates_x [T, B, S, H], w_hh [S, H, H], h0 [S, B, H], flags uint8 [T, B] or None
    -> y [T, B, S, H], h_n [S, B, H]."""

    def entry(s):
        return lambda g, h: (rnn_step(g, w_hh[s], h, relu),)

    (y,), (h_n,) = _scan_stack(
        [entry(s) for s in range(gates_x.shape[2])], gates_x, (h0,), flags, reverse
    )
    return y, h_n
