"""docs/math.md implemented as written, one section after another, against autograd in float64."""

import math

import pytest
import torch

from fused_rnn import reference

STEPS, ROWS, INPUTS, H, P = 6, 4, 3, 5, 2
GATES = {"lstm": 4, "lstmp": 4, "gru_after": 3, "gru_before": 3, "tanh": 1, "relu": 1}
ENDED, RESET = 1, 2


def sigmoid_slope(s):
    return s * (1 - s)


def tanh_slope(y):
    return (1 - y) * (1 + y)


# One step of each cell, for rows of state and x [B, ...] and W [G*H, P]. `forward` gives the state
# that leaves and the tape; `backward` gives d, the carry, the factors (d, operand) of W's gradient
# gate by gate, and the step's part of the gradients of w_hr and b_hn.


class Lstm:
    def __init__(self, w, r, b):
        self.w, self.r = w, r

    def forward(self, x, h, c):
        i, f, g, o = (x + h @ self.w.mT).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new = f * c + i * g
        m = o * c_new.tanh()
        return (m if self.r is None else m @ self.r.mT, c_new), (i, f, g, o)

    def backward(self, tape, entering, leaving, outside, carry):
        (i, f, g, o), (h, c), (_, c_new) = tape, entering, leaving
        (y_bar, q_bar), (h_hat, c_hat) = outside, carry
        h_bar = y_bar + h_hat
        m_bar = h_bar if self.r is None else h_bar @ self.r
        tanh_c = c_new.tanh()
        c_bar = q_bar + c_hat + m_bar * o * tanh_slope(tanh_c)
        d = torch.cat(
            [
                c_bar * g * sigmoid_slope(i),
                c_bar * c * sigmoid_slope(f),
                c_bar * i * tanh_slope(g),
                m_bar * tanh_c * sigmoid_slope(o),
            ],
            -1,
        )
        grad_r = None if self.r is None else h_bar.mT @ (o * tanh_c)
        return d, (d @ self.w, c_bar * f), [(d, h)], (grad_r, None)


class GruAfter:
    def __init__(self, w, r, b):
        self.w, self.b = w, b

    def forward(self, x, h):
        x_r, x_z, x_n = x.chunk(3, -1)
        w_r, w_z, w_n = self.w.chunk(3)
        r, z = (x_r + h @ w_r.mT).sigmoid(), (x_z + h @ w_z.mT).sigmoid()
        u = h @ w_n.mT + self.b
        n = (x_n + r * u).tanh()
        return (n + z * (h - n),), (r, z, n, u)

    def backward(self, tape, entering, leaving, outside, carry):
        (r, z, n, u), (h,) = tape, entering
        w_r, w_z, w_n = self.w.chunk(3)
        h_bar = outside[0] + carry[0]
        d_n = h_bar * (1 - z) * tanh_slope(n)
        d_z = h_bar * (h - n) * sigmoid_slope(z)
        d_u = d_n * r
        d_r = d_n * u * sigmoid_slope(r)
        carry = h_bar * z + d_r @ w_r + d_z @ w_z + d_u @ w_n
        return (
            torch.cat([d_r, d_z, d_n], -1),
            (carry,),
            [(d_r, h), (d_z, h), (d_u, h)],
            (None, d_u.sum(0)),
        )


class GruBefore:
    def __init__(self, w, r, b):
        self.w = w

    def forward(self, x, h):
        x_r, x_z, x_n = x.chunk(3, -1)
        w_r, w_z, w_n = self.w.chunk(3)
        r, z = (x_r + h @ w_r.mT).sigmoid(), (x_z + h @ w_z.mT).sigmoid()
        n = (x_n + (r * h) @ w_n.mT).tanh()
        return ((1 - z) * n + z * h,), (r, z, n)

    def backward(self, tape, entering, leaving, outside, carry):
        (r, z, n), (h,) = tape, entering
        w_r, w_z, w_n = self.w.chunk(3)
        h_bar = outside[0] + carry[0]
        d_n = h_bar * (1 - z) * tanh_slope(n)
        d_z = h_bar * (h - n) * sigmoid_slope(z)
        v = d_n @ w_n
        d_r = v * h * sigmoid_slope(r)
        carry = h_bar * z + v * r + d_r @ w_r + d_z @ w_z
        return (
            torch.cat([d_r, d_z, d_n], -1),
            (carry,),
            [(d_r, h), (d_z, h), (d_n, r * h)],
            (None, None),
        )


