"""Files as the authors publish them, made of arrays under the reference's names; written apart from the converters.

The PyTorch modules are real ``torch.nn`` modules, so that their layout is what torch makes of it and their ``forward``
can be compared with the arrays. The msgpack writer is checked against the authors' own files.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

SHARED = Path(os.environ.get("PYLO_SHARED", Path(__file__).parents[3] / "shared"))
"""Where the reference material lies that this repository must not copy."""

GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)


def published(name: str) -> Path:
    """One of the authors' files, or a skip that says what is missing."""
    path = SHARED / "golden" / "published" / name
    if not path.is_file():
        pytest.skip(f"the authors' {name} is not here; set PYLO_SHARED to the folder that has golden/published")
    return path


# -- random theta ------------------------------------------------------------------------------------------------


def random_arrays(optimizer: str, hidden: int = 8, bank: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Arrays of an optimizer under the reference's names, with no two axes of a weight alike where they may differ."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    if optimizer in ("small_fc", "mulo", "elo"):
        for layer, (inputs, outputs) in enumerate([(39, hidden), (hidden, hidden), (hidden, 2)]):
            shapes |= {f"nn/~/w{layer}": (inputs, outputs), f"nn/~/b{layer}": (outputs,)}
    if optimizer in ("velo", "celo", "celo_adam"):
        inputs = 30 if optimizer == "velo" else 18
        layers = {name: (inputs, hidden) for name in ("linear", "linear_1", "linear_2")}
        layers |= {"rnn/linear": (2 * hidden, 4 * hidden), "step_size": (hidden, 1)}
        if optimizer != "celo_adam":
            layers["rnn_to_controls"] = (hidden, bank)
        for name, shape in layers.items():
            shapes |= {f"rnn_params/{name}/w": shape, f"rnn_params/{name}/b": shape[1:]}
        shapes |= {"lstm_init_state/hidden": (1, hidden), "lstm_init_state/cell": (1, hidden)}
    if optimizer in ("velo", "celo", "celo2", "elo_celo2"):
        front, width = ((), 8) if "celo2" in optimizer else ((bank,), 4)
        for layer, (inputs, outputs) in enumerate([(None, width), (width, width), (width, 3)]):
            shapes[f"ff_mod_stack/~/b{layer}"] = (*front, outputs)
            if inputs is not None:
                shapes[f"ff_mod_stack/~/w{layer}"] = (*front, inputs, outputs)
        shapes |= {f"ff_mod_stack/~/w0__{i}": (*front, channels, width) for i, channels in enumerate(GROUPS)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_decays(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = {"momentum_decays": 3, "rms_decays": 1, "adafactor_decays": 3}
    return arrays | {name: torch.linspace(-0.1, 0.1, size + 1)[1:] for name, size in sizes.items()}


# -- Flax --------------------------------------------------------------------------------------------------------

NUMPY = {torch.float16: "float16", torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def pack(value) -> bytes:
    """msgpack, each value in its shortest form, as the usual encoders write it."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        if -32 <= value <= 127:
            return struct.pack("b", value)
        for code, form, top in ((0xCC, ">BB", 8), (0xCD, ">BH", 16), (0xCE, ">BI", 32), (0xCF, ">BQ", 64)):
            if 0 <= value < 1 << top:
                return struct.pack(form, code, value)
        return struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        return head(len(value.encode()), 0xA0, 32, (0xD9, 0xDA, 0xDB)) + value.encode()
    if isinstance(value, bytes):
        return head(len(value), None, 0, (0xC4, 0xC5, 0xC6)) + value
    if isinstance(value, (list, tuple)):
        return head(len(value), 0x90, 16, (None, 0xDC, 0xDD)) + b"".join(map(pack, value))
    if isinstance(value, dict):
        return head(len(value), 0x80, 16, (None, 0xDE, 0xDF)) + b"".join(pack(k) + pack(v) for k, v in value.items())
    assert isinstance(value, Tensor)
    contiguous = value.contiguous()
    raw = (contiguous.view(torch.int16) if value.dtype == torch.bfloat16 else contiguous).numpy().tobytes()
    return extension(1, pack((list(value.shape), NUMPY[value.dtype], raw)))


def head(length: int, fixed: int | None, limit: int, codes) -> bytes:
    if fixed is not None and length < limit:
        return bytes([fixed | length])
    for code, form, top in zip(codes, (">BB", ">BH", ">BI"), (8, 16, 32), strict=True):
        if code is not None and length < 1 << top:
            return struct.pack(form, code, length)
    raise AssertionError("too long for msgpack")


def extension(code: int, payload: bytes) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(payload))
    start = bytes([fixed]) if fixed else head(len(payload), None, 0, (0xC7, 0xC8, 0xC9))
    return start + struct.pack("b", code) + payload


def tree(arrays: dict[str, Tensor]) -> dict:
    """Nested as haiku nests: ``~`` and the names of inner modules stay one key."""
    nested: dict = {}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        if path[-2:] == ["rnn", "linear"]:
            path[-2:] = ["rnn/linear"]
        place = nested
        for key in path:
            place = place.setdefault(key, {})
        place[leaf] = array
    return nested


def flax_bytes(arrays: dict[str, Tensor]) -> bytes:
    return pack(tree(arrays))


# -- PyTorch modules -----------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
    return layer


class MetaMLP(nn.Module):
    config = {"input_size": 39, "hidden_size": 8, "hidden_layers": 1}

    def __init__(self, arrays):
        super().__init__()
        names = ("input", "linear_0", "output")
        layers = {name: linear(arrays[f"nn/~/w{i}"], arrays[f"nn/~/b{i}"]) for i, name in enumerate(names)}
        self.network = nn.ModuleDict(layers)

    def forward(self, x):
        for layer in (self.network["input"], self.network["linear_0"]):
            x = layer(x).relu()
        return self.network["output"](x)


class VeLO_RNN(nn.Module):
    config = {"input_size": 30, "lstm_hidden_size": 8, "param_inits": 6, "mix_layers": True}

    def __init__(self, arrays):
        super().__init__()
        theirs = {"mix_layer1": "linear", "mix_layer2": "linear_1", "final_mix_layer": "linear_2"}
        theirs |= {"rnn_to_controls": "rnn_to_controls", "step_size": "step_size"}
        for name, ours in theirs.items():
            self.add_module(name, linear(arrays[f"rnn_params/{ours}/w"], arrays[f"rnn_params/{ours}/b"]))
        self.lstm = nn.Module()
        self.lstm.linear = linear(arrays["rnn_params/rnn/linear/w"], arrays["rnn_params/rnn/linear/b"])
        states = [nn.Parameter(arrays[f"lstm_init_state/{name}"].clone()) for name in ("hidden", "cell")]
        self.lstm_init_state = nn.ParameterList(states)

    def forward(self, x):
        """docs/mathematics.md, VeLO 4, from the learned initial state."""
        hidden, cell = (state.expand(len(x), -1) for state in self.lstm_init_state)
        z = self.final_mix_layer(x) + self.mix_layer2(x).relu().amax(0)
        i, g, f, o = self.lstm.linear(torch.cat([z, hidden], 1)).chunk(4, 1)
        cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.rnn_to_controls(hidden), self.step_size(hidden)


class VeLO_MLP(nn.Module):
    config = {"param_inits": 6, "input_size": 30, "hidden_size": 4, "hidden_layers": 1, "output_size": 3}

    def __init__(self, arrays):
        super().__init__()
        banks = {name.removeprefix("ff_mod_stack/~/"): a for name, a in arrays.items() if name.startswith("ff_mod")}
        first = torch.cat([banks[f"w0__{i}"] for i in range(len(GROUPS))], 1)
        self.input_weights_, self.input_bias_ = nn.Parameter(first.mT.clone()), nn.Parameter(banks["b0"].clone())
        self.hidden_weights_ = nn.ParameterList([nn.Parameter(banks["w1"].mT.clone())])
        self.hidden_bias_ = nn.ParameterList([nn.Parameter(banks["b1"].clone())])
        self.output_weights_ = nn.Parameter(banks["w2"].mT.clone())
        self.output_bias_ = nn.Parameter(banks["b2"].clone())
        # The scratch copies of the published files.
        self.input_weights, self.input_bias = nn.Parameter(torch.randn(4, 30)), nn.Parameter(torch.randn(4))
        self.hidden_weights = nn.ParameterList([torch.randn(4, 4)])
        self.hidden_bias = nn.ParameterList([torch.randn(4)])
        self.output_weights, self.output_bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        """The output of every network of the bank, (bank, batch, 3)."""
        x = torch.einsum("koi,bi->kbo", self.input_weights_, x) + self.input_bias_[:, None]
        x = torch.einsum("koi,kbi->kbo", self.hidden_weights_[0], x.relu()) + self.hidden_bias_[0][:, None]
        return torch.einsum("koi,kbi->kbo", self.output_weights_, x.relu()) + self.output_bias_[:, None]


class CELO2MLP(nn.Module):
    config = {"feature_dims": list(GROUPS), "hidden_size": 8, "hidden_layers": 2, "output_size": 3}

    def __init__(self, arrays):
        super().__init__()
        arrays = {name.removeprefix("ff_mod_stack/~/"): array.clone() for name, array in arrays.items()}
        self.w0 = nn.ParameterList([arrays[f"w0__{i}"] for i in range(len(GROUPS))])
        self.b0 = nn.Parameter(arrays["b0"])
        self.dense_w = nn.ParameterList([arrays["w1"], arrays["w2"]])
        self.dense_b = nn.ParameterList([arrays["b1"], arrays["b2"]])

    def forward(self, x):
        x = sum(part @ w for part, w in zip(x.split(GROUPS, 1), self.w0, strict=True)) + self.b0
        for w, b in zip(self.dense_w, self.dense_b, strict=True):
            x = x.relu() @ w + b
        return x


class Celo2MLP(nn.Module):
    """Another port's, with the groups of the first layer apart."""

    config = {"input_group_dims": list(GROUPS), "hidden_size": 8, "output_size": 3}

    def __init__(self, arrays):
        super().__init__()
        arrays = {name.removeprefix("ff_mod_stack/~/"): array for name, array in arrays.items()}
        self.first_layer_weights = nn.ParameterList([arrays[f"w0__{i}"].mT.clone() for i in range(len(GROUPS))])
        self.first_layer_bias = nn.Parameter(arrays["b0"].clone())
        self.hidden, self.output = linear(arrays["w1"], arrays["b1"]), linear(arrays["w2"], arrays["b2"])

    def first(self, x):
        weight = torch.cat(list(self.first_layer_weights), 1)
        return nn.functional.linear(x, weight, self.first_layer_bias)

    def forward(self, x):
        return self.output(self.hidden(self.first(x).relu()).relu())


class DenseCelo2MLP(Celo2MLP):
    """The same with one matrix."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.first_layer = linear(torch.cat(list(self.first_layer_weights), 1).T, self.first_layer_bias)
        del self.first_layer_weights, self.first_layer_bias

    def first(self, x):
        return self.first_layer(x)


def module_files(module: nn.Module) -> dict[str, bytes]:
    """What ``PyTorchModelHubMixin`` writes."""
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    return {
        "config.json": json.dumps(module.config, indent=2).encode(),
        "model.safetensors": safetensors.torch.save(state, {"format": "pt"}),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def layouts() -> dict[str, list[dict[str, bytes]]]:
    """The files of one small theta in every published layout: a list of folders by layout."""
    velo = random_arrays("velo")
    flax = {
        f"flax_{name}": [{"theta.state": flax_bytes(random_arrays(name))}]
        for name in ("velo", "celo", "celo_adam", "celo2")
    }
    flax["flax_small_fc"] = [{"theta.state": flax_bytes(with_decays(random_arrays("small_fc")))}]
    flax["flax_google"] = [{"params": pack({"0": tree(velo), "1": "generation 3", "2": 400_000})}]
    return flax | {
        "MetaMLP": [module_files(MetaMLP(random_arrays("mulo")))],
        "VeLO": [module_files(VeLO_RNN(velo)), module_files(VeLO_MLP(velo))],
        "CELO2MLP": [module_files(CELO2MLP(random_arrays("celo2")))],
        "Celo2MLP": [module_files(Celo2MLP(random_arrays("celo2")))],
        "DenseCelo2MLP": [module_files(DenseCelo2MLP(random_arrays("celo2")))],
    }
