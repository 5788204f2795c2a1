"""What the documents promise: their commands exist, their links lead somewhere, and CI runs what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medsam_lora.cli import app
from medsam_lora.stages.pipeline import PipelineSection

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for path in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("*/README.md")]
    if not path.relative_to(CHECKOUT).parts[0].startswith(".")
)
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
CI = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Words of a command line after the program's name, up to the end of the line or of the inline code.
COMMAND = re.compile(r"(?<![\w/-])medsam-lora ([^\n`|;&]+)")
CODE = re.compile(r"```\w*\n(.*?)```|`([^`]+)`|^    (\S.*)$", re.DOTALL | re.MULTILINE)

# A folder of one machine (not one below another folder), or where a package index lives.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|farm|home|root|Users|mnt|opt)/\w|/tmp/(?:venv|plan)")
REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links|pypi\.org|pythonhosted|registry\.npmjs", re.IGNORECASE)


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def line_to_copy(title: str) -> str:
    blocks = re.findall(r"```bash\n(.*?)```", section(title), re.DOTALL)
    assert len(blocks) == 1 and blocks[0].count("\n") == 1, f"the section {title} needs one line to copy"
    return blocks[0].strip()


def commands() -> dict[str, set[str] | None]:
    """Every sub-command, with its own sub-commands where it has some."""
    found: dict[str, set[str] | None] = {str(command.name): None for command in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found[str(group.name)] = {str(command.name) for command in group.typer_instance.registered_commands}
    return found


def unknown_commands(text: str) -> list[str]:
    known = commands()
    unknown = []
    code = "\n".join(part for match in CODE.findall(text) for part in match if part)
    for line in COMMAND.findall(code):
        words = [word for word in line.split() if not word.startswith("-")] or [""]
        name, *rest = words
        if name not in known and name.isalpha() and name.islower():
            unknown.append(name)
        elif (below := known.get(name)) and rest and rest[0].isalpha() and rest[0].islower() and rest[0] not in below:
            unknown.append(f"{name} {rest[0]}")
    return unknown


def dead_links(path: Path, text: str) -> list[str]:
    targets = [target.partition("#")[0] for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [target for target in targets if target and not (path.parent / target).exists()]


def tracked_texts() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    texts = []
    for name in listed.stdout.decode().split("\0"):
        path = CHECKOUT / name
        if name and path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts.append((name, data.decode("utf-8")))
    return texts


def test_the_two_lines_are_enough_on_a_fresh_clone() -> None:
    run, test = line_to_copy("Run it"), line_to_copy("Test it")
    for line in (run, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert run.endswith("&& .venv/bin/medsam-lora demo")
    assert "'.[test]'" in test and test.endswith("&& .venv/bin/python -m pytest -q")


@pytest.mark.parametrize("title", ["Run it", "Test it"])
def test_ci_runs_the_very_line_of_the_readme(title: str) -> None:
    assert line_to_copy(title) in [line.strip() for line in CI.splitlines()]


def test_ci_stops_at_a_failure_and_ends_with_the_tests() -> None:
    assert "set -euo pipefail" in CI
    lines = [line.strip() for line in CI.splitlines() if line.strip()]
    assert lines[-1] == line_to_copy("Test it")
    for check in ('ruff" check .', 'ruff" format --check .', "mypy", "--doctest-modules medsam_lora", "nvidia"):
        assert check in CI
    assert "|| true" not in CI and "set +e" not in CI


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_ci_is_a_program_that_bash_can_read() -> None:
    script = CHECKOUT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_command_named_exists(path: Path) -> None:
    assert unknown_commands(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def test_the_readme_names_every_command() -> None:
    table = section("Commands")
    assert {name for name in commands() if f"`medsam-lora {name}" not in table} == set()


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "there.md").touch()
    assert unknown_commands("`medsam-lora trian` and `medsam-lora weights get x`, `medsam-lora info`") == [
        "trian",
        "weights get",
    ]
    assert unknown_commands("```bash\nx/bin/medsam-lora prepared\nmedsam-lora weights fetch vit_t\n```") == []
    assert dead_links(tmp_path / "a.md", "[a](there.md#part) [b](gone.md) [c](https://a.b)") == ["gone.md"]
    assert MACHINE_PATH.search("see /home/" + "me/data") and not MACHINE_PATH.search("data/work/main")
    assert REGISTRY.search("pip install --index" + "-url x")


def test_every_key_of_a_pipeline_file_is_explained() -> None:
    table = (CHECKOUT / "pipelines" / "README.md").read_text(encoding="utf-8").partition("\n## Keys\n")[2]
    keys = re.findall(r"^\| `(\w+)` \|", table.partition("\n## ")[0], re.MULTILINE)
    assert keys and set(keys) == set(PipelineSection.model_fields)


def test_every_pipeline_file_is_listed() -> None:
    text = (CHECKOUT / "pipelines" / "README.md").read_text(encoding="utf-8")
    files = sorted((CHECKOUT / "pipelines").glob("*.yaml"))
    assert files
    assert [path.name for path in files if f"`{path.name}`" not in text] == []
    assert [path.name for path in files if _named(path) not in ("pretrain", path.stem)] == []


def _named(path: Path) -> str:
    """The name that a pipeline gives itself, which is its file's; a recipe of pre-training has none."""
    content = yaml.safe_load(path.read_text())
    return "pretrain" if "pretrain" in content else content["name"]


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    found = []
    for name, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert [place for place in found if not place.startswith("tests/test_readme.py:")] == []


def test_no_voxels_or_weights_are_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    kinds = (".nii", ".nii.gz", ".nrrd", ".mha", ".dcm", ".pt", ".pth", ".safetensors", ".npy", ".npz")
    # The one model that is the project's own: trained here, on nobody's images.
    own = ["medsam_lora/models/data/vit_nano.safetensors"]
    assert [name for name in listed.stdout.splitlines() if name.endswith(kinds) and name not in own] == []


@pytest.mark.skipif(
    not os.environ.get("MEDSAM_LORA_TEST_INSTALL"), reason="asks the package index: set MEDSAM_LORA_TEST_INSTALL=1"
)
def test_installing_brings_no_cuda_build() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", str(CHECKOUT)],
        capture_output=True,
        text=True,
        check=True,
    )
    would = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert len(would) == 1 and " torch-" in would[0]
    assert "nvidia-" not in would[0]
