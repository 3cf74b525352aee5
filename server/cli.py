"""The `halfbyte` command: serve, plan, version. Importing it imports no torch.

The options are made from the settings in server/config.py, so that a flag, its environment variable and its YAML key
can't drift apart; every value is checked there, in one voice. An error of ours is `error: <sentence>` on stderr and the
exit code of its class, never a traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from server.app import product_version, run
from server.config import (
    ALL_KEYS,
    ENVIRONMENT_PREFIX,
    SINGLE_MODEL_KEYS,
    KvCacheConfig,
    ModelConfig,
    ServerConfig,
    ServerSettings,
    load_config,
)
from server.errors import ConfigError, LoadError, ServerError

INTERRUPTED: Final = 130
NOT_ON_COMMAND_LINES: Final = frozenset({"api_keys"})
"""Other users of the machine can read a process's arguments: keys come from the environment or the file."""

app = typer.Typer(
    name="halfbyte",
    help="Serves language models in 4 and 8 bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def _help(key: str) -> str:
    special = {
        "config": "A models.yaml: several models, each with its own settings.",
        "model": "A local transformers checkpoint; without it, the demo model.",
        "kv_cache_tokens": KvCacheConfig.model_fields["tokens"].description,
    }
    if key in special:
        return special[key] or ""
    field = ModelConfig.model_fields.get(key) or ServerSettings.model_fields[key]
    default = "" if field.default is None or field.is_required() else f" [default: {field.default}]"
    return f"{field.description}{default}"


def _parameter(key: str) -> inspect.Parameter:
    """One setting as a typer parameter; values stay text, config.py reads them."""
    variable = ENVIRONMENT_PREFIX + key.upper()
    if key == "model":
        info: Any = typer.Argument(metavar="[MODEL]", help=_help(key), show_default=False)
    else:
        flag = "--allowed-hosts" if key == "allowed_hosts" else "--" + key.replace("_", "-")
        info = typer.Option(flag, help=f"{_help(key)} [{variable}]", show_default=False, metavar="VALUE")
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info])


def _with_settings(command: Callable[[ServerConfig], None], keys: tuple[str, ...]) -> Callable[..., None]:
    """A command whose parameters are the settings in `keys`, and which gets the finished config."""

    def wrapper(**flags: Any) -> None:
        extra = {name: flags.pop(name) for name in list(flags) if name not in ALL_KEYS}
        command(load_config(flags, os.environ), **extra)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [_parameter(key) for key in keys if key not in NOT_ON_COMMAND_LINES]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *own]}
    wrapper.__doc__ = command.__doc__
    return wrapper


def _serve(config: ServerConfig) -> None:
    """Serve one model, or those of a models.yaml; without either, the demo model."""
    run(config)


def _plan(
    config: ServerConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Say what the models will need, in bytes by component, before anything is loaded; exit 3 when it does not fit."""
    # Imported here: planning needs torch's dtypes, and `serve` must not load torch into the HTTP process.
    from rich.console import Console

    from quant.errors import QuantConfigError, QuantError
    from server.memory.plan import make_plan
    from server.memory.table import plan_json, print_plan

    try:
        plans = [make_plan(spec) for spec in config.specs()]
    except QuantConfigError as error:
        raise ConfigError(str(error)) from error
    except QuantError as error:
        raise LoadError(str(error)) from error
    if as_json:
        typer.echo(plan_json(plans))
        return
    console = Console()
    for plan in plans:
        print_plan(plan, console)


app.command("serve")(_with_settings(_serve, ALL_KEYS))
app.command("plan")(_with_settings(_plan, ("config", *SINGLE_MODEL_KEYS)))


@app.command("version")
def print_version() -> None:
    """Print the version."""
    typer.echo(f"halfbyte {product_version()}")


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs a command and ends the process with its exit code."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(arguments, standalone_mode=False)
    except ServerError as error:
        return _complain(error, error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _complain(message(), getattr(error, "exit_code", 2))  # typer's own: unknown options, missing values
    return code if isinstance(code, int) else 0


def _complain(error: object, code: int) -> int:
    sentence = " ".join(str(error).split())
    print(f"error: {sentence}", file=sys.stderr)
    return code
