"""Segments on vLLM's wire."""

import pytest

from gateway.backends.segments import chat_logprobs


@pytest.mark.parametrize(("most", "expected"), [(0, []), (2, [" a", " b"])])
def test_as_many_alternatives_as_were_asked_for(most: int, expected: list[str]) -> None:
    """VLLM's completions list the sampled token besides; chat clients get the likeliest tokens, and no more."""
    told = {
        "tokens": [" c"],
        "token_logprobs": [-3.0],
        "top_logprobs": [{" c": -3.0, " a": -0.5, " b": -1.5}],
    }
    (entry,) = chat_logprobs(told, most)["content"]
    assert (entry["token"], entry["logprob"]) == (" c", -3.0)
    assert [one["token"] for one in entry["top_logprobs"]] == expected
