"""An agent framework (openai-agents) that drives tools over several turns, by both APIs.

Weights are random, so the choice of a tool is forced; its arguments are the model's own, held to the tool's schema.
"""

import asyncio
import json
from typing import Literal

import pytest
from agents import (Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner,
                    function_tool, set_tracing_disabled)
from openai import AsyncOpenAI

set_tracing_disabled(True)


def crew(calls):
    """The tools; each writes down how it was called."""

    @function_tool
    def weather(city: Literal["Oslo", "Lima"], day: Literal[1, 2, 3]) -> str:
        """The weather of a city."""
        calls.append(("weather", city, day))
        return f"rain in {city}"

    @function_tool
    def book(city: Literal["Oslo", "Lima"], nights: Literal[1, 2, 3]) -> str:
        """Books a room."""
        calls.append(("book", city, nights))
        return f"booked: {city}, {nights}"

    return [weather, book]


def agent(model, tools, choice):
    settings = ModelSettings(tool_choice=choice, temperature=0, max_tokens=300)
    return Agent(name="guide", instructions="You help travellers.", model=model, tools=tools, model_settings=settings)


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel])
def test_an_agent_calls_tools_over_three_turns(nano, kind):
    calls = []
    tools = crew(calls)

    async def converse():
        async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="any", max_retries=0) as client:
            model = kind("ampoule-nano", openai_client=client)
            history, results = [], []
            for question, choice in [("Will it rain?", "weather"), ("Then book a room.", "book"), ("And again?", "weather")]:
                history.append({"role": "user", "content": question})
                # After the call the framework leaves the choice to the model: it answers in text, or calls once more.
                result = await Runner.run(agent(model, tools, choice), history, max_turns=4)
                history = result.to_input_list()
                results.append(result)
            return history, results

    history, results = asyncio.run(converse())
    assert [name for name, *_ in calls][:1] == ["weather"] and {"weather", "book"} == {name for name, *_ in calls}
    outputs = [item["output"] for item in history if item.get("type") == "function_call_output"]
    asked = [json.loads(item["arguments"]) for item in history if item.get("type") == "function_call"]
    assert len(outputs) == len(asked) == len(calls) >= 3
    for (name, city, number), arguments, output in zip(calls, asked, outputs):
        assert list(arguments.values()) == [city, number] and city in output
    assert all(isinstance(result.final_output, str) for result in results)
    # Turns resend all that was said; most of it was there already.
    usage = results[-1].context_wrapper.usage
    assert usage.requests >= 2
    assert usage.input_tokens_details.cached_tokens > usage.input_tokens * 0.6, usage


def test_an_agent_streams_and_goes_on_from_a_stored_response(nano):
    calls = []
    tools = crew(calls)

    async def converse():
        async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="any", max_retries=0) as client:
            model = OpenAIResponsesModel("ampoule-nano", openai_client=client)
            first = Runner.run_streamed(agent(model, tools, "book"), "Book a room.", max_turns=4)
            kinds = [event.data.type async for event in first.stream_events() if event.type == "raw_response_event"]
            second = await Runner.run(agent(model, tools, "weather"), "And the weather?",
                                      previous_response_id=first.last_response_id, max_turns=4)
            return kinds, first, second

    kinds, first, second = asyncio.run(converse())
    assert kinds.count("response.created") == len(first.raw_responses) >= 2
    assert "response.function_call_arguments.done" in kinds
    assert [name for name, *_ in calls][:1] == ["book"] and calls[-1][0] in {"book", "weather"}
    assert ("weather" in {name for name, *_ in calls})
    known = first.raw_responses[-1].usage
    follow = second.raw_responses[0].usage
    assert follow.input_tokens > known.total_tokens, "the conversation was there"
    assert follow.input_tokens_details.cached_tokens >= known.total_tokens - 1, (known, follow)
