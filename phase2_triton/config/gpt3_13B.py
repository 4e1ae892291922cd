# GPT-3 13B, not trained here. Sizes, batch and learning rate are those of table 2.1 of the GPT-3 paper
# (arxiv.org/abs/2005.14165); the rest is from its appendix B, for 300 billion tokens. Attention is dense in every
# block; GPT-3 alternated with banded sparse attention. The table has a width of 5,140 for 40 heads of 128; here it is
# 40 * 128 = 5,120. Use it with FSDP's train.py, which has the flags below. Checkpoints are sharded, so that no rank has
# to hold all of the state.
# $ torchrun --standalone --nproc_per_node=8 phase3_fsdp/train.py config/gpt3_13B.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                       1 H100        4 H100      8 H100  1 H200        4 H200      8 H200
#   ddp                      -             -           -       -             -           -
#   zero1                    -             -           -       -             -           -
#   triton                   -             -           -       -             -           -
#   fsdp                     -  76 GiB 19.1k  52 GiB 37k       -  76 GiB 19.9k  52 GiB 38k
#   zero1+triton             -             -           -       -             -           -
#   fsdp+triton              -  76 GiB 20.0k  52 GiB 39k       -    76 GiB 21k  52 GiB 40k
#   hybrid                   -             -  76 GiB 38k       -   125 GiB 21k  76 GiB 40k
#   fsdp+checkpointing       -  53 GiB 15.6k  29 GiB 30k       -  53 GiB 16.2k  29 GiB 31k
#   fsdp+offload             -  28 GiB 18.3k  28 GiB 34k       -  28 GiB 19.0k  28 GiB 35k
# It recommends fsdp+triton on 8 H100 (90.1 days), fsdp+triton on 8 H200 (87.6 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

use_fsdp = True
ckpt_format = 'sharded'

n_layer, n_head, n_embd = 40, 40, 5120

# 2 sequences * 2048 tokens * 512 micro-steps over all GPUs = 2,097,152 tokens an iteration
batch_size = 2
block_size = 2048
gradient_accumulation_steps = 512

learning_rate = 1.0e-4
min_lr = 1.0e-5
warmup_iters = 179  # 375 million tokens
lr_decay_iters = 123978  # 260 billion tokens
max_iters = 143051
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 50
log_interval = 10
