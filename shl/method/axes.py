"""Axes: pairs of opposite personas with their contexts and prompts, read from TOML files."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shl.config import FOUNDATIONS
from shl.measure.continuations import Cloze
from shl.utils.errors import ShlError, require
from shl.utils.files import DATA


@dataclass(frozen=True)
class Axis:
    """A trait as a pair of opposite personas.

    The vector is extracted on `contexts`, diverse everyday questions; completions answer `prompts`.
    `expected` holds the sign (+1, -1) of the positive persona's effect on each foundation that it
    should change, and may be empty. `cloze`, if given, is an instrument of the trait. An axis with
    neither gives vectors, but no instrument reads its trait (`require_instrument`). `paraphrases`
    are pairs of the personas in other words, for the reward of `shl.method.online`.

    Raises:
        ShlError: a name that files and tables cannot hold, equal personas, empty contexts or
            prompts, or an expected sign that is neither +1 nor -1 or names no foundation.

    Example:
        >>> axis = load_axis("care_auth")
        >>> dict(axis.expected)
        {'care': 1, 'authority': -1}
    """

    name: str
    description: str
    positive: str
    negative: str
    contexts: tuple[str, ...]
    prompts: tuple[str, ...]
    expected: Mapping[str, int]
    cloze: Cloze | None = None
    paraphrases: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        require(
            len(self.name) <= 100,
            f"the name of an axis has {len(self.name)} characters, it must have at most 100.",
        )
        where = f"axis {self.name!r}"
        # Vectors, adapters and their folders carry it.
        require(
            self.name.isprintable(),
            f"the name of {where} has a character that is not printable, such as a tab, a no-break "
            "space or a joiner; it must have none.",
        )
        for key in ("name", "positive", "negative"):
            require(bool(getattr(self, key).strip()), f"{where} has an empty {key}.")
        require(
            self.positive.strip() != self.negative.strip(),
            f"{where} has the same positive and negative persona, they must be opposites.",
        )
        for key in ("contexts", "prompts"):
            texts = getattr(self, key)
            require(len(texts) > 0, f"{where} has no {key}, it needs at least one.")
            require(all(text.strip() for text in texts), f"{where} has an empty text in {key}.")
            repeated = sorted({text for text in texts if texts.count(text) > 1})
            require(not repeated, f"{where} repeats {repeated[:1]} in {key}.")
        for pair in self.paraphrases:
            require(
                all(text.strip() for text in pair) and pair[0] != pair[1],
                f"{where} has the paraphrases {list(pair)}, each must be two different texts.",
            )
        for foundation, sign in self.expected.items():
            require(
                foundation in FOUNDATIONS,
                f"{where} expects {foundation!r}, the foundations are {', '.join(FOUNDATIONS)}.",
            )
            require(
                sign in (1, -1) and not isinstance(sign, bool),
                f"{where} expects {sign!r} for {foundation}, it must be 1 or -1.",
            )


NUISANCE = ("valence", "formality", "length")
"""Built-in axes that another axis's vector should not be mistaken for."""


def require_instrument(axis: Axis) -> None:
    """Raise a `ShlError` unless the axis expects a foundation or has a cloze.

    Example:
        >>> require_instrument(load_axis("length"))
        Traceback (most recent call last):
        shl.utils.errors.ShlError: axis 'length' expects no foundation and ... reads its trait.
    """
    require(
        bool(axis.expected) or axis.cloze is not None,
        f"axis {axis.name!r} expects no foundation and has no cloze, so no instrument reads its "
        "trait.",
    )


def nuisance_axes(axis: Axis, names: Sequence[str]) -> list[Axis]:
    """Built-in axes by name, with the contexts of `axis`, which may not be among them.

    Raises:
        ShlError: a name is not that of a built-in axis, is that of `axis`, or is there twice.

    Example:
        >>> [other.name for other in nuisance_axes(load_axis("love"), NUISANCE)]
        ['valence', 'formality', 'length']
    """
    allowed = [name for name in axis_names() if name != axis.name]
    for name in names:
        require(
            name in allowed and names.count(name) == 1,
            f"{name!r} cannot be removed from {axis.name!r}, give each of {', '.join(allowed)} at "
            "most once.",
        )
    return [replace(load_axis(name), contexts=axis.contexts) for name in names]


