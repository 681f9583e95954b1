"""Is a damaged or wrong state of a run ever loaded? Bits, lengths and types of everything that this package writes."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import stat
import struct

import pytest
import torch
from thetas import create, distinct_rules, theta_for
from tiny_metatrain import tiny
from torch import nn

from pylo_integrations import CheckpointError, Theta, sealed
from pylo_integrations.cli import main
from pylo_integrations.metatrain import MetaTrainer, ResumeError
from pylo_integrations.progress import Progress
from pylo_integrations.state import from_canonical, load_canonical, save_canonical, to_canonical

FLIPS = 300  # of files of each kind; 1500 were tried once


def trained(name, steps=2):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = create(model.named_parameters(), name, num_steps=9)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
        optimizer.step(loss=2.0)
    return model, optimizer


def flipped(data, rng):
    """The bytes with one bit flipped, near the front, where headers are, as often as anywhere."""
    data = bytearray(data)
    place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1500))
    data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def snapshot(optimizer):
    return copy.deepcopy((dict(optimizer.state), optimizer.state_dict()["param_groups"], optimizer.num_steps))


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["celo", "velo", "celo2"])
def test_flipped_bits_of_a_canonical_file_are_noticed(name, tmp_path):
    model, optimizer = trained(name)
    path = tmp_path / "run.safetensors"
    save_canonical(to_canonical(optimizer, model), path)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, rng))
        with pytest.raises(CheckpointError, match="run.safetensors"):
            load_canonical(path)
    for _ in range(100):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(CheckpointError, match="run.safetensors"):
            load_canonical(path)
    path.write_bytes(whole)
    assert same(load_canonical(path), to_canonical(optimizer, model))


@pytest.mark.parametrize("name", ["celo", "celo2"])
def test_flipped_bits_of_the_progress_in_a_state_dict_are_noticed(name):
    _, optimizer = trained(name)
    _, other = trained(name, 1)
    state_dict, rng = optimizer.state_dict(), random.Random(0)
    state_dict["state"] = {}  # only the blob
    blob, before = state_dict["param_groups"][0]["progress"], snapshot(other)
    for _ in range(FLIPS):
        state_dict["param_groups"][0]["progress"] = flipped(blob, rng)
        with pytest.raises(CheckpointError, match="damaged"):
            other.load_state_dict(state_dict)
    assert repr(snapshot(other)) == repr(before)


RECORDS = {
    "progress": ({"iteration": 3, "theta": None}, {"loss": torch.rand(3)}),
    "tensor_state": ({}, {"a.weight/row": torch.rand(3, 1, 3)}),
    "canonical": ({"state": ["a"], "nested": {"sha256": "no digest"}}, {}),
}


@pytest.mark.parametrize("key", RECORDS)
def test_no_bit_of_a_sealed_record_is_of_no_account(key):
    """Names too: what has lost the name of its digest is not taken for what was written before there were digests."""
    record, tensors = RECORDS[key]
    whole = sealed.to_bytes(key, record, tensors)
    for place in range(len(whole)):
        for bit in range(8):
            blob = bytearray(whole)
            blob[place] ^= 1 << bit
            with pytest.raises(sealed.DamageError):
                sealed.from_bytes(key, bytes(blob))
                pytest.fail(f"bit {bit} of byte {place}: {bytes(blob[max(place - 20, 0) : place + 20])}")


@pytest.mark.parametrize("name", [b"sha256", b"record", b"__metadata__"])
@pytest.mark.parametrize("key", RECORDS)
def test_a_sealed_record_with_another_name_in_it_is_damaged(key, name, tmp_path):
    whole = sealed.to_bytes(key, *RECORDS[key])
    path = tmp_path / "file.safetensors"
    for other in (b"x" * len(name), name.upper(), name[:-1] + b" "):
        for count in (1, -1):  # the first one, and all of them
            path.write_bytes(whole.replace(name, other, count))
            with pytest.raises(sealed.DamageError):
                sealed.from_bytes(key, path.read_bytes())
            with pytest.raises(sealed.DamageError):
                sealed.load(path, key)


@pytest.fixture(scope="module")
def meta_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    MetaTrainer(tiny(), folder, quiet=True).run(1)
    return folder / "checkpoint.safetensors"


def test_flipped_bits_of_a_meta_training_are_noticed(meta_run, tmp_path):
    whole, rng = meta_run.read_bytes(), random.Random(0)
    path = tmp_path / "checkpoint.safetensors"
    trainer = MetaTrainer(tiny(), tmp_path / "other", quiet=True)
    for number in range(FLIPS):
        path.write_bytes(flipped(whole, rng))
        with pytest.raises(ResumeError, match="damaged"):
            trainer._restore(path)
        if number < 3:
            with pytest.raises(CheckpointError, match="damaged"):
                MetaTrainer(tiny(), tmp_path, resume=True, quiet=True)


# -- types, ranges and shapes ------------------------------------------------------------------------------------------

ODD = [None, True, -5, 1.5, math.nan, math.inf, 10**400, "x", b"x", [], ["x"], {}, {"x": 1}, object(), torch.ones(2)]


def places(value, path=()):
    """Every place in a canonical state."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, odd):
    if not path:
        return odd
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = put(value[path[0]], path[1:], odd)
    return value


