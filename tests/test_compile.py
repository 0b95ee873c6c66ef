"""torch.compile without a graph break or a recompilation, and torch.export, with dynamic sizes."""

import pytest
import torch
import torch._dynamo.utils

from fused_rnn import GRU, LSTM, RNN, LSTMCell, functional

KINDS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def flat(result):
    """The tensors of a module's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", ["plain", "bidirectional", "flags", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_fullgraph_with_dynamic_steps(kind, options, training):
    """One graph for every T, forward and backward, with the results of eager mode."""
    torch.manual_seed(0)
    module = KINDS[kind](
        5,
        7,
        2,
        bidirectional=options == "bidirectional",
        tape="recompute" if options == "recompute" else "keep",
    ).train(training)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (6, 9, 13):
        x = torch.randn(steps, 4, 5)
        given = {}
        if options == "flags":
            given["lengths"] = torch.tensor([steps, 1, 3, 0])
            given["reset"] = torch.rand(steps, 4) < 0.3
        results = []
        for call in (module, compiled):
            leaf = x.clone().requires_grad_(training)
            module.zero_grad()
            with torch.set_grad_enabled(training):
                out = flat(call(leaf, **given))
            if training:
                sum(o.sin().sum() for o in out).backward()
                out += [leaf.grad, *(p.grad.clone() for p in module.parameters())]
            results.append(out)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inductor():
    """The default compiler, forward and backward."""
    module = LSTM(4, 6, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(3, 2, 4)
    wanted = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    found = torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cell_and_function_compile():
    cell = LSTMCell(3, 4)
    step = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3)
    for ours, theirs in zip(step(x), cell(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)

    def layer(x):
        return functional.gru(x, None, w_ih, w_hh, reset_after=False)[0]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.unsqueeze(0)), layer(x.unsqueeze(0)))


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export_with_dynamic_steps_and_rows(kind, with_lengths):
    """One exported program for every T and B; no value is read on the host."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = KINDS[kind](3, 5, 2, bidirectional=True, batch_first=True)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths if with_lengths else None)[0]

    model = Model().eval()
    rows, steps = torch.export.Dim("rows", min=2), torch.export.Dim("steps", min=2)
    example = (torch.randn(4, 6, 3), torch.tensor([6, 2, 3, 1]))
    program = torch.export.export(model, example, dynamic_shapes=({0: rows, 1: steps}, {0: rows}))
    for b, t in ((4, 6), (2, 9), (7, 3)):
        x, lengths = torch.randn(b, t, 3), torch.randint(0, t + 1, (b,))
        torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))
