"""report.html: whatever a record holds is shown and nothing of it is markup."""

import copy
import io
import json
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
from experiments.questions.estimates import Answer
from experiments.record.reader import axis_of, read, read_json
from experiments.record.settings import RunConfig
from experiments.report import page as page_module
from experiments.report.escape import clean
from experiments.report.figures import PALETTE
from experiments.report.page import (
    HEAT,
    banner,
    cards,
    cost,
    heat,
    instruments,
    page,
    sizes,
    stories,
    write_page,
)
from experiments.report.plots import charts, cosines
from experiments.report.report import report
from experiments.run import study
from shl.config import EvalConfig
from shl.hooks.vector import SteeringVector
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

WORDS = "W" * 3000


def luminance(colour):
    """Relative luminance of sRGB as WCAG 2 defines it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_read_on_both_grounds():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name, (light, dark) in PALETTE.items():
        if name != "line":
            assert min(contrast(light, ground) for ground in ("#ffffff", "#f5f6f8")) >= 4.5
            assert min(contrast(dark, ground) for ground in ("#14171c", "#1d2128")) >= 4.5


HOSTILE = (
    "<script>alert(1)</script></style></svg></title><img src=x onerror=alert(1)>"
    '" onload="x\' {{ 7 * 7 }}{% raw %} &amp; <!-- ]]> \x00\x1b[31m\x85 \u202eabc\u2066 '
    f"\u05d0\u05d1\r\n\ttwo lines {WORDS}"
)
SHOWN = (
    HOSTILE.replace("\x00", "\u2400")
    .replace("\x1b", "\u241b")
    .replace("\r", "\u240d")
    .replace("\x85", "\\u0085")
    .replace("\u202e", "\\u202e")
    .replace("\u2066", "\\u2066")
)
TAGS = set(
    """
    html head meta title style body button main script header h1 h2 h3 p ul li b br span nav
    a section article div dl dt dd details summary table thead tbody tr th td bdi figure
    figcaption svg desc g path text defs use clippath rect
""".split()  # noqa: SIM905
)
ATTRIBUTES = set(
    """
    lang charset name content id type hidden class role aria-label href tabindex scope title
    dir viewbox width height x y d transform clip-path aria-labelledby style
""".split()  # noqa: SIM905
)


class Reader(HTMLParser):
    """What a browser would make of a page: elements, attributes and text by class of its block."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.blocks, self.open, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.blocks.append((tag, dict(attrs), []))
        if tag not in ("meta", "br", "link"):
            self.open.append((tag, self.blocks[-1]))

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert name == tag, f"</{tag}> ends <{name}>"

    def handle_data(self, data):
        for _, block in self.open:
            block[2].append(data)

    def texts(self, tag, kind=None):
        return [
            "".join(words)
            for name, attrs, words in self.blocks
            if name == tag and (kind is None or kind in (attrs.get("class") or "").split())
        ]


def checked(text):
    """The page, read; nothing in it but what the templates and charts hold."""
    reader = Reader(text)
    assert reader.open == []
    assert set(reader.tags) <= TAGS
    assert {name for _, name, _ in reader.attributes} <= ATTRIBUTES
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    links = [value for _, name, value in reader.attributes if name == "href"]
    ids = {value for _, name, value in reader.attributes if name == "id"}
    assert {link[1:] for link in links} <= ids
    assert all(link[0] == "#" for link in links)
    for _, name, value in reader.attributes:
        assert name != "style" or re.fullmatch(r"[\w\s:;.,#%()'-]*", value)
        assert "url(" not in (value or "") or re.fullmatch(r"url\(#[\w-]+\)", value)
    # No address of anything outside, in the style sheet either.
    (style,) = reader.texts("style")
    assert not re.search(r"url\(|@import|https?:", style)
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
    """Copies of the arguments of `page`."""
    config, events, texts = read(folder)
    found = (config, read_json(folder / "versions.json"), axis_of(folder), events, texts)
    return [copy.deepcopy(part) if part is not found[2] else part for part in found]


