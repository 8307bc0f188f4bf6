"""The loop at the smallest scale: order, hooks, reuse of probes, errors, and repeatability."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import hook_count, lenient, one_sentence, small_loop, with_drawn_contexts

from shl.config import DoseConfig
from shl.hooks.bake import baked
from shl.hooks.handle import handles_on
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.method.filters import Verdict
from shl.method.heal import train_adapter
from shl.method.loop import StarvedError, baselines, love
from shl.method.stages import Observer
from shl.models.tiny import tiny_gemma
from shl.utils.seeds import seed_for

AXIS = load_axis("care_auth")
CONFIG = small_loop()
BAND = (1, 2, 3)
STAGES = ("stage", "vector", "probe", "batch", "healed", "reading")


class Log(Observer):
    """Records the calls of every `save` method and of `on_step`: method, index, other arguments."""

    def __init__(self):
        self.calls = []
        for name in (*(f"save_{stage}" for stage in STAGES), "on_step"):
            setattr(self, name, lambda *args, name=name: self.calls.append((name, *args)))

    def names(self):
        return [(name, index) for name, index, *_ in self.calls if name != "on_step"]


class Replay(Observer):
    """Returns what a log received."""

    def __init__(self, calls):
        self.calls = list(calls)
        for stage in STAGES:
            setattr(
                self, f"load_{stage}", lambda index, *key, n=f"save_{stage}": self.next(n, index)
            )

    def next(self, name, index):
        if not self.calls or self.calls[0][:2] != (name, index):
            return None
        return self.calls.pop(0)[-1]


@pytest.fixture(scope="module")
def run():
    """Model, rounds, and the observer's log of one run."""
    log = Log()
    model = tiny_gemma()
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch)
        rounds = []
        for r in love(model, AXIS, CONFIG, observer=log):
            assert hook_count(model) == 0
            assert handles_on(model) == ()
            rounds.append(r)
    return model, rounds, log


@pytest.fixture
def gemma():
    return tiny_gemma()


def same(one, two):
    return all(map(torch.equal, one.parameters(), two.parameters()))


def test_rounds_are_in_order_and_complete(run):
    _, rounds, _ = run
    assert [r.index for r in rounds] == [0, 1]
    assert [r.adapter.round for r in rounds] == [r.vector.round for r in rounds] == [0, 1]
    assert {r.adapter.axis for r in rounds} == {r.vector.axis for r in rounds}
    for r in rounds:
        # Everything survives, so kappa is 1, and 2 probes and 4 dreams make the 6 needed.
        assert (r.kappa, r.dose) == (1.0, 1.5)
        assert (len(r.probes), len(r.dreams), len(r.kept)) == (4, 4, 6)
        assert (r.steered.name, r.healed.name) == ("steered", "healed")
        assert len(r.healed.samples) == 3
        assert r.healing.moved
        assert r.steered.nats != r.healed.nats


def test_finished_stages_are_saved_in_order(run):
    _, rounds, log = run
    one = [f"save_{name}" for name in ("vector", "probe", "batch", "stage", "healed", "stage")]
    assert log.names() == [(name, index) for index in (0, 1) for name in one]
    stages = [call[-1] for call in log.calls if call[0] == "save_stage"]
    assert stages == [stage for r in rounds for stage in (r.steered, r.healed)]
    assert [(s.kappa, s.dose) for s in stages] == [(1.0, 1.5), (None, None)] * 2
    # 6 texts in batches of 4 and 2, twice over.
    steps = [(step.step, total) for name, index, step, total, _ in
             (c for c in log.calls if c[0] == "on_step") if index == 1]  # fmt: skip
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_loaded_stages_are_not_computed(run, monkeypatch):
    _, rounds, log = run
    loop = import_module("shl.method.loop")
    for name in ("extract_configured", "generate", "judge", "evaluate", "train_adapter"):
        monkeypatch.setattr(loop, name, lambda *_, n=name, **__: pytest.fail(f"{n} was called"))
    saved = [call for call in log.calls if call[0] != "on_step"]
    again = list(love(tiny_gemma(), AXIS, CONFIG, observer=Replay(saved)))
    assert [r.kept for r in again] == [r.kept for r in rounds]
    assert [r.healing for r in again] == [r.healing for r in rounds]
    # Without the last stage only that one is computed.
    with pytest.raises(pytest.fail.Exception, match="evaluate was called"):
        list(love(tiny_gemma(), AXIS, CONFIG, observer=Replay(saved[:-1])))


