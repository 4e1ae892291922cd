"""
The command line: `python train.py [config/file.py ...] [--key=value ...]`, applied from left to right.

A script's flags are the plain values at its top: configure(globals()) overrides them, and the comment at the end of
each line is its help text. A config file is Python that assigns to the same names. Fields of the model's GPTConfig that
do not belong to its architecture but say how it computes, such as activation_checkpointing, are flags of every script
too. Such a flag, if a number, must not be negative.
"""

import ast
import difflib
import glob
import os
import re
import sys
import traceback
from contextlib import chdir, suppress

from errors import UserError
from flag_conflicts import conflicts
from output import silence_other_ranks

# the fields of GPTConfig that define a model; dropout may differ between runs
ARCHITECTURE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')

# ranges of values, so that a mistake is reported here and not deep inside a run
POSITIVE = (
    'batch_size',
    'steps',
    'block_size',
    'gradient_accumulation_steps',
    'eval_interval',
    'log_interval',
    'eval_iters',
    'n_layer',
    'n_head',
    'n_embd',
    'lr_decay_iters',
    'num_samples',
    'max_new_tokens',
    'top_k',
    'dist_timeout',
    'shard_bytes',
)
NOT_NEGATIVE = (
    'max_iters',
    'warmup_iters',
    'learning_rate',
    'min_lr',
    'weight_decay',
    'grad_clip',
    'temperature',
    'peak_tflops',
    'warmup',
    'val_tokens',
    'limit',
)
BELOW_1E34 = ('learning_rate', 'min_lr', 'weight_decay', 'peak_tflops')  # AdamW's step size must fit float32
FRACTION = ('dropout', 'beta1', 'beta2')  # 0 <= x < 1
CHOICES = {'gelu': ('erf', 'tanh')}  # for the model's own flags
PATHS = ('out_dir', 'ckpt', 'dataset')  # never empty, except by default
NAMES = ('device', 'dtype', 'backend')  # never True or False, unlike the other flags that default to auto
TORCHRUN = ('standalone', 'nproc_per_node', 'nnodes', 'max_restarts', 'rdzv_backend', 'rdzv_endpoint', 'rdzv_id')


def configure(namespace: dict) -> tuple[dict, set[str]]:
    """
    Overrides the flags in namespace, a script's globals(), from sys.argv. Returns (config, flags_set): all flags with
    their values, and the names of the flags that the command line or a config file set. Under torchrun, silences all
    ranks but rank 0. Prints notes about flags without an effect. Raises UserError for anything wrong.
    """
    silence_other_ranks()
    script = namespace['__file__']
    defaults = {k: v for k, v in namespace.items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))}
    # find the model's folder first: its own flags must be known before any flag is read
    model_dir = (
        [arg.split('=', 1)[1] for arg in sys.argv[1:] if arg.startswith('--model_dir=')]
        or [defaults.get('model_dir', '')]
    )[-1]
    config, flags_set = dict(defaults), set()
    config['model_dir'] = find_model_dir(os.path.expanduser(model_dir), script)
    options = {k: v for k, v in model_options(config['model_dir'], script).items() if k not in config}
    config.update(options)
    defaults.update(options)

    for arg in sys.argv[1:]:
        if arg in ('--help', '-h'):
            print_help(script, defaults, config['model_dir'], namespace.get('__doc__'))
        elif arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            check_name(key, defaults, arg, script)
            if not equals and not isinstance(defaults[key], bool) and (defaults[key] != 'auto' or key in NAMES):
                raise UserError(f'{arg} needs a value: {arg}=...')
            if key != 'model_dir':
                config[key] = convert(key, text if equals else 'true', defaults[key], arg)
            flags_set.add(key)
        else:
            for key, value in run_config_file(arg, config, script).items():
                check_name(key, defaults, f'{key} in {arg}', script, ' A helper variable needs an underscore: _' + key)
                value = convert(key, value, defaults[key], f'{key} = {shown(value)} in {arg}')
                if key == 'model_dir' and value != config[key]:
                    raise UserError(f'{arg} sets model_dir, which works on the command line only: --model_dir={value}')
                config[key] = value
                flags_set.add(key)
    check_values(config, options)
    for note in conflicts(config, flags_set, defaults, help_texts(script, config['model_dir'], defaults)):
        if '_noted' in namespace:  # the script that hands over to this one has printed them
            break
        with suppress(OSError):  # a full disk behind `> train.log` costs the note only
            print(f'note: {note}')
    namespace.update(config)
    return config, flags_set


