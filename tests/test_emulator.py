"""The emulator of the GPU primitives: what each computes, and that it finds faults."""

import re

import emulation
import numpy as np
import pytest
import torch

SEEDS = range(20)
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def emulator():
    return emulation.build_module()


def test_the_emulator_has_every_primitive():
    """Each function and macro of the GPU's header, with the same signature."""
    header = (emulation.ROOT / "csrc/cuda/primitives.cuh").read_text()
    ours = (emulation.ROOT / "csrc/emulator/primitives.h").read_text()

    def declared(text):
        found = re.findall(r"FUSED_RNN_DEVICE [^{;]*?\([^{;]*\)(?= \{)", text)
        return {re.sub(r"\s+", " ", each).replace("*)", "* at)") for each in found}

    assert len(declared(header)) > 35
    assert declared(header) == declared(ours)
    macros = re.findall(r"#define (FUSED_RNN_\w+)", header)
    assert macros and macros == re.findall(r"#define (FUSED_RNN_\w+)", ours)


# Fragments as the PTX ISA writes them: the row and column of element i of a lane.


def fragment_a_16(lane, i):
    group, t = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, t * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragment_b_16(lane, i):
    group, t = lane >> 2, lane % 4
    return t * 2 + (i & 1) + (8 if i >= 2 else 0), group


def fragment_a_8(lane, i):
    group, t = lane >> 2, lane % 4
    return (group if i in (0, 2) else group + 8), (t if i < 2 else t + 4)


def fragment_b_8(lane, i):
    group, t = lane >> 2, lane % 4
    return (t if i == 0 else t + 4), group


def fragment_d(lane, i):
    group, t = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), t * 2 + (i & 1)


def spread(matrix, fragment, count):
    """A matrix as [lane, element]."""
    return np.array([[matrix[fragment(lane, i)] for i in range(count)] for lane in range(32)])


def bits_16(matrix, dtype):
    tensor = torch.from_numpy(matrix).to(dtype)
    return tensor.view(torch.int16).numpy().astype(np.uint16), tensor.to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_mma_of_16_bits(emulator, dtype, seed):
    scale = rng.choice([1.0, 1e-6, 100.0], (16, 16))  # also subnormal numbers of float16
    a_bits, a = bits_16((rng.standard_normal((16, 16)) * scale).astype(np.float32), dtype)
    b_bits, b = bits_16(rng.standard_normal((16, 8)).astype(np.float32), dtype)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    a_words = np.ascontiguousarray(spread(a_bits, fragment_a_16, 8)).view(np.uint32)
    b_words = np.ascontiguousarray(spread(b_bits, fragment_b_16, 4)).view(np.uint32)
    mma = emulator.mma_bf16 if dtype == torch.bfloat16 else emulator.mma_f16
    got = mma(a_words, b_words, spread(d, fragment_d, 4), seed)
    want = spread(a @ b + d, fragment_d, 4)
    assert np.abs(got - want).max() <= 1e-6 * (np.abs(a) @ np.abs(b) + np.abs(d)).max()


@pytest.mark.parametrize("seed", range(4))
def test_mma_of_tf32_reads_19_bits(emulator, seed):
    a = rng.standard_normal((16, 8)).astype(np.float32)
    b = rng.standard_normal((8, 8)).astype(np.float32)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    a_words = spread(a.view(np.uint32), fragment_a_8, 4)
    b_words = spread(b.view(np.uint32), fragment_b_8, 2)
    got = emulator.mma_tf32(a_words, b_words, spread(d, fragment_d, 4), seed)

    def cut(x):
        return (x.view(np.uint32) >> 13 << 13).view(np.float32).astype(np.float64)

    want = spread(cut(a) @ cut(b) + d, fragment_d, 4)
    assert np.abs(got - want).max() < 3e-6
    rounded = spread(a.astype(np.float64) @ b + d, fragment_d, 4)
    assert np.abs(got - rounded).max() > 1e-4  # the low bits would be seen


