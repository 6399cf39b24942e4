"""One training run: steps, validation, checkpoints, samples, until its steps are done.

    FOLDER/settings.json            what decides the result
    FOLDER/checkpoint.pt            state.py, every `save_every` steps
    FOLDER/adapter.safetensors      of the last evaluation, in the end of the run
    FOLDER/adapter-best.safetensors of the lowest validation loss
    FOLDER/curves.png, tensorboard/, samples/step-N/

On one kind of machine the same settings, data and number of processes and threads give the same adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from personaplex.errors import TrainingFailed
from personaplex.finetune import curves
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.batches import Order, Part, Row, Source, stack
from personaplex.finetune.network import SUMS, Network
from personaplex.finetune.processes import Processes
from personaplex.finetune.settings import Settings
from personaplex.finetune.state import State
from personaplex.model.identity import Base
from personaplex.model.lora import write_adapter

ADAPTER, BEST, CURVES, BOARD = "adapter.safetensors", "adapter-best.safetensors", "curves.png", "tensorboard"
_BETAS = (0.9, 0.95)
_LOWEST_RATE = 0.1  # share of the learning rate that is left in the end


@dataclass(frozen=True)
class Data:
    """Parts to train on, to rehearse and to validate with, and the sources that lay them out."""

    trained: Source
    rehearsed: Source | None
    held: Source | None


@dataclass(frozen=True)
class Intervals:
    """In steps. They do not change what is learned."""

    save: int = 50
    evaluate: int = 200


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of a step: a linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.rate * (_LOWEST_RATE + (1 - _LOWEST_RATE) * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """A run in `folder` that begins, or goes on, where its checkpoint is."""

    def __init__(
        self,
        network: Network,
        data: Data,
        settings: Settings,
        folder: Path,
        base: Base,
        processes: Processes | None = None,
        samples: Callable[[Path], Mapping[str, str]] | None = None,
    ) -> None:
        """`samples` writes what the model says now into a folder and returns it by name."""
        self._network, self._data, self._settings, self._folder = network, data, settings, folder
        self._base, self._samples = base, samples
        self._processes = processes = processes or Processes()
        self._adapters: Adapters = network.adapters
        self._parameters = list(network.parameters())
        self._device = self._parameters[0].device
        self._wrapped: nn.Module = processes.wrap(network, self._device)
        self._optimizer = torch.optim.AdamW(
            self._parameters, settings.rate, betas=_BETAS, weight_decay=settings.decay, fused=True
        )
        self.state = State.load(folder, self._adapters, self._optimizer, self._device)
        again = data.rehearsed.parts if data.rehearsed else []
        self._order = Order(data.trained.parts, settings.batch, settings.seed, again, settings.rehearsal)

    def run(self, intervals: Intervals) -> None:
        """Takes the steps that are left. Raises TrainingFailed when the loss is no number, OSError."""
        first, total = self._processes.first, self._settings.steps
        board = curves.Board(self._folder / BOARD, self.state.step) if first else None
        left = range(self.state.step, total)
        hidden = None if first else True
        with tqdm(left, "training", total, initial=self.state.step, unit="step", disable=hidden) as bar:
            for _ in bar:
                row = self._step()
                bar.set_postfix_str(f"loss {row['loss']:.3f}")
                self._note(row, board)
                done = self.state.step
                if done % intervals.evaluate == 0 or done == total:
                    self._evaluate(board)
                if first and (done % intervals.save == 0 or done == total):
                    self.state.save(self._folder, self._adapters, self._optimizer)
        if board:
            board.close()

    def _note(self, row: dict[str, float], board: curves.Board | None) -> None:
        self.state.history.append(row)
        if board:
            board.add(row)

    def _step(self) -> dict[str, float]:
        step, settings, processes = self.state.step, self._settings, self._processes
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        rows = self._rows(step)
        text, audio = _counted(rows)
        own = rows[processes.rank :: processes.count]
        size = len(own) // settings.pieces
        self._optimizer.zero_grad()
        sums = torch.zeros(len(SUMS), device=self._device)
        for start in range(0, len(own), size):
            batch = stack(own[start : start + size]).to(self._device)
            with processes.without_exchange(self._wrapped, more=start + size < len(own)):
                found = self._wrapped(batch)
                ((found[0] / text + found[1] / audio) * processes.count).backward()
            sums += found.detach()
        sums = processes.total(sums)
        if not bool(torch.isfinite(sums).all()):
            names = sorted({part.entry.name for parts in self._order.batch(step) for part in parts})
            raise TrainingFailed(
                f"the loss of step {step + 1} is not a number: try a lower --rate (in its batch: "
                f"{', '.join(names)})"
            )
        nn.utils.clip_grad_norm_(self._parameters, settings.clip)
        self._optimizer.step()
        self.state.step += 1
        return {
            "step": float(self.state.step),
            **_figures(sums, text, audio),
            "rate": rate_at(step, settings),
        }

    def _rows(self, step: int) -> list[Row]:
        """The whole batch of a step, of all processes."""
        parts, again = self._order.batch(step)
        rows = [self._data.trained.sequence(part, step) for part in parts]
        if self._data.rehearsed is not None:
            rows += [self._data.rehearsed.sequence(part, step) for part in again]
        return rows

    def _evaluate(self, board: curves.Board | None) -> None:
        """Validation by all processes; the first writes adapter, curves and samples."""
        step, better = self.state.step, False
        if self._data.held is not None:
            row = {"step": float(step)}
            row |= {f"validation {key}": value for key, value in self.validate(self._data.held).items()}
            self._note(row, board)
            loss = row["validation loss"]
            if self.state.best is None or loss < self.state.best:
                self.state.best, better = loss, True
            if self._processes.first:
                tqdm.write(f"step {step}: {curves.line(row)}")
        if self._processes.first:
            self._write(step, better)
        self._processes.wait()

    def _write(self, step: int, better: bool) -> None:
        training = {"settings": self._settings.described(), "steps": step}
        adapter = self._adapters.exported(self._base, training)
        write_adapter(self._folder / ADAPTER, adapter)
        if better:
            write_adapter(self._folder / BEST, adapter)
        curves.draw(self.state.history, self._folder / CURVES)
        if self._samples is not None:
            for name, text in self._samples(self._folder / "samples" / f"step-{step:06}").items():
                tqdm.write(f"step {step}: {name} says {text!r}")

    @torch.no_grad()
    def validate(self, held: Source) -> dict[str, float]:
        """Figures over all parts of `held`, each process its share."""
        processes, settings = self._processes, self._settings
        sums = torch.zeros(len(SUMS) + 2, device=self._device)
        own: list[Part] = held.parts[processes.rank :: processes.count]
        size = max(1, settings.batch // settings.pieces // processes.count)
        for start in range(0, len(own), size):
            rows = [held.sequence(part) for part in own[start : start + size]]
            counted = torch.tensor(_counted(rows), device=self._device)
            sums += torch.cat([self._network(stack(rows).to(self._device)), counted])
        sums = processes.total(sums)
        return _figures(sums[: len(SUMS)], float(sums[-2]), float(sums[-1]))


def _counted(rows: list[Row]) -> tuple[float, float]:
    """What all text and all audio tokens of the rows count together."""
    text = sum(float(row.text_weight.sum()) for row in rows)
    return max(text, 1e-9), max(sum(float(row.audio_weight.sum()) for row in rows), 1e-9)


def _figures(sums: Tensor, text: float, audio: float) -> dict[str, float]:
    """What a report shows: the loss, and nats by kind of token."""
    values = dict(zip(SUMS, sums.tolist(), strict=True))
    words, padding = max(values["words_count"], 1), max(values["padding_count"], 1)
    frames = max(values["frames"], 1)
    return {
        "loss": values["text"] / text + values["audio"] / audio,
        "words": values["words"] / words,
        "words right": values["words_right"] / words,
        "padding": values["padding"] / padding,
        "semantic": values["semantic"] / frames,
        "acoustic": values["acoustic"] / frames,
    }
