"""lstm(), gru() and rnn() on tensors: validation, backend choice, one layer at a time."""

import torch
from torch import Tensor

from fused_rnn import autograd, backends, library, observers, whole
from fused_rnn.autograd import LayerInputs, LayerSpec
from fused_rnn.ops import ACC_DTYPE, GATES
from fused_rnn.reference import ENDED, RESET

TAPES = ("keep", "recompute")


def make_flags(
    steps: int, device: torch.device, lengths: Tensor | None, reset: Tensor | None
) -> Tensor | None:
    """The waist's flags uint8 [T, B] from lengths [B] and reset bool [T, B], without a host
    synchronisation."""
    flags = None
    if lengths is not None:
        lengths = lengths.to(device, non_blocking=True)
        ended = torch.arange(steps, device=device).unsqueeze(1) >= lengths
        flags = ended.to(torch.uint8) * ENDED
    if reset is not None:
        segments = reset.to(device, torch.uint8, non_blocking=True) * RESET
        flags = segments if flags is None else flags | segments
    return flags


def check_lengths(lengths: Tensor, steps: int, rows: int) -> None:
    """Raise unless lengths is an integer tensor [B] with values in 0..T. Values on another device
    than the CPU are checked there, asynchronously."""
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths must be an integer tensor [B], got {type(lengths).__name__};"
            " wrap it: torch.tensor(lengths)"
        )
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must have an integer dtype, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != rows:
        raise ValueError(f"lengths must have shape [B] = [{rows}], got {list(lengths.shape)}")
    if torch.compiler.is_compiling() or _is_transformed(lengths):
        return
    valid = ((lengths >= 0) & (lengths <= steps)).all()
    if lengths.device.type == "cpu":
        if not valid:
            raise ValueError(
                f"lengths must be between 0 and T = {steps}, got {int(lengths.min())} to"
                f" {int(lengths.max())}"
            )
    elif lengths.device.type == "cuda":
        torch._assert_async(valid, f"lengths must be between 0 and T = {steps}")


def _is_transformed(tensor: Tensor) -> bool:
    """Whether the values cannot be read: under torch.func transforms or as a fake tensor."""
    return type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_reset(reset: Tensor, shape: tuple[int, int], layout: str) -> None:
    """Raise unless reset is a bool tensor of this shape; layout names it, "[T, B]" or "[B, T]"."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool tensor {layout}, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must have dtype torch.bool, got {reset.dtype}; use reset.bool()")
    if tuple(reset.shape) != tuple(shape):
        raise ValueError(f"reset must have shape {layout} = {list(shape)}, got {list(reset.shape)}")


def same_device(inputs: LayerInputs) -> None:
    device = inputs.x.device
    for state in (inputs.h0, inputs.c0):
        if state is not None and state.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at"
                f" {device} and hidden tensor at {state.device}"
            )
    for weight in (inputs.w_ih, inputs.w_hh, inputs.b_ih, inputs.b_hh, inputs.w_hr):
        if weight is not None and weight.device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at"
                f" {device} and parameter tensor at {weight.device}"
            )


def same_dtype(inputs: LayerInputs) -> None:
    dtype = inputs.w_hh.dtype
    for name, tensor in zip(LayerInputs._fields, inputs, strict=True):
        if tensor is not None and name != "flags" and tensor.dtype != dtype:
            name = {"h0": "hx", "c0": "cx", "x": "input"}.get(name, name)
            raise RuntimeError(
                f"expected all tensors in one dtype: {name} is {tensor.dtype}, weights are {dtype}"
            )


def cast_inputs(inputs: LayerInputs, low: torch.dtype, wide: bool) -> LayerInputs:
    """Cast the floating tensors to the low dtype; ``wide`` rounds to it and goes on in float32."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(low).float() if wide else tensor.to(low)

    return LayerInputs(*(cast(t) for t in inputs))


def needs_gradient(inputs: LayerInputs) -> bool:
    if observers.forward_mode():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _torch_layer(cell: str, inputs: LayerInputs, stack: int, relu: bool, run):
    """One layer by torch.nn's own path (oneDNN, cuDNN, ...); run: ``library.call`` or its like."""
    entry = (inputs.w_ih, inputs.w_hh, inputs.b_ih, inputs.b_hh, inputs.w_hr)
    entry = [w for w in entry if w is not None]
    if inputs.w_hh.dim() == 3:
        entry = [w[s] for s in range(stack) for w in entry]
    bias = inputs.b_ih is not None
    states = (inputs.h0,) if inputs.c0 is None else (inputs.h0, inputs.c0)
    y, h_n, *c_n = run(cell, inputs.x, states, entry, bias, 1, stack == 2, relu)
    return y, h_n, (c_n[0] if c_n else None), None


