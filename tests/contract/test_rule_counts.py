"""What rules count of whole tensors as they finish their steps, for the rest of the run."""

import pytest
import torch

from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.rules.base import Rule, read_gradient


class Counting(Rule):
    """Counts squares of its steps, and remembers their sum."""

    finishes = True
    counts = ("squares",)

    def state_shapes(self, layout):
        return {}

    def initial_memory(self):
        return {"squares": torch.zeros(())}

    def propose(self, block, prepared, sums, control, ctx):
        return 0.01 * read_gradient(block, ctx)

    def finish(self, steps, layout, ctx):
        ctx.count("squares", self.counted(steps))
        return steps

    def counted(self, steps):
        return steps.square().flatten(1).sum(1)

    def conclude(self, counted, ctx):
        return {"squares": counted["squares"]} if "squares" in counted else {}


class Undeclared(Counting):
    counts = ()


class Misnamed(Counting):
    counts = ("square",)


class Total(Counting):
    def counted(self, steps):
        return steps.square().sum()


def stepped(rule):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    model(torch.randn(16, 8)).square().mean().backward()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = LearnedOptimizer(model.parameters(), rule, lr=1.0)
    return model, before, optimizer


def test_what_is_counted_is_remembered():
    model, _, optimizer = stepped(Counting())
    optimizer.step()
    want = sum((0.01 * param.grad).square().sum() for param in model.parameters())
    torch.testing.assert_close(optimizer._progress.memory["squares"], want)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Undeclared, r"count\('squares'\): the rule has counts = \(\)"),
        (Misnamed, r"count\('squares'\): the rule has counts = \('square',\)"),
        (Total, r"count\('squares'\): values of shape \(\) must be one for each tensor"),
    ],
)
def test_what_ranks_would_not_know_of_is_refused_on_one_device_too(rule, told):
    model, before, optimizer = stepped(rule())
    with pytest.raises(ValueError, match=told):
        optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), before, strict=True))
