"""Push a saved model to the Hub: checked first, private by default, in one step that can be repeated.

What is uploaded is what `export` writes. The token is that of `hf auth login` or HF_TOKEN; `huggingface_hub` itself
sends it, and here it is only compared with the contents of the folder.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token

from .exporting import README, code_files, export, is_variant, public_files, replace
from .folders import CONFIG, check_folder, load_card, read_json

# remote files of these kinds that are not in the folder are deleted: an old model.safetensors would be loaded instead
# of new shards
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")


def missing_for_push(folder: str | Path) -> list[str]:
    """What a folder lacks to be of use to those who download it, each as a clause that says the way out.

    The code of a variant is never missing: it is written on the way to the Hub.
    """
    root, names = Path(folder), {file.path for file in public_files(folder)}
    missing = []
    try:
        check_folder(root)
    except ValueError as error:
        missing.append(str(error).rstrip("."))
    if CONFIG not in names:
        missing.append(f"there is no {CONFIG} (save the model by save_pretrained)")
    else:
        config = read_json(root / CONFIG)
        if not is_variant(config) and (absent := sorted(code_files(config) - names)):
            missing.append(f"its code is not there: {', '.join(absent)} (save the model by save_pretrained)")
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
    """Upload the export of a folder as a model repository and return its address.

    Repeated, it uploads only what is missing or has changed, also after an interruption: large files that have
    arrived once are recognised by their SHA-256. `revision` is a branch, made if it is not there. `tag` names the
    commit. `collection` is a title, or the slug of an existing one. An existing repository keeps its visibility.

    Raises ValueError if the folder is not fit to be published or nobody is signed in, and OSError as huggingface_hub.
    """
    if missing := missing_for_push(folder):
        raise ValueError(f"{folder} is not pushed: {'; '.join(missing)}.")
    token = get_token()
    if token is None:
        raise ValueError(f"{folder} is not pushed: there is no token (`hf auth login`, or set HF_TOKEN).")
    for file in public_files(folder):
        if not file.is_large and token.encode() in (Path(folder) / file.path).read_bytes():
            raise ValueError(f"{folder} is not pushed: {file.path} holds your token; remove it there.")

    api = HfApi(library_name="efficient_transformers")
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
    if not public and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is public already: give --public to add to it, or another name.")
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
    except RuntimeError as error:  # what huggingface_hub makes of a large file that did not get through
        raise OSError(f"{error} What has arrived stays there: push again to upload the rest.") from error
    if tag is not None:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        if tags.get(tag, commit.oid) != commit.oid:
            raise ValueError(f"The tag {tag!r} of {repo_id} is of another commit, {tags[tag][:8]}: give another --tag.")
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
    """The text of a model card whose code opens the model by its name on the Hub.

    A base model of the zoo (`et-linear-mlm`) is taken to be of the same owner.
    """
    card = load_card(path)
    owner, base = repo_id.rpartition("/")[0], card.data.base_model  # type: ignore[attr-defined]
    if owner and isinstance(base, str) and base.startswith("et-"):
        card.data.base_model = f"{owner}/{base}"  # type: ignore[attr-defined]
    name = card.data.model_name  # type: ignore[attr-defined]
    return f"{str(card).rstrip()}\n".replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
