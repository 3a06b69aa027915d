"""One entry point: dskd VERB. A verb's modules are imported only when it runs, so that help answers at once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dskd import __version__
from dskd.config.errors import UserError
from dskd.config.training import GenerationConfig
from dskd.start import leave

app = typer.Typer(
    help="Distil a large language model into a small one, white-box, whatever the two vocabularies are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GENERATION = GenerationConfig()
Force = Annotated[bool, typer.Option("--force", help="Go on with a run even where changed settings make it another.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over those of the run file, such as train.lr=1e-4."),
]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    # Threads that wait without spinning, of this process and of all that it starts: beside other work, spinning ones
    # cost a factor of five to ten. It counts only before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(args=join_numbers(sys.argv[1:]), prog_name="dskd")
    except UserError as error:
        print(f"dskd: {error}", file=sys.stderr)
        leave(2)
    except OSError as error:
        print(f"dskd: {error.filename or 'this system'}: {error.strerror or error}", file=sys.stderr)
        leave(2)
    except SystemExit as end:
        leave(end.code)


def join_numbers(arguments: list[str]) -> list[str]:
    """`--seeds 10 20` -> `--seeds 10,20`: an option takes one value, and a list of numbers is typed with spaces."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdecimal() and len(joined) > 1 and joined[-2] == "--seeds" and not joined[-1].startswith("-"):
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


@contextmanager
def as_options() -> Iterator[None]:
    """Inside, what is wrong with a key is told of the option that stands for it: max_length is --max-length."""
    try:
        yield
    except UserError as error:
        key, colon, problem = str(error).partition(":")
        raise UserError(f"--{key.replace('_', '-')}{colon}{problem}") from None


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"dskd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file; `dskd settings` lists its keys.")],
    overrides: Overrides = None,
    force: Force = False,
) -> None:
    """Train a student as a run file says, or go on where an earlier start of the same run stopped.

    Uses all GPUs of this machine, or launch.processes on CPUs; where RANK and WORLD_SIZE are set already, this process
    joins as that rank. Everything is written to output.root/STUDENT/METHOD/output.name. Exit code 75 means that the run
    is not finished and goes on when the same command is run again.
    """
    from dskd.config.load import load_run
    from dskd.start import start_training

    start_training(load_run(run_file, overrides or []), force)


