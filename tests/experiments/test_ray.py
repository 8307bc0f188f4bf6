"""The arms on Ray: what waits for what, workers and drivers that die, and studies that starve."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import torch
import tyro
from helpers import one_sentence, quick_worker, save
from rich.console import Console

from experiments.arms.__main__ import ArmsConfig, run_arms
from experiments.arms.catalogue import chosen
from experiments.arms.cluster import connected
from experiments.arms.stage_cache import same_result
from experiments.arms.studies import SHARED, STEERED, steps
from experiments.record.journal import lock, read_lines
from experiments.record.reader import read
from shl.config import LoopConfig
from shl.models.tiny import tiny_hf
from shl.utils.errors import ShlError

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
# Noise passes the filter, tags apart. Walking arms have 12 probes and 12 more completions, of which
# 13 must survive; an arm that does not walk has 12 and starves.
SMALL = """
  --seeds 42 --rounds 1 --num-cpus 1 --vector.contexts 3 --generate.max-new-tokens 8
  --generate.min-new-tokens 4 --dose.rungs 1 --dose.probe-size 12 --dose.min-train 13
  --dose.batch-size 4 --dose.max-batches 3 --heal.rank 2 --heal.epochs 1 --heal.unsteered 1
  --heal.narrative 1 --eval.samples 2 --eval.bootstrap 20 --eval.nulls 0 --eval.conflicts 4
  --filter.min-words 0 --filter.max-tail-perplexity 1e9 --filter.min-perplexity 1
  --filter.max-word-share 1 --filter.max-char-share 1 --filter.max-run 1000
  --filter.min-compression 0 --filter.min-real-words 0 --filter.min-distinct-words 0
""".split()  # noqa: SIM905
ARMS = ("rmse", "none", "unsteered")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny model."""
    return str(save(tmp_path_factory.mktemp("model"), tiny_hf()))


def config(folder, out, *arms, ray=None):
    words = ["--model", folder, "--arms", *arms, "--out", str(out), *SMALL]
    words += ["--ray", ray] if ray else []
    return tyro.cli(ArmsConfig, args=words)


