#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=dskd-default
#SBATCH --mail-type=FAIL
#SBATCH --mem=491520M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
module load cuda/12.6
export NCCL_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export HF_HUB_OFFLINE=1
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
/project/envs/dskd/bin/python -m dskd train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