def test_each_vector_is_extracted_from_the_current_student(run):
    model, (first, second), _ = run
    axis = with_drawn_contexts(AXIS)
    base = extract_vector(model, axis, BAND, contexts=3)
    with baked(model, [first.adapter]):
        student = extract_vector(model, axis, BAND, contexts=3)
    for layer in BAND:
        assert torch.equal(first.vector.directions[layer], base.directions[layer])
        assert torch.equal(second.vector.directions[layer], student.directions[layer])
        assert not torch.equal(student.directions[layer], base.directions[layer])


def test_a_later_adapter_is_trained_with_the_earlier_ones_on(run):
    model, (first, second), _ = run

    def again():
        seed = seed_for(CONFIG.seed, "heal", 1)
        return train_adapter(model, second.kept, CONFIG.heal, index=1, rounds=2, seed=seed)

    with baked(model, [first.adapter]):
        assert same(again().adapter, second.adapter)
    assert not same(again().adapter, second.adapter)


def test_an_exception_in_the_consumer_leaves_no_hook(gemma, monkeypatch):
    lenient(monkeypatch)

    def consume():
        for r in love(gemma, AXIS, CONFIG):
            raise KeyError(r.index)

    with pytest.raises(KeyError, match="0"):
        consume()
    assert hook_count(gemma) == 0

    class Fail(Observer):
        def save_probe(self, index, probe):
            raise KeyError

    with pytest.raises(KeyError):
        next(love(gemma, AXIS, CONFIG, observer=Fail()))
    assert hook_count(gemma) == 0


def test_a_run_is_a_function_of_the_seed(run, monkeypatch):
    lenient(monkeypatch)
    _, (first, _), _ = run
    again = next(love(tiny_gemma(), AXIS, CONFIG))
    other = next(love(tiny_gemma(), AXIS, replace(CONFIG, seed=7)))
    assert [c.text for c in again.kept] == [c.text for c in first.kept]
    assert same(again.adapter, first.adapter)
    assert [c.text for c in other.kept] != [c.text for c in first.kept]
    assert not same(other.adapter, first.adapter)


def test_probes_at_the_final_dose_are_kept_and_weaker_ones_are_not(run):
    _, (first, _), _ = run
    probes = [v.completion for v in first.probes]
    assert [c.dose for c in probes] == pytest.approx([1.5, 1.5, 0.3, 0.3])
    assert first.kept == (*probes[:2], *(v.completion for v in first.dreams))
    # The same prompts at every rung.
    assert [c.prompt for c in probes[:2]] == [c.prompt for c in probes[2:]]


def test_the_walk_uses_the_highest_surviving_dose(gemma, monkeypatch):
    lenient(monkeypatch)

    def judge(model, texts, config, **_):
        return [Verdict(c, () if c.dose <= 1.0 else ("soup",), 9.0, 8.0) for c in texts]

    monkeypatch.setattr(import_module("shl.method.loop"), "judge", judge)
    r = next(love(gemma, AXIS, CONFIG))
    assert (r.kappa, r.dose) == pytest.approx((0.2, 0.3))
    assert [c.dose for c in r.kept] == pytest.approx([0.3] * 6)
    assert r.steered.survival == 1.0  # of the 2 probes and 4 dreams at that dose
    assert len(r.steered.samples) == 6


