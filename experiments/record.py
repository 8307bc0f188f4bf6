"""The run folder: config, versions, one JSON line per event, vectors and adapters.

    config.json     the settings, as run
    versions.json   python, packages, commit, device, threads
    events.jsonl    one line per finished stage
    texts.jsonl     one line per completion, with every reason to drop it
    rounds/N/       vector.safetensors, adapter.safetensors

Plots and reports are made from these files alone.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from experiments.numbers import (
    finite,
    healing_numbers,
    shift_numbers,
    stage_numbers,
    walk_numbers,
)
from shl.bake import baked
from shl.dose import Walk
from shl.errors import ShlError
from shl.evaluation import Evaluation
from shl.filters import Verdict
from shl.heal import Healed
from shl.loop import Round
from shl.lora import Adapter
from shl.scores import token_divergence
from shl.stages import Stage
from shl.tokens import decode
from shl.vector import SteeringVector

PACKAGES = ("torch", "transformer-lens", "transformers", "numpy", "einops", "safetensors")


def write(path: Path, text: str) -> None:
    """Write beside the place and rename, so that a reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, "utf-8")
    scratch.replace(path)


def versions(device: str) -> dict[str, Any]:
    """What a later reader needs to repeat the run."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


class Record:
    """Appends to one run folder.

    Raises:
        ShlError: the folder exists with something in it, or cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], device: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ShlError(f"the run folder {folder} is not empty, name a new one with --out.")
            write(folder / "config.json", json.dumps(config, indent=2))
            write(folder / "versions.json", json.dumps(versions(device), indent=2))
        except OSError as error:
            raise ShlError(
                f"the run folder {folder} cannot be written ({error.strerror})."
            ) from error
        self.started = time.time()
        self.base: Evaluation | None = None

    def event(self, name: str, index: int, values: Mapping[str, Any]) -> None:
        """One line of events.jsonl; `seconds` counts from the start of the run."""
        line = {"event": name, "round": index, "seconds": round(time.time() - self.started, 2)}
        self._append("events.jsonl", {**line, **values})

    def texts(self, stage: str, index: int, verdicts: Iterable[Verdict]) -> None:
        """One line of texts.jsonl per judged completion."""
        for v in verdicts:
            c = v.completion
            self._append(
                "texts.jsonl",
                {
                    "round": index,
                    "stage": stage,
                    "prompt": c.prompt.text,
                    "persona": c.prompt.persona,
                    "dose": c.dose,
                    "text": c.text,
                    "ended": c.ended,
                    "tokens": list(c.tokens),
                    "reasons": list(v.reasons),
                    "perplexity": finite(v.perplexity),
                    "tail_perplexity": finite(v.tail_perplexity),
                },
            )

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def observe(self, name: str, index: int, values: Mapping[str, Any]) -> None:
        """What `shl.love` calls: each finished stage goes to disk before the next begins."""
        if name == "stage":
            stage: Stage = values["stage"]
            extra = {key: values[key] for key in ("kappa", "dose") if key in values}
            if stage.name == "base":
                self.base = stage.evaluation
            if self.base is not None:
                extra |= shift_numbers(stage.evaluation, self.base)
            self.event("stage", index, {**stage_numbers(stage), **extra})
            if stage.name != "steered":  # its texts are those of the probe and the batches
                self.texts(stage.name, index, stage.samples)
        elif name == "vector":
            vector: SteeringVector = values["vector"]
            folder = self.folder / "rounds" / str(index)
            folder.mkdir(parents=True, exist_ok=True)
            vector.save(folder / "vector.safetensors")
            self.event("vector", index, {"norms": vector.norms(), "contexts": vector.contexts})
        elif name in ("probe", "batch"):
            walk: Walk = values["walk"]
            self.texts(name, index, values["verdicts"])
            self.event(name, index, walk_numbers(walk))
        elif name == "healed":
            healing: Healed = values["healing"]
            healing.adapter.save(self.folder / "rounds" / str(index) / "adapter.safetensors")
            self.event("healing", index, healing_numbers(healing))

    def round(self, finished: Round, first: SteeringVector) -> None:
        """The round's own line, once all of it is done."""
        self.event(
            "round",
            finished.index,
            {
                "kappa": finished.kappa,
                "dose": finished.dose,
                "kept": len(finished.kept),
                "generated": len(finished.probes) + len(finished.dreams),
                "at_floor": finished.walk.at_floor,
                "cosine_to_first": finished.vector.cosine(first),
            },
        )

    def token_curves(
        self, model: HookedTransformer, finished: Round, before: Sequence[Adapter]
    ) -> None:
        """Per-token KL to base of one kept and one dropped completion, under the adapters and the
        steering that made them."""
        everything = (*finished.probes, *finished.dreams)
        kept = [v for v in everything if v.kept]
        dropped = [
            v for v in everything if "incoherent" in v.reasons and len(v.completion.tokens) > 20
        ]
        curves = []
        for name, group in (("kept", kept), ("dropped", dropped)):
            if group:
                v = sorted(group, key=lambda v: v.tail_perplexity)[len(group) // 2]
                with (
                    baked(model, before),
                    finished.vector.steering(model, v.completion.dose),
                ):
                    kl = token_divergence(model, v.completion)
                pieces = [decode(model, [t]) for t in v.completion.tokens]
                curves.append(
                    {
                        "verdict": name,
                        "reasons": list(v.reasons),
                        "dose": v.completion.dose,
                        "pieces": pieces,
                        "kl": [round(float(x), 5) for x in kl],
                    }
                )
        self.event("token_kl", finished.index, {"curves": curves})


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Config, events and texts of a run folder.

    Raises:
        ShlError: it is none, or a line in it is torn.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        lines = []
        for name in ("events.jsonl", "texts.jsonl"):
            path = folder / name
            text = path.read_text("utf-8") if path.exists() else ""
            lines.append([json.loads(line) for line in text.split("\n") if line])
    except (OSError, json.JSONDecodeError) as error:
        raise ShlError(f"{folder} cannot be read as a run folder ({error}).") from error
    return config, lines[0], lines[1]
