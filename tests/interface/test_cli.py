"""The command line's promises: exit codes, messages that name place and remedy, no traceback, a pure stdout."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import TABLES, app
from fedmm.config.presets import PRESETS
from fedmm.config.schema import Config

ROOT = Path(__file__).parents[2]
TINY = [
    "data=synthetic",
    "data.samples=200",
    "scenario.clients=4",
    "train.clients_per_round=4",
    "train.rounds=2",
    "train.local_epochs=1",
    "evaluate.probe=false",
    "model.features=8",
]


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    return result


def command(*arguments):
    return [sys.executable, "-m", "experiments.cli", *map(str, arguments)]


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def spawn(*arguments, **options):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = invoke("run", *TINY, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, result


# -- help and lists ---------------------------------------------------------------------------------------------------

COMMANDS = [
    *["run", "plan", "compare", "report", "list", "explain", "card", "doctor"],
    *["data", "data build", "data card", "data preview"],
]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name):
    result = invoke(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert not result.stderr


def test_help_tells_what_arguments_are():
    text = " ".join(invoke("run", "--help").stdout.split())
    assert "YAML file; without it, the defaults." in text
    assert "Overrides, e.g. train.rounds=5" in text


def test_help_lists_every_command_and_the_exit_codes():
    text = " ".join(invoke("--help").stdout.split())
    assert all(name.split()[0] in text for name in COMMANDS)
    assert "6 interrupted" in text


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("fedmm ")


def test_light_commands_do_not_load_heavy_libraries():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom experiments.cli import app\n"
        "for line in ('--help', 'list methods', 'explain method=fedcmi', 'run trian=3', 'compare methods=[a]'):\n"
        "    CliRunner().invoke(app, line.split())\n"
        "print(sorted({'torch', 'flwr', 'ray', 'pandas', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_run_loads_no_compiler(tmp_path):
    """PyTorch's compiler, and what it brings along, takes a second of a run's start."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom experiments.cli import app\n"
        "result = CliRunner().invoke(app, ['run', *sys.argv[1:]])\n"
        "print(result.exit_code, sorted({'sympy', 'torch._inductor', 'torch._dynamo'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip().endswith("0 []"), done.stdout + done.stderr


@pytest.mark.parametrize("kind", TABLES)
def test_list_of_one_kind_describes_each_entry(kind):
    result = invoke("list", kind)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert lines[0].strip() == kind
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines[1:])
    assert len(lines) > 2


def test_list_of_everything():
    text = invoke("list").stdout
    assert all(name in text for name in (*TABLES, *PRESETS, "avdigits", "infiltration", "inproc"))


def test_list_of_something_else():
    result = invoke("list", "method")
    assert result.exit_code == 2
    assert 'did you mean "methods"' in result.stderr


def test_explain_shows_where_each_value_came_from(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: fedcmi\ntrain: {lr: 1e-3}\n")
    lines = invoke("explain", path, "train.rounds=3").stdout.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert "0.001" in rows["train.lr"]
    assert "mine.yaml" in rows["train.lr"]
    assert "command line" in rows["train.rounds"]
    assert "preset fedcmi" in rows["objective.name"]
    assert "default" in rows["seed"]


def test_explain_shows_lists_as_written():
    assert " [image, audio] " in invoke("explain", "data.modalities=[image, audio]").stdout


def test_doctor_looks_at_everything_and_fails_if_something_is_wrong():
    result = invoke("doctor")
    found = {line[: line.index("  ")].strip(): line.strip() for line in result.stdout.splitlines()[1:]}
    assert {"python", "fedmm", "compute", "ray", "disk", "memory", "data digits", "data speech"} <= set(found)
    assert found["ray"].endswith("ok")
    assert found["data digits"].endswith("ok")
    assert result.exit_code == (0 if all(line.endswith("ok") for line in found.values()) else 4)


@pytest.mark.parametrize("name", ["avdigits", "avdigits:easy", "emoji9", "cgmnist"])
def test_data_card(name):
    result = invoke("data", "card", name)
    assert result.exit_code == 0
    assert "licence" in result.stdout.lower()


def test_data_preview(tmp_path):
    result = invoke("data", "preview", "synthetic", "data.samples=100", "--out", tmp_path / "preview.png")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("modality", "train", "val", "test", "sha256"))
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")


