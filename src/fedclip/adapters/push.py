"""A run's adapter and its card to the hub."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from fedclip.adapters.card import run_card
from fedclip.adapters.load import finished, run_and_adapter
from fedclip.config.loading import load_config
from fedclip.errors import FedclipWarning, UsageError
from fedclip.experiment.folder import CONFIG

_LOGIN = "log in by `hf auth login`, or set HF_TOKEN to a token that may write"


def push(folder: str | Path, repo_id: str, *, private: bool = False, best: bool = False) -> str:
    """Uploads a finished run's last adapter with its card in one commit; returns the address.

    With `best` it is that of the best round by validation.
    The repository is made if need be, `private` or public; one that is there keeps what it is.
    UsageError when the name is no repository's, nobody is logged in, or the hub refuses or cannot
    be reached.
    """
    run = finished(folder)
    adapter = run_and_adapter(run.path, best)[1]
    base = load_config(run.path / CONFIG).model.model_name
    if Path(base).is_absolute():
        warnings.warn(
            f"the adapter's files name its base model by the folder {base}, which others do not "
            "have: upload that model too, and say so in the card",
            FedclipWarning,
            stacklevel=2,
        )
    card = run_card(folder, repo_id, best=best)  # before anything is sent
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
        if huggingface_hub.get_token() is None:
            raise UsageError(f"nobody is logged in to the hub; {_LOGIN}")
        with tempfile.TemporaryDirectory() as place:
            draft = Path(place) / "adapter"
            shutil.copytree(adapter, draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
            api = huggingface_hub.HfApi()
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            api.upload_folder(
                repo_id=repo_id, folder_path=draft, commit_message="Adapter trained with fedclip"
            )
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id} is no name of a repository, as user/name is: {error}"
        ) from None
    except LocalTokenNotFoundError:
        raise UsageError(f"nobody is logged in to the hub; {_LOGIN}") from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the hub refused {repo_id}: {reason}; {_LOGIN}") from None
    except (OfflineModeIsEnabled, httpx.TransportError, ConnectionError) as error:
        raise UsageError(
            f"the hub cannot be reached ({error}); try again with a network, without HF_HUB_OFFLINE"
        ) from None
    return address
