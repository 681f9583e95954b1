"""Theta, the weights of the learned optimizers, as checked data."""

from pylo_integrations.weights.bootstrap import bootstrap
from pylo_integrations.weights.sources import Weights, builtin_names, load_theta
from pylo_integrations.weights.theta import Theta

__all__ = ["Theta", "Weights", "bootstrap", "builtin_names", "load_theta"]
