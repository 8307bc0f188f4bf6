"""Random vectors at matched divergence: what an instrument reads when any direction is added.

A reading of a steered or trained model says something about a trait only if random directions of
the same KL per token do not read as much. `random_like` makes one such direction for a vector;
`nulls` makes many for a model's layers, at several divergences, and reads each.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shl.hooks.fingerprint import weights_hash
from shl.hooks.handle import unhooked
from shl.hooks.steering import Steering
from shl.hooks.vector import SteeringVector
from shl.kl import logsumexp
from shl.models.activations import residual_at_tag
from shl.models.generate import generate
from shl.models.scores import completion_hidden, kl_values
from shl.models.tokens import Prompt, encode
from shl.models.weights import cache_folder
from shl.utils.errors import ShlError, require
from shl.utils.files import DATA, read_safetensors, texts_in, write_safetensors
from shl.utils.model import Model
from shl.utils.seeds import generator_for
from shl.utils.shapes import Direction, Float

RANGE = 1024.0
"""Largest factor between a random direction's norm and the one that it starts from."""
TRIES = 12
"""Scales that are tried before matching fails."""
SMALLEST = 1e-5
"""Mean KL below which rounding errors dominate [nats]."""
FIRST = 0.005
"""Norm of a null's directions at which matching starts [share of the mean residual's]."""
CLOSE = 0.05
"""Largest relative difference between matched divergences."""

NEUTRAL = texts_in("contexts.toml", "everyday")[-4:]
"""Questions on whose answers divergences are matched, none of the first 64 contexts."""
TOKENS = 16
"""Longest of these answers [tokens]."""
LEVELS = (0.3,)
"""Divergences at which nulls are read, near those of coherent doses [nats per token]."""
FORMAT = "shl-nulls-1"
SHIPPED = Path(str(DATA / "nulls"))
"""Readings that come with the package, for the default models and settings. `python -m
experiments.checks.nulls` makes them; a file whose model or items have changed is not found."""

Directions = Mapping[int, Direction]
"""A direction per layer."""
Reading = Callable[[Model], float | np.ndarray]
"""A reading of a model as it stands, one number or several."""


class Divergence:
    """Mean KL per token to the model as it was at construction, on its own greedy answers.

    Args:
        model: with the hooks of the reference on.
        prompts: questions that the reference answers.
        tokens: longest answer [tokens].

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> Divergence(model, ["Hello?"], tokens=4)(model)
        array([0.])
    """

    @torch.no_grad()
    def __init__(self, model: Model, prompts: Sequence[str], *, tokens: int = 24) -> None:
        texts = generate(model, prompts, max_new_tokens=tokens, min_new_tokens=1, temperature=0.0)
        self.texts = [text for text in texts if text.tokens]
        self._states = completion_hidden(model, self.texts)
        self._lse = logsumexp(self._states, model.W_U, model.b_U)

    @torch.no_grad()
    def __call__(self, model: Model, persona: str | None = None) -> np.ndarray:
        """KL(model || reference), the mean per token of each text, `[text]`, in nats; with a
        persona in the model's prompts only."""
        texts = self.texts
        if persona is not None:
            texts = [
                replace(c, prompt_tokens=tuple(encode(model, replace(c.prompt, persona=persona))))
                for c in texts
            ]
        hidden = completion_hidden(model, texts)
        kl = kl_values(model, hidden, self._states, ref_lse=self._lse).double().cpu()
        return np.array([float(x.mean()) for x in kl.split([len(c.tokens) for c in self.texts])])


def random_directions(norms: Mapping[int, float], width: int, seed: int) -> dict[int, Direction]:
    """Gaussian directions `[width]` of the given norms, one per layer; a function of the seed.

    Example:
        >>> [round(float(v.norm()), 5) for v in random_directions({1: 3.0}, 8, 0).values()]
        [3.0]
    """
    out = {}
    for layer, norm in norms.items():
        draw = torch.randn(width, generator=generator_for(seed, "direction", layer))
        out[layer] = norm * draw / draw.norm()
    return out


