"""The program: a whole tiny run through the command line, its record, and bad input."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
import tyro
from helpers import kl_by_hand, lenient, log_p_by_hand, one_sentence, save
from matplotlib import pyplot as plt
from records import tiny_runs
from rich.console import Console

from experiments import run as program
from experiments.record import progress, settings
from experiments.record.reader import read
from experiments.record.settings import RunConfig
from experiments.report.page import write_page
from experiments.report.report import report
from experiments.report.tables import rows
from shl.config import LoopConfig
from shl.hooks.adapter import Adapter
from shl.hooks.bake import baked
from shl.hooks.sites import engine_name
from shl.hooks.vector import SteeringVector
from shl.models.generate import Completion
from shl.models.load import load_model
from shl.models.tiny import tiny_gemma, tiny_hf
from shl.models.tokens import Prompt, decode, encode
from shl.utils.errors import ShlError

SMALL = """
  --rounds 2 --vector.contexts 3 --generate.max-new-tokens 8 --generate.min-new-tokens 4
  --dose.rungs 2 --dose.probe-size 2 --dose.min-train 6 --dose.batch-size 4 --heal.rank 2
  --heal.epochs 2 --heal.tau 0.01 --heal.lr 0.02 --eval.samples 3 --eval.bootstrap 20
  --eval.nulls 0 --eval.conflicts 4 --filter.min-topic 0
""".split()  # noqa: SIM905


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run the command line on the tiny model."""
    monkeypatch.chdir(tmp_path)

    def load(name, *, device=None):
        if name != "tiny":
            raise ShlError(f"unknown model {name!r}: tiny is the only one here.")
        return tiny_gemma()

    def main(*words):
        monkeypatch.setattr(program, "load_model", load)
        monkeypatch.setattr(sys, "argv", ["run", "--model", "tiny", *SMALL, *map(str, words)])
        program.main()

    return main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One finished run."""
    out = tmp_path_factory.mktemp("runs") / "one"
    with tiny_runs() as patch:
        patch.setattr(sys, "argv", ["run", "--model", "tiny", *SMALL, "--out", str(out)])
        program.main()
    return out


def test_files_and_events_of_a_finished_run(folder):
    config, events, texts = read(folder)
    assert config["loop"]["heal"]["tau"] == 0.01
    assert config["loop"]["seed"] == 42
    lines = (folder / "events.jsonl").read_text("utf-8").split("\n")
    parsed = [json.loads(line) for line in lines if line]
    assert [{k: v for k, v in line.items() if k != "check"} for line in parsed] == events
    stage = ["stage", "items", "items"]
    before = ["start", *stage, *stage, *stage, "validity"]
    one = ["vector", "probe", "batch", *stage, "healing", *stage, "retention", "round"]
    one.append("token_kl")
    assert [e["event"] for e in events] == [*before, *one, *one, "end"]
    # 6 samples of base, 3 of each persona; per round 4 probes, 4 dreams and 3 samples.
    assert len(texts) == 6 + 2 * 3 + 2 * (4 + 4 + 3)
    stages = {"base", "prompted+", "prompted-", "probe", "batch", "healed"}
    assert {t["stage"] for t in texts} == stages
    assert all(t["reasons"] == [] and t["text"] for t in texts)
    versions = json.loads((folder / "versions.json").read_text("utf-8"))
    assert {"torch", "transformer-lens"} <= set(versions["packages"])


def test_token_kl_matches_full_logits_of_the_generating_model(folder):
    """KL(student || base) per token from full float64 logits, of every round's completions."""
    _, events, texts = read(folder)
    model = tiny_gemma()
    adapters = []
    for index in (0, 1):
        place = folder / "rounds" / str(index)
        adapters.append(Adapter.load(place / "adapter.safetensors", model))
        vector = SteeringVector.load(place / "vector.safetensors")
        assert (adapters[-1].round, vector.contexts) == (index, 3)
        (event,) = [e for e in events if e["event"] == "token_kl" and e["round"] == index]
        # Nothing is dropped in this run, so there is no dropped completion.
        assert [curve["verdict"] for curve in event["curves"]] == ["kept", "healed"]
        for curve in event["curves"]:
            stages = {"kept": ("probe", "batch"), "healed": ("healed",)}[curve["verdict"]]
            (text,) = [
                t
                for t in texts
                if (t["round"], t["prompt"], t["dose"]) == (index, curve["prompt"], curve["dose"])
                and t["stage"] in stages
                and [decode(model, [token]) for token in t["tokens"]] == curve["pieces"]
            ]
            prompt = Prompt(text["prompt"], text["persona"])
            ids = tuple(encode(model, prompt))
            completion = Completion(prompt, text["text"], tuple(text["tokens"]), ids, 0.0, False)
            base = log_p_by_hand(model, completion)
            if curve["verdict"] == "healed":
                with baked(model, adapters):
                    student = log_p_by_hand(model, completion)
            else:
                with baked(model, adapters[:-1]), vector.steering(model, curve["dose"]):
                    student = log_p_by_hand(model, completion)
            expected = kl_by_hand(student, base)
            assert expected.max() > 1e-4
            assert curve["kl"] == pytest.approx(expected.tolist(), abs=2e-5)


