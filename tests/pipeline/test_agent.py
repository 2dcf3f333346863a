"""The reason-act loop: calls in OpenAI's format, mistakes told back, bounded steps."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from scripted_endpoint import Script, Served, calls, says, serving, told
from torch import Tensor

from fastmat.errors import UserError
from fastmat.pipeline.agent import MOST_CALLS, Agent, Transcript, check_labels
from fastmat.pipeline.base import Argument
from fastmat.pipeline.endpoint import Endpoint


class Caption:
    """Says how bright a picture is."""

    description = "Describes the image."
    argument = None
    from_gallery = False

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        return [f"brightness {float(image.mean()):.1f}" for image in images]


class Where:
    """Repeats what it is told."""

    description = "Tells where something is."
    argument = Argument(name="phrase", description="what to look for")
    from_gallery = False

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        return [f"{argument}: left" for argument in arguments]


EXPERTS = {"caption": Caption(), "where": Where()}
IMAGE = torch.full((3, 4, 4), 0.5)


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(script: Script, *, max_steps: int = 4, **more: Any) -> tuple[Transcript, Served]:
    with serving(script) as served:
        client = Endpoint(url=served.url, model="m", retries=0)
        agent = Agent(endpoint=client, question="what is it?", max_steps=max_steps)
        return agent.ask(EXPERTS, IMAGE, **more), served


def test_it_calls_reads_and_answers() -> None:
    script = iter([calls(("caption", {}), ("where", {"phrase": "a dog"})), says(" A dog, left. ")])
    said, served = run(lambda _: next(script))
    assert said.answer == "A dog, left."
    assert [(call.tool, call.answer, call.failed) for call in said.calls] == [
        ("caption", "brightness 0.5", False),
        ("where", "a dog: left", False),
    ]
    first, second = served.requests
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["messages"][1]["content"] == "what is it?"
    assert first["tools"][1] == {
        "type": "function",
        "function": {
            "name": "where",
            "description": "Tells where something is.",
            "parameters": {
                "type": "object",
                "properties": {"phrase": {"type": "string", "description": "what to look for"}},
                "required": ["phrase"],
            },
        },
    }
    assert first["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}, "required": []}
    # Every call is answered under the number it is sent back with.
    asked, *answers = second["messages"][2:]
    assert asked["role"] == "assistant" and asked["content"] is None
    assert [call["id"] for call in asked["tool_calls"]] == [message["tool_call_id"] for message in answers]
    assert [json.loads(call["function"]["arguments"]) for call in asked["tool_calls"]] == [{}, {"phrase": "a dog"}]
    assert told(second) == ["brightness 0.5", "a dog: left"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("paint", {}), "error: there is no tool 'paint'; the tools are caption, where"),
        (("where", "{not json"), "error: the arguments are not a JSON object"),
        (("where", "[1]"), "error: the arguments are not a JSON object"),
        (("where", "[" * 100_000), "error: the arguments are not a JSON object"),
        (("where", {}), "error: argument 'phrase' is missing; it must be a string that is not empty"),
        (("where", {"phrase": 3}), "error: argument 'phrase' is missing"),
        (("where", {"phrase": "  "}), "error: argument 'phrase' is missing"),
    ],
)
def test_a_malformed_call_is_told_back(call: tuple[str, object], error: str) -> None:
    script = iter([calls(call), calls(("caption", "")), says("grey")])
    said, served = run(lambda _: next(script))
    assert said.answer == "grey"
    assert [made.failed for made in said.calls] == [True, False]
    assert told(served.requests[1])[0].startswith(error)
    # What goes back is well formed, whatever came.
    (echoed,) = served.requests[1]["messages"][2]["tool_calls"]
    assert isinstance(json.loads(echoed["function"]["arguments"]), dict)
    assert echoed["function"]["name"] in ("caption", "where", "unknown")


@pytest.mark.parametrize("broken", [["text"], [{"id": "1"}], [{"function": {"name": 3}}], [None]])
def test_calls_without_a_name_are_told_back_too(broken: list[object]) -> None:
    script: Iterator[dict[str, Any]] = iter([{"content": "", "tool_calls": broken}, says("grey")])
    said, served = run(lambda _: next(script))
    assert said.answer == "grey" and said.calls[0].failed
    assert "there is no tool 'unknown'" in told(served.requests[1])[0]


def test_arguments_may_come_as_an_object() -> None:
    message = calls(("where", {}))
    message["tool_calls"][0]["function"]["arguments"] = {"phrase": "a cat"}
    script = iter([message, says("left")])
    said, _ = run(lambda _: next(script))
    assert said.calls[0].answer == "a cat: left" and said.calls[0].argument == '{"phrase": "a cat"}'


def test_steps_are_bounded_and_the_last_one_must_answer() -> None:
    said, served = run(lambda _: calls(("nothing", {})), max_steps=3)
    assert said.answer is None and len(served.requests) == 3 and len(said.calls) == 3
    assert ["tool_choice" in request for request in served.requests] == [False, False, True]


def test_calls_of_one_message_are_bounded() -> None:
    script = iter([calls(*[("caption", {})] * (MOST_CALLS + 2)), says("grey")])
    said, served = run(lambda _: next(script))
    assert [call.failed for call in said.calls] == [False] * MOST_CALLS + [True, True]
    assert told(served.requests[1])[-1] == f"error: at most {MOST_CALLS} calls at once"


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": "  "}, {"content": [1]}, {"tool_calls": {}}])
def test_a_message_that_says_nothing_is_no_answer(message: dict[str, Any]) -> None:
    assert run(lambda _: message)[0] == Transcript(answer=None, calls=())


def test_a_stop_is_seen_between_messages() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(lambda _: calls(("caption", {})), stop_asked=iter([False, True]).__next__)


def test_labels_are_names_of_tools() -> None:
    check_labels({"where_2-b": 0})
    for label in ("a.b", "ä", "x" * 65, "a b"):
        with pytest.raises(UserError, match="is no name of a tool"):
            check_labels({label: 0})
