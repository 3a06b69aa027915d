"""The teacher split over the ranks: each holds its own rows of every weight, and a layer is whole only while it runs.

FSDP2 gathers a layer before its forward and frees it after. All micro-batches of a step go through it together, so
that the whole teacher travels once a step. The head is whole on every rank: losses need it at any time.
"""

import ctypes
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dskd.config.errors import UserError
from dskd.config.models import TeacherConfig
from dskd.data.batch import Batch, Side, joined, longest_of
from dskd.engine.distributed import Ranks
from dskd.losses.tensors import Head, Model
from dskd.models.compilation import decoder_layers
from dskd.models.load import loading
from dskd.models.views import ModelEnds, ModelView, check_view, check_vocabulary
from dskd.models.weights import LowRank, adapter_updates, empty_causal_lm, find_pieces, weight_names

MOST_TOKENS = 2**14
"""Tokens that go through a layer together, padding included. On a 72B teacher they are about 4 GB of activations, and
enough work for a GPU (2.4 PFLOP) to hide that the next layers travel."""

M_MMAP_THRESHOLD, FREED_AT_ONCE = -3, 2**20


class ShardedEnds:
    """The head, whole, and the embeddings of the step's response tokens (implements `dskd.losses.tensors.Model`)."""

    def __init__(self, ends: ModelEnds) -> None:
        self.whole, self.hidden_size, self.vocab_size = ends, ends.hidden_size, ends.vocab_size

    def head(self) -> Head:
        return self.whole.head()

    def start_step(self, sides: Sequence[Side]) -> None:
        """Look up the embeddings of all response tokens of a step at once. A collective call."""
        ids = torch.cat([ids for side in sides for ids in (side.inputs, side.labels)])
        self.ids: Tensor = torch.unique(ids)  # sorted
        self.embedded = self.whole.embed(self.ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [N, D] of ids [N] of this step's response tokens."""
        return self.embedded[torch.searchsorted(self.ids, ids)]


class ShardedTeacher:
    """Runs all micro-batches of a step when the first is asked for (implements `Teacher`)."""

    def __init__(self, view: ModelView, ranks: Ranks) -> None:
        self.view, self.ranks = view, ranks
        self.own_ends = ShardedEnds(view.ends)

    @property
    def ends(self) -> Model:
        return self.own_ends

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """All before the first is given: a rank that ran its student in between would gather other weights."""
        sides = [batch.teacher for batch in batches]
        groups = grouped(sides, MOST_TOKENS)
        passes = max(self.ranks.gather(len(groups)))
        with torch.no_grad():
            self.own_ends.start_step(sides)
            found = [states for group in groups for states in self.run(group)]
            for _ in range(passes - len(groups)):
                self.help_others(sides[0])
        yield from found

    def run(self, sides: Sequence[Side]) -> list[Tensor]:
        """Last hidden states [N, D] of the response tokens of each micro-batch, in one forward."""
        states = self.view.body.states(joined(sides))
        return list(torch.split(states, [len(side.labels) for side in sides]))

    def help_others(self, side: Side) -> None:
        """Take part in a forward of ranks that have more to do: with one token."""
        token = torch.zeros_like(side.input_ids[:1, :1])
        self.view.body.hidden(token, torch.ones_like(token))


def grouped(sides: Sequence[Side], most: int) -> list[list[Side]]:
    """Neighbours that run together: as many as have at most `most` tokens with padding, but at least one."""
    groups: list[list[Side]] = []
    for side in sides:
        together = [*groups[-1], side] if groups else []
        if together and tokens_of(together) <= most:
            groups[-1] = together
        else:
            groups.append([side])
    return groups


def tokens_of(sides: Sequence[Side]) -> int:
    """Tokens that go through a layer when these run together, padding included."""
    if sides[0].places is not None:
        return sum(side.input_ids.numel() for side in sides)
    return longest_of(sides) * sum(len(side.lengths) for side in sides)


def load_sharded(settings: TeacherConfig, tokenizer: object, precision: str, ranks: Ranks) -> ShardedTeacher:
    """The frozen teacher over the ranks, its adapter merged in. A collective call.

    Raises `UserError` for a model that does not fit, or whose files do not hold its weights one by one.
    """
    if ranks.device.type == "cpu":
        give_back_what_is_freed()  # already the empty model, whose weights are made for a moment, else leaves a hole
    model = empty_causal_lm(settings.path, "teacher.path", precision, settings.trust_remote_code)
    updates: dict[str, LowRank] = {}
    if settings.adapter is not None:
        updates = adapter_updates(model, settings.adapter, "teacher.adapter")
    view = ModelView(model, "teacher.path")
    check_vocabulary(view, tokenizer)
    mesh, names = mesh_of(settings.shard_group, ranks), weight_names(model)
    offload = settings.offload == "cpu" and ranks.device.type != "cpu"
    shard(view, mesh, CPUOffloadPolicy() if offload else OffloadPolicy())
    weights = {name: model.get_parameter_or_buffer(name) for name in names}
    own: dict[str, Tensor] = {}

    def read() -> None:
        pieces = find_pieces(model, names, settings.path, "teacher.path", updates)
        with loading(f"teacher.path: no weights load from {settings.path}"):
            for name, weight in weights.items():
                waits = offload and isinstance(weight, DTensor)
                piece = pieces.rows(name, own_rows(weight, mesh), weight.dtype)
                own[name] = piece.to("cpu" if waits else ranks.device)

    ranks.together(read)  # a mistake that one rank finds must not leave the others waiting in what follows
    state = {name: completed(own.pop(name), weight, mesh) for name, weight in weights.items()}
    aliases = {alias: state[name] for name, same in names.items() for alias in same}
    model.load_state_dict(aliases, strict=False, assign=True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    check_view(view)
    return ShardedTeacher(view, ranks)


def give_back_what_is_freed() -> None:
    """Let glibc return each freed layer to the system.

    Else it raises this threshold to the size of a layer, and the freed ones stay in a heap too torn to be used again:
    more than the whole teacher, on every rank.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, FREED_AT_ONCE)


def mesh_of(shard_group: str, ranks: Ranks) -> DeviceMesh:
    """The ranks that share one teacher. Nothing is ever reduced, so that nodes with one each need not talk."""
    group = dist.group.WORLD
    if shard_group == "node":
        for node in ranks.nodes():
            made = dist.new_group(list(node), timeout=ranks.timeout)
            group = made if ranks.rank in node else group
    assert group is not None
    return DeviceMesh.from_group(group, ranks.device.type)


def shard(view: ModelView, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
    """Let FSDP2 gather each decoder layer, the embeddings, and what is left of the body, while it runs.

    What is not in the body stays whole: the head, and embeddings that are tied to it.
    """
    body, embeddings, head = view.body.module, view.ends.embeddings, view.ends.output
    layers = set(decoder_layers(view))
    if not layers:
        name = type(view.causal).__name__
        raise UserError(f"teacher.backend: sharded does not support {name}, which does not say what its layers are")
    for module in reversed(list(body.modules())):  # what is inside comes first
        if module in layers or module is body or module is embeddings:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,
                offload_policy=policy,
                ignored_params=set(head.parameters()),
            )


def own_rows(weight: Tensor, mesh: DeviceMesh) -> slice:
    """The rows that this rank reads: as `torch.chunk` cuts a parameter, and all of a buffer."""
    if not isinstance(weight, nn.Parameter):
        return slice(None)
    size = -(-len(weight) // mesh.size())
    start = min(mesh.get_local_rank() * size, len(weight))
    return slice(start, min(start + size, len(weight)))


def completed(piece: Tensor, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """A rank's rows as what the model holds: a part of a sharded parameter, or gathered where that is whole."""
    if not isinstance(weight, nn.Parameter):
        return piece
    rows = DTensor.from_local(piece, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())
    return nn.Parameter(rows if isinstance(weight, DTensor) else rows.full_tensor(), requires_grad=False)
