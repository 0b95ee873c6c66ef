"""Schemas, fakes and vmap rules of the waist's operators; imports torch only.

Every backend that registers kernels has one family of operators, ``fused_rnn::<backend>_<name>``,
all under the schemas below (see docs/design.md for shapes and meanings). The implementations live
with the backend: C++ registers its own when ``fused_rnn._C`` is loaded.
"""

import functools
import importlib

import torch
from torch import Tensor

NAMESPACE = "fused_rnn"

# The dtype pairs of the waist: what is read and written, and what is computed in.
ACC_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CELLS = tuple(GATES)


def tape_gates(cell: str, reset_after: bool = True) -> int:
    """Activated values kept per hidden unit by the tape: LSTM 4, GRU 4 or 3, RNN 0."""
    return {"lstm": 4, "gru": 4 if reset_after else 3, "rnn": 0}[cell]


# Fakes: shapes and dtypes of the outputs, in terms of the inputs alone.


def _lstm_state(gates_x, w_hh, h0, c0):
    steps, rows, stack, width = gates_x.shape
    hidden, acc = width // 4, ACC_DTYPE[w_hh.dtype]
    y = w_hh.new_empty((steps, rows, stack, w_hh.shape[2]))
    h_n = h0.new_empty((stack, rows, w_hh.shape[2]))
    c_n = w_hh.new_empty((stack, rows, hidden), dtype=acc)
    return y, h_n, c_n


def _fake_lstm_forward(gates_x, w_hh, w_hr, h0, c0, flags, reverse, keep_gates):
    steps, rows, stack, width = gates_x.shape
    hidden, acc = width // 4, ACC_DTYPE[w_hh.dtype]
    cells = w_hh.new_empty((steps, rows, stack, hidden), dtype=acc)
    gates = w_hh.new_empty((steps, rows, stack, 4 * hidden if keep_gates else 0), dtype=acc)
    return (*_lstm_state(gates_x, w_hh, h0, c0), cells, gates)


def _fake_lstm_inference(gates_x, w_hh, w_hr, h0, c0, flags, reverse):
    return _lstm_state(gates_x, w_hh, h0, c0)


def _fake_lstm_backward(dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, gates, flags, reverse):
    steps, rows, stack, hidden = cells.shape
    proj = w_hh.shape[2]
    return (
        torch.empty_like(gates),
        cells.new_empty((stack, rows, proj)),
        cells.new_empty((stack, rows, hidden)),
        cells.new_empty((steps, rows, stack, 0 if w_hr is None else proj)),
    )


def _fake_gru_forward(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates):
    steps, rows, stack, _ = gates_x.shape
    kept = tape_gates("gru", reset_after) * w_hh.shape[2] if keep_gates else 0
    gates = w_hh.new_empty((steps, rows, stack, kept), dtype=ACC_DTYPE[w_hh.dtype])
    return (*_fake_gru_inference(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after), gates)


def _fake_gru_inference(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after):
    steps, rows, stack, _ = gates_x.shape
    hidden = w_hh.shape[2]
    return w_hh.new_empty((steps, rows, stack, hidden)), h0.new_empty((stack, rows, hidden))


def _fake_gru_backward(dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after):
    steps, rows, stack, hidden = y.shape
    return (
        gates.new_empty((steps, rows, stack, 3 * hidden)),
        gates.new_empty((steps, rows, stack, hidden if reset_after else 0)),
        gates.new_empty((stack, rows, hidden)),
    )


def _fake_rnn_forward(gates_x, w_hh, h0, flags, reverse, relu):
    return _fake_gru_inference(gates_x, w_hh, None, h0, flags, reverse, False)


def _fake_rnn_backward(dy, dh_n, w_hh, y, flags, reverse, relu):
    steps, rows, stack, hidden = y.shape
    acc = ACC_DTYPE[w_hh.dtype]
    return (
        y.new_empty((steps, rows, stack, hidden), dtype=acc),
        y.new_empty((stack, rows, hidden), dtype=acc),
    )


def _fake_matmul(a, b, bias, least=1):
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=ACC_DTYPE[a.dtype])


