"""Verify: one broken input per check, all of them found in one run, the same with any number of workers."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_cases import AFFINE, SHAPE, save, voxels, write_case

from medsam_lora.errors import ManifestError
from medsam_lora.io.findings import SEVERITIES
from medsam_lora.io.manifest import assign_splits, discover, read_manifest, write_manifest
from medsam_lora.io.tables import write_table
from medsam_lora.records import CaseRecord, Finding
from medsam_lora.stages import verify as stage
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.verify import in_processes, verify

CHECKOUT = Path(__file__).resolve().parents[2]
IDS = [f"BraTS-MEN-{n:05}-000" for n in range(4)]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Four good cases and their manifest."""
    for case_id in IDS:
        write_case(tmp_path, case_id)
    build_manifest(tmp_path, tmp_path / "M.csv", {}, 0)
    return tmp_path


def file_of(root: Path, key: str, case: int = 0) -> Path:
    return root / IDS[case] / f"{IDS[case]}-{key}.nii.gz"


def rewrite(root: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    """Change the manifest's cells past every check of the writer."""
    with (root / "M.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    columns = list(rows[0])
    change(rows)
    write_table(root / "M.csv", columns, rows)


def rehash(root: Path) -> None:
    """Make the manifest's hashes those of the files, so that only the fault at hand is found."""
    found = {r.case_id: r for r in discover(root)}
    records = read_manifest(root / "M.csv")
    write_manifest(root / "M.csv", [replace(r, sha256=found[r.case_id].sha256) for r in records])


def summary(findings: list[Finding]) -> list[tuple[str, str, str, str]]:
    return [(f.case_id, Path(f.file).name, f.code, f.severity) for f in findings]


def test_a_good_cohort_has_no_findings_and_the_table_is_its_header(cohort: Path) -> None:
    assert verify(cohort / "M.csv", out=cohort / "out" / "findings.csv") == []
    assert (cohort / "out" / "findings.csv").read_text() == "case_id,file,code,severity,detail,remedy\n"


def test_the_root_is_the_manifests_folder_or_the_one_given(
    cohort: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "M.csv"
    (cohort / "M.csv").rename(elsewhere)
    assert verify(elsewhere, cohort) == []
    found = verify(elsewhere)
    assert {f.code for f in found} == {"missing_file"}
    assert len(found) == 20
    with pytest.raises(ManifestError, match="no such data root"):
        verify(elsewhere, cohort / "none")


# --- one fault each: what is done to the cohort, and all that is to be found then ---------------------------------


def cut_in_half(root: Path) -> None:
    path = file_of(root, "t1c")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_crc(root: Path) -> None:
    path = file_of(root, "t1c")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)


def junk(root: Path) -> None:
    file_of(root, "t1c").open("ab").write(b"junk")


def four_axes(root: Path) -> None:
    save(file_of(root, "t1c"), np.ones((*SHAPE, 2), np.int16))


def sheared(root: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 1] = 0.3
    for key in ("t1n", "t1c", "t2f", "t2w", "seg"):
        array = np.asanyarray(nib.load(file_of(root, key)).dataobj)
        nib.save(nib.Nifti1Image(array, affine), file_of(root, key))


def no_affine(root: Path) -> None:
    image = nib.Nifti1Image(voxels(IDS[0], "t1c"), None)
    image.set_sform(None, 0)
    nib.save(image, file_of(root, "t1c"))


def two_affines(root: Path) -> None:
    image = nib.Nifti1Image(voxels(IDS[0], "t1c"), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.eye(4), 1)
    nib.save(image, file_of(root, "t1c"))


def other_grid(root: Path) -> None:
    save(file_of(root, "t1c"), voxels(IDS[0], "t1c")[1:])
    moved = AFFINE.copy()
    moved[1, 3] += 2
    save(file_of(root, "t2w"), voxels(IDS[0], "t2w"), moved)


def nan(root: Path) -> None:
    array = voxels(IDS[0], "t1c").astype(np.float32)
    array[0, 0, :3] = np.nan
    save(file_of(root, "t1c"), array)


def zeros(root: Path) -> None:
    for case in (0, 1):  # two blank files are equal, and no duplicates
        save(file_of(root, "t1c", case), np.zeros(SHAPE, np.int16))


def bad_labels(root: Path) -> None:
    save(file_of(root, "seg", 0), voxels("", "seg", et=4))
    label_map = voxels("", "seg")
    label_map[0, 0, :2], label_map[5, 4, 3] = 255, -1
    save(file_of(root, "seg", 1), label_map)
    save(file_of(root, "seg", 2), voxels("", "seg") * np.float32(0.5))


def no_tumour(root: Path) -> None:
    for case in (0, 1):
        save(file_of(root, "seg", case), np.zeros(SHAPE, np.int16))


def gone(root: Path) -> None:
    file_of(root, "t2f").unlink()


def unlisted(root: Path) -> None:
    rewrite(root, lambda rows: rows[0].update(t2w="", seg="", sha256=""))


def nothing_listed(root: Path) -> None:
    rewrite(root, lambda rows: rows[0].update(t1n="", t1c="", t2f="", t2w="", sha256=""))


def copies(root: Path) -> None:
    file_of(root, "t1c", 1).write_bytes(file_of(root, "t1c", 0).read_bytes())
    file_of(root, "t2w", 2).write_bytes(file_of(root, "t2f", 2).read_bytes())


def a_link_out(root: Path) -> None:
    outside = root.parent / f"{root.name}-outside.nii.gz"
    file_of(root, "t1c").rename(outside)
    file_of(root, "t1c").symlink_to(outside)


def text(root: Path) -> None:
    file_of(root, "seg").write_text("this is no image")


CASES: list[tuple[Callable[[Path], None], list[tuple[int, str, str, str]]]] = [
    (gone, [(0, "t2f", "missing_file", "")]),
    (text, [(0, "seg", "unreadable", "not compressed with gzip")]),
    (cut_in_half, [(0, "t1c", "truncated", "cut")]),
    (wrong_crc, [(0, "t1c", "unreadable", "incorrect data check")]),
    (junk, [(0, "t1c", "trailing_junk", "4 bytes")]),
    (four_axes, [(0, "t1c", "not_3d", "(6, 5, 4, 2)")]),
    (sheared, [(0, k, "sheared_affine", "") for k in ("seg", "t1c", "t1n", "t2f", "t2w")]),
    (no_affine, [(0, "t1c", "no_affine", "")]),
    (two_affines, [(0, "t1c", "qform_sform_mismatch", "qform [1 0 0 0; 0 1 0 0; 0 0 1 0] and sform [-1 0 0 0")]),
    (other_grid, [(0, "t1c", "shape_mismatch", "(5, 5, 4)"), (0, "t2w", "affine_mismatch", "2 voxels")]),
    (nan, [(0, "t1c", "nonfinite", "3 voxels")]),
    (zeros, [(0, "t1c", "all_zero", ""), (1, "t1c", "all_zero", "")]),
    (
        bad_labels,
        [
            (0, "seg", "unexpected_label", "4 (1 voxels)"),
            (1, "seg", "unexpected_label", "-1 (1 voxels), 255 (2 voxels)"),
            (2, "seg", "not_integer_labels", "such as 0.5"),
        ],
    ),
    (no_tumour, [(0, "seg", "empty_reference", ""), (1, "seg", "empty_reference", "")]),
    (unlisted, [(0, "", "missing_modality", "no t2w"), (0, "", "missing_reference", "")]),
    (
        nothing_listed,
        [
            (0, "", "missing_modality", "no image"),
            *((0, "", "missing_modality", f"no {k}") for k in ("t1c", "t1n", "t2f", "t2w")),
        ],
    ),
    (
        copies,
        [
            (0, "t1c", "duplicate_file", f"{IDS[1]} t1c"),
            (1, "t1c", "duplicate_file", f"{IDS[0]} t1c"),
            (2, "t2f", "duplicate_file", f"{IDS[2]} t2w"),
            (2, "t2w", "duplicate_file", f"{IDS[2]} t2f"),
        ],
    ),
    (a_link_out, [(0, "t1c", "path_outside_root", "")]),
]


@pytest.mark.parametrize(("spoil", "expected"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_each_fault_is_found_and_nothing_else(
    cohort: Path, spoil: Callable[[Path], None], expected: list[tuple[int, str, str, str]]
) -> None:
    spoil(cohort)
    if spoil not in (gone, unlisted, nothing_listed, a_link_out):
        rehash(cohort)
    found = verify(cohort / "M.csv")
    named = [(f.case_id, f.file, f.code) for f in found]
    wanted = [
        (IDS[case], f"{IDS[case]}/{IDS[case]}-{key}.nii.gz" if key else "", code) for case, key, code, _ in expected
    ]
    assert named == wanted
    for finding, (_, _, _, words) in zip(found, expected, strict=True):
        assert words in finding.detail
        assert finding.remedy
        assert finding.severity == ("error" if "no image" in words else SEVERITIES[finding.code])


def test_the_hint_for_labels_of_2018(cohort: Path) -> None:
    save(file_of(cohort, "seg"), voxels("", "seg", et=4))
    rehash(cohort)
    (found,) = verify(cohort / "M.csv")
    assert "set label_convention to brats2018" in found.remedy
    rewrite(cohort, lambda rows: rows[0].update(label_convention="brats2018"))
    assert verify(cohort / "M.csv") == []


def test_labels_3_and_4_together_are_not_taken_for_2018(cohort: Path) -> None:
    label_map = voxels("", "seg")
    label_map[0, 0, 0] = 4
    save(file_of(cohort, "seg"), label_map)
    rehash(cohort)
    (found,) = verify(cohort / "M.csv")
    assert "brats2018" not in found.remedy
    assert "resection cavity" in found.remedy


def test_nonfinite_voxels_that_will_be_zeroed_are_a_warning(cohort: Path) -> None:
    nan(cohort)
    rehash(cohort)
    (found,) = verify(cohort / "M.csv", nonfinite="zero")
    assert (found.code, found.severity) == ("nonfinite", "warning")


def test_a_header_over_the_cap_is_found_without_loading(cohort: Path) -> None:
    size = 352 + 6 * 5 * 4 * 2
    assert verify(cohort / "M.csv", max_bytes=size) == []
    found = verify(cohort / "M.csv", max_bytes=size - 1)
    assert {f.code for f in found} == {"too_large"}
    assert len(found) == 20


def test_a_file_changed_since_the_manifest_is_found(cohort: Path) -> None:
    array = voxels(IDS[2], "t2w")
    array[0, 0, 0] += 1
    save(file_of(cohort, "t2w", 2), array)
    assert summary(verify(cohort / "M.csv")) == [(IDS[2], "", "hash_mismatch", "error")]
    rewrite(cohort, lambda rows: rows[2].update(sha256=""))
    assert verify(cohort / "M.csv") == []  # an empty hash promises nothing


def test_what_the_lines_of_the_manifest_say_is_judged(cohort: Path) -> None:
    def spoil(rows: list[dict[str, str]]) -> None:
        rows[0].update(patient_id="p", split="train")
        rows[1].update(patient_id="p", split="test")
        rows[2].update(label_convention="brats99", sha256="xyz", split="dev")
        rows[3].update(t1n="../t1n.nii.gz", case_id="a/b")
        rows.append(rows[0] | {"case_id": IDS[0].lower()})

    rewrite(cohort, spoil)
    with pytest.raises(ManifestError):
        read_manifest(cohort / "M.csv")
    assert {(f.case_id, f.code) for f in verify(cohort / "M.csv") if f.code != "duplicate_file"} == {
        (IDS[0], "patient_in_two_splits"),
        (IDS[1], "patient_in_two_splits"),
        (IDS[0].lower(), "patient_in_two_splits"),
        (IDS[0], "duplicate_case"),
        (IDS[2], "unknown_convention"),
        (IDS[2], "bad_sha256"),
        (IDS[2], "unknown_split"),
        (IDS[2], "hash_mismatch"),
        ("a/b", "bad_case_id"),
        ("a/b", "path_outside_root"),
    }


def test_a_table_that_is_no_manifest_is_an_error_with_all_bad_lines(cohort: Path) -> None:
    with (cohort / "M.csv").open("a") as handle:
        handle.write("too,few\nanother,one,too\n")
    with pytest.raises(ManifestError, match="line 6 has 2 cells; line 7 has 3 cells"):
        verify(cohort / "M.csv", out=cohort / "findings.csv")
    assert not (cohort / "findings.csv").exists()


def everything(root: Path) -> None:
    """A different fault in every case, several in the first."""
    cut_in_half(root)
    nan_file = voxels(IDS[0], "t2f").astype(np.float32)
    nan_file[0, 0, 0] = np.inf
    save(file_of(root, "t2f"), nan_file[:-1])
    save(file_of(root, "seg", 1), voxels("", "seg", et=4))
    file_of(root, "t1n", 2).unlink()


def test_all_faults_of_all_cases_are_found_in_one_run_with_any_number_of_workers(cohort: Path) -> None:
    everything(cohort)
    found = verify(cohort / "M.csv", out=cohort / "one.csv", workers=1)
    assert summary(found) == [
        (IDS[0], "", "hash_mismatch", "error"),
        (IDS[0], f"{IDS[0]}-t1c.nii.gz", "truncated", "error"),
        (IDS[0], f"{IDS[0]}-t2f.nii.gz", "nonfinite", "error"),
        (IDS[0], f"{IDS[0]}-t2f.nii.gz", "shape_mismatch", "error"),
        (IDS[1], "", "hash_mismatch", "error"),
        (IDS[1], f"{IDS[1]}-seg.nii.gz", "unexpected_label", "error"),
        (IDS[2], f"{IDS[2]}-t1n.nii.gz", "missing_file", "error"),
    ]
    assert verify(cohort / "M.csv", out=cohort / "two.csv", workers=2) == found
    assert (cohort / "two.csv").read_bytes() == (cohort / "one.csv").read_bytes()
    with (cohort / "one.csv").open(newline="") as handle:
        assert [Finding(**row) for row in csv.DictReader(handle)] == found


def test_an_unforeseen_failure_is_a_finding_of_its_case(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_case(record: CaseRecord, *args: object, **options: object) -> object:
        if record.case_id == IDS[1]:
            raise MemoryError("no room for it")
        return original(record, *args, **options)  # type: ignore[arg-type]

    original = stage.check_case
    monkeypatch.setattr(stage, "check_case", check_case)
    cut_in_half(cohort)
    found = [f for f in verify(cohort / "M.csv") if f.code != "hash_mismatch"]
    assert [(f.case_id, f.code) for f in found] == [(IDS[0], "truncated"), (IDS[1], "check_failed")]
    assert "MemoryError: no room for it" in found[1].detail


def double_or_die(number: int) -> int:
    if number == 2:
        os._exit(9)  # as the kernel does when memory runs out
    return number * 2


def test_a_process_that_is_killed_costs_its_own_job_only() -> None:
    assert list(in_processes(double_or_die, [0, 1, 2, 3], workers=2)) == [0, 2, None, 6]


def test_every_code_is_documented_with_its_severity() -> None:
    page = (CHECKOUT / "docs" / "findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert {code: severity for code, severity, *_ in rows} == dict(SEVERITIES)
    assert len(rows) == len(SEVERITIES)


def test_the_codes_of_the_source_are_the_documented_ones() -> None:
    package = CHECKOUT / "medsam_lora"
    used = set()
    readers = ("examine", "voxels", "findings", "manifest", "splits", "discovery", "checks", "case")
    for path in [*(package / "io" / f"{n}.py" for n in readers), package / "labels.py", package / "stages/verify.py"]:
        used |= set(re.findall(r"(?:\bfinding\(|\bcode=)\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert used == set(SEVERITIES)


def test_verify_imports_neither_torch_nor_monai(cohort: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medsam_lora.stages.verify import verify; "
        "import medsam_lora.stages.manifest, medsam_lora.io.case; "
        f"assert verify(Path({str(cohort / 'M.csv')!r})) == []; "
        "print([m for m in ('torch', 'monai', 'SimpleITK', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_real_cases_are_clean(brats_dir: Path, tmp_path: Path) -> None:
    records = assign_splits(discover(brats_dir), {}, 0)
    write_manifest(tmp_path / "M.csv", records)
    assert verify(tmp_path / "M.csv", brats_dir) == []
