"""Does CELO2 orthogonalise the right matrices, and leave the right tensors to AdamW?"""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import Golden
from torch import nn

from pylo_integrations import CELO2, ELOCELO2, CELO2Base, SmallFCLOpt, Theta, create_optimizer
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.newton_schulz import orthogonalise

THETA = Golden("celo2_random").theta


def gradients(*shape: int, steps: int = 3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


def train(optimizer, param, grads):
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


# -- Newton-Schulz -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)])
def test_singular_values_end_near_one_and_vectors_stay(shape):
    matrix = gradients(*shape)[0]
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    out = orthogonalise(matrix)
    values = torch.einsum("ij,ik,jk->k", out, u, vh.mT)  # diagonal of u.T @ out @ v
    assert s.min() > 1e-2 * s.max()
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(out, u @ torch.diag(values) @ vh, rtol=0, atol=1e-9)


def test_a_batch_is_its_matrices_and_scale_and_zeros_are_harmless():
    batch = torch.stack(gradients(5, 3))
    for one, alone in zip(orthogonalise(batch), batch, strict=True):
        torch.testing.assert_close(one, orthogonalise(alone), rtol=0, atol=1e-12)
    torch.testing.assert_close(orthogonalise(batch * 1e6), orthogonalise(batch), rtol=1e-6, atol=1e-6)
    assert not orthogonalise(torch.zeros(4, 3)).any()


# -- which axes, where sizes tie -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CELO2, CELO2Base, ELOCELO2])
@pytest.mark.parametrize("kernel", [(), (3, 3), (2,)], ids=["square", "square conv2d", "square conv1d"])
def test_a_weight_stored_in_out_steps_as_its_transpose_stored_out_in(cls, kernel):
    out_in = nn.Parameter(gradients(4, 4, *kernel, steps=1)[0])
    in_out = nn.Parameter(out_in.detach().transpose(0, 1).clone())
    grads = gradients(4, 4, *kernel)
    one = train(cls([out_in], weights=THETA), out_in, grads)
    groups = [{"params": [in_out], "axes": "in_out"}]
    other = train(cls(groups, weights=THETA), in_out, [grad.transpose(0, 1).contiguous() for grad in grads])
    torch.testing.assert_close(other, one.transpose(0, 1), rtol=0, atol=1e-12)


def test_the_axes_of_a_square_weight_matter():
    grads = [grad * torch.arange(1.0, 5.0).view(-1, 1) for grad in gradients(4, 4)]
    params = [nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [p], "axes": axes} for p, axes in zip(params, ("out_in", "in_out"), strict=True)]
    steps = [train(CELO2Base([group], weights=THETA), group["params"][0], grads) for group in groups]
    assert (steps[0] - steps[1]).abs().max() > 1e-2 * steps[0].abs().max()


def test_every_kernel_position_of_a_convolution_ends_with_the_same_root_mean_square():
    conv = nn.Parameter(torch.zeros(6, 4, 3, 2, dtype=torch.float64))
    before = conv.detach().clone()
    grads = gradients(6, 4, 3, 2, steps=1)
    grads[0][:, :, 0] *= 1e3
    moved = train(CELO2([conv], weights=THETA, lr=0.5), conv, grads) - before
    torch.testing.assert_close(moved.square().mean((0, 1)).sqrt(), torch.full((3, 2), 0.5, dtype=torch.float64))


# -- AdamW ---------------------------------------------------------------------------------------------------------


def test_vectors_of_elo_celo2_step_as_torch_adamw_steps_them():
    ours = nn.Parameter(gradients(7, steps=1)[0])
    theirs = nn.Parameter(ours.detach().clone())
    grads = gradients(7, steps=5)
    optimizer = ELOCELO2([ours], lr=0.01, weight_decay=0.1, weights=THETA, max_grad_norm=math.inf)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    # Our coefficients are the reference's float32 ones, which differ from the decimals in the eighth digit.
    torch.testing.assert_close(train(optimizer, ours, grads), train(adamw, theirs, grads), rtol=0, atol=1e-8)


def test_vectors_of_celo2_step_by_adam_at_twenty_times_lr_and_decay():
    p = nn.Parameter(gradients(7, steps=1)[0])
    old, grads = p.detach().clone(), gradients(7, steps=2)
    wanted, m, v = old.clone(), torch.zeros_like(old), torch.zeros_like(old)
    for grad in grads:
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad.square()
        wanted = wanted - 20 * 0.01 * (m / (v + 1e-8).sqrt() + 0.3 * wanted)
    optimizer = CELO2([p], lr=0.01, weight_decay=0.3, weight_decay_policy="before", weights=THETA)
    got = train(optimizer, p, grads)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["before_independent", "after_independent"])
def test_independent_decay_does_not_know_the_factor_of_twenty(policy):
    def run(weight_decay):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = CELO2([p], lr=0.01, weight_decay=weight_decay, weight_decay_policy=policy, weights=THETA)
        return train(optimizer, p, [torch.zeros(3, dtype=torch.float64)])

    torch.testing.assert_close(run(0.1), 0.9 * run(0.0))


