"""`Ledger`: norms, cosines and spectra of a run's vectors and updates."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shl.analysis.cosines import Cosine, nuisance_directions, students, vector_entries
from shl.analysis.weight_updates import NULL_COVERAGE, update_entries
from shl.hooks.adapter import Adapter
from shl.hooks.vector import SteeringVector
from shl.method.axes import Axis
from shl.method.loop import Round
from shl.utils.errors import require
from shl.utils.model import Model


class Ledger:
    """Norms, cosines and spectra of a run, per layer x round and per site x round.

    Without a model: norms of the vectors, their cosines to the first and to the previous round's,
    and every site's dW. With `model` and `axis` also relative norms, the internalised shift, the
    cosines to base's nuisance directions (`shl.method.axes.NUISANCE`), and the bounds of two null
    distributions for each cosine.

    Args:
        run: a run folder (`rounds/N/vector.safetensors` and `adapter.safetensors`; an unfinished
            last round, without its adapter, is left out), or the rounds that `love` yields.
        model: the base model of the run, without other hooks.
        axis: the run's axis.
        contexts: number of the axis's contexts; None is as many as the vectors were made from.
        any_weights: accept a run that was made on other weights of a model of this name.
        top: singular values kept per site.
        draws: random draws per null distribution.

    Raises:
        ShlError: no finished round, a damaged file, rounds of different models or axes, a model
            or axis other than the run's, or one of the two without the other.

    Example:
        >>> import shl
        >>> import torch
        >>> adapter = shl.hooks.adapter.fresh_adapter(shl.tiny.tiny_gemma(), shl.HealConfig())
        >>> vectors = [SteeringVector({1: v}, "tiny-gemma", "demo", 8) for v in torch.eye(32)[:2]]
        >>> ledger = Ledger([(v, adapter) for v in vectors])
        >>> [entry.to_first.value for entry in ledger.vectors]
        [1.0, 0.0]
    """

    def __init__(
        self,
        run: str | Path | Sequence[Round] | Sequence[tuple[SteeringVector, Adapter]],
        model: Model | None = None,
        axis: Axis | None = None,
        *,
        contexts: int | None = None,
        any_weights: bool = False,
        top: int = 8,
        draws: int = 1000,
        seed: int = 0,
    ) -> None:
        together = (model is None) == (axis is None)
        require(together, "a ledger takes model and axis together, or neither of them.")
        self.rounds = _rounds_of(run, model, any_weights)
        vectors, adapters = zip(*self.rounds, strict=True)
        first = vectors[0]
        for vector, adapter in self.rounds:
            names = {first.model_name, vector.model_name, adapter.model_name}
            require(len(names) == 1, f"the rounds were made on different models: {sorted(names)}.")
            require(vector.axis == first.axis, f"the axes differ: {first.axis!r}, {vector.axis!r}.")
        self.model_name, self.axis_name = first.model_name, first.axis
        found = nuisance = None
        if model is not None and axis is not None:
            for vector in vectors:
                vector.check_made_for(model, "the run", any_weights=any_weights)
            require(
                axis.name == first.axis,
                f"the run's axis is {first.axis!r}, the ledger was given {axis.name!r}.",
            )
            layers = sorted({layer for vector in vectors for layer in vector.directions})
            added = [[adapter] for adapter in adapters]
            contexts = contexts or first.contexts
            found = students(model, axis, added, layers, contexts=contexts)
            nuisance = nuisance_directions(model, axis, layers, contexts=contexts)
        entries = vector_entries(vectors, found, nuisance, draws=draws, seed=seed)
        self.vectors = tuple(entries)
        self.updates = tuple(update_entries(adapters, top))

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers of the rounds' vectors."""
        return tuple(sorted({entry.layer for entry in self.vectors}))

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites of the rounds' adapters, in order of the forward pass."""
        return tuple(dict.fromkeys(entry.site for entry in self.updates))

    def grid(self, of: str = "to_first") -> np.ndarray:
        """A number per layer x round, nan where there is none: `norm`, `relative_norm`,
        `shift_norm`, or the values of `to_first`, `to_previous`, `to_shift` and of the cosine to a
        nuisance direction, by its name (`valence`).

        Raises:
            ShlError: no such number.
        """
        return self._grid(self.vectors, "layer", self.layers, of)

    def site_grid(self, of: str = "norm") -> np.ndarray:
        """A number per site x round, nan where there is none: `norm`, `effective_rank`, or the
        cosines of `to_first`, `to_previous`.

        Raises:
            ShlError: no such number.
        """
        return self._grid(self.updates, "site", self.sites, of)

    def _grid(self, entries: Sequence[Any], key: str, rows: Sequence[Any], of: str) -> np.ndarray:
        out = np.full((len(rows), len(self.rounds)), np.nan)
        for entry in entries:
            named = getattr(entry, "to_nuisance", {})
            require(
                of in named or hasattr(entry, of), f"a ledger has no {of!r} per {key} and round."
            )
            value = named[of] if of in named else getattr(entry, of)
            number = value.value if isinstance(value, Cosine) else getattr(value, "cosine", value)
            one = number is None or isinstance(number, float)
            require(one, f"{of!r} is not one number per {key} and round.")
            out[rows.index(getattr(entry, key)), entry.round] = number
        return out

    def __str__(self) -> str:
        lines = [f"{self.axis_name} on {self.model_name}, {len(self.rounds)} rounds"]
        if any(entry.to_first and entry.to_first.random for entry in self.vectors):
            nulls = "of random directions and of shuffled persona labels"
            lines.append(f"in brackets: {NULL_COVERAGE:.0%} bounds {nulls}")
        lines += ["", "round layer    norm  rel.  cos first          cos previous       cos shift"]
        for entry in self.vectors:
            cosines = (_cell(c) for c in (entry.to_first, entry.to_previous, entry.to_shift))
            relative = "" if entry.relative_norm is None else f"{entry.relative_norm:.3f}"
            lines.append(
                f"{entry.round:5d} {entry.layer:5d} {entry.norm:7.2f} {relative:>5s}  "
                + "  ".join(f"{text:17s}" for text in cosines).rstrip()
            )
        names = list(self.vectors[0].to_nuisance)
        if names:
            head = "  ".join(f"cos {name:13s}" for name in names)
            lines += ["", f"round layer  {head}".rstrip()]
            for entry in self.vectors:
                cells = "  ".join(f"{_cell(c):17s}" for c in entry.to_nuisance.values())
                lines.append(f"{entry.round:5d} {entry.layer:5d}  {cells}".rstrip())
        lines += ["", "round  mean over sites: |dW|  effective rank  cos to first (chance)"]
        for index in range(len(self.rounds)):
            entries = [entry for entry in self.updates if entry.round == index]
            pairs = [(e.to_first.cosine, e.to_first.chance) for e in entries if e.to_first]
            to_first = "{:.3f} ({:.3f})".format(*np.mean(pairs, 0)) if pairs else ""
            norm, rank = np.mean([(e.norm, e.effective_rank) for e in entries], 0)
            lines.append(f"{index:5d}  {norm:22.3f}  {rank:14.1f}  {to_first}".rstrip())
        return "\n".join(lines)


