"""What does a whole chunk cost, by stage, and what with less memory? The cases `dmd`, `full` and `offload`.

The product's own loop runs with all networks at their released sizes and random weights. Only two things are not the
product's: captions are random embeddings, because the text encoder works once a caption, and the depth network's
answer is thrown away for that of a plane, because a random one would leave the memory nothing to retrieve.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import CLIPVisionModel

from benchmarks.gpu import Limit, Memory
from benchmarks.gpu_cases import Way, compiler, measure_passes, random_inputs, random_transformer
from benchmarks.gpu_measure import Bench, OutOfTime, relative_error, timing
from lyra.config import RELEASED_SETTINGS, GenerateJob
from lyra.depth.depth_anything import DepthAnythingDepth
from lyra.generation.state import WalkState
from lyra.generation.walkthrough import Components, FinishedChunk, Walk, WalkDepth, generate_chunk, start
from lyra.models.clip_vision import CLIPImageEncoder, clip_vision_config
from lyra.models.depth_anything.config import (
    NESTED_GIANT_LARGE,
    BackboneConfig,
    DepthAnythingConfig,
    NestedDepthAnythingConfig,
)
from lyra.models.depth_anything.model import build
from lyra.models.streaming import StreamingWanAutoencoder
from lyra.models.transformer import Lyra2Transformer3DModel
from lyra.offload import OnDemand, place_transformer
from lyra.placement import Placement
from lyra.progress import Cancelled, Progress
from lyra.types import Cameras

TINY_AUTOENCODER = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TINY_IMAGE_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_DEPTH = NestedDepthAnythingConfig(
    DepthAnythingConfig(BackboneConfig(32, 5, 2, (1, 2, 3, 4), 1, "swiglu"), 16, (8, 8, 16, 16)),
    DepthAnythingConfig(BackboneConfig(32, 4, 2, (0, 1, 2, 3), None), 16, (8, 8, 16, 16)),
)
FRAMES = 161
"""The photo and two chunks."""
PLANE = 4.0
"""Distance of the scene, a plane, from the first camera."""
STEP_X, STEP_Z = 0.005, 0.01
"""How far the camera goes to the right and forwards in a frame."""
FULL_STEPS = 35
FEW_STEPS = 4
TARGETS = {"dmd": 16.0, "full": 240.0}
"""Seconds that a chunk of 480x832 should take on one H200, all networks included and every result exact."""
CAPS = (24, 16)
"""Memory of smaller GPUs, in GB of 1e9 bytes: less than the GiB that they have, because the driver keeps some."""
REPEATED_CHUNKS = 2
"""Times that a compiled chunk is measured, where there is time: it takes thousands of kernels and varies little."""
JOB = GenerateJob(photo="", sampler="dmd")


@dataclass(frozen=True)
class PlaneDepth:
    """Runs a depth network and then tells the depth of the plane."""

    network: WalkDepth

    def measure(self, images: Tensor, cameras: Cameras, seen_depth: Tensor) -> Tensor:
        """Depth of every pixel of frames whose cameras look along z."""
        self.network.measure(images, cameras, seen_depth)
        return plane_depth(cameras, images)


def plane_depth(cameras: Cameras, images: Tensor) -> Tensor:
    """Distance of the plane from each camera, as maps of the images' size."""
    depth = PLANE + cameras.w2c[:, 2, 3]
    return depth[:, None, None].expand(-1, *images.shape[-2:]).contiguous()


@dataclass
class TimedProgress(Progress):
    """Waits for the device at the end of every stage and step, so that their times are their own."""

    bench: Bench | None = None
    stop_after: int | None = None
    """End the chunk by `Cancelled` after so many denoising steps."""
    step_seconds: list[float] = field(default_factory=list)
    _last: float = 0.0

    def finish(self) -> None:
        """End the running stage."""
        assert self.bench is not None
        self.bench.synchronise()
        super().finish()

    def step(self, step: int, steps: int, picture: Path | None = None) -> None:
        """Take the time of a denoising step.

        Raises:
            Cancelled: enough steps are measured, or the budget is used.
        """
        assert self.bench is not None
        self.bench.synchronise()
        spent, self._last = time.perf_counter() - self._last, time.perf_counter()
        if self.stage == "Denoise" and step:
            self.step_seconds.append(spent)
            if len(self.step_seconds) == self.stop_after:
                raise Cancelled("enough steps are measured")
        super().step(step, steps, picture)


