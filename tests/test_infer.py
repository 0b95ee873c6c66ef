"""A model without gradients runs as one operator, with the numbers of its layers one by one."""

import itertools

import pytest
import torch
from conftest import UNDER_TEST  # noqa: F401  (the environment it sets)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import backends, models

FLAVOURS = ["LSTM", "GRU", "RNN"]
layers = torch.ops.fused_rnn.cpu_layers.default
AMX = 3  # cpu_isa()


def flat(result):
    y, hx = result
    return [y, *hx] if isinstance(hx, tuple) else [y, hx]


def states(module, rows):
    entries = module.num_layers * (2 if module.bidirectional else 1)
    h0 = torch.randn(entries, rows, module.proj_size or module.hidden_size)
    c0 = torch.randn(entries, rows, module.hidden_size)
    dtype = next(module.parameters()).dtype
    return (h0.to(dtype), c0.to(dtype)) if module.mode == "LSTM" else h0.to(dtype)


@pytest.fixture
def taken(monkeypatch):
    """The calls of the operator."""
    calls = []

    def counted(*args):
        calls.append(args)
        return layers(*args)

    monkeypatch.setattr(models, "_cpu_layers", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour, proj", [*((name, 0) for name in FLAVOURS), ("LSTM", 3)])
def test_same_bits(taken, flavour, proj, dtype):
    options = {"proj_size": proj} if proj else {}
    torch.manual_seed(0)
    for number, both, bias, first in itertools.product((1, 3), *((False, True),) * 3):
        options |= {"bias": bias, "batch_first": first, "bidirectional": both}
        module = getattr(fused_rnn, flavour)(5, 20, number, dtype=dtype, **options).eval()
        for (steps, rows), with_hx in itertools.product(
            ((1, 1), (1, 2), (1, 5), (7, 1), (7, 5)), (False, True)
        ):
            x = torch.randn((rows, steps, 5) if first else (steps, rows, 5)).to(dtype)
            hx = states(module, rows) if with_hx else None
            for more in ({}, {"lengths": torch.randint(0, steps + 1, (rows,))}):
                before = len(taken)
                with torch.no_grad():
                    found = flat(module(x, hx, **more))
                assert len(taken) == before + 1
                for a, b in zip(found, flat(module(x, hx, **more)), strict=True):
                    assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
                assert len(taken) == before + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("size, hidden", [(1, 57), (20, 20), (37, 150), (530, 24)])
def test_16_bits_are_float32_of_the_same_numbers(flavour, size, hidden, dtype):
    """To the bit, but where the tile unit multiplies, which may round another way."""
    torch.manual_seed(0)
    module = getattr(fused_rnn, flavour)(size, hidden, dtype=dtype, bidirectional=True)
    twin = getattr(fused_rnn, flavour)(size, hidden, bidirectional=True)
    twin.load_state_dict(module.state_dict())
    tiles = torch.ops.fused_rnn.cpu_isa() == AMX and max(size, hidden) >= 32
    grain = 2 * torch.finfo(dtype).eps
    for steps, rows in ((1, 1), (1, 5), (1, 8), (1, 40), (3, 1), (9, 40), (20, 70)):
        x, hx = torch.randn(steps, rows, size).to(dtype), states(module, rows)
        wide = tuple(h.float() for h in hx) if flavour == "LSTM" else hx.float()
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found, expected = flat(module(x, hx)), flat(twin(x.float(), wide))
            for a, b in zip(found, expected, strict=True):
                if tiles and steps > 1:
                    torch.testing.assert_close(a, b.to(dtype), atol=grain, rtol=grain)
                else:
                    assert torch.equal(a, b.to(dtype)), (steps, rows, grad)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour, proj", [*((name, 0) for name in FLAVOURS), ("LSTM", 30)])
def test_rows_that_end_early(taken, flavour, proj, dtype, threads):
    """Rows of different lengths, which take other places while they are computed: what layers one
    by one make of them, in the batch's order."""
    torch.set_num_threads(threads)
    torch.manual_seed(threads)
    options = {"proj_size": proj} if proj else {}
    for (rows, hidden), both, first in itertools.product(
        ((59, 101), (4, 257)), (False, True), (False, True)
    ):
        hidden = 401 if flavour == "RNN" else hidden
        module = getattr(fused_rnn, flavour)(
            13, hidden, 2, bidirectional=both, batch_first=first, dtype=dtype, **options
        ).eval()
        lengths = torch.randint(0, 12, (rows,))
        lengths[3] = 11
        x = torch.randn((rows, 11, 13) if first else (11, rows, 13)).to(dtype)
        x[x.abs() > 2.5] = float("inf")  # also beyond the ends, where it is not to be seen
        beyond = torch.arange(11).unsqueeze(1) >= lengths
        x = torch.where((beyond.t() if first else beyond).unsqueeze(2), x, x.clamp(-3, 3))
        reset = torch.rand(x.shape[:2]) < 0.1
        for hx, more in ((None, {}), (states(module, rows), {"reset": reset})):
            before = len(taken)
            with torch.no_grad():
                found = flat(module(x, hx, lengths=lengths, **more))
            assert len(taken) == before + 1
            for a, b in zip(found, flat(module(x, hx, lengths=lengths, **more)), strict=True):
                assert torch.equal(a, b) and torch.isfinite(a).all()
        assert (found[0][3] if first else found[0][:, 3]).abs().sum() > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("hidden", [16, 57, 700])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_of_one_row(flavour, hidden, threads, dtype):
    """Weights that are not packed are multiplied in the order of those that are."""
    torch.set_num_threads(threads)
    module = getattr(fused_rnn, flavour)(41, hidden, 2, dtype=dtype)
    x, hx = torch.randn(1, 12, 41).to(dtype), states(module, 12)
    with torch.no_grad():
        whole = flat(module(x, hx))
        for rows in (slice(0, 1), slice(2, 4)):
            part = tuple(s[:, rows] for s in hx) if flavour == "LSTM" else hx[:, rows]
            for a, b in zip(flat(module(x[:, rows], part)), whole, strict=True):
                assert torch.equal(a, b[:, rows])


def test_strided_inputs(taken):
    module = fused_rnn.LSTM(6, 8, 2, bidirectional=True)
    wide = torch.randn(9, 4, 12)
    for x in (wide[::2, :, ::2], wide.transpose(0, 1)[:, ::3, :6], wide[:, :, :6].expand(9, 4, 6)):
        with torch.no_grad():
            found = flat(module(x))
        for a, b in zip(found, flat(module(x.contiguous())), strict=True):
            assert torch.equal(a, b)
    assert len(taken) == 3


class _Tagged(torch.Tensor):
    pass


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_who_takes_it(taken):
    """Whatever sees single operators, differentiates or casts gets the layers one by one."""
    module = fused_rnn.GRU(4, 8, 2, dropout=0.5)
    x = torch.randn(3, 2, 4)
    module(x)  # draws
    module.eval()
    with torch.enable_grad():
        module(x)
    with fused_rnn.use_backend("reference"):
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    with _Watching():
        module(x)
    module(x.as_subclass(_Tagged))
    torch.func.vmap(lambda one: module(one)[0], in_dims=1)(x)
    torch.compile(module, backend="eager", fullgraph=True)(x)
    fused_rnn.LSTM(4, 8)(x, return_cells=True)
    assert not taken
    module(x)
    module(x, reset=torch.zeros(3, 2).bool())
    module(torch.nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))
    with fused_rnn.use_backend("cpu"), torch.inference_mode():
        module(x)
    assert len(taken) == 4


