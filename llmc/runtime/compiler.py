"""Compiles variants in the background: a queue, threads that wait, processes that compile.

A process that crashes or hangs is contained: its job fails with the reason, the next one gets a new
process. Results come from the cache where another process made them before; processes that start
together on an empty cache compile each variant about once.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import select
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmc.errors import CompileError, LlmcError
from llmc.processes import python
from llmc.runtime.cache import StoredVariant, VariantCache, variant_info
from llmc.runtime.sources import text_key
from llmc.runtime.targets import short_target

TIMEOUT = 600.0  # seconds that one variant may take; at the lowest priority, that is not much
IDLE = 30.0  # seconds after which a worker without work is let go
QUEUE = 16  # jobs that may wait
KILLED = (-signal.SIGKILL, -signal.SIGTERM)
COMMAND = python("llmc.runtime.jit")


@dataclass(frozen=True)
class Source:
    """What variants of one artifact are made from: texts of its optimised graph and generic
    program, what it is compiled for, and the versions of what compiles and loads it. model: what
    people call it, which changes nothing."""

    graph: str
    program: str
    target: str
    versions: str = ""
    model: str = ""

    @cached_property
    def identity(self) -> str:
        """Changes when any of them does, or this llmc."""
        return text_key(json.dumps([self.graph, self.program, self.target, self.versions]))


@dataclass(frozen=True)
class Job:
    """A wanted variant. key: symbol -> (low, high); schedule: capabilities to lower with."""

    name: str
    key: Mapping[str, tuple[int, int]]
    schedule: Mapping[str, int]

    def cache_key(self, source: Source) -> str:
        """Identity of the variant: all that it is made from, and this llmc."""
        own = [source.identity, self.name, sorted(self.key.items()), sorted(self.schedule.items())]
        return hashlib.blake2b(json.dumps(own).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """variant, or the error in words. cached: nothing had to be compiled."""

    job: Job
    variant: StoredVariant | None
    error: str = ""
    cached: bool = False


class ProcessKilled(CompileError):
    """The compile process was ended from outside: by a person, or for want of memory."""


class Worker:
    """One compile process. `ask` starts it when needed; a failure ends it."""

    def __init__(self, command: tuple[str, ...] | None = None):
        self._command = command or COMMAND
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)

    def ask(self, request: Mapping[str, Any], timeout: float) -> StoredVariant:
        """One job; CompileError if it cannot be compiled, or the process dies or takes too long.

        A process that somebody killed gets a second try; one that died of its job does not.
        """
        try:
            return self._ask(request, timeout)
        except ProcessKilled:
            return self._ask(request, timeout)

    def _ask(self, request: Mapping[str, Any], timeout: float) -> StoredVariant:
        deadline = time.monotonic() + timeout
        process = self._running()
        message = json.dumps(request).encode()
        try:
            assert process.stdin is not None
            process.stdin.write(struct.pack("<q", len(message)) + message)
            process.stdin.flush()
            (length,) = struct.unpack("<q", self._read(process, 8, deadline))
            reply = json.loads(self._read(process, length, deadline))
            code = self._read(process, reply.get("bytes", 0), deadline)
        except TimeoutError:
            self.stop()
            raise CompileError(f"the compile took longer than {timeout:g} s") from None
        except (OSError, EOFError, ValueError):
            raise self._post_mortem() from None
        if "error" in reply:
            raise CompileError(reply["error"])
        return StoredVariant(variant_info(reply["info"]), code, reply["seconds"],
                             reply["launches"])

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def close(self) -> None:
        """From another thread: whoever asks now or later gets an error at once."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise CompileError("the runtime is closed")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
        return self._process

    def _read(self, process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert process.stdout is not None
        pipe, parts = process.stdout.fileno(), []
        while size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            part = os.read(pipe, min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _post_mortem(self) -> CompileError:
        """How the process ended, and the last line that it wrote."""
        status = None
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0) if self._process else None
        self.stop()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = f"exit status {status}" + (f", {lines[-1]}" if lines else "")
        kind = ProcessKilled if status in KILLED and not self._closed else CompileError
        return kind(f"the compile process died: {reason}")


@dataclass
class Counts:
    """What became of jobs so far. seconds: of compiling, in the processes."""

    compiled: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0
    running: str = ""  # name of the job that is worked on

    def add(self, outcome: Outcome) -> None:
        self.running = ""
        if outcome.variant is None:
            self.failed += 1
        elif outcome.cached:
            self.cached += 1
        else:
            self.compiled += 1
            self.seconds += outcome.variant.compile_seconds


class Compiler:
    """Turns jobs into outcomes, in the background. Outcomes wait in `finished`."""

    def __init__(self, source: Source, cache: VariantCache, timeout: float = TIMEOUT,
                 command: tuple[str, ...] | None = None):
        self.source = source
        self.cache = cache
        self.finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.counts = Counts()
        self._timeout = timeout
        self._worker = Worker(command)
        self._jobs: queue.Queue[Job | None] = queue.Queue(QUEUE)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def submit(self, job: Job) -> bool:
        """Queue a job; False if too many wait already."""
        with suppress(queue.Full):
            self._jobs.put_nowait(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="llmc-compiler",
                                                daemon=True)
                self._thread.start()
            return True
        return False

    def compile(self, job: Job) -> Outcome:
        """One job, here and now: from the cache, or by the worker."""
        self.counts.running = job.name
        try:
            outcome = self._compile(job)
        except (LlmcError, OSError) as error:
            outcome = Outcome(job, None, str(error))
        self.counts.add(outcome)
        return outcome

    def stats(self) -> dict[str, Any]:
        """Jobs by what became of them, those that wait, the one that is worked on."""
        return {**vars(self.counts), "waiting": self._jobs.qsize()}

    def cached(self, job: Job) -> StoredVariant | None:
        """The variant of a job if it was compiled before."""
        return self.cache.get(job.cache_key(self.source))

    def close(self) -> None:
        """Give up what is queued or running. Does nothing in a child process after a fork."""
        if self._process != os.getpid() or self._closed.is_set():
            return
        self._closed.set()
        with suppress(queue.Full):
            self._jobs.put_nowait(None)
        self._worker.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        if self._thread is None:
            self._worker.stop()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                job = self._jobs.get(timeout=IDLE)
            except queue.Empty:
                self._worker.stop()
                continue
            if job is not None and not self._closed.is_set():
                self.finished.put(self.compile(job))
        self._worker.stop()

    def _compile(self, job: Job) -> Outcome:
        key = job.cache_key(self.source)
        if (found := self.cache.get(key)) is not None:
            return Outcome(job, found, cached=True)
        with ExitStack() as stack:
            writable = True
            try:
                stack.enter_context(self.cache.lock(key).acquire(timeout=self._timeout))
                self.cache.sweep(key)
            except (OSError, TimeoutError):
                writable = False  # a read-only cache, or a holder that hangs: go on without
            if (found := self.cache.get(key)) is not None:
                return Outcome(job, found, cached=True)
            variant = replace(self._worker.ask(self._request(job), self._timeout),
                              model=self.source.model, target=short_target(self.source.target))
            if writable:
                with suppress(OSError):  # a full disk: the code works without its copy
                    self.cache.put(key, variant)
            return Outcome(job, variant)

    def _request(self, job: Job) -> dict[str, Any]:
        return {"graph": self.source.graph, "program": self.source.program,
                "target": self.source.target, "name": job.name, "key": dict(job.key),
                "schedule": dict(job.schedule)}
