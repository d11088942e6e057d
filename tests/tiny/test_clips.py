"""Tests of the tiny preset's clips: they are real files, and neither modality suffices alone."""

import itertools

import numpy as np
import pytest

from empathic.configuration_empathic import EMOTIONS
from empathic.media_empathic import MediaError, probe, read_audio, read_video
from empathic.tiny import clips


def test_every_emotion_is_performed():
    assert set(clips.FACES) == set(clips.VOICES) == set(EMOTIONS)
    for groups in (clips.FACE_GROUPS, clips.VOICE_GROUPS):
        assert sorted(itertools.chain(*groups)) == sorted(EMOTIONS)
    for features, names in ((clips.FACES, clips.FACE_FEATURES), (clips.VOICES, clips.VOICE_FEATURES)):
        assert all(len(row) == len(names) and max(map(abs, row)) <= 1 for row in features.values())


def test_face_and_voice_together_name_each_emotion():
    def group_of(emotion, groups):
        return next(i for i, group in enumerate(groups) if emotion in group)

    pairs = {(group_of(e, clips.FACE_GROUPS), group_of(e, clips.VOICE_GROUPS)) for e in EMOTIONS}
    assert len(pairs) == len(EMOTIONS)
    # Each modality alone confuses two pairs.
    for groups in (clips.FACE_GROUPS, clips.VOICE_GROUPS):
        assert sorted(map(len, groups)) == [1, 1, 1, 2, 2]


def likelihood(drawn, features, groups):
    """log p(drawn | emotion), (samples, 7), under the generator's own mixture of expressions."""
    columns = []
    for emotion in EMOTIONS:
        group = next(group for group in groups if emotion in group)
        own, shared = np.array(features[emotion]), np.mean([features[e] for e in group], axis=0)
        near = [np.exp(-((drawn - centre) ** 2).sum(axis=1) / (2 * clips.NOISE**2)) for centre in (own, shared)]
        columns.append(np.log(clips.TELL * near[0] + (1 - clips.TELL) * near[1] + 1e-300))
    return np.stack(columns, axis=1)


def test_best_possible_accuracy():
    """The best possible accuracy is about 0.8 for the face and for the voice, and nearly 1 for both."""
    rng = np.random.default_rng(0)
    truth = np.arange(2100) % 7
    faces = np.array([clips.sample_face(EMOTIONS[i], rng) for i in truth])
    voices = np.array([clips.sample_voice(EMOTIONS[i], rng) for i in truth])
    face = likelihood(faces, clips.FACES, clips.FACE_GROUPS)
    voice = likelihood(voices, clips.VOICES, clips.VOICE_GROUPS)
    accuracy = {name: (p.argmax(1) == truth).mean() for name, p in (("V", face), ("A", voice), ("AV", face + voice))}
    assert 0.75 < accuracy["V"] < 0.83 and 0.75 < accuracy["A"] < 0.83
    assert accuracy["AV"] > 0.97


@pytest.mark.parametrize(("with_audio", "with_video"), [(True, True), (True, False), (False, True)])
def test_clip_is_a_real_file(tmp_path, with_audio, with_video):
    path = tmp_path / "clip.mp4"
    clips.write_clip(path, "happy", np.random.default_rng(0), 1.0, with_audio, with_video)
    info = probe(path)
    assert (info.has_audio, info.has_video) == (with_audio, with_video)
    assert abs(info.duration - 1.0) < 0.1
    if with_video:
        assert read_video(path, 10).shape == (10, clips.SIZE, clips.SIZE, 3)
    else:
        with pytest.raises(MediaError, match="holds only sound"):
            read_video(path)
    if with_audio:
        sound = read_audio(path)
        assert abs(len(sound) - 16000) <= 1024 and 0.1 < np.abs(sound).max() <= 1.1
    else:
        with pytest.raises(MediaError, match="has no sound track"):
            read_audio(path)


def test_same_seed_same_bytes(tmp_path):
    def write(name, seed, **options):
        clips.write_clip(tmp_path / name, "sad", np.random.default_rng(seed), **options)
        return (tmp_path / name).read_bytes()

    assert write("a.mp4", 1) == write("b.mp4", 1) != write("c.mp4", 2)
    # Leaving out a stream does not change the other stream.
    write("full.mp4", 3)
    write("mute.mp4", 3, with_audio=False)
    assert np.array_equal(read_video(tmp_path / "full.mp4"), read_video(tmp_path / "mute.mp4"))


