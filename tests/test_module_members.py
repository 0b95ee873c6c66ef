"""What others reach for on a recurrent module: members, saving, devices,
functional calls, replicas."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from twins import (
    CELLS,
    LAYERS,
    SIZES,
    assert_same_results,
    both,
    draw,
    f64_twins,
    input_of,
    states,
    tensors_of,
    twins,
    weight_of,
)

import fused_rnn

names = pytest.mark.parametrize("name", LAYERS)
all_names = pytest.mark.parametrize("name", LAYERS + CELLS)


# Members.


@names
def test_public_members_are_there(name):
    ours, theirs = f64_twins(name)
    missing = {m for m in dir(theirs) if not hasattr(ours, m)}
    assert not missing - {"__overloads__"}


@names
def test_flat_weights_are_kept_in_sync(name):
    ours, theirs = f64_twins(name, num_layers=2, bidirectional=True)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights

    def check():
        for weight, at in zip(ours._flat_weights, ours._flat_weights_names, strict=True):
            assert weight is getattr(ours, at)
        assert [w for row in ours.all_weights for w in row] == list(ours.parameters())

    check()
    ours.weight_hh_l1 = nn.Parameter(torch.zeros_like(ours.weight_hh_l1))
    check()
    ours.float()
    check()
    ours.load_state_dict(theirs.state_dict())
    check()


@names
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weights_are_read_once(name, frozen, dropout):
    """What computes a weight may be dear, or draw random numbers."""
    reads = []

    class Counting(nn.Module):
        def forward(self, weight):
            reads.append(1)
            return weight

    ours = getattr(fused_rnn, name)(3, 4, 2, dropout=dropout)
    nn.utils.parametrize.register_parametrization(ours, "weight_hh_l1", Counting())
    ours.requires_grad_(not frozen)
    for grad in (True, False):
        for given in ({}, {"lengths": torch.tensor([2, 1])}):
            reads.clear()
            with torch.set_grad_enabled(grad):
                ours(torch.randn(2, 2, 3), **given)
            assert len(reads) == 1


@names
def test_flatten_parameters_does_nothing_on_a_cpu_and_never_warns(name):
    ours, _ = f64_twins(name, num_layers=2)
    before = [p.data_ptr() for p in ours.parameters()]
    with warnings.catch_warnings(action="error"):
        assert ours.flatten_parameters() is None
        ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.t().contiguous().t())
        ours(input_of(ours))
    assert [p.data_ptr() for n, p in ours.named_parameters() if n != "weight_hh_l0"] == [
        p for p, (n, _) in zip(before, ours.named_parameters()) if n != "weight_hh_l0"
    ]


@names
def test_checks_and_expected_sizes(name):
    for options in ({}, {"batch_first": True, "bidirectional": True, "num_layers": 2}):
        ours, theirs = f64_twins(name, **options)
        x, packed_sizes = input_of(ours), torch.tensor([3, 2])
        for sizes in (None, packed_sizes):
            want = theirs.get_expected_hidden_size(x, sizes)
            assert ours.get_expected_hidden_size(x, sizes) == want
        hidden = torch.zeros(theirs.get_expected_hidden_size(x, None))
        hidden = (hidden, hidden) if name == "LSTM" else hidden
        assert ours.check_input(x, None) is None
        assert ours.check_forward_args(x, hidden, None) is None
        with pytest.raises(RuntimeError, match=r"Expected hidden"):
            wrong = (hidden[0][1:], hidden[1]) if name == "LSTM" else hidden[1:]
            ours.check_forward_args(x, wrong, None)
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            ours.check_hidden_size(torch.zeros(1), (2, 3, 4))


@names
def test_permute_hidden(name):
    ours, theirs = f64_twins(name)
    hx, order = states(ours, 3), torch.tensor([2, 0, 1])
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx


@names
def test_forward_takes_input_and_hx_by_name(name):
    ours, _ = f64_twins(name)
    assert [*inspect.signature(ours.forward).parameters][:2] == ["input", "hx"]
    x, hx = input_of(ours), states(ours, 3)
    torch.testing.assert_close(ours(input=x, hx=hx), ours(x, hx), rtol=0, atol=0)


@all_names
def test_reset_parameters(name):
    ours, theirs = f64_twins(name)
    for module in (ours, theirs):
        torch.manual_seed(5)
        module.reset_parameters()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_list_of_states_is_a_pair():
    ours, theirs = f64_twins("LSTM")
    hx = list(states(ours, 3))
    torch.testing.assert_close(ours(input_of(ours), hx), theirs(input_of(ours), tuple(hx)))


# Functional calls, ensembles, transforms.


@all_names
def test_functional_call(name):
    ours, theirs = f64_twins(name)
    others = {n: p.detach() * 2 for n, p in ours.named_parameters()}
    others = {n: p.requires_grad_() for n, p in others.items()}
    x, found = input_of(ours), []
    for module in (ours, theirs):
        y = tensors_of(torch.func.functional_call(module, others, (x,)))
        found.append((y, torch.autograd.grad(y[0].square().sum(), list(others.values()))))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(tensors_of(ours(x)), tensors_of(theirs(x)))


@all_names
def test_ensemble_by_vmap(name):
    models = [both(name)[0](*SIZES, dtype=torch.float64) for _ in range(3)]
    x = input_of(models[0])
    weights, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(weights, buffers, x):
        return tuple(tensors_of(torch.func.functional_call(base, (weights, buffers), (x,))))

    got = torch.vmap(call, (0, 0, None))(weights, buffers, x)
    expected = [torch.stack(p) for p in zip(*(tensors_of(m(x)) for m in models), strict=True)]
    torch.testing.assert_close(list(got), expected)


@names
def test_per_sample_gradients(name):
    module = both(name)[0](*SIZES, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    weights = {n: p.detach() for n, p in module.named_parameters()}
    x = draw(3, 6, 4)

    def loss(weights, sample):
        return torch.func.functional_call(module, weights, (sample,))[0].square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for k in range(3):
        expected = torch.autograd.grad(module(x[k])[0].square().sum(), module.parameters())
        torch.testing.assert_close([g[k] for g in got.values()], list(expected))


# Saving and loading.


def saved_and_loaded(module, **options):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


@all_names
def test_copies_are_independent(name):
    ours, theirs = f64_twins(name)
    x = input_of(ours)
    expected = tensors_of(theirs(x))
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved_and_loaded(ours)):
        assert type(made) is type(ours)
        torch.testing.assert_close(tensors_of(made(x)), expected)
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
        torch.testing.assert_close(tensors_of(ours(x)), expected)
        if name in LAYERS:
            assert all(a is b for a, b in zip(made._flat_weights, made.parameters(), strict=True))


@names
def test_pickles_of_torch_modules_load_as_ours(name, monkeypatch):
    """A whole model saved with torch.nn, loaded where torch.nn's name stands for our class."""
    _, theirs = f64_twins(name, num_layers=2, bidirectional=True)
    data, x = pickle.dumps(theirs), input_of(theirs)
    monkeypatch.setattr(f"torch.nn.modules.rnn.{name}", both(name)[0])
    loaded = pickle.loads(data)
    assert type(loaded) is both(name)[0] and loaded.tape == "keep"
    torch.testing.assert_close(loaded(x), theirs(x))
    assert repr(loaded) == repr(theirs)