def test_without_the_walk_no_dose_is_probed(gemma, monkeypatch):
    lenient(monkeypatch)
    log = Log()
    config = replace(CONFIG, dose=replace(CONFIG.dose, walk=False))
    r = next(love(gemma, AXIS, config, observer=log))
    assert (r.kappa, r.probes) == (1.0, ())
    assert ("save_probe", 0) not in log.names()
    # Batches of 4 until 6 are there.
    assert (len(r.dreams), len(r.kept)) == (8, 8)
    assert {c.dose for c in r.kept} == {1.5}


def test_the_error_for_too_few_survivors_lists_counts_and_rules(gemma, monkeypatch):
    lenient(monkeypatch, reasons=lambda text: ["soup", "markup"])
    with pytest.raises(StarvedError) as error:
        next(love(gemma, AXIS, CONFIG))
    # 4 probes and 3 batches of 4; kappa 0.2 times alpha 1.5.
    sentence = one_sentence(error)
    assert "round 0: 0 completions survived, 6 are needed, after 16 generated" in sentence
    assert "kappa 0.2 (dose 0.3)" in sentence
    assert "soup 16" in sentence
    assert "markup 16" in sentence
    assert hook_count(gemma) == 0


def test_no_batch_is_generated_if_enough_probes_survive(gemma, monkeypatch):
    lenient(monkeypatch)
    dose = DoseConfig(
        alpha=1.5, kappa_min=0.2, rungs=2, probe_size=3, min_train=3, batch_size=4, max_batches=3
    )
    r = next(love(gemma, AXIS, replace(CONFIG, dose=dose)))
    assert (len(r.kept), r.dreams) == (3, ())


def test_baselines_measure_base_and_both_personas(gemma, monkeypatch):
    lenient(monkeypatch)
    log = Log()
    found = baselines(gemma, AXIS, CONFIG, observer=log)
    assert list(found) == ["base", "prompted+", "prompted-"]
    assert log.calls == [("save_stage", -1, stage) for stage in found.values()]
    personas = [stage.samples[0].completion.prompt.persona for stage in found.values()]
    assert personas == [None, AXIS.positive, AXIS.negative]
    assert found["base"].coherence == 1.0
    assert (found["base"].survival, found["base"].perplexity) == (1.0, 9.0)


def test_base_is_sampled_more_and_the_personas_less(gemma, monkeypatch):
    lenient(monkeypatch)
    for samples, counts in ((9, [18, 3, 8]), (2, [4, 2, 2])):
        config = replace(CONFIG, eval=replace(CONFIG.eval, samples=samples, persona_samples=3))
        found = baselines(gemma, AXIS, config)
        assert [len(stage.samples) for stage in found.values()] == counts


def test_each_round_probes_other_prompts(run):
    _, rounds, _ = run
    # 2 rungs of 2 probes: each round takes the axis's next two prompts, at both doses.
    for index, r in enumerate(rounds):
        asked = [v.completion.prompt.text for v in r.probes]
        assert asked == [*AXIS.prompts[2 * index : 2 * index + 2]] * 2


def test_completions_are_judged_with_the_persona_in_their_prompt(gemma, monkeypatch):
    lenient(monkeypatch)
    judged, loop = [], import_module("shl.method.loop")

    def judge(model, texts, config, *, persona=None, **options):
        judged.append((persona, {c.prompt.persona for c in texts}))
        return filters.judge(model, texts, config, persona=persona, **options)

    filters = import_module("shl.method.filters")
    monkeypatch.setattr(loop, "judge", judge)
    baselines(gemma, AXIS, CONFIG)
    next(love(gemma, AXIS, replace(CONFIG, prompted=True)))
    personas = [None, AXIS.positive, AXIS.negative]  # of base and both prompted personas
    personas += [AXIS.positive, AXIS.positive, None]  # of the probe, a batch and the healed student
    assert judged == [(persona, {persona}) for persona in personas]
