"""Products on the CPU's tile unit (AMX), where there is one; elsewhere the same of what takes its
place: accuracy, the same bits for any company and number of threads, and what is not finite."""

import pytest
import torch

import fused_rnn

matmul = torch.ops.fused_rnn.cpu_matmul
ANY = 0  # rows that are not a batch's, for which the unit may be used
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def laid(t, layout):
    """t [N, rows, columns] in memory by rows, by columns, or with gaps in both."""
    if layout == "rows":
        return t.contiguous()
    if layout == "columns":
        return t.mT.contiguous().mT
    wide = t.new_full((t.shape[0], 2 * t.shape[1], 3 * t.shape[2]), float("nan"))
    wide[:, ::2, ::3] = t
    return wide[:, ::2, ::3]


def operands(m, k, n, left, right, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2, m, k, generator=g).to(left)
    b = torch.randn(2, k, n, generator=g).to(right)
    return a, b, torch.randn(2, n, generator=g)


@pytest.mark.parametrize("left, right", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("m, k, n", [(17, 32, 64), (33, 45, 70), (100, 530, 33), (64, 1100, 97)])
def test_products_are_as_exact_as_float32(m, k, n, left, right):
    """Against float64 of the same operands: within the error that float32 makes of them, or, where
    one is of 16 bits, within a hundredth of what that dtype rounds."""
    a, b, bias = operands(m, k, n, left, right)
    exact = a.double() @ b.double() + bias.double()[:, None]
    plain = a.float() @ b.float() + bias[:, None]
    got = matmul(a, b, bias, ANY)
    assert got.dtype == torch.float32
    error, allowed = (got - exact).norm(), 2 * (plain - exact).norm()
    coarsest = max(torch.finfo(left).eps, torch.finfo(right).eps)
    if coarsest > torch.finfo(torch.float32).eps:
        allowed = max(allowed, exact.norm() * coarsest / 100)
    assert error <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("right", ["rows", "columns", "gaps"])
def test_layouts_have_the_same_bits(left, right, dtype):
    a, b, bias = operands(50, 75, 66, dtype, dtype)
    want = matmul(a, b, bias, ANY)
    assert torch.equal(matmul(laid(a, left), laid(b, right), bias, ANY), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_in_any_company(dtype):
    a, b, bias = operands(150, 540, 130, dtype, dtype)
    want = matmul(a, b, bias, 20)
    for rows in (slice(0, 1), slice(3, 20), slice(149, 150), slice(10, 110)):
        assert torch.equal(matmul(a[:, rows], b, bias, 20), want[:, rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_has_the_same_bits(dtype, threads):
    a, b, bias = operands(300, 1030, 260, dtype, dtype)
    want = matmul(a, b, bias, ANY)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(matmul(a, b, bias, ANY), want)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_not_finite_stays_so(side, dtype):
    """Infinities with their sign and NaN reach the elements they enter, and no others."""
    a, b, bias = operands(40, 64, 64, dtype, dtype)
    a, b = a + a.sign(), b + b.sign()  # no zeros for an infinity to meet
    want = matmul(a, b, bias, ANY)
    t = a if side == "left" else b.mT
    t[0, 5, 7], t[1, 6, 8] = float("-inf"), float("nan")
    got = matmul(a, b, bias, ANY)
    across = b[0, 7] if side == "left" else a[0, :, 7]
    lines = got if side == "left" else got.mT
    assert torch.equal(lines[0, 5], -float("inf") * across.sign().float())
    assert lines[1, 6].isnan().all()
    rest = torch.ones(lines.shape[:2], dtype=torch.bool)
    rest[0, 5] = rest[1, 6] = False
    assert torch.equal(lines[rest], (want if side == "left" else want.mT)[rest])


def test_infinite_weights_of_scans():
    """An infinity among bfloat16 weights saturates what it enters, and no more."""
    module = layer("RNN", 64, 64, torch.bfloat16)
    x, h0 = torch.randn(3, 20, 64).bfloat16(), torch.rand(1, 20, 64).bfloat16() + 0.5
    with torch.no_grad():
        want = module(x[:1].expand(2, -1, -1)[:2], h0)[0][0]
        for weight in (module.weight_hh_l0, module.weight_ih_l0):
            before = weight[5, 7].clone()
            weight[5, 7] = float("inf")
            got = module(x[:1].expand(2, -1, -1), h0)[0][0]
            entered = h0[0] if weight is module.weight_hh_l0 else x[0]
            assert torch.equal(got[:, 5], entered[:, 7].sign())
            others = torch.arange(64) != 5
            assert torch.equal(got[:, others], want[:, others])
            weight[5, 7] = before


@pytest.mark.parametrize("wanted", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_hang_on_one_another(wanted, dtype):
    """One weight's has the same bits where the other's is not asked for."""
    x, found = torch.randn(8, 16, 128).to(dtype), []
    for alone in (False, True):
        module = layer("LSTM", 128, 128, dtype)
        if alone:
            module.requires_grad_(False)
            getattr(module, wanted).requires_grad_()
        module(x)[0].float().square().sum().backward()
        found.append(getattr(module, wanted).grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, size, hidden", [("RNN", 32, 32), ("LSTM", 32, 40), ("GRU", 90, 80)])
def test_full_lengths_change_no_bit_of_gradients(kind, size, hidden, dtype):
    module = layer(kind, size, hidden, dtype)
    x, weights = torch.randn(40, 20, size).to(dtype), torch.randn(40, 20, hidden).to(dtype)
    found = []
    for options in ({}, {"lengths": torch.full((20,), 40)}):
        grown = x.clone().requires_grad_()
        y = module(grown, **options)[0]
        y.backward(weights)
        found.append((y.detach(), grown.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_small_and_large_numbers():
    """Over the range of float32, but for its last thousandth and what is not normal."""
    a, b, _ = operands(20, 40, 50, torch.float32, torch.float32)
    for scale in (1e-30, 1e-18, 1e18, 1e36):
        exact = (a * scale).double() @ b.double()
        plain = (a * scale) @ b
        assert (matmul(a * scale, b, None, ANY) - exact).norm() <= 2 * (plain - exact).norm()


def layer(kind, size, hidden, dtype, **options):
    torch.manual_seed(0)
    return getattr(fused_rnn, kind)(size, hidden, **options).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind, size, hidden, options",
    [
        ("LSTM", 40, 50, {}),
        ("LSTM", 33, 70, {"bidirectional": True}),
        ("LSTM", 64, 80, {"proj_size": 40}),
        ("LSTM", 64, 80, {"proj_size": 8}),
        ("LSTM", 12, 30, {"proj_size": 8}),
        ("LSTM", 20, 64, {}),
        ("GRU", 13, 40, {"bidirectional": True}),
        ("GRU", 100, 100, {"bidirectional": True}),
        ("RNN", 32, 33, {}),
        ("RNN", 70, 150, {"num_layers": 2}),
    ],
)
def test_rows_of_scans_have_the_same_bits_in_any_company(kind, size, hidden, options, dtype):
    """From one row, whose input a product projects, to those of several tiles, whose input the
    scan does, in inference and training."""
    module = layer(kind, size, hidden, dtype, **options)
    x = torch.randn(5, 70, size, dtype=dtype)
    with torch.no_grad():
        want = module(x)[0]
        for rows in (slice(0, 1), slice(2, 9), slice(11, 60), slice(69, 70)):
            assert torch.equal(module(x[:, rows])[0], want[:, rows])
    assert torch.equal(module(x)[0].detach(), want)
    grown = x[:, 8:31].clone().requires_grad_()
    weights = torch.randn(want.shape).to(dtype)
    module(grown)[0].backward(weights[:, 8:31])
    whole = x.clone().requires_grad_()
    module(whole)[0].backward(weights)
    assert torch.equal(grown.grad, whole.grad[:, 8:31])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, size, hidden", [("LSTM", 40, 32), ("GRU", 64, 64), ("RNN", 40, 90)])
def test_gradients_of_rows_in_any_company(kind, size, hidden, dtype):
    """Of layers whose scan makes the gradients where there are rows enough, and of others."""
    module = layer(kind, size, hidden, dtype)
    x, weights = torch.randn(40, 64, size).to(dtype), torch.randn(40, 64, hidden).to(dtype)

    def gradient(rows):
        part = x[:, rows].clone().requires_grad_()
        module(part)[0].backward(weights[:, rows])
        return part.grad

    want = gradient(slice(0, 64))
    for rows in (slice(0, 1), slice(5, 9), slice(20, 41)):
        assert torch.equal(gradient(rows), want[:, rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_lengths_change_no_bit_of_a_row(kind, dtype):
    module = layer(kind, 48, 72, dtype)
    x = torch.randn(30, 20, 48, dtype=dtype)
    lengths = torch.arange(30, 10, -1)
    with torch.no_grad():
        want = module(x)[0]
        got = module(x, lengths=lengths)[0]
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(got[:length, b], want[:length, b])
        assert not got[length:, b].any()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_scans_on_any_number_of_threads(kind, threads):
    """More of them than cores, too, of which some come too late to take part."""
    module = layer(kind, 64, 200, torch.bfloat16)
    x = torch.randn(20, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for count in (1, 2, 5, *(16,) * 10):
        threads(count)
        module.zero_grad()
        y = module(x)[0]
        x.grad = None
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_the_librarys_own_tiles_go_on():
    """Calls that set the unit up in turns: ours and the library's products of bfloat16."""
    module = layer("LSTM", 64, 64, torch.bfloat16)
    x, a = torch.randn(8, 32, 64, dtype=torch.bfloat16), torch.randn(96, 96).bfloat16()
    with torch.no_grad():
        first, product = module(x)[0], a @ a
        for _ in range(5):
            assert torch.equal(module(x)[0], first)
            assert torch.equal(a @ a, product)