def rendered(folder, parts):
    """The page of changed parts, with its charts."""
    config, _, axis, events, texts = parts
    return page(*parts, figures=charts(folder, config, axis, events, texts))


def test_a_finished_run_is_shown_in_full(folder, parts):
    text = (folder / "report.html").read_text("utf-8")
    reader = checked(text)
    *_, events, texts = parts
    assert "banner" not in [kind for _, name, kind in reader.attributes if name == "class"]
    names = [
        "trajectory",
        "plane",
        "token_kl",
        "kl_tokens",
        "doses",
        "foundations",
        "cosines",
        "barrier",
    ]
    assert list(charts(folder, *parts[:1], *parts[2:])) == names
    assert reader.tags.count("svg") == len(names) == len(reader.texts("desc"))
    assert "cannot be drawn" not in text
    for story in stories(texts):
        assert clean(story.prompt) in reader.texts("bdi")
    for found in [c for e in events if e["event"] == "token_kl" for c in e["curves"]]:
        assert clean("".join(found["pieces"])) in reader.texts("div", "tokens")
    assert text.count("min_real_words") == 1
    assert "peak memory, resident" in reader.texts("dt")


def test_the_same_record_gives_the_same_bytes_and_only_cost_tells_of_processes(folder, tmp_path):
    before = (folder / "report.html").read_bytes()
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    assert write_page(other).read_bytes() == before
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
    told = dict(cost(read(folder)[1], [*two, {"peak_bytes": {"resident": 3 * 10**9}}]))
    assert (told["processes"], told["peak memory, resident"]) == ("2 on record", "3.00 GB")


def test_every_prefix_of_a_record_gives_a_page_that_says_what_is_missing(folder, tmp_path):
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
    cut = shutil.copytree(folder, tmp_path / "cut")
    for count in range(len(lines) + 1):
        # Cut off in the middle of the next line.
        rest = lines[count][:40] if count < len(lines) else ""
        (cut / "events.jsonl").write_text("".join(lines[:count]) + rest, "utf-8")
        if count == 0:
            with pytest.raises(ShlError) as error:
                write_page(cut)
            assert "had not begun" in one_sentence(error)
            continue
        reader = checked(write_page(cut).read_text("utf-8"))
        told = reader.texts("p", "banner")
        if count == len(lines):
            assert told == []
        else:
            assert told[0].startswith("This run is unfinished: its record ends after ")
            assert "round" in told[0]
        stages = sum(json.loads(line)["event"] == "stage" for line in lines[:count])
        assert len(reader.texts("th")) == 0 or stages > 0


def test_a_starved_run_says_so_at_the_top(folder, parts):
    events = parts[3]
    at = next(i for i, e in enumerate(events) if e["event"] == "batch" and e["round"] == 1)
    starved = events[at] | {"event": "starved", "sentence": "round 1: <0> completions survived."}
    parts[3] = [*events[: at + 1], starved]
    reader = checked(rendered(folder, parts))
    assert reader.texts("p", "banner") == [
        "This run starved and ended early: round 1: <0> completions survived."
    ]
    assert banner(events, 2) == ""


