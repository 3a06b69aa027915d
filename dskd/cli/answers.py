"""Verbs that let a model answer."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dskd.config.errors import LAST_SEED, UserError, as_options
from dskd.config.training import GenerationConfig

DEFAULT = GenerationConfig()
Greedy = Annotated[bool, typer.Option("--greedy", help="Most probable token instead of sampling.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits before sampling.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of prompt and answer together.")]
MaxPromptLength = Annotated[int, typer.Option(help="Tokens of the prompt.")]
BatchSize = Annotated[int, typer.Option(help="Prompts of full length at a time on each process; of shorter ones more.")]
Bos = Annotated[bool, typer.Option("--bos", help="Put BOS before the prompt.")]
Precision = Annotated[str, typer.Option(help="bf16 or fp32.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes; empty: one for each GPU.")]


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A folder that `dskd train` wrote, or any other model; of a run its best one."
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="Records to answer, in any form of data.train.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="A suite instead: paper, its sets in --data-root, or lm-eval:TASK,TASK.")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of the sets of a suite.")] = None,
    seeds: Annotated[str, typer.Option(help="Sampling seeds, such as --seeds 10 20 30.")] = "10 20 30 40 50",
    greedy: Greedy = False,
    temperature: Temperature = DEFAULT.temperature,
    top_p: TopP = DEFAULT.top_p,
    max_length: MaxLength = DEFAULT.max_length,
    max_prompt_length: MaxPromptLength = DEFAULT.max_prompt_length,
    batch_size: BatchSize = DEFAULT.batch_size,
    bos: Bos = False,
    precision: Precision = "bf16",
    processes: Processes = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for answers.jsonl and results.json; default CHECKPOINT/eval/DATA.")
    ] = None,
    jobs: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help="Submit each set with each seed as a job to this cluster.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --jobs: print what would be submitted, and submit nothing.")
    ] = False,
) -> None:
    """Generate answers with a saved model and score ROUGE-L and exact match.

    What was answered alike before is not answered again, so the same command goes on after an interruption.
    """
    from dskd.config.load import parse_seeds
    from dskd.config.suites import named_files, suite_files

    numbers = parse_seeds(seeds)
    check_precision(precision)
    if suite is not None and suite.startswith("lm-eval:"):
        from dskd.start import start_harness

        if data or data_root or output or jobs:
            raise UserError(
                "--suite: lm-eval has its own data, and its results go to MODEL/eval/lm-eval; leave out the rest"
            )
        return start_harness(checkpoint, suite, precision, batch_size)
    with as_options():
        settings = GenerationConfig(greedy, temperature, top_p, max_length, max_prompt_length, batch_size)
        files = named_files([data] if data else [])
        if suite is not None and data_root is not None:
            files += suite_files(suite, data_root)
    if not files or (suite is None) != (data_root is None):
        raise UserError("--data: is missing; either --data FILE, or --suite paper --data-root FOLDER is expected")
    if output is not None and (len(files) > 1 or jobs):
        raise UserError("--output: is for one file of records without --jobs; else results go to MODEL/eval")
    if jobs is not None:
        from dskd.config.pipeline import StageConfig
        from dskd.launch.verbs import submit_evaluations

        stage = StageConfig(
            evaluate=str(checkpoint),
            data=tuple(str(file) for _, file in files),
            seeds=tuple(numbers[:1] if greedy else numbers),
            generation=settings,
            bos=bos,
            precision="fp32" if precision == "fp32" else "bf16",
            processes=processes,
        )
        return submit_evaluations(checkpoint, files, stage, jobs, dry_run)
    from dskd.start import start_evaluation

    start_evaluation(checkpoint, files, numbers, settings, precision, bos, processes, output)


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder; of a run directory its best one.")],
    data: Annotated[Path, typer.Option(help="Records whose prompts are answered, in any form of data.train.")],
    out: Annotated[Path, typer.Option(help="The file of new records, jsonl; its card goes beside it.")],
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Of N tasks that may run at a time, the share of task I, from 0.")
    ] = "0/1",
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Of sampling.")] = 10,
    greedy: Greedy = False,
    temperature: Temperature = DEFAULT.temperature,
    top_p: TopP = DEFAULT.top_p,
    max_length: MaxLength = DEFAULT.max_length,
    max_prompt_length: MaxPromptLength = DEFAULT.max_prompt_length,
    batch_size: BatchSize = DEFAULT.batch_size,
    bos: Bos = False,
    whole: Annotated[bool, typer.Option("--whole", help="Leave out answers that --max-length cuts.")] = False,
    precision: Precision = "bf16",
    processes: Processes = None,
    engine: Annotated[str, typer.Option(help="dskd, or vllm where that is installed.")] = "dskd",
) -> None:
    """Let a model answer the prompts of records: new records, to train a student on (SeqKD, healing).

    What is made is kept, so the same command goes on after an interruption; the task that finds all shares made
    writes the file.
    """
    check_precision(precision)
    if engine not in ("dskd", "vllm"):
        raise UserError(f"--engine: allowed: dskd, vllm; got {engine!r}")
    with as_options():
        settings = GenerationConfig(greedy, temperature, top_p, max_length, max_prompt_length, batch_size)
    from dskd.data.shard import Shard
    from dskd.evaluation.asked import Generation
    from dskd.start import start_generation

    share = Shard.parse(shard)
    asked = Generation(model, data, out, seed, settings, precision, bos, whole, "vllm" if engine == "vllm" else "dskd")
    start_generation(asked, share, processes)


def judge(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVALUATION...", help="Finished evaluations, such as MODEL/eval/DATA."),
    ],
    address: Annotated[str, typer.Option(help="OpenAI-compatible, up to /v1.")],
    model: Annotated[str, typer.Option(help="The judge's name there.")],
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Questions at a time.")] = 8,
) -> None:
    """Let a language model score the answers of evaluations from 1 to 10; the key is in DSKD_JUDGE_KEY.

    No question is asked twice: replies are kept in judge.jsonl, and the score is added to results.json.
    """
    from dskd.evaluation.judge import KEY, Judge, judge_evaluation

    asked = Judge(address, model, os.environ.get(KEY) or None)
    for folder in evaluations:
        found = judge_evaluation(folder, asked, parallel)
        print(
            f"judge {found['mean']:.2f} +- {found['deviation']:.2f} of 10 ({found['judged']} answers, "
            f"{found['without_score']} without a score; {found['asked']} asked now; "
            f"{found['prompt_tokens']:,} + {found['completion_tokens']:,} tokens in all): {folder}"
        )


def check_precision(precision: str) -> None:
    if precision not in ("bf16", "fp32"):
        raise UserError(f"--precision: allowed: bf16, fp32; got {precision!r}")
