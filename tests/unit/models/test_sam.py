from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_sam import ENCODERS, predict, toy_sam

from medsam_lora.errors import ConfigError, WeightsError
from medsam_lora.io.files import sha256_of
from medsam_lora.models import MODELS
from medsam_lora.models.sam import ARCHITECTURES, SamModel, build, fit_positions
from medsam_lora.models.tiny_vit import DROPPED_KEYS, TinyViT
from medsam_lora.models.weights import load_state, locate, sha256_of_state

SIZE = 64  # of vit_nano here: an 8 x 8 grid


@pytest.fixture(scope="module")
def nano() -> SamModel:
    return build("vit_nano", "random", SIZE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def boxes(n: int) -> Tensor:
    low = torch.rand(n, 2, generator=torch.Generator().manual_seed(1)) * 20
    return torch.cat([low, low + 30], dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = SamModel(name, *ARCHITECTURES[name](), MODELS[name].image_size)
    parts = (model.image_encoder, model.prompt_encoder, model.mask_decoder)
    counted = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sum(counted) == sum(p.numel() for p in model.parameters()) == MODELS[name].parameters
    # Counted on segment_anything 1.0; TinyViT-5M without its classifier, with a 1x1 and a 3x3 convolution of neck.
    encoder = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048, "vit_t": 5_743_892}
    if name in encoder:
        assert counted == [encoder[name], 6_220, 4_058_340]


def test_the_table_and_the_constructors_have_the_same_names() -> None:
    assert set(ARCHITECTURES) == set(MODELS)


def test_images_keep_their_own_boxes(nano: SamModel) -> None:
    # Three images with 2, 0 and 1 boxes: row n must be what its own image gives for its own box alone.
    pixels, prompts = noise(3, 3, SIZE, SIZE), boxes(3)
    with torch.no_grad():
        logits, iou = nano(pixels, prompts, [2, 0, 1])
        assert logits.shape == (3, 4, 32, 32)
        for row, image in enumerate([0, 0, 2]):
            alone, own_iou = nano(pixels[image : image + 1], prompts[row : row + 1])
            torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(iou[row], own_iou[0], rtol=1e-4, atol=1e-5)
        assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_no_prompt_is_not_a_box(nano: SamModel) -> None:
    pixels = noise(2, 3, SIZE, SIZE)
    with torch.no_grad():
        free, _ = nano(pixels, None)
        assert free.shape == (2, 4, 32, 32)
        assert torch.equal(free, nano(pixels, None, [1, 1])[0])
        assert (free - nano(pixels, boxes(2))[0]).abs().max() > 1e-3


def test_no_boxes_at_all(nano: SamModel) -> None:
    with torch.no_grad():
        logits, iou = nano(noise(1, 3, SIZE, SIZE), torch.zeros(0, 4), [0])
    assert logits.shape == (0, 4, 32, 32)
    assert iou.shape == (0, 4)


@pytest.mark.parametrize(
    ("prompts", "counts"), [(boxes(3), [1, 1]), (boxes(2), [2]), (boxes(3), None), (None, [2, 0]), (None, [1])]
)
def test_prompts_that_do_not_fit_the_images(nano: SamModel, prompts: Tensor | None, counts: list[int] | None) -> None:
    with pytest.raises(ValueError, match="do not fit 2 images"):
        nano.decode(noise(2, 128, 4, 4), prompts, counts)


def test_pixels_of_another_size(nano: SamModel) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 48\).*\(B, 3, 64, 64\)"):
        nano.encode(noise(1, 3, 64, 48))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_of_the_official_modules(encoder: str) -> None:
    ours, theirs = toy_sam(encoder), toy_sam(encoder)
    model = SamModel("toy", ours.image_encoder, ours.prompt_encoder, ours.mask_decoder, 64)
    pixels, prompts = noise(2, 3, 64, 64), boxes(3)
    weight = noise(3, 4, 16, 16, seed=2)
    (model(pixels, prompts, [1, 2])[0] * weight).sum().backward()
    # One image and one box at a time: the second image comes twice.
    (predict(theirs, pixels[[0, 1, 1]], prompts)[0] * weight).sum().backward()
    expected = dict(theirs.named_parameters())
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in expected.items() if parameter.grad is not None}
    assert {name for name in expected if name.startswith("image_encoder.")} < reached
    # A key's bias moves all scores of a softmax alike: its gradient is 0 but for rounding, hence the second tolerance.
    largest = max(float(expected[name].grad.abs().max()) for name in reached)
    for name in reached:
        grad, official = model.get_parameter(name).grad, expected[name].grad
        torch.testing.assert_close(grad, official, rtol=0, atol=1e-3 * float(official.abs().max()) + 1e-6 * largest)


def test_boxes_are_encoded_in_full_precision_under_autocast(nano: SamModel) -> None:
    embedding = noise(1, 128, 4, 4)
    seen: list[Tensor] = []
    hook = nano.mask_decoder.transformer.register_forward_pre_hook(lambda _, args: seen.extend(args[1:]))
    with torch.no_grad():
        nano.decode(embedding, boxes(1))
        with torch.autocast("cpu", torch.bfloat16):
            nano.decode(embedding, boxes(1))
    hook.remove()
    for plain, autocast in zip(seen[:2], seen[2:], strict=True):  # dense positions, tokens
        assert torch.equal(plain, autocast.float())


