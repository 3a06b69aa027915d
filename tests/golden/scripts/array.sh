#!/bin/bash

# Parameters
#SBATCH --array=0-19%4
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:11:12
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/arrays/1/%A_%a_0_log.err
#SBATCH --gpus-per-node=1
#SBATCH --job-name=dskd-seed0
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/arrays/1/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 test -e /project/outputs/gpt2-base/dskd_cma/arrays/1/runs.txt || { echo 'dskd: /project/outputs/gpt2-base/dskd_cma/arrays/1 is not on storage that all nodes share with the login node' >&2; exit 2; }
DSKD_START=$(PYTHON -m dskd.launch.batch begin /project/outputs/gpt2-base/dskd_cma/arrays/1) || exit
export DSKD_START

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /project/outputs/gpt2-base/dskd_cma/arrays/1/%A_%a_%t_log.out --error /project/outputs/gpt2-base/dskd_cma/arrays/1/%A_%a_%t_log.err --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit /project/outputs/gpt2-base/dskd_cma/arrays/1


# teardown
PYTHON -m dskd.launch.batch finish /project/outputs/gpt2-base/dskd_cma/arrays/1 $?
exit
# each rank runs
PYTHON -m dskd train /project/outputs/gpt2-base/dskd_cma/seed0/job/run.yaml
