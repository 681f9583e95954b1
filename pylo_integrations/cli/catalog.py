"""``pylo list`` and ``pylo info``: the catalogue."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from typing import Any

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.cli.output import print_table
from pylo_integrations.cli.trial import NotDownloaded, on_one_parameter
from pylo_integrations.options import OPTIONS, USUAL


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo list``."""
    parser.add_argument("filter", nargs="?", default="", help="part of a name, or a pattern with * ? [")


def run_list(args: argparse.Namespace) -> int:
    """Print names and what they are."""
    names = list_optimizers(args.filter)
    if not names:
        args.parser.error(f"no optimizer matches {args.filter!r}; there are {', '.join(list_optimizers())}")
    print_table([(name, get_optimizer_info(name).description) for name in names])
    return 0


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo info``."""
    parser.add_argument("spec", type=_spec, metavar="NAME")


def _spec(name: str) -> OptimizerSpec:
    try:
        return get_optimizer_info(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_info(args: argparse.Namespace) -> int:
    """Print all about one entry."""
    spec: OptimizerSpec = args.spec
    needs = [need for need, needed in (("the loss", spec.needs_loss), ("num_steps", spec.needs_horizon)) if needed]
    rows = [
        ("name", spec.name),
        ("is", spec.description),
        ("class", f"{spec.cls.__module__}.{spec.cls.__qualname__}"),
        ("needs", " and ".join(needs) or "gradients only"),
    ]
    if spec.anneals:
        rows.append(("takes", "num_steps, over which its steps fall to zero: no schedule then"))
    if spec.wants_schedule:
        rows.append(("wants", "a learning rate that falls to zero over the run: give it a scheduler"))
    rows += _describe_theta(spec)
    rows += _describe_published(spec)
    rows.append(("options", f"of create_optimizer(model, {spec.name!r}, ...), with their defaults"))
    rows += [(f"  {name}", text) for name, text in _describe_options(spec).items()]
    rows.append(("of a group", ", ".join((*OPTIONS, *USUAL))))
    print_table(rows)
    return 0


def _describe_options(spec: OptimizerSpec) -> dict[str, str]:
    """Every keyword argument that the optimizer can be created with, and its default."""
    own, common = inspect.signature(spec.cls).parameters, inspect.signature(create_optimizer).parameters
    defaults = {name: own[name].default for name in spec.options}
    # Of these the entry tells, where they are not given.
    defaults |= {"lr": spec.lr, "weight_decay": spec.weight_decay, "max_grad_norm": spec.cls.default_max_grad_norm}
    defaults |= {"weights": spec.weights} | dict(spec.defaults)
    defaults |= {
        name: option.default
        for name, option in common.items()
        if option.kind is option.KEYWORD_ONLY and name not in spec.options
    }
    defaults["split"] = spec.cls.splits_fused
    meanings = {"step_mult": "theta's", "exp_mult": "theta's", "max_grad_norm": "no clipping", "weights": "needed"}
    meanings |= {"num_steps": "needed"} if spec.needs_horizon else {}
    return {
        name: f"None ({meanings[name]})" if default is None and name in meanings else repr(default)
        for name, default in defaults.items()
        if name in own or name in ("telemetry", "split")
    }


def _describe_theta(spec: OptimizerSpec) -> list[tuple[str, str]]:
    try:
        theta = on_one_parameter(spec)[1].theta
    except (NotDownloaded, FileNotFoundError) as absent:
        return [("weights", str(absent)), _describe_constants(spec.hyper)]
    if theta is None:
        return [("weights", "none")]
    return [
        ("weights", f"{theta.name}, {theta.architecture}, sha256 {theta.sha256[:12]}"),
        ("  from", theta.provenance),
        ("  licence", theta.licence or "unknown"),
        _describe_constants({**spec.hyper, **theta.hyper}),
    ]


def _describe_constants(hyper: Mapping[str, Any]) -> tuple[str, str]:
    return "  constants", ", ".join(f"{name} {value}" for name, value in hyper.items())


def _describe_published(spec: OptimizerSpec) -> list[tuple[str, str]]:
    others = [" + ".join(f"hub:{part.name}" for part in entry.repositories) for entry in spec.published]
    return [("published", ", ".join(others))] if others else []
