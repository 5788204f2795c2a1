"""A run's model as two ONNX graphs: the image encoder, and the mask decoder with any number of boxes.

Whatever a method adds is in the graphs, merged or not. What the graphs compute is compared with the run's own model
before they are kept.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.graphs import DecoderGraph, EncoderGraph, attention_for_graphs
from medsam_lora.models.segmenter import N_TOKENS
from medsam_lora.stages.export_contract import contract, frame_of, threshold_of
from medsam_lora.stages.record import write_json

TOLERANCE: Final = 1e-4
"""Largest difference between onnxruntime and torch, relative to the largest value."""

CHECKED_BOXES: Final = (1, 5)
"""Numbers of boxes that the decoder is checked with."""

NEEDED: Final = ("onnx", "onnxscript", "onnxruntime")
FILES: Final = ("encoder.onnx", "decoder.onnx")

EXTERNAL_FROM: Final = 1.5 * 2**30
"""Bytes of weights from which they get a file of their own: a protobuf message ends at 2 GiB."""


def write_onnx(adapter: Path, folder: Path, weights: str | None = None) -> float:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``export.json`` into a folder, and check them with onnxruntime.

    Parameters
    ----------
    adapter : Path
    folder : Path
    weights : str, optional
        Where the base weights are, if not where they were at training.

    Returns
    -------
    float
        Largest difference from the run's own model, of embedding, logits and IoU, each relative to its largest value.

    Raises
    ------
    ConfigError
        Where a package of the extra is not installed.
    AdapterError
        Where the graphs cannot be made, or compute something else.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx needs {', '.join(missing)}, not installed", remedy="pip install 'medsam-lora[onnx]'"
        )
    segmenter, metadata = load_segmenter(adapter, weights)
    frame = frame_of(segmenter, metadata)
    if frame is None:
        raise AdapterError(
            "it was trained on the unpadded grid of uncropped slices, whose size differs from case to case; a graph "
            "has one size",
            path=adapter,
            remedy="Use --format monai-bundle, or train with a crop other than crop.name=none, or model.grid=padded.",
        )
    h, w = frame
    depth = segmenter.adaptation.report.depth
    pixels = torch.randn(depth, 3, h, w, generator=torch.Generator().manual_seed(0))
    encoder, decoder = EncoderGraph(segmenter).eval(), DecoderGraph(segmenter.sam).eval()
    with torch.no_grad():
        embedding = encoder(pixels)
        with attention_for_graphs(segmenter.sam.image_encoder), _as_one_error(adapter, metadata["method"]):
            write_graph(encoder, (pixels,), folder / FILES[0], ["pixels"], ["embedding"])
            # Three boxes stand for any number: one or none would be taken for constants.
            boxes = some_boxes(h, w, 3)
            names = ["embedding", "boxes"], ["logits", "iou"]
            dynamic = {"embedding": None, "boxes": {0: torch.export.Dim("boxes")}}
            write_graph(decoder, (embedding, boxes), folder / FILES[1], *names, dynamic)
    difference = largest_difference(folder, encoder, decoder, pixels)
    if not difference <= TOLERANCE:
        raise AdapterError(
            f"onnxruntime's result differs by {difference:.1e} of the largest value, more than {TOLERANCE:g}",
            path=adapter,
            remedy="Nothing was written. Use another version of torch or onnxruntime, and report this.",
        )
    about = contract(segmenter, metadata, threshold_of(adapter))
    write_json(
        folder / "export.json",
        {"format": "onnx", **about, **_signature(pixels, embedding), "checked": _checked(difference)},
    )
    return difference


def largest_difference(folder: Path, encoder: nn.Module, decoder: nn.Module, pixels: Tensor) -> float:
    """Between both graphs in onnxruntime and two modules, relative to the largest value of each output.

    Parameters
    ----------
    folder : Path
        With the graphs.
    encoder, decoder : Module
        See `models.graphs`.
    pixels : Tensor of float32, shape (depth, 3, h, w)
        What to compare on.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"]) for name in FILES
    ]
    with torch.no_grad():
        expected = encoder(pixels)
        found = sessions[0].run(None, {"pixels": pixels.numpy()})[0]
        differences = [_difference(found, expected)]
        for n in CHECKED_BOXES:
            boxes = some_boxes(pixels.shape[-2], pixels.shape[-1], n)
            # Each half after its own first half, as they are used.
            results = sessions[1].run(None, {"embedding": found, "boxes": boxes.numpy()})
            differences += [_difference(a, b) for a, b in zip(results, decoder(expected, boxes), strict=True)]
    return max(differences)


def some_boxes(h: int, w: int, n: int) -> Tensor:
    """N different boxes inside a frame of h x w model pixels, XYXY, float32 (n, 4)."""
    drawn = torch.rand(n, 4, generator=torch.Generator().manual_seed(n))
    low = drawn[:, :2] * 0.4
    return torch.cat([low, low + 0.2 + 0.3 * drawn[:, 2:]], dim=1) * torch.tensor([w, h, w, h])


def _difference(found: np.ndarray, expected: Tensor) -> float:
    if found.shape != tuple(expected.shape):
        return float("inf")
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float(np.abs(found - expected.numpy()).max()) / scale


def write_graph(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    dynamic: dict[str, Any] | None = None,
) -> None:
    """Write a module as an ONNX graph.

    Parameters
    ----------
    module : Module
        In evaluation mode, its attention as `models.graphs.attention_for_graphs` has it.
    example : tuple of Tensor
        Arguments; the graph has their sizes.
    path : Path
    inputs, outputs : list of str
        Names.
    dynamic : dict, optional
        Dimensions that may differ, by argument.
    """
    n_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    torch.onnx.export(
        module,
        example,
        str(path),
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dynamic,
        dynamo=True,
        external_data=n_bytes > EXTERNAL_FROM,
        verbose=False,
    )


@contextmanager
def _as_one_error(adapter: Path, method: str) -> Iterator[None]:
    """Whatever the exporter says while it works is kept from the user, unless it fails."""
    said, level = io.StringIO(), logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except torch.onnx.OnnxExporterError as error:
        raise AdapterError(
            f"method {method} cannot be written as an ONNX graph ({str(error).splitlines()[0]})",
            path=adapter,
            remedy="Use --format monai-bundle, and report this with the versions of torch and onnxscript.",
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _signature(pixels: Tensor, embedding: Tensor) -> dict[str, Any]:
    h, w = embedding.shape[-2:]
    return {
        "encoder": {
            "file": FILES[0],
            "inputs": {"pixels": {"dtype": "float32", "shape": list(pixels.shape), "is": "one_image of input"}},
            "outputs": {"embedding": {"dtype": "float32", "shape": list(embedding.shape)}},
        },
        "decoder": {
            "file": FILES[1],
            "inputs": {
                "embedding": {"dtype": "float32", "shape": list(embedding.shape)},
                "boxes": {"dtype": "float32", "shape": ["N", 4], "is": "any number of boxes of this image"},
            },
            "outputs": {
                "logits": {"dtype": "float32", "shape": ["N", N_TOKENS, 4 * h, 4 * w]},
                "iou": {"dtype": "float32", "shape": ["N", N_TOKENS], "is": "the decoder's estimate of each IoU"},
            },
        },
    }


def _checked(difference: float) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", *NEEDED)}
    return {
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "boxes": list(CHECKED_BOXES),
        "versions": versions,
    }