def test_hostile_text_is_shown_and_is_no_markup(parts, folder):
    config, versions, axis, events, texts = parts
    # Two prompts are 3 kB of one word; every text is hostile, and so are tokens and reasons.
    for t in texts:
        t["text"], t["reasons"] = HOSTILE, [HOSTILE]
    for t in texts[:1]:
        for other in [o for o in texts if o["prompt"] == t["prompt"] and o is not t]:
            other["prompt"] = HOSTILE
        t["prompt"] = HOSTILE
    for e in events:
        if e["event"] == "token_kl":
            for curve in e["curves"]:
                curve["pieces"] = [HOSTILE] * len(curve["kl"])
                curve["prompt"], curve["reasons"] = HOSTILE, [HOSTILE]
        if e["event"] == "healing":
            e["barrier"] = HOSTILE
    events.append({"event": "validity", "instrument": HOSTILE, "valid": False, "reason": HOSTILE,
                   "round": -1, "seconds": 0.0, "texts": 0})  # fmt: skip
    events.append({"event": "reading", "instrument": HOSTILE, "stage": HOSTILE, HOSTILE: 1.0,
                   "round": 0, "seconds": 0.0, "texts": 0})  # fmt: skip
    events.append(events[-1] | {"event": "starved", "sentence": HOSTILE, "round": 1})
    words = ("name", "description", "positive", "negative")
    told = {word: f"{HOSTILE}{i}" for i, word in enumerate(words)}
    axis = type(axis)(
        **told, contexts=axis.contexts, prompts=axis.prompts, expected=dict(axis.expected)
    )
    config = config | {"model": HOSTILE, "axis": HOSTILE}
    versions = versions | {"commit": HOSTILE, HOSTILE: HOSTILE}
    text = rendered(folder, (config, versions, axis, events, texts))
    reader = checked(text)
    assert set(reader.texts("div", "tokens")) == {
        SHOWN * len(curve["kl"])
        for e in events
        if e["event"] == "token_kl"
        for curve in e["curves"]
    }
    own = [t for t in reader.texts("div", "text") if t not in reader.texts("div", "tokens")]
    assert set(own) == {SHOWN}
    bdis = reader.texts("bdi")
    assert f"{SHOWN}0" in bdis
    assert f"{SHOWN}3" in bdis
    assert f"not valid on this model: {SHOWN}" in bdis
    assert any(SHOWN in t for t in reader.texts("p", "banner"))
    assert any(SHOWN in t for t in reader.texts("li"))
    assert {SHOWN} <= set(reader.texts("th")) | set(reader.texts("dd"))
    assert reader.texts("title")[0].startswith(SHOWN)


def test_numbers_gone_wrong_are_a_sentence_where_the_chart_would_be(folder, parts):
    events = parts[3]
    for e in events:
        if e["event"] == "stage":
            e["shift"] = dict.fromkeys(e["shift"], 1e300)
        if e["event"] == "token_kl":
            for curve in e["curves"]:
                curve["kl"] = [1.7e308] * len(curve["kl"])
    text = rendered(folder, parts)
    checked(text)
    assert text.count("1e+300 cannot be drawn on the axis") >= 2
    assert text.count("1.7e+308 cannot be drawn on the") >= 1


def numbers(panel, label):
    (line,) = [line for line in panel.lines if line.get_label() == label]
    return np.asarray(line.get_ydata(), dtype=float)


def test_charts_hold_the_numbers_of_the_record(folder, parts):
    config, _, axis, events, texts = parts
    figures = charts(folder, config, axis, events, texts)
    healed = [e for e in events if e["event"] == "stage" and e["stage"] == "healed"]
    care, authority, coherence, survival = figures["trajectory"].figure.axes
    assert numbers(care, "healed").tolist() == [e["shift"]["care"] for e in healed]
    assert numbers(authority, "healed").tolist() == [e["shift"]["authority"] for e in healed]
    assert numbers(coherence, "healed").tolist() == [e["coherence"] for e in healed]
    assert numbers(survival, "healed").tolist() == [e["survival"] for e in healed]
    assert [tick.get_text() for tick in care.get_xticklabels()] == ["0", "1"]
    steps = [s for e in events if e["event"] == "healing" for s in e["steps"]]
    d = figures["barrier"].figure.axes[0]
    assert numbers(d, "D").tolist() == [s["d"] for s in steps]
    listed = ", ".join(f"{e['shift']['care']:.3g}" for e in healed)
    assert f"healed: {listed}." in figures["trajectory"].svg


