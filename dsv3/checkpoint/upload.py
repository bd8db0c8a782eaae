"""Upload of an exported folder to the Hugging Face Hub."""

from pathlib import Path


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is user/name as the Hub has them."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"push={name}: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"push={name}: must be user/name")


def push(folder: Path, name: str) -> str:
    """Upload the folder to a model repository, which is made private if there is none; the address of the commit.

    Raises:
        ValueError: the Hub cannot be reached, or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of dsv3").commit_url)
    except Exception as error:  # network, login, rights: which one is up to the library
        why = " ".join(str(error).split())[:300] or type(error).__name__
        again = f"`hf upload {name} {folder}` tries again"
        raise ValueError(f"push={name}: {why}\nThe export is in {folder}; {again}") from error
