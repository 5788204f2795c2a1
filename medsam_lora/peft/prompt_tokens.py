"""Learned prompt tokens in place of the box, for use without any prompt.

Two tokens stand where the prompt encoder would put the corners of a box, and start as the corners of a box around the
whole frame; further ones start as SAM's padding point. Whatever boxes or points are given are ignored, so that training
and prediction see the same prompt. Lester et al. 2021 (prompt tuning, arXiv 2104.08691), on SAM's sparse prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import with_decoder
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.sam_modules import PromptEncoder

DEFAULT_TOKENS = 2


class LearnedPrompt(nn.Module):
    """A prompt encoder that has one prompt of its own: mixed into the base's class by `extend`."""

    learned_tokens: nn.Parameter

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sparse embeddings (N, n, D) and dense ones as the base's, for N prompts, or 1 without any."""
        sparse, dense = super().forward(points, boxes, masks)
        return self.learned_tokens.expand(sparse.shape[0], -1, -1), dense


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Replace the prompts by learned tokens. `generator` is drawn from for low-rank branches of the decoder alone.

    Raises
    ------
    AdapterError
        Where the prompt encoder is not SAM's.
    """
    base = model.get_submodule("prompt_encoder")
    if not isinstance(base, PromptEncoder):
        raise AdapterError(f"prompt_encoder is a {type(base).__name__}, not SAM's PromptEncoder")
    tokens = config.tokens or DEFAULT_TOKENS
    adapted = extend(base, LearnedPrompt)
    adapted.register_parameter("learned_tokens", nn.Parameter(_start(base, tokens)))
    return with_decoder(
        model,
        config,
        generator,
        [Edit("prompt_encoder", base, adapted, "decoder")],
        tokens * base.embed_dim,
        cache_point="embedding",
    )


@torch.no_grad()
def _start(encoder: PromptEncoder, tokens: int) -> Tensor:
    neutral: Tensor = encoder.not_a_point_embed.weight
    height, width = encoder.input_image_size
    corners = encoder._embed_boxes(neutral.new_tensor([[0.0, 0.0, width, height]]))[0]
    return torch.cat([corners, neutral.expand(max(tokens - len(corners), 0), -1)])[:tokens].clone()
