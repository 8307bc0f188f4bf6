"""What an adapter's file says of itself, and what of that may be believed."""

from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

from torch import Tensor

from shl.config import SITE_KINDS
from shl.errors import check
from shl.files import Kinds
from shl.sites import Site

NONE = type(None)
KINDS: Kinds = {
    "model": (str,),
    "weights": (str, NONE),
    "dtype": (str, NONE),
    "axis": (str, NONE),
    "round": (int, NONE),
    "scale": (float,),
    "rank": (int, NONE),
    "alpha": (float, NONE),
    "sites": (list,),
}
"""The metadata of format `shl-adapter-3`, beside `format` and `identity`.

`model`, `weights` (`shl.fingerprint.weights_hash`) and `dtype` are those of the base; `scale` is
s = alpha / rank; `rank` and `alpha` are none where sites differ in rank; a site is `[kind, layer,
d_in, d_out, rank, hook that reads, hook that adds]`."""


def told_sites(sites: Sequence[Site], ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """`scale`, `rank`, `alpha` and `sites` for a file."""
    rank = shared(ranks.values())
    rows = [[s.kind, s.layer, s.d_in, s.d_out, ranks[s.name], *s.hooks] for s in sites]
    alpha = None if rank is None else scale * rank
    return {"scale": scale, "rank": rank, "alpha": alpha, "sites": rows}


def shared(values: Iterable[Any]) -> Any:
    """What all of `values` are, or None where they differ.

    Example:
        >>> shared([8, 8]), shared([8, 4])
        (8, None)
    """
    first, *others = values
    return first if all(value == first for value in others) else None


def read_sites(what: object, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Site]:
    """The sites of a file, whose tensors are exactly theirs.

    Raises:
        ShlError: a site that cannot be, that is named twice, whose hooks or rank are not what
            they must be, or tensors that differ from the table.
    """
    sites = [_site(what, row, tensors) for row in meta["sites"]]
    check(len(sites) > 0, f"{what} names no site.")
    names = [site.name for site in sites]
    check(len(set(names)) == len(names), f"{what} names a site twice.")
    wanted = {f"{name}.{factor}" for name in names for factor in "AB"}
    check(
        set(tensors) == wanted,
        f"{what} differs from its own site table at {sorted(set(tensors) ^ wanted)[:3]}.",
    )
    ranks = {name: len(tensors[f"{name}.A"]) for name in names}
    for key, value in told_sites(sites, ranks, meta["scale"]).items():
        check(
            meta[key] == value,
            f"{what} says {key} = {short(meta[key])}, by its tensors that is {short(value)}.",
        )
    return sites


def _site(what: object, row: object, tensors: Mapping[str, Tensor]) -> Site:
    fits = isinstance(row, list) and [type(x) for x in row] == [str, *[int] * 4, str, str]
    check(fits, f"{what} has the site {short(row)}, it must be a list like {EXAMPLE}.")
    assert isinstance(row, list)
    kind, layer, d_in, d_out, rank, *hooks = row
    check(kind in SITE_KINDS, f"{what} has a site {kind!r}, the sites are {SITE_KINDS}.")
    check(
        0 <= layer < 2**31 and min(d_in, d_out, rank) >= 1,
        f"{what} has the site {short(row)}, its layer must be 0 or more and its widths and rank "
        "1 or more.",
    )
    site = Site(kind, layer, d_in, d_out)
    check(
        (*hooks,) == site.hooks,
        f"{what} has {site.name} at the hooks {short(hooks)}, here it sits at {site.hooks}.",
    )
    for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
        x = tensors.get(f"{site.name}.{factor}")
        check(
            x is None or tuple(x.shape) == shape,
            f"{factor} of {site.name} in {what} has shape {x is not None and tuple(x.shape)}, its "
            f"site table says {shape}.",
        )
    return site


EXAMPLE = short(told_sites([Site("q", 3, 640, 1024)], {"blocks.3.q": 16}, 1.0)["sites"][0])
