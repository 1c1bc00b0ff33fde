"""Which tokens of which sequences the next step computes. Policy only: it holds no tensors.

First come, first served: `running` and `waiting` are sorted by arrival. Every step takes one token
of each sequence that decodes; what is left of the step's tokens goes to prompts, the oldest first,
chunk by chunk, so a long prompt delays nobody's next token by more than a step, and a step that
decodes may be kept shorter than others. Where pages run out the youngest sequence gives up its own
and is computed again later (from what is still cached); the oldest never does, and as each fits the
pool alone, each gets to its end.

A step that fails may have been any of its sequences' fault. Suspects run alone, until they have
failed alone or have not.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from llmc.errors import LlmcError
from llmc.runtime.pages import PAGE, PagePool, extend_keys
from llmc.runtime.pages import Sequence as CachedSequence
from llmc.runtime.step import Chunk
from llmc.server.request import Matcher, Request, Stream


class Choice:
    """One continuation of a request's prompt, from its arrival to its end.

    order: sorts by arrival. limit: most new tokens. siblings: choices of the same request that
    wait until this one has computed the prompt, to share its pages.
    """

    def __init__(self, request: Request, stream: Stream, prompt: np.ndarray, index: int,
                 order: tuple[int, int], limit: int, stop_ids: frozenset[int],
                 matcher: Matcher | None, shareable: bool):
        self.request, self.stream, self.index = request, stream, index
        self.order, self.stop_ids = order, stop_ids
        self.matcher = matcher
        self.mask: Future[np.ndarray] | None = None  # of the next token, being computed
        self.shareable = shareable
        self.siblings: list[Choice] = []
        self.sequence = CachedSequence()
        self.keys: list[bytes] = []  # of its full pages
        self.published = 0  # pages that others can find
        self.slot = -1  # in the sampler; -1 while it waits
        self.ended = False
        self.prompt_length = self.count = len(prompt)  # count: of all tokens
        self.most = self.count + limit
        self._ids = prompt

    @property
    def ids(self) -> np.ndarray:
        """Prompt and new tokens, i32 [count]."""
        return self._ids[:self.count]

    @property
    def made(self) -> int:
        """New tokens so far."""
        return self.count - self.prompt_length

    def append(self, token: int) -> None:
        if self.count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(self.count + PAGE, np.int32)])
        self._ids[self.count] = token
        self.count += 1

    def chunk(self, count: int) -> Chunk:
        """Its next `count` tokens; logits are wanted where they are its last."""
        sequence = self.sequence
        end = sequence.length + count
        return Chunk(sequence, self._ids[sequence.length:end], int(end == self.count))


@dataclass
class Plan:
    """A step: choices and their chunks, side by side, with so many tokens, at most `most` where
    there is a choice. admitted: choices that begin to run."""

    choices: list[Choice] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    tokens: int = 0
    most: int = 0
    admitted: list[Choice] = field(default_factory=list)


class Scheduler:
    """release: takes back all that a sequence holds; max_batch: most sequences that run at once;
    max_step_tokens: most tokens of a step, more than max_batch; whole_above: longer sequences must
    start with a single step (0: none must); reuse: whether pages may be shared; mixed_step_tokens:
    most tokens of a step in which some sequence decodes, more than max_batch (0: as of others)."""

    def __init__(self, pool: PagePool, release: Callable[[CachedSequence], None], max_batch: int,
                 max_step_tokens: int, whole_above: int = 0, reuse: bool = True,
                 mixed_step_tokens: int = 0):
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.mixed_step_tokens = mixed_step_tokens or max_step_tokens
        self.whole_above = whole_above
        self.reuse = reuse
        self.running: list[Choice] = []
        self.waiting: list[Choice] = []
        self.suspects: list[Choice] = []
        self.preemptions = 0
        self.prefix_queried = 0  # tokens of admitted prompts
        self.prefix_found = 0  # those that were cached
        self._give_back = release
        self._slots = list(range(max_batch - 1, -1, -1))

    def add(self, choice: Choice) -> None:
        """A choice that may be admitted from now on."""
        insort(self.waiting, choice, key=_order)

    def remove(self, choice: Choice) -> None:
        """A choice that is over: its pages and slot are free at once."""
        self._clear(choice)
        if choice.slot >= 0:
            self.running.remove(choice)
            self._release(choice)
        elif choice in self.waiting:
            self.waiting.remove(choice)

    def schedule(self) -> Plan:
        """The next step; without chunks if there is nothing to do."""
        if self.suspects:
            return self._alone(self.suspects[0])
        preempted = self.preemptions
        decoding, prompts = self._sort_running()
        plan = Plan(decoding, [choice.chunk(1) for choice in decoding], len(decoding),
                    self.mixed_step_tokens if decoding else self.max_step_tokens)
        for choice in prompts:
            self._add_prompt(plan, choice)
        if self.preemptions == preempted:
            self._admit(plan)
        return plan

    def _sort_running(self) -> tuple[list[Choice], list[Choice]]:
        """Choices that have a page for their next token, and those whose prompt is not computed,
        the oldest first; to get a page, others may have been preempted."""
        decoding, prompts = [], []
        for choice in self.running.copy():
            length = choice.sequence.length
            if choice.count - length > 1:
                prompts.append(choice)
            elif choice.slot >= 0 and (length % PAGE or self._grow(choice)):
                decoding.append(choice)
        return decoding, [choice for choice in prompts if choice.slot >= 0]

    def _add_prompt(self, plan: Plan, choice: Choice) -> None:
        """Plan as much of a prompt as the step has room for."""
        room = plan.most - plan.tokens
        count = choice.count - choice.sequence.length
        if not 0 < self.whole_above < choice.count:
            count = min(count, room)
        if count > 0 and room > 0:
            plan.choices.append(choice)
            plan.chunks.append(choice.chunk(count))
            plan.tokens += count

    def _grow(self, choice: Choice) -> bool:
        """Get a page for the next token, if need be from the youngest; False if that is itself."""
        needed = choice.sequence.length + 1 > PAGE * len(choice.sequence.pages)
        while needed and not self.pool.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is choice:
                return False
        self.pool.reserve(choice.sequence, choice.sequence.length + 1)
        return True

    def _admit(self, plan: Plan) -> None:
        while (self.waiting and plan.tokens < plan.most
               and len(self.running) < self.max_batch):
            choice = self.waiting[0]
            if self._gains_by_waiting(choice) or not self._reserve(choice):
                return  # nobody overtakes it
            self._start(plan, choice)
            self._add_prompt(plan, choice)

    def _start(self, plan: Plan, choice: Choice) -> None:
        self.waiting.remove(choice)
        choice.slot = self._slots.pop()
        insort(self.running, choice, key=_order)
        plan.admitted.append(choice)

    def _alone(self, choice: Choice) -> Plan:
        """A step of one suspect, for which others may have to give up their pages."""
        plan = Plan(most=self.max_step_tokens)
        while choice.slot < 0:
            if len(self.running) < self.max_batch and self._reserve(choice):
                self._start(plan, choice)
            elif self.running:
                self.preempt(self.running[-1])
            else:
                return plan
        self._add_prompt(plan, choice)
        return plan

    def suspect(self, choice: Choice) -> None:
        """Compute a choice again from its beginning, alone until it has caught up."""
        self.suspects.append(choice)
        self.preempt(choice)

    def _clear(self, choice: Choice) -> None:
        if choice in self.suspects:
            self.suspects.remove(choice)

    def _usable_keys(self, choice: Choice) -> list[bytes]:
        """Keys of the pages that a choice may take from others: at least its last token has to be
        computed."""
        if not self.reuse or not choice.shareable:
            return []
        extend_keys(choice.keys, choice.ids)
        return choice.keys[:(choice.count - 1) // PAGE]

    def _gains_by_waiting(self, choice: Choice) -> bool:
        """Whether an older one is computing the next page that this one needs."""
        keys = self._usable_keys(choice)
        number = self.pool.known(keys)
        return number < len(keys) and any(
            number < len(other.keys) and other.keys[number] == keys[number]
            and other.published <= number for other in self.running)

    def _reserve(self, choice: Choice) -> bool:
        """Pages for all tokens of a choice, shared ones first; False if there are too few. Those
        that run keep a page each to grow into."""
        found = self.pool.adopt(choice.sequence, self._usable_keys(choice))
        missing = -(-choice.count // PAGE) - found
        if missing + len(self.running) > self.pool.free and (self.running
                                                             or missing > self.pool.free):
            self._give_back(choice.sequence)
            return False
        self.pool.reserve(choice.sequence, choice.count)
        choice.published = found
        self.prefix_queried += choice.count
        self.prefix_found += found * PAGE
        return True

    def preempt(self, choice: Choice) -> None:
        """Take pages and slot of a running choice; it waits until it can be computed again."""
        self.preemptions += 1
        self.running.remove(choice)
        self._release(choice)
        self.add(choice)

    def _release(self, choice: Choice) -> None:
        self._give_back(choice.sequence)
        self._slots.append(choice.slot)
        choice.slot = -1

    def computed(self, choices: Sequence[Choice]) -> None:
        """A step has run that these were part of: others may share their full pages."""
        for choice in choices:
            length = choice.sequence.length
            if choice.slot < 0:  # it has ended meanwhile
                continue
            if length // PAGE > choice.published and self.reuse and choice.shareable:
                extend_keys(choice.keys, choice.ids)
                full = length // PAGE
                self.pool.publish(choice.sequence, choice.keys[:full], choice.published)
                choice.published = full
            if choice.siblings and length >= choice.prompt_length:
                self.free_siblings(choice)
            if self.suspects and length == choice.count:
                self._clear(choice)

    def free_siblings(self, choice: Choice) -> None:
        """Let the choices go that wait for this one."""
        for sibling in choice.siblings:
            if not sibling.ended:
                self.add(sibling)
        choice.siblings = []

    def check(self) -> None:
        """LlmcError unless every page, slot and place is accounted for."""
        self.pool.check(choice.sequence for choice in self.running)
        slots = sorted([choice.slot for choice in self.running] + self._slots)
        if slots != list(range(self.max_batch)):
            raise LlmcError(f"slots in use and free are {slots}, of {self.max_batch}")
        _check_list("running", self.running)
        _check_list("waiting", self.waiting)
        for choice in self.waiting:
            if choice.slot >= 0 or choice.sequence.pages:
                raise LlmcError(f"choice {choice.order} waits and holds pages or a slot")


def _order(choice: Choice) -> tuple[int, int]:
    return choice.order


def _check_list(name: str, choices: Sequence[Choice]) -> None:
    orders = [choice.order for choice in choices]
    if orders != sorted(set(orders)) or any(choice.ended for choice in choices):
        raise LlmcError(f"{name} choices are out of order, twice there, or over: {orders}")
