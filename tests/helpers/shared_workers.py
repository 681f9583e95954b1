"""Processes for tests of distributed training, with what ranks of a dozen files import."""

from __future__ import annotations

import warnings

from pylo_integrations.workers import RankDied, Workers

FRAMEWORKS = ["transformers.trainer", "accelerate", "lightning.pytorch", "lightning.fabric"]
"""Imported once, for they take seconds each."""


class SteadyWorkers(Workers):
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