class _Operator:
    """One row of the waist: schema, fake, and the axes of each tensor for the vmap rule.

    In ``layouts`` T, B, S stand for steps, rows and stack and * for any other axis; None marks
    an argument that is not a tensor.
    """

    def __init__(self, schema, fake, layouts, outputs):
        self.schema, self.fake, self.layouts, self.outputs = schema, fake, layouts, outputs


_TBS, _SB, _S = "TBS*", "SB*", "S**"

OPERATORS = {
    "lstm_forward": _Operator(
        "(Tensor gates_x, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor c0, Tensor? flags,"
        " bool[] reverse, bool keep_gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_lstm_forward,
        (_TBS, _S, _S, _SB, _SB, "TB", None, None),
        (_TBS, _SB, _SB, _TBS, _TBS),
    ),
    "lstm_inference": _Operator(
        "(Tensor gates_x, Tensor w_hh, Tensor? w_hr, Tensor h0, Tensor c0, Tensor? flags,"
        " bool[] reverse) -> (Tensor, Tensor, Tensor)",
        _fake_lstm_inference,
        (_TBS, _S, _S, _SB, _SB, "TB", None),
        (_TBS, _SB, _SB),
    ),
    "lstm_backward": _Operator(
        "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor w_hh, Tensor? w_hr,"
        " Tensor c0, Tensor cells, Tensor gates, Tensor? flags, bool[] reverse)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_lstm_backward,
        (_TBS, _SB, _SB, _TBS, _S, _S, _SB, _TBS, _TBS, "TB", None),
        (_TBS, _SB, _SB, _TBS),
    ),
    "gru_forward": _Operator(
        "(Tensor gates_x, Tensor w_hh, Tensor? b_hn, Tensor h0, Tensor? flags, bool[] reverse,"
        " bool reset_after, bool keep_gates) -> (Tensor, Tensor, Tensor)",
        _fake_gru_forward,
        (_TBS, _S, "S*", _SB, "TB", None, None, None),
        (_TBS, _SB, _TBS),
    ),
    "gru_inference": _Operator(
        "(Tensor gates_x, Tensor w_hh, Tensor? b_hn, Tensor h0, Tensor? flags, bool[] reverse,"
        " bool reset_after) -> (Tensor, Tensor)",
        _fake_gru_inference,
        (_TBS, _S, "S*", _SB, "TB", None, None),
        (_TBS, _SB),
    ),
    "gru_backward": _Operator(
        "(Tensor? dy, Tensor? dh_n, Tensor w_hh, Tensor h0, Tensor y, Tensor gates,"
        " Tensor? flags, bool[] reverse, bool reset_after) -> (Tensor, Tensor, Tensor)",
        _fake_gru_backward,
        (_TBS, _SB, _S, _SB, _TBS, _TBS, "TB", None, None),
        (_TBS, _TBS, _SB),
    ),
    "rnn_forward": _Operator(
        "(Tensor gates_x, Tensor w_hh, Tensor h0, Tensor? flags, bool[] reverse, bool relu)"
        " -> (Tensor, Tensor)",
        _fake_rnn_forward,
        (_TBS, _S, _SB, "TB", None, None),
        (_TBS, _SB),
    ),
    "rnn_backward": _Operator(
        "(Tensor? dy, Tensor? dh_n, Tensor w_hh, Tensor y, Tensor? flags, bool[] reverse,"
        " bool relu) -> (Tensor, Tensor)",
        _fake_rnn_backward,
        (_TBS, _SB, _S, _TBS, "TB", None, None),
        (_TBS, _SB),
    ),
}

# vmap: the mapped axis folds into the rows, or into the stack when the weights are mapped.


