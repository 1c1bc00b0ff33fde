"""An NVIDIA GPU: opening it, memory, code, and weights on their way to it.

All of it through the driver, by cuda.bindings; whatever is missing or fails is a DeviceError that
says what was found and what helps.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from llmc.errors import DeviceError

STAGING_BYTES = 8 << 20  # of each of the pinned buffers that weights pass through
READERS = 4  # threads that fill them: one copies out of the page cache at 2 to 4 GB/s
OVERLAPPING_DRIVER = 12030  # CUDA 12.3, the first that captures overlapping kernels in graphs
OLDEST_DRIVER = 12000  # CUDA 12.0, the first that reads the PTX we write
# CUDA version of a driver -> the newest PTX it reads; later drivers read at least as much.
_PTX = {12000: "8.0", 12010: "8.1", 12020: "8.2", 12030: "8.3", 12040: "8.4", 12050: "8.5",
        12080: "8.7", 12090: "8.8", 13000: "9.0", 13010: "9.1"}


@cache
def _driver() -> Any:
    """cuda.bindings.driver with the driver initialised; DeviceError if that cannot be."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceError(_without_bindings()) from None
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:
        raise DeviceError("no NVIDIA driver on this machine (libcuda.so.1 was not found): install "
                          "the driver, version 525 or newer, or compile and run for --target "
                          "host") from None
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise DeviceError("the NVIDIA driver finds no GPU on this machine: check nvidia-smi and "
                          "CUDA_VISIBLE_DEVICES, or compile and run for --target host")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the NVIDIA driver does not start: {_describe(driver, status)}")
    return driver


def _without_bindings() -> str:
    """What to say where the bindings are missing, and of the driver if it is missing too."""
    install = "pip install '.[cuda]' in llmc's checkout"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ("no NVIDIA driver on this machine (libcuda.so.1 was not found), nor the CUDA "
                "bindings for Python: install the driver, version 525 or newer, and the bindings "
                f"with {install}, or compile and run for --target host")
    return (f"the CUDA bindings for Python are missing: install them with {install}, or compile "
            "and run for --target host")


def call(name: str, *arguments: Any) -> Any:
    """A driver function by its name; its result, or DeviceError with the driver's own words.
    A few of them are a decode step, so this spends no more than it must."""
    found = _function(name)(*arguments)
    if found[0] != 0:
        raise DeviceError(f"the GPU driver fails in {name}: {_describe(_driver(), found[0])}")
    return found[1] if len(found) == 2 else found[1:]


@cache
def _function(name: str) -> Any:
    return getattr(_driver(), name)


def prepared(name: str, *handles: Any) -> Callable[[], None]:
    """A driver function that takes handles, addresses and sizes only, with these: a call that a
    decode step makes costs a third of what it does through `call`."""
    function, arguments = _native(name, len(handles)), [ctypes.c_void_p(int(h)) for h in handles]
    bound = functools.partial(function, *arguments)

    def run() -> None:
        if status := bound():
            raise DeviceError(f"the GPU driver fails in {name}: {_describe(_driver(), status)}")

    return run


@cache
def _native(name: str, count: int) -> Any:
    """The driver's own function, of `count` arguments of 64 bits."""
    address, _ = call("cuGetProcAddress", name.encode(), OLDEST_DRIVER, 0)
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * count)(address)


def _describe(driver: Any, status: Any) -> str:
    status = driver.CUresult(status)
    _, text = driver.cuGetErrorString(status)
    return f"{status.name.removeprefix('CUDA_ERROR_').lower()}: {(text or b'').decode()}"


def device_count() -> int:
    """GPUs that the driver shows; DeviceError if there is no driver or no GPU."""
    _driver()
    return call("cuDeviceGetCount")


