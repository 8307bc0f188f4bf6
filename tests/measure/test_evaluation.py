"""Nats, mass and shifts of an evaluation, on constructed probabilities."""

from dataclasses import replace

import numpy as np
import pytest

from shl.measure.evaluation import Evaluation, nats_of


def constructed(p, *, base_mass=(1.0,), labels=("care", "authority"), prior=0.0):
    """An evaluation of one stem from probabilities `[item, option]`."""
    log_probs = np.log(np.array(p))[:, None]
    return Evaluation(
        "completion", labels, log_probs, np.full((1, 1, 1), prior), np.array(base_mass)
    )


def test_nats_are_the_log_of_the_mean_probability():
    # care: (0.4 + 0.1) / 2 = 0.25; authority: (0.1 + 0.3) / 2 = 0.2; fairness 0.1 and 0.2.
    found = constructed([[0.4, *[0.1] * 6], [0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1]])
    assert found.nats["care"] == pytest.approx(np.log(0.25))
    assert found.nats["authority"] == pytest.approx(np.log(0.2))
    assert found.nats["fairness"] == pytest.approx(np.log(0.15))
    # Probabilities that do not sum to 1 are renormalised over the options first.
    scaled = constructed([[0.04, *[0.01] * 6], [0.01, 0.02, 0.01, 0.03, 0.01, 0.01, 0.01]])
    assert scaled.nats == pytest.approx(found.nats)
    assert nats_of(np.log([[0.5, 0.5]])) == pytest.approx(np.log([0.5, 0.5]))
    # The first item picks its own care, the second its authority.
    assert found.accuracy == 1.0
    assert replace(found, labels=("care", "care")).accuracy == 0.5
    assert (found.confusion[0, 0], found.confusion[3, 3], found.confusion.sum()) == (1, 1, 2)


def test_coherence_is_a_geometric_mean_of_mass_ratios():
    # Masses 0.5 and 0.08 of base's 0.25 and 0.16: ratios 2 and 1/2 cancel; 0.5 and 0.16: sqrt 2.
    parts = np.stack([np.full((2, 7), 0.5 / 7), np.full((2, 7), 0.08 / 7)], 1)
    found = replace(constructed(parts[:, 0]), log_probs=np.log(parts))
    assert found.mass == pytest.approx([0.5, 0.08])
    assert replace(found, base_mass=np.array([0.25, 0.16])).coherence == pytest.approx(1.0)
    assert replace(found, base_mass=np.array([0.25, 0.08])).coherence == pytest.approx(2**0.5)


def test_shifts_by_hand():
    base = constructed([[1 / 7] * 7, [1 / 7] * 7])
    moved = constructed([[0.4, *[0.1] * 6], [0.4, *[0.1] * 6]])
    shift = moved.shift(base)
    assert shift["care"] == pytest.approx(np.log(2.8))
    assert shift["social"] == pytest.approx(np.log(0.7))
    # Centred: log-ratios to the options' mean. log 0.4 - (log 0.4 + 6 log 0.1) / 7 = 6/7 log 4.
    centred = moved.centred_shift(base)
    assert centred["care"] == pytest.approx(6 / 7 * np.log(4))
    assert centred["social"] == pytest.approx(-np.log(4) / 7)
    assert sum(centred.values()) == pytest.approx(0.0, abs=1e-12)
    assert moved.shift_interval(moved, "care") == (0.0, 0.0)
    assert moved.shift_interval(base, "care") == pytest.approx([np.log(2.8)] * 2)


def test_noise_is_a_recall_of_at_most_twice_chance():
    # Care is chosen in 2 of 7 (noise), authority in 3 of 7 (not), fairness in none.
    care, fairness, _, authority, *_ = (np.eye(7) * 0.3 + 0.1).tolist()
    p = [care] * 2 + [authority] * 5 + [authority] * 3 + [care] * 4 + [care] * 2
    labels = ("care",) * 7 + ("authority",) * 7 + ("fairness",) * 2
    assert constructed(p, labels=labels).noise == ("care", "fairness")
    assert constructed([*p[:-2], fairness, care], labels=labels).noise == ("care",)
