"""Do the adapters train sharded and replicated models as one process would, and resume them?

Data is divided so that all ranks together see, at every step, what one process sees. In float64 that leaves the order
of sums: 1e-9 of an element is far more than that, and far less than one wrong loss, horizon or statistic would change.
"""

from __future__ import annotations

import numpy as np
import pytest
from launched_cases import accelerate_case, hf_case, lightning_case, replicas_case
from native_library import library_or_skip

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

LIMIT = 120  # seconds, for processes that also import a framework
EXACT = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 2e-5}
"""In float32 a rounding of 6e-8 of a weight passes through the network at every one of the few steps."""


@pytest.fixture(scope="module")
def alone(workers, tmp_path_factory):
    """What one process makes of the same data, by case."""
    known = {}

    def run(case, **options):
        key = (case, *sorted(options.items()))
        if key not in known:
            folder = str(tmp_path_factory.mktemp("alone"))
            [known[key]] = workers.run(1, case, folder=folder, timeout=LIMIT, **options)[0]["runs"]
        return known[key]

    return run


def check(ranks, want, in_float32: bool = False) -> dict:
    """What ranks agree on is what one process did."""
    got = ranks[0]["runs"][0]
    assert len({rank["runs"][0]["digest"] for rank in ranks}) == 1, "ranks differ"
    assert got["steps"] == want["steps"] and got["moved"] > 1e-4
    assert got["params"].keys() == want["params"].keys()
    for name, value in got["params"].items():
        # Biases begin at 0, and rules that step in proportion to a parameter hardly move them.
        size = max(np.abs(value).max(), 1e-2)
        tolerance = EXACT[np.dtype(np.float32) if in_float32 else value.dtype]
        assert np.abs(value - want["params"][name]).max() <= tolerance * size, name
    return got


