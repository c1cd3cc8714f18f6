"""The report on made-up runs. As a script: `test_report.py OUT [SETTINGS METHODS SEEDS ROUNDS]` writes a sample."""

from __future__ import annotations

import html.parser
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from experiments.report import comparison_table, print_table, read_study, write_report
from experiments.report.svg import every
from fedmm.errors import ConfigError, DataError, FedmmError, RunError
from fedmm.stats import holm, paired_interval

HOSTILE = '<script>alert(1)</script> & "x" | $y_2$'


def write_run(path, *, setting="default", label="FedAvg", seed=0, status="completed", accuracy=0.7, rounds=8, clients=6,
              modalities=("image", "audio"), classes=4, parquet=False, head=False):  # fmt: skip
    """Write a believable run: saturating curves, a selection, a partition, an event; deterministic in its arguments."""
    rng = np.random.default_rng([seed, len(label), len(setting), rounds])
    path.mkdir(parents=True)
    rows = []

    def log(round_, split, scope, client, modality, metric, value):
        rows.append(
            {"run": path.name, "round": round_, "split": split, "scope": scope, "client": client, "modality": modality,
             "metric": metric, "value": float(value)}
        )  # fmt: skip

    owned = [list(modalities) if k % 2 == 0 else [modalities[k // 2 % len(modalities)]] for k in range(clients)]
    strength = {m: accuracy * (0.95 - 0.4 * i / max(len(modalities) - 1, 1)) for i, m in enumerate(modalities)}
    for t in range(1, rounds + 1):
        grown = 1 - math.exp(-4 * t / rounds)
        log(t, "val", "global", None, "fused", "accuracy", accuracy * grown + rng.normal(0, 0.006))
        log(t, "val", "global", None, "fused", "loss", 2.3 - 1.6 * grown)
        log(
            t,
            "train",
            "global",
            None,
            "fused",
            "imbalance_ratio",
            1 + 1.5 * grown * (1.2 - accuracy) + rng.normal(0, 0.05),
        )
        for i, m in enumerate(modalities):
            log(t, "val", "global", None, m, "accuracy_masked", strength[m] * grown + rng.normal(0, 0.01))
            dead = label == "CMSFed" and i > 0 and seed == 1 and t > rounds // 2
            log(
                t,
                "train" if i else "val",
                "global",
                None,
                m,
                "feature_std",
                1e-4 if dead else 0.4 + 0.1 * grown + 0.02 * i,
            )
        for k in sorted(rng.choice(clients, min(5, clients), replace=False)):
            for m in owned[k] if "CMS" not in label else owned[k][-1:]:
                log(t, "train", "client", int(k), m, "selected", 1)
            log(t, "train", "client", int(k), "fused", "samples", 100)
        for block in [*(f"encoder.{m}" for m in modalities), "fusion", "head.joint"]:
            cost = 120_000 if "CMS" not in label else 80_000
            log(t, "train", "block", None, block, "bytes_up", 5 * cost)
            log(t, "train", "block", None, block, "bytes_down", 5 * cost)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if parquet:
        pd.DataFrame(rows).to_parquet(path / "metrics.parquet")
    (path / "config.yaml").write_text(yaml.safe_dump({"method": label, "seed": seed, "train": {"rounds": rounds}}))
    counts = rng.dirichlet(np.full(classes, 1.0), clients) * 120
    manifest = {
        "label": label, "setting": setting, "seed": seed, "data": {"name": "avdigits:imbalanced", "sha256": "ab" * 32},
        "versions": {"fedmm": "0.1.0", "torch": "2.9.0"}, "hardware": {"cpu": "2 cores", "memory_gb": 8},
        "started": "2025-11-21T06:00:00+00:00", "ended": "2025-11-21T06:03:00+00:00",
        "federation": {"class_counts": {"train": counts.astype(int).tolist()}, "owned": owned,
                       "classes": [f"digit {c}" for c in range(classes)]},
        "events": [{"round": 3, "kind": "refused", "client": 2, "reason": "update is not finite",
                    "decision": "asked again"}] if seed == 1 else [],
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    alone = {m: {"masked": v, "head": v + 0.01 if head else None, "probe": v + 0.03} for m, v in strength.items()}
    scores = {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "loss": 0.8, "per_modality": alone}
    ended = status in ("completed", "degraded")
    summary = {
        "status": status, "method": label.lower(), "label": label, "setting": setting, "seed": seed, "rounds": rounds,
        "val": scores, "test": scores if ended else None, "modality_gap": 0.2, "bytes_up": 2_000_000 * rounds,
        "bytes_down": 3_000_000 * rounds, "seconds": 12.5, "replies_expected": 5 * rounds,
        "replies_used": 5 * rounds - 1, "weights_sha256": f"{seed:064x}",
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_comparison(root, methods=("FedAvg", "FedCMI", "CMSFed"), settings=("default",), seeds=(0, 1, 2), *,
                     slug=None, references=True, **run):  # fmt: skip
    """Write a comparison whose second method is better, whose third is like the baseline."""
    rng = np.random.default_rng(7)
    for s, setting in enumerate(settings):
        luck = {seed: rng.normal(0, 0.012) for seed in seeds}
        for at, label in enumerate(methods):
            for seed in seeds:
                gain = [0, 0.04, 0.002, -0.03, 0.015][at % 5] * (1 - 0.1 * s)
                accuracy = 0.72 + 0.02 * s + gain + luck[seed] + rng.normal(0, 0.004)
                name = (slug or {}).get(label, label)
                write_run(root / setting / name / f"seed-{seed}", setting=setting, label=label, seed=seed,
                          accuracy=accuracy, **run)  # fmt: skip
    lines = {"majority": {"accuracy": 0.25}, "centralised": {"accuracy": [0.81] * len(seeds)}} if references else {}
    plan = {"methods": list(methods), "settings": list(settings), "seeds": list(seeds), "baseline": methods[0],
            "references": dict.fromkeys(settings, lines)}  # fmt: skip
    (root / "compare.json").write_text(json.dumps(plan))
    return root


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks nesting while it reads, and keeps tags, attributes, identifiers and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def self_contained(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (tag, value)
            assert value[1:] in identifiers
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    return page


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("runs") / "demo", seeds=(0, 1, 2, 3), head=True, parquet=True)


@pytest.fixture(scope="module")
def files(comparison, tmp_path_factory):
    return write_report([comparison], tmp_path_factory.mktemp("out") / "new")


def test_table_is_the_hand_computation(comparison, files):
    def tested(label, seed):
        path = comparison / "default" / label / f"seed-{seed}" / "summary.json"
        return json.loads(path.read_text())["test"]["accuracy"]

    values = {label: [tested(label, seed) for seed in range(4)] for label in ("FedAvg", "FedCMI", "CMSFed")}
    table = files.table.set_index("method")
    row = table.loc["FedCMI"]
    a, b = np.array(values["FedCMI"]), np.array(values["FedAvg"])
    t = 3.182446305284263  # 0.975 quantile of Student's t with 3 degrees of freedom
    assert row["accuracy"] == pytest.approx(a.mean())
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(t * a.std(ddof=1) / 2)
    assert row["diff"] == pytest.approx((a - b).mean())
    assert row["diff_low"] == pytest.approx((a - b).mean() - t * (a - b).std(ddof=1) / 2)
    raw = [paired_interval(values[m], values["FedAvg"]).p for m in ("FedCMI", "CMSFed")]
    assert table.loc[["FedCMI", "CMSFed"], "p_holm"].tolist() == pytest.approx(holm(raw))
    assert row["p_flip"] == pytest.approx(2 / 16)
    assert row["image_probe"] == pytest.approx((0.95 * a + 0.03).mean())
    assert row["audio_masked"] == pytest.approx((0.55 * a).mean())
    assert (row["weak_modality"], row["weak"]) == ("audio", pytest.approx(0.55 * (a - b).mean()))
    assert (row["mb_up"], row["mb_down"], row["seconds"], row["seeds"]) == (16, 24, 12.5, 4)
    assert table["verdict"].to_dict() == {
        "FedAvg": "baseline", "FedCMI": "above", "CMSFed": "none", "majority": "", "centralised": ""
    }  # fmt: skip
    assert table.index[table["best"]].tolist() == ["FedCMI"]


def test_page_is_whole_and_self_contained(files):
    page = self_contained(files.html.read_text())
    for word in ("FedAvg", "FedCMI", "CMSFed", "centralised", "audio (probe) %", "audio (masked) %", "audio (head) %",
                 "update is not finite", "avdigits:imbalanced", "abab", "torch", "collapsed"):  # fmt: skip
        assert word in page.text
    assert page.tags.count("svg") == page.tags.count("figure") == 13
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label"))
    assert files.html.stat().st_size < 1_000_000
    assert re.search(r"FedCMI is \d\.\d points above FedAvg \[\d\.\d, \d\.\d\]", page.text)
    assert "No significant difference between CMSFed and FedAvg" in page.text


def test_report_is_deterministic(comparison, files, tmp_path):
    again = write_report([comparison], tmp_path)
    assert again.html.read_text() == files.html.read_text()
    assert again.csv.read_text() == files.csv.read_text()


def test_other_formats_agree(files):
    csv = pd.read_csv(files.csv)
    assert csv["accuracy"].to_numpy() == pytest.approx(files.table["accuracy"].to_numpy())
    shown = f"{100 * csv['accuracy'][1]:.1f} ± "
    assert f"**{shown}" in files.markdown.read_text()
    assert rf"\textbf{{{shown}".replace("±", r"$\pm$") in files.latex.read_text()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(files.study, files.table, console)
    assert shown in (printed := console.export_text())
    assert "significant" in printed


def test_hostile_label_is_escaped_everywhere(tmp_path):
    root = write_comparison(tmp_path / "c", ("FedAvg", HOSTILE), slug={HOSTILE: "slug"}, settings=("<b>s</b>", "t"),
                            seeds=(0, 1), rounds=3)  # fmt: skip
    files = write_report([root], tmp_path / "out")
    assert HOSTILE in self_contained(files.html.read_text()).text
    assert "<script" not in files.markdown.read_text()
    row = next(line for line in files.markdown.read_text().splitlines() if "alert" in line)
    header = files.markdown.read_text().splitlines()[0]
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert r"\& " "x" not in files.latex.read_text()
    assert r"\$y\_2\$" in files.latex.read_text()


def test_failed_interrupted_unfinished_and_missing_runs_are_shown(tmp_path):
    root = write_comparison(tmp_path / "c", seeds=(0, 1, 2), rounds=3)
    group = root / "default" / "FedCMI"
    summary = json.loads((group / "seed-0" / "summary.json").read_text())
    (group / "seed-0" / "summary.json").write_text(
        json.dumps(summary | {"status": "failed", "error": "too few replies"})
    )
    (group / "seed-1" / "summary.json").unlink()
    lines = group / "seed-1" / "metrics.jsonl"
    lines.write_text(lines.read_text()[:-20])
    for path in sorted((group / "seed-2").iterdir()):
        path.unlink()
    (group / "seed-2").rmdir()
    (root / "default" / "CMSFed" / "seed-0" / "summary.json").write_text("{ not json")
    study = read_study([root])
    assert [run.status for run in study.of(study.settings[0], "FedCMI")] == ["failed", "unfinished", "not run"]
    cut = study.of(study.settings[0], "FedCMI")[1]
    assert len(cut.metrics) == lines.read_text().count("\n")
    assert cut.problems == ()
    files = write_report([root], tmp_path / "out")
    text = self_contained(files.html.read_text()).text
    for word in (
        "too few replies",
        "not run",
        "unfinished",
        "summary.json cannot be read",
        "4 of 9 runs did not reach",
    ):
        assert word in text
    assert files.table.set_index("method").loc["FedCMI", ["seeds", "unfinished"]].tolist() == [0, 3]


def test_parquet_and_jsonl_read_alike(tmp_path):
    one = read_study([write_run(tmp_path / "a" / "seed-0", parquet=True)]).runs[0].metrics
    two = read_study([write_run(tmp_path / "b" / "seed-0")]).runs[0].metrics
    pd.testing.assert_frame_equal(one, two)
    (tmp_path / "a" / "seed-0" / "metrics.parquet").write_bytes(b"PAR1 broken")
    broken = read_study([tmp_path / "a" / "seed-0"]).runs[0]
    assert "metrics.parquet" in broken.problems[0]
    pd.testing.assert_frame_equal(broken.metrics, two)


def test_one_seed_makes_no_claim(tmp_path):
    files = write_report([write_comparison(tmp_path / "c", seeds=(5,), rounds=3)], tmp_path)
    assert files.table["diff_low"].isna().all()
    assert not files.table["best"].any()
    text = self_contained(files.html.read_text()).text
    assert "one seed gives no interval" in text
    assert "One seed gives no interval and no test" in text


@pytest.mark.parametrize("modalities", [("vector",), ("a", "b", "c", "d", "e")])
def test_any_number_of_modalities(tmp_path, modalities):
    root = write_comparison(tmp_path / "c", ("FedAvg", "X"), seeds=(0, 1), rounds=3, modalities=modalities)
    files = write_report([root], tmp_path)
    assert [c for c in files.table if c.endswith("_probe")] == [f"{m}_probe" for m in modalities]
    self_contained(files.html.read_text())


def test_runs_behind_reference_lines_are_no_methods(tmp_path):
    root = write_comparison(tmp_path / "c", ("FedAvg",), seeds=(0,), rounds=2)
    write_run(root / "references" / "default" / "centralised" / "seed-0", label="centralised", rounds=2)
    write_run(root / "references" / "default" / "unimodal-audio" / "seed-0", label="unimodal-audio", status="failed")
    files = write_report([root], tmp_path / "out")
    assert files.study.methods == ("FedAvg",)
    text = Page(files.html.read_text()).text
    assert "reference unimodal-audio" in text
    assert "reference centralised" not in text


def test_crowd_of_clients_keeps_the_page_small(tmp_path):
    files = write_report([write_run(tmp_path / "seed-0", clients=3000, rounds=3, classes=30)], tmp_path / "out")
    assert "first 120 of 3000 clients" in self_contained(files.html.read_text()).text
    assert files.html.stat().st_size < 500_000


def test_single_and_several_run_directories(tmp_path):
    runs = [write_run(tmp_path / f"{label}-{seed}", label=label, seed=seed, accuracy=0.5 + seed / 50 + len(label) / 100)
            for label in ("fedavg", "fedcmi+") for seed in (0, 1)]  # fmt: skip
    one = write_report(runs[:1], tmp_path / "one")
    assert one.table[["method", "seeds"]].to_numpy().tolist() == [["fedavg", 1]]
    self_contained(one.html.read_text())
    four = write_report(runs, tmp_path / "four")
    assert four.study.baseline == "fedavg"
    assert four.table.set_index("method").loc["fedcmi+", "diff_pairs"] == 2
    twin = write_run(tmp_path / "twin", label="fedavg", seed=0)
    assert len(read_study([*runs, twin]).methods) == 3


def test_two_comparisons_with_the_same_setting_stay_apart(tmp_path):
    roots = [write_comparison(tmp_path / name, ("FedAvg", "X"), ("s",), (0, 1), rounds=2) for name in ("one", "two")]
    study = read_study(roots)
    assert study.settings == ("s", "two: s")
    assert comparison_table(study).groupby("setting").size().tolist() == [4, 4]


def test_comparison_without_any_run(tmp_path):
    plan = {"methods": ["FedAvg"], "settings": ["default"], "seeds": [0], "baseline": "FedAvg"}
    (tmp_path / "compare.json").write_text(json.dumps(plan))
    files = write_report([tmp_path], tmp_path / "out")
    assert "not run" in self_contained(files.html.read_text()).text
    assert files.table["accuracy"].isna().all()
    assert files.latex.read_text().count(r"\end{tabular}") == 1


def test_errors_name_place_and_remedy(tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        write_report([], tmp_path / "out")
    with pytest.raises(ConfigError, match="no such directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(FedmmError, match="neither a run nor a comparison"):
        write_report([tmp_path], tmp_path / "out")
    (tmp_path / "compare.json").write_text('{"methods": 3')
    with pytest.raises(DataError, match=r"compare\.json"):
        write_report([tmp_path], tmp_path / "out")
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report([tmp_path / "run"], tmp_path / "file" / "out")


def test_thinning_keeps_the_ends():
    assert every(range(1, 1001))[0] == 1
    assert every(range(1, 1001))[-1] == 1000
    assert len(every(range(1, 1001))) == 120
    assert every([3, 4]) == [3, 4]


if __name__ == "__main__":
    target, sizes = Path(sys.argv[1]), [int(v) for v in sys.argv[2:]] or [1, 3, 3, 40]
    names = ["avdigits:imbalanced", "avdigits:avmnist", "emoji9 natural", "emoji9 Dirichlet", "cgmnist IID"]
    labels = [*(names[i % 5] + ("" if i < 5 else ", half multimodal") for i in range(sizes[0]))]
    labels = ["default"] if sizes[0] == 1 else labels
    methods_ = ["FedAvg", "FedCMI", "CMSFed", "FedProx", "FedAvg + heads"][: sizes[1]]
    write_comparison(target, methods_, labels, range(sizes[2]), rounds=sizes[3], clients=20, classes=10)
    print(write_report([target], target).html)
