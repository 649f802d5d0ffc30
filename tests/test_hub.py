"""Where weights come from: folders, and a server that speaks enough of the Hugging Face API for a download."""

import errno
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from lyra import hub, hub_files, licences
from lyra.errors import UserError
from lyra.hub import DEFAULT_MODEL, MODELS, RELEASED_MODEL, TOKENIZER, downloaded, find_model, weights_hash
from lyra.licences import CC_BY_NC_4, NVIDIA_RESEARCH, RELEASED_PARTS
from lyra.progress import Cancelled, Progress

COMMIT = "c178c3fcf12b63cf98f6749999e6ecb63901669f"
READ = {
    "checkpoints/model/model/.metadata": b"metadata",
    "checkpoints/model/model/__0_0.distcp": b"shard 0" * 40_000,
    "checkpoints/model/model/__1_0.distcp": b"shard 1" * 40_000,
    "checkpoints/text_encoder/encoder.pth": b"encoder" * 1000,
    "checkpoints/text_encoder/negative_prompt.pt": b"negative",
    "checkpoints/image_encoder/model.pth": b"clip" * 1000,
    "checkpoints/vae/vae.pth": b"vae" * 1000,
    "checkpoints/lora/dmd_distillation.safetensors": b"lora" * 1000,
    "checkpoints/recon/model.pt": b"recon" * 1000,
}
UNREAD = {
    "config.json": b"{}",
    "checkpoints/vae/images_mean_std.pt": b"mean",
    "checkpoints/lora/realism_boost.safetensors": b"boost",
    "assets/training_data/one/video.mp4": b"video",
}
TOKENIZER_REPOSITORY = {
    "config.json": b'{"model_type": "umt5"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"pad_token": "<pad>"}',
    "pytorch_model-00001-of-00006.bin": b"weights",
}


