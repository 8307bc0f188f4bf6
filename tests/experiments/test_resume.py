"""A run killed at any point and resumed equals the uninterrupted run, bit for bit."""

import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import tyro
from helpers import one_sentence, small_loop
from records import tiny_runs
from rich.console import Console

from experiments import run as program
from experiments.checks.crash import differences
from experiments.record import journal, resume, settings
from experiments.record.journal import Journal, lock
from experiments.record.reader import RecordReader, read
from experiments.record.resume import Recorder, Resume
from experiments.record.schema import name_of
from experiments.record.settings import RunConfig, folder_of, settings_of
from experiments.record.signals import Stop, Stopped
from experiments.record.status import remaining, status
from experiments.record.writer import RecordWriter
from experiments.report.report import report
from experiments.run import study
from shl.config import OnlineConfig
from shl.method.axes import load_axis
from shl.method.heal import HealStep, Training
from shl.method.stages import StarvedError
from shl.models.tiny import tiny_gemma
from shl.utils.errors import ShlError

CONFIG = RunConfig(model="tiny", loop=small_loop())
CHANGES = ("os.rename", "os.remove", "os.truncate", "os.mkdir")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The tiny model on 8 vignettes; training is saved after every step."""
    digest = settings.code_digest()
    with tiny_runs() as patch:
        patch.setattr(settings, "code_digest", lambda: digest)
        patch.setattr(resume, "SAVE_EVERY", 0.0)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An uninterrupted run."""
    return go(tmp_path_factory.mktemp("alone") / "run")


def quiet():
    return Console(file=io.StringIO())


def go(folder, config=CONFIG):
    return study(replace(config, out=folder), quiet())


def fork(work):
    """Run `work` in a child that ends without cleaning up; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """How a child ended: an exit status, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def log_computed(log):
    """In a child: one line per stage that is computed and per training step that is taken."""
    find, on_step = Recorder.find, Recorder.on_step

    def write(*fields):
        with log.open("a") as stream:
            print(*fields, file=stream)

    def logging_find(self, name, index, batch=None):
        line = find(self, name, index, batch)
        if line is None:  # so it is computed now
            write(name, index, "-" if batch is None else batch)
        return line

    def logging_step(self, index, step, total, state):
        write("step", index, step.step)
        on_step(self, index, step, total, state)

    Recorder.find, Recorder.on_step = logging_find, logging_step


def on_record(folder):
    """The finished stages, as `log_computed` writes them."""
    events = Journal(folder / "events.jsonl").lines if folder.exists() else []
    return {f"{name_of(e)} {e['round']} {e.get('batch', '-')}" for e in events}


def chain(folder, kill):
    """Start the same run until it ends, the n-th process under `kill(n)`; how many died.

    Checks that no process computes what was on record when it began.
    """
    for n in range(400):
        before, log = on_record(folder), folder.with_suffix(f".{n}")
        code = kill(n, log)
        computed = set(log.read_text().splitlines()) if log.exists() else set()
        assert not before & computed
        steps = {line.split()[1] for line in computed if line.startswith("step")}
        assert not {f"healing {index} -" for index in steps} & before
        if code == 0:
            return n
        assert code == -signal.SIGKILL
    raise AssertionError("the run does not get anywhere")


def die_after(folder, method, *names):
    """For `chain`: die after a call of a method of the record, with a last argument in `names`."""

    def kill(n, log):
        def work():
            log_computed(log)
            original = getattr(RecordWriter, method)

            def last_call(self, *args, **kwargs):
                original(self, *args, **kwargs)
                if not names or args[-1] in names:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(RecordWriter, method, last_call)
            go(folder)

        return ended(fork(work))

    return kill


def unfinish(folder, count):
    """Cut a record off in the middle of the line after `count`; 6 are the start, three baselines,
    a vector and a probe."""
    events = folder / "events.jsonl"
    lines = events.read_text("utf-8").split("\n")
    events.write_text("\n".join([*lines[:count], lines[count][:30]]), "utf-8")


