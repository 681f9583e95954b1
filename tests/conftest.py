from __future__ import annotations

import pytest
from native_library import library_or_skip
from thetas import is_absent, theta_for
from toy_loss_rule import toy_loss_optimizer

from pylo_integrations import get_optimizer_info, list_optimizers
from pylo_integrations.ops import loader
from pylo_integrations.workers import Workers

# Modules whose tests run once with the native kernels behind backend="auto" and once as if there were none.
BOTH_BACKENDS = {
    "test_adapter_accelerate",
    "test_adapter_hf",
    "test_adapter_lightning",
    "test_adapter_timm",
    "test_golden",
    "test_golden_celo2",
    "test_golden_elo",
    "test_golden_velo",
    "test_optimizer_contract",
    "test_torch_optimizer_checks",
}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in BOTH_BACKENDS:
        metafunc.parametrize("auto_backend", ["native", "reference"], indirect=True)


@pytest.fixture(autouse=True)  # or pytest would not set it up for tests that do not ask for it
def auto_backend(request, monkeypatch):
    """What ``backend="auto"`` finds."""
    choice = getattr(request, "param", None)
    if choice == "native":
        library_or_skip()
    elif choice == "reference":
        monkeypatch.setattr(loader, "load", lambda: "left out by the test")


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


@pytest.fixture(scope="session")
def workers():
    """Processes that tests of distributed training share."""
    workers = Workers()
    yield workers
    workers.close()
