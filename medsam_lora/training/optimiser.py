"""The optimiser over exactly the declared parameters, and the course of its learning rate."""

from __future__ import annotations

import math

import torch

from medsam_lora.config import TrainConfig
from medsam_lora.errors import TrainingError
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft.contract import GroupRule


def build_optimiser(segmenter: Segmenter, options: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over exactly the declared parameters, one group per part and decay.

    Biases, norms and other vectors get no weight decay: shrinking them has no regularising sense. A method may have
    groups with rules of their own, ``encoder.B`` beside ``encoder`` (`peft.contract.GroupRule`).
    """
    groups = []
    for name, parameters in segmenter.trainable_groups().items():
        rule = segmenter.adaptation.rules.get(name, GroupRule())
        of_encoder = name.partition(".")[0] == "encoder"
        rate = options.lr_encoder if of_encoder and options.lr_encoder is not None else options.lr
        rate = rate * rule.lr_factor if rule.lr is None else rule.lr
        decay_of_matrices = options.weight_decay if rule.weight_decay else 0.0
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        for suffix, members, decay in (("", matrices, decay_of_matrices), ("/vectors", vectors, 0.0)):
            if members:
                groups.append(
                    {"name": name + suffix, "params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
                )
    if not groups:
        raise TrainingError("the method has nothing to train", remedy="Use method.name=lora or another one.")
    kind = torch.optim.AdamW if options.optimiser == "adamw" else torch.optim.Adam
    # Adapters and a decoder are many small tensors: fused, all of a group are updated in one call.
    return kind(groups, fused=True)


def schedule_factor(step: int, total: int, options: TrainConfig) -> float:
    """Learning-rate factor of an update: linear warm-up to 1, then constant or a half cosine to 0.

    Examples
    --------
    >>> options = TrainConfig(warmup_share=0.2)
    >>> [round(schedule_factor(s, 10, options), 3) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = round(options.warmup_share * total)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