def test_run_killed_before_or_within_any_write_resumes(tmp_path):
    config = replace(CONFIG, loop=small_loop(rounds=1))
    folder, alone, rng = tmp_path / "run", tmp_path / "alone", random.Random(0)
    go(alone, config)
    report(alone, quiet())

    def die(operation, torn):
        """SIGKILL before the n-th change to a file of the run, or within the n-th write."""
        count = [0]
        write = os.write

        def due(on):
            count[0] += on
            return on and count[0] == operation

        def audit(event, args):
            opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (
                (opens or event in CHANGES)
                and str(args[0]).startswith(str(folder))
                and due(not torn)
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        def half(descriptor, data):
            if due(torn):
                write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, data)

        sys.addaudithook(audit)
        os.write = half

    def kill(n, log):
        operation, torn = rng.randint(4, 9), n % 3 == 2

        def work():
            log_computed(log)
            die(operation // 2 if torn else operation, torn)
            go(folder, config)

        return ended(fork(work))

    assert chain(folder, kill) >= 20
    report(folder, quiet())
    assert differences(alone, folder) == []


def test_run_killed_after_every_event_resumes(alone, tmp_path):
    folder = tmp_path / "run"
    # Every event but the start's is a process of its own.
    assert chain(folder, die_after(folder, "event")) == len(Journal(alone / "events.jsonl").lines)
    assert differences(alone, folder) == []


@pytest.mark.parametrize("seed", range(4))
def test_run_killed_at_random_moments_resumes(seed, alone, tmp_path):
    folder, rng = tmp_path / "run", random.Random(seed)

    def kill(n, log):
        pid = fork(lambda: (log_computed(log), go(folder)))
        if n < 7:
            time.sleep(rng.uniform(0.02, 0.4))
            os.kill(pid, signal.SIGKILL)
        return ended(pid)

    assert chain(folder, kill) == 7
    assert differences(alone, folder) == []


@pytest.mark.parametrize("objective", ["teacher", "reward"])
def test_online_run_killed_at_random_moments_resumes(objective, tmp_path):
    settings = OnlineConfig(objective=objective, every=5, refresh=2, prompts=2, rows=4)
    config = replace(CONFIG, loop=small_loop(mode="online", rounds=1, online=settings))
    folder, alone, rng = tmp_path / "run", tmp_path / "alone", random.Random(1)
    go(alone, config)

    def kill(n, log):
        """Before a saved step of training, or after it at a random moment."""

        def work():
            log_computed(log)
            save, steps = RecordWriter.save, [0]

            def counted(self, tensors, index, name):
                steps[0] += name == "training"
                if n < 6 and steps[0] == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                save(self, tensors, index, name)

            RecordWriter.save = counted
            go(folder, config)

        pid = fork(work)
        if n < 2:
            time.sleep(rng.uniform(0.02, 0.4))
            os.kill(pid, signal.SIGKILL)
        return ended(pid)

    assert chain(folder, kill) >= 6
    assert differences(alone, folder) == []
    # Each process dies before it has saved its second step, so it takes two and the last is lost.
    logs = [path.read_text().splitlines() for path in sorted(folder.parent.glob("run.*"))]
    taken = [line for log in logs for line in log if line.startswith("step")]
    assert [line for log in logs for line in log].count("step 0 0") == 1
    assert 5 <= len(taken) <= 10


def test_a_starved_online_run_ends_with_a_sentence_on_record(tmp_path, monkeypatch):
    filters = import_module("shl.method.filters")
    monkeypatch.setattr(filters, "text_reasons", lambda t, *_: ["soup"] if len(t) % 2 else [])
    settings = OnlineConfig(every=5, refresh=2, prompts=4, min_survival=1.0)
    config = replace(CONFIG, loop=small_loop(mode="online", rounds=1, online=settings))
    folder = tmp_path / "run"
    with pytest.raises(StarvedError) as error:
        go(folder, config)
    sentence = one_sentence(error)
    assert "round 0, step 4: 11 of 12 completions" in sentence
    assert "at least 100% must pass; dropped last: soup" in sentence
    assert [name_of(e) for e in read(folder)[1]][-1] == "starved"
    assert "completions of the student passed the filter" in (folder / "report.html").read_text()


def test_training_resumes_from_its_last_saved_step(alone, tmp_path):
    folder = tmp_path / "run"
    # 2 rounds of 4 steps, a process for each.
    assert chain(folder, die_after(folder, "save", "training")) == 8
    logs = [folder.with_suffix(f".{n}").read_text().splitlines() for n in range(9)]
    steps = [line for log in logs for line in log if "step" in line]
    assert steps == [f"step {index} {step}" for index in (0, 1) for step in range(4)]
    assert differences(alone, folder) == []
    assert not list(folder.glob("rounds/*/training.safetensors"))


def test_finished_run_is_not_repeated(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    log = tmp_path / "log"
    assert ended(fork(lambda: (log_computed(log), go(folder)))) == 0
    assert not log.exists()
    assert differences(alone, folder) == []


def test_lock_rejects_a_second_process_until_the_first_is_dead(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    unfinish(folder, 6)
    ready, release = os.pipe()

    def hold():
        held = lock(folder)  # noqa: F841, released when it is collected
        os.write(release, b"x")
        time.sleep(60)

    pid = fork(hold)
    os.read(ready, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
        with pytest.raises(ShlError) as error:
            go(folder)
    assert f"is in use by process {pid}" in one_sentence(error)
    assert "process    running" in status(folder)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    go(folder)
    assert "process    none" in status(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_run_with_a_complete_record(number, alone, tmp_path):
    folder = tmp_path / "run"

    def main():
        sys.argv = ["run", "--out", str(folder)]
        tyro.cli = lambda *_, **__: replace(CONFIG, out=folder)
        with (tmp_path / "said").open("w") as sys.stdout:
            try:
                program.main()
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(stop.code)

    pid = fork(main)
    while not (folder / "events.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(pid, number)
    asked = time.monotonic()
    assert ended(pid) == 128 + number
    assert time.monotonic() - asked < 5
    said = (tmp_path / "said").read_text()
    assert f"stopped; {folder} holds" in " ".join(said.split())
    assert "remains" in status(folder)
    go(folder)
    assert differences(alone, folder) == []


def test_folder_of_another_run_is_rejected(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    other = replace(CONFIG, loop=replace(CONFIG.loop, seed=7))
    with pytest.raises(ShlError) as error:
        go(folder, other)
    assert "has loop.seed 42, this run has 7" in one_sentence(error)


def test_default_folder_is_unique_and_inside_runs():
    other = replace(CONFIG, loop=replace(CONFIG.loop, seed=7))
    axis = replace(load_axis("love"), name="../../etc/[x]")

    def folder(config, commit="one", threads=1):
        files = settings_of(config, axis)
        files["versions.json"] |= {"commit": commit, "threads": threads}
        return folder_of(config, files)

    assert folder(CONFIG) == folder(CONFIG) == folder(CONFIG, commit="only the README changed")
    assert len({folder(CONFIG), folder(other), folder(CONFIG, threads=2)}) == 3
    assert folder(CONFIG).parts[0] == "runs"
    assert len(folder(CONFIG).parts) == 2
    assert folder(CONFIG).name.startswith(".._.._etc_x_-tiny-seed42-")
    assert folder_of(replace(CONFIG, out="here"), {}) == "here"


def test_resuming_with_other_weights_is_rejected(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "save_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            go(folder)
    monkeypatch.setattr(program, "load_model", lambda name, device=None: tiny_gemma(seed=1))
    with pytest.raises(ShlError) as error:
        go(folder)
    assert "began with weights" in one_sentence(error)


def test_status_prints_finished_and_remaining_stages(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    assert "finished   base, prompted+, prompted-; round 0; round 1" in status(folder)
    names = [name_of(e) for e in Journal(folder / "events.jsonl").lines]
    unfinish(folder, names.index("probe") + 1)
    printed = status(folder)
    assert "round 0: vector, probe" in printed
    assert "remains    round 0: batch, steered, healing, healed, retention; 1 more round" in printed


def test_status_counts_the_steps_of_an_unfinished_healing(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    names = [name_of(e) for e in Journal(folder / "events.jsonl").lines]
    unfinish(folder, names.index("healing"))
    assert "healing is saved" not in status(folder)
    steps = tuple(HealStep(0, k, *[0.0] * 8) for k in range(3))
    state = Training({"A": torch.zeros(1)}, 1.0, steps, "texts")
    state.save(folder / "rounds" / "0" / "training.safetensors")
    assert "healing is saved after 3 steps" in status(folder)


def test_status_names_the_baselines_that_remain():
    assert remaining("start", -1, 1) == "base, prompted+, prompted-; 1 round"
    assert remaining("context:base", -1, 2) == "prompted+, prompted-; 2 rounds"
    assert remaining("healed", 0, 1) == "round 0: retention"
    assert remaining("token_kl", 0, 1) == "the final summary"


def test_status_without_permission_to_open_the_lock(alone, tmp_path, monkeypatch):
    folder = shutil.copytree(alone, tmp_path / "run")
    (folder / ".lock").touch()

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(journal.FileLock, "acquire", refuse)
    assert "process    unknown, no permission to open" in status(folder)


def test_signal_during_a_write_stops_at_its_end():
    written = []

    def write():
        with Stop() as stop, stop.delayed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            written.append("whole")

    with pytest.raises(Stopped):
        write()
    assert written == ["whole"]


def test_differences_of_two_runs_are_found(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run")
    assert differences(alone, folder) == []
    (folder / "table.md").write_text("")
    (folder / "more").touch()
    events = Journal(folder / "events.jsonl").lines
    events[4]["seconds"] += 1.0  # computing time may differ
    events[-1]["seconds"] += 1.0
    (folder / "events.jsonl").unlink()
    Journal(folder / "events.jsonl").append(events)
    assert differences(alone, folder) == ["only in one: more", "only in one: table.md"]
    (number,) = [i for i, e in enumerate(events) if name_of(e) == "healing" and e["round"] == 0]
    events[number]["tau"] += 0.5
    (folder / "events.jsonl").unlink()
    Journal(folder / "events.jsonl").append(events)
    assert differences(alone, folder)[-1] == f"differs: events.jsonl from line {number + 1}"
    (folder / "texts.jsonl").write_bytes(
        (folder / "texts.jsonl").read_bytes() + b"{"
    )  # a torn line
    assert "differs: texts.jsonl" in differences(alone, folder)


def test_walk_is_loaded_with_its_own_rung(alone):
    record = RecordReader(alone)
    resumed = Resume(record, tiny_gemma(), CONFIG.loop)
    line = record.find("probe", 0)
    # kappa 1 and 0.2; the first is in use
    assert [rung["kappa"] for rung in line["ladder"]] == [1.0, 0.2]
    assert resumed.load_probe(0).walk.kappa == line["kappa"] == 1.0
    line["kappa"] = 0.2
    assert (resumed.load_probe(0).walk.rung, resumed.load_probe(0).walk.kappa) == (1, 0.2)
