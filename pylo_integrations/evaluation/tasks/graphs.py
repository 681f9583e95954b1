"""Suite 2, graphs: small random ones, whose matrix of edges is in front of the features of their nodes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, standardised
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks import Readout

_COMMUNITIES = 4


def _edges(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Symmetric matrices of zeros and ones without loops; ``probabilities`` are ``(graphs, nodes, nodes)``."""
    upper = (torch.rand(probabilities.shape, generator=generator) < probabilities).float().triu(1)
    return upper + upper.mT


@functools.cache
def _communities() -> tuple[Examples, Examples]:
    """Twenty nodes in four communities that have more edges inside; of every node a noisy hint of its own."""
    generator = generator_of("held out", "communities")
    labels = torch.randint(_COMMUNITIES, (6000, 20), generator=generator)
    alike = labels.unsqueeze(1) == labels.unsqueeze(2)
    edges = _edges(torch.where(alike, 0.7, 0.1), generator)
    hints = F.one_hot(labels, _COMMUNITIES) + 0.7 * torch.randn(6000, 20, _COMMUNITIES, generator=generator)
    return divided(torch.cat([edges, hints], 2), labels)


@functools.cache
def _triangles() -> tuple[Examples, Examples]:
    """How many triangles graphs of twelve nodes have; every node's feature is how many neighbours it has."""
    generator = generator_of("held out", "triangles")
    density = 0.1 + 0.6 * torch.rand(8000, 1, 1, generator=generator)
    edges = _edges(density.expand(-1, 12, 12), generator)
    triangles = (edges @ edges * edges).sum((1, 2)) / 6
    degrees = edges.sum(2, keepdim=True) / 6
    return divided(torch.cat([edges, degrees], 2), standardised(triangles.log1p()).unsqueeze(1))


_FARTHEST = 4


@functools.cache
def _distances() -> tuple[Examples, Examples]:
    """How far nodes of sparse graphs are from a marked one: 0 to 4 edges, or more."""
    generator = generator_of("held out", "distances")
    edges = _edges(torch.full((6000, 16, 16), 0.13), generator)
    mark = F.one_hot(torch.randint(16, (6000,), generator=generator), 16).float()
    reached, distances = mark.clone(), torch.full((6000, 16), _FARTHEST + 1)
    distances[mark > 0] = 0
    for distance in range(1, _FARTHEST + 1):
        reached = (reached + (edges @ reached.unsqueeze(2)).squeeze(2) > 0).float()
        distances = torch.where((reached > 0) & (distances > distance), distance, distances)
    return divided(torch.cat([edges, mark.unsqueeze(2), torch.ones(6000, 16, 1)], 2), distances)


def _split(input: Tensor) -> tuple[Tensor, Tensor]:
    """Edges ``(graphs, nodes, nodes)`` and features ``(graphs, nodes, features)``."""
    return input[..., : input.shape[1]], input[..., input.shape[1] :]


class _Averages(nn.Module):
    """Three layers of a node and of averages over its neighbours (Hamilton et al., 2017)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.own, self.others = (
            nn.ModuleList(nn.Linear(inputs, width) for inputs in (_COMMUNITIES, width, width)) for _ in range(2)
        )
        self.readout = Readout(width, _COMMUNITIES, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        edges, hidden = _split(input)
        edges = edges / edges.sum(2, keepdim=True).clamp(min=1)
        for own, others in zip(self.own, self.others, strict=True):
            hidden = F.relu(own(hidden) + edges @ others(hidden))
        output: Tensor = self.readout(hidden)
        return output


class _Isomorphism(nn.Module):
    """Three layers of perceptrons of sums over neighbours (Xu et al., 2019), and a sum over nodes."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
            for inputs in (1, width, width)
        )
        self.readout = Readout(width, 1, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        edges, hidden = _split(input)
        for layer in self.layers:
            hidden = F.relu(layer(hidden + edges @ hidden))
        output: Tensor = self.readout(hidden.mean(1))
        return output


class _GraphAttention(nn.Module):
    """Four layers of attention to neighbours (Velickovic et al., 2018), with paths around them."""

    heads = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.values = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.scores = nn.ModuleList(nn.Linear(width, 2 * self.heads) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.readout = Readout(width, _FARTHEST + 2, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        edges, hidden = _split(input)
        absent = (edges + torch.eye(edges.shape[1], device=edges.device) == 0).unsqueeze(1)
        hidden = self.first(hidden)
        for norm, values, scores in zip(self.norms, self.values, self.scores, strict=True):
            normalised = norm(hidden)
            mine, theirs = scores(normalised).mT.unsqueeze(-1).chunk(2, 1)
            weights = F.leaky_relu(mine + theirs.mT, 0.2).masked_fill(absent, -torch.inf).softmax(-1)
            value = values(normalised).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            hidden = hidden + F.elu((weights @ value).transpose(1, 2).flatten(-2))
        output: Tensor = self.readout(hidden)
        return output


TASKS = (
    HeldOutTask(
        "communities_sage", "communities of 20 nodes, averages of neighbours 64 x 3", 64, 16, _Averages, _communities
    ),
    HeldOutTask(
        "triangles_gin", "triangles among 12 nodes, isomorphism network 64 x 3", 64, 32, _Isomorphism, _triangles
    ),
    HeldOutTask(
        "distances_gat", "distances among 16 nodes, graph attention 32 x 4", 32, 16, _GraphAttention, _distances
    ),
)
