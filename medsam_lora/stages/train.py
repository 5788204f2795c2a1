"""The training stage: a prepared store in, a run folder with an adapter that was reloaded and found equal out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medsam_lora.config import Config, dump_config
from medsam_lora.errors import TrainingError
from medsam_lora.inference import postprocess
from medsam_lora.inference.predictor import PredictOptions, validate_case
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.tables import write_table
from medsam_lora.models import MODELS
from medsam_lora.models.allocator import is_out_of_memory, keep_freed_memory
from medsam_lora.models.assemble import adapter_metadata, build_segmenter, choose_device, load_segmenter
from medsam_lora.models.checkpoint import save_adapter
from medsam_lora.models.compiling import is_compile_failure
from medsam_lora.models.precision import resolve_amp
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import method_spec
from medsam_lora.prompts import REFERENCE_BOX
from medsam_lora.records import PreparedSlices
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.training_cases import check_cases, check_neighbours, find_store, first_slices, split_cases
from medsam_lora.training.dataset import PromptOptions, SliceDataset
from medsam_lora.training.distributed import Group, check_gpus, joined, launch, under_torchrun
from medsam_lora.training.guards import deterministic, peak_memory_mib, reset_peak_memory
from medsam_lora.training.log import LOG_COLUMNS
from medsam_lora.training.loop import Trainer

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = Path("state") / "last.pt"
CACHE_FOLDER = "cache"


def train(
    manifest: Path | None,
    prepared: Path,
    run: Path,
    config: Config,
    *,
    device: str = "auto",
    resume: bool = False,
    cache: Path | None = None,
    sharers: int = 1,
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
    cache : Path, optional
        Folder of cached image embeddings, where ``train.cache_gib`` gives them room; beside `run` by default.
    sharers : int
        Runs under way that share this room, this one among them.

    Returns
    -------
    dict
        The run record, as in ``run.json``.

    Raises
    ------
    TrainingError
        Among others where the adapter read back from disk does not reproduce the validation Dice.
    """
    method_spec(config.method.name)
    if config.train.processes == 1 or under_torchrun():
        return _train(manifest, prepared, run, config, device, resume, cache, sharers)
    check_gpus(config.train.processes, device, "train.processes")
    arguments = {"manifest": manifest, "prepared": prepared, "run": run, "config": config, "device": device}
    launch(_train, config.train.processes, arguments | {"resume": resume, "cache": cache, "sharers": sharers})
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def _train(
    manifest: Path | None,
    prepared: Path,
    run: Path,
    config: Config,
    device: str,
    resume: bool,
    cache: Path | None,
    sharers: int,
) -> dict[str, Any]:
    keep_freed_memory()
    with joined(device) as (group, own_device):
        return _train_as(group, manifest, prepared, run, config, own_device, resume, cache, sharers)


def _train_as(
    group: Group,
    manifest: Path | None,
    prepared: Path,
    run: Path,
    config: Config,
    device: str,
    resume: bool,
    cache: Path | None,
    sharers: int,
) -> dict[str, Any]:
    """Train as one of the processes of a group, the main one of which writes; the others give an empty record."""
    started = time.perf_counter()
    store = find_store(prepared)
    training, validation = split_cases(store, manifest)
    target = choose_device(device)
    reset_peak_memory(target)
    # One place for both: an adapter's initialisation and the order of its training slices.
    seed = config.train.seed
    modalities = config.data.modalities
    segmenter = build_segmenter(
        config.model, config.method, config.fusion, modalities, config.train.regions, seed, target
    )
    cached = segmenter.use_cache(
        run.parent / CACHE_FOLDER if cache is None else cache,
        _bytes(config),
        config.train.amp,
        writers=group.size * sharers,
    )
    notice = MODELS[config.model.name].notice
    if notice is not None:
        logger.warning("%s", notice)
    check_cases([*training, *validation], modalities, config.train.regions, store)
    check_neighbours(training, segmenter.adaptation.report.depth, store)
    if config.train.postprocess == "fitted" and not validation:
        raise TrainingError(
            "train.postprocess=fitted needs validation cases, and there are none",
            path=manifest or store,
            remedy="Put cases into the split val, or set train.postprocess to none.",
        )
    prompts = PromptOptions(config.prompt.boxes, config.prompt.min_component_voxels, config.prompt.jitter_px)
    metadata = run_metadata(segmenter, config, store)
    if group.is_main:
        run.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(run / "config.yaml", dump_config(config).encode())
    rows: list[dict[str, Any]] = []
    if segmenter.trainable_groups():
        rows = _fit(group, segmenter, training, validation, prompts, run, config, resume)
    if not group.is_main:
        return {}
    write_table(run / "log.csv", LOG_COLUMNS, rows)
    if config.train.postprocess == "fitted":
        predicting = PredictOptions(config.predict.batch_size, config.predict.amp, config.predict.threshold)
        pairs = [
            postprocess.validation_case(segmenter, c, prompts.kind, prompts.min_voxels, predicting) for c in validation
        ]
        how = postprocess.fit(pairs, segmenter.regions)
        metadata["postprocess"] = postprocess.to_json(how)
        logger.info("post-processing, fitted on %d validation cases: %s", len(validation), postprocess.describe(how))
    save_adapter(run / ADAPTER_FILE, segmenter.adapter_state(), metadata)
    check = check_reloaded(segmenter, validation or [first_slices(training[0])], run, config, target)
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
        **_time_record(rows),
        "prompt_source": REFERENCE_BOX,
        "regions": list(segmenter.regions),
        "postprocess": postprocess.describe(postprocess.from_json(metadata.get("postprocess", {}))),
        "processes": group.size,
        "cached_embeddings": cached,
        "cache": _cache_record(segmenter, config),
        "reload_check": check,
    }
    write_json(run / "run.json", record)
    return record


