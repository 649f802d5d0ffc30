"""One process of the context parallelism tests: `torchrun parallel_worker.py two OUT.json`.

The first process computes everything alone, then with its workers, and writes the largest differences.
`parallel_worker.py fork OUT.json` starts processes itself, which saves the imports, and loses some of them.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import recipe
import torch
from safetensors.torch import load_file
from torch import Tensor

from lyra.diffusion.sampling import initial_noise, sample_dmd, sample_full
from lyra.models.context_parallel import (
    ContextParallelGroup,
    ParallelTransformer,
    call_everywhere,
    context_parallel,
    serve,
)
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel
from tests.conftest import GOLDEN
from tests.models.tiny_released import golden_transformer

SERVED = "served until it was told to stop"


def inputs_of(height: int, width: int, seed: int = 1) -> dict[str, Tensor]:
    """Golden inputs under the transformer's own names."""
    given = recipe.transformer_inputs(height, width, seed)
    names = {"x": "hidden_states", "cond": "conditioning", "plucker": "rays", "buffer": "correspondence"}
    given = {names.get(name, name): tensor for name, tensor in given.items()}
    return given | {"image": given.pop("clip"), "timestep": given["timestep"][0].float()}


def sample(model, given: dict[str, Tensor], sampler: str, cache: ChunkCache) -> Tensor:
    """Latents of a chunk, sampled as the loop does it."""
    texts = (given["text"], torch.randn(given["text"].shape, generator=torch.Generator().manual_seed(9)))
    history = given["hidden_states"][:, :, :25]

    def velocity(text: Tensor) -> Callable[[Tensor, float], Tensor]:
        def of(noisy: Tensor, timestep: float) -> Tensor:
            states = torch.cat([history, noisy], dim=2)
            changed = {"hidden_states": states, "text": text, "timestep": torch.tensor([timestep])}
            return model(**given | changed, cache=cache)

        return of

    noise = initial_noise(3, tuple(given["hidden_states"][:, :, 25:].shape))
    settings = {"flow_shift": 5.0, "callback_on_step_end": lambda step, steps: None}
    if sampler == "dmd":
        generator = torch.Generator().manual_seed(4)
        return sample_dmd(velocity(texts[0]), noise, history_slots=25, generator=generator, **settings)
    guided = {"num_inference_steps": 3, "guidance_scale": 5.0}
    return sample_full(velocity(texts[0]), velocity(texts[1]), noise, **guided, **settings)


@torch.no_grad()
def results(model, *, more: bool) -> dict[str, Tensor]:
    """Everything that has to be the same alone and shared: without cache, then three chunks, the last an old one."""
    given, other = inputs_of(8, 12), inputs_of(12, 20, seed=5)
    first, second = ChunkCache(), ChunkCache()
    found = {"forward": model(**given), "unipc": sample(model, given, "unipc", first)}
    if more:
        half = {name: tensor.bfloat16() for name, tensor in given.items()}
        found["inputs in bfloat16"] = model(**half)
    found["dmd of the next chunk, odd size"] = sample(model, other, "dmd", second)
    return found | {"first cache again": model(**given, cache=first)}


def scale_output(model: Lyra2Transformer3DModel, factor: float) -> float:
    """A change of weights, as fusing a LoRA is one; returns the first bias's new value."""
    model.proj_out.weight.mul_(factor)
    model.proj_out.bias.mul_(factor)
    model.blocks[0].attn1.to_v.weight.mul_(factor)
    return float(model.proj_out.bias[0])


def fail(model: Lyra2Transformer3DModel, ranks: tuple[int, ...]) -> None:
    """Fail in some processes, as a missing file makes it."""
    if model.token_group.rank in ranks:
        raise FileNotFoundError("no such LoRA")


def die(model: Lyra2Transformer3DModel, rank: int) -> None:
    """End one process as the out-of-memory killer does."""
    if model.token_group.rank == rank:
        os._exit(9)


