"""A problem is a job with its tensors: one module's weights, a few inputs, and the torch.nn way."""

import zlib
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ROTATED_INPUTS = 3


@dataclass
class Problem:
    """Everything a provider needs. Tensors are of `dtype` on `device`.

    module: torch.nn layer, the owner of the weights
    xs: list of [T, B, I]; dys: list of [T, B, D*P], the gradient that comes down in training
    hx: None, h0 [L*D, B, P], or (h0, c0) for the LSTM
    lengths: None or int64 [B] on the CPU; reset: None or bool [T, B]
    """

    job: object
    dtype: torch.dtype
    device: torch.device
    module: nn.Module
    xs: list
    dys: list
    hx: object
    lengths: torch.Tensor | None
    reset: torch.Tensor | None

    @property
    def training(self):
        return self.job.mode == "training"

    @property
    def rows(self):
        """Steps taken, over all rows: T*B without the padding."""
        case = self.job.case
        return case.T * case.B if self.lengths is None else int(self.lengths.sum())


def make_module(namespace, job, dtype, device):
    """The layer of `job` from torch.nn or from anything with the same constructors."""
    case = job.case
    options = {"proj_size": case.proj} if case.proj else {}
    module = getattr(namespace, job.cell)(
        case.I,
        case.H,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        device=device,
        dtype=dtype,
        **options,
    )
    return module.train(job.mode == "training")


def make_problem(job, device="cpu"):
    """Random weights, inputs, lengths and resets; the same for a job in every run."""
    case, dtype, device = job.case, DTYPES[job.dtype], torch.device(device)
    random = torch.Generator().manual_seed(zlib.crc32(repr(job.key).encode()))
    directions = 2 if case.bidirectional else 1
    state_size = case.proj or case.H

    def randn(*shape):
        return torch.randn(*shape, generator=random).to(device, dtype)

    module = make_module(nn, job, dtype, device)
    with torch.no_grad():
        for parameter in module.parameters():
            uniform = torch.rand(parameter.shape, generator=random) * 2 - 1
            parameter.copy_(uniform / case.H**0.5)
    hx = None
    if case.state:
        hx = randn(case.layers * directions, case.B, state_size)
        if job.cell == "LSTM":
            hx = (hx, randn(case.layers * directions, case.B, case.H))
    lengths = reset = None
    if case.min_length is not None:
        shortest = max(1, round(case.min_length * case.T))
        lengths = torch.randint(shortest, case.T + 1, (case.B,), generator=random)
    if case.reset_rate:
        reset = (torch.rand(case.T, case.B, generator=random) < case.reset_rate).to(device)
    return Problem(
        job=job,
        dtype=dtype,
        device=device,
        module=module,
        xs=[randn(case.T, case.B, case.I) for _ in range(ROTATED_INPUTS)],
        dys=[randn(case.T, case.B, directions * state_size) for _ in range(ROTATED_INPUTS)],
        hx=hx,
        lengths=lengths,
        reset=reset,
    )


def redraw(problem, number):
    """The same weights with other inputs; number 0 is the problem itself."""
    if number == 0:
        return problem
    random = torch.Generator().manual_seed(number)

    def like(tensor):
        return torch.randn(tensor.shape, generator=random).to(tensor)

    xs, dys = [like(problem.xs[0])], [like(problem.dys[0])]
    return replace(problem, xs=xs, dys=dys)


def cast(problem, dtype):
    """The same values in another dtype: a float64 problem is the truth for a float32 one."""

    def to(value):
        if value is None or isinstance(value, torch.Tensor):
            return value if value is None else value.to(dtype)
        return type(value)(to(item) for item in value)

    module = make_module(nn, problem.job, dtype, problem.device)
    module.load_state_dict(problem.module.state_dict())
    return Problem(
        job=problem.job,
        dtype=dtype,
        device=problem.device,
        module=module,
        xs=to(problem.xs),
        dys=to(problem.dys),
        hx=to(problem.hx),
        lengths=problem.lengths,
        reset=problem.reset,
    )


def call_plain(module, x, hx):
    return module(x, hx)


def call_packed(module, x, hx, lengths):
    """Rows of different lengths: pack, run, pad. All of it is what a user pays for."""
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, state = module(packed, hx)
    y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=x.shape[0])
    return y, state


def _zero_rows(state, rows):
    """State [L, B, H], or a pair of them, with `rows` (bool [B]) set to zero."""
    if isinstance(state, tuple):
        return tuple(_zero_rows(part, rows) for part in state)
    return state.masked_fill(rows[:, None], 0)


def call_chunked(module, x, hx, reset):
    """Resets, first idiom: cut the sequence wherever any row starts anew, mask the state there."""
    starts = reset.any(dim=1).nonzero().flatten().tolist()
    bounds = sorted({0, *starts, x.shape[0]})
    pieces, state = [], hx
    for begin, end in pairwise(bounds):
        if begin or (starts and starts[0] == 0):
            state = _zero_rows(state, reset[begin])
        y, state = module(x[begin:end], state)
        pieces.append(y)
    return torch.cat(pieces), state


def call_segmented(module, x, hx, reset):
    """Resets, second idiom: every episode is a row of its own in one packed batch."""
    T, B, _ = x.shape
    starts = reset.clone()
    starts[0] = True
    row, begin = starts.t().nonzero(as_tuple=True)  # ordered by row, then by time
    following = torch.cat([begin[1:], begin.new_tensor([T])])
    is_last = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])
    lengths = torch.where(is_last, T, following) - begin
    offset = torch.arange(int(lengths.max()), device=x.device)[:, None]
    step = (begin + offset).clamp(max=T - 1)  # [longest, episodes]
    packed = nn.utils.rnn.pack_padded_sequence(x[step, row], lengths.cpu(), enforce_sorted=False)
    carried = (begin == 0) & ~reset[0][row]

    def spread(part):
        return part[:, row].masked_fill(~carried[:, None], 0)

    hx = tuple(spread(part) for part in hx) if isinstance(hx, tuple) else spread(hx)
    y, state = module(packed, hx)
    y, _ = nn.utils.rnn.pad_packed_sequence(y)
    steps = torch.arange(T, device=x.device)[:, None]
    first = torch.searchsorted(row, torch.arange(B, device=x.device))  # [B], a row's first episode
    episode = first + starts.long().cumsum(0) - 1  # [T, B]
    state = (
        tuple(part[:, is_last] for part in state) if isinstance(state, tuple) else state[:, is_last]
    )
    return y[steps - begin[episode], episode], state


def torch_calls(problem):
    """Ways to run the problem with torch.nn, by name; of two, the faster one counts."""
    if problem.lengths is not None:
        return {"packed": lambda m, x, hx: call_packed(m, x, hx, problem.lengths)}
    if problem.reset is not None:
        return {
            "chunked": lambda m, x, hx: call_chunked(m, x, hx, problem.reset),
            "segmented": lambda m, x, hx: call_segmented(m, x, hx, problem.reset),
        }
    return {"plain": call_plain}
