"""Options of an optimizer as the text of ``TrainingArguments.optim_args``."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from pylo_integrations.catalog import OptimizerSpec
from pylo_integrations.telemetry import TelemetryMode

_FIELD_OF = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # options that TrainingArguments has fields for
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_KIND = {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "text", types.NoneType: "None"}


def parse_optim_args(spec: OptimizerSpec, optim_args: str | None) -> dict[str, Any]:
    """Read ``"option=value,option=value"`` as keyword arguments of an optimizer, typed by its constructor.

    Args:
        spec: The catalogue entry whose class has the options. ``telemetry`` and ``split`` are of every entry,
            see :func:`~pylo_integrations.create_optimizer`.
        optim_args: As in ``TrainingArguments.optim_args``. Values cannot contain ``,`` or ``=``; numbers, ``true`` and
            ``false``, ``None`` and the choices of a ``Literal`` are recognised where the annotation has them.

    Raises:
        ValueError: Malformed text, an unknown option, a value that the option's type does not admit, or an option that
            has a field of its own in ``TrainingArguments``.
    """
    if not optim_args or not optim_args.strip():
        return {}
    hints = {**typing.get_type_hints(spec.cls.__init__), "telemetry": TelemetryMode, "split": bool}
    available = sorted({*spec.options, "telemetry", "split"} - set(_FIELD_OF))
    options: dict[str, Any] = {}
    for item in optim_args.split(","):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text) or "=" in text:
            raise ValueError(f"optim_args={optim_args!r}: {item!r} is not of the form option=value")
        if field := _FIELD_OF.get(key):
            raise ValueError(f"optim_args={optim_args!r}: give {key!r} as TrainingArguments({field}={text}) instead")
        if key not in available:
            near = difflib.get_close_matches(key, available, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {available}"
            raise ValueError(f"optim_args={optim_args!r}: {spec.name} has no option {key!r}; {hint}")
        if key in options:
            raise ValueError(f"optim_args={optim_args!r} sets {key!r} twice")
        options[key] = _read_value(key, text, hints.get(key, Any))
    return options


def _read_value(key: str, text: str, hint: Any) -> Any:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    expected: list[str] = []
    for member in sorted(members, key=lambda member: member in (str, Any)):  # text admits anything, so it comes last
        if get_origin(member) is Literal:
            choices = {str(choice): choice for choice in get_args(member)}
            if text in choices:
                return choices[text]
            expected += map(repr, choices)
        elif member in _KIND:
            try:
                return _read_simple(text, member)
            except (KeyError, ValueError):
                expected.append(_KIND[member])
    if not expected:
        raise ValueError(f"optim_args: {key} cannot be given as text; create the optimizer in Python to set it")
    raise ValueError(f"optim_args: {key}={text!r} is invalid; expected {' or '.join(expected)}")


def _read_simple(text: str, kind: Any) -> Any:
    if kind is types.NoneType:
        return {"none": None}[text.lower()]
    if kind is bool:
        return _BOOLS[text.lower()]
    return kind(text) if kind in (int, float) else text
