"""Layers side by side are layers one after another, to the bit; and where they are taken."""

from dataclasses import replace

import pytest
import torch
from conftest import UNDER_TEST, interpreted, keeps_bits

import fused_rnn
from fused_rnn import autograd, models, wavefront, whole
from fused_rnn.autograd import LayerInputs, LayerSpec
from fused_rnn.cuda import operators as cuda_operators
from fused_rnn.cuda import planning
from fused_rnn.plan import DEVICES, Shape
from fused_rnn.wavefront import Wave, WaveLayer, WaveSpec

CELLS = ["lstm", "gru", "rnn"]
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """On a CPU a layer may be one operator, which adds up gradients of biases in other orders."""
    monkeypatch.setattr(whole, "is_whole", lambda spec, inputs, cells: False)


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 20])
def test_launches(steps, layers, chunk):
    """Every layer takes every step once, after the layer below, whose latest chunk it is."""
    done = [0] * layers
    latest = [None] * layers
    for launch in wavefront.launches(steps, layers, chunk):
        before = list(latest)
        assert 0 < launch.steps <= chunk
        for layer, start in zip(launch.layers, launch.starts, strict=True):
            assert start == done[layer]
            if layer:
                assert before[layer - 1] == (start, launch.steps)
            done[layer] += launch.steps
            latest[layer] = (start, launch.steps)
    assert done == [steps] * layers


@pytest.mark.parametrize("steps, layers, chunk", [(12, 3, 4), (13, 3, 4), (4, 2, 4)])
def test_number_of_launches(steps, layers, chunk):
    whole, rest = divmod(steps, chunk)
    count = len(wavefront.launches(steps, layers, chunk))
    assert count == whole + layers - 1 + (layers if rest else 0)


def make(cell, dtype, device, count=3, steps=7, rows=3, size=5, hidden=16, bias=True):
    generator = torch.Generator().manual_seed(count * steps + hidden)
    width = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * hidden

    def draw(*shape):
        values = torch.randn(shape, generator=generator) * 0.4
        return values.to(device, dtype).requires_grad_()

    x = draw(steps, rows, size)
    layers = []
    for layer in range(count):
        weights = draw(1, width, hidden if layer else size), draw(1, width, hidden)
        biases = (draw(1, width), draw(1, width)) if bias else (None, None)
        c0 = draw(1, rows, hidden) if cell == "lstm" else None
        layers.append(WaveLayer(*weights, *biases, draw(1, rows, hidden), c0))
    return x, layers


def one_after_another(spec, x, layers, kept):
    finals = []
    for layer, mask in zip(layers, [*kept, None], strict=True):
        inputs = LayerInputs(x, *layer[:4], None, layer.h0, layer.c0, None)
        y, *states = autograd.Scan.apply(spec.layer, *inputs)
        finals.append(states[: 2 if spec.layer.cell == "lstm" else 1])
        x = y
        if mask is not None:
            scale = 0.0 if spec.dropout == 1 else 1 / (1 - spec.dropout)
            x = torch.where(mask, x * scale, 0)
    return (x, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def side_by_side(spec, x, layers, kept):
    return Wave.apply(spec, len(layers), x, *(t for layer in layers for t in layer), *kept)


def gradients(outputs, used, tensors):
    generator = torch.Generator().manual_seed(7)
    total = 0
    for k, out in enumerate(outputs):
        factor = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        if k in used:
            total = total + (out * factor).sum()
    return torch.autograd.grad(total, tensors, allow_unused=True)


def leaves(x, layers):
    return [t for t in (x, *(t for layer in layers for t in layer)) if t is not None]


def assert_same(found, expected, exact, dtype):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        if exact:
            assert torch.equal(a, b)
        else:
            rough = 2e-2 if dtype.itemsize == 2 else 1e-4
            torch.testing.assert_close(a, b, rtol=rough, atol=rough)


def compare(cell, backend, device, dtype, chunk, used=(0, 1, 2), dropout=0.0, relu=False, **sizes):
    spec = WaveSpec(LayerSpec(cell, backend, (False,), relu=relu), chunk, dropout)
    x, layers = make(cell, dtype, device, **sizes)
    kept = [None] * (len(layers) - 1)
    if dropout:
        shape = (*x.shape[:2], layers[0].w_hh.shape[2])
        kept = [torch.rand(shape, device=device) >= dropout for _ in kept]
    found = side_by_side(spec, x, layers, kept)
    expected = one_after_another(spec, x, layers, kept)
    # (On a GPU a stack of other size may get another kernel, whose sums are in another order.)
    exact = keeps_bits(backend) or (backend == "cuda" and device == "cpu")
    assert_same(found, expected, exact, dtype)
    plain = wavefront.forward(spec, x, layers, [*kept, None], training=False)[:3]
    assert_same([t for t in plain if t is not None], found, exact, dtype)
    tensors = leaves(x, layers)
    assert_same(gradients(found, used, tensors), gradients(expected, used, tensors), exact, dtype)


WAIST = ["cpu", "cuda", "triton"]


@pytest.fixture(params=WAIST)
def waist(request):
    return request.param


@pytest.fixture
def on(waist):
    return UNDER_TEST[waist]


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits(cell, waist, on, dtype):
    sizes = {"count": 2, "steps": 3} if interpreted(waist) else {}
    if waist == "cpu" and dtype != torch.float32:  # a scan of one step multiplies in another way
        sizes = {"steps": 8}
    compare(cell, waist, on, dtype, 2, **sizes)


@cells
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_gradient_is_rounded_between_chunks(cell, dtype):
    """The gradient of a final state, of 16 bits, beside those that chunks hand on."""
    compare(cell, "cpu", "cpu", dtype, 2, steps=8)


@cells
def test_same_bits_in_float64(cell):
    compare(cell, "cpu", "cpu", torch.float64, 3)


@cells
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 9])
def test_chunks(cell, chunk):
    compare(cell, "cpu", "cpu", torch.float32, chunk, steps=8)


