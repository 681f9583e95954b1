"""Agreement: ranks that train together find out at once if they do not do the same.

Every exchange that begins a step starts with a *header* of fixed size: a few numbers that add up, so they travel in the
round that the step needs anyway. They carry a digest of what the rank is about to do. If the sums show that digests
differ, every rank knows it before any has changed anything, and all of them tell each other what they meant to do.

The rest of that exchange has the size that ranks last agreed on. A rank whose groups have changed, or which cannot
step, does not know whether those of the others have; so it sends zeros of the old size behind its header. Messages
therefore always fit each other, whatever ranks disagree on.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pylo_integrations.formats import wanted_format
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.rounds import RankError, Ranks

Statement = Mapping[str, str]
"""What a rank is about to do: values by subject, both to be read by people."""

_WORDS = 4
"""A digest has 64 bits, as numbers of 16: sums of their squares over two million ranks are exact in float64."""

HEADER = 3 + 2 * _WORDS
"""Numbers in a header: how many ranks ask, fail, and vote yes; words of the digest, and their squares."""

_ROUNDING = 1e-6
"""Relative variance over ranks that rounding may have caused."""

_SHOWN = 8
"""How many differences a message lists."""


class DisagreementError(RuntimeError):
    """Ranks that train together were about to do different things; nothing was changed on any of them."""


def digest_of(*parts: Any) -> bytes:
    """Eight bytes that are the same on all ranks for objects of the same ``repr``."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=2 * _WORDS).digest()


def header(digest: bytes, *, asks: bool = False, fails: bool = False, votes: bool = False) -> list[float]:
    """The numbers that a rank adds to those of the others."""
    words = struct.unpack(f"<{_WORDS}H", digest)
    return [asks, fails, votes, *words, *(word * word for word in words)]


@dataclass(frozen=True)
class Answer:
    """A header that was added up over all ranks.

    Attributes:
        agrees: Whether all digests are the same. Every rank gets the same answer: if they are not, the sum of the words
            or of their squares is another one than any rank's own would add up to.
        ask: How many ranks ask.
        fail: How many ranks fail.
        vote: How many ranks vote yes.
    """

    agrees: bool
    ask: int
    fail: int
    vote: int

    @classmethod
    def read(cls, numbers: Sequence[float], digest: bytes, size: int) -> Answer:
        """Of ``size`` ranks, one of which sent ``digest``."""
        own = [size * number for number in header(digest)[3:]]
        ask, fail, vote = (int(number) for number in numbers[:3])
        return cls(list(numbers[3:]) == own, ask, fail, vote)


