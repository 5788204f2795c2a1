"""The report: runs in, one HTML file out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from medsam_lora.errors import MedsamLoraError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.progress import track
from medsam_lora.report.cases import Place, find_places, read_shown
from medsam_lora.report.collect import collect
from medsam_lora.report.figures import figures
from medsam_lora.report.html import render_page
from medsam_lora.report.page import Page, content, used_cases
from medsam_lora.report.pictures import stills
from medsam_lora.report.volumes import Packer
from medsam_lora.stages.cohort import default_root
from medsam_lora.stages.scoring import FLOOR

logger = logging.getLogger(__name__)


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    manifest: Path | None = None,
    root: Path | None = None,
    max_mib: float = 48.0,
    title: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Path:
    """Write the report of one or more runs.

    Parameters
    ----------
    runs : sequence of Path
        Pipeline folders, run folders, or folders with ``per_case.csv``.
    out : Path
        The HTML file.
    manifest, root : Path, optional
        Where the cases are, over what the runs' records say.
    max_mib : float
        Budget of the voxels in the page; they are made coarser until they fit. 0 leaves the viewer out.
    title : str, optional
    bootstrap, seed : int
        Of the intervals.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError, ManifestError
        Where a run has no scores, or the manifest given cannot be used. Images that cannot be found are no error:
        the page is made without them, and says so.
    """
    collected, sources = collect(runs, FLOOR)
    names = dict.fromkeys(Path(path).resolve().name for path in runs)
    page = Page(collected, sources, FLOOR, title or f"Report: {', '.join(names)}", bootstrap, seed)
    places = find_places(collected, default_root(), manifest, root)
    page.manifests = list(dict.fromkeys(place.manifest for place in places.values()))
    _show_cases(page, places, max_mib)
    page.figures = figures(collected, FLOOR)
    for text in page.notices:
        logger.warning("%s", text)
    write_bytes_atomically(out, render_page(content(page)).encode())
    return out


def _show_cases(page: Page, places: dict[str, Place], max_mib: float) -> None:
    """Fill in what is made of the images: voxels for the viewer, and stills of the worst and best cases."""
    wanted = used_cases(page.runs)
    extreme = {row["case_id"] for rows in page.extreme_rows() for row in rows}
    packer = Packer(int(max_mib * 2**20))
    absent: list[str] = []
    reasons: list[str] = []
    for case_id in track(wanted, "report"):
        if case_id not in places:
            absent.append(case_id)
            reasons.append("no manifest lists the case")
            continue
        try:
            case = read_shown(places[case_id], page.runs, FLOOR)
        except MedsamLoraError as error:
            absent.append(case_id)
            reasons.append(error.message if error.path is None else f"{error.path}: {error.message}")
            continue
        packer.add(case)
        if case_id in extreme:
            page.stills[case_id] = stills(case, page.region, page.last.label)
    packed = packer.finest()
    if packed is None:
        page.notices.append(
            f"The voxels of {packer.n_cases} cases do not fit in {max_mib:g} MiB at any resolution, so this report has "
            "no viewer: give a larger --max-mib."
        )
    page.cases = packed or []
    if absent:
        page.notices.append(_absence(absent, reasons, len(wanted)))


def _absence(absent: Sequence[str], reasons: Sequence[str], of: int) -> str:
    remedy = "Give --manifest and --root to show them."
    if len(absent) == of:
        return f"The images of the cases were not found, so this report has no viewer ({reasons[0]}). {remedy}"
    named = ", ".join(absent[:5]) + (" …" if len(absent) > 5 else "")
    return f"The images of {len(absent)} of {of} cases were not found: {named} ({reasons[0]}). {remedy}"
