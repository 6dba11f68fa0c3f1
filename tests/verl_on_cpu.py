"""verl on a machine without a GPU, by its own registries: a platform that is the CPU, and its FSDP engine on it. Imported before verl's
engines are, which ask for the platform once."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase


class NoDevice:
    """In the place of torch.cuda."""

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def max_memory_allocated() -> int:
        return 0

    @staticmethod
    def get_device_name() -> str:
        return "CPU"

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 0, 0

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated


class CPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = NoDevice

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def _nothing(self, *_: object) -> None:
        """There is no device to set, seed, empty or wait for."""

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


platform_manager.set_platform(CPU())

from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402

EngineRegistry.register("language_model", "fsdp2", device="cpu")(FSDPEngineWithLMHead)
