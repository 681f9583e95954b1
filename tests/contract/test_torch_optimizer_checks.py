"""Does every catalogue entry pass the checks that torch makes of its own optimizers?

The machinery (OptimizerInfo, its standard bad inputs, device instantiation) is torch's; the checks are those of its
optimizer suite that apply to an optimizer without foreach and fused variants. One does not apply at all: a learned
optimizer need not stand still on zero gradients, for its network may have biases.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from functools import partial

import pytest
import torch
from thetas import distinct_rules, is_absent, theta_for
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from pylo_integrations import get_optimizer_info

pytestmark = pytest.mark.slow  # the smoke run asks the same, more sharply, in test_optimizer_contract.py


def optimizer_inputs(device, dtype=None, *, default_lr):
    variants = [
        {},
        {"lr": 0.5 * default_lr},
        {"lr": torch.tensor(0.5 * default_lr)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decay_policy": "after_independent"},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"max_grad_norm": 1.0},
    ]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in variants]


def ready_to_step(name):
    """The class of a catalogue entry, with defaults for what an optimizer's own checks of torch do not know to give."""
    spec = get_optimizer_info(name)

    class Ready(spec.cls):
        def __init__(self, params, *args, num_steps=100 if spec.needs_horizon else None, **options):
            super().__init__(params, *args, num_steps=num_steps, **options)

    if is_absent(spec.cls):
        Ready.default_weights = theta_for(name)
    Ready.__name__ = spec.cls.__name__
    return Ready


OPTIMIZERS = [
    OptimizerInfo(
        ready_to_step(name),
        optim_inputs_func=partial(optimizer_inputs, default_lr=get_optimizer_info(name).lr),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
            [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        ),
        supported_impls=(),
        supports_complex=False,
    )
    for name in distinct_rules()
]


def regression(device, contiguous=True):
    """Weight, bias, and a closure-like function computing the loss and its gradients."""
    torch.manual_seed(0)
    shape = (10, 5) if contiguous else (10, 5, 2)
    weight = torch.randn(shape, device=device)
    weight = nn.Parameter(weight if contiguous else weight[..., 0].clone(memory_format=torch.preserve_format))
    if not contiguous:
        weight = nn.Parameter(torch.randn(10, 5, 2, device=device)[..., 0])
    bias = nn.Parameter(torch.randn(10, device=device))
    x = torch.randn(5, device=device)

    def evaluate():
        weight.grad = bias.grad = None
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return weight, bias, evaluate


