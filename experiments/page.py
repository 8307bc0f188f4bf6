"""report.html: one page that shows a run, from its record alone.

The page holds everything it needs; the same record gives the same bytes, whatever process made
it. What tells of processes (times, memory) is in the section `cost` alone.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from experiments import (
    page_charts,
    page_doses,
    page_heat,
    page_inside,
    page_instruments,
    page_view,
)
from experiments.folder import axis_of, read, read_json
from experiments.journal import read_lines, write
from experiments.page_charts import Figure
from experiments.rows import rows
from experiments.shown import clean
from experiments.summary import Event
from experiments.svg_shapes import PALETTE
from shl.axes import Axis
from shl.config import EvalConfig
from shl.directions import SteeringVector
from shl.errors import ShlError


def _cleaned(value: Any) -> Any:
    """Every text on its way into the page; markup of our own stays as it is."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


@cache
def environment() -> Environment:
    """The templates, with escaping on and unknown names refused."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["palette"] = PALETTE
    return found


def page(
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    axis: Axis,
    events: Sequence[Event],
    texts: Sequence[Event],
    processes: Sequence[Event] = (),
    vectors: Figure | None = None,
) -> str:
    """The page of one run.

    Args:
        config, versions: as in the record's files.
        events, texts, processes: the lines of its journals.
        vectors: the cosines, see `vector_figure`; None where there is no vector yet.
    """
    tau = page_view.tau_of(events, config["loop"]["heal"]["tau"])
    table = rows(events)
    instruments = page_instruments.instruments(events)
    return (
        environment()
        .get_template("report.html")
        .render(
            config=config,
            axis=axis,
            banner=page_view.banner(events, config["loop"]["rounds"]),
            cards=page_view.cards(events, texts, axis, EvalConfig(**config["loop"]["eval"])),
            columns=list(dict.fromkeys(key for line in table for key in line)),
            table=table,
            glossary=page_view.GLOSSARY,
            trajectory=page_charts.trajectory(events, axis),
            doses=page_doses.doses(events, texts, config["loop"]),
            ladders=page_doses.ladders(texts),
            foundations=page_charts.foundations(events, axis),
            spread=page_inside.token_kl(events, tau),
            heats=page_heat.heats(events, tau),
            shades=page_heat.HEAT,
            tau=tau,
            vectors=vectors,
            barrier=page_inside.barrier(events),
            healing={e["round"]: e for e in events if e["event"] == "healing"},
            stories=page_view.stories(texts),
            own=instruments.pop("vignettes", None),
            instruments=instruments,
            settings=list(page_view.flat(config)),
            versions=list(page_view.flat(versions)),
            cost=page_view.cost(events, processes),
        )
    )


def vector_figure(folder: Path, events: Sequence[Event]) -> Figure | None:
    """Cosines between the vectors of a run folder, or why they cannot be read."""
    try:
        vectors = [
            (
                e["round"],
                SteeringVector.load(folder / "rounds" / str(e["round"]) / "vector.safetensors"),
            )
            for e in events
            if e["event"] == "vector"
        ]
    except ShlError as error:
        return Figure("Cosine of each round's vector to the first and the last.", None, str(error))
    return page_inside.cosines(vectors) if vectors else None


def write_page(folder: Path) -> Path:
    """Write report.html into a run folder.

    Raises:
        ShlError: it is none, something in it was changed, or it cannot be written.
    """
    config, events, texts = read(folder)
    found = page(
        config,
        read_json(folder / "versions.json"),
        axis_of(folder),
        events,
        texts,
        read_lines(folder / "processes.jsonl"),
        vector_figure(folder, events),
    )
    write(folder / "report.html", found)
    return folder / "report.html"
