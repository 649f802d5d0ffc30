"""More than one GPU: how does the first process lead the others through the transformer's forward passes?

The first process runs the whole pipeline as if it were alone. The others, its workers, only serve the transformer: each
has all weights, computes its share of the tokens (`lyra.models.token_group`) and keeps its own `ChunkCache`. Messages
travel over a gloo group that may stay silent for days, tensors over the group of the forward pass. Start with torchrun,
in a network that you trust: whoever reaches its ports can talk to the processes. Knows no pipeline, sampler or file.
"""

from __future__ import annotations

import logging
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from lyra.errors import UserError
from lyra.models.process_channel import Channel, ForwardPass, FunctionCall, Stop
from lyra.models.token_group import ALONE, TokenGroup
from lyra.models.transformer import ChunkCache, Lyra2Transformer3DModel

logger = logging.getLogger(__name__)

MESSAGE_TIMEOUT = timedelta(days=365)
"""How long a worker waits for the first process, which decodes or waits for a user in between."""
PASS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others inside a forward pass, where all are at work."""
CONDITIONS = ("mask", "conditioning", "rays", "correspondence", "image")
"""Inputs that stay the same over a chunk; of `hidden_states` the history does."""


@dataclass(frozen=True)
class ContextParallelGroup:
    """The processes that share the transformer's tokens, and the way to talk to them."""

    tokens: TokenGroup = ALONE
    channel: Channel | None = None
    """None where there is only one process."""

    @property
    def is_worker(self) -> bool:
        """Whether this process is to `serve`; the first process does all the rest."""
        return self.tokens.rank > 0

    def agree(self, choose: Callable[[], Any] | None) -> Any:
        """What the first process chooses, in every process; the others pass None and wait for it.

        Raises:
            Exception: whatever the first process's choice raised, there.
        """
        if self.channel is None:
            assert choose is not None
            return choose()
        chosen = [choose() if choose is not None and not self.is_worker else None]
        dist.broadcast_object_list(chosen, 0, group=self.channel.group)
        return chosen[0]

    def open_channel(self) -> Channel:
        """The channel of a group that has one.

        Raises:
            ValueError: there is only one process.
        """
        if self.channel is None:
            raise ValueError("Context parallelism needs more than one process; start the program with torchrun.")
        return self.channel


ONE_PROCESS = ContextParallelGroup()
"""A program that was not started by torchrun."""


