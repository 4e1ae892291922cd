#!/bin/bash
# Trains on several machines under Slurm, and resumes by itself after a preemption, after the time limit and after a
# crash:
#
#     sbatch slurm.sh phase1_zero1/train.py nanoGPT/config/train_gpt2.py --out_dir=/shared/gpt2
#
# This adds --init_from=auto, which starts from scratch if out_dir has no checkpoint. To finetune, make that first
# checkpoint by hand, with the same flags and --max_iters=0.
# Adapt the lines below to your cluster. The repository, the data and out_dir must be on a file system that all machines
# see.
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# One task is one torchrun, which starts one process per GPU. --requeue lets Slurm restart the job, for example after a
# machine has failed, and append to the same output. --signal sends SIGUSR1 to this script only, 120 s before the time
# limit, and with PreemptParameters=send_user_signal in slurm.conf also before a preemption that has a GraceTime.

requeue=no
# shellcheck disable=SC2317  # the trap calls it
stop_and_requeue() {
    requeue=yes
    # reaches every torchrun, but not this script; the ranks finish their step, save, and end
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop_and_requeue USR1

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint="$first_machine:$((10000 + SLURM_JOB_ID % 20000))"
rendezvous=(--rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$endpoint")
# seconds from SIGTERM until torchrun (of torch 2.13) kills the ranks; its default of 30 may be too few for a large save
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
# --kill-on-bad-exit=0: a torchrun that ends early must not end the others while they save
srun --kill-on-bad-exit=0 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --max-restarts=3 "${rendezvous[@]}" "$@" --init_from=auto &
training=$!
wait "$training"
status=$?
while kill -0 "$training" 2>/dev/null; do # SIGUSR1 ended the wait
    wait "$training"
    status=$?
done
if [ "$status" -eq 138 ]; then # 128 + SIGUSR1: training ended while the trap ran
    wait "$training"
    status=$?
fi
if [ "$requeue" = yes ] && [ "$status" -ne 0 ]; then # 0: training had finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
