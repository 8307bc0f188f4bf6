"""Figures show the numbers of their data."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import one_sentence, random_adapter

from shl import pictures
from shl.analysis.dose_response import DoseResponse
from shl.analysis.ledger import Ledger
from shl.analysis.logit_lens import largest_by_chance, logit_lens, strongest_directions
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.generate import Completion, generate
from shl.models.scores import token_divergence
from shl.models.tokens import Prompt
from shl.utils.errors import ShlError

AXIS = load_axis("care_auth")
EMPTY = Completion(Prompt("a"), "", (), (2,))


@pytest.fixture(scope="module")
def ledgers():
    """One without a model and one with, of two rounds."""
    from shl.models.tiny import tiny_gemma

    model = tiny_gemma()
    adapter = random_adapter(model, ["o"], (1,), size=0.05)
    v = extract_vector(model, AXIS, contexts=4)
    other = replace(v, directions={layer: d.flip(0) for layer, d in v.directions.items()})
    rounds = [(v, adapter), (other, adapter)]
    return Ledger(rounds), Ledger(rounds, model, AXIS, draws=30, any_weights=True)


def rendered(figure, tmp_path):
    """The texts of a figure that is closed in pyplot, is not blank and draws without a warning."""
    assert plt.get_fignums() == []
    figure.savefig(tmp_path / "picture.png", dpi=80)
    picture = plt.imread(tmp_path / "picture.png")
    assert picture[..., :3].std() > 0.02
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_cosines_show_every_value_with_chance_in_brackets(ledgers, tmp_path):
    plain, full = ledgers
    for ledger in ledgers:
        for to in ("to_first", "to_previous"):
            figure = pictures.cosines(ledger, to)
            image = figure.axes[0].images[0].get_array()
            assert np.array_equal(image.filled(np.nan), ledger.grid(to), equal_nan=True)
            shown = rendered(figure, tmp_path)
            cosines = [getattr(e, to) for e in ledger.vectors if getattr(e, to)]
            assert [text.split("\n")[0] for text in shown] == [
                f"({c.value:.2f})" if c.beyond_chance is False else f"{c.value:.2f}"
                for c in cosines
            ]
            if ledger is full:
                bounds = [f"{max(c.random, c.shuffled):.2f}" for c in cosines]
                assert [text.split("\n")[1] for text in shown] == bounds
    assert rendered(pictures.cosines(full, "to_shift"), tmp_path)
    assert "(" in "".join(rendered(pictures.cosines(full), tmp_path))
    assert "chance" in pictures.cosines(full).axes[0].get_title()
    assert "chance" not in pictures.cosines(plain).axes[0].get_title()


def test_norms_draw_one_line_per_round(ledgers, tmp_path):
    every = (["norm"], ["norm", "relative_norm", "shift_norm"])
    for ledger, keys in zip(ledgers, every, strict=True):
        figure = pictures.norms(ledger)
        rendered(figure, tmp_path)
        assert len(figure.axes) == len(keys)
        for panel, key in zip(figure.axes, keys, strict=True):
            lines = np.array([line.get_ydata() for line in panel.lines]).T
            assert np.array_equal(lines, ledger.grid(key))


def test_lens_lists_the_tokens_of_each_direction(gemma, tmp_path):
    vector = extract_vector(gemma, AXIS, contexts=4)
    shown = rendered(pictures.lens(gemma, vector.directions, 3), tmp_path)
    assert len(shown) == 3 * 2 * 3
    tokens = logit_lens(gemma, vector.directions[2], 3)
    expected = [f"{z:+.1f}" for _, z in (*tokens.raised, *tokens.lowered)]
    assert [text.split("\n")[-1] for text in shown[6:12]] == expected
    directions = strongest_directions(gemma, random_adapter(gemma, ["o", "down"], (0, 1)), 2)
    figure = pictures.lens(gemma, directions, 2, keep=str.isalpha)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(directions)
    assert all(text[0].isalpha() for text in rendered(figure, tmp_path))
    assert f"{largest_by_chance(104):.1f}" in figure.axes[0].get_xlabel()


def test_divergence_colours_every_token(gemma, tmp_path):
    texts = generate(gemma, ["Hi?", "And you?"], max_new_tokens=9, min_new_tokens=6)
    assert rendered(pictures.divergence(gemma, texts), tmp_path)  # base itself, all zero
    vector = extract_vector(gemma, AXIS, layers=[2], contexts=4)
    with vector.steering(gemma, 2.0):
        figure = pictures.divergence(gemma, texts, tau=0.01)
        kl = token_divergence(gemma, texts[1])
    rendered(figure, tmp_path)
    panel = figure.axes[1]
    assert len(panel.texts) == len(panel.patches) == len(texts[1].tokens)
    # Colours become darker as the divergence rises.
    light = torch.tensor([sum(patch.get_facecolor()[:3]) for patch in panel.patches])
    assert torch.equal(light.argsort(descending=True), kl.argsort())
    assert f"mean {kl.mean():.2f}" in panel.get_title(loc="left")
    assert f"{float((kl > 0.01).float().mean()):.0%} of" in panel.get_title(loc="left")


def test_response_is_drawn_in_the_order_of_doses(tmp_path):
    kl = tuple(
        tuple(torch.tensor([base + more, base + more]) for more in (0.0, 1.0, 5.0))
        for base in (2.0, 0.0, 1.0)
    )
    figure = pictures.response(DoseResponse((2.0, 0.0, 1.0), kl), how="mean")
    rendered(figure, tmp_path)
    lines = figure.axes[0].lines
    assert lines[0].get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert lines[2].get_ydata().tolist() == [5.0, 6.0, 7.0]
    assert lines[3].get_ydata().tolist() == [1.0, 2.0, 3.0]  # the median of +0, +1, +5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plain, m: pictures.cosines(plain, "norm"), "to is 'norm'"),
        (lambda plain, m: pictures.cosines(plain, "to_shift"), "takes a model"),
        (lambda plain, m: pictures.lens(m, {}), "no directions"),
        (lambda plain, m: pictures.divergence(m, []), "completions is empty"),
        (lambda plain, m: pictures.divergence(m, [EMPTY]), "without tokens"),
    ],
)
def test_invalid_input_is_rejected(ledgers, gemma, call, message):
    with pytest.raises(ShlError) as error:
        call(ledgers[0], gemma)
    assert message in one_sentence(error)
