"""A checkpoint that lies elsewhere: on the Hugging Face hub, or in an object store.

Only what a build needs is fetched, into a cache that other tools share in the hub's case. What is
there already is not fetched again, and what was broken off goes on where it ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pleexport.checkpoint.adapters.adapter import ADAPTER_WEIGHTS
from pleexport.checkpoint.adapters.config import ADAPTER_CONFIG
from pleexport.checkpoint.checkpoint import Checkpoint, Repository
from pleexport.checkpoint.folder import WHOLE
from pleexport.checkpoint.index import INDEX, read_index
from pleexport.checkpoint.text_files import is_text_file, matches
from pleexport.errors import CheckpointError, MissingDependencyError
from pleexport.progress import Progress
from pleexport.sizes import size_text
from pleexport.staging import is_of_disk, is_partial, staged_file

# The form of a model's id on the hub, maybe with a revision.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_PAGE = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)(?:/tree/([^/]+))?/?")
_SPARE_BYTES = 64 << 20


class Store(Protocol):
    """A folder elsewhere."""

    url: str
    cache: Path

    @property
    def repository(self) -> Repository | None:
        """Which one of the hub it is, once it was listed."""
        ...

    def listing(self) -> Mapping[str, int]:
        """Size in bytes of every file, by its name in the folder."""
        ...

    def cached(self, name: str) -> bool:
        """Whether a file is here already."""
        ...

    def get(self, name: str) -> Path:
        """The file, here."""
        ...


@dataclass(frozen=True)
class Remote:
    """A checkpoint elsewhere.

    Attributes:
        name: what a bundle is called after.
        file: the one file that is wanted of the folder; None for what a build needs.
    """

    store: Store
    name: str
    file: str | None = None

    @property
    def holds_adapter(self) -> bool:
        """Whether it is an adapter, without a model; a trainer may leave a config beside it."""
        return self.file is None and _is_adapter(self.store.listing())

    def fetch(self, progress: Progress, *, weights: bool = True) -> Path:
        """Bring a checkpoint here.

        Args:
            weights: otherwise only what says how it works.
        Returns:
            its folder, or its file where one was named.
        Raises:
            CheckpointError: it cannot be had, does not fit on the disk, or holds no weights that
                are read.
        """
        sizes = self.store.listing()
        names = _small_files(sizes)
        if weights:
            names = [*names, *self._weights(sizes)]
        missing = [name for name in names if not self.store.cached(name)]
        _check_space(self.store, sum(sizes[name] for name in missing))
        if missing:
            total = size_text(sum(sizes[name] for name in missing))
            progress.note(f"note: fetching {len(missing)} files, {total}, of {self.store.url}")
        found = [self.store.get(name) for name in names]
        if not found:
            raise CheckpointError(
                f"`{self.store.url}` holds no checkpoint", hint="check its name and revision"
            )
        if self.file and weights:
            return found[names.index(self.file)]
        return next(f for n, f in zip(names, found, strict=True) if "/" not in n).parent

    def _weights(self, sizes: Mapping[str, int]) -> list[str]:
        if self.file is None:
            return _weight_files(sizes, self.store)
        if self.file not in sizes:
            raise CheckpointError(
                f"`{self.store.url}` has no file `{self.file}`", hint="check its name and revision"
            )
        return [self.file]


def open_checkpoint(
    checkpoint: str | Path,
    remote: Remote | None,
    *,
    weights: bool,
    check: Callable[[Checkpoint], object],
    progress: Progress,
) -> Checkpoint:
    """Open a checkpoint, wherever it lies.

    Args:
        remote: what `find_remote` says of it.
        weights: whether those of a checkpoint elsewhere are fetched; those that are here are
            opened in any case.
        check: is called with a checkpoint that has a config but no weights yet, and raises if it
            cannot be used; so nobody waits for gigabytes in vain.
    """
    if remote is None:
        return Checkpoint(checkpoint)
    progress.note(f"note: there is no `{checkpoint}` here; it is taken from {remote.store.url}")
    config = Checkpoint(remote.fetch(progress, weights=False), weights=False, name=remote.name)
    if config.config:
        check(config)
    if not weights:
        return config
    folder = remote.fetch(progress)
    return Checkpoint(folder, name=remote.name, repository=remote.store.repository)


def find_remote(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
) -> Remote | None:
    """Where a checkpoint lies, if that is not this machine; a file or folder here always wins.

    Args:
        checkpoint: a path; a model's id on the Hugging Face hub, `owner/model`, maybe with
            `@revision`; `hf://id` or `hf://id/file.pth`; or a URL that fsspec opens.
        revision: a branch, tag or commit of the hub; the main branch by default.
        token: for the hub; the one that is logged in by default.
        offline: take what is here already, and ask nobody.
    Raises:
        CheckpointError: a path that is not there looks like an id, or a revision has no meaning.
    """
    text = str(checkpoint)
    remote = None
    if isinstance(checkpoint, str) and (page := _HUB_PAGE.fullmatch(text)):
        text = f"hf://{page[1]}" + (f"@{page[2]}" if page[2] else "")
    if text.startswith("hf://"):
        remote = _hub(text.removeprefix("hf://"), revision, token, offline)
    elif "://" in text:
        remote = _url(text, offline)
    elif not Path(text).exists() and _ID.fullmatch(text):
        if Path(text.split("/")[0]).exists():
            raise CheckpointError(
                f"`{text}` does not exist, though `{text.split('/')[0]}` does",
                hint=f"check the path; a model of the Hugging Face hub is written `hf://{text}`",
            )
        remote = _hub(text, revision, token, offline)
    if revision and (remote is None or not isinstance(remote.store, HubStore)):
        raise CheckpointError(
            f"`{text}` is not of the Hugging Face hub and has no revision `{revision}`",
            hint="leave `--revision` out",
        )
    return remote


def _hub(text: str, revision: str | None, token: str | None, offline: bool) -> Remote:
    text, _, own = text.partition("@")
    owner, _, rest = text.strip("/").partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise CheckpointError(
            f"`hf://{text}` is no model's id", hint="write it like `hf://owner/model`"
        )
    if revision and own and revision != own:
        raise CheckpointError(
            f"`{text}@{own}` names a revision already, and `{revision}` is another",
            hint="leave one of the two out",
        )
    store = HubStore(f"{owner}/{name}", own or revision or "main", token=token, offline=offline)
    return Remote(store, Path(file).stem if file else name, file or None)


def _url(text: str, offline: bool) -> Remote | None:
    if text.startswith("file://"):
        raise CheckpointError(f"`{text}` is a URL", hint="pass the path without `file://`")
    return Remote(FsspecStore(text, offline=offline), text.rstrip("/").rsplit("/", 1)[-1])


class HubStore:
    """A model's repository on the Hugging Face hub, one revision of it."""

    def __init__(self, repo: str, revision: str, *, token: str | None, offline: bool) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors
        except ImportError as err:
            raise MissingDependencyError(
                f"fetching `{repo}` needs {err.name}", hint="pip install 'pleexport[export]'"
            ) from err
        self._hub, self._failures = huggingface_hub, errors
        self.repo, self._revision, self._token = repo, revision, token
        self._offline = offline
        self._commit: str | None = None
        self._home, self.url = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo}"
        self._listed: Mapping[str, int] | None = None
        self.cache = Path(constants.HF_HUB_CACHE)

    @property
    def repository(self) -> Repository | None:
        """See `Store`."""
        commit = self._commit or self._cached_commit()
        return Repository(self.repo, commit) if _COMMIT.fullmatch(commit) else None

    def listing(self) -> Mapping[str, int]:
        """See `Store`; what is cached where the hub cannot be asked, if there is something."""
        if self._listed is None:
            self._listed = self._cached_files() if self._offline else self._list()
        return self._listed

    def _list(self) -> Mapping[str, int]:
        api = self._hub.HfApi(token=self._token)
        with self._errors():
            try:
                info = api.model_info(self.repo, revision=self._revision, files_metadata=True)
            except (self._failures.HfHubHTTPError, OSError) as err:
                status = getattr(getattr(err, "response", None), "status_code", None)
                if status is not None and status < 500:
                    raise
                return self._cached_files(err)
            except Exception as err:  # the classes of a broken connection change with versions
                return self._cached_files(err)
        self._commit = info.sha
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def cached(self, name: str) -> bool:
        """See `Store`."""
        commit = self._commit or self._revision
        found = self._hub.try_to_load_from_cache(self.repo, name, revision=commit)
        return isinstance(found, str)

    def get(self, name: str) -> Path:
        """See `Store`."""
        with self._errors():
            # By the branch's name at first, which the cache then knows without the hub.
            revision, self._revision = self._revision, self._commit or self._revision
            path = self._hub.hf_hub_download(
                self.repo,
                name,
                revision=revision,
                token=self._token,
                local_files_only=self._commit is None,
            )
        return Path(path)

    @property
    def _folder(self) -> Path:
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    def _cached_commit(self) -> str:
        """What a branch or tag stands for in the cache; a commit stands for itself."""
        ref = self._folder / "refs" / self._revision
        return ref.read_text().strip() if ref.is_file() else self._revision

    def _cached_files(self, cause: Exception | None = None) -> Mapping[str, int]:
        """The files of the newest cached commit of the revision."""
        snapshot = self._folder / "snapshots" / self._cached_commit()
        if snapshot.is_dir():
            return _sizes_below(snapshot)
        why = (
            "the hub may not be asked" if cause is None else f"the hub cannot be reached ({cause})"
        )
        raise CheckpointError(
            f"`{self.repo}` at `{self._revision}` is not in the cache, and {_one_line(why)}",
            hint="connect once to fetch it, or pass a folder",
        ) from cause

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what the hub answered in one sentence."""
        errors, page = self._failures, self.url
        try:
            yield
        except CheckpointError:
            raise
        except errors.GatedRepoError as err:
            raise CheckpointError(
                f"`{self.repo}` may be fetched only by who has accepted its terms",
                hint=f"accept them at {page}, then log in with `hf auth login` or pass `--token`",
            ) from err
        except errors.RepositoryNotFoundError as err:
            raise CheckpointError(
                f"there is no folder `{self.repo}` here, and no model of this name at {self._home}",
                hint="check the spelling; a private model needs `hf auth login` or `--token`",
            ) from err
        except errors.RevisionNotFoundError as err:
            raise CheckpointError(
                f"`{self.repo}` has no revision `{self._revision}`",
                hint=f"{page}/tree/main lists its branches and tags",
            ) from err
        except Exception as err:
            raise CheckpointError(
                f"`{self.repo}` cannot be fetched: {_one_line(str(err))}",
                hint="try again; what is here already is not fetched twice",
            ) from err


class FsspecStore:
    """A folder that fsspec opens, such as `s3://bucket/folder`."""

    def __init__(self, url: str, *, offline: bool) -> None:
        self.url = url.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = base / "pleexport" / f"{digest}-{self.url.rsplit('/', 1)[-1]}"
        self._offline = offline
        with self._errors():
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.url)

    @property
    def repository(self) -> None:
        """See `Store`."""

    def listing(self) -> Mapping[str, int]:
        """See `Store`."""
        if self._offline:
            here = _sizes_below(self.cache)
            return {n: size for n, size in here.items() if not is_partial(Path(n).name)}
        with self._errors():
            found = self._files.find(self._root, detail=True)
        root = self._root.strip("/") + "/"
        names = {path.strip("/").removeprefix(root): info for path, info in found.items()}
        return {
            name: int(info.get("size") or 0)
            for name, info in names.items()
            if ".." not in Path(name).parts and not Path(name).is_absolute()
        }

    def cached(self, name: str) -> bool:
        """See `Store`; a file that changed elsewhere is not."""
        path = self.cache / name
        return path.is_file() and (self._offline or self._known().get(name) == self._version(name))

    def get(self, name: str) -> Path:
        """See `Store`; a file is here whole, or not at all."""
        path = self.cache / name
        if self.cached(name):
            return path
        version = self._version(name)
        with _staged(path) as part, self._errors():
            self._files.get_file(f"{self._root}/{name}", str(part))
        with _staged(self._record) as part:
            part.write_text(json.dumps(self._known() | {name: version}), encoding="utf-8")
        return path

    @property
    def _record(self) -> Path:
        """What was fetched in which version; beside the folder, which holds nothing else."""
        return self.cache.with_name(self.cache.name + ".fetched")

    def _known(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._record.read_bytes()))
        except (OSError, ValueError, TypeError):
            return {}

    def _version(self, name: str) -> str:
        with self._errors():
            return str(self._files.ukey(f"{self._root}/{name}"))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ImportError as err:
            raise MissingDependencyError(
                f"`{self.url}` needs a package that is not installed: {_one_line(str(err))}",
                hint="install it, or copy the checkpoint here and pass its folder",
            ) from err
        except Exception as err:
            if is_of_disk(err):  # of this machine, which the staging of the file tells
                raise
            raise CheckpointError(
                f"`{self.url}` cannot be fetched: {_one_line(str(err) or type(err).__name__)}",
                hint="check the URL and your access to it",
            ) from err


def _staged(path: Path) -> AbstractContextManager[Path]:
    """A file of the cache, which is there whole or not at all."""
    return staged_file(
        path, error=CheckpointError, elsewhere="choose another place with XDG_CACHE_HOME"
    )


def _sizes_below(folder: Path) -> dict[str, int]:
    """Size in bytes of every file, by its name in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _small_files(names: Collection[str]) -> list[str]:
    """What says how a model works; an index of shards says only where weights are."""
    return sorted(n for n in names if is_text_file(n) and not n.endswith(".index.json"))