# -- wrong calls and configurations: 2 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["run", "--frobnicate"], ["data"], ["report"], ["compare", "--jobs", "0"]]
)
def test_wrong_usage(arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize("verb", ["run", "plan", "explain"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learnig_rate=1", ["train.learnig_rate", "unknown key", "lr"]),
        ("trian.lr=1", ["trian", 'did you mean "train"']),
        ("train.rounds=ten", ["train.rounds", "ten", "whole number"]),
        ("train.rounds=true", ["train.rounds", "whole number"]),
        ("scenario.partition.alpha=0", ["scenario.partition.alpha", "greater than 0"]),
        ("scenario.partition.alpha=-1", ["scenario.partition.alpha", "greater than 0"]),
        ("train.clients_per_round=99", ["train.clients_per_round", "99", "scenario.clients"]),
        ("method=fedcm", ["method", 'did you mean "fedcmi"']),
        ("engine=rya", ["engine.name", "ray"]),
        ("=", ["command line", "train.lr"]),
        ("none.yaml", ["none.yaml", "no such file"]),
    ],
)
def test_wrong_configuration(verb, override, parts):
    result = invoke(verb, override)
    assert result.exit_code == 2
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["objective=joynt"], ["objective.name", "joynt", "joint"]),
        (["objective=prox", "objective.nu=1"], ["objective.nu", "mu"]),
        (["objective=prox", "objective.mu=much"], ["objective.mu", "much"]),
        (["strategy=fedavgg"], ["strategy.name", "fedavg"]),
        (["selection=cmsfd"], ["selection.name", "cmsfed"]),
        (["data=avdigit"], ["data.name", "avdigits"]),
        (["data=avdigits:esy"], ["data.preset", "easy"]),
        (["model.encoder={imag: cnn}"], ["model.encoder", "imag", "choose from: image, audio"]),
        (["objective=broken_module:Mine"], ["objective.name", "broken_module:Mine", "SyntaxError"]),
        (["data.name=broken_module:load"], ["data.name", "broken_module:load", "SyntaxError"]),
    ],
)
def test_wrong_names_of_parts(tmp_path, monkeypatch, overrides, parts):
    (tmp_path / "broken_module.py").write_text("def load(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke("run", *overrides, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["objective=prox", "objective.mu=-1"], ["objective.mu: -1", "greater than or equal to 0"]),
        (["objective=prox", "objective.mu=.nan"], ["objective.mu: nan", "greater than or equal to 0"]),
        (["objective=moon", "objective.tau=0"], ["objective.tau: 0", "greater than 0"]),
        (["method=pmr", "objective.memory=1.5"], ["objective.memory: 1.5", "less than or equal to 1"]),
        (["method=gblend", "objective.held_out=1"], ["objective.held_out: 1", "less than 1"]),
        (["objective=ogm", "objective.reference=other"], ["objective.reference", 'did you mean "others"']),
        (["selection=power_of_choice", "selection.d=0"], ["selection.d: 0", "greater than 0"]),
        (["method=cmsfed", "selection.theta=-1"], ["selection.theta: -1", "greater than or equal to 0"]),
        (["strategy=fedadam", "strategy.eta=fast"], ['strategy.eta: "fast"', "allowed: a number (correct"]),
        (["method=pmr", "objective.entropy_rounds=1.5"], ["objective.entropy_rounds: 1.5", "a whole number"]),
        (["strategy=fedadam", "strategy.eta=0"], ["strategy: eta and tau must be above 0"]),
    ],
)
def test_parameters_that_cannot_be(tmp_path, overrides, parts):
    result = invoke("run", *TINY, *overrides, "--out", tmp_path / "out")
    assert result.exit_code == 2
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("scenario.clients=999", "use at most 55 clients"),
        ("scenario.partition.min_samples=1000", "lower scenario.partition.min_samples"),
        ("scenario.partition=natural", "no natural clients"),
    ],
)
def test_a_scenario_that_the_data_cannot_meet_leaves_the_place_free(tmp_path, override, part):
    out = tmp_path / "out"
    result = invoke("run", *TINY, override, "--out", out)
    assert result.exit_code == 2
    assert part in result.stderr
    assert not out.exists()
    assert invoke("run", *TINY, "--out", out).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert invoke("run", *TINY, override, "--out", out, "--resume").exit_code == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_directory_that_was_there_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert invoke("run", *TINY, "scenario.clients=999", "--out", tmp_path).exit_code == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_engine_option_is_an_override():
    result = invoke("run", "--engine", "rya")
    assert result.exit_code == 2
    assert "engine.name" in result.stderr


