"""The grid scans: blocks that wait for one another and pass the state through L2. Every cell,
product and kind of tile, orders of blocks, more work than fits at a time, weights beyond the
registers. Without a GPU the kernels run in the emulator, which checks every access and that each is
ordered after what it depends on."""

import dataclasses
import itertools

import gpu_budget
import pytest
import test_cuda
import torch
from test_cuda import (
    BLOCK_CELLS,
    DEVICE,
    EMULATED,
    FLAGS,
    HALVES,
    assert_infinities_spread,
    assert_sums_not_cut,
    outputs_of_rows,
    scan,
    shape_of,
)
from test_numerics import assert_holds, assert_precise, case_of

from fused_rnn.cuda import library, operators, planning
from fused_rnn.plan import DEVICES
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import evaluate

loaded, schedule = test_cuda.loaded, test_cuda.schedule


@pytest.fixture
def tiles(monkeypatch):
    """Runs every scan from now on as a grid scan with batch tiles of so many rows, and so many
    units to a block where there is such a kernel."""

    def of(rows, units=16):
        def choose(device, shape):
            return planning.grid_kernel(shape, rows, units) or planning.grid_kernel(shape, rows)

        monkeypatch.setattr(planning, "choose", choose)

    return of


# One slice of units and several, whole and not; one chunk of a group of rows, two, several groups.
@pytest.mark.parametrize("rows", [8, 16, 48])
@pytest.mark.parametrize("hidden", [5, 16, 33, 70])
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_grid_scans_of_16_bits(cell, hidden, rows, tiles):
    tiles(rows)
    dtype = HALVES[(hidden + rows // 8 + BLOCK_CELLS.index(cell)) % 2]
    case = case_of(cell, rows=21, hidden=hidden, steps=4, dtype=dtype, **FLAGS)
    assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("rows", [8, 48])
@pytest.mark.parametrize("hidden", [20, 32, 70])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_blocks_of_32_units(cell, hidden, rows, tiles):
    tiles(rows, 32)
    dtype = HALVES[(hidden + rows // 8 + BLOCK_CELLS.index(cell)) % 2]
    case = case_of(cell, rows=21, hidden=hidden, steps=4, dtype=dtype, **FLAGS)
    assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("hidden", [16, 41])
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_grid_scans_of_float32(cell, hidden, rows, tiles):
    tiles(rows)
    case = case_of(cell, rows=18, hidden=hidden, steps=3, dtype=torch.float32, **FLAGS)
    with fp32_precision("ieee"):
        assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("hidden", [24, 150])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_grid_scans_in_tf32(cell, hidden, precision, tiles):
    tiles(16)
    case = case_of(cell, rows=9, hidden=hidden, steps=4, dtype=torch.float32)
    assert_precise(case, precision, "cuda", DEVICE)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_3xtf32_is_near_float32(cell, tiles):
    """See gpu_budget.assert_holds."""
    tiles(16)
    case = case_of(cell, rows=9, hidden=150, steps=4, dtype=torch.float32)
    gpu_budget.assert_holds(case, "cuda", DEVICE, gpu_budget.Number(torch.float32, "tf32x3"))


@pytest.mark.parametrize("hidden", [384, 1024])
def test_sums_in_3xtf32_are_not_cut(hidden, tiles):
    """As in test_cuda.py; and each warp has several pairs of steps."""
    tiles(16)
    assert_sums_not_cut(hidden)


@pytest.mark.parametrize(
    "dtype, units", [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float32, 16)]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_beyond_the_registers(cell, dtype, units, tiles):
    """So many units that some of a warp's weights are in shared memory, forward and backward."""
    tiles(8, units)
    half = dtype == torch.bfloat16
    hidden = {"lstm": 808, "gru": 1048}[cell] // (1 if half else 2)
    for backward in (False, True):
        shape = shape_of(cell, hidden, "ieee" if half else "tf32", dtype, backward)
        pairs = -(-hidden // (32 if half else 16)) // planning.WARPS
        assert pairs * (shape.gates if backward else 1) >= planning.grid_kernel(shape, 8).held
    case = case_of(cell, rows=3, hidden=hidden, inputs=2, steps=2, dtype=dtype)
    if half:
        assert_holds(case, "cuda", DEVICE)
    else:
        assert_precise(case, "tf32", "cuda", DEVICE)


@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_schedules(cell, seed, schedule, tiles):
    """Other orders of lanes, warps and blocks, 20 steps; other tiles; the same bits."""
    dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
    case = case_of(cell, rows=19, hidden=35, steps=20, dtype=dtype, **FLAGS)
    results = []
    for number, rows, units in ((seed, 32, 16), (seed + 100, 8 if seed % 2 else 16, 32)):
        schedule(number)
        tiles(rows, units)
        with fp32_precision(("tf32", "tf32x3")[seed % 2]):
            results.append(evaluate(case, "cuda", DEVICE))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_more_pairs_than_run_together(cell, tiles):
    """Tiles and entries one launch after another, directions among them without a pattern."""
    tiles(8)
    reverse = (True, False, False, True, True, True, False, True, False)
    case = case_of(
        cell, rows=25, hidden=65, steps=2, dtype=torch.bfloat16, reverse=reverse, lengths=True
    )
    pairs, slices = 9 * 4, 5
    assert not EMULATED or pairs * slices > 96
    assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_companions(cell, tiles):
    """A row alone, and among others in any place and any tile, has the same bits."""
    outputs = outputs_of_rows(cell, 21)
    tiles(32)
    whole = outputs(list(range(21)))
    for rows, height in (([5], 8), ([20, 0, 17, 5, 9, 1, 2, 3, 4], 8), ([9, 8, 7, 6, 5], 16)):
        tiles(height)
        assert torch.equal(outputs(rows), whole[:, rows])


@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_grid_and_step_path_are_one_function(cell, tiles, monkeypatch):
    case = case_of(cell, rows=5, hidden=40, steps=4, dtype=torch.float32, **FLAGS)
    with fp32_precision("ieee"):
        tiles(8)
        grid = evaluate(case, "cuda", DEVICE)
        monkeypatch.setattr(planning, "choose", lambda device, shape: planning.Step())
        step = evaluate(case, "cuda", DEVICE)
    for name, value in grid.items():
        torch.testing.assert_close(step[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_infinite_states(cell, tiles):
    tiles(16)
    assert_infinities_spread(cell, 19)


# The plan and the kernels know the same needs, and the plan asks what fits.


@pytest.mark.parametrize("product", planning.PRODUCTS)
@pytest.mark.parametrize("cell", planning.CELLS)
def test_the_plan_accounts_for_the_kernels(cell, product):
    """Blocks and shared memory, forward and backward, as the library counts them."""
    half = product in ("bfloat16", "float16")
    dtype = getattr(torch, product) if half else torch.float32
    number = planning.CELLS.index(cell), planning.PRODUCTS.index(product)
    for hidden in (*range(1, 300, 7), *range(300, 2400, 61)):
        for backward in (False, True):
            shape = shape_of(cell, hidden, "ieee" if half else product, dtype, backward)
            for rows, units in itertools.product(planning.TILE_ROWS, (16, 32)):
                grid = planning.grid_kernel(shape, rows, units)
                tile = (2 if units == 16 else 3, rows)
                counted = torch.ops.fused_rnn.cuda_grid_needs(*number, hidden, *tile, backward)
                assert counted == ((grid.slices, grid.shared) if grid else (0, 0))
                assert grid is None or grid.kernel == tile[0]


def test_the_gpu_is_asked_what_runs_together(monkeypatch):
    """Where fewer blocks run together than the model thinks, tiles or kernels are others."""
    model, device = DEVICES["H200"], torch.device(DEVICE)
    shape = dataclasses.replace(shape_of("lstm", 512, "ieee", torch.bfloat16), B=64)
    asked = []

    def kernel(together):
        def resident(index, *scan):
            asked.append(scan)
            return together

        monkeypatch.setattr(library, "grid_resident", resident)
        return operators._settled(model, shape, device)[0]

    assert kernel(132) == planning.choose(model, shape)
    assert asked == [(0, 0, 512, 2, kernel(132).rows, False)] * 2
    assert kernel(32).kind == "grid" and kernel(32).rows > kernel(132).rows
    assert kernel(31).kind == kernel(0).kind == "step"
    monkeypatch.setattr(library, "_lost", True)
    lost = operators.device_model(device)
    assert lost.together == 0 and operators._settled(lost, shape, device)[0].kind == "step"


def test_grid_scans_refuse_what_they_cannot_take():
    with pytest.raises(RuntimeError, match=r"a grid scan has no float64 and no projection"):
        scan(kernel=2, rows=8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"rows must be a multiple of 8 up to 128, got 12"):
        scan(kernel=2, rows=12)
    with pytest.raises(RuntimeError, match=r"rows must be a multiple of 8 up to 128, got 0"):
        scan(kernel=2, rows=0)
    with pytest.raises(RuntimeError, match=r"this scan has no kernel 3; kernel 2 it has"):
        scan(kernel=3, rows=8)
    with pytest.raises(RuntimeError, match=r"of H = 6000 takes 375 blocks at the same time, the"):
        scan(kernel=2, rows=8, hidden=6000)
