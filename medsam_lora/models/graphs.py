"""A segmenter's two halves as modules of tensors alone, as graph exporters want them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from medsam_lora.models.sam import SamModel
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.models.tiny_vit import Attention as WindowAttention
from medsam_lora.models.vit import GridAttention


class EncoderGraph(nn.Module):
    """Pixels of one image, or of one stack of slices, to its embedding.

    Parameters
    ----------
    segmenter : Segmenter
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.encoder = segmenter.sam.image_encoder
        self.depth = segmenter.adaptation.report.depth

    def forward(self, pixels: Tensor) -> Tensor:
        """(depth, 3, h, w) normalised pixels to (1, D, h/P, w/P), of the middle slice of the stack."""
        middle = self.depth // 2
        embedding: Tensor = self.encoder(pixels)
        return embedding[middle : middle + 1]


class DecoderGraph(nn.Module):
    """An embedding and any number of boxes to logits and IoU estimates.

    Parameters
    ----------
    sam : SamModel
    """

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """(1, D, g, g') and (N, 4) XYXY in model pixels to (N, 4, 4 g, 4 g') and (N, 4)."""
        return self.sam.decode(embedding, boxes, [boxes.shape[0]])


@contextmanager
def attention_for_graphs(encoder: nn.Module) -> Iterator[None]:
    """Within this context an encoder computes attention by operations that a graph can hold: the same function.

    The pieces of `attention_chunks` and `attention_windows` are loops with outputs written in place; a fused call is
    one operation.
    """
    grids = [(module, module.how) for module in encoder.modules() if isinstance(module, GridAttention)]
    windows = [module for module in encoder.modules() if isinstance(module, WindowAttention)]
    try:
        for module, _ in grids:
            module.how = "biased"
        for tiny in windows:
            tiny.fused = True
        yield
    finally:
        for module, how in grids:
            module.how = how
        for tiny in windows:
            tiny.fused = False