@pytest.mark.parametrize(
    "cell, used",
    [*((cell, used) for cell in CELLS for used in ((0,), (1,), (0, 2))), ("lstm", (2,))],
)
def test_outputs_without_gradients(cell, used):
    compare(cell, "cpu", "cpu", torch.float32, 2, used)


@cells
@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout(cell, dropout):
    torch.manual_seed(0)
    compare(cell, "cpu", "cpu", torch.float32, 2, dropout=dropout)


@cells
def test_no_bias(cell):
    compare(cell, "cpu", "cpu", torch.float32, 2, bias=False)


def test_relu_and_two_layers_and_one_row():
    compare("rnn", "cpu", "cpu", torch.float32, 2, relu=True, count=2, rows=1)


def test_a_grid_scan():
    """Wide enough for the kernels that are taken side by side."""
    compare("lstm", "cuda", "cpu", torch.bfloat16, 3, count=2, hidden=80, steps=5, rows=2)


@cells
def test_some_inputs_need_no_gradient(cell):
    spec = WaveSpec(LayerSpec(cell, "cpu", (False,)), 2)
    x, layers = make(cell, torch.float32, "cpu")
    frozen = [x, *layers[1][:3], layers[0].h0]
    for tensor in frozen:
        tensor.requires_grad_(False)
    tensors = [t for t in leaves(x, layers) if t.requires_grad]
    found, expected = (
        gradients(run(spec, x, layers, [None, None]), (0, 1, 2), tensors)
        for run in (side_by_side, one_after_another)
    )
    assert_same(found, expected, True, torch.float32)


@cells
@pytest.mark.parametrize("frozen", [1, 2])
def test_lower_layers_without_gradients(cell, frozen):
    """Nothing is computed for them, and the others' gradients are the same."""
    spec = WaveSpec(LayerSpec(cell, "cpu", (False,)), 2)
    x, layers = make(cell, torch.float32, "cpu")
    for tensor in leaves(x, layers[:frozen]):
        tensor.requires_grad_(False)
    tensors = leaves(None, layers[frozen:])
    found, expected = (
        gradients(run(spec, x, layers, [None, None]), (0, 1, 2), tensors)
        for run in (side_by_side, one_after_another)
    )
    assert_same(found, expected, True, torch.float32)


