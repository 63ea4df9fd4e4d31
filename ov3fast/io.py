"""Files and folders that are whole or absent: everything is written aside and renamed.

    with atomic_write(path) as temporary:
        save_file(tensors, temporary)

A reader sees the old content or the new one, never a half; a block that raises leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL, UNCHANGED = "the disk is full", "nothing was changed"
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file beside `path` (~ is expanded), of the same suffix, that becomes `path` when the block ends.

    The folder is made where it is missing; the file's mode follows the umask whatever the writer set. OSError names `path` where
    the disk is full, also when the writer reports that with an error class of its own (safetensors does).
    """
    path = Path(path).expanduser()
    if path.is_symlink():  # what it leads to is written, the link stays
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing-{os.getpid()}{path.suffix}")
    try:
        with naming_full_disk(path, UNCHANGED):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], former: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `path` (~ is expanded) that becomes `path` when the block ends.

    A folder that is there already is replaced only if it holds nothing but names that the new one holds too, or names in
    `former` (files of a former save that the new one lacks): FileExistsError names another one. Modes and errors are as in
    `atomic_write`.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    retired = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    try:
        with naming_full_disk(path, UNCHANGED):
            temporary.mkdir()
            yield temporary
            _apply_umask(temporary)
            _retire(path, temporary, retired, set(former))
            try:
                os.replace(temporary, path)
            except OSError:
                if retired.exists():
                    os.replace(retired, path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def _retire(path: Path, temporary: Path, retired: Path, former: set[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; give a folder")
    others = sorted({entry.name for entry in path.iterdir()} - {entry.name for entry in temporary.iterdir()} - former)
    if others:
        raise FileExistsError(f"{path} holds other files ({others[0]}); give a new folder or one of a former save")
    os.replace(path, retired)


def _apply_umask(folder: Path) -> None:
    # Read off a file made for it: os.umask would change it for the other threads of the process.
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def naming_full_disk(path: str | os.PathLike[str], *consequences: str) -> Iterator[None]:
    """Whatever is raised in the block because the disk is full leaves it as one OSError that says so and names `path`."""
    try:
        yield
    except Exception as error:
        named_already = isinstance(error, OSError) and (error.strerror or "").startswith(FULL)
        if named_already or not _is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, "; ".join((FULL, *consequences)), str(path)) from error


def _is_full_disk(error: Exception) -> bool:
    """By its number, or by the words of those that hide it: safetensors, torch (whose zip files end at another place than it wrote to), and
    numpy, which counts bytes."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return (
        f"os error {errno.ENOSPC}" in text
        or "No space left" in text
        or ("inline_container" in text and "unexpected pos" in text)
        or bool(_SHORT_WRITE.fullmatch(text))
    )


def check_writable(path: str | os.PathLike[str], what: str = "out") -> Path:
    """`path` with ~ expanded, where a file of that name can be written: to be asked before the work, not after it.

    IsADirectoryError, NotADirectoryError, PermissionError or another OSError names `path` and the reason. Nothing is left behind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{what} is a folder; give a file", str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, f"{what} is read-only", str(path))
    check_writable_folder(path.parent, what)
    return path


def check_writable_folder(path: str | os.PathLike[str], what: str = "out") -> Path:
    """`path` with ~ expanded, where it is a folder that takes files or one that can be made. Errors as in `check_writable`."""
    path = Path(path).expanduser()
    folder = path.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{what}: {folder} is no folder", str(path))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{what}: nothing can be written in {folder} ({error.strerror})", str(path)) from None
    return path