def fits(path, odd):
    """Whether a value is right in its place by chance."""
    tail = path[-1] if path else None
    number = isinstance(odd, (int, float)) and not isinstance(odd, bool) and 0 <= odd < math.inf and odd < 1e300
    return (
        (tail in ("lr", "weight_decay", "base_lr") and number)
        or (tail == "maximize" and isinstance(odd, bool))
        or (tail in ("theta", "num_steps") and odd is None)
        or (tail == "theta" and isinstance(odd, str))
    )


@pytest.mark.parametrize("name", distinct_rules())
def test_odd_values_are_refused_by_one_kind_of_error_and_change_nothing(name, tmp_path):
    model, optimizer = trained(name)
    canonical = to_canonical(optimizer, model)
    twin, other = trained(name, 1)
    before = snapshot(other)
    for path in places(canonical):
        for odd in ODD:
            if fits(path, odd) or (path == ("memory",) and odd == canonical["memory"]):
                continue
            with pytest.raises(CheckpointError):
                from_canonical(other, twin, put(canonical, path, odd))
                pytest.fail(f"{path} may be {odd!r}")
    assert repr(snapshot(other)) == repr(before)
    from_canonical(other, twin, canonical)
    assert other.iteration == 2


@pytest.mark.parametrize("name", distinct_rules())
def test_tensors_that_a_rule_cannot_have_are_refused(name):
    model, optimizer = trained(name)
    canonical = to_canonical(optimizer, model)
    twin, other = trained(name, 1)
    wrong = {
        "nan": lambda value: value * math.nan,
        "infinite": lambda value: value + math.inf,
        "integers": lambda value: value.long(),
        "complex": lambda value: value + 0j,
        "sparse": lambda value: value.to_sparse(),
        "meta": lambda value: value.to("meta"),
        "shape": lambda value: torch.cat([value.reshape(-1)] * 2),
    }
    for kind, spoil in wrong.items():
        for param, states in canonical["state"].items():
            for key, value in states.items():
                with pytest.raises(CheckpointError, match=key):
                    from_canonical(other, twin, put(canonical, ("state", param, key), spoil(value)))
                    pytest.fail(f"{kind} {param} {key}")
        for key, value in canonical["memory"].items():
            with pytest.raises(CheckpointError, match=key):
                from_canonical(other, twin, put(canonical, ("memory", key), spoil(value)))
                pytest.fail(f"{kind} {key}")
    if "rms" in canonical["state"]["weight"]:
        with pytest.raises(CheckpointError, match="rms.*negative"):
            from_canonical(other, twin, put(canonical, ("state", "weight", "rms"), -torch.ones(3, 4)))
    with pytest.raises(CheckpointError, match="memory"):
        from_canonical(other, twin, {**canonical, "memory": {**canonical["memory"], "more": torch.ones(1)}})
    for key in canonical["memory"]:
        with pytest.raises(CheckpointError, match="memory"):
            from_canonical(
                other, twin, {**canonical, "memory": {k: v for k, v in canonical["memory"].items() if k != key}}
            )
    assert other.iteration == 1


