"""Is each fact of an optimizer in one place, and do all who ask for it get the same?"""

from __future__ import annotations

import inspect

import pytest

from pylo_integrations import get_optimizer_info, list_optimizers, optimizers
from pylo_integrations.profiles import ARCHITECTURES, PROFILES, SHAPES, architecture_of
from pylo_integrations.weights.convert import OPTIMIZERS
from pylo_integrations.weights.published import PUBLISHED
from pylo_integrations.weights.stand_in import stand_in
from pylo_integrations.weights.theta import Theta

NAMES = list(PROFILES)


def test_all_name_the_same_optimizers():
    assert sorted(NAMES) == list_optimizers() and len(optimizers.__all__) == len(NAMES)
    assert ARCHITECTURES.keys() == SHAPES.keys() == {profile.architecture for profile in PROFILES.values()}
    assert set(OPTIMIZERS) <= {*NAMES, *ARCHITECTURES}
    assert {entry.optimizer for entry in PUBLISHED} - {None} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_tells_what_the_profile_says(name):
    spec, profile = get_optimizer_info(name), PROFILES[name]
    assert (spec.architecture, spec.lr, spec.weights) == (profile.architecture, profile.lr, profile.weights)
    assert (spec.weight_decay, spec.wants_schedule) == (profile.weight_decay, profile.wants_schedule)
    assert (spec.needs_loss, spec.needs_horizon) == (profile.rule.needs_loss, profile.rule.needs_horizon)
    assert architecture_of(name) == architecture_of(profile.architecture) == profile.architecture
    known = inspect.signature(profile.rule.from_arrays).parameters
    assert {**profile.constants, **profile.hyper}.items() <= spec.hyper.items() and spec.hyper.keys() <= known.keys()
    hub = [f"hub:{part.name}" for entry in spec.published for part in entry.repositories]
    assert hub or name == "pace"
    assert profile.weights is None or profile.weights.startswith("builtin:") or profile.weights in hub


@pytest.mark.parametrize("name", NAMES)
def test_bare_arrays_get_the_constants_of_the_published_weights(name):
    profile = PROFILES[name]
    theta = Theta.from_arrays(name, stand_in(profile.architecture).arrays)
    assert (theta.architecture, theta.hyper) == (profile.architecture, profile.hyper)


def test_a_subclass_is_what_its_base_is():
    class Mine(optimizers.VeLO):
        default_lr = 0.5

    assert (Mine.default_lr, Mine.architecture, Mine.default_weights) == (0.5, "velo", optimizers.VeLO.default_weights)
