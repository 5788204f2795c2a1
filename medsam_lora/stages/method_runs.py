"""One method of a pipeline: its store, its training and its predictions, each left alone where it is done already."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medsam_lora.io.files import sha256_of
from medsam_lora.io.partial import VERIFIED_FILE
from medsam_lora.records import Finding
from medsam_lora.stages.pipeline import Method, Pipeline
from medsam_lora.stages.workplace import Workplace, timed

logger = logging.getLogger(__name__)


def with_pretrained_weights(place: Workplace) -> Pipeline:
    """The pipeline with its methods' weights set to the pre-trained ones, where it asks for pre-training."""
    section = place.pipeline.settings.pretrain
    if section is None:
        return place.pipeline
    from medsam_lora.stages.pretrain import pretrain_nano

    with timed(place, "pretrain"):
        weights = pretrain_nano(place.out / "pretrained", section, place.device)

    def with_weights(method: Method) -> Method:
        model = method.config.model.model_copy(update={"weights": str(weights)})
        return Method(method.label, method.config.model_copy(update={"model": model}))

    return replace(place.pipeline, methods=tuple(with_weights(m) for m in place.pipeline.methods))


def store_for(place: Workplace, method: Method, fold: str, manifest: Path) -> tuple[Path, Sequence[Finding]]:
    """The store of a method and fold, made where no earlier one of this session has equal settings.

    Returns
    -------
    store : Path
    failed : sequence of Finding
        Cases that could not be prepared.
    """
    from medsam_lora.stages.prepare import prepare

    sections = {"data", "slicing", "crop", "intensity"}
    key = method.config.model_dump_json(include=sections) + ",".join(method.config.train.regions) + fold
    if key in place.stores:
        return place.stores[key]
    store, outcome = prepare(
        manifest,
        place.root,
        place.out / "prepared",
        method.config,
        workers=place.workers,
        verified=place.out / VERIFIED_FILE,
    )
    place.stores[key] = store, outcome.failed
    return place.stores[key]


def train_and_predict(place: Workplace, method: Method, fold: str, manifest: Path, store: Path | None) -> None:
    """Train a method on a fold and predict its cases, as far as the pipeline has these stages.

    Parameters
    ----------
    place : Workplace
        Gains the failures of prediction.
    method : Method
    fold : str
        Empty without folds.
    manifest : Path
    store : Path or None
        Needed where the method is trained.
    """
    folder = place.run_folder(method, fold)
    name = f"{method.label} {fold}".strip()
    if place.runs("train"):
        assert store is not None
        with timed(place, f"train {name}"):
            _train(place, method, folder, manifest, store)
    if place.runs("predict"):
        from medsam_lora.stages.predict import predict

        logger.info("predict: %s", name)
        with timed(place, f"predict {name}"):
            outcome = predict(
                manifest,
                place.root,
                folder,
                folder / "predictions",
                method.config,
                split=place.split,
                device=place.device,
                cache=place.cache,
                sharers=place.jobs,
            )
        place.failures += outcome.failed


def _train(place: Workplace, method: Method, folder: Path, manifest: Path, store: Path) -> None:
    """Train unless the same was done already; go on where it was stopped."""
    from medsam_lora.stages.train import STATE_FILE, train

    inputs = {
        "config": method.config.model_dump(
            mode="json", exclude={"predict": True, "evaluate": True, "train": {"cache_gib", "processes"}}
        ),
        "store": store.name,
        "manifest": sha256_of(manifest),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    mark = folder / "inputs.sha256"
    same = mark.is_file() and mark.read_text().strip() == key
    if same and (folder / "run.json").is_file() and place.start != "train":
        logger.info("%s is trained already", folder)
        return
    resume = same and not (folder / "run.json").is_file() and (folder / STATE_FILE).is_file()
    (folder / "run.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(key + "\n")
    logger.info("train: %s%s", folder.relative_to(place.out), " (resumed)" if resume else "")
    train(
        manifest,
        store,
        folder,
        method.config,
        device=place.device,
        resume=resume,
        cache=place.cache,
        sharers=place.jobs,
    )