def test_table_has_a_row_per_stage_with_the_numbers_of_its_event(folder):
    _, events, _ = read(folder)
    table = rows(events)
    names = ["base", "prompted+", "prompted-", "steered 0", "healed 0", "steered 1", "healed 1"]
    assert [row["stage"] for row in table] == names
    assert table[0]["valid mass"] == "1.00"
    assert (table[3]["kept/gen"], table[3]["kappa"]) == ("6/8", "1.00")
    healing = [e for e in events if e["event"] == "healing"]
    assert table[6]["D"] == f"{healing[1]['epochs'][-1]['d']:.2f}"
    stages = [e for e in events if e["event"] == "stage"]
    (column,) = {key for row in table for key in row if key.startswith("auth_nats")}
    assert [row[column] for row in table] == [f"{e['nats']['authority']:.2f}" for e in stages]
    measured, trained = (
        [line.split("|")[1:-1] for line in part.splitlines()]
        for part in (folder / "table.md").read_text().split("\n\n")
    )
    assert [line[0].strip() for line in measured] == ["stage", "---", *names]
    assert [line[0].strip() for line in trained] == ["stage", "---", *names[3:]]
    assert [cell.strip() for cell in trained[0]][:3] == ["stage", "kept/gen", "kappa"]
    assert not {cell.strip() for cell in measured[0][1:]} & {c.strip() for c in trained[0]}


