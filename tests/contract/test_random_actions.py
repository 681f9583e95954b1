"""Is every step that of an optimizer without a past, whatever users did before? (random_actions.py)

Nightly, and under sanitizers: ``python tests/helpers/random_actions.py --seconds 3600``, see docs/contributing.md.
"""

from __future__ import annotations

import pytest
import torch
from random_actions import run_session

from pylo_integrations import list_optimizers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]

BATCHES, SESSIONS = 4, 40


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_steps_after_random_actions_are_those_of_a_fresh_optimizer(batch):
    # Consecutive seeds are of all entries on both backends in turn.
    assert SESSIONS % (2 * len(list_optimizers())) == 0
    steps = [run_session(seed) for seed in range(batch * SESSIONS, (batch + 1) * SESSIONS)]
    assert min(steps) == 25
