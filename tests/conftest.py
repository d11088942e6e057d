"""Shared by all tests: one thread, no network, and a writer of small media files."""

import os
import signal

# Started in the background, this process ignores Ctrl-C, and so would those that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch and the Hub client are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def mux_sound(container, stream, samples, layout, sampling_rate):
    """Encodes (channels, samples) floats into a stream of a container."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, dtype=np.float32), "fltp", layout)
    frame.sample_rate = sampling_rate
    context = stream.codec_context
    convert = av.AudioResampler(context.format, layout, sampling_rate, frame_size=context.frame_size or None)
    for piece in convert.resample(frame) + convert.resample(None):
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def encode_media(
    path,
    *,
    frames=None,
    fps=10,
    times=None,
    samples=None,
    sampling_rate=44100,
    layout="mono",
    video_codec="libx264",
    audio_codec="aac",
    rotation=None,
    mirrored=False,
    pixel=None,
    video_options=None,
    container_options=None,
    format=None,
):
    """Writes one media file through PyAV and returns its path.

    frames: (frames, height, width, 3) uint8, or None for no picture. times: when each frame appears, in milliseconds (a
    variable frame rate), else `fps`. samples: (channels, samples) floats for the channel `layout`, or None for silence.
    rotation: degrees, counter-clockwise, that a player has to turn the picture by; mirrored: it then has to mirror it
    left to right. pixel: width of a pixel by its height.
    """
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        video = audio = None
        if frames is not None:
            video = container.add_stream(video_codec, rate=fps, options=video_options or {})
            video.height, video.width = frames.shape[1:3]
            video.bit_rate = 2_000_000  # enough to keep the greys apart
            even = video.width % 2 == 0 and video.height % 2 == 0
            video.pix_fmt = "yuvj420p" if video_codec == "mjpeg" else "yuv420p" if even else "yuv444p"
            if times is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            if rotation is not None or mirrored:
                video.set_display_rotation(rotation or 0, hflip=mirrored)
            if pixel is not None:
                video.codec_context.sample_aspect_ratio = Fraction(pixel)
        if samples is not None:
            audio = container.add_stream(audio_codec, rate=sampling_rate, layout=layout)
        for place, pixels in enumerate(frames if frames is not None else []):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = place if times is None else times[place]
            frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if audio is not None:
            mux_sound(container, audio, samples, layout, sampling_rate)
    return path


@pytest.fixture(scope="session")
def write_media():
    """The function `encode_media`."""
    return encode_media


def encode_tracks(path, sounds=(), pictures=()):
    """Write a file with several tracks: ((channels, samples) at 16 kHz, layout, disposition) of each sound, and (gray
    level, disposition) of each picture."""
    with av.open(str(path), "w") as container:
        streams = []
        for samples, layout, disposition in sounds:
            stream = container.add_stream("aac", rate=16000, layout=layout)
            stream.disposition = disposition
            streams.append((stream, samples, layout))
        shown = []
        for level, disposition in pictures:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 64, 48, "yuv420p", disposition
            shown.append((stream, level))
        for stream, level in shown:
            for place in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                frame.pts = place
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        for stream, samples, layout in streams:
            mux_sound(container, stream, samples, layout, 16000)
    return path


@pytest.fixture(scope="session")
def write_tracks():
    """The function `encode_tracks`."""
    return encode_tracks


@pytest.fixture(scope="session")
def grey_frames():
    """A function (count, height, width) -> uint8 frames; frame i is grey of the value 7 i + 20."""

    def make(count, height=48, width=64):
        values = (np.arange(count) * 7 + 20).astype(np.uint8)
        return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()

    return make


@pytest.fixture(scope="session")
def tone():
    """A function (seconds, sampling_rate, frequency, channels) -> (channels, samples) sine of amplitude 0.5."""

    def make(seconds=1.0, sampling_rate=44100, frequency=440.0, channels=1):
        time = np.arange(round(seconds * sampling_rate)) / sampling_rate
        return np.tile(0.5 * np.sin(2 * np.pi * frequency * time), (channels, 1)).astype(np.float32)

    return make


# The four pretrained parts in the formats of the real ones, and a model composed of them: hidden sizes of 32, 2 layers.

WORDS = "hello there how are you i am fine thanks what did he say about the old dog of clara".split()


def _save_text(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from empathic.tiny.vocabulary import build_text_tokenizer

    tokenizer = build_text_tokenizer(WORDS)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,  # Qwen2.5's table too has more rows than its tokenizer has entries
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_vision(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    text |= dict(bos_token_id=1, eos_token_id=2)
    CLIPModel(CLIPConfig(vision_config={**vision, "patch_size": 16}, text_config=text)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)


def _save_audio(folder):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=100,  # windows of two seconds
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)


def _save_memory(folder):
    from transformers import MambaConfig, MambaForCausalLM

    from empathic.tiny.vocabulary import build_memory_tokenizer

    tokenizer = build_memory_tokenizer(WORDS)
    # As with Mamba-370M, the tokenizer of n entries has a table of a few more rows.
    MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer) + 3, hidden_size=32, state_size=8, num_hidden_layers=2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """`{"text", "vision", "audio", "memory"}`: folders of tiny pretrained parts, saved as the Hub's are."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for name, save in (
        ("text", _save_text),
        ("vision", _save_vision),
        ("audio", _save_audio),
        ("memory", _save_memory),
    ):
        save(folder / name)
    return {name: str(folder / name) for name in ("text", "vision", "audio", "memory")}


