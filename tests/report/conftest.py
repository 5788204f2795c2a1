"""A small pipeline folder with handmade predictions, its report, and a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import blunt, close, make_runs

from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.io.manifest import read_manifest
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.report import report

# No window, no GPU, and nothing that calls home: the tests watch every request.
LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LAUNCH += ["--disable-sync", "--no-first-run"]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three synthetic cases."""
    root = tmp_path_factory.mktemp("cohort")
    make_cohort(root, 3, 0, (48, 56, 20))
    return root


@pytest.fixture(scope="session")
def pipeline(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder: two methods and the floor, scored as a challenge; zero_shot failed on the last case."""
    out = tmp_path_factory.mktemp("pipeline") / "small"
    build_manifest(cohort, out / "all.csv", {"test": 1.0}, 0)
    records = read_manifest(out / "all.csv")
    methods = {"zero_shot": blunt, "lora": close}
    return make_runs(out, cohort, records, methods, "brats2023-gli", ("zero_shot", records[-1].case_id))


@pytest.fixture(scope="session")
def page_path(pipeline: Path) -> Path:
    """The report of `pipeline`."""
    return report([pipeline], pipeline / "report.html", bootstrap=200, seed=1)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("MEDSAM_LORA_CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(names)}): set MEDSAM_LORA_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=LAUNCH)
        yield chromium
        chromium.close()
