"""Is theta checked, frozen, and found wherever a user may keep it?"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from golden_files import INPUTS, NAMES, Golden, to_torch

from pylo_integrations import SmallFCLOpt, Theta, create_optimizer
from pylo_integrations.weights import bootstrap, builtin_names, load_theta

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arrays():
    return Golden("small_fc_h4_default").theta


@pytest.fixture
def theta(arrays):
    about = {"provenance": "a test", "licence": "MIT", "training": {"tasks": ["digits"], "steps": 3}}
    return Theta.from_arrays("small_fc_lopt", arrays, {"step_mult": 2e-3}, **about)


def params():
    return [torch.nn.Parameter(to_torch(INPUTS[f"smooth/params0/{name}"])) for name in NAMES]


def stepped(**options):
    ps = params()
    optimizer = SmallFCLOpt(ps, **options)
    for name, p in zip(NAMES, ps, strict=True):
        p.grad = to_torch(INPUTS[f"smooth/grads/{name}"][0])
    optimizer.step()
    return ps


def test_save_and_load_keep_everything(theta, tmp_path):
    path = theta.save(tmp_path / "new" / "mine.safetensors")
    loaded = Theta.load(path)
    assert loaded == theta and loaded.sha256 == theta.sha256
    assert (loaded.name, loaded.provenance, loaded.licence) == ("small_fc_lopt", "a test", "MIT")
    assert loaded.training == {"tasks": ["digits"], "steps": 3} and loaded.hyper == {"step_mult": 2e-3}
    assert all(torch.equal(loaded.arrays[name], array) for name, array in theta.arrays.items())


def test_save_does_not_overwrite_unasked(theta, tmp_path):
    path = theta.save(tmp_path / "mine.safetensors")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        bootstrap().save(path)
    assert Theta.load(path) == theta
    bootstrap().save(path, overwrite=True)
    assert Theta.load(path) == bootstrap()
    assert os.listdir(tmp_path) == ["mine.safetensors"]


def test_sha256_covers_what_changes_an_update_and_nothing_else(theta, arrays):
    renamed = Theta.from_arrays("small_fc", arrays, {"step_mult": 2e-3}, licence="other")
    assert renamed == theta and hash(renamed) == hash(theta)
    assert Theta.from_arrays("small_fc", arrays, {"step_mult": 3e-3}) != theta
    arrays["nn/~/b0"] = arrays["nn/~/b0"] + 1e-6
    assert Theta.from_arrays("small_fc", arrays, {"step_mult": 2e-3}) != theta


def test_theta_is_frozen_and_owns_its_arrays(theta, arrays):
    before = theta.sha256
    arrays["nn/~/w0"].add_(1)
    assert theta.sha256 == before
    with pytest.raises(TypeError):
        theta.arrays["nn/~/w0"] = torch.zeros(39, 4)
    with pytest.raises(AttributeError):
        theta.architecture = "velo"
    assert pickle.loads(pickle.dumps(theta)) == theta


def test_numpy_arrays_and_other_dtypes_are_taken(theta, arrays):
    as_numpy = {name: array.double().numpy() for name, array in arrays.items()}
    assert Theta.from_arrays("small_fc_lopt", as_numpy, {"step_mult": 2e-3}) == theta


@pytest.mark.parametrize("hidden", [(), (5,), (16, 3, 8)], ids=str)
def test_geometry_is_read_from_the_shapes(hidden):
    widths = (39, *hidden, 2)
    arrays = {}
    for layer, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
        arrays[f"nn/~/w{layer}"], arrays[f"nn/~/b{layer}"] = torch.randn(n_in, n_out), torch.randn(n_out)
    before = params()
    after = stepped(weights=arrays)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nn/~/b1": None}, r"lacks \['nn/~/b1'\]"),
        ({"nn/~/w0": None}, "lacks"),
        ({"nn/~/x9": torch.zeros(1)}, r"unknown arrays \['nn/~/x9'\]"),
        ({"nn/~/w0": torch.zeros(38, 4)}, r"nn/~/w0 is \(38, 4\).*expected \(39, 4\)"),
        ({"nn/~/w1": torch.zeros(5, 4)}, r"nn/~/w1 is \(5, 4\).*expected \(4, 4\)"),
        ({"nn/~/w2": torch.zeros(4, 3), "nn/~/b2": torch.zeros(3)}, r"nn/~/w2 is \(4, 3\).*expected \(4, 2\)"),
        ({"nn/~/b0": torch.zeros(3)}, r"nn/~/b0 \(3,\)"),
        ({"nn/~/b0": torch.tensor(0.0)}, r"nn/~/b0 \(\)"),
        ({"momentum_decays": torch.zeros(2)}, r"momentum_decays is \(2,\)"),
        ({"nn/~/b0": torch.full((4,), torch.nan)}, r"\['nn/~/b0'\] hold values that are not finite"),
    ],
)
def test_arrays_that_do_not_fit_say_which(arrays, change, message):
    arrays = {name: array for name, array in (arrays | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        Theta.from_arrays("small_fc_lopt", arrays)


def test_unknown_architecture_and_constants(arrays):
    with pytest.raises(ValueError, match="'nonsense' is unknown; known:"):
        Theta.from_arrays("nonsense", arrays)
    with pytest.raises(ValueError, match="step_size"):
        Theta.from_arrays("small_fc_lopt", arrays, {"step_size": 1.0})


def tampered(original, path, **changes):
    """The file of a theta with metadata or arrays changed."""
    original.save(path)
    with safetensors.safe_open(str(path), "pt") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    arrays = {name: array + changes.pop("add", 0) for name, array in arrays.items()}
    for key, (old, new) in changes.items():
        metadata[key] = metadata[key].replace(old, new)
    safetensors.torch.save_file(arrays, path, metadata)
    return path


def test_damaged_foreign_and_future_files_are_told_apart(theta, tmp_path):
    with pytest.raises(ValueError, match="is damaged"):
        Theta.load(tampered(theta, tmp_path / "a.safetensors", add=1e-3))
    with pytest.raises(ValueError, match="theta version 9, this is 1; upgrade"):
        Theta.load(tampered(theta, tmp_path / "b.safetensors", version=("1", "9")))
    with pytest.raises(ValueError, match="trained on features"):
        Theta.load(tampered(theta, tmp_path / "c.safetensors", theta=('"rms", ', "")))
    with pytest.raises(ValueError, match="damaged record"):
        Theta.load(tampered(theta, tmp_path / "d.safetensors", theta=('"features"', '"inputs"')))
    plain = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, plain)
    with pytest.raises(ValueError, match=r"not a theta.*Theta\.from_arrays"):
        Theta.load(plain)
    pickled = tmp_path / "theta.pt"
    torch.save({"x": torch.zeros(1)}, pickled)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Theta.load(pickled)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        Theta.load(tmp_path / "nowhere.safetensors")


def test_every_form_of_weights_gives_the_same_step(theta, arrays, tmp_path):
    theta = Theta.from_arrays("small_fc_lopt", arrays)
    path = theta.save(tmp_path / "mine.safetensors")
    want = stepped(weights=theta)
    for weights in (path, str(path), arrays):
        assert all(torch.equal(p, q) for p, q in zip(stepped(weights=weights), want, strict=True))
    with pytest.raises(TypeError, match="weights must be"):
        SmallFCLOpt(params(), weights=3)


def test_step_and_exp_mult_override_those_of_theta(theta):
    assert SmallFCLOpt(params(), weights=theta).rule.step_mult == 2e-3
    optimizer = create_optimizer(params(), "small_fc_lopt", weights=theta, step_mult=0.5, exp_mult=0.25)
    assert (optimizer.rule.step_mult, optimizer.rule.exp_mult) == (0.5, 0.25)


def test_a_saved_theta_is_as_readable_as_any_file(theta, tmp_path):
    (tmp_path / "other").touch()
    path = theta.save(tmp_path / "theta.safetensors")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# -- builtin and hub ---------------------------------------------------------------------------------------------


def test_the_shipped_bootstrap_is_what_its_function_makes():
    assert "small_fc_bootstrap" in builtin_names()
    shipped, made = load_theta("builtin:small_fc_bootstrap", "small_fc"), bootstrap()
    assert shipped == made and shipped.provenance == made.provenance
    assert "not meta-trained" in made.provenance and not made.training


def test_bootstrap_takes_a_normalised_momentum_step():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, 40))
    optimizer = SmallFCLOpt([p])
    momentum, second = torch.zeros_like(p), torch.zeros_like(p)
    for k in range(20):
        p.grad = torch.randn(50, 40) * 10.0 ** (k % 5 - 2)
        momentum, second = 0.9 * momentum + 0.1 * p.grad, 0.999 * second + 0.001 * p.grad**2
        before = p.detach().clone()
        optimizer.step()
        direction = momentum * (second + 1e-6).rsqrt()
        want = -1e-3 * direction / direction.square().mean().sqrt()
        # The normaliser's own epsilon is 1e-5 of a mean square of order 1; parameters round to 2e-7.
        torch.testing.assert_close(p.detach() - before, want, rtol=2e-4, atol=6e-7)


@pytest.mark.parametrize("name", sorted(set(builtin_names()) - {"small_fc_bootstrap"}))
def test_meta_trained_builtins_carry_their_record_and_train(name):
    theta = load_theta(f"builtin:{name}", name)
    record, [config] = theta.training, (ROOT / "recipes" / "metatrain").glob(f"{name}.yaml")
    assert record["config"]["optimizer"] == theta.name == name and config.exists()
    assert {"commit", "torch", "iteration", "inner_steps", "cpu_seconds", "curve"} <= record.keys()
    assert theta.licence == "BSD-3-Clause" and record["curve"][-1]["score"] < record["curve"][0]["score"]
    assert max(array.abs().max() for array in theta.arrays.values()) < 16, "fit for half precision"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.randn(256, 8)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    lr = record["config"].get("lr")  # 200 steps are a short run, as in meta-training
    optimizer = create_optimizer(model, name, lr, weights=theta, num_steps=200)
    losses = []
    for _ in range(200):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_unknown_builtin_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match="small_fc_bootstrap"):
        SmallFCLOpt(params(), weights="builtin:velo")


@pytest.mark.slow
def test_hub_weights_come_from_the_cache_offline_or_say_what_to_do(theta, tmp_path):
    """A cache laid out as huggingface_hub does; HF_HUB_OFFLINE is read at import, hence the new process."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--theta"
    theta.save(repo / "snapshots" / commit / "theta.safetensors")
    (repo / "refs").mkdir()
    for ref in ("main", "v2"):
        (repo / "refs" / ref).write_text(commit)
    code = f"""
import torch
from pylo_integrations import SmallFCLOpt
for weights in ("hub:someone/theta", "hub:someone/theta@v2", "hub:someone/theta@{commit}"):
    optimizer = SmallFCLOpt([torch.nn.Parameter(torch.zeros(2))], weights=weights)
    assert optimizer.theta.sha256 == {theta.sha256!r}
for weights in ("hub:someone/other", "hub:someone/theta@v3"):
    try:
        SmallFCLOpt([torch.nn.Parameter(torch.zeros(2))], weights=weights)
    except FileNotFoundError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hf download someone/other theta.safetensors`" in done.stdout
    assert "hf download someone/theta theta.safetensors --revision v3`" in done.stdout
    assert "builtin:small_fc_bootstrap" in done.stdout


def test_a_hub_address_needs_owner_and_repository():
    with pytest.raises(ValueError, match="hub:<owner>/<repo>"):
        SmallFCLOpt(params(), weights="hub:theta")
