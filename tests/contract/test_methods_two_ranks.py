"""Two processes with half of the batch each arrive at the gradients of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_sam import ENCODERS, predict, toy_batch, toy_loss, toy_sam

from medsam_lora.config import MethodConfig
from medsam_lora.peft import METHODS, attach

NAMES = [name for name in METHODS if name != "zero_shot"]  # nothing to train, hence nothing to agree about
CASES = [(encoder, name) for encoder in ENCODERS for name in NAMES]
CASES += [("vit", "sd_trans of 3"), ("vit", "sam_parser+lora")]


class Forward(nn.Module):
    """What DistributedDataParallel wraps: a module whose forward is the whole prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return predict(self.model, pixels, boxes)


def adapted(encoder: str, name: str) -> Forward:
    model = toy_sam(encoder)
    name, _, depth = name.partition(" of ")
    adaptation = attach(model, MethodConfig(name=name, rank=2, depth=int(depth or 1)), 0)
    generator = torch.Generator().manual_seed(5)
    # Away from the start, where LoRA's A would have no gradient.
    adaptation.load({k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in adaptation.state().items()})
    return Forward(model.train())


def gradients(module: nn.Module, part: slice) -> dict[str, Tensor]:
    pixels, boxes, masks = toy_batch(2)
    toy_loss(*module(pixels[part], boxes[part]), masks[part]).backward()
    named = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {case: gradients(DistributedDataParallel(adapted(*case)), slice(rank, rank + 1)) for case in CASES}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_agree_with_one(case: tuple[str, str], ranks: list[dict]) -> None:
    module = adapted(*case)
    whole = gradients(module, slice(None))
    assert set(whole) == {name for name, p in module.named_parameters() if p.requires_grad}
    scale = max(grad.abs().max() for grad in whole.values())
    for of_rank in ranks:
        assert set(of_rank[case]) == set(whole)
        for name, grad in whole.items():
            assert torch.allclose(of_rank[case][name], grad, rtol=1e-4, atol=1e-6 * scale), name
    assert all(torch.equal(ranks[0][case][name], ranks[1][case][name]) for name in whole)
    # One half alone gives other gradients, so that agreement means something.
    half = gradients(adapted(*case), slice(0, 1))
    assert any(not torch.allclose(half[name], grad, rtol=1e-2) for name, grad in whole.items())
