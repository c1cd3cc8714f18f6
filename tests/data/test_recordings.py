"""avdigits from a folder in the layout of the Free Spoken Digit Dataset."""

import numpy as np
import pytest
from scipy.io import wavfile

from fedmm.config.schema import DataConfig
from fedmm.data import load_dataset
from fedmm.data.sources.avdigits import recorded_speech
from fedmm.errors import DataError
from fedmm.testing.dataset import check_dataset


def record(root, speakers, indices=2, digits=range(10), rate=8000):
    folder = root / "recordings"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    t = np.arange(int(0.3 * rate)) / rate
    for s, speaker in enumerate(speakers):
        for digit in digits:
            for index in range(indices):
                wave = np.sin(2 * np.pi * (300 + 250 * digit + 10 * s) * t) + 0.01 * rng.standard_normal(len(t))
                wavfile.write(folder / f"{digit}_{speaker}_{index}.wav", rate, (wave * 9000).astype(np.int16))
    return root


@pytest.mark.parametrize("preset", ["easy", "imbalanced"])
def test_recordings_become_the_audio(tmp_path, preset):
    root = record(tmp_path, ["ann", "bo_b", "cleo", "dan"])
    data = load_dataset(DataConfig(name="avdigits", preset=preset, root=str(root)))
    check_dataset(data)
    assert data.specs["audio"].shape == (1, 21, 16)
    assert data.natural_names == ("ann", "bo_b", "cleo", "dan")
    assert np.bincount(data.split).tolist() == [2000, 500, 1000]
    # A tone a digit: the clean spectrogram names the class, whatever the speaker.
    if preset == "easy":
        band = data.x["audio"][:, 0].mean(axis=1).argmax(axis=1)
        assert np.corrcoef(band, data.y)[0, 1] > 0.95


def test_three_speakers_are_split_by_speaker_and_two_by_index(tmp_path):
    by_speaker = recorded_speech(record(tmp_path / "three", ["a", "b", "c"], indices=1), None)
    assert np.array_equal(by_speaker.unit, by_speaker.natural)
    assert sorted(np.unique(by_speaker.split)) == [0, 1, 2]
    by_index = recorded_speech(record(tmp_path / "two", ["a", "b"], indices=4), None)
    assert len(np.unique(by_index.unit)) == 4
    assert set(by_index.natural[by_index.split == 2]) == {0, 1}


def test_noise_is_the_same_each_time_and_follows_the_level(tmp_path):
    root = record(tmp_path, ["a", "b", "c"])
    clean, noisy, again = (recorded_speech(root, snr).features for snr in (None, -10.0, -10.0))
    assert np.array_equal(noisy, again)
    assert noisy.mean() > clean.mean() + 30


def test_rate_does_not_matter_to_shapes(tmp_path):
    assert recorded_speech(record(tmp_path, ["a", "b", "c"], rate=44100), None).features.shape == (60, 21, 16)


def test_unusable_folders_are_refused(tmp_path):
    def message(root):
        with pytest.raises(DataError) as caught:
            load_dataset(DataConfig(name="avdigits", root=str(root)))
        assert caught.value.exit_code == 3
        return str(caught.value)

    assert "recordings/7_jackson_32.wav" in message(tmp_path / "nowhere")
    (tmp_path / "empty" / "recordings").mkdir(parents=True)
    assert "right form" in message(tmp_path / "empty")
    assert "[8, 9]" in message(record(tmp_path / "few", ["a", "b", "c"], digits=range(8)))
    assert "cannot be split" in message(record(tmp_path / "one", ["a"], indices=2))
    broken = record(tmp_path / "broken", ["a", "b", "c"])
    (broken / "recordings" / "3_b_1.wav").write_bytes(b"RIFF")
    assert "3_b_1.wav" in message(broken)
