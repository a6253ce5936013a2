"""What is read in each step: continuous batching over one trie of KV blocks.

Owns: admission, portions of prompts, preemption, forks and prunes, and keeping one request's failure its own.
Does not own: the thread it runs on (engine.py), tensors (hf.py, pool.py) and what tokens mean (run.py).

Everything is one thing: a sequence has ids, of which its branch holds the first. Prompts, sampled tokens, forced
text and what a preemption gave up are all ids that are not in the branch yet.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kernels.batch import Batch, Feed
from kernels.errors import PoolExhausted
from kernels.job import Job, Sequence
from kernels.run import Run
from kernels.trie import Copy, Trie

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from kernels.model import LanguageModel

# What rows have in common beyond more of them must be so long, or reading it apart costs more than it saves.
SHARE_FROM_TOKENS = 64


@dataclass(slots=True)
class Stats:
    """What was done since the start, in tokens, unless it says otherwise.

    Attributes:
        steps: forward passes.
        read: tokens that the network read.
        reused: tokens of prompts that were in the cache already.
        preemptions: sequences that gave their blocks to others.
        attended: keys that attention read from the cache.
        attended_apart: as many it would have been without sharing.
    """

    steps: int = 0
    read: int = 0
    reused: int = 0
    preemptions: int = 0
    attended: int = 0
    attended_apart: int = 0


@dataclass(slots=True)
class _Step:
    """A batch in the making."""

    sequences: list[Sequence] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class Scheduler:
    """All requests of one model.

    Args:
        model: what generates; its `kv_blocks` blocks are the cache.
        max_running: sequences that are read in one step.
        step_tokens: tokens that are read in one step; a longer prompt is read in portions.
        share_from: as of `make_plan`.

    Attributes:
        trie: who has which blocks.
        stats: what was done so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_running: int = 64,
        step_tokens: int = 512,
        share_from: int = SHARE_FROM_TOKENS,
    ) -> None:
        self._model = model
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._share_from = share_from
        self.trie = Trie(blocks=model.kv_blocks, block_tokens=model.block_tokens)
        self._pool = model.network.new_pool(model.kv_blocks, model.block_tokens)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.stats = Stats()

    @property
    def has_work(self) -> bool:
        """Something runs or waits."""
        return bool(self._running or self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have blocks."""
        return len(self._running)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those that have blocks, in their order; to be read only."""
        return tuple(self._running)

    def submit(self, job: Job) -> None:
        """Queue a request."""
        n = job.request.options.n
        try:
            for p, prompt in enumerate(job.request.prompts):
                runs = [Run(self._model, job.request, prompt, index=p * n + j, offset=j) for j in range(n)]
                self._wait(Sequence(job, runs, list(prompt.token_ids), len(prompt.token_ids)))
        except Exception as error:  # noqa: BLE001 - the boundary: a request that cannot begin fails alone
            self.abort(job, error)

    def abort(self, job: Job, error: Exception | None = None) -> None:
        """End a request and free what only it needs; `error` is its last event, if there is one."""
        for queue in (self._waiting, self._running):
            for sequence in [each for each in queue if each.job is job]:
                queue.remove(sequence)
                sequence.leave()
        if error is not None:
            job.fail(error)

    def fork(self, job: Job, index: int, twin_index: int) -> bool:
        """Let a choice go on twice from where it is; nothing is copied but what is written next.

        Args:
            job: whose.
            index: the choice.
            twin_index: number of the second one, which draws from the request's seed + this.

        Returns: False if the choice has ended.
        """
        found = self._find(job, index)
        if found is None:
            return False
        sequence, run = found
        twin = run.fork(twin_index, twin_index)
        if len(sequence.runs) > 1 or not run.feed:
            sequence.runs.append(twin)  # the prompt is not read yet, and is read once for all
        else:
            copy = sequence.fork([twin])
            insort(self._waiting if copy.branch is None else self._running, copy, key=_order)
        job.begin()
        return True

    def prune(self, job: Job, index: int) -> bool:
        """End a choice without another word and free at once what nothing else grew on.

        Returns: False if it had ended.
        """
        found = self._find(job, index)
        if found is None:
            return False
        sequence, run = found
        # Its place in the queue is that of its first choice, so it is taken out before that may change.
        queue = self._waiting if sequence in self._waiting else self._running
        queue.remove(sequence)
        sequence.runs.remove(run)
        if sequence.runs:
            insort(queue, sequence, key=_order)
        else:
            sequence.leave(drop=True)
        job.end()
        return True

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, read one batch, and hand every choice its logits."""
        gone = {each.job for queue in (self._waiting, self._running) for each in queue if each.job.is_cancelled}
        for job in gone:
            self.abort(job)
        self._admit()
        step = self._compose()
        if not step.feeds:
            return
        self._pool.copy(step.copies)
        for sequence, rows in zip(step.sequences, self._read(step.feeds), strict=True):
            if sequence.branch is None:
                continue  # its request failed in this very step
            if isinstance(rows, Exception):
                self.abort(sequence.job, rows)
                continue
            sequence.branch.commit()
            sequence.rows.append(rows)
            if not sequence.pending:
                self._advance(sequence)

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)

    def _find(self, job: Job, index: int) -> tuple[Sequence, Run] | None:
        for sequence in (*self._running, *self._waiting):
            for run in sequence.runs:
                if sequence.job is job and run.index == index:
                    return sequence, run
        return None

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.trie.block_tokens)

    def _admit(self) -> None:
        """Let in whoever is first in the queue, as long as the cache holds all that is to be read."""
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            # The logits that are wanted come only of tokens that are read.
            known = sequence.ids[: len(sequence.ids) - sequence.keep + 1]
            branch = self.trie.open(known, space=sequence.job.request.options.cache_salt)
            owed = sum(
                self._blocks(len(each.ids) + 1) - len(each.branch.blocks) for each in self._running if each.branch
            )
            wanted = self._blocks(len(sequence.ids) + 1) - len(branch.blocks)
            is_tight = bool(self._running) and wanted + owed > self.trie.room
            if is_tight or self._is_being_read(sequence, len(branch)):
                branch.close()
                return
            sequence.branch = branch
            insort(self._running, self._waiting.pop(0), key=_order)
            if sequence.is_new:
                sequence.job.cached += len(branch)
            sequence.is_new, sequence.job.is_started = False, True
            self.stats.reused += len(branch)

    def _is_being_read(self, sequence: Sequence, known: int) -> bool:
        """Somebody reads the very tokens that come next: whoever waits for them gets them for nothing."""
        end = known + self.trie.block_tokens
        if end >= len(sequence.ids):
            return False
        head, space = sequence.ids[:end], sequence.job.request.options.cache_salt
        others = (each for each in self._running if each.job.request.options.cache_salt == space)
        return any(each.done < end <= len(each.ids) and each.ids[:end] == head for each in others)

    def _compose(self) -> _Step:
        """What this step reads: single tokens first, then as much of the prompts as there is room for."""
        step, budget = _Step(), self._step_tokens
        queue = deque(sorted(self._running, key=lambda each: (each.pending > 1, each.order)))
        while queue and budget and len(step.feeds) < self._max_running:
            sequence = queue.popleft()
            count = min(sequence.pending, budget)
            if self._feed(step, sequence, count, queue):
                budget -= count
        return step

    def _feed(self, step: _Step, sequence: Sequence, count: int, behind: deque[Sequence]) -> bool:
        """Put a sequence's next tokens into the step; who is behind gives up blocks if it must, last first.

        Returns: False if the sequence itself had to.
        """
        branch = sequence.branch
        assert branch is not None
        start = len(branch)
        ids = sequence.ids[start : start + count]
        while True:
            try:
                writes = branch.append(ids)
            except PoolExhausted as error:
                if not behind and not step.feeds:
                    self.abort(sequence.job, error)  # it is alone, and the cache does not hold it
                    return False
                self._preempt(behind.pop() if behind else sequence)
                if sequence.branch is None:
                    return False
            else:
                break
        if writes.copy is not None:
            step.copies.append(writes.copy)
        keep = max(0, start + count - max(start, len(sequence.ids) - sequence.keep))
        step.feeds.append(Feed(ids, start, branch.blocks, writes.slots, keep, sequence.prompt))
        step.sequences.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it waits, and reads again what is gone by then."""
        self._running.remove(sequence)
        sequence.leave()
        self._wait(sequence)
        self.stats.preemptions += 1

    def _read(self, feeds: list[Feed]) -> Iterable[Tensor | Exception]:
        """The logits of every feed. If the batch fails each is tried alone: what one breaks is its own failure."""
        try:
            return self._forward(feeds)
        except Exception as error:  # noqa: BLE001 - the boundary: others have to go on
            return [error] if len(feeds) == 1 else [rows for feed in feeds for rows in self._read([feed])]

    def _forward(self, feeds: list[Feed]) -> list[Tensor]:
        batch = Batch.of(feeds, block_tokens=self.trie.block_tokens, share_from=self._share_from)
        rows = self._model.network.read(self._pool, batch)
        self.stats.steps += 1
        self.stats.read += batch.tokens
        self.stats.attended += batch.plan.tokens_read
        self.stats.attended_apart += sum(batch.plan.lengths)
        return rows

    def _advance(self, sequence: Sequence) -> None:
        """Hand the logits after all ids to the choices; a prompt's choices part here."""
        rows = torch.cat(sequence.rows)
        sequence.rows = []
        parts = [sequence, *(sequence.fork([run]) for run in sequence.runs[1:])]
        del sequence.runs[1:]
        for part in parts[1:]:
            insort(self._running, part, key=_order)
        for part in parts:
            if part.branch is not None:
                self._go_on(part, rows)

    def _go_on(self, sequence: Sequence, rows: Tensor) -> None:
        (run,) = sequence.runs
        try:
            outputs = run.advance(rows)
        except Exception as error:  # noqa: BLE001 - the boundary: others have to go on
            self.abort(sequence.job, error)
            return
        sequence.job.tell(outputs)
        if run.finish_reason is None:
            sequence.ids += run.feed
            sequence.keep = run.keep
            return
        self._running.remove(sequence)
        sequence.leave()
        sequence.job.end()


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
