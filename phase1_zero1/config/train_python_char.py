# a small character-level GPT on the sources of Python's standard library: minutes on a laptop; `make demo` trains it
# $ python data/python_char/prepare.py
# $ python train.py config/train_python_char.py

out_dir = 'out-python-char'
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # it may overfit: save when the validation loss is the lowest so far, and at the end

dataset = 'python_char'
gradient_accumulation_steps = 4  # so that 1, 2 or 4 processes can share it
batch_size = 4
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 3e-3  # small networks tolerate a higher rate
max_iters = 2000
lr_decay_iters = 2000
min_lr = 3e-4
beta2 = 0.99  # the batches are small
warmup_iters = 50
