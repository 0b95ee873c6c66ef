"""explain(): which backend a module or shape would run on, and why not the others."""

import torch

from fused_rnn import backends
from fused_rnn.modules import _FusedCell, _FusedRNNBase
from fused_rnn.ops import GATES
from fused_rnn.replace import _OURS


def explain(
    module_or_cell: torch.nn.Module | str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    bidirectional: bool | None = None,
    lengths: bool = False,
    reset: bool = False,
    return_cells: bool = False,
    batch: int | None = None,
    hidden_size: int | None = None,
    steps: int | None = None,
    training: bool = False,
    backend: str | None = None,
) -> str:
    """Say which backend would run a call, and for every other one why it would not.

    Args:
        module_or_cell: an LSTM, GRU, RNN or cell of fused_rnn or torch.nn, or "lstm", "gru",
            "rnn".
        device, dtype, bidirectional: of the call; the module's own, or "cpu", float32, False.
        lengths, reset, return_cells: whether the call gives or asks for them.
        batch, hidden_size, steps, training: rows of the call (32 if not given), units (the
            module's own), steps (many), and whether gradients are wanted, by which the automatic
            choice on a GPU goes.
        backend: a name to ask about instead of the one selected.

    Raises TypeError or ValueError where module_or_cell is none of these.

    >>> print(explain("lstm", backend="reference"))
    lstm on cpu, float32: reference (chosen by name)
      cpu: not asked for
      cuda: ...
      triton: ...
      torch: not asked for
    """
    if isinstance(module_or_cell, str):
        if module_or_cell not in GATES:
            raise ValueError(
                f"module_or_cell must be a module or one of {list(GATES)}, got {module_or_cell!r}"
            )
        cell, weight, both = module_or_cell, torch.empty(0), False
    elif isinstance(module_or_cell, (_FusedRNNBase, _FusedCell, *_OURS)):
        kind = _OURS.get(type(module_or_cell), type(module_or_cell))
        cell = kind._cell
        weight = next(iter(module_or_cell.parameters()))
        both = getattr(module_or_cell, "bidirectional", False)
    else:
        raise TypeError(
            "module_or_cell must be an LSTM, GRU, RNN or cell, or a name, got"
            f" {type(module_or_cell).__name__}"
        )
    both = both if bidirectional is None else bidirectional
    request = backends.Request(
        cell,
        torch.device(weight.device if device is None else device).type,
        weight.dtype if dtype is None else dtype,
        (False, True) if both else (False,),
        lengths or reset,
        return_cells,
        device_index=torch.device(weight.device if device is None else device).index,
        rows=batch,
        hidden=hidden_size or getattr(module_or_cell, "hidden_size", None),
        proj=getattr(module_or_cell, "proj_size", 0),
        steps=None if steps is None else backends.rounded(steps),
        layers=getattr(module_or_cell, "num_layers", 1),
        training=training,
    )
    name = backend or backends.current_backend()
    chosen = backends.choose(request, name)
    how = "chosen by itself" if name == backends.AUTO else "chosen by name"
    lines = [f"{cell} on {request.device}, {str(request.dtype)[6:]}: {chosen} ({how})"]
    for other in backends.BACKENDS:
        if other != chosen:
            reason = backends.why_not(other, request)
            if reason is None and name == backends.AUTO:
                reason = backends.BACKENDS[other].yields(request) or f"{chosen} comes first"
            lines.append(f"  {other}: {reason or 'not asked for'}")
    return "\n".join(lines)
