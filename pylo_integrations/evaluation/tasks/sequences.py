"""Suite 2, sequences: gated recurrence, a state space, dilated convolutions, and transformers that compute."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, standardised, text_windows
from pylo_integrations.metatrain import data
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks.networks import Positions, Readout

_COPIED, _DELAY, _SYMBOLS = 4, 6, 8


@functools.cache
def _copying() -> tuple[Examples, Examples]:
    """Symbols, a pause, and a signal to repeat them (Hochreiter & Schmidhuber, 1997): 0 pauses, 1 asks."""
    symbols = torch.randint(2, _SYMBOLS + 2, (20_000, _COPIED), generator=generator_of("held out", "copying"))
    pause = torch.zeros(len(symbols), _DELAY, dtype=torch.int64)
    inputs = torch.cat([symbols, pause, torch.ones_like(symbols)], 1)
    return divided(inputs, torch.cat([torch.zeros_like(symbols), pause, symbols], 1))


_LENGTH = 32


@functools.cache
def _text() -> tuple[Examples, Examples]:
    return text_windows(_LENGTH)


@functools.cache
def _lorenz() -> tuple[Examples, Examples]:
    """Windows of Lorenz's chaotic system, ``(examples, 3, 32)``; targets are their differences to the next point."""
    generator = generator_of("held out", "lorenz")
    state = torch.randn(100, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.0, 25.0])
    points = []
    for step in range(300):
        for _ in range(5):  # steps of 0.01, so that Euler's method is stable
            x, y, z = state.unbind(1)
            state = state + 0.01 * torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)
        if step >= 100:  # on the attractor by then
            points.append(state)
    series = standardised(torch.stack(points).flatten(0, 1).float()).view(200, 100, 3).permute(1, 2, 0)
    windows = series.unfold(2, 33, 2).permute(0, 2, 1, 3)  # (runs, windows, 3, 33)
    # Runs, not windows, are divided: windows overlap.
    training, validation = divided(windows, windows)
    return tuple(  # type: ignore[return-value]
        Examples(part.inputs.flatten(0, 1)[..., :-1], part.inputs.flatten(0, 1).diff(dim=-1))
        for part in (training, validation)
    )


_DIGITS = 3


@functools.cache
def _addition() -> tuple[Examples, Examples]:
    """Two numbers of three digits and their sum, most significant digit first; a class for each of four digits."""
    numbers = torch.randint(10**_DIGITS, (30_000, 2), generator=generator_of("held out", "addition"))

    def digits(values: Tensor, count: int) -> Tensor:
        return values.unsqueeze(-1) // 10 ** torch.arange(count - 1, -1, -1) % 10

    total = digits(numbers.sum(1), _DIGITS + 1)
    # What stands before a digit of the sum are the summands and the digits that precede it.
    return divided(torch.cat([digits(numbers, _DIGITS).flatten(1), total[:, :-1]], 1), total)


@functools.cache
def _sorting() -> tuple[Examples, Examples]:
    """Ten numbers below 20, and the same in order; the decoder reads what came before."""
    numbers = torch.randint(20, (20_000, 10), generator=generator_of("held out", "sorting"))
    ordered = numbers.sort(1).values
    before = torch.cat([torch.full((len(numbers), 1), 20), ordered[:, :-1]], 1)
    return divided(torch.cat([numbers, before], 1), ordered)


