"""The table at the end of a run, from its events alone."""

from collections.abc import Sequence

from experiments.record.reader import Event, stages


def rows(events: Sequence[Event]) -> list[dict[str, str]]:
    """The table: base, prompted, and steered and healed per round."""
    kept = {e["round"]: e for e in events if e["event"] == "round"}
    healing = {e["round"]: e for e in events if e["event"] == "healing"}
    table = []
    for e in events:
        if e["event"] != "stage":
            continue
        index, row = (
            e["round"],
            {"stage": e["stage"] if e["round"] < 0 else f"{e['stage']} {e['round']}"},
        )
        row |= {
            _column("care_nats", "care", events): f"{e['nats']['care']:.2f}",
            _column("auth_nats", "authority", events): f"{e['nats']['authority']:.2f}",
            "coherence": f"{e['coherence']:.2f}",
            "survival": f"{e['survival']:.2f}",
            "base ppl": "-" if e["perplexity"] is None else f"{e['perplexity']:.1f}",
        }
        if e["stage"] == "steered" and index in kept:
            row["kept/gen"] = f"{kept[index]['kept']}/{kept[index]['generated']}"
            row["kappa"] = f"{kept[index]['kappa']:.2f}"
        if e["stage"] == "healed" and index in healing:
            last = healing[index]["epochs"][-1]
            row["D"] = f"{last['d']:.2f}"
            row["> tau"] = f"{100 * last['tokens_over']:.0f} %"
            row["lam"] = f"{last['lam']:.1f}"
        table.append(row)
    return table


def _column(name: str, foundation: str, events: Sequence[Event]) -> str:
    """A column's name, with a warning where base's own reading of the foundation is noise."""
    base = stages(events, "base")
    return f"{name} (noise)" if base and foundation in base[0]["noise"] else name
