"""Moves tensors between the devices of a pipeline: between threads of one process, or with torch.distributed.

Both ends know what travels: a transfer is named by its SEND action, and the receiver allocates what the sender's
`Border` says. Waiting ends after `timeout_s` with an error that names the action, the peer and the microbatch; so do
all other devices once one has failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from itertools import chain
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from longcat_model.pipeline.ir import Action, counterpart
from longcat_model.pipeline.stage import Border

TIMEOUT_S = 600.0  # the longest that ranks of a job wait for each other


class PipelineError(ConnectionError):
    """An action did not end: a device was lost, hangs or failed."""


class Receipt(Protocol):
    """A receive that was posted."""

    def wait(self) -> Tensor:
        """The tensor, once it is there.

        Raises:
            PipelineError: it does not come.
        """
        ...


class Transport(Protocol):
    """One device's end."""

    device: int
    devices: int

    def send(self, tensor: Tensor, to: int, action: Action) -> None:
        """Sends without waiting; `action` is the SEND action. The tensor must not be written to any more."""
        ...

    def receive(self, border: Border, source: int, action: Action) -> Receipt:
        """Gets ready for what `source` sends with the counterpart of `action`, a RECV action."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every device's value, on every device; values are plain data and tensors on the CPU."""
        ...

    def announce(self, value: Any) -> Callable[[], list[list[Any]]]:
        """Every device's value of every pipeline, by pipeline and device; waits only when what it gives is called.

        Announcements are in one order on all devices.
        """
        ...

    def fail(self, error: BaseException | None) -> None:
        """Tells all other devices that this one stops, and why."""
        ...


def describe(device: int, action: Action, peer: int) -> str:
    return f"device {device}, {action} (microbatch {action.microbatch}) from device {peer}"


class _Shared:
    """What the ends of an in-process transport have in common."""

    def __init__(self, devices: int) -> None:
        self.changed = threading.Condition()
        self.tensors: dict[tuple[int, Action], list[Tensor]] = {}  # by receiver and RECV action, the oldest first
        self.gathered: dict[int, dict[int, Any]] = {}  # by round and device
        self.waiting: dict[int, Callable[[], bool]] = {}  # what each waiting device waits for
        self.failure: str | None = None
        self.devices = devices


