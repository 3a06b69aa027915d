#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=16
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=dskd-default
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=240

# setup
export NCCL_IB_SL=1
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
exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --no-container-mount-home "$@"' dskd --container-image=/lustre/images/dskd.sqsh --container-mounts=/data/dolly/dev.jsonl:/data/dolly/dev.jsonl:ro,/data/dolly/train.jsonl:/data/dolly/train.jsonl:ro,/project/models/gpt2-base:/project/models/gpt2-base:ro,/project/models/qwen1.5-1.8b:/project/models/qwen1.5-1.8b:ro,/project/outputs:/project/outputs --container-env=RANK,LOCAL_RANK,WORLD_SIZE,LOCAL_WORLD_SIZE,MASTER_ADDR,MASTER_PORT,DSKD_SECRET,OMP_NUM_THREADS,CUDA_VISIBLE_DEVICES,NCCL_IB_SL env dskd train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
