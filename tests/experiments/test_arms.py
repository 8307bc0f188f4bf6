"""The arms: settings that differ as they say, shared stages bit for bit, and matched coherence."""

import json
from dataclasses import replace

import pytest
from helpers import kl_by_hand, lenient, log_p_by_hand, one_sentence, small_loop
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.arms import __main__ as program
from experiments.arms.__main__ import ArmsConfig, run_arms
from experiments.arms.catalogue import ARMS, CORE, chosen
from experiments.arms.compare import Point, against, points, reach, spread
from experiments.arms.doses import read_doses
from experiments.arms.plots import plane, text_kl
from experiments.arms.stage_cache import same_result
from experiments.arms.tables import sentence
from experiments.arms.text_kl import read_texts, summary
from experiments.record.reader import read
from experiments.record.settings import RunConfig
from experiments.run import study
from shl.config import DoseConfig, LoopConfig
from shl.hooks.vector import SteeringVector
from shl.models.generate import Completion
from shl.models.tiny import tiny_gemma
from shl.models.tokens import Prompt, encode
from shl.utils.errors import ShlError

LOOP = small_loop()


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three arms of one seed, and what every stage of them cost."""
    out = tmp_path_factory.mktemp("arms")
    config = ArmsConfig(
        model="tiny", arms=("rmse", "none", "prompted"), seeds=(42,), out=out, loop=LOOP
    )
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch, reasons=lambda text: ["incoherent"] if len(set(text)) % 2 else [])
        patch.setattr("experiments.arms.text_kl.SHORTEST", 4)
        patch.setattr(program, "load_model", lambda name, device=None: tiny_gemma())
        run_arms(config, quiet())
    return out


def events_of(folder):
    _, events, texts = read(folder)
    kept = [{k: v for k, v in e.items() if k not in ("seconds", "files")} for e in events]
    return kept, texts


def test_an_arm_with_shared_stages_is_the_run_that_computed_them_all(folder, tmp_path):
    for name in ("none", "prompted"):
        config = RunConfig(model="tiny", out=tmp_path / name, loop=ARMS[name].change(LOOP))
        with pytest.MonkeyPatch.context() as patch:
            lenient(patch, reasons=lambda text: ["incoherent"] if len(set(text)) % 2 else [])
            study(config, quiet(), load=tiny_gemma)
        assert events_of(folder / name / "seed42") == events_of(tmp_path / name)


def test_shared_stages_are_not_computed_again(folder, tmp_path, monkeypatch):
    import shl.method.loop

    seen = []
    for name in ("measure", "extract_vector", "judge", "train_adapter"):
        made = getattr(shl.method.loop, name)
        monkeypatch.setattr(
            shl.method.loop, name, lambda *a, n=name, f=made, **k: (seen.append(n), f(*a, **k))[1]
        )
    config = replace(
        ArmsConfig(model="tiny", arms=("mean",), seeds=(42,), out=folder, loop=LOOP),
    )
    lenient(monkeypatch, reasons=lambda text: ["incoherent"] if len(set(text)) % 2 else [])
    monkeypatch.setattr(program, "load_model", lambda name, device=None: tiny_gemma())
    run_arms(config, quiet())
    _, events, _ = read(folder / "mean" / "seed42")
    judged = [e for e in events if e["round"] == 1 and e["event"] in ("probe", "batch")]
    # Round 0 is copied up to the training; its end and all of round 1 are computed. Measuring
    # judges free samples.
    last = ["train_adapter", "measure", "judge"]
    assert seen == [*last, "extract_vector", *["judge"] * len(judged), *last]
    seen.clear()
    run_arms(config, quiet())
    assert seen == []


def test_the_comparison_has_every_arm_every_dose_and_all_three_kinds_asked_for(folder, monkeypatch):
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
    assert point.mass == pytest.approx(healed["coherence"])
    plus, minus = stages["prompted+", -1], stages["prompted-", -1]
    half = sum(
        s * (plus["nats"][f] - minus["nats"][f]) for f, s in (("care", 1), ("authority", -1))
    )
    assert found["persona"][42][1].trait == pytest.approx(half / 4, abs=1e-9)
    # The dose at the top of the ladder is where the round's own steered stage was read.
    lines = read_doses(folder / "steered" / "seed42" / "doses.jsonl")
    assert lines[-1]["nats"] == pytest.approx(stages["steered", 0]["nats"], abs=1e-6)
    files = {"arms.md", "arms.json", "arms.png", "text_kl.png", "report.html"}
    assert files <= {p.name for p in folder.iterdir()}
    told = json.loads((folder / "arms.json").read_text())
    assert {row["arm"] for row in told["arms"]} == set(found)


def test_each_kind_of_text_is_measured_under_what_made_it(folder):
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


def test_the_catalogue_changes_what_it_says_and_nothing_else():
    loop = LoopConfig()
    assert ARMS["rmse"].change(loop) == loop
    assert ARMS["none"].change(loop) == replace(loop, heal=replace(loop.heal, divergence="none"))
    still = DoseConfig(alpha=0.0, walk=False)
    assert ARMS["unsteered"].change(loop) == replace(loop, dose=still)
    assert ARMS["prompted"].change(loop) == replace(loop, dose=still, prompted=True)
    settings = [arm.change(loop) for arm in ARMS.values()]
    assert len(set(map(repr, settings))) == len(settings)
    assert ARMS["p95-tau0.25"].change(loop).heal.tau == 0.25
    assert [arm.name for arm in chosen(("p95", "core"))] == list(CORE)
    with pytest.raises(ShlError) as error:
        chosen(("rsme",))
    assert "there is no arm 'rsme'" in one_sentence(error)


def test_shared_stages_depend_on_no_setting_that_differs():
    loop = LoopConfig()
    none, still, random = (ARMS[n].change(loop) for n in ("none", "unsteered", "random"))
    first = ("vector", "probe", "batch", "steered", "tinymfv:steered")
    after = ("healing", "healed", "tinymfv:healed", "round", "token_kl")
    assert all(same_result(name, 0, none, loop) for name in first)
    assert not any(same_result(name, 0, loop, loop) for name in after)
    assert not any(same_result(name, 1, none, loop) for name in (*first, *after))
    assert same_result("base", -1, random, loop)
    assert not same_result("base", -1, replace(loop, seed=1), loop)
    assert same_result("vector", 0, still, loop)
    assert not same_result("vector", 0, random, loop)
    assert not any(same_result(name, 0, still, loop) for name in first[1:])
    # The probe's draws and the texts are those of a seed.
    assert not same_result("probe", 0, replace(loop, seed=1), loop)


def at(coherence, trait, seed=0):
    return Point("a", seed, "0", trait, (trait, trait), coherence, 1.0)


def test_reach_is_the_best_shift_at_the_level_along_the_path():
    # From (1, 0) straight to (0.5, 1.0): at 0.9, a fifth of the way, 0.2; then back to (0.9, 0.6).
    path = [at(0.5, 1.0), at(0.9, 0.6)]
    assert reach(path[:1], 0.9) == pytest.approx(0.2)
    assert reach(path, 0.9) == pytest.approx(0.6)
    assert reach(path, 0.7) == pytest.approx(0.8)
    assert reach(path, 0.5) == pytest.approx(1.0)
    # An arm that only moves against the trait has reached nothing.
    assert reach([at(1.0, -1.0)], 0.9) == 0.0


@given(
    path=st.lists(
        st.tuples(st.floats(0, 1), st.floats(-2, 2)).map(lambda x: at(*x)), min_size=1, max_size=5
    ),
    levels=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_a_stricter_level_never_reaches_further(path, levels):
    assert reach(path, max(levels)) <= reach(path, min(levels)) + 1e-12


def test_coherence_is_the_worse_of_the_two_and_never_above_base():
    assert Point("a", 0, "0", 1.0, (1, 1), 1.4, 1.1).coherence == 1.0
    assert Point("a", 0, "0", 1.0, (1, 1), 0.8, 0.3).coherence == 0.3


def test_a_difference_is_paired_by_seed_and_needs_an_interval():
    def arm(*traits):
        return {seed: [at(1.0, t, seed)] for seed, t in enumerate(traits)}

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
    assert (
        against({"rmse": arm(1.0), "none": arm(0.0)}, "rmse", "none", 0.9)["verdict"] == "undecided"
    )


def test_the_interval_over_seeds_is_students_at_any_number_and_confidence():
    # Tables of t: 1.729 for 19 degrees of freedom at 90 %, 2.093 at 95 %, 1.638 for 3 at 80 %.
    twenty = [float(k % 2) for k in range(20)]  # mean 0.5, variance 5 / 19
    error = (5 / 19 / 20) ** 0.5
    for values, confidence, half in (
        (twenty, 0.95, 2.093 * error),
        (twenty, 0.9, 1.729 * error),
        ([0.0, 0.0, 1.0, 1.0], 0.8, 1.638 * (1 / 3 / 4) ** 0.5),
    ):
        assert spread(values, confidence) == pytest.approx((0.5 - half, 0.5 + half), abs=3e-4)


def test_a_comparison_has_the_confidence_of_its_runs():
    def arm(*traits):
        return {k: [replace(at(1.0, t, k), confidence=0.8)] for k, t in enumerate(traits)}

    found = {"rmse": arm(1.0, 1.1, 1.2), "mean": arm(0.9, 1.3, 1.1)}
    verdict = against(found, "rmse", "mean", 0.9)
    # 1.886 x 0.1732 / sqrt(3)
    assert verdict["interval"] == pytest.approx((-0.1886, 0.1886), abs=1e-3)
    assert "(80 % -0.19 to +0.19, 3 seeds)" in sentence(verdict)


def test_a_persona_is_met_at_its_own_coherence_on_the_harder_reading():
    persona = [
        Point("persona", 0, "raw", 0.1, (0, 0), 0.75, 1.0),
        Point("persona", 0, "half", 0.3, (0, 0), 0.75, 1.0),
    ]
    # (1, 0) to (0.5, 1.0) passes 0.75 at 0.5.
    found = {"rmse": {0: [at(0.5, 1.0)]}, "persona": {0: persona}}
    assert against(found, "rmse", "persona", 0.97)["each"] == [pytest.approx(0.5 - 0.3)]


def test_groups_of_text_separate_by_auc():
    def text(kind, kl):
        return {"kind": kind, "kl": kl}

    # Same mean of 1; the incoherent ones have it all in one token of four: rmse 2, max 4.
    lines = [text("prompted", [1.0] * 4)] * 3 + [text("incoherent", [0.0, 0.0, 0.0, 4.0])] * 3
    found = summary(lines)
    assert found["medians"]["incoherent"] == {"mean": 1.0, "rmse": 2.0, "max": 4.0,
                                              "p95": pytest.approx(3.4)}  # fmt: skip
    assert found["auc"]["prompted < incoherent"]["mean"] == 0.5
    assert found["auc"]["prompted < incoherent"]["rmse"] == 1.0
    assert found["auc"]["kept < incoherent"]["rmse"] is None
    assert found["spiky"]["prompted"] == 1.0
    assert found["spiky"]["incoherent"] == 2.0


def test_the_plane_has_the_mean_of_each_arm_from_base_and_the_range_over_seeds():
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


def test_the_text_kl_chart_is_the_share_of_texts_at_or_below_each_aggregate():
    texts = [{"kind": "kept", "kl": [0.1, 0.3]}, {"kind": "kept", "kl": [0.4, 1.0]}]
    mean, *_, largest = text_kl(texts, 0.5).axes
    # Means 0.2 and 0.7, maxima 0.3 and 1; each of two texts is a half.
    for panel, values in ((mean, [0.2, 0.7]), (largest, [0.3, 1.0])):
        line, tau = panel.lines
        assert list(line.get_xdata())[1:] == pytest.approx(values)
        assert list(line.get_ydata())[1:] == [0.5, 1.0]
        assert list(tau.get_xdata()) == [0.5, 0.5]


def test_a_finished_arm_of_other_settings_is_not_taken_for_this_one(folder, monkeypatch):
    lenient(monkeypatch)
    monkeypatch.setattr(program, "load_model", lambda name, device=None: pytest.fail("loaded"))
    loop = replace(LOOP, heal=replace(LOOP.heal, tau=0.25))
    with pytest.raises(ShlError) as error:
        run_arms(
            ArmsConfig(model="tiny", arms=("rmse",), seeds=(42,), out=folder, loop=loop), quiet()
        )
    assert "has loop.heal.tau 0.01, this run has 0.25" in one_sentence(error)


def test_a_seed_of_its_own_is_refused(tmp_path):
    loop = replace(LOOP, seed=7)
    with pytest.raises(ShlError) as error:
        run_arms(ArmsConfig(model="tiny", out=tmp_path, loop=loop), quiet())
    assert "seed is 7" in one_sentence(error)