class Rnn:
    def __init__(self, w, r, b, relu=False):
        self.w, self.relu = w, relu

    def forward(self, x, h):
        a = x + h @ self.w.mT
        return (a.relu() if self.relu else a.tanh(),), ()

    def backward(self, tape, entering, leaving, outside, carry):
        (h_new,) = leaving
        h_bar = outside[0] + carry[0]
        d = h_bar * (h_new > 0) if self.relu else h_bar * tanh_slope(h_new)
        return d, (d @ self.w,), [(d, entering[0])], (None, None)


def cell_of(kind, w, r, b):
    if kind in ("tanh", "relu"):
        return Rnn(w, r, b, kind == "relu")
    return {"gru_after": GruAfter, "gru_before": GruBefore}.get(kind, Lstm)(w, r, b)


def keep_and_ended(flags, reverse):
    """k_t and e_t [T, B, 1] from the flags."""
    e = (flags & ENDED != 0).double().unsqueeze(-1)
    b = (flags & RESET != 0).double().unsqueeze(-1) * (1 - e)
    after = torch.cat([b[1:], torch.zeros_like(b[:1])])  # b_T = 0
    return 1 - (after if reverse else b), e


def as_written(kind, given, bars, final_bars, flags, reverse, recompute):
    """Outputs, final states and every gradient of one entry by the equations of the page."""
    x, w_ih, w, bias, r, b, *states = given
    cell = cell_of(kind, w, r, b)
    gates_x = x @ w_ih.mT + bias
    k, e = keep_and_ended(flags, reverse)
    order = list(range(STEPS))[:: -1 if reverse else 1]

    entering, leaving, tapes = {}, {}, {}
    for t in order:
        entering[t] = tuple(k[t] * s for s in states)
        leaving[t], tapes[t] = cell.forward(gates_x[t], *entering[t])
        states = [e[t] * s + (1 - e[t]) * new for s, new in zip(states, leaving[t], strict=True)]
    outputs = [
        torch.stack([(1 - e[t]) * leaving[t][j] for t in range(STEPS)]) for j in range(len(states))
    ]

    if recompute:  # all steps at once, from what the forward pass left behind
        together = [torch.stack([entering[t][j] for t in range(STEPS)]) for j in range(len(states))]
        rebuilt = cell.forward(gates_x, *together)[1]
        tapes = {t: tuple(part[t] for part in rebuilt) for t in range(STEPS)}

    carry = [bar.clone() for bar in final_bars]
    d = torch.zeros_like(gates_x)
    grad_w, grad_r, grad_b = torch.zeros_like(w), 0, 0
    for t in reversed(order):
        on = e[t].squeeze(-1) == 0  # the other rows have ended: d = 0, and the carry stays
        outside = [bar[t] for bar in bars]
        groups = (tapes[t], entering[t], leaving[t], outside, carry)
        d[t, on], new, terms, (more_r, more_b) = cell.backward(
            *([part[on] for part in group] for group in groups)
        )
        grad_w += torch.cat([left.mT @ right for left, right in terms])
        grad_r = grad_r if more_r is None else grad_r + more_r
        grad_b = grad_b if more_b is None else grad_b + more_b
        for s_hat, now in zip(carry, new, strict=True):
            s_hat[on] = k[t][on] * now

    grads = {
        "x": d @ w_ih,
        "w_ih": d.flatten(0, 1).mT @ x.flatten(0, 1),
        "w_hh": grad_w,
        "bias": d.sum((0, 1)),
        "h0": carry[0],
    }
    if kind.startswith("lstm"):
        grads["c0"] = carry[1]
    if r is not None:
        grads["w_hr"] = grad_r
    if b is not None:
        grads["b_hn"] = grad_b
    return outputs, states, grads


