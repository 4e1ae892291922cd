# GPT-2 medium (350M). The recipe was trained: llm.c, scripts/run_gpt2_350M.sh, 31 billion tokens of FineWeb, 14 hours
# on 8 A100s. Here without biases, as in train_gpt2.py; llm.c has them. Its 64 sequences a GPU are 32 here, in twice as
# many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_350M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                            1 H100       4 H100        8 H100       1 H200       4 H200        8 H200
#   ddp                 44 GiB 187k  44 GiB 695k  44 GiB 1368k  44 GiB 202k  44 GiB 754k  44 GiB 1486k
#   zero1               44 GiB 187k  42 GiB 695k  42 GiB 1368k  44 GiB 202k  42 GiB 753k  42 GiB 1481k
#   triton              39 GiB 207k  40 GiB 769k  40 GiB 1511k  39 GiB 219k  40 GiB 813k  40 GiB 1600k
#   fsdp                44 GiB 187k  32 GiB 727k  32 GiB 1444k  44 GiB 202k  32 GiB 780k  32 GiB 1549k
#   zero1+triton        39 GiB 207k  38 GiB 769k  38 GiB 1510k  39 GiB 219k  38 GiB 812k  38 GiB 1594k
#   fsdp+triton         39 GiB 207k  31 GiB 797k  30 GiB 1583k  39 GiB 219k  31 GiB 835k  30 GiB 1658k
#   hybrid                        -  33 GiB 725k  32 GiB 1441k            -  33 GiB 779k  32 GiB 1546k
#   fsdp+checkpointing  19 GiB 153k   8 GiB 566k   8 GiB 1127k  19 GiB 166k   8 GiB 608k   8 GiB 1209k
#   fsdp+offload        44 GiB 187k  29 GiB 599k  29 GiB 1029k  44 GiB 202k  29 GiB 634k  29 GiB 1081k
# It recommends fsdp+triton on 8 H100 (0.2 days), fsdp+triton on 8 H200 (0.2 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

n_layer, n_head, n_embd = 24, 16, 1024

# 32 sequences * 1024 tokens * 16 micro-steps over all GPUs = 524,288 tokens an iteration
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16

learning_rate = 3e-4
min_lr = 0.0
warmup_iters = 700
max_iters = 60000
lr_decay_iters = 60000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 100
log_interval = 10
