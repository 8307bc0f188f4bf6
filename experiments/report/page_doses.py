"""The report's charts of the dose ladders."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

from experiments.questions.estimates import wilson
from experiments.record.reader import Event, stages
from experiments.report.page_charts import Figure, drawn, spoken
from experiments.report.scales import AxisSpec
from experiments.report.svg import chart, styles
from experiments.report.svg_frame import Point, Rule, Series


def ladders(texts: Sequence[Event]) -> dict[int, list[dict[str, float]]]:
    """Per round, per probed dose: how many were generated and kept, and the median perplexity
    under base (infinite where the median text is empty)."""
    groups: dict[int, dict[float, list[Event]]] = {}
    for t in texts:
        if t["stage"] == "probe":
            groups.setdefault(t["round"], {}).setdefault(t["dose"], []).append(t)
    return {
        index: [
            {
                "dose": dose,
                "generated": len(found),
                "kept": sum(not t["reasons"] for t in found),
                "perplexity": median_low(
                    math.inf if t["perplexity"] is None else t["perplexity"] for t in found
                ),
            }
            for dose, found in sorted(doses.items(), key=lambda item: abs(item[0]))
        ]
        for index, doses in groups.items()
    }


def doses(
    events: Sequence[Event], texts: Sequence[Event], loop: Mapping[str, Mapping[str, float]]
) -> list[Figure]:
    """Filter survival and base perplexity against the dose, one curve per round's ladder."""
    rungs = ladders(texts)
    if not rungs:
        return []
    base = stages(events, "base")[:1]
    kinds = styles(len(rungs))

    def curves(value: Callable[[Mapping[str, float]], Point | None]) -> list[Series]:
        found = []
        for i, (index, ladder) in enumerate(rungs.items()):
            colour, marker, dash = kinds[i]
            aside = 3.0 * (i - (len(rungs) - 1) / 2)
            points = [replace(p, aside=(aside, 0.0)) for p in map(value, ladder) if p is not None]
            if points:
                found.append(Series(f"round {index}", points, colour, marker, dash=dash))
        return found

    def survival(r: Mapping[str, float]) -> Point:
        interval = wilson(int(r["kept"]), int(r["generated"]))
        return Point(r["dose"], r["kept"] / r["generated"], y_interval=interval)

    def perplexity(r: Mapping[str, float]) -> Point | None:
        return Point(r["dose"], r["perplexity"]) if math.isfinite(r["perplexity"]) else None

    dose = AxisSpec("dose [times the raw vector]")
    target, limit = loop["dose"]["target_survival"], loop["filter"]["max_tail_perplexity"]
    shares, costs = curves(survival), curves(perplexity)
    return [
        drawn(
            "Survival falls with the dose where the filter can tell: share of probes kept, 95 % "
            "Wilson intervals; the walk asks for the target.",
            lambda: chart(
                shares,
                dose,
                AxisSpec("survival [share of probes]", low=0.0, high=1.0),
                title="filter survival against dose",
                desc=spoken(shares),
                rules=[
                    Rule(f"target {target:g}", target, colour="ink", dash="1 5"),
                    *(Rule("base", e["survival"]) for e in base),
                ],
            ),
        ),
        drawn(
            "Base perplexity rises with the dose: median over the probes' texts; the filter drops "
            "a text whose last quarter is above its limit.",
            lambda: chart(
                costs,
                dose,
                AxisSpec("median base perplexity", log=True),
                title="base perplexity against dose",
                desc=spoken(costs),
                rules=[
                    Rule(f"limit of a text's tail {limit:g}", limit, colour="ink", dash="1 5"),
                    *(Rule("base", e["perplexity"]) for e in base if e["perplexity"] is not None),
                ],
            ),
        ),
    ]