class Device:
    """One GPU, its primary context and a stream of our own.

    capability: (major, minor); driver: CUDA version that it supports, such as 13000; memory: bytes.
    """

    def __init__(self, ordinal: int = 0):
        driver = _driver()
        count = call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise DeviceError(f"there is no GPU {ordinal}: the driver shows {count}")
        self.driver = call("cuDriverGetVersion")
        if self.driver < OLDEST_DRIVER:
            raise DeviceError(f"the NVIDIA driver supports CUDA {_version(self.driver)}, "
                              f"{_version(OLDEST_DRIVER)} or newer is needed: update the driver")
        self.ordinal = ordinal
        self._handle = call("cuDeviceGet", ordinal)
        self.name = call("cuDeviceGetName", 128, self._handle).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        self.capability = tuple(
            call("cuDeviceGetAttribute", each, self._handle) for each in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        self.multiprocessors = call("cuDeviceGetAttribute",
                                    attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                                    self._handle)
        self.memory = call("cuDeviceTotalMem", self._handle)
        # `use` makes the context current in this thread.
        self.use = prepared("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", self._handle))
        self.use()
        self.stream = call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    @property
    def architecture(self) -> str:
        """What code for this GPU is compiled for: sm_90a on Hopper, for its own instructions."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")

    @property
    def cuda(self) -> str:
        """The CUDA version that the driver supports."""
        return _version(self.driver)

    @property
    def ptx(self) -> str:
        """The newest PTX version that the driver is known to read."""
        return _PTX[max(version for version in _PTX if version <= self.driver)]

    def free_memory(self) -> int:
        """Bytes."""
        return call("cuMemGetInfo")[0]

    def wait(self) -> None:
        """Until everything on the stream is done; an error of a kernel shows here."""
        call("cuStreamSynchronize", self.stream)

    def __str__(self) -> str:
        return (f"{self.name}, {self.architecture}, {self.memory / 2**30:.0f} GiB, driver for CUDA "
                f"{_version(self.driver)}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def event(timed: bool = False) -> Any:
    """A new event; only timed ones tell the time between them."""
    flags = _driver().CUevent_flags
    return call("cuEventCreate",
                flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING)


def record_event(device: Device) -> Any:
    """A new timed event at the end of what the stream has to do."""
    made = event(timed=True)
    call("cuEventRecord", made, device.stream)
    return made


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds of the GPU from one timed event to another; both must have passed."""
    return call("cuEventElapsedTime", begin, end) / 1e3


class Memory:
    """Device memory; freed with the object. DeviceError says what was asked for."""

    def __init__(self, device: Device, size: int, purpose: str):
        self.size = max(size, 256)
        self.address = 0
        free = device.free_memory()
        if self.size > free:
            raise DeviceError(f"GPU {device.ordinal} ({device.name}) has {free / 2**20:.0f} MiB "
                              f"free, the {purpose} take {self.size / 2**20:.0f} MiB: a smaller "
                              "max_context, max_batch or kv_memory needs less")
        self.address = int(call("cuMemAlloc", self.size))

    def clear(self, device: Device, byte: int = 0) -> None:
        call("cuMemsetD8Async", self.address, byte, self.size, device.stream)

    def close(self) -> None:
        """Free it; nothing on the device may use it any more."""
        if self.address:
            call("cuMemFree", self.address)
            self.address = 0


class PinnedMemory:
    """Host memory that the GPU copies from and to directly. array: its bytes."""

    def __init__(self, size: int):
        self.size = max(size, 256)
        self.address = int(call("cuMemHostAlloc", self.size, 0))
        self.array = np.ctypeslib.as_array(
            (ctypes.c_uint8 * self.size).from_address(self.address))

    def close(self) -> None:
        """Free it; `array` must not be used afterwards."""
        if self.address:
            call("cuMemFreeHost", self.address)
            self.address = 0


