"""Is every step that of an optimizer without a past, whatever users did before? (random_actions.py)

Nightly, and under sanitizers: ``python tests/helpers/random_actions.py --seconds 3600``, see docs/contributing.md.
"""

from __future__ import annotations

import pytest
import torch
from random_actions import run_session
from thetas import distinct_rules

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]

BATCHES, SESSIONS = 4, 28


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_steps_after_random_actions_are_those_of_a_fresh_optimizer(batch):
    # Consecutive seeds are of all rules on both backends in turn.
    rules = distinct_rules()
    assert SESSIONS % (2 * len(rules)) == 0
    steps = [run_session(seed, rules) for seed in range(batch * SESSIONS, (batch + 1) * SESSIONS)]
    assert min(steps) == 25
