from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medsam_lora.errors import WeightsError
from medsam_lora.models import MODELS, ModelSpec, weights
from medsam_lora.models.weights import (
    CACHE_DIR_VARIABLE,
    WEIGHTS_DIR_VARIABLE,
    check_state,
    download,
    fetch,
    load_state,
    locate,
    model_spec,
    sha256_of_state,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}
CONTENT = b"official weights " * 1000
VIT_T = "mobile_sam.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(STATE, path)
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty weights folder and an empty cache."""
    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(own))
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(cache))
    return own, cache


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real web server with one file, `published.pth`."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "published.pth").write_bytes(CONTENT)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/published.pth"
    httpd.shutdown()
    httpd.server_close()


def spec_of(url: str, sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> ModelSpec:
    return ModelSpec("vit_x", "", 1024, 0, "vit_x.pth", url, sha256)


def test_the_folder_of_the_variable_comes_before_the_cache(folders: tuple[Path, Path]) -> None:
    own, cache = folders
    assert locate("vit_t") is None
    cache.mkdir()
    (cache / VIT_T).write_bytes(b"x")
    assert locate("vit_t") == cache / VIT_T
    (own / VIT_T).write_bytes(b"x")
    assert locate("vit_t") == own / VIT_T
    assert locate("vit_b") is None


def test_without_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)
    monkeypatch.delenv(CACHE_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.weights_dir() == Path(weights.__file__).resolve().parents[3] / "shared" / "weights"
    assert weights.cache_dir() == tmp_path / ".cache" / "medsam-lora"


def test_the_weights_of_the_package(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Another file of that name in the folder of official weights is not they.
    (folders[0] / "vit_nano.safetensors").write_bytes(b"x")
    path = locate("vit_nano")
    assert path is not None and path == fetch("vit_nano") == weights.EMBEDDED_DIR / "vit_nano.safetensors"
    assert path.stat().st_size <= 8_000_000
    assert weights.sha256_of(path) == MODELS["vit_nano"].sha256
    monkeypatch.setattr(weights, "EMBEDDED_DIR", folders[0])
    with pytest.raises(WeightsError, match=r"vit_nano\.safetensors: its sha256 is .*install medsam-lora again"):
        fetch("vit_nano")
    monkeypatch.setattr(weights, "EMBEDDED_DIR", folders[1])
    with pytest.raises(WeightsError, match=r"missing from the package.*Install medsam-lora again"):
        fetch("vit_nano")


@pytest.mark.parametrize("function", [locate, fetch, model_spec])
def test_an_unknown_model_names_the_nearest(function: object) -> None:
    with pytest.raises(WeightsError, match=r"'vit-t'.*Did you mean vit_t"):
        function("vit-t")  # type: ignore[operator]


def test_fetch_refuses_a_file_that_is_not_the_official_one(folders: tuple[Path, Path]) -> None:
    (folders[0] / VIT_T).write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"mobile_sam\.pt: its sha256 is .* not 6dbb90523a35"):
        fetch("vit_t")


def test_download_into_a_new_folder(server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = download(spec_of(server), tmp_path / "a" / "b")
    assert target == tmp_path / "a" / "b" / "vit_x.pth"
    assert target.read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


def test_a_download_with_another_hash_leaves_nothing(server: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as raised:
        download(spec_of(server, "0" * 64), tmp_path / "cache")
    assert server in str(raised.value)
    assert raised.value.path == tmp_path / "cache" / "vit_x.pth"
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_network(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/published.pth"  # the discard port: nothing listens
    with pytest.raises(WeightsError) as raised:
        download(spec_of(url), tmp_path)
    assert url in str(raised.value)
    assert raised.value.path == tmp_path / "vit_x.pth"
    assert WEIGHTS_DIR_VARIABLE in str(raised.value.remedy)


def test_the_bar_shows_progress_on_a_terminal(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("MEDSAM_LORA_NO_PROGRESS", raising=False)
    download(spec_of(server), tmp_path / "cache")
    assert "vit_x.pth" in capsys.readouterr().err
    (tmp_path / "cache" / "vit_x.pth").unlink()
    download(spec_of(server), tmp_path / "cache", progress=False)
    assert capsys.readouterr().err == ""


def test_load_gives_every_tensor_back(checkpoint: Path, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    for path in (checkpoint, tmp_path / "model.safetensors"):
        state = load_state(path)
        assert set(state) == set(STATE)
        assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_the_hash_is_checked(checkpoint: Path) -> None:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert set(load_state(checkpoint, digest)) == set(STATE)
    # A flipped bit inside a tensor, which torch.load does not notice.
    content = bytearray(checkpoint.read_bytes())
    at = content.find(STATE["a.weight"].numpy().tobytes())
    content[at + 4] ^= 1
    checkpoint.write_bytes(content)
    assert not torch.equal(load_state(checkpoint)["a.weight"], STATE["a.weight"])
    with pytest.raises(WeightsError, match="sha256"):
        load_state(checkpoint, digest)


class _Code:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "absent", "folder"])
def test_unreadable_files_are_named(fault: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(STATE, path)
    content = path.read_bytes()
    path.unlink()
    if fault == "folder":
        path.mkdir()
    elif fault != "absent":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>404</html>"}[fault])
    with pytest.raises(WeightsError) as raised:
        load_state(path)
    assert raised.value.path == path
    assert raised.value.remedy


def test_a_cut_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        load_state(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Code()}, "model.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"a": _Code()}))
    for name in ("model.pth", "plain.pth"):
        with pytest.raises(WeightsError, match="not a readable checkpoint"):
            load_state(Path(name))
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"model": STATE}, {}, [torch.zeros(2)], {"a": torch.zeros(1), "epoch": 3}])
def test_what_is_not_a_flat_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="flat state dict"):
        load_state(tmp_path / "model.pth")


def test_every_kind_of_fault_in_a_state_is_listed_at_once() -> None:
    expected = {"kept": torch.zeros(2), "gone": torch.zeros(1), "wide": torch.zeros(2, 3), "bad": torch.zeros(2)}
    state = {
        "kept": torch.ones(2),
        "wide": torch.zeros(3, 2),
        "bad": torch.tensor([1.0, torch.nan]),
        "new": torch.zeros(1),
        "head.bias": torch.zeros(1),
    }
    with pytest.raises(WeightsError) as raised:
        check_state(state, expected, ["head.bias"], Path("model.pth"))
    text = str(raised.value)
    assert "1 missing: gone" in text
    assert "1 unexpected: new;" in text
    assert "1 of another shape: wide (3, 2) for (2, 3)" in text
    assert "1 not finite: bad" in text
    assert "head" not in text
    assert raised.value.path == Path("model.pth")


def test_dropped_names_are_exact_and_optional() -> None:
    expected = {"a": torch.zeros(1)}
    kept = {"a": torch.ones(1)}
    assert set(check_state({**kept, "head.bias": torch.zeros(1)}, expected, ["head.bias"])) == {"a"}
    assert check_state(kept, expected, ["head.bias"]) == kept
    with pytest.raises(WeightsError, match=r"head\.bias2"):
        check_state({**kept, "head.bias2": torch.zeros(1)}, expected, ["head.bias"])


def test_the_hash_of_a_state_sees_every_change_but_order() -> None:
    turned = dict(reversed(STATE.items()))
    turned["a.weight"] = STATE["a.weight"].T.contiguous().T
    assert sha256_of_state(turned) == sha256_of_state(STATE)
    others = [
        {**STATE, "a.weight": STATE["a.weight"] + torch.eye(2, 3) * 1e-6},
        {**STATE, "a.weight": STATE["a.weight"].reshape(3, 2)},
        {**STATE, "a.count": STATE["a.count"].int()},
        {"b.weight": STATE["a.weight"], "a.count": STATE["a.count"]},
    ]
    assert len({sha256_of_state(state) for state in [STATE, *others]}) == 5


def test_the_table_names_what_it_publishes() -> None:
    for spec in MODELS.values():
        assert len(bytes.fromhex(spec.sha256 or "")) == 32
        assert spec.embedded == (spec.name == "vit_nano")
        if spec.url is not None:
            assert spec.url.endswith(f"/{spec.file_name}")


@pytest.mark.real_weights
def test_the_official_file_is_found_and_has_its_hash(weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(weights_dir))
    assert fetch("vit_t") == weights_dir / VIT_T


def test_neither_torch_nor_pooch_is_imported_to_find_weights() -> None:
    code = (
        "import sys, medsam_lora.models.weights as w; w.locate('vit_b')\nprint({'torch', 'pooch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