def check_name(key, known, where, script, hint=''):
    """Raises UserError if no flag has this name."""
    if key not in known:
        initials = {''.join(word[:1] for word in k.split('_')): k for k in reversed(known) if '_' in k}
        near = [initials[key]] if key in initials else [k for k in known if len(key) > 2 and k.startswith(key)]
        near += difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        advice = (f'; did you mean {near[0]}?' if near else '.' * bool(hint)) + hint
        if key.replace('-', '_') in TORCHRUN:
            advice = "; it is torchrun's: write it before the name of the script"
        advice = flag_elsewhere(key, script) or advice
        raise UserError(f'{where}: there is no flag {key}{advice} (--help lists them all)')


def flag_elsewhere(key, script):
    """Returns advice if the model or the script of this name in a neighbouring folder has the flag, else ''."""
    own, name = os.path.split(os.path.realpath(script))
    for model in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(own)), '*', 'model.py'))):
        folder = os.path.dirname(model)
        other = os.path.basename(folder)
        with suppress(Exception):  # not a folder of ours, or one without this script
            if key in model_options(folder, script):
                return f'; the model in {other} has it: --model_dir=../{other}'
            with open(os.path.join(folder, name), encoding='utf-8') as f:
                flags, call, _ = f.read().partition('configure(globals())')
                if call and re.search(rf'^{re.escape(key)} = ', flags, re.M):
                    return f'; {other}/{name} has it'
    return ''


def convert(key, value, default, where):
    """
    Returns value, from the command line (a string) or a config file, as default's type; for 'auto' also as a bool.
    """
    kind = type(default)
    words = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False, 'on': True, 'off': False}
    expected = {str: 'text, in quotes', bool: 'true or false', int: 'a whole number', float: 'a number'}.get(kind)
    if not expected:
        raise UserError(f'{where}: {key} is {shown(default)} in model.py, which no flag can change')
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f'{where}: {key} must be {expected} below 2**63')
    text = str(value)
    if '\0' in text:
        raise UserError(f'{where}: {key} holds a zero byte')
    if kind is str:
        # otherwise out_dir = None in a config file would name a folder None
        if not isinstance(value, (str, int, float, os.PathLike)) or (isinstance(value, bool) and default != 'auto'):
            raise UserError(f'{where}: {key} must be {expected}')
        as_bool = words.get(text.lower()) if default == 'auto' and key not in NAMES else None
        if not text and default and key in PATHS:
            raise UserError(f'{where}: {key} is empty')
        # a shell leaves the ~ in --out_dir=~/out to the program
        return os.path.expanduser(text) if text.startswith('~/') else text if as_bool is None else as_bool
    if kind is bool:
        if text.lower() in words:
            return words[text.lower()]
        raise UserError(f'{where}: {key} must be {expected}')
    try:
        number = float(text.replace('_', '')) if not isinstance(value, bool) else None
        if kind is int and re.fullmatch(r'[+-]?[\d_]+', text):
            number = int(text)  # exact beyond 2**53 too
        if kind is float or number == int(number):
            if kind is int and abs(number) >= 2**63:
                expected += ' below 2**63'
            else:
                return kind(number)
    except (ValueError, TypeError, OverflowError):
        pass
    raise UserError(f'{where}: {key} must be {expected}')


def shown(value):
    """Returns the start of repr(value), or the name of its type if it has no repr, such as 10**5000."""
    try:
        return repr(value)[:100]
    except Exception:
        return f'({type(value).__name__})'


def check_values(config, options):
    """Raises UserError for a value out of its range. options: the names of the model's own flags."""
    numbers = [key for key in options if isinstance(config[key], (int, float))]
    for keys, good, expected in (
        (POSITIVE, lambda v: v >= 1, 'at least 1'),
        ((*NOT_NEGATIVE, *numbers), lambda v: v >= 0, 'at least 0'),
        (BELOW_1E34, lambda v: v < 1e34, 'below 1e34'),
        (FRACTION, lambda v: 0 <= v < 1, 'at least 0 and less than 1'),
    ):
        for key in keys:
            if key in config and not good(config[key]):  # `not good` is also true of NaN
                raise UserError(f'{key}={config[key]}, but it must be {expected}')
    for key in CHOICES.keys() & options:
        if config[key] not in CHOICES[key]:
            raise UserError(f"{key} is '{config[key]}', but it can be {' or '.join(CHOICES[key])}")
    if 'n_head' in config and config['n_embd'] % config['n_head']:
        raise UserError(f'n_embd={config["n_embd"]} cannot be divided among n_head={config["n_head"]} heads')


