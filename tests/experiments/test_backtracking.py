"""Texts that were rewound: their lines in the record, what is loaded from them, and the page."""

import io
import json
from dataclasses import replace

import pytest
from helpers import one_sentence, small_loop
from records import tiny_runs
from rich.console import Console
from test_page import checked

from experiments.record.reader import RecordReader, read
from experiments.record.resume import Recorder, Resume
from experiments.record.schema import check_lines
from experiments.record.settings import RunConfig
from experiments.report.page import dosed, stories, write_page
from experiments.run import study
from shl.config import FilterConfig, GenerateConfig
from shl.hooks.vector import SteeringVector
from shl.method.backtrack import replay
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

KEYS = {"doses", "pieces", "rewinds"}
LOOP = small_loop(
    rounds=1,
    generate=GenerateConfig(max_new_tokens=24, temperature=0.0),
    filter=FilterConfig(max_tail_perplexity=10.0),
    dose=replace(small_loop().dose, min_train=8, batch_size=6, backtrack=True),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the batches that its loop made."""
    out, made = tmp_path_factory.mktemp("back") / "run", []
    with tiny_runs() as patch:
        save = Recorder.save_batch

        def spy(self, index, number, batch):
            made.append(batch)
            save(self, index, number, batch)

        patch.setattr(Recorder, "save_batch", spy)
        study(RunConfig(model="tiny", loop=LOOP, out=out), Console(file=io.StringIO()))
    return out, made


def test_lines_have_the_dose_of_each_token(run):
    folder, made = run
    _, events, texts = read(folder)
    rewound = [t for t in texts if "rewinds" in t]
    assert any(t["tokens"] for t in rewound)
    for t in rewound:
        assert t["stage"] == "batch"
        assert len(t["doses"]) == len(t["pieces"]) == len(t["tokens"])
        assert "".join(t["pieces"]) == t["text"]
    assert not any(KEYS & set(t) for t in texts if t not in rewound)
    counts = [e["rewinds"] for e in events if e["event"] == "batch"]
    assert counts == [sum(len(v.completion.rewinds) for v in batch.verdicts) for batch in made]
    assert sum(counts) == sum(len(t["rewinds"]) for t in rewound)
    assert not any("rewinds" in e for e in events if e["event"] == "probe")


def test_loaded_texts_are_those_of_the_loop_and_replay_to_the_token(run):
    folder, made = run
    model = tiny_gemma()
    loaded = Resume(RecordReader(folder), model, LOOP)
    vector = SteeringVector.load(folder / "rounds" / "0" / "vector.safetensors")
    for number, batch in enumerate(made):
        found = loaded.load_batch(0, number)
        assert found.verdicts == batch.verdicts
        for v in found.verdicts:
            assert replay(model, v.completion, vector).argmax(1).tolist() == list(
                v.completion.tokens
            )


def test_the_page_shades_tokens_by_dose_and_marks_rewinds(run):
    folder, _ = run
    page = write_page(folder).read_text("utf-8")
    reader = checked(page)
    _, _, texts = read(folder)
    steered = [t for _, _, rounds in stories(texts) for _, t, _ in rounds if t is not None]
    rewound = [t for t in steered if t.get("pieces")]
    assert rewound
    for t in rewound:
        shown = [x for x in reader.texts("div", "tokens") if x.replace("\u27f2", "") == t["text"]]
        assert any("\u27f2" in x for x in shown)
    assert "was rewound are shaded" in page


def test_a_text_is_shown_by_dose():
    text = {
        "dose": 2.0,
        "pieces": list("abcd"),
        "doses": [2.0, 1.2, 0.4, 1.5],
        "rewinds": [[1, 1.2], [1, 0.7], [9, 0.4]],
    }
    marks = "rewound to here, dose 1.20, dose 0.70"
    assert dosed(text) == [
        ("a", 7, 2.0, ""),
        ("b", 4, 1.2, marks),
        ("c", 1, 0.4, ""),
        ("d", 5, 1.5, "rewound to here, dose 0.40"),
    ]
    assert dosed({"dose": 2.0}) == dosed(text | {"pieces": [], "doses": []}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"doses": [1.0]}, "doses or pieces for"),
        ({"pieces": ["a"]}, "doses or pieces for"),
        ({"rewinds": []}, "rewinds"),
        ({"doses": None}, "rewinds without doses"),
    ],
)
def test_a_malformed_text_is_rejected(run, change, reason):
    _, events, texts = read(run[0])
    [first, *_] = [i for i, t in enumerate(texts) if len(t.get("doses", ())) > 1]
    changed = json.loads(json.dumps(texts))
    changed[first] |= change
    with pytest.raises(ShlError) as error:
        check_lines(events, changed, "the record")
    assert reason in one_sentence(error)
    check_lines(events, texts, "the record")
    # A record from before there was backtracking.
    for t in changed:
        for key in KEYS & set(t):
            del t[key]
    check_lines(events, changed, "the record")
