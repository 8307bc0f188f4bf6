"""Read random vectors for the default settings, into the package.

`python -m experiments.checks.nulls --model gemma-3-270m` takes some minutes. Readings that are
there already are kept: delete a file to read it again. Remove the files of earlier weights or
items, which nothing finds any more.
"""

from dataclasses import dataclass

from experiments.record.command import command, say, wide_console
from experiments.run import random_vectors
from shl.config import LoopConfig
from shl.measure.nulls import SHIPPED
from shl.method.axes import load_axis
from shl.models.load import load_model


@dataclass(frozen=True)
class NullsConfig:
    """The model and the axes whose instruments are read."""

    model: str = "gemma-3-270m"
    """As in experiments.run."""
    axes: tuple[str, ...] = ("love", "care_auth")
    """Axes; the vignettes are read once for all, the cloze of each that has one."""


def read_nulls(config: NullsConfig) -> None:
    """Read and write what is missing, and print the widest shift of each instrument."""
    console, model = wide_console(), load_model(config.model)
    for name in config.axes:
        axis = load_axis(name)
        for event in random_vectors(model, axis.cloze, LoopConfig(), SHIPPED):
            most = max(abs(x) for level in event["values"] for row in level for x in row)
            say(
                console,
                f"{name}: random vectors move {event['instrument']} by at most {most:.2f} nats",
            )


def main() -> None:
    """The command line."""
    command(read_nulls, NullsConfig, __doc__)


if __name__ == "__main__":
    main()
