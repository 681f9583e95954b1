"""Does a run go on exactly from its last checkpoint after a rank was killed, in a step or while it saved?

Real processes under torchrun, which starts all ranks again when one dies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared_workers import run_script

pytestmark = [pytest.mark.dist, pytest.mark.timeout(500)]

# Otherwise a restart finds in torchrun's store where the dead ranks listened, and gloo may wait for those.
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

SCRIPT = """
import os, signal, sys
from pathlib import Path

helpers, folder, killed_in = sys.argv[1:]
sys.path.insert(0, helpers)
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_cases import digest, full_tensors, loss_of, make, net, wrap
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = wrap(net(), "fsdp2", world)
optimizer = make("velo", model.named_parameters())

complete = sorted(path.parent for path in Path(folder).glob("step-*/.metadata"))
start = 0
if complete:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=complete[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    start = optimizer.iteration
os.write(1, f"start at {start}\\n".encode())  # as one piece: print may write its end of line apart, and lines mix


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


doomed = rank == 1 and start == 0
for step in range(start, 6):
    loss = loss_of(model, step, rank)
    loss.backward()
    if doomed and killed_in == "step" and step == 4:
        die()
    optimizer.step(loss=loss)
    optimizer.zero_grad()
    if (step + 1) % 2 == 0:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        writer = dcp.FileSystemWriter(Path(folder, f"step-{step + 1}"))
        if doomed and killed_in == "save" and step == 3:
            writer.write_data = die
        dcp.save({"model": model_state, "optimizer": optimizer_state}, storage_writer=writer)
tensors = [*full_tensors(model).values(), *(value for _, value in sorted(optimizer._progress.memory.items()))]
if rank == 0:
    os.write(1, f"{optimizer.iteration} steps, digest {digest(tensors)}\\n".encode())
dist.barrier()
os._exit(0)  # torch's own teardown of gloo aborts now and then
"""


HELPERS = Path(__file__).parents[1] / "helpers"


def outcome(said: str) -> tuple[list[str], str]:
    """Where attempts started, and how the last one ended."""
    lines = said.splitlines()
    [end] = [line for line in lines if "digest" in line]
    return [line for line in lines if line.startswith("start")], end


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "script.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def undisturbed(script, tmp_path_factory):
    starts, end = outcome(run_script(script, [HELPERS, tmp_path_factory.mktemp("undisturbed"), "nothing"], ranks=2))
    assert starts == ["start at 0"] * 2 and end.startswith("6 steps")
    return end


def launch(script: Path, folder: Path, killed_in: str) -> str:
    """What ranks under torchrun said until the last one ended."""
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
            *("--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"),
            *map(str, (script, HELPERS, folder, killed_in)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", FRESH_STORE: "1"},
    )
    try:
        said, complaints = run.communicate(timeout=220)
    finally:
        run.terminate()  # torchrun then ends what it started
        run.wait(60)
    assert run.returncode == 0, complaints[-4000:]
    return said


@pytest.mark.parametrize(("killed_in", "resumes_at"), [("step", 4), ("save", 2)])
def test_a_killed_rank_costs_only_the_steps_since_the_last_checkpoint(
    script, tmp_path, undisturbed, killed_in, resumes_at
):
    starts, end = outcome(launch(script, tmp_path, killed_in))
    assert sorted(starts) == ["start at 0"] * 2 + [f"start at {resumes_at}"] * 2
    assert end == undisturbed
