"""Our modules beside torch.nn's with the same weights, and what both give on the same numbers."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.testing import compare, error

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
SIZES = (4, 5)  # input_size, hidden_size
DRAWS = 16  # how often torch.nn's own error is sampled: that of one small tensor may be luck

# Layers by what kind they are: class, options.
FLAVOURS = {
    "LSTM": ("LSTM", {}),
    "projected LSTM": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
}
flavours = pytest.mark.parametrize("flavour", FLAVOURS)


def both(name: str) -> tuple[type, type]:
    """Our class and torch.nn's of that name."""
    return getattr(fused_rnn, name), getattr(torch.nn, name)


def twins(name: str, *args, seed: int = 0, **kwargs):
    """Our module and torch.nn's, with equal weights."""
    made = []
    for kind in both(name):
        torch.manual_seed(seed)
        made.append(kind(*args, **kwargs))
    return tuple(made)


def layer_twins(flavour: str, dtype: torch.dtype = torch.float64, **options) -> list:
    """Our layer and torch.nn's of a flavour, in float64, their equal weights rounded to dtype."""
    name, more = FLAVOURS[flavour]
    return [rounded(m, dtype) for m in twins(name, *SIZES, **options, **more)]


def f64_twins(name: str, **options):
    """Our module and torch.nn's of that name, in float64."""
    return twins(name, *SIZES, dtype=torch.float64, **options)


def weight_of(name: str, which: str = "hh") -> str:
    """The name of a weight in a module of that name, of the first layer where it has layers."""
    return f"weight_{which}" if name in CELLS else f"weight_{which}_l0"


def tensors_of(value) -> list[Tensor]:
    """The tensors in nested tuples, a PackedSequence's data among them."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [t for part in value for t in tensors_of(part)]


def results(module, *args, seed: int = 1, arrange=None, **kwargs) -> dict[str, Tensor]:
    """Every output of a call and the gradients of parameters and arguments, by name, for random
    cotangents that depend on the seed alone. ``arrange`` makes the call's arguments of ``args``."""
    leaves = dict(module.named_parameters())
    for k, tensor in enumerate(tensors_of(args)):
        if tensor.requires_grad:
            leaves[f"argument {k}"] = tensor
    outputs = tensors_of(module(*(arrange(*args) if arrange else args), **kwargs))
    generator = torch.Generator().manual_seed(seed)
    found = {f"output {k}": out.detach() for k, out in enumerate(outputs)}
    cotangents = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        for out in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        found[name] = grad
    return found


def cast(value, dtype: torch.dtype):
    """Nested arguments in another dtype, as fresh leaves that require gradients."""
    if isinstance(value, PackedSequence):
        return PackedSequence(cast(value.data, dtype), *value[1:])
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype, copy=True).requires_grad_()
    return value if value is None else tuple(cast(part, dtype) for part in value)


def redrawn(value, dtype: torch.dtype, generator: torch.Generator):
    """Nested arguments with other random numbers that the dtype can represent."""
    if isinstance(value, PackedSequence):
        return PackedSequence(redrawn(value.data, dtype, generator), *value[1:])
    if isinstance(value, Tensor):
        numbers = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return numbers.to(dtype).double()
    return value if value is None else tuple(redrawn(part, dtype, generator) for part in value)


def check_twins(ours, theirs, args, dtype: torch.dtype, arrange=None) -> None:
    """Hold every output and gradient of our module against torch.nn's: error against torch.nn in
    float64 within the budget of torch.nn's own error in the dtype, the largest of up to ``DRAWS``.

    The modules and arguments come in float64 with values that the dtype can represent.
    """
    low = torch.float32 if dtype == torch.float64 else dtype
    theirs_low = copy.deepcopy(theirs).to(low)
    got = results(copy.deepcopy(ours).to(dtype), *cast(args, dtype), arrange=arrange)
    target = results(theirs, *cast(args, torch.float64), arrange=arrange)
    assert list(got) == list(target)
    errors = dict.fromkeys(target, 0.0)
    drawn, exact = args, target
    for number in range(1, DRAWS + 1):
        plain = results(theirs_low, *cast(drawn, low), arrange=arrange, seed=number)
        errors = {n: max(e, error(plain[n], exact[n])) for n, e in errors.items()}
        verdicts = [compare(n, got[n], target[n], errors[n], dtype) for n in target]
        faults = [v for v in verdicts if v.fault]
        if not faults:
            return
        drawn = redrawn(args, low, torch.Generator().manual_seed(number))
        exact = results(theirs, *cast(drawn, torch.float64), arrange=arrange, seed=number + 1)
    raise AssertionError("\n".join(map(str, faults)))


def rounded(module, dtype: torch.dtype):
    """The module in float64, its weights rounded to a dtype."""
    return module.to(dtype).double()


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    """Random float64 numbers that the dtype can represent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()


def states(module, *batch: int, dtype: torch.dtype = torch.float64, seed: int = 3):
    """Random initial states for a module of layers, [L*D, *batch, size], as its forward takes."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h0 = draw(count, *batch, module.proj_size or module.hidden_size, dtype=dtype, seed=seed)
    if module.mode != "LSTM":
        return h0
    return h0, draw(count, *batch, module.hidden_size, dtype=dtype, seed=seed + 1)


def input_of(module) -> Tensor:
    """A random float64 input for a module of ``SIZES``."""
    return draw(6, 3, 4) if isinstance(module, torch.nn.RNNBase) else draw(3, 4)


def assert_same_results(ours, theirs, *args) -> None:
    """Outputs and parameter gradients agree, on ``input_of`` the module without args."""
    args = args or (input_of(ours),)
    torch.testing.assert_close(results(ours, *args), results(theirs, *args))
