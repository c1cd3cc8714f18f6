"""Reading run and comparison directories into one `Study`; nothing that was planned or found is dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from fedmm.errors import ConfigError, DataError

COLUMNS = ("run", "round", "split", "scope", "client", "modality", "metric", "value")
MARKS = ("summary.json", "manifest.json", "metrics.jsonl", "metrics.parquet")
FINISHED = ("completed", "degraded")
_YAML: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built


@dataclass(frozen=True)
class Run:
    """One run as it lies on disk.

    Attributes:
        path: Its directory.
        setting: The setting's label; "default" where there is only one.
        label: The method's label.
        seed: The run's seed.
        status: completed, degraded, failed, interrupted; "unfinished" without a summary, "not run" without a directory.
        summary: `summary.json`, empty if absent.
        manifest: `manifest.json`, empty if absent.
        metrics: Tidy metrics with the columns `COLUMNS`; `client` is -1 where none applies.
        problems: What could not be read, in words.
    """

    path: Path
    setting: str
    label: str
    seed: int
    status: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=lambda: _tidy([]))
    problems: tuple[str, ...] = ()

    @cached_property
    def curves(self) -> Mapping[tuple[str, str, str], pd.Series[float]]:
        """Global metrics over rounds, by split, modality and metric; sorted out once, as a page asks for hundreds."""
        keys = ["split", "modality", "metric"]
        rows = self.metrics[self.metrics["scope"] == "global"]
        last = rows.groupby([*keys, "round"], as_index=False)["value"].last()
        rounds, values = pd.Index(last["round"]), last["value"].to_numpy()
        places = cast(Mapping[tuple[str, str, str], npt.NDArray[np.int64]], last.groupby(keys).indices)
        return {key: pd.Series(values[at], rounds[at], name="value") for key, at in places.items()}

    @property
    def usable(self) -> bool:
        """Whether the run reached its end and has a test accuracy."""
        return self.status in FINISHED and number(self.summary, "test", "accuracy") is not None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modality names in slot order, from the summary or else from the metrics."""
        tested = self.summary.get("test")
        if isinstance(tested, Mapping) and isinstance(tested.get("per_modality"), Mapping):
            return tuple(tested["per_modality"])
        rows = self.metrics[self.metrics["scope"] == "global"]
        return tuple(m for m in rows["modality"].unique() if m not in ("", "fused"))


@dataclass(frozen=True)
class Study:
    """Runs of several methods, settings and seeds, in the order of the plan.

    Attributes:
        title: Short name of what was compared.
        methods: Method labels.
        settings: Setting labels.
        seeds: Seeds.
        baseline: The method that differences are taken against, or None.
        runs: Every run planned or found.
        references: Setting -> reference name -> accuracies, one a seed or a single number.
        sources: The directories that were read.
        lost: Runs behind a reference line that did not reach their end.
    """

    title: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str | None
    runs: tuple[Run, ...]
    references: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()
    lost: tuple[Run, ...] = ()

    def of(self, setting: str, label: str | None = None) -> tuple[Run, ...]:
        """The runs of a setting, or of one method in it."""
        return tuple(r for r in self.runs if r.setting == setting and label in (None, r.label))

    def modalities(self, setting: str) -> tuple[str, ...]:
        """Modalities of a setting, in slot order."""
        return _unique(m for run in self.of(setting) for m in run.modalities)


def number(tree: object, *keys: str) -> float | None:
    """The finite number at `keys` in nested mappings, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, int | float) and not isinstance(tree, bool) and np.isfinite(tree):
        return float(tree)
    return None


def data_name(manifest: Mapping[str, Any]) -> str | None:
    """The data set's name in a manifest, or None."""
    data = manifest.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    return str(name) if name else None