def test_weights_wherever_they_are_kept(taken):
    """Parametrized, replaced as torch.func.functional_call does, and changed in place."""
    torch.manual_seed(0)
    module = fused_rnn.LSTM(4, 8)
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        plain = module(x)[0]
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        torch.testing.assert_close(module(x)[0], plain)
        other = fused_rnn.LSTM(4, 8)
        swapped = torch.func.functional_call(
            other, dict(fused_rnn.LSTM(4, 8).named_parameters()), x
        )
        assert not torch.equal(swapped[0], other(x)[0])
        before = other(x)[0]
        other.weight_ih_l0.data.mul_(2)  # which no version counter tells
        assert not torch.equal(before, other(x)[0])
    assert len(taken) == 6


@pytest.mark.parametrize("cell", range(3))
@pytest.mark.parametrize("both", [False, True])
def test_operator(cell, both):
    gates = (4, 3, 1)[cell]
    directions = 2 if both else 1
    weights = []
    for layer in range(2):
        for _ in range(directions):
            size = 6 * directions if layer else 5
            weights += [torch.randn(gates * 6, n) for n in (size, 6)]
            weights += [torch.randn(gates * 6) for _ in range(2)]
    h0 = torch.randn(2 * directions, 3, 6)
    flags = torch.tensor([[0, 0, 2], [2, 0, 1]], dtype=torch.uint8)
    args = (torch.randn(2, 3, 5), h0, h0 if cell == 0 else None, weights, flags, cell, True)
    torch.library.opcheck(layers, (*args, False, both, False))
    torch.library.opcheck(
        layers, (args[0], None, None, weights, None, cell, True, False, both, True)
    )


def test_operator_refuses_what_it_cannot_take():
    x, h0 = torch.randn(2, 3, 5), torch.randn(1, 3, 6)
    weights = [torch.randn(18, 5), torch.randn(18, 6)]
    plain = (False, False, False, False)

    def refuses(match, *args):
        with pytest.raises(RuntimeError, match=match):
            layers(*args)

    refuses("weights must have 4 tensors", x, h0, None, weights, None, 1, True, *plain[1:])
    refuses("weights must have 2 tensors", x, h0, None, [], None, 1, *plain)
    refuses("cell must be", x, h0, None, weights, None, 3, *plain)
    refuses("w_ih must have shape", x[..., :4], h0, None, weights, None, 1, *plain)
    refuses("h0 must have shape", x, h0[:, :2], None, weights, None, 1, *plain)
    refuses("x must have shape", x[0], h0, None, weights, None, 1, *plain)
    refuses("x must have steps", x[:0], h0, None, weights, None, 1, *plain)
    refuses("x must have the dtype", x.double(), h0, None, weights, None, 1, *plain)
    refuses("h0 must have the dtype", x, h0.double(), None, weights, None, 1, *plain)
    refuses("w_hh must have shape", x, h0, None, [weights[0], torch.randn(18, 5)], None, 1, *plain)
    refuses("flags must be uint8", x, h0, None, weights, torch.zeros(2, 3), 1, *plain)
    refuses("flags must have shape", x, h0, None, weights, torch.zeros(2, 2).byte(), 1, *plain)
    refuses("only the LSTM", x, h0, None, weights * 2, None, 1, False, True, False, False)


def test_wrong_arguments_of_a_module_say_what_torch_says(taken):
    module, x = fused_rnn.GRU(4, 8), torch.randn(3, 2, 4)
    module.weight_hh_l0.data = module.weight_hh_l0.data.double()
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected all tensors in one dtype"):
        module(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="hidden size"):
        fused_rnn.GRU(4, 8)(x, torch.randn(1, 2, 7))
    assert not taken


def test_no_extension(monkeypatch, taken):
    monkeypatch.setattr(backends, "extension_missing", lambda: True)
    with torch.no_grad():
        fused_rnn.GRU(4, 8)(torch.randn(3, 2, 4))
    assert not taken
