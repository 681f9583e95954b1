"""Suite 2, embeddings: ratings factorised, two towers that choose, and words by their neighbours."""

from __future__ import annotations

import functools
from collections import Counter

import torch
from torch import Tensor, nn

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, standardised
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks import Readout

_USERS, _ITEMS, _CHOICES = 400, 300, 8
_WORDS, _NEGATIVES = 1000, 7


def _tastes(name: str) -> tuple[torch.Generator, Tensor]:
    """A generator, and how much every user likes every item: of rank 8, and some are liked by all."""
    generator = generator_of("held out", name)
    users, items = (torch.randn(count, 8, generator=generator) for count in (_USERS, _ITEMS))
    return generator, users @ items.T / 8**0.5 + torch.randn(_ITEMS, generator=generator)


@functools.cache
def _ratings() -> tuple[Examples, Examples]:
    """User and item, and a rating with noise."""
    generator, tastes = _tastes("ratings")
    pairs = torch.stack([torch.randint(count, (40_000,), generator=generator) for count in (_USERS, _ITEMS)], 1)
    ratings = tastes[pairs[:, 0], pairs[:, 1]] + 0.3 * torch.randn(len(pairs), generator=generator)
    return divided(pairs, standardised(ratings).unsqueeze(1))


@functools.cache
def _choices() -> tuple[Examples, Examples]:
    """User and eight items, and which of them was taken."""
    generator, tastes = _tastes("choices")
    users = torch.randint(_USERS, (30_000, 1), generator=generator)
    items = torch.randint(_ITEMS, (len(users), _CHOICES), generator=generator)
    taken = torch.multinomial((2 * tastes[users, items]).softmax(1), 1, generator=generator).squeeze(1)
    return divided(torch.cat([users, items], 1), taken)


@functools.cache
def _words() -> tuple[Examples, Examples]:
    """A word of the language reference that comes with Python, one that stands near it, and seven that do not.

    Targets are zero: the first of the candidates is the neighbour.
    """
    from pydoc_data.topics import topics

    written = "\n".join(topics[name] for name in sorted(topics)).lower().split()
    frequent = sorted(Counter(written).items(), key=lambda pair: (-pair[1], pair[0]))[:_WORDS]
    classes = {word: index for index, (word, _) in enumerate(frequent)}
    words = torch.tensor([classes[word] for word in written if word in classes])
    generator = generator_of("held out", "words")
    shift = torch.randint(1, 4, (len(words) - 3,), generator=generator)
    near = words[torch.arange(len(shift)) + shift]
    others = words[torch.randint(len(words), (len(shift), _NEGATIVES), generator=generator)]
    rows = torch.cat([words[: len(shift), None], near.unsqueeze(1), others], 1)
    return divided(rows, torch.zeros(len(rows), dtype=torch.int64))


def _embedding(count: int, width: int, std: float) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=std)
    return embedding


class _Factors(nn.Module):
    """Products of vectors, and what each user and item adds (Koren et al., 2009)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.factors = nn.ModuleList(_embedding(count, width, 0.1) for count in (_USERS, _ITEMS))
        self.offsets = nn.ModuleList(_embedding(count, 1, 0.0) for count in (_USERS, _ITEMS))
        self.scale = 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        user, item = (factors(index) for factors, index in zip(self.factors, input.T, strict=True))
        offsets = sum(offset(index) for offset, index in zip(self.offsets, input.T, strict=True))
        result: Tensor = (user * item).sum(1, keepdim=True) * self.scale + offsets
        return result


class _Towers(nn.Module):
    """A perceptron for users and one for items, whose outputs are multiplied (Covington et al., 2016)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(count, 16) for count in (_USERS, _ITEMS))
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), Readout(width, 16, width_mult)
            )
            for _ in range(2)
        )

    def forward(self, input: Tensor) -> Tensor:
        parts = torch.split(input, [1, _CHOICES], 1)
        user, items = (
            tower(embedding(index)) for tower, embedding, index in zip(self.towers, self.embeddings, parts, strict=True)
        )
        output: Tensor = (user * items).sum(-1)
        return output


class _Neighbours(nn.Module):
    """Skip-gram with negatives (Mikolov et al., 2013): a vector for a word and one for it as a neighbour."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.words, self.neighbours = _embedding(_WORDS, width, 0.1), _embedding(_WORDS, width, 0.0)
        self.scale = 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        word, candidates = input[:, :1], input[:, 1:]
        result: Tensor = (self.words(word) * self.neighbours(candidates)).sum(-1) * self.scale
        return result


TASKS = (
    HeldOutTask("ratings_factors", "ratings, factors of width 32", 32, 128, _Factors, _ratings),
    HeldOutTask("choices_towers", "one item of eight, two towers 128 x 2", 128, 32, _Towers, _choices),
    HeldOutTask("words_skipgram", "neighbours of 1000 words, vectors of width 64", 64, 128, _Neighbours, _words),
)
