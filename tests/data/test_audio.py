import numpy as np
import pytest
from scipy.io import wavfile

from fedmm.data import audio
from fedmm.errors import DataError


def tone(rate, seconds=0.3, hz=440.0, silence=0.1):
    t = np.arange(int(seconds * rate)) / rate
    quiet = np.zeros(int(silence * rate))
    return np.concatenate([quiet, np.sin(2 * np.pi * hz * t), quiet])


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_level_length_and_place_do_not_depend_on_the_rate(rate):
    wave = audio.prepare(tone(rate) * 1234.0, rate)
    sounding = np.flatnonzero(wave)
    assert wave.shape == (audio.LENGTH,)
    assert wave.dtype == np.float32
    assert len(sounding) == pytest.approx(0.3 * audio.RATE, rel=0.02)
    assert abs(sounding[0] - (audio.LENGTH - 1 - sounding[-1])) <= 2
    assert np.sqrt(np.mean(wave[sounding[0] : sounding[-1] + 1] ** 2)) == pytest.approx(audio.LEVEL, rel=0.01)


def test_rates_give_the_same_spectrogram():
    first, second = (audio.log_mel(audio.prepare(tone(rate), rate)[None]).astype(int) for rate in (8000, 16000))
    # Quiet cells hold resampling residue; the tone's own cells must agree.
    loud = first > first.max() - 20
    assert loud.any()
    assert np.abs(first - second)[loud].max() <= 4


def test_a_long_recording_keeps_its_middle():
    signal = np.concatenate([np.ones(4000), 3 * np.ones(2000), np.ones(4000)])
    wave = audio.prepare(signal, audio.RATE)
    assert wave.shape == (audio.LENGTH,)
    assert wave[audio.LENGTH // 2] == pytest.approx(3 * wave[0], rel=1e-5)


def test_noise_has_the_asked_level():
    wave = audio.prepare(tone(8000), 8000)[None].repeat(20, axis=0)
    noise = audio.add_noise(wave, -10.0, np.random.default_rng(0)) - wave
    assert 20 * np.log10(audio.LEVEL / noise.std()) == pytest.approx(-10.0, abs=0.1)


def test_spectrogram_places_a_tone_in_its_band():
    low, high = (audio.log_mel(audio.prepare(tone(8000, hz=hz), 8000)[None])[0] for hz in (300.0, 3000.0))
    assert low.shape == audio.FEATURE_SHAPE
    assert low.dtype == np.uint8
    assert low[10].argmax() < high[10].argmax()
    assert low.max() < 255, "the code must not saturate"


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float32])
def test_wav_types(tmp_path, dtype):
    signal = tone(8000) * 0.5
    if dtype == np.uint8:
        samples = (signal * 127 + 128).astype(np.uint8)
    else:
        samples = (signal * (1.0 if dtype == np.float32 else np.iinfo(dtype).max)).astype(dtype)
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([samples, samples], axis=1))
    assert np.abs(audio.read_wav(tmp_path / "a.wav") - audio.prepare(signal, 8000)).max() < 0.02


def test_bad_recordings_are_named(tmp_path):
    path = tmp_path / "0_a_0.wav"
    path.write_bytes(b"not a wav")
    with pytest.raises(DataError, match=r"0_a_0\.wav"):
        audio.read_wav(path)
    wavfile.write(path, 8000, np.zeros(100, dtype=np.int16))
    with pytest.raises(DataError, match="silent"):
        audio.read_wav(path)


@pytest.mark.parametrize("length", [0, 2, 4, 12, 20, 36, 40, 44, 45, 60])
def test_cut_recordings_never_crash(tmp_path, length):
    path = tmp_path / "0_a_0.wav"
    wavfile.write(path, 8000, (tone(8000) * 9000).astype(np.int16))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"0_a_0\.wav"):
        audio.read_wav(path)
