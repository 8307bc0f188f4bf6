"""Names that are neither embedded nor folders go to the hub, whose errors become one sentence."""

from types import SimpleNamespace

import pytest
from helpers import one_sentence
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from shl.models import weights
from shl.models.load import load_model
from shl.models.weights import EMBEDDED, hub_folder, model_folder
from shl.utils.errors import ShlError


def refusal(function, name):
    with pytest.raises(ShlError) as error:
        function(name)
    return one_sentence(error)


def http_error(kind):
    error = kind("the hub's own words", response=SimpleNamespace(headers={}, request=None))
    assert "the hub's own words" in str(error)
    return error


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (http_error(GatedRepoError), "refuses access to owner/model"),
        (http_error(RepositoryNotFoundError), "unknown model 'owner/model'"),
        (EntryNotFoundError("x"), "unknown model 'owner/model'"),
        (HFValidationError("x"), "unknown model 'owner/model'"),
        (LocalEntryNotFoundError("x"), "could not be reached for 'owner/model'"),
        (ConnectionError("x"), "could not be reached for 'owner/model'"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(monkeypatch, error, named):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "snapshot_download", fail)
    assert named in refusal(hub_folder, "owner/model")
    assert named in refusal(load_model, "owner/model")


def test_the_hub_gives_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "snapshot_download", lambda name, **kwargs: str(tmp_path / name))
    assert model_folder("owner/model") == tmp_path / "owner" / "model"


@pytest.mark.parametrize("name", ["gemma-4", "./nowhere", "a/b/c", "~/nowhere"])
def test_an_unknown_model_lists_those_there_are(name, monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    text = refusal(load_model, name)
    assert repr(name) in text
    assert all(known in text for known in EMBEDDED)
