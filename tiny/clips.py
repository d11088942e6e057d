"""Synthetic clips of the tiny preset: a drawn face and a voice-like sound that express an emotion, as real mp4 files.

The face alone or the voice alone cannot identify all seven emotions: emotions with the same entry in a column below
look (or sound) alike, but the two columns together identify each emotion. So a model must use both modalities.

    emotion     face             voice
    angry       angry/disgust    angry
    disgust     angry/disgust    sad/disgust
    fearful     sad/fearful      fearful
    sad         sad/fearful      sad/disgust
    happy       happy            happy/surprise
    surprise    surprise         happy/surprise
    neutral     neutral          neutral

For an emotion of a confusable pair, a clip shows the emotion's own expression with probability `TELL`, else the shared
expression of the pair. So the best possible accuracy of one modality alone is 3/7 + 4/7 (TELL + (1 - TELL) / 2) = 0.79.
With both modalities it is 1, except for overlaps between expressions due to the noise on each feature (see the tests).

Speakers differ in skin, hair, background, size and position of the head, pitch, vowels and loudness. None of these
depend on the emotion.
"""

from __future__ import annotations

import os
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

FACE_GROUPS = (("angry", "disgust"), ("fearful", "sad"), ("happy",), ("surprise",), ("neutral",))
VOICE_GROUPS = (("angry",), ("fearful",), ("disgust", "sad"), ("happy", "surprise"), ("neutral",))
TELL = 0.25
NOISE = 0.12  # standard deviation of each feature over the clips of one expression

# The fastest settings, because more than a thousand clips are written before training starts.
H264_OPTIONS = {"preset": "ultrafast", "crf": "24", "threads": "1", "flags": "+bitexact"}
AAC_OPTIONS = {"aac_coder": "fast", "aac_tns": "0", "aac_pns": "0", "aac_is": "0", "aac_ms": "0", "flags": "+bitexact"}
SIZE = 64  # pixels
FPS = 10
SAMPLING_RATE = 16000  # hertz

# Every feature is in [-1, 1]. mouth_curve: corners down .. up; mouth_open: closed .. wide; brow_angle: inner ends
# down .. up; brow_height: low .. high; eye_open: narrow .. wide; head_tilt: bowed and turned .. upright.
FACE_FEATURES = ("mouth_curve", "mouth_open", "brow_angle", "brow_height", "eye_open", "head_tilt")
FACES = {
    "angry": (-0.5, 0.0, -1.0, -0.6, 0.4, 0.6),
    "disgust": (-0.9, -0.8, -0.7, -0.8, -0.6, -0.2),
    "fearful": (-0.5, 0.2, 1.0, 0.7, 0.7, 0.3),
    "happy": (1.0, 0.0, 0.0, 0.2, 0.0, 0.5),
    "neutral": (0.0, -1.0, 0.0, 0.0, 0.1, 0.2),
    "sad": (-1.0, -0.9, 0.8, 0.1, -0.5, -0.8),
    "surprise": (0.0, 1.0, 0.1, 1.0, 1.0, 0.4),
}
# pitch: the speaker's low .. high; melody: monotone .. lively; slope: falling .. rising; rate: slow .. fast syllables;
# brightness: dull .. sharp; tremor: steady .. shaking; breath: clear .. breathy.
VOICE_FEATURES = ("pitch", "melody", "slope", "rate", "brightness", "tremor", "breath")
VOICES = {
    "angry": (0.0, 0.2, -0.7, 0.9, 1.0, -1.0, -0.8),
    "disgust": (-0.8, -0.4, -0.7, -0.5, -0.3, -0.8, 0.2),
    "fearful": (0.9, -0.6, 0.2, 0.8, -0.1, 1.0, 0.7),
    "happy": (0.5, 0.9, 0.5, 0.4, 0.5, -0.9, -0.5),
    "neutral": (-0.1, -0.5, -0.1, 0.0, 0.0, -1.0, -0.8),
    "sad": (-0.5, -0.9, -0.9, -1.0, -0.9, -0.5, 0.6),
    "surprise": (0.7, 0.7, 1.0, -0.1, 0.6, -0.9, -0.3),
}
CIRCLE = np.exp(2j * np.pi * np.arange(16) / 16)
NOSE = np.array([(0, -0.02), (0.06, 0.22), (-0.02, 0.24)])
ACROSS = np.linspace(-1, 1, 9)  # positions along the mouth, from corner to corner
# First and second formants in hertz of five vowels (a, e, i, o, u) for an average speaker.
FORMANTS = np.array([(730, 1090), (530, 1840), (270, 2290), (570, 840), (300, 870)], float)


