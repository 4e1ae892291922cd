# finetunes the largest GPT-2 on Shakespeare
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare.py
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'

always_save_checkpoint = False  # only when the validation loss improves

# 1 sequence * 32 micro-steps * 1024 tokens = 32,768 tokens per iteration; 301,966 tokens are 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a constant learning rate
learning_rate = 3e-5
decay_lr = False
