"""Learned optimizers in Lightning: by name in a ``LightningModule``, and the loss and horizon that some of them need.

What reaches ``optimizer.step`` differs by mode (read in Lightning 2.6): automatic optimization passes a closure that
returns the loss; under ``accumulate_grad_batches=N`` only that of the last micro-batch, divided by N; manual
optimization passes a closure that returns nothing; ``precision="16-mixed"`` passes none at all. What reaches
``backward`` is right in all of them, but for AMP's scale, so that is where :class:`LearnedOptimizerCallback` listens.

DDP, ModelParallelStrategy (FSDP2, tensor parallelism) and FSDPStrategy (FSDP1) are supported; DeepSpeed hides whole
tensors.
"""

from pylo_integrations.lightning.callbacks import LearnedOptimizerCallback
from pylo_integrations.lightning.fabric import attach
from pylo_integrations.lightning.module import LearnedOptimizerMixin, configure_optimizers
from pylo_integrations.lightning.schedule import Schedule

__all__ = ["LearnedOptimizerCallback", "LearnedOptimizerMixin", "Schedule", "attach", "configure_optimizers"]