class _GRU(nn.Module):
    """A gated recurrent unit over classes (Cho et al., 2014)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(_SYMBOLS + 2, width), nn.GRU(width, width, batch_first=True)
        self.readout = Readout(width, _SYMBOLS + 2, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.readout(self.gru(self.embedding(input))[0])
        return output


class _StateSpace(nn.Module):
    """Two layers of diagonal linear state spaces (Gu et al., 2022), as convolutions with their impulse responses."""

    states = 8

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(data.VOCABULARY, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        rates = torch.linspace(math.log(0.02), math.log(1.0), self.states).expand(width, -1)
        self.log_rates = nn.ParameterList(nn.Parameter(rates.clone()) for _ in range(2))
        self.responses = nn.ParameterList(nn.Parameter(torch.randn(width, self.states) / 8) for _ in range(2))
        self.direct = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.mixing = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.readout = Readout(width, data.VOCABULARY, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.embedding(input)
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        back = steps.unsqueeze(1) - steps  # how long ago
        for norm, log_rates, responses, direct, mixing in zip(
            self.norms, self.log_rates, self.responses, self.direct, self.mixing, strict=True
        ):
            decay = torch.exp(-log_rates.exp().unsqueeze(-1) * steps)  # (width, states, length)
            response = torch.einsum("ws,wsl->wl", responses, decay)
            kernel = response[:, back.clamp(min=0)].masked_fill(back < 0, 0.0)  # (width, to, from)
            signal = norm(hidden)
            seen = torch.einsum("wts,bsw->btw", kernel, signal) + direct * signal
            hidden = hidden + F.glu(mixing(F.gelu(seen)))
        output: Tensor = self.readout(hidden)
        return output


class _Dilated(nn.Module):
    """Causal convolutions of growing dilation (van den Oord et al., 2016)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, width, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**number) for number in range(4))
        self.mixing = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(4))
        self.last, self.scale = nn.Conv1d(width, 3, 1), 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        for number, (layer, mixing) in enumerate(zip(self.layers, self.mixing, strict=True)):
            past = F.pad(hidden, (2**number, 0))
            hidden = hidden + mixing(F.glu(layer(past), 1))
        output: Tensor = self.last(F.silu(hidden)) * self.scale
        return output


class _Attention(nn.Module):
    """Four heads of attention to others, with a path around; normalisation comes before."""

    heads = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.norm, self.query, self.key_value = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
        )
        self.out = nn.Linear(width, width)
        self.scale = (width // self.heads * width_mult) ** -0.5

    def forward(self, input: Tensor, others: Tensor | None = None, is_causal: bool = False) -> Tensor:
        normalised = self.norm(input)
        query = self.query(normalised).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        joined = self.key_value(normalised if others is None else others)
        key, value = joined.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=self.scale)
        result: Tensor = input + self.out(seen.transpose(1, 2).flatten(-2))
        return result


class _Perceptron(nn.Module):
    """With normalisation before and a path around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = input + self.layers(input)
        return result


class _Adder(nn.Module):
    """A causal transformer that answers in the last positions."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding = Positions(10, 3 * _DIGITS, width)
        self.attention = nn.ModuleList(_Attention(width, width_mult) for _ in range(2))
        self.mlps = nn.ModuleList(_Perceptron(width) for _ in range(2))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 10, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.embedding(input)
        for attention, mlp in zip(self.attention, self.mlps, strict=True):
            hidden = mlp(attention(hidden, is_causal=True))
        output: Tensor = self.readout(self.norm(hidden[:, -_DIGITS - 1 :]))
        return output


class _Sorter(nn.Module):
    """An encoder, and a decoder that attends to it (Vaswani et al., 2017), one block each."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(Positions(21, 10, width) for _ in range(2))
        self.encoder, self.decoder, self.across = (_Attention(width, width_mult) for _ in range(3))
        self.mlps = nn.ModuleList(_Perceptron(width) for _ in range(2))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 20, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        numbers, before = input.chunk(2, 1)
        encoded = self.mlps[0](self.encoder(self.embeddings[0](numbers)))
        decoded = self.decoder(self.embeddings[1](before), is_causal=True)
        output: Tensor = self.readout(self.norm(self.mlps[1](self.across(decoded, encoded))))
        return output


TASKS = (
    HeldOutTask("copying_gru", "four symbols after a pause, GRU of width 96", 96, 16, _GRU, _copying),
    HeldOutTask("text_state_space", "characters, two state space layers of width 64", 64, 8, _StateSpace, _text),
    HeldOutTask("lorenz_dilated", "Lorenz's system, four dilated convolutions of width 32", 32, 16, _Dilated, _lorenz),
    HeldOutTask("addition_transformer", "sums of three digits, transformer 64 x 2", 64, 16, _Adder, _addition),
    HeldOutTask("sorting_transformer", "ten numbers in order, encoder and decoder of 48", 48, 16, _Sorter, _sorting),
)
