"""Several methods on one model at once, written ``sam_parser+lora``: possible where their tensors are disjoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.errors import ConfigError
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.edits import Edit


def combine(model: nn.Module, config: MethodConfig, parts: Sequence[Adaptation]) -> Adaptation:
    """One adaptation of the edits of several.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        Of the whole.
    parts : sequence of Adaptation
        Of this model, detached. Where several train the whole mask decoder, it is trained once.

    Raises
    ------
    ConfigError
        Naming what two of them both change.
    """
    edits: dict[str, tuple[str, Edit]] = {}
    count = 0
    for part in parts:
        count += part.report.count
        for edit in part.edits:
            if edit.path not in edits:
                edits[edit.path] = part.name, edit
                continue
            other, first = edits[edit.path]
            if not _same_training(first, edit):
                raise _overlap(other, part.name, edit.path)
            count -= sum(parameter.numel() for parameter in edit.trainable().values())
    _refuse_nested(list(edits.values()))
    points = [part.report.cache_point for part in parts]
    rules = {name: rule for part in parts for name, rule in part.rules.items()}
    return Adaptation(
        model,
        config,
        [edit for _, edit in edits.values()],
        expected_count=count,
        cache_point=min(points, key=_depth),
        depth=max(part.report.depth for part in parts),
        rules=rules,
    )


def _same_training(one: Edit, other: Edit) -> bool:
    """Whether two edits train the same part of the mask decoder in the same way, from the same values."""
    groups = [{name: edit.group_of(name) for name in edit.trainable()} for edit in (one, other)]
    of_decoder = all(group.partition(".")[0] == "decoder" for group in groups[0].values())
    return of_decoder and groups[0] == groups[1] and isinstance(one.adapted, type(other.adapted))


def _refuse_nested(edits: Sequence[tuple[str, Edit]]) -> None:
    """A parameter trained within a module that another method writes into it when merging is no longer its own."""
    for name, inner in edits:
        if not isinstance(inner.adapted, nn.Parameter):
            continue
        owner, _, _ = inner.path.rpartition(".")
        for other, outer in edits:
            if other != name and outer.path == owner and outer.mergeable and inner.path in outer.merged():
                raise _overlap(other, name, inner.path)


def _overlap(one: str, other: str, path: str) -> ConfigError:
    return ConfigError(
        f"methods {one} and {other} cannot be combined: both change {path}",
        remedy="Combine methods that train different tensors, such as sam_parser+lora.",
    )


def _depth(cache_point: str | None) -> tuple[int, int]:
    """How much of the encoder a cache point saves, for comparing."""
    if cache_point is None:
        return 0, 0
    name, _, index = cache_point.partition(" ")
    return {"block": 1, "trunk": 2, "embedding": 3}[name], int(index or 0)