def _time_record(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the epochs, whenever they ran, without validation; updates of the weights; seconds for each."""
    seconds = sum(row.get("duration_s") or 0.0 for row in rows)
    updates = sum(row.get("updates") or 0 for row in rows)
    return {"train_seconds": seconds, "updates": updates, "seconds_per_step": seconds / updates if updates else None}


def run_metadata(segmenter: Segmenter, config: Config, store: Path) -> dict[str, Any]:
    """What the adapter file of a run says of itself: the segmenter, how its slices are prepared, and its prompts.

    Parameters
    ----------
    segmenter : Segmenter
        Built from `config`.
    config : Config
    store : Path
        The prepared store, with its ``plan.json``.
    """
    metadata = adapter_metadata(segmenter, config.model, config.method, config.fusion, config.train.seed)
    metadata["plan"] = json.loads((store / "plan.json").read_text(encoding="utf-8"))
    metadata["prompts"] = {"kind": config.prompt.boxes, "min_voxels": config.prompt.min_component_voxels}
    return metadata


def _cache_record(segmenter: Segmenter, config: Config) -> dict[str, Any] | None:
    """What is cached, in how many variants of each slice, and how much room it took."""
    if segmenter.cache is None:
        return None
    cache = segmenter.cache
    return {
        "point": segmenter.cache_point,
        "variants_per_slice": 2 if config.train.flip else 1,
        "hits": cache.hits,
        "misses": cache.misses,
        "gib": cache.gib,
        "max_gib": config.train.cache_gib,
    }


def _bytes(config: Config) -> int:
    return int(config.train.cache_gib * 2**30)


def _fit(
    group: Group,
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
    dataset = SliceDataset(
        training, segmenter.regions, prompts, segmenter.sam.image_size, segmenter.adaptation.report.depth
    )
    identity = _identity(config, training, validation, segmenter)
    trainer = Trainer(segmenter, dataset, validation, options, run / STATE_FILE, identity, group)
    if resume:
        trainer.resume()
    rows: list[dict[str, Any]] = list(trainer.progress.rows)
    events = _tensorboard(run) if options.tensorboard and group.is_main else None

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if not group.is_main:
            return
        write_table(run / "log.csv", LOG_COLUMNS, rows)
        logger.info("%s", _one_line(row, options.epochs))
        if events is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    events.add_scalar(name, value, row["epoch"])

    try:
        return trainer.fit(note)
    except (MemoryError, RuntimeError) as error:
        if is_compile_failure(error):
            raise TrainingError(
                f"torch.compile failed: {str(error).strip().splitlines()[0]}",
                path=run,
                remedy="Set train.compile=false, or install a C++ compiler (CPU) or Triton (CUDA).",
            ) from error
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out with {options.batch_size} slices of {len(segmenter.modalities)} modalities at a time",
            path=run,
            remedy="Lower train.batch_size and raise train.accumulation by as much, or set train.checkpointing=true; "
            "medsam-lora info --plan CONFIG says what fits.",
        ) from error
    finally:
        if events is not None:
            events.close()


def _identity(
    config: Config, training: Sequence[PreparedSlices], validation: Sequence[PreparedSlices], segmenter: Segmenter
) -> str:
    settings = config.model_dump(mode="json")
    for irrelevant in ("predict", "evaluate"):
        settings.pop(irrelevant)
    for irrelevant in ("cache_gib", "processes"):
        settings["train"].pop(irrelevant)
    facts = {
        "settings": settings,
        "train": [[case.case_id, list(case.ks)] for case in training],
        "val": [[case.case_id, list(case.ks)] for case in validation],
        "base": segmenter.sam.base_sha256,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_reloaded(
    segmenter: Segmenter, cases: Sequence[PreparedSlices], run: Path, config: Config, device: torch.device
) -> dict[str, Any]:
    """Dice of the trained segmenter and of the one read back from disk, which must be equal.

    The commonest way in which such systems failed is that the weights evaluated were not those trained.

    Parameters
    ----------
    segmenter : Segmenter
        As trained.
    cases : sequence of PreparedSlices
    run : Path
        Holds ``adapter.safetensors``.
    config : Config
        That of the training.
    device : torch.device

    Returns
    -------
    dict
        ``cases``, ``dice`` of the adapter read back, and ``largest_difference``.

    Raises
    ------
    TrainingError
        Where the two differ.
    """
    options = PredictOptions(config.train.batch_size, config.train.amp)
    reloaded, _ = load_segmenter(run / ADAPTER_FILE, config.model.weights, device)
    # Embeddings computed in another batch differ in their last bits, which is not what is asked here.
    reloaded.cache, reloaded.cache_point = segmenter.cache, segmenter.cache_point
    prompt = config.prompt
    with deterministic():
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
