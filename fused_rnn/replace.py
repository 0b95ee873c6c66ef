"""replace_rnn and restore_rnn: torch.nn's recurrent modules in a model for ours, and back."""

from torch import nn
from torch.nn.utils import parametrize

from fused_rnn import modules

_OURS = {
    getattr(nn, name): getattr(modules, name)
    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _target_class(module: nn.Module, classes: dict[type, type]) -> type | None:
    """The class to give the module, or None: exact classes only, or parametrized ones."""
    kind = type(module)
    if kind in classes:
        return classes[kind]
    if parametrize.is_parametrized(module) and kind.__bases__ == (kind.__base__,):
        base = classes.get(kind.__base__)
        if base is not None:  # the class parametrize made, on the other base
            return type(kind.__name__, (base,), dict(vars(kind)))
    return None


def _converted(module: nn.Module, kind: type) -> nn.Module:
    """A module of that class with the very parameters, buffers, hooks and attributes of another."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    if isinstance(new, nn.RNNBase):
        new._flat_weights = list(module._flat_weights)
    return new


def _swap(module: nn.Module, classes: dict[type, type]) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    made: dict[nn.Module, nn.Module] = {}  # a module used twice stays one module

    def swapped(old: nn.Module) -> nn.Module:
        if old not in made:
            kind = _target_class(old, classes)
            made[old] = old if kind is None else _converted(old, kind)
        return made[old]

    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = swapped(child)
    return swapped(module)


def replace_rnn(module: nn.Module) -> nn.Module:
    """Swap every torch.nn LSTM, GRU, RNN and cell inside a module for fused_rnn's, in place.

    Parameter tensors are shared (an optimizer made before goes on working), names, train/eval,
    hooks, parametrizations and sharing of modules are kept. Subclasses of torch.nn's classes are
    left alone: their own forward would be lost.

    Returns the module, or its replacement where the module itself is one.
    Raises TypeError where ``module`` is not a torch.nn.Module.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LSTM(4, 8))
    >>> type(replace_rnn(model)[1])
    <class 'fused_rnn.modules.LSTM'>
    """
    return _swap(module, _OURS)


def restore_rnn(module: nn.Module) -> nn.Module:
    """The reverse of :func:`replace_rnn`: swap fused_rnn's modules for torch.nn's, in place.

    A module's ``tape`` setting, which torch.nn does not know, is kept for the next replace_rnn.
    """
    return _swap(module, _THEIRS)
