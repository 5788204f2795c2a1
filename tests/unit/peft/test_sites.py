from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from toy_sam import ENCODERS, toy_batch, toy_sam

from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.sites import (
    attention_sites,
    chosen_sites,
    mlp_sites,
    rows_as_thirds,
    rows_per_head,
    select_blocks,
)


def test_importing_the_records_and_the_table_needs_no_torch() -> None:
    code = "import sys, medsam_lora.peft, medsam_lora.peft.sites; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sites_of_the_toy_vit() -> None:
    first, second = attention_sites(toy_sam("vit").image_encoder)
    assert (first.block, first.qkv, first.proj) == (0, "blocks.0.attn.qkv", "blocks.0.attn.proj")
    assert (first.dim_in, first.heads) == (32, 2)
    assert (first.q, first.k, first.v) == ((range(32),), (range(32, 64),), (range(64, 96),))
    assert (first.global_attention, second.global_attention) == (False, True)
    assert [site.fc2 for site in mlp_sites(toy_sam("vit").image_encoder)] == ["blocks.0.mlp.lin2", "blocks.1.mlp.lin2"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_site_names_a_linear_and_each_row_once(encoder: str) -> None:
    image_encoder = toy_sam(encoder).image_encoder
    attention, mlps = attention_sites(image_encoder), mlp_sites(image_encoder)
    assert [site.block for site in attention] == [site.block for site in mlps] == list(range(len(attention)))
    assert len(attention) == (2 if encoder == "vit" else 10)
    for site in attention:
        qkv, proj = image_encoder.get_submodule(site.qkv), image_encoder.get_submodule(site.proj)
        assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
        rows = site.rows("q") + site.rows("k") + site.rows("v")
        assert sorted(rows) == list(range(qkv.out_features))
        assert qkv.in_features == site.dim_in
        assert proj.in_features == len(site.rows("v"))
    for mlp in mlps:
        fc1, fc2 = image_encoder.get_submodule(mlp.fc1), image_encoder.get_submodule(mlp.fc2)
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        assert (fc1.out_features, fc1.in_features) == (fc2.in_features, fc2.out_features)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_rows_mean_what_they_are_called(encoder: str) -> None:
    """The attention itself tells q, k and v apart, whatever their layout.

    Adding a constant to every key shifts all scores of a query alike, which the softmax ignores; adding a constant c
    to every value adds c to every result, so proj(c) to the output; adding one to every query does neither.
    """
    image_encoder = toy_sam(encoder).image_encoder
    # float64, so that "the same" can be told from "nearly".
    image_encoder, pixels = image_encoder.double(), toy_batch(1)[0].double()
    seen: dict[str, torch.Tensor] = {}
    for site in attention_sites(image_encoder):
        qkv, proj = image_encoder.get_submodule(site.qkv), image_encoder.get_submodule(site.proj)
        handle = proj.register_forward_hook(lambda module, args, out: seen.update(out=out))
        constant = torch.randn(site.dim_in, generator=torch.Generator().manual_seed(site.block)).double()
        image_encoder(pixels)
        base, shift = seen["out"], proj.weight @ constant
        for projection in ("q", "k", "v"):
            rows = site.rows(projection)
            qkv.bias[rows] += constant
            image_encoder(pixels)
            change = seen["out"] - base
            qkv.bias[rows] -= constant
            assert torch.allclose(change, torch.zeros_like(change), atol=1e-9) is (projection == "k")
            assert torch.allclose(change, shift.expand_as(change), atol=1e-9) is (projection == "v")
        handle.remove()


def test_rows_helpers_with_values_wider_than_keys() -> None:
    q, k, v = rows_per_head(2, 1, 2)
    assert (q, k, v) == ((range(0, 1), range(4, 5)), (range(1, 2), range(5, 6)), (range(2, 4), range(6, 8)))
    assert rows_per_head(1, 6) == rows_as_thirds(6)


def test_an_encoder_that_describes_nothing_is_refused() -> None:
    for function in (attention_sites, mlp_sites):
        with pytest.raises(AdapterError, match="Linear does not say where a method may attach"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("blocks", "expected"), [(None, [0, 1, 2]), ([2, 0], [0, 2]), ([-1], [2]), ([-3, 1], [0, 1]), ([0], [0])]
)
def test_select_blocks(blocks: list[int] | None, expected: list[int]) -> None:
    assert select_blocks(blocks, 3) == expected


@pytest.mark.parametrize(
    ("blocks", "words"), [([3], r"\[3\]"), ([0, -4], r"\[-4\]"), ([], "at least one"), ([1, -2], "named once")]
)
def test_blocks_that_do_not_exist_are_refused(blocks: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        select_blocks(blocks, 3)


def test_more_last_blocks_than_there_are_are_refused_as_they_were_asked_for() -> None:
    encoder = toy_sam("tiny_vit").image_encoder
    assert len(chosen_sites(encoder, "last 10")) == 10
    with pytest.raises(ConfigError, match="is last 99, but the encoder has 10 attention blocks") as error:
        chosen_sites(encoder, "last 99")
    assert "-99" not in str(error.value) and "last 10" in str(error.value)
