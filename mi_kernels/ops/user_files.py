"""Per-user files that decide which kernels run: their location and whether to trust them.

A file is used only if no other user (except root) could have written it.
"""

import os
import stat
import tempfile
from pathlib import Path


def folder() -> Path:
    """The folder of such files: MI_KERNELS_CACHE, else mi_kernels in the user's cache directory.

    Raises RuntimeError: there is no home directory, and none of the variables is set.
    """
    named = os.environ.get("MI_KERNELS_CACHE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "mi_kernels"


def table() -> Path:
    """The table of tiles written by `python -m mi_kernels tune` on this machine."""
    return folder() / "tiles.json"


def distrust(file: Path) -> str | None:
    """Why a file is not trusted: who else could write or replace it. None if it is trusted.

    The file need not exist yet.
    """
    if not hasattr(os, "geteuid"):
        return "this system does not say who may write a file"
    file = Path(os.path.realpath(file.parent)) / file.name
    parts = [file, *file.parents]
    for part in parts:
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error)
        if part == file and not stat.S_ISREG(found.st_mode):
            return f"{part} is no regular file"
        if found.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user"
        # In a directory with the sticky bit, such as /tmp, users can replace only their own files.
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and not (part != file and found.st_mode & stat.S_ISVTX):
            return f"others may write {part} (chmod go-w {part})"
    return None


def make_private_folder(file: Path) -> None:
    """Create the folder of a file that only the user may write.

    Raises OSError: it cannot be created, or others could write the file too.
    """
    for folder in reversed([file.parent, *file.parent.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)  # parents=True would ignore the mode
    reason = distrust(file)
    if reason is not None:
        raise PermissionError(f"{file.name} would not be trusted: {reason}")


def write_atomic(file: Path, text: str) -> None:
    """Write a file that only the user can read, atomically."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text.rstrip("\n") + "\n")
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise
