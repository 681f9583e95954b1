"""With their authors' theta, does celo2 step as docs/mathematics.md says, written down once more in float64?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from published_layouts import GROUPS, published
from safetensors.torch import load_file
from torch import Tensor, nn

from pylo_integrations import CELO2

SHAPES = [(12, 20), (20, 12), (7, 7), (40, 3), (6, 5, 3, 3), (1, 9), (9,), ()]
STEPS = 12
LR = 1e-3
BETAS = [float(torch.tensor(beta)) for beta in (0.9, 0.99, 0.999)]
RMS_BETA = float(torch.tensor(0.95))


class Matrices:
    """One tensor ``(*kernel, in, out)`` stepped by the learned rule."""

    def __init__(self, arrays: dict[str, Tensor], p: Tensor) -> None:
        self.layers = {name.removeprefix("ff_mod_stack/~/"): array.double() for name, array in arrays.items()}
        self.p = p
        # The longest axis and the second longest; of equal ones, the later first.
        order = sorted(range(p.dim()), key=lambda axis: (p.shape[axis], axis))
        self.d0, self.d1 = order[-1], order[-2]
        self.m = [torch.zeros_like(p) for _ in BETAS]
        self.r = torch.zeros_like(p)
        self.rows = [torch.zeros_like(p.mean(self.d0, keepdim=True)) for _ in BETAS]
        self.cols = [torch.zeros_like(p.mean(self.d1, keepdim=True)) for _ in BETAS]

    def step(self, g: Tensor) -> None:
        g = g.clamp(-1000, 1000)
        q = g * g + 1e-30
        self.r = RMS_BETA * self.r + (1 - RMS_BETA) * g * g
        for i, beta in enumerate(BETAS):
            self.m[i] = beta * self.m[i] + (1 - beta) * g
            self.rows[i] = beta * self.rows[i] + (1 - beta) * q.mean(self.d0, keepdim=True)
            self.cols[i] = beta * self.cols[i] + (1 - beta) * q.mean(self.d1, keepdim=True)
        shape = self.p.shape
        root = (self.r + 1e-8).rsqrt()
        scale = [
            (row / (row.mean(self.d1, keepdim=True) + 1e-9)).clamp(min=1e-9).rsqrt() * col.clamp(min=1e-9).rsqrt()
            for row, col in zip(self.rows, self.cols, strict=True)
        ]
        groups = [
            [g],
            [g.clamp(-0.1, 0.1)],
            [self.p],
            self.m,
            [self.r],
            [m * root for m in self.m],
            [root],
            [g * s for s in scale],
            [g * root],
            [row.expand(shape) for row in self.rows],
            [col.expand(shape) for col in self.cols],
            [(row + 1e-8).rsqrt().expand(shape) for row in self.rows],
            [(col + 1e-8).rsqrt().expand(shape) for col in self.cols],
            [m * s for m, s in zip(self.m, scale, strict=True)],
        ]
        assert [len(group) for group in groups] == list(GROUPS)
        x = self.layers["b0"]
        for number, group in enumerate(groups):
            normalised = [f * (f.square().mean((-2, -1), keepdim=True) + 1e-9).rsqrt() for f in group]
            x = x + torch.stack(normalised, -1) @ self.layers[f"w0__{number}"]
        for layer in (1, 2):
            x = x.relu() @ self.layers[f"w{layer}"] + self.layers[f"b{layer}"]
        u = orthogonal(x[..., 0])
        self.p = self.p - LR * u * (u.square().mean((-2, -1), keepdim=True) + 1e-9).rsqrt()


def orthogonal(d: Tensor) -> Tensor:
    """Newton-Schulz by singular values: its polynomial acts on nothing else."""
    left, values, right = torch.linalg.svd(d, full_matrices=False)
    values = values / (torch.linalg.matrix_norm(d)[..., None] + 1e-8)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values[..., None, :] @ right


class Vector:
    """One tensor stepped by Adam without bias correction, at twenty times the learning rate."""

    def __init__(self, p: Tensor) -> None:
        self.p, self.m, self.v = p, torch.zeros_like(p), torch.zeros_like(p)

    def step(self, g: Tensor) -> None:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = RMS_BETA * self.v + (1 - RMS_BETA) * g * g
        self.p = self.p - 20 * LR * self.m * (self.v + 1e-8).rsqrt()


# Of the largest change of a tensor in a step. In float64 only the order of sums differs. In float32 Newton-Schulz
# multiplies what is rounded off the smallest singular values, by up to 485; these gradients are well conditioned, so
# 6e-6 was measured.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("native", torch.float32)]
)
def test_twelve_steps_are_the_formulas(backend, dtype):
    arrays = load_file(published("celo2_author.safetensors"))
    if backend == "native":
        library_or_skip()
    generator = torch.Generator().manual_seed(0)
    starts = [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]
    means = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(start.to(dtype)) for start in starts]
    optimizer = CELO2(params, LR, weights=arrays, backend=backend)
    assert optimizer.theta.rule().step_mult == 1.0
    reference = [Matrices(arrays, torch_to_rule(p.double())) if p.dim() > 1 else Vector(p.double()) for p in starts]
    for step in range(STEPS):
        before = [torch_of(each.p) for each in reference]
        for param, tensor, mean in zip(params, reference, means, strict=True):
            # Alike from step to step and of several scales, some of them beyond the clipping of features.
            grad = (mean + torch.randn(mean.shape, generator=generator)) * 10.0 ** (step % 3 - 2)
            param.grad = grad.to(dtype)
            tensor.step(torch_to_rule(grad.double()))
        optimizer.step()
        for shape, param, tensor, old in zip(SHAPES, params, reference, before, strict=True):
            want = torch_of(tensor.p)
            bound = TOLERANCE[dtype] * float((want - old).abs().max()) * (step + 1)
            bound += STEPS * torch.finfo(dtype).eps * float(want.abs().max())
            assert float((param.detach().double() - want).abs().max()) <= bound, (shape, step)


def torch_to_rule(tensor: Tensor) -> Tensor:
    """``(out, in, *kernel)`` as ``(*kernel, in, out)``."""
    return tensor.movedim((0, 1), (-1, -2)) if tensor.dim() > 1 else tensor


def torch_of(tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor.movedim((-1, -2), (0, 1)) if tensor.dim() > 1 else tensor
