"""Axis files: validation, and the contents of the built-in ones."""

import re
import tomllib
from dataclasses import replace

import pytest
from helpers import one_sentence

from shl.config import FOUNDATIONS
from shl.measure.continuations import Cloze
from shl.method.axes import (
    NUISANCE,
    Axis,
    axis_names,
    load_axis,
    nuisance_axes,
    require_instrument,
)
from shl.utils.errors import ShlError
from shl.utils.files import DATA

FILE = {
    "name": '"calm"',
    "description": '"Calm against hurry."',
    "positive": '"You are calm."',
    "negative": '"You hurry."',
    "contexts": '["How do you rest?", "What is for lunch?"]',
    "prompts": '["Tell me about today."]',
    "expected": "{ care = 1, liberty = -1 }",
}


def write(tmp_path, **changes):
    table = {key: value for key, value in (FILE | changes).items() if value is not None}
    path = tmp_path / "calm.toml"
    path.write_text("\n".join(f"{key} = {value}" for key, value in table.items()), "utf-8")
    return path


def error_of(path):
    with pytest.raises(ShlError) as error:
        load_axis(path)
    return one_sentence(error)


def test_a_file_is_read_by_path(tmp_path):
    for path in (write(tmp_path), str(write(tmp_path))):
        axis = load_axis(path)
        assert axis == Axis(
            "calm",
            "Calm against hurry.",
            "You are calm.",
            "You hurry.",
            ("How do you rest?", "What is for lunch?"),
            ("Tell me about today.",),
            {"care": 1, "liberty": -1},
        )


def test_contexts_may_name_the_built_in_list(tmp_path):
    named = load_axis(write(tmp_path, contexts='"everyday"'))
    assert named.contexts == load_axis("love").contexts
    assert "the lists are everyday" in error_of(write(tmp_path, contexts='"weekly"'))


def test_an_unknown_axis_is_rejected_with_the_known_ones():
    text = error_of("kindness")
    assert "'kindness'" in text
    assert "care_auth, formality, length, love, valence" in text