@pytest.fixture(scope="session")
def base_folder(parts, tmp_path_factory):
    """A whole checkpoint: model and processor composed of `parts`, with 4 queries and 2 frames."""
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    folder = str(tmp_path_factory.mktemp("base"))
    qformer = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(1)
    model = EmpathicForConditionalGeneration.from_parts_pretrained(
        **parts, num_query_tokens=4, num_frames=2, video_qformer_config=qformer, audio_qformer_config=qformer
    )
    model.save_pretrained(folder)
    EmpathicProcessor.from_parts_pretrained(**parts, num_query_tokens=4, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base_folder):
    from empathic.modeling_empathic import EmpathicForConditionalGeneration

    return EmpathicForConditionalGeneration.from_pretrained(base_folder)


@pytest.fixture(scope="session")
def add_adapter():
    """
    A function (model, PEFT config) that does what transformers' `model.add_adapter` does. That method of transformers
    5.24 asks for a newer PEFT than there is.
    """
    from peft import inject_adapter_in_model

    def add(model, config):
        inject_adapter_in_model(config, model)
        model._hf_peft_config_loaded = True

    return add


@pytest.fixture(scope="session")
def processor(base_folder):
    from empathic.processing_empathic import EmpathicProcessor

    return EmpathicProcessor.from_pretrained(base_folder)


# (memory_tokens, memory_rate): vectors of an utterance, and tokens for each vector.
MEMORY_SIZES = [(1, None), (2, None), (1, 4), (3, 2)]


@pytest.fixture(params=MEMORY_SIZES[1:], ids=lambda size: "-".join(map(str, size)))
def sized(request, model, processor):
    """The model and the processor with several memory vectors for an utterance."""
    import copy

    processor = copy.copy(processor)
    for part in (model.config, processor):
        part.memory_tokens, part.memory_rate = request.param
    return model.eval(), processor


