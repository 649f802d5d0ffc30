"""The training loop that all trainers share: a wall-clock budget, warm-up and cosine, EMA, metrics, exact resume.

A trainer gives a loss function of the step; this file knows nothing about what is trained. State is written as
safetensors and JSON (no pickle), so a killed run goes on from its last save.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train."""

    minutes: float
    """Wall-clock budget of the whole run; time before a resume counts."""
    learning_rate: float = 6e-4
    final_learning_rate: float = 2e-5
    warmup_steps: int = 100
    weight_decay: float = 0.02
    ema_decay: float = 0.998
    gradient_clip: float = 1.0
    save_minutes: float = 4.0
    """Time between two saves of the state and the averaged weights."""


class TrainingLoop:
    """Runs `loss_of_step` until the budget is spent and keeps an average of the weights."""

    def __init__(self, model: nn.Module, folder: Path, settings: LoopSettings) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        self.step, self.spent_seconds = 0, 0.0
        self._resume()

    def run(self, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]], on_save: Callable[[], None]) -> None:
        """Train; `on_save` is called with the averaged weights in the model after every save."""
        budget = self.settings.minutes * 60
        last = last_save = time.perf_counter()
        sums: dict[str, float] = {}
        counted = 0
        while self.spent_seconds < budget:
            self._set_learning_rate(self.spent_seconds / budget)
            loss, metrics = loss_of_step(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
            if torch.isfinite(norm):
                self.optimizer.step()
                self._update_average()
            for key, value in {**metrics, "loss": loss.item()}.items():
                sums[key] = sums.get(key, 0.0) + value
            self.step, counted = self.step + 1, counted + 1
            now = time.perf_counter()
            self.spent_seconds, last = self.spent_seconds + now - last, now
            if now - last_save > self.settings.save_minutes * 60 or self.spent_seconds >= budget:
                self._log({key: value / counted for key, value in sums.items()})
                sums, counted, last_save = {}, 0, now
                self.save()
                with self.averaged_weights():
                    on_save()

    def averaged_weights(self) -> AveragedWeights:
        """A context in which the model holds the averaged weights."""
        return AveragedWeights(self.parameters, self.ema)

    def save(self) -> None:
        """Write weights, averages, moments, step and time, replacing the last save at once."""
        tensors = {f"model.{k}": v.detach().contiguous() for k, v in self.parameters.items()}
        tensors |= {f"ema.{k}": v.contiguous() for k, v in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"{key}.{name}"] = self.optimizer.state[parameter][key].contiguous()
        temporary = self.folder / "state.tmp"
        metadata = {"step": str(self.step), "spent_seconds": str(self.spent_seconds)}
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(self.folder / "state.safetensors")
        (self.folder / "state.json").write_text(json.dumps(metadata), encoding="utf-8")

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        tensors = load_file(path)
        metadata = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.spent_seconds = int(metadata["step"]), float(metadata["spent_seconds"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                if f"exp_avg.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": tensors[f"exp_avg.{name}"],
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                    }
        logger.info("resumed %s at step %d after %.0f s", self.folder, self.step, self.spent_seconds)

    def _set_learning_rate(self, progress: float) -> None:
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        rate = warm * (s.final_learning_rate + (s.learning_rate - s.final_learning_rate) * cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average follows the weights closely, so that short runs do not keep their initial values.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def _log(self, metrics: dict[str, float]) -> None:
        entry = {"step": self.step, "minutes": round(self.spent_seconds / 60, 2)}
        entry |= {key: round(value, 5) for key, value in metrics.items()}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        logger.info("%s", entry)


class AveragedWeights:
    """Swaps the averaged weights in on entry and the trained ones back on exit."""

    def __init__(self, parameters: dict[str, nn.Parameter], averaged: dict[str, Tensor]) -> None:
        self.parameters, self.averaged = parameters, averaged
        self.trained: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for name, parameter in self.parameters.items():
            self.trained[name] = parameter.detach().clone()
            parameter.data.copy_(self.averaged[name])

    def __exit__(self, *error: object) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.trained[name])
