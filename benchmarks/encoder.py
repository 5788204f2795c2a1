"""The image encoder alone, forward: ours and the official way, in one process, interleaved.

    python benchmarks/encoder.py [--model vit_b] [--images 1] [--rounds 3] [--amp none] [--out FILE] [--figure FILE]

Random weights; one image of 700 x 1024 px. *official* is segment_anything's own code on 1024 x 1024; *exact* is ours on
the same input, with the largest difference between both outputs; *unpadded* is ours on 704 x 1024, another function.
CPU: CPU seconds; CUDA, taken where there is one: wall clock between synchronisations, and on it *biased* too. Printed
are seconds, medians of per-round ratios, peak memory (CPU: resident, of fresh processes that run the variant once and
again, imports and weights included; CUDA: allocated), and the share of the rate that a matrix product reaches in the
same process. Operations are counted; of fused CUDA kernels they are those of the same forward pass in pieces.
"""

from __future__ import annotations

import argparse
import copy
import csv
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.footprint import MIB, count, fake_tensors
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import ARCHITECTURES, build
from medsam_lora.models.vit import GridAttention, GridEncoder
from medsam_lora.training.guards import peak_memory_mib, reset_peak_memory

sys.path.insert(0, str(Path(__file__).parent))
from train_step import ceiling

COLUMNS = ("round", "variant", "seconds", "tflop", "gemm_gflop_per_s", "peak_mib")


def variants(options: argparse.Namespace, device: torch.device) -> dict[str, tuple[Any, Tensor]]:
    """Encoders and what each is given, by name."""
    official = build(options.model, "random", options.image_size, attention="reference").image_encoder.to(device)
    size = int(official.img_size)  # type: ignore[arg-type]
    exact = GridEncoder(copy.deepcopy(official))  # type: ignore[arg-type]
    pixels = torch.randn(options.images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    pixels[:, :, size * 700 // 1024 :] = 0
    rows = -(-size * 700 // 1024 // 16) * 16
    found: dict[str, tuple[Any, Tensor]] = {
        "official": (official, pixels),
        "exact": (exact, pixels),
        "unpadded": (exact, pixels[:, :, :rows]),
    }
    if device.type == "cuda":
        found["biased"] = (GridEncoder(copy.deepcopy(official), "biased"), pixels)  # type: ignore[arg-type]
    return found


def run(encoder: Any, image: Tensor, amp: str) -> Tensor:
    """The embedding, without gradients."""
    with torch.inference_mode(), autocast(image.device, amp):
        found: Tensor = encoder(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return found


def tflop(encoder: Any, image: Tensor) -> float:
    """Counted operations of a forward pass, in 10^12, on tensors without values and with attention in pieces."""
    own = [(module, module.how) for module in encoder.modules() if isinstance(module, GridAttention)]
    for module, _ in own:
        module.how = "chunked"
    with fake_tensors():
        pixels = torch.empty(image.shape, device=image.device)
        found = count(encoder, lambda: encoder(pixels).sum()).forward_flops / 1e12
    for module, how in own:
        module.how = how
    return found


def peak_mib(name: str, options: argparse.Namespace, device: torch.device, work: tuple[Any, Tensor]) -> float:
    """Peak of allocated memory on CUDA; on the CPU of resident memory, in a process of its own."""
    if device.type == "cuda":
        encoder, image = work
        # All encoders and their outputs are on the card: of its own are its weights, its image and what the pass adds.
        own = image.nbytes + sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*work, options.amp)
        return (own + torch.cuda.max_memory_allocated() - before) / MIB
    done = subprocess.run([sys.executable, *sys.argv, "--child", name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run the rounds, write the CSV and the figure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b", choices=[n for n in ARCHITECTURES if n != "vit_t"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"])
    parser.add_argument("--out", type=Path, default=Path("encoder.csv"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = variants(options, device)
    if options.child:
        # Of this process alone: the peak that getrusage knows is handed down by the one that started it.
        reset_peak_memory(device)
        for _ in range(2):
            run(*work[options.child], options.amp)
        print(peak_memory_mib(device))
        return
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in work}
    outputs: dict[str, Tensor] = {}
    for r in range(options.rounds + 1):  # the first is not counted
        for name, (encoder, image) in work.items():
            started = clock()
            outputs[name] = run(encoder, image, options.amp)
            if r:
                times[name].append(clock() - started)
    rate = ceiling(device, torch.float32 if options.amp == "none" else torch.bfloat16)
    counted = {name: tflop(*own) for name, own in work.items()}
    peaks = {name: peak_mib(name, options, device, own) for name, own in work.items()}
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, own in times.items():
            writer.writerows((r, name, s, counted[name], rate, peaks[name]) for r, s in enumerate(own, start=1))
    title = f"{options.model}, {options.images} image(s), {options.amp}, {device.type}; GEMM {rate:.0f} GFLOP/s"
    print(title)
    print("| variant | s | official / this | peak MiB | TFLOP | of the GEMM rate | difference, of the largest value |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, own in times.items():
        ratio = median(a / b for a, b in zip(times["official"], own, strict=True))
        same = outputs[name].shape == outputs["official"].shape
        error = (outputs[name] - outputs["official"]).abs().max() / outputs["official"].abs().max() if same else None
        share = 1000 * counted[name] / median(own) / rate
        cells = [f"{median(own):.3g}", f"{ratio:.2f}", f"{peaks[name]:.0f}", f"{counted[name]:.2f}", f"{share:.2f}"]
        print(f"| {name} | " + " | ".join([*cells, "" if error is None else f"{float(error):.1e}"]) + " |")
    if options.figure:
        draw(options.figure, times, peaks, title)


def draw(path: Path, times: dict[str, list[float]], peaks: dict[str, float], title: str) -> None:
    """Bars of seconds and of peak memory, one for each variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.9 + 0.45 * len(times)), sharey=True, layout="constrained")
    axes[0].barh(list(times), [median(own) for own in times.values()], color="tab:blue")
    axes[0].set_xlabel("s")
    axes[1].barh(list(peaks), list(peaks.values()), color="tab:blue")
    axes[1].set_xlabel("peak memory, MiB")
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
