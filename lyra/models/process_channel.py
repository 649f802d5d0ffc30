"""What does the first of several processes tell the others about the transformer, and how does it reach them?

Messages travel over a gloo group, in a network that you trust: whoever reaches its ports can talk to the processes.
Knows no forward pass; `lyra.models.context_parallel` leads and serves them.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from lyra.models.transformer import Lyra2Transformer3DModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardPass:
    """The workers take part in a forward pass; the tensors that they lack follow in this order."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and type by name."""
    new_chunk: bool
    text: int
    """Which of the chunk's texts is used, counted in the order in which they came."""


@dataclass(frozen=True)
class FunctionCall:
    """The workers call a module-level function with their model, or a method of it by name."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, model: Lyra2Transformer3DModel) -> Any:
        """The call's result."""
        if isinstance(self.function, str):
            return getattr(model, self.function)(*self.args, **self.kwargs)
        return self.function(model, *self.args, **self.kwargs)


@dataclass(frozen=True)
class Stop:
    """The workers are no longer needed."""


class Channel:
    """What the first process tells its workers; messages are pickled, because both ends are the same program.

    Methods that talk raise ConnectionError when another process has ended.

    Args:
        group: a gloo group of all processes, for the messages.
        device: where the tensors of a forward pass are sent from and received.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.state: Literal["open", "stopped", "lost"] = "open"
        self._lock = threading.RLock()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Keeps other threads out. After an error nobody knows where the workers stand, so the channel is lost.

        Raises:
            RuntimeError: the channel is not open any more.
        """
        with self._lock:
            if self.state == "stopped":
                raise RuntimeError("The worker processes have been stopped.")
            if self.state == "lost":
                raise RuntimeError("An error has cut off the worker processes; start the program again.")
            try:
                yield
            except BaseException:
                self.state = "lost"
                raise

    def send(self, message: bytes) -> None:
        """Send a pickled message from the first process to all workers."""
        with self._peers():
            dist.broadcast(torch.tensor([len(message)]), 0, group=self.group)
            dist.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0, group=self.group)

    def receive(self) -> ForwardPass | FunctionCall | Stop:
        """The next message of the first process."""
        with self._peers():
            length = torch.empty(1, dtype=torch.int64)
            dist.broadcast(length, 0, group=self.group)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self.group)
        return pickle.loads(data.numpy().tobytes())

    def reports(self, own: str) -> list[str]:
        """What each process says about a call, in every process; empty where it went well."""
        everyone: list[Any] = [""] * dist.get_world_size(self.group)
        with self._peers():
            dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError("Another process of this run has ended; start the program again.") from error

    def stop(self) -> None:
        """Let the workers go, from the first process; does nothing where they have gone already."""
        with self._lock:
            if self.state != "open":
                return
            try:
                with self.exchange():
                    self.send(pickle.dumps(Stop()))
                    self.state = "stopped"
            except ConnectionError:
                logger.warning("A worker process had ended before it was stopped.")
