"""Mistakes that the tests must notice: one line of the project that says something else, and where that shows."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    """Text that is in the file exactly once."""
    new: str
    tests: str
    """Files or ids of tests of which one at least must fail, separated by spaces; all are part of `make test`."""


OPTIMIZER = "tests/engine/test_optimizer.py"
GRADIENT = f"{OPTIMIZER}::test_the_gradient_is_that_of_the_dense_loss_clipped_by_its_norm"
ADAMW = f"{OPTIMIZER}::test_a_step_is_adamw_s_with_the_rate_and_decay_of_each_parameter"
ONE, TWO = "zero0-fp32-1-clip0.01", "zero2-fp32-2-clip0.01"
GOLDEN, STREAMING = "tests/losses/test_golden.py", "tests/losses/test_streaming.py"
STATE, FILES = "tests/checkpoint/test_state.py", "tests/rundir/test_files.py"
NEXT_STEP = f"{STATE}::test_the_step_after_a_state_is_the_same_step"

MUTANTS = (
    # The optimizer step
    Mutant(
        "projectors trained at the student's rate",
        "dskd/engine/zero.py",
        '"weight_decay": weight_decay, "lr_key": lr_key}',
        '"weight_decay": weight_decay, "lr_key": "lr"}',
        f"{ADAMW}[dskd-{ONE}-1]",
    ),
    Mutant(
        "weight decay on vectors",
        "dskd/engine/zero.py",
        "((run.train.weight_decay, True), (0.0, False))",
        "((run.train.weight_decay, True), (run.train.weight_decay, False))",
        f"{ADAMW}[dskd-{ONE}-1]",
    ),
    Mutant(
        "no clipping",
        "dskd/engine/zero.py",
        '"gradient_clipping": train.clip,',
        '"gradient_clipping": 0.0,',
        f"{GRADIENT}[sft-{ONE}-1]",
    ),
    Mutant(
        "learning rates never set",
        "dskd/engine/zero.py",
        'group["lr"] = rates[group["lr_key"]]',
        'group["lr"] = group["lr"]',
        f"{ADAMW}[sft-{ONE}-2]",
    ),
    Mutant(
        "learning rate one step ahead",
        "dskd/train.py",
        "progress = (step - 1 - warmup)",
        "progress = (step - warmup)",
        "tests/engine/test_step.py::test_learning_rates",
    ),
    Mutant(
        "the same dropout on all ranks",
        "dskd/assemble.py",
        "randomness.seed(run.train.seed + ranks.rank)",
        "randomness.seed(run.train.seed)",
        f"{OPTIMIZER}::test_what_is_dropped_out_differs_between_ranks_and_draws_and_seeds",
    ),
    Mutant(
        "accumulated gradients averaged once too often",
        "dskd/train.py",
        "undo = ranks.world_size * training.engine.gradient_accumulation_steps()",
        "undo = ranks.world_size",
        f"{GRADIENT}[sft-{ONE}-1]",
    ),
    Mutant(
        "parts divided by a token too many",
        "dskd/train.py",
        "scales = divided(dict.fromkeys(method.weights, tokens))\n",
        "scales = divided(dict.fromkeys(method.weights, tokens + 1))\n",
        f"{GRADIENT}[sft-{ONE}-1]",
    ),
    Mutant(
        "tokens of this rank alone counted",
        "dskd/train.py",
        "tokens = ranks.sum_int(sum(len(batch.student.labels) for batch in micro_batches))",
        "tokens = sum(len(batch.student.labels) for batch in micro_batches)",
        f"{GRADIENT}[sft-{TWO}-1]",
    ),
    Mutant(
        "own counts of the first micro-batch taken for all",
        "dskd/train.py",
        "{part: sum(own[part] for own in ahead) for part in ahead[0]}",
        "{part: ahead[0][part] for part in ahead[0]}",
        "tests/engine/test_methods.py",
    ),
    # Losses
    Mutant(
        "kd without its share",
        "dskd/losses/logit_method.py",
        '{"ce": 1 - settings.kd_rate, "kd": settings.kd_rate}',
        '{"ce": 1 - settings.kd_rate, "kd": 1 - settings.kd_rate}',
        f"{GRADIENT}[kd-{ONE}-1]",
    ),
    Mutant(
        "dual spaces with all of the cross-entropy",
        "dskd/losses/dual_space.py",
        '{"ce": 1 - rate, "t2s_ce"',
        '{"ce": 1.0, "t2s_ce"',
        f"{GRADIENT}[dskd-{ONE}-1]",
    ),
    Mutant(
        "no chain rule through the temperature",
        "dskd/losses/distances.py",
        "value, grad = self.inner()(student, teacher)\n        return value, grad.div_(self.temperature)",
        "value, grad = self.inner()(student, teacher)\n        return value, grad",
        f"{GOLDEN}::test_divergence",
    ),
    Mutant(
        "forward KL with the other sign",
        "dskd/losses/divergence.py",
        "return value, p.sub_(q)",
        "return value, q.sub_(p)",
        f"{GOLDEN}::test_divergence[forward_kl]",
    ),
    Mutant(
        "attention of dskd_cma over the wrong side",
        "dskd/losses/dskd_cma.py",
        "scores.softmax(-1) @ v_teacher",
        "scores.softmax(0) @ v_teacher",
        f"{GOLDEN}::test_dual_space",
    ),
    Mutant(
        "uld without what only one side has",
        "dskd/losses/distances.py",
        "gap.abs().sum(-1) + rest + ",
        "gap.abs().sum(-1) + ",
        f"{GOLDEN}::test_uld",
    ),
    Mutant(
        "mined with tokens that have several partners",
        "dskd/losses/mined.py",
        "teacher.pairs[alone[0] & alone[1]]",
        "teacher.pairs[alone[1]]",
        f"{STREAMING}::test_streamed_is_dense[mined]",
    ),
    Mutant(
        "dskd_v2 masked whatever is asked for",
        "dskd/losses/dual_space.py",
        "learn = right if self.masked else torch.ones_like(right)",
        "learn = right",
        f"{GOLDEN}::test_dskd_v2",
    ),
    Mutant(
        "the head's gradient of the last chunk alone",
        "dskd/losses/streaming.py",
        "total.addmm_(left, right)",
        "total.copy_(left @ right)",
        f"{STREAMING}::test_streamed_is_dense[sft]",
    ),
    Mutant(
        "labels in another order than their states",
        "dskd/losses/response.py",
        "hidden, self.labels = hidden[order], self.labels[order]",
        "hidden = hidden[order]",
        f"{STREAMING}::test_streamed_is_dense[uld]",
    ),
    # Data
    Mutant(
        "the same order in every epoch",
        "dskd/data/loader.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng((seed, 0))",
        "tests/data/test_loader.py",
    ),
    Mutant(
        "ranks that overlap",
        "dskd/data/loader.py",
        "parts[rank::world_size]",
        "parts[rank:]",
        "tests/data/test_loader.py",
    ),
    Mutant(
        "micro-batches of tokens that ranks do not share equally",
        "dskd/data/budget.py",
        "-(-least // ranks) * ranks",
        "least",
        "tests/data/test_budget.py",
    ),
    Mutant(
        "deviations of the first micro-batch taken for all",
        "dskd/losses/dskd_cma.py",
        "for teacher in teachers:",
        "for teacher in teachers[:1]:",
        "tests/engine/test_micro_batches.py",
    ),
    Mutant(
        "attention that looks past its window",
        "dskd/models/packing.py",
        "window >= longest",
        "window >= 0",
        "tests/models/test_views.py",
    ),
    Mutant(
        "each token predicted from itself",
        "dskd/data/batch.py",
        "torch.arange(first - 1, end - 1)",
        "torch.arange(first, end)",
        "tests/data/test_batch.py",
    ),
    Mutant(
        "SentencePiece's own space counted as text",
        "dskd/data/alignment.py",
        "int(surplus == 1), int(surplus == -1)",
        "0, 0",
        "tests/data/test_alignment.py",
    ),
    Mutant(
        "a token mapped to one that has nothing of it",
        "dskd/data/vocabulary_map.py",
        "if edits < max(len(piece), len(candidates[nearest])):",
        "if edits <= max(len(piece), len(candidates[nearest])):",
        "tests/data/test_vocabulary_map.py",
    ),
    # States
    Mutant(
        "each rank saves the first share",
        "dskd/checkpoint/shards.py",
        "offset=piece.offset + first, start",
        "offset=piece.offset, start",
        "tests/checkpoint/test_shards.py",
    ),
    Mutant(
        "moments not restored",
        "dskd/checkpoint/shards.py",
        "piece.of(moments[key]).copy_(saved.read(key, piece.name, piece.start, piece.count))",
        "pass",
        f"{NEXT_STEP}[2-bf16]",
    ),
    Mutant(
        "the optimizer's steps counted anew",
        "dskd/checkpoint/shards.py",
        'moments["step"] = torch.tensor(float(step), device=device)',
        'moments["step"] = torch.tensor(1.0, device=device)',
        f"{NEXT_STEP}[0-fp32]",
    ),
    Mutant(
        "dropout not restored",
        "dskd/checkpoint/randomness.py",
        'torch.set_rng_state(tensors["rng:torch"])',
        "pass",
        f"{NEXT_STEP}[0-fp32]",
    ),
    Mutant(
        "a copy that is the weight itself",
        "dskd/checkpoint/host_memory.py",
        "return host.view(tensor.shape).copy_(tensor.detach())",
        "return tensor.detach()",
        "tests/checkpoint/test_host_memory.py",
    ),
    Mutant(
        "a sum of other bytes than were written",
        "dskd/rundir/files.py",
        "hashed.update(block)",
        "hashed.update(whole)",
        "tests/checkpoint/test_tensor_file.py",
    ),
    Mutant(
        "the worst answers are the best",
        "dskd/rundir/train_state.py",
        "-(scores.rougel or 0.0)",
        "(scores.rougel or 0.0)",
        "tests/rundir/test_train_state.py",
    ),
    Mutant(
        "no sum is compared",
        "dskd/rundir/files.py",
        'return None if sha256(file) == expected["sha256"] else',
        "return None if True else",
        f"{FILES} {STATE}",
    ),
    Mutant(
        "a manifest may name any file",
        "dskd/rundir/files.py",
        "if not stays_inside(name):",
        "if False:",
        FILES,
    ),
    Mutant(
        "a file is written over in its place",
        "dskd/rundir/files.py",
        "temporary.replace(file)",
        "shutil.copyfile(temporary, file)",
        FILES,
    ),
    # Processes
    Mutant(
        "no lock",
        "dskd/rundir/lock.py",
        "fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/rundir/test_lock.py",
    ),
    Mutant(
        "hidden states that nobody checks",
        "dskd/teachers/cache/pieces.py",
        "if checksum(stored) != self.checksums[record]:",
        "if False:",
        "tests/teachers/test_cache.py",
    ),
    Mutant(
        "records found by their response alone",
        "dskd/teachers/cache/pieces.py",
        "[[len(sample.prompt)], sample.prompt, sample.response]",
        "[[0], sample.response]",
        "tests/teachers/test_cache.py",
    ),
    Mutant(
        "a watchdog that never barks",
        "dskd/engine/watchdog.py",
        "if silent > 60 * minutes[phase]:",
        "if silent > 600 * minutes[phase] + 600:",
        "tests/engine/test_watchdog.py",
    ),
    Mutant(
        "a stop that the ranks do not hear of",
        "dskd/engine/distributed.py",
        "torch.tensor([self.flags.stop_requested, save]",
        "torch.tensor([False, save]",
        "tests/engine/test_distributed.py",
    ),
    Mutant(
        "a signal that leaves no mark",
        "dskd/engine/preemption.py",
        "first, flags.stop_requested = not flags.stop_requested, True",
        "first = not flags.stop_requested",
        "tests/engine/test_preemption.py",
    ),
    Mutant(
        "all ranks on one device",
        "dskd/launch/ranks.py",
        '"LOCAL_RANK": rank,',
        '"LOCAL_RANK": 0,',
        "tests/launch/test_local.py::test_each_rank_knows_its_place",
    ),
    Mutant(
        "a killed rank taken for a mistake",
        "dskd/launch/ranks.py",
        "return UNFINISHED if failed is not None and failed < 0 else failed or 0",
        "return abs(failed or 0)",
        "tests/launch/test_local.py::test_exit_codes",
    ),
    # Clusters
    Mutant(
        "a cancelled run is started again",
        "dskd/launch/batch.py",
        "if jobs.is_cancelled() and not is_complete(jobs.directory):",
        "if False:",
        "tests/launch/test_fake_batch.py",
    ),
    Mutant(
        "requeued for ever",
        "dskd/launch/batch.py",
        ">= job.max_requeues:",
        "> 10**9:",
        "tests/launch/test_decisions.py",
    ),
    Mutant(
        "a status without the starts before",
        "dskd/launch/status.py",
        'if start.outcome in ("again", "lost")',
        'if start.outcome == "lost"',
        "tests/launch/test_fake_status.py::test_a_run_that_was_started_again_tells_why",
    ),
    Mutant(
        "a pipeline that submits twice",
        "dskd/launch/pipeline.py",
        "if request.directory not in queued]",
        "if request.directory]",
        "tests/launch/test_fake_pipeline.py",
    ),
    Mutant(
        "stages that wait for nothing",
        "dskd/launch/submit.py",
        '"dependency": f"afterok:{\':\'.join(after)}" if after else None,',
        '"dependency": None,',
        "tests/launch/test_scripts.py",
    ),
    Mutant(
        "everything writable in a container",
        "dskd/launch/mounts.py",
        '("" if self.writable else ":ro")',
        '""',
        "tests/launch/test_mounts.py",
    ),
    # Reports
    Mutant(
        "differences that are not paired by record",
        "dskd/report/content.py",
        "[own[key] - other[key] for key in own]",
        "[own[key] - min(other.values()) for key in own]",
        "tests/report/test_report.py::test_differences_to_the_baseline_are_paired_by_record",
    ),
    Mutant(
        "texts of runs as HTML",
        "dskd/report/escape.py",
        "return escape(",
        "return str(",
        "tests/report/test_report.py::test_nothing_of_a_run_is_taken_for_more_than_text",
    ),
    Mutant(
        "cosines over records instead of tokens",
        "dskd/analyze.py",
        "normalize(states, dim=-1)",
        "normalize(states, dim=0)",
        "tests/test_analyze.py::test_all_measures_are_those_of_numpy_where_the_vocabulary_is_one",
    ),
    # Answers
    Mutant(
        "the same random numbers for all records",
        "dskd/models/generate.py",
        "Philox(key=[seed, prompt.index])",
        "Philox(key=[seed, 0])",
        "tests/models/test_generate.py::test_random_numbers_follow_from_seed_and_record_alone",
    ),
    Mutant(
        "padding counted as tokens before a prompt",
        "dskd/models/generate.py",
        "(self.mask.cumsum(1) - 1)",
        "(torch.ones_like(self.mask).cumsum(1) - 1)",
        "tests/models/test_generate.py::test_answers_are_those_of_the_definition_whatever_else_is_in_the_batch",
    ),
    Mutant(
        "a batch with a missing answer passed over",
        "dskd/evaluation/answers.py",
        "if not all(prompt.index in done",
        "if not any(prompt.index in done",
        "tests/evaluation/test_evaluate.py::test_damaged_lines_are_answered_again_with_all_of_their_batch",
    ),
    Mutant(
        "a judge's key sent unencrypted",
        "dskd/evaluation/judge.py",
        'place.scheme == "http" and not',
        'place.scheme == "ftp" and not',
        "tests/evaluation/test_judge.py::test_a_key_goes_to_another_machine_encrypted_alone",
    ),
    # Data and students
    Mutant(
        "an answer that stands in its own prompt",
        "dskd/data/sources.py",
        "plain[:index]",
        "plain[: index + 1]",
        "tests/data/test_sources.py::test_each_turn_of_the_assistant_is_a_record",
    ),
    Mutant(
        "leaks told by the letter alone",
        "dskd/data/check.py",
        ".casefold().encode()",
        ".encode()",
        "tests/data/test_check.py::test_prompts_that_differ_in_spaces_and_capitals_are_one",
    ),
    Mutant(
        "test records drawn from the dev records",
        "dskd/data/prepare.py",
        "set(drawn[wanted.dev :])",
        "set(drawn[: wanted.test])",
        "tests/data/test_prepare.py::test_dolly_is_split_at_random_and_alike_for_one_seed",
    ),
    Mutant(
        "layers refitted to their own outputs",
        "dskd/students/refit.py",
        "[index - 1 for index in [*layers[1:], model.config.num_hidden_layers]]",
        "list(layers)",
        "tests/students/test_students.py::test_refitted_layers_come_nearer_to_the_model",
    ),
    Mutant(
        "embeddings of byte-fallback pieces that no text uses",
        "dskd/students/vocabulary.py",
        "key=lambda index: (index in fallback, index)",
        "key=lambda index: index",
        "tests/students/test_students.py::test_its_own_vocabulary_changes_nothing",
    ),
    Mutant(
        "pickles loaded with their code",
        "dskd/students/convert.py",
        'torch.load(source / ADAPTER, map_location="cpu", weights_only=True)',
        'torch.load(source / ADAPTER, map_location="cpu", weights_only=False)',
        "tests/students/test_convert.py::test_no_code_of_a_pickled_adapter_runs",
    ),
)