def check_resumed(ranks) -> None:
    for rank in ranks:
        whole, resumed = rank["runs"]
        total, _ = whole["steps"]
        assert whole["reached"] == [*range(1, total + 1)] and whole["moved"] > 1e-4
        assert resumed["reached"] == [*range(total // 2 + 1, total + 1)], "it did not go on in the middle"
        assert resumed["digest"] == whole["digest"], "the resumed run went another way"
        assert resumed["steps"] == whole["steps"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp1"])
@pytest.mark.parametrize("name", ["velo", "small_fc_lopt"])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_hf_trainer(workers, alone, tmp_path, wrapper, name, stock):
    want = alone(hf_case, wrapper="ddp", name=name, per_device_train_batch_size=4)
    ranks = workers.run(2, hf_case, wrapper=wrapper, name=name, folder=str(tmp_path), stock=stock, timeout=LIMIT)
    if wrapper == "fsdp1":
        want = {**want, "params": {key: value.astype(np.float32) for key, value in want["params"].items()}}
    got = check(ranks, want)
    assert got["kinds"] == ["DTensor" if wrapper == "fsdp2" else "Parameter"]
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)  # logged in float32


def test_hf_trainer_accumulates(workers, alone, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    want = alone(
        hf_case, wrapper="ddp", name="velo", per_device_train_batch_size=4, max_steps=2, gradient_accumulation_steps=2
    )
    check(workers.run(2, hf_case, wrapper="fsdp2", name="velo", folder=str(tmp_path), timeout=LIMIT, **options), want)


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [("ddp", ""), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT"), ("fsdp1", "SHARDED_STATE_DICT")],
)
def test_hf_trainer_resumes(workers, tmp_path, wrapper, kind, stock):
    case = {"wrapper": wrapper, "name": "velo", "folder": str(tmp_path), "stock": stock, "state_dict_type": kind}
    check_resumed(workers.run(2, hf_case, resume=True, timeout=LIMIT, **case))


@pytest.mark.parametrize("attached", [True, False], ids=["attach", "closure"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp1"])
def test_accelerate(workers, alone, tmp_path, wrapper, attached):
    want = alone(accelerate_case, wrapper="ddp", name="velo")
    case = {"wrapper": wrapper, "name": "velo", "folder": str(tmp_path), "attached": attached}
    check(workers.run(2, accelerate_case, timeout=LIMIT, **case), want)


def test_accelerate_with_copies_of_shards(workers, alone, tmp_path):
    want = alone(accelerate_case, wrapper="ddp", name="velo")
    check(workers.run(4, accelerate_case, timeout=LIMIT, wrapper="hsdp", name="velo", folder=str(tmp_path)), want)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp1"])
def test_accelerate_accumulates(workers, alone, tmp_path, wrapper):
    want = alone(accelerate_case, wrapper="ddp", name="velo", accumulation=2)
    case = {"wrapper": wrapper, "name": "velo", "folder": str(tmp_path), "accumulation": 2}
    check(workers.run(2, accelerate_case, timeout=LIMIT, **case), want)


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [("ddp", ""), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT"), ("fsdp1", "SHARDED_STATE_DICT")],
)
def test_accelerate_resumes(workers, tmp_path, wrapper, kind):
    case = {"wrapper": wrapper, "name": "velo", "folder": str(tmp_path), "state_dict_type": kind or "FULL_STATE_DICT"}
    check_resumed(workers.run(2, accelerate_case, resume=True, timeout=LIMIT, **case))


def test_attach_refuses_melted_parameters(workers, tmp_path):
    case = {"wrapper": "fsdp1_melted", "name": "velo", "folder": str(tmp_path)}
    with pytest.raises(RuntimeError, match="FlatParameter of FSDP.*fsdp_use_orig_params: true or fsdp_version: 2"):
        workers.run(2, accelerate_case, timeout=LIMIT, **case)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tensor_parallel", "fsdp1"])
def test_lightning(workers, alone, tmp_path, strategy, accumulation):
    want = alone(lightning_case, strategy="ddp", name="velo", accumulation=accumulation)
    case = {"strategy": strategy, "name": "velo", "folder": str(tmp_path), "accumulation": accumulation}
    # Lightning has FSDP1 compute in the precision of the Trainer, whatever that of the model.
    check(workers.run(2, lightning_case, timeout=LIMIT, **case), want, in_float32=strategy == "fsdp1")


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tensor_parallel", "fsdp1"])
def test_lightning_resumes(workers, tmp_path, strategy, distributed):
    case = {"strategy": strategy, "name": "velo", "folder": str(tmp_path), "distributed_checkpoint": distributed}
    check_resumed(workers.run(2, lightning_case, resume=True, timeout=LIMIT, **case))


@pytest.mark.parametrize(
    ("name", "backend"), [("small_fc_lopt", "reference"), ("small_fc_lopt", "native"), ("toy_loss", "reference")]
)
def test_replicas_of_the_hf_trainer_stay_equal(workers, tmp_path, name, backend):
    if backend == "native":
        library_or_skip()
    first, second = workers.run(2, replicas_case, timeout=LIMIT, name=name, backend=backend, folder=str(tmp_path))
    assert first["world"] == second["world"] == 2
    assert first["start"] == second["start"] and first["end"] == second["end"], "replicas differ"
    assert first["start"] != first["end"], "nothing was trained"
    for end in (first, second):
        assert (end["iteration"], end["native"]) == (3, backend == "native")
    if name == "toy_loss":  # it steps by the loss, of which every rank sees another
        assert first["seen"] == second["seen"], "ranks stepped by different losses"
        assert first["seen"] == pytest.approx(first["logged"], abs=1e-3) and len(first["seen"]) == 3  # logged by rank 0


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_hf_trainer_saves_what_ranks_share(workers, alone, tmp_path, stock):
    options = {"optim_args": "shard_step=true"}
    case = {"wrapper": "ddp", "name": "velo", "folder": str(tmp_path), "stock": stock, **options}
    ranks = workers.run(2, hf_case, resume=True, timeout=LIMIT, **case)
    check(ranks, alone(hf_case, wrapper="ddp", name="velo", per_device_train_batch_size=4))
    check_resumed(ranks)


def test_accelerate_saves_what_ranks_share(workers, alone, tmp_path):
    case = {"wrapper": "ddp", "name": "velo", "folder": str(tmp_path), "shard_step": True}
    ranks = workers.run(2, accelerate_case, resume=True, timeout=LIMIT, **case)
    check(ranks, alone(accelerate_case, wrapper="ddp", name="velo"))
    check_resumed(ranks)


def test_lightning_saves_what_ranks_share(workers, alone, tmp_path):
    case = {"strategy": "ddp", "name": "velo", "folder": str(tmp_path), "shard_step": True}
    ranks = workers.run(2, lightning_case, resume=True, timeout=LIMIT, **case)
    check(ranks, alone(lightning_case, strategy="ddp", name="velo"))
    check_resumed(ranks)