def by_reference(kind, given, flags, reverse):
    """The same outputs and final states by reference.py."""
    x, w_ih, w, bias, r, b, *states = given
    gates_x = (x @ w_ih.mT + bias).unsqueeze(2)
    common = {"flags": flags, "reverse": (reverse,)}
    states = [s.unsqueeze(0) for s in states]
    w = w.unsqueeze(0)
    if kind.startswith("lstm"):
        w_hr = None if r is None else r.unsqueeze(0)
        y, h_n, c_n, cells = reference.lstm_scan(gates_x, w, *states, w_hr=w_hr, **common)
        return [y[:, :, 0], cells[:, :, 0]], [h_n[0], c_n[0]]
    if kind.startswith("gru"):
        b_hn = None if b is None else b.unsqueeze(0)
        y, h_n = reference.gru_scan(
            gates_x, w, *states, b_hn=b_hn, reset_after=kind == "gru_after", **common
        )
    else:
        y, h_n = reference.rnn_scan(gates_x, w, *states, relu=kind == "relu", **common)
    return [y[:, :, 0]], [h_n[0]]


def tensors(kind, generator):
    """x, w_ih, w_hh, bias, w_hr, b_hn and the initial states of one entry."""

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    width = GATES[kind] * H
    size = P if kind == "lstmp" else H
    given = [draw(STEPS, ROWS, INPUTS), draw(width, INPUTS), draw(width, size), draw(width)]
    given += [
        draw(P, H) if kind == "lstmp" else None,
        draw(H) if kind == "gru_after" else None,
        draw(ROWS, size),
    ]
    return given + ([draw(ROWS, H)] if kind.startswith("lstm") else [])


def some_flags():
    """Rows: whole; ended at 4, with segments; of length zero; with segments at both ends."""
    flags = torch.zeros(STEPS, ROWS, dtype=torch.uint8)
    flags[4:, 1] |= ENDED
    flags[:, 2] |= ENDED
    flags[[0, 2], 1] |= RESET
    flags[[4, 1], [1, 2]] |= RESET  # on ended steps, where they count for nothing
    flags[[0, 3, 5], 3] |= RESET
    return flags


