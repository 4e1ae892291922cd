# GPT-2 large (774M). The recipe is llm.c's, scripts/run_gpt2_774M.sh, for 150 billion tokens of FineWeb; no published
# result of it was found. Here without biases, as in train_gpt2.py; llm.c has them. Its 32 sequences a GPU are 16 here,
# in twice as many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_774M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                           1 H100       4 H100       8 H100       1 H200       4 H200       8 H200
#   ddp                 45 GiB 90k  47 GiB 334k  47 GiB 658k   45 GiB 97k  47 GiB 360k  47 GiB 709k
#   zero1               45 GiB 90k  42 GiB 334k  41 GiB 657k   45 GiB 97k  42 GiB 359k  41 GiB 706k
#   triton              41 GiB 97k  44 GiB 362k  44 GiB 710k  41 GiB 103k  44 GiB 382k  44 GiB 751k
#   fsdp                45 GiB 90k  32 GiB 349k  30 GiB 693k   45 GiB 97k  32 GiB 372k  30 GiB 738k
#   zero1+triton        41 GiB 97k  39 GiB 361k  38 GiB 709k  41 GiB 103k  39 GiB 381k  38 GiB 747k
#   fsdp+triton         41 GiB 97k  32 GiB 372k  30 GiB 738k  41 GiB 103k  32 GiB 389k  30 GiB 773k
#   hybrid                       -  35 GiB 348k  32 GiB 692k            -  35 GiB 371k  32 GiB 737k
#   fsdp+checkpointing  21 GiB 69k  10 GiB 269k   9 GiB 536k   21 GiB 75k  10 GiB 287k   9 GiB 570k
#   fsdp+offload        45 GiB 90k  25 GiB 279k  25 GiB 476k   45 GiB 97k  25 GiB 293k  25 GiB 497k
# It recommends fsdp+triton on 8 H100 (2.4 days), fsdp+triton on 8 H200 (2.2 days).
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
