"""Files in a folder that are replaced together: whoever loads them finds all the old ones or all the new ones.

How a set of files is replaced, so that a process may be killed between any two steps:

1. *Stage.* The new files are written into ``.peft-saving-<id>/<save>/`` beside the old ones and synced to disk. A
   file that has to go is noted there as an empty ``-<name>``. A full disk ends here, with nothing changed.
2. *Commit.* ``.peft-saving-<id>`` is renamed to ``.peft-saved``. In this one step the new set replaces the old: from
   here on, what lies in ``.peft-saved`` counts before what lies at the usual place.
3. *Settle.* The files move from ``.peft-saved/<save>/`` to their usual places, and ``.peft-saved`` goes away.

Who saves settles the ``.peft-saved`` that is there first; who reads reads through it, follows no link in it, and writes
nothing: the folder may be anybody's. No lock is needed for that: every step is a rename out of, or into, a folder whose
name belongs to this one save, so it happens once, whoever does it. Who reads several files reads them again if they
were replaced meanwhile, and after some turns asks the writers to wait, by a lock that is a courtesy: nothing breaks
without it. Only a program that does not know all this can see a set of files half replaced, if it reads during step 3
or after a process was killed there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from peft.errors import warn

STAGED = ".peft-saving-"
COMMITTED = ".peft-saved"
GONE = "-"
#: what the folder of one save is called
_SAVE_NAME = re.compile(r"[0-9a-f]{12}")

#: how often files are read again that are replaced at the same time
ATTEMPTS = 50
#: after how many of these turns the reader asks writers to wait
POLITE = 3
#: seconds that one waits for the lock of another
PATIENCE = 30.0

T = TypeVar("T")

#: what a file system answers that cannot rename folders (some mounts of object stores)
_NO_FOLDER_RENAME = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMFILE, errno.EXDEV}
#: what a folder answers to fsync where it has none
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP}


def check_folder(path: str | os.PathLike) -> None:
    """Raises ValueError where something is to be saved into a folder and a file is there."""
    if os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)!r} is a file; a directory is needed to save into.")


def replace_files(
    folder: str | os.PathLike, files: Mapping[str, bytes | Callable[[str], object]], drop: Iterable[str] = ()
) -> None:
    """Writes ``files`` into ``folder`` and removes ``drop`` from it, all of it or nothing.

    Args:
        folder: made if need be. Other files in it stay as they are.
        files: by name, the content, or a function that writes it to the path it is given.
        drop: names of files that the new set makes void.

    Raises:
        OSError: it could not be written (a full disk, no permission); the folder is then as it was.
    """
    folder = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    for name in files:
        if os.path.isdir(os.path.join(folder, name)):
            raise IsADirectoryError(f"{os.path.join(folder, name)!r} is a directory; a file is to be written there.")
    settle(folder)
    _sweep(folder)
    stage, lock = _new_stage(folder)
    try:
        inside = os.path.join(stage, uuid.uuid4().hex[:12])
        os.mkdir(inside)
        for name, content in files.items():
            _write(os.path.join(inside, name), content, like=os.path.join(folder, name))
        for name in drop:  # also where it is not there yet: another process may be writing it
            _write(os.path.join(inside, GONE + name), b"")
        _sync(inside)
        _sync(stage)
        with _held(folder):
            _commit(folder, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # where it was not committed
        _unlock(lock)
    try:
        _sync(folder)
        settle(folder)
    except OSError as error:  # the save counts by now
        warn(
            f"Saved, but the files still lie in {os.path.join(folder, COMMITTED)!r}, where this library finds them and"
            f" other programs do not; the next save moves them to their places. {error}"
        )


def find(folder: str | os.PathLike, name: str) -> str | None:
    """Path of the file ``name`` as the last completed `replace_files` left it, or None if there is none."""
    folder = os.fspath(folder)
    for inside in _saves(folder):
        if _is_file(os.path.join(inside, GONE + name)):
            return None
        if _is_file(os.path.join(inside, name)):
            return os.path.join(inside, name)
    path = os.path.join(folder, name)
    return path if os.path.isfile(path) else None


def _saves(folder: str) -> list[str]:
    """The folders of committed saves: only what a save makes, and no links."""
    committed = os.path.join(folder, COMMITTED)
    if not _is_folder(committed):
        return []
    inside = [os.path.join(committed, entry) for entry in _entries(committed) if _SAVE_NAME.fullmatch(entry)]
    return [path for path in inside if _is_folder(path)]


def _kind(path: str) -> int:
    """What lies at a path itself, links not followed; 0 if nothing does."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _is_file(path: str) -> bool:
    return _kind(path) == stat.S_IFREG


def _is_folder(path: str) -> bool:
    return _kind(path) == stat.S_IFDIR


def read_at_rest(folder: str | os.PathLike, name: str, read: Callable[[], T]) -> T:
    """What ``read`` returns, which reads several files of one set: called once more if the set is replaced meanwhile.

    Args:
        folder: where the files lie; what is none, such as a repository of the hub, is read at once.
        name: one of them, by which it is seen that they are still the same.
        read: reads them, by the paths that `find` gives.

    Raises:
        OSError: the files were replaced again and again.
    """
    if not os.path.isdir(folder):
        return read()
    lost: FileNotFoundError | None = None
    for turn in range(ATTEMPTS):
        try:
            with _held(folder, shared=True, ask=turn >= POLITE):
                path = find(folder, name)
                if path is None:
                    return read()
                # Open until the end, so that no later file gets the number by which this one is known
                with open(path, "rb") as held:
                    before = os.fstat(held.fileno())
                    try:
                        content = read()
                    except Exception:
                        if os.path.samestat(before, os.stat(find(folder, name) or "")):
                            raise
                    else:
                        if os.path.samestat(before, os.stat(find(folder, name) or "")):
                            return content
        except FileNotFoundError as error:  # moved to its place between finding and opening it
            lost = error
    raise OSError(f"Could not read {os.fspath(folder)!r}: {lost or 'its files are replaced all the time'}.") from lost


