"""Steps of a batch that keeps its size, each kind of them one replay of a CUDA graph.

A graph holds addresses, so all that it reads and writes stays where it is from call to call:
caches, cross-attention's keys and values, the tokens, their place, the adapters of the rows. What
a call changes is written there. Rows that have finished stay in the batch and are not looked at.
Other rows, other utterances and other adapters among those loaded need no new graph; loading,
replacing or removing an adapter does, at the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.decoder_step import Head, RecordedStep, pack_cross_attention
from lora_speech.decoding.stepping import RecordedSteps

if TYPE_CHECKING:
    from lora_speech.decoding.whisper_decoder import WhisperDecoder

_POOL = "_lora_speech_graphed_steps"
_KEPT = 4
"""So many sets of caches and graphs are kept for a model: those of the last batch sizes."""


def pay_on(device: torch.device) -> bool:
    """Whether a fixed batch is worth it: where launching kernels one by one takes longer."""
    return device.type == "cuda"


class GraphedSteps(RecordedSteps):
    """Greedy steps of a fixed batch, kept from call to call.

    Parameters
    ----------
    decoder : WhisperDecoder
        Of the first call; its adapters are those of later ones too.
    encoded : Tensor
        [batch, frames, width], of the first call.
    pool : _Pool
        Where they wait for the next.
    """

    def __init__(self, decoder: WhisperDecoder, encoded: torch.Tensor, pool: _Pool) -> None:
        state = decoder.start(encoded, decoder.tokens.max_positions)
        self.ids = torch.full((encoded.shape[0],), -1, dtype=torch.int32, device=encoded.device)
        state.rows = AdapterRows(None, self.ids)
        super().__init__(decoder, state)
        self.shape, self._pool = encoded.shape, pool
        self.tokens = torch.zeros(encoded.shape[0], dtype=torch.int64, device=encoded.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=encoded.device)
        self.left: torch.Tensor | None = None
        self._replays: dict[RecordedStep, Callable[[], object]] = {}
        self._route(decoder.rows)

    def fits(self, decoder: WhisperDecoder, encoded: torch.Tensor) -> bool:
        """Whether a call may go on with this: the same sizes, weights and banks."""
        ours, theirs = self.decoder.parts, decoder.parts
        assert ours is not None and theirs is not None
        return self.shape == encoded.shape and ours.identity() == theirs.identity()

    def restart(self, decoder: WhisperDecoder, encoded: torch.Tensor) -> None:
        """Begin with other utterances, and other adapters for them."""
        assert decoder.parts is not None
        made = pack_cross_attention(decoder.parts, encoded, decoder.rows)
        for ours, theirs in zip(self.state.cross_cache, made, strict=True):
            for kept, new in zip(ours, theirs, strict=True):
                kept.copy_(new)
        self._route(decoder.rows)
        self.left = None

    def _route(self, rows: AdapterRows) -> None:
        if rows.ids is None:
            self.ids.fill_(-1)
        else:
            self.ids.copy_(rows.ids.expand_as(self.ids))

    def keep(self, index: torch.Tensor) -> None:
        """See `Steps`: the others go on too, and nobody looks."""
        self.left = index if self.left is None else self.left[index]

    def close(self) -> None:
        """Wait for the next call; those that have waited longest go."""
        with self._pool.lock:
            self._pool.idle.append(self)
            del self._pool.idle[:-_KEPT]

    def _run(
        self, count: int, head: Head, suppress: bool, tokens: torch.Tensor, begin: int
    ) -> torch.Tensor:
        step = self._step(count, head, suppress)
        if count > 1:  # a prompt, of all rows
            return step.run(tokens, begin)
        if self.left is None:
            self.tokens.copy_(tokens[:, 0])
        else:
            self.tokens[self.left] = tokens[:, 0]
        self.position.fill_(begin)
        replay = self._replays.get(step)
        if replay is None:
            replay = self._replays[step] = _graph(step, self.tokens, self.position)
        replay()
        return step.result if self.left is None else step.result[self.left]


def _graph(
    step: RecordedStep, tokens: torch.Tensor, position: torch.Tensor
) -> Callable[[], object]:
    """What runs the step on what the tensors then hold; a graph where there are graphs."""

    def run() -> None:
        step.run_at(tokens, position)

    if tokens.device.type != "cuda":
        return run
    # Once outside, for what is made at first use. It writes what the replay will write again.
    side = torch.cuda.Stream(tokens.device)
    side.wait_stream(torch.cuda.current_stream(tokens.device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(tokens.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class _Pool:
    """The idle steps of one model, the last used at the end. A copy of the model starts anew."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.idle: list[GraphedSteps] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Pool, ())


def take(decoder: WhisperDecoder, encoded: torch.Tensor) -> GraphedSteps:
    """Steps for one call, to be closed after it. Calls at the same time get steps of their own."""
    pool = decoder.whisper.__dict__.setdefault(_POOL, _Pool())
    with pool.lock:
        found = next((steps for steps in pool.idle if steps.fits(decoder, encoded)), None)
        if found is not None:
            pool.idle.remove(found)
    if found is None:
        return GraphedSteps(decoder, encoded, pool)
    found.restart(decoder, encoded)
    return found
