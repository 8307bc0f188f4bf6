"""Events and texts of runs whose shifts, masses and survival are known by arithmetic, and runs of a
tiny model."""

from contextlib import contextmanager

import numpy as np
import pytest
from helpers import lenient

from experiments import run as program
from shl.config import FOUNDATIONS
from shl.measure.vignettes import vignettes
from shl.models.tiny import tiny_gemma

SIGN = np.where(np.arange(84) // 7 % 2, 1.0, -1.0)
"""+1 or -1 by vignette, six and six of each foundation."""
MANY = 160
"""Samples a stage."""


def scores(shift=None, *, mass=1.0, wobble=0.0, mass_wobble=0.0, hit=0.4):
    """Log-probabilities `[84, 1, 7]`: base gives the intended option `hit` of half the mass, the
    others share the rest; a foundation with a shift s has its probability times e^s, in every
    vignette, so that its nats move by exactly s, and the other options are scaled to what is left.
    `wobble` adds +-w to the size of the shifts, `mass_wobble` makes the mass 1 +- w times as large,
    both by turns."""
    intended = np.array([FOUNDATIONS.index(v.foundation) for v in vignettes()])
    p = np.full((84, 7), (1 - hit) / 6)
    p[np.arange(84), intended] = hit
    shift = shift or {}
    named = [FOUNDATIONS.index(name) for name in shift]
    for k, s in zip(named, shift.values(), strict=True):
        p[:, k] *= np.exp(s + np.sign(s) * wobble * SIGN)
    rest = [k for k in range(7) if k not in named]
    if rest:
        p[:, rest] *= (1 - p[:, named].sum(1, keepdims=True)) / p[:, rest].sum(1, keepdims=True)
    assert (p > 0).all()
    factor = mass * (1 + mass_wobble * SIGN[:, None])
    return np.log(p * 0.5 * factor)[:, None].tolist()


@contextmanager
def tiny_runs():
    """The program loads a tiny model, its filter keeps everything, and there are 8 vignettes."""
    model = tiny_gemma()
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch)
        patch.setattr(program, "load_model", lambda name, device=None: model)
        yield patch


def stage(name, index, log_probs, **more):
    line = {"event": "stage", "stage": name, "round": index, "style": "completion"}
    line |= {"log_probs": log_probs, "labels": [v.foundation for v in vignettes()]}
    return line | more


def on(s):
    """An on-axis shift of s on care_auth: (s - -s) / 2."""
    return {"care": s, "authority": -s}


def texts(name, index, kept, total=MANY, perplexity=9.0, dose=0.0):
    """`kept` of `total` samples survive."""
    return [
        {
            "stage": name,
            "round": index,
            "prompt": f"prompt {i}",
            "dose": dose,
            "reasons": [] if i < kept else ["soup"],
            "perplexity": perplexity,
        }
        for i in range(total)
    ]


def probes(*groups):
    """(dose, kept of 8, perplexity) each; perplexities rise a little within a group."""
    found = []
    for dose, kept, perplexity in groups:
        group = texts("probe", 0, kept, 8, dose=dose)
        for i, t in enumerate(group):
            t["perplexity"] = None if perplexity is None else perplexity + 0.1 * i
        found += group
    return found


GOOD_PROBES = ((0.3, 8, 8.0), (0.75, 7, 15.0), (1.5, 1, 40.0))


def run(
    *,
    healed=None,
    steered=None,
    plus=None,
    minus=None,
    base=None,
    mass=1.0,
    mass_wobble=0.0,
    kept=MANY,
    total=MANY,
    base_kept=None,
    ladder=GOOD_PROBES,
    cosines=({"6": 1.0, "7": 1.0}, {"6": 0.9, "7": 0.8}),
    barrier="bound",
    end=True,
):
    """Events and texts of a run that worked, unless the arguments differ.

    Steered +0.5 nats at half the mass; healed +0.3 and +0.4 at base's mass; prompted +0.1 and
    -0.1. A stage's scores may be given whole in place of its shift.
    """

    def made(given, **more):
        return scores(given, **more) if given is None or isinstance(given, dict) else given

    healed = healed or (on(0.3), on(0.4))
    events = [
        stage("base", -1, made(base)),
        stage("prompted+", -1, made(plus or on(0.1))),
        stage("prompted-", -1, made(minus or on(-0.1))),
    ]
    found = texts("base", -1, kept if base_kept is None else base_kept, total)
    found += texts("prompted+", -1, kept if base_kept is None else base_kept, total)
    found += texts("prompted-", -1, kept, total)
    found += probes(*ladder)
    for index, given in enumerate(healed):
        log_probs = scores(on(0.5), mass=0.5) if steered is None else steered
        events.append(stage("steered", index, log_probs, dose=0.75, kappa=0.5))
        events.append(healing(index, barrier))
        values = made(given, mass=mass, mass_wobble=mass_wobble)
        events.append(stage("healed", index, values))
        events.append(
            {
                "event": "round",
                "round": index,
                "kappa": 0.5,
                "dose": 0.75,
                "kept": 6,
                "generated": 9,
                "at_floor": index == 1,
                "cosine_to_first": cosines[index],
            }
        )
        found += texts("healed", index, kept, total)
    return [*events, *([{"event": "end", "round": 1}] if end else [])], found


def healing(index, barrier="bound", *, moved=True):
    fired = {"bound": 0.25, "fired but did not bind": 1.0}.get(barrier, 0.0)
    steps = [{"fired": fired}, {"fired": 0.0}]
    epoch = {"d": 0.48, "lam": 1.5, "tokens_over": 0.1}
    line = {"event": "healing", "round": index, "barrier": barrier, "moved": moved, "tau": 0.5}
    return line | {"epochs": [epoch], "steps": steps}
