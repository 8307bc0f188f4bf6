"""`require`, seeds, and validation of the settings."""

import dataclasses
import math

import pytest
import torch

from shl import config
from shl.config import (
    DoseConfig,
    EvalConfig,
    FilterConfig,
    GenerateConfig,
    HealConfig,
    LoopConfig,
    VectorConfig,
    quantile_of,
)
from shl.utils.errors import ShlError, require
from shl.utils.seeds import generator_for, seed_for

CONFIGS = [kind for name, kind in vars(config).items() if name.endswith("Config")]


def test_require_raises_a_value_error_only_when_the_condition_fails():
    assert issubclass(ShlError, ValueError)
    require(True, "never")
    with pytest.raises(ShlError, match=r"^rank is 0\.$"):
        require(False, "rank is 0.")


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_are_frozen_documented_and_reject_unknown_names(kind):
    made = kind()
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, None)
    assert kind.__doc__
    with pytest.raises(TypeError, match="no_such_setting"):
        kind(no_such_setting=1)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (VectorConfig, {"contexts": 0}, "contexts is 0"),
        (VectorConfig, {"layers": ()}, "layers is empty"),
        (GenerateConfig, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (GenerateConfig, {"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens is 5"),
        (GenerateConfig, {"temperature": -0.1}, "temperature is -0.1"),
        (GenerateConfig, {"temperature": math.nan}, "temperature is nan"),
        (GenerateConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (GenerateConfig, {"top_p": 1.1}, "top_p is 1.1"),
        (GenerateConfig, {"top_k": -1}, "top_k is -1"),
        (FilterConfig, {"max_word_share": 1.5}, "max_word_share is 1.5"),
        (FilterConfig, {"max_tail_perplexity": math.inf}, "max_tail_perplexity is inf"),
        (FilterConfig, {"min_topic": -0.1}, "min_topic is -0.1"),
        (FilterConfig, {"min_topic": math.nan}, "min_topic is nan"),
        (DoseConfig, {"alpha": 0.0}, "alpha is 0, so all doses"),
        (DoseConfig, {"alpha": float("nan")}, "alpha is nan"),
        (DoseConfig, {"kappa_min": 0.0}, "kappa_min is 0.0"),
        (DoseConfig, {"target_survival": -0.5}, "target_survival is -0.5"),
        (HealConfig, {"rank": 0}, "rank is 0"),
        (HealConfig, {"sites": ()}, "sites is empty"),
        (HealConfig, {"sites": ("q", "w")}, "a site is 'w'"),
        (HealConfig, {"sites": ("q", "q")}, ".*names one twice"),
        (HealConfig, {"aggregate": "median"}, "aggregate is 'median'"),
        (HealConfig, {"aggregate": "p101"}, "aggregate is 'p101'"),
        (HealConfig, {"lam_schedule": "power", "lam_final": 0.1}, "lam_final is set"),
        (HealConfig, {"lam": 2.0, "lam_max": 1.0}, "lam_max is 1.0"),
        (HealConfig, {"lam_final": 100.0, "lam_max": 64.0}, "lam_max is 64.0"),
        (HealConfig, {"lam": 0.0}, "lam is 0, which calibration"),
        (HealConfig, {"max_grad_norm": 0.0}, "max_grad_norm is 0"),
        (HealConfig, {"lora_alpha": 1e39}, "lora_alpha is 1e[+]39, .* at most 3.40282e[+]38"),
        (HealConfig, {"lam_schedule": "power", "lam_power": math.nan}, "lam_power is nan"),
        (EvalConfig, {"confidence": 1.0}, "confidence is 1.0"),
        (EvalConfig, {"conflicts": 5}, "conflicts is 5, it must be even"),
        (EvalConfig, {"bootstrap": 100_001}, "bootstrap is 100001, .* at most 100000[.]$"),
        (LoopConfig, {"rounds": 0}, "rounds is 0"),
        (LoopConfig, {"rounds": 10_001}, "rounds is 10001, .* at least 1 and at most 10000[.]$"),
        (LoopConfig, {"seed": -1}, "seed is -1"),
        (LoopConfig, {"seed": 10**20}, "seed is 1(0){20}, .* at most 2147483647[.]$"),
    ],
)
def test_an_invalid_setting_is_named_with_its_value(kind, change, named):
    with pytest.raises(ShlError, match="^" + named):
        kind(**change)


@pytest.mark.parametrize("name", ["divergence", "reference", "lam_schedule"])
def test_an_invalid_option_is_rejected_with_the_allowed_ones(name):
    # Set by hand: the type checker of the tests would stop the value before the library does.
    made = object.__new__(HealConfig)
    for f in dataclasses.fields(HealConfig):
        object.__setattr__(made, f.name, "typo" if f.name == name else f.default)
    default = getattr(HealConfig, name)
    with pytest.raises(ShlError, match=f"^{name} is 'typo', it must be one of .*{default!r}"):
        made.__post_init__()


def test_the_recommended_method_is_the_default():
    heal = HealConfig()
    assert (heal.aggregate, heal.divergence, heal.reference) == ("rmse", "kl_rev", "base")
    assert (DoseConfig().target_survival, DoseConfig().kappa_min) == (0.75, 0.13)
    assert HealConfig(lam=0.0, calibrate=False).lam == 0
    assert config.LINEAR_SITES == ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize(
    ("name", "share"),
    [("p0", 0.0), ("p50", 0.5), ("p100", 1.0), ("p-1", None), ("p", None), ("pNaN", None)],
)
def test_quantiles_are_parsed(name, share):
    assert quantile_of(name) == share


def test_seeds_depend_on_every_part():
    parts = [(42,), (43,), (42, "dream"), (42, "dream", 0), (42, "dream", 1), (42, "dream", "1")]
    seeds = [seed_for(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(3, generator=generator_for(7, "x")).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    assert torch.rand(3, generator=generator_for(8, "x")).tolist() != draws[0]
