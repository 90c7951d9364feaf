"""What was written, to a hub: huggingface_hub's own client, token (`HF_TOKEN`, or the stored login) and address."""

from pathlib import Path

from onebase_adapters.errors import ConfigError, UploadError
from onebase_engine.export.model_card import CARD_FILE, card_of


def push(output: Path, repo: str, *, private: bool) -> str:
    """Upload a folder, or a file with its card, into the repository `owner/name`, which is made if need be; gives
    its address. Nothing on this machine changes.

    Raises ConfigError (no such name), or UploadError: no token or a wrong one, no network, a refusal, or a
    repository that all can read where it was to be private."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True, token=True)
        if private and not api.repo_info(repo, token=True).private:
            raise UploadError(f"{repo} is there already, and all can read it: nothing was sent.", field="private")
        if output.is_dir():
            api.upload_folder(repo_id=repo, folder_path=output, token=True)
        else:
            for name, path in {output.name: output, CARD_FILE: card_of(output)}.items():
                api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo, token=True)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository: {error}", field="push") from error
    except LocalTokenNotFoundError as error:
        raise UploadError(
            f"There is no token for the hub: set HF_TOKEN, or log in with `hf auth login`. {output} stays.",
            field="push",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = (
            "the hub does not take this token, or it may not write there: HF_TOKEN or the stored login must be one "
            "with the right to write"
            if status in (401, 403)
            else f"the hub answers {status}: {error.server_message or error}"
        )
        raise UploadError(f"Cannot write to {repo}: {reason}. {output} stays.", field="push") from error
    except (ClientError, OSError, RuntimeError) as error:  # the last are its uploader's
        raise UploadError(f"Cannot reach the hub: {error}. {output} stays.", field="push") from error
    return str(address)