def test_a_comparison_needs_methods(tmp_path):
    result = invoke("compare", "method=fedavg", "--out", tmp_path)
    assert result.exit_code == 2
    assert "methods: [" in result.stderr


def test_a_run_is_no_comparison():
    result = invoke("run", ROOT / "experiments/configs/demo.yaml")
    assert result.exit_code == 2
    assert "fedmm compare" in result.stderr


def test_another_run_in_the_directory_is_left_alone(finished):
    out, _ = finished
    before = (out / "summary.json").read_bytes()
    result = invoke("run", *TINY, "train.lr=0.5", "--out", out)
    assert result.exit_code == 2
    assert str(out) in result.stderr
    assert "--out" in result.stderr
    assert (out / "summary.json").read_bytes() == before


def test_a_report_on_nothing(tmp_path):
    result = invoke("report", tmp_path / "none")
    assert result.exit_code == 2
    assert str(tmp_path / "none") in result.stderr


# -- data and checkpoints: 3 ------------------------------------------------------------------------------------------


def test_missing_root(tmp_path):
    result = invoke("run", "data=avdigits", f"data.root={tmp_path / 'none'}", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert str(tmp_path / "none") in result.stderr


def test_corrupt_checkpoint(tmp_path):
    assert invoke("run", *TINY, "--out", tmp_path).exit_code == 0
    (tmp_path / "summary.json").unlink()
    damaged = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    result = invoke("run", *TINY, "--out", tmp_path, "--resume")
    assert result.exit_code == 3
    assert str(tmp_path) in result.stderr


# -- failures: 4 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [["run"], ["compare", "methods=[fedavg]", "seeds=1"]])
def test_an_output_directory_that_cannot_be_made(tmp_path, verb):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        result = invoke(*verb, *TINY, "--out", out)
        assert result.exit_code == 4
        assert str(out) in result.stderr
        assert "--out" in result.stderr


def test_a_full_disk(tmp_path):
    limit = (4096, 4096)
    done = spawn("run", *TINY, "--out", tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_deadline_that_nobody_can_meet(tmp_path):
    result = invoke("run", *TINY, "devices=phone", "devices.deadline_s=1e-9", "--out", tmp_path)
    assert result.exit_code == 4
    assert "the time was over: client 0, 1, 2, 3" in result.stderr


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", [b"[]", b"{", b"\xff\xfe", b""])
def test_records_that_were_damaged_do_not_stop_a_resumption(finished, tmp_path, name, damage):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    (out / name).write_bytes(damage)
    result = invoke("run", *TINY, "--out", out, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["weights_sha256"] == json.loads(finished[1].stdout)["weights_sha256"]


def test_replies_that_are_all_refused(tmp_path):
    result = invoke("run", *TINY, "faults=[{kind: nan, attempts: 9}]", "--out", tmp_path)
    assert result.exit_code == 4
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_a_loader_of_ones_own_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "broken_source.py").write_text("def load(config):\n    raise RuntimeError('the source broke')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke("run", "data.name=broken_source:load", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "broken_source:load" in result.stderr
    assert "the source broke" in result.stderr


# -- degraded: 5, interrupted: 6 --------------------------------------------------------------------------------------

SHORT = ["faults=[{kind: nan, clients: [0], attempts: 9}]", "policy.min_replies=0.5", "policy.on_short=accept"]


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--strict"], 5)])
def test_fewer_replies_than_asked(tmp_path, options, code):
    result = invoke("run", *TINY, *SHORT, "--out", tmp_path, "--json", *options)
    assert result.exit_code == code
    assert "degraded" in result.stderr
    assert json.loads(result.stdout)["status"] == "degraded"


def test_interrupt_and_resume(tmp_path):
    arguments = ["run", *TINY, "train.rounds=30000", "--out", tmp_path]
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any((tmp_path / "checkpoints").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept


# -- results on stdout ------------------------------------------------------------------------------------------------


def test_json_is_the_summary(finished):
    out, result = finished
    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert {"status", "method", "seed", "rounds", "val", "test", "bytes_up", "weights_sha256"} <= set(summary)
    assert "round" in result.stderr


@pytest.mark.parametrize("engine", ["inproc", pytest.param("ray", marks=pytest.mark.slow)])
def test_stdout_of_a_real_process_holds_json_alone(tmp_path, finished, engine):
    done = spawn("run", *TINY, "--engine", engine, "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights_sha256"] == json.loads(finished[1].stdout)["weights_sha256"]


def test_a_failing_run_leaves_stdout_empty(tmp_path):
    result = invoke("run", *TINY, "objective=joynt", "--json", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_without_json_a_table_and_the_place(tmp_path):
    result = invoke("run", *TINY, "--out", tmp_path)
    assert result.exit_code == 0
    assert str(tmp_path) in result.stdout
    assert "accuracy" in result.stdout


def test_resuming_a_finished_run_prints_its_summary(finished):
    out, first = finished
    again = invoke("run", *TINY, "--out", out, "--resume", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == json.loads(first.stdout)


def test_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("run", *TINY, "seed=3").exit_code == 0
    assert (tmp_path / "runs" / "joint-synthetic-seed3" / "summary.json").is_file()


def test_compare_and_report(tmp_path):
    out = tmp_path / "study"
    result = invoke("compare", "methods=[fedavg, fedprox]", "seeds=2", *TINY, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "fedprox" in result.stdout
    assert str(out / "report.html") in result.stdout
    for name in ("report.html", "table.md", "table.csv", "table.tex"):
        assert (out / name).stat().st_size > 0
    again = invoke("report", out, "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "report.html").is_file()


def test_a_run_of_a_comparison_that_fails_is_told_in_one_line(tmp_path):
    result = invoke("compare", "methods=[fedavg]", "seeds=1", *TINY, "train.lr=1e30", "--out", tmp_path)
    assert result.exit_code == 4
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("[1/1] default fedavg seed 0: failed: ")]
    assert "values that are not finite" in line
    assert "lower train.lr" in line
    assert line.endswith("policy.retries)")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_character_gets_another(tmp_path, encoding):
    out = tmp_path / "study"
    assert invoke("compare", "methods=[fedavg, fedprox]", "seeds=2", *TINY, "--out", out).exit_code == 0
    done = subprocess.run(
        command("report", out),
        cwd=ROOT,
        env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C"),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "? to baseline" in done.stdout.decode(encoding)


def test_the_shipped_configurations_are_valid():
    assert invoke("explain", ROOT / "experiments/configs/quick.yaml").exit_code == 0
    from fedmm.config.load import expand, load_compare

    cells = expand(load_compare(ROOT / "experiments/configs/demo.yaml"))
    assert [cell.label for cell in cells[::3]] == ["fedavg", "fedcmi", "cmsfed"] * 2
    assert all(isinstance(cell.config, Config) and cell.config.engine.name == "ray" for cell in cells)