def matching_scale(divergence: Callable[[float], float], aim: float, start: float = 1.0) -> float:
    """The scale at which a divergence that grows with about its square is `aim`, to 5 per cent:
    secant steps between the logarithms, from exponent 2.

    Raises:
        ShlError: no scale within 1024 times `start` comes that close.

    Example:
        >>> round(matching_scale(lambda scale: 3 * scale**2, 12.0), 3)
        2.0
    """
    scale, found, exponent = start, 0.0, 2.0
    last: tuple[float, float] | None = None
    for _ in range(TRIES):
        found = max(divergence(scale), SMALLEST)
        if abs(found - aim) <= CLOSE * aim:
            return scale
        if last is not None and last[0] != scale:
            slope = math.log(found / last[1]) / math.log(scale / last[0])
            exponent = min(max(slope, 1.0), 8.0)
        last = scale, found
        step = (aim / found) ** (1 / exponent)
        scale = min(max(scale * step, start / RANGE), start * RANGE)
    raise ShlError(
        f"random directions give {found:.4g} nats per token, the aim is {aim:.4g}; no scale up to "
        f"{RANGE:g} times the first comes within {CLOSE:.0%}."
    )


def random_like(
    model: Model,
    vector: SteeringVector,
    prompts: Sequence[str],
    *,
    dose: float = 1.0,
    tokens: int = 24,
    seed: int = 0,
) -> SteeringVector:
    """Gaussian random directions at the layers of `vector`, matched to it in divergence.

    Each direction has the norm of the vector's at its layer times one common scale, at which the
    mean KL per token of the steered to the unsteered model, on the latter's greedy answers, is that
    of `vector` at `dose`.

    Args:
        prompts: questions whose answers the divergence is measured on.
        dose: dose at which the divergences are matched [multiples of the vector].
        tokens: longest answer [tokens].

    Raises:
        ShlError: the vector's divergence at `dose` is too small, or no scale within 1024 times its
            norms comes within a twentieth of it.

    Example:
        >>> import torch
        >>> from shl.models.tiny import tiny_gemma
        >>> v = SteeringVector({1: torch.ones(32)}, "tiny", "demo", 1)
        >>> control = random_like(tiny_gemma(), v, ["Hello?"], tokens=4)
        >>> control.rule, control.directions[1].shape
        ('random', torch.Size([32]))
    """
    draws = random_directions(vector.norms(), model.cfg.d_model, seed)
    unit = {layer: draws[layer].to(v) for layer, v in vector.directions.items()}
    measure = Divergence(model, prompts, tokens=tokens)

    def divergence(directions: Mapping[int, Direction], factor: float) -> float:
        with Steering(model, directions, factor * dose):
            return float(measure(model).mean())

    aim = divergence(vector.directions, 1.0)
    require(
        aim > SMALLEST,
        f"the vector's divergence at dose {dose:g} is {aim:.2g} nats per token, it must be above "
        f"{SMALLEST:g} to be matched.",
    )
    scale = matching_scale(lambda factor: divergence(unit, factor), aim)
    return replace(
        vector, directions={layer: scale * v for layer, v in unit.items()}, rule="random"
    )


@dataclass(frozen=True, eq=False)
class Nulls:
    """Readings of random vectors: `values` is `[level, vector, sign]`, less base's reading, and
    `levels` the divergences at which they were matched, in nats per token. For a reading of several
    numbers the last axis of `values` is theirs, and `only` picks one.

    Example:
        >>> table = Nulls((0.25, 1.0), np.array([[[1.0, -1.0]], [[2.0, -2.0]]]))
        >>> table.interval(0.25), table.interval(4.0)  # readings grow with the root of the KL
        ((-1.0, 1.0), (-4.0, 4.0))
    """

    levels: tuple[float, ...]
    values: np.ndarray

    def only(self, number: int) -> "Nulls":
        """Those of one of several numbers.

        Example:
            >>> Nulls((1.0,), np.array([[[[1.0, 5.0], [-1.0, 7.0]]]])).only(1).values.tolist()
            [[[5.0, 7.0]]]
        """
        return replace(self, values=self.values[..., number])

    def at(self, kl: float) -> np.ndarray:
        """`[vector, sign]`: readings at another divergence, linear in its root between the levels,
        and in proportion to it outside."""
        root, roots = max(kl, 0.0) ** 0.5, np.sqrt(self.levels)
        inside = min(max(root, roots[0]), roots[-1])
        upper = int(np.searchsorted(roots, inside))
        if roots[upper] == inside:
            between = self.values[upper]
        else:
            share = (inside - roots[upper - 1]) / (roots[upper] - roots[upper - 1])
            between = (1 - share) * self.values[upper - 1] + share * self.values[upper]
        return np.asarray(between * root / inside)

    def interval(self, kl: float, coverage: float = 0.95) -> tuple[float, float]:
        """Central interval of the readings of both signs at a divergence; a reading inside is not
        told from chance."""
        half = float(np.quantile(abs(self.at(kl)), coverage, method="higher"))
        return -half, half