def run_layer(
    cell: str,
    inputs: LayerInputs,
    reverse: tuple[bool, ...],
    *,
    plain_path: bool = False,
    **options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer on checked shapes: (y [T, B, S*P], h_n, c_n, cells), the last two None where the
    cell has none or ``return_cells`` is false. Casts under autocast as torch.nn does, to which
    ``plain_path`` matters: its cells and packed input do not run in oneDNN. ``options`` are
    ``_run_layer``'s."""
    device = inputs.x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        # Off oneDNN, torch.nn on the CPU takes products in the low dtype and all else in the
        # state's; a projection is one more product, which leaves c_n alone in the state's dtype.
        state = inputs.h0 if inputs.c0 is None else inputs.c0
        keeps = device == "cpu" and state.dtype == torch.float32
        projected = inputs.w_hr is not None
        wide = keeps and (cell == "gru" or (cell == "lstm" and plain_path and not projected))
        state = torch.float32 if keeps and projected else None
        with torch.autocast(device, enabled=False):
            return _run_layer(
                cell, cast_inputs(inputs, low, wide), reverse, state_dtype=state, **options
            )
    return _run_layer(cell, inputs, reverse, **options)


def _sizes(inputs: LayerInputs):
    """device_index, rows, hidden, proj, steps, layers and training of a backends.Request, for a
    GPU's choice."""
    if inputs.x.device.type != "cuda" or torch.compiler.is_compiling() or observers.transformed():
        return ()  # ours is one graph, and takes transforms, where torch.nn's path is and does not
    proj = 0 if inputs.w_hr is None else inputs.w_hr.shape[-2]
    hidden = inputs.w_hh.shape[-1] if inputs.w_hr is None else inputs.w_hr.shape[-1]
    rows, steps = inputs.h0.shape[1], inputs.x.shape[0]
    if type(steps) is not int:  # traced
        return ()
    training = needs_gradient(inputs)
    return inputs.x.device.index, rows, hidden, proj, backends.rounded(steps), 1, training


def _run_layer(
    cell: str,
    inputs: LayerInputs,
    reverse: tuple[bool, ...],
    *,
    ragged: bool = False,
    tape: str = "keep",
    return_cells: bool = False,
    reset_after: bool = True,
    relu: bool = False,
    backend: str | None = None,
    state_dtype: torch.dtype | None = None,
):
    w_hh = inputs.w_hh
    io = w_hh.dtype
    same_device(inputs)
    same_dtype(inputs)
    request = backends.Request(
        cell,
        inputs.x.device.type,
        io,
        reverse,
        inputs.flags is not None,
        return_cells,
        reset_after,
        inputs.w_ih is None,
        *_sizes(inputs),
    )
    name = backends.choose(request, backend)
    keep = tape == "keep"
    spec = LayerSpec(cell, name, reverse, reset_after, relu, keep, ragged)
    if name == "torch":
        asked = (backend or backends.current_backend()) == name
        plain = asked or torch.compiler.is_compiling() or observers.transformed()
        plain = plain or not needs_gradient(inputs)
        run = library.call if plain else library.differentiable
        return _torch_layer(cell, inputs, len(reverse), relu, run)
    if name == "reference":
        outputs = autograd.reference_forward(spec, inputs)
    elif needs_gradient(inputs):
        outputs = whole.run(spec, inputs, return_cells)
    else:
        spec = spec._replace(keep_gates=False)
        outputs = autograd.forward(spec, inputs, training=return_cells)
    if cell != "lstm":
        return outputs[0], outputs[1], None, None
    y, h_n, c_n, cells = outputs[:4] if return_cells else (*outputs[:3], None)
    return y, h_n, c_n.to(state_dtype or io), cells.to(io) if return_cells else None


# The public functions: stacked or single weights in, validated, one call of run_layer.


def _shape_error(name: str, got: Tensor, wants: str) -> ValueError:
    return ValueError(f"{name} must have shape {wants}, got {list(got.shape)}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], wants: str) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise _shape_error(name, tensor, f"{wants} = {list(shape)}")


def _layer(
    cell: str,
    input: Tensor,
    hx,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse,
    batch_first: bool,
    tape: str,
    **options,
):
    """Validate, and run one layer."""
    gates = GATES[cell]
    for name, tensor in (("input", input), ("w_hh", w_hh)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tape not in TAPES:
        raise ValueError(f"tape must be one of {TAPES}, got {tape!r}")
    if w_hh.dtype not in ACC_DTYPE:
        raise ValueError(f"w_hh must be one of {[str(d) for d in ACC_DTYPE]}, got {w_hh.dtype}")
    if w_hh.dim() not in (2, 3):
        raise _shape_error("w_hh", w_hh, f"[{gates}*H, P] or [S, {gates}*H, P]")
    single = w_hh.dim() == 2
    lead, axes = ((), "") if single else ((w_hh.shape[0],), "S, ")
    stack = 1 if single else w_hh.shape[0]
    width, proj = w_hh.shape[-2:]
    hidden = width // gates
    if width != gates * hidden or hidden == 0 or (w_hr is None and proj != hidden):
        raise _shape_error("w_hh", w_hh, f"[{axes}{gates}*H, H] with H > 0")
    _expect("w_hr", w_hr, (*lead, proj, hidden), f"[{axes}P, H]")
    reverse = (reverse,) * stack if isinstance(reverse, bool) else tuple(reverse)
    if len(reverse) != stack or not all(isinstance(r, bool) for r in reverse):
        raise ValueError(f"reverse must be a bool or {stack} bools, got {reverse}")

    x_axes = "B, T" if batch_first else "T, B"
    if w_ih is None:
        rank, wants = (3 if single else 4), f"[{x_axes}, {axes}{gates}*H]"
    else:
        rank, wants = 3, f"[{x_axes}, I]"
    if input.dim() != rank:
        raise _shape_error("input", input, wants)
    x = input.transpose(0, 1) if batch_first else input
    steps, rows = x.shape[:2]
    if w_ih is None:
        x = x.unsqueeze(2) if single else x
        if tuple(x.shape[2:]) != (stack, width):
            raise _shape_error("input", input, f"{wants} with {gates}*H = {width}")
    else:
        _expect("w_ih", w_ih, (*lead, width, x.shape[2]), f"[{axes}{gates}*H, I]")
    _expect("b_ih", b_ih, (*lead, width), f"[{axes}{gates}*H]")
    _expect("b_hh", b_hh, (*lead, width), f"[{axes}{gates}*H]")
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    sizes = (proj, hidden) if cell == "lstm" else (proj,)
    if hx is None:
        states = [x.new_zeros((stack, rows, size), dtype=w_hh.dtype) for size in sizes]
    else:
        states = list(hx) if cell == "lstm" else [hx]
        if len(states) != len(sizes):
            raise ValueError(f"hx must be a pair (h0, c0), got {len(states)} values")
        for k, (name, letter, size) in enumerate(zip(("h0", "c0"), "PH", sizes, strict=False)):
            if not isinstance(states[k], Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(states[k]).__name__}")
            if single:
                _expect(name, states[k], (rows, size), f"[B, {letter}]")
                states[k] = states[k].unsqueeze(0)
            else:
                _expect(name, states[k], (stack, rows, size), f"[S, B, {letter}]")
    if lengths is not None:
        check_lengths(lengths, steps, rows)
    if reset is not None:
        check_reset(reset, (rows, steps) if batch_first else (steps, rows), f"[{x_axes}]")
        reset = reset.t() if batch_first else reset
    flags = make_flags(steps, x.device, lengths, reset)

    inputs = LayerInputs(
        x, w_ih, w_hh, b_ih, b_hh, w_hr, states[0], states[1] if len(states) == 2 else None, flags
    )
    y, h_n, c_n, cells = run_layer(
        cell, inputs, reverse, ragged=lengths is not None, tape=tape, **options
    )
    if not single:
        y = y.unflatten(2, (stack, proj))
    else:
        h_n = h_n.squeeze(0)
        c_n = None if c_n is None else c_n.squeeze(0)
        cells = None if cells is None else cells.squeeze(2)
    if batch_first:
        y = y.transpose(0, 1)
        cells = None if cells is None else cells.transpose(0, 1)
    return y, h_n, c_n, cells


_DOC = """{summary}

    One layer, or S of them side by side: give weights with a leading stack axis [S, ...] (two
    directions, heads, an ensemble over one input) and states and outputs get one too.

    Args:
        input: [T, B, I], or [B, T, I] with ``batch_first``. Where ``w_ih`` is None, the input
            projection itself: [T, B, {G}H] ([T, B, S, {G}H] with a stack).
        hx: {hx}; None for zeros.
        w_ih: [{G}H, I] or [S, {G}H, I], gates {order}; None where ``input`` is the projection.
        w_hh: [{G}H, {P}] or [S, {G}H, {P}].
        b_ih, b_hh: [{G}H] or [S, {G}H], or None.{extra}
        lengths: integer [B], unsorted, zeros allowed: steps from lengths[b] on output zeros and
            leave the state alone; a reversed entry starts at each row's own end.
        reset: bool [T, B] ([B, T] with ``batch_first``): the state is zeroed before the step; a
            reversed entry zeroes its state after it.
        reverse: bool, or one per stack entry: run from the last step to the first.
        batch_first: input, reset and output have the batch axis first.
        tape: "keep" the activated gates for the backward pass, or "recompute" them there from
            the input and output, for about {saved} of the memory.
        backend: a name of ``available_backends()``; None for the one selected.

    Returns:
        {returns}

    dtypes: float32, float64, bfloat16, float16, the same for all tensors; 16-bit types are
    computed in float32.

    Raises:
        ValueError or TypeError naming the argument, for wrong shapes, types or lengths;
        RuntimeError for T = 0, mixed devices or dtypes, or a backend that cannot run the call.

    Equations: {source}; derived in docs/math.md.

    >>> import torch, fused_rnn
    >>> w_ih, w_hh = torch.randn({g}, 3), torch.randn({g}, 5)
    >>> y, {state} = fused_rnn.{name}(torch.randn(7, 2, 3), None, w_ih, w_hh)
    >>> y.shape
    torch.Size([7, 2, 5])
    """


def lstm(
    input,
    hx,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    *,
    w_hr=None,
    lengths=None,
    reset=None,
    reverse=False,
    batch_first=False,
    tape="keep",
    return_cells=False,
    backend=None,
):
    y, h_n, c_n, cells = _layer(
        "lstm",
        input,
        hx,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr=w_hr,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        batch_first=batch_first,
        tape=tape,
        return_cells=return_cells,
        backend=backend,
    )
    return (y, (h_n, c_n), cells) if return_cells else (y, (h_n, c_n))


def gru(
    input,
    hx,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    *,
    reset_after=True,
    lengths=None,
    reset=None,
    reverse=False,
    batch_first=False,
    tape="keep",
    backend=None,
):
    y, h_n, _, _ = _layer(
        "gru",
        input,
        hx,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        batch_first=batch_first,
        tape=tape,
        reset_after=reset_after,
        backend=backend,
    )
    return y, h_n


def rnn(
    input,
    hx,
    w_ih,
    w_hh,
    b_ih=None,
    b_hh=None,
    *,
    nonlinearity="tanh",
    lengths=None,
    reset=None,
    reverse=False,
    batch_first=False,
    tape="keep",
    backend=None,
):
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    y, h_n, _, _ = _layer(
        "rnn",
        input,
        hx,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        batch_first=batch_first,
        tape=tape,
        relu=nonlinearity == "relu",
        backend=backend,
    )
    return y, h_n


lstm.__doc__ = _DOC.format(
    name="lstm",
    summary="Run an LSTM layer over a sequence.",
    G="4",
    g=20,
    P="P",
    order="i f g o",
    hx="(h0 [B, P], c0 [B, H]), or [S, B, ...]",
    extra=(
        "\n        w_hr: [P, H] or [S, P, H], the projection h = W_hr (o * tanh(c));"
        " None for P = H."
    ),
    saved="a third",
    returns=(
        "y [T, B, P] ([T, B, S, P]), (h_n, c_n) shaped as hx; with ``return_cells`` also\n"
        "        cells [T, B, H] ([T, B, S, H]), the cell state after every step, differentiable."
    ),
    source=(
        "Hochreiter and Schmidhuber 1997, forget gate Gers et al. 2000, projection Sak et al. 2014"
    ),
    state="(h_n, c_n)",
)
gru.__doc__ = _DOC.format(
    name="gru",
    summary="Run a GRU layer over a sequence.",
    G="3",
    g=15,
    P="H",
    order="r z n",
    hx="h0 [B, H], or [S, B, H]",
    extra=(
        "\n        reset_after: n = tanh(x_n + r * (W_hn h + b_hn)) as torch.nn, cuDNN and Keras;"
        "\n            False: n = tanh(x_n + W_hn (r * h) + b_hn) as in the paper."
    ),
    saved="a fifth",
    returns="y [T, B, H] ([T, B, S, H]), h_n shaped as hx.",
    source="Cho et al. 2014",
    state="h_n",
)
rnn.__doc__ = _DOC.format(
    name="rnn",
    summary="Run a simple (Elman) RNN layer over a sequence.",
    G="",
    g=5,
    P="H",
    order="none",
    hx="h0 [B, H], or [S, B, H]",
    extra='\n        nonlinearity: "tanh" or "relu".',
    saved="all",
    returns="y [T, B, H] ([T, B, S, H]), h_n shaped as hx.",
    source="Elman 1990",
    state="h_n",
)
