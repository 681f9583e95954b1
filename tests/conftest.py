from __future__ import annotations

import pytest
from dist_workers import Workers
from toy_loss_rule import toy_loss_optimizer


@pytest.fixture
def toy_loss():
    """The catalogue entry of a loss-driven optimizer, for one test."""
    with toy_loss_optimizer() as spec:
        yield spec


@pytest.fixture(scope="session")
def workers():
    """Processes that tests of distributed training share."""
    workers = Workers()
    yield workers
    workers.close()
