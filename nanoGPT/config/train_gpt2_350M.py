# GPT-2 medium (350M). The recipe was trained: llm.c, scripts/run_gpt2_350M.sh, 31 billion tokens of FineWeb, 14 hours
# on 8 A100s. Here without biases, as in train_gpt2.py; llm.c has them. Its 64 sequences a GPU are 32 here, in twice as
# many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_350M.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                            1 H100       4 H100        8 H100       1 H200       4 H200        8 H200
#   ddp                 44 GiB 185k  44 GiB 693k  44 GiB 1364k  44 GiB 201k  44 GiB 752k  44 GiB 1482k
#   zero1               44 GiB 185k  42 GiB 692k  42 GiB 1363k  44 GiB 201k  42 GiB 750k  42 GiB 1476k
#   triton              39 GiB 203k  40 GiB 756k  40 GiB 1485k  39 GiB 215k  40 GiB 802k  40 GiB 1579k
#   fsdp                44 GiB 185k  31 GiB 727k  30 GiB 1443k  44 GiB 201k  31 GiB 780k  30 GiB 1548k
#   zero1+triton        39 GiB 203k  38 GiB 755k  38 GiB 1483k  39 GiB 215k  38 GiB 801k  38 GiB 1573k
#   fsdp+triton         39 GiB 203k  31 GiB 782k  30 GiB 1553k  39 GiB 215k  31 GiB 823k  30 GiB 1634k
#   hybrid                        -  32 GiB 725k  31 GiB 1440k            -  32 GiB 778k  31 GiB 1545k
#   fsdp+checkpointing  19 GiB 152k   8 GiB 566k   8 GiB 1126k  19 GiB 165k   8 GiB 607k   8 GiB 1208k
#   fsdp+offload        44 GiB 185k  28 GiB 598k  28 GiB 1028k  44 GiB 201k  28 GiB 633k  28 GiB 1080k
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