class InProcess:
    """Devices that are threads of this process; a tensor is handed over as it is."""

    def __init__(self, shared: _Shared, device: int, timeout_s: float, rendezvous: bool) -> None:
        self.device, self.devices, self.timeout_s, self.rendezvous = device, shared.devices, timeout_s, rendezvous
        self._shared, self._round = shared, 0

    @classmethod
    def connect(cls, devices: int, timeout_s: float = 60.0, *, rendezvous: bool = False) -> list[InProcess]:
        """One end for each device.

        Args:
            rendezvous: sends wait for their receivers and receives for their senders, as the worst of backends may have
                it; without it neither does.
        """
        shared = _Shared(devices)
        return [cls(shared, device, timeout_s, rendezvous) for device in range(devices)]

    def send(self, tensor: Tensor, to: int, action: Action) -> None:
        shared, key = self._shared, (to, counterpart(action))
        with shared.changed:
            sent = shared.tensors.setdefault(key, [])
            sent.append(tensor)
            shared.changed.notify_all()
            if self.rendezvous:
                what = f"device {self.device}, {action} (microbatch {action.microbatch}) to device {to},"
                self._wait(lambda: not sent, lambda: what)

    def receive(self, border: Border, source: int, action: Action) -> Receipt:
        handover = _Handover(self, border, source, action)
        return Arrived(handover.wait()) if self.rendezvous else handover

    def gather(self, value: Any) -> list[Any]:
        return self.announce(value)()[0]

    def announce(self, value: Any) -> Callable[[], list[list[Any]]]:
        shared, everyone = self._shared, set(range(self.devices))
        with shared.changed:
            found = shared.gathered.setdefault(self._round, {})
            self._round += 1
            found[self.device] = value
            shared.changed.notify_all()

        def wait() -> list[list[Any]]:
            with shared.changed:
                self._wait(
                    lambda: everyone == found.keys(),
                    lambda: f"device {self.device}, gathering from devices {sorted(everyone - found.keys())},",
                )
                return [[found[device] for device in range(self.devices)]]

        return wait

    def fail(self, error: BaseException | None) -> None:
        with self._shared.changed:
            if self._shared.failure is None:
                self._shared.failure = f"device {self.device} failed: {error}"
            self._shared.changed.notify_all()

    def _wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Under the lock, until `ready`; a circle of waiting devices is seen at once."""
        shared = self._shared
        shared.waiting[self.device] = ready
        if len(shared.waiting) == self.devices and not any(one() for one in shared.waiting.values()):
            shared.failure = shared.failure or "all devices wait"
            shared.changed.notify_all()
        done = shared.changed.wait_for(lambda: ready() or shared.failure is not None, self.timeout_s)
        del shared.waiting[self.device]
        if ready():
            return
        reason = shared.failure if done else f"nothing came for {self.timeout_s:g} s"
        raise PipelineError(f"pipeline: {what()} stopped: {reason}")

    def take(self, border: Border, source: int, action: Action) -> Tensor:
        """Waits for a tensor and removes it."""
        shared, key = self._shared, (self.device, action)
        with shared.changed:
            self._wait(lambda: bool(shared.tensors.get(key)), lambda: describe(self.device, action, source))
            tensor = shared.tensors[key].pop(0)
            shared.changed.notify_all()
        if (tuple(tensor.shape), tensor.dtype) != (border.shape, border.dtype):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            what = describe(self.device, action, source)
            raise PipelineError(f"pipeline: {what} must be {border.dtype} {list(border.shape)}, got {found}")
        return tensor


class Arrived(NamedTuple):
    """A receipt of what is there already."""

    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


class _Handover:
    def __init__(self, end: InProcess, border: Border, source: int, action: Action) -> None:
        self._end, self._arguments = end, (border, source, action)

    def wait(self) -> Tensor:
        return self._end.take(*self._arguments)


class Distributed:
    """Devices that are ranks of torch.distributed, with gloo or NCCL; made by `connect`.

    What flows to higher ranks and what flows to lower ones each has a process group, and with NCCL a stream, of its
    own; so have plain data, on the CPU, and announcements, which go to all pipelines.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        number: int,
        news: dist.ProcessGroup,
        stages: int,
        store: Store | None,
        limit: timedelta,
    ) -> None:
        self.ranks, self._stages, self._store = list(pipelines[number]), stages, store
        self._up, self._down = (dist.new_group(self.ranks, timeout=limit) for _ in range(2))
        self._all = dist.new_group(self.ranks, timeout=limit, backend="gloo")
        self._pipelines, self._news = pipelines, news
        self._announced: SimpleQueue[tuple[Future[list[list[Any]]], Any] | None] = SimpleQueue()
        self.device, self.devices = dist.get_group_rank(self._all, dist.get_rank()), len(self.ranks)
        self._sent: SimpleQueue[tuple[Any, Tensor] | None] = SimpleQueue()
        # Daemons: a rank that fails must not stay, at its end, for what its peers will never send.
        self._threads = [
            threading.Thread(target=_release, args=(self._sent, limit), daemon=True),
            threading.Thread(target=self._tell, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def connect(
        cls,
        stages: int,
        pipelines: Sequence[Sequence[int]] | None = None,
        *,
        store: Store | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Distributed | None:
        """Every rank of the job calls this together; gives its end, or None if it is in none of the pipelines.

        Args:
            stages: of each pipeline.
            pipelines: the ranks of each, device by device; None: all ranks are one pipeline.
            store: where a rank that fails leaves word for all others; to be kept by none of the ranks, as torchrun's
                agent does (`launch` gives such a one). None: a rank learns only what its own neighbours do.
            timeout_s: the longest that a transfer may take.
        """
        limit, found = timedelta(seconds=timeout_s), None
        pipelines = pipelines or [range(dist.get_world_size())]
        news = dist.new_group(sorted(chain(*pipelines)), timeout=limit, backend="gloo")
        for number, ranks in enumerate(pipelines):
            if dist.get_rank() in ranks:
                found = cls(pipelines, number, news, stages, store, limit)
            else:
                for backend in (None, None, "gloo"):  # making a group is a matter for all ranks
                    dist.new_group(list(ranks), timeout=limit, backend=backend)
        return found

    def send(self, tensor: Tensor, to: int, action: Action) -> None:
        group = self._up if to > self.device else self._down
        tensor = tensor.contiguous()
        try:
            work = dist.isend(tensor, self.ranks[to], group=group, tag=self._tag(counterpart(action)))
        except RuntimeError as error:
            what = f"device {self.device}, {action} (microbatch {action.microbatch}) to device {to}"
            raise PipelineError(f"pipeline: {what} stopped: {self._reason(error)}") from error
        # gloo tells that a send is done only to who waits for it, and until then the tensor must live.
        self._sent.put((work, tensor))

    def receive(self, border: Border, source: int, action: Action) -> Receipt:
        group = self._up if source < self.device else self._down
        tensor = border.empty()
        try:
            work = dist.irecv(tensor, self.ranks[source], group=group, tag=self._tag(action))
        except RuntimeError as error:
            raise self._lost(error, action, source) from error
        return _Work(self, tensor, work, source, action)

    def gather(self, value: Any) -> list[Any]:
        return self._gather(value, self._all)

    def announce(self, value: Any) -> Callable[[], list[list[Any]]]:
        future: Future[list[list[Any]]] = Future()
        self._announced.put((future, value))
        return future.result

    def _tell(self) -> None:
        while (item := self._announced.get()) is not None:
            future, value = item
            try:
                found = dict(self._gather((dist.get_rank(), value), self._news))
                future.set_result([[found[rank] for rank in ranks] for ranks in self._pipelines])
            except PipelineError as error:
                future.set_exception(error)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(group)
        self._together("gathering", lambda: dist.all_gather_object(found, value, group=group))
        return found

    def _together(self, what: str, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise PipelineError(f"pipeline: device {self.device}, {what}, stopped: {self._reason(error)}") from error

    def fail(self, error: BaseException | None) -> None:
        if self._store is not None:
            # The first one's word stays: what others say follows from it.
            who = f"device {self.device} (rank {dist.get_rank()})"
            self._store.compare_set("failure", "", f"{who} failed: {error}")

    def close(self) -> None:
        """Waits until all that was sent has arrived."""
        self._sent.put(None)
        self._announced.put(None)
        for thread in self._threads:
            thread.join()

    def _tag(self, action: Action) -> int:
        kinds = 2
        return (action.microbatch * self._stages + action.stage) * kinds + ("B" in action.kind.value[-1:])

    def _lost(self, error: BaseException, action: Action, source: int) -> PipelineError:
        return PipelineError(f"pipeline: {describe(self.device, action, source)} stopped: {self._reason(error)}")

    def _reason(self, error: BaseException) -> str:
        """What another device said, if it did within a second, or else what the backend says."""
        if self._store is not None:
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                if self._store.check(["failure"]):
                    return self._store.get("failure").decode()
                time.sleep(0.05)
        return str(error).split("\n")[0]


class _Work:
    def __init__(self, end: Distributed, tensor: Tensor, work: Any, source: int, action: Action) -> None:
        self._end, self._tensor, self._work, self._source, self._action = end, tensor, work, source, action

    def wait(self) -> Tensor:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._end._lost(error, self._action, self._source) from error
        return self._tensor


def _release(sent: SimpleQueue[tuple[Any, Tensor] | None], limit: timedelta) -> None:
    """Drops tensors once they have gone; a peer that does not take them is the receiving side's to report."""
    while (item := sent.get()) is not None:
        try:
            item[0].wait(limit)
        except RuntimeError:
            continue
