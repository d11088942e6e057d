"""Compatibility with the supported versions of transformers: names, versions, positions whose logits are kept."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from empathic.compat_empathic import NEWEST_TESTED, OLDEST_TESTED, keep_positions, logger, warn_if_untested
from empathic.trainers import EPOConfig
from empathic.trainers.compat import enable_activation_checkpointing
from empathic.trainers.stages import StageConfig

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr(logger, "warning_once", logged.append)
    return logged


@pytest.mark.parametrize("version", [OLDEST_TESTED + ".0", "5.20.2", NEWEST_TESTED + ".0", NEWEST_TESTED + ".3"])
def test_tested_versions_are_met_in_silence(version, warnings):
    warn_if_untested(version)
    assert not warnings


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.0rc1", "10.0"])
def test_a_newer_version_is_named_with_the_tested_range(version, warnings):
    warn_if_untested(version)
    assert len(warnings) == 1 and all(text in warnings[0] for text in (version, OLDEST_TESTED, NEWEST_TESTED))


def test_the_model_warns_when_it_is_made(tiny_config, warnings, monkeypatch):
    from empathic import modeling_empathic

    monkeypatch.setattr(modeling_empathic, "warn_if_untested", lambda: warn_if_untested("99.0"))
    modeling_empathic.EmpathicForConditionalGeneration(tiny_config())
    assert warnings and "99.0" in warnings[0]


def test_the_declared_range_is_the_tested_one():
    needed = [Requirement(line) for line in requires("empathic") if line.startswith("transformers")]
    plain = next(line for line in needed if line.marker is None)
    assert plain.specifier.contains(f"{OLDEST_TESTED}.0") and plain.specifier.contains(f"{NEWEST_TESTED}.99")
    below = f"{Version(OLDEST_TESTED).major}.{Version(OLDEST_TESTED).minor - 1}.99"
    assert not plain.specifier.contains(below)
    minors = re.search(r"^MINORS := (.+)$", MAKEFILE.read_text(), re.M)[1].split()
    assert minors[0] == OLDEST_TESTED and minors[-1] == NEWEST_TESTED


@pytest.mark.parametrize(
    "kept, expected",
    [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, [[2, 3], [6, 7]]),
        (torch.tensor([0, 3]), [[0, 3], [4, 7]]),
        (torch.tensor([[1], [3]]), [[1], [7]]),
        (torch.tensor([[True, False, True, False], [False, False, False, True]]), [0, 2, 7]),
    ],
)
def test_positions_whose_logits_are_kept(kept, expected):
    hidden = torch.arange(8.0).reshape(2, 4, 1).expand(2, 4, 3)
    found = keep_positions(hidden, kept)
    assert found[..., 0].tolist() == expected and found.shape[-1] == 3
    if hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        assert torch.equal(found, transformers.modeling_utils.slice_logits_to_keep(hidden, kept))


@pytest.mark.parametrize("config_class", [EPOConfig, StageConfig])
def test_activation_checkpointing_has_one_name_under_every_version(config_class, tmp_path):
    def settings(**given):
        args = config_class(str(tmp_path), use_cpu=True, report_to="none", **given)
        return args.activation_checkpointing, args.gradient_checkpointing, args.activation_checkpointing_kwargs

    assert settings() == (False, False, None)
    assert settings(activation_checkpointing=True) == (True, True, None)
    kwargs = {"use_reentrant": True}
    assert settings(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs) == (True, True, kwargs)
    text = '{"use_reentrant": true}'  # as on a command line
    assert settings(activation_checkpointing=True, activation_checkpointing_kwargs=text) == (True, True, kwargs)


def test_activation_checkpointing_is_switched_on(model):
    enable_activation_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
