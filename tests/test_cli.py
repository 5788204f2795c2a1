"""The command line: what it answers, how fast, and with which exit code."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from medsam_lora import __version__, cli
from medsam_lora.config import Config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.nifti import write_label_map
from medsam_lora.models import MODELS
from medsam_lora.peft import METHODS
from medsam_lora.records import Finding
from medsam_lora.stages import demo as demo_stage
from medsam_lora.stages import info
from medsam_lora.stages.check_submission import QFORM, SHAPE

LEAVES = [
    *(
        ["info"],
        ["verify"],
        ["prepare"],
        ["train"],
        ["predict"],
        ["evaluate"],
        ["compare"],
        ["report"],
        ["run"],
        ["demo"],
        ["pretrain"],
        ["config"],
    ),
    ["check-submission"],
    *(["manifest", "build"], ["manifest", "export"], ["manifest", "import"]),
    *(["weights", "list"], ["weights", "path"], ["weights", "fetch"]),
]
TOY = [
    *("--set", "model.name=vit_nano", "--set", "model.weights=random", "--set", "model.image_size=64"),
    *("--set", "train.epochs=1", "--set", "train.slices_per_epoch=4", "--set", "method.rank=2"),
]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    code = stop.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err


def one_line(err: str, start: str) -> None:
    assert err.count("\n") == 1 and err.startswith(start), err


def fresh(*words: str, **environment: str) -> tuple[str, int]:
    """Standard output of a command in a process of its own that imports nothing heavy, and how many modules it has."""
    heavy = "('torch', 'monai', 'SimpleITK', 'nibabel', 'pandas', 'scipy', 'numpy')"
    script = (
        "import sys\nfrom medsam_lora.cli import main\n"
        f"try: main({list(words)})\n"
        f"finally: print([m for m in {heavy} if m in sys.modules], len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    found, count = done.stderr.strip().rsplit(maxsplit=1)
    assert found == "[]"
    return done.stdout, int(count)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four synthetic cases below ``cases`` and their manifest ``m.csv``."""
    folder = tmp_path_factory.mktemp("cli")
    make_cohort(folder / "cases", 4, 0, (48, 56, 20))
    with pytest.raises(SystemExit):
        cli.main(["manifest", "build", str(folder / "cases"), "--out", str(folder / "m.csv"), "--train", "0.5"])
    return folder


@pytest.mark.parametrize("words", [["info"], ["info", "--json"], ["--help"], ["--version"], ["train", "--help"]])
def test_what_people_ask_first_is_answered_at_once_and_without_heavy_imports(words: list[str]) -> None:
    # Imports are what starting costs: torch alone brings 1,500 modules and takes seconds. Seconds are not tested, as
    # another process may have the core.
    answer, modules = fresh(*words)
    assert modules < 400
    assert answer.strip()


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_describes_itself_and_its_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *words, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: medsam-lora {' '.join(words)}" in out
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    assert len(command.help) <= 70  # fits its line of the list of commands
    shown = [parameter for parameter in command.params if not parameter.hidden]
    assert [parameter.name for parameter in shown if not parameter.help] == []


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys)
    assert "Commands:" in out + err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"medsam-lora {__version__}\n", "")


def test_python_runs_the_package_as_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medsam_lora", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"medsam-lora {__version__}\n"


def test_info_as_json_has_its_keys_and_every_model_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["version", "python", "platform", "packages", "device", "models", "methods"]
    assert found["version"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [model["name"] for model in found["models"]] == list(MODELS)
    assert [method["name"] for method in found["methods"]] == list(METHODS)
    assert {"torch", "monai", "nibabel", "segment-anything", "loralib"} <= set(found["packages"])
    assert "pytest" not in found["packages"]
    assert list(found["device"]) == ["kind", "name", "memory_gib", "cores", "gpus", "note"]
    assert found["device"]["cores"] >= 1


def test_info_tells_people_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "info")
    for name in [*MODELS, *METHODS, "torch", __version__]:
        assert name in out
    assert max(map(len, out.splitlines())) < 160


