"""`dskd teacher cache`: runs the teacher once over the training records, and keeps its hidden states."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config.errors import UserError
from dskd.config.models import TeacherConfig
from dskd.config.run import RunConfig, tokens_at_a_time
from dskd.data.batch import Batch, collate
from dskd.data.records import Records
from dskd.data.shard import Shard
from dskd.data.tokenization import Limits, Sample, Tokenizer, tokenize
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import progress_bar
from dskd.engine.records import read_run_records
from dskd.models.load import DTYPES, load_tokenizers
from dskd.models.views import ModelEnds
from dskd.rundir.content import sum_of
from dskd.rundir.files import as_user_error, write_json
from dskd.rundir.layout import RunDirectory, set_aside
from dskd.rundir.shard import ShardProgress, settings_sum, write_shard
from dskd.teachers.cache.ends import read_ends, tensors_of, write_ends
from dskd.teachers.cache.folder import About, CacheFolder, described
from dskd.teachers.cache.loss_error import LossError
from dskd.teachers.cache.pieces import DamagedPiece, Piece, damage, record_key, text_key, write_piece
from dskd.teachers.cache.precision import Precision, Stored, encode
from dskd.teachers.cache.read import known_texts, made_with, open_pieces
from dskd.teachers.resident import ResidentTeacher, check_quantize, load_resident
from dskd.teachers.sharded import ShardedTeacher, load_sharded
from dskd.teachers.teacher import Teacher

PIECE_BYTES = 2**30
PIECE_SECONDS = 300.0
"""A piece is published when it holds so much or is so old; a kill loses no more."""


class Wanted(NamedTuple):
    """A record that is to be in the cache."""

    length: int  # tokens of prompt and response
    record: int
    key: bytes
    text: bytes


ANY = Wanted(0, 0, b"", b"")
"""A record that no one wants."""


@dataclass
class Writer:
    """Collects records of a shard and publishes them as pieces."""

    folder: CacheFolder
    shard: Shard
    made_with: dict[str, Any]
    records: list[Wanted] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    size: int = 0
    """Bytes of what is collected."""
    published: tuple[int, int, int] = (0, 0, 0)
    """Records, tokens and bytes of what was published."""

    def add(self, record: Wanted, stored: Stored) -> None:
        self.records.append(record)
        self.stored.append(stored)
        self.size += stored.rows.nbytes

    @property
    def is_due(self) -> bool:
        return self.size >= PIECE_BYTES or time.monotonic() - self.since >= PIECE_SECONDS

    def publish(self) -> None:
        if self.records:
            keys, texts = ([getattr(each, name) for each in self.records] for name in ("key", "text"))
            with as_user_error(self.folder.path, "data.cache_dir"):
                file = write_piece(self.folder, self.shard, keys, self.stored, self.made_with, texts)
            records, tokens, size = self.published
            tokens += sum(len(stored.rows) for stored in self.stored)
            self.published = records + len(self.records), tokens, size + file.stat().st_size
        self.records, self.stored, self.size, self.since = [], [], 0, time.monotonic()


def write_cache(run: RunConfig, shard: Shard, ranks: Ranks, output: Path | None = None) -> None:
    """Make what the cache lacks of a shard of the training records; the ranks divide it among them. Collective.

    Args:
        output: where to tell how much of the shard is made.

    Raises:
        UserError: for what the user can mend, such as another task that writes the same shard.
        Stopped: when asked to stop; what was made until then is kept.
    """
    if run.teacher is None or run.method.teacher == "none":
        raise UserError(f"method.kind: {run.method.kind} learns from no teacher, so there is nothing to keep")
    started, teacher = time.monotonic(), run.teacher
    if teacher.quantize != "none" and ranks.world_size > 1:
        raise UserError(
            f"teacher.quantize: with {teacher.quantize} one process alone makes a cache, since several "
            "would split the teacher; set launch.processes=1"
        )
    check_quantize(teacher, ranks.device)
    limits = Limits(run.data.max_length, run.data.max_prompt_length, run.data.bos)
    student_tokenizer, tokenizer = load_tokenizers(run, limits)
    records = read_run_records(run, run.data.train, student_tokenizer, ranks)
    about = described(run, teacher, ranks)
    folder = CacheFolder.of(run, about)
    with ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(folder.held(shard, print)) if ranks.is_main else None)
        ranks.together(lambda: mend(folder, shard, about) if ranks.is_main else None)
        own = shard.of_rank(ranks.rank, ranks.world_size)
        wanted, missing = look_through(own, open_pieces(folder), records, tokenizer, limits, ranks)
        writer = Writer(folder, shard, made_with(tokenizer, limits))
        tell = progress_file(run, folder, output if ranks.is_main else None, *totals(wanted, len(missing), ranks))
        headless = ranks.sum_int(ranks.is_main and shard.index == 0 and not folder.ends.is_file())
        if ranks.sum_int(len(missing)) or headless:
            running = load_running(teacher, tokenizer, run.engine.precision, ranks)
            if headless:
                keep_ends(folder, running.view.ends, ranks)
            parts = list(batches_of(missing, tokens_at_a_time(run)))
            rounds = max(ranks.gather(len(parts)))
            # A split teacher runs on all ranks or none: one with less to do repeats a record, and keeps nothing of it.
            parts += [[] for _ in range(rounds - len(parts))]
            batches = (
                (part, [tokenize(tokenizer, records[each.record], limits) for each in part or [ANY]]) for part in parts
            )
            keep_states(running, batches, len(missing), teacher.cache_precision, writer, ranks, tell)
        tell(ranks.sum_int(writer.published[0]))
        ranks.stop_if_asked()
        figures = ranks.gather((wanted, *writer.published))
    if ranks.is_main:
        there, made, tokens, size = (sum(each) for each in zip(*figures, strict=True))
        print(
            f"shard {shard}: {there:,} records, {made:,} of them ({tokens:,} tokens, {size / 1e6:,.1f} MB) made in "
            f"{time.monotonic() - started:.1f} s: {folder.path}"
        )


def totals(wanted: int, missing: int, ranks: Ranks) -> tuple[int, int]:
    """How many records all ranks want, and how many of them are there. Collective."""
    total = ranks.sum_int(wanted)
    return total, total - ranks.sum_int(missing)


def progress_file(
    run: RunConfig, folder: CacheFolder, output: Path | None, wanted: int, there: int
) -> Callable[[int], None]:
    """What writes down in `output` that so many more records are made; without `output` it does nothing.

    It is called here already where records are missing. Else the head may be: then only who has made it may say so.
    """
    if output is None:
        return lambda _: None
    file = run.data.train
    begun = ShardProgress(folder.path, file, sum_of(file), settings_sum(run), wanted, there)

    def tell(made: int) -> None:
        with as_user_error(output, "--output"):
            output.mkdir(parents=True, exist_ok=True)
            write_shard(RunDirectory(output), replace(begun, made=there + made))

    if there < wanted:
        tell(0)
    return tell


def mend(folder: CacheFolder, shard: Shard, about: About) -> None:
    """Begin a cache, or set aside what is damaged of a shard, and remove what a killed task left of it."""
    with as_user_error(folder.path, "data.cache_dir"):
        for file in folder.unfinished(shard):
            file.unlink()
        if not folder.about.is_file():
            write_json(folder.about, about)
        for piece in open_pieces(folder, put_aside):
            first = (*piece.texts, *piece.keys)[:1]
            problem = damage(piece) if any(map(shard.holds, first)) else None  # each piece is looked at by one task
            if problem is not None:
                put_aside(piece.file, problem)
        if shard.index == 0 and folder.ends.is_file():
            try:
                read_ends(folder.ends, DTYPES[about["precision"]])
            except DamagedPiece as error:
                put_aside(folder.ends, str(error))


def put_aside(file: Path, problem: str) -> None:
    print(problem)
    with suppress(FileNotFoundError):  # another task has done so
        file.rename(set_aside(file))


def look_through(
    shard: Shard, pieces: Sequence[Piece], records: Records, tokenizer: Tokenizer, limits: Limits, ranks: Ranks
) -> tuple[int, list[Wanted]]:
    """How many records a shard holds, those of equal texts once, and which of them are in no piece."""
    keys = {key for piece in pieces for key in piece.keys}
    known, own = known_texts(pieces, keys, records, tokenizer, limits), set[bytes]()
    missing: dict[bytes, Wanted] = {}
    for index in range(len(records)):
        record = records[index]
        text = text_key(record)
        if shard.holds(text) and text not in own:
            own.add(text)
            sample = None if text in known else tokenize(tokenizer, record, limits)
            if sample is not None and (key := record_key(sample)) not in keys:
                missing[key] = Wanted(len(sample.prompt) + len(sample.response), index, key, text)
        ranks.flags.moved()
    return len(own), list(missing.values())


def batches_of(records: Sequence[Wanted], budget: int) -> Iterator[list[Wanted]]:
    """Records of like length together, at most `budget` tokens with padding; the longest first, so that the first
    batch takes as much memory as any."""
    batch: list[Wanted] = []
    for each in sorted(records, reverse=True):
        if batch and batch[0].length * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def load_running(
    settings: TeacherConfig, tokenizer: Any, precision: str, ranks: Ranks
) -> ResidentTeacher | ShardedTeacher:
    """The teacher that makes the states: several ranks share one copy, since it may fit on none of them."""
    if ranks.world_size == 1:
        return load_resident(settings, tokenizer, precision, ranks.device)
    return load_sharded(settings, tokenizer, precision, ranks)


def keep_ends(folder: CacheFolder, ends: ModelEnds, ranks: Ranks) -> None:
    """Write head and embeddings. A collective call."""
    tensors = tensors_of(ends)

    def write() -> None:
        if ranks.is_main:
            with as_user_error(folder.path, "data.cache_dir"):
                write_ends(folder.ends, tensors)

    ranks.together(write)


def keep_states(
    teacher: Teacher,
    batches: Iterator[tuple[list[Wanted], list[Sample]]],
    total: int,
    precision: Precision,
    writer: Writer,
    ranks: Ranks,
    tell: Callable[[int], None],
) -> None:
    """Run the teacher over batches of `total` records, until the end or until asked to stop; publish what it gave.

    Collective: all ranks have equally many batches, and one of no record is run and not kept. `tell` is told how many
    records all ranks have published.
    """
    flags, error, done = ranks.flags, LossError(), 0
    with flags.during("step"), progress_bar("teacher cache") as progress:  # inside, a signal sets a flag
        for wanted, samples in batches:
            if ranks.agree().stop:
                break
            side = collate(samples).to(ranks.device)
            (states,) = teacher.states([Batch(tuple(each.record for each in wanted), side, side)])
            if wanted:
                stored = encode(states, precision)
                if precision != "exact" and not error.is_known:
                    error.add(teacher.ends.head(), states, stored, side.labels)
                for each, one in zip(wanted, stored.split(side.lengths), strict=True):
                    writer.add(each, one)
                done += len(wanted)
            flags.moved()
            progress(done, total)
            if ranks.sum_int(writer.is_due):  # on any rank: they fill at the same pace
                with flags.during("save"):
                    writer.publish()
                    tell(ranks.sum_int(writer.published[0]))
                if ranks.is_main:
                    print(f"{done:,} of {total:,} records of rank 0", flush=True)
        with flags.during("save"):
            writer.publish()
    if ranks.is_main and error.tokens:
        print(f"{precision}: {error}")