@pytest.mark.parametrize("cls", [CELO2, ELOCELO2])
def test_a_matrix_in_a_marked_group_is_stepped_by_adamw(cls):
    matrix, flat = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(15))
    optimizer = cls([{"params": [matrix], "rule": "adamw"}, {"params": [flat]}], weights=THETA)
    for grad in gradients(5, 3, dtype=torch.float32):
        matrix.grad, flat.grad = grad, grad.flatten()
        optimizer.step()
    assert torch.equal(matrix.flatten(), flat) and set(optimizer.state[matrix]) == {"momentum_0", "rms"}


def test_a_loaded_group_steps_by_the_rule_of_its_state():
    """As all options of groups come from the checkpoint, in torch."""
    p = nn.Parameter(torch.zeros(5, 3))
    optimizer = CELO2([p], weights=THETA)
    train(optimizer, p, gradients(5, 3, dtype=torch.float32))
    marked = CELO2([{"params": [p], "rule": "adamw"}], weights=THETA)
    marked.load_state_dict(optimizer.state_dict())
    assert marked.param_groups[0]["rule"] == "learned"
    assert marked.state[p].keys() == optimizer.state[p].keys()
    state = optimizer.state_dict()
    state["param_groups"][0]["rule"] = "adamw"
    with pytest.raises(ValueError, match="state_dict does not fit CELO2"):
        marked.load_state_dict(state)


@pytest.mark.parametrize(("cls", "theta"), [(CELO2Base, THETA), (SmallFCLOpt, None)])
def test_a_mark_is_refused_where_the_learned_rule_steps_everything(cls, theta):
    with pytest.raises(ValueError, match=r"rule='adamw' is not a choice of this optimizer; it has \['learned'\]"):
        cls([{"params": [nn.Parameter(torch.zeros(3, 3))], "rule": "adamw"}], weights=theta)
    with pytest.raises(ValueError, match="rule='sgd'"):
        CELO2([{"params": [nn.Parameter(torch.zeros(3, 3))], "rule": "sgd"}], weights=THETA)


def test_adamw_alone_is_a_rule():
    assert AdamWRule().choices == ("learned",) and AdamWRule(lr_mult=3.0).lr_mult == 3.0 and AdamWRule().lr_mult == 1.0


# -- defaults and weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "max_grad_norm"),
    [
        ("celo2", 3e-4, 0.0, None),
        ("celo2_base", 1e-3, 0.0, None),
        ("elo_celo2", 3e-4, 0.1, 1.0),
        ("elo", 1e-3, 0.0, None),
        ("mulo", 1.0, 0.0, None),
        ("small_fc_lopt", 1.0, 0.0, None),
    ],
)
@pytest.mark.usefixtures("small_thetas")
def test_defaults_are_those_of_the_entry_and_explicit_values_win(name, lr, weight_decay, max_grad_norm):
    model = nn.Linear(3, 3, bias=False)
    for params in (model, [model.weight]):
        optimizer = create_optimizer(params, name)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], optimizer.max_grad_norm) == (lr, weight_decay, max_grad_norm)
        optimizer = create_optimizer(params, name, 0.5, 0.0, max_grad_norm=math.inf)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"], optimizer.max_grad_norm) == (0.5, 0.0, None)


def test_without_default_weights_the_error_says_what_to_pass():
    class Mine(CELO2Base):
        default_weights = None

    with pytest.raises(FileNotFoundError, match="Mine has no default weights, so weights= is needed"):
        Mine(nn.Linear(2, 2).parameters())


def test_arrays_get_the_constants_of_the_optimizer_they_are_named_for():
    arrays = Golden("elo_pyloport").theta
    assert Theta.from_arrays("elo", arrays).hyper == {"step_mult": 1.0}
    assert Theta.from_arrays("mulo", arrays).hyper == {"step_mult": 1e-2}
    assert Theta.from_arrays("mulo", arrays, {"step_mult": 0.5}).hyper == {"step_mult": 0.5}
    assert Theta.from_arrays("elo_celo2", THETA) == Theta.from_arrays("celo2", THETA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w0__3": None}, "lacks ff_mod_stack/~/w0__3"),
        ({"w0__3": torch.zeros(1, 8)}, r"w0__3 is \(1, 8\); expected \(3, 8\)"),
        ({"w0__0": torch.zeros(())}, r"w0__0 is \(\); expected \(1, 0\)"),
        ({"w0": torch.zeros(30, 8)}, "unknown arrays"),
        ({"w1": None}, "lacks"),
        ({"w2": torch.zeros(8, 2)}, r"w2 is \(8, 2\).*expected \(8, 3\)"),
        ({"b2": torch.zeros(2)}, r"b2 \(2,\)"),
        ({"extra": torch.zeros(2)}, "unknown arrays"),
        ({"b0": torch.full((8,), math.nan)}, "not finite"),
    ],
    ids=str,
)
def test_theta_that_does_not_fit_is_refused_by_name(change, message):
    changed = {f"ff_mod_stack/~/{name}": array for name, array in change.items()}
    arrays = {name: array for name, array in (THETA | changed).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        Theta.from_arrays("celo2", arrays)


def test_step_mult_and_exp_mult_scale_the_learned_step():
    def moved(**options):
        p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        return train(CELO2Base([p], weights=THETA, **options), p, gradients(4, 3, steps=1))

    torch.testing.assert_close(moved(step_mult=2.0), 2 * moved())
    assert not torch.allclose(moved(exp_mult=1.0), moved())
