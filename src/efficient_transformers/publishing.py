"""Push a saved model to the Hub: checked first, private by default, and safe to repeat.

The uploaded files are those that `export` writes. The token is that of `hf auth login` or HF_TOKEN. Only
`huggingface_hub` sends it; this module compares it with the contents of the folder.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token

from .exporting import README, code_files, export, is_variant, public_files, replace
from .folders import CONFIG, check_folder, load_card, read_json

# Remote files of these kinds that are not in the folder are deleted, because an old model.safetensors would be loaded
# instead of new shards.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")


def missing_for_push(folder: str | Path) -> list[str]:
    """List what a folder lacks for publication, each item with its remedy.

    The code of a variant is never missing, since it is added during the upload.
    """
    root, names = Path(folder), {file.path for file in public_files(folder)}
    missing = []
    try:
        check_folder(root)
    except ValueError as error:
        missing.append(str(error).rstrip("."))
    if CONFIG not in names:
        missing.append(f"there is no {CONFIG} (save the model with save_pretrained)")
    else:
        config = read_json(root / CONFIG)
        if not is_variant(config) and (absent := sorted(code_files(config) - names)):
            missing.append(f"its code is missing: {', '.join(absent)} (save the model with save_pretrained)")
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("there are no weights (*.safetensors)")
    if README not in names:
        missing.append(f"there is no model card ({README}, which every training run writes)")
        return missing
    try:
        card = load_card(root / README, ignore_metadata_errors=False).data
    except ValueError as error:
        missing.append(str(error).rstrip("."))
        return missing
    if not card.license:  # type: ignore[attr-defined]
        missing.append(f"the model card names no licence (a line `license: …` at the top of {README})")
    if not card.eval_results:  # type: ignore[attr-defined]
        missing.append(f"the model card has no results (model-index in {README})")
    return missing


def to_fill_in(folder: str | Path) -> list[str]:
    """What the metadata of a model card leave open, which nobody but the author knows, with the line that says it."""
    card = load_card(Path(folder) / README).data.to_dict()
    lines = {
        "license": "the licence of the model (license: …)",
        "language": "the language of its texts (language: …)",
        "datasets": "its data, if they are on the Hub (datasets: …)",
    }
    if card.get("pipeline_tag") == "image-classification":
        del lines["language"]
    return [line for name, line in lines.items() if not card.get(name)]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    collection: str | None = None,
    message: str = "Model, code and card",
) -> str:
    """Upload the export of a folder as a model repository and return its URL.

    Repeating the call uploads only what is missing or has changed, also after an interruption: large files that were
    uploaded before are recognised by their SHA-256. `revision` is a branch, which is created if it does not exist.
    `tag` names the commit. `collection` is a title, or the slug of an existing collection. An existing repository keeps
    its visibility.

    Raises ValueError if the folder cannot be published or there is no token, and OSError like huggingface_hub.
    """
    if missing := missing_for_push(folder):
        raise ValueError(f"{folder} is not pushed: {'; '.join(missing)}.")
    token = get_token()
    if token is None:
        raise ValueError(f"{folder} is not pushed: there is no token (`hf auth login`, or set HF_TOKEN).")
    for file in public_files(folder):
        if not file.is_large and token.encode() in (Path(folder) / file.path).read_bytes():
            raise ValueError(f"{folder} is not pushed: {file.path} contains your token; remove it there.")

    api = HfApi(library_name="efficient_transformers")
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
    if not public and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is already public: pass --public to add to it, or choose another name.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        with staged(folder, repo_id) as upload:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=upload,
                revision=revision,
                commit_message=message,
                delete_patterns=list(REPLACED),
            )
    except RuntimeError as error:  # raised by huggingface_hub if the upload of a large file fails
        raise OSError(f"{error} Uploaded files are kept: push again to upload the rest.") from error
    if tag is not None:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tags.get(tag, commit.oid) != commit.oid:
            raise ValueError(
                f"The tag {tag!r} of {repo_id} already names another commit, {tags[tag][:8]}: choose another --tag."
            )
        if tag not in tags:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    if collection is not None:
        slug = collection
        if "/" not in collection:
            owner = repo_id.split("/")[0]
            slug = api.create_collection(collection, namespace=owner, private=not public, exists_ok=True).slug
        api.add_collection_item(slug, item_id=repo_id, item_type="model", exists_ok=True)
    return f"{api.endpoint}/{repo_id}"


@contextmanager
def staged(folder: str | Path, repo_id: str) -> Iterator[Path]:
    """A temporary folder with exactly the files that a push to `repo_id` uploads."""
    with tempfile.TemporaryDirectory() as temporary:
        upload = Path(temporary) / "upload"
        export(folder, upload, link=True)
        if (upload / README).exists():
            replace(upload / README, card_for(repo_id, upload / README))
        yield upload


def card_for(repo_id: str, path: Path) -> str:
    """The text of a model card in which the code example uses the name of the model on the Hub.

    A base model of the zoo (`et-linear-mlm`) is assumed to have the same owner.
    """
    card = load_card(path)
    owner, base = repo_id.rpartition("/")[0], card.data.base_model  # type: ignore[attr-defined]
    if owner and isinstance(base, str) and base.startswith("et-"):
        card.data.base_model = f"{owner}/{base}"  # type: ignore[attr-defined]
    name = card.data.model_name  # type: ignore[attr-defined]
    return f"{str(card).rstrip()}\n".replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