QUICK = ("experiments.arms.studies", "shl.measure.vignettes")
"""Modules that `quick_worker` changes."""
TESTS = Path(__file__).parents[1]
HOOK = {"worker_process_setup_hook": "helpers.quick_worker"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What `quick_worker` does, here and in every process that is started."""
    studies, probe = (import_module(name) for name in QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{ROOT}")
        patch.setattr(studies, "report", studies.report)
        patch.setattr(probe, "first_vignettes", probe.first_vignettes)
        quick_worker()
        yield


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The arms in one process."""
    out = tmp_path_factory.mktemp("alone")
    run_arms(config(folder, out, *ARMS), QUIET)
    return out


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two workers on this machine."""
    with connected("local", num_cpus=2, num_gpus=2, runtime_env=HOOK):
        yield


def result(run):
    """The results on record: without times, and without what tells the code's state."""
    _, events, texts = read(run)
    kept = [{k: v for k, v in e.items() if k not in ("seconds", "cpu", "files")} for e in events]
    names = ("config.json", "axis.json", "*/*/*.safetensors")
    paths = sorted(path for name in names for path in run.glob(name))
    return kept, texts, {str(path.relative_to(run)): path.read_bytes() for path in paths}


def without_cpu(value):
    """A JSON value without the CPU times in it."""
    if isinstance(value, list):
        return [without_cpu(x) for x in value]
    if isinstance(value, dict):
        return {key: without_cpu(x) for key, x in value.items() if key != "cpu"}
    return value


def last_process(run):
    """The process that began last on a run, and whether it has ended; None before the first."""
    lines = read_lines(run / "processes.jsonl")
    return (lines[-1]["process"], lines[-1]["event"]) if lines else None


def wait_until(true, seconds=480):
    """Wait for a condition; without it, fail."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def has(run, *names):
    """Whether a record has events of these names."""
    return set(names) <= {line["event"] for line in read_lines(run / "events.jsonl")}


@contextmanager
def killed_once(run):
    """SIGKILL the worker of a run once it has extracted its vector and is at work."""
    dead = []

    def kill():
        def at_work():
            last = last_process(run)
            return last if last and last[1] == "begin" and has(run, "probe") else None

        dead.append(wait_until(at_work)[0])
        os.kill(dead[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    yield dead
    thread.join()


@pytest.fixture(scope="module")
def on_ray(folder, cluster, tmp_path_factory):
    """The arms on Ray, where one worker was killed; the folder and its process id."""
    out = tmp_path_factory.mktemp("ray")
    with killed_once(out / "rmse" / "seed42") as dead:
        run_arms(config(folder, out, *ARMS, ray="local"), QUIET)
    return out, dead[0]


def test_arms_on_ray_equal_those_of_one_process(alone, on_ray):
    out, _ = on_ray
    for arm in ARMS:
        assert result(alone / arm / "seed42") == result(out / arm / "seed42"), arm
    for name in ("doses.jsonl", "kinds.jsonl"):
        # The first line identifies the run, by the code's state too.
        one, other = (read_lines(top / STEERED / "seed42" / name)[1:] for top in (alone, out))
        assert one == other, name
    one, other = (json.loads((top / "arms.json").read_text()) for top in (alone, out))
    timed = [[row["arm"] for row in found["arms"] if "cpu" in row] for found in (one, other)]
    assert timed == [["rmse", "none"]] * 2
    assert without_cpu(one) == without_cpu(other)


def test_a_killed_worker_is_replaced_and_resumes(on_ray):
    out, dead = on_ray
    lines = read_lines(out / "rmse" / "seed42" / "processes.jsonl")
    begun = [i for i, line in enumerate(lines) if line["event"] == "begin"]
    # Until the vector and until the texts, then to the end; and once more.
    assert len(begun) == 4
    (killed,) = [i for i, j in zip(begun, [*begun[1:], len(lines)], strict=True) if j == i + 1]
    again = lines[killed + 1]
    assert lines[killed]["process"] == dead != again["process"]
    assert again["events"] > lines[killed]["events"]


def test_stages_on_ray_are_computed_once(on_ray):
    out, _ = on_ray
    logs = {arm: (out / arm / "seed42" / "log.txt").read_text() for arm in ARMS}
    # A copied stage has no line. The worker of rmse may have died before it wrote one.
    others = [arm for arm in ARMS if arm != "rmse"]
    computed = {
        stage: [arm for arm in others if f"{stage} done" in logs[arm]]
        for stage in ("base", "prompted-", "vector", "dose probe", "batch 0", "steered", "healed")
    }
    assert computed == {
        "base": [],
        "prompted-": [],
        "vector": [],
        "dose probe": [],
        "batch 0": ["unsteered"],
        "steered": [],
        "healed": ["none"],
    }
    for text in logs.values():
        assert text.rstrip().endswith("ends")


def test_a_starved_study_is_reported_and_stops_no_other(on_ray):
    out, _ = on_ray
    ends = {arm: read(out / arm / "seed42")[1][-1]["event"] for arm in ARMS}
    assert ends == {"rmse": "end", "none": "end", "unsteered": "starved"}
    for name in ("arms.md", "report.html"):
        text = (out / name).read_text()
        assert "unsteered, seed 42" in text
        assert "completions survived, 13 are needed" in text


def test_a_study_that_fails_is_reported_and_stops_no_other(folder, alone, cluster, tmp_path):
    (tmp_path / "rmse" / "seed42").mkdir(parents=True)
    (tmp_path / "rmse" / "seed42" / "mine.txt").touch()
    with pytest.raises(ShlError) as error:
        run_arms(config(folder, tmp_path, "rmse", "unsteered", ray="local"), QUIET)
    assert "studies failed" in one_sentence(error)
    # It waited for the first vector of an arm that has none.
    assert result(alone / "unsteered" / "seed42") == result(tmp_path / "unsteered" / "seed42")
    assert "rmse, seed 42 ended early: the run folder" in (tmp_path / "arms.md").read_text()


DRIVER = f"""
from experiments.arms import __main__ as program
from experiments.arms.cluster import connected
with connected("local", num_cpus=2, runtime_env={HOOK}):
    program.main()
"""


def driver_of(folder, out):
    """The command of a driver with a Ray of its own."""
    words = ["--ray", "local", "--model", folder, "--arms", "none", "--out", str(out), *SMALL]
    return [sys.executable, "-c", DRIVER, *words]


def start(folder, out):
    """A driver in a process of its own."""
    return subprocess.Popen(driver_of(folder, out), cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def start_in_terminal(folder, out):
    """A driver in a terminal: its process id, the terminal, whose keys reach all processes in the
    foreground, and what it shows, read as it comes so that no process waits to print."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        command = driver_of(folder, out)
        os.execve(command[0], command, os.environ | {"TERM": "xterm", "COLUMNS": "200"})
    shown = []

    def read_on():
        with suppress(OSError):  # the last process has closed it
            while True:
                shown.append(os.read(terminal, 4096).decode(errors="replace"))

    threading.Thread(target=read_on, daemon=True).start()
    return pid, terminal, shown


def test_drivers_may_die_or_be_stopped_but_not_share_a_folder(folder, alone, cluster, tmp_path):
    run = tmp_path / "none" / "seed42"
    driver = start(folder, tmp_path)
    wait_until(lambda: has(run, "stage"))
    # A stopped worker stays in its stage, however long the test takes.
    worker, _ = last_process(run)
    os.kill(worker, signal.SIGSTOP)
    for ray in (None, "local"):
        with pytest.raises(ShlError) as error:
            run_arms(config(folder, tmp_path, "mean", ray=ray), QUIET)
        assert f"{tmp_path} is in use by process {driver.pid}" in one_sentence(error)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not psutil.pid_exists(worker), 60)

    before = len(read_lines(run / "events.jsonl"))
    pid, terminal, shown = start_in_terminal(folder, tmp_path)
    wait_until(lambda: len(read_lines(run / "events.jsonl")) > before)
    worker, _ = last_process(run)
    os.kill(worker, signal.SIGSTOP)
    os.write(terminal, b"\x03")
    wait_until(lambda: "stopping" in "".join(shown))
    os.kill(worker, signal.SIGCONT)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out = "".join(shown)
    assert status == 128 + signal.SIGINT, out
    assert "each worker finishes its stage" in out
    assert "to continue:" in out
    assert "experiments.arms --ray local" in out
    assert last_process(run)[1] != "begin"
    assert not has(run, "end")

    run_arms(config(folder, tmp_path, "none", ray="local"), QUIET)
    assert result(alone / "none" / "seed42") == result(run)


