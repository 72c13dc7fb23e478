"""What a GPU needs of installed packages."""

import importlib.metadata
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from train.config.provenance import record
from train.config.settings import parse
from train.runtime.gpu import KERNELS, installed, needs_delta_rule, unmet

H100, A100, B200 = (9, 0), (8, 0), (10, 0)
SOUND = {"torch": "2.13.0", "triton": "3.7.1", "flash-linear-attention": "0.6.0", "fla-core": "0.6.0"}


def without(*packages: str, **others: str) -> dict[str, str]:
    return {name: version for name, version in SOUND.items() if name not in packages} | others


@pytest.mark.parametrize("capability", [H100, A100, B200])
@pytest.mark.parametrize("delta_rule", [False, True])
def test_sound_packages_pass_on_every_gpu(capability, delta_rule):
    assert unmet(delta_rule, capability, SOUND) == []


@pytest.mark.parametrize(
    ("delta_rule", "capability", "versions", "said"),
    [
        (True, H100, without("fla-core"), ["flash-linear-attention is not installed", "[gpu]"]),
        (True, H100, without(**{"fla-core": "0.5.9"}), ["flash-linear-attention 0.5.9", "≥ 0.6", "[gpu]"]),
        (True, H100, without(triton="3.4.0"), ["triton 3.4.0", "Hopper", "pip install 'triton>=3.7.1'"]),
        (True, H100, without(triton="3.7.0"), ["triton 3.7.0", "Hopper", "pip install 'triton>=3.7.1'"]),
        (True, A100, without("triton"), ["triton is not installed", "pip install 'triton>=3.7.1'"]),
        (False, A100, without("triton"), ["triton is not installed", "pip install 'triton>=3.7.1'"]),
        (False, B200, without(torch="2.10.1"), ["torch 2.10.1", "≥ 2.11, or flash-attn", "pip install"]),
    ],
)
def test_what_is_missing_or_too_old_is_told_with_its_version_rule_and_fix(delta_rule, capability, versions, said):
    (told,) = unmet(delta_rule, capability, versions)
    assert all(part in told for part in said), told


@pytest.mark.parametrize(
    ("delta_rule", "capability", "versions"),
    [
        (True, None, {"torch": "2.5.0"}),  # on a CPU nothing is needed
        (False, H100, without("fla-core")),  # no delta rule
        (False, H100, without(triton="3.6.0")),  # what is wrong on Hopper is the delta rule
        (True, H100, without(triton="3.3.1")),
        (True, A100, without(triton="3.6.0")),
        (True, B200, without(triton="3.6.0")),
        (False, H100, without(**{"torch": "2.10.0", "flash-attn": "2.8.3"})),
        (False, H100, without(torch="2.11.0a0+git")),
    ],
)
def test_what_a_model_or_a_device_does_not_need_is_not_asked_for(delta_rule, capability, versions):
    assert unmet(delta_rule, capability, versions) == []


def test_all_that_is_wrong_is_told_at_once():
    assert len(unmet(True, H100, {"torch": "2.10.0", "triton": "3.5.0"})) == 3


def test_a_models_layers_say_whether_it_has_a_delta_rule():
    assert needs_delta_rule(SimpleNamespace(layer_types=["linear_attention", "full_attention"]))
    assert not needs_delta_rule(SimpleNamespace(layer_types=["full_attention"]))
    assert not needs_delta_rule(SimpleNamespace(layer_types=None)) and not needs_delta_rule(SimpleNamespace())


def test_the_gpu_extra_asks_for_what_is_checked():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["gpu"])
    assert extra.name == "flash-linear-attention"
    for version in ("0.5.9", "0.6.0"):
        found = without(**{"fla-core": version})
        assert extra.specifier.contains(Version(version)) == (unmet(True, H100, found) == [])


def test_a_run_keeps_the_gpu_and_the_versions_of_what_it_needs_where_that_is_installed(monkeypatch):
    monkeypatch.setattr("train.runtime.gpu.name", lambda: "NVIDIA H200")

    found = {"triton": "3.7.1", "flash-attn": "2.8.3"}

    def version(package: str) -> str:
        if package in KERNELS and package not in found:
            raise PackageNotFoundError(package)
        return found.get(package) or importlib.metadata.version(package)

    monkeypatch.setattr("train.runtime.gpu.version", version)
    assert installed(KERNELS) == {"triton": "3.7.1", "flash-attn": "2.8.3"}
    kept = yaml.safe_load(record(parse([], ""), {}))
    assert kept["gpu"] == "NVIDIA H200" and kept["versions"]["flash-attn"] == "2.8.3"
    assert {"torch", "deepspeed", "transformers", "peft", "bitsandbytes"} <= kept["versions"].keys()
