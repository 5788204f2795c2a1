"""The page in a real headless Chromium: what it draws, what its controls do, and that it asks nobody for anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nifti_cases import save
from report_runs import close, make_runs

from medsam_lora.records import CaseRecord
from medsam_lora.stages.report import report

PLANES = ("transverse", "coronal", "sagittal")

# Read from a copy: the browser warns where a page's own canvas is read again and again.
PIXELS = """() => { window.pixels = canvas => {
  const copy = document.createElement('canvas');
  copy.width = canvas.width;
  copy.height = canvas.height;
  const pen = copy.getContext('2d', {willReadFrequently: true});
  pen.drawImage(canvas, 0, 0);
  return pen.getImageData(0, 0, copy.width, copy.height).data;
}; }"""
# What a canvas shows: a hash, the range of its grey values, and how many pixels are coloured.
MEASURE = """name => {
  const canvas = document.getElementById('view-' + name);
  const data = pixels(canvas);
  let hash = 0, low = 255, high = 0, coloured = 0;
  for (let i = 0; i < data.length; i += 4) {
    hash = (hash * 31 + data[i] + 256 * data[i + 1] + 65536 * data[i + 2]) % 2147483647;
    low = Math.min(low, data[i]); high = Math.max(high, data[i]);
    if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 30) coloured += 1;
  }
  return {hash, low, high, coloured, width: canvas.width, height: canvas.height, index: Number(canvas.dataset.index)};
}"""
KEEP = """name => {
  const canvas = document.getElementById('view-' + name);
  window.kept = pixels(canvas);
}"""
# Where a canvas differs from what was kept: the box around those pixels, in shares of its sides.
CHANGED = """name => {
  const canvas = document.getElementById('view-' + name);
  const data = pixels(canvas);
  let left = 1, top = 1, right = 0, bottom = 0;
  for (let i = 0; i < data.length; i += 4) {
    if (Math.abs(data[i] - window.kept[i]) < 128) continue;
    const x = (i / 4) % canvas.width, y = Math.floor(i / 4 / canvas.width);
    left = Math.min(left, x / canvas.width); right = Math.max(right, (x + 1) / canvas.width);
    top = Math.min(top, y / canvas.height); bottom = Math.max(bottom, (y + 1) / canvas.height);
  }
  return [left, top, right, bottom];
}"""


class Tab:
    """A page in the browser, with what it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def load(self, path: Path) -> None:
        self.page.set_default_timeout(10_000)
        self.page.goto(path.as_uri())
        self.page.evaluate(PIXELS)
        if self.page.query_selector("#viewer"):
            self.page.wait_for_selector("#viewer[data-shown]")

    def measure(self, plane: str = "transverse") -> dict[str, int]:
        return dict(self.page.evaluate(MEASURE, plane))

    def wait_for(self, shown: str) -> None:
        self.page.wait_for_function("shown => document.getElementById('viewer').dataset.shown === shown", arg=shown)

    def column(self, n: int) -> list[str]:
        rows = "#case-table tbody tr:not([hidden])"
        return list(self.page.eval_on_selector_all(rows, f"rows => rows.map(r => r.cells[{n}].textContent.trim())"))

    def overflow(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a report; at the end, no page may have complained or asked for anything outside itself."""
    opened: list[Tab] = []

    def open_report(path: Path, width: int = 1280, height: int = 900) -> Tab:
        tab = Tab(browser.new_page(viewport={"width": width, "height": height}))
        opened.append(tab)
        tab.load(path)
        return tab

    yield open_report
    for tab in opened:
        tab.page.close()
    assert [tab.complaints for tab in opened] == [[] for _ in opened]
    outside = [url for tab in opened for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []


@pytest.fixture
def tab(open_tab: Callable[..., Tab], page_path: Path) -> Tab:
    return open_tab(page_path)


def test_the_page_asks_for_nothing_but_itself(tab: Tab, page_path: Path) -> None:
    assert [url for url in tab.requests if url.startswith("file:")] == [page_path.as_uri()]


def test_three_planes_are_drawn(tab: Tab) -> None:
    for plane in PLANES:
        seen = tab.measure(plane)
        assert seen["high"] - seen["low"] > 100
        assert seen["coloured"] > 20
        assert tab.page.get_attribute(f"#view-{plane}", "aria-label").startswith(f"{plane} slice")


def test_pictures_are_there_and_described(tab: Tab) -> None:
    images = "images => images.map(i => [i.naturalWidth > 10, i.alt.length > 10])"
    found = tab.page.eval_on_selector_all("img", images)
    # Three cases of four modalities, the curves, and one figure per region.
    assert len(found) == 12 + 4
    assert all(drawn and described for drawn, described in found)


def test_a_header_sorts_by_mouse_and_by_keyboard(tab: Tab) -> None:
    header = tab.page.locator("#case-table thead th", has_text="Dice").first
    place = header.evaluate("th => th.cellIndex")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    values = [float(text) for text in tab.column(place)]
    assert values == sorted(values) and len(set(values)) > 5
    header.locator("button").focus()
    tab.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in tab.column(place)] == sorted(values, reverse=True)
    tab.page.locator("#case-table thead th", has_text="Method").locator("button").click()
    assert header.get_attribute("aria-sort") is None
    assert tab.column(2) == sorted(tab.column(2))


def test_numbers_sort_as_numbers_with_their_sign(tab: Tab) -> None:
    header = tab.page.locator("#case-table thead th", has_text="Difference")
    header.locator("button").click()
    texts = tab.column(header.evaluate("th => th.cellIndex"))
    # The case that failed has no difference: such rows stand at the end, whichever way the others run.
    assert texts[-3:] == ["–"] * 3
    values = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts[:-3]]
    assert values == sorted(values) and values[0] < 0 < values[-1]
    header.locator("button").click()
    assert tab.column(header.evaluate("th => th.cellIndex"))[-3:] == ["–"] * 3


def test_filters_narrow_the_table(tab: Tab) -> None:
    page = tab.page
    assert len(tab.column(0)) == 27
    page.fill("#filter-text", "00001-000")
    assert set(tab.column(0)) == {"BraTS-PHT-00001-000"} and len(tab.column(0)) == 9
    page.select_option("#filter-run", "lora")
    page.select_option("#filter-region", "TC")
    assert tab.column(2) == ["lora"] and tab.column(3) == ["TC"]
    assert page.text_content("#filter-count") == "1 of 27 rows"
    page.click("#filter-clear")
    assert len(tab.column(0)) == 27
    page.fill("#filter-text", "missing")
    assert len(tab.column(0)) == 3


def test_arrow_keys_change_the_slice(tab: Tab) -> None:
    page = tab.page
    for plane in PLANES:
        page.focus(f"#view-{plane}")
        first = tab.measure(plane)
        page.keyboard.press("ArrowUp")
        second = tab.measure(plane)
        assert second["index"] == first["index"] + 1
        assert second["hash"] != first["hash"]
        assert page.input_value(f"#slice-{plane}") == str(second["index"])
        page.keyboard.press("ArrowDown")
        assert tab.measure(plane) == first
        page.keyboard.press("End")
        last = int(page.get_attribute(f"#slice-{plane}", "max"))
        assert tab.measure(plane)["index"] == last
        page.keyboard.press("ArrowUp")
        assert tab.measure(plane)["index"] == last
        page.keyboard.press("PageDown")
        assert tab.measure(plane)["index"] == last - 10


def test_a_slider_moves_its_plane(tab: Tab) -> None:
    tab.page.focus("#slice-coronal")
    before = tab.measure("coronal")
    tab.page.keyboard.press("ArrowRight")
    after = tab.measure("coronal")
    assert after["index"] == before["index"] + 1 and after["hash"] != before["hash"]
    assert f"{after['index'] + 1} / " in tab.page.text_content("#place-coronal")


def test_the_wheel_moves_a_plane_that_has_the_focus_and_else_the_page(tab: Tab) -> None:
    page = tab.page
    page.evaluate("document.getElementById('viewer').scrollIntoView()")
    page.hover("#view-sagittal")
    before = tab.measure("sagittal")
    page.focus("#view-sagittal")
    page.mouse.wheel(0, -100)
    page.wait_for_function(
        "index => document.getElementById('view-sagittal').dataset.index === index", arg=str(before["index"] + 1)
    )
    page.focus("#view-coronal")
    place = page.evaluate("window.scrollY")
    page.mouse.wheel(0, 100)
    page.wait_for_function("place => window.scrollY > place", arg=place)
    assert tab.measure("sagittal")["index"] == before["index"] + 1


def test_a_click_moves_the_other_planes(tab: Tab) -> None:
    page = tab.page
    page.evaluate("document.getElementById('viewer').scrollIntoView()")
    box = page.locator("#view-transverse").bounding_box()
    last = {plane: int(page.get_attribute(f"#slice-{plane}", "max")) for plane in PLANES}
    # A quarter from the left is the patient's right; a tenth from the top is the front.
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 10)
    assert tab.measure("sagittal")["index"] == pytest.approx(last["sagittal"] * 3 / 4, abs=1)
    assert tab.measure("coronal")["index"] == pytest.approx(last["coronal"] * 9 / 10, abs=1)


def test_modalities_look_different(tab: Tab) -> None:
    page, case = tab.page, tab.page.input_value("#viewer-case")
    seen = set()
    for key, name in enumerate(("t1n", "t1c", "t2f", "t2w"), 1):
        page.focus("#view-transverse")
        page.keyboard.press(str(key))
        tab.wait_for(f"{case} {name} lora")
        seen.add(tab.measure()["hash"])
    assert len(seen) == 4
    page.check("input[name=modality][value=t1c]", force=True)
    tab.wait_for(f"{case} t1c lora")
    assert tab.measure()["hash"] in seen


def test_opacity_0_is_no_overlay(tab: Tab) -> None:
    page = tab.page
    with_overlays = tab.measure()
    page.fill("#viewer-opacity", "0")
    transparent = tab.measure()
    assert transparent["hash"] != with_overlays["hash"]
    page.fill("#viewer-opacity", "80")
    page.uncheck("#viewer-reference")
    page.uncheck("#viewer-prediction")
    assert tab.measure() == transparent


@pytest.mark.parametrize("control", ["reference", "prediction", "outline", "crosshair"])
def test_toggles_change_what_is_drawn(tab: Tab, control: str) -> None:
    before = tab.measure()
    tab.page.set_checked(f"#viewer-{control}", not tab.page.is_checked(f"#viewer-{control}"))
    assert tab.measure()["hash"] != before["hash"]
    tab.page.focus("#view-transverse")
    tab.page.keyboard.press({"reference": "r", "prediction": "p", "outline": "o", "crosshair": "x"}[control])
    assert tab.measure() == before


def test_every_region_has_its_own_switch(tab: Tab) -> None:
    seen = {tab.measure()["hash"]}
    for region in ("ET", "TC", "WT"):
        tab.page.uncheck(f"#viewer-region-{region}")
        seen.add(tab.measure()["hash"])
    assert len(seen) == 4
    # No region, no overlay.
    bare = tab.measure()
    tab.page.fill("#viewer-opacity", "0")
    assert tab.measure() == bare


def test_other_methods_and_cases_are_shown(tab: Tab) -> None:
    page = tab.page
    cases = page.eval_on_selector_all("#viewer-case option", "options => options.map(o => o.value)")
    first = tab.measure()
    page.select_option("#viewer-run", "zero_shot")
    tab.wait_for(f"{cases[0]} t2f zero_shot")
    assert tab.measure()["hash"] != first["hash"]
    page.click("#viewer-next")
    tab.wait_for(f"{cases[1]} t2f zero_shot")
    page.select_option("#viewer-case", cases[2])
    tab.wait_for(f"{cases[2]} t2f zero_shot")
    assert "no usable prediction by zero_shot" in page.text_content("#viewer-status")
    page.select_option("#viewer-run", "filled_box")
    tab.wait_for(f"{cases[2]} t2f filled_box")
    assert tab.measure()["coloured"] > 20


def test_a_row_of_the_table_opens_in_the_viewer(tab: Tab) -> None:
    page = tab.page
    row = page.locator("#case-table tbody tr[data-run=zero_shot]").nth(3)
    case = row.get_attribute("data-case")
    row.locator("button").focus()
    page.keyboard.press("Enter")
    tab.wait_for(f"{case} t2f zero_shot")
    assert page.evaluate("document.activeElement.id") == "view-transverse"
    other = page.locator("#case-table tbody tr[data-run=lora]").last
    other.locator("td").nth(3).click()
    tab.wait_for(f"{other.get_attribute('data-case')} t2f lora")
    scores = other.locator("[data-column=dice]").text_content()
    assert f"ET {scores}" in page.text_content("#viewer-status")


def test_all_controls_are_reached_by_tab_and_named(tab: Tab) -> None:
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(140):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    wanted = {"filter-text", "filter-run", "filter-region", "filter-clear", "viewer-case", "viewer-run"}
    wanted |= {"viewer-reference", "viewer-prediction", "viewer-opacity", *(f"view-{p}" for p in PLANES)}
    assert wanted | {f"slice-{p}" for p in PLANES} <= reached
    unnamed = "nodes => nodes.filter(n => !n.labels?.length && !n.getAttribute('aria-label')).map(n => n.id)"
    assert page.eval_on_selector_all("input, select, canvas", unnamed) == []


@pytest.mark.parametrize("width", [360, 412, 800])
def test_a_narrow_window_scrolls_down_only(open_tab: Callable[..., Tab], page_path: Path, width: int) -> None:
    tab = open_tab(page_path, width, 740)
    assert tab.overflow() <= 0
    assert all(tab.measure(plane)["width"] > 100 for plane in PLANES)


def test_print_shows_all_rows_and_no_controls(tab: Tab) -> None:
    page = tab.page
    page.emulate_media(media="print")
    assert page.is_hidden(".controls") and page.is_hidden(".filters") and page.is_hidden("#slice-coronal")
    cut = "nodes => nodes.filter(n => n.scrollHeight > n.clientHeight + 1).length"
    assert page.eval_on_selector_all(".scroll", cut) == 0
    assert tab.measure()["high"] > 100  # the planes print as they stand
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_javascript_the_scores_are_there(browser: Any, page_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_path.as_uri())
    assert page.locator("#case-table tbody tr").count() == 27
    assert page.is_visible("#case-table") and page.is_hidden(".controls")
    assert "needs JavaScript" in page.text_content("#viewer")
    context.close()


# Head of 34 x 42 x 26 voxels of 2 x 1.5 x 3 mm; a block at its right, front and top.
SPACING = np.array([2.0, 1.5, 3.0])
SHAPE = np.array([34, 42, 26])
LOW, HIGH = np.array([24, 30, 16]), np.array([32, 38, 24])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRP"])
@pytest.mark.parametrize("max_mib", [48, 0.02])
def test_a_landmark_is_where_radiologists_look_for_it(
    open_tab: Callable[..., Tab], tmp_path: Path, codes: str, max_mib: float
) -> None:
    """The case is written in several orders of axes; the page is the same, also where it had to be made coarser."""
    record = landmark_case(tmp_path / "data", codes)
    run = make_runs(tmp_path / "out", tmp_path / "data", [record], {"lora": close})
    tab = open_tab(report([run], tmp_path / "r.html", max_mib=max_mib))
    said = tab.page.text_content("#viewer-grid")
    assert ("measured at full resolution (2 × 1.5 × 3 mm)" in said) == (max_mib < 1)
    tab.page.fill("#viewer-opacity", "0")
    tab.page.check("input[name=modality][value=t1c]", force=True)
    tab.wait_for("landmark t1c lora")
    # Voxels from the edge to the near and far side of the block, as shares: right, front and top are at 0.
    near, far = 1 - HIGH / SHAPE, 1 - LOW / SHAPE
    expected = {"transverse": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
    for plane in PLANES:
        tab.page.evaluate(KEEP, plane)
        tab.page.check("input[name=modality][value=t1n]", force=True)
        tab.wait_for("landmark t1n lora")
        across, down = expected[plane]
        box = tab.page.evaluate(CHANGED, plane)
        tolerance = 0.03 if max_mib > 1 else 0.1
        assert box == pytest.approx([near[across], near[down], far[across], far[down]], abs=tolerance)
        tab.page.check("input[name=modality][value=t1c]", force=True)
        tab.wait_for("landmark t1c lora")
    # One scale for all planes: the sides of each are those of the head.
    for plane, (across, down) in expected.items():
        seen = tab.measure(plane)
        sides = SPACING * SHAPE
        assert seen["width"] / seen["height"] == pytest.approx(sides[across] / sides[down], rel=0.06)


def landmark_case(root: Path, codes: str) -> CaseRecord:
    """A case whose t1n shows the block; noise in t2f, so that a small budget makes it coarser."""
    affine = np.diag([*SPACING, 1.0])
    block = np.full(SHAPE, 100, np.int16)
    block[24:32, 30:38, 16:24] = 1000
    noise = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
    seg = np.zeros(SHAPE, np.int16)
    seg[24:32, 30:38, 16:24] = 2
    seg[26:30, 32:36, 18:22] = 3
    files = {}
    arrays = {"t1n": block, "t1c": np.full(SHAPE, 100, np.int16), "t2f": noise, "t2w": block // 2, "seg": seg}
    arrays["t1c"][0, 0, 0] = 101  # constant files are a fault
    for key, array in arrays.items():
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(codes))
        )
        moved = nib.orientations.apply_orientation(array, turn)
        turned = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
        files[key] = f"{key}.nii.gz"
        save(root / files[key], np.ascontiguousarray(moved), turned)
    return CaseRecord("landmark", "p", "test", files, "brats2023", "")


def test_without_images_the_report_has_no_viewer_and_says_so(
    open_tab: Callable[..., Tab], pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tab = open_tab(report([pipeline], tmp_path / "r.html", root=tmp_path))
    assert tab.page.query_selector("#viewer") is None
    assert "this report has no viewer" in tab.page.text_content("header")
    assert "this report has no viewer" in caplog.text
    assert tab.page.locator("#case-table tbody tr").count() == 27
    tab.page.locator("#case-table thead th", has_text="Dice").first.locator("button").click()
    assert len(tab.column(0)) == 27
