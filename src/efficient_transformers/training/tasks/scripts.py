"""The scripts that train, their settings, and the folders of configs that they are for."""

from pathlib import Path

from ..settings import InputError, Settings
from .answer import AnswerSettings
from .choose import ChooseSettings
from .classify import ClassifySettings
from .classify_images import ClassifyImagesSettings
from .lra import LraSettings
from .match import MatchSettings
from .pretrain_clm import ClmSettings
from .pretrain_mlm import MlmSettings
from .recall import RecallSettings
from .tag_tokens import TagSettings

SETTINGS: dict[str, type[Settings]] = {
    "answer.py": AnswerSettings,
    "choose.py": ChooseSettings,
    "classify.py": ClassifySettings,
    "classify_images.py": ClassifyImagesSettings,
    "lra.py": LraSettings,
    "match.py": MatchSettings,
    "pretrain_clm.py": ClmSettings,
    "pretrain_mlm.py": MlmSettings,
    "recall.py": RecallSettings,
    "tag_tokens.py": TagSettings,
}
SCRIPTS = {  # folder of configs → the script that they are for
    "arxiv": "classify.py",
    "case": "tag_tokens.py",
    "clm": "pretrain_clm.py",
    "era": "classify.py",
    "facts": "answer.py",
    "govreport": "pretrain_mlm.py",
    "imdb": "classify.py",
    "mlm": "pretrain_mlm.py",
    "next": "choose.py",
    "patches": "classify_images.py",
    "pg19": "pretrain_clm.py",
    "pixels": "classify_images.py",
    "president": "match.py",
    "pubmed": "pretrain_mlm.py",
    "zoo_clm": "pretrain_clm.py",
    "zoo_era": "classify.py",
    "zoo_mlm": "pretrain_mlm.py",
    **dict.fromkeys(("listops", "listops_short", "pathfinder", "pathfinder_small"), "lra.py"),
    **dict.fromkeys(("image", "image_small", "text"), "lra.py"),
    **dict.fromkeys(("mqar", "copy", "induction", "needle"), "recall.py"),
}


def script_of(config: Path, asked: str | None) -> str:
    script = asked or SCRIPTS.get(config.resolve().parent.name)
    if script is None:
        raise InputError(
            f"No script is known for {config}, whose folder is none of {', '.join(SCRIPTS)}: name one by --script."
        )
    return script
