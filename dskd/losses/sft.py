"""Cross-entropy on the response: supervised fine-tuning, and the dev loss of every method."""

from dskd.config.methods import SftConfig
from dskd.losses.kernels import Scales, kernels_for
from dskd.losses.method import Method, finish
from dskd.losses.response import Response
from dskd.losses.streaming import stream
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens


class Sft(Method[SftConfig]):
    """-log p(response token), arXiv 2406.17328, equation 1."""

    def __init__(self, settings: SftConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.weights = {"ce": 1.0}

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        response = Response(student, self.student.head(), self.settings.label_smoothing)
        streamed, scales = response.streamed, scale_parts({"ce": response.count})
        kernels = kernels_for(streamed.weight)
        for rows, (own,) in stream(range(response.count), self.memory_mb, kernels, streamed):
            found = kernels.measure(own, None, response.terms(rows))
            response.count_in(found)
            found.write(Scales(scales["ce"]))
        return finish({"ce": response.part}, scales, streamed.gradients(), {"accuracy": response.accuracy})
