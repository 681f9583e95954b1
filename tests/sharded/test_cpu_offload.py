"""Do the kernels step what FSDP2 keeps on the CPU, as if it had never been elsewhere?"""

from __future__ import annotations

import pytest
from native_library import library_or_skip
from offload_cases import offload_case

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("name", "kind"), [("pace", "float32"), ("celo2", "bfloat16"), ("pace", "int8")])
def test_cpu_offload_policy_steps_on_the_kernels(workers, name, kind):
    library_or_skip()
    for rank in workers.run(2, offload_case, name=name, kind=kind):
        assert rank == {"native": True, "devices": ["cpu"], "error": 0.0}
