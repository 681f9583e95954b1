from __future__ import annotations

import gc
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small, and several processes of tests share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others would spin on cores that these need

import pytest
from native_library import library_or_skip
from thetas import is_absent, theta_for
from toy_loss_rule import toy_loss_optimizer

from pylo_integrations import get_optimizer_info, list_optimizers
from pylo_integrations.ops import loader
from pylo_integrations.workers import RankDied, Workers


def pytest_configure(config: pytest.Config) -> None:
    """Files in their order: xdist would begin with those of many tests, and end with one that compiles for minutes."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What is imported stays: frameworks collect garbage after every run, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["native", "reference"])
def auto_backend(request, monkeypatch) -> str:
    """What ``backend="auto"`` finds: tests that ask for this run once with the kernels, once as if there were none."""
    if request.param == "native":
        library_or_skip()
    else:
        monkeypatch.setattr(loader, "load", lambda: "left out by the test")
    return request.param


@pytest.fixture
def toy_loss():
    """The catalogue entry of a loss-driven optimizer, for one test."""
    with toy_loss_optimizer() as spec:
        yield spec


@pytest.fixture
def small_thetas(monkeypatch):
    """Catalogue entries without weights, or whose weights would have to be downloaded, get small ones for one test."""
    for name in list_optimizers():
        cls = get_optimizer_info(name).cls
        if is_absent(cls):
            monkeypatch.setattr(cls, "default_weights", theta_for(name))


FRAMEWORKS = ["transformers.trainer", "accelerate", "lightning.pytorch", "lightning.fabric"]
"""What ranks of a dozen files import, in seconds each."""


class _Workers(Workers):
    """Runs a case in which a rank has died once more, with a warning that says where it was.

    CI once lost one rank of four in a case that passes thousands of times in a row, with no word of why. What always
    ends ranks fails still.
    """

    def run(self, world, function, **kwargs):
        try:
            return super().run(world, function, **kwargs)
        except RankDied as died:
            warnings.warn(f"a rank of {function.__name__} has died, and it is run again:\n{died}", stacklevel=2)
            return super().run(world, function, **kwargs)


def _started():
    workers = _Workers(FRAMEWORKS)
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
    workers = Workers(FRAMEWORKS)
    yield workers
    workers.close()
