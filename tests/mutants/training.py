"""Mistakes in what trains: optimizer, losses, data, states."""

from mutants.mutant import Mutant

OPTIMIZER = "tests/engine/test_optimizer.py"
GRADIENT = f"{OPTIMIZER}::test_the_gradient_is_that_of_the_dense_loss_clipped_by_its_norm"
ADAMW = f"{OPTIMIZER}::test_a_step_is_adamw_s_with_the_rate_and_decay_of_each_parameter"
ONE, TWO = "zero0-fp32-1-clip0.01", "zero2-fp32-2-clip0.01"
GOLDEN, STREAMING = "tests/losses/test_golden.py", "tests/losses/test_streaming.py"
STATE, FILES = "tests/checkpoint/test_state.py", "tests/rundir/test_files.py"
NEXT_STEP = f"{STATE}::test_the_step_after_a_state_is_the_same_step"

TRAINING = (
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
)
