"""`rcd push`: an exported checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pipelines.cli.file_flags import PushFlags
from rcd_core.errors import UserError
from rcd_core.io.hub import is_hub_id


def push(flags: PushFlags) -> int:
    from huggingface_hub import HfApi, get_token

    directory = Path(flags.directory).expanduser()
    if not is_hub_id(flags.repo) or "@" in flags.repo:
        raise UserError(f"--repo is {flags.repo!r}; give owner/name")
    if not (directory / "config.json").exists() and not (directory / "adapter_config.json").exists():
        raise UserError(f"{directory} holds no checkpoint; make one with `rcd export RUN --output {directory}`")
    if not (directory / "README.md").exists():
        raise UserError(f"{directory} has no model card, README.md; write one, or export the model again")
    token = get_token()
    if token is None:
        raise UserError("there is no token for the hub; set HF_TOKEN, or run `hf auth login`")
    api = HfApi(token=token)
    try:
        url = api.create_repo(flags.repo, private=flags.private, exist_ok=True)
        api.upload_folder(repo_id=flags.repo, folder_path=directory, commit_message=flags.message)
    except Exception as error:  # the hub's client has no common base class for its errors
        reason = " ".join(str(error).split()).replace(token, "<token>")
        raise UserError(
            f"--repo {flags.repo}: the hub did not take it ({reason[:300]}); nothing is lost, try again"
        ) from None
    print(url)
    return 0