@pytest.mark.parametrize("name", distinct_rules())
def test_the_same_in_a_state_dict(name):
    _, optimizer = trained(name)
    state_dict = copy.deepcopy(optimizer.state_dict())
    _, other = trained(name, 1)
    before = snapshot(other)
    for path in places(state_dict):
        if path[2:] == ("params",) or path[1:] == ():
            continue
        for odd in ODD:
            # What is of no parameter is left alone, as torch does; names and empty states are not ours to judge.
            harmless = path[-1] in ("param_names", "initial_lr") or path[3:] or odd is None or repr(odd) == "{}"
            if harmless or fits(path, odd):
                continue
            with pytest.raises(CheckpointError):
                other.load_state_dict(put(state_dict, path, odd))
                pytest.fail(f"{path} may be {odd!r}")
    for odd in [*ODD[:11], {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}]:
        with pytest.raises(CheckpointError):
            other.load_state_dict(odd)
    assert repr(snapshot(other)) == repr(before)


# -- files without a digest --------------------------------------------------------------------------------------------


def without_digest(path, key):
    """A file as version 0.1.0 wrote it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {key: json.dumps(json.loads(header["__metadata__"][f"{key}+sha256"])["record"])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_older_files_load_and_are_checked_all_the_same(tmp_path, meta_run):
    model, optimizer = trained("celo")
    path = tmp_path / "run.safetensors"
    canonical = to_canonical(optimizer, model)
    save_canonical(canonical, path)
    without_digest(path, "canonical")
    assert same(load_canonical(path), canonical)
    path.write_bytes(path.read_bytes().replace(b'iteration\\": 2', b'iteration\\":-2'))
    with pytest.raises(CheckpointError, match="iteration is -2"):
        load_canonical(path)

    copied = tmp_path / "checkpoint.safetensors"
    copied.write_bytes(meta_run.read_bytes())
    without_digest(copied, "metatrain")
    assert MetaTrainer(tiny(), tmp_path, resume=True, quiet=True)._progress.iteration == 1
    whole, rng = copied.read_bytes(), random.Random(0)
    trainer = MetaTrainer(tiny(), tmp_path / "other", quiet=True)
    for _ in range(FLIPS // 3):
        copied.write_bytes(flipped(whole, rng))
        try:
            trainer._restore(copied)
        except ResumeError as error:
            assert "\n" not in str(error)


def test_what_is_not_canonical_is_not_saved(tmp_path):
    model, optimizer = trained("celo2")
    canonical = to_canonical(optimizer, model)
    for wrong in ({**canonical, "mine": 1}, {}, None, {**canonical, "groups": 3}):
        with pytest.raises(CheckpointError):
            save_canonical(wrong, tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


def test_progress_survives_itself():
    progress = Progress(5, None, 1, {"a": torch.ones(2)})
    again, origin = Progress.from_bytes(progress.to_bytes(theta=None, rule="R"))
    assert (again.record(), origin) == (progress.record(), {"theta": None, "rule": "R"})
    assert torch.equal(again.memory["a"], torch.ones(2)) and progress.to_bytes() == progress.to_bytes()
    for odd in ({"iteration": -5}, {"iteration": 1.5}, {"num_steps": "x"}, {"num_steps": 0}, {"nonfinite_steps": True}):
        with pytest.raises(ValueError, match=next(iter(odd))):
            Progress.from_record({**progress.record(), **odd}, {})


# -- the command line, and files that cannot be read -------------------------------------------------------------------


def test_resuming_a_damaged_meta_training_is_one_line(tmp_path, capsys):
    import yaml
    from tiny_metatrain import TINY

    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    folder = tmp_path / "run"
    MetaTrainer(tiny(), folder, quiet=True).run(1)
    path = folder / "checkpoint.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:5], b"", flipped(whole, random.Random(1)), b"{}" * 100):
        path.write_bytes(data)
        with pytest.raises(SystemExit) as end:
            main(["metatrain", str(config), "--output", str(folder), "--resume"])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and err.count("\n") == 1 and "damaged" in err and not out
        assert path.read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a user who may not read everything")
def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path):
    theta_path, run_path = tmp_path / "theta.safetensors", tmp_path / "run.safetensors"
    theta_for("celo2").save(theta_path)
    model, optimizer = trained("celo2")
    save_canonical(to_canonical(optimizer, model), run_path)
    for path in (theta_path, run_path):
        path.chmod(0)

    def read():
        for load, path in ((Theta.load, theta_path), (load_canonical, run_path)):
            try:
                load(path)
            except PermissionError as error:
                assert str(path) in str(error)
            else:
                raise AssertionError

    if os.geteuid():
        read()
        return
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # pytest's folders are private
        if parent.name.startswith("pytest"):
            parent.chmod(parent.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            read()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
