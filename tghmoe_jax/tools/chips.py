"""The data of each chip: for rooflines and MFU, and what XLA must know about a GPU to compile for it.

Peak bf16 FLOP/s, HBM bandwidth and half of the bidirectional interconnect bandwidth of a TPU chip are those of
https://cloud.google.com/tpu/docs/v5e, v5p and v6e; the usable HBM is what libtpu's compiler states. Those of a GPU are
its data sheet's: dense products that are summed in float32, NVLink or else PCIe in one direction, and as HBM what the
driver reports as total. The numbers of its architecture are in the CUDA programming guide.
"""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s, usable HBM in bytes, HBM and one-way interconnect bandwidth in bytes/s; jax's device_kind."""

    device_kind: str
    peak: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """... and of an NVIDIA GPU its compute capability, multiprocessors, their shared memory in KiB and threads, the L2
    cache in MiB and the clock in GHz."""

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    threads: int
    l2: int
    clock: float


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 400e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989e12, 79.11 * GIB, 3352e9, 450e9, (9, 0), 132, 228, 2048, 50, 1.98),
    "h200": Gpu("NVIDIA H200", 989e12, 139.8 * GIB, 4800e9, 450e9, (9, 0), 132, 228, 2048, 50, 1.98),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 79.25 * GIB, 2039e9, 300e9, (8, 0), 108, 164, 2048, 40, 1.41),
    "l4": Gpu("NVIDIA L4", 121e12, 22.0 * GIB, 300e9, 32e9, (8, 9), 58, 100, 1536, 48, 2.04),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165e12, 23.5 * GIB, 1008e9, 32e9, (8, 9), 128, 100, 1536, 72, 2.52),
}


def target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto of this GPU, as text."""
    major, minor = gpu.capability
    fields = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors, "fpus_per_core": 64 if gpu.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": (gpu.shared - 1) << 10,
        "shared_memory_per_core": gpu.shared << 10, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536, "l2_cache_size": gpu.l2 << 20, "clock_rate_ghz": gpu.clock,
        "memory_bandwidth": round(gpu.hbm_bandwidth), "device_memory_size": round(gpu.hbm), "device_address_bits": 64,
    }  # fmt: skip
    extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    capability = f"major: {major} minor: {minor} feature_extension: {extension}"
    told = " ".join(f"{key}: {value}" for key, value in fields.items())
    versions = 'runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0"'
    return (
        f'gpu_device_info {{ {told} cuda_compute_capability {{ {capability} }} name: "{gpu.device_kind}" '
        f'device_vendor: "NVIDIA Corporation" {versions} dnn_version: "9.10.0" }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.device_kind}"'
    )


def chip_of(device) -> Chip | None:
    """The chip of a jax device, or None where its peak is not known."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device.device_kind), None)