def join_process_group(device: str | None = None) -> ContextParallelGroup:
    """Join the processes that torchrun started: NCCL and one GPU for each process, or gloo on the CPU.

    Makes the process's GPU torch's current one, so that `cuda` means it; returns once all processes are there. Without
    torchrun, or with one process, nothing happens.

    Args:
        device: cpu or cuda; by default cuda where there is one.

    Raises:
        UserError: there are more processes than GPUs, or a single GPU is named.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or int(os.environ["WORLD_SIZE"]) == 1:
        return ContextParallelGroup()
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"torchrun gives each process its own device, so '{name}' cannot be used; choose cpu or cuda.")
    place = torch.device("cpu")
    if name == "cuda":
        place = torch.device("cuda", own_gpu(int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=PASS_TIMEOUT, device_id=place)
    else:
        dist.init_process_group("gloo", timeout=PASS_TIMEOUT)
    messages = dist.new_group(backend="gloo", timeout=MESSAGE_TIMEOUT)
    return ContextParallelGroup(TokenGroup(dist.get_rank(), dist.get_world_size()), Channel(messages, place))


def own_gpu(local_rank: int) -> int:
    """The GPU of a process, which is the one of its number.

    Raises:
        UserError: there are too few GPUs.
    """
    gpus = torch.cuda.device_count()
    if local_rank < gpus:
        return local_rank
    wanted = os.environ["LOCAL_WORLD_SIZE"]
    advice = f"--nproc-per-node {gpus}" if gpus else "--device cpu"
    raise UserError(f"torchrun started {wanted} processes, but torch finds {gpus} CUDA devices; use {advice}.")


@contextmanager
def context_parallel(device: str | None = None) -> Iterator[ContextParallelGroup]:
    """`join_process_group`; at the end, with or without an error, the first process lets the workers go."""
    group = join_process_group(device)
    if group.channel is None:
        yield group
        return
    try:
        yield group
    finally:
        if not group.is_worker:
            group.channel.stop()
        # Only where all processes come here together: NCCL waits for each other's end.
        if group.channel.state == "stopped":
            dist.destroy_process_group()


class ParallelTransformer:
    """A `Lyra2Transformer3DModel` in the first process whose workers compute a share of the tokens.

    Called like the model and has its attributes. What changes the model (LoRA, attention backends, compiling) must go
    through `call_everywhere`, because attributes reach only this process. Not differentiable.
    """

    def __init__(self, model: Lyra2Transformer3DModel, group: ContextParallelGroup) -> None:
        self._channel = group.open_channel()
        if group.is_worker:
            raise ValueError("Only the first process leads; the others call serve().")
        model.token_group = group.tokens
        self.model = model
        self._cache: Callable[[], ChunkCache | None] = lambda: None
        self._texts: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # Not there yet: without this, looking for it would never end.
            raise AttributeError(name)
        return getattr(self.model, name)

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Float[Tensor, "b c t h w"],
        mask: Float[Tensor, "b 4 t h w"],
        conditioning: Float[Tensor, "b c t h w"],
        rays: Float[Tensor, "b r t h w"],
        correspondence: Float[Tensor, "b s t h w"],
        text: Float[Tensor, "b l e"],
        image: Float[Tensor, "b m f"],
        timestep: Float[Tensor, "b"],
        cache: ChunkCache | None = None,
    ) -> Float[Tensor, "b c g h w"]:
        """The model's forward pass. With a cache the conditions are sent once a chunk, without one in every call.

        Raises:
            ValueError: an input is on another device than this process's; nothing was sent.
            RuntimeError: the workers have been stopped, or lost after an error.
        """
        inputs = dict(zip(CONDITIONS, (mask, conditioning, rays, correspondence, image), strict=True))
        self._check_devices(hidden_states=hidden_states, text=text, timestep=timestep, **inputs)
        with self._channel.exchange():
            new_chunk = cache is None or cache.history is None or self._cache() is not cache
            if new_chunk:
                self._texts = []
            index = next((i for i, known in enumerate(self._texts) if known is text), len(self._texts))
            first = self.model.layout.targets.start
            tensors = {"targets": hidden_states[:, :, first:], "timestep": timestep}
            if new_chunk:
                tensors |= {"history": hidden_states[:, :, :first], **inputs}
            if index == len(self._texts):
                tensors["text"] = text
                self._texts.append(text)
            specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            self._channel.send(pickle.dumps(ForwardPass(specs, new_chunk, index)))
            for tensor in tensors.values():
                dist.broadcast(tensor.contiguous(), 0, group=self.model.token_group.process_group)
            result = self.model(hidden_states=hidden_states, text=text, timestep=timestep, cache=cache, **inputs)
            # Weak, so that a chunk's cache can be freed while the next one is prepared.
            self._cache = (lambda: None) if cache is None else weakref.ref(cache)
            return result

    def call_everywhere(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """Call `function(model, *args)`, or a method of the model by name, in all processes.

        Returns:
            What the call returns in this process.

        Raises:
            Exception: what the call raises here, if it raises in all processes; they stay usable.
            RuntimeError: it failed in some processes only; weights may differ now, so the workers are stopped.
        """
        call = FunctionCall(function, args, kwargs)
        message = pickle.dumps(call)
        with self._channel.exchange():
            self._cache = lambda: None
            self._channel.send(message)
            result, error = attempt(call, self.model)
            reports = self._channel.reports(describe(error))
        if any(reports) and not all(reports):
            self._channel.stop()
            raise RuntimeError(f"Some processes could not do a call, start the program again: {max(reports)}")
        if error is not None:
            raise error
        return result

    def _check_devices(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            if tensor.device != self._channel.device:
                raise ValueError(f"{name} is on {tensor.device}, not on {self._channel.device}")


def call_everywhere(transformer: Any, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """Call `function(model, *args)`, or a method of the model by name, in all processes that have the model.

    Works for a `ParallelTransformer` and for a model of a single process.

    Raises:
        Exception: as `ParallelTransformer.call_everywhere`.
    """
    if isinstance(transformer, ParallelTransformer):
        return transformer.call_everywhere(function, *args, **kwargs)
    return FunctionCall(function, args, kwargs).on(transformer)


@dataclass
class ServedChunk:
    """What a worker keeps of a chunk."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    texts: list[Tensor] = field(default_factory=list)
    cache: ChunkCache = field(default_factory=ChunkCache)


@torch.no_grad()
def serve(model: Lyra2Transformer3DModel, group: ContextParallelGroup) -> None:
    """A worker's life: take part in forward passes and calls until the first process says stop.

    The model has the first process's weights and is on this process's device.

    Raises:
        ConnectionError: the first process has ended without saying stop, or a third one has ended.
    """
    channel = group.open_channel()
    model.token_group = group.tokens
    chunk = ServedChunk()
    with channel.exchange():
        while not isinstance(message := channel.receive(), Stop):
            if isinstance(message, FunctionCall):
                chunk = ServedChunk()
                _, error = attempt(message, model)
                channel.reports(describe(error))
            else:
                chunk = ServedChunk() if message.new_chunk else chunk
                take_part(model, chunk, message, channel.device)
        channel.state = "stopped"


def take_part(model: Lyra2Transformer3DModel, chunk: ServedChunk, message: ForwardPass, device: torch.device) -> None:
    """Receive what is new and compute this process's share of a forward pass."""
    new: dict[str, Tensor] = {}
    for name, (shape, dtype) in message.tensors.items():
        new[name] = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(new[name], 0, group=model.token_group.process_group)
    if "text" in new:
        chunk.texts.append(new.pop("text"))
    targets, timestep = new.pop("targets"), new.pop("timestep")
    chunk.inputs |= new
    model(
        hidden_states=torch.cat([chunk.inputs["history"], targets], dim=2),
        text=chunk.texts[message.text],
        timestep=timestep,
        cache=chunk.cache,
        **{name: chunk.inputs[name] for name in CONDITIONS},
    )


def attempt(call: FunctionCall, model: Lyra2Transformer3DModel) -> tuple[Any, Exception | None]:
    """The result of a call and the exception that it raised, if any."""
    try:
        return call.on(model), None
    except Exception as error:
        return None, error


def describe(error: Exception | None) -> str:
    """What an error says; empty without one."""
    return "" if error is None else f"{type(error).__name__}: {error}"