def test_studies_on_gpus_have_one_each(folder, cluster, tmp_path):
    """Ray has two GPUs by its own count; the tasks get one each, and torch finds none."""
    words = ["--model", folder, "--arms", "unsteered", "--out", str(tmp_path), *SMALL]
    words += ["--seeds", "42", "43", "44", "--ray", "local", "--num-gpus", "1"]
    run_arms(tyro.cli(ArmsConfig, args=words), QUIET)
    logs = [tmp_path / "unsteered" / f"seed{seed}" / "log.txt" for seed in (42, 43, 44)]
    had = [re.findall(r"GPU (\d)", log.read_text()) for log in logs]
    assert all(len(found) == 2 for found in had)  # begins and ends
    assert {gpu for found in had for gpu in found} == {"0", "1"}


def test_ray_listens_on_loopback_without_dashboard_and_statistics(cluster):
    own = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = [c for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in own]
    assert listening
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert 8265 not in {c.laddr.port for c in listening}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--ray", "here"], "ray is 'here', it must be local, auto or ray://HOST:PORT"),
        (["--num-gpus", "1"], "num_gpus is 1, it needs --ray"),
        (["--num-cpus", "0"], "num_cpus is 0"),
    ],
)
def test_bad_options_of_ray_are_refused(folder, tmp_path, changes, message):
    words = ["--model", folder, "--out", str(tmp_path), *SMALL, *changes]
    with pytest.raises(ShlError) as error:
        run_arms(tyro.cli(ArmsConfig, args=words), QUIET)
    assert message in one_sentence(error)


