"""Files of the user's that decide which kernels run: where they are, and when they are to be trusted.

They count only where nobody but the user (or root) could have written them.
"""

import os
import stat
import tempfile
from pathlib import Path


def folder() -> Path:
    """Where such files lie: MI_KERNELS_CACHE, else mi_kernels in the user's cache directory.

    Raises RuntimeError: there is no home directory, and none of the variables is set.
    """
    named = os.environ.get("MI_KERNELS_CACHE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "mi_kernels"


def table() -> Path:
    """The tiles that `python -m mi_kernels tune` found on this machine."""
    return folder() / "tiles.json"


def distrust(file: Path) -> str | None:
    """Who else could have written a file, or could put another in its place; None where nobody could.

    It may not exist yet.
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
        # Of a directory with the sticky bit, such as /tmp, others cannot replace what is not theirs.
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and not (part != file and found.st_mode & stat.S_ISVTX):
            return f"others may write {part} (chmod go-w {part})"
    return None


def make_place(file: Path) -> None:
    """The folder of a file that only the user may write.

    Raises OSError: it cannot be made, or others could write the file too.
    """
    for folder in reversed([file.parent, *file.parent.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)  # of parents=True the mode would be the umask's
    reason = distrust(file)
    if reason is not None:
        raise PermissionError(f"{file.name} would not be trusted: {reason}")


def put(file: Path, text: str) -> None:
    """A file for the user alone, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text.rstrip("\n") + "\n")
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise
