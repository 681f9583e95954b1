"""Counts what the CUDA kernels cost, without a GPU: registers, spills, and instructions for 32 elements.

    python csrc/cuda/count_sass.py --arch 80 86 89 90 100 120

It compiles every kernel with NVRTC, as it is compiled where it runs, and reads the machine code. A warp goes once
through the loop over its elements for each 32 of them (twice as many where a thread has two elements), so the
instructions of that loop are what a kernel issues; the few that run once a block are left out. Loops inside it count
once, which is right for matrices and networks of two hidden layers. Everything is counted, nothing timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pylo_integrations.ops import cubins, nvrtc
from pylo_integrations.ops.cubins import kernel_lines

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

KINDS = {"HMMA": "tensor", "FFMA": "FFMA", "LDG": "loads", "STG": "stores", "LDS": "shared", "MUFU": "special"}


@dataclass
class Kernel:
    """What the compiler made of a kernel."""

    name: str
    cubin: bytes
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loops: list[Counter[str]] = field(default_factory=list)  # instructions by opcode, of loops that store to memory

    @property
    def elements(self) -> int:
        """Elements of a thread in one round of the loop."""
        match = re.search(r"apply_exactly<\d+, (\d+)", kernel_lines()[self.name])
        return int(match[1]) if match else 1

    def instructions(self, loop: Counter[str]) -> float:
        """Instructions of a warp for 32 elements."""
        return sum(loop.values()) / self.elements


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, beside nvcc, or in triton's package."""
    places = [os.environ.get("PATH", "")]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def compile_kernel(arch: int, name: str) -> Kernel:
    """Compile a kernel for one architecture."""
    compiler = nvrtc.load()
    if isinstance(compiler, str):
        raise RuntimeError(compiler)
    cubin, log = cubins.compile_kernel(compiler, name, arch, "--ptxas-options=-v")
    kernel = Kernel(name, cubin)
    if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log):
        kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
    if match := re.search(r"Used (\d+) registers", log):
        kernel.registers = int(match[1])
    return kernel


def read_loops(kernel: Kernel) -> None:
    """Find the outermost loops that store to global memory in the machine code of a kernel."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        raise RuntimeError("cuobjdump was found neither on the path, nor beside nvcc, nor in triton's package")
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        command = [disassembler, "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in instruction.findall(done.stdout)]
    jumps = [
        (int(target[1], 16), address)
        for address, opcode, operands in code
        if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]
    backward = {(first, last) for first, last in jumps if first < last}
    for first, last in backward:
        inside = any(a <= first and last <= b for a, b in backward - {(first, last)})
        loop = Counter(opcode.split(".")[0] for address, opcode, _ in code if first <= address <= last)
        if not inside and loop["STG"]:
            kernel.loops.append(loop)
    # That of tensors with factored moments, which reads rows and columns, before that of vectors.
    kernel.loops.sort(key=lambda loop: -loop["LDG"])


def report(architectures: Sequence[int]) -> str:
    """A Markdown table."""
    titles = ["arch", "kernel", "registers", "spills, bytes", "instructions for 32 elements", "of these"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arch in architectures:
        for name in kernel_lines():
            kernel = compile_kernel(arch, name)
            if name.startswith("apply"):
                read_loops(kernel)
            counts = " / ".join(f"{kernel.instructions(loop):.0f}" for loop in kernel.loops)
            kinds = " / ".join(
                ", ".join(f"{loop[op] / kernel.elements:.0f} {kind}" for op, kind in KINDS.items() if loop[op])
                for loop in kernel.loops
            )
            spills = kernel.spill_stores + kernel.spill_loads
            lines.append(f"| sm_{arch} | `{name}` | {kernel.registers} | {spills} | {counts} | {kinds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    print(report(parser.parse_args().arch))
