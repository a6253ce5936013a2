"""Watching that a backend holds its cap, and knowing what each choice may keep when it does not.

Owns: dropping thinking beyond the cap, telling a slip from a lie, and remembering what was delivered, so that
a lost choice can be taken over. Lost, though no lie, is also a choice that begins a tool call inside its thinking (its
backend, counting on, would force the end of the thinking into the middle of the call), and one whose model ended its
turn there (it would have no answer). O(1) per delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.backends.port import Delta, Kind

if TYPE_CHECKING:
    from gateway.tally import Tally

GRACE_TOKENS = 8
NO_TOKEN = -1


class Guard:
    """Over one call.

    Args:
        tally: counts of the request.
        finished: choices that have a finish_reason; a lost one is taken out again.
        choices: how many there are.
        keeps_ids: choices can be taken over by token ids.
        keeps_text: choices can be taken over by the text of their thinking.
        opener: the token that begins a tool call, where calls are to be read out of the answer.

    Attributes:
        keeps_text: as above.
        lost: choices that think on past the cap and its grace, or ended like that, or began a call.
        calls: those of them that began a call.
        ends: the token by which those of them ended their turn inside the thinking, NO_TOKEN where it is not known.
        overrun: thinking tokens the backend sent beyond the cap.
        dropped: tokens that were dropped for it.
        ids: delivered output by choice.
        thoughts: delivered thinking text by choice.
    """

    __slots__ = (
        "_choices",
        "_finished",
        "_keeps_ids",
        "_opener",
        "_over",
        "_said",
        "_tally",
        "calls",
        "dropped",
        "ends",
        "ids",
        "keeps_text",
        "lost",
        "overrun",
        "thoughts",
    )

    def __init__(
        self,
        tally: Tally,
        finished: set[int],
        choices: int,
        *,
        keeps_ids: bool = False,
        keeps_text: bool = False,
        opener: int | None = None,
    ) -> None:
        self._tally, self._finished, self._choices = tally, finished, choices
        self._keeps_ids, self.keeps_text, self._opener = keeps_ids, keeps_text, opener
        self._said: set[int] = set()  # choices whose answer has begun
        self.calls: set[int] = set()
        self.ends: dict[int, int] = {}
        self._over: dict[int, int] = {}
        self.lost: set[int] = set()
        self.overrun = self.dropped = 0
        self.ids: dict[int, list[int]] = {}
        self.thoughts: dict[int, list[str]] = {}

    def can_take_over(self) -> bool:
        """Whether a lost choice can go on."""
        return self._keeps_ids or self.keeps_text

    def unended(self, deltas: list[Delta]) -> list[Delta]:
        """Deltas without an end of turn inside the thinking: its choice is lost, and goes on to an answer."""
        if self._keeps_ids:
            for delta in deltas:
                if delta.finish_reason == "stop" and delta.thinking and not delta.answer and delta.token_ids:
                    self.ends[delta.index] = delta.token_ids.pop()
                    delta.finish_reason, delta.stop_reason, delta.wire = None, None, b""
                    delta.thinking -= 1
                    self._tally.take_back(delta.index)
                    self._finished.discard(delta.index)
                    self._lose(delta.index)
        return deltas

    def is_ordinary(self, token_id: int) -> bool:
        """Whether a token within the cap needs nothing but to be remembered."""
        return not (self._over or self.lost or token_id == self._opener or self.keeps_text)

    def remember(self, index: int, token_id: int) -> None:
        """Keep an ordinary token that was delivered."""
        if self._keeps_ids:
            self.ids.setdefault(index, []).append(token_id)

    def kept(self, deltas: list[Delta]) -> list[Delta]:
        """Deltas that may be delivered, remembered as what a lost choice would go on from."""
        if self._opener is not None:
            deltas = self._before_calls(deltas, self._opener)
        for delta in deltas:
            if self._keeps_ids and delta.token_ids:
                self.ids.setdefault(delta.index, []).extend(delta.token_ids)
        return [delta for delta in deltas if self._keep_text(delta)] if self.keeps_text else deltas

    def _keep_text(self, delta: Delta) -> bool:
        """Remember what a choice said or thought; whether anything is left where it ends its turn without an answer."""
        if _is_answer(delta):
            self._said.add(delta.index)
        elif delta.kind is Kind.THINKING and delta.text:
            self.thoughts.setdefault(delta.index, []).append(delta.text)
        if delta.finish_reason != "stop" or delta.index in self._said or delta.index not in self.thoughts:
            return True
        self.ends[delta.index] = NO_TOKEN
        delta.finish_reason, delta.stop_reason, delta.wire = None, None, b""
        self._lose(delta.index)
        return bool(delta.text)

    def _before_calls(self, deltas: list[Delta], opener: int) -> list[Delta]:
        """Deltas up to a tool call that begins inside the thinking; its choice is lost."""
        kept = []
        for delta in deltas:
            if delta.index in self.calls:
                self._waste(delta)
                self._finished.discard(delta.index)
            elif delta.thinking and opener in delta.token_ids:
                self._waste(delta)
                self._tally.wasted -= 1  # the opening token itself is kept: the call goes on from it
                self.calls.add(delta.index)
                self._lose(delta.index)
            else:
                kept.append(delta)
        return kept

    def within(self, deltas: list[Delta], cap: int) -> list[Delta]:
        """Deltas up to the cap; the thinking of one that goes beyond is moved to `wasted`: it reaches no client."""
        used = dict(self._tally.thinking_by_choice)
        for delta in deltas:
            used[delta.index] = used.get(delta.index, 0) - delta.thinking
        kept = []
        for delta in deltas:
            before = used[delta.index]
            used[delta.index] += delta.thinking
            is_over = delta.index in self._over
            if delta.index in self.lost:
                self._waste(delta)
                self._finished.discard(delta.index)
            elif delta.thinking and (is_over or used[delta.index] > cap):
                # After a dropped one none fits any more, however short: it would follow on a gap.
                over = delta.thinking if is_over else used[delta.index] - max(cap, before)
                if delta.index in self._said:
                    self.overrun += over  # it is not lost for thinking again
                    kept += self._unthought(delta)
                else:
                    self._drop(delta, over)
            elif delta.finish_reason is not None and delta.index in self._over and not _is_answer(delta):
                self._lose(delta.index)
            else:
                if _is_answer(delta):
                    self._said.add(delta.index)
                    self._over.pop(delta.index, None)  # it slipped, and came back
                kept.append(delta)
        return kept

    def unthought(self, deltas: list[Delta]) -> list[Delta]:
        """Deltas without thinking, where nothing may be thought and nobody can take over: the answer still comes."""
        return [part for delta in deltas for part in (self._unthought(delta) if delta.thinking else [delta])]

    def _unthought(self, delta: Delta) -> list[Delta]:
        """What is left of a delta that is dropped: the end of its choice, if it says that."""
        self._waste(delta)
        self._tally.capped = True
        if delta.finish_reason is None:
            return []
        return [Delta(index=delta.index, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)]

    def is_lost(self) -> bool:
        """Whether some choice is lost, and every other one finished."""
        return bool(self.lost) and len(self.lost) + len(self._finished) >= self._choices

    def _drop(self, delta: Delta, over: int) -> None:
        self._waste(delta)
        self._tally.capped = True
        self.overrun += over
        self._over[delta.index] = self._over.get(delta.index, 0) + over
        if self._over[delta.index] > GRACE_TOKENS or delta.finish_reason is not None:
            self._lose(delta.index)

    def _waste(self, delta: Delta) -> None:
        self.dropped += delta.thinking + delta.answer + delta.injected
        self._tally.waste(delta)

    def _lose(self, index: int) -> None:
        self.lost.add(index)
        self._finished.discard(index)


def _is_answer(delta: Delta) -> bool:
    """Whether some of the answer is in it."""
    return bool(delta.answer or delta.tool_calls or (delta.kind is Kind.ANSWER and delta.text))