@dataclass(frozen=True)
class TimedChunk:
    """What one chunk took."""

    finished: FinishedChunk | None
    """None where only some steps were wanted."""
    seconds: float
    stages: Mapping[str, float]
    steps: list[float]
    memory: Memory


def run_chunk(
    bench: Bench,
    parts: Components,
    walk: Walk,
    state: WalkState,
    job: GenerateJob = JOB,
    stop_after: int | None = None,
) -> TimedChunk:
    """Generate the next chunk; the state stays as it is.

    Raises:
        OutOfTime: the case's budget was used before the chunk was done.
    """
    bench.check_time()
    progress = TimedProgress(bench=bench, stop_after=stop_after, should_stop=lambda: bench.late)
    finished = None
    bench.free()
    bench.reset_peak()
    started = time.perf_counter()
    try:
        finished = generate_chunk(parts, walk, state, job, "", 0, progress)
    except Cancelled as error:
        if len(progress.step_seconds) != stop_after:
            raise OutOfTime(f"stopped in the stage '{progress.stage}' of a chunk") from error
    bench.synchronise()
    seconds = time.perf_counter() - started
    return TimedChunk(finished, seconds, progress.stage_seconds, progress.step_seconds, bench.memory)


def random_world(bench: Bench, transformer: Lyra2Transformer3DModel, placement: Placement) -> tuple[Components, Walk]:
    """The loop's parts with random weights, where the placement wants them, and a walk towards a plane."""
    device, tiny, config = bench.device, bench.request.tiny, transformer.config
    resident = placement.offload == "none"
    release = place_transformer(transformer, placement)
    bench.free()
    with torch.device(device):
        autoencoder = AutoencoderKLWan(**(TINY_AUTOENCODER if tiny else {}))
        clip = CLIPVisionModel(clip_vision_config(**(TINY_IMAGE_ENCODER if tiny else {})))
        sizes = TINY_DEPTH if tiny else NESTED_GIANT_LARGE
        depth = build(sizes)
    for network in (autoencoder, clip):
        network.to(bench.dtype).eval().requires_grad_(False)
    network = DepthAnythingDepth(depth, sizes, device, bench.dtype)
    texts = [bench.random(1, config.text_len, config.text_dim) for _ in range(2)]
    parts = Components(
        settings=replace(RELEASED_SETTINGS, few_step_lora=False),
        transformer=transformer,
        layout=transformer.layout,
        autoencoder=StreamingWanAutoencoder(autoencoder),
        encode_text=lambda prompts: texts[0],
        negative_text=texts[1],
        encode_image=OnDemand(clip, device, resident=resident).leaving_call(CLIPImageEncoder(clip)),
        depth=PlaneDepth(OnDemand(depth, device, resident=resident).leaving(network, "measure")),
        blend=None,
        use_sampler=lambda name, loras: None,
        release=release,
        attention=placement.attention,
    )
    return parts, walk_to_plane(bench)


def walk_to_plane(bench: Bench) -> Walk:
    """A camera that goes straight on, and a photo of noise."""
    height, width = bench.request.height, bench.request.width
    along = torch.arange(FRAMES, dtype=torch.float32)
    w2c = torch.eye(4).repeat(FRAMES, 1, 1)
    w2c[:, 0, 3], w2c[:, 2, 3] = -STEP_X * along, -STEP_Z * along
    focal = 0.8 * width
    intrinsics = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    cameras = Cameras(w2c, intrinsics.repeat(FRAMES, 1, 1), height, width).to(bench.device)
    photo = bench.random(3, height, width).float().tanh()
    return Walk(photo, plane_depth(cameras[0], photo[None])[0], cameras, (height, width))


