"""The command line, with a model in a local folder and nothing replaced: hostile input and hostile
days end in a status, one sentence, and a record that the same command continues."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import save
from test_page import checked

from experiments import run as program
from experiments.checks.crash import differences
from experiments.record import settings
from experiments.record.reader import read
from experiments.report.escape import clean
from shl.method.axes import load_axis
from shl.method.extract import extract_vector
from shl.models.load import load_model
from shl.models.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
SMALL = """
  --rounds 1 --vector.contexts 3 --generate.max-new-tokens 8 --generate.min-new-tokens 4
  --dose.rungs 2 --dose.probe-size 2 --dose.min-train 6 --dose.batch-size 4 --heal.rank 2
  --heal.sites q down --heal.unsteered 0 --heal.narrative 0 --eval.samples 3 --eval.bootstrap 20
  --eval.nulls 0 --eval.conflicts 4 --eval.batch-size 84 --filter.min-words 0
  --filter.max-tail-perplexity 1e30 --filter.min-perplexity 1 --filter.max-word-share 1
  --filter.max-char-share 1 --filter.max-run 99 --filter.min-compression 0
  --filter.min-real-words 0 --filter.min-distinct-words 0
""".split()  # noqa: SIM905
# The filter keeps everything, since a random model writes noise.


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A random Gemma-3 in a folder."""
    return save(tmp_path_factory.mktemp("models") / "tiny", tiny_hf())


@pytest.fixture(scope="module", autouse=True)
def code():
    """A change to a source file while the tests run is not a change of the code they test."""
    digest = settings.code_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "code_digest", lambda: digest)
        yield