@app.command()
def resume(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, as it wrote it.")],
    overrides: Overrides = None,
    force: Force = False,
    here: Annotated[
        bool, typer.Option("--here", help="On this machine, even where the run was submitted to a cluster.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, from its directory alone: here, or on the cluster that it was submitted to."""
    from dskd.config.load import override
    from dskd.rundir.layout import RunDirectory
    from dskd.rundir.read import read_run

    if not here and "RANK" not in os.environ and RunDirectory(run_directory).job.submission.is_file():
        from dskd.launch.verbs import resubmit

        return resubmit(run_directory, overrides or [], force)
    from dskd.start import start_training

    start_training(override(read_run(run_directory), overrides or []), force)


@app.command()
def collect(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.")],
    to: Annotated[Path, typer.Option(help="Where the models and index.json go.")],
) -> None:
    """Gather the saved models of many runs in one place, verified, with an index; what is there is not copied again."""
    from dskd.config.run import check_folder
    from dskd.show import show_collected

    check_folder("--to", to)
    show_collected(run_directories, to)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A folder that `dskd train` wrote, or any other model; of a run its best one."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Records to answer, jsonl.")],
    seeds: Annotated[str, typer.Option(help="Sampling seeds, such as --seeds 10 20 30.")] = "10 20 30 40 50",
    greedy: Annotated[bool, typer.Option("--greedy", help="Most probable token instead of sampling.")] = False,
    temperature: Annotated[float, typer.Option(help="Divides the logits before sampling.")] = GENERATION.temperature,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = (
        GENERATION.top_p
    ),
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = GENERATION.max_length,
    max_prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = GENERATION.max_prompt_length,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time on each process.")] = GENERATION.batch_size,
    bos: Annotated[bool, typer.Option("--bos", help="Put BOS before the prompt.")] = False,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; empty: one for each GPU.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers.jsonl and results.json; default CHECKPOINT/eval/DATA.")
    ] = None,
) -> None:
    """Generate answers with a saved model and score ROUGE-L and exact match."""
    from dskd.config.hub import find_model
    from dskd.config.load import parse_seeds
    from dskd.config.run import check_checkpoint, check_folder, check_length
    from dskd.data.records import check_records
    from dskd.rundir.layout import evaluation_of
    from dskd.rundir.read import model_of

    checkpoint = model_of(find_model(checkpoint))
    numbers = parse_seeds(seeds)
    if precision not in ("bf16", "fp32"):
        raise UserError(f"--precision: allowed: bf16, fp32; got {precision!r}")
    folder = output or evaluation_of(checkpoint, data)
    check_checkpoint(checkpoint)
    check_records(data)
    check_folder("--output", folder)
    check_length("--max-length", max_length, checkpoint)
    with as_options():
        settings = GenerationConfig(greedy, temperature, top_p, max_length, max_prompt_length, batch_size)
    from dskd.start import gpus, start_ranks

    if "RANK" not in os.environ:
        start_ranks(processes or gpus())
    from dskd.engine import distributed
    from dskd.evaluate import evaluate as evaluate_here

    ranks = distributed.start()
    results = evaluate_here(checkpoint, data, numbers, settings, precision, folder, ranks, bos)
    if ranks.is_main:
        for name, label in (("rougel", "ROUGE-L"), ("exact_match", "exact match")):
            print(f"{label} {results[name]['mean']:.2f} +- {results[name]['deviation']:.2f}")
        print(f"{results['records']} records, seeds {', '.join(map(str, results['seeds']))}: {folder}")
    distributed.stop()


RunDirectories = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN_DIR]...", help="Run directories; empty: all under outputs/."),
]
Cluster = Annotated[
    str, typer.Option(help="Cluster profile: the name of a file in slurm/clusters, or the path of a YAML file.")
]


@app.command()
def plan(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="A run file; config.json of its models is enough.")
    ],
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Cluster profile: a name in slurm/clusters, or a YAML file; empty: 8 H100."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train three steps here first, write nothing, and correct what is said.")
    ] = False,
) -> None:
    """Tell what a run will need, before it is in any queue: memory, disk, time and nodes, for each teacher backend."""
    from dskd.config.load import load_run
    from dskd.launch.verbs import show_forecasts

    run, measured = load_run(run_file, overrides or []), None
    if measure:
        from dskd.start import measure_run

        measured = measure_run(run)
        if measured is None:
            return  # another rank tells
    show_forecasts(run, cluster, measured)


@app.command()
def submit(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN.yaml... [KEY=VALUE]...", help="Run files, and settings over theirs.")
    ],
    cluster: Cluster,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Of several runs, at most so many at a time; empty: no limit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit even what does not fit on a GPU.")] = False,
) -> None:
    """Submit runs to a Slurm cluster; several make one job array.

    A run is started again by itself after a preemption, a lost node or the time limit. Submitting a run that stopped
    before its end continues it.
    """
    from dskd.launch.verbs import submit_runs

    submit_runs(runs, cluster, parallel, dry_run, force)


@app.command()
def status(directories: RunDirectories = None) -> None:
    """Show state, progress, best model and restarts of runs, those of this machine and submitted ones."""
    from dskd.launch.verbs import show_status

    show_status(directories)


@app.command()
def logs(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
) -> None:
    """Print what a rank of a submitted run wrote, over all of its starts."""
    from dskd.launch.status import print_logs

    print_logs(directory, rank, follow)


