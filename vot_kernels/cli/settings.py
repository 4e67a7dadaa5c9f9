"""Options of a training command that are the settings of its stage."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vot_kernels.cli.options import PATH
from vot_kernels.train.config import meanings, read_settings

_CONFIG = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings, as `vot train recipe` prints; options win over it.", **PATH),
]


def with_settings(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and an option per field of `settings`, in the place of its parameter `settings`."""
    hints, names = get_type_hints(settings), [field.name for field in fields(settings)]

    def option(name: str) -> inspect.Parameter:
        annotated: Any = Annotated  # mypy knows it in annotations alone
        hint = annotated[hints[name], typer.Option(help=meanings(settings)[name])]
        return _keyword(name, hint, getattr(settings, name))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, config: Path | None, **given: Any) -> None:
            values = {name: given.pop(name) for name in names}
            chosen = {name: value for name, value in values.items() if _is_given(context, name)}
            command(settings=read_settings(settings, config, chosen), **given)

        own = inspect.signature(command).parameters.values()
        parameters = [
            parameter
            for p in own
            for parameter in (
                [_keyword("config", _CONFIG, None), *map(option, names)]
                if p.name == "settings"
                else [_keyword(p.name, p.annotation, p.default)]
            )
        ]
        parameters.insert(0, _keyword("context", typer.Context, inspect.Parameter.empty))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, even if as its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