def test_mma_cuts_sums_off(emulator):
    """Towards zero, once for all terms: what a chain of products loses by that is to be seen."""
    a = rng.integers(-1000, 1000, (16, 8)).astype(np.float32) / 1024
    b = rng.integers(-1000, 1000, (8, 8)).astype(np.float32) / 1024
    d = rng.standard_normal((16, 8)).astype(np.float32) * np.float32(1e-3)
    a_words = spread(a.view(np.uint32), fragment_a_8, 4)
    b_words = spread(b.view(np.uint32), fragment_b_8, 2)
    got = emulator.mma_tf32(a_words, b_words, spread(d, fragment_d, 4), 0)
    exact = spread(a.astype(np.float64) @ b + d, fragment_d, 4)
    nearest = exact.astype(np.float32)
    beyond = np.abs(nearest) > np.abs(exact)
    assert 0.2 < beyond.mean() < 0.8
    cut = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    np.testing.assert_array_equal(got, cut)


def test_mma_of_infinities(emulator):
    zero, infinite = np.zeros((32, 4), np.uint32), np.full((32, 2), 0x7F807F80, np.uint32)
    assert np.isnan(emulator.mma_bf16(zero, infinite, np.zeros((32, 4)))).all()
    one = np.full((32, 4), 0x3C003C00, np.uint32)
    got = emulator.mma_f16(one, np.full((32, 2), 0x7C007C00, np.uint32), np.zeros((32, 4)))
    assert np.isposinf(got).all()


