"""Several processes on the CPU give the single process's results, and none of them waits for a lost one."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import recipe
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyra.errors import UserError
from lyra.models.blocks import BlockCache, TextCache
from lyra.models.context_parallel import (
    ContextParallelGroup,
    ParallelTransformer,
    call_everywhere,
    context_parallel,
    join_process_group,
    serve,
)
from lyra.models.token_group import ALONE, TokenGroup
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel
from tests.conftest import GOLDEN, ROOT
from tests.models.parallel_worker import SERVED

WORKER = ROOT / "tests" / "models" / "parallel_worker.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node")


def run_processes(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run python with all its child processes, which end with it at the latest."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(GOLDEN)])
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stderr=errors)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "found.json"
    result = run_processes(*TORCHRUN, "2", str(WORKER), "two", str(out))
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("forked") / "codes.json"
    result = run_processes(str(WORKER), "fork", str(out))
    assert result.returncode == 0, result.stderr
    return out


def assert_same(found: dict, own_tokens: list[int]) -> None:
    assert max(found["differences"].values()) < 1e-5, found["differences"]
    assert found["golden"] < 1e-5
    assert min(found["sizes"]) > 1
    assert found["own tokens"] == own_tokens


def test_two_processes_give_the_result_of_one(two):
    found = json.loads(two.read_text())
    assert len(found["differences"]) == 5
    # Shares of 590 and of 1479 tokens.
    assert_same(found, [295, 739])


def test_an_error_in_the_first_process_lets_the_worker_end_cleanly(two):
    assert two.with_suffix(".error").read_text() == "the photo is too dark"
    assert two.with_suffix(".rank1").read_text() == SERVED


def test_calls_reach_all_processes_and_their_errors_come_back(two):
    calls = json.loads(two.read_text())["calls"]
    assert calls["returned"] == 2
    assert calls["change"] > 1
    assert calls["changed alike"] < 1e-5
    assert calls["failed everywhere"] == "FileNotFoundError: no such LoRA"
    assert "pickle" in calls["lambda"]
    assert calls["wrong device"] == "ValueError: text is on meta, not on cpu"


def test_the_leader_has_the_attributes_of_its_model(two):
    calls = json.loads(two.read_text())["calls"]
    expected = {"config": 2, "device": "cpu", "dtype": "torch.float32", "slots": 45, "parameters": 0}
    assert {name: calls[name] for name in expected} == expected


def test_three_processes_share_two_heads(forked):
    found = json.loads(forked.with_name("three").read_text())
    assert len(found["differences"]) == 4
    assert_same(found, [196, 493])


def test_no_process_waits_for_a_lost_one(forked):
    codes = json.loads(forked.read_text())
    assert codes.pop("three") == [0, 0, 0]
    assert codes == {"first dies": [9, 1], "worker dies": [0, 9], "failed in one": [0, 0], "pass fails": [0, 1]}


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        ("worker dies", "ConnectionError: Another process", "RuntimeError: An error has cut off"),
        ("failed in one", "RuntimeError: Some processes could not", "RuntimeError: The worker processes have"),
        ("pass fails", "MemoryError: no room for block 1", "RuntimeError: An error has cut off"),
    ],
)
def test_nothing_is_computed_with_lost_workers(forked, scenario, first, second):
    errors = json.loads(forked.with_name(scenario).read_text())
    assert errors[0].startswith(first)
    assert errors[1].startswith(second)


@given(tokens=st.integers(0, 100_000), size=st.integers(1, 64))
def test_shares_cover_all_tokens_once_and_differ_by_one_at_most(tokens, size):
    shares = [TokenGroup(rank, size).sharing(tokens).share for rank in range(size)]
    assert shares[0].start == 0
    assert shares[-1].stop == tokens
    assert all(a.stop == b.start for a, b in pairwise(shares))
    lengths = {share.stop - share.start for share in shares}
    assert max(lengths) - min(lengths) <= 1


@given(tokens=st.integers(1, 300), size=st.integers(1, 40), data=st.data())
def test_own_indices_are_the_indices_in_the_share(tokens, size, data):
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1)))), dtype=torch.int64)
    found = []
    for rank in range(size):
        group = TokenGroup(rank, size).sharing(tokens)
        own, part = group.own_index(index)
        assert len(own) == 0 or (own.min() >= 0 and own.max() < group.share.stop - group.share.start)
        assert torch.equal(index[part], own + group.share.start)
        found.append(own + group.share.start)
    assert torch.equal(torch.cat(found), index)


@pytest.mark.parametrize(
    ("height", "width", "tokens", "with_correspondence"), [(60, 104, 38246, 34320), (56, 96, 32928, 29568)]
)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_shares_at_the_released_sizes(height, width, tokens, with_correspondence, size):
    model = Lyra2Transformer3DModel(**recipe.TINY, correspondence_channels=1, camera_channels=1)
    angles = model.rotary_angles(height, width, torch.device("cpu"))
    _, index = model.correspondence_tokens(torch.zeros(1, 1, 45, height, width))
    assert (len(angles), len(index)) == (tokens, with_correspondence)
    groups = [TokenGroup(rank, size).sharing(tokens) for rank in range(size)]
    lengths = [group.share.stop - group.share.start for group in groups]
    assert set(lengths) <= {tokens // size, tokens // size + 1}
    assert sum(lengths) == tokens
    own = [group.own_index(index)[0] for group in groups]
    assert torch.cat([part + group.share.start for part, group in zip(own, groups, strict=True)]).equal(index)
    # The first share holds history without correspondence, the last one only targets, which all have it.
    assert len(own[-1]) == lengths[-1]
    assert 0 < len(own[0]) < lengths[0]


def test_a_share_may_hold_no_token_with_correspondence():
    model = Lyra2Transformer3DModel(**recipe.TINY).eval()
    given = recipe.transformer_inputs(8, 12)
    cache = ChunkCache()
    anchor = TokenGroup(rank=0, size=25).sharing(590)
    with torch.no_grad():
        encoded = model.fill(cache, given["plucker"], given["buffer"], anchor)
        assert (encoded.shape[1], len(cache.index)) == (0, 0)
        x = torch.randn(1, 23, 48, generator=torch.Generator().manual_seed(0))
        context = torch.zeros(1, 1, 48)
        features = (torch.zeros(1, 6, 48), cache.camera, encoded, cache.index, context, context)
        angles = model.rotary_angles(8, 12, torch.device("cpu"))[anchor.share]
        block, block_cache = model.blocks[0], BlockCache()
        first = block(x, *features, angles, block_cache, TextCache(), ALONE)
        assert block_cache.correspondence.shape[1] == 0
        features = (features[0], features[1], None, *features[3:])
        assert torch.equal(block(x, *features, angles, block_cache, TextCache(), ALONE), first)


def test_one_process_stays_alone(monkeypatch):
    assert join_process_group("cpu") == ContextParallelGroup()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with context_parallel() as group:
        assert group.tokens == ALONE
        assert not group.is_worker
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="torchrun"):
        ParallelTransformer(model, group)
    with pytest.raises(ValueError, match="torchrun"):
        serve(model, group)
    assert call_everywhere(model, torch.nn.Module.train, False) is model
    assert not model.training
    call_everywhere(model, "requires_grad_", requires_grad=False)
    assert not model.weight.requires_grad


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "'cuda:1' cannot be used; choose cpu or cuda"),
        ("cuda", 1, "started 2 processes, but torch finds 1 CUDA devices; use --nproc-per-node 1"),
        ("cuda", 0, "finds 0 CUDA devices; use --device cpu"),
    ],
)
def test_a_device_that_a_process_cannot_have_is_the_users_error(monkeypatch, device, gpus, message):
    names = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        join_process_group(device)
