"""The waist's operators: opcheck, fakes, argument checks on the C++ side, vmap fallback."""

import pytest
import torch
from conftest import UNDER_TEST, interpreted

from fused_rnn import ops
from fused_rnn.precision import fp32_precision

BACKENDS = ["cpu", "cuda", "triton"]  # those with operators of their own
T, B, S, H, P = 4, 3, 2, 5, 2


def samples(backend, name, dtype=torch.float32, flags=True, proj=False, reset_after=True):
    """Arguments of one operator, on the device where the backend runs."""
    return tuple(
        a.to(UNDER_TEST[backend]) if isinstance(a, torch.Tensor) else a
        for a in _samples(name, dtype, flags, proj, reset_after)
    )


def _samples(name, dtype, flags, proj, reset_after):
    generator = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def acc(*shape):
        return t(*shape).to(ops.ACC_DTYPE[dtype])

    bits = torch.tensor([[0, 0, 2], [2, 0, 0], [0, 1, 2], [0, 1, 0]], dtype=torch.uint8)
    bits = bits if flags else None
    reverse = [False, True]
    out = P if proj else H
    w_hr = t(S, P, H) if proj else None
    if name.startswith("lstm"):
        forward = (t(T, B, S, 4 * H), t(S, 4 * H, out), w_hr, t(S, B, out), t(S, B, H), bits)
        return {
            "lstm_forward": (*forward, reverse, True),
            "lstm_inference": (*forward, reverse),
            "lstm_backward": (
                t(T, B, S, out),
                t(S, B, out),
                acc(S, B, H),
                acc(T, B, S, H),
                forward[1],
                w_hr,
                forward[4],
                acc(T, B, S, H),
                acc(T, B, S, 4 * H).sigmoid(),
                bits,
                reverse,
            ),
        }[name]
    if name.startswith("gru"):
        b_hn = t(S, H) if reset_after else None
        forward = (t(T, B, S, 3 * H), t(S, 3 * H, H), b_hn, t(S, B, H), bits, reverse, reset_after)
        tape = acc(T, B, S, ops.tape_gates("gru", reset_after) * H).sigmoid()
        return {
            "gru_forward": (*forward, True),
            "gru_inference": forward,
            "gru_backward": (
                t(T, B, S, H),
                t(S, B, H),
                forward[1],
                forward[3],
                t(T, B, S, H),
                tape,
                bits,
                reverse,
                reset_after,
            ),
        }[name]
    if name.startswith("rnn"):
        return {
            "rnn_forward": (t(T, B, S, H), t(S, H, H), t(S, B, H), bits, reverse, False),
            "rnn_backward": (
                t(T, B, S, H),
                t(S, B, H),
                t(S, H, H),
                t(T, B, S, H).tanh(),
                bits,
                reverse,
                False,
            ),
        }[name]
    return t(S, T, H), t(S, H, B), t(S, B)


VARIANTS = {
    "plain": {"flags": False},
    "flags": {},
    "proj": {"proj": True},
    "before": {"reset_after": False},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*ops.OPERATORS, "matmul"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, name, variant):
    """Schema, fake against real (static and dynamic shapes), and no autograd registered."""
    torch.library.opcheck(ops.family(backend)[name], samples(backend, name, **VARIANTS[variant]))


