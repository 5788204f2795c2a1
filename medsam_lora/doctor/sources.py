"""From what the user gave (settings, pipeline, manifest, store or run) to the few slices that are examined."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from medsam_lora.config import Config, PromptConfig, load_config, load_yaml
from medsam_lora.doctor.subject import Subject
from medsam_lora.errors import AdapterError, ConfigError, DataError, MedsamLoraError, nearest
from medsam_lora.io.manifest import case_path, read_manifest, write_manifest
from medsam_lora.io.nifti import read_label_map
from medsam_lora.io.store import open_store
from medsam_lora.labels import region_mask, to_canonical
from medsam_lora.models.assemble import choose_device
from medsam_lora.peft import method_spec
from medsam_lora.progress import track
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import CaseRecord, PreparedSlices
from medsam_lora.stages.cohort import default_root, find_cohort
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.pipeline import Method, Pipeline, PipelineSection, load_pipeline
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.sweep_file import SweepSection
from medsam_lora.stages.train import ADAPTER_FILE
from medsam_lora.stages.training_cases import check_cases, find_store, split_cases
from medsam_lora.transforms.masking import region_areas
from medsam_lora.transforms.orientation import orient

logger = logging.getLogger(__name__)

N_SLICES = 4
MOST_LOOKED_AT = 24
"""Cases among which those with the largest tumours are sought: their references are read, evenly over the manifest."""


@dataclass(frozen=True)
class Given:
    """What the user gave.

    Parameters
    ----------
    config : Path, optional
        Settings, or a pipeline.
    settings : sequence of str
        ``section.key=value``.
    manifest, root, prepared, run : Path, optional
    method : str, optional
        Label of one of a pipeline's methods; by default the first that trains something.
    """

    config: Path | None = None
    settings: Sequence[str] = field(default_factory=tuple)
    manifest: Path | None = None
    root: Path | None = None
    prepared: Path | None = None
    run: Path | None = None
    method: str | None = None


def examine_with(given: Given, work: Path, device: str, steps: int, minutes: float) -> Subject:
    """Choose the slices and prepare them, by the stages that prepare all others.

    Parameters
    ----------
    given : Given
    work : Path
        An empty folder for what the stages write.
    device : str
    steps, minutes
        As of `Subject`.

    Raises
    ------
    MedsamLoraError
        Where settings, manifest or cases cannot be used.
    """
    target = choose_device(device)
    if given.run is not None and not adapter_of(given.run).is_file():
        raise AdapterError(
            "no such run" if not given.run.exists() else "no adapter is in this run",
            path=given.run,
            remedy=f"Give --run a folder that train has finished, with {ADAPTER_FILE}, or the adapter file.",
        )
    config, manifest, root = _settings(given, work)
    method_spec(config.method.name)
    records: dict[str, CaseRecord] = {}
    if given.prepared is not None:
        store = find_store(given.prepared)
        cases = _evenly(split_cases(store, manifest)[0], MOST_LOOKED_AT)
        if manifest is not None:
            records = {r.case_id: r for r in read_manifest(manifest)}
    else:
        manifest, root = _manifest(manifest, root, work)
        chosen = _largest(read_manifest(manifest), root or manifest.parent, config)
        store = _prepared(chosen, root or manifest.parent, config, work)
        cases = open_store(store)
        records = {r.case_id: r for r in chosen}
    check_cases(cases, config.data.modalities, config.train.regions, store)
    slices = largest_slices(cases, N_SLICES, config.prompt)
    if not slices:
        raise DataError(
            "no slice shows tumour that gets a box",
            path=store,
            remedy="Give cases with a reference that shows some, or lower prompt.min_component_voxels.",
        )
    used = [s.case_id for s in slices]
    return Subject(
        config,
        target,
        work,
        store,
        {case.case_id: case for case in cases if case.case_id in used},
        slices,
        {case_id: records[case_id] for case_id in used if case_id in records},
        root or (manifest.parent if manifest is not None else Path()),
        given.run,
        steps,
        minutes,
    )


def adapter_of(run: Path) -> Path:
    """The adapter file of a run, which may be that file itself."""
    return run if run.is_file() else run / ADAPTER_FILE


def largest_slices(
    cases: Sequence[PreparedSlices], count: int, prompt: PromptConfig | None = None
) -> list[PreparedSlices]:
    """The slices of most tumour: the largest of every case, then the second of every case, and so on.

    Parameters
    ----------
    cases : sequence of PreparedSlices
        With their labels.
    count : int
    prompt : PromptConfig, optional
        Slices that it gives no box are left out, as training leaves them out.

    Returns
    -------
    list of PreparedSlices
        Of one slice each.
    """
    ranked: list[tuple[int, int, PreparedSlices, int]] = []
    for case in cases:
        assert case.label is not None
        areas = [int(np.count_nonzero(label)) for label in case.label]
        order = sorted(range(len(areas)), key=lambda n, areas=areas: -areas[n])  # type: ignore[misc]
        shown = (n for n in order if areas[n] and _has_box(np.asarray(case.label[n]), prompt))
        ranked += [(turn, -areas[n], case, n) for turn, n in enumerate(islice(shown, count))]
    ranked.sort(key=lambda entry: entry[:2])
    return [cut(case, [n]) for _, _, case, n in ranked[:count]]


def _has_box(label: np.ndarray, prompt: PromptConfig | None) -> bool:
    if prompt is None:
        return True
    return len(boxes_from_mask(region_mask(label, "WT"), prompt.boxes, prompt.min_component_voxels)) > 0


def cut(case: PreparedSlices, numbers: Sequence[int]) -> PreparedSlices:
    """A case with only some of its slices, ascending; what its report says of the whole volume is left out."""
    chosen = sorted(numbers)
    label = None if case.label is None else np.asarray(case.label[chosen])
    return dataclasses.replace(
        case,
        image=np.asarray(case.image[chosen]),
        label=label,
        ks=tuple(case.ks[n] for n in chosen),
        mean=case.mean[chosen],
        std=case.std[chosen],
        report={},
    )


def _settings(given: Given, work: Path) -> tuple[Config, Path | None, Path | None]:
    """Configuration, manifest and root, from a settings file, a pipeline file, or the run."""
    path = given.config
    if path is None and given.run is not None and (given.run / "config.yaml").is_file():
        path = given.run / "config.yaml"
    keys = set(load_yaml(path)) if path is not None else set()
    if path is not None and keys & set(SweepSection.model_fields):
        raise _swept(path)
    if path is None or not keys & set(PipelineSection.model_fields):
        if given.method is not None:
            raise ConfigError(
                "--method names one of a pipeline's methods, and this is no pipeline file",
                path=path,
                remedy="Set the method by --set method.name=NAME.",
            )
        return load_config(path, given.settings), given.manifest, given.root
    pipeline = load_pipeline(path, given.settings)
    method = _method(pipeline, given.method, path)
    named = pipeline.settings
    manifest = given.manifest or (None if named.manifest is None else Path(named.manifest))
    root = given.root or (None if named.root is None else Path(named.root))
    if named.phantom is not None and manifest is None and root is None:
        root = _phantom(pipeline, work)
    return method.config, manifest, root


def _method(pipeline: Pipeline, label: str | None, path: Path) -> Method:
    """The method asked for; without a label the first that trains something, and the log says so."""
    labels = [method.label for method in pipeline.methods]
    if label is not None:
        if label not in labels:
            guess = nearest(label, labels)
            hint = f"; did you mean {guess}?" if guess else ""
            raise ConfigError(f"no method {label!r}{hint}", path=path, remedy=f"Choose of {', '.join(labels)}.")
        return pipeline.methods[labels.index(label)]
    trained = [m for m in pipeline.methods if m.config.method.name != "zero_shot"] or list(pipeline.methods)
    if len(trained) > 1:
        others = ", ".join(m.label for m in trained[1:])
        logger.info("examining %s; --method examines another: %s", trained[0].label, others)
    return trained[0]


def _swept(path: Path) -> ConfigError:
    """Which of its points would be meant? The pipeline below them all is what can be examined."""
    named = load_yaml(path).get("pipeline")
    pipeline = f"--config {path.parent / named}" if named else "a pipeline file of its other keys"
    return ConfigError(
        "this is a sweep file, and the doctor examines one set-up",
        path=path,
        remedy=f"Give {pipeline}, and a point's values with --set section.key=value.",
    )


def _phantom(pipeline: Pipeline, work: Path) -> Path:
    section = pipeline.settings.phantom
    assert section is not None
    # The first cases of the cohort are what they are in the whole one.
    few = section.model_copy(update={"cases": min(section.cases, N_SLICES)})
    settings = pipeline.settings.model_copy(update={"phantom": few})
    return find_cohort(replace(pipeline, settings=settings), work, 1)


def _manifest(manifest: Path | None, root: Path | None, work: Path) -> tuple[Path, Path | None]:
    if manifest is not None:
        return manifest, root
    folder = default_root() if root is None else root
    if not folder.is_dir():
        raise ConfigError(
            "there are no data to look at",
            path=None if root is None else root,
            remedy="Give --manifest M.csv (with --root DIR), --root DIR alone, or --prepared DIR.",
        )
    build_manifest(folder, work / "cohort.csv", {"train": 1.0, "val": 0.0, "test": 0.0})
    return work / "cohort.csv", folder


def _largest(records: Sequence[CaseRecord], root: Path, config: Config) -> list[CaseRecord]:
    """The cases with the largest tumour slices, of the training split where there is one."""
    scored = [r for r in records if r.files.get("seg")]
    candidates = _evenly([r for r in scored if r.split == "train"] or scored, MOST_LOOKED_AT)
    areas: dict[str, int] = {}
    errors: list[MedsamLoraError] = []
    for record in track(candidates, "look for tumours"):
        try:
            volume = read_label_map(case_path(record, "seg", root), int(config.data.max_gib * 2**30))
            label, _ = orient(to_canonical(volume.array, record.label_convention), volume.geometry)
        except MedsamLoraError as error:
            logger.warning("%s", error)
            errors.append(error)
            continue
        areas[record.case_id] = int(region_areas(label, "WT").max())
    shown = [r for r in candidates if areas.get(r.case_id)]
    if not shown and errors:
        raise errors[0]
    if not shown:
        raise DataError(
            "no case has a reference that shows tumour",
            path=root,
            remedy="The checks need a reference to compare with.",
        )
    return sorted(shown, key=lambda r: -areas[r.case_id])[:N_SLICES]


def _prepared(records: Sequence[CaseRecord], root: Path, config: Config, work: Path) -> Path:
    manifest = work / "manifest.csv"
    # One patient in two splits is refused; as training cases they are sliced as the settings say.
    write_manifest(manifest, [replace(record, split="train") for record in records])
    store, outcome = prepare(manifest, root, work / "prepared", config)
    if len(outcome.failed) == len(records):
        first = outcome.failed[0]
        raise DataError(
            first.detail, case_id=first.case_id, path=first.file or None, remedy=first.remedy, code=first.code
        )
    return store


def _evenly(items: Sequence, most: int) -> list:
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]