def started(bench: Bench, parts: Components, walk: Walk) -> WalkState:
    """Measure what is done once before the first chunk; returns the state."""
    bench.reset_peak()
    begun = time.perf_counter()
    state = start(parts, walk)
    bench.synchronise()
    bench.write("start", timing([time.perf_counter() - begun], 0), note="the photo, repeated, primes both caches")
    return state


def chunk_limit(bench: Bench, steps: int, guided: bool) -> dict[str, Any]:
    """FLOPs of a chunk and the least time for them; of the other networks only where they have their released size."""
    cost, branches = bench.cost, 2 if guided else 1
    other = 0.0 if bench.request.tiny else cost.other.total - cost.other.text_encoder
    denoise, attention = cost.denoise_flops(steps, guided=guided), steps * branches * cost.flops.attention
    limit: Limit = bench.limit(denoise - attention + other, attention)
    return {"flops": denoise + other, "limit": limit}


def write_chunk(bench: Bench, name: str, chunks: list[TimedChunk], warm_ups: int, **values: Any) -> None:
    """Write the time of one chunk that was generated once or several times."""
    last = chunks[-1]
    bench.write(
        name,
        timing([chunk.seconds for chunk in chunks], warm_ups),
        memory=last.memory,
        stage_seconds=last.stages,
        step_seconds=last.steps,
        **chunk_limit(bench, FEW_STEPS, False),
        **values,
    )


def target(bench: Bench) -> float | None:
    """What the case's chunk should take, at the size for which that is said."""
    named = not bench.request.tiny and (bench.request.height, bench.request.width) == (480, 832)
    return TARGETS.get(bench.case) if named else None


def continued(state: WalkState, chunk: TimedChunk, device: torch.device) -> None:
    """Let the state take in a chunk."""
    assert chunk.finished is not None
    state.apply(chunk.finished.record.to(device))


def dmd(bench: Bench) -> None:
    """A first and a second chunk of four steps; the second eager, and compiled with the fastest attention kernel."""
    fastest = bench.measure_rates().fastest
    parts, walk = random_world(bench, random_transformer(bench), Placement("bf16", "none", device=str(bench.device)))
    state = started(bench, parts, walk)
    first = run_chunk(bench, parts, walk, state)
    note = "cold: the first chunk after loading, from the photo alone"
    write_chunk(bench, "first chunk/eager/native", [first], 0, backend="native", note=note)
    continued(state, first, bench.device)
    plain = run_chunk(bench, parts, walk, state)
    note = "as the program runs it"
    write_chunk(bench, "chunk/eager/native", [plain], 1, backend="native", target_seconds=target(bench), note=note)
    ways = [Way(fastest, compiled=True)]
    if bench.attempt(ways[0].name, other_way, bench, parts, walk, state, plain, ways[0]) is None:
        bench.attempt(fastest, other_way, bench, parts, walk, state, plain, Way(fastest))


def other_way(bench: Bench, parts: Components, walk: Walk, state: WalkState, plain: TimedChunk, way: Way) -> TimedChunk:
    """The same chunk in another way, compared with the plain one."""
    torch._dynamo.reset()
    if way.compiled:
        parts.transformer.compile_repeated_blocks(fullgraph=True, backend=compiler(bench))
    parts = replace(parts, attention=way.backend)
    with torch.compiler.set_stance("default" if way.compiled else "force_eager"):
        warm_up = run_chunk(bench, parts, walk, state)
        chunks = [run_chunk(bench, parts, walk, state)]
        while len(chunks) < REPEATED_CHUNKS and bench.ends - time.monotonic() > 1.5 * chunks[0].seconds:
            chunks.append(run_chunk(bench, parts, walk, state))
    assert plain.finished is not None and chunks[-1].finished is not None
    error = relative_error(chunks[-1].finished.record.latents, plain.finished.record.latents)
    write_chunk(
        bench,
        f"chunk/{way.name}",
        chunks,
        1,
        backend=way.backend,
        target_seconds=target(bench),
        compile_seconds=max(0.0, warm_up.seconds - chunks[0].seconds) if way.compiled else None,
        checks={"relative_error": error},
        note=f"compiled with {compiler(bench)}" if way.compiled else None,
    )
    return chunks[-1]


