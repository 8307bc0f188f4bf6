"""The arms: their settings, stages that they share bit for bit, and their comparison."""

import json
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from helpers import kl_by_hand, lenient, log_p_by_hand, one_sentence, small_loop
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.arms import compare
from experiments.arms.__main__ import ArmsConfig, run_arms
from experiments.arms.catalogue import ARMS, GROUPS, chosen
from experiments.arms.compare import Point, _measured, _point, against, points, reach, spread
from experiments.arms.doses import read_doses
from experiments.arms.plots import plane, text_kl
from experiments.arms.stage_cache import same_result
from experiments.arms.tables import sentence
from experiments.arms.text_kl import read_texts, summary
from experiments.questions.measurements import Measurements
from experiments.record.reader import RecordReader, read
from experiments.record.settings import RunConfig
from experiments.run import study
from shl.config import DoseConfig, LoopConfig
from shl.hooks.vector import SteeringVector
from shl.method import loop as method_loop
from shl.models.generate import Completion
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

LOOP = small_loop(
    dose=DoseConfig(
        alpha=1.5, kappa_min=0.2, rungs=2, probe_size=2, min_train=6, batch_size=4, max_batches=8
    )
)
"""With batches enough for the rule of `run`, which drops about half of the texts."""
QUIET = Console(quiet=True)