class Agreement:
    """What the ranks have agreed on.

    Args:
        ranks: Who has to agree.

    Attributes:
        contract: Digest of what was agreed on; None before.
        numel: Numbers in the exchange that begins the next step of a rank for which nothing has changed.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._with: Any = None
        self.contract: bytes | None = None
        self.numel = HEADER

    def renew(self) -> None:
        """Forget what was agreed on with other ranks than there are now."""
        if self._with is not self._ranks.group:
            self._with = self._ranks.group
            self.end()

    def end(self) -> None:
        """Forget what was agreed on, as all ranks do when they have nothing more to exchange."""
        self.contract, self.numel = None, HEADER

    def ask(
        self,
        contract: bytes,
        state: Callable[[], Statement],
        device: torch.device,
        measured: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """Agree on something new, together with all ranks.

        Args:
            contract: Digest of what is to hold until further notice.
            state: Tells that, and all that is to be alike now.
            device: Where the exchange takes place.
            measured: 0-d tensors by subject that ranks have alike but for rounding, where they have them at all; they
                take an exchange of their own.

        Raises:
            DisagreementError: Ranks do not all ask for the same.
            RankError: Another rank failed.
        """
        answer = self._send(digest_of(state()), device, asks=True)
        self.check(answer, state, asked=True)
        if measured:
            self._compare(measured, device)
        self.contract, self.numel = contract, HEADER

    def _compare(self, measured: Mapping[str, Tensor | None], device: torch.device) -> None:
        """Raise DisagreementError if numbers differ by more than rounding."""
        known = torch.tensor([value is not None for value in measured.values()], dtype=torch.float64, device=device)
        zero = known.new_zeros(())
        values = torch.stack([zero if value is None else value.to(zero) for value in measured.values()])
        sums = torch.stack([known, values, values.square()])
        self._ranks.sum_(sums)
        counts, totals, squares = sums.tolist()
        triples = zip(counts, totals, squares, strict=True)
        # What is not finite compares as equal; the step itself sees to that.
        if any(count * square > (1 + _ROUNDING) * total**2 for count, total, square in triples):
            told = {name: "none" if value is None else f"{float(value):.6g}" for name, value in measured.items()}
            raise DisagreementError(_explain(self._ranks.gather(told)))

    def confirm(self, state: Callable[[], Statement], device: torch.device) -> None:
        """Find out, before the first exchange under a contract, whether all ranks come to it.

        A rank that fails before that does not know its size. Further exchanges have the same.

        Raises:
            RankError: Another rank failed.
        """
        if self.numel == HEADER:
            self.check(self._send(digest_of("collected"), device), state)

    def vote(self, question: str, yes: bool, state: Callable[[], Statement], device: torch.device) -> bool:
        """Whether any rank says yes to a ``question`` that all of them have to ask before their step.

        Raises:
            DisagreementError: A rank asks nothing of the kind.
            RankError: Another rank failed.
        """
        answer = self._send(digest_of(question), device, votes=yes)
        self.check(answer, state)
        return answer.vote > 0

    def fail(self, error: Exception, device: torch.device) -> None:
        """Tell the others that this rank cannot take the step for which they will wait."""
        try:
            self._send(digest_of(), device, fails=True)
            self._ranks.gather(_Word(f"{type(error).__name__}: {error}", {}))
        except RankError:
            pass  # the others have troubles of their own; ours is raised

    def check(self, answer: Answer, state: Callable[[], Statement], asked: bool = False) -> None:
        """Raise on all ranks unless all of them do the same.

        Args:
            answer: To the header that began this step.
            state: Makes what to tell if ranks disagree.
            asked: Whether this rank asked.

        Raises:
            DisagreementError: Ranks do not all do the same.
            RankError: Another rank failed.
        """
        size = self._ranks.size
        if answer.agrees and not answer.fail and answer.ask == (size if asked else 0):
            return
        words: list[_Word] = self._ranks.gather(_Word(None, {} if answer.fail else state()))
        failures = {rank: word.failure for rank, word in enumerate(words) if word.failure is not None}
        if failures:
            told = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
            raise RankError(
                f"no rank takes this step, and nothing was changed, since not all of the {size} ranks that train "
                f"together can: {told}"
            )
        raise DisagreementError(_explain([word.statement for word in words]))

    def _send(self, digest: bytes, device: torch.device, **flags: bool) -> Answer:
        numbers = torch.tensor(header(digest, **flags), dtype=torch.float64, device=device)
        flat = torch.cat([numbers, numbers.new_zeros(self.numel - HEADER)])
        self._ranks.sum_(flat)
        return Answer.read(flat[:HEADER].tolist(), digest, self._ranks.size)


@dataclass(frozen=True)
class _Word:
    failure: str | None
    statement: Statement


def _explain(statements: Sequence[Statement]) -> str:
    """What differs between the statements of ranks, and which rank says what."""
    differences = []
    for subject in dict.fromkeys(subject for statement in statements for subject in statement):
        ranks: dict[str, list[int]] = {}
        for rank, statement in enumerate(statements):
            ranks.setdefault(statement.get(subject, "none"), []).append(rank)
        if len(ranks) > 1:
            differences.append(
                f"{subject}: " + "; ".join(f"{value} on {_several(who)}" for value, who in ranks.items())
            )
    shown = differences[:_SHOWN] or ["what they would do at this step"]
    if more := len(differences) - len(shown):
        shown.append(f"and {more} more")
    return (
        f"the {len(statements)} ranks that train together disagree, so none takes this step; nothing was changed:\n  "
        + "\n  ".join(shown)
        + "\nGive the optimizers of all ranks the same parameters in the same order, with the same options, schedule "
        "and checkpoint; or name the ranks that train together with optimizer.bind_model(model, process_group=...)"
    )


def _several(ranks: Sequence[int]) -> str:
    """Ranks in words; many in a row as a range."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {told}"


