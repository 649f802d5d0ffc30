"""A pretended accelerator: tensors that say they are on another device and compute on the CPU.

An operation that mixes them with CPU tensors fails as it would on a GPU, so the placement of every tensor of the loop
can be tested on a machine without one. Numbers stay those of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
"""The device that is pretended; it need not be there."""

MIXING_ALLOWED = ("aten.copy_", "aten._to_copy", "aten.index.", "aten.index_put", "aten._index_put")
"""Operations that accept CPU tensors beside others on a real accelerator too: copies, and CPU tensors as indices."""


class DeviceTensor(torch.Tensor):
    """A tensor that claims to be on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE, requires_grad=False
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        return DeviceTensor(self.inner[unwrap(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) and value.ndim > 0:
            raise RuntimeError(f"a CPU tensor is written into a tensor on {DEVICE}")
        self.inner[unwrap(index)] = unwrap(value)

    # What follows asks for the device's driver in torch's binding, before anything is dispatched.
    def contiguous(self, **options: Any) -> Tensor:
        return DeviceTensor(self.inner.contiguous(**options))

    def __invert__(self) -> Tensor:
        return DeviceTensor(~self.inner)

    def __bool__(self) -> bool:
        return bool(self.inner)

    def __float__(self) -> float:
        return float(self.inner)

    def __int__(self) -> int:
        return int(self.inner)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.inner})"


class SimulatedDevice(TorchDispatchMode):
    """While active, asking for `DEVICE` makes a `DeviceTensor`."""

    def __enter__(self) -> SimulatedDevice:
        # torch would look for a driver before it hands the call on; both are what its own fake tensors do.
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        self._initialise = torch.cuda._lazy_init
        torch.cuda._lazy_init = lambda: None
        # Modules make new parameters when they move, because an old one cannot become a `DeviceTensor`.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.cuda._lazy_init = self._initialise
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner tensors and give the result the device that a real one would have."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    elsewhere = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim > 0]
    if on_device and elsewhere and not str(func).startswith(MIXING_ALLOWED):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and cpu")
    if on_device and str(func).startswith(MIXING_ALLOWED[2:]) and not isinstance(args[0], DeviceTensor):
        raise RuntimeError(f"{func}: a CPU tensor is indexed with tensors on {DEVICE}")
    if "_fused_sdp_choice" in str(func):
        return 0  # The plain computation, as the fused kernels are chosen by device.
    asked = kwargs.get("device")
    moves_here = asked is not None and torch.device(asked).type == DEVICE.type
    moves_away = asked is not None and not moves_here
    plain = unwrap((args, kwargs))
    if moves_here:
        plain[1]["device"] = torch.device("cpu")
    result = func(*plain[0], **plain[1])
    if str(func).startswith("aten.copy_"):
        return args[0]
    if moves_here or (on_device and not moves_away):
        aliases = {id(tensor.inner): tensor for tensor in on_device}
        return tree_map(lambda x: aliases[id(x)] if id(x) in aliases else wrap(x), result)
    return result


def unwrap(values: Any) -> Any:
    """The same values with inner tensors."""
    return tree_map(lambda x: x.inner if isinstance(x, DeviceTensor) else x, values)


def wrap(value: Any) -> Any:
    """A tensor on `DEVICE` with the numbers of a plain one; anything else as it is."""
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value