def _is_adapter(names: Collection[str]) -> bool:
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(names) and not {WHOLE, INDEX} & set(names)


def _weight_files(names: Collection[str], store: Store) -> list[str]:
    """The weights that transformers would open: one file, or the shards of an index.

    A folder of an adapter has its own; a family without a config has one `.pth` file.
    """
    if _is_adapter(names):
        return [ADAPTER_WEIGHTS]
    if WHOLE in names:
        return [WHOLE]
    if INDEX in names:
        return [INDEX, *_shards(store.get(INDEX), names, store)]
    for pattern, hint in (
        ("*.safetensors", "name one of them as in `hf://owner/model/file.safetensors`"),
        ("*.pth", "name one of them as in `hf://owner/model/file.pth`"),
    ):
        found = sorted(name for name in names if matches(name, pattern))
        if len(found) > 1:
            listed = ", ".join(f"`{name}`" for name in found[:5])
            raise CheckpointError(
                f"`{store.url}` holds {len(found)} weight files and no index: {listed}", hint=hint
            )
        if found:
            return found
    others = sorted({Path(name).suffix for name in names if Path(name).suffix} - {".md", ".json"})
    there = f", but {', '.join(others)}" if others else ""
    raise CheckpointError(
        f"`{store.url}` holds no safetensors weights{there}",
        hint="check its name, or look for the checkpoint that it was converted from",
    )


def _shards(index: Path, names: Collection[str], store: Store) -> list[str]:
    """The shards of the language model; what holds towers only is not fetched."""
    try:
        shards = read_index(index).text_shards
    except CheckpointError as err:
        raise CheckpointError(
            f"`{INDEX}` of `{store.url}` cannot be used: {err.message}",
            hint="tell its makers; it cannot be opened so",
        ) from err
    missing = [name for name in shards if name not in names]
    if missing:
        raise CheckpointError(
            f"`{store.url}` lacks `{missing[0]}`, which its `{INDEX}` lists",
            hint="tell its makers; it cannot be opened so",
        )
    return shards


def _check_space(store: Store, needed: int) -> None:
    """Refuse what does not fit, before anything is fetched."""
    folder = store.cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"`{store.cache}` has {size_text(free)} free; `{store.url}` needs {size_text(needed)}",
            hint="free some space, or choose another place with HF_HOME or XDG_CACHE_HOME",
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