def read_study(directories: Sequence[Path]) -> Study:
    """Read comparison and run directories into one study.

    Args:
        directories: Directories that `fedmm compare` or `fedmm run` wrote, in any mixture.

    Raises:
        ConfigError: No directory was given, or one is neither a run nor a comparison.
        DataError: A comparison's plan cannot be read.
    """
    if not directories:
        raise ConfigError("no directory was given", remedy="name at least one run or comparison directory")
    parts = [_read_directory(Path(d)) for d in directories]
    if len(parts) == 1:
        return parts[0]
    taken: set[str] = set()
    renamed = []
    # Runs given one by one form one study; comparisons that share a setting's name stay apart.
    for part in parts:
        comparison = (part.sources[0] / "compare.json").exists()
        names = {s: f"{part.title}: {s}" if comparison and s in taken else s for s in part.settings}
        taken.update(part.settings if comparison else ())
        renamed.append(_rename(part, names))
    renamed = _apart(renamed)
    methods = _unique(m for p in renamed for m in p.methods)
    return Study(
        title=" + ".join(_unique(p.title for p in parts)) if len(parts) <= 4 else f"{len(parts)} directories",
        methods=methods,
        settings=_unique(s for p in renamed for s in p.settings),
        seeds=tuple(sorted({s for p in renamed for s in p.seeds})),
        baseline=next((p.baseline for p in renamed if p.baseline), None) or _guess_baseline(methods),
        runs=tuple(r for p in renamed for r in p.runs),
        references={s: r for p in renamed for s, r in p.references.items()},
        sources=tuple(s for p in parts for s in p.sources),
        lost=tuple(r for p in renamed for r in p.lost),
    )


def _apart(parts: list[Study]) -> list[Study]:
    """Give a single run whose setting, method and seed came before a label of its own, with its directory in it."""
    seen: set[tuple[str, str, int]] = set()
    result = []
    for part in parts:
        run = part.runs[0]
        if len(part.runs) == 1 and (run.setting, run.label, run.seed) in seen:
            run = replace(run, label=f"{run.label} ({run.path})")
            part = replace(part, methods=(run.label,), runs=(run,))
        seen.update((run.setting, run.label, run.seed) for run in part.runs)
        result.append(part)
    return result


def _read_directory(directory: Path) -> Study:
    if not directory.is_dir():
        raise ConfigError("no such directory", where=str(directory))
    if (directory / "compare.json").exists():
        return _read_comparison(directory)
    if not any((directory / mark).exists() for mark in MARKS):
        raise ConfigError(
            "neither a run nor a comparison directory",
            where=str(directory),
            remedy="name a directory that `fedmm run` or `fedmm compare` wrote",
        )
    run = _read_run(directory)
    name = directory.resolve().name
    return Study(name, (run.label,), (run.setting,), (run.seed,), None, (run,), sources=(directory,))


def _read_comparison(root: Path) -> Study:
    try:
        plan = json.loads((root / "compare.json").read_text(encoding="utf-8"))
        methods, settings = _texts(plan["methods"]), _texts(plan.get("settings") or ["default"])
        seeds = tuple(int(s) for s in plan["seeds"])
        references = {
            str(setting): {str(name): _accuracies(value) for name, value in lines.items()}
            for setting, lines in (plan.get("references") or {}).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the comparison's plan cannot be read: {error!r}",
            where=str(root / "compare.json"),
            remedy="run the comparison again; finished runs are kept",
        ) from error
    found: dict[tuple[str, str, int], Run] = {}
    lost: list[Run] = []
    for path in sorted(root.rglob("seed-*")):
        if path.is_dir() and any((path / mark).exists() for mark in (*MARKS, "config.yaml")):
            inside = path.relative_to(root).parts
            if inside[0] == "references" and "references" not in settings:
                run = _read_run(path, setting=inside[1], label="/".join(inside[2:-1]))
                lost += [] if run.usable else [replace(run, label=f"reference {run.label}")]
                continue
            setting = inside[0] if len(inside) > 2 else settings[0]
            run = _read_run(path, setting=setting, label="/".join(inside[1:-1]) or inside[0])
            found[run.setting, run.label, run.seed] = run
    for setting in settings:
        for label in methods:
            for seed in seeds:
                path = root / setting / label / f"seed-{seed}"
                found.setdefault((setting, label, seed), Run(path, setting, label, seed, "not run"))
    methods = _unique([*methods, *(label for _, label, _ in found)])
    settings = _unique([*settings, *(setting for setting, _, _ in found)])
    baseline = plan.get("baseline")
    study = Study(
        title=root.resolve().name,
        methods=methods,
        settings=settings,
        seeds=_unique([*seeds, *sorted(seed for _, _, seed in found)]),
        baseline=str(baseline) if baseline in methods else _guess_baseline(methods),
        runs=tuple(
            sorted(found.values(), key=lambda r: (settings.index(r.setting), methods.index(r.label), r.seed)),
        ),
        references=references,
        sources=(root,),
        lost=tuple(lost),
    )
    names = {name for run in study.runs if (name := data_name(run.manifest))}
    return _rename(study, {"default": names.pop()}) if settings == ("default",) and len(names) == 1 else study


