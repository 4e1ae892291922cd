# GPT-3 2.7B, not trained here. Sizes, batch and learning rate are those of table 2.1 of the GPT-3 paper
# (arxiv.org/abs/2005.14165); the rest is from its appendix B, for 300 billion tokens. Attention is dense in every
# block; GPT-3 alternated with banded sparse attention. Use it with FSDP's train.py, which has the flags below.
# Checkpoints are sharded, so that no rank has to hold all of the state.
# $ torchrun --standalone --nproc_per_node=8 phase3_fsdp/train.py config/gpt3_2.7B.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                           1 H100       4 H100       8 H100      1 H200       4 H200       8 H200
#   ddp                 75 GiB 29k            -            -  75 GiB 30k  80 GiB 113k  80 GiB 224k
#   zero1               75 GiB 29k  65 GiB 107k  63 GiB 212k  75 GiB 30k  65 GiB 113k  63 GiB 224k
#   triton              71 GiB 31k            -            -  71 GiB 32k  79 GiB 120k  79 GiB 237k
#   fsdp                75 GiB 29k   32 GiB 98k  27 GiB 193k  75 GiB 30k  46 GiB 116k  41 GiB 230k
#   zero1+triton        71 GiB 31k  64 GiB 116k  61 GiB 229k  71 GiB 32k  64 GiB 120k  61 GiB 237k
#   fsdp+triton         71 GiB 31k  32 GiB 103k  27 GiB 202k  71 GiB 32k  46 GiB 120k  41 GiB 239k
#   hybrid                       -  42 GiB 102k  32 GiB 196k           -  56 GiB 115k  46 GiB 230k
#   fsdp+checkpointing  56 GiB 24k   14 GiB 78k   9 GiB 153k  56 GiB 25k   28 GiB 89k  23 GiB 177k
#   fsdp+offload        75 GiB 29k   22 GiB 90k  22 GiB 162k  75 GiB 30k   22 GiB 93k  22 GiB 168k
# It recommends fsdp+triton on 8 H100 (17.2 days), fsdp+triton on 8 H200 (14.5 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

use_fsdp = True
ckpt_format = 'sharded'

n_layer, n_head, n_embd = 32, 32, 2560

# 4 sequences * 2048 tokens * 128 micro-steps over all GPUs = 1,048,576 tokens an iteration
batch_size = 4
block_size = 2048
gradient_accumulation_steps = 128

learning_rate = 1.6e-4
min_lr = 1.6e-5
warmup_iters = 358  # 375 million tokens
lr_decay_iters = 247955  # 260 billion tokens
max_iters = 286102
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 50
log_interval = 10
