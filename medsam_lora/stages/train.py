"""The training stage: a prepared store in, a run folder with an adapter that was reloaded and found equal out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsam_lora.config import Config, dump_config
from medsam_lora.errors import PreparedError, TrainingError
from medsam_lora.inference import postprocess
from medsam_lora.inference.predictor import PredictOptions, predict_slices, reference_boxes, validate_case
from medsam_lora.inference.volume import to_native
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.store import open_store, read_index
from medsam_lora.io.tables import write_table
from medsam_lora.labels import region_mask, regions_of
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import adapter_metadata, build_segmenter, choose_device, load_segmenter
from medsam_lora.models.checkpoint import save_adapter
from medsam_lora.models.precision import resolve_amp
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import method_spec
from medsam_lora.prompts import REFERENCE_BOX
from medsam_lora.records import PreparedSlices
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.training.dataset import PromptOptions, SliceDataset
from medsam_lora.training.guards import peak_memory_mib
from medsam_lora.training.loop import LOG_COLUMNS, Trainer

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = Path("state") / "last.pt"

# Without validation cases the reloaded adapter is checked on this many slices of a training case.
_CHECK_SLICES = 8


def train(
    manifest: Path | None,
    prepared: Path,
    run: Path,
    config: Config,
    *,
    device: str = "auto",
    resume: bool = False,
) -> dict[str, Any]:
    """Train one method on a prepared store.

    Parameters
    ----------
    manifest : Path or None
        Says which case is in which split; without it the splits at preparation hold.
    prepared : Path
        A store (the fingerprint folder), or the folder that holds exactly one.
    run : Path
        Receives ``adapter.safetensors``, ``config.yaml``, ``log.csv``, ``run.json`` and ``state/last.pt``.
    config : Config
    device : str
    resume : bool
        Go on from ``state/last.pt``.

    Returns
    -------
    dict
        The run record, as in ``run.json``.

    Raises
    ------
    TrainingError
        Among others where the adapter read back from disk does not reproduce the validation Dice.
    """
    started = time.perf_counter()
    keep_freed_memory()
    method_spec(config.method.name)
    store = find_store(prepared)
    training, validation = split_cases(store, manifest)
    target = choose_device(device)
    # One place for both: an adapter's initialisation and the order of its training slices.
    seed = config.train.seed
    modalities = config.data.modalities
    segmenter = build_segmenter(
        config.model, config.method, config.fusion, modalities, config.train.regions, seed, target
    )
    _check_modalities([*training, *validation], modalities)
    _check_regions([*training, *validation], config.train.regions, store)
    if config.train.postprocess == "fitted" and not validation:
        raise TrainingError(
            "train.postprocess=fitted needs validation cases, and there are none",
            path=manifest or store,
            remedy="Put cases into the split val, or set train.postprocess to none.",
        )
    prompts = PromptOptions(config.prompt.boxes, config.prompt.min_component_voxels, config.prompt.jitter_px)
    metadata = adapter_metadata(segmenter, config.model, config.method, config.fusion, seed)
    metadata["plan"] = json.loads((store / "plan.json").read_text())
    metadata["prompts"] = {"kind": prompts.kind, "min_voxels": prompts.min_voxels}
    run.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(run / "config.yaml", dump_config(config).encode())
    rows: list[dict[str, Any]] = []
    if segmenter.trainable_groups():
        rows = _fit(segmenter, training, validation, prompts, run, config, resume)
    write_table(run / "log.csv", LOG_COLUMNS, rows)
    if config.train.postprocess == "fitted":
        how = _fit_postprocess(segmenter, validation, config)
        metadata["postprocess"] = postprocess.to_json(how)
        logger.info("post-processing, fitted on %d validation cases: %s", len(validation), postprocess.describe(how))
    save_adapter(run / ADAPTER_FILE, segmenter.adapter_state(), metadata)
    check = _check_reloaded(segmenter, validation or [_first_slices(training[0])], run, config, target)
    record = run_record(config) | {
        "stage": "train",
        "method": config.method.name,
        "n_train_cases": len(training),
        "n_val_cases": len(validation),
        "trainable_parameters": sum(p.numel() for g in segmenter.trainable_groups().values() for p in g),
        "base_sha256": segmenter.sam.base_sha256,
        "store": store.name,
        "device": str(target),
        "amp": resolve_amp(config.train.amp, target),
        "peak_memory_mib": peak_memory_mib(target),
        "duration_s": time.perf_counter() - started,
        "prompt_source": REFERENCE_BOX,
        "regions": list(segmenter.regions),
        "postprocess": postprocess.describe(postprocess.from_json(metadata.get("postprocess", {}))),
        "reload_check": check,
    }
    write_json(run / "run.json", record)
    return record


def find_store(prepared: Path) -> Path:
    """The store at or below `prepared`.

    Raises
    ------
    PreparedError
        Where there is none, or several to choose from.
    """
    if (prepared / "plan.json").is_file():
        return prepared
    found = sorted(p.parent for p in prepared.glob("*/plan.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise PreparedError("no prepared store is here", path=prepared, remedy="Run medsam-lora prepare first.")
    names = ", ".join(p.name for p in found)
    raise PreparedError(f"several stores are here ({names})", path=prepared, remedy="Give one of them as --prepared.")


def split_cases(store: Path, manifest: Path | None) -> tuple[list[PreparedSlices], list[PreparedSlices]]:
    """Training and validation cases of a store, by the manifest's splits where one is given.

    Raises
    ------
    PreparedError
        Where a training or validation case of the manifest is not in the store.
    TrainingError
        Where there is no training case.
    """
    cases = {case.case_id: case for case in open_store(store)}
    if manifest is not None:
        wanted = {r.case_id: r.split for r in read_manifest(manifest) if r.split in ("train", "val")}
        absent = sorted(set(wanted) - set(cases))
        if absent:
            raise PreparedError(
                f"{len(absent)} cases of the manifest are not in the store: {', '.join(absent[:5])}",
                path=store,
                remedy="Run medsam-lora prepare again, or take the cases that failed out of the manifest.",
            )
        cases = {i: dataclasses.replace(cases[i], split=split) for i, split in wanted.items()}
    training = [case for case in cases.values() if case.split == "train" and case.label is not None]
    validation = [case for case in cases.values() if case.split == "val" and case.label is not None]
    if not training:
        raise TrainingError(
            "no case with a reference is in the split 'train'",
            path=manifest or store,
            remedy="Build the manifest with --train above 0.",
        )
    return training, validation


def _fit(
    segmenter: Segmenter,
    training: Sequence[PreparedSlices],
    validation: Sequence[PreparedSlices],
    prompts: PromptOptions,
    run: Path,
    config: Config,
    resume: bool,
) -> list[dict[str, Any]]:
    options = config.train
    if options.select == "best" and not validation:
        logger.warning("no validation case: the last epoch is kept (train.select=last)")
        options = options.model_copy(update={"select": "last", "patience": None})
    dataset = SliceDataset(training, segmenter.regions, prompts, segmenter.sam.image_size)
    identity = _identity(config, training, validation, segmenter)
    trainer = Trainer(segmenter, dataset, validation, options, run / STATE_FILE, identity)
    if resume:
        trainer.resume()
    rows: list[dict[str, Any]] = list(trainer.progress.rows)
    events = _tensorboard(run) if options.tensorboard else None

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        write_table(run / "log.csv", LOG_COLUMNS, rows)
        logger.info("%s", _one_line(row, options.epochs))
        if events is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    events.add_scalar(name, value, row["epoch"])

    try:
        return trainer.fit(note)
    finally:
        if events is not None:
            events.close()


def _identity(
    config: Config, training: Sequence[PreparedSlices], validation: Sequence[PreparedSlices], segmenter: Segmenter
) -> str:
    settings = config.model_dump(mode="json")
    for irrelevant in ("predict", "evaluate"):
        settings.pop(irrelevant)
    facts = {
        "settings": settings,
        "train": [[case.case_id, list(case.ks)] for case in training],
        "val": [[case.case_id, list(case.ks)] for case in validation],
        "base": segmenter.sam.base_sha256,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_reloaded(
    segmenter: Segmenter, cases: Sequence[PreparedSlices], run: Path, config: Config, device: torch.device
) -> dict[str, Any]:
    """Dice of the trained segmenter and of the one read back from disk, which must be equal.

    The commonest way in which such systems failed is that the weights evaluated were not those trained.
    """
    options = PredictOptions(config.train.batch_size, config.train.amp)
    reloaded, _ = load_segmenter(run / ADAPTER_FILE, config.model.weights, device)
    prompt = config.prompt
    pairs = [
        tuple(
            validate_case(model, case, prompt.boxes, prompt.min_component_voxels, options).dice
            for model in (segmenter, reloaded)
        )
        for case in cases
    ]
    worst = max(abs(a - b) for a, b in pairs)
    if worst > 1e-6:
        raise TrainingError(
            f"the adapter read back from disk scores a Dice that differs by {worst:.4f} from the trained one",
            path=run / ADAPTER_FILE,
            remedy="Report this as a bug with the run folder: these weights must not be used.",
        )
    return {"cases": [c.case_id for c in cases], "dice": [b for _, b in pairs], "largest_difference": worst}


def _first_slices(case: PreparedSlices) -> PreparedSlices:
    n = _CHECK_SLICES
    label = None if case.label is None else case.label[:n]
    return dataclasses.replace(
        case, image=case.image[:n], label=label, ks=case.ks[:n], mean=case.mean[:n], std=case.std[:n], report={}
    )


def _check_modalities(cases: Sequence[PreparedSlices], modalities: Sequence[str]) -> None:
    for case in cases:
        if tuple(case.modalities) != tuple(modalities):
            raise PreparedError(
                f"the store holds {', '.join(case.modalities)}, the configuration asks for {', '.join(modalities)}",
                case_id=case.case_id,
                remedy="Prepare again with the same data.modalities.",
            )


def _check_regions(cases: Sequence[PreparedSlices], regions: Sequence[str], store: Path) -> None:
    for case in cases:
        convention = str(read_index(store / case.case_id).get("label_convention", "brats2023"))
        unknown = [region for region in regions if region not in regions_of(convention)]
        if unknown:
            raise TrainingError(
                f"a reference of the convention {convention!r} does not show {', '.join(unknown)}",
                case_id=case.case_id,
                remedy="Train with train.regions: [WT], or leave the case out.",
            )


def _fit_postprocess(
    segmenter: Segmenter, validation: Sequence[PreparedSlices], config: Config
) -> dict[str, postprocess.CleanUp]:
    """Clean-up of each region, chosen on the validation cases with their exact boxes."""
    options = PredictOptions(config.predict.batch_size, config.predict.amp, config.predict.threshold)
    cases = []
    for case in validation:
        boxes = reference_boxes(case, config.prompt.boxes, config.prompt.min_component_voxels)
        predicted = predict_slices(segmenter, case, boxes, options)
        label = np.asarray(case.label)
        pairs = [
            (to_native(predicted[:, r], case), to_native(region_mask(label, region), case))
            for r, region in enumerate(segmenter.regions)
        ]
        prediction, reference = (np.stack(masks) for masks in zip(*pairs, strict=True))
        cases.append(postprocess.ValidationCase(case.case_id, prediction, reference, case.native.voxel_volume_ml))
    return postprocess.fit(cases, segmenter.regions)


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "train.tensorboard needs TensorBoard", remedy="pip install 'medsam-lora[track]', or set it to false."
        ) from error
    return SummaryWriter(run / "tensorboard")


def _one_line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}"]
    for key, label in (("loss", "loss"), ("train_dice", "slice Dice"), ("val_dice", "validation Dice")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.4f}")
    if row.get("duration_s") is not None:
        parts.append(f"{row['duration_s']:.0f} s")
    return ", ".join(parts)