def _read_run(path: Path, *, setting: str | None = None, label: str | None = None) -> Run:
    problems: list[str] = []
    summary, manifest = _read_json(path / "summary.json", problems), _read_json(path / "manifest.json", problems)
    config = _read_config(path / "config.yaml", problems)
    texts = {
        key: next((str(source[key]) for source in (summary, manifest) if source.get(key)), None)
        for key in ("setting", "label")
    }
    method = summary.get("method") or config.get("method") or path.resolve().name
    seed = next((s for s in (number(t, "seed") for t in (summary, manifest, config)) if s is not None), None)
    if seed is None:
        tail = path.name.removeprefix("seed-")
        seed = float(tail) if tail.isdigit() else 0
    return Run(
        path=path,
        setting=texts["setting"] or setting or data_name(manifest) or "default",
        label=texts["label"] or label or str(method),
        seed=int(seed),
        status=str(summary.get("status") or "unfinished"),
        summary=summary,
        manifest=manifest,
        metrics=_read_metrics(path, problems),
        problems=tuple(problems),
    )


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a mapping")
        return {}
    return value


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _YAML)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _read_metrics(path: Path, problems: list[str]) -> pd.DataFrame:
    table, lines = path / "metrics.parquet", path / "metrics.jsonl"
    if table.exists():
        try:
            return _tidy(pd.read_parquet(table))
        except (OSError, ValueError) as error:
            problems.append(f"metrics.parquet cannot be read: {error}")
    if not lines.exists():
        return _tidy([])
    rows: list[dict[str, Any]] = []
    texts = lines.read_text(encoding="utf-8", errors="replace").splitlines()
    for at, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
        except ValueError:
            # The last line of a killed run may be cut; anything else is damage worth a word.
            if at < len(texts):
                problems.append(f"metrics.jsonl line {at} is not JSON")
            continue
        if isinstance(row, dict):
            rows.append(row)
    return _tidy(rows)


def _tidy(rows: list[dict[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for column in ("split", "scope", "modality", "metric"):
        text = frame[column].astype(object)
        frame[column] = text.where(text.notna(), "").astype(str)
    frame["client"] = pd.to_numeric(frame["client"], errors="coerce").fillna(-1).astype(int)
    frame["round"] = pd.to_numeric(frame["round"], errors="coerce")
    frame["value"] = pd.to_numeric(frame["value"], errors="coerce").astype(float)
    frame = frame[frame["round"].notna()]
    return frame.assign(round=frame["round"].astype(int))


def _accuracies(value: object) -> tuple[float, ...]:
    inner = value.get("accuracy") if isinstance(value, Mapping) else value
    array: npt.NDArray[np.float64] = np.atleast_1d(np.asarray(inner, dtype=np.float64))
    return tuple(float(v) for v in array[np.isfinite(array)])


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | dict) or not value:
        raise TypeError(f"a list of names was expected, not {value!r}")
    return _unique(str(v) for v in value)


def _unique(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _guess_baseline(methods: Sequence[str]) -> str | None:
    return next((m for m in methods if m.lower() == "fedavg"), None)


def _rename(study: Study, names: Mapping[str, str]) -> Study:
    return replace(
        study,
        settings=tuple(names[s] for s in study.settings),
        runs=tuple(replace(r, setting=names[r.setting]) for r in study.runs),
        lost=tuple(replace(r, setting=names.get(r.setting, r.setting)) for r in study.lost),
        references={names.get(s, s): lines for s, lines in study.references.items()},
    )
