# GPT-2 large (774M). The recipe is llm.c's (scripts/run_gpt2_774M.sh), for 150 billion tokens of FineWeb; we found no
# published result of it. Two things differ here: there are no biases, as in train_gpt2.py, and a micro-step has 16
# sequences per GPU instead of 32, so there are twice as many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_774M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                           1 H100       4 H100       8 H100       1 H200       4 H200       8 H200
#   ddp                 45 GiB 90k  47 GiB 336k  47 GiB 660k   45 GiB 97k  47 GiB 361k  47 GiB 711k
#   zero1               45 GiB 90k  42 GiB 336k  41 GiB 660k   45 GiB 97k  42 GiB 360k  41 GiB 708k
#   triton              41 GiB 99k  44 GiB 365k  44 GiB 717k  41 GiB 104k  44 GiB 384k  44 GiB 755k
#   fsdp                45 GiB 90k  32 GiB 348k  30 GiB 691k   45 GiB 97k  32 GiB 371k  30 GiB 736k
#   zero1+triton        41 GiB 99k  39 GiB 365k  38 GiB 717k  41 GiB 104k  39 GiB 384k  38 GiB 753k
#   fsdp+triton         41 GiB 99k  32 GiB 376k  30 GiB 745k  41 GiB 104k  32 GiB 392k  30 GiB 778k
#   hybrid                       -  35 GiB 347k  32 GiB 689k            -  35 GiB 370k  32 GiB 735k
#   fsdp+checkpointing  21 GiB 74k  11 GiB 268k  10 GiB 533k   21 GiB 79k  11 GiB 286k  10 GiB 568k
#   fsdp+offload        45 GiB 90k  25 GiB 278k  25 GiB 475k   45 GiB 97k  25 GiB 292k  25 GiB 496k
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
