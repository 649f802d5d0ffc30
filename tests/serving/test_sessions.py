"""Each visitor's worlds are in a folder only they can name, and nothing else is ever touched."""

import os
import time
from pathlib import Path

import pytest

from lyra.errors import UserError
from lyra.serving.sessions import Sessions

PHOTO, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "worlds")


def test_sessions_have_unguessable_private_folders(sessions: Sessions) -> None:
    first, second = sessions.new_session(), sessions.new_session()
    assert first != second and len(first) == 32
    assert (sessions.root / first).stat().st_mode & 0o077 == 0
    assert sessions.is_session(first)


@pytest.mark.parametrize("value", [None, 3, "", "..", "../..", "a" * 32, "A" * 32, "0" * 31 + "/"])
def test_what_is_no_session_is_refused(sessions: Sessions, value: object) -> None:
    sessions.new_session()
    assert not sessions.is_session(value)


def test_the_same_photo_has_the_same_world_within_a_session(sessions: Sessions) -> None:
    mine, yours = sessions.new_session(), sessions.new_session()
    assert sessions.new_world(mine, PHOTO) == sessions.new_world(mine, PHOTO)
    worlds = {sessions.new_world(session, photo) for session in (mine, yours) for photo in (PHOTO, OTHER)}
    assert len({sessions.world(world).folder for world in worlds}) == 4


def test_a_world_keeps_its_files(sessions: Sessions) -> None:
    session = sessions.new_session()
    folder = sessions.world(sessions.new_world(session, PHOTO)).folder
    (folder / "walkthrough.mp4").write_bytes(b"video")
    again = sessions.world(sessions.new_world(session, PHOTO))
    assert again.video_path.read_bytes() == b"video"
    assert sessions.session_of(f"{session}-{PHOTO[:16]}") == session


@pytest.mark.parametrize("value", [None, "", "..-..", "../../etc-passwd", f"{'0' * 32}-{'0' * 16}", 7])
def test_a_world_that_is_not_there_is_named_in_a_sentence(sessions: Sessions, value: object) -> None:
    with pytest.raises(UserError, match="choose the photo again"):
        sessions.world(value)


def test_previews_lie_beside_the_world(sessions: Sessions) -> None:
    world = sessions.new_world(sessions.new_session(), PHOTO)
    previews = sessions.previews(world)
    assert previews.is_dir() and previews.parent == sessions.world(world).folder.parent
    assert list(sessions.world(world).folder.iterdir()) == []


def test_only_old_sessions_expire_and_nothing_of_others(sessions: Sessions) -> None:
    old, used, fresh = (sessions.new_session() for _ in range(3))
    theirs = sessions.root / "holiday photos"
    theirs.mkdir()
    world = sessions.new_world(used, PHOTO)
    weeks_ago = time.time() - 21 * 24 * 3600
    for folder in (sessions.root / old, sessions.root / used, theirs):
        os.utime(folder, (weeks_ago, weeks_ago))
    sessions.world(world)
    assert sessions.expire(days=7) == 1
    assert sorted(path.name for path in sessions.root.iterdir()) == sorted([used, fresh, "holiday photos"])


def test_a_folder_that_cannot_be_written_is_named_in_a_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        Sessions(blocked / "worlds").new_session()
