"""Axes: a pair of opposite personas, with the contexts and prompts that go with them, as data."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shl.config import FOUNDATIONS
from shl.utils.errors import ShlError, require
from shl.utils.files import DATA

_KEYS = ("name", "description", "positive", "negative", "contexts", "prompts", "expected")


@dataclass(frozen=True)
class Axis:
    """One trait, between two personas.

    `contexts` are diverse everyday questions for the vector, `prompts` those that steered text
    answers, `expected` the sign (+1, -1) that the positive persona should have on a foundation.

    Raises:
        ShlError: equal personas, empty contexts or prompts, or an expected sign that is neither
            +1 nor -1 or names no foundation.

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

    def __post_init__(self) -> None:
        where = f"axis {self.name!r}"
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
        require(len(self.expected) > 0, f"{where} expects no sign, name at least one foundation.")
        for foundation, sign in self.expected.items():
            require(
                foundation in FOUNDATIONS,
                f"{where} expects {foundation!r}, the foundations are {', '.join(FOUNDATIONS)}.",
            )
            require(
                sign in (1, -1) and not isinstance(sign, bool),
                f"{where} expects {sign!r} for {foundation}, it must be 1 or -1.",
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The foundations that the axis is expected to move."""
        return tuple(self.expected)


def axis_names() -> tuple[str, ...]:
    """The built-in axes.

    Example:
        >>> axis_names()
        ('care_auth', 'love')
    """
    files = (Path(str(entry)).name for entry in (DATA / "axes").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load_axis(name: str | Path) -> Axis:
    """Read a built-in axis by name, or a user's own TOML file by path.

    The file has the keys name, description, positive, negative, contexts, prompts and expected;
    `contexts = "everyday"` takes the built-in questions.

    Raises:
        ShlError: unknown name (the sentence lists the axes), unreadable file, missing or unknown
            key, or a value that `Axis` refuses.

    Example:
        >>> load_axis("love").targets
        ('care',)
    """
    if str(name) in axis_names():
        text = (DATA / "axes" / f"{name}.toml").read_text("utf-8")
        return _parse(text, str(name))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ShlError(
            f"unknown axis {str(name)!r}: the built-in axes are {', '.join(axis_names())}, or give "
            "the path of your own .toml file."
        )
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ShlError(f"axis file {path} cannot be read ({error}).") from error


def _parse(text: str, where: str) -> Axis:
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ShlError(f"axis file {where} is not TOML ({error}).") from error
    return axis_from(table, where)


def axis_from(table: Mapping[str, Any], where: str) -> Axis:
    """An axis from the keys and values of its file; `where` is for the sentence of an error.

    Raises:
        ShlError: a missing or unknown key, or a value that `Axis` refuses.

    Example:
        >>> table = dict(name="bold", description="", positive="Bold.", negative="Timid.")
        >>> lists = dict(contexts=["Tea?"], prompts=["Jump?"], expected={"liberty": 1})
        >>> axis_from(table | lists, "here").targets
        ('liberty',)
    """
    missing = [key for key in _KEYS if key not in table]
    unknown = [key for key in table if key not in _KEYS]
    require(not missing, f"axis file {where} lacks {', '.join(missing)}.")
    require(not unknown, f"axis file {where} has unknown {', '.join(unknown)}; allowed: {_KEYS}.")
    for key in ("name", "description", "positive", "negative"):
        require(isinstance(table[key], str), f"{key} in {where} must be a text.")
    require(isinstance(table["expected"], Mapping), f"expected in {where} must be a table.")
    contexts = table["contexts"]
    if isinstance(contexts, str):
        lists = tomllib.loads((DATA / "contexts.toml").read_text("utf-8"))
        require(
            contexts in lists,
            f"contexts in {where} names {contexts!r}, the lists are {', '.join(lists)}.",
        )
        contexts = lists[contexts]
    return Axis(
        **{key: table[key] for key in ("name", "description", "positive", "negative")},
        contexts=_texts(contexts, "contexts", where),
        prompts=_texts(table["prompts"], "prompts", where),
        expected=MappingProxyType(dict(table["expected"])),
    )


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    require(
        isinstance(value, list | tuple) and all(isinstance(text, str) for text in value),
        f"{key} in {where} must be a list of texts.",
    )
    return tuple(value)
