"""Do imports point one way, and does importing the package cost and change next to nothing?"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pylo_integrations

ROOT = Path(pylo_integrations.__file__).parent
PACKAGE = ROOT.name

# Each layer may import those before it.
LAYERS = [
    {"rounding"},
    {"formats"},
    {"sharding", "files", "paths", "steplock", "schedules"},
    {"rules", "sealed", "fitting", "naming"},
    {"profiles"},
    {"weights", "decay", "progress", "telemetry"},
    {"ops", "options", "hints", "ledger"},
    {"step", "checkpoints", "advice", "offload"},
    {"engine", "resume", "keywords"},
    {"compiled", "offload"},
    {"stepping"},
    {"informed"},
    {"optimizer"},
    {"optimizers", "state"},
    {"fused", "attach"},
    {"attention"},
    {"groups"},
    {"mup"},
    {"catalog"},
    {"__init__"},
    {"deepspeed"},
    {"hf", "lightning", "accelerate", "timm", "torchtitan", "megatron"},
    {"plot", "workers", "kernel_check"},
    {"bench", "metatrain", "comparison"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
]
FRAMEWORKS = {
    "transformers": {"hf"},
    "lightning": {"lightning"},
    "accelerate": {"accelerate", "hf"},
    "timm": {"timm"},
    "torchtitan": {"torchtitan"},
    "deepspeed": set(),
    "megatron": {"megatron"},
    "matplotlib": {"plot"},
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
        if "_recipes" not in path.parts
    }


def unit(module: str) -> str:
    """The subpackage or top-level module that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_one_way():
    known = modules()
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert {unit(name) for name in known} <= set(level), "give new modules a layer"
    wrong = []
    for name, path in known.items():
        for target in imported(path):
            if target.split(".")[0] != PACKAGE:
                continue
            module = target if target in known else target.rpartition(".")[0]
            here, there = unit(name), unit(module)
            if here != there and level[there] >= level[here]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_no_import_cycles_between_modules():
    known = modules()
    graph = {
        name: {t if t in known else t.rpartition(".")[0] for t in imported(path) if t.startswith(PACKAGE)} & set(known)
        for name, path in known.items()
    }

    without = set()  # from which no way leads to a cycle: each is walked from once, as there are millions of ways

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in without:
            for target in graph[name]:
                visit(target, (*trail, name))
            without.add(name)

    for name in graph:
        visit(name, ())


def test_frameworks_are_imported_in_their_adapter_only():
    for name, path in modules().items():
        for target in imported(path):
            allowed = FRAMEWORKS.get(target.split(".")[0])
            assert allowed is None or unit(name) in allowed, f"{name} imports {target}"


LARGEST_IMPORT = 120
"""Modules that importing the package may bring in, its own among them."""

PROBE = """
import json, logging, random, sys, warnings
import torch
before = set(sys.modules)
state = lambda: [
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
    random.getstate()[1][:5], len(warnings.filters), logging.root.level, len(logging.root.handlers), sys.path[:],
    torch.are_deterministic_algorithms_enabled(),
]
old = state()
warnings_seen = []
warnings.showwarning = lambda *a, **k: warnings_seen.append(str(a[0]))
import pylo_integrations
assert state() == old, "global state changed"
assert not warnings_seen, warnings_seen
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"modules": len(set(sys.modules) - before), "new": sorted(new)}))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("\n") == 1, "the import printed something"
    probe = json.loads(done.stdout)
    third_party = set(probe["new"]) - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith("_")} <= {PACKAGE, "safetensors", "huggingface_hub"}
    # Not seconds, which are other processes' too.
    assert probe["modules"] < LARGEST_IMPORT