@pytest.mark.parametrize("seed", range(4))
def test_load_matrix_x4(emulator, seed):
    image = rng.integers(0, 256, 2048, dtype=np.uint8)
    offsets = rng.integers(0, 2048 // 16, 32, dtype=np.int32) * 16
    got = emulator.load_matrix_x4(image, offsets, seed)
    for matrix in range(4):
        rows = [image[at : at + 16] for at in offsets[8 * matrix : 8 * matrix + 8]]
        words = np.stack(rows).view(np.uint32)  # [8, 4]: lane l has row l / 4, word l % 4
        assert (got[:, matrix] == words.reshape(32)).all()


@pytest.mark.parametrize("offset, kind", [(8, "misaligned"), (2048, "out of bounds")])
def test_load_matrix_x4_checks_rows(emulator, offset, kind):
    offsets = np.zeros(32, np.int32)
    offsets[13] = offset
    with pytest.raises(RuntimeError, match=f"^{kind}: .* lane 13 reads"):
        emulator.load_matrix_x4(np.zeros(2048, np.uint8), offsets)


@pytest.mark.parametrize("seed", range(4))
def test_shuffles(emulator, seed):
    values = rng.standard_normal(32).astype(np.float32)
    lanes = rng.integers(0, 32, 32, dtype=np.int32)
    assert (emulator.shuffle(values, lanes, seed) == values[lanes]).all()
    for mask in (1, 2, 4, 8, 16, 31):
        got = emulator.shuffle_xor(values, np.full(32, mask, np.int32), seed)
        assert (got == values[np.arange(32) ^ mask]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name, together", [("any", 32), ("barrier_any", 64)])
def test_votes(emulator, name, together, seed):
    """In no thread, one, all and some: of the warp for any, of the block for barrier_any."""
    one = np.eye(64, dtype=np.uint32)
    some = (rng.random((64, 64)) < 0.03).astype(np.uint32)
    votes = np.concatenate([one[:0:-1], 1 - one, some, one * 0, one | 1, one])
    got = getattr(emulator, name)(votes, seed)
    groups = votes.reshape(-1, together)
    assert (got.reshape(-1, together) == groups.any(1)[:, None]).all()


def test_now_increases_with_each_call(emulator):
    last = 0
    for seed in SEEDS:
        times = emulator.now(50, seed)  # [thread, 50]
        assert (np.diff(times.astype(np.int64), axis=1) > 0).all()
        assert np.unique(times).size == times.size and times.min() > last
        last = times.max()


def floats():
    """Floats of every exponent, beside and at what lies halfway, and special ones."""
    high = np.arange(65536, dtype=np.uint32) << 16
    parts = [high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    every = np.arange(0x38000000 >> 12, 0x48000000 >> 12, dtype=np.uint32) << 12
    parts += [every, every + 1, every - 1]
    low = np.arange(0x33000000 >> 10, 0x38800000 >> 10, dtype=np.uint32) << 10
    parts += [low, low + 1, low - 1]
    parts.append(rng.integers(0, 2**32, 1_000_000, dtype=np.uint32))
    bits = np.concatenate(parts)
    return np.concatenate([bits, bits ^ 0x80000000]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions(emulator, name, dtype):
    bits = np.arange(65536, dtype=np.uint16)
    got = getattr(emulator, f"from_{name}")(bits)
    want = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (got.view(np.uint32) == want.view(np.uint32))[~np.isnan(want)].all()

    x = floats()
    got = getattr(emulator, f"to_{name}")(x)
    want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    assert nan.any() and (got[~nan] == want[~nan]).all()
    assert (got[nan] == 0x7FFF).all()
    if name == "f16":
        with np.errstate(over="ignore"):
            assert (got[~nan] == x.astype(np.float16).view(np.uint16)[~nan]).all()


@pytest.mark.parametrize("suffix, dtype", [("", np.float32), ("_double", np.float64)])
def test_elementary_functions(emulator, suffix, dtype):
    x = np.linspace(-80, 80, 10001).astype(dtype)
    few_ulp = 4 * np.finfo(dtype).eps
    for name, function in (("exponential", np.exp), ("hyperbolic_tangent", np.tanh)):
        got = getattr(emulator, name + suffix)(x)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, function(x.astype(np.float64)), few_ulp)
    x = x[x != 0]
    np.testing.assert_allclose(getattr(emulator, "reciprocal" + suffix)(x), 1 / x, few_ulp)


# Small kernels: what each gives.


def expected(name, x):
    if name == "reduction":
        return np.broadcast_to(x.reshape(9, 64).sum(1, keepdims=True), (9, 64))
    if name == "rotation":
        return np.roll(x.reshape(6, 32), -3, 1)
    if name == "tile_copy":
        return x.reshape(5, 64, 4)[:, ::-1]
    if name == "message":
        return x.reshape(3, 64)[:, ::-1]
    if name == "arrivals":
        return np.roll(x, -1)
    if name == "counter":
        return np.broadcast_to(x.reshape(4, 3, 64).sum(0), (4, 3, 64))
    assert name == "product"
    _, exact = bits_16(x.reshape(24, 16), torch.bfloat16)
    return exact[:16] @ exact[16:].T


def kernel(emulator, name, fault, seed, **options):
    """What a small kernel gives and what it should give."""
    (count,) = (n for other, kind, n in emulator.small_kernels() if (other, kind) == (name, fault))
    x = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    got = emulator.kernel(name, fault, seed, x, **options)
    want = expected(name, x)
    return got.reshape(want.shape), want


def is_right(got, want):
    return np.allclose(got, want, 1e-5, 1e-4)


def report_of(emulator, name, fault, seed, **options):
    with pytest.raises(RuntimeError) as caught:
        kernel(emulator, name, fault, seed, **options)
    return str(caught.value)


RIGHT = [
    ("reduction", "none"),
    ("rotation", "none"),
    ("tile_copy", "none"),
    ("message", "none"),
    ("message", "fences"),
    ("message", "system"),
    ("arrivals", "none"),
    ("arrivals", "fences"),
    ("counter", "none"),
    ("counter", "fences"),
    ("product", "none"),
]


@pytest.mark.parametrize("name, fault", RIGHT)
def test_right_kernels(emulator, name, fault):
    for seed in SEEDS:
        assert is_right(*kernel(emulator, name, fault, seed))


# Faults that are reported whatever the seed, by the kinds of report that are right.
FOUND = {
    ("reduction", "no barrier"): "race|read before written",
    ("reduction", "no second barrier"): "race",
    ("reduction", "beyond"): "out of bounds: .* reads 4 bytes at shared [+] 0x100$",
    ("reduction", "misaligned"): "misaligned: .* reads 4 bytes at shared [+] 0x2$",
    ("reduction", "unwritten"): "read before written: .* reads out [+] 0x",
    ("reduction", "lane ends"): "deadlock: .*(barrier|missing)",
    ("reduction", "divergence"): "divergence: .*",
    ("rotation", "no barrier"): "race|read before written",
    ("rotation", "no second barrier"): "race",
    ("rotation", "lane ends"): "divergence: .*",
    ("rotation", "divergence"): r"divergence: .*\bany\b",
    ("tile_copy", "no barrier"): "race|read before written|copy in flight",
    ("tile_copy", "no second barrier"): "race|copy in flight",
    ("tile_copy", "beyond"): "out of bounds: .* reads 16 bytes at in [+] 0x1[4-7]",
    ("tile_copy", "parity"): "copy in flight: .* reads shared [+] 0x",
    ("tile_copy", "no wait"): "copy in flight: .* reads shared [+] 0x",
    ("tile_copy", "unordered"): "race: .* reads shared [+] 0x.*, written by",
    ("tile_copy", "never waited"): "copy never waited for: .* 1 copies",
    ("tile_copy", "source written"): "race: .* copies .* in [+] 0x",
    ("message", "no barrier"): "race: .* scratch [+]|read before written",
    ("message", "no second barrier"): "race: .* scratch [+]|read before written",
    ("message", "no release"): "race: .* scratch [+]",
    ("message", "no acquire"): "race: .* scratch [+]",
    ("message", "plain flag"): "race: .* words [+] 0x0",
    ("message", "never set"): "livelock: .*lane 0 between atomic accesses",
    ("arrivals", "no release"): "race: .* scratch [+]",
    ("arrivals", "no acquire"): "race: .* scratch [+]",
    ("arrivals", "no acknowledgement"): "race: .* scratch [+] 0x18",
    ("counter", "no barrier"): "race: .* scratch [+]|read before written",
    ("counter", "no second barrier"): "race: .* scratch [+]|read before written",
    ("counter", "no release"): "race: .* scratch [+]",
    ("counter", "no acquire"): "race: .* scratch [+]",
    ("mixed", "atomic read, write"): "race: .* writes words [+] 0x8, read atomically by",
    ("mixed", "atomic write, read"): "race: .* reads words [+] 0x8, written atomically by",
    ("mixed", "read, atomic write"): "race: .* writes atomically words [+] 0x8, read by",
    ("mixed", "write, atomic read"): "race: .* reads atomically words [+] 0x8, written by",
    ("product", "no barrier"): "race|read before written",
    ("product", "misaligned"): "misaligned: .* reads 16 bytes at shared",
    ("product", "lane ends"): "divergence: .*",
    ("product", "divergence"): "divergence: .*mma_",
}
# Faults that either are reported or give something wrong, as the order happens to be.
FOUND_OR_WRONG = [
    ("message", "no acknowledgement"),
    ("counter", "parity"),
    ("product", "swapped"),
]
# And one that an order may hide altogether.
FOUND_SOMETIMES = [("counter", "early")]


@pytest.mark.parametrize("name, fault", FOUND)
def test_faults_are_found_whatever_the_seed(emulator, name, fault):
    for seed in SEEDS:
        report = report_of(emulator, name, fault, seed)
        assert re.match(FOUND[name, fault], report), report


@pytest.mark.parametrize("name, fault", FOUND_OR_WRONG)
def test_faults_that_may_also_give_something_wrong(emulator, name, fault):
    for seed in SEEDS:
        try:
            got, want = kernel(emulator, name, fault, seed)
        except RuntimeError as error:
            assert str(error).startswith("race: ")
        else:
            assert not is_right(got, want)


@pytest.mark.parametrize("name, fault", FOUND_SOMETIMES)
def test_faults_that_some_seed_finds(emulator, name, fault):
    found = 0
    for seed in SEEDS:
        try:
            kernel(emulator, name, fault, seed)
        except RuntimeError:
            found += 1
    assert found > len(SEEDS) / 4


def test_every_small_kernel_is_in_a_table(emulator):
    tables = [*RIGHT, *FOUND, *FOUND_OR_WRONG, *FOUND_SOMETIMES]
    assert sorted(tables) == sorted((n, fault) for n, fault, _ in emulator.small_kernels())


def test_both_threads_of_a_race_are_named(emulator):
    report = report_of(emulator, "rotation", "no second barrier", 3)
    thread = r"block \(\d, 0\) warp \d lane (\d+)"
    lanes = re.search(f"race: {thread} (?:writes|reads) .* by {thread} with", report)
    assert lanes and lanes[1] != lanes[2]


def test_a_deadlock_says_who_waits_for_what(emulator):
    report = report_of(emulator, "product", "lane ends", 1)
    assert re.search(r"lanes? .* at load_matrix_x4 \(\d+ of 32 arrived\)", report)
    report = report_of(emulator, "message", "never set", 1)
    assert re.search(r"block \(1, 0\) warp 1: lanes 0-31 at barrier \(63 of 64 arrived\)", report)


def test_a_seed_fixes_the_order(emulator):
    reports = [report_of(emulator, "counter", "no release", seed) for seed in SEEDS]
    assert reports == [report_of(emulator, "counter", "no release", seed) for seed in SEEDS]
    assert len(set(reports)) > 3


def test_blocks_that_wait_for_one_another_have_to_be_resident(emulator):
    assert is_right(*kernel(emulator, "counter", "none", 0, resident=4))
    for seed in SEEDS:
        report = report_of(emulator, "counter", "none", seed, resident=3)
        assert report.startswith("livelock: ")
        # Without blocks that wait the number does not matter.
        assert is_right(*kernel(emulator, "reduction", "none", seed, resident=1 + seed % 3))


def test_races_can_be_left_unchecked(emulator):
    for seed in SEEDS:
        kernel(emulator, "rotation", "no second barrier", seed, check_races=False)
        report = report_of(emulator, "reduction", "unwritten", seed, check_races=False)
        assert report.startswith("read before written: ")


def test_a_fault_leaves_nothing_behind(emulator):
    """Faults of every kind, and after each a launch that is right."""
    for name, fault in FOUND:
        report_of(emulator, name, fault, 5)
        assert is_right(*kernel(emulator, "reduction", "none", 5))


# What may be touched.


def accesses(emulator, ranges, *done, memory=None):
    """Accesses (at, bytes, writes) in memory aligned to 16 bytes at least."""
    return emulator.accesses(
        np.arange(64, dtype=np.uint8) if memory is None else memory, ranges, list(done)
    )


def test_ranges_end_at_a_byte(emulator):
    for size in (1, 2, 4, 8, 16):
        accesses(emulator, [(16, size, True)], (16, size, True), (16, size, False))
        for at, bytes_ in ((16, size), (16 - size, size)):
            short = [(17, size, True)] if at == 16 else [(16, 48, True)]
            with pytest.raises(RuntimeError, match=f"^out of bounds: .* {bytes_} bytes at range"):
                accesses(emulator, short, (at, bytes_, False))
    with pytest.raises(
        RuntimeError, match=r"^out of bounds: .* writes 4 bytes at range 16 [+] 0x8$"
    ):
        accesses(emulator, [(16, 8, True), (40, 8, True)], (24, 4, True))
    # Neighbours are not one range, though both may be touched.
    with pytest.raises(RuntimeError, match="^out of bounds: "):
        accesses(emulator, [(16, 8, True), (24, 8, True)], (16, 16, False))


def test_accesses_are_aligned_to_their_size(emulator):
    for size in (2, 4, 8, 16):
        with pytest.raises(RuntimeError, match=f"^misaligned: .* {size} bytes at range 0"):
            accesses(emulator, [(0, 64, True)], (16 + size // 2, size, False))


def test_memory_without_values_is_nan_until_written(emulator):
    got = accesses(emulator, [(16, 16, False)], (20, 4, True), (20, 4, False))
    want = np.arange(64, dtype=np.uint8)
    want[16:32] = 0xFF
    want[20:24] = 0
    assert (got == want).all()
    for at, size in ((24, 4), (16, 8), (16, 16), (18, 2)):
        with pytest.raises(RuntimeError, match="^read before written: "):
            accesses(emulator, [(16, 16, False)], (20, 4, True), (at, size, False))


def test_ranges_that_overlap_are_their_union(emulator):
    got = accesses(emulator, [(0, 24, True), (16, 32, False), (8, 8, True)], (16, 8, False))
    want = np.arange(64, dtype=np.uint8)
    want[24:48] = 0xFF  # what was allowed as written keeps its values
    assert (got == want).all()
    accesses(emulator, [(0, 24, True), (16, 32, False)], (16, 16, True), (16, 16, False))
    with pytest.raises(RuntimeError, match="^read before written: "):
        accesses(emulator, [(0, 24, True), (16, 32, False)], (24, 8, False))
    # Values that came after all.
    accesses(emulator, [(16, 32, False), (24, 8, True)], (24, 8, False))


# Programs drawn at random, and vector clocks over all threads to say which of them race.

NOTHING, READ, WRITE, READ_SHARED, WRITE_SHARED, BARRIER, WARP_BARRIER = range(7)
RELEASE, FENCED_RELEASE, ACQUIRE, FENCED_ACQUIRE = range(7, 11)
BLOCKS, THREADS = 2, 64


def draw_program(seed, length, numbers):
    """Operations [thread, operation, 2], drawn in one of the orders they may run in, the count of
    words, and whether two accesses race. Only the first lanes of warps release, and acquire in
    programs of an even seed: several readers of a warp are not told apart, so that a thread that
    knows of each of them by itself is still suspected."""
    draw = np.random.default_rng(seed)
    count = BLOCKS * THREADS
    # A few threads do most, for what they do to meet.
    active = [0, 1, 2, 32, 33, 64, 65, 96, *draw.integers(count, size=int(draw.integers(8)))]
    clocks = np.eye(count, dtype=np.int64)
    threads = [[] for _ in range(count)]
    released = []  # clocks by word
    writes, reads = {}, {}  # by address: of each thread the time of its last access
    races = False
    for _ in range(length):
        thread = int(draw.choice(active))
        kind = draw.choice([READ, WRITE, BARRIER, WARP_BARRIER, RELEASE, ACQUIRE],
                           p=[0.4, 0.2, 0.02, 0.1, 0.1, 0.18])  # fmt: skip
        if kind in (READ, WRITE):
            shared = bool(draw.integers(2))
            number = int(draw.integers(numbers))
            address = (shared, thread // THREADS if shared else 0, number)
            known = clocks[thread]
            races_here = any(
                other != thread and known[other] < time
                for table in ((writes, reads) if kind == WRITE else (writes,))
                for other, time in table.get(address, {}).items()
            )
            # Few, or those that are hard to see would hide behind others.
            if races_here and draw.random() > 0.05:
                continue
            races = races or races_here
            threads[thread].append((kind + (2 if shared else 0), number))
            (reads if kind == READ else writes).setdefault(address, {})[thread] = known[thread]
        elif kind in (BARRIER, WARP_BARRIER):
            size = THREADS if kind == BARRIER else 32
            first = thread // size * size
            group = range(first, first + size)
            for each in group:
                threads[each].append((kind, 0))
            clocks[first : first + size] = clocks[first : first + size].max(0)
            clocks[group, group] += 1
        elif kind == RELEASE:
            thread = thread // 32 * 32
            threads[thread].append((draw.choice([RELEASE, FENCED_RELEASE]), len(released)))
            released.append(clocks[thread].copy())
            clocks[thread, thread] += 1
        elif released:
            thread = thread // 32 * 32 if seed % 2 == 0 else thread
            word = int(draw.integers(len(released)))
            threads[thread].append((draw.choice([ACQUIRE, FENCED_ACQUIRE]), word))
            clocks[thread] = np.maximum(clocks[thread], released[word])
    operations = np.zeros((count, max(map(len, threads)), 2), np.int32)
    for i, each in enumerate(threads):
        operations[i, : len(each)] = np.array(each).reshape(-1, 2)
    return operations, len(released), races


def test_races_are_those_of_vector_clocks(emulator):
    verdicts = []
    for seed in range(1000):
        numbers = (1, 3, 12)[seed % 3]
        operations, words, races = draw_program(seed, (50, 120, 250)[seed // 3 % 3], numbers)
        try:
            emulator.program(operations, numbers, numbers, words + 1, seed)
            found = False
        except RuntimeError as error:
            assert str(error).startswith("race: ")
            found = True
        assert found == races or (found and seed % 2 == 1), seed
        verdicts.append(races)
    assert 0.2 < np.mean(verdicts) < 0.8


def program(of_threads):
    """Operations [thread, operation, 2] from those of each thread; all of block 0 come to its
    BARRIER, if there is one."""
    longest = max(map(len, of_threads.values()))
    operations = np.zeros((BLOCKS * THREADS, longest, 2), np.int32)
    if any((BARRIER, 0) in each for each in of_threads.values()):
        operations[:THREADS, 0] = BARRIER, 0
    for thread, each in of_threads.items():
        operations[thread] = 0
        operations[thread, : len(each)] = each
    return operations


def test_no_reader_of_many_is_forgotten(emulator):
    """Of readers in several warps or blocks one alone is not ordered before the write."""
    barrier = (BARRIER, 0)
    several_of_a_warp = {
        0: [(READ, 3)],
        32: [(READ, 3), (RELEASE, 0)],
        1: [(READ, 3), (ACQUIRE, 0), (WRITE, 3)],
    }
    other_block = {
        0: [(READ, 3), barrier, (READ, 3), (WRITE, 3)],
        32: [(READ, 3), barrier],
        64: [(READ, 3)],
    }
    for of_threads in (several_of_a_warp, other_block):
        for seed in range(60):
            with pytest.raises(RuntimeError, match="^race: .* numbers [+] 0x6"):
                emulator.program(program(of_threads), 8, 8, 1, seed)
    # Without that one they are right.
    del several_of_a_warp[0], other_block[64]
    for of_threads in (several_of_a_warp, other_block):
        for seed in range(60):
            emulator.program(program(of_threads), 8, 8, 1, seed)