def matched_scales(
    model: Model, layers: Sequence[int], *, count: int, levels: Sequence[float]
) -> Float[Tensor, "level vector"]:
    """Scales of `count` random vectors at which the mean divergence of both signs is each level.

    The norms of a vector's directions are the scale times the mean residual's at their layers.

    Raises:
        ShlError: no scale gives a level.
    """
    measure = Divergence(model, NEUTRAL, tokens=TOKENS)
    out = torch.zeros(len(levels), count, dtype=torch.float64)
    starts = [FIRST] * len(levels)
    for number, unit in enumerate(_units(model, layers, count)):

        def divergence(scale: float, unit: Directions = unit) -> float:
            both = []
            for sign in (1, -1):
                with Steering(model, unit, sign * scale):
                    both.append(float(measure(model).mean()))
            return sum(both) / 2

        for k, level in enumerate(levels):
            # Random directions need similar scales, so the last one is a good start.
            starts[k] = out[k, number] = matching_scale(divergence, level, starts[k])
    return out


def _units(model: Model, layers: Sequence[int], count: int) -> list[Directions]:
    residual = residual_at_tag(model, [Prompt(text) for text in NEUTRAL], tuple(layers))
    norms = {layer: float(x.norm(dim=1).mean()) for layer, x in residual.items()}
    drawn = [random_directions(norms, model.cfg.d_model, number) for number in range(count)]
    return [{layer: v.to(model.W_U) for layer, v in unit.items()} for unit in drawn]


def nulls(
    model: Model,
    layers: Sequence[int],
    name: str,
    content: object,
    read: Reading,
    *,
    count: int = 20,
    levels: Sequence[float] = LEVELS,
    folder: Path | None = None,
) -> Nulls:
    """Readings of `count` random vectors at the layers, at each level of divergence.

    Scales and readings are kept by the model's weights, the layers, and the instrument's name and
    content; only what is neither with the package nor in the cache folder is computed, and written
    into the latter.

    Args:
        content: what the instrument asks; its `repr` identifies it.
        read: the instrument's statistic on a model.
        folder: where to look and to write instead.

    Raises:
        ShlError: no scale gives a level, or a file of the cache is damaged or cannot be written.
    """
    layers, levels = tuple(sorted(layers)), tuple(levels)
    key = (weights_hash(model), layers, levels, count)
    folders = (SHIPPED, cache_folder() / "nulls") if folder is None else (folder,)
    with unhooked(model):
        scales = _remembered(
            folders,
            "scales",
            key,
            lambda: matched_scales(model, layers, count=count, levels=levels),
        )

        def compute() -> Tensor:
            before = np.asarray(read(model))
            out = torch.zeros(*scales.shape, 2, *before.shape, dtype=torch.float64)
            for number, unit in enumerate(_units(model, layers, count)):
                for k, scale in enumerate(scales[:, number].tolist()):
                    for side, sign in enumerate((1, -1)):
                        with Steering(model, unit, sign * scale):
                            out[k, number, side] = torch.as_tensor(read(model) - before)
            return out

        values = _remembered(folders, name, (*key, content), compute)
    return Nulls(levels, values.numpy())


def _remembered(
    folders: Sequence[Path], name: str, key: object, compute: Callable[[], Tensor]
) -> Tensor:
    """The tensor of a key in one of the folders; computed and written into the last if it is in
    none."""
    digest = hashlib.sha256(repr((key, NEUTRAL, TOKENS)).encode()).hexdigest()[:16]
    paths = [folder / f"{name}-{digest}.safetensors" for folder in folders]
    for path in paths:
        if path.is_file():
            return read_safetensors(path, FORMAT, {})[1]["values"]
    values, path = compute(), paths[-1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShlError(f"{path.parent} cannot be made ({error.strerror}).") from error
    write_safetensors(path, FORMAT, {"values": values}, {})
    return values