def run(monkeypatch, out, *arms, loop=LOOP, load=tiny_gemma):
    """Run arms on the tiny model; the filter drops texts with an odd number of characters."""
    lenient(monkeypatch, reasons=lambda text: ["incoherent"] if len(set(text)) % 2 else [])
    monkeypatch.setattr("experiments.arms.text_kl.SHORTEST", 4)
    monkeypatch.setattr("experiments.run.load_model", lambda name, **_: load())
    run_arms(ArmsConfig(model=("tiny",), arms=arms, seeds=(42,), out=out, loop=loop), QUIET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three arms of one seed."""
    out = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, out, "rmse", "none", "prompted")
    return out


def events_of(folder):
    _, events, texts = read(folder)
    kept = [{k: v for k, v in e.items() if k not in ("seconds", "cpu", "files")} for e in events]
    return kept, texts


@pytest.mark.parametrize("name", ["none", "prompted"])
def test_arm_with_shared_stages_equals_a_run_of_its_own(folder, tmp_path, monkeypatch, name):
    lenient(monkeypatch, reasons=lambda text: ["incoherent"] if len(set(text)) % 2 else [])
    study(
        RunConfig(model="tiny", out=tmp_path, loop=ARMS[name].change(LOOP)), QUIET, load=tiny_gemma
    )
    assert events_of(folder / name / "seed42") == events_of(tmp_path)


def test_shared_stages_are_not_computed_again(folder, monkeypatch):
    seen = []
    for name in ("measure", "extract_configured", "judge", "train_adapter"):
        made = getattr(method_loop, name)
        monkeypatch.setattr(
            method_loop, name, lambda *a, n=name, f=made, **k: (seen.append(n), f(*a, **k))[1]
        )
    run(monkeypatch, folder, "mean")
    _, events, _ = read(folder / "mean" / "seed42")
    judged = [e for e in events if e["round"] == 1 and e["event"] in ("probe", "batch")]
    # Round 0 is copied up to the training; its end and all of round 1 are computed. Measuring
    # judges free samples.
    last = ["train_adapter", "measure", "judge"]
    assert seen == [*last, "extract_configured", *["judge"] * len(judged), *last]
    seen.clear()
    run(monkeypatch, folder, "mean")
    assert seen == []


def test_comparison_has_the_points_of_every_arm_and_dose(folder, monkeypatch):
    lenient(monkeypatch)
    found = points(folder)
    assert {"rmse", "none", "prompted", "steered", "persona"} <= set(found)
    assert [p.label for p in found["rmse"][42]] == ["0", "1"]
    # Two rungs, 0.2 and 1 times alpha 1.5.
    assert [p.label for p in found["steered"][42]] == ["0.30", "1.50"]
    _, events, _ = read(folder / "rmse" / "seed42")
    stages = {(e["stage"], e["round"]): e for e in events if e["event"] == "stage"}
    base, healed = stages["base", -1], stages["healed", 1]
    point = found["rmse"][42][1]
    # care_auth: care up, authority down.
    care, authority = (healed["nats"][f] - base["nats"][f] for f in ("care", "authority"))
    assert point.trait == pytest.approx((care - authority) / 2, abs=1e-9)
    assert point.interval[0] <= point.trait <= point.interval[1]
    assert point.context == pytest.approx(healed["coherence"])
    plus, minus = stages["prompted+", -1], stages["prompted-", -1]
    care, authority = (plus["nats"][f] - minus["nats"][f] for f in ("care", "authority"))
    assert found["persona"][42][1].trait == pytest.approx((care - authority) / 4, abs=1e-9)
    # One of the doses is that of the round's own steered stage.
    steered = stages["steered", 0]
    lines = read_doses(folder / "steered" / "seed42" / "doses.jsonl")
    (line,) = [e for e in lines if e["dose"] == pytest.approx(steered["dose"])]
    assert line["nats"] == pytest.approx(steered["nats"], abs=1e-6)
    own = {e["instrument"]: e["items"] for e in events if e["event"] == "items"
           and (e["stage"], e["round"]) == ("steered", 0)}  # fmt: skip
    for name, items in own.items():
        assert line["items"][name] == pytest.approx(items, abs=1e-4)
    assert {*own} == {"context", "kl"}
    files = {"arms.md", "arms.json", "arms.png", "text_kl.png", "report.html"}
    assert files <= {p.name for p in folder.iterdir()}
    written = json.loads((folder / "arms.json").read_text())
    assert {row["arm"] for row in written["arms"]} == set(found)


def test_one_instrument_reads_the_trait_of_all_arms(folder, monkeypatch):
    """By its own record the prompted arm, which no vector steers, would not read the cloze."""
    valid = cached_property(lambda m: m.steered[0]["dose"] != 0)
    valid.__set_name__(Measurements, "reads_cloze")
    monkeypatch.setattr(Measurements, "reads_cloze", valid)
    seen, point = {}, compare._point
    monkeypatch.setattr(
        compare, "_point", lambda m, *a: seen.setdefault(a[0], m.reads_cloze) and point(m, *a)
    )
    points(folder)
    assert {"rmse", "none", "prompted", "persona", "steered"} <= set(seen)
    assert all(seen.values()), seen


def test_kl_of_a_text_is_that_of_the_model_that_wrote_it(folder):
    lines = read_texts(folder / "steered" / "seed42" / "kinds.jsonl")
    assert {line["kind"] for line in lines} == {"prompted", "kept", "incoherent"}
    model = tiny_gemma()
    vector = SteeringVector.load(folder / "rmse/seed42/rounds/0/vector.safetensors")
    _, _, texts = read(folder / "rmse" / "seed42")
    for line in lines:
        (text,) = [
            t for t in texts
            if (t["text"], t["prompt"], t["dose"]) == (line["text"], line["prompt"], line["dose"])
            and t["round"] <= 0 and t["stage"] in ("prompted+", "probe", "batch")
        ][:1]  # fmt: skip
        assert ("incoherent" in text["reasons"]) == (line["kind"] == "incoherent")
        persona = text["persona"]
        assert (persona is not None) == (line["kind"] == "prompted")

        def completion(persona, text=text):
            prompt = Prompt(text["prompt"], persona)
            ids = tuple(encode(model, prompt))
            return Completion(prompt, text["text"], tuple(text["tokens"]), ids, text["dose"])

        base = log_p_by_hand(model, completion(None))
        with vector.steering(model, text["dose"]):
            made = log_p_by_hand(model, completion(persona))
        assert line["kl"] == pytest.approx(kl_by_hand(made, base).tolist(), abs=2e-5)
    # Zeros would agree with zeros.
    assert max(max(line["kl"]) for line in lines) > 1e-3


def test_arms_change_only_their_own_settings():
    loop = LoopConfig()
    assert ARMS["rmse"].change(loop) == loop
    assert ARMS["none"].change(loop) == replace(loop, heal=replace(loop.heal, divergence="none"))
    still = DoseConfig(alpha=0.0, walk=False)
    assert ARMS["unsteered"].change(loop) == replace(loop, dose=still)
    assert ARMS["prompted"].change(loop) == replace(loop, dose=still, prompted=True)
    settings = [arm.change(loop) for arm in ARMS.values()]
    assert len(set(map(repr, settings))) == len(settings)
    assert ARMS["p95-tau0.25"].change(loop).heal.tau == 0.25
    assert [arm.name for arm in chosen(("p95", "core"))] == list(GROUPS["core"])
    assert not GROUPS.keys() & ARMS.keys()
    assert [arm.name for arm in chosen(("on-policy",))] == ["rmse", "online", "online-reward"]
    with pytest.raises(ShlError) as error:
        chosen(("rsme",))
    assert "there is no arm 'rsme'" in one_sentence(error)


def test_stages_are_shared_only_between_runs_with_equal_results():
    loop = LoopConfig()
    none, still, random = (ARMS[n].change(loop) for n in ("none", "unsteered", "random"))
    first = ("vector", "probe", "batch", "steered", "tinymfv:steered")
    after = ("healing", "healed", "tinymfv:healed", "round", "token_kl")
    assert all(same_result(name, 0, none, loop) for name in first)
    assert not any(same_result(name, 0, loop, loop) for name in after)
    assert not any(same_result(name, 1, none, loop) for name in (*first, *after))
    assert same_result("base", -1, random, loop)
    assert not same_result("base", -1, replace(loop, seed=1), loop)
    for stage, changes in (
        ("generate", {"max_new_tokens": 5}),
        ("filter", {"min_words": 1}),
        ("eval", {"samples": 3}),
    ):
        other = replace(loop, **{stage: replace(getattr(loop, stage), **changes)})
        assert not same_result("base", -1, other, loop), stage
    elsewhere = replace(loop, vector=replace(loop.vector, layers=(1, 2)))
    assert same_result("nulls:cloze", -1, random, loop)
    assert not same_result("nulls:cloze", -1, elsewhere, loop)
    assert same_result("base", -1, elsewhere, loop)
    assert same_result("vector", 0, still, loop)
    assert not same_result("vector", 0, random, loop)
    assert not same_result("vector", 0, replace(loop, seed=1), loop)
    assert not any(same_result(name, 0, still, loop) for name in first[1:])
    # The probe's draws and the texts are those of a seed.
    assert not same_result("probe", 0, replace(loop, seed=1), loop)


def at(coherence, trait, seed=0):
    return Point("a", seed, "0", trait, (trait, trait), coherence, 1.0)


def test_reach_is_the_largest_shift_along_the_path_at_the_level():
    # From (1, 0) straight to (0.5, 1.0): at 0.9, a fifth of the way, 0.2; then back to (0.9, 0.6).
    path = [at(0.5, 1.0), at(0.9, 0.6)]
    assert reach(path[:1], 0.9) == pytest.approx(0.2)
    assert reach(path, 0.9) == pytest.approx(0.6)
    assert reach(path, 0.7) == pytest.approx(0.8)
    assert reach(path, 0.5) == pytest.approx(1.0)
    # An arm that only moves against the trait reaches 0.
    assert reach([at(1.0, -1.0)], 0.9) == 0.0


@given(
    path=st.lists(
        st.tuples(st.floats(0, 1), st.floats(-2, 2)).map(lambda x: at(*x)), min_size=1, max_size=5
    ),
    levels=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_a_stricter_level_never_reaches_further(path, levels):
    assert reach(path, max(levels)) <= reach(path, min(levels)) + 1e-12


def test_coherence_is_the_lower_of_mass_and_survival_and_at_most_1():
    assert Point("a", 0, "0", 1.0, (1, 1), 1.4, 1.1).coherence == 1.0
    assert Point("a", 0, "0", 1.0, (1, 1), 0.8, 0.3).coherence == 0.3


def arm(*traits, confidence=0.95):
    return {k: [replace(at(1.0, t, k), confidence=confidence)] for k, t in enumerate(traits)}


def test_difference_of_arms_is_paired_by_seed_and_needs_an_interval():
    found = {"rmse": arm(1.0, 1.1, 1.2), "none": arm(0.5, 0.6, 0.7), "mean": arm(0.9, 1.3, 1.1)}
    better = against(found, "rmse", "none", 0.9)
    # Each seed differs by 0.5, so the interval has no width.
    assert better["verdict"] == "yes"
    assert better["interval"] == pytest.approx((0.5, 0.5))
    assert against(found, "none", "rmse", 0.9)["verdict"] == "no"
    # 0.1, -0.2, 0.1: mean 0, half width 4.303 x 0.1732 / sqrt(3) = 0.43.
    unclear = against(found, "rmse", "mean", 0.9)
    assert unclear["verdict"] == "undecided"
    assert unclear["interval"] == pytest.approx((-0.4303, 0.4303), abs=1e-3)
    single = against({"rmse": arm(1.0), "none": arm(0.0)}, "rmse", "none", 0.9)
    assert single["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("count", "confidence", "t"), [(20, 0.95, 2.093), (20, 0.9, 1.729), (4, 0.8, 1.638)]
)
def test_interval_over_seeds_is_students_t(count, confidence, t):
    # t from tables; half zeros and half ones have mean 0.5 and variance n / 4 / (n - 1).
    half = t * (1 / 4 / (count - 1)) ** 0.5
    values = [float(k % 2) for k in range(count)]
    assert spread(values, confidence) == pytest.approx((0.5 - half, 0.5 + half), abs=3e-4)

    # At the runs' own confidence of 80 %: 1.886 x 0.1732 / sqrt(3).
    found = {"rmse": arm(1.0, 1.1, 1.2, confidence=0.8), "mean": arm(0.9, 1.3, 1.1)}
    loose = against(found, "rmse", "mean", 0.9)
    assert loose["interval"] == pytest.approx((-0.1886, 0.1886), abs=1e-3)
    assert "(80 % -0.19 to +0.19, 3 seeds)" in sentence(loose)


def test_persona_is_compared_at_its_own_coherence_by_its_larger_shift():
    # (1, 0) to (0.5, 1.0) passes 0.75 at 0.5.
    found = {"rmse": {0: [at(0.5, 1.0)]}, "persona": {0: [at(0.75, 0.1), at(0.75, 0.3)]}}
    assert against(found, "rmse", "persona", 0.97)["each"] == [pytest.approx(0.5 - 0.3)]


def test_summary_of_groups_of_text_has_medians_and_auc():
    # Same mean of 1; the incoherent ones have it all in one token of four: rmse 2, max 4.
    even = {"kind": "prompted", "kl": [1.0] * 4}
    found = summary([even] * 3 + [{"kind": "incoherent", "kl": [0.0, 0.0, 0.0, 4.0]}] * 3)
    expected = {"mean": 1.0, "rmse": 2.0, "max": 4.0, "p95": pytest.approx(3.4)}
    assert found["medians"]["incoherent"] == expected
    by_aggregate = found["auc"]["prompted < incoherent"]
    assert (by_aggregate["mean"], by_aggregate["rmse"]) == (0.5, 1.0)
    assert found["auc"]["kept < incoherent"]["rmse"] is None
    assert (found["spiky"]["prompted"], found["spiky"]["incoherent"]) == (1.0, 2.0)


def test_plane_has_means_over_seeds_and_their_range():
    def path(*traits):
        return [Point("a", 0, str(i), t, (t - 1, t + 1), 0.5, 0.8) for i, t in enumerate(traits)]

    mass, survival = plane({"rmse": {0: path(1.0, 2.0), 1: path(2.0, 4.0)}, "none": {0: path(7.0)},
                            "persona": {0: path(0.5)}, "mean": {0: []}}).axes  # fmt: skip
    lines = {line.get_label(): line for line in mass.lines}
    assert list(lines["rmse"].get_xdata()) == [1.0, 0.5, 0.5]
    assert list(lines["rmse"].get_ydata()) == [0.0, 1.5, 3.0]
    assert list(lines["persona"].get_ydata()) == [0.5]
    assert "mean" not in lines
    spans = [part[:, 1].tolist() for lines in mass.collections for part in lines.get_segments()]
    # rmse: least and greatest seed; none: its interval.
    assert {(1.0, 2.0), (2.0, 4.0), (6.0, 8.0)} <= set(map(tuple, spans))
    assert list(survival.lines[0].get_xdata()) == [1.0, 0.8, 0.8]
    assert [text.get_text() for text in mass.texts] == ["0", "1", "0", "0"]


def test_text_kl_chart_is_the_ecdf_of_each_aggregate():
    texts = [{"kind": "kept", "kl": [0.1, 0.3]}, {"kind": "kept", "kl": [0.4, 1.0]}]
    mean, *_, largest = text_kl(texts, 0.5).axes
    # Means 0.2 and 0.7, maxima 0.3 and 1; each of two texts is a half.
    for panel, values in ((mean, [0.2, 0.7]), (largest, [0.3, 1.0])):
        line, tau = panel.lines
        assert list(line.get_xdata())[1:] == pytest.approx(values)
        assert list(line.get_ydata())[1:] == [0.5, 1.0]
        assert list(tau.get_xdata()) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (replace(LOOP, heal=replace(LOOP.heal, tau=0.25)), "has loop.heal.tau 0.01, this run has"),
        (replace(LOOP, seed=7), "seed is 7"),
    ],
)
def test_finished_arm_of_other_settings_and_own_seed_are_rejected(
    folder, monkeypatch, loop, message
):
    with pytest.raises(ShlError) as error:
        run(monkeypatch, folder, "rmse", loop=loop, load=lambda: pytest.fail("loaded"))
    assert message in one_sentence(error)


def test_survival_is_that_of_base(folder):
    past = RecordReader(folder / "rmse" / "seed42")
    base, healed = (next(e for e in past.events if e.get("stage") == s) for s in ("base", "healed"))
    base["survival"], healed["survival"] = 0.8, 0.2
    assert _point(_measured(past), "rmse", 42, "1", healed).survival == pytest.approx(0.25)


def test_engine_dtype_and_device_map_reach_the_model(monkeypatch, tmp_path):
    asked = {}

    def load(name, **settings):
        asked.update(settings)
        raise ShlError("that is enough.")

    monkeypatch.setattr("experiments.run.load_model", load)
    options = {"engine": "bridge", "dtype": "bfloat16", "device_map": "auto"}
    config = ArmsConfig(model=("tiny",), arms=("rmse",), seeds=(42,), out=tmp_path, **options)
    with pytest.raises(ShlError, match="that is enough"):
        run_arms(config, QUIET)
    assert asked == options | {"device": None, "dtype": torch.bfloat16}