@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if name.endswith("backward")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients_are_zero(backend, name):
    """None for an optional gradient is the same as zeros."""
    op, args = ops.family(backend)[name], list(samples(backend, name))
    grads = 4 if name.startswith("lstm") else 2
    for k in range(grads):
        absent, zero = list(args), list(args)
        absent[k], zero[k] = None, torch.zeros_like(args[k])
        for ours, theirs in zip(op(*absent), op(*zero), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lstm_forward", "gru_inference", "rnn_forward"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_final_state_in_the_initial_states_dtype(backend, name):
    """A state in the arithmetic's dtype comes back unrounded: chunks of a sequence continue it."""
    op = ops.family(backend)[name]
    args = list(samples(backend, name, torch.bfloat16))
    at = {"lstm": 3, "gru": 3, "rnn": 2}[name[:4].rstrip("_")]
    rounded = op(*args)[1]
    args[at] = args[at].float()
    unrounded = op(*args)[1]
    assert rounded.dtype == torch.bfloat16 and unrounded.dtype == torch.float32
    one_place = 2**-7 if interpreted(backend) else 0  # NumPy cuts off where others round
    torch.testing.assert_close(unrounded.bfloat16(), rounded, rtol=one_place, atol=0)
    if name != "lstm_forward":
        assert not torch.equal(unrounded, rounded.float())


@pytest.mark.parametrize("name", [*ops.OPERATORS, "matmul"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_shapes_are_refused(backend, name):
    """Every tensor argument, with one axis too short, one too long, one more, or one fewer, gives
    RuntimeError naming it, and nothing is read out of bounds."""
    op, args = ops.family(backend)[name], samples(backend, name)
    names = [a.name for a in op._schema.arguments]
    for k, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value.unsqueeze(0), value[0]]
        for axis in range(value.dim()):
            if name == "matmul" and k == 0 and axis == 1:
                continue  # any number of rows is right
            wrong.append(value.narrow(axis, 0, value.shape[axis] - 1))
            wrong.append(torch.cat((value, value.narrow(axis, 0, 1)), axis))
        for bad in wrong:
            given = list(args)
            given[k] = bad
            with pytest.raises(RuntimeError, match="must have|reverse"):
                op(*given)
                raise AssertionError(f"{name}({names[k]}={list(bad.shape)}) was taken")


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_dtypes_and_flags_are_refused(backend):
    op = ops.family(backend)["lstm_inference"]
    gates_x, w_hh, w_hr, h0, c0, flags, reverse = samples(backend, "lstm_inference")
    with pytest.raises(RuntimeError, match="gates_x must have the dtype of w_hh"):
        op(gates_x.double(), w_hh, w_hr, h0, c0, flags, reverse)
    with pytest.raises(RuntimeError, match="w_hh must be float32, float64, bfloat16 or float16"):
        op(gates_x, w_hh.int(), w_hr, h0, c0, flags, reverse)
    with pytest.raises(RuntimeError, match="flags must be uint8"):
        op(gates_x, w_hh, w_hr, h0, c0, flags.bool(), reverse)
    with pytest.raises(RuntimeError, match="reverse must have S = 2 values, got 1"):
        op(gates_x, w_hh, w_hr, h0, c0, flags, [True])
    with pytest.raises(RuntimeError, match="at least one step"):
        op(gates_x[:0], w_hh, w_hr, h0, c0, None, reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (5, 7, 3), (33, 600, 130), (6, 0, 4), (0, 3, 2), (2, 1300, 65), (3, 5000, 9)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matmul(backend, sizes, dtype):
    """Every layout of a and b, against float64; sums long enough to be shared out."""
    m, k, n = sizes
    device = UNDER_TEST[backend]
    op = ops.family(backend)["matmul"]
    torch.manual_seed(0)
    a = torch.randn(2, m, k, device=device).to(dtype)
    b = torch.randn(2, k, n, device=device).to(dtype)
    bias = torch.randn(2, n, device=device).to(dtype)
    exact = torch.einsum("imk,ikn->imn", a.double(), b.double()) + bias.double().unsqueeze(1)
    acc = ops.ACC_DTYPE[dtype]
    bound = torch.finfo(acc).eps * (2 + k) * (2 if acc == torch.float64 else 1)
    with fp32_precision("ieee"):
        for x in (a, a.mT.contiguous().mT, a.repeat_interleave(2, 2)[:, :, ::2]):
            for y in (b, b.mT.contiguous().mT, b.repeat_interleave(2, 2)[:, :, ::2]):
                got = op(x, y, bias)
                assert got.dtype == acc and got.shape == exact.shape
                if exact.numel():
                    assert float((got.double() - exact).abs().max()) <= bound
        got = op(a[:, :1, :1].expand(2, m, k), b, None) if m and k else torch.empty(0)
    if got.numel() and k:
        wanted = a[:, :1, :1].double() * b.double().sum(1, keepdim=True)
        assert float((got.double() - wanted).abs().max()) <= bound * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_matmul_of_mixed_dtypes(backend):
    """A gradient in float32 times an operand of 16 bits."""
    device = UNDER_TEST[backend]
    a = torch.randn(1, 9, 40, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        b = torch.randn(1, 40, 20, device=device).to(dtype)
        got = ops.family(backend)["matmul"](a, b, None)
        assert got.dtype == torch.float32
        allowed = 3 * torch.finfo(dtype).eps * (a.abs() @ b.abs().float()).max()
        assert (got - a @ b.float()).abs().max() <= allowed
