"""What do the model's products, its attention and its passes cost? The cases `ceilings`, `forward` and `fp8`.

Started by `benchmarks/gpu.py`, one case a process. Packages are imported where they are needed, so that a missing one
fails only the cases that use it. Whole chunks are `benchmarks/gpu_chunks.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import CASE_FAILED, NO_GPU, Memory, Timing, parse
from benchmarks.gpu_measure import KERNELS, PEAKED, REPEATS, SEED, Bench, attend, relative_error, timing

if TYPE_CHECKING:
    from lyra.models.transformer import Lyra2Transformer3DModel

SQUARE = 8192
"""Side of the matrices with which the device's best speed is measured."""
COPIED_BYTES = 2 * 2**30
CHECKED_ROWS = 64
"""Rows of a large result that are compared with the same computed in float32."""
FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of that format."""


def ceilings(bench: Bench) -> None:
    """The device's speed in what the model is made of."""
    c, n = bench.cost.config, bench.cost.tokens.total
    side = 256 if bench.request.tiny else SQUARE
    for rows, inner, width in ((side, side, side), (n, c.dim, c.dim), (n, c.dim, c.ffn_dim), (n, c.ffn_dim, c.dim)):
        shape = f"{rows}x{inner}x{width}"
        bench.attempt(f"product/{shape}", product, bench, rows, inner, width)
        # float8 products want multiples of 16.
        rows = math.ceil(rows / 16) * 16
        for scaled in ("tensor", "row"):
            bench.attempt(f"float8 product by {scaled}/{shape}", float8_product, bench, rows, inner, width, scaled)
    for name in KERNELS[bench.device.type]:
        bench.attempt(f"attention/{name}", attention, bench, name)
    bench.attempt("copy/device", copy, bench, False)
    bench.attempt("copy/from host", copy, bench, True)


def product(bench: Bench, rows: int, inner: int, width: int) -> None:
    """One product with a weight matrix in the model's number format."""
    x, weight = bench.matrices(rows, inner, width)
    seconds = bench.time(lambda: F.linear(x, weight))
    write_product(bench, "product", seconds, x, weight, F.linear(x, weight), str(bench.dtype))


