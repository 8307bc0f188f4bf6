"""report.html contains the record as escaped text, and its charts the numbers of the record."""

import io
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lenient, one_sentence, small_loop
from rich.console import Console

from experiments import run as program
from experiments.arms import report as program_report
from experiments.questions.answers import answer_all
from experiments.questions.estimates import SHARES, Answer, Estimate, wilson
from experiments.questions.measurements import Measurements
from experiments.record.reader import axis_of, of_round, read, read_json, stages
from experiments.record.settings import RunConfig
from experiments.report import figures as fig
from experiments.report import page as page_module
from experiments.report import plots
from experiments.report.escape import clean
from experiments.report.page import HEAT, cards, cost, heat, instruments, page, sizes, write_page
from experiments.report.report import report
from experiments.report.tables import ladders, rows
from experiments.run import study
from shl.config import FOUNDATIONS, EvalConfig
from shl.hooks.vector import SteeringVector
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

HOSTILE = (
    "<script>alert(1)</script></style></svg></title><img src=x onerror=alert(1)>"
    '" onload="x\' {{ 7 * 7 }}{% raw %} &amp; <!-- ]]> $x^2$ stroke: #b83227; \x00\x1b[31m\x85 '
    f"\u202eabc\u2066 \u05d0\u05d1\r\n\ttwo lines {'W' * 3000}"
)
CLEAN = HOSTILE.translate(
    {0: "\u2400", 0x1B: "\u241b", 13: "\u240d", 0x85: r"\u0085"}
    | {0x202E: r"\u202e", 0x2066: r"\u2066"}
)
TAGS = """html head meta title style body button main script header h1 h2 h3 p ul li b br span nav
    a section article div dl dt dd details summary table thead tbody tr th td bdi figure
    figcaption svg desc defs g path use clippath rect text"""
ATTRIBUTES = """lang charset name content id type hidden class role aria-label aria-labelledby href
    tabindex scope title dir viewbox width height x y d style transform clip-path"""


