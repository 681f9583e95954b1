"""Do VeLO, Celo and Celo-Adam handle what concerns a whole model: loss, horizon, idle tensors, their own memory?"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from thetas import bank, celo, celo_adam, create, lstm, theta_for, velo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_integrations import Celo, Theta, VeLO, create_optimizer
from pylo_integrations.rules import velo as velo_module
from pylo_integrations.rules.control import LossMemory, loss_decays

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = ("velo", "celo", "celo_adam")
SHAPES = [(5, 3), (4, 4), (7,), ()]


def parameters(shapes=SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def run(optimizer, params, losses, first: int = 0) -> None:
    for k, loss in enumerate(losses, start=first):
        generator = torch.Generator().manual_seed(k)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step(loss=loss)


def wavering(steps: int) -> list[float]:
    """Losses that now fall and now rise: of those that only fall, the features are all -1."""
    return [2 + math.cos(2 * k) for k in range(steps)]


def assert_same(one, other, **tolerance) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 0})


# -- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_counts(name):
    def final(losses):
        params = parameters()
        run(create(params, name, num_steps=20), params, losses)
        return params[0].detach()

    plain = final(wavering(6))
    for k in range(5):  # the last one only tells later steps
        losses = wavering(6)
        losses[k] *= 1.1
        assert not torch.equal(final(losses), plain), f"loss {k}"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_loss_or_horizon_changes_nothing(name):
    params = parameters()
    optimizer = create_optimizer(params, name)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="needs the training loss"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="how many steps the run takes"):
        optimizer.step(loss=1.0)
    assert_same(params, before)
    assert optimizer.iteration == 0 and not optimizer._progress.memory


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_is_not_remembered(name):
    params = parameters()
    optimizer = create(params, name)
    run(optimizer, params, wavering(3))
    before = copy.deepcopy((optimizer._progress.memory, [optimizer.state[p] for p in params], params))
    with pytest.warns(RuntimeWarning, match="was skipped"):
        run(optimizer, params, [math.nan])
    memory, states, old = before
    assert_same(optimizer._progress.memory.values(), memory.values())
    for p, state in zip(params, states, strict=True):
        assert_same(optimizer.state[p].values(), state.values())
    assert_same(params, old)


@pytest.mark.parametrize("name", NAMES)
def test_an_l2_penalty_is_in_the_gradient_and_in_the_loss_of_its_group_only(name):
    """As if the user had put it there."""
    decay = 0.05
    params, by_hand = parameters(), parameters()
    groups = [{"params": params[:2], "weight_decay": decay}, {"params": params[2:]}]
    optimizer, plain = create(groups, name, weight_decay_policy="l2"), create(by_hand, name)
    for k, loss in enumerate(wavering(5)):
        run(optimizer, params, [loss], first=k)
        for p, q in zip(params, by_hand, strict=True):
            q.grad = p.grad.clone() + (decay * q.detach() if any(q is member for member in by_hand[:2]) else 0)
        penalty = decay * sum(q.detach().square().sum() for q in by_hand[:2])
        plain.step(loss=loss + penalty)
    # The loss by hand is rounded to float32, as every loss from outside is.
    assert_same(params, by_hand, rtol=1e-6, atol=1e-7)
    memory = optimizer._progress.memory
    assert_same(memory.values(), [plain._progress.memory[key] for key in memory], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_maximising_is_minimising_the_negated_loss(name):
    up, down = parameters(), parameters()
    ascending, descending = create(up, name, maximize=True), create(down, name)
    for k, loss in enumerate(wavering(5)):
        run(ascending, up, [-loss], first=k)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        descending.step(loss=loss)
    assert_same(up, down)


def test_an_outlier_counts_as_at_most_twice_the_largest_average():
    like = torch.zeros((), dtype=torch.float64)
    decays = loss_decays(1000, like)
    calm = outlier = LossMemory.recall({}, like)
    for seen in range(5):
        calm, outlier = (memory.observe(torch.tensor(2.0), decays, seen) for memory in (calm, outlier))
    ceiling = 2 * (calm.means / (1 - decays**6)).max()
    calm, outlier = calm.observe(ceiling, decays, 5), outlier.observe(torch.tensor(1e6), decays, 5)
    assert_same(calm, outlier)


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_tells_the_features_of_the_loss(name):
    params = parameters()
    optimizer = create(params, name)
    assert optimizer.rule.telemetry({}) == {}
    run(optimizer, params, [1.0, 2.0, 2.0, 2.0])  # faster averages have risen further
    told = optimizer.rule.telemetry(optimizer._progress.memory)
    assert list(told) == [f"loss_feature_{i}" for i in range(9)]
    assert all(feature.numel() == 1 and 0 < feature <= 1 for feature in told.values())


# -- horizon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_horizon_it_warns_once_and_goes_on(name):
    params = parameters()
    optimizer = create(params, name, num_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, wavering(4))
    with pytest.warns(RuntimeWarning, match="beyond the horizon num_steps=4"):
        run(optimizer, params, [1.0], first=4)
    before = [p.detach().clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, [1.0] * 20, first=5)
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_horizon_counts_and_may_be_moved_during_the_run(name):
    def final(first, second):
        params = parameters()
        optimizer = create(params, name, num_steps=first)
        run(optimizer, params, wavering(3))
        optimizer.set_num_steps(second)
        run(optimizer, params, wavering(3), first=3)
        return params[0].detach()

    assert not torch.equal(final(10, 10), final(100, 100))
    assert not torch.equal(final(10, 10), final(10, 100))


@pytest.mark.parametrize("name", NAMES)
def test_resuming_with_another_horizon_keeps_the_memory_and_takes_the_new_horizon(name):
    params = parameters()
    optimizer = create(params, name, num_steps=10)
    run(optimizer, params, wavering(3))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = create(twins, name, num_steps=40)
    with pytest.warns(RuntimeWarning, match="num_steps=10; keeping this optimizer's 40"):
        resumed.load_state_dict(optimizer.state_dict())
    optimizer.set_num_steps(40)
    for one, mine in ((optimizer, params), (resumed, twins)):
        run(one, mine, wavering(3), first=3)
    assert_same(params, twins)


# -- tensors among each other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_gradient_takes_no_part(name):
    with_idle, without = parameters(), parameters()
    idle = nn.Parameter(torch.full((3, 3), 50.0, dtype=torch.float64))
    one, other = create([idle, *with_idle], name), create(without, name)
    one.init_state()
    before = {key: value.clone() for key, value in one.state[idle].items()}
    for optimizer, params in ((one, with_idle), (other, without)):
        run(optimizer, params, wavering(4))
    assert_same(with_idle, without, rtol=1e-12, atol=1e-14)
    assert_same(one.state[idle].values(), before.values())
    assert (idle == 50).all()


def test_velo_tensors_learn_of_each_other_and_celo_tensors_share_one_schedule():
    def updates(name, scale):
        near, far = parameters([(5, 3)])[0], parameters([(4, 4)], seed=1)[0]
        far.data *= scale
        old = near.detach().clone()
        run(create([near, far], name), [near, far], wavering(3))
        return near.detach() - old

    assert not torch.allclose(updates("velo", 1.0), updates("velo", 1e3), rtol=1e-6)
    assert torch.equal(updates("celo", 1.0), updates("celo", 1e3))


def test_velo_keeps_a_row_of_the_lstm_beside_every_tensor_and_celo_one_for_all():
    params = parameters()
    optimizer = create(params, "velo")
    optimizer.init_state()
    start = optimizer.theta.arrays["lstm_init_state/hidden"][0].double()
    assert all(torch.equal(optimizer.state[p]["lstm_hidden"], start) for p in params)
    run(optimizer, params, wavering(2))
    rows = torch.stack([optimizer.state[p]["lstm_hidden"] for p in params])
    assert not torch.equal(rows[0], start) and not torch.equal(rows[0], rows[2])
    optimizer = create(parameters(), "celo")
    run(optimizer, optimizer.param_groups[0]["params"], wavering(2))
    assert optimizer._progress.memory["lstm_hidden"].shape == (1, len(start))
    assert "lstm_hidden" not in optimizer.state[optimizer.param_groups[0]["params"][0]]


class CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_matrix_products_do_not_multiply_with_tensors(name):
    counts = []
    for copies in (1, 20):
        params = parameters(SHAPES * copies)
        optimizer = create(params, name)
        run(optimizer, params, wavering(1))
        with CountProducts() as products:
            run(optimizer, params, wavering(1), first=1)
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_share_one_controller(name):
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    params = [nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(parameters(), dtypes, strict=False)]
    apart = [nn.Parameter(p.detach().double()) for p in params]
    mixed, wide = create(params, name), create(apart, name)
    for k, loss in enumerate(wavering(4)):
        run(mixed, params, [loss], first=k)
        for p, q in zip(params, apart, strict=True):
            q.grad = p.grad.double()
        wide.step(loss=loss)
    for p, q in zip(params, apart, strict=True):
        assert p.dtype != torch.float64 or p.isfinite().all()
        torch.testing.assert_close(p.double(), q.detach(), rtol=4 * torch.finfo(p.dtype).eps, atol=1e-3)


def test_velo_sees_the_number_of_axes_longer_than_one(monkeypatch):
    seen = []
    step = velo_module.lstm_step
    monkeypatch.setattr(velo_module, "lstm_step", lambda inputs, *args: seen.append(inputs) or step(inputs, *args))
    shapes = [(), (1, 1), (7,), (1, 7), (5, 3), (2, 3, 4), (2, 3, 1, 2, 2), (2, 2, 2, 2, 2)]
    params = parameters(shapes)
    for p in params:
        run(create([p], "velo"), [p], [1.0])
    ranks = torch.cat(seen)[:, 19:24]  # after 9 of the horizon, 9 of the loss and 1 of the second moment
    assert [row.nonzero().flatten().tolist() for row in ranks] == [[0], [0], [1], [1], [2], [3], [4], []]
    assert ranks.sum() == 7


def test_a_bank_is_averaged_with_coefficients():
    """Two equal MLPs at coefficients that add up to 1 are half of one."""
    one, two = celo(), {**celo(), **lstm(18, 2, lr_mult=math.log(100.0)), **bank(2)}
    halves = {name: array / 2 if name.startswith("ff_mod_stack") else array for name, array in one.items()}
    runs = []
    for arrays in (two, halves):
        params = parameters()
        run(create(params, "celo", weights=Theta.from_arrays("celo", arrays)), params, wavering(3))
        runs.append(params)
    assert_same(*runs, rtol=1e-12, atol=1e-14)


# -- theta and options -----------------------------------------------------------------------------------------------


def test_phase_1_leaves_the_schedule_out():
    def update(**options):
        params = parameters([(5, 3)])
        old = params[0].detach().clone()
        run(create(params, "celo", **options), params, [1.0])
        return params[0].detach() - old

    ratio = update() / update(phase=1)
    assert ratio.std() < 1e-9 and ratio.mean() > 1.5  # the learned factor of this theta is near 10
    with pytest.raises(ValueError, match=r"phase=3 must be 1 .* or 2"):
        create(parameters(), "celo", phase=3)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("velo", {"rnn_params/step_size/b": None}, r"velo theta lacks \['rnn_params/step_size/b'\]"),
        ("velo", {"rnn_params/linear/w": None}, r"lacks \['rnn_params/linear/w'\]"),
        ("velo", {"ff_mod_stack/~/w0__13": None}, r"lacks \['ff_mod_stack/~/w0__13'\]"),
        ("velo", {"rnn_params/rnn_to_controls/b": None}, r"lacks \['rnn_params/rnn_to_controls/b'\]"),
        ("velo", {"ff_mod_stack/~/w0__14": (3, 3, 4)}, r"unknown arrays \['ff_mod_stack/~/w0__14'\]"),
        ("velo", {"ff_mod_stack/~/w0__3": (3, 1, 4)}, r"ff_mod_stack/~/w0__3.*\(3, 1, 4\).*expected .*\(3, 3, 4\)"),
        ("velo", {"ff_mod_stack/~/b0": ()}, r"ff_mod_stack/~/b0 is \(\), which has too few axes"),
        ("velo", {"rnn_params/linear_2/w": (18, 6)}, r"linear_2/w.*\(18, 6\).*expected .*\(30, 6\)"),
        ("celo", {"rnn_params/linear_2/w": (30, 6)}, r"celo theta has shapes .*\(30, 6\).*expected .*\(18, 6\)"),
        ("celo", {"ff_mod_stack/~/w2": (1, 4, 2)}, r"w2.*\(1, 4, 2\).*expected .*\(1, 4, 3\)"),
        ("celo_adam", {"lstm_init_state/hidden": None}, r"celo_adam theta lacks \['lstm_init_state/hidden'\]"),
        ("celo_adam", {"rnn_params/rnn/linear/w": (12, 23)}, r"rnn/linear/w.*\(12, 23\).*expected .*\(12, 24\)"),
        ("celo_adam", {"rnn_params/rnn_to_controls/b": (1,)}, "unknown arrays"),
    ],
)
def test_arrays_that_do_not_fit_say_which(architecture, change, message):
    arrays = {"velo": velo, "celo": celo, "celo_adam": celo_adam}[architecture]()
    arrays |= {name: None if shape is None else torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        Theta.from_arrays(architecture, {name: array for name, array in arrays.items() if array is not None})


def test_flags_are_constants_of_theta_and_survive_its_file(tmp_path):
    flags = {"use_bugged_loss_features": True, "use_bugged_next_lstm_state": True}
    theta = Theta.from_arrays("velo", velo(), flags)
    loaded = Theta.load(theta.save(tmp_path / "theta.safetensors"))
    rule = VeLO(parameters(), weights=loaded).rule
    assert loaded == theta and loaded.hyper == flags
    assert rule.use_bugged_loss_features and rule.use_bugged_next_lstm_state
    assert not VeLO(parameters(), weights=theta_for("velo")).rule.use_bugged_loss_features
    with pytest.raises(ValueError, match="use_bugged"):
        Theta.from_arrays("celo", celo(), flags)


def test_theta_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="are for velo, not for Celo"):
        Celo(parameters(), weights=theta_for("velo"))


@pytest.mark.slow
def test_without_network_the_published_weights_are_a_documented_error(tmp_path):
    names = ["velo", "celo_adam"]
    code = f"""
import torch
from pylo_integrations import create_optimizer
for name in {names}:
    try:
        create_optimizer([torch.nn.Parameter(torch.ones(2))], name, num_steps=5)
    except FileNotFoundError as error:
        print(error, end="\\0")
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.split("\0")[:-1]
    assert len(errors) == len(names)
    for error in errors:
        assert "hub:amoudgl/" in error and "on a machine with network" in error.lower()
        assert "builtin:celo" in error, "an alternative"
