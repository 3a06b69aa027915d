#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=12
#SBATCH --error=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=dskd-default
#SBATCH --mem=512000M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/project/outputs/gpt2-base/dskd_cma/default/job/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=720

# setup
module load apptainer
export NCCL_SOCKET_IFNAME=hsn
export NCCL_DEBUG=WARN
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
sh -c 'mkdir -p /project/outputs /tmp || exit
for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT DSKD_SECRET OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_SOCKET_IFNAME NCCL_DEBUG; do value=$(printenv "$name") && export "APPTAINERENV_$name=$value"; done
exec apptainer exec --cleanenv --no-home --no-mount=home,cwd "$@"
' dskd --nv --bind=/data/dolly/dev.jsonl:/data/dolly/dev.jsonl:ro --bind=/data/dolly/train.jsonl:/data/dolly/train.jsonl:ro --bind=/project/models/gpt2-base:/project/models/gpt2-base:ro --bind=/project/models/qwen1.5-1.8b:/project/models/qwen1.5-1.8b:ro --bind=/project/outputs:/project/outputs --bind=/tmp:/tmp /project/images/dskd.sif dskd train /project/outputs/gpt2-base/dskd_cma/default/job/run.yaml
