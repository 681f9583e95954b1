"""Does the weight decay of an AdamW recipe mean here what it means there, for every optimizer?"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from native_library import library_or_skip
from thetas import create
from torch import nn
from torch.nn.functional import mse_loss

from pylo_integrations import create_optimizer, get_optimizer_info, list_optimizers, mup_param_groups

pytestmark = [
    pytest.mark.usefixtures("small_thetas"),
    pytest.mark.filterwarnings("ignore:weight_decay=:RuntimeWarning"),  # a large one shows better in float32
]

LEARNED_SCHEDULE = {"celo", "celo_adam", "velo"}


@pytest.fixture(params=["native", pytest.param("reference", marks=pytest.mark.slow)])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4), (5,), (3, 2, 2, 2), ()
    params = [nn.Parameter(1 + torch.rand(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def shrinkage(name: str, decay: float, traced: bool = False, **options) -> list[float]:
    """What a step takes of each parameter more than one without decay does."""
    with_and_without = []
    for weight_decay in (0.0, decay):
        params = parameters()
        optimizer = create(params, name, weight_decay=weight_decay, **options)
        loss = torch.tensor(1.0) if optimizer.needs_loss else None
        if traced:
            optimizer.init_state()
            optimizer._step_traced(loss)
        else:
            optimizer.step(loss=loss)
        with_and_without.append([param.detach() for param in params])
    return [
        ((plain - decayed) / (before.detach() * decay)).mean().item()
        for before, plain, decayed in zip(parameters(), *with_and_without, strict=True)
    ]


def adamws(lr: float) -> float:
    """The same of torch's AdamW, per unit of its weight decay."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.zeros_like(param)
    torch.optim.AdamW([param], lr=lr, weight_decay=0.1).step()
    return (1 - param[0].item()) / 0.1


@pytest.mark.parametrize("name", list_optimizers())
@pytest.mark.parametrize("relative", [1.0, 0.25])
def test_every_tensor_decays_as_under_adamw_with_steps_of_that_size(name, relative, backend):
    spec = get_optimizer_info(name)
    lr = relative * spec.lr
    wanted = adamws(relative * spec.cls.adamw_lr)
    decay = 0.01 / spec.cls.adamw_lr  # 1 % a step, to be seen in float32
    for given in (lr, torch.tensor(lr)):
        found = shrinkage(name, decay, lr=given, backend=backend)
        assert found == pytest.approx([wanted] * len(found), rel=2e-3), name
    traced = shrinkage(name, decay, lr=lr, backend=backend, traced=True)
    assert traced == pytest.approx([wanted] * len(traced), rel=2e-3), name


@pytest.mark.parametrize("name", list_optimizers())
def test_the_policies_of_the_authors_are_there_by_name(name):
    spec = get_optimizer_info(name)
    decay = min(1.0, 0.1 / spec.lr)
    found = shrinkage(name, decay, weight_decay_policy="before", backend="reference")
    adam = [20 * spec.lr] * 2 if name == "celo2" else [spec.lr] * 2  # a vector and a scalar
    assert found == pytest.approx([spec.lr, adam[0], spec.lr, adam[1]], rel=2e-3)
    found = shrinkage(name, 0.1, weight_decay_policy="before_independent", backend="reference")
    assert found == pytest.approx([1.0] * 4, rel=2e-3)


