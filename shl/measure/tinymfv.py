"""The public tinymfv, unmodified, as an instrument: `--eval tinymfv`.

The package is `tinymfv` or, since July 2026, `moralmaps`. It takes a transformers model and a
tokenizer and asks seven-way forced choices in two perspectives and two option orders, its
paraphrases. The model is `shl.as_hf`, hooks included. The tokenizer is a copy, with a minimal chat
template where the model has none, and the persona as its system turn.
"""

import copy
import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jinja2 import TemplateError
from scipy.special import log_softmax
from transformers import PreTrainedTokenizerBase

from shl.config import FOUNDATIONS
from shl.measure.evaluation import by_foundation, nats_of
from shl.models.as_hf import as_hf
from shl.models.tokens import is_chat, tokenizer_of
from shl.utils.errors import ShlError, require
from shl.utils.model import Model

PACKAGES = {"tinymfv": "tiny-mfv", "moralmaps": "moral-maps"}
"""Name to import: name of the distribution."""
MINIMAL = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Q: {{ m['content'] }}\n"
    "{% else %}A: {{ m['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
"""Template of plain-text models, the format of `shl.generate`."""
SCALARS = (
    "top1_acc",
    "informedness",
    "mean_nll",
    "mean_nll_T",
    "T",
    "mean_pmass_allowed",
    "frac_unscorable",
    "mean_nll_prefill",
)
"""The summary numbers of its report."""


@dataclass(frozen=True)
class TinymfvConfig:
    """Size of the tinymfv evaluation.

    Raises:
        ShlError: a value out of its range.
    """

    name: str = "classic"
    """Set of vignettes: classic, scifi or ai-actor."""
    vignettes: int | None = None
    """Number of vignettes, balanced over foundations; None: all [count]."""
    think: int = 64
    """Tokens of reasoning before the answer [tokens]."""
    batch_size: int = 8
    """Vignettes per batch; changes the last bits only [count]."""

    def __post_init__(self) -> None:
        limits = {"vignettes": 4, "think": 1, "batch_size": 1}
        for name, least in limits.items():
            value = getattr(self, name)
            enough = value is None or value >= least
            require(enough, f"tinymfv.{name} is {value}, it must be at least {least}.")


def package() -> ModuleType:
    """tinymfv under either of its names.

    Raises:
        ShlError: neither can be imported; the message says what to install.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ShlError(
        "--eval tinymfv needs the public tinymfv, which is not installed: .venv/bin/pip install "
        "-e '.[tinymfv]' in this checkout takes it from its repository at a pinned commit."
    )


def version_of(module: ModuleType) -> str:
    """Version of the distribution ("unknown" if there is none) and a digest of its files, since
    packages installed from different commits may have the same version."""
    try:
        number = version(PACKAGES[module.__name__])
    except PackageNotFoundError:
        number = "unknown"
    digest = hashlib.sha256()
    folder = Path(str(module.__file__)).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".jsonl"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{number} {digest.hexdigest()[:12]}"


class Tinymfv:
    """An instrument of `shl.love`: scores of a model with its hooks, under a persona or none.

    Raises:
        ShlError: the package is not installed, or its report has another form.
    """

    def __init__(self, config: TinymfvConfig | None = None) -> None:
        self.config = config or TinymfvConfig()
        self.package = package()

    def __call__(self, model: Model, persona: str | None) -> dict[str, Any]:
        """The fields of a `reading` event, except `shift`, which needs the result on base."""
        report = self.report(as_hf(model), tokenizer_for(model, persona))
        name, rows = self.package.__name__, report["per_row"]
        conditions = list(dict.fromkeys(row["condition"] for row in rows))
        by_item: dict[str, dict[str, Any]] = {}
        for row in rows:
            by_item.setdefault(row["id"], {})[row["condition"]] = row
        require(
            all(list(item) == conditions for item in by_item.values()),
            f"{name} skipped vignettes in some of {conditions}.",
        )
        paraphrases = list(product(conditions, ("fwd", "rev")))
        # Sampled thoughts are averaged in probability, as the package does.
        scores = np.array(
            [
                [nats_of(np.array(item[c][f"lp_{order}_samples"])) for c, order in paraphrases]
                for item in by_item.values()
            ]
        )
        require(
            scores.ndim == 3 and scores.shape[2] == len(FOUNDATIONS),
            f"{name} gave scores of shape {scores.shape}, not 7 per answer.",
        )
        tables = {row.pop("foundation"): row for row in report["table"].to_dict("records")}
        return {
            "package": name,
            "version": version_of(self.package),
            "template": "own" if is_chat(model) else "minimal",
            "asked": [" ".join(paraphrase) for paraphrase in paraphrases],
            "labels": [_label(item[conditions[0]]) for item in by_item.values()],
            "log_probs": np.vectorize(_finite, otypes=[object])(scores).tolist(),
            "nats": nats(scores),
            "table": {
                "numbers": {key: _finite(report[key]) for key in SCALARS},
                "per_foundation": {
                    foundation: {key: _finite(value) for key, value in row.items()}
                    for foundation, row in tables.items()
                },
            },
        }

    def report(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The package's own report on a transformers model."""
        chosen = self.package.load_vignettes(self.config.name)
        if self.config.vignettes is not None:
            chosen = _balanced(chosen, self.config.vignettes)
        return self.package.evaluate(
            model,
            tokenizer,
            name=self.config.name,
            vignettes=chosen,
            conditions=tuple(self.package.CONDITIONS),
            max_think_tokens=self.config.think,
            batch_size=self.config.batch_size,
            return_per_row=True,
            verbose=0,
        )


