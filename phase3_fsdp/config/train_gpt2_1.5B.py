# GPT-2 XL (1.5B). llm.c trained with this recipe (scripts/run_gpt2_1558M.sh): 33.6 billion tokens of FineWeb-Edu in 24
# hours on 8 H100s. Two things differ here: there are no biases, as in train_gpt2.py, and a micro-step has 8 sequences
# per GPU instead of 16, so there are twice as many micro-steps.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_1.5B.py --dataset=FOLDER
# plan.py says, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:
#                           1 H100       4 H100       8 H100      1 H200       4 H200       8 H200
#   ddp                 53 GiB 46k  56 GiB 173k  56 GiB 343k  53 GiB 50k  56 GiB 186k  56 GiB 368k
#   zero1               53 GiB 46k  47 GiB 173k  46 GiB 343k  53 GiB 50k  47 GiB 185k  46 GiB 368k
#   triton              50 GiB 51k  55 GiB 190k  55 GiB 376k  50 GiB 53k  55 GiB 199k  55 GiB 394k
#   fsdp                53 GiB 46k  35 GiB 179k  32 GiB 356k  53 GiB 50k  35 GiB 190k  32 GiB 379k
#   zero1+triton        50 GiB 51k  46 GiB 190k  44 GiB 376k  50 GiB 53k  46 GiB 199k  44 GiB 393k
#   fsdp+triton         50 GiB 51k  35 GiB 192k  32 GiB 382k  50 GiB 53k  35 GiB 200k  32 GiB 399k
#   hybrid                       -  40 GiB 179k  35 GiB 356k           -  40 GiB 190k  35 GiB 379k
#   fsdp+checkpointing  33 GiB 38k  17 GiB 138k  14 GiB 275k  33 GiB 41k  17 GiB 146k  14 GiB 291k
#   fsdp+offload        53 GiB 46k  20 GiB 147k  20 GiB 266k  53 GiB 50k  20 GiB 154k  20 GiB 278k
# It recommends triton on 8 H100 (1.0 days), triton on 8 H200 (1.0 days).
# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.
# end of what plan.py says

n_layer, n_head, n_embd = 48, 25, 1600

# 8 sequences * 1024 tokens * 128 micro-steps over all GPUs = 1,048,576 tokens an iteration
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 128

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700
max_iters = 32000
lr_decay_iters = 32000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 100
log_interval = 10