@names
def test_states_of_old_modules(name):
    """What __setstate__ got before PyTorch 1.8: no proj_size; and long before, all_weights of
    parameters instead of names; and ours before ``tape``."""
    for drop in (["proj_size"], ["tape"], ["proj_size", "tape"]):
        ours, theirs = f64_twins(name, num_layers=2, bidirectional=True)
        state = ours.__getstate__()
        for key in drop:
            state.pop(key, None)
        loaded = type(ours).__new__(type(ours))
        loaded.__setstate__(state)
        assert (loaded.proj_size, loaded.tape) == (0, "keep")
        torch.testing.assert_close(loaded(input_of(ours)), theirs(input_of(ours)))

    ours, theirs = f64_twins(name, num_layers=2, bidirectional=True)
    state = ours.__getstate__()
    state["all_weights"] = ours.all_weights
    for key in ("_flat_weights", "_flat_weights_names", "_all_weights", "proj_size", "tape"):
        state.pop(key)
    loaded = type(ours).__new__(type(ours))
    loaded.__setstate__(state)
    assert loaded._flat_weights_names == ours._flat_weights_names
    torch.testing.assert_close(loaded(input_of(ours)), theirs(input_of(ours)))


@all_names
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_both_ways(name, assign):
    ours, theirs = f64_twins(name)
    torch.manual_seed(8)
    fresh = [kind(*SIZES, dtype=torch.float64) for kind in both(name)]
    fresh[0].load_state_dict(theirs.state_dict(), assign=assign)
    fresh[1].load_state_dict(ours.state_dict(), assign=assign)
    assert_same_results(fresh[0], fresh[1])
    assert_same_results(fresh[0], ours)


def test_wrong_checkpoints_are_refused_in_the_same_words():
    ours, theirs = f64_twins("LSTM", num_layers=2)
    wrong = both("LSTM")[1](4, 6, bidirectional=True).state_dict()
    texts = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="Missing key") as caught:
            module.load_state_dict(wrong)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# Devices and dtypes.


@all_names
def test_meta(name):
    """Shapes and dtypes on meta as torch.nn gives them, forward and backward."""
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        options = {} if name in CELLS else options
        ours, theirs = (m.to("meta") for m in f64_twins(name, **options))
        found = []
        for module in (ours, theirs):
            x = input_of(module).to("meta").requires_grad_()
            outputs = tensors_of(module(x))
            sum(o.sum() for o in outputs).backward()
            assert all(p.grad.is_meta and p.grad.shape == p.shape for p in module.parameters())
            found.append([(o.shape, o.dtype, o.device) for o in (*outputs, x.grad)])
        assert found[0] == found[1]


