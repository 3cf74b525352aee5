"""The `halfbyte` command: serve, plan, quantize, version. Importing it imports no torch.

The options are made from the settings in server/config.py, so that a flag, its environment variable and its YAML key
can't drift apart; every value is checked there, in one voice. An error of ours is `error: <sentence>` on stderr and the
exit code of its class, never a traceback.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from server.app import product_version, run
from server.config import (
    ALL_KEYS,
    ENVIRONMENT_PREFIX,
    KV_CACHE_KEYS,
    SECRET_KEYS,
    SINGLE_MODEL_KEYS,
    KvCacheConfig,
    ModelConfig,
    ServerConfig,
    ServerSettings,
    load_config,
)
from server.errors import ConfigError, DoesNotFitError, LoadError, ServerError

if TYPE_CHECKING:
    from quant.convert import Result

INTERRUPTED: Final = 130

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
        **{name: KvCacheConfig.model_fields[key].description for name, key in KV_CACHE_KEYS.items()},
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
    parameters = [_parameter(key) for key in keys if key not in SECRET_KEYS]
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

    from server.memory.plan import make_plans
    from server.memory.table import plan_json, print_plan

    with _explained():
        plans = make_plans(config.specs())
    if as_json:
        typer.echo(plan_json(plans))
    else:
        console = Console()
        for plan in plans:
            print_plan(plan, console)
    if not all(plan.fits for plan in plans):
        raise typer.Exit(DoesNotFitError.exit_code)


@contextmanager
def _explained() -> Iterator[None]:
    """Gives the errors of `quant` the classes, and so the exit codes, of `server`."""
    from quant.errors import OutputError, QuantConfigError, QuantError

    try:
        yield
    except (QuantConfigError, OutputError) as error:
        raise ConfigError(str(error)) from error
    except QuantError as error:
        raise LoadError(str(error)) from error


app.command("serve")(_with_settings(_serve, ALL_KEYS))
app.command("plan")(_with_settings(_plan, ("config", *SINGLE_MODEL_KEYS)))


@app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local, unquantized transformers checkpoint.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write; it must not exist, or be empty.")],
    quantization: Annotated[
        str,
        typer.Option(metavar="VALUE", help="nf4, fp4, nf4-dq, fp4-dq, int8, or BitsAndBytesConfig's fields as JSON."),
    ],
    dtype: Annotated[
        str, typer.Option(metavar="VALUE", help="dtype of what is not quantized; auto takes the checkpoint's own.")
    ] = "auto",
    max_shard_size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Largest weight file: bytes, or a number with KB, MB or GB (10^9 bytes)."),
    ] = "5GB",
) -> None:
    """Write a quantized copy of a checkpoint, one tensor at a time, and report what it cost each layer."""
    # A name of its own, because a directory may be called what no model may.
    settings = load_config({"model": model, "name": "model", "quantization": quantization, "dtype": dtype}, {}).models[
        0
    ]
    shard_bytes = _size(max_shard_size)
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from quant.convert import quantize_checkpoint

    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=None)

    def progress(done: int, total: int, name: str) -> None:
        bar.start()  # not before there is something to show: what is refused is one line
        bar.update(task, completed=done, total=total, description=name)

    try:
        with _explained():
            result = quantize_checkpoint(
                settings.path,
                Path(out).expanduser(),
                settings.quantization or "none",
                dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
                max_shard_bytes=shard_bytes,
                progress=progress,
            )
    finally:
        if bar.live.is_started:
            bar.stop()
    _print_report(result)


def _print_report(result: Result) -> None:
    """The layers as a table (error: relative to the weights), then all of them and the files in a line each."""
    from rich.console import Console
    from rich.table import Table

    from quant.report import OUTLIER_RMS, summarize

    table = Table(box=None)
    table.add_column("layer", overflow="fold")
    for title in ("format", "weights", "bits", "error", f"> {OUTLIER_RMS:g} rms"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in result.layers:
        error = "" if layer.relative_error is None else f"{layer.relative_error:.4f}"
        figures = (f"{layer.weights:,}", f"{layer.bits_per_weight:.3f}", error, f"{layer.outlier_share:.4%}")
        table.add_row(layer.name, layer.format, *figures)
    total = summarize(result.layers)
    console = Console()
    if result.layers:
        console.print(table)
        console.print(
            f"{total['layers']} layers, {total['weights']:,} weights at {total['bits_per_weight']:.3f} bits: "
            f"{total['bytes']:,} bytes; not quantized: {result.unquantized_bytes:,} bytes"
        )
    console.print(
        f"{result.directory}: {sum(file.bytes for file in result.files):,} bytes in {len(result.files)} files"
    )


def _size(text: str) -> int:
    """ "500MB" in bytes."""
    found = re.fullmatch(r"([0-9]{1,15})\s*(KB|MB|GB|B|)", text.strip(), re.IGNORECASE)
    size = int(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}.get(found[2].upper(), 1) if found else 0
    if size < 1:
        raise ConfigError(
            f"--max-shard-size is {text!r}; accepted is a positive number of bytes, or one with KB, MB or GB: 5GB"
        )
    return size


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
