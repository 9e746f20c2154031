"""The official Python client. Every answer is checked against its own types, strictly."""

import asyncio
import json
import time
from typing import Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

SAY = [{"role": "user", "content": "Say something about é 東京 🚆."}]
ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Lima", "Pune"]},
                   "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Weather(BaseModel):
    """What the schema asks for; more would be an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    city: Literal["Oslo", "Lima", "Pune"]
    days: int = Field(ge=1, le=9)


def tool(name):
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": ARGUMENTS}}


def flat(name):
    return {"type": "function", "name": name, "description": "A tool.", "parameters": ARGUMENTS, "strict": True}


def connect(server, **options):
    options = {"api_key": "any", "max_retries": 0, "timeout": 60, **options}
    return OpenAI(base_url=f"{server.url}/v1", _strict_response_validation=True, **options)


@pytest.fixture(scope="module")
def client(server):
    return connect(server)


def ask(client, **options):
    options = {"model": "tiny", "messages": SAY, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**options)


# Chat completions.


def test_a_reply_has_all_that_its_type_wants(client):
    before = int(time.time())
    reply = ask(client)
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == "tiny"
    assert before <= reply.created <= time.time() and reply.system_fingerprint.startswith("fp_")
    assert reply._request_id.startswith("req_")
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content and choice.message.tool_calls is None and choice.logprobs is None
    assert reply.usage.completion_tokens == 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24
    again = ask(client)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert again.usage.completion_tokens_details.reasoning_tokens == 0
    assert again.id != reply.id
    timings = again.timings
    assert timings["prompt_tokens_read"] == 0 and timings["tokens_generated"] == 24
    for name in ["queue_ms", "match_ms", "restore_ms", "prefill_ms", "ttft_ms", "decode_ms"]:
        assert 0 <= timings[name] < 60_000, timings


def test_a_stream_says_what_the_reply_says(client):
    whole = ask(client, logprobs=True, top_logprobs=2)
    chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *said, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 24 and last.usage.total_tokens == whole.usage.total_tokens
    assert all(len(c.choices) == 1 and c.usage is None for c in said)
    assert "".join(c.choices[0].delta.content or "" for c in said) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in said if c.choices[0].finish_reason] == ["length"]
    assert said[-1].choices[0].finish_reason == "length"
    entries = [e for c in said if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    plain = list(ask(client, stream=True))
    assert all(c.usage is None and len(c.choices) == 1 for c in plain)


def test_the_helper_for_streams(client):
    text, done = "", None
    stop = ask(client).choices[0].message.content[9:12]
    with client.chat.completions.stream(model="tiny", messages=SAY, max_tokens=24, temperature=0, stop=stop) as stream:
        for event in stream:
            text += event.delta if event.type == "content.delta" else ""
            done = event.content if event.type == "content.done" else done
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text == done == ask(client, stop=stop).choices[0].message.content
    # The helper holds a reply that was cut off for an error, if it was to be parsed.
    with pytest.raises(openai.LengthFinishReasonError), client.chat.completions.stream(
            model="tiny", messages=SAY, max_tokens=2, response_format=Weather) as stream:
        list(stream)


def test_content_of_parts_and_all_roles(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "In English."}]},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo", "days": 1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "look", "arguments": '{"city": "Lima", "days": 2}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sun"}]},
    ]
    short, long = ask(client, messages=messages[:3]), ask(client, messages=messages, tools=[tool("look")])
    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 40


def test_choices_by_fork(server, client):
    read = server.metric("ampoule_prompt_tokens_read_total")
    messages = [{"role": "user", "content": f"Ten of it, {time.time()}"}]
    options = dict(n=5, temperature=1.0, seed=3, messages=messages, extra_body={"ignore_eos": True})
    reply = ask(client, **options)
    assert sorted(c.index for c in reply.choices) == [0, 1, 2, 3, 4]
    assert len({c.message.content for c in reply.choices}) == 5
    assert reply.usage.completion_tokens == 5 * 24
    assert server.metric("ampoule_prompt_tokens_read_total") - read <= reply.usage.prompt_tokens
    same = ask(client, n=3, messages=messages)
    assert len({c.message.content for c in same.choices}) == 1
    streamed = {}
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {c.index: c.message.content for c in reply.choices}


def test_logprobs(client):
    reply = ask(client, logprobs=True, top_logprobs=5)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 24
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == reply.choices[0].message.content
    for entry in entries:
        top = [t.logprob for t in entry.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True) and top[0] <= 0
        assert entry.logprob == top[0] and entry.token == entry.top_logprobs[0].token  # temperature 0
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_sampling_does_what_it_says(client):
    draw = lambda **options: ask(client, temperature=1.5, **options).choices[0].message.content
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1, top_p=1e-9) == ask(client).choices[0].message.content
    assert draw(seed=1, extra_body={"top_k": 1}) == ask(client).choices[0].message.content
    assert draw(seed=1, extra_body={"min_p": 1.0}) == ask(client).choices[0].message.content
    letter = client.post("/../tokenize", body={"prompt": "q"}, cast_to=object)["tokens"][0]
    assert draw(logit_bias={str(letter): 100}) == "q" * 24
    free, held = draw(seed=5), draw(seed=5, frequency_penalty=2.0, presence_penalty=2.0)
    assert free != held


def test_lengths_and_stops(client):
    text = ask(client).choices[0].message.content
    assert ask(client, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5
    stop = text[6:8]
    reply = ask(client, stop=[stop, "never in there"])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert ask(client, stop=text[0]).choices[0].message.content == ""


# Tools.


def check(call, names):
    assert call.type == "function" and call.id.startswith("call_") and call.function.name in names
    Weather.model_validate_json(call.function.arguments)


def test_a_named_tool_is_called(client):
    reply = ask(client, tools=[tool("a"), tool("b")], tool_choice={"type": "function", "function": {"name": "b"}}, max_tokens=200)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert len(choice.message.tool_calls) == 1
    check(choice.message.tool_calls[0], {"b"})


def test_required_tools_and_parallel_calls(client):
    counts = set()
    for seed in range(12):
        options = dict(tools=[tool("a"), tool("b")], tool_choice="required", max_tokens=600, temperature=1.0, seed=seed)
        choice = ask(client, **options).choices[0]
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "tool_calls"
        counts.add(min(2, len(choice.message.tool_calls)))
        for call in choice.message.tool_calls:
            check(call, {"a", "b"})
        assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
        one = ask(client, parallel_tool_calls=False, **options).choices[0]
        assert one.finish_reason == "tool_calls" and len(one.message.tool_calls) == 1
        # The stream has the same calls, each under its index.
        calls, finish = {}, None
        for chunk in ask(client, stream=True, **options):
            delta = chunk.choices[0].delta
            assert not delta.content
            finish = chunk.choices[0].finish_reason or finish
            for part in delta.tool_calls or []:
                known = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
                known["arguments"] += part.function.arguments or ""
        assert finish == "tool_calls" and list(calls) == list(range(len(calls)))
        assert [(c["name"], c["arguments"]) for c in calls.values()] == [
            (c.function.name, c.function.arguments) for c in choice.message.tool_calls]
        if counts == {1, 2}:
            return
    raise AssertionError(f"one call and several were to be seen, not {counts}")


def test_no_tool_is_called_where_none_may_be(client):
    for seed in range(3):
        reply = ask(client, tools=[tool("a")], tool_choice="none", temperature=1.0, seed=seed)
        assert reply.choices[0].message.tool_calls is None and reply.choices[0].finish_reason == "length"


def test_a_conversation_with_tools_is_read_once(client):
    """The client sends all of it each time; only what is new is read."""
    messages = [{"role": "system", "content": f"You are a guide. {time.time()}"}]
    tools, known, cached = [tool("look")], 0, []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Question {turn}?"})
        forced = {"type": "function", "function": {"name": "look"}}
        first = ask(client, messages=messages, tools=tools, tool_choice=forced, max_tokens=200)
        call = first.choices[0].message.tool_calls[0]
        messages.append(first.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"weather": "rain", "turn": turn})})
        second = ask(client, messages=messages, tools=tools, tool_choice="none", max_tokens=12)
        messages.append(second.choices[0].message.model_dump(exclude_none=True))
        for reply in (first, second):
            cached.append(reply.usage.prompt_tokens_details.cached_tokens)
            assert turn == 0 or cached[-1] > known // 2, (cached, known)
            known = reply.usage.prompt_tokens
    assert cached[2:] == sorted(cached[2:]) and cached[-1] > 0.8 * known, (cached, known)


# Formats.


def test_json_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": ARGUMENTS}}
    for seed in range(3):
        reply = ask(client, response_format=wanted, max_tokens=300, temperature=1.0, seed=seed)
        assert reply.choices[0].finish_reason == "stop"
        Weather.model_validate_json(reply.choices[0].message.content)
    parsed = client.chat.completions.parse(
        model="tiny", messages=SAY, response_format=Weather, max_tokens=300, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    text = "".join(c.choices[0].delta.content or "" for c in ask(client, response_format=wanted, max_tokens=300, stream=True))
    assert Weather.model_validate_json(text) == parsed.choices[0].message.parsed


def test_json_object(client):
    for seed in range(6):
        reply = ask(client, response_format={"type": "json_object"}, max_tokens=400, temperature=1.0, seed=seed)
        if reply.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(reply.choices[0].message.content), dict)
            return
        assert reply.choices[0].message.content.startswith("{")
    raise AssertionError("no object was ever whole")


# Completions, models.


def test_completions(client):
    options = dict(model="tiny", prompt="The harbour", max_tokens=10, temperature=0)
    whole = client.completions.create(**options, logprobs=3, echo=True)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.choices[0].text.startswith("The harbour")
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.token_logprobs) == 10
    # The type of a chunk says that every one has a finish_reason; the API itself sends null until the last.
    loose = OpenAI(base_url=client.base_url, api_key="any", max_retries=0)
    chunks = list(loose.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "The harbour" + "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 10


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


# Responses.


def respond(client, **options):
    options = {"model": "tiny", "input": "Hello", "max_output_tokens": 12, "temperature": 0, **options}
    return client.responses.create(**options)


def test_a_response_and_those_that_follow_it(client):
    first = respond(client, instructions="Be short.", metadata={"who": "ann"})
    assert first.object == "response" and first.id.startswith("resp_") and first.model == "tiny"
    assert (first.status, first.incomplete_details.reason, first.error) == ("incomplete", "max_output_tokens", None)
    assert first.output[0].type == "message" and first.output_text == first.output[0].content[0].text != ""
    assert first.metadata == {"who": "ann"} and first.instructions == "Be short."
    assert first.usage.output_tokens == 12 and first.usage.total_tokens == first.usage.input_tokens + 12
    after = lambda previous: respond(client, input="And then?", instructions="Be short.", previous_response_id=previous)
    second = after(first.id)
    third = after(second.id)
    assert second.previous_response_id == first.id
    # What was said is in the state: all but the new message is there.
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.total_tokens - 1
    # An older one is a fork: the same question has the same answer, whatever came since.
    assert after(first.id).output_text == second.output_text
    assert client.responses.retrieve(first.id) == first
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        after(second.id)
    assert after(third.id).output_text, "what followed the one that went is still there"


def test_responses_that_are_not_stored(client):
    response = respond(client, store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_input_items(client):
    items = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Three"}]},
        {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"role": "user", "content": "Six", "id": None, "status": None},
    ]
    response = respond(client, input=items, tools=[flat("look")])
    page = client.responses.input_items.list(response.id, order="asc", limit=4)
    assert [item.type for item in page.data] == ["message", "message", "message", "function_call"]
    assert page.data[0].content[0].text == "One" and page.data[1].role == "assistant" and page.has_more
    all_of_them = list(client.responses.input_items.list(response.id, order="asc", limit=4))
    assert len(all_of_them) == 6 and all_of_them[4].output == "rain" and len({i.id for i in all_of_them}) == 6
    newest = client.responses.input_items.list(response.id).data
    assert [i.id for i in newest] == [i.id for i in reversed(all_of_them)]


TEXT_EVENTS = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done", "response.output_item.done",
    "response.incomplete",
]


def test_events_come_in_their_order(client):
    events = list(respond(client, stream=True, include=["message.output_text.logprobs"], top_logprobs=2))
    kinds = [e.type for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == TEXT_EVENTS
    assert [e.sequence_number for e in events] == list(range(len(events)))
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    text, final = "".join(e.delta for e in deltas), events[-1].response
    assert final.output_text == text == respond(client).output_text
    assert [e.text for e in events if e.type == "response.output_text.done"] == [text]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert {e.item_id for e in deltas} == {final.output[0].id}
    entries = final.output[0].content[0].logprobs
    assert len(entries) == 12 and [e.token for d in deltas for e in d.logprobs] == [e.token for e in entries]
    assert client.responses.retrieve(final.id) == final


def test_the_helper_for_response_streams(client):
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=12, temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        # The helper has a final response only of what was completed.
        with pytest.raises(RuntimeError):
            stream.get_final_response()
    assert text == respond(client).output_text
    with client.responses.stream(model="tiny", input="Hello", text_format=Weather, max_output_tokens=300, temperature=0) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_functions_of_responses(client):
    tools, forced = [flat("look"), flat("book")], {"type": "function", "name": "book"}
    options = dict(tools=tools, tool_choice=forced, max_output_tokens=300)
    first = respond(client, **options)
    assert first.status == "completed" and first.tools[1].name == "book" and first.tool_choice.name == "book"
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "book", "completed")
    Weather.model_validate_json(call.arguments)
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "booked"}
    second = respond(client, input=[answer], previous_response_id=first.id, tools=tools, tool_choice="none")
    assert second.output_text
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    # Without a stored response: the items come back as they went.
    whole = [{"role": "user", "content": "Hello"}, *first.output, answer]
    stateless = respond(client, input=whole, tools=tools, tool_choice="none", store=False)
    assert stateless.output_text
    # As events.
    events = list(respond(client, stream=True, **options))
    kinds = [e.type for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert arguments == call.arguments == events[-1].response.output[0].arguments
    assert respond(client, stream=False, **options).parallel_tool_calls is True


def test_json_schema_of_responses(client):
    parsed = client.responses.parse(model="tiny", input="Hello", text_format=Weather, max_output_tokens=300, temperature=0)
    assert isinstance(parsed.output_parsed, Weather) and parsed.text.format.type == "json_schema"
    raw = respond(client, max_output_tokens=300,
                  text={"format": {"type": "json_schema", "name": "weather", "schema": ARGUMENTS, "strict": True}})
    assert raw.status == "completed" and Weather.model_validate_json(raw.output_text) == parsed.output_parsed


def test_thoughts_are_kept_apart(client):
    """The tag that ends them is forced by a bias; what the model thinks is its own."""
    close = client.post("/../tokenize", body={"prompt": "</think>"}, cast_to=object)["tokens"]
    if len(close) != 1:
        pytest.skip("this model's tokenizer has no token that ends thoughts")
    body = {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {str(close[0]): 4.0}}
    for seed in range(20):
        response = respond(client, extra_body={**body, "seed": seed}, temperature=1.0, max_output_tokens=60)
        if [item.type for item in response.output] == ["reasoning", "message"]:
            thoughts, message = response.output
            assert thoughts.content[0].type == "reasoning_text" and thoughts.content[0].text
            assert 0 < response.usage.output_tokens_details.reasoning_tokens < 60
            assert "</think>" not in response.output[0].content[0].text
            chat = ask(client, extra_body=body, temperature=1.0, seed=seed, max_tokens=60,
                       messages=[{"role": "user", "content": "Hello"}])
            assert chat.choices[0].message.reasoning_content == thoughts.content[0].text
            assert chat.choices[0].message.content == message.content[0].text
            return
    raise AssertionError("no seed had thoughts and a message")


# Errors.


def test_wrong_requests_raise_what_they_should(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, temperature=9)
    assert (wrong.value.status_code, wrong.value.param, wrong.value.type) == (400, "temperature", "invalid_request_error")
    assert wrong.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(client, extra_body={"nonsense": 1})
    assert (unknown.value.code, unknown.value.param) == ("unknown_parameter", "nonsense")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, messages=[{"role": "user", "content": "word " * 20_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as long:
        respond(client, input="word " * 20_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-9")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as missing:
        respond(client, previous_response_id="resp_nothing")
    assert missing.value.code == "previous_response_not_found"
    for refused in [{"background": True}, {"truncation": "auto"}, {"tools": [{"type": "web_search"}]},
                    {"conversation": "conv_1"}, {"prompt": {"id": "p"}}, {"service_tier": "flex"}]:
        with pytest.raises(openai.BadRequestError) as wrong:
            respond(client, **refused)
        assert wrong.value.param.startswith(next(iter(refused))), refused
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x", encoding_format="float")
    with pytest.raises(openai.APIStatusError) as large:
        ask(client, messages=[{"role": "user", "content": "x" * (10 << 20)}])
    assert large.value.status_code == 413


def test_keys(guarded):
    for key in ["wrong-key-of-tests", "first-key-of-test", "first-key-of-testsx", "x"]:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(connect(guarded, api_key=key))
        assert refused.value.status_code == 401 and refused.value.code == "invalid_api_key"
    first, second = (connect(guarded, api_key=f"{k}-key-of-tests") for k in ["first", "second"])
    mine = respond(first)
    assert first.responses.retrieve(mine.id).id == mine.id
    with pytest.raises(openai.NotFoundError):
        second.responses.retrieve(mine.id)
    with pytest.raises(openai.NotFoundError):
        respond(second, previous_response_id=mine.id)
    with pytest.raises(openai.NotFoundError):
        second.responses.delete(mine.id)
    # One key's prompts are no other's: not even as time saved.
    secret = [{"role": "user", "content": "A secret of some length that the first key asks about."}]
    ask(first, messages=secret)
    assert ask(first, messages=secret).usage.prompt_tokens_details.cached_tokens > 0
    assert ask(second, messages=secret).usage.prompt_tokens_details.cached_tokens == 0
    # Nor one cache key's another's.
    assert ask(first, messages=secret, prompt_cache_key="other").usage.prompt_tokens_details.cached_tokens == 0
    assert ask(first, messages=secret, prompt_cache_key="other").usage.prompt_tokens_details.cached_tokens > 0


def test_a_full_queue(narrow):
    client = connect(narrow)
    stream = ask(client, stream=True, max_tokens=6000, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as full:
        ask(client)
    assert full.value.status_code == 429 and full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    # The client's own patience is enough once there is room.
    started = time.monotonic()
    patient = connect(narrow, max_retries=5)
    stream.close()
    assert ask(patient).usage.completion_tokens == 24
    assert time.monotonic() - started < 20


def test_many_at_once(server):
    async def all_of_them():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            asks = [client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": f"Number {n % 4}"}], max_tokens=8, temperature=0)
                for n in range(16)]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*asks)]

    said = asyncio.run(all_of_them())
    assert said[:4] * 4 == said