def run_config_file(path, config, script):
    """
    Returns {name: value} for the names that the config file assigns. The file sees the flags' current values as
    variables. Raises UserError if the file is missing, fails, or assigns nothing.
    """
    own = os.path.dirname(os.path.realpath(script))
    found = [p for p in (path, os.path.join(own, path)) if os.path.isfile(p)]
    if not found:
        names = glob.glob('config/*.py', root_dir=own)
        near = difflib.get_close_matches(os.path.join('config', os.path.basename(path)), names, n=1, cutoff=0.8)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f'{path}: no such config file{hint} (flags are written --key=value)')
    variables = {**config, '__file__': os.path.abspath(found[0])}
    try:
        with open(found[0], encoding='utf-8-sig') as f, chdir('.'):  # comes back, so that out_dir stays where it is
            tree = ast.parse(f.read(), found[0])
            exec(compile(tree, found[0], 'exec'), variables)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit would end the run without a word
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == found[0]]
        lines += [e.lineno] if isinstance(e, SyntaxError) and e.filename == found[0] else []
        raise UserError(f'{found[0]}{f", line {lines[-1]}" if lines else ""}: {type(e).__name__}: {e}') from None
    assigned = {
        node.id for node in module_level(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assigned |= {k for k in config if variables.get(k) is not config[k]}  # or changed by an import, say
    flags = {
        k: variables[k] for k in assigned if k in variables and not k.startswith('_') and not callable(variables[k])
    }
    without_effect = [
        node.lineno
        for node in module_level(tree)
        if (isinstance(node, ast.AnnAssign) and node.value is None)
        or (isinstance(node, ast.Expr) and isinstance(node.value, (ast.Compare, ast.Name)))
    ]
    if without_effect or not flags:
        line = f', line {without_effect[0]}' if without_effect else ''
        raise UserError(f'{found[0]}{line} sets no flag. A config file is Python, not YAML: write batch_size = 8')
    return flags


def module_level(node):
    """Yields the nodes below `node`, except those inside functions, classes and comprehensions: other scopes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(
            child,
            (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
        ):
            yield child
            yield from module_level(child)


def find_model_dir(model_dir, script):
    """Returns the folder of model.py: model_dir relative to here or to the script's folder; '' means the script's."""
    own = os.path.dirname(os.path.realpath(script))
    for folder in (model_dir, os.path.join(own, model_dir)) if model_dir else (own,):
        if os.path.isfile(os.path.join(folder, 'model.py')):
            return os.path.abspath(folder) if model_dir else ''
    raise UserError(f'--model_dir={model_dir}: there is no {os.path.join(model_dir or own, "model.py")}')


def model_options(model_dir, script):
    """
    Returns {field: default} for GPTConfig's fields outside ARCHITECTURE. Parses model.py without running it. Raises
    UserError if it is not Python, or if such a default is not a plain value.
    """
    path = model_file(model_dir, script)
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read(), path)
    except (SyntaxError, ValueError) as e:  # ValueError: not UTF-8, or a zero byte
        raise UserError(f'{path} is not Python: {e}') from None
    options = {}
    for node in tree.body:
        for field in node.body if isinstance(node, ast.ClassDef) and node.name == 'GPTConfig' else ():
            if isinstance(field, ast.AnnAssign) and field.target.id not in (*ARCHITECTURE, 'dropout'):
                try:
                    options[field.target.id] = ast.literal_eval(field.value)
                except (ValueError, AttributeError):  # AttributeError: no default at all
                    where = f'{path}, line {field.lineno}: {field.target.id}'
                    raise UserError(f'{where} needs a plain default, such as 0 or True, because it is a flag') from None
    return options


def model_file(model_dir, script):
    return os.path.join(model_dir or os.path.dirname(os.path.realpath(script)), 'model.py')


def help_texts(script, model_dir, flags):
    """Returns {flag: the comment at the end of its line}."""
    comments = {}
    for path in (script, model_file(model_dir, script)):
        with open(path, encoding='utf-8') as f:
            for line in f:
                match = re.match(r'\s*(\w+)(?:: \w+)? = [^#]*# (.*)', line)
                if match and match[1] in flags:
                    comments.setdefault(match[1], match[2].strip())
    return comments


def print_help(script, defaults, model_dir, doc):
    """Prints each flag with its default and its help text, and ends the program."""
    comments = help_texts(script, model_dir, defaults)
    print(
        (doc or '').strip()
        + '\n\nFlags, written --key=value, with their defaults. Later arguments win: put flags after a config file.'
    )
    for key, value in defaults.items():
        value = repr(value) if '\n' in str(value) else value
        print(f'  {f"--{key}={value}":<40} {comments.get(key, "")}'.rstrip())
    sys.exit(0)
