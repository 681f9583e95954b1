"""The loss of a Fabric run."""

from __future__ import annotations

from lightning.fabric import Fabric
from torch.optim.optimizer import Optimizer

from pylo_integrations.attach import Attachment, observe_before_backward, require_learned
from pylo_integrations.attach import attach as attach_to_backward


def attach(fabric: Fabric, optimizer: Optimizer, num_steps: int | None = None) -> Attachment:
    """Report every loss that goes through ``fabric.backward`` to a learned optimizer.

    Only this ``fabric`` is changed, and a second call for the same optimizer adds nothing. Where several optimizers
    share a ``fabric``, call ``optimizer.observe_loss(loss)`` before each step instead: which of them a loss belongs to
    cannot be told here.

    Args:
        fabric: Its ``backward`` must get the loss.
        optimizer: Before or after ``fabric.setup``.
        num_steps: The horizon, i.e. the optimizer steps of the whole run.

    Returns:
        A handle with ``remove()``, which is a context manager as well.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
        ValueError: ``fabric`` reports to another optimizer; or ``num_steps`` is not a positive integer.
    """
    learned = require_learned(optimizer)
    return attach_to_backward(fabric, learned, num_steps, lambda loss, *_, **__: observe_before_backward(learned, loss))