@pytest.fixture
def call(local, monkeypatch, tmp_path, capsys):
    """Run the command line in this process, in an empty folder; its status and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", argv(local, *words))
        try:
            program.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def argv(local, *words):
    return ["run", "--model", str(local), *SMALL, *map(str, words)]


@pytest.fixture(scope="module")
def alone(local, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv(local, "--out", folder))
        program.main()
    return folder


def refused(result, sentence):
    status, err = result
    assert status == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert err.endswith(".\n")
    assert sentence in err


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begun(alone, folder, event):
    """A copy of the run that ended after an event of this name, or within the next line."""
    shutil.copytree(alone, folder)
    path = folder / "events.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    events = read(alone)[1]
    count = 1 + next(i for i, e in enumerate(events) if event in (e["event"], e.get("stage")))
    texts = folder / "texts.jsonl"
    written = texts.read_bytes().splitlines(keepends=True)[: events[count - 1]["texts"]]
    texts.write_bytes(b"".join(written))
    path.write_text("".join(lines[:count]) + lines[count][:30], "utf-8")
    return folder


SETTINGS = [
    (("--axis", "nonsense"), "unknown axis 'nonsense'"),
    (("--rounds", "0"), "rounds is 0, it must be at least 1"),
    (("--rounds", 10**20), "rounds is 1"),
    (("--seed", 10**20), "seed is 100000000000000000000"),
    (("--eval.samples", 10**20), "samples is 1"),
    (
        ("--eval.bootstrap", "100001"),
        "bootstrap is 100001, it must be at least 10 and at most 1000",
    ),
    (("--heal.tau", "nan"), "tau is nan"),
    (("--heal.lr", "inf"), "lr is inf"),
    (("--dose.alpha", "nan"), "alpha is nan"),
    (("--heal.lora-alpha", "1e300"), "lora_alpha is 1e+300"),
    (("--heal.lam-schedule", "power", "--heal.lam-power", "nan"), "lam_power is nan"),
    (("--heal.aggregate", "median"), "aggregate is 'median'"),
    (("--vector.contexts", "9999"), "contexts is 9999"),
    (("--device", "cuda:99"), "device is 'cuda:99', torch finds"),
    (("--device", "cpu:7"), "device is 'cpu:7', it must be cpu, cuda or cuda:N"),
    (("--device", "meta"), "device is 'meta', it must be cpu, cuda or cuda:N"),
    (("--device", "abacus"), "device is 'abacus', it must be cpu, cuda or cuda:N"),
    (("--out", "."), "holds something else"),
    (("--out", f"missing/{'n' * 300}"), "has 300 bytes, a folder's may have 255"),
    (("--out", "taken"), "taken/events.jsonl cannot be read (Not a directory)"),
]


@pytest.mark.parametrize(("words", "sentence"), SETTINGS)
def test_settings_are_refused_before_the_model_is_loaded(
    words, sentence, call, monkeypatch, tmp_path
):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "taken").write_text("x")
    refused(call(*words), sentence)
    assert content(tmp_path) == {Path("taken"): b"x"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a\tb", "is not printable"),
        ("a\u00a0b", "is not printable"),
        ("\U0001f468\u200d\U0001f469", "is not printable"),
        ("\x1b[31m", "is not printable"),
        ("n" * 300, "has 300 characters, it must have at most 100"),
    ],
)
def test_axis_names_are_refused_before_the_model_is_loaded(
    name, sentence, call, monkeypatch, tmp_path
):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    refused(call("--axis", axis_file(tmp_path, name)), sentence)


def axis_file(folder, name, prompts=()):
    """care_auth with another name and more prompts."""
    axis = load_axis("care_auth")
    path = folder / "axis.toml"

    def quoted(text):
        escaped = (c if c.isalnum() else f"\\U{ord(c):08x}" for c in text)
        return f'"{"".join(escaped)}"'

    fields = {key: quoted(getattr(axis, key)) for key in ("description", "positive", "negative")}
    fields |= {"name": quoted(name), "contexts": '"everyday"', "expected": "{ care = 1 }"}
    fields["prompts"] = "[" + ", ".join(map(quoted, (*prompts, *axis.prompts[:4]))) + "]"
    path.write_text("\n".join(f"{key} = {value}" for key, value in fields.items()), "utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "[/red]"), "unknown model '[/red]'"),
        (("--model", "tab\tbed"), "has a character that is not printable"),
        (("--heal.rank", "100000"), "rank is 100000, it must be at most 32, the width of"),
        (("--vector.layers", "7"), "layer 7 is out of range"),
        (("--heal.layers", "7"), "layer 7 is out of range"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_computed(
    words, sentence, call, tmp_path
):
    refused(call(*words), sentence)
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda_is_refused(call, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(call("--device", "cuda"), "device is 'cuda', torch finds 0 CUDA devices")


def test_read_only_folder_is_refused(call, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    mounted = os.access(place, os.W_OK)  # by root, to whom modes do not apply
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", str(place)]
    if mounted and subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may write everywhere and mount nothing")
    try:
        refused(call("--out", place / "run"), "cannot be written")
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def fork(work):
    """Run `work` in a child that is not cleaned up; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(stop.code or 0)
        finally:
            os._exit(9)
    return pid


def in_child(local, folder, work=lambda: None):
    """Start the run in a child of its own, after `work`; its process id."""

    def main():
        sys.argv = argv(local, "--out", folder)
        sys.stdout = sys.stderr = folder.with_suffix(".said").open("w")
        work()
        program.main()
        sys.exit()

    return fork(main)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def lines_in(folder):
    path = folder / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(folder, lines, pid):
    while lines_in(folder) < lines:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), folder.with_suffix(".said").read_text()
        time.sleep(0.005)


def test_run_killed_at_a_random_moment_of_every_stage(local, alone, call, tmp_path):
    folder, rng = tmp_path / "run", random.Random(0)
    for line in range(1, lines_in(alone), 2):
        pid = in_child(local, folder)
        wait_for(folder, line, pid)
        if line == 5:  # the second process on one folder
            refused(call("--out", folder), f"is in use by process {pid}")
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (-signal.SIGKILL, 0)
    assert call("--out", folder)[0] == 0
    assert differences(alone, folder) == []