def test_file_shows_what_was_rendered(tmp_path):
    """H.264 and AAC preserve the clip: the file's frames and spectrum are close to the originals."""
    rng = np.random.default_rng(5)
    frames = clips.render_face(clips.sample_face("surprise", rng), rng)
    samples = clips.render_voice(clips.sample_voice("surprise", rng), rng)
    path = tmp_path / "clip.mp4"
    clips.write_clip(path, "surprise", np.random.default_rng(5))
    decoded = read_video(path, len(frames))
    assert np.abs(decoded.astype(float) - frames).mean() < 12
    assert np.corrcoef(decoded.ravel(), frames.ravel())[0, 1] > 0.97
    sound = read_audio(path)[: len(samples)]
    assert np.corrcoef(sound, samples[: len(sound)])[0, 1] > 0.9


def lips(frames):
    """Return the mean number of pixels per picture in the red of the mouth."""
    red, green = frames[..., 0].astype(int), frames[..., 1].astype(int)
    return ((red > 80) & (red < 150) & (green < 60)).sum(axis=(1, 2)).mean()


def test_features_are_seen():
    """Each of the clearest facial features changes the picture as expected, for every person."""
    centre = np.zeros(6)

    def mean_difference(measure, name, low=-0.9, high=0.9):
        place = clips.FACE_FEATURES.index(name)
        found = []
        for seed in range(6):
            values = []
            for value in (low, high):
                face = centre.copy()
                face[place] = value
                values.append(measure(clips.render_face(face, np.random.default_rng(seed), 0.5)))
            found.append(values[1] - values[0])
        return np.array(found)

    assert (mean_difference(lips, "mouth_open") > 20).all()
    whites = mean_difference(lambda f: (f.min(axis=-1) > 235).sum(axis=(1, 2)).mean(), "eye_open")
    assert (whites > 10).all()


def test_features_are_heard():
    """The sound of a voice has the requested rhythm, brightness and pitch."""

    def voice(**features):
        return np.array(
            [
                features.get(name, -0.9 if name in ("melody", "tremor", "breath") else 0.0)
                for name in clips.VOICE_FEATURES
            ]
        )

    def pairs(name, measure):
        for seed in range(6):
            low, high = (
                measure(clips.render_voice(voice(**{name: v}), np.random.default_rng(seed), 2.0)) for v in (-0.9, 0.9)
            )
            yield low, high

    def rhythm(sound):
        energy = np.convolve(sound**2, np.ones(800) / 800)[::160][: len(sound) // 160]
        spectrum = np.abs(np.fft.rfft(energy - energy.mean()))
        return spectrum[1:25].argmax() / 2 + 0.5  # hertz

    def centroid(sound):
        spectrum = np.abs(np.fft.rfft(sound)) ** 2
        return (np.arange(len(spectrum)) * spectrum).sum() / spectrum.sum()

    def fundamental(sound):
        """The pitch from the first high peak of the mean autocorrelation of 64 ms pieces."""
        pieces = sound[: len(sound) // 1024 * 1024].reshape(-1, 1024)
        repeats = np.fft.irfft((np.abs(np.fft.rfft(pieces, 2048)) ** 2).sum(axis=0))[40:230]  # 70 to 400 Hz
        high = np.flatnonzero(repeats > 0.8 * repeats.max())
        run = high[: np.flatnonzero(np.diff(high, append=high[-1] + 2) > 1)[0] + 1]
        return 16000 / (40 + run[repeats[run].argmax()])

    assert all(high > 1.8 * low for low, high in pairs("rate", rhythm))
    assert all(high > 1.1 * low for low, high in pairs("brightness", centroid))
    assert all(high > 1.3 * low for low, high in pairs("pitch", fundamental))


def test_bad_arguments(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'calm' is not one of the emotions angry"):
        clips.write_clip(tmp_path / "a.mp4", "calm", rng)
    with pytest.raises(ValueError, match=r"a\.mp4: a clip needs audio or video"):
        clips.write_clip(tmp_path / "a.mp4", "sad", rng, with_audio=False, with_video=False)