NAMES = ["x", "w_ih", "w_hh", "bias", "w_hr", "b_hn", "h0", "c0"]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("flagged", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("kind", GATES)
def test_backward_as_written(kind, reverse, flagged, recompute):
    generator = torch.Generator().manual_seed(0)
    given = tensors(kind, generator)
    flags = some_flags() if flagged else torch.zeros(STEPS, ROWS, dtype=torch.uint8)
    outputs, finals = by_reference(kind, given, flags, reverse)
    everything = [*outputs, *finals]
    bars = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in everything]
    named = {name: tensor for name, tensor in zip(NAMES, given, strict=False) if tensor is not None}
    wanted = torch.autograd.grad(everything, list(named.values()), bars)

    with torch.no_grad():
        count = len(outputs)
        mine, my_finals, grads = as_written(
            kind, given, bars[:count], bars[count:], flags, reverse, recompute
        )
    for ours, theirs in zip([*mine, *my_finals], everything, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert grads.keys() == named.keys()
    for name, want in zip(named, wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(
            grads[name], want, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", GATES)
def test_second_derivatives_and_forward_mode(kind):
    """grad_v <w, J^T v> = J w; grad_theta <w, J^T v> = sum_k v_k Hess F_k w."""
    generator = torch.Generator().manual_seed(1)
    given = tensors(kind, generator)
    places = [k for k, tensor in enumerate(given) if tensor is not None]
    flags = some_flags()

    def layer(*chosen):
        full = list(given)
        for k, tensor in zip(places, chosen, strict=True):
            full[k] = tensor
        outputs, finals = by_reference(kind, full, flags, False)
        return tuple(outputs + finals)

    def like(values):
        return tuple(torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in values)

    theta = tuple(given[k].detach() for k in places)
    w = like(theta)
    out, pull = torch.func.vjp(layer, *theta)
    v = like(out)
    _, forward = torch.func.jvp(layer, theta, w)

    for at in (v, tuple(torch.zeros_like(part) for part in v)):  # any v, zero too
        _, pull_twice = torch.func.vjp(pull, at)
        for ours, truth in zip(pull_twice(w)[0], forward, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)

    def weighted(*theta):
        return sum((part * out).sum() for part, out in zip(v, layer(*theta), strict=True))

    everywhere = tuple(range(len(theta)))
    _, hessian_w = torch.func.jvp(torch.func.grad(weighted, everywhere), theta, w)
    _, twice = torch.func.vjp(lambda *theta: torch.func.vjp(layer, *theta)[1](v), *theta)
    for ours, truth in zip(twice(w), hessian_w, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


# The forms of the last section in float32, one rounding per operation, against float64.


def ulps(ours, truth):
    """The largest error in units of the last place of float32, denormals included."""
    grain = torch.clamp(torch.exp2(torch.floor(torch.log2(truth.abs()))) * 2**-23, min=2.0**-149)
    return ((ours.double() - truth).abs() / grain).max().item()


def float32_points():
    near = torch.logspace(-30, 2, 20001)
    return torch.cat(
        [near, -near, torch.linspace(-90, 90, 40001), torch.tensor([0.0, 0.625, -0.625])]
    )


def exp_by_parts(x):
    high = 0.693145751953125  # ln 2 cut to few bits
    low = math.log(2) - high
    n = torch.round(x * (1 / math.log(2)))
    assert torch.equal((n * high).double(), n.double() * high)  # the product is exact
    r = (x - n * high) - n * low
    assert r.abs().max() <= 0.5 * math.log(2) + 1e-5
    return torch.exp(r.double()).float() * torch.exp2(n.double()).float()


def test_exponential_by_parts():
    x = torch.linspace(-80, 40, 50001)
    assert ulps(exp_by_parts(x), torch.exp(x.double())) <= 2


def test_sigmoid_form():
    x = float32_points()
    e = exp_by_parts(-x.abs().clamp(max=87))
    ours = torch.where(x < 0, e / (1 + e), 1 / (1 + e))
    truth = torch.sigmoid(x.double())
    inside = x.abs() < 87
    assert ulps(ours[inside], truth[inside]) <= 3
    naive = 1 - torch.sigmoid(-torch.tensor(-30.0))
    assert naive == 0 < ours[x < -30].max()


def test_tanh_form():
    x = float32_points()
    size = x.abs()
    large = torch.copysign(1 - 2 / (exp_by_parts((2 * size).clamp(max=40)) + 1), x)
    exact = x.double()
    cubic = torch.where(
        exact == 0, 0, (torch.tanh(exact) - exact) / exact**3
    )  # p(x^2), to be approximated
    small = x + (x * x * x) * cubic.float()
    truth = torch.tanh(exact)
    ours = torch.where(size < 0.625, small, large)
    normal = (size > 1e-25) | (x == 0)
    assert ulps(ours[normal], truth[normal]) <= 3
    assert torch.equal(ours[size > 20], x[size > 20].sign())
    few = (size > 1e-6) & (size < 1e-3)
    assert ulps(large[few], truth[few]) > 1000  # why the polynomial is there


def parts_of_exp(x):
    """2^N and e^r - 1 with x = N ln 2 + r."""
    high = 0.693145751953125
    n = torch.round(x * (1 / math.log(2)))
    r = (x - n * high) - n * (math.log(2) - high)
    return torch.exp2(n.double()).float(), torch.expm1(r.double()).float()


def test_forms_without_cases():
    x = float32_points()
    power, rest = parts_of_exp(-x.clamp(-87, 87))
    ours = 1 / ((1 + power) + power * rest)
    inside = x.abs() < 87
    assert ulps(ours[inside], torch.sigmoid(x.double())[inside]) <= 3
    power, rest = parts_of_exp(2 * x.clamp(-20, 20))
    minus_one = (power - 1) + power * rest
    ours = minus_one / (minus_one + 2)
    normal = (x.abs() > 1e-25) | (x == 0)
    assert ulps(ours[normal], torch.tanh(x.double())[normal]) <= 3
    assert torch.equal(ours[x.abs() > 20], x[x.abs() > 20].sign())


def test_slopes_do_not_cancel():
    """s (1 - s) and (1 - y)(1 + y) keep what s - s^2 and 1 - y^2 lose in a saturated gate."""
    a = torch.linspace(4, 8, 1001)
    y = torch.tanh(a)
    exact = (1 - y.double()) * (1 + y.double())
    assert ulps(tanh_slope(y), exact) <= 2 < ulps(1 - y * y, exact)
    s = torch.sigmoid(a)
    exact = s.double() * (1 - s.double())
    assert ulps(sigmoid_slope(s), exact) <= 2 < ulps(s - s * s, exact)