def test_full_disk_loses_nothing(local, alone, call, tmp_path):
    folder = tmp_path / "run"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    assert ended(in_child(local, folder, limit)) == 2
    said = folder.with_suffix(".said").read_text().splitlines()
    assert said[-1].startswith("error: ")
    assert said[-1].endswith("events.jsonl cannot be written (File too large).")
    assert 1 < lines_in(folder) < lines_in(alone)
    assert call("--out", folder)[0] == 0
    assert differences(alone, folder) == []


def test_moved_folder_continues(alone, call, tmp_path):
    shutil.move(begun(alone, tmp_path / "one", "probe"), tmp_path / "other")
    assert call("--out", "other")[0] == 0
    assert differences(alone, tmp_path / "other") == []


def edit(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


def other_vector(model, folder, seed, axis):
    hf = tiny_hf(seed=seed)
    made_on = save(folder.with_suffix(".model") / Path(model).name, hf)
    found = extract_vector(load_model(str(made_on)), load_axis(axis), contexts=3, round=0)
    found.save(folder / "rounds/0/vector.safetensors")


EDITS = {
    "texts": (
        "batch",
        lambda f, _: edit(f / "texts.jsonl", b"manager", b"manages"),
        "checksum mismatch",
    ),
    "events": ("batch", lambda f, _: edit(f / "events.jsonl", b"0", b"1"), "checksum mismatch"),
    "config": ("batch", lambda f, _: edit(f / "config.json", b"20", b"21"), "this run has 20"),
    "adapter": (
        "healing",
        lambda f, _: edit(f / "rounds/0/adapter.safetensors", b"\x00\x00", b"\x01\x00"),
        "cannot be read|checksum mismatch",
    ),
    "vector of another model": (
        "vector",
        lambda f, model: other_vector(model, f, 1, "care_auth"),
        "was made on weights of",
    ),
    "vector of another axis": (
        "vector",
        lambda f, model: other_vector(model, f, 0, "love"),
        "differ from those on record",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_files_are_refused(name, local, alone, call, tmp_path, capsys):
    event, change, sentence = EDITS[name]
    folder = begun(alone, tmp_path / "run", event)
    change(folder, local)
    before = content(folder)
    capsys.readouterr()  # what is printed when a model is saved
    result = call("--out", folder)
    refused(result, "")
    assert re.search(sentence, result[1])
    after = content(folder)
    changed = {str(path) for path in before.keys() | after if before.get(path) != after.get(path)}
    assert changed <= {".lock", "processes.jsonl", "events.jsonl"}
    assert before[Path("events.jsonl")].startswith(after[Path("events.jsonl")])


def test_folder_of_somebody_else_is_refused(alone, call, tmp_path):
    folder = begun(alone, tmp_path / "run", "base")
    before = content(folder)
    refused(call("--out", folder, "--seed", 7), "has loop.seed 42, this run has 7")
    assert content(folder) == before


NAME = "<img src=x onerror=alert(1)>[/red]{{ 7 * 7 }}</title>"
PROMPT = "\x1b[31m\x07</script><script>document.title = 'ran'</script>\u202e[/b] {% raw %}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_markup_in_an_axis_is_shown_as_text(call, tmp_path):
    assert call("--axis", axis_file(tmp_path, NAME, [PROMPT]), "--out", "run")[0] == 0
    page = tmp_path / "run" / "report.html"
    seen = page.read_text("utf-8")
    if CHROMIUM is not None:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *flags, profile, page.as_uri()]
        seen = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout
    reader = checked(seen)
    assert any(NAME in text for text in reader.texts("title"))
    assert any(NAME in text for text in reader.texts("h1"))
    assert any(clean(PROMPT) in text for text in reader.texts("main"))
    assert "\x1b" not in seen


def test_refusal_of_the_program_itself(local, tmp_path):
    command = [sys.executable, "-m", "experiments.run", *argv(local)[1:], "--heal.tau", "inf"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    refused((done.returncode, done.stderr), "tau is inf, it must be at least 0")
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