# -- what is compared --------------------------------------------------------------------------------------------------


def contract_of(groups: Sequence[Mapping[str, Any]], holdings: Holdings, common: Statement) -> dict[str, str]:
    """What is to hold until further notice: what decides which numbers ranks exchange, and what they mean.

    Args:
        groups: Parameter groups.
        holdings: What is here of their parameters.
        common: What there is besides.
    """
    contract = {**common, "parameter groups": str(len(groups))}
    for index, group in enumerate(groups):
        decisive = {**{name: group[name] for name in ("axes", "rule")}, "state_dtype": wanted_format(group)}
        decisive |= {name: group[name] for name in ("split", "stacked") if name in group}
        contract |= {f"{option} of group {index}": repr(value) for option, value in decisive.items()}
    for index, position, name, param in compared(groups, holdings):
        contract[f"parameter {position} of group {index}"] = _describe(param, name, holdings)
    return contract


def compared(groups: Sequence[Mapping[str, Any]], holdings: Holdings) -> Iterator[tuple[int, int, str | None, Tensor]]:
    """Parameters that ranks must have alike: their group, position there, name, and they themselves.

    Those that have a name, or are divided among ranks. Of others nothing is mixed up, and there is no telling whose
    they are: each rank may have its own, as ``ZeroRedundancyOptimizer`` gives them.
    """
    for index, group in enumerate(groups):
        names = group.get("param_names") or ()
        for position, param in enumerate(group["params"]):
            name = names[position] if position < len(names) else holdings.name(param)
            if name is not None or holdings.divides(param):
                yield index, position, name, param


def may_step(param: Tensor) -> bool:
    """Whether a parameter is neither frozen nor without a shape yet, as those of lazy modules are."""
    return (param.requires_grad or param.grad is not None) and not is_lazy(param)


def _describe(param: Tensor, name: str | None, holdings: Holdings) -> str:
    told = [] if name is None else [name]
    if not may_step(param):
        return " ".join([*told, "frozen"])
    return " ".join([*told, str(param.dtype).removeprefix("torch."), holdings.describe(param)])


VARYING = ("lr", "weight_decay", "weight_decay_policy", "maximize", "base_lr")
"""Options of groups that schedules change, which are compared at every step."""


def options_of(groups: Sequence[Mapping[str, Any]], waits: bool = False) -> list[list[Any]]:
    """:data:`VARYING` of every group; tensors on a device are read only by who ``waits`` for it."""
    return [[_plain(group.get(option), waits) for option in VARYING] for group in groups]


def _plain(value: Any, waits: bool) -> Any:
    if isinstance(value, Tensor):
        return float(value) if waits or value.device.type == "cpu" else "on a device"
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def named_options(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """:data:`VARYING` of every group, to be read by people."""
    return {
        f"{option} of group {index}": repr(value)
        for index, values in enumerate(options_of(groups, waits=True))
        for option, value in zip(VARYING, values, strict=True)
    }


def constants_of(rule: Any) -> Iterator[tuple[str, str]]:
    """Fields of a dataclass by name, in words or, where those are many, as a digest."""
    for field in fields(rule) if is_dataclass(rule) else ():
        text = _text(getattr(rule, field.name))
        yield field.name, text if len(text) <= 80 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, Mapping):
        return str({key: _text(entry) for key, entry in value.items()})
    if isinstance(value, (tuple, list)):
        return str([_text(entry) for entry in value])
    if is_dataclass(value):
        return f"{type(value).__name__}{dict(constants_of(value))}"
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(params: Sequence[Tensor]) -> list[int]:
    """A number for the bits of each tensor, whatever adds them up in which order; waits for each device once."""
    if not params:
        return []
    bits = [param.detach().view(_INTEGERS[param.element_size()]).sum(dtype=torch.int64) for param in params]
    return [int(number) for number in torch.stack([each.to(params[0].device) for each in bits]).tolist()]
