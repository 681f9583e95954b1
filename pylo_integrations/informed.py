"""What an optimizer is told of its run, and tells of it: loss, horizon, steps taken, telemetry.

It is all of an optimizer that the adapters of frameworks know, beside what torch's have.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import Optimizer

from pylo_integrations.hints import warn_user
from pylo_integrations.progress import LossWindow, Progress, as_scalar_loss, check_horizon
from pylo_integrations.rules.base import Rule
from pylo_integrations.steplock import between_steps
from pylo_integrations.stepping import Stepping
from pylo_integrations.telemetry import Telemetry


class Informed(Optimizer):
    """An optimizer that knows of its run.

    Attributes:
        rule: The mathematics, which says what it needs to know.
    """

    rule: Rule
    _progress: Progress  # changed in place only: wrappers of frameworks share it with us, see LossWindow
    _stepping: Stepping

    def _settle(self, everywhere: bool = False) -> None:
        """Take over what a wrapper has put among the states without telling us, see :meth:`Resumption.settle`."""
        warn_user(*self._stepping.resumption.settle(self.param_groups, self.state, everywhere=everywhere))

    @property
    def needs_loss(self) -> bool:
        """Whether a step needs the loss."""
        return self.rule.needs_loss

    @property
    def reads_loss(self) -> bool:
        """Whether the next step uses the loss, if it is told."""
        return self.rule.reads_loss(self._progress.iteration)

    @property
    def needs_horizon(self) -> bool:
        """Whether a step needs ``num_steps``."""
        return self.rule.needs_horizon

    @property
    def iteration(self) -> int:
        """Steps taken; skipped steps do not count."""
        self._settle()
        return self._progress.iteration

    @property
    def nonfinite_steps(self) -> int:
        """Steps that met non-finite gradients or loss, whatever was done about them."""
        self._settle()
        return self._progress.nonfinite_steps

    @property
    def num_steps(self) -> int | None:
        """The horizon; see :meth:`set_num_steps`."""
        self._settle()
        return self._progress.num_steps

    def set_num_steps(self, num_steps: int | None) -> None:
        """Set how many optimizer steps the run takes in total, counted from iteration 0.

        Raises:
            ValueError: Not a positive integer of at most 2**53.
        """
        self._progress.num_steps = None if num_steps is None else check_horizon(num_steps)

    @between_steps
    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the next :meth:`step` the loss, where the caller of ``step`` cannot pass it.

        Call it once per micro-batch with exactly what went into ``backward()``, before AMP scaling; the losses add up
        until a step consumes them.

        Raises:
            TypeError: Not a tensor or number.
            ValueError: More than one element.
        """
        self._progress.window.add(as_scalar_loss(loss))

    def clear_observed_loss(self) -> None:
        """Forget observed losses, e.g. of a step that a GradScaler skipped."""
        self._progress.window.take()

    @property
    def loss_window(self) -> LossWindow:
        """Where observed losses wait for the next step; for adapters."""
        return self._progress.window

    def enable_telemetry(self, per_parameter: bool = False) -> None:
        """Have further steps leave the numbers that :meth:`telemetry` tells; they cost a pass over all tensors.

        No parameter or state changes by it. It is a setting of this object, not of its checkpoints or copies.

        Args:
            per_parameter: Tell of each parameter too, not only of each group.
        """
        self._stepping.engine.telemetry = Telemetry(per_parameter)

    def disable_telemetry(self) -> None:
        """Undo :meth:`enable_telemetry`."""
        self._stepping.engine.telemetry = None

    def telemetry(self) -> dict[str, float]:
        """Numbers on the last step that was taken; empty while telemetry is off.

        Reading waits for the device, nothing else does. The update is what a step subtracts, learning rate included,
        weight decay not; the gradient is the one that the rule saw. Names begin with ``optim/<class>/``:

        * ``nonfinite_steps``, a count; ``horizon_fraction``, steps taken / ``num_steps``, where that is known;
        * what the rule tells of its memory, such as features of the loss;
        * ``group<index>/update_rms``, root mean square of the update;
        * ``group<index>/update_ratio``, norm of the update / norm of the parameters before it;
        * ``group<index>/cosine``, between the update's direction and the negative gradient;
        * ``group<index>/<decision>``, what the rule decided per tensor, such as ``lr_mult``: the mean over tensors;
        * with ``per_parameter``, the same under ``param/<name>/``, where ``<name>`` is ``<group>.<position>`` for
          parameters that were given without names.

        A ratio or cosine is nan if what it would divide by is zero.
        """
        watching = self._stepping.engine.telemetry
        if watching is None:
            return {}
        progress = self._progress
        numbers: dict[str, float] = {"nonfinite_steps": progress.nonfinite_steps}
        if progress.num_steps is not None:
            numbers["horizon_fraction"] = progress.iteration / progress.num_steps
        groups = self._stepping.offload.stand_ins(self.param_groups)
        numbers |= watching.read(groups, self.rule.telemetry(progress.memory))
        name = self._stepping.owner  # self may be a framework's wrapper, of another class
        return {f"optim/{name}/{key}": float(number) for key, number in numbers.items()}
