"""Whether onnxruntime, in float32 or int8, is a faster image encoder on the CPU than torch.

    OMP_NUM_THREADS=1 python benchmarks/onnx_cpu.py [--model vit_t] [--weights official] [--image-size 1024] \
        [--rounds 3] [--csv FILE]

One image. The graph is the one that `export --format onnx` writes. Variants, alternating round by round in one process
on one thread, the first round dropped, wall-clock medians:

- torch: as prediction runs it, in float32 and (`bf16`) under autocast;
- onnxruntime: the exported graph in float32;
- int8, products: weights of matrix products in int8, activations quantised as they come (`quantize_dynamic`);
- int8, all: products and convolutions in int8 with ranges from eight drawn pictures (`quantize_static`, QDQ).

Beside the time stands how far the embedding is from torch's in float32: the norm of the difference over its norm, on
pictures of shapes that the ranges were not taken from. Needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.datasets.shapes import make_sample
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.graphs import EncoderGraph, attention_for_graphs
from medsam_lora.models.precision import autocast
from medsam_lora.stages.export_onnx import write_graph
from medsam_lora.training.scene_batch import normalised

COLUMNS = ("model", "image_size", "variant", "seconds", "torch_fp32_over_this", "relative_error")
CALIBRATION = 8


def picture(seed: int, size: int) -> np.ndarray:
    """Drawn shapes, normalised as SAM's images are, shape (1, 3, size, size)."""
    image = make_sample(np.random.default_rng([99, seed]), size).image
    return normalised(torch.from_numpy(image)[None, :1]).numpy()


def graphs(encoder: EncoderGraph, size: int, folder: Path) -> dict[str, Path]:
    """The encoder as ONNX, by variant."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"pixels": picture(n, size)} for n in range(CALIBRATION)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    plain, shaped = folder / "fp32.onnx", folder / "shaped.onnx"
    with torch.no_grad(), attention_for_graphs(encoder.encoder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_graph(encoder, (torch.from_numpy(picture(0, size)),), plain, ["pixels"], ["embedding"])
    quant_pre_process(str(plain), str(shaped), skip_symbolic_shape=True)
    products, everything = folder / "products.onnx", folder / "all.onnx"
    quantize_dynamic(str(shaped), str(products), op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    quantize_static(str(shaped), str(everything), Pictures(), per_channel=True)
    return {"onnxruntime fp32": plain, "int8, products": products, "int8, all": everything}


def session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder of a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: loaded.run(None, {"pixels": pixels})[0]


def in_torch(encoder: EncoderGraph, amp: str) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder as prediction runs it."""

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad(), autocast(torch.device("cpu"), amp):
            found: Tensor = encoder(torch.from_numpy(pixels))
        return found.float().numpy()

    return run


def main() -> None:
    """Measure, print a Markdown table, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    model = ModelConfig.model_validate(
        {"name": options.model, "weights": options.weights, "image_size": options.image_size}
    )
    segmenter = build_segmenter(
        model, MethodConfig(name="zero_shot"), FusionConfig(), ["t1c"], ["WT"], 0, torch.device("cpu")
    ).eval()
    encoder = EncoderGraph(segmenter).eval()
    ways = {"torch fp32": in_torch(encoder, "none"), "torch bf16": in_torch(encoder, "bf16")}
    with tempfile.TemporaryDirectory() as folder:
        ways |= {
            name: session(path, threads) for name, path in graphs(encoder, options.image_size, Path(folder)).items()
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        apart: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(options.rounds + 1):
            pixels = picture(1000 + round_, options.image_size)
            expected = ways["torch fp32"](pixels)
            for name, way in ways.items():
                started = time.perf_counter()
                found = way(pixels)
                taken[name].append(time.perf_counter() - started)
                apart[name].append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    rows = []
    print("| variant | s | torch fp32 / this | relative error |\n|---|---:|---:|---:|")
    for name in ways:
        ratio = median(a / b for a, b in zip(taken["torch fp32"][1:], taken[name][1:], strict=True))
        row = (round(median(taken[name][1:]), 3), round(ratio, 2), float(f"{median(apart[name][1:]):.1e}"))
        print(f"| {name} | " + " | ".join(map(str, row)) + " |", flush=True)
        rows.append((options.model, options.image_size, name, *row))
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
