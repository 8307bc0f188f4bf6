"""The report's charts of what goes on inside a run: divergences, vectors, the barrier."""

from collections.abc import Sequence

from markupsafe import Markup

from experiments.record.reader import Event, of_round
from experiments.report.distributions import distribution
from experiments.report.page_charts import Figure, drawn, spoken
from experiments.report.scales import AxisSpec
from experiments.report.svg import chart
from experiments.report.svg_frame import Point, Rule, Series
from shl.hooks.vector import SteeringVector

VERDICTS = {"kept": "blue", "dropped": "red", "healed": "green"}
LEAST_KL = 1e-3
"""Where the axis of token divergences begins [nats]; less is nothing that anybody sees."""


def token_kl(events: Sequence[Event], tau: float) -> list[Figure]:
    """How the divergences of kept, dropped and healed tokens are spread, over all rounds."""
    groups: dict[str, list[float]] = {}
    for e in of_round(events, "token_kl"):
        for curve in e["curves"]:
            groups.setdefault(curve["verdict"], []).extend(curve["kl"])
    if not groups:
        return []
    return [
        drawn(
            "Spread of the per-token KL to base over the completions below, all rounds: a curve "
            f"further right drifts more; the axis begins at {LEAST_KL:g} nats.",
            lambda: distribution(
                {f"{name} ({len(kl)} tokens)": kl for name, kl in groups.items()},
                AxisSpec("KL to base [nats]", log=True, low=LEAST_KL),
                title="distribution of per-token KL",
                desc="Share of tokens at or below a divergence, by verdict, with tau.",
                rules=[Rule(f"tau {tau:g}", tau, along="x", colour="ink")] if tau > 0 else [],
                low=LEAST_KL,
                colours=[VERDICTS[name] for name in groups],
            ),
        )
    ]


def cosines(vectors: Sequence[tuple[int, SteeringVector]]) -> Figure:
    """Each round's vector beside the first and the last round's: mean over layers, and range."""

    def make() -> Markup:
        series = []
        for name, other, colour, marker, aside in (
            (f"to the first (round {vectors[0][0]})", vectors[0][1], "indigo", "circle", -3.0),
            (f"to the last (round {vectors[-1][0]})", vectors[-1][1], "orange", "diamond", 3.0),
        ):
            points = []
            for index, vector in vectors:
                found = list(vector.cosine(other).values())
                mean = sum(found) / len(found)
                span = (min(found), max(found))
                points.append(Point(index, mean, y_interval=span, aside=(aside, 0.0)))
            series.append(Series(name, points, colour, marker))
        ticks = {float(index): str(index) for index, _ in vectors}
        return chart(
            series,
            AxisSpec("round", ticks=ticks),
            AxisSpec("cosine", high=1.0),
            title="cosine of each round's vector to the first and the last",
            desc=spoken(series),
            rules=[Rule("at right angles", 0.0)],
        )

    return drawn(
        "Cosine of each round's steering vector to the first and to the last round's: mean over "
        "the band's layers, whiskers from the least to the greatest layer.",
        make,
    )


def barrier(events: Sequence[Event]) -> list[Figure]:
    """Divergence, its weight, tokens over tau and gradients per training step, rounds in a row."""
    healing = of_round(events, "healing")
    if not healing:
        return []
    steps: list[Event] = []
    starts = []
    for e in healing:
        starts.append((e["round"], len(steps)))
        steps += e["steps"]
    begins = [Rule("", at - 0.5, along="x", dash="1 5") for _, at in starts[1:]]
    where = "; ".join(f"round {index} from step {at}" for index, at in starts)

    def panel(
        caption: str, label: str, keys: Sequence[tuple[str, str, str, str]], *more: Rule
    ) -> Figure:
        series = [
            Series(name, [Point(i, s[key]) for i, s in enumerate(steps)], colour, None, dash=dash)
            for key, name, colour, dash in keys
        ]
        return drawn(
            f"{caption} R{where[1:]}.",
            lambda: chart(
                series,
                AxisSpec("training step, rounds in a row"),
                AxisSpec(label, low=0.0),
                title=label,
                desc=f"{caption} R{where[1:]}.",
                rules=[*more, *begins],
            ),
        )

    taus = sorted({e["tau"] for e in healing})
    return [
        panel(
            "D, the aggregated KL of a completion to its reference, against tau, where the barrier "
            "starts.",
            "D [nats]",
            [("d", "D", "green", "")],
            *(Rule(f"tau {tau:g}", tau, colour="ink") for tau in taus),
        ),
        panel("Lambda, the barrier's weight.", "lambda", [("lam", "lambda", "purple", "")]),
        panel(
            "Where the barrier acts: completions with D above tau, tokens with KL above tau.",
            "share above tau",
            [
                ("fired", "completions with D > tau", "orange", ""),
                ("tokens_over", "tokens with KL > tau", "teal", "6 4"),
            ],
        ),
        panel(
            "Balance: norms of the two gradients at the final hidden states, lambda included.",
            "gradient norm",
            [("grad_nll", "NLL", "blue", ""), ("grad_barrier", "barrier", "red", "6 4")],
        ),
        panel(
            "Norm of the gradient over A and B, before clipping.",
            "adapter's gradient norm",
            [("grad_adapter", "both terms", "grey", "")],
        ),
    ]