def test_a_folder_of_arms_in_use_is_refused_before_anything_is_loaded(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setattr("experiments.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    held = lock(tmp_path)
    with pytest.raises(ShlError) as error:
        run_arms(config(folder, tmp_path, "none"), QUIET)
    assert f"is in use by process {os.getpid()}" in one_sentence(error)
    held.release()


@pytest.mark.parametrize("group", ["core", "steps", "far", "on-policy", "all"])
def test_each_shared_stage_is_computed_by_one_arm_before_others_need_it(group):
    loops = {arm.name: arm.change(LoopConfig()) for arm in chosen((group,))}
    done, order = {}, list(SHARED)
    for step in steps(loops):
        assert all(after in done for after in step.after)
        if step.arm == STEERED:
            assert step.after == (("rmse", "steered"),)
            continue
        # What has ended for certain when this step starts, by arm: its own steps and those before.
        known = {}
        for after in step.after:
            for arm, stage in {after} | done[after]:
                reach = len(order) if stage is None else order.index(stage) + 1
                known[arm] = max(known.get(arm, 0), reach)
        begin = known.get(step.arm, 0)
        end = len(order) if step.until is None else order.index(step.until) + 1
        for number in range(begin, end):
            stage = order[number]
            same = [
                arm
                for arm, loop in loops.items()
                if same_result(stage, SHARED[stage], loops[step.arm], loop)
            ]
            # The first arm computes it; any other finds it there.
            if same[0] != step.arm:
                assert known.get(same[0], 0) > number, (step, stage)
        done[step.arm, step.until] = set().union(*({a} | done[a] for a in step.after))
    assert {arm for arm, until in done if until is None} == set(loops)


def test_a_study_waits_no_longer_than_for_the_stage_that_it_needs():
    loops = {arm.name: arm.change(LoopConfig()) for arm in chosen(("core",))}
    waits = {(s.arm, s.until): s.after for s in steps(loops)}
    assert waits["rmse", "prompted-"] == ()
    assert waits["random", None] == (("rmse", "prompted-"),)
    for arm in ("prompted", "both", "unsteered"):
        assert waits[arm, None] == (("rmse", "vector"),)
    for arm in ("none", "mean", "p95"):
        assert waits[arm, None] == (("rmse", "steered"),)


def test_several_models_and_axes_have_a_folder_each(folder, monkeypatch, tmp_path):
    ran = []
    program = sys.modules[run_arms.__module__]
    monkeypatch.setattr(program, "run_arm", lambda *a, **k: ran.append((*a[:3],)))
    monkeypatch.setattr(program, "run_steered", lambda *_: None)
    monkeypatch.setattr(program, "compare", lambda *_: None)
    axes = ["care_auth", "love"]
    words = ["--model", folder, "--axis", *axes, "--arms", "rmse", "--out", str(tmp_path), *SMALL]
    torch_threads = torch.get_num_threads()
    folders = run_arms(tyro.cli(ArmsConfig, args=words), QUIET)
    assert torch.get_num_threads() == torch_threads == 1
    assert [folder.parent for folder in folders] == [tmp_path] * 2
    assert len(set(folders)) == 2
    assert [(folder, shared.axis) for folder, shared, _ in ran] == list(
        zip(folders, axes, strict=True)
    )
