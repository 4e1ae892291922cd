# the losses of OpenAI's GPT-2 (124M parameters) on a data set with its encoding
# $ python train.py config/eval_gpt2.py
batch_size = 8
eval_iters = 500  # many, for a good estimate
eval_only = True
wandb_log = False
init_from = 'gpt2'
