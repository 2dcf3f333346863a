"""Questions to experts and to the agent about pictures, each asked once: what is in the journal is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmat.evaluation.evaluate import Attacked
from fastmat.evaluation.manifest import config_fingerprint
from fastmat.memory import Chunks
from fastmat.pipeline.agent import PROMPT, Agent
from fastmat.pipeline.base import Expert
from fastmat.pipeline.journal import Journal
from fastmat.pipeline.results import AGENT, Entry
from fastmat.types import Batch

Tick = Callable[[int], object]


def nothing(count: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An expert as a pipeline knows it. identity: sha256 of all that its answers depend on besides the picture;
    weights: sha256 of its model's."""

    expert: Expert
    identity: str
    weights: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The same N pictures, clean or attacked. key: sha256 of what decides their pixels; name: for readers.

    parts: batches of them in order, each with the distance [B] from the clean pictures; called when they are needed.
    """

    key: str
    name: str
    parts: Callable[[], Iterable[tuple[Batch, Tensor]]]


def clean_parts(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    return ((batch, torch.zeros(len(batch))) for batch in batches)


def attacked_parts(attacked: Iterable[Attacked]) -> Iterator[tuple[Batch, Tensor]]:
    return ((part.pairs, part.distance) for part in attacked)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked about every picture, and where the answers go.

    ids: names of the pictures. phrases: per picture, what an expert that has to be told something is told when no agent
    calls it. at_once: pictures. stop_asked: looked at between answers; then KeyboardInterrupt is raised, and all
    answers that came are in the journal.
    """

    journal: Journal
    ids: Sequence[str]
    phrases: Sequence[str]
    device: torch.device
    at_once: int
    stop_asked: Callable[[], bool]

    def experts(self, title: str, experts: Mapping[str, Asked], pictures: Pictures, *, tick: Tick = nothing) -> None:
        """Ask every expert about every picture. title: of the pipeline; tick: told how many answers came."""
        todo = {label: asked for label, asked in experts.items() if self.lacks(expert_key(asked, pictures))}
        if not todo:
            return
        chunks = Chunks(self.at_once, item="image", advice="take a device with more of it, or smaller models")
        for batch, distance in pictures.parts():
            for label, asked in todo.items():
                self._ask(f"{title}.{label}", asked, pictures, batch, distance, chunks)
                tick(len(batch))
                if self.stop_asked():
                    raise KeyboardInterrupt

    def _ask(
        self, title: str, asked: Asked, pictures: Pictures, batch: Batch, distance: Tensor, chunks: Chunks
    ) -> None:
        key, rows = expert_key(asked, pictures), batch.index.tolist()
        if not self.journal.missing(key, rows):
            return
        told = [self.phrases[row] if asked.expert.argument else "" for row in rows]

        def answers(start: int, stop: int) -> list[str]:
            return asked.expert.answer(batch.images[start:stop].to(self.device), told[start:stop])

        said = [answer for part in chunks.run(len(rows), answers) for answer in part]
        self.journal.add(
            Entry(
                key=key,
                row=row,
                image=self.ids[row],
                asked=title,
                of=pictures.name,
                argument=argument,
                answer=answer,
                distance=far,
            )
            for row, argument, answer, far in zip(rows, told, said, distance.tolist(), strict=True)
        )

    def agent(
        self,
        title: str,
        agent: Agent,
        experts: Mapping[str, Asked],
        pictures: Pictures,
        rows: Iterable[int],
        *,
        again: bool = False,
        tick: Tick = nothing,
    ) -> None:
        """Let the agent answer about the pictures `rows`, one by one. again: a second time, as if never asked."""
        key = agent_key(agent, experts, pictures, again=again)
        todo = frozenset(self.journal.missing(key, rows))
        if not todo:
            return
        called = {label: asked.expert for label, asked in experts.items()}
        for batch, distance in pictures.parts():
            for place, row in enumerate(batch.index.tolist()):
                if row in todo:
                    image = batch.images[place].to(self.device)
                    said = agent.ask(called, image, stop_asked=self.stop_asked)
                    entry = Entry(
                        key=key,
                        row=row,
                        image=self.ids[row],
                        asked=f"{title}.{AGENT}",
                        of=f"{pictures.name}, again" if again else pictures.name,
                        answer=said.answer,
                        distance=float(distance[place]),
                        calls=list(said.calls),
                    )
                    self.journal.add([entry])
                    tick(1)

    def lacks(self, key: str, rows: Iterable[int] | None = None) -> bool:
        """Whether an answer about `rows` (None: all) is not there yet."""
        return bool(self.journal.missing(key, range(len(self.ids)) if rows is None else rows))


def expert_key(asked: Asked, pictures: Pictures) -> str:
    return config_fingerprint({"expert": asked.identity, "pictures": pictures.key})


def agent_key(agent: Agent, experts: Mapping[str, Asked], pictures: Pictures, *, again: bool = False) -> str:
    """What an agent's answer depends on, as far as one can know."""
    return config_fingerprint(
        {
            "address": agent.endpoint.address,
            "model": agent.endpoint.model,
            "prompt": PROMPT,
            "question": agent.question,
            "max_steps": agent.max_steps,
            "experts": {label: (asked.identity, asked.expert.description) for label, asked in experts.items()},
            "pictures": pictures.key,
            "again": again,
        }
    )
