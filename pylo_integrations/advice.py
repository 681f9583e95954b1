"""What there is to tell whoever trains with an optimizer, once each, and when a step is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pylo_integrations.fitting import missing_memory, name_of
from pylo_integrations.hints import FrozenWatch, Remarks, SettingsWatch
from pylo_integrations.ledger import Groups, Ledger
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.pieces import local_part


class Advice:
    """Of one optimizer.

    Args:
        watch: Looks at its settings.
    """

    def __init__(self, watch: SettingsWatch) -> None:
        self._watch = watch
        self._frozen: FrozenWatch | None = None
        self._remarks = Remarks()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": None}  # whose parameters a copy does not have

    def expect_frozen(self, params: Mapping[str, Tensor]) -> None:
        """See :meth:`LearnedOptimizer.expect_frozen`."""
        self._frozen = FrozenWatch(params) if params else None

    def at_start(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Look at new groups."""
        self._remarks.keep(self._watch.look_at_start(groups))
        self._remarks.tell()

    def before_first_step(self, owner: str, ledger: Ledger, groups: Groups) -> None:
        """Look for matrices of zeros, if the rule steps them in proportion to themselves.

        Biases start at zero everywhere, and the rules were meta-trained on that. A rank looks at what it has of a
        matrix.

        Args:
            owner: What the optimizer is called.
            ledger: Knows the parameters.
            groups: Of the optimizer.
        """
        if not ledger.rule.steps_by_scale:
            return
        matrices = [entry.param for entry in ledger.entries(groups) if len(entry.shape) > 1]
        zeros = [param for param in matrices if param.grad is not None and _is_zero(local_part(param))]
        if not zeros:
            return
        names = ", ".join(name_of(param, groups) for param in zeros[:3]) + (" and others" if len(zeros) > 3 else "")
        message = (
            f"{len(zeros)} of {len(matrices)} matrices are zero and will hardly move: {names}. A step of {owner} is in "
            "proportion to the root mean square of its parameter. LoRA's B starts at zero: choose an optimizer whose "
            "steps are not, such as celo2, pace or celo_adam, or a start that is not, such as PEFT's "
            'LoraConfig(init_lora_weights="pissa")'
        )
        self._remarks.keep({"zeros": message})

    def before_step(self, groups: Sequence[Mapping[str, Any]], progress: Progress) -> None:
        """Look at what will not train well."""
        iteration, num_steps = progress.iteration, progress.num_steps
        if num_steps is not None and iteration >= num_steps:
            message = (
                f"step {iteration + 1} is beyond the horizon num_steps={num_steps}; the rule was "
                "told that training ends there. Call set_num_steps() with the true length of the run"
            )
            self._remarks.keep({"horizon": message})
        if self._frozen is not None and iteration % 10 == 0:  # there may be thousands
            self._remarks.keep(self._frozen.look(groups))
        self._remarks.keep(self._watch.look(groups, iteration, num_steps))

    def after_step(self, taken: bool, progress: Progress) -> None:
        """Tell what was found, and of a step that was skipped."""
        if not taken:
            message = (
                f"step {progress.iteration + 1} met a gradient or loss that is not finite and was skipped; further "
                "ones are only counted, in `nonfinite_steps`"
            )
            self._remarks.keep({"nonfinite": message})
        self._remarks.tell()


def _is_zero(local: Tensor) -> bool:
    """Whether a tensor has elements, and all are 0; what has no numbers, or lost them, is for others to judge."""
    readable = local.numel() > 0 and not local.is_meta and missing_memory(local) is None
    return readable and not bool(local.any())
