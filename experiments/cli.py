"""The command line `fedmm`. Torch, Flower and Ray are imported inside the commands that need them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import interrupts
from experiments.guard import CODES, DEGRADED, Guarded, quiet_stdout
from fedmm.config.explain import explain as explain_config
from fedmm.config.load import Resolved, load_compare, load_config
from fedmm.config.schema import Config, DataConfig
from fedmm.errors import ConfigError, nearest

_CODES = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in CODES.items()) + "."

app = typer.Typer(
    cls=Guarded,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated multimodal learning: run, compare, report.",
    epilog=_CODES,
)
data_app = typer.Typer(no_args_is_help=True, help="Build, describe and preview data sets.")
app.add_typer(data_app, name="data")

ConfigArgument = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="YAML file; without it, the defaults.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.rounds=5 data=cgmnist.", show_default=False),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Directory to write to.", show_default=False)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Data set, or DATASET:PRESET.")]

TABLES = {
    "methods": ("fedmm.config.presets", "PRESETS"),
    "datasets": ("fedmm.data", "DATASETS"),
    "objectives": ("fedmm.objectives", "OBJECTIVES"),
    "strategies": ("server.strategies", "STRATEGIES"),
    "selectors": ("server.selection", "SELECTORS"),
    "partitions": ("fedmm.data.partition", "PARTITIONS"),
    "engines": ("fedmm.engines", "ENGINES"),
    "references": ("experiments.references", "REFERENCES"),
}
"""What `fedmm list` shows: kind -> module and name of its table."""

CREW_MODULES = ("fedmm.engines.ray_worker", "clients.crew")
"""What Ray's workers import before they are asked for anything."""


def main() -> None:
    """Entry point of the console script; `module:name` finds the user's own files in the working directory."""
    # Last, so that nothing there can hide a package, and after our own root, which an editable install leaves off the
    # path. Ray's and Flower's workers get this path too.
    sys.path += [str(Path(__file__).resolve().parents[1]), ""]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character of a table
    with interrupts.program():
        app()


def _version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("fedmm")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    typer.echo(f"fedmm {version}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    engine: Annotated[str | None, typer.Option(help="inproc, ray or flower; as engine.name=...")] = None,
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, nothing else.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 5 if fewer clients contributed than asked.")] = False,
) -> None:
    """Train and evaluate one configuration."""
    began = perf_counter()
    path, changes = _arguments(config, overrides)
    resolved = load_config(path, [*changes, *([f"engine.name={engine}"] if engine else [])]).config
    target = out or Path("runs") / _run_name(resolved)
    with quiet_stdout() if as_json else contextlib.nullcontext():
        if resolved.engine.name == "ray" and not (target / "summary.json").exists():
            from fedmm.engines import ray_instance

            # Its processes start while this one imports.
            ray_instance.begin(resolved.engine.workers, CREW_MODULES)
        with _importing():
            from experiments import runner

        runner.check(resolved)
        with interrupts.tidy():
            summary = runner.run(resolved, target, resume=resume, console=_console(stderr=True), began=began)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _console().print(_summary_table(summary))
        typer.echo(f"Written to {target}")
    if summary.get("status") == "degraded":
        used, expected = summary.get("replies_used"), summary.get("replies_expected")
        typer.secho(f"fedmm: degraded: {used} of {expected} replies were used", err=True, fg=typer.colors.YELLOW)
        if strict:
            raise typer.Exit(DEGRADED)


@app.command()
def plan(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")] = False,
) -> None:
    """Tell what a run will send, hold and take: bytes counted, memory and time measured in a short rehearsal."""
    began = perf_counter()
    resolved = _load(config, overrides).config
    with quiet_stdout():
        with _importing():
            from experiments.planning import forecast, tables

        with interrupts.tidy():
            found = forecast(resolved, began)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=2))
        return
    console = _console()
    for table in tables(found):
        console.print(table, "")


@app.command()
def compare(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
) -> None:
    """Run methods x settings x seeds, skipping what is done, and write the report."""
    path, changes = _arguments(config, overrides)
    comparison = load_compare(path, changes)
    target = out or Path("runs") / (Path(path).stem if path else "compare")
    with _importing():
        from experiments import sweep

    with interrupts.tidy():
        sweep.compare(comparison, target, jobs=jobs, console=_console(stderr=True))
    _report([target], target)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs or comparisons.")],
    out: OutOption = None,
) -> None:
    """Write report.html and the tables for finished runs."""
    _report(directories, out or directories[0])


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar=f"[{'|'.join(TABLES)}]", show_default=False)] = None,
) -> None:
    """List what can be named in a configuration."""
    if kind is not None and kind not in TABLES:
        raise ConfigError(f'there is no list of "{kind}"', where="list", remedy=nearest(kind, TABLES))
    console = _console()
    for each in [kind] if kind else TABLES:
        module, name = TABLES[each]
        entries: Mapping[str, object] = getattr(importlib.import_module(module), name)
        table = Table("name", "description", title=each, title_justify="left", box=None, header_style="bold")
        for key, entry in entries.items():
            table.add_row(key, _description(entry))
        console.print(table, "")


