# GPT-2 medium (350M). The recipe was trained: llm.c, scripts/run_gpt2_350M.sh, 31 billion tokens of FineWeb, 14 hours
# on 8 A100s. Here without biases, as in train_gpt2.py; llm.c has them. Its 64 sequences a GPU are 32 here, in twice as
# many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_350M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                            1 H100       4 H100        8 H100       1 H200       4 H200        8 H200
#   ddp                 44 GiB 184k  44 GiB 684k  44 GiB 1347k  44 GiB 199k  44 GiB 742k  44 GiB 1463k
#   zero1               44 GiB 184k  42 GiB 684k  42 GiB 1346k  44 GiB 199k  42 GiB 741k  42 GiB 1458k
#   triton              39 GiB 201k  40 GiB 747k  40 GiB 1468k  39 GiB 213k  40 GiB 792k  40 GiB 1560k
#   fsdp                44 GiB 184k  31 GiB 719k  30 GiB 1429k  44 GiB 199k  31 GiB 771k  30 GiB 1531k
#   zero1+triton        39 GiB 201k  38 GiB 746k  38 GiB 1466k  39 GiB 213k  38 GiB 791k  38 GiB 1554k
#   fsdp+triton         39 GiB 201k  33 GiB 773k  32 GiB 1534k  39 GiB 213k  33 GiB 813k  32 GiB 1614k
#   hybrid                        -  32 GiB 718k  31 GiB 1426k            -  32 GiB 770k  31 GiB 1528k
#   fsdp+checkpointing  19 GiB 143k   8 GiB 560k   8 GiB 1115k  19 GiB 155k   8 GiB 601k   8 GiB 1195k
#   fsdp+offload        44 GiB 184k  28 GiB 593k  28 GiB 1021k  44 GiB 199k  28 GiB 628k  28 GiB 1072k
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
