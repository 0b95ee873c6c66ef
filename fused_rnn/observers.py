"""Who may look at operators: torch.func transforms, modes, the compiler, tensor subclasses."""

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)  # not their subclasses, which may see every operator


def unwatched() -> bool:
    """Whether no transform, mode or compiler looks at operators."""
    return (
        not torch.compiler.is_compiling()
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def transformed() -> bool:
    """Whether a torch.func transform or a forward-mode derivative is under way."""
    return forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken."""
    return torch.autograd.forward_ad._current_level >= 0
