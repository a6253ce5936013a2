"""What is remembered of one choice while its chain is carried out.

Owns: the state between the segments of a choice, and that of one that is taken over. Does not own: what to do
with it (chains.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budget.chain import Chain
    from budget.chain_step import Step
    from gateway.backends.markers import AnswerFilter, MarkerSplitter
    from gateway.backends.port import Delta
    from gateway.backends.tool_text import ToolReader


@dataclass(frozen=True, slots=True)
class TakeOver:
    """A choice that its backend did not hold to the cap.

    Attributes:
        index: the choice.
        ids: its output as far as it was delivered.
        begins_call: it goes on with a tool call that began inside its thinking.
        end: the token by which the model ended its turn inside its thinking, if it did.
    """

    index: int
    ids: list[int]
    begins_call: bool = False
    end: int | None = None


@dataclass(slots=True)
class Choice:
    """One choice being carried out; times are the run's clock in seconds."""

    index: int
    chain: Chain
    reader: ToolReader
    unthought: AnswerFilter
    segments: int = 0  # begun so far; the call that was taken over is one
    splitter: MarkerSplitter | None = None
    pending: list[int] = field(default_factory=list)  # tokens whose text the splitter holds back
    pending_logprobs: list[Any] = field(default_factory=list)
    ended_s: float | None = None  # end of the segment before
    began_s: float = 0.0
    first_s: float = 0.0
    sampled: int = 0
    is_over: bool = False  # the segment, by the chain
    is_finished: bool = False  # the segment, by the backend
    is_learned: bool = False  # how its thinking ended is known to those who decide about probes

    def hold(self, delta: Delta) -> None:
        """Keep a delta's tokens back: whether they are thinking or marker is not certain yet."""
        self.pending += delta.token_ids
        self.pending_logprobs += delta.logprobs["content"] if delta.logprobs else []
        delta.token_ids, delta.logprobs = [], None

    def release(self, delta: Delta) -> list[int]:
        """Give a delta the tokens that were held back before it; all its ids now."""
        if self.pending:
            delta.token_ids = self.pending + delta.token_ids
            entries = self.pending_logprobs + (delta.logprobs["content"] if delta.logprobs else [])
            delta.logprobs = {"content": entries} if entries else None
            self.pending, self.pending_logprobs = [], []
        return delta.token_ids

    def answer_text(self, text: str, step: Step, *, has_ids: bool) -> str:
        """The answer's text in one delta, without thinking that was reopened in it.

        By text only where ids do not tell: an answer may well speak of markers. The text of tokens that are all dropped
        is looked at for its markers alone, which need not be in it.

        Args:
            text: what the delta's tokens write.
            step: what they meant.
            has_ids: markers are single tokens.
        """
        unthought = self.unthought
        if has_ids and not step.wasted and not unthought.is_busy:
            return text
        if step.wasted and not step.answer and not unthought.is_busy and unthought.start not in text:
            text = ""
        return unthought.feed(text, is_last=step.is_over)