def settle(folder: str) -> None:
    """Moves the files of a committed save to their places; does nothing where there is none."""
    committed = os.path.join(folder, COMMITTED)
    for inside in _saves(folder):
        for entry in sorted(_entries(inside)):
            if not _is_file(os.path.join(inside, entry)) or entry.removeprefix(GONE) in ("", ".", ".."):
                continue
            # FileNotFoundError: somebody else is settling the same save, and was faster
            with suppress(FileNotFoundError):
                if entry.startswith(GONE):
                    with suppress(FileNotFoundError):
                        os.replace(os.path.join(folder, entry.removeprefix(GONE)), os.path.join(inside, entry))
                    os.unlink(os.path.join(inside, entry))
                else:
                    os.replace(os.path.join(inside, entry), os.path.join(folder, entry))
        _sync(folder)
        _remove(inside)
    kind = _kind(committed)  # once: another process may commit its save at any moment
    if kind == stat.S_IFDIR:
        for entry in _entries(committed):
            path = os.path.join(committed, entry)
            if not (_SAVE_NAME.fullmatch(entry) and _is_folder(path)):  # a stray, which would be in the next save's way
                _remove(path)
        with suppress(OSError):
            os.rmdir(committed)
    elif kind:
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(committed)


def _remove(path: str) -> None:
    """Removes a folder with what is in it, or a file or a link."""
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _entries(path: str) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(path)
    return []


def _commit(folder: str, stage: str) -> None:
    """Renames ``stage`` to the committed place, once the save before it is settled."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return os.rename(stage, os.path.join(folder, COMMITTED))
        except OSError as error:
            if error.errno in _NO_FOLDER_RENAME:
                return _move_one_by_one(folder, stage)
            # Another process has committed in between (Windows says so with EACCES)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES) or time.monotonic() > deadline:
                raise
        settle(folder)
        time.sleep(0.005)


def _move_one_by_one(folder: str, stage: str) -> None:
    warn(
        f"The file system of {folder!r} cannot rename folders; the files are replaced one after the other. If the"
        " process is killed in between, files of two saves may be left there."
    )
    inside = os.path.join(stage, *_entries(stage))
    for entry in sorted(_entries(inside)):
        if entry.startswith(GONE):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, entry.removeprefix(GONE)))
        else:
            shutil.move(os.path.join(inside, entry), os.path.join(folder, entry))
    shutil.rmtree(stage, ignore_errors=True)


def _write(path: str, content: bytes | Callable[[str], object], like: str | None = None) -> None:
    """Writes a file, with the permissions of `like` if there is such a file, else with those of any new file."""
    with open(path, "wb") as file:
        if not callable(content):
            file.write(content)
    mode = os.stat(path).st_mode
    if like is not None:
        with suppress(FileNotFoundError):  # not asked beforehand: another process may remove it at any moment
            mode = os.stat(like).st_mode
    if callable(content):
        content(path)  # safetensors makes a file that only its owner may read
    os.chmod(path, stat.S_IMODE(mode))
    _sync(path)


def _sync(path: str) -> None:
    """Returns when ``path``, a file or a folder, is on the disk."""
    is_folder = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDER_SYNC):
            raise


def _new_stage(folder: str) -> tuple[str, int | None]:
    """A new folder to write into, and the descriptor that holds its lock."""
    while True:
        stage = os.path.join(folder, STAGED + uuid.uuid4().hex[:12])
        os.mkdir(stage)
        # Between its making and its locking, another process may take it for an orphan: then once more
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(stage)
            if os.path.isdir(stage):
                return stage, lock
            _unlock(lock)


def _sweep(folder: str) -> None:
    """Removes what killed processes have staged and not committed."""
    for entry in _entries(folder):
        path = os.path.join(folder, entry)
        if entry.startswith(STAGED) and _is_folder(path):
            with suppress(OSError):
                lock = _lock(path)
                if lock is not None or time.time() - os.stat(path).st_mtime > 86400:
                    shutil.rmtree(path, ignore_errors=True)
                _unlock(lock)


def _lock(path: str | os.PathLike, shared: bool = False) -> int | None:
    """A descriptor that holds the lock of a folder until it is closed or its process ends, in whatever way.

    None where folders have no locks (Windows, some network file systems). Raises BlockingIOError where another
    process holds it (with `shared`: alone).
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


@contextmanager
def _held(folder: str | os.PathLike, shared: bool = False, ask: bool = True) -> Iterator[None]:
    """Holds the lock of `folder`, by which readers keep writers waiting; goes on without it where that takes long."""
    deadline = time.monotonic() + PATIENCE
    descriptor = None
    while ask:
        try:
            with suppress(PermissionError):
                descriptor = _lock(folder, shared)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
    try:
        yield
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        with suppress(OSError):
            os.close(descriptor)