def error_of(function: Callable[[], object]) -> str:
    """Type and text of what a function raises; empty if it does not."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def calls(model, parallel: ParallelTransformer) -> dict[str, object]:
    """Calls in all processes: results, changed weights, failures, functions that cannot travel."""
    given, bias = inputs_of(8, 12), float(model.proj_out.bias[0])
    found: dict[str, object] = {"returned": call_everywhere(parallel, scale_output, 2.0) / bias}
    parallel.call_everywhere("set_attention_backend", "native")
    found["failed everywhere"] = error_of(lambda: parallel.call_everywhere(fail, (0, 1)))
    found["lambda"] = error_of(lambda: parallel.call_everywhere(lambda model: None))
    found["wrong device"] = error_of(lambda: parallel(**given | {"text": given["text"].to("meta")}))
    shared, alone = parallel(**given), golden_model()
    found["change"] = float((alone(**given) - shared).abs().max())
    scale_output(alone, 2.0)
    found["changed alike"] = float((alone(**given) - shared).abs().max())
    found["config"], found["slots"] = parallel.config.num_heads, parallel.layout.slots
    found["device"], found["dtype"] = str(parallel.device), str(parallel.dtype)
    found["parameters"] = sum(p.numel() for p in parallel.parameters()) - sum(p.numel() for p in model.parameters())
    return found


def golden_model() -> Lyra2Transformer3DModel:
    """The tiny transformer with the golden weights."""
    keys = json.loads((GOLDEN / "checkpoint_keys.json").read_text())
    shapes = {name: tuple(shape) for name, (shape, _) in keys.items() if not name.startswith("accum_")}
    return golden_transformer(shapes).requires_grad_(False)


def compare(model: Lyra2Transformer3DModel, group: ContextParallelGroup, scenario: str, out: Path) -> None:
    """Alone and shared, in the first of two or three processes; the two end with an error."""
    alone = results(model, more=scenario == "two")
    transformer = ParallelTransformer(model, group)
    tokens: set[int] = set()
    hook = model.blocks[1].register_forward_hook(lambda block, args, output: tokens.add(output.shape[1]))
    shared = results(transformer, more=scenario == "two")
    hook.remove()
    golden = load_file(GOLDEN / "transformer_8x12.safetensors")["out"]
    found = {
        "differences": {name: float((shared[name] - alone[name]).abs().max()) for name in alone},
        "sizes": [float(tensor.abs().max()) for tensor in alone.values()],
        "golden": float((shared["forward"] - golden).abs().max()),
        "own tokens": sorted(tokens),
        "calls": calls(model, transformer) if scenario == "two" else None,
    }
    out.write_text(json.dumps(found))
    if scenario == "two":
        raise ValueError("the photo is too dark")


def lose(model: Lyra2Transformer3DModel, group: ContextParallelGroup, scenario: str, out: Path) -> None:
    """What goes wrong between two processes, without torchrun."""
    transformer, given = ParallelTransformer(model, group), inputs_of(8, 12)

    def stumble(*_: object) -> None:
        raise MemoryError("no room for block 1")

    if scenario == "first dies":
        die(model, 0)
    if scenario == "worker dies":
        errors = [error_of(lambda: transformer.call_everywhere(die, 1))]
    if scenario == "failed in one":
        errors = [error_of(lambda: transformer.call_everywhere(fail, (1,)))]
    if scenario == "pass fails":
        model.blocks[1].register_forward_hook(stumble)
        errors = [error_of(lambda: transformer(**given))]
    out.write_text(json.dumps([*errors, error_of(lambda: transformer(**given))]))


def main(scenario: str, out: Path) -> None:
    """Lead or serve as one of the processes that torchrun started."""
    try:
        with context_parallel("cpu") as group:
            model = golden_model()
            if group.is_worker:
                serve(model, group)
                out.with_suffix(f".rank{group.tokens.rank}").write_text(SERVED)
            else:
                (compare if scenario in ("two", "three") else lose)(model, group, scenario, out)
    except ValueError as error:
        out.with_suffix(".error").write_text(str(error))


def fork_processes(out: Path) -> None:
    """Three processes, and every way to lose one of two; exit codes go to a file, None for one that hangs."""
    fork = multiprocessing.get_context("fork")
    codes = {}
    for scenario in ("three", "first dies", "worker dies", "failed in one", "pass fails"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        size = 3 if scenario == "three" else 2
        ranks = [
            fork.Process(target=as_rank, args=(rank, size, port, scenario, out.with_name(scenario)))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(90)
        codes[scenario] = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
    out.write_text(json.dumps(codes))


def as_rank(rank: int, size: int, port: int, scenario: str, out: Path) -> None:
    """One of several processes, with the environment that torchrun makes."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    main(scenario, out)


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        fork_processes(Path(sys.argv[2]))
    else:
        main(sys.argv[1], Path(sys.argv[2]))
