# GPT-2 large (774M). The recipe is llm.c's, scripts/run_gpt2_774M.sh, for 150 billion tokens of FineWeb; no published
# result of it was found. Here without biases, as in train_gpt2.py; llm.c has them. Its 32 sequences a GPU are 16 here,
# in twice as many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_774M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                           1 H100       4 H100       8 H100       1 H200       4 H200       8 H200
#   ddp                 45 GiB 91k  47 GiB 338k  47 GiB 664k   45 GiB 98k  47 GiB 363k  47 GiB 715k
#   zero1               45 GiB 91k  42 GiB 338k  41 GiB 664k   45 GiB 98k  42 GiB 363k  41 GiB 713k
#   triton              41 GiB 99k  44 GiB 367k  44 GiB 720k  41 GiB 104k  44 GiB 386k  44 GiB 759k
#   fsdp                45 GiB 91k  32 GiB 351k  30 GiB 697k   45 GiB 98k  32 GiB 374k  30 GiB 742k
#   zero1+triton        41 GiB 99k  39 GiB 367k  38 GiB 719k  41 GiB 104k  39 GiB 386k  38 GiB 757k
#   fsdp+triton         41 GiB 99k  32 GiB 377k  30 GiB 749k  41 GiB 104k  32 GiB 394k  30 GiB 783k
#   hybrid                       -  35 GiB 350k  32 GiB 695k            -  35 GiB 373k  32 GiB 741k
#   fsdp+checkpointing  21 GiB 74k  11 GiB 270k   9 GiB 538k   21 GiB 80k  11 GiB 288k   9 GiB 573k
#   fsdp+offload        45 GiB 91k  25 GiB 280k  25 GiB 478k   45 GiB 98k  25 GiB 294k  25 GiB 499k
# It recommends fsdp+triton on 8 H100 (2.3 days), fsdp+triton on 8 H200 (2.2 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

n_layer, n_head, n_embd = 36, 20, 1280

# 16 sequences * 1024 tokens * 32 micro-steps over all GPUs = 524,288 tokens an iteration
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32

learning_rate = 2.5e-4
min_lr = 0.0
warmup_iters = 700
max_iters = 286102
lr_decay_iters = 286102
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 100
log_interval = 10
