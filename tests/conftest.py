from __future__ import annotations

import pytest
from dist_workers import Workers
from thetas import is_absent, theta_for
from toy_loss_rule import toy_loss_optimizer

from pylo_integrations import get_optimizer_info, list_optimizers


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
