"""The planner, without a GPU: every shape gets a plan that fits, and the choice follows it."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rnn import backends, cudnn, plan
from fused_rnn.cuda import library, planning
from fused_rnn.explain import explain
from fused_rnn.plan import DEVICES, BlockPlan, Shape
from fused_rnn.precision import fp32_precision

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def shapes(draw):
    cell = draw(st.sampled_from(["lstm", "gru", "rnn"]))
    dtype = draw(st.sampled_from(DTYPES))
    hidden = draw(st.integers(1, 8192))
    return Shape(
        cell,
        draw(st.integers(1, 2000)),
        draw(st.integers(1, 100_000)),
        hidden,
        dtype,
        draw(st.integers(1, hidden)) if cell == "lstm" and draw(st.booleans()) else 0,
        draw(st.booleans()) if cell == "gru" else True,
        draw(st.sampled_from(plan.PRECISIONS)) if dtype == torch.float32 else "ieee",
        draw(st.booleans()),
    )


@settings(deadline=None, max_examples=300)
@given(shapes(), st.sampled_from(list(DEVICES)))
def test_every_shape_gets_a_plan_that_fits(shape, name):
    device = DEVICES[name]
    chosen = plan.choose(device, shape)
    found = plan.choices(device, shape)
    assert chosen in [prediction.plan for prediction in found]
    for prediction in found:
        assert prediction.total > 0
        p = prediction.plan
        assert p.num_warps * device.warp <= 1024
        if isinstance(p, BlockPlan):
            assert p.block_h >= shape.H and not shape.proj
            assert plan.held_bytes(shape) <= max(device.shared, 128 * 1024)
        else:
            assert not (p.streamed and shape.two_phases)
            # Tiles of both operands, for every stage of the pipeline.
            rows = 4 * p.block_u + p.block_b
            assert rows * p.block_k * shape.itemsize * p.num_stages <= device.shared
            # State is changed in place: an element that two threads hold would be a race.
            assert p.num_warps * device.warp <= p.block_u * p.block_b
        options = plan.options(device, p)
        if "maxnreg" in options:
            assert options["maxnreg"] * p.num_warps * 32 <= 65536


@settings(deadline=None, max_examples=100)
@given(shapes(), st.sampled_from(list(DEVICES)))
def test_the_rows_enter_no_tile_but_by_size(shape, name):
    """Batches of nearby sizes run the same kernel: only tiles chosen among few may differ."""
    device = DEVICES[name]
    kinds = {plan.choose(device, replace(shape, B=b)).kind for b in (1, 3, 32, 500, 100_000)}
    assert len(kinds) == 1
    tiles = {plan.tile_plan(device, replace(shape, B=b), False) for b in range(1, 33)}
    blocks = {plan.block_plan(device, replace(shape, B=b)) for b in (1, 7, 100, 5000)}
    assert len(tiles) == 1 and len(blocks) == 1


@settings(deadline=None, max_examples=300)
@given(shapes(), st.sampled_from(list(DEVICES)))
def test_every_shape_gets_a_cuda_plan_that_fits(shape, name):
    device = DEVICES[name]
    chosen = planning.choose(device, shape)
    found = planning.choices(device, shape)
    assert chosen in [prediction.plan for prediction in found]
    assert any(prediction.plan.kind == "step" for prediction in found)
    for prediction in found:
        assert prediction.total > 0
        block = prediction.plan
        if block.kind == "block":
            assert device.backend == "cuda" and block.shared <= device.shared
            assert block.max_units >= shape.H and shape.H <= block.threads // 2 < shape.H + 16
            assert block.threads % 32 == 0 and block.threads <= 2 * block.max_units <= 512
            assert not shape.proj and shape.reset_after and shape.dtype != torch.float64
        if block.kind == "grid":
            assert device.backend == "cuda" and block.shared <= device.shared
            assert block.slices == -(-shape.H // block.units) <= device.multiprocessors
            assert block.rows in planning.TILE_ROWS and block.rows < max(16, 2 * shape.B)
            assert not shape.proj and shape.reset_after and shape.dtype != torch.float64
    kinds = {planning.choose(device, replace(shape, B=b)).kind for b in (1, 3, 500, 100_000)}
    assert len(kinds) == 1, "a row's bits would depend on the batch"


def test_cuda_block_scans_go_where_they_should():
    for cell, dtype in itertools.product(("lstm", "gru", "rnn"), DTYPES[2:]):
        for name in ("A100", "H100", "H200", "B200", "RTX 5090"):
            for hidden, backward in itertools.product((1, 64, 100, 128), (False, True)):
                shape = Shape(cell, 1, 32, hidden, dtype, backward=backward)
                assert planning.block_plan(DEVICES[name], shape), (name, shape)
                if name != "RTX 5090":  # whose tensor cores would rather share the work
                    assert planning.choose(DEVICES[name], shape).kind == "block", (name, shape)
    large = Shape("lstm", 1, 32, 160, torch.bfloat16, backward=True)
    assert planning.block_plan(DEVICES["H200"], large) is not None
    assert planning.block_plan(DEVICES["A100"], replace(large, H=192)) is None
    assert planning.block_plan(DEVICES["MI300X"], replace(large, H=32)) is None
    assert planning.block_plan(replace(DEVICES["A100"], arch=75), replace(large, H=32)) is None


@pytest.mark.parametrize("name", ["A100", "H100", "H200", "B200"])
def test_states_beyond_a_multiprocessor_run_as_grid_scans(name):
    for cell, hidden, dtype, backward in itertools.product(
        ("lstm", "gru"), (272, 512, 768, 1024, 1536), DTYPES[2:], (False, True)
    ):
        for rows in (1, 8, 32, 128):
            shape = Shape(cell, 1, rows, hidden, dtype, backward=backward)
            assert planning.choose(DEVICES[name], shape).kind == "grid", shape
    assert planning.grid_plan(DEVICES[name], Shape("lstm", 1, 8, 2400, DTYPES[2])) is None
    assert planning.grid_plan(DEVICES["MI300X"], Shape("lstm", 1, 8, 256, DTYPES[2])) is None
    none = replace(DEVICES[name], together=0)
    assert planning.choose(none, Shape("lstm", 1, 8, 512, DTYPES[2])).kind == "step"
    few = replace(DEVICES[name], together=32)
    assert planning.choose(few, Shape("lstm", 1, 8, 512, DTYPES[2])).kind == "grid"
    assert planning.choose(few, Shape("lstm", 1, 8, 513, DTYPES[2])).kind == "step"


def test_a_grid_scan_hands_round_the_fewer_bytes():
    for cell, gates in (("lstm", 4), ("gru", 3), ("rnn", 1)):
        for dtype in DTYPES[2:] + DTYPES[:1]:
            shape = Shape(cell, 1, 8, 256, dtype, backward=True)
            assert planning.scatters(shape) == (gates * dtype.itemsize > 4 + 4)
            assert not planning.scatters(replace(shape, backward=False))


def test_more_of_anything_takes_a_cuda_kernel_no_less_time():
    for cell, dtype in itertools.product(("lstm", "gru", "rnn"), DTYPES):
        base = Shape(cell, 1, 16, 64, dtype)
        for field, value in (("B", 4096), ("S", 300), ("H", 90)):
            bigger = replace(base, **{field: value})
            for step in (False, True):
                plans = [planning.block_plan(DEVICES["H200"], s) for s in (base, bigger)]
                grids = [planning.grid_plan(DEVICES["H200"], s) for s in (base, bigger)]
                if all(grids):
                    times = [
                        planning.predict(DEVICES["H200"], s, p).total
                        for s, p in zip((base, bigger), grids, strict=True)
                    ]
                    assert times[1] >= times[0]
                if step or not all(plans):
                    plans = [planning.Step(), planning.Step()]
                times = [
                    planning.predict(DEVICES["H200"], s, p).total
                    for s, p in zip((base, bigger), plans, strict=True)
                ]
                assert times[1] >= times[0]


def test_small_states_run_as_block_scans():
    for cell, hidden, dtype in itertools.product(("lstm", "gru", "rnn"), (32, 64, 128), DTYPES[2:]):
        for name in ("A100", "H100", "H200", "B200"):
            shape = Shape(cell, 1, 32, hidden, dtype)
            assert plan.choose(DEVICES[name], shape).kind == "block", (name, shape)


def test_large_states_run_step_by_step():
    for hidden in (1024, 2048):
        shape = Shape("lstm", 1, 32, hidden, torch.bfloat16)
        assert plan.choose(DEVICES["H200"], shape).kind == "step"


def test_more_of_anything_takes_no_less_time():
    """The model is monotone in rows, units and entries, plan by plan."""
    device = DEVICES["H200"]
    for cell, dtype in itertools.product(("lstm", "gru"), DTYPES[2:]):
        base = Shape(cell, 1, 16, 64, dtype)
        for bigger in (Shape(cell, 1, 4096, 64, dtype), Shape(cell, 300, 16, 64, dtype)):
            small, large = (plan.predict(device, s, plan.choose(device, s)) for s in (base, bigger))
            assert large.total >= small.total


def test_sums_are_shared_out_by_their_length_and_width():
    """In parts that leave memory alone; not those of a projection or its gradient."""
    for K, L in itertools.product((1, 2000, 4096, 8192, 1_000_000), (1, 64, 1024, 8192)):
        chunk = plan.matmul_chunk(K, L)
        parts = -(-K // chunk)
        assert chunk % 128 == 0 and parts <= 64
        assert parts * L <= max(8192, L)  # what partial sums may take of memory
        assert parts == 1 or K > 4096
    assert plan.matmul_chunk(32768, 128) == 1024
    assert plan.matmul_chunk(8192, 512) == 2048


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_rows_do_not_choose_the_order_of_sums(device):
    """Neither terms a step nor, of tensor cores, the kind of instruction."""
    for dtype, precision in ((d, p) for d in DTYPES for p in plan.PRECISIONS):
        for width, *layout in itertools.product((64, 512, 4096), (True, False), (True, False)):
            plans = {
                plan.matmul_plan(device, rows, width, dtype, precision, *layout)
                for rows in (1, 64, 1000, 8192, 1 << 20)
            }
            assert {p.block_k for p in plans} == {plan.matmul_block_k(dtype, precision)}
            if device.arch == 90 and (dtype.itemsize == 2 or precision != "ieee"):
                # Hopper's wgmma, whatever the tile, or mma.sync.
                if dtype != torch.float64:
                    assert all(p.block_m % 64 == 0 for p in plans)
                    assert len({p.num_warps % 4 == 0 for p in plans}) == 1
            elif len(plans) > 1:
                assert (device.backend == "cuda" and int(device.arch) < 100) or precision == "ieee"


@pytest.fixture(params=[True, False], ids=["cuda", "no cuda"])
def gpu(request, monkeypatch):
    """An H200 to choose for, with the CUDA library or without; nothing runs on it."""
    backends._choose_on_gpu.cache_clear()
    monkeypatch.setattr(backends, "_has_gpu", lambda: True)
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    monkeypatch.setattr(plan, "device_of", lambda index: DEVICES["H200"])
    reason = None if request.param else "there is no libfused_rnn_cuda.so"
    monkeypatch.setattr(library, "why_unavailable", lambda: reason)
    monkeypatch.setattr(library, "is_emulated", lambda: False)
    monkeypatch.setattr(library, "has_code_for", lambda index: True)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_automatic_choice_on_a_gpu(dtype, gpu, monkeypatch):
    """Ours where it is predicted to win, and for what torch.nn's path cannot do at any speed."""

    def choose(hidden, cell="lstm", **fields):
        sizes = {"device_index": 0, "rows": 32, "hidden": hidden} | fields
        backends._choose_on_gpu.cache_clear()  # what is patched here, nothing else can change
        return backends.choose(backends.Request(cell, "cuda", dtype, **sizes))

    ours = "cuda" if gpu and dtype != torch.float64 else "triton"
    assert choose(1024, flags=True) == choose(1024, cells=True) == ours
    assert choose(4096, flags=True) == "triton"
    monkeypatch.setattr(library, "_lost", True)  # a grid scan of this process
    assert choose(1024, flags=True) == "triton"
    monkeypatch.setattr(library, "_lost", False)
    if dtype == torch.bfloat16:
        assert choose(64) == choose(128) == ("cuda" if gpu else "triton")
    if dtype == torch.float16:
        assert choose(64) == choose(128) == choose(512, "gru") == ("cuda" if gpu else "torch")
    if dtype == torch.float32:  # cuDNN's persistent kernels
        assert choose(64) == choose(64, training=True) == choose(128, "gru") == "torch"
        assert choose(128, training=True) == choose(256) == ("cuda" if gpu else "torch")
    if dtype == torch.float16 and gpu:  # they have one launch too, and a call costs their host less
        assert choose(512, training=True) == choose(512, training=True, steps=512) == "cuda"
        assert choose(512, steps=8) == choose(512, training=True, steps=8, layers=2) == "torch"
        # Layers side by side count where they can be.
        deep = {"rows": 16, "layers": 3, "steps": 1024}
        assert choose(512, **deep) == "torch" and choose(512, waves=True, **deep) == "cuda"
    if dtype.itemsize == 2:
        assert choose(128, "gru", reset_after=False) == "triton"
    monkeypatch.setattr(cudnn, "call_us", lambda *_: 0.0)
    assert choose(2048) == choose(64) == "torch"
    assert choose(64, flags=True) == ours
    assert choose(None) == "triton"  # compiled, or under a transform
    if dtype == torch.float32:
        with fp32_precision("tf32x3"):
            assert choose(4096) == "triton"  # torch.nn's path would not follow
            assert choose(64) == ("cuda" if gpu else "triton")