@all_names
def test_construction_on_meta(name):
    ours, theirs = both(name)
    if name in CELLS:  # refuses torch.nn's layers too: no device in the signature
        assert torch.nn.utils.skip_init(ours, *SIZES).weight_ih.device.type == "cpu"
    with torch.device("meta"):
        inside = ours(*SIZES, dtype=torch.float64)
    for made in (inside, ours(*SIZES, device="meta", dtype=torch.float64)):
        assert {p.device.type for p in made.parameters()} == {"meta"}
        made = made.to_empty(device="cpu")
        made.load_state_dict(theirs(*SIZES, dtype=torch.float64).state_dict())
        assert all(t.isfinite().all() for t in tensors_of(made(input_of(made))))
        if name in LAYERS:
            assert {w.device.type for w in made._flat_weights} == {"cpu"}


@all_names
def test_dtype_conversions(name):
    ours, theirs = twins(name, *SIZES)
    for convert in (
        nn.Module.double, nn.Module.half, nn.Module.bfloat16, nn.Module.float,
        lambda m: m.to(torch.float64), lambda m: m.type(torch.bfloat16),
    ):  # fmt: skip
        ours, theirs = convert(ours), convert(theirs)
        x = input_of(ours).to(next(ours.parameters()).dtype)
        got, expected = tensors_of(ours(x)), tensors_of(theirs(x))
        assert [t.dtype for t in got] == [t.dtype for t in expected]
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(got, expected, rtol=0, atol=8 * eps)


@all_names
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers(name, make):
    found = []
    for module in f64_twins(name):
        optimizer = make(module.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            optimizer.zero_grad(set_to_none=True)
            loss = sum(t.square().sum() for t in tensors_of(module(input_of(module))))
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        found.append(losses)
    assert found[0][-1] < found[0][0]
    torch.testing.assert_close(*found)


@all_names
def test_moved_to_shared_memory(name):
    ours, theirs = f64_twins(name)
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    assert_same_results(ours, theirs)


# Replicas and shards.


@all_names
def test_data_parallel_without_devices_passes_through(name):
    ours, theirs = f64_twins(name)
    assert_same_results(nn.DataParallel(ours).module, theirs)
    got = nn.DataParallel(ours)(input_of(ours))
    torch.testing.assert_close(tensors_of(got), tensors_of(theirs(input_of(ours))))


@names
def test_replicas_have_lists_of_their_own(name):
    ours, theirs = f64_twins(name, num_layers=2)
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours) and replica.tape == ours.tape
    assert replica._flat_weights is not ours._flat_weights
    assert replica._flat_weights_names is not ours._flat_weights_names
    for at, weight in ours.named_parameters():  # as torch.nn.parallel.replicate sets them
        setattr(replica, at, weight.detach() * 1)
    x = input_of(ours)
    torch.testing.assert_close(replica(x), theirs(x))
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@names
def test_fully_sharded(name, tmp_path):
    """FSDP2 on a mesh of one process: the weights are DTensors outside of forward."""
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not in this build")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        ours, theirs = f64_twins(name, num_layers=2)
        fully_shard(ours, mesh=mesh)
        x = input_of(ours)
        found = []
        for module in (ours, theirs):
            y, _ = module(x)
            y.square().sum().backward()
            grads = [p.grad for p in module.parameters()]
            found.append((y, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]))
        torch.testing.assert_close(*found)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        optimizer.step()
        assert not torch.equal(ours(x)[0], found[0][0])
    finally:
        distributed.destroy_process_group()


# Subclasses and scripts of users.


def test_subclass_with_its_own_forward():
    class Last(fused_rnn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input, hx)[0][-1]

    torch.manual_seed(0)
    module = Last(*SIZES, dtype=torch.float64)
    theirs = f64_twins("GRU")[1]
    torch.testing.assert_close(module(input_of(module)), theirs(input_of(module))[0][-1])
    assert repr(module) == "Last(4, 5)"


@all_names
def test_are_recurrent_modules_of_torch(name):
    ours = both(name)[0](*SIZES)
    assert isinstance(ours, nn.RNNCellBase if name in CELLS else nn.RNNBase)


@all_names
def test_hooks_run(name):
    ours, seen = both(name)[0](*SIZES), []
    ours.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    ours.register_forward_hook(lambda m, a, o: seen.append("forward"))
    ours.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    weight = getattr(ours, weight_of(name))
    weight.register_hook(lambda g: seen.append("weight"))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    tensors_of(ours(input_of(ours).float().requires_grad_()))[0].sum().backward()
    assert sorted(seen) == ["accumulated", "backward", "forward", "pre", "weight"]


@all_names
def test_gradient_checkpointing(name):
    ours, theirs = f64_twins(name)
    x = input_of(ours).requires_grad_()
    got = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    first = tensors_of(got)[0].square().sum()
    expected = tensors_of(theirs(x))[0].square().sum()
    grads = [
        torch.autograd.grad(t, [x, *m.parameters()]) for t, m in ((first, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*grads)
