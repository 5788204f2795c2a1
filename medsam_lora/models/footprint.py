"""What a step costs, counted rather than timed: operations, and bytes that autograd keeps for the backward pass.

Both follow from shapes alone. So they can be counted on torch's fake tensors, which have shapes but no values: a step
of ViT-B is then a matter of seconds and of no memory, whatever the machine (`dry`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from medsam_lora.config import MethodConfig
from medsam_lora.models.attention import planned_for_cuda
from medsam_lora.models.attention_chunks import pieces_of
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import PATCH, SamModel, blank
from medsam_lora.peft import attach

MIB: Final = 2**20
_FAKE_PIECE: Final = 8 * MIB
_FAKE_PIECES: Final = 3
"""Of the scores of a head of all images, however many they are: what takes the time are the pieces' calls."""


@dataclass(frozen=True)
class Footprint:
    """Cost of one training step.

    Parameters
    ----------
    saved_bytes : int
        Of the tensors kept for the backward pass, parameters not among them, each storage counted once.
    forward_flops, backward_flops : int
        Two for each multiplication and addition of matrix products, convolutions and fused attention.
    peak_bytes : int
        The most that tensors made during the step take up at any time; parameters are not among them.
    trainable, parameters : int
        Numbers of parameters.
    """

    saved_bytes: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int
    trainable: int
    parameters: int


class SavedBytes:
    """Context that counts the bytes which autograd keeps of what is computed within it.

    Parameters
    ----------
    model : Module
        Its parameters and buffers are there anyway and are not counted.

    Examples
    --------
    >>> layer = nn.Linear(10, 20)
    >>> with SavedBytes(layer) as saved:
    ...     out = layer(torch.ones(3, 10)).exp()
    >>> saved.total == 4 * (3 * 10 + 3 * 20)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._sizes.values())

    def _note(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._own:
            self._sizes[key] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


def count(model: nn.Module, forward: Callable[[], Tensor]) -> Footprint:
    """Cost of a forward pass to a scalar and of its backward pass, which both run.

    Parameters
    ----------
    model : Module
    forward : callable
        Gives the loss.
    """
    live = _LiveBytes()
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with live, counter, SavedBytes(model) as saved:
        loss = forward()
    before = counter.get_total_flops()
    kept = saved.total
    counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
    with live, counter:
        if loss.requires_grad:  # nothing is trained zero-shot
            loss.backward()
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Footprint(kept, live.peak, before, counter.get_total_flops(), trainable, sum(p.numel() for p in parameters))


@dataclass(frozen=True)
class StepOptions:
    """A training step to be counted.

    Parameters
    ----------
    model : str
        A key of `MODELS`.
    method : MethodConfig
    frame : tuple of int, (h, w)
        What is encoded, in model pixels.
    images : int
        Slices times modalities; a method that looks at stacks encodes so many stacks.
    image_size : int, optional
        Side of the model frame; the model's own by default.
    amp : str
        ``none``, ``bf16`` or ``fp16``.
    attention : str
        ``auto`` or a key of `attention_choice.ATTENTIONS`.
    checkpointing : bool
    device : str
        ``cpu`` or ``cuda``: what ``auto`` stands for. Operations of fused kernels are not counted for ``cuda``.
    """

    model: str
    method: MethodConfig
    frame: tuple[int, int]
    images: int = 1
    image_size: int | None = None
    amp: str = "none"
    attention: str = "auto"
    checkpointing: bool = False
    device: str = "cpu"


def dry(options: StepOptions) -> Footprint:
    """Count a step on fake tensors.

    Parameters
    ----------
    options : StepOptions

    Notes
    -----
    Every image has one box. The loss is the sum of all outputs: what the real one keeps on top, a few maps of the size
    of the output, is not in it.
    """
    where = planned_for_cuda() if options.device == "cuda" else nullcontext()
    tokens = options.frame[0] * options.frame[1] // PATCH**2
    with fake_tensors(4 * options.images * tokens**2 // _FAKE_PIECES), where:
        model = blank(options.model, options.image_size, grid="unpadded", attention=options.attention)
        depth = attach(model, options.method, 0).report.depth
        model.image_encoder.checkpointing = options.checkpointing  # type: ignore[assignment]
        pixels = torch.empty(options.images * depth, 3, *options.frame)
        boxes = torch.empty(options.images, 4)
        return count(model, lambda: total(model, pixels, boxes, options.amp, depth))


def total(model: SamModel, pixels: Tensor, boxes: Tensor, amp: str = "none", depth: int = 1) -> Tensor:
    """A scalar of all outputs of a model, under autocast; the stand-in for a loss where only cost matters.

    Parameters
    ----------
    model : SamModel
    pixels, boxes : Tensor
        See `SamModel.forward`.
    amp : str
        See `models.precision.autocast`.
    depth : int
        Slices of a stack, the middle one of which has the box (`Report.depth`); `pixels` are so many for each box.
    """
    with autocast(pixels.device, amp):
        embedding = model.encode(pixels)
        if depth > 1:
            embedding = embedding.unflatten(0, (-1, depth))[:, depth // 2]
        logits, iou = model.decode(embedding, boxes)
    return logits.float().mean() + iou.float().mean()


@contextmanager
def fake_tensors(piece_bytes: int = 0) -> Iterator[None]:
    """Tensors made within have a shape, a type and a device, and no values; attention's pieces at least this size."""
    # Large pieces cost and keep what many small ones do, in fewer calls; the peak comes out some pieces too high.
    with FakeTensorMode(allow_non_fake_inputs=True), pieces_of(max(_FAKE_PIECE, piece_bytes)):
        yield


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations within it made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known[storage] = None
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return found

    def _add(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def _storage(tensor: Tensor) -> int:
    # The address of the storage object, as fake tensors have no data; autograd keeps it alive while it is counted.
    return tensor.untyped_storage()._cdata


def _products(shape: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # The scores once more, the gradients of probabilities and values, and those of queries and keys.
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# torch's table knows baddbmm and the fused attention of GPUs, not the form that adds in place nor that of CPUs.
_ALSO_COUNTED: Final = {
    torch.ops.aten.baddbmm_: _products,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
