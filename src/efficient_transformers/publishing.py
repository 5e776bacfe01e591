"""A folder with a saved model goes to the Hub: looked over first, private unless told otherwise, in one resumable step.

The token is that of `hf auth login` or HF_TOKEN; `huggingface_hub` itself hands it on, and here it is only
compared with what is in the folder.
"""

import json
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token

README, CONFIG, INDEX = "README.md", "config.json", "model.safetensors.index.json"
# what a training run keeps beside its model, and what no folder should have published
LEFT_OUT = (
    "checkpoints/*", "checkpoint-*/*", "runs/*", "*.partial", ".*", "*/.*", "*__pycache__/*", "*.pyc",
    "optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "trainer_state.json",
)  # fmt: skip
# suffixes that a new repository keeps as large files (its .gitattributes), and the size above which every file is one
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npy", ".npz", ".parquet", ".arrow", ".gz", ".zip")
LARGE_BYTES = 10_000_000
# remote files of these kinds that are not in the folder are deleted: an old model.safetensors would be loaded in the
# place of new shards
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")


@dataclass(frozen=True)
class PushFile:
    """One file of a push: its path in the repository, bytes, and whether the Hub will keep it by git LFS."""

    path: str
    size: int
    is_large: bool


def files_to_push(folder: str | Path) -> list[PushFile]:
    """What of a folder goes to the Hub, by name. Raises ValueError if the folder is not there."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {folder}: name one that save_pretrained or a training run has written.")
    files = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            size = path.stat().st_size
            files.append(PushFile(name, size, size > LARGE_BYTES or path.suffix in LARGE_SUFFIXES))
    return files


def missing_for_push(folder: str | Path) -> list[str]:
    """What a folder lacks to be of use to those who download it, each as a clause that says the way out."""
    root, names = Path(folder), {file.path for file in files_to_push(folder)}
    missing = []
    if CONFIG not in names:
        missing.append(f"there is no {CONFIG} (save the model by save_pretrained)")
    else:
        auto_map = json.loads((root / CONFIG).read_text(encoding="utf-8")).get("auto_map", {})
        code = {f"{reference.rpartition('--')[2].split('.')[0]}.py" for reference in auto_map.values()}
        if absent := sorted(code - names):
            missing.append(f"its code is not there: {', '.join(absent)} (save the model by save_pretrained)")
    shards = [name for name in names if name.endswith(".safetensors")]
    if INDEX in names:
        listed = json.loads((root / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        if absent := sorted(set(listed) - names):
            missing.append(f"weights that {INDEX} names are not there: {', '.join(absent)}")
    elif not shards:
        missing.append("there are no weights (*.safetensors)")
    if README not in names:
        missing.append(f"there is no model card ({README}, which every training run writes)")
        return missing
    try:
        card = ModelCard.load(root / README, ignore_metadata_errors=False).data
    except ValueError as error:
        missing.append(f"the metadata of its model card cannot be read ({error})")
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
    """Uploads a folder as a model repository and returns its address.

    Done again it uploads only what is missing or has changed, also after an interruption: large files that have
    arrived once are known by their SHA-256. `revision` is a branch, made if it is not there. `tag` names the commit.
    `collection` is a title, or the slug of an existing one. An existing repository keeps its visibility.

    Raises ValueError if the folder is not fit to be published or nobody is signed in, and OSError as huggingface_hub.
    """
    if missing := missing_for_push(folder):
        raise ValueError(f"{folder} is not pushed: {'; '.join(missing)}.")
    token = get_token()
    if token is None:
        raise ValueError(f"{folder} is not pushed: there is no token (`hf auth login`, or set HF_TOKEN).")
    for file in files_to_push(folder):
        if not file.is_large and token.encode() in (Path(folder) / file.path).read_bytes():
            raise ValueError(f"{folder} is not pushed: {file.path} holds your token; remove it there.")

    api = HfApi(library_name="efficient_transformers")
    repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
    if not public and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is public already: give --public to add to it, or another name.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as staged:
            stage(Path(folder), Path(staged), repo_id)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
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


def stage(folder: Path, staged: Path, repo_id: str) -> None:
    """Links to the files that go to the Hub, and the card, whose code is to open the model by its name there."""
    for file in files_to_push(folder):
        link = staged / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((folder / file.path).resolve())
    card = (folder / README).read_text(encoding="utf-8")
    name = ModelCard(card).data.model_name or folder.name  # type: ignore[attr-defined]
    (staged / README).unlink()
    (staged / README).write_text(card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"'), "utf-8")
