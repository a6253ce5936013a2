"""From what a client asked to what the engine runs.

Owns: everything about a request that needs the model: the rendered prompt, the grammar, and the checks
against vocabulary and context window. CPU-bound, touches no tensor; call it off the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.chat import render_chat
from kernels.errors import RequestRefused
from kernels.grammar import format_grammar, tools_grammar
from kernels.params import ChatInput, GenerationRequest, Prompt
from kernels.thinking import ThinkingPlan, chain_is_open

if TYPE_CHECKING:
    from kernels.model import LanguageModel
    from kernels.params import CompletionInput, Json, Options, ThinkingRules


def compose(model: LanguageModel, given: ChatInput | CompletionInput, options: Options) -> GenerationRequest:
    """The engine's request.

    Raises: RequestRefused naming the field that cannot be honoured.
    """
    if isinstance(given, ChatInput):
        tools = [] if given.tool_choice == "none" else given.tools
        grammar = _grammar(model, given)
        prompt = _chat_prompt(model, given, tools, options.thinking, has_grammar=grammar is not None)
        prompts: tuple[Prompt, ...] = (prompt,)
        field, limit = "messages", "max_completion_tokens"
    else:
        tools = []
        grammar = format_grammar(given)
        prompts = _completion_prompts(model, given, options.thinking)
        field, limit = "prompt", "max_tokens"
    _check_ids(model, prompts, options)
    for prompt in prompts:
        _check_length(model, prompt, options, field, limit)
    if options.stopping.min_tokens > options.stopping.max_tokens:
        raise RequestRefused("`min_tokens` exceeds the output limit.", param="min_tokens")
    return GenerationRequest(prompts=prompts, options=options, grammar=grammar, parses_tools=bool(tools))


def thinking_plan(
    model: LanguageModel, rules: ThinkingRules, *, is_open: bool, has_grammar: bool
) -> ThinkingPlan | None:
    """The rules in the model's tokens; None if nothing needs watching.

    Args:
        model: whose tokens.
        rules: as asked.
        is_open: the prompt ends inside the thinking.
        has_grammar: a grammar watches the answer; it lets no opening marker of several tokens through.
    """
    if not rules.native and not is_open:
        return None
    start = model.tokens.marker(rules.start.strip())
    may_open = rules.native and (start.single is not None or not has_grammar)
    return ThinkingPlan(
        cap=rules.cap if rules.enabled else 0,
        start=start if may_open else None,
        end=model.tokens.marker(rules.end),
        wrap_up=model.tokens.marker(rules.wrap_up),
        # A model that thinks by itself goes on from the marker as it was trained to; another one needs
        # to see that the block is over.
        after=model.tokens.marker("" if rules.native else "\n\n"),
        reports_cap=rules.enabled,
    )


def _chat_prompt(
    model: LanguageModel, given: ChatInput, tools: list[Json], rules: ThinkingRules, *, has_grammar: bool
) -> Prompt:
    text = render_chat(model.tokens, given.messages, tools, given.template_kwargs)
    is_open = rules.native and chain_is_open(text, rules.start, rules.end, anywhere=False)
    if not is_open and rules.enabled and rules.cap != 0:
        # A model that does not think by itself gets its chain begun. So does one whose opening marker
        # takes several tokens when a grammar watches the answer, see thinking_plan.
        is_text_marker = model.tokens.marker(rules.start.strip()).single is None
        if not rules.native or (has_grammar and is_text_marker):
            text += rules.start + "\n"
            is_open = True
    return Prompt(token_ids=tuple(model.tokens.encode(text)), chain_open=is_open)


def _completion_prompts(model: LanguageModel, given: CompletionInput, rules: ThinkingRules) -> tuple[Prompt, ...]:
    prompts = []
    for each in given.prompts:
        if isinstance(each, str):
            ids, text = model.tokens.encode(each, add_special_tokens=given.add_special_tokens), each
        else:
            ids, text = list(each), model.tokens.decode(each)
        is_open = rules.native and chain_is_open(text, rules.start, rules.end, anywhere=True)
        prompts.append(Prompt(token_ids=tuple(ids), chain_open=is_open))
    return tuple(prompts)


def _grammar(model: LanguageModel, given: ChatInput) -> str | None:
    """What the answer may look like; None leaves it free."""
    choice = given.tool_choice
    if not given.tools or choice == "none":
        if given.tools or choice in {"auto", "none"}:
            return format_grammar(given)
        raise RequestRefused("`tool_choice` asks for a call but there are no `tools`.", param="tool_choice")
    if given.response_choices or given.response_regex is not None:
        message = f"`{given.response_param}` goes with `tools` only as a JSON Schema."
        raise RequestRefused(message, param=given.response_param)
    functions = [tool["function"] for tool in given.tools]
    callable_ = functions
    if isinstance(choice, tuple):
        callable_ = [function for function in functions if function["name"] == choice[0]]
        if not callable_:
            raise RequestRefused(f"`tool_choice` names {choice[0]!r}, which is not in `tools`.", param="tool_choice")
    return tools_grammar(
        callable_,
        is_required=choice != "auto",
        is_parallel=given.parallel_tool_calls and not isinstance(choice, tuple),
        marker_ids=model.tokens.tool_marker_ids,
        response_schema=given.response_schema,
    )


def _check_ids(model: LanguageModel, prompts: tuple[Prompt, ...], options: Options) -> None:
    """Token ids that came from the client must exist."""
    size = model.tokens.size
    named = {
        "prompt": (i for prompt in prompts for i in prompt.token_ids),
        "logit_bias": options.sampling.logit_bias,
        "stop_token_ids": options.stopping.token_ids,
    }
    for field, ids in named.items():
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise RequestRefused(f"`{field}`: {wrong} is no token of this model, which has {size}.", param=field)


def _check_length(model: LanguageModel, prompt: Prompt, options: Options, field: str, limit: str) -> None:
    """Prompt and output must fit the context window."""
    size, most, window = len(prompt.token_ids), options.stopping.max_tokens, model.max_len
    if not size:
        raise RequestRefused(f"`{field}` must hold at least one token.", param=field)
    if size + most > window:
        raise RequestRefused(
            f"This model's maximum context length is {window} tokens. However, you requested {most} output "
            f"tokens and your prompt contains {size} input tokens, for a total of {size + most} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens.",
            param=field if size >= window else limit,
            code="context_length_exceeded",
        )
