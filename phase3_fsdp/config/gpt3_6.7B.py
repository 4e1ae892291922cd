# GPT-3 6.7B, not trained here. Sizes, batch and learning rate are those of table 2.1 of the GPT-3 paper
# (arxiv.org/abs/2005.14165); the rest is from its appendix B, for 300 billion tokens. Attention is dense in every
# block; GPT-3 alternated with banded sparse attention. Use it with FSDP's train.py, which has the flags below.
# Checkpoints are sharded, so that no rank has to hold all of the state.
# $ torchrun --standalone --nproc_per_node=8 phase3_fsdp/train.py config/gpt3_6.7B.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                       1 H100      4 H100      8 H100         1 H200       4 H200        8 H200
#   ddp                      -           -           -  144 GiB 12.4k            -             -
#   zero1                    -           -           -  144 GiB 12.4k  120 GiB 46k   113 GiB 93k
#   triton                   -           -           -  136 GiB 13.6k            -             -
#   fsdp                     -  43 GiB 36k  31 GiB 70k  144 GiB 12.4k   43 GiB 38k    31 GiB 73k
#   zero1+triton             -           -           -  136 GiB 13.6k  119 GiB 51k  113 GiB 101k
#   fsdp+triton              -  43 GiB 38k  31 GiB 73k  136 GiB 13.6k   43 GiB 39k    31 GiB 75k
#   hybrid                   -  68 GiB 39k  43 GiB 72k              -   68 GiB 41k    43 GiB 75k
#   fsdp+checkpointing       -  29 GiB 29k  16 GiB 57k  139 GiB 10.3k   29 GiB 31k    16 GiB 59k
#   fsdp+offload             -  18 GiB 34k  18 GiB 64k  144 GiB 12.4k   18 GiB 36k    18 GiB 67k
# It recommends fsdp+triton on 8 H100 (47.7 days), fsdp+triton on 8 H200 (46.2 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

use_fsdp = True
ckpt_format = 'sharded'

n_layer, n_head, n_embd = 32, 32, 4096

# 2 sequences * 2048 tokens * 512 micro-steps over all GPUs = 2,097,152 tokens an iteration
batch_size = 2
block_size = 2048
gradient_accumulation_steps = 512

learning_rate = 1.2e-4
min_lr = 1.2e-5
warmup_iters = 179  # 375 million tokens
lr_decay_iters = 123978  # 260 billion tokens
max_iters = 143051
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 50
log_interval = 10