def test_info_finds_weights_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSAM_LORA_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("MEDSAM_LORA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    found = {model["name"]: model["weights"] for model in json.loads(call(capsys, "info", "--json")[1])["models"]}
    assert found["vit_b"] == str(tmp_path / "sam_vit_b_01ec64.pth")
    assert found["vit_l"] is None and Path(found["vit_nano"]).is_file()
    assert call(capsys, "weights", "path", "vit_b")[:2] == (0, f"{tmp_path / 'sam_vit_b_01ec64.pth'}\n")
    code, _, err = call(capsys, "weights", "path", "vit_l")
    assert code == 2
    one_line(err, "error: the weights of vit_l are not here. Remedy: Run medsam-lora weights fetch vit_l.")
    listed = call(capsys, "weights", "list")[1].splitlines()
    assert [line.split()[0] for line in listed] == ["vit_b", "vit_l", "vit_h", "vit_t", "vit_nano"]


def test_a_misspelt_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "weights", "path", "vit-b")
    assert code == 2
    one_line(err, "error: no model is called 'vit-b'. Remedy: Did you mean vit_b?")


# What the CUDA driver interface declares, for two devices of 80 GiB and 4 GiB.
DRIVER = """
#include <string.h>
int cuInit(unsigned int flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 40 ? "Large" : "Small", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (device == 40 ? 80ul : 4ul) << 30; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build a driver with")
def test_devices_are_read_through_the_driver_interface(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "driver.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "driver.c")], check=True)
    found = info.cuda_devices(library)
    assert found == [{"name": "Large", "memory_gib": 80.0}, {"name": "Small", "memory_gib": 4.0}]
    monkeypatch.setattr(info, "cuda_devices", lambda: found)
    used = info.device("2.13.0")
    assert (used["kind"], used["name"], used["memory_gib"], used["note"]) == ("cuda", "Large", 80.0, "")
    unused = info.device("2.13.0+cpu")
    assert unused["kind"] == "cpu" and "CPU build" in unused["note"] and unused["gpus"] == found


def test_without_a_driver_there_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "not-a-library.so").write_text("text")
    assert info.cuda_devices(str(tmp_path / "not-a-library.so")) == []
    assert info.cuda_devices(str(tmp_path / "absent.so")) == []


def test_config_prints_what_would_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("train: {epochs: 3, lr: 1e-3}\n")
    code, out, _ = call(capsys, "config", "--config", tmp_path / "c.yaml", "--set", "train.epochs=7")
    assert code == 0
    printed = yaml.safe_load(out)
    assert (printed["train"]["epochs"], printed["train"]["lr"]) == (7, 1e-3)
    (tmp_path / "again.yaml").write_text(out)
    assert call(capsys, "config", "--config", tmp_path / "again.yaml")[1] == out


def test_the_schema_documents_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "config", "--schema")
    assert code == 0
    assert list(json.loads(out)["properties"]) == list(Config.model_fields)


@pytest.mark.parametrize("command", ["verify", "prepare", "train", "predict", "evaluate", "run"])
def test_an_unknown_setting_stops_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = Path(__file__).resolve().parent.parent / "pipelines" / "phantom.yaml"
    words = {
        "verify": ["m.csv"],
        "run": [pipeline],
        "prepare": ["--manifest", "m.csv"],
        "train": ["--manifest", "m.csv", "--run", "r"],
        "predict": ["--manifest", "m.csv", "--run", "r", "--out", "o"],
        "evaluate": ["--manifest", "m.csv", "--predictions", "p", "--out", "o"],
    }[command]
    code, out, err = call(capsys, command, *words, "--set", "train.epoch=3")
    assert (code, out) == (2, "")
    one_line(err, "error: ")
    assert "unknown key train.epoch; did you mean train.epochs?" in err
    assert list(tmp_path.iterdir()) == []


def test_a_submission_is_checked_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Geometry(SHAPE, np.array(QFORM, float))
    write_label_map(tmp_path / "s" / "BraTS-MEN-00004-000.nii.gz", np.zeros(SHAPE, np.uint8), grid)
    assert call(capsys, "check-submission", tmp_path / "s") == (0, f"acceptable: {tmp_path / 's'}\n", "")
    (tmp_path / "s" / "notes.txt").write_text("x")
    write_label_map(tmp_path / "s" / "00005-000.nii.gz", np.full(SHAPE, 4), grid)
    code, out, _ = call(capsys, "check-submission", tmp_path / "s")
    assert code == 2
    assert [line.split(": ")[:2] for line in out.splitlines()] == [
        ["00005-000.nii.gz", "unexpected_label"],
        ["notes.txt", "not_nii_gz"],
        ["2 failures", str(tmp_path / "s")],
    ]


def test_an_error_is_one_line_and_its_traceback_is_for_debug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "m.csv"
    code, out, err = call(capsys, "verify", missing)
    assert (code, out) == (2, "")
    one_line(err, f"error: {missing}: no such file")
    for words in (["--debug", "verify", missing], ["verify", missing, "--debug"]):
        code, _, err = call(capsys, *words)
        assert code == 2
        assert "Traceback" in err and "ManifestError" in err
        assert err.splitlines()[-1].startswith(f"error: {missing}: no such file")


@pytest.mark.parametrize(
    "words", [["trian"], ["verify", "--nope"], ["train"], ["prepare", "--workers", "0"], ["manifest", "build"]]
)
def test_wrong_usage_is_unusable_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "Error: " in err and "Traceback" not in err


def test_verify_needs_a_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "verify")
    assert code == 2
    one_line(err, "error: no manifest given")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (DataError("torn", case_id="a-1", remedy="Mend it."), 2, "error: case a-1: torn. Remedy: Mend it.\n"),
        (DataError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped in epoch 3"), 130, "stopped in epoch 3\n"),
        (ValueError("odd"), 70, "internal error: ValueError: odd (run it again with --debug to see where, and "),
    ],
)
def test_what_a_stage_raises_becomes_an_exit_code(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def fail(*_: object) -> int:
        raise raised

    monkeypatch.setattr(demo_stage, "demo", fail)
    found, _, err = call(capsys, "demo")
    assert found == code
    assert err.startswith(line) and err.count("\n") == 1


def test_quiet_is_said_anywhere_and_silences_progress(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MEDSAM_LORA_NO_PROGRESS", "0")
    assert call(capsys, "config", "--quiet")[0] == 0
    assert os.environ["MEDSAM_LORA_NO_PROGRESS"] == "1"


def test_a_folder_becomes_a_manifest_and_a_datalist_and_comes_back(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cohort / "cases"
    code, out, _ = call(capsys, "manifest", "build", root, "--out", tmp_path / "m.csv", "--train", 0.5, "--seed", 3)
    records = read_manifest(tmp_path / "m.csv")
    assert code == 0
    assert out.startswith(f"4 cases of {len({record.patient_id for record in records})} patients (train ")
    assert call(capsys, "manifest", "export", tmp_path / "m.csv", "--out", tmp_path / "d.json")[0] == 0
    words = ["manifest", "import", tmp_path / "d.json", "--root", root, "--out", tmp_path / "again.csv"]
    assert call(capsys, *words)[0] == 0
    assert [(r.case_id, r.split, r.files) for r in read_manifest(tmp_path / "again.csv")] == [
        (r.case_id, r.split, r.files) for r in records
    ]


def test_verify_says_what_is_wrong_and_exits_by_severity(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, manifest = tmp_path / "cases", tmp_path / "m.csv"
    shutil.copytree(cohort / "cases", root)
    shutil.copy(cohort / "m.csv", manifest)
    words = ["--root", root, "--out", tmp_path / "f.csv", "--workers", 1]
    code, out, _ = call(capsys, "verify", manifest, *words)
    assert (code, out) == (0, f"no faults found\nall findings: {tmp_path / 'f.csv'}\n")
    record = read_manifest(manifest)[0]
    torn = root / record.files["t1c"]
    torn.write_bytes(torn.read_bytes()[:-100])
    code, out, _ = call(capsys, "verify", "--manifest", manifest, *words)
    assert code == 2
    assert "error  truncated: 1" in out
    assert f"{record.case_id} {record.files['t1c']}: " in out
    with (tmp_path / "f.csv").open(newline="") as handle:
        assert "truncated" in [row["code"] for row in csv.DictReader(handle)]
    # Nothing but a missing modality: worth a look, and the case is used.
    torn.unlink()
    assert call(capsys, "manifest", "build", root, "--out", tmp_path / "n.csv")[0] == 0
    code, out, _ = call(capsys, "verify", tmp_path / "n.csv", *words)
    assert code == 0
    assert out.splitlines()[0] == "warning  missing_modality: 1"


def test_the_findings_summary_shows_errors_first_and_the_number_of_the_rest() -> None:
    from medsam_lora.commands.data import findings_summary

    warnings = [Finding(f"w-{i}", "", "empty_reference", "warning", "empty", "Look.") for i in range(12)]
    error = Finding("e-1", "a.nii", "truncated", "error", "torn", "Copy it.")
    lines = findings_summary([*warnings, error], Path("f.csv")).splitlines()
    assert lines[:2] == ["error  truncated: 1", "warning  empty_reference: 12"]
    assert lines[2] == "  e-1 a.nii: torn -> Copy it."
    assert lines[3] == "  w-0: empty -> Look."
    assert lines[-2:] == ["  ... and 3 more", "all findings: f.csv"]


def test_the_stages_one_by_one(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, manifest, prepared = cohort / "cases", cohort / "m.csv", tmp_path / "prepared"
    given = ["--manifest", manifest, "--root", root]
    tested = sum(record.split == "test" for record in read_manifest(manifest))
    code, out, _ = call(capsys, "prepare", *given, "--prepared", prepared, "--workers", 1, *TOY)
    store = out.strip().rpartition(": ")[2]
    assert (code, out) == (0, f"prepared 4 cases: {store}\n") and Path(store).parent == prepared
    code, out, _ = call(capsys, "prepare", *given, "--out", prepared, "--workers", 1, *TOY)
    assert (code, out) == (0, f"prepared 0 cases, 4 there already: {store}\n")
    run = tmp_path / "runs" / "lora"
    code, out, _ = call(capsys, "train", *given, "--prepared", prepared, "--run", run, "--device", "cpu", *TOY)
    assert code == 0 and out.startswith("trained lora (")
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["rank"] == 2
    words = ["--run", run, "--out", tmp_path / "p", "--split", "test", "--device", "cpu", *TOY]
    code, out, _ = call(capsys, "predict", *given, *words)
    assert (code, out) == (0, f"predicted {tested} case{'s' * (tested > 1)}: {tmp_path / 'p'}\n")
    words = [*given, "--predictions", tmp_path / "p", "--out", tmp_path / "s", "--workers", 1]
    code, out, _ = call(capsys, "evaluate", *words, "--set", "evaluate.bootstrap=100")
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[:2]] == [["lora", "WT", "Dice"], ["filled_box", "WT", "Dice"]]
    # A prediction that is gone is a failed row, and the others are done.
    next((tmp_path / "p").glob("*.nii.gz")).unlink()
    code, out, err = call(capsys, "evaluate", *words)
    assert code == 1
    assert "1 failed (failures.csv)" in out and err.startswith("failed: BraTS-")
