"""Steps of a batch that keeps its size, each kind of them one replay of a CUDA graph.

A graph holds addresses, so all that it reads and writes stays where it is from call to call:
caches, cross-attention's keys and values, the tokens, their place, the adapters of the rows, the
table that says where a beam's history is. What a call changes is written there. Rows that have
finished stay in the batch and are not looked at. Other rows, other utterances and other adapters
among those loaded need no new graph; loading, replacing or removing an adapter does, at the next
call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.decoder_step import RecordedStep, pack_cross_attention
from lora_speech.decoding.stepping import RecordedSteps

if TYPE_CHECKING:
    from lora_speech.decoding.whisper_decoder import DecoderState, WhisperDecoder

_POOL = "_lora_speech_graphed_steps"
_KEPT = 4
"""So many sets of caches and graphs are kept for a model: those of the last batch sizes."""
_KEPT_PART = 0.25
"""Of a device's memory: what they may take where it is more than one set. 16 utterances of
Whisper large-v3 with five beams are 8 GB."""
_capturing = Lock()


def pay_on(device: torch.device) -> bool:
    """Whether a fixed batch is worth it: where launching kernels one by one takes longer."""
    return device.type == "cuda"


class GraphedSteps(RecordedSteps):
    """Steps of a fixed batch, kept from call to call.

    There are two sets of rows over one cache: one row per utterance, and, once a beam search has
    fanned out, one per beam. Each has its own steps, which stay as the sets do.

    Parameters
    ----------
    decoder : WhisperDecoder
        Of the first call; its adapters are those of later ones too.
    encoded : Tensor
        [batch, frames, width], of the first call.
    beams : int
        Hypotheses per utterance to make room for.
    pool : _Pool
        Where they wait for the next.
    """

    def __init__(
        self, decoder: WhisperDecoder, encoded: torch.Tensor, beams: int, pool: _Pool
    ) -> None:
        batch, device = encoded.shape[0], encoded.device
        state = decoder.start(encoded, decoder.tokens.max_positions, beams)
        self.ids = torch.full((batch,), -1, dtype=torch.int32, device=device)
        state.rows = AdapterRows(None, self.ids)
        super().__init__(decoder, state)
        self.shape, self.beams, self._pool = encoded.shape, beams, pool
        self.tokens = torch.zeros(batch * beams, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.left: torch.Tensor | None = None
        self._left_behind: torch.cuda.Event | None = None
        self._places: list[int] = []
        self._per_utterance = state, self.recorded
        self._per_beam: tuple[DecoderState, dict[Any, RecordedStep]] | None = None
        self._replays: dict[RecordedStep, Callable[[], object]] = {}
        self._route(decoder.rows)

    def fits(self, decoder: WhisperDecoder, encoded: torch.Tensor, beams: int) -> bool:
        """Whether a call may go on with this: the same sizes, weights, banks and tokens."""
        ours, theirs = self.decoder.parts, decoder.parts
        assert ours is not None and theirs is not None
        return (
            (self.shape, self.beams) == (encoded.shape, beams)
            and self.decoder.tokens == decoder.tokens
            and ours.identity() == theirs.identity()
        )

    def restart(self, decoder: WhisperDecoder, encoded: torch.Tensor) -> None:
        """Begin with other utterances, and other adapters for them."""
        assert decoder.parts is not None
        if self._left_behind is not None:
            torch.cuda.current_stream(self.tokens.device).wait_event(self._left_behind)
        self.state, self.recorded = self._per_utterance
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

    def fan_out(self, beams: int) -> None:
        """See `Steps`: every row begins where it is, in the memory of the call before."""
        fresh = replace(self.state, rows=AdapterRows(None, None))
        fresh.fan_out(beams)
        fresh.rows.ids = self.ids.repeat_interleave(beams)
        if self._per_beam is None:
            self._per_beam = fresh, {}
        self.state, self.recorded = self._per_beam
        for kept, new in ((self.state.slots, fresh.slots), (self.state.rows.ids, fresh.rows.ids)):
            assert kept is not None and new is not None
            kept.copy_(new)

    def follow(self, parents: list[int], length: int) -> None:
        """See `Steps`: rows that have finished follow themselves."""
        if self.left is not None:
            rows = list(range(len(self.tokens)))
            for place, parent in zip(self._places, parents, strict=True):
                rows[place] = self._places[parent]
            parents = rows
        self.state.follow(parents, length)

    def keep(self, index: torch.Tensor) -> None:
        """See `Steps`: the others go on too, and nobody looks."""
        self.left = index if self.left is None else self.left[index]
        self._places = self.left.tolist()

    def close(self) -> None:
        """Wait for the next call; those that have waited longest go."""
        if self.tokens.device.type == "cuda":  # the next one may be on another stream
            self._left_behind = torch.cuda.current_stream(self.tokens.device).record_event()
        with self._pool.lock:
            self._pool.idle.append(self)
            del self._pool.idle[:-_KEPT]
            room = _room(self.tokens.device)
            while len(self._pool.idle) > 1 and sum(s.nbytes for s in self._pool.idle) > room:
                del self._pool.idle[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches: nearly all that is kept."""
        state = self.state
        caches = [*state.self_cache, *state.cross_cache]
        return sum(tensor.nbytes for cache in caches for tensor in cache)

    def _run(self, step: RecordedStep, tokens: torch.Tensor, begin: int) -> None:
        if begin == 0:  # a prompt, of all rows: once a call
            step.run(tokens, begin)
            return
        held = self.tokens[: len(self.state.cross_lengths)]
        if self.left is None:
            held.copy_(tokens[:, 0])
        else:
            held[self.left] = tokens[:, 0]
        self.position.fill_(begin)
        replay = self._replays.get(step)
        if replay is None:
            replay = self._replays[step] = _graph(step, held, self.position)
        replay()

    def _rows_left(self, result: torch.Tensor) -> torch.Tensor:
        return result if self.left is None else result[self.left]


def _room(device: torch.device) -> float:
    """Bytes that waiting steps of one model may take of a device, if it is more than one set."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory * _KEPT_PART


def _graph(
    step: RecordedStep, tokens: torch.Tensor, position: torch.Tensor
) -> Callable[[], object]:
    """What runs the step on what the tensors then hold; a graph where there are graphs."""

    def run() -> None:
        step.run_at(tokens, position)

    if tokens.device.type != "cuda":
        return run
    # Other threads go on meanwhile: what they allocate must not end the capture, which is
    # therefore this thread's alone, and theirs wait, since each begins by waiting for the device.
    with _capturing, torch.cuda.device(tokens.device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        # Once outside, for what is made at first use. It writes what the replay will write again.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            run()
    return graph.replay


class _Pool:
    """The idle steps of one model, the last used at the end. A copy of the model starts anew."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.idle: list[GraphedSteps] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Pool, ())


def take(decoder: WhisperDecoder, encoded: torch.Tensor, beams: int) -> GraphedSteps:
    """Steps for one call, to be closed after it. Calls at the same time get steps of their own."""
    pool = decoder.whisper.__dict__.setdefault(_POOL, _Pool())
    with pool.lock:
        found = next((steps for steps in pool.idle if steps.fits(decoder, encoded, beams)), None)
        if found is not None:
            pool.idle.remove(found)
    if found is None:
        return GraphedSteps(decoder, encoded, beams, pool)
    found.restart(decoder, encoded)
    return found
