#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=dskd-default
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 test -e /project/outputs/gpt2-base/dskd_cma/default/job/submitit/runs.txt || { echo 'dskd: /project/outputs/gpt2-base/dskd_cma/default/job/submitit is not on storage that all nodes share with the login node' >&2; exit 2; }
DSKD_START=$(PYTHON -m dskd.launch.batch begin /project/outputs/gpt2-base/dskd_cma/default/job/submitit) || exit
export DSKD_START

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_%t_log.out --error /project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_%t_log.err --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit /project/outputs/gpt2-base/dskd_cma/default/job/submitit


# teardown
PYTHON -m dskd.launch.batch finish /project/outputs/gpt2-base/dskd_cma/default/job/submitit $?
exit
# each rank runs
sh -c 'mkdir -p /local/scratch /project/outputs || exit
exec "$@"' dskd podman run --rm --user=1000:1000 --read-only --cap-drop=ALL --security-opt=no-new-privileges --tmpfs=/tmp:exec --security-opt=label=disable --userns=keep-id --mount=type=bind,source=/data/dolly/dev.jsonl,target=/data/dolly/dev.jsonl,readonly --mount=type=bind,source=/data/dolly/train.jsonl,target=/data/dolly/train.jsonl,readonly --mount=type=bind,source=/local/scratch,target=/local/scratch --mount=type=bind,source=/project/models/gpt2-base,target=/project/models/gpt2-base,readonly --mount=type=bind,source=/project/models/qwen1.5-1.8b,target=/project/models/qwen1.5-1.8b,readonly --mount=type=bind,source=/project/outputs,target=/project/outputs --mount=type=bind,source=/project/vocabularies,target=/vocabularies,readonly --device=nvidia.com/gpu=all --network=host --ipc=host --env=RANK --env=LOCAL_RANK --env=WORLD_SIZE --env=LOCAL_WORLD_SIZE --env=MASTER_ADDR --env=MASTER_PORT --env=DSKD_SECRET --env=OMP_NUM_THREADS --env=CUDA_VISIBLE_DEVICES --ulimit=memlock=-1 registry.example.org/dskd:0.1.0 train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
