#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=2
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=dskd-default
#SBATCH --mem=3072M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=low
#SBATCH --requeue
#SBATCH --signal=USR2@30
#SBATCH --time=60

# setup
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY=passive
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
PYTHON -m dskd train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
