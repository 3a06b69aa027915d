"""Cross-entropy on the response: supervised fine-tuning, and the dev loss of every method."""

from dskd.config.methods import SftConfig
from dskd.losses.method import Method, finish
from dskd.losses.response import Response
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens


class Sft(Method[SftConfig]):
    """-log p(response token), arXiv 2406.17328, equation 1."""

    def __init__(self, settings: SftConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.weights = {"ce": 1.0}

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        response = Response(student, self.student.head(), self.settings.label_smoothing, self.memory_mb)
        scales = scale_parts({"ce": response.count})
        response.learn_alone(range(response.count), scales["ce"])
        gradients = response.streamed.gradients()
        return finish({"ce": response.part}, scales, gradients, {"accuracy": response.accuracy})