def test_plots_are_not_blank(folder):
    names = {"trajectory.png", "plane.png", "kl_tokens.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    for path in folder.glob("*.png"):
        path.unlink()
    write_page(folder, pngs=True)  # from the record alone
    assert {path.name for path in folder.glob("*.png")} == names
    for name in names:
        picture = plt.imread(folder / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02


def test_report_is_reproduced_from_the_record(folder, capsys):
    before = json.loads((folder / "answers.json").read_text("utf-8"))
    (folder / "answers.json").unlink()
    report(folder, Console(width=200))
    assert json.loads((folder / "answers.json").read_text("utf-8")) == before
    out = capsys.readouterr().out
    assert "prompted+" in out
    assert all(f"{key}: {answer['question']}" in out for key, answer in before.items())
    assert {answer["verdict"] for answer in before.values()} <= {"yes", "no", "undecided", "info"}
    assert [q[:2] for q in before][:4] == ["Q0", "Q1", "Q2", "Q3"]


@pytest.mark.parametrize("name", ["config.json", "axis.json", "versions.json"])
def test_modified_settings_are_rejected(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / name).open("a") as stream:
        stream.write(" ")
    with pytest.raises(ShlError) as error:
        read(copy)
    assert "was modified after the run began" in one_sentence(error)


def test_starved_run_ends_with_status_two(call, monkeypatch, capsys, tmp_path):
    lenient(monkeypatch, reasons=lambda text: ["soup"])
    with pytest.raises(SystemExit) as stop:
        call("--out", "run")
    assert stop.value.code == 2
    assert "error: round 0: 0 completions survived" in capsys.readouterr().err
    # What was computed before is on disk.
    events = read(tmp_path / "run")[1]
    assert [e["event"] for e in events[-9:]] == ["vector", "probe", *["batch"] * 6, "starved"]
    answers = json.loads((tmp_path / "run/answers.json").read_text())
    assert "completions survived" in answers["ended"]["sentence"]
    # The same command ends in the same way, without a second event.
    with pytest.raises(SystemExit):
        call("--out", "run")
    assert read(tmp_path / "run")[1] == events


def test_defaults_and_help_of_the_command_line(call, capsys):
    assert tyro.cli(RunConfig, args=[]) == RunConfig()
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--heal.tau" in out
    assert "--axis STR" in out


def test_without_a_terminal_each_finished_stage_prints_a_line(call, monkeypatch, capsys, tmp_path):
    lenient(monkeypatch)
    call("--out", "run", "--rounds", "1")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " stages, " in line]
    # 3 baselines and 7 stages of one round, and two readings of each of the 5 that are measured.
    reads = ("", "context:", "kl:")
    names = ["vector", "dose probe", "batch 0", *(f"{read}steered" for read in reads), "healing"]
    names += [*(f"{read}healed" for read in reads), "retention"]
    done = [f"{read}{name}" for name in progress.BASELINES for read in reads]
    done += [f"round 0: {name}" for name in names]
    for number, (name, line) in enumerate(zip(done, lines, strict=True), 1):
        time = r"\d+\.\d min elapsed, about \d+ min left"
        assert re.fullmatch(rf"{re.escape(name)} done, {number} of 20 stages, {time}", line)
    # A resumed run prints what it computes, not what it loads.
    events = tmp_path / "run/events.jsonl"
    events.write_text("".join(events.read_text("utf-8").splitlines(keepends=True)[:-7]), "utf-8")
    call("--out", "run", "--rounds", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if " stages, " in line]
    assert [line.split(" done")[0] for line in lines] == done[-4:]


def test_time_left_is_estimated_from_computed_stages(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    shown = progress.StageProgress(LoopConfig(rounds=1), console)
    # Weights 5, 5, 5; 1.5, 5, 5, 3, 12, 5, 5: 51.5. Loaded are 10, computed 5 in 300 s, left 36.5.
    for name in ("base", "prompted+"):
        shown.finished(name, -1, loaded=True)
    clock[0] = 300.0
    shown.finished("prompted-", -1, loaded=False)
    said = console.file.getvalue()
    assert said == "prompted- done, 3 of 10 stages, 5.0 min elapsed, about 36 min left\n"


def test_terminal_shows_a_bar_without_lines():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    shown = progress.StageProgress(LoopConfig(rounds=1), console)
    with shown.bar:
        shown.finished("base", -1, loaded=False)
        shown.step(0, 5, 12, 0.25)
        assert shown.bar.tasks[0].completed == 29.5 + 6.0  # half of healing's 12
    assert "round 0: healing 6/12, D 0.25" in console.file.getvalue()
    assert "stages" not in console.file.getvalue()


def test_engine_dtype_and_device_map_reach_the_model(tmp_path, monkeypatch, capsys):
    models, asked, out = [], {}, tmp_path / "run"
    place = str(save(tmp_path / "model", tiny_hf()))
    lenient(monkeypatch)

    def load(name, **settings):
        asked.update(settings)
        models.append(load_model(name, **settings))
        return models[-1]

    monkeypatch.setattr(program, "load_model", load)
    options = ["--engine", "bridge", "--dtype", "bfloat16", "--device-map", "auto"]
    words = ["run", "--model", place, *SMALL, "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, *options])
    program.main()
    (model,) = models
    assert engine_name(model) == "TransformerBridge, compatibility mode off"
    assert {p.dtype for p in model.original_model.parameters()} == {torch.bfloat16}
    assert asked["device_map"] == "auto"
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert [config[name] for name in ("engine", "dtype", "device_map")] == options[1::2]
    assert read(out)[1][-1]["event"] == "end"
    for changed in (options[:4], [*options[2:]], ["--engine", "hooked"]):
        monkeypatch.setattr(sys, "argv", [*words, *changed])
        with pytest.raises(SystemExit):
            program.main()
        assert "a run continues only with the same settings" in capsys.readouterr().err


def test_the_digest_of_the_code_covers_both_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    seen = [settings.code_digest()]
    for path in ("shl/a.py", "shl/data/b.toml", "experiments/c.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        for text in ("one", "two"):
            (tmp_path / path).write_text(text)
            seen.append(settings.code_digest())
    assert len(set(seen)) == 7
    (tmp_path / "shl/notes.txt").write_text("no code")
    assert settings.code_digest() == seen[-1]
