"""Where are the worlds of a visitor kept on the server, and for how long?

Each session has a folder with a random name, which is also the visitor's only key to it. Each photo has a world folder
in it, so that the same photo again, or a longer walkthrough of it, finds its finished chunks. Knows no photo's content
beyond a hash, and deletes nothing but folders it has named itself.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lyra.errors import UserError
from lyra.generation.chunk_store import writing_to
from lyra.world import World

KEPT_DAYS = 7.0
"""A session that nobody has used for so long is deleted at the next start."""

_SESSION = re.compile(r"[0-9a-f]{32}")
_WORLD = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")


@dataclass(frozen=True)
class Sessions:
    """The folders of all sessions."""

    root: Path

    def is_session(self, session: object) -> bool:
        """Whether a value that came from outside is a session with a folder."""
        return isinstance(session, str) and bool(_SESSION.fullmatch(session)) and (self.root / session).is_dir()

    def new_session(self) -> str:
        """A session with an id that cannot be guessed, and its folder.

        Raises:
            UserError: the folder cannot be written.
        """
        session = secrets.token_hex(16)
        with writing_to(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / session).mkdir(mode=0o700)
        return session

    def new_world(self, session: str, content_hash: str) -> str:
        """Id of a session's world of a photo; the same photo has the same id. Makes its folder.

        Args:
            session: an id of `new_session`.
            content_hash: hexadecimal hash of the photo's pixels, at least 16 digits.

        Raises:
            UserError: the session is gone or the folder cannot be written.
        """
        world_id = f"{session}-{content_hash[:16]}"
        if not self.is_session(session) or not _WORLD.fullmatch(world_id):
            raise UserError(_GONE)
        with writing_to(self.root):
            (self.root / session / content_hash[:16]).mkdir(exist_ok=True)
        return world_id

    def session_of(self, world_id: str) -> str:
        """The session that a world belongs to.

        Raises:
            UserError: there is no such world, or none any more.
        """
        return self.world(world_id).folder.parent.name

    def world(self, world_id: object) -> World:
        """The world of an id that came from outside.

        Raises:
            UserError: there is no such world, or none any more.
        """
        match = _WORLD.fullmatch(world_id) if isinstance(world_id, str) else None
        if match is None:
            raise UserError(_GONE)
        session = self.root / match[1]
        folder = session / match[2]
        if not folder.is_dir():
            raise UserError(_GONE)
        os.utime(session)
        return World(folder)

    def previews(self, world_id: str) -> Path:
        """Folder beside a world for pictures that only the app needs.

        Raises:
            UserError: there is no such world, or the folder cannot be written.
        """
        return self.previews_of(self.world(world_id))

    def previews_of(self, world: World) -> Path:
        """Folder beside a world for pictures that only the app needs.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = world.folder.with_name(f"{world.folder.name}.previews")
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def expire(self, days: float = KEPT_DAYS) -> int:
        """Delete the sessions that nobody has used for some days; returns how many there were."""
        if not self.root.is_dir():
            return 0
        oldest = time.time() - days * 24 * 3600
        old = [
            folder
            for folder in self.root.iterdir()
            if _SESSION.fullmatch(folder.name) and folder.is_dir() and folder.stat().st_mtime < oldest
        ]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        return len(old)


_GONE = "This world is not on the server any more; choose the photo again."