@pytest.mark.parametrize("key", FILE)
def test_a_missing_key_is_named(tmp_path, key):
    assert f"lacks {key}." in error_of(write(tmp_path, **{key: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postive": '"You rest."'}, "has unknown postive;"),
        ({"prompts": "[]"}, "has no prompts"),
        ({"contexts": "[]"}, "has no contexts"),
        ({"prompts": '[" "]'}, "empty text in prompts"),
        ({"postive": '"You rest."', "nme": '"a"'}, "has unknown postive, nme; allowed: "),
        ({"prompts": '["a", "b", "a", "b"]'}, r"repeats \['a'\] in prompts"),
        ({"prompts": '"a"'}, "prompts .* must be a list"),
        ({"prompts": "[1]"}, "prompts .* must be a list"),
        ({"positive": '""'}, "empty positive"),
        ({"positive": "3"}, "positive .* must be a text"),
        ({"negative": '"You are calm. "'}, "same positive and negative"),
        ({"expected": "{ care = 2 }"}, "expects 2 for care"),
        ({"expected": "{ care = true }"}, "expects True for care"),
        ({"expected": "{ kindness = 1 }"}, "expects 'kindness'"),
        ({"expected": "1"}, "expected .* must be a table"),
        ({"name": '"unclosed'}, "cannot be read as TOML"),
    ],
)
def test_an_invalid_value_is_rejected(tmp_path, changes, message):
    assert re.search(message, error_of(write(tmp_path, **changes)))


def test_a_binary_file_is_rejected(tmp_path):
    path = tmp_path / "axis.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(path)


def test_an_axis_is_immutable_and_validated():
    with pytest.raises(TypeError):
        load_axis("love").expected["care"] = -1
    with pytest.raises(ShlError, match="has no prompts"):
        replace(load_axis("love"), prompts=())


@pytest.mark.parametrize("name", axis_names())
def test_built_in_axes_follow_the_rules_of_the_method(name):
    axis = load_axis(name)
    assert axis.name == name
    assert len(axis.contexts) >= 64  # SPEC 1: 64 to 256
    assert len(axis.prompts) >= 16
    assert all(text == text.strip() for text in (*axis.contexts, *axis.prompts))
    assert not set(axis.contexts) & set(axis.prompts)
    # Similar length, no negation.
    words = [persona.lower().split() for persona in (axis.positive, axis.negative)]
    assert abs(len(words[0]) - len(words[1])) <= 0.2 * len(words[0])
    assert not {"not", "never", "no", "without"} & {*words[0], *words[1]}
    # Naming a foundation in the persona would prime the probe.
    assert not set(FOUNDATIONS) & {*words[0], *words[1]}


def test_expected_signs_of_the_built_in_axes():
    assert dict(load_axis("care_auth").expected) == {"care": 1, "authority": -1}
    assert load_axis("love").expected["care"] == 1


def test_expected_signs_may_be_missing_but_then_a_cloze_must_read_the_trait(tmp_path):
    silent = load_axis(write(tmp_path, expected="{}"))
    assert dict(silent.expected) == {}
    with pytest.raises(ShlError, match="'calm' expects no foundation and has no cloze"):
        require_instrument(silent)
    require_instrument(load_axis(write(tmp_path)))
    require_instrument(load_axis(write(tmp_path, expected="{}", cloze=CLOZE)))


def test_nuisance_axes_are_built_in_and_share_the_contexts():
    axis = replace(load_axis("love"), contexts=("Tea?", "Rain?"))
    found = nuisance_axes(axis, NUISANCE)
    assert [other.name for other in found] == ["valence", "formality", "length"]
    assert {other.contexts for other in found} == {("Tea?", "Rain?")}
    assert not any(other.expected for other in found)
    for wrong in (["love"], ["kindness"], ["valence", "valence"]):
        with pytest.raises(ShlError, match=f"{wrong[0]!r} cannot be removed from 'love'"):
            nuisance_axes(axis, wrong)


def test_words_of_the_personas_are_none_of_the_probes_options():
    texts = tomllib.loads((DATA / "probe.toml").read_text("utf-8"))
    options = [*texts["digits"]["options"], *(o for c in texts["completion"] for o in c["options"])]
    words = set(re.findall("[a-z]+", " ".join(options).lower()))
    words -= {
        "it",
        "is",
        "the",
        "to",
        "a",
        "or",
        "not",
        "one",
        "s",
        "those",
        "in",
        "an",
        "of",
        "someone",
    }
    axis = load_axis("care_auth")
    for persona in (axis.positive, axis.negative):
        assert not words & set(re.findall("[a-z]+", persona.lower()))


CLOZE = '{ openings = ["We are"], positive = ["calm"], negative = ["late"] }'


def test_a_cloze_is_read(tmp_path):
    assert load_axis(write(tmp_path)).cloze is None
    assert load_axis(write(tmp_path, cloze=CLOZE)).cloze == Cloze(("We are",), ("calm",), ("late",))


@pytest.mark.parametrize(
    ("cloze", "message"),
    [
        ('"calm"', "must be a table with openings, positive, negative"),
        ('{ openings = ["We are"], positive = ["calm"] }', "must be a table with"),
        (CLOZE.replace('["calm"]', '"calm"'), "cloze.positive in .* must be a list of texts"),
        (CLOZE.replace('["late"]', "[]"), "has no negative words"),
        (CLOZE.replace('["We are"]', "[]"), "has no openings"),
        (CLOZE.replace("late", "calm"), "empty or repeated"),
        (CLOZE.replace("We are", " "), "empty or repeated"),
    ],
)
def test_wrong_clozes_are_rejected(tmp_path, cloze, message):
    assert re.search(message, error_of(write(tmp_path, cloze=cloze)))
