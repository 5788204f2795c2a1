"""SAM at toy size, from the real segment_anything classes, and one differentiable forward with all four mask tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.models.tiny_vit import TinyViT
from medsam_lora.peft.contract import attached_to
from medsam_lora.sam_modules import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

IMAGE_SIZE = 64
PROMPT_DIM = 32
ENCODERS = ("vit", "tiny_vit")


def toy_sam(encoder: str, seed: int = 0) -> Sam:
    """A random SAM for 64 px images whose tensors are all non-zero, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = IMAGE_SIZE // 16
        model = Sam(
            image_encoder=_vit() if encoder == "vit" else TinyViT(IMAGE_SIZE, PROMPT_DIM),
            prompt_encoder=PromptEncoder(PROMPT_DIM, (grid, grid), (IMAGE_SIZE, IMAGE_SIZE), 8),
            mask_decoder=MaskDecoder(
                transformer_dim=PROMPT_DIM,
                transformer=TwoWayTransformer(2, PROMPT_DIM, 2, 64),
                iou_head_hidden_dim=PROMPT_DIM,
            ),
        )
        # The classes start positions, biases and norms at 0 or 1, where a wrong tensor would go unnoticed.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def _vit() -> ImageEncoderViT:
    return ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=PROMPT_DIM,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )


def toy_batch(n_images: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, 3, 64, 64), boxes (B, 4) in model pixels, target masks (B, 4, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    corners = torch.rand(n_images, 4, generator=generator) * 24
    boxes = corners + torch.tensor([0.0, 0.0, 32.0, 32.0])
    masks = (torch.rand(n_images, 4, IMAGE_SIZE // 4, IMAGE_SIZE // 4, generator=generator) < 0.3).float()
    return pixels, boxes, masks


def predict(model: nn.Module, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 4, 16, 16) and IoU estimates (B, 4) of one box per image, by the official modules.

    A method that looks at neighbouring slices is given some: mirror images, which depend on no other image of a batch.
    """
    adaptation = attached_to(model)
    depth = adaptation.report.depth if adaptation is not None and adaptation.enabled else 1
    stacks = [pixels if n == depth // 2 else pixels.flip(2 + n % 2) * (n + 1) / depth for n in range(depth)]
    embeddings = model.image_encoder(torch.stack(stacks, dim=1).flatten(0, 1))[depth // 2 :: depth]
    logits, iou = [], []
    for embedding, box in zip(embeddings, boxes, strict=True):
        sparse, dense = model.prompt_encoder(points=None, boxes=box[None], masks=None)
        position = model.prompt_encoder.get_dense_pe()
        one, quality = model.mask_decoder.predict_masks(embedding[None], position, sparse, dense)
        logits.append(one)
        iou.append(quality)
    return torch.cat(logits), torch.cat(iou)


def toy_loss(logits: Tensor, iou: Tensor, masks: Tensor) -> Tensor:
    """A loss that supervises every mask token and the IoU head; a mean over images."""
    return functional.binary_cross_entropy_with_logits(logits, masks) + (iou - masks.mean(dim=(2, 3))).square().mean()


def train_steps(model: nn.Module, parameters: list[nn.Parameter], steps: int = 2, lr: float = 5e-3) -> None:
    """A few AdamW steps on the toy batch, from train mode back to evaluation mode."""
    optimiser = torch.optim.AdamW(parameters, lr=lr)
    pixels, boxes, masks = toy_batch()
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        toy_loss(*predict(model, pixels, boxes), masks).backward()
        optimiser.step()
    model.eval()
