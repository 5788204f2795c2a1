"""Encoder blocks through torch.compile, where gradients are recorded.

Blocks and not the whole encoder: alike blocks share their code, so that compiling takes seconds to a minute, and
cache points, checkpointing and frozen prefixes run the blocks one by one as ever. Validation and prediction stay as
they are, or the check that an adapter read back from disk gives the very same Dice would see another rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from medsam_lora.models import attention_chunks, attention_windows

# Blocks of one model differ in width, window and what is trained; torch gives up at 8 kinds unless told otherwise.
_MOST_KINDS = 64

Call = Callable[[nn.Module, Tensor], Tensor]

# Of the process: compiled graphs cannot read a context variable.
_compiled: Call | None = None


def call_of_blocks() -> Call:
    """How a block is called now: compiled within `compiled_blocks` where gradients are recorded, else as it is."""
    return _plain if _compiled is None or not torch.is_grad_enabled() else _compiled


def _plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@contextmanager
def compiled_blocks(wanted: bool = True) -> Iterator[None]:
    """Within this context encoder blocks are compiled, where `wanted`; results are the same but for rounding.

    Parameters
    ----------
    wanted : bool

    Notes
    -----
    The first call of each kind of block compiles. On a CPU that needs a C++ compiler, on CUDA Triton;
    `is_compile_failure` recognises what torch raises where there is none.
    """
    global _compiled
    if not wanted:
        yield
        return
    import torch._dynamo  # takes a second, which those who do not compile need not wait

    before = _compiled
    in_pieces = attention_chunks.run_pieces, attention_windows.run_pieces
    # Hundreds of pieces would be unrolled into graphs that take many minutes to compile.
    attention_chunks.run_pieces, attention_windows.run_pieces = (torch.compiler.disable(run) for run in in_pieces)
    _compiled = torch.compile(_plain, dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=_MOST_KINDS):
            yield
    finally:
        _compiled = before
        attention_chunks.run_pieces, attention_windows.run_pieces = in_pieces


def is_compile_failure(error: BaseException) -> bool:
    """Whether an exception says that a block could not be compiled.

    Examples
    --------
    >>> is_compile_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    # By module names: torch._inductor is not imported before something is compiled.
    return any(t.__module__.startswith(("torch._inductor", "torch._dynamo")) for t in type(error).__mro__)
