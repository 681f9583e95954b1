"""How a run gets into state dicts and out of them, and into an optimizer behind its back.

:mod:`pylo_integrations.checkpoints` knows the forms; here is what an optimizer does with them. Nothing is changed
before everything has been looked at, whichever way state comes: loaded, handed over among the states by a wrapper, or
written into our tensors in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from pylo_integrations.checkpoints.form import (
    PROGRESS,
    SMALL,
    Checkpoint,
    CheckpointError,
    check_form,
    check_groups,
    has_states,
)
from pylo_integrations.checkpoints.run import check_progress, has_run, read_progress, read_run, split_run
from pylo_integrations.checkpoints.states import check_keys, check_states, check_values, read_states
from pylo_integrations.checkpoints.writing import pack_states
from pylo_integrations.ledger import Ledger, States, state_dtype
from pylo_integrations.options import USUAL, OptionCheck, check_state_dtype
from pylo_integrations.progress import Progress
from pylo_integrations.weights.theta import Theta

Groups = Sequence[MutableMapping[str, Any]]

_WITHOUT_PROGRESS = (
    "states were loaded without the iteration, horizon and loss memory of their run, which state_dict() has in the "
    "first parameter group and among the states: training goes on from iteration {iteration}"
)


class Resumption:
    """Packs the run of an optimizer, and takes one over.

    Args:
        owner: What the optimizer is called, for messages.
        ledger: Knows its parameters.
        theta: Its weights, if any.
        progress: Of its run; changed in place only.
        options: Checks those of its groups.
    """

    def __init__(
        self, owner: str, ledger: Ledger, theta: Theta | None, progress: Progress, options: OptionCheck
    ) -> None:
        self._owner = owner
        self._ledger = ledger
        self._rule = ledger.rule
        self._theta = theta
        self._progress = progress
        self._options = options

    @contextmanager
    def packing(self, optimizer: Optimizer, whole: Mapping[int, dict[str, Tensor]]) -> Iterator[None]:
        """Have torch's ``state_dict()`` return our form, which hooks of the user's see."""

        def pack(optimizer: Any, state_dict: StateDict) -> StateDict:
            return self.pack(state_dict, optimizer.param_groups, whole)

        handle = optimizer.register_state_dict_post_hook(pack, prepend=True)  # before the user's
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def loading(self, optimizer: Optimizer, whole: dict[int, dict[str, Tensor]]) -> Iterator[list[str]]:
        """Have torch's ``load_state_dict()`` load our form; gives what there is to tell of it in the end."""
        found: list[Checkpoint] = []
        remarks: list[str] = []

        def check(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
            found.append(self.read(state_dict, optimizer.param_groups))
            indices = {index for group in state_dict["param_groups"] for index in group["params"]}
            others = {key: value for key, value in state_dict["state"].items() if key not in indices}
            return {
                **state_dict,
                "state": others,
                "param_groups": _with_ours(state_dict["param_groups"], optimizer.param_groups),
            }

        def load(optimizer: Optimizer) -> None:
            whole.clear()
            remarks.extend(self.take_over(found[0], optimizer.param_groups, optimizer.state))

        # Ours sees, after all of the user's, what is loaded, and has loaded it before all of the user's. Torch is left
        # nothing to cast: it would give states their parameter's type, and bring whole tensors to the device of shards.
        handles = [
            optimizer.register_load_state_dict_pre_hook(check),
            optimizer.register_load_state_dict_post_hook(load, prepend=True),
        ]
        try:
            yield remarks
        finally:
            for handle in handles:
                handle.remove()

    def origin(self) -> dict[str, str | None]:
        """What checkpoints tell about who wrote them."""
        return {"theta": self._theta.sha256 if self._theta else None, "rule": self._rule.kind}

    def pack(self, state_dict: StateDict, groups: Groups, whole: Mapping[int, dict[str, Tensor]]) -> StateDict:
        """Our form of the state dict that torch made of an optimizer.

        Args:
            state_dict: Torch's.
            groups: Of the optimizer.
            whole: States of whole tensors, by number, where this rank has consolidated them.
        """
        saved = [dict(group) for group in state_dict["param_groups"]]
        saved[0][PROGRESS] = self._progress.to_bytes(**self.origin())
        # An empty state was only looked at.
        state = {key: own for key, own in state_dict["state"].items() if not (isinstance(own, dict) and not own)}
        state |= {index: {**state.get(index, {}), **mine} for index, mine in whole.items()}
        if state:  # without state, parameters need not be ready to be looked at
            entries = self._ledger.entries(groups)
            state, small = pack_states(state, entries, self._progress, is_whole=bool(whole))
            if small is not None:
                saved[0][SMALL] = small
        return {**state_dict, "state": state, "param_groups": saved}

    def read(self, state_dict: StateDict, groups: Groups) -> Checkpoint:
        """What a state dict has for an optimizer with these groups.

        Raises:
            CheckpointError: It does not fit.
        """
        try:
            check_form(state_dict)
            check_keys(state_dict, self._ledger.names)
            for group in state_dict["param_groups"]:
                check_state_dtype(group)
            saved = _with_ours(state_dict["param_groups"], groups)
            indices = [index for group in saved for index in group["params"]]
            there = {i: state_dict["state"][i] for i in indices if i in state_dict["state"]}
            runs, rest = split_run(there, self._rule)
            progress, theta = read_progress(saved, runs, self._rule)
            check_groups(saved, groups, self._rule.choices)
            for index, group in enumerate(saved):
                self._options.check_new(group, index)
            # Accelerate loads the state dict of an optimizer without state, and not bound to its model yet.
            states = {}
            if has_states(state_dict):
                states = read_states(saved, rest, self._ledger.entries(groups, saved), self._ledger, progress)
            return Checkpoint(states, progress, theta)
        except ValueError as error:
            raise CheckpointError(f"state_dict does not fit {self._owner}: {error}") from error

    def take_over(
        self, checkpoint: Checkpoint, groups: Groups, state: MutableMapping[Tensor, dict[str, Any]]
    ) -> list[str]:
        """Load what was read, where torch has loaded the groups; what there is to tell of it."""
        params = [param for group in groups for param in group["params"]]
        state.update({params[number]: own for number, own in checkpoint.states.items()})
        for group in groups:
            group.setdefault("base_lr", float(group["lr"]))
            group.pop(SMALL, None)
            group.pop(PROGRESS, None)
        self.reserve(groups)
        self._progress.has_begun = True
        if checkpoint.progress is None and checkpoint.states:
            return [_WITHOUT_PROGRESS.format(iteration=self._progress.iteration)]
        return self._assume(checkpoint, groups)

    def reserve(self, groups: Groups) -> None:
        """Have the first group show that it has progress: some loaders take only options that are there already.

        Those of torch.distributed.checkpoint do with ``flatten_optimizer_state_dict=True``.
        """
        groups[0].setdefault(PROGRESS, b"")
        if self._ledger.holdings.flat_slices:
            groups[0].setdefault(SMALL, b"")

    def settle(self, groups: Groups, state: States, *, everywhere: bool = False) -> list[str]:
        """Take over the progress among the states, where a wrapper has put them there without telling us.

        Looks at the first state only, or ``everywhere``, and then also at what was loaded into our tensors in place.

        Returns:
            What there is to tell of it.

        Raises:
            CheckpointError: :meth:`read` would not have taken it; nothing was changed.
        """
        params = (param for group in groups for param in group["params"])
        states = (state[param] for param in params if param in state)
        if any(has_run(own) for own in (states if everywhere else itertools.islice(states, 1))):
            return self._take_arrived(groups, state)
        if everywhere and self._progress.is_overwritten:
            self.check_overwritten(groups, state)
        return []

    def check_overwritten(self, groups: Groups, state: States) -> None:
        """Look at all that may have been loaded in place, as :meth:`read` would have.

        Raises:
            CheckpointError: It would not have taken it.
        """
        entries = self._ledger.entries(groups)
        try:
            check_progress(self._progress, self._rule)
            for number, own in self._ledger.complete(entries, state).items():
                check_values({name: own[name] for name in entries[number].stored}, number)
        except CheckpointError as error:
            raise CheckpointError(
                f"what was loaded in place, into the tensors of {self._owner}, does not fit it: {error}"
            ) from error
        self._progress.acknowledge()

    def check_arrival(self, groups: Groups, state: States) -> list[str]:
        """Look at states that were neither made nor loaded by the optimizer, and come without progress.

        Returns:
            What there is to tell of it.

        Raises:
            CheckpointError: :meth:`read` would not have taken them.
        """
        if self._progress.has_begun or not any(state.values()):
            return []
        entries = self._ledger.entries(groups)
        if not (there := self._ledger.complete(entries, state)):
            return []
        check_states(there, entries, self._ledger.names, has_stepped=False)
        return [_WITHOUT_PROGRESS.format(iteration=self._progress.iteration)]

    def placed(self, memory: Mapping[str, Tensor], groups: Groups, *, fresh: bool = False) -> dict[str, Tensor]:
        """Memory of the run where the first parameter's state is: torch's loaders want all tensors on one device.

        What is ``fresh`` is also made as wide as the widest parameter, as the first step would; others may be loaded
        into it in place.
        """
        params = [param for group in groups for param in group["params"]]
        if not memory or not params or params[0].is_meta:
            return dict(memory)
        dtype = max(map(state_dtype, params), key=lambda dtype: dtype.itemsize) if fresh else None
        home = self._ledger.holdings.home(params[0])
        return {name: value.to(home, dtype) for name, value in memory.items()}

    def _take_arrived(self, groups: Groups, state: States) -> list[str]:
        """Take over the progress that came with states, once all of them were looked at."""
        entries = self._ledger.entries(groups)
        there = {i: state[entry.param] for i, entry in enumerate(entries) if entry.param in state}
        runs, rest = split_run(there, self._rule)
        try:
            progress = read_run(runs, self._rule)
            has_stepped = progress is None or progress.iteration > 0
            check_states(rest, entries, self._ledger.names, has_stepped=has_stepped)
        except CheckpointError as error:
            raise CheckpointError(f"the states that {self._owner} was handed do not fit it: {error}") from error
        for i, run in runs.items():
            for name in run:
                there[i].pop(name, None)  # a parameter that is there twice has one state
        self._progress.has_begun = True
        return self._assume(Checkpoint({}, progress, None), groups)

    def _assume(self, checkpoint: Checkpoint, groups: Groups) -> list[str]:
        """Take over the progress of a checkpoint; what there is to tell of it."""
        if checkpoint.progress is None:
            return []
        remarks, own, horizon = [], self._progress, self._progress.num_steps
        checkpoint.progress.memory = self.placed(checkpoint.progress.memory, groups)
        own.assign(checkpoint.progress)
        theta = None if self._theta is None else self._theta.sha256
        if theta is not None and checkpoint.theta not in (None, theta):
            remarks.append(
                f"the checkpoint was written with other weights (theta sha256 {str(checkpoint.theta)[:12]}, here "
                f"{theta[:12]}); training goes on with those of this optimizer"
            )
        if horizon is not None:
            if own.num_steps not in (None, horizon):
                remarks.append(
                    f"the checkpoint was written with num_steps={own.num_steps}; keeping this optimizer's {horizon}"
                )
            own.num_steps = horizon
        return remarks


def _with_ours(saved: Sequence[Mapping[str, Any]], groups: Groups) -> list[dict[str, Any]]:
    """Saved groups with those options that are of the optimizer that loads them."""
    of_run = [{name: value for name, value in theirs.items() if name not in USUAL} for theirs in saved]
    paired = itertools.zip_longest(of_run, groups[: len(saved)], fillvalue=dict[str, Any]())
    return [{**theirs, **{name: mine[name] for name in USUAL if name in mine}} for theirs, mine in paired]