@cells
def test_batched_gradients(cell):
    spec = WaveSpec(LayerSpec(cell, "cpu", (False,)), 2)
    x, layers = make(cell, torch.float32, "cpu")
    tensors = leaves(x, [layer._replace(h0=layer.h0) for layer in layers])
    cotangents = torch.randn(3, 7, 3, 16)
    found, expected = (
        torch.autograd.grad(
            run(spec, x, layers, [None, None])[0], tensors, cotangents, is_grads_batched=True
        )
        for run in (side_by_side, one_after_another)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@cells
def test_second_derivatives(cell):
    spec = WaveSpec(LayerSpec(cell, "cpu", (False,)), 2, 0.4)
    x, layers = make(cell, torch.float64, "cpu", count=2, steps=3, rows=2, size=2, hidden=3)
    kept = [torch.rand(3, 2, 3, dtype=torch.float64) >= 0.4]
    given = leaves(x, layers)

    def run(*tensors):
        parts = iter(tensors)
        first = next(parts)
        again = [WaveLayer(*(None if t is None else next(parts) for t in la)) for la in layers]
        return side_by_side(spec, first, again, kept)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_checkpointing_and_a_second_backward():
    spec = WaveSpec(LayerSpec("gru", "cpu", (False,)), 2)
    x, layers = make("gru", torch.float32, "cpu")
    outputs = side_by_side(spec, x, layers, [None, None])
    first = torch.autograd.grad(outputs[0].sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(outputs[0].sum(), x)[0])
    again = torch.utils.checkpoint.checkpoint(
        lambda given: side_by_side(spec, given, layers, [None, None])[0], x, use_reentrant=False
    )
    assert torch.equal(first, torch.autograd.grad(again.sum(), x)[0])


# In modules: taken where planned, with the numbers of the layers one after another.


@pytest.fixture
def planned(monkeypatch):
    """Waves in chunks of three; the calls of Wave's forward are counted."""
    calls = []
    monkeypatch.setattr(planning, "wave_chunk", lambda *args: 3)
    cuda_operators._wave_chunk.cache_clear()
    forward = wavefront.forward

    def counted(*args, **options):
        calls.append(args)
        return forward(*args, **options)

    monkeypatch.setattr(wavefront, "forward", counted)
    with fused_rnn.use_backend("cuda"):
        yield calls
    cuda_operators._wave_chunk.cache_clear()


def states(module, rows, layers):
    shape = (layers, rows, module.hidden_size)
    hx = torch.randn(shape), torch.randn(shape)
    return hx if module.mode == "LSTM" else hx[0]


def flat(result):
    y, hx = result
    return [y, *hx] if isinstance(hx, tuple) else [y, hx]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modules(planned, monkeypatch, name, with_hx, training):
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = getattr(fused_rnn, name)(4, 16, 3, batch_first=True).to(device)
    x = torch.randn(2, 8, 4, device=device)
    args = (x, states(module, 2, 3)) if with_hx else (x,)
    args = tuple(
        tuple(s.to(device) for s in a) if isinstance(a, tuple) else a.to(device) for a in args
    )
    with torch.set_grad_enabled(training):
        found = flat(module(*args))
        assert len(planned) == 1
        monkeypatch.setattr(models, "wave_chunk", lambda *args: None)
        expected = flat(module(*args))
    assert len(planned) == 1
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == training
        torch.testing.assert_close(a, b)
    if training:
        weights = list(module.parameters())
        for a, b in zip(
            torch.autograd.grad(found[0].sum(), weights),
            torch.autograd.grad(expected[0].sum(), weights),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_dropout_of_a_module(planned):
    module = fused_rnn.LSTM(4, 16, 2, dropout=0.5)
    x = torch.randn(8, 2, 4)
    torch.manual_seed(0)
    first = module(x)[0]
    torch.manual_seed(0)
    assert torch.equal(first, module(x)[0])
    assert not torch.equal(first, module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    assert len(planned) == 5


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_draws_what_layers_one_after_another_draw(planned, monkeypatch, p):
    module = fused_rnn.GRU(4, 16, 3, dropout=p)
    x = torch.randn(8, 2, 4)
    torch.manual_seed(0)
    y, after = module(x)[0], torch.rand(1)
    monkeypatch.setattr(models, "wave_chunk", lambda *args: None)
    torch.manual_seed(0)
    assert torch.equal(y, module(x)[0]) and torch.equal(after, torch.rand(1))
    assert len(planned) == 1


@pytest.mark.parametrize("chunk", [None, 3])
def test_weights_are_read_once(planned, monkeypatch, chunk):
    class Counting(torch.nn.Module):
        reads = 0

        def forward(self, weight):
            Counting.reads += 1
            return weight

    module = fused_rnn.GRU(4, 16, 2)
    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l1", Counting())
    monkeypatch.setattr(models, "wave_chunk", lambda *args: chunk)
    Counting.reads = 0
    module(torch.randn(8, 2, 4))
    assert Counting.reads == 1


def test_tensors_without_values(planned):
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        fused_rnn.GRU(4, 16, 2, device="meta")(torch.randn(8, 2, 4, device="meta"))
    module = fused_rnn.GRU(4, 16, 2)
    trace = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: module(x)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    x = torch.randn(8, 2, 4)
    assert trace(x)(x).shape == (8, 2, 16) and not planned


def test_what_has_no_wave(planned):
    """Everything that needs the layers one after another gets them so."""
    x = torch.randn(8, 2, 4)
    lengths = torch.tensor([8, 3])
    plain = fused_rnn.LSTM(4, 16, 2)
    plain(x, lengths=lengths)
    plain(x, reset=torch.zeros(8, 2).bool())
    plain(x, return_cells=True)
    plain(torch.nn.utils.rnn.pack_padded_sequence(x, lengths))
    fused_rnn.LSTM(4, 16, 1)(x)
    fused_rnn.LSTM(4, 16, 2, bidirectional=True)(x)
    fused_rnn.LSTM(4, 16, 2, proj_size=3)(x)
    fused_rnn.LSTM(4, 16, 2, tape="recompute")(x)
    torch.func.vmap(lambda one: plain(one)[0], in_dims=1)(x)
    with fused_rnn.use_backend("cpu"):
        plain(x)
    assert not planned
    plain(x)
    assert len(planned) == 1


def test_wrong_arguments_are_the_layers_own(planned):
    module = fused_rnn.GRU(4, 16, 2)
    with pytest.raises(RuntimeError, match="larger than 0"):
        module(torch.randn(0, 2, 4))
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises(RuntimeError, match="expected all tensors in one dtype"):
        module(torch.randn(8, 2, 4))
    assert not planned


# The plan.


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans(cell, dtype):
    H200 = DEVICES["H200"]
    shape = Shape(cell, 1, 16, 512, dtype, precision="tf32")
    found = planning.wave(H200, shape, 3, 1000)
    assert found.total < found.alone / 1.2
    assert planning.wave_chunk(H200, shape, 3, 1000) == found.chunk < 500
    assert planning.wave_chunk(H200, shape, 1, 1000) is None
    assert planning.wave_chunk(H200, shape, 3, 1) is None
    assert planning.wave_chunk(H200, shape, 3, 20) is None  # the launches cost more
    crowded = replace(shape, B=4096)  # one layer fills the GPU
    assert planning.wave_chunk(H200, crowded, 3, 1000) is None
    assert planning.wave_chunk(replace(H200, together=0), shape, 3, 1000) is None
    assert planning.wave(H200, replace(shape, H=4000), 3, 1000) is None


@cells
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_every_launch_of_a_wave_has_one_kind_of_kernel(cell, precision):
    """Other kinds take sums in another order, and steps are slow."""
    for name in ("A100", "H200", "B200"):
        for hidden in range(64, 1600, 96):
            shape = Shape(cell, 1, 8, hidden, torch.float32, precision=precision)
            if planning.wave(DEVICES[name], shape, 4, 500) is None:
                continue
            for backward in (False, True):
                ways = [replace(shape, S=count, backward=backward) for count in range(1, 5)]
                kinds = {planning.choose(DEVICES[name], way).kind for way in ways}
                assert len(kinds) == 1 and "step" not in kinds


def test_a_lost_grid_scan_ends_waves(monkeypatch):
    device = torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("the model of a GPU that is here")
    model = replace(cuda_operators.device_model(device), together=None)
    monkeypatch.setattr(cuda_operators, "_EMULATED_DEVICE", model)
    monkeypatch.setattr(cuda_operators.library, "grid_resident", lambda *args: 132)

    def chunk():
        cuda_operators._wave_chunk.cache_clear()
        return cuda_operators.wave_chunk("lstm", device, torch.bfloat16, 16, 512, 3, 1000)

    assert chunk()
    monkeypatch.setattr(cuda_operators.library, "grid_resident", lambda *args: 40)
    assert chunk() is None  # the GPU runs fewer blocks together than the plan took it to
    monkeypatch.setattr(cuda_operators.library, "grid_resident", lambda *args: 132)
    monkeypatch.setattr(cuda_operators.library, "grids_lost", lambda: True)
    assert chunk() is None
    cuda_operators._wave_chunk.cache_clear()