def test_text_in_a_chart_is_no_markup(folder, parts):
    config, _, axis, events, texts = parts
    for e in events:
        if e["event"] == "token_kl":
            for curve in e["curves"]:
                curve["pieces"] = ["$<b>&\x00" for _ in curve["kl"]]
    svg = charts(folder, config, axis, events, texts)["kl_tokens"].svg
    assert "$&lt;b&gt;&amp;\\x00" in svg
    assert "<b>" not in svg


def test_the_whole_comes_first_and_a_verdict_is_shown_once(folder, parts, monkeypatch):
    told = (
        Answer("Q0", "can we filter?", "yes", "Yes. Holds: it falls.", {}),
        Answer("selective", "on the axis?", "undecided", "Undecided. Open: all.", {}),
        Answer("dose", "the dose", "info", "No round.", {}),
        Answer("worked", "did it work?", "no", "No. Not at all.", {}),
    )
    monkeypatch.setattr("experiments.report.page.answer_all", lambda *_: told)
    found = cards(parts[3], parts[4], parts[2], EvalConfig())
    assert [(c.key, c.question, c.verdict, c.sentence) for c in found] == [
        ("", "did it work?", "no", "Not at all."),
        ("Q0", "can we filter?", "yes", "Holds: it falls."),
        ("", "on the axis?", "undecided", "Open: all."),
        ("", "the dose", "info", "No round."),
    ]
    tiles = checked(rendered(folder, parts)).texts("li", "tile")
    assert [tile.split() for tile in tiles] == [
        ["\u2717", "no", "did", "it", "work?"],
        ["\u2713", "yes", "Q0", "can", "we", "filter?"],
        ["?", "undecided", "on", "the", "axis?"],
    ]


def test_heat_shades_by_nats_and_outlines_what_is_above_tau():
    kl = [0.0, 0.0099, 0.01, 0.5, 0.5001, 9.0, 10.0, 400.0]
    curve = {"verdict": "kept", "reasons": [], "dose": 1.0, "pieces": list("abcdefgh"), "kl": kl}
    found = heat(curve, 0.5)
    assert HEAT == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    assert [token[2] for token in found.tokens] == [0, 0, 1, 4, 4, 6, 7, 7]
    assert [token[3] for token in found.tokens] == [False] * 4 + [True] * 4
    assert found.over == 4
    for values in (kl, [2.0], np.random.default_rng(1).exponential(size=61).tolist()):
        assert sizes(values) == pytest.approx(
            {
                "mean": np.mean(values),
                "rmse": np.sqrt(np.mean(np.square(values))),
                "p95": np.quantile(values, 0.95),
                "max": np.max(values),
            }
        )


def test_the_page_marks_the_tokens_of_the_record(folder, parts):
    parts[0]["loop"]["heal"]["tau"] = 99.0  # what was trained with decides, not this
    healing = [e for e in parts[3] if e["event"] == "healing"]
    assert {e["tau"] for e in healing} == {0.01}
    (event, _) = [e for e in parts[3] if e["event"] == "token_kl"]
    event["curves"][0]["kl"] = [0.01, 0.0101, *[0.0] * (len(event["curves"][0]["kl"]) - 2)]
    reader = checked(rendered(folder, parts))
    titled = [
        (a["title"], a["class"].split())
        for t, a, _ in reader.blocks
        if t == "span" and "title" in a
    ]
    assert [(title, "over" in kinds) for title, kinds in titled[:3]] == [
        ("0.010 nats", False),
        ("0.010 nats", True),
        ("0.000 nats", False),
    ]


def test_text_can_be_read_on_every_shade():
    css = (Path(page_module.__file__).parent / "templates" / "page.css").read_text("utf-8")
    heats = re.findall(r"--heat: (\d+) (\d+) (\d+); --full: (\d+)%", css)
    for heat_of, panel, text in zip(
        heats, ("#f5f6f8", "#1d2128"), ("#1c2128", "#e6e9ee"), strict=True
    ):
        *colour, full = map(int, heat_of)
        ground = [int(panel[i : i + 2], 16) for i in (1, 3, 5)]
        for k in range(8):
            share = full / 100 * k / 7
            mixed = [
                round(share * a + (1 - share) * b) for a, b in zip(colour, ground, strict=True)
            ]
            assert contrast(text, "#" + "".join(f"{part:02x}" for part in mixed)) >= 4.5