class Upload:
    """Bytes on their way to the device, from the moment this is made until `wait` returns.

    Several threads read pieces into pinned buffers, two each, from which they are copied: reading,
    copying and what the caller does meanwhile overlap. read(start, target) fills an array with the
    bytes from `start` on; any thread calls it.
    """

    def __init__(self, device: Device, size: int, read: Callable[[int, np.ndarray], None],
                 address: int):
        self._device, self._size, self._read, self._address = device, size, read, address
        self._count = max(1, min(READERS, -(-size // STAGING_BYTES)))
        self._pool = ThreadPoolExecutor(self._count)
        self._readers = [self._pool.submit(self._run, number) for number in range(self._count)]

    def wait(self) -> None:
        """Until all of it is on the device; raises what stopped a reader."""
        self._pool.shutdown()
        for reader in self._readers:
            reader.result()

    def _run(self, number: int) -> None:
        """Every piece whose number is this one, modulo the number of readers."""
        device = self._device
        device.use()
        starts = range(number * STAGING_BYTES, self._size, self._count * STAGING_BYTES)
        buffers = [PinnedMemory(min(STAGING_BYTES, self._size)) for _ in starts[:2]]
        events = [event() for _ in buffers]
        try:
            for turn, start in enumerate(starts):
                buffer, copied = buffers[turn % 2], events[turn % 2]
                call("cuEventSynchronize", copied)
                part = buffer.array[:min(STAGING_BYTES, self._size - start)]
                self._read(start, part)
                call("cuMemcpyHtoDAsync", self._address + start, buffer.address, part.size,
                     device.stream)
                call("cuEventRecord", copied, device.stream)
        finally:
            device.wait()
            for each in events:
                call("cuEventDestroy", each)
            for buffer in buffers:
                buffer.close()


def upload(device: Device, source: np.ndarray, address: int) -> None:
    """Copy bytes to the device and wait until they are there."""
    def read(start: int, target: np.ndarray) -> None:
        target[:] = source[start:start + target.size]

    Upload(device, source.size, read, address).wait()


class Module:
    """Loaded code: a cubin, or PTX that the driver assembles now."""

    def __init__(self, code: bytes, name: str):
        self.name = name
        self._handle = call("cuModuleLoadData", code + b"\0")

    def function(self, name: str, shared_bytes: int) -> Any:
        """A kernel that may be launched with that much dynamic shared memory."""
        function = call("cuModuleGetFunction", self._handle, name.encode())
        if shared_bytes > 48 << 10:
            attribute = _driver().CUfunction_attribute
            call("cuFuncSetAttribute", function,
                 attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        return function

    def close(self) -> None:
        if self._handle is not None:
            call("cuModuleUnload", self._handle)
            self._handle = None


def launch(device: Device, function: Any, blocks: int, threads: int, shared_bytes: int,
           arguments: int, layer: int, overlaps: bool = False) -> None:
    """Put a stage's kernel on the stream. arguments: device address of the step's arguments.

    overlaps: it may start before the kernel ahead of it ends, which it waits for by itself.
    """
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = max(1, blocks), 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = device.stream
    if overlaps and device.driver >= OVERLAPPING_DRIVER:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (driver.CUlaunchAttributeID
                        .CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    values = ((arguments, layer), (ctypes.c_void_p, ctypes.c_int64))
    call("cuLaunchKernelEx", config, function, values, 0)


class Graph:
    """What a function puts on the stream, captured; `launch` puts all of it there at once."""

    def __init__(self, device: Device, record: Any):
        driver = _driver()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", device.stream, mode)
        try:
            record()
        finally:
            graph = call("cuStreamEndCapture", device.stream)
        self._executable = call("cuGraphInstantiate", graph, 0)
        call("cuGraphDestroy", graph)
        self.launch = prepared("cuGraphLaunch", self._executable, device.stream)

    def close(self) -> None:
        """The device must be done with it."""
        if self._executable is not None:
            call("cuGraphExecDestroy", self._executable)
            self._executable = None


def choose_architecture(device: Device, available: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Of (architecture, "cubin" or "ptx"), what fits the GPU best; DeviceError if nothing does.

    Machine code runs on its own major version from its minor one on, PTX on every later GPU; what
    ends in "a" runs on that one alone.
    """
    def rank(item: tuple[str, str]) -> tuple[int, int, bool] | None:
        name, form = item
        number = int(name.removeprefix("sm_").rstrip("a"))
        own = (number // 10, number % 10)
        exact = own == device.capability
        if name.endswith("a"):
            fits = exact
        elif form == "cubin":
            fits = own[0] == device.capability[0] and own <= device.capability
        else:
            fits = own <= device.capability
        return (number, name.endswith("a"), form == "cubin") if fits else None

    ranked = [(key, item) for item in available if (key := rank(item)) is not None]
    if not ranked:
        names = ", ".join(sorted({name for name, _ in available}))
        raise DeviceError(f"this artifact was compiled for {names}, GPU {device.ordinal} "
                          f"({device.name}) is {device.architecture}: compile it again with "
                          f"--arch {device.architecture}")
    return max(ranked)[1]
