"""The house rules that a parser can check: which way imports point, what stays free of torch, what is never done.

`docs/concepts.md` names the parts; the order of the layers stands here and nowhere else.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "medsam_lora"

# A part may import parts of earlier lines only; those on one line do not import each other.
LAYERS = (
    ("errors", "__version__"),
    ("geometry", "labels", "messages", "processes", "progress", "sam_modules"),
    ("records", "config"),
    ("io", "transforms", "prompts", "metrics", "datasets"),
    ("peft",),
    ("models",),
    ("inference",),
    ("training",),
    ("active", "analysis"),
    ("report",),
    ("stages",),
    ("doctor",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# The synthetic cohort is written as NIfTI files, by the one writer there is.
ALLOWED_BETWEEN_SIBLINGS = {("datasets", "io")}

# These parts, and these modules of other parts, answer without torch.
TORCH_FREE_PARTS = {
    *("errors", "geometry", "labels", "messages", "processes", "progress", "records", "config"),
    *("io", "metrics", "datasets", "analysis", "report", "commands", "cli", "__main__"),
}
TORCH_FREE_MODULES = {
    "medsam_lora.peft",
    "medsam_lora.models",
    "medsam_lora.models.weights",
    "medsam_lora.stages.info",
    "medsam_lora.stages.manifest",
    "medsam_lora.stages.verify",
    "medsam_lora.stages.prepare",
    "medsam_lora.stages.check_submission",
    "medsam_lora.stages.evaluate",
    "medsam_lora.stages.pipeline",
    "medsam_lora.stages.report",
}
IMPORT_TORCH = {"torch", "torchvision", "monai", "loralib", "segment_anything"}

GLOBAL_GENERATORS = {
    *("torch.manual_seed", "torch.seed", "torch.default_generator.manual_seed", "torch.set_rng_state"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "random.seed", "set_determinism"),
}
OWN_GENERATORS = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64"}
UNSAFE_CALLS = {
    *("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("pickle.load", "pickle.loads", "np.random.seed", "numpy.random.seed"),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def parse(text: str) -> ast.Module:
    """The syntax tree, each node knowing the one around it."""
    parsed = ast.parse(text)
    for node in ast.walk(parsed):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return parsed


@cache
def tree(path: Path) -> ast.Module:
    return parse(path.read_text(encoding="utf-8"))


def ancestors(node: ast.AST) -> Iterator[ast.AST]:
    while (node := getattr(node, "parent", None)) is not None:
        yield node


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports; for ``from a import b`` also ``a.b``, which may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: write imports in full"
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def at_module_level(node: ast.AST) -> bool:
    """Whether an import runs when the module does: not in a function, not for type checkers alone."""
    for outer in ancestors(node):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return False
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test):
            return False
    return True


def part_of(module: str) -> str | None:
    """The part of the package that a dotted name lies in, None for the package itself and for other packages."""
    head, _, rest = module.partition(".")
    return rest.partition(".")[0] if head == "medsam_lora" and rest else None


def name_of(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def wrong_imports(module: str, parsed: ast.Module) -> list[str]:
    rank = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    own = part_of(module)
    wrong = []
    for node in ast.walk(parsed):
        for other in {part_of(name) for name in imported(node)} - {None, own}:
            assert other is not None and own is not None
            if (own, other) not in ALLOWED_BETWEEN_SIBLINGS and rank[other] >= rank[own]:
                wrong.append(f"{module}:{node.lineno}: {own} imports {other}")  # type: ignore[attr-defined]
    return wrong


def faults(parsed: ast.Module) -> list[str]:
    """What is never done, with the line of each."""
    found = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {fault}" for fault in call_faults(node)]
        elif isinstance(node, ast.Attribute):
            owner = name_of(node.value)
            if owner in ("np.random", "numpy.random") and node.attr not in OWN_GENERATORS:
                found.append(f"{node.lineno}: numpy's global generator ({node.attr})")
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.append(f"{node.lineno}: bare except")
            elif all(isinstance(line, ast.Pass) for line in node.body) and "Exception" in name_of(node.type):
                found.append(f"{node.lineno}: every exception passed over in silence")
        elif isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            found.append(f"{node.lineno}: not implemented")
    return found


def call_faults(node: ast.Call) -> Iterator[str]:
    called = name_of(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if given.get("strict") == "False" and called != "zip":
        yield "strict=False"
    if called.endswith("load_state_dict") and len(node.args) > 1:
        yield "load_state_dict with a positional strict"
    if given.get("allow_pickle") == "True":
        yield "allow_pickle=True"
    if given.get("weights_only") == "False" or (called == "torch.load" and given.get("weights_only") != "True"):
        yield "torch.load that may run code"
    if called in UNSAFE_CALLS or given.get("shell") == "True":
        yield f"unsafe call {called}"
    if called in GLOBAL_GENERATORS and not in_fork_of_generator(node):
        yield f"the global generator outside fork_rng ({called})"


def in_fork_of_generator(node: ast.AST) -> bool:
    return any(
        isinstance(outer, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in outer.items)
        for outer in ancestors(node)
    )


def torch_chain(module: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """How importing a module comes to import torch: the chain of modules, empty where it does not."""
    if module not in MODULES or module in seen:
        return []
    needed = [name for node in ast.walk(tree(MODULES[module])) if at_module_level(node) for name in imported(node)]
    # Python runs the packages around a module first.
    around = [module.rpartition(".")[0]] if "." in module else []
    for name in [*around, *needed]:
        if name.partition(".")[0] in IMPORT_TORCH or name == "safetensors.torch":
            return [module, name]
        if chain := torch_chain(name, seen | {module}):
            return [module, *chain]
    return []


def torch_free() -> list[str]:
    return [name for name in MODULES if name in TORCH_FREE_MODULES or part_of(name) in TORCH_FREE_PARTS]


def test_every_part_has_its_place() -> None:
    known = {part for layer in LAYERS for part in layer}
    assert {part_of(name) for name in MODULES} - {None} <= known
    assert len(MODULES) > 50


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    if part_of(module) is not None:
        assert wrong_imports(module, tree(MODULES[module])) == []


@pytest.mark.parametrize("module", MODULES)
def test_what_is_never_done(module: str) -> None:
    assert faults(tree(MODULES[module])) == []


def test_what_can_answer_without_torch_does() -> None:
    assert set(MODULES) >= TORCH_FREE_MODULES
    assert [chain for name in torch_free() if (chain := torch_chain(name))] == []


def test_importing_all_of_it_imports_no_torch() -> None:
    script = f"import importlib, sys\nfor name in {torch_free()}: importlib.import_module(name)\n"
    script += f"print(sorted({IMPORT_TORCH} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) not in ("stages", "cli", None)])
def test_the_library_reads_no_command_line(module: str) -> None:
    names = {name_of(node) for node in ast.walk(tree(MODULES[module])) if isinstance(node, ast.Attribute)}
    assert "sys.argv" not in names


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("model.load_state_dict(state, strict=False)", "strict=False"),
        ("model.load_state_dict(state, False)", "load_state_dict with a positional strict"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("torch.load(path)", "torch.load that may run code"),
        ("torch.load(path, weights_only=False)", "torch.load that may run code"),
        ("yaml.load(text)", "unsafe call yaml.load"),
        ("subprocess.run(line, shell=True)", "unsafe call subprocess.run"),
        ("np.random.rand(3)", "numpy's global generator (rand)"),
        ("torch.manual_seed(0)", "the global generator outside fork_rng (torch.manual_seed)"),
        ("raise NotImplementedError", "not implemented"),
        ("try:\n    pass\nexcept:\n    raise", "bare except"),
        ("try:\n    pass\nexcept Exception:\n    pass", "every exception passed over in silence"),
    ],
)
def test_the_check_sees_what_is_never_done(line: str, fault: str) -> None:
    assert [text.partition(": ")[2] for text in faults(parse(line))] == [fault]


@pytest.mark.parametrize(
    "line",
    [
        "zip(a, b, strict=False)",
        "torch.load(path, weights_only=True)",
        "np.random.default_rng(0)",
        "generator = torch.Generator().manual_seed(0)",
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)",
        "try:\n    pass\nexcept OSError:\n    pass",
    ],
)
def test_the_check_leaves_good_code_alone(line: str) -> None:
    assert faults(parse(line)) == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("medsam_lora.io.nifti", "from medsam_lora.stages.verify import verify", "io imports stages"),
        ("medsam_lora.io.nifti", "import medsam_lora.transforms.slicing", "io imports transforms"),
        ("medsam_lora.transforms.slicing", "from medsam_lora import metrics", "transforms imports metrics"),
        ("medsam_lora.models.sam", "def f():\n    from medsam_lora.cli import main", "models imports cli"),
        ("medsam_lora.geometry", "from medsam_lora.records import Volume", "geometry imports records"),
    ],
)
def test_the_check_sees_an_import_against_the_direction(module: str, line: str, wrong: str) -> None:
    assert [text.rpartition(": ")[2] for text in wrong_imports(module, parse(line))] == [wrong]


def test_the_check_sees_torch_through_other_modules() -> None:
    assert torch_chain("medsam_lora.sam_modules")[-1] == "segment_anything.build_sam"
    assert torch_chain("medsam_lora.stages.train")[-1].partition(".")[0] in IMPORT_TORCH