@dataclass
class FakeHub:
    """Repositories, what was asked of them, and the faults to show."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # Method, path and Range of each.
    refuse: tuple[int, dict[str, str]] | None = None  # Status and headers of every answer.
    broken: set[str] = field(default_factory=set)  # Files whose content is answered with status 500.
    cut: Counter[str] = field(default_factory=Counter)  # How often the connection breaks in the middle of a file.

    def sent(self) -> list[tuple[str, str | None]]:
        """Path and Range of the files whose content was asked for."""
        content = [(path, part) for method, path, part in self.requests if method == "GET" and "/resolve/" in path]
        return [(path.split(f"/resolve/{COMMIT}/")[1], part) for path, part in content]

    def files_sent(self) -> list[str]:
        return [path for path, _ in self.sent()]


class Handler(BaseHTTPRequestHandler):
    """Answers one request for the server's `hub`."""

    log_message = lambda self, *args: None  # noqa: E731

    def do_GET(self) -> None:
        state: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path, self.headers.get("Range")))
        if state.refuse:
            return self.send(state.refuse[0], b"{}", state.refuse[1])
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = state.repositories.get(repository)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            return self.send_file(state, name, files[name])
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in files.items()]
            return self.send(200, json.dumps(entries).encode())
        siblings = [{"rfilename": n, "size": len(b), "blobId": oid(b)} for n, b in files.items()]
        info = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self.send(200, json.dumps(info).encode())

    def send_file(self, state: FakeHub, name: str, content: bytes) -> None:
        if name in state.broken and self.command == "GET":
            return self.send(500, b"")
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        broken_off = self.command == "GET" and state.cut[name] > 0
        state.cut[name] -= broken_off
        self.send(206 if wanted else 200, content[start:], headers, cut=broken_off)

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """A server with the released repository and the tokenizer's, and a cache and config folder of the test's own."""
    for name in ("LYRA_ACCEPT_LICENCE", "LYRA_NO_GATED_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LYRA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = FakeHub({RELEASED_MODEL: READ | UNREAD, TOKENIZER: TOKENIZER_REPOSITORY})  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def accepted(fake_hub) -> FakeHub:
    licences.accept(NVIDIA_RESEARCH, "test")
    return fake_hub


def refusal(name: str, find=find_model, **options: object) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(UserError) as caught:
        find(name, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def lyra_json(licence: str) -> bytes:
    settings = json.loads((MODELS / DEFAULT_MODEL / "lyra.json").read_text())
    return json.dumps(settings | {"name": "converted", "licence": licence}).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_shipped_model_needs_no_acceptance_and_no_network(fake_hub):
    source = find_model(DEFAULT_MODEL)
    assert (source.folder, source.layout, source.shipped) == (MODELS / DEFAULT_MODEL, "lyra", True)
    assert [licence.id for licence in source.licences.values()] == ["Apache-2.0"]
    assert downloaded(DEFAULT_MODEL) == hub.model_folder(DEFAULT_MODEL) == source.folder
    assert hub.settings_of(DEFAULT_MODEL).name == DEFAULT_MODEL
    assert fake_hub.requests == []
    assert not find_model(str(MODELS / DEFAULT_MODEL)).shipped


def test_what_is_no_model_is_told_what_there_is(fake_hub, tmp_path):
    assert DEFAULT_MODEL in refusal("lyra-huge") and RELEASED_MODEL in refusal("lyra-huge")
    assert "lyra.json" in refusal(str(tmp_path))
    assert downloaded("lyra-huge") is None and downloaded(str(tmp_path)) is None
    assert fake_hub.requests == []


@pytest.mark.parametrize("licence", ["nvidia-research", f"converted, {NVIDIA_RESEARCH.name}"])
def test_a_converted_checkpoint_keeps_the_gate(fake_hub, tmp_path, licence):
    folder = write(tmp_path / "converted", {"lyra.json": lyra_json(licence)})
    assert NVIDIA_RESEARCH.name in refusal(str(folder))
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_model(str(folder))
    assert source.layout == "lyra" and list(source.licences.values()) == [NVIDIA_RESEARCH]
    write(folder, {"lyra.json": lyra_json(f"{licence} and CC BY-NC 4.0")})
    assert CC_BY_NC_4.name in refusal(str(folder))
    licences.accept(CC_BY_NC_4, "test")
    assert set(find_model(str(folder)).licences.values()) == {NVIDIA_RESEARCH, CC_BY_NC_4}


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_released_folder_is_found_from_its_root_or_checkpoints_and_is_gated(fake_hub, tmp_path, inside):
    root = write(tmp_path / "released", READ)
    assert downloaded(str(root / inside)) == root / "checkpoints"
    assert NVIDIA_RESEARCH.forbids in refusal(str(root / inside))
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_model(str(root / inside))
    assert (source.folder, source.layout, source.licences) == (root / "checkpoints", "released", RELEASED_PARTS)
    assert fake_hub.requests == []


def test_nothing_is_asked_of_the_network_before_acceptance_or_where_gated_models_are_off(fake_hub, monkeypatch):
    assert NVIDIA_RESEARCH.name in refusal(RELEASED_MODEL) and NVIDIA_RESEARCH.name in refusal("NVIDIA/lyra-2.0")
    licences.accept(NVIDIA_RESEARCH, "test")
    assert "not on this machine" in refusal(RELEASED_MODEL, download=False)
    monkeypatch.setenv("LYRA_NO_GATED_MODELS", "1")
    assert "switched off" in refusal(RELEASED_MODEL)
    assert fake_hub.requests == []


def test_only_files_that_are_read_are_downloaded_and_only_once(accepted):
    assert downloaded(RELEASED_MODEL) is None
    source = find_model(RELEASED_MODEL)
    assert (source.name, source.layout, source.shipped, source.revision) == (RELEASED_MODEL, "released", False, COMMIT)
    tokenizer = [name for name in TOKENIZER_REPOSITORY if name.endswith(".json")]
    assert sorted(accepted.files_sent()) == sorted([*READ, *tokenizer])
    for name, content in READ.items():
        assert (source.folder.parent / name).read_bytes() == content
    asked = len(accepted.requests)
    assert find_model(RELEASED_MODEL) == source
    assert downloaded(RELEASED_MODEL) == hub.model_folder(RELEASED_MODEL) == source.folder
    assert (hub.tokenizer_folder(source.folder) / "tokenizer.json").is_file()
    assert len(accepted.requests) == asked


def test_an_exact_commit_can_be_asked_for(accepted):
    assert find_model(f"{RELEASED_MODEL}@{COMMIT}").revision == COMMIT
    assert f"/api/models/{RELEASED_MODEL}/revision/{COMMIT}" in [path for _, path, _ in accepted.requests]
    assert downloaded(f"{RELEASED_MODEL}@{COMMIT}") and not downloaded(f"{RELEASED_MODEL}@{'0' * 40}")


def test_a_copy_of_the_released_model_is_gated_before_its_weights_are_downloaded(fake_hub):
    fake_hub.repositories["someone/copy"] = {name.removeprefix("checkpoints/"): data for name, data in READ.items()}
    fake_hub.repositories["someone/else"] = {"model.safetensors": b"weights", "config.json": b"{}"}
    assert "neither a lyra.json nor NVIDIA's released files" in refusal("someone/else")
    assert NVIDIA_RESEARCH.name in refusal("someone/copy")
    assert fake_hub.files_sent() == []
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_model("someone/copy")
    assert source.layout == "released" and (source.folder / "vae" / "vae.pth").is_file()


def test_a_converted_repository_sends_only_its_settings_before_acceptance(fake_hub):
    fake_hub.repositories["someone/converted"] = {
        "lyra.json": lyra_json(NVIDIA_RESEARCH.name),
        "transformer/diffusion_pytorch_model.safetensors": b"weights",
        "samples/video.mp4": b"video",
    }
    assert NVIDIA_RESEARCH.name in refusal("someone/converted")
    assert fake_hub.files_sent() == ["lyra.json"]
    assert downloaded("someone/converted") is None
    licences.accept(NVIDIA_RESEARCH, "test")
    source = find_model("someone/converted")
    assert source.layout == "lyra" and source.revision == COMMIT
    assert fake_hub.files_sent().count("lyra.json") == 1 and "samples/video.mp4" not in fake_hub.files_sent()
    assert (source.folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"
    assert downloaded("someone/converted") == source.folder


def test_a_broken_connection_goes_on_where_it_broke(accepted, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # What is received is kept in whole chunks.
    shard = "checkpoints/model/model/__0_0.distcp"
    accepted.cut[shard] = 1
    source = find_model(RELEASED_MODEL)
    assert (source.folder.parent / shard).read_bytes() == READ[shard]
    kept = len(READ[shard]) // 2 // 2**16 * 2**16
    assert [part for path, part in accepted.sent() if path == shard] == [None, f"bytes={kept}-"]


def test_a_failed_download_is_a_sentence_and_the_next_call_fetches_only_the_rest(accepted):
    shard = "checkpoints/model/model/__1_0.distcp"
    accepted.broken.add(shard)
    assert "status 500" in refusal(RELEASED_MODEL)
    assert downloaded(RELEASED_MODEL) is None
    finished = set(accepted.files_sent()) - {shard}
    assert "checkpoints/model/model/__0_0.distcp" in finished
    accepted.broken.clear()
    accepted.requests.clear()
    source = find_model(RELEASED_MODEL)
    assert set(accepted.files_sent()) == set(READ) - finished
    assert (source.folder.parent / shard).read_bytes() == READ[shard]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_download_reports_its_files_and_can_be_stopped_between_them(accepted):
    stages: list[str] = []
    stop = Progress(
        listener=lambda status: stages.append(status.stage),
        should_stop=lambda: "checkpoints/model/model/__0_0.distcp" in accepted.files_sent(),
    )
    with pytest.raises(Cancelled):
        find_model(RELEASED_MODEL, progress=stop)
    assert f"downloading {RELEASED_MODEL} (MB)" in stages
    assert "checkpoints/recon/model.pt" not in accepted.files_sent() and downloaded(RELEASED_MODEL) is None
    find_model(RELEASED_MODEL)
    assert set(Counter(accepted.files_sent()).values()) == {1}


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "accept its terms at https://huggingface.co/nvidia/Lyra-2.0"),
        (403, {"X-Error-Code": "GatedRepo"}, "sign in with `hf auth login` or HF_TOKEN"),
        (401, {}, "sign in again"),
        (403, {}, "check the rights of your token"),
        (404, {"X-Error-Code": "RepoNotFound"}, "check the name"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "leave the version out"),
        (500, {}, "try the same again later"),
    ],
)
def test_a_refusal_of_the_server_is_one_sentence_with_a_way_out(accepted, status, headers, expected):
    accepted.refuse = (status, headers)
    text = refusal(RELEASED_MODEL)
    assert RELEASED_MODEL in text and expected in text


def test_no_network_and_offline_mode_are_sentences(accepted, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "check the network" in refusal(RELEASED_MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(RELEASED_MODEL)
    assert accepted.requests == []


def test_a_disk_that_is_too_small_is_told_before_any_weights_are_sent(accepted, monkeypatch):
    needed = sum(map(len, READ.values()))
    monkeypatch.setattr(hub_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    text = refusal(RELEASED_MODEL)
    assert "GB" in text and constants.HF_HUB_CACHE in text and "HF_HOME" in text
    assert set(accepted.files_sent()).isdisjoint(READ)
    monkeypatch.setattr(hub_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert find_model(RELEASED_MODEL).revision == COMMIT


def test_a_cache_that_cannot_be_written_or_fills_up_is_one_sentence(accepted, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be written (Not a directory); set HF_HOME" in refusal(RELEASED_MODEL)

    def fill(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(hub_files, "snapshot_download", fill)
    assert "is full" in refusal(RELEASED_MODEL)


def test_fetching_asks_for_the_licence_first_and_for_matching_files_only(fake_hub, tmp_path):
    write(tmp_path, {"tokenizer/tokenizer.json": b"{}"})
    assert hub.tokenizer_folder(tmp_path) == tmp_path / "tokenizer"
    fake_hub.repositories["depth/large"] = {"model.safetensors": b"weights", "config.json": b"{}", "demo.mp4": b"v"}
    with pytest.raises(UserError, match=CC_BY_NC_4.name):
        hub_files.fetch("depth/large", ["*.safetensors"], licences=[CC_BY_NC_4])
    assert fake_hub.requests == []
    licences.accept(CC_BY_NC_4, "test")
    folder = hub_files.fetch("depth/large", ["*.safetensors"], licences=[CC_BY_NC_4])
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match="none of the files"):
        hub_files.fetch("depth/large", ["*.pth"], licences=[])


def hash_of(folder: Path) -> str:
    weights_hash.cache_clear()
    return weights_hash(folder)


def test_the_hash_follows_names_and_bytes_of_weights_only(tmp_path):
    folder = write(tmp_path, {"lyra.json": b"{}", "a/model.safetensors": b"weights", "b/model.pth": b"more"})
    first = hash_of(folder)
    assert hash_of(write(folder, {"README.md": b"card", ".cache/huggingface/trees/x.json": b"{}"})) == first
    second = hash_of(write(folder, {"a/model.safetensors": b"weighty"}))
    (folder / "b" / "model.pth").rename(folder / "b" / "model.pt")
    assert len({first, second, hash_of(folder)}) == 3


def test_large_files_are_hashed_by_size_and_both_ends(tmp_path):
    size, shard = 70 * 2**20, write(tmp_path, READ) / "checkpoints/model/model/__0_0.distcp"

    def hashed(length: int, at: int) -> str:
        with shard.open("wb") as file:
            file.truncate(length)
            file.seek(at)
            file.write(b"x")
        return hash_of(tmp_path)

    assert hashed(size, size // 2) == hashed(size, size // 2 + 5)
    assert len({hashed(size, size // 2), hashed(size, 0), hashed(size, size - 1), hashed(size + 1, size // 2)}) == 4


def test_a_released_model_has_one_hash_however_it_came_here(tmp_path):
    whole = write(tmp_path / "whole", READ | UNREAD)
    assert hash_of(write(tmp_path / "partial", READ)) == hash_of(whole) == hash_of(whole / "checkpoints")
    assert hash_of(write(whole, {"checkpoints/recon/model.pt": b"other"})) != hash_of(tmp_path / "partial")
