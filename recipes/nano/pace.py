"""pace, untuned: it knows the horizon and shrinks its steps by itself."""

from pylo_integrations import create_optimizer
from pylo_integrations.evaluation import SCHEDULES


def build(model, steps):
    return [(create_optimizer(model, "pace", num_steps=steps), SCHEDULES["constant"])]
