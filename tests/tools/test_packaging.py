"""Is the wheel complete, and do pyproject.toml, the README and .ci/run agree?"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pylo_integrations
from pylo_integrations.ops import loader
from pylo_integrations.weights import builtin_names

ROOT = Path(__file__).parents[2]
LIBRARY = f"pylo_integrations/ops/{loader.FILE}"
KERNEL_SOURCES = (".h", ".cuh", ".inc")
TEST_MARK = "<!-- command: tests -->"


def build_wheel(folder: Path, **environment: str) -> Path:
    """As an installer does, with the tools of this environment."""
    pytest.importorskip("scikit_build_core")
    code = f"import scikit_build_core.build as backend; print(backend.build_wheel({str(folder)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A build type that sets no flags: optimised kernels take six times as long, and here they only have to be there.
    # Those for AVX-512, a third of all, were compiled when this checkout was installed.
    lean = {"SKBUILD_CMAKE_BUILD_TYPE": "Unoptimised", "SKBUILD_CMAKE_DEFINE": "PYLO_AVX512=OFF"}
    return build_wheel(tmp_path_factory.mktemp("wheel"), **lean)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """What is built where nothing compiles."""
    return build_wheel(tmp_path_factory.mktemp("pure"), CXX="/nonexistent/c++")


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["wheel", "pure_wheel"])
def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(kind, request):
    names = zipfile.ZipFile(request.getfixturevalue(kind)).namelist()
    packed = {name for name in names if ".dist-info/" not in name} - {LIBRARY}
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "pylo_integrations",
            "recipes",
            "csrc/core",
            "csrc/cuda",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    tracked = [name for name in tracked if not name.startswith("csrc/") or name.endswith(KERNEL_SOURCES)]
    moved = (re.sub("^recipes/", "pylo_integrations/_recipes/", name) for name in tracked if name)
    expected = {re.sub("^csrc/", "pylo_integrations/ops/csrc/", name) for name in moved}
    if not expected:
        pytest.skip("not a git checkout")
    assert packed == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_carries_the_kernels_where_they_compile(wheel):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("-any.whl")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel):
    assert LIBRARY not in zipfile.ZipFile(pure_wheel).namelist()
    assert pure_wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_wheel_is_typed_and_has_weights_and_recipes_but_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pylo_integrations/py.typed" in names
    assert {f"pylo_integrations/weights/builtin/{name}.safetensors" for name in builtin_names()} <= set(names)
    assert {"pylo_integrations/_recipes/vit/train.py", "pylo_integrations/_recipes/gpt2/train.py"} <= set(names)
    assert not [name for name in names if "test" in name or name.startswith(("docs", "recipes"))]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_works_away_from_the_sources(unpacked, tmp_path):
    script = (
        # An editable install finds the sources before anything on the path is looked at.
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in type(finder).__module__]\n"
        "import torch, pylo_integrations as p\n"
        f"assert p.__file__.startswith({str(unpacked)!r})\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "layer(torch.ones(1, 2)).sum().backward()\n"
        "p.create_optimizer(layer, 'small_fc_lopt').step()\n"
        "from pylo_integrations.ops.cubins import kernel_lines, sources\n"
        "assert sources().is_relative_to(p.__path__[0]) and 'collect' in kernel_lines(), sources()\n"
        "from pylo_integrations.cli.recipe import scripts\n"
        "print(*sorted(map(str, scripts().values())))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    recipes = unpacked / "pylo_integrations" / "_recipes"
    assert run.stdout.split() == [str(recipes / name / "train.py") for name in ("gpt2", "nano", "sft", "vit")]


@pytest.mark.slow
def test_version_has_one_source(wheel_metadata):
    assert wheel_metadata["Version"] == pylo_integrations.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{pylo_integrations.__version__}]" in changelog


def test_changelog_and_citation_tell_this_version_and_one_date():
    version = re.escape(pylo_integrations.__version__)
    [date] = re.findall(rf"^## \[{version}\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = ROOT / ".github" / "CITATION.cff"
    if not citation.exists():
        pytest.skip("no checkout")
    lines = citation.read_text().splitlines()
    assert f"version: {pylo_integrations.__version__}" in lines and f"date-released: {date}" in lines


def test_releases_are_built_for_the_platforms_that_the_documentation_names():
    release = ROOT / ".github" / "workflows" / "release.yml"
    if not release.exists():
        pytest.skip("no checkout")
    jobs = yaml.safe_load(release.read_text())["jobs"]
    built = {entry["runner"] for entry in jobs["wheel"]["strategy"]["matrix"]["include"]}
    assert built == {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-14", "windows-2022"}
    assert {"container", "source"} <= set(jobs["publish"]["needs"]) and jobs["container"]["needs"] == "wheel"
    assert jobs["publish"]["permissions"]["id-token"] == "write", "trusted publishing"
    configuration = (ROOT / "pyproject.toml").read_text()
    assert configuration.count('"manylinux_2_28"') == 2 and "--exclude libgomp.so.1" in configuration
    assert ".ci/check_wheel" in configuration and os.access(ROOT / ".ci" / "check_wheel", os.X_OK)


@pytest.mark.slow
def test_extras_and_dependencies(wheel_metadata):
    extras = {"hf", "lightning", "accelerate", "recipes", "evaluation", "dev", "docs"}
    assert set(wheel_metadata.get_all("Provides-Extra")) == extras
    requirements = wheel_metadata.get_all("Requires-Dist")
    core = {canonicalize_name(Requirement(line).name) for line in requirements if "extra ==" not in line}
    assert core == {"torch", "numpy", "safetensors", "huggingface-hub", "packaging", "typing-extensions"}
    assert not [line for line in requirements if "<" in line.partition(";")[0] or "==" in line.partition(";")[0]]


@pytest.mark.slow
def test_the_command_is_called_pylo(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "pylo = pylo_integrations.cli:main" in archive.read(name).decode()


def readme_command(mark: str) -> str:
    return re.search(rf"^{re.escape(mark)}\n```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]


@pytest.mark.slow
def test_readme_commands_start_from_nothing_and_name_real_extras(wheel_metadata):
    commands = {kind: readme_command(f"<!-- command: {kind} -->") for kind in ("train", "tests")}
    for command in commands.values():
        assert command.startswith("python3 -m venv .venv")
        extras = re.search(r'pip install .*"\.\[(\w+)\]"', command)[1]
        assert extras in wheel_metadata.get_all("Provides-Extra")
    assert "pylo recipe vit" in commands["train"] and "pytest" in commands["tests"]


CI_STEPS = [
    "python3 -m venv .venv",
    "pip install -e .[dev]",
    "ruff check .",
    "ruff format --check .",
    "mypy",
    "typos",
    "mkdocs build --strict --config-file .mkdocs.yml",
    "python -m pytest -n 2 --dist loadfile -m not slow and not dist",
    "python -m pytest -n 2 --dist loadfile -m slow or dist",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("failing", [*CI_STEPS, None])
def test_ci_takes_the_steps_of_the_readmes_command_and_stops_where_one_fails(tmp_path, failing):
    """`.ci/run` in a copy whose tools only leave a trace."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_text((ROOT / ".ci/run").read_text())
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for tool in ("ruff", "mypy", "typos", "mkdocs", "python", "python3", "pip"):
        script = f'#!/bin/sh\nstep=$(echo {tool} "$@")\necho "$step" >> trace\n[ "$step" != "{failing}" ]\n'
        (tools / tool).write_text(script)
        (tools / tool).chmod(0o755)
    environment = {**os.environ, "PYLO_CI_SKIP_APT": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    trace = (tmp_path / "trace").read_text().splitlines()
    assert (run.returncode == 0) == (failing is None), run.stderr
    assert trace == (CI_STEPS if failing is None else CI_STEPS[: CI_STEPS.index(failing) + 1])