@app.command()
def cancel(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    now: Annotated[bool, typer.Option("--now", help="At once, without saving a state first.")] = False,
) -> None:
    """Stop submitted runs after they have saved their state; `dskd resume` continues them."""
    from dskd.launch.verbs import cancel_runs

    cancel_runs(directories, now)


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Stages that train and evaluate.")],
    cluster: Annotated[
        str | None, typer.Option(help="Cluster profile: a name in slurm/clusters, or a YAML file.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the stages here, without Slurm.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted or run, and do nothing.")
    ] = False,
) -> None:
    """Run a graph of trainings and evaluations, each after those it needs; what is complete already is skipped."""
    from dskd.launch.verbs import run_pipeline

    raise SystemExit(run_pipeline(file, cluster, local, dry_run))


@app.command()
def align(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="A model's folder or org/model, as in a run file.")
    ],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The same of the student.")],
    cache_dir: Annotated[Path, typer.Option(help="Where maps are kept; a run's data.cache_dir.")] = Path(
        "outputs/cache"
    ),
) -> None:
    """Map each teacher token to its nearest student token, for method mined, and tell how many match."""
    from dskd.config.hub import find_model
    from dskd.config.run import check_folder, require_folder

    teacher, student = find_model(teacher), find_model(student)
    require_folder("TEACHER", teacher)
    require_folder("STUDENT", student)
    check_folder("--cache-dir", cache_dir)
    from dskd.data.vocabulary_map import load_or_build
    from dskd.engine.metrics import progress_bar
    from dskd.models.load import load_tokenizer

    tokenizers = load_tokenizer(teacher, "TEACHER"), load_tokenizer(student, "STUDENT")
    with progress_bar("vocabulary map") as progress:
        found = load_or_build(cache_dir, *tokenizers, progress)
    total = len(found.student_ids)
    for count, label in ((found.exact, "exactly"), (found.near, "nearly"), (found.none, "not at all")):
        print(f"{count:8d}  {100 * count / total:5.1f} %  match {label}")
    print(f"{total:8d}  teacher tokens; map kept in {cache_dir}")


teacher = typer.Typer(no_args_is_help=True)
app.add_typer(teacher, name="teacher", help="What a student learns from, made ready beforehand.")


@teacher.command()
def cache(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file of a training.")],
    overrides: Overrides = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Of N tasks that may run at a time, the share of task I, from 0.")
    ] = "0/1",
) -> None:
    """Run the teacher once over the training records, and keep its hidden states for teacher.backend=cache.

    What is in the cache already is not made again, and many runs share it; see data.cache_dir and
    teacher.cache_precision. Exit code 75 means that it was asked to stop: the same command goes on.
    """
    from dskd.config.load import load_run
    from dskd.start import start_caching
    from dskd.teachers.cache.shard import Shard

    start_caching(load_run(run_file, overrides or []), Shard.parse(shard))


@app.command()
def settings(
    prefix: Annotated[str, typer.Argument(help="Show keys that begin with this, such as train or engine.")] = "",
    search: Annotated[str, typer.Option(help="Show keys with this word in their name, type or help.")] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="Those of a cluster profile instead.")] = False,
) -> None:
    """List every key of a run file, or of a cluster profile, with its type, default and help."""
    from dskd.show import show_settings

    show_settings(prefix, search, cluster)


@app.command()
def recipes(
    folder: Annotated[Path | None, typer.Argument(help="Where to look; default: the jobs that come with dskd.")] = None,
) -> None:
    """List the run files in jobs/, one line each: method, student, teacher and what else there is to say."""
    from dskd.show import show_recipes

    show_recipes(folder)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models and runs; each start makes a new run in it.")] = Path(
        "outputs/quickstart"
    ),
    processes: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 1,
) -> None:
    """Distil a real 135 M-parameter teacher into a small student with another vocabulary, here and in minutes."""
    from dskd.quickstart import quickstart as run_quickstart

    run_quickstart(output, processes)