def _sample(emotion: str, features: dict, groups: tuple, rng: np.random.Generator) -> np.ndarray:
    group = next(group for group in groups if emotion in group)
    shown = (emotion,) if rng.random() < TELL else group
    centre = np.mean([features[name] for name in shown], axis=0)
    return np.clip(centre + rng.normal(0, NOISE, len(centre)), -1, 1)


def sample_face(emotion: str, rng: np.random.Generator) -> np.ndarray:
    """Sample a facial expression of the emotion: (6,) floats in [-1, 1], in the order of `FACE_FEATURES`."""
    return _sample(emotion, FACES, FACE_GROUPS, rng)


def sample_voice(emotion: str, rng: np.random.Generator) -> np.ndarray:
    """Sample a vocal expression of the emotion: (7,) floats in [-1, 1], in the order of `VOICE_FEATURES`."""
    return _sample(emotion, VOICES, VOICE_GROUPS, rng)


def _draw(face: np.ndarray, colors: dict, place: np.ndarray, scale: float) -> np.ndarray:
    """Draw a face with the given features as a (SIZE, SIZE, 3) uint8 image."""
    curve, opening, angle, height, eyes, tilt = face
    image = Image.new("RGB", (SIZE, SIZE), colors["background"])
    draw = ImageDraw.Draw(image)
    unit = scale * SIZE / 2
    turn = 0.30 * (0.5 - tilt / 2)  # a bowed head leans to the side by up to 0.3 radians, and is lower
    cosine, sine = np.cos(turn), np.sin(turn)
    middle = place + np.array([0.0, 0.25 * turn * SIZE])

    axes = np.array([[cosine, sine], [-sine, cosine]]) * unit

    def at(points: np.ndarray) -> list[float]:
        """Convert points (n, 2) from head coordinates (-1 .. 1 over the head) to pixels: x, y, x, y ..."""
        return (points @ axes + middle).ravel().tolist()

    def disc(x: float, y: float, radius_x: float, radius_y: float, color) -> None:
        points = np.stack([x + radius_x * CIRCLE.real, y + radius_y * CIRCLE.imag], axis=1)
        draw.polygon(at(points), fill=color)

    disc(0, -0.12, 0.80, 0.98, colors["hair"])
    disc(0, 0.05, 0.72, 0.88, colors["skin"])
    line = max(2, round(unit / 11))
    for side in (-1, 1):
        disc(side * 0.30, -0.12, 0.17, 0.03 + 0.09 * (eyes + 1), "white")
        disc(side * 0.30, -0.12, 0.08, min(0.09, 0.03 + 0.09 * (eyes + 1)), "black")
        brow = -0.44 - 0.13 * height
        ends = np.array([(side * 0.14, brow - 0.18 * angle), (side * 0.48, brow + 0.18 * angle)])
        draw.line(at(ends), fill=colors["brow"], width=line)
    draw.line(at(NOSE), fill=colors["brow"], width=1)
    x, middle_line = 0.40 * ACROSS, 0.50 + 0.36 * curve * (0.5 - ACROSS**2)  # corners up where the curve is positive
    gap = 0.02 + 0.13 * (opening + 1) * np.sqrt(1 - ACROSS**2)
    upper, lower = np.stack([x, middle_line - gap], axis=1), np.stack([x, middle_line + gap], axis=1)
    draw.polygon(at(np.concatenate([upper, lower[::-1]])), fill=colors["mouth"])
    draw.line(at((upper + lower) / 2), fill=colors["mouth"], width=line)
    return np.asarray(image)


def _person(rng: np.random.Generator) -> tuple[dict, np.ndarray, float]:
    """Sample a person and a background: colors, center of the head in pixels (2,), and size of the head."""
    skin = np.array([225, 172, 130]) * rng.uniform(0.55, 1.1) + rng.normal(0, 8, 3)
    hair = np.array([90, 60, 35]) * rng.uniform(0.2, 1.6)
    colors = {
        "background": tuple(rng.integers(20, 236, 3).tolist()),
        "skin": tuple(np.clip(skin, 60, 250).astype(int).tolist()),
        "hair": tuple(np.clip(hair, 0, 255).astype(int).tolist()),
        "brow": tuple(np.clip(hair * 0.5, 0, 90).astype(int).tolist()),
        "mouth": (120, int(rng.integers(10, 40)), int(rng.integers(20, 60))),
    }
    return colors, SIZE / 2 + rng.uniform(-4, 4, 2), rng.uniform(0.80, 0.98)