class Reader(HTMLParser):
    """The elements of a page with their attributes and text, as a browser parses it."""

    def __init__(self, text):
        super().__init__()
        self.blocks, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.blocks.append((tag, dict(attrs), []))
        if tag not in ("meta", "br"):
            self.open.append(self.blocks[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, parts in self.open:
            parts.append(data)

    def texts(self, tag, style=None):
        return [
            "".join(parts)
            for name, attrs, parts in self.blocks
            if name == tag and (style is None or style in (attrs.get("class") or "").split())
        ]


def checked(text):
    """Parse a page; it has only known elements, no outside link, and charts with title and text."""
    reader = Reader(text)
    assert reader.open == []
    tags = [tag for tag, _, _ in reader.blocks]
    pairs = [pair for _, attrs, _ in reader.blocks for pair in attrs.items()]
    assert set(tags) <= set(TAGS.split())
    assert {name for name, _ in pairs} <= set(ATTRIBUTES.split())
    assert tags.count("script") == tags.count("style") == 1
    ids = [value for name, value in pairs if name == "id"]
    assert len(set(ids)) == len(ids)
    links = [value for name, value in pairs if name == "href"]
    styles = " ".join(value for name, value in pairs if name in ("clip-path", "style"))
    links += re.findall(r"url\((.*?)\)", styles)
    assert all(link[0] == "#" and link[1:] in ids for link in links)
    (style,) = reader.texts("style")
    assert not re.search(r"url\(|@import|https?:", style)
    texts = {attrs["id"]: "".join(parts) for _, attrs, parts in reader.blocks if "id" in attrs}
    for tag, attrs, _ in reader.blocks:
        if tag == "svg":
            assert attrs["role"] == "img"
            assert all(texts[name] for name in attrs["aria-labelledby"].split())
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of two rounds on the tiny model, with its report."""
    out = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lenient(patch, reasons=lambda text: ["incoherent"] if len(text) % 3 == 0 else [])
        patch.setattr(program, "load_model", lambda name, device=None: tiny_gemma())
        study(RunConfig(model="tiny", loop=small_loop(), out=out), Console(file=io.StringIO()))
    report(out, Console(file=io.StringIO()))
    return out


@pytest.fixture
def parts(folder):
    """Config, versions, axis, events and texts of the run; a test may change them."""
    config, events, texts = read(folder)
    return [config, read_json(folder / "versions.json"), axis_of(folder), events, texts]


def drawn(folder, parts):
    """The page with its charts."""
    config, _, axis, events, texts = parts
    return page(*parts, figures=plots.charts(folder, config, axis, events, texts))


def test_a_finished_run_has_every_section_and_chart(folder, parts):
    text = (folder / "report.html").read_text("utf-8")
    reader = checked(text)
    events, texts = parts[3:]
    assert reader.texts("p", "banner") == []
    names = {v["aria-label"] for t, v, _ in reader.blocks if v.get("class") == "plot"}
    assert names == {"trajectory", "plane", "token kl", "kl tokens", "doses", "foundations",
                     "cosines", "barrier"}  # fmt: skip
    for prompt, *_ in page_module.stories(texts):
        assert clean(prompt) in reader.texts("bdi")
    for curve in [c for e in events if e["event"] == "token_kl" for c in e["curves"]]:
        assert clean("".join(curve["pieces"])) in reader.texts("div", "tokens")
    assert text.count("min_real_words") == 1
    terms = reader.texts("dt")
    assert "peak memory, resident" in terms
    explained = {name for term in terms for name in term.partition(" [")[0].split(", ")}
    columns = {column.removesuffix(" (noise)") for row in rows(events) for column in row}
    assert {"beta", "KL", "lam", "auth_nats"} < columns
    assert columns - {"stage", "cloze", "random"} <= explained


def test_pages_of_one_record_differ_only_in_the_cost_of_their_processes(folder, tmp_path):
    before = (folder / "report.html").read_bytes()
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    assert write_page(other, pngs=True).read_bytes() == before
    assert all((other / p.name).read_bytes() == p.read_bytes() for p in folder.glob("*.png"))
    (other / "processes.jsonl").unlink()
    after = write_page(other).read_bytes()
    cut = re.compile(rb'<section id="cost">.*?</section>', re.DOTALL)
    assert after != before
    assert cut.sub(b"", after) == cut.sub(b"", before)
    for peak in (7, {"resident": "much"}):
        with pytest.raises(ShlError) as error:
            cost(read(folder)[1], [{"event": "end", "peak_bytes": peak}])
        assert "must be bytes by kind" in one_sentence(error)
    two = [{"event": "begin"}, {"peak_bytes": {"resident": 2 * 10**9}}, {"event": "begin"}]
    lines = dict(cost(read(folder)[1], [*two, {"peak_bytes": {"resident": 3 * 10**9}}]))
    assert (lines["processes"], lines["peak memory, resident"]) == ("2 on record", "3.00 GB")


def test_page_of_an_interrupted_record_names_what_is_missing(folder, tmp_path):
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
    cut = shutil.copytree(folder, tmp_path / "cut")
    second = next(i for i, line in enumerate(lines) if '"round": 1' in line)
    for count, line in enumerate(lines[: second + 1]):
        # The next line is cut off in the middle.
        (cut / "events.jsonl").write_text("".join(lines[:count]) + line[:40], "utf-8")
        if count == 0:
            with pytest.raises(ShlError) as error:
                write_page(cut)
            assert "had not begun" in one_sentence(error)
            continue
        reader = checked(write_page(cut).read_text("utf-8"))
        (banner,) = reader.texts("p", "banner")
        assert banner.startswith("This run is unfinished: its record ends after ")
        assert ("stage" in reader.texts("th")) == any('"stage":' in x for x in lines[:count])


def test_page_of_a_starved_run_begins_with_the_reason(folder, parts):
    events = parts[3]
    at = next(i for i, e in enumerate(events) if e["event"] == "batch" and e["round"] == 1)
    starved = events[at] | {"event": "starved", "sentence": "round 1: <0> completions survived."}
    parts[3] = [*events[: at + 1], starved]
    assert checked(drawn(folder, parts)).texts("p", "banner") == [
        "This run starved and ended early: round 1: <0> completions survived."
    ]


def test_hostile_text_is_escaped(folder, parts):
    config, versions, axis, events, texts = parts
    prompt = texts[0]["prompt"]
    for t in texts:
        t["text"], t["reasons"] = HOSTILE, [HOSTILE]
        t["prompt"] = HOSTILE if t["prompt"] == prompt else t["prompt"]
    for e in events:
        for curve in e.get("curves", ()):
            curve["pieces"] = [HOSTILE, "$x^2$ & <b>", *[HOSTILE[-1000:]] * (len(curve["kl"]) - 2)]
            curve["prompt"], curve["reasons"] = HOSTILE, [HOSTILE]
        if e["event"] == "healing":
            e["barrier"] = HOSTILE
    common = {"instrument": HOSTILE, "seconds": 0.0, "texts": 0}
    events.append(common | {"event": "validity", "valid": False, "reason": HOSTILE, "round": -1})
    events.append(common | {"event": "reading", "stage": HOSTILE, HOSTILE: 1.0, "round": 0})
    events.append(events[-1] | {"event": "starved", "sentence": HOSTILE, "round": 1})
    named = {key: f"{HOSTILE}{key}" for key in ("description", "positive", "negative")}
    # A name may hold markup, but nothing that is not printable.
    name = "</title><script>alert(1)</script><b>&amp;'\"$x^2$"
    parts[2] = type(axis)(
        name=name,
        **named,
        contexts=axis.contexts,
        prompts=axis.prompts,
        expected=dict(axis.expected),
    )
    parts[0], parts[1] = config | {"model": HOSTILE}, versions | {"commit": HOSTILE, HOSTILE: "x"}
    reader = checked(drawn(folder, parts))
    tokens = reader.texts("div", "tokens")
    assert all(text.startswith(f"{CLEAN}$x^2$ & <b>") for text in tokens)
    assert set(reader.texts("div", "text")) - set(tokens) == {CLEAN}
    assert {name, f"{CLEAN}negative", f"not valid on this model: {CLEAN}"} <= set(
        reader.texts("bdi")
    )
    assert any(CLEAN in t for t in reader.texts("p", "banner"))
    assert any(CLEAN in t for t in reader.texts("li"))
    assert CLEAN in reader.texts("dt")
    assert reader.texts("title")[0].startswith(CLEAN)
    # Of a token in a chart, the first characters.
    assert {"$x^2$ & <b>", "<script>aler"} <= set(reader.texts("text"))


def test_chart_of_huge_numbers_is_replaced_by_the_error(folder, parts, tmp_path):
    for e in parts[3]:
        if e["event"] == "stage":
            e["shift"] = dict.fromkeys(e["shift"], 1e300)
        for curve in e.get("curves", ()):
            curve["kl"] = [1.7e308] * len(curve["kl"])
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "rounds/1/vector.safetensors").write_bytes(b"x")
    reader = checked(drawn(broken, parts))
    problems = reader.texts("p", "banner")
    # trajectory, distribution, bars, foundations and cosines; plane, doses and barrier are left.
    assert len(problems) == 5
    assert "This chart cannot be drawn: 1e+300 cannot be drawn on the axis" in problems[0]
    assert sum("vector.safetensors" in problem for problem in problems) == 1
    assert len(reader.texts("svg")) == 3


def test_overall_answer_comes_first_and_verdicts_are_not_repeated(parts, monkeypatch):
    answers = (
        Answer("Q0", "can we filter?", "yes", "Yes. Holds: it falls.", {}),
        Answer("selective", "on the axis?", "undecided", "Undecided. Open: all.", {}),
        Answer("dose", "the dose", "info", "No round.", {}),
        Answer("worked", "did it work?", "no", "No. Not at all.", {}),
    )
    monkeypatch.setattr("experiments.report.page.answer_all", lambda *_: answers)
    found = cards(parts[3], parts[4], parts[2], EvalConfig())
    assert [(c.key, c.question, c.verdict, c.sentence) for c in found] == [
        ("", "did it work?", "no", "Not at all."),
        ("Q0", "can we filter?", "yes", "Holds: it falls."),
        ("", "on the axis?", "undecided", "Open: all."),
        ("", "the dose", "info", "No round."),
    ]
    tiles = checked(page(*parts)).texts("li", "tile")
    assert [" ".join(tile.split()) for tile in tiles] == [
        "\u2717 no did it work?", "\u2713 yes Q0 can we filter?", "? undecided on the axis?",
    ]  # fmt: skip


def hand_made(text=""):
    shift = Estimate(f"shift{text}", (0.5, 0.25, 0.75), 0.1, SHARES, 1, f"a note{text}", " nats")
    other = Estimate(f"other{text}", (-0.5, -0.7, -0.3), 0.0, SHARES)
    unknown = Estimate("later", None, 0.0, SHARES, None, f"not measured yet{text}")
    return (
        Answer("Q0", "can we filter?", "no", f"No. Both{text}.", {}, {}, (shift, other)),
        Answer("Q3", "one way?", "undecided", f"Undecided. Open{text}.", {}, {}, (unknown,)),
        Answer("dose", "which dose?", "info", f"No round{text}.", {}),
        Answer("worked", "did it work?", "yes", f"Yes. All{text}.", {}, {}, (shift,)),
    )


def test_answers_are_a_table_with_the_rest_folded(parts, monkeypatch):
    monkeypatch.setattr("experiments.report.page.answer_all", lambda *_: hand_made())
    text = page(*parts)
    reader = checked(text)
    (table,) = re.findall(
        r'<table class="questions">.*?</table>(?=\n</div>\n</section>)', text, re.S
    )
    bare = Reader(re.sub("</summary>.*?</details>", "</summary></details>", table, flags=re.S))
    cells = [" ".join(cell.split()) for tag in ("th", "td") for cell in bare.texts(tag)]
    heads, rows = cells[:10], [cells[i : i + 5] for i in range(10, 30, 5)]
    rows = [heads[:6], *([name, *row] for name, row in zip(heads[6:], rows, strict=True))]
    assert rows[0] == ["question", "answer", "deciding figure", "value", "interval", "threshold"]
    assert [(*row[:2], *row[3:]) for row in rows[1:]] == [
        ("did it work?", "\u2713 yes", "0.50 nats", "0.25 to 0.75", "> 0.10"),
        ("Q0: can we filter?", "\u2717 no", "-0.50", "-0.70 to -0.30", "> 0"),
        ("Q3: one way?", "? undecided", "", "", ""),
        ("which dose?", "info", "", "", ""),
    ]
    names = ["shift (round 1)", "other", "later: not measured yet", "no single figure"]
    assert reader.texts("summary")[:4] == names
    found = Reader(table)
    folded = [" ".join(part.split()) for part in found.texts("details")]
    assert folded == [
        "shift (round 1) All.",
        "other Both. figurevalueintervalthresholdoutcomenote "
        "shift (round 1)0.50 nats0.25 to 0.75> 0.10yesa note",
        "later: not measured yet Open.",
        "no single figure No round.",
    ]
    # Folded: none of them is open.
    assert [attrs for tag, attrs, _ in found.blocks if tag == "details"] == [{}] * 4


def test_hostile_answers_are_escaped(parts, monkeypatch):
    answers = hand_made(HOSTILE)
    monkeypatch.setattr("experiments.report.page.answer_all", lambda *_: answers)
    reader = checked(page(*parts))
    assert f"shift{CLEAN} (round 1)" in reader.texts("summary")
    assert f"All{CLEAN}." in reader.texts("p")
    assert f"a note{CLEAN}" in reader.texts("td")


def test_the_console_prints_a_row_per_question(folder, tmp_path):
    out = Console(file=io.StringIO(), width=240)
    copy = shutil.copytree(folder, tmp_path / "copy")
    report(copy, out)
    text = out.file.getvalue()
    config, events, texts = read(copy)
    answers = answer_all(events, texts, axis_of(copy), EvalConfig(**config["loop"]["eval"]))
    lines = [re.split(r"\s*[\u2502\u2503]\s*", line) for line in text.splitlines()]
    for a in answers:
        row = [f"{a.key}: {a.question}", a.verdict, *(a.deciding.cells if a.deciding else [""] * 4)]
        assert ["", *row, ""] in lines
        assert (f"{a.key}: {a.question} {a.sentence}"[:200] in text) == (a.deciding is None)


def test_tokens_are_shaded_by_nats_and_outlined_above_tau(folder, parts):
    kl = [0.0, 0.0099, 0.01, 0.5, 0.5001, 9.0, 10.0, 400.0]
    found = heat({"pieces": list("abcdefgh"), "kl": kl}, 0.5)
    assert HEAT == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    assert [token[2] for token in found["tokens"]] == [0, 0, 1, 4, 4, 6, 7, 7]
    assert [token[3] for token in found["tokens"]] == [False] * 4 + [True] * 4
    assert found["over"] == 4
    for values in (kl, [2.0], np.random.default_rng(1).exponential(size=61).tolist()):
        rmse, p95 = np.sqrt(np.mean(np.square(values))), np.quantile(values, 0.95)
        expected = {"mean": np.mean(values), "rmse": rmse, "p95": p95, "max": np.max(values)}
        assert sizes(values) == pytest.approx(expected)
    # The page outlines by the tau of the training, 0.01, whatever the setting says.
    parts[0]["loop"]["heal"]["tau"] = 99.0
    first = next(e for e in parts[3] if e["event"] == "token_kl")["curves"][0]
    first["kl"] = [0.01, 0.0101, *[0.0] * (len(first["kl"]) - 2)]
    spans = [a for t, a, _ in checked(drawn(folder, parts)).blocks if t == "span" and "title" in a]
    assert [(a["title"], "over" in a["class"].split()) for a in spans[:3]] == [
        ("0.010 nats", False), ("0.010 nats", True), ("0.000 nats", False),
    ]  # fmt: skip


def contrast(one, other):
    """Contrast ratio of two sRGB colours as WCAG 2 defines it."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_colours_and_shades_is_at_least_4_5():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name, (light, dark) in fig.PALETTE.items():
        pairs = [(light, "#ffffff"), (light, "#f5f6f8"), (dark, "#14171c"), (dark, "#1d2128")]
        assert name == "line" or min(contrast(*pair) for pair in pairs) >= 4.5
    css = (Path(page_module.__file__).parent / "templates" / "page.css").read_text("utf-8")
    shades = re.findall(r"--heat: (\d+) (\d+) (\d+); --full: (\d+)%", css)
    panels = ("#f5f6f8", "#1d2128")
    for shade, panel, text in zip(shades, panels, fig.PALETTE["text"], strict=True):
        *colour, full = map(int, shade)
        ground = np.array([int(panel[i : i + 2], 16) for i in (1, 3, 5)])
        for share in np.arange(8) / 7 * full / 100:
            mixed = np.round(share * np.array(colour) + (1 - share) * ground).astype(int)
            assert contrast(text, "#{:02x}{:02x}{:02x}".format(*mixed)) >= 4.5


def test_an_invalid_instrument_is_greyed_with_its_reason(parts):
    common = {"seconds": 0.0, "texts": 0, "instrument": "tinymfv"}
    bad = {"event": "validity", "valid": False, "reason": "informedness 0.01 is chance"}
    read_ = {"event": "reading", "nats": {"care": -1.25}, "informedness": 0.01, "note": "x"}
    fine = {"event": "validity", "instrument": "vignettes", "valid": True, "reason": "0.61",
            "round": -1, "seconds": 0.0, "texts": 0}  # fmt: skip
    first, *rest = (e for e in parts[3] if e["event"] != "validity")
    base = read_ | common | {"stage": "base", "round": -1}
    healed = read_ | common | {"stage": "healed", "round": 1, "coherence": 0.5}
    unchecked = base | {"instrument": "other"}
    parts[3] = [first, bad | common | {"round": -1}, base, healed, unchecked, fine, *rest]
    found = instruments(parts[3])["tinymfv"]
    assert found["columns"] == ["nats.care", "informedness", "coherence"]
    assert found["rows"] == [("base", "-1.25", "0.01", ""), ("healed 1", "-1.25", "0.01", "0.5")]
    reader = checked(page(*parts))
    (grey,) = [a for t, a, _ in reader.blocks if t == "div" and "invalid" in a.get("class", "")]
    assert grey["aria-label"] == "readings"
    checks = reader.texts("p", "check")
    assert "tinymfv not valid on this model: informedness 0.01 is chance" in checks
    assert {"vignettes valid on this model: 0.61", "other not checked on this model"} <= {*checks}


def numbers(panel):
    """Of each named series, its values along y."""
    return {line.get_label(): list(line.get_ydata()) for line in panel.lines}


def spans(panel):
    """Ends of all whiskers along y."""
    return [part[:, 1].tolist() for lines in panel.collections for part in lines.get_segments()]


def test_the_names_in_a_chart_lie_inside_it(parts):
    config, _, axis, events, texts = parts
    for figure in (
        plots.trajectory(events, axis),
        plots.plane(events, axis),
        plots.foundations(events, axis),
        plots.doses(events, texts, config["loop"]),
        plots.token_kl(events, 0.01),
    ):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, whole = legend.get_window_extent(), figure.bbox
        assert box.x1 <= whole.x1, [text.get_text() for text in legend.texts]
        assert box.y1 <= whole.y1


def test_charts_contain_the_numbers_of_the_record(folder, parts):
    config, _, axis, events, texts = parts
    steered, healed = stages(events, "steered"), stages(events, "healed")
    figure = plots.trajectory(events, axis, 0.8)
    care, authority, coherence, survival = figure.axes
    expected = ("care", "authority")
    assert numbers(care)["steered"] == [e["shift"]["care"] for e in steered]
    by_chance = Measurements(events, (), axis, EvalConfig(confidence=0.8))
    random = {n: [[*by_chance.null_interval(e, n)] for e in (*steered, *healed)] for n in expected}
    shifts = [e["shift_interval"]["care"] for e in (*steered, *healed)]
    assert spans(care) == [*shifts, *random["care"]]
    assert spans(authority)[4:] == random["authority"]
    assert numbers(care)[plots.RANDOM_LABEL] == [0.0] * 4
    assert numbers(coherence)["healed"] == [e["coherence"] for e in healed]
    ends = wilson(round(healed[0]["survival"] * healed[0]["samples"]), healed[0]["samples"], 0.8)
    assert spans(survival)[2] == pytest.approx(ends)
    (panel,) = plots.plane(events, axis, 0.8).axes
    assert numbers(panel)["healed"] == [e["nats"]["authority"] for e in healed]
    base = stages(events, "base")[0]["nats"]["authority"]
    ends = [[base + end for end in random["authority"][-1]], [base, base]]
    assert spans(panel) == [[base, base], *ends[:1]]
    assert [t.get_text() for t in panel.texts if t.get_text()] == ["0", "1"] * 2
    persona, first, _ = plots.foundations(events, axis, 0.8).axes
    lines = {line.get_label(): list(line.get_xdata()) for line in first.lines}
    widths = [part[:, 0].tolist() for x in first.collections for part in x.get_segments()]
    # Per stage seven intervals and those of random vectors: of the first steered and healed stage.
    at = FOUNDATIONS.index("authority")
    assert [widths[7 + at], widths[21 + at]] == [random["authority"][i] for i in (0, 2)]
    assert lines["healed"] == [healed[0]["shift"][name] for name in FOUNDATIONS]
    assert "authority \u25bc" in [t.get_text() for t in persona.get_yticklabels()]
    left, right = plots.doses(events, texts, config["loop"]).axes
    ladder = ladders(texts)[0]
    assert numbers(left)["round 0"] == [r["kept"] / r["generated"] for r in ladder]
    assert numbers(right)["round 0"] == [r["perplexity"] for r in ladder]
    d = plots.barrier(events).axes[0]
    assert numbers(d)["D"] == [s["d"] for e in of_round(events, "healing") for s in e["steps"]]
    curves = of_round(events, "token_kl")[0]["curves"]
    for panel, curve in zip(plots.kl_tokens(events).axes, curves, strict=True):
        assert [bar.get_height() for bar in panel.patches] == curve["kl"]
        assert f"mean {np.mean(curve['kl']):.2f}" in panel.get_title(loc="left")
    kept = [v for e in of_round(events, "token_kl") for c in e["curves"] if c["verdict"] == "kept"
            for v in c["kl"]]  # fmt: skip
    (panel,) = plots.token_kl(events, 0.01).axes
    line = next(line for line in panel.lines if line.get_label().startswith("kept"))
    for value, share in zip(line.get_xdata()[1:], line.get_ydata()[1:], strict=True):
        assert share <= np.mean(np.maximum(kept, plots.LEAST_KL) <= value) + 1e-12
    assert line.get_ydata()[-1] == 1


def test_captions_name_the_confidence_of_the_run(folder, parts):
    parts[0]["loop"]["eval"]["confidence"] = 0.8
    text = drawn(folder, parts)
    assert "80 % Wilson intervals" in text
    # The nulls of cosines have a coverage of their own.
    text = text.replace("95 % of random directions", "")
    assert "95 %" not in re.sub(r'<section id="answers">.*?</section>', "", text, flags=re.DOTALL)


def test_cosines_are_those_of_the_vectors_to_first_and_last():
    def vector(*rows):
        return SteeringVector({i: torch.tensor(row) for i, row in enumerate(rows)}, "m", "a", 1)

    # cos((3, 4), (4, 3)) = 24 / 25; the other layer is unchanged, so the mean is 0.98.
    one, two = vector([3.0, 4.0], [1.0, 0.0]), vector([4.0, 3.0], [1.0, 0.0])
    (panel,) = plots.cosines([(0, one), (1, two)]).axes
    assert numbers(panel)["to the first (round 0)"] == pytest.approx([1.0, 0.98])
    assert numbers(panel)["to the last (round 1)"] == pytest.approx([0.98, 1.0])
    assert spans(panel)[1] == pytest.approx([0.96, 1.0])


@fig.styled
def small_figure(values, label="s"):
    figure, (panel, other) = fig.grid(2, 2)
    panel.set(title="up", xlabel="across")
    count = len(values)
    fig.series(panel, range(count), values, ("red", "o", "-"), label, y_spans=[(0, 2)] * count)
    fig.rule(panel, 1.0, ("grey", "", "--"), "base", span=(0.5, 1.5))
    other.set(title="share", xlabel="KL")
    fig.ecdf(other, {"kept": (("blue", "", "-"), [0.2, 0.4, 0.4, 3.0])}, 0.01, 0.5)
    fig.layout(figure)
    return figure


def test_svg_of_a_figure_has_its_own_ids_and_the_colours_of_the_page():
    label = "</text><script>$\\frac{1}{2}$ fill: #b83227; url(#x)"
    one = fig.chart("one", "", lambda: small_figure([1.0, 1.5], label))
    other = fig.chart("other", "", lambda: small_figure([1.0, 1.5]))
    assert one.svg == one.svg
    reader = checked(f"<html><style></style><script></script>{one.svg}{other.svg}</html>")
    assert label in reader.texts("text")
    assert f"{label}: 1, 1.5." in reader.texts("desc")[0]
    # Colours are the page's, except for text that only looks like a colour.
    assert len(re.findall("#[0-9a-f]{6}", one.svg)) == one.svg.count("#b83227") == 2
    assert one.svg.count("var(--red)") >= 2


def test_ecdf_is_the_share_at_or_below():
    line = small_figure([1.0]).axes[1].lines[0]
    # Of four values, one is at or below 0.2, three at or below 0.4, four at or below 3.
    shares = {0.2: 0.25, 0.4: 0.75, 3: 1}
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == shares


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e13])
def test_value_beyond_the_axis_is_rejected(value):
    found = fig.chart("one", "caption", lambda: small_figure([1.0, value]))
    assert found.figure is None
    assert found.problem == f"{value:g} cannot be drawn on the axis 'up'."


def test_many_series_differ_in_colour_marker_or_dash():
    assert len(set(fig.looks(24))) == 24
    colours, markers, _ = zip(*fig.looks(12), strict=True)
    assert len(set(colours)) == len(set(markers)) == 12


def test_report_command_takes_the_newest_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(SystemExit) as stop:
        program_report.main()
    assert stop.value.code == 2
    assert "there is no run folder" in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "runs" / "other")
    names = ("report.html", "table.md", "answers.json", "diary.md", "trajectory.png")
    for name in names:
        (other / name).unlink()
    program_report.main()
    assert all((other / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert "report.html" in capsys.readouterr().out
