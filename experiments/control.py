"""Test-time control compared with the plain dose at equal mean applied dose: `make control`.

Arms: `plain`; `gate`, the cosine gate; `layers`, the gate's mean factor per layer as constants, so
that what differs from `gate` is its answer to single tokens; `decay`, a dose that halves along the
answer. Same prompts and draws in each.
"""

import sys

import tyro
from rich.console import Console

from experiments.control_arms import Arm, ControlConfig, at_dose, measure
from experiments.control_told import show
from shl.axes import load_axis
from shl.errors import ShlError
from shl.models import load_model
from shl.vector import extract_vector


def main() -> None:
    """The command line; bad input ends with one sentence and status 2."""
    config = tyro.cli(ControlConfig, description=__doc__)
    try:
        compare(config, Console(width=170))
    except ShlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def compare(config: ControlConfig, console: Console) -> list[Arm]:
    """Run all arms and print what they gave."""
    axis, model = load_axis(config.axis), load_model(config.model)
    vector = extract_vector(model, axis, contexts=config.contexts)
    console.print(f"{config.model}, layers {[*vector.directions]}, {config.samples} answers an arm")
    arms = [measure(model, axis, config, vector, "base", 0.0)]
    for dose in config.doses:
        arms += at_dose(model, axis, config, vector, dose)
    show(console, config, axis, arms)
    for one in arms:
        for verdict in one.verdicts[: config.show]:
            said = " ".join(verdict.completion.text.split())
            console.print(f"[{one.name} {one.nominal:.2f}] {said}", markup=False)
            console.print(f"    {', '.join(verdict.reasons) or 'kept'}", markup=False)
    return arms


if __name__ == "__main__":
    main()