@pytest.fixture(scope="session")
def clip(tmp_path_factory, grey_frames, tone):
    """A real mp4 of one second: H.264 picture and AAC sound."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return str(encode_media(path, frames=grey_frames(10), samples=tone(1.0)))


@pytest.fixture(scope="session")
def labeled_clips(tmp_path_factory, grey_frames, tone):
    """The folder of a prepared data set of four labeled clips with sound and picture, all in the split train."""
    import json

    from empathic.data_prep.corpora.folder import prepare_folder

    root, lines = tmp_path_factory.mktemp("labeled"), []
    (root / "raw").mkdir()
    for number in range(4):
        name = f"{number}.mp4"
        samples = tone(0.5, frequency=200 + 300 * number)
        encode_media(root / "raw" / name, frames=grey_frames(2 + 2 * number), samples=samples)
        line = {"dialogue_id": name, "turn": 0, "speaker": "clara", "text": "hello", "split": "train"}
        lines.append(line | {"emotion": ("happy", "sad")[number % 2], "file_name": name})
    (root / "raw" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_folder(root / "raw", root / "data", progress=False)
    return str(root / "data")


@pytest.fixture(scope="session")
def tiny_config():
    """A function (overrides) -> `EmpathicConfig` of hidden sizes 32 and 2 layers, for models of random weights."""
    from empathic.configuration_empathic import EmpathicConfig

    text = dict(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    whisper = dict(d_model=48, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, max_source_positions=20)

    def make(**overrides):
        parts = dict(
            text_config={"model_type": "qwen2", **text},
            vision_config={**tower, "image_size": 32, "patch_size": 16},
            audio_config=whisper,
            memory_config={
                "model_type": "mamba", "vocab_size": 50, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
            },
            video_qformer_config=tower,
            audio_qformer_config=tower,
            num_query_tokens=3,
            num_frames=2,
            video_token_id=111,
            audio_token_id=112,
            memory_token_id=113,
            mem_token_id=49,
        )  # fmt: skip
        return EmpathicConfig(**{**parts, **overrides})

    return make


@pytest.fixture(scope="session")
def recordings(tmp_path_factory, write_media, grey_frames, tone):
    """
    `data`, a folder of three dialogues a split, and `pairs`, preference rows with clips. Of the clips one can be seen
    and heard, one only heard, one only seen.
    """
    import json
    from types import SimpleNamespace

    from datasets import load_dataset

    from empathic.data_prep.corpora.folder import prepare_folder
    from empathic.data_prep.views import DialogueSamples

    raw = tmp_path_factory.mktemp("recordings")
    texts = ("hello there", "how are you", "i am fine thanks", "what did he say")
    lines = []
    for split in ("train", "validation"):
        for number, emotion in enumerate(("happy", "sad", "angry")):
            name = f"{split}{number}"
            frames = None if number == 1 else grey_frames(6)
            samples = None if number == 2 else tone(0.6, frequency=200 + 300 * number)
            file = raw / f"{name}.{'wav' if frames is None else 'mp4'}"
            write_media(
                file, frames=frames, samples=samples, **({"audio_codec": "pcm_s16le"} if frames is None else {})
            )
            for turn, text in enumerate(texts):
                line = {"dialogue_id": name, "turn": turn, "speaker": ("clara", "bot")[turn % 2], "text": text}
                line["split"] = split
                if turn % 2 == 0:
                    line |= {"emotion": emotion, "file_name": file.name}
                lines.append(line)
    (raw / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = tmp_path_factory.mktemp("data")
    prepare_folder(raw, data, progress=False)
    pairs = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation"):
        rows = [
            {
                "prompt": sample["prompt"],
                "chosen": [{"role": "assistant", "content": sample["reply"]}],
                "rejected": [{"role": "assistant", "content": "the old dog"}],
            }
            for sample in DialogueSamples(load_dataset(str(data), split=split))
        ]
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SimpleNamespace(data=str(data), pairs=str(pairs))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A `HubServer`, which this process and those that it starts take for the Hub, logged in as `me`."""
    import time
    from types import SimpleNamespace

    from huggingface_hub import constants, hf_api, utils
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    from hub_server import HubServer

    with HubServer() as server:
        for name, value in server.environment(tmp_path / "hf_home").items():
            monkeypatch.setenv(name, value)
        # The client read its environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        # transformers makes a client at its first use and keeps it, with the endpoint of that moment.
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf_home" / "token"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        yield server
        utils.close_session()


@pytest.fixture(scope="session")
def violations():
    """A function (browser page) -> what axe finds on it: rules and elements. It finds nothing if axe-core is not
    installed: `npm install --no-save axe-core`."""
    axe = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"

    def find(page):
        if not axe.is_file():
            return []
        if not page.evaluate("!!window.axe"):
            page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        return [(each["id"], [node["html"][:100] for node in each["nodes"]]) for each in found]

    return find
