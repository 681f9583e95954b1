from __future__ import annotations

import gc
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small, and several processes of tests share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others would spin on cores that these need

from pathlib import Path

import pytest

# Nothing here imports torch before a test asks for it: the process that only hands out tests has no use for it.


def pytest_configure(config: pytest.Config) -> None:
    """Files in their order: xdist would begin with those of many tests, and end with one that compiles for minutes."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


PARTS = {"slow or dist": True, "not slow and not dist": False}
"""What ``-m`` says of the two parts of the suite, and whether tests of the part have one of these marks."""

_MAY_BE_MARKED = re.compile(r"slow|mark\.dist")
_ALL_ARE_MARKED = re.compile(r"^pytestmark = (?:\[[^\]]*|[^\n]*)\bpytest\.mark\.(?:slow|dist)\b", re.MULTILINE)


def _parts_of(file: Path) -> set[bool]:
    """In which parts of the suite a file's tests are, by its text: both, unless that is sure."""
    text = file.read_text()
    if _ALL_ARE_MARKED.search(text):
        return {True}
    return {True, False} if _MAY_BE_MARKED.search(text) else {False}


class _OtherPart(pytest.Module):
    """A file none of whose tests would be taken: it is not imported, and the frameworks that it imports neither."""

    def collect(self):
        return []


def pytest_pycollect_makemodule(module_path: Path, parent):
    part = PARTS.get(parent.config.option.markexpr)
    if part is not None and part not in _parts_of(module_path):
        return _OtherPart.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test is left out for what its file's text seems to say: each part of the suite would tell of the other's."""
    parts: dict[Path, set[bool]] = {}
    for item in items:
        if item.path not in parts:
            parts[item.path] = _parts_of(item.path)
        marked = any(item.get_closest_marker(name) for name in ("slow", "dist"))
        if marked not in parts[item.path]:
            raise pytest.UsageError(f"{item.nodeid}: conftest.py does not see in the file's text which part it is in")


def pytest_collection_finish() -> None:
    """What is imported stays: frameworks collect garbage after every run, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["native", "reference"])
def auto_backend(request, monkeypatch) -> str:
    """What ``backend="auto"`` finds: tests that ask for this run once with the kernels, once as if there were none."""
    from native_library import library_or_skip

    from pylo_integrations.ops import loader

    if request.param == "native":
        library_or_skip()
    else:
        monkeypatch.setattr(loader, "load", lambda: "left out by the test")
    return request.param


@pytest.fixture
def toy_loss():
    """The catalogue entry of a loss-driven optimizer, for one test."""
    from toy_loss_rule import toy_loss_optimizer

    with toy_loss_optimizer() as spec:
        yield spec


@pytest.fixture
def small_thetas(monkeypatch):
    """Catalogue entries without weights, or whose weights would have to be downloaded, get small ones for one test."""
    from thetas import is_absent, theta_for

    from pylo_integrations import get_optimizer_info, list_optimizers

    for name in list_optimizers():
        cls = get_optimizer_info(name).cls
        if is_absent(cls):
            monkeypatch.setattr(cls, "default_weights", theta_for(name))


def _started():
    from shared_workers import FRAMEWORKS, SteadyWorkers

    workers = SteadyWorkers(FRAMEWORKS)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def workers():
    """Processes that tests of distributed training share."""
    yield from _started()


@pytest.fixture(scope="module")
def ranks():
    """Processes of one file's own, for tests that change the ones they run in."""
    yield from _started()


@pytest.fixture
def mortal():
    """Processes for one test, in which ranks die on purpose."""
    from shared_workers import FRAMEWORKS

    from pylo_integrations.workers import Workers

    workers = Workers(FRAMEWORKS)
    yield workers
    workers.close()