def assert_same_tensors(test, one, other):
    for a, b in zip(one, other, strict=True):
        test.assertEqual(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("small_thetas")
class TestLearnedOptimizers(TestCase):
    @optims(OPTIMIZERS)
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            params = given.params if given.params is not None else [nn.Parameter(torch.randn(1, 1))]
            self.assertEqual(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            build = lambda params=params, given=given: optim_info.optim_cls(params, **given.kwargs)  # noqa: E731
            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    build()
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    build()

    @parametrize("contiguous", [True, False])
    @parametrize("with_schedulers", [True, False])
    @optims(OPTIMIZERS)
    def test_goes_in_the_right_direction(self, device, dtype, optim_info, contiguous, with_schedulers):
        schedules = optim_info.scheduler_inputs if with_schedulers else [()]
        for makers, given in itertools.product(schedules, optim_info.optim_inputs_func(device=device)):
            weight, bias, evaluate = regression(device, contiguous)
            self.assertEqual(weight.is_contiguous(), contiguous)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            schedulers = [make(optimizer) for make in makers]
            initial = evaluate().item()
            for _ in range(12):  # the schedules have changed rates by then
                loss = optimizer.step(evaluate)
                for scheduler in schedulers:
                    scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
            if given.kwargs.get("maximize") and not given.kwargs.get("weight_decay"):
                self.assertGreater(evaluate().item(), initial)
            elif not given.kwargs.get("maximize"):
                self.assertLess(evaluate().item(), initial)

    @optims(OPTIMIZERS)
    def test_param_groups_have_their_own_lr_and_weight_decay(self, device, dtype, optim_info):
        weight, bias, evaluate = regression(device)
        optimizer = optim_info.optim_cls([{"params": [weight], "lr": 0.0}, {"params": [bias], "weight_decay": 1e-3}])
        frozen = weight.detach().clone()
        initial = evaluate().item()
        for _ in range(5):
            optimizer.step(evaluate)
        self.assertEqual(weight.detach(), frozen)
        self.assertLess(evaluate().item(), initial)

    @optims(OPTIMIZERS)
    def test_tensor_lr_equals_float_lr(self, device, dtype, optim_info):
        runs = []
        for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias], lr=lr)
            for _ in range(3):
                optimizer.step(evaluate)
            if isinstance(lr, torch.Tensor):  # a scheduler changes it in place, and must reach us
                self.assertIs(optimizer.param_groups[0]["lr"], lr)
            runs.append([weight, bias])
        assert_same_tensors(self, runs[0], runs[1])
        assert_same_tensors(self, runs[0], runs[2])

    @optims(OPTIMIZERS)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            param = nn.Parameter(torch.randn(2, 3, device=device))
            before = param.detach().clone()
            optim_info.optim_cls([param], **given.kwargs).step(loss=1.0)
            self.assertEqual(param.detach(), before)

    @optims(OPTIMIZERS)
    def test_grads_are_never_changed(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            loss = evaluate()
            before = [weight.grad.clone(), bias.grad.clone()]
            version = weight.grad._version
            optimizer.step(loss=loss)
            assert_same_tensors(self, before, [weight.grad, bias.grad])
            self.assertEqual(weight.grad._version, version)

    @optims(OPTIMIZERS)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, _ = regression(device)
            text = repr(optim_info.optim_cls([weight, bias], **given.kwargs))
            self.assertIn(optim_info.optim_cls.__name__, text)
            self.assertIn("weight_decay:", text)

    @optims(OPTIMIZERS)
    def test_state_dict_deterministic(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            for _ in range(3):
                optimizer.step(evaluate)
            weight_c, bias_c, _ = regression(device)
            with torch.no_grad():
                weight_c.copy_(weight), bias_c.copy_(bias)
            twin = optim_info.optim_cls([weight_c, bias_c], **given.kwargs)
            twin.load_state_dict(optimizer.state_dict())
            for _ in range(3):
                loss = optimizer.step(evaluate)
                weight_c.grad, bias_c.grad = weight.grad.clone(), bias.grad.clone()
                twin.step(loss=loss)
                assert_same_tensors(self, [weight, bias], [weight_c, bias_c])
            self.assertEqual(optimizer.state_dict(), twin.state_dict())
            twin.load_state_dict(twin.state_dict())
            self.assertEqual(optimizer.state_dict(), twin.state_dict())

    @optims(OPTIMIZERS)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            for _ in range(3):
                optimizer.step(evaluate)
            with tempfile.TemporaryFile() as file:
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=True), optimizer.state_dict())

    @optims(OPTIMIZERS)
    def test_state_dicts_with_and_without_names_exchange(self, device, dtype, optim_info):
        def trained(named):
            weight, bias, evaluate = regression(device)
            params = [("weight", weight), ("bias", bias)] if named else [weight, bias]
            optimizer = optim_info.optim_cls(params)
            optimizer.step(evaluate)
            return optimizer

        for saved_named, loading_named in itertools.product((True, False), repeat=2):
            saved, loading = trained(saved_named), trained(loading_named)
            loading.load_state_dict(saved.state_dict())
            self.assertEqual(saved.state_dict()["state"], loading.state_dict()["state"])

    @optims(OPTIMIZERS)
    def test_deepcopy_copies_all_public_attributes(self, device, dtype, optim_info):
        def public(optimizer):
            return {name for name in dir(optimizer) if not name.startswith("_")}

        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            optimizer.step(evaluate)
            self.assertEqual(public(optimizer), public(copy.deepcopy(optimizer)))

    @optims(OPTIMIZERS)
    def test_state_is_not_empty_after_a_step(self, device, dtype, optim_info):
        weight, bias, evaluate = regression(device)
        optimizer = optim_info.optim_cls([weight, bias])
        optimizer.step(evaluate)
        for state in optimizer.state.values():
            self.assertGreater(len(state), 0)
            for value in state.values():
                self.assertTrue(value.isfinite().all() and value.any())

    @optims(OPTIMIZERS)
    def test_global_default_dtype_is_irrelevant(self, device, dtype, optim_info):
        runs = []
        for default in (torch.float32, torch.float64):
            weight, bias, evaluate = regression(device)
            optimizer = optim_info.optim_cls([weight, bias])
            torch.set_default_dtype(default)
            try:
                for _ in range(2):
                    optimizer.step(evaluate)
            finally:
                torch.set_default_dtype(torch.float32)
            runs.append([weight, bias])
        assert_same_tensors(self, *runs)

    @optims(OPTIMIZERS)
    def test_loading_a_checkpoint_onto_another_device(self, device, dtype, optim_info):
        weight, bias, evaluate = regression("cpu")
        optimizer = optim_info.optim_cls([weight, bias])
        optimizer.step(evaluate)
        moved, moved_bias, evaluate_moved = regression(device)
        there = optim_info.optim_cls([moved, moved_bias])
        there.load_state_dict(optimizer.state_dict())
        there.step(evaluate_moved)
        for param, state in there.state.items():
            self.assertTrue(all(value.device == param.device for value in state.values()))


instantiate_device_type_tests(TestLearnedOptimizers, globals(), only_for=("cpu", "cuda"))