def full(bench: Bench) -> None:
    """Some of the 35 steps with guidance of a second chunk; the rest of it, and of the chunk, is extrapolated."""
    fastest = bench.measure_rates().fastest
    parts, walk = random_world(bench, random_transformer(bench), Placement("bf16", "none", device=str(bench.device)))
    state = started(bench, parts, walk)
    few = run_chunk(bench, parts, walk, state)
    continued(state, few, bench.device)
    if bench.attempt(Way(fastest, compiled=True).name, some_steps, bench, parts, walk, state, few, fastest, True):
        return
    bench.attempt(Way("native").name, some_steps, bench, parts, walk, state, few, "native", False)


def some_steps(
    bench: Bench, parts: Components, walk: Walk, state: WalkState, few: TimedChunk, backend: str, compiled: bool
) -> bool:
    """Measure steps with guidance and write what all would take; returns true."""
    job = replace(JOB, sampler="full", steps=FULL_STEPS)
    parts = replace(parts, attention=backend)
    torch._dynamo.reset()
    if compiled:
        parts.transformer.compile_repeated_blocks(fullgraph=True, backend=compiler(bench))
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        # The second step is the first one that computes nothing for the rest of the chunk.
        warm_up = run_chunk(bench, parts, walk, state, job, 2)
        measured = run_chunk(bench, parts, walk, state, job, bench.request.steps)
    later = statistics.median(measured.steps[1:])
    stages = dict(measured.stages) | {k: v for k, v in few.stages.items() if k not in measured.stages}
    stages["Denoise"] = sum(measured.steps) + (FULL_STEPS - len(measured.steps)) * later
    bench.write(
        f"chunk/{Way(backend, compiled).name}",
        timing([sum(stages.values())], 1),
        backend=backend,
        memory=measured.memory,
        **chunk_limit(bench, FULL_STEPS, True),
        target_seconds=target(bench),
        compile_seconds=max(0.0, sum(warm_up.steps) - sum(measured.steps[:2])) if compiled else None,
        stage_seconds=stages,
        step_seconds=measured.steps,
        note=f"EXTRAPOLATED from {len(measured.steps)} of {FULL_STEPS} steps with guidance; stages after denoising "
        "are those of a first chunk of four steps",
    )
    return True


def offload(bench: Bench) -> None:
    """Passes with all weights on the device and with streamed blocks under a memory cap, and a chunk under each cap."""
    fastest = bench.measure_rates().fastest
    model = random_transformer(bench)
    inputs = random_inputs(bench, model)
    way = Way(fastest)
    plain = measure_passes(bench, model, inputs, way, None, "resident ")
    parts, walk = random_world(bench, model, Placement("bf16", "group", device=str(bench.device)))
    parts = replace(parts, attention=fastest)
    for cap in CAPS:
        cap_memory(bench, cap)
        name = f"streamed, {cap} GB, "
        bench.attempt(name + way.name, measure_passes, bench, model, inputs, way, plain, name, cap_note(bench, cap))
    del inputs
    for cap in CAPS:
        cap_memory(bench, cap)
        name = f"streamed, {cap} GB, chunk/{way.name}"
        bench.attempt(name, capped_chunk, bench, parts, walk, name, cap_note(bench, cap))


def cap_note(bench: Bench, gigabytes: float) -> str:
    """Which cap was in force."""
    return f"at most {gigabytes} GB of GPU memory" if bench.on_gpu else f"rehearsal: no cap of {gigabytes} GB"


def cap_memory(bench: Bench, gigabytes: float) -> None:
    """Let this process take no more of the GPU's memory."""
    bench.free()
    if bench.on_gpu:
        share = gigabytes * 1e9 / bench.machine["gpu_bytes"]
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), bench.device)


def capped_chunk(bench: Bench, parts: Components, walk: Walk, name: str, note: str) -> None:
    """A first chunk, everything included, under the cap in force."""
    chunk = run_chunk(bench, parts, walk, start(parts, walk))
    write_chunk(bench, name, [chunk], 0, backend=parts.attention, note=note)