def axis_names() -> tuple[str, ...]:
    """Names of the built-in axes.

    Example:
        >>> axis_names()
        ('care_auth', 'formality', 'length', 'love', 'valence')
    """
    files = sorted(entry.name for entry in (DATA / "axes").iterdir())
    return tuple(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load_axis(name: str | Path) -> Axis:
    """Read a built-in axis by name, or a TOML file by path.

    The file has the keys name, description, positive, negative, contexts, prompts, expected and
    optionally cloze (a table with openings, positive and negative words) and paraphrases (a list of
    pairs); `contexts = "everyday"` takes the built-in questions.

    Raises:
        ShlError: the name is unknown, the file cannot be read, a key is missing or unknown, or
            `Axis` rejects a value.

    Example:
        >>> dict(load_axis("love").expected)
        {'care': 1}
    """
    built_in = str(name) in axis_names()
    path = DATA / "axes" / f"{name}.toml" if built_in else Path(name).expanduser()
    require(
        path.is_file(),
        f"unknown axis {str(name)!r}: the built-in axes are {', '.join(axis_names())}, or give "
        "the path of your own .toml file.",
    )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShlError(f"axis file {path} cannot be read as TOML ({error}).") from error
    return axis_from(table, str(path))


def axis_from(table: Mapping[str, Any], where: str) -> Axis:
    """An axis from the contents of its file; `where` names the file in error messages.

    Raises:
        ShlError: a key is missing or unknown, or `Axis` rejects a value.

    Example:
        >>> table = dict(name="bold", description="", positive="Bold.", negative="Timid.")
        >>> lists = dict(contexts=["Tea?"], prompts=["Jump?"], expected={"liberty": 1})
        >>> axis_from(table | lists, "bold.toml").name
        'bold'
    """
    keys = [field.name for field in fields(Axis)]
    missing = [key for key in keys if key not in table and key not in ("cloze", "paraphrases")]
    unknown = [key for key in table if key not in keys]
    require(not missing, f"axis file {where} lacks {', '.join(missing)}.")
    require(not unknown, f"axis file {where} has unknown {', '.join(unknown)}; allowed: {keys}.")
    for key in ("name", "description", "positive", "negative"):
        require(isinstance(table[key], str), f"{key} in {where} must be a text.")
    signs = table["expected"]
    require(
        isinstance(signs, Mapping) and all(isinstance(sign, int) for sign in signs.values()),
        f"expected in {where} must be a table of foundations with 1 or -1.",
    )
    texts = {key: table[key] for key in ("contexts", "prompts")}
    if isinstance(texts["contexts"], str):
        built_in = tomllib.loads((DATA / "contexts.toml").read_text("utf-8"))
        name = texts["contexts"]
        require(
            name in built_in,
            f"contexts in {where} names {name!r}, the lists are {', '.join(built_in)}.",
        )
        texts["contexts"] = built_in[name]
    lists = {key: _texts(value, f"{key} in {where}") for key, value in texts.items()}
    cloze = None
    if table.get("cloze") is not None:
        keys = [field.name for field in fields(Cloze)]
        given = table["cloze"]
        require(
            isinstance(given, Mapping) and set(given) == set(keys),
            f"cloze in {where} must be a table with {', '.join(keys)}.",
        )
        cloze = Cloze(*(_texts(given[key], f"cloze.{key} in {where}") for key in keys))
    expected = MappingProxyType(dict(signs))
    pairs = table.get("paraphrases", ())
    what = f"paraphrases in {where}"
    require(isinstance(pairs, list | tuple), f"{what} must be a list of pairs of texts.")
    require(all(len(_texts(pair, what)) == 2 for pair in pairs), f"{what} must be pairs of texts.")
    paraphrases = tuple((first, second) for first, second in pairs)
    return Axis(
        **{
            **table,
            **lists,
            "expected": expected,
            "cloze": cloze,
            "paraphrases": paraphrases,
        }
    )


def _texts(value: Any, what: str) -> tuple[str, ...]:
    require(
        isinstance(value, list | tuple) and all(isinstance(text, str) for text in value),
        f"{what} must be a list of texts.",
    )
    return tuple(value)
