"""Do the kernels step what is kept on the CPU, by FSDP2 or by us, as if it had never been elsewhere?"""

from __future__ import annotations

import pytest
from native_library import library_or_skip
from offload_cases import offload_case, replica_case

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("name", "kind"), [("pace", "float32"), ("celo2", "bfloat16"), ("pace", "int8")])
def test_cpu_offload_policy_steps_on_the_kernels(workers, name, kind):
    library_or_skip()
    for rank in workers.run(2, offload_case, name=name, kind=kind):
        assert rank == {"native": True, "devices": ["cpu"], "error": 0.0}


def test_replicas_whose_state_is_here_average_their_losses(workers):
    ranks = workers.run(2, replica_case)
    for rank in ranks:
        assert rank["equal"] and rank["unchanged"] and rank["sum"] == ranks[0]["sum"]
        assert "offload_state=True" in rank["said"] and "cpu:gloo,cuda:nccl" in rank["said"]