def test_an_instrument_that_is_not_valid_is_greyed_with_its_reason(folder, parts):
    own = instruments(parts[3])
    assert set(own) == {"vignettes"}
    assert own["vignettes"].sentence in rendered(folder, parts)
    parts[3][:] = [e for e in parts[3] if e["event"] != "validity"]
    assert instruments(parts[3]) == {}
    assert "Other instruments" not in rendered(folder, parts)
    common = {"seconds": 0.0, "texts": 0, "instrument": "tinymfv"}
    bad = {"event": "validity", "valid": False, "reason": "informedness 0.01 is chance"}
    read_ = {"event": "reading", "nats": {"care": -1.25}, "informedness": 0.01, "note": "x"}
    more = [
        bad | common | {"round": -1},
        read_ | common | {"stage": "base", "round": -1},
        read_ | common | {"stage": "healed", "round": 1, "coherence": 0.5},
    ]
    fine = {"event": "validity", "instrument": "vignettes", "valid": True, "reason": "0.61",
            "round": -1, "seconds": 0.0, "texts": 0}  # fmt: skip
    parts[3] = [parts[3][0], *more, fine, *parts[3][1:]]
    found = instruments(parts[3])["tinymfv"]
    assert found.columns == ("nats.care", "informedness", "coherence")
    assert found.rows == (("base", ("-1.25", "0.01", "")), ("healed 1", ("-1.25", "0.01", "0.5")))
    reader = checked(rendered(folder, parts))
    (grey,) = [a for t, a, _ in reader.blocks if t == "div" and "invalid" in a.get("class", "")]
    assert grey["aria-label"] == "readings"
    told = reader.texts("p", "check")
    assert "tinymfv not valid on this model: informedness 0.01 is chance" in told
    # The probe's own check stands beside trajectory, table and foundations.
    assert told.count("vignettes valid on this model: 0.61") == 3
    parts[3] = [e | {"valid": False} if e["event"] == "validity" else e for e in parts[3]]
    reader = checked(rendered(folder, parts))
    assert [
        a["id"] for t, a, _ in reader.blocks if t == "section" and a.get("class") == "invalid"
    ] == ["foundations"]
    # Coherence and survival, half of the trajectory, rest on no reading of the trait.


def test_cosines_are_those_to_the_first_and_the_last():
    def vector(*rows):
        return SteeringVector({i: torch.tensor(row) for i, row in enumerate(rows)}, "m", "a", 1)

    # cos((3, 4), (4, 3)) = 24 / 25; the other layer is unchanged, so the mean is 0.98.
    one, two = vector([3.0, 4.0], [1.0, 0.0]), vector([4.0, 3.0], [1.0, 0.0])
    (panel,) = cosines([(0, one), (1, two)]).axes
    assert numbers(panel, "to the first (round 0)") == pytest.approx([1.0, 0.98])
    assert numbers(panel, "to the last (round 1)") == pytest.approx([0.98, 1.0])


def test_a_damaged_vector_is_named_in_place_of_its_chart(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "rounds/1/vector.safetensors").write_bytes(b"x")
    text = write_page(broken).read_text("utf-8")
    checked(text)
    assert "This chart cannot be drawn: " in text


def test_the_command_takes_a_folder_or_the_newest(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(SystemExit) as stop:
        program_report.main()
    assert stop.value.code == 2
    assert "there is no run folder" in capsys.readouterr().err
    own = shutil.copytree(folder, tmp_path / "runs" / "own")
    names = ("report.html", "table.md", "answers.json", "diary.md", "trajectory.png")
    for name in names:
        (own / name).unlink()
    program_report.main()
    assert all((own / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert "report.html" in capsys.readouterr().out
