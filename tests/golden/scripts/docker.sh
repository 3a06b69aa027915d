#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=dskd-default
#SBATCH --mem=491520M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
export NCCL_SOCKET_IFNAME=ib0
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
sh -c 'mkdir -p /project/outputs || exit
exec "$@"' dskd docker run --rm --user=1000:1000 --read-only --cap-drop=ALL --security-opt=no-new-privileges --tmpfs=/tmp:exec --mount=type=bind,source=/data/dolly/dev.jsonl,target=/data/dolly/dev.jsonl,readonly --mount=type=bind,source=/data/dolly/train.jsonl,target=/data/dolly/train.jsonl,readonly --mount=type=bind,source=/project/models/gpt2-base,target=/project/models/gpt2-base,readonly --mount=type=bind,source=/project/models/qwen1.5-1.8b,target=/project/models/qwen1.5-1.8b,readonly --mount=type=bind,source=/project/outputs,target=/project/outputs --gpus=all --network=host --ipc=host --env=RANK --env=LOCAL_RANK --env=WORLD_SIZE --env=LOCAL_WORLD_SIZE --env=MASTER_ADDR --env=MASTER_PORT --env=DSKD_SECRET --env=OMP_NUM_THREADS --env=CUDA_VISIBLE_DEVICES --env=NCCL_SOCKET_IFNAME --ulimit=memlock=-1 --device=/dev/infiniband registry.example.org/dskd:0.1.0 train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
