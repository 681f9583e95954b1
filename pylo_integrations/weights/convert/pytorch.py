"""PyTorch modules as the existing PyTorch implementation publishes them: ``config.json`` and ``model.safetensors``.

Matrices are (outputs, inputs) and become (inputs, outputs), but for CELO2MLP's, which already are. The theta of VeLO is
spread over two modules: the LSTM, and the bank of networks that it mixes. The arrays decide; a config beside them, or
none, changes nothing, but it must not contradict them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pylo_integrations.weights.convert.errors import ConversionError

GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Channels of the 14 feature groups for which VeLO and its descendants name weights apart (docs/mathematics.md)."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Module(NamedTuple):
    """What one file holds.

    Attributes:
        kind: Class name of the module, a key of :data:`MODULES`.
        arrays: By the reference's tree-path names, (inputs, outputs).
    """

    kind: str
    arrays: dict[str, Tensor]


class _Layout(NamedTuple):
    signature: str  # an array that only this module has
    fields: frozenset[str]  # of its config
    convert: Callable[[_Tensors], tuple[dict[str, Tensor], dict[str, Any]]]  # arrays, and the config that fits them


def read_module(data: bytes, config: Mapping[str, Any]) -> Module:
    """The arrays of a module.

    Args:
        data: Contents of ``model.safetensors``.
        config: Contents of ``config.json``, or nothing.

    Raises:
        ConversionError: Damaged, of another module, or in contradiction to the config.
    """
    try:
        found = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch does not have
        raise ConversionError(f"is not a readable safetensors file: {str(error)[:200]}") from error
    kind = next((kind for kind, layout in MODULES.items() if layout.signature in found), None)
    if kind is None:
        raise ConversionError(
            f"holds none of the published modules ({', '.join(MODULES)}): {name_some(found)}. Load its arrays and call "
            "Theta.from_arrays(name, arrays)"
        )
    tensors = _Tensors(kind, found)
    arrays, sizes = MODULES[kind].convert(tensors)
    tensors.refuse_rest()
    for field, size in sizes.items():
        if field in config and config[field] != size:
            raise ConversionError(f"has {field} {size}, the config beside it says {repr(config[field])[:60]}")
    return Module(kind, arrays)


def read_config(data: bytes) -> dict[str, Any]:
    """A ``config.json``.

    Raises:
        ConversionError: Damaged, or not of one of the published modules.
    """
    try:
        config = json.loads(data.decode())  # bytes would be taken for UTF-16 and more
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict) or not any(layout.fields <= set(config) for layout in MODULES.values()):
        raise ConversionError(f"is not the config of one of the published modules: {', '.join(MODULES)}")
    return config


def name_some(arrays: Mapping[str, Any]) -> str:
    """Names of arrays for a message, from a file that may have many and long ones."""
    names = [repr(name[:60]) for name in sorted(arrays)[:6]]
    return f"{len(arrays)} arrays {', '.join(names)}{', ...' if len(arrays) > len(names) else ''}"


class _Tensors:
    """The arrays of a file, each to be taken once."""

    def __init__(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        self.kind = kind
        self.tensors = dict(tensors)

    def take(self, name: str, rank: int) -> Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise ConversionError(f"{self.kind} lacks {name!r}")
        if tensor.dim() != rank or tensor.dtype not in _FLOATS or not tensor.numel():
            raise ConversionError(
                f"{self.kind} has {name!r} of shape {repr(tuple(tensor.shape))[:60]} and {tensor.dtype}; expected "
                f"floating point numbers with {rank} axes"
            )
        return tensor

    def count(self, pattern: str) -> int:
        return next(number for number in range(len(self.tensors) + 1) if pattern.format(number) not in self.tensors)

    def refuse_rest(self) -> None:
        if self.tensors:
            raise ConversionError(f"{self.kind} has unknown {name_some(self.tensors)}")


def _meta_mlp(tensors: _Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depth = tensors.count("network.linear_{}.weight")
    layers = ["network.input", *(f"network.linear_{layer}" for layer in range(depth)), "network.output"]
    arrays = {}
    for number, layer in enumerate(layers):
        arrays[f"nn/~/w{number}"] = tensors.take(f"{layer}.weight", 2).mT
        arrays[f"nn/~/b{number}"] = tensors.take(f"{layer}.bias", 1)
    inputs, hidden = arrays["nn/~/w0"].shape
    return arrays, {"input_size": inputs, "hidden_size": hidden, "hidden_layers": depth}


def _velo_rnn(tensors: _Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers = {
        "mix_layer1": "linear",  # dead: its output is overwritten, here as in the reference
        "mix_layer2": "linear_1",
        "final_mix_layer": "linear_2",
        "lstm.linear": "rnn/linear",
        "rnn_to_controls": "rnn_to_controls",
        "step_size": "step_size",
    }
    arrays = {}
    for theirs, ours in layers.items():
        arrays[f"rnn_params/{ours}/w"] = tensors.take(f"{theirs}.weight", 2).mT
        arrays[f"rnn_params/{ours}/b"] = tensors.take(f"{theirs}.bias", 1)
    arrays["lstm_init_state/hidden"] = tensors.take("lstm_init_state.0", 2)
    arrays["lstm_init_state/cell"] = tensors.take("lstm_init_state.1", 2)
    (inputs, hidden), (_, mixed) = (arrays[f"rnn_params/{name}/w"].shape for name in ("linear_1", "rnn_to_controls"))
    return arrays, {"input_size": inputs, "lstm_hidden_size": hidden, "param_inits": mixed}


def _velo_mlp(tensors: _Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depth = tensors.count("hidden_weights_.{}")
    first = tensors.take("input_weights_", 3).mT
    bank, inputs, hidden = first.shape
    if inputs != sum(GROUPS):
        raise ConversionError(f"VeLO_MLP has {inputs} inputs, not {sum(GROUPS)}")
    arrays = {f"ff_mod_stack/~/w0__{group}": part for group, part in enumerate(torch.split(first, list(GROUPS), dim=1))}
    arrays["ff_mod_stack/~/b0"] = tensors.take("input_bias_", 2)
    for layer in range(depth):
        arrays[f"ff_mod_stack/~/w{layer + 1}"] = tensors.take(f"hidden_weights_.{layer}", 3).mT
        arrays[f"ff_mod_stack/~/b{layer + 1}"] = tensors.take(f"hidden_bias_.{layer}", 2)
    last = tensors.take("output_weights_", 3).mT
    arrays[f"ff_mod_stack/~/w{depth + 1}"] = last
    arrays[f"ff_mod_stack/~/b{depth + 1}"] = tensors.take("output_bias_", 2)
    # Names without the underscore are scratch: the mixture for the tensor that was stepped last.
    scratch = ("input_weights", "input_bias", "hidden_weights.", "hidden_bias.", "output_weights", "output_bias")
    for name in [name for name in tensors.tensors if name.startswith(scratch) and "_." not in name]:
        del tensors.tensors[name]
    sizes = {"input_size": inputs, "hidden_size": hidden, "hidden_layers": depth}
    return arrays, {**sizes, "output_size": last.shape[-1], "param_inits": bank}


def _celo2_mlp(tensors: _Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depth = tensors.count("dense_w.{}")
    arrays = {f"ff_mod_stack/~/w0__{group}": tensors.take(f"w0.{group}", 2) for group in range(len(GROUPS))}
    arrays["ff_mod_stack/~/b0"] = tensors.take("b0", 1)
    for layer in range(depth):
        arrays[f"ff_mod_stack/~/w{layer + 1}"] = tensors.take(f"dense_w.{layer}", 2)
        arrays[f"ff_mod_stack/~/b{layer + 1}"] = tensors.take(f"dense_b.{layer}", 1)
    groups = [arrays[f"ff_mod_stack/~/w0__{group}"].shape[0] for group in range(len(GROUPS))]
    hidden, outputs = arrays["ff_mod_stack/~/b0"].shape[0], arrays[f"ff_mod_stack/~/w{depth}"].shape[-1]
    return arrays, {"feature_dims": groups, "hidden_size": hidden, "hidden_layers": depth, "output_size": outputs}


def _celo2_linear(tensors: _Tensors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of the port of CELO2 that has ``torch.nn.Linear``: the first layer is one matrix, or one for every group."""
    if "first_layer.weight" in tensors.tensors:
        first, bias = tensors.take("first_layer.weight", 2), tensors.take("first_layer.bias", 1)
        if first.shape[1] != sum(GROUPS):
            raise ConversionError(f"Celo2MLP has {first.shape[1]} inputs, not {sum(GROUPS)}")
        parts = torch.split(first, list(GROUPS), dim=1)
    else:
        parts = tuple(tensors.take(f"first_layer_weights.{group}", 2) for group in range(len(GROUPS)))
        bias = tensors.take("first_layer_bias", 1)
    arrays = {f"ff_mod_stack/~/w0__{group}": part.mT for group, part in enumerate(parts)} | {"ff_mod_stack/~/b0": bias}
    for number, layer in enumerate(("hidden", "output"), start=1):
        arrays[f"ff_mod_stack/~/w{number}"] = tensors.take(f"{layer}.weight", 2).mT
        arrays[f"ff_mod_stack/~/b{number}"] = tensors.take(f"{layer}.bias", 1)
    groups, outputs = [part.shape[1] for part in parts], arrays["ff_mod_stack/~/b2"].shape[0]
    return arrays, {"input_group_dims": groups, "hidden_size": bias.shape[0], "output_size": outputs}


MODULES: Mapping[str, _Layout] = {
    "MetaMLP": _Layout("network.input.weight", frozenset({"input_size", "hidden_size", "hidden_layers"}), _meta_mlp),
    "VeLO_RNN": _Layout("lstm.linear.weight", frozenset({"lstm_hidden_size", "param_inits"}), _velo_rnn),
    "VeLO_MLP": _Layout("input_weights_", frozenset({"param_inits", "hidden_size", "output_size"}), _velo_mlp),
    "CELO2MLP": _Layout("dense_w.0", frozenset({"feature_dims", "hidden_size", "output_size"}), _celo2_mlp),
    "Celo2MLP": _Layout("hidden.weight", frozenset({"input_group_dims", "hidden_size", "output_size"}), _celo2_linear),
}
"""The published modules by class name."""
