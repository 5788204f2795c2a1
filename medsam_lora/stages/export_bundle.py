"""A run as a MONAI bundle: a folder with weights, configuration and description, for ``python -m monai.bundle``.

The bundle needs this package installed, for the method's own modules and for reading cases, but no base weights.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Final

import torch

import medsam_lora
from medsam_lora import __version__
from medsam_lora.config import PredictConfig
from medsam_lora.errors import AdapterError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.models import MODELS
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import method_spec
from medsam_lora.stages.bundle import DESCRIPTION, WEIGHTS, BundleNetwork, loaded, whole
from medsam_lora.stages.export_contract import contract, predict_settings_of
from medsam_lora.stages.record import write_json
from medsam_lora.transforms.cropping import crop_size
from medsam_lora.transforms.stages import PreparePlan

SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
"""The schema that bundles of the MONAI model zoo name."""

REQUIRED_PACKAGES: Final = ("nibabel", "segment-anything", "loralib", "scipy")

LICENCE_NOTICE: Final = """The configuration and code of this bundle: Apache License 2.0, below.
The weights: derived from the base model {model}, whose licence goes with them (the official SAM and MobileSAM weights
are under the Apache License 2.0), and from the data that they were trained on, whose terms are not changed by this.

"""

BOXES: Final = """`--boxes B.csv` (columns case_id,k,i0,j0,i1,j1, voxel edges of the files' own axes) gives
prompts; without it they are taken from the reference."""

NO_BOXES: Final = """The method has a prompt of its own: with `--settings#prompts none`
every slice that shows brain is predicted, and no reference is needed; with `--settings#prompts boxes` those with a box,
of `--boxes B.csv` (columns case_id,k,i0,j0,i1,j1) or of the reference. `{prompts}` holds where nothing is said."""


def write_bundle(adapter: Path, folder: Path, weights: str | None = None) -> float:
    """Fill a folder with a bundle, rebuild the network from it, and compare the two.

    Parameters
    ----------
    adapter : Path
    folder : Path
    weights : str, optional
        Where the base weights are, if not where they were at training.

    Returns
    -------
    float
        Largest difference of the logits of random slices: 0.

    Raises
    ------
    AdapterError
        Where the rebuilt network computes something else.
    """
    segmenter, metadata = load_segmenter(adapter, weights)
    # Where the base weights lay on this machine is no business of whoever receives the bundle, which holds them.
    model = {**metadata["model"], "weights": "random"}
    write_json(folder / DESCRIPTION, {**metadata, "model": model})
    buffer = io.BytesIO()
    state = {f"segmenter.{name}": tensor for name, tensor in whole(segmenter).state_dict().items()}
    torch.save(state, buffer)
    write_bytes_atomically(folder / WEIGHTS, buffer.getvalue())
    settings = predict_settings_of(adapter)
    if method_spec(metadata["method"]).prompted:
        # A run that was only trained may say otherwise; a bundle that refuses as it is would be of no use.
        settings = settings.model_copy(update={"prompts": "boxes"})
    about = contract(segmenter, metadata, settings.threshold)
    plane = crop_size(PreparePlan.from_json(metadata["plan"]).crop)
    write_json(folder / "configs" / "metadata.json", _metadata(segmenter, metadata, plane))
    write_json(folder / "configs" / "inference.json", _inference(settings))
    write_json(folder / "docs" / "export.json", {"format": "monai-bundle", **about})
    write_bytes_atomically(folder / "docs" / "README.md", _readme(metadata, about, settings).encode())
    licence = LICENCE_NOTICE.format(model=metadata["model_name"]) + _licence()
    write_bytes_atomically(folder / "LICENSE", licence.encode())
    return _checked(folder, segmenter, plane, adapter)


@torch.no_grad()
def _checked(folder: Path, segmenter: Segmenter, plane: tuple[int, int] | None, adapter: Path) -> float:
    """The largest difference, which must be none: the same operations on the same weights."""
    network = loaded(BundleNetwork(folder / DESCRIPTION), folder / WEIGHTS)
    depth = segmenter.adaptation.report.depth
    x, y = plane or (segmenter.sam.image_size,) * 2
    channels = depth * len(segmenter.modalities)
    image = torch.randn(1, channels, x, y, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[x / 4, y / 4, x / 2, y / 2]]])
    z = image if depth == 1 else image.unflatten(1, (depth, -1))
    expected = segmenter(z, list(boxes.numpy())).logits
    difference = float((network(image, boxes) - expected).abs().max())
    if difference != 0:
        raise AdapterError(
            f"the network rebuilt from the bundle differs by {difference:.1e}",
            path=adapter,
            remedy="Nothing was written. Report this.",
        )
    return difference


def _metadata(segmenter: Segmenter, metadata: Mapping[str, Any], plane: tuple[int, int] | None) -> dict[str, Any]:
    modalities, regions = segmenter.modalities, segmenter.regions
    shape: list[int | str] = list(plane) if plane else ["*", "*"]
    depth = segmenter.adaptation.report.depth
    names = [name if depth == 1 else f"{name}, slice {n + 1} of {depth}" for n in range(depth) for name in modalities]
    notice, spec = MODELS[metadata["model_name"]].notice, method_spec(metadata["method"])
    prompted = "prompted by boxes on transverse slices" if spec.prompted else "on transverse slices, without prompts"
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by medsam-lora {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"medsam-lora": __version__, **{p: version(p) for p in REQUIRED_PACKAGES}},
        "name": f"{metadata['model_name']} with {metadata['method']}",
        "task": f"Segmentation of {', '.join(regions)} of brain tumours in MRI, {prompted}",
        "description": f"{MODELS[metadata['model_name']].summary}; {spec.summary}. "
        f"For research only, not for patients.{'' if notice is None else f' {notice}.'}",
        "authors": "The author of the run",
        "copyright": "See LICENSE",
        "data_type": "nibabel",
        "image_classes": f"z-scored voxels of {', '.join(modalities)}, co-registered and skull-stripped as BraTS's",
        "pred_classes": f"{', '.join(regions)}, each within the one before it",
        "intended_use": "Research only. Not a medical device.",
        "references": [spec.source],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": len(names),
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(n): name for n, name in enumerate(names)},
                },
                "boxes": {
                    "type": "tuple",
                    "format": "i0, j0, i1, j1 on voxel edges of the cropped slice; optional",
                    "num_channels": 4,
                    "spatial_shape": ["n"],
                    "dtype": "float32",
                    "value_range": [],
                },
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(regions),
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(n): f"logit of {name}" for n, name in enumerate(regions)},
                }
            },
        },
    }


def _inference(settings: PredictConfig) -> dict[str, Any]:
    defaults = PredictConfig()
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "manifest": "$@bundle_root + '/manifest.csv'",
        "root": None,
        "boxes": None,
        "split": None,
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "settings": {
            # Of the machine that predicts, unlike the others, which are the run's.
            "batch_size": defaults.batch_size,
            "amp": defaults.amp,
            "threshold": settings.threshold,
            "prompts": settings.prompts,
        },
        "checkpoint": f"$@bundle_root + '/{WEIGHTS}'",
        "network_def": {
            "_target_": "medsam_lora.stages.bundle.BundleNetwork",
            "adapter": f"$@bundle_root + '/{DESCRIPTION}'",
        },
        "network": {
            "_target_": "medsam_lora.stages.bundle.loaded",
            "network": "@network_def",
            "checkpoint": "@checkpoint",
            "device": "@device",
        },
        "evaluator": {
            "_target_": "medsam_lora.stages.bundle.CaseEvaluator",
            "network": "@network",
            "manifest": "@manifest",
            "output_dir": "@output_dir",
            "root": "@root",
            "boxes": "@boxes",
            "split": "@split",
            "settings": "@settings",
        },
        "run": ["$@evaluator.run()"],
    }


def _readme(metadata: Mapping[str, Any], about: Mapping[str, Any], settings: PredictConfig) -> str:
    notice, prompted = about.get("notice"), method_spec(metadata["method"]).prompted
    prompts = BOXES if prompted else NO_BOXES.format(prompts=settings.prompts)
    how = "each prompted by a box" if prompted else "without a prompt"
    return f"""# {metadata["model_name"]} with {metadata["method"]}

Segments {", ".join(about["regions"])} of brain tumours on transverse slices of {", ".join(about["modalities"])}, {how}.
Exported by medsam-lora {__version__}. **Not a medical device, for research only.**
{"" if notice is None else f"{chr(10)}{notice}.{chr(10)}"}
Install `medsam-lora=={__version__}` with its extra `bundle`, then, in this folder:

    python -m monai.bundle run --config_file configs/inference.json --manifest M.csv --root DATA --output_dir OUT

`M.csv` is a manifest of cases (`medsam-lora manifest build DATA --out M.csv`); paths in it are relative to `--root`,
its own folder by default. {prompts} `--split test` takes only that split. From another folder, add
`--bundle_root` with this one.

`OUT` receives a label map (`.nii.gz`) and a segmentation for 3D Slicer (`.seg.nrrd`) for every case, on its own grid,
the boxes used (`prompts.csv`) and what the labels mean (`record.json`): what `medsam-lora predict` writes.

`docs/export.json` says what happens between a file and the network, and behind it. `models/model.pt` is a state dict of
the whole model, base weights included.
"""


def _licence() -> str:
    """The text of the package's licence: of a checkout, or of an installed package."""
    beside = Path(medsam_lora.__file__).resolve().parent.parent / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    try:
        files = distribution("medsam-lora").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "LICENSE":
            return file.read_text(encoding="utf-8")
    return "The text: https://www.apache.org/licenses/LICENSE-2.0\n"