def test_a_gpu_the_library_has_no_code_for(gpu, monkeypatch):
    """It is left to the other backends, and the reason is given with the remedy."""
    monkeypatch.setattr(library, "has_code_for", lambda index: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 1))
    text = explain(torch.nn.LSTM(8, 64).bfloat16(), device="cuda")
    assert text.startswith("lstm on cuda, bfloat16: triton")
    if gpu:
        assert "cuda: the library has no code for this GPU; TORCH_CUDA_ARCH_LIST=12.1" in text


def test_explain_tells_the_prediction(gpu, monkeypatch):
    def told(size):
        backends._choose_on_gpu.cache_clear()
        return explain(torch.nn.LSTM(8, size), device="cuda")

    text = told(300)
    assert text.startswith(f"lstm on cuda, float32: {'cuda' if gpu else 'torch'}")
    text = told(2500)
    if gpu:
        assert "cuda: Triton's kernels are predicted to be faster at B = 32, H = 2500" in text
    monkeypatch.setattr(cudnn, "call_us", lambda *_: 0.0)
    text = told(2500)
    assert text.startswith("lstm on cuda, float32: torch")
    assert "triton: torch.nn's path is predicted to be faster at B = 32, H = 2500" in text
    short = explain(torch.nn.LSTM(8, 64), device="cuda", steps=5, training=True)
    assert short.startswith("lstm on cuda, float32: torch") and "T = 5, B = 32, H = 64" in short
    monkeypatch.setattr(cudnn, "call_us", lambda *_: float("inf"))
    text = told(2500)
    assert text.startswith("lstm on cuda, float32: triton")


def test_the_document_has_the_present_predictions():
    """docs/performance.md holds what `python -m benchmarks.predict --write` would put there."""
    from benchmarks import predict

    text = predict.DOCUMENT.read_text()
    for begin, table in predict.tables().items():
        assert begin + table + "\n" + predict.END in text
    assert text == predict.written(text)