def _fold(tensor: Tensor, dim: int | None, at: int, size: int) -> Tensor:
    """Merge the mapped axis ``dim`` (or a new one of that size) into axis ``at``, major."""
    if dim is None:
        shape = list(tensor.shape)
        tensor = tensor.unsqueeze(at).expand(*shape[:at], size, *shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _unfold(tensor: Tensor, at: int, size: int) -> Tensor:
    return tensor.unflatten(at, (size, tensor.shape[at] // size))


def _map_over_samples(op, info, in_dims, args, num_outputs):
    """Call once per sample: the one case that no axis of the waist can hold."""
    samples = [
        op(
            *(
                a.select(d, i) if isinstance(d, int) else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * num_outputs


def _scan_vmap(op, spec):
    def rule(info, in_dims, *args):
        mapped = {
            layout
            for layout, dim in zip(spec.layouts, in_dims, strict=True)
            if layout is not None and dim is not None
        }
        axis = "B" if not mapped & {"S**", "S*"} else "S"
        if axis == "S" and "TB" in mapped:  # flags have no stack axis
            return _map_over_samples(op, info, in_dims, args, len(spec.outputs))
        folded = []
        for arg, dim, layout in zip(args, in_dims, spec.layouts, strict=True):
            if isinstance(arg, Tensor) and axis in layout:
                arg = _fold(arg, dim, layout.index(axis), info.batch_size)
            elif axis == "S" and isinstance(arg, (list, tuple)):  # reverse
                arg = list(arg) * info.batch_size
            folded.append(arg)
        ats = tuple(layout.index(axis) for layout in spec.outputs)
        outputs = tuple(
            _unfold(out, at, info.batch_size) for out, at in zip(op(*folded), ats, strict=True)
        )
        return outputs, ats

    return rule


def _matmul_vmap(op):
    def rule(info, in_dims, a, b, bias, least=1):
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:  # more rows for the same matrix
            return _unfold(op(_fold(a, in_dims[0], 1, size), b, bias, least), 1, size), 1
        a, b = _fold(a, in_dims[0], 0, size), _fold(b, in_dims[1], 0, size)
        bias = None if bias is None else _fold(bias, in_dims[2], 0, size)
        return _unfold(op(a, b, bias, least), 0, size), 0

    return rule


_library = torch.library.Library(NAMESPACE, "DEF")
_families: dict[str, dict] = {}


def define_family(backend: str) -> None:
    """Define the operators ``fused_rnn::<backend>_*`` with their fakes and vmap rules."""
    family = {}

    def define(name, schema, fake):
        qualname = f"{NAMESPACE}::{backend}_{name}"
        _library.define(f"{backend}_{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualname, fake, lib=_library)
        family[name] = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_{name}").default
        return qualname, family[name]

    for name, spec in OPERATORS.items():
        qualname, op = define(name, spec.schema, spec.fake)
        torch.library.register_vmap(qualname, _scan_vmap(op, spec), lib=_library)
    schema = "(Tensor a, Tensor b, Tensor? bias, SymInt least=1) -> Tensor"
    qualname, op = define("matmul", schema, _fake_matmul)
    torch.library.register_vmap(qualname, _matmul_vmap(op), lib=_library)
    _families[backend] = family


def family(backend: str) -> dict:
    """The operators of one backend, by their names without the backend."""
    return _families[backend]


_modules: dict[str, str] = {}


def implement_lazily(backend: str, module: str, keys: tuple[str, ...]) -> None:
    """Register a family's implementations for dispatch keys from Python: ``IMPLEMENTATIONS`` of a
    module that is imported at the first call."""
    _modules[backend] = module

    def implementation(name):
        def run(*args):
            return direct(backend)[name](*args)

        return run

    for name in _families[backend]:
        for key in keys:
            _library.impl(f"{backend}_{name}", implementation(name), key)


@functools.cache
def direct(backend: str) -> dict:
    """The operators of one backend as what implements them, for where nothing looks on that the
    dispatcher would have to tell: its way to Python and back costs as much as a launch. Of a
    backend that is not implemented in Python, ``family``'s."""
    if backend not in _modules:
        return _families[backend]
    return importlib.import_module(_modules[backend]).IMPLEMENTATIONS


define_family("cpu")
define_family("cuda")
define_family("triton")
# Python in between chooses the kernel; the library's own operators are loaded at the first call.
implement_lazily("cuda", "fused_rnn.cuda.operators", ("CPU", "CUDA"))
# On a CPU the Triton kernels run under Triton's interpreter, and raise without it.
implement_lazily("triton", "fused_rnn.triton.operators", ("CPU", "CUDA"))


def _fake_layers(x, h0, c0, weights, flags, cell, bias, projected, bidirectional, relu):
    directions = 2 if bidirectional else 1
    entries = len(weights) // (2 + 2 * bias + projected)
    rows, out = x.shape[1], weights[1].shape[1]
    hidden = weights[1].shape[0] // GATES[CELLS[cell]]
    y = x.new_empty((x.shape[0], rows, directions * out))
    c_n = x.new_empty((entries, rows, hidden) if cell == 0 else (0,))
    return y, x.new_empty((entries, rows, out)), c_n


# Every layer of a model without gradients, in one call: what torch.nn's own lstm, gru and rnn take
# (x [T, B, I], states [L*D, B, ...] or None for zeros, weights in torch.nn's order), and flags.
_library.define(
    "cpu_layers(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? flags, int cell,"
    " bool bias, bool projected, bool bidirectional, bool relu) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("fused_rnn::cpu_layers", _fake_layers, lib=_library)


def _fake_layer_forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, flags, reverse, cell, relu):
    if flags is not None:
        raise NotImplementedError("the size of the tape depends on the values of flags")
    steps, rows, _ = x.shape
    stack, hidden = h0.shape[0], w_hh.shape[-1]
    acc = ACC_DTYPE[w_hh.dtype]
    no_c, no_cells, no_gates = (w_hh.new_empty((0,), dtype=acc) for _ in range(3))
    y = w_hh.new_empty((steps, rows, stack * hidden))
    cells = w_hh.new_empty((steps, rows, stack, hidden), dtype=acc)
    gates = w_hh.new_empty((steps, rows, stack, 4 * hidden), dtype=acc)
    h_n, c_n = h0.new_empty((stack, rows, hidden)), w_hh.new_empty((stack, rows, hidden), dtype=acc)
    lstm = cell == 0
    tape = (c_n, cells, gates) if lstm else (no_c, no_cells, gates if cell == 1 else no_gates)
    return y, h_n, *tape


def _fake_layer_backward(
    dy, dh_n, dc_n, dcells, x, w_ih, w_hh, h0, c0, y, cells, gates, flags, reverse, cell, relu,
    *wanted,
):  # fmt: skip
    acc = ACC_DTYPE[w_hh.dtype]
    *stack, width, hidden = w_hh.shape
    shapes = [x.shape, w_ih.shape, w_hh.shape, (*stack, width), (*stack, hidden)]
    given = [*wanted, wanted[3] and cell == 1]
    found = [x.new_empty(s if w else (0,), dtype=acc) for s, w in zip(shapes, given, strict=True)]
    dc0 = x.new_empty(h0.shape if cell == 0 else (0,), dtype=acc)
    return (*found, x.new_empty(h0.shape, dtype=acc), dc0)


# One layer of a training step, shapes as autograd.LayerInputs has them, y [T, B, S*P]: the outputs
# of forward and the tape; the gradients of x, w_ih, w_hh, b_ih, the GRU's b_hn, h0 and c0. What
# there is not is empty. Where rows end early the tape is [N, 1, S, n], of the N steps taken.
_library.define(
    "cpu_layer_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0,"
    " Tensor? c0, Tensor? flags, bool[] reverse, int cell, bool relu)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("fused_rnn::cpu_layer_forward", _fake_layer_forward, lib=_library)
_library.define(
    "cpu_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x,"
    " Tensor w_ih, Tensor w_hh, Tensor h0, Tensor? c0, Tensor y, Tensor? cells, Tensor? gates,"
    " Tensor? flags, bool[] reverse, int cell, bool relu, bool want_x, bool want_w_ih,"
    " bool want_w_hh, bool want_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("fused_rnn::cpu_layer_backward", _fake_layer_backward, lib=_library)
# 0 portable, 1 AVX2, 2 AVX-512: what the C++ backend computes with on this machine.
_library.define("cpu_isa() -> int")
