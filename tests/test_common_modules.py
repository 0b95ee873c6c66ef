"""PyTorch's own descriptions of its recurrent modules, run on ours: every input, reference and
error that torch.testing._internal.common_modules lists, and none of its expected failures."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from twins import CELLS, LAYERS, both, results, tensors_of

INFOS = {
    name: info for name in LAYERS + CELLS for info in module_db if info.module_cls is both(name)[1]
}
RAGGED = ("GRU", "RNN")  # whose generator makes PackedSequences too
DTYPES = (torch.float32, torch.float64)

infos = pytest.mark.parametrize("name", INFOS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def samples(name, dtype, training, requires_grad=False, kind=None):
    """(module, its torch.nn twin, forward arguments, reference function) for every input."""
    torch.manual_seed(0)
    info = INFOS[name]
    more = {"with_packed_sequence": True} if name in RAGGED else {}
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **more
    )
    assert inputs
    for sample in inputs:
        made = []
        for cls in both(name):
            torch.manual_seed(1)
            module = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            made.append(module.to(dtype).train(training))
        args = sample.forward_input.args
        assert not sample.forward_input.kwargs
        yield *made, args, sample.reference_fn


def fresh(args, make=lambda t: t):
    """The arguments as new leaves, each tensor passed through ``make``."""
    if isinstance(args, PackedSequence):
        return PackedSequence(fresh(args.data, make), *args[1:])
    if isinstance(args, torch.Tensor):
        return make(args.detach().clone()).detach().requires_grad_()
    return tuple(fresh(a, make) for a in args)


def test_all_six_are_described():
    assert list(INFOS) == [*LAYERS, *CELLS]


@infos
@modes
@dtypes
def test_forward(name, training, dtype):
    for ours, theirs, args, reference in samples(name, dtype, training):
        got = ours(*args)
        torch.testing.assert_close(tensors_of(got), tensors_of(theirs(*args)))
        if reference is not None and not isinstance(args[0], PackedSequence):
            torch.testing.assert_close(got, reference(ours, *args))


@infos
@modes
@dtypes
def test_gradients(name, training, dtype):
    for ours, theirs, args, _ in samples(name, dtype, training):
        expected, got = (results(m, *fresh(args)) for m in (theirs, ours))
        torch.testing.assert_close(got, expected)


@infos
@modes
@dtypes
def test_errors(name, training, dtype):
    info = INFOS[name]
    ours = both(name)[0]
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert cases
    for case in cases:
        built, called = case.module_error_input.constructor_input, None
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex) as caught:
                ours(*built.args, **built.kwargs)
        else:
            module = ours(*built.args, **built.kwargs).train(training)
            called = case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex) as caught:
                module(*called.args, **called.kwargs)
        assert caught.type is case.error_type


@infos
@modes
@dtypes
def test_non_contiguous(name, training, dtype):
    def spread(tensor):
        return tensor.repeat_interleave(2, -1)[..., ::2]

    for ours, _, args, _ in samples(name, dtype, training):
        expected = results(ours, *fresh(args))
        torch.testing.assert_close(results(ours, *fresh(args, spread)), expected)


def check_gradients(check, name, training, every=1):
    """Check the samples, or every so many of them, others in training than in eval mode."""
    chosen = itertools.islice(
        samples(name, torch.float64, training), int(training and every > 1), None, every
    )
    for ours, _, args, _ in chosen:
        names = [n for n, _ in ours.named_parameters()]
        leaves = tensors_of(args := fresh(args))

        def call(*values, module=ours, names=names, args=args, leaves=leaves):
            count = len(leaves)
            inputs, weights = iter(values[:count]), values[count:]

            def rebuilt(part):
                if isinstance(part, PackedSequence):
                    return PackedSequence(next(inputs), *part[1:])
                return next(inputs) if isinstance(part, torch.Tensor) else tuple(map(rebuilt, part))

            called = tuple(rebuilt(part) for part in args)
            weights = dict(zip(names, weights, strict=True))
            return tuple(tensors_of(torch.func.functional_call(module, weights, called)))

        assert check(call, (*leaves, *ours.parameters()), check_batched_grad=True, fast_mode=True)


@infos
@modes
def test_gradcheck(name, training):
    check_gradients(torch.autograd.gradcheck, name, training, every=1 if name in CELLS else 2)


@infos
@modes
def test_gradgradcheck(name, training):
    check_gradients(torch.autograd.gradgradcheck, name, training, every=1 if name in CELLS else 7)


@infos
@dtypes
def test_factory_arguments(name, dtype):
    info = INFOS[name]
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    ):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        for device in ("cpu", "meta"):
            module = both(name)[0](*args, **kwargs, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}


@infos
@modes
def test_saving_copying_and_repr(name, training):
    for ours, theirs, args, _ in samples(name, torch.float32, training):
        assert repr(ours) == repr(theirs) and str(ours)
        expected = tensors_of(ours(*args))
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copies = [
            copy.deepcopy(ours),
            copy.copy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ]
        loaded = type(ours)(**constructor_of(ours))
        loaded.load_state_dict(theirs.state_dict())
        for module in (*copies, loaded.train(training)):
            assert type(module) is type(ours) and module.training == training
            torch.testing.assert_close(tensors_of(module(*args)), expected, rtol=0, atol=0)


def constructor_of(module):
    names = ["input_size", "hidden_size", "bias"]
    if isinstance(module, torch.nn.RNNBase):
        names += ["num_layers", "batch_first", "bidirectional"]
        names += ["proj_size"] if module.mode == "LSTM" else []
    names += ["nonlinearity"] if hasattr(module, "nonlinearity") else []
    return {name: getattr(module, name) for name in names}
