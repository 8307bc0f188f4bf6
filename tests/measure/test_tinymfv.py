"""`--eval tinymfv`, on a stand-in with the package's interface, and on the package if installed."""

import importlib.util
import sys
from dataclasses import replace
from textwrap import dedent

import numpy as np
import pytest
import torch
from helpers import lenient, one_sentence, small_loop
from rich.console import Console
from transformers import AutoModelForCausalLM

from experiments import run as program
from experiments.checks.crash import differences
from experiments.record.reader import read, read_json
from experiments.record.settings import RunConfig
from experiments.record.status import status
from experiments.report.report import report
from experiments.run import study
from shl.hooks.vector import SteeringVector
from shl.measure.tinymfv import Tinymfv, TinymfvConfig, _balanced, nats, tokenizer_for
from shl.method.axes import load_axis
from shl.models.as_hf import as_hf
from shl.models.load import load_model
from shl.models.tiny import tiny_gemma, tiny_hf
from shl.models.weights import model_folder
from shl.utils.errors import ShlError

NAMES = ("tinymfv", "moralmaps")
PERSONA = "You are kind."
STAND_IN = '''
"""A stand-in for tests: the interface of the public package, with nine vignettes."""
import numpy as np
import torch

CONDITIONS = ("other_violate", "self_violate")
WORDS = {"Care": "hits", "Fairness": "cheats", "Authority": "defies"}


def load_vignettes(name="classic"):
    return [
        {"id": f"{f}{i}", "foundation_coarse": f, "other_violate": f"He {w} {i}.",
         "self_violate": f"You {w} {i}!", "label": int(k)}
        for i in range(3) for k, (f, w) in zip((0, 1, 3), WORDS.items())
    ]


class Table:
    def __init__(self, rows):
        self.rows = rows

    def to_dict(self, orient):
        return self.rows


def ask(model, tok, texts, think):
    chats = [tok.apply_chat_template([{"role": "user", "content": t}], tokenize=False,
                                     add_generation_prompt=True) for t in texts]
    tok.padding_side = "left"
    enc = tok(chats, return_tensors="pt", padding=True)
    out = model.generate(**enc, max_new_tokens=think, min_new_tokens=think, do_sample=False,
                         suppress_tokens=[tok.eos_token_id], return_dict_in_generate=True,
                         output_scores=True, num_return_sequences=1)
    end = tok.apply_chat_template([{"role": "user", "content": "Answer"}], tokenize=False)
    new = tok([end] * len(texts), return_tensors="pt", add_special_tokens=False).input_ids
    # As in the public package, the mask is one column wider than the cache and `new` together.
    mask = torch.cat([(out.sequences != tok.pad_token_id).long(), torch.ones_like(new)], 1)
    last = model(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values,
                 use_cache=True)
    digits = [tok.encode(str(k), add_special_tokens=False)[0] for k in range(7)]
    return last.logits[:, -1].float().log_softmax(-1)[:, digits].tolist()


@torch.no_grad()
def evaluate(model, tokenizer, *, name, vignettes, conditions, max_think_tokens, batch_size,
             return_per_row, verbose):
    rows = []
    for condition in conditions:
        for i in range(0, len(vignettes), batch_size):
            chunk = vignettes[i : i + batch_size]
            fwd = ask(model, tokenizer, [v[condition] for v in chunk], max_think_tokens)
            rev = ask(model, tokenizer, [v[condition] + "?" for v in chunk], max_think_tokens)
            for v, a, b in zip(chunk, fwd, rev):
                label = np.eye(7)[v["label"]]
                rows.append({"id": v["id"], "condition": condition, "label": label,
                             "foundation_coarse": v["foundation_coarse"],
                             "lp_fwd_samples": [a], "lp_rev_samples": [b[::-1]]})
    table = Table([{"foundation": f, "n": 3, "mean_p_other": 0.5, "gap": float("nan")}
                   for f in WORDS])
    scalars = dict.fromkeys(("top1_acc", "informedness", "mean_nll", "mean_nll_T", "T",
                             "frac_unscorable", "mean_nll_prefill"), 0.25)
    return {"per_row": rows, "table": table, "mean_pmass_allowed": None, **scalars}
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The stand-in, importable as `tinymfv`, instead of an installed package."""
    folder = tmp_path / "site" / "tinymfv"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(dedent(STAND_IN))
    monkeypatch.syspath_prepend(folder.parent)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    sys.modules.pop("tinymfv", None)


def scores(report):
    return np.array([row[f"lp_{o}_samples"] for row in report["per_row"] for o in ("fwd", "rev")])


@pytest.mark.usefixtures("stand_in")
def test_scores_equal_those_of_transformers_at_any_batch_size(gemma):
    one, four = (Tinymfv(TinymfvConfig(think=3, batch_size=n)) for n in (1, 4))
    tokenizer = tokenizer_for(gemma, None)
    ours, theirs = (scores(one.report(m, tokenizer)) for m in (as_hf(gemma), tiny_hf()))
    assert ours.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-3
    assert np.abs(scores(four.report(as_hf(gemma), tokenizer)) - ours).max() <= 1e-3
    assert np.abs(scores(four.report(tiny_hf(), tokenizer)) - ours).max() > 1e-2


@pytest.mark.usefixtures("stand_in")
def test_reading_depends_on_hooks_and_persona(gemma):
    instrument = Tinymfv(TinymfvConfig(think=2, vignettes=5))
    base = instrument(gemma, None)
    assert base["template"] == "minimal"
    assert base["package"] == "tinymfv"
    assert base["version"].startswith("unknown ")
    assert base["labels"] == ["care", "fairness", "authority", "care", "fairness"]
    assert base["asked"][:3] == ["other_violate fwd", "other_violate rev", "self_violate fwd"]
    assert np.array(base["log_probs"]).shape == (5, 4, 7)
    assert base["table"]["numbers"]["mean_pmass_allowed"] is None
    assert base["table"]["per_foundation"]["Care"] == {"n": 3.0, "mean_p_other": 0.5, "gap": None}
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with SteeringVector({1: v}, "tiny", "demo", 1).steering(gemma):
        steered = instrument(gemma, None)
    prompted = instrument(gemma, PERSONA)
    for other in (steered, prompted):
        assert np.abs(np.array(other["log_probs"]) - base["log_probs"]).max() > 1e-2
    assert instrument(gemma, None) == base


def test_vignettes_are_taken_from_each_foundation_in_turn():
    groups = [{"foundation_coarse": name, "id": i} for i, name in enumerate("aabbbc")]
    assert [v["id"] for v in _balanced(groups, 5)] == [0, 2, 5, 1, 3]


def test_nats_by_hand():
    p = np.array([[0.4, *[0.1] * 6], [0.2, 0.2, *[0.12] * 5]])
    # Each item is normalised over the options (total mass here 1 and 0.5) first.
    logs = np.log(p * np.array([[1.0], [0.5]]))[:, None]
    assert nats(logs)["care"] == pytest.approx(np.log(0.3))
    missing = np.concatenate([logs, np.full((1, 1, 7), np.nan)])
    assert nats(missing) == nats(logs)


def test_tokenizer_is_a_copy_that_adds_the_persona(gemma):
    def rendered(model, persona, **settings):
        tokenizer = tokenizer_for(model, persona)
        turns = [{"role": "user", "content": "hi"}]
        return tokenizer.apply_chat_template(turns, tokenize=False, **settings)

    assert rendered(gemma, PERSONA, add_generation_prompt=True) == "You are kind.\n\nQ: hi\nA: "
    # A later turn of the conversation has no persona.
    assert rendered(gemma, PERSONA) == "Q: hi\n"
    assert rendered(gemma, None, add_generation_prompt=True) == "Q: hi\nA: "
    assert gemma.tokenizer.chat_template is None
    no_system = "{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = "{% for m in messages %}" + no_system + "[{{ m['content'] }}]{% endfor %}"
    chat = tiny_gemma(chat_template=template)
    assert rendered(chat, PERSONA, add_generation_prompt=True) == "[You are kind.\n\nhi]"


def test_missing_package_is_reported_before_the_model_is_loaded(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in NAMES else find(name, *a)
    )
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("loaded"))
    config = RunConfig(eval="tinymfv", out=tmp_path / "run")
    with pytest.raises(ShlError, match="bin/pip install -e") as error:
        study(config, Console(quiet=True))
    one_sentence(error)
    with pytest.raises(ShlError, match="must be at least 4"):
        TinymfvConfig(vignettes=3)


@pytest.mark.usefixtures("stand_in")
def test_every_stage_is_read_and_a_killed_run_resumes(monkeypatch, tmp_path):
    lenient(monkeypatch)
    monkeypatch.setattr(program, "load_model", lambda name, device=None: tiny_gemma())
    config = RunConfig(
        model="tiny", eval="tinymfv", tinymfv=TinymfvConfig(think=1), loop=small_loop(rounds=1)
    )
    no_nulls = replace(config.loop.eval, nulls=0)
    config = replace(config, loop=replace(config.loop, eval=no_nulls))
    quiet = Console(quiet=True)
    alone = study(replace(config, out=tmp_path / "alone"), quiet)
    report(alone, quiet)
    _, events, _ = read(alone)
    other = [e for e in events if e["event"] != "items"]
    names = [f"{e['event']} {e.get('instrument', '')} {e.get('stage', '')}" for e in other]
    assert names[1:10] == [
        *("stage  base", "reading tinymfv base"),
        *("stage  prompted+", "reading tinymfv prompted+"),
        *("stage  prompted-", "reading tinymfv prompted-"),
        *("validity vignettes ", "validity tinymfv ", "vector  "),
    ]
    assert names[-9:-4] == [
        *("stage  steered", "reading tinymfv steered", "healing  "),
        *("stage  healed", "reading tinymfv healed"),
    ]
    assert set(other[2]["shift"].values()) == {0.0}
    readings = [np.array(e["log_probs"]) for e in events if e["event"] == "reading"]
    assert all(np.abs(x - readings[0]).max() > 1e-3 for x in readings[1:])
    packages = read_json(alone / "versions.json")["packages"]
    assert packages["tinymfv"].startswith("unknown ")

    calls = []
    real = Tinymfv.__call__

    def interrupted(self, model, persona):
        calls.append(persona)
        if len(calls) in (2, 6):
            raise RuntimeError("killed")
        return real(self, model, persona)

    monkeypatch.setattr(Tinymfv, "__call__", interrupted)
    killed = replace(config, out=tmp_path / "killed")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            study(killed, quiet)
        assert "remains" in status(tmp_path / "killed")
    study(killed, quiet)
    axis = load_axis("care_auth")
    up, down = axis.positive, axis.negative
    assert calls == [None, up, up, down, None, None, None]
    report(tmp_path / "killed", quiet)
    assert differences(alone, tmp_path / "killed") == []


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, NAMES)),
    reason="the public tinymfv is not installed: .venv/bin/pip install -e '.[tinymfv]'",
)
def test_public_package_scores_the_view_as_transformers():
    model = load_model("gemma-3-270m", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(model_folder("gemma-3-270m"), dtype=torch.float32)
    one, eight = (Tinymfv(TinymfvConfig(vignettes=4, think=1, batch_size=n)) for n in (1, 8))
    tokenizer = tokenizer_for(model, None)
    ours, theirs = (one.report(m, tokenizer) for m in (as_hf(model), hf.eval()))
    assert np.abs(scores(ours) - scores(theirs)).max() <= 1e-3
    for key in ("informedness", "mean_pmass_allowed", "mean_nll_prefill"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-3)
    batched = scores(eight.report(as_hf(model), tokenizer))
    assert np.abs(batched - scores(ours)).max() <= 1e-3
    v = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with SteeringVector({9: 100 * v}, "gemma-3-270m", "demo", 1).steering(model):
        steered = scores(eight.report(as_hf(model), tokenizer))
    assert np.abs(steered - batched).max() > 0.1
