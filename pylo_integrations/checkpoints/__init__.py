"""State dicts: the forms that state takes in checkpoints, and whether a state dict fits an optimizer.

The form is torch's. What is global to the run is in it twice, since every path of a checkpoint drops something:

* as a string of bytes in the first parameter group, which torch, FSDP and the frameworks hand back unchanged;
* as tensors among the states of every parameter, as other optimizers keep ``step``: they go where states go, also where
  tensors are loaded in place, or handed to an optimizer without its knowledge.

What other code keeps among the states of a parameter travels untouched. Reading checks everything before anything is
changed. State comes back as it was stored, bit by bit; that of another format (:mod:`pylo_integrations.formats`) is
converted, and the log says so.
"""

from __future__ import annotations

from pylo_integrations.checkpoints.form import CheckpointError

__all__ = ["CheckpointError"]