def test_random_weights_follow_the_seed_and_leave_the_global_generator(nano: SamModel) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again, other = build("vit_nano", "random", SIZE, seed=0), build("vit_nano", "random", SIZE, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert again.base_sha256 == nano.base_sha256 != other.base_sha256
    assert sha256_of_state(again.state_dict()) == sha256_of_state(nano.state_dict())
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_hash_of_random_weights_is_that_of_the_native_size(nano: SamModel) -> None:
    native = build("vit_nano", "random")
    assert native.image_size == 256
    assert native.base_sha256 == sha256_of_state(native.state_dict()) == nano.base_sha256


def test_positions_at_another_size_by_hand() -> None:
    model = build("vit_nano", "random")
    encoder = model.image_encoder
    with torch.no_grad():
        encoder.pos_embed.zero_()[:, 8, :] = 1
        encoder.blocks[2].attn.rel_pos_h.copy_(torch.arange(63.0).view(63, 1).expand(63, 32))
    windowed = encoder.blocks[0].attn.rel_pos_h.clone()
    fit_positions(model, 512)
    # Cell i of 64 stands at (i + 0.5) / 2 - 0.5 of 32. Keys' cubic kernel with a = -0.75, at distance d from row 8:
    # (a + 2) d^3 - (a + 3) d^2 + 1 up to 1, a (d^3 - 5 d^2 + 8 d - 4) up to 2.
    d = ((torch.arange(64.0) + 0.5) / 2 - 0.5 - 8).abs()
    near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    expected = torch.where(d <= 1, near, torch.where(d < 2, far, 0))
    torch.testing.assert_close(encoder.pos_embed[0, :, 5, 7], expected, rtol=0, atol=1e-5)
    table = encoder.blocks[2].attn.rel_pos_h[:, 3]
    expected = ((torch.arange(127.0) + 0.5) * 63 / 127 - 0.5).clamp(0, 62)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)
    assert torch.equal(encoder.blocks[0].attn.rel_pos_h, windowed)
    assert model.prompt_encoder.image_embedding_size == (64, 64)
    assert model.prompt_encoder.input_image_size == (512, 512)
    assert model.prompt_encoder.mask_input_size == (256, 256)
    assert (model.image_size, encoder.img_size) == (512, 512)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [32, 96, 224])
def test_other_sizes_run(size: int) -> None:
    model = build("vit_nano", "random", size)
    with torch.no_grad():
        logits, _ = model(noise(1, 3, size, size), None)
    assert logits.shape == (1, 4, size // 2, size // 2)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("size", "remedy"), [(100, "Use 96"), (0, "Use 32"), (16, "Use 32"), (8192, "Use 4096")])
def test_sizes_that_are_refused(size: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        build("vit_nano", "random", size)


def test_a_checkpoint_from_a_path(nano: SamModel, tmp_path: Path) -> None:
    path = tmp_path / "nano.pth"
    torch.save(build("vit_nano", "random", seed=5).state_dict(), path)
    loaded = build("vit_nano", str(path), SIZE)
    assert loaded.base_sha256 == sha256_of(path)
    assert sha256_of_state(loaded.state_dict()) == sha256_of_state(
        build("vit_nano", "random", SIZE, seed=5).state_dict()
    )


def test_a_checkpoint_saved_at_another_size(nano: SamModel, tmp_path: Path) -> None:
    path = tmp_path / "nano.pth"
    torch.save(nano.state_dict(), path)
    same, larger = build("vit_nano", str(path), SIZE), build("vit_nano", str(path))
    assert sha256_of_state(same.state_dict()) == sha256_of_state(nano.state_dict())
    assert larger.image_encoder.pos_embed.shape == (1, 32, 32, 192)
    assert larger.image_encoder.blocks[5].attn.rel_pos_w.shape == (63, 32)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pth"
    torch.save({f"image_encoder.{name}": tensor for name, tensor in TinyViT().state_dict().items()}, path)
    with pytest.raises(WeightsError, match=r"tiny\.pth: tensors \d+ missing: image_encoder\.pos_embed, .*unexpected"):
        build("vit_nano", str(path))


def test_weights_that_are_not_there() -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth"):
        build("vit_nano", "nowhere.pth")


def test_an_unknown_model() -> None:
    with pytest.raises(WeightsError, match="Did you mean vit_nano"):
        build("vit_nanno")


@pytest.mark.real_weights
class TestOfficialVitT:
    @pytest.fixture(autouse=True)
    def _weights(self, weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEDSAM_LORA_WEIGHTS_DIR", str(weights_dir))

    def test_every_tensor_but_the_classifier_is_loaded(self) -> None:
        path = locate("vit_t")
        assert path is not None
        official = load_state(path)
        model = build("vit_t")
        state = model.state_dict()
        assert set(official) - set(state) == set(DROPPED_KEYS)
        assert all(torch.equal(state[name], official[name]) for name in state)
        assert model.base_sha256 == MODELS["vit_t"].sha256

    def test_a_checkpoint_without_the_classifier_loads_as_well(self, tmp_path: Path) -> None:
        torch.save(build("vit_t").state_dict(), tmp_path / "merged.pth")
        merged = build("vit_t", str(tmp_path / "merged.pth"), 512)
        assert merged.image_size == 512
        assert sha256_of_state(merged.state_dict()) == sha256_of_state(build("vit_t").state_dict())

    def test_a_square_on_noise_is_outlined(self) -> None:
        # A thing with an edge, a loose box around it: any working SAM finds it; a filled box would score 0.72.
        model = build("vit_t", image_size=512)
        pixels = 0.1 * noise(1, 3, 512, 512) - 1
        pixels[..., 180:320, 200:340] += 2
        target = torch.zeros(128, 128, dtype=torch.bool)
        target[45:80, 50:85] = True
        with torch.no_grad():
            logits, iou = model(pixels, torch.tensor([[185.0, 165.0, 355.0, 335.0]]))
        mask = logits[0, 0] > 0
        assert 2 * (mask & target).sum() / (mask.sum() + target.sum()) > 0.97
        assert iou[0, 0] > 0.8
