"""``info``, ``methods``, ``config`` and ``weights``: what is there and what can be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medsam_lora.commands import options
from medsam_lora.errors import ConfigError, WeightsError

weights_app = typer.Typer(
    help="Find or download the official base weights.", no_args_is_help=True, rich_markup_mode=None
)

ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A model name, as `weights list` shows them.")]


def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with stable keys.")] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="Predict memory and largest batch of a run with this configuration instead."
        ),
    ] = None,
    settings: options.SetOption = None,
    device: Annotated[str, typer.Option(help="For --plan: cpu, cuda, or auto, the one found here.")] = "auto",
    memory_gib: Annotated[
        float | None, typer.Option(help="For --plan: memory of the device; by default that of the one found here.")
    ] = None,
) -> None:
    """Print versions, device, models and methods; or plan a run (--plan)."""
    from medsam_lora.stages.info import as_text, collect

    found = collect()
    if plan is not None:
        from medsam_lora.stages import plan as planning

        here = found["device"]
        kind = here["kind"] if device == "auto" else device
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device} is not one to plan for", remedy="Use cpu, cuda or auto.")
        memory = here["memory_gib"] if memory_gib is None and kind == here["kind"] else memory_gib
        found = planning.plan(options.read_config(plan, settings), device=kind, memory_gib=memory)
        as_text = planning.as_text
    typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))


def methods(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="The base model. [default: that of --config, else vit_b]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with stable keys.")] = False,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Print what every method trains and costs; with --config or --set, that of one."""
    chosen = None if config is None and not settings else options.read_config(config, settings)
    only = None if chosen is None else chosen.method
    if model is None:
        model = "vit_b" if chosen is None else chosen.model.name
    from medsam_lora.stages.methods import as_text
    from medsam_lora.stages.methods import methods as count

    rows = count(model, only)
    typer.echo(json.dumps(rows, indent=2) if as_json else as_text(rows, model))


def show_config(
    schema: Annotated[bool, typer.Option("--schema", help="Every key, type, default and meaning, as JSON.")] = False,
    config: options.ConfigOption = None,
    settings: options.SetOption = None,
) -> None:
    """Print the effective configuration as YAML, or its schema."""
    from medsam_lora.config import Config, dump_config

    if schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
    else:
        typer.echo(dump_config(options.read_config(config, settings)), nl=False)


@weights_app.command("list")
def weights_list() -> None:
    """Print every model that has weights of its own, and where they are."""
    from medsam_lora.models import MODELS
    from medsam_lora.models.weights import locate

    for name, spec in MODELS.items():
        if spec.file_name is not None:
            typer.echo(f"{name:<10}{spec.file_name:<26}{locate(name) or 'not here: medsam-lora weights fetch ' + name}")


@weights_app.command("path")
def weights_path(name: ModelName) -> None:
    """Print where the weights of a model are."""
    from medsam_lora.models.weights import locate

    found = locate(name)
    if found is None:
        raise WeightsError(f"the weights of {name} are not here", remedy=f"Run medsam-lora weights fetch {name}.")
    typer.echo(str(found))


@weights_app.command("fetch")
def weights_fetch(name: ModelName) -> None:
    """Download the weights of a model, unless here; check their hash."""
    from medsam_lora.models.weights import fetch

    typer.echo(str(fetch(name)))
