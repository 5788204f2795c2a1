"""The manifest as a file: what is written is read, and every bad line is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medsam_lora.errors import ManifestError
from medsam_lora.io.manifest import case_path, parse_manifest, read_manifest, write_manifest
from medsam_lora.records import CaseRecord

HEADER = "case_id,patient_id,split,t1n,t1c,t2f,t2w,seg,label_convention,sha256"
GOOD = CaseRecord(
    "BraTS-MEN-00001-000",
    "BraTS-MEN-00001",
    "train",
    {"t1n": "a/1-t1n.nii.gz", "t1c": "a/1 t1c.nii.gz", "t2f": "a/1,t2f.nii.gz", "t2w": "t2w.nii", "seg": "é.nii.gz"},
    "brats2023",
    "ab" * 32,
)
SPARSE = CaseRecord("x", "x", "", {"t2f": "x.nii.gz"}, "binary", "")


def test_what_is_written_is_read_and_the_bytes_are_these(tmp_path: Path) -> None:
    path = tmp_path / "M.csv"
    write_manifest(path, [GOOD, SPARSE])
    assert read_manifest(path) == [GOOD, SPARSE]
    assert path.read_text(encoding="utf-8").splitlines() == [
        HEADER,
        "BraTS-MEN-00001-000,BraTS-MEN-00001,train,a/1-t1n.nii.gz,a/1 t1c.nii.gz,"
        f'"a/1,t2f.nii.gz",t2w.nii,é.nii.gz,brats2023,{"ab" * 32}',
        "x,x,,,,x.nii.gz,,,binary,",
    ]


def test_a_table_that_passed_through_a_spreadsheet_is_read(tmp_path: Path) -> None:
    # byte-order mark, CRLF, columns in another order, one of the user's own, spaces, blank lines
    path = tmp_path / "M.csv"
    columns = ["site", *reversed(HEADER.split(","))]
    cells = ["Ward 7", "", " binary ", "", "", "x.nii.gz", "", "", "", "x", "x"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([",".join(columns), "", ",".join(cells), ",,,", ""]).encode())
    assert read_manifest(path) == [SPARSE]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"case_id": "../evil"}, "bad_case_id", "'../evil'"),
        ({"case_id": ""}, "bad_case_id", "''"),
        ({"case_id": "-a"}, "bad_case_id", "'-a'"),
        ({"case_id": "=1+2"}, "bad_case_id", "'=1+2'"),
        ({"case_id": "a" * 129}, "bad_case_id", "aaa"),
        ({"case_id": "nul.x"}, "bad_case_id", "'nul.x'"),
        ({"patient_id": ""}, "bad_patient_id", "patient id ''"),
        ({"split": "trian"}, "unknown_split", "'trian'"),
        ({"label_convention": "brats2019"}, "unknown_convention", "'brats2019'"),
        ({"sha256": "abc"}, "bad_sha256", "64 hexadecimal"),
        ({"files": {"t1c": "/etc/passwd"}}, "path_outside_root", "t1c"),
        ({"files": {"t1c": "a/../../b.nii.gz"}}, "path_outside_root", "t1c"),
        ({"files": {"seg": "a\\b.nii.gz"}}, "path_outside_root", "seg"),
        ({"files": {"seg": "C:/b.nii.gz"}}, "path_outside_root", "seg"),
    ],
)
def test_a_bad_line_is_neither_read_nor_written(tmp_path: Path, change: dict, code: str, words: str) -> None:
    path = tmp_path / "M.csv"
    bad = replace(SPARSE, **change)
    cells = [bad.case_id, bad.patient_id, bad.split, *(bad.files.get(k, "") for k in HEADER.split(",")[3:8])]
    line = ",".join([*cells, bad.label_convention, bad.sha256])
    path.write_text(f"{HEADER}\nfine,fine,,,f.nii,,,,msd,\n{line}\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert caught.value.message.startswith("line 3: ")
    assert words in caught.value.message
    assert caught.value.code == code
    assert caught.value.remedy
    assert [number for number, _ in parse_manifest(path)] == [2, 3]  # parsing alone does not judge
    with pytest.raises(ManifestError):
        write_manifest(tmp_path / "out.csv", [bad])
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("case_id", ["a", "a" * 128, "0.1_-", "Brats18_2013_11_1", "console"])
def test_unusual_but_good_ids(tmp_path: Path, case_id: str) -> None:
    write_manifest(tmp_path / "M.csv", [replace(SPARSE, case_id=case_id)])
    assert read_manifest(tmp_path / "M.csv")[0].case_id == case_id


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "M.csv"
    path.write_text(
        f"{HEADER}\na,p,train,,,,,,binary,\na b,p,trian,,,,,,binary,\nA,p,test,,,,,,binary,\nc,c,,../x,,,,,bin,\n"
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = caught.value.message
    assert "line 3: the case id 'a b'" in message
    assert "line 3: case 'a b' has the split 'trian'" in message
    assert "line 5: case 'c' has the label convention 'bin'" in message
    assert "line 5: case 'c' has a path in the column t1n" in message
    assert "line 2 and 4: 2 lines have the case id A and a" in message
    assert "patient p is in two splits" in message


def test_lines_of_the_wrong_length_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "M.csv"
    path.write_text(f"{HEADER}\na,a,,,,,,,binary,\nb,b\n\nc,c,,,,,,,binary,,,\n")
    with pytest.raises(ManifestError, match="line 3 has 2 cells; line 5 has 12 cells; the header has 10"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lacks the column case_id"),
        (HEADER.encode(), "has no cases"),
        (HEADER.replace(",seg", "").encode() + b"\na,a,,,,,,binary,", "lacks the column seg"),
        (HEADER.replace("t2f", "t2w").encode() + b"\na,a,,,,,,,binary,", "lacks the column t2f"),
        ((HEADER + ",seg").encode() + b"\na,a,,,,,,,binary,,", "has the column seg twice"),
        (HEADER.replace(",", ";").encode(), "lacks the column case_id"),
        (b"\xff\xfe\x00", "not a CSV table"),
        (HEADER.encode() + b'\n"a,a,,,,,,,binary,', "not a CSV table"),
    ],
)
def test_what_is_no_manifest_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "M.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=words) as caught:
        read_manifest(path)
    assert caught.value.path == path
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "none.csv")


def make_outside(root: Path) -> None:
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "x.nii.gz").touch()


def link_file(root: Path) -> str:
    (root / "x.nii.gz").symlink_to(root.parent / "outside" / "x.nii.gz")
    return "x.nii.gz"


def link_folder(root: Path) -> str:
    (root / "folder").symlink_to(root.parent / "outside")
    return "folder/x.nii.gz"


def climb(root: Path) -> str:
    return "../outside/x.nii.gz"


def absolute(root: Path) -> str:
    return str(root / "x.nii.gz")


@pytest.mark.parametrize("lead_out", [link_file, link_folder, climb, absolute])
def test_a_path_out_of_the_root_is_refused_links_included(tmp_path: Path, lead_out: Callable[[Path], str]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make_outside(root)
    record = replace(SPARSE, files={"t1c": lead_out(root)})
    with pytest.raises(ManifestError) as caught:
        case_path(record, "t1c", root)
    assert (caught.value.code, caught.value.case_id) == ("path_outside_root", "x")


def test_case_path_resolves_inside_the_root_and_knows_what_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "t.nii").touch()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert case_path(replace(SPARSE, files={"t1c": "a/t.nii"}), "t1c", tmp_path) == (tmp_path / "b/t.nii").resolve()
    with pytest.raises(ManifestError) as caught:
        case_path(SPARSE, "seg", tmp_path)
    assert caught.value.code == "missing_reference"
    with pytest.raises(ManifestError) as caught:
        case_path(SPARSE, "t1n", tmp_path)
    assert caught.value.code == "missing_modality"
