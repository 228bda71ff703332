"""The whole device part of a call as one CUDA (HIP) graph: one launch instead of thousands.

One graph for each structure of the observation that comes by, captured on first sight. A graph is replayed only for
the structure it was captured for, since the device part depends on nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pi0exp.graphs.capture import Capture, Note, Recordings, Tally, bypassed
from pi0exp.graphs.staging import StagedRecording
from pi0exp.model.observation import Observation
from pi0exp.policy import DeviceCall, Policy


@dataclass(frozen=True)
class Manual(Capture):
    """Capture once, tell the graph where its inputs are, replay."""

    def apply(self, policy: Policy) -> None:
        tally = Tally()

        def capture(call: DeviceCall) -> DeviceCall:
            return CapturedCall(call, policy.device, self.warmup, self.max_graphs, tally, policy.note)

        policy.wrap_call(capture, "one captured graph a structure", whole=True)
        policy.count_with(tally.counters)


class CapturedCall:
    """`call`, replayed from graphs keyed by the structure of the observation and the shape of the noise."""

    def __init__(
        self, call: DeviceCall, device: torch.device, warmup: int, max_graphs: int, tally: Tally, note: Note
    ) -> None:
        self.call, self.device, self.warmup, self.tally, self.note = call, device, warmup, tally, note
        self.recordings: Recordings[StagedRecording] = Recordings(max_graphs, tally)

    def __call__(self, observation: Observation, noise_BCA: Tensor) -> Tensor:
        if bypassed():
            return self.call(observation, noise_BCA)
        recording, given = self._recording(observation, noise_BCA)
        recording.replay(given)
        self.tally.replayed(recording)
        # The next replay overwrites the output; what the caller holds must not change under it.
        return recording.output.clone()

    def from_host(self, observation: Observation, noise_BCA: Tensor) -> Tensor:
        """The same from tensors on the host to one there: one copy in, one replay, one copy out."""
        recording, given = self._recording(observation, noise_BCA)
        actions_BCA = recording.replay_from_host(given)
        self.tally.replayed(recording)
        return actions_BCA

    def _recording(self, observation: Observation, noise_BCA: Tensor) -> tuple[StagedRecording, list[Tensor]]:
        """The graph of this call, captured where there is none, and the tensors that it is replayed with."""
        given = [*observation.tensors(), noise_BCA]

        def run(inputs: list[Tensor]) -> Tensor:
            return self.call(observation.with_tensors(inputs[:-1]), inputs[-1])

        recording = self.recordings.get(
            (observation.structure, noise_BCA.shape),
            lambda: StagedRecording(run, given, self.device, self.warmup, self.note),
        )
        self.tally.begin_call()
        return recording, given
