# GPT-2 medium (350M). llm.c trained with this recipe (scripts/run_gpt2_350M.sh): 31 billion tokens of FineWeb in 14
# hours on 8 A100s. Two things differ here: there are no biases, as in train_gpt2.py, and a micro-step has 32 sequences
# per GPU instead of 64, so there are twice as many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_350M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                            1 H100       4 H100        8 H100       1 H200       4 H200        8 H200
#   ddp                 44 GiB 186k  44 GiB 691k  44 GiB 1361k  44 GiB 201k  44 GiB 749k  44 GiB 1476k
#   zero1               44 GiB 186k  42 GiB 691k  42 GiB 1361k  44 GiB 201k  42 GiB 748k  42 GiB 1472k
#   triton              39 GiB 207k  38 GiB 767k  38 GiB 1506k  39 GiB 218k  38 GiB 809k  38 GiB 1592k
#   fsdp                44 GiB 186k  32 GiB 721k  32 GiB 1432k  44 GiB 201k  32 GiB 774k  32 GiB 1536k
#   zero1+triton        39 GiB 207k  38 GiB 767k  38 GiB 1505k  39 GiB 218k  38 GiB 808k  38 GiB 1586k
#   fsdp+triton         39 GiB 207k  31 GiB 794k  30 GiB 1576k  39 GiB 218k  31 GiB 831k  30 GiB 1648k
#   hybrid                        -  33 GiB 719k  32 GiB 1429k            -  33 GiB 772k  32 GiB 1533k
#   fsdp+checkpointing  19 GiB 152k   9 GiB 562k   9 GiB 1118k  19 GiB 165k   9 GiB 603k   9 GiB 1199k
#   fsdp+offload        44 GiB 186k  30 GiB 594k  30 GiB 1023k  44 GiB 201k  30 GiB 629k  30 GiB 1074k
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
