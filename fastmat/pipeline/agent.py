"""A language model that sees a picture through experts alone: reason, call, read what they say, answer.

The loop of MM-ReAct (arXiv 2303.11381, section 3) with calls in OpenAI's `tools` format in place of words to be parsed;
the prompt is this project's. The model is sent no pixels, so what reaches it of an attack has passed an expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.protocol import encodable
from fastmat.pipeline.base import Expert
from fastmat.pipeline.endpoint import Endpoint
from fastmat.pipeline.results import CallEntry

PROMPT = (
    "You answer a question about an image that you cannot see. The tools look at it for you; each of them may err. "
    "Call those that help, compare what they say, then answer in one short sentence, without telling how you know."
)
MOST_CALLS = 8  # of one message (this project's choice); the loop is bounded by `max_steps`


class ToolError(Exception):
    """What is wrong with a call, as the model is told."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """answer: None where the model gave none within its steps. calls: in order."""

    answer: str | None
    calls: tuple[CallEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """question: asked of every picture. max_steps: messages of the model per picture; in the last it cannot call.

    A call that is malformed (no such tool, arguments that are not JSON, one missing) is told back to the model, and
    costs a step like any other. A message that holds neither a call nor a word ends the loop without an answer.
    """

    endpoint: Endpoint
    question: str
    max_steps: int = 6

    def ask(
        self, experts: Mapping[str, Expert], image: Tensor, *, stop_asked: Callable[[], bool] = lambda: False
    ) -> Transcript:
        """About one picture, [3, H, W] fp32 in [0, 1] on the device of the experts, which are called by their labels.

        stop_asked: looked at before each message; then KeyboardInterrupt is raised.
        Raises UserError when the endpoint fails (`Endpoint.chat`).
        """
        tools = [described(label, expert) for label, expert in experts.items()]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": self.question},
        ]
        calls: list[CallEntry] = []
        for step in range(1, self.max_steps + 1):
            if stop_asked():
                raise KeyboardInterrupt
            message = self.endpoint.chat(messages, tools, call=step < self.max_steps)
            asked = message.get("tool_calls") or []
            if not asked or not isinstance(asked, list):
                return Transcript(answer=text_of(message), calls=tuple(calls))
            echoed, answers = [], []
            for place, raw in enumerate(asked):
                name, written, given = read_call(raw)
                number = f"call_{step}_{place}"
                try:
                    if place >= MOST_CALLS:
                        raise ToolError(f"at most {MOST_CALLS} calls at once")
                    answer, failed = run_call(experts, name, given, image), False
                except ToolError as error:
                    answer, failed = f"error: {error}", True
                # Servers parse what is sent back, so what is malformed is not repeated as it came.
                known = {"name": name if name in experts else "unknown"}
                function = {**known, "arguments": json.dumps(given) if isinstance(given, dict) else "{}"}
                echoed.append({"id": number, "type": "function", "function": function})
                answers.append({"role": "tool", "tool_call_id": number, "content": answer})
                calls.append(CallEntry(tool=name, argument=written, answer=answer, failed=failed))
            messages += [{"role": "assistant", "content": text_of(message), "tool_calls": echoed}, *answers]
        return Transcript(answer=None, calls=tuple(calls))


def described(label: str, expert: Expert) -> dict[str, Any]:
    """An expert as a tool in OpenAI's format."""
    told = expert.argument
    properties = {told.name: {"type": "string", "description": told.description}} if told else {}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": label, "description": expert.description, "parameters": parameters}
    return {"type": "function", "function": function}


def text_of(message: Mapping[str, Any]) -> str | None:
    """The words of a message, None without any."""
    content = message.get("content")
    return encodable(content.strip()) or None if isinstance(content, str) else None


def read_call(raw: object) -> tuple[str, str, object]:
    """A call's tool, its arguments as they were written, and what they say: a dict, or text that is not one."""
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return "unknown", encodable(json.dumps(raw))[:1000], None
    written = function.get("arguments") or "{}"
    text = encodable(written if isinstance(written, str) else json.dumps(written))[:10_000]
    try:
        return encodable(function["name"])[:64], text, json.loads(text)
    except (ValueError, RecursionError):
        return encodable(function["name"])[:64], text, text


def run_call(experts: Mapping[str, Expert], name: str, given: object, image: Tensor) -> str:
    """What the expert says. Raises ToolError for a call that cannot be made."""
    expert = experts.get(name)
    if expert is None:
        raise ToolError(f"there is no tool '{name}'; the tools are {', '.join(experts)}")
    if not isinstance(given, dict):
        raise ToolError("the arguments are not a JSON object")
    argument = ""
    if expert.argument is not None:
        value = given.get(expert.argument.name)
        if not isinstance(value, str) or not value.strip():
            raise ToolError(f"argument '{expert.argument.name}' is missing; it must be a string that is not empty")
        argument = encodable(value)
    return expert.answer(image[None], [argument])[0]


def check_labels(labels: Mapping[str, object]) -> None:
    """Raise UserError for the label of an expert that is no name of a tool in OpenAI's format."""
    for label in labels:
        if not (len(label) <= 64 and label.isascii() and label.replace("-", "").replace("_", "").isalnum()):
            raise UserError(
                f"'{label}' is no name of a tool: an agent calls experts by labels of letters, digits, _ and -"
            )