def float8_product(bench: Bench, rows: int, inner: int, width: int, scaled: str) -> None:
    """The same in float8, with one scale for each matrix or for each of its rows; quantising is not timed."""
    x, weight = bench.matrices(rows, inner, width)
    small, x_scale = to_float8(x, scaled)
    small_weight, weight_scale = to_float8(weight, scaled)

    def run() -> Tensor:
        scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
        return torch._scaled_mm(small, small_weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    write_product(bench, f"float8 product by {scaled}", bench.time(run), x, weight, run(), str(FLOAT8))


def write_product(
    bench: Bench, name: str, seconds: Timing, x: Tensor, weight: Tensor, found: Tensor, dtype: str
) -> None:
    """Write a product's time, and how far some of its rows are from those in float32."""
    (rows, inner), width = x.shape, len(weight)
    exact = F.linear(x[:CHECKED_ROWS].float(), weight.float())
    bench.write(
        f"{name}/{rows}x{inner}x{width}",
        seconds,
        shapes={"rows": rows, "inner": inner, "width": width, "dtype": dtype},
        flops=2 * rows * inner * width,
        checks={"relative_error": relative_error(found[:CHECKED_ROWS], exact)},
    )


def to_float8(x: Tensor, scaled: str) -> tuple[Tensor, Tensor]:
    """A matrix in float8 with its scale, or with one a row."""
    size = x.abs().amax(dim=1, keepdim=True) if scaled == "row" else x.abs().amax()
    scale = size.float() / LARGEST
    return (x / scale).to(FLOAT8), scale


def attention(bench: Bench, name: str) -> None:
    """The model's self-attention with one kernel."""
    c, n = bench.cost.config, bench.cost.tokens.total
    q, k, v = bench.heads()
    kernel = KERNELS[bench.device.type][name]
    seconds, memory = bench.time(lambda: attend(q, k, v, kernel)), bench.memory
    weights = (q[:, :, :CHECKED_ROWS].float() @ k.float().mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    error = relative_error(attend(q, k, v, kernel)[:, :, :CHECKED_ROWS], weights @ v.float())
    bench.write(
        f"attention/{name}",
        seconds,
        shapes={"heads": c.num_heads, "tokens": n, "width": q.shape[-1], "dtype": str(bench.dtype)},
        backend=name,
        memory=memory,
        flops=4 * n * n * c.dim,
        checks={"relative_error": error},
    )


def copy(bench: Bench, from_host: bool) -> None:
    """Moving bytes inside the device (read and written ones count) or to it from pinned memory."""
    count = 2**20 if bench.request.tiny else COPIED_BYTES
    there, here = (
        torch.randint(0, 256, (count,), dtype=torch.uint8, device=bench.device, generator=bench.generator)
        for _ in range(2)
    )
    if from_host and bench.on_gpu:
        here = here.cpu().pin_memory()
    seconds = bench.time(lambda: there.copy_(here, non_blocking=True))
    name = "copy/from host" if from_host else "copy/device"
    bench.write(name, seconds, shapes={"bytes": count}, bytes=count * (1 if from_host else 2))


@torch.no_grad()
def random_transformer(bench: Bench) -> Lyra2Transformer3DModel:
    """The transformer with random weights, made where it runs and in the number format in which it runs.

    Matrices have a standard deviation of 1 / sqrt(inputs); in float32 the whole would be 68 GB.
    """
    from lyra.models.transformer import Lyra2Transformer3DModel

    with torch.device("meta"):
        model = Lyra2Transformer3DModel(**bench.sizes)
    model.to(bench.dtype).to_empty(device=bench.device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()), generator=bench.generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.02, generator=bench.generator)
        else:
            parameter.fill_(PEAKED if name.endswith(("norm_q.weight", "norm_k.weight")) else 1.0)
    return model.eval().requires_grad_(False)


def random_inputs(bench: Bench, model: Lyra2Transformer3DModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a chunk's first pass and of a later one, which differ in noise and time."""
    c, layout = model.config, model.layout
    cells = (layout.slots, *bench.cost.latent_size)

    def latents(channels: int, count: int = layout.slots) -> Tensor:
        return bench.random(1, channels, count, *cells[1:]).float()

    first = {
        "hidden_states": latents(16),
        "mask": torch.ones(1, 4, *cells, device=bench.device),
        "conditioning": latents(16),
        "rays": latents(c.camera_channels),
        "correspondence": latents(c.correspondence_channels).tanh(),
        "text": bench.random(1, c.text_len, c.text_dim),
        "image": bench.random(1, 257, c.image_dim),
        "timestep": torch.tensor([999.0], device=bench.device),
    }
    later = first["hidden_states"].clone()
    later[:, :, layout.targets.start :] = latents(16, layout.targets.count)
    return first, first | {"hidden_states": later, "timestep": torch.tensor([731.0], device=bench.device)}


@dataclass(frozen=True)
class Way:
    """One way to run the transformer."""

    backend: str
    compiled: bool = False
    whole_graph: bool = True

    @property
    def name(self) -> str:
        """For people."""
        how = "compiled" if self.whole_graph else "compiled in parts"
        return f"{how if self.compiled else 'eager'}/{self.backend}"


def compiler(bench: Bench) -> str:
    """torch's compiler; on the CPU, where generating code takes minutes, only its front half."""
    return "inductor" if bench.on_gpu else "aot_eager"


def way_of(bench: Bench, model: Lyra2Transformer3DModel, way: Way) -> Any:
    """A context in which the transformer runs in this way."""
    if not way.compiled:
        return torch.compiler.set_stance("force_eager")
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=way.whole_graph, backend=compiler(bench))
    return nullcontext()


def measure_passes(
    bench: Bench,
    model: Lyra2Transformer3DModel,
    inputs: Sequence[dict[str, Tensor]],
    way: Way,
    plain: Sequence[Tensor] | None,
    name: str = "",
    note: str | None = None,
) -> list[Tensor]:
    """Measure first and later passes and compare them with the plain ones; returns their outputs."""
    from diffusers.models.attention_dispatch import attention_backend

    from lyra.models.transformer import ChunkCache

    flops, names = bench.cost.flops, ("first pass", "later pass")
    counted = (flops.total, flops.per_forward)
    seconds: tuple[list[float], list[float]] = ([], [])
    memory: list[Memory] = [bench.memory, bench.memory]
    bench.free()
    with attention_backend(way.backend), way_of(bench, model, way):
        started, cache = time.perf_counter(), ChunkCache()
        outputs = [model(**part, cache=cache) for part in inputs]
        bench.synchronise()
        warm_up = time.perf_counter() - started
        for number in range(REPEATS):
            if number and bench.late:
                break
            cache = ChunkCache()
            for index, part in enumerate(inputs):
                bench.reset_peak()
                seconds[index].append(bench.seconds(lambda part=part: model(**part, cache=cache)))  # noqa: B023
                memory[index] = bench.memory
    medians = [timing(found).median for found in seconds]
    for index, which in enumerate(names):
        bench.write(
            f"{name}{which}/{way.name}",
            timing(seconds[index]),
            backend=way.backend,
            memory=memory[index],
            flops=counted[index],
            limit=bench.limit(counted[index] - flops.attention, flops.attention),
            compile_seconds=max(0.0, warm_up - sum(medians)) if way.compiled else None,
            checks={} if plain is None else {"relative_error": relative_error(outputs[index], plain[index])},
            note=f"{note or ''} compiled with {compiler(bench)}".strip() if way.compiled else note,
        )
    return outputs


def forward(bench: Bench) -> None:
    """Passes of the transformer in every way that works."""
    bench.measure_rates()
    model = random_transformer(bench)
    inputs = random_inputs(bench, model)
    plain = bench.attempt("plain", measure_passes, bench, model, inputs, Way("native"), None)
    if plain is not None:
        bench.attempt("yardsticks", yardsticks, bench, model, inputs, plain)
    other_ways(bench, model, inputs, plain)


def other_ways(
    bench: Bench, model: Lyra2Transformer3DModel, inputs: Sequence[dict[str, Tensor]], plain: Sequence[Tensor] | None
) -> None:
    """Compiled, and with each attention kernel, the fastest first."""
    kernels = sorted(bench.rates.attention, key=lambda name: -bench.rates.attention[name])
    way = Way(kernels[0], compiled=True)
    if bench.attempt(way.name, measure_passes, bench, model, inputs, way, plain) is None:
        way = Way(kernels[0], compiled=True, whole_graph=False)
        bench.attempt(way.name, measure_passes, bench, model, inputs, way, plain)
    for name in kernels:
        bench.attempt(Way(name).name, measure_passes, bench, model, inputs, Way(name), plain)


def yardsticks(
    bench: Bench, model: Lyra2Transformer3DModel, inputs: Sequence[dict[str, Tensor]], plain: Sequence[Tensor]
) -> None:
    """How far the output moves when nothing of a chunk is reused, and when an input is another.

    A fast path whose error is not far below the latter may have lost that input.
    """
    from lyra.models.transformer import ChunkCache

    def output(**others: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return model(**(inputs[1] | others), cache=ChunkCache())

    checks = {"without_cache": relative_error(output(), plain[1])}
    for name in ("correspondence", "rays", "text"):
        checks[f"other_{name}"] = relative_error(output(**{name: inputs[1][name].flip(-1)}), plain[1])
    bench.write("yardsticks", checks=checks)


def fp8(bench: Bench) -> None:
    """Passes with weights stored in float8 and cast up layer by layer, against those with the weights as they were."""
    from lyra.offload import place_transformer
    from lyra.placement import Placement

    bench.measure_rates()
    model = random_transformer(bench)
    inputs = random_inputs(bench, model)
    plain = bench.attempt("plain", measure_passes, bench, model, inputs, Way("native"), None, "unrounded ")
    place_transformer(model, Placement("fp8", "none", device=str(bench.device)))
    bench.free()
    # Not compiled: casting replaces parameters in the middle of a pass, which torch.compile refuses.
    note = "weights of the blocks in float8, products in the number format of the activations"
    for way in (Way(bench.rates.fastest), Way("native")):
        bench.attempt(way.name, measure_passes, bench, model, inputs, way, plain, "", note)


def measurement(name: str) -> Callable[[Bench], None]:
    """The function of a case."""
    here: dict[str, Callable[[Bench], None]] = {"ceilings": ceilings, "forward": forward, "fp8": fp8}
    if name in here:
        return here[name]
    from benchmarks import gpu_chunks

    return getattr(gpu_chunks, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one case; returns an exit code."""
    request, _ = parse(arguments)
    if request.device == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    torch.manual_seed(SEED)  # Of the networks that torch initialises.
    bench = Bench(request)
    try:
        with torch.no_grad():
            measurement(bench.case)(bench)
    except Exception as error:
        bench.fail("end", error)
        return CASE_FAILED
    return 0
