"""The rounds of a federation: who is asked, what is averaged, what is written.

Flower's own ``strategy.start`` always begins at round 1, samples before the nodes are there and stops at
the first malformed reply; this loop does none of that and keeps its state in one place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import fedmask._env  # noqa: F401  (before flwr is imported)
from flwr.serverapp import Grid

from fedmask.channel import up_codec
from fedmask.config import RunConfig
from fedmask.errors import EnvelopeError, FederationError, FedmaskError
from fedmask.flower import EVALUATE, EXAMPLES, HELD_OUT, SECONDS, TRAIN, behind_version
from fedmask.ledger import Kind, Ledger
from fedmask.rng import rng_for
from fedmask.training import planned_steps
from fedmask.workspace import Workspace
from server.bounds import within_bounds
from server.downlink import down_contents
from server.evaluation import Scores, central_scores, task_means
from server.exchange import SURPLUS, Answer, Late, Request, enter, exchange, most_bytes, no_note
from server.joining import Roster
from server.journal import Journal
from server.norms import beside_median, norm
from server.observer import Observer
from server.replies import Most, read_scores, read_training
from server.state import RunState
from server.strategy import Contribution, Strategy
from server.unequal import start_tally
from server.uplink import own_mask, up_terms

Row = dict[str, Any]
_LATE_ROUNDS = 3  # for so many rounds a late reply is looked for, to be counted and named
_NO_TIME = "it had lost what it was sent before, and the round had no time left"
_ADDED = np.empty(0, np.float32)


def most_claims(workspace: Workspace, own: Mapping[int, tuple[int, int]] | None = None) -> dict[int, Most]:
    """What each client can truthfully claim about its own work, by partition.

    ``own``: rows (trained on, held out) that clients with data of their own said they have when they joined.
    """
    plan, out = workspace.config.train, {}
    for client in range(workspace.config.clients):
        if workspace.is_own(client):
            kept_rows, held_rows = (own or {}).get(client, (0, 0))
        else:
            kept_rows, held_rows = (len(part) for part in workspace.split(client))
        out[client] = Most(kept_rows, held_rows, planned_steps(plan, kept_rows))
    return out


def sample_clients(config: RunConfig, joined: Sequence[int], round: int) -> tuple[int, ...]:
    """The partitions asked in a round, of those that ``joined`` (sorted); over-selected ones included."""
    wanted = config.server.over_select * (config.server.clients_per_round or len(joined))
    count = min(math.ceil(wanted), len(joined))
    if count == len(joined):
        return tuple(joined)
    rng = rng_for(config.seed, round, -1, "sample")
    return tuple(sorted(int(client) for client in rng.choice(joined, size=count, replace=False)))


class Federation:
    """One run's server: everything between joining and the summary."""

    def __init__(
        self,
        workspace: Workspace,
        grid: Grid,
        roster: Roster,
        strategy: Strategy,
        ledger: Ledger,
        observer: Observer,
        most: Mapping[int, Most],
        journal: Journal | None = None,
    ) -> None:
        """``most``: by partition, what a client may claim (see ``most_claims``)."""
        self.workspace = workspace
        self.config = workspace.config
        self.grid = grid
        self.roster = roster
        self.strategy = strategy
        self.ledger = ledger
        self.observer = observer
        self.most = most
        self.journal = journal
        self.late: Late = {}

    def sample(self, round: int) -> tuple[int, ...]:
        """The partitions asked in a round: a function of seed, round and who joined, of nothing else."""
        return sample_clients(self.config, sorted(self.roster.nodes), round)

    def start_row(self, dev: Scores, began: float) -> Row:
        """Round 0: what the untrained model scores (``dev``), and who did not join."""
        row = self._row(0, (), [])
        row["rejected"] = list(self.roster.failed)
        for (way,), total in self.ledger.totals("direction", round=0).items():
            row["bytes"] |= {str(way): total.payload_bytes, f"{way}_message": total.message_bytes}
        row["dev"] = dev
        row["seconds"] = time.monotonic() - began
        return row

    def train_round(self, state: RunState) -> tuple[RunState, Row]:
        """One round of training: the state after it and its row.

        Raises ``FederationError`` when fewer usable replies than ``server.min_replies`` came back.
        """
        began, round = time.monotonic(), state.round + 1
        clients = self.sample(round)
        self.observer.on_round_start(round, clients)
        most_rows = sum(self.most[client].rows for client in clients)
        tally = start_tally(self.strategy, self.workspace, state, most_rows)
        good: list[Contribution] = []
        norms: dict[int, float] = {}
        wanted = self.config.server.clients_per_round if self.config.server.over_select > 1 else None

        def enough() -> bool:
            return wanted is not None and len(good) >= wanted

        def arrived(answer: Answer) -> None:
            if enough() and answer.reply is not None:  # it came together with the last one
                answer.fail("rejected", SURPLUS)
            for reply in self._judge(answer, state):
                norms[reply.client] = norm(reply.change)
                tally.add(reply)
                good.append(replace(reply, change=_ADDED))  # whether the change is kept is the tally's affair
            self.observer.on_reply(answer.client)

        answers, behind = self._exchange(state, round, clients, TRAIN, arrived, enough)
        enter(self.ledger, round, "train", answers)
        row = self._row(round, clients, answers)
        if len(good) < self.config.server.min_replies:
            reasons = "; ".join(f"client {one['client']}: {one['reason']}" for one in row["rejected"][:5])
            raise FederationError(
                f"round {round}: expected at least {self.config.server.min_replies} usable replies"
                f" (server.min_replies), found {len(good)} of {len(clients)} ({reasons})"
            )
        combined = within_bounds(tally.result())
        state.confirm(behind)
        held = state.held | {reply.client: state.round for reply in good}
        own = {reply.client: reply.indices for reply in good if reply.indices is not None}
        holders = state.holders.with_round(round, own) if own else state.holders
        counted = state.counted
        if up_codec(self.config.up).keeps_state:
            counted = counted.after(round, clients, combined.selected)
        after = RunState(round, combined.shared, combined.heads, state.public, held, holders, counted)
        after.publish(self.workspace, combined.factors)
        row.update(self._measured(good))
        row["replied"] = sorted(reply.client for reply in good)
        row["selected"] = list(combined.selected)
        row["norms"] = beside_median(norms)
        row["note"] = combined.note
        if own:
            took = [reply.metrics[SECONDS] for reply in good if SECONDS in reply.metrics]
            row["mask_search"] = {"clients": len(took), "seconds": sum(took)}
        row |= self.central_row(after)
        row["seconds"] = time.monotonic() - began
        return after, row

    def scores(self, state: RunState, split: str) -> Scores:
        """Central scores of a state: ``dev`` on at most ``eval_rows`` rows, ``test`` on all."""
        rows = self.config.eval_rows if split == "dev" else None
        view = state.view(self.workspace)
        return central_scores(self.workspace, state.shared, state.heads, split, rows, view)

    def central_row(self, state: RunState) -> dict[str, Scores]:
        """The central scores that a round's row holds; ``test`` only where the settings ask for its curve."""
        splits = ("dev", "test") if self.config.test_every_round else ("dev",)
        return {split: self.scores(state, split) for split in splits}

    def client_scores(self, state: RunState) -> tuple[dict[str, dict[str, float]], list[Row]]:
        """The final vector on every client's held-out rows: ``{task: {"loss", "score", "clients"}}``.

        The one evaluation that costs a download of its own. Clients that fail are left out, and listed with
        their reasons.
        """
        clients = tuple(sorted(self.roster.nodes))
        answers, _ = self._exchange(
            state, state.round, clients, EVALUATE, lambda answer: self.observer.on_reply(answer.client)
        )
        pairs: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}, "score": {}}
        counted: dict[str, int] = {}
        for answer in answers:
            found = self._scores_of(answer)
            if not found or not found[EXAMPLES]:
                continue
            task = self.workspace.task_of(answer.client)
            counted[task] = counted.get(task, 0) + 1
            for key, held in pairs.items():
                if f"global-{key}" in found:
                    held.setdefault(task, []).append((int(found[EXAMPLES]), found[f"global-{key}"]))
        enter(self.ledger, state.round, "evaluate", answers)
        means = {key: task_means(held) for key, held in pairs.items()}
        return {
            task: {
                **{key: mean[task] for key, mean in means.items() if task in mean},
                "clients": counted[task],
            }
            for task in self.workspace.tasks
            if task in counted
        }, _lost(answers)

    def _exchange(
        self,
        state: RunState,
        round: int,
        clients: Sequence[int],
        kind: Kind,
        arrived: Callable[[Answer], None],
        enough: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Answer], dict[int, int]]:
        """All answers; and by client the versions of those that hold another one than they had confirmed."""
        end = time.monotonic() + self.config.server.timeout
        behind: dict[int, int] = {}

        def came(answer: Answer) -> None:
            held = behind_version(answer.reply.content) if answer.reply is not None else None
            if held is None or answer.client in behind:
                arrived(answer)
            else:  # it has lost the version that it confirmed, and is asked once more
                answer.reply = None
                behind[answer.client] = held

        answers = self._ask(state, round, clients, state.held, kind, came, enough, end)
        if time.monotonic() >= end:  # it is sent what it needs in the next round
            for answer in answers:
                if answer.client in behind and answer.status == "ok":
                    answer.fail("failed", _NO_TIME)
                    arrived(answer)
        elif behind and not enough():
            answers += self._ask(state, round, tuple(sorted(behind)), dict(behind), kind, came, enough, end)
        if kind == TRAIN:
            waited = {name: at for name, at in self.late.items() if round - at[1] < _LATE_ROUNDS}
            out = {answer.message_id: (answer.request, round) for answer in answers if answer.message_id}
            self.late = waited | out
        return answers, behind

    def _ask(
        self,
        state: RunState,
        round: int,
        clients: Sequence[int],
        held: Mapping[int, int],
        kind: Kind,
        arrived: Callable[[Answer], None],
        enough: Callable[[], bool],
        end: float,
    ) -> list[Answer]:
        contents = down_contents(self.workspace, state, round, held, clients)
        requests = [Request(self.roster.nodes[client], client, contents[client]) for client in clients]
        late = self.late if kind == TRAIN else None
        note = partial(self.journal.note, round, kind) if self.journal else no_note
        # The layout of a run of views is without the client's mask; its indices may come with the values.
        longest = max(self.workspace.layout(task).size for task in self.workspace.tasks)
        most = most_bytes(2 * self.workspace.k + longest)
        return exchange(
            self.grid, requests, kind, self.config.server.timeout, arrived,
            most=most, enough=enough, late=late, note=note, end=end,
        )  # fmt: skip

    def _judge(self, answer: Answer, state: RunState) -> list[Contribution]:
        """A reply as a contribution, or none with the reason in the answer; the reply itself is let go."""
        if answer.reply is None:
            return []
        task, round = self.workspace.task_of(answer.client), state.round + 1
        try:
            mask, more = own_mask(answer.reply, self.workspace, state, answer.client)
            found = read_training(
                answer.reply,
                client=answer.client,
                task=task,
                terms=up_terms(self.workspace, state, answer.client, mask),
                round=round,
                codec=up_codec(self.config.up).name,
                most=self.most[answer.client],
                brought=more is not None,
            )
        except FedmaskError as error:
            answer.fail("rejected", str(error))
            return []
        answer.reply = None
        indices = mask.indices if mask is not None else None
        return [replace(found, indices=indices, metrics={**found.metrics, **(more or {})})]

    def _scores_of(self, answer: Answer) -> dict[str, float]:
        if answer.reply is None:
            return {}
        try:
            return read_scores(answer.reply, most=self.most[answer.client])
        except EnvelopeError as error:
            answer.fail("rejected", str(error))
            return {}

    def _row(self, round: int, clients: Sequence[int], answers: Sequence[Answer]) -> Row:
        """The parts of a row that every round has."""
        return {
            "round": round,
            "seconds": 0.0,
            "dev": {},
            "global": {},
            "personal": {},
            "train_loss": {},
            "sampled": list(clients),
            "replied": [],
            "selected": [],
            "rejected": _lost(answers),
            "norms": [],
            "steps": 0,
            "bytes": {
                "up": sum(answer.up[0] for answer in answers),
                "down": sum(answer.down[0] for answer in answers if answer.down),
                "up_message": sum(answer.up[1] for answer in answers),
                "down_message": sum(answer.down[1] for answer in answers if answer.down),
            },
            "note": "",
        }

    def _measured(self, good: Sequence[Contribution]) -> Row:
        """Clients' own numbers as means by task: losses weigh by training rows, scores by held-out rows."""
        losses: dict[str, list[tuple[int, float]]] = {}
        scores: dict[str, dict[str, list[tuple[int, float]]]] = {"global": {}, "personal": {}}
        for reply in sorted(good, key=lambda one: one.client):
            losses.setdefault(reply.task, []).append((reply.examples, reply.metrics["train-loss"]))
            for kind, held in scores.items():
                if f"{kind}-score" in reply.metrics:
                    rows = int(reply.metrics.get(HELD_OUT, 0))
                    held.setdefault(reply.task, []).append((rows, reply.metrics[f"{kind}-score"]))
        return {
            "train_loss": task_means(losses),
            **{kind: task_means(held) for kind, held in scores.items()},
            "steps": int(sum(reply.metrics["steps"] for reply in good)),
        }


def _lost(answers: Sequence[Answer]) -> list[Row]:
    return [{"client": answer.client, "reason": answer.reason} for answer in answers if answer.status != "ok"]
