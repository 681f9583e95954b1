"""Counts what the CUDA kernels cost, without a GPU: registers, spills, and instructions for 32 elements.

    python csrc/cuda/count_sass.py --arch sm_80 sm_90 sm_100 sm_120

It compiles library.cu with nvcc and reads the machine code. A warp goes once through the loop over its elements for
each 32 of them (twice as many where a thread has two elements), so the instructions of that loop are what a kernel
issues; the few that run once a block are left out. Loops inside it count once, which is right for matrices and networks
of two hidden layers. Everything is counted, nothing timed.
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

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SOURCE = Path(__file__).with_name("library.cu")

KINDS = {"HMMA": "tensor", "FFMA": "FFMA", "LDG": "loads", "STG": "stores", "LDS": "shared", "MUFU": "special"}


@dataclass
class Kernel:
    """What the compiler made of a kernel."""

    name: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    loops: list[Counter[str]] = field(default_factory=list)  # instructions by opcode, of loops that store to memory

    @property
    def elements(self) -> int:
        """Elements of a thread in one round of the loop."""
        match = re.match(r"exact_kernel<\d+, (\d+)", self.name)
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


def compile_kernels(arch: str, folder: Path) -> tuple[Path, dict[str, Kernel]]:
    """Compile for one architecture; the machine code, and kernels by their mangled names."""
    target = folder / f"{arch}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch={arch}", "-Xptxas=-v"]
    command = ["nvcc", *flags, "-cubin", str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr)
    kernels: dict[str, Kernel] = {}
    current = None
    spilled = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[match[1]] = Kernel(readable(match[1]))
        elif current and (match := spilled.search(line)):
            current.stack, current.spill_stores, current.spill_loads = map(int, match.groups())
        elif current and (match := re.search(r"Used (\d+) registers", line)):
            current.registers = int(match[1])
    return target, kernels


def readable(mangled: str) -> str:
    """``exact_kernel<32, 2, 1>`` of a mangled name."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    arguments = re.findall(r"L[ib](\d+)E", mangled)
    base = name[1] if name else mangled
    return f"{base}<{', '.join(arguments)}>" if arguments else base


def read_loops(cubin: Path, kernels: dict[str, Kernel]) -> None:
    """Find the outermost loops that store to global memory in the machine code of every kernel."""
    disassembler = tool("cuobjdump")
    if disassembler is None:
        raise RuntimeError("cuobjdump was found neither on the path, nor beside nvcc, nor in triton's package")
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    command = [disassembler, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        code = [(int(address, 16), opcode, operands) for address, opcode, operands in instruction.findall(body)]
        jumps = [
            (int(target[1], 16), address)
            for address, opcode, operands in code
            if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
        ]
        backward = {(first, last) for first, last in jumps if first < last}
        loops = kernels[name.strip()].loops
        for first, last in backward:
            inside = any(a <= first and last <= b for a, b in backward - {(first, last)})
            loop = Counter(opcode.split(".")[0] for address, opcode, _ in code if first <= address <= last)
            if not inside and loop["STG"]:
                loops.append(loop)
        # That of tensors with factored moments, which reads rows and columns, before that of vectors.
        loops.sort(key=lambda loop: -loop["LDG"])


def report(architectures: Sequence[str]) -> str:
    """A Markdown table."""
    titles = ["arch", "kernel", "registers", "spills, bytes", "instructions for 32 elements", "of these"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for arch in architectures:
            cubin, kernels = compile_kernels(arch, Path(folder))
            read_loops(cubin, kernels)
            for kernel in sorted(kernels.values(), key=lambda k: k.name):
                loops = kernel.loops if kernel.name.startswith(("exact", "tensor")) else []
                counts = " / ".join(f"{kernel.instructions(loop):.0f}" for loop in loops)
                kinds = " / ".join(
                    ", ".join(f"{loop[op] / kernel.elements:.0f} {kind}" for op, kind in KINDS.items() if loop[op])
                    for loop in loops
                )
                spills = kernel.spill_stores + kernel.spill_loads
                lines.append(f"| {arch} | `{kernel.name}` | {kernel.registers} | {spills} | {counts} | {kinds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    print(report(parser.parse_args().arch))