@app.command("card")
def card_(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Method or preset.", show_default=False)] = None,
) -> None:
    """Show a method's fidelity card: its equations, what was left open, when it fails; without NAME, list the cards."""
    from rich.markdown import Markdown

    from experiments.cards import card, line, names

    console = _console()
    if name is None:
        table = Table("name", "description", title="cards", title_justify="left", box=None, header_style="bold")
        for each in names():
            table.add_row(each, line(each))
        console.print(table)
    elif console.is_terminal:
        console.print(Markdown(card(name)))
    else:  # what reads from a pipe wants the text
        typer.echo(card(name), nl=False)


@app.command()
def explain(config: ConfigArgument = None, overrides: OverridesArgument = None) -> None:
    """Show each value of a configuration and where it came from."""
    table = Table("key", "value", "from", box=None, header_style="bold")
    for row in explain_config(_load(config, overrides)):
        table.add_row(row.key, row.value, row.origin, style="dim" if row.origin == "default" else None)
    _console().print(table)


@app.command()
def doctor() -> None:
    """Check this machine: versions, threads, Ray, embedded data, space."""
    from experiments.doctor import examine

    table = Table("check", "result", "", box=None, header_style="bold")
    findings = examine()
    for finding in findings:
        table.add_row(finding.check, finding.result, "ok" if finding.good else Text(finding.remedy, style="red"))
    _console().print(table)
    if not all(finding.good for finding in findings):
        raise typer.Exit(4)


@data_app.command("build")
def data_build(
    name: NameArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")] = Path("build/data"),
    packages: Annotated[Path | None, typer.Option(help="Directory of downloaded source packages.")] = None,
) -> None:
    """Rebuild an embedded data set from its public sources."""
    from fedmm.data.build import build

    for path in build(name, out, packages):
        typer.echo(path)


@data_app.command("card")
def data_card(name: NameArgument) -> None:
    """Print a data set's card: source, licence, construction, known limits."""
    from fedmm.data.cards import describe

    typer.echo(describe(_data(name, None).name))


@data_app.command("preview")
def data_preview(
    name: NameArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option("--out", help="Picture of some samples (.png).")] = None,
) -> None:
    """Load a data set and show its modalities, splits and classes; with --out, a picture of some samples."""
    from experiments.preview import tables
    from fedmm.data import load_dataset
    from fedmm.data.cards import preview

    dataset = load_dataset(_data(name, overrides))
    console = _console()
    for table in tables(dataset):
        console.print(table, "")
    if out is not None:
        typer.echo(f"Picture: {preview(dataset, out)}")


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without the collector of cycles: a fifth of the time of imports, and it finds nothing, then or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _console(*, stderr: bool = False) -> Console:
    """Standard output or error; a pipe or a file gets every row on one line, however long."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else 10_000)


def _report(directories: list[Path], out: Path) -> None:
    from experiments import report as reports

    console = _console()
    written = reports.write_report(directories, out)
    reports.print_table(written.study, written.table, console)
    typer.echo(f"Report: {written.html}")


def _arguments(config: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Take the first argument for an override when it has the form of one, since CONFIG may be left out."""
    rest = overrides or []
    if config is not None and "=" in config and not Path(config).exists():
        return None, [config, *rest]
    return config, rest


def _load(config: str | None, overrides: list[str] | None) -> Resolved:
    return load_config(*_arguments(config, overrides))


def _data(name: str, overrides: list[str] | None) -> DataConfig:
    return load_config(None, [f"data={name}", *(overrides or [])]).config.data


def _run_name(config: Config) -> str:
    data = f"{config.data.name}-{config.data.preset}" if config.data.preset else config.data.name
    name = f"{config.method or config.objective.name}-{data}-seed{config.seed}"
    return name.replace("/", "_").replace(":", "_")


def _description(entry: object) -> str:
    text = entry if isinstance(entry, str) else str(getattr(entry, "description", None) or entry.__doc__ or "")
    presets = ", ".join(getattr(entry, "presets", ()))
    return text.strip().partition("\n")[0] + (f"; presets: {presets}" if presets else "")


def _summary_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy, macro F1 and loss of the validation and the test split."""
    measures = ("accuracy", "macro_f1", "loss")
    table = Table("split", *measures, box=None, header_style="bold")
    for split in ("val", "test"):
        values = summary.get(split) or {}
        cells = [values.get(measure) for measure in measures]
        table.add_row(split, *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


if __name__ == "__main__":
    main()