def _grain(count: int, rng: np.random.Generator) -> np.ndarray:
    """Camera noise for `count` frames, (count, SIZE, SIZE, 1)."""
    return rng.normal(0, 2, (count, SIZE // 2, SIZE // 2, 1)).repeat(2, axis=1).repeat(2, axis=2)


def random_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a person with uniformly random facial features, which express no emotion.

    Returns:
        The image, (SIZE, SIZE, 3) uint8, and its drawing parameters, (18,) floats roughly in [-1, 1]: `FACE_FEATURES`,
        position (2) and size (1) of the head, colors of background, skin and hair (3 each).
    """
    colors, place, scale = _person(rng)
    face = rng.uniform(-1, 1, len(FACE_FEATURES))
    picture = np.clip(_draw(face, colors, place, scale) + _grain(1, rng)[0], 0, 255).astype(np.uint8)
    shades = [np.array(colors[name]) / 128 - 1 for name in ("background", "skin", "hair")]
    return picture, np.concatenate([face, (place - SIZE / 2) / 4, [(scale - 0.89) / 0.09], *shades]).astype(np.float32)


def render_face(face: np.ndarray, rng: np.random.Generator, seconds: float = 1.0) -> np.ndarray:
    """Render the frames of an expression: it builds up from a neutral face, while head and lips move a little.

    Args:
        face (6,): floats in [-1, 1], in the order of `FACE_FEATURES`.
        rng: random generator for the person, the background and the small motions.

    Returns:
        uint8 frames (round(seconds * FPS), SIZE, SIZE, 3).
    """
    count = max(1, round(seconds * FPS))
    colors, place, scale = _person(rng)
    sway = rng.uniform(0, 2 * np.pi, 3)
    calm = np.array(FACES["neutral"])
    frames = []
    for step in range(count):
        time = step / FPS
        growth = min(1.0, 0.6 + 1.2 * time)
        now = calm + growth * (face - calm)
        now[1] += 0.12 * np.sin(2 * np.pi * 3 * time + sway[2])  # the lips move while speaking
        drift = 1.2 * np.sin(2 * np.pi * np.array([0.7, 0.9]) * time + sway[:2])
        frames.append(_draw(now, colors, place + drift, scale))
    return np.clip(np.stack(frames) + _grain(count, rng), 0, 255).astype(np.uint8)


def _tables(pitch: float, speaker: float, brightness: float, vowels: np.ndarray) -> np.ndarray:
    """A period of the voice for each vowel, (vowels, 1024): harmonics shaped by two formants and a spectral slope."""
    harmonics = np.arange(1, int(0.42 * SAMPLING_RATE / (pitch * 2)) + 1)
    frequency = harmonics * pitch
    slope = harmonics ** -(1.6 - 0.9 * brightness)
    tables = []
    for first, second in FORMANTS[vowels] * speaker:
        shape = 0.12 + np.exp(-(((frequency - first) / 160) ** 2)) + 0.7 * np.exp(-(((frequency - second) / 220) ** 2))
        spectrum = np.zeros(513, complex)
        spectrum[harmonics] = shape * slope * np.exp(1j * harmonics**2 * 0.1)  # spread phases lower the peak
        table = np.fft.irfft(spectrum, 1024)
        tables.append(table / np.sqrt(np.mean(table**2)))
    return np.array(tables)


def _sing(voice: np.ndarray, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Like `render_voice`, but also return the pitch in hertz and the amplitude (0 .. 1) at each sample."""
    level, melody, slope, rate, brightness, tremor, breath = voice
    count = max(1, round(seconds * SAMPLING_RATE))
    time = np.arange(count) / SAMPLING_RATE
    base = 150 * 2 ** rng.uniform(-0.25, 0.25)
    speaker = rng.uniform(0.9, 1.15)
    syllables = 5.0 + 3.0 * rate  # per second: 2 to 8
    beat = syllables * time + rng.uniform(0, 1)
    vowel = rng.integers(0, len(FORMANTS), int(beat[-1]) + 1)

    semitones = 5 * level + 6 * slope * (time / max(seconds, 1e-3) - 0.5)
    semitones += (2.5 + 2.3 * melody) * np.sin(2 * np.pi * (beat / 2 + rng.uniform()))
    semitones += 0.9 * (tremor + 1) * np.sin(2 * np.pi * 11 * time)
    pitch = base * 2 ** (semitones / 12)
    phase = np.cumsum(pitch) / SAMPLING_RATE
    tables = _tables(base * 2 ** (5 * level / 12), speaker, brightness, np.arange(len(FORMANTS)))
    sound = tables[vowel[beat.astype(int)], (phase % 1 * 1024).astype(int)]

    # Each syllable swells and fades; the amplitude of a trembling voice also wavers.
    swell = (0.5 - 0.5 * np.cos(2 * np.pi * (beat % 1))) ** (0.6 + 0.5 * (brightness + 1))
    swell *= 1 - 0.2 * (tremor + 1) * (0.5 + 0.5 * np.sin(2 * np.pi * 11 * time))
    hiss = rng.normal(0, 1, count)
    hiss[1:] -= 0.6 * hiss[:-1]
    sound = swell * (sound + 0.25 * (breath + 1) * hiss)
    sound += rng.uniform(0.005, 0.02) * rng.normal(0, 1, count)  # room noise
    return (rng.uniform(0.3, 0.9) * sound / max(np.abs(sound).max(), 1e-6)).astype(np.float32), pitch, swell


def render_voice(voice: np.ndarray, rng: np.random.Generator, seconds: float = 1.0) -> np.ndarray:
    """Synthesize a few vowels: a harmonic source filtered by formants, with a melody and a rhythm of syllables.

    Args:
        voice (7,): floats in [-1, 1], in the order of `VOICE_FEATURES`.
        rng: random generator for the speaker (pitch, formants, loudness), the vowels and the room noise.

    Returns:
        float32 samples (round(seconds * SAMPLING_RATE),) in [-1, 1].
    """
    return _sing(voice, rng, seconds)[0]


def random_sound(rng: np.random.Generator, seconds: float = 1.0, hop: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Synthesize a voice with uniformly random features, which express no emotion.

    Returns:
        float32 samples (samples,) at `SAMPLING_RATE`, and the synthesis parameters, (samples // hop, 9) floats roughly
        in [-1, 1]: `VOICE_FEATURES`, then the pitch in octaves around 150 hertz and the amplitude, both at the middle
        of each hop.
    """
    voice = rng.uniform(-1, 1, len(VOICE_FEATURES))
    samples, pitch, swell = _sing(voice, rng, seconds)
    moments = np.arange(len(samples) // hop) * hop + hop // 2
    local = np.stack([np.log2(pitch[moments] / 150), 2 * swell[moments] - 1], axis=1)
    return samples, np.concatenate([np.tile(voice, (len(moments), 1)), local], axis=1).astype(np.float32)


def write_clip(
    path: str | os.PathLike,
    emotion: str,
    rng: np.random.Generator,
    seconds: float = 1.0,
    with_audio: bool = True,
    with_video: bool = True,
) -> None:
    """Write a clip as an mp4 file, with H.264 at 10 frames per second and AAC at 16 kHz mono.

    The bytes are determined by the generator state and the versions of the libraries.

    Args:
        path: file to write; its folder must exist.
        emotion: one of the seven emotions.
        rng: random generator for the expression, the speaker and the noise.
        seconds: length of the clip.
        with_audio, with_video: False leaves out this stream.

    Raises:
        ValueError: if the emotion is unknown, or both streams are left out.
    """
    if emotion not in FACES:
        raise ValueError(f"{emotion!r} is not one of the emotions {', '.join(FACES)}.")
    if not (with_audio or with_video):
        raise ValueError(f"{os.fspath(path)}: a clip needs audio or video. Set with_audio or with_video.")
    # Both streams are always rendered, so that leaving out one stream does not change the other.
    frames = render_face(sample_face(emotion, rng), rng, seconds)
    samples = render_voice(sample_voice(emotion, rng), rng, seconds)
    with av.open(os.fspath(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if with_video:
            video = container.add_stream("libx264", rate=FPS, options=H264_OPTIONS)
            video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        if with_audio:
            audio = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono", options=AAC_OPTIONS)
            audio.bit_rate = 48_000
        if with_video:
            for number, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if with_audio:
            length = 1024  # samples per AAC frame
            for start in range(0, len(samples), length):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + length], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = SAMPLING_RATE, start, Fraction(1, SAMPLING_RATE)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
