"""Every number of the page is found again: in the CSV it names, or by computing it from there once more."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

VOID = {"meta", "input", "img", "br", "link", "path", "circle"}
MINUS = "\N{MINUS SIGN}"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    around: list[Element] = field(default_factory=list)


class Page(HTMLParser):
    """All elements with their texts and what they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.texts: list[tuple[str, list[Element]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs}, around=list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data
        self.texts.append((data, list(self.open)))

    def numbers(self) -> list[Element]:
        return [e for e in self.elements if "num" in e.attributes.get("class", "").split()]


@dataclass
class Report:
    page: Page
    tables: dict[str, list[dict[str, str]]]
    records: dict[str, dict]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def report(page_path: Path) -> Report:
    page = Page(page_path.read_text(encoding="utf-8"))
    files, tables, records = {}, {}, {}
    for row in page.elements:
        if row.tag == "tr" and re.fullmatch(r"[sr]\d+", row.attributes.get("id", "")):
            key, path, digest = (e.text for e in page.elements if e.tag == "td" and row in e.around)
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
            files[key] = Path(path)
            if key.startswith("s"):
                with Path(path).open(newline="") as handle:
                    tables[key] = list(csv.DictReader(handle))
            else:
                records[key] = json.loads(Path(path).read_text())
    return Report(page, tables, records, files)


def test_the_page_names_the_tables_of_the_pipeline(report: Report, pipeline: Path) -> None:
    used = {path for key, path in report.files.items() if key.startswith("s")}
    assert used == {pipeline / "runs" / name / "per_case.csv" for name in ("filled_box", "zero_shot", "lora")}


def test_every_number_says_its_value_and_its_source(report: Report) -> None:
    numbers = report.page.numbers()
    assert len(numbers) > 300
    for number in numbers:
        assert set(number.attributes) >= {"data-value", "data-source"}


def test_no_decimal_number_stands_outside(report: Report) -> None:
    """Otherwise the other tests could pass over numbers that are not marked as such."""
    seen = 0
    for text, around in report.page.texts:
        sections = {e.attributes.get("id") for e in around}
        if not sections & {"headline", "cases", "extremes"} or not re.search(r"\d\.\d", text):
            continue
        seen += 1
        assert any("num" in e.attributes.get("class", "").split() for e in around), text
    assert seen > 300


def test_the_text_is_the_value_rounded(report: Report) -> None:
    for number in report.page.numbers():
        shown = number.text.replace(MINUS, "-")
        digits = len(shown.partition(".")[2])
        assert float(shown) == pytest.approx(float(number.attributes["data-value"]), abs=0.5000001 * 10**-digits)
        # Rounded so far that nothing is left is only right where there is little.
        if float(shown) == 0 and digits >= 3:
            assert abs(float(number.attributes["data-value"])) <= 0.0005


def test_cells_are_those_of_the_csv(report: Report) -> None:
    cells = [n for n in report.page.numbers() if n.attributes["data-source"].startswith("s")]
    assert len(cells) > 200
    for number in cells:
        key, line, column = number.attributes["data-source"].split("/")
        row = report.tables[key][int(line) - 1]
        assert row[column] == number.attributes["data-value"]
        owner = next(e for e in reversed(number.around) if "data-case" in e.attributes)
        assert owner.attributes["data-case"] == row["case_id"]
        assert owner.attributes["data-run"] == row["method"]
        assert owner.attributes.get("data-region", row["region"]) == row["region"]
        cell = next((e for e in reversed(number.around) if "data-column" in e.attributes), None)
        assert cell is None or cell.attributes["data-column"] == column


def test_every_row_of_the_csvs_is_in_the_table_of_cases(report: Report) -> None:
    table = next(e for e in report.page.elements if e.attributes.get("id") == "case-table")
    rows = [
        e.attributes
        for e in report.page.elements
        if e.tag == "tr" and table in e.around and "data-case" in e.attributes
    ]
    shown = sorted((a["data-case"], a["data-run"], a["data-region"]) for a in rows)
    known = sorted((r["case_id"], r["method"], r["region"]) for rows in report.tables.values() for r in rows)
    assert shown == known and len(known) == 27


def test_derived_numbers_are_computed_again(report: Report) -> None:
    derived = [n for n in report.page.numbers() if n.attributes["data-source"].startswith("derived/")]
    assert {n.attributes["data-source"].split("/")[1] for n in derived} == {
        *("mean", "low", "high", "difference_mean", "difference_low", "difference_high"),
        *("won", "pairs", "n", "failed", "cases", "patients"),
    }
    rows = [row for table in report.tables.values() for row in table]
    for number in derived:
        _, statistic, column, *rest = number.attributes["data-source"].split("/")
        value = float(number.attributes["data-value"])
        if statistic in ("cases", "patients"):
            assert value == len({row[column] for row in rows})
            continue
        method, region = rest
        mine = [row for row in rows if (row["method"], row["region"]) == (method, region)]
        assert value == pytest.approx(again(statistic, column, mine, rows), abs=1e-12), number.attributes


def again(statistic: str, column: str, mine: list[dict[str, str]], rows: list[dict[str, str]]) -> float:
    if statistic == "n":
        return len(mine)
    if statistic == "failed":
        return sum(row["status"] != "ok" for row in mine)
    values = {row["case_id"]: float(row[column]) for row in mine}
    if statistic.startswith("difference_") or statistic in ("won", "pairs"):
        base = {
            r["case_id"]: float(r[column])
            for r in rows
            if (r["method"], r["region"]) == ("zero_shot", mine[0]["region"])
        }
        values = {case: value - base[case] for case, value in values.items() if case in base}
    if statistic == "won":
        return sum(value > 0 for value in values.values())
    if statistic == "pairs":
        return len(values)
    patients = {row["case_id"]: row["patient_id"] for row in mine}
    return bootstrap(values, patients)[statistic.removeprefix("difference_")]


def bootstrap(values: dict[str, float], patients: dict[str, str]) -> dict[str, float]:
    """Resampling of patients, one resample after the other; resamples and seed are those of the fixture."""
    names = sorted(set(patients.values()))
    drawn = np.random.default_rng(1).integers(len(names), size=(200, len(names)))
    means = []
    for sample in drawn:
        chosen = [values[case] for index in sample for case in values if patients[case] == names[index]]
        means.append(sum(chosen) / len(chosen))
    mean = sum(values.values()) / len(values)
    if len(names) == 1:
        return {"mean": mean, "low": mean, "high": mean}
    return {"mean": mean, "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975))}


def test_numbers_of_the_run_record_are_those_of_the_json(report: Report) -> None:
    numbers = [n for n in report.page.numbers() if n.attributes["data-source"].startswith("r")]
    assert {n.attributes["data-source"].partition("/")[2] for n in numbers} >= {"duration_s", "peak_memory_mib"}
    for number in numbers:
        key, *path = number.attributes["data-source"].split("/")
        value = report.records[key]
        for name in path:
            value = value[name]
        assert float(number.attributes["data-value"]) == value


def test_the_label_maps_of_the_viewer_are_those_that_were_scored(report: Report) -> None:
    """Dice of what the viewer shows, of every case, run and region, is the Dice of the CSV."""
    viewer = json.loads(next(e.text for e in report.page.elements if e.attributes.get("id") == "viewer-data"))
    blobs = {e.attributes["id"]: e.text for e in report.page.elements if e.attributes.get("id", "").startswith("v")}

    def voxels(key: str) -> np.ndarray:
        return np.frombuffer(gzip.decompress(base64.b64decode(blobs[key])), np.uint8)

    known = {(r["case_id"], r["method"], r["region"]): r for rows in report.tables.values() for r in rows}
    compared = 0
    for case in viewer["cases"]:
        reference = voxels(case["reference"])
        for (case_id, method, region), row in known.items():
            if case_id != case["id"]:
                continue
            if row["status"] != "ok":
                assert method not in case["predictions"]
                continue
            a, b = ((codes & viewer["bits"][region]) > 0 for codes in (reference, voxels(case["predictions"][method])))
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) == pytest.approx(float(row["dice"]), abs=1e-12)
            compared += 1
    assert compared == 24


def test_the_floor_is_marked_and_the_failed_case_counted(report: Report) -> None:
    table = next(e for e in report.page.elements if e.attributes.get("id") == "headline-table")
    rows = [e for e in report.page.elements if e.tag == "tr" and table in e.around and "data-run" in e.attributes]
    assert [(r.attributes["data-run"], r.attributes["data-region"]) for r in rows] == [
        (run, region) for region in ("WT", "TC", "ET") for run in ("filled_box", "zero_shot", "lora")
    ]
    for row in rows:
        assert ("floor: the filled box" in row.text) == (row.attributes["data-run"] == "filled_box")
        failed = next(n for n in report.page.numbers() if row in n.around and "/failed/" in n.attributes["data-source"])
        assert failed.text == ("1" if row.attributes["data-run"] == "zero_shot" else "0")


def test_nothing_is_fetched_and_nothing_is_unescaped(page_path: Path, report: Report) -> None:
    for element in report.page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not re.match(r"\s*(https?:)?//", element.attributes.get(name, "")), element
    text = page_path.read_text(encoding="utf-8")
    policies = [e.attributes["content"] for e in report.page.elements if "http-equiv" in e.attributes]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policies[0]
    assert "@import" not in text and "url(" not in text
    # The recorded command of the fixture holds markup.
    assert "<b>bold</b>" not in text and "&lt;b&gt;bold&lt;/b&gt;" in text


def test_the_record_says_what_was_asked_for(report: Report) -> None:
    section = next(e for e in report.page.elements if e.attributes.get("id") == "record")
    for name in ("Command (training)", "Prompt source", "Post-processing", "Seeds", "Device", "Training time"):
        assert name in section.text
    for value in ("ab" * 32, "reference_box", "training 3", "MiB", "monai 1.6.1", "rank: 8"):
        assert value in section.text


def test_what_reference_boxes_mean_is_said(report: Report) -> None:
    header = next(e for e in report.page.elements if e.tag == "header")
    assert "not for diagnosis" in header.text
    assert "not how well a tumour is found" in header.text
