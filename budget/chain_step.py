"""What a chain made of some tokens: the record that its state machine (chain.py) hands out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Step:
    """What some tokens meant.

    Attributes:
        thinking: of them, thinking tokens.
        answer: answer tokens.
        injected: markers, sampled or forced, and other forced tokens.
        wasted: tokens that are dropped: they reach no client and no later segment.
        ids: those that were kept, forced ones included, in order.
        forced: how many at the end of `ids` were forced.
        shown: of the forced ones, how many are a heading, the wrap-up or "Wait", which belong to the thinking's text.
        told: the text of a heading that was forced.
        begins_call: a tool call began here, and was forced anew.
        is_over: the segment is over: ask for the next one.
        ended_by: the bound that ended the thinking here.
    """

    thinking: int = 0
    answer: int = 0
    injected: int = 0
    wasted: int = 0
    ids: list[int] = field(default_factory=list)
    forced: tuple[int, ...] = ()
    shown: int = 0
    told: str = ""
    begins_call: bool = False
    is_over: bool = False
    ended_by: str | None = None

    def plus(self, later: Step) -> Step:
        """This step and the next as one."""
        return Step(
            thinking=self.thinking + later.thinking,
            answer=self.answer + later.answer,
            injected=self.injected + later.injected,
            wasted=self.wasted + later.wasted,
            ids=self.ids + later.ids,
            forced=self.forced + later.forced,
            shown=self.shown + later.shown,
            told=self.told + later.told,
            begins_call=self.begins_call or later.begins_call,
            is_over=self.is_over or later.is_over,
            ended_by=self.ended_by or later.ended_by,
        )
