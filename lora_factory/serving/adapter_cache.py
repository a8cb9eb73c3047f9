"""Folders of generated adapters on fast storage, made on first use and bounded in number and size."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.serving.limits import MAX_TEXT
from lora_factory.utils.files import remove_folder
from lora_factory.utils.folders import ADAPTER, storage_errors
from lora_factory.utils.paths import sha256_text

MAX_ADAPTERS = 1000
_CARD_BYTES = 64 << 10  # of a folder, beside its weights
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _LOCK = "lora-factory-", ".lock"
_OURS = re.compile(r"\.lock|(\.(tmp|old)-)?[0-9a-f]{64}(-[0-9a-f]{12})?")  # all that such a folder ever holds
User = TypeVar("User")


@dataclass
class _Entry:
    """An adapter's folder, and who uses it."""

    folder: Path
    size: int
    users: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def in_use(self) -> bool:
        self.users = [user for user in self.users if user() is not None]
        return bool(self.users)


class AdapterCache:
    """The PEFT folders of texts, each generated when it is first asked for.

    The folders lie in one folder of this process, in /dev/shm where that can be written, and go with the process; what
    processes that were killed have left there is removed. Their names are hashes. The least recently used one makes
    room for a new one, but none that is in use. Threads may share a cache; one at a time generates.

    Args:
        generator: Folder or Hub id of a generator; it is loaded when it is first needed.
        max_bytes: Total size of the folders, of which there are ``MAX_ADAPTERS`` at most.
        parent: Where the folder of this process is made; default: /dev/shm, or where temporary files go.
    """

    def __init__(self, generator: str, *, max_bytes: int = 4 << 30, parent: Path | None = None) -> None:
        """Remember what to do; nothing is loaded or written yet."""
        self._name, self._max_bytes, self._parent = generator, max_bytes, parent
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def generator(self) -> CVAELoRAGenerator:
        """The generator.

        Raises:
            LoraFactoryError: When it cannot be loaded.
        """
        return CVAELoRAGenerator.from_pretrained(self._name)

    @cached_property
    def root(self) -> Path:
        """The folder of this process."""
        shared = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        return _own_folder(self, self._parent or shared)

    def lend(self, text: str, make: Callable[[Path], User]) -> User:
        """Make a user of a text's folder; the folder stays as long as the user is alive.

        Args:
            text: What the adapter is for.
            make: Makes the user, an object that takes weak references, of the folder.

        Raises:
            LoraFactoryError: When the text is empty, too long or no text, the generator cannot be loaded, or all
                folders that would have to go are in use.
            StorageError: When the folder cannot be written; it is a LoraFactoryError.
        """
        key = _key(text)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.folder.is_dir():
                entry = self._entries[key] = self._generate(key, text)
            self._entries.move_to_end(key)
            user = make(entry.folder)
            entry.users.append(weakref.ref(user))
            return user

    def _generate(self, key: str, text: str) -> _Entry:
        """Write a text's folder, after others have made room."""
        self._make_room(4 * self.generator.layout.size + _CARD_BYTES)
        folder = self.generator.save_adapter(text, self.root / key)
        return _Entry(folder, sum(file.stat().st_size for file in folder.iterdir()))

    def _make_room(self, size: int) -> None:
        """Remove folders, the least recently used ones first, until there is room for one more."""
        for key, entry in list(self._entries.items()):
            total = sum(other.size for other in self._entries.values())
            if len(self._entries) < MAX_ADAPTERS and total + size <= self._max_bytes:
                return
            if not entry.in_use:
                del self._entries[key]
                if entry.folder.is_dir():
                    remove_folder(entry.folder, ADAPTER)
        total = sum(other.size for other in self._entries.values())
        if len(self._entries) >= MAX_ADAPTERS or total + size > self._max_bytes:
            raise LoraFactoryError(
                f"no room for another adapter of {size:,} bytes: {len(self._entries)} adapters (at most "
                f"{MAX_ADAPTERS}) of {total:,} bytes (at most {self._max_bytes:,}) are in use; unload one, or "
                "allow more"
            )


def _key(text: str) -> str:
    """The name of a text's folder."""
    if not isinstance(text, str) or not text.strip():
        raise LoraFactoryError("the text of an adapter is empty; say what it is for, in a sentence")
    if len(text) > MAX_TEXT:
        raise LoraFactoryError(f"the text has {len(text):,} characters, the limit is {MAX_TEXT:,}; shorten it")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise LoraFactoryError(f"{text[:80]!a} holds a NUL or half of a surrogate pair and is no text; correct it")
    return sha256_text(text)


def _own_folder(owner: object, parent: Path) -> Path:
    """Make a folder that only this user can read, which goes with its owner, and remove those whose owners died.

    An owner holds a lock on its folder, which the system releases when the process ends, however it ends.
    """
    with storage_errors(parent):
        for lock_file in parent.glob(f"{_PREFIX}*/{_LOCK}"):
            left = lock_file.parent
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            with contextlib.suppress(Timeout, OSError), FileLock(lock_file, timeout=0):
                if all(_OURS.fullmatch(name) for name in os.listdir(left)):
                    shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = FileLock(folder / _LOCK, thread_local=False)  # whichever thread lets go of the owner
        lock.acquire(timeout=0)

    def remove(process: int = os.getpid()) -> None:
        if os.getpid() == process:  # a forked child inherits this, but not the folder
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)

    weakref.finalize(owner, remove)
    return folder