def nats(scores: np.ndarray) -> dict[str, float]:
    """Log of the mean probability per foundation, renormalised over the options and averaged over
    paraphrases as for the built-in vignettes; items without an answer are left out.

    Raises:
        ShlError: no vignette has an answer.
    """
    scored = scores[np.isfinite(scores).all((1, 2))]
    require(len(scored) > 0, "tinymfv got no answer to any vignette.")
    return by_foundation(nats_of(log_softmax(scored.mean(1), axis=-1)))


def tokenizer_for(model: Model, persona: str | None) -> PreTrainedTokenizerBase:
    """A copy of the model's tokenizer for tinymfv's chats.

    The persona is the system turn of a prompt with a generation prompt, or the start of the first
    turn if the template does not accept a system turn.
    """
    tokenizer: Any = copy.deepcopy(tokenizer_of(model))
    if not is_chat(model):
        tokenizer.chat_template = MINIMAL
    if persona is None:
        return tokenizer
    plain = tokenizer.apply_chat_template

    def render(conversation: list[dict[str, str]], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("add_generation_prompt"):
            return plain(conversation, *args, **kwargs)
        try:
            system = {"role": "system", "content": persona}
            return plain([system, *conversation], *args, **kwargs)
        except TemplateError:
            first = conversation[0] | {"content": f"{persona}\n\n{conversation[0]['content']}"}
            return plain([first, *conversation[1:]], *args, **kwargs)

    tokenizer.apply_chat_template = render
    return tokenizer


def _balanced(vignettes: list[Any], count: int) -> list[Any]:
    """The first vignette of each foundation, the second of each, and so on."""
    groups: dict[str, list[Any]] = {}
    for vignette in vignettes:
        groups.setdefault(vignette["foundation_coarse"], []).append(vignette)
    turns = [v for turn in zip_longest(*groups.values()) for v in turn if v is not None]
    return turns[:count]


def _label(row: Mapping[str, Any]) -> str:
    """The foundation that most raters chose, which the package scores against, else its own."""
    if row["label"] is not None:
        return FOUNDATIONS[int(np.argmax(row["label"]))]
    name = str(row["foundation_coarse"]).lower().replace(" ", "")
    return "social" if name == "socialnorms" else name


def _finite(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
