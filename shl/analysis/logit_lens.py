"""The logit lens of a direction: the tokens whose logits it raises and lowers most.

nostalgebraist 2020, "interpreting GPT: the logit lens": a direction of the residual stream is
multiplied with the unembedding directly; later layers are ignored.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist

import torch

from shl.analysis.weight_updates import spectrum
from shl.hooks.adapter import Adapter
from shl.hooks.sites import norm_scale
from shl.models.tokens import decode
from shl.utils.errors import require
from shl.utils.model import Model
from shl.utils.shapes import Direction, Float, Tensor

WRITES = {"o": "ln1_post", "down": "ln2_post", "resid": ""}
"""Kinds of sites that write to the residual stream: Gemma's norm of their output."""


@dataclass(frozen=True)
class LensTokens:
    """Tokens and their scores, in standard deviations from the vocabulary's mean, largest first.

    Example:
        >>> LensTokens((("care", 4.2),), (("rule", -3.9),)).raised[0]
        ('care', 4.2)
    """

    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


@torch.no_grad()
def logit_lens(
    model: Model,
    direction: Direction,
    k: int = 10,
    *,
    keep: Callable[[str], bool] | None = None,
) -> LensTokens:
    """The `k` tokens whose logits a residual direction raises and lowers most, through the final
    norm's scale and the unembedding.

    Scores are standard deviations over the vocabulary, so they do not depend on the direction's
    length; `largest_by_chance` gives the largest expected in a vocabulary of that size.

    Args:
        direction: `[d_model]`, of a steering vector or from `written_directions`.
        k: tokens raised, and tokens lowered.
        keep: filter on a token's text (`str.isascii`); None keeps all tokens.

    Raises:
        ShlError: a direction of another width, of zero or not finite, or k below 1.

    Example:
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> tokens = logit_lens(model, model.W_U[:, 70] / model.ln_final.w, 1)
        >>> tokens.raised[0][0] == model.tokenizer.decode([70])
        True
    """
    name, d_model, shape = model.cfg.model_name, model.cfg.d_model, tuple(direction.shape)
    require(shape == (d_model,), f"the direction has shape {shape}, {name} has d_model {d_model}.")
    usable = bool(torch.isfinite(direction).all() and direction.any())
    require(usable, "the direction is 0 or not finite, it raises no token.")
    require(k >= 1, f"k is {k}, it must be at least 1.")
    scaled = norm_scale(model, "ln_final") * direction.to(model.W_U.device, torch.float32)
    logits = (scaled.to(model.W_U.dtype) @ model.W_U).float()
    scores = ((logits - logits.mean()) / logits.std()).cpu()
    order = scores.argsort(descending=True).tolist()

    def first(ids: Iterable[int]) -> tuple[tuple[str, float], ...]:
        texts = ((decode(model, [i]), i) for i in ids)
        return tuple(islice(((t, float(scores[i])) for t, i in texts if not keep or keep(t)), k))

    return LensTokens(first(order), first(reversed(order)))


def written_directions(
    model: Model, adapter: Adapter, site: str, k: int = 1
) -> Float[Tensor, "n d_model"]:
    """Directions that dW writes to the residual stream: its top left singular vectors, as rows.

    On Gemma the output of attention and MLP passes a norm before it is added; its learned scale is
    applied (its division only rescales). Rows have length 1 and an arbitrary sign.

    Args:
        site: one of the adapter's that writes to the stream: `blocks.N.o`, `.down` or `.resid`.
        k: number of directions, from the largest singular value; fewer if dW has a lower rank.

    Raises:
        ShlError: a site that the adapter does not have, or that writes elsewhere.

    Example:
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> adapter = fresh_adapter(model, HealConfig(rank=2, sites=("o",), layers=(1,)))
        >>> adapter.up["blocks.1.o"].data[:, 0] = 1.0
        >>> written_directions(model, adapter, "blocks.1.o").shape
        torch.Size([1, 32])
    """
    sites = {s.name: s for s in adapter.sites}
    require(
        site in sites, f"{site!r} is no site of the adapter, its sites are {sorted(sites)[:4]} ..."
    )
    kind, layer = sites[site].kind, sites[site].layer
    require(
        kind in WRITES, f"{site} does not write to the residual stream; {', '.join(WRITES)} do."
    )
    written = spectrum(adapter.down[site], adapter.up[site], adapter.scale).left[:, :k].T.float()
    written = written * norm_scale(model, f"blocks.{layer}.{WRITES[kind]}").cpu()
    return written / written.norm(dim=1, keepdim=True)


def strongest_directions(model: Model, adapter: Adapter, count: int = 8) -> dict[str, Direction]:
    """The first written direction of each of the `count` sites with the largest singular values,
    by site name, in order of the forward pass.

    Raises:
        ShlError: an adapter without a site that writes to the residual stream.

    Example:
        >>> from shl.config import HealConfig
        >>> from shl.hooks.adapter import fresh_adapter
        >>> from shl.models.tiny import tiny_gemma
        >>> model = tiny_gemma()
        >>> adapter = fresh_adapter(model, HealConfig(rank=2, sites=("o", "q"), layers=(1, 2)))
        >>> for up in adapter.up.values():
        ...     up.data[:, 0] = 1.0
        >>> list(strongest_directions(model, adapter))
        ['blocks.1.o', 'blocks.2.o']
    """
    sizes = {}
    for name in (site.name for site in adapter.sites if site.kind in WRITES):
        values = spectrum(adapter.down[name], adapter.up[name], adapter.scale).values
        if len(values):
            sizes[name] = float(values[0])
    require(len(sizes) > 0, "the adapter writes to the residual stream nowhere (o, down or resid).")
    chosen = sorted(sizes, key=lambda name: -sizes[name])[:count]
    return {name: written_directions(model, adapter, name)[0] for name in sizes if name in chosen}


def largest_by_chance(n: int) -> float:
    """Median of the largest of `n` standard normal scores, to compare a top token's score with.

    Example:
        >>> round(largest_by_chance(1), 2), round(largest_by_chance(262_144), 2)
        (0.0, 4.55)
    """
    return NormalDist().inv_cdf(0.5 ** (1 / n))
