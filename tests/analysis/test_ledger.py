"""A ledger of a run of the tiny model, from its folder and from its rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import lenient, one_sentence, random_adapter, small_loop

from shl.analysis.cosines import nuisance_directions, students
from shl.analysis.ledger import Ledger
from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.loop import love
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Model, rounds, and a folder of their files."""
    model, folder = tiny_gemma(), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch)
        rounds = list(love(model, AXIS, small_loop()))
    for r in rounds:
        place = folder / "rounds" / str(r.index)
        place.mkdir(parents=True)
        r.vector.save(place / "vector.safetensors")
        r.adapter.save(place / "adapter.safetensors")
    return model, rounds, folder


def test_folder_and_rounds_give_the_same_ledger(run):
    model, rounds, folder = run
    plain = Ledger(folder)
    assert (plain.vectors, plain.updates) == (Ledger(rounds).vectors, Ledger(rounds).updates)
    full = Ledger(str(folder), model, AXIS, draws=50)
    assert all(0 < e.relative_norm < 10 and e.shift_norm > 0 for e in full.vectors)
    more = Ledger(rounds, model, AXIS, contexts=5, draws=10)
    assert more.vectors[0].relative_norm != full.vectors[0].relative_norm
    assert full.vectors == Ledger(rounds, model, AXIS, draws=50).vectors
    assert (full.layers, len(full.rounds)) == ((1, 2, 3), 2)
    assert full.sites == tuple(f"blocks.{i}.{kind}" for i in (1, 2, 3) for kind in ("q", "down"))
    for entry in full.vectors:
        r = rounds[entry.round]
        assert entry.norm == pytest.approx(r.vector.norms()[entry.layer])
        expected = r.vector.cosine(rounds[0].vector)[entry.layer]
        assert entry.to_first.value == pytest.approx(expected)
        assert 0 < entry.to_first.random <= 1
        assert 0 < entry.to_first.shuffled <= 1
    base = nuisance_directions(model, AXIS, full.layers, contexts=3)
    for name, other in base.items():
        for r in rounds:
            cosines = list(r.vector.cosine(other).values())
            assert full.grid(name)[:, r.index] == pytest.approx(cosines, abs=1e-6)
    for entry in full.updates:
        assert entry.norm == pytest.approx(rounds[entry.round].adapter.norms()[entry.site])


def test_grids_hold_the_entries_and_nan_elsewhere(run):
    _, rounds, _ = run
    ledger = Ledger(rounds)
    grid = ledger.grid("to_previous")
    assert grid.shape == (3, 2)
    assert np.isnan(grid[:, 0]).all()
    by_place = {(e.round, e.layer): e for e in ledger.vectors}
    assert grid[1, 1] == by_place[1, 2].to_previous.value
    assert ledger.grid("norm")[2, 0] == by_place[0, 3].norm
    assert np.isnan(ledger.grid("relative_norm")).all()
    sites = ledger.site_grid("effective_rank")
    assert sites.shape == (6, 2)
    assert sites[3, 1] == ledger.updates[9].effective_rank
    assert ledger.site_grid("to_first")[0, 1] == ledger.updates[6].to_first.cosine
    with pytest.raises(ShlError, match="no 'valence' per layer"):
        ledger.grid("valence")
    for wrong in ("cosine", "singular_values"):
        with pytest.raises(ShlError) as error:
            ledger.site_grid(wrong)
        assert repr(wrong) in one_sentence(error)


def test_text_is_a_table(run):
    model, rounds, _ = run
    lines = str(Ledger(rounds, model, AXIS, draws=20)).splitlines()
    assert lines[0] == "care_auth on tiny-gemma, 2 rounds"
    assert len([line for line in lines if line.count("(")]) >= 6
    assert "in brackets" in lines[1]
    assert "+1.00 (" in lines[4]
    assert "cos valence" in "\n".join(lines)
    assert "valence" not in str(Ledger(rounds))
    # Without a model there is nothing in brackets but the chance of the updates.
    assert "(" not in str(Ledger(rounds)).splitlines()[3]


def test_last_round_without_its_adapter_is_left_out(run, tmp_path):
    _, rounds, _ = run
    for index, names in ((0, ("vector", "adapter")), (1, ("vector",))):
        place = tmp_path / "rounds" / str(index)
        place.mkdir(parents=True)
        for name in names:
            getattr(rounds[index], name).save(place / f"{name}.safetensors")
    assert len(Ledger(tmp_path).rounds) == 1
    (tmp_path / "rounds" / "0" / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(ShlError) as error:
        Ledger(tmp_path)
    assert "cannot be read" in one_sentence(error)


def with_round(rounds, **changes):
    """A ledger with one more round, whose vector has the changes."""
    return Ledger([*rounds, (replace(rounds[0].vector, **changes), rounds[0].adapter)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model, rounds: Ledger([]), "no rounds"),
        (lambda model, rounds: Ledger("nowhere"), "no finished round"),
        (lambda model, rounds: Ledger(rounds, model), "together"),
        (lambda model, rounds: Ledger(rounds, axis=AXIS), "together"),
        (lambda model, rounds: Ledger(rounds, model, load_axis("love")), "axis is 'care_auth'"),
        (lambda model, rounds: Ledger(rounds, tiny_gemma(seed=3), AXIS), "the run was made on"),
        (lambda model, rounds: with_round(rounds, axis="love"), "the axes differ"),
        (lambda model, rounds: with_round(rounds, model_name="b"), "different models"),
    ],
)
def test_inconsistent_input_is_rejected(run, make, message):
    model, rounds, _ = run
    with pytest.raises(ShlError) as error:
        make(model, rounds)
    assert message in one_sentence(error)


def test_any_weights_accepts_a_run_on_other_weights(run):
    _, rounds, _ = run
    ledger = Ledger(rounds, tiny_gemma(seed=3), AXIS, any_weights=True, draws=10)
    assert ledger.vectors[0].to_shift is not None


def test_vector_along_the_main_variation_of_the_stream_is_within_chance(gemma):
    layer = 3
    (student,) = students(gemma, AXIS, [[]], [layer], contexts=16)
    centred = student.positive[layer] - student.positive[layer].mean(0)
    main, second = torch.linalg.svd(centred).Vh[:2]
    adapter = random_adapter(gemma, ["q"], (0,))
    rounds = [
        (SteeringVector({layer: v}, "tiny-gemma", "care_auth", 16), adapter)
        for v in (main, main + 3 * second)
    ]
    cosine = Ledger(rounds, gemma, AXIS, draws=200, any_weights=True).vectors[1].to_first
    assert cosine.value > 0.3  # 1 / sqrt(10); isotropic directions give 0.35 in 95 %
    assert cosine.random > cosine.value
    assert cosine.beyond_chance is False
