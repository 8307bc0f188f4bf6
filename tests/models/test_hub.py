"""Names that are neither embedded nor folders are looked up on the hub."""

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

RESPONSE = SimpleNamespace(headers={}, request=None)


def message(function, name):
    with pytest.raises(ShlError) as error:
        function(name)
    return one_sentence(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GatedRepoError("x", response=RESPONSE), "refuses access to owner/model"),
        (RepositoryNotFoundError("x", response=RESPONSE), "unknown model 'owner/model'"),
        (EntryNotFoundError("x"), "unknown model 'owner/model'"),
        (HFValidationError("x"), "unknown model 'owner/model'"),
        (LocalEntryNotFoundError("x"), "could not be reached for 'owner/model'"),
        (ConnectionError("x"), "could not be reached for 'owner/model'"),
    ],
)
def test_hub_errors_are_converted_to_one_sentence(monkeypatch, error, expected):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "snapshot_download", fail)
    assert expected in message(hub_folder, "owner/model")
    assert expected in message(load_model, "owner/model")


def test_hub_folder_is_returned(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "snapshot_download", lambda name, **kwargs: str(tmp_path / name))
    assert model_folder("owner/model") == tmp_path / "owner" / "model"


@pytest.mark.parametrize("name", ["gemma-4", "./nowhere", "a/b/c", "~/nowhere"])
def test_error_for_unknown_model_lists_embedded_models(name, monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", lambda *a, **k: pytest.fail("hub request"))
    text = message(load_model, name)
    assert repr(name) in text
    assert all(known in text for known in EMBEDDED)