@pytest.mark.parametrize("name", list_optimizers())
def test_decay_follows_the_schedule(name):
    params = parameters()
    optimizer = create(params, name, weight_decay=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 0.0, total_iters=10)
    assert {group["weight_decay_policy"] for group in optimizer.param_groups} == {"adamw"}
    twin = [nn.Parameter(param.detach().clone()) for param in params]
    halved = create(twin, name, get_optimizer_info(name).lr / 2, 0.1)
    for stepped, mine in ((optimizer, params), (halved, twin)):
        for param, source in zip(mine, parameters(), strict=True):
            param.grad = source.grad
        stepped.step(loss=torch.tensor(1.0) if stepped.needs_loss else None)
    for one, other in zip(params, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def final_loss(name: str, weight_decay: float, steps: int = 60) -> float:
    torch.manual_seed(0)
    inputs = torch.randn(128, 8)
    targets = torch.sin(inputs[:, :3].sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = create(model, name, weight_decay=weight_decay, num_steps=steps)
    schedule = None if name in LEARNED_SCHEDULE else torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        if schedule is not None:
            schedule.step()
    return loss.item()


@pytest.mark.parametrize("name", list_optimizers())
def test_the_decay_of_a_recipe_does_not_ruin_a_run(name):
    # The default of 0.1.0 decayed 1 to 10 % a step, and no such run got below 0.9 of where it started.
    plain = final_loss(name, 0.0)
    assert math.isfinite(plain) and final_loss(name, 0.1) < 1.05 * plain + 0.01


@pytest.mark.parametrize("name", list_optimizers())
def test_a_checkpoint_with_the_old_default_keeps_its_meaning(name):
    def trained(policy):
        params = parameters()
        optimizer = create(params, name, weight_decay=0.1, weight_decay_policy=policy)
        optimizer.step(loss=torch.tensor(1.0) if optimizer.needs_loss else None)
        return params, optimizer

    params, old = trained("before")
    loaded_params, loaded = trained("adamw")
    loaded.load_state_dict(old.state_dict())
    assert {group["weight_decay_policy"] for group in loaded.param_groups} == {"before"}
    with torch.no_grad():
        for ours, theirs in zip(loaded_params, params, strict=True):
            ours.copy_(theirs)
    for optimizer in (old, loaded):
        optimizer.step(loss=torch.tensor(1.0) if optimizer.needs_loss else None)
    for ours, theirs in zip(loaded_params, params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_mup_groups_decay_like_adamw_in_the_same_groups():
    def network(width):
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2))

    groups = mup_param_groups(network(32), network(8), 0.1)
    optimizer = create_optimizer(groups, "mulo")
    assert {g["lr"] for g in optimizer.param_groups if g["weight_decay"]} == {1.0, 0.25}
    for group in optimizer.param_groups:  # as the page on muP says, for a decay that does not depend on width
        group["weight_decay"] /= group["lr"]
    assert {g["lr"] * g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}


def test_tensors_that_adam_steps_twenty_times_as_far_decay_like_all_others():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = shrinkage("celo2", 1.0, backend="reference")
    assert rates == pytest.approx([3e-4] * 4, rel=2e-2)


# -- the other rows of docs/coming_from_adamw.md ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list_optimizers())
def test_options_of_adamw_are_none_of_ours(name):
    for option in ("betas", "eps", "amsgrad", "fused", "foreach"):
        with pytest.raises(TypeError, match=option):
            create(nn.Linear(2, 2), name, **{option: None})


@pytest.mark.parametrize("loss_too", [False, True])
@pytest.mark.parametrize("name", list_optimizers())
def test_the_size_of_a_step_hardly_depends_on_that_of_the_gradient(name, loss_too):
    """Where the loss is as it was, of those that need none without: pace's first bounds what gradients promise."""
    moved = []
    for scale in (1e-4, 1.0, 1e4):
        params, generator = parameters(), torch.Generator().manual_seed(0)
        optimizer = create(params, name, max_grad_norm=math.inf)
        for _ in range(8):
            for param in params:
                param.grad = scale * torch.randn(param.shape, generator=generator)
            optimizer.step(loss=scale if loss_too else 1.0 if optimizer.needs_loss else None)
        before = parameters()
        moved.append(math.sqrt(sum((p - q).square().sum().item() for p, q in zip(params, before, strict=True))))
    assert max(moved) < 3 * min(moved)


@pytest.mark.parametrize("name", list_optimizers())
def test_loss_and_horizon_do_no_harm_and_a_scaler_and_accumulation_change_nothing(name, backend):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    def trained(way):
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        optimizer = create(model, name, backend=backend, num_steps=None if way == "without" else 1000)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(4):
            optimizer.zero_grad()
            losses = [model(part).square().mean() / (2 if way == "accumulated" else 1) for part in parts(way)]
            for loss in losses:
                (scaler.scale(loss) if way == "scaled" else loss).backward()
            if way == "scaled":
                scaler.step(optimizer, loss=sum(losses))
                scaler.update()
            else:
                optimizer.step(**({} if way == "without" else {"loss": sum(losses)}))
        return model.weight.detach()

    def parts(way):
        return inputs.chunk(2) if way == "accumulated" else [inputs]

    plain = trained("plain")
    # Without a horizon pace has no schedule, and others with one do not step.
    told = get_optimizer_info(name).needs_loss or name == "pace"
    for way in ("scaled", "accumulated") if told else ("without", "scaled", "accumulated"):
        torch.testing.assert_close(trained(way), plain, rtol=1e-4, atol=1e-5)


def course_of(name: str, lr: float, steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer, losses = create(model, name, lr, num_steps=steps), []
    for _ in range(steps):
        loss = mse_loss(model(inputs), inputs[:, :3].sum(1, keepdim=True).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:lr=:RuntimeWarning")
def test_rates_from_another_world_do_what_the_page_says():
    hardly = course_of("celo", 1e-4)
    assert hardly[-1] > 0.99 * hardly[0]
    exploding = course_of("celo2", 1.0)
    assert max(exploding) > 100 * exploding[0]