def _cell(cosine: Cosine | None) -> str:
    """`+0.87 (0.31, 0.22)`: the value and the bounds of both nulls, if any."""
    if cosine is None:
        return ""
    if cosine.random is None or cosine.shuffled is None:
        return f"{cosine.value:+.2f}"
    return f"{cosine.value:+.2f} ({cosine.random:.2f}, {cosine.shuffled:.2f})"


def _rounds_of(
    run: str | Path | Sequence[Round] | Sequence[tuple[SteeringVector, Adapter]],
    model: Model | None,
    any_weights: bool,
) -> tuple[tuple[SteeringVector, Adapter], ...]:
    if not isinstance(run, str | Path):
        require(len(run) > 0, "the ledger got no rounds, give at least one.")
        return tuple((r.vector, r.adapter) if isinstance(r, Round) else r for r in run)
    found = []
    for index in itertools.count():
        place = Path(run) / "rounds" / str(index)
        files = (place / "vector.safetensors", place / "adapter.safetensors")
        if not all(path.is_file() for path in files):
            break
        if model is None:
            adapter = Adapter.read(files[1])
        else:
            adapter = Adapter.load(files[1], model, any_weights=any_weights)
        found.append((SteeringVector.load(files[0]), adapter))
    present = len(found) > 0
    require(present, f"{run} holds no finished round, rounds/0 needs a vector and an adapter.")
    return tuple(found)
